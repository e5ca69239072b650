"""The folder of one slide: whose it is, who works in it, and that no name leads out of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from wsipipe.atomic import finished
from wsipipe.config import Config
from wsipipe.errors import StoreError
from wsipipe.folder import ResultFolder
from wsipipe.lock import Lock
from wsipipe.model.weights import load_model
from wsipipe.slide import open_slide
from wsipipe.stages.segment import segment
from wsipipe.stages.tissue import find_tissue


def run(slide_path, out, model, **options):
    with open_slide(slide_path) as slide:
        return segment(slide, load_model(model), ResultFolder(out), Config(), device="cpu", precision="fp32", **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_slides_of_one_name_are_refused_and_nothing_is_overwritten(tiny, oracle, make_svs, tmp_path, overwrite):
    out = tmp_path / "results" / "tiny"
    run(tiny.path, out, oracle)
    before = files(out)
    (tmp_path / "other").mkdir()
    other = make_svs(tmp_path / "other" / "tiny.svs", tiny.pixels[:512])
    with pytest.raises(StoreError, match=r"holds results of another slide, .*tiny\.svs; choose another folder"):
        run(other, out, oracle, overwrite=overwrite)
    assert files(out) == before


@pytest.mark.parametrize("stage", ["tissue", "maps", "nuclei", "export"])
def test_no_stage_writes_into_the_folder_of_another_slide(stage, tiny, oracle, make_svs, tmp_path):
    from wsipipe import cli

    out = tmp_path / "out"
    run(tiny.path, out, oracle)
    before = files(out)
    other = make_svs(tmp_path / "tiny.svs", tiny.pixels[:512])
    with pytest.raises(StoreError, match="another slide"):
        cli.app([stage, str(other), "-o", str(out)], standalone_mode=False)
    assert files(out) == before


def test_the_slide_may_move(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    moved = tmp_path / "moved.svs"
    moved.write_bytes(tiny.path.read_bytes())
    assert run(moved, tmp_path / "out", oracle).maps.tiles == 0
    assert json.loads((tmp_path / "out" / "slide.json").read_text())["path"] == str(tiny.path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"path": 1}'])
def test_a_damaged_record_of_the_slide_is_refused_with_the_remedy(content, tiny, tmp_path):
    (tmp_path / "slide.json").write_text(content)
    with open_slide(tiny.path) as slide, pytest.raises(StoreError, match=r"slide\.json is damaged; remove it"):
        ResultFolder(tmp_path).claimed(slide).__enter__()


SECOND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import conftest
from wsipipe import cli
from wsipipe.model import registry
registry.ARCHITECTURES["oracle"] = conftest.ColourOracle
cli.main()
"""


def test_a_second_segment_on_a_folder_refuses_at_once_and_names_the_first(tiny, oracle, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ["segment", str(tiny.path), "--model", str(oracle), "-o", str(out), "--device", "cpu"]
    seconds = []

    def while_at_work(*arguments_of_stage, **options):  # the first has just begun: nothing is written yet
        command = [sys.executable, "-c", SECOND, str(Path(__file__).parent), *arguments]
        seconds.append(subprocess.run(command, capture_output=True, text=True, check=False, timeout=240))
        return find_tissue(*arguments_of_stage, **options)

    monkeypatch.setattr("wsipipe.stages.segment.find_tissue", while_at_work)
    run(tiny.path, out, oracle)
    assert seconds[0].returncode == 1
    assert f"is in use by process {os.getpid()} on {socket.gethostname()}; wait for it" in seconds[0].stderr
    assert not list(out.glob("*.lock"))


def test_a_lock_whose_holder_died_holds_nobody_up(tiny, oracle, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("tissue.png", "nuclei.parquet", "nuclei.geojson.gz", "maps.zarr"):
        (out / f"{name}.lock").write_text("process 4194305 on a machine that is gone")
    run(tiny.path, out, oracle)
    assert not list(out.glob("*.lock"))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("...svs", "slide"),
        ("..svs", "slide"),
        (".svs", "slide"),
        ("a\nb.svs", "a_b"),
        ("a\u202eb.svs", "a_b"),
        ("\udcff.svs", "_"),
        ("ä µ 組織.svs", "ä µ 組織"),
        ("x" * 251 + ".svs", "x" * 251),
        ("-rf.svs", "-rf"),
        ("$(touch x);`y`.svs", "$(touch x);`y`"),
    ],
)
def test_a_slide_of_any_name_has_its_results_below_the_output_folder(name, safe, tiny, oracle, tmp_path, monkeypatch):
    from wsipipe import cli

    (tmp_path / "in").mkdir()
    (tmp_path / "run" / "deep").mkdir(parents=True)
    path = tmp_path / "in" / name
    path.write_bytes(tiny.path.read_bytes())
    monkeypatch.chdir(tmp_path / "run" / "deep")
    cli.app(["segment", str(path), "--model", str(oracle), "--device", "cpu"], standalone_mode=False)
    assert {file.relative_to(tmp_path / "run").parts[:3] for file in (tmp_path / "run").rglob("*.parquet")} == {
        ("deep", "results", safe)
    }
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["deep"]
    assert [file.name for file in (tmp_path / "in").iterdir()] == [name]


def test_links_that_somebody_left_lead_nobody_elsewhere(tiny, oracle, tmp_path):
    victim = tmp_path / "precious.txt"
    victim.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("tissue.png", "nuclei.geojson.gz", "overlay.png", "segment.json", "slide.json"):
        (out / f"{name}.partial").symlink_to(victim)
    (out / "tissue.png").symlink_to(victim)
    run(tiny.path, out, oracle)
    assert victim.read_text() == "precious"
    assert not (out / "tissue.png").is_symlink()
    (out / "tissue.png.lock").symlink_to(victim)
    with pytest.raises(StoreError, match=r"tissue\.png\.lock cannot be opened"):
        run(tiny.path, out, oracle)
    assert victim.read_text() == "precious"


def test_a_file_begun_by_a_killed_run_is_begun_anew(tmp_path):
    (tmp_path / "a.json.partial").write_text("half of a long text that a kill cut")
    with finished(tmp_path / "a.json") as partial:
        partial.write_text("whole")
    assert (tmp_path / "a.json").read_text() == "whole"


def test_locks_of_several_outputs_are_all_given_back_where_one_is_held(tiny, tmp_path):
    folder = ResultFolder(tmp_path)
    held = Lock(folder.nuclei)
    with open_slide(tiny.path) as slide:
        with pytest.raises(StoreError, match="in use"):
            folder.claimed(slide, folder.tissue, folder.nuclei).__enter__()
        held.release()
        with folder.claimed(slide, folder.tissue, folder.nuclei):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["slide.json"]


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is no name in UTF-8; choose another folder with --out"):
        ResultFolder(tmp_path / "r\udce9s").prepare()
    assert not list(tmp_path.iterdir())


def test_the_folder_one_is_in_can_be_locked(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lock = Lock(Path())
    assert (tmp_path / "here.lock").exists()
    with pytest.raises(StoreError, match="in use"):
        Lock(tmp_path / "here")
    lock.release()
