"""Writing a patch set: image by image, complete before it takes its name, and compared with what was published."""

import csv
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsipipe.atomic import partial_of
from wsipipe.errors import DataError
from wsipipe.metrics import majority_types, remap_label
from wsipipe.training.data import FORMAT, UNKNOWN_TYPE, Patch, PatchSet

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
SHOWN = 5  # of the differences, in the log
SOURCES = "sources_sha256"  # the note that tells what a set was made of: `digest_of` its sources


@dataclass(frozen=True)
class Description:
    """What `dataset.json` says.

    Attributes
    ----------
    published : dict, optional
        Counts as the authors give them, in the form of `count`: what differs is said when the set is made and by
        `wsipipe data check`.
    notes : dict, optional
        How the set was made: settings that, if they differ, make it another set; and its sources, as `SOURCES`.
    """

    name: str
    mpp: float
    class_names: tuple[str, ...] | None
    source: str
    licence: str
    published: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.01 <= self.mpp <= 100:  # NaN too
            raise DataError(f"{self.mpp} µm per pixel is no resolution of a patch; give one such as 0.25")

    def as_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"format": FORMAT, "name": self.name, "mpp": self.mpp}
        values |= {"class_names": self.class_names, "source": self.source, "licence": self.licence}
        values |= {key: value for key in ("published", "notes") if (value := dict(getattr(self, key)))}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


@dataclass(frozen=True, eq=False)
class Drawn:
    """One image and its nuclei, as `wsipipe.training.data` lays them out; no types where the set knows none."""

    image: Array
    instances: Array
    types: Array | None = None


def write_patch_set(
    dst: Path,
    about: Description,
    index: Sequence[Patch],
    side: tuple[int, int],
    patches: Callable[[], Iterator[Drawn]],
) -> PatchSet:
    """Write the patch set `dst`, or open it if it is already there.

    Parameters
    ----------
    index : sequence of N Patch
    side : (height, width)
        Of every image.
    patches : function
        Gives the N images in the order of the index; called once, and only if there is something to write.

    Raises
    ------
    DataError
        If `dst` was made of something else, or its sources were changed since; or whatever `patches` finds wrong, and
        nothing is left of it then.
    """
    description = about.as_json()
    if dst.exists():
        return already_there(dst, description, index)
    partial = partial_of(dst)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_arrays(partial, len(index), side, about.class_names is not None, patches())
        rows = [(p.name, p.group, p.split, p.tissue, p.fold) for p in index]
        with (partial / "index.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("name", "group", "split", "tissue", "fold"), *rows])
        (partial / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        written = PatchSet.open(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if lines := differences(count(written), about.published):
        more = f" and {len(lines) - SHOWN} more ('wsipipe data check' lists them)" if len(lines) > SHOWN else ""
        log.warning("%s is not as published: %s%s", dst, "; ".join(lines[:SHOWN]), more)
    partial.rename(dst)
    log.info("%s: %d images of %d x %d px", dst, len(index), side[1], side[0])
    return PatchSet.open(dst, check_values=False)


def _write_arrays(folder: Path, count: int, side: tuple[int, int], typed: bool, patches: Iterator[Drawn]) -> None:
    def array(name: str, dtype: type, *more: int) -> Array:
        made: Array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count, *side, *more))
        return made

    images, instances = array("images", np.uint8, 3), array("instances", np.uint16)
    types = array("types", np.uint8) if typed else None
    number = -1
    for number, drawn in enumerate(patches):
        images[number], instances[number] = drawn.image, drawn.instances
        if types is not None:
            types[number] = UNKNOWN_TYPE * (drawn.instances > 0) if drawn.types is None else drawn.types
    assert number == count - 1, "as many images as the index has rows"
    for written in (images, instances, types):
        if isinstance(written, np.memmap):
            written.flush()


def digest_of(folder: Path, files: Iterable[Path], *others: str) -> str:
    """Hash of files within `folder`, by their names and contents, and of other texts; wherever the folder lies.

    Raises
    ------
    DataError
        If a file cannot be read.
    """
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from error
        digest.update(json.dumps([name, content]).encode())
    digest.update(json.dumps(others).encode())
    return digest.hexdigest()


def already_there(dst: Path, description: Mapping[str, Any], index: Sequence[Patch]) -> PatchSet:
    """The patch set `dst`, if it is what would be written: of the same description, sources and index.

    Raises
    ------
    DataError
        If it is another one, or not whole.
    """
    there = PatchSet.open(dst)
    stored = json.loads((dst / "dataset.json").read_text(encoding="utf-8"))
    made_of = _sources_of(stored)
    if made_of != _sources_of(description):
        why = "was prepared from other sources, or these were changed since"
        why = "does not say what sources it was prepared from" if made_of is None else why
        raise DataError(f"{dst} {why}; remove it or name another folder")
    if stored != description or list(there.index) != list(index):
        raise DataError(f"{dst} was prepared from other data or settings; remove it or name another folder")
    log.info("%s is there already", dst)
    return there


def _sources_of(description: Mapping[str, Any]) -> Any:
    notes = description.get("notes")
    return notes.get(SOURCES) if isinstance(notes, Mapping) else None


def windows(length: int, side: int, stride: int | None = None) -> list[int]:
    """Where windows of `side` px begin that cover `length` px: as few as it takes, evenly, or `stride` px apart."""
    if stride is not None:
        return list(range(0, length - side + 1, stride))
    count = -(-length // side)
    return [round(start) for start in np.linspace(0, length - side, count)]


def count(patches: PatchSet) -> dict[str, Any]:
    """What a patch set holds: `images`, `nuclei`; images of each `fold` and `tissue`; for each type its `type_nuclei`
    and `type_images`, the number of images that hold one; `split` to images and nuclei of each split.
    """
    counts: dict[str, Any] = {"images": len(patches), "nuclei": 0, "split": {}, "fold": {}, "tissue": {}}
    names = patches.class_names if patches.types is not None else None
    typed = {key: dict.fromkeys((names or ())[1:], 0) for key in ("type_nuclei", "type_images")}
    for number, patch in enumerate(patches.index):
        instances = remap_label(np.maximum(patches.instances[number].astype(np.int32), 0))
        nuclei = int(instances.max(initial=0))
        counts["nuclei"] += nuclei
        split = counts["split"].setdefault(patch.split or "unused", {"images": 0, "nuclei": 0})
        split["images"] += 1
        split["nuclei"] += nuclei
        for key in ("fold", "tissue"):
            if of := getattr(patch, key):
                counts[key][of] = counts[key].get(of, 0) + 1
        if names is not None and patches.types is not None:
            types = majority_types(instances, patches.types[number])
            held = np.bincount(types, minlength=UNKNOWN_TYPE + 1)
            for of_type, name in enumerate(names[1:], start=1):
                typed["type_nuclei"][name] += int(held[of_type])
                typed["type_images"][name] += int(held[of_type] > 0)
            if held[0]:
                typed["type_nuclei"]["untyped"] = typed["type_nuclei"].get("untyped", 0) + int(held[0])
            if held[UNKNOWN_TYPE]:
                typed["type_nuclei"]["unknown"] = typed["type_nuclei"].get("unknown", 0) + int(held[UNKNOWN_TYPE])
    return {key: value for key, value in {**counts, **typed}.items() if value != {}}


def differences(found: Mapping[str, Any], published: Mapping[str, Any]) -> list[str]:
    """One sentence for every published count that this set does not have."""
    lines: list[str] = []
    for key, expected in published.items():
        there = found.get(key)
        if isinstance(expected, Mapping):
            there = there if isinstance(there, Mapping) else {}
            lines += [
                f"{key} {name}: {there.get(name, 0):,} here, {number:,} published"
                for name, number in expected.items()
                if there.get(name, 0) != number
            ]
        elif there != expected:
            lines.append(f"{key}: {there:,} here, {expected:,} published")
    return lines
