"""Certainties that mean what they say: the types of a trained network are divided by one temperature.

Guo et al. 2017, arXiv 1706.04599. The temperature goes into the weights of the last layer, so that nobody who runs the
network needs to know. No nucleus changes its type by it as long as its pixels agree.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from wsipipe.errors import DataError, ModelError
from wsipipe.model.spec import ModelSpec
from wsipipe.training.data import PatchSet
from wsipipe.training.evaluate import score_images
from wsipipe.training.run_folder import split_as_trained
from wsipipe.training.scores import calibration_of, certain_pairs

log = logging.getLogger(__name__)

TEMPERATURES = (0.25, 4.0)
TRIES = 12


def calibrate(
    model: tuple[nn.Module, ModelSpec, str],
    sets: Sequence[PatchSet],
    *,
    device: str = "auto",
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the temperature at which its certainties fit the validation images of `sets` best.

    What is told as certainty is taken from the whole of `segment`; the temperature makes the likelihood of being right
    as often as told the greatest.

    Parameters
    ----------
    notes : mapping
        What training noted in the checkpoint, see `read_notes`: sets that the run had are split as they were there.

    Returns
    -------
    network
    figures : dict
        `temperature`, and what `calibration_of` says `before` and `after`.

    Raises
    ------
    DataError
        If no set has validation images with types, or none of their nuclei is found.
    ModelError
        If the network has no branch of types as CellVTA has it.
    """
    sets = [split_as_trained(patches, notes) or patches for patches in sets]
    typed = [patches for patches in sets if patches.types is not None and len(patches.of("validation"))]
    if not typed:
        raise DataError("no set has validation images with types; a temperature cannot be found without")
    network, spec, digest = model

    def pairs_at(temperature: float) -> tuple[Any, Any]:
        tried = (with_temperature(network, temperature), spec, digest)
        scores = [score for patches in typed for score in score_images(tried, patches, "validation", device=device)]
        return certain_pairs(scores)

    def surprise(log_temperature: float) -> float:
        certainties, right = pairs_at(float(np.exp(log_temperature)))
        told = np.clip(np.where(right, certainties, 1 - certainties), 1e-6, 1)
        value = float(-np.log(told).mean())
        log.info("temperature %.3f: negative log-likelihood %.4f", np.exp(log_temperature), value)
        return value

    before = pairs_at(1.0)
    if not len(before[0]):
        raise DataError("none of the typed validation nuclei is found; train the network first")
    best = minimize_scalar(
        surprise, bounds=tuple(np.log(TEMPERATURES)), method="bounded", options={"maxiter": TRIES, "xatol": 0.02}
    )
    temperature = float(np.exp(best.x))
    figures = {"temperature": temperature, "before": calibration_of(*before)}
    return with_temperature(network, temperature), {**figures, "after": calibration_of(*pairs_at(temperature))}


def with_temperature(network: nn.Module, temperature: float) -> nn.Module:
    """A copy of the network whose logits of the types are divided by `temperature`. Raises ModelError without any."""
    scaled = copy.deepcopy(network)
    try:
        last = scaled.get_submodule("decoder.branches.types.head")[-1]  # type: ignore[index]
    except AttributeError as error:
        raise ModelError(f"a {type(network).__name__} has no branch of types that could be calibrated") from error
    with torch.no_grad():
        last.weight /= temperature
        last.bias /= temperature
    return scaled
