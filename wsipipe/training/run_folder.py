"""What a run leaves in its folder, and how a run that was killed finds itself again there.

==================== ==================================================================================================
`config.json`        what was asked for
`data.json`          what the data were: fingerprints
`log.csv`            losses and the length of the gradient; `tensorboard/` shows the same as curves
`validation.csv`     scores on the validation images
`last.pt`            everything that is needed to go on
`best.safetensors`   the weights of the best validation, ready for `segment`
==================== ==================================================================================================
"""

import csv
import json
import logging
import math
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import nn

from wsipipe import __version__
from wsipipe.atomic import finished
from wsipipe.device import Precision
from wsipipe.errors import DataError, StoreError
from wsipipe.lock import Lock
from wsipipe.model.spec import ModelSpec
from wsipipe.model.weights import save_checkpoint
from wsipipe.training.config import FREE, TrainConfig
from wsipipe.training.data import PatchSet

log = logging.getLogger(__name__)


class Part(Protocol):
    """What has a state that a run goes on from: network, optimiser, scaler, averaged weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass
class Progress:
    """Where a run stands.

    Attributes
    ----------
    best : float
        The best score so far; infinite before the first validation.
    waited : int
        Validations since then.
    ended : bool
        Whether they were as many as the run's patience.
    """

    step: int = 0
    best: float = math.inf
    waited: int = 0
    ended: bool = False

    def improved(self, scores: Mapping[str, float], config: TrainConfig) -> bool:
        """Whether this validation is as good as the best so far; notes how long ago that was, and whether to end.

        The first is; one without a number never takes the place of one that has one.
        """
        score = scores[config.best_by]
        better = score <= self.best if config.best_by == "loss" else score >= self.best
        if math.isfinite(self.best) and not better:
            self.waited += 1
            self.ended = config.patience is not None and self.waited >= config.patience
            return False
        self.best, self.waited = score, 0
        return True


class RunFolder:
    """The folder of one run; see the module for what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.safetensors"
        self._board: Any = None

    @contextmanager
    def claimed(self, config: TrainConfig, data: Mapping[str, str], precision: Precision) -> Iterator[None]:
        """Hold the folder against other processes while the block runs.

        A new run gets settings and the data's fingerprints; `precision` is what that of the settings stands for.

        Raises
        ------
        StoreError
            If the folder holds a run that was begun with others (its length may change), or another process has it.
        """
        lock = Lock(self.path / "last.pt")
        try:
            self._belongs_to(config, data, precision)
            yield
        finally:
            lock.release()

    def _belongs_to(self, config: TrainConfig, data: Mapping[str, str], precision: Precision) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        path, wanted = self.path / "config.json", config.model_dump(mode="json")
        if path.exists():
            try:
                begun = TrainConfig.model_validate_json(path.read_text(encoding="utf-8")).model_dump(mode="json")
            except ValidationError as error:
                raise StoreError(
                    f"{self.path} holds a run of another version of wsipipe; choose another folder"
                ) from error
            if begun["precision"] in ("auto", precision):  # of "auto" `resume` knows what it stood for
                wanted["precision"] = begun["precision"]
            changed = [key for key in wanted if key not in FREE and begun.get(key) != wanted[key]]
            if changed:
                said = "; ".join(f"{key}: {begun.get(key)} there, {wanted[key]} asked for" for key in changed)
                raise StoreError(f"{self.path} holds a run with other settings ({said}); choose another folder")
        _write_json(path, wanted)
        path = self.path / "data.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != data:
            raise StoreError(f"the data of {self.path} are not those that it was begun with; choose another folder")
        _write_json(path, data)

    def resume(self, parts: Mapping[str, Part], precision: Precision) -> Progress:
        """Where the run stands; `parts` get their states.

        Raises
        ------
        StoreError
            If the run was begun with another precision.
        """
        progress = Progress()
        if (self.path / "last.pt").exists():
            state = torch.load(self.path / "last.pt", map_location="cpu", weights_only=True)
            begun = state.get("precision", precision)  # runs of earlier versions do not say it
            if begun != precision:
                raise StoreError(
                    f"{self.path} holds a run that was begun with precision {begun}, not {precision}; set "
                    f"precision={begun} to go on"
                )
            for name, part in parts.items():
                part.load_state_dict(state[name])
            progress = Progress(**{of.name: state[of.name] for of in fields(Progress) if of.name in state})
            if not self.best.exists():
                progress.best = math.inf  # it went away: the next validation is the best there is
        return progress

    def cut_logs(self, step: int) -> None:
        """Drop the lines that the logs have beyond a step: they will come again. For one process alone."""
        for name in ("log.csv", "validation.csv"):
            _cut_log(self.path / name, step)

    def save(self, progress: Progress, parts: Mapping[str, Part], precision: Precision) -> None:
        """Write `last.pt`."""
        states = {name: part.state_dict() for name, part in parts.items()}
        with finished(self.path / "last.pt") as partial:
            torch.save({**asdict(progress), "precision": precision, **states}, partial)

    def save_best(
        self, network: nn.Module, spec: ModelSpec, step: int, scores: Mapping[str, float], config: TrainConfig
    ) -> None:
        """Write the best checkpoint, which says of what it was made."""
        notes = {
            "step": step,
            "validation": dict(scores),
            "config": config.model_dump(mode="json"),
            "data": json.loads((self.path / "data.json").read_text(encoding="utf-8")),
            "by": __version__,
            "commit": _commit(),
        }
        save_checkpoint(self.best, network, spec, notes)

    def open_board(self, step: int) -> None:
        """Show what is logged from `step` on in TensorBoard too, if it is installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("tensorboard is not installed: losses go to log.csv only")
            return
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)

    def log_losses(self, step: int, seconds: float, norm: float, losses: Mapping[str, float], rate: float) -> None:
        """A line of `log.csv`: seconds a step, length of the gradient, mean losses."""
        _write_log(self.path / "log.csv", {"step": step, "seconds": seconds, "norm": norm, **losses})
        self._show("train", step, {**losses, "rate": rate})

    def log_validation(self, step: int, scores: Mapping[str, float]) -> None:
        """A line of `validation.csv`."""
        _write_log(self.path / "validation.csv", {"step": step, **scores})
        self._show("validation", step, scores)

    def _show(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Nothing more will be logged."""
        if self._board is not None:
            self._board.close()


def split_as_trained(patches: PatchSet, notes: Mapping[str, Any]) -> PatchSet | None:
    """The set as the run that left `notes` in its checkpoint split it; None if it is not of the data of that run.

    It is, if it lies where they lay, or has their fingerprint.
    """
    config, data = notes.get("config") or {}, notes.get("data") or {}
    try:
        split = patches.with_folds(config["folds"]) if config.get("folds") else patches
    except DataError:
        return None
    lies_there = patches.folder.resolve() in [Path(folder).resolve() for folder in data]
    return split if lies_there or split.fingerprint in data.values() else None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with finished(path) as partial:
        partial.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _cut_log(path: Path, step: int) -> None:
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    kept = rows[:1] + [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= step]
    if len(kept) == 1:
        path.unlink()
    elif len(kept) < len(rows):
        with finished(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(kept)


def _write_log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


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
