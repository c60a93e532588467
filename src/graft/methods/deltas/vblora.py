"""VB-LoRA: LoRA whose factors are put together from one bank of short vectors that all targets share and train.

    dW = B A        every piece of b numbers in a row of A [r, in] or a column of B [out, r] is a mixture of k vectors of the bank
    piece = sum over the k largest logits of softmax(those logits) * their vectors;    logits [h] of each piece, bank [h, b] trained
    logits ~ N(0, 0.1^2),  bank ~ U(-0.02, 0.02)

Li et al., arXiv 2405.15179. As in the paper and in PEFT neither factor begins at zero: the function starts beside the base's, by dW of about
1e-4 sqrt(r) / k an entry. The paper trains the logits ten times faster than the bank (``logits_lr``). One b serves all targets: the largest
that divides all their sides. PEFT's files with the k logits alone (``save_only_topk_weights``) are not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import Factored, check_rank
from graft.methods.families.groups import apart

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class Bank(nn.Module):
    """The vectors [h, b]; the name is PEFT's."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vblora_vector_bank = nn.Parameter(vectors)


class VBLoRADelta(Factored):
    """``logits_A`` [r, in / b, h] and ``logits_B`` [out / b, r, h]; the bank belongs to the adapter."""

    config: VBLoRA
    shared: Bank

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        check_rank(layout["rank"], self.target)
        self.top, std = layout["top"], self.config.logits_std
        (out_features, in_features), (count, length) = self.target.shape, self.shared.vblora_vector_bank.shape

        def logits(*pieces: int) -> nn.Parameter:
            return nn.Parameter((std * torch.randn(*pieces, count, generator=generator)).to(self.target.dtype))

        self.logits_A = logits(layout["rank"], in_features // length)
        self.logits_B = logits(out_features // length, layout["rank"])

    def mixtures(self, logits: Tensor) -> Tensor:
        """The pieces [..., b] of logits [..., h]."""
        top, places = logits.topk(self.top)
        return (top.softmax(-1)[..., None] * self.shared.vblora_vector_bank.to(top)[places]).sum(-2)

    def product(self) -> tuple[Tensor, Tensor]:
        A, B = self.mixtures(self.logits_A), self.mixtures(self.logits_B)
        return B.transpose(1, 2).flatten(0, 1), A.flatten(1)


@dataclass(frozen=True, kw_only=True)
class VBLoRA(DeltaConfig):
    """Hyper-parameters of VB-LoRA."""

    rank: int = option(4, "rank r of the update", paper="4..6", low=1)
    vectors: int = option(256, "vectors h of the bank", paper="30..2048", low=1)
    length: int = option(256, "numbers b of a vector; the largest up to it that divides the sides of all targets is taken", paper="128..1024", low=1)
    top: int = option(2, "vectors k of a mixture", paper="2", low=1)
    bank_bound: float = option(0.02, "largest number in the bank at the start", paper="0.02", low=1e-9)
    logits_std: float = option(0.1, "spread of the logits at the start", paper="0.1", low=0)
    logits_lr: float = option(10.0, "learning rate of the logits over that of the bank", paper="10", low=0)
    dropout: float = option(0.0, "chance of dropping an input of the branch while training", low=0, high=0.99)

    kinds = LINEAR_KINDS
    delta = VBLoRADelta
    peft = PeftFormat(
        "VBLORA", {"logits_A": "vblora_logits_A", "logits_B": "vblora_logits_B"},
        {"r": "rank", "num_vectors": "vectors", "vector_length": "length", "topk": "top", "vblora_dropout": "dropout",
         "init_vector_bank_bound": "bank_bound", "init_logits_std": "logits_std"},
        fixed={"bias": "none", "save_only_topk_weights": False},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top > self.vectors:
            raise GraftError(f"VBLoRA.top is {self.top}, but the bank has {self.vectors} vectors; choose fewer.")

    def shared(self, targets: Sequence[Target], seed: int) -> Bank:
        length, generator = self.common_length(target.shape for target in targets), torch.Generator().manual_seed(seed)
        vectors = torch.empty(self.vectors, length).uniform_(-self.bank_bound, self.bank_bound, generator=generator)
        return Bank(vectors.to(targets[0].dtype))

    def common_length(self, shapes: Iterable[tuple[int, int]]) -> int:
        return largest_divisor(math.gcd(*(side for shape in shapes for side in shape)), self.length)

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank, "top": self.top}

    def groups(self, adapter: Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        logits = [p for delta in adapter.deltas.values() if isinstance(delta, VBLoRADelta) for p in delta.parameters()]
        return apart(super().groups(adapter, lr, weight_decay), logits, lr=lr * self.logits_lr)

    def parameters(self, out_features: int, in_features: int) -> int:
        """Of a target alone, with its bank; see :meth:`total`."""
        return self._size([(out_features, in_features)])

    def total(self, targets: Sequence[Target]) -> int:
        return self._size([target.shape for target in targets])

    def _size(self, shapes: Sequence[tuple[int, int]]) -> int:
        length = self.common_length(shapes)
        return self.vectors * (length + self.rank * sum(map(sum, shapes)) // length)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        assert isinstance(adapter.shared, Bank)
        return {**super().to_peft(adapter), "vector_length": adapter.shared.vblora_vector_bank.shape[1]}


catalogue.register(
    Method("vblora", "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", "arXiv 2405.15179", "delta",
           "mixtures of vectors from a shared bank", VBLoRA, starts_as_identity=False)
)  # fmt: skip
