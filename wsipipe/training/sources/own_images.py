"""One's own images: how they lie in a folder, which of them train, and the types that are learnt.

Images may differ in size: they are cut into patches of one size, as few as cover them.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from wsipipe.errors import DataError
from wsipipe.model.spec import MOST_CLASSES
from wsipipe.training.data import SPLITS

BESIDES = (".geojson", ".json", ".gz", ".csv", ".txt", ".md")  # what may lie beside images and is none


@dataclass(frozen=True)
class Splits:
    """Which images train, validate and test.

    Attributes
    ----------
    table : path of a CSV of name, group and split, optional
        Without it groups are drawn (seed 19): those for validation and for the test until they have their share of the
        images. A group is the first part of an image's name, up to `_` or `-`, after the leading parts that all names
        share: p07 of p07_a and p08_a, AA of TCGA-AA-3521 and TCGA-A6-2671. An image whose name has no other part is a
        group of its own.
    """

    table: Path | None = None
    validation: float = 0.2
    test: float = 0.0

    def of(self, names: Sequence[str]) -> dict[str, tuple[str, str]]:
        """(group, split) of every image.

        Raises
        ------
        DataError
            If the table leaves an image out, names one twice or a split there is not.
        """
        if self.table is None:
            return self._drawn(names)
        try:
            with self.table.open(newline="", encoding="utf-8-sig") as file:
                rows = [(row["name"], row["group"], row["split"]) for row in csv.DictReader(file)]
        except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
            raise DataError(f"{self.table} must be a table of name, group and split: {error}") from error
        places = {name: (group, split) for name, group, split in rows}
        faults = [f"{name} is there twice" for name in places if sum(row[0] == name for row in rows) > 1]
        faults += [f"{name} is not there" for name in names if name not in places]
        faults += [f"{name} has the split {split!r}" for name, _, split in rows if split not in SPLITS]
        if faults:
            raise DataError(f"{self.table}: {'; '.join(faults)}")
        return places

    def _drawn(self, names: Sequence[str]) -> dict[str, tuple[str, str]]:
        parts = {name: name.replace("-", "_").split("_") for name in names}
        places = zip(*parts.values(), strict=False)
        shared = sum(1 for _ in takewhile(lambda of: len(set(of)) == 1, places))  # leading parts that tell nothing
        group_of = {name: of[shared] if len(of) > shared else name for name, of in parts.items()}
        images = {group: sum(of == group for of in group_of.values()) for group in sorted(set(group_of.values()))}
        if self.validation > 0 and len(images) < 2:
            raise DataError("a single image, patient or slide cannot train and validate; annotate a second one")
        free = np.random.default_rng(19).permutation(sorted(images)).tolist()
        split_of = dict.fromkeys(free, "train")
        for split, share in (("test", self.test), ("validation", self.validation)):
            taken = 0
            while share > 0 and taken < share * len(names) and sum(of == "train" for of in split_of.values()) > 1:
                group = next(group for group in free if split_of[group] == "train")
                split_of[group] = split
                taken += images[group]
            if share > 0 and not taken:
                raise DataError(
                    f"{len(images)} images, patients or slides are too few to train, validate and test on different "
                    "ones; annotate another, or ask for fewer parts"
                )
        return {name: (group_of[name], split_of[group_of[name]]) for name in names}


def images_of(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names without ending.

    Raises
    ------
    DataError
        If there are none, or two of one name.
    """
    files = sorted(
        path
        for path in folder.glob("*")
        if path.is_file() and path.suffix.lower() not in BESIDES and not path.name.startswith(".")
    )
    stems = {path.stem: path for path in files}
    if not stems:
        raise DataError(f"{folder} holds no images")
    if len(stems) < len(files):
        twice = sorted({path.stem for path in files if sum(other.stem == path.stem for other in files) > 1})
        raise DataError(f"{folder} holds several images called {', '.join(twice)}; a name must be one image's")
    return stems


def first_of(folder: Path, stem: str, endings: Sequence[str]) -> Path | None:
    """The file of that name with the first of these endings that there is."""
    return next((path for ending in endings if (path := folder / f"{stem}{ending}").is_file()), None)


def class_names_of(wanted: Sequence[str] | None, found: set[str]) -> tuple[str, ...]:
    """Background and the types: those asked for, or else all that were found, in the order of the alphabet.

    Raises
    ------
    DataError
        If they are more than a patch set can tell apart.
    """
    types = sorted(found) if wanted is None else [name for name in dict.fromkeys(wanted) if not is_background(name)]
    if len(types) >= MOST_CLASSES:
        raise DataError(f"there are {len(types)} types; at most {MOST_CLASSES - 1} can be told apart")
    return ("background", *types)


def is_background(name: str) -> bool:
    """Whether a type is called as what is no nucleus."""
    return name.lower() == "background"
