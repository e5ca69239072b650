"""Vision transformers as encoders: an image to tokens, then any range of blocks.

Plain ViTs (timm's `VisionTransformer`, and `Eva` with rotary positions, which DINOv3 is) and SAM's (windowed attention
with relative positions) behind one small interface, so that adapter and decoder do not ask which one it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn import functional

GRID_PX = 16  # image pixels a side that one token stands for
LAYER_NORM_EPS = 1e-6

Grid = tuple[int, int]  # (rows, columns) of tokens
Positions = Literal["resampled", "dino", "cropped"]


class Encoder(nn.Module, ABC):
    """A ViT in pieces.

    One token stands for 16 x 16 px whatever the patch: for a ViT of patch 14 the image is shown at 14/16 of its size,
    so that features of every ViT lie on the same grids.

    Attributes
    ----------
    dim, depth : int
        Width of a token, number of blocks.
    prefix_tokens : int
        Class token and registers, which stand before those of the patches; 0 for SAM.
    needs_prefix : bool
        Whether no block runs without them.
    """

    dim: int
    depth: int
    prefix_tokens: int
    needs_prefix: bool = False
    patch_embed: Any  # of timm, which does not type them
    blocks: Any
    pos_embed: Tensor | None

    def __init__(self, patch_px: int) -> None:
        super().__init__()
        self.patch_px = patch_px
        self._positions: dict[object, Any] | None = None  # remembered by size, where weights no longer change

    def remember_positions(self) -> None:
        """From now on compute what depends on the size alone once a size: for inference."""
        self._positions = {}

    def tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix tokens (B, P, D) and patch tokens (B, H/16 W/16, D), positions added, before the first block.

        Raises
        ------
        ValueError
            If height or width of `image` (B, 3, H, W) are no multiples of 16.
        """
        grid = grid_of(image)
        if self.patch_px != GRID_PX:
            size = (grid[0] * self.patch_px, grid[1] * self.patch_px)
            # In float32: the antialiased kernel knows no other on CPUs.
            shown = functional.interpolate(image.float(), size, mode="bilinear", antialias=True, align_corners=False)
            image = shown.to(image.dtype)
        prefix, positions = self._remembered("tokens", grid, self._fixed_tokens)
        patches = self._embedded(image)
        if positions is not None:
            patches = patches + positions
        return prefix.expand(len(image), -1, -1), patches

    def _embedded(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to one token a patch (B, h w, D).

        By a product of matrices, which a convolution that steps from patch to patch is. As a convolution, torch 2.14.1
        computes it wrongly in bf16 on CPUs with AMX, where images have 4 to 12 channels: ours on cells of 2 x 2 px.
        """
        projection = self.patch_embed.proj
        pixels = functional.pixel_unshuffle(image, self.patch_px).flatten(2).mT
        tokens: Tensor = self.patch_embed.norm(functional.linear(pixels, projection.weight.flatten(1), projection.bias))
        return tokens

    @abstractmethod
    def _fixed_tokens(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """What does not depend on the image: prefix tokens (1, P, D), and positions of the patches (1, h w, D)."""

    @abstractmethod
    def run(self, prefix: Tensor, patches: Tensor, grid: Grid, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens after blocks `first` to `last`, both included. An empty prefix (B, 0, D) takes no part."""

    @abstractmethod
    def summary(self, prefix: Tensor, patches: Tensor, grid: Grid, *, normalised: bool) -> Tensor:
        """One vector (B, F) for the image."""

    def _remembered(self, what: str, grid: Grid, make: Any) -> Any:
        if self._positions is None:
            return make(grid)
        weight = next(self.parameters())
        key = (what, grid, weight.device, weight.dtype)
        if key not in self._positions:
            self._positions[key] = make(grid)
        return self._positions[key]


class PlainViT(Encoder):
    """A ViT whose blocks see all tokens; takes the parts it needs of timm's network, under their names there."""

    cls_token: Tensor | None
    reg_token: Tensor | None
    norm: Any
    norm_pre: Any
    rope: Any

    def __init__(self, vit: VisionTransformer | Eva, positions: Positions = "resampled") -> None:
        super().__init__(_patch_px(vit))
        if positions == "cropped":
            raise ValueError("only SAM's encoders crop their positions")
        self.dim, self.depth, self.prefix_tokens = vit.embed_dim, len(vit.blocks), vit.num_prefix_tokens
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.reg_token = vit.reg_token
        self.norm_pre = vit.norm_pre
        self.rope = getattr(vit, "rope", None)
        self.needs_prefix = self.rope is not None
        self._prefix_has_places = not vit.no_embed_class
        self._resampling = positions

    def _fixed_tokens(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        parts = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(parts, dim=1) if parts else self.patch_embed.proj.weight.new_zeros(1, 0, self.dim)
        if self.pos_embed is None:
            return prefix, None
        placed = self.prefix_tokens if self._prefix_has_places else 0
        resample = _resampled_as_dino if self._resampling == "dino" else resample_abs_pos_embed
        positions = resample(self.pos_embed, list(grid), num_prefix_tokens=placed)
        if placed:
            prefix = prefix + positions[:, :placed]
        return prefix, positions[:, placed:]

    def run(self, prefix: Tensor, patches: Tensor, grid: Grid, first: int, last: int) -> tuple[Tensor, Tensor]:
        count = prefix.shape[1]
        x = torch.cat((prefix, patches), dim=1) if count else patches
        if first == 0:
            x = self.norm_pre(x)
        if self.rope is None:
            x = self.blocks[first : last + 1](x)
        else:
            if count != self.prefix_tokens:
                raise ValueError("a ViT with rotary positions needs its prefix tokens")
            angles = self._remembered("rope", grid, lambda size: self.rope.get_embed(shape=list(size)))
            for block in self.blocks[first : last + 1]:
                x = block(x, rope=angles)
        return x[:, :count], x[:, count:]

    def summary(self, prefix: Tensor, patches: Tensor, grid: Grid, *, normalised: bool) -> Tensor:
        if self.cls_token is None:
            raise ValueError("this ViT has no class token to tell the tissue from")
        token = prefix[:, 0]
        return self.norm(token) if normalised else token


class SamViT(Encoder):
    """SAM's image encoder. `neck` keeps its last convolutions, whose mean over the image is the summary."""

    neck: Any

    def __init__(self, vit: VisionTransformerSAM, positions: Positions = "resampled", *, neck: bool = False) -> None:
        super().__init__(_patch_px(vit))
        if positions == "dino":
            raise ValueError("SAM's encoders resample or crop their positions")
        self.dim, self.depth, self.prefix_tokens = vit.embed_dim, len(vit.blocks), 0
        self.patch_embed, self.pos_embed, self.blocks = vit.patch_embed, vit.pos_embed, vit.blocks
        self.neck = vit.neck if neck else None
        self._cropped = positions == "cropped"

    def _fixed_tokens(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        prefix = self.patch_embed.proj.weight.new_zeros(1, 0, self.dim)
        if self.pos_embed is None:
            return prefix, None
        if not self._cropped:
            return prefix, resample_abs_pos_embed_nhwc(self.pos_embed, list(grid)).flatten(1, 2)
        height, width = self.pos_embed.shape[1:3]
        if grid[0] > height or grid[1] > width:
            raise ValueError(f"the image may have at most {height * GRID_PX} x {width * GRID_PX} px")
        return prefix, self.pos_embed[:, : grid[0], : grid[1]].flatten(1, 2)

    def run(self, prefix: Tensor, patches: Tensor, grid: Grid, first: int, last: int) -> tuple[Tensor, Tensor]:
        x = patches.unflatten(1, grid)
        for block in self.blocks[first : last + 1]:
            x = block(x)
        return prefix, x.flatten(1, 2)

    def summary(self, prefix: Tensor, patches: Tensor, grid: Grid, *, normalised: bool) -> Tensor:
        if self.neck is None:
            raise ValueError("SAM's encoder has no class token to tell the tissue from")
        out: Tensor = self.neck(patches.unflatten(1, grid).permute(0, 3, 1, 2)).mean((2, 3))
        return out


def make_encoder(
    backbone: str | None = None,
    backbone_settings: Mapping[str, Any] | None = None,
    *,
    dim: int = 1024,
    depth: int = 24,
    heads: int = 16,
    layer_scale: float | None = 1e-5,
    drop_path: float = 0.0,
    positions: Positions = "resampled",
    neck: bool = False,
    channels: int = 3,
) -> Encoder:
    """An encoder with random weights.

    Parameters
    ----------
    backbone, backbone_settings
        Name of a ViT of timm, and arguments that differ from those it has there ("swiglu" and "silu" stand for the
        layers of these names). Without a name: a plain ViT of patch 16, made of `dim`, `depth`, `heads`,
        `layer_scale`.
    drop_path : float
        Stochastic depth of the last block in training; it rises linearly from 0.
    positions
        How positions fit the grid of an image: "resampled" as timm does, "dino" as DINO's first code does, "cropped"
        to the top left corner, as CellViT does with SAM's.
    neck : bool
        Keep the neck of SAM's encoders.
    channels : int
        Of the image; those of timm have 3.

    Raises
    ------
    ValueError
        If the name is unknown, or means no ViT.
    """
    if backbone is None:
        plain = VisionTransformer(
            patch_size=GRID_PX,
            in_chans=channels,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            init_values=layer_scale,
            drop_path_rate=drop_path,
            dynamic_img_size=True,
            num_classes=0,
        )
        return PlainViT(plain, positions)
    if channels != 3:
        raise ValueError(f"'{backbone}' takes RGB, not {channels} channels")
    layers = {"swiglu": SwiGLUPacked, "silu": nn.SiLU}
    settings: dict[str, Any] = {key: layers.get(str(value), value) for key, value in (backbone_settings or {}).items()}
    if backbone.startswith("samvit"):  # timm's default of 1e-5 is not what SAM was trained with
        settings = {"norm_layer": partial(nn.LayerNorm, eps=LAYER_NORM_EPS), **settings}
    elif "dinov3" not in backbone:
        settings = {"dynamic_img_size": True, **settings}
    if not timm.is_model(backbone):
        raise ValueError(f"timm knows no network '{backbone}'")
    vit = timm.create_model(backbone, pretrained=False, num_classes=0, drop_path_rate=drop_path, **settings)
    if isinstance(vit, VisionTransformerSAM):
        return SamViT(vit, positions, neck=neck)
    if isinstance(vit, VisionTransformer | Eva):
        return PlainViT(vit, positions)
    raise ValueError(f"'{backbone}' is a {type(vit).__name__}, not a plain ViT")


def grid_of(image: Tensor, side: int = GRID_PX) -> Grid:
    """Rows and columns of tokens of an image (B, C, H, W). Raises ValueError unless `side` divides both sides."""
    height, width = image.shape[2:]
    if height % side or width % side:
        raise ValueError(f"height and width must be multiples of {side} px, not {height} x {width}")
    return height // side, width // side


def _patch_px(vit: VisionTransformer | Eva | VisionTransformerSAM) -> int:
    rows, columns = cast(Any, vit.patch_embed).patch_size
    if rows != columns:
        raise ValueError(f"patches must be square, not {rows} x {columns}")
    return int(rows)


def _resampled_as_dino(positions: Tensor, grid: list[int], num_prefix_tokens: int) -> Tensor:
    """Bicubic without antialiasing, scaled by (side + 0.1) / old side: the 0.1 shifts what is sampled a little."""
    prefix, patches = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    side = round(patches.shape[1] ** 0.5)
    if grid == [side, side]:
        return positions
    image = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    image = functional.interpolate(image.float(), scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat((prefix, image.to(positions.dtype).permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
