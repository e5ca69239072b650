import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wsipipe.metrics import (
    UNKNOWN_TYPE,
    aggregated_jaccard,
    centroids,
    detection,
    dice,
    jaccard,
    majority_types,
    pair_centroids,
    panoptic_quality,
    remap_label,
    type_detection,
)

PARITY = Path(__file__).parent / "data/parity"
VALUES = json.loads((PARITY / "metrics.json").read_text())
ARRAYS = dict(np.load(PARITY / "metrics.npz"))
IOUS = (0.3, 0.5, 0.7)

sides = st.shared(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=10))
maps = hnp.arrays(np.int32, sides, elements=st.integers(0, 4))


@pytest.mark.parity
@pytest.mark.parametrize("case", VALUES["pq"])
def test_nuclei_are_renumbered_as_in_the_reference(case):
    for kind in ("true", "pred"):
        renumbered = remap_label(ARRAYS[f"{case}.{kind}"])
        np.testing.assert_array_equal(renumbered, ARRAYS[f"{case}.{kind}_remap"])
        assert renumbered.dtype == np.int32


@pytest.mark.parity
@pytest.mark.parametrize("iou", IOUS)
@pytest.mark.parametrize("case", VALUES["pq"])
def test_panoptic_quality_and_its_pairs_are_those_of_the_reference(case, iou):
    expected = VALUES["pq"][case][f"iou{iou}"]
    found = panoptic_quality(ARRAYS[f"{case}.true_remap"], ARRAYS[f"{case}.pred_remap"], iou)
    assert found.pairs.tolist() == list(map(list, zip(expected["paired_true"], expected["paired_pred"], strict=True)))
    assert found.missed.tolist() == expected["unpaired_true"]
    assert found.false_alarms.tolist() == expected["unpaired_pred"]
    for score in ("dq", "sq", "pq"):
        assert getattr(found, score) == pytest.approx(expected[score], abs=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("case", VALUES["pq"])
def test_dice_and_jaccard_are_those_of_the_reference_where_there_is_anything(case):
    true, predicted = ARRAYS[f"{case}.true"] > 0, ARRAYS[f"{case}.pred"] > 0
    expected = np.nan if case == "both_empty" else VALUES["pq"][case]["dice_ignore0"]
    assert dice(true, predicted) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    expected = VALUES["pq"][case]["binary_jaccard"]
    assert jaccard(true, predicted) == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["pair0", "pair1", "pair2"])
def test_centroids_pair_as_in_the_reference(case):
    a, b, radius = (ARRAYS[f"{case}.{name}"] for name in ("A", "B", "radius"))
    pairs, unpaired_a, unpaired_b = pair_centroids(a, b, float(radius))
    assert sorted(pairs.tolist()) == sorted(ARRAYS[f"{case}.pairing"].tolist())
    assert unpaired_a.tolist() == sorted(ARRAYS[f"{case}.unpairedA"].tolist())
    assert unpaired_b.tolist() == sorted(ARRAYS[f"{case}.unpairedB"].tolist())


@pytest.mark.parity
def test_detection_scores_are_those_of_the_reference():
    expected = VALUES["detection"]
    paired = np.column_stack([ARRAYS["det.paired_true"], ARRAYS["det.paired_pred"]])
    missed, false_alarms = ARRAYS["det.unpaired_true"], ARRAYS["det.unpaired_pred"]
    found = detection(len(paired), len(missed), len(false_alarms))
    assert found == pytest.approx(expected["cell_detection_scores (f1, prec, rec)"], abs=1e-9)
    for of_type in range(1, 6):
        found = type_detection(paired, missed, false_alarms, of_type)
        assert found == pytest.approx(expected[f"cell_type_detection_scores type {of_type} (f1, prec, rec)"], abs=1e-9)


def iou_table(true, predicted):
    """IoU of every true with every predicted nucleus, one pair after the other."""
    nuclei = [[m == i for i in np.unique(m[m > 0])] for m in (true, predicted)]
    table = [[(a & b).sum() / (a | b).sum() for b in nuclei[1]] for a in nuclei[0]]
    return np.array(table).reshape(len(nuclei[0]), len(nuclei[1])), nuclei


@given(maps, maps)
def test_panoptic_quality_agrees_with_a_table_of_all_pairs(true, predicted):
    table, _ = iou_table(true, predicted)
    hits = table > 0.5
    found = panoptic_quality(true, predicted)
    assert len(found.pairs) == hits.sum()
    assert len(found.missed) == (~hits.any(axis=1)).sum()
    assert len(found.false_alarms) == (~hits.any(axis=0)).sum()
    assert found.ious.sum() == pytest.approx(table[hits].sum())
    assert found.dq == pytest.approx(2 * hits.sum() / max(sum(table.shape), 1), abs=1e-5)


@given(maps, maps)
def test_aggregated_jaccard_agrees_with_a_table_of_all_pairs(true, predicted):
    table, (a, b) = iou_table(true, predicted)
    shared = whole = 0
    used = set()
    for row, nucleus in enumerate(a):
        best = int(table[row].argmax()) if len(b) else -1
        if best < 0 or table[row, best] == 0:
            whole += nucleus.sum()
            continue
        used.add(best)
        shared += (nucleus & b[best]).sum()
        whole += (nucleus | b[best]).sum()
    whole += sum(nucleus.sum() for row, nucleus in enumerate(b) if row not in used)
    assert aggregated_jaccard(true, predicted) == pytest.approx(shared / whole if whole else np.nan, nan_ok=True)


@given(maps, st.sampled_from(IOUS))
def test_a_map_agrees_with_itself(instance_map, iou):
    nuclei = len(np.unique(instance_map[instance_map > 0]))
    found = panoptic_quality(instance_map, instance_map, iou)
    assert (found.pairs[:, 0] == found.pairs[:, 1]).all()
    assert found.pq == pytest.approx(1 if nuclei else 0, abs=1e-5)
    assert aggregated_jaccard(instance_map, instance_map) == pytest.approx(1 if nuclei else np.nan, nan_ok=True)


@given(maps, maps, st.sampled_from(IOUS), st.integers(1, 10**8))
def test_scores_do_not_depend_on_ids_or_orientation(true, predicted, iou, step):
    plain = panoptic_quality(true, predicted, iou)
    other = panoptic_quality(true.T[::-1].astype(np.int64) * step, predicted.T[::-1], iou)
    assert (other.dq, other.sq, other.pq) == pytest.approx((plain.dq, plain.sq, plain.pq))
    np.testing.assert_array_equal(other.missed, plain.missed * step)


def test_below_half_every_nucleus_still_has_one_partner_at_most():
    true = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
    predicted = np.array([[1, 1, 3, 3, 3, 3, 3, 3, 0, 0]])
    found = panoptic_quality(true, predicted, iou=0.3)
    assert found.pairs.tolist() == [[1, 1], [2, 3]]  # 3 is the best partner of both true nuclei


def test_maps_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        panoptic_quality(np.zeros((2, 3), int), np.zeros((3, 2), int))


def test_centroids_are_means_of_pixels_in_the_order_of_the_ids():
    instance_map = np.zeros((6, 8), np.int32)
    instance_map[0:2, 3:6] = 9
    instance_map[4, 1] = 4
    assert centroids(instance_map).tolist() == [[1, 4], [4, 0.5]]
    assert centroids(np.zeros((3, 3), int)).shape == (0, 2)


def test_background_is_the_type_of_a_nucleus_only_where_there_is_no_other():
    instance_map = np.array([[2, 2, 2, 0, 5, 5, 5, 7, 7, 7]])
    type_map = np.array([[0, 0, 3, 1, 4, 4, 1, 0, 0, 0]])
    assert majority_types(instance_map, type_map).tolist() == [3, 4, 0]
    assert majority_types(np.zeros((2, 2), int), np.ones((2, 2), int)).tolist() == []
    assert majority_types(np.array([[1]]), np.array([[0]], np.uint8)).tolist() == [0]


def test_points_beyond_the_radius_do_not_pair():
    pairs, missed, false_alarms = pair_centroids(np.array([[0.0, 0], [9, 0]]), np.array([[0.0, 3], [9, 5]]), 3)
    assert pairs.tolist() == [[0, 0]]
    assert missed.tolist() == [1]
    assert false_alarms.tolist() == [1]


def test_no_points_pair_with_nothing():
    pairs, missed, false_alarms = pair_centroids(np.zeros((0, 2)), np.array([[1.0, 2]]), 12)
    assert pairs.shape == (0, 2)
    assert missed.size == 0
    assert false_alarms.tolist() == [0]


def test_nothing_to_find_has_no_score():
    assert np.isnan(detection(0, 0, 0)).all()
    assert detection(0, 3, 0)[::2] == (0, 0)


def test_a_pair_whose_true_type_is_unknown_is_neither_right_nor_wrong():
    paired = np.array([[1, 1], [UNKNOWN_TYPE, 1], [UNKNOWN_TYPE, 2]])
    nothing = np.zeros(0, np.int64)
    assert type_detection(paired, nothing, nothing, 1) == (1, 1, 1)
    assert np.isnan(type_detection(paired, nothing, nothing, 2)).all()
