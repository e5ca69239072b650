"""Run the network over the tissue of a slide and store its NP, HV and NC maps."""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
)
from wsipipe.errors import ConfigError, SettingsError, StoreError
from wsipipe.folder import drop_record, record_of, write_record
from wsipipe.geometry import Box
from wsipipe.model.spec import ModelSpec, tile_geometry
from wsipipe.progress import Progress
from wsipipe.provenance import StoreMeta
from wsipipe.stages import budget
from wsipipe.stages.network import RunningNetwork
from wsipipe.stages.pipeline import Pipeline, Plan, Spent
from wsipipe.store import MapStore

if TYPE_CHECKING:
    from wsipipe.slide import Slide
    from wsipipe.tissue import TissueMask

log = logging.getLogger(__name__)

FREE_BYTES_PER_PX = 0.5  # crowded tissue takes 3.4, quiet tissue a part of it: with less a run cannot end well


@dataclass(frozen=True, slots=True)
class MapsSummary:
    """What a run did and where its time went; seconds are those that it waited for each party."""

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
    plan = Plan(meta, lambda core: tissue.reaches(core, meta.grid))
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
        if store.unread and not slide.skips_unread:
            raise SettingsError(
                f"{out} is white where the slide could not be read, as --skip-bad-tiles lets it be; keep it with that, "
                "or start afresh with --overwrite"
            )
        started = time.monotonic()
        spent = Spent()
        if not store.is_finished:
            _check_space(out, todo * geometry.core_px**2)
            run = Pipeline(
                slide,
                store,
                RunningNetwork(network, meta, chosen, batch_size, compiled=compiled),
                before,
                spent,
                on_chunk,
            )
            threads = network_threads(chosen)
            networks = choose_networks(threads) if networks is None else min(networks, threads)
            with Progress(todo, "tiles", f"maps of {slide.name}", shown=progress) as bar:
                run.all(plan.batches(batch_size, before), readers, networks, threads, bar)
            drop_record(out)
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


def _check_space(out: Path, pixels: int) -> None:
    free, needed = shutil.disk_usage(out.parent).free, pixels * FREE_BYTES_PER_PX
    if free < needed:
        raise StoreError(
            f"{out.parent} has {free / 1e9:.1f} GB free, the maps take at least {needed / 1e9:.1f} GB; "
            "make room or give another path"
        )
