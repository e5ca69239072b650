"""Patch sets on disk, and the training items drawn from them.

A patch set is a folder of images of one size with their nuclei, read by memory map:

==================  ===========================  ==================================================================
`dataset.json`      object                       `format` (1), `name`, `mpp` (µm/px), `class_names` (0 is background)
                                                 or null, `source`, `licence`
`images.npy`        (N, H, W, 3) uint8           RGB
`instances.npy`     (N, H, W) uint16 or int32    0 background, every other value one nucleus of that image
`types.npy`         (N, H, W) uint8, optional    index into `class_names`; 255 where not known
`trusted.npy`       (N, H, W) bool, optional     False where nuclei may be joined or split wrongly
`index.csv`         N rows: name,group,split     group: patient, slide or organ; split: train, validation or test;
                                                 optional columns: tissue, fold
==================  ===========================  ==================================================================

One folder holds one data set in one image size. A set without `types.npy` knows no types. Where there are folds,
`PatchSet.with_folds` puts them in the place of the splits.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from wsipipe.errors import DataError
from wsipipe.training.augment import Recipe, SourceField, draw_field

FORMAT = 1
SPLITS = ("train", "validation", "test")
UNKNOWN_TYPE = 255
UNKNOWN_TISSUE = -100  # what torch's cross-entropy leaves out
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of an array, for its fingerprint
Array = npt.NDArray[Any]
Split = Literal["train", "validation", "test"]
Variant = Literal["published", "exact"]  # of `wsipipe.training.targets.hv_map`


@dataclass(frozen=True)
class Patch:
    """One image of a patch set; `group` is the patient, slide or organ it is from."""

    name: str
    group: str
    split: str
    tissue: str = ""
    fold: str = ""


@dataclass(frozen=True, eq=False)
class PatchSet:
    """An opened patch set. Arrays are memory maps, in the layout of this module."""

    folder: Path
    name: str
    mpp: float
    class_names: tuple[str, ...] | None
    source: str
    licence: str
    images: Array
    instances: Array
    types: Array | None
    trusted: Array | None
    index: tuple[Patch, ...]

    @classmethod
    def open(cls, folder: str | Path, *, check_values: bool = True) -> "PatchSet":
        """Open a patch set and check all of it, or all but the pixels.

        Raises
        ------
        DataError
            If a file is missing or does not hold what the layout promises; names the file and the image.
        """
        folder = Path(folder)
        about = _read_description(folder / "dataset.json")
        images = _read_array(folder / "images.npy", ("uint8",))
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise DataError(f"{folder / 'images.npy'} has the shape {images.shape}; it must be (N, H, W, 3), not empty")

        def mask(name: str, *dtypes: str) -> Array:
            path = folder / f"{name}.npy"
            array = _read_array(path, dtypes)
            if array.shape != images.shape[:3]:
                raise DataError(f"{path} has the shape {array.shape}; for these images it must be {images.shape[:3]}")
            return array

        opened = cls(
            folder=folder,
            images=images,
            instances=mask("instances", "uint16", "int32"),
            types=mask("types", "uint8") if (folder / "types.npy").exists() else None,
            trusted=mask("trusted", "bool", "uint8") if (folder / "trusted.npy").exists() else None,
            index=_read_index(folder / "index.csv", len(images)),
            **about,
        )
        if check_values:
            opened._check_values()
        return opened

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process opens the files itself: pickling a memory map would copy it. They were checked before."""
        return _opened_again, (self.folder, self.index)

    def __len__(self) -> int:
        return len(self.index)

    def of(self, split: Split) -> Array:
        """Numbers of the images of a split, (n,) int64."""
        return np.array([i for i, patch in enumerate(self.index) if patch.split == split], np.int64)

    @property
    def tissues(self) -> tuple[str, ...]:
        """Every tissue that the index names, in order; empty where it names none."""
        return tuple(sorted({patch.tissue for patch in self.index} - {""}))

    def with_folds(self, folds: Mapping[Split, Sequence[str]]) -> "PatchSet":
        """The same set, split by its folds: those of `folds`; images of a fold that is not named belong to no split.

        Raises
        ------
        DataError
            If the set has no such fold, or one is to be in two splits.
        """
        there = {patch.fold for patch in self.index} - {""}
        split_of: dict[str, Split] = {}
        for split, names in folds.items():
            for name in names:
                if name not in there:
                    raise DataError(f"{self.folder} has no fold '{name}'; it has {', '.join(sorted(there)) or 'none'}")
                if name in split_of:
                    raise DataError(f"fold '{name}' of {self.folder} cannot be for {split_of[name]} and for {split}")
                split_of[name] = split
        return replace(self, index=tuple(replace(patch, split=split_of.get(patch.fold, "")) for patch in self.index))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the description, the index as it is used, and samples of every array: other data, other hash."""
        digest = hashlib.sha256((self.folder / "dataset.json").read_bytes() + repr(self.index).encode())
        for path in sorted(self.folder.glob("*.npy")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for place in range(0, size, max(1, size // SAMPLES)):
                    file.seek(place)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()[:32]

    def _check_values(self) -> None:
        for i, instances in enumerate(self.instances):
            if instances.min() < 0:
                raise DataError(f"{self.folder / 'instances.npy'}, image {i}: a nucleus has a negative number")
        if self.types is None:
            return
        path = self.folder / "types.npy"
        if self.class_names is None:
            raise DataError(f"{path} holds types, but dataset.json gives no class_names; add them or remove the file")
        for i, types in enumerate(self.types):
            used = np.flatnonzero(np.bincount(types.ravel(), minlength=256))
            if used[used != UNKNOWN_TYPE].max(initial=0) >= len(self.class_names):
                raise DataError(
                    f"{path}, image {i} ({self.index[i].name}): holds the types {used.tolist()}, but there are "
                    f"{len(self.class_names)} class_names ({UNKNOWN_TYPE} stands for unknown)"
                )


def _opened_again(folder: Path, index: tuple[Patch, ...]) -> PatchSet:
    return replace(PatchSet.open(folder, check_values=False), index=index)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version = about["format"]
        if version != FORMAT:
            raise DataError(f"{path} is of format {version!r}; this wsipipe reads {FORMAT}: prepare the set again")
        names = about["class_names"]
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise DataError(f"{path}: class_names must be a list of names, background first, or null")
        mpp = float(about["mpp"])
        if not 0.01 < mpp < 10:
            raise DataError(f"{path}: mpp is {mpp}; it must be the µm of one pixel, such as 0.25")
        texts = {key: str(about[key]) for key in ("name", "source", "licence")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} does not describe a patch set: {type(error).__name__}: {error}") from error
    return {"mpp": mpp, "class_names": None if names is None else tuple(names), **texts}


def _read_array(path: Path, dtypes: tuple[str, ...]) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the header is parsed as Python, which fails in ways of its own
        raise DataError(f"{path} cannot be read as an array: {' '.join(str(error).split())}") from error
    if not isinstance(array, np.ndarray) or array.dtype.name not in dtypes:
        raise DataError(f"{path} holds {getattr(array, 'dtype', 'no array')}; it must be {' or '.join(dtypes)}")
    return np.asarray(array)  # the same map, without the cost of its class in every slice


def _read_index(path: Path, count: int) -> tuple[Patch, ...]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        index = tuple(
            Patch(row["name"], row["group"], row["split"], row.get("tissue") or "", row.get("fold") or "")
            for row in rows
        )
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise DataError(f"{path} must be a table of name, group and split: {type(error).__name__}: {error}") from error
    if len(index) != count:
        raise DataError(f"{path} has {len(index)} rows for {count} images")
    for i, patch in enumerate(index):
        if patch.split not in SPLITS:
            raise DataError(
                f"{path}, image {i} ({patch.name}): split is {patch.split!r}, not one of {', '.join(SPLITS)}"
            )
    return index


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
    hv_variant : str
        Passed on to `wsipipe.training.targets.hv_map`.
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
    hv_variant: Variant = "exact"
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
        item = make_item(patches, number, field, self.hv_variant, lambda image: self.recipe.recolour(image, rng))
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

    As many as it takes to cover the image; where they do not fit exactly, they overlap alike.
    """

    patches: PatchSet
    split: Split = "validation"
    mpp: float = 0.25
    crop_px: int = 256
    hv_variant: Variant = "exact"
    tissues: Sequence[str] = ()
    with_instances: bool = False

    @cached_property
    def _places(self) -> list[tuple[int, float, float, float]]:
        """(image, x, y, side of what is seen), all in pixels of the set."""
        height, width = self.patches.images.shape[1:3]
        seen = min(self.crop_px * self.mpp / self.patches.mpp, height, width)
        # Whole pixels, so that a set at `mpp` is shown as it is.
        starts = [np.floor(np.linspace(0, side - seen, int(np.ceil(side / seen)))) for side in (height, width)]
        return [(int(i), x, y, seen) for i in self.patches.of(self.split) for y in starts[0] for x in starts[1]]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Item:
        number, x0, y0, seen = self._places[i]
        steps = (np.arange(self.crop_px) + 0.5) * seen / self.crop_px - 0.5
        x, y = np.meshgrid((x0 + steps).astype(np.float32), (y0 + steps).astype(np.float32))
        field = SourceField(x, y, seen / self.crop_px)
        item = make_item(self.patches, number, field, self.hv_variant)
        if self.with_instances:
            item["instances"] = torch.from_numpy(field.read_mask(self.patches.instances[number]).astype(np.int32))
        return _with_tissue(item, self.patches, number, self.tissues)


def start_worker(worker: int) -> None:
    """`worker_init_fn` of a loader: one thread a worker. OpenCV's threads do not survive the fork of their process."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def same_classes(sets: Sequence[PatchSet]) -> tuple[str, ...] | None:
    """The class names that all typed sets share; None if no set is typed.

    Raises
    ------
    DataError
        If two sets name different classes.
    """
    typed = [patches for patches in sets if patches.types is not None]
    for patches in typed[1:]:
        if patches.class_names != typed[0].class_names:
            raise DataError(
                f"{patches.folder} has the classes {patches.class_names}, {typed[0].folder} has "
                f"{typed[0].class_names}; sets that train one network must name the same"
            )
    return typed[0].class_names if typed else None


def make_item(
    patches: PatchSet,
    number: int,
    field: SourceField,
    hv_variant: Variant,
    recolour: Callable[[Array], Array] | None = None,
) -> Item:
    """Image and targets of one crop.

    Returns
    -------
    dict
        `image` (3, S, S) uint8; `nuclei` (S, S) int64, 1 in a nucleus; `offsets` (2, S, S) float32, horizontal then
        vertical; `types` (S, S) int64, 255 unknown; `trusted` (S, S) bool, False where `offsets` are not to be learnt.
    """
    from wsipipe.training.targets import hv_map

    image = field.read_image(patches.images[number])
    if recolour is not None:
        image = recolour(image)
    instances = field.read_mask(patches.instances[number])
    if patches.types is None:
        types = np.full(instances.shape, UNKNOWN_TYPE, np.int64)
    else:
        types = field.read_mask(patches.types[number]).astype(np.int64)
    if patches.trusted is None:
        trusted = np.ones(instances.shape, bool)
    else:
        trusted = field.read_mask(patches.trusted[number]).astype(bool)
    offsets = hv_map(instances.astype(np.int32), variant=hv_variant)
    return {
        "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        "nuclei": torch.from_numpy((instances > 0).astype(np.int64)),
        "offsets": torch.from_numpy(offsets),
        "types": torch.from_numpy(types),
        "trusted": torch.from_numpy(trusted),
    }
