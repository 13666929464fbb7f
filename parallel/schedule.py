"""The learning rate as a function of the step."""

import math

from configs.schema import Optim


def learning_rate(step: int, steps: int, cfg: Optim) -> float:
    """Rate of step 0 .. steps-1: linear to lr over `warmup` steps, then a cosine to min_lr at the last."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    done = (step - cfg.warmup + 1) / max(1, steps - cfg.warmup)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
