"""Orthonormal transforms as matrices: row k holds basis vector k, so ``T @ x`` analyses and ``T.T @ c`` synthesises.

As matrices they are differentiable, run on every device, and two products transform a plane: ``C = T_out X T_in^T``, ``X = T_out^T C T_in``.
Matrices are made in fp64 (wavelets by PyWavelets) and kept.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II ``[size, size]``: ``sqrt(2/n) cos(pi (2 j + 1) k / 2 n)`` in row k, ``1/sqrt(n)`` in row 0; fp64."""
    angles = torch.arange(size, dtype=torch.float64)[:, None] * (torch.arange(size, dtype=torch.float64) + 0.5) * (math.pi / size)
    matrix = angles.cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


@lru_cache(maxsize=64)
def wavelet_matrix(size: int, wavelet: str, level: int) -> Tensor:
    """A periodised discrete wavelet transform ``[size, size]`` of ``level`` steps, approximation rows first; fp64.

    ``size`` must be a multiple of ``2 ** level``. Orthonormal for orthogonal wavelets (haar, db2, ...).
    """
    import numpy
    import pywt

    if size % 2**level:
        raise ValueError(f"size is {size}, which {level} halvings do not divide.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of filters longer than the signal, which wrap around it and stay orthonormal
        parts = pywt.wavedec(numpy.eye(size), wavelet, mode="periodization", level=level, axis=0)
    return torch.from_numpy(numpy.concatenate(parts))


def synthesise(coefficients: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left^T C right``: the plane whose transform is C ``[m, n]``; left [m, m], right [n, n]."""
    plane: Tensor = left.to(coefficients).T @ coefficients @ right.to(coefficients)
    return plane


def analyse(plane: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left X right^T``: the transform of X ``[m, n]``, the inverse of :func:`synthesise` for orthonormal matrices."""
    coefficients: Tensor = left.to(plane) @ plane @ right.to(plane).T
    return coefficients
