"""Find the nuclei of finished maps, block by block under Dask, and store them as one table."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

import wsipipe
from wsipipe.config import NucleiConfig
from wsipipe.errors import ConfigError, SettingsError, StoreError
from wsipipe.features import BlockQC, nuclei_of_block
from wsipipe.folder import drop_record, record_of, write_record
from wsipipe.geometry import Box, partition
from wsipipe.progress import Progress
from wsipipe.provenance import require_same_slide, tissue_sum
from wsipipe.seams import SeamCheck, SeamFigures
from wsipipe.slide import Slide, open_slide
from wsipipe.stages import budget
from wsipipe.stages.workers import Workers, hired
from wsipipe.store import MapStore
from wsipipe.table import SQUARE_PX0, NucleiMeta, NucleiSpool, read_nuclei
from wsipipe.tissue import TissueMask

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NucleiSummary:
    """What the stage found; where the table was there already, `seconds` is 0."""

    meta: NucleiMeta
    seconds: float
    seams: SeamFigures


class Sources:
    """The slide and the maps that blocks are read from; sent to another process, they are opened anew there."""

    def __init__(self, slide: Slide, store: MapStore) -> None:
        self.slide, self.store = slide, store

    def __reduce__(self) -> tuple[Any, ...]:
        slide, maps = self.slide, self.store.path.absolute()  # a worker may have another working folder
        path = slide.path if "://" in slide.path else str(Path(slide.path).absolute())
        given_mpp = slide.mpp_x0 if slide.mpp_source == "given" else None
        return _open_sources, (wsipipe.__version__, path, given_mpp, slide.skips_unread, maps, self.store.made_ns)


@lru_cache(maxsize=2)
def _open_sources(version: str, slide: str, mpp: float | None, skips_unread: bool, maps: Path, made_ns: int) -> Sources:
    """One a process, shared by its threads; `made_ns` tells stores apart that had the same path one after another."""
    if version != wsipipe.__version__:
        raise ConfigError(f"a worker has wsipipe {wsipipe.__version__}, not {version}; install the same everywhere")
    store, opened = MapStore.open(maps, unfinished=True), open_slide(slide, mpp, skips_unread=skips_unread)
    if opened.fingerprint != store.meta.fingerprint:
        raise StoreError(f"{maps} is of another slide than {slide}; was it changed while its nuclei were found?")
    return Sources(opened, store)


class NucleiRun:
    """The nuclei of one map store, on their way into one table; blocks are its chunks.

    Attributes
    ----------
    finished : NucleiMeta or None
        Of a table with the same settings that is there already; then there is nothing to do.
    """

    def __init__(self, slide: Slide, maps: Path, out: Path, config: NucleiConfig, *, overwrite: bool = False) -> None:
        self.started = time.monotonic()
        self._slide, self._maps, self._out, self._config = slide, maps, out, config
        self._store = store = MapStore.open(maps, unfinished=True)
        require_same_slide(maps, store.meta.fingerprint, store.meta.grid, slide)
        spec = store.meta.spec
        meta = NucleiMeta(
            slide=slide.name,
            fingerprint=slide.fingerprint,
            width_px0=slide.width_px0,
            height_px0=slide.height_px0,
            bounds=slide.bounds,
            grid=store.meta.grid,
            class_names=spec.class_names,
            class_colours=spec.class_colours,
            model={
                "name": spec.name,
                "weights_sha256": store.meta.weights_sha256,
                "source": spec.source,
                "licence": spec.licence,
                "precision": store.meta.precision,
            },
            config=config.model_dump(mode="json"),
            versions={"wsipipe": wsipipe.__version__},
            maps=_made_of(store),
        )
        if overwrite:
            remove_nuclei(out)
        self.finished = _existing(out, meta)
        if self.finished is not None:
            with suppress(OSError):  # what a kill left
                NucleiSpool.discard(out)
        self._spool: NucleiSpool | None = None
        if self.finished is None:
            layout = {"chunk_px": store.meta.geometry.chunk_px, "halo_px": config.halo_px}
            self._spool = NucleiSpool(out, meta, layout)
            self._done = self._spool.done()

    @property
    def todo(self) -> list[int]:
        """Blocks that are left, in order."""
        return [] if self._spool is None else sorted(self._store.wanted.keys() - self._done)

    def needs(self, index: int) -> set[int]:
        """Chunks that a block reads, those without tissue left out."""
        meta = self._store.meta
        around = meta.chunk_box(index).grown(self._config.halo_px)
        return set(meta.chunk_indices(around)) & self._store.wanted.keys()

    def process(self, indices: Iterable[int], workers: Workers) -> Iterator[int]:
        """Find the nuclei of blocks, whose maps must be there; yields each block when it is stored."""
        if self._spool is None:  # all of them are in the table
            return
        sources, box = Sources(self._slide, self._store), self._store.meta.chunk_box
        calls = ((index, (sources, box(index), self._config)) for index in indices)
        for index, (nuclei, qc) in workers.results(find_nuclei, calls):
            self._spool.add(index, nuclei, asdict(qc))
            self._done.add(index)
            yield index

    def finish(self) -> NucleiSummary:
        """Write the table.

        Raises
        ------
        StoreError
            If a block is missing.
        """
        if self.finished is not None:
            meta = self.finished
            seams = check_seams(self._out, self._store, self._config)
            if not record_of(self._out).exists():  # a kill came between both
                self._write_record(meta, seams)
            return NucleiSummary(meta, 0.0, seams)
        assert self._spool is not None
        drop_record(self._out)
        meta = self._spool.finish(self._store.wanted)
        seams = check_seams(self._out, self._store, self._config)
        seconds = time.monotonic() - self.started
        log.info("%s: %d nuclei", self._slide.name, meta.count)
        if meta.qc.get("wide"):
            log.warning(
                "%d nuclei are wider than the halo of %d px lets blocks see whole; they may be cut or doubled: "
                "make the nuclei again with a larger nuclei.halo_px", meta.qc["wide"], self._config.halo_px,
            )  # fmt: skip
        if seams.shows:
            log.warning("%s: the borders of tiles show in the result: %s", self._slide.name, seams)
        self._write_record(meta, seams)
        return NucleiSummary(meta, seconds, seams)

    def _write_record(self, meta: NucleiMeta, seams: SeamFigures) -> None:
        write_record(
            self._out,
            maps=str(self._maps),
            config=meta.config,
            model=meta.model,
            nuclei=meta.counts,
            qc=meta.qc,
            seams=seams.to_json(),
            seconds=round(time.monotonic() - self.started, 3),
        )


def make_nuclei(
    slide: Slide,
    maps: Path,
    out: Path,
    config: NucleiConfig,
    *,
    scheduler: str = "threads",
    workers: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> NucleiSummary:
    """Find all nuclei of the finished maps of a slide and write them to `out`, a GeoParquet table.

    Blocks that an earlier run finished are kept; a finished table of the same settings is left as it is.

    Parameters
    ----------
    scheduler : str
        "threads", "processes", or the address of a `distributed` scheduler whose workers see the same files.
    workers : int, optional
        Threads or processes; by default the usable CPUs.
    memory : int, optional
        Bytes that this process may hold, or with "processes" all of them: there are so many workers as fit.

    Raises
    ------
    WsipipeError
        If the maps, the slide or an existing table do not allow it. Blocks that are finished stay.
    """
    store = MapStore.open(maps)  # complete, or a clear refusal
    if memory is not None:
        demand = budget.of_nuclei(
            slide, store.meta.geometry, len(store.meta.spec.class_names), config.halo_px, scheduler, workers
        )
        workers = budget.fit(memory, slide, demand).workers or None
    with hired(scheduler, workers) as crew:  # before anything is overwritten: they may not be had
        run = NucleiRun(slide, maps, out, config, overwrite=overwrite)
        with Progress(len(run.todo), "blocks", f"nuclei of {slide.name}", shown=progress) as bar:
            for _ in run.process(run.todo, crew):
                bar.advance()
    return run.finish()


def remove_nuclei(out: Path) -> None:
    """Remove a table and what is there of a new one, so that a run from the start that is stopped can go on."""
    drop_record(out)
    out.unlink(missing_ok=True)
    NucleiSpool.discard(out)


def find_nuclei(sources: Sources, core: Box, config: NucleiConfig) -> tuple[pa.RecordBatch, BlockQC]:
    """The nuclei that a block owns; runs on any worker that sees the files."""
    slide, store = sources.slide, sources.store
    grid, read = store.meta.grid, core.grown(config.halo_px)
    region = store.meta.tissue_settings.get("region")
    return nuclei_of_block(
        store.read(read),
        read,
        core,
        grid,
        store.meta.spec.class_names,
        store.meta.fingerprint,
        slide.read(read, grid),
        config,
        None if region is None else shapely.from_wkt(region),
    )


def check_seams(table: Path, store: MapStore, config: NucleiConfig) -> SeamFigures:
    """Whether the nuclei of a table show where tiles met, of which some are the borders of blocks too."""
    side, grid = store.meta.geometry.core_px, store.meta.grid
    tissue = TissueMask(store.tissue, store.meta.tissue_grid)
    wanted = np.array([tissue.reaches(core, grid) for core in partition(grid.box, side)])
    check = SeamCheck(grid, side, wanted.reshape(-1, -(-grid.width // side)), config.halo_px, tissue)
    for batch in read_nuclei(table, ["x_px0", "y_px0", "geometry"])[1]:
        x, y, outlines = (batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names)
        # a table's rows are sorted by rows of squares
        check.add(x, y, shapely.from_wkb(outlines), y[-1] // SQUARE_PX0 * SQUARE_PX0)
    return check.figures()


def _made_of(store: MapStore) -> dict[str, Any]:
    """What the maps depend on beside slide and model; not how they are cut into chunks, which changes no nucleus."""
    tissue = tissue_sum(store.tissue_sha256, store.meta.tissue_settings.get("region"))
    return {"tile_px": store.meta.geometry.tile_px, "halo_px": store.meta.geometry.halo_px, "tissue": tissue}


def _existing(out: Path, meta: NucleiMeta) -> NucleiMeta | None:
    """What a finished table says of itself, if it was made as `meta` says; refuses one that was made otherwise."""
    if not out.exists():
        return None
    there, _ = read_nuclei(out)
    ours, theirs = meta.identity(), there.identity()
    differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if differing:
        said = "; ".join(f"{key} was {theirs.get(key)!r} and is now {ours.get(key)!r}" for key in differing[:5])
        raise SettingsError(
            f"{out} was made with other settings: {said}; make it again with `wsipipe nuclei --overwrite`"
        )
    return there
