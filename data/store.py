"""Where prepared data lies: a local directory, or an HTTP(S) or S3-compatible server behind a bounded local cache.

A remote shard is fetched whole, in ranged requests that are tried again until a time limit, compared with its hash, and
only then given a name in the cache. The name is the hash: two shards never share one, and equal ones are kept once.
"""

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from configs.errors import DataError
from configs.schema import REMOTE, scheme
from data.index import IndexFault, build, write
from data.shards import ShardEntry

PART = 8 << 20  # bytes of one request


@dataclass(frozen=True)
class Limits:
    """What a node spends on remote data."""

    cache: str = "~/.cache/sparsetron"  # directory, shared by the processes of a node
    bytes: int = 64 << 30  # of shards kept there; the least recently opened go first
    seconds: float = 120.0  # until a part that cannot be had is given up


class Store(Protocol):
    """Files of one data set."""

    where: str
    retries: int  # requests that failed and were made again, in this process

    def read(self, name: str) -> bytes:
        """A small file, whole. Raises FileNotFoundError, DataError."""

    def path(self, entry: ShardEntry) -> Path:
        """A local file that holds the shard. Raises DataError."""


def open_store(path: str, limits: Limits) -> Store:
    """By the path's scheme. Raises DataError for a scheme that is not allowed."""
    kind = scheme(path)
    if kind is None:
        return Local(path)
    if kind not in REMOTE:
        raise DataError("data", path, f"{kind}: is not allowed", f"give a directory or one of {', '.join(REMOTE)}")
    return Remote(path.rstrip("/"), kind, limits)


class Local:
    """A directory."""

    retries = 0

    def __init__(self, where: str):
        self.where = where

    def read(self, name: str) -> bytes:
        """A small file, whole."""
        return Path(self.where, name).read_bytes()

    def path(self, entry: ShardEntry) -> Path:
        """The shard where it is; opening it tells whether it is there."""
        return Path(self.where, entry.path)


class Remote:
    """A folder of a server."""

    def __init__(self, where: str, kind: str, limits: Limits):
        self.where, self.limits = where, limits
        self.cache = Cache(Path(limits.cache).expanduser(), limits.bytes)
        self.files = filesystem(kind, where)
        self.retries, self._counting = 0, threading.Lock()

    def read(self, name: str) -> bytes:
        """A small file, whole."""
        return self._persist(name, None, None)

    def path(self, entry: ShardEntry) -> Path:
        """The shard's place in the cache, fetched if it is not there."""
        return self.cache.get(entry, lambda f: self._fetch(entry, f))

    def _fetch(self, entry: ShardEntry, f: BinaryIO) -> None:
        for attempt in (1, 2):  # a hash that differs may be the way's fault, once
            f.seek(0)
            f.truncate()
            digest, done = hashlib.sha256(), 0
            while done < entry.bytes:
                part = self._persist(entry.path, done, min(done + PART, entry.bytes), entry.bytes)
                digest.update(part)
                f.write(part)
                done += len(part)
            if digest.hexdigest() == entry.sha256:
                return
            if attempt == 2:
                raise self._fault(entry.path, "does not match its hash", "restore it on the server")
            self._again()

    def _persist(self, name: str, start: int | None, end: int | None, size: int = 0) -> bytes:
        """Bytes [start, end) of a file, tried again with growing pauses until the time is over."""
        begun, pause = time.monotonic(), 0.1
        while True:
            try:
                return self._request(name, start, end, size)
            except (FileNotFoundError, PermissionError, DataError) as e:
                if start is None or isinstance(e, DataError):
                    raise
                raise self._fault(name, f"is missing ({type(e).__name__})", "restore it on the server") from e
            except Exception as e:  # each file system has its own errors for a server that fails or stalls
                spent = time.monotonic() - begun
                if spent + pause > self.limits.seconds:
                    why = f"cannot be had in {spent:.0f} s ({type(e).__name__} {str(e)[:200]})"
                    raise self._fault(name, why, "try later, or raise data.timeout") from e
            self._again()
            time.sleep(pause)
            pause = min(pause * 2, 10.0)

    def _again(self) -> None:
        with self._counting:  # several threads fetch
            self.retries += 1

    def _request(self, name: str, start: int | None, end: int | None, size: int) -> bytes:
        from fsspec.asyn import sync

        limit = self.limits.seconds / 4  # so that a stalled request leaves time for others
        url = f"{self.where}/{name}"
        data = sync(self.files.loop, self.files._cat_file, url, start=start, end=end, timeout=limit)
        if start is None:
            return data
        if data[:64].lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise self._fault(name, "is HTML instead of a tar", "check the address, and that it needs no login")
        if len(data) == size:  # of a server that knows no ranges
            return data[start:]
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes instead of {end - start}")
        return data

    def _fault(self, name: str, why: str, fix: str) -> DataError:
        return DataError("shard" if name.endswith(".tar") else "file", f"{self.where}/{name}", why, fix)


def filesystem(kind: str, where: str) -> Any:
    """fsspec's, made for this store alone. Raises DataError if a package for it is missing."""
    import fsspec

    try:
        return fsspec.filesystem(kind, skip_instance_cache=True)
    except ImportError as e:
        package = "s3fs" if kind == "s3" else "aiohttp"
        raise DataError("data", where, f"{kind}: needs {package}", f"pip install {package}") from e


class Cache:
    """Shards by their hash in one directory; any number of processes may use it."""

    def __init__(self, directory: Path, limit: int):
        self.directory, self.limit = directory, limit

    def get(self, entry: ShardEntry, fetch: Any) -> Path:
        """The shard, fetched into an open file where it is not there yet. Raises DataError."""
        path, asked = self.directory / f"{entry.sha256}.tar", time.time()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._lock(entry.sha256[:2]):  # of the processes that want it, one fetches
                if not path.exists() or path.stat().st_size != entry.bytes:
                    self._raise_failure(path, asked)
                    self._fill(path, entry, fetch)
                os.utime(path)  # used now
        except OSError as e:
            raise DataError("cache", self.directory, f"fails ({e})", "give space, or another data.cache_dir") from e
        return path

    def _raise_failure(self, path: Path, asked: float) -> None:
        """What another process failed with while this one waited for it: the waits of a node shall not add up."""
        failed = path.with_suffix(".failed")
        if failed.exists() and failed.stat().st_mtime > asked:
            raise DataError(*json.loads(failed.read_text()))

    def _fill(self, path: Path, entry: ShardEntry, fetch: Any) -> None:
        with self._lock("room"):
            self._make_room(entry.bytes)
        part = path.with_suffix(".part")
        try:
            with open(part, "wb") as f:
                fetch(f)
            with suppress(IndexFault):  # opening it will say what is wrong
                write(build(part), path)
            os.replace(part, path)
            path.with_suffix(".failed").unlink(missing_ok=True)
        except DataError as e:
            path.with_suffix(".failed").write_text(json.dumps(e.args))
            raise
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used until `size` fits. Who has a removed file open keeps reading it."""
        kept, sizes = [], 0
        for path in self.directory.iterdir():
            try:
                if path.suffix == ".tar":
                    kept.append((path.stat().st_mtime_ns, path.stat().st_size, path))
                elif path.suffix == ".part":
                    sizes += path.stat().st_size
                    if time.time() - path.stat().st_mtime > 3600:  # of a process that was killed
                        path.unlink()
            except FileNotFoundError:  # another process was faster
                continue
        sizes += sum(bytes for _, bytes, _ in kept)
        for _, bytes, path in sorted(kept):
            if sizes + size <= self.limit:
                return
            path.unlink(missing_ok=True)
            path.with_suffix(".idx").unlink(missing_ok=True)
            sizes -= bytes

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        folder = self.directory / "locks"
        folder.mkdir(exist_ok=True)
        with open(folder / name, "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)  # the system releases it when a process dies
            yield
