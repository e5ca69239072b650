"""How long a run is, when it is validated and saved, and how its learning rate goes; all in steps."""

import math
from dataclasses import dataclass

from wsipipe.training.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    Attributes
    ----------
    epoch : float
        Steps until as many crops were seen as there are images.
    validate_every, save_every : int
        Steps from one validation, or save, to the next; a save never waits longer than an epoch.
    """

    steps: int
    epoch: float
    validate_every: int
    save_every: int


def schedule_of(config: TrainConfig, images: int) -> Schedule:
    """The schedule of a run on so many images."""
    epoch = images / (config.batch_size * config.accumulate)
    steps = config.steps or max(1, math.ceil((config.epochs or 0) * epoch - 1e-9))
    by_epochs = max(1, round(epoch * config.validate_epochs))
    validate_every = config.validate_every or (200 if config.epochs is None else by_epochs)
    longest = validate_every if config.epochs is None else max(1, round(epoch))
    return Schedule(steps, epoch, validate_every, config.save_every or min(validate_every, longest))


def rate(step: int, config: TrainConfig, schedule: Schedule) -> float:
    """Factor of the learning rate: up over the warm-up; then flat and down along a cosine to 0, or down every epoch."""
    rising = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "exponential":
        return rising * config.decay ** int(step / schedule.epoch + 1e-9)
    falling = max(1, round(schedule.steps * config.decay_share))
    left = min(1.0, (schedule.steps - step) / falling)
    return rising * (1 - math.cos(math.pi * left)) / 2
