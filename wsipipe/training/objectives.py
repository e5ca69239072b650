"""How each architecture is taught: from its output and a batch to a loss. A new architecture is an entry here."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from wsipipe.errors import ConfigError
from wsipipe.model.spec import ModelSpec
from wsipipe.training.config import TrainConfig
from wsipipe.training.losses import CellVTALoss, LossWeights
from wsipipe.training.validation import middle

# (output of the network, batch on its device) -> total to minimise, and its parts, detached
Objective = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def _of_maps(spec: ModelSpec, config: TrainConfig) -> Objective:
    """Maps against those of the truth, of which only the middle is taken where a network shows no more of its input."""
    try:
        weights = replace(LossWeights(), **config.losses)
    except TypeError as error:
        raise ConfigError(f"losses: {error}") from error
    criterion: nn.Module = CellVTALoss(weights, double_softmax=config.double_softmax)

    def objective(output: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        target = {name: value for name, value in batch.items() if name not in ("image", "instances")}
        height, width = output["nuclei"].shape[2:]
        target = {name: middle(value, height, width) if value.ndim > 2 else value for name, value in target.items()}
        total, parts = criterion(output, target)
        return total, parts

    return objective


OBJECTIVES: dict[str, Callable[[ModelSpec, TrainConfig], Objective]] = {
    "cellvta": _of_maps,
    "cellvit": _of_maps,
    "hovernet": _of_maps,
}


def objective_of(spec: ModelSpec, config: TrainConfig) -> Objective:
    """How a network of this spec is taught.

    Raises
    ------
    ConfigError
        If nobody has said how.
    """
    if spec.architecture not in OBJECTIVES:
        raise ConfigError(
            f"{spec.name}: how to train a {spec.architecture} is not known; known: {', '.join(OBJECTIVES)}"
        )
    return OBJECTIVES[spec.architecture](spec, config)
