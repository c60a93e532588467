"""Files: everything that can be wrong with one is refused in a sentence, and neither the model nor an older file is touched."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graft
from graft.core import storage
from graft.core.hashing import content_hash
from tests import tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def disturb(adapter: graft.Adapter, seed: int = 1) -> graft.Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapter


def logits(model: nn.Module) -> Tensor:
    batch = tiny.causal_batches(1)[0]
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that a failed load could leave behind."""
    state = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    modules = [(name, "forward" in m.__dict__, len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    return state, flags, modules, logits(model)


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    state, flags, modules, output = before
    now = snapshot(model)
    assert now[1:3] == (flags, modules)
    assert now[0].keys() == state.keys()
    assert all(torch.equal(now[0][name][0], value) and now[0][name][1] == place for name, (value, place) in state.items())
    assert torch.equal(now[3], output)
    assert graft.adapters_of(model) == {}


def one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert text[0] != " "
    assert text.rstrip()[-1] in ".?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA on the attention of a tiny Llama."""
    adapter = graft.attach(tiny.llama(), "lora", rank=3, targets="attention")
    return disturb(adapter).save(tmp_path / "adapter")


def refused(path: Path, match: str, model: nn.Module | None = None, **options: Any) -> None:
    model = model or tiny.llama()
    before = snapshot(model)
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} if path.is_dir() else {}
    with pytest.raises(graft.GraftError, match=match) as error:
        graft.load_adapter(model, path, **options)
    one_sentence(error.value)
    assert_untouched(model, before)
    assert files == ({file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} if path.is_dir() else {})


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], hash_too: bool = True) -> Path:
    """Changes the tensors; the hash in the config is made to fit, so that the check behind it is what refuses."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    if hash_too:
        edit(folder, lambda config: config["graft"].update(content=content_hash(tensors)))
    return folder


# ---- tensors -----------------------------------------------------------------------------------------------------------


def test_missing_tensor(folder: Path) -> None:
    refused(rewrite(folder, lambda t: t.pop(FIRST)), "lacks the tensor .*layers.0.self_attn.q_proj.lora_A.weight")


def test_extra_tensor(folder: Path) -> None:
    refused(rewrite(folder, lambda t: t.update(stray=torch.zeros(2))), "1 tensors that belong nowhere, the first 'stray'")


def test_misshapen_tensor(folder: Path) -> None:
    refused(rewrite(folder, lambda t: t.update({FIRST: torch.zeros(3, 35)})), r"shape \[3, 35\], but \[3, 36\] is needed")


def test_transposed_tensor(folder: Path) -> None:
    refused(rewrite(folder, lambda t: t.update({FIRST: t[FIRST].T.contiguous()})), r"shape \[36, 3\], but \[3, 36\] is needed")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    refused(rewrite(folder, lambda t: t[FIRST].view(-1).__setitem__(7, value)), "not finite")


def test_wrong_dtype(folder: Path) -> None:
    refused(rewrite(folder, lambda t: t.update({FIRST: torch.zeros(3, 36, dtype=torch.int32)})), "torch.int32, but torch.float32 is needed")


def test_hash_mismatch(folder: Path) -> None:
    refused(rewrite(folder, lambda t: t[FIRST].view(-1).__setitem__(7, 0.5), hash_too=False), "its hash differs")


@pytest.mark.parametrize("keep", [0, 5, 60, 0.5, 0.99])
def test_truncated_safetensors(folder: Path, keep: float) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(folder, "damaged or cut short")


def test_header_of_absurd_size(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refused(folder, "damaged or cut short")


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "weights.pkl"])
def test_pickle_is_never_read(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    refused(folder, f"{name}, a pickle file that could run code")
    (folder / WEIGHTS).write_bytes((folder / name).read_bytes())  # the same under an honest name
    refused(folder, "damaged or cut short")
    assert not (tmp_path / "trace").exists()


# ---- the config ----------------------------------------------------------------------------------------------------------


def test_not_a_folder(folder: Path) -> None:
    refused(folder / WEIGHTS, "is not a folder")
    refused(folder.parent / "nowhere", "is not a folder")


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", f"has no {WEIGHTS}")
    (folder / CONFIG).unlink()
    refused(folder, f"no readable {CONFIG}")


@pytest.mark.parametrize("text", ["{", "", "\udcff", "[1, 2"])
def test_config_that_is_not_json(folder: Path, text: str) -> None:
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "not valid JSON")


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"model_type": "llama"}'])
def test_config_of_something_else(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    refused(folder, "neither a 'graft' nor a 'peft_type' key")


def test_config_of_absurd_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_CONFIG_BYTES", 100)
    refused(folder, f"no readable {CONFIG}")


def test_unknown_keys(folder: Path) -> None:
    refused(edit(folder, lambda c: c.update(lora_alhpa=3)), "unknown key 'lora_alhpa'.*'lora_alpha'")


def test_unknown_keys_of_ours(folder: Path) -> None:
    refused(edit(folder, lambda c: c["graft"].update(targetz={})), "unknown key 'targetz'.*'targets'")


@pytest.mark.parametrize("key", ["format", "parts", "targets", "base", "content", "seed", "step", "modules_to_save"])
def test_missing_keys_of_ours(folder: Path, key: str) -> None:
    refused(edit(folder, lambda c: c["graft"].pop(key)), f"lacks the key '{key}'")


def test_other_format(folder: Path) -> None:
    refused(edit(folder, lambda c: c["graft"].update(format=99)), "format 99.*update Graft")


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "graft is text": (lambda c: c.update(graft="x"), "str where an object is needed"),
    "no parts": (lambda c: c["graft"].update(parts={}), "one delta"),
    "parts is a list": (lambda c: c["graft"].update(parts=["LoRA"]), "does not describe an adapter"),
    "two deltas": (lambda c: c["graft"]["parts"].update(Hydra={}), "one delta"),
    "unknown part": (lambda c: c["graft"].update(parts={"LoRa": {}}), "part 'LoRa'.*'LoRA'"),
    "unknown option": (lambda c: c["graft"]["parts"]["LoRA"].update(ranks=2), "no option 'ranks'.*'rank'"),
    "rank 0": (lambda c: c["graft"]["parts"]["LoRA"].update(rank=0), "rank is 0.*at least 1"),
    "settings are no object": (lambda c: c["graft"]["parts"].update(LoRA=3), "does not describe an adapter"),
    "targets is a list": (lambda c: c["graft"].update(targets=[]), "does not describe an adapter"),
    "no targets": (lambda c: c["graft"].update(targets={}), "adapts no target"),
    "layout is text": (lambda c: _layout(c, "x"), "does not describe an adapter|kind and shape"),
    "layout without kind": (lambda c: _layout(c).pop("kind"), "kind and shape"),
    "layout without rank": (lambda c: _layout(c).pop("rank"), "does not describe an adapter"),
    "layout with rank as text": (lambda c: _layout(c).update(rank="x"), "does not describe an adapter"),
    "layout with a rank above the matrix": (lambda c: _layout(c).update(rank=10**9), "rank is 1000000000, but"),
    "layout with a frozen rank above the matrix": (lambda c: _layout(c).update(frozen=10**9), "rank is 1000000000, but"),
    "inactive rank that does not exist": (lambda c: _layout(c).update(inactive=[7]), "does not describe an adapter"),
    "shape of another model": (lambda c: _layout(c).update(shape=[40, 37]), "made for another"),
    "kind of another model": (lambda c: _layout(c).update(kind="conv1d"), "made for another"),
    "seed is text": (lambda c: c["graft"].update(seed="x"), "does not describe an adapter"),
    "step is text": (lambda c: c["graft"].update(step="x"), "does not describe an adapter"),
    "base is text": (lambda c: c["graft"].update(base="x"), "does not describe an adapter|another base"),
    "heads are a number": (lambda c: c["graft"].update(modules_to_save=3), "does not describe an adapter"),
    "head that does not exist": (lambda c: c["graft"].update(modules_to_save=["clasifier"]), "no module is called 'clasifier'"),
    "scale is nan": (lambda c: _layout(c).update(scale=float("nan")), "must be finite"),
}  # fmt: skip


def _layout(config: dict[str, Any], replacement: Any = None) -> Any:
    targets = config["graft"]["targets"]
    if replacement is not None:
        targets[next(iter(targets))] = replacement
    return targets[next(iter(targets))]


@pytest.mark.parametrize("what", BROKEN)
def test_broken_configs(folder: Path, what: str) -> None:
    change, match = BROKEN[what]
    # The base check comes first for some; what is tested is that every one ends in a sentence.
    refused(edit(folder, change), match)


@pytest.mark.parametrize(("key", "value"), [("r", 5), ("lora_alpha", 7), ("use_dora", True), ("use_rslora", True), ("rank_pattern", {"q_proj": 4})])
def test_config_edited_by_hand(folder: Path, key: str, value: Any) -> None:
    refused(edit(folder, lambda c: c.update({key: value})), f"{key} = .* edited by hand")


def test_scale_edited_by_hand(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        for layout in config["graft"]["targets"].values():
            layout["scale"] = 9.0

    refused(edit(folder, change), "lora_alpha = .* edited by hand")


# ---- the base ------------------------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shape(folder: Path) -> None:
    refused(folder, "another base model.*fingerprints", tiny.llama(seed=1))
    other = tiny.llama(seed=1)
    adapter = graft.load_adapter(other, folder, check_base=False)
    assert len(adapter.deltas) == 8


def test_one_changed_weight_is_another_base(folder: Path) -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight[3] += 0.1
    refused(folder, "another base model", model)


def test_a_base_that_was_written_to_is_not_saved_for(tmp_path: Path) -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "lora", rank=2)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("norm.weight")).mul_(2)
    with pytest.raises(graft.GraftError, match="weights changed since adapter 'default' was attached"):
        adapter.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    adapter.fingerprint = None
    adapter.save(tmp_path / "adapter")
    refused(tmp_path / "adapter", "another base model")


@pytest.mark.parametrize("make", [tiny.gpt2, lambda: tiny.llama(layers=1)])
def test_another_architecture(folder: Path, make: Callable[[], nn.Module]) -> None:
    refused(folder, "another base model", make())
    refused(folder, "which .* does not have", make(), check_base=False)


def test_adapter_of_fp32_fits_a_bf16_copy(folder: Path) -> None:
    full, half = tiny.llama(), tiny.llama().bfloat16()
    graft.load_adapter(full, folder)
    adapter = graft.load_adapter(half, folder)
    assert all(value.dtype == torch.float32 for value in adapter.tensors().values() if value.is_floating_point())
    expected, base = logits(full), logits(tiny.llama())
    assert (logits(half).float() - expected).norm() < 0.1 * (expected - base).norm()
    saved, again = load_file(folder / WEIGHTS), adapter.save(folder.parent / "again")
    assert all(torch.equal(value, saved[name]) for name, value in load_file(again / WEIGHTS).items())


def test_adapter_of_bf16_fits_the_fp32_base_that_it_came_from(tmp_path: Path) -> None:
    adapter = disturb(graft.attach(tiny.llama().bfloat16(), "lora", rank=3))
    adapter.save(tmp_path / "half")
    graft.load_adapter(tiny.llama(), tmp_path / "half")


def test_name_that_is_taken(folder: Path) -> None:
    model = tiny.llama()
    first = graft.load_adapter(model, folder)
    output = logits(model)
    with pytest.raises(graft.GraftError, match="'default' is attached already"):
        graft.load_adapter(model, folder)
    assert graft.adapters_of(model) == {"default": first}
    assert torch.equal(logits(model), output)
    graft.load_adapter(model, folder, "other")


def test_failed_load_leaves_other_adapters_alone(folder: Path) -> None:
    model = tiny.llama()
    first = disturb(graft.attach(model, "dora", rank=2, name="first"))
    output = logits(model)
    with pytest.raises(graft.GraftError, match="not finite"):
        graft.load_adapter(model, rewrite(folder, lambda t: t[FIRST].fill_(float("nan"))))
    assert graft.adapters_of(model) == {"first": first}
    assert torch.equal(logits(model), output)
    assert first.parameters()


# ---- PEFT's files --------------------------------------------------------------------------------------------------------


def as_peft(folder: Path, **changes: Any) -> Path:
    """The folder as PEFT would have written it: without our key."""

    def change(config: dict[str, Any]) -> None:
        del config["graft"]
        config.update(changes)

    return edit(folder, change)


def test_peft_file_without_our_key(folder: Path) -> None:
    ours, theirs = tiny.llama(), tiny.llama()
    graft.load_adapter(ours, folder)
    graft.load_adapter(theirs, as_peft(folder))
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bias", "all"), ("bias", "lora_only"), ("lora_bias", True), ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "lora_ga"),
        ("layer_replication", [[0, 2], [1, 2]]), ("trainable_token_indices", [1, 2]), ("target_parameters", ["mlp.experts.weight"]),
        ("alora_invocation_tokens", [3]), ("use_qalora", True), ("use_bdlora", {"r": 1}), ("kasa_config", {"beta": 1}), 
        ("arrow_config", {"top_k": 2}),
    ],
)  # fmt: skip
def test_peft_options_that_change_the_function_are_refused(folder: Path, option: str, value: Any) -> None:
    refused(as_peft(folder, **{option: value}), option)


def test_peft_options_that_are_off_are_accepted(folder: Path) -> None:
    as_peft(folder, layer_replication=None, trainable_token_indices=None, use_qalora=False, qalora_group_size=16, init_lora_weights="gaussian")
    graft.load_adapter(tiny.llama(), folder)


@pytest.mark.parametrize("kind", ["POLY", "PREFIX_TUNING", "nonsense"])
def test_peft_types_that_graft_does_not_read(folder: Path, kind: str) -> None:
    refused(as_peft(folder, peft_type=kind), f"type {kind}.*LORA")


def test_peft_file_without_a_tensor_of_the_method(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        tensors["base_model.model.model.layers.0.self_attn.q_proj.other"] = torch.zeros(2)

    refused(as_peft(rewrite(folder, change)), "adapts no target")
    refused(rewrite(folder, dict.clear, hash_too=False), "adapts no target")


def test_peft_file_with_half_a_pair(folder: Path) -> None:
    refused(as_peft(rewrite(folder, lambda t: t.pop(FIRST))), "does not describe an adapter|lacks")


def test_peft_file_with_an_unreadable_config(folder: Path) -> None:
    refused(as_peft(folder, r="x"), "LoRA.rank is 'x'|does not describe an adapter")


def test_peft_file_with_other_base_weights(folder: Path) -> None:
    """PEFT may save embeddings along; unchanged ones are ignored, trained ones are not."""
    name = "base_model.model.model.embed_tokens.weight"
    table = tiny.llama().model.embed_tokens.weight.detach().clone()
    graft.load_adapter(tiny.llama(), as_peft(rewrite(folder, lambda t: t.update({name: table.clone()}))))
    rewrite(folder, lambda t: t.update({name: table + 1}), hash_too=False)
    refused(folder, "belong nowhere, the first .*embed_tokens.weight")


# ---- writing -------------------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_not_saved(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    adapter = graft.attach(tiny.llama(), "lora", rank=3, targets="attention")
    with torch.no_grad():
        adapter.parameters()[0][0, 0] = float("nan")
    with pytest.raises(graft.GraftError, match=r"not finite.*nothing was saved") as error:
        adapter.save(folder)
    one_sentence(error.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(graft.GraftError, match="is a file"):
        graft.attach(tiny.llama(), "lora", rank=3).save(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_other_files_in_the_folder_stay(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    disturb(graft.attach(tiny.llama(), "lora", rank=2), 3).save(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert len(graft.load_adapter(tiny.llama(), folder).deltas) == 14


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, exists: bool) -> None:
    path = folder if exists else folder.parent / "new"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    siblings = sorted(entry.name for entry in folder.parent.iterdir())
    adapter = disturb(graft.attach(tiny.llama(), "lora", rank=2), 3)

    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(storage.os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        adapter.save(path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(entry.name for entry in folder.parent.iterdir()) == siblings  # no temporary folder stays behind
    graft.load_adapter(tiny.llama(), folder)


def test_a_write_killed_between_the_two_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files cannot be renamed at once: what is left is refused by the hash, never loaded as a mixture, and the next save heals it."""
    adapter = disturb(graft.attach(tiny.llama(), "lora", rank=3, targets="attention"), 3)
    replace, calls = storage.os.replace, []

    def second_fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("killed")
        replace(*args)

    monkeypatch.setattr(storage.os, "replace", second_fails)
    with pytest.raises(OSError, match="killed"):
        adapter.save(folder)
    monkeypatch.undo()
    refused(folder, "its hash differs")
    adapter.save(folder)
    graft.load_adapter(tiny.llama(), folder)


def test_no_process_sees_half_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment before the rename the folder holds the old adapter in full."""
    model, seen = tiny.llama(), []
    save_file_ = storage.save_file

    def watching(*args: Any, **options: Any) -> None:
        save_file_(*args, **options)
        seen.append(graft.load_adapter(model, folder, "watching"))
        graft.detach(model, "watching")

    monkeypatch.setattr(storage, "save_file", watching)
    disturb(graft.attach(tiny.llama(), "lora", rank=2), 3).save(folder)
    assert [len(adapter.deltas) for adapter in seen] == [8]


def test_the_file_is_peft_s_with_one_key_more(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["lora_alpha"] / config["r"] == config["graft"]["targets"]["model.layers.1.self_attn.o_proj"]["scale"] == 2.0
    assert sorted(load_file(folder / WEIGHTS))[0] == "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    assert config["graft"]["content"] == content_hash(load_file(folder / WEIGHTS))
