"""CellVTA: a ViT joined to a CNN adapter by deformable attention, and a decoder of three branches.

Xu et al. 2025, arXiv 2504.00784. The published weights were made by JieZheng-ShanghaiTech/CellVTA d323bc3; where that
code and the paper's text differ, the defaults here follow the code.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from wsipipe.model.adapter import Extractor, Injector, Interaction, SpatialPrior, init_adapter, to_image
from wsipipe.model.decoder import Decoder, Pyramid, Widths

PATCH_PX = 16


class AdaptedViT(nn.Module):
    """A plain ViT and its adapter: (B, 3, H, W) to features of D channels at 1/2, 1/4, 1/8 and 1/16.

    Parameters
    ----------
    dim, depth, heads, layer_scale
        The ViT: width, number of blocks, attention heads, initial LayerScale (None for none).
    stages : pairs (first, last)
        Which ViT blocks, both ends included, run in each interaction stage.
    prior_width : int
        Channels of the first convolutions of the adapter.
    attention_heads, attention_points, attention_ratio
        Deformable attention: heads, places a query reads per head and level, width of values over D.
    ffn_ratio, gamma, drop_path, extra_extractors
        Of the adapter; `gamma` is where the injectors start, `extra_extractors` belong to the last stage.
    class_token : "bypass" | "attend"
        Published weights: the class token meets no block ("bypass"). The paper sends it through the ViT ("attend").
    tissue_classes : int
        Outputs of the tissue head on the class token; 0 for none.
    """

    def __init__(
        self,
        *,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        layer_scale: float | None = 1e-5,
        stages: Sequence[tuple[int, int]] = ((0, 5), (6, 11), (12, 17), (18, 23)),
        prior_width: int = 64,
        attention_heads: int = 8,
        attention_points: int = 4,
        attention_ratio: float = 0.5,
        ffn_ratio: float = 0.25,
        gamma: float = 1e-5,
        drop_path: float = 0.4,
        extra_extractors: int = 2,
        class_token: Literal["bypass", "attend"] = "bypass",
        tissue_classes: int = 0,
    ) -> None:
        super().__init__()
        if len(stages) != 4 or [i for a, b in stages for i in range(a, b + 1)] != list(range(depth)):
            raise ValueError(f"four stages must name the blocks 0 to {depth - 1} in order, not {stages}")
        self.class_token = class_token
        self.stages = [(first, last) for first, last in stages]
        self.vit = VisionTransformer(
            patch_size=PATCH_PX,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            init_values=layer_scale,
            drop_path_rate=drop_path,
            dynamic_img_size=True,
            num_classes=0,
        )
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.spm = SpatialPrior(prior_width, dim)

        def extractor() -> Extractor:
            return Extractor(dim, attention_heads, attention_points, attention_ratio, ffn_ratio, drop_path)

        self.interactions = nn.ModuleList(
            Interaction(
                Injector(dim, attention_heads, attention_points, attention_ratio, gamma),
                extractor(),
                [extractor() for _ in range(extra_extractors if stage == 3 else 0)],
            )
            for stage in range(4)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(4))
        self.tissue_head = nn.Linear(dim, tissue_classes) if tissue_classes else None
        for part in (self.spm, self.interactions, self.up):
            init_adapter(part)
        nn.init.normal_(self.level_embed)

    def forward(self, image: Tensor) -> tuple[Pyramid, Tensor | None]:
        """Pyramid, and tissue logits (B, T) if there is a tissue head."""
        batch, _, height, width = image.shape
        if height % PATCH_PX or width % PATCH_PX:
            raise ValueError(f"height and width must be multiples of {PATCH_PX} px, not {height} x {width}")
        h, w = height // PATCH_PX, width // PATCH_PX
        sizes = ((4 * h, 4 * w), (2 * h, 2 * w), (h, w))
        c1, *levels = self.spm(image)
        c = torch.cat(
            [level.flatten(2).transpose(1, 2) + embed for level, embed in zip(levels, self.level_embed, strict=True)],
            dim=1,
        )
        positions = resample_abs_pos_embed(self.vit.pos_embed, [h, w], num_prefix_tokens=1)
        x = self.vit.patch_embed(image).flatten(1, 2) + positions[:, 1:]
        token = (self.vit.cls_token + positions[:, :1]).expand(batch, -1, -1)

        seen: list[Tensor] = []
        for (first, last), interaction in zip(self.stages, cast(list[Interaction], self.interactions), strict=True):
            x = interaction.injector(x, (h, w), c, sizes)
            blocks = self.vit.blocks[first : last + 1]
            if self.class_token == "attend":
                joined = blocks(torch.cat((token, x), dim=1))
                token, x = joined[:, :1], joined[:, 1:]
            else:
                x = blocks(x)
            c = interaction.extract(c, sizes, x, (h, w))
            seen.append(to_image(x, (h, w)))

        c2, c3, c4 = (
            to_image(part, size) for part, size in zip(c.split([a * b for a, b in sizes], 1), sizes, strict=True)
        )
        pyramid = (
            self.norms[0](self.up(c2) + c1 + _enlarged(seen[0], 8)),
            self.norms[1](c2 + _enlarged(seen[1], 4)),
            self.norms[2](c3 + _enlarged(seen[2], 2)),
            self.norms[3](c4 + seen[3]),
        )
        tissue = None if self.tissue_head is None else self.tissue_head(self.vit.norm(token)[:, 0])
        return pyramid, tissue


def _enlarged(image: Tensor, factor: int) -> Tensor:
    return functional.interpolate(image, scale_factor=factor, mode="bilinear", align_corners=False)


class CellVTA(nn.Module):
    """The whole network; `encoder` are the arguments of `AdaptedViT`.

    Forward takes (B, 3, H, W) normalised RGB, H and W multiples of 16, and gives a dict of tensors: `nuclei`
    (B, 2, H, W) logits, `offsets` (B, 2, H, W) the HV map (horizontal, vertical), `types` (B, `classes`, H, W) logits
    and, where the encoder has a tissue head, `tissue` (B, T) logits.
    """

    def __init__(self, *, classes: int, decoder_widths: Widths = (64, 128, 256, 512), **encoder: object) -> None:
        super().__init__()
        self.encoder = AdaptedViT(**encoder)  # type: ignore[arg-type]
        self.decoder = Decoder(self.encoder.vit.embed_dim, decoder_widths, classes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        pyramid, tissue = self.encoder(image)
        outputs: dict[str, Tensor] = self.decoder(image, pyramid)
        return outputs if tissue is None else {**outputs, "tissue": tissue}
