"""Principal components of data that arrives in portions."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.numerics.svd import fix_signs


class IncrementalPCA:
    """The leading ``rank`` principal directions of mean-centred rows, updated portion by portion (Ross et al., 2008).

    Exact when ``rank`` covers the data; otherwise the tail of each update is forgotten. Portions smaller than ``rank`` are kept
    back until enough rows are there. After at least one update: ``components [rank, n]`` (orthonormal rows),
    ``singular_values [rank]``, ``ratio [rank]`` (explained over total variance; 0 for constant data).
    """

    def __init__(self, rank: int):
        self.rank, self.count = rank, 0
        self.components: Tensor | None = None
        self.singular_values = self.mean = self.sum_squares = torch.zeros(0)
        self._waiting: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Takes in ``rows [n, features]``."""
        self._waiting.append(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        if sum(len(portion) for portion in self._waiting) >= self.rank:
            self._absorb(torch.cat(self._waiting))
            self._waiting = []

    def finish(self) -> None:
        """Takes in what was kept back."""
        if self._waiting and any(len(portion) for portion in self._waiting):
            self._absorb(torch.cat(self._waiting))
        self._waiting = []

    def _absorb(self, rows: Tensor) -> None:
        count, mean = len(rows), rows.mean(0)
        centred = rows - mean
        if self.components is None:
            stacked, self.mean, self.sum_squares = centred, mean, centred.square().sum()
        else:
            shift = (self.count * count / (self.count + count)) ** 0.5 * (self.mean - mean)
            stacked = torch.cat([self.singular_values[:, None] * self.components, centred, shift[None]])
            self.sum_squares = self.sum_squares + centred.square().sum() + shift.square().sum()
            self.mean = (self.count * self.mean + count * mean) / (self.count + count)
        U, S, Vh = torch.linalg.svd(stacked, full_matrices=False)
        _, Vh = fix_signs(U, Vh)
        keep = min(self.rank, len(S))
        self.components, self.singular_values = Vh[:keep], S[:keep]
        self.count += count

    @property
    def ratio(self) -> Tensor:
        floor = torch.finfo(self.singular_values.dtype).eps * self.mean.square().sum() * self.count
        if self.sum_squares <= floor:  # constant data: what is left is rounding
            return torch.zeros_like(self.singular_values)
        ratio: Tensor = self.singular_values.square() / self.sum_squares
        return ratio
