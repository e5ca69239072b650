"""One experiment as data: what is trained, on what, how long, and how the best weights are told."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from wsipipe.config import faults, parse_yaml, read_yaml
from wsipipe.errors import ConfigError
from wsipipe.training.data import Split

# What the code that made CellVTA's weights does, and what its paper says where it differs (for new training). A
# setting that an experiment states itself wins.
PUBLISHED: dict[str, Any] = {
    "recipe": "published",
    "hv_variant": "published",
    "hv_gradient": "published",
    "double_softmax": True,
    "batch_size": 8,
    "learning_rate": 3e-4,
    "schedule": "exponential",
    "decay": 0.95,
    "warmup_steps": 0,
    "betas": [0.85, 0.95],
    "weight_decay": 1e-4,
    "decays": "all",
    "clip_norm": None,
    "ema_decay": 0.0,
    "best_by": "bPQ",
    "precision": "fp32",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": PUBLISHED,
    "paper": {**PUBLISHED, "double_softmax": False, "batch_size": 4, "decay": 0.85},
}
# Of the network; only CellVTA knows these.
VARIANT_SETTINGS: dict[str, dict[str, Any]] = {"published": {"variant": "published"}, "paper": {"variant": "paper"}}


class TrainConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """One experiment. Everything in it is stored with the weights."""

    model: str = Field("cellvta-nano", description="name in the registry")
    settings: dict[str, Any] = Field({}, description="of the network, where they differ from the registry's")
    mpp: float | None = Field(None, gt=0, description="resolution to train at, µm/px; by default the model's")
    encoder: str | None = Field(
        None, description="what the ViT starts with: a file of UNI, SAM or timm, or timm's name"
    )
    prior: Path | None = Field(None, description="file of what the CNN beside the adapter starts with, of timm's kind")
    start_from: Path | None = Field(
        None,
        description="shipped model, checkpoint, ours or upstream's, or a run's last.pt: its weights that fit are taken",
    )
    widen_from: Path | None = Field(
        None,
        description="shipped model or checkpoint of a narrower network of the same layers, as whose equal it starts",
    )
    variant: Literal["published", "paper"] | None = Field(None, description="a set of settings, see VARIANTS")
    data: dict[Path, float] = Field(description="folders of patch sets, and how often each is drawn")
    folds: dict[Split, list[str]] = Field(
        {}, description="folds to train, validate and test on, in place of the splits"
    )
    sampling: Literal["uniform", "shuffled", "tissue", "cell", "cell+tissue"] = Field(
        "uniform", description="which images are drawn; shuffled: each once an epoch, whatever the weights of the sets"
    )
    gamma: float = Field(0.85, ge=0, le=1, description="how much rarity counts in sampling")
    recipe: str | dict[str, Any] = Field("default", description="augmentation: a name, or written out")
    crop_px: int = Field(256, gt=0, description="side of a crop, px; one that the network takes")
    hv_variant: Literal["published", "exact"] = "exact"
    hv_gradient: Literal["published", "exact"] = Field(
        "exact",
        description="of CellVTA, CellViT: the loss sees offsets fall along their own direction, or across as published",
    )
    trains: Literal["all", "adapter", "decoder"] = Field("all", description="what of the network learns")
    losses: dict[str, float] = Field({}, description="weights of losses that differ from the published")
    double_softmax: bool = Field(False, description="softmax twice for the Tversky losses, as published")
    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0, description="in place of steps; one is as many crops as there are images")
    batch_size: int = Field(8, gt=0, description="crops at once, over all devices")
    accumulate: int = Field(1, gt=0, description="batches a step")
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "exponential"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    decay_share: float = Field(0.3, ge=0, le=1, description="share of the steps over which the rate falls to 0: cosine")
    decay: float = Field(0.95, gt=0, le=1, description="factor of the rate after every epoch: exponential")
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(0.02, ge=0)
    decays: Literal["matrices", "all"] = Field(
        "matrices", description="what decays: not norms, biases, embeddings; or all"
    )
    clip_norm: float | None = Field(5.0, gt=0, description="longest gradient; null: any")
    ema_decay: float = Field(0.998, ge=0, lt=1, description="of the averaged weights, which are validated; 0: none")
    best_by: Literal["loss", "bPQ", "mPQ"] = Field("loss", description="on the validation images")
    patience: int | None = Field(None, gt=0, description="validations without a better one before the run ends early")
    validate_every: int | None = Field(
        None, gt=0, description="steps; by default `validate_epochs`, or 200 steps where the run is given in steps"
    )
    validate_epochs: float = Field(1.0, gt=0, description="epochs from one validation to the next")
    save_every: int | None = Field(
        None, gt=0, description="steps after which a killed run goes on; by default as validated, at most an epoch"
    )
    log_every: int = Field(10, gt=0)
    tensorboard: bool = True
    seed: int = Field(19, ge=0, lt=2**31)
    workers: int = Field(1, ge=0)
    device: str = "auto"
    precision: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def _of_variant(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("variant") in VARIANTS:
            return {**VARIANTS[values["variant"]], **values}
        return values

    @model_validator(mode="after")
    def _says_how_long(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if min(self.data.values(), default=0) < 0 or not sum(self.data.values()):
            raise ValueError("data: how often a set is drawn must not be negative, nor 0 for all")
        return self


# They change how a run is carried out, not what comes of it, or only make it longer.
FREE = frozenset(
    {
        "steps",
        "epochs",
        "workers",
        "log_every",
        "validate_every",
        "validate_epochs",
        "save_every",
        "device",
        "tensorboard",
    }
)


def load_experiment(path: Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Settings of a run from a YAML file; `base:` names a file (beside it) whose settings it changes.

    Of settings that are tables (`settings`, `losses`) the entries are joined; `data` and `folds` are replaced whole.

    Raises
    ------
    ConfigError
        If a file cannot be read, or with every setting that is unknown, missing or out of range.
    """
    values: dict[str, Any] = {}
    for file in reversed(experiment_files(path)):
        values = merged(values, {key: value for key, value in _read(file).items() if key != "base"})
    values = merged(values, overrides or {})
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {faults(error)}") from error


def parse_changes(given: list[str]) -> dict[str, Any]:
    """`key=value` texts as settings; values are YAML.

    Raises
    ------
    ConfigError
        If a text is not of this form.

    Examples
    --------
    >>> parse_changes(["seed=3", "folds={train: ['1']}"])
    {'seed': 3, 'folds': {'train': ['1']}}
    """
    changes = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"'{text}' changes no setting; write KEY=VALUE, such as seed=3")
        try:
            changes[key.strip()] = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"the value of '{text}' is not YAML: {error}") from error
    return changes


def experiment_files(path: Path) -> list[Path]:
    """The file of an experiment and those that it builds on by `base:`, each after the one that names it.

    Raises
    ------
    ConfigError
        If one cannot be read, or is its own base.
    """
    files = [path]
    while base := _read(files[-1]).get("base"):
        path = files[-1].parent / str(base)
        if path.resolve() in [file.resolve() for file in files]:
            raise ConfigError(f"{path} is its own base; remove one `base:`")
        files.append(path)
    return files


def _read(path: Path) -> dict[str, Any]:
    values = read_yaml(path, "an experiment")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings such as 'model: cellvta-nano', not a {type(values).__name__}")
    return values


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the settings of `changes`."""
    joined = {**base, **changes}
    for key in ("settings", "losses"):
        if isinstance(base.get(key), dict) and isinstance(changes.get(key), dict):
            joined[key] = {**base[key], **changes[key]}
    return joined
