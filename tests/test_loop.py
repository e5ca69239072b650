"""The training loop on drawn discs: it learns, it resumes to the same bits, and its result is a model."""

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from made_patches import CLASSES, write_set

from wsipipe.errors import ConfigError, StoreError
from wsipipe.model.registry import CONSEP_CLASSES, SPECS
from wsipipe.model.weights import load_model, read_spec
from wsipipe.training import loop
from wsipipe.training.data import PatchSet
from wsipipe.training.evaluate import evaluate
from wsipipe.training.loop import TrainConfig, load_experiment, rate, train

PLAIN = {"geometry": {"near_mpp": (0.25, 0.25), "far_mpp": (0.25, 0.25)}}


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "discs", class_names=CONSEP_CLASSES)


def config(discs: Path, **changes) -> TrainConfig:
    given = {"data": {discs: 1.0}, "recipe": PLAIN, "crop_px": 64, "batch_size": 2, "steps": 6, "workers": 0}
    quick = {"validate_every": 3, "log_every": 1, "warmup_steps": 2, "device": "cpu", "precision": "fp32"}
    return TrainConfig(**{**given, **quick, **changes})


def losses(run: Path) -> list[str]:
    with (run / "log.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "best.safetensors")[0].state_dict()


def test_training_lowers_the_loss_and_leaves_a_model(discs, tmp_path):
    best = train(config(discs, steps=30, learning_rate=3e-3, validate_every=30, ema_decay=0.8), tmp_path)
    curve = [float(loss) for loss in losses(tmp_path)]
    assert sum(curve[-3:]) < 0.6 * sum(curve[:3])
    assert read_spec(best) == SPECS["cellvta-nano"]
    scores = evaluate(load_model(best), PatchSet.open(discs), "test", device="cpu", precision="fp32")
    assert scores["images"] == 1
    assert 0 <= scores["dice"] <= 1


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(discs, tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        train(config(discs, seed=seed), tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(discs, tmp_path, monkeypatch):
    train(config(discs), tmp_path / "whole")
    batches = loop._batches

    def cut_short(*arguments):
        for number, batch in enumerate(batches(*arguments)):
            if number == 4:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(loop, "_batches", cut_short)
    with pytest.raises(KeyboardInterrupt):
        train(config(discs), tmp_path / "cut")
    monkeypatch.undo()
    train(config(discs), tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_folder_with_another_run_is_refused_but_a_run_may_be_longer(discs, tmp_path):
    train(config(discs), tmp_path)
    with pytest.raises(StoreError, match=r"learning_rate: 0.001 there, 0.1 asked for"):
        train(config(discs, learning_rate=0.1), tmp_path)
    train(config(discs, steps=8), tmp_path)
    assert len(losses(tmp_path)) == 8


@pytest.mark.parametrize(("trains", "frozen"), [("adapter", "encoder.vit."), ("decoder", "encoder.")])
def test_what_is_frozen_stays_as_it_was(trains, frozen, discs, tmp_path):
    torch.manual_seed(19)
    before = loop.build(SPECS["cellvta-nano"]).state_dict()
    train(config(discs, trains=trains, ema_decay=0.0, steps=3), tmp_path)
    after = weights(tmp_path)
    changed = {key for key in before if "running" not in key and "num_batches" not in key}
    changed = {key for key in changed if not torch.equal(before[key], after[key])}
    assert changed
    assert not [key for key in changed if key.startswith(frozen)]


def test_the_rate_rises_then_holds_then_falls_to_nothing(discs):
    settings = config(discs, steps=100, warmup_steps=10, decay_share=0.3)
    rates = [rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:70] == [1.0] * 61
    assert all(a > b for a, b in pairwise(rates[70:]))
    assert rates[-1] < 0.01


def test_data_of_other_classes_and_unknown_models_are_refused(tmp_path):
    other = write_set(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"the data name \('background', 'round', 'long'\)"):
        train(config(other), tmp_path / "run")
    with pytest.raises(ConfigError, match="no model is called 'resnet'"):
        train(config(other, model="resnet"), tmp_path / "run")
    assert CLASSES != CONSEP_CLASSES


def test_an_experiment_file_is_read_and_its_faults_come_all_at_once(discs, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(f"data: {{{discs}: 1.0}}\nsteps: 5\n")
    assert load_experiment(path).steps == 5
    path.write_text("steps: 0\ncolour: red\n")
    with pytest.raises(ConfigError, match=r"(?s)data.*steps.*colour"):
        load_experiment(path)
    path.write_text("- a list\n")
    with pytest.raises(ConfigError, match=r"experiment\.yaml"):
        load_experiment(path)
