"""The command line: what it says, its exit codes, and that faults leave nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from dask.distributed import LocalCluster

from wsipipe import cli
from wsipipe.cohort import CohortConfig
from wsipipe.config import load_config
from wsipipe.errors import ConfigError
from wsipipe.lease import Gpu
from wsipipe.lock import Lock
from wsipipe.store import MapStore


def wsipipe(capfd, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture(autouse=True)
def _signals_as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def one_sentence(err: str) -> bool:
    said = [line for line in err.splitlines() if line.startswith("wsipipe: ")]
    return len(said) == 1 and "Traceback" not in err


def test_segment_says_what_it_found_and_how_to_open_it(tiny, oracle, tmp_path, capfd):
    out = tmp_path / "out"
    code, said, _ = wsipipe(capfd, "segment", tiny.path, "--model", oracle, "-o", out, "--device", "cpu")
    assert code == 0
    assert "12 nuclei in 0.02 mm² of tissue" in said
    assert re.search(r"round +12 +100.0%", said)
    assert "the bottleneck is the" in said
    assert f"drag {out.name}" not in said
    assert "drag nuclei.geojson.gz onto the image" in said
    for name in ("overlay.png", "nuclei.parquet", "nuclei.geojson.gz"):
        assert str(out / name) in said
        assert (out / name).exists()


def test_the_stages_follow_one_another_by_hand(tiny, oracle, tmp_path, capfd):
    out = tmp_path / "out"
    for arguments, says in [
        (["tissue"], "mm² of tissue"),
        (["maps", "--model", oracle, "--device", "cpu"], "tiles"),
        (["nuclei"], "12 nuclei"),
        (["export", "--form", "centroids"], "12 nuclei"),
    ]:
        code, said, err = wsipipe(capfd, arguments[0], tiny.path, "-o", out, *arguments[1:])
        assert (code, says in said) == (0, True), err
    assert (out / "overlay.png").exists()


@pytest.mark.parametrize(
    ("stage", "remedy"), [("maps", "wsipipe tissue"), ("nuclei", "wsipipe maps"), ("export", "wsipipe tissue")]
)
def test_a_stage_without_the_one_before_it_names_it(stage, remedy, tiny, oracle, tmp_path, capfd):
    model = ["--model", oracle] if stage == "maps" else []
    code, _, err = wsipipe(capfd, stage, tiny.path, "-o", tmp_path / "out", *model)
    assert code == 1
    assert one_sentence(err)
    assert remedy in err


def test_info_tells_the_slide_and_what_would_be_done(tiny, oracle, capfd):
    code, said, _ = wsipipe(capfd, "info", tiny.path, "--model", oracle)
    assert code == 0
    assert "1024 x 768 px" in said
    assert "0.25 x 0.25 µm/px (vendor)" in said
    assert re.search(r"would run: +\d+ tiles of 96 px", said)
    assert "results/tiny" in said


def test_models_are_listed(capfd):
    code, said, _ = wsipipe(capfd, "models")
    assert code == 0
    assert re.search(r"cellvta-nano +ships, default", said)
    assert "cellvta-uni" in said


def _text_as_svs(folder: Path) -> Path:
    path = folder / "text.svs"
    path.write_text("not a slide")
    return path


def _empty(folder: Path) -> Path:
    path = folder / "empty.svs"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "absent.svs", "no such file"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: "", "no slide is named"),
        (_empty, "is empty"),
        (_text_as_svs, "text.svs"),
    ],
)
def test_what_is_no_slide_is_refused_in_one_sentence(make, says, oracle, tmp_path, capfd):
    code, _, err = wsipipe(capfd, "segment", make(tmp_path), "--model", oracle, "-o", tmp_path / "out")
    assert code == 1
    assert one_sentence(err)
    assert says in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "nobody"], 1, "'nobody' is neither a shipped model"),
        (["--device", "toaster"], 1, "toaster"),
        (["--mpp", "0"], 1, "--mpp 0"),
        (["--mpp", "nan"], 1, "--mpp nan"),
        (["--mpp", "thick"], 2, "--mpp"),
        (["--no-such-option"], 2, "No such option"),
        (["--roi", "absent.geojson"], 2, "does not exist"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--out", "/proc/nowhere"], 1, "choose another folder with --out"),
        (["--scheduler", "fibres"], 1, "--scheduler fibres"),
        (["--memory", "some"], 1, "--memory some is no amount"),
        (["--memory", "64MB"], 1, "--memory 64MB is too little: with batches of 1"),
    ],
)
def test_wrong_usage_and_wrong_values_are_told_apart(arguments, code, says, tiny, oracle, tmp_path, capfd):
    given = ["segment", tiny.path, "--model", oracle, "--out", tmp_path / "out", *arguments]
    got, _, err = wsipipe(capfd, *given)
    assert (got, says in err) == (code, True), err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "nuclei.parquet").exists()


def test_faults_of_a_settings_file_come_all_at_once(tiny, oracle, tmp_path, capfd):
    config = tmp_path / "wsipipe.yaml"
    config.write_text("nuclei: {halo_px: -1, colour: red}\nmaps: {tile_px: 100}\n")
    code, _, err = wsipipe(capfd, "segment", tiny.path, "--model", oracle, "-o", tmp_path / "out", "--config", config)
    assert code == 1
    assert all(place in err for place in ("nuclei.halo_px", "nuclei.colour", "maps.tile_px"))


def test_a_slide_without_mpp_is_refused_with_the_remedy(make_svs, tiny, oracle, tmp_path, capfd):
    path = make_svs(tmp_path / "silent.svs", tiny.pixels, mpp=None)
    arguments = ["segment", path, "--model", oracle, "-o", tmp_path / "out"]
    code, _, err = wsipipe(capfd, *arguments)
    assert code == 1
    assert "pass --mpp, e.g. --mpp 0.25" in err
    code, said, _ = wsipipe(capfd, *arguments, "--mpp", "0.25")
    assert (code, "12 nuclei" in said) == (0, True)


def test_a_full_disk_is_the_users_to_mend(tiny, oracle, tmp_path, capfd, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "nuclei.parquet")

    monkeypatch.setattr("wsipipe.stages.segment.make_maps", full)
    code, _, err = wsipipe(capfd, "segment", tiny.path, "--model", oracle, "-o", tmp_path / "out")
    assert code == 1
    assert "nuclei.parquet: no space left on device; run the same command again" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(number, code, tiny, oracle, tmp_path):
    script = (
        "import sys, time; sys.path.insert(0, sys.argv.pop(1)); import conftest; from wsipipe import cli;"
        "from wsipipe.model import registry;"
        "slow = type('Slow', (conftest.ColourOracle,), {'forward': lambda self, x: (time.sleep(2.0),"
        " conftest.ColourOracle.forward(self, x))[1]});"
        "registry.ARCHITECTURES['oracle'] = slow; cli.main()"
    )
    arguments = ["segment", str(tiny.path), "--model", str(oracle), "-o", str(tmp_path / "out"), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), *arguments], stderr=subprocess.PIPE, text=True
    )
    commits = tmp_path / "out" / "maps.zarr.partial" / "commits"
    while process.poll() is None and not commits.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "run the same command again to go on" in err
    assert "Traceback" not in err


def test_a_fresh_start_that_is_stopped_goes_on(tiny, oracle, tmp_path, capfd, monkeypatch):
    arguments = ["segment", tiny.path, "--model", oracle, "-o", tmp_path / "out", "--device", "cpu"]
    arguments += ["--set", "maps.tile_px=128", "--set", "maps.chunk_tiles=1", "--batch-size", "1"]
    assert wsipipe(capfd, *arguments, "--set", "nuclei.min_area_um2=1")[0] == 0
    real, written = MapStore.write_chunk, []

    def stopped(store, index, *rest):
        real(store, index, *rest)
        written.append(index)
        if len(written) == 3:
            raise OSError(28, "No space left on device", "maps.zarr")

    monkeypatch.setattr(MapStore, "write_chunk", stopped)
    code, _, err = wsipipe(capfd, *arguments, "--overwrite")
    assert (code, "to start afresh, or without --overwrite to go on" in err) == (1, True)
    code, said, err = wsipipe(capfd, *arguments)
    assert (code, "12 nuclei" in said) == (0, True), err
    assert len(written) == len(set(written))


def test_maps_are_recorded_with_the_settings_of_their_tissue(tiny, oracle, tmp_path, capfd):
    out = ["-o", tmp_path / "out"]
    maps = ["maps", tiny.path, *out, "--model", oracle, "--device", "cpu"]
    assert wsipipe(capfd, "tissue", tiny.path, *out, "--set", "tissue.min_area_um2=10")[0] == 0
    code, _, err = wsipipe(capfd, *maps, "--set", "tissue.min_area_um2=20")
    assert (code, "tissue.min_area_um2 10.0 there and 20.0 now; make it again with `wsipipe tissue`" in err) == (
        1,
        True,
    )
    assert wsipipe(capfd, *maps)[0] == 0
    assert MapStore.open(tmp_path / "out" / "maps.zarr").meta.tissue_settings["min_area_um2"] == 10
    code, said, err = wsipipe(
        capfd, "segment", tiny.path, *out, "--model", oracle, "--device", "cpu", "--set", "tissue.min_area_um2=10"
    )
    assert (code, "12 nuclei" in said) == (0, True), err


@pytest.mark.parametrize(("stage", "setting"), [("tissue", "nuclei.min_area_um2=30"), ("nuclei", "maps.halo_px=32")])
def test_settings_that_a_stage_does_not_take_are_refused(stage, setting, tiny, tmp_path, capfd):
    code, _, err = wsipipe(capfd, stage, tiny.path, "-o", tmp_path / "out", "--set", setting)
    assert (code, one_sentence(err)) == (1, True)
    assert f"this command takes no settings of {setting.partition('.')[0]}; set those of {stage}" in err


def test_help_names_every_command(capfd):
    code, said, _ = wsipipe(capfd, "--help")
    assert code == 0
    for command in ("segment", "tissue", "maps", "nuclei", "export", "info", "models", "demo", "train", "doctor"):
        assert command in said


def test_the_version_is_that_of_the_package(capfd):
    from wsipipe import __version__

    assert wsipipe(capfd, "--version")[:2] == (0, f"{__version__}\n")


def test_sections_of_a_file_may_be_empty_but_not_there_twice(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("nuclei:\n#  min_area_um2: 10\ntissue:\n  mpp: 4\n")
    assert load_config(path) == load_config(None, {"tissue": {"mpp": 4}})
    assert CohortConfig.model_validate({"settings": None}) == CohortConfig()
    path.write_text("nuclei:\n  min_area_um2: 10\ntissue:\n  mpp: 4\nnuclei:\n  np_threshold: 0.4\n")
    with pytest.raises(ConfigError, match="nuclei stands there twice"):
        load_config(path)


def test_settings_by_option_win_over_the_file(tiny, oracle, tmp_path, capfd):
    config = tmp_path / "wsipipe.yaml"
    config.write_text("nuclei: {min_area_um2: 20000, np_threshold: 0.4}\n")
    arguments = ["segment", tiny.path, "--model", oracle, "-o", tmp_path / "out", "--config", config]
    code, said, _ = wsipipe(capfd, *arguments, "--set", "nuclei.min_area_um2=6", "--set", "nuclei.halo_px=64")
    assert (code, "12 nuclei" in said) == (0, True)
    record = json.loads((tmp_path / "out" / "nuclei.parquet.json").read_text())
    used = [record["config"][key] for key in ("min_area_um2", "np_threshold", "halo_px")]
    assert used == [6, 0.4, 64]
    code, _, err = wsipipe(capfd, *arguments, "--set", "halo_px=64", "--set", "nuclei.x")
    assert (code, "halo_px=64, nuclei.x" in err) == (1, True)
    code, _, err = wsipipe(capfd, *arguments, "--set", "nuclei.colour=red")
    assert (code, "nuclei.colour: extra inputs" in err) == (1, True)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("nuclei.max_hole_um=.inf", "nuclei.max_hole_um: input should be a finite number"),
        ("nuclei.hv_scale=[.nan, 0.9]", "nuclei.hv_scale"),
        ("nuclei.min_area_um2=", "nuclei.min_area_um2: input should be a valid number"),
        ("nuclei.no_such=null", "nuclei.no_such: extra inputs are not permitted"),
    ],
)
def test_a_setting_without_a_value_or_end_is_refused(given, fault, tiny, oracle, tmp_path, capfd):
    code, _, err = wsipipe(capfd, "segment", tiny.path, "--model", oracle, "-o", tmp_path / "out", "--set", given)
    assert code == 1
    assert fault in err


def test_where_nobody_watches_other_settings_mean_a_fresh_start(tiny, oracle, tmp_path, capfd, caplog):
    out = ["-o", tmp_path / "out"]
    for stage in (["tissue"], ["maps", "--model", oracle, "--device", "cpu"], ["nuclei"]):
        assert wsipipe(capfd, stage[0], tiny.path, *out, *stage[1:])[0] == 0
    other = ["nuclei", tiny.path, *out, "--set", "nuclei.min_area_um2=40"]
    code, _, err = wsipipe(capfd, *other)
    assert (code, "made with other settings" in err) == (1, True)
    code, said, err = wsipipe(capfd, *other, "--unattended")
    assert (code, "3 nuclei" in said, "starting afresh" in caplog.text) == (0, True, True), said + err


def test_where_nobody_watches_one_waits_for_the_other(tiny, oracle, tmp_path, capfd, caplog, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    lock = Lock(out / "tissue.png")
    code, _, err = wsipipe(capfd, "tissue", tiny.path, "-o", out)
    assert (code, "is in use by process" in err) == (1, True)
    monkeypatch.setattr("wsipipe.lock.time", SimpleNamespace(sleep=lambda _: lock.release()))
    code, said, _ = wsipipe(capfd, "tissue", tiny.path, "-o", out, "--unattended")
    assert (code, "mm² of tissue" in said, "waiting for it" in caplog.text) == (0, True, True)


def test_a_leased_device_is_what_the_network_runs_on(tiny, oracle, tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setenv("WSIPIPE_LEASES", str(tmp_path / "leases"))
    monkeypatch.setattr("wsipipe.lease.visible_gpus", lambda: [Gpu("cpu", "GPU-that-is-none")])
    assert wsipipe(capfd, "tissue", tiny.path, "-o", tmp_path / "out")[0] == 0
    code, _, err = wsipipe(
        capfd, "maps", tiny.path, "-o", tmp_path / "out", "--model", oracle, "--device", "lease", "--unattended"
    )
    assert (code, "leased cpu (GPU-that-is-none)" in caplog.text) == (0, True), err
    record = json.loads((tmp_path / "out" / "maps.zarr.json").read_text())
    assert (record["device"], record["tiles"] > 0, record["model"]["name"]) == ("cpu", True, "oracle")


def test_the_demo_slide_can_be_had_alone(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("wsipipe.demo.make_demo_slide", lambda path: path.touch())
    code, said, _ = wsipipe(capfd, "demo", "--out", tmp_path / "demo", "--slide-only")
    assert (code, said) == (0, "")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["demo.svs"]


def test_the_demo_needs_a_folder_not_a_file(tmp_path, capfd):
    (tmp_path / "file").touch()
    code, _, err = wsipipe(capfd, "demo", "--out", tmp_path / "file")
    assert code == 1
    assert one_sentence(err)
    assert "choose another folder with --out" in err


def test_the_nuclei_of_one_slide_can_be_found_by_a_dask_cluster(tiny, oracle, tmp_path, capfd):
    out = ["-o", tmp_path / "out"]
    for stage in (["tissue"], ["maps", "--model", oracle, "--device", "cpu"], ["nuclei", "--workers", "1"]):
        assert wsipipe(capfd, stage[0], tiny.path, *out, *stage[1:])[0] == 0
    table = tmp_path / "out" / "nuclei.parquet"
    by_threads = table.read_bytes()
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        assert "://" in address
        code, said, _ = wsipipe(capfd, "nuclei", tiny.path, *out, "--scheduler", address, "--overwrite")
    assert (code, "12 nuclei" in said) == (0, True)
    assert table.read_bytes() == by_threads
