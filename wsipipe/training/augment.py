"""What a training image may look like: geometry first, then colour.

Geometry is one field of source positions. The image is read at them by interpolation and every mask by the nearest
pixel, so the two cannot part. Colour steps change an image only. Every draw comes from the generator that is passed.
A recipe is plain data with a probability (`p`) for each step, and can be written in YAML (`load_recipe`).

Images are (H, W, 3) uint8 RGB throughout.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from wsipipe.errors import ConfigError

Range = tuple[float, float]
Rng = np.random.Generator
Array = npt.NDArray[Any]
_STRICT = ConfigDict(extra="forbid")


# --- geometry ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How a crop is placed, turned and bent.

    Attributes
    ----------
    near_mpp, far_mpp : two floats
        The crop's resolution is drawn log-uniformly from `near_mpp`, or with probability `far_p` from `far_mpp`, µm/px.
        None: at the resolution of the network.
    quarter_turn_p, flip_p
        A rotation by 0 to 3 quarter turns (all four equally likely); each of the two flips.
    rotate_p, rotate_degrees
        A free rotation of up to so many degrees either way.
    zoom_p, zoom
        A closer look: the side of what is seen is multiplied by a factor drawn uniformly from `zoom`.
    corner_p, corner_px
        An affine map that moves three points of the crop by up to so many px in x and y.
    wave_p, wave_px
        A smooth random displacement (a 5 x 5 grid of normal draws, interpolated) of this standard deviation, px.
    """

    __pydantic_config__ = _STRICT

    near_mpp: Range | None = None
    far_mpp: Range | None = None
    far_p: float = 0.0
    quarter_turn_p: float = 1.0
    flip_p: float = 0.5
    rotate_p: float = 0.0
    rotate_degrees: float = 0.0
    zoom_p: float = 0.0
    zoom: Range = (1.0, 1.0)
    corner_p: float = 0.0
    corner_px: float = 0.0
    wave_p: float = 0.0
    wave_px: float = 0.0


@dataclass(frozen=True)
class SourceField:
    """Where each pixel of a crop comes from: x and y of the source, (S, S) float32, 0 = centre of the first pixel.

    `shrink` is how many source pixels one crop pixel spans: above 1 the image is smoothed first, or it would alias.
    """

    x: Array
    y: Array
    shrink: float

    def read_image(self, image: Array) -> Array:
        """Crop of an (H, W, 3) uint8 image, bilinear; beyond the border the image is mirrored."""
        height, width = image.shape[:2]
        x0, x1 = _span(self.x, width)
        y0, y1 = _span(self.y, height)
        window = np.ascontiguousarray(image[y0:y1, x0:x1])
        if self.shrink > 1:
            window = cv2.GaussianBlur(window, (0, 0), 0.5 * np.sqrt(self.shrink**2 - 1) + 1e-3)
        crop: Array = cv2.remap(window, self.x - x0, self.y - y0, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        return crop

    def read_mask(self, mask: Array) -> Array:
        """Crop of an (H, W) mask of any dtype: the value of the nearest pixel, mirrored beyond the border."""
        height, width = mask.shape
        crop: Array = mask[_mirrored(self.y, height), _mirrored(self.x, width)]
        return crop


def _span(positions: Array, size: int) -> tuple[int, int]:
    """Part of an axis that `positions` and their interpolation need; the mirror at a border must stay the image's."""
    margin = 8
    low, high = int(positions.min()) - margin, int(positions.max()) + margin + 1
    return (0, size) if low < 0 or high > size else (low, high)


def _mirrored(positions: Array, size: int) -> Array:
    nearest: Array = np.rint(positions).astype(np.int64)
    if nearest.min() >= 0 and nearest.max() < size:
        return nearest
    period = max(2 * (size - 1), 1)
    within = np.abs(nearest) % period
    mirrored: Array = np.minimum(within, period - within)
    return mirrored


def draw_field(
    geometry: Geometry, shape: tuple[int, int], mpp: float, crop_px: int, rng: Rng, crop_mpp: float | None = None
) -> SourceField:
    """Draw where a crop of `crop_px` a side comes from in an image of `shape` (H, W) at `mpp`.

    Where the geometry names no resolution, it is `crop_mpp`, or else that of the image. What is seen never exceeds the
    image: where it would, the crop is taken finer than drawn, and is not rotated freely.
    """
    span = geometry.far_mpp if rng.random() < geometry.far_p else geometry.near_mpp
    drawn = _log_uniform(span, rng) if span else mpp if crop_mpp is None else crop_mpp
    seen = crop_px * drawn / mpp
    if rng.random() < geometry.zoom_p:
        seen *= rng.uniform(*geometry.zoom)
    seen = min(seen, *shape)

    angle = 0.0
    if rng.random() < geometry.rotate_p:
        angle = np.deg2rad(rng.uniform(-geometry.rotate_degrees, geometry.rotate_degrees))
    reach = seen * (abs(np.cos(angle)) + abs(np.sin(angle)))
    if reach > min(shape):
        angle, reach = 0.0, seen

    centre_y, centre_x = (rng.uniform(reach / 2, side - reach / 2) - 0.5 for side in shape)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if rng.random() < geometry.quarter_turn_p:
        turn = turn @ np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), int(rng.integers(4)))
    flips = rng.random(2) < geometry.flip_p
    turn = turn @ np.diag(np.where(flips, -1, 1))

    steps = np.arange(crop_px, dtype=np.float32) - (crop_px - 1) / 2
    x, y = np.meshgrid(steps, steps)
    if rng.random() < geometry.corner_p:
        x, y = _move_corners(x, y, geometry.corner_px, rng)
    if rng.random() < geometry.wave_p:
        waves = rng.normal(0, geometry.wave_px, (2, 5, 5)).astype(np.float32)
        dx, dy = (cv2.resize(wave, (crop_px, crop_px), interpolation=cv2.INTER_CUBIC) for wave in waves)
        x, y = x + dx, y + dy
    scale = seen / crop_px
    (a, b), (c, d) = (turn * scale).astype(np.float32)
    return SourceField(a * x + b * y + np.float32(centre_x), c * x + d * y + np.float32(centre_y), scale)


def _move_corners(x: Array, y: Array, by_px: float, rng: Rng) -> tuple[Array, Array]:
    """The affine map that moves three points, a third of the side from the centre, each by up to `by_px`."""
    third = len(x) // 3
    points = np.array([[third, third], [third, -third], [-third, -third]], np.float32)
    moved = points + rng.uniform(-by_px, by_px, (3, 2)).astype(np.float32)
    (a, b, e), (c, d, f) = cv2.getAffineTransform(moved, points).astype(np.float32)
    return a * x + b * y + e, c * x + d * y + f


def _log_uniform(span: Range, rng: Rng) -> float:
    return float(np.exp(rng.uniform(*np.log(span))))


# --- colour -----------------------------------------------------------------------------------------------------------


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
    p: float = 1.0
    scale: float = 0.2
    shift: float = 0.03

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
    p: float = 1.0
    brightness: float = 0.15
    contrast: float = 0.2
    gamma: float = 0.2
    balance: float = 0.05

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
    p: float = 1.0
    degrees: float = 12.0
    saturation: float = 0.25

    def apply(self, image: Array, rng: Rng) -> Array:
        angle = np.deg2rad(rng.uniform(-self.degrees, self.degrees))
        saturation = 1 + rng.uniform(-self.saturation, self.saturation)
        c, s = saturation * np.cos(angle), saturation * np.sin(angle)
        luma_chroma = np.diag([1, 1, 1]).astype(float)
        luma_chroma[1:, 1:] = [[c, -s], [s, c]]
        return cv2.transform(image, (np.linalg.inv(_YIQ) @ luma_chroma @ _YIQ).astype(np.float32))


@dataclass(frozen=True)
class Blur:
    """Out of focus: a Gaussian of `sigma_px`, or as often a disc of twice that radius (defocus)."""

    __pydantic_config__ = _STRICT
    kind: Literal["blur"] = "blur"
    p: float = 1.0
    sigma_px: Range = (0.4, 1.8)

    def apply(self, image: Array, rng: Rng) -> Array:
        sigma, disc = rng.uniform(*self.sigma_px), rng.random() < 0.5
        return cv2.filter2D(image, -1, _disc(2 * sigma)) if disc else cv2.GaussianBlur(image, (0, 0), sigma)


@dataclass(frozen=True)
class BoxBlur:
    """Mean over a square whose side is drawn from `sides_px`, all odd."""

    __pydantic_config__ = _STRICT
    kind: Literal["box_blur"] = "box_blur"
    p: float = 1.0
    sides_px: tuple[int, ...] = (3, 5, 7, 9)

    def apply(self, image: Array, rng: Rng) -> Array:
        side = int(rng.choice(self.sides_px))
        return cv2.blur(image, (side, side))


@dataclass(frozen=True)
class Noise:
    """Normal noise in each channel; its variance, grey levels squared, is drawn uniformly."""

    __pydantic_config__ = _STRICT
    kind: Literal["noise"] = "noise"
    p: float = 1.0
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
    p: float = 1.0
    quality: tuple[int, int] = (35, 92)

    def apply(self, image: Array, rng: Rng) -> Array:
        quality = int(rng.integers(self.quality[0], self.quality[1], endpoint=True))
        _, code = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        return np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR_RGB))


@dataclass(frozen=True)
class Coarsen:
    """Scanned at a lower resolution: reduced by a factor drawn uniformly, and enlarged again."""

    __pydantic_config__ = _STRICT
    kind: Literal["coarsen"] = "coarsen"
    p: float = 1.0
    factor: Range = (1.3, 2.2)

    def apply(self, image: Array, rng: Rng) -> Array:
        height, width = image.shape[:2]
        factor = rng.uniform(*self.factor)
        small = cv2.resize(image, (round(width / factor), round(height / factor)), interpolation=cv2.INTER_AREA)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class Superpixels:
    """About `segments` patches of like colour (SLIC on at most `max_px` a side); each is flattened with `share`."""

    __pydantic_config__ = _STRICT
    kind: Literal["superpixels"] = "superpixels"
    p: float = 1.0
    share: float = 0.1
    segments: int = 200
    max_px: int = 128

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
    p: float = 1.0
    factor: Range = (1.0, 1.05)
    step: Range = (0.01, 0.03)

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
    Stain | Tone | Hue | Blur | BoxBlur | Noise | Jpeg | Coarsen | Superpixels | ZoomBlur, Field(discriminator="kind")
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


# --- recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A geometry and the colour steps in their order, each taken with its own probability."""

    __pydantic_config__ = _STRICT
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
            Tone(p=0.2, brightness=0.25, contrast=0.25, gamma=0, balance=0),
            Hue(p=0.2, degrees=18, saturation=0.1),
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
