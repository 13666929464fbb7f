"""Kernels beside kernels: the last tiles of one leave multiprocessors idle, and those of another fill them."""

import functools

import torch


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside:
    """What is launched within runs after all that was launched before, and beside what is launched next, until `wait`.

    Two of them run one after the other. Nothing may be allocated within: it would be memory of another stream. Without
    a GPU all runs in order.
    """

    def __init__(self, device: torch.device):
        self._stream = _stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "Beside":
        if self._stream is not None:
            self._before = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(self._before)
            torch.cuda.set_stream(self._stream)
        return self

    def __exit__(self, *_) -> None:
        if self._stream is not None:
            self._done = self._stream.record_event()
            torch.cuda.set_stream(self._before)

    def wait(self) -> None:
        """What is launched next runs after it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)
