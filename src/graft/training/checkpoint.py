"""Checkpoints that resume exactly: adapter, callbacks, optimizer, schedule and random numbers, in safetensors and JSON.

A checkpoint is one folder, written under a temporary name and renamed, so a kill leaves either the whole of it or nothing.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graft.core.adapter import Adapter
from graft.core.errors import GraftError
from graft.core.storage import adapter_config, check_whole, to_json, write_folder

TENSORS, STATE, ADAPTER = "state.safetensors", "state.json", "adapter.json"


def save(
    folder: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, schedule: dict[str, Any], random: list[Any], files: dict[str, bytes]
) -> None:
    """Writes a checkpoint; ``schedule`` are JSON values that come back as they are, ``random`` is the :func:`random_state` of each
    process, ``files`` are written along."""
    check_whole(adapter)
    state = {
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": random,
        "schedule": schedule,
        "order": _order(adapter, optimizer),
    }
    tensors: dict[str, Tensor] = {}
    plain = _split(state, "", tensors)
    write_folder(folder, {TENSORS: tensors, STATE: to_json(plain), ADAPTER: to_json(adapter_config(adapter, "checkpoint")), **files})


def read(folder: Path) -> dict[str, Any]:
    """The state that :func:`save` was given. Raises :class:`GraftError` when it cannot be read."""
    try:
        tensors = load_file(folder / TENSORS)
        plain = json.loads((folder / STATE).read_text("utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise GraftError(f"the checkpoint {folder} cannot be read ({error}); delete it to resume from the one before.") from None
    state: dict[str, Any] = _join(plain, tensors)
    return state


def restore(state: dict[str, Any], adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
    """Puts adapter, callbacks and optimizer back; random numbers come back with :func:`restore_random`."""
    if state["order"] != _order(adapter, optimizer):
        raise GraftError("the checkpoint's optimizer holds other parameters, or in another order, than this run; resume it with its own settings.")
    adapter.load_state_dict(state["adapter"])
    saved = state["optimizer"]
    optimizer.load_state_dict({"state": {int(k): v for k, v in saved["state"].items()}, "param_groups": saved["param_groups"]})


def _order(adapter: Adapter, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters: its state is kept by position, so the positions must mean the same."""
    names = {id(p): f"{target}.{name}" for target, delta in adapter.deltas.items() for name, p in delta.named_parameters()}
    return [names.get(id(p), "?") for group in optimizer.param_groups for p in group["params"]]


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below ``folder``."""
    found = sorted(folder.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    return found[-1] if found else None


def name(step: int) -> str:
    return f"step-{step:07d}"


def keep_newest(folder: Path, count: int) -> None:
    """Deletes all but the newest ``count`` checkpoints, and what killed runs left unfinished."""
    for old in sorted(folder.glob("step-*"))[:-count]:
        shutil.rmtree(old)
    for unfinished in folder.glob(".step-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """The state of all random number generators of this process."""
    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(algorithm), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = {str(i): s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random(saved: dict[str, Any]) -> None:
    """Puts all random number generators of this process back; ``saved`` is its entry of ``state["random"]``."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(list(saved["cuda"].values()))


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value with every tensor moved into ``tensors`` under its path, which stands in its place."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        return {str(key): _split(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"tensor"} and isinstance(value["tensor"], str):
            return tensors[value["tensor"]]
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value
