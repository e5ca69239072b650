"""What a caller must know to feed a network and to read its answer."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wsipipe.config import MapsConfig
from wsipipe.errors import ConfigError, ModelError, one_line
from wsipipe.tiles import TileGeometry

SPEC_VERSION = 1
MOST_TILE_PX = 8192
CHUNK_TILES, CHUNK_PX = 4, 2048  # a chunk is of so many tiles a side, of fewer where it would be wider
MOST_CHUNK_PX = 16384  # 2.4 GB of maps of five types
MOST_CLASSES = 255  # a type is stored as one byte


@dataclass(frozen=True)
class ModelSpec:
    """A network without its weights. Travels as JSON in the header of a wsipipe checkpoint.

    Attributes
    ----------
    architecture : str
        Key of `wsipipe.model.registry.ARCHITECTURES`.
    settings : dict
        Arguments of that architecture: widths, depths, indexes. JSON values only.
    mpp : float
        Resolution it was trained at, µm/px.
    tile_px, halo_px : int
        Side of what it is shown, px, and the context on each side whose answer is not used.
    mean, std : three floats
        Normalisation of RGB in [0, 1].
    class_names, class_colours
        NC channels in order; 0 is background. Colours are RGB, 0 to 255.
    source, licence : str
        Paper, repository and commit or training data; terms of the weights.
    margin_px : int
        By how much the answer is smaller than what is shown, px on each side; the halo is at least that.
    tile_step : (step, offset)
        Sides that can be shown: `offset` px more than a multiple of `step`.
    answer : str
        Key of `wsipipe.model.answers.ANSWERS`: how an answer becomes maps.
    """

    name: str
    architecture: str
    settings: dict[str, Any]
    mpp: float
    tile_px: int
    halo_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    source: str
    licence: str
    notes: dict[str, Any] = field(default_factory=dict)
    margin_px: int = 0
    tile_step: tuple[int, int] = (16, 0)
    answer: str = "maps"

    def to_json(self) -> str:
        return json.dumps({"version": SPEC_VERSION, **asdict(self)}, sort_keys=True)

    def require_side(self, setting: str, side: int) -> None:
        """Raise ConfigError, naming the setting, if the network takes no image of that side."""
        step, offset = self.tile_step
        if (side - offset) % step:
            more = f"{offset} px more than " if offset else ""
            raise ConfigError(f"{setting}: {self.name} takes sides of {more}a multiple of {step} px, not {side}")

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Raises ModelError if the text is no spec of a version that this software reads."""
        try:
            values = json.loads(text)
            version = values.pop("version")
            if version != SPEC_VERSION:
                raise ModelError(f"the model is described in version {version!r}; this wsipipe reads {SPEC_VERSION}")
            spec = cls(**values)
            (m0, m1, m2), (s0, s1, s2) = spec.mean, spec.std
            colours = tuple((r, g, b) for r, g, b in spec.class_colours)
            spec = replace(
                spec,
                mean=(m0, m1, m2),
                std=(s0, s1, s2),
                class_names=tuple(spec.class_names),
                class_colours=colours,
                tile_step=(spec.tile_step[0], spec.tile_step[1]),
            )
            spec.require_sense()
            return spec
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ModelError(f"the checkpoint's description cannot be read: {one_line(error):.300}") from error

    def require_sense(self) -> None:
        """Raise ValueError or TypeError for values that no network has: a file from elsewhere may say anything."""
        texts = (self.name, self.architecture, self.source, self.licence, *self.class_names)
        if not all(isinstance(text, str) for text in texts) or not self.name.isprintable():
            raise TypeError("names, source and licence must be texts, the name of one line")
        if not (isinstance(self.settings, dict) and isinstance(self.notes, dict)):
            raise TypeError("settings and notes must be by name")
        if not 0.01 <= self.mpp <= 100:
            raise ValueError(f"{self.mpp} µm/px is no resolution")
        sides = (self.tile_px, self.halo_px)
        if not all(type(side) is int for side in sides) or not 0 <= 2 * self.halo_px < self.tile_px <= MOST_TILE_PX:
            raise ValueError(f"tiles of {self.tile_px} px with a halo of {self.halo_px} px cannot be")
        whole = all(type(value) is int and value >= 0 for value in (self.margin_px, *self.tile_step))
        if not whole or self.tile_step[0] < 1 or self.margin_px > self.halo_px:
            raise ValueError(f"a margin of {self.margin_px} px and sides in steps of {self.tile_step} cannot be")
        if not isinstance(self.answer, str):
            raise TypeError("the kind of answer must be a text")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} are no normalisation")
        names, colours = self.class_names, [value for colour in self.class_colours for value in colour]
        if len(names) != len(self.class_colours) or len(set(names)) < len(names) or len(names) > MOST_CLASSES:
            raise ValueError(f"{len(names)} class names with {len(self.class_colours)} colours do not fit")
        if not all(type(value) is int and 0 <= value <= 255 for value in colours):
            raise ValueError("colours must be whole numbers from 0 to 255")


def tile_geometry(spec: ModelSpec, config: MapsConfig) -> TileGeometry:
    """How slides are cut for a network, by its spec where the settings say nothing.

    Raises
    ------
    ConfigError
        If the network takes no tile of that side or halo, or chunks are too large.
    """
    tile_px = spec.tile_px if config.tile_px is None else config.tile_px
    halo_px = spec.halo_px if config.halo_px is None else config.halo_px
    chunk_tiles = config.chunk_tiles or max(1, min(CHUNK_TILES, CHUNK_PX // max(1, tile_px - 2 * halo_px)))
    try:
        geometry = TileGeometry(tile_px, halo_px, chunk_tiles)
    except ValueError as error:
        raise ConfigError(f"maps.tile_px and maps.halo_px: {error}") from error
    spec.require_side("maps.tile_px", tile_px)
    if halo_px < spec.margin_px:
        raise ConfigError(f"maps.halo_px: {spec.name} answers {spec.margin_px} px less on each side, not {halo_px}")
    if geometry.chunk_px > MOST_CHUNK_PX:
        raise ConfigError(
            f"maps.chunk_tiles: chunks of {geometry.chunk_px} px do not fit into memory; "
            f"at most {MOST_CHUNK_PX // geometry.core_px} tiles a side fit"
        )
    return geometry
