"""Singular value decompositions with fixed signs, so that runs and machines agree."""

from __future__ import annotations

import torch
from torch import Tensor


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flips pairs (u_i, v_i) so that the largest entry of each row of ``Vh`` [k, n] is positive; ``U`` is [m, k]."""
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    return U * signs.T, Vh * signs


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0, power_iterations: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` singular triplets ``U [m, rank], S [rank], Vh [rank, n]`` of ``matrix [m, n]``.

    Exact for small matrices and ranks near full; otherwise a randomised range finder with power iterations and a private seed
    (Halko, Martinsson, Tropp, arXiv 0909.4061). Works in the matrix's dtype, at least fp32.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    smallest = min(matrix.shape)
    width = min(smallest, rank + 16)
    if width * 3 >= smallest:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
        basis = torch.linalg.qr(matrix @ start).Q
        for _ in range(power_iterations):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        small, S, Vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        U = basis @ small
    U, Vh = fix_signs(U[:, :rank], Vh[:rank])
    return U, S[:rank], Vh
