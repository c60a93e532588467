"""HuggingFace PEFT's form of a method. Mostly other names for the same things, so it is a table; methods add what a table cannot say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.core.errors import GraftError


@dataclass(frozen=True)
class PeftFormat:
    """What PEFT calls a method and its parts.

    ``type`` is its ``peft_type``, ``keys`` its tensor names for ours, ``options`` our option for each of its config keys.
    ``sizes`` are the entries of a delta's layout that the shape of a tensor tells, as PEFT's name and dimension; ``patterns`` the
    entry for each config key that lists the targets where an option differs (``rank_pattern``). ``fixed`` holds options of PEFT's that change
    what an adapter computes and that Graft does not have, with the one value at which they do nothing: with another a file is refused.
    ``unread`` ones are written and not read here: they change nothing after training, or the method looks at them. ``alpha`` is the key of
    PEFT's alpha where a delta's scale is alpha / rank, both of which may differ by target (``rank_pattern``, ``alpha_pattern``). ``others``
    are keys that the method reads and writes itself.
    """

    type: str
    keys: Mapping[str, str]
    options: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, Any] = field(default_factory=dict)
    alpha: str = ""
    others: tuple[str, ...] = ()

    @property
    def known(self) -> set[str]:
        """The config keys that may be in a file."""
        return {*self.options, *self.patterns, *self.fixed, *self.unread, *self.others, *((self.alpha, *SCALED) if self.alpha else ())}

    def write(self, settings: Mapping[str, Any], layouts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """PEFT's keys for our options and the layout of every target."""
        keys = {**self.unread, **self.fixed, **{key: settings[name] for key, name in self.options.items()}}
        plain = {name: key for key, name in self.options.items()}
        for key, entry in self.patterns.items():
            keys[plain[entry]], keys[key] = most_and_others({name: layout[entry] for name, layout in layouts.items()})
        return {**keys, **(ranks_and_alphas(layouts, self.alpha) if self.alpha else {})}

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our options from a PEFT config; raises :class:`GraftError` for one that Graft does not have."""
        for key, value in self.fixed.items():
            if config.get(key, value) != value:
                raise GraftError(f"the PEFT adapter has {key} = {config[key]!r}, and Graft has {value!r} only; make it again in PEFT with that.")
        return {name: config[key] for key, name in self.options.items()}

    def layout(self, name: str, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """What the config and the shapes of its tensors, by PEFT's names, tell of the layout of the target ``name``."""
        found: dict[str, Any] = {entry: shapes[tensor][dimension] for entry, (tensor, dimension) in self.sizes.items()}
        if self.alpha:
            rank = by_pattern(config.get("rank_pattern"), name, config["r"])
            found |= {"rank": rank, "scale": by_pattern(config.get("alpha_pattern"), name, config[self.alpha]) / rank}
        return found


SCALED = ("r", "rank_pattern", "alpha_pattern")


def ranks_and_alphas(layouts: Mapping[str, Mapping[str, Any]], alpha_key: str) -> dict[str, Any]:
    """Ranks and alphas for layouts with a rank and a scale. PEFT divides by the rank, so alpha is scale * rank; a frozen start counts as ranks."""
    ranks = {name: layout["rank"] + layout.get("frozen", 0) for name, layout in layouts.items()}
    rank, rank_pattern = most_and_others(ranks)
    alpha, alpha_pattern = most_and_others({name: layout["scale"] * ranks[name] for name, layout in layouts.items()})
    return {"r": rank, "rank_pattern": rank_pattern, alpha_key: alpha, "alpha_pattern": alpha_pattern}


def most_and_others(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A value for most targets, and those that differ: PEFT's ``r`` and ``rank_pattern``."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {name: value for name, value in values.items() if value != most}


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, is the name or its end after a dot."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)
