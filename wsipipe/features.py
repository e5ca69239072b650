"""Nuclei to a table: place, size, shape, stain and type of those that a block owns."""

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from wsipipe.config import NucleiConfig
from wsipipe.geometry import Box, Grid
from wsipipe.instances import label_nuclei, reach_px
from wsipipe.maps import Maps
from wsipipe.measures import Measures, measure, stain_sums
from wsipipe.outlines import made_whole, rings_px0, trace_outlines

_MEASURES = (
    "area_um2",
    "perimeter_um",
    "major_axis_um",
    "minor_axis_um",
    "eccentricity",
    "solidity",
    "circularity",
    "hematoxylin_mean",
    "eosin_mean",
)
NUCLEI_SCHEMA = pa.schema(
    [("id", pa.string()), ("type", pa.string()), ("type_id", pa.uint8())]
    + [(name, pa.float32()) for name in ("type_probability", "probability")]
    + [(name, pa.float64()) for name in ("x_px0", "y_px0", "x_um", "y_um")]
    + [(name, pa.float32()) for name in _MEASURES]
    + [("geometry", pa.binary())]
)
UNTYPED = "nucleus"  # the name of type 0: the network tells no types, or none of them here


@dataclass(frozen=True, slots=True)
class BlockQC:
    """What happened to the nuclei of a block; sums over blocks by ``+``.

    Attributes
    ----------
    nuclei : int
        Owned and kept.
    small : int
        Owned, left out as smaller than `min_area_um2`, or than `small_area_um2` and less probable than
        `small_probability`.
    invalid : int
        Owned, left out because their outline was not valid at level 0.
    wide : int
        Nuclei that reach into the core, are wider than the halo and come near the border of what was read: cut,
        doubled or lost. A wider halo mends it. Every block that meets such a nucleus counts it.
    """

    nuclei: int = 0
    small: int = 0
    invalid: int = 0
    wide: int = 0

    def __add__(self, other: "BlockQC") -> "BlockQC":
        return BlockQC(
            self.nuclei + other.nuclei, self.small + other.small, self.invalid + other.invalid, self.wide + other.wide
        )


def nuclei_of_block(
    maps: Maps,
    read: Box,
    core: Box,
    grid: Grid,
    class_names: Sequence[str],
    fingerprint: str,
    rgb: npt.NDArray[np.uint8] | None,
    config: NucleiConfig,
    region: shapely.Geometry | None = None,
) -> tuple[pa.RecordBatch, BlockQC]:
    """Find and describe the nuclei that a block owns: a pure function of what lies in `read`.

    Of blocks whose cores partition the slide, and whose reads are their cores grown by the same halo, each
    nucleus no wider than the halo is owned by one and is there the same to the last bit.

    Parameters
    ----------
    maps : Maps
        Of the box `read`.
    read, core : Box
        What was read, and the part of it that this block answers for; px of `grid`. What lies beyond the
        slide is not looked at.
    grid : Grid
        The working grid of the slide.
    class_names : sequence of str
        Names of the channels of NC; 0 is background.
    fingerprint : str
        Of the slide; part of each nucleus's id.
    rgb : (H, W, 3) uint8 or None
        Pixels of `read`, for the stains.
    config : NucleiConfig
    region : Polygon or MultiPolygon, optional
        Level-0 px: no block owns a nucleus whose centroid lies outside.

    Returns
    -------
    RecordBatch, BlockQC
        See `describe_nuclei`.
    """
    seen = read.clipped(grid.box)
    part = (..., *seen.within(read).slices)
    maps = Maps(maps.nuclei[part], maps.offsets[part], maps.types[part])
    rgb = None if rgb is None else rgb[part[1:]]
    labels = label_nuclei(maps, grid.mpp, config)
    return describe_nuclei(labels, maps, seen, core, grid, class_names, fingerprint, rgb, config, region)


def describe_nuclei(
    labels: npt.NDArray[np.int32],
    maps: Maps,
    read: Box,
    core: Box,
    grid: Grid,
    class_names: Sequence[str],
    fingerprint: str,
    rgb: npt.NDArray[np.uint8] | None,
    config: NucleiConfig,
    region: shapely.Geometry | None = None,
) -> tuple[pa.RecordBatch, BlockQC]:
    """Measure the nuclei whose centroid lies in `core`.

    Parameters
    ----------
    labels : (H, W) int32
        Instance map of `read`. Of a nucleus in pieces the largest counts, holes are filled, and a nucleus
        within another is part of it.
    maps, read, core, grid, class_names, fingerprint, rgb, config, region
        As for `nuclei_of_block`.

    Returns
    -------
    RecordBatch
        Columns of `NUCLEI_SCHEMA`, sorted by the centroid's y, then x. See Notes.
    BlockQC

    Raises
    ------
    ValueError
        If an array is not of the size of `read`, or the names are not one for each channel of NC (where it has two
        or more).

    Notes
    -----
    id : UUIDv5 of the fingerprint and the centroid in tenths of a level-0 px.
    type : the class with the largest sum of NC over the pixels, never background if another has any;
    `type_probability` is its mean NC. If none has any: id 0, "nucleus". Without classes: id 0, "nucleus", null.
    probability : mean NP.
    x, y : mean of the pixels' centres.
    area : number of pixels. major and minor axis, eccentricity: of the ellipse with the same second moments.
    perimeter : of the simplified outline. circularity: 4 pi area / perimeter^2, at most 1.
    solidity : area within that outline over that of its convex hull.
    hematoxylin, eosin : mean optical density (base 10) after Ruifrok and Johnston 2001, white being 255; null without
    pixels. Six times the value of `skimage.color.separate_stains`, which takes logarithms to the base 1e-6.
    geometry : the outline along pixel edges, simplified, at level 0, rounded to 0.1 px.
    """
    shapes = {labels.shape, maps.nuclei.shape, maps.types.shape[1:], labels.shape if rgb is None else rgb.shape[:2]}
    if shapes != {read.shape}:
        raise ValueError(f"arrays of {sorted(shapes)} px do not lie on a box of {read.shape}")
    if 1 < maps.types.shape[0] != len(class_names):
        raise ValueError(f"{len(class_names)} names do not fit {maps.types.shape[0]} channels of types")
    box = core.within(read)
    while True:
        sums = measure(labels, maps)
        left, top, right, bottom = sums.boxes.T
        meets = (sums.count > 0) & (left < box.x1) & (right > box.x0) & (top < box.y1) & (bottom > box.y0)
        ids = np.flatnonzero(meets).astype(np.int32)
        centre = _centroids(sums, ids, read)
        order = np.lexsort(centre.T)
        ids, centre = ids[order], centre[order]
        outlines = trace_outlines(labels, ids, sums.first[ids], config.simplify_px)
        broken = np.sort(ids[outlines.tangled | (outlines.area_px != sums.count[ids])])
        if not broken.size:
            break
        labels = made_whole(labels, broken, sums.boxes[broken])

    rings, valid = rings_px0(outlines, labels, ids, sums.first[ids], read, grid)
    count = sums.count[ids]
    area = count * grid.pixel_um2
    probability = sums.np_sum[ids] / (255 * count)
    uncertain = (area < config.small_area_um2) & (probability < config.small_probability)
    place = grid.to_px0(centre)
    inside = np.True_ if region is None else shapely.contains_xy(region, place)
    owned, small = core.owns(*centre.T) & inside, (area < config.min_area_um2) | uncertain
    keep = np.flatnonzero(owned & ~small & valid)
    qc = BlockQC(
        nuclei=keep.size,
        small=int((owned & small).sum()),
        invalid=int((owned & ~small & ~valid).sum()),
        wide=int((_too_wide(sums.boxes[ids], read, grid, config) & inside).sum()),
    )

    perimeter, solidity = outlines.measures(grid.mpp_x, grid.mpp_y)
    major, minor = _axes_um(count, sums.moments[ids], grid)
    type_id, type_probability = _types(sums.nc_sum[ids], count)
    columns: dict[str, npt.NDArray[Any]] = {
        "type_id": type_id,
        "probability": probability,
        "x_px0": place[:, 0],
        "y_px0": place[:, 1],
        "x_um": place[:, 0] * grid.mpp_x0,
        "y_um": place[:, 1] * grid.mpp_y0,
        "area_um2": area,
        "perimeter_um": perimeter,
        "major_axis_um": major,
        "minor_axis_um": minor,
        "eccentricity": np.sqrt(1 - np.divide(minor, major, out=np.ones_like(major), where=major > 0) ** 2),
        "solidity": solidity,
        "circularity": np.minimum(1, 4 * np.pi * area / perimeter**2),
    }
    if type_probability is not None:
        columns["type_probability"] = type_probability
    if rgb is not None:
        stains = stain_sums(labels, sums.count.size - 1, rgb)[ids] / count[:, None]
        columns["hematoxylin_mean"], columns["eosin_mean"] = stains.T
    arrays = {name: pa.array(values[keep], NUCLEI_SCHEMA.field(name).type) for name, values in columns.items()}
    arrays["id"] = pa.array(_identities(fingerprint, place[keep]), pa.string())
    names = np.array([UNTYPED, *class_names[1:]])
    arrays["type"] = pa.array(names[type_id[keep]], pa.string())
    arrays["geometry"] = rings.take(keep).to_wkb()
    missing = {name: pa.nulls(keep.size, pa.float32()) for name in NUCLEI_SCHEMA.names if name not in arrays}
    return pa.record_batch(arrays | missing, NUCLEI_SCHEMA), qc


def _centroids(sums: Measures, ids: npt.NDArray[np.int32], read: Box) -> npt.NDArray[np.float64]:
    """(x, y) on the grid: one division of whole numbers, so the same to the last bit from every block."""
    count = sums.count[ids, None]
    corner = sums.first[ids, ::-1] + np.array([read.x0, read.y0])
    centre: npt.NDArray[np.float64] = (2 * (sums.moments[ids, :2] + count * corner) + count) / (2 * count)
    return centre


def _axes_um(
    count: npt.NDArray[np.int64], moments: npt.NDArray[np.int64], grid: Grid
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Major and minor axis of the ellipse with the same second moments, µm."""
    x, y, xx, xy, yy = moments.T
    squared = count.astype(np.float64) ** 2
    a = (count * xx - x * x) / squared * grid.mpp_x**2
    b = (count * xy - x * y) / squared * (grid.mpp_x * grid.mpp_y)
    c = (count * yy - y * y) / squared * grid.mpp_y**2
    mean, half = (a + c) / 2, np.sqrt(((a - c) / 2) ** 2 + b * b)
    return 4 * np.sqrt(mean + half), 4 * np.sqrt(np.maximum(mean - half, 0))


def _types(
    nc_sum: npt.NDArray[np.int64], count: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64] | None]:
    """Class of each nucleus and its mean NC; None for the latter where the network tells no classes."""
    n, classes = nc_sum.shape
    if classes < 2:
        return np.zeros(n, np.uint8), None
    best = 1 + nc_sum[:, 1:].argmax(1)
    best[nc_sum[np.arange(n), best] == 0] = 0
    return best.astype(np.uint8), nc_sum[np.arange(n), best] / (255 * count)


def _too_wide(boxes: npt.NDArray[np.int32], read: Box, grid: Grid, config: NucleiConfig) -> npt.NDArray[np.bool_]:
    """True for nuclei wider than the halo that come near a border of `read` beyond which the slide goes on."""
    left, top, right, bottom = boxes.T
    rim = reach_px(grid.mpp, config)
    near = (
        ((left < rim) & (read.x0 > 0))
        | ((top < rim) & (read.y0 > 0))
        | ((right > read.width - rim) & (read.x1 < grid.width))
        | ((bottom > read.height - rim) & (read.y1 < grid.height))
    )
    wide: npt.NDArray[np.bool_] = near & (np.maximum(right - left, bottom - top) > config.halo_px)
    return wide


def _identities(fingerprint: str, place_px0: npt.NDArray[np.float64]) -> list[str]:
    """UUIDv5 of each place within the slide: as `uuid.uuid5` makes them, at a quarter of its time."""
    slide = hashlib.sha1(uuid.uuid5(uuid.NAMESPACE_OID, fingerprint).bytes, usedforsecurity=False)
    ids = []
    for x, y in np.round(place_px0 * 10).astype(np.int64).tolist():
        name = slide.copy()
        name.update(b"%d,%d" % (x, y))
        h = name.hexdigest()
        ids.append(f"{h[:8]}-{h[8:12]}-5{h[13:16]}-{'89ab'[int(h[16], 16) & 3]}{h[17:20]}-{h[20:32]}")
    return ids
