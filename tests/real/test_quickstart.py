"""The first command a user runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.real
def test_the_fast_quickstart_learns_merges_and_agrees_with_peft(tmp_path: Path) -> None:
    began = time.perf_counter()
    command = [Path(sys.executable).parent / "graft", "quickstart", "--fast", "--json", "--output", tmp_path / "quickstart"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["accuracy_after"] >= figures["accuracy_before"] + 0.08
    assert figures["merged_agrees"] is True
    assert figures["peft_agrees"] is True
    assert figures["trainable_parameters"] == 2_442_240
    print(f"{time.perf_counter() - began:.0f} s, {figures['accuracy_before']:.0%} -> {figures['accuracy_after']:.0%}")


@pytest.mark.real
def test_the_second_load_is_quick() -> None:
    import graft

    graft.load("smollm2")
    began = time.perf_counter()
    graft.load("smollm2")
    assert time.perf_counter() - began < 2
