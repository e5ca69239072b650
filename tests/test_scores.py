import json
from pathlib import Path

import numpy as np
import pytest

from wsipipe.metrics import UNKNOWN_TYPE, majority_types
from wsipipe.training.scores import TypedNuclei, score_image, summarise

PARITY = Path(__file__).parent / "data/parity"


def squares(*types, size=40, shift=0):
    """A nucleus of 6x6 px of each type along the diagonal."""
    instance_map = np.zeros((size, size), np.int32)
    for i in range(len(types)):
        instance_map[8 * i + 1 : 8 * i + 7, 8 * i + 1 + shift : 8 * i + 7 + shift] = i + 1
    return TypedNuclei(instance_map, np.array(types, np.int64))


@pytest.fixture(scope="module")
def published():
    """Scores of six images by the published protocol, their expected results, and the names of the types."""
    expected = json.loads((PARITY / "eval_pannuke.json").read_text())
    arrays = dict(np.load(PARITY / "eval_pannuke.npz"))
    names = list(expected["nuclei_types"])
    scores = []
    for true_map, type_map, foreground, predicted_types, predicted_map in zip(
        *(arrays[name] for name in ("gt_inst", "gt_type", "pred_np", "pred_type", "pred_inst")), strict=True
    ):
        true = TypedNuclei(true_map, majority_types(true_map, type_map))
        predicted = TypedNuclei(predicted_map, majority_types(predicted_map, predicted_types), foreground > 0)
        scores.append(score_image(true, predicted, len(names), radius_px=12, protocol="published"))
    return scores, expected, names


@pytest.mark.parity
def test_a_data_set_scores_as_in_the_reference(published):
    scores, expected, names = published
    summary = summarise(scores, names, expected["tissue_of_image"])
    results = expected["results"]
    whole = results["dataset"]
    for name in ("bPQ", "bDQ", "bSQ", "mPQ", "mDQ", "mSQ"):
        assert summary[name] == pytest.approx(whole[name], abs=1e-9), name
    assert summary["dice"] == pytest.approx(whole["Binary-Cell-Dice-Mean"], abs=1e-6)
    assert summary["jaccard"] == pytest.approx(whole["Binary-Cell-Jacard-Mean"], abs=1e-6)
    for name in ("f1", "precision", "recall"):
        assert summary["detection"][name] == pytest.approx(whole[f"{name}_detection"], abs=1e-9)
    for name in names[1:]:
        found, detected = summary["types"][name], results["nuclei_metrics_d"][name]
        assert found["PQ"] == pytest.approx(results["nuclei_metrics_pq"][name], abs=1e-9)
        assert (found["f1"], found["precision"], found["recall"]) == pytest.approx(
            (detected["f1_cell"], detected["prec_cell"], detected["rec_cell"]), abs=1e-9
        )
    for tissue, values in summary["tissues"].items():
        reference = results["tissue_metrics"][tissue.lower()]
        for ours, theirs in (("dice", "Dice"), ("jaccard", "Jaccard"), ("mPQ", "mPQ"), ("bPQ", "bPQ")):
            assert values[ours] == pytest.approx(reference[theirs], abs=1e-6), (tissue, ours)


@pytest.mark.parity
def test_every_image_scores_as_in_the_reference(published):
    scores, expected, _ = published
    for image, reference in zip(scores, expected["results"]["image_metrics"].values(), strict=True):
        assert image.dice == pytest.approx(reference["Dice"], abs=1e-6)
        assert image.jaccard == pytest.approx(reference["Jaccard"], abs=1e-6)
        assert image.quality[2] == pytest.approx(reference["bPQ"], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("protocol", ["clean", "published"])
def test_a_perfect_prediction_scores_one(protocol):
    nuclei = squares(1, 2, 2, 3)
    summary = summarise([score_image(nuclei, nuclei, 4, 12, protocol)], ["background", "a", "b", "c"], ["colon"])
    scores = [
        *(summary[name] for name in ("bPQ", "mPQ", "dice", "jaccard", "aji")),
        *summary["detection"].values(),
        *summary["pooled"].values(),
        *summary["tissue_mean"].values(),
        *(value for one in summary["types"].values() for value in one.values()),
    ]
    assert scores == pytest.approx(np.ones(len(scores)), abs=1e-5)


def test_false_alarms_in_an_empty_image_count_in_the_clean_protocol_only():
    empty, found = squares(), squares(1, 1)
    clean = score_image(empty, found, 3, 12, "clean")
    assert clean.quality.tolist() == [0, 0, 0]
    assert clean.type_quality[:, 0].tolist() == [0, 0, 0]
    assert np.isnan(clean.type_quality[:, 1]).all()
    published = score_image(empty, found, 3, 12, "published")
    assert np.isnan(published.quality).all()
    assert np.isnan(published.type_quality).all()


def test_an_image_without_nuclei_has_no_score_in_the_clean_protocol():
    summary = summarise([score_image(squares(), squares(), 3, 12)], ["background", "a", "b"])
    for name in ("bPQ", "mPQ", "dice", "jaccard", "aji"):
        assert np.isnan(summary[name])
    assert all(np.isnan(value) for value in summary["detection"].values())
    assert score_image(squares(), squares(), 3, 12, "published").dice == 0


def test_nuclei_without_a_type_are_predictions_in_the_clean_protocol_only():
    true, predicted = squares(1, 2), squares(1, 0)
    assert score_image(true, predicted, 3, 12, "clean").counts.tolist() == [2, 0, 0, 2]
    assert score_image(true, predicted, 3, 12, "published").counts.tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("protocol", ["clean", "published"])
def test_where_there_are_no_types_nuclei_without_one_count(protocol):
    true, predicted = squares(UNKNOWN_TYPE, UNKNOWN_TYPE), squares(0, 0)
    scored = score_image(true, predicted, 1, 12, protocol)
    assert scored.quality == pytest.approx(1, abs=1e-5)
    assert scored.counts.tolist() == [2, 0, 0, 2]
    summary = summarise([scored], ["background"])
    assert (summary["bPQ"], summary["pooled"]["bPQ"]) == pytest.approx((1, 1), abs=1e-5)
    assert summary["detection"]["f1"] == 1
    assert np.isnan(summary["mPQ"])


def test_nuclei_of_a_pixel_or_a_line_are_no_predictions_in_the_published_protocol():
    true = squares(1, 1)
    instance_map = true.instance_map.copy()
    instance_map[30, 5] = 3
    instance_map[34, 5:15] = 4
    predicted = TypedNuclei(instance_map, np.ones(4, np.int64))
    assert score_image(true, predicted, 2, 12, "clean").counts[:3].tolist() == [2, 0, 2]
    published = score_image(true, predicted, 2, 12, "published")
    assert published.counts[:3].tolist() == [2, 0, 0]
    assert published.false_alarms.size == 0
    assert published.dice < 1  # their pixels still count as foreground


def test_a_wrong_type_is_a_miss_of_one_type_and_a_false_alarm_of_the_other():
    scores = score_image(squares(1, 2), squares(2, 2), 3, 12)
    assert scores.counts[:3].tolist() == [2, 0, 0]
    assert scores.type_counts[:3].tolist() == [[0, 1], [1, 0], [0, 1]]


def test_what_is_found_on_a_nucleus_of_unknown_type_is_no_false_alarm_of_any_type():
    scores = score_image(squares(1, UNKNOWN_TYPE), squares(1, 2), 3, 12)
    assert scores.counts[:3].tolist() == [2, 0, 0]
    assert scores.type_counts[:3].tolist() == [[1, 0], [0, 0], [0, 0]]


def test_a_truth_without_any_known_type_gives_no_type_a_score():
    summary = summarise([score_image(squares(UNKNOWN_TYPE), squares(1, 2), 3, 12)], ["background", "a", "b"])
    assert summary["bPQ"] == pytest.approx(2 / 3, abs=1e-5)
    assert np.isnan(summary["mPQ"])
    assert np.isnan([list(scores.values()) for scores in summary["types"].values()]).all()


def test_pooled_scores_weigh_nuclei_and_means_weigh_images():
    one, three = squares(1), squares(1, 1, 1)
    scores = [score_image(one, squares(), 2, 12), score_image(three, three, 2, 12)]
    summary = summarise(scores, ["background", "a"])
    assert summary["bPQ"] == pytest.approx(1 / 2, abs=1e-5)
    assert summary["pooled"]["bPQ"] == pytest.approx(3 / 3.5, abs=1e-5)
    assert summary["types"]["a"]["pooled_PQ"] == summary["pooled"]["mPQ"] == pytest.approx(3 / 3.5, abs=1e-5)


@pytest.mark.parametrize("wrong", [[1], [1, 1, 1], [[1, 1]]])
def test_types_that_do_not_fit_the_nuclei_are_refused(wrong):
    with pytest.raises(ValueError, match="for 2 nuclei"):
        TypedNuclei(squares(1, 1).instance_map, np.array(wrong))
