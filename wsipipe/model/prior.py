"""What a CNN that has seen a million photographs adds to the convolutions of the adapter.

CellVTA's adapter learns its convolutions from nothing, and leaves it to a foundation model to know what edges, blobs
and textures are. Where the ViT is small and untaught, a small taught CNN gives that for a fraction of the arithmetic.
"""

from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import functional

# timm's name of a CNN, and what differs there from how its weights were trained. Names come with files from elsewhere.
CNNS: dict[str, dict[str, Any]] = {
    "efficientnet_lite0": {"bn_eps": 1e-3},  # Tan and Le 2019, arXiv 1905.11946; weights Apache-2.0
}


class TaughtPrior(nn.Module):
    """A CNN on the pixels of an image: additions to the adapter's features at 1/2, 1/4 and 1/8.

    A 1x1 convolution takes each of its levels to the width of the adapter's. These start at 0, so that a network to
    which a prior is given answers as it did, until it learns to use it.

    Parameters
    ----------
    name : str
        Key of `CNNS`.
    widths : three ints
        Channels of what is added to, from fine to coarse.
    cell_px : int
        The adapter sees cells of so many pixels a side, and 1/2 means of these.

    Attributes
    ----------
    blocks : list of int
        How many there are in each stage of the CNN, the stages counted that are not used here.
    """

    def __init__(self, name: str, widths: tuple[int, int, int], cell_px: int = 1) -> None:
        super().__init__()
        if name not in CNNS:
            raise ValueError(f"'{name}' is no CNN for a prior; there are: {', '.join(CNNS)}")
        self.name, self.cell_px = name, cell_px
        whole: Any = timm.create_model(name, pretrained=False, features_only=True)
        levels = whole.feature_info.reduction()
        wanted = [cell_px * factor for factor in (2, 4, 8)]
        if not set(wanted) <= set(levels):
            raise ValueError(f"{name} has levels at 1/{', 1/'.join(map(str, levels))}, not at all of {wanted}")
        self.blocks = [len(stage) for stage in whole.blocks]
        places = [levels.index(factor) for factor in wanted]
        cnn: Any = timm.create_model(name, pretrained=False, features_only=True, out_indices=places, **CNNS[name])
        last = cnn.feature_info.module_name()[-1]  # "blocks.4"
        del cnn.blocks[int(last.split(".")[1]) + 1 :]
        self.cnn: nn.Module = cnn
        adds = [nn.Conv2d(a, b, 1) for a, b in zip(cnn.feature_info.channels(), widths, strict=True)]
        self.adds = nn.ModuleList(adds)
        for weight in self.adds.parameters():
            nn.init.zeros_(weight)

    def forward(self, cells: Tensor) -> list[Tensor]:
        """(B, 3 `cell_px`², H, W) to what is added, from fine to coarse."""
        pixels = functional.pixel_shuffle(cells, self.cell_px) if self.cell_px > 1 else cells
        return [add(level) for add, level in zip(self.adds, self.cnn(pixels), strict=True)]
