"""Shards: what is written is read, by WebDataset too, and damage is named."""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from configs.errors import DataError
from data.loader import Loader
from data.shards import Shard, ShardEntry, read_manifest, sha256, write_shard


@pytest.fixture
def data(corpus, tmp_path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "data"))


def first(data: Path) -> Path:
    return data / read_manifest(data).splits["train"][0].path


def read_all(data: Path) -> None:
    manifest = read_manifest(data)
    for entry in (e for entries in manifest.splits.values() for e in entries):
        Shard(data, entry, manifest.dtype, verify=True)


def fails(data: Path, *says: str) -> None:
    with pytest.raises(DataError) as e:
        read_all(data)
    assert e.value.code == 65
    for part in says:
        assert part in str(e.value)


def test_whole_data_reads(data):
    read_all(data)
    assert len(read_manifest(data).splits["train"]) > 2


def test_webdataset_reads_the_same(data):
    manifest = read_manifest(data)
    entry = manifest.splits["train"][0]
    shard = Shard(data, entry, manifest.dtype, verify=True)
    samples = list(webdataset.WebDataset(str(data / entry.path), shardshuffle=False))
    tokens = np.concatenate([np.frombuffer(s["tok.bin"], manifest.dtype) for s in samples])
    assert np.array_equal(tokens, shard.read(0, len(shard)))
    assert samples[0]["__key__"].startswith("train-000000")


def test_a_large_vocabulary_needs_four_bytes(tmp_path):
    documents = [np.array([70000, 1, 2]), np.array([2**31 - 1])]
    entry = write_shard(tmp_path / "big.tar", documents, "uint32")
    assert Shard(tmp_path, entry, "uint32", verify=True).read(0, 4).tolist() == [70000, 1, 2, 2**31 - 1]


@pytest.mark.parametrize("cut", [1, 512, 700, 10240])
def test_a_short_shard(data, cut):
    path = first(data)
    path.write_bytes(path.read_bytes()[:-cut])
    fails(data, str(path), "bytes instead of", "sample 0 is the first that differs")


def test_a_flipped_bit(data):
    path = first(data)
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 4
    path.write_bytes(raw)
    fails(data, str(path), "does not match its hash, sample 0 is the first that differs")


def test_a_missing_shard(data):
    path = first(data)
    path.unlink()
    fails(data, str(path), "is missing, with samples 0 to 0")


def test_html_instead_of_a_shard(data):
    path = first(data)
    size = path.stat().st_size
    path.write_bytes(b"<html>503 Service Unavailable</html>".ljust(size))
    fails(data, str(path), "hash, sample 0 is the first that differs (it is HTML)")
    manifest = read_manifest(data)
    with pytest.raises(DataError, match=r"sample 0 does not match its checksum \(it is HTML\)"):
        Shard(data, manifest.splits["train"][0], manifest.dtype).read(0, 1)


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_the_sample_that_is_damaged_is_named(tmp_path, how):
    """Of blocks that are larger than a page."""
    documents = [np.full(50_000, i) for i in range(30)]
    entry = write_shard(tmp_path / "a.tar", documents, "uint32")
    assert entry.samples == 5
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    place = Shard(tmp_path, entry, "uint32").index.blocks[3, 0] + 500_000
    raw[place] ^= 1
    (tmp_path / "a.tar").write_bytes(raw if how == "flip" else raw[:place])
    with pytest.raises(DataError, match=r"a.tar: .*sample 3 is the first that differs"):
        Shard(tmp_path, entry, "uint32", verify=True)
    if how == "flip":
        made = Shard(tmp_path, entry, "uint32")
        assert len(made.read(0, 700_000)) == 700_000
        with pytest.raises(DataError, match=r"a.tar: sample 3 does not match its checksum"):
            made.read(0, len(made))


def test_a_file_that_is_cut_short_or_replaced_while_it_is_read(tmp_path):
    entry = write_shard(tmp_path / "a.tar", [np.full(90_000, i) for i in range(30)], "uint32")
    made = Shard(tmp_path, entry, "uint32")
    os.truncate(tmp_path / "a.tar", 3_000_000)
    with pytest.raises(DataError, match=r"a.tar: ends at byte 3000000, before sample 2 does"):
        made.read(0, len(made))


def test_hostile_members_are_neither_written_nor_run(tmp_path):
    """A shard whose hash is right, and whose members would leave the directory or run code if they were unpacked."""
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as tar:
        for name in ("../../evil.tok.bin", "/tmp/evil.doc.bin", "s-0.pyd", "s-0.pkl", "s-0.tok.bin"):
            member, body = tarfile.TarInfo(name), pickle.dumps(Payload())
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
        link = tarfile.TarInfo("s-0.doc.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    digest, size = sha256(tmp_path / "data" / "a.tar"), (tmp_path / "data" / "a.tar").stat().st_size
    entry = ShardEntry("a.tar", size, digest, 1, 1, 10)
    with pytest.raises(DataError, match=r"a.tar: sample  ?lacks its tok.bin or doc.bin"):
        Shard(tmp_path / "data", entry, "uint16")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "data"]


def pack(path: Path, *members: tuple[str, bytes]) -> ShardEntry:
    """A tar of these, and an entry with its true hash, two samples of 3 tokens and 1 document each."""
    with tarfile.open(path, "w") as tar:
        for name, body in members:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return ShardEntry(path.name, path.stat().st_size, sha256(path), 2, 2, 6)


TOK, DOC = np.array([1, 2, 3], "<u2").tobytes(), np.array([0], "<u4").tobytes()


def test_samples_whose_members_are_apart_are_whole(tmp_path):
    members = [("0.tok.bin", TOK), ("1.tok.bin", TOK[::-1]), ("0.doc.bin", DOC), ("1.doc.bin", DOC)]
    shard = Shard(tmp_path, pack(tmp_path / "a.tar", *members), "uint16")
    assert shard.read(0, 6).tolist() == [1, 2, 3, 768, 512, 256]
    assert shard.starts.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("0.tok.bin", TOK), ("0.doc.bin", DOC), ("0.tok.bin", TOK), ("0.doc.bin", DOC)], "has 2 members twice"),
        ([("0.tok.bin", TOK), ("0.doc.bin", DOC), ("1.tok.bin", b""), ("1.doc.bin", DOC)], "the manifest says"),
        ([("0.tok.bin", TOK), ("0.doc.bin", DOC), ("1.tok.bin", TOK), ("1.doc.bin", b"")], "the manifest says"),
        ([("0.tok.bin", TOK), ("0.doc.bin", DOC), ("1.tok.bin", TOK)], "lacks its tok.bin or doc.bin"),
    ],
    ids=["twice", "no tokens", "no documents", "half a sample"],
)
def test_members_that_are_double_empty_or_missing(tmp_path, members, says):
    with pytest.raises(DataError, match=f"a.tar: .*{says}"):
        Shard(tmp_path, pack(tmp_path / "a.tar", *members), "uint16")


def test_counts_that_differ_from_the_manifest(data):
    content = json.loads((data / "manifest.json").read_text())
    content["splits"]["train"][0]["documents"] += 1
    (data / "manifest.json").write_text(json.dumps(content))
    fails(data, "the manifest says")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 7}'])
def test_a_broken_manifest(data, text):
    (data / "manifest.json").write_text(text)
    fails(data, "manifest.json")


def test_a_manifest_that_points_outside(data):
    content = json.loads((data / "manifest.json").read_text())
    content["splits"]["train"][0]["path"] = "../secret.tar"
    (data / "manifest.json").write_text(json.dumps(content))
    fails(data, "outside", "../secret.tar")


def test_no_data_at_all(tmp_path):
    with pytest.raises(DataError, match=r"no manifest.json there; make it with python -m data.prepare"):
        Loader(str(tmp_path / "nothing"), "train", 8, 1, 1, 0)
