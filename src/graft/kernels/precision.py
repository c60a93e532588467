"""In which dtype a fused call computes: custom autograd functions do not take part in autocast by themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``F.linear`` computes in on ``x``: autocast's where it is on (fp64 is left alone), else x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
