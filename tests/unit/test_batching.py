"""Packed batches train what padded ones train, boundaries hold, and bucketed order keeps every row."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.masking_utils import find_packed_sequence_indices

import graft
from graft import GraftError
from graft.data.batching import BucketedOrder, DataOrder, first_fit, packing_collator, packs, real_tokens
from graft.data.encoding import IGNORED, collator
from tests import tiny

PAD = 0
SIZES = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": PAD,
}  # fmt: skip
WINDOW = {**SIZES, "sliding_window": 4}
LENGTHS = [9, 3, 12, 1, 5, 4, 2, 7, 3]


def build(name: str, attention: str = "eager", **settings: Any) -> nn.Module:
    """A random causal model; the name is that of transformers, without ``Config``."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings, attn_implementation=attention)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "Llama": lambda attention: build("Llama", attention, **SIZES),
    "Qwen2": lambda attention: build("Qwen2", attention, **{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "Mistral with a window": lambda attention: build("Mistral", attention, **WINDOW),
    "Gemma 2": lambda attention: build("Gemma2", "eager", **WINDOW, query_pre_attn_scalar=8),
    "Gemma 3": lambda attention: build("Gemma3Text", attention, **WINDOW, query_pre_attn_scalar=8),
    "GPT-2": lambda attention: build("GPT2", attention, vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                     resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}  # fmt: skip


def examples_of(lengths: list[int], seed: int = 0, text: bool = True) -> list[dict[str, Any]]:
    """Examples of these lengths; of a text table, or with labels on the second half only."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(1, tiny.VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": list(ids) if text else [IGNORED] * (length // 2) + ids[length // 2 :]})
    return made


def token_losses(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """The sum of the token losses in the model's own precision, and their number."""
    logits, labels = model(**{**batch, "labels": None}).logits[:, :-1], batch["labels"][:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"), int((labels != IGNORED).sum())


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    token_losses(model, batch)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


LLAMA = MODELS["Llama"]("sdpa").double()


# ---- packing ----------------------------------------------------------------------------------------------------------------


# Eager attention takes its softmax in fp32, where the fp64 mask of a padded batch under a sliding window would overflow.
@pytest.mark.parametrize("text", [True, False], ids=["text", "answers"])
@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [(name, "sdpa", torch.float64) for name in MODELS if name != "Gemma 2"] + [(name, "eager", torch.float32) for name in MODELS],
)
def test_loss_and_gradients_are_those_of_the_padded_batch(name: str, attention: str, dtype: torch.dtype, text: bool) -> None:
    model, examples = MODELS[name](attention).to(dtype), examples_of(LENGTHS, text=text)
    exact = dtype == torch.float64
    padded, packed = collator(PAD)(examples), packing_collator(PAD)(examples)
    assert packs(model)
    assert len(packed["input_ids"]) == 4 < len(examples)
    (expected, count), (found, number) = token_losses(model, padded), token_losses(model, packed)
    assert number == count
    torch.testing.assert_close(found, expected, rtol=1e-12 if exact else 1e-6, atol=0)
    torch.testing.assert_close(model(**packed).loss, model(**padded).loss, rtol=1e-6, atol=0)  # transformers computes it in fp32
    wanted = gradients(model, padded)
    assert wanted.keys() == dict(model.named_parameters()).keys()
    # Norms sum their gradients in fp32 in either case.
    torch.testing.assert_close(gradients(model, packed), wanted, rtol=1e-5 if exact else 1e-4, atol=1e-7 if exact else 1e-5)


def test_the_gradients_of_an_adapter_are_those_of_the_padded_batch() -> None:
    model = MODELS["Llama"]("sdpa")
    adapter = graft.attach(model, "lora", rank=3)
    with torch.no_grad():
        for pair in adapter.pairs().values():
            pair.B.normal_(std=0.3)  # from B = 0 the gradient of A would be zero on both sides
    examples = examples_of(LENGTHS)
    model.train()
    assert packs(model)
    assert model.training
    wanted = gradients(model, collator(PAD)(examples))
    assert len(wanted) == len(adapter.parameters())
    assert all(gradient.any() for gradient in wanted.values())
    torch.testing.assert_close(gradients(model, packing_collator(PAD)(examples)), wanted, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.booleans())
def test_losses_are_equal_for_all_lengths(lengths: list[int], text: bool) -> None:
    examples = examples_of(lengths, text=text)
    with torch.no_grad():
        (expected, count), (found, number) = (token_losses(LLAMA, c(PAD)(examples)) for c in (collator, packing_collator))
    assert number == count
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.booleans())
def test_the_segments_that_transformers_finds_are_the_examples(lengths: list[int], text: bool) -> None:
    examples = examples_of(lengths, text=text)
    batch = packing_collator(PAD)(examples)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "use_cache"}
    rows, room = batch["input_ids"].shape
    assert room == max(lengths)
    assert rows <= len(lengths)
    segments = find_packed_sequence_indices(batch["position_ids"])
    segments = torch.zeros_like(batch["input_ids"]) if segments is None else segments
    found, real = [], real_tokens(batch)
    for row in range(rows):
        for segment in segments[row].unique():
            ids, labels, positions, kept = (x[row][segments[row] == segment].tolist() for x in (*[batch[k] for k in batch if k != "use_cache"], real))
            assert positions == list(range(len(ids)))
            assert labels[0] == IGNORED
            assert kept == [len(ids) > 1] * len(ids)
            if ids != [PAD]:
                found.append((ids, labels[1:]))
    assert sorted(found) == sorted((e["input_ids"], e["labels"][1:]) for e in examples)
    assert real.sum() == sum(n for n in lengths if n > 1)
    padded = collator(PAD)(examples)
    assert torch.equal(real_tokens(padded), padded["attention_mask"].bool())


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(40, 60))
def test_bins_hold_everything_and_no_two_could_be_one(lengths: list[int], room: int) -> None:
    bins = first_fit(lengths, room)
    assert sorted(index for row in bins for index in row) == list(range(len(lengths)))
    loads = sorted(sum(lengths[index] for index in row) for row in bins)
    assert loads[-1] <= room
    assert len(loads) == 1 or loads[0] + loads[1] > room
    assert first_fit(lengths, room) == bins


def test_examples_of_equal_length_keep_their_rows() -> None:
    examples = examples_of([6] * 5)
    padded, packed = collator(PAD)(examples), packing_collator(PAD)(examples)
    assert torch.equal(packed["input_ids"], padded["input_ids"])
    assert torch.equal(packed["labels"][:, 1:], padded["labels"][:, 1:])
    assert packed["position_ids"].tolist() == [list(range(6))] * 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_token_sees_another_example(attention: str) -> None:
    model, examples = MODELS["Llama"](attention), examples_of([8, 4, 3, 2, 5])
    batch = packing_collator(PAD)(examples)
    for index in range(len(examples) + 1):  # each example in turn, and the padding
        changed = [{**e, "input_ids": [i % 60 + 1 for i in e["input_ids"]]} if i == index else e for i, e in enumerate(examples)]
        other = packing_collator(PAD if index < len(examples) else 60)(changed)
        where = batch["input_ids"] != other["input_ids"]
        assert where.sum() == ([len(e["input_ids"]) for e in examples] + [2])[index]
        with torch.no_grad():
            before, after = model(**batch).logits, model(**other).logits
        assert torch.equal(before[~where], after[~where])
        assert (before != after).any(-1)[where].all()


BROKEN = {
    "positions run on": lambda batch: {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]},
    "no positions": lambda batch: {**batch, "position_ids": None},
    "first labels kept": lambda batch: {**batch, "labels": batch["input_ids"].masked_fill(~real_tokens(batch), IGNORED)},
    "an attention mask": lambda batch: {**batch, "attention_mask": torch.ones_like(batch["input_ids"])},
    "a cache": lambda batch: {**batch, "use_cache": True},
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_a_packed_batch_changes_its_loss(name: str) -> None:
    """Each of these would train on wrong losses without a word; the comparison with the padded batch shows it."""
    batch = packing_collator(PAD)(examples_of(LENGTHS))
    with torch.no_grad():
        (expected, _), (found, _) = token_losses(LLAMA, batch), token_losses(LLAMA, BROKEN[name](batch))
    assert abs(found - expected) > 1e-6 * expected


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: build("Bloom", vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "positions cannot be told"),
        (lambda: build("Mamba", vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4), "states run through the row"),
        (lambda: build("OPT", vocab_size=61, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                       max_position_embeddings=64), "reads positions, but its mask knows no boundaries"),
        (lambda: build("Bert", is_decoder=False, **{k: v for k, v in SIZES.items() if "head_dim" not in k}), "attention looks both ways"),
        (tiny.bert, "one output a row"),
        (lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES)), "one output a row"),
    ],
    ids=["Bloom", "Mamba", "OPT", "BERT", "BERT classifier", "Llama classifier"],
)  # fmt: skip
def test_models_that_cannot_pack_are_found_out(model: Any, why: str) -> None:
    assert not packs(model()), why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trying_out_leaves_no_trace(dtype: torch.dtype) -> None:
    model = MODELS["Llama"]("sdpa").to(dtype).train()
    model.lm_head.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert packs(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_classes_cannot_be_packed() -> None:
    with pytest.raises(GraftError, match="one label each"):
        packing_collator(PAD)([{"input_ids": [1, 2], "labels": 1}])


# ---- order ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(1, 9), st.none() | st.integers(1, 9), st.integers(0, 2**32), st.integers(0, 5))
def test_every_row_once_an_epoch_and_updates_as_in_random_order(lengths: list[int], batch: int, pool: int | None, seed: int, epoch: int) -> None:
    order, plain = BucketedOrder(lengths, batch, seed, pool), DataOrder(len(lengths), seed)
    order.set_epoch(epoch)
    plain.set_epoch(epoch)
    rows, random = list(order), list(plain)
    assert len(order) == len(rows)
    assert list(order) == rows
    step = order.pool * batch
    for start in range(0, len(rows), step):  # in each pool: the rows of random order, and batches whose lengths do not overlap
        assert sorted(rows[start : start + step]) == sorted(random[start : start + step])
        found = [[lengths[row] for row in rows[at : min(at + batch, start + step)]] for at in range(start, min(start + step, len(rows)), batch)]
        found.sort(key=lambda batch: (max(batch), min(batch)))
        assert all(max(shorter) <= min(longer) for shorter, longer in pairwise(found))


def test_order_changes_with_seed_and_epoch_only() -> None:
    lengths = list(range(500))  # all different: in a single pool, every epoch would have the same batches
    first, again, other = BucketedOrder(lengths, 8, 1), BucketedOrder(lengths, 8, 1), BucketedOrder(lengths, 8, 2)
    torch.manual_seed(7)
    assert list(first) == list(again) != list(other)
    again.set_epoch(1)
    assert not {frozenset(rows) for rows in batches(first)} & {frozenset(rows) for rows in batches(again)}


def test_lengths_do_not_rise_and_fall_over_an_epoch() -> None:
    lengths = torch.randint(5, 200, (3200,), generator=torch.Generator().manual_seed(0)).tolist()
    longest = [max(lengths[row] for row in rows) for rows in batches(BucketedOrder(lengths, 8, 0))]
    rises = sum(a < b for a, b in pairwise(longest))
    assert 0.4 < rises / len(longest) < 0.6


def batches(order: BucketedOrder) -> list[list[int]]:
    rows = list(order)
    return [rows[start : start + order.batch_size] for start in range(0, len(rows), order.batch_size)]


def test_bucketed_batches_need_less_padding_than_random_ones() -> None:
    lengths = torch.randint(5, 200, (800,), generator=torch.Generator().manual_seed(0)).tolist()

    def positions(order: Any) -> int:
        rows = list(order)
        return sum(8 * max(lengths[row] for row in rows[start : start + 8]) for start in range(0, len(rows), 8))

    padding = positions(BucketedOrder(lengths, 8, 0)) - sum(lengths)
    assert padding < 0.15 * (positions(DataOrder(len(lengths), 0)) - sum(lengths))
