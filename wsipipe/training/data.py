"""Patch sets on disk: images with their nuclei, to train on and to be measured by.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wsipipe.errors import DataError, one_line
from wsipipe.model.spec import MOST_CLASSES

FORMAT = 1
SPLITS = ("train", "validation", "test")
UNKNOWN_TYPE = 255
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of an array, for its fingerprint
Array = npt.NDArray[Any]
Split = Literal["train", "validation", "test"]


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
        told: list[str] = names or []
        if repeated := sorted({name for name in told if told.count(name) > 1}):
            raise DataError(f"{path}: class_names holds {repeated} more than once; give every type a name of its own")
        if len(told) > MOST_CLASSES:
            raise DataError(f"{path}: there are {len(told)} class_names; at most {MOST_CLASSES} can be told apart")
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
        raise DataError(f"{path} cannot be read as an array: {one_line(error)}") from error
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
