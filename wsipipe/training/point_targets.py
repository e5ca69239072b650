"""What PointNu-Net is trained to say of a patch: at which cell of a grid each nucleus has its centre."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage


def point_targets(
    instance_map: npt.NDArray[np.integer[Any]],
    types: npt.NDArray[np.integer[Any]],
    classes: int,
    *,
    stride: int = 4,
    overlap: float = 0.3,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Heat maps of the types, and the cells of the nuclei.

    Parameters
    ----------
    instance_map : (S, S) int
        0 background, else 1, 2, ... in order of the nuclei.
    types : (N,) int
        Of each nucleus, 0 to `classes` - 1: background is none.
    overlap : float
        IoU that a box moved by the radius still has with its own.

    Returns
    -------
    heat : (`classes`, S / stride, S / stride) float32
        1 at the cell of a nucleus, a Gaussian round it. The highest counts where nuclei are close.
    cells : (N, 4) int
        Number of the nucleus, row, column, radius in px; rows in order of the numbers.

    Notes
    -----
    As published for PanNuke (Kaiseem/PointNu-Net): one positive cell a nucleus. Radii are those of CornerNet (Law and
    Deng 2018, arXiv 1808.01244) with its division of all three roots by 2.
    """
    grid = instance_map.shape[0] // stride
    heat = np.zeros((classes, grid, grid), np.float32)
    cells = []
    for number, place in enumerate(ndimage.find_objects(instance_map), 1):
        if place is None:
            continue
        height, width = (side.stop - side.start for side in place)
        row = int((place[0].start + height / 2) / instance_map.shape[0] * grid)
        column = int((place[1].start + width / 2) / instance_map.shape[1] * grid)
        radius = corner_radius(height, width, overlap)
        _splash(heat[types[number - 1]], row, column, radius / stride)
        heat[types[number - 1], row, column] = 1
        cells.append((number, row, column, int(radius)))
    return heat, np.array(cells, np.int64).reshape(-1, 4)


def corner_radius(height: float, width: float, overlap: float) -> float:
    """How far two opposite corners of a box may move with `overlap` left, whichever way they move."""
    total, area, o = height + width, height * width, overlap
    one = (total - math.sqrt(total**2 - 4 * area * (1 - o) / (1 + o))) / 2
    two = (2 * total - math.sqrt(4 * total**2 - 16 * (1 - o) * area)) / 2
    three = (-2 * o * total + math.sqrt(4 * o**2 * total**2 - 16 * o * (o - 1) * area)) / 2
    return min(one, two, three)


def _splash(heat: npt.NDArray[np.float32], row: int, column: int, radius: float) -> None:
    """Raise a map to a Gaussian of three standard deviations a radius."""
    reach = int(radius) + 1
    sigma = max(radius / 3, 1e-6)
    along = np.arange(-reach, reach + 1)
    bell = np.exp(-(along[:, None] ** 2 + along**2) / (2 * sigma**2)).astype(np.float32)
    y0, x0 = max(row - reach, 0), max(column - reach, 0)
    part = heat[y0 : row + reach + 1, x0 : column + reach + 1]
    top, left = y0 - (row - reach), x0 - (column - reach)
    np.maximum(part, bell[top : top + part.shape[0], left : left + part.shape[1]], out=part)
