"""nuclei.geojson(.gz): the table of nuclei as QuPath 0.4 to 0.7 reads it, written as a stream.

One feature that QuPath cannot read makes it refuse the whole file, and every version has its own traps: so
outlines are tested as they are written, numbers are finite, and no member is null.
"""

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from isal import igzip

from wsipipe.atomic import finished
from wsipipe.compiled import compiled
from wsipipe.errors import ConfigError
from wsipipe.rings import Rings
from wsipipe.table import NucleiMeta, read_nuclei

log = logging.getLogger(__name__)

Form = Literal["outlines", "centroids", "overview"]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

# QuPath reads a file whole, and with more detections than this needs more memory than an 8 GB machine gives it.
MANY = 200_000
ROWS = 10_000  # nuclei formatted at once: a few MB of text
# Of Intel's deflate: 1.3 µs a nucleus. zlib takes 5.2 for files larger by a tenth, 20 for files smaller by a sixth.
GZIP_LEVEL = 2
SMALLEST_PX0 = 0.01  # px²; QuPath's grid is 0.01 px, and below this an outline becomes an empty object
POLYGON = 3  # shapely's number for it
MISSING = np.iinfo(np.int64).min

# Column, name in QuPath's manner with its unit, decimals.
MEASUREMENTS = (
    ("type_probability", "Type probability", 3),
    ("probability", "Detection probability", 3),
    ("area_um2", "Nucleus: Area µm^2", 2),
    ("perimeter_um", "Nucleus: Perimeter µm", 2),
    ("major_axis_um", "Nucleus: Major axis µm", 2),
    ("minor_axis_um", "Nucleus: Minor axis µm", 2),
    ("eccentricity", "Nucleus: Eccentricity", 3),
    ("solidity", "Nucleus: Solidity", 3),
    ("circularity", "Nucleus: Circularity", 3),
    ("hematoxylin_mean", "Nucleus: Hematoxylin OD mean", 3),
    ("eosin_mean", "Nucleus: Eosin OD mean", 3),
    ("neighbors_50um", "Neighbors within 50 µm", 0),
    ("nearest_um", "Distance to nearest nucleus µm", 2),
)
_DECIMALS = np.array([decimals for *_, decimals in MEASUREMENTS])


@dataclass(frozen=True, slots=True)
class GeojsonSummary:
    """What was written."""

    files: tuple[Path, ...]
    nuclei: int
    dropped: int  # nuclei whose outline QuPath would have refused


def write_geojson(
    table: Path,
    path: Path,
    *,
    form: Form = "outlines",
    offset: tuple[int, int] | None = None,
    split: int | None = None,
    on_named: Callable[[Sequence[Path]], None] | None = None,
) -> GeojsonSummary:
    """Write the nuclei of `table` to `path`, a name that ends in .geojson or .geojson.gz.

    Parameters
    ----------
    form : {"outlines", "centroids", "overview"}
        A polygon for each nucleus, a point for each nucleus, or one set of points for each type.
    offset : (x, y)
        Where QuPath has its origin, level-0 px: it is subtracted. By default the corner of the slide's
        bounds, where the slide has them, because QuPath shows nothing else of such a slide.
    split : int
        Write several files, `<name>-001` and so on, where there are more nuclei than this.
    on_named : function, optional
        Called with the files to be, before the first of them is there.

    Raises
    ------
    ConfigError
        If the ending is one for which QuPath reads nothing.
    StoreError
        If the table cannot be read.
    """
    ending = next((end for end in (".geojson", ".geojson.gz") if path.name.lower().endswith(end)), None)
    if ending is None:
        raise ConfigError(f"QuPath reads nothing from {path.name}; give a name that ends in .geojson or .geojson.gz")
    if split is not None and split < 1:
        raise ConfigError(f"a file of {split} nuclei holds nothing; --split must be at least 1")
    meta, batches = read_nuclei(table)
    offset = offset or ((meta.bounds.x0, meta.bounds.y0) if meta.bounds else (0, 0))
    rows = meta.count if split is None or form == "overview" else split
    parts = max(1, ceil(meta.count / max(1, rows)))
    stem = path.name[: -len(ending)]
    targets = [path] if parts == 1 else [path.with_name(f"{stem}-{i:03d}{ending}") for i in range(1, parts + 1)]
    if on_named is not None:
        on_named(targets)
    most = min(rows, meta.count)
    if form != "overview" and most > MANY:
        log.warning(
            "%s will hold %d nuclei: QuPath needs about %.0f GB of memory to open it at once; --split %d writes "
            "several files",
            targets[0].name, most, most * 13e-6, MANY,
        )  # fmt: skip
    written = dropped = 0
    slices = groupby(_slices(batches, max(1, rows)), key=itemgetter(0))
    with ExitStack() as stack:
        # None has its name before all are complete.
        partials = [stack.enter_context(finished(target)) for target in targets]
        for number, partial in enumerate(partials, 1):
            with _opened(partial, compressed=ending.endswith(".gz")) as sink:
                sink.write(_preamble(meta, form, offset, number, parts))
                if form == "overview":
                    written = _write_overview(sink, table, meta, offset)
                else:
                    _, group = next(slices, (0, ()))
                    kept, lost = _write_features(sink, (batch for _, batch in group), meta, form, offset)
                    written, dropped = written + kept, dropped + lost
                sink.write(b"\n]}\n")
    if dropped:
        log.warning("%s lacks %d nuclei whose outlines are not valid polygons", path.name, dropped)
    return GeojsonSummary(tuple(targets), written, dropped)


def encode_features(
    nuclei: pa.RecordBatch, meta: NucleiMeta, form: Form = "outlines", offset: tuple[int, int] = (0, 0)
) -> tuple[bytes, int]:
    """Nuclei as GeoJSON features with a comma between them, and how many nuclei these are.

    A nucleus whose outline, as written, is no valid polygon is left out; so is a value that is not finite.
    `form` is "outlines" or "centroids".
    """
    if form == "outlines":
        kept, rings = _outlines(nuclei)
        starts, tenths = rings.starts, rings.points
        opening, closing = b'","geometry":{"type":"Polygon","coordinates":[[', b"]]"
    else:
        tenths = np.rint(np.stack([nuclei["x_px0"], nuclei["y_px0"]], axis=1) * 10).astype(np.int64)
        kept, starts = np.arange(nuclei.num_rows), np.arange(nuclei.num_rows + 1)
        opening, closing = b'","geometry":{"type":"Point","coordinates":', b""
    if not kept.size:
        return b"", 0
    if kept.size < nuclei.num_rows:
        nuclei = nuclei.take(pa.array(kept))
    types = [
        closing + b'},"properties":{"objectType":"detection",' + _classification(meta, type_id) + b'"measurements":{'
        for type_id in range(256)
    ]
    keys = [f"{json.dumps(name, ensure_ascii=False)}:".encode() for _, name, _ in MEASUREMENTS]
    values = np.stack([nuclei[column].to_numpy(zero_copy_only=False) for column, *_ in MEASUREMENTS], axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.rint(values.astype(np.float64) * 10.0**_DECIMALS)
        measured = np.where(np.abs(scaled) < 1e15, scaled, MISSING).astype(np.int64)
    number = 21  # bytes: a sign, 19 digits and a point
    longest = len(opening) + max(map(len, types)) + sum(map(len, keys)) + len(keys) * (number + 1) + 80
    out = np.empty(len(kept) * longest + len(tenths) * (2 * number + 4), np.uint8)
    end = _put_features(
        out,
        np.frombuffer("".join(nuclei["id"].to_pylist()).encode(), np.uint8).reshape(len(kept), 36),
        _bytes(opening),
        tenths - np.array(offset) * 10,
        starts,
        *_pieces(types),
        nuclei["type_id"].to_numpy(),
        *_pieces(keys),
        measured,
        _DECIMALS,
    )
    return out[:end].tobytes(), len(kept)


def _outlines(nuclei: pa.RecordBatch) -> tuple[Integers, Rings]:
    """Rows with a good outline, and these outlines."""
    rings, exact = Rings.from_wkb(nuclei["geometry"])
    good = exact & rings.are_plain()
    others = np.flatnonzero(~good)
    if others.size:
        rows, repaired = _doubtful_outlines(nuclei["geometry"].take(pa.array(others)))
        good[others[rows]] = True
        rings = rings.replaced(others[rows], repaired)
    kept = np.flatnonzero(good)
    return kept, rings if kept.size == len(rings) else rings.take(kept)


def _doubtful_outlines(geometry: pa.Array) -> tuple[Integers, Rings]:
    """The same of what may be of any form and size, by shapely."""
    polygons = shapely.from_wkb(geometry.to_numpy(zero_copy_only=False))
    kept = (shapely.get_type_id(polygons) == POLYGON) & (shapely.get_num_coordinates(polygons) >= 4)
    # of another's table: what a hole holds is of the nucleus
    polygons = shapely.polygons(shapely.get_exterior_ring(np.where(kept, polygons, None)))
    rows = np.flatnonzero(kept)
    tenths = np.rint(shapely.get_coordinates(polygons[rows]) * 10)
    # Tested as they will be written: rounding is what breaks outlines.
    polygons = shapely.set_coordinates(polygons[rows], tenths / 10)
    good = shapely.is_valid(polygons) & (shapely.area(polygons) >= SMALLEST_PX0)
    rings = Rings(tenths.astype(np.int64), np.append(0, np.cumsum(shapely.get_num_coordinates(polygons))))
    return rows[good], rings.take(np.flatnonzero(good))


def _classification(meta: NucleiMeta, type_id: int) -> bytes:
    """The class of a type; nothing for a type without a name or a colour, which QuPath would not read."""
    if not 0 < type_id < min(len(meta.class_names), len(meta.class_colours)):
        return b""
    name, colour = meta.class_names[type_id].strip(), list(meta.class_colours[type_id])
    return b'"classification":' + _json({"name": name, "color": colour}) + b"," if name else b""


def _preamble(meta: NucleiMeta, form: Form, offset: tuple[int, int], part: int, parts: int) -> bytes:
    """The collection up to its first feature; QuPath passes over the members that it does not know."""
    provenance = {
        "content": f"nuclei, {form}",
        "slide": meta.slide,
        "fingerprint": meta.fingerprint,
        "coordinates": "level-0 px, corner of the first pixel is 0, 0; offset_px0 is subtracted",
        "offset_px0": list(offset),
        "mpp_x0": meta.grid.mpp_x0,
        "mpp_y0": meta.grid.mpp_y0,
        "part": part,
        "parts": parts,
        "model": meta.model,
        "versions": meta.versions,
        "counts": meta.counts,
    }
    return b'{"type":"FeatureCollection","wsipipe":' + _json(_without_null(provenance)) + b',"features":[\n'


def _write_features(
    sink: BinaryIO, batches: Iterable[pa.RecordBatch], meta: NucleiMeta, form: Form, offset: tuple[int, int]
) -> tuple[int, int]:
    """How many nuclei were written, and how many could not be."""
    written = dropped = 0
    for batch in batches:
        features, kept = encode_features(batch, meta, form, offset)
        sink.write(b",\n" + features if written and kept else features)
        written, dropped = written + kept, dropped + batch.num_rows - kept
    return written, dropped


def _write_overview(sink: BinaryIO, table: Path, meta: NucleiMeta, offset: tuple[int, int]) -> int:
    """All nuclei of a type as one annotation of points, the quickest for QuPath; a pass over the table for each."""
    written = 0
    present: set[int] = set()
    for batch in read_nuclei(table, ["type_id"])[1]:
        present.update(batch["type_id"].unique().to_pylist())
    for type_id in sorted(present):
        annotation = uuid.uuid5(uuid.NAMESPACE_OID, f"{meta.fingerprint} {type_id}")
        opening = f'{{"type":"Feature","id":"{annotation}","geometry":{{"type":"MultiPoint","coordinates":['
        sink.write((",\n" if written else "").encode() + opening.encode())
        first = True
        for batch in read_nuclei(table, ["type_id", "x_px0", "y_px0"])[1]:
            xy = np.stack([batch["x_px0"], batch["y_px0"]], axis=1)[batch["type_id"].to_numpy() == type_id]
            tenths = (np.rint(xy * 10) - np.array(offset) * 10).astype(np.int64)
            if len(tenths):
                out = np.empty(len(tenths) * 46, np.uint8)
                sink.write((b"" if first else b",") + out[: _put_points(out, 0, tenths, 0, len(tenths))].tobytes())
                written, first = written + len(tenths), False
        sink.write(b']},"properties":{"objectType":"annotation",' + _classification(meta, type_id))
        sink.write(b'"isLocked":true}}')
    return written


def _slices(batches: Iterable[pa.RecordBatch], part_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The same nuclei, at most ROWS at a time and none across two parts, each with the number of its part."""
    at = 0
    for batch in batches:
        while batch.num_rows:
            rows = min(ROWS, part_rows - at % part_rows)
            yield at // part_rows, batch.slice(0, rows)
            at += min(rows, batch.num_rows)
            batch = batch.slice(rows)


@contextmanager
def _opened(path: Path, compressed: bool) -> Iterator[BinaryIO]:
    """A file to write to; compressed without name and time, so that equal nuclei give equal bytes."""
    with path.open("wb") as raw:
        if not compressed:
            yield raw
            return
        with igzip.IGzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as packed:  # type: ignore[no-untyped-call]
            yield cast(BinaryIO, packed)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_without_null(entry) for entry in value if entry is not None]
    return value


def _bytes(text: bytes) -> Bytes:
    return np.frombuffer(text, np.uint8)


def _pieces(texts: list[bytes]) -> tuple[Bytes, Integers]:
    """Texts end to end, and where each starts (one number more than texts)."""
    return _bytes(b"".join(texts)), np.cumsum([0, *map(len, texts)])


# Below, text is put into `out` from `at` on, and where it ends is returned. Compiled: Arrow's casts
# and joins took about 15 µs for the forty numbers of a nucleus, and this takes less than one.


@compiled
def _put(out: Bytes, at: int, text: Bytes) -> int:
    out[at : at + len(text)] = text
    return at + len(text)


@compiled
def _put_decimal(out: Bytes, at: int, value: int, decimals: int) -> int:
    """`value` / 10 ** `decimals`, without zeros at its end."""
    if value < 0:
        out[at] = 45  # -
        at, value = at + 1, -value
    while decimals > 0 and value % 10 == 0:
        value, decimals = value // 10, decimals - 1
    digits, rest = decimals + 1, value // 10 ** (decimals + 1)
    while rest > 0:
        digits, rest = digits + 1, rest // 10
    length = digits + (decimals > 0)
    for place in range(length - 1, -1, -1):
        if decimals > 0 and place == length - 1 - decimals:
            out[at + place] = 46  # .
        else:
            out[at + place] = 48 + value % 10
            value //= 10
    return at + length


@compiled
def _put_points(out: Bytes, at: int, tenths: Integers, first: int, last: int) -> int:
    """[x,y],[x,y] and so on."""
    for i in range(first, last):
        if i > first:
            out[at] = 44  # ,
            at += 1
        out[at] = 91  # [
        at = _put_decimal(out, at + 1, tenths[i, 0], 1)
        out[at] = 44  # ,
        at = _put_decimal(out, at + 1, tenths[i, 1], 1)
        out[at] = 93  # ]
        at += 1
    return at


@compiled
def _put_features(
    out: Bytes,
    ids: Bytes,
    opening: Bytes,
    tenths: Integers,
    starts: Integers,
    types: Bytes,
    type_starts: Integers,
    type_ids: Bytes,
    keys: Bytes,
    key_starts: Integers,
    measured: Integers,
    decimals: Integers,
) -> int:
    """`types` and `keys` are texts end to end with their starts; so are the rings in `tenths`."""
    at = 0
    head = np.frombuffer(b'{"type":"Feature","id":"', np.uint8)
    tail = np.frombuffer(b"}}}", np.uint8)
    for n in range(len(ids)):
        if n > 0:
            out[at], out[at + 1] = 44, 10  # comma, newline
            at += 2
        at = _put(out, _put(out, _put(out, at, head), ids[n]), opening)
        at = _put_points(out, at, tenths, starts[n], starts[n + 1])
        at = _put(out, at, types[type_starts[type_ids[n]] : type_starts[type_ids[n] + 1]])
        first = True
        for m in range(measured.shape[1]):
            if measured[n, m] == MISSING:
                continue
            if not first:
                out[at] = 44
                at += 1
            first = False
            at = _put(out, at, keys[key_starts[m] : key_starts[m + 1]])
            at = _put_decimal(out, at, measured[n, m], decimals[m])
        at = _put(out, at, tail)
    return at
