"""What a scanner, a stain and a file may do to the colours of a crop, step by step; masks are none of their business.

Images are (H, W, 3) uint8 RGB throughout. Every draw comes from the generator that is passed.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from wsipipe.training.bounds import Chance, Count, Factors, OddSides, PositiveRange, Quality, Range, Strength

Rng = np.random.Generator
Array = npt.NDArray[Any]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Stain:
    """More or less of each dye: haematoxylin, eosin and the rest (the DAB axis) are multiplied and shifted.

    Optical density is split by scikit-image's HED matrix (Ruifrok and Johnston 2001), each part is scaled by a normal
    draw around 1 of standard deviation `scale` (log) and shifted by one around 0 of `shift` (density of a dye that
    absorbs 1 - 1/e), and put together again: one 3 x 3 matrix. Shifts act on what is stained, not on bare glass:
    they grow with density from 0 and are full from a density of about 0.3.
    Tellez et al. 2018, doi:10.1109/TMI.2018.2820199.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["stain"] = "stain"
    p: Chance = 1.0
    scale: Strength = 0.2
    shift: Strength = 0.03

    def apply(self, image: Array, rng: Rng) -> Array:
        mix, unmix = _stain_matrices()
        factors = np.exp(rng.normal(0, self.scale, 3))
        shift = rng.normal(0, self.shift, 3) @ mix
        density = cv2.LUT(image, _DENSITY)
        matrix = (unmix @ np.diag(factors) @ mix).T
        changed = cv2.transform(density, matrix.astype(np.float32))
        stained = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), _STAINED)
        return _to_uint8(256 * cv2.exp(-changed - stained[..., None] * shift.astype(np.float32)) - 1)


@dataclass(frozen=True)
class Tone:
    """Brightness, contrast (around the mean grey), gamma and white balance: one curve a channel, drawn uniformly +-."""

    __pydantic_config__ = _STRICT
    kind: Literal["tone"] = "tone"
    p: Chance = 1.0
    brightness: Strength = 0.15
    contrast: Strength = 0.2
    gamma: Strength = 0.2
    balance: Strength = 0.05

    def apply(self, image: Array, rng: Rng) -> Array:
        brightness, contrast = 1 + rng.uniform(-1, 1, 2) * (self.brightness, self.contrast)
        gamma = np.exp(rng.uniform(-self.gamma, self.gamma))
        balance = 1 + rng.uniform(-self.balance, self.balance, 3)
        mean = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()
        levels = 255 * (np.arange(256) / 255) ** gamma
        curve = (levels - mean) * contrast + mean
        table = _to_uint8(curve[:, None] * brightness * balance)
        return cv2.LUT(image, table[None])


@dataclass(frozen=True)
class Hue:
    """Hue turned by up to `degrees`, saturation multiplied by 1 +- `saturation`: a linear map round the grey axis."""

    __pydantic_config__ = _STRICT
    kind: Literal["hue"] = "hue"
    p: Chance = 1.0
    degrees: Strength = 12.0
    saturation: Strength = 0.25

    def apply(self, image: Array, rng: Rng) -> Array:
        angle = np.deg2rad(rng.uniform(-self.degrees, self.degrees))
        saturation = 1 + rng.uniform(-self.saturation, self.saturation)
        c, s = saturation * np.cos(angle), saturation * np.sin(angle)
        luma_chroma = np.diag([1, 1, 1]).astype(float)
        luma_chroma[1:, 1:] = [[c, -s], [s, c]]
        return cv2.transform(image, (np.linalg.inv(_YIQ) @ luma_chroma @ _YIQ).astype(np.float32))


@dataclass(frozen=True)
class Jitter:
    """Tone and hue of one draw: brightness, contrast, `saturation` and hue (by up to `degrees`), uniformly +-."""

    __pydantic_config__ = _STRICT
    kind: Literal["jitter"] = "jitter"
    p: Chance = 1.0
    brightness: Strength = 0.25
    contrast: Strength = 0.25
    saturation: Strength = 0.1
    degrees: Strength = 18.0

    def apply(self, image: Array, rng: Rng) -> Array:
        toned = Tone(brightness=self.brightness, contrast=self.contrast, gamma=0, balance=0).apply(image, rng)
        return Hue(degrees=self.degrees, saturation=self.saturation).apply(toned, rng)


@dataclass(frozen=True)
class Blur:
    """Out of focus: a Gaussian of `sigma_px`, or as often a disc of twice that radius (defocus)."""

    __pydantic_config__ = _STRICT
    kind: Literal["blur"] = "blur"
    p: Chance = 1.0
    sigma_px: PositiveRange = (0.4, 1.8)

    def apply(self, image: Array, rng: Rng) -> Array:
        sigma, disc = rng.uniform(*self.sigma_px), rng.random() < 0.5
        return cv2.filter2D(image, -1, _disc(2 * sigma)) if disc else cv2.GaussianBlur(image, (0, 0), sigma)


@dataclass(frozen=True)
class BoxBlur:
    """Mean over a square whose side is drawn from `sides_px`, all odd."""

    __pydantic_config__ = _STRICT
    kind: Literal["box_blur"] = "box_blur"
    p: Chance = 1.0
    sides_px: OddSides = (3, 5, 7, 9)

    def apply(self, image: Array, rng: Rng) -> Array:
        side = int(rng.choice(self.sides_px))
        return cv2.blur(image, (side, side))


@dataclass(frozen=True)
class Noise:
    """Normal noise in each channel; its variance, grey levels squared, is drawn uniformly."""

    __pydantic_config__ = _STRICT
    kind: Literal["noise"] = "noise"
    p: Chance = 1.0
    variance: Range = (4.0, 80.0)

    def apply(self, image: Array, rng: Rng) -> Array:
        sigma = np.float32(np.sqrt(rng.uniform(*self.variance)))
        noise = rng.standard_normal(image.shape, np.float32) * sigma
        return cv2.add(image, noise, dtype=cv2.CV_8U)


@dataclass(frozen=True)
class Jpeg:
    """Written and read as JPEG of a quality drawn uniformly."""

    __pydantic_config__ = _STRICT
    kind: Literal["jpeg"] = "jpeg"
    p: Chance = 1.0
    quality: Quality = (35, 92)

    def apply(self, image: Array, rng: Rng) -> Array:
        quality = int(rng.integers(self.quality[0], self.quality[1], endpoint=True))
        _, code = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        return np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR_RGB))


@dataclass(frozen=True)
class Coarsen:
    """Scanned at a lower resolution: reduced by a factor drawn uniformly, and enlarged again."""

    __pydantic_config__ = _STRICT
    kind: Literal["coarsen"] = "coarsen"
    p: Chance = 1.0
    factor: Factors = (1.3, 2.2)

    def apply(self, image: Array, rng: Rng) -> Array:
        height, width = image.shape[:2]
        factor = rng.uniform(*self.factor)
        size = max(1, round(width / factor)), max(1, round(height / factor))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class Superpixels:
    """About `segments` patches of like colour (SLIC on at most `max_px` a side); each is flattened with `share`."""

    __pydantic_config__ = _STRICT
    kind: Literal["superpixels"] = "superpixels"
    p: Chance = 1.0
    share: Chance = 0.1
    segments: Count = 200
    max_px: Count = 128

    def apply(self, image: Array, rng: Rng) -> Array:
        from skimage.segmentation import slic

        height, width = image.shape[:2]
        factor = min(1.0, self.max_px / max(height, width))
        small = cv2.resize(image, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_LINEAR)
        patches = slic(small, n_segments=self.segments, compactness=10, start_label=0)
        counts = np.bincount(patches.ravel())
        means = np.stack([np.bincount(patches.ravel(), small[..., c].ravel()) for c in range(3)], 1) / counts[:, None]
        flat = (rng.random(len(counts)) < self.share)[patches]
        small[flat] = _to_uint8(means)[patches[flat]]
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class ZoomBlur:
    """Mean of the image and ever closer looks at its middle, up to a factor drawn from `factor`, in drawn steps."""

    __pydantic_config__ = _STRICT
    kind: Literal["zoom_blur"] = "zoom_blur"
    p: Chance = 1.0
    factor: Factors = (1.0, 1.05)
    step: PositiveRange = (0.01, 0.03)

    def apply(self, image: Array, rng: Rng) -> Array:
        height, width = image.shape[:2]
        centre = ((width - 1) / 2, (height - 1) / 2)
        zooms = np.arange(1.0, rng.uniform(*self.factor), rng.uniform(*self.step))
        looks = [image] + [
            cv2.warpAffine(
                image, cv2.getRotationMatrix2D(centre, 0, z), (width, height), borderMode=cv2.BORDER_REFLECT_101
            )
            for z in zooms
        ]
        return _to_uint8(np.stack(looks).mean(axis=0, dtype=np.float32))


Step = Annotated[
    Stain | Tone | Hue | Jitter | Blur | BoxBlur | Noise | Jpeg | Coarsen | Superpixels | ZoomBlur,
    Field(discriminator="kind"),
]


def dyes_mixed(image: Array, mixing: Array) -> Array:
    """The image as if its dyes were others: rows of `mixing` (3, 3) say what haematoxylin, eosin and DAB become."""
    mix, unmix = _stain_matrices()
    changed = cv2.transform(cv2.LUT(image, _DENSITY), (unmix @ mixing @ mix).T.astype(np.float32))
    return _to_uint8(256 * cv2.exp(-changed) - 1)


@cache
def _stain_matrices() -> tuple[Array, Array]:
    """Dyes to RGB density and back: rows are haematoxylin, eosin, DAB."""
    from skimage.color import hed_from_rgb, rgb_from_hed

    return np.asarray(rgb_from_hed), np.asarray(hed_from_rgb)


def _disc(radius: float) -> Array:
    """Disc with a soft edge, sum 1."""
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    normed: Array = disc / disc.sum()
    return normed


def _to_uint8(values: Array) -> Array:
    """Rounded and held within 0 to 255."""
    levels: Array = cv2.convertScaleAbs(np.maximum(values, 0))
    return levels


_DENSITY = (-np.log((np.arange(256) + 1) / 256)).astype(np.float32)  # of a grey level; +1 keeps black finite
_STAINED = np.clip(_DENSITY / 0.3, 0, 1)
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
