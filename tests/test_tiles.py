"""Tiles over a slide, for any size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsipipe.config import MapsConfig
from wsipipe.geometry import Box
from wsipipe.model.registry import SPECS
from wsipipe.model.spec import tile_geometry
from wsipipe.tiles import TileGeometry, chunk_grid, tile_grid

sides = st.integers(1, 700)
geometries = st.builds(
    lambda core, halo, chunk: TileGeometry(core + 2 * halo, halo, chunk),
    st.integers(16, 256),
    st.integers(0, 64),
    st.integers(1, 5),
)


@given(sides, sides, geometries)
def test_cores_partition_the_slide(width, height, geometry):
    hits = np.zeros((height, width), int)
    for tile in tile_grid(Box(0, 0, width, height), geometry):
        hits[tile.core.slices] += 1
    assert (hits == 1).all()


@given(sides, sides, geometries, st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_point_has_one_owner(width, height, geometry, x, y):
    tiles = tile_grid(Box(0, 0, width, height), geometry)
    assert sum(bool(tile.core.owns(x * width, y * height)) for tile in tiles) == 1


@given(sides, sides, geometries)
def test_a_read_holds_its_core_grown_by_the_halo(width, height, geometry):
    for tile in tile_grid(Box(0, 0, width, height), geometry):
        wanted = tile.core.grown(geometry.halo_px)
        assert wanted.clipped(tile.read) == wanted
        assert (tile.read.x0, tile.read.y0) == (wanted.x0, wanted.y0)


@given(sides, sides, geometries)
def test_all_reads_have_the_size_of_a_tile(width, height, geometry):
    shapes = {tile.read.shape for tile in tile_grid(Box(0, 0, width, height), geometry)}
    assert shapes == {(geometry.tile_px, geometry.tile_px)}


@given(sides, sides, geometries, st.randoms(use_true_random=False))
def test_chunks_give_each_wanted_tile_once(width, height, geometry, random):
    whole = Box(0, 0, width, height)
    wanted = {tile for tile in tile_grid(whole, geometry) if random.random() < 0.4}
    cores = {tile.core for tile in wanted}
    given_tiles = []
    for chunk, tiles in chunk_grid(whole, geometry, cores.__contains__):
        assert tiles
        assert len(tiles) <= geometry.chunk_tiles**2
        assert all(tile.core.clipped(chunk) == tile.core for tile in tiles)
        given_tiles += tiles
    assert len(given_tiles) == len(wanted)
    assert set(given_tiles) == wanted


@given(sides, sides, geometries)
def test_chunks_do_not_overlap_and_start_at_multiples_of_their_side(width, height, geometry):
    hits = np.zeros((height, width), int)
    for chunk, _ in chunk_grid(Box(0, 0, width, height), geometry, lambda core: True):
        assert chunk.x0 % geometry.chunk_px == chunk.y0 % geometry.chunk_px == 0
        hits[chunk.slices] += 1
    assert (hits == 1).all()


@pytest.mark.parametrize(("tile", "halo", "chunk"), [(128, 64, 4), (256, -1, 4), (256, 64, 0)])
def test_a_tile_without_a_core_is_refused(tile, halo, chunk):
    with pytest.raises(ValueError, match="wider than twice its halo"):
        TileGeometry(tile, halo, chunk)


@pytest.mark.parametrize(("tile_px", "halo_px", "chunk_px"), [(256, 32, 768), (512, 32, 1792), (1024, 64, 1792)])
def test_chunks_are_four_tiles_wide_or_about_2000_px(tile_px, halo_px, chunk_px):
    config = MapsConfig(tile_px=tile_px, halo_px=halo_px)
    assert tile_geometry(SPECS["cellvta-nano"], config).chunk_px == chunk_px
