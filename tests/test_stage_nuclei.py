"""From finished maps to the table: the same bytes however the slide is cut and whoever works on it, and what fails."""

import concurrent.futures
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask.distributed import LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_maps import SCENES, TYPES, crowd, maps_of
from PIL import Image

from wsipipe.config import NucleiConfig
from wsipipe.errors import ConfigError, StoreError
from wsipipe.geometry import Box
from wsipipe.maps import Maps
from wsipipe.model.spec import ModelSpec
from wsipipe.provenance import StoreMeta
from wsipipe.slide import open_slide
from wsipipe.stages import nuclei as stage
from wsipipe.stages import workers as crew
from wsipipe.stages.nuclei import make_nuclei
from wsipipe.stages.workers import hired
from wsipipe.store import MapStore
from wsipipe.table import NucleiSpool, read_nuclei
from wsipipe.tiles import TileGeometry

CONFIG = NucleiConfig()
TILE = 64
SPEC = ModelSpec(
    name="drawn",
    architecture="oracle",
    settings={},
    mpp=0.25,
    tile_px=256,
    halo_px=32,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    class_names=TYPES,
    class_colours=((0, 0, 0), (220, 40, 40), (30, 160, 60), (40, 90, 220)),
    source="drawn",
    licence="Apache-2.0",
)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class Made:
    """A slide of maps that were drawn, and its nuclei in blocks of any size."""

    def __init__(self, folder: Path, maps: Maps) -> None:
        self.folder, self.maps = folder, maps
        self.picture = folder / "slide.png"
        noise = np.random.default_rng(0).integers(60, 250, (*maps.nuclei.shape, 3), np.uint8)
        Image.fromarray(noise).save(self.picture, compress_level=1)

    def store(self, side: int, tile: int = TILE) -> Path:
        """maps.zarr in chunks of `side` px, which are whole tiles."""
        path = self.folder / f"{side}.zarr"
        if path.exists():
            return path
        with open_slide(self.picture, 0.25) as slide:
            grid = slide.grid(0.25)
            meta = StoreMeta(
                slide=slide.name,
                fingerprint=slide.fingerprint,
                grid=grid,
                geometry=TileGeometry(tile, 0, side // tile),
                spec=SPEC,
                weights_sha256="ab" * 32,
                precision="fp32",
                tissue_grid=grid,
                tissue_settings={},
                config_hash="",
            )
        chunks = meta.chunk_indices(grid.box)
        with MapStore.resume_or_create(path, meta, dict.fromkeys(chunks, 1), np.ones(grid.box.shape, bool)) as store:
            for index in chunks:
                part = (..., *meta.chunk_box(index).slices)
                store.write_chunk(index, Maps(self.maps.nuclei[part], self.maps.offsets[part], self.maps.types[part]))
            store.finish()
        return path

    def table(self, side: int, tile: int = TILE, **options: Any) -> bytes:
        """What the stage writes."""
        out = self.folder / "nuclei.parquet"
        with open_slide(self.picture, 0.25) as slide:
            make_nuclei(slide, self.store(side, tile), out, CONFIG, overwrite=True, **options)
        return out.read_bytes()


WHOLE = 1024


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All scenes side by side: crowds, chains along seams, nuclei on corners, at the edge, as wide as the halo."""
    labels, first = [], 0
    for scene in ("crowded", "chain_along_seams", "on_corners", "at_the_edge"):
        found = SCENES[scene]()[:420, :480]
        labels.append(np.where(found > 0, found + first, 0))
        first += found.max()
    whole = np.vstack([np.hstack(labels[:2]), np.hstack(labels[2:])]).astype(np.int32)
    return Made(tmp_path_factory.mktemp("made"), maps_of(whole, 0.1))


# -- the same bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("side", [192, 320, WHOLE])
def test_neither_blocks_nor_threads_change_a_byte_of_the_table(made: Made, side: int, workers: int) -> None:
    assert made.table(side, workers=workers) == made.table(WHOLE, workers=1)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(3, 8), st.integers(1, 4), st.sampled_from([0.0, 0.2]))
def test_whatever_the_nuclei_the_cut_is_not_to_be_seen(
    tmp_path_factory: pytest.TempPathFactory, seed: int, tiles: int, workers: int, noise: float
) -> None:
    maps = maps_of(crowd((450, 500), 26, seed), noise, seed)
    made = Made(tmp_path_factory.mktemp("random"), maps)
    assert made.table(tiles * TILE, workers=workers) == made.table(WHOLE)


def test_processes_give_the_table_of_threads(made: Made) -> None:
    assert made.table(192, scheduler="processes", workers=2) == made.table(WHOLE)


def test_blocks_may_finish_in_any_order(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    real, another_is_stored = stage.find_nuclei, threading.Event()

    def late(sources: stage.Sources, core: Box, config: NucleiConfig) -> Any:
        if core.y0 == core.x0 == 0:
            assert another_is_stored.wait(60)
        return real(sources, core, config)

    stored: list[int] = []
    real_add = NucleiSpool.add

    def add(spool: NucleiSpool, block: int, *rest: Any) -> None:
        stored.append(block)
        real_add(spool, block, *rest)
        another_is_stored.set()

    monkeypatch.setattr(stage, "find_nuclei", late)
    monkeypatch.setattr(NucleiSpool, "add", add)
    table = made.table(192, workers=2)
    assert stored[0] != 0
    monkeypatch.undo()
    assert table == made.table(WHOLE)


def test_the_record_tells_of_seams_and_of_nuclei_wider_than_the_halo(made: Made) -> None:
    made.table(192)
    record = json.loads((made.folder / "nuclei.parquet.json").read_text())
    seams = record["seams"]
    assert set(seams) == {
        "near_um", "seam_mm", "near", "elsewhere", "near_mm2", "elsewhere_mm2", "density_ratio", "density_ratio_sd",
        "straight", "straight_elsewhere", "crossing", "overlaps", "seams", "spread", "shows",
    }  # fmt: skip
    assert seams["seam_mm"] == pytest.approx((14 * 840 + 13 * 960) * 0.25 / 1000)
    assert seams["crossing"] > 200
    assert seams["overlaps"] == 0
    assert record["qc"]["wide"] == 0
    assert record["qc"]["nuclei"] == read_nuclei(made.folder / "nuclei.parquet")[0].count


def test_nuclei_that_the_network_cuts_where_its_tiles_meet_show(tmp_path: Path) -> None:
    """Tiles lie in one block, four by four: the seams of blocks alone would tell nothing."""
    whole, other = (maps_of(crowd((1000, 1000), 27, seed)) for seed in (3, 4))
    first = np.add.outer(np.arange(1000) // 256, np.arange(1000) // 256) % 2 == 0
    cut = Maps(
        np.where(first, whole.nuclei, other.nuclei),
        np.where(first, whole.offsets, other.offsets),
        np.where(first, whole.types, other.types),
    )
    told = []
    for name, maps in (("whole", whole), ("cut", cut)):
        (tmp_path / name).mkdir()
        drawn = Made(tmp_path / name, maps)
        drawn.table(WHOLE, tile=256)
        told.append(json.loads((drawn.folder / "nuclei.parquet.json").read_text())["seams"])
    assert [seams["shows"] for seams in told] == [False, True]
    assert told[1]["straight"] > 20 * (1 + told[1]["straight_elsewhere"])


# -- a cluster ----------------------------------------------------------------------------------------------------


@contextmanager
def cluster(**options: Any) -> Iterator[LocalCluster]:
    with LocalCluster(threads_per_worker=1, dashboard_address=None, silence_logs=50, **options) as running:
        yield running


@pytest.fixture
def after_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Have something happen once so many blocks are stored."""

    def at(count: int, happen: Callable[[], None]) -> None:
        add, stored = NucleiSpool.add, []

        def watched(spool: NucleiSpool, block: int, *rest: Any) -> None:
            add(spool, block, *rest)
            stored.append(block)
            if len(stored) == count:
                happen()

        monkeypatch.setattr(NucleiSpool, "add", watched)

    return at


def test_a_worker_killed_on_the_way_costs_nothing_but_time(
    made: Made, after_blocks: Callable[[int, Callable[[], None]], None]
) -> None:
    killed: list[int] = []
    with cluster(n_workers=2) as running:
        scheduler = running.scheduler

        def kill() -> None:
            # the one that has most blocks in hand, so that these are lost with it
            busy = max(running.workers.values(), key=lambda worker: _in_hand(scheduler, worker))
            killed.append(busy.pid)
            os.kill(busy.pid, signal.SIGKILL)

        after_blocks(2, kill)
        table = made.table(192, scheduler=running.scheduler_address)
    assert len(killed) == 1
    assert table == made.table(WHOLE)


def _in_hand(scheduler: Any, worker: Any) -> int:
    state = scheduler.workers.get(worker.worker_address)
    return 0 if state is None else len(state.processing)


def test_a_cluster_without_workers_is_given_up_with_the_remedy(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "PATIENCE_S", 1.0)
    monkeypatch.setattr(crew, "ANSWER_S", 5.0)
    with (
        cluster(n_workers=0) as running,
        pytest.raises(StoreError, match="has had no worker for 1 s; start workers and"),
    ):
        made.table(192, scheduler=running.scheduler_address)


def test_a_scheduler_that_goes_away_is_told_and_the_next_run_goes_on(
    made: Made, after_blocks: Callable[[int, Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "ANSWER_S", 10.0)
    (made.folder / "nuclei.parquet").unlink(missing_ok=True)
    with cluster(n_workers=1) as running:
        after_blocks(3, partial(running.close, timeout=60))
        with pytest.raises(StoreError, match="is gone; start it and run the same command again"):
            made.table(192, scheduler=running.scheduler_address)
    assert len(list((made.folder / "nuclei.parquet.partial").glob("*.arrow"))) >= 3
    monkeypatch.undo()
    with open_slide(made.picture, 0.25) as slide:
        make_nuclei(slide, made.store(192), made.folder / "nuclei.parquet", CONFIG)
    assert (made.folder / "nuclei.parquet").read_bytes() == made.table(WHOLE)


# -- workers ------------------------------------------------------------------------------------------------------


def _half(value: int) -> float:
    if value == 13:
        raise StoreError("it lacks its chunk; make it again")
    return 1 / (value - 14) if value > 13 else value / 2


def test_a_scheduler_that_is_lost_while_one_waits_for_it_is_told() -> None:
    """As `distributed` does where the connection ends in the middle of a wait, or between a wait and its result."""
    from distributed.client import FuturesCancelledError

    class Lost(concurrent.futures.Future[int]):
        def result(self, timeout: float | None = None) -> int:
            raise FuturesCancelledError([])

    class LostPool:
        name = "tcp://10.0.0.1:8786"

        def parallel(self) -> int:
            return 1

        def submit(self, *_: Any) -> Lost:
            return Lost()

        def first_done(self, futures: list[Lost]) -> list[Lost]:
            return futures

        def cancel(self, futures: list[Lost]) -> None:
            assert futures

    with pytest.raises(StoreError, match=r"the Dask scheduler at tcp://10\.0\.0\.1:8786 is gone; start it and run"):
        list(crew.Workers(LostPool()).results(_half, [(0, (2,)), (1, (4,))]))


def _die(value: int) -> int:
    if value == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def test_only_few_blocks_are_under_way_however_many_there_are() -> None:
    taken: list[int] = []

    def calls() -> Iterator[tuple[int, tuple[int]]]:
        for i in range(100):
            taken.append(i)
            yield i, (i % 10,)

    most = 0
    with hired("threads", 3) as workers:
        for done, (block, half) in enumerate(workers.results(_half, calls())):
            assert half == block % 10 / 2
            most = max(most, len(taken) - done)
    assert len(taken) == 100
    assert most <= 3 * crew.AHEAD + 1


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_an_error_names_its_block_and_keeps_its_kind(scheduler: str) -> None:
    with hired(scheduler, 2) as workers:
        with pytest.raises(StoreError, match="block 7: it lacks its chunk; make it again"):
            list(workers.results(_half, [(6, (1,)), (7, (13,)), (8, (2,))]))
        with pytest.raises(ZeroDivisionError) as raised:
            list(workers.results(_half, [(5, (14,))]))
        assert raised.value.__notes__ == ["in block 5"]
        assert dict(workers.results(_half, [(1, (4,))])) == {1: 2}  # and they are fit for more


def test_a_block_that_kills_its_workers_is_given_up_and_named() -> None:
    with hired("processes", 1) as workers, pytest.raises(StoreError, match=r"block 3 was given up.*fewer --workers"):
        list(workers.results(_die, [(i, (i,)) for i in range(5)]))


@pytest.mark.parametrize(
    ("scheduler", "workers"),
    [
        ("threads", 0),
        ("mpi", None),
        ("tcp://127.0.0.1:1", None),
        ("tcp://localhost", None),
        ("http://localhost:1", None),
    ],
)
def test_workers_that_cannot_be_had_are_refused(
    scheduler: str, workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "ANSWER_S", 1)
    with pytest.raises(ConfigError, match=r"give at least 1|none of threads|no Dask scheduler answers"):
        hired(scheduler, workers).__enter__()


def test_a_worker_of_another_version_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(made.picture, 0.25) as slide, MapStore.open(made.store(192)) as store:
        make, arguments = stage.Sources(slide, store).__reduce__()
        assert make(*arguments).store.meta == store.meta
        with pytest.raises(ConfigError, match="install the same everywhere"):
            make("0.0.1", *arguments[1:])
