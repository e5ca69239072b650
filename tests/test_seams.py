"""Whether seams show: nothing where blocks are exact, and every fault that cutting makes where they are not."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import shapely
from made_maps import TYPES, crowd, maps_of

from wsipipe.config import NucleiConfig
from wsipipe.features import nuclei_of_block
from wsipipe.geometry import Grid, partition
from wsipipe.maps import Maps
from wsipipe.seams import SeamCheck, SeamFigures
from wsipipe.tissue import TissueMask

CONFIG = NucleiConfig()
SIDE = 200
GRID = Grid(1100, 900, 2.0, 2.0, 0.125, 0.125)
WANTED = np.ones((5, 6), bool)


@pytest.fixture(scope="module")
def maps() -> Maps:
    return maps_of(crowd((900, 1100), 27, 1), 0.05)


def found(maps: Maps, halo: int, grown: int = 0) -> pa.Table:
    """Nuclei of blocks that see `halo` px more, and answer for `grown` px more, than they should."""
    batches = []
    for core in partition(GRID.box, SIDE):
        read = core.grown(halo).clipped(GRID.box)
        part = (..., *read.slices)
        seen = Maps(maps.nuclei[part], maps.offsets[part], maps.types[part])
        answers = core.grown(grown).clipped(GRID.box)
        batches.append(nuclei_of_block(seen, read, answers, GRID, TYPES, "f00d", None, CONFIG)[0])
    return pa.Table.from_batches(batches).sort_by("y_px0")


def whole(grid: Grid) -> TissueMask:
    """Tissue everywhere."""
    scales = grid.scale_x * grid.width, grid.scale_y * grid.height
    return TissueMask(np.ones((1, 1), bool), Grid(1, 1, *scales, grid.mpp_x0, grid.mpp_y0))


def checked(nuclei: pa.Table, parts: int = 1, wanted: npt.NDArray[np.bool_] = WANTED, side: int = SIDE) -> SeamFigures:
    check = SeamCheck(GRID, side, wanted, CONFIG.halo_px, whole(GRID))
    for rows in np.array_split(np.arange(len(nuclei)), parts):
        x, y, outlines = (nuclei[name].to_numpy()[rows] for name in ("x_px0", "y_px0", "geometry"))
        check.add(x, y, shapely.from_wkb(outlines), y[-1] if len(y) else 0)
    return check.figures()


def test_exact_blocks_do_not_show(maps: Maps) -> None:
    figures = checked(found(maps, CONFIG.halo_px))
    assert not figures.shows
    assert figures.overlaps == 0
    assert figures.crossing > 200
    assert abs(figures.straight - figures.straight_elsewhere) < 12
    assert figures.density_ratio == pytest.approx(1, abs=3 * figures.density_ratio_sd)
    assert figures.density_ratio_sd < 0.1


def test_nuclei_cut_at_the_seams_show_as_straight_edges_and_as_too_many(maps: Maps) -> None:
    figures = checked(found(maps, 0))
    assert figures.shows
    assert figures.straight > 10 * (figures.straight_elsewhere + 1)
    assert figures.density_ratio > 1.1


def test_nuclei_found_twice_show_as_overlaps(maps: Maps) -> None:
    once, twice = checked(found(maps, CONFIG.halo_px)), checked(found(maps, CONFIG.halo_px, grown=6))
    assert twice.shows
    assert twice.overlaps > 0.2 * once.crossing
    assert twice.density_ratio > once.density_ratio + 0.15


def test_nuclei_lost_at_the_seams_show_as_too_few(maps: Maps) -> None:
    figures = checked(found(maps, CONFIG.halo_px, grown=-14))
    assert figures.shows
    assert figures.density_ratio < 0.7


@pytest.mark.parametrize("parts", [2, 7, 60])
def test_parts_give_the_figures_of_the_whole(maps: Maps, parts: int) -> None:
    nuclei = found(maps, CONFIG.halo_px, grown=6)
    assert checked(nuclei, parts) == checked(nuclei)


def test_only_seams_between_blocks_with_tissue_count(maps: Maps) -> None:
    nuclei = found(maps, CONFIG.halo_px)
    one = np.zeros_like(WANTED)
    one[2, 2] = True
    alone = checked(nuclei, wanted=one)
    assert (alone.seam_mm, alone.near, alone.crossing) == (0, 0, 0)
    assert alone.density_ratio is None
    assert not alone.shows
    one[2, 3] = True
    pair = checked(nuclei, wanted=one)
    assert pair.seam_mm == pytest.approx(SIDE * 0.25 / 1000)
    assert [pair.near_mm2, pair.elsewhere_mm2] == pytest.approx([SIDE * 64 * 0.0625 / 1e6] * 2)
    assert 0 < pair.near < 40


def test_centres_and_edges_are_counted_where_they_lie() -> None:
    grid, wanted = Grid(400, 200, 1.0, 1.0, 0.25, 0.25), np.ones((1, 2), bool)

    def figures(*boxes: tuple[float, float, float, float]) -> dict[str, Any]:
        check = SeamCheck(grid, 200, wanted, 64, whole(grid))
        shapes = shapely.box(*np.array(boxes, float).T)
        centres = shapely.get_coordinates(shapely.centroid(shapes))
        check.add(centres[:, 0], centres[:, 1], shapes)
        return check.figures().to_json()

    at = figures((180, 40, 200, 60), (190, 80, 212, 100), (81, 10, 100, 30), (300, 20, 320, 40), (380, 0, 400, 20))
    # on the seam x = 200 lies one edge, and two centres are near; near the middle x = 100 of the block before it is one
    # each; the second block has its middle at 300, but no seam behind it, and the slide's edge at 400 is no seam
    assert [at[key] for key in ("near", "elsewhere", "straight", "straight_elsewhere", "crossing")] == [2, 1, 1, 1, 2]
    assert at["overlaps"] == 0
    assert figures((180, 40, 206, 60), (184, 40, 220, 60))["overlaps"] == 1
    assert figures((180, 40, 201, 60), (199, 40, 220, 60))["overlaps"] == 0


def scores(seeds: int, crowded: bool) -> npt.NDArray[np.float64]:
    """By how many of its standard deviations the ratio is off 1, over slides of nuclei that know nothing of blocks."""
    grid, side = Grid(1730, 1290, 1.0, 1.0, 0.25, 0.25), 200
    off = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        wanted = rng.random((7, 9)) < 0.8  # tissue with holes; the last row and column are slivers
        xy = rng.uniform(0, (grid.width, grid.height), (4000, 2))
        if crowded:
            middles = rng.uniform(0, (grid.width, grid.height), (25, 2))
            xy = middles[rng.integers(0, 25, 4000)] + rng.normal(0, 60, (4000, 2))
        column, row = np.clip(xy // side, 0, (8, 6)).astype(int).T
        xy = xy[wanted[row, column] & (xy >= 0).all(1) & (xy < (grid.width, grid.height)).all(1)]
        check = SeamCheck(grid, side, wanted, 64, whole(grid))
        check.add(*xy.T, shapely.box(xy[:, 0] - 3, xy[:, 1] - 3, xy[:, 0] + 3, xy[:, 1] + 3))
        figures = check.figures()
        assert figures.density_ratio is not None
        assert figures.density_ratio_sd is not None
        off.append((figures.density_ratio - 1) / figures.density_ratio_sd)
    return np.array(off)


@pytest.mark.parametrize("crowded", [False, True])
def test_the_ratio_is_1_within_its_error_where_nuclei_know_nothing_of_blocks(crowded: bool) -> None:
    off = scores(120, crowded)
    assert abs(off.mean()) < 3 / np.sqrt(off.size)
    assert 0.6 < np.sqrt((off**2).mean()) < 1.25
    assert (np.abs(off) < 4).all()


def test_crowds_make_the_ratio_less_sure_than_as_many_nuclei_each_for_itself() -> None:
    even = SeamFigures(near=400, elsewhere=400, near_mm2=1, elsewhere_mm2=1, seams=40, spread=0.05)
    assert even.density_ratio_sd == pytest.approx(np.sqrt(2 / 400))
    assert replace(even, spread=0.2).density_ratio_sd == 0.2
    assert replace(even, near=600).shows
    assert not replace(even, near=600, spread=0.2).shows


def test_a_few_nuclei_in_a_hundred_that_are_cut_show_only_where_they_are_more_than_chance_makes() -> None:
    few = SeamFigures(near=400, elsewhere=400, near_mm2=1, elsewhere_mm2=1, seams=40, crossing=300, straight=12)
    assert not few.shows
    assert replace(few, crossing=30_000, straight=1200).shows
    assert not replace(few, crossing=30_000, straight=600).shows
    assert not replace(few, crossing=30_000, straight=1200, straight_elsewhere=600).shows


def test_one_nucleus_elsewhere_and_none_near_a_seam_is_chance_and_a_thousand_are_not() -> None:
    few = SeamFigures(near=0, elsewhere=1, near_mm2=1, elsewhere_mm2=1, seams=4)
    assert few.density_ratio == 0
    assert not few.shows
    assert replace(few, elsewhere=1000).shows


def test_a_slide_without_nuclei_has_figures_too() -> None:
    figures = SeamCheck(GRID, SIDE, WANTED, 64, whole(GRID)).figures()
    assert figures.near == 0
    assert not figures.shows
    assert figures.to_json()["density_ratio"] is None


def test_the_last_block_may_be_a_sliver() -> None:
    grid = Grid(205, 100, 1.0, 1.0, 0.25, 0.25)
    figures = SeamCheck(grid, 100, np.ones((1, 3), bool), 64, whole(grid)).figures()
    assert figures.near_mm2 == pytest.approx(100 * (50 + 30) * 0.0625 / 1e6)  # 25 px, and 5 beyond the last seam
    assert figures.elsewhere_mm2 == pytest.approx(100 * (50 + 50) * 0.0625 / 1e6)


def of_nuclei_anywhere(islands: int, seed: int, thinned: float = 0.0) -> SeamFigures:
    """Of small nuclei thrown anywhere on round islands of tissue, so many taken away right of the islands' middles."""
    grid, side, step = Grid(3000, 2600, 2.0, 2.0, 0.125, 0.125), 500, 7
    rng = np.random.default_rng(seed)
    middles, radii = rng.uniform(0, (3000, 2600), (islands, 2)), rng.uniform(150, 500, islands)
    row, column = np.indices((-(-grid.height // step), -(-grid.width // step)))
    places = (np.stack([column, row], axis=-1)[..., None, :] + 0.5) * step
    mask = (np.hypot(*np.moveaxis(places - middles, -1, 0)) < radii).any(-1)
    tissue = TissueMask(mask, Grid(mask.shape[1], mask.shape[0], 2.0 * step, 2.0 * step, 0.125, 0.125))
    wanted = np.zeros((6, 6), bool)
    wanted[row[mask] * step // side, column[mask] * step // side] = True  # a block with any tissue is worked on
    xy = rng.uniform(0, (6000, 5200), (40_000, 2))
    xy = xy[tissue.holds(xy)]
    xy = xy[((xy[:, None] / 2 - middles)[..., 0].min(1) < 0) | (rng.uniform(size=len(xy)) >= thinned)]
    check = SeamCheck(grid, side, wanted, 64, tissue)
    check.add(*xy.T, shapely.box(*(xy - 1).T, *(xy + 1).T))
    return check.figures()


@pytest.mark.parametrize("islands", [1, 6])
def test_nuclei_that_lie_anywhere_on_tissue_are_as_dense_on_seams_as_elsewhere(islands: int) -> None:
    found = [of_nuclei_anywhere(islands, seed) for seed in range(50)]
    told = [figures for figures in found if figures.density_ratio is not None]
    assert len(told) > 35
    ratio, sd = np.array([(figures.density_ratio, figures.density_ratio_sd) for figures in told]).T
    weights = 1 / sd**2
    assert np.average(ratio, weights=weights) == pytest.approx(1, abs=3 / np.sqrt(weights.sum()))
    assert 0.6 < ((ratio - 1) / sd).std() < 1.2
    assert (np.abs(ratio - 1) < 4 * sd).all()
    # the middles of blocks that tissue only meets lie beside it: by the area of blocks seams would seem denser
    assert sum(figures.near for figures in told) > 1.15 * sum(figures.elsewhere for figures in told)


def test_the_error_told_holds_where_tissue_is_denser_on_one_side() -> None:
    told = [of_nuclei_anywhere(6, seed, thinned=0.8) for seed in range(50)]
    ratio, sd = np.array([(figures.density_ratio, figures.density_ratio_sd) for figures in told]).T
    by_chance = np.array([np.sqrt(1 / figures.near + 1 / figures.elsewhere) for figures in told])
    assert ((ratio - 1) / by_chance).std() > 1.6  # of numbers that differ by chance alone it would be 1
    assert ((ratio - 1) / sd).std() < 1.3
