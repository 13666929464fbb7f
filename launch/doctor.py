"""python -m launch.doctor: is this machine fit for a run? One line a check: what was found, what is wrong, what to do.

Started as a job of several processes, as in `torchrun --nproc-per-node 8 launch/doctor.py`, it looks at each node and
at what is between them. Exit codes: 0 if nothing is wrong (a warning is not), 1 otherwise,
64 for a bad option.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import NoReturn, Optional

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
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        own = f"driver {_driver_version()}, CUDA {torch.version.cuda}, NCCL {nccl}"
        yield Finding("ok", "driver", f"{len(names)} x {names[0]}, {own}")
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


def _driver_version(path: str = "/proc/driver/nvidia/version") -> str:
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path(path).read_text())
    except OSError:
        return "unknown"
    return found.group(1) if found else "unknown"


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
    rate = _rate(torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu"), None)
    if rank == 0:
        Path(folder, "part").write_text(str(rate))
        Path(folder, "part").rename(Path(folder, "rate"))
    dist.destroy_process_group()


def _rate(device: torch.device, group: Optional[dist.ProcessGroup]) -> float:
    """GB/s of bus traffic of an all-reduce, 2 (n - 1) / n times the bytes of a tensor: the best of five."""
    world, ids = dist.get_world_size(group), [device.index] if device.type == "cuda" else None
    x, times = torch.ones(2**26 if device.type == "cuda" else 2**22, device=device), []
    for _ in range(6):
        dist.barrier(group, device_ids=ids)
        start = time.perf_counter()
        dist.all_reduce(x, group=group)
        x[:1].cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * (world - 1) / world * x.nbytes / min(times[1:]) / 1e9


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


def node(run: Path) -> list[Finding]:
    """What is found on this machine by one process."""
    pins = (ROOT / "requirements.txt").read_text()
    return [f for check in (versions(pins), driver(), ports(), disk(run), shared_memory(), clock(run)) for f in check]


def job(run: Path) -> Iterator[Finding]:
    """What is found on the nodes of a job and between them. Collective; rank 0 has the findings, the others none."""
    here, first = os.environ.get("SLURMD_NODENAME", socket.gethostname()), os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    except RuntimeError as e:  # torch's errors of its stores and groups are RuntimeErrors
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        do = "set GLOO_SOCKET_IFNAME to an interface that all nodes share, and open its ports"
        yield Finding("wrong", here, f"the processes do not meet at {where} ({str(e).splitlines()[0]})", do)
        return
    dist.barrier()
    now = time.time()
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, (here, now, node(run) if first else []))
    rate = _between()
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        yield from _compared(told)
        yield rate


def _between() -> Finding:
    """All-reduce over the whole job, by what a run would use."""
    backend, world, group = "gloo", dist.get_world_size(), None
    do = "NCCL_DEBUG=INFO names the network in use (NET/IB or NET/Socket); see docs/cluster.md"
    device = torch.device("cpu")
    try:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(device)
            backend, group = "nccl", dist.new_group(backend="nccl", timeout=timedelta(seconds=60))
        rate = _rate(device, group)
    except RuntimeError as e:
        return Finding("wrong", f"{backend} x {world}", f"all-reduce failed ({str(e).splitlines()[0]})", do)
    slow = backend == "nccl" and rate < 5
    says = f"all-reduce between all of them at {rate:.1f} GB/s a rank"
    return Finding("warn" if slow else "ok", f"{backend} x {world}", says, do if slow else "")


def _compared(told: list[tuple[str, float, list[Finding]]]) -> Iterator[Finding]:
    """Of each node what is not ok; then whether the nodes are alike. `told`: node, clock and findings of each rank."""
    nodes = {name: found for name, _, found in told if found}
    for name, found in nodes.items():
        yield from (replace(f, what=f"{name} {f.what}") for f in found if f.level != "ok")
    yield Finding("ok", "nodes", f"{len(nodes)}, {len(told)} processes: {' '.join(nodes)}"[:200])
    for what in ("python", "versions", "driver"):
        said = {name: "; ".join(f.says for f in found if f.what == what) for name, found in nodes.items()}
        others = [f"{name} has {says}" for name, says in said.items() if says != next(iter(said.values()))]
        if others:
            why = f"{next(iter(said))} has {next(iter(said.values()))}, {', '.join(others)}"
            yield Finding("wrong", what, why, "make the nodes alike, or leave these out (--exclude)")
    clocks = [now for _, now, _ in told]
    apart = max(clocks) - min(clocks)
    level, do = ("wrong", "start chrony or ntpd on all nodes") if apart > 5 else ("ok", "")
    yield Finding(level, "clocks", f"{apart:.2f} s apart at most", do)


class _Options(argparse.ArgumentParser):
    """As configs.options has it, which is not in reach where torchrun starts this file by its path."""

    def error(self, message: str) -> NoReturn:
        """Leaves with one line and code 64."""
        self.exit(64, f"error: option {self.prog}: {message}; see --help\n")


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = _Options(prog="python -m launch.doctor", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--run", type=Path, default=Path("runs"), help="where runs will lie")
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()), help="for all-reduce")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes {args.processes} is below 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found: Iterable[Finding] = job(args.run)
    else:
        found = chain(node(args.run), bandwidth(args.processes))
    wrong = False
    for finding in found:
        print(finding, flush=True)
        wrong |= finding.level == "wrong"
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
