"""Merging of overlapping tiles, as the published code does it."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_scores import assert_scores_agree
from torch.nn import functional

from wsipipe.instances import label_tile
from wsipipe.metrics import majority_types
from wsipipe.training.merging import Cell, cells_of, merge_cells, paint_cells
from wsipipe.training.scores import TypedNuclei, score_image, summarise
from wsipipe.training.tiled import WINDOWS, enlarged_windows, merged_nuclei

PARITY = Path(__file__).parent / "data/parity"
RULE = json.loads((PARITY / "merge_rule.json").read_text())


def read(name: str) -> dict:
    with gzip.open(PARITY / name) as file:
        return json.load(file)


def cell(given: dict) -> Cell:
    touched = given.get("edge_information", {}).get("position", [0] * 4)
    return Cell(
        contour=np.array(given["contour"], float),
        type=given["type"],
        tile=tuple(given["patch_coordinates"]),
        inner=given["cell_status"] == 0,
        borders=tuple(
            name for name, is_touched in zip(("top", "right", "down", "left"), touched, strict=True) if is_touched
        ),
    )


@pytest.mark.parity
@pytest.mark.parametrize("case", [case for case in RULE if case not in ("_cell_status", "two_opposite_borders")])
def test_small_cases_are_merged_as_in_the_reference(case):
    assert merge_cells([cell(given) for given in RULE[case]["cells"]]) == RULE[case]["kept_index"]


def test_a_cell_that_touches_opposite_borders_stops_nothing():
    assert merge_cells([cell(given) for given in RULE["two_opposite_borders"]["cells"]]) == [0]


@pytest.mark.parity
@pytest.mark.parametrize("name", list(RULE["_cell_status"]))
def test_inner_cells_are_those_of_the_reference(name):
    (top, left), (bottom, right) = RULE["_cell_status"][name]["bbox"]
    instances = np.zeros((256, 256), np.int32)
    instances[top:bottom, left:right] = 1
    (found,) = cells_of(instances, [1], (0, 0), (0, 0), margin=64)
    assert found.inner == (RULE["_cell_status"][name]["cell_status"] == 0)


@pytest.mark.parity
def test_a_slide_is_merged_to_the_same_outlines_as_in_the_reference():
    """Identical outlines of several tiles stand for each other: which of them is kept hangs on Shapely's tree."""
    reference = read("wsi_merge_cells.json.gz")
    cells = [cell(given) for given in reference["raw_cells"]]
    ours, theirs = (
        sorted(cells[number].contour.tolist() for number in kept)
        for kept in (merge_cells(cells), reference["keep_index"])
    )
    assert ours == theirs


@pytest.fixture(scope="module")
def conic():
    return dict(np.load(PARITY / "conic_upscale.npz")), read("conic_upscale_cells.json.gz")


@pytest.mark.parity
def test_windows_of_the_enlarged_image_are_those_of_the_reference(conic):
    image = torch.from_numpy(conic[0]["image0_ch0_fp16"].astype(np.float32))[None, None]
    windows = enlarged_windows(image)[:, 0, ::8, ::8].numpy()
    np.testing.assert_allclose(windows, conic[0]["patches_of_image0_ch0_from_fp16"], atol=1e-5)


def tiles(arrays: dict, image: int) -> list[TypedNuclei]:
    found = []
    for number in range(4 * image, 4 * image + 4):
        offsets = (arrays["patch_hv_q"][number] / 127).astype(np.float32)
        instances = label_tile(arrays["patch_np"][number] > 0, offsets, 0.25)
        found.append(TypedNuclei(instances, majority_types(instances, arrays["patch_type"][number])))
    return found


@pytest.mark.parity
@pytest.mark.parametrize("image", [0, 1])
def test_conic_is_merged_and_painted_as_in_the_reference(conic, image):
    arrays, reference = conic
    cells = [
        found
        for nuclei, (row, column) in zip(tiles(arrays, image), WINDOWS, strict=True)
        for found in cells_of(nuclei.instance_map, nuclei.types, (row, column), (224 * column, 224 * row), margin=32)
    ]
    expected = reference["raw_cells_per_image"][image]
    assert len(cells) == len(expected)
    for ours, theirs in zip(cells, expected, strict=True):
        corners = theirs["contour"][:-1] if theirs["contour"][0] == theirs["contour"][-1] else theirs["contour"]
        assert ours.contour.tolist() == corners
        assert ours.type == theirs["type"]
        assert ours.inner == (theirs["cell_status"] == 0)
    kept = merge_cells(cells)
    assert kept == reference["kept_index_per_image"][image]
    instances, types = paint_cells([cells[number] for number in kept], (256, 256), 256 / 480, first=0)
    np.testing.assert_array_equal(instances, arrays["merged_inst"][image])
    np.testing.assert_array_equal(types, arrays["merged_type"][image])


@pytest.mark.parity
def test_conic_scores_as_in_the_reference(conic):
    arrays, reference = conic
    names = ["background", *(f"type {number}" for number in range(1, 7))]
    scores = []
    for image in range(2):
        true_map = arrays["gt_inst"][image].astype(np.int32)
        truth = TypedNuclei(true_map, majority_types(true_map, arrays["gt_type"][image]))
        found = merged_nuclei(tiles(arrays, image), (256, 256), corrected=False)
        scores.append(score_image(truth, found, 7, radius_px=12, protocol="published"))
    assert_scores_agree(summarise(scores, names), reference["results"]["dataset"])


@pytest.mark.parity
def test_the_corrected_way_loses_no_cell(conic):
    for image in range(2):
        lost = merged_nuclei(tiles(conic[0], image), (256, 256), corrected=False)
        whole = merged_nuclei(tiles(conic[0], image), (256, 256), corrected=True)
        assert len(whole.types) == len(lost.types) + 1


def test_windows_lie_where_they_are_said_to():
    image = torch.arange(256.0).repeat(256, 1)[None, None]
    whole = functional.interpolate(image, (480, 480), mode="bilinear", align_corners=False)
    for window, (row, column) in zip(enlarged_windows(image), WINDOWS, strict=True):
        assert torch.equal(window, whole[0, :, 224 * row : 224 * row + 256, 224 * column : 224 * column + 256])
