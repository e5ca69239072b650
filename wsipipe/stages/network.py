"""The network at work on its device: batches of pixels in, maps out, in smaller parts where memory is short."""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wsipipe.device import torch_dtype
from wsipipe.errors import ConfigError, ModelError
from wsipipe.maps import NetworkMaps, to_input
from wsipipe.model.answers import maps_of
from wsipipe.model.inference import prepare_for_inference
from wsipipe.provenance import StoreMeta

log = logging.getLogger(__name__)


class RunningNetwork:
    """The network on its device: takes a batch, gives its maps, which on CUDA are still on their way."""

    def __init__(
        self, network: nn.Module, meta: StoreMeta, device: torch.device, batch_size: int, *, compiled: bool
    ) -> None:
        self.device = device
        self._meta = meta
        self._size = batch_size
        self._dtype = torch_dtype(meta.precision)
        self._network = prepare_for_inference(network, device, self._dtype, compiled=compiled)

    def __call__(self, batch: torch.Tensor) -> "Answer":
        while True:
            size = min(self._size, len(batch))
            try:
                maps = [self._maps(part) for part in torch.split(batch, size)]
                on_cuda = self.device.type == "cuda"
                return Answer(maps, torch.cuda.current_stream(self.device).record_event() if on_cuda else None)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise ConfigError(
                        f"{self.device} has too little memory for one tile of {self._meta.geometry.tile_px} px; "
                        "take smaller tiles, another model or another --device"
                    ) from error
            # Half of what was too much here: batches that run at the same time and fail alike lower it once.
            self._size = min(self._size, size // 2)
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
class Answer:
    """Maps of a batch in parts; they hold once the event, if any, has happened."""

    parts: list[NetworkMaps]
    event: torch.cuda.Event | None

    def arrays(self) -> list[npt.NDArray[np.generic]]:
        """NP, HV, NC and whether they are numbers, each stacked over the batch."""
        if self.event is not None:
            self.event.synchronize()
        return [torch.cat(values).numpy() for values in zip(*self.parts, strict=True)]
