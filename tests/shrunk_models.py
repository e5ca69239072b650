"""Every registered model at widths that a test can afford, built by the same code."""

from dataclasses import replace
from typing import Any

from wsipipe.model.registry import SPECS
from wsipipe.model.spec import ModelSpec

SMALL_BACKBONE = {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 4.0}


def shrunk(name: str) -> ModelSpec:
    """The spec of that name; what is wide is made narrow, what is deep shallow, the rest stays."""
    spec = SPECS[name]
    settings: dict[str, Any] = dict(spec.settings)
    if settings.get("dim", 1024) <= 64:
        return spec
    if spec.architecture in ("cellvta", "cellvit"):
        if "backbone" in settings:
            backbone = {**settings.get("backbone_settings", {}), **SMALL_BACKBONE}
            if settings["backbone"].startswith("samvit"):
                backbone["global_attn_indexes"] = [1, 3]
            settings["backbone_settings"] = backbone
        else:
            settings |= {"dim": 64, "depth": 4, "heads": 4}
        settings["decoder_widths"] = [8, 8, 16, 16]
    if spec.architecture == "cellvta":
        settings |= {"stages": None, "prior_width": 8, "attention_heads": 4, "gamma": 0.1, "drop_path": 0.0}
    if spec.architecture == "cellvit":
        settings |= {"taps": [1, 2, 3, 4], "raised_widths": [16, 8]}
    if spec.architecture == "hovernet":
        settings["width"] = 8
    if spec.architecture == "ciscnet":
        settings["widths"] = [8, 8, 16, 16, 16]
    if spec.architecture == "pointnu":
        settings |= {"width": 8, "bottlenecks": 1, "modules": [1, 1, 1], "blocks": 1}
        settings |= {"head_width": 8, "head_depth": 1, "pyramid_width": 8}
    return replace(spec, settings=settings)


def shown_px(spec: ModelSpec) -> tuple[int, int]:
    """Height and width of a small image that the network takes; not square."""
    step, offset = spec.tile_step
    least = 2 * spec.margin_px + 64
    height = offset + step * (-(-(least - offset) // step))
    return height, height + 32
