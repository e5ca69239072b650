"""How well two sets of nuclei agree: tables, GeoJSON or painted masks, in any combination."""

import gzip
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import geopandas
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
import tifffile
from PIL import Image

from wsipipe.atomic import finished
from wsipipe.comparison import OutlinedNuclei, Scores, compare, to_table
from wsipipe.errors import ConfigError, DataError, StoreError, WsipipeError, one_line
from wsipipe.folder import record_of, write_record
from wsipipe.mask_table import read_mask_table
from wsipipe.objects import class_of, is_ignored, is_region, outline_of
from wsipipe.outlines import trace_outlines
from wsipipe.readers import PICTURE_MAX_PX, pillow_limit
from wsipipe.rings import closed_rings
from wsipipe.roi import areal
from wsipipe.slide import SENSIBLE_MPP
from wsipipe.table import read_nuclei

log = logging.getLogger(__name__)

RADIUS_UM = 3.0  # how far apart the centres of a pair may be: 12 px at 0.25 µm/px, as usual
PIECE = 1 << 20  # characters of a GeoJSON file read at a time
MOST_TEXT = 16 * PIECE  # of one feature, and before and after all of them
AREAS = ("Polygon", "MultiPolygon")


@dataclass(frozen=True, eq=False)
class NucleiFile:
    """What a file of nuclei holds, on the level-0 px of its slide; `mpp` and `fingerprint` where it tells them.

    `size` (width, height) is the part of the slide that the file speaks of, from its corner `at`; None for all of it.
    `corner` is that of the slide's bounds, from which QuPath counts; `from_corner`: so does this file, which does not
    tell where it is.
    """

    nuclei: OutlinedNuclei
    mpp: float | None
    fingerprint: str | None
    at: tuple[int, int] = (0, 0)
    size: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)
    from_corner: bool = False


def make_comparison(
    true: Path,
    found: Path,
    out: Path,
    *,
    mpp: float | None = None,
    at: tuple[int, int] = (0, 0),
    crop_to_bounds: bool = True,
) -> tuple[dict[str, Scores], str]:
    """Score the nuclei of `found` against those of `true`; write `<out>.json` and `<out>.md`.

    Parameters
    ----------
    true, found : Path
        nuclei.parquet or another GeoParquet of outlines; .geojson(.gz) of outlines, of QuPath's cells the nuclei,
        without objects of the class `Region*`; or an image (PNG, TIFF, NPY) whose pixels are those of level 0 and hold
        the number of their nucleus, 0 for none. Beside a mask, `<name>.csv` or `../types/<name>.csv` with the columns
        id and type tells the types.
    mpp : float, optional
        µm per level-0 px, where no file tells it: the centres of a pair are no farther apart than `RADIUS_UM`.
    at : (int, int)
        Level-0 px (x, y) of the corner of a mask. Nuclei whose centre lies beside the mask are left out.
    crop_to_bounds : bool
        GeoJSON of others counts from the corner of the slide's bounds, if the other file tells of bounds, as QuPath
        does; False: from that of the slide, as with QuPath's own ``--no-crop``.

    Returns
    -------
    dict, str
        Scores by type, "all" first, and the table that shows them.

    Raises
    ------
    WsipipeError
        If a file is missing, of another kind, or of another slide, if mpp is not known or no slide's, or if
        `<out>.json` or `<out>.md` is there and no comparison's.
    """
    started = time.monotonic()
    if mpp is not None and not SENSIBLE_MPP[0] <= mpp <= SENSIBLE_MPP[1]:
        raise ConfigError(f"--mpp {mpp} is no resolution of a slide; give µm per pixel, e.g. --mpp 0.25 for a 40x scan")
    _require_free(out)
    files = [read_nuclei_file(path, at) for path in (true, found)]
    prints = {file.fingerprint for file in files} - {None}
    if len(prints) > 1:
        raise DataError(f"{true} and {found} are of different slides; compare nuclei of one slide")
    mpp = mpp or next((file.mpp for file in files if file.mpp), None)
    if mpp is None:
        raise ConfigError(f"neither {true.name} nor {found.name} states its resolution; pass --mpp, e.g. --mpp 0.25")
    sizes = [file.size for file in files if file.size is not None]
    if len(set(sizes)) > 1:
        raise DataError(f"the masks {true.name} and {found.name} are of {sizes[0]} and {sizes[1]} px; make them alike")
    corner = next((file.corner for file in files if any(file.corner)), (0, 0))
    if crop_to_bounds and any(corner) and any(file.from_corner for file in files):
        log.info("GeoJSON of others is taken to count from the corner of the slide's bounds, %d, %d", *corner)
        files = [_moved(file, corner) if file.from_corner else file for file in files]
    for file in files:
        if file.size is not None:
            files = [_within(other, file.at, file.size) for other in files]
    scores = compare(files[0].nuclei, files[1].nuclei, RADIUS_UM / mpp)
    table = to_table(scores)
    told = {
        name: {key: None if value != value else value for key, value in asdict(of).items()}
        for name, of in scores.items()
    }
    seconds = time.monotonic() - started
    write_record(
        out, true=str(true), found=str(found), mpp=mpp, radius_um=RADIUS_UM, scores=told, seconds=round(seconds, 3)
    )
    with finished(_shown(out)) as partial:
        partial.write_text(f"`{found}` against `{true}`\n\n{table}", encoding="utf-8")
    log.info("compared %d nuclei with %d in %.1f s", scores["all"].found, scores["all"].true, seconds)
    return scores, table


def _require_free(out: Path) -> None:
    """Refuse names under which there is something else, which may be what is compared."""
    if not out.name:
        raise ConfigError("the results of a comparison need a name; give one with --out")
    record = record_of(out)
    if record.exists():
        foreign = None if _is_comparison(record) else record
    else:  # the record is written first: without it, no comparison wrote the table
        foreign = _shown(out) if _shown(out).exists() else None
    if foreign is not None:
        raise ConfigError(f"{foreign} is there and no comparison; give another name with --out")


def _shown(out: Path) -> Path:
    """`<out>.md`, the table beside the record."""
    return out.with_name(out.name + ".md")


def _is_comparison(record: Path) -> bool:
    try:
        with record.open("rb") as file:
            told = json.loads(file.read(PIECE))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(told, dict) and {"true", "found", "radius_um", "scores"} <= told.keys()


def read_nuclei_file(path: Path, at: tuple[int, int] = (0, 0)) -> NucleiFile:
    """The nuclei of a table, a GeoJSON file or a mask whose corner lies at `at`."""
    if not path.exists():
        raise StoreError(f"{path} does not exist; give a table, a GeoJSON file or a mask of nuclei")
    name = path.name.lower()
    kind = "is neither a table, nor GeoJSON, nor a mask of nuclei"
    try:
        if name.endswith(".parquet"):
            kind = "cannot be read as a table of nuclei"
            return _read_table(path)
        if name.removesuffix(".gz").endswith((".geojson", ".json")):
            kind = "cannot be read as GeoJSON of nuclei"
            return _read_geojson(path)
        return _read_mask(path, at)
    except WsipipeError:
        raise
    except Exception as error:  # each format and codec has its own, and what a file holds may be of any type
        raise DataError(f"{path} {kind}: {one_line(error)}") from error


def _read_table(path: Path) -> NucleiFile:
    try:
        meta, batches = read_nuclei(path, ["type", "type_id", "geometry"])
    except StoreError as ours:
        try:
            frame = geopandas.read_parquet(path)
        except (OSError, ValueError, pa.ArrowInvalid):
            raise ours from None
        types = frame["type"].astype(object).fillna("") if "type" in frame else np.full(len(frame), "")
        return NucleiFile(_outlined(path, frame.geometry.to_numpy(), np.asarray(types, str)), None, None)
    outlines, types = [np.empty(0, object)], [np.empty(0, str)]
    for batch in batches:
        outlines.append(shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False)))
        named = batch["type_id"].to_numpy() > 0
        types.append(np.where(named, batch["type"].to_numpy(zero_copy_only=False).astype(str), ""))
    nuclei = _outlined(path, np.concatenate(outlines), np.concatenate(types))
    corner = (meta.bounds.x0, meta.bounds.y0) if meta.bounds else (0, 0)
    mpp = float(np.sqrt(meta.grid.mpp_x0 * meta.grid.mpp_y0))
    return NucleiFile(nuclei, mpp, meta.fingerprint, corner=corner)


def _read_geojson(path: Path) -> NucleiFile:
    outlines: list[shapely.Geometry] = []
    types: list[str] = []
    told: dict[str, Any] = {}
    with (
        gzip.open(path, "rt", encoding="utf-8-sig")
        if path.suffix.lower() == ".gz"
        else path.open(encoding="utf-8-sig") as file
    ):
        for feature in read_features(file, told):
            if not is_region(name := class_of(feature)) and not is_ignored(name):
                outlines.append(outline_of(feature))
                types.append(name)
    ours = told.get("wsipipe") or {}
    nuclei = _outlined(path, np.array(outlines, object), np.array(types, str))
    x, y = ours.get("offset_px0", (0, 0))
    mpp = float(np.sqrt(ours["mpp_x0"] * ours["mpp_y0"])) if "mpp_x0" in ours else None
    read = NucleiFile(nuclei, mpp, ours.get("fingerprint"), corner=(x, y), from_corner=not ours)
    return _moved(read, read.corner)


def read_features(file: TextIO, told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The features of a FeatureCollection or of a bare list one by one, to the file's last byte.

    `told` gets the other members of the collection.

    Raises
    ------
    ValueError
        If it is no JSON, neither a FeatureCollection nor a list, or ends too early or too late.
    """
    text, decode = file.read(PIECE), json.JSONDecoder().raw_decode
    bare = text.lstrip().startswith("[")
    at, text = (text.index("[") + 1, text) if bare else _first_feature(file, text, told)
    first = True
    while True:
        at, text = _significant(file, text, at)
        if text.startswith("]", at):
            break
        if not first:
            if not text.startswith(",", at):
                raise ValueError("a comma is missing between features")
            at, text = _significant(file, text, at + 1)
        while True:
            try:
                feature, at = decode(text, at)
                break
            except json.JSONDecodeError:
                if not (more := file.read(PIECE)) or len(text) - at > MOST_TEXT:
                    raise
                text, at = text[at:] + more, 0
        first = False
        yield feature
    rest = (text[at + 1 :] + file.read(MOST_TEXT)).strip()
    if file.read(1):
        raise ValueError(f"more than {MOST_TEXT} characters follow its features")
    if not bare:
        told |= json.loads("{" + rest.removeprefix(","))
    elif rest:
        raise ValueError("its list of features is not all that it holds")


def _first_feature(file: TextIO, text: str, told: dict[str, Any]) -> tuple[int, str]:
    """Where the list of features of a collection begins, and the text that holds it."""
    while (named := re.search(r'"features"\s*:(?=\s*\S)', text)) is None:
        if not (more := file.read(PIECE)) or len(text) > MOST_TEXT:
            raise ValueError("it is no FeatureCollection and no list; in QuPath, export them as a FeatureCollection")
        text += more
    told |= json.loads(text[: named.start()].rstrip().rstrip(",") + "}")
    at, text = _significant(file, text, named.end())
    if text[at] != "[":
        raise ValueError("its features are no list")
    return at + 1, text


def _significant(file: TextIO, text: str, at: int) -> tuple[int, str]:
    """The next place that is not blank, and the text that holds it."""
    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if at < len(text):
            return at, text
        text, at = file.read(PIECE), 0
        if not text:
            raise ValueError("it ends within its features")


def _read_mask(path: Path, at: tuple[int, int]) -> NucleiFile:
    if path.suffix.lower() == ".npy":
        mask = np.load(path, allow_pickle=False)
    elif path.suffix.lower() in (".tif", ".tiff"):
        mask = tifffile.imread(path)
    elif path.suffix.lower() in (".jpg", ".jpeg"):
        raise DataError(f"{path} is a JPEG, which does not keep the numbers of nuclei; save the mask as PNG or TIFF")
    else:
        with pillow_limit(PICTURE_MAX_PX), Image.open(path) as image:
            mask = np.asarray(image)
    if mask.ndim != 2 or mask.dtype.kind not in "iu" or (mask.size and mask.min() < 0):
        raise DataError(f"{path} is an image of {mask.shape} {mask.dtype}, no mask of one whole number a pixel")
    ids, labels = np.unique(mask, return_inverse=True)
    if ids.size and ids[0] != 0:
        ids, labels = np.append(0, ids), labels + 1
    outlines = mask_outlines(labels.reshape(mask.shape).astype(np.int32))
    outlines = shapely.transform(outlines, lambda xy: xy + np.array(at))
    types = _mask_types(path, ids[1:])
    height, width = mask.shape
    return NucleiFile(OutlinedNuclei(outlines, types), None, None, at, (width, height))


def mask_outlines(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.object_]:
    """Outlines of the nuclei 1 to N of an instance map, whose areas are exactly their pixels; pieces and holes stay."""
    n = int(labels.max(initial=0))
    if not n:
        return np.empty(0, object)
    pixels = np.flatnonzero(labels)
    count = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    _, first = np.unique(labels.ravel()[pixels], return_index=True)
    places = np.column_stack(np.divmod(pixels[first], labels.shape[1])).astype(np.int32)
    traced = trace_outlines(labels, np.arange(1, n + 1, dtype=np.int32), places, 0)
    outlines = closed_rings(5 * traced.points.astype(np.int64), traced.ends).polygons()  # from half pixels to tenths
    broken = np.flatnonzero(traced.tangled | (traced.area_px != count))
    for i, own in zip(broken, _pixels_of(labels, broken + 1), strict=True):
        y, x = np.divmod(own, labels.shape[1])
        outlines[i] = shapely.union_all(shapely.box(x, y, x + 1, y + 1))
    return outlines


def _pixels_of(labels: npt.NDArray[np.int32], ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Places of the pixels of some nuclei, in one pass."""
    wanted = np.zeros(int(labels.max(initial=0)) + 1, bool)
    wanted[ids] = True
    pixels = np.flatnonzero(wanted[labels])
    owner = labels.ravel()[pixels]
    order = np.argsort(owner, kind="stable")
    return np.split(pixels[order], np.flatnonzero(np.diff(owner[order])) + 1) if ids.size else []


def _mask_types(path: Path, ids: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    for place in (path.with_suffix(".csv"), path.parent.parent / "types" / f"{path.stem}.csv"):
        if place.exists():
            rows = read_mask_table(place, "type")
            if untold := [row.line for row in rows if row.value is None]:
                raise DataError(f"{place}, line {untold[0]}, tells no type; leave the nucleus out if it is not known")
            types = {row.number: row.value or "" for row in rows}
            return np.array([types.get(i, "") for i in ids.tolist()], str)
    return np.full(ids.size, "")


def _outlined(path: Path, outlines: npt.NDArray[np.object_], types: npt.NDArray[np.str_]) -> OutlinedNuclei:
    """Areas only, repaired where they are not valid."""
    kinds = set(shapely.get_type_id(outlines).tolist())
    if not kinds <= {3, 6}:
        raise DataError(f"{path} holds other things than {' and '.join(AREAS)}; compare outlines: --form outlines")
    invalid = ~shapely.is_valid(outlines)
    if invalid.any():
        outlines = outlines.copy()
        outlines[invalid] = [areal(shapely.make_valid(outline)) for outline in outlines[invalid]]
    some = shapely.area(outlines) > 0
    return OutlinedNuclei(outlines[some], types[some])


def _moved(file: NucleiFile, by: tuple[int, int]) -> NucleiFile:
    """The same nuclei, so many px to the right and down."""
    if not any(by):
        return file
    outlines = shapely.transform(file.nuclei.outlines, lambda xy: xy + np.array(by))
    return replace(file, nuclei=OutlinedNuclei(outlines, file.nuclei.types))


def _within(file: NucleiFile, at: tuple[int, int], size: tuple[int, int]) -> NucleiFile:
    """Only the nuclei whose centre lies in a part of the slide."""
    x, y = shapely.get_coordinates(shapely.centroid(file.nuclei.outlines)).T - np.array(at)[:, None]
    kept = (x >= 0) & (x < size[0]) & (y >= 0) & (y < size[1])
    return replace(file, nuclei=OutlinedNuclei(file.nuclei.outlines[kept], file.nuclei.types[kept]))
