"""Shards from real servers: over HTTP and HTTPS, from an S3-compatible one, and one that fails as servers fail."""

import http.server
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from configs.errors import DataError
from configs.schema import OnBadShard
from data.loader import Loader
from data.shards import Shard, read_manifest
from data.store import Cache, Limits, open_store
from tests.server import free_port, serve
from tests.test_train import lines, train

ROOT = Path(__file__).resolve().parent.parent


def limits(tmp_path, seconds: float = 20.0, size: int = 1 << 30) -> Limits:
    return Limits(str(tmp_path / "cache"), size, seconds)


def loader(path: str, bounds: Limits, **changes) -> Loader:
    options = dict(split="train", seq_len=64, global_batch=8, micro_batch=4, seed=3, limits=bounds)
    return Loader(path, **{**options, **changes})


def steps(made: Loader, count: int) -> list:
    return [
        (b.tokens.tolist(), b.labels.tolist(), b.cu_seqlens.tolist()) for _ in range(count) for b in made.next_step()
    ]


@pytest.fixture(scope="module")
def served(corpus, tmp_path_factory):
    """The corpus behind a web server; its address and the log of requests."""
    with serve(corpus, tmp_path_factory.mktemp("served")) as address_and_log:
        yield address_and_log


def gets(log: Path) -> Counter:
    """Requests by file, when the server has written them down."""
    time.sleep(0.1)
    return Counter(line.rsplit("/", 1)[-1] for line in log.read_text().splitlines())


def test_the_same_batches_from_a_server_and_from_disk(corpus, served, tmp_path):
    address, log = served
    log.write_text("")
    here = loader(corpus, limits(tmp_path))
    there = loader(f"{address}/data", limits(tmp_path), read_ahead=2)
    assert steps(there, 60) == steps(here, 60)
    assert there.fingerprint == here.fingerprint
    ranges = [line for line in log.read_text().splitlines() if line.startswith("206 bytes=0-")]
    assert len(ranges) == len(here.manifest.splits["train"])
    again = loader(f"{address}/data/", limits(tmp_path))
    assert steps(again, 60) == steps(loader(corpus, limits(tmp_path)), 60)
    assert {n for name, n in gets(log).items() if name.endswith(".tar")} == {1}, "the cache is used again"


def test_the_same_batches_over_tls_from_a_server_that_is_trusted(corpus, tmp_path):
    """In a process of its own: what is trusted is read once."""
    (tmp_path / "served").mkdir()
    code = (
        "import sys\nfrom tests.test_store import Limits, loader, steps\n"
        "print(steps(loader(sys.argv[1], Limits(sys.argv[2], 1 << 30, 2.0)), 5))"
    )
    with serve(corpus, tmp_path / "served", nginx=False, tls=True) as (address, log):
        trusted = {**os.environ, "SSL_CERT_FILE": str(tmp_path / "served" / "server.pem")}
        for env, ok in ((trusted, True), (None, False)):
            command = [sys.executable, "-c", code, f"{address}/data", str(tmp_path / f"cache{ok}")]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60, check=False)
            if ok:
                assert done.stdout.strip() == str(steps(loader(corpus, limits(tmp_path)), 5)), done.stderr
            else:
                assert "certificate verify failed" in done.stderr.splitlines()[-1]
        assert "206 bytes=0-" in log.read_text()


def _read_in_a_process(address: str, bounds: Limits) -> list:
    return steps(loader(address, bounds), 20)


def test_processes_of_a_node_fetch_each_shard_once(served, tmp_path):
    address, log = served
    log.write_text("")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(_read_in_a_process, [(f"{address}/data", limits(tmp_path))] * 3)
    assert results[0] == results[1] == results[2]
    assert {n for name, n in gets(log).items() if name.endswith(".tar")} == {1}


def test_a_login_page_instead_of_a_shard(served, corpus, tmp_path):
    address, _ = served
    store = open_store(f"{address}/login", limits(tmp_path))
    with pytest.raises(DataError, match="is HTML instead of a tar"):
        store.path(read_manifest(corpus).splits["train"][0])
    with pytest.raises(DataError, match=r"manifest .*/login/manifest.json: not readable"):
        loader(f"{address}/login", limits(tmp_path))


def test_no_data_behind_an_address(served, tmp_path):
    address, _ = served
    with pytest.raises(DataError, match=r"no manifest.json there"):
        loader(f"{address}/data/nothing", limits(tmp_path))


def test_the_cache_keeps_its_bound_and_the_latest(corpus, tmp_path):
    entries = read_manifest(corpus).splits["train"]
    sizes = [e.bytes for e in entries]
    cache = Cache(tmp_path / "cache", sum(sizes[:3]) + 10)
    for entry in entries:
        path = cache.get(entry, lambda f, entry=entry: f.write(Path(corpus, entry.path).read_bytes()))
        Shard(path.parent, entry, "uint16", False, path.name).read(0, entry.tokens)
        held = sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar"))
        assert held <= cache.limit
        assert path.exists()
    assert not list((tmp_path / "cache").glob("*.part"))
    assert len(list((tmp_path / "cache").glob("*.idx"))) == len(list((tmp_path / "cache").glob("*.tar")))


def test_a_bit_that_flips_in_the_cache(corpus, served, tmp_path):
    address, _ = served
    steps(loader(f"{address}/data", limits(tmp_path)), 60)
    for path in (tmp_path / "cache").glob("*.tar"):
        raw = bytearray(path.read_bytes())
        raw[3000] ^= 16
        path.write_bytes(raw)
    with pytest.raises(DataError, match=r"http.*tar: sample 0 does not match its checksum"):
        steps(loader(f"{address}/data", limits(tmp_path)), 60)


class Failing(http.server.BaseHTTPRequestHandler):
    """Serves a folder, whole files only, except for what `plan` says of the next requests for a shard."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = Path(self.server.folder, Path(self.path).name).read_bytes()
        how = self.server.plan.pop(0) if self.server.plan and self.path.endswith(".tar") else "well"
        self.server.seen.append(how)
        if how == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if how == "flip":
            body = body[:5000] + bytes([body[5000] ^ 1]) + body[5001:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if how == "stall":
            self.wfile.write(body[:1000])
            self.server.stop.wait(30)
        elif how == "short":
            self.wfile.write(body[:1000])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def failing(corpus):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    server.folder, server.plan, server.seen, server.stop = corpus, [], [], threading.Event()
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address_text = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "plan", [["503"] * 3, ["short"] * 2, ["stall"], ["flip"], ["503", "short", "stall", "flip"]], ids=str
)
def test_a_server_that_fails_for_a_while(failing, corpus, tmp_path, plan):
    failing.plan = list(plan)
    entry = read_manifest(corpus).splits["train"][0]
    store = open_store(failing.address_text, limits(tmp_path, seconds=4.0))
    assert store.path(entry).read_bytes() == Path(corpus, entry.path).read_bytes()
    assert failing.seen == [*plan, "well"]
    assert store.retries == len(plan)


def test_a_run_logs_how_often_its_server_was_asked_again(failing, tmp_path):
    failing.plan = ["503"] * 3
    cache, run = tmp_path / "cache", tmp_path / "run"
    train(failing.address_text, run, "train.steps=3", f"data.cache_dir={cache}", "checkpoint.last=false")
    assert [m["data/retries"] for m in lines(run).values()] == [3, 3, 3]


@pytest.mark.parametrize(("plan", "says"), [("503", "503"), ("stall", "Timeout"), ("short", ""), ("flip", "hash")])
def test_a_server_that_does_not_recover(failing, corpus, tmp_path, plan, says):
    failing.plan = [plan] * 1000
    entry = read_manifest(corpus).splits["train"][0]
    begin = time.monotonic()
    with pytest.raises(DataError) as e:
        open_store(failing.address_text, limits(tmp_path, seconds=1.5)).path(entry)
    assert time.monotonic() - begin < 3
    assert entry.path in str(e.value)
    assert says in str(e.value)
    assert not list((tmp_path / "cache").glob("*.tar")) + list((tmp_path / "cache").glob("*.part"))


def test_a_process_that_gives_up_ends_at_once(failing, tmp_path):
    """It does not wait for the shards that it was reading ahead."""
    failing.plan = ["stall"] * 1000
    code = (
        "import sys, time\nfrom data.loader import Loader\nfrom data.store import Limits\n"
        "made = Loader(sys.argv[1], 'train', 64, 8, 4, 3, read_ahead=2, limits=Limits(sys.argv[2], 1 << 30, 2.0))\n"
        "try: made.next_step()\nexcept Exception as e: print(e, time.time(), sep='|')"
    )
    command = [sys.executable, "-c", code, failing.address_text, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    said, at = done.stdout.strip().split("|")
    assert "cannot be had in" in said
    assert time.time() - float(at) < 1.5
    assert "Traceback" not in done.stderr


def test_shards_that_cannot_be_had_are_skipped_and_counted(failing, corpus, tmp_path):
    failing.plan = ["flip"] * 2  # the first shard asked for, and its second try
    here = loader(corpus, limits(tmp_path))
    there = loader(failing.address_text, limits(tmp_path), on_bad_shard=OnBadShard.skip)
    there.sources[0].ahead = lambda windows: None  # one request after the other
    got, expected = steps(there, here.total // 8), steps(here, here.total // 8)
    assert 0 < there.skipped < here.total
    empty = sum(all(x == -100 for x in row) for _, labels, _ in got for row in labels)
    assert empty == there.skipped
    same = sum(a == b for x, y in zip(got, expected) for a, b in zip(x[0], y[0]))
    assert same == len(got) * 4 - there.skipped


def test_a_shard_that_is_gone(served, corpus, tmp_path):
    entry = replace(read_manifest(corpus).splits["train"][0], path="train-999999.tar", sha256="1" * 64)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"/data/train-999999.tar: is missing"):
        open_store(f"{served[0]}/data", limits(tmp_path)).path(entry)
    assert time.monotonic() - begin < 2, "this is not tried again"


@pytest.mark.parametrize(
    "path",
    ["pipe:cat x", "ftp://h/x", "file:///etc", "simplecache::http://h/x", "memory://x", "PIPE://x", "github://a"],
)
def test_other_schemes_are_refused(path, tmp_path):
    with pytest.raises(DataError, match="is not allowed"):
        loader(path, limits(tmp_path))


def test_s3(corpus, tmp_path, monkeypatch):
    """Against moto's server, which speaks S3 over HTTP."""
    for key, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{key}", value)
    port = free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in Path(corpus).iterdir():
            client.upload_file(str(path), "bucket", f"corpus/{path.name}")
        there = loader("s3://bucket/corpus", limits(tmp_path), read_ahead=1)
        assert steps(there, 30) == steps(loader(corpus, limits(tmp_path)), 30)
        with pytest.raises(DataError, match=r"no manifest.json there"):
            loader("s3://bucket/nothing", limits(tmp_path))
        client.delete_object(Bucket="bucket", Key=f"corpus/{there.manifest.splits['val'][0].path}")
        with pytest.raises(DataError, match=r"s3://bucket/corpus/val-000000.tar: is missing"):
            loader("s3://bucket/corpus", limits(tmp_path), split="val").next_step()
    finally:
        server.stop()


def test_a_missing_package_is_one_line():
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from data.store import Limits, open_store\n"
        "try: open_store('s3://bucket/x', Limits())\n"
        "except Exception as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "error: data s3://bucket/x: s3: needs s3fs; pip install s3fs"
