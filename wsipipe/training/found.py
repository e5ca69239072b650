"""Nuclei in what a network answers to whole images, found as those who published that kind of network do."""

import numpy as np
from torch import Tensor

from wsipipe.instances import label_tile
from wsipipe.metrics import majority_types, remap_label
from wsipipe.model.answers import NUCLEI, Drawn
from wsipipe.model.spec import ModelSpec
from wsipipe.training.scores import TypedNuclei


def nuclei_of(output: dict[str, Tensor], spec: ModelSpec, mpp: float | None = None) -> list[TypedNuclei]:
    """The nuclei of every image of a batch, (B, H, W) being what the network answers for.

    Parameters
    ----------
    mpp : float, optional
        Of the images, which tells what is too small to be a nucleus; by default that of the spec.
    """
    if spec.answer == "maps":
        return _of_maps(output, mpp or spec.mpp)
    return [_of_drawn(drawn) for drawn in NUCLEI[spec.answer](output, len(spec.class_names))]


def _of_maps(output: dict[str, Tensor], mpp: float) -> list[TypedNuclei]:
    nuclei = output["nuclei"].float().argmax(1).cpu().numpy()
    offsets = output["offsets"].float().cpu().numpy()
    types = output["types"].float().argmax(1).cpu().numpy() if "types" in output else np.zeros_like(nuclei)
    found = []
    for mask, hv, type_map in zip(nuclei, offsets, types, strict=True):
        instances = label_tile(mask > 0, np.ascontiguousarray(hv, np.float32), mpp)
        found.append(TypedNuclei(instances, majority_types(instances, type_map), mask > 0))
    return found


def _of_drawn(drawn: Drawn) -> TypedNuclei:
    """Those that can be seen; a nucleus under others is none."""
    labels, _, by_type = drawn
    seen = np.unique(labels)
    return TypedNuclei(remap_label(labels), by_type[seen[seen > 0]].argmax(axis=1))
