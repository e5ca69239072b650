"""From the images of a test set to nuclei, in the ways that the published figures were made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from wsipipe.errors import ConfigError
from wsipipe.metrics import majority_types
from wsipipe.model.spec import ModelSpec
from wsipipe.training.found import nuclei_of
from wsipipe.training.merging import cells_of, merge_cells, paint_cells
from wsipipe.training.scores import TypedNuclei

Array = npt.NDArray[Any]
IMAGE_PX, ENLARGED_PX, WINDOW_PX, STRIDE_PX, MARGIN_PX = 256, 480, 256, 224, 32
WINDOWS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column)
MPP_20X, MPP_40X = 0.5, 0.25  # what a slide at 20x, at 40x is taken to have

# (network, its spec, images (B, H, W, 3) uint8, device) -> nuclei of each image, on its own pixels
Finder = Callable[[nn.Module, ModelSpec, Array, torch.device], list[TypedNuclei]]


def find_whole(network: nn.Module, spec: ModelSpec, images: Array, device: torch.device) -> list[TypedNuclei]:
    """Nuclei of images that the network sees whole, as they are (protocol "pannuke")."""
    return nuclei_of(_output(network, spec, _input(images, spec, device)), spec)


def find_enlarged(
    network: nn.Module, spec: ModelSpec, images: Array, device: torch.device, *, corrected: bool = False
) -> list[TypedNuclei]:
    """Nuclei of 20x images that a network for 40x sees enlarged, in four windows (protocol "conic").

    `corrected` keeps the first nucleus of an image, which the published way loses.

    Raises
    ------
    ConfigError
        If images are not of 256 x 256 px, as those of CoNIC: others would be distorted.
    """
    height, width = images.shape[1:3]
    if (height, width) != (IMAGE_PX, IMAGE_PX):
        raise ConfigError(
            f"protocols conic and conic-corrected are for images of {IMAGE_PX} x {IMAGE_PX} px, not of {width} x "
            f"{height} px; use --protocol segment or pannuke"
        )
    found = []
    for image in _input(images, spec, device):
        tiles = nuclei_of(_output(network, spec, enlarged_windows(image[None])), spec, MPP_40X)
        found.append(merged_nuclei(tiles, images.shape[1:3], corrected=corrected))
    return found


def enlarged_windows(image: Tensor) -> Tensor:
    """(1, C, H, W) enlarged to 480 px, as the four windows (4, C, 256, 256) of `WINDOWS`."""
    larger = functional.interpolate(image, (ENLARGED_PX, ENLARGED_PX), mode="bilinear", align_corners=False)
    windows = larger.unfold(2, WINDOW_PX, STRIDE_PX).unfold(3, WINDOW_PX, STRIDE_PX)
    return windows[0].flatten(1, 2).movedim(1, 0)


def merged_nuclei(tiles: Sequence[TypedNuclei], shape: tuple[int, ...], *, corrected: bool) -> TypedNuclei:
    """The nuclei of the four windows, merged and brought back to an image of `shape` (H, W)."""
    cells = [
        cell
        for nuclei, (row, column) in zip(tiles, WINDOWS, strict=True)
        for cell in cells_of(
            nuclei.instance_map, nuclei.types, (row, column), (STRIDE_PX * column, STRIDE_PX * row), MARGIN_PX
        )
    ]
    kept = [cells[number] for number in merge_cells(cells)]
    instances, types = paint_cells(kept, (shape[0], shape[1]), shape[0] / ENLARGED_PX, first=int(corrected))
    return TypedNuclei(instances, majority_types(instances, types))


def _input(images: Array, spec: ModelSpec, device: torch.device) -> Tensor:
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
    return (pixels.float() / 255 - mean) / std


@torch.inference_mode()
def _output(network: nn.Module, spec: ModelSpec, image: Tensor) -> dict[str, Tensor]:
    """What the network answers to all of (B, C, H, W); a margin that it needs is the image mirrored."""
    height, width = image.shape[2:]
    if spec.margin_px:
        (more_y, more_x), before = (_missing(side, spec) for side in (height, width)), spec.margin_px
        if max(more_y, more_x) - before >= min(height, width):
            raise ConfigError(f"images of {width} x {height} px are too small for {spec.name}; use --protocol segment")
        image = functional.pad(image, (before, more_x - before, before, more_y - before), mode="reflect")
    elif _missing(height, spec) or _missing(width, spec):
        raise ConfigError(f"{spec.name} takes no images of {width} x {height} px whole; use --protocol segment")
    output: dict[str, Tensor] = network.eval()(image.contiguous(memory_format=torch.channels_last))
    if spec.answer == "maps":
        output = {name: maps[..., :height, :width] if maps.ndim == 4 else maps for name, maps in output.items()}
        needed = {"nuclei", "offsets", "types"} if len(spec.class_names) > 1 else {"nuclei", "offsets"}
        if not needed <= output.keys() or output["nuclei"].shape[2:] != (height, width):
            raise ConfigError("this network does not answer with maps of its whole input; use --protocol segment")
    return output


def _missing(side: int, spec: ModelSpec) -> int:
    """By how many px more than a side the network is to be shown, to answer for all of it."""
    step, offset = spec.tile_step
    least = side + 2 * spec.margin_px
    return least + (offset - least) % step - side


def batched(images: Array, numbers: Iterable[int], size: int) -> Iterator[tuple[list[int], Array]]:
    """Images of a set, `size` at a time, with their numbers."""
    numbers = list(numbers)
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        yield part, np.stack([images[number] for number in part])
