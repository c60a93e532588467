"""A finished adapter in other forms: a merged model, a plain LoRA, a plain PEFT folder."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.core.adapter import Adapter, MergeReport, build, detach
from graft.core.catalogue import catalogue, compose
from graft.core.delta import lora_factors
from graft.core.errors import GraftError
from graft.core.slot import rounding_loss
from graft.core.storage import CONFIG, exported, peft_config, save_adapter, to_json, write_folder
from graft.core.storage import TENSORS as ADAPTER_TENSORS
from graft.core.target import SLOT

Progress = Callable[[int, int], None]  # (targets done, of how many)


def save_merged(adapter: Adapter, output: str | Path, tokenizer: Any = None) -> MergeReport:
    """Writes a new model with ``W'`` in the place of ``W``, from at least fp32 and rounded once to the base's dtype.

    Returns what rounding lost at each target. Raises :class:`GraftError` when ``output`` exists.
    """
    output, model = Path(output), adapter.model
    _refuse_existing(output)
    state = {name: value for name, value in model.state_dict().items() if f".{SLOT}." not in f".{name}"}
    lost: dict[str, float] = {}
    with torch.no_grad():
        for name, delta in adapter.deltas.items():
            weight, bias = delta.weight()
            base = delta.target.weight()
            rounded = weight.to(base.dtype)
            lost[name] = rounding_loss(base, weight, rounded)
            state[f"{name}.weight"] = delta.target.stored(rounded).contiguous()
            if bias is not None:
                state[f"{name}.bias"] = bias.to(base.dtype)
    config = copy.deepcopy(model.config)
    before = model.config
    tied = [name for name in getattr(model, "_tied_weights_keys", None) or () if name in state]
    inputs = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), None)
    if (
        getattr(config, "tie_word_embeddings", False)
        and inputs is not None
        and any(not torch.equal(state[t], state[f"{inputs}.weight"]) for t in tied)
    ):
        config.tie_word_embeddings = False  # only one of the two was adapted
    with _staged(output) as staging:
        model.config = config
        try:
            model.save_pretrained(
                staging, state_dict={name: value.clone() for name, value in state.items()} if not config.tie_word_embeddings else state
            )
        finally:
            model.config = before
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    return MergeReport(lost)


@dataclass(frozen=True)
class LoRAReport:
    """The common rank, and the relative error ``||dW - B A|| / ||dW||`` at each target."""

    rank: int
    errors: dict[str, float]


def save_as_lora(
    adapter: Adapter, output: str | Path, *, rank: int | None = None, tolerance: float = 0.0, progress: Progress | None = None
) -> LoRAReport:
    """Writes the adapter as a plain LoRA in the form that every reader understands: one rank, scale 1, no patterns.

    Without ``rank`` each target takes the smallest rank whose error is within ``tolerance``, and the largest of them is used.
    Raises :class:`GraftError` where the adapter changes what a LoRA cannot (a bias, a norm).
    """
    output = Path(output)
    _refuse_existing(output)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    targets = [name for name in adapter.deltas if name not in adapter.whole_targets]
    for done, name in enumerate(targets, 1):
        delta = adapter.deltas[name]
        if delta.target.kind == "norm":
            raise GraftError(f"{adapter.method} trains {name}, a norm, which a LoRA cannot hold; use --to merged.")
        with torch.no_grad():
            bias = delta.weight()[1]
        if bias is not None and delta.target.bias is not None and not torch.equal(bias.to(delta.target.bias.dtype), delta.target.bias):
            raise GraftError(f"{adapter.method} changes the bias of {name}, which a LoRA cannot hold; use --to merged.")
        B, A, errors[name] = lora_factors(delta, rank, tolerance)
        factors[name] = (B, A)
        if progress:
            progress(done, len(targets))
    common = max(len(A) for _, A in factors.values())
    config = catalogue["lora"].delta.parse({"rank": common, "alpha": float(common)})
    layouts = {name: {"rank": common, "scale": 1.0, "frozen": 0, "inactive": []} for name in targets}
    for name in targets:
        if common > min(adapter.deltas[name].target.shape):
            raise GraftError(f"rank {common} does not fit into {name}; pass --rank or --tolerance, and read the error that it reports.")
    twin = build(
        adapter.model,
        f"{adapter.name}-as-lora",
        compose(config, []),
        [adapter.deltas[n].target for n in targets],
        layouts,
        adapter.modules_to_save,
        adapter.seed,
    )
    try:
        with torch.no_grad():
            for name, (B, A) in factors.items():
                new = dict(twin.deltas[name].named_parameters())
                new["A"].zero_()[: len(A)] = A
                new["B"].zero_()[:, : B.shape[1]] = B
            for name in adapter.whole_targets:
                for key, value in twin.deltas[name].tensors().items():
                    value.copy_(adapter.deltas[name].tensors()[key])
        twin.step = adapter.step
        save_adapter(twin, output)
    finally:
        detach(adapter.model, twin.name)
    return LoRAReport(common, errors)


def save_as_peft(adapter: Adapter, output: str | Path) -> None:
    """Writes the adapter with PEFT's own keys alone; raises :class:`GraftError` where PEFT does not have the method."""
    output = Path(output)
    _refuse_existing(output)
    config = peft_config(adapter)
    if not config:
        raise GraftError(f"PEFT does not have {adapter.method} with these settings; use --to lora, which reports its error, or --to merged.")
    tensors = {name: value.detach().cpu() for name, value in exported(adapter).items()}
    write_folder(output, {ADAPTER_TENSORS: tensors, CONFIG: to_json(config)})


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise GraftError(f"{output} exists already; choose another --output.")


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name at the end, so that a half-written one is never seen."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield staging
        os.chmod(staging, 0o755)
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
