"""The batches of a run: augmented crops to learn from, crops side by side to validate on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Sampler

from wsipipe.errors import ConfigError
from wsipipe.model.spec import ModelSpec
from wsipipe.training.augment import load_recipe
from wsipipe.training.config import TrainConfig
from wsipipe.training.crop_targets import CropTargets
from wsipipe.training.crops import FixedCrops, Item, MixedCrops, Source, start_worker
from wsipipe.training.data import PatchSet
from wsipipe.training.sampling import image_weights

Sets = Mapping[Path, PatchSet]


def open_sets(config: TrainConfig) -> dict[Path, PatchSet]:
    """The patch sets of an experiment, checked, split as it says.

    Raises
    ------
    DataError
        If one does not hold what its layout promises, or has not the folds.
    """
    sets = {folder: PatchSet.open(folder) for folder in config.data}
    return {folder: patches.with_folds(config.folds) if config.folds else patches for folder, patches in sets.items()}


def training_crops(
    config: TrainConfig, spec: ModelSpec, sets: Sets, tissues: Sequence[str], targets: CropTargets
) -> MixedCrops:
    """Crops without end, drawn from the images that train; a set of weight 0 is for validation alone.

    Raises
    ------
    ConfigError
        If the recipe does not exist, or shows nothing at the resolution of the network.
    """
    recipe = load_recipe(config.recipe)
    if (shown := recipe.geometry.near_mpp) and not shown[0] <= spec.mpp <= shown[1]:
        raise ConfigError(
            f"the recipe shows crops at {shown[0]:g} to {shown[1]:g} µm/px, the network is for {spec.mpp:g}; "
            "set recipe: published, which takes that of the network, or write one out with other near_mpp and far_mpp"
        )
    sources = [
        Source(sets[folder], weight, image_weights(sets[folder], config.sampling, config.gamma))
        for folder, weight in config.data.items()
        if weight or config.sampling == "shuffled"
    ]
    return MixedCrops(
        sources,
        recipe,
        count=1 << 62,  # there is always another
        seed=config.seed,
        crop_px=config.crop_px,
        targets=targets,
        order="shuffled" if config.sampling == "shuffled" else "drawn",
        mpp=spec.mpp,
        tissues=tissues,
    )


def training_batches(config: TrainConfig, crops: MixedCrops, step: int, steps: int, team: Any) -> Iterator[Item]:
    """This process's part of every batch from `step` to the end, `accumulate` batches a step."""
    parts = (step * config.accumulate, steps * config.accumulate)
    share = Share(*parts, config.batch_size, team.process_index, team.num_processes)
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


class Share(Sampler[int]):
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


def validation_batches(
    config: TrainConfig, spec: ModelSpec, sets: Sets, tissues: Sequence[str], targets: CropTargets
) -> DataLoader[Item]:
    """Crops side by side over the validation images of every set that has any; with the truth, if PQ is asked for.

    Raises
    ------
    ConfigError
        If none has any.
    """
    crops = [
        FixedCrops(
            patches, mpp=spec.mpp, crop_px=config.crop_px, targets=targets, tissues=tissues,
            with_truth=config.best_by != "loss",
        )
        for patches in sets.values()
    ]  # fmt: skip
    held = [part for part in crops if len(part)]
    if not held:
        raise ConfigError("none of the data has images in the split 'validation'; the best weights cannot be told")
    return DataLoader(
        ConcatDataset(held),
        config.batch_size,
        num_workers=config.workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
