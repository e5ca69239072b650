"""The processes that share a run, one a device; a run that nobody started several times is a team of one.

Accelerate and not Lightning, because it wraps a network and leaves the loop to us; what it does here is to start
processes, to add up their gradients and to let one of them write.
"""

from datetime import timedelta
from typing import Any, TypeVar

from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from wsipipe.device import choose_device
from wsipipe.errors import ConfigError
from wsipipe.training.config import TrainConfig

T = TypeVar("T")
VALIDATION = timedelta(hours=4)  # how long a process may wait while the first one validates


def start_team(config: TrainConfig) -> Any:
    """The processes of a run, as accelerate's `Accelerator`.

    Raises
    ------
    ConfigError
        If accelerate is not installed, or so many processes cannot share a batch.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise ConfigError("training needs accelerate; in the clone of wsipipe: pip install -e '.[training]'") from error
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=True),  # what is frozen or has no loss gets no gradient
        InitProcessGroupKwargs(timeout=VALIDATION),
    ]
    team = Accelerator(
        cpu=choose_device(config.device).type == "cpu",
        mixed_precision="no",  # the loop's, as `precision` says; the launcher's would come on top of it
        dynamo_backend="no",
        kwargs_handlers=handlers,
    )
    if config.batch_size % team.num_processes:
        raise ConfigError(f"a batch of {config.batch_size} cannot be shared by {team.num_processes} processes")
    return team


def shared_network(network: nn.Module, team: Any) -> nn.Module:
    """The network as a step calls it: gradients are added up over the team.

    On CUDA with batch statistics over all devices too, so that a batch means the same on one and on many.
    """
    if team.num_processes == 1:
        return network
    if team.device.type == "cuda":
        network = with_common_statistics(network)
    prepared: nn.Module = team.prepare(network)
    return prepared


def with_common_statistics(network: nn.Module) -> nn.Module:
    """The network, of the same weights, with batch statistics over all devices.

    As timm does it: torch's own conversion loses the activations that timm's CNNs have within their norms.
    """
    converted: nn.Module = convert_sync_batchnorm(network)
    return converted


def told_to_all(value: T, team: Any) -> T:
    """What the first process knows, for all."""
    if team.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    told: T = broadcast_object_list([value])[0]
    return told
