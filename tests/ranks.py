"""Run a test body on several processes: forked with gloo on a CPU, spawned with NCCL where there are GPUs enough.

Forking shares the parent's imports, so that four ranks start in a fraction of a second. The slowest two are those that
torch and DeepSpeed would make at their first use, which is in the ranks.
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import torch
import torch._dynamo
import torch.distributed as dist

from parallel.mesh import rendezvous, start_processes


def run(world: int, body: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call body(*args) on `world` processes joined in one group; returns what each returned, by rank.

    Raises AssertionError with the traceback of the first rank that failed, or when the time is over.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        ranks = [
            context.Process(target=_rank, args=(r, world, port, folder, timeout, body, args), daemon=True)
            for r in range(world)
        ]
        for p in ranks:
            p.start()
        _wait(ranks, Path(folder), timeout)
        return [pickle.loads(Path(folder, f"{r}.result").read_bytes()) for r in range(world)]


def _wait(ranks: list, folder: Path, timeout: float) -> None:
    """Until all ended well; the first failure ends all."""
    end = time.monotonic() + timeout
    try:
        while any(p.is_alive() for p in ranks):
            if any(p.exitcode for p in ranks) or time.monotonic() > end:
                break
            time.sleep(0.01)
    finally:
        slow = [r for r, p in enumerate(ranks) if p.is_alive()]
        bad = [r for r, p in enumerate(ranks) if p.exitcode]
        for p in ranks:
            p.kill()
            p.join()
    for r in bad:
        error = folder / f"{r}.error"
        raise AssertionError(f"rank {r} failed:\n{error.read_text() if error.exists() else ranks[r].exitcode}")
    assert not slow, f"ranks {slow} still ran after {timeout} s"


def _rank(rank: int, world: int, port: int, folder: str, timeout: float, body: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        start_processes(*rendezvous(), timeout=int(timeout))
        Path(folder, f"{rank}.result").write_bytes(pickle.dumps(body(*args)))
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
