"""Whether tiles show in the nuclei that were found: what lies on the seams between them, against what lies elsewhere.

Elsewhere is a line down the middle of the tile before each seam, as long as the seam and half a tile away. What
nuclei look like by nature is the same on both but for where tissue is denser; what cutting does to them is on the seams
alone, be it that the network sees a nucleus otherwise from either side, or that the blocks in which nuclei are found,
whose borders are seams too, were not exact. Density is that on tissue: a piece that two tiles share covers their seam,
but not always their middles.

The density ratio is 1 in the mean wherever nuclei lie without regard to the tiles. From one slide it is as sure as its
standard deviation tells: nuclei come in crowds, and a slide of few tiles has few seams, of which one may run through a
crowd and its line elsewhere through fat. So the deviation is not taken from the number of nuclei alone, but also from
how much the seams of the slide differ among themselves, each against its own line.
"""

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsipipe.geometry import Grid
from wsipipe.tissue import TissueMask

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NEAR_UM = 8.0  # a nucleus lost or doubled at a seam has its centre within about its own width of it
STRAIGHT_UM = 3.0  # by nature few edges of an outline are as long and parallel to an axis
OVERLAP = 0.2  # of the smaller nucleus; outlines of neighbours, simplified each for itself, may overlap by a sliver
ON_LINE_PX = 0.2  # outlines are rounded to 0.1 level-0 px
SURPRISE = 4.0  # standard deviations
TWICE = 0.0025  # of the nuclei on seams, of which down to a quarter lie on borders of blocks and can be doubled
CUT = 0.03  # of them; fewer are not to be seen, and what a network does by itself


@dataclass(frozen=True, slots=True)
class SeamFigures:
    """What was found on seams, and on as many and as long lines elsewhere.

    Attributes
    ----------
    near_um : float
        Up to what distance from a line a centre counts as near it.
    seam_mm : float
        Length of all seams between tiles with tissue.
    near, elsewhere : int
        Centres on tissue near a seam, and near a line elsewhere.
    near_mm2, elsewhere_mm2 : float
        The area of tissue in which they were counted.
    straight, straight_elsewhere : int
        Nuclei with a straight edge, 3 µm or longer, that lies on a seam, or on a line elsewhere.
    crossing : int
        Nuclei whose outline meets a seam.
    overlaps : int
        Pairs of them of which one covers a fifth or more of the smaller.
    seams : int
        Seams of one side of a tile each.
    spread : float
        Standard deviation of the density ratio, from how the seams differ; 0 where there are fewer than two.
    """

    near_um: float = NEAR_UM
    seam_mm: float = 0.0
    near: int = 0
    elsewhere: int = 0
    near_mm2: float = 0.0
    elsewhere_mm2: float = 0.0
    straight: int = 0
    straight_elsewhere: int = 0
    crossing: int = 0
    overlaps: int = 0
    seams: int = 0
    spread: float = 0.0

    @property
    def density_ratio(self) -> float | None:
        """Nuclei per area near seams over those elsewhere; None where there are no seams, or no nuclei elsewhere."""
        if not self.near_mm2 or not self.elsewhere_mm2 or not self.elsewhere:
            return None
        return (self.near / self.near_mm2) / (self.elsewhere / self.elsewhere_mm2)

    @property
    def density_ratio_sd(self) -> float | None:
        """By how much chance moves that ratio, be it that of single nuclei or that of the crowds they come in."""
        ratio = self.density_ratio
        if ratio is None:
            return None
        of_one = self.elsewhere_mm2 / self.near_mm2 / self.elsewhere  # what one nucleus near a seam would make it
        return max(self.spread, max(ratio, of_one) * sqrt(1 / max(1, self.near) + 1 / self.elsewhere))

    @property
    def shows(self) -> bool:
        """True where the seams are to be seen, and beyond chance."""
        ratio, sd = self.density_ratio, self.density_ratio_sd
        return (
            (ratio is not None and sd is not None and abs(ratio - 1) > SURPRISE * max(sd, 0.01))
            or self.straight - self.straight_elsewhere
            > max(SURPRISE * sqrt(self.straight + self.straight_elsewhere), CUT * self.crossing)
            or self.overlaps > TWICE * self.crossing
        )

    def __str__(self) -> str:
        ratio, sd = self.density_ratio, self.density_ratio_sd
        if ratio is None or sd is None:
            return "no seams between tiles to be seen"
        return (
            f"nuclei near seams between tiles {ratio:.3f} ± {sd:.3f} of elsewhere, {self.straight} cut straight there "
            f"({self.straight_elsewhere} elsewhere), {self.overlaps} of {self.crossing} found twice"
        )

    def to_json(self) -> dict[str, Any]:
        """The figures, and those that follow from them."""
        told = {**asdict(self), "density_ratio": self.density_ratio, "density_ratio_sd": self.density_ratio_sd}
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in told.items()}
        return {**rounded, "shows": self.shows}


class SeamCheck:
    """Counts what lies on the seams of a slide; nuclei may come in parts.

    Parameters
    ----------
    grid : Grid
        The working grid.
    side : int
        Of what a tile answers for, working px; tiles begin at the slide's corner.
    wanted : (rows, columns) bool
        Tiles with tissue. A seam is where two of them meet.
    halo_px : int
        How far a nucleus reaches from its centre at most, for overlaps to be found.
    tissue : TissueMask
        Where density is compared.
    """

    def __init__(self, grid: Grid, side: int, wanted: Bools, halo_px: int, tissue: TissueMask) -> None:
        self._grid, self._side, self._halo_px0 = grid, side, halo_px * grid.scale_y
        self._near = min(NEAR_UM / grid.mpp, side / 4)
        framed = np.pad(wanted, 1)
        # for a tile: whether a seam is on its right, left, lower and upper side
        self._right, self._left = wanted & framed[1:-1, 2:], wanted & framed[1:-1, :-2]
        self._below, self._above = wanted & framed[2:, 1:-1], wanted & framed[:-2, 1:-1]
        self._counts = dict.fromkeys(("straight", "straight_elsewhere", "crossing", "overlaps"), 0)
        # centres by axis and by the tile before the seam
        self._near_seam, self._near_middle = np.zeros((2, *wanted.shape), int), np.zeros((2, *wanted.shape), int)
        self._tissue = tissue
        self._held: npt.NDArray[np.object_] = np.empty(0, object)

    def add(self, x_px0: Floats, y_px0: Floats, polygons: npt.NDArray[np.object_], later_px0: float = -np.inf) -> None:
        """Count nuclei by their centres (N,) and outlines (N,), level-0 px; later ones have y >= `later_px0`."""
        centres = self._grid.from_px0(np.stack([x_px0, y_px0], axis=1))
        tiles = self._tiles(centres)
        on_tissue = self._tissue.holds(np.stack([x_px0, y_px0], axis=1))
        self._count_centres((centres - tiles * self._side)[on_tissue], tiles[on_tissue])

        bounds = shapely.bounds(polygons) / np.tile((self._grid.scale_x, self._grid.scale_y), 2)
        for offset, name in ((0, ""), (self._side // 2, "_elsewhere")):
            low, high = bounds[:, :2] - offset - ON_LINE_PX, bounds[:, 2:] - offset + ON_LINE_PX
            meets = np.flatnonzero((np.floor(high / self._side) >= np.ceil(low / self._side)).any(1))
            self._counts["straight" + name] += self._straight(polygons[meets], offset)
        meets = np.flatnonzero(self._crossing(bounds))
        self._counts["crossing"] += meets.size
        self._count_overlaps(polygons[meets])
        self._held = self._held[shapely.bounds(self._held)[:, 3] >= later_px0 - self._halo_px0]

    def figures(self) -> SeamFigures:
        """What was counted so far."""
        seams = np.stack([self._right, self._below])
        by_seam, by_middle = self._near_seam[seams], self._near_middle[seams]
        near_px, elsewhere_px = self._areas(self._side), self._areas(self._side // 2)
        row, column = np.indices(self._right.shape) * self._side
        height, width = (
            np.minimum(self._grid.height - row, self._side),
            np.minimum(self._grid.width - column, self._side),
        )
        seam_um = height[self._right].sum() * self._grid.mpp_y + width[self._below].sum() * self._grid.mpp_x
        return SeamFigures(
            near_um=self._near * self._grid.mpp,
            seam_mm=float(seam_um) / 1e3,
            near=int(by_seam.sum()),
            elsewhere=int(by_middle.sum()),
            near_mm2=float(near_px.sum()) * self._grid.pixel_um2 / 1e6,
            elsewhere_mm2=float(elsewhere_px.sum()) * self._grid.pixel_um2 / 1e6,
            seams=int(seams.sum()),
            spread=_spread(by_seam, by_middle, near_px, elsewhere_px),
            **self._counts,
        )

    def _areas(self, offset: int) -> Floats:
        """Tissue near the lines `offset` px from the corners of the tiles before the seams, px²; by seam."""
        boxes = []
        for axis, seam in ((0, self._right), (1, self._below)):
            corner = np.argwhere(seam)[:, ::-1] * float(self._side)
            low, high = corner.copy(), corner + self._side
            low[:, axis], high[:, axis] = corner[:, axis] + offset - self._near, corner[:, axis] + offset + self._near
            boxes.append(np.stack([low, high]))
        ends = np.minimum(np.concatenate(boxes, axis=1), (self._grid.width, self._grid.height))
        return self._tissue.area_px0(*self._grid.to_px0(ends)) / (self._grid.scale_x * self._grid.scale_y)

    def _tiles(self, places: Floats) -> Longs:
        """(column, row) of the tile of each place on the grid (N, 2)."""
        rows, columns = self._right.shape
        return np.clip(np.floor(places / self._side).astype(np.int64), 0, (columns - 1, rows - 1))

    def _count_centres(self, place: Floats, tiles: Longs) -> None:
        """`place` (N, 2) is counted from the corner of the tile."""
        for axis, before, after in ((0, self._left, self._right), (1, self._above, self._below)):
            at, step = place[:, axis], np.eye(2, dtype=np.int64)[axis]
            for counts, where, owner in (
                (self._near_seam, (at < self._near) & before[tiles[:, 1], tiles[:, 0]], tiles - step),
                (self._near_seam, (at >= self._side - self._near) & after[tiles[:, 1], tiles[:, 0]], tiles),
                (
                    self._near_middle,
                    (np.abs(at - self._side // 2) < self._near) & after[tiles[:, 1], tiles[:, 0]],
                    tiles,
                ),
            ):
                column, row = owner[where].T
                np.add.at(counts[axis], (row, column), 1)

    def _crossing(self, bounds: Floats) -> Bools:
        """Which boxes (N, 4), grid px, meet a seam."""
        first, last = self._tiles(bounds[:, :2] - ON_LINE_PX), self._tiles(bounds[:, 2:] + ON_LINE_PX)
        sideways, down = first[:, 0] < last[:, 0], first[:, 1] < last[:, 1]
        right = self._right[first[:, 1], first[:, 0]] | self._right[last[:, 1], first[:, 0]]
        below = self._below[first[:, 1], first[:, 0]] | self._below[first[:, 1], last[:, 0]]
        crossing: Bools = (sideways & right) | (down & below)
        return crossing

    def _straight(self, polygons: npt.NDArray[np.object_], offset: int) -> int:
        """How many outlines have a straight edge on a line `offset` px from the upper or left end of a tile."""
        points, nucleus = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
        if not len(points):
            return 0
        points = self._grid.from_px0(points)
        same = nucleus[1:] == nucleus[:-1]
        a, b, nucleus = points[:-1][same], points[1:][same], nucleus[1:][same]
        found = np.zeros(len(polygons), bool)
        for axis, seam in ((0, self._right), (1, self._below)):
            line = np.round((a[:, axis] - offset) / self._side)
            at = line * self._side + offset
            on_line = (np.abs(a[:, axis] - at) <= ON_LINE_PX) & (np.abs(b[:, axis] - at) <= ON_LINE_PX)
            long = np.abs(a - b)[:, 1 - axis] * self._grid.mpp >= STRAIGHT_UM
            edges = np.flatnonzero(on_line & long)
            middle = (a[edges] + b[edges]) / 2
            middle[:, axis] = at[edges] - (0 if offset else self._side / 2)  # in the tile that has the seam behind it
            column, row = self._tiles(middle).T
            found[nucleus[edges[(middle[:, axis] >= 0) & seam[row, column]]]] = True
        return int(found.sum())

    def _count_overlaps(self, polygons: npt.NDArray[np.object_]) -> None:
        """With one another, and with those held from before."""
        ours = len(self._held) + np.arange(len(polygons))
        self._held = np.concatenate([self._held, polygons])
        query, other = shapely.STRtree(self._held).query(polygons, predicate="intersects")
        pairs = other < ours[query]
        one, two = polygons[query[pairs]], self._held[other[pairs]]
        smaller = np.minimum(shapely.area(one), shapely.area(two))
        self._counts["overlaps"] += int((shapely.area(shapely.intersection(one, two)) >= OVERLAP * smaller).sum())


def _spread(near: Longs, elsewhere: Longs, near_px: Floats, elsewhere_px: Floats) -> float:
    """Standard deviation of the ratio of two densities, each a sum over the same seams (N,), by linearisation."""
    seams = np.count_nonzero(near_px + elsewhere_px)
    totals = [float(values.sum()) for values in (near, elsewhere, near_px, elsewhere_px)]
    if seams < 2 or not all(totals):
        return 0.0
    # what each seam adds to the logarithm of the ratio; in all it is nothing
    shares = [values / total for values, total in zip((near, elsewhere, near_px, elsewhere_px), totals, strict=True)]
    added = shares[0] - shares[1] - shares[2] + shares[3]
    ratio = totals[0] / totals[1] * totals[3] / totals[2]
    return ratio * sqrt(float((added**2).sum()) * seams / (seams - 1))
