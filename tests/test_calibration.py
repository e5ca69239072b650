"""Certainties that mean what they say."""

import numpy as np
import pytest
import torch
from made_patches import write_set
from shrunk_models import shrunk
from typer.testing import CliRunner

from wsipipe.cli import app
from wsipipe.errors import DataError, ModelError
from wsipipe.model.registry import build
from wsipipe.model.weights import shipped_models
from wsipipe.training import calibration
from wsipipe.training.data import PatchSet
from wsipipe.training.scores import ImageScores, TypedNuclei, calibration_of, certain_pairs, score_image, summarise

TRUE_TEMPERATURE = 2.0


def two_squares(types: list[int], certainties: list[float] | None = None) -> TypedNuclei:
    instance_map = np.zeros((32, 32), np.int32)
    instance_map[4:12, 4:12], instance_map[20:28, 20:28] = 1, 2
    return TypedNuclei(
        instance_map, np.array(types), certainties=None if certainties is None else np.array(certainties)
    )


def test_the_error_is_the_gap_between_what_is_told_and_what_is_right():
    certainties, right = np.array([0.95] * 10 + [0.55] * 10), np.array([True] * 10 + [True] * 5 + [False] * 5)
    told = calibration_of(certainties, right)
    assert told["ece"] == pytest.approx(0.05)
    assert told["accuracy"] == 0.75
    assert told["certainty"] == pytest.approx(0.75)  # right on average is not enough: the bins tell
    assert calibration_of(np.array([1.0]), np.array([False]))["ece"] == 1


def test_certainties_are_those_of_the_nuclei_that_were_found_and_whose_type_is_known():
    scores = [
        score_image(two_squares([1, 255]), two_squares([1, 1], [0.9, 0.6]), 3, 5.0),
        score_image(two_squares([1, 2]), two_squares([2, 2], [0.7, float("nan")]), 3, 5.0),
    ]
    certainties, right = certain_pairs(scores)
    assert certainties.tolist() == [0.9, 0.7]
    assert right.tolist() == [True, False]
    assert summarise(scores, ("background", "a", "b"))["calibration"]["nuclei"] == 2
    silent = [score_image(two_squares([1, 2]), two_squares([1, 2]), 3, 5.0)]
    assert "calibration" not in summarise(silent, ("background", "a", "b"))


def test_a_temperature_divides_the_logits_of_the_types_and_nothing_else():
    torch.manual_seed(0)
    network = build(shrunk("cellvta-nano")).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before, after = network(image), calibration.with_temperature(network, 2.0)(image)
    torch.testing.assert_close(after["types"], before["types"] / 2)
    assert torch.equal(after["nuclei"], before["nuclei"])
    with pytest.raises(ModelError, match="no branch of types"):
        calibration.with_temperature(build(shrunk("ciscnet")), 2.0)


def test_the_temperature_that_makes_certainties_true_is_found(tmp_path, monkeypatch):
    network = build(shrunk("cellvta-nano")).eval()
    gain = network.get_submodule("decoder.branches.types.head")[-1].weight.abs().sum().item()
    rng = np.random.default_rng(0)
    logits = rng.uniform(0.2, 6, 4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-logits / TRUE_TEMPERATURE))

    def scores(model, patches, split, *, device):
        assert split == "validation"
        left = model[0].get_submodule("decoder.branches.types.head")[-1].weight.abs().sum().item() / gain
        nothing, paired = np.zeros(0, np.int64), np.column_stack([np.ones(4000, int), np.where(right, 1, 2)])
        certainties = 1 / (1 + np.exp(-logits * left))
        zeros = np.zeros((4, 1))
        return [
            ImageScores(0, 0, 0, zeros[:3, 0], zeros[:3], zeros[:, 0], zeros, paired, certainties, nothing, nothing)
        ]

    monkeypatch.setattr(calibration, "score_images", scores)
    patches = PatchSet.open(write_set(tmp_path / "discs"))
    fitted, figures = calibration.calibrate((network, shrunk("cellvta-nano"), ""), [patches])
    assert figures["temperature"] == pytest.approx(TRUE_TEMPERATURE, rel=0.1)
    assert figures["after"]["ece"] < 0.03 < figures["before"]["ece"]
    assert figures["after"]["accuracy"] == figures["before"]["accuracy"]
    divided = fitted.get_submodule("decoder.branches.types.head")[-1].weight.abs().sum().item()
    assert divided == pytest.approx(gain / figures["temperature"], rel=1e-4)


def test_the_images_that_validated_are_those_of_the_run(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "discs")
    (folder / "index.csv").write_text("name,group,split,fold\n" + "".join(f"i{i},g{i},train,{i}\n" for i in range(4)))
    seen = []

    def scores(model, patches, split, *, device):
        seen.extend(patches.of(split).tolist())
        return [score_image(two_squares([1, 1]), two_squares([1, 1], [0.9, 0.6]), 3, 5.0)]

    monkeypatch.setattr(calibration, "score_images", scores)
    notes = {"config": {"folds": {"train": ["1", "2"], "validation": ["3"]}}, "data": {str(folder): ""}}
    model = (build(shrunk("cellvta-nano")), shrunk("cellvta-nano"), "")
    calibration.calibrate(model, [PatchSet.open(folder)], notes=notes)
    assert set(seen) == {3}


def test_a_folder_is_no_place_for_a_calibrated_checkpoint(tmp_path):
    data = write_set(tmp_path / "discs")
    given = ["calibrate", str(shipped_models()["cellvta-nano"]), str(data), "-o", str(tmp_path)]
    result = CliRunner().invoke(app, given)
    assert (result.exit_code, "is a directory" in result.output) == (2, True), result.output


def test_without_typed_validation_images_there_is_nothing_to_fit(tmp_path):
    untyped = PatchSet.open(write_set(tmp_path / "untyped", typed=False))
    with pytest.raises(DataError, match="validation images with types"):
        calibration.calibrate((build(shrunk("cellvta-nano")), shrunk("cellvta-nano"), ""), [untyped])
