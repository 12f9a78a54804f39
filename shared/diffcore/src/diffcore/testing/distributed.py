"""Runs a function on several ranks by forking: a fresh interpreter would spend seconds on imports."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

T = TypeVar("T")


class RankFailedError(RuntimeError):
    """A rank died without an exception, or did not answer in time."""


def run_forked(fn: Callable[[int], T], ranks: int = 2, timeout_seconds: float = 300.0) -> list[T]:
    """Runs `fn(rank)` in forked processes joined by gloo and returns each rank's value, in order of rank.

    `fn` may be a closure; its value must pickle. CUDA must not have been used before.

    Args:
        fn: Function that each rank calls with its number; the process group is ready then.
        ranks: Number of processes to fork.
        timeout_seconds: After this time the remaining ranks are killed.

    Raises:
        Exception: The first failure in time, of the type raised in the rank, with the rank's traceback as a note.
        RankFailedError: A rank was killed or did not answer in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [Pipe() for _ in range(ranks)]
        workers = [
            context.Process(
                target=_work, args=(fn, rank, Path(folder) / "store", [sender for _, sender in pipes], timeout_seconds)
            )
            for rank in range(ranks)
        ]
        try:
            for worker in workers:
                worker.start()
            for _, sender in pipes:
                sender.close()
            return _collect([receiver for receiver, _ in pipes], timeout_seconds)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.join(timeout=1.0)
                if worker.is_alive():
                    worker.kill()
                worker.join()


def _work(fn: Callable[[int], Any], rank: int, store: Path, pipes: Sequence[Connection], timeout: float) -> None:
    ranks, pipe = len(pipes), pipes[rank]
    for other in pipes:
        if other is not pipe:
            other.close()  # a pipe ends when its last writer is gone: a killed rank must be its only one
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    done = False
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
        )
        data = pickle.dumps(("value", fn(rank)))
        done = True
    except BaseException as error:
        error.add_note(f"on rank {rank} of {ranks}:\n{traceback.format_exc()}")
        try:
            data = pickle.dumps(("error", error))
            pickle.loads(data)
        except Exception:  # an exception that does not pickle still tells its story
            data = pickle.dumps(("error", RankFailedError(f"rank {rank}: {traceback.format_exc()}")))
    pipe.send_bytes(data)
    if done:
        pipe.poll(timeout)  # no rank leaves while another still talks to it: the parent says when all have answered
    os._exit(0)  # no atexit handlers, no second report of the parent's test session


def _collect(pipes: Sequence[Any], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    values: dict[int, Any] = {}
    while len(values) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in values]
        ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            silent = sorted(set(range(len(pipes))) - set(values))
            raise RankFailedError(f"ranks {silent} did not answer within {timeout:g} s")
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                kind, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankFailedError(f"rank {rank} died without a word") from None
            if kind == "error":
                raise value
            values[rank] = value
    for pipe in pipes:
        pipe.send_bytes(b"all have answered")
    return [values[rank] for rank in range(len(pipes))]
