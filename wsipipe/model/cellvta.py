"""CellVTA: a ViT joined to a CNN adapter by deformable attention, and a decoder of three branches.

Xu et al. 2025, arXiv 2504.00784. The published weights were made by JieZheng-ShanghaiTech/CellVTA d323bc3; where that
code and the paper's text differ, the defaults here follow the code.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsipipe.model.adapter import Extractor, Injector, Interaction, SpatialPrior, init_adapter, to_image
from wsipipe.model.attention import Size
from wsipipe.model.decoder import Decoder, Pyramid, Widths
from wsipipe.model.encoder import GRID_PX, grid_of, make_encoder
from wsipipe.model.prior import TaughtPrior

Variant = Literal["published", "paper"]
ClassToken = Literal["bypass", "attend"]
# Where the code that made the published weights and the paper's text differ: the class token, the injectors' gamma.
_BY_VARIANT: dict[Variant, tuple[ClassToken, float]] = {"published": ("bypass", 1e-5), "paper": ("attend", 0.0)}


class Features(NamedTuple):
    """What ViT and adapter make of an image, before the pyramid is put together; images (B, C, H, W)."""

    stem: Tensor  # of the adapter's convolutions, at 1/2, before `fc1`
    quarter: Tensor
    eighth: Tensor
    sixteenth: Tensor
    seen: list[Tensor]  # the ViT's tokens after each stage, at 1/16
    tissue: Tensor | None


class AdaptedViT(nn.Module):
    """A ViT and its adapter: (B, 3 `cell_px`², H, W) to features of D channels at 1/2, 1/4, 1/8 and 1/16.

    Parameters
    ----------
    backbone, backbone_settings, dim, depth, heads, layer_scale
        The ViT, see `make_encoder`.
    stages : pairs (first, last)
        Which ViT blocks, both ends included, run in each interaction stage. Quarters by default.
    prior_width : int
        Channels of the first convolutions of the adapter.
    attention_heads, attention_points, attention_ratio
        Deformable attention: heads, places a query reads per head and level, width of values over D.
    ffn_ratio, drop_path, extra_extractors
        Of the adapter; the `extra_extractors` belong to the last stage. `drop_path` is the ViT's too.
    variant : "published" | "paper"
        Published weights: class token and registers meet no block, the injectors' gamma starts at 1e-5, the deformable
        attention as any linear layer. The paper sends the class token through the ViT, and gamma starts at 0; the
        attention then starts as in Deformable DETR, which it builds on.
    class_token : "bypass" | "attend" | None
        Wins over the variant.
    gamma : float or None
        Where the injectors start; wins over the variant.
    tissue_classes : int
        Outputs of the tissue head on the class token; 0 for none.
    cell_px : int
        Side, px, of the cells whose RGB the channels are.
    prior : str or None
        A CNN that adds to the adapter's features, see `TaughtPrior`.
    """

    def __init__(
        self,
        *,
        backbone: str | None = None,
        backbone_settings: Mapping[str, Any] | None = None,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        layer_scale: float | None = 1e-5,
        stages: Sequence[tuple[int, int]] | None = None,
        prior_width: int = 64,
        attention_heads: int = 8,
        attention_points: int = 4,
        attention_ratio: float = 0.5,
        ffn_ratio: float = 0.25,
        drop_path: float = 0.4,
        extra_extractors: int = 2,
        variant: Variant = "published",
        class_token: ClassToken | None = None,
        gamma: float | None = None,
        tissue_classes: int = 0,
        cell_px: int = 1,
        prior: str | None = None,
    ) -> None:
        super().__init__()
        if variant not in _BY_VARIANT:
            raise ValueError(f"variant must be 'published' or 'paper', not {variant!r}")
        channels = 3 * cell_px**2
        self.vit = make_encoder(
            backbone,
            backbone_settings,
            dim=dim,
            depth=depth,
            heads=heads,
            layer_scale=layer_scale,
            drop_path=drop_path,
            channels=channels,
        )
        dim, depth = self.vit.dim, self.vit.depth
        stages = [(depth * k // 4, depth * (k + 1) // 4 - 1) for k in range(4)] if stages is None else stages
        if len(stages) != 4 or [i for a, b in stages for i in range(a, b + 1)] != list(range(depth)):
            raise ValueError(f"four stages must name the blocks 0 to {depth - 1} in order, not {stages}")
        self.stages = [(first, last) for first, last in stages]
        self.class_token = _BY_VARIANT[variant][0] if class_token is None else class_token
        if self.class_token == "bypass" and self.vit.needs_prefix:
            raise ValueError(f"the rotary positions of {backbone} need its class token: class_token must be 'attend'")
        start = _BY_VARIANT[variant][1] if gamma is None else gamma
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.spm = SpatialPrior(prior_width, dim, channels)
        self.prior = TaughtPrior(prior, (prior_width, dim, dim), cell_px) if prior else None

        def extractor() -> Extractor:
            return Extractor(dim, attention_heads, attention_points, attention_ratio, ffn_ratio, drop_path)

        self.interactions = nn.ModuleList(
            Interaction(
                Injector(dim, attention_heads, attention_points, attention_ratio, start),
                extractor(),
                [extractor() for _ in range(extra_extractors if stage == 3 else 0)],
            )
            for stage in range(4)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(4))
        if tissue_classes and not self.vit.prefix_tokens:
            raise ValueError(f"{backbone} has no class token to tell {tissue_classes} tissues from")
        self.tissue_head = nn.Linear(dim, tissue_classes) if tissue_classes else None
        for part in (self.spm, self.interactions, self.up):
            init_adapter(part, attention_ring=variant == "paper")
        nn.init.normal_(self.level_embed)

    def features(self, image: Tensor) -> Features:
        """All but the pyramid's last sums."""
        h, w = grid = grid_of(image)
        sizes: tuple[Size, ...] = ((4 * h, 4 * w), (2 * h, 2 * w), (h, w))
        stem, *levels = self.spm(image)
        if self.prior is not None:
            stem, *levels = (x + more for x, more in zip((stem, *levels), (*self.prior(image), 0), strict=True))
        c = torch.cat(
            [level.flatten(2).transpose(1, 2) + embed for level, embed in zip(levels, self.level_embed, strict=True)],
            dim=1,
        )
        prefix, x = self.vit.tokens(image)
        nothing = prefix[:, :0]
        seen: list[Tensor] = []
        for (first, last), interaction in zip(self.stages, cast(list[Interaction], self.interactions), strict=True):
            x = interaction.injector(x, grid, c, sizes)
            if self.class_token == "attend":
                prefix, x = self.vit.run(prefix, x, grid, first, last)
            else:
                x = self.vit.run(nothing, x, grid, first, last)[1]
            c = interaction.extract(c, sizes, x, grid)
            seen.append(to_image(x, grid))
        c2, c3, c4 = (
            to_image(part, size) for part, size in zip(c.split([a * b for a, b in sizes], 1), sizes, strict=True)
        )
        tissue = None
        if self.tissue_head is not None:
            tissue = self.tissue_head(self.vit.summary(prefix, x, grid, normalised=True))
        return Features(stem, c2, c3, c4, seen, tissue)

    def forward(self, image: Tensor) -> tuple[Pyramid, Tensor | None]:
        """Pyramid, and tissue logits (B, T) if there is a tissue head."""
        stem, c2, c3, c4, seen, tissue = self.features(image)
        pyramid = (
            self.norms[0](self.up(c2) + self.spm.fc1(stem) + _enlarged(seen[0], 8)),
            self.norms[1](c2 + _enlarged(seen[1], 4)),
            self.norms[2](c3 + _enlarged(seen[2], 2)),
            self.norms[3](c4 + seen[3]),
        )
        return pyramid, tissue


def _enlarged(image: Tensor, factor: int) -> Tensor:
    return functional.interpolate(image, scale_factor=factor, mode="bilinear", align_corners=False)


class CellVTA(nn.Module):
    """The whole network; `encoder` are the arguments of `AdaptedViT`.

    With `cell_px` above 1 it works on cells of so many pixels a side: what is one pixel to its layers holds the RGB of
    a cell (space to depth), and its last layers write every pixel of a cell (depth to space). Nothing of the image is
    lost, and the same layers cost `cell_px` squared times less. Shi et al. 2016, arXiv 1609.05158.

    Forward takes (B, 3, H, W) normalised RGB, H and W multiples of 16 cells, and gives a dict of tensors: `nuclei`
    (B, 2, H, W) logits, `offsets` (B, 2, H, W) the HV map (horizontal, vertical), `types` (B, `classes`, H, W) logits
    and, where the encoder has a tissue head, `tissue` (B, T) logits.
    """

    def __init__(
        self, *, classes: int, decoder_widths: Widths = (64, 128, 256, 512), cell_px: int = 1, **encoder: Any
    ) -> None:
        super().__init__()
        self.cell_px = cell_px
        self.encoder = AdaptedViT(cell_px=cell_px, **encoder)
        self.decoder = Decoder(self.encoder.vit.dim, decoder_widths, classes, cell_px=cell_px)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        cells = to_cells(image, self.cell_px)
        pyramid, tissue = self.encoder(cells)
        outputs: dict[str, Tensor] = to_pixels(self.decoder(cells, pyramid), self.cell_px)
        return outputs if tissue is None else {**outputs, "tissue": tissue}


def to_cells(image: Tensor, cell_px: int) -> Tensor:
    """(B, C, H, W) as (B, C cell_px², H / cell_px, W / cell_px). Raises ValueError unless 16 cells divide H and W."""
    grid_of(image, GRID_PX * cell_px)
    return image if cell_px == 1 else _dense(functional.pixel_unshuffle(image, cell_px))


def to_pixels(maps: dict[str, Tensor], cell_px: int) -> dict[str, Tensor]:
    """The maps of cells as maps of pixels."""
    if cell_px == 1:
        return maps
    return {name: _dense(functional.pixel_shuffle(values, cell_px)) for name, values in maps.items()}


def _dense(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)
