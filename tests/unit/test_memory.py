"""Memory that stays with the process: counted in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
STEPS = f"""
import resource, sys
sys.path.insert(0, {str(SOURCE)!r})
import torch
from graft.training.memory import keep_freed
kept = keep_freed() if sys.argv[1] == "kept" else None
def step():
    [torch.ones(2**20) for _ in range(4)]  # 4 MiB each
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str) -> tuple[str, int]:
    # glibc's own first threshold, held there: left alone it adapts to what a process happens to have freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, env=environment)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switch")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    """20 steps of 16 MiB are 81920 pages of 4 KiB, or 160 huge ones, if every step asks the system anew."""
    kept, few = run("kept")
    assert kept == "True"
    _, many = run("freed")
    assert few < many / 10
    assert few < 20  # less than one a step
