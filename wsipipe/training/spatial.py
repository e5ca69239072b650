"""Where each pixel of a crop comes from: placed, turned, bent and zoomed.

It is one field of source positions. The image is read at them by interpolation and every mask by the nearest pixel, so
the two cannot part. Every draw comes from the generator that is passed.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict

from wsipipe.training.bounds import Chance, PositiveRange, Strength

Rng = np.random.Generator
Array = npt.NDArray[Any]


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

    __pydantic_config__ = ConfigDict(extra="forbid")

    near_mpp: PositiveRange | None = None
    far_mpp: PositiveRange | None = None
    far_p: Chance = 0.0
    quarter_turn_p: Chance = 1.0
    flip_p: Chance = 0.5
    rotate_p: Chance = 0.0
    rotate_degrees: Strength = 0.0
    zoom_p: Chance = 0.0
    zoom: PositiveRange = (1.0, 1.0)
    corner_p: Chance = 0.0
    corner_px: Strength = 0.0
    wave_p: Chance = 0.0
    wave_px: Strength = 0.0


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


def _log_uniform(span: tuple[float, float], rng: Rng) -> float:
    return float(np.exp(rng.uniform(*np.log(span))))
