"""Every inner SSM by kind; blocks build theirs from here."""

from __future__ import annotations

from selective_ssm.layers.hyena_filter import HyenaFilter, HyenaFilterConfig
from selective_ssm.layers.no_ssm import NoSSM
from selective_ssm.layers.s4 import S4, S4Config
from selective_ssm.layers.s4d import S4D, S4DConfig
from selective_ssm.layers.s6 import S6, S6Config
from selective_ssm.layers.shift import Shift, ShiftConfig
from selective_ssm.layers.ssm import InnerSSM, SSMConfig

SSMS: dict[str, tuple[type[SSMConfig], type[InnerSSM]]] = {
    "s6": (S6Config, S6),
    "s4d": (S4DConfig, S4D),
    "s4": (S4Config, S4),
    "hyena_filter": (HyenaFilterConfig, HyenaFilter),
    "shift": (ShiftConfig, Shift),
}


def build_ssm(config: SSMConfig | None, width: int, d_model: int) -> InnerSSM:
    """The inner SSM that a config describes, over `width` channels of a block in a model of width `d_model`.

    None is the block without one.
    """
    if config is None:
        return NoSSM()
    return SSMS[config.kind][1](config, width, d_model)
