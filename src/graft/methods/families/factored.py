"""Deltas of the form ``dW = B A``: what LoRA and everything that is made like it share.

B [out, r] and A [r, in] with the effective scale folded into B. :class:`Factored` runs any such delta; :class:`LowRank` adds the
trained pair itself: ranks with an active mask, an explicit scale, and a frozen start that is subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.core.delta import Delta, Layout, Pair
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import Target
from graft.kernels.lora import LowRankMap, lora_linear, lora_linears

if TYPE_CHECKING:
    from graft.core.adapter import Adapter

PLAIN = ("linear", "conv1d")  # kinds of targets that are one matrix product


class Factored(Delta):
    """A delta with a low-rank product; subclasses define :meth:`product`. Where dW is more than it, they also answer :meth:`factors`."""

    @property
    def dropout(self) -> float:
        """The chance of dropping an input of the branch while training, for methods that have such an option."""
        return getattr(self.config, "dropout", 0.0)

    def product(self) -> tuple[Tensor, Tensor]:
        """``(B [out, r], A [r, in])``, effective scale folded in."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.product()

    def weight(self) -> tuple[Tensor, Tensor | None]:
        B, A = self.product()
        return torch.addmm(self.target.weight().to(B.dtype), B, A), self.target.bias

    def map(self) -> LowRankMap:
        """W, b, A, B of the low-rank map that :meth:`forward` runs before it calls :meth:`finish`."""
        B, A = self.product()
        return LowRankMap(self.target.weight(), self.target.bias, A, B)

    def finish(self, y: Tensor) -> Tensor:
        """What comes after the low-rank map: nothing here."""
        return y

    def forward(self, x: Tensor) -> Tensor:
        target, (weight, bias, A, B) = self.target, self.map()
        dropping = self.dropping and x.is_floating_point()
        if target.kind in PLAIN and not dropping:
            y = lora_linear(x, weight, bias, A, B)
        elif not target.pointwise:
            if dropping:
                raise GraftError(f"{target} cannot drop inputs of the branch alone; set dropout to 0 or narrow the targets.")
            y = target.apply(x, torch.addmm(weight.to(B.dtype), B, A), bias)
        else:
            branch = F.dropout(x, self.dropout) if dropping else x
            y = target.apply(x, weight, bias) + target.mix(target.apply(branch, A), B)
        return self.finish(y)

    @property
    def dropping(self) -> bool:
        return self.training and self.dropout > 0

    @classmethod
    def together(cls, deltas: Sequence[Delta], x: Tensor) -> list[Tensor] | None:
        factored = [delta for delta in deltas if isinstance(delta, Factored) and delta.target.kind in PLAIN and not delta.dropping]
        if len(factored) < len(deltas):
            return None
        outputs = lora_linears(x, [delta.map() for delta in factored])
        return [delta.finish(y) for delta, y in zip(factored, outputs, strict=True)]


class LowRank(Factored):
    """``dW = scale * (B A - B0 A0)`` over the active ranks: A [r, in] and B [out, r] trained, A0 and B0 frozen or absent.

    ``scale`` is stored as it is; nothing recomputes it from alpha and rank. ``active`` [r] switches ranks on and off without
    touching the optimizer's moments. With a frozen start (:meth:`freeze_start`) the delta is zero whatever A and B start at, and
    a file holds the stacked pair ``[B | B0], [A ; -A0]``: an ordinary low-rank adapter against the original W.
    """

    active: Tensor
    A0: Tensor | None
    B0: Tensor | None

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, rank = self.target, layout["rank"]
        check_rank(rank, target)
        self.scale = float(layout["scale"])
        out_features, in_features = target.shape
        A, B = uniform(rank, in_features, generator, target.dtype), torch.zeros(out_features, rank, dtype=target.dtype)
        if target.kind == "embedding":
            A, B = torch.zeros_like(A), torch.randn(B.shape, generator=generator).to(target.dtype)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        active = torch.ones(rank, dtype=torch.bool)
        active[layout["inactive"]] = False
        self.register_buffer("active", active)
        frozen: int = layout["frozen"]
        if frozen:
            check_rank(frozen, target)
        self.register_buffer("A0", A.new_zeros(frozen, in_features) if frozen else None)
        self.register_buffer("B0", B.new_zeros(out_features, frozen) if frozen else None)

    @property
    def rank(self) -> int:
        """How many ranks there are, active or not."""
        return self.A.shape[0]

    @property
    def layout(self) -> Layout:
        inactive = torch.nonzero(~self.active).flatten().tolist()
        return {"rank": self.rank, "scale": self.scale, "frozen": 0 if self.A0 is None else len(self.A0), "inactive": inactive}

    def acting(self) -> tuple[Tensor, Tensor]:
        """``(B, A)`` as they act: what a method makes of the trained pair before anything else."""
        return self.B, self.A

    def product(self) -> tuple[Tensor, Tensor]:
        B, A = self.acting()
        B = B * (self.active.to(B.dtype) * self.scale)
        if self.A0 is not None and self.B0 is not None:
            B, A = torch.cat([B, self.B0 * self.scale], 1), torch.cat([A, -self.A0])
        return B, A

    def pair(self) -> Pair:
        return Pair(self.A, self.B, self.scale)

    def set_start(self, A: Tensor, B: Tensor) -> None:
        """Puts A [r, in] and B [out, r] of any rank in place of the present ones (before the optimizer is made); the scale stays."""
        check_rank(len(A), self.target)
        self.A, self.B = nn.Parameter(A.to(self.A).contiguous()), nn.Parameter(B.to(self.B).contiguous())
        self.active = self.active.new_ones(len(A))

    def freeze_start(self) -> None:
        """Remembers the present A and B as the start that is subtracted, so that the delta is zero now."""
        self.B0, self.A0 = (factor.detach().clone() for factor in self.acting())

    def file_key(self, key: str, peft: PeftFormat | None) -> str:
        name = super().file_key(key, peft)
        if self.target.kind == "embedding" and key in ("A", "B") and peft:
            return name.removesuffix(".weight").replace("lora_", "lora_embedding_")
        return name

    def exported(self) -> dict[str, Tensor]:
        tensors = {name: value for name, value in self.tensors().items() if name not in ("active", "A0", "B0")}
        B, A = (factor.detach() for factor in self.acting())
        B = B * self.active
        if self.A0 is not None and self.B0 is not None:
            A, B = torch.cat([A, -self.A0]), torch.cat([B, self.B0], 1)
        if isinstance(self.target.module, nn.Conv2d):  # PEFT's form: a convolution down to r channels, and a 1 x 1 convolution up
            A, B = A.reshape(len(A), *self.target.module.weight.shape[1:]), B[:, :, None, None]
        return {**tensors, "A": A, "B": B}

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        rank, A, B = self.rank, exported["A"].flatten(1), exported["B"].flatten(1)
        own = {name: value for name, value in self.tensors().items() if name not in ("active", "A", "B", "A0", "B0")}
        for name, value in own.items():
            value.copy_(exported[name])
        self.A.copy_(A[:rank])
        self.B.copy_(B[:, :rank])
        if self.A0 is not None and self.B0 is not None:
            self.A0.copy_(-A[rank:])
            self.B0.copy_(B[:, rank:])


def cheaper_in_factors(x: Tensor, target: Target, rank: int, passes: int = 3) -> bool:
    """Whether products with thin factors cost less than forming W' and its gradient, by multiplications of a training step.

    ``passes`` over both factors: forward, gradient of x and, where the factors themselves are trained, theirs.
    """
    out_features, in_features = target.shape
    rows = x.numel() // in_features
    return passes * rows * rank * (out_features + in_features) <= (2 * rank + rows) * out_features * in_features


def low_rank_deltas(adapter: Adapter, method: str) -> dict[str, LowRank]:
    """The deltas of ``adapter`` that a start can fill; raises :class:`GraftError` where they have no A and B to set."""
    heads = adapter.whole_targets
    deltas = {name: delta for name, delta in adapter.deltas.items() if name not in heads}
    for delta in deltas.values():
        if not isinstance(delta, LowRank):
            raise GraftError(
                f"{method} sets the factors A and B, which {type(adapter.recipe.delta).__name__} does not have; combine it with LoRA or DoRA."
            )
    return {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank)}


def scaling(alpha: float | None, rank: int, default: float) -> float:
    """The scale ``s = alpha / rank``, or ``default`` where no alpha is given."""
    return default if alpha is None else alpha / rank


def uniform(rank: int, in_features: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """``U(-1/sqrt(in), 1/sqrt(in))`` of shape [rank, in]: Kaiming's rule with a = sqrt(5), the usual start of a down-projection."""
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator).to(dtype)


def check_rank(rank: int, target: Target, name: str = "rank") -> None:
    """Raises :class:`GraftError` for a rank that the target's matrix cannot have."""
    if not 1 <= rank <= min(target.shape):
        raise GraftError(
            f"{name} is {rank}, but {target.name} is {target.shape[0]} x {target.shape[1]}: choose 1 to {min(target.shape)}, or other targets."
        )
