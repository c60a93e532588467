"""AdaLoRA: a global budget of singular triplets, cut down during training to those that matter.

    dW = s B diag(E) A       A [r, in], B [out, r] ~ N(0, 0.02^2), E [r] = 0;  s = alpha / (r + 1e-5), r the initial rank
    penalty  gamma * mean over all A, B of ||A A^T - I||_F and ||B^T B - I||_F
    I = |w dL/dw|;  I' <- b1 I' + (1 - b1) I;  U' <- b2 U' + (1 - b2) |I - I'|;  s(w) = I' U'
    score_j = s(E_j) + mean_in s(A_j:) + mean_out s(B_:j);  the lowest triplets over the whole model get E_j = 0
    budget(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3 between warm-up t_i and the final phase t_f

Zhang et al., arXiv 2303.10512. Norms un-squared and averaged, as in the code (the paper squares and sums); the scale keeps the
initial rank. Exactly the budget is kept, also among equal scores, where the code's threshold could cut everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from graft.core.callback import Callback, State
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat, most_and_others
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.factored import Factored, check_rank

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class AdaLoRADelta(Factored):
    """A [r, in], E [r, 1], B [out, r]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        check_rank(layout["rank"], self.target, "initial_rank")
        self.scale = float(layout["scale"])
        (out_features, in_features), dtype = self.target.shape, self.target.dtype
        A, B = (0.02 * torch.randn(shape, generator=generator) for shape in ((layout["rank"], in_features), (out_features, layout["rank"])))
        self.A, self.B = nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype))
        self.E = nn.Parameter(torch.zeros(layout["rank"], 1, dtype=dtype))

    def product(self) -> tuple[Tensor, Tensor]:
        return self.B * (self.E[:, 0] * self.scale), self.A


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(DeltaConfig):
    """Hyper-parameters of AdaLoRA."""

    rank: int = option(8, "average rank that is left at the end", paper="2..8", low=1)
    initial_rank: int = option(12, "rank at the start", paper="1.5 times rank", low=1)
    alpha: float | None = option(None, "numerator of the scale; none: twice the initial rank", paper="16..32", low=1e-6)
    dropout: float = option(0.0, "chance of dropping an input of the branch while training", low=0, high=0.99)
    orthogonality: float = option(0.1, "weight gamma of the penalty", paper="0.1..0.5", low=0)
    beta1: float = option(0.85, "smoothing b1 of the sensitivity", paper="0.85", low=0, high=1)
    beta2: float = option(0.85, "smoothing b2 of its uncertainty", paper="0.85", low=0, high=1)
    warmup: float = option(0.15, "share of the updates before the first cut", paper="0.1..0.2", low=0, high=1)
    final: float = option(0.4, "share of the updates after the last cut", paper="0.3..0.5", low=0, high=1)
    interval: int = option(10, "updates between two cuts", unit="updates", paper="10..100", low=1)

    kinds = LINEAR_KINDS
    delta = AdaLoRADelta
    peft = PeftFormat(
        "ADALORA", {"A": "lora_A", "B": "lora_B", "E": "lora_E"},
        {"target_r": "rank", "init_r": "initial_rank", "lora_alpha": "alpha"},
        others=("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > self.initial_rank:
            raise GraftError(f"AdaLoRA.rank is {self.rank}, but it cannot be above initial_rank = {self.initial_rank}.")
        if self.warmup + self.final >= 1:
            raise GraftError(f"AdaLoRA.warmup + final is {self.warmup + self.final:g}, which leaves no updates to cut ranks in; keep it below 1.")

    def callbacks(self) -> list[Callback]:
        return [Budget(self)]

    def layout_at(self, target: Target) -> Layout:
        alpha = 2.0 * self.initial_rank if self.alpha is None else self.alpha
        return {"rank": self.initial_rank, "scale": alpha / (self.initial_rank + 1e-5)}

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.initial_rank * (out_features + in_features + 1)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        alpha, _ = most_and_others({name: layout["scale"] * (layout["rank"] + 1e-5) for name, layout in adapter.layouts.items()})
        schedule = {"beta1": self.beta1, "beta2": self.beta2, "deltaT": self.interval, "total_step": max(adapter.step, 1)}
        return {**super().to_peft(adapter), "lora_alpha": alpha, **schedule, "orth_reg_weight": self.orthogonality, "lora_dropout": self.dropout}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> Self | None:
        return super().from_peft({**config, "target_r": min(config["target_r"], config["init_r"])}, shapes)

    def layout_from_peft(self, target: Target, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
        rank = shapes["lora_E"][0]
        return {"rank": rank, "scale": config["lora_alpha"] / (rank + 1e-5)}


class Budget(Callback):
    """Scores the triplets and keeps to the budget; ``t`` counts finished updates."""

    def __init__(self, config: AdaLoRA):
        self.config = config
        self.averages: dict[str, Tensor] = {}  # "<target>.<A|B|E>.<I|U>" -> smoothed sensitivity or uncertainty
        self.kept: dict[str, Tensor] = {}  # the final mask [r] of each target

    def deltas(self) -> dict[str, AdaLoRADelta]:
        return {name: delta for name, delta in self.adapter.deltas.items() if isinstance(delta, AdaLoRADelta)}

    def budget(self, t: int) -> int:
        """Triplets that may be non-zero after ``t`` updates."""
        start = sum(len(delta.E) for delta in self.deltas().values())
        end = min(start, self.config.rank * len(self.deltas()))
        first, last = self.phases
        if t <= first:
            return start
        if t >= last:
            return end
        return round(end + (start - end) * (1 - (t - first) / (last - first)) ** 3)

    @property
    def phases(self) -> tuple[int, int]:
        """The updates at which cutting begins and ends."""
        return int(self.config.warmup * self.total_steps), max(1, self.total_steps - int(self.config.final * self.total_steps))

    def penalty(self) -> Tensor | None:
        if not self.config.orthogonality:
            return None
        norms = []
        for delta in self.deltas().values():
            for rows in (delta.A, delta.B.T):
                residual = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
                norms.append(residual.square().sum().clamp(min=1e-24).sqrt())  # a plain norm has no gradient at zero
        return self.config.orthogonality * torch.stack(norms).mean()

    def after_update(self, step: int) -> None:
        t, (first, last) = step + 1, self.phases
        if t <= last or not self.kept:
            self._observe()
        ending = t == last or (t > last and not self.kept)  # bound anew with fewer steps than are done: the last cut comes now
        if ending or (first < t < last and t % self.config.interval == 0):
            self._cut(self.budget(t), remember=ending)
        elif t > last:
            with torch.no_grad():
                for name, delta in self.deltas().items():
                    delta.E.mul_(self.kept[name][:, None])

    @torch.no_grad()
    def _observe(self) -> None:
        b1, b2 = self.config.beta1, self.config.beta2
        for name, delta in self.deltas().items():
            for key, weight in (("A", delta.A), ("B", delta.B), ("E", delta.E)):
                now = torch.zeros_like(weight) if weight.grad is None else (weight * weight.grad).abs()
                smooth = self.averages.setdefault(f"{name}.{key}.I", torch.zeros_like(weight)).mul_(b1).add_(now, alpha=1 - b1)
                self.averages.setdefault(f"{name}.{key}.U", torch.zeros_like(weight)).mul_(b2).add_((now - smooth).abs(), alpha=1 - b2)

    def scores(self) -> dict[str, Tensor]:
        """The score [r] of each target's triplets."""

        def importance(name: str) -> Tensor:
            return self.averages[f"{name}.I"] * self.averages[f"{name}.U"]

        return {n: importance(f"{n}.E")[:, 0] + importance(f"{n}.A").mean(1) + importance(f"{n}.B").mean(0) for n in self.deltas()}

    @torch.no_grad()
    def _cut(self, budget: int, remember: bool) -> None:
        scores = self.scores()
        keep = torch.zeros(sum(map(len, scores.values())), dtype=torch.bool, device=next(iter(scores.values())).device)
        keep[torch.cat(list(scores.values())).argsort(descending=True, stable=True)[:budget]] = True
        for (name, delta), mask in zip(self.deltas().items(), torch.split(keep, [len(s) for s in scores.values()]), strict=True):
            delta.E.mul_(mask[:, None])
            if remember:
                self.kept[name] = mask.clone()

    def state_dict(self) -> State:
        return {**{f"average.{k}": v for k, v in self.averages.items()}, **{f"kept.{k}": v for k, v in self.kept.items()}}

    def load_state_dict(self, state: State) -> None:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.averages = {name.removeprefix("average."): v.clone() for name, v in tensors.items() if name.startswith("average.")}
        self.kept = {name.removeprefix("kept."): v.clone() for name, v in tensors.items() if name.startswith("kept.")}


catalogue.register(
    Method("adalora", "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "arXiv 2303.10512", "allocation",
           "prunes singular triplets to a budget while training", AdaLoRA)
)  # fmt: skip
