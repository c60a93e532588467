"""What a model is worth on data: accuracy on answers and labels, perplexity on text; and what it says to a prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.data.encoding import IGNORED, answer_text, collator, encode, encode_prompt, tokens
from graft.data.reading import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CHOICES = 20  # up to so many distinct answers, a row is a choice among them
Progress = Callable[[int, int], None]  # (rows done, of how many)


@dataclass(frozen=True)
class Evaluation:
    """The figures, how they were found, and what was said to each row (empty for plain text)."""

    metrics: dict[str, float]
    rule: str
    predictions: list[str]


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Table,
    *,
    max_length: int = 512,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores the model on a table, in eval mode.

    ``answers``: with at most 20 distinct answers the likeliest of them is taken (by the first token where that tells them apart,
    else by the whole answer's likelihood), otherwise greedy generation must give the answer, compared without case and spaces.
    ``labels``: the head's largest logit. ``text``: mean loss a token, and perplexity.
    """
    was_training = model.training
    model.eval()
    try:
        if table.kind == "labels":
            return _by_head(model, tokenizer, table, max_length, batch_size, progress)
        if table.kind == "text":
            return _by_loss(model, tokenizer, table, max_length, batch_size, progress)
        if len(table.labels) <= MAX_CHOICES:
            return _by_choice(model, tokenizer, table, max_length, batch_size, progress)
        return _by_generation(model, tokenizer, table, max_length, batch_size, progress)
    finally:
        model.train(was_training)


def _batches(lengths: Sequence[int], batch_size: int, progress: Progress | None) -> Any:
    """Indices in batches of similar length, the longest first, so that memory is known at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
        if progress:
            progress(min(start + batch_size, len(order)), len(order))


def _accuracy(table: Table, column: str, predictions: list[str], rule: str) -> Evaluation:
    right = sum(_plain(said) == _plain(row[column]) for said, row in zip(predictions, table.rows, strict=True))
    return Evaluation({"accuracy": right / len(table), "rows": len(table)}, rule, predictions)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def _last_logits(model: PreTrainedModel, ids: list[list[int]], pad: int) -> Tensor:
    """The logits [rows, vocabulary] after each row's last token."""
    batch = collator(pad)([{"input_ids": row, "labels": [IGNORED] * len(row)} for row in ids])
    device = next(model.parameters()).device
    hidden = model.base_model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).last_hidden_state
    ends = torch.tensor([len(row) - 1 for row in ids], device=device)
    logits: Tensor = model.get_output_embeddings()(hidden[torch.arange(len(ids), device=device), ends])
    return logits.float()


def _by_choice(model: Any, tokenizer: Any, table: Table, max_length: int, batch_size: int, progress: Progress | None) -> Evaluation:
    choices = table.labels
    endings = [tokens(tokenizer, answer_text(tokenizer, "x", choice)) for choice in choices]
    longest = max(map(len, endings))
    prompts = [encode_prompt(tokenizer, row["prompt"], max_length - longest)[0] for row in table.rows]
    predictions = [""] * len(prompts)
    by_first = len({ending[0] for ending in endings}) == len(choices)
    for indices in _batches([len(p) for p in prompts], batch_size, progress):
        if by_first:
            scores = _last_logits(model, [prompts[i] for i in indices], tokenizer.pad_token_id)[:, [ending[0] for ending in endings]]
        else:
            scores = _likelihoods(model, [prompts[i] for i in indices], endings, tokenizer.pad_token_id)
        for index, best in zip(indices, scores.argmax(1).tolist(), strict=True):
            predictions[index] = choices[best]
    rule = f"likeliest of {len(choices)} answers by its {'first token' if by_first else 'whole text'}"
    return _accuracy(table, "answer", predictions, rule)


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


def _by_generation(model: Any, tokenizer: Any, table: Table, max_length: int, batch_size: int, progress: Progress | None) -> Evaluation:
    room = max(len(tokens(tokenizer, answer_text(tokenizer, "x", row["answer"]))) for row in table.rows)
    prompts = [encode_prompt(tokenizer, row["prompt"], max_length - room)[0] for row in table.rows]
    predictions = [""] * len(prompts)
    for indices in _batches([len(p) for p in prompts], batch_size, progress):
        for index, said in zip(indices, _generate(model, tokenizer, [prompts[i] for i in indices], room), strict=True):
            predictions[index] = said
    return _accuracy(table, "answer", predictions, f"greedy generation of up to {room} tokens, exact match")


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
    return _generate(model, tokenizer, [ids], new_tokens)[0]


def _by_head(model: Any, tokenizer: Any, table: Table, max_length: int, batch_size: int, progress: Progress | None) -> Evaluation:
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    encoded, predictions = encode(table, tokenizer, max_length, names), [""] * len(table)
    device = next(model.parameters()).device
    for indices in _batches([len(e["input_ids"]) for e in encoded.examples], batch_size, progress):
        batch = collator(tokenizer.pad_token_id)([encoded[i] for i in indices])
        logits = model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).logits
        for index, best in zip(indices, logits.argmax(1).tolist(), strict=True):
            predictions[index] = names[best]
    return _accuracy(table, "label", predictions, f"largest of {len(names)} logits of the head")


def _by_loss(model: nn.Module, tokenizer: Any, table: Table, max_length: int, batch_size: int, progress: Progress | None) -> Evaluation:
    encoded = encode(table, tokenizer, max_length)
    total, count = 0.0, 0
    for indices in _batches([len(e["input_ids"]) for e in encoded.examples], batch_size, progress):
        batch = collator(tokenizer.pad_token_id)([encoded[i] for i in indices])
        total += float(_token_losses(model, batch).sum())
        count += int((batch["labels"][:, 1:] != IGNORED).sum())
    loss = total / count
    return Evaluation({"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": count}, "mean loss a token", [])
