"""Shards: what is written is read, by WebDataset too, and damage is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from configs.errors import DataError
from data.loader import Loader
from data.shards import Shard, read_manifest, write_shard


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
    fails(data, str(path), "bytes instead of")


def test_a_flipped_bit(data):
    path = first(data)
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 4
    path.write_bytes(raw)
    fails(data, str(path), "does not match its hash")


def test_a_missing_shard(data):
    path = first(data)
    path.unlink()
    fails(data, str(path), "is missing")


def test_html_instead_of_a_shard(data):
    path = first(data)
    size = path.stat().st_size
    path.write_bytes(b"<html>503 Service Unavailable</html>".ljust(size))
    fails(data, str(path), "hash (it is HTML)")
    manifest = read_manifest(data)
    with pytest.raises(DataError, match=r"sample 0 does not match its checksum \(it is HTML\)"):
        Shard(data, manifest.splits["train"][0], manifest.dtype).read(0, 1)


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
