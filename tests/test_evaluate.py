"""Evaluation through the whole of segment: what is right scores 1, and outlines return to the pixels they came from."""

import cv2
import numpy as np
import pytest
import shapely
from made_patches import write_set

from wsipipe.config import Config
from wsipipe.errors import DataError
from wsipipe.model.weights import load_model
from wsipipe.training.data import PatchSet
from wsipipe.training.evaluate import evaluate, segment_image
from wsipipe.training.paint import pixels_within

CPU = {"device": "cpu", "precision": "fp32"}


@pytest.fixture
def apart(tmp_path):
    """A set whose discs do not touch."""
    folder = write_set(tmp_path / "apart", typed=False)
    instances = np.zeros((4, 96, 96), np.int32)
    for number, (x, y) in enumerate([(x, y) for y in (16, 48, 80) for x in (16, 48, 80)], 1):
        for mask in instances:
            cv2.circle(mask, (x, y), 7 + number % 4, number, -1)
    np.save(folder / "instances.npy", instances.astype(np.uint16))
    np.save(folder / "images.npy", np.where(instances[..., None] > 0, (95, 60, 140), (225, 160, 195)).astype(np.uint8))
    return folder


def test_a_network_that_knows_the_truth_scores_one(apart, oracle):
    scores = evaluate(load_model(oracle), PatchSet.open(apart), "test", **CPU)
    assert scores["images"] == 1
    assert scores["detection"]["f1"] == 1
    assert scores["bDQ"] == pytest.approx(1, abs=1e-4)
    assert scores["bPQ"] > 0.95
    assert scores["dice"] > 0.97
    assert scores["protocol"].startswith("clean")


@pytest.mark.parametrize("mpp", [0.25, 0.275, 0.5])
def test_outlines_come_back_to_the_pixels_of_the_image(apart, oracle, mpp):
    patches = PatchSet.open(apart)
    truth = patches.instances[0] > 0
    found = segment_image(load_model(oracle), patches.images[0], mpp, Config(), **CPU)
    assert len(found.types) == 9
    overlap = np.count_nonzero(truth & (found.instance_map > 0)) / np.count_nonzero(truth | (found.instance_map > 0))
    assert overlap > 0.93
    assert set(found.types.tolist()) == {1}


def test_an_empty_split_and_other_types_are_refused(tmp_path, apart, oracle):
    model = load_model(oracle)
    with pytest.raises(DataError, match="has the types"):
        evaluate(model, PatchSet.open(write_set(tmp_path / "typed")), "test", **CPU)
    with pytest.raises(DataError, match="no image in the split 'validation'"):
        evaluate(model, PatchSet.open(write_set(tmp_path / "few", count=2, typed=False)), "validation", **CPU)


def test_outlines_that_share_an_edge_share_no_pixel():
    """Edges through the centres of pixels, straight and aslant: each centre belongs to one side."""
    left = np.array([(0.5, 0.5), (3.5, 0.5), (5.5, 2.5), (3.5, 4.5), (0.5, 4.5)])
    right = np.array([(3.5, 0.5), (7.5, 0.5), (7.5, 4.5), (3.5, 4.5), (5.5, 2.5)])
    count = np.zeros((8, 8), int)
    for outline in (left, right):
        count[pixels_within(outline, count.shape)] += 1
    assert count.max() == 1
    assert count.sum() == shapely.Polygon(left).union(shapely.Polygon(right)).area
