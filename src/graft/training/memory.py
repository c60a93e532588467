"""The memory of a run: how much it took, and that it is not given back between steps."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys

import torch

# Numbers of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
MIB = 2**20


def keep_freed() -> bool:
    """Lets this process keep the memory that tensors free instead of returning it to the system; whether that was possible.

    Every training step frees its activations and asks for them again; fresh pages are zeroed by the system one fault at a time, in the
    middle of the arithmetic. Only glibc (Linux) has the switch; GPUs have a caching allocator anyway.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {_MMAP_THRESHOLD: 32 * MIB, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * MIB}  # 32 MiB is the most that glibc takes
    taken = [libc.mallopt(number, value) == 1 for number, value in settings.items()]
    return all(taken)


def peak() -> int:
    """Bytes at the highest: device memory where there is a GPU, else this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
