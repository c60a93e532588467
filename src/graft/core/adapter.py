"""Adapters: a named set of deltas on one model, and how they are attached, trained, merged and detached.

Attaching never writes to a base tensor: the deltas live in slots beside the weights (``core/slot.py``), the base parameters
are only frozen, and :func:`detach` gives back exactly the model that was there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from graft.core.calibration import Batch, Calibration, Loss
from graft.core.callback import Callback, State
from graft.core.catalogue import Recipe, catalogue, compose
from graft.core.delta import Delta, DeltaConfig, Layout, Pair, Part
from graft.core.errors import GraftError, nearest
from graft.core.hashing import fingerprint, is_whole
from graft.core.progress import followed
from graft.core.slot import share_inputs, slot_of
from graft.core.target import Target, TargetSpec, all_targets, find_targets

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)
REGISTRY = "graft_adapters"  # name of the attribute of a model's root that holds its adapters


@dataclass(frozen=True)
class MergeReport:
    """What rounding to the base's dtype lost at each target: ``||round(W') - W'|| / ||W' - W||`` (0 in fp32 up to its precision)."""

    lost: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The target that lost most, and how much."""
        return max(self.lost.items(), key=lambda item: item[1])


class Registry:
    """The adapters of one model, kept as a plain attribute of its root: no child module, so containers stay as they are."""

    def __init__(self, model: nn.Module):
        self.adapters: dict[str, Adapter] = {}
        self.frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in self.frozen:
            parameter.requires_grad_(False)
        self.hook: RemovableHandle = model.register_forward_pre_hook(_before_forward)


def registry_of(model: nn.Module) -> Registry | None:
    """The adapters of ``model``, or None where nothing is attached."""
    found = model.__dict__.get(REGISTRY)
    return found if isinstance(found, Registry) else None


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters attached to ``model``, by name."""
    registry = registry_of(model)
    return dict(registry.adapters) if registry else {}


class Adapter:
    """A named set of deltas on one model. Made by :func:`attach` and :func:`graft.load_adapter`.

    Attributes: ``name``, ``model``, ``method`` (its name in the catalogue), ``recipe`` (its parts with their hyper-parameters),
    ``deltas`` (by target name), ``modules_to_save`` (names of modules trained whole beside the method, a new head for example) and
    ``whole_targets`` (the targets inside them),
    ``callbacks``, ``step`` (optimiser updates so far), ``seed``, ``trainable`` (False where it was loaded for use), ``fingerprint`` (of
    the base it was attached to, see :func:`graft.core.hashing.fingerprint`; None where it was loaded, or the base was not whole).
    """

    def __init__(self, name: str, model: nn.Module, recipe: Recipe, deltas: Mapping[str, Delta], shared: nn.Module | None, seed: int):
        self.name, self.model, self.recipe, self.seed = name, model, recipe, seed
        self.method = catalogue.name_of(recipe)
        self.deltas: dict[str, Delta] = dict(deltas)
        self.shared = shared
        self.modules_to_save: tuple[str, ...] = ()
        self.whole_targets: frozenset[str] = frozenset()
        self.callbacks: list[Callback] = [callback for part in recipe.parts for callback in part.callbacks()]
        self.step, self.trainable = 0, True
        self.fingerprint = None if recipe.delta.keeps_base else fingerprint(model)  # now or never
        self.shapes: dict[str, torch.Size] = {}  # of tensors(), as built
        self._hooks: list[RemovableHandle] = []

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {self.method}, {len(self.deltas)} targets, {self.parameter_count:,} parameters)"

    # ---- facts ------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """What the adapter trains, each parameter once, also those that a method has frozen for the moment; none if loaded for use."""
        return self._all_parameters() if self.trainable else []

    def _all_parameters(self) -> list[nn.Parameter]:
        owners = [*self.deltas.values(), *([self.shared] if self.shared is not None else [])]
        return list(dict.fromkeys(p for owner in owners for p in owner.parameters()))

    @property
    def layouts(self) -> dict[str, Layout]:
        """The structure of the method's delta at every target, without the modules that are trained whole."""
        return {name: delta.layout for name, delta in self.deltas.items() if name not in self.whole_targets}

    @property
    def parameter_count(self) -> int:
        """How many numbers the adapter has learned or can learn."""
        return sum(p.numel() for p in self._all_parameters())

    def freeze(self) -> None:
        """Makes an adapter that is used and not trained: no callbacks, no parameter that asks for a gradient."""
        self.trainable, self.callbacks = False, []
        for parameter in self._all_parameters():
            parameter.requires_grad_(False)

    def pairs(self) -> dict[str, Pair]:
        """The trained low-rank pairs ``(A, B, scale)`` by target, for optimisers that treat the two together."""
        pairs = {name: delta.pair() for name, delta in self.deltas.items()}
        return {name: pair for name, pair in pairs.items() if pair is not None}

    @property
    def active(self) -> bool:
        """Whether the adapter takes part in the model's function."""
        return any(self.name in slot_of(delta.target).active for delta in self.deltas.values())

    @active.setter
    def active(self, value: bool) -> None:
        for delta in self.deltas.values():
            slot = slot_of(delta.target)
            others = tuple(name for name in slot.active if name != self.name)
            slot.active = (*others, self.name) if value else others

    @property
    def merged(self) -> bool:
        """Whether the adapter is baked into the weights beside the base's."""
        return any(self.name in slot_of(delta.target).merged for delta in self.deltas.values())

    # ---- merging ----------------------------------------------------------------------------------------------------

    def merge(self) -> MergeReport:
        """Bakes ``W'`` beside ``W`` at every target, from at least fp32 and rounded once; the base stays untouched.

        Raises :class:`NotMergeable` (before anything changes) where the method has no ``W'``, and :class:`GraftError` when it is
        merged already.
        """
        if self.merged:
            raise GraftError(f"adapter {self.name!r} is merged already; call unmerge() first.")
        for callback in self.callbacks:
            callback.on_export()
        slots = {name: slot_of(delta.target) for name, delta in self.deltas.items()}
        before = {name: slot.merged for name, slot in slots.items()}
        try:
            return MergeReport({name: slot.bake((*slot.merged, self.name)) for name, slot in slots.items()})
        except BaseException:
            for name, slot in slots.items():
                slot.bake(before[name])
            raise

    def unmerge(self) -> None:
        """Drops the baked weights; the function is again base plus deltas, exactly as before :meth:`merge`."""
        if not self.merged:
            raise GraftError(f"adapter {self.name!r} is not merged; there is nothing to undo.")
        for delta in self.deltas.values():
            slot = slot_of(delta.target)
            slot.bake(tuple(name for name in slot.merged if name != self.name))

    # ---- training ---------------------------------------------------------------------------------------------------

    def optimizer(self, lr: float, total_steps: int, weight_decay: float = 0.0, **options: Any) -> torch.optim.Optimizer:
        """The method's own optimizer (AdamW where it has none), bound to the adapter.

        ``options`` go to ``torch.optim.AdamW``. Groups follow the method (LoRA+ ratios, no decay on vectors).
        """
        self._refuse_frozen()
        part, groups = self.recipe.optimiser, self.recipe.delta.groups(self, lr, weight_decay)
        if part is not None:
            if any(group["lr"] != lr for group in groups):
                raise GraftError(
                    f"{type(part).__name__} has one learning rate and would ignore that {type(self.recipe.delta).__name__} asks for several."
                )
            if options:
                raise GraftError(f"{type(part).__name__} takes its options from the method, not {', '.join(options)}; pass them to attach().")
            return self.bind(part.make(self, lr, weight_decay), total_steps)
        if not {"foreach", "fused", "capturable", "differentiable"} & set(options):
            options["fused"] = all(p.device.type in ("cpu", "cuda") for p in self.parameters())
        return self.bind(torch.optim.AdamW(groups, lr=lr, **options), total_steps)

    def bind(self, optimizer: AnyOptimizer, total_steps: int) -> AnyOptimizer:
        """Lets the method act at every step of ``optimizer``, through its step hooks; returns the optimizer.

        ``total_steps`` counts optimiser updates. Raises :class:`GraftError` where a trained parameter is missing from it.
        """
        if total_steps < 1:
            raise GraftError(f"total_steps is {total_steps}; give the number of optimiser updates, at least 1.")
        self._refuse_frozen()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in self.parameters() if id(p) not in held]
        if missing:
            raise GraftError(
                f"{len(missing)} of {len(self.parameters())} trained parameters of adapter {self.name!r} are not in the optimizer; "
                "make it after attach(), from adapter.parameters() or with adapter.optimizer(lr, total_steps)."
            )
        for hook in self._hooks:
            hook.remove()
        for callback in self.callbacks:
            callback.adapter, callback.optimizer, callback.total_steps = self, optimizer, total_steps
            callback.on_start()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]
        return optimizer

    def _refuse_frozen(self) -> None:
        if not self.trainable:
            raise GraftError(f"adapter {self.name!r} was loaded for use, not for training; load it with trainable=True.")

    @property
    def bound(self) -> bool:
        """Whether the adapter acts on an optimizer's steps."""
        return bool(self._hooks)

    def _before_update(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.callbacks and any(closure is not None for closure in (*args[1:], kwargs.get("closure"))):
            raise GraftError("optimizer.step(closure) computes gradients where callbacks cannot see them; call backward() before step().")
        for callback in self.callbacks:
            penalty = callback.penalty()
            if penalty is not None and penalty.requires_grad:
                parameters = [p for p in self.parameters() if p.requires_grad]
                for parameter, gradient in zip(parameters, torch.autograd.grad(penalty, parameters, allow_unused=True), strict=True):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for callback in self.callbacks:
            callback.before_update(self.step)

    def _after_update(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.after_update(self.step)
        self.step += 1

    def before_eval(self) -> None:
        """Tells the callbacks that an evaluation follows."""
        for callback in self.callbacks:
            callback.before_eval()

    def phase(self, name: str) -> None:
        """Announces a change of phase (a new task, a rewind) to the callbacks."""
        for callback in self.callbacks:
            callback.on_phase(name)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that defines the adapter's function beside its layouts: ``<target>.<parameter>`` -> tensor."""
        tensors = {f"{name}.{key}": value for name, delta in self.deltas.items() for key, value in delta.tensors().items()}
        if self.shared is not None:
            tensors |= {f"shared.{key}": value for key, value in self.shared.state_dict().items()}
        return tensors

    def note_shapes(self) -> None:
        """Remembers the shapes of :meth:`tensors`, which a save must find again."""
        self.shapes = {name: value.shape for name, value in self.tensors().items()}

    def state_dict(self) -> State:
        """All that an exact resume needs beside the optimizer: tensors, step and the callbacks' state."""
        state: State = {f"tensors.{name}": value for name, value in self.tensors().items()}
        state["step"] = self.step
        for index, callback in enumerate(self.callbacks):
            state |= {f"callbacks.{index}.{name}": value for name, value in callback.state_dict().items()}
        return state

    def load_state_dict(self, state: State) -> None:
        """The inverse of :meth:`state_dict`, on an adapter attached in the same way and bound to its optimizer."""
        tensors, saved = self.tensors(), {name.removeprefix("tensors."): value for name, value in state.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            if name not in saved or saved[name].shape != value.shape:
                raise GraftError(f"the saved state does not fit adapter {self.name!r} at {name}; attach it with the settings of that run.")
        with torch.no_grad():
            for name, value in tensors.items():
                value.copy_(saved[name])
        step = state["step"]
        assert isinstance(step, int)
        self.step = step
        for index, callback in enumerate(self.callbacks):
            prefix = f"callbacks.{index}."
            callback.load_state_dict({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})

    def drop_target(self, name: str) -> None:
        """Lets one target go back to the base (rank 0)."""
        delta = self.deltas.pop(name)
        slot_of(delta.target).remove(self.name)
        _house_shared(self)

    def save(self, path: str | Path) -> Path:
        """Writes the adapter as a folder (safetensors and JSON); see :mod:`graft.core.storage`."""
        from graft.core.storage import save_adapter

        return save_adapter(self, path)


def attach(
    model: nn.Module,
    method: str | DeltaConfig = "lora",
    *,
    targets: TargetSpec | None = None,
    name: str = "default",
    seed: int = 0,
    calibration: Iterable[Batch] | Calibration | None = None,
    loss: Loss | None = None,
    init: Part | Sequence[Part] = (),
    callbacks: Sequence[Callback | Part] = (),
    optimiser: Part | None = None,
    modules_to_save: Iterable[str] = (),
    **settings: Any,
) -> Adapter:
    """Attaches an adapter to ``model``: by the method's name with its hyper-parameters, or composed from parts.

    ``targets`` see :func:`graft.core.target.find_targets`; the method's own default is usually ``"linear"``. ``calibration`` are
    batches (mappings of the model's keyword arguments) for methods that look at data first, ``loss(model, batch)`` replaces the
    model's own loss on them. ``modules_to_save`` names modules that are trained whole and saved along (a new head).
    The function of the model does not change. Raises :class:`GraftError` for anything that does not fit, leaving the model as it was.
    """
    extras = [*([init] if isinstance(init, Part) else init), *(c for c in callbacks if isinstance(c, Part))]
    extras += [optimiser] if optimiser is not None else []
    if isinstance(method, str):
        row = catalogue[method]
        own = row.recipe(**settings)
        recipe = compose(own.delta, [*own.parts[1:], *extras])
        wanted = row.default_targets
        if row.needs and calibration is None:
            raise GraftError(f"{method} needs {row.needs}; pass calibration=a few batches.")
    else:
        if not isinstance(method, DeltaConfig):
            raise GraftError(f"method is {method!r}; give a method's name or a delta's config such as LoRA(rank=8).")
        if settings:
            raise GraftError(f"{', '.join(settings)} belong into {type(method).__name__}(...) when the method is composed from parts.")
        recipe, wanted = compose(method, extras), method.default_targets
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(model, calibration, loss)
    found = find_targets(model, targets if targets is not None else wanted, recipe.delta.kinds)
    layouts = recipe.delta.layouts(found, model, seed, calibration)
    adapter = build(model, name, recipe, [target for target in found if target.name in layouts], layouts, modules_to_save, seed)
    adapter.callbacks += [callback for callback in callbacks if isinstance(callback, Callback)]
    try:
        for part in recipe.parts:
            part.prepare(adapter, calibration)
    except BaseException:
        detach(model, name)
        raise
    adapter.note_shapes()
    if adapter.fingerprint is None and is_whole(model):
        adapter.fingerprint = fingerprint(model, adapter.modules_to_save)
    return adapter


def build(
    model: nn.Module,
    name: str,
    recipe: Recipe,
    targets: Sequence[Target],
    layouts: Mapping[str, Layout],
    modules_to_save: Iterable[str],
    seed: int,
) -> Adapter:
    """Puts the deltas of ``layouts`` in place: the common part of :func:`attach` and of loading."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise GraftError(f"the adapter name {name!r} may hold letters, digits, '-' and '_' only.")
    if name in adapters_of(model):
        raise GraftError(f"an adapter named {name!r} is attached already; choose another name or detach it first.")
    config, shared = recipe.delta, recipe.delta.shared(targets, seed)
    deltas = {
        target.name: config.delta(target, layouts[target.name], config, shared, _generator(seed, target.name))
        for target in followed(targets, "making the adapter")
    }
    heads = _whole_modules(model, modules_to_save, set(deltas))
    adapter = Adapter(name, model, recipe, {**deltas, **heads}, shared, seed)
    adapter.modules_to_save, adapter.whole_targets = tuple(modules_to_save), frozenset(heads)
    registry = registry_of(model)
    if registry is None:
        registry = Registry(model)
        model.__dict__[REGISTRY] = registry
    registry.adapters[name] = adapter
    for delta in adapter.deltas.values():
        delta.to(delta.target.device)
        delta.train(delta.target.module.training)
        slot_of(delta.target).add(name, delta)
    share_inputs(delta.target for delta in adapter.deltas.values())
    _house_shared(adapter)
    adapter.note_shapes()
    return adapter


def _house_shared(adapter: Adapter) -> None:
    """Puts what the deltas share into the first of their slots, so that it moves with the model."""
    if adapter.shared is not None:
        first = next(iter(adapter.deltas.values())).target
        slot_of(first).shared[adapter.name] = adapter.shared.to(first.device)


def _whole_modules(model: nn.Module, names: Iterable[str], taken: set[str]) -> dict[str, Delta]:
    """Full copies of every target inside the named modules; the class comes from the catalogue, like any other delta."""
    known = [name for name, _ in model.named_modules()]
    inside: dict[str, Target] = {}
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in known):
            raise GraftError(f"no module is called {name!r}; {nearest(name, {p.rsplit('.', 1)[-1] for p in known if p})}")
        found = {target.name: target for target in all_targets(model) if f".{name}." in f".{target.name}."}
        if not found:
            raise GraftError(f"the module {name!r} in modules_to_save holds no linear map, convolution, embedding or norm to train; leave it out.")
        inside |= found
    for name in inside:
        if name in taken:
            raise GraftError(f"{name} is a target of the method and in modules_to_save; leave it out of one of them.")
    whole = catalogue["full"].delta()
    copies = whole.shared(list(inside.values()), 0)
    return {name: whole.delta(target, {}, whole, copies, torch.Generator()) for name, target in inside.items()}


def _generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on the seed and the target's name only, not on which other targets there are."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def detach(model: nn.Module, name: str | None = None) -> None:
    """Takes one adapter, or all, off the model; with the last one the model is bit for bit the base again."""
    registry = registry_of(model)
    names = list(registry.adapters) if registry else []
    if name is not None and name not in names:
        raise GraftError(f"no adapter is called {name!r}; {nearest(name, names) if names else 'none is attached.'}")
    if registry is None:
        return
    for each in names if name is None else [name]:
        adapter = registry.adapters.pop(each)
        for delta in adapter.deltas.values():
            slot_of(delta.target).remove(each)
        adapter.recipe.delta.release(adapter)
        for hook in adapter._hooks:
            hook.remove()
    if not registry.adapters:
        registry.hook.remove()
        for parameter, requires_grad in registry.frozen:
            parameter.requires_grad_(requires_grad)
        del model.__dict__[REGISTRY]


def switch(model: nn.Module, name: str) -> None:
    """Merges adapter ``name`` in the place of whatever is merged now; other adapters become inactive.

    Where both are sparse only their own entries are rewritten, and the result has the bits of a fresh merge.
    """
    adapters = adapters_of(model)
    if name not in adapters:
        raise GraftError(f"no adapter is called {name!r}; {nearest(name, adapters) if adapters else 'none is attached.'}")
    slots = {id(slot): slot for adapter in adapters.values() for slot in (slot_of(d.target) for d in adapter.deltas.values())}
    for slot in slots.values():
        slot.switch(name)
    for adapter in adapters.values():
        adapter.active = adapter.name == name


def _before_forward(model: nn.Module, args: Any) -> None:
    """Runs before each training forward: what would silently train nothing is refused, then the callbacks act."""
    if not (model.training and torch.is_grad_enabled()):
        return
    for adapter in adapters_of(model).values():
        if not adapter.active or not adapter.trainable:
            continue
        if adapter.merged:
            raise GraftError(f"adapter {adapter.name!r} is merged, so training would not change it; call unmerge() first.")
        if not adapter.callbacks:
            continue
        if not adapter.bound:
            raise GraftError(
                f"adapter {adapter.name!r} ({adapter.method}) acts during training and is not bound to an optimizer; "
                "use adapter.optimizer(lr, total_steps) or adapter.bind(optimizer, total_steps)."
            )
        for callback in adapter.callbacks:
            callback.before_forward()
