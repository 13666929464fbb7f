"""Memory that runs out, in one line: where, how much there was, what needs less."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from configs.errors import OutOfMemory
from parallel.mesh import Mesh
from parallel.metrics import memory_gib

FIX = "lower train.micro_batch or data.seq_len, give parallel.recompute=full, or cut the model further (parallel.tp)"


@contextmanager
def explained(mesh: Mesh) -> Iterator[None]:
    """Raises OutOfMemory in place of what torch or Python raise."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        said = str(e).strip() or "MemoryError"
        known = isinstance(e, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said
        if not known:
            raise
        why = f"{memory_gib(mesh.device):.2f} GiB in use at most, then {said.splitlines()[0].split('. GPU')[0]}"
        raise OutOfMemory("memory", f"rank {mesh.rank} on {mesh.device}", why, FIX) from e
