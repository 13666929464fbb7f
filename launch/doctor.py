"""python -m launch.doctor: is this machine fit for a run? One line a check: what was found, what is wrong, what to do.

Exit codes: 0 if nothing is wrong (a warning is not), 1 otherwise.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """What a check found. `level` is ok, warn or wrong; `do` says what to do where it is not ok."""

    level: str
    what: str
    says: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.level:5}  {self.what}: {self.says}" + (f"; {self.do}" if self.do else "")


def versions(requirements: str) -> Iterator[Finding]:
    """Python, and each package that `requirements` pins."""
    python = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 10) <= sys.version_info[:2] <= (3, 12)
    yield Finding("ok", "python", python) if fits else Finding("wrong", "python", python, "take 3.10, 3.11 or 3.12")
    pins = dict(re.findall(r"^([\w-]+)(?:\[.*\])?==([\w.]+)", requirements, re.MULTILINE))
    differ = {}
    for package, pin in pins.items():
        try:
            found = importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            yield Finding("wrong", package, "not installed", f"pip install {package}=={pin}")
            continue
        if found != pin:
            differ[package] = f"{package} {found}, tested with {pin}"
    if differ:
        yield Finding("warn", "versions", ", ".join(differ.values()), "pip install -r requirements.txt")
    else:
        yield Finding("ok", "versions", f"{len(pins)} packages as in requirements.txt")


def driver() -> Iterator[Finding]:
    """GPUs, and whether torch reaches them."""
    hardware = bool(list(Path("/dev").glob("nvidia[0-9]*"))) or shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "driver", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
        if len(set(names)) > 1:
            yield Finding("warn", "GPUs", f"not alike ({', '.join(sorted(set(names)))})", "the slowest sets the pace")
        if not torch.cuda.is_bf16_supported():
            yield Finding("wrong", "GPUs", "have no bf16", "give train.precision=fp32")
    elif not hardware:
        yield Finding("warn", "driver", "no GPU here", "runs will use the CPU, with train.precision=fp32")
    elif torch.version.cuda is None:
        yield Finding("wrong", "driver", "a GPU, but torch is a CPU build", "install torch's CUDA build")
    else:
        why = f"a GPU that torch (CUDA {torch.version.cuda}) cannot use"
        yield Finding("wrong", "driver", why, "look at nvidia-smi; update the driver, or check CUDA_VISIBLE_DEVICES")


def bandwidth(processes: int, seconds: float = 60.0) -> Iterator[Finding]:
    """All-reduce between processes of this machine."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    what, context = f"{backend} x {processes}", multiprocessing.get_context("spawn")
    if processes < 2:
        yield Finding("ok", what, "one process talks to nobody")
        return
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(r, processes, backend, folder)) for r in range(processes)]
        for rank in ranks:
            rank.start()
        end = time.monotonic() + seconds
        for rank in ranks:
            rank.join(max(0.0, end - time.monotonic()))
        hung = any(rank.is_alive() for rank in ranks)
        for rank in ranks:
            rank.kill()
            rank.join()
        try:
            rate = float(Path(folder, "rate").read_text())
        except OSError:
            why = f"no all-reduce in {seconds:.0f} s" if hung else "all-reduce failed"
            do = "run again with NCCL_DEBUG=INFO" if backend == "nccl" else "check that localhost resolves and /dev/shm"
            yield Finding("wrong", what, why, do)
            return
    slow = backend == "nccl" and rate < 10
    do = "expect this without NVLink; nvidia-smi topo -m shows the links" if slow else ""
    yield Finding("warn" if slow else "ok", what, f"all-reduce at {rate:.1f} GB/s a rank", do)


def _rank(rank: int, world: int, backend: str, folder: str) -> None:
    """Time all-reduces; rank 0 writes GB/s of bus traffic (2 (n - 1) / n times the bytes of a tensor)."""
    init = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world}
    dist.init_process_group(backend, timeout=timedelta(seconds=60), **init)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    x, times = torch.ones(2**26 if backend == "nccl" else 2**22, device=device), []
    for _ in range(6):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        x[:1].cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    if rank == 0:
        rate = 2 * (world - 1) / world * x.nbytes / min(times[1:]) / 1e9
        Path(folder, "part").write_text(str(rate))
        Path(folder, "part").rename(Path(folder, "rate"))
    dist.destroy_process_group()


def ports(name: Optional[str] = None) -> Iterator[Finding]:
    """Whether processes can reach each other under this machine's name."""
    name = name or socket.gethostname()
    for host in ("localhost", name):
        try:
            with socket.create_server(("", 0)) as server:
                port = server.getsockname()[1]
                socket.create_connection((host, port), timeout=5).close()
            yield Finding("ok", "ports", f"{host} answers on a port of its own")
        except OSError as e:
            do = "add it to /etc/hosts, open the firewall, or set MASTER_ADDR to an address that works"
            yield Finding("wrong", "ports", f"{host} cannot be reached from here ({e})", do)


def disk(directory: Path, needed: float = 20.0) -> Iterator[Finding]:
    """Whether `directory`, where runs will lie, can be written, fast, and has `needed` GiB."""
    what = f"disk {directory}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory) as f:
            start = time.perf_counter()
            f.write(bytes(2**26))
            f.flush()
            os.fsync(f.fileno())
            rate = 2**26 / (time.perf_counter() - start) / GIB
    except OSError as e:
        yield Finding("wrong", what, f"cannot be written ({e.strerror})", "give a directory of yours: --run DIR")
        return
    free = shutil.disk_usage(directory).free / GIB
    says = f"{free:.0f} GiB free, writes {rate:.2f} GiB/s"
    if free < needed:
        yield Finding("warn", what, says, "a checkpoint of 1B parameters takes 14 GiB, and two are kept; make room")
    else:
        yield Finding("ok", what, says)


def shared_memory(path: str = "/dev/shm", needed: float = 1.0) -> Iterator[Finding]:
    """Room for what processes of a node share."""
    try:
        free = shutil.disk_usage(path).free / GIB
    except OSError:
        yield Finding("warn", path, "not there", "NCCL needs it; in a container mount it")
        return
    if free < needed:
        yield Finding("warn", path, f"{free:.2f} GiB free", "NCCL may fail; start the container with --shm-size=8g")
    else:
        yield Finding("ok", path, f"{free:.1f} GiB free")


def clock(directory: Path, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Against the file server and the time service: logs, certificates and slurm's time limits depend on it."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as f:
            apart = os.stat(f.name).st_mtime - now()
    except OSError:
        return  # `disk` says it
    do = "start chrony or ntpd"
    if abs(apart) > 5:
        yield Finding("wrong", "clock", f"{apart:+.0f} s from that of the disk under {directory}", do)
        return
    synced = _time_service()
    if synced is False:
        yield Finding("warn", "clock", "no time service keeps it", do)
    else:
        how = "a time service keeps it" if synced else "whether a time service keeps it is not known here"
        yield Finding("ok", "clock", f"as the disk's; {how}")


def _time_service() -> Optional[bool]:
    if shutil.which("timedatectl") is None:
        return None
    command = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"yes": True, "no": False}.get(said)


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--run", type=Path, default=Path("runs"), help="where runs will lie")
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()), help="for all-reduce")
    args = parser.parse_args(argv)
    checks = (
        versions((ROOT / "requirements.txt").read_text()),
        driver(), ports(), disk(args.run), shared_memory(), clock(args.run), bandwidth(args.processes),
    )  # fmt: skip
    wrong = False
    for check in checks:
        for finding in check:
            print(finding, flush=True)
            wrong |= finding.level == "wrong"
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
