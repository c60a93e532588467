"""What an adapted model lost on general text that it was not trained on.

A causal model: ``loss(adapted) - loss(base)``, in nats a token. An encoder: the mean cosine distance between the base's and the adapted
model's text vectors (the mean of the last hidden states over a text's tokens): 0 where nothing moved.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.core.adapter import Adapter
from graft.data.reading import Table, read
from graft.training.evaluate import evaluate

PIECE = 128  # tokens of general text that are read at once, where the model can read so many


def forgetting(model: Any, tokenizer: Any, adapter: Adapter | None, general: str | Path | None) -> dict[str, Any]:
    """``{"measure": "loss" | "drift", "value": ..}``; without an adapter nothing can be forgotten."""
    table = general_text(general)
    measure = "loss" if model.get_output_embeddings() is not None else "drift"
    if adapter is None:
        return {"measure": measure, "value": 0.0}
    piece = min(PIECE, getattr(model.config, "max_position_embeddings", None) or PIECE)
    look = _loss if measure == "loss" else _vectors
    after = look(model, tokenizer, table, piece)
    adapter.active = False
    before = look(model, tokenizer, table, piece)
    adapter.active = True
    lost = after - before if measure == "loss" else (1 - F.cosine_similarity(after, before)).mean()
    return {"measure": measure, "value": float(lost)}


def _loss(model: Any, tokenizer: Any, table: Table, piece: int) -> Tensor:
    return torch.tensor(evaluate(model, tokenizer, table, max_length=piece).metrics["loss"], dtype=torch.float64)


@torch.inference_mode()
def _vectors(model: Any, tokenizer: Any, table: Table, piece: int) -> Tensor:
    """A vector for the beginning of each text: [texts, width]."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(table), 16):
        texts = [row["text"] for row in table.rows[start : start + 16]]
        batch = tokenizer(texts, truncation=True, max_length=piece, padding=True, return_tensors="pt").to(device)
        mask = batch["attention_mask"]
        hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
        found.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(found)


def general_text(path: str | Path | None) -> Table:
    """The user's text, else a few pages that come with Graft."""
    if path is not None:
        return read(path, kind="text")
    with as_file(files("graft.compare") / "general.jsonl") as own:
        return read(own)
