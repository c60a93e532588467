"""TLoRA: a full-rank transform of W's inputs and a compact residual, both kept as tensor rings.

    W' = W T + D        in = I_1 ... I_d, out = J_1 ... J_d;  indices i = (i_1 ... i_d), j = (j_1 ... j_d)
    T[i, k] = tr A_1[i_1, k_1] ... A_d[i_d, k_d],  A_m [I_m, I_m, R, R];   D[j, i] = tr P_1[j_1] ... P_d[j_d] Q_1[i_1] ... Q_d[i_d]
    A_m[i, k] = delta_ik G_m + E_m[i, k], E = 0 trained, tr G_1 ... G_d = 1, so that T = I;   P_1 = 0, other P [J_m, r, r] and
    Q [I_m, r, r] ~ N(0, (c sqrt(r) / (n r))^2) for a core of n slices;   penalty  lambda sum_m sum_ab ||E_m[:, :, a, b]||_F

Tao et al., arXiv 2501.08727. The paper's start is G = ones / R. Then all entries (a, b) of a slice have equal gradients for ever and T is a
mere Kronecker product; here they are random and scaled to trace one, which starts exactly at the identity as well. Of the two penalties that
the paper proposes this is the one that it found to work better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.core.callback import Callback
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import check_rank
from graft.methods.families.multiplicative import InputMap

LOW, HIGH = 0.25, 1.75  # of the entries of G before they are scaled: positive, so that no trace comes near zero


class TLoRADelta(InputMap):
    """``E`` (one core for each factor of in), ``P`` and ``Q``; G [d, R, R] is frozen."""

    config: TLoRA
    G: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        inputs, outputs, ring, rank, dtype = layout["in"], layout["out"], layout["ring"], layout["rank"], self.target.dtype
        check_rank(rank**2, self.target, "rank squared")
        G = torch.ones(len(inputs), ring, ring, dtype=torch.float64)
        if ring > 1:
            G.uniform_(LOW, HIGH, generator=generator)
        G[0] /= chain(list(G[:, None])).diagonal(dim1=1, dim2=2).sum()
        self.register_buffer("G", G.to(dtype))
        self.E = nn.ParameterList(torch.zeros(size, size, ring, ring, dtype=dtype) for size in inputs)
        spreads = {size: self.config.spread / (size * math.sqrt(rank)) for size in (*outputs, *inputs)}
        cores = [spreads[size] * torch.randn(size, rank, rank, generator=generator).to(dtype) for size in (*outputs, *inputs)]
        self.P = nn.ParameterList([torch.zeros_like(cores[0]), *cores[1 : len(outputs)]])
        self.Q = nn.ParameterList(cores[len(outputs) :])

    def times(self, rows: Tensor, transposed: bool = False) -> Tensor:
        ring = self.G.shape[-1]
        # [n, a, b, ...]: the ring is cut open between a and b, and closed in the end
        state = rows.to(self.G.dtype).reshape(-1, 1, 1, rows.shape[-1]) * torch.eye(ring).to(self.G)[:, :, None]
        for G, E in zip(self.G, self.E, strict=True):
            core = E + torch.eye(len(E)).to(E)[:, :, None, None] * G
            unfolded = state.reshape(len(state), ring, ring, len(E), -1)
            state = torch.einsum("nabir,kibc->nacrk" if transposed else "nabir,ikbc->nacrk", unfolded, core).flatten(3)
        return torch.einsum("naax->nx", state).reshape(rows.shape)

    def residual(self) -> tuple[Tensor, Tensor]:
        """D as a product of B [out, r r] and A [r r, in]."""
        return chain(self.P).flatten(1), chain(self.Q).transpose(1, 2).flatten(1).T

    def weight(self) -> tuple[Tensor, Tensor | None]:
        (weight, bias), (B, A) = super().weight(), self.residual()
        return torch.addmm(weight, B, A), bias

    def forward(self, x: Tensor) -> Tensor:
        if not self.on_inputs(x):
            return Delta.forward(self, x)
        B, A = self.residual()
        return super().forward(x) + self.target.mix(self.target.apply(x, A), B)


def chain(cores: Sequence[Tensor] | nn.ParameterList) -> Tensor:
    """The products of one slice from each core [n_m, r, r], for every multi-index (the first slowest): [n_1 ... n_d, r, r]."""
    product, *rest = cores
    for core in rest:
        product = torch.einsum("iab,jbc->ijac", product, core).flatten(0, 1)
    return product


def factors(size: int, order: int) -> list[int]:
    """``size`` as a product of ``order`` numbers: the largest divisor that is at most an equal share, then the same for the rest."""
    if order == 1:
        return [size]
    first = largest_divisor(size, int(size ** (1 / order) + 1e-9))
    return [first, *factors(size // first, order - 1)]


@dataclass(frozen=True, kw_only=True)
class TLoRA(DeltaConfig):
    """Hyper-parameters of TLoRA."""

    rank: int = option(2, "rank r of the residual's ring; D has rank r^2", paper="1..4", low=1)
    ring: int = option(2, "rank R of the transform's ring", paper="1..2", low=1)
    order: int = option(3, "factors d of in and of out, as nearly equal as their divisors allow", paper="2..3", low=1)
    spread: float = option(1.0, "spread c of the residual's cores at the start", low=1e-6)
    penalty: float = option(0.0, "weight lambda of the penalty that keeps T near the identity", low=0)

    kinds = LINEAR_KINDS
    delta = TLoRADelta

    def callbacks(self) -> list[Callback]:
        return [NearIdentity(self)] if self.penalty else []

    def layout_at(self, target: Target) -> Layout:
        ranks = {"ring": self.ring, "rank": self.rank}
        return {"in": factors(target.shape[1], self.order), "out": factors(target.shape[0], self.order), **ranks}

    def parameters(self, out_features: int, in_features: int) -> int:
        inputs, outputs = factors(in_features, self.order), factors(out_features, self.order)
        return sum(size**2 * self.ring**2 for size in inputs) + sum(size * self.rank**2 for size in (*inputs, *outputs))


class NearIdentity(Callback):
    """The penalty."""

    def __init__(self, config: TLoRA):
        self.config = config

    def penalty(self) -> Tensor:
        cores = [core for delta in self.adapter.deltas.values() if isinstance(delta, TLoRADelta) for core in delta.E]
        return self.config.penalty * torch.stack([torch.linalg.vector_norm(core, dim=(0, 1)).sum() for core in cores]).sum()


catalogue.register(
    Method("tlora", "TLoRA: Transformed Low-rank Adaptation via Tensor Decomposition", "arXiv 2501.08727", "delta",
           "a tensor-ring transform of the inputs and a residual", TLoRA)
)  # fmt: skip
