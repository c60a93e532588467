"""Hyper-parameters: frozen dataclasses whose fields carry their help, unit, bounds and the paper's range."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from graft.core.errors import GraftError, nearest


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    paper: str = "",
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A hyper-parameter of a :class:`Config`: its default, what it means, its unit, the paper's range and its bounds."""
    return field(default=default, metadata={"help": help, "unit": unit, "paper": paper, "low": low, "high": high})


@dataclass(frozen=True)
class OptionInfo:
    """One hyper-parameter as help texts and tables show it."""

    name: str
    type: str
    default: Any
    help: str
    unit: str
    paper: str


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every set of hyper-parameters; checks types, bounds and choices when it is made.

    Raises :class:`GraftError` naming the option, the value seen and the values allowed.
    """

    def __post_init__(self) -> None:
        for item, kind in _fields(type(self)):
            object.__setattr__(self, item.name, _checked(type(self).__name__, item, kind, getattr(self, item.name)))

    def refuse_unused(self, because: str, *names: str) -> None:
        """Raises :class:`GraftError` where one of these options, which mean nothing as the others are, was set."""
        for item, _ in _fields(type(self)):
            value = getattr(self, item.name)
            if item.name in names and value != item.default:
                raise GraftError(f"{type(self).__name__}.{item.name} is {value!r}, but {because}; leave it out.")

    @classmethod
    def options(cls) -> list[OptionInfo]:
        """Every hyper-parameter with default, unit and the paper's range."""
        return [
            OptionInfo(item.name, _type_name(kind), item.default, *(item.metadata.get(k, "") for k in ("help", "unit", "paper")))
            for item, kind in _fields(cls)
        ]

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Self:
        """A config from names and values; values that are text (``--set rank=8``) are read as the option's type."""
        kinds = {item.name: kind for item, kind in _fields(cls)}
        for name in settings:
            if name not in kinds:
                raise GraftError(f"{cls.__name__} has no option {name!r}; {nearest(name, kinds)}")
        return cls(**{name: _read(value, kinds[name]) if isinstance(value, str) else value for name, value in settings.items()})

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters as plain JSON values; ``type(self).parse(settings)`` gives this config again."""
        return dataclasses.asdict(self)


def _fields(cls: type[Config]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(item, hints[item.name]) for item in dataclasses.fields(cls)]


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(kind))
    names = [getattr(k, "__name__", str(k)) if typing.get_origin(k) is None else _type_name(k) for k in _alternatives(kind)]
    return " | ".join("none" if name == "NoneType" else name for name in names)


def _read(text: str, kind: Any) -> Any:
    """Text from a command line as a value of ``kind``; text that does not fit is returned as it is, for the check to refuse."""
    for candidate in _alternatives(kind):
        if candidate is types.NoneType and text.lower() in ("none", "null"):
            return None
        if candidate is bool and text.lower() in ("true", "false", "yes", "no", "1", "0"):
            return text.lower() in ("true", "yes", "1")
        if candidate in (int, float):
            try:
                return candidate(text)
            except ValueError:
                continue
    return text


def _checked(owner: str, item: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    where = f"{owner}.{item.name} is {value!r}"
    for candidate in _alternatives(kind):
        if typing.get_origin(candidate) is typing.Literal:
            choices = typing.get_args(candidate)
            if value in choices:
                return value
            raise GraftError(f"{where}; {nearest(str(value), map(str, choices))}")
        if candidate is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, candidate) and not (candidate is int and isinstance(value, bool)):
            break
    else:
        raise GraftError(f"{where}, but it must be of type {_type_name(kind)}.")
    low, high = item.metadata.get("low"), item.metadata.get("high")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        bounds = [f"at least {low:g}" if low is not None else "", f"at most {high:g}" if high is not None else ""]
        raise GraftError(f"{where}, but it must be {' and '.join(b for b in bounds if b) or 'finite'}.")
    return value
