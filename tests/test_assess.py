"""Assessment by protocol: equal to the reference from the network's answer to the last figure, and readable."""

import csv
import gzip
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ORACLE
from made_patches import write_set
from reference_scores import assert_scores_agree
from torch import nn
from typer.testing import CliRunner

from wsipipe.cli import app
from wsipipe.errors import ConfigError, DataError, StoreError
from wsipipe.model.registry import PANNUKE_CLASSES, SPECS
from wsipipe.model.weights import load_model, save_checkpoint
from wsipipe.training.assess import assess
from wsipipe.training.data import PatchSet
from wsipipe.training.report import as_markdown, write_report

PARITY = Path(__file__).parent / "data/parity"


class Replay(nn.Module):
    """Answers with what a network once said, image after image."""

    def __init__(self, nuclei: np.ndarray, types: np.ndarray, hv: np.ndarray, classes: int) -> None:
        super().__init__()
        self.at, self.nuclei, self.types, self.hv, self.classes = 0, nuclei, types, hv, classes

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        now = slice(self.at, self.at + len(image))
        self.at += len(image)

        def logits(labels: np.ndarray, classes: int) -> torch.Tensor:
            return nn.functional.one_hot(torch.from_numpy(labels[now].astype(np.int64)), classes).movedim(-1, 1).float()

        return {
            "nuclei": logits(self.nuclei, 2),
            "types": logits(self.types, self.classes),
            "offsets": torch.from_numpy(self.hv[now].astype(np.float32) / 127),
        }


def write_truth(folder: Path, instances: np.ndarray, types: np.ndarray, names, mpp: float, tissues=None) -> PatchSet:
    folder.mkdir()
    np.save(folder / "images.npy", np.full((*instances.shape, 3), 200, np.uint8))
    np.save(folder / "instances.npy", instances.astype(np.uint16))
    np.save(folder / "types.npy", types.astype(np.uint8))
    with (folder / "index.csv").open("w", newline="") as file:
        rows = [(f"i{i}", f"g{i}", "test", tissues[i] if tissues else "", "") for i in range(len(instances))]
        csv.writer(file).writerows([("name", "group", "split", "tissue", "fold"), *rows])
    about = {"format": 1, "name": "truth", "mpp": mpp, "class_names": list(names), "source": "", "licence": ""}
    (folder / "dataset.json").write_text(json.dumps(about))
    return PatchSet.open(folder)


@pytest.mark.parity
def test_pannuke_is_assessed_as_in_the_reference(tmp_path):
    arrays, expected = np.load(PARITY / "eval_pannuke.npz"), json.loads((PARITY / "eval_pannuke.json").read_text())
    tissues = expected["tissue_of_image"]
    patches = write_truth(tmp_path / "truth", arrays["gt_inst"], arrays["gt_type"], PANNUKE_CLASSES, 0.25, tissues)
    network = Replay(arrays["pred_np"], arrays["pred_type"], arrays["pred_hv_q"], 6)
    model = (network, SPECS["cellvta-uni"], "0" * 64)
    made = assess(model, patches, "test", "pannuke", device="cpu", batch_size=4)
    assert_scores_agree(made.scores["published"], expected["results"]["dataset"])
    for name, values in made.scores["published"]["tissues"].items():
        assert values["mPQ"] == pytest.approx(expected["results"]["tissue_metrics"][name.lower()]["mPQ"], abs=1e-6)
    assert made.scores["strict"]["mPQ"] <= made.scores["published"]["mPQ"]


@pytest.mark.parity
def test_conic_is_assessed_as_in_the_reference(tmp_path):
    arrays = np.load(PARITY / "conic_upscale.npz")
    with gzip.open(PARITY / "conic_upscale_cells.json.gz") as file:
        expected = json.load(file)["results"]["dataset"]
    names = ("background", *(f"type {number}" for number in range(1, 7)))
    patches = write_truth(tmp_path / "truth", arrays["gt_inst"], arrays["gt_type"], names, 0.5)
    spec = SPECS["cellvta-uni"]
    spec = type(spec)(**{**vars_of(spec), "class_names": names})
    scores = {}
    for protocol in ("conic", "conic-corrected"):
        network = Replay(arrays["patch_np"], arrays["patch_type"], arrays["patch_hv_q"], 7)
        scores[protocol] = assess((network, spec, "0" * 64), patches, "test", protocol, device="cpu").scores[
            "published"
        ]
    assert_scores_agree(scores["conic"], expected)
    assert scores["conic-corrected"]["detection"]["recall"] > scores["conic"]["detection"]["recall"]


def vars_of(spec) -> dict:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


@pytest.fixture
def apart(tmp_path) -> Path:
    """Typed discs that do not touch; every other one is of a type that the oracle never says."""
    folder = write_set(tmp_path / "apart", class_names=list(ORACLE.class_names))
    instances = np.zeros((4, 96, 96), np.int32)
    for number, (x, y) in enumerate([(x, y) for y in (16, 48, 80) for x in (16, 48, 80)], 1):
        for mask in instances:
            cv2.circle(mask, (x, y), 7 + number % 4, number, -1)
    np.save(folder / "instances.npy", instances.astype(np.uint16))
    np.save(folder / "types.npy", np.where(instances > 0, 1 + instances % 2, 0).astype(np.uint8))
    np.save(folder / "images.npy", np.where(instances[..., None] > 0, (95, 60, 140), (225, 160, 195)).astype(np.uint8))
    return folder


def test_the_confusion_says_what_was_taken_for_what(apart, oracle):
    made = assess(load_model(oracle), PatchSet.open(apart), "test", "segment", device="cpu")
    assert made.confusion.tolist() == [[0, 0, 0, 0], [0, 4, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]]


def test_a_report_names_its_protocol_in_every_header(apart, oracle, tmp_path):
    model, patches = load_model(oracle), PatchSet.open(apart)
    made = assess(model, patches, "test", "segment", device="cpu")
    text = as_markdown(made)
    lines = text.splitlines()
    headers = [line for line, below in pairwise(lines) if below.startswith("| ---")]
    assert len(headers) >= 4
    assert all("segment" in header for header in headers)
    assert "mPQ+, pooled" in text
    write_report(made, patches, tmp_path / "report")
    scores = json.loads((tmp_path / "report/scores.json").read_text())
    assert (scores["protocol"], scores["split"], scores["fold"]) == ("segment", "test", None)
    assert "on apart, test: protocol segment" in lines[0]
    assert scores["scores"]["strict"]["types"]["other"]["PQ"] == 0
    for name in ("best.png", "worst.png", "confusion.png"):
        assert cv2.imread(str(tmp_path / "report" / name)).std() > 10


def test_evaluate_is_a_command(apart, oracle, tmp_path):
    result = CliRunner().invoke(
        app, ["evaluate", str(oracle), str(apart), "-o", str(tmp_path / "out"), "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert "segment, strict: mPQ" in result.output
    assert (tmp_path / "out/scores.md").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_scored(apart, oracle, tmp_path, monkeypatch):
    monkeypatch.setattr("wsipipe.training.assess.assess", lambda *_, **__: pytest.fail("scored"))
    (tmp_path / "file").touch()
    for place, reason in {"file": "file exists", "file/within": "not a directory"}.items():
        result = CliRunner().invoke(app, ["evaluate", str(oracle), str(apart), "-o", str(tmp_path / place)])
        assert isinstance(result.exception, StoreError)
        assert f"{reason}; choose another folder with --out" in str(result.exception)


def test_scores_of_a_fold_say_which(apart, oracle, tmp_path):
    (apart / "index.csv").write_text("name,group,split,fold\n" + "".join(f"i{i},g{i},train,{i}\n" for i in range(4)))
    given = ["evaluate", str(oracle), str(apart), "--device", "cpu", "--fold", "2", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "scores.json").read_text())
    assert (written["fold"], [image["name"] for image in written["images_scores"]]) == ("2", ["i2"])
    assert (tmp_path / "scores.md").read_text().splitlines()[0].endswith("on apart, fold 2: protocol segment")
    with pytest.raises(DataError, match="has no fold '7'; it has 0, 1, 2, 3"):
        assess(load_model(oracle), PatchSet.open(apart), fold="7", device="cpu")


def test_a_set_that_the_model_was_trained_on_is_split_as_it_was_there(apart, oracle, tmp_path):
    rows = "".join(f"i{i},g{i},{split},{i}\n" for i, split in enumerate(("train", "validation", "test", "test")))
    (apart / "index.csv").write_text("name,group,split,fold\n" + rows)
    network, spec, _ = load_model(oracle)
    folds = {"train": ["2"], "validation": ["1"], "test": ["0"]}
    fingerprint = PatchSet.open(apart).with_folds(folds).fingerprint
    of_run = tmp_path / "best.safetensors"
    save_checkpoint(of_run, network, spec, {"config": {"folds": folds}, "data": {"elsewhere/apart": fingerprint}})

    def evaluated(*more: str) -> list[str] | str:
        given = ["evaluate", str(of_run), str(apart), "--device", "cpu", "-o", str(tmp_path / "out"), *more]
        result = CliRunner().invoke(app, given)
        if result.exit_code:
            return str(result.exception)
        return [image["name"] for image in json.loads((tmp_path / "out/scores.json").read_text())["images_scores"]]

    assert evaluated() == evaluated("--fold", "0") == ["i0"]
    assert evaluated("--split", "validation") == ["i1"]
    assert evaluated("--fold", "3") == ["i3"]
    for fold, split in {"2": "train", "1": "validation"}.items():
        assert f"had fold '{fold}' of {apart} for {split}; choose a fold that it did not see" in evaluated(
            "--fold", fold
        )

    model, patches = load_model(of_run), PatchSet.open(apart)
    there = {"config": {"folds": {"train": ["2"], "validation": ["1"]}}, "data": {str(apart): "changed since"}}
    with pytest.raises(DataError, match="no image in the split 'test'"):
        assess(model, patches, device="cpu", notes=there)
    unknown = {"config": {"folds": folds}, "data": {"elsewhere/other": "another"}}
    assert [image["name"] for image in assess(model, patches, device="cpu", notes=unknown).images] == ["i2", "i3"]
    plain = {"config": {"folds": {}}, "data": {str(apart): ""}}
    with pytest.raises(DataError, match="had fold '0'"):
        assess(model, patches, device="cpu", fold="0", notes=plain)


def test_what_cannot_be_assessed_is_refused(apart, oracle, tmp_path):
    model, patches = load_model(oracle), PatchSet.open(apart)
    with pytest.raises(ConfigError, match="no protocol 'fancy'"):
        assess(model, patches, "test", "fancy", device="cpu")
    with pytest.raises(DataError, match="has the types"):
        assess(model, PatchSet.open(write_set(tmp_path / "other", class_names=["background", "x", "y"])), device="cpu")

    with pytest.raises(ConfigError, match=r"conic is for images at 0.5 µm/px, and those of .*apart are at 0.25"):
        assess(model, patches, "test", "conic", device="cpu")
    coarse = replace(patches, mpp=0.5)
    with pytest.raises(ConfigError, match="are for images of 256 x 256 px, not of 96 x 96 px; use --protocol segment"):
        assess(model, coarse, "test", "conic-corrected", device="cpu")

    odd = PatchSet.open(write_set(tmp_path / "odd", side=100, class_names=list(model[1].class_names)))
    with pytest.raises(ConfigError, match="oracle takes no images of 100 x 100 px whole; use --protocol segment"):
        assess(model, odd, "test", "pannuke", device="cpu")

    class Small(nn.Module):
        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return dict.fromkeys(("nuclei", "offsets", "types"), image[:, :2, 8:-8, 8:-8])

    with pytest.raises(ConfigError, match="maps of its whole input; use --protocol segment"):
        assess((Small(), model[1], "0" * 64), patches, "test", "pannuke", device="cpu")
