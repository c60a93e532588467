"""The examples run as a user runs them, in their small form."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WITHOUT_TRL = "import runpy, sys; sys.modules['trl'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600)


@pytest.mark.real
@pytest.mark.parametrize(
    ("example", "says", "peft_type"),
    [
        ("plain_torch", "detached: the base model again, bit for bit: True", "LORA"),
        ("transformers_trainer", "ranks cut from 360 to 240", "ADALORA"),  # 60 targets, from rank 6 to 4: only the hooks cut
        ("trl_sft", "saved: adapter_config.json, adapter_model.safetensors", "LORA"),
    ],
)
def test_example_trains_and_saves(example: str, says: str, peft_type: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    done = run(EXAMPLES / f"{example}.py", "--tiny", "--output", folder)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    loss = re.search(r"^loss ([\d.]+) -> ([\d.]+) in \d+ updates$", done.stdout, re.MULTILINE)
    assert loss, done.stdout
    assert float(loss[2]) < float(loss[1])
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == peft_type
    assert (folder / "adapter_model.safetensors").stat().st_size > 100_000
    assert "graft" not in "\n".join(line for line in done.stderr.splitlines() if "Warning" in line)


@pytest.mark.real
def test_trl_is_optional() -> None:
    done = run("-c", WITHOUT_TRL, EXAMPLES / "trl_sft.py")
    assert done.returncode == 1
    assert done.stderr.strip() == "this example trains with TRL, which is not installed; run: pip install trl"
