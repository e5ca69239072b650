"""Is a patch set whole? Every fault at once, counts beside the published ones, and a picture to look at."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from wsipipe.errors import DataError
from wsipipe.metrics import majority_types, remap_label
from wsipipe.training import data
from wsipipe.training.data import UNKNOWN_TYPE, PatchSet
from wsipipe.training.write import count, differences

Array = npt.NDArray[Any]
SHEET_COLUMNS, SHEET_ROWS, THUMB_PX = 6, 4, 256
COLOURS = ((0, 0, 0), (255, 0, 0), (34, 221, 77), (35, 92, 236), (254, 255, 0), (255, 159, 68), (35, 255, 255))
UNTYPED = (255, 255, 255)


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes
    ----------
    faults : tuple of str
        What makes the set unfit for training.
    doubts : tuple of str
        What may be as it should: counts that differ from the published ones, groups in several splits, empty images.
    counts : dict
        As `wsipipe.training.write.count` gives them; empty if the set cannot be opened.
    """

    faults: tuple[str, ...]
    doubts: tuple[str, ...]
    counts: dict[str, Any]


def check(folder: Path) -> tuple[Report, PatchSet | None]:
    """Look at all of a patch set; never raises for what is wrong with it."""
    faults = _file_faults(folder)
    if faults:
        return Report(tuple(faults), (), {}), None
    patches = PatchSet.open(folder, check_values=False)
    faults, doubts = _value_faults(patches)
    names = [patch.name for patch in patches.index]
    faults += [f"index.csv: the name {name} repeats" for name in sorted({n for n in names if names.count(n) > 1})]
    groups: dict[str, set[str]] = {}
    for patch in patches.index:
        groups.setdefault(patch.group, set()).add(patch.split)
    shared = sorted(group for group, splits in groups.items() if len(splits) > 1)
    if shared:
        doubts.append(f"{len(shared)} groups are in several splits, e.g. {shared[0]}: scores on them flatter")
    counts = count(patches)
    published = json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get("published", {})
    try:
        doubts += differences(counts, published)
    except (AttributeError, TypeError, ValueError):  # somebody wrote it by hand
        faults.append(f"{folder / 'dataset.json'}: published must hold numbers by name, as counts does above")
    return Report(tuple(faults), tuple(doubts), counts), patches


def _file_faults(folder: Path) -> list[str]:
    """Every file that is missing or is not shaped as it must be."""
    faults: list[str] = []

    def attempt(read: Any, *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except DataError as error:
            faults.append(str(error))
            return None

    attempt(data._read_description, folder / "dataset.json")
    images = attempt(data._read_array, folder / "images.npy", ("uint8",))
    kinds = {"instances": ("uint16", "int32"), "types": ("uint8",), "trusted": ("bool", "uint8")}
    for name, dtypes in kinds.items():
        if name != "instances" and not (folder / f"{name}.npy").exists():
            continue
        array = attempt(data._read_array, folder / f"{name}.npy", dtypes)
        if array is not None and images is not None and array.shape != images.shape[:3]:
            faults.append(f"{folder / name}.npy has the shape {array.shape}; for these images: {images.shape[:3]}")
    if images is not None:
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            faults.append(f"{folder / 'images.npy'} has the shape {images.shape}; it must be (N, H, W, 3), not empty")
        attempt(data._read_index, folder / "index.csv", len(images))
    if not faults:
        attempt(lambda: PatchSet.open(folder, check_values=False))
    return faults


def _value_faults(patches: PatchSet) -> tuple[list[str], list[str]]:
    faults, doubts = [], []
    empty, pieces = [], 0
    for number, patch in enumerate(patches.index):
        instances = np.asarray(patches.instances[number])
        where = f"image {number} ({patch.name})"
        if instances.min() < 0:
            faults.append(f"instances.npy, {where}: a nucleus has a negative number")
            continue
        if not instances.any():
            empty.append(number)
        if instances.all():
            doubts.append(f"instances.npy, {where}: no pixel is background")
        whole = remap_label(instances.astype(np.int32))
        pieces += cv2.connectedComponents((whole > 0).astype(np.uint8))[0] - 1 > whole.max(initial=0)
        if patches.types is not None:
            faults += _type_faults(np.asarray(patches.types[number]), instances, patches.class_names or (), where)
    if empty:
        doubts.append(f"{len(empty)} images have no nucleus, e.g. number {empty[0]}")
    if pieces:
        doubts.append(f"in {pieces} images nuclei are in several pieces")
    return faults, doubts


def _type_faults(types: Array, instances: Array, names: tuple[str, ...], where: str) -> list[str]:
    faults = []
    used = np.flatnonzero(np.bincount(types.ravel(), minlength=256))
    if foreign := [int(value) for value in used if value >= len(names) and value != UNKNOWN_TYPE]:
        faults.append(f"types.npy, {where}: the types {foreign} are none of the {len(names)} class_names")
    if ((types > 0) & (types != UNKNOWN_TYPE) & (instances == 0)).any():
        faults.append(f"types.npy, {where}: there are types outside of nuclei")
    if ((types == 0) & (instances > 0)).any():
        faults.append(f"types.npy, {where}: there are nuclei of the type background; unknown is {UNKNOWN_TYPE}")
    return faults


def draw_sheet(patches: PatchSet, path: Path) -> None:
    """A contact sheet, a PNG whatever its name: patches of all splits in turn, nuclei in the colours of their types."""
    numbers = np.unique(np.linspace(0, len(patches) - 1, SHEET_COLUMNS * SHEET_ROWS).round().astype(int)).tolist()
    rows = -(-len(numbers) // SHEET_COLUMNS)
    sheet = np.full((rows * (THUMB_PX + 4), SHEET_COLUMNS * (THUMB_PX + 4), 3), 255, np.uint8)
    for place, number in enumerate(numbers):
        y, x = (part * (THUMB_PX + 4) for part in divmod(place, SHEET_COLUMNS))
        types = None if patches.types is None else patches.types[number]
        sheet[y : y + THUMB_PX, x : x + THUMB_PX] = outlined(patches.images[number], patches.instances[number], types)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, format="PNG")


def outlined(image: Array, instances: Array, types: Array | None, side: int = THUMB_PX) -> Array:
    """A picture (side, side, 3) of an image and its nuclei. `types`: a map (H, W), or one of each nucleus (N,)."""
    factor = side / max(image.shape[:2])
    height, width = (max(1, round(factor * part)) for part in image.shape[:2])
    shown = np.full((side, side, 3), 255, np.uint8)
    shown[:height, :width] = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA)
    whole = remap_label(np.asarray(instances).astype(np.int32))
    of_nucleus = None if types is None else types if types.ndim == 1 else majority_types(whole, np.asarray(types))
    rows = np.minimum(((np.arange(height) + 0.5) / factor).astype(int), image.shape[0] - 1)
    columns = np.minimum(((np.arange(width) + 0.5) / factor).astype(int), image.shape[1] - 1)
    scaled = whole[rows][:, columns]
    kernel = np.ones((3, 3), np.uint8)
    edge = (cv2.erode(scaled.astype(np.uint16), kernel) != scaled) & (scaled > 0)
    colours = [UNTYPED] * (int(whole.max(initial=0)) + 1)
    if of_nucleus is not None:
        colours[1:] = [COLOURS[t] if 0 < t < len(COLOURS) else UNTYPED for t in of_nucleus.tolist()]
    palette = np.array(colours, np.uint8)
    shown[:height, :width][edge] = palette[scaled[edge]]
    return shown
