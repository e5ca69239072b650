"""Boxes of pixels, and the one transform between working pixels, level-0 pixels and micrometres.

Pixel (i, j) of any grid covers the square [j, j + 1) x [i, i + 1); x runs right, y down. Points are
(x, y) and name a place on that plane, so the centre of the pixel (i, j) is (j + 0.5, i + 0.5).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Relative. Scanners round mpp, and x and y differ by a little: within it, a resolution that is a power
# of two away from the slide's own is taken as exactly that power, so that pixels fall onto pixels.
MPP_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open rectangle of whole pixels; it may reach beyond the slide."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width), as numpy says it."""
        return self.height, self.width

    @property
    def is_empty(self) -> bool:
        return self.x1 <= self.x0 or self.y1 <= self.y0

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of this box in an array that starts at the origin: ``array[..., *box.slices]``."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def grown(self, px: int) -> "Box":
        return Box(self.x0 - px, self.y0 - px, self.x1 + px, self.y1 + px)

    def clipped(self, to: "Box") -> "Box":
        """The part of this box within `to`; empty (zero width or height) where they do not meet."""
        x0, y0 = max(self.x0, to.x0), max(self.y0, to.y0)
        return Box(x0, y0, max(x0, min(self.x1, to.x1)), max(y0, min(self.y1, to.y1)))

    def within(self, origin: "Box") -> "Box":
        """This box in pixels counted from the upper left corner of `origin`."""
        return Box(self.x0 - origin.x0, self.y0 - origin.y0, self.x1 - origin.x0, self.y1 - origin.y0)

    def owns(self, x: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """True for points inside; of boxes that partition the plane exactly one owns a point."""
        x, y = np.asarray(x), np.asarray(y)
        return (x >= self.x0) & (x < self.x1) & (y >= self.y0) & (y < self.y1)


@dataclass(frozen=True, slots=True)
class Grid:
    """The pixels of a slide at one resolution, and where they lie at level 0 and in micrometres.

    Grid and level 0 share their origin. `scale` is level-0 pixels per pixel of this grid; `mpp_x0` and
    `mpp_y0` are µm per level-0 pixel. All of it is float64 and exact both ways: nobody else multiplies.
    """

    width: int
    height: int
    scale_x: float
    scale_y: float
    mpp_x0: float
    mpp_y0: float

    @classmethod
    def over(cls, width_px0: int, height_px0: int, mpp_x0: float, mpp_y0: float, mpp: float) -> "Grid":
        """The grid at `mpp` over a slide of `width_px0` x `height_px0` level-0 pixels.

        Within `MPP_TOLERANCE` of a power of two of the slide's resolution that power is used instead.
        """
        ratio = mpp / math.sqrt(mpp_x0 * mpp_y0)
        power = 2.0 ** round(math.log2(ratio))
        if abs(ratio / power - 1) <= MPP_TOLERANCE and abs(mpp_x0 / mpp_y0 - 1) <= 2 * MPP_TOLERANCE:
            scale_x = scale_y = power
        else:
            scale_x, scale_y = mpp / mpp_x0, mpp / mpp_y0
        width, height = max(1, round(width_px0 / scale_x)), max(1, round(height_px0 / scale_y))
        return cls(width, height, scale_x, scale_y, mpp_x0, mpp_y0)

    @property
    def box(self) -> Box:
        return Box(0, 0, self.width, self.height)

    @property
    def mpp_x(self) -> float:
        return self.scale_x * self.mpp_x0

    @property
    def mpp_y(self) -> float:
        return self.scale_y * self.mpp_y0

    @property
    def mpp(self) -> float:
        """µm per pixel of this grid: the geometric mean of both axes, right for areas."""
        return math.sqrt(self.mpp_x * self.mpp_y)

    @property
    def pixel_um2(self) -> float:
        return self.mpp_x * self.mpp_y

    def to_px0(self, xy: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points (..., 2) of this grid at level 0."""
        return np.asarray(xy, np.float64) * (self.scale_x, self.scale_y)

    def from_px0(self, xy: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Level-0 points (..., 2) on this grid."""
        return np.asarray(xy, np.float64) / (self.scale_x, self.scale_y)

    def to_um(self, xy: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points (..., 2) of this grid in µm from the slide's origin."""
        return np.asarray(xy, np.float64) * (self.mpp_x, self.mpp_y)


def partition(whole: Box, side: int) -> Iterator[Box]:
    """Squares of `side` px that cover `whole` once, row by row; the last ones are cut to fit."""
    if side < 1:
        raise ValueError(f"a side of {side} px covers nothing; it must be at least 1")
    for y in range(whole.y0, whole.y1, side):
        for x in range(whole.x0, whole.x1, side):
            yield Box(x, y, min(x + side, whole.x1), min(y + side, whole.y1))
