"""Train a network on patch sets: data, step, validate, save, from top to bottom.

A run is a folder: `config.json` (what was asked for), `data.json` (what the data were), `log.csv` and `tensorboard/`
(losses), `validation.csv`, `last.pt` (everything that is needed to go on), `best.safetensors` (the weights of the best
validation, ready for `segment`). Killed at any point, the same call goes on from `last.pt` as if nothing had happened:
crop i of a run, and whatever else is drawn in step i, is a function of the seed and i alone.

Several devices share every batch: `accelerate launch --num_processes 4 -m wsipipe train ...`. Accelerate and not
Lightning, because it wraps a network and leaves the loop to us; what it does here is to start processes, to add up
their gradients and to let one of them write.
"""

import csv
import json
import logging
import math
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import ConcatDataset, DataLoader, Sampler

from wsipipe import __version__
from wsipipe.atomic import finished
from wsipipe.device import choose_device, choose_precision
from wsipipe.errors import ConfigError, StoreError
from wsipipe.model.encoder import GRID_PX, Encoder
from wsipipe.model.registry import SPECS, build
from wsipipe.model.spec import ModelSpec
from wsipipe.model.weights import load_encoder, open_checkpoint, save_checkpoint
from wsipipe.training.augment import load_recipe
from wsipipe.training.config import FREE, VARIANT_SETTINGS, TrainConfig, load_experiment
from wsipipe.training.crop_targets import CropTargets
from wsipipe.training.crops import FixedCrops, Item, MixedCrops, Source, start_worker
from wsipipe.training.data import PatchSet, same_classes
from wsipipe.training.found import nuclei_of
from wsipipe.training.objectives import Objective, objective_of
from wsipipe.training.sampling import image_weights
from wsipipe.training.validation import validate
from wsipipe.training.widening import widen

__all__ = ["TrainConfig", "load_experiment", "train"]

log = logging.getLogger(__name__)

# Red, green, blue, yellow, orange, cyan, purple, brown: told apart on H&E.
COLOURS = (
    (255, 0, 0), (34, 221, 77), (35, 92, 236), (254, 255, 0),
    (255, 159, 68), (35, 255, 255), (150, 60, 220), (120, 80, 40),
)  # fmt: skip


def train(config: TrainConfig, run: Path) -> Path:
    """Train, or go on with a run that was interrupted; the path of the best checkpoint.

    The network gets the classes of the data, where these are typed, and of the tissues, where they name any and the
    network has a head for them.

    Raises
    ------
    ConfigError
        If the model is unknown or cannot be trained so, or a split is empty.
    DataError
        If a patch set does not hold what its layout promises.
    StoreError
        If `run` holds a run with other settings or data.
    """
    team = _team(config)
    sets = {folder: PatchSet.open(folder) for folder in config.data}
    if config.folds:
        sets = {folder: patches.with_folds(config.folds) for folder, patches in sets.items()}
    tissues = tuple(sorted({tissue for patches in sets.values() for tissue in patches.tissues}))
    spec = spec_of(config, same_classes(list(sets.values())), tissues)
    tissues = tissues if spec.settings.get("tissue_classes") else ()
    objective = objective_of(spec, config)
    crops = _crops(config, spec, sets, tissues, objective.targets)
    steps, epoch_steps = _length(config, crops.images)
    validate_every, save_every = _intervals(config, epoch_steps)
    if team.is_main_process:
        _claim(run, config, sets)
    team.wait_for_everyone()

    device = team.device if team.num_processes > 1 else choose_device(config.device)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choose_precision(config.precision, device)]
    torch.manual_seed(config.seed)
    network = build(spec)
    _take_weights(network, config)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    _freeze(network, config.trains)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = _groups(network, config.weight_decay, config.decays)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"network": network, "optimizer": optimizer, "scaler": scaler}
    kept = network
    if config.ema_decay:
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
        parts["averaged"], kept = averaged, averaged.module
    progress = _resume(run, parts)
    step = int(progress["step"])
    trained = team.prepare(_in_step(network, team)) if team.num_processes > 1 else network
    board = _board(run, config, step, team)
    log.info(
        "training %s (%.2f M parameters, %.2f M learn) on %d x %s from step %d of %d",
        spec.name,
        sum(p.numel() for p in network.parameters()) / 1e6,
        sum(p.numel() for p in learning) / 1e6,
        team.num_processes,
        device,
        step,
        steps,
    )

    started, first = time.monotonic(), step
    batches = _batches(config, crops, step, steps, team)
    while step < steps and not progress["ended"]:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate(step, config, steps, epoch_steps)
        # Whatever else is drawn, such as the paths that are dropped, depends on the step and nothing before it.
        torch.manual_seed((config.seed * 1_000_003 + step) * team.num_processes + team.process_index)
        network.train()
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number in range(config.accumulate):
            batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
            last = number == config.accumulate - 1
            with nullcontext() if last else team.no_sync(trained):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    output = trained(normalised(batch["image"], spec, device))
                loss, losses = objective.loss(output, batch)
                scaler.scale(loss / config.accumulate if config.accumulate > 1 else loss).backward()
            for name, part in {"loss": loss.detach(), **losses}.items():
                sums[name] = sums[name] + part if name in sums else part
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learning, math.inf if config.clip_norm is None else config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if config.ema_decay:
            averaged.update_parameters(network)
        step += 1

        if step % config.log_every == 0 and team.is_main_process:
            seconds = (time.monotonic() - started) / (step - first)
            values = {name: part.item() / config.accumulate for name, part in sums.items()}
            _write_log(run / "log.csv", {"step": step, "seconds": seconds, "norm": norm.item(), **values})
            for name, value in {**values, "rate": optimizer.param_groups[0]["lr"]}.items():
                board.add_scalar(f"train/{name}", value, step)
            left = str(timedelta(seconds=round((steps - step) * seconds)))
            log.info("step %d of %d: loss %.3f, %.2f s a step, %s left", step, steps, values["loss"], seconds, left)
        if step % validate_every == 0 or step == steps:
            if team.is_main_process:
                scores = _validate(kept, objective, config, spec, sets, tissues, device)
                _write_log(run / "validation.csv", {"step": step, **scores})
                for name, value in scores.items():
                    board.add_scalar(f"validation/{name}", value, step)
                if _is_best(scores[config.best_by], progress, config):
                    save_checkpoint(run / "best.safetensors", kept, spec, _notes(step, scores, config, sets))
                log.info("step %d: validation %s (best %s %.4f)", step, scores, config.best_by, progress["best"])
            progress = _shared(progress, team)
        progress["step"] = step
        if (step % save_every == 0 or step == steps or progress["ended"]) and team.is_main_process:
            _save(run / "last.pt", progress, parts)
    board.close()
    team.wait_for_everyone()
    if not (run / "best.safetensors").exists():
        raise StoreError(f"{run} has ended, but its best.safetensors is gone; train anew in another folder")
    return run / "best.safetensors"


def rate(step: int, config: TrainConfig, steps: int, epoch_steps: float) -> float:
    """Factor of the learning rate: up over the warm-up; then flat and down along a cosine to 0, or down every epoch."""
    rising = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "exponential":
        return rising * config.decay ** int(step / epoch_steps + 1e-9)
    falling = max(1, round(steps * config.decay_share))
    left = min(1.0, (steps - step) / falling)
    return rising * (1 - math.cos(math.pi * left)) / 2


def normalised(image: Tensor, spec: ModelSpec, device: torch.device) -> Tensor:
    """(B, 3, H, W) uint8 as the float32 input of a network, on its device."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    image = image.to(device, non_blocking=True).float() / 255
    return ((image - mean) / std).contiguous(memory_format=torch.channels_last)


# --- what is trained --------------------------------------------------------------------------------------------------


def spec_of(config: TrainConfig, classes: tuple[str, ...] | None, tissues: Sequence[str] = ()) -> ModelSpec:
    """The registry's spec, with the settings of the experiment and the classes of the data.

    Raises
    ------
    ConfigError
        If there is no such model, or it takes no crops of that side.
    """
    if config.model not in SPECS:
        raise ConfigError(f"no model is called '{config.model}'; there are: {', '.join(SPECS)}")
    spec = SPECS[config.model]
    settings = {**spec.settings, **config.settings}
    if config.variant is not None and spec.architecture == "cellvta":
        settings = {**spec.settings, **VARIANT_SETTINGS[config.variant], **config.settings}
    if settings.get("tissue_classes"):
        settings["tissue_classes"] = len(tissues)
    spec = replace(spec, settings=settings, mpp=config.mpp or spec.mpp)
    if "cell_px" in settings:
        spec = replace(spec, tile_step=(GRID_PX * settings["cell_px"], 0))
    spec.require_side("crop_px", config.crop_px)
    if classes is not None and classes != spec.class_names:
        colours = ((0, 0, 0), *(COLOURS[i % len(COLOURS)] for i in range(len(classes) - 1)))
        spec = replace(spec, class_names=classes, class_colours=colours)
    return spec


def _take_weights(network: nn.Module, config: TrainConfig) -> None:
    """Start from other weights: a narrower network's, the ViT's (`encoder`), or all that fit (`start_from`)."""
    own = network.state_dict()
    if config.widen_from is not None:
        widen(open_checkpoint(config.widen_from)[0], network, config.seed)
        log.info("starts as the equal of %s", config.widen_from)
    if config.start_from is not None:
        found = open_checkpoint(config.start_from)[0].state_dict()
        fitting = {key: value for key, value in found.items() if key in own and own[key].shape == value.shape}
        if not fitting:
            raise ConfigError(f"{config.start_from} has no tensor of a {config.model}")
        network.load_state_dict(fitting, strict=False)
        log.info("%d of %d tensors are those of %s", len(fitting), len(own), config.start_from)
    if config.encoder is not None:
        vit = getattr(getattr(network, "encoder", None), "vit", None)
        if not isinstance(vit, Encoder):
            raise ConfigError(f"{config.model} has no ViT that could start with {config.encoder}; leave encoder out")
        load_encoder(vit, config.encoder)


def _freeze(network: nn.Module, trains: str) -> None:
    """Leave to learn all, all but the ViT's own weights ("adapter"), or the decoder.

    The ViT's last norm leads to the head for tissues and nowhere else: it learns with the adapter.
    """
    if trains == "all":
        return
    frozen = "encoder." if trains == "decoder" else "encoder.vit."
    names = [name for name, _ in network.named_parameters() if name.startswith(frozen)]
    if not names:
        raise ConfigError(f"this network has no {frozen.rstrip('.')} to freeze; set trains: all")
    for name, parameter in network.named_parameters():
        last_norm = trains == "adapter" and name.startswith("encoder.vit.norm.")
        parameter.requires_grad = not name.startswith(frozen) or last_norm


def _groups(network: nn.Module, weight_decay: float, decays: str) -> list[dict[str, Any]]:
    """Matrices and kernels decay; norms, biases and embeddings do not, unless all is to."""
    learning = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if decays == "all":
        return [{"params": [p for _, p in learning], "weight_decay": weight_decay}]
    decaying = [p for name, p in learning if p.ndim > 1 and "embed" not in name.rsplit(".", 1)[-1]]
    ids = {id(p) for p in decaying}
    rest = [p for _, p in learning if id(p) not in ids]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


# --- what it is trained on --------------------------------------------------------------------------------------------


def _crops(
    config: TrainConfig, spec: ModelSpec, sets: dict[Path, PatchSet], tissues: Sequence[str], targets: CropTargets
) -> MixedCrops:
    sources = [
        Source(sets[folder], weight, image_weights(sets[folder], config.sampling, config.gamma))
        for folder, weight in config.data.items()
    ]
    return MixedCrops(
        sources,
        load_recipe(config.recipe),
        count=1 << 62,  # there is always another
        seed=config.seed,
        crop_px=config.crop_px,
        targets=targets,
        order="shuffled" if config.sampling == "shuffled" else "drawn",
        mpp=spec.mpp,
        tissues=tissues,
    )


def _length(config: TrainConfig, images: int) -> tuple[int, float]:
    """Steps of the run, and of an epoch: as many crops as there are images."""
    epoch = images / (config.batch_size * config.accumulate)
    return config.steps or max(1, math.ceil((config.epochs or 0) * epoch - 1e-9)), epoch


def _intervals(config: TrainConfig, epoch_steps: float) -> tuple[int, int]:
    """Steps from one validation to the next, and from one save to the next: never more than an epoch."""
    by_epochs = max(1, round(epoch_steps * config.validate_epochs))
    validate_every = config.validate_every or (200 if config.epochs is None else by_epochs)
    longest = validate_every if config.epochs is None else max(1, round(epoch_steps))
    return validate_every, config.save_every or min(validate_every, longest)


class _Share(Sampler[int]):
    """Numbers of the crops that one of several processes trains on: its part of every batch."""

    def __init__(self, first: int, last: int, batch: int, process: int, processes: int) -> None:
        self.first, self.last, self.batch, self.process = first, last, batch, process
        self.each = batch // processes

    def __iter__(self) -> Iterator[int]:
        for number in range(self.first, self.last):
            start = number * self.batch + self.process * self.each
            yield from range(start, start + self.each)

    def __len__(self) -> int:
        return (self.last - self.first) * self.each


def _batches(config: TrainConfig, crops: MixedCrops, step: int, steps: int, team: Any) -> Iterator[Item]:
    if config.batch_size % team.num_processes:
        raise ConfigError(f"a batch of {config.batch_size} cannot be shared by {team.num_processes} processes")
    parts = (step * config.accumulate, steps * config.accumulate)
    share = _Share(*parts, config.batch_size, team.process_index, team.num_processes)
    return iter(
        DataLoader(
            crops,
            share.each,
            sampler=share,
            num_workers=config.workers,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the loader draws a seed for its workers, which nobody uses
        )
    )


def _validate(
    network: nn.Module,
    objective: Objective,
    config: TrainConfig,
    spec: ModelSpec,
    sets: dict[Path, PatchSet],
    tissues: Sequence[str],
    device: torch.device,
) -> dict[str, float]:
    """Scores over crops side by side of the validation images of every set that has any."""
    with_pq = config.best_by != "loss"
    crops = [
        FixedCrops(
            patches, mpp=spec.mpp, crop_px=config.crop_px, targets=objective.targets, tissues=tissues,
            with_truth=with_pq,
        )
        for patches in sets.values()
    ]  # fmt: skip
    held = [part for part in crops if len(part)]
    if not held:
        raise ConfigError("none of the data has images in the split 'validation'; the best weights cannot be told")
    loader: DataLoader[Item] = DataLoader(
        ConcatDataset(held),
        config.batch_size,
        num_workers=config.workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )

    def loss(output: dict[str, Tensor], batch: Item) -> Tensor:
        return objective.loss(output, {name: value.to(device) for name, value in batch.items()})[0]

    return validate(
        network,
        loss,
        loader,
        lambda image: normalised(image, spec, device),
        lambda output: nuclei_of(output, spec),
        len(spec.class_names),
        with_pq=with_pq,
    )


# --- several devices --------------------------------------------------------------------------------------------------


def _team(config: TrainConfig) -> Any:
    """The processes of this run; one, if nobody started several."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise ConfigError(
            "training needs accelerate; install it with: pip install 'wsipipe-cellvta[training]'"
        ) from error
    # What is frozen or has no loss gets no gradient; a process may wait long while the first one validates.
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=True),
        InitProcessGroupKwargs(timeout=timedelta(hours=4)),
    ]
    return Accelerator(cpu=choose_device(config.device).type == "cpu", kwargs_handlers=handlers)


def _in_step(network: nn.Module, team: Any) -> nn.Module:
    """With batch statistics over all devices, so that a batch means the same on one and on many; on CUDA only."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if team.device.type == "cuda" else network


def _shared(progress: dict[str, float], team: Any) -> dict[str, float]:
    """What the first process knows, for all."""
    if team.num_processes == 1:
        return progress
    from accelerate.utils import broadcast_object_list

    shared: dict[str, float] = broadcast_object_list([progress])[0]
    return shared


# --- what is written --------------------------------------------------------------------------------------------------


def _claim(run: Path, config: TrainConfig, sets: dict[Path, PatchSet]) -> None:
    """Put settings and data into a new run; refuse a run that was begun with others (its length may change)."""
    run.mkdir(parents=True, exist_ok=True)
    path, wanted = run / "config.json", config.model_dump(mode="json")
    if path.exists():
        try:
            begun = TrainConfig.model_validate_json(path.read_text(encoding="utf-8")).model_dump(mode="json")
        except ValidationError as error:
            raise StoreError(f"{run} holds a run of another version of wsipipe; choose another folder") from error
        changed = [key for key in wanted if key not in FREE and begun.get(key) != wanted[key]]
        if changed:
            said = "; ".join(f"{key}: {begun.get(key)} there, {wanted[key]} asked for" for key in changed)
            raise StoreError(f"{run} holds a run with other settings ({said}); choose another folder")
    path.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    path, prints = run / "data.json", _fingerprints(sets)
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != prints:
        raise StoreError(f"the data of {run} are not those that it was begun with; choose another folder")
    path.write_text(json.dumps(prints, indent=1), encoding="utf-8")


def _fingerprints(sets: dict[Path, PatchSet]) -> dict[str, str]:
    return {str(folder): patches.fingerprint for folder, patches in sets.items()}


def _notes(step: int, scores: dict[str, float], config: TrainConfig, sets: dict[Path, PatchSet]) -> dict[str, object]:
    """What the best checkpoint says of its making."""
    return {
        "step": step,
        "validation": scores,
        "config": config.model_dump(mode="json"),
        "data": _fingerprints(sets),
        "by": __version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the checkout that this code is of; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None


def _is_best(score: float, progress: dict[str, float], config: TrainConfig) -> bool:
    """Whether this validation is as good as the best so far; notes how long ago that was, and whether to end."""
    better = score <= progress["best"] if config.best_by == "loss" else score >= progress["best"]
    if not (better or math.isinf(progress["best"])):
        progress["waited"] += 1
        progress["ended"] = config.patience is not None and progress["waited"] >= config.patience
        return False
    progress["best"], progress["waited"] = score, 0
    return True


def _save(path: Path, progress: dict[str, float], parts: dict[str, Any]) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    with finished(path) as partial:
        torch.save({**progress, **state}, partial)


def _resume(run: Path, parts: dict[str, Any]) -> dict[str, float]:
    """Where the run stands; the lines that its logs have beyond that are dropped, they will come again."""
    progress = {"step": 0, "best": math.inf, "waited": 0, "ended": False}
    if (run / "last.pt").exists():
        state = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        progress |= {name: state[name] for name in progress if name in state}
        if not (run / "best.safetensors").exists():
            progress["best"] = math.inf  # it went away: the next validation is the best there is
    for name in ("log.csv", "validation.csv"):
        _cut_log(run / name, int(progress["step"]))
    return progress


def _cut_log(path: Path, step: int) -> None:
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    kept = rows[:1] + [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= step]
    if len(kept) == 1:
        path.unlink()
    elif len(kept) < len(rows):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(kept)


def _write_log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


class _NoBoard:
    """Takes the place of TensorBoard where it is not wanted or not installed."""

    def add_scalar(self, *arguments: object) -> None: ...

    def close(self) -> None: ...


def _board(run: Path, config: TrainConfig, step: int, team: Any) -> Any:
    if not config.tensorboard or not team.is_main_process:
        return _NoBoard()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed: losses go to log.csv only")
        return _NoBoard()
    return SummaryWriter(str(run / "tensorboard"), purge_step=step)
