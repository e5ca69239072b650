"""PanNuke, as its authors publish it: three folds of images, masks in six channels, and the tissue of each image."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsipipe.errors import DataError, one_line
from wsipipe.metrics import remap_label
from wsipipe.model.registry import PANNUKE_CLASSES
from wsipipe.training.data import Patch, PatchSet
from wsipipe.training.write import SOURCES, Description, Drawn, digest_of, write_patch_set

Array = npt.NDArray[Any]
FOLDS = ("1", "2", "3")
SPLIT_OF_FOLD = {"1": "train", "2": "validation", "3": "test"}  # the first of the three published splits
TISSUES = {
    "Adrenal_gland": 437, "Bile-duct": 420, "Bladder": 146, "Breast": 2351, "Cervix": 293, "Colon": 1440,
    "Esophagus": 424, "HeadNeck": 384, "Kidney": 134, "Liver": 224, "Lung": 184, "Ovarian": 146, "Pancreatic": 195,
    "Prostate": 182, "Skin": 187, "Stomach": 146, "Testis": 196, "Thyroid": 226, "Uterus": 186,
}  # fmt: skip
PUBLISHED = {
    "images": 7901,
    "nuclei": 189_744,
    "fold": {"1": 2656, "2": 2523, "3": 2722},
    "tissue": TISSUES,
    "type_images": {"neoplastic": 4191, "inflammatory": 4132, "connective": 6140, "dead": 232, "epithelial": 1528},
}
ABOUT = Description(
    name="PanNuke",
    mpp=0.25,
    class_names=PANNUKE_CLASSES,
    source="Gamper et al. 2020, PanNuke Dataset Extension, arXiv 2003.10778",
    licence="CC-BY-NC-SA-4.0",
    published=PUBLISHED,
)


def prepare_pannuke(src: Path, dst: Path) -> PatchSet:
    """Turn `Fold N/{images,masks}/foldN/*.npy` of `src` into the patch set `dst`: one set, the folds "1", "2", "3".

    Notes
    -----
    Of an image, the nuclei of every mask channel are numbered on, and where channels overlap the later one lies on top,
    as CellViT converts them. What differs from the published counts is a warning.

    Raises
    ------
    DataError
        With every file that is missing or is not shaped as the authors' are; or with the first image whose values
        are none of an image or a mask.
    """
    folds, faults = {}, []
    for fold in FOLDS:
        found = _find_fold(src, fold)
        arrays = {}
        for name in ("images", "types", "masks"):
            path = found / ("masks" if name == "masks" else "images") / f"fold{fold}" / f"{name}.npy"
            try:
                arrays[name] = path, read_array(path)
            except DataError as error:
                faults.append(str(error))
        if len(arrays) == 3:
            faults += _shape_faults(arrays)
        folds[fold] = arrays
    if faults:
        raise DataError("; ".join(faults))

    sources = digest_of(src, (path for arrays in folds.values() for path, _ in arrays.values()))
    index = []
    for fold, arrays in folds.items():
        tissues = arrays["types"][1]
        for i, tissue in enumerate(tissues.tolist()):
            name = f"fold{fold}_{i:04d}"
            index.append(Patch(name, name, SPLIT_OF_FOLD[fold], str(tissue), fold))
    side = next(iter(folds.values()))["images"][1].shape[1:3]
    about = replace(ABOUT, notes={SOURCES: sources})
    return write_patch_set(dst, about, index, side, lambda: _patches(folds))


def _find_fold(src: Path, fold: str) -> Path:
    """`Fold 1`, or what people make of it: `fold_1`, `fold1`."""
    for name in (f"Fold {fold}", f"Fold_{fold}", f"fold_{fold}", f"fold{fold}", f"Fold{fold}"):
        if (src / name).is_dir():
            return src / name
    return src / f"Fold {fold}"


def read_array(path: Path) -> Array:
    """An array file of others, by memory map; never one that would need pickle.

    Raises
    ------
    DataError
        If it is missing or no such file.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; unpack the data set as its authors publish it")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as an array ({one_line(error)}); "
            "files of Python objects are not opened, they could run code"
        ) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is an archive of arrays, not one array")
    return np.asarray(array)


def _shape_faults(arrays: dict[str, tuple[Path, Array]]) -> list[str]:
    (_, images), (types_path, types), (masks_path, masks) = (arrays[name] for name in ("images", "types", "masks"))
    faults = []
    if images.ndim != 4 or images.shape[3] != 3 or not len(images):
        faults.append(f"{arrays['images'][0]} has the shape {images.shape}; it must be (n, 256, 256, 3)")
    if types.shape != images.shape[:1] or types.dtype.kind not in "US":
        faults.append(
            f"{types_path} holds {types.shape} {types.dtype}; it must name the tissue of {len(images)} images"
        )
    if masks.shape[:-1] != images.shape[:-1]:
        faults.append(f"{masks_path} has the shape {masks.shape}, which does not fit images of {images.shape}")
    elif masks.shape[3] != 6:
        faults.append(
            f"{masks_path} has {masks.shape[3]} channels; it must have six: five types, and the background in the last"
        )
    return faults


def _patches(folds: dict[str, dict[str, tuple[Path, Array]]]) -> Iterator[Drawn]:
    for arrays in folds.values():
        images_path, images = arrays["images"]
        masks_path, masks = arrays["masks"]
        for i in range(len(images)):
            image = np.asarray(images[i])
            if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 255):
                raise DataError(f"{images_path}, image {i}: its values are not between 0 and 255")
            yield Drawn(image.astype(np.uint8), *joined(np.asarray(masks[i]), f"{masks_path}, image {i}"))


def joined(masks: Array, where: str) -> tuple[Array, Array]:
    """Instances (H, W) and types (H, W) of masks (H, W, 6): a channel of nuclei a type, the last is background.

    Raises
    ------
    DataError
        If a channel does not hold whole numbers from 0.
    """
    instances, types = np.zeros(masks.shape[:2], np.int32), np.zeros(masks.shape[:2], np.uint8)
    for channel in range(masks.shape[2] - 1):
        mask = masks[..., channel]
        whole = mask.astype(np.int32)
        if whole.min() < 0 or not (whole == mask).all():
            raise DataError(f"{where}: channel {channel} holds values that number no nuclei")
        nuclei = whole > 0
        instances[nuclei] = remap_label(whole)[nuclei] + instances.max()
        types[nuclei] = channel + 1
    return remap_label(instances), types
