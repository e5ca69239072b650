"""From a budget for memory to how much the stages do at once."""

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil

from wsipipe import memory
from wsipipe.config import MapsConfig
from wsipipe.device import (
    choose_batch_size,
    choose_device,
    choose_networks,
    choose_precision,
    choose_readers,
    network_threads,
    torch_dtype,
    usable_cpus,
)
from wsipipe.errors import ConfigError
from wsipipe.memory import Choice, Needs
from wsipipe.model.spec import ModelSpec, tile_geometry
from wsipipe.readers import TILE_CACHE_BYTES
from wsipipe.slide import Slide
from wsipipe.tiles import TileGeometry

if TYPE_CHECKING:  # where nuclei are found there may be no torch, and need be none
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a stage holds, and the most that it would do at once."""

    process: int  # bytes of the process at least, before it begins
    needs: Needs
    most: Choice
    batch_is_given: bool = False


def of_maps(
    model: "tuple[nn.Module, ModelSpec, str]",
    config: MapsConfig,
    *,
    device: str,
    precision: str,
    batch_size: int | None,
    compiled: bool,
) -> Demand:
    """Of running the network; its part is seen on a small tile. Arguments as for `make_maps`.

    Raises
    ------
    ConfigError
        If a setting does not allow it, or nobody knows what it takes.
    """
    from wsipipe.model.footprint import footprint

    if compiled:
        raise ConfigError("what --compile takes is not known, so --memory cannot be kept; leave out one of both")
    network, spec, _ = model
    chosen = choose_device(device)
    arithmetic = choose_precision(precision, chosen)
    geometry = tile_geometry(spec, config)
    seen = footprint(network, spec, geometry, chosen, torch_dtype(arithmetic))
    batch = choose_batch_size(chosen, geometry.tile_px, arithmetic) if batch_size is None else batch_size
    return Demand(
        memory.WITH_NETWORK,
        memory.maps_needs(geometry, max(1, len(spec.class_names)), seen.tile, seen.weights),
        Choice(batch, choose_networks(network_threads(chosen)), choose_readers(chosen)),
        batch_is_given=batch_size is not None,
    )


def of_nuclei(
    slide: Slide, geometry: TileGeometry, types: int, halo_px: int, scheduler: str, workers: int | None
) -> Demand:
    """Of finding nuclei, and of their files. Workers of a cluster are not counted: theirs is other machines' memory."""
    needs = memory.nuclei_needs(geometry, types, halo_px, slide.width_px0, processes=scheduler == "processes")
    if "://" in scheduler:
        return Demand(memory.WITHOUT_NETWORK, replace(needs, worker=0), Choice())
    return Demand(memory.WITHOUT_NETWORK, needs, Choice(workers=usable_cpus() if workers is None else workers))


def fit(budget: int, slide: Slide, *demands: Demand, at_first: int = 0) -> Choice:
    """How much stages that run together do at once, at most what they would; said in the log.

    `at_first` are bytes that are held before they begin, and not after.

    Raises
    ------
    ConfigError
        If the budget is too little for one of each.
    """
    there = memory.rounded_up(psutil.Process().memory_info().rss)
    here = max(there, *(demand.process for demand in demands))
    needs = Needs(here + max(memory.LATER, at_first) + TILE_CACHE_BYTES)
    most = Choice()
    for demand in demands:
        needs, most = needs + demand.needs, most + demand.most
    choice = memory.choose(budget, needs, most, batch_is_given=any(demand.batch_is_given for demand in demands))
    log.info("%s: --memory %s allows %s; without it %s", slide.name, memory.shown(budget), choice, most)
    return choice
