"""Orthogonal maps from few parameters: Cayley transforms, Householder reflections, blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def skew(vectors: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices ``[..., size, size]`` from their upper triangles ``[..., size (size - 1) / 2]``, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    upper: Tensor = vectors.new_zeros(*vectors.shape[:-1], size, size)
    upper[..., rows, columns] = vectors
    return upper - upper.mT


def cayley(Q: Tensor) -> Tensor:
    """``(I - Q)^-1 (I + Q)``, orthogonal for skew-symmetric Q ``[..., n, n]``, the identity for Q = 0."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    R: Tensor = torch.linalg.solve(identity - Q, identity + Q)
    return R


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """:func:`cayley` without an inverse, ``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)``: orthogonal up to powers of Q from ``terms`` on."""
    R, power = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + 2 * Q, Q
    for exponent in range(2, terms):
        power = power @ Q
        R = R + (1 if exponent == terms - 1 else 2) * power
    return R


def householder(units: Tensor) -> Tensor:
    """The product of reflections ``H_1 H_2 ... H_r = I - U V``, ``H_i = I - 2 u_i u_i^T``, of unit vectors, the columns of ``U [n, r]``.

    Returns ``V = T U^T [r, n]``, where ``T^-1 = I / 2 + the strict upper triangle of U^T U``.
    """
    inverse = torch.triu(units.mT @ units, 1) + 0.5 * torch.eye(units.shape[1], dtype=units.dtype, device=units.device)
    V: Tensor = torch.linalg.solve_triangular(inverse, units.mT, upper=True)
    return V


def block_diagonal(blocks: Tensor) -> Tensor:
    """The matrix ``[k n, k n]`` with ``blocks [k, n, n]`` on its diagonal."""
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def times_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """``rows [..., k n] @ block_diagonal(blocks)`` for ``blocks [k, n, n]``, or one of them in every place ``[1, n, n]``."""
    parts = rows.reshape(*rows.shape[:-1], -1, blocks.shape[-1])
    return torch.einsum("...kb,kbc->...kc", parts, blocks.expand(parts.shape[-2], -1, -1)).flatten(-2)
