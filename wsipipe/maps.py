"""Pixels to tensor, network output to HV, NP and NC maps: pure; the one pure module that may name torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # `Maps` is for those too that run no network
    import torch


@dataclass(frozen=True, slots=True)
class Maps:
    """What the network says of a region, as stored: 8 bits a value.

    Attributes
    ----------
    nuclei : (H, W) uint8
        NP map: probability of nucleus, round(255 p).
    offsets : (2, H, W) int8
        HV map: horizontal, then vertical offset from the nucleus's centre, round(127 v).
    types : (K, H, W) uint8
        NC map: probability of each type, round(255 p); 0 is background.
    """

    nuclei: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int8]
    types: npt.NDArray[np.uint8]


class NetworkMaps(NamedTuple):
    """Maps of a batch on the device: (B, H, W) uint8, (B, 2, H, W) int8, (B, K, H, W) uint8; `finite` (B,) bool."""

    nuclei: "torch.Tensor"
    offsets: "torch.Tensor"
    types: "torch.Tensor"
    finite: "torch.Tensor"  # False where the network gave no number, so that the maps mean nothing


def to_input(
    batch: "torch.Tensor",
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    device: "torch.device",
    dtype: "torch.dtype",
) -> "torch.Tensor":
    """What the network takes: normalised, on its device, channels last in memory.

    Parameters
    ----------
    batch : (B, H, W, 3) uint8
        RGB. It travels to the device as it is, a quarter of the bytes of float32.
    mean, std : three floats
        Of RGB in [0, 1].

    Returns
    -------
    (B, 3, H, W) of `dtype`
    """
    shift, scale = _normalisation(mean, std, device)
    pixels = batch.to(device, non_blocking=device.type == "cuda")
    return ((pixels - shift) * scale).to(dtype).permute(0, 3, 1, 2)


def to_maps(outputs: "Mapping[str, torch.Tensor]", halo_px: int) -> NetworkMaps:
    """Quantised maps of the cores of a batch, on the device of the network's output.

    Parameters
    ----------
    outputs : dict of tensors
        "nuclei" (B, 2, H, W) logits; "offsets" (B, 2, H, W), horizontal then vertical; "types" (B, K, H, W) logits,
        or absent: then all is background, K = 1.
    halo_px : int
        Context on each side, not part of the answer.

    Notes
    -----
    Offsets beyond [-1, 1] have no meaning (no pixel lies farther out than its nucleus) and are cut.
    """
    import torch

    def core(name: str) -> torch.Tensor:
        values = outputs[name]
        height, width = values.shape[-2:]
        values = values[..., halo_px : height - halo_px, halo_px : width - halo_px]
        return values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # channel by channel

    against, towards = core("nuclei").unbind(1)
    nuclei = (towards - against).sigmoid_()
    offsets = core("offsets").clamp_(-1, 1)
    types = core("types").softmax(1) if "types" in outputs else torch.ones_like(nuclei)[:, None]
    # A sum is a number if all its terms are: all lie within [-1, 1].
    finite = torch.stack([values.flatten(1).sum(1).isfinite() for values in (nuclei, offsets, types)]).all(0)
    return NetworkMaps(
        nuclei.mul_(255).round_().to(torch.uint8),
        offsets.mul_(127).round_().to(torch.int8),
        types.mul_(255).round_().to(torch.uint8),
        finite,
    )


@lru_cache(maxsize=8)
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], device: "torch.device"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Shift and scale that take RGB of 0 to 255 to what the network expects; uploaded once."""
    import torch

    shift = torch.tensor(mean, dtype=torch.float32, device=device) * 255
    return shift, 1 / (torch.tensor(std, dtype=torch.float32, device=device) * 255)
