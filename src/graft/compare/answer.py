"""The answer of a comparison: its table, and a paragraph that says no more than the evidence holds.

All sentences are computed from the records: who may be first, who is as good with fewer parameters or less memory, which differences are
significant, and what could not be found out.
"""

from __future__ import annotations

import statistics as middle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from graft.compare.results import Record
from graft.compare.statistics import Interval, Pair, Scores, interval, pairs, places

VERDICTS = ("best", "tied", "seems worse", "worse")
NAMES, FIRST_NAMES = 12, 3  # more names than a reader takes in are named by the first of them and their number


@dataclass(frozen=True)
class Entry:
    """One row of the table: a contender over its seeds. Sizes in bytes, times in seconds, medians over seeds."""

    name: str
    baseline: bool
    quality: Interval
    place: tuple[int, int]
    seeds: int
    lr: float | None
    parameters: int
    share: float  # of the base's parameters
    adapter_bytes: int
    memory_bytes: int
    step_seconds: float | None
    seconds: float
    mergeable: str
    forgetting: float | None

    @property
    def places(self) -> str:
        """Its places for a reader."""
        return "-".join(map(str, dict.fromkeys(self.place)))


class Answer:
    """What the records of a comparison say. Raises :class:`ValueError` where no contender has seen the test rows."""

    def __init__(self, records: Sequence[Record]):
        self.records = list(records)
        self.counting = [record for record in records if record["chosen"]]
        if not self.counting:
            raise ValueError("no run has finished")

    @cached_property
    def names(self) -> list[str]:
        """The contenders that have results, in the table's order."""
        return list(dict.fromkeys(record["contender"] for record in self.counting))

    @cached_property
    def predictions(self) -> dict[str, list[list[dict[str, Any]]]]:
        """What each contender said: by seed, then by test row."""
        by_seed = {name: sorted((r for r in self.counting if r["contender"] == name), key=lambda r: int(r["seed"])) for name in self.names}
        return {name: [record.predictions() for record in records] for name, records in by_seed.items()}

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """``[seeds, test rows]``: right or wrong; minus the loss where nothing can be right."""
        return {
            name: np.array([[float(row["correct"]) if "correct" in row else -row["loss"] for row in seed] for seed in seeds])
            for name, seeds in self.predictions.items()
        }

    @property
    def measure(self) -> str:
        return "accuracy" if "accuracy" in self.counting[0]["test"] else "loss"

    @cached_property
    def pairs(self) -> list[Pair]:
        return pairs(self.scores)

    def pair(self, first: str, second: str) -> Pair:
        """The pair of two contenders, whichever way round it was tested."""
        return next(pair for pair in self.pairs if {pair.first, pair.second} == {first, second})

    @cached_property
    def entries(self) -> list[Entry]:
        """The table, the highest mean first."""
        spans = places(self.scores, self.pairs)
        found = [self._entry(name, spans[name]) for name in self.names]
        return sorted(found, key=lambda entry: -entry.quality.mean)

    def _entry(self, name: str, place: tuple[int, int]) -> Entry:
        records = [record for record in self.counting if record["contender"] == name]
        first = records[0]
        forgotten = [record["forgetting"]["value"] for record in records if record["forgetting"]]
        return Entry(
            name=name,
            baseline=first["baseline"],
            quality=interval(self.scores[name]),
            place=place,
            seeds=len(records),
            lr=first["lr"],
            parameters=first["trainable_parameters"],
            share=first["trainable_parameters"] / max(first["base_parameters"], 1),
            adapter_bytes=first["adapter_bytes"],
            memory_bytes=round(middle.median(record["peak_memory_bytes"] for record in records)),
            step_seconds=middle.median(record["step_seconds"] for record in records) if first["step_seconds"] else None,
            seconds=middle.median(record["seconds"] for record in records),
            mergeable=first["mergeable"],
            forgetting=middle.median(forgotten) if forgotten else None,
        )

    @cached_property
    def best(self) -> list[Entry]:
        """Those that nobody is significantly better than, the highest mean first; one only where it is alone."""
        return [entry for entry in self.entries if entry.place[0] == 1]

    @cached_property
    def tied(self) -> list[Entry]:
        """Those of :attr:`best` whose difference to the first may be none: its interval holds zero."""
        first = self.entries[0]
        spans = [(entry, self.pair(first.name, entry.name).difference) for entry in self.best if entry is not first]
        return [first, *(entry for entry, span in spans if span.low <= 0 <= span.high)]

    def verdict(self, entry: Entry) -> str:
        """How an entry stands to the first, of :data:`VERDICTS`; ``worse`` where somebody is significantly better."""
        best, tied, seems_worse, worse = VERDICTS
        if entry is self.entries[0]:
            return best
        if entry in self.best:
            return tied if entry in self.tied else seems_worse
        return worse

    @cached_property
    def at_edge(self) -> dict[str, list[str]]:
        """Contenders whose chosen learning rate is the ``lowest`` or the ``highest`` of those that were tried for them."""
        found: dict[str, list[str]] = {"lowest": [], "highest": []}
        for entry in self.entries:
            tried = {record["lr"] for record in self.records if record["contender"] == entry.name}
            for end, rate in zip(found, (min, max), strict=True):
                if len(tried) > 1 and entry.lr == rate(tried):
                    found[end].append(entry.name)
        return found

    @property
    def failed(self) -> dict[str, str]:
        """Contenders without a result, and why."""
        said: dict[str, str] = {}
        for record in self.records:
            if record["contender"] not in self.names:
                said[record["contender"]] = record["error"] or ("stopped early: clearly losing" if record["state"] == "pruned" else record["state"])
        return said

    def value(self, score: float) -> str:
        """A score for a reader."""
        return f"{100 * score:.1f} %" if self.measure == "accuracy" else f"{-score:.3f}"

    def span(self, found: Interval) -> str:
        """A quality with its interval for a reader; of a loss the smaller is better."""
        ends = (found.low, found.high) if self.measure == "accuracy" else (found.high, found.low)
        return f"{self.value(found.mean)} ({self.value(ends[0])} to {self.value(ends[1])})"

    # ---- in words -------------------------------------------------------------------------------------------------------

    @cached_property
    def sentences(self) -> list[str]:
        """The answer, a sentence each."""
        return [
            said
            for said in (self._who(), self._cheaper(), self._lighter(), self._baselines(), self._worse(), self._forgotten(), self._doubts())
            if said
        ]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    def _who(self) -> str:
        top, tied = self.entries[0], [entry.name for entry in self.tied[1:]]
        doubtful = [entry.name for entry in self.best if entry not in self.tied]
        ahead = f"{top.name} has the best {self.measure}, {self.span(top.quality)}"
        if not tied and not doubtful:
            return f"On this data {top.name} is best: {self.measure} {self.span(top.quality)}, significantly ahead of all others."
        said = f"On this data {ahead}" + (f", but nothing separates it from {listed(tied)}: these {len(tied) + 1} are tied." if tied else ".")
        if doubtful:
            said += f" {_verb(doubtful, 'seems', 'seem')} worse, but not beyond the chance of so many comparisons."
        return said

    def _trained_ties(self) -> list[Entry]:
        """Those of :attr:`tied` that were trained, the highest mean first."""
        return [entry for entry in self.tied if entry.parameters]

    def _cheaper(self) -> str:
        tied = self._trained_ties()
        if len(tied) < 2:
            return ""
        top, small = tied[0], min(tied, key=lambda entry: entry.parameters)
        if small.parameters * 1.5 > top.parameters:
            return ""
        return f"Among them {small.name} is within noise of {top.name} with {fraction(small.parameters / top.parameters)} of its parameters."

    def _lighter(self) -> str:
        tied = self._trained_ties()
        if len(tied) < 2:
            return ""
        top = tied[0]
        light = min(tied, key=lambda entry: entry.memory_bytes)
        quick = min((entry for entry in tied if entry.step_seconds), key=lambda entry: entry.step_seconds or 0.0, default=top)
        said = []
        if light.memory_bytes < 0.9 * top.memory_bytes:
            said.append(f"{light.name} trains in {fraction(light.memory_bytes / top.memory_bytes)} of its memory")
        if quick.step_seconds and top.step_seconds and quick.step_seconds < 0.9 * top.step_seconds:
            said.append(f"{quick.name} takes {fraction(quick.step_seconds / top.step_seconds)} of its time an update")
        return f"Of the tied, against {top.name}, {listed(said)}." if said else ""

    def _baselines(self) -> str:
        trained = [entry for entry in self.entries if entry.parameters]
        untrained = [entry for entry in self.entries if not entry.parameters]
        if not trained or not untrained:
            return ""
        reference = max(untrained, key=lambda entry: entry.quality.mean)
        than = f"{reference.name} ({self.value(reference.quality.mean)})"
        better = [entry.name for entry in trained if self._beats(entry.name, reference.name)]
        if not better:
            return f"No training beats {than} significantly."
        if len(better) == len(trained):
            return f"Every trained method beats {than}."
        not_better = [entry.name for entry in trained if entry.name not in better]
        if len(better) < len(not_better):
            return f"Only {_verb(better, 'beats', 'beat')} {than} significantly."
        return f"{_verb(not_better, 'does', 'do')} not beat {than} significantly."

    def _beats(self, first: str, second: str) -> bool:
        pair = self.pair(first, second)
        return pair.significant and (pair.difference.mean > 0) == (pair.first == first)

    def _worse(self) -> str:
        top = self.entries[0].name
        worse = [entry.name for entry in self.entries if entry.parameters and entry.place[0] > 1 and self._beats(top, entry.name)]
        return f"{_verb(worse, 'is', 'are')} significantly worse than {top}." if worse else ""

    def _forgotten(self) -> str:
        known = [entry for entry in self.entries if entry.parameters and entry.forgetting is not None]
        if len(known) < 2:
            return ""
        most, least = max(known, key=lambda entry: entry.forgetting or 0.0), min(known, key=lambda entry: entry.forgetting or 0.0)
        if most.forgetting == least.forgetting:
            return ""
        loss = self.counting[0]["forgetting"]["measure"] == "loss"
        what = "loss on general text rose by {:+.3f}" if loss else "text vectors moved by {:.3f}"
        return (
            f"On general text {most.name} changed the model most ({what.format(most.forgetting)}), {least.name} least "
            f"({what.format(least.forgetting).rsplit(' ', 1)[-1]})."
        )

    def _doubts(self) -> str:
        said = []
        counts = {entry.seeds for entry in self.entries if entry.parameters}
        rows = self.scores[self.names[0]].shape[1]
        if counts and min(counts) == 1:
            said.append("some methods ran with one seed only, so how much chance is in their training is not known")
        if rows < 100:
            said.append(f"{rows} test rows tell only large differences apart")
        cut = max((record["rows_shortened"] or 0 for record in self.counting), default=0)
        if cut:
            said.append(f"{cut} train rows were cut to the most tokens a row may have")
        ends = [f"the {end} that was tried for {listed(names)}" for end, names in self.at_edge.items() if names]
        if ends:
            said.append(f"the chosen learning rate is {' and '.join(ends)}, so rates beyond it may do better there")
        said += [f"{name} has no result ({reason.rstrip('.')})" for name, reason in self.failed.items()]
        return f"To bear in mind: {'; '.join(said)}." if said else ""


def _verb(names: Sequence[str], one: str, many: str) -> str:
    return f"{listed(names)} {one if len(names) == 1 else many}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``; of more than :data:`NAMES` the first ones, ``a, b, c and 10 others``."""
    if len(names) > NAMES:
        names = [*names[:FIRST_NAMES], f"{len(names) - FIRST_NAMES} others"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def fraction(share: float) -> str:
    """A share in words where it is a simple one."""
    known: Mapping[float, str] = {
        1 / 2: "half",
        1 / 3: "a third",
        1 / 4: "a quarter",
        1 / 5: "a fifth",
        1 / 10: "a tenth",
        2 / 3: "two thirds",
        3 / 4: "three quarters",
    }
    close = next((word for value, word in known.items() if abs(share / value - 1) < 0.06), None)
    if close:
        return close
    return f"{100 * share:.0f} %" if share >= 0.02 else f"1/{round(1 / share):,}"
