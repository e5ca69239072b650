"""The maps of one slide on the disk: written and committed chunk by chunk, compared with checksums as they are read."""

import logging
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors
from zarr.codecs import ZstdCodec

import wsipipe
from wsipipe.atomic import discard, partial_of, to_disk
from wsipipe.errors import SettingsError, StoreError, TornError, one_line
from wsipipe.geometry import Box
from wsipipe.lock import Lock
from wsipipe.maps import Maps
from wsipipe.provenance import (
    FORMAT_VERSION,
    NOT_THERE,
    StoreMeta,
    differences,
    identity_of,
    read_attributes,
    require_sum,
    sha256_of,
    sum_of,
)

log = logging.getLogger(__name__)

# Of zstd 1 to 3 and Blosc with and without shuffling on crowded maps (9 channels, 768 px chunks), level 1 costs
# least to write: 14 MP/s of one core, 3.4 bytes a pixel. Level 3 saves a tenth of the bytes for 1.4 times the work.
COMPRESSION_LEVEL = 1
UNREAD = "unread"  # one line a place of the slide that could not be read: x0 y0 x1 y1 at level 0
COMMITS = "commits"  # one line a finished chunk, in the order of finishing: its index and the CRC-32 of its files
MOST_COARSE_PX = 1 << 28  # of a tissue mask or a table of chunks: a damaged size must not fill the memory


class MapStore:
    """maps.zarr: the NP, HV and NC maps of one slide (zarr v3), finished chunk by chunk.

    Arrays `np` (H, W) uint8, `hv` (2, H, W) int8, `nc` (K, H, W) uint8; `tissue` (h, w) uint8, the tissue mask;
    `wanted` (rows, columns) uint32, the number of tiles in each chunk that nuclei on tissue reach. Chunks without such
    tiles are never written. A chunk's index counts row by row. Readers may share one; a single process writes.
    Checksums of all chunks, of the tissue mask and of the attributes are kept, and compared as each is first read.

    Attributes
    ----------
    meta : StoreMeta
        What the maps were made of.
    version : str
        The wsipipe that made them.
    wanted : dict of int to int
        Index of every chunk with tissue and its number of tiles.
    tissue_sha256 : str
        Of the tissue mask.
    made_ns : int
        When the store was begun; tells it from another one under the same path.
    is_finished : bool
        Whether the store is complete and has its final name.
    """

    def __init__(self, path: Path, *, unfinished: bool = False, lock: Lock | None = None) -> None:
        self.path = path
        self._lock = lock
        self._attach(unfinished)

    def _attach(self, unfinished: bool) -> None:
        path = self.path
        self.is_finished = not (unfinished and not path.exists() and partial_of(path).exists())
        self._root = path if self.is_finished else partial_of(path)
        attributes = read_attributes(self._root)
        try:
            self.meta = StoreMeta.from_json(attributes)
            self.version: str = attributes["wsipipe"]["version"]
            self._identity = identity_of(attributes)
            self.made_ns = (self._root / "zarr.json").stat().st_mtime_ns
            require_sum(attributes)
            # An array's chunks are stored even where they are all zero: so a chunk that lacks its file was lost.
            with zarr.config.set({"array.write_empty_chunks": True}):
                mode: Any = "r+" if self._lock else "r"
                group = zarr.open_group(self._root, mode=mode, use_consolidated=False, zarr_format=3)
                arrays: list[Any] = [_checked(group[name], layout) for name, layout in _layouts(self.meta).items()]
                counts = np.asarray(arrays[-1][...])
            if sha256_of(counts) != attributes["counts"]["sha256"]:
                raise ValueError("the table of its chunks does not have its checksum")
        except Exception as error:  # each codec and every part of zarr has its own
            raise self._unreadable(error) from error
        self._np, self._hv, self._nc, self._tissue = arrays[:-1]
        self.wanted = {int(index): int(counts.flat[index]) for index in np.flatnonzero(counts)}
        self.tissue_sha256: str = attributes["tissue_mask"]
        self._sums = _read_commits(self._root / COMMITS)
        self._sound: set[int] = set()  # chunks whose files were compared with their sum

    @classmethod
    def open(cls, path: Path, *, unfinished: bool = False) -> "MapStore":
        """Open for reading; `unfinished` also accepts one that is still being written.

        Raises
        ------
        StoreError
            If it is missing, not ours, of another format version, or incomplete.
        """
        try:
            store = cls(path, unfinished=unfinished)
        except StoreError:
            if not (unfinished and path.exists() and not partial_of(path).exists()):
                raise
            store = cls(path)  # it may have got its final name while it was being opened
        if store.is_finished and store.missing:
            raise StoreError(f"{path} lacks {len(store.missing)} of its chunks; make it again with --overwrite")
        return store

    @classmethod
    def resume_or_create(
        cls,
        path: Path,
        meta: StoreMeta,
        wanted: Mapping[int, int],
        tissue: npt.NDArray[np.bool_],
        *,
        any_precision: bool = False,
        overwrite: bool = False,
    ) -> "MapStore":
        """Go on with what an earlier run left, or start; a finished store is returned as it is (`is_finished`).

        Parameters
        ----------
        wanted : mapping of int to int
            Index of every chunk with tissue, and its number of tiles.
        tissue : (h, w) bool
            The tissue mask, on `meta.tissue_grid`.
        any_precision : bool
            Take a finished store whatever precision it was computed in.
        overwrite : bool
            Start afresh, whatever there is.

        Raises
        ------
        StoreError
            If another process writes it, or what exists was made otherwise: names the settings and both values.
        """
        identity = {**meta.identity(), "tissue_mask": sha256_of(tissue)}

        def finished() -> "MapStore":
            store = cls.open(path)
            store._require({**identity, "precision": store.meta.precision} if any_precision else identity)
            return store

        if path.exists() and not overwrite:
            return finished()
        lock = Lock(path)
        try:
            if path.exists() and not overwrite:  # another process has finished it before it was locked
                store = finished()
                lock.release()
                return store
            partial = partial_of(path)
            if overwrite:
                _discard_ours(path)
            begun = cls._begun(path, lock)
            if begun is None:
                discard(path)  # there is none, but perhaps the rest of one whose deletion was killed
                discard(partial)
                _create(partial, identity, meta, wanted, tissue)
            store = begun or cls(path, unfinished=True, lock=lock)
            store._require(identity)
            store._mend()
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def _begun(cls, path: Path, lock: Lock) -> "MapStore | None":
        """What an earlier run left and this one can go on with."""
        partial = partial_of(path)
        if not (partial / COMMITS).exists():
            return None
        try:
            version = read_attributes(partial, any_version=True)["wsipipe"]["format"]
            if not isinstance(version, int) or version < FORMAT_VERSION:
                log.warning("starting afresh: an older wsipipe began %s", partial)
                return None
            return cls(path, unfinished=True, lock=lock)
        except TornError as error:
            log.warning("starting afresh: %s", str(error).partition(";")[0])
            return None

    @staticmethod
    def remove(path: Path) -> None:
        """Delete maps and what is there of new ones.

        Raises
        ------
        StoreError
            If another process writes them, or they are none of ours.
        """
        lock = Lock(path)
        try:
            _discard_ours(path)
        finally:
            lock.release()

    def __enter__(self) -> "MapStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write; harmless where nothing was locked."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @cached_property
    def tissue(self) -> npt.NDArray[np.bool_]:
        """(h, w) bool, on `meta.tissue_grid`."""
        mask = None
        try:
            mask = np.asarray(self._tissue[...], bool)
        except Exception as error:  # each codec has its own
            if (self._root / "zarr.json").exists():
                raise self._unreadable(error) from error
        if not (self._root / "zarr.json").exists():  # renamed meanwhile, as in `read`
            return self._renamed.tissue
        if mask is None or sha256_of(mask) != self.tissue_sha256:
            raise StoreError(f"the tissue mask in {self._root} is damaged; make it again with --overwrite")
        return mask

    @property
    def committed(self) -> set[int]:
        """Chunks that were finished when the store was opened, or have been since through this object."""
        return set(self._sums)

    @cached_property
    def _renamed(self) -> "MapStore":
        """The finished store. Threads share this object, so it cannot itself move to the new name under their hands."""
        return MapStore.open(self.path)

    @property
    def missing(self) -> set[int]:
        """Chunks with tissue that are not finished."""
        return self.wanted.keys() - self.committed

    def read(self, box: Box) -> Maps:
        """Maps of a box; zero beyond the slide and in chunks without tissue.

        Raises
        ------
        StoreError
            If the box meets a chunk with tissue that is not there: lost, or not yet computed.
        """
        lost, damaged = self._unsound(box)
        maps = None
        if not lost and not damaged:
            try:
                maps = self._read(box)
            except Exception as error:  # each codec has its own
                if (self._root / "zarr.json").exists():
                    raise self._unreadable(error) from error
        if not (self._root / "zarr.json").exists():  # finished, and so renamed, meanwhile: what was read may be holes
            return self._renamed.read(box)
        if lost:
            raise StoreError(f"{self._root} lacks its chunks {lost}; make it again with --overwrite")
        if maps is None:
            raise StoreError(f"the chunks {damaged} of {self._root} are damaged; make it again with --overwrite")
        return maps

    @property
    def unread(self) -> list[Box]:
        """Places of the slide, at level 0, that could not be read and were taken for white."""
        path = self._root / UNREAD
        try:
            lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
            boxes = {Box(x0, y0, x1, y1) for x0, y0, x1, y1 in (map(int, line.split()) for line in lines)}
        except ValueError as error:
            raise StoreError(f"{path} is damaged; make the maps again with --overwrite") from error
        return sorted(boxes, key=lambda box: (box.y0, box.x0))

    def write_chunk(self, index: int, maps: Maps, unread: Iterable[Box] = ()) -> None:
        """Store the maps of one chunk, then commit it; once this returns they survive a crash of the machine.

        `unread` are the places at level 0 that could not be read for it.
        """
        box = self.meta.chunk_box(index)
        if maps.nuclei.shape != box.shape or index not in self.wanted:
            raise ValueError(f"maps of {maps.nuclei.shape} px are not those of chunk {index} of {box.shape} px")
        for array, values in ((self._np, maps.nuclei), (self._hv, maps.offsets), (self._nc, maps.types)):
            array[..., *box.slices] = values
            to_disk(self._chunk_file(array, index))
        if lines := [f"{box.x0} {box.y0} {box.x1} {box.y1}\n" for box in unread]:
            with (self._root / UNREAD).open("a") as file:
                file.writelines(sorted(lines))
            to_disk(self._root / UNREAD)
        crc = self._sum(index)
        with (self._root / COMMITS).open("a") as commits:
            commits.write(f"{index} {crc:08x}\n")
            commits.flush()
            os.fsync(commits.fileno())
        self._sums[index] = crc

    def finish(self) -> None:
        """Give the complete store its final name and unlock it.

        Raises
        ------
        StoreError
            If chunks are missing.
        """
        if self.missing:
            some = ", ".join(map(str, sorted(self.missing)[:10]))
            raise StoreError(
                f"{self._root} lacks {len(self.missing)} of {len(self.wanted)} chunks ({some}, ...); "
                "run the same command again to go on"
            )
        self._root.replace(self.path)
        self.close()
        self._attach(unfinished=False)

    def _read(self, box: Box) -> Maps:
        inside = box.clipped(self.meta.grid.box)
        found = []
        for array in (self._np, self._hv, self._nc):
            values = np.zeros((*array.shape[:-2], *box.shape), array.dtype)
            if not inside.is_empty:
                values[..., *inside.within(box).slices] = array[..., *inside.slices]
            found.append(values)
        return Maps(*found)

    def _unsound(self, box: Box) -> tuple[list[int], list[int]]:
        """Chunks with tissue that a box meets and that are not there, and those that are not as they were written."""
        lost, damaged = [], []
        for index in self.meta.chunk_indices(box):
            if index not in self.wanted or index in self._sound:
                continue
            try:
                found = self._sum(index)
            except FileNotFoundError:
                lost.append(index)
                continue
            if index not in self._sums:  # another object may have written it since
                self._sums = _read_commits(self._root / COMMITS)
            if index not in self._sums:
                lost.append(index)
            elif self._sums[index] != found:
                damaged.append(index)
            else:
                self._sound.add(index)
        return lost, damaged

    def _sum(self, index: int) -> int:
        """CRC-32 of a chunk's files and its index: chunks that changed places are not sound either."""
        crc = index
        for array in (self._np, self._hv, self._nc):
            crc = zlib.crc32(self._chunk_file(array, index).read_bytes(), crc)
        return crc

    def _chunk_file(self, array: Any, index: int) -> Path:
        place = (0,) * (array.ndim - 2) + divmod(index, self.meta.columns)
        return self._root / str(array.basename) / str(array.metadata.encode_chunk_key(place))

    def _require(self, identity: dict[str, Any]) -> None:
        if differing := differences(self._identity, identity):
            raise SettingsError(
                f"{self._root} was made otherwise: {'; '.join(differing)}; "
                "run it as it was, or start afresh with --overwrite"
            )

    def _unreadable(self, error: Exception) -> Exception:
        """What to raise: maps are damaged only where neither the memory nor the disk is what failed."""
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, NOT_THERE):
            return error
        if isinstance(error, MemoryError):
            return StoreError(
                f"there is not the memory to read {self._root} ({one_line(error):.300}); "
                "give fewer workers, or smaller maps.chunk_tiles and nuclei.halo_px"
            )
        return TornError(f"{self._root} is damaged ({one_line(error):.300}); make it again with --overwrite")

    def _mend(self) -> None:
        """Remove what a kill cut short: the end of a line, and files that did not get their name."""
        for log in (self._root / COMMITS, self._root / UNREAD):
            if log.exists():
                os.truncate(log, log.read_bytes().rfind(b"\n") + 1)
        for torn in self._root.rglob("*.partial"):
            torn.unlink()


@dataclass(frozen=True, slots=True)
class _Layout:
    """What an array of the store must be; beside the chunks' files this is all that its values depend on."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    fill_value: int = 0
    codecs: tuple[str, ...] = ("BytesCodec", "ZstdCodec")


def _layouts(meta: StoreMeta) -> dict[str, _Layout]:
    grid, side, coarse = meta.grid, meta.geometry.chunk_px, meta.tissue_grid.box.shape
    chunks = (-(-grid.height // side), -(-grid.width // side))
    for height, width in (coarse, chunks):
        if min(height, width) < 1 or height * width > MOST_COARSE_PX:
            raise ValueError(f"{width} x {height} px or chunks are no slide's")
    types = max(1, len(meta.spec.class_names))
    return {
        "np": _Layout(grid.box.shape, (side, side), "uint8"),
        "hv": _Layout((2, *grid.box.shape), (2, side, side), "int8"),
        "nc": _Layout((types, *grid.box.shape), (types, side, side), "uint8"),
        "tissue": _Layout(coarse, coarse, "uint8"),
        "wanted": _Layout(chunks, chunks, "uint32"),
    }


def _checked(array: Any, layout: _Layout) -> Any:
    about = array.metadata
    codecs = tuple(type(codec).__name__ for codec in about.codecs)
    found = _Layout(tuple(array.shape), tuple(array.chunks), str(array.dtype), int(about.fill_value), codecs)
    if found != layout:
        raise ValueError(f"its array {array.basename} is {found}, not {layout}")
    return array


def _create(
    partial: Path,
    identity: dict[str, Any],
    meta: StoreMeta,
    wanted: Mapping[int, int],
    tissue: npt.NDArray[np.bool_],
) -> None:
    layouts = _layouts(meta)
    counts = np.zeros(layouts["wanted"].shape, np.uint32)
    for index, tiles in wanted.items():
        counts.flat[index] = tiles
    attributes = {
        "wsipipe": {"format": FORMAT_VERSION, "version": wsipipe.__version__},
        **meta.to_json(),
        "tissue_mask": identity["tissue_mask"],
        "counts": {"chunks": len(wanted), "tiles": sum(wanted.values()), "sha256": sha256_of(counts)},
    }
    attributes["sum"] = sum_of(attributes)
    partial.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.create_group(partial, attributes=attributes, zarr_format=3)
    for name in ("np", "hv", "nc"):
        layout = layouts[name]
        group.create_array(
            name,
            shape=layout.shape,
            chunks=layout.chunks,
            dtype=layout.dtype,
            fill_value=layout.fill_value,
            compressors=[ZstdCodec(level=COMPRESSION_LEVEL)],
            dimension_names=("c", "y", "x")[-len(layout.shape) :],
        )
    for name, values in (("tissue", tissue.astype(np.uint8)), ("wanted", counts)):
        group.create_array(
            name,
            data=values,
            chunks=values.shape,
            fill_value=layouts[name].fill_value,
            compressors=[ZstdCodec(level=COMPRESSION_LEVEL)],
            dimension_names=("y", "x"),
        )
    for file in partial.rglob("*"):
        if file.is_file():
            to_disk(file)
    (partial / COMMITS).touch()  # last: a partial without it is a torn beginning


def _discard_ours(path: Path) -> None:
    if path.exists() and not (path / COMMITS).exists():
        read_attributes(path, any_version=True)  # a folder that is not ours is not ours to delete
    discard(path)
    discard(partial_of(path))


def _read_commits(path: Path) -> dict[int, int]:
    """Index and checksum of every finished chunk."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:  # not begun; or the store got its final name since it was looked for
        text = ""
    sums = {}
    for line in text[: text.rfind("\n") + 1].splitlines():  # a torn last line was not committed
        found = re.fullmatch(r"(\d{1,9}) ([0-9a-f]{8})", line)
        if found is None:
            raise TornError(f"{path} is damaged; make the maps again with --overwrite")
        sums[int(found[1])] = int(found[2], 16)
    return sums
