"""What only full fine-tuning promises: torch's own training of the weights, on a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.core.target import find_targets
from tests import tiny
from tests.methods.small import layer

MODELS = {
    "llama": (tiny.llama, tiny.causal_batches),
    "llama-bias": (lambda: tiny.llama(bias=True), tiny.causal_batches),
    "llama-tied": (lambda: tiny.llama(tied=True), tiny.causal_batches),
    "gpt2": (tiny.gpt2, tiny.causal_batches),
    "bert": (tiny.bert, tiny.classifier_batches),
}


def by_torch(model: nn.Module, names: set[str], batches: list[dict[str, Tensor]], steps: int) -> list[float]:
    """Trains the named modules of the model itself."""
    model.requires_grad_(False)
    parameters = dict.fromkeys(p for n, m in model.named_modules() if n in names for p in m.parameters(recurse=False))
    for p in parameters:
        p.requires_grad_(True)
    groups = [{"params": [p for p in parameters if (p.ndim >= 2) == matrix], "weight_decay": 0.1 if matrix else 0.0} for matrix in (True, False)]
    return tiny.train(model, torch.optim.AdamW([g for g in groups if g["params"]], lr=3e-3), batches, steps)


@pytest.mark.parametrize("targets", ["linear", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_torchs_training_of_the_weights(name: str, targets: str) -> None:
    """The same losses and weights; weights that modules share stay one weight; biases, norms and embeddings included."""
    make, batches = MODELS[name]
    model, twin = make(), make()
    adapter = graft.attach(model, "full", targets=targets)
    seen = tiny.train(model, adapter.optimizer(lr=3e-3, total_steps=5, weight_decay=0.1), batches(), 5)
    wanted = by_torch(twin, set(adapter.deltas), batches(), 5)
    assert seen == pytest.approx(wanted, abs=1e-5)
    for path, delta in adapter.deltas.items():
        for key, value in twin.get_submodule(path).named_parameters(recurse=False):
            # AdamW divides by the root of tiny second moments, so rounding of gradients near zero (key biases) shows
            torch.testing.assert_close(getattr(delta.copy, key).detach(), value.detach(), atol=2e-3 if key == "bias" else 1e-4, rtol=1e-3)


def test_every_weight_is_copied_once() -> None:
    """Tied weights have one copy and one gradient; the base is not it."""
    model = tiny.llama(tied=True)
    adapter = graft.attach(model, "full", targets="all")
    assert adapter.deltas["lm_head"].copy.weight is adapter.deltas["model.embed_tokens"].copy.weight
    assert adapter.parameter_count == sum(p.numel() for p in tiny.llama(tied=True).parameters())
    own = {p.data_ptr() for p in adapter.parameters()}
    assert not own & {p.data_ptr() for t in find_targets(model, "all") for p in t.module.parameters(recurse=False)}


def test_small_steps_on_a_low_precision_base_are_not_lost() -> None:
    """The copy is fp32: 50 steps of 1e-5 add up, where bf16 near 1 would round each of them away."""
    model = layer(bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    adapter = graft.attach(model, "full")
    optimizer = adapter.bind(torch.optim.SGD(adapter.parameters(), lr=1e-5), 50)
    (delta,) = adapter.deltas.values()
    for _ in range(50):
        delta.weight()[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(delta.weight()[0], torch.full((6, 9), 1 - 50e-5))
    assert (model[0].weight == 1).all()


@pytest.mark.parametrize("make", [tiny.llama, tiny.bert])
def test_all_targets_of_a_low_precision_model_run_and_train(make) -> None:
    """Norms with fp32 copies read bf16 inputs and answer in bf16."""
    model = make().to(torch.bfloat16)
    batch = (tiny.causal_batches if make is tiny.llama else tiny.classifier_batches)(1)[0]
    base = model(**batch).logits
    adapter = graft.attach(model, "full", targets="all")
    logits = model(**batch).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, base, atol=0.02, rtol=0.02)
    model(**batch).loss.backward()
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert all(p.grad is not None for name, d in adapter.deltas.items() for p in d.parameters() if "token_type" not in name)


def test_without_the_base_the_copy_takes_its_storage() -> None:
    """keep_base=False: the same memory, trained in place, in the base's own precision."""
    model = tiny.llama().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    adapter = graft.attach(model, "full", keep_base=False)
    for delta in adapter.deltas.values():
        assert delta.copy.weight.data_ptr() == delta.target.module.weight.data_ptr()
        assert delta.copy.weight.dtype == torch.bfloat16
    tiny.train(model, adapter.optimizer(lr=1e-2, total_steps=2), tiny.causal_batches(), 2)
    changed = {n.removesuffix(".weight") for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert changed == set(adapter.deltas)


def test_without_the_base_detaching_reads_it_again_or_says_that_it_cannot() -> None:
    model = tiny.llama()
    original = copy.deepcopy(model.state_dict())
    for reloads in (False, True):
        adapter = graft.attach(model, "full", keep_base=False)
        tiny.train(model, adapter.optimizer(lr=1e-2, total_steps=2), tiny.causal_batches(), 2)
        if reloads:
            model.graft_reload = tiny.llama
            graft.detach(model)
            assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
        else:
            with pytest.raises(graft.GraftError, match="load it again"):
                graft.detach(model)
            model = tiny.llama()
