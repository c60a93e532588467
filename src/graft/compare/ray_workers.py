"""Runs on a Ray cluster: each in a fresh process of its own on some node, all of which see the comparison's folder (a shared file system).

A run whose worker or node dies is started again elsewhere and goes on from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.compare.job import run_job
from graft.core.errors import GraftError


class RayWorkers:
    """As many runs at a time as the cluster has CPUs, one thread each."""

    retries = True
    threads = 1

    def __init__(self, address: str):
        try:
            import ray
        except ImportError:
            raise GraftError("--ray needs ray; run: pip install 'graft[ray]'") from None
        self.ray = ray
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise GraftError(f"there is no Ray cluster at {address!r} ({reason}); start one with: ray start --head") from None
        self.running: dict[Path, Any] = {}
        # a process is used once, so that its memory is that of one run; the comparison itself starts a run again, with a limit
        self.run = ray.remote(num_cpus=1, max_calls=1, max_retries=0)(run_job)

    @property
    def slots(self) -> int:
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def start(self, folder: Path) -> None:
        self.running[folder] = self.run.remote(str(folder))

    def ended(self, seconds: float) -> Iterator[tuple[Path, str | None]]:
        ready, _ = self.ray.wait(list(self.running.values()), num_returns=len(self.running), timeout=seconds)
        for folder in [folder for folder, reference in self.running.items() if reference in ready]:
            reference = self.running.pop(folder)
            try:
                self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                yield folder, f"its worker died ({type(error).__name__})."
            else:
                yield folder, None

    def stop(self, folder: Path) -> None:
        self.ray.cancel(self.running.pop(folder), force=True)

    def close(self) -> None:
        for folder in list(self.running):
            self.stop(folder)
