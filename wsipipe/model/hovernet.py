"""HoVer-Net: a pre-activation ResNet-50 and three dense decoder branches without padding.

Graham et al. 2019, doi:10.1016/j.media.2019.101563 (vqdang/hover_net). Tensors carry the names of the published files,
slashes and all, so that there is nothing to translate. One difference: RGB comes in [0, 1] here, where the published
network divides by 255 itself.
"""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Mode = Literal["fast", "original"]
# Pixels that cropping takes from the features at 1/1 and 1/2 before they join a branch.
CROPPED = {"fast": (92, 36), "original": (184, 72)}
NAMES = {"tp": "types", "np": "nuclei", "hv": "offsets"}  # theirs, ours


class SamePad(nn.Module):
    """Zeros as TensorFlow puts them: with stride 2 on even sides all at the bottom and the right."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, image: Tensor) -> Tensor:
        over = image.shape[2] % self.stride
        total = max(self.kernel - (over or self.stride), 0)
        front = total // 2
        return functional.pad(image, (front, total - front, front, total - front))


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)


def _activation(prefix: str, channels: int) -> list[tuple[str, nn.Module]]:
    return [(f"{prefix}bn", nn.BatchNorm2d(channels)), (f"{prefix}relu", nn.ReLU(inplace=True))]


class ResidualBlock(nn.Module):
    """Bottlenecks whose first does without activation before it: its input has been activated already."""

    def __init__(self, inputs: int, width: int, units: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.units = nn.ModuleList()
        for unit in range(units):
            step = stride if unit == 0 else 1
            self.units.append(
                nn.Sequential(
                    OrderedDict(
                        [
                            *(_activation("preact/", outputs) if unit else []),
                            ("conv1", _conv(outputs if unit else inputs, width, 1)),
                            *_activation("conv1/", width),
                            ("conv2/pad", SamePad(3, step)),
                            ("conv2", _conv(width, width, 3, stride=step)),
                            *_activation("conv2/", width),
                            ("conv3", _conv(width, outputs, 1)),
                        ]
                    )
                )
            )
        self.shortcut = _conv(inputs, outputs, 1, stride=stride)
        self.blk_bna = nn.Sequential(OrderedDict(_activation("", outputs)))

    def forward(self, image: Tensor) -> Tensor:
        x = self.units[0](image) + self.shortcut(image)
        for unit in self.units[1:]:
            x = unit(x) + x
        out: Tensor = self.blk_bna(x)
        return out


class DenseBlock(nn.Module):
    """Units of `growth` new channels each; every one shrinks the image by its kernel less one."""

    def __init__(self, inputs: int, units: int, kernel: int, growth: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    [
                        *_activation("preact_bna/", inputs + growth * unit),
                        ("conv1", _conv(inputs + growth * unit, 4 * growth, 1)),
                        *_activation("conv1/", 4 * growth),
                        ("conv2", _conv(4 * growth, growth, kernel, groups=4)),
                    ]
                )
            )
            for unit in range(units)
        )
        self.blk_bna = nn.Sequential(OrderedDict(_activation("", inputs + growth * units)))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            new = unit(x)
            x = torch.cat((_cropped(x, x.shape[2] - new.shape[2]), new), dim=1)
        out: Tensor = self.blk_bna(x)
        return out


class Branch(nn.Module):
    """From 1/8 up to full resolution, adding features of the encoder on the way."""

    def __init__(self, width: int, outputs: int, kernel: int) -> None:
        super().__init__()
        growth = width // 2

        def stage(inputs: int, first: int, units: int) -> nn.Sequential:
            grown = first + growth * units
            conva = _conv(inputs, first, kernel)
            dense = DenseBlock(first, units, kernel, growth)
            return nn.Sequential(OrderedDict([("conva", conva), ("dense", dense), ("convf", _conv(grown, grown, 1))]))

        self.u3, self.u2 = stage(16 * width, 4 * width, 8), stage(8 * width, 2 * width, 4)
        conva = _conv(4 * width, width, kernel)
        self.u1 = nn.Sequential(OrderedDict([("conva/pad", SamePad(kernel, 1)), ("conva", conva)]))
        self.u0 = nn.Sequential(OrderedDict([*_activation("", width), ("conv", nn.Conv2d(width, outputs, 1))]))

    def forward(self, d0: Tensor, d1: Tensor, d2: Tensor, bottom: Tensor) -> Tensor:
        x = self.u3(_doubled(bottom) + d2)
        x = self.u2(_doubled(x) + d1)
        out: Tensor = self.u0(self.u1(_doubled(x) + d0))
        return out


class HoverNet(nn.Module):
    """The whole network.

    Forward takes (B, 3, S, S') RGB in [0, 1], normalised no further, and answers its middle: 46 px less on each side in
    mode "fast", 95 in "original". `nuclei` (B, 2, ...) logits, `offsets` (B, 2, ...), and unless there is but one class
    `types` (B, `classes`, ...) logits.

    Raises
    ------
    ValueError
        If a side is no multiple of 8 (original: no multiple of 8 and 6), or too small for an answer.
    """

    def __init__(self, *, classes: int, mode: Mode = "fast", width: int = 64) -> None:
        super().__init__()
        if mode not in CROPPED:
            raise ValueError(f"mode must be 'fast' or 'original', not {mode!r}")
        if width % 8:
            raise ValueError(f"the width must be a multiple of 8, not {width}")
        self.mode = mode
        kernel = 3 if mode == "fast" else 5
        first = nn.Conv2d(3, width, 7, padding=3 if mode == "fast" else 0, bias=False)
        self.conv0 = nn.Sequential(OrderedDict([("/", first), *_activation("", width)]))
        self.d0 = ResidualBlock(width, width, 3, 1)
        self.d1 = ResidualBlock(4 * width, 2 * width, 4, 2)
        self.d2 = ResidualBlock(8 * width, 4 * width, 6, 2)
        self.d3 = ResidualBlock(16 * width, 8 * width, 3, 2)
        self.conv_bot = _conv(32 * width, 16 * width, 1)
        outputs = {"tp": classes, "np": 2, "hv": 2} if classes > 1 else {"np": 2, "hv": 2}
        self.decoder = nn.ModuleDict({name: Branch(width, channels, kernel) for name, channels in outputs.items()})
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        extra, least = (0, 92) if self.mode == "fast" else (6, 190)
        if any((side - extra) % 8 or side <= least for side in image.shape[2:]):
            told = f"a multiple of 8{' and 6' if extra else ''} above {least} px"
            raise ValueError(f"height and width must be {told}, not {image.shape[2]} x {image.shape[3]}")
        at_full, at_half = CROPPED[self.mode]
        d0 = self.d0(self.conv0(image))
        d1 = self.d1(d0)
        d2 = self.d2(d1)
        bottom = self.conv_bot(self.d3(d2))
        features = (_cropped(d0, at_full), _cropped(d1, at_half), d2, bottom)
        return {NAMES[name]: branch(*features) for name, branch in self.decoder.items()}


def _cropped(image: Tensor, pixels: int) -> Tensor:
    """The image without `pixels` rows and columns, half of them on each side."""
    front = pixels // 2
    height, width = image.shape[2:]
    return image[:, :, front : height - pixels + front, front : width - pixels + front]


def _doubled(image: Tensor) -> Tensor:
    return functional.interpolate(image, scale_factor=2, mode="nearest")
