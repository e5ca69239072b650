"""One's own images: with masks and tables of types, or with QuPath's annotations as GeoJSON.

Images may differ in size: they are cut into patches of one size, as few as cover them.
"""

import csv
import gzip
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import shapely
from skimage import draw

from wsipipe.errors import DataError, SlideError, one_line
from wsipipe.geometry import Box
from wsipipe.slide import Slide, open_slide
from wsipipe.training.data import SPLITS, UNKNOWN_TYPE, Patch, PatchSet
from wsipipe.training.write import Description, Drawn, windows, write_patch_set

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
REGION = "region*"  # QuPath's own class for areas to look into; QuPath writes the star
RECTANGULAR = 0.98  # share of its box that a region must fill


@dataclass(frozen=True)
class Splits:
    """Which images train, validate and test.

    Attributes
    ----------
    table : path of a CSV of name, group and split, optional
        Without it groups are drawn (seed 19): those for validation and for the test until they have their share of the
        images, and a group is what precedes the first `_` or `-` of an image's name: give patients or slides that way.
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
        group_of = {name: name.replace("-", "_").split("_")[0] for name in names}
        if len(set(group_of.values())) == 1:
            group_of = {name: name for name in names}
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
        return {name: (group_of[name], split_of[group_of[name]]) for name in names}


# --- masks ------------------------------------------------------------------------------------------------------------


def prepare_image_masks(
    src: Path, dst: Path, about: Description, patch_px: int, splits: Splits, classes: Sequence[str] | None = None
) -> PatchSet:
    """Turn `images/<stem>.*`, `masks/<stem>.png|tif|npy` and, if there, `types/<stem>.csv` (id,type) into `dst`.

    A mask has one channel of whole numbers: 0 background, every other value one nucleus. Nuclei that the table leaves
    out are of unknown type. Without `classes` the types are those of the tables, in the order of the alphabet.

    Raises
    ------
    DataError
        With every file that is missing or does not fit.
    """
    stems = _stems(src / "images")
    masks = {stem: _first(src / "masks", stem, (".png", ".tif", ".tiff", ".npy")) for stem in stems}
    faults = [f"{src / 'masks' / stem}.png is missing" for stem, path in masks.items() if path is None]
    tables: dict[str, dict[int, str]] = {}
    if (src / "types").is_dir():
        for stem in stems:
            try:
                tables[stem] = _type_table(src / "types" / f"{stem}.csv")
            except DataError as error:
                faults.append(str(error))
    names = _classes(classes, {name for table in tables.values() for name in table.values()}) if tables else None
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

    about = replace(about, class_names=names, notes={**about.notes, "patch_px": patch_px})
    return write_patch_set(dst, about, index, (patch_px, patch_px), patches)


def _stems(folder: Path) -> dict[str, Path]:
    files = sorted(
        path for path in folder.glob("*") if path.is_file() and path.suffix.lower() not in (".geojson", ".gz")
    )
    stems = {path.stem: path for path in files}
    if not stems:
        raise DataError(f"{folder} holds no images")
    if len(stems) < len(files):
        twice = sorted({path.stem for path in files if sum(other.stem == path.stem for other in files) > 1})
        raise DataError(f"{folder} holds several images called {', '.join(twice)}; a name must be one image's")
    return stems


def _first(folder: Path, stem: str, endings: Sequence[str]) -> Path | None:
    return next((path for ending in endings if (path := folder / f"{stem}{ending}").is_file()), None)


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
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(int(row["id"]), row["type"]) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} must be a table of id and type: {type(error).__name__}: {error}") from error
    table = dict(rows)
    if len(table) < len(rows):
        twice = sorted({number for number, _ in rows if sum(other == number for other, _ in rows) > 1})
        raise DataError(f"{path}: the ids {twice} repeat")
    return table


def _classes(wanted: Sequence[str] | None, found: set[str]) -> tuple[str, ...]:
    return ("background", *(sorted(found) if wanted is None else (name for name in wanted if name != "background")))


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


# --- QuPath -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Annotation:
    """The areas drawn on an image, level-0 px: nuclei with their types ("" for none), and the regions they fill."""

    nuclei: tuple[tuple[shapely.Polygon, str], ...]
    regions: tuple[shapely.Polygon, ...]


def prepare_qupath(
    src: Path,
    dst: Path,
    about: Description,
    patch_px: int,
    splits: Splits,
    *,
    classes: Sequence[str] | None = None,
    image_mpp: float | None = None,
) -> PatchSet:
    """Turn images with QuPath's objects (`<stem>.geojson` beside `<stem>.*`) into the patch set `dst`.

    Objects of the class `Region*` are rectangles in which every nucleus is outlined; without one, the whole image is
    such a region. Every other area is a nucleus, its class its type; nuclei without a class are of unknown type. The
    images may be slides: only the regions are read, at `about.mpp`.

    Parameters
    ----------
    classes : sequence of str, optional
        Types to learn; by default all classes that occur, in the order of the alphabet.
    image_mpp : float, optional
        µm per pixel of images that do not say it.

    Raises
    ------
    DataError
        With every image without annotations or of unknown resolution, region that is no rectangle or smaller than a
        patch, and class that is none of `classes`.
    """
    folder = src / "images" if (src / "images").is_dir() else src
    stems, faults = _stems(folder), []
    found: dict[str, Annotation] = {}
    for stem in stems:
        path = _first(folder, stem, (".geojson", ".geojson.gz", ".json")) or _first(
            src, stem, (".geojson", ".geojson.gz")
        )
        if path is None:
            faults.append(f"{folder / stem}.geojson is missing; in QuPath: File > Export objects as GeoJSON")
            continue
        try:
            found[stem] = read_annotation(path)
        except DataError as error:
            faults.append(str(error))
    occurring = {name for annotation in found.values() for _, name in annotation.nuclei if name}
    names = _classes(classes, occurring) if occurring or classes else None
    if names is not None and (foreign := sorted(occurring - set(names))):
        faults.append(f"there are nuclei of the classes {foreign}, which are not among {list(names[1:])}")

    cuts: dict[str, list[Box]] = {}
    for stem, annotation in found.items():
        try:
            with open_slide(stems[stem], image_mpp) as slide:
                cuts[stem] = _cuts(slide, annotation, about.mpp, patch_px, stems[stem])
        except (DataError, SlideError) as error:
            faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    places = splits.of(list(stems))
    index = [Patch(f"{stem}_{box.y0}_{box.x0}", *places[stem]) for stem in stems for box in cuts[stem]]

    def patches() -> Iterator[Drawn]:
        for stem, path in stems.items():
            with open_slide(path, image_mpp) as slide:
                grid, offset = slide.grid(about.mpp), (slide.bounds.x0, slide.bounds.y0) if slide.bounds else (0, 0)
                polygons = [shapely.get_coordinates(area) + offset for area, _ in found[stem].nuclei]
                outlines = [grid.from_px0(corners) for corners in polygons]
                for box in cuts[stem]:
                    instances, types = _painted(outlines, [name for _, name in found[stem].nuclei], names, box)
                    yield Drawn(slide.read(box, grid), instances, types)

    about = replace(about, class_names=names, notes={**about.notes, "patch_px": patch_px})
    return write_patch_set(dst, about, index, (patch_px, patch_px), patches)


def read_annotation(path: Path) -> Annotation:
    """Nuclei and regions of a GeoJSON that QuPath wrote.

    Raises
    ------
    DataError
        If it is no GeoJSON, or holds an object that is no area; says which.
    """
    try:
        content = path.read_bytes()
        found = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        features = found["features"] if isinstance(found, dict) else found
        if not isinstance(features, list):
            raise TypeError("no list of features")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what QuPath exports as GeoJSON: {type(error).__name__}: {error}") from error
    nuclei: list[tuple[shapely.Polygon, str]] = []
    regions: list[shapely.Polygon] = []
    for number, feature in enumerate(features):
        try:
            area = shapely.geometry.shape(feature.get("nucleusGeometry") or feature["geometry"])
            classification = (feature.get("properties") or {}).get("classification") or {}
            name = str(classification.get("name") or " ".join(classification.get("names") or []) or "")
        except (ValueError, TypeError, KeyError, AttributeError, shapely.errors.ShapelyError) as error:
            raise DataError(f"{path}, object {number}, has no geometry that can be read: {one_line(error)}") from error
        parts = [part for part in shapely.get_parts(shapely.make_valid(area)) if part.geom_type == "Polygon"]
        if not parts:
            raise DataError(f"{path}, object {number}, is a {area.geom_type}; nuclei and regions are closed shapes")
        if name.lower() in (REGION, REGION.rstrip("*")):
            regions += parts
        else:
            nuclei.append((max(parts, key=lambda part: part.area), name))
    if not nuclei:
        raise DataError(f"{path} holds no nuclei")
    return Annotation(tuple(nuclei), tuple(regions))


def _cuts(slide: Slide, annotation: Annotation, mpp: float, patch_px: int, path: Path) -> list[Box]:
    """Patches that cover the regions of a slide, working px."""
    grid = slide.grid(mpp)
    x0, y0 = (slide.bounds.x0, slide.bounds.y0) if slide.bounds else (0, 0)
    boxes = []
    for number, region in enumerate(annotation.regions):
        if region.area < RECTANGULAR * region.envelope.area:
            raise DataError(f"{path}: region {number} is no rectangle; draw regions with QuPath's rectangle tool")
        left, top, right, bottom = region.bounds
        corners = grid.from_px0([[left + x0, top + y0], [right + x0, bottom + y0]])
        boxes.append(Box(*(round(value) for value in corners.ravel().tolist())).clipped(grid.box))
    cuts = []
    for box in boxes or [grid.box]:
        if min(box.shape) < patch_px:
            raise DataError(
                f"{path}: a region of {box.width} x {box.height} px (at {mpp} µm/px) is smaller than a patch of "
                f"{patch_px} px; choose a smaller --patch-px or draw larger regions"
            )
        for y in windows(box.height, patch_px):
            cuts += [
                Box(box.x0 + x, box.y0 + y, box.x0 + x + patch_px, box.y0 + y + patch_px)
                for x in windows(box.width, patch_px)
            ]
    return cuts


def _painted(
    outlines: Sequence[Array], types: Sequence[str], names: Sequence[str] | None, box: Box
) -> tuple[Array, Array | None]:
    """Instances and types within a box of outlines (n, 2), working px: the pixels whose centre lies inside."""
    instances = np.zeros(box.shape, np.uint16)
    type_map = None if names is None else np.zeros(box.shape, np.uint8)
    number = 0
    for outline, name in zip(outlines, types, strict=True):
        low, high = outline.min(axis=0), outline.max(axis=0)
        if high[0] <= box.x0 or low[0] >= box.x1 or high[1] <= box.y0 or low[1] >= box.y1:
            continue
        inside = draw.polygon(outline[:, 1] - box.y0 - 0.5, outline[:, 0] - box.x0 - 0.5, box.shape)
        number += 1
        instances[inside] = number
        if type_map is not None and names is not None:
            type_map[inside] = names.index(name) if name else UNKNOWN_TYPE
    return instances, type_map
