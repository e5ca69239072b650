"""PointNu-Net: for every cell of a grid, whether a nucleus is centred there and the kernel that paints its mask.

Yao et al. 2023, doi:10.1109/TETCI.2023.3281864 (Kaiseem/PointNu-Net), on HRNet (Wang et al. 2019, arXiv 1908.07919).
Tensors carry the names of the published files.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


def _conv_bn_relu(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1, *, relu: bool = True
) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else [])]


def _resized(image: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(image, like.shape[2:], mode="bilinear", align_corners=True)


class _Block(nn.Module):
    """Two 3x3 convolutions ("basic"), or 1x1, 3x3 and 1x1 to four times the width ("bottleneck")."""

    def __init__(self, inputs: int, width: int, *, bottleneck: bool = False) -> None:
        super().__init__()
        shapes = [(inputs, width, 1), (width, width, 3), (width, 4 * width, 1)]
        if not bottleneck:
            shapes = [(inputs, width, 3), (width, width, 3)]
        for number, (a, b, kernel) in enumerate(shapes, 1):
            conv, norm = _conv_bn_relu(a, b, kernel, relu=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", norm)
        self.convs = len(shapes)
        outputs = shapes[-1][1]
        self.downsample = nn.Sequential(*_conv_bn_relu(inputs, outputs, 1, relu=False)) if inputs != outputs else None

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for number in range(1, self.convs + 1):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))
            if number < self.convs:
                x = x.relu_()
        return (x + (image if self.downsample is None else self.downsample(image))).relu_()


class _HighResolutionModule(nn.Module):
    """Branches of basic blocks, one a resolution; then each resolution becomes the sum of all."""

    def __init__(self, widths: list[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(_Block(width, width) for _ in range(blocks))) for width in widths)
        places = range(len(widths))
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._fusing(widths, to, source) for source in places) for to in places
        )

    @staticmethod
    def _fusing(widths: list[int], to: int, source: int) -> nn.Module:
        if to == source:
            return nn.Identity()
        if source > to:
            return nn.Sequential(*_conv_bn_relu(widths[source], widths[to], 1, relu=False))
        steps = []
        for step in range(source, to):
            last = step == to - 1
            outputs = widths[to] if last else widths[source]
            steps.append(nn.Sequential(*_conv_bn_relu(widths[source], outputs, stride=2, relu=not last)))
        return nn.Sequential(*steps)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        images = [branch(image) for branch, image in zip(self.branches, images, strict=True)]
        fused = []
        for to, layers in enumerate(self.fuse_layers):
            total: Tensor | None = None
            for source, (layer, image) in enumerate(zip(cast(nn.ModuleList, layers), images, strict=True)):
                part = layer(image)
                part = _resized(part, images[to]) if source > to else part
                total = part if total is None else total + part
            assert total is not None
            fused.append(total.relu())
        return fused


class HighResolutionNet(nn.Module):
    """HRNet: (B, 3, H, W) to features at 1/4, 1/8, 1/16 and 1/32."""

    def __init__(self, width: int, bottlenecks: int, modules: tuple[int, int, int], blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1, _ = _conv_bn_relu(3, 64, stride=2)
        self.conv2, self.bn2, _ = _conv_bn_relu(64, 64, stride=2)
        layers = (_Block(64 if number == 0 else 256, 64, bottleneck=True) for number in range(bottlenecks))
        self.layer1 = nn.Sequential(*layers)
        before = [256]
        for stage, count in enumerate(modules, 2):
            widths = [width * 2**k for k in range(stage)]
            transition = nn.ModuleList(
                nn.Sequential(*_conv_bn_relu(before[0], widths[0])) if stage == 2 and k == 0 else nn.Identity()
                for k in range(stage - 1)
            )
            transition.append(nn.Sequential(nn.Sequential(*_conv_bn_relu(before[-1], widths[-1], stride=2))))
            self.add_module(f"transition{stage - 1}", transition)
            parts = (_HighResolutionModule(widths, blocks) for _ in range(count))
            self.add_module(f"stage{stage}", nn.ModuleList(parts))
            before = widths
        # Of the files, but not of the network: nothing reads it.
        self.last_layer = nn.Sequential(nn.Conv2d(15 * width, 15 * width, 1), nn.BatchNorm2d(15 * width))

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.bn1(self.conv1(image)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        images = [self.layer1(x)]
        for stage in (2, 3, 4):
            transition = self.get_submodule(f"transition{stage - 1}")
            kept = [step(each) for step, each in zip(transition, images, strict=False)]  # type: ignore[call-overload]
            images = [*kept, transition[-1](images[-1])]  # type: ignore[index]
            for module in self.get_submodule(f"stage{stage}"):  # type: ignore[attr-defined]
                images = module(images)
        return images


class _Pyramid(nn.Module):
    """Joint pyramid fusion: convolutions of four dilations side by side."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        for number in range(4):
            layers = _conv_bn_relu(inputs, width, dilation=2**number)
            self.add_module(f"dilation{number + 1}", nn.Sequential(*layers))

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(f"dilation{number}")(image) for number in range(1, 5)], dim=1)


class _Heads(nn.Module):
    def __init__(self, inputs: int, width: int, kernels: int, depth: int, types: int) -> None:
        super().__init__()

        def raising() -> nn.Sequential:
            up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False)
            return nn.Sequential(up, nn.BatchNorm2d(width), nn.ReLU(inplace=True), *_conv_bn_relu(width, width))

        first = nn.Sequential(*_conv_bn_relu(inputs, width), *_conv_bn_relu(width, width))
        self.mask_convs = nn.ModuleList([first, raising(), raising()])
        self.head_mask = nn.Sequential(*_conv_bn_relu(width, kernels, 1))
        of_kernels = [inputs + 2, *[width] * depth]
        of_types = [inputs, *[width] * depth]
        self.kernel_convs = nn.ModuleList(nn.Sequential(*_conv_bn_relu(a, b)) for a, b in pairwise(of_kernels))
        self.head_kernel = nn.Conv2d(width, kernels, 1)
        self.cate_convs = nn.ModuleList(nn.Sequential(*_conv_bn_relu(a, b)) for a, b in pairwise(of_types))
        self.head_cate = nn.Conv2d(width, types, 3, padding=1)
        nn.init.normal_(self.head_cate.weight, std=0.01)
        nn.init.constant_(
            cast(Tensor, self.head_cate.bias), -4.595
        )  # log(1/99): one cell of a hundred, before anything is learned

    def forward(self, of_mask: Tensor, of_kernel: Tensor, of_type: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for convs in self.mask_convs:
            of_mask = convs(of_mask)
        height, width = of_kernel.shape[2:]
        y = torch.linspace(-1, 1, height, device=of_kernel.device, dtype=of_kernel.dtype)
        x = torch.linspace(-1, 1, width, device=of_kernel.device, dtype=of_kernel.dtype)
        places = torch.stack(torch.broadcast_tensors(y[:, None], x[None])).expand(len(of_kernel), -1, -1, -1)
        of_kernel = torch.cat((places, of_kernel), dim=1)
        for convs in self.kernel_convs:
            of_kernel = convs(of_kernel)
        for convs in self.cate_convs:
            of_type = convs(of_type)
        return self.head_mask(of_mask), self.head_kernel(of_kernel), self.head_cate(of_type)


class PointNuNet(nn.Module):
    """The whole network.

    Parameters
    ----------
    width, bottlenecks, modules, blocks
        Of HRNet: channels at the finest resolution, blocks of its first layer, modules of its three stages, blocks a
        branch.
    head_width, head_depth : int
        Channels of the heads, convolutions in those of kernels and types.
    pyramid_width : int
        Channels of each dilation before the heads.

    Notes
    -----
    Forward takes (B, 3, H, W) normalised RGB, sides multiples of 32, and gives `feature` (B, F, H, W), `kernel`
    (B, F, H/4, W/4) and `category` (B, `classes` - 1, H/4, W/4) logits. The mask of a cell is the product of its kernel
    with the features, as logits.
    """

    def __init__(
        self,
        *,
        classes: int,
        width: int = 64,
        bottlenecks: int = 4,
        modules: tuple[int, int, int] = (1, 4, 3),
        blocks: int = 4,
        head_width: int = 256,
        head_depth: int = 7,
        pyramid_width: int = 256,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError("PointNu-Net tells types apart; it needs one beside the background")
        self.pretrained = HighResolutionNet(width, bottlenecks, modules, blocks)
        self.jpfm_1, self.jpfm_2, self.jpfm_3 = (_Pyramid(15 * width, pyramid_width) for _ in range(3))
        self.heads = _Heads(4 * pyramid_width, head_width, head_width, head_depth, classes - 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        if any(side % 32 for side in image.shape[2:]):
            raise ValueError(f"height and width must be multiples of 32 px, not {tuple(image.shape[2:])}")
        images = self.pretrained(image)
        joined = torch.cat([images[0], *(_resized(each, images[0]) for each in images[1:])], dim=1)
        feature, kernel, category = self.heads(self.jpfm_1(joined), self.jpfm_2(joined), self.jpfm_3(joined))
        return {"feature": feature, "kernel": kernel, "category": category}
