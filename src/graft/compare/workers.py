"""Processes that do runs on this machine, a fresh one for each: its memory is its own, and it can die without taking others along.

They are forked from a server that has imported the libraries and done nothing else, which saves each its start-up, and end with the
process that started them, even if that was killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import torch

from graft.compare.job import run_job

LOG = "log.txt"


class Workers(Protocol):
    """What the comparison needs of those that do its runs."""

    threads: int  # of each run
    retries: bool  # whether a run whose process died is worth another try

    @property
    def slots(self) -> int:
        """Runs at a time."""

    def start(self, folder: Path) -> None:
        """Begins the run in ``folder``."""

    def ended(self, seconds: float) -> Iterator[tuple[Path, str | None]]:
        """Runs that have ended within ``seconds``, each with the sentence of what killed its process, or None."""

    def stop(self, folder: Path) -> None:
        """Kills a run."""

    def close(self) -> None:
        """Kills all runs."""


def fresh_processes() -> ForkServerContext:
    """Where processes come from that have the libraries and no past."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["graft.compare.job"])
    return context


class LocalWorkers:
    """``slots`` processes at a time, each with its share of the threads that torch has here (OMP_NUM_THREADS, or all cores)."""

    retries = False  # what died here for lack of memory would die again

    def __init__(self, slots: int = 1):
        self.slots, self.threads = slots, max(1, torch.get_num_threads() // slots)
        self.running: dict[Path, BaseProcess] = {}

    def start(self, folder: Path) -> None:
        process = fresh_processes().Process(target=work, args=(str(folder),), daemon=False)
        process.start()
        self.running[folder] = process

    def ended(self, seconds: float) -> Iterator[tuple[Path, str | None]]:
        wait([process.sentinel for process in self.running.values()], timeout=seconds)
        for folder, process in list(self.running.items()):
            if process.exitcode is not None:
                del self.running[folder]
                yield folder, None if process.exitcode == 0 else f"its process ended with {_reason(process.exitcode)}."

    def stop(self, folder: Path) -> None:
        process = self.running.pop(folder)
        process.kill()
        process.join()

    def close(self) -> None:
        for folder in list(self.running):
            self.stop(folder)


def _reason(code: int) -> str:
    return f"signal {-code}{' (killed; was there enough memory?)' if code == -9 else ''}" if code < 0 else f"exit code {code}"


def work(folder: str) -> None:
    """What the process of a run does; what libraries say on the way goes to ``log.txt``."""
    stand_alone(Path(folder) / LOG)
    run_job(folder)


def stand_alone(log: Path) -> None:
    """Makes this process one that writes to ``log``, leaves Ctrl-C to its parent, and ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    """Ends this process when its parent is gone."""
    wait([sentinel])
    os._exit(1)
