"""Value checks that the configs of layers and models share."""

from __future__ import annotations

import math

from selective_ssm.config import Config
from selective_ssm.errors import UserError


def require_positive(config: Config, *names: str) -> None:
    """Check that the named fields of a config are finite and greater than 0; a field that is None passes.

    Raises:
        UserError: one of them is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{config.kind}: {name} must be greater than 0, got {value!r}")
