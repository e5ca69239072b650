"""Pictures without nuclei for training."""

import json

import numpy as np
import pytest
from made_patches import CLASSES, write_set

from wsipipe.errors import DataError
from wsipipe.training import negatives
from wsipipe.training.colour import dyes_mixed
from wsipipe.training.data import PatchSet


def test_windows_come_from_training_images_and_hold_no_nucleus(tmp_path):
    folder = write_set(tmp_path / "discs", side=256)
    images = np.load(folder / "images.npy")
    images[2:] = 7  # of those that validate and test
    np.save(folder / "images.npy", images)
    windows = negatives.windows_without_nuclei(PatchSet.open(folder), np.random.default_rng(0), 5)
    assert 0 < len(windows) <= 5
    assert all(np.all(window == (225, 160, 195)) for window in windows)


def test_a_set_all_of_whose_windows_hold_nuclei_gives_none(tmp_path):
    folder = write_set(tmp_path / "discs", side=64)
    assert negatives.windows_without_nuclei(PatchSet.open(folder), np.random.default_rng(0), 5) == []


def test_the_pictures_are_the_same_each_time_and_say_that_nothing_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(negatives, "COUNT", 8)
    source = PatchSet.open(write_set(tmp_path / "discs", side=256))
    first, second = (negatives.write_negatives(tmp_path / name, [source], CLASSES) for name in ("a", "b"))
    np.testing.assert_array_equal(first.images, second.images)
    assert not first.instances.any()
    assert first.types is not None
    assert not first.types.any()  # background is known, so that the types learn from it
    assert len({image.tobytes() for image in first.images}) == 8
    assert [patch.split for patch in first.index] == ["validation"] + ["train"] * 7
    assert "discs" in json.loads((tmp_path / "a/dataset.json").read_text())["source"]


def test_pictures_made_of_images_that_were_changed_since_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(negatives, "COUNT", 8)
    folder = write_set(tmp_path / "discs", side=256)
    negatives.write_negatives(tmp_path / "a", [PatchSet.open(folder)], CLASSES)
    assert len(negatives.write_negatives(tmp_path / "a", [PatchSet.open(folder)], CLASSES)) == 8
    np.save(folder / "images.npy", 255 - np.load(folder / "images.npy"))
    with pytest.raises(DataError, match="was prepared from other sources, or these were changed since"):
        negatives.write_negatives(tmp_path / "a", [PatchSet.open(folder)], CLASSES)


def test_dyes_change_places_and_glass_stays_glass():
    tissue = np.full((4, 4, 3), (120, 60, 150), np.uint8)
    glass = np.full((4, 4, 3), 255, np.uint8)
    assert np.abs(dyes_mixed(tissue, np.eye(3)).astype(int) - tissue).max() <= 1
    brown = dyes_mixed(tissue, np.eye(3)[[2, 1, 0]])  # haematoxylin becomes DAB
    assert brown[0, 0, 2] < tissue[0, 0, 2]
    np.testing.assert_array_equal(dyes_mixed(glass, np.eye(3)[[2, 1, 0]]), glass)
