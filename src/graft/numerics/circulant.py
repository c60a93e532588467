"""Block-circulant maps: every block ``C(w)`` is the circulant matrix of a vector, applied by FFT.

``C(w)[i, j] = w[(i - j) mod b]``, so that ``C(w) x`` is the circular convolution of w and x.
"""

from __future__ import annotations

import torch
from torch import Tensor


def circulant(kernels: Tensor) -> Tensor:
    """The matrix ``[m b, n b]`` of ``kernels [m, n, b]``: block (i, j) is ``C(kernels[i, j])``."""
    m, n, b = kernels.shape
    shift = (torch.arange(b, device=kernels.device)[:, None] - torch.arange(b, device=kernels.device)) % b
    return kernels[:, :, shift].permute(0, 2, 1, 3).reshape(m * b, n * b)


def circulant_linear(x: Tensor, kernels: Tensor) -> Tensor:
    """``x [..., n b]`` times the transposed matrix of ``kernels [m, n, b]``: ``[..., m b]``, in O(m n b + (m + n) b log b) a row."""
    m, n, b = kernels.shape
    spectrum = torch.fft.rfft(x.reshape(*x.shape[:-1], n, b))
    mixed = torch.einsum("...nf,mnf->...mf", spectrum, torch.fft.rfft(kernels))
    product: Tensor = torch.fft.irfft(mixed, b).reshape(*x.shape[:-1], m * b)
    return product
