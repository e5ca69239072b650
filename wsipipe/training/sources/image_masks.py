"""One's own images with instance masks and tables of types."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsipipe.errors import DataError, one_line
from wsipipe.mask_table import read_mask_table
from wsipipe.training.data import UNKNOWN_TYPE, Patch, PatchSet
from wsipipe.training.sources.own_images import Splits, class_names_of, first_of, images_of, is_background
from wsipipe.training.write import SOURCES, Description, Drawn, digest_of, windows, write_patch_set

Array = npt.NDArray[Any]


def prepare_image_masks(
    src: Path, dst: Path, about: Description, patch_px: int, splits: Splits, classes: Sequence[str] | None = None
) -> PatchSet:
    """Turn `images/<stem>.*`, `masks/<stem>.png|tif|npy` and, if there, `types/<stem>.csv` (id,type) into `dst`.

    A mask has one channel of whole numbers: 0 background, every other value one nucleus. Nuclei that the table leaves
    out, or names without a type, are of unknown type. Without `classes` the types are those of the tables, in the order
    of the alphabet.

    Raises
    ------
    DataError
        With every file that is missing or does not fit.
    """
    stems = images_of(src / "images")
    masks = {stem: first_of(src / "masks", stem, (".png", ".tif", ".tiff", ".npy")) for stem in stems}
    faults = [f"{src / 'masks' / stem}.png is missing" for stem, path in masks.items() if path is None]
    beside = [*masks.values(), *(first_of(src / "types", stem, (".csv",)) for stem in stems)]
    sources = digest_of(src, [*stems.values(), *(path for path in beside if path is not None)])
    tables: dict[str, dict[int, str]] = {}
    if (src / "types").is_dir():
        for stem in stems:
            try:
                tables[stem] = _type_table(src / "types" / f"{stem}.csv")
            except DataError as error:
                faults.append(str(error))
    occurring = {name for table in tables.values() for name in table.values()}
    names = class_names_of(classes, occurring) if tables and (classes or occurring) else None
    images: dict[str, tuple[int, int]] = {}
    for stem, mask in masks.items():
        if mask is not None:
            try:
                image, labels = _read_image(stems[stem]), _read_labels(mask)
                faults += _mask_faults(stems[stem], image, mask, labels, tables.get(stem, {}), names, patch_px)
                images[stem] = image.shape[0], image.shape[1]
            except DataError as error:
                faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    places = splits.of(list(stems))
    cuts = {
        stem: [(y, x) for y in windows(height, patch_px) for x in windows(width, patch_px)]
        for stem, (height, width) in images.items()
    }
    index = [Patch(f"{stem}_{y}_{x}", *places[stem]) for stem in stems for y, x in cuts[stem]]

    def patches() -> Iterator[Drawn]:
        for stem, path in stems.items():
            mask = masks[stem]
            assert mask is not None, "looked for above"
            image, labels = _read_image(path), _read_labels(mask)
            types = None if names is None else _painted_types(labels, tables[stem], names)
            for y, x in cuts[stem]:
                cut = np.s_[y : y + patch_px, x : x + patch_px]
                yield Drawn(image[cut], _renumbered(labels[cut]), None if types is None else types[cut])

    about = replace(about, class_names=names, notes={**about.notes, "patch_px": patch_px, SOURCES: sources})
    return write_patch_set(dst, about, index, (patch_px, patch_px), patches)


def _read_image(path: Path) -> Array:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise DataError(f"{path} cannot be read as an image")
    return np.asarray(image)


def _read_labels(path: Path) -> Array:
    if path.suffix == ".npy":
        try:
            labels: Any = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read as an array of numbers: {one_line(error)}") from error
    else:
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise DataError(f"{path} must hold one channel of whole numbers: 0 background, 1..N nuclei")
    return labels


def _type_table(path: Path) -> dict[int, str]:
    """Type of every nucleus that the table gives one."""
    rows = [(row.number, row.value) for row in read_mask_table(path, "type") if row.value]
    if background := sorted(number for number, name in rows if is_background(name)):
        raise DataError(
            f"{path}: the ids {background} have the type background; give them another, or none if it is not known"
        )
    return dict(rows)


def _mask_faults(
    image_path: Path, image: Array, mask: Path, labels: Array, table: Mapping[int, str], names: Sequence[str] | None,
    patch_px: int,
) -> list[str]:  # fmt: skip
    faults = []
    if labels.shape != image.shape[:2]:
        faults.append(
            f"{mask} is {labels.shape[1]} x {labels.shape[0]} px, its image {image.shape[1]} x {image.shape[0]}"
        )
    if min(image.shape[:2]) < patch_px:
        faults.append(f"{image_path} is smaller than a patch of {patch_px} px; choose a smaller --patch-px")
    if labels.min() < 0:
        faults.append(f"{mask} holds negative numbers")
    if np.issubdtype(labels.dtype, np.integer) and len(np.unique(labels)) > 65535:
        faults.append(f"{mask} holds more than 65,535 nuclei; cut the image first")
    there = set(np.unique(labels).tolist()) - {0}
    if missing := sorted(set(table) - there):
        faults.append(f"the table of {mask.stem} types nuclei that its mask has not: {missing[:5]}")
    if names is not None and (foreign := sorted(set(table.values()) - set(names[1:]))):
        faults.append(f"the table of {mask.stem} has the types {foreign}, which are not among {list(names[1:])}")
    return faults


def _painted_types(labels: Array, table: Mapping[int, str], names: Sequence[str]) -> Array:
    ids, index = np.unique(labels, return_inverse=True)
    of_id = np.array([0 if not i else names.index(table[i]) if i in table else UNKNOWN_TYPE for i in ids.tolist()])
    return of_id[index.reshape(labels.shape)].astype(np.uint8)


def _renumbered(labels: Array) -> Array:
    ids, index = np.unique(labels, return_inverse=True)
    return (index.reshape(labels.shape) + int(ids[0] != 0)).astype(np.uint16)
