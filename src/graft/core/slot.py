"""Slots: what stands inside a target's module and runs the deltas of every adapter attached there.

The module itself stays where it is, with its class, its name and its tensors; only its ``forward`` is answered by the slot,
until the last delta leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from graft.core.delta import Delta
from graft.core.errors import GraftError
from graft.core.hashing import is_sharded
from graft.core.target import SLOT, Target

CHUNK = 1 << 16  # values that are compared at a time: temporary tensors that stay in the cache, and in memory that the process already has


class Slot(nn.Module):
    """The deltas at one target, by adapter name, and the baked weight while adapters are merged.

    The adapted weight with adapters i active is ``W + sum_i (W'_i - W)``.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target
        self.deltas = nn.ModuleDict()
        self.shared = nn.ModuleDict()  # what the deltas of an adapter share, in the first of its slots
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.baked: nn.Module | None = None
        self.base: Callable[[Tensor], Tensor] = target.module.forward
        self.replaced = target.module.__dict__.get("forward")  # another library may have set its own
        self.same_input: SameInput | None = None

    def forward(self, x: Tensor) -> Tensor:
        alone = self.alone()
        if alone is not None:
            y = self.same_input.answer(self, x) if self.same_input is not None and torch.is_grad_enabled() else None
            if y is None:
                y = alone(x)
            return y
        baked = self._in_force()
        y = self.base(x) if baked is None else baked(x)
        running = [name for name in self.active if baked is None or name not in self.merged]
        if running:
            plain = self.base(x)
            for name in running:
                y = y + (self.deltas[name](x) - plain)
        return y

    def alone(self) -> Delta | None:
        """The one delta that answers for the whole target; None where there are several, none, or a baked weight."""
        if len(self.active) != 1 or self._in_force() is not None:
            return None
        delta = self.deltas[self.active[0]]
        assert isinstance(delta, Delta)
        return delta

    def _in_force(self) -> nn.Module | None:
        """The baked module, as long as every adapter in it is active."""
        return self.baked if set(self.merged) <= set(self.active) else None

    def bake(self, names: tuple[str, ...]) -> float:
        """Writes the adapted weight of ``names`` beside W, computed in at least fp32 and rounded once.

        Returns what rounding to the base's dtype lost: ``||round(W') - W'|| / ||W' - W||``.
        """
        self.merged, self.baked = (), None
        if not names:
            return 0.0
        if is_sharded(self.target.original):
            raise GraftError(
                f"{self.target} is sharded over processes, so it cannot be merged here; load base and adapter in one process and merge there."
            )
        with torch.no_grad():
            weight, bias = self.adapted(names)
            if any(weight.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for own in (self.target.original, *self.parameters())):
                weight = weight.clone()
            baked = self.target.clone_module(weight).requires_grad_(False)
            stored = self.target.view(baked.weight)  # type: ignore[arg-type]
            if bias is not None:
                baked.bias = nn.Parameter(bias.to(stored.dtype), requires_grad=False)
            lost = rounding_loss(self.target.weight(), weight, stored)
        baked.train(self.training)
        self.merged, self.baked = names, baked
        return lost

    def adapted(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """``(W', b')`` with exactly the deltas of ``names``."""
        if len(names) == 1:
            delta = self.deltas[names[0]]
            assert isinstance(delta, Delta)
            return delta.weight()
        base_weight, base_bias = self.target.weight().to(self.target.dtype), self.target.bias
        weight, bias = base_weight, base_bias
        for name in names:
            delta = self.deltas[name]
            assert isinstance(delta, Delta)
            own_weight, own_bias = delta.weight()
            weight = weight + (own_weight - base_weight)
            if own_bias is not None:
                bias = own_bias if bias is None else bias + (own_bias - (0 if base_bias is None else base_bias))
        return weight, bias

    def switch(self, name: str) -> None:
        """Puts ``name`` in the place of whatever is merged; where both are sparse, only their own entries are written.

        The result has the bits of a fresh :meth:`bake`.
        """
        known = dict(self.deltas.items())
        old, new = known.get(self.merged[0]) if len(self.merged) == 1 else None, known.get(name)
        before, after = (delta.entries() if isinstance(delta, Delta) else None for delta in (old, new))
        if self.baked is None or before is None or after is None:
            self.bake((name,) if new is not None else ())
            return
        with torch.no_grad():
            stored, base = self.target.view(self.baked.weight), self.target.weight()  # type: ignore[arg-type]
            at = (before[0] // base.shape[1], before[0] % base.shape[1])
            stored[at] = base[at]
            at = (after[0] // base.shape[1], after[0] % base.shape[1])
            stored[at] = (base[at] + after[1]).to(stored.dtype)
        self.merged = (name,)

    def add(self, name: str, delta: Delta) -> None:
        """Takes in the delta of adapter ``name``."""
        if name in self.deltas:
            raise GraftError(f"an adapter named {name!r} is attached already; choose another name or detach it first.")
        self.deltas[name] = delta
        self.active = (*self.active, name)

    def remove(self, name: str) -> None:
        """Lets the delta of ``name`` go; the last one takes the slot along and the module is as it was."""
        if name in self.merged:
            self.bake(tuple(other for other in self.merged if other != name))
        del self.deltas[name]
        if name in self.shared:
            del self.shared[name]
        self.active = tuple(other for other in self.active if other != name)
        if not self.deltas:
            module = self.target.module
            del module._modules[SLOT]
            del module.__dict__["forward"]
            if self.replaced is not None:
                module.__dict__["forward"] = self.replaced


class SameInput:
    """Slots that read one tensor (q, k, v of an attention; gate, up of an MLP): the first that is asked lets all deltas run together.

    The others find their output ready, as long as they are asked with the very same tensor. A slot that is not, or is not asked at
    all, ends the arrangement: from then on each runs alone. The outputs are the same either way.
    """

    def __init__(self, slots: Iterable[Slot]):
        self.slots = list(slots)
        self.x: Tensor | None = None
        self.version = 0  # of x, which may be written to between two calls
        self.ready: dict[Slot, Tensor] = {}
        for slot in self.slots:
            slot.same_input = self

    def answer(self, slot: Slot, x: Tensor) -> Tensor | None:
        """The output of ``slot`` for ``x``; None where it must run alone."""
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        if not self.ready:
            self._run(x)
        elif x is not self.x or x._version != self.version or slot not in self.ready:
            self.ready, self.x = {}, None
            for each in self.slots:
                each.same_input = None
        y = self.ready.pop(slot, None)
        if not self.ready:
            self.x = None
        return y

    def _run(self, x: Tensor) -> None:
        deltas = [delta for delta in (slot.alone() for slot in self.slots) if delta is not None]
        if len(deltas) < len(self.slots) or len({type(delta) for delta in deltas}) > 1:
            return
        outputs = deltas[0].together(deltas, x)
        if outputs is not None:
            self.x, self.version, self.ready = x, x._version, dict(zip(self.slots, outputs, strict=True))


SHARING_ROLES = (("q", "k", "v"), ("gate", "up"))


def share_inputs(targets: Iterable[Target]) -> None:
    """Arranges the slots of targets in one module that usually read the same tensor."""
    groups: dict[tuple[object, ...], list[Slot]] = {}
    for target in targets:
        roles = next((roles for roles in SHARING_ROLES if target.role in roles), None)
        if roles is not None and target.kind in ("linear", "conv1d"):
            groups.setdefault((target.name.rpartition(".")[0], roles, target.shape[1]), []).append(slot_of(target))
    for slots in groups.values():
        if len(slots) > 1:
            SameInput(slots)


def rounding_loss(base: Tensor, exact: Tensor, stored: Tensor) -> float:
    """The share of an update that storing it lost: ``||stored - exact|| / ||exact - base||``; 0 where nothing changed or was rounded."""
    if stored.dtype == exact.dtype:
        return 0.0
    change, lost = exact.new_zeros(2, dtype=torch.float64)
    rows = max(1, CHUNK // max(1, exact.shape[1]))
    for before, after, rounded in zip(*(torch.split(each, rows) for each in (base, exact, stored)), strict=True):
        change += torch.linalg.vector_norm(after - before).square()
        lost += torch.linalg.vector_norm(after - rounded).square()
    return float((lost / change).sqrt()) if change > 0 else 0.0


def slot_of(target: Target) -> Slot:
    """The slot of a target, made if there is none."""
    slot = target.module._modules.get(SLOT)
    if not isinstance(slot, Slot):
        slot = Slot(target)
        target.module.add_module(SLOT, slot)
        target.module.forward = slot.forward
        slot.train(target.module.training)
    return slot
