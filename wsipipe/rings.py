"""Outlines at level 0 as rings of points in tenths of a pixel: whether they are valid, and as well-known binary.

A polygon object costs more than the outline it holds was worth finding. So whole arrays of points are kept instead, and
GEOS is asked only of the few rings that a plain look at every two edges leaves in doubt.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from wsipipe.compiled import compiled

Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

WKB_HEAD = np.frombuffer(bytes((1, 3, 0, 0, 0, 1, 0, 0, 0)), np.uint8)  # little-endian polygon of one ring
MOST_EDGES = 64  # every two of them are looked at; for more, GEOS is quicker
EXACT = 1e-6  # tenths of a pixel; how far from a whole number of them a coordinate may be that was rounded to it
LARGEST = 1e8  # tenths of a pixel; larger coordinates are not multiplied with one another


@dataclass(frozen=True, slots=True)
class Rings:
    """Closed rings: the first point of each is repeated as its last.

    Attributes
    ----------
    points : (M, 2) int64
        (x, y) in tenths of a level-0 px, ring after ring.
    starts : (N + 1,) int64
        Row of each ring's first point, and M.
    """

    points: Longs
    starts: Longs

    def __len__(self) -> int:
        return self.starts.size - 1

    def take(self, which: Longs) -> "Rings":
        """The rings with these numbers, in their order."""
        counts = (self.starts[1:] - self.starts[:-1])[which]
        ends = np.cumsum(counts)
        rows = np.repeat(self.starts[which] - (ends - counts), counts) + np.arange(counts.sum())
        return Rings(self.points[rows], np.append(0, ends))

    def replaced(self, which: Longs, others: "Rings") -> "Rings":
        """With the rings `which` replaced by `others`."""
        starts = np.append(self.starts, self.starts[-1] + others.starts[1:])
        both = Rings(np.concatenate([self.points, others.points]), starts)
        order = np.arange(len(self))
        order[which] = len(self) + np.arange(len(others))
        return both.take(order)

    def polygons(self) -> npt.NDArray[np.object_]:
        """As polygons of shapely, in level-0 px."""
        ring = np.repeat(np.arange(len(self)), np.diff(self.starts))
        polygons: npt.NDArray[np.object_] = shapely.polygons(shapely.linearrings(self.points / 10, indices=ring))
        return polygons

    def are_plain(self) -> Bools:
        """True for rings of which no two edges meet but at their common end, and that enclose 0.01 px² or more.

        These are valid for GEOS; so may be others, one of more than 64 edges or with a point twice in a row.
        """
        return _are_plain(self.points, self.starts)

    def are_valid(self) -> Bools:
        """True for rings that are valid polygons."""
        valid = self.are_plain()
        doubtful = np.flatnonzero(~valid)
        if doubtful.size:
            valid[doubtful] = shapely.is_valid(self.take(doubtful).polygons())
        return valid

    def to_wkb(self) -> pa.Array:
        """As well-known binary, to the byte what shapely writes."""
        counts = np.diff(self.starts)
        offsets = np.append(0, np.cumsum(WKB_HEAD.size + 4 + 16 * counts)).astype(np.int32)
        out = np.empty(offsets[-1], np.uint8)
        points = (self.points / 10).astype("<f8").view(np.uint8).reshape(-1)
        _put_wkb(out, offsets, WKB_HEAD, counts.astype("<u4").view(np.uint8).reshape(-1, 4), points)
        return pa.Array.from_buffers(pa.binary(), len(self), [None, pa.py_buffer(offsets), pa.py_buffer(out)])

    @classmethod
    def from_wkb(cls, geometry: pa.Array) -> tuple["Rings", Bools]:
        """Read well-known binary, and tell which of it is one ring in whole tenths of a pixel; of the rest, none."""
        n = len(geometry)
        _, offsets, data = geometry.buffers()
        ends = np.frombuffer(offsets, np.int32, n + 1, 4 * geometry.offset) if n else np.zeros(1, np.int32)
        content = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
        counts = _count_points(content, ends, WKB_HEAD)
        starts = np.append(0, np.cumsum(counts))
        packed = np.empty(16 * starts[-1], np.uint8)
        _take_points(packed, content, ends, counts, WKB_HEAD.size + 4)
        points, exact = _in_tenths(packed.view("<f8").astype(np.float64, copy=False).reshape(-1, 2), starts)
        return cls(points, starts), exact


def closed_rings(tenths: Longs, ends: Longs) -> Rings:
    """Rings from points (M, 2) that do not repeat the first of each; `ends` (N,) are their past-the-last rows."""
    return Rings(_closed(tenths, ends), np.append(0, ends + 1 + np.arange(ends.size)))


@compiled
def _closed(points: Longs, ends: Longs) -> Longs:
    out = np.empty((len(points) + ends.size, 2), np.int64)
    begin = 0
    for i in range(ends.size):
        for k in range(begin, ends[i]):
            out[k + i, 0], out[k + i, 1] = points[k, 0], points[k, 1]
        out[ends[i] + i, 0], out[ends[i] + i, 1] = points[begin, 0], points[begin, 1]
        begin = ends[i]
    return out


@compiled
def _are_plain(points: Longs, starts: Longs) -> Bools:
    plain = np.zeros(starts.size - 1, np.bool_)
    for i in range(plain.size):
        ring = points[starts[i] : starts[i + 1]]
        edges = len(ring) - 1
        if 3 <= edges <= MOST_EDGES and ring[0, 0] == ring[edges, 0] and ring[0, 1] == ring[edges, 1]:
            plain[i] = _is_plain(ring, edges)
    return plain


@compiled
def _is_plain(ring: Longs, edges: int) -> bool:
    twice_area = 0
    for a in range(edges):
        if max(abs(ring[a, 0]), abs(ring[a, 1])) > LARGEST:
            return False
        x, y = ring[a + 1, 0] - ring[a, 0], ring[a + 1, 1] - ring[a, 1]
        twice_area += (ring[a, 0] - ring[0, 0]) * y - (ring[a, 1] - ring[0, 1]) * x
        b = a + 1 if a + 1 < edges else 0  # the next edge may go anywhere but back
        u, v = ring[b + 1, 0] - ring[b, 0], ring[b + 1, 1] - ring[b, 1]
        if x * v == y * u and x * u + y * v <= 0:
            return False
        for b in range(a + 2, edges if a > 0 else edges - 1):
            if not _are_apart(ring[a], ring[a + 1], ring[b], ring[b + 1]):
                return False
    return abs(twice_area) >= 2


@compiled
def _are_apart(a: Longs, b: Longs, c: Longs, d: Longs) -> bool:
    """True where the edges from a to b and from c to d have no point in common."""
    if (
        max(a[0], b[0]) < min(c[0], d[0])
        or max(c[0], d[0]) < min(a[0], b[0])
        or max(a[1], b[1]) < min(c[1], d[1])
        or max(c[1], d[1]) < min(a[1], b[1])
    ):
        return True
    one, two = _side(a, b, c), _side(a, b, d)
    if (one > 0 and two > 0) or (one < 0 and two < 0):
        return True
    one, two = _side(c, d, a), _side(c, d, b)
    return (one > 0 and two > 0) or (one < 0 and two < 0)


@compiled
def _side(a: Longs, b: Longs, c: Longs) -> int:
    """Above 0 where c lies on one side of the line from a to b, below 0 on the other."""
    return int((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


@compiled
def _put_wkb(out: Bytes, offsets: npt.NDArray[np.int32], head: Bytes, counts: Bytes, points: Bytes) -> None:
    taken = 0
    for i in range(offsets.size - 1):
        at, rest = offsets[i] + head.size, offsets[i + 1] - offsets[i] - head.size - 4
        out[offsets[i] : at] = head
        out[at : at + 4] = counts[i]
        out[at + 4 : at + 4 + rest] = points[taken : taken + rest]
        taken += rest


@compiled
def _count_points(content: Bytes, ends: npt.NDArray[np.int32], head: Bytes) -> Longs:
    """Points of each polygon of one ring; 0 for whatever else there is."""
    counts = np.zeros(ends.size - 1, np.int64)
    for i in range(counts.size):
        at, size = ends[i], ends[i + 1] - ends[i] - head.size - 4
        if size < 0:
            continue
        same = True
        for k in range(head.size):
            same &= content[at + k] == head[k]
        told = np.int64(0)
        for k in range(4):
            told += np.int64(content[at + head.size + k]) << (8 * k)
        if same and size == 16 * told:
            counts[i] = told
    return counts


@compiled
def _take_points(out: Bytes, content: Bytes, ends: npt.NDArray[np.int32], counts: Longs, head: int) -> None:
    taken = 0
    for i in range(counts.size):
        size, at = 16 * counts[i], ends[i] + head
        out[taken : taken + size] = content[at : at + size]
        taken += size


@compiled
def _in_tenths(xy: Doubles, starts: Longs) -> tuple[Longs, Bools]:
    points, exact = np.zeros((len(xy), 2), np.int64), np.zeros(starts.size - 1, np.bool_)
    for i in range(exact.size):
        good = starts[i] < starts[i + 1]
        for k in range(starts[i], starts[i + 1]):
            for axis in range(2):
                tenths = np.rint(xy[k, axis] * 10)
                if abs(tenths - xy[k, axis] * 10) <= EXACT and abs(tenths) <= LARGEST:  # false of what is no number
                    points[k, axis] = np.int64(tenths)
                else:
                    good = False
        exact[i] = good
    return points, exact
