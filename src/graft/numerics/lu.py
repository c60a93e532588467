"""LDU decomposition with row pivoting: ``W = P L diag(D) U``, L and U with ones on their diagonals."""

from __future__ import annotations

import torch
from torch import Tensor


def ldu(matrix: Tensor, smallest: float = 1e-7) -> tuple[Tensor, Tensor, Tensor]:
    """``(PL [m, k], D [k], U [k, n])`` of ``matrix [m, n]``, k = min(m, n), rows permuted back in PL; in at least fp32.

    Pivots of less than ``smallest`` times the largest are set to zero, and their row of U to the unit vector: dividing by them would
    blow U up. What that leaves out of W is of that size.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    permutation, lower, upper = torch.linalg.lu(matrix)
    pivots = upper.diagonal().clone()
    tiny = pivots.abs() <= smallest * pivots.abs().max()
    unit = upper / torch.where(tiny, 1.0, pivots)[:, None]
    unit[tiny] = torch.eye(*upper.shape).to(upper)[tiny]
    return permutation @ lower, torch.where(tiny, 0.0, pivots), unit
