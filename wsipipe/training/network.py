"""The network of a run: its spec, the weights that it starts with, what of it learns, and what it is shown."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsipipe.errors import ConfigError
from wsipipe.model.encoder import GRID_PX, Encoder
from wsipipe.model.prior import TaughtPrior
from wsipipe.model.registry import SPECS, build
from wsipipe.model.spec import ModelSpec
from wsipipe.model.weights import find_checkpoint, load_encoder, load_prior, open_checkpoint, read_pickle
from wsipipe.training.config import VARIANT_SETTINGS, TrainConfig
from wsipipe.training.widening import widen

log = logging.getLogger(__name__)

# Red, green, blue, yellow, orange, cyan, purple, brown: told apart on H&E.
COLOURS = (
    (255, 0, 0), (34, 221, 77), (35, 92, 236), (254, 255, 0),
    (255, 159, 68), (35, 255, 255), (150, 60, 220), (120, 80, 40),
)  # fmt: skip


def spec_of(config: TrainConfig, classes: tuple[str, ...] | None, tissues: Sequence[str] = ()) -> ModelSpec:
    """The registry's spec, with the settings of the experiment and the classes of the data.

    `classes` None: those of the registry.

    Raises
    ------
    ConfigError
        If there is no such model, it is another in that mode, or it takes no crops of that side.
    """
    if config.model not in SPECS:
        raise ConfigError(f"no model is called '{config.model}'; there are: {', '.join(SPECS)}")
    spec = SPECS[config.model]
    settings = {**spec.settings, **config.settings}
    if config.variant is not None and spec.architecture == "cellvta":
        settings = {**spec.settings, **VARIANT_SETTINGS[config.variant], **config.settings}
    if spec.architecture == "hovernet" and settings["mode"] != spec.settings["mode"]:  # what it is shown differs too
        modes = {of.settings["mode"]: name for name, of in SPECS.items() if of.architecture == spec.architecture}
        remedy = f"set model: {modes[settings['mode']]}" if settings["mode"] in modes else "leave it out"
        raise ConfigError(f"settings: {config.model} has no mode {settings['mode']!r}; {remedy}")
    if settings.get("tissue_classes"):
        settings["tissue_classes"] = len(tissues)
    spec = replace(spec, settings=settings, mpp=config.mpp or spec.mpp)
    if "cell_px" in settings:
        spec = replace(spec, tile_step=(GRID_PX * settings["cell_px"], 0))
    spec.require_side("crop_px", config.crop_px)
    if classes is not None and classes != spec.class_names:
        colours = ((0, 0, 0), *(COLOURS[i % len(COLOURS)] for i in range(len(classes) - 1)))
        spec = replace(spec, class_names=classes, class_colours=colours)
    return spec


def classes_at_the_start(config: TrainConfig) -> tuple[str, ...] | None:
    """The classes of the weights to start with, None for a run's `last.pt`, which does not say; random ones know none.

    Raises
    ------
    ModelError
        If there are no such weights, or they cannot be read.
    """
    given = config.start_from or config.widen_from
    if given is None:
        return ("background",)
    path = find_checkpoint(given)
    return None if path.suffix == ".pt" else open_checkpoint(path)[1].class_names


def start_network(spec: ModelSpec, config: TrainConfig) -> nn.Module:
    """A network of `spec` before its first step: random weights or given ones, and frozen what is not to learn.

    Raises
    ------
    ConfigError
        If the weights to start with do not fit, or there is nothing to freeze.
    """
    network = build(spec)
    _take_weights(network, spec, config)
    freeze(network, config.trains)
    return network


def _take_weights(network: nn.Module, spec: ModelSpec, config: TrainConfig) -> None:
    """Start from other weights: a narrower network's, all that fit (`start_from`), the ViT's (`encoder`), the CNN's."""
    own = network.state_dict()
    if config.widen_from is not None:
        narrow, narrow_spec = open_checkpoint(find_checkpoint(config.widen_from))
        if narrow_spec.class_names != spec.class_names:
            raise ConfigError(
                f"{config.widen_from} tells {list(narrow_spec.class_names)}, the data {list(spec.class_names)}; only a "
                "network of the same classes can be widened"
            )
        widen(narrow, network, config.seed)
        log.info("starts as the equal of %s", config.widen_from)
    if config.start_from is not None:
        found = _weights(find_checkpoint(config.start_from))
        fitting = {key: value for key, value in found.items() if key in own and own[key].shape == value.shape}
        if not fitting:
            raise ConfigError(f"{config.start_from} has no tensor of a {config.model}")
        network.load_state_dict(fitting, strict=False)
        log.info("%d of %d tensors are those of %s", len(fitting), len(own), config.start_from)
    if config.encoder is not None:
        vit = getattr(getattr(network, "encoder", None), "vit", None)
        if not isinstance(vit, Encoder):
            raise ConfigError(f"{config.model} has no ViT that could start with {config.encoder}; leave encoder out")
        load_encoder(vit, config.encoder)
    if config.prior is not None:
        prior = getattr(getattr(network, "encoder", None), "prior", None)
        if not isinstance(prior, TaughtPrior):
            raise ConfigError(f"{config.model} has no CNN that could start with {config.prior}; leave prior out")
        load_prior(prior, config.prior)


def _weights(path: Path) -> Mapping[str, Any]:
    """Of a checkpoint, or those that were learning when a run saved its `last.pt`."""
    if path.suffix == ".pt" and isinstance(learning := read_pickle(path).get("network"), Mapping):
        return learning
    return open_checkpoint(path)[0].state_dict()


def freeze(network: nn.Module, trains: str) -> None:
    """Leave to learn all, all but the ViT's own weights ("adapter"), or the decoder and the head for tissues.

    The ViT's last norm leads to that head and nowhere else: it learns with the adapter.
    """
    if trains == "all":
        return
    frozen, but = ("encoder.", "encoder.tissue_head.") if trains == "decoder" else ("encoder.vit.", "encoder.vit.norm.")
    names = [name for name, _ in network.named_parameters() if name.startswith(frozen)]
    if not names:
        raise ConfigError(f"this network has no {frozen.rstrip('.')} to freeze; set trains: all")
    for name, parameter in network.named_parameters():
        parameter.requires_grad = not name.startswith(frozen) or name.startswith(but)


def parameter_groups(network: nn.Module, weight_decay: float, decays: str) -> list[dict[str, Any]]:
    """Matrices and kernels decay; norms, biases and embeddings do not, unless all is to."""
    learning = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if decays == "all":
        return [{"params": [p for _, p in learning], "weight_decay": weight_decay}]
    decaying = [p for name, p in learning if p.ndim > 1 and "embed" not in name.rsplit(".", 1)[-1]]
    ids = {id(p) for p in decaying}
    rest = [p for _, p in learning if id(p) not in ids]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def normalised(image: Tensor, spec: ModelSpec, device: torch.device) -> Tensor:
    """(B, 3, H, W) uint8 as the float32 input of a network, on its device."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    image = image.to(device, non_blocking=True).float() / 255
    return ((image - mean) / std).contiguous(memory_format=torch.channels_last)
