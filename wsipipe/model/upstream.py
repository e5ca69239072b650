"""The files of others, recognised by what they hold: names and shapes of tensors to our spec and our names.

Nothing here opens a file; `wsipipe.model.weights` does.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wsipipe.errors import ModelError, one_line
from wsipipe.model.registry import CONIC_CLASSES, CONIC_COLOURS, PANNUKE_CLASSES, PANNUKE_COLOURS, SPECS
from wsipipe.model.spec import ModelSpec

State = Mapping[str, Tensor]
Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]

# CellVTA (JieZheng-ShanghaiTech/CellVTA d323bc3) and CellViT, whose names it took over: theirs -> ours, in this order.
_CELLVTA: Rules = [
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
_SAM_ENCODER: Rules = [(r"^image_encoder\.", ""), (r"\.mlp\.lin([12])\.", r".mlp.fc\1.")]

# Blocks of EfficientNet-PyTorch: its layers -> timm's, with a convolution that expands before the depthwise one or not.
_EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}

HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}  # of the ViTs in use; no shape tells it
OUR_ENCODER = "encoder.vit."
COUNTER = "num_batches_tracked"


def cellvta_key(theirs: str) -> str:
    """Our name of a tensor that CellVTA's files call `theirs`; names it does not know come back as they are."""
    return _renamed(theirs, _CELLVTA)


def recognise(content: Mapping[str, Any], name: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Spec and weights, under our names, of a checkpoint of another project.

    Parameters
    ----------
    content
        What the file holds: tensors by name, or these in an entry beside others.
    name : str
        Of the model to be.

    Raises
    ------
    ModelError
        If it is none that this software knows; says what it looks like.
    """
    state = _state_of(content)
    for has, take in _PROJECTS:
        if has <= state.keys():
            try:
                spec, weights = take(state, _flat(content.get("config")), name)
                spec.require_sense()
            except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
                raise ModelError(
                    f"{name} looks like a {take.__name__[1:]} but is not whole: {one_line(error):.300}"
                ) from error
            return spec, weights
    if encoder_state(state) is not None:
        raise ModelError(
            f"{name} holds the weights of an encoder alone: it can start a training ('encoder'), not find nuclei"
        )
    some = ", ".join(sorted(map(str, state))[:3]) or "nothing"
    raise ModelError(
        f"{name} holds no network that wsipipe knows: its {len(state)} tensors begin with {some}; expected are those "
        "of CellVTA, CellViT, CellViT++, HoVer-Net, CISCNet or PointNu-Net"
    )


def encoder_state(content: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Tensors of a ViT under timm's names, from a file of UNI, SAM, timm or of ours; None if it holds none."""
    state = _state_of(content)
    if any(key.startswith(OUR_ENCODER) for key in state):
        state = {key.removeprefix(OUR_ENCODER): value for key, value in state.items() if key.startswith(OUR_ENCODER)}
    if any(key.startswith("image_encoder.") for key in state):
        state = {_renamed(key, _SAM_ENCODER): value for key, value in state.items() if key.startswith("image_encoder.")}
    return dict(state) if "patch_embed.proj.weight" in state else None


def prior_state(content: Mapping[str, Any], blocks: Sequence[int]) -> dict[str, Tensor] | None:
    """Tensors of an EfficientNet under timm's names, from a file of timm or EfficientNet-PyTorch; None if it is none.

    `blocks` is how many there are in each of its stages, which the latter numbers in one row.
    """
    state = _state_of(content)
    if "_conv_stem.weight" not in state:
        return dict(state) if "conv_stem.weight" in state else None
    places = [f"blocks.{stage}.{block}" for stage, count in enumerate(blocks) for block in range(count)]
    renamed = {}
    for key, value in state.items():
        if found := re.match(r"_blocks\.(\d+)\.(_\w+)\.(\w+)$", key):
            number, layer, kind = int(found[1]), found[2], found[3]
            names = _EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else _PLAIN
            if number < len(places) and layer in names:
                renamed[f"{places[number]}.{names[layer]}.{kind}"] = value
        else:
            renamed[re.sub(r"^_bn0\.", "bn1.", re.sub(r"^_conv_stem\.", "conv_stem.", key))] = value
    return renamed


def _state_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, whatever they are wrapped in."""
    found: Any = content
    for key in ("model_state_dict", "desc", "seg", "state_dict", "model", "teacher"):
        if isinstance(found.get(key), Mapping):
            found = found[key]
            break
    state = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    for key, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # one number may stand for many
            raise ModelError(f"the tensor {key} of shape {tuple(value.shape)} has fewer values in the file than places")
    if state and all(key.startswith("module.") for key in state):  # of DataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _renamed(key: str, rules: Rules) -> str:
    for pattern, ours in rules:
        key = re.sub(pattern, ours, key)
    return key


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config as published, with "." between its levels, whether it is stored nested or flat."""
    if not isinstance(config, Mapping):
        return {}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        place = f"{prefix}{key}"
        flat.update(_flat(value, f"{place}.") if isinstance(value, Mapping) else {place: value})
    return flat


def _count(keys: Iterable[str], pattern: str) -> int:
    """1 + the highest number that the group of `pattern` takes in any key."""
    found = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
    return 1 + max(found, default=-1)


def _described(spec: ModelSpec, config: Mapping[str, Any], classes: int, name: str) -> ModelSpec:
    """The spec with what a config says of normalisation, resolution and classes."""
    mean, std = (
        _three(config.get(f"transformations.normalize.{what}"), default)
        for what, default in (("mean", spec.mean), ("std", spec.std))
    )
    magnification = config.get("data.magnification")
    mpp = 10.0 / magnification if isinstance(magnification, int | float) and magnification > 0 else spec.mpp
    prefix = "dataset_config.nuclei_types."
    given = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    ids = {value: key for key, value in given.items() if isinstance(value, int)}
    if sorted(ids) == list(range(classes)):
        names = ("background", *(ids[k].lower().replace("_", " ") for k in range(1, classes)))
    elif classes == len(PANNUKE_CLASSES):
        names = PANNUKE_CLASSES
    elif classes == len(CONIC_CLASSES):
        names = CONIC_CLASSES
    else:
        names = ("background", *(f"type {k}" for k in range(1, classes)))
    known = dict(zip(PANNUKE_CLASSES, PANNUKE_COLOURS, strict=True))
    spare = [colour for colour in CONIC_COLOURS[1:] if colour not in {known.get(each) for each in names}]
    colours = [known[each] if each in known else _colour(k, spare) for k, each in enumerate(names)]
    return replace(spec, name=name, mean=mean, std=std, mpp=mpp, class_names=tuple(names), class_colours=tuple(colours))


def _three(values: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(v, int | float) for v in values):
        return float(values[0]), float(values[1]), float(values[2])
    return default


def _colour(k: int, spare: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    return spare.pop(0) if spare else ((67 * k) % 256, (139 * k) % 256, (211 * k) % 256)


def _vit(state: State, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a plain ViT, from the shapes of its tensors under `encoder.`."""
    dim = state["encoder.patch_embed.proj.weight"].shape[0]
    heads = HEADS.get(dim) or config.get("model.num_heads")
    if not isinstance(heads, int) or dim % heads:
        raise ModelError(f"a ViT of width {dim} is none of those in use; its number of heads cannot be told")
    return {
        "dim": dim,
        "depth": _count(state, r"encoder\.blocks\.(\d+)\."),
        "heads": heads,
        "layer_scale": 1e-5 if "encoder.blocks.0.ls1.gamma" in state else None,
    }


def _decoder_widths(state: State) -> list[int]:
    return [
        *(state[key].shape[0] for key in ("decoder0.1.block.0.weight",)),
        *(state[f"hv_map_decoder.decoder{k}_upsampler.0.block.0.weight"].shape[0] for k in (1, 2, 3)),
    ]


def _classes(state: State) -> int:
    return int(state["nuclei_type_maps_decoder.decoder0_header.2.weight"].shape[0])


def _cellvta(state: State, config: Mapping[str, Any], name: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    vit = _vit(state, config)
    extractor = "encoder.interactions.0.extractor."
    settings = {
        **vit,
        "prior_width": state["encoder.spm.stem.0.weight"].shape[0],
        "attention_heads": state[f"{extractor}attn.attention_weights.weight"].shape[0] // 4,  # of 4 points each
        "attention_ratio": state[f"{extractor}attn.value_proj.weight"].shape[0] / vit["dim"],
        "ffn_ratio": state[f"{extractor}ffn.fc1.weight"].shape[0] / vit["dim"],
        "extra_extractors": _count(state, r"encoder\.interactions\.3\.extra_extractors\.(\d+)\."),
        "tissue_classes": state["encoder.head.weight"].shape[0] if "encoder.head.weight" in state else 0,
        "decoder_widths": _decoder_widths(state),
    }
    spec = replace(SPECS["cellvta-uni"], settings=settings)
    weights = {cellvta_key(key): value for key, value in state.items()}
    return _described(spec, config, _classes(state), name), weights


def _cellvit(state: State, config: Mapping[str, Any], name: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    tissues = next(
        (state[key].shape[0] for key in ("encoder.head.weight", "classifier_head.weight") if key in state), 0
    )
    raised = [state[f"decoder1.{k}.block.0.weight"].shape[1] for k in (0, 1)]
    common = {"tissue_classes": tissues, "decoder_widths": _decoder_widths(state), "raised_widths": raised}
    depth = _count(state, r"encoder\.blocks\.(\d+)\.")
    taps = [depth * k // 4 for k in (1, 2, 3, 4)]
    if "encoder.neck.0.weight" in state:
        dim = state["encoder.pos_embed"].shape[-1]
        size = {768: "b", 1024: "l", 1280: "h"}.get(dim)
        if size is None:
            raise ModelError(f"an encoder of SAM of width {dim} is none of those in use (768, 1024, 1280)")
        spec = SPECS[f"cellvit-sam-{size}"]
        spec = replace(spec, settings={**spec.settings, **common, "taps": taps})
    else:
        vit = _vit(state, config)
        base = SPECS["cellvit-256" if vit["layer_scale"] is None else "cellvit-uni"]
        chosen: dict[str, Any] = {
            key: base.settings[key] for key in ("positions", "tissue_normalised") if key in base.settings
        }
        spec = replace(base, settings={**vit, **chosen, **common, "taps": taps})
    weights = {cellvta_key(key): value for key, value in state.items()}
    return _described(spec, config, _classes(state), name), weights


def _hovernet(state: State, config: Mapping[str, Any], name: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    mode = "fast" if state["decoder.np.u3.conva.weight"].shape[-1] == 3 else "original"
    classes = int(state["decoder.tp.u0.conv.weight"].shape[0]) if "decoder.tp.u0.conv.weight" in state else 1
    base = SPECS[f"hovernet-{mode}"]
    base = replace(base, settings={"mode": mode, "width": state["conv0./.weight"].shape[0]})
    weights = {key: value for key, value in state.items() if key != "upsample2x.unpool_mat"}  # a constant
    if classes == len(base.class_names):
        return replace(base, name=name), weights
    if (mode, classes) == ("fast", 5):  # as published for MoNuSAC
        names = ("background", "epithelial", "lymphocyte", "macrophage", "neutrophil")
        return replace(base, name=name, class_names=names, class_colours=PANNUKE_COLOURS[:5]), weights
    return _described(base, config, classes, name), weights


def _ciscnet(state: State, config: Mapping[str, Any], name: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    levels = _count(state, r"encoderConv\.(\d+)\.")
    widths = [state[f"encoderConv.{level}.conv.0.weight"].shape[0] for level in range(levels)]
    classes = 1 + int(state[f"decoderConv.{levels - 1}.weight"].shape[0])
    spec = replace(SPECS["ciscnet"], settings={"widths": widths})
    return _described(spec, config, classes, name), dict(state)


def _pointnu(state: State, config: Mapping[str, Any], name: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    stages = (_count(state, rf"pretrained\.stage{stage}\.(\d+)\.") for stage in (2, 3, 4))
    settings = {
        "width": state["pretrained.transition1.0.0.weight"].shape[0],
        "bottlenecks": _count(state, r"pretrained\.layer1\.(\d+)\."),
        "modules": list(stages),
        "blocks": _count(state, r"pretrained\.stage2\.0\.branches\.0\.(\d+)\."),
        "head_width": state["heads.head_kernel.weight"].shape[1],
        "head_depth": _count(state, r"heads\.cate_convs\.(\d+)\."),
        "pyramid_width": state["jpfm_1.dilation1.0.weight"].shape[0],
    }
    classes = 1 + int(state["heads.head_cate.weight"].shape[0])
    return _described(replace(SPECS["pointnu-net"], settings=settings), config, classes, name), dict(state)


_Take = Callable[[State, Mapping[str, Any], str], tuple[ModelSpec, dict[str, Tensor]]]
# By tensors that a project's files hold and those before it in the list do not.
_PROJECTS: list[tuple[set[str], _Take]] = [
    ({"encoder.spm.stem.0.weight", "nuclei_type_maps_decoder.decoder0_header.2.weight"}, _cellvta),
    ({"encoder.patch_embed.proj.weight", "nuclei_type_maps_decoder.bottleneck_upsampler.weight"}, _cellvit),
    ({"conv0./.weight", "decoder.np.u3.conva.weight"}, _hovernet),
    ({"encoderConv.0.conv.0.weight", "pooling.0.conv_pool.0.weight"}, _ciscnet),
    ({"pretrained.layer1.0.conv1.weight", "jpfm_1.dilation1.0.weight"}, _pointnu),
]


def with_counters(weights: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """The weights with the batch counters of BatchNorm that older files lack; nothing reads them when it runs."""
    missing = [key for key in expected if key.endswith(COUNTER) and key not in weights]
    return {**weights, **{key: torch.zeros((), dtype=torch.int64) for key in missing}}
