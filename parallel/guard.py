"""Which updates are left out because their numbers went wrong, and when a run is given up.

A loss or gradient norm that is no number never reaches the weights, nor the statistics here. A loss far above those of
the last accepted steps is a spike; what happens to its update is an option. Host floats only: every rank holds a guard
that sees the same numbers and so decides the same.
"""

import math
import statistics
from collections import deque
from typing import Any, Optional

from configs import schema
from configs.schema import OnSpike

SIGMAS_PER_MAD = 1.4826  # of a normal distribution


class Guard:
    """Asked once in each step, after the gradients are known and before the update."""

    def __init__(self, options: schema.Guard, steps: int):
        self.options = options
        self.budget = max(options.in_a_row, int(options.share * steps))
        self.losses: deque[float] = deque(maxlen=options.window)  # of the last accepted steps
        self.skipped = 0  # updates left out
        self.in_a_row = 0
        self.spikes = 0
        self.why: Optional[str] = None  # what was wrong with the last step, if its update was left out

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether a step of this mean loss and global gradient norm may update the weights."""
        self.why = self._fault(loss, norm)
        if self.why:
            self.skipped += 1
            self.in_a_row += 1
            return False
        self.in_a_row = 0
        self.losses.append(loss)
        return True

    @property
    def spent(self) -> bool:
        """Whether too many updates were left out for the run to go on."""
        return self.in_a_row >= self.options.in_a_row or self.skipped > self.budget

    def goes_back(self, times: int) -> bool:
        """Whether a run that is `spent`, and went back `times` before, does so again instead of ending."""
        allowed = self.options.on_spike is OnSpike.rollback and times < self.options.rollbacks
        return allowed and self.skipped <= self.budget

    @property
    def last_chance(self) -> bool:
        """Whether one more update left out would end the run."""
        return self.in_a_row + 1 >= self.options.in_a_row or self.skipped >= self.budget

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as JSON."""
        counters = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes}
        return {"losses": list(self.losses), **counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the guard that gave `state`; of a longer window the newest losses count."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.skipped, self.in_a_row, self.spikes = state["skipped"], state["in_a_row"], state["spikes"]

    def _fault(self, loss: float, norm: float) -> Optional[str]:
        if not math.isfinite(loss) or not math.isfinite(norm):
            return "not a number"
        if not self._is_spike(loss):
            return None
        self.spikes += 1
        return None if self.options.on_spike is OnSpike.keep else "loss spike"

    def _is_spike(self, loss: float) -> bool:
        """Above the median by so many deviations, both of a full window: robust against earlier spikes in it."""
        if len(self.losses) < self.options.window:
            return False
        middle = statistics.median(self.losses)
        deviation = SIGMAS_PER_MAD * statistics.median(abs(x - middle) for x in self.losses)
        return loss > middle + self.options.spike * deviation
