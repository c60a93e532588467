"""Adapters on a model: names, training, callbacks, heads, tied weights, composition."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.core.callback import Callback
from graft.core.delta import OptimiserPart
from tests import tiny

# PEFT 0.21.2 reads an attribute that transformers 5 renamed, and reports our key 'graft' beside its own.
quiet_peft = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", r"ignore:Unexpected keyword arguments \['graft'\]:UserWarning"
)


def logits(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    batch = batch or tiny.causal_batches(1)[0]
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def disturb(adapter: graft.Adapter, seed: int = 1) -> graft.Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapter


def untouched(model: nn.Module) -> bool:
    clean = not any("forward" in m.__dict__ or "graft" in m._modules for m in model.modules())
    return clean and graft.adapters_of(model) == {} and all(p.requires_grad for p in model.parameters()) and not model._forward_pre_hooks


# ---- attaching -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a.b", "a b", "ä", "../up", "a/b"])
def test_names_that_cannot_be_module_names(name: str) -> None:
    model = tiny.llama()
    with pytest.raises(graft.GraftError, match="letters, digits"):
        graft.attach(model, "lora", rank=2, name=name)
    assert untouched(model)


def test_a_name_that_is_taken() -> None:
    model = tiny.llama()
    adapter = disturb(graft.attach(model, "lora", rank=2))
    expected = logits(model)
    with pytest.raises(graft.GraftError, match="'default' is attached already"):
        graft.attach(model, "dora", rank=2)
    assert graft.adapters_of(model) == {"default": adapter}
    assert torch.equal(logits(model), expected)


def test_detaching_what_is_not_there() -> None:
    model = tiny.llama()
    with pytest.raises(graft.GraftError, match="none is attached"):
        graft.detach(model, "x")
    graft.detach(model)  # nothing to do is no mistake
    graft.attach(model, "lora", rank=2, name="reviews")
    with pytest.raises(graft.GraftError, match="'reviews'"):
        graft.detach(model, "review")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "lroa"}, "'lora'"),
        ({"method": 3}, "give a method's name"),
        ({"method": "lora", "rank": 0}, "rank is 0"),
        ({"method": "lora", "rank": 21}, "20 x 36"),  # k and v of the tiny Llama
        ({"method": "lora", "ranks": 3}, "'rank'"),
        ({"method": "lora", "rank": 2, "modules_to_save": ["lm_haed"]}, "'lm_head'"),
        ({"method": "lora", "rank": 2, "modules_to_save": ["q_proj"]}, "in modules_to_save"),
        ({"method": "shira", "mask": "snip", "rank": 2}, "calibration"),
        ({"method": "adalora", "rank": 9, "initial_rank": 4}, "above initial_rank"),
        ({"method": "s2ft", "targets": "q_proj"}, "roles q"),
    ],
)
def test_a_refused_attach_leaves_the_model_as_it_was(arguments: dict[str, Any], match: str) -> None:
    model = tiny.llama()
    expected = logits(model)
    with pytest.raises(graft.GraftError, match=match):
        graft.attach(model, **arguments)
    assert untouched(model)
    assert torch.equal(logits(model), expected)


def test_a_start_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny.llama()
    expected = logits(model)
    with pytest.raises(graft.GraftError, match="no loss"):  # found out in the middle of prepare(), with the deltas in place
        graft.attach(model, "lora-ga", rank=2, calibration=[{"input_ids": torch.ones(1, 3, dtype=torch.long)}])
    with pytest.raises(graft.GraftError, match="choose rank 10 or less"):
        graft.attach(model, "lora-ga", rank=12, calibration=tiny.causal_batches(1))
    with pytest.raises(graft.GraftError, match="sets the factors A and B"):
        graft.attach(model, graft.Hydra(rank=2), init=graft.EVA(), calibration=tiny.causal_batches(1))
    assert untouched(model)
    assert torch.equal(logits(model), expected)


def test_facts() -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "lora", rank=3, targets=["q_proj"], name="a", seed=4)
    assert repr(adapter) == "Adapter('a', lora, 2 targets, 456 parameters)"  # 2 * 3 * (40 + 36)
    assert adapter.pairs().keys() == adapter.deltas.keys()
    assert all(pair.scale == 2.0 and pair.A.shape == (3, 36) and pair.B.shape == (40, 3) for pair in adapter.pairs().values())


# ---- training ------------------------------------------------------------------------------------------------------------


def test_a_callback_that_was_never_bound() -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "adalora", **tiny.settings("adalora"))
    batch = tiny.causal_batches(1)[0]
    logits(model)
    model.train()
    with pytest.raises(graft.GraftError, match=r"not bound to an optimizer.*adapter.bind"):
        model(**batch)
    with torch.no_grad():
        model(**batch)  # looking at the loss is no training
    adapter.active = False
    model(**batch)
    adapter.active = True
    adapter.bind(torch.optim.AdamW(adapter.parameters()), total_steps=3)
    model(**batch).loss.backward()


def test_parameters_that_the_optimizer_lacks() -> None:
    adapter = graft.attach(tiny.llama(), "lora", rank=2)
    with pytest.raises(graft.GraftError, match=r"27 of 28 trained parameters.* not in the optimizer"):
        adapter.bind(torch.optim.SGD(adapter.parameters()[:1], lr=0.1), total_steps=3)
    assert not adapter.bound
    with pytest.raises(graft.GraftError, match="total_steps is 0"):
        adapter.optimizer(lr=0.1, total_steps=0)


def test_training_while_merged() -> None:
    model = tiny.llama()
    adapter = disturb(graft.attach(model, "lora", rank=2))
    adapter.merge()
    model.train()
    with pytest.raises(graft.GraftError, match="merged, so training would not change it; call unmerge"):
        model(**tiny.causal_batches(1)[0])
    adapter.unmerge()
    model(**tiny.causal_batches(1)[0]).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())


class Recorder(Callback):
    """Writes down what happened when."""

    def __init__(self, penalty: float = 0.0):
        self.calls: list[str] = []
        self.strength = penalty

    def on_start(self) -> None:
        self.calls.append(f"start/{self.total_steps}")

    def before_forward(self) -> None:
        self.calls.append("forward")

    def penalty(self) -> Tensor | None:
        return self.strength * sum(p.square().sum() for p in self.adapter.parameters()) / 2 if self.strength else None

    def before_update(self, step: int) -> None:
        self.calls.append(f"before {step}")

    def after_update(self, step: int) -> None:
        self.calls.append(f"after {step}")

    def on_phase(self, name: str) -> None:
        self.calls.append(name)

    def before_eval(self) -> None:
        self.calls.append("eval")

    def on_export(self) -> None:
        self.calls.append("export")


def test_schedules_count_updates_not_forwards(tmp_path: Path) -> None:
    model, recorder = tiny.llama(), Recorder()
    adapter = graft.attach(model, "lora", rank=2, callbacks=[recorder])
    optimizer = adapter.optimizer(lr=0.01, total_steps=2)
    model.train()
    for _ in range(2):
        for batch in tiny.causal_batches(2):  # gradient accumulation
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    logits(model)
    adapter.phase("next task")
    adapter.before_eval()
    adapter.save(tmp_path)
    adapter.merge()
    steps = ["forward", "forward", "before 0", "after 0", "forward", "forward", "before 1", "after 1"]
    assert recorder.calls == ["start/2", *steps, "next task", "eval", "export", "export"]
    assert adapter.step == 2


def test_binding_again_replaces_the_hooks() -> None:
    recorder = Recorder()
    adapter = graft.attach(tiny.llama(), "lora", rank=2, callbacks=[recorder])
    first, second = (adapter.bind(torch.optim.SGD(adapter.parameters(), lr=0.1), total_steps=2) for _ in range(2))
    second.step()
    first.step()
    assert recorder.calls == ["start/2", "start/2", "before 0", "after 0"]


def test_penalties_are_added_once_an_update() -> None:
    adapter = graft.attach(tiny.llama(), "lora", rank=2, callbacks=[Recorder(penalty=0.5), Recorder(penalty=0.25)])
    disturb(adapter)
    before = [p.detach().clone() for p in adapter.parameters()]
    optimizer = adapter.bind(torch.optim.SGD(adapter.parameters(), lr=0.1), total_steps=2)
    adapter.parameters()[0].grad = torch.ones_like(before[0])
    optimizer.step()
    expected = [value - 0.1 * 0.75 * value for value in before]
    expected[0] = expected[0] - 0.1
    for parameter, value in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_a_closure_would_hide_its_gradients_from_callbacks() -> None:
    adapter = graft.attach(tiny.llama(), "lora", rank=2, callbacks=[Recorder()])
    optimizer = adapter.optimizer(lr=0.1, total_steps=2)
    with pytest.raises(graft.GraftError, match="before step"):
        optimizer.step(lambda: torch.zeros(()))


def test_the_state_of_another_adapter_is_refused() -> None:
    state = graft.attach(tiny.llama(), "lora", rank=2).state_dict()
    other = graft.attach(tiny.llama(), "lora", rank=3)
    before = {name: value.clone() for name, value in other.tensors().items()}
    with pytest.raises(graft.GraftError, match=r"does not fit adapter 'default' at model.layers.0.self_attn.q_proj"):
        other.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in other.tensors().items())


def test_a_state_that_fits_in_part_changes_nothing() -> None:
    adapter = graft.attach(tiny.llama(), "lora", rank=2)
    state = {name: torch.ones_like(value) if isinstance(value, Tensor) else value for name, value in adapter.state_dict().items()}
    state.pop("tensors.model.layers.1.mlp.down_proj.B")
    before = {name: value.clone() for name, value in adapter.tensors().items()}
    with pytest.raises(graft.GraftError, match=r"at model.layers.1.mlp.down_proj.B"):
        adapter.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in adapter.tensors().items())


def test_two_adapters_train_apart() -> None:
    model = tiny.llama()
    first = graft.attach(model, "lora", rank=2, name="first")
    second = graft.attach(model, "lora", rank=2, name="second", seed=1)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    frozen = {name: value.clone() for name, value in second.tensors().items()}
    tiny.train(model, first.optimizer(lr=0.1, total_steps=2), tiny.causal_batches(2), 2)
    assert all(torch.equal(value, frozen[name]) for name, value in second.tensors().items())


# ---- heads ---------------------------------------------------------------------------------------------------------------


@quiet_peft
def test_a_head_is_trained_saved_and_loaded_along(tmp_path: Path) -> None:
    import peft

    model, batches = tiny.bert(), tiny.classifier_batches()
    before = model.classifier.weight.detach().clone()
    adapter = graft.attach(model, "lora", rank=3, targets="attention", modules_to_save=["classifier"])
    assert adapter.whole_targets == {"classifier"}
    assert adapter.parameter_count == 2 * 4 * 3 * (36 + 36) + 3 * 36 + 3
    tiny.train(model, adapter.optimizer(lr=0.05, total_steps=4), batches, 4)
    head = adapter.deltas["classifier"].weight()[0].detach()
    assert (head - before).abs().max() > 0.01
    assert torch.equal(model.classifier.weight, before)
    expected = logits(model, batches[0])
    adapter.save(tmp_path)
    fresh = tiny.bert()
    assert torch.equal(logits(fresh, batches[0]), logits(tiny.bert(), batches[0]))
    loaded = graft.load_adapter(fresh, tmp_path)
    assert loaded.modules_to_save == ("classifier",)
    assert torch.equal(logits(fresh, batches[0]), expected)
    loaded.merge()
    torch.testing.assert_close(logits(fresh, batches[0]), expected, rtol=1e-5, atol=1e-5)
    graft.detach(fresh)
    assert torch.equal(fresh.classifier.weight, before)
    theirs = peft.PeftModel.from_pretrained(tiny.bert(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, batches[0]), expected, rtol=1e-5, atol=1e-5)
    assert (logits(tiny.bert(), batches[0]) - expected).abs().max() > 0.01


@quiet_peft
def test_a_classifier_without_a_trained_head_fits_peft(tmp_path: Path) -> None:
    import peft

    batch = tiny.classifier_batches(1)[0]
    model = tiny.bert()
    disturb(graft.attach(model, "lora", rank=3)).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.bert(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), rtol=1e-5, atol=1e-5)


@quiet_peft
def test_a_head_that_peft_trained(tmp_path: Path) -> None:
    import peft

    batch = tiny.classifier_batches(1)[0]
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(tiny.bert(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 if "classifier" in name else 0.02)
    theirs.save_pretrained(str(tmp_path))
    model = tiny.bert()
    adapter = graft.load_adapter(model, tmp_path)
    assert "classifier" in adapter.modules_to_save
    torch.testing.assert_close(logits(model, batch), logits(theirs, batch), rtol=1e-5, atol=1e-5)


def test_a_new_head_does_not_make_another_base(tmp_path: Path) -> None:
    """The head is the adapter's own: a base whose fresh head was drawn from another seed still fits."""
    adapter = disturb(graft.attach(tiny.bert(), "lora", rank=3, modules_to_save=["classifier"]))
    adapter.save(tmp_path)
    other = tiny.bert()
    with torch.no_grad():
        other.classifier.weight.normal_()
    graft.load_adapter(other, tmp_path)
    batch = tiny.classifier_batches(1)[0]
    assert torch.equal(logits(other, batch), logits(adapter.model, batch))


# ---- targets that leave ----------------------------------------------------------------------------------------------------


def test_a_dropped_target_is_the_base_again(tmp_path: Path) -> None:
    model = tiny.llama()
    originals = copy.deepcopy(model)
    adapter = disturb(graft.attach(model, "lora", rank=3))
    name = "model.layers.1.mlp.down_proj"
    adapter.drop_target(name)
    x = torch.randn(2, 52)
    assert name not in adapter.deltas
    assert "forward" not in model.get_submodule(name).__dict__
    assert torch.equal(model.get_submodule(name)(x), originals.get_submodule(name)(x))
    expected = logits(model)
    adapter.save(tmp_path)
    fresh = tiny.llama()
    assert len(graft.load_adapter(fresh, tmp_path).deltas) == 13
    assert torch.equal(logits(fresh), expected)
    graft.detach(model)
    assert untouched(model)


# ---- composition ---------------------------------------------------------------------------------------------------------


def test_parts_compose() -> None:
    model, recorder = tiny.llama(), Recorder()
    adapter = graft.attach(model, graft.LoRA(rank=3), init=graft.EVA(), callbacks=[recorder], calibration=tiny.causal_batches(2))
    assert adapter.method == "eva"
    assert sum(delta.rank for delta in adapter.deltas.values()) == 3 * 14
    by_name = graft.attach(tiny.llama(), "eva", rank=3, calibration=tiny.causal_batches(2))
    assert all(torch.equal(value, by_name.tensors()[name]) for name, value in adapter.tensors().items())
    tiny.train(model, adapter.optimizer(lr=0.01, total_steps=2), tiny.causal_batches(2), 2)
    assert recorder.calls[-1] == "after 1"


def test_a_start_fits_another_delta(tmp_path: Path) -> None:
    model = tiny.llama()
    expected = logits(model)
    adapter = graft.attach(model, graft.DoRA(rank=3), init=graft.LoRAGA(), calibration=tiny.causal_batches(2))
    assert adapter.method == "custom"
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    disturb(adapter).save(tmp_path)
    fresh = tiny.llama()
    graft.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_compositions_without_a_meaning() -> None:
    model = tiny.llama()
    with pytest.raises(graft.GraftError, match="belong into LoRA"):
        graft.attach(model, graft.LoRA(rank=3), rank=4)

    class Second(OptimiserPart):
        pass

    with pytest.raises(graft.GraftError, match="one optimiser"):
        graft.attach(model, "galore", optimiser=Second())
    assert untouched(model)


# ---- tied weights --------------------------------------------------------------------------------------------------------


def test_lora_on_a_tied_embedding_leaves_the_head_alone() -> None:
    model, batch = tiny.llama(tied=True), tiny.causal_batches(1)[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter = disturb(graft.attach(model, "lora", rank=3, targets="embedding"))
    head = torch.randn(3, 36)
    assert torch.equal(model.lm_head(head), torch.nn.functional.linear(head, model.model.embed_tokens.weight))
    B, A = adapter.deltas["model.embed_tokens"].factors()
    expected = model.model.embed_tokens.weight[batch["input_ids"]] + (B @ A).T[batch["input_ids"]]
    torch.testing.assert_close(model.model.embed_tokens(batch["input_ids"]), expected)


def test_full_copies_tied_weights_once(tmp_path: Path) -> None:
    model = tiny.llama(tied=True)
    adapter = graft.attach(model, "full", targets=["embed_tokens", "lm_head"])
    assert adapter.parameter_count == 61 * 36
    # the reference: torch itself on a model whose tied weight is the only one that trains
    twin = tiny.llama(tied=True)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter is twin.lm_head.weight)
    batches = tiny.causal_batches(3)
    tiny.train(twin, torch.optim.AdamW([twin.lm_head.weight], lr=0.01, weight_decay=0.0), batches, 3)
    tiny.train(model, adapter.optimizer(lr=0.01, total_steps=3), batches, 3)
    torch.testing.assert_close(adapter.deltas["lm_head"].weight()[0].detach(), twin.lm_head.weight.detach())
    torch.testing.assert_close(logits(model), logits(twin))
    adapter.save(tmp_path)
    fresh = tiny.llama(tied=True)
    loaded = graft.load_adapter(fresh, tmp_path)
    assert loaded.parameter_count == 61 * 36
    assert torch.equal(logits(fresh), logits(model))
    graft.detach(model)
    assert untouched(model)
    assert torch.equal(logits(model), logits(tiny.llama(tied=True)))


def test_a_container_that_calls_its_children_stays_as_it_is() -> None:
    """nn.Sequential runs whatever children it has: attaching must not give it another one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    x, children = torch.randn(4, 5), list(model.children())
    before = model(x)
    adapter = graft.attach(model, "randlora", rank=2)
    assert list(model.children()) == children
    assert torch.equal(model(x), before)
    assert "shared" not in dict(model.named_children())
    assert adapter.shared is not None
    model.double()
    assert next(iter(adapter.shared.buffers())).dtype == torch.float64  # what deltas share moves with the model
    graft.detach(model)
    assert torch.equal(model.float()(x), before)


def test_an_adapter_loaded_for_use_is_not_trained_by_accident(tmp_path: Path) -> None:
    graft.attach(tiny.llama(), "lora", rank=2).save(tmp_path / "a")
    used = graft.load_adapter(tiny.llama(), tmp_path / "a")
    assert used.parameters() == []
    with pytest.raises(graft.GraftError, match="was loaded for use, not for training; load it with trainable=True"):
        used.optimizer(lr=1e-3, total_steps=1)
    again = graft.load_adapter(tiny.llama(), tmp_path / "a", trainable=True)
    assert len(again.optimizer(lr=1e-3, total_steps=1).param_groups[0]["params"]) == 2 * 14


def test_tied_modules_to_save_stay_tied() -> None:
    model = tiny.llama(tied=True)
    adapter = graft.attach(model, "lora", rank=2, modules_to_save=["embed_tokens", "lm_head"])
    copies = [adapter.deltas[name].copy.weight for name in ("model.embed_tokens", "lm_head")]
    assert copies[0] is copies[1]


def test_a_module_to_save_that_holds_nothing_to_train_is_refused() -> None:
    with pytest.raises(graft.GraftError, match="holds no linear map, convolution, embedding or norm to train"):
        graft.attach(tiny.llama(), "lora", rank=2, modules_to_save=["rotary_emb"])


def test_parts_that_would_undo_or_ignore_each_other_are_refused() -> None:
    batches = tiny.causal_batches(2)
    with pytest.raises(graft.GraftError, match="an adapter has one start, but LoRAGA, EVA were given"):
        graft.attach(tiny.llama(), "lora-ga", rank=2, init=graft.EVA(), calibration=batches)
    adapter = graft.attach(tiny.llama(), graft.LoRA(rank=2, lr_ratio=4.0), optimiser=graft.GaLore(rank=2))
    with pytest.raises(graft.GraftError, match="GaLore has one learning rate and would ignore that LoRA asks for several"):
        adapter.optimizer(lr=1e-3, total_steps=2)


def test_the_loss_of_rounding_does_not_depend_on_how_it_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from graft.core import slot

    generator = torch.Generator().manual_seed(0)
    base, exact = torch.randn(2, 13, 7, generator=generator)
    stored = exact.to(torch.bfloat16)
    wanted = float((stored.double() - exact.double()).norm() / (exact - base).double().norm())
    for chunk in (1, 20, 1 << 16):
        monkeypatch.setattr(slot, "CHUNK", chunk)
        assert slot.rounding_loss(base, exact, stored) == pytest.approx(wanted, rel=1e-6)


def test_the_fingerprint_does_not_depend_on_how_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from graft.core import hashing

    whole = hashing.fingerprint(tiny.llama())
    monkeypatch.setattr(hashing, "CHUNK", 7)
    assert hashing.fingerprint(tiny.llama()) == whole
    changed = tiny.llama()
    with torch.no_grad():
        changed.lm_head.weight[-1, -1] += 1
    assert hashing.fingerprint(changed) != whole


def test_a_merged_copy_does_not_follow_the_training() -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "full")
    adapter.merge()
    batch = {name: value for name, value in tiny.causal_batches(1)[0].items() if name != "labels"}
    before = model(**batch).logits
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(**batch).logits, before)
