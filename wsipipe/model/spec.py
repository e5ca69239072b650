"""What a caller must know to feed a network and to read its answer."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wsipipe.errors import ModelError

SPEC_VERSION = 1


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

    def to_json(self) -> str:
        return json.dumps({"version": SPEC_VERSION, **asdict(self)}, sort_keys=True)

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
            return replace(
                spec,
                mean=(m0, m1, m2),
                std=(s0, s1, s2),
                class_names=tuple(spec.class_names),
                class_colours=colours,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"the checkpoint's description cannot be read: {error}") from error
