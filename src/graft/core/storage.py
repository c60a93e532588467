"""Adapters as files: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``. Never pickle.

Where PEFT knows the method, both files are PEFT's; the config has one key more, ``graft``: the method's parts, the layout of
every delta (ranks and effective scales as they are, never recomputed), a hash of the tensors and the fingerprint of the base.
Everything is checked before the model is touched, and a failed load leaves it as it was.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graft.core.adapter import Adapter, build, detach
from graft.core.catalogue import Recipe, catalogue, compose
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.errors import GraftError, nearest
from graft.core.hashing import content_hash, fingerprint, is_sharded, is_whole
from graft.core.peft import PeftFormat
from graft.core.target import Target, all_targets, kind_of

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, SHARED = "base_model.model.", "base_model."
FORMAT = 1
MAX_CONFIG_BYTES = 64 << 20

# Keys of PEFT's config that say nothing about the adapted function.
_PEFT_COMMON = (
    "peft_type", "base_model_name_or_path", "task_type", "inference_mode", "target_modules", "modules_to_save", "fan_in_fan_out", "bias",
    "peft_version", "revision", "auto_mapping", "exclude_modules", "layers_to_transform", "layers_pattern", "init_weights",
    "init_lora_weights", "lora_dropout", "megatron_config", "megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "lora_bias", "ensure_weight_tying", "qalora_group_size", "r",
)  # fmt: skip
# Options of PEFT's that change the function in ways that Graft does not have; its files name them all, switched off.
_PEFT_OFF = (
    "trainable_token_indices", "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication",
    "target_parameters", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip
_GRAFT_KEYS = ("format", "version", "method", "parts", "seed", "step", "targets", "modules_to_save", "base", "content")


# ---- writing -----------------------------------------------------------------------------------------------------------


def write_folder(path: Path, files: Mapping[str, bytes | Mapping[str, Tensor]]) -> None:
    """Writes files so that a reader sees all of the old or all of the new: under temporary names first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        for name, content in files.items():
            if isinstance(content, bytes):
                (staging / name).write_bytes(content)
            else:
                save_file({key: value.contiguous() for key, value in content.items()}, staging / name, metadata={"format": "pt"})
            with open(staging / name, "rb") as handle:
                os.fsync(handle.fileno())
            os.chmod(staging / name, 0o644)
        os.chmod(staging, 0o755)
        if path.exists():
            for name in files:
                os.replace(staging / name, path / name)
        else:
            os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def to_json(value: Any) -> bytes:
    """JSON as every file of Graft has it."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def exported(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the adapter's file, by their names there; what two targets share (tied weights) is there once."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for delta in adapter.deltas.values():
        for key, value in delta.exported().items():
            place = (value.data_ptr(), value.shape)
            if place not in seen or not value.numel():
                tensors[_file_key(adapter.recipe.delta.peft_format(), delta, key)] = value
            seen.add(place)
    if adapter.shared is not None:
        tensors |= {f"{SHARED}{key}": value for key, value in adapter.shared.state_dict().items()}
    return tensors


def _file_key(peft: PeftFormat | None, delta: Delta, key: str) -> str:
    return f"{PREFIX}{delta.target.name}.{delta.file_key(key, peft)}"


def check_whole(adapter: Adapter) -> None:
    """Raises :class:`GraftError` where a tensor is not what the adapter was built with: sharded, emptied or moved away by whoever wrapped the model.

    Such a file would look like an adapter and hold a part of one, or nothing.
    """
    for name, value in adapter.tensors().items():
        built = adapter.shapes.get(name, value.shape)
        if is_sharded(value):
            seen = "is sharded over processes"
        elif value.is_meta:
            seen = "holds no values (device meta)"
        elif value.shape != built:
            seen = f"has shape {list(value.shape)} instead of {list(built)}"
        else:
            continue
        raise GraftError(
            f"{name} of adapter {adapter.name!r} {seen}, so nothing was saved; leave the adapter out of sharding and offloading "
            "(fully_shard(..., ignored_params=set(adapter.parameters()))), or gather it first."
        )


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity; None where all are finite."""
    floating = {name: value for name, value in tensors.items() if value.is_floating_point() and value.numel()}
    if torch.isfinite(torch.nn.utils.get_total_norm(list(floating.values()), math.inf)):  # a few calls instead of two for each tensor
        return None
    return next(name for name, value in floating.items() if not torch.isfinite(value).all())


def save_adapter(adapter: Adapter, path: str | Path) -> Path:
    """Writes the adapter to the folder ``path``, atomically; other files in the folder stay.

    Raises :class:`GraftError` when a value is not finite, a tensor is not whole or ``path`` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise GraftError(f"{path} is a file; give a folder to save the adapter in.")
    check_whole(adapter)
    for callback in adapter.callbacks:
        callback.on_export()
    tensors = {name: value.detach().cpu() for name, value in exported(adapter).items()}
    if (broken := not_finite(tensors)) is not None:
        raise GraftError(f"adapter {adapter.name!r} holds a value that is not finite in {broken}; training diverged, so nothing was saved.")
    write_folder(path, {TENSORS: tensors, CONFIG: to_json(adapter_config(adapter, content_hash(tensors)))})
    return path


def adapter_config(adapter: Adapter, content: str) -> dict[str, Any]:
    """The JSON of the adapter: PEFT's keys where PEFT has the method, and ours under ``graft``."""
    model = adapter.model
    heads = adapter.modules_to_save
    config = getattr(model, "config", None)
    base = {
        "name": getattr(config, "_name_or_path", None) or None,
        "class": _class_name(model),
        "fingerprint": base_fingerprint(adapter),
    }
    if "SequenceClassification" in _class_name(model) and config is not None:
        base["labels"] = [config.id2label[index] for index in range(config.num_labels)]
    ours = {
        "format": FORMAT,
        "version": version("graft"),
        "method": adapter.method,
        "parts": {type(part).__name__: part.settings() for part in adapter.recipe.parts},
        "seed": adapter.seed,
        "step": adapter.step,
        "targets": {
            name: {"kind": adapter.deltas[name].target.kind, "shape": list(adapter.deltas[name].target.shape), **layout}
            for name, layout in adapter.layouts.items()
        },
        "modules_to_save": list(heads),
        "base": base,
        "content": content,
    }
    return {**peft_config(adapter), "graft": ours}


def base_fingerprint(adapter: Adapter) -> str:
    """The fingerprint of the base that the adapter was attached to; raises :class:`GraftError` where the base was written to since."""
    known = adapter.fingerprint
    if known is not None and not (adapter.recipe.delta.keeps_base and is_whole(adapter.model)):
        return known
    present = fingerprint(adapter.model, adapter.modules_to_save)
    if known not in (None, present):
        raise GraftError(
            f"the base model's weights changed since adapter {adapter.name!r} was attached, so it fits neither that base nor a file of this one; "
            "leave the base out of your optimizer, or set adapter.fingerprint = None to save the adapter for the base as it is now."
        )
    return present


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The config that PEFT reads; empty where PEFT does not have the method."""
    delta = adapter.recipe.delta
    peft = delta.peft_format()
    if peft is None:
        return {}
    deltas = [d for name, d in adapter.deltas.items() if name not in adapter.whole_targets]
    task = _TASKS.get(_class_name(adapter.model).partition("For")[2])
    if task == "SEQ_CLS" and not adapter.modules_to_save:
        task = None  # with this task PEFT takes every head to be in the file
    return {
        "peft_type": peft.type,
        "base_model_name_or_path": getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None,
        "task_type": task,
        "inference_mode": True,
        "target_modules": _target_modules(adapter.model, [d.target.name for d in deltas]),
        "modules_to_save": list(adapter.modules_to_save) or None,
        "fan_in_fan_out": any(d.target.kind == "conv1d" for d in deltas),
        **delta.to_peft(adapter),
    }


def _class_name(model: nn.Module) -> str:
    """The name of the model's class; FSDP2 puts a subclass in its place."""
    return type(model).__name__.removeprefix("FSDP")


_TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names where they mean exactly these modules in the model, else the names in full."""
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    meant = {name for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in leaves and kind_of(module)}
    return sorted(leaves) if meant == set(names) else sorted(names)


# ---- reading -----------------------------------------------------------------------------------------------------------


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of an adapter folder, with its keys checked.

    Raises :class:`GraftError` where the folder is not an adapter, holds pickle files, or a key is unknown.
    """
    path = Path(path)
    if not path.is_dir():
        raise GraftError(f"{path} is not a folder; an adapter is a folder with {TENSORS} and {CONFIG}.")
    if not (path / TENSORS).is_file():
        pickled = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickled:
            raise GraftError(
                f"{path} holds {pickled[0]}, a pickle file that could run code; Graft reads {TENSORS} only, so convert it where it was made."
            )
        raise GraftError(f"{path} has no {TENSORS}; is it the folder that save() wrote?")
    file = path / CONFIG
    if not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
        raise GraftError(f"{path} has no readable {CONFIG}; is it the folder that save() wrote?")
    try:
        config = json.loads(file.read_text("utf-8"), parse_constant=_no_constant)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise GraftError(f"{file} is not valid JSON ({error}); save the adapter again.") from None
    if not isinstance(config, dict) or not ("graft" in config or "peft_type" in config):
        raise GraftError(f"{file} has neither a 'graft' nor a 'peft_type' key, so it does not describe an adapter.")
    ours = config.get("graft")
    if ours is not None:
        _check_keys(file, ours, _GRAFT_KEYS, required=True)
        if ours["format"] != FORMAT:
            raise GraftError(f"{file} has format {ours['format']!r}, and this version of Graft reads {FORMAT}; update Graft.")
    known = {key for row in catalogue if row.delta.peft for key in row.delta.peft.known}
    _check_keys(file, config, ("graft", *_PEFT_COMMON, *_PEFT_OFF, *known))
    for key in _PEFT_OFF:
        if config.get(key):
            raise GraftError(f"{file} sets PEFT's option {key!r} to {config[key]!r}, which Graft does not have; export it from PEFT without.")
    return config


def _no_constant(text: str) -> float:
    raise GraftError(f"the config holds the number {text}, which must be finite; save the adapter again.")


def _check_keys(file: Path, config: Any, known: Iterable[str], required: bool = False) -> None:
    if not isinstance(config, dict):
        raise GraftError(f"{file} holds {type(config).__name__} where an object is needed.")
    for key in config:
        if key not in set(known):
            raise GraftError(f"{file} has an unknown key {key!r}; {nearest(key, known)}")
    for key in known if required else ():
        if key not in config:
            raise GraftError(f"{file} lacks the key {key!r}; save the adapter again.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder by their names in the file; raises :class:`GraftError` for a damaged file."""
    try:
        with safe_open(path / TENSORS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise GraftError(f"{path / TENSORS} cannot be read ({error}); it is damaged or cut short, copy it again.") from None


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", *, trainable: bool = False, check_base: bool = True) -> Adapter:
    """Attaches a saved adapter, written by Graft or by PEFT.

    Checks keys, tensor names, shapes, finite values, the content hash and the base's fingerprint (unless ``check_base=False``).
    Loaded for use, its parameters are frozen; ``trainable=True`` lets training go on. Raises :class:`GraftError` with the model
    as it was.
    """
    path = Path(path)
    config = read_config(path)
    tensors = read_tensors(path)
    ours = config.get("graft")
    with _described_by(path / CONFIG):
        if ours is not None:
            if check_base:
                _check_base(model, ours["base"], ours["modules_to_save"], path)
            adapter = rebuild(model, config, name, path)
        else:
            # PEFT names heads that the model may not have ("classifier", "score"): those in the file count
            heads = [head for head in config.get("modules_to_save") or [] if any(f".{head}." in f".{key}" for key in tensors)]
            tensors = _without_base(model, tensors)
            delta, shapes = _peft_parts(config, tensors, heads, path)
            targets = _targets(model, shapes, path)
            layouts = {target.name: delta.layout_from_peft(target, config, shapes[target.name]) for target in targets}
            adapter = build(model, name, compose(delta, []), targets, layouts, heads, 0)
    try:
        _fill(adapter, tensors, path)
        if ours is not None:
            if content_hash(tensors) != ours["content"]:
                raise GraftError(f"{path / TENSORS} is not the file that {CONFIG} describes (its hash differs); copy both again.")
            expected = {k: v for k, v in json.loads(to_json(peft_config(adapter))).items() if k != "base_model_name_or_path"}
            for key, value in expected.items():
                if config.get(key) != value and key not in ("target_modules", "task_type"):
                    raise GraftError(
                        f"{path / CONFIG} says {key} = {config.get(key)!r}, but its 'graft' part means {value!r}; it was edited by hand, edit both."
                    )
    except BaseException:
        detach(model, name)
        raise
    if not trainable:
        adapter.freeze()
    return adapter


@contextmanager
def _described_by(file: Path) -> Iterator[None]:
    """Values of the wrong kind anywhere in a config show as the errors of whoever reads them; the user learns which file it was."""
    try:
        yield
    except GraftError:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RuntimeError, StopIteration, re.error) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise GraftError(f"{file} does not describe an adapter ({reason}); save it again.") from None


def rebuild(model: nn.Module, config: Mapping[str, Any], name: str, path: Path) -> Adapter:
    """An adapter with the structure that a config of ours describes, its tensors still to be filled in; ``path`` is for messages."""
    ours = config["graft"]
    recipe, layouts, seed = _own_parts(ours, path)
    targets = _targets(model, layouts, path)
    for target in targets:
        layout = layouts[target.name]
        if layout.pop("kind") != target.kind or tuple(layout.pop("shape")) != target.shape:
            raise GraftError(f"{path} was made for another {target.name}: here it is {target}.")
    step = int(ours["step"])
    adapter = build(model, name, recipe, targets, layouts, ours["modules_to_save"], seed)
    adapter.step = step
    return adapter


def _targets(model: nn.Module, names: Collection[str], path: Path) -> list[Target]:
    """The targets of these names in the model's order, the order that :func:`attach` builds in."""
    targets = {target.name: target for target in all_targets(model)}
    if not names:
        raise GraftError(f"{path} adapts no target, so it would change nothing; save the adapter again.")
    for name in names:
        if name not in targets:
            raise GraftError(f"{path} adapts {name!r}, which {type(model).__name__} does not have; {nearest(name, targets)}")
    return [target for name, target in targets.items() if name in names]


def _check_base(model: nn.Module, base: Mapping[str, Any], heads: Iterable[str], path: Path) -> None:
    if fingerprint(model, heads) != base.get("fingerprint"):
        raise GraftError(
            f"{path} was trained on another base model ({base.get('name') or base.get('class')}) than this one: the fingerprints of the weights "
            "differ; load that base, or pass check_base=False if you know that it fits."
        )


def _without_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are not the base's own: PEFT saves embeddings and the head along, unchanged, when one of them is a target."""
    base = dict(model.named_parameters(remove_duplicate=False))

    def unchanged(name: str, value: Tensor) -> bool:
        own = base.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
        return own is not None and own.shape == value.shape and torch.equal(own.detach().cpu(), value.to(own.dtype))

    return {name: value for name, value in tensors.items() if not unchanged(name, value)}


def _own_parts(ours: Mapping[str, Any], path: Path) -> tuple[Recipe, dict[str, Layout], int]:
    parts = [catalogue.part(part).parse(settings) for part, settings in ours["parts"].items()]
    deltas = [part for part in parts if isinstance(part, DeltaConfig)]
    layouts = {target: dict(layout) for target, layout in ours["targets"].items()}
    if len(deltas) != 1 or not all({"kind", "shape"} <= set(layout) for layout in layouts.values()):
        raise GraftError(f"{path / CONFIG} must name one delta and the kind and shape of every target.")
    return compose(deltas[0], [part for part in parts if part is not deltas[0]]), layouts, int(ours["seed"])


def _peft_parts(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], heads: Iterable[str], path: Path
) -> tuple[DeltaConfig, dict[str, dict[str, tuple[int, ...]]]]:
    """The hyper-parameters from a folder that PEFT wrote, and the shapes of its tensors by target and PEFT's name."""
    rows = [row for row in catalogue if row.delta.peft and row.delta.peft.type == config["peft_type"]]
    if not rows:
        known = {row.delta.peft.type for row in catalogue if row.delta.peft}
        raise GraftError(f"{path} is a PEFT adapter of type {config['peft_type']}, which Graft does not read; it reads {', '.join(sorted(known))}.")
    for row in rows:
        assert row.delta.peft is not None
        plain = row.delta.peft.keys.values()
        on_embeddings = [suffix.removesuffix(".weight").replace("lora_", "lora_embedding_") for suffix in plain]  # PEFT's other name there
        suffixes = sorted([*plain, *on_embeddings], key=len, reverse=True)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, value in tensors.items():
            suffix = next((s for s in suffixes if key.endswith(f".{s}")), None)
            target = key.removeprefix(PREFIX).removesuffix(f".{suffix}")
            if suffix and not any(f".{head}." in f".{target}." for head in heads):
                shapes.setdefault(target, {})[suffix] = tuple(value.shape)
        delta = row.delta.from_peft(config, shapes)
        if delta is not None:
            return delta, shapes
    raise GraftError(f"{path} uses options of PEFT's {config['peft_type']} that Graft does not have.")


def _fill(adapter: Adapter, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies the file's tensors into the adapter after checking names, shapes, dtypes and values."""
    expected = exported(adapter)
    file = path / TENSORS
    for name, value in expected.items():
        if name not in tensors:
            raise GraftError(f"{file} lacks the tensor {name!r}; {nearest(name, tensors)}")
        seen = tensors[name]
        if seen.shape != value.shape:
            raise GraftError(f"{file}: {name} has shape {list(seen.shape)}, but {list(value.shape)} is needed.")
        if seen.is_floating_point() != value.is_floating_point():
            raise GraftError(f"{file}: {name} is {seen.dtype}, but {value.dtype} is needed.")
    if (broken := not_finite(tensors)) is not None:
        raise GraftError(f"{file}: {broken} holds values that are not finite (NaN or infinity); the adapter is broken.")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise GraftError(f"{file} has {len(extra)} tensors that belong nowhere, the first {extra[0]!r}; {nearest(extra[0], expected)}")
    peft = adapter.recipe.delta.peft_format()
    with torch.no_grad():
        for delta in adapter.deltas.values():
            keys = {key: _file_key(peft, delta, key) for key in delta.exported()}
            present = {key: tensors[name] for key, name in keys.items() if name in tensors}  # a tied tensor came with its twin
            if present:
                delta.restore(present)
        if adapter.shared is not None:
            for key, value in adapter.shared.state_dict().items():
                value.copy_(tensors[f"{SHARED}{key}"])
