"""Settings: typed, frozen, one default each, every fault reported at once.

Only what changes a result is here. Devices, threads and folders belong to the command that runs.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from wsipipe.errors import ConfigError, one_line

MOST_YAML_BYTES = 1 << 18
MOST_FAULTS = 20  # told at once


class _Settings(BaseModel, frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False):
    """Base of all settings: cannot change, refuses unknown keys and numbers without end.

    A default is the value that giving it would make.
    """


class TissueConfig(_Settings):
    """Where there is tissue."""

    mpp: float = Field(8.0, gt=0, le=64, description="resolution of the tissue mask, µm per px")
    min_area_um2: float = Field(20_000, ge=0, description="smaller specks are not tissue, µm²")
    max_hole_um2: float = Field(100_000, ge=0, description="smaller holes in tissue are tissue, µm²")


class MapsConfig(_Settings):
    """How the network is run; what the model spec says holds where nothing is set."""

    tile_px: int | None = Field(None, gt=0, multiple_of=16, description="side the network sees, px")
    halo_px: int | None = Field(None, ge=0, description="context on each side of a tile, px")
    chunk_tiles: int | None = Field(
        None, gt=0, description="tiles a side of a stored chunk; 4, or as many as 2048 px hold if that is fewer"
    )


class NucleiConfig(_Settings):
    """From maps to nuclei."""

    halo_px: int = Field(128, gt=0, le=4096, description="context on each side of a block: the widest nucleus, px")
    min_area_um2: float = Field(3.0, ge=0, description="smaller nuclei are dropped, µm²")
    small_area_um2: float = Field(6.0, ge=0, description="nuclei smaller than that must be certain, µm²")
    small_probability: float = Field(0.97, ge=0, le=1, description="mean NP from which a small nucleus is certain")
    np_threshold: float = Field(0.5, gt=0, lt=1, description="probability from which a pixel is of a nucleus")
    hv_scale: tuple[float, float] | Literal["tile"] = Field(
        (-1.5, 0.9),
        description="slopes of the HV map, 1/µm, that are wholly border and wholly nucleus; "
        "'tile': their range over the block, as published, which makes a result depend on the cut",
    )
    hv_kernel_um: float = Field(3.75, gt=0, le=10, description="extent of the filter that takes those slopes, µm")
    marker_threshold: float = Field(0.4, gt=0, lt=1, description="share of border from which a pixel marks no nucleus")
    max_hole_um: float = Field(
        4.0, ge=0, le=1000, description="holes as wide and high are filled before nuclei are parted, µm"
    )
    simplify_px: float = Field(0.5, ge=0, le=2, description="outlines move by no more, working px")

    @field_validator("hv_scale")
    @classmethod
    def _rises(cls, scale: tuple[float, float] | str) -> tuple[float, float] | str:
        if isinstance(scale, tuple) and scale[0] >= scale[1]:
            raise ValueError("the slope of a border must be below that of a nucleus")
        return scale


class Config(_Settings):
    """All settings of a run."""

    tissue: TissueConfig = TissueConfig()
    maps: MapsConfig = MapsConfig()
    nuclei: NucleiConfig = NucleiConfig()

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_say_nothing(cls, values: Any) -> Any:
        """As where all lines of a section stand behind a #."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}


def load_config(path: Path | None = None, overrides: dict[str, dict[str, Any]] | None = None) -> Config:
    """Read settings from a YAML file; `overrides` (section -> key -> value) win over it.

    Raises
    ------
    ConfigError
        If the file cannot be read, or with every setting that is unknown or out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(path, "settings") or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold sections such as 'nuclei:', not a {type(values).__name__}")
    for section, changes in (overrides or {}).items():
        there = values.get(section) or {}
        if not isinstance(there, dict):
            raise ConfigError(f"{path}: {section} must hold settings, not {there!r:.40}")
        values = {**values, section: {**there, **changes}}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path or 'the settings'}: {faults(error)}") from error


def parse_overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings given as "nuclei.min_area_um2=10", values in YAML, as `load_config` takes them.

    Raises
    ------
    ConfigError
        With every text that is not of that form.

    Examples
    --------
    >>> parse_overrides(["nuclei.min_area_um2=10", "nuclei.hv_scale=[-1, 1]"])
    {'nuclei': {'min_area_um2': 10, 'hv_scale': [-1, 1]}}
    """
    overrides: dict[str, dict[str, Any]] = {}
    wrong = []
    for text in texts:
        place, equals, value = text.partition("=")
        section, dot, key = place.partition(".")
        try:
            parsed = parse_yaml(value)
        except ValueError:
            equals = ""
        if equals and dot and section and key:
            overrides.setdefault(section, {})[key] = parsed
        else:
            wrong.append(text)
    if wrong:
        raise ConfigError(f"not of the form section.key=value, e.g. nuclei.min_area_um2=10: {', '.join(wrong)}")
    return overrides


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds: plain data, nothing is built or run; `what` it should be is for the error.

    Raises
    ------
    ConfigError
        If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_YAML_BYTES + 1)
        if len(text) > MOST_YAML_BYTES:
            raise ValueError(f"it is larger than {MOST_YAML_BYTES >> 10} kB")
        return parse_yaml(text.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as {what}: {error}") from error


def parse_yaml(text: str) -> Any:
    """What a text in YAML says; raises ValueError, in one line, if it is none."""
    try:
        return _Loader(text).get_single_data()
    # The loader takes lists for numbers and dates as they come, and calls itself for every level of nesting.
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(one_line(error)) from error


class _Loader(yaml.SafeLoader):
    """Refuses what stands twice, of which the first would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"line {node.start_mark.line + 1} and on: {', '.join(twice)} stands there twice")
        return super().construct_mapping(node, deep)


def faults(error: ValidationError) -> str:
    """Every fault that pydantic found, each with its place; of very many the first."""
    found = error.errors(include_input=False)
    said = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}" for fault in found[:MOST_FAULTS]]
    if len(found) > MOST_FAULTS:
        said.append(f"and {len(found) - MOST_FAULTS} more")
    return " ".join("; ".join(said).split())


def config_hash(*parts: BaseModel | dict[str, Any]) -> str:
    """Short hash of settings, equal for equal values whatever their order."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
