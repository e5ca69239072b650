"""Maps of all tiles that nuclei on tissue reach, from the slide into the store.

Three parties, each waiting only for the one before it: reader threads fill batches ahead of need, the network takes
them, one writer thread puts tiles together to chunks and commits them. On a CPU the network takes a batch on each core
rather than all cores for one: a layer shared by cores waits for the slowest of them, which readers, writer and
watershed keep interrupting. Answers are taken in the order of the batches.

Batches are cut from the list of all wanted tiles, finished or not: a run that goes on after a kill sees the batches
that an undisturbed run sees. The size of a batch (not the place in it) shows in the last bits of an answer, 1e-7 on a
CPU for one tile against several: so this is what makes both runs equal.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from wsipipe.errors import ModelError, WsipipeError
from wsipipe.geometry import Box, Grid
from wsipipe.maps import Maps
from wsipipe.memory import WRITES_AHEAD
from wsipipe.progress import Progress
from wsipipe.provenance import StoreMeta
from wsipipe.stages.network import Answer, RunningNetwork
from wsipipe.store import MapStore
from wsipipe.tiles import Tile, chunk_grid

if TYPE_CHECKING:
    from wsipipe.slide import Slide


@dataclass(slots=True)
class Spent:
    """Seconds that were spent waiting for readers and for the writer, and pixels stored."""

    readers: float = 0.0
    writer: float = 0.0
    pixels: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """A tile and the chunk it is stored in."""

    tile: Tile
    chunk: int
    chunk_tiles: int  # of all that are made: that many make it complete


@dataclass(frozen=True, slots=True)
class Plan:
    """All tiles that nuclei on tissue reach, in the order of work: chunk by chunk, generated anew each time."""

    meta: StoreMeta
    meets: Callable[[Box], bool]

    def wanted(self) -> dict[int, int]:
        chunks = chunk_grid(self.meta.grid.box, self.meta.geometry, self.meets)
        return {self.meta.chunk_indices(box)[0]: len(tiles) for box, tiles in chunks}

    def batches(self, size: int, done: frozenset[int]) -> Iterator[list[Item]]:
        """Batches of all tiles, but for those batches that add nothing to what is `done`."""
        items = (
            Item(tile, self.meta.chunk_indices(box)[0], len(tiles))
            for box, tiles in chunk_grid(self.meta.grid.box, self.meta.geometry, self.meets)
            for tile in tiles
        )
        while batch := list(islice(items, size)):
            if any(item.chunk not in done for item in batch):
                yield batch


class Pipeline:
    """One pass over the batches that are left."""

    def __init__(
        self,
        slide: "Slide",
        store: MapStore,
        network: RunningNetwork,
        before: frozenset[int],
        spent: Spent,
        on_chunk: Callable[[int], None] | None,
    ) -> None:
        self._slide, self._store, self._network = slide, store, network
        self._before, self._spent, self._on_chunk = before, spent, on_chunk
        self._grid, self._geometry = store.meta.grid, store.meta.geometry
        self._open: tuple[int, Maps] | None = None  # the chunk under way; the writer's thread alone touches it
        self._placed = 0
        self._failed = False  # to write a chunk, or still at it

    def all(self, batches: Iterable[list[Item]], readers: int, networks: int, threads: int, progress: Progress) -> None:
        """Read, compute and store all batches: `readers` threads, `networks` batches at once that share `threads`.

        Whatever is raised, what has been computed in the order of the batches is stored first.
        """
        threads_elsewhere = torch.get_num_threads()
        reading = ThreadPoolExecutor(readers, "reader")
        computing = ThreadPoolExecutor(networks, "network", torch.set_num_threads, (threads // networks,))
        writing = ThreadPoolExecutor(1, "writer")
        writes: deque[Future[None]] = deque([writing.submit(self._announce, sorted(self._before))])
        answers: deque[tuple[list[Item], Future[Answer]]] = deque()

        def compute(items: list[Item], buffer: torch.Tensor) -> Answer:
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
            answers.popleft()  # before it is handed over: an interruption in between must not have it counted twice
            writes.append(writing.submit(self._add, items, maps))
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
        self, batches: Iterable[list[Item]], reading: ThreadPoolExecutor, ahead: int
    ) -> Iterator[tuple[list[Item], torch.Tensor, list[Future[None]]]]:
        """Batches whose pixels are being read, a bounded number in advance."""
        queue: deque[tuple[list[Item], torch.Tensor, list[Future[None]]]] = deque()
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

    def _read(self, items: list[Item], into: npt.NDArray[np.uint8]) -> None:
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

    def _add(self, items: list[Item], maps: list[npt.NDArray[np.generic]]) -> None:
        """Put tiles into their chunks; commit each chunk that has all its tiles, in order, up to one that fails."""
        if self._failed:
            return
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
                    self._failed = True
                    self._store.write_chunk(item.chunk, chunk, self._unread(box))
                    self._failed = False
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


def _place(items: list[Item], grid: Grid) -> str:
    """Where a tile is, or where several begin, as people find it in a viewer."""
    core = items[0].tile.core
    x, y = grid.to_px0((core.x0, core.y0)).round().astype(int)
    return f"the tile at x {x}, y {y} px of level 0" + (f" or the {len(items) - 1} after it" if len(items) > 1 else "")


@contextmanager
def _told(doing: str, items: list[Item], grid: Grid) -> Iterator[None]:
    """Say of every error at which tile it came."""
    try:
        yield
    except WsipipeError as error:
        raise type(error)(f"{error} ({doing}: {_place(items, grid)})") from error
    except Exception as error:
        error.add_note(f"{doing}: {_place(items, grid)}")
        raise


@contextmanager
def _timed(spent: Spent, party: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        setattr(spent, party, getattr(spent, party) + time.monotonic() - started)
