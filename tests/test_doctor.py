"""The doctor: each fault that can be made here is found, and said in one line with what to do."""

import os
import socket
import subprocess
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


@pytest.mark.parametrize("mistake", ["--processes=0", "--processes=x", "--other"])
def test_a_mistake_is_one_line(mistake, capsys):
    with pytest.raises(SystemExit) as left:
        doctor.main([mistake])
    assert left.value.code == 64
    said = capsys.readouterr().err
    assert said.startswith("error: option ")
    assert said.count("\n") == 1


def test_the_nodes_of_a_job_and_what_is_between_them(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    command = [sys.executable, str(doctor.ROOT / "launch/doctor.py"), "--run", str(tmp_path / "runs")]
    envs = [{**os.environ, **place, "RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"} for rank in range(2)]
    ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in envs]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[1] == ""
    for what in (
        "n0 driver: ",
        "n1 driver: ",
        "nodes: 2, 2 processes: n0 n1",
        "clocks: 0.",
        " x 2: all-reduce between all",
    ):
        assert what in said[0]


def test_nodes_that_are_not_alike():
    here, there = doctor.Finding("ok", "python", "3.11.7"), doctor.Finding("ok", "python", "3.12.1")
    full = doctor.Finding("warn", "disk runs", "1 GiB free", "make room")
    told = [("n0", 100.0, [here]), ("n0", 100.1, []), ("n1", 190.0, [there, full])]
    assert [str(f) for f in doctor._compared(told)] == [
        "warn   n1 disk runs: 1 GiB free; make room",
        "ok     nodes: 2, 3 processes: n0 n1",
        "wrong  python: n0 has 3.11.7, n1 has 3.12.1; make the nodes alike, or leave these out (--exclude)",
        "wrong  clocks: 90.00 s apart at most; start chrony or ntpd on all nodes",
    ]


def test_processes_that_cannot_meet_say_where(tmp_path, monkeypatch):
    place = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    real = doctor.timedelta
    monkeypatch.setattr(doctor, "timedelta", lambda seconds: real(seconds=1))
    found = only(doctor.job(tmp_path))
    assert found.level == "wrong"
    assert "do not meet at no-such-host.invalid:1" in found.says


def test_the_version_of_a_driver(tmp_path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan\nGCC version: 12\n"
    )
    assert doctor._driver_version(str(tmp_path / "version")) == "570.86.15"
    assert doctor._driver_version("/no/such/file") == "unknown"
