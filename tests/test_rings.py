"""Rings of points: valid exactly where GEOS says so, and in well-known binary to the byte what shapely writes."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsipipe.rings import MOST_EDGES, Rings, closed_rings

Point = tuple[int, int]


def rings_of(*rings: list[Point]) -> Rings:
    points = np.array([point for ring in rings for point in ring], np.int64).reshape(-1, 2)
    return closed_rings(points, np.cumsum([len(ring) for ring in rings], dtype=np.int64))


def by_geos(*rings: list[Point]) -> npt.NDArray[np.object_]:
    return np.array([shapely.Polygon(np.array(ring) / 10) for ring in rings])


points = st.tuples(st.integers(-6, 6), st.integers(-6, 6))


def is_open(ring: list[Point]) -> bool:
    """Rings end at a point of their own; shapely takes one that ends where it began as closed already."""
    return ring[0] != ring[-1]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(points, min_size=3, max_size=8), min_size=1, max_size=6))
def test_rings_are_valid_where_geos_says_so_and_plain_only_if_they_are(rings: list[list[Point]]) -> None:
    polygons, ours = by_geos(*rings), rings_of(*rings)
    valid = shapely.is_valid(polygons)
    assert (ours.are_valid() == valid).all()
    plain = ours.are_plain()
    assert valid[plain].all()
    assert (shapely.area(polygons[plain]) >= 0.01 - 1e-9).all()


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
def test_what_a_ring_of_few_edges_must_not_do(turn: int) -> None:
    square = [(0, 0), (90, 0), (90, 90), (0, 90)]
    faults = {
        "bow tie": [(0, 0), (90, 90), (90, 0), (0, 90)],
        "point on an edge": [(0, 0), (90, 0), (90, 90), (40, 0), (0, 90)],
        "there and back": [(0, 0), (90, 0), (90, 90), (150, 150), (90, 90), (0, 90)],
        "flat": [(0, 0), (90, 0), (40, 0)],
        "corner on a corner": [(0, 0), (50, 50), (90, 0), (90, 90), (50, 50), (0, 90)],
    }
    turned = [ring[turn:] + ring[:turn] for ring in (square, square[::-1], *faults.values())]
    rings = rings_of(*turned)
    assert rings.are_plain().tolist() == rings.are_valid().tolist() == [True, True] + [False] * len(faults)


def test_a_corner_that_is_there_twice_and_many_corners_are_left_to_geos() -> None:
    twice = [(0, 0), (90, 0), (90, 0), (90, 90)]
    angle = np.linspace(0, 2 * np.pi, MOST_EDGES + 1, endpoint=False)
    round_one = [(int(x), int(y)) for x, y in np.rint(5000 * np.stack([np.cos(angle), np.sin(angle)], axis=1))]
    far = [(10**9, 0), (10**9 + 90, 0), (10**9, 90)]
    rings = rings_of(twice, round_one, far)
    assert not rings.are_plain().any()
    assert rings.are_valid().all()
    assert rings_of(round_one[1:]).are_plain().all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(points, min_size=3, max_size=9).filter(is_open), max_size=6), st.integers(0, 3))
def test_binary_is_that_of_shapely_and_reads_back(rings: list[list[Point]], skipped: int) -> None:
    ours = rings_of(*rings)
    written = ours.to_wkb()
    assert written.to_pylist() == list(shapely.to_wkb(by_geos(*rings)))
    back, exact = Rings.from_wkb(written.slice(skipped))
    assert exact.all()
    rest = ours.take(np.arange(min(skipped, len(ours)), len(ours)))
    assert (back.starts == rest.starts).all()
    assert (back.points == rest.points).all()


def test_what_is_not_one_ring_in_whole_tenths_is_told() -> None:
    holed = shapely.box(0, 0, 9, 9).difference(shapely.box(3, 3, 6, 6))
    shapes = [shapely.box(0, 0, 1, 2), holed, shapely.Point(1, 2), shapely.Polygon([(0, 0), (1.03, 0), (1, 1)])]
    whole = shapely.to_wkb(shapes[0])
    nowhere = whole[:13] + np.array(np.nan, "<f8").tobytes() + whole[21:]
    big_endian = shapely.to_wkb(shapes[0], byte_order=0)
    content = [*shapely.to_wkb(shapes), nowhere, whole[:-1], big_endian, b"", None, whole]
    rings, exact = Rings.from_wkb(pa.array(content, pa.binary()))
    assert exact.tolist() == [True] + [False] * (len(content) - 2) + [True]
    assert rings.points[:5].tolist() == rings.points[-5:].tolist() == [[10, 0], [10, 20], [0, 20], [0, 0], [10, 0]]


def test_rings_are_replaced_and_taken_by_number() -> None:
    a, b, c = [(0, 0), (5, 0), (5, 5)], [(1, 1), (9, 1), (9, 9), (1, 9)], [(7, 7), (8, 7), (8, 8), (7, 9), (6, 8)]
    rings = rings_of(a, b, a).replaced(np.array([0, 2]), rings_of(c, b))
    assert rings.to_wkb().to_pylist() == rings_of(c, b, b).to_wkb().to_pylist()
    assert rings.take(np.array([2, 0])).to_wkb().to_pylist() == rings_of(b, c).to_wkb().to_pylist()
    assert len(rings.take(np.zeros(0, np.int64))) == 0
