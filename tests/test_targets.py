from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from wsipipe.training.targets import hv_map

REFERENCE = np.load(Path(__file__).parent / "data/parity/hv_targets.npz")
CASES = sorted({name.rsplit(".", 1)[0] for name in REFERENCE.files})


def instance_maps(min_side: int, nuclei: int) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=min_side, max_side=12)
    return hnp.arrays(np.int32, shapes, elements=st.integers(0, nuclei))


small_maps = instance_maps(min_side=1, nuclei=4)


def scaled_offsets(instance_map: np.ndarray) -> np.ndarray:
    """The exact definition, one nucleus after the other."""
    expected = np.zeros((2, *instance_map.shape))
    for nucleus in np.unique(instance_map[instance_map > 0]):
        place = np.nonzero(instance_map == nucleus)
        for channel, along in zip(expected, reversed(place), strict=True):
            distance = along - along.mean()
            for side in (distance < 0, distance > 0):
                if side.any():
                    distance[side] /= np.abs(distance[side]).max()
            channel[place] = distance
    return expected


def published_offsets(instance_map: np.ndarray) -> np.ndarray:
    """The published definition, box by box, with the growth of each box."""
    rows, columns = instance_map.shape
    expected = np.zeros((2, rows, columns))
    for nucleus in np.unique(instance_map[instance_map > 0]):
        y, x = np.nonzero(instance_map == nucleus)
        box = []
        for along in (y, x):
            low, high = along.min(), along.max() + 1
            box.append(slice(low - 2 if low >= 2 else low, high + 2 if high <= rows - 2 else high))
        inside = instance_map[tuple(box)] == nucleus
        if min(inside.shape) < 2:
            continue
        for channel, axis in zip(expected, (1, 0), strict=True):
            place = np.nonzero(inside)
            distance = place[axis] + 1 - np.floor(place[axis].mean() + 0.5)
            for side in (distance < 0, distance > 0):
                if side.any():
                    distance[side] /= np.abs(distance[side]).max()
            channel[tuple(box)][place] = distance
    return expected


@given(instance_maps(min_side=4, nuclei=9))
def test_published_offsets_need_no_grown_boxes(instance_map):
    np.testing.assert_allclose(hv_map(instance_map), published_offsets(instance_map), atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_the_published_offsets_are_those_of_the_reference_bit_for_bit(case):
    np.testing.assert_array_equal(hv_map(REFERENCE[f"{case}.inst"]), REFERENCE[f"{case}.hv"])


@given(small_maps)
def test_exact_offsets_are_distances_from_the_mean_scaled_on_each_side(instance_map):
    np.testing.assert_allclose(hv_map(instance_map, "exact"), scaled_offsets(instance_map), atol=1e-6)


@given(small_maps)
def test_exact_offsets_turn_with_the_image(instance_map):
    horizontal, vertical = hv_map(instance_map, "exact")
    np.testing.assert_allclose(hv_map(instance_map.T, "exact"), (vertical.T, horizontal.T), atol=1e-6)
    mirrored = hv_map(instance_map[:, ::-1], "exact")[:, :, ::-1]
    np.testing.assert_allclose(mirrored, (-horizontal, vertical), atol=1e-6)


@given(small_maps, st.sampled_from(["published", "exact"]), st.integers(1, 10**9))
def test_the_values_of_the_ids_do_not_matter(instance_map, variant, step):
    np.testing.assert_array_equal(hv_map(instance_map.astype(np.int64) * step, variant), hv_map(instance_map, variant))


@pytest.mark.parametrize("variant", ["published", "exact"])
def test_a_map_without_background_is_a_map_like_any_other(variant):
    offsets = hv_map(np.repeat([[1, 1, 1, 2, 2, 2]], 6, axis=0).astype(np.uint16), variant)
    assert np.abs(offsets).max() == 1
    np.testing.assert_array_equal(offsets[0, 0, :3], offsets[0, 0, 3:])


@pytest.mark.parametrize("variant", ["published", "exact"])
def test_a_map_of_background_gives_zeros(variant):
    offsets = hv_map(np.zeros((5, 7), np.int32), variant)
    assert offsets.shape == (2, 5, 7)
    assert offsets.dtype == np.float32
    assert not offsets.any()


def test_a_round_nucleus_has_its_smallest_offsets_at_its_centre():
    rows, columns = np.indices((41, 61))
    disc = (np.hypot(rows - 20, columns - 33) <= 12).astype(np.int32)
    reach = np.abs(hv_map(disc, "exact")).sum(axis=0)
    assert reach[20, 33] == 0
    assert ndimage.minimum_position(reach, disc) == (20, 33)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (np.zeros((2, 3, 3), int), "2D"),
        (np.zeros((3, 3)), "float64"),
        (np.array([[0, -1]]), "negative"),
    ],
)
def test_what_is_no_instance_map_is_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        hv_map(wrong)


def test_an_unknown_variant_is_refused_by_name():
    with pytest.raises(ValueError, match="rounded"):
        hv_map(np.zeros((3, 3), int), "rounded")
