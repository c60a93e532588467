"""What a model is worth on data: accuracy on answers and labels, perplexity on text; and what it says to a prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.core.adapter import adapters_of
from graft.core.calibration import evaluating
from graft.data.encoding import IGNORED, Encoded, answer_text, collator, encode, encode_prompt, tokens
from graft.data.reading import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CHOICES = 20  # up to so many distinct answers, a row is a choice among them
Progress = Callable[[int, int], None]  # (rows done, of how many)
Match = Literal["exact", "number"]


@dataclass(frozen=True)
class Evaluation:
    """The figures, how they were found, and what lies behind them row by row.

    ``predictions``: what was said to each row (empty for plain text); ``correct``: whether it was right (empty for plain text);
    ``losses``: the negative log-likelihood of the right answer in nats: among the choices or labels where there are some, else the
    mean over its tokens (for plain text one for each piece of at most ``max_length`` tokens).
    """

    metrics: dict[str, float]
    rule: str
    predictions: list[str]
    correct: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Table,
    *,
    max_length: int = 512,
    batch_size: int = 16,
    choices: Sequence[str] | None = None,
    match: Match = "exact",
    new_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores the model on a table, in eval mode.

    ``answers``: with at most 20 ``choices`` (by default the table's distinct answers) the likeliest of them is taken: by the first token
    that tells them all apart, else by the whole answer's likelihood. Otherwise greedy generation of up to ``new_tokens`` (by default the
    longest answer's) must give the answer, compared without case and spaces; with ``match="number"`` its last number must equal the
    answer. ``labels``: the head's largest logit. ``text``: mean loss a token, and perplexity.
    """
    with evaluating(model), merged(model):
        if table.kind == "labels":
            return _by_head(model, tokenizer, table, max_length, batch_size, progress)
        if table.kind == "text":
            return _by_loss(model, tokenizer, table, max_length, batch_size, progress)
        choices = sorted({*table.labels, *choices}) if choices is not None else table.labels
        if match == "exact" and len(choices) <= MAX_CHOICES:
            return _by_choice(model, tokenizer, table, choices, max_length, batch_size, progress)
        return _by_generation(model, tokenizer, table, match, new_tokens, max_length, batch_size, progress)


def _batches(lengths: Sequence[int], batch_size: int, progress: Progress | None) -> Any:
    """Indices in batches of similar length, the longest first, so that memory is known at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
        if progress:
            progress(min(start + batch_size, len(order)), len(order))


def _accuracy(table: Table, column: str, predictions: list[str], losses: list[float], rule: str, match: Match = "exact") -> Evaluation:
    same = _same_number if match == "number" else _same_text
    correct = [same(said, row[column]) for said, row in zip(predictions, table.rows, strict=True)]
    metrics = {"accuracy": sum(correct) / len(table), "loss": sum(losses) / len(table), "rows": len(table)}
    return Evaluation(metrics, rule, predictions, correct, losses)


def _same_text(said: str, answer: str) -> bool:
    return _plain(said) == _plain(answer)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def _same_number(said: str, answer: str) -> bool:
    numbers = [_last_number(text) for text in (said, answer)]
    return None not in numbers and math.isclose(*numbers, rel_tol=1e-6, abs_tol=1e-9)  # type: ignore[arg-type]


def _last_number(text: str) -> float | None:
    found = re.findall(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?|(?<!\d)-?\.\d+", text)
    return float(found[-1].replace(",", "")) if found else None


def _last_logits(model: PreTrainedModel, ids: list[list[int]], pad: int) -> Tensor:
    """The logits [rows, vocabulary] after each row's last token."""
    batch = collator(pad)([{"input_ids": row, "labels": [IGNORED] * len(row)} for row in ids])
    device = next(model.parameters()).device
    hidden = model.base_model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).last_hidden_state
    ends = torch.tensor([len(row) - 1 for row in ids], device=device)
    logits: Tensor = model.get_output_embeddings()(hidden[torch.arange(len(ids), device=device), ends])
    return logits.float()


def _by_choice(
    model: Any, tokenizer: Any, table: Table, choices: list[str], max_length: int, batch_size: int, progress: Progress | None
) -> Evaluation:
    endings = [tokens(tokenizer, answer_text(tokenizer, "x", choice)) for choice in choices]
    longest = max(map(len, endings))
    prompts = [encode_prompt(tokenizer, row["prompt"], max_length - longest)[0] for row in table.rows]
    shared = _common_start(endings)
    deciding = [ending[len(shared)] for ending in endings if len(ending) > len(shared)]
    by_token = len(set(deciding)) == len(choices)
    right = {choice: index for index, choice in enumerate(choices)}
    predictions, losses = [""] * len(prompts), [0.0] * len(prompts)
    for indices in _batches([len(p) for p in prompts], batch_size, progress):
        if by_token:
            scores = _last_logits(model, [prompts[i] + shared for i in indices], tokenizer.pad_token_id)[:, deciding]
        else:
            scores = _likelihoods(model, [prompts[i] for i in indices], endings, tokenizer.pad_token_id)
        for index, best, logs in zip(indices, scores.argmax(1).tolist(), scores.log_softmax(1), strict=True):
            predictions[index], losses[index] = choices[best], -float(logs[right[table.rows[index]["answer"]]])
    first = "first token" if not shared else "first token that differs"
    return _accuracy(table, "answer", predictions, losses, f"likeliest of {len(choices)} answers by its {first if by_token else 'whole text'}")


def _common_start(sequences: list[list[int]]) -> list[int]:
    """The tokens that all sequences begin with."""
    length = 0
    while all(len(s) > length for s in sequences) and len({s[length] for s in sequences}) == 1 and len(sequences) > 1:
        length += 1
    return sequences[0][:length]


def _likelihoods(model: Any, prompts: list[list[int]], endings: list[list[int]], pad: int) -> Tensor:
    """The log-likelihood [rows, endings] of each ending after each prompt."""
    columns = []
    for ending in endings:
        examples = [{"input_ids": prompt + ending, "labels": [IGNORED] * len(prompt) + ending} for prompt in prompts]
        columns.append(-_token_losses(model, collator(pad)(examples)).sum(1))
    return torch.stack(columns, 1)


def _token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss [rows, positions - 1] of every labelled token; zero elsewhere."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.float().transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none")


def _by_generation(
    model: Any, tokenizer: Any, table: Table, match: Match, new_tokens: int | None, max_length: int, batch_size: int, progress: Progress | None
) -> Evaluation:
    room = new_tokens or max(len(tokens(tokenizer, answer_text(tokenizer, "x", row["answer"]))) for row in table.rows)
    prompts = [encode_prompt(tokenizer, row["prompt"], max_length - room)[0] for row in table.rows]
    predictions = [""] * len(prompts)
    for indices in _batches([len(p) for p in prompts], batch_size, progress):
        for index, said in zip(indices, _generate(model, tokenizer, [prompts[i] for i in indices], room), strict=True):
            predictions[index] = said
    losses = mean_losses(model, tokenizer, encode(table, tokenizer, max_length), batch_size)
    rule = f"greedy generation of up to {room} tokens, {'last number' if match == 'number' else 'exact match'}"
    return _accuracy(table, "answer", predictions, losses, rule, match)


@torch.inference_mode()
def mean_losses(model: Any, tokenizer: Any, encoded: Encoded, batch_size: int = 16, progress: Progress | None = None) -> list[float]:
    """The mean loss a labelled token of every example (nats)."""
    losses = [0.0] * len(encoded)
    for indices in _batches([len(e["input_ids"]) for e in encoded.examples], batch_size, progress):
        batch = collator(tokenizer.pad_token_id)([encoded[i] for i in indices])
        counts = (batch["labels"][:, 1:] != IGNORED).sum(1)
        for index, loss in zip(indices, (_token_losses(model, batch).sum(1).cpu() / counts).tolist(), strict=True):
            losses[index] = loss
    return losses


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> list[str]:
    longest, pad, device = max(map(len, prompts)), tokenizer.pad_token_id, next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    said = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id
    )
    return [text.strip() for text in tokenizer.batch_decode(said[:, longest:], skip_special_tokens=True)]


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 128) -> str:
    """What the model says to a prompt, greedily, through its chat template where it has one."""
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - new_tokens
    ids, _ = encode_prompt(tokenizer, prompt, room)
    with merged(model):
        return _generate(model, tokenizer, [ids], new_tokens)[0]


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """The model with its adapter merged where it would form W' for every batch and every token of an answer: the same bits, once.

    Adapters that are being trained, have a way of their own, or act beside others run as they are.
    """
    active = [adapter for adapter in adapters_of(model).values() if adapter.active]
    if len(active) != 1 or active[0].merged or active[0].trainable or not any(delta.dense for delta in active[0].deltas.values()):
        yield
        return
    active[0].merge()
    try:
        yield
    finally:
        active[0].unmerge()


def _by_head(model: Any, tokenizer: Any, table: Table, max_length: int, batch_size: int, progress: Progress | None) -> Evaluation:
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    encoded = encode(table, tokenizer, max_length, names)
    predictions, losses = [""] * len(table), [0.0] * len(table)
    device = next(model.parameters()).device
    for indices in _batches([len(e["input_ids"]) for e in encoded.examples], batch_size, progress):
        batch = collator(tokenizer.pad_token_id)([encoded[i] for i in indices])
        logits = model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).logits.float().cpu()
        own = F.cross_entropy(logits, batch["labels"], reduction="none").tolist()
        for index, best, loss in zip(indices, logits.argmax(1).tolist(), own, strict=True):
            predictions[index], losses[index] = names[best], loss
    return _accuracy(table, "label", predictions, losses, f"largest of {len(names)} logits of the head")


def _by_loss(model: nn.Module, tokenizer: Any, table: Table, max_length: int, batch_size: int, progress: Progress | None) -> Evaluation:
    encoded = encode(table, tokenizer, max_length)
    losses, counts = mean_losses(model, tokenizer, encoded, batch_size, progress), [len(e["input_ids"]) - 1 for e in encoded.examples]
    count = sum(counts)
    loss = sum(own * number for own, number in zip(losses, counts, strict=True)) / count
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": count}
    return Evaluation(metrics, "mean loss a token", [], losses=losses)
