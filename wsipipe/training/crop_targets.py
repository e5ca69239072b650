"""What of a crop's truth each kind of network learns from. Made by the workers of a loader, so of one shape a crop.

Each is called with the instance map (S, S) int, 0 background and any ids, the type map (S, S) int, `UNKNOWN_TYPE` where
not known, and where outlines are trusted (S, S) bool; it gives arrays by name, as the objective of that network
(`wsipipe.training.objectives`) reads them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wsipipe.metrics import UNKNOWN_TYPE, majority_types, remap_label
from wsipipe.training.distance_targets import distance_targets
from wsipipe.training.hovernet_targets import hovernet_targets
from wsipipe.training.point_targets import point_targets
from wsipipe.training.targets import hv_map

Array = npt.NDArray[Any]
Variant = Literal["published", "exact"]  # of `wsipipe.training.targets.hv_map`
# (instance map, type map, trusted) -> arrays by name
CropTargets = Callable[[Array, Array, Array], Mapping[str, Array]]


@dataclass(frozen=True)
class MapTargets:
    """Of CellVTA and CellViT.

    Gives `nuclei` (S, S) int64, 1 in a nucleus; `offsets` (2, S, S) float32, horizontal then vertical; `types` (S, S)
    int64; `trusted` (S, S) bool, False where `offsets` are not to be learnt.
    """

    variant: Variant = "exact"

    def __call__(self, instances: Array, types: Array, trusted: Array) -> dict[str, Array]:
        return {
            "nuclei": (instances > 0).astype(np.int64),
            "offsets": hv_map(instances, variant=self.variant),
            "types": types.astype(np.int64),
            "trusted": trusted,
        }


@dataclass(frozen=True)
class HoverTargets:
    """Of HoVer-Net, as `MapTargets`, but of the crop without `margin_px` on each side, which is all it answers for."""

    margin_px: int

    def __call__(self, instances: Array, types: Array, trusted: Array) -> dict[str, Array]:
        nuclei, offsets = hovernet_targets(remap_label(instances), len(instances) - 2 * self.margin_px)
        inner = slice(self.margin_px, len(instances) - self.margin_px)
        return {
            "nuclei": nuclei,
            "offsets": offsets,
            "types": types[inner, inner].astype(np.int64),
            "trusted": trusted[inner, inner],
        }


@dataclass(frozen=True)
class DistanceTargets:
    """Of CISCNet.

    Gives `distances` (`classes`, S, S) float32, over all types and then of each; `counts` of that shape, bool: False
    where not trusted and, for single types, where the type is not known.
    """

    classes: int

    def __call__(self, instances: Array, types: Array, trusted: Array) -> dict[str, Array]:
        known = np.repeat((types != UNKNOWN_TYPE)[None], self.classes, axis=0)
        known[0] = True
        return {
            "distances": distance_targets(remap_label(instances), types, self.classes),
            "counts": known & trusted,
        }


@dataclass(frozen=True)
class PointTargets:
    """Of PointNu-Net.

    Gives `heat` (`classes` - 1, S / 4, S / 4) float32; `cells` (S / 4, S / 4) int32, the number of the nucleus that is
    centred there, 0 for none; `numbered` (S, S) int32, the nuclei as 1, 2, ...; `counts` (S / 4, S / 4) bool, False in
    nuclei of which no centre is shown, their type being unknown, and where not trusted.

    Notes
    -----
    A nucleus of unknown type has a cell and a mask, but no heat; one that is not trusted throughout has neither.
    """

    classes: int
    stride: int = 4

    def __call__(self, instances: Array, types: Array, trusted: Array) -> dict[str, Array]:
        numbered = remap_label(instances)
        doubted = np.unique(numbered[~trusted])
        kept = remap_label(np.where(np.isin(numbered, doubted), 0, numbered))
        of_each = majority_types(kept, types)
        untyped = (of_each == UNKNOWN_TYPE) | (of_each == 0)
        # Heat of the types, and one more channel for those of none.
        channels = np.where(untyped, self.classes, of_each) - 1
        heat, found = point_targets(kept, channels, self.classes, stride=self.stride)
        cells = np.zeros(heat.shape[1:], np.int32)
        cells[found[:, 1], found[:, 2]] = found[:, 0]
        sees_type = trusted & ~np.append(False, untyped)[kept]
        middle = np.s_[self.stride // 2 :: self.stride]
        return {
            "heat": heat[:-1],
            "cells": cells,
            "numbered": kept,
            "counts": sees_type[middle, middle] & (heat[-1] < 1),
        }
