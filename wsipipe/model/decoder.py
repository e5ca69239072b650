"""The HoVer-Net style decoder: one branch each for the NP, HV and NC maps over shared skip features.

Graham et al. 2019, HoVer-Net, doi:10.1016/j.media.2019.101563, in the form of CellViT and CellVTA.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Pyramid = tuple[Tensor, Tensor, Tensor, Tensor]  # D channels at 1/2, 1/4, 1/8, 1/16
Source = Literal["pyramid", "grid"]
Widths = tuple[int, int, int, int]  # channels at 1, 1/2, 1/4, 1/8


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def upsample(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)


def raising_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(upsample(inputs, outputs), *conv_block(outputs, outputs))


class Skips(nn.Module):
    """Features that the three branches share: from the image itself, and from the encoder at 1/2, 1/4, 1/8.

    The encoder gives them at these sizes (`source` "pyramid"), or all at 1/16 ("grid"): then they are raised here,
    through the widths `raised`.
    """

    def __init__(self, dim: int, widths: Widths, source: Source, raised: tuple[int, int], channels: int) -> None:
        super().__init__()
        w0, w1, w2, w3 = widths
        self.level0 = nn.Sequential(conv_block(channels, w0 // 2), conv_block(w0 // 2, w0))
        if source == "pyramid":
            self.level1 = nn.Sequential(conv_block(dim, w1), conv_block(w1, w1))
            self.level2 = nn.Sequential(conv_block(dim, w2), conv_block(w2, w2))
            self.level3 = nn.Sequential(conv_block(dim, w3), conv_block(w3, w3))
        else:
            r0, r1 = raised
            self.level1 = nn.Sequential(raising_block(dim, r0), raising_block(r0, r1), raising_block(r1, w1))
            self.level2 = nn.Sequential(raising_block(dim, r0), raising_block(r0, w2))
            self.level3 = nn.Sequential(raising_block(dim, w3))

    def forward(self, image: Tensor, features: Pyramid) -> Pyramid:
        return self.level0(image), self.level1(features[0]), self.level2(features[1]), self.level3(features[2])


class Branch(nn.Module):
    """From the coarsest level up to the image's resolution; a skip goes before what comes from below."""

    def __init__(self, dim: int, widths: Widths, outputs: int, source: Source) -> None:
        super().__init__()
        w0, w1, w2, w3 = widths
        self.up4 = raising_block(dim, w3) if source == "pyramid" else upsample(dim, w3)
        self.up3 = nn.Sequential(conv_block(2 * w3, w3), conv_block(w3, w3), conv_block(w3, w3), upsample(w3, w2))
        self.up2 = nn.Sequential(conv_block(2 * w2, w2), conv_block(w2, w2), upsample(w2, w1))
        self.up1 = nn.Sequential(conv_block(2 * w1, w1), conv_block(w1, w1), upsample(w1, w0))
        self.head = nn.Sequential(conv_block(2 * w0, w0), conv_block(w0, w0), nn.Conv2d(w0, outputs, 1))

    def forward(self, skips: Pyramid, coarsest: Tensor) -> Tensor:
        x = self.up4(coarsest)
        x = self.up3(torch.cat((skips[3], x), dim=1))
        x = self.up2(torch.cat((skips[2], x), dim=1))
        x = self.up1(torch.cat((skips[1], x), dim=1))
        out: Tensor = self.head(torch.cat((skips[0], x), dim=1))
        return out


class Decoder(nn.Module):
    """Skip features once, then the branches `nuclei` (2 channels), `offsets` (2) and `types` (one a class).

    If what it is shown are cells of `cell_px` px a side, a branch gives a value for every pixel of a cell.
    """

    def __init__(
        self,
        dim: int,
        widths: Widths,
        classes: int,
        source: Source = "pyramid",
        raised: tuple[int, int] = (512, 256),
        cell_px: int = 1,
    ) -> None:
        super().__init__()
        self.skips = Skips(dim, widths, source, raised, 3 * cell_px**2)
        outputs = {"nuclei": 2, "offsets": 2, "types": classes}
        self.branches = nn.ModuleDict(
            {name: Branch(dim, widths, n * cell_px**2, source) for name, n in outputs.items()}
        )

    def forward(self, image: Tensor, features: Pyramid) -> dict[str, Tensor]:
        skips = self.skips(image, features)
        return {name: branch(skips, features[3]) for name, branch in self.branches.items()}
