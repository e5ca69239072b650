"""From maps to instance maps: parity, locality, and each step against a plain or a library's way of doing it."""

import csv
import heapq
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_maps import crowd, draw_ellipses, maps_of
from scipy import ndimage
from skimage.segmentation import watershed

from wsipipe.compiled import compiled
from wsipipe.config import NucleiConfig
from wsipipe.instances import label_nuclei, label_tile, reach_px
from wsipipe.maps import Maps
from wsipipe.metrics import panoptic_quality
from wsipipe.ridges import flatness, kernel_reach_px, sobel_kernels
from wsipipe.runs import fill_small_holes, label_regions
from wsipipe.training.targets import hv_map
from wsipipe.watershed import flood

CONFIG = NucleiConfig()
PARITY = np.load(Path(__file__).parent / "data" / "parity" / "postproc.npz")
CASES = sorted({key.split(".")[0] for key in PARITY.files})
SHARED = Path(__file__).parents[2] / "shared" / "data"

masks = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.1, 0.9)).map(
    lambda a: (np.random.default_rng(a[2]).random(a[:2]) < a[3]).astype(np.uint8)
)


def without_names(labels: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Numbered by first pixel, so that the same nuclei give the same array."""
    _, first, index = np.unique(np.append(0, labels), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[index[1:]].reshape(labels.shape)


def exact_maps(labels: npt.NDArray[np.int32]) -> Maps:
    """Maps that say the truth, in 8 bits."""
    nuclei = np.where(labels > 0, 255, 0).astype(np.uint8)
    return Maps(nuclei, np.round(127 * hv_map(labels)).astype(np.int8), np.zeros((0, *labels.shape), np.uint8))


# -- the whole ----------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_the_published_way_gives_the_published_instances(case: str) -> None:
    maps = PARITY[f"{case}.pred_map"]
    mpp = 0.25 if PARITY[f"{case}.magnification"] == 40 else 0.5
    labels = label_tile(maps[..., 1] > 0.5, np.moveaxis(maps[..., 2:], 2, 0), mpp)
    np.testing.assert_array_equal(labels, PARITY[f"{case}.inst"])


def test_the_published_way_is_a_setting() -> None:
    maps = maps_of(crowd((200, 240), 30, 3), noise=0.05)
    labels = label_nuclei(maps, 0.25, NucleiConfig(hv_scale="tile"))
    np.testing.assert_array_equal(labels, label_tile(maps.nuclei > 127, maps.offsets / np.float32(127), 0.25))


@pytest.mark.parametrize(("mpp", "shrink"), [(0.25, 1), (0.275, 1), (0.5, 2)])
def test_touching_nuclei_are_found_one_by_one(mpp: float, shrink: int) -> None:
    true = crowd((600, 700), 27, 5)[::shrink, ::shrink].copy()
    labels = label_nuclei(maps_of(true, noise=0.05), mpp, CONFIG)
    quality = panoptic_quality(true, labels)
    assert quality.dq > 0.97
    assert quality.sq > 0.88


@pytest.mark.parametrize(
    ("name", "mpp", "step", "least"),
    [("consep", 0.275, 1, 0.945), ("tnbc_naylor", 0.25, 1, 0.99), ("nuinsseg", 0.25, 9, 0.99)],
)
def test_true_nuclei_survive_the_way_through_their_own_maps(name: str, mpp: float, step: int, least: float) -> None:
    files = sorted((SHARED / name / "masks").glob("test*.png" if name == "consep" else "*.png"))[::step]
    if not files:
        pytest.skip(f"{SHARED / name} is not there")
    scores = []
    for file in files:
        true = cv2.imread(str(file), cv2.IMREAD_UNCHANGED).astype(np.int32)
        labels = label_nuclei(exact_maps(true), mpp, CONFIG)
        if name == "nuinsseg":  # instances were made again from a mask: only trusted ones count, and what lies on them
            with (SHARED / name / "trust" / f"{file.stem}.csv").open() as rows:
                trusted = [int(row["id"]) for row in csv.DictReader(rows) if row["trusted"] == "1"]
            doubtful = np.zeros(labels.max() + 1, bool)
            doubtful[labels[(true > 0) & ~np.isin(true, trusted)]] = True
            true, labels = np.where(np.isin(true, trusted), true, 0), np.where(doubtful[labels], 0, labels)
        if true.any():
            scores.append(panoptic_quality(true, labels).pq)
    assert np.mean(scores) >= least


def test_maps_without_nuclei_give_none() -> None:
    nothing = Maps(np.zeros((50, 60), np.uint8), np.zeros((2, 50, 60), np.int8), np.zeros((4, 50, 60), np.uint8))
    assert label_nuclei(nothing, 0.25, CONFIG).max() == 0
    assert label_nuclei(nothing, 0.25, CONFIG).shape == (50, 60)


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (3, 2)])
def test_a_sliver_of_a_map_is_no_trouble(shape: tuple[int, int]) -> None:
    full = Maps(np.full(shape, 255, np.uint8), np.zeros((2, *shape), np.int8), np.zeros((0, *shape), np.uint8))
    assert label_nuclei(full, 0.25, CONFIG).shape == shape


def test_a_pinhole_in_the_np_map_changes_no_nucleus() -> None:
    maps = maps_of(crowd((500, 500), 30, 8), noise=0.1)
    pinholes = np.zeros((500, 500), bool)
    pinholes[::13, ::13] = True
    pinholes &= ndimage.binary_erosion(maps.nuclei > 127, np.ones((3, 3)))
    assert pinholes.sum() > 200
    pierced = Maps(np.where(pinholes, 0, maps.nuclei).astype(np.uint8), maps.offsets, maps.types)
    np.testing.assert_array_equal(label_nuclei(pierced, 0.25, CONFIG), label_nuclei(maps, 0.25, CONFIG))


def test_every_nucleus_is_one_piece() -> None:
    labels = label_nuclei(maps_of(crowd((500, 500), 30, 8), noise=0.3), 0.25, CONFIG)
    for i, place in enumerate(ndimage.find_objects(labels), 1):
        assert ndimage.label(labels[place] == i)[1] == 1


@settings(max_examples=15)
@given(
    st.integers(0, 10_000),
    st.sampled_from([26.0, 34.0]),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.25, 0.5]),
)
def test_a_pixel_far_from_the_border_of_a_crop_has_the_nucleus_it_has_in_the_whole(
    seed: int, spacing: float, noise: float, mpp: float
) -> None:
    maps = maps_of(crowd((420, 420), spacing, seed), noise, seed)
    y, x = np.random.default_rng(seed).integers(0, 100, 2)
    crop = np.s_[..., y : y + 320, x : x + 320]
    part = label_nuclei(Maps(maps.nuclei[crop], maps.offsets[crop], maps.types[crop]), mpp, CONFIG)
    whole = label_nuclei(maps, mpp, CONFIG)[crop]
    rim = reach_px(mpp, CONFIG)
    near = np.ones(part.shape, bool)
    near[rim:-rim, rim:-rim] = False
    # nuclei that come near the border in either are free to differ, and where they are the other may have another
    free = np.isin(part, part[near]) | np.isin(whole, whole[near])
    assert free.mean() < 0.9
    np.testing.assert_array_equal(without_names(np.where(free, 0, part)), without_names(np.where(free, 0, whole)))


# -- the steps ----------------------------------------------------------------------------------------------------


@given(masks, st.integers(0, 12))
def test_small_holes_are_filled_and_large_ones_are_not(mask: npt.NDArray[np.uint8], widest: int) -> None:
    expected = mask.copy()
    regions, _ = ndimage.label(mask == 0)
    for i, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
        inside = rows.start > 0 and columns.start > 0 and rows.stop < mask.shape[0] and columns.stop < mask.shape[1]
        if inside and rows.stop - rows.start <= widest and columns.stop - columns.start <= widest:
            expected[regions == i] = 1
    fill_small_holes(mask, widest)
    np.testing.assert_array_equal(mask, expected)


@given(masks)
def test_regions_are_numbered_in_raster_order(mask: npt.NDArray[np.uint8]) -> None:
    labels = np.zeros(mask.shape, np.int32)
    expected, n = ndimage.label(mask)
    assert label_regions(mask, labels) == n
    np.testing.assert_array_equal(labels, without_names(expected))


@pytest.mark.parametrize(("mpp", "kernel_um", "size"), [(0.25, 5.25, 21), (0.5, 5.25, 11), (0.25, 3.75, 15)])
def test_flatness_is_the_smaller_sobel_slope(mpp: float, kernel_um: float, size: int) -> None:
    rng = np.random.default_rng(0)
    offsets = np.clip(ndimage.gaussian_filter(rng.standard_normal((2, 150, 300)), (0, 4, 4)) * 1500, -127, 127)
    offsets = np.round(offsets).astype(np.int8)
    mask = np.zeros((152, 302), np.uint8)
    mask[1:-1, 1:-1] = rng.random((150, 300)) < 0.5
    derive, smooth = cv2.getDerivKernels(1, 0, size)
    ramp = (derive.ravel() * (np.arange(size) - size // 2)).sum() * smooth.sum()
    slope = [
        cv2.Sobel(offsets[i] / 127, cv2.CV_64F, 1 - i, i, ksize=size, borderType=cv2.BORDER_REPLICATE) / ramp / mpp
        for i in (0, 1)
    ]
    expected = np.clip(255 * (np.minimum(*slope) + 1.5) / 2.4, 0, 255) * mask[1:-1, 1:-1]
    flat = flatness(offsets, mask, mpp, kernel_um, -1.5, 0.9)
    assert np.abs(flat[1:-1, 1:-1] - expected).max() < 2.5
    assert not flat[[0, -1]].any()
    assert not flat[:, [0, -1]].any()


@pytest.mark.parametrize("mpp", [0.1, 0.17, 0.25, 0.5, 1.0, 5.0])
def test_sums_of_the_slope_filter_are_exact_in_single_precision(mpp: float) -> None:
    smoothing, slope = sobel_kernels(mpp, 3.75)
    assert 127 * 2 * np.abs(slope).sum() * (2 * smoothing.sum() - smoothing[0]) < 2**24
    assert kernel_reach_px(mpp, 3.75) == smoothing.size - 1


def heap_flood(
    levels: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], markers: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """The watershed as one would write it down: always the lowest pixel, of those the one reached first."""
    labels = markers.copy()
    heap = [(levels[y, x], age, y, x) for age, (y, x) in enumerate(np.argwhere(markers))]
    age = len(heap)
    heapq.heapify(heap)
    while heap:
        _, _, y, x = heapq.heappop(heap)
        for v, u in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if mask[v, u] and not labels[v, u]:
                labels[v, u] = labels[y, x]
                heapq.heappush(heap, (levels[v, u], age, v, u))
                age += 1
    return labels


def made_flood(seed: int, levels: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    height = ndimage.gaussian_filter(rng.random((60, 70)), 2)
    height = ((height - height.min()) / np.ptp(height) * (levels - 1)).astype(np.uint8)
    mask = np.zeros(height.shape, np.uint8)
    mask[1:-1, 1:-1] = ndimage.gaussian_filter(rng.random((58, 68)), 1) > 0.48
    markers = np.zeros(height.shape, np.int32)
    label_regions(((rng.random(height.shape) < 0.02) & (mask > 0)).astype(np.uint8), markers)
    return height, mask, markers


@given(st.integers(0, 100_000), st.sampled_from([1, 4, 32, 256]))
def test_the_flood_takes_the_lowest_pixel_and_of_those_the_one_reached_first(seed: int, levels: int) -> None:
    height, mask, labels = made_flood(seed, levels)
    expected = heap_flood(height, mask, labels)
    flood(height, mask, labels)
    np.testing.assert_array_equal(labels, expected)


def test_the_flood_is_the_watershed_of_scikit_image_where_no_two_markers_tie() -> None:
    for seed in range(20):
        height, mask, labels = made_flood(seed, 200)
        seeds = np.argwhere(labels)[:55]  # that library leaves open the order of markers of one level
        markers = np.zeros_like(labels)
        for i, (y, x) in enumerate(seeds):
            markers[y, x], height[y, x] = i + 1, 200 + i
        expected = watershed(height, markers, mask=mask > 0)
        flood(height, mask, markers)
        np.testing.assert_array_equal(markers, expected)


def test_without_a_folder_for_machine_code_kernels_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real = numba.njit

    def sealed(**settings: Any) -> Any:
        if settings.get("cache"):
            raise RuntimeError("no locator available")
        return real(**settings)

    monkeypatch.setattr(numba, "njit", sealed)
    assert compiled(lambda a: a + 1)(2) == 3


def test_one_marker_less_changes_nothing_but_its_own_nucleus() -> None:
    for seed in range(20):
        height, mask, labels = made_flood(seed, 16)
        fewer = np.where(labels == 5, 0, labels).astype(np.int32)
        flood(height, mask, labels)
        flood(height, mask, fewer)
        np.testing.assert_array_equal(fewer[labels != 5], labels[labels != 5])


def test_a_nucleus_of_drawn_maps_keeps_its_pixels() -> None:
    true = draw_ellipses((120, 140), [(40, 60, 14, 10, 0.3), (100, 50, 12, 12, 0)])
    labels = label_nuclei(exact_maps(true), 0.25, CONFIG)
    np.testing.assert_array_equal(without_names(labels), without_names(true))


def test_eight_bits_lose_nothing_on_real_tissue_with_the_network_that_ships(shared_data):
    sets = shared_data("consep").parent
    command = [sys.executable, "benchmarks/eight_bits.py", "--images", "8", "--sets", str(sets)]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["images"] == 16
    assert found["pq_floats"] > 0.2
    assert found["loss"] < 0.002
