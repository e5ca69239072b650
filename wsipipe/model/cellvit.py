"""CellViT: a ViT whose tokens, taken after four of its blocks, feed the decoder.

Hörst et al. 2024, doi:10.1016/j.media.2024.103143 (TIO-IKIM/CellViT) with ViT-256 or SAM, and
TIO-IKIM/CellViT-plus-plus with UNI.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from wsipipe.model.adapter import to_image
from wsipipe.model.decoder import Decoder, Pyramid, Widths
from wsipipe.model.encoder import grid_of, make_encoder


class TappedViT(nn.Module):
    """A ViT and its tokens after some blocks.

    Parameters
    ----------
    taps : sequence of int
        After how many blocks tokens are taken; the last is the depth.
    tissue_classes : int
        Outputs of the tissue head; 0 for none.
    tissue_normalised : bool
        The tissue head sees the class token after the last norm, or as the last block leaves it.
    encoder
        Arguments of `make_encoder`.
    """

    def __init__(
        self, *, taps: Sequence[int], tissue_classes: int = 0, tissue_normalised: bool = True, **encoder: Any
    ) -> None:
        super().__init__()
        self.vit = make_encoder(neck=tissue_classes > 0, **encoder)
        if len(taps) != 4 or list(taps) != sorted(set(taps)) or taps[0] < 1 or taps[-1] != self.vit.depth:
            raise ValueError(f"four taps must rise and end at {self.vit.depth}, not {list(taps)}")
        self.taps, self.tissue_normalised = tuple(taps), tissue_normalised
        neck = getattr(self.vit, "neck", None)
        width = self.vit.dim if neck is None else neck[0].out_channels
        self.tissue_head = nn.Linear(width, tissue_classes) if tissue_classes else None

    def forward(self, image: Tensor) -> tuple[Pyramid, Tensor | None]:
        """Tokens after each tap, all (B, D, H/16, W/16), and tissue logits (B, T) if there is a tissue head."""
        grid = grid_of(image)
        prefix, x = self.vit.tokens(image)
        seen, first = [], 0
        for tap in self.taps:
            prefix, x = self.vit.run(prefix, x, grid, first, tap - 1)
            seen.append(to_image(x, grid))
            first = tap
        tissue = None
        if self.tissue_head is not None:
            tissue = self.tissue_head(self.vit.summary(prefix, x, grid, normalised=self.tissue_normalised))
        return (seen[0], seen[1], seen[2], seen[3]), tissue


class CellViT(nn.Module):
    """The whole network; `encoder` are the arguments of `TappedViT`. Takes and gives what `CellVTA` does."""

    def __init__(
        self,
        *,
        classes: int,
        decoder_widths: Widths = (64, 128, 256, 512),
        raised_widths: tuple[int, int] = (512, 256),
        **encoder: Any,
    ) -> None:
        super().__init__()
        self.encoder = TappedViT(**encoder)
        self.decoder = Decoder(self.encoder.vit.dim, decoder_widths, classes, "grid", raised_widths)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features, tissue = self.encoder(image)
        outputs: dict[str, Tensor] = self.decoder(image, features)
        return outputs if tissue is None else {**outputs, "tissue": tissue}
