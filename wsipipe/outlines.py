"""Instance map to polygons: traced along pixel edges, simplified within a bound, valid after rounding."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsipipe.compiled import compiled
from wsipipe.geometry import Box, Grid
from wsipipe.rings import Rings, closed_rings

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
FEW = 48  # points that are sorted quicker by insertion


@dataclass(frozen=True, slots=True)
class Outlines:
    """Closed outlines of nuclei along pixel edges, clockwise as seen on the screen.

    Attributes
    ----------
    points : (M, 2) int32
        (x, y) in halves of a pixel, nucleus after nucleus; the first point of each is not repeated.
    ends : (N,) int64
        Past-the-last row of each nucleus in `points`.
    area_px : (N,) int64
        Pixels enclosed before simplification.
    tangled : (N,) bool
        True where the outline touches itself at a corner, so that there is a hole or a second piece behind it.
    """

    points: Ints
    ends: Longs
    area_px: Longs
    tangled: npt.NDArray[np.bool_]

    def measures(self, unit_x: float, unit_y: float) -> tuple[Doubles, Doubles]:
        """(N,) length of each outline, a pixel being `unit_x` wide and `unit_y` high, and (N,) its solidity.

        Solidity is the area within the outline over that of its convex hull.
        """
        return _measure(self.points, self.ends, unit_x / 2, unit_y / 2)


def trace_outlines(labels: Ints, ids: Ints, first: Ints, simplify_px: float) -> Outlines:
    """Follow the pixel edges round each nucleus; what it encloses counts as its own.

    Parameters
    ----------
    labels : (H, W) int32
        Instance map.
    ids : (N,) int32
        The nuclei wanted.
    first : (N, 2) int32
        (y, x) of the first pixel of each, in raster order.
    simplify_px : float
        0: the outline is that of the pixels, corner by corner. Else it runs through the middles of the pixels' edges,
        and of these points those are left out from which it is no farther than this (Douglas and Peucker 1973).
        On middles a slanting border is straight already; on corners, half of them outside, it is not. For the same
        nucleus half the points do, the area is kept to 0.2 % in the mean, the perimeter 2.6 % too long, not 21 %.
    """
    return Outlines(*_trace(labels, ids, first, simplify_px))


@compiled
def _trace(
    labels: Ints, ids: Ints, first: Ints, simplify_px: float
) -> tuple[Ints, Longs, Longs, npt.NDArray[np.bool_]]:
    height, width = labels.shape
    n = ids.size
    points, used = np.empty((32 * n + 256, 2), np.int32), 0
    ends, area_px, tangled = np.empty(n, np.int64), np.empty(n, np.int64), np.zeros(n, np.bool_)
    ring = np.empty((256, 2), np.int32)
    for i in range(n):
        label = ids[i]
        y_first, x_first = first[i]
        x, y, dx, dy = x_first, y_first, 1, 0
        size, area = 0, 0
        while size == 0 or x != x_first or y != y_first:
            if size + 3 > len(ring):
                ring = _longer(ring)
            if simplify_px > 0:  # the middle of the first edge, and of the last edge below
                ring[size, 0], ring[size, 1] = 2 * x + dx, 2 * y + dy
            else:
                ring[size, 0], ring[size, 1] = 2 * x, 2 * y
            size += 1
            edges, left, right = 0, False, True
            while right and not left:  # the nucleus is on the right: straight on
                x += dx
                y += dy
                edges += 1
                # the pixels ahead, right and left of the way; corner (x, y) is the upper left one of pixel (x, y)
                right_x, right_y = x - (dx - dy < 0), y - (dx + dy < 0)
                left_x, left_y = right_x + dy, right_y - dx
                right = 0 <= right_x < width and 0 <= right_y < height and labels[right_y, right_x] == label
                left = 0 <= left_x < width and 0 <= left_y < height and labels[left_y, left_x] == label
            area -= y * dx * edges
            if simplify_px > 0 and edges > 1:
                ring[size, 0], ring[size, 1] = 2 * x - dx, 2 * y - dy
                size += 1
            if left:
                tangled[i] |= not right
                dx, dy = dy, -dx
            else:
                dx, dy = -dy, dx
        area_px[i] = area
        if simplify_px > 0:
            ring[size, 0], ring[size, 1] = ring[0, 0], ring[0, 1]
            size = _simplify(ring, size, 2 * simplify_px)
        while used + size > len(points):
            points = _longer(points)
        for k in range(size):
            points[used, 0], points[used, 1] = ring[k, 0], ring[k, 1]
            used += 1
        ends[i] = used
    return points[:used], ends, area_px, tangled


@compiled
def _longer(points: Ints) -> Ints:
    """The points with room for as many more."""
    more = np.empty((2 * len(points), 2), np.int32)
    for i in range(len(points)):
        more[i, 0], more[i, 1] = points[i, 0], points[i, 1]
    return more


@compiled
def _simplify(ring: Ints, size: int, farthest: float) -> int:
    """Douglas-Peucker in place on a ring of `size` points, the first repeated after them; the number of points left.

    It is cut in two at the point farthest from the first. A ring so thin that nothing else would be left stays whole.
    """
    keep, stack = np.zeros(size, np.bool_), np.empty((size + 2, 2), np.int32)
    far, most = 0, 0
    for i in range(1, size):
        away = (ring[i, 0] - ring[0, 0]) ** 2 + (ring[i, 1] - ring[0, 1]) ** 2
        if away > most:
            far, most = i, away
    keep[0] = keep[far] = True
    stack[0, 0], stack[0, 1], stack[1, 0], stack[1, 1] = 0, far, far, size
    depth = 2
    while depth:
        depth -= 1
        a, b = stack[depth]
        bx, by = ring[b, 0] - ring[a, 0], ring[b, 1] - ring[a, 1]
        length = bx * bx + by * by  # squared, as all distances here
        worst, at = farthest * farthest, -1
        for i in range(a + 1, b):
            x, y = ring[i, 0] - ring[a, 0], ring[i, 1] - ring[a, 1]
            along = x * bx + y * by
            if along <= 0:
                away = float(x * x + y * y)
            elif along >= length:
                away = float((x - bx) ** 2 + (y - by) ** 2)
            else:
                away = (x * by - y * bx) ** 2 / length
            if away > worst:
                worst, at = away, i
        if at >= 0:
            keep[at] = True
            stack[depth, 0], stack[depth, 1], stack[depth + 1, 0], stack[depth + 1, 1] = a, at, at, b
            depth += 2
    kept = 0
    for i in range(size):
        kept += keep[i]
    if kept < 3:
        return size
    kept = 0
    for i in range(size):
        if keep[i]:
            ring[kept, 0], ring[kept, 1] = ring[i, 0], ring[i, 1]
            kept += 1
    return kept


@compiled
def _measure(points: Ints, ends: Longs, unit_x: float, unit_y: float) -> tuple[Doubles, Doubles]:
    """Length and solidity of each ring. The hull: Andrew's monotone chain, on whole numbers."""
    lengths, solidities = np.empty(ends.size), np.empty(ends.size)
    keys, hull = np.empty(0, np.int64), np.empty((0, 2), np.int64)
    begin = 0
    for i in range(ends.size):
        size = ends[i] - begin
        if size > keys.size:
            keys, hull = np.empty(2 * size, np.int64), np.empty((4 * size + 2, 2), np.int64)
        length, area = 0.0, 0
        for k in range(size):
            x, y = np.int64(points[begin + k, 0]), np.int64(points[begin + k, 1])
            u, v = points[begin + (k + 1) % size]
            length += np.sqrt(((u - x) * unit_x) ** 2 + ((v - y) * unit_y) ** 2)
            area += x * v - u * y
            keys[k] = (x << 32) + y  # sorted by x, then y; both are small and not below 0
        _sort(keys[:size])
        top = 0
        for step in (1, -1):  # there along one side, back along the other
            base = top
            for k in range(size):
                key = keys[k if step > 0 else size - 1 - k]
                x, y = key >> 32, key & 0xFFFFFFFF
                while top - base >= 2 and _turn(hull[top - 2], hull[top - 1], x, y) <= 0:
                    top -= 1
                hull[top, 0], hull[top, 1] = x, y
                top += 1
            top -= 1  # the last point begins the way back
        around = 0
        for k in range(top):
            n = k + 1 if k + 1 < top else 0
            around += hull[k, 0] * hull[n, 1] - hull[n, 0] * hull[k, 1]
        lengths[i], solidities[i] = length, abs(area) / abs(around)
        begin = ends[i]
    return lengths, solidities


@compiled
def _turn(a: Longs, b: Longs, x: int, y: int) -> int:
    """Above 0 where the way from a over b to (x, y) turns one way, below 0 where it turns the other."""
    return int((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]))


@compiled
def _sort(keys: Longs) -> None:
    if keys.size > FEW:
        keys.sort()
        return
    for k in range(1, keys.size):
        key, at = keys[k], k
        while at > 0 and keys[at - 1] > key:
            keys[at] = keys[at - 1]
            at -= 1
        keys[at] = key


def rings_px0(
    outlines: Outlines, labels: Ints, ids: Ints, first: Ints, read: Box, grid: Grid
) -> tuple[Rings, npt.NDArray[np.bool_]]:
    """Outlines at level 0, rounded to 0.1 px, and which of them are valid.

    Where the simplified outline is not, because it crosses itself or rounding made it so, all corners are kept.
    """
    rings = _rounded(outlines, read, grid)
    valid = rings.are_valid()
    invalid = np.flatnonzero(~valid)
    if invalid.size:
        full = _rounded(trace_outlines(labels, ids[invalid], first[invalid], 0), read, grid)
        valid[invalid] = full.are_valid()
        rings = rings.replaced(invalid, full)
    return rings, valid


def _rounded(outlines: Outlines, read: Box, grid: Grid) -> Rings:
    points = grid.to_px0(outlines.points / 2 + np.array([read.x0, read.y0]))
    return closed_rings(np.rint(points * 10).astype(np.int64), outlines.ends)


def made_whole(labels: Ints, ids: Ints, boxes: Ints) -> Ints:
    """The instance map with some nuclei in one piece, the largest 4-connected one, and without holes.

    What lies in a hole, another nucleus too, becomes part of the nucleus round it. `boxes` are the columns and rows
    (left, top, right, bottom) that the nuclei `ids` lie in.
    """
    labels = labels.copy()
    for label, (left, top, right, bottom) in zip(ids, boxes, strict=True):
        place = labels[top:bottom, left:right]
        pieces = ndimage.label(place == label)[0]
        sizes = np.bincount(pieces.ravel())
        if sizes.size > 1:  # else a nucleus round it has taken it
            place[pieces > 0] = 0
            place[ndimage.binary_fill_holes(pieces == 1 + sizes[1:].argmax())] = label
    return labels
