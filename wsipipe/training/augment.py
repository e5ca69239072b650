"""What a training image may look like: geometry first, then colour.

A recipe is plain data with a probability (`p`) for each step, and can be written in YAML (`load_recipe`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from wsipipe.errors import ConfigError
from wsipipe.training.colour import (
    Blur,
    BoxBlur,
    Coarsen,
    Hue,
    Jitter,
    Jpeg,
    Noise,
    Stain,
    Step,
    Superpixels,
    Tone,
    ZoomBlur,
)
from wsipipe.training.spatial import Geometry

Rng = np.random.Generator
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recipe:
    """A geometry and the colour steps in their order, each taken with its own probability."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    geometry: Geometry
    colour: tuple[Step, ...] = ()

    def recolour(self, image: Array, rng: Rng) -> Array:
        """The image after the colour steps, (H, W, 3) uint8; the one passed in is not changed."""
        for step in self.colour:
            if rng.random() < step.p:
                image = step.apply(image, rng)
        return image


def plain_recipe(mpp: float) -> Recipe:
    """Crops at random places at `mpp`, and nothing else."""
    return Recipe(Geometry((mpp, mpp), (mpp, mpp), quarter_turn_p=0, flip_p=0))


RECIPES: dict[str, Recipe] = {
    # Ours: scanners, stains and resolutions that the training data do not hold.
    "default": Recipe(
        Geometry(
            near_mpp=(0.2, 0.31),
            far_mpp=(0.17, 0.47),
            far_p=0.3,
            rotate_p=0.3,
            rotate_degrees=45,
            wave_p=0.15,
            wave_px=2.0,
        ),
        (
            Stain(p=0.7),
            Tone(p=0.6),
            Hue(p=0.3),
            Coarsen(p=0.15),
            Blur(p=0.2),
            Noise(p=0.25),
            Jpeg(p=0.3),
        ),
    ),
    # CellVTA and CellViT (albumentations 1.3.0), pinned by effect: patches as they are. Geometry comes
    # first here; there, the blurs and the noise come before the crop. The elastic displacement of alpha 0.5 over a
    # Gaussian of 25 px moves nothing by more than a hundredth of a pixel and is left out; its affine part is here.
    "published": Recipe(
        Geometry(
            quarter_turn_p=0.2,
            flip_p=0.2,
            zoom_p=0.2,
            zoom=(0.5, 1.0),
            corner_p=0.2,
            corner_px=15,
        ),
        (
            BoxBlur(p=0.2),
            Noise(p=0.5, variance=(0.0, 10.0)),
            Jitter(p=0.2, brightness=0.25, contrast=0.25, saturation=0.1, degrees=18),
            Superpixels(p=0.1),
            ZoomBlur(p=0.1),
        ),
    ),
}


def load_recipe(value: str | dict[str, Any]) -> Recipe:
    """Recipe of a name in `RECIPES`, or written out as YAML gives it.

    Raises
    ------
    ConfigError
        If the name is unknown, or with every key or value that does not fit.
    """
    if isinstance(value, str):
        if value not in RECIPES:
            raise ConfigError(f"no augmentation recipe is called {value!r}; there are: {', '.join(RECIPES)}")
        return RECIPES[value]
    try:
        return TypeAdapter(Recipe).validate_python(value)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg'].lower()}" for f in error.errors())
        raise ConfigError(f"the augmentation recipe: {faults}") from error
