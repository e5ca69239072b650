"""How each architecture is taught: what of the truth it is shown, and its loss. A new architecture is an entry here."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wsipipe.errors import ConfigError
from wsipipe.model.spec import ModelSpec
from wsipipe.training.baseline_losses import distance_loss, hovernet_losses, point_losses
from wsipipe.training.config import TrainConfig
from wsipipe.training.crop_targets import CropTargets, DistanceTargets, HoverTargets, MapTargets, PointTargets
from wsipipe.training.losses import CellVTALoss, LossWeights

# What CISCNet's submission to the challenge counted three times, and twice more in and round nuclei: they are rare.
RARE_TYPES = ("neutrophil", "plasma", "eosinophil")

Maps = Mapping[str, Tensor]
Loss = Callable[[Maps, Maps], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Objective:
    """What a network is to learn.

    Attributes
    ----------
    targets : function
        What of a crop's truth the loss reads; see `wsipipe.training.crop_targets`.
    loss : function
        (output of the network, batch on its device) to the total to minimise, and its parts, detached. In float32,
        under autocast too.
    """

    targets: CropTargets
    loss: Loss


def objective_of(spec: ModelSpec, config: TrainConfig) -> Objective:
    """How a network of this spec is taught.

    Raises
    ------
    ConfigError
        If nobody has said how, or `losses` weighs what that network's loss does not have.
    """
    if spec.architecture not in OBJECTIVES:
        raise ConfigError(
            f"{spec.name}: how to train a {spec.architecture} is not known; known: {', '.join(OBJECTIVES)}"
        )
    return OBJECTIVES[spec.architecture](spec, config)


def _of_maps(spec: ModelSpec, config: TrainConfig) -> Objective:
    """CellVTA and CellViT; `losses` are those of `LossWeights`."""
    try:
        weights = replace(LossWeights(), **config.losses)
    except TypeError as error:
        raise ConfigError(f"losses: {error}") from error
    exact_gradient = config.hv_gradient == "exact"
    loss = CellVTALoss(weights, double_softmax=config.double_softmax, exact_gradient=exact_gradient)
    return Objective(MapTargets(config.hv_variant), loss)


def _of_hovernet(spec: ModelSpec, config: TrainConfig) -> Objective:
    """HoVer-Net; `losses` weigh the parts of `hovernet_losses`, 1 each by default."""
    parts = ("nuclei_cross_entropy", "nuclei_dice", "offsets_mse", "offsets_gradient", "types_cross_entropy")
    weights = _weights(config, (*parts, "types_dice"))
    if config.crop_px <= 2 * spec.margin_px:
        raise ConfigError(
            f"crop_px: {spec.name} answers for {spec.margin_px} px less on each side, of {config.crop_px} px nothing"
        )
    return Objective(HoverTargets(spec.margin_px), _summed(hovernet_losses, weights))


def _of_distances(spec: ModelSpec, config: TrainConfig) -> Objective:
    """CISCNet; `losses` are factors of the types by name: 3 for those that are rare in CoNIC, else 1, by default."""
    _require_types(spec)
    types = spec.class_names[1:]
    factors = {name: 3.0 if name in RARE_TYPES else 1.0 for name in types} | _weights(config, types, given_only=True)
    near = (1.0, *(2.0 if name in RARE_TYPES else 1.0 for name in types))

    def losses(output: Maps, batch: Maps) -> dict[str, Tensor]:
        of = output["distances"], batch["distances"]
        return {"distances": distance_loss(*of, (1.0, *factors.values()), near, batch["counts"])}

    return Objective(DistanceTargets(len(spec.class_names)), _summed(losses, {"distances": 1.0}))


def _of_points(spec: ModelSpec, config: TrainConfig) -> Objective:
    """PointNu-Net; `losses` weigh `category` and `masks`, 1 each by default."""
    _require_types(spec)
    weights = _weights(config, ("category", "masks"))
    return Objective(PointTargets(len(spec.class_names)), _summed(point_losses, weights))


OBJECTIVES: dict[str, Callable[[ModelSpec, TrainConfig], Objective]] = {
    "cellvta": _of_maps,
    "cellvit": _of_maps,
    "hovernet": _of_hovernet,
    "ciscnet": _of_distances,
    "pointnu": _of_points,
}


def _require_types(spec: ModelSpec) -> None:
    """Raise ConfigError if a network that finds nuclei by their types is to be taught none."""
    if len(spec.class_names) < 2:
        raise ConfigError(f"{spec.name} finds nuclei by their types, and none of the data has any; train a cellvta")


def _weights(config: TrainConfig, names: Iterable[str], *, given_only: bool = False) -> dict[str, float]:
    names = tuple(names)
    unknown = [name for name in config.losses if name not in names]
    if unknown:
        raise ConfigError(f"losses: {config.model} has no '{unknown[0]}'; it has {', '.join(names)}")
    return dict(config.losses) if given_only else dict.fromkeys(names, 1.0) | config.losses


def _summed(losses: Callable[[Maps, Maps], dict[str, Tensor]], weights: Mapping[str, float]) -> Loss:
    """The weighted sum of what `losses` gives by name."""

    def loss(output: Maps, batch: Maps) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(next(iter(output.values())).device.type, enabled=False):
            parts = losses({name: values.float() for name, values in output.items()}, batch)
            total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    return loss
