"""What the network runs on."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wsipipe import device as module
from wsipipe.device import choose_batch_size, choose_device, choose_precision, describe, torch_dtype, usable_cpus
from wsipipe.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(total_memory=24 * 2**30, name="Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def test_auto_takes_the_gpu_where_there_is_one(two_gpus: None) -> None:
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "cuda:x", "", "mps"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name: str, two_gpus: None) -> None:
    with pytest.raises(ConfigError, match="available: auto, cuda:0, cuda:1, cpu"):
        choose_device(name)


def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(ConfigError, match="device 'cuda' is not here; available: auto, cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_cuda_counts_in_the_half_precision_it_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision("auto", CUDA) == precision


@pytest.mark.parametrize(("has", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_counts_in_bf16_only_with_units_for_it(
    monkeypatch: pytest.MonkeyPatch, has: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert choose_precision("auto", CPU) == precision


def test_a_slow_precision_is_taken_with_a_warning_and_an_unknown_one_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_cpu_has_bf16", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert choose_precision("bf16", CPU) == "bf16"
    assert "fp32 is many times faster" in caplog.text
    with pytest.raises(ConfigError, match="choose auto, fp32, bf16, fp16"):
        choose_precision("int8", CPU)


def test_batches_fill_a_gpu_by_its_size_and_shrink_with_the_tile(two_gpus: None) -> None:
    assert choose_batch_size(CUDA, 256, "bf16") == 48
    assert choose_batch_size(CUDA, 512, "bf16") == 12
    assert choose_batch_size(CUDA, 4096, "fp32") == 1
    assert choose_batch_size(CPU, 256, "fp32") >= choose_batch_size(CPU, 1024, "fp32") == 1


def test_the_log_tells_device_and_precision(two_gpus: None) -> None:
    assert describe(CUDA, "bf16") == "cuda:0 (Card, 24 GiB), bf16"
    assert describe(CPU, "fp32").startswith("cpu (")
    assert torch_dtype("fp16") == torch.float16


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "300000 100000"}, 3),
        ("0::/job\n", {"job/cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/\n", {}, 8),
        (
            "4:cpu,cpuacct:/pod\n0::/\n",
            {"cpu/pod/cpu.cfs_quota_us": "400000", "cpu/pod/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("4:cpu:/pod\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cpus_are_those_that_affinity_and_quota_grant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], cpus: int
) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    assert usable_cpus(tmp_path / "groups", tmp_path / "own") == cpus


def test_cpus_are_counted_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path, tmp_path / "none") >= 1
