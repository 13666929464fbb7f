"""The doctor: each fault that can be made here is found, and said in one line with what to do."""

import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from launch import doctor


def only(findings) -> doctor.Finding:
    (finding,) = findings
    assert "\n" not in str(finding)
    assert bool(finding.do) == (finding.level != "ok")
    return finding


def test_this_machine_is_examined(tmp_path, capsys):
    assert doctor.main(["--run", str(tmp_path / "runs"), "--processes", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    for what in ("python: 3.", "versions: ", "driver: ", "ports: localhost", f"disk {tmp_path}", "clock: ", " x 2: "):
        assert any(what in line for line in out), what
    assert any("GB/s a rank" in line for line in out)
    assert all(line.startswith(("ok ", "warn ")) for line in out)


def test_packages():
    python, missing, other = doctor.versions("pytest==0.1\nno-such-package==1.0\n")
    assert python.level == "ok"
    assert str(missing) == "wrong  no-such-package: not installed; pip install no-such-package==1.0"
    assert other.level == "warn"
    assert "tested with 0.1" in other.says


def test_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert next(doctor.versions("")).level == "wrong"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
def test_driver(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert only(doctor.driver()).level == "warn"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in only(doctor.driver()).says
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the driver" in only(doctor.driver()).do


def test_processes_that_do_not_meet(monkeypatch):
    found = only(doctor.bandwidth(2, seconds=0.0))
    assert found.level == "wrong"
    assert "no all-reduce in 0 s" in found.says
    assert only(doctor.bandwidth(1)).level == "ok"


def test_a_name_that_does_not_resolve():
    local, named = doctor.ports("no-such-host.invalid")
    assert local.level == "ok"
    assert named.level == "wrong"
    assert "MASTER_ADDR" in named.do


def test_a_disk(tmp_path):
    assert only(doctor.disk(tmp_path, needed=0.0)).level == "ok"
    assert only(doctor.disk(tmp_path, needed=1e9)).level == "warn"
    (tmp_path / "file").write_text("")
    assert only(doctor.disk(tmp_path / "file" / "runs")).level == "wrong"


def test_shared_memory(monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**26))
    assert "0.06 GiB" in only(doctor.shared_memory()).says
    monkeypatch.undo()
    assert only(doctor.shared_memory("/no/such/place")).level == "warn"


@pytest.mark.parametrize(("synced", "level"), [(True, "ok"), (None, "ok"), (False, "warn")])
def test_a_clock(monkeypatch, tmp_path, synced, level):
    monkeypatch.setattr(doctor, "_time_service", lambda: synced)
    assert only(doctor.clock(tmp_path)).level == level
    late = only(doctor.clock(tmp_path, now=lambda: time.time() + 60))
    assert late.level == "wrong"
    assert "-60 s" in late.says
    assert list(doctor.clock(Path("/no/such/place"))) == []
