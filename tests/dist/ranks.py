"""Ranks that stay: worker processes joined in one gloo group, which run one function after another.

Importing torch and DeepSpeed takes many seconds a process, so one server imports them and forks the ranks, and the
groups of 1, 2 and 4 ranks live as long as the test run.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

TASK_SECONDS = 240


class Ranks:
    """A group of processes; `run(function, *args)` calls function(runtime, *args) on each and returns their results."""

    def __init__(self, ranks: int, environment: Mapping[str, str | None] | None = None) -> None:
        """`environment` is what the ranks see changed; None removes a variable. They then import everything anew."""
        context = multiprocessing.get_context("spawn" if environment else "forkserver")
        multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.dist.preloaded"])
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, port, theirs, environment or {}), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TASK_SECONDS):
                raise AssertionError(f"rank {rank} did not answer within {TASK_SECONDS} s in {function.__name__}")
            answers.append(pipe.recv())
        errors = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        assert not errors, "\n".join(errors)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(rank: int, ranks: int, port: int, pipe: Connection, environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    import torch

    from llm_dist import runtime

    torch.set_num_threads(1)
    here = runtime.start()
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(here, *args)))
        except BaseException:  # noqa: BLE001  the test raises it
            pipe.send((False, traceback.format_exc()))
    runtime.stop()
    os._exit(0)  # tearing down an interpreter full of vendors takes seconds


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
