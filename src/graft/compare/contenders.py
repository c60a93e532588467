"""What is compared: the baselines that are always there, and the methods that were asked for, sized to a budget of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graft.compare.config import CompareConfig
from graft.core.catalogue import catalogue
from graft.core.errors import GraftError, nearest
from graft.core.target import Target, find_targets
from graft.data.reading import Kind

BASELINES = ("base", "few-shot", "linear-probe", "full", "lora")
# Options that set the size of a method. A budget is looked for among the values of the first that it has; the others keep their proportion.
SIZES = ("rank", "initial_rank", "output_rank", "down", "count")
RANKS, SHARES = range(1, 257), [i / 1000 for i in (*range(1, 10), *range(10, 500, 5))]
COUNTS = sorted({round(1.05**power) for power in range(240)})


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    ``method`` of the catalogue with its ``settings`` and ``targets``; "" where nothing is trained: then the base model is asked, with
    ``shots`` examples in the prompt. ``baseline``: is never stopped early.
    """

    name: str
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None
    shots: int = 0
    baseline: bool = False

    @property
    def trains(self) -> bool:
        return bool(self.method)

    @property
    def draws(self) -> bool:
        """Whether anything depends on the seed."""
        return self.trains or self.shots > 0


def contenders(config: CompareConfig, kind: Kind) -> list[Contender]:
    """The baselines that the kind of data has, then the methods that were asked for; raises :class:`GraftError` for an unknown one."""
    found = [Contender("base", baseline=True)]
    if kind == "answers":
        found.append(Contender("few-shot", shots=config.shots, baseline=True))
    if kind == "labels":
        found.append(Contender("linear-probe", "full", targets=("head",), baseline=True))
    found += [Contender("full", "full", baseline=True), Contender("lora", "lora", baseline=True)]
    for text in config.methods:
        contender = parse(text)
        if not contender.trains and contender.name not in {other.name for other in found}:
            raise GraftError(f"the baseline {contender.name} is not for rows of kind {kind!r}; leave it out.")
        if contender.name not in {other.name for other in found}:
            found.append(contender)
        elif contender.name not in BASELINES:
            raise GraftError(f"{text} is among the methods twice; name it once.")
    return found


def parse(text: str) -> Contender:
    """``dora``, or ``lora:rank=16:alpha=32`` with options that differ from the method's defaults."""
    name, *options = text.split(":")
    if name in BASELINES and name not in catalogue:
        if options:
            raise GraftError(f"{name} is a baseline without options, but {text!r} gives some; leave them out.")
        return Contender(name)  # there anyway
    settings = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise GraftError(f"{text!r} must be method:option=value, such as lora:rank=16.")
        settings[key] = value
    if name not in catalogue:
        raise GraftError(f"there is no method {name!r}; {nearest(name, [*BASELINES, *(method.name for method in catalogue)])}")
    catalogue[name].recipe(**settings)
    return Contender(text, name, settings)


def within(contender: Contender, limit: int, targets: Mapping[str, Sequence[Target]]) -> Contender | None:
    """The contender made as large as the budget of ``limit`` parameters allows; None where it cannot be so small.

    ``targets``: those of each method name. Baselines stay as they are, whatever their size, but for LoRA, which is sized like the methods;
    a size that was given stays too, and the contender is left out where that is too large.
    """
    if not contender.trains or (contender.baseline and contender.name != "lora"):
        return contender
    method = catalogue[contender.method]
    knobs = {o.name: o.default for o in method.options() if o.name in SIZES and o.name not in contender.settings and o.default}
    fitting: list[tuple[int, Contender]] = []
    for settings in _sizes(knobs):
        settings = {**contender.settings, **settings}
        try:
            count = method.recipe(**settings).delta.total(targets[contender.method])
        except GraftError:
            continue  # a rank that some target cannot have
        if count <= limit:
            fitting.append((count, replace(contender, settings=settings)))
    return max(fitting, key=lambda pair: pair[0], default=(0, None))[1]


def _sizes(knobs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Values of the options in ``knobs`` (name -> default), all in the proportion of their defaults; one empty choice where there are none."""
    if not knobs:
        yield {}
        return
    first = next(name for name in SIZES if name in knobs)
    for value in COUNTS if first == "count" else RANKS if isinstance(knobs[first], int) else SHARES:
        factor = value / knobs[first]
        scaled = {name: max(1, round(own * factor)) if isinstance(own, int) else own * factor for name, own in knobs.items()}
        yield {**scaled, first: value}


def targets_of(contenders: Iterable[Contender], model: Any) -> dict[str, list[Target]]:
    """The targets that each contender's method adapts in ``model`` by default."""
    methods = {contender.method for contender in contenders if contender.trains}
    return {name: find_targets(model, catalogue[name].default_targets, catalogue[name].delta.kinds) for name in methods}
