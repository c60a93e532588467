"""The catalogue: the table of all methods, each a composition of parts. Docs, command line and tests are generated from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.core.config import OptionInfo
from graft.core.delta import DeltaConfig, Init, OptimiserPart, Part
from graft.core.errors import GraftError, nearest


@dataclass(frozen=True)
class Recipe:
    """A method with its hyper-parameters chosen: one delta and what goes with it."""

    delta: DeltaConfig
    inits: tuple[Init, ...] = ()
    allocations: tuple[Part, ...] = ()
    optimiser: OptimiserPart | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.delta, *self.inits, *self.allocations, *((self.optimiser,) if self.optimiser else ()))


@dataclass(frozen=True)
class Method:
    """One row of the catalogue.

    ``axis`` is the coordinate that the paper changes; ``mergeable`` says whether ``W'`` can be baked (``"exactly"`` or
    ``"never"``); ``starts_as_identity`` whether the adapted model computes the base's function before training; ``needs`` names
    what must be given beside the model (``"calibration"``, ``"calibration with labels"``); ``random`` whether anything is drawn from
    the seed; ``defaults`` are the options for which the method's usual value differs from its part's.
    """

    name: str
    title: str
    paper: str
    axis: str
    summary: str
    delta: type[DeltaConfig]
    init: type[Init] | None = None
    allocation: type[Part] | None = None
    optimiser: type[OptimiserPart] | None = None
    mergeable: str = "exactly"
    starts_as_identity: bool = True
    needs: str = ""
    random: bool = True
    targets: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[type[Part]]:
        """The classes of its parts, the delta first."""
        return [part for part in (self.delta, self.init, self.allocation, self.optimiser) if part is not None]

    @property
    def default_targets(self) -> str:
        return self.targets or self.delta.default_targets

    def options(self) -> list[OptionInfo]:
        """The hyper-parameters of all its parts, with this method's defaults."""
        options = [option for part in self.parts for option in part.options()]
        return [OptionInfo(o.name, o.type, self.defaults.get(o.name, o.default), o.help, o.unit, o.paper) for o in options]

    def recipe(self, **settings: Any) -> Recipe:
        """The method with these hyper-parameters; text values are read as the option's type.

        Raises :class:`GraftError` for an option it does not have, with the nearest, and for a value out of bounds.
        """
        owners = {option.name: part for part in self.parts for option in part.options()}
        for name in settings:
            if name not in owners:
                raise GraftError(f"{self.name} has no option {name!r}; {nearest(name, owners)}")
        chosen = {**self.defaults, **settings}
        made = {part: part.parse({n: v for n, v in chosen.items() if owners[n] is part}) for part in self.parts}
        return Recipe(
            delta=made[self.delta],  # type: ignore[arg-type]
            inits=(made[self.init],) if self.init else (),  # type: ignore[arg-type]
            allocations=(made[self.allocation],) if self.allocation else (),
            optimiser=made[self.optimiser] if self.optimiser else None,  # type: ignore[arg-type]
        )

    def cost(self, out_features: int, in_features: int, **settings: Any) -> int:
        """Trainable parameters at one target of shape ``[out, in]``."""
        return self.recipe(**settings).delta.parameters(out_features, in_features)


class Catalogue:
    """The methods: iterating gives the rows in the order of their names, ``catalogue["lora"]`` one of them."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        if name not in self._methods:
            raise GraftError(f"there is no method {name!r}; {nearest(str(name), self._methods)}")
        return self._methods[name]

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods[name] for name in sorted(self._methods))

    def __len__(self) -> int:
        return len(self._methods)

    def register(self, method: Method) -> Method:
        """Adds a method; two methods of one name, or two parts with the same option, are a programming error."""
        names = [option.name for part in method.parts for option in part.options()]
        assert method.name not in self._methods, f"{method.name} is registered twice"
        assert len(names) == len(set(names)), f"{method.name}: two parts share an option name"
        self._methods[method.name] = method
        return method

    def part(self, class_name: str) -> type[Part]:
        """A part by its class name, as adapter files name it; only classes of the catalogue can be named."""
        known = {part.__name__: part for method in self._methods.values() for part in method.parts}
        if class_name not in known:
            raise GraftError(f"the adapter uses a part {class_name!r} that this version of Graft does not have; {nearest(class_name, known)}")
        return known[class_name]

    def name_of(self, recipe: Recipe) -> str:
        """The method that a composition of parts is, or ``"custom"``."""
        kinds = {type(part) for part in recipe.parts}
        matching = [name for name, method in self._methods.items() if set(method.parts) == kinds]
        return matching[0] if matching else "custom"


catalogue = Catalogue()


def compose(delta: DeltaConfig, extras: Sequence[Part]) -> Recipe:
    """A recipe from parts, sorted by what they are."""
    optimisers = [part for part in extras if isinstance(part, OptimiserPart)]
    if len(optimisers) > 1:
        raise GraftError(f"an adapter has one optimiser, but {', '.join(type(o).__name__ for o in optimisers)} were given; keep one.")
    inits = tuple(part for part in extras if isinstance(part, Init))
    if len(inits) > 1:
        raise GraftError(
            f"an adapter has one start, but {', '.join(type(i).__name__ for i in inits)} were given, and each would undo the other; keep one."
        )
    rest = tuple(part for part in extras if not isinstance(part, (Init, OptimiserPart)))
    return Recipe(delta, inits, rest, optimisers[0] if optimisers else None)
