"""One fine-tuning run: data to adapter, on ``transformers.Trainer``, killed and resumed without a trace.

The method acts through the optimizer's step hooks, so the trainer is the usual one; only its checkpoints are replaced, by ones
that hold an adapter instead of a model, never pickle, and everything that an exact resume needs.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from graft.core.adapter import Adapter, attach
from graft.core.catalogue import catalogue
from graft.core.errors import GraftError
from graft.core.storage import base_fingerprint, rebuild, to_json, write_folder
from graft.core.target import find_targets
from graft.data.batching import BucketedOrder, DataOrder, packing_collator, packs, real_tokens
from graft.data.encoding import IGNORED, Encoded, collator, encode
from graft.data.reading import Table, read
from graft.kernels.plan import use_rates
from graft.models import check_max_length, load
from graft.training import checkpoint, distributed
from graft.training.config import FitConfig
from graft.training.fuse import Fused, fuse
from graft.training.machine import machine, versions
from graft.training.memory import keep_freed, peak
from graft.training.rates import use_measured

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN, METRICS, CHECKPOINTS = "run.json", "metrics.jsonl", "checkpoints"
Progress = Callable[[int, int, dict[str, Any]], None]  # (updates done, of how many, the last line of metrics.jsonl)
Look = Callable[[Adapter, "PreTrainedTokenizerBase", int], None]  # (the adapter on its model, the tokenizer, updates done)


def fit(config: FitConfig, *, resume: bool = False, progress: Progress | None = None, look: Look | None = None) -> dict[str, Any]:
    """Fine-tunes as ``config`` says and returns what ``run.json`` holds.

    Writes into ``config.output``: the adapter, ``run.json``, ``metrics.jsonl`` (a line an update) and checkpoints on the way. With
    ``resume`` the run goes on from its newest checkpoint and ends with the same weights as one that was never stopped. ``look`` is called
    after every update, outside the measured time; it may run the model, and changes nothing.
    Raises :class:`GraftError` for anything wrong with data, method or folder, before anything is written.
    """
    began = time.perf_counter()
    if distributed.start():
        config = config.model_copy(update={"shard": True})
    folder, first = config.folder, distributed.rank() == 0
    with distributed.together():
        method = catalogue[config.method]
        method.recipe(**config.settings)
        before = _run_before(folder, config, resume)
        start = checkpoint.latest(folder / CHECKPOINTS) if before else None
        torch.manual_seed(config.seed)
        table = read(config.data)
        check_max_length(config.model, config.max_length)
        model, tokenizer = load(
            config.model, dtype=config.dtype, task=_task(table), labels=table.labels if table.kind == "labels" else None, seed=config.seed
        )
        encoded = encode(table, tokenizer, config.max_length, table.labels)
        collate = collator(tokenizer.pad_token_id)
        if start is None:
            adapter = _attach(config, model, encoded, collate, table)
        else:
            adapter = rebuild(model, json.loads((start / checkpoint.ADAPTER).read_text()), "default", start)
        optimizer = adapter.optimizer(config.lr, config.steps, config.weight_decay)
        if getattr(optimizer, "per_layer", False):
            if config.max_grad_norm or config.accumulation > 1:
                raise GraftError(
                    "per_layer updates each weight in the backward pass, so it excludes clipping and accumulation; set max_grad_norm: 0 in --config."
                )
            if distributed.world_size() > 1:
                raise GraftError("per_layer updates each weight before the processes can average its gradient; leave it out, or start one process.")
        if config.shard:
            distributed.check_shardable(adapter)
        pack = config.pack is not False and table.kind != "labels" and packs(model)
        if config.pack and not pack:
            raise GraftError(f"{config.model} cannot tell examples that share a row apart, so their losses would be wrong; leave pack out.")
        fused = fuse(model) if config.fuse else None
        dtype, device = getattr(torch, config.dtype), "cpu" if distributed.on_cpu() else "cuda"
        rates = use_measured(dtype, device, before.get("rates"))
        keep_freed()
    rates = distributed.gather(rates)[0]
    use_rates(rates, dtype, device)  # the same on every process
    if config.shard:
        distributed.shard(model, adapter)
    record = _Recorder(folder / METRICS, progress, partial(look, adapter, tokenizer) if look else None)
    trainer = GraftTrainer(
        model=model, args=_arguments(config), train_dataset=encoded, optimizers=(optimizer, None), callbacks=[record] if first else [],
        data_collator=packing_collator(tokenizer.pad_token_id) if pack else collate,
        compute_loss_func=_mean_over_rows if table.kind == "labels" else None,
    )  # fmt: skip
    trainer.adapter, trainer.config, trainer.fused = adapter, config, fused
    trainer.remove_callback(transformers.PrinterCallback)
    distributed.synchronise(adapter)
    with distributed.together():
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            began_with = {"processes": distributed.world_size(), "rates": rates.values if rates else None}
            write_folder(folder, {RUN: to_json({"config": config.model_dump(), **began_with, "state": "running"})})
    torch.manual_seed(config.seed + distributed.rank())  # dropout differs between processes, and nothing else is drawn from here
    setup = time.perf_counter() - began
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")  # the bound hooks hide the first call
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    model.eval()
    distributed.check_equal(adapter)
    tokens, memory = zip(*distributed.gather((trainer.tokens, peak())), strict=True)
    run: dict[str, Any] = {}
    with distributed.together():
        if first:
            here = sum(record.seconds[record.before :])
            speed = {"tokens_per_second": sum(tokens) / here if here else None, "peak_memory_bytes": max(memory)}
            speed |= {"seconds": setup + sum(record.seconds), "packed": pack, "fused": dict(fused.parts) if fused else {}}
            run = _finish(config, adapter, table, encoded, record, speed)
    result: dict[str, Any] = distributed.gather(run)[0]
    return result


def _finish(config: FitConfig, adapter: Adapter, table: Table, encoded: Encoded, record: _Recorder, speed: dict[str, Any]) -> dict[str, Any]:
    """Writes the adapter and ``run.json``, and clears the checkpoints away; returns what ``run.json`` holds."""
    folder = config.folder
    adapter.save(folder)
    run = {
        "state": "finished",
        "config": config.model_dump(),
        "processes": distributed.world_size(),
        "method": adapter.method,
        "trainable_parameters": adapter.parameter_count,
        "rows": len(table),
        "rows_shortened": encoded.shortened,
        "loss": record.last["loss"],
        "step_seconds": statistics.median(record.seconds) if record.seconds else None,  # none: resumed after the last, without its metrics
        **speed,
        "adapter_bytes": sum((folder / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json")),
        "base": {"name": config.model, "fingerprint": base_fingerprint(adapter)},
        "versions": versions(),
        "machine": machine(),
    }
    write_folder(folder, {RUN: to_json(run)})
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return run


def _attach(config: FitConfig, model: nn.Module, encoded: Encoded, collate: Any, table: Table) -> Adapter:
    """The adapter of a fresh run, calibrated on the first rows in training order where the method asks for it."""
    order = list(DataOrder(len(encoded), config.seed))
    rows = config.calibration_batches * config.batch_size * distributed.world_size()  # those of one process with the same global batch
    batches = [
        collate([encoded[i] for i in order[start : start + config.batch_size]]) for start in range(0, min(len(order), rows), config.batch_size)
    ]
    heads = _new_head(model, config) if table.kind == "labels" else []
    return attach(model, config.method, targets=config.targets, seed=config.seed, calibration=batches, modules_to_save=heads, **config.settings)


def _new_head(model: nn.Module, config: FitConfig) -> list[str]:
    """The name of the classification head, unless it is among the method's targets anyway."""
    method = catalogue[config.method]
    heads = [name for name in ("classifier", "score") if hasattr(model, name)]
    if not heads:
        raise GraftError(
            f"no classification head is known in {type(model).__name__} (classifier or score), so it would stay untrained; choose another model."
        )
    adapted = {target.name for target in find_targets(model, config.targets or method.default_targets, method.delta.kinds)}
    return [name for name in heads if not any(f"{target}.".startswith(f"{name}.") for target in adapted)]


def _task(table: Table) -> Any:
    return "classification" if table.kind == "labels" else "causal"


def _run_before(folder: Path, config: FitConfig, resume: bool) -> dict[str, Any]:
    """What ``run.json`` says of the run to go on with; empty where there is none. Refuses to write over another run."""
    if not (folder / RUN).is_file():
        return {}
    before: dict[str, Any] = json.loads((folder / RUN).read_text())
    if not resume:
        raise GraftError(f"{folder} holds a run already; pass --resume to go on with it, or another --output.")
    if before["state"] == "finished":
        raise GraftError(f"the run in {folder} is finished; choose another --output for a new one.")
    if before.get("processes", 1) != distributed.world_size():
        raise GraftError(
            f"{folder} holds a run of {before.get('processes', 1)} processes, and there are {distributed.world_size()} now; resume it with as many."
        )
    # The output is this folder, however it was written from where the command ran.
    different = [key for key, value in config.model_dump(exclude={"output"}).items() if before["config"].get(key) != value]
    if different:
        key = different[0]
        raise GraftError(
            f"{folder} holds a run with {key} = {before['config'].get(key)!r}, not {getattr(config, key)!r}; resume it with its own settings."
        )
    return before


def _arguments(config: FitConfig) -> transformers.TrainingArguments:
    every = config.checkpoint_every or max(1, config.steps // 10)
    arguments = transformers.TrainingArguments(
        output_dir=str(config.folder / CHECKPOINTS), max_steps=config.steps, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation, learning_rate=config.lr, lr_scheduler_type=config.schedule,
        warmup_steps=round(config.warmup * config.steps), max_grad_norm=config.max_grad_norm, seed=config.seed, data_seed=config.seed,
        save_strategy="steps", save_steps=every, logging_steps=1, report_to=[], disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=not distributed.on_cpu(), use_cpu=distributed.on_cpu(),
        ddp_backend="gloo" if distributed.on_cpu() and distributed.world_size() > 1 else None,
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process has one device: no DataParallel over all that it sees
    return arguments


def _mean_over_rows(output: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """The loss of a classifier, over all rows of an update; the models' own is a mean over each forward pass, whatever its share of them."""
    return nn.functional.cross_entropy(output.logits.float(), labels, reduction="sum") / num_items_in_batch


class GraftTrainer(transformers.Trainer):
    """The usual trainer, with our data order and checkpoints."""

    adapter: Adapter
    config: FitConfig
    fused: Fused | None = None
    tokens: int = 0  # real tokens, without padding, since this process began

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Rows of one update sorted into batches of similar length, which changes nothing but the padding; with ``bucket``, rows of many."""
        lengths = [len(example["input_ids"]) for example in self.train_dataset.examples]
        pool = None if self.config.bucket else self.config.accumulation
        return BucketedOrder(lengths, self.config.batch_size * distributed.world_size(), self.config.seed, pool)

    def get_train_dataloader(self) -> DataLoader[Any]:
        if distributed.world_size() == 1:
            return super().get_train_dataloader()
        order, arguments = self._get_train_sampler(), self.args
        return distributed.loader(
            self.train_dataset, order, arguments.per_device_train_batch_size, self.data_collator, arguments.dataloader_pin_memory
        )

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """No DistributedDataParallel: gradients are averaged below, in ``training_step`` (see ``training/distributed.py``)."""
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, where a run that was stopped after its last update goes on: the loop looks at the number of updates only after one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.tokens += int(real_tokens(inputs).sum())
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            distributed.average_gradients(self.adapter.parameters())
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, with logits only at positions that some row has a label for: most of a prompt has none.

        A fused model does that itself, and better: see ``training/fuse.py``.
        """
        labels = inputs["labels"]
        fused = self.fused is not None and self.fused.parts["loss"]
        if not fused and labels.ndim == 2 and self.model_accepts_loss_kwargs and "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            following = labels[:, 1:]
            wanted = torch.nonzero((following != IGNORED).any(0)).flatten()
            inputs = {**inputs, "logits_to_keep": wanted, "shift_labels": following[:, wanted]}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.config.folder / CHECKPOINTS / checkpoint.name(self.state.global_step)
        progress = {TRAINER_STATE_NAME: to_json(dataclasses.asdict(self.state))}
        random = distributed.gather(checkpoint.random_state())
        distributed.check_equal(self.adapter)
        with distributed.together():
            if distributed.rank() == 0:
                checkpoint.save(folder, self.adapter, self.optimizer.optimizer, self.lr_scheduler.state_dict(), random, progress)
                checkpoint.keep_newest(folder.parent, 2)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The adapter comes back together with the optimizer, in the next method."""

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        state = checkpoint.read(Path(checkpoint_folder))
        checkpoint.restore(state, self.adapter, self.optimizer.optimizer)
        self.lr_scheduler.load_state_dict(state["schedule"])

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.restore_random(checkpoint.read(Path(checkpoint_folder))["random"][distributed.rank()])


class _Recorder(TrainerCallback):
    """Writes a line of metrics an update, and tells whoever watches."""

    def __init__(self, path: Path, progress: Progress | None, look: Callable[[int], None] | None = None):
        self.path, self.progress, self.look = path, progress, look
        self.seconds: list[float] = []  # of all updates, those before a resume too
        self.before = 0  # how many updates were made before the resume
        self.last: dict[str, Any] = {"loss": None}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _step(line) <= state.global_step] if state.global_step else []
        self.path.write_text("".join(f"{line}\n" for line in kept))
        self.seconds, self.before = [json.loads(line)["seconds"] for line in kept], len(kept)
        if kept:
            self.last = json.loads(kept[-1])

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.last = {
            "step": state.global_step, "loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs.get("grad_norm"),
            "seconds": round(self.seconds[-1], 4),
        }  # fmt: skip
        with self.path.open("a") as file:
            file.write(json.dumps(self.last) + "\n")
        if self.progress:
            self.progress(state.global_step, state.max_steps, self.last)
        if self.look:
            self.look(state.global_step)


def _step(line: str) -> int:
    """The update that a line of metrics tells of; a line that a kill cut short counts as never written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return sys.maxsize
