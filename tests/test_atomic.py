"""Files and folders that are complete or not there."""

import shutil
from pathlib import Path

import pytest

from wsipipe.atomic import discard, finished


def test_a_file_takes_its_name_only_when_its_writer_succeeds(tmp_path: Path) -> None:
    place = tmp_path / "new" / "nuclei.parquet"
    with finished(place) as partial:
        partial.write_text("whole")
        assert not place.exists()
    assert place.read_text() == "whole"

    def fail(partial: Path) -> None:
        partial.write_text("ha")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError), finished(place) as partial:
        fail(partial)
    assert place.read_text() == "whole"
    assert [file.name for file in place.parent.iterdir()] == ["nuclei.parquet"]


def test_a_link_under_the_unfinished_name_is_not_written_through(tmp_path: Path) -> None:
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "tissue.png"
    elsewhere.write_text("mine")
    (tmp_path / "tissue.png.partial").symlink_to(elsewhere)
    with finished(place) as partial:
        partial.write_text("whole")
    assert (place.read_text(), elsewhere.read_text()) == ("whole", "mine")


def test_a_deletion_cut_short_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "maps.zarr"
    store.mkdir()
    (store / "zarr.json").touch()
    real = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(store)
    assert not store.exists()
    monkeypatch.setattr(shutil, "rmtree", real)
    store.mkdir()
    discard(store)
    assert not list(tmp_path.iterdir())


def test_of_a_link_to_a_folder_the_link_goes(tmp_path: Path) -> None:
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "maps.zarr"
    elsewhere.mkdir()
    place.symlink_to(elsewhere)
    discard(place)
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere"]
    (tmp_path / "maps.zarr.discarded").symlink_to(elsewhere)  # of an earlier version
    discard(place)
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere"]
