"""One run of a comparison in a process of its own: train, choose by validation rows, and, with the chosen learning rate, the test rows.

The folder of a run holds ``job.json`` (all that it needs), what :func:`graft.training.fit.fit` writes, ``rungs.jsonl`` (validation on the
way), ``predictions.jsonl`` (a line a test row) and, at the end, ``result.json``. A run that is started again goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
import traceback
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from graft.compare.config import CompareConfig
from graft.compare.contenders import Contender
from graft.compare.forgetting import forgetting
from graft.compare.json_lines import read_lines, to_lines
from graft.compare.plan import Wanted
from graft.compare.splits import Splits, facts
from graft.core.adapter import Adapter
from graft.core.errors import GraftError
from graft.core.hashing import fingerprint
from graft.core.storage import CONFIG, TENSORS, to_json, write_folder
from graft.core.target import SLOT
from graft.data.encoding import answer_text, encode, encode_prompt, tokens
from graft.data.reading import Row, Table, read
from graft.models import load, load_with_adapter
from graft.training.config import FitConfig
from graft.training.evaluate import Evaluation, evaluate, mean_losses
from graft.training.fit import CHECKPOINTS, RUN, fit
from graft.training.memory import peak

JOB, RESULT, RUNGS, PREDICTIONS, ERROR = "job.json", "result.json", "rungs.jsonl", "predictions.jsonl", "error.txt"
RUNG_SHARES = (0.25, 0.5)  # of the updates, where a pruned comparison looks at the validation rows


def write(folder: Path, wanted: Wanted, contender: Contender, config: CompareConfig, splits: Splits, threads: int, jobs: int) -> None:
    """Writes ``job.json`` into the folder of a run that is one of ``jobs`` at a time."""
    run = wanted.run
    training = {
        "data": str(splits.path("train")), "model": config.model, "output": str(folder), "method": contender.method,
        "settings": dict(contender.settings), "targets": list(contender.targets) if contender.targets else None, "steps": config.steps,
        "batch_size": config.batch_size, "accumulation": config.accumulation, "max_length": config.max_length, "lr": run.lr,
        "dtype": config.dtype, "seed": run.seed, "checkpoint_every": max(1, math.ceil(config.steps / 2)),
    }  # fmt: skip
    job = {
        "contender": contender.name, "lr": run.lr, "seed": run.seed, "test": wanted.test, "threads": threads, "jobs": jobs,
        "fit": training if contender.trains else None, "shots": contender.shots, "model": config.model, "dtype": config.dtype,
        "max_length": config.max_length, "match": config.match, "data": {"folder": splits.folder, "choices": splits.choices, **facts(splits)},
        "general": config.general, "rungs": [math.ceil(share * config.steps) for share in RUNG_SHARES] if config.prune else [],
    }  # fmt: skip
    write_folder(folder, {JOB: to_json(job)})


def run_job(folder: str | Path) -> None:
    """Does the run in ``folder`` and writes ``result.json``, whatever happens: an error becomes its state and sentence."""
    folder = Path(folder)
    job = json.loads((folder / JOB).read_text())
    torch.set_num_threads(job["threads"])
    try:
        result = _train_and_evaluate(folder, job)
    except Exception as error:
        (folder / ERROR).write_text(traceback.format_exc())
        said = str(error) if isinstance(error, GraftError) else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        result = {"state": "failed", "error": said, "validation": None, "test": None}
    write_folder(folder, {RESULT: to_json({**result, "code": code_hash(), "jobs": job["jobs"]})})


@cache
def code_hash() -> str:
    """A hash of Graft's own source files: two results with the same one were computed and judged by the same code."""
    digest = hashlib.sha256()
    root = Path(str(files("graft")))
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _train_and_evaluate(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    before = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else {}
    tables = {name: read(Path(job["data"]["folder"]) / f"{name}.jsonl", kind=job["data"]["kind"]) for name in ("validation", "test")}
    result: dict[str, Any] = {"state": "finished", "error": None, "test": None, "forgetting": None}
    adapter: Adapter | None = None
    if job["fit"]:
        result |= _trained(folder, job, tables["validation"])
        adapter, tokenizer = load_with_adapter(folder, job["model"], dtype=job["dtype"])
        model = adapter.model
        result["ranks"] = ranks(adapter)
    else:
        task, labels = ("classification", job["data"]["choices"]) if job["data"]["kind"] == "labels" else ("causal", None)
        model, tokenizer = load(job["model"], dtype=job["dtype"], task=task, labels=labels, seed=job["seed"])  # type: ignore[arg-type]
        result |= {"trainable_parameters": 0, "adapter_bytes": 0, "step_seconds": None, "seconds": 0.0, "peak_memory_bytes": peak(), "ranks": None}
    whole = adapter is None or adapter.recipe.delta.keeps_base
    result["base"] = {"name": job["model"], "fingerprint": fingerprint(model.base_model) if whole else None}
    result["base_parameters"] = sum(p.numel() for name, p in model.named_parameters() if f".{SLOT}." not in f".{name}")
    if job["shots"]:
        train = read(Path(job["data"]["folder"]) / "train.jsonl", kind="answers")
        room = _room(model, job) - job["max_length"] // 2  # of which answers take the rest
        tables = {name: with_examples(table, train, job["shots"], job["seed"], tokenizer, room) for name, table in tables.items()}
    began = time.perf_counter()
    asked = before.get("validation") or _score(model, tokenizer, tables["validation"], job, generate=False).metrics
    result["validation"] = asked
    if job["test"]:
        evaluation = _score(model, tokenizer, tables["test"], job, generate=True)
        result |= {"test": evaluation.metrics, "rule": evaluation.rule, "forgetting": forgetting(model, tokenizer, adapter, job["general"])}
        write_predictions(folder / PREDICTIONS, tables["test"], evaluation)
    result["seconds_scoring"] = time.perf_counter() - began
    return result


def _trained(folder: Path, job: Mapping[str, Any], validation: Table) -> dict[str, Any]:
    """The figures of the training, done now or before this process began."""
    config = FitConfig.make(job["fit"])
    state = json.loads((folder / RUN).read_text())["state"] if (folder / RUN).is_file() else None
    if state == "finished":
        run = json.loads((folder / RUN).read_text())
    else:

        def look(adapter: Adapter, tokenizer: Any, step: int) -> None:
            if step in job["rungs"]:
                _climb(folder, step, _score(adapter.model, tokenizer, validation, job, generate=False))

        run = fit(config, resume=state is not None, look=look if job["rungs"] else None)
    kept = ("method", "trainable_parameters", "adapter_bytes", "peak_memory_bytes", "step_seconds", "seconds", "tokens_per_second", "loss",
            "rows_shortened", "versions", "machine")  # fmt: skip
    return {key: run[key] for key in kept}


def _room(model: Any, job: Mapping[str, Any]) -> int:
    """Tokens a row at most, its examples included."""
    wanted = job["max_length"] * (1 + job["shots"])
    return min(wanted, getattr(model.config, "max_position_embeddings", None) or wanted)


def _climb(folder: Path, step: int, evaluation: Evaluation) -> None:
    """Notes what the validation rows said at a rung, once."""
    path = folder / RUNGS
    if step not in [rung["step"] for rung in read_lines(path, growing=True)]:
        with path.open("ab") as file:
            file.write(to_lines([{"step": step, "metrics": evaluation.metrics, "losses": evaluation.losses}]))


def _score(model: Any, tokenizer: Any, table: Table, job: Mapping[str, Any], generate: bool) -> Evaluation:
    """The model on a table; without ``generate`` what would have to be written is only weighed, by its loss."""
    data, room = job["data"], _room(model, job)
    if data["kind"] == "answers" and not data["choices"]:
        if not generate:
            losses = mean_losses(model, tokenizer, encode(table, tokenizer, room))
            return Evaluation({"loss": sum(losses) / len(losses), "rows": len(losses)}, "mean loss of the answers", [], losses=losses)
        train = read(Path(data["folder"]) / "train.jsonl", kind="answers")
        longest = max(len(tokens(tokenizer, answer_text(tokenizer, "x", row["answer"]))) for row in train.rows)
        longest = min(longest, job["max_length"] // 2)
        return evaluate(model, tokenizer, table, max_length=room, choices=train.labels, match=job["match"], new_tokens=longest)
    return evaluate(model, tokenizer, table, max_length=room, choices=data["choices"] or None)


def with_examples(table: Table, train: Table, shots: int, seed: int, tokenizer: Any, room: int) -> Table:
    """The rows with ``shots`` train rows, drawn from ``seed``, and their answers before the prompt; with fewer where ``room`` tokens end."""
    chosen = random.Random(seed).sample(train.rows, min(shots, len(train)))
    examples = [f"{row['prompt'].rstrip()}\n{row['answer']}\n\n" for row in chosen]

    def prompt(row: Row) -> str:
        whole = ("".join(examples[:count]) + row["prompt"] for count in range(len(examples), 0, -1))
        return next((text for text in whole if not encode_prompt(tokenizer, text, room)[1]), row["prompt"])

    return Table([Row({**row.values, "prompt": prompt(row)}, row.where) for row in table.rows], table.kind, table.path)


def ranks(adapter: Adapter) -> dict[str, int] | None:
    """The rank at every target where a method moved them; None where all are the same or there is none."""
    found = {
        name: delta.layout["rank"] - len(delta.layout.get("inactive", ()))
        for name, delta in adapter.deltas.items()
        if isinstance(delta.layout.get("rank"), int)
    }
    return found if len(set(found.values())) > 1 else None


def write_predictions(path: Path, table: Table, evaluation: Evaluation) -> None:
    """A line a test row: what was asked and right, what was said, and the loss of the right answer."""
    column = {"answers": "answer", "labels": "label"}.get(table.kind)
    lines = []
    for index, loss in enumerate(evaluation.losses):
        line: dict[str, Any] = {"row": index, "loss": round(loss, 6)}
        if column:
            line |= {"right": table.rows[index][column], "said": evaluation.predictions[index], "correct": evaluation.correct[index]}
        lines.append(line)
    write_folder(path.parent, {path.name: to_lines(lines)})


def drop_weights(folder: Path) -> None:
    """Deletes the adapter and checkpoints of a run whose learning rate was not chosen; figures and curves stay."""
    for name in (TENSORS, CONFIG):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
