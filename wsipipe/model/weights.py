"""Checkpoints: the only place that opens files with weights.

A wsipipe checkpoint is one safetensors file whose header carries the `ModelSpec` as JSON under `wsipipe_spec`.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wsipipe.errors import ModelError
from wsipipe.model.registry import SPECS, build
from wsipipe.model.spec import ModelSpec

SHIPPED = Path(__file__).parent.parent / "weights"
DEFAULT_MODEL = "cellvta-nano"
SPEC_KEY = "wsipipe_spec"


def shipped_models() -> dict[str, Path]:
    """Names of the models whose weights come with the package, and their files."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.safetensors"))}


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
    """The spec in a checkpoint's header, without reading its weights."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    if SPEC_KEY not in header:
        raise ModelError(f"{path} holds weights but no wsipipe description of their network")
    return ModelSpec.from_json(header[SPEC_KEY])


def load_model(name: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, ModelSpec, str]:
    """Network in eval mode, its spec, and the sha256 of the checkpoint.

    Raises
    ------
    ModelError
        If the file is missing or damaged, or its weights are not exactly those of the network it describes.
    """
    path = find_checkpoint(name)
    spec = read_spec(path)
    network = build(spec)
    weights = read_weights(path)
    check_weights(path, network, weights)
    network.load_state_dict(weights, strict=True)
    return network.eval().to(device), spec, sha256(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


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
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, partial, {SPEC_KEY: spec.to_json(), "wsipipe_notes": json.dumps(notes or {}, sort_keys=True)})
    os.replace(partial, path)  # noqa: PTH105 - Path.replace would return a value nobody needs


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
