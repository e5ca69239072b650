"""The networks by name. A new one is an entry in `ARCHITECTURES`; a new configuration an entry in `SPECS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsipipe.errors import ModelError
from wsipipe.model.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

PANNUKE_CLASSES = ("background", "neoplastic", "inflammatory", "connective", "dead", "epithelial")
PANNUKE_COLOURS = ((0, 0, 0), (255, 0, 0), (34, 221, 77), (35, 92, 236), (254, 255, 0), (255, 159, 68))
CONSEP_CLASSES = ("background", "other", "inflammatory", "epithelial", "spindle-shaped")
CONSEP_COLOURS = ((0, 0, 0), (240, 200, 40), (40, 200, 80), (230, 50, 60), (60, 110, 240))


def _cellvta(**settings: Any) -> nn.Module:
    from wsipipe.model.cellvta import CellVTA

    return CellVTA(**settings)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"cellvta": _cellvta}


def _small(name: str, tile_px: int, **settings: Any) -> ModelSpec:
    """A CellVTA that is trained from scratch and runs on CPUs."""
    return ModelSpec(
        name=name,
        architecture="cellvta",
        settings={"layer_scale": None, "gamma": 0.1, "drop_path": 0.0, **settings},
        mpp=0.25,
        tile_px=tile_px,
        halo_px=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        class_names=CONSEP_CLASSES,
        class_colours=CONSEP_COLOURS,
        source="architecture arXiv 2504.00784 at small widths; no weights of others",
        licence="Apache-2.0",
    )


SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="cellvta-uni",
            architecture="cellvta",
            settings={"tissue_classes": 19},
            mpp=0.25,
            tile_px=256,
            halo_px=32,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            class_names=PANNUKE_CLASSES,
            class_colours=PANNUKE_COLOURS,
            source="arXiv 2504.00784; JieZheng-ShanghaiTech/CellVTA d323bc3, UNI ViT-L/16, PanNuke",
            licence="Apache-2.0 with Commons Clause; UNI: CC-BY-NC-ND-4.0, gated",
        ),
        _small(
            "cellvta-nano",
            512,
            dim=64,
            depth=4,
            heads=4,
            stages=[[0, 0], [1, 1], [2, 2], [3, 3]],
            prior_width=16,
            attention_heads=4,
            extra_extractors=0,
            decoder_widths=[8, 16, 32, 64],
        ),
        _small(
            "cellvta-tiny",
            512,
            dim=192,
            depth=12,
            heads=6,
            stages=[[0, 2], [3, 5], [6, 8], [9, 11]],
            prior_width=32,
            attention_heads=4,
            extra_extractors=1,
            decoder_widths=[16, 32, 64, 128],
        ),
        _small(
            "cellvta-small",
            512,
            dim=384,
            depth=12,
            heads=6,
            stages=[[0, 2], [3, 5], [6, 8], [9, 11]],
            prior_width=32,
            attention_heads=8,
            decoder_widths=[32, 64, 128, 256],
        ),
    )
}


def build(spec: ModelSpec) -> nn.Module:
    """The network that `spec` describes, with random weights.

    Raises
    ------
    ModelError
        If the architecture is unknown or refuses the spec's settings.
    """
    if spec.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"{spec.name}: architecture '{spec.architecture}' is unknown; known are {known}")
    try:
        return ARCHITECTURES[spec.architecture](classes=len(spec.class_names), **spec.settings)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{spec.name}: its settings do not make a {spec.architecture}: {error}") from error
