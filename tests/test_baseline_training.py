"""Targets and losses of HoVer-Net, CISCNet and PointNu-Net: equal to the reference files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wsipipe.training.baseline_losses import (
    distance_loss,
    distance_weight,
    hovernet_losses,
    point_focal_loss,
    point_mask_loss,
)
from wsipipe.training.distance_targets import distance_map, distance_targets
from wsipipe.training.hovernet_targets import hovernet_targets
from wsipipe.training.point_targets import point_targets

FILES = Path(__file__).parent / "data" / "parity" / "baselines"
LOSSES = json.loads((FILES / "losses.json").read_text())
pytestmark = pytest.mark.parity


def drawn(name: str, *shape: int) -> np.ndarray:
    """Numbers in [-1, 1) made from a name."""
    sys.path.insert(0, str(FILES.parent))
    try:
        import detweights
    finally:
        sys.path.pop(0)
    return detweights.uniform(f"loss:{name}", int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize("size", [164, 80])
def test_hovernet_targets(size):
    case = np.load(FILES / "targets_hovernet.npz")
    nuclei, offsets = hovernet_targets(case["inst"], size)
    assert np.array_equal(nuclei, case[f"np_{size}"])
    np.testing.assert_allclose(offsets, case[f"hv_{size}"].transpose(2, 0, 1), atol=1e-6)


def test_hovernet_losses():
    def image(name: str, channels: int) -> torch.Tensor:
        return torch.from_numpy(drawn(name, 2, 20, 20, channels)).movedim(-1, 1)

    output = {"nuclei": 3 * image("pnp", 2), "offsets": image("phv", 2), "types": 3 * image("ptp", 6)}
    target = {
        "nuclei": torch.from_numpy(drawn("tnp", 2, 20, 20) > 0).long(),
        "offsets": image("thv", 2),
        "types": torch.from_numpy(np.floor((drawn("ttp", 2, 20, 20) + 1) * 3).clip(0, 5)).long(),
    }
    for value in output.values():
        value.requires_grad_()
    parts, expected = hovernet_losses(output, target), LOSSES["hovernet"]
    ours = {
        "np_bce": "nuclei_cross_entropy",
        "np_dice": "nuclei_dice",
        "tp_bce": "types_cross_entropy",
        "tp_dice": "types_dice",
        "hv_mse": "offsets_mse",
        "hv_msge": "offsets_gradient",
    }
    assert {theirs: parts[name].item() for theirs, name in ours.items()} == pytest.approx(
        {theirs: expected[theirs] for theirs in ours}, abs=1e-4
    )
    total = sum(parts.values())
    assert total.item() == pytest.approx(expected["total"], abs=1e-3)
    total.backward()
    sums = {"np_logits": "nuclei", "tp_logits": "types", "hv": "offsets"}
    for theirs, name in sums.items():
        assert output[name].grad.abs().sum().item() == pytest.approx(expected["grad_abs_sum"][theirs], rel=1e-3)


def test_distance_targets():
    case = np.load(FILES / "post_ciscnet.npz")
    np.testing.assert_allclose(distance_map(case["gt_inst"]), case["gt_distance"], atol=1e-6)
    types = (case["gt_inst"] % 3).astype(int)
    targets = distance_targets(case["gt_inst"], types, 3)
    assert targets.shape == (3, *types.shape)
    assert np.array_equal(targets[2] > 0, (targets[0] > 0) & (types == 2))


def test_distance_loss():
    whole = np.load(FILES / "post_ciscnet.npz")["gt_distance"].astype(np.float32)
    target = torch.from_numpy(whole[:60, :60])[None, None]
    output = (target + 0.5 * torch.from_numpy(drawn("cisc", 1, 1, 60, 60))).requires_grad_()
    expected = LOSSES["ciscnet"]
    assert distance_weight(target, 2).sum().item() == expected["weight_sum_w2"]
    assert distance_weight(target, 1).sum().item() == expected["weight_sum_w1"]
    loss = distance_loss(output, target, (1,), (2,))
    assert loss.item() == pytest.approx(expected["loss_w2"], abs=1e-6)
    loss.backward()
    assert output.grad.abs().sum().item() == pytest.approx(expected["grad_abs_sum"], rel=1e-3)


def test_point_targets_and_losses():
    case = np.load(FILES / "post_pointnu.npz")
    labels = case["target_inst"].astype(int)
    types = np.arange(labels.max()) % 3
    heat, cells = point_targets(labels, types, 3)
    np.testing.assert_allclose(heat, case["target_cate"], atol=1e-5)
    assert np.array_equal(cells[:, :3], case["target_cells"][:, :3])
    feature, kernel, category = (torch.from_numpy(case[k].astype(np.float32)) for k in ("feature", "kernel", "cate"))
    expected = LOSSES["pointnu"]
    focal = point_focal_loss(category[None], torch.from_numpy(heat)[None])
    assert focal.item() == pytest.approx(expected["focal"], rel=1e-4)
    masks = torch.from_numpy(labels[None] == cells[:, 0, None, None])
    assert len(masks) == expected["n_inst"]
    found = point_mask_loss(feature, kernel, torch.from_numpy(cells[:, 1:3]), masks)
    assert found.item() == pytest.approx(expected["dice"], abs=1e-5)
