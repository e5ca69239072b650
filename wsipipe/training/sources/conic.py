"""CoNIC, as its authors publish it: images at 20x, their nuclei and types, and the patient of each image."""

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from wsipipe.errors import DataError
from wsipipe.metrics import remap_label
from wsipipe.training.data import Patch, PatchSet
from wsipipe.training.sources.pannuke import read_array
from wsipipe.training.write import SOURCES, Description, Drawn, digest_of, windows, write_patch_set

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
TYPES = ("neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective")
MPP, ENLARGED_PX, WINDOW_PX, STRIDE_PX = 0.5, 480, 256, 224
SEED, TEST_SHARE, VALIDATION_SHARE = 19, 0.2, 0.2
SOURCE = "Graham et al. 2021, CoNIC Challenge, arXiv 2111.14485; Lizard, arXiv 2108.11195"
LICENCE = "CC-BY-NC-SA-4.0"
PUBLISHED = {
    "images": 4981,  # arXiv 2504.00784 writes 4,891
    "nuclei": 495_179,
    "type_images": dict(zip(TYPES, (1069, 4189, 4356, 3103, 1025, 4527), strict=True)),
}
Split = Literal["patient", "published"]


def prepare_conic(src: Path, dst: Path, split: Split = "patient") -> tuple[PatchSet, PatchSet]:
    """Turn `images.npy`, `labels.npy`, `counts.csv` and the table of patients of `src` into two patch sets.

    `dst/native` holds all images at 0.5 µm/px. `dst/enlarged` holds those that are not for the test, enlarged from 256
    to 480 px by linear interpolation and cut into four windows of 256 px that overlap by 32.

    Parameters
    ----------
    split : {"patient", "published"}
        Patients are drawn for the test until they have a fifth of the images. "patient": then patients for validation,
        until they have a fifth of the rest. "published": a fifth of the *windows* of the rest validates, whichever
        image they are from, as the published run did it; which patients that run tested on is not known. In
        `dst/native` an image then validates if its first window does.

    Raises
    ------
    DataError
        With every file that is missing or does not fit the others; or with the first image that holds what it must not.
    """
    images, labels, patients = _read(src)
    sources = digest_of(
        src, [*(src / name for name in ("images.npy", "labels.npy", "counts.csv")), _patient_table(src)]
    )
    splits = _by_patient(patients, TEST_SHARE, "test", dict.fromkeys(patients, "train"))
    if split == "patient":
        splits = _by_patient(patients, VALIDATION_SHARE, "validation", splits)
    of_image = [splits[patient] for patient in patients]
    trained = [i for i, of in enumerate(of_image) if of != "test"]
    places = [
        (y, x) for y in windows(ENLARGED_PX, WINDOW_PX, STRIDE_PX) for x in windows(ENLARGED_PX, WINDOW_PX, STRIDE_PX)
    ]
    of_window = [of_image[i] for i in trained for _ in places]
    if split == "published":
        held = int(VALIDATION_SHARE * len(of_window))
        import torch  # slow to import, and the published order is its own

        order = torch.randperm(len(of_window), generator=torch.Generator().manual_seed(SEED)).tolist()
        for number in order[len(of_window) - held :]:
            of_window[number] = "validation"
        for place, i in enumerate(trained):
            of_image[i] = of_window[place * len(places)]

    def about(name: str, mpp: float, published: dict[str, Any]) -> Description:
        classes = ("background", *TYPES)
        return Description(name, mpp, classes, SOURCE, LICENCE, published, {"split": split, SOURCES: sources})

    names = [f"image{i:04d}" for i in range(len(images))]
    native = write_patch_set(
        dst / "native",
        about("CoNIC", MPP, PUBLISHED),
        [Patch(name, patient, of, "Colon") for name, patient, of in zip(names, patients, of_image, strict=True)],
        images.shape[1:3],
        lambda: (_patch(src, images, labels, i) for i in range(len(images))),
    )
    enlarged = write_patch_set(
        dst / "enlarged",
        about("CoNIC enlarged", MPP * images.shape[1] / ENLARGED_PX, {}),
        [
            Patch(f"{names[i]}_{y}_{x}", patients[i], of_window[place * len(places) + number], "Colon")
            for place, i in enumerate(trained)
            for number, (y, x) in enumerate(places)
        ],
        (WINDOW_PX, WINDOW_PX),
        lambda: (window for i in trained for window in _windows(_patch(src, images, labels, i), places)),
    )
    return native, enlarged


def _read(src: Path) -> tuple[Array, Array, list[str]]:
    faults, found = [], {}
    for name in ("images", "labels"):
        try:
            found[name] = read_array(src / f"{name}.npy")
        except DataError as error:
            faults.append(str(error))
    if len(found) == 2:
        images, labels = found["images"], found["labels"]
        if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3 or images.dtype != np.uint8:
            faults.append(
                f"{src / 'images.npy'} holds {images.shape} {images.dtype}; it must be (n, 256, 256, 3) uint8"
            )
        if labels.shape != (*images.shape[:3], 2):
            faults.append(
                f"{src / 'labels.npy'} has the shape {labels.shape}; for these images it must be "
                f"{(*images.shape[:3], 2)}: the nuclei, then their types"
            )
    patients: list[str] = []
    try:
        patients = _patients(src)
        counted = _counted_images(src / "counts.csv")
        if "images" in found and counted != len(found["images"]):
            faults.append(f"{src / 'counts.csv'} has {counted} rows for {len(found['images'])} images")
    except DataError as error:
        faults.append(str(error))
    if "images" in found and patients and len(patients) != len(found["images"]):
        faults.append(f"{src} names the patients of {len(patients)} images, but has {len(found['images'])}")
    if faults:
        raise DataError("; ".join(faults))
    return found["images"], found["labels"], patients


def _patients(src: Path) -> list[str]:
    """Patient of every image: the column `patient`, or what precedes the dash of names such as `consep_1-0003`."""
    rows = _table(_patient_table(src))
    columns = list(rows[0])
    for column in columns:
        if column.strip().lower() in ("patient", "patient_id"):
            return [row[column] for row in rows]
    return [row[columns[-1]].rpartition("-")[0] or row[columns[-1]] for row in rows]


def _patient_table(src: Path) -> Path:
    for name in ("patient_info.csv", "patch_info.csv"):
        if (src / name).is_file():
            return src / name
    raise DataError(f"{src / 'patient_info.csv'} is missing (or patch_info.csv); without it patients would be split up")


def _counted_images(path: Path) -> int:
    rows = _table(path)
    columns = {column.strip().lower() for column in rows[0]}
    if missing := [name for name in TYPES if name not in columns]:
        raise DataError(f"{path} has no column {', '.join(missing)}; it is not that of CoNIC")
    return len(rows)


def _table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _by_patient(patients: Sequence[str], share: float, into: str, splits: dict[str, str]) -> dict[str, str]:
    """`splits` with patients moved from train to `into`, in drawn order, until these have `share` of the images."""
    splits = dict(splits)
    free = sorted(patient for patient, of in splits.items() if of == "train")
    images = {patient: patients.count(patient) for patient in free}
    wanted, moved = share * sum(images.values()), 0
    for patient in np.random.default_rng(SEED).permutation(free).tolist():
        if moved + images[patient] / 2 > wanted:  # nearer without it
            continue
        splits[patient] = into
        moved += images[patient]
    if not moved and len(free) > 1:
        splits[min(free, key=lambda patient: images[patient])] = into
    return splits


def _patch(src: Path, images: Array, labels: Array, i: int) -> Drawn:
    instances, types = np.asarray(labels[i, ..., 0]), np.asarray(labels[i, ..., 1])
    where = f"{src / 'labels.npy'}, image {i}"
    if instances.min() < 0 or types.min() < 0 or types.max() > len(TYPES):
        raise DataError(
            f"{where}: types are 0 to {len(TYPES)} and nuclei are numbered from 1; found type {types.max()}"
        )
    if ((instances > 0) != (types > 0)).any():
        raise DataError(f"{where}: there are nuclei without a type, or types without a nucleus")
    return Drawn(np.asarray(images[i]), remap_label(instances.astype(np.int32)), types.astype(np.uint8))


def enlarged(image: Array, side: int = ENLARGED_PX) -> Array:
    """An image (H, W, ...) at `side` px a side, linear between pixel centres."""
    larger: Array = np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR))
    return larger


def _windows(drawn: Drawn, places: Sequence[tuple[int, int]]) -> Iterator[Drawn]:
    image = enlarged(drawn.image)
    nearest = (np.arange(ENLARGED_PX) + 0.5) * drawn.image.shape[0] / ENLARGED_PX
    rows = nearest.astype(np.int64)
    instances = drawn.instances[rows][:, rows]
    types = None if drawn.types is None else drawn.types[rows][:, rows]
    for y, x in places:
        cut = np.s_[y : y + WINDOW_PX, x : x + WINDOW_PX]
        yield Drawn(image[cut], instances[cut], None if types is None else types[cut])
