"""Deltas of the form ``dW = B diag(d) A`` with frozen B and A: of what is multiplied only the vector d is trained.

So no gradient of B or A is ever formed, and with many ranks (all singular values of W) that is what most of the time would go to.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graft.core.delta import Delta
from graft.methods.families.factored import Factored, cheaper_in_factors


class Diagonal(Factored):
    """Subclasses define :meth:`parts`."""

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """``B [out, r]``, ``d [r]`` with the effective scale folded in, and ``A [r, in]``."""
        raise NotImplementedError

    def product(self) -> tuple[Tensor, Tensor]:
        B, d, A = self.parts()
        return B * d, A

    def forward(self, x: Tensor) -> Tensor:
        target, (B, d, A) = self.target, self.parts()
        if not target.pointwise or not cheaper_in_factors(x, target, len(d), passes=2):
            return Delta.forward(self, x)
        return target.apply(x, target.weight(), target.bias) + target.mix(target.scale(target.apply(x, A), d), B)

    @classmethod
    def together(cls, deltas: Sequence[Delta], x: Tensor) -> None:
        """One by one: the shared path of low-rank maps would form gradients of B."""
