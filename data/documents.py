"""Documents from files: text, source trees, .jsonl (plain, .gz, .zst) and .parquet, in portions that one worker reads.

What can be read from any place is named by its place, and the worker reads it; a compressed file has to be read in
order, so its portions hold what was read. Nothing larger than a portion (or one line, or a parquet row group) is held.
"""

import gzip
import hashlib
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Optional

from configs.errors import DataError

PORTION = 1 << 20  # bytes of input that a worker gets at once, about
PIECE = 16 << 20  # a text file longer than this is several documents, parted at line ends
LINES = {(".jsonl",): "", (".jsonl", ".gz"): "gzip", (".jsonl", ".zst"): "zstd"}


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; of lines, those that begin there."""

    path: Path
    start: int
    end: int
    lines: bool = False


@dataclass(frozen=True)
class Rows:
    """Lines or texts that were read, the first of which is number `first` of the file."""

    path: Path
    first: int
    values: list[Any]


@dataclass
class Portion:
    """Parts of the input that stand for `size` bytes of its files."""

    size: int = 0
    parts: list[Span | Rows] = field(default_factory=list)


@dataclass
class Odd:
    """What was met besides plain documents."""

    empty: int = 0
    binary: int = 0  # left out: they hold a zero byte
    repaired: int = 0  # bytes that are no UTF-8 became U+FFFD

    def add(self, other: "Odd") -> None:
        """Count another's too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def find(inputs: list[str], include: str, limit: Optional[int]) -> list[Path]:
    """The files of the inputs in a fixed order; `limit` in bytes keeps a part that the hashes of their names choose."""
    files = [found for name in inputs for found in _files(name, include)]
    if limit is not None:
        chosen, total = [], 0
        for name, path in sorted(files, key=lambda f: hashlib.sha256(f[0].encode("utf-8", "surrogateescape")).digest()):
            if total < limit:
                chosen.append((name, path))
                total += path.stat().st_size
        files = sorted(chosen)
    return [path for _, path in files]


def _files(name: str, include: str) -> list[tuple[str, Path]]:
    """(name, path) of the files of one input; `stdlib` is the sources of the running interpreter's standard library.

    Of a directory, what begins with a dot (.git) is left out.
    """
    stdlib = name == "stdlib"
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib else Path(name)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise DataError("input", name, "no such file or directory", "give files, directories, or stdlib")
    found = []
    for path in root.rglob("*.py" if stdlib else include):
        inside = path.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts) or (stdlib and "site-packages" in inside.parts)
        if not hidden and path.is_file():
            found.append((str(inside), path))
    return sorted(found)


def portions(paths: list[Path], name: str) -> Iterator[Portion]:
    """The files cut into portions, the same ones each time. `name` is the field that has the text. Raises DataError."""
    made = Portion()
    for part, size in (part for path in paths for part in _parts(path, name)):
        made.parts.append(part)
        made.size += size
        if made.size >= PORTION or isinstance(part, Rows):
            yield made
            made = Portion()
    if made.parts:
        yield made


def _parts(path: Path, name: str) -> Iterator[tuple[Span | Rows, int]]:
    """(part, bytes of the file that it stands for) of one file."""
    size, suffixes = path.stat().st_size, tuple(path.suffixes)
    packed = LINES.get(suffixes[-2:]) or LINES.get(suffixes[-1:])
    try:
        if packed:
            yield from _rows(path, size, packed)
        elif suffixes[-1:] == (".parquet",):
            yield from _column(path, size, name)
        else:
            step = PORTION if packed == "" else PIECE
            for start in range(0, max(size, 1), step):
                end = min(start + step, size)
                yield Span(path, start, end, packed == ""), end - start
    except (OSError, EOFError, zlib.error) as e:
        raise DataError("input", path, f"cannot be read ({type(e).__name__} {e})", "restore or leave it out") from e


def _rows(path: Path, size: int, packed: str) -> Iterator[tuple[Rows, int]]:
    """Lines of a compressed file."""
    with open(path, "rb") as raw, _unpacked(raw, packed) as stream:
        number, seen = 1, 0
        while lines := stream.readlines(PORTION):
            place = raw.tell()
            yield Rows(path, number, lines), place - seen
            number, seen = number + len(lines), place
    if seen < size:  # the reader needs not have asked for the last bytes
        yield Rows(path, number, []), size - seen


def _unpacked(raw: BinaryIO, packed: str) -> Any:
    """Unlike other readers, arrow's takes the end of a file inside a frame for the damage that it is."""
    if packed == "gzip":
        return gzip.open(raw)
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"), PORTION)


def _column(path: Path, size: int, name: str) -> Iterator[tuple[Rows, int]]:
    """Texts of one column of a parquet file."""
    import pyarrow  # late, as everything large is: each worker loads this module
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, buffer_size=PORTION, pre_buffer=False) as file:
            kinds = {f.name: str(f.type) for f in file.schema_arrow}
            if kinds.get(name) not in ("string", "large_string", "string_view"):
                has = ", ".join(f"{n} ({kind})" for n, kind in kinds.items())
                raise DataError("input", path, f"has no column {name} of texts, but {has}", "name one with --field")
            first, total, seen = 0, max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(64, columns=[name]):
                values = batch.column(0).to_pylist()
                first += len(values)
                place = size * first // total
                yield Rows(path, first - len(values), values), place - seen
                seen = place
    except pyarrow.ArrowException as e:
        raise DataError("input", path, f"no sound parquet file ({e})", "restore or leave it out") from e


def texts(portion: Portion, name: str, odd: Odd) -> Iterator[tuple[str, bytes]]:
    """The documents of a portion that are text and not empty, as text and as UTF-8; counts the others in `odd`.

    `name` is the field that has the text. Raises DataError.
    """
    for part in portion.parts:
        for value in _values(part, name):
            if not value:
                odd.empty += 1
            elif isinstance(value, bytes) and b"\0" in value:
                odd.binary += 1
            else:
                yield _both(value, odd)


def _both(value: bytes | str, odd: Odd) -> tuple[str, bytes]:
    """A document as text and as UTF-8, each the other's."""
    try:
        return (value, value.encode()) if isinstance(value, str) else (value.decode(), value)
    except UnicodeError:
        odd.repaired += 1
        if isinstance(value, str):  # JSON can write halves of letters
            text = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        else:
            text = value.decode("utf-8", "replace")
        return text, text.encode()


def _values(part: Span | Rows, name: str) -> Iterator[bytes | str | None]:
    """What the documents of a part are before they are looked at."""
    if isinstance(part, Rows):
        for number, value in enumerate(part.values, part.first):
            if not isinstance(value, bytes):
                yield value
            elif value.strip():
                yield _field(value, name, part.path, number)
        return
    try:
        with open(part.path, "rb") as f:
            yield from _lines(f, part, name) if part.lines else _piece(f, part)
    except OSError as e:
        raise DataError("input", part.path, f"cannot be read ({e.strerror})", "restore or leave it out") from e


def _piece(f: BinaryIO, part: Span) -> Iterator[bytes]:
    start, end = _cut(f, part.start), _cut(f, part.end)
    f.seek(start)
    yield f.read(end - start)


def _cut(f: BinaryIO, place: int) -> int:
    """Where a text file is parted near `place`: after the line, or where there are no lines before a whole letter."""
    if place % PIECE or place == 0:
        return place
    f.seek(place)
    near = f.read(1 << 16)
    after = near.find(b"\n") + 1
    return place + (after or next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0))


def _lines(f: BinaryIO, part: Span, name: str) -> Iterator[str]:
    if part.start:
        f.seek(part.start - 1)
        f.readline()
    while (place := f.tell()) < part.end and (line := f.readline()):
        if line.strip():
            yield _field(line, name, part.path, place)


def _field(line: bytes, name: str, path: Path, place: int) -> str:
    """The text of a JSON line. `place` is its number, or, if the file is not compressed, its byte."""
    try:
        value = json.loads(line)[name]
        if value is not None and not isinstance(value, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        number = place if path.suffix != ".jsonl" else _line_number(path, place)
        why = f"line {number} is no object with a text in {name} ({type(e).__name__})"
        raise DataError("input", path, why, "fix the line, or name the field with --field") from e
    return value or ""


def _line_number(path: Path, place: int) -> int:
    """Of the line that begins at a byte."""
    with open(path, "rb") as f:
        return 1 + sum(f.read(min(PORTION, place - at)).count(b"\n") for at in range(0, place, PORTION))
