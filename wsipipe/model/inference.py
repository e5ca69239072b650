"""The same answers sooner: a network rewritten for running alone, never for training.

All of it is algebra on what is linear, nothing is approximated. Norms go into the convolutions before or after them. A
2x2 transposed convolution and the 3x3 convolution after it are one 4x4 transposed convolution. In CellVTA the pyramid
itself is never made: its sums, the bilinear enlargements of the ViT's tokens and its norms are linear, and only ever
read by 3x3 convolutions to far fewer channels, so these are applied to the parts, at the parts' own resolution.

Zero padding makes a constant that is added before a convolution show at the border of the image: `_Border`.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from wsipipe.model.attention import DeformableAttention
from wsipipe.model.cellvit import CellViT
from wsipipe.model.cellvta import CellVTA, to_cells, to_pixels
from wsipipe.model.decoder import Branch, Decoder
from wsipipe.model.encoder import Encoder
from wsipipe.model.prior import TaughtPrior

log = logging.getLogger(__name__)

# Values a head reads at a place. Gathering rows of 8, 24 and 64 bf16 values takes a CPU 2.9, 1.1 and 0.6 times as long
# as `grid_sample`.
GATHERED_WIDTH = 32

Conv = TypeVar("Conv", bound=nn.Conv2d | nn.ConvTranspose2d)


def prepare_for_inference(
    network: nn.Module,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    compiled: bool = False,
) -> nn.Module:
    """A network that gives what `network` gives in eval mode, in less time; `network` stays as it is.

    Tensors are shared with `network` where neither device, dtype nor algebra change them. Differences are those of
    rounding: about 1e-4 of the largest value in float32.

    Parameters
    ----------
    device, dtype
        Where it will run, and in what; weights are cast once.
    compiled : bool
        Let `torch.compile` fuse what is left. The first batch of each size then takes minutes. Where it fails, a
        warning is logged and the network runs without.
    """
    prepared = _alias(network).eval()
    with torch.no_grad():
        if isinstance(prepared, CellVTA):
            prepared = _FastCellVTA(prepared)
        elif isinstance(prepared, CellViT):
            prepared = _FastCellViT(prepared)
        for part in prepared.modules():
            if isinstance(part, nn.Sequential):
                _fold(part)
            elif isinstance(part, TaughtPrior):
                _fold_blocks(part.cnn)
    device = torch.device(device)
    for part in prepared.modules():
        if isinstance(part, Encoder):
            part.remember_positions()
        elif isinstance(part, DeformableAttention):
            # Elsewhere a sum of rows is no single kernel.
            part.gathers = device.type == "cuda" or (device.type == "cpu" and part.head_width >= GATHERED_WIDTH)
    prepared = prepared.requires_grad_(False).to(device, dtype).to(memory_format=torch.channels_last)
    return _Compiled(prepared) if compiled else prepared


class _Compiled(nn.Module):
    """The network through `torch.compile`, or without where that fails."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain
        self._fast: Callable[[Tensor], dict[str, Tensor]] | None = torch.compile(plain, dynamic=False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        if self._fast is not None:
            try:
                return self._fast(image)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - compilers fail in more ways than can be named
                reason = str(error).strip().partition("\n")[0][:200]
                log.warning("the network cannot be compiled here and runs without (%s)", reason or type(error).__name__)
                self._fast = None
        out: dict[str, Tensor] = self.plain(image)
        return out


class _FastDecoder(nn.Module):
    """Decoder without its skip features' first convolutions on a pyramid, which the caller computes.

    A branch convolves a skip and what comes from below apart, and adds up.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        branches = cast(dict[str, Branch], dict(decoder.branches.items()))
        self.names = list(branches)
        each = list(branches.values())
        raised = [isinstance(branch.up4, nn.Sequential) for branch in each]
        self.up4 = nn.ModuleList(_raised(branch.up4) if raised[0] else nn.Identity() for branch in each)
        stages = ["up3", "up2", "up1", "head"]
        below: list[list[nn.ConvTranspose2d | None]] = [
            [None if raised[0] else cast(nn.ConvTranspose2d, branch.up4) for branch in each],
            *[[getattr(branch, stage)[-1] for branch in each] for stage in stages[:3]],
        ]
        self.entries, self.inward, self.onward = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, ups in zip(stages, below, strict=True):
            skips: list[nn.Conv2d] = []
            inward: list[nn.Module] = []
            onward: list[nn.Module] = []
            for branch, up in zip(each, ups, strict=True):
                sequence = getattr(branch, stage)
                first = _fused(sequence[0][0], sequence[0][1])
                of_skip, of_below = _split(first)
                if up is None:
                    inward.append(of_below)
                    skips.append(of_skip)
                else:
                    joined = _Raise(up, of_below)
                    of_skip.bias = nn.Parameter(cast(Tensor, of_skip.bias) + joined.take_interior())
                    inward.append(joined)
                    skips.append(of_skip)
                onward.append(sequence[1:] if stage == "head" else sequence[1:-1])
            self.entries.append(nn.ModuleList(skips))
            self.inward.append(nn.ModuleList(inward))
            self.onward.append(nn.ModuleList(onward))

    def forward(self, skips: tuple[Tensor, ...], coarsest: Tensor) -> dict[str, Tensor]:
        states = [up(coarsest) for up in self.up4]
        for entries, inward, onward, skip in zip(
            cast(Any, self.entries), cast(Any, self.inward), cast(Any, self.onward), reversed(skips), strict=True
        ):
            states = [
                after(into(x).add_(entry(skip)).relu_())
                for after, into, entry, x in zip(onward, inward, entries, states, strict=True)
            ]
        return dict(zip(self.names, states, strict=True))


class _FastCellVTA(nn.Module):
    """CellVTA whose pyramid is never made."""

    def __init__(self, network: CellVTA) -> None:
        super().__init__()
        self.cell_px = network.cell_px
        encoder, skips = network.encoder, network.decoder.skips
        levels: list[Any] = [skips.level1, skips.level2, skips.level3]
        firsts = [_fused(level[0][0], level[0][1]) for level in levels]
        norms = cast(list[nn.BatchNorm2d], encoder.norms)
        self.encoder = encoder
        self.at_half = _HalfResolution(firsts[0], norms[0], encoder.up, encoder.spm.fc1)
        self.at_quarter = _Level(firsts[1], norms[1], 4)
        self.at_eighth = _Level(firsts[2], norms[2], 2)
        self.coarsest = norms[3]
        del encoder.norms, encoder.up, encoder.spm.fc1  # they live on in what they were put into
        self.level0 = skips.level0
        self.seconds = nn.ModuleList(level[1] for level in levels)
        self.decoder = _FastDecoder(network.decoder)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        cells = to_cells(image, self.cell_px)
        stem, c2, c3, c4, seen, tissue = self.encoder.features(cells)
        skips = (
            self.level0(cells),
            self.seconds[0](self.at_half(stem, c2, seen[0])),
            self.seconds[1](self.at_quarter(c2, seen[1])),
            self.seconds[2](self.at_eighth(c3, seen[2])),
        )
        outputs: dict[str, Tensor] = to_pixels(self.decoder(skips, self.coarsest(c4 + seen[3])), self.cell_px)
        return outputs if tissue is None else {**outputs, "tissue": tissue}


class _FastCellViT(nn.Module):
    """CellViT; its skip features begin at 1/16, so that there is nothing to take apart."""

    def __init__(self, network: CellViT) -> None:
        super().__init__()
        skips = network.decoder.skips
        self.encoder = network.encoder
        self.level0 = skips.level0
        levels = (skips.level1, skips.level2, skips.level3)
        self.levels = nn.ModuleList(nn.Sequential(*map(_raised, level)) for level in levels)
        self.decoder = _FastDecoder(network.decoder)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features, tissue = self.encoder(image)
        skips = (self.level0(image), *(level(x) for level, x in zip(self.levels, features[:3], strict=True)))
        outputs: dict[str, Tensor] = self.decoder(skips, features[3])
        return outputs if tissue is None else {**outputs, "tissue": tissue}


class _Border(nn.Module):
    """What a constant before a 3x3 convolution with zero padding lacks at the border.

    `taps` (C, 3, 3): what each tap makes of the constant.
    """

    def __init__(self, taps: Tensor) -> None:
        super().__init__()
        rows, columns = taps.sum(2), taps.sum(1)
        self.register_buffer("rows", -torch.stack((rows[:, 0], rows[:, 2]))[:, None, :, None])
        self.register_buffer("columns", -torch.stack((columns[:, 0], columns[:, 2]))[:, None, :, None])
        self.register_buffer("corners", taps[:, ::2, ::2].clone())

    def forward(self, image: Tensor) -> Tensor:
        """Change (B, C, H, W) in place, and give it back."""
        rows, columns, corners = cast(Tensor, self.rows), cast(Tensor, self.columns), cast(Tensor, self.corners)
        for side, place in enumerate((0, -1)):
            image[:, :, place] += rows[side]
            image[:, :, :, place] += columns[side]
        image[:, :, :: image.shape[2] - 1, :: image.shape[3] - 1] += corners
        return image


class _Raise(nn.Module):
    """A 2x2 transposed convolution of stride 2 and the 3x3 convolution after it, as one of 4x4."""

    def __init__(self, up: nn.ConvTranspose2d, conv: nn.Conv2d, scale: Tensor | None = None) -> None:
        super().__init__()
        kernel = conv.weight if scale is None else conv.weight * scale[:, None, None]
        out, inside = conv.out_channels, up.in_channels
        self.conv = nn.ConvTranspose2d(inside, out, 4, stride=2, padding=1, device=conv.weight.device)
        self.conv.weight = nn.Parameter(functional.conv2d(up.weight, kernel, padding=2))
        self.conv.bias = conv.bias
        taps = torch.einsum("m,omyx->oyx", cast(Tensor, up.bias), kernel)
        self.interior: Tensor | None = taps.sum((1, 2))
        self.border = _Border(taps)

    def take_interior(self) -> Tensor:
        """The constant inside the image together with the bias, which someone else then adds."""
        assert self.interior is not None
        constant = self.interior if self.conv.bias is None else self.interior + self.conv.bias
        self.conv.bias = self.interior = None
        return constant

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.border(self.conv(image))
        return out


class _Spread(nn.Module):
    """A 3x3 convolution of bilinearly enlarged tokens, computed where the tokens are.

    Nine 1x1 convolutions at low resolution, one a tap; then each tap's map is enlarged and shifted by a matrix along
    each axis. At the border the shifted matrices read zeros, as the padded convolution does.
    """

    def __init__(self, conv: nn.Conv2d, scale: Tensor, factor: int) -> None:
        super().__init__()
        self.factor, self.channels = factor, conv.out_channels
        weight = (conv.weight * scale[:, None, None]).permute(2, 3, 0, 1).reshape(9 * conv.out_channels, -1)
        self.taps = nn.Linear(conv.in_channels, len(weight), bias=False, device=weight.device)
        self.taps.weight = nn.Parameter(weight)
        self._matrices: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, D, h, w) to (B, C, f h, f w)."""
        batch, _, h, w = tokens.shape
        along_y, along_x = self._matrix(h, tokens), self._matrix(w, tokens)
        taps = self.taps(tokens.permute(0, 2, 3, 1)).view(batch, h, w, 3, 3, self.channels)
        taps = taps.permute(0, 3, 1, 4, 2, 5).reshape(batch * 3 * h, 3 * w, self.channels)  # (B, dy, y), (dx, x), C
        wide = torch.matmul(along_x, taps).view(batch, 3 * h, -1)  # (B, (dy, y), (X, C))
        whole = torch.matmul(along_y, wide).view(batch, self.factor * h, self.factor * w, self.channels)
        return whole.permute(0, 3, 1, 2)

    def _matrix(self, length: int, like: Tensor) -> Tensor:
        """(f n, 3 n): enlarges n values by f, shifted by the three taps."""
        key = (length, like.device, like.dtype)
        if key not in self._matrices:
            one = torch.eye(length, device=like.device)[None]
            enlarge = functional.interpolate(one, scale_factor=self.factor, mode="linear", align_corners=False)[0].T
            padded = functional.pad(enlarge, (0, 0, 1, 1))
            self._matrices[key] = torch.cat([padded[tap : tap + len(enlarge)] for tap in range(3)], 1).to(like.dtype)
        return self._matrices[key]


class _Level(nn.Module):
    """First convolution and ReLU of a skip on `norm(c + enlarged(x))`."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, factor: int) -> None:
        super().__init__()
        scale, shift = _affine(norm)
        taps = torch.einsum("m,omyx->oyx", shift, conv.weight)
        self.direct = _conv_of(conv.weight * scale[:, None, None], cast(Tensor, conv.bias) + taps.sum((1, 2)))
        self.spread = _Spread(conv, scale, factor)
        self.border = _Border(taps)

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.border(self.direct(c).add_(self.spread(x))).relu_()
        return out


class _HalfResolution(nn.Module):
    """First convolution and ReLU of the skip at 1/2 on `norm(up(c2) + fc1(stem) + enlarged(x))`."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, up: nn.ConvTranspose2d, fc1: nn.Conv2d) -> None:
        super().__init__()
        scale, shift = _affine(norm)
        weight = conv.weight * scale[:, None, None]
        constant = shift + scale * (cast(Tensor, up.bias) + cast(Tensor, fc1.bias))
        taps = torch.einsum("m,omyx->oyx", constant, conv.weight)
        of_stem = torch.einsum("omyx,mi->oiyx", weight, fc1.weight[:, :, 0, 0])
        self.stem = _conv_of(of_stem, cast(Tensor, conv.bias) + taps.sum((1, 2)))
        self.up = nn.ConvTranspose2d(up.in_channels, conv.out_channels, 4, stride=2, padding=1, bias=False)
        self.up.weight = nn.Parameter(functional.conv2d(up.weight, weight, padding=2))
        self.spread = _Spread(conv, scale, 8)
        self.border = _Border(taps)

    def forward(self, stem: Tensor, c2: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.border(self.stem(stem).add_(self.up(c2)).add_(self.spread(x))).relu_()
        return out


def _alias(network: nn.Module) -> nn.Module:
    """A copy whose weights are those of `network`, but may be replaced one by one."""
    memo: dict[int, Any] = {}
    for weight in network.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(network, memo)


def _fold(sequence: nn.Sequential) -> None:
    """Put every BatchNorm into the convolution right before it."""
    for place, (conv, norm) in enumerate(_neighbours(sequence)):
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
            sequence[place], sequence[place + 1] = _fused(conv, norm), nn.Identity()


def _fold_blocks(cnn: nn.Module) -> None:
    """The same in a CNN of timm, whose norms hold the activation after them and stand beside their convolutions."""
    for block in list(cnn.modules()):
        parts = list(block.named_children())
        for (_, conv), (place, norm) in pairwise(parts):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                fused = _fused(conv, norm)
                conv.weight, conv.bias = fused.weight, fused.bias
                setattr(block, place, norm.act)


def _neighbours(sequence: nn.Sequential) -> Iterator[tuple[nn.Module, nn.Module]]:
    for place in range(len(sequence) - 1):
        yield sequence[place], sequence[place + 1]


def _fused(conv: Conv, norm: nn.BatchNorm2d) -> Conv:
    fused: Conv = fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, nn.ConvTranspose2d))
    return fused


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel of a BatchNorm in eval mode."""
    scale = norm.weight / (cast(Tensor, norm.running_var) + norm.eps).sqrt()
    return scale, norm.bias - cast(Tensor, norm.running_mean) * scale


def _conv_of(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A 3x3 convolution with zero padding of these weights."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, device="meta")
    conv.weight, conv.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)
    return conv


def _split(conv: nn.Conv2d) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A convolution of two inputs of equal width as one of each; the bias goes with the first."""
    first, second = conv.weight.chunk(2, dim=1)
    rest = _conv_of(second, torch.zeros_like(cast(Tensor, conv.bias)))
    rest.bias = None
    return _conv_of(first, cast(Tensor, conv.bias)), rest


def _raised(block: nn.Module) -> nn.Sequential:
    """Transposed convolution, convolution, norm and ReLU as one transposed convolution and ReLU."""
    up, conv, norm, _ = cast(nn.Sequential, block)
    joined = _Raise(cast(nn.ConvTranspose2d, up), _fused(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm)))
    joined.conv.bias = nn.Parameter(joined.take_interior())
    return nn.Sequential(joined, nn.ReLU(inplace=True))
