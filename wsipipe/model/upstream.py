"""Names of tensors in the files of others, translated to ours: one table for each project."""

import re
from collections.abc import Callable

# CellVTA (JieZheng-ShanghaiTech/CellVTA d323bc3) and CellViT, whose names it took over: theirs -> ours, in this order.
_CELLVTA: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^encoder\.(cls_token|pos_embed|reg_token|patch_embed\.|blocks\.|norm\.|neck\.)", r"encoder.vit.\1"),
    (r"^encoder\.norm([1-4])\.", lambda m: f"encoder.norms.{int(m[1]) - 1}."),
    (r"^(encoder\.head|classifier_head)\.", "encoder.tissue_head."),
    (r"^(encoder\..*\.mlp)\.lin([12])\.", r"\1.fc\2."),  # SAM's
    (r"^(encoder\..*\.ffn\.dwconv)\.dwconv\.", r"\1."),
    (r"^decoder([0-3])\.", r"decoder.skips.level\1."),
    (r"^nuclei_binary_map_decoder\.", "decoder.branches.nuclei."),
    (r"^hv_map_decoder\.", "decoder.branches.offsets."),
    (r"^nuclei_type_maps_decoder\.", "decoder.branches.types."),
    (r"\.bottleneck_upsampler\.(0\.)?", ".up4."),
    (r"\.decoder([1-3])_upsampler\.", r".up\1."),
    (r"\.decoder0_header\.", ".head."),
    (r"^(decoder\..*)\.block\.", r"\1."),
]


def cellvta_key(theirs: str) -> str:
    """Our name of a tensor that CellVTA's files call `theirs`; names it does not know come back as they are."""
    for pattern, ours in _CELLVTA:
        theirs = re.sub(pattern, ours, theirs)
    return theirs
