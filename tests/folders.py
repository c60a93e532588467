"""Tiny models with a tokenizer as folders on disk, and data files, for everything that starts from a path."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = [
    "good", "bad", "film", "great", "awful", "joy", "dull", "bright", "warm", "cold", "plot", "scene", "actor", "laugh", "cry",
    "the", "a", "is", "was", "very", "not", "it", "this",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def tokenizer(template: bool = True):  # type: ignore[no-untyped-def]
    """One token a word, byte fallback by single letters; ids 0..2 are padding, start and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {
        token: i
        for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", *WORDS, *[x for x in letters if x not in ":a"]])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = TEMPLATE if template else None
    return made


def causal(folder: Path, seed: int = 0, template: bool = True) -> Path:
    """A random Llama of two blocks with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tokenizer(template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(made), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def encoder(folder: Path, seed: int = 0) -> Path:
    """A random BERT of two blocks with a tokenizer."""
    from transformers import BertConfig, BertModel

    made = tokenizer(False)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(made), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    BertModel(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def _sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences whose class a word gives away, so that a few steps can learn it."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        label = ("bad", "good")[index % 2]
        words = [WORDS[int(i)] for i in torch.randint(8, len(WORDS), (5,), generator=generator)]
        words.insert(int(torch.randint(0, 5, (), generator=generator)), {"good": "joy", "bad": "dull"}[label])
        rows.append((" ".join(words), label))
    return rows


def answers(path: Path, count: int = 32, seed: int = 0) -> Path:
    return _write(path, [{"prompt": text, "answer": label} for text, label in _sentences(count, seed)])


def labels(path: Path, count: int = 32, seed: int = 0) -> Path:
    return _write(path, [{"text": text, "label": label} for text, label in _sentences(count, seed)])


def text(path: Path, count: int = 32, seed: int = 0) -> Path:
    return _write(path, [{"text": sentence} for sentence, _ in _sentences(count, seed)])


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
