"""The networks by name. A new one is an entry in `ARCHITECTURES`; a new configuration an entry in `SPECS`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wsipipe.errors import ModelError, one_line
from wsipipe.model.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

PANNUKE_CLASSES = ("background", "neoplastic", "inflammatory", "connective", "dead", "epithelial")
PANNUKE_COLOURS = ((0, 0, 0), (255, 0, 0), (34, 221, 77), (35, 92, 236), (254, 255, 0), (255, 159, 68))
CONIC_CLASSES = ("background", "neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective")
CONIC_COLOURS = (*PANNUKE_COLOURS, (35, 255, 255))
CONSEP_CLASSES = ("background", "other", "inflammatory", "epithelial", "spindle-shaped")
CONSEP_COLOURS = ((0, 0, 0), (240, 200, 40), (40, 200, 80), (230, 50, 60), (60, 110, 240))


HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


def _cellvta(**settings: Any) -> nn.Module:
    from wsipipe.model.cellvta import CellVTA

    return CellVTA(**settings)


def _cellvit(**settings: Any) -> nn.Module:
    from wsipipe.model.cellvit import CellViT

    return CellViT(**settings)


def _hovernet(**settings: Any) -> nn.Module:
    from wsipipe.model.hovernet import HoverNet

    return HoverNet(**settings)


def _ciscnet(**settings: Any) -> nn.Module:
    from wsipipe.model.ciscnet import CISCNet

    return CISCNet(**settings)


def _pointnu(**settings: Any) -> nn.Module:
    from wsipipe.model.pointnu import PointNuNet

    return PointNuNet(**settings)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "cellvta": _cellvta,
    "cellvit": _cellvit,
    "hovernet": _hovernet,
    "ciscnet": _ciscnet,
    "pointnu": _pointnu,
}


def _small(
    name: str,
    *,
    dim: int,
    prior_width: int,
    decoder_widths: list[int],
    tile_px: int,
    halo_px: int,
    mpp: float = 0.25,
    prior: str | None = None,
) -> ModelSpec:
    """A CellVTA that runs on CPUs: four ViT blocks that start untaught, on cells of 2 x 2 px."""
    cell_px = 2
    return ModelSpec(
        name=name,
        architecture="cellvta",
        settings={
            "dim": dim,
            "depth": 4,
            "heads": 4,
            "layer_scale": None,
            "stages": [[0, 0], [1, 1], [2, 2], [3, 3]],
            "prior_width": prior_width,
            "attention_heads": 4,
            "extra_extractors": 0,
            "drop_path": 0.0,
            "gamma": 0.1,
            "decoder_widths": decoder_widths,
            "cell_px": cell_px,
            **({"prior": prior} if prior else {}),
        },
        mpp=mpp,
        tile_px=tile_px,
        halo_px=halo_px,
        tile_step=(16 * cell_px, 0),
        mean=HALF,
        std=HALF,
        class_names=CONSEP_CLASSES,
        class_colours=CONSEP_COLOURS,
        source="architecture arXiv 2504.00784 at small widths; "
        + ("prior of EfficientNet-Lite0, ImageNet" if prior else "no weights of others"),
        licence="Apache-2.0",
    )


def _pannuke(
    name: str,
    architecture: str,
    settings: dict[str, Any],
    *,
    source: str,
    licence: str,
    scaling: tuple[tuple[float, float, float], tuple[float, float, float]] = (HALF, HALF),
    tile_px: int = 256,
) -> ModelSpec:
    """A network at 0.25 µm/px with the classes of PanNuke."""
    return ModelSpec(
        name=name,
        architecture=architecture,
        settings=settings,
        mpp=0.25,
        tile_px=tile_px,
        halo_px=32,
        mean=scaling[0],
        std=scaling[1],
        class_names=PANNUKE_CLASSES,
        class_colours=PANNUKE_COLOURS,
        source=source,
        licence=licence,
    )


def _adapted(
    name: str, backbone: str, settings: dict[str, Any], source: str, licence: str, **options: Any
) -> ModelSpec:
    """CellVTA round a foundation model whose weights start a training; as the paper has it."""
    plain = {"backbone": backbone, "variant": "paper", **settings}
    return _pannuke(name, "cellvta", plain, source=f"arXiv 2504.00784 round {source}", licence=licence, **options)


def _family() -> list[ModelSpec]:
    """CellVTA as published, round other ViTs, and CellViT, which it grew out of."""
    uni: dict[str, Any] = {
        "source": "arXiv 2504.00784; JieZheng-ShanghaiTech/CellVTA d323bc3, UNI ViT-L/16, PanNuke",
        "licence": "Apache-2.0 with Commons Clause; UNI: CC-BY-NC-ND-4.0, gated",
    }
    cellvit: dict[str, Any] = {
        "source": "doi:10.1016/j.media.2024.103143; TIO-IKIM/CellViT, PanNuke",
        "licence": "Apache-2.0 with Commons Clause",
    }
    swiglu = {"mlp_layer": "swiglu", "act_layer": "silu", "init_values": 1e-5}
    uni2 = {"embed_dim": 1536, "depth": 24, "num_heads": 24, "mlp_ratio": 5.33334, "reg_tokens": 8}
    dino: dict[str, Any] = {"img_size": 518}
    optimus = {"img_size": 224, "init_values": 1e-5}
    sam = {
        "b": ("samvit_base_patch16", 768, [3, 6, 9, 12]),
        "l": ("samvit_large_patch16", 1024, [6, 12, 18, 24]),
        "h": ("samvit_huge_patch16", 1280, [8, 16, 24, 32]),
    }
    return [
        _pannuke("cellvta-uni", "cellvta", {"tissue_classes": 19}, **uni),
        _pannuke("cellvta-uni-paper", "cellvta", {"tissue_classes": 19, "variant": "paper"}, **uni),
        *(
            _adapted(
                f"cellvta-sam-{size}", backbone, {}, f"SAM ViT-{size.upper()}, arXiv 2304.02643", "SAM: Apache-2.0"
            )
            for size, (backbone, _, _) in sam.items()
        ),
        _adapted(
            "cellvta-uni2-h",
            "vit_giant_patch14_224",
            {"backbone_settings": {**swiglu, **uni2, "no_embed_class": True}},
            "UNI2-h, MahmoodLab/UNI2-h",
            "UNI2-h: CC-BY-NC-ND-4.0, gated",
            scaling=IMAGENET,
        ),
        _adapted(
            "cellvta-virchow2",
            "vit_huge_patch14_224",
            {"backbone_settings": {**swiglu, "mlp_ratio": 5.3375, "reg_tokens": 4}},
            "Virchow2, paige-ai/Virchow2, arXiv 2408.00738",
            "Virchow2: CC-BY-NC-ND-4.0, gated",
            scaling=IMAGENET,
        ),
        *(
            _adapted(
                f"cellvta-h-optimus-{n}",
                "vit_giant_patch14_reg4_dinov2",
                {"backbone_settings": optimus},
                f"H-optimus-{n}, bioptimus/H-optimus-{n}",
                f"H-optimus-{n}: {terms}",
                scaling=H_OPTIMUS,
            )
            for n, terms in enumerate(("Apache-2.0", "CC-BY-NC-ND-4.0, gated"))
        ),
        _adapted(
            "cellvta-dinov2-l",
            "vit_large_patch14_reg4_dinov2",
            {"backbone_settings": dino},
            "DINOv2 ViT-L/14 with registers, arXiv 2309.16588",
            "DINOv2: Apache-2.0",
            scaling=IMAGENET,
        ),
        _adapted(
            "cellvta-dinov3-l",
            "vit_large_patch16_dinov3",
            {},
            "DINOv3 ViT-L/16, arXiv 2508.10104",
            "DINOv3 licence, gated",
            scaling=IMAGENET,
        ),
        _pannuke(
            "cellvit-256",
            "cellvit",
            {
                "dim": 384,
                "depth": 12,
                "heads": 6,
                "layer_scale": None,
                "taps": [3, 6, 9, 12],
                "positions": "dino",
                "tissue_classes": 19,
                "decoder_widths": [64, 128, 256, 312],
                "raised_widths": [256, 128],
            },
            **cellvit,
        ),
        *(
            _pannuke(
                f"cellvit-sam-{size}",
                "cellvit",
                {"backbone": backbone, "taps": taps, "positions": "cropped", "tissue_classes": 19},
                **cellvit,
            )
            for size, (backbone, _, taps) in sam.items()
        ),
        _pannuke(
            "cellvit-uni",
            "cellvit",
            {"taps": [6, 12, 18, 24], "tissue_classes": 19, "tissue_normalised": False},
            source="TIO-IKIM/CellViT-plus-plus, UNI ViT-L/16, PanNuke",
            licence="CellViT++: Apache-2.0 with Commons Clause; UNI: CC-BY-NC-ND-4.0, gated",
        ),
    ]


def _convolutional() -> list[ModelSpec]:
    """Networks without a transformer, for comparison."""
    as_it_is = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    hovernet = "doi:10.1016/j.media.2019.101563; vqdang/hover_net"
    fast = _pannuke(
        "hovernet-fast",
        "hovernet",
        {"mode": "fast"},
        source=f"{hovernet}, PanNuke",
        licence="code MIT; weights from PanNuke: CC-BY-NC-SA-4.0",
        scaling=as_it_is,
    )
    return [
        replace(fast, halo_px=46, margin_px=46, tile_step=(8, 0)),
        replace(
            fast,
            name="hovernet-original",
            settings={"mode": "original"},
            tile_px=270,
            halo_px=95,
            margin_px=95,
            tile_step=(8, 6),
            class_names=CONSEP_CLASSES,
            class_colours=CONSEP_COLOURS,
            source=f"{hovernet}, CoNSeP",
            licence="code MIT; weights have terms of their own",
        ),
        replace(
            _pannuke(
                "ciscnet",
                "ciscnet",
                {},
                source="Team-ciscNet/ciscNet-CoNIC-Challenge-2022, CoNIC",
                licence="code MIT; weights have terms of their own",
            ),
            mpp=0.5,
            class_names=CONIC_CLASSES,
            class_colours=CONIC_COLOURS,
            answer="distances",
        ),
        replace(
            _pannuke(
                "pointnu-net",
                "pointnu",
                {},
                source="doi:10.1109/TETCI.2023.3281864; Kaiseem/PointNu-Net, PanNuke",
                licence="code MIT; weights have terms of their own",
            ),
            halo_px=64,
            tile_step=(32, 0),
            answer="points",
        ),
    ]


SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        *_family(),
        *_convolutional(),
        _small("cellvta-nano", dim=64, prior_width=16, decoder_widths=[16, 32, 64, 96], tile_px=1024, halo_px=56),
        _small(
            "cellvta-small",
            dim=128,
            prior_width=32,
            decoder_widths=[32, 64, 128, 192],
            tile_px=512,  # with 1024 it is farther from the crops it was trained on
            halo_px=64,
            mpp=0.21,
            prior="efficientnet_lite0",
        ),
    )
}


MOST_WIDTH = 1 << 14  # four times what the largest networks have
MOST = {"depth": 256, "extra_extractors": 256, "cell_px": 16}


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
    for name, value in spec.settings.items():  # they may come with a file from elsewhere
        most = MOST.get(name, MOST_WIDTH)
        if isinstance(value, int | float) and not abs(value) <= most:
            raise ModelError(f"{spec.name}: {name} is {value!r}, no network has more than {most}")
    try:
        return ARCHITECTURES[spec.architecture](classes=len(spec.class_names), **spec.settings)
    except Exception as error:  # each layer refuses in its own way what makes no sense
        raise ModelError(
            f"{spec.name}: its settings do not make a {spec.architecture}: {one_line(error):.300}"
        ) from error
