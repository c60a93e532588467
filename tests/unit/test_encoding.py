"""Rows as token ids: where the loss is, what is cut, how batches are padded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft import GraftError
from graft.data.encoding import IGNORED, collator, encode, encode_prompt, prompt_text
from graft.data.reading import Row, Table, read
from tests import folders

TEMPLATED, PLAIN = folders.tokenizer(True), folders.tokenizer(False)


def _table(kind: str, *rows: dict[str, str]) -> Table:
    return Table([Row(row, f"f:{i}") for i, row in enumerate(rows, 1)], kind, Path("f"))  # type: ignore[arg-type]


def test_the_loss_is_on_the_answer_and_its_end_only() -> None:
    example = encode(_table("answers", {"prompt": "the film", "answer": "very good"}), TEMPLATED, 40).examples[0]
    whole = TEMPLATED.apply_chat_template(
        [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "very good"}], tokenize=False
    ).rstrip()
    assert TEMPLATED.decode(example["input_ids"]).split() == whole.split()
    learned = [i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED]
    assert TEMPLATED.decode(learned).split() == ["very", "good", "</s>"]
    assert [label for label in example["labels"] if label != IGNORED] == learned


def test_without_a_template_the_answer_follows_the_prompt() -> None:
    example = encode(_table("answers", {"prompt": "the film", "answer": "good"}), PLAIN, 40).examples[0]
    assert PLAIN.decode(example["input_ids"]).split() == ["the", "film", "good</s>"] or PLAIN.decode(example["input_ids"]).split()[:2] == [
        "the",
        "film",
    ]
    assert example["labels"][:2] == [IGNORED, IGNORED]
    assert example["labels"][2] != IGNORED


@given(st.lists(st.sampled_from(folders.WORDS), min_size=1, max_size=60), st.integers(9, 40))
def test_a_long_prompt_loses_its_end_and_keeps_the_template(words: list[str], room: int) -> None:
    ids, cut = encode_prompt(TEMPLATED, " ".join(words), room)
    assert len(ids) <= room
    frame = TEMPLATED(prompt_text(TEMPLATED, ""), add_special_tokens=False).input_ids
    kept = len(ids) - len(frame)
    assert cut == (len(words) + len(frame) > room)
    assert kept == min(len(words), room - len(frame))
    assert ids == TEMPLATED(prompt_text(TEMPLATED, " ".join(words[:kept])), add_special_tokens=False).input_ids


def test_an_answer_that_does_not_fit_names_its_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "good"}) + "\n" + json.dumps({"prompt": "a", "answer": "good " * 30}) + "\n")
    with pytest.raises(GraftError, match=r"d\.jsonl:2: the answer takes 31 tokens .* more than max_length = 20"):
        encode(read(path), TEMPLATED, 20)


def test_shortened_rows_are_counted() -> None:
    rows = [{"prompt": "very " * n, "answer": "good"} for n in (2, 50, 60)]
    encoded = encode(_table("answers", *rows), TEMPLATED, 24)
    assert encoded.shortened == 2
    assert max(len(e["input_ids"]) for e in encoded.examples) <= 24


def test_labels_are_indices_and_unknown_ones_are_refused() -> None:
    table = _table("labels", {"text": "good film", "label": "b"}, {"text": "bad " * 30, "label": "a"})
    encoded = encode(table, PLAIN, 16, ["a", "b"])
    assert [e["labels"] for e in encoded.examples] == [1, 0]
    assert encoded.shortened == 1
    with pytest.raises(GraftError, match=r"f:1 has the label 'b', which the model does not know; it knows a, c"):
        encode(table, PLAIN, 16, ["a", "c"])


def test_long_texts_become_several_examples_and_nothing_is_lost() -> None:
    words = [folders.WORDS[i % len(folders.WORDS)] for i in range(50)]
    encoded = encode(_table("text", {"text": " ".join(words)}), PLAIN, 16)
    ids = [i for example in encoded.examples for i in example["input_ids"]]
    assert ids == [*PLAIN(" ".join(words)).input_ids, PLAIN.eos_token_id]


def test_batches_are_padded_at_the_end() -> None:
    batch = collator(7)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
