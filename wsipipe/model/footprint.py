"""What a network holds in memory while it works, seen on one small tile."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from wsipipe.maps import to_input
from wsipipe.model.answers import maps_of
from wsipipe.model.inference import prepare_for_inference
from wsipipe.model.spec import ModelSpec
from wsipipe.tiles import TileGeometry

SMALL_PX = 256  # what a network holds grows with the pixels; so many tell it, in a fraction of the time of a tile


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of main memory."""

    tile: int  # of the tensors that are there at once, for each tile of a batch
    weights: int  # of those that `prepare_for_inference` makes beside the network that it was given


def footprint(
    network: nn.Module, spec: ModelSpec, geometry: TileGeometry, device: torch.device, dtype: torch.dtype
) -> Footprint:
    """What `prepare_for_inference` of a network and its answer to a tile take.

    The network answers once on its device, which thereby loads all that it works with. CUDA has memory of its own, of
    which nothing is counted.
    """
    prepared = prepare_for_inference(network, device, dtype)
    step, offset = spec.tile_step
    side = min(geometry.tile_px, offset + step * -(-(SMALL_PX - offset) // step))
    batch = torch.zeros((1, side, side, 3), dtype=torch.uint8)
    with _Live(_tensors(prepared)) as live, torch.inference_mode():
        pixels = to_input(batch, spec.mean, spec.std, device=device, dtype=dtype)
        maps_of(spec.answer, prepared(pixels), 0, max(1, len(spec.class_names)))
    if device.type == "cuda":
        return Footprint(0, 0)
    known = {tensor.untyped_storage().data_ptr() for tensor in _tensors(network)}
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(prepared)}
    weights = sum(size for place, size in own.items() if place not in known)
    return Footprint(round(live.peak * (geometry.tile_px / side) ** 2), weights)


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


class _Live(TorchDispatchMode):
    """Bytes of the tensors that were made and are still there, those of before left out; `peak`: most at a time."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._there = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        made = function(*arguments, **(named or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place not in self._there:
            size = storage.nbytes()
            self._there.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._there.discard(place)
        self.now -= size
