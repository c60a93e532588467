"""Maps that read one input run together: outputs and gradients are those of each alone, whatever the model and its user do meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.core.slot import SameInput, Slot
from graft.methods.families import factored
from tests import tiny

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # in fp64
MODELS = {"llama": (tiny.llama, tiny.causal_batches), "bert": (tiny.bert, tiny.classifier_batches), "gpt2": (tiny.gpt2, tiny.causal_batches)}


class Heads(nn.Module):
    """q, k, v as an attention names them, for calls in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(7, out, bias) for out, bias in ((5, True), (3, False), (4, True)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Heads()


def slots(model: nn.Module) -> list[Slot]:
    return [module for module in model.modules() if isinstance(module, Slot)]


def sharing(model: nn.Module) -> list[SameInput]:
    return list(dict.fromkeys(slot.same_input for slot in slots(model) if slot.same_input is not None))


def unshared(model: nn.Module) -> nn.Module:
    for slot in slots(model):
        slot.same_input = None
    return model


def disturb(adapter: graft.Adapter, seed: int = 1) -> graft.Adapter:
    """Off the start, where the branch does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter._all_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return adapter


def heads(**options: Any) -> Heads:
    torch.manual_seed(0)
    model = Model().double()
    disturb(graft.attach(model, **{"method": "lora", "rank": 2, **options}))
    return model.attention


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many maps ran in each call of the kernel."""
    counts: list[int] = []
    plain = factored.lora_linears

    def counting(x: Tensor, maps: Any) -> Any:
        counts.append(len(maps))
        return plain(x, maps)

    monkeypatch.setattr(factored, "lora_linears", counting)
    return counts


def step(model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> list[Tensor]:
    """Logits, and the gradients of everything that is trained."""
    model.train()
    torch.manual_seed(seed)
    output = model(**batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output.loss, trained, allow_unused=True)
    return [output.logits.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


def assert_same(seen: list[Tensor], wanted: list[Tensor]) -> None:
    for s, w in zip(seen, wanted, strict=True):
        torch.testing.assert_close(s, w, **EXACT)


def no_change(model: nn.Module, adapter: graft.Adapter) -> None:
    pass


def second_adapter(model: nn.Module, adapter: graft.Adapter) -> None:
    disturb(graft.attach(model, "lora", rank=2, targets="c_attn" if model.config.model_type == "gpt2" else ("q", "v"), name="second"))


def second_adapter_leaves(model: nn.Module, adapter: graft.Adapter) -> None:
    second_adapter(model, adapter)
    graft.detach(model, "second")


def second_adapter_inactive(model: nn.Module, adapter: graft.Adapter) -> None:
    disturb(graft.attach(model, "lora", rank=2, name="second"))
    adapter.active = False


def merged_and_back(model: nn.Module, adapter: graft.Adapter) -> None:
    adapter.merge()
    adapter.unmerge()


def ranks_switched_off(model: nn.Module, adapter: graft.Adapter) -> None:
    for delta in list(adapter.deltas.values())[::2]:
        delta.active[1] = False


def checkpointing(model: nn.Module, adapter: graft.Adapter) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})


CHANGES: list[Callable[[nn.Module, graft.Adapter], None]] = [
    no_change, second_adapter, second_adapter_leaves, second_adapter_inactive, merged_and_back, ranks_switched_off, checkpointing,
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_training_step_equals_one_without_sharing(name: str, change: Callable[[nn.Module, graft.Adapter], None]) -> None:
    make, batches = MODELS[name]
    results = []
    for share in (True, False):
        model = make(**({"bias": True} if name == "llama" else {})).double()
        adapter = disturb(graft.attach(model, "lora", rank=3))
        if share or change is not checkpointing:  # that one is compared with a step that keeps everything
            change(model, adapter)
        if not share:
            unshared(model)
        results.append([t for batch in batches(2) for t in step(model, batch)])
        assert all(not each.ready and each.x is None for each in sharing(model))
    assert_same(*results)


@pytest.mark.parametrize("row", [row for row in graft.methods() if not row.needs], ids=lambda row: row.name)
def test_every_method_equals_itself_without_sharing(row: Any) -> None:
    results = []
    for share in (True, False):
        model = tiny.llama(bias=True).double()
        adapter = disturb(graft.attach(model, row.name, **tiny.settings(row.name)))
        adapter.bind(torch.optim.SGD(adapter.parameters(), lr=0.0), total_steps=5)
        if not share:
            unshared(model)
        results.append([t for batch in tiny.causal_batches(2) for t in step(model, batch)])
        assert all(not each.ready for each in sharing(model))
    assert_same(*results)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "rank": 2, "dropout": 0.5},
        {"method": "dora", "rank": 2, "dropout": 0.5},
        {"method": "lora", "rank": 2, "targets": ("q_proj", "v_proj"), "modules_to_save": ["k_proj", "lm_head"]},
    ],
    ids=["dropout", "dora-dropout", "a-sibling-trained-whole"],
)
def test_deltas_that_cannot_share_equal_themselves_without_sharing(options: dict[str, Any]) -> None:
    results = []
    for share in (True, False):
        model = tiny.llama().double()
        disturb(graft.attach(model, **options))
        if not share:
            unshared(model)
        results.append(step(model, tiny.causal_batches(1)[0]))
    assert_same(*results)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("llama", [3, 1, 2, 1] * 2), ("bert", [3, 1, 1, 1] * 2), ("gpt2", [])],
)
def test_maps_of_one_input_do_run_together(name: str, wanted: list[int], together: list[int]) -> None:
    """q, k, v; gate, up. GPT-2 has q, k, v in one map already."""
    make, batches = MODELS[name]
    model = make().double()
    graft.attach(model, "lora", rank=3)
    alone = factored.lora_linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factored, "lora_linear", lambda *given: (together.append(1), alone(*given))[1])
        for batch in batches(2):  # at the second pass as at the first
            together.clear()
            step(model, batch)
            assert [count for count in together if count > 1] == [count for count in wanted if count > 1]
            if wanted:
                assert together[: len(wanted)] == wanted


def test_a_merged_or_detached_adapter_shares_nothing(together: list[int]) -> None:
    model = tiny.llama().double()
    base = copy.deepcopy(model)
    batch = {name: value for name, value in tiny.causal_batches(1)[0].items() if name != "labels"}
    adapter = disturb(graft.attach(model, "lora", rank=3))
    running = model(**batch).logits
    assert together == [3, 2, 3, 2]
    adapter.merge()
    merged = model(**batch).logits
    adapter.unmerge()
    graft.detach(model)
    assert together == [3, 2, 3, 2]
    torch.testing.assert_close(merged, running, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients_nothing_is_shared(mode: Any, together: list[int]) -> None:
    model = tiny.llama().double()
    disturb(graft.attach(model, "lora", rank=3))
    batch = {name: value for name, value in tiny.causal_batches(1)[0].items() if name != "labels"}
    wanted = model(**batch).logits.detach()
    together.clear()
    with mode():
        torch.testing.assert_close(model(**batch).logits, wanted, **EXACT)
    assert not together
    torch.testing.assert_close(model(**batch).logits, wanted, **EXACT)
    assert together == [3, 2, 3, 2]  # and it goes on afterwards


def test_inference_tensors_are_not_shared() -> None:
    """They have no version to compare."""
    found = heads()
    with torch.inference_mode():
        x = torch.randn(4, 7, dtype=torch.float64)
        wanted = found.q_proj(x).clone()
    torch.testing.assert_close(found.q_proj(x.clone()), wanted, **EXACT)
    for parameter in found.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(found.k_proj(x), found.k_proj(x.clone()), **EXACT)


# ---- one group of maps, asked in every way ---------------------------------------------------------------------------------


def another_tensor(found: Heads, x: Tensor) -> list[Tensor]:
    return [found.q_proj(x), found.k_proj(2 * x), found.v_proj(x)]


def a_copy(found: Heads, x: Tensor) -> list[Tensor]:
    return [found.q_proj(x), found.k_proj(x.clone()), found.v_proj(x)]


def an_equal_view(found: Heads, x: Tensor) -> list[Tensor]:
    return [found.q_proj(x), found.k_proj(x[:]), found.v_proj(x)]


def the_same_map_twice(found: Heads, x: Tensor) -> list[Tensor]:
    return [found.q_proj(x), found.q_proj(x), found.k_proj(x), found.v_proj(x)]


def never_asked(found: Heads, x: Tensor) -> list[Tensor]:
    return [found.q_proj(x), found.k_proj(x), found.q_proj(3 * x), found.k_proj(3 * x), found.v_proj(3 * x)]


def another_order(found: Heads, x: Tensor) -> list[Tensor]:
    return [found.v_proj(x), found.q_proj(x), found.k_proj(x), found.k_proj(-x), found.v_proj(-x), found.q_proj(-x)]


def interrupted_by_no_grad(found: Heads, x: Tensor) -> list[Tensor]:
    q = found.q_proj(x)
    with torch.no_grad():
        k = found.k_proj(x)
    return [q, k, found.k_proj(x), found.v_proj(x)]


CALLS = [another_tensor, a_copy, an_equal_view, the_same_map_twice, never_asked, another_order, interrupted_by_no_grad]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: calls.__name__)
def test_maps_that_are_asked_in_another_way_are_right(calls: Callable[[Heads, Tensor], list[Tensor]], method: str) -> None:
    results = []
    for share in (True, False):
        found = heads(method=method)
        x = torch.linspace(-1, 1, 28, dtype=torch.float64).view(4, 7).requires_grad_()
        if not share:
            unshared(found)
        outputs = [y for _ in range(3) for y in calls(found, x)]
        loss = sum((y * torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum() for y in outputs)
        results.append([*(y.detach() for y in outputs), *torch.autograd.grad(loss, [x, *(p for p in found.parameters() if p.requires_grad)])])
    assert_same(*results)


@pytest.mark.parametrize("calls", [another_tensor, a_copy, an_equal_view, the_same_map_twice, never_asked], ids=lambda calls: calls.__name__)
def test_maps_that_read_different_inputs_run_alone_from_then_on(calls: Callable[[Heads, Tensor], list[Tensor]], together: list[int]) -> None:
    found = heads()
    x = torch.randn(4, 7, dtype=torch.float64)
    assert len(sharing(found)) == 1
    calls(found, x)
    assert not sharing(found)
    assert together == [3]
    calls(found, x)
    assert together == [3]


def test_an_input_that_was_written_to_is_read_again(together: list[int]) -> None:
    found, plain = heads(), unshared(heads())
    x = torch.randn(4, 7, dtype=torch.float64)
    found.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(found.k_proj(x), plain.k_proj(x), **EXACT)
    assert together == [3]
    assert not sharing(found)


def test_nothing_is_kept_alive_after_all_have_been_asked() -> None:
    found = heads()
    x = torch.randn(4, 7, dtype=torch.float64)
    (arrangement,) = sharing(found)
    found.q_proj(x)
    assert len(arrangement.ready) == 2
    found.k_proj(x), found.v_proj(x)
    assert not arrangement.ready
    assert arrangement.x is None


def test_a_copy_of_a_model_shares_for_itself() -> None:
    model = tiny.llama().double()
    disturb(graft.attach(model, "lora", rank=3))
    batch = tiny.causal_batches(1)[0]
    wanted = step(model, batch)
    other = copy.deepcopy(model)
    assert len(sharing(other)) == len(sharing(model)) == 4
    assert not set(sharing(other)) & set(sharing(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(step(other, batch), wanted)


def test_only_siblings_of_one_module_and_width_share() -> None:
    model = tiny.llama()
    graft.attach(model, "lora", rank=3)
    names = [[slot.target.name for slot in each.slots] for each in sharing(model)]
    wanted = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
    assert names == [[f"model.layers.{layer}.{name}" for name in group] for layer in range(2) for group in wanted]
