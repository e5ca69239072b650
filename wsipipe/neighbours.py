"""How crowded it is round each nucleus: neighbours within a reach, and the nearest one however far it is.

Centres come in rows, strips of the slide from top to bottom, of which only a few are held at a time. The figures are
those of the whole slide all the same.
"""

from collections.abc import Callable, Collection
from math import ceil

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from wsipipe.compiled import compiled

Points = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


class Neighbourhood:
    """The centres of a slide, row by row.

    Parameters
    ----------
    rows : collection of int
        The rows that hold any; row r is the strip of y from r * `height` up to (r + 1) * `height`.
    centres : function
        Number of a row -> its centres (N, 2) as (x, y), in the unit of `height`; called again where it is needed
        again.
    height, reach : float
        Height of a row; up to what distance, that included, another nucleus is a neighbour.
    """

    def __init__(self, rows: Collection[int], centres: Callable[[int], Points], height: float, reach: float) -> None:
        self._rows = sorted(rows)
        self._centres, self._height, self._reach = centres, height, reach
        self._held: dict[int, Points] = {}

    def of_row(self, row: int) -> tuple[Ints, Points]:
        """For each nucleus of a row, in their order: its neighbours, and the distance to the nearest (inf if alone)."""
        span = ceil(self._reach / self._height)
        around = [other for other in self._rows if abs(other - row) <= span]
        self._held = {other: self._held[other] if other in self._held else self._centres(other) for other in around}
        first = sum(len(self._held[other]) for other in around if other < row)
        centres = self._held[row]
        window = np.concatenate([self._held[other] for other in around])
        counts, nearest = count_neighbours(window, first, first + len(centres), self._reach)
        lone = np.flatnonzero(np.isinf(nearest))
        if lone.size:
            nearest[lone] = self._nearest(centres[lone], row)
        return counts, nearest

    def _nearest(self, lone: Points, row: int) -> Points:
        """Distance to the nearest other nucleus of any row, nearby rows first, until the rest is farther away."""
        nearest = np.full(len(lone), np.inf)
        for other in sorted(self._rows, key=lambda candidate: abs(candidate - row)):
            if (abs(other - row) - 1) * self._height >= nearest.max():
                break
            tree = cKDTree(self._held[other] if other in self._held else self._centres(other))
            nth = [2] if other == row else [1]  # in its own row a nucleus is itself the nearest
            nearest = np.minimum(nearest, tree.query(lone, nth)[0][:, 0])
        return nearest


def count_neighbours(points: Points, first: int, stop: int, reach: float) -> tuple[Ints, Points]:
    """Neighbours of the points from row `first` up to `stop` among all `points` (N, 2), no farther than `reach`.

    Returns
    -------
    (stop - first,) int32
        Their number, the point itself not counted.
    (stop - first,) float64
        Distance to the nearest of them; inf where there is none. The order of the points changes neither.

    Examples
    --------
    >>> count_neighbours(np.array([[0.0, 0.0], [3.0, 4.0], [9.0, 0.0]]), 0, 3, 5.0)
    (array([1, 1, 0], dtype=int32), array([ 5.,  5., inf]))
    """
    if not len(points):
        return np.zeros(0, np.int32), np.zeros(0)
    corner = points.min(0)
    cell = np.floor((points - corner) / reach).astype(np.int64)
    columns, rows = cell.max(0) + 3  # a frame of empty cells saves the question of the border
    number = (cell[:, 1] + 1) * columns + cell[:, 0] + 1
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(columns * rows + 1))
    return _count(points[order, 0], points[order, 1], order, number[order], starts, columns, first, stop, reach)


@compiled
def _count(
    x: Points,
    y: Points,
    place: npt.NDArray[np.int64],
    cell: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    columns: int,
    first: int,
    stop: int,
    reach: float,
) -> tuple[Ints, Points]:
    """Points sorted by square cells of side `reach`: what may be near lies in three runs of three cells each."""
    counts, nearest = np.zeros(stop - first, np.int32), np.full(stop - first, np.inf)
    farthest = reach * reach
    for i in range(x.size):
        if not first <= place[i] < stop:
            continue
        count, least = -1, np.inf  # it counts itself
        for step in (-columns, 0, columns):
            begin, end = starts[cell[i] + step - 1], starts[cell[i] + step + 2]
            for j in range(begin, end):
                away = (x[j] - x[i]) ** 2 + (y[j] - y[i]) ** 2
                count += away <= farthest
                if j != i and away < least:
                    least = away
        counts[place[i] - first] = count
        if least <= farthest:
            nearest[place[i] - first] = np.sqrt(least)
    return counts, nearest
