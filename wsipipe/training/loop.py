"""Train a network on patch sets: data, step, validate, save, from top to bottom.

A run is a folder: `config.json` (what was asked for), `log.csv` (a line every `log_every` steps), `last.pt` (everything
that is needed to go on), `best.safetensors` (averaged weights of the best validation, ready for `segment`). Killed at
any point, the same call goes on from `last.pt` as if nothing had happened: crop i of a run is a function of the seed
and i alone.
"""

import csv
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import ConcatDataset, DataLoader

from wsipipe import __version__
from wsipipe.config import faults
from wsipipe.device import choose_device, choose_precision
from wsipipe.errors import ConfigError, StoreError
from wsipipe.model.registry import SPECS, build
from wsipipe.model.spec import ModelSpec
from wsipipe.model.weights import save_checkpoint
from wsipipe.training.augment import load_recipe
from wsipipe.training.data import FixedCrops, Item, MixedCrops, PatchSet, Source, same_classes, start_worker
from wsipipe.training.losses import CellVTALoss, LossWeights

log = logging.getLogger(__name__)


class TrainConfig(BaseModel, frozen=True, extra="forbid"):
    """One experiment. Everything in it is stored with the weights."""

    model: str = Field("cellvta-nano", description="name in the registry")
    data: dict[Path, float] = Field(description="folders of patch sets, and how often each is drawn")
    recipe: str | dict[str, Any] = Field("default", description="augmentation: a name, or written out")
    crop_px: int = Field(256, gt=0, multiple_of=16)
    hv_variant: Literal["published", "exact"] = "exact"
    trains: Literal["all", "adapter", "decoder"] = Field("all", description="what of the network learns")
    losses: dict[str, float] = Field({}, description="weights of losses that differ from the published")
    double_softmax: bool = Field(False, description="softmax twice for the Tversky losses, as published")
    steps: int = Field(gt=0)
    batch_size: int = Field(8, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay_share: float = Field(0.3, ge=0, le=1, description="share of the steps over which the rate falls to 0")
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(0.02, ge=0)
    clip_norm: float = Field(5.0, gt=0, description="longest gradient")
    ema_decay: float = Field(0.998, ge=0, lt=1, description="of the averaged weights, which are validated and kept")
    validate_every: int = Field(200, gt=0)
    log_every: int = Field(10, gt=0)
    seed: int = 19
    workers: int = Field(1, ge=0)
    device: str = "auto"
    precision: str = "auto"


def load_experiment(path: Path) -> TrainConfig:
    """Settings of a run from a YAML file.

    Raises
    ------
    ConfigError
        If the file cannot be read, or with every setting that is unknown, missing or out of range.
    """
    try:
        return TrainConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as an experiment: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {faults(error)}") from error


def train(config: TrainConfig, run: Path) -> Path:
    """Train, or go on with a run that was interrupted; the path of the best checkpoint.

    Raises
    ------
    ConfigError
        If the model is unknown, or the data name other classes than the model.
    DataError
        If a patch set does not hold what its layout promises.
    StoreError
        If `run` holds a run with other settings.
    """
    spec, sets = _spec(config), {folder: PatchSet.open(folder) for folder in config.data}
    classes = same_classes(list(sets.values()))
    if classes is not None and classes != spec.class_names:
        raise ConfigError(f"{spec.name} tells {spec.class_names} apart, but the data name {classes}")
    _claim(run, config)

    device = choose_device(config.device)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choose_precision(config.precision, device)]
    torch.manual_seed(config.seed)
    network = build(spec).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    _freeze(network, config.trains)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(_groups(network, config.weight_decay), lr=config.learning_rate, betas=config.betas)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    criterion = CellVTALoss(replace(LossWeights(), **config.losses), double_softmax=config.double_softmax)
    parts = {"network": network, "averaged": averaged, "optimizer": optimizer, "scaler": scaler}
    step, best = _resume(run / "last.pt", parts)
    log.info(
        "training %s (%.2f M parameters, %.2f M learn) on %s from step %d of %d",
        spec.name,
        sum(p.numel() for p in network.parameters()) / 1e6,
        sum(p.numel() for p in learning) / 1e6,
        device,
        step,
        config.steps,
    )

    started, first = time.monotonic(), step
    for batch in _batches(config, sets, step):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate(step, config)
        image = normalised(batch.pop("image"), spec, device)
        target = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        network.train()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = network(image)
        loss, losses = criterion(output, target)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learning, config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        averaged.update_parameters(network)
        step += 1

        if step % config.log_every == 0:
            seconds = (time.monotonic() - started) / (step - first)
            values = {"loss": loss.item(), **{name: part.item() for name, part in losses.items()}}
            _write_log(run / "log.csv", {"step": step, "seconds": seconds, "norm": norm.item(), **values})
            left = (config.steps - step) * seconds / 60
            log.info("step %d: loss %.3f, %.2f s a step, %.0f min left", step, values["loss"], seconds, left)
        if step % config.validate_every == 0 or step == config.steps:
            error = validate(averaged.module, criterion, _validation(config, sets), spec, device)
            _write_log(run / "validation.csv", {"step": step, "loss": error})
            log.info("step %d: validation loss %.4f (best so far %.4f)", step, error, best)
            if error <= best:
                best = error
                notes: dict[str, object] = {"step": step, "config": config.model_dump(mode="json"), "by": __version__}
                save_checkpoint(run / "best.safetensors", averaged.module, spec, notes)
            _save(run / "last.pt", step, best, parts)
    return run / "best.safetensors"


def rate(step: int, config: TrainConfig) -> float:
    """Factor of the learning rate: up over the warm-up, flat, then down along a cosine to 0."""
    falling = max(1, round(config.steps * config.decay_share))
    left = min(1.0, (config.steps - step) / falling)
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * (1 - math.cos(math.pi * left)) / 2


def normalised(image: Tensor, spec: ModelSpec, device: torch.device) -> Tensor:
    """(B, 3, H, W) uint8 as the float32 input of a network, on its device."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    image = image.to(device, non_blocking=True).float() / 255
    return ((image - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def validate(
    network: nn.Module, criterion: CellVTALoss, loader: DataLoader[Item], spec: ModelSpec, device: torch.device
) -> float:
    """Mean loss over the crops of a loader, weights of the batches as they are."""
    network.eval()
    losses: list[float] = []
    for batch in loader:
        image = normalised(batch.pop("image"), spec, device)
        target = {name: value.to(device) for name, value in batch.items()}
        losses.append(criterion(network(image), target)[0].item())
    return sum(losses) / len(losses)


def _spec(config: TrainConfig) -> ModelSpec:
    if config.model not in SPECS:
        raise ConfigError(f"no model is called '{config.model}'; there are: {', '.join(SPECS)}")
    return SPECS[config.model]


def _claim(run: Path, config: TrainConfig) -> None:
    """Put the settings into a new run; refuse a run that was begun with others (its length may change)."""
    run.mkdir(parents=True, exist_ok=True)
    path, wanted = run / "config.json", config.model_dump(mode="json")
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        free = {"steps", "workers", "log_every", "validate_every", "device"}
        changed = [key for key in wanted if key not in free and begun.get(key) != wanted[key]]
        if changed:
            said = "; ".join(f"{key}: {begun.get(key)} there, {wanted[key]} asked for" for key in changed)
            raise StoreError(f"{run} holds a run with other settings ({said}); choose another folder")
    path.write_text(json.dumps(wanted, indent=1), encoding="utf-8")


def _freeze(network: nn.Module, trains: str) -> None:
    """Leave to learn all, all but the ViT's own weights ("adapter"), or the decoder."""
    if trains == "all":
        return
    frozen = "encoder." if trains == "decoder" else "encoder.vit."
    for name, parameter in network.named_parameters():
        parameter.requires_grad = not name.startswith(frozen)


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; norms, biases and embeddings do not."""
    learning = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    decays = [p for name, p in learning if p.ndim > 1 and "embed" not in name.rsplit(".", 1)[-1]]
    ids = {id(p) for p in decays}
    rest = [p for _, p in learning if id(p) not in ids]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _batches(config: TrainConfig, sets: dict[Path, PatchSet], step: int) -> Iterator[Item]:
    sources = [Source(sets[folder], weight) for folder, weight in config.data.items()]
    crops = MixedCrops(
        sources,
        load_recipe(config.recipe),
        config.steps * config.batch_size,
        seed=config.seed,
        crop_px=config.crop_px,
        hv_variant=config.hv_variant,
    )
    return iter(
        DataLoader(
            crops,
            config.batch_size,
            sampler=range(step * config.batch_size, len(crops)),
            num_workers=config.workers,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
        )
    )


def _validation(config: TrainConfig, sets: dict[Path, PatchSet]) -> DataLoader[Item]:
    """Crops side by side over the validation images of every set that has any."""
    mpp = _spec(config).mpp
    crops = [FixedCrops(patches, mpp=mpp, crop_px=config.crop_px) for patches in sets.values()]
    held = [part for part in crops if len(part)]
    if not held:
        raise ConfigError("none of the data has images in the split 'validation'; the best weights cannot be told")
    return DataLoader(ConcatDataset(held), config.batch_size, num_workers=config.workers, worker_init_fn=start_worker)


def _save(path: Path, step: int, best: float, parts: dict[str, Any]) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    partial = path.with_name(path.name + ".partial")
    torch.save({"step": step, "best": best, "rng": torch.get_rng_state(), **state}, partial)
    os.replace(partial, path)  # noqa: PTH105 - Path.replace would return a value nobody needs


def _resume(path: Path, parts: dict[str, Any]) -> tuple[int, float]:
    if not path.exists():
        return 0, math.inf
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    return int(state["step"]), float(state["best"])


def _write_log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})
