"""Every registered model at widths that a test can afford, built by the same code."""

from dataclasses import replace
from typing import Any

from wsipipe.model.registry import SPECS
from wsipipe.model.spec import ModelSpec

# Sides of a test image where 64 x 96 px will not do.
SHOWN: dict[str, tuple[int, int]] = {}
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
    return replace(spec, settings=settings)
