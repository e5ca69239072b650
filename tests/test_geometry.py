"""Boxes, grids and partitions, for any numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsipipe.geometry import Box, Grid, partition

sides = st.integers(1, 300)
corners = st.integers(-200, 200)
boxes = st.builds(
    lambda x, y, w, h: Box(x, y, x + w, y + h), corners, corners, st.integers(0, 150), st.integers(0, 150)
)
resolutions = st.floats(0.1, 4)


@given(corners, corners, sides, sides, st.integers(1, 120))
def test_a_partition_covers_every_pixel_once(x, y, width, height, side):
    whole = Box(x, y, x + width, y + height)
    hits = np.zeros(whole.shape, int)
    for box in partition(whole, side):
        assert not box.is_empty
        assert max(box.shape) <= side
        hits[box.within(whole).slices] += 1
    assert (hits == 1).all()


def test_a_partition_into_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        list(partition(Box(0, 0, 5, 5), 0))


@given(sides, sides, st.integers(1, 120), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1))
def test_a_point_has_one_owner(width, height, side, shares):
    x, y = np.array(shares).T * [[width], [height]]
    inside = (x < width) & (y < height)
    owners = sum(box.owns(x, y).astype(int) for box in partition(Box(0, 0, width, height), side))
    np.testing.assert_array_equal(owners, inside.astype(int))


def test_a_point_on_a_shared_edge_belongs_to_the_box_on_its_right():
    assert not Box(0, 0, 4, 4).owns(4.0, 1.0)
    assert Box(4, 0, 8, 4).owns(4.0, 1.0)


@given(boxes, boxes)
def test_clipping_gives_the_common_pixels(one, other):
    def pixels(box):
        canvas = np.zeros((400, 400), bool)
        canvas[box.within(Box(-200, -200, 0, 0)).slices] = True
        return canvas

    common = one.clipped(other)
    assert min(common.shape) >= 0
    np.testing.assert_array_equal(pixels(common), pixels(one) & pixels(other))
    assert one.clipped(other).is_empty == other.clipped(one).is_empty


@given(boxes, st.integers(0, 50))
def test_growing_moves_every_side(box, px):
    grown = box.grown(px)
    assert grown.shape == (box.height + 2 * px, box.width + 2 * px)
    assert box.within(grown) == Box(px, px, px + box.width, px + box.height)


@given(sides, sides, resolutions, resolutions, resolutions, st.floats(0, 1), st.floats(0, 1))
def test_a_grid_point_returns_from_level_0(width, height, mpp_x0, mpp_y0, mpp, x, y):
    grid = Grid.over(width, height, mpp_x0, mpp_y0, mpp)
    point = np.array([x * grid.width, y * grid.height])
    np.testing.assert_allclose(grid.from_px0(grid.to_px0(point)), point, rtol=1e-14, atol=1e-290)
    np.testing.assert_allclose(grid.to_um(point), grid.to_px0(point) * (mpp_x0, mpp_y0), rtol=1e-14, atol=1e-290)


@given(st.integers(100, 100_000), st.integers(100, 100_000), resolutions, resolutions)
def test_a_grid_covers_the_slide_to_half_a_pixel(width, height, mpp0, mpp):
    grid = Grid.over(width, height, mpp0, mpp0, mpp)
    right, bottom = grid.to_px0((grid.width, grid.height))
    assert grid.width == 1 or abs(right - width) <= 0.5001 * grid.scale_x
    assert grid.height == 1 or abs(bottom - height) <= 0.5001 * grid.scale_y
    assert mpp == pytest.approx(grid.mpp, rel=0.02 + 1e-9)
    assert grid.pixel_um2 == pytest.approx(grid.mpp**2)


@pytest.mark.parametrize(
    ("mpp0", "scale"), [(0.2528, 1), (0.2475, 1), (0.499, 0.5), (0.1255, 2), (0.2301, 0.25 / 0.2301)]
)
def test_a_resolution_near_a_power_of_two_falls_onto_the_slides_pixels(mpp0, scale):
    grid = Grid.over(1000, 800, mpp0, mpp0, 0.25)
    assert (grid.scale_x, grid.scale_y) == (scale, scale)
    assert grid.mpp_x == pytest.approx(0.25, rel=0.02)


def test_each_axis_keeps_its_own_resolution():
    grid = Grid.over(1000, 1000, 0.20, 0.25, 0.25)
    assert (grid.width, grid.height) == (800, 1000)
    assert (grid.mpp_x, grid.mpp_y) == pytest.approx((0.25, 0.25))
