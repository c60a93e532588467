"""Fused models against the models themselves: the same outputs, losses and gradients, and everything given back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import graft
from graft.core.target import SLOT
from graft.data.batching import packing_collator, packs, real_tokens
from graft.data.encoding import IGNORED, collator
from graft.kernels.dropout import dropout
from graft.training.fuse import ATTENTION, causal_loss
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attention_dropout": 0.0,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def made(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A random causal model of transformers, with weights of a size at which every part matters, and norms that are not all ones."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
        model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        return model

    return make


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama": made("Llama"),
    "llama-tied-bias": made("Llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": made("Qwen2"),
    "qwen3": made("Qwen3"),
    "mistral-window": made("Mistral", sliding_window=4),
    "gemma": made("Gemma"),
    "gemma2": made("Gemma2", final_logit_softcapping=5.0, attn_logit_softcapping=5.0, sliding_window=16),
    "gemma3": made("Gemma3Text", sliding_window=4),
    "granite": made("Granite", logits_scaling=8.0, residual_multiplier=0.3, attention_multiplier=0.2),
    "cohere": made("Cohere"),
    "olmo2": made("Olmo2"),
    "phi3": made("Phi3"),
    "neox": made("GPTNeoX", **NO_DROPOUT),
    "mixtral": made("Mixtral", experts_implementation="eager"),
    "gpt2": tiny.gpt2,
}
# What must be found, and what must be left alone.
FOUND = {
    "llama": {"norm": 5, "gated MLP": 2, "rotary": 2, "attention": 1, "loss": 1},
    "qwen2": {"norm": 5, "gated MLP": 2, "rotary": 2, "attention": 1, "loss": 1},
    "qwen3": {"norm": 9, "gated MLP": 2, "rotary": 2, "attention": 1, "loss": 1},
    "mistral-window": {"norm": 5, "gated MLP": 2, "rotary": 2, "attention": 1, "loss": 1},
    "gemma": {"gated MLP": 2, "rotary": 2, "attention": 1, "loss": 1},  # its norms multiply by 1 + w
    "gemma2": {"gated MLP": 2, "rotary": 2},  # capped attention and capped logits
    "gemma3": {"gated MLP": 2, "rotary": 2, "attention": 1, "loss": 1},
    "granite": {"norm": 5, "gated MLP": 2, "rotary": 2, "attention": 1},  # scaled logits
    "cohere": {"gated MLP": 2, "attention": 1},  # scaled logits, and another rotation
    "gpt2": {"dropout": 7, "attention": 1, "loss": 1},
}
every_causal = pytest.mark.parametrize("name", CAUSAL)


def adapted(name: str, **options: Any) -> nn.Module:
    model = CAUSAL[name]()
    disturb(graft.attach(model, **{"method": "lora", "rank": 3, **options}))
    return model


def disturb(adapter: graft.Adapter, size: float = 0.1) -> graft.Adapter:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter._all_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return adapter


def examples(seed: int = 0) -> list[dict[str, list[int]]]:
    """Of different lengths; every other one has labels on its second half only."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate((9, 4, 5, 7)):
        ids = torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist()
        skip = length // 2 if index % 2 else 0
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [IGNORED] * skip + ids[skip:]})
    return made


def full() -> dict[str, Any]:
    ids = torch.randint(3, tiny.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def padded() -> dict[str, Any]:
    return collator(0)(examples())


def packed() -> dict[str, Any]:
    return packing_collator(0)(examples())


def padded_left() -> dict[str, Any]:
    batch = padded()
    lengths = batch["attention_mask"].sum(1)
    return {key: torch.stack([row.roll(len(row) - int(n)) for row, n in zip(value, lengths, strict=True)]) for key, value in batch.items()}


def answers_counted() -> dict[str, Any]:
    return {**tiny.causal_batches(1)[0], "num_items_in_batch": torch.tensor(17)}


BATCHES = [full, padded, padded_left, packed, answers_counted]


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, *batches: dict[str, Any]) -> list[Tensor]:
    """The loss and the gradients of a training step, accumulated over the batches."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    model.eval()
    return [torch.stack(losses).sum(), *(torch.zeros(()) if p.grad is None else p.grad.clone() for p in trained(model))]


def truth(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The same from logits in fp64 and the definition of the loss: every token from those before it."""
    exact = copy.deepcopy(model).double()
    exact.train()
    batch = dict(batch)
    labels, count = batch.pop("labels"), batch.pop("num_items_in_batch", None)
    logits = exact(**batch).logits
    total, number = 0, 0
    for row, words in zip(logits, labels, strict=True):
        for position in range(len(words) - 1):
            if words[position + 1] != IGNORED:
                total, number = total - row[position].log_softmax(0)[words[position + 1]], number + 1
    loss = total / (number if count is None else count)
    gradients = torch.autograd.grad(loss, trained(exact), allow_unused=True)
    return [loss.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


def error(one: Tensor, two: Tensor) -> float:
    one, two = one.detach().double(), two.detach().double()
    return float((one - two).norm() / two.norm().clamp(min=1e-12))


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("labels", "num_items_in_batch")}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_bits(seen: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in seen.items())


def own_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


# ---- the same function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUND)
def test_parts_that_are_fused(name: str) -> None:
    assert dict(graft.fuse(CAUSAL[name]()).parts) == FOUND[name]


@every_causal
def test_logits_are_those_of_the_model(name: str) -> None:
    """In eval mode, with and without gradients, whatever the padding."""
    model = adapted(name)
    batches = [inputs(batch()) for batch in BATCHES]
    wanted = [model(**batch).logits.detach() for batch in batches]
    graft.fuse(model)
    for batch, logits in zip(batches, wanted, strict=True):
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
        with torch.no_grad():
            assert error(model(**batch).logits[real], logits[real]) < 1e-5
        assert error(model(**batch).logits[real], logits[real]) < 1e-5


@every_causal
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.__name__)
def test_a_training_step_is_that_of_the_model(name: str, batch: Callable[[], dict[str, Any]]) -> None:
    """As near to the truth in fp64 as the model itself comes in fp32, up to a few roundings."""
    model, given = adapted(name), batch()
    if batch is packed and not packs(model):
        pytest.skip(f"{name} does not pack")
    wanted, plain = truth(model, given), step(model, given)
    if (name, batch) == ("gemma2", padded_left):
        wanted = plain  # a row of attention that is all padding is not a number in fp64, in the model itself
    assert graft.fuse(model).parts
    for seen, own, exact in zip(step(model, given), plain, wanted, strict=True):
        assert error(seen, exact) <= max(1e-5, 4 * error(own, exact))


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_gradients_accumulate_over_batches(name: str) -> None:
    model = adapted(name)
    batches = [{**batch, "num_items_in_batch": torch.tensor(40)} for batch in (padded(), full(), packed())]
    wanted = step(model, *batches)
    graft.fuse(model)
    for seen, own in zip(step(model, *batches), wanted, strict=True):
        assert error(seen, own) < 1e-4


def assert_as_near(seen: list[Tensor], plain: list[Tensor], wanted: list[Tensor]) -> None:
    """As near to the truth as the model itself in bf16: half as far again at most, over all gradients together."""
    far, own = (torch.cat([(a.double() - b).flatten() for a, b in zip(found[1:], wanted[1:], strict=True)]).norm() for found in (seen, plain))
    assert far <= 1.5 * own
    assert error(seen[0], wanted[0]) <= max(0.01, 1.5 * error(plain[0], wanted[0]))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "neox", "granite", "mistral-window"])
@pytest.mark.parametrize("batch", [full, padded, packed], ids=lambda batch: batch.__name__)
def test_a_training_step_in_bf16(name: str, batch: Callable[[], dict[str, Any]]) -> None:
    model, given = adapted(name), batch()
    wanted = truth(model, given)
    model.bfloat16()
    plain = step(model, given)
    assert graft.fuse(model).parts["attention"] == (name != "gemma2")
    assert_as_near(step(model, given), plain, wanted)


@pytest.mark.parametrize("name", ["llama", "qwen3", "cohere", "gpt2"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_training_step_under_autocast(name: str, p: float) -> None:
    """The Trainer's ``bf16=True`` on an fp32 model; with dropout in the attention it runs by other products."""
    model = adapted(name)
    wanted = truth(model, padded())
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = p
    graft.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        seen = step(model, padded())
    assert all(gradient.isfinite().all() for gradient in seen)
    if p == 0:
        far = torch.cat([g.flatten() for g in seen[1:]]).double() - torch.cat([g.flatten() for g in wanted[1:]])
        assert far.norm() <= 0.1 * torch.cat([g.flatten() for g in wanted[1:]]).norm()
        assert error(seen[0], wanted[0]) < 0.01


@pytest.mark.parametrize("padding", [True, False])
def test_a_classifier_is_that_of_the_model(padding: bool) -> None:
    """BERT: attention both ways, no causal loss."""
    model = tiny.bert()
    disturb(graft.attach(model, "lora", rank=3))
    batch = tiny.classifier_batches(1)[0]
    if padding:
        batch["attention_mask"][0, 4:] = 0
    else:
        del batch["attention_mask"]  # then the attention is given no mask at all
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model.to(dtype)
        wanted, logits = step(model, batch), model(**batch).logits
        fused = graft.fuse(model)
        assert fused.parts == {"dropout": 8, "attention": 1}
        assert error(model(**batch).logits, logits) <= tolerance
        for seen, own in zip(step(model, batch), wanted, strict=True):
            assert error(seen, own) <= tolerance
        fused.undo()


@pytest.mark.parametrize("row", list(graft.methods()), ids=lambda row: row.name)
def test_every_method_trains_on_a_fused_model_as_without(row: Any) -> None:
    results = []
    for fusing in (False, True):
        model = CAUSAL["llama"]()
        options = {"calibration": tiny.causal_batches(2)} if row.needs else {}
        adapter = disturb(graft.attach(model, row.name, **tiny.settings(row.name), **options))
        adapter.bind(torch.optim.SGD(adapter.parameters(), lr=0.0), total_steps=5)
        if fusing:
            assert graft.fuse(model).parts["loss"] == (row.name != "lisa")  # which trains the head
        results.append(step(model, padded()))
    for seen, own in zip(results[1], results[0], strict=True):
        assert error(seen, own) < 1e-4


class OddRMSNorm(nn.Module):
    """Passes for a norm on single rows, and is another function inside the model."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        return y if x.ndim == 2 else 2 * y


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "to-be-frozen"])
def test_a_model_that_does_not_agree_as_a_whole_is_left_as_it_is(frozen: bool) -> None:
    model = CAUSAL["llama"]()
    model.model.norm = OddRMSNorm(model.model.norm)
    if frozen:
        model.requires_grad_(False)
    wanted = model(**inputs(padded())).logits
    assert graft.fuse(model).parts in ({}, {"loss": 1})
    assert own_forwards(model) in ([], [""])
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs(padded())).logits, wanted)


# ---- the loss --------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_next_token() -> None:
    """By hand: 2 rows of 3 positions, of which the second label of row 0 and the third of row 1 count."""
    hidden, weight = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, 4, dtype=torch.float64)
    labels = torch.tensor([[5, 2, IGNORED], [1, IGNORED, 6]])
    wanted = F.cross_entropy((weight @ hidden[0, 0])[None], labels[0, 1:2]) + F.cross_entropy((weight @ hidden[1, 1])[None], labels[1, 2:3])
    torch.testing.assert_close(causal_loss(hidden, weight, labels), wanted / 2)
    torch.testing.assert_close(causal_loss(hidden, weight, labels, 10), wanted / 10)
    torch.testing.assert_close(causal_loss(hidden, weight, labels, torch.tensor(10)), wanted / 10)
    (seen,), (own,) = torch.autograd.grad(causal_loss(hidden, weight, labels), hidden), torch.autograd.grad(wanted / 2, hidden)
    torch.testing.assert_close(seen, own)


def test_a_batch_without_labels_to_learn_is_what_the_model_says() -> None:
    """Not a number as a mean of nothing, zero divided by a given number."""
    model, batch = adapted("llama"), full()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    graft.fuse(model)
    model.train()
    assert model(**batch).loss.isnan()
    loss, *gradients = step(model, {**batch, "num_items_in_batch": torch.tensor(9)})
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients)


def test_logits_are_formed_where_they_are_asked_for() -> None:
    model, batch = adapted("llama"), padded()
    assert graft.fuse(model).parts["loss"]
    assert model(**batch).logits is not None
    model.train()
    assert model(**batch).logits is None
    assert model(**inputs(batch)).logits.shape == (*batch["input_ids"].shape, tiny.VOCABULARY)
    assert model(**batch, output_hidden_states=True).logits is not None
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    loss, logits = model(**batch, return_dict=False)[:2]
    torch.testing.assert_close(loss, model(**batch).loss)
    assert logits.shape[-1] == tiny.VOCABULARY
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 3


@pytest.mark.parametrize("kind", ["adapted", "trained"])
def test_a_head_that_is_trained_gets_its_gradients(kind: str) -> None:
    """Its logits are formed as before: the fused loss is for frozen heads."""
    model = CAUSAL["llama"]()
    if kind == "adapted":
        disturb(graft.attach(model, "lora", rank=3, targets=("q_proj", "lm_head")))
    else:
        disturb(graft.attach(model, "lora", rank=3))
        model.lm_head.weight.requires_grad_(True)
    wanted = truth(model, padded())
    graft.fuse(model)
    for seen, exact in zip(step(model, padded()), wanted, strict=True):
        assert error(seen, exact) < 1e-5
    assert model.train()(**padded()).logits is not None


@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_that_are_trained_get_their_gradients(when: str) -> None:
    model = adapted("qwen3")
    fused = None if when == "before" else graft.fuse(model)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    wanted = truth(model, padded())
    fused = fused or graft.fuse(model)
    assert fused.parts["norm"] == 9
    for seen, exact in zip(step(model, padded()), wanted, strict=True):
        assert error(seen, exact) < 1e-4


# ---- dropout ---------------------------------------------------------------------------------------------------------------


def test_dropout_modules_drop_their_share_in_training_only() -> None:
    torch.manual_seed(0)
    model = tiny.gpt2()
    model.config.attn_pdrop = 0.0
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.25
    graft.attach(model, "lora", rank=3)
    batch = full()
    wanted = model(**batch).logits
    graft.fuse(model)
    assert error(model(**batch).logits, wanted) < 1e-6
    model.train()
    module, x = model.transformer.drop, torch.ones(300, 500)
    torch.manual_seed(5)
    y = module(x)
    torch.manual_seed(5)
    assert torch.equal(y, dropout(x, 0.25))
    assert abs((y == 0).double().mean() - 0.25) <= 5 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert not torch.equal(model(**batch).loss, model(**batch).loss)
    model.eval()
    assert torch.equal(module(x), x)
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_the_loss_with_dropout_is_that_of_the_model_on_average() -> None:
    """Dropout everywhere, also in the attention; the means of 300 losses differ by what chance gives (five standard deviations)."""
    found = []
    for fusing in (False, True):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=tiny.VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2,
            attn_pdrop=0.4, embd_pdrop=0.2, resid_pdrop=0.2, initializer_range=0.5,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        graft.attach(model, "lora", rank=2)
        if fusing:
            assert graft.fuse(model).parts == {"dropout": 4, "attention": 1, "loss": 1}
        model.train()
        torch.manual_seed(1)
        found.append(torch.stack([model(**full()).loss.detach() for _ in range(300)]))
    plain, fused = found
    assert plain.std() > 0.01
    assert abs(plain.mean() - fused.mean()) <= 5 * ((plain.var() + fused.var()) / 300).sqrt()
    assert 0.75 < plain.std() / fused.std() < 1.33  # the spread of 300 is known to 4 %


# ---- everything given back -------------------------------------------------------------------------------------------------


@every_causal
def test_nothing_but_forwards_changes_and_undo_gives_all_back(name: str) -> None:
    model = CAUSAL[name]()
    before, names, attention = bits(model), [n for n, _ in model.named_parameters()], model.config._attn_implementation
    logits = model(**inputs(padded())).logits
    fused = graft.fuse(model)
    assert_bits(bits(model), before)
    assert [n for n, _ in model.named_parameters()] == names
    assert not any(SLOT in module._modules for module in model.modules())
    assert (model.config._attn_implementation == ATTENTION) == (fused.parts["attention"] == 1)
    fused.undo()
    assert not own_forwards(model)
    assert not fused.parts
    assert model.config._attn_implementation == attention
    assert_bits(bits(model), before)
    assert torch.equal(model(**inputs(padded())).logits, logits)
    fused.undo()  # once more does nothing
    assert torch.equal(model(**inputs(padded())).logits, logits)


ORDERS = [
    ("fuse", "attach", "detach", "undo"),
    ("fuse", "attach", "undo", "detach"),
    ("attach", "fuse", "detach", "undo"),
    ("attach", "fuse", "undo", "detach"),
    ("fuse", "attach", "undo", "fuse", "detach", "undo"),
    ("attach", "fuse", "detach", "attach", "undo", "detach"),
    ("fuse", "fuse", "attach", "detach", "undo"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("targets", ["linear", "norm", "head"])
def test_in_every_order_the_base_comes_back(order: tuple[str, ...], targets: str) -> None:
    model = CAUSAL["llama"]()
    before, logits = bits(model), model(**inputs(padded())).logits
    method = "full" if targets == "norm" else "lora"
    all_fused: list[Any] = []
    for index, act in enumerate(order):
        if act == "fuse":
            all_fused.append(graft.fuse(model))
        elif act == "undo":
            for fused in all_fused:
                fused.undo()
        elif act == "attach":
            disturb(graft.attach(model, method, targets=targets, **({} if method == "full" else {"rank": 3})))
        else:
            graft.detach(model)
        if "attach" not in order[: index + 1]:
            assert error(model(**inputs(padded())).logits, logits) < 1e-5
    assert not own_forwards(model)
    assert model.config._attn_implementation == "sdpa"
    assert_bits(bits(model), before)
    assert torch.equal(model(**inputs(padded())).logits, logits)


@pytest.mark.parametrize("targets", ["linear", "norm", "head"])
@pytest.mark.parametrize("order", [("fuse", "attach"), ("attach", "fuse"), ("fuse", "attach", "undo"), ("fuse", "fuse", "attach")], ids="-".join)
def test_in_every_order_an_adapter_trains_alike(order: tuple[str, ...], targets: str) -> None:
    results = []
    for fusing in (False, True):
        model = CAUSAL["llama"]()
        fused = []
        for act in order:
            if act == "attach":
                method = "full" if targets == "norm" else "lora"
                disturb(graft.attach(model, method, targets=targets, **({} if method == "full" else {"rank": 3})))
            elif fusing and act == "fuse":
                fused.append(graft.fuse(model))
            elif fusing:
                fused[0].undo()
        results.append(step(model, padded()))
    for seen, own in zip(results[1], results[0], strict=True):
        assert error(seen, own) < 1e-5


def test_fusing_twice_changes_nothing() -> None:
    model = adapted("llama")
    first = graft.fuse(model)
    answered = {name: model.get_submodule(name).forward for name in own_forwards(model)}
    second = graft.fuse(model)
    assert not second.parts
    assert {name: model.get_submodule(name).forward for name in own_forwards(model)} == answered
    second.undo()
    assert model.config._attn_implementation == ATTENTION
    first.undo()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fused_first", [True, False])
def test_a_copy_of_a_fused_model_runs_on_its_own_weights(fused_first: bool) -> None:
    model = CAUSAL["llama"]()
    if fused_first:
        graft.fuse(model)
    disturb(graft.attach(model, "lora", rank=3))
    if not fused_first:
        graft.fuse(model)
    wanted, other = step(model, padded()), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for seen, own in zip(step(other, padded()), wanted, strict=True):
        assert torch.equal(seen, own)


def test_the_signature_stays() -> None:
    """The Trainer reads from it which columns of the data to keep."""
    import inspect

    model = CAUSAL["llama"]()
    wanted = inspect.signature(model.forward)
    graft.attach(model, "lora", rank=3)
    graft.fuse(model)
    assert inspect.signature(model.forward) == wanted
    assert packs(model)


def test_an_adapter_trained_on_a_fused_model_is_that_of_the_base(tmp_path: Path) -> None:
    model = CAUSAL["llama"]()
    adapter = graft.attach(model, "lora", rank=3)
    graft.fuse(model)
    losses = tiny.train(model, adapter.optimizer(lr=1e-2, total_steps=12), tiny.causal_batches(1), 12)
    assert losses[-1] < losses[0] - 0.5
    batch = inputs(tiny.causal_batches(1)[0])
    wanted = model(**batch).logits
    adapter.save(tmp_path / "adapter")
    base = CAUSAL["llama"]()
    graft.load_adapter(base, tmp_path / "adapter")
    assert error(base(**batch).logits, wanted) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_generation_goes_on_as_before(name: str) -> None:
    model = adapted(name)
    ids = full()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    graft.fuse(model)
    assert torch.equal(model.generate(ids, **options), wanted)


def test_checkpointing_of_activations_gives_the_same_step() -> None:
    model = adapted("llama")
    wanted = step(model, padded())
    graft.fuse(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for seen, own in zip(step(model, padded()), wanted, strict=True):
        assert error(seen, own) < 1e-5


def test_a_model_that_token_ids_do_not_run_is_refused_in_one_sentence() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    for model in (tiny.vit(), t5):
        with pytest.raises(graft.GraftError, match="does not run on token ids alone"):
            graft.fuse(model)
        assert not own_forwards(model)


def test_a_body_without_a_head_is_fused() -> None:
    model = CAUSAL["llama"]().model
    batch = inputs(padded())
    real = batch["attention_mask"].bool()
    wanted = model(**batch).last_hidden_state
    assert graft.fuse(model).parts == {"norm": 5, "gated MLP": 2, "rotary": 2, "attention": 1}
    assert error(model(**batch).last_hidden_state[real], wanted[real]) < 1e-5


def test_padding_is_where_real_tokens_are_not() -> None:
    """What the padded and packed batches of these tests rest on."""
    assert real_tokens(padded()).sum() == sum(len(example["input_ids"]) for example in examples())
    assert padded()["attention_mask"].sum() < padded()["attention_mask"].numel()
    assert len(packed()["input_ids"]) < 4
