"""Several processes that talk over gloo, forked from one that has imported everything: a launch costs a fraction of a second."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["graft.training.fit", "torch.distributed.fsdp", "transformers.models.llama", "transformers.models.bert"])


class Launch:
    """``function(*args)`` on every one of ``count`` processes, which find each other as those that torchrun starts do."""

    def __init__(self, function: Callable[..., Any], *args: Any, count: int = 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes: list[ForkServerProcess] = []
        for rank in range(count):
            ours, theirs = _context.Pipe(duplex=False)
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
            environment = {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
            process = _context.Process(target=_work, args=(theirs, environment, function, args), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def results(self, timeout: float = 600) -> list[Any]:
        """What each process returned; the first exception that reached the top fails the test."""
        results: dict[int, Any] = {}
        try:
            while len(results) < len(self.pipes):
                waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
                ready = wait(waiting, timeout)
                assert ready, f"the processes did not end within {timeout} s"
                for pipe in ready:
                    rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                    result, error = pickle.loads(self.pipes[rank].recv_bytes())
                    assert error is None, f"process {rank}: {error}"
                    results[rank] = result
        finally:
            self.kill()
        return [results[rank] for rank in range(len(self.pipes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()


def _work(pipe: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(environment, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        answer = function(*args), None
    except BaseException:
        answer = None, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))  # send() would hand tensors over in memory that ends with this process
