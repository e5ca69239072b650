"""One's own images and slides with QuPath's annotations as GeoJSON."""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsipipe.errors import DataError, ResolutionError, SlideError, one_line
from wsipipe.geometry import Box
from wsipipe.objects import class_of, is_ignored, is_region, outline_of
from wsipipe.slide import Slide, open_slide
from wsipipe.training.data import UNKNOWN_TYPE, Patch, PatchSet
from wsipipe.training.paint import pixels_within
from wsipipe.training.sources.own_images import Splits, class_names_of, first_of, images_of, is_background
from wsipipe.training.write import SOURCES, Description, Drawn, digest_of, windows, write_patch_set

Array = npt.NDArray[Any]
RECTANGULAR = 0.98  # share of its box that a region must fill
LARGEST_UM2 = 5000.0  # of a nucleus, a disc of 80 µm; what is larger was drawn to some other end


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
        patch, and class that is none of `classes`, or none of a nucleus: `background`, `Ignore*`.
    """
    folder = src / "images" if (src / "images").is_dir() else src
    stems, faults = images_of(folder), []
    drawn = {
        stem: first_of(folder, stem, (".geojson", ".geojson.gz", ".json"))
        or first_of(src, stem, (".geojson", ".geojson.gz"))
        for stem in stems
    }
    sources = [digest_of(src, (path for path in drawn.values() if path is not None))]
    found: dict[str, Annotation] = {}
    for stem, path in drawn.items():
        if path is None:
            faults.append(f"{folder / stem}.geojson is missing; in QuPath: File > Export objects as GeoJSON")
            continue
        try:
            found[stem] = read_annotation(path)
            faults += _no_types(found[stem], path)
        except DataError as error:
            faults.append(str(error))
    occurring = {name for annotation in found.values() for _, name in annotation.nuclei if name}
    names = class_names_of(classes, occurring) if occurring or classes else None
    if names is not None and (foreign := sorted(occurring - set(names))):
        faults.append(f"there are nuclei of the classes {foreign}, which are not among {list(names[1:])}")

    cuts: dict[str, list[Box]] = {}
    given = False
    for stem, annotation in found.items():
        try:
            with _opened(stems[stem], image_mpp) as slide:
                given |= slide.mpp_source == "given"
                sources.append(f"{stems[stem].name} {slide.fingerprint}")
                cuts[stem] = _cuts(slide, annotation, about.mpp, patch_px, stems[stem])
                faults += _no_nuclei(slide, annotation, stems[stem])
        except DataError as error:
            faults.append(str(error))
        except SlideError as error:
            faults.append(str(error).replace("--mpp", "--image-mpp"))  # here `--mpp` is that of the patches
    if faults:
        raise DataError("; ".join(faults))
    places = splits.of(list(stems))
    index = [Patch(f"{stem}_{box.y0}_{box.x0}", *places[stem]) for stem in stems for box in cuts[stem]]

    def patches() -> Iterator[Drawn]:
        for stem, path in stems.items():
            with _opened(path, image_mpp) as slide:
                grid, offset = slide.grid(about.mpp), (slide.bounds.x0, slide.bounds.y0) if slide.bounds else (0, 0)
                nuclei = found[stem].nuclei
                bounds = shapely.bounds([area for area, _ in nuclei]).reshape(-1, 2, 2) + offset
                low, high = grid.from_px0(bounds[:, 0]), grid.from_px0(bounds[:, 1])
                for box in cuts[stem]:
                    meets = (high > (box.x0, box.y0)) & (low < (box.x1, box.y1))
                    near = [nuclei[i] for i in np.flatnonzero(meets.all(axis=1)).tolist()]
                    outlines = [grid.from_px0(shapely.get_coordinates(area.exterior) + offset) for area, _ in near]
                    instances, types = _painted(outlines, [name for _, name in near], names, box)
                    yield Drawn(slide.read(box, grid), instances, types)

    notes = {**about.notes, "patch_px": patch_px, SOURCES: digest_of(src, (), *sources)}
    notes |= {"image_mpp": image_mpp} if given else {}
    about = replace(about, class_names=names, notes=notes)
    return write_patch_set(dst, about, index, (patch_px, patch_px), patches)


def _opened(path: Path, image_mpp: float | None) -> Slide:
    """A slide or image at the resolution that it states; at `image_mpp` if it states none."""
    try:
        return open_slide(path)
    except ResolutionError:
        if image_mpp is None:
            raise
    return open_slide(path, image_mpp)


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
            area, name = outline_of(feature), class_of(feature)
        except (ValueError, TypeError, KeyError, AttributeError, shapely.errors.ShapelyError) as error:
            raise DataError(f"{path}, object {number}, has no geometry that can be read: {one_line(error)}") from error
        parts = [part for part in shapely.get_parts(shapely.make_valid(area)) if part.geom_type == "Polygon"]
        if not parts:
            raise DataError(f"{path}, object {number}, is a {area.geom_type}; nuclei and regions are closed shapes")
        if is_region(name):
            regions += parts
        else:
            nuclei.append((max(parts, key=lambda part: part.area), name))
    if not nuclei and not regions:  # a region without nuclei is worth learning from
        raise DataError(f"{path} holds no nuclei")
    return Annotation(tuple(nuclei), tuple(regions))


def _no_types(annotation: Annotation, path: Path) -> list[str]:
    """Classes that no nucleus can be learnt as."""
    names = [name for _, name in annotation.nuclei]
    faults = []
    if count := sum(is_background(name) for name in names):
        faults.append(
            f"{path}: {count} nuclei have the class background; give them another, or none if it is not known"
        )
    if count := sum(is_ignored(name) for name in names):
        faults.append(
            f"{path}: {count} objects have the class Ignore*, and a patch set has no pixels that nothing is learnt of; "
            "delete them, and draw Region* round what is to be learnt"
        )
    return faults


def _no_nuclei(slide: Slide, annotation: Annotation, path: Path) -> list[str]:
    """What must not be taken for a nucleus, such as an outline of the tissue."""
    areas = shapely.area([area for area, _ in annotation.nuclei]) * slide.mpp_x0 * slide.mpp_y0
    found = []
    for number in np.flatnonzero(areas > LARGEST_UM2).tolist():
        area, name = annotation.nuclei[number]
        found.append(
            f"{path}: an area of {areas[number]:,.0f} µm² at ({area.centroid.x:.0f}, {area.centroid.y:.0f}), "
            f"{f'class {name}' if name else 'without a class'}, is no nucleus; delete it before the export, or give it "
            "the class Region* if every nucleus in it is outlined"
        )
    return found


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
    for number, (outline, name) in enumerate(zip(outlines, types, strict=True), 1):
        inside = pixels_within(outline - (box.x0, box.y0), box.shape)
        instances[inside] = number
        if type_map is not None and names is not None:
            type_map[inside] = names.index(name) if name else UNKNOWN_TYPE
    return instances, type_map
