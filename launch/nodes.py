"""What the supervisors of a run tell one another, one a machine: where its processes meet, and how they ended."""

import contextlib
import json
import random
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from configs.errors import ConfigError, RunError

PATIENCE = 300.0  # seconds until a supervisor that says nothing is given up
FAREWELL = 10.0  # seconds that the head, whose store it is, stays for the others


class Nodes:
    """Supervisor `node` of `nodes`. They meet at `head`, HOST:PORT of node 0; a single one needs none."""

    def __init__(self, nodes: int = 1, node: int = 0, head: str = ""):
        """Raises ConfigError where nobody can meet at `head`."""
        self.nodes, self.node = nodes, node
        self.host = head.rpartition(":")[0]
        self.store: Any = _Memory() if nodes == 1 else _join(head, node)

    def meet(self, attempt: int, give_up: Callable[[], bool]) -> int:
        """The port at which the processes of an attempt meet on the head, a fresh one for each; 0 if given up."""
        if self.node == 0:
            self.store.set(f"{attempt}/port", str(free_port()))
        return int(self._await(f"{attempt}/port", 0, give_up) or 0)

    def over(self, attempt: int) -> bool:
        """Whether the processes of some machine have ended."""
        return self._has(f"{attempt}/over")

    def report(self, attempt: int, outcome: dict[str, Any]) -> list[dict[str, Any]]:
        """How the attempt ended here; returns how it ended everywhere, by node. Waits for all."""
        self.store.set(f"{attempt}/ended/{self.node}", json.dumps(outcome))
        self.store.set(f"{attempt}/over", "")
        found = [json.loads(self._await(f"{attempt}/ended/{k}", k)) for k in range(self.nodes)]
        self.store.set(f"{attempt}/read/{self.node}", "")
        return found

    def leave(self, attempt: int) -> None:
        """After the last attempt: the head stays until the others know how it ended."""
        read = [f"{attempt}/read/{k}" for k in range(self.nodes)]
        end = time.monotonic() + (FAREWELL if self.node == 0 else 0)
        while time.monotonic() < end and not self.store.check(read):
            time.sleep(0.05)

    def _has(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except RuntimeError as e:  # torch's, of a connection that is lost
            why = "is gone, and with it what the others agree by"
            raise RunError("supervisor", "of node 0", why, "see its messages, and start all again") from e

    def _await(self, key: str, node: int, give_up: Callable[[], bool] = lambda: False) -> bytes:
        end = time.monotonic() + PATIENCE
        while not self._has(key):
            if give_up():
                return b""
            if time.monotonic() > end:
                why, fix = f"did not answer for {PATIENCE:.0f} s", "see its messages, and start all again"
                raise RunError("supervisor", f"of node {node}", why, fix)
            time.sleep(0.05)
        return self.store.get(key)


class _Memory(dict):
    """A store for one."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def _join(head: str, node: int) -> Any:
    import torch.distributed as dist  # takes seconds, and one machine needs it not

    host, _, port = head.rpartition(":")
    where, fix = f"--head {head or 'absent'}", "give HOST:PORT of node 0, as every node can reach it"
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError("option", where, "no address where several nodes can meet", fix)
    try:
        socket.getaddrinfo(host, int(port))
        return dist.TCPStore(host, int(port), is_master=node == 0, timeout=timedelta(seconds=PATIENCE))
    except OSError as e:
        raise ConfigError("option", where, str(e), fix) from e
    except RuntimeError as e:
        why = str(e).splitlines()[0]
        raise ConfigError("option", where, why, "give a free port, which every node can reach") from e


def free_port() -> int:
    """Below those that the kernel gives to clients: one that knocks before the server listens could meet itself."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return port
    raise RunError("supervisor", "of node 0", "found no free port from 20000 to 32000", "end what holds them")
