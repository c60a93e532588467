"""Evaluation against plain loops over single rows, and rules that fit the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import graft
from graft.data.encoding import encode
from graft.data.reading import read
from graft.training.evaluate import Evaluation, evaluate, generate
from tests import folders


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    return graft.load(folders.causal(tmp_path_factory.mktemp("model")))


def _log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:  # type: ignore[no-untyped-def]
    """One row, no batch, no padding: the plain definition."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    start = tokenizer(text, add_special_tokens=False).input_ids
    end = tokenizer(f"{answer} </s>", add_special_tokens=False).input_ids
    with torch.no_grad():
        scores = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
    return float(sum(scores[len(start) + i - 1, token] for i, token in enumerate(end)))


@pytest.mark.parametrize("choices", [["good", "bad", "cold"], ["very good", "very bad", "cold"]])
def test_choices_agree_with_row_by_row_scores(causal, tmp_path: Path, choices: list[str]) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = causal
    prompts = [" ".join(folders.WORDS[i : i + 2 + i % 5]) for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": choices[i % 3]}) + "\n" for i, p in enumerate(prompts)))
    result = evaluate(model, tokenizer, read(tmp_path / "d.jsonl"), max_length=40, batch_size=5)
    firsts = {choice.split()[0] for choice in choices}
    for prompt, said in zip(prompts, result.predictions, strict=True):
        if len(firsts) == 3:  # told apart by the first token alone
            text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
            with torch.no_grad():
                last = model(torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])).logits[0, -1]
            scores = {choice: float(last[tokenizer.convert_tokens_to_ids(choice)]) for choice in choices}
        else:
            scores = {choice: _log_likelihood(model, tokenizer, prompt, choice) for choice in choices}
        assert scores[said] >= max(scores.values()) - 1e-5
    assert ("first token" in result.rule) == (len(firsts) == 3)


def test_many_answers_are_generated(causal, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = causal
    said = generate(model, tokenizer, "the film", 4)
    rows = [{"prompt": "the film", "answer": said.upper()}] + [{"prompt": f"the {w}", "answer": w * 2} for w in folders.WORDS[:21]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(model, tokenizer, read(tmp_path / "d.jsonl"), max_length=40, batch_size=7)
    assert "greedy generation" in result.rule
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the film"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    alone = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert said == tokenizer.decode(alone, skip_special_tokens=True).strip()


@pytest.mark.parametrize(("method", "times"), [("fourierft", 1), ("randlora", 1), ("lora", 0)])
def test_a_dense_update_is_formed_once_however_much_is_generated(
    causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, times: int
) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = causal
    table = read(folders.answers(tmp_path / "rows.jsonl", 6), kind="answers")
    adapter = graft.attach(model, method, targets="attention", **({"rank": 4} if method != "fourierft" else {"count": 40}))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    formed: list[str] = []
    kind = type(next(iter(adapter.deltas.values())))
    plain = kind.weight
    monkeypatch.setattr(kind, "weight", lambda self: formed.append(self.target.name) or plain(self))
    try:
        unmerged = evaluate(model, tokenizer, table, choices=(), match="number", new_tokens=5)  # it trains, so it stays as it is
        assert len(formed) == 0 if method == "lora" else len(formed) > 5 * len(adapter.deltas)
        adapter.freeze()
        formed.clear()
        seen = evaluate(model, tokenizer, table, choices=(), match="number", new_tokens=5)
        assert sorted(formed) == sorted([*adapter.deltas] * times)
        assert not adapter.merged
        assert seen.predictions == unmerged.predictions
        assert seen.losses == unmerged.losses
        base = evaluate_without(adapter, model, tokenizer, table)
        assert not torch.allclose(torch.tensor(seen.losses), torch.tensor(base.losses), rtol=1e-3)
        formed.clear()
        assert generate(model, tokenizer, "a film", 5)
        assert sorted(formed) == sorted([*adapter.deltas] * times)
    finally:
        graft.detach(model)


def evaluate_without(adapter: graft.Adapter, model, tokenizer, table) -> Evaluation:  # type: ignore[no-untyped-def]
    adapter.active = False
    try:
        return evaluate(model, tokenizer, table, choices=(), match="number", new_tokens=5)
    finally:
        adapter.active = True


def test_text_loss_is_the_mean_over_tokens(causal, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = causal
    table = read(folders.text(tmp_path / "d.jsonl", 7))
    result = evaluate(model, tokenizer, table, max_length=16, batch_size=3)
    total, count = 0.0, 0
    for example in encode(table, tokenizer, 16).examples:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert result.metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result.metrics["tokens"] == count


def test_answers_that_begin_alike_are_told_apart_where_they_differ(causal, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = causal
    choices, prompts = ["very good", "very bad"], [" ".join(folders.WORDS[i : i + 3]) for i in range(9)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": choices[i % 2]}) + "\n" for i, p in enumerate(prompts)))
    result = evaluate(model, tokenizer, read(tmp_path / "d.jsonl"), max_length=40, batch_size=4)
    assert result.rule == "likeliest of 2 answers by its first token that differs"
    for index, prompt in enumerate(prompts):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        with torch.no_grad():
            last = model(torch.tensor([tokenizer(f"{text} very", add_special_tokens=False).input_ids])).logits[0, -1]
        two = last[[tokenizer.convert_tokens_to_ids("good"), tokenizer.convert_tokens_to_ids("bad")]].log_softmax(0)
        assert result.predictions[index] == choices[int(two.argmax())]
        assert result.losses[index] == pytest.approx(-float(two[index % 2]), abs=1e-5)
        assert result.correct[index] == (result.predictions[index] == choices[index % 2])


def test_choices_that_the_table_does_not_have(causal, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = causal
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "the film", "answer": "good"}) + "\n")
    result = evaluate(model, tokenizer, read(tmp_path / "d.jsonl"), max_length=40, choices=["good", "bad", "cold"])
    assert "likeliest of 3 answers" in result.rule
    assert result.losses[0] > 0


def test_losses_of_generated_answers_are_the_answers_own(causal, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = causal
    rows = [{"prompt": f"the {word}", "answer": f"{word} film"} for word in folders.WORDS[:21]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(model, tokenizer, read(tmp_path / "d.jsonl"), max_length=40, batch_size=5)
    for row, loss in zip(rows, result.losses, strict=True):
        assert loss == pytest.approx(-_log_likelihood(model, tokenizer, row["prompt"], row["answer"]) / 3, abs=1e-5)


def test_losses_of_labels_and_text(tmp_path: Path) -> None:
    labelled = read(folders.labels(tmp_path / "labels.jsonl", 11))
    model, tokenizer = graft.load(folders.encoder(tmp_path / "encoder"), task="classification", labels=["bad", "good"])
    result = evaluate(model, tokenizer, labelled, batch_size=3)
    for row, loss in zip(labelled.rows, result.losses, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        assert loss == pytest.approx(-float(logits.log_softmax(0)[["bad", "good"].index(row["label"])]), abs=1e-5)
    assert result.metrics["loss"] == pytest.approx(sum(result.losses) / 11)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [("That is 3 + 4 = 7.", "7.0", True), ("The answer is 1,200.", "1200", True), ("7 or 8", "7", False), ("none", "7", False), ("-3", "3", False),
     ("It is .5", "0.5", True), ("5 - 2 = 3", "3", True)],
)  # fmt: skip
def test_the_last_number_counts(said: str, answer: str, right: bool) -> None:
    from graft.training.evaluate import _same_number

    assert _same_number(said, answer) is right
