"""Rows as token ids: chat templates, loss on the answer only, honest truncation, and padding into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.core.errors import GraftError
from graft.data.reading import Row, Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a position that has no loss


@dataclass(frozen=True)
class Encoded:
    """Examples ready for batching; ``shortened`` counts the rows that were cut to fit ``max_length``."""

    examples: list[dict[str, Any]] = field(repr=False)
    shortened: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]


def encode(table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str] = ()) -> Encoded:
    """The rows of a table as examples ``{input_ids, labels}``.

    ``answers``: the chat template where there is one, loss on the answer and its end token only; a prompt that is too long loses
    its end, an answer never. ``labels``: cut at the end; the label as an index into ``labels``. ``text``: long texts become several
    examples. Raises :class:`GraftError` for an answer that does not fit and for a label that is not in ``labels``.
    """
    if table.kind == "answers":
        pairs = [_encode_answer(row, tokenizer, max_length) for row in table.rows]
        return Encoded([example for example, _ in pairs], sum(cut for _, cut in pairs))
    if table.kind == "labels":
        return _encode_labels(table, tokenizer, max_length, labels)
    examples = []
    for row in table.rows:
        ids = [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
        pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        examples += [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]
    return Encoded(examples)


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What the model reads before it answers: the chat template up to the assistant's turn, else the prompt and a space."""
    if getattr(tokenizer, "chat_template", None):
        text: str = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        return text
    return prompt if prompt[-1:].isspace() else f"{prompt} "


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> str:
    """What the model should say: the answer and the token that ends it."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole: str = tokenizer.apply_chat_template(turns, tokenize=False)
        before = prompt_text(tokenizer, prompt)
        if whole.startswith(before):
            return whole.removeprefix(before).rstrip()
    return f"{answer}{tokenizer.eos_token or ''}"


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, first: bool = False) -> list[int]:
    """Token ids of a piece of a sequence; the sequence's own first tokens only on its ``first`` piece without a template."""
    special = first and not getattr(tokenizer, "chat_template", None)
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, room: int) -> tuple[list[int], bool]:
    """Token ids of the prompt in at most ``room`` tokens, and whether its end had to go; the template is kept whole."""
    ids = tokens(tokenizer, prompt_text(tokenizer, prompt), first=True)
    if len(ids) <= room:
        return ids, False
    overhead = len(tokens(tokenizer, prompt_text(tokenizer, "x"), first=True))
    offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    keep = room - overhead + 1  # "x" is one of the tokens counted
    while keep > 0:
        ids = tokens(tokenizer, prompt_text(tokenizer, prompt[: offsets[min(keep, len(offsets)) - 1][1]]), first=True)
        if len(ids) <= room:
            return ids, True
        keep -= max(1, len(ids) - room)
    raise GraftError(f"max_length leaves {room} tokens for a prompt, but the chat template alone takes {overhead}; raise max_length.")


def _encode_answer(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[dict[str, Any], bool]:
    answer = tokens(tokenizer, answer_text(tokenizer, row["prompt"], row["answer"]))
    overhead = len(tokens(tokenizer, prompt_text(tokenizer, "x"), first=True))
    if len(answer) + overhead > max_length:
        raise GraftError(
            f"{row.where}: the answer takes {len(answer)} tokens and the template {overhead}, more than max_length = {max_length}; "
            "raise max_length or drop the row."
        )
    prompt, cut = encode_prompt(tokenizer, row["prompt"], max_length - len(answer))
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}, cut


def _encode_labels(table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str]) -> Encoded:
    numbers = {label: number for number, label in enumerate(labels)}
    examples, shortened = [], 0
    for row in table.rows:
        if row["label"] not in numbers:
            raise GraftError(f"{row.where} has the label {row['label']!r}, which the model does not know; it knows {', '.join(labels)}.")
        ids = tokenizer(row["text"]).input_ids
        if len(ids) > max_length:
            ids, shortened = tokenizer(row["text"], truncation=True, max_length=max_length).input_ids, shortened + 1
        examples.append({"input_ids": ids, "labels": numbers[row["label"]]})
    return Encoded(examples, shortened)


def collator(pad_token_id: int) -> Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]:
    """Pads examples at the end into ``input_ids``, ``attention_mask`` and ``labels``."""

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(name: str, filler: int) -> Tensor:
            return torch.tensor([example[name] + [filler] * (longest - len(example[name])) for example in examples])

        ids = padded("input_ids", pad_token_id)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        per_token = isinstance(examples[0]["labels"], list)
        labels = padded("labels", IGNORED) if per_token else torch.tensor([example["labels"] for example in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate
