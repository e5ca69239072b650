"""Train a network on patch sets: data, step, validate, save, from top to bottom.

A run is a folder, see `wsipipe.training.run_folder`. Killed at any point, the same call goes on as if nothing had
happened: crop i of a run, and whatever else is drawn in step i, is a function of the seed and i alone. On CPUs it ends
with the same bits; on CUDA the gradients of deformable attention are added up in no fixed order.

Several devices share every batch: `accelerate launch --num_processes 4 -m wsipipe train ...`.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from wsipipe.device import choose_device, choose_precision
from wsipipe.errors import ConfigError, StoreError
from wsipipe.model.spec import ModelSpec
from wsipipe.training.batches import open_sets, training_batches, training_crops, validation_batches
from wsipipe.training.config import TrainConfig, load_experiment
from wsipipe.training.crops import Item, MixedCrops
from wsipipe.training.data import same_classes
from wsipipe.training.found import nuclei_of
from wsipipe.training.network import classes_at_the_start, normalised, parameter_groups, spec_of, start_network
from wsipipe.training.objectives import Objective, objective_of
from wsipipe.training.run_folder import Part, RunFolder
from wsipipe.training.schedule import Schedule, rate, schedule_of
from wsipipe.training.team import shared_network, start_team, told_to_all
from wsipipe.training.validation import validate

__all__ = ["TrainConfig", "load_experiment", "train"]

log = logging.getLogger(__name__)


def train(config: TrainConfig, run: Path) -> Path:
    """Train, or go on with a run that was interrupted; the path of the best checkpoint.

    The network gets the classes of the data, or where none are typed those of the weights that it starts with; and the
    tissues of the data, where they name any and the network has a head for them.

    Raises
    ------
    ConfigError
        If the model is unknown or cannot be trained so, which may show as a loss that is no number, or a split is
        empty.
    ModelError
        If the weights to start with cannot be read.
    DataError
        If a patch set does not hold what its layout promises.
    StoreError
        If `run` holds a run with other settings, data or arithmetic, or another process is at it.
    """
    team = start_team(config)
    sets = open_sets(config)
    tissues = tuple(sorted({tissue for patches in sets.values() for tissue in patches.tissues}))
    spec = spec_of(config, same_classes(list(sets.values())) or classes_at_the_start(config), tissues)
    tissues = tissues if spec.settings.get("tissue_classes") else ()
    objective = objective_of(spec, config)
    crops = training_crops(config, spec, sets, tissues, objective.targets)
    held = validation_batches(config, spec, sets, tissues, objective.targets)
    schedule = schedule_of(config, crops.images)
    device = team.device if team.num_processes > 1 else choose_device(config.device)
    learner, folder = Learner(config, spec, objective, device), RunFolder(run)
    data = {str(path): patches.fingerprint for path, patches in sets.items()}
    with folder.claimed(config, data, learner.precision) if team.is_main_process else nullcontext():
        team.wait_for_everyone()
        return _learn(learner, folder, crops, held, schedule, team)


def _learn(
    learner: "Learner", folder: RunFolder, crops: MixedCrops, held: DataLoader[Item], schedule: Schedule, team: Any
) -> Path:
    """Go on from where the run stands to its end."""
    config, spec = learner.config, learner.spec
    progress = folder.resume(learner.parts, learner.precision)
    learner.join(team)
    if team.is_main_process:
        folder.cut_logs(progress.step)
    if team.is_main_process and config.tensorboard:
        folder.open_board(progress.step)
    log.info(
        "training %s (%.2f M parameters, %.2f M learn) on %d x %s from step %d of %d",
        spec.name,
        sum(p.numel() for p in learner.network.parameters()) / 1e6,
        sum(p.numel() for p in learner.learning) / 1e6,
        team.num_processes,
        learner.device,
        progress.step,
        schedule.steps,
    )

    started, first, saved = time.monotonic(), progress.step, progress.step
    batches = training_batches(config, crops, progress.step, schedule.steps, team)
    while progress.step < schedule.steps and not progress.ended:
        factor = rate(progress.step, config, schedule)
        losses, norm = learner.step(batches, progress.step, config.learning_rate * factor)
        progress.step += 1
        step, at_end = progress.step, progress.step == schedule.steps

        if step % config.log_every == 0 and team.is_main_process:
            seconds = (time.monotonic() - started) / (step - first)
            values = {name: loss.item() for name, loss in losses.items()}
            folder.log_losses(step, seconds, norm.item(), values, config.learning_rate * factor)
            left = timedelta(seconds=round((schedule.steps - step) * seconds))
            log.info(
                "step %d of %d: loss %.3f, %.2f s a step, %s left", step, schedule.steps, values["loss"], seconds, left
            )
        if step % schedule.validate_every == 0 or at_end:
            scores = told_to_all(learner.validate(held) if team.is_main_process else {}, team)
            if not math.isfinite(scores["loss"]):
                raise _diverged(step, saved)
            better = progress.improved(scores, config)
            if team.is_main_process:
                folder.log_validation(step, scores)
                if better:
                    folder.save_best(learner.kept, spec, step, scores, config)
                log.info("step %d: validation %s (best %s %.4f)", step, scores, config.best_by, progress.best)
        if step % schedule.save_every == 0 or at_end or progress.ended:
            if not learner.is_finite():
                raise _diverged(step, saved)
            if team.is_main_process:
                folder.save(progress, learner.parts, learner.precision)
            saved = step
    folder.close()
    team.wait_for_everyone()
    if not folder.best.exists():
        raise StoreError(f"{folder.path} has ended, but its best.safetensors is gone; train anew in another folder")
    return folder.best


def _fix_algorithms(device: torch.device) -> None:
    """On CUDA, let cuDNN do the same in the same way, as the published runs do."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True


def _diverged(step: int, saved: int) -> ConfigError:
    """Why every process of a run stops, and what is left of it."""
    left = f"last.pt is of step {saved}" if saved else "nothing was saved"
    return ConfigError(
        f"the loss is no number at step {step} ({left}); train with a lower learning_rate or a clip_norm in another "
        "folder"
    )


class Learner:
    """A network with what changes as it learns.

    Attributes
    ----------
    network, kept : nn.Module
        What learns; what is validated and kept: the same, or the average of its past.
    learning : list of parameters
        Those that are not frozen.
    precision : "fp32" | "bf16" | "fp16"
        What that of the settings stands for on this device.
    parts : dict
        Everything that a run goes on from.
    """

    def __init__(self, config: TrainConfig, spec: ModelSpec, objective: Objective, device: torch.device) -> None:
        self.config, self.spec, self.objective, self.device = config, spec, objective, device
        self.precision = choose_precision(config.precision, device)
        _fix_algorithms(device)
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        torch.manual_seed(config.seed)
        network = start_network(spec, config)
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.learning = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        groups = parameter_groups(self.network, config.weight_decay, config.decays)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.parts: dict[str, Part] = {
            "network": self.network,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }
        self.averaged: AveragedModel | None = None
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.averaged = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
            self.parts["averaged"] = self.averaged

    @property
    def kept(self) -> nn.Module:
        return self.network if self.averaged is None else self.averaged.module

    def join(self, team: Any) -> None:
        """Learn as one of a team from here on."""
        self.team, self.shared = team, shared_network(self.network, team)

    def step(self, batches: Iterator[Item], step: int, learning_rate: float) -> tuple[dict[str, Tensor], Tensor]:
        """Learn from the next batches, `accumulate` of them: their mean losses by name, and the gradient's length."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # Whatever else is drawn, such as the paths that are dropped, depends on the step and nothing before it.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * self.team.num_processes + self.team.process_index)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        count, sums = self.config.accumulate, dict[str, Tensor]()
        for number in range(count):
            batch = {name: value.to(self.device, non_blocking=True) for name, value in next(batches).items()}
            with nullcontext() if number == count - 1 else self.team.no_sync(self.shared):
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                    output = self.shared(normalised(batch["image"], self.spec, self.device))
                loss, losses = self.objective.loss(output, batch)
                self.scaler.scale(loss / count if count > 1 else loss).backward()
            for name, part in {"loss": loss.detach(), **losses}.items():
                sums[name] = sums[name] + part if name in sums else part
        self.scaler.unscale_(self.optimizer)
        longest = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = nn.utils.clip_grad_norm_(self.learning, longest)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        return {name: part / count for name, part in sums.items()}, norm

    def is_finite(self) -> bool:
        """Whether all that learns still are numbers: the same on every process of a team."""
        return all(bool(parameter.isfinite().all()) for parameter in self.learning)

    def validate(self, batches: DataLoader[Item]) -> dict[str, float]:
        """Scores of what is kept."""

        def loss(output: dict[str, Tensor], batch: Item) -> Tensor:
            return self.objective.loss(output, {name: value.to(self.device) for name, value in batch.items()})[0]

        return validate(
            self.kept,
            loss,
            batches,
            lambda image: normalised(image, self.spec, self.device),
            lambda output: nuclei_of(output, self.spec),
            len(self.spec.class_names),
            with_pq=self.config.best_by != "loss",
        )
