"""The training loop on drawn discs: it learns, it resumes to the same bits, and its result is a model."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from made_patches import CLASSES, write_set
from safetensors import safe_open
from safetensors.torch import save_file
from shrunk_models import shrunk
from torch import nn
from torch.utils.data import default_collate

from wsipipe.config import Config
from wsipipe.errors import ConfigError, ModelError, StoreError
from wsipipe.lock import Lock
from wsipipe.model.registry import CONSEP_CLASSES, SPECS, build
from wsipipe.model.spec import ModelSpec
from wsipipe.model.weights import load_model, read_spec
from wsipipe.training import loop
from wsipipe.training.batches import Share, training_batches, training_crops, validation_batches
from wsipipe.training.crops import MAP_TARGETS, FixedCrops
from wsipipe.training.data import PatchSet
from wsipipe.training.evaluate import evaluate, segment_image
from wsipipe.training.loop import TrainConfig, load_experiment, train
from wsipipe.training.miniature import make_pannuke
from wsipipe.training.network import classes_at_the_start, freeze, normalised, spec_of, start_network
from wsipipe.training.objectives import objective_of
from wsipipe.training.run_folder import Progress
from wsipipe.training.schedule import Schedule, rate, schedule_of
from wsipipe.training.sources.pannuke import prepare_pannuke
from wsipipe.training.team import start_team

PLAIN = {"geometry": {"near_mpp": (0.25, 0.25), "far_mpp": (0.25, 0.25)}}


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "discs", class_names=CONSEP_CLASSES)


def config(discs: Path, **changes) -> TrainConfig:
    given = {"data": {discs: 1.0}, "recipe": PLAIN, "crop_px": 64, "batch_size": 2, "steps": 6, "workers": 0}
    quick = {
        "validate_every": 3,
        "log_every": 1,
        "warmup_steps": 2,
        "device": "cpu",
        "precision": "fp32",
        "tensorboard": False,
    }
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


def test_one_batch_can_be_learnt_by_heart(tmp_path):
    patches = PatchSet.open(write_set(tmp_path / "discs", class_names=CONSEP_CLASSES))
    batch = default_collate([FixedCrops(patches, crop_px=96)[0]])
    spec = SPECS["cellvta-nano"]
    torch.manual_seed(0)
    network, objective = build(spec), objective_of(spec, config(tmp_path / "discs"))
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    image = normalised(batch["image"], spec, torch.device("cpu"))
    curve = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = objective.loss(network(image), batch)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.2 * curve[0]


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(discs, tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        train(config(discs, seed=seed), tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(discs, tmp_path, monkeypatch):
    train(config(discs), tmp_path / "whole")
    batches = loop.training_batches

    def cut_short(*arguments):
        for number, batch in enumerate(batches(*arguments)):
            if number == 4:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(loop, "training_batches", cut_short)
    with pytest.raises(KeyboardInterrupt):
        train(config(discs), tmp_path / "cut")
    monkeypatch.undo()
    train(config(discs), tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize(("device", "fixed"), [("cuda:0", True), ("cpu", False)])
def test_cudnn_does_the_same_in_the_same_way_where_a_run_is_on_cuda(device, fixed, discs, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(loop, "choose_precision", lambda *_: "fp32")
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)  # no CUDA is needed to see it
    settings, spec = config(discs), SPECS["cellvta-nano"]
    loop.Learner(settings, spec, objective_of(spec, settings), torch.device(device))
    assert torch.backends.cudnn.deterministic is fixed


def test_a_folder_with_another_run_is_refused_but_a_run_may_be_longer(discs, tmp_path):
    train(config(discs), tmp_path)
    with pytest.raises(StoreError, match=r"learning_rate: 0.001 there, 0.1 asked for"):
        train(config(discs, learning_rate=0.1), tmp_path)
    train(config(discs, steps=8), tmp_path)
    assert len(losses(tmp_path)) == 8


def test_a_run_goes_on_with_the_precision_that_it_was_begun_with(discs, tmp_path, monkeypatch):
    def train_where_auto_is(auto: str, **changes) -> None:
        monkeypatch.setattr(loop, "choose_precision", lambda name, _: auto if name == "auto" else name)
        train(config(discs, **changes), tmp_path)

    train_where_auto_is("fp32", precision="auto", steps=1)
    for other in ({"precision": "auto"}, {"precision": "fp16"}):
        with pytest.raises(StoreError, match="begun with precision fp32, not fp16; set precision=fp32 to go on"):
            train_where_auto_is("fp16", **other, steps=2)
    train_where_auto_is("fp16", precision="fp32", steps=2)
    train_where_auto_is("fp32", precision="auto", steps=3)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (last.pop("step"), last.pop("precision")) == (3, "fp32")
    torch.save({**last, "step": 3}, tmp_path / "last.pt")  # as earlier versions left it
    train_where_auto_is("fp32", precision="auto", steps=4)
    assert len(losses(tmp_path)) == 4


def test_a_stated_precision_may_not_be_changed(discs, tmp_path):
    train(config(discs, steps=1, precision="fp32"), tmp_path)
    with pytest.raises(StoreError, match="precision: fp32 there, bf16 asked for"):
        train(config(discs, steps=2, precision="bf16"), tmp_path)


@pytest.mark.parametrize(("trains", "frozen"), [("adapter", "encoder.vit."), ("decoder", "encoder.")])
def test_what_is_frozen_stays_as_it_was(trains, frozen, discs, tmp_path):
    torch.manual_seed(19)
    before = build(SPECS["cellvta-nano"]).state_dict()
    train(config(discs, trains=trains, ema_decay=0.0, steps=3), tmp_path)
    after = weights(tmp_path)
    changed = {key for key in before if "running" not in key and "num_batches" not in key}
    changed = {key for key in changed if not torch.equal(before[key], after[key])}
    assert changed
    assert not [key for key in changed if key.startswith(frozen)]


def test_the_rate_rises_then_holds_then_falls_to_nothing(discs):
    settings = config(discs, steps=100, warmup_steps=10, decay_share=0.3)
    rates = [rate(step, settings, Schedule(100, 10, 100, 100)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:70] == [1.0] * 61
    assert all(a > b for a, b in pairwise(rates[70:]))
    assert rates[-1] < 0.01


def test_a_network_gets_the_classes_of_its_data(tmp_path):
    own = write_set(tmp_path / "own")
    spec = read_spec(train(config(own, steps=1), tmp_path / "run"))
    assert spec.class_names == CLASSES
    assert len(spec.class_colours) == len(CLASSES)


def test_unknown_models_and_settings_are_refused(discs, tmp_path):
    with pytest.raises(ConfigError, match="no model is called 'resnet'"):
        train(config(discs, model="resnet"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"losses: .*'fancy'"):
        train(config(discs, losses={"fancy": 1.0}), tmp_path / "run")


def test_another_mode_of_hovernet_is_another_model(discs):
    def spec(model: str, mode: str) -> ModelSpec:
        return spec_of(config(discs, model=model, crop_px=270, settings={"mode": mode}), None)

    with pytest.raises(ConfigError, match="hovernet-fast has no mode 'original'; set model: hovernet-original"):
        spec("hovernet-fast", "original")
    with pytest.raises(ConfigError, match="hovernet-original has no mode 'slow'; leave it out"):
        spec("hovernet-original", "slow")
    assert spec("hovernet-original", "original").margin_px == 95


def test_crops_that_the_network_does_not_take_are_refused_before_anything_is_made(discs, tmp_path):
    with pytest.raises(ConfigError, match="crop_px: cellvta-nano takes sides of a multiple of 32 px, not 48"):
        train(config(discs, crop_px=48), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert spec_of(config(discs, crop_px=48, settings={"cell_px": 1}), None).tile_step == (16, 0)


def test_data_that_cannot_validate_are_refused_before_anything_is_made(tmp_path):
    folder = write_set(tmp_path / "discs", count=2)
    with pytest.raises(ConfigError, match="none of the data has images in the split 'validation'"):
        train(config(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_there_are_refused_before_anything_is_made(discs, tmp_path):
    with pytest.raises(ModelError, match="'nano' is neither a shipped model"):
        train(config(discs, start_from="nano"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_starts_from_a_shipped_model_by_its_name(discs):
    shipped = load_model("cellvta-nano")[0].state_dict()
    network = start_network(SPECS["cellvta-nano"], config(discs, start_from="cellvta-nano"))
    assert all(torch.equal(value, shipped[key]) for key, value in network.state_dict().items())


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


def test_an_experiment_changes_its_base_by_a_few_lines(discs, tmp_path):
    (tmp_path / "base.yaml").write_text(f"data: {{{discs}: 1.0}}\nsteps: 5\nseed: 3\nsettings: {{dim: 32, heads: 2}}\n")
    path = tmp_path / "child.yaml"
    path.write_text("base: base.yaml\nseed: 4\nsettings: {heads: 4}\n")
    settings = load_experiment(path, {"steps": 7})
    assert (settings.seed, settings.steps, settings.settings) == (4, 7, {"dim": 32, "heads": 4})
    path.write_text("base: child.yaml\n")
    with pytest.raises(ConfigError, match="its own base"):
        load_experiment(path)


def test_variants_are_settings_that_an_experiment_may_change(discs):
    published = config(discs, variant="published", batch_size=2)
    assert (published.decay, published.double_softmax, published.batch_size) == (0.95, True, 2)
    paper = TrainConfig(data={discs: 1.0}, variant="paper", model="cellvta-uni", epochs=1)
    assert (paper.decay, paper.double_softmax, paper.batch_size) == (0.85, False, 4)
    settings = spec_of(paper, None, ["a", "b"]).settings
    assert (settings["variant"], settings["tissue_classes"]) == ("paper", 2)
    for model in ("cellvta-uni", "cellvta-uni-paper", "cellvta-sam-l"):
        assert spec_of(config(discs, variant="published", model=model), None).settings["variant"] == "published"
    stated = config(discs, variant="published", model="cellvta-sam-l", settings={"variant": "paper"})
    assert spec_of(stated, None).settings["variant"] == "paper"
    assert spec_of(config(discs, model="cellvta-sam-l"), None).settings["variant"] == "paper"


def test_the_published_schedule_falls_once_an_epoch(discs):
    settings = TrainConfig(data={discs: 1.0}, variant="published", epochs=3)
    rates = [rate(step, settings, Schedule(31, 10.5, 10, 10)) for step in range(31)]
    assert rates[:11] == [1.0] * 11  # steps that begin within the first epoch
    assert rates[11] == pytest.approx(0.95)
    assert rates[21] == pytest.approx(0.95**2)


def test_a_run_may_validate_every_few_epochs_and_is_saved_every_one(discs):
    rare = TrainConfig(data={discs: 1.0}, variant="published", epochs=30, validate_epochs=5)
    assert schedule_of(rare, 84) == Schedule(315, 10.5, 52, 10)
    assert schedule_of(TrainConfig(data={discs: 1.0}, epochs=30), 84) == Schedule(315, 10.5, 10, 10)
    assert schedule_of(TrainConfig(data={discs: 1.0}, steps=1000), 84) == Schedule(1000, 10.5, 200, 200)
    both = TrainConfig(data={discs: 1.0}, epochs=3, validate_every=4, save_every=9)
    assert schedule_of(both, 84) == Schedule(32, 10.5, 4, 9)


@pytest.mark.parametrize("changes", [{"learning_rate": float("inf")}, {"weight": -1.0}, {"weight": 0.0}])
def test_numbers_that_cannot_train_are_refused(discs, changes):
    data = {discs: changes.pop("weight", 1.0)}
    with pytest.raises(ValueError, match=r"finite|must not be negative"):
        TrainConfig(data=data, steps=1, **changes)


@pytest.mark.parametrize("seed", [-1, 2**31, 10**30])
def test_seeds_that_a_generator_does_not_take_are_refused(discs, seed):
    with pytest.raises(ValueError, match="seed"):
        config(discs, seed=seed)


def test_the_largest_seed_trains(discs, tmp_path):
    assert train(config(discs, seed=2**31 - 1, steps=1), tmp_path).exists()


def test_steps_or_epochs_but_not_both(discs):
    with pytest.raises(ValueError, match="either steps or epochs"):
        TrainConfig(data={discs: 1.0})
    with pytest.raises(ValueError, match="either steps or epochs"):
        TrainConfig(data={discs: 1.0}, steps=1, epochs=1)


def test_as_many_parameters_learn_as_in_the_published_run():
    with torch.device("meta"):
        network = build(SPECS["cellvta-uni"])
    freeze(network, "adapter")
    assert sum(p.numel() for p in network.parameters()) == 387_769_437
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 84_420_701


@pytest.mark.parametrize("model", ["cellvta-uni", "cellvit-uni"])
def test_the_head_for_tissues_learns_with_the_decoder(model):
    spec = shrunk(model)
    network = build(replace(spec, settings={**spec.settings, "tissue_classes": 2}))
    freeze(network, "decoder")
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    others = {name for name in learning if not name.startswith("decoder.")}
    assert others == {"encoder.tissue_head.weight", "encoder.tissue_head.bias"} < learning


def test_accumulated_batches_are_as_good_as_large_ones(discs, tmp_path):
    """Exactly so for a loss that is a mean over crops and a network without batch statistics; here, for the crops."""
    crops = training_crops(config(discs), SPECS["cellvta-nano"], {discs: PatchSet.open(discs)}, (), MAP_TARGETS)
    team = start_team(config(discs))
    large = list(training_batches(config(discs, batch_size=4), crops, 1, 3, team))
    small = list(training_batches(config(discs, batch_size=2, accumulate=2), crops, 1, 3, team))
    assert len(large) == 2
    assert len(small) == 4
    assert torch.equal(large[0]["image"], torch.cat([small[0]["image"], small[1]["image"]]))
    train(config(discs, batch_size=2, accumulate=2, steps=2), tmp_path)


def test_processes_share_a_batch_without_overlap():
    shares = [list(Share(1, 3, 8, process, 4)) for process in range(4)]
    assert shares[0] == [8, 9, 16, 17]
    assert sorted(number for share in shares for number in share) == list(range(8, 24))


def test_a_run_ends_early_and_keeps_the_best(discs, tmp_path, monkeypatch):
    scores = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(loop.Learner, "validate", lambda *_: {"loss": next(scores)})
    best = train(config(discs, steps=10, validate_every=1, patience=2), tmp_path)
    with safe_open(best, "pt") as file:
        notes = json.loads(file.metadata()["wsipipe_notes"])
    assert notes["step"] == 2
    assert len(losses(tmp_path)) == 4
    train(config(discs, steps=10, validate_every=1, patience=2), tmp_path)  # it has ended: nothing more to do
    assert len(losses(tmp_path)) == 4


def test_best_weights_that_went_away_are_not_taken_for_there(discs, tmp_path):
    best = train(config(discs, steps=2, validate_every=1), tmp_path)
    best.unlink()
    with pytest.raises(StoreError, match="is gone"):
        train(config(discs, steps=2, validate_every=1), tmp_path)
    assert train(config(discs, steps=3, validate_every=1), tmp_path).exists()


def test_the_checkpoint_says_what_it_was_made_of(discs, tmp_path):
    best = train(config(discs, steps=1), tmp_path)
    with safe_open(best, "pt") as file:
        notes = json.loads(file.metadata()["wsipipe_notes"])
    assert notes["config"] == config(discs, steps=1).model_dump(mode="json")
    assert notes["data"] == {str(discs): PatchSet.open(discs).fingerprint}
    assert notes["commit"] is None or len(notes["commit"]) == 40


def test_other_data_of_the_same_name_are_refused(tmp_path):
    folder = write_set(tmp_path / "discs")
    train(config(folder, steps=1), tmp_path / "run")
    index = (folder / "index.csv").read_text()
    (folder / "index.csv").write_text(index.replace("i0,g0", "i0,g9"))
    with pytest.raises(StoreError, match=r"data of .* are not those"):
        train(config(folder, steps=1), tmp_path / "run")


def test_the_best_may_be_told_by_panoptic_quality_and_images_drawn_by_their_types(discs, tmp_path):
    settings = config(discs, best_by="mPQ", sampling="cell", steps=3, tensorboard=True)
    train(settings, tmp_path)
    with (tmp_path / "validation.csv").open() as file:
        row = next(csv.DictReader(file))
    assert set(row) == {"step", "loss", "bPQ", "mPQ"}
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_tissues_are_learnt_where_there_is_a_head_for_them(tmp_path):
    make_pannuke(tmp_path / "src", images=2, side=64)
    folder = prepare_pannuke(tmp_path / "src", tmp_path / "set").folder
    changes = {
        "settings": {"tissue_classes": 19},
        "sampling": "cell+tissue",
        "folds": {"train": ["2"], "validation": ["1"]},
    }
    best = train(config(folder, steps=2, **changes), tmp_path / "run")
    assert read_spec(best).settings["tissue_classes"] == 2
    with (tmp_path / "run/log.csv").open() as file:
        assert float(next(csv.DictReader(file))["tissue"]) > 0


def test_every_image_comes_once_an_epoch_where_they_are_shuffled(discs):
    sets = {discs: PatchSet.open(discs)}
    crops = training_crops(config(discs, sampling="shuffled"), SPECS["cellvta-nano"], sets, (), MAP_TARGETS)
    numbers = [crops._shuffled_image(i)[1] for i in range(20)]
    assert all(sorted(numbers[i : i + 2]) == [0, 1] for i in range(0, 20, 2))
    assert len({tuple(numbers[i : i + 2]) for i in range(0, 20, 2)}) == 2


def test_a_set_of_weight_0_validates_and_does_not_train(discs, tmp_path):
    other = write_set(tmp_path / "other", class_names=CONSEP_CLASSES)
    (other / "index.csv").write_text("name,group,split\n" + "".join(f"i{i},g{i},validation\n" for i in range(4)))
    data = {discs: 1.0, other: 0.0}
    sets = {folder: PatchSet.open(folder) for folder in data}
    spec = SPECS["cellvta-nano"]
    mixed = training_crops(config(discs, data=data), spec, sets, (), MAP_TARGETS)
    alone = training_crops(config(discs), spec, sets, (), MAP_TARGETS)
    assert mixed.images == alone.images == 2
    assert all(torch.equal(mixed[i]["image"], alone[i]["image"]) for i in range(8))
    settings = config(discs, data=data, crop_px=96)
    assert len(validation_batches(settings, spec, sets, (), MAP_TARGETS).dataset) == 5
    assert train(config(discs, data=data, steps=None, epochs=1), tmp_path / "run").exists()


def test_training_starts_from_the_weights_of_a_vit(discs, tmp_path):
    best = train(config(discs, steps=1), tmp_path / "first")
    ours = {k.removeprefix("encoder.vit."): v for k, v in weights(tmp_path / "first").items() if "encoder.vit." in k}
    save_file({key: value + 1.0 for key, value in ours.items()}, tmp_path / "vit.safetensors")
    frozen = {"trains": "adapter", "ema_decay": 0.0, "steps": 1}
    train(config(discs, encoder=str(tmp_path / "vit.safetensors"), **frozen), tmp_path / "second")
    second = weights(tmp_path / "second")
    assert torch.equal(second["encoder.vit.blocks.0.attn.qkv.weight"], ours["blocks.0.attn.qkv.weight"] + 1.0)
    train(config(discs, start_from=best, **frozen), tmp_path / "third")
    assert torch.equal(weights(tmp_path / "third")["encoder.vit.pos_embed"], ours["pos_embed"])
    last = torch.load(tmp_path / "first/last.pt", weights_only=True)
    last["network"]["encoder.vit.pos_embed"] += 1.0
    torch.save(last, tmp_path / "last.pt")
    train(config(discs, start_from=tmp_path / "last.pt", **frozen), tmp_path / "of-last")
    assert torch.equal(weights(tmp_path / "of-last")["encoder.vit.pos_embed"], ours["pos_embed"] + 1.0)
    save_file({**ours, "blocks.0.attn.qkv.weight": torch.zeros(2)}, tmp_path / "vit.safetensors")
    with pytest.raises(ModelError, match=r"blocks\.0\.attn\.qkv\.weight has shape \(2,\), expected \(192, 64\)"):
        train(config(discs, encoder=str(tmp_path / "vit.safetensors"), **frozen), tmp_path / "fourth")


def test_a_batch_that_the_processes_cannot_share_is_refused_before_the_run_has_a_folder(discs, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(num_processes=3))
    with pytest.raises(ConfigError, match="a batch of 4 cannot be shared by 3 processes"):
        train(config(discs, steps=1, batch_size=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_launcher_has_no_say_in_the_arithmetic(discs, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    AcceleratorState._reset_state(reset_partial_state=False)  # a process has one, whatever its settings
    try:
        team = start_team(config(discs, precision="fp32"))
        assert (team.mixed_precision, team.state.dynamo_plugin.backend.value) == ("no", "NO")
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)


def test_training_starts_as_the_equal_of_a_narrower_network(discs, tmp_path):
    best = train(config(discs, steps=1), tmp_path / "narrow")
    wider = {"settings": {"dim": 128, "decoder_widths": [32, 64, 128, 192]}, "widen_from": best}
    still = {"steps": 1, "learning_rate": 1e-9, "weight_decay": 0.0, "ema_decay": 0.0}
    train(config(discs, **wider, **still), tmp_path / "wide")
    narrow, wide = (float((tmp_path / run / "validation.csv").read_text().split(",")[-1]) for run in ("narrow", "wide"))
    assert wide == pytest.approx(narrow, rel=0.02)
    with pytest.raises(ConfigError, match="cannot be widened"):
        train(config(discs, settings={"dim": 96}, **still, widen_from=best), tmp_path / "odd")
    others = write_set(tmp_path / "others")
    with pytest.raises(ConfigError, match="only a network of the same classes can be widened"):
        train(config(others, **wider, **still), tmp_path / "others-run")


def test_a_network_that_is_taught_no_types_tells_none(tmp_path):
    plain = write_set(tmp_path / "plain", typed=False)
    best = train(config(plain, steps=40, learning_rate=3e-3, validate_every=40, ema_decay=0.8), tmp_path / "run")
    network, spec, digest = load_model(best)
    assert spec.class_names == ("background",)
    patches = PatchSet.open(plain)
    found = segment_image((network, spec, digest), patches.images[3], 0.25, Config())
    assert found.instance_map.max() > 0
    assert not found.types.any()
    scores = evaluate((network, spec, digest), patches, "test", device="cpu", precision="fp32")
    assert 0 < scores["dice"] <= 1
    assert classes_at_the_start(config(plain, start_from="cellvta-nano")) == CONSEP_CLASSES
    assert classes_at_the_start(config(plain, start_from=str(best))) == ("background",)
    for model in ("ciscnet", "pointnu-net"):
        with pytest.raises(ConfigError, match="finds nuclei by their types"):
            train(config(plain, model=model), tmp_path / model)


def test_a_resolution_that_the_recipe_does_not_show_is_refused(discs, tmp_path):
    with pytest.raises(ConfigError, match=r"shows crops at 0\.2 to 0\.31 µm/px, the network is for 0\.5"):
        train(config(discs, mpp=0.5, recipe="default"), tmp_path / "run")
    train(config(discs, mpp=0.5, recipe="published", steps=1, validate_every=1), tmp_path / "run2")


def test_a_folder_that_another_run_is_at_is_left_alone(discs, tmp_path):
    (tmp_path / "run").mkdir()
    lock = Lock(tmp_path / "run" / "last.pt")
    with pytest.raises(StoreError, match="in use by"):
        train(config(discs), tmp_path / "run")
    lock.release()
    assert not any((tmp_path / "run").iterdir())


def test_a_validation_without_a_number_never_stands_in_the_way_of_one_with(discs):
    progress, by_loss = Progress(), config(discs, best_by="loss")
    assert [progress.improved({"loss": loss}, by_loss) for loss in (math.nan, 0.5, math.nan, 0.7, 0.4)] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert progress.best == 0.4


def test_a_run_whose_loss_is_no_number_stops_and_saves_nothing_of_it(discs, tmp_path):
    wild = config(discs, learning_rate=1e30, clip_norm=None, ema_decay=0.0, warmup_steps=0)
    with pytest.raises(ConfigError, match=r"the loss is no number at step 3 \(nothing was saved\); train with a lower"):
        train(wild, tmp_path / "wild")
    assert not {"last.pt", "best.safetensors", "last.pt.lock"} & {path.name for path in (tmp_path / "wild").iterdir()}


@pytest.mark.parametrize("changes", [{"best_by": "bPQ"}, {"validate_every": 8, "save_every": 2}])
def test_weights_that_are_no_numbers_never_take_the_place_of_ones_that_are(changes, discs, tmp_path, monkeypatch):
    step = loop.Learner.step

    def spoilt(learner, batches, number, rate):
        made = step(learner, batches, number, rate)
        if number == 4:
            for parameter in learner.learning:
                parameter.data.fill_(math.nan)
        return made

    monkeypatch.setattr(loop.Learner, "step", spoilt)
    settings = config(discs, **{"steps": 8, "validate_every": 3, "ema_decay": 0.0, **changes})
    kept = settings.save_every or settings.validate_every
    with pytest.raises(ConfigError, match=rf"no number at step 6 \(last\.pt is of step {6 - kept}\);"):
        train(settings, tmp_path)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["step"] == 6 - kept
    assert all(value.isfinite().all() for value in last["network"].values())
    if settings.best_by == "bPQ":
        assert json.loads(safe_open(tmp_path / "best.safetensors", "pt").metadata()["wsipipe_notes"])["step"] == 3


def test_a_killed_process_goes_on_to_the_same_bits(discs, tmp_path):
    """With paths that are dropped at random, so that the draws within a step count too."""
    experiment = tmp_path / "experiment.yaml"
    settings = config(discs, steps=30, batch_size=1, validate_every=10, save_every=2, settings={"drop_path": 0.3})
    experiment.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "wsipipe", "train", str(experiment), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    log = tmp_path / "killed" / "log.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.02)  # until it is under way; the assertions do not depend on how far it came
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(losses(tmp_path / "killed")) < 30, "it was killed before it was done"
    train(load_experiment(experiment), tmp_path / "killed")
    train(load_experiment(experiment), tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (tmp_path / "killed/validation.csv").read_text() == (tmp_path / "whole/validation.csv").read_text()
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_with_its_workers_says_how_to_go_on(number, code, discs, tmp_path):
    """As a terminal and SLURM stop it: every process of the group gets the signal."""
    experiment, log = tmp_path / "experiment.yaml", tmp_path / "run" / "log.csv"
    experiment.write_text(yaml.safe_dump(config(discs, steps=5000, workers=2).model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-m", "wsipipe", "train", str(experiment), str(tmp_path / "run")],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == code, said
    assert "; run the same command again to go on where it stopped\n" in said, said
    assert "Traceback" not in said, said


def run_by_two(settings: TrainConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    """A run of two processes in `folder`/run, and what they said."""
    experiment = folder / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    return subprocess.run(
        [*launch, "wsipipe", "train", str(experiment), str(folder / "run")],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.slow
def test_two_processes_train_one_network(discs, tmp_path):
    run = run_by_two(config(discs, steps=4), tmp_path)
    assert run.returncode == 0, run.stderr
    assert "on 2 x cpu" in run.stderr
    assert len(losses(tmp_path / "run")) == 4
    assert read_spec(tmp_path / "run/best.safetensors").name == "cellvta-nano"


@pytest.mark.slow
def test_both_processes_stop_where_the_loss_is_no_number(discs, tmp_path):
    wild = config(discs, learning_rate=1e30, clip_norm=None, ema_decay=0.0, warmup_steps=0)
    run = run_by_two(wild, tmp_path)
    assert run.returncode == 1
    assert run.stderr.count("wsipipe: the loss is no number at step 3 (nothing was saved)") == 2
    assert not (tmp_path / "run/best.safetensors").exists()
