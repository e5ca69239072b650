"""Items for training: crops of patch sets, drawn, augmented and with their targets, or side by side for validation."""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from wsipipe.errors import DataError
from wsipipe.geometry import MPP_TOLERANCE
from wsipipe.training.augment import Recipe
from wsipipe.training.crop_targets import CropTargets, MapTargets
from wsipipe.training.data import UNKNOWN_TYPE, PatchSet, Split, same_classes
from wsipipe.training.spatial import SourceField, draw_field

UNKNOWN_TISSUE = -100  # what torch's cross-entropy leaves out
Array = npt.NDArray[Any]
MAP_TARGETS = MapTargets()


@dataclass(frozen=True, eq=False)
class Source:
    """A patch set in a mixture.

    Attributes
    ----------
    weight : float
        How often it is drawn, relative to the others.
    image_weights : (n,) float, optional
        How often each image of the split is drawn, in the order of `PatchSet.of`; alike where absent.
    """

    patches: PatchSet
    weight: float = 1.0
    image_weights: Array | None = None


Item = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class MixedCrops(Dataset[Item]):
    """Augmented crops from several patch sets: item i is a pure function of `seed` and i.

    So it does not depend on workers or order, and a run resumes at item i by asking for item i. Give it to a loader
    with the sampler `range(first, last)`; a worker opens the files by itself.

    Attributes
    ----------
    sources
        All typed sets must name the same classes. A set whose split is empty is refused.
    count : int
        Length; items beyond it are as good.
    targets : function
        What items hold beside the `image`, see `wsipipe.training.crop_targets`.
    order : {"drawn", "shuffled"}
        "drawn": every item is of any image, by the weights. "shuffled": every image once before any comes again; the
        weights do not matter.
    mpp : float, optional
        Resolution of the crops where the recipe leaves it open; by default that of each image.
    tissues : sequence of str
        Items then hold a `tissue`: its place in here.
    """

    sources: Sequence[Source]
    recipe: Recipe
    count: int
    seed: int = 0
    crop_px: int = 256
    split: Split = "train"
    targets: CropTargets = MAP_TARGETS
    order: Literal["drawn", "shuffled"] = "drawn"
    mpp: float | None = None
    tissues: Sequence[str] = ()

    def __post_init__(self) -> None:
        same_classes([source.patches for source in self.sources])
        for source, (numbers, chances) in zip(self.sources, self._images, strict=True):
            patches = source.patches
            if not len(numbers):
                raise DataError(f"{patches.folder} has no image in the split {self.split!r}")
            if len(chances) != len(numbers):
                raise ValueError(f"{patches.name}: {len(chances)} image weights for {len(numbers)} images")

    @cached_property
    def _images(self) -> list[tuple[Array, Array]]:
        """For every source the numbers of its images and their chances, summed up to 1."""
        drawn = []
        for source in self.sources:
            numbers = source.patches.of(self.split)
            weights = np.ones(len(numbers)) if source.image_weights is None else source.image_weights
            drawn.append((numbers, _summed(weights)))
        return drawn

    @cached_property
    def _chances(self) -> Array:
        return _summed(np.array([source.weight for source in self.sources]))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Item:
        rng = np.random.default_rng((self.seed, i))
        patches, number = self._shuffled_image(i) if self.order == "shuffled" else self._drawn_image(rng)
        shape = patches.images.shape[1:3]
        field = draw_field(self.recipe.geometry, shape, patches.mpp, self.crop_px, rng, self.mpp)
        item = make_item(patches, number, field, self.targets, lambda image: self.recipe.recolour(image, rng))
        return _with_tissue(item, patches, number, self.tissues)

    def _drawn_image(self, rng: np.random.Generator) -> tuple[PatchSet, int]:
        which = int(np.searchsorted(self._chances, rng.random(), side="right"))
        numbers, chances = self._images[which]
        return self.sources[which].patches, int(numbers[np.searchsorted(chances, rng.random(), side="right")])

    def _shuffled_image(self, i: int) -> tuple[PatchSet, int]:
        epoch, place = divmod(i, self.images)
        place = int(_permutation(self.seed, epoch, self.images)[place])
        for source, (numbers, _) in zip(self.sources, self._images, strict=True):
            if place < len(numbers):
                return source.patches, int(numbers[place])
            place -= len(numbers)
        raise AssertionError("a place beyond the images")

    @cached_property
    def images(self) -> int:
        """Images of the split in all sources: what an epoch is long."""
        return sum(len(numbers) for numbers, _ in self._images)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Array:
    return np.random.default_rng((seed, epoch, count)).permutation(count)


def _with_tissue(item: Item, patches: PatchSet, number: int, tissues: Sequence[str]) -> Item:
    if tissues:
        tissue = patches.index[number].tissue
        item["tissue"] = torch.tensor(tissues.index(tissue) if tissue in tissues else UNKNOWN_TISSUE)
    return item


def _summed(weights: Array) -> Array:
    """Weights as rising chances; the last is exactly 1, so that a draw below 1 always falls on one."""
    sums: Array = np.cumsum(weights, dtype=float)
    return sums / sums[-1] if len(sums) else sums


@dataclass(frozen=True, eq=False)
class FixedCrops(Dataset[Item]):
    """Crops side by side over every image of a split at one resolution, without augmentation.

    As many as it takes to cover the image, but for 2 % of a crop each; where they do not fit exactly, they overlap
    alike.
    """

    patches: PatchSet
    split: Split = "validation"
    mpp: float = 0.25
    crop_px: int = 256
    targets: CropTargets = MAP_TARGETS
    tissues: Sequence[str] = ()
    with_truth: bool = False

    @cached_property
    def _places(self) -> list[tuple[int, float, float, float]]:
        """(image, x, y, side of what is seen), all in pixels of the set."""
        height, width = self.patches.images.shape[1:3]
        seen = min(self.crop_px * self.mpp / self.patches.mpp, height, width)

        def starts(side: int) -> Array:
            """Whole pixels, so that a set at `mpp` is shown as it is; at nearly that, as many crops."""
            count = int(np.ceil(side / (seen * (1 + MPP_TOLERANCE))))
            return np.floor(np.linspace(0, side - seen, count))

        places = [(x, y) for y in starts(height) for x in starts(width)]
        return [(int(i), x, y, seen) for i in self.patches.of(self.split) for x, y in places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Item:
        number, x0, y0, seen = self._places[i]
        steps = (np.arange(self.crop_px) + 0.5) * seen / self.crop_px - 0.5
        x, y = np.meshgrid((x0 + steps).astype(np.float32), (y0 + steps).astype(np.float32))
        field = SourceField(x, y, seen / self.crop_px)
        item = make_item(self.patches, number, field, self.targets, with_truth=self.with_truth)
        return _with_tissue(item, self.patches, number, self.tissues)


def start_worker(worker: int) -> None:
    """`worker_init_fn` of a loader: one thread a worker. OpenCV's threads do not survive the fork of their process.

    Where a terminal or a job stops all processes it is the run that says so; a worker's end is then no failure.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def make_item(
    patches: PatchSet,
    number: int,
    field: SourceField,
    targets: CropTargets,
    recolour: Callable[[Array], Array] | None = None,
    *,
    with_truth: bool = False,
) -> Item:
    """One crop: `image` (3, S, S) uint8, and what `targets` makes of its nuclei.

    `with_truth`: also `true_instances` (S, S) int32 and `true_types` (S, S) int64, 255 unknown.
    """
    image = field.read_image(patches.images[number])
    if recolour is not None:
        image = recolour(image)
    instances = field.read_mask(patches.instances[number]).astype(np.int32)
    if patches.types is None:
        types = np.full(instances.shape, UNKNOWN_TYPE, np.int64)
    else:
        types = field.read_mask(patches.types[number]).astype(np.int64)
    if patches.trusted is None:
        trusted = np.ones(instances.shape, bool)
    else:
        trusted = field.read_mask(patches.trusted[number]).astype(bool)
    arrays = {"image": image.transpose(2, 0, 1), **targets(instances, types, trusted)}
    if with_truth:
        arrays |= {"true_instances": instances, "true_types": types}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
