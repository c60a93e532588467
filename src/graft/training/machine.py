"""What a run was done on and with, as far as it explains its figures."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """``platform``, ``processor`` (its name, where the system tells) and ``threads`` that torch uses."""
    return {"platform": platform.platform(), "processor": processor(), "threads": torch.get_num_threads()}


def processor() -> str:
    """The name of the processor; its architecture where the system does not tell."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions that decide what a run computes."""
    names = ("graft", "torch", "transformers", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
