"""How sharp a slide is where there is tissue: measured at a few places, the same ones every time."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from skimage.measure import blur_effect

from wsipipe.geometry import Box, Grid
from wsipipe.tissue import TissueMask

MPP = 0.5  # µm/px at which it is measured, so that 20x and 40x scans compare
PLACES = 24
SIDE = 256  # px
# `blur_effect` of skimage, 0 sharp to 1 without any detail. At places of three scans of H&E that look sharp it is 0.21
# to 0.46. Its median rises to 0.30 to 0.52 if they are blurred by 0.5 µm (a standard deviation), to 0.46 to 0.64 by 1.
BLURRED = 0.5


@dataclass(frozen=True, slots=True)
class Focus:
    """Blur at places within the tissue, 0 to 1 each (Crete et al. 2007, doi:10.1117/12.702790)."""

    blur: tuple[float, ...]

    @property
    def median(self) -> float | None:
        return float(np.median(self.blur)) if self.blur else None

    @property
    def blurred(self) -> int:
        """Places that are out of focus."""
        return sum(blur > BLURRED for blur in self.blur)


def measure_focus(tissue: TissueMask, grid: Grid, read: Callable[[Box, Grid], npt.NDArray[np.uint8]]) -> Focus:
    """The focus of a slide.

    Parameters
    ----------
    grid : Grid
        Of the slide, at `MPP`.
    read : callable
        (box, grid) -> (H, W, 3) uint8.
    """
    rows, columns = np.nonzero(tissue.mask)
    picks = np.unique(np.linspace(0, max(0, len(rows) - 1), PLACES).round().astype(int))[: len(rows)]
    blur = []
    for pick in picks:
        x, y = grid.from_px0(tissue.grid.to_px0((columns[pick] + 0.5, rows[pick] + 0.5))).astype(int)
        box = Box(x - SIDE // 2, y - SIDE // 2, x + SIDE // 2, y + SIDE // 2).clipped(grid.box)
        if min(box.shape) < 32:  # too little to tell, as for a picture of a few nuclei
            continue
        grey = read(box, grid).mean(axis=2)
        if np.ptp(grey):
            blur.append(float(blur_effect(grey)))
    return Focus(tuple(blur))
