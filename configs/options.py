"""Command lines of the modules beside train.py: a mistake is a ConfigError, one line and code 64. Standard library."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Optional

from configs.errors import ConfigError


class Options(argparse.ArgumentParser):
    """A command line whose mistakes are ConfigErrors."""

    def __init__(self, prog: str, about: Optional[str] = None, **more: Any):
        super().__init__(prog=prog, description=about, **more)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError("option", self.prog, message, "see --help")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """The type of an option that is a finite number from `low` to `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (low <= value <= high and value < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says it of what is no number at all
    return parse


def filled(text: str) -> str:
    """The type of an option that may not be empty, as by a shell variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def place(text: str) -> Path:
    """The type of an option that is a file or directory; an empty path, which is refused, would be this directory."""
    return Path(filled(text))


def write(option: str, path: Path, text: str) -> None:
    """Make a file, whole or not at all, and the folders above it. Raises ConfigError that names the option."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout is not to be replaced
            raise OSError(None, "is no file of its own")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        raise ConfigError("option", f"{option} {path}", f"not writable ({e.strerror})", "give another file") from e
