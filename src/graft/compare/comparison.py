"""The loop of a comparison: what the plan wants goes to the workers, until nothing is wanted any more.

Everything that it knows lies in its folder, so a comparison that was killed goes on when it is started again.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graft.compare import job, plan
from graft.compare.config import CompareConfig
from graft.compare.contenders import Contender, contenders, parse, targets_of, within
from graft.compare.estimate import Estimate, estimate, steps_for
from graft.compare.forgetting import general_text
from graft.compare.plan import Run
from graft.compare.pruning import Pruner
from graft.compare.results import RUNS, Record, lines, load_records, read_results, write_lines
from graft.compare.splits import FOLDER, Splits, facts, prepare
from graft.compare.workers import LocalWorkers, Workers
from graft.core.errors import GraftError
from graft.core.storage import to_json, write_folder
from graft.models import load
from graft.training.fit import METRICS
from graft.training.machine import versions

STATE, LOCK = "compare.json", ".lock"
POLL = 0.5  # seconds between two looks at the runs
RETRIES = 2  # of a run whose process died, where that may be the cluster's fault


@dataclass(frozen=True)
class Status:
    """How a run is doing: for whoever watches."""

    run: Run
    state: str  # running, finished, failed, pruned
    step: int = 0
    steps: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    note: str = ""


Watch = Callable[[Sequence[Status]], None]


@dataclass(frozen=True)
class Comparison:
    """A comparison's settings with what was decided at its beginning."""

    config: CompareConfig
    splits: Splits
    contenders: list[Contender]
    left_out: dict[str, str]  # contender -> why

    @property
    def folder(self) -> Path:
        return self.config.folder


def prepare_comparison(config: CompareConfig, slots: int = 1, told: Callable[[str], None] | None = None) -> Comparison:
    """Splits, contenders and their sizes; written down the first time, and read again when a comparison goes on.

    Raises :class:`GraftError` where data, methods or model are wrong, or the folder holds another comparison.
    """
    state = config.folder / STATE
    if state.is_file():
        before = json.loads(state.read_text())
        # The output is this folder, however it was written from where the command ran.
        different = [key for key, value in config.model_dump(exclude={"output"}).items() if before["config"].get(key) != value]
        if different:
            raise GraftError(
                f"{config.folder} holds a comparison with {different[0]} = {before['config'].get(different[0])!r}, not "
                f"{getattr(config, different[0])!r}; go on with its own settings, or choose another --output."
            )
        chosen = [Contender(**{**each, "targets": tuple(each["targets"]) if each["targets"] else None}) for each in before["contenders"]]
        return Comparison(config.model_copy(update={"steps": before["steps"]}), prepare(config), chosen, before["left_out"])
    if config.folder.is_dir() and any(config.folder.iterdir()):
        raise GraftError(f"{config.folder} holds other files; choose an empty or new --output.")
    for text in config.methods:
        parse(text)  # what cannot be is refused before anything is written
    general_text(config.general)
    try:
        comparison = _sized(config, slots, told)
    except BaseException:
        shutil.rmtree(config.folder / FOLDER, ignore_errors=True)  # or the next attempt would find the rows of this one
        raise
    _write_state(comparison, config)
    return comparison


def _sized(config: CompareConfig, slots: int, told: Callable[[str], None] | None) -> Comparison:
    """A new comparison, within its budget of parameters or minutes."""
    splits = prepare(config)
    found, left_out = contenders(config, splits.kind), {}
    if config.params is not None:
        model, _ = load(config.model, task="classification" if splits.kind == "labels" else "causal", labels=splits.choices or None)
        limit = int(config.params * sum(p.numel() for p in model.parameters()))
        targets = targets_of(found, model)
        sized = {contender.name: within(contender, limit, targets) for contender in found}
        left_out = {name: f"has no size with at most {limit:,} trainable parameters" for name, contender in sized.items() if contender is None}
        found = [contender for contender in sized.values() if contender is not None]
    comparison = Comparison(config, splits, found, left_out)
    if config.minutes is not None:
        comparison = replace(comparison, config=config.model_copy(update={"steps": steps_for(comparison, estimates(comparison, slots, told), slots)}))
    return comparison


def _write_state(comparison: Comparison, asked: CompareConfig) -> None:
    described = [{**vars(contender), "settings": dict(contender.settings)} for contender in comparison.contenders]
    state = {"config": asked.model_dump(), "steps": comparison.config.steps, "contenders": described, "left_out": comparison.left_out}
    write_folder(comparison.folder, {STATE: to_json(state)})


def estimates(comparison: Comparison, slots: int = 1, told: Callable[[str], None] | None = None) -> dict[str, Estimate | str]:
    """Time and memory of each contender where ``slots`` run at a time, from a few updates of each in a process of its own; the sentence of
    the error where one fails."""
    threads = LocalWorkers(slots).threads
    found: dict[str, Estimate | str] = {}
    for contender in comparison.contenders:
        if told:
            told(contender.name)
        found[contender.name] = estimate(comparison, contender, threads)
    return found


def compare(comparison: Comparison, workers: Workers | None = None, watch: Watch | None = None) -> list[Record]:
    """Does all runs that are missing and returns the records of all; ``results.jsonl`` is written after each.

    A run that fails is reported in its record and stops nobody. Raises :class:`GraftError` where another process is at work in the folder.
    """
    config, folder = comparison.config, comparison.folder
    workers = workers or LocalWorkers()
    pruner = Pruner() if config.prune else None
    by_name = {contender.name: contender for contender in comparison.contenders}
    running: dict[Path, tuple[Run, float]] = {}
    deaths: dict[Path, int] = {}
    began_here: set[Run] = set()
    with _locked(folder):
        results = read_results(folder)
        try:
            while True:
                results = _settled(results, began_here)
                queue = [w for contender in comparison.contenders for w in plan.wanted(contender, config, results)]
                queue = [w for w in queue if folder / RUNS / w.run.folder not in running]
                if not queue and not running:
                    break
                for next_one in queue[: workers.slots - len(running)]:
                    path = folder / RUNS / next_one.run.folder
                    job.write(path, next_one, by_name[next_one.run.contender], config, comparison.splits, workers.threads, workers.slots)
                    if next_one.run not in results:
                        (path / job.RESULT).unlink(missing_ok=True)  # of a failure in an earlier sitting
                    workers.start(path)
                    running[path] = (next_one.run, time.monotonic())
                    began_here.add(next_one.run)
                for path, died in workers.ended(POLL):
                    run, _ = running.pop(path)
                    if died is not None:
                        deaths[path] = deaths.get(path, 0) + 1
                        if workers.retries and deaths[path] <= RETRIES:
                            continue  # wanted still, and it goes on from its checkpoint
                        _note_end(path, "failed", died)
                    results = read_results(folder)
                    _forget_weights(comparison, by_name[run.contender], results)
                    _write_results(comparison, results, workers.slots)
                if pruner is not None:
                    for path, (run, _) in list(running.items()):
                        if not (path / job.RESULT).is_file() and pruner.losing(run, path, by_name[run.contender].baseline):
                            workers.stop(path)
                            del running[path]
                            _note_end(path, "pruned", None)
                            results = read_results(folder)
                if watch:
                    watch(statuses(comparison, results, running))
        finally:
            workers.close()
        _write_results(comparison, read_results(folder), workers.slots)
    return load_records(folder)


def _settled(results: dict[Run, dict[str, Any]], began_here: set[Run]) -> dict[Run, dict[str, Any]]:
    """The results without the failures of earlier sittings: what failed then is tried again, once."""
    return {run: result for run, result in results.items() if result["state"] != "failed" or run in began_here}


def _note_end(path: Path, state: str, error: str | None) -> None:
    """The result of a run that could not write its own."""
    write_folder(path, {job.RESULT: to_json({"state": state, "error": error, "validation": None, "test": None})})


def _forget_weights(comparison: Comparison, contender: Contender, results: Mapping[Run, Mapping[str, Any]]) -> None:
    """Once a contender is complete, the adapters of learning rates that were not chosen are of no use."""
    if contender.trains and not plan.wanted(contender, comparison.config, results):
        rate = plan.chosen_rate(contender.name, comparison.config, results)
        for run in results:
            if run.contender == contender.name and run.lr != rate:
                job.drop_weights(comparison.folder / RUNS / run.folder)


def _write_results(comparison: Comparison, results: Mapping[Run, Mapping[str, Any]], slots: int) -> None:
    config = comparison.config
    chosen = {c.name: plan.chosen_rate(c.name, config, results) if c.trains else None for c in comparison.contenders}
    base = next((result["base"] for result in results.values() if result.get("base")), {"name": config.model, "fingerprint": None})
    common = {"data": facts(comparison.splits), "base": base, "code": job.code_hash(), "versions": versions(), "jobs": slots}
    write_lines(comparison.folder, lines(comparison.folder, comparison.contenders, results, chosen, common, comparison.left_out))


def statuses(comparison: Comparison, results: Mapping[Run, Mapping[str, Any]], running: Mapping[Path, tuple[Run, float]]) -> list[Status]:
    """Every run that has begun, the running ones last."""
    going = {run for run, _ in running.values()}
    found = [Status(run, result["state"], note=result.get("error") or "") for run, result in results.items() if run not in going]
    for path, (run, began) in running.items():
        line = _last_line(path / METRICS)
        steps = comparison.config.steps
        if line is None:
            found.append(Status(run, "running", 0, steps, note="starting"))
            continue
        done = line["step"]
        elapsed = time.monotonic() - began
        note = "evaluating" if done == steps else ""
        found.append(Status(run, "running", done, steps, line["loss"], elapsed / max(done, 1) * (steps - done), note))
    return found


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        texts = file.read().splitlines()
    for text in reversed(texts):
        try:
            found: dict[str, Any] = json.loads(text)
            return found
        except ValueError:
            continue
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second comparison out of the folder; the lock goes with the process that holds it."""
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise GraftError(f"another graft compare is at work in {folder}; wait for it, or choose another --output.") from None
        yield
