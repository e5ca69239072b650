"""Run the network over the tissue of a slide and store its NP, HV and NC maps.

Three parties, each waiting only for the one before it: reader threads fill batches ahead of need, the network takes
them, one writer thread puts tiles together to chunks and commits them. On a CPU the network takes a batch on each core
rather than all cores for one: a layer shared by cores waits for the slowest of them, which readers, writer and
watershed keep interrupting. Answers are taken in the order of the batches. Batches are cut from the
list of all wanted tiles, finished or not: a run that goes on after a kill sees the batches that an undisturbed run
sees. The size of a batch (not the place in it) shows in the last bits of an answer, 1e-7 on a CPU for one tile against
several: so this is what makes both runs equal.
"""

import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wsipipe.config import Config, config_hash
from wsipipe.device import (
    choose_batch_size,
    choose_device,
    choose_networks,
    choose_precision,
    choose_readers,
    describe,
    network_threads,
    torch_dtype,
)
from wsipipe.errors import ConfigError, ModelError, StoreError, WsipipeError
from wsipipe.folder import record_of, write_record
from wsipipe.geometry import Box, Grid
from wsipipe.maps import Maps, NetworkMaps, to_input
from wsipipe.memory import WRITES_AHEAD
from wsipipe.model.answers import maps_of
from wsipipe.model.inference import prepare_for_inference
from wsipipe.model.spec import ModelSpec, tile_geometry
from wsipipe.progress import Progress
from wsipipe.provenance import StoreMeta
from wsipipe.stages import budget
from wsipipe.store import MapStore
from wsipipe.tiles import Tile, chunk_grid

if TYPE_CHECKING:
    from wsipipe.slide import Slide
    from wsipipe.tissue import TissueMask

log = logging.getLogger(__name__)

FREE_BYTES_PER_PX = 0.5  # crowded tissue takes 3.4, quiet tissue a part of it: with less a run cannot end well


@dataclass(frozen=True, slots=True)
class MapsSummary:
    """What a run did and where its time went; seconds are those the network's thread spent or waited."""

    tiles: int
    chunks: int
    chunks_before: int  # finished by an earlier run
    megapixels: float  # of working pixels answered for
    seconds: float
    seconds_readers: float
    seconds_network: float
    seconds_writer: float
    device: str
    precision: str
    batch_size: int
    unread_px0: tuple[Box, ...] = ()  # places at level 0 that could not be read and were taken for white

    @property
    def tiles_per_s(self) -> float:
        return self.tiles / self.seconds if self.seconds else 0.0

    @property
    def megapixels_per_s(self) -> float:
        return self.megapixels / self.seconds if self.seconds else 0.0

    @property
    def bottleneck(self) -> str:
        """What took most of the time: "readers", "network" or "writer"."""
        spent = {"network": self.seconds_network, "readers": self.seconds_readers, "writer": self.seconds_writer}
        return max(spent, key=lambda party: spent[party])

    def __str__(self) -> str:
        return (
            f"{self.tiles} tiles in {self.chunks} chunks ({self.chunks_before} were there) in {self.seconds:.1f} s: "
            f"{self.tiles_per_s:.1f} tiles/s, {self.megapixels_per_s:.2f} MP/s on {self.device}, {self.precision}, "
            f"batches of {self.batch_size}; network {self.seconds_network:.1f} s, waiting for readers "
            f"{self.seconds_readers:.1f} s, for the writer {self.seconds_writer:.1f} s: "
            f"the bottleneck is the {self.bottleneck}"
        )


def make_maps(
    slide: "Slide",
    tissue: "TissueMask",
    model: tuple[nn.Module, ModelSpec, str],
    out: Path,
    config: Config,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    compiled: bool = False,
    readers: int | None = None,
    networks: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    on_chunk: Callable[[int], None] | None = None,
) -> MapsSummary:
    """Run the network over the tissue of a slide and write its maps to `out`, a `MapStore`.

    What an earlier run finished is kept; a finished store of the same settings is left as it is.

    Parameters
    ----------
    model : (network, spec, sha256 of the weights)
        The network stays as it is: what runs is `prepare_for_inference` of it.
    batch_size, readers, networks : int or None
        Tiles a batch, reading threads, and batches in the network at a time; None chooses by the device. Out of memory
        on CUDA the batch is halved.
    memory : int, optional
        Bytes that this process may hold: all three are chosen to fit. A `batch_size` that was given stays.
    compiled : bool
        See `prepare_for_inference`. The results may differ in the last bits.
    on_chunk : function or None
        Called on the writer's thread with the index of every chunk once it can be read with
        ``MapStore.open(out, unfinished=True)``, first for those of an earlier run. What it raises stops the run; while
        it works nothing is written. Not called if the store is already finished.

    Raises
    ------
    WsipipeError
        If a setting, the slide, the model or the existing store do not allow it. Whatever is raised, the chunks
        committed so far stay, and the same call goes on from there.
    """
    network, spec, sha256 = model
    chosen = choose_device(device)
    arithmetic = choose_precision(precision, chosen)
    geometry = tile_geometry(spec, config.maps)
    if memory is not None:
        demand = budget.of_maps(
            model, config.maps, device=device, precision=precision, batch_size=batch_size, compiled=compiled
        )
        fitting = budget.fit(memory, slide, demand)
        batch_size, readers, networks = fitting.batch_size, fitting.readers, fitting.networks
    readers = choose_readers(chosen) if readers is None else readers
    batch_size = choose_batch_size(chosen, geometry.tile_px, arithmetic) if batch_size is None else batch_size
    if readers < 1 or batch_size < 1:
        raise ConfigError(f"{readers} readers and batches of {batch_size} tiles do nothing; give at least 1")
    meta = StoreMeta(
        slide=slide.name,
        fingerprint=slide.fingerprint,
        grid=slide.grid(spec.mpp),
        geometry=geometry,
        spec=spec,
        weights_sha256=sha256,
        precision=arithmetic,
        tissue_grid=tissue.grid,
        tissue_settings={
            **config.tissue.model_dump(mode="json"),
            "region": None if tissue.region is None else tissue.region.wkt,
        },
        config_hash=config_hash(config.tissue, config.maps),
    )
    plan = _Plan(meta, lambda core: tissue.meets(core, meta.grid))
    wanted = plan.wanted()
    with MapStore.resume_or_create(
        out, meta, wanted, tissue.mask, any_precision=precision == "auto", overwrite=overwrite
    ) as store:
        before = frozenset(store.committed)
        todo = sum(tiles for index, tiles in wanted.items() if index not in before)
        log.info(
            "%s: %d of %d tiles to do at %.4g µm/px with %s on %s",
            slide.name, todo, sum(wanted.values()), meta.grid.mpp, spec.name, describe(chosen, arithmetic),
        )  # fmt: skip
        started = time.monotonic()
        spent = _Spent()
        if not store.is_finished:
            _check_space(out, todo * geometry.core_px**2)
            run = _Run(
                slide, store, _Network(network, meta, chosen, batch_size, compiled=compiled), before, spent, on_chunk
            )
            threads = network_threads(chosen)
            networks = choose_networks(threads) if networks is None else min(networks, threads)
            with Progress(todo, "tiles", f"maps of {slide.name}", shown=progress) as bar:
                run.all(plan.batches(batch_size, before), readers, networks, threads, bar)
            store.finish()
        seconds = time.monotonic() - started
        summary = MapsSummary(
            tiles=todo,
            chunks=len(wanted) - len(before),
            chunks_before=len(before),
            megapixels=spent.pixels / 1e6,
            seconds=seconds,
            seconds_readers=spent.readers,
            seconds_network=max(0.0, seconds - spent.readers - spent.writer),
            seconds_writer=spent.writer,
            device=str(chosen),
            precision=store.meta.precision,
            batch_size=batch_size,
            unread_px0=tuple(store.unread),
        )
    log.info("%s: %s", slide.name, summary)
    if summary.unread_px0:
        log.warning("%s: %d places could not be read and are white in the maps", slide.name, len(summary.unread_px0))
    if todo or not record_of(out).exists():
        write_record(
            out,
            slide=slide.path,
            config=config.model_dump(mode="json", include={"tissue", "maps"}),
            model={"name": spec.name, "weights_sha256": sha256},
            **asdict(summary),
        )
    return summary


@dataclass(slots=True)
class _Spent:
    """Seconds the network's thread waited, and pixels stored."""

    readers: float = 0.0
    writer: float = 0.0
    pixels: int = 0


@dataclass(frozen=True, slots=True)
class _Item:
    """A tile and the chunk it is stored in."""

    tile: Tile
    chunk: int
    chunk_tiles: int  # with tissue: that many make it complete


@dataclass(frozen=True, slots=True)
class _Plan:
    """All tiles with tissue in the order of work: chunk by chunk, generated anew each time."""

    meta: StoreMeta
    meets: Callable[[Box], bool]

    def wanted(self) -> dict[int, int]:
        chunks = chunk_grid(self.meta.grid.box, self.meta.geometry, self.meets)
        return {self.meta.chunk_indices(box)[0]: len(tiles) for box, tiles in chunks}

    def batches(self, size: int, done: frozenset[int]) -> Iterator[list[_Item]]:
        """Batches of all tiles, but for those batches that add nothing to what is `done`."""
        items = (
            _Item(tile, self.meta.chunk_indices(box)[0], len(tiles))
            for box, tiles in chunk_grid(self.meta.grid.box, self.meta.geometry, self.meets)
            for tile in tiles
        )
        while batch := list(islice(items, size)):
            if any(item.chunk not in done for item in batch):
                yield batch


class _Network:
    """The network on its device: takes a batch, gives its maps, which on CUDA are still on their way."""

    def __init__(
        self, network: nn.Module, meta: StoreMeta, device: torch.device, batch_size: int, *, compiled: bool
    ) -> None:
        self.device = device
        self._meta = meta
        self._size = batch_size
        self._dtype = torch_dtype(meta.precision)
        self._network = prepare_for_inference(network, device, self._dtype, compiled=compiled)

    def __call__(self, batch: torch.Tensor) -> "_Answer":
        while True:
            try:
                maps = [self._maps(part) for part in torch.split(batch, self._size)]
                on_cuda = self.device.type == "cuda"
                return _Answer(maps, torch.cuda.current_stream(self.device).record_event() if on_cuda else None)
            except torch.OutOfMemoryError as error:
                if self._size == 1:
                    raise ConfigError(
                        f"{self.device} has too little memory for one tile of {self._meta.geometry.tile_px} px; "
                        "take smaller tiles, another model or another --device"
                    ) from error
            self._size = max(1, min(self._size, len(batch)) // 2)
            log.warning("%s is out of memory; going on with batches of %d tiles", self.device, self._size)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def _maps(self, batch: torch.Tensor) -> NetworkMaps:
        spec, geometry = self._meta.spec, self._meta.geometry
        pixels = to_input(batch, spec.mean, spec.std, device=self.device, dtype=self._dtype)
        cut_px = geometry.halo_px - spec.margin_px
        maps = maps_of(spec.answer, self._network(pixels), cut_px, max(1, len(spec.class_names)))
        got = (*maps.nuclei.shape[1:], maps.types.shape[1])
        if got != (geometry.core_px, geometry.core_px, max(1, len(spec.class_names))):
            raise ModelError(
                f"model '{spec.name}' answered a tile of {geometry.tile_px} px with maps of {got[0]} x {got[1]} px "
                f"and {got[2]} types, where its description promises {geometry.core_px} px without the halo and "
                f"{len(spec.class_names)} types; its description and its weights do not belong together"
            )
        return NetworkMaps(*(values.to("cpu", non_blocking=self.device.type == "cuda") for values in maps))


@dataclass(frozen=True, slots=True)
class _Answer:
    """Maps of a batch in parts; they hold once the event, if any, has happened."""

    parts: list[NetworkMaps]
    event: torch.cuda.Event | None

    def arrays(self) -> list[npt.NDArray[np.generic]]:
        """NP, HV, NC and whether they are numbers, each stacked over the batch."""
        if self.event is not None:
            self.event.synchronize()
        return [torch.cat(values).numpy() for values in zip(*self.parts, strict=True)]


class _Run:
    """One pass over the batches that are left."""

    def __init__(
        self,
        slide: "Slide",
        store: MapStore,
        network: _Network,
        before: frozenset[int],
        spent: _Spent,
        on_chunk: Callable[[int], None] | None,
    ) -> None:
        self._slide, self._store, self._network = slide, store, network
        self._before, self._spent, self._on_chunk = before, spent, on_chunk
        self._grid, self._geometry = store.meta.grid, store.meta.geometry
        self._open: tuple[int, Maps] | None = None  # the chunk under way; the writer's thread alone touches it
        self._placed = 0

    def all(
        self, batches: Iterable[list[_Item]], readers: int, networks: int, threads: int, progress: Progress
    ) -> None:
        threads_elsewhere = torch.get_num_threads()
        reading = ThreadPoolExecutor(readers, "reader")
        computing = ThreadPoolExecutor(networks, "network", torch.set_num_threads, (threads // networks,))
        writing = ThreadPoolExecutor(1, "writer")
        writes: deque[Future[None]] = deque([writing.submit(self._announce, sorted(self._before))])
        answers: deque[tuple[list[_Item], Future[_Answer]]] = deque()

        def compute(items: list[_Item], buffer: torch.Tensor) -> _Answer:
            with _told("running the network", items, self._grid):
                return self._network(buffer)

        def take() -> None:
            items, answer = answers[0][0], answers[0][1].result()
            with _told("running the network", items, self._grid):
                *maps, finite = answer.arrays()
            if not finite.all():
                raise ModelError(
                    f"the network gave no number at {_place([items[int(finite.argmin())]], self._grid)} "
                    f"with {self._store.meta.precision}; try --precision fp32"
                )
            writes.append(writing.submit(self._add, items, maps))
            answers.popleft()
            with _timed(self._spent, "writer"):
                while writes and (writes[0].done() or len(writes) > WRITES_AHEAD):
                    writes.popleft().result()
            progress.advance(sum(item.chunk not in self._before for item in items))

        try:
            for items, buffer, reads in self._ahead(batches, reading, readers + 1):
                with _timed(self._spent, "readers"):
                    for read in reads:
                        read.result()
                answers.append((items, computing.submit(compute, items, buffer)))
                # One waits, so that no core does; CUDA works on a batch while the one before is handed over.
                while len(answers) > networks:
                    take()
            while answers:
                take()
            with _timed(self._spent, "writer"):
                while writes:
                    writes.popleft().result()
        finally:  # also if interrupted: what is being read is dropped, what has been computed is written
            reading.shutdown(cancel_futures=True)
            computing.shutdown(cancel_futures=True)
            torch.set_num_threads(threads_elsewhere)  # what new threads start with
            with suppress(Exception):  # one that is on its way already says more
                while answers and not answers[0][1].cancelled() and answers[0][1].exception() is None:
                    take()
            writing.shutdown()

    def _ahead(
        self, batches: Iterable[list[_Item]], reading: ThreadPoolExecutor, ahead: int
    ) -> Iterator[tuple[list[_Item], torch.Tensor, list[Future[None]]]]:
        """Batches whose pixels are being read, a bounded number in advance."""
        queue: deque[tuple[list[_Item], torch.Tensor, list[Future[None]]]] = deque()
        side = self._geometry.tile_px
        for items in batches:
            pinned = self._network.device.type == "cuda"
            buffer = torch.empty((len(items), side, side, 3), dtype=torch.uint8, pin_memory=pinned)
            start, reads = 0, []
            for _, group in groupby(items, key=lambda item: item.chunk):
                some = list(group)
                reads.append(reading.submit(self._read, some, buffer[start : start + len(some)].numpy()))
                start += len(some)
            queue.append((items, buffer, reads))
            if len(queue) > ahead:
                yield queue.popleft()
        yield from queue

    def _read(self, items: list[_Item], into: npt.NDArray[np.uint8]) -> None:
        """Pixels of tiles of one chunk: by one read where that is fewer pixels, as it mostly is (tiles overlap)."""
        boxes = [item.tile.read for item in items]
        around = Box(
            min(box.x0 for box in boxes),
            min(box.y0 for box in boxes),
            max(box.x1 for box in boxes),
            max(box.y1 for box in boxes),
        )
        with _told("reading", items, self._grid):
            if around.width * around.height <= sum(box.width * box.height for box in boxes):
                pixels = self._slide.read(around, self._grid)
                for box, tile in zip(boxes, into, strict=True):
                    tile[:] = pixels[box.within(around).slices]
            else:
                for box, tile in zip(boxes, into, strict=True):
                    tile[:] = self._slide.read(box, self._grid)

    def _announce(self, indices: Iterable[int]) -> None:
        for index in indices if self._on_chunk else ():
            self._on_chunk(index)  # type: ignore[misc]

    def _add(self, items: list[_Item], maps: list[npt.NDArray[np.generic]]) -> None:
        """Put tiles into their chunks; commit each chunk that has all its tiles."""
        for item, nuclei, offsets, types in zip(items, *maps, strict=True):
            if item.chunk in self._before:  # it only stands in the batch so that the batch is the same as ever
                continue
            box, core = self._store.meta.chunk_box(item.chunk), item.tile.core
            if self._open is None or self._open[0] != item.chunk:
                self._open, self._placed = (item.chunk, _blank(box, len(types))), 0
            chunk = self._open[1]
            place = (..., *core.within(box).slices)
            for stored, values in ((chunk.nuclei, nuclei), (chunk.offsets, offsets), (chunk.types, types)):
                stored[place] = values[..., : core.height, : core.width]
            self._placed += 1
            self._spent.pixels += core.width * core.height
            if self._placed == item.chunk_tiles:
                with _told("writing", [item], self._grid):
                    self._store.write_chunk(item.chunk, chunk, self._unread(box))
                    self._announce([item.chunk])
                self._open = None

    def _unread(self, chunk: Box) -> list[Box]:
        """Places that could not be read for the tiles of a chunk."""
        seen = chunk.grown(self._geometry.halo_px + self._geometry.core_px)
        low, high = self._grid.to_px0([(seen.x0, seen.y0), (seen.x1, seen.y1)])
        around = Box(math.floor(low[0]), math.floor(low[1]), math.ceil(high[0]), math.ceil(high[1]))
        return [box for box in self._slide.unread if not box.clipped(around).is_empty]


def _blank(box: Box, types: int) -> Maps:
    return Maps(
        np.zeros(box.shape, np.uint8), np.zeros((2, *box.shape), np.int8), np.zeros((types, *box.shape), np.uint8)
    )


def _check_space(out: Path, pixels: int) -> None:
    free, needed = shutil.disk_usage(out.parent).free, pixels * FREE_BYTES_PER_PX
    if free < needed:
        raise StoreError(
            f"{out.parent} has {free / 1e9:.1f} GB free, the maps take at least {needed / 1e9:.1f} GB; "
            "make room or give another path"
        )


def _place(items: list[_Item], grid: Grid) -> str:
    """Where a tile is, or where several begin, as people find it in a viewer."""
    core = items[0].tile.core
    x, y = grid.to_px0((core.x0, core.y0)).round().astype(int)
    return f"the tile at x {x}, y {y} px of level 0" + (f" or the {len(items) - 1} after it" if len(items) > 1 else "")


@contextmanager
def _told(doing: str, items: list[_Item], grid: Grid) -> Iterator[None]:
    """Say of every error at which tile it came."""
    try:
        yield
    except WsipipeError as error:
        raise type(error)(f"{error} ({doing}: {_place(items, grid)})") from error
    except Exception as error:
        error.add_note(f"{doing}: {_place(items, grid)}")
        raise


@contextmanager
def _timed(spent: _Spent, party: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        setattr(spent, party, getattr(spent, party) + time.monotonic() - started)
