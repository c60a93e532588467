"""MoS: the factors of all layers are put together from shards of pools that they share.

    for the L targets of one role and shape:  pools P_A [e L l, in/l], P_B [e L l, out/l] trained, nothing else
    row j of A_k = the shards I_a[j l .. j l + l - 1] of P_A, side by side;  column j of B_k likewise from P_B by I_b
    dW_k = s B_k A_k,    A_k [R, in], B_k [out, R],  R = x e > e,  s = alpha / R
    P_A ~ U(-1/sqrt(in), 1/sqrt(in)),  P_B = 0;   the indices are drawn once: p ranks of each target are its own, the rest is public

Wang et al., arXiv 2410.00938. Indices are drawn without replacement, and for A and B apart ("pair dissociation"). e is the rank of the LoRA
with as many parameters, here the option ``rank``. Where a group has too few public rows for R, its targets' rank is as large as they
allow; with one target that is e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import Factored, check_rank, scaling


def group(target: Target) -> str:
    """Targets of one group share a pool."""
    return f"{target.role}_{target.shape[0]}x{target.shape[1]}"


class Pools(nn.Module):
    """The pools of every group, and where each target's private rows begin."""

    def __init__(self, targets: Sequence[Target], config: MoS, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.members: dict[str, list[str]] = {}
        for target in targets:
            self.members.setdefault(group(target), []).append(target.name)
        for target in {group(target): target for target in targets}.values():
            check_rank(config.rank, target)
            shards = config.pieces(*target.shape)
            rows, bound = config.rank * len(self.members[group(target)]) * shards, 1 / math.sqrt(target.shape[1])
            A = torch.empty(rows, target.shape[1] // shards).uniform_(-bound, bound, generator=generator)
            self.register_parameter(f"A_{group(target)}", nn.Parameter(A.to(target.dtype)))
            self.register_parameter(f"B_{group(target)}", nn.Parameter(torch.zeros(rows, target.shape[0] // shards, dtype=target.dtype)))

    def get(self, name: str, target: Target) -> Tensor:
        """The pool A or B of a target's group."""
        pool: Tensor = getattr(self, f"{name}_{group(target)}")
        return pool


class MoSDelta(Factored):
    """``index_A`` and ``index_B`` [R l]: rows of the pools; nothing of its own is trained."""

    not_saved = frozenset({"index_A", "index_B"})
    shared: Pools
    index_A: Tensor
    index_B: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.scale, self.shards, target, pools = float(layout["scale"]), layout["shards"], self.target, self.shared
        members, own = pools.members[group(target)], layout["private"] * self.shards
        public = pools.get("A", target).shape[0] - own * len(members)
        mine = public + own * members.index(target.name) + torch.arange(own)
        for name in ("index_A", "index_B"):
            drawn = torch.randperm(public, generator=generator)[: layout["rank"] * self.shards - own]
            self.register_buffer(name, torch.cat([drawn, mine]))

    def product(self) -> tuple[Tensor, Tensor]:
        (out_features, in_features), pools = self.target.shape, self.shared
        A = pools.get("A", self.target)[self.index_A].reshape(-1, in_features)
        B = pools.get("B", self.target)[self.index_B].reshape(-1, out_features)
        return B.T * self.scale, A


@dataclass(frozen=True, kw_only=True)
class MoS(DeltaConfig):
    """Hyper-parameters of MoS."""

    rank: int = option(8, "equivalent rank e: the LoRA with as many parameters", paper="2..8", low=1)
    expand: int = option(4, "how many times e a target's own rank is, at most", paper="2..4", low=1)
    private: int | None = option(None, "ranks p that each target has for itself; none: half of e", paper="about e/2", low=0)
    shards: int = option(4, "shards l a vector is put together from; the largest number up to it that divides in and out", paper="2..8", low=1)
    alpha: float | None = option(None, "numerator of the scale alpha / R; none: twice R", low=1e-6)

    kinds = LINEAR_KINDS
    delta = MoSDelta

    def pieces(self, out_features: int, in_features: int) -> int:
        """l for a shape."""
        return largest_divisor(math.gcd(out_features, in_features), self.shards)

    def shared(self, targets: Sequence[Target], seed: int) -> Pools:
        return Pools(targets, self, seed)

    def layouts(self, targets: Sequence[Target], model: nn.Module, seed: int, calibration: Any) -> dict[str, Layout]:
        private = self.rank // 2 if self.private is None else self.private
        if private > self.rank:
            raise GraftError(f"MoS.private is {private}, but there are {self.rank} ranks to share out; choose 0 to {self.rank}.")
        groups = [group(target) for target in targets]
        layouts = {}
        for target in targets:
            rank = min(self.expand * self.rank, private + (self.rank - private) * groups.count(group(target)), min(target.shape))
            scale = scaling(self.alpha, rank, 2.0)
            layouts[target.name] = {"rank": rank, "shards": self.pieces(*target.shape), "private": private, "scale": scale}
        return layouts

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank * (out_features + in_features)


catalogue.register(
    Method("mos", "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards", "arXiv 2410.00938", "delta",
           "factors from shards of shared pools", MoS)
)  # fmt: skip
