"""The CNN adapter beside a ViT: fine detail in, multi-scale features out.

Chen et al. 2023, ViT-Adapter, arXiv 2205.08534, as CellVTA has it (arXiv 2504.00784; JieZheng-ShanghaiTech/CellVTA
d323bc3): the pyramid starts at half resolution and ends at 1/16, and BatchNorm is not synchronised.
"""

import math

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from wsipipe.model.attention import DeformableAttention, Size

LAYER_NORM_EPS = 1e-6


def _conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class SpatialPrior(nn.Module):
    """Plain convolutions from (B, `channels`, H, W) to features at 1/2, and to D channels at 1/4, 1/8 and 1/16.

    `fc1`, which takes the first to D channels too, is left to the caller: it is linear, and so may be put together
    with what comes after.
    """

    def __init__(self, width: int, dim: int, channels: int = 3) -> None:
        super().__init__()
        p = width
        # The last stem convolution is linear: neither normalised nor rectified, as published.
        last = nn.Conv2d(p, p, 3, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(*_conv_bn_relu(channels, p), *_conv_bn_relu(p, p), *_conv_bn_relu(p, p), last)
        self.conv2 = nn.Sequential(*_conv_bn_relu(p, p), *_conv_bn_relu(p, 2 * p, 2))
        self.conv3 = nn.Sequential(*_conv_bn_relu(2 * p, 2 * p), *_conv_bn_relu(2 * p, 4 * p, 2))
        self.conv4 = nn.Sequential(*_conv_bn_relu(4 * p, 4 * p), *_conv_bn_relu(4 * p, 4 * p, 2))
        self.fc1 = nn.Conv2d(p, dim, 1)
        self.fc2 = nn.Conv2d(2 * p, dim, 1)
        self.fc3 = nn.Conv2d(4 * p, dim, 1)
        self.fc4 = nn.Conv2d(4 * p, dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = self.stem(image)
        quarter = self.conv2(half)
        eighth = self.conv3(quarter)
        sixteenth = self.conv4(eighth)
        return half, self.fc2(quarter), self.fc3(eighth), self.fc4(sixteenth)


class Injector(nn.Module):
    """Adds what the ViT's tokens read from the pyramid: x + gamma * attention(x, c)."""

    def __init__(self, dim: int, heads: int, points: int, ratio: float, gamma: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = DeformableAttention(dim, heads, levels=3, points=points, ratio=ratio)
        self.gamma = nn.Parameter(gamma * torch.ones(dim))

    def forward(self, tokens: Tensor, grid: Size, pyramid: Tensor, sizes: tuple[Size, ...]) -> Tensor:
        read: Tensor = self.attn(self.query_norm(tokens), (grid,), self.feat_norm(pyramid), sizes)
        return tokens + self.gamma * read


class ConvFFN(nn.Module):
    """Feed-forward with a depthwise convolution, run over each level of the pyramid by itself."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, sizes: tuple[Size, ...]) -> Tensor:
        hidden = self.fc1(tokens)
        levels = [
            self.dwconv(to_image(level, size)).flatten(2).transpose(1, 2)
            for level, size in zip(hidden.split([h * w for h, w in sizes], dim=1), sizes, strict=True)
        ]
        out: Tensor = self.fc2(self.act(torch.cat(levels, dim=1)))
        return out


class Extractor(nn.Module):
    """The pyramid reads the ViT's tokens, then each of its levels mixes locally."""

    def __init__(self, dim: int, heads: int, points: int, ratio: float, ffn_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = DeformableAttention(dim, heads, levels=1, points=points, ratio=ratio)
        self.ffn = ConvFFN(dim, int(dim * ffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.drop_path = DropPath(drop_path)

    def forward(self, pyramid: Tensor, sizes: tuple[Size, ...], tokens: Tensor, grid: Size) -> Tensor:
        pyramid = pyramid + self.attn(self.query_norm(pyramid), sizes, self.feat_norm(tokens), (grid,))
        out: Tensor = pyramid + self.drop_path(self.ffn(self.ffn_norm(pyramid), sizes))
        return out


class Interaction(nn.Module):
    """One stage: inject, run a range of ViT blocks, extract (several times in the last stage)."""

    def __init__(self, injector: Injector, extractor: Extractor, extra_extractors: list[Extractor]) -> None:
        super().__init__()
        self.injector = injector
        self.extractor = extractor
        self.extra_extractors = nn.ModuleList(extra_extractors)

    def extract(self, pyramid: Tensor, sizes: tuple[Size, ...], tokens: Tensor, grid: Size) -> Tensor:
        for extractor in (self.extractor, *self.extra_extractors):
            pyramid = extractor(pyramid, sizes, tokens, grid)
        return pyramid


def to_image(tokens: Tensor, size: Size) -> Tensor:
    """(B, H W, D) row-major tokens as a (B, D, H, W) image."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *size)


def init_adapter(module: nn.Module, *, attention_ring: bool = False) -> None:
    """The effective initialisation of the published training, which covers the deformable attention's layers too.

    With `attention_ring` these start as Deformable DETR has them instead.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
            nn.init.normal_(part.weight, 0.0, math.sqrt(2.0 / fan_out))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if attention_ring:
        for part in module.modules():
            if isinstance(part, DeformableAttention):
                part.reset_as_published_for_detection()
