"""The conformance suite: every method of the catalogue keeps what its row states.

The tests are generated from the rows, so a method is tested the moment it is registered. Adapted maps are compared with torch's own
module holding ``W'``, whole models with a copy whose weights were replaced by hand, files with what PEFT computes from them.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.core.catalogue import Method
from graft.core.slot import slot_of
from graft.core.target import LINEAR_KINDS, Target
from tests import tiny
from tests.methods.small import quiet_peft

ROWS = list(graft.methods())
every_method = pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
mergeable = pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.mergeable == "exactly"])
identical = pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.starts_as_identity])
in_peft = pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.delta.peft])


DATA = Path(__file__).parents[3] / "shared" / "data" / "sst-2" / "train.jsonl"


@dataclass(frozen=True)
class Place:
    """A tiny model and the targets in it that have one kind."""

    kind: str
    make: Callable[[], nn.Module]
    targets: str | tuple[str, ...]
    batches: Callable[..., list[dict[str, Tensor]]]
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def logits(self, model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
        batch = {name: value for name, value in (batch or self.batches(1)[0]).items() if name != "labels"}
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            output = model(**{name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()})
        return output if isinstance(output, Tensor) else output.logits


def pictures(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"pixels": torch.randn(3, 3, 9, 7, generator=generator)} for _ in range(count)]


def squared(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["pixels"]).float().square().mean()


LLAMA = Place("linear", tiny.llama, "linear", tiny.causal_batches)
GPT2 = Place("conv1d", tiny.gpt2, "linear", tiny.causal_batches)
PLACES = {
    "linear": LLAMA,
    "linear with bias": Place("linear", lambda: tiny.llama(bias=True), "linear", tiny.causal_batches),
    "linear in bert": Place("linear", tiny.bert, "linear", tiny.classifier_batches),
    "conv1d": GPT2,
    "conv2d": Place("conv2d", tiny.conv, "conv", pictures, squared),  # one of them grouped
    "plain conv2d": Place("conv2d", tiny.conv, "blocks.*", pictures, squared),
    "embedding": Place("embedding", tiny.llama, ("embed_tokens", "up_proj"), tiny.causal_batches),
    "norm": Place("norm", tiny.bert, "norm", tiny.classifier_batches),
    "rms norm": Place("norm", tiny.llama, "norm", tiny.causal_batches),
}
# Starts that look at rows of activations or at full gradients have none at a grouped convolution: they refuse it (tested below), and
# only they need the place without one.
WHERE = [
    pytest.param(row, place, id=f"{row.name}-{label.replace(' ', '_')}")
    for row in ROWS
    for label, place in PLACES.items()
    if place.kind in row.delta.kinds and label != ("conv2d" if row.needs else "plain conv2d")
]
everywhere = pytest.mark.parametrize(("row", "place"), WHERE)


def put(model: nn.Module, row: Method, place: Place = LLAMA, **options: Any) -> graft.Adapter:
    """The method on the model, with hyper-parameters that fit it."""
    if row.needs:
        dtype = next(model.parameters()).dtype
        batches = [{name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()} for batch in place.batches(2)]
        options = {"calibration": batches, "loss": place.loss, **options}
    return graft.attach(model, row.name, **{"targets": place.targets, **tiny.settings(row.name), **options})


def disturb(adapter: graft.Adapter, seed: int = 1, size: float = 0.2) -> graft.Adapter:
    """Random noise on every parameter, as after a long and bad training: nothing may rely on the start any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter._all_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return adapter


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors, as bits; deltas do not count."""
    return {name: as_bits(value) for name, value in model.state_dict().items() if ".graft." not in f".{name}"}


def as_bits(value: Tensor) -> Tensor:
    """The bytes of a tensor, so that -0.0 differs from 0.0 and NaN equals itself."""
    return value.detach().contiguous().clone().reshape(-1).view(torch.uint8)


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def stored(target: Target, weight: Tensor) -> Tensor:
    """``W' [out, in]`` as torch's own module of that kind keeps it."""
    return weight.T if target.kind in ("conv1d", "embedding") else weight.reshape(target.module.weight.shape)


def plain(target: Target, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition: torch's own module, a copy taken before the adapter came, holding ``(W', b')``."""
    held = {"weight": stored(target, weight)} | ({} if bias is None else {"bias": bias})
    assert held.keys() == dict(module.named_parameters()).keys()
    return torch.func.functional_call(module, held, (x,))


def by_hand(model: nn.Module, adapter: graft.Adapter) -> nn.Module:
    """The plain ``model`` with the adapted weights written into it."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, delta in adapter.deltas.items():
            weight, bias = delta.weight()
            modules[name].weight.copy_(stored(delta.target, weight))
            if bias is not None:
                modules[name].bias.copy_(bias)
    return model


def relative(one: Tensor, two: Tensor) -> float:
    one, two = one.detach().double(), two.detach().double()
    return float((one - two).norm() / two.norm().clamp(min=1e-30))


# ---- the function ------------------------------------------------------------------------------------------------------


@everywhere
def test_starts_as_the_base_model(row: Method, place: Place) -> None:
    if not row.starts_as_identity:
        pytest.skip(f"{row.name} states that it starts elsewhere")
    model = place.make()
    expected = place.logits(model)
    adapter = put(model, row, place)
    assert adapter.deltas
    # fp32: a few roundings of the weights' size; a start that is not subtracted would be far above
    assert relative(place.logits(model), expected) < 1e-5
    for delta in adapter.deltas.values():
        weight, bias = delta.weight()
        assert relative(weight, delta.target.weight()) < 1e-6
        assert (bias is None) == (delta.target.bias is None)
        assert bias is None or torch.equal(bias, delta.target.bias)


@everywhere
def test_a_disturbed_adapter_changes_the_function(row: Method, place: Place) -> None:
    model = place.make()
    expected = place.logits(model)
    disturb(put(model, row, place))
    assert relative(place.logits(model), expected) > 1e-4


shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3)


@everywhere
def test_forward_is_weight_in_outputs_and_gradients(row: Method, place: Place) -> None:
    model = place.make().double()
    originals = copy.deepcopy(model)
    adapter = disturb(put(model, row, place))

    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(shape=shapes, seed=st.integers(0, 99), active=st.booleans())
    def check(shape: list[int], seed: int, active: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, delta in adapter.deltas.items():
            if delta.target.depth == 1 and name not in ("blocks.2", "transformer.h.1.mlp.c_fc"):
                continue  # the second block repeats the first
            target, module = delta.target, originals.get_submodule(name)
            mask = getattr(delta, "active", None)
            if isinstance(mask, Tensor):  # ranks that are switched off
                mask[seed % len(mask)] = active
            x = sample(target, shape, generator)
            one, two = (x.clone().requires_grad_(x.is_floating_point()) for _ in range(2))
            fast, slow = delta(one), plain(target, module, two, *delta.weight())
            torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
            direction = torch.randn(slow.shape, generator=generator, dtype=slow.dtype)
            parameters = [*delta.parameters(), *(adapter.shared.parameters() if adapter.shared is not None else ())]
            inputs = int(x.is_floating_point())
            got, expected = (
                torch.autograd.grad(y, [*([leaf] if inputs else []), *parameters], direction, allow_unused=True)
                for y, leaf in ((fast, one), (slow, two))
            )
            for ours, theirs in zip(got, expected, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in expected[inputs:])

    check()


@everywhere
def test_other_faces_of_a_delta_mean_the_same_update(row: Method, place: Place) -> None:
    """What merges and conversions read instead of ``weight()``: factors, sparse entries, and the LoRA made of a delta with its error."""
    adapter = disturb(put(place.make().double(), row, place))
    for delta in adapter.deltas.values():
        with torch.no_grad():
            update = delta.weight()[0] - delta.target.weight()
            factors, entries = delta.factors(), delta.entries()
            if factors is not None:
                torch.testing.assert_close(factors[0] @ factors[1], update, rtol=1e-9, atol=1e-11)
            if entries is not None:
                dense = torch.zeros(update.numel(), dtype=update.dtype).index_add_(0, *entries).view(update.shape)
                torch.testing.assert_close(dense, update, rtol=1e-9, atol=1e-11)
        for rank in (None, 2):
            B, A, error = graft.lora_factors(delta, rank)
            assert len(A) <= (rank or min(update.shape))
            assert error == pytest.approx(relative(B @ A, update), rel=1e-4, abs=1e-6)
            assert rank is not None or error < 1e-5


def sample(target: Target, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """An input of the target in fp64; vectors without a batch, and ids, too."""
    if target.kind == "embedding":
        # Id 0 is padding: torch gives its row no gradient, but B of a low-rank pair reads one there where its A was disturbed.
        return torch.randint(1, target.shape[1], tuple(shape), generator=generator)
    if target.kind == "conv2d":
        height, width = (*shape, 5, 6)[:2]
        return torch.randn(2, target.module.in_channels, height + 3, width + 4, generator=generator, dtype=torch.float64)
    return torch.randn(*shape, target.shape[1] if target.kind in LINEAR_KINDS else target.shape[0], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.needs and "conv2d" in row.delta.kinds])
def test_starts_from_data_refuse_a_grouped_convolution(row: Method) -> None:
    place, model = PLACES["conv2d"], tiny.conv()
    before, expected = bits(model), place.logits(model)
    with pytest.raises(graft.GraftError, match="narrow the targets"):
        put(model, row, place)
    assert same_bits(bits(model), before)
    assert torch.equal(place.logits(model), expected)


class One(nn.Module):
    """One linear map, called as an MLP's way down, because some methods go by the role."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"down_proj": nn.Linear(in_features, out_features, bias=False)})])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0]["down_proj"](x)


@every_method
@pytest.mark.parametrize("shape", [(16, 16), (14, 23), (23, 14), (31, 8)])
def test_declared_parameter_count(row: Method, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if row.needs:  # enough rows, so that every direction exists; one target, so that no rank can move elsewhere
        options = {"calibration": [{"x": torch.randn(50, shape[1])}], "loss": lambda model, batch: model(**batch).pow(3).mean()}
    adapter = graft.attach(One(*shape), row.name, targets="all", **tiny.settings(row.name), **options)
    assert adapter.parameter_count == row.cost(*shape, **tiny.settings(row.name)) > 0
    assert sum(p.numel() for p in adapter.parameters()) == adapter.parameter_count


# ---- merging, detaching, the base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@everywhere
def test_merge_is_exact_and_undone_exactly(row: Method, place: Place, dtype: torch.dtype) -> None:
    model = place.make().to(dtype)
    fresh = copy.deepcopy(model)
    before = bits(model)
    adapter = disturb(put(model, row, place))
    if row.mergeable != "exactly":
        with pytest.raises(graft.NotMergeable):
            adapter.merge()
        return
    unmerged = place.logits(model)
    report = adapter.merge()
    assert adapter.merged
    assert set(report.lost) == set(adapter.deltas)
    assert report.worst[1] == 0  # W' is computed in the base's own dtype here, so rounding it once loses nothing
    assert torch.equal(place.logits(model), place.logits(by_hand(fresh, adapter)))
    # The branch rounds in another order than W': some eps (1.2e-7, 2.2e-16) times the square root of the sizes and depth.
    assert relative(place.logits(model), unmerged) < (2e-5 if dtype == torch.float32 else 1e-12)
    with pytest.raises(graft.GraftError, match="merged already"):
        adapter.merge()
    assert same_bits(bits(model), before)
    adapter.unmerge()
    assert not adapter.merged
    assert torch.equal(place.logits(model), unmerged)
    with pytest.raises(graft.GraftError, match="not merged"):
        adapter.unmerge()
    assert same_bits(bits(model), before)


@mergeable
def test_merge_report_in_bf16(row: Method) -> None:
    model = tiny.llama().bfloat16()
    adapter = disturb(put(model, row))
    expected = {}
    for name, delta in adapter.deltas.items():
        weight = delta.weight()[0].detach().double()
        base = model.get_submodule(name).weight.detach().double()
        assert delta.weight()[0].dtype == torch.float32
        expected[name] = float((weight.bfloat16().double() - weight).norm() / (weight - base).norm())
    report = adapter.merge()
    assert report.lost == pytest.approx(expected, rel=1e-3)
    assert report.worst == max(report.lost.items(), key=lambda item: item[1])
    assert report.worst[1] > 0
    # bf16 keeps 8 bits: no entry loses more than 2^-9 of itself
    for name, delta in adapter.deltas.items():
        baked, weight = slot_of(delta.target).baked.weight, delta.weight()[0]
        assert baked.dtype == torch.bfloat16
        assert torch.all((baked.float() - weight).abs() <= weight.abs() * 2**-8)
        assert name in report.lost


@everywhere
def test_detach_gives_the_base_back_to_the_bit(row: Method, place: Place) -> None:
    model = place.make()
    for index, parameter in enumerate(model.parameters()):  # not all alike, so that restoring the flags can fail
        parameter.requires_grad_(index % 3 != 0)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names, before, expected = [name for name, _ in model.named_modules()], bits(model), place.logits(model)
    forwards = {name: "forward" in module.__dict__ for name, module in model.named_modules()}
    hooks = len(model._forward_pre_hooks)
    adapter = disturb(put(model, row, place))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".graft." not in f".{name}")
    optimizer = adapter.optimizer(lr=0.01, total_steps=3)
    assert adapter.bound
    graft.detach(model)
    assert same_bits(bits(model), before)
    assert list(model.state_dict()) == list(before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [name for name, _ in model.named_modules()] == names
    assert {name: "forward" in module.__dict__ for name, module in model.named_modules()} == forwards
    assert len(model._forward_pre_hooks) == hooks
    assert torch.equal(place.logits(model), expected)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert graft.adapters_of(model) == {}


@everywhere
def test_base_tensors_never_change(row: Method, place: Place) -> None:
    model = place.make()
    before = bits(model)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    adapter = put(model, row, place)
    moments = [bits(model)]
    optimizer = adapter.optimizer(lr=0.05, total_steps=4)
    start = {name: value.clone() for name, value in adapter.tensors().items()}
    for batch in place.batches(3):
        model.train()
        (place.loss(model, batch) if place.loss else model(**batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        moments.append(bits(model))
    model.eval()
    assert any(not torch.equal(value, start[name]) for name, value in adapter.tensors().items())
    if row.mergeable == "exactly":
        adapter.merge()
        moments.append(bits(model))
        place.logits(model)
        adapter.unmerge()
        moments.append(bits(model))
        adapter.merge()
    graft.detach(model)
    moments.append(bits(model))
    assert all(same_bits(moment, before) for moment in moments)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses


@everywhere
def test_an_inactive_adapter_leaves_the_base_to_the_bit(row: Method, place: Place) -> None:
    model = place.make()
    expected = place.logits(model)
    adapter = disturb(put(model, row, place))
    changed = place.logits(model)
    adapter.active = False
    assert not adapter.active
    assert torch.equal(place.logits(model), expected)
    adapter.active = True
    assert torch.equal(place.logits(model), changed)
    if row.mergeable == "exactly":
        adapter.merge()
        baked = place.logits(model)
        adapter.active = False
        assert torch.equal(place.logits(model), expected)
        adapter.active = True
        assert torch.equal(place.logits(model), baked)


@everywhere
def test_two_active_adapters_add_their_deltas(row: Method, place: Place) -> None:
    model = place.make().double()
    originals = copy.deepcopy(model)
    first = disturb(put(model, row, place, name="first"), 1)
    second = disturb(put(model, row, place, name="second", seed=3), 2)
    generator = torch.Generator().manual_seed(0)

    def check() -> None:
        for name in first.deltas.keys() & second.deltas.keys():
            target, module = first.deltas[name].target, originals.get_submodule(name)
            x = sample(target, [2, 3], generator)
            base = module(x)
            parts = [plain(target, module, x, *adapter.deltas[name].weight()) - base for adapter in (first, second)]
            assert min(part.norm() for part in parts) > 0
            torch.testing.assert_close(model.get_submodule(name)(x), base + parts[0] + parts[1], rtol=1e-9, atol=1e-9)

    assert first.deltas.keys() & second.deltas.keys()
    check()
    if row.mergeable == "exactly":
        unmerged = place.logits(model)
        second.merge()
        check()  # one baked, one running
        first.merge()
        check()  # both baked
        second.unmerge()
        assert first.merged
        assert not second.merged
        check()
        first.unmerge()
        assert torch.equal(place.logits(model), unmerged)
    graft.detach(model, "first")
    alone = place.logits(model)
    assert relative(alone, place.logits(by_hand(copy.deepcopy(originals), second))) < 1e-10
    graft.detach(model, "second")
    assert torch.equal(place.logits(model), place.logits(originals))


# ---- files -------------------------------------------------------------------------------------------------------------


@everywhere
def test_saved_and_loaded_computes_the_same(row: Method, place: Place, tmp_path: Path) -> None:
    model = place.make()
    adapter = disturb(put(model, row, place, seed=5))
    for index, delta in enumerate(adapter.deltas.values()):
        mask = getattr(delta, "active", None)
        if isinstance(mask, Tensor) and index % 2:
            mask[0] = False
    expected = place.logits(model)
    adapter.save(tmp_path / "one")
    fresh = place.make()
    before = bits(fresh)
    loaded = graft.load_adapter(fresh, tmp_path / "one")
    assert loaded.deltas.keys() == adapter.deltas.keys()
    assert loaded.method == adapter.method
    assert not loaded.parameters()  # loaded for use
    # RandLoRA keeps its scale inside lambda in the file, which costs one rounding; the others are equal to the bit
    assert relative(place.logits(fresh), expected) < 1e-6
    assert same_bits(bits(fresh), before)
    graft.detach(fresh)
    trainable = graft.load_adapter(fresh, tmp_path / "one", trainable=True)
    assert sum(p.numel() for p in trainable.parameters()) == trainable.parameter_count == adapter.parameter_count


@every_method
def test_an_entry_of_the_layout_that_nobody_reads_is_refused(row: Method, tmp_path: Path) -> None:
    model = LLAMA.make()
    adapter = put(model, row, seed=5)
    adapter.save(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    name = next(iter(adapter.layouts))
    config["graft"]["targets"][name]["stray"] = 3
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(config))
    fresh = LLAMA.make()
    before = {key: as_bits(value) for key, value in fresh.state_dict().items()}
    with pytest.raises(graft.GraftError, match=f"the layout of {name} has an entry 'stray' that .* does not know"):
        graft.load_adapter(fresh, tmp_path / "one")
    assert same_bits({key: as_bits(value) for key, value in fresh.state_dict().items()}, before)


@every_method
def test_saving_twice_writes_the_same_bytes(row: Method, tmp_path: Path) -> None:
    adapter = disturb(put(tiny.llama(), row))
    adapter.save(tmp_path / "one")
    adapter.save(tmp_path / "two")
    disturb(put(tiny.llama(), row)).save(tmp_path / "three")  # nothing of the process gets into the file either
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    for name in names:
        contents = {(tmp_path / folder / name).read_bytes() for folder in ("one", "two", "three")}
        assert len(contents) == 1


PEFT_PLACES = {
    "llama": LLAMA,
    "llama with bias": PLACES["linear with bias"],
    "gpt2": GPT2,
    "embedding": PLACES["embedding"],
    "conv": PLACES["plain conv2d"],
}
# What PEFT itself has: ADALORA, SHIRA and RANDLORA layers exist for nn.Linear and (not all) Conv1D only.
PEFT_KINDS = {
    "LORA": ("linear", "conv1d", "embedding", "conv2d"),
    "ADALORA": ("linear", "conv1d"),
    "SHIRA": ("linear",),
    "RANDLORA": ("linear",),
    "IA3": ("linear", "conv1d", "conv2d"),
    "HRA": ("linear", "conv2d"),
    "VBLORA": ("linear", "conv1d"),
    "BOFT": (),  # more than one factor needs its CUDA kernel; test_boft goes without
    "HIRA": ("linear", "conv1d", "embedding", "conv2d"),
    "LOHA": ("linear", "conv2d"),
    "LOKR": ("linear", "conv2d"),
    "GRALORA": ("linear", "conv1d"),
}


@quiet_peft
@pytest.mark.parametrize(
    ("row", "place"),
    [
        pytest.param(row, place, id=f"{row.name}-{label.replace(' ', '_')}")
        for row in ROWS
        for label, place in PEFT_PLACES.items()
        if row.delta.peft and place.kind in row.delta.kinds and place.kind in PEFT_KINDS.get(row.delta.peft.type, ("linear",))
    ],
)
def test_peft_computes_the_same_from_our_file(row: Method, place: Place, tmp_path: Path) -> None:
    import peft

    model = place.make()
    adapter = disturb(put(model, row, place))
    expected = place.logits(model)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(place.make(), str(tmp_path)).eval()
    assert relative(place.logits(theirs), expected) < 1e-5
    assert relative(place.logits(place.make()), expected) > 1e-4


def peft_configs() -> list[Any]:
    """Configs of adapters that PEFT makes; every one changes something that our reader must follow."""
    import peft

    common: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    lora = {**common, "r": 3, "lora_alpha": 5, "init_lora_weights": False}
    varied = {"rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 11, r".*\.0\..*\.down_proj": 7}}
    return [
        pytest.param("lora", peft.LoraConfig(**lora), id="lora"),
        pytest.param("lora", peft.LoraConfig(**lora, use_rslora=True), id="rslora"),
        pytest.param("lora", peft.LoraConfig(**lora, **varied), id="patterns"),
        pytest.param("lora", peft.LoraConfig(**lora, **varied, use_rslora=True), id="rslora-patterns"),
        pytest.param("lora", peft.LoraConfig(**{**lora, "target_modules": ["embed_tokens", "q_proj"]}), id="embedding"),
        pytest.param("dora", peft.LoraConfig(**lora, use_dora=True), id="dora"),
        pytest.param("dora", peft.LoraConfig(**lora, **varied, use_dora=True, use_rslora=True), id="dora-rslora-patterns"),
        pytest.param(
            "adalora", peft.AdaLoraConfig(**common, target_r=2, init_r=4, lora_alpha=5, total_step=10, init_lora_weights=False), id="adalora"
        ),
        pytest.param("vera", peft.VeraConfig(**common, r=7, d_initial=0.3, projection_prng_key=3), id="vera"),
        pytest.param("fourierft", peft.FourierFTConfig(**common, n_frequency=30, scaling=20.0, n_frequency_pattern={"v_proj": 50}), id="fourierft"),
        pytest.param("hira", peft.HiraConfig(**common, r=3, rank_pattern={"down_proj": 5}), id="hira"),
        pytest.param("hira", peft.HiraConfig(**{**common, "target_modules": ["embed_tokens", "q_proj"]}, r=3), id="hira-embedding"),
        pytest.param("loha", peft.LoHaConfig(**common, r=3, alpha=5, init_weights=False), id="loha"),
        pytest.param("loha", peft.LoHaConfig(**common, r=3, alpha=5, init_weights=False, **varied), id="loha-patterns"),
        pytest.param("lokr", peft.LoKrConfig(**common, r=3, alpha=5, init_weights=False, **varied), id="lokr-patterns"),
        pytest.param("lokr", peft.LoKrConfig(**common, r=2, init_weights=False, decompose_both=True, decompose_factor=5), id="lokr-both"),
        pytest.param("lokr", peft.LoKrConfig(**common, r=99, alpha=99, init_weights=False), id="lokr-whole"),
        pytest.param(
            "delora", peft.DeloraConfig(**common, r=3, init_weights=False, rank_pattern={"down_proj": 5}, lambda_pattern={"v_proj": 4}), id="delora"
        ),
        pytest.param("c3a", peft.C3AConfig(**common, block_size=4, block_size_pattern={"q_proj": 2}), id="c3a"),
        pytest.param("gralora", peft.GraloraConfig(**common, r=6, alpha=9, init_weights=False), id="gralora"),
        pytest.param("gralora", peft.GraloraConfig(**common, r=8, gralora_k=4, hybrid_r=3, init_weights=False), id="gralora-hybrid"),
        pytest.param("ia3", peft.IA3Config(**common, feedforward_modules=["down_proj"], init_ia3_weights=False), id="ia3"),
        pytest.param("ia3", peft.IA3Config(**common, feedforward_modules=r".*\.0\..*\.[qv]_proj"), id="ia3-pattern"),
        pytest.param("miss", peft.MissConfig(**common, r=5), id="miss"),
        pytest.param("miss", peft.MissConfig(**common, r=5, init_weights="mini", mini_r=4), id="miss-mini"),
        pytest.param("bone", peft.MissConfig(**common, r=4, init_weights="bat"), id="bone"),
        pytest.param("oft", peft.OFTConfig(**common, oft_block_size=5, use_cayley_neumann=False), id="oft"),
        pytest.param("oft", peft.OFTConfig(**common, oft_block_size=4, block_share=True), id="oft-series-shared"),
        pytest.param(
            "oft",
            peft.OFTConfig(**{**common, "target_modules": ["q_proj", "k_proj"]}, oft_block_size=0, r=9, num_cayley_neumann_terms=7),
            id="oft-count",
        ),
        pytest.param("boft", peft.BOFTConfig(**common, boft_block_size=4), id="boft"),
        pytest.param(
            "boft", peft.BOFTConfig(**{**common, "target_modules": ["q_proj", "k_proj"]}, boft_block_size=0, boft_block_num=6), id="boft-count"
        ),
        pytest.param("hra", peft.HRAConfig(**common, r=4), id="hra"),
        pytest.param("hra", peft.HRAConfig(**common, r=3, init_weights=False), id="hra-odd"),
        pytest.param("road", peft.RoadConfig(**common, group_size=4), id="road"),
        pytest.param("road", peft.RoadConfig(**common, variant="road_2", group_size=2, init_weights=False), id="road-2"),
        pytest.param("road", peft.RoadConfig(**common, variant="road_4", group_size=4), id="road-4"),
        pytest.param("vblora", peft.VBLoRAConfig(**common, r=3, num_vectors=7, vector_length=4, topk=3), id="vblora"),
        pytest.param("waveft", peft.WaveFTConfig(**common, n_frequency=30, scaling=9.0, n_frequency_pattern={"v_proj": 50}), id="waveft"),
        pytest.param("waveft", peft.WaveFTConfig(**common, n_frequency=40, wavelet_family="coif1", proportional_parameters=True), id="waveft-coif"),
        pytest.param("shira", peft.ShiraConfig(**common, r=3, init_weights=False, random_seed=4), id="shira"),
    ]


@quiet_peft
@pytest.mark.parametrize(("method", "config"), peft_configs())
def test_adapters_that_peft_made(method: str, config: Any, tmp_path: Path) -> None:
    import peft

    torch.manual_seed(3)
    theirs = peft.get_peft_model(tiny.llama(), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = LLAMA.logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = tiny.llama()
    plain_logits = LLAMA.logits(model)
    adapter = graft.load_adapter(model, tmp_path)
    assert adapter.method == method
    assert relative(LLAMA.logits(model), expected) < 1e-5
    assert relative(plain_logits, expected) > 1e-3
    adapter.merge()
    assert relative(LLAMA.logits(model), expected) < 1e-5
    # and back again: what we save of it, PEFT reads
    adapter.unmerge()
    adapter.save(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "again")).eval()
    assert relative(LLAMA.logits(again), expected) < 1e-5


# ---- dtypes, seeds ------------------------------------------------------------------------------------------------------


@everywhere
def test_bf16_base(row: Method, place: Place) -> None:
    full = place.make()
    rounded = place.make().bfloat16()
    with torch.no_grad():  # the same weights on both sides, so that only the arithmetic differs
        for one, two in zip(full.parameters(), rounded.parameters(), strict=True):
            one.copy_(two.float())
    expected = place.logits(rounded)
    adapter = put(rounded, row, place)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    # 8 bits: each of some ten roundings along the depth is worth up to 2^-8
    bound = 10 * 2**-8
    if row.starts_as_identity:
        assert relative(place.logits(rounded), expected) < bound
    reference = disturb(put(full, row, place), size=0.05)
    _copy(reference, adapter)
    outputs = place.logits(rounded)
    assert outputs.dtype == torch.bfloat16
    assert relative(outputs, place.logits(full)) < bound
    assert all(delta.weight()[0].dtype == torch.float32 for delta in adapter.deltas.values())
    for batch in place.batches(1):
        rounded.train()
        optimizer = adapter.optimizer(lr=1e-6, total_steps=2)
        before = [p.detach().clone() for p in adapter.parameters()]
        if place.loss is None:
            rounded(**batch).loss.backward()
        else:
            rounded(batch["pixels"].bfloat16()).square().mean().backward()
        optimizer.step()
        # a step far below bf16's resolution survives, because what is trained is fp32
        assert any(not torch.equal(old, new) for old, new in zip(before, adapter.parameters(), strict=True))


def _copy(source: graft.Adapter, into: graft.Adapter) -> None:
    """Everything that defines ``source``: starts from data differ between dtypes, also in how many ranks each target gets."""
    for name in [name for name in into.deltas if name not in source.deltas]:
        into.drop_target(name)
    with torch.no_grad():
        for name, delta in into.deltas.items():
            theirs = source.deltas[name]
            if hasattr(delta, "set_start"):
                delta.set_start(theirs.A, theirs.B)
                delta.A0, delta.B0 = theirs.A0, theirs.B0
        for name, value in into.tensors().items():
            value.copy_(source.tensors()[name])
    assert into.deltas.keys() == source.deltas.keys()


def trained(row: Method, seed: int, steps: int = 5) -> dict[str, Tensor]:
    model = tiny.llama()
    adapter = put(model, row, seed=seed)
    tiny.train(model, adapter.optimizer(lr=0.01, total_steps=steps), tiny.causal_batches(), steps)
    return {**adapter.tensors(), **{f"{name}.{key}": torch.tensor(value) for name, d in adapter.deltas.items() for key, value in d.layout.items()}}


@every_method
def test_the_seed_decides_everything_random(row: Method) -> None:
    torch.manual_seed(1)
    first = trained(row, seed=0)
    torch.manual_seed(2)  # torch's own generator plays no part
    second = trained(row, seed=0)
    assert same_bits({n: as_bits(v) for n, v in first.items()}, {n: as_bits(v) for n, v in second.items()})
    third = trained(row, seed=7)
    assert row.random != same_bits({n: as_bits(v) for n, v in first.items()}, {n: as_bits(v) for n, v in third.items()})


@every_method
def test_attaching_leaves_torch_s_generator_alone(row: Method) -> None:
    model = tiny.llama()
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    put(model, row)
    assert torch.equal(torch.rand(4), expected)


# ---- training -----------------------------------------------------------------------------------------------------------


def real_text(count: int = 3, rows: int = 4, length: int = 32) -> list[dict[str, Tensor]]:
    """Sentiment prompts as bytes modulo the tiny vocabulary."""
    if not DATA.is_file():
        pytest.skip(f"{DATA} is absent; it lies beside the checkout in CI")
    lines = [json.loads(line)["prompt"].partition("Text: ")[2] for line in DATA.read_text("utf-8").splitlines()[: 8 * count * rows]]
    texts = [line for line in lines if len(line.encode()) > length][: count * rows]
    ids = torch.tensor([[byte % tiny.VOCABULARY for byte in text.encode()[:length]] for text in texts]).view(count, rows, length)
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch} for batch in ids]


@every_method
def test_loss_falls_on_real_text(row: Method) -> None:
    """At one of three learning rates, as a search would try them: what moves the function by little needs a large one."""
    batches, fell = real_text(), []
    for lr in (0.02, 0.2, 2.0):
        model = tiny.llama()
        adapter = put(model, row, **({"calibration": batches[:1]} if row.needs else {}))
        losses = tiny.train(model, adapter.optimizer(lr=lr, total_steps=24), batches, 24)
        fell.append(sum(losses[:3]) / 3 - sum(losses[-3:]) / 3)
        if fell[-1] > 0.1:
            return
    raise AssertionError(f"the loss fell by {fell} at most")


@pytest.mark.parametrize("killed_after", [4, 6])
@every_method
def test_killed_and_resumed_is_never_killed(row: Method, killed_after: int) -> None:
    batches, steps = tiny.causal_batches(7), 7

    def begin() -> tuple[nn.Module, graft.Adapter, torch.optim.Optimizer]:
        model = tiny.llama()
        adapter = put(model, row)
        return model, adapter, adapter.optimizer(lr=0.01, total_steps=steps, weight_decay=0.01)

    model, whole, optimizer = begin()
    start = {name: value.clone() for name, value in whole.tensors().items()}
    tiny.train(model, optimizer, batches, steps)

    model, killed, optimizer = begin()
    tiny.train(model, optimizer, batches, killed_after)
    checkpoint = io.BytesIO()
    torch.save({"adapter": killed.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    checkpoint.seek(0)
    state = torch.load(checkpoint, weights_only=True)  # plain tensors and numbers only
    model, resumed, optimizer = begin()
    resumed.load_state_dict(state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    assert resumed.step == killed_after
    tiny.train(model, optimizer, batches[killed_after:], steps - killed_after)
    assert resumed.step == whole.step == steps
    assert not same_bits({n: as_bits(v) for n, v in start.items()}, {n: as_bits(v) for n, v in whole.tensors().items()})
    assert same_bits({n: as_bits(v) for n, v in resumed.tensors().items()}, {n: as_bits(v) for n, v in whole.tensors().items()})


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # transformers 5 is about to rename it
@every_method
def test_gradient_checkpointing_gives_the_same_gradients(row: Method) -> None:
    def gradients(checkpointing: bool) -> tuple[list[Tensor | None], int]:
        model = tiny.llama()
        adapter = disturb(put(model, row))
        adapter.optimizer(lr=0.01, total_steps=3)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls: list[int] = []
        deep = next(d for d in adapter.deltas.values() if d.target.depth is not None)
        deep.target.module.register_forward_hook(lambda *_: calls.append(1))
        model.train()
        model(**tiny.causal_batches(1)[0]).loss.backward()
        return [p.grad for p in adapter.parameters()], len(calls)

    (expected, once), (got, twice) = gradients(False), gradients(True)
    assert twice > once  # blocks really ran again in the backward pass
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in expected)
    for one, two in zip(got, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


# ---- hyper-parameters -----------------------------------------------------------------------------------------------------


def bounded() -> list[Any]:
    """A value outside of every bound that an option declares, on either side."""
    found = []
    for row in ROWS:
        for part in row.parts:
            for item in dataclasses.fields(part):
                for side, step in (("low", -1), ("high", 1)):
                    limit = item.metadata.get(side)
                    if limit is not None:
                        found.append(pytest.param(row, item.name, limit + step, id=f"{row.name}-{item.name}-{side}"))
    return found


@pytest.mark.parametrize(("row", "option", "value"), bounded())
def test_values_out_of_bounds_are_refused(row: Method, option: str, value: float) -> None:
    with pytest.raises(graft.GraftError) as refused:
        row.recipe(**{option: value})
    message = str(refused.value)
    assert f".{option} is " in message
    assert "must be at " in message
    assert repr(value) in message or repr(float(value)) in message


@every_method
def test_unknown_options_and_wrong_types_are_refused(row: Method) -> None:
    model = tiny.llama()
    before, modules = bits(model), [name for name, _ in model.named_modules()]
    data = {"calibration": LLAMA.batches(1)} if row.needs else {}
    for option in row.options():
        misspelt = option.name[:-1] + option.name[-1] * 2 + "x"
        with pytest.raises(graft.GraftError, match=f"no option '{misspelt}'.*'{re.escape(option.name)}'"):
            graft.attach(model, row.name, **data, **{misspelt: 1})
        for wrong in ([1], float("nan"), "what is this"):
            with pytest.raises(graft.GraftError, match=f"{option.name} is "):
                graft.attach(model, row.name, **data, **{option.name: wrong})
    assert row.options()
    assert same_bits(bits(model), before)
    assert [name for name, _ in model.named_modules()] == modules


ANY_RANK = {"vera", "lokr"}  # vectors on random bases, which may be wider than the matrix; factors that a larger rank leaves whole
RANKED = [
    row
    for row in ROWS
    if row.name not in ANY_RANK and any(option.name in ("rank", "initial_rank") for part in row.parts[:1] for option in part.options())
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in RANKED])
def test_a_rank_larger_than_the_matrix_is_refused(row: Method) -> None:
    model = tiny.llama()
    before, modules = bits(model), [name for name, _ in model.named_modules()]
    options = {name: 72 for name in ("rank", "initial_rank") if any(o.name == name for o in row.options())}
    with pytest.raises(graft.GraftError, match=r"\d+.* x |do not fit"):
        put(model, row, **options)
    assert same_bits(bits(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert graft.adapters_of(model) == {}


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.needs])
def test_missing_calibration_is_named(row: Method) -> None:
    model = tiny.llama()
    with pytest.raises(graft.GraftError, match="calibration="):
        graft.attach(model, row.name)
    with pytest.raises(graft.GraftError, match="no batch"):
        graft.attach(model, row.name, calibration=[])
    assert graft.adapters_of(model) == {}


@every_method
def test_the_row_is_complete(row: Method) -> None:
    assert row.title
    assert row.paper
    assert row.summary
    assert row.axis in ("delta", "init", "allocation", "routing", "optimiser", "base", "objective", "algebra")
    assert row.mergeable in ("exactly", "never")
    assert all(option.help for option in row.options())
    assert put(tiny.llama(), row).method == row.name


# ---- switching -----------------------------------------------------------------------------------------------------------


def baked(model: nn.Module) -> dict[str, Tensor]:
    """What every target of the model would run on, as bits."""
    found = {}
    for name, module in model.named_modules():
        slot = module._modules.get("graft")
        if name and slot is not None and hasattr(slot, "baked"):
            found[name] = as_bits((slot.baked or module).weight)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@mergeable
def test_switch_is_a_fresh_merge_to_the_bit(row: Method, dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    with torch.no_grad():  # zeros of either sign, as pruned models have them: putting them back must keep the sign
        for parameter in model.parameters():
            parameter.view(-1)[::2] = -0.0
    fresh = {name: copy.deepcopy(model) for name in ("one", "two")}
    before = bits(model)
    for name, seed in (("one", 1), ("two", 2)):
        # a start from data must see the base alone, as on the fresh model
        disturb(put(model, row, name=name, seed=seed), seed).active = False
        disturb(put(fresh[name], row, name=name, seed=seed), seed).merge()
    for name in ("one", "two", "one", "one", "two"):
        graft.switch(model, name)
        adapters = graft.adapters_of(model)
        assert {each: (a.merged, a.active) for each, a in adapters.items()} == {each: (each == name, each == name) for each in adapters}
        assert same_bits(baked(model), baked(fresh[name]))
        assert torch.equal(LLAMA.logits(model), LLAMA.logits(fresh[name]))
        assert same_bits(bits(model), before)
    with pytest.raises(graft.GraftError, match="'one'"):
        graft.switch(model, "on")


def test_switch_between_methods_and_targets() -> None:
    """Adapters that share some targets only: what the former one alone held goes back to the base."""
    model = tiny.llama()
    plans = {"sparse": ("shira", ["q_proj", "up_proj"]), "low": ("lora", ["q_proj", "v_proj"]), "other": ("shira", ["q_proj", "o_proj"])}
    fresh = {name: copy.deepcopy(model) for name in plans}
    for seed, (name, (method, targets)) in enumerate(plans.items()):
        disturb(graft.attach(model, method, targets=targets, name=name, rank=3, seed=seed), seed)
        disturb(graft.attach(fresh[name], method, targets=targets, name=name, rank=3, seed=seed), seed).merge()
    for name in ("sparse", "other", "low", "other", "sparse", "low"):
        graft.switch(model, name)
        assert torch.equal(LLAMA.logits(model), LLAMA.logits(fresh[name]))
    graft.detach(model)
    assert torch.equal(LLAMA.logits(model), LLAMA.logits(tiny.llama()))
