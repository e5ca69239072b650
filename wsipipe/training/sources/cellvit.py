"""The folders that CellViT and CellVTA train from: `fold*/images/*.png`, and `fold*/labels/*.npy` with pickled dicts.

A pickle can run code when it is read. These are read by an unpickler that knows numpy's arrays and nothing else.
"""

import csv
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import numpy.typing as npt
from numpy._core import multiarray

from wsipipe.config import read_yaml
from wsipipe.errors import ConfigError, DataError, one_line
from wsipipe.metrics import remap_label
from wsipipe.training.data import Patch, PatchSet
from wsipipe.training.write import SOURCES, Description, Drawn, digest_of, write_patch_set

Array = npt.NDArray[Any]
MAX_BYTES = 256 << 20  # of one label; those of PanNuke have one


def prepare_cellvit(src: Path, dst: Path, mpp: float) -> PatchSet:
    """Turn a folder of CellViT's layout into the patch set `dst`; its folds stay folds.

    `dataset_config.yaml` names types and tissues, `types.csv` of a fold (img,type) the tissue of each image. Fold 0
    trains, 1 validates, 2 tests, until a run chooses others; images without a label are left out, as there.

    Raises
    ------
    DataError
        With every file that is missing, cannot be read or does not fit; names that repeat between folds among them.
    """
    try:
        config = read_yaml(src / "dataset_config.yaml", "the description of a data set")
        ids = {int(number): str(name) for name, number in config["nuclei_types"].items()}
        tissue_names = list(config.get("tissue_types") or {})
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{src / 'dataset_config.yaml'} does not say the nuclei_types: {error}") from error
    if sorted(ids) != list(range(len(ids))):
        raise DataError(
            f"{src / 'dataset_config.yaml'}: nuclei_types must be numbered from 0 (background) without gaps"
        )
    classes = tuple(ids[number].lower() for number in sorted(ids))

    index: list[Patch] = []
    files: list[tuple[Path, Path]] = []
    faults: list[str] = []
    seen: set[str] = set()
    folds = sorted(path for path in src.glob("fold*") if path.is_dir())
    tables = [path for fold in folds if (path := fold / "types.csv").is_file()]
    for place, fold in enumerate(folds):
        tissues = _tissues(fold / "types.csv", faults)
        default = tissue_names[0] if len(tissue_names) == 1 else ""
        for image in sorted((fold / "images").glob("*.png"), key=_natural):
            label = fold / "labels" / f"{image.stem}.npy"
            if not label.is_file():
                continue
            if image.name in seen:
                faults.append(f"{image}: another fold has an image of this name")
            if tissues and image.name not in tissues:
                faults.append(f"{fold / 'types.csv'} does not name the tissue of {image.name}")
            seen.add(image.name)
            split = ("train", "validation", "test")[min(place, 2)]
            number = fold.name.removeprefix("fold")
            index.append(Patch(image.stem, image.stem, split, tissues.get(image.name, default), number))
            files.append((image, label))
    if not index:
        faults.append(f"{src} holds no fold*/images/*.png with a label in fold*/labels")
    if faults:
        raise DataError("; ".join(faults))
    sources = digest_of(src, [src / "dataset_config.yaml", *tables, *(path for pair in files for path in pair)])
    about = Description(
        src.name, mpp, classes, "a data folder of CellViT or CellVTA", "that of the data set", notes={SOURCES: sources}
    )
    side = _image(files[0][0]).shape[:2]
    return write_patch_set(dst, about, index, side, lambda: _patches(files, side, len(classes)))


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", path.name)]


def _tissues(path: Path, faults: list[str]) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(row["img"], row["type"]) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        faults.append(f"{path} must be a table of img and type: {type(error).__name__}: {error}")
        return {}
    faults += [
        f"{path} names {name} twice" for name in {name for name, _ in rows} if sum(n == name for n, _ in rows) > 1
    ]
    return dict(rows)


def _image(path: Path) -> Array:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise DataError(f"{path} cannot be read as an image")
    return np.asarray(image)


def _patches(files: list[tuple[Path, Path]], side: tuple[int, ...], classes: int) -> Iterator[Drawn]:
    for image_path, label_path in files:
        image, (instances, types) = _image(image_path), read_label(label_path)
        if not image.shape[:2] == instances.shape == types.shape == side:
            raise DataError(f"{image_path} is {image.shape[:2]}, its label {instances.shape}, the first image {side}")
        if instances.min() < 0:
            raise DataError(f"{label_path}: inst_map holds {instances.min()}; nuclei are numbered from 1")
        if foreign := [number for number in (types.min(), types.max()) if not 0 <= number < classes]:
            raise DataError(f"{label_path}: the type {foreign[0]} is none of the {classes} nuclei_types")
        yield Drawn(image, remap_label(instances.astype(np.int32)), np.where(instances > 0, types, 0).astype(np.uint8))


def read_label(path: Path) -> tuple[Array, Array]:
    """`inst_map` and `type_map` (H, W) of a label file: an object array, numpy's way to wrap a pickled dict.

    Raises
    ------
    DataError
        If the file holds anything but a dict of arrays of whole numbers; nothing in it is executed.
    """
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than any label; it was not opened")
    content = io.BytesIO(path.read_bytes())
    try:
        version = np.lib.format.read_magic(content)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(content)
        if shape != () or dtype != np.dtype(object):
            raise DataError(f"{path} holds {shape} {dtype}; a label is a pickled dict of inst_map and type_map")
        label = _ArraysOnly(content).load()
        label = label.item() if isinstance(label, np.ndarray) and label.shape == () else label
        inst_map, type_map = label["inst_map"], label["type_map"]
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} was not opened: {one_line(error)}") from error
    except Exception as error:
        raise DataError(
            f"{path} is no label of inst_map and type_map: {type(error).__name__}: {one_line(error)}"
        ) from error
    for name, array in (("inst_map", inst_map), ("type_map", type_map)):
        if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.number):
            raise DataError(f"{path}: {name} is not an array (H, W) of numbers")
        if not (np.asarray(array, np.int64) == array).all():
            raise DataError(f"{path}: {name} holds values that are not whole")
    return np.asarray(inst_map, np.int64), np.asarray(type_map, np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Knows what numpy's arrays are made of, under the names that numpy 1 and 2 give it."""

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        **{
            (f"numpy.{core}.multiarray", name): getattr(multiarray, name)
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an array has no need of") from None
