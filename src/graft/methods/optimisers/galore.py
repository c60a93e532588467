"""GaLore: Adam whose moments live in a low-rank projection of each weight's gradient.

    G [m, n];  m >= n: P = V^T[:r] [r, n], R = G P^T [m, r], back(N) = N P;  else P = U[:, :r] [m, r], R = P^T G, back(N) = P N
    M <- b1 M + (1 - b1) R;  V <- b2 V + (1 - b2) R^2;  N = M / (sqrt V + eps)
    W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) kappa back(N);  then W <- W - lr wd W
    P from the SVD of the present gradient every T updates; M and V are kept as they are

Zhao et al., arXiv 2403.03507. As in the authors' code, moments are not rotated at a refresh and decay comes last. Weights
outside the projected groups get exactly torch's AdamW. ``per_layer`` steps each weight inside the backward pass and frees its
gradient at once; it excludes gradient accumulation and clipping, where the authors' code silently takes more steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from graft.core.callback import Callback
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import OptimiserPart
from graft.core.errors import GraftError
from graft.numerics.svd import truncated_svd

if TYPE_CHECKING:
    from graft.core.adapter import Adapter

Side = Literal["std", "reverse_std", "left", "right"]


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW; groups with ``rank`` project their matrices, with ``update_interval``, ``projection_scale`` and ``side``.

    Usable alone on any model. State of a projected weight [m, n], m >= n: two moments [m, r] and P [r, n].
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.0, per_layer: bool = False):  # fmt: skip
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "update_interval": 200,
            "projection_scale": 0.25,
            "side": "std",
        }
        self.per_layer = per_layer
        self._stepped: set[Tensor] = set()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.per_layer:
            number = len(self.param_groups) - 1  # not the group itself: load_state_dict puts others in their place
            for parameter in self.param_groups[number]["params"]:
                parameter.register_post_accumulate_grad_hook(self._step_in_backward(number))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.per_layer:
            self._stepped.clear()
            return loss
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _step_in_backward(self, number: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            if parameter in self._stepped:
                raise GraftError(
                    "per_layer updates each weight in the backward pass, so gradients cannot accumulate; call step() after every backward()."
                )
            self._stepped.add(parameter)
            assert parameter.grad is not None
            self._update(parameter, parameter.grad, self.param_groups[number])
            parameter.grad = None

        return hook

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        projected = group.get("rank") is not None and parameter.ndim == 2
        count = int(state.get("step", 0))
        if projected:
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            if count % group["update_interval"] == 0 and bool(torch.isfinite(gradient).all()):
                state["projection"] = projection(gradient, group["rank"], group["side"])
            if "projection" not in state:
                return  # the very first gradient is not finite: nothing to learn from it
            P, right = state["projection"], _projects_right(gradient, group["side"])
            gradient = gradient @ P.T if right else P.T @ gradient
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] = count = count + 1
        M, V = state["exp_avg"].lerp_(gradient, 1 - beta1), state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        rate, correction = group["lr"] / (1 - beta1**count), math.sqrt(1 - beta2**count)
        if not projected:  # torch's AdamW: decay first, eps beside the corrected root
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcdiv_(M, (V.sqrt() / correction).add_(group["eps"]), value=-rate)
            return
        update = M / V.sqrt().add_(group["eps"])
        update = update @ P if right else P @ update
        parameter.add_(update.to(parameter.dtype), alpha=-rate * correction * group["projection_scale"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _projects_right(matrix: Tensor, side: Side) -> bool:
    tall = matrix.shape[0] >= matrix.shape[1]
    return {"std": tall, "reverse_std": not tall, "left": False, "right": True}[side]


def projection(gradient: Tensor, rank: int, side: Side = "std") -> Tensor:
    """The leading directions of ``gradient [m, n]``: P [r, n] where the right side is projected, else [m, r]; fp32."""
    U, _, Vh = truncated_svd(gradient, min(rank, *gradient.shape))
    return Vh.contiguous() if _projects_right(gradient, side) else U.contiguous()


@dataclass(frozen=True, kw_only=True)
class GaLore(OptimiserPart):
    """Hyper-parameters of GaLore."""

    rank: int = option(128, "rank of the projection; clipped to the matrix", paper="4 (GLUE) .. 1024 (7B), about d / 4", low=1)
    update_interval: int = option(200, "updates between two SVDs", unit="updates", paper="200..500", low=1)
    projection_scale: float = option(0.25, "factor kappa on the projected update", paper="0.25 (pre-training) .. 4", low=0)
    side: Literal["std", "reverse_std", "left", "right"] = option("std", "which side of the matrix is projected")
    beta1: float = option(0.9, "decay of the first moment", paper="0.9", low=0, high=0.9999)
    beta2: float = option(0.999, "decay of the second moment", paper="0.999", low=0, high=0.99999)
    eps: float = option(1e-6, "added to the root of the second moment", paper="1e-6", low=0)
    per_layer: bool = option(False, "step each weight inside the backward pass; no accumulation, no clipping")

    optimizer: ClassVar[type[GaLoreAdamW]] = GaLoreAdamW

    def make(self, adapter: Adapter, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        kinds = [type(callback) for callback in adapter.callbacks]
        late = [kind for kind in kinds if kind.penalty is not Callback.penalty or kind.before_update is not Callback.before_update]
        if self.per_layer and late:
            raise GraftError(f"per_layer updates weights before {late[0].__name__} can act on their gradients; set per_layer=False.")
        inside = {
            id(p) for name, d in adapter.deltas.items() if d.target.depth is not None and name not in adapter.whole_targets for p in d.parameters()
        }
        parameters = adapter.parameters()
        projected = [p for p in parameters if id(p) in inside and p.ndim == 2]
        plain = [p for p in parameters if not (id(p) in inside and p.ndim == 2)]
        groups: list[dict[str, Any]] = [
            {
                "params": projected,
                "rank": self.rank,
                "update_interval": self.update_interval,
                "projection_scale": self.projection_scale,
                "side": self.side,
            }
        ]
        groups += [{"params": plain}] if plain else []
        return self.optimizer(groups, lr, (self.beta1, self.beta2), self.eps, weight_decay, self.per_layer)


catalogue.register(
    Method("galore", "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", "arXiv 2403.03507", "optimiser",
           "full weights, Adam's moments in a projection of the gradient", catalogue["full"].delta, optimiser=GaLore, random=False)
)  # fmt: skip
