"""Leases of devices: distinct, waited for, and given back by whatever end a process takes."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wsipipe.errors import ConfigError
from wsipipe.lease import Gpu, granted, leased, visible_gpus

TWO = [Gpu("cuda:0", "GPU-aa"), Gpu("cuda:1", "GPU-bb")]
HOLDER = """
import sys
from pathlib import Path
from wsipipe.lease import Gpu, leased
with leased([Gpu(f"cuda:{n}", name) for n, name in enumerate(sys.argv[2:])], Path(sys.argv[1])) as device:
    print(device, flush=True)
    sys.stdin.read()
"""


def holder(folder: Path, *identities: str) -> subprocess.Popen[str]:
    """A process that leases one of the devices, says which, and holds it until its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *identities],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ended(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=240)


def test_as_many_processes_as_devices_get_distinct_ones(tmp_path):
    processes = [holder(tmp_path, "GPU-a", "GPU-b", "GPU-c") for _ in range(3)]
    assert {said(process) for process in processes} == {"cuda:0", "cuda:1", "cuda:2"}
    for process in processes:
        ended(process)


def test_a_device_is_the_same_whatever_a_process_calls_it(tmp_path):
    with leased([Gpu("cuda:0", "GPU-b")], tmp_path):  # as if CUDA_VISIBLE_DEVICES=1
        other = holder(tmp_path, "GPU-a", "GPU-b")
        assert said(other) == "cuda:0"
        third = holder(tmp_path, "GPU-b", "GPU-c")
        assert said(third) == "cuda:1"
    ended(other)
    ended(third)


def test_the_lease_of_a_killed_process_is_free(tmp_path):
    killed = holder(tmp_path, "GPU-aa")
    assert said(killed) == "cuda:0"
    os.kill(killed.pid, signal.SIGKILL)
    ended(killed)
    with leased(TWO[:1], tmp_path) as device:
        assert device == "cuda:0"


def test_one_process_more_than_devices_waits_for_one(tmp_path, caplog):
    caplog.set_level(logging.INFO, "wsipipe")
    first, second = holder(tmp_path, "GPU-aa"), holder(tmp_path, "GPU-bb")
    assert (said(first), said(second)) == ("cuda:0", "cuda:0")
    got: list[str] = []

    def ask() -> None:
        with leased(TWO, tmp_path) as device:
            got.append(device)

    asking = threading.Thread(target=ask)
    asking.start()
    while "waiting for one" not in caplog.text:
        asking.join(0.05)
    assert not got
    ended(second)
    asking.join(60)
    assert got == ["cuda:1"]
    ended(first)


def test_without_a_gpu_it_is_the_cpu_and_loud(tmp_path, caplog):
    with leased([], tmp_path) as device:
        assert device == "cpu"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "NO GPU IS HERE" in caplog.text


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="WSIPIPE_LEASES"), leased(TWO, tmp_path / "file"):
        pass


def test_devices_are_those_that_are_visible_by_their_uuid(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=f"u{n}"))
    assert visible_gpus() == [Gpu("cuda:0", "u0"), Gpu("cuda:1", "u1")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-x")
    assert [device.identity for device in visible_gpus()] == ["3", "GPU-x"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert visible_gpus() == []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert visible_gpus() == [Gpu("mps", "mps")]


def test_a_device_that_is_named_needs_no_lease(monkeypatch):
    monkeypatch.setattr("wsipipe.lease.visible_gpus", lambda: pytest.fail("nobody asked"))
    with granted("cuda:1") as device:
        assert device == "cuda:1"


def test_where_no_gpu_is_granted_it_is_the_cpu_and_loud(monkeypatch, caplog):
    monkeypatch.setattr("wsipipe.lease.visible_gpus", lambda: TWO)
    with granted("lease:0") as device:
        assert device == "cpu"
    assert "NO GPU WAS GRANTED" in caplog.text


def test_a_lease_is_what_the_device_of_that_name_means(tmp_path, monkeypatch):
    monkeypatch.setenv("WSIPIPE_LEASES", str(tmp_path / "leases"))
    monkeypatch.setattr("wsipipe.lease.visible_gpus", lambda: TWO)
    with granted("lease") as first, granted("lease:1") as second:
        assert (first, second) == ("cuda:0", "cuda:1")
