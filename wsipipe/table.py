"""nuclei.parquet: every nucleus of a slide as GeoParquet 1.1, written as blocks finish, read as a stream."""

import json
import logging
import mmap
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from wsipipe.atomic import discard, finished, partial_of
from wsipipe.errors import SettingsError, StoreError, one_line
from wsipipe.features import NUCLEI_SCHEMA
from wsipipe.geometry import Box, Grid
from wsipipe.neighbours import Neighbourhood
from wsipipe.rings import Rings

log = logging.getLogger(__name__)

FORMAT = "wsipipe nuclei"
FORMAT_VERSION = 2
SUM_KEY = "wsipipe-crc32"  # of the text under the key "wsipipe"; pages have checksums of their own
MAKE_AGAIN = "make it again with 'wsipipe nuclei --overwrite'"
ROW_GROUP = 50_000  # nuclei; about 15 MB in memory, and few enough groups for a slide of millions
# Rows are sorted by squares of this side, so that their order does not tell how the slide was cut into
# blocks and a row group is a compact region. One row of squares over the slide is held in memory at a time.
SQUARE_PX0 = 1024
REACH_UM = 50.0  # up to where another nucleus is a neighbour
# What a block cannot know of its nuclei is told by the table: how many neighbours each has, and how far the nearest is.
_SURROUNDINGS = [pa.field("neighbors_50um", pa.int32()), pa.field("nearest_um", pa.float32())]
TABLE_SCHEMA = pa.schema([*list(NUCLEI_SCHEMA)[:-1], *_SURROUNDINGS, NUCLEI_SCHEMA.field("geometry")])


@dataclass(frozen=True)
class NucleiMeta:
    """What a table of nuclei says of itself. Travels as JSON in the Parquet metadata, key ``wsipipe``.

    Attributes
    ----------
    slide, fingerprint : str
        Name of the slide and the hash that identifies its file.
    width_px0, height_px0 : int
        Size of the slide, level-0 px.
    bounds : Box or None
        The part of the slide that was scanned, level-0 px, where the file tells it.
    grid : Grid
        The working grid the nuclei were found on; it carries the slide's resolution.
    class_names, class_colours
        Types in the order of `type_id`; 0 is background. Colours are RGB, 0 to 255.
    model, config, versions : dict
        Model (name, weights, source), settings and software. JSON values only.
    maps : dict
        What else the maps were made of: `tile_px` and `halo_px` of the network's tiles, and `tissue`, the
        `wsipipe.provenance.tissue_sum` of the tissue. Empty in tables of before it was kept.
    counts : dict of str to int
        Nuclei by type, every type but the background; filled when the table is finished.
    qc : dict of str to int
        What the blocks reported besides, summed over them; filled when the table is finished.
    """

    slide: str
    fingerprint: str
    width_px0: int
    height_px0: int
    bounds: Box | None
    grid: Grid
    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    model: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, Any]
    maps: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    qc: dict[str, int] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """All that the nuclei depend on, as one level of settings; a slide may be renamed."""
        told = _flat(json.loads(self.to_json()))
        return {
            key: value for key, value in told.items() if key.split(".")[0] not in ("counts", "qc", "slide", "versions")
        }

    @property
    def count(self) -> int:
        """Number of nuclei in the table."""
        return sum(self.counts.values())

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "NucleiMeta":
        """Raises ValueError, TypeError or KeyError for a text that `to_json` did not write."""
        values = json.loads(text)
        if (values.pop("format"), version := values.pop("version")) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"it is of format version {version}; this wsipipe reads {FORMAT_VERSION}")
        meta = cls(**values)
        return replace(
            meta,
            bounds=Box(**values["bounds"]) if values["bounds"] else None,
            grid=Grid(**values["grid"]),
            class_names=tuple(meta.class_names),
            class_colours=tuple((r, g, b) for r, g, b in meta.class_colours),
        )


class NucleiSpool:
    """The nuclei of finished blocks, on their way into one table.

    Each block is a small Arrow file in ``<path>.partial/``, which appears only when it is complete. So a
    killed run goes on where it was, blocks may be added in any order and by several processes, and memory
    does not grow with the number of nuclei.

    Parameters
    ----------
    path : Path
        The table to be, e.g. nuclei.parquet.
    meta : NucleiMeta
        What the table will say of itself.
    layout : dict
        How the slide is cut into blocks, JSON values; needed to resume, not part of the table.

    Raises
    ------
    StoreError
        If blocks are there that were made with another `meta` or `layout`.
    """

    def __init__(self, path: Path, meta: NucleiMeta, layout: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta
        self.folder = partial_of(path)
        self._sound: set[str] = set()
        record = self.folder / "settings.json"
        if not record.exists():  # blocks of which nobody knows how they were made are nobody's
            discard(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = json.dumps({**json.loads(meta.to_json()), "blocks": layout}, ensure_ascii=False)
        if record.exists():
            try:
                theirs = json.loads(record.read_bytes())
                if not isinstance(theirs, dict):
                    raise ValueError("no settings")
            except (ValueError, RecursionError) as error:
                raise StoreError(f"{record} is damaged; pass --overwrite to start afresh") from error
            self._refuse_other_settings(theirs, json.loads(ours))
        else:
            with finished(record) as partial:
                partial.write_text(ours, encoding="utf-8")

    @staticmethod
    def discard(path: Path) -> None:
        """Remove the spool of a table, if there is one."""
        discard(partial_of(path))

    def done(self) -> set[int]:
        """Blocks that are there, empty ones included; one that is not as it was written goes, to be made again."""
        return set(self._files())

    def _files(self) -> dict[int, Path]:
        """Files of the blocks; each bears the CRC-32 of its content in its name, compared when first seen."""
        files = {}
        for file in sorted(self.folder.glob("*.arrow")):
            named = re.fullmatch(r"(\d{8,})-([0-9a-f]{8})", file.stem)
            if named is None:
                continue
            if file.name not in self._sound:
                if _crc(file) != named[2]:
                    log.warning("%s is damaged; its block is made again", file)
                    file.unlink()
                    continue
                self._sound.add(file.name)
            files[int(named[1])] = file
        return files

    def add(self, block: int, nuclei: pa.RecordBatch, qc: dict[str, int] | None = None) -> None:
        """Keep the nuclei that `block` owns; `nuclei` has the columns of NUCLEI_SCHEMA and may be empty."""
        if not nuclei.schema.equals(NUCLEI_SCHEMA):
            raise ValueError(f"nuclei have the columns {nuclei.schema.names}, not those of NUCLEI_SCHEMA")
        schema = NUCLEI_SCHEMA.with_metadata({"qc": json.dumps(qc or {})})
        unnamed = self.folder / f"{block:08d}.unnamed"
        with finished(unnamed) as partial, pa.ipc.new_file(str(partial), schema) as writer:
            writer.write_batch(nuclei.replace_schema_metadata(schema.metadata))
        unnamed.replace(self.folder / f"{block:08d}-{_crc(unnamed)}.arrow")

    def finish(self, blocks: Iterable[int]) -> NucleiMeta:
        """Write the table from `blocks`, which must all be there, and remove the spool.

        The file's bytes depend on the nuclei and on `meta` alone, not on how they were cut into blocks.

        Returns
        -------
        NucleiMeta
            With the counts, as it stands in the table.

        Raises
        ------
        StoreError
            If a block is missing.
        """
        wanted, files = sorted(set(blocks)), self._files()
        missing = sorted(set(wanted) - files.keys())
        if missing:
            raise StoreError(
                f"{self.folder} lacks {len(missing)} of {len(wanted)} blocks, first {missing[0]}; "
                "run the same command again to make them"
            )
        counts = dict.fromkeys(self.meta.class_names[1:], 0)
        extent = np.array([np.inf, np.inf, -np.inf, -np.inf])
        unnamed = self.folder / "table.parquet"
        # Only `type` repeats; the other columns are numbers for which a dictionary costs time and gains nothing.
        with (
            finished(unnamed) as partial,  # on the disk before the spool goes
            pq.ParquetWriter(
                partial,
                TABLE_SCHEMA,
                compression="zstd",
                compression_level=1,
                use_dictionary=["type"],
                write_page_checksum=True,
            ) as writer,
        ):
            for group in _groups(_in_order([files[block] for block in wanted], self.meta.grid)):
                writer.write_table(group, row_group_size=ROW_GROUP)
                for entry in group["type"].value_counts().to_pylist():
                    counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
                bounds = _bounds(group["geometry"].combine_chunks())
                extent = np.r_[np.fmin(extent[:2], bounds[:2]), np.fmax(extent[2:], bounds[2:])]
            meta = replace(self.meta, counts=counts, qc=_summed_qc(files[block] for block in wanted))
            about = {"geo": _geo(extent), "wsipipe": meta.to_json()}
            writer.add_key_value_metadata({**about, SUM_KEY: _sum(about["wsipipe"].encode())})
        unnamed.replace(self.path)
        discard(self.folder)
        log.debug("%s: %d nuclei from %d blocks", self.path, meta.count, len(wanted))
        return meta

    def _refuse_other_settings(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        theirs, ours = _flat(theirs), _flat(ours)
        differing = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        if differing:
            which = "; ".join(f"{key} was {theirs.get(key)!r} and is now {ours.get(key)!r}" for key in differing[:5])
            raise SettingsError(
                f"{self.folder} was begun with other settings: {which}; "
                "pass --overwrite to start afresh, or give the former settings to go on"
            )


def _summed_qc(files: Iterable[Path]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for file in files:
        with pa.memory_map(str(file)) as source:
            total.update(json.loads(pa.ipc.open_file(source).schema.metadata[b"qc"]))
    return dict(sorted(total.items()))


def read_nuclei(path: Path, columns: Sequence[str] | None = None) -> tuple[NucleiMeta, Iterator[pa.RecordBatch]]:
    """What a table says of itself, and its nuclei as a stream; `columns` are all unless named.

    Raises
    ------
    StoreError
        If the file is missing, torn, not a table of nuclei, or of another format version; from the stream, if a
        page of it is not as it was written, or nuclei are missing.
    """
    try:
        footer = pq.read_metadata(path)
        stored = footer.metadata or {}
        if b"wsipipe" not in stored:
            raise StoreError(f"{path} is not a table of nuclei; make one with 'wsipipe nuclei'")
        meta = NucleiMeta.from_json(stored[b"wsipipe"])
        if stored.get(SUM_KEY.encode()) != _sum(stored[b"wsipipe"]).encode():
            raise ValueError("its description does not have its checksum")
        if footer.num_rows != meta.count or not footer.schema.to_arrow_schema().equals(TABLE_SCHEMA):
            raise ValueError("its columns or rows are not those that it describes")
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist; make it with 'wsipipe nuclei'") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(path, error) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is a table of nuclei that cannot be used: {one_line(error)}; {MAKE_AGAIN}") from error
    return meta, _batches(path, columns, meta.count)


def _batches(path: Path, columns: Sequence[str] | None, count: int) -> Iterator[pa.RecordBatch]:
    wanted, left = None if columns is None else list(columns), count
    try:
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP, columns=wanted):
                batch.validate(full=True)
                left -= batch.num_rows
                yield batch
        if left:  # a footer may lose row groups and keep their number of rows
            raise pa.ArrowInvalid(f"{count - left} of its {count} nuclei are there")
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path} cannot be read as Parquet ({one_line(error)}); {MAKE_AGAIN}")


def _crc(file: Path) -> str:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return f"{zlib.crc32(content):08x}"


def _sum(text: bytes) -> str:
    return f"{zlib.crc32(text):08x}"


def _in_order(files: list[Path], grid: Grid) -> Iterator[pa.Table]:
    """The rows of all files with their surroundings, by rows of squares, then by square, then by place."""
    rows_of_squares: dict[int, list[Path]] = defaultdict(list)
    for file in files:
        for row in np.unique(_square(_read(file)["y_px0"])):
            rows_of_squares[int(row)].append(file)

    def gathered(row: int, columns: list[str]) -> pa.Table:
        tables = (_read(file) for file in rows_of_squares[row])
        parts = [table.filter(pa.array(_square(table["y_px0"]) == row)).select(columns) for table in tables]
        return pa.concat_tables(parts)

    def centres(row: int) -> npt.NDArray[np.float64]:
        nuclei = gathered(row, ["x_um", "y_um"])
        return np.stack([nuclei["x_um"].to_numpy(), nuclei["y_um"].to_numpy()], axis=1)

    around = Neighbourhood(rows_of_squares.keys(), centres, SQUARE_PX0 * grid.mpp_y0, REACH_UM)
    order = [(name, "ascending") for name in ("square", "y_px0", "x_px0", "id")]
    for row in sorted(rows_of_squares):
        nuclei = gathered(row, NUCLEI_SCHEMA.names)
        counts, nearest = around.of_row(row)
        surroundings = pa.array(counts), pa.array(nearest, pa.float32(), mask=np.isinf(nearest))
        for column, values in zip(_SURROUNDINGS, surroundings, strict=True):
            nuclei = nuclei.append_column(column, values)
        keys = nuclei.select(["y_px0", "x_px0", "id"]).append_column("square", pa.array(_square(nuclei["x_px0"])))
        yield nuclei.select(TABLE_SCHEMA.names).take(pc.sort_indices(keys, sort_keys=order))


def _read(file: Path) -> pa.Table:
    # Mapped, not loaded: a block is read once for every row of squares that it meets.
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all().replace_schema_metadata(None)


def _square(px0: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    return np.asarray(px0.to_numpy() // SQUARE_PX0)


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of ROW_GROUP rows, the last one smaller."""
    held = TABLE_SCHEMA.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table])
        while held.num_rows >= ROW_GROUP:
            yield held.slice(0, ROW_GROUP).combine_chunks()
            held = held.slice(ROW_GROUP)
    if held.num_rows:
        yield held.combine_chunks()


def _bounds(geometry: pa.Array) -> npt.NDArray[np.float64]:
    """The box round all outlines, level-0 px: x0, y0, x1, y1."""
    rings, exact = Rings.from_wkb(geometry)
    if not exact.all():  # of a form that blocks do not write
        return np.asarray(shapely.total_bounds(shapely.from_wkb(geometry.to_numpy(zero_copy_only=False))))
    return np.concatenate([rings.points.min(0), rings.points.max(0)]) / 10


def _geo(extent: npt.NDArray[np.float64]) -> str:
    """The ``geo`` metadata of GeoParquet 1.1: pixels of a slide have no place on earth, so no CRS."""
    column = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None, "edges": "planar"}
    bbox = {"bbox": extent.tolist()} if np.isfinite(extent).all() else {}
    return json.dumps({"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column | bbox}})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, keys joined by dots, so that a difference has a name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
