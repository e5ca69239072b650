"""CISCNet: a U-Net that draws a distance map for each type (CoNIC challenge 2022).

Team-ciscNet/ciscNet-CoNIC-Challenge-2022, the released configuration. Tensors carry the names of the published files.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


def _conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, activation, norm, in this order, twice."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.Mish(), nn.GroupNorm(8, outputs)]
    return nn.Sequential(*layers)


class _Convs(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _conv_block(inputs, outputs)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.conv(image)
        return out


class _Pool(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv_pool = nn.Sequential(conv, nn.Mish(), nn.GroupNorm(8, channels))

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.conv_pool(image)
        return out


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 2, stride=2))
        self.norm = nn.GroupNorm(8, outputs)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.norm(self.up(image))
        return out


class CISCNet(nn.Module):
    """The whole network.

    Forward takes (B, 3, H, W) RGB in [-1, 1], sides multiples of 16, and gives `distances` (B, `classes`, H, W): how
    deep a pixel lies in its nucleus, 0 outside to 1, over all types and then for each.
    """

    def __init__(self, *, classes: int, widths: tuple[int, ...] = (64, 128, 256, 512, 1024)) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError("CISCNet tells types apart; it needs one beside the background")
        self.encoderConv = nn.ModuleList(_Convs(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.pooling = nn.ModuleList(_Pool(width) for width in widths[:-1])
        down = widths[::-1]
        self.decoderUpconv = nn.ModuleList(_Up(a, b) for a, b in pairwise(down))
        self.decoderConv = nn.ModuleList(_Convs(2 * b, b) for b in down[1:])
        self.decoderConv.append(nn.Conv2d(widths[0], classes - 1, 1))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        multiple = 2 ** len(self.pooling)
        if any(side % multiple for side in image.shape[2:]):
            raise ValueError(f"height and width must be multiples of {multiple} px, not {tuple(image.shape[2:])}")
        x, skips = image, []
        for conv, pool in zip(self.encoderConv, self.pooling, strict=False):
            skips.append(conv(x))
            x = pool(skips[-1])
        x = self.encoderConv[-1](x)
        for up, conv, skip in zip(self.decoderUpconv, self.decoderConv, reversed(skips), strict=False):
            x = conv(torch.cat((up(x), skip), dim=1))
        types = self.decoderConv[-1](x)
        return {"distances": torch.cat((types.sum(1, keepdim=True), types), dim=1)}
