"""Where a model's tensors can be."""

from __future__ import annotations

import torch

from selective_ssm.errors import UserError


def usable_device(device: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: torch knows no such device, it is not there, or it cannot compute.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    if str(device).partition(":")[0] == "meta":
        raise UserError("the device 'meta' holds no values to compute with: choose cpu, cuda, …")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except NotImplementedError as error:  # its message is a list of everything torch was built with
        raise UserError(f"the device '{device}' cannot be used: there is none here, or torch lacks it") from error
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the device '{device}' cannot be used: {reason}") from error
    return found
