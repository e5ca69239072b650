"""Folders of images and masks to patch sets (`wsipipe.training.data`), and the recipe of the default model's data.

A source folder holds `images/<stem>.*` (RGB), `masks/<stem>.png` (16 bit, 0 background, 1..N nuclei) and, where there
are any, `types/<stem>.csv` (id,type), `trust/<stem>.csv` (id,trusted) and `binary/<stem>.png` (nucleus or not).
"""

import csv
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsipipe.atomic import partial_of
from wsipipe.errors import DataError
from wsipipe.mask_table import read_mask_table
from wsipipe.training.data import FORMAT, UNKNOWN_TYPE, Patch, PatchSet
from wsipipe.training.negatives import write_negatives
from wsipipe.training.write import SOURCES, already_there, digest_of

log = logging.getLogger(__name__)

CLASS_NAMES = ("background", "other", "inflammatory", "epithelial", "spindle-shaped")
Array = npt.NDArray[Any]
WHITE = 240  # what bare glass becomes where the white point is set; scanners give about 230 to 245


@dataclass(frozen=True)
class SourceFolder:
    """What a source folder does not say by itself.

    Attributes
    ----------
    place : function
        (position in the order of stems, stem) to (group, split).
    class_names : tuple of str, optional
        Background first. Without it the types of the folder are not read.
    set_white : bool
        Scale each channel so that its 99th percentile over the whole folder becomes `WHITE`.
    """

    name: str
    mpp: float
    source: str
    licence: str
    place: Callable[[int, str], tuple[str, str]]
    class_names: tuple[str, ...] | None = None
    set_white: bool = False


def prepare_masks(src: Path, dst: Path, about: SourceFolder) -> PatchSet:
    """Turn a folder of images with instance masks into the patch set `dst`, or open it if it is already there.

    Where there is a `binary/`, the nuclei of the result cover what it covers: what `masks/` lacks becomes a nucleus
    that is not trusted, what `masks/` has beyond it background. Nuclei that `trust/` does not vouch for are not
    trusted.

    Raises
    ------
    DataError
        If a file is missing or does not fit the others, the images differ in size, or `dst` was made from something
        else or its sources were changed since.
    """
    stems = {path.stem: path for path in sorted((src / "images").glob("*")) if path.is_file()}
    if not stems:
        raise DataError(f"{src / 'images'} holds no images; a source folder has images/ and masks/")
    description = {
        "format": FORMAT,
        "name": about.name,
        "mpp": about.mpp,
        "class_names": about.class_names,
        "source": about.source,
        "licence": about.licence,
        "white_set_to": WHITE if about.set_white else None,
        "notes": {SOURCES: digest_of(src, _files_of(src, stems))},
    }
    description = json.loads(json.dumps(description))
    index = [Patch(stem, *about.place(i, stem)) for i, stem in enumerate(stems)]
    if dst.exists():
        return already_there(dst, description, index)

    partial = partial_of(dst)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    height, width = _read_image(next(iter(stems.values()))).shape[:2]
    shape = (len(stems), height, width)
    images = np.lib.format.open_memmap(partial / "images.npy", "w+", np.uint8, (*shape, 3))
    instances = np.lib.format.open_memmap(partial / "instances.npy", "w+", np.uint16, shape)
    typed, doubted = about.class_names is not None, (src / "trust").is_dir()
    types = np.lib.format.open_memmap(partial / "types.npy", "w+", np.uint8, shape) if typed else None
    trusted = np.lib.format.open_memmap(partial / "trusted.npy", "w+", np.bool_, shape) if doubted else None

    for i, (stem, path) in enumerate(stems.items()):
        images[i] = _fitting(path, _read_image(path), shape[1:])
        labels = _read_mask(src / "masks" / f"{stem}.png", shape[1:])
        mask, trust = labels, np.ones(shape[1:], bool)
        if doubted:
            trust = _paint_trust(labels, src / "trust" / f"{stem}.csv")
        if (src / "binary").is_dir():
            mask, trust = _follow_binary(labels, trust, _read_mask(src / "binary" / f"{stem}.png", shape[1:]) > 0)
        instances[i] = mask
        if types is not None and about.class_names is not None:
            of_label = _paint_types(labels, src / "types" / f"{stem}.csv", about.class_names)
            types[i] = np.where(mask > 0, np.where(labels > 0, of_label, UNKNOWN_TYPE), 0)
        if trusted is not None:
            trusted[i] = trust
    if about.set_white:
        _set_white(images)
    for array in (images, instances, types, trusted):
        if array is not None:
            array.flush()
    with (partial / "index.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "group", "split"), *((p.name, p.group, p.split) for p in index)])
    (partial / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    PatchSet.open(partial)
    partial.rename(dst)
    log.info("%s: %d images of %d x %d px from %s", dst, len(stems), width, height, src)
    return PatchSet.open(dst)


def _files_of(src: Path, images: Mapping[str, Path]) -> list[Path]:
    """The images, and what there is beside them."""
    beside = (("masks", ".png"), ("types", ".csv"), ("trust", ".csv"), ("binary", ".png"))
    files = [src / folder / f"{stem}{ending}" for stem in images for folder, ending in beside]
    return [*images.values(), *(path for path in files if path.is_file())]


def _read_image(path: Path) -> Array:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path} cannot be read as an image")
    return image[..., ::-1]


def _read_mask(path: Path, shape: tuple[int, ...]) -> Array:
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.ndim != 2 or mask.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path} must be a PNG with one channel of 8 or 16 bit")
    return _fitting(path, mask.astype(np.uint16), shape)


def _fitting(path: Path, image: Array, shape: tuple[int, ...]) -> Array:
    if image.shape[:2] != shape:
        raise DataError(f"{path} is {image.shape[1::-1]} px, the first image {shape[::-1]}: one size to a patch set")
    return image


def _paint_types(mask: Array, path: Path, class_names: tuple[str, ...]) -> Array:
    """Type of every pixel; nuclei that the table leaves out are of unknown type."""
    of_id = np.full(int(mask.max()) + 1, UNKNOWN_TYPE, np.uint8)
    of_id[0] = 0
    for _, number, name in read_mask_table(path, "type"):
        if name is None or name not in class_names[1:] or not 0 < number < len(of_id):
            raise DataError(f"{path}: nucleus {number} of type {name!r} is not in the mask or not a class of this set")
        of_id[number] = class_names.index(name)
    return of_id[mask]


def _paint_trust(mask: Array, path: Path) -> Array:
    """False within the nuclei that the table does not vouch for."""
    of_id = np.zeros(int(mask.max()) + 1, bool)
    of_id[0] = True
    for _, number, trusted in read_mask_table(path, "trusted"):
        if not 0 < number < len(of_id) or trusted not in ("0", "1"):
            raise DataError(f"{path}: nucleus {number} is not in the mask, or trusted is not 0 or 1")
        of_id[number] = trusted == "1"
    return of_id[mask]


def _follow_binary(mask: Array, trust: Array, nuclei: Array) -> tuple[Array, Array]:
    missed = nuclei & (mask == 0)
    extra = cv2.connectedComponents(missed.astype(np.uint8))[1]
    followed = np.where(nuclei, mask, 0)
    followed[missed] = extra[missed] + int(mask.max())
    return followed, (trust & ~missed) | ~nuclei


def _set_white(images: Array) -> None:
    white = np.percentile(images[:, ::8, ::8].reshape(-1, 3), 99, axis=0)
    levels = np.arange(256)[:, None] * (WHITE / white)
    table = np.rint(np.clip(levels, 0, 255)).astype(np.uint8)[None]
    for i in range(len(images)):
        images[i] = cv2.LUT(images[i], table)
    log.info("white point set: %s becomes %d", np.round(white, 1).tolist(), WHITE)


# --- the default model's data -----------------------------------------------------------------------------------------


def prepare_default(src: Path, dst: Path) -> dict[str, PatchSet]:
    """Patch sets of the default model, by name, in folders of `dst`; those that are there already are kept.

    `src` holds the folders `consep`, `nuinsseg`, `tnbc_naylor`, `dsb2018_stained` and `nucls_mini`. To what they hold
    comes `negatives`, pictures without nuclei.
    """
    sets = {folder: prepare_masks(src / folder, dst / folder, about) for folder, about in DEFAULT_SETS.items()}
    without = [sets[folder] for folder in ("consep", "nuinsseg", "tnbc_naylor")]
    return {**sets, "negatives": write_negatives(dst / "negatives", without, CLASS_NAMES)}


def _place_consep(i: int, stem: str) -> tuple[str, str]:
    """The authors' split; which of the 16 slides an image is from is not published. Every ninth image validates."""
    split, number = stem.split("_")
    if split == "train" and int(number) % 9 == 5:
        split = "validation"
    return stem, split


def _place_nuinsseg(i: int, stem: str) -> tuple[str, str]:
    """Neighbours are of one organ and slide: blocks of 20 stay together, three of the 34 validate."""
    block = i // 20
    return f"block-{block:02d}", "validation" if block % 12 == 5 else "train"


def _place_tnbc(i: int, stem: str) -> tuple[str, str]:
    """By patient, as in the literature: 01 to 06, 07 and 08, 09 to 11."""
    patient = stem.split("_")[0]
    return patient, "train" if patient <= "06" else "validation" if patient <= "08" else "test"


def _place_in_training(i: int, stem: str) -> tuple[str, str]:
    return stem, "train"


DEFAULT_SETS = {
    "consep": SourceFolder(
        "CoNSeP",
        0.275,
        "Graham et al. 2019, HoVer-Net, doi:10.1016/j.media.2019.101563",
        "Apache-2.0",
        _place_consep,
        class_names=CLASS_NAMES,
    ),
    "nuinsseg": SourceFolder(
        "NuInsSeg",
        0.18,  # nominally 0.25, but its nuclei are 1.5 times as wide as those of the other sets
        "Mahbod et al. 2024, doi:10.1038/s41597-024-03117-2; instances re-derived from the authors' masks",
        "CC-BY-4.0",
        _place_nuinsseg,
        set_white=True,
    ),
    "tnbc_naylor": SourceFolder(
        "TNBC", 0.25, "Naylor et al. 2018, doi:10.5281/zenodo.1174342", "CC-BY-4.0", _place_tnbc
    ),
    "dsb2018_stained": SourceFolder(
        "DSB2018 stained",
        0.25,  # not stated; its nuclei are nearly as wide as those of TNBC
        "Caicedo et al. 2019, BBBC038, doi:10.1038/s41592-019-0612-7",
        "CC0-1.0",
        _place_in_training,
    ),
    "nucls_mini": SourceFolder(
        "NuCLS mini", 0.25, "Amgad et al. 2022, doi:10.1093/gigascience/giac037", "CC0-1.0", _place_in_training
    ),
}
