"""Faults while a slide is read or results are written: nothing is lost that was finished, nothing half is left."""

import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from comparable import without_run

import wsipipe.slide
from wsipipe.config import load_config
from wsipipe.errors import SlideError, StoreError
from wsipipe.folder import ResultFolder
from wsipipe.geometry import Box
from wsipipe.model.weights import load_model
from wsipipe.readers import TiledTiff
from wsipipe.slide import open_slide
from wsipipe.stages.nuclei import make_nuclei
from wsipipe.stages.segment import segment
from wsipipe.store import MapStore

SMALL = load_config(overrides={"maps": {"chunk_tiles": 1}})


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(wsipipe.slide, "RETRIES_S", (0.0, 0.0))


def run(path, out, model, **options):
    skips = options.pop("skips_unread", False)
    with open_slide(path, skips_unread=skips) as slide:
        options = {"device": "cpu", "precision": "fp32", **options}
        return segment(slide, load_model(model), ResultFolder(out), SMALL, **options)


def results(out: Path) -> dict[str, bytes]:
    """All files but the records, and of the report what does not tell of the run."""
    kept = (file for file in out.rglob("*") if file.is_file() and not (file.parent == out and file.suffix == ".json"))
    contents = {str(file.relative_to(out)): file.read_bytes() for file in kept}
    return {name: without_run(content) if name.endswith(".html") else content for name, content in contents.items()}


def assert_same_results(out: Path, expected: Path) -> None:
    ours, theirs = results(out), results(expected)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def failing(monkeypatch, fails) -> list[int]:
    """Let tiles of the file fail where `fails(level, number of the tile, attempt)`; counts the attempts."""
    attempts: dict[tuple[int, int], int] = {}
    calls: list[int] = []
    original = TiledTiff._decode

    def decode(reader, level, index):
        attempts[level, index] = attempts.get((level, index), 0) + 1
        calls.append(index)
        if fails(level, index, attempts[level, index]):
            raise OSError(5, "Input/output error")
        return original(reader, level, index)

    monkeypatch.setattr(TiledTiff, "_decode", decode)
    return calls


def test_a_read_that_fails_once_is_done_again(tiny, oracle, tmp_path, monkeypatch):
    run(tiny.path, tmp_path / "whole", oracle)
    failing(monkeypatch, lambda level, index, attempt: attempt == 1)
    run(tiny.path, tmp_path / "out", oracle)
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_read_that_always_fails_ends_the_run_with_the_place_and_keeps_what_was_finished(
    tiny, oracle, tmp_path, monkeypatch
):
    run(tiny.path, tmp_path / "whole", oracle)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, lambda level, index, attempt: (level, index) == (0, 6))
        with pytest.raises(SlideError, match=r"cannot be read at level 0, .*Input/output.*the tile at x \d+, y \d+"):
            run(tiny.path, out, oracle)
    assert MapStore.open(out / "maps.zarr", unfinished=True).committed
    assert not (out / "maps.zarr").exists()
    assert not (out / "nuclei.parquet").exists()
    run(tiny.path, out, oracle)
    assert_same_results(out, tmp_path / "whole")


def test_bad_tiles_are_skipped_if_asked_and_recorded_with_their_place(tiny, oracle, tmp_path, monkeypatch):
    failing(monkeypatch, lambda level, index, attempt: (level, index) == (0, 6))  # x 512 to 768, y 256 to 512
    summary = run(tiny.path, tmp_path / "out", oracle, skips_unread=True)
    assert summary.maps.unread_px0
    place = Box(512, 256, 768, 512)
    assert all(box.clipped(place) == box for box in summary.maps.unread_px0)
    record = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert [Box(**box) for box in record["unread_px0"]] == list(summary.maps.unread_px0)
    lost = [disc for disc in tiny.discs if place.owns(disc.x, disc.y)]
    assert lost
    assert summary.nuclei.count <= 12 - len([disc for disc in lost if disc.x > place.x0 + disc.radius])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Look at: unread" in page
    again = run(tiny.path, tmp_path / "out", oracle, skips_unread=True)
    assert (again.maps.tiles, again.maps.unread_px0) == (0, summary.maps.unread_px0)


def test_a_bad_tile_is_one_place_however_many_reads_meet_it(tiny, monkeypatch):
    failing(monkeypatch, lambda level, index, attempt: level == 0 and index in (3, 6))
    with open_slide(tiny.path, skips_unread=True) as slide:
        grid = slide.grid(0.25)
        for x in range(0, 1024, 160):
            for y in range(0, 768, 160):
                slide.read(Box(x, y, x + 200, y + 200), grid)
        assert slide.unread == {Box(768, 0, 1024, 256), Box(512, 256, 768, 512)}


def test_bad_tiles_of_the_low_resolution_that_tissue_is_found_in_are_recorded_too(tiny, oracle, tmp_path, monkeypatch):
    failing(monkeypatch, lambda level, index, attempt: (level, index) == (2, 0))
    run(tiny.path, tmp_path / "out", oracle, skips_unread=True)
    record = json.loads((tmp_path / "out" / "tissue.png.json").read_text())
    assert record["unread_px0"] == [{"x0": 0, "y0": 0, "x1": 1024, "y1": 768}]
    assert "could not be read" in (tmp_path / "out" / "report.html").read_text()


def test_a_reader_that_answers_nothing_more_after_a_failure_is_opened_anew(tiny, tmp_path, monkeypatch):
    """As OpenSlide does."""
    with open_slide(tiny.path, skips_unread=True) as slide:
        whole = slide.read(slide.grid(0.25).box, slide.grid(0.25))
        original, dead = TiledTiff.region, set()

        def region(reader, level, box):
            if reader in dead or not box.clipped(Box(256, 256, 300, 300)).is_empty:
                dead.add(reader)
                raise ValueError("in an error state")
            return original(reader, level, box)

        monkeypatch.setattr(TiledTiff, "region", region)
        pixels = slide.read(slide.grid(0.25).box, slide.grid(0.25))
        assert slide.unread == {Box(256, 256, 512, 512)}
    expected = whole.copy()
    expected[256:512, 256:512] = 255
    np.testing.assert_array_equal(pixels, expected)


@pytest.fixture
def still_open(monkeypatch):
    """The readers that were opened and not closed, and the most that there were at once."""
    readers, most = set(), [0]
    original_open, original_close = wsipipe.slide.open_reader, TiledTiff.close

    def opened(path):
        reader = original_open(path)
        readers.add(reader)
        most[0] = max(most[0], len(readers))
        return reader

    def close(reader):
        readers.remove(reader)  # never twice
        original_close(reader)

    monkeypatch.setattr(wsipipe.slide, "open_reader", opened)
    monkeypatch.setattr(TiledTiff, "close", close)
    return readers, most


def test_many_bad_tiles_leave_no_more_readers_open_than_threads_read(tiny, monkeypatch, still_open):
    readers, most = still_open
    failing(monkeypatch, lambda level, index, attempt: index != 5)  # x 256 to 512, y 256 to 512
    with open_slide(tiny.path, skips_unread=True) as slide:
        grid = slide.grid(0.25)
        boxes = [Box(x, y, x + 200, y + 200) for y in range(0, 768, 160) for x in range(0, 1024, 160)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda box: slide.read(box, grid), boxes))
        assert len(readers) == 1
    expected = np.full_like(tiny.pixels, 255)
    expected[256:512, 256:512] = tiny.pixels[256:512, 256:512]
    for box, pixels in zip(boxes, found, strict=True):
        inside = box.clipped(grid.box)
        np.testing.assert_array_equal(pixels[inside.within(box).slices], expected[inside.slices])
    assert not readers
    assert most[0] <= 4 + 2  # one in use and one being opened in its stead


@pytest.mark.parametrize("ends_by", ["failing elsewhere", "closing"])
def test_a_reader_is_closed_when_the_last_thread_has_left_it(ends_by, tiny, monkeypatch, still_open):
    readers, _ = still_open
    entered, go_on = threading.Event(), threading.Event()
    original = TiledTiff._decode

    def decode(reader, level, index):
        if index == 0:
            entered.set()
            assert go_on.wait(60)
        elif index == 6:
            raise OSError(5, "Input/output error")
        return original(reader, level, index)

    monkeypatch.setattr(TiledTiff, "_decode", decode)
    slide = open_slide(tiny.path, skips_unread=True)
    grid, (first,) = slide.grid(0.25), readers
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(slide.read, Box(0, 0, 200, 200), grid)
        try:
            assert entered.wait(60)
            if ends_by == "failing elsewhere":
                slide.read(Box(600, 300, 700, 400), grid)
                assert len(readers) == 2
            else:
                slide.close()
            assert first in readers
        finally:
            go_on.set()
        np.testing.assert_array_equal(waiting.result(), tiny.pixels[:200, :200])
    assert first not in readers
    slide.close()
    assert not readers


def test_a_reader_is_closed_if_its_file_is_lost_as_it_is_opened_anew(tiny, monkeypatch, still_open):
    readers, _ = still_open
    failing(monkeypatch, lambda level, index, attempt: True)
    with open_slide(tiny.path) as slide:
        monkeypatch.setattr(wsipipe.slide, "_fingerprint", lambda *_: _stale())
        with pytest.raises(SlideError, match="can no longer be read"):
            slide.read(Box(0, 0, 9, 9), slide.grid(0.25))
        assert len(readers) == 1


@pytest.mark.parametrize("skips_unread", [False, True])
@pytest.mark.parametrize("how", ["cut", "gone", "replaced"])
def test_a_slide_that_is_lost_while_it_is_read_is_told_and_the_run_goes_on_when_it_is_back(
    how, skips_unread, tiny, oracle, make_svs, tmp_path, monkeypatch
):
    run(tiny.path, tmp_path / "whole", oracle)
    path, out = tmp_path / "tiny.svs", tmp_path / "out"
    shutil.copyfile(tiny.path, path)
    seen = itertools.count(1)
    original = TiledTiff._decode

    def decode(reader, level, index):
        if level == 0 and next(seen) == 4:
            if how == "cut":
                os.truncate(path, 5000)
            elif how == "gone":
                path.unlink()
                raise OSError(116, "Stale file handle")
            else:
                make_svs(path, tiny.pixels[:512])
                raise OSError(116, "Stale file handle")
        return original(reader, level, index)

    with monkeypatch.context() as patch:
        patch.setattr(TiledTiff, "_decode", decode)
        if how == "gone":
            patch.setattr(TiledTiff, "_decode", lambda *a: decode(*a) if path.exists() else _stale())
        with pytest.raises(
            SlideError, match="can no longer be read" if how == "gone" else "was changed while it was read"
        ):
            run(path, out, oracle, skips_unread=skips_unread)
    assert not (out / "nuclei.parquet").exists()
    shutil.copyfile(tiny.path, path)
    run(path, out, oracle, skips_unread=skips_unread)
    assert_same_results(out, tmp_path / "whole")


def test_a_slide_that_is_half_rewritten_is_no_damaged_one(tiny, tmp_path, monkeypatch):
    path = tmp_path / "tiny.svs"
    shutil.copyfile(tiny.path, path)
    with open_slide(path) as slide:
        path.write_bytes(tiny.path.read_bytes()[:5000])  # no slide file yet, so it cannot be opened anew
        failing(monkeypatch, lambda level, index, attempt: True)
        with pytest.raises(SlideError, match="was changed while it was read"):
            slide.read(slide.grid(0.25).box, slide.grid(0.25))


def _stale():
    raise OSError(116, "Stale file handle")


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts so many bytes at a folder, or makes them more."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kilobytes: int, how: str = "") -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{how}size={kilobytes}k", "tmpfs", str(place)],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip("a small disk needs the right to mount")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("kilobytes", [20, 150])
def test_a_disk_that_fills_ends_the_run_in_one_line_and_it_goes_on_with_more_room(
    kilobytes, tiny, oracle, tmp_path, small_disk, monkeypatch, capfd
):
    from test_cli import wsipipe

    monkeypatch.setattr("wsipipe.stages.maps.FREE_BYTES_PER_PX", 0)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
    out = small_disk(kilobytes) / "out"
    (tmp_path / "c.yaml").write_text("maps: {chunk_tiles: 2}")
    command = ["-q", "segment", tiny.path, "--model", oracle, "-o", out, "--device", "cpu", "--precision", "fp32"]
    code, _, err = wsipipe(capfd, *command, "--config", tmp_path / "c.yaml")
    assert code == 1, "the disk was large enough; take a smaller one for this test"
    assert [line for line in err.splitlines() if "no space left" in line or "cannot be written" in line]
    assert "Traceback" not in err
    assert not [name for name in ("segment.json", "overlay.png") if (out / name).exists()]
    small_disk(20_000, "remount,")
    code, _, err = wsipipe(capfd, *command, "--config", tmp_path / "c.yaml")
    assert code == 0, err
    code, _, err = wsipipe(capfd, *command[:5], "-o", tmp_path / "whole", *command[7:], "--config", tmp_path / "c.yaml")
    assert code == 0, err
    assert_same_results(out, tmp_path / "whole")


@pytest.mark.parametrize("slow", ["reads", "writes"])
def test_a_disk_that_stalls_now_and_then_costs_time_alone(slow, tiny, oracle, tmp_path, monkeypatch):
    run(tiny.path, tmp_path / "whole", oracle)
    stalls = []

    def stall(function):
        calls = itertools.count()

        def stalled(*arguments):
            if next(calls) % 7 == 3:  # in the midst of it, so that others overtake it
                stalls.append(function.__name__)
                time.sleep(0.15)
            return function(*arguments)

        return stalled

    place, name = (TiledTiff, "_decode") if slow == "reads" else (os, "fsync")
    monkeypatch.setattr(place, name, stall(getattr(place, name)))
    run(tiny.path, tmp_path / "out", oracle)
    assert len(stalls) >= 2
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_chunk_that_is_removed_is_seen_and_no_table_is_written(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    maps = tmp_path / "out" / "maps.zarr"
    chunk = sorted((maps / "np").rglob("c/*/*"))[7]
    chunk.unlink()
    with open_slide(tiny.path) as slide, pytest.raises(StoreError, match="lacks its chunks"):
        make_nuclei(slide, maps, tmp_path / "again.parquet", SMALL.nuclei)
    assert not (tmp_path / "again.parquet").exists()


def test_a_chunk_without_its_commit_is_seen_and_no_table_is_written(tiny, oracle, tmp_path):
    run(tiny.path, tmp_path / "out", oracle)
    commits = tmp_path / "out" / "maps.zarr" / "commits"
    commits.write_text("".join(commits.read_text().splitlines(keepends=True)[:-1]))
    with open_slide(tiny.path) as slide, pytest.raises(StoreError, match="lacks 1 of its chunks"):
        make_nuclei(slide, commits.parent, tmp_path / "again.parquet", SMALL.nuclei)
    assert not (tmp_path / "again.parquet").exists()
