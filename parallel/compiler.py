"""What torch.compile is asked to do: to fuse what lies between matrix products, collectives and attention."""

from collections.abc import Callable
from typing import Any, Optional

import torch

from configs.schema import Parallel


def compiles(cfg: Parallel, device: torch.device) -> bool:
    """Whether a run compiles; by default it does on a GPU."""
    return cfg.compile if cfg.compile is not None else device.type == "cuda"


def compiler(cfg: Parallel, device: torch.device, dynamic: Optional[bool] = False) -> Callable[[Any], Any]:
    """torch.compile, or the identity where a run does not compile. `dynamic`: for what sees new sizes in each step."""
    return (lambda f: torch.compile(f, dynamic=dynamic)) if compiles(cfg, device) else (lambda f: f)
