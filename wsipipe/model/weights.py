"""Checkpoints: the only place that opens files with weights.

A wsipipe checkpoint is one safetensors file whose header carries the `ModelSpec` as JSON under `wsipipe_spec`. Files
that others saved with PyTorch are recognised by what they hold (`wsipipe.model.upstream`). They are pickles, which can
ask for code to be run: only tensors and plain values are let through. They are mapped into memory, so that what lies
beside the weights, an optimizer's state of a gigabyte, stays on the disk.
"""

import hashlib
import json
import logging
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from wsipipe.atomic import finished
from wsipipe.errors import ModelError
from wsipipe.model.encoder import Encoder
from wsipipe.model.prior import TaughtPrior
from wsipipe.model.registry import SPECS, build
from wsipipe.model.spec import ModelSpec
from wsipipe.model.upstream import encoder_state, prior_state, recognise, with_counters

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent.parent / "weights"
DEFAULT_MODEL = "cellvta-nano"
SPEC_KEY = "wsipipe_spec"
# Beyond what PyTorch lets through: numbers of numpy, such as the best score that CellVTA and CellViT save.
_NUMBERS: list[Any] = [
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
    *((cast(Any, np)._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def shipped_models() -> dict[str, Path]:
    """Names of the models whose weights come with the package, and their files."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.safetensors"))}


def shipped_sha256(path: Path) -> str | None:
    """What the sha256 of a shipped file must be. Raises OSError if the list of them is missing."""
    lines = (path.parent / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in map(str.split, lines)}.get(path.name)


def find_checkpoint(name: str | Path) -> Path:
    """The checkpoint file that `name` means: a shipped model, or a path.

    Raises
    ------
    ModelError
        If it is neither, or a known model whose weights are not here.
    """
    shipped = shipped_models()
    if str(name) in shipped:
        return shipped[str(name)]
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in SPECS:
        raise ModelError(f"the weights of {name} do not ship with wsipipe; pass --model with the path of a checkpoint")
    raise ModelError(f"'{name}' is neither a shipped model ({', '.join(shipped) or 'none'}) nor a file")


def read_spec(path: Path) -> ModelSpec:
    """The spec of a checkpoint, ours or another project's, without reading its weights."""
    if not _is_safetensors(path):
        return read_upstream(path)[0]
    header = _header(path)
    if SPEC_KEY not in header:
        raise ModelError(f"{path} holds weights but no wsipipe description of their network")
    return ModelSpec.from_json(header[SPEC_KEY])


def load_model(name: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, ModelSpec, str]:
    """Network in eval mode, its spec, and the sha256 of the checkpoint, which may be another project's.

    Raises
    ------
    ModelError
        If the file is missing or damaged, or its weights are not exactly those of the network it describes.
    """
    path = find_checkpoint(name)
    digest = sha256(path)
    if path.parent == SHIPPED and digest != shipped_sha256(path):
        raise ModelError(f"{path} is not as shipped, its sha256 is {digest}; install wsipipe anew")
    network, spec = open_checkpoint(path)
    return network.eval().to(device), spec, digest


def open_checkpoint(path: Path) -> tuple[nn.Module, ModelSpec]:
    """Network and spec of a checkpoint, ours or another project's. Raises ModelError as `load_model` does."""
    if _is_safetensors(path):
        spec, weights = read_spec(path), read_weights(path)
    else:
        spec, weights = read_upstream(path)
    with torch.device("meta"):  # without memory: a description may lie about the size of its network
        check_weights(path, build(spec), weights)
    network = build(spec)
    network.load_state_dict(weights, strict=True)
    return network, spec


def convert(source: Path, out: Path) -> ModelSpec:
    """Write another project's checkpoint as one of ours. Raises ModelError as `load_model` does, and writes nothing."""
    network, spec = open_checkpoint(source)
    save_checkpoint(out, network, spec, {"converted_from": source.name, "sha256": sha256(source)})
    return spec


def read_notes(path: Path) -> dict[str, Any]:
    """What training noted in one of our checkpoints, or whoever changed it since; nothing of another project's.

    Raises ModelError if damaged.
    """
    if not _is_safetensors(path):
        return {}
    try:
        notes = json.loads(_header(path).get("wsipipe_notes", "{}"))
    except ValueError as error:
        raise ModelError(f"the notes in {path} are no JSON: {error}") from error
    if not isinstance(notes, dict):
        raise ModelError(f"the notes in {path} are no JSON by name")
    return notes


def inspect(path: Path) -> dict[str, str]:
    """What a file of weights is, line by line. Raises ModelError as `load_model` does."""
    ours = _is_safetensors(path)
    notes = read_notes(path) if ours else dict(read_pickle(path))
    network, spec = open_checkpoint(path)
    size = sum(weight.numel() for weight in network.parameters()) / 1e6
    rows = {
        "file": f"{path}, {path.stat().st_size / 1e6:,.1f} MB, {'wsipipe safetensors' if ours else 'PyTorch'}",
        "sha256": sha256(path),
        "model": f"{spec.name}: {spec.architecture}, {size:,.2f} M parameters, all there and finite",
        "runs at": f"{spec.mpp:g} µm/px, tiles of {spec.tile_px} px with {spec.halo_px} px of context",
        "types": ", ".join(spec.class_names[1:]) or "none",
        "normalisation": f"mean {spec.mean}, standard deviation {spec.std} of RGB in [0, 1]",
        "made by": spec.source,
        "licence": spec.licence,
        "settings": json.dumps(spec.settings),
    }
    told = {key: notes[key] for key in ("arch", "epoch", "best_epoch", "best_metric", "step", "by") if key in notes}
    if told:
        rows["training"] = ", ".join(f"{key} {value}" for key, value in told.items())
    return rows


def read_upstream(path: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Spec and weights, under our names, of a checkpoint that another project saved with PyTorch."""
    spec, weights = recognise(read_pickle(path), path.stem)
    with torch.device("meta"):
        expected = build(spec).state_dict()
    return spec, with_counters(weights, expected)


def read_pickle(path: Path) -> Mapping[str, Any]:
    """What a file of PyTorch holds; its tensors are mapped, not read.

    Raises
    ------
    ModelError
        If it is none, is damaged, or asks for anything but tensors and plain values when it is opened.
    """
    try:
        with torch.serialization.safe_globals(_NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is surprised by pickles of other versions, then reads or refuses them
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise ModelError(f"{path} is damaged, or not a file of weights that PyTorch saved") from error
        raise ModelError(
            f"{path} asks for {asked[1]} when it is opened; a file of weights holds tensors, numbers and texts alone. "
            "It may be harmful, nothing of it was run"
        ) from error
    except Exception as error:  # whatever a damaged archive makes it raise
        raise ModelError(f"{path} is damaged, or not a file of weights that PyTorch saved: {_line(error)}") from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ModelError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    return content


def load_encoder(encoder: Encoder, source: str | Path) -> None:
    """Give an encoder pretrained weights.

    Parameters
    ----------
    encoder : Encoder
        Of a network to be trained. Positions of another grid are resampled.
    source : path or name
        A file of UNI (`pytorch_model.bin`), of SAM (`.pth`) or of timm (`.safetensors`); or what timm takes for a
        name: `samvit_base_patch16.sa1b`, or `hf-hub:MahmoodLab/UNI`, which need a network the first time.

    Raises
    ------
    ModelError
        If there is no such file or name, or it is the weights of another encoder.
    """
    path = Path(source)
    if path.is_file():
        found: dict[str, Tensor] | None = encoder_state(
            read_weights(path) if _is_safetensors(path) else read_pickle(path)
        )
    else:
        found = dict(_from_hub(str(source)))
    if found is None:
        raise ModelError(f"{source} holds no encoder that wsipipe knows; expected are files of UNI, SAM or timm")
    expected = encoder.state_dict()
    weights = {key: value.float() for key, value in found.items() if key in expected}
    if "pos_embed" in weights and weights["pos_embed"].ndim == 3 == expected["pos_embed"].ndim:
        try:
            weights["pos_embed"] = _fitting_positions(encoder, weights["pos_embed"], expected["pos_embed"])
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            shape = tuple(weights["pos_embed"].shape)
            raise ModelError(f"{source}: pos_embed of shape {shape} holds the positions of no square grid") from error
    check_weights(path, encoder, weights)
    encoder.load_state_dict(weights, strict=True)
    log.info("encoder: %d tensors from %s", len(weights), source)


def load_prior(prior: TaughtPrior, path: str | Path) -> None:
    """Give the CNN of a prior pretrained weights.

    Parameters
    ----------
    path : path
        A file of timm (`.safetensors`, `.pth`) or of EfficientNet-PyTorch (`.pth`) with this CNN's weights. Layers
        above those that the prior uses are left out.

    Raises
    ------
    ModelError
        If there is no such file, or it is the weights of another CNN.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path} is no file; give the one that holds the weights of {prior.name}")
    found = prior_state(read_weights(path) if _is_safetensors(path) else read_pickle(path), prior.blocks)
    if found is None:
        raise ModelError(
            f"{path} holds no CNN that wsipipe knows; expected is {prior.name}, of timm or EfficientNet-PyTorch"
        )
    weights = {key: value for key, value in found.items() if key in prior.cnn.state_dict()}
    check_weights(path, prior.cnn, weights)
    prior.cnn.load_state_dict(weights)
    log.info("prior: %d tensors from %s", len(weights), path)


def _from_hub(name: str) -> dict[str, Tensor]:
    try:
        vit = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise ModelError(
            f"'{name}' is neither a file nor weights that timm can download ({_line(error)}); on a machine without a "
            "network, or for weights that need a login, download the file elsewhere and give its path"
        ) from error
    return dict(vit.state_dict())


def _fitting_positions(encoder: Encoder, positions: Tensor, expected: Tensor) -> Tensor:
    if positions.shape == expected.shape:
        return positions
    prefix = expected.shape[1] - math.isqrt(expected.shape[1]) ** 2  # of class token and registers, if they have any
    side = math.isqrt(expected.shape[1] - prefix)
    resampled: Tensor = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=prefix)
    return resampled


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {_line(error)}") from error


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {_line(error)}") from error


def _is_safetensors(path: Path) -> bool:
    """By name or content: its header is JSON, which begins at the ninth byte."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _line(error: BaseException) -> str:
    """What an error says first."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def check_weights(path: Path, network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise ModelError unless names, shapes and values fit `network`, saying what was expected and what was found."""
    expected = network.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise ModelError(
            f"{path} does not fit its network: {len(missing)} tensors are missing ({', '.join(missing[:3]) or '-'}), "
            f"{len(extra)} do not belong ({', '.join(extra[:3]) or '-'})"
        )
    for key, tensor in expected.items():
        if weights[key].shape != tensor.shape:
            raise ModelError(f"{path}: {key} has shape {tuple(weights[key].shape)}, expected {tuple(tensor.shape)}")
        if not torch.isfinite(weights[key]).all():
            raise ModelError(f"{path}: {key} holds values that are not finite")


def save_checkpoint(path: Path, network: nn.Module, spec: ModelSpec, notes: dict[str, object] | None = None) -> None:
    """Write weights and spec as one file; it takes its name only when complete. `notes` go into the header as JSON."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    about = {SPEC_KEY: spec.to_json(), "wsipipe_notes": json.dumps(notes or {}, sort_keys=True)}
    header, data = _in_order(save(tensors, about))
    with finished(path) as partial, partial.open("wb") as file:
        file.write(header)
        file.write(data)


def _in_order(checkpoint: bytes) -> tuple[bytes, memoryview]:
    """Header and tensors of a safetensors file: the same weights have the same sha256, however the library sorts."""
    end = 8 + int.from_bytes(checkpoint[:8], "little")
    header = json.dumps(json.loads(checkpoint[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header, memoryview(checkpoint)[end:]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
