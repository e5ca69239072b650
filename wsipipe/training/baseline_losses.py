"""What HoVer-Net, CISCNet and PointNu-Net minimise, as published. (B, C, H, W) in float32."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from wsipipe.metrics import UNKNOWN_TYPE
from wsipipe.training.losses import cross_entropy, dice, offset_error, offset_gradient_error, one_hot


def hovernet_losses(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of HoVer-Net's loss, whose plain sum is minimised.

    Parameters
    ----------
    output
        As the network gives it.
    target
        `nuclei` (B, H, W) int64 of 0 and 1; `offsets` (B, 2, H, W); where the network has types, `types` (B, H, W)
        int64, `UNKNOWN_TYPE` where no loss of the types is to look; optional `trusted` (B, H, W) bool, False where none
        of the offsets is.
    """
    nuclei = one_hot(target["nuclei"], 2)
    probability = output["nuclei"].softmax(1)
    trusted = target["trusted"][:, None].float() if "trusted" in target else None
    parts = {
        "nuclei_cross_entropy": cross_entropy(probability, nuclei),
        "nuclei_dice": dice(probability, nuclei),
        "offsets_mse": offset_error(output["offsets"], target["offsets"], trusted),
        "offsets_gradient": offset_gradient_error(output["offsets"], target["offsets"], nuclei[:, 1:], trusted),
    }
    if "types" in output:
        types = one_hot(target["types"], output["types"].shape[1])
        known = (target["types"] != UNKNOWN_TYPE)[:, None].float()
        by_type = output["types"].softmax(1)
        parts["types_cross_entropy"] = cross_entropy(by_type, types, known)
        parts["types_dice"] = dice(by_type, types, known)
    return parts


def distance_weight(target: Tensor, weight: float) -> Tensor:
    """`weight` in nuclei and one pixel round them, else 1; of a target (B, 1, H, W)."""
    near = functional.max_pool2d((target > 0).float(), 3, stride=1, padding=1)
    return 1 + (weight - 1) * near


def distance_loss(
    output: Tensor,
    target: Tensor,
    factors: Sequence[float] = (1, 3, 1, 1, 3, 3, 1),
    weights: Sequence[float] = (1, 2, 1, 1, 2, 2, 1),
    counts: Tensor | None = None,
) -> Tensor:
    """CISCNet's: smooth L1 of every channel, weighted in and round nuclei, mean over channels.

    `factors` and `weights` as in the submission, where rare types count more. `counts`, shaped as the target, is False
    where nothing is known.
    """
    sure = torch.ones_like(target) if counts is None else counts.float()
    losses = []
    for channel, (factor, weight) in enumerate(zip(factors, weights, strict=True)):
        of = slice(channel, channel + 1)
        each = functional.smooth_l1_loss(output[:, of], target[:, of], reduction="none")
        weighted = distance_weight(target[:, of], weight) * each * sure[:, of]
        losses.append(factor * weighted.sum() / sure[:, of].sum().clamp(min=1))
    return torch.stack(losses).mean()


def point_losses(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of PointNu-Net's loss, `category` and `masks`, whose plain sum is minimised.

    `target` as `wsipipe.training.crop_targets.PointTargets` has it. `masks` is a mean over images that have nuclei, 0
    where none has.
    """
    of_images = []
    for feature, kernel, cells, numbered in zip(
        output["feature"], output["kernel"], target["cells"], target["numbered"], strict=True
    ):
        places = cells.nonzero()
        if len(places):
            masks = numbered[None] == cells[places[:, 0], places[:, 1]][:, None, None]
            of_images.append(point_mask_loss(feature, kernel, places, masks))
    # Where there are no nuclei the heads have a gradient nonetheless, of 0: several devices wait for each other's.
    nothing = 0 * (output["feature"].sum() + output["kernel"].sum())
    return {
        "category": point_focal_loss(output["category"], target["heat"], target["counts"]),
        "masks": torch.stack(of_images).mean() if of_images else nothing,
    }


def point_focal_loss(category: Tensor, heat: Tensor, counts: Tensor | None = None) -> Tensor:
    """PointNu-Net's for logits (B, C, h, w) of centres: CenterNet's focal loss over the number of centres.

    Cells where `counts` (B, h, w) is False are left out, unless a centre is there.
    """
    found, missed = functional.logsigmoid(category), functional.logsigmoid(-category)
    probability = category.sigmoid()
    positive = heat == 1
    negative = ~positive if counts is None else ~positive & counts[:, None]
    at_centres = (found * (1 - probability).square() * positive).flatten(1).sum(1)
    elsewhere = (missed * probability.square() * (1 - heat) ** 4 * negative).flatten(1).sum(1)
    centres = positive.flatten(1).sum(1)
    return (-(at_centres + elsewhere) / centres.clamp(min=1)).mean()


def point_mask_loss(feature: Tensor, kernel: Tensor, cells: Tensor, masks: Tensor) -> Tensor:
    """PointNu-Net's for the masks of one image: 1 - Dice with smoothing 1, mean over nuclei.

    `feature` (F, H, W), `kernel` (F, h, w), `cells` (N, 2) rows and columns, `masks` (N, H, W) of 0 and 1.
    """
    kernels = kernel[:, cells[:, 0], cells[:, 1]].T
    probability = (kernels @ feature.flatten(1)).sigmoid()
    true = masks.flatten(1).float()
    overlap = (probability * true).sum(1)
    return (1 - (2 * overlap + 1) / (probability.sum(1) + true.sum(1) + 1)).mean()
