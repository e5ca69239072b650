"""What training minimises: the losses of CellVTA, and their sum over a network's output.

All take (B, C, H, W) maps in float32. A `weight` of (B, 1, H, W), 0 or 1, leaves out pixels; without one all count.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsipipe.metrics import UNKNOWN_TYPE


def dice(probability: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - Dice of every channel, over the batch and all pixels; the sum over channels.

    `target` is one-hot, shaped as `probability`.
    """
    if weight is not None:
        probability, target = probability * weight, target * weight
    overlap = (probability * target).sum((0, 2, 3))
    total = probability.sum((0, 2, 3)) + target.sum((0, 2, 3))
    return (1 - (2 * overlap + 1e-3) / (total + 1e-3)).sum()


def cross_entropy(probability: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over pixels of -log of the probability of the true channel of a one-hot target, cut to [1e-7, 1 - 1e-7]."""
    weight = _ones(probability) if weight is None else weight
    share = (probability * target).sum(1, keepdim=True) / probability.sum(1, keepdim=True)
    return -(share.clamp(1e-7, 1 - 1e-7).log() * weight).sum() / weight.sum().clamp(min=1)


def focal_tversky(
    probability: Tensor, target: Tensor, weight: Tensor | None = None, *, per_channel: bool = False
) -> Tensor:
    """(1 - Tversky index)^(4/3), a miss weighing 0.7 and a false alarm 0.3.

    One index over all channels, or with `per_channel` the sum of those of each channel.
    Abraham and Khan 2019, doi:10.1109/ISBI.2019.8759329.
    """
    if weight is not None:
        probability, target = probability * weight, target * weight
    over = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    hit = (probability * target).sum(over)
    miss = ((1 - probability) * target).sum(over)
    alarm = (probability * (1 - target)).sum(over)
    index = (hit + 1e-6) / (hit + 0.7 * miss + 0.3 * alarm + 1e-6)
    return ((1 - index) ** (4 / 3)).sum()


def offset_error(predicted: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of HV maps (B, 2, H, W), background included."""
    weight = _ones(predicted) if weight is None else weight
    return ((predicted - target).square() * weight).sum() / (2 * weight.sum()).clamp(min=1)


def offset_gradient_error(
    predicted: Tensor, target: Tensor, nuclei: Tensor, weight: Tensor | None = None, *, exact: bool = False
) -> Tensor:
    """Mean squared difference of the gradients of HV maps (B, 2, H, W) inside nuclei, (B, 1, H, W) of 0 and 1.

    A gradient counts where all 5x5 pixels it is made of do.

    Notes
    -----
    In the published code of HoVer-Net (vqdang/hover_net) and all that came after it, the horizontal map is
    differentiated from row to row and the vertical map from column to column, across the direction in which they fall
    where two nuclei touch. `exact` takes that direction, which is the one that post-processing looks along.
    """
    if weight is not None:
        nuclei = nuclei * -functional.max_pool2d(-weight, 5, stride=1, padding=2)
    along = torch.arange(-2.0, 3.0, device=predicted.device)
    a, b = torch.meshgrid(along, along, indexing="ij")
    kernels = torch.stack([b, a] if exact else [a, b])[:, None] / (a * a + b * b + 1e-15)
    difference = functional.conv2d(predicted - target, kernels, padding=2, groups=2)
    return (difference.square() * nuclei).sum() / (2 * nuclei.sum() + 1e-8)


@dataclass(frozen=True)
class LossWeights:
    """What each part weighs in the sum; the published weights by default. 0 leaves a part out of it."""

    nuclei_focal_tversky: float = 1.0
    nuclei_dice: float = 1.0
    offsets_mse: float = 2.5
    offsets_gradient: float = 8.0
    types_cross_entropy: float = 0.5
    types_dice: float = 0.2
    types_focal_tversky: float = 0.5
    tissue: float = 0.1


class CellVTALoss(nn.Module):
    """Weighted sum of the losses over all branches of a network.

    Parameters
    ----------
    weights : LossWeights
    double_softmax : bool
        True as published: both Tversky losses see the softmax of the softmax, which keeps their probabilities
        between 0.27 and 0.73 (two channels). False: they see the probabilities.
    exact_gradient : bool
        See `offset_gradient_error`; False as published.
    """

    def __init__(
        self, weights: LossWeights | None = None, *, double_softmax: bool = True, exact_gradient: bool = False
    ) -> None:
        super().__init__()
        self.weights = weights or LossWeights()
        self.double_softmax, self.exact_gradient = double_softmax, exact_gradient

    def forward(self, output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total to minimise, and its parts before weighting, detached; in float32 under autocast too.

        Parameters
        ----------
        output
            Of the network: `nuclei` (B, 2, H, W) logits, `offsets` (B, 2, H, W), `types` (B, K, H, W) logits and,
            where it has that head, `tissue` (B, T) logits.
        target
            `nuclei` (B, H, W) int64, 0 or 1; `offsets` (B, 2, H, W) float32; `types` (B, H, W) int64, 0 to K - 1 or
            `UNKNOWN_TYPE`, which no loss of the types looks at. Optional: `trusted` (B, H, W) bool, where False no
            loss of the offsets looks; `tissue` (B,) int64, negative where not known.
        """
        with torch.autocast(output["nuclei"].device.type, enabled=False):
            parts = self._parts({name: value.float() for name, value in output.items()}, target)
            total = torch.stack([getattr(self.weights, name) * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _parts(self, output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        nuclei, types = output["nuclei"].softmax(1), output["types"].softmax(1)
        true_nuclei = one_hot(target["nuclei"], 2)
        known = target["types"] != UNKNOWN_TYPE
        true_types = one_hot(target["types"].where(known, 0), types.shape[1])
        known = known[:, None].float()
        trusted = target["trusted"][:, None].float() if "trusted" in target else None
        parts = {
            "nuclei_focal_tversky": focal_tversky(self._for_tversky(nuclei), true_nuclei),
            "nuclei_dice": dice(nuclei, true_nuclei),
            "offsets_mse": offset_error(output["offsets"], target["offsets"], trusted),
            "offsets_gradient": offset_gradient_error(
                output["offsets"], target["offsets"], true_nuclei[:, 1:], trusted, exact=self.exact_gradient
            ),
            "types_cross_entropy": cross_entropy(types, true_types, known),
            "types_dice": dice(types, true_types, known),
            "types_focal_tversky": focal_tversky(self._for_tversky(types), true_types, known, per_channel=True),
        }
        if "tissue" in output and "tissue" in target:
            known_tissue = target["tissue"] >= 0
            of_each = functional.cross_entropy(output["tissue"], target["tissue"], reduction="none")
            parts["tissue"] = (of_each * known_tissue).sum() / known_tissue.sum().clamp(min=1)
        return parts

    def _for_tversky(self, probability: Tensor) -> Tensor:
        return probability.softmax(1) if self.double_softmax else probability


def _ones(maps: Tensor) -> Tensor:
    return torch.ones_like(maps[:, :1])


def one_hot(labels: Tensor, channels: int) -> Tensor:
    """(B, H, W) labels as (B, channels, H, W) float32 of 0 and 1; labels that are no channel are 0 in all."""
    return (labels[:, None] == torch.arange(channels, device=labels.device)[:, None, None]).float()
