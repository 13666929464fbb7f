"""What torch.compile is asked to do: to fuse what lies between matrix products, collectives and attention."""

from collections.abc import Callable
from typing import Any, Optional

import torch

from configs.schema import Parallel


def compiler(cfg: Parallel, device: torch.device, dynamic: Optional[bool] = False) -> Callable[[Any], Any]:
    """torch.compile, or the identity where a run does not compile; by default it does on a GPU. `dynamic` is for what
    sees new sizes in each step."""
    wanted = cfg.compile if cfg.compile is not None else device.type == "cuda"
    return (lambda f: torch.compile(f, dynamic=dynamic)) if wanted else (lambda f: f)
