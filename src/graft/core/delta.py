"""Deltas: what is learned at one target. Two faces that must agree: ``weight()``, the definition, and ``forward(x)``, fast.

A method that brings a new delta writes two classes in one file: its hyper-parameters (:class:`DeltaConfig`) and the module
(:class:`Delta`). Everything else (merging, saving, conversion, accounting, switching) is written once against this contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor, nn

from graft.core.config import Config
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target

if TYPE_CHECKING:
    from graft.core.adapter import Adapter
    from graft.core.calibration import Calibration
    from graft.core.callback import Callback

Layout: TypeAlias = dict[str, Any]  # the structure of one delta as JSON: ranks, scales, counts; enough to build it again


class _Noted(dict[str, Any]):
    """A layout that notes what nobody has read of it."""

    def __init__(self, layout: Layout):
        super().__init__(layout)
        self.unread = set(layout)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        self.unread.discard(key)
        return value


class Pair(NamedTuple):
    """A low-rank pair as optimisers see it: ``dW = scale * B @ A``, A ``[r, in]``, B ``[out, r]``."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float


@dataclass(frozen=True, kw_only=True)
class Part(Config):
    """One coordinate of a method (a delta, an init, an allocation, an optimiser) with its hyper-parameters."""

    def callbacks(self) -> list[Callback]:
        """What this part does during training; fresh objects, one set an adapter."""
        return []

    def prepare(self, adapter: Adapter, calibration: Calibration | None) -> None:
        """Sets ranks, positions and first values of the fresh deltas; the function of the model must stay the base model's."""


class Delta(nn.Module):
    """What is learned at one target; see the module's docstring.

    Subclasses define :meth:`make` and :meth:`weight`, and may define a faster :meth:`forward`, :meth:`entries` and :meth:`pair`. They say
    what their ``config`` and ``shared`` are, the latter being what :meth:`DeltaConfig.shared` made for all deltas of the adapter.
    """

    config: DeltaConfig
    shared: nn.Module | None
    not_saved: frozenset[str] = frozenset()  # names of buffers that are made again, not stored

    def __init__(self, target: Target, layout: Layout, config: DeltaConfig, shared: nn.Module | None, generator: torch.Generator):
        super().__init__()
        self.target, self.config, self._layout = target, config, layout
        self.__dict__["shared"] = shared  # not as a child: saving and moving it is the adapter's
        noted = _Noted(layout)
        self.make(noted, generator)
        if noted.unread:
            stray, known = min(noted.unread), ", ".join(sorted(set(layout) - noted.unread)) or "none"
            raise GraftError(f"the layout of {target.name} has an entry {stray!r} that {type(self).__name__} does not know; it knows {known}.")

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        """Makes parameters and buffers as ``layout`` says, every entry of it. Everything random comes from ``generator`` (CPU, fp32)."""
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        """The structure of this delta as JSON, from which the same structure is made again."""
        return dict(self._layout)

    def weight(self) -> tuple[Tensor, Tensor | None]:
        """The adapted weight ``W' [out, in]`` and bias ``b' [out]``, differentiable, in at least fp32.

        Raises :class:`NotMergeable` where the adapted map is not a matrix.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The adapted map on ``x [..., in]`` -> ``[..., out]``."""
        return self.target.apply(x, *self.weight())

    @property
    def dense(self) -> bool:
        """Whether every forward forms W', because no faster way is known."""
        return type(self).forward is Delta.forward

    @classmethod
    def together(cls, deltas: Sequence[Delta], x: Tensor) -> list[Tensor] | None:
        """:meth:`forward` of several deltas of this class on the same x, where that is cheaper than one by one; else None."""
        return None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``(B [out, r], A [r, in])`` with ``W' - W = B @ A``, effective scale folded in; None where dW has no such form."""
        return None

    def pair(self) -> Pair | None:
        """The trained low-rank pair, for optimisers that treat A and B together."""
        return None

    def entries(self) -> tuple[Tensor, Tensor] | None:
        """``(flat indices [k], values [k])`` of dW where it is sparse: lets a switch touch k numbers only."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer that defines the delta beside its layout, by name; the live tensors, not copies."""
        state = {name: value.detach() for name, value in self.named_parameters(remove_duplicate=False)}
        state |= dict(self.named_buffers(remove_duplicate=False))
        return {name: value for name, value in state.items() if name not in self.not_saved}

    def exported(self) -> dict[str, Tensor]:
        """What a file holds: :meth:`tensors`, where a format needs them arranged in another way."""
        return self.tensors()

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`exported`; names and shapes are checked already."""
        for name, value in self.tensors().items():
            value.copy_(exported[name])

    def file_key(self, key: str, peft: PeftFormat | None) -> str:
        """The name of a tensor in the adapter's file."""
        return peft.keys.get(key, key) if peft else key


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(Part):
    """Hyper-parameters of a delta, and how its deltas are laid out and built on a model."""

    kinds: ClassVar[tuple[str, ...]] = (*LINEAR_KINDS, "embedding")
    default_targets: ClassVar[str] = "linear"
    delta: ClassVar[type[Delta]]
    peft: ClassVar[PeftFormat | None] = None

    def shared(self, targets: Sequence[Target], seed: int) -> nn.Module | None:
        """What all deltas of one adapter share (frozen bases, pools), registered once."""
        return None

    def layout_at(self, target: Target) -> Layout:
        """The structure of a fresh delta at one target; what is saved and built from on loading."""
        return {}

    def layouts(self, targets: Sequence[Target], model: nn.Module, seed: int, calibration: Calibration | None) -> dict[str, Layout]:
        """The structure of every delta, for methods that decide over all targets together."""
        return {target.name: self.layout_at(target) for target in targets}

    @property
    def keeps_base(self) -> bool:
        """Whether the base stays in memory; False where the method takes over its storage (then detaching loads it again)."""
        return True

    def release(self, adapter: Adapter) -> None:
        """Called when the adapter has left the model: gives back whatever it took from the base."""

    def groups(self, adapter: Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The optimiser's parameter groups; vectors (magnitudes, gains, biases) get no weight decay."""
        matrices = [p for p in adapter.parameters() if p.ndim >= 2]
        vectors = [p for p in adapter.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return [{**group, "lr": lr} for group in groups if group["params"]]

    def parameters(self, out_features: int, in_features: int) -> int:
        """Trainable parameters at one target of this shape."""
        raise NotImplementedError

    def total(self, targets: Sequence[Target]) -> int:
        """Trainable parameters over all these targets."""
        return sum(self.parameters(*target.shape) for target in targets)

    def peft_format(self) -> PeftFormat | None:
        """PEFT's format with these hyper-parameters; None where PEFT cannot express them."""
        return self.peft

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        """The method's keys of PEFT's ``adapter_config.json``."""
        return self.peft.write(self.settings(), adapter.layouts) if self.peft else {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> Self | None:
        """The hyper-parameters from a PEFT config and each target's tensor shapes; None where the file is another method's.

        ``shapes`` maps target name -> PEFT's tensor name -> shape.
        """
        return cls.parse(cls.peft.read(config)) if cls.peft else None

    def layout_from_peft(self, target: Target, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
        """The structure of the delta that a PEFT file holds for a target; ``shapes`` as for :meth:`from_peft`."""
        return {**self.layout_at(target), **(self.peft.layout(target.name, config, shapes) if self.peft else {})}


@dataclass(frozen=True, kw_only=True)
class Init(Part):
    """Where a method starts: changes the fresh deltas of an adapter once, in :meth:`prepare`."""


@dataclass(frozen=True, kw_only=True)
class OptimiserPart(Part):
    """How gradients become updates: makes a ``torch.optim.Optimizer`` for an adapter."""

    def make(self, adapter: Adapter, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        raise NotImplementedError


def lora_factors(delta: Delta, rank: int | None = None, tolerance: float = 0.0) -> tuple[Tensor, Tensor, float]:
    """The delta as LoRA factors ``B [out, r], A [r, in]`` and the relative error ``||dW - B A|| / ||dW||`` (Frobenius).

    Exact where the delta has factors of at most ``rank``; otherwise the truncated SVD of dW, to the smallest rank whose error
    is within ``tolerance``, and never above ``rank``. Works in fp32 or better.
    """
    with torch.no_grad():
        exact = delta.factors()
        if exact is not None and len(exact[1]) <= (rank or min(delta.target.shape)):
            return exact[0].contiguous(), exact[1].contiguous(), 0.0
        weight, _ = delta.weight()
        difference = weight - delta.target.weight().to(weight.dtype)
        U, S, Vh = torch.linalg.svd(difference.double(), full_matrices=False)
        total = S.square().sum()
        if total == 0:
            return difference.new_zeros(len(difference), 1), difference.new_zeros(1, difference.shape[1]), 0.0
        error = torch.cat([(total - S.square().cumsum(0)).clamp(min=0), total.new_zeros(1)])[: len(S)].div(total).sqrt()
        numerical = int((S[0] * 1e-6 < S).sum())
        fitting = torch.nonzero(error <= max(tolerance, float(error[numerical - 1])))
        keep = min(int(fitting[0]) + 1, rank or len(S))
        root = S[:keep].sqrt()
        return (U[:, :keep] * root).to(weight.dtype), (root[:, None] * Vh[:keep]).to(weight.dtype), float(error[keep - 1])
