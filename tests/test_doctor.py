import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import psutil
import pytest
import torch
from torch import nn

from wsipipe import doctor
from wsipipe.doctor import Check, examine, usable_memory
from wsipipe.model import weights
from wsipipe.model.inference import prepare_for_inference


def check(name: str, folder: Path = Path()) -> Check:
    return {found.name: found for found in examine(folder)}[name]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped weights that holds the default checkpoint and its sum."""
    path = tmp_path / f"{weights.DEFAULT_MODEL}.safetensors"
    path.write_bytes(b"weights")
    (tmp_path / "SHA256SUMS").write_text(f"{weights.sha256(path)}  {path.name}\n")
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    return path


def test_a_machine_that_runs_these_tests_has_what_reading_and_the_network_need() -> None:
    checks = {found.name: found for found in examine()}
    for name in ("Python", "wsipipe", "PyTorch", "device", "CPUs", "OpenSlide", "codecs", "arithmetic"):
        assert checks[name].verdict == "ok", checks[name]
    assert checks["device"].text.endswith(("fp32", "bf16", "fp16"))


def test_shipped_weights_with_their_sum_are_fine(shipped: Path) -> None:
    assert check("weights").verdict == "ok"


def test_weights_with_a_changed_byte_fail(shipped: Path) -> None:
    shipped.write_bytes(b"Weights")
    assert check("weights").verdict == "fail"
    assert str(shipped) in check("weights").text


@pytest.mark.parametrize("missing", [f"{weights.DEFAULT_MODEL}.safetensors", "SHA256SUMS"])
def test_weights_or_sums_that_are_missing_fail_with_the_reason(shipped: Path, missing: str) -> None:
    (shipped.parent / missing).unlink()
    assert check("weights").verdict == "fail"
    assert missing.removesuffix(".safetensors") in check("weights").text


def test_arithmetic_that_computes_something_else_fails_with_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("arithmetic").verdict == "ok"

    def wrong_in_bf16(network: nn.Module, *where: Any) -> nn.Module:
        prepared = prepare_for_inference(network, *where)
        if where[1] == torch.bfloat16:
            prepared.encoder.vit.patch_embed.proj.weight.mul_(-1)
        return prepared

    monkeypatch.setattr("wsipipe.device.choose_precision", lambda *_: "bf16")
    monkeypatch.setattr("wsipipe.model.inference.prepare_for_inference", wrong_in_bf16)
    found = check("arithmetic")
    assert found.verdict == "fail"
    assert "--precision fp32" in found.text


def test_whatever_a_driver_raises_fails_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error:\n  no kernel image is available")

    monkeypatch.setattr(doctor, "_arithmetic", broken)
    checks = {check.name: check for check in doctor.examine()}
    assert (checks["arithmetic"].verdict, checks["numba"].verdict) == ("fail", "ok")
    assert checks["arithmetic"].text == "RuntimeError: CUDA error: no kernel image is available"


def test_a_library_that_does_not_load_fails_and_the_other_checks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openslide", None)
    assert check("OpenSlide").verdict == "fail"
    assert check("codecs").verdict == "ok"


def test_a_full_disk_and_little_memory_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    monkeypatch.setattr(doctor, "usable_memory", lambda: 2**30)
    assert check("disk", tmp_path).verdict == "warn"
    assert check("memory").verdict == "warn"


def test_a_package_where_machine_code_cannot_be_kept_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool) -> Callable[..., None]:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba, "njit", njit)
    assert check("numba").verdict == "warn"


@pytest.mark.parametrize(
    ("controllers", "limit"), [("", "memory.max"), ("cpu,memory", "memory/memory.limit_in_bytes")], ids=["v2", "v1"]
)
def test_the_limit_of_a_job_above_this_process_counts(tmp_path: Path, controllers: str, limit: str) -> None:
    own = tmp_path / "own"
    own.write_text(f"7:pids:/\n3:{controllers}:/job/step\n")
    root, name = (tmp_path / limit).parent, Path(limit).name
    (root / "job/step").mkdir(parents=True)
    (root / "job" / name).write_text("1000000\n")
    (root / "job/step" / name).write_text("9000000\n" if controllers else "max\n")
    assert usable_memory(tmp_path, own) == 1_000_000


def test_without_control_groups_the_whole_memory_counts(tmp_path: Path) -> None:
    assert usable_memory(tmp_path, tmp_path / "none") == psutil.virtual_memory().total
