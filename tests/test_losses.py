import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wsipipe.model.registry import SPECS
from wsipipe.training.config import TrainConfig
from wsipipe.training.losses import (
    UNKNOWN_TYPE,
    CellVTALoss,
    LossWeights,
    cross_entropy,
    dice,
    focal_tversky,
    offset_error,
    offset_gradient_error,
)
from wsipipe.training.objectives import objective_of

PARITY = Path(__file__).parent / "data/parity"
VALUES = json.loads((PARITY / "losses.json").read_text())
with np.load(PARITY / "losses.npz") as file:
    ARRAYS = {name: torch.from_numpy(file[name]) for name in file.files}

NUCLEI = (ARRAYS["inst"] > 0).long()
TYPES = ARRAYS["type_map"].long()


def one_hot(labels, channels):
    return torch.nn.functional.one_hot(labels, channels).permute(0, 3, 1, 2).float()


@pytest.fixture
def output():
    names = {"nuclei": "logits_np", "offsets": "hv_pred", "types": "logits_tp", "tissue": "logits_tissue"}
    return {ours: ARRAYS[theirs].clone().requires_grad_() for ours, theirs in names.items()}


@pytest.fixture
def target():
    return {"nuclei": NUCLEI, "offsets": ARRAYS["hv_target"], "types": TYPES.clone(), "tissue": ARRAYS["tissue"]}


def softmax_of(name, times):
    logits = ARRAYS[name]
    for _ in range(times):
        logits = logits.softmax(1)
    return logits


HALF = torch.full((1, 2, 8, 8), 0.5)
ALL_BACKGROUND = one_hot(torch.zeros(1, 8, 8, dtype=torch.long), 2)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("np.FocalTverskyLoss(softmaxed)", lambda: focal_tversky(softmax_of("logits_np", 2), one_hot(NUCLEI, 2))),
        ("np.FocalTverskyLoss(logits)", lambda: focal_tversky(softmax_of("logits_np", 1), one_hot(NUCLEI, 2))),
        ("np.dice_loss(softmaxed)", lambda: dice(softmax_of("logits_np", 1), one_hot(NUCLEI, 2))),
        ("hv.mse_loss_maps", lambda: offset_error(ARRAYS["hv_pred"], ARRAYS["hv_target"])),
        (
            "hv.msge_loss_maps(focus=np one-hot)",
            lambda: offset_gradient_error(ARRAYS["hv_pred"], ARRAYS["hv_target"], NUCLEI[:, None].float()),
        ),
        ("tp.xentropy_loss(softmaxed)", lambda: cross_entropy(softmax_of("logits_tp", 1), one_hot(TYPES, 6))),
        ("tp.dice_loss(softmaxed)", lambda: dice(softmax_of("logits_tp", 1), one_hot(TYPES, 6))),
        (
            "tp.MCFocalTverskyLoss(softmaxed,num_classes=6)",
            lambda: focal_tversky(softmax_of("logits_tp", 2), one_hot(TYPES, 6), per_channel=True),
        ),
        (
            "tp.MCFocalTverskyLoss(logits,num_classes=6)",
            lambda: focal_tversky(softmax_of("logits_tp", 1), one_hot(TYPES, 6), per_channel=True),
        ),
        ("empty.np.dice(p=0.5)", lambda: dice(HALF, ALL_BACKGROUND)),
        ("empty.FT(logits=0)", lambda: focal_tversky(HALF, ALL_BACKGROUND)),
        ("empty.msge(no nuclei)", lambda: offset_gradient_error(HALF, -HALF, torch.zeros(1, 1, 8, 8))),
    ],
)
def test_every_loss_has_the_value_of_the_reference(name, value):
    assert value().item() == pytest.approx(VALUES[name], rel=1e-6)


@pytest.mark.parity
def test_the_published_total_and_its_gradients_are_those_of_the_reference(output, target):
    total, parts = CellVTALoss()(output, target)
    total.backward()
    assert total.item() == pytest.approx(VALUES["total(PanNuke weights)"], rel=1e-6)
    assert parts["tissue"].item() == pytest.approx(VALUES["tissue.CrossEntropyLoss(logits)"], rel=1e-6)
    for ours, theirs in (
        ("nuclei", "logits_np"),
        ("offsets", "hv"),
        ("types", "logits_tp"),
        ("tissue", "logits_tissue"),
    ):
        expected = ARRAYS[f"grad_total_{theirs}"]
        torch.testing.assert_close(output[ours].grad, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_the_total_is_the_weighted_sum_of_its_parts(output, target):
    weights = LossWeights(offsets_gradient=3.0, nuclei_dice=0.0, tissue=2.0)
    total, parts = CellVTALoss(weights)(output, target)
    assert total.item() == pytest.approx(sum(getattr(weights, name) * part.item() for name, part in parts.items()))
    assert not any(part.requires_grad for part in parts.values())


def test_masks_that_leave_nothing_out_change_nothing(output, target):
    plain, _ = CellVTALoss()(output, target)
    masked, _ = CellVTALoss()(output, {**target, "trusted": torch.ones_like(NUCLEI, dtype=torch.bool)})
    assert plain.item() == masked.item()


def test_a_single_softmax_tells_a_perfect_answer_from_a_flat_one(target):
    perfect = {
        "nuclei": 50 * one_hot(NUCLEI, 2),
        "offsets": ARRAYS["hv_target"],
        "types": 50 * one_hot(TYPES, 6),
    }
    total, _ = CellVTALoss(double_softmax=False)(perfect, target)
    assert total.item() == pytest.approx(0, abs=1e-4)
    assert CellVTALoss(double_softmax=True)(perfect, target)[0].item() > 0.1


def test_pixels_of_unknown_type_teach_nothing_about_types(output, target):
    unknown = torch.zeros_like(NUCLEI, dtype=torch.bool)
    unknown[0, 10:30, 5:40] = True
    target["types"][unknown] = UNKNOWN_TYPE
    CellVTALoss()(output, target)[0].backward()
    gradient = output["types"].grad.movedim(1, -1)
    assert (gradient[unknown] == 0).all()
    assert (gradient[~unknown] != 0).any(-1).float().mean() > 0.99


def test_types_are_judged_as_if_unknown_pixels_were_not_in_the_image(output, target):
    cut = {name: value[..., :32] if value.ndim > 2 else value for name, value in output.items()}
    cut_target = {name: value[..., :32] if value.ndim > 1 else value for name, value in target.items()}
    target["types"][..., 32:] = UNKNOWN_TYPE
    _, parts = CellVTALoss()(output, target)
    _, expected = CellVTALoss()(cut, cut_target)
    for name in ("types_cross_entropy", "types_dice", "types_focal_tversky"):
        torch.testing.assert_close(parts[name], expected[name])


@pytest.mark.parametrize("double_softmax", [True, False])
def test_images_without_any_known_type_give_the_type_branch_no_gradient_at_all(output, target, double_softmax):
    target["types"][:] = UNKNOWN_TYPE
    total, parts = CellVTALoss(double_softmax=double_softmax)(output, target)
    total.backward()
    assert [parts[name].item() for name in parts if name.startswith("types")] == [0, 0, 0]
    assert (output["types"].grad == 0).all()
    assert torch.isfinite(output["nuclei"].grad).all()


def test_pixels_that_are_not_trusted_teach_nothing_about_offsets(output, target):
    trusted = torch.ones_like(NUCLEI, dtype=torch.bool)
    trusted[:, 8:20, 16:48] = False
    CellVTALoss()(output, {**target, "trusted": trusted})[0].backward()
    gradient = output["offsets"].grad.movedim(1, -1)
    assert (gradient[~trusted] == 0).all()
    assert (gradient[trusted] != 0).any(-1).float().mean() > 0.99


def test_a_batch_without_trusted_pixels_leaves_the_offsets_alone(output, target):
    total, parts = CellVTALoss()(output, {**target, "trusted": torch.zeros_like(NUCLEI, dtype=torch.bool)})
    total.backward()
    assert parts["offsets_mse"] == parts["offsets_gradient"] == 0
    assert (output["offsets"].grad == 0).all()


def test_a_network_without_a_tissue_head_has_no_tissue_loss(output, target):
    del output["tissue"]
    _, parts = CellVTALoss()(output, target)
    assert "tissue" not in parts


def test_the_loss_is_computed_in_float32_under_autocast(output, target):
    halves = {name: value.detach().bfloat16() for name, value in output.items()}
    expected, _ = CellVTALoss()({name: value.float() for name, value in halves.items()}, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, parts = CellVTALoss()(halves, target)
    assert total.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert total.item() == expected.item()


def test_gradients_stay_finite_for_answers_beyond_doubt(target):
    logits = 200 * one_hot(1 - NUCLEI, 2)
    output = {"nuclei": logits, "offsets": ARRAYS["hv_pred"], "types": 200 * one_hot((TYPES + 1) % 6, 6)}
    output = {name: value.clone().requires_grad_() for name, value in output.items()}
    CellVTALoss(double_softmax=False)(output, target)[0].backward()
    assert all(torch.isfinite(value.grad).all() for value in output.values())


@pytest.mark.parametrize("exact", [False, True])
def test_the_exact_gradient_sees_offsets_fall_along_their_own_direction_and_only_so(exact):
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    inside = torch.zeros(1, 1, 16, 16)
    inside[..., 4:12, 4:12] = 1
    along, across = torch.stack([columns, rows])[None], torch.stack([rows, columns])[None]

    def error(offsets):
        return offset_gradient_error(offsets, torch.zeros_like(offsets), inside, exact=exact).item()

    assert error(along if exact else across) == pytest.approx(errors_of_a_slope_of_one())
    assert error(across if exact else along) == pytest.approx(0, abs=1e-9)


def errors_of_a_slope_of_one():
    taps = torch.arange(-2.0, 3.0)
    squares = taps.square()
    return (squares / (squares + squares[:, None]).clamp(min=1)).sum().square().item()


def test_an_experiment_takes_the_exact_gradient_unless_it_is_as_published(output, target):
    def total(**settings):
        config = TrainConfig(data={"x": 1.0}, steps=1, **settings)
        return objective_of(SPECS["cellvta-nano"], config).loss(output, target)[1]["offsets_gradient"].item()

    assert total(hv_gradient="published") == total(variant="published") == total(variant="paper")
    assert total() == total(variant="published", hv_gradient="exact") != total(variant="published")
