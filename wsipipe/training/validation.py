"""Scores of a network on validation crops while it trains: the loss, and PQ where the best weights are told by it."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsipipe.metrics import Floats, majority_types, panoptic_quality, remap_label
from wsipipe.training.crops import Item
from wsipipe.training.scores import TypedNuclei, score_image

Array = npt.NDArray[Any]


@torch.inference_mode()
def validate(
    network: nn.Module,
    loss: Callable[[dict[str, Tensor], Item], Tensor],
    batches: Iterable[Item],
    prepared: Callable[[Tensor], Tensor],
    found_in: Callable[[dict[str, Tensor]], list[TypedNuclei]],
    types: int,
    *,
    with_pq: bool,
) -> dict[str, float]:
    """Mean loss over batches and, if asked for, `bPQ` and `mPQ` over crops.

    Parameters
    ----------
    loss : function
        (output of the network, batch) to the total.
    prepared : function
        (B, 3, H, W) uint8 to the input of the network.
    found_in : function
        Output of the network to the nuclei of every crop, or of its middle, where it answers for that alone.
    types : int
        Classes, background included.

    Notes
    -----
    As CellVTA chooses its weights: bPQ is that of all nuclei found, and 0 for a crop without true nuclei; mPQ leaves
    out types that a crop does not hold.
    """
    network.eval()
    losses: list[float] = []
    binary: list[float] = []
    by_type: list[Floats] = []
    for batch in batches:
        output = network(prepared(batch["image"]))
        losses.append(loss(output, batch).item())
        if with_pq:
            of_crops = found_in(output)
            shape = of_crops[0].instance_map.shape
            truth = {name: middle(batch[f"true_{name}"], *shape) for name in ("instances", "types")}
            for i, found in enumerate(of_crops):
                of_all, of_types = score_crop(truth, i, found, types)
                binary.append(of_all)
                by_type.append(of_types)
    scores = {"loss": sum(losses) / len(losses)}
    if with_pq:
        means = [float(np.nanmean(row)) for row in by_type if not np.isnan(row).all()]
        scores |= {"bPQ": float(np.mean(binary)), "mPQ": float(np.mean(means)) if means else 0.0}
    return scores


def middle(maps: Tensor, height: int, width: int) -> Tensor:
    """The middle of maps (..., H, W): what a network answers for that needs its border as context."""
    top, left = (maps.shape[-2] - height) // 2, (maps.shape[-1] - width) // 2
    return maps[..., top : top + height, left : left + width]


def score_crop(batch: Item, i: int, found: TypedNuclei, types: int) -> tuple[float, Floats]:
    """bPQ of a crop, and PQ of each type, NaN for those that it has none of."""
    instances = remap_label(batch["instances"][i].numpy().astype(np.int32))
    if not instances.any():
        return 0.0, np.full(types - 1, np.nan)
    truth = TypedNuclei(instances, majority_types(instances, batch["types"][i].numpy()))
    return (
        panoptic_quality(instances, found.instance_map).pq,
        score_image(truth, found, types, radius_px=12, protocol="published").type_quality[2],
    )
