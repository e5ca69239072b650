"""All stages of one slide in one process: nuclei of finished regions are found while the network goes on."""

import logging
import os
import queue
import resource
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from torch import nn

from wsipipe.config import Config
from wsipipe.device import choose_device, require_precision
from wsipipe.folder import ResultFolder, write_record
from wsipipe.geojson import Form
from wsipipe.memory import MASK_PX
from wsipipe.model.spec import ModelSpec, tile_geometry
from wsipipe.seams import SeamFigures
from wsipipe.slide import Slide
from wsipipe.stages import budget
from wsipipe.stages.export import make_export
from wsipipe.stages.maps import MapsSummary, make_maps
from wsipipe.stages.nuclei import NucleiRun, NucleiSummary, remove_nuclei
from wsipipe.stages.report import make_report
from wsipipe.stages.tissue import find_tissue, is_written, write_tissue
from wsipipe.stages.workers import hired, require_scheduler
from wsipipe.store import MapStore
from wsipipe.table import NucleiMeta

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SegmentSummary:
    """What came out, and where the time went."""

    folder: ResultFolder
    geojson: tuple[Path, ...]
    nuclei: NucleiMeta
    tissue_mm2: float
    maps: MapsSummary
    seconds: dict[str, float]  # by stage; that of nuclei is what was left when the network was done
    peak_mb: float
    seams: SeamFigures


def segment(
    slide: Slide,
    model: tuple[nn.Module, ModelSpec, str],
    folder: ResultFolder,
    config: Config,
    *,
    roi: Path | None = None,
    everywhere: bool = False,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    compiled: bool = False,
    scheduler: str = "threads",
    workers: int | None = None,
    memory: int | None = None,
    form: Form = "outlines",
    overwrite: bool = False,
    progress: bool = False,
) -> SegmentSummary:
    """From a slide to all its files in `folder`: the same bytes as the stages one after another.

    Whatever an earlier run left is gone on with. Arguments are those of the stages; `memory` is for all of them.

    Raises
    ------
    WsipipeError
        If anything does not allow it; what is finished stays, and the same call goes on from there.
    """
    # Whatever costs nothing to check, before anything that takes time; `make_maps` and `hired` do it again.
    choose_device(device)
    require_precision(precision)
    tile_geometry(model[1], config.maps)
    require_scheduler(scheduler, workers)
    readers = networks = None
    if memory is not None:
        spec, mask = model[1], slide.grid(config.tissue.mpp)
        maps_demand = budget.of_maps(
            model, config.maps, device=device, precision=precision, batch_size=batch_size, compiled=compiled
        )
        nuclei_demand = budget.of_nuclei(
            slide, tile_geometry(spec, config.maps), len(spec.class_names), config.nuclei.halo_px, scheduler, workers
        )
        fitting = budget.fit(memory, slide, maps_demand, nuclei_demand, at_first=MASK_PX * mask.width * mask.height)
        batch_size, readers, workers = fitting.batch_size, fitting.readers, fitting.workers or None
        networks = fitting.networks
    with folder.claimed(slide, folder.tissue, folder.nuclei, folder.geojson, folder.report):
        clock, began = _Clock(), time.time()
        tissue = find_tissue(slide, config.tissue, roi=roi, everywhere=everywhere)
        unread = slide.unread
        log.info("%s: %.2f mm² of tissue", slide.name, tissue.area_mm2)
        clock.lap("tissue")
        if "://" in scheduler:  # before anything slow, and before anything is deleted: it may not be there
            with hired(scheduler, None):
                pass
        if overwrite:  # what is stopped later goes on without it
            MapStore.remove(folder.maps)
            remove_nuclei(folder.nuclei)
        with _NucleiBehind(slide, folder, config, scheduler, workers) as behind:
            maps = make_maps(
                slide,
                tissue,
                model,
                folder.maps,
                config,
                device=device,
                precision=precision,
                batch_size=batch_size,
                compiled=compiled,
                readers=readers,
                networks=networks,
                progress=progress,
                on_chunk=behind.chunk_is_there,
            )
            clock.lap("maps")
            # Not before: maps of other tissue are refused above, and then nothing may have changed.
            if not is_written(tissue, folder.tissue, slide, config.tissue):
                write_tissue(tissue, folder.tissue, slide, config.tissue, clock.laps["tissue"], unread)
                os.utime(folder.tissue, (began, began))  # who goes by times is not to find it newer than the maps
            nuclei = behind.finish()
        clock.lap("nuclei")
        export = make_export(slide, tissue, folder.nuclei, folder.geojson, folder.overlay, form=form)
        clock.lap("export")
        make_report(slide, folder, tissue, seconds=clock.laps)
        clock.lap("report")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    summary = SegmentSummary(folder, export.files, nuclei.meta, tissue.area_mm2, maps, clock.laps, peak, nuclei.seams)
    write_record(
        folder.path / "segment",
        slide=slide.path,
        config=config.model_dump(mode="json"),
        nuclei=nuclei.meta.counts,
        qc=nuclei.meta.qc,
        seams=nuclei.seams.to_json(),
        tissue_mm2=tissue.area_mm2,
        unread_px0=[asdict(box) for box in maps.unread_px0],
        seconds={stage: round(seconds, 3) for stage, seconds in clock.laps.items()},
        seconds_network=round(maps.seconds_network, 3),
        megapixels=round(maps.megapixels, 3),
        peak_mb=round(peak),
    )
    return summary


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.laps[stage] = now - self._last
        self._last = now


class _NucleiBehind:
    """A thread that finds the nuclei of every block as soon as the chunks it reads are there."""

    def __init__(
        self,
        slide: Slide,
        folder: ResultFolder,
        config: Config,
        scheduler: str,
        workers: int | None,
    ) -> None:
        self._arguments = (slide, folder.maps, folder.nuclei, config.nuclei)
        self._scheduler, self._workers = scheduler, workers
        self._chunks: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._given_up = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._run: NucleiRun | None = None

    def __enter__(self) -> "_NucleiBehind":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # blocks that were not begun wait for the next run
            self._given_up.set()
        self._stop()

    def chunk_is_there(self, index: int) -> None:
        """Tell of a chunk that was committed; raises what went wrong in the thread, so that the network stops."""
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._run = NucleiRun(*self._arguments)
            self._thread = threading.Thread(target=self._work, args=(self._run,), name="nuclei", daemon=True)
            self._thread.start()
        self._chunks.put(index)

    def finish(self) -> NucleiSummary:
        """Wait for the blocks that are left, and write the table."""
        self._stop()
        if self._error is not None:
            raise self._error
        run = self._run or NucleiRun(*self._arguments)
        if run.todo:
            with hired(self._scheduler, self._workers) as crew:
                deque(run.process(run.todo, crew), maxlen=0)
        return run.finish()

    def _stop(self) -> None:
        self._chunks.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self, run: NucleiRun) -> None:
        try:
            with hired(self._scheduler, self._workers) as crew:
                there: set[int] = set()
                waiting = {index: run.needs(index) for index in run.todo}
                while (index := self._chunks.get()) is not None and not self._given_up.is_set():
                    there.add(index)
                    ready = [block for block, needs in waiting.items() if needs <= there]
                    for block in run.process(takewhile(lambda _: not self._given_up.is_set(), ready), crew):
                        del waiting[block]
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for this thread
            self._error = error
