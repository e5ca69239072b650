"""Slide size to tiles: geometry, no pixels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from wsipipe.geometry import Box, partition


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile, in pixels of the working grid."""

    core: Box  # what this tile answers for: the cores partition the slide
    read: Box  # what the network sees: the uncut core grown by the halo, the same size for every tile


@dataclass(frozen=True, slots=True)
class TileGeometry:
    """How a slide is cut.

    `tile_px` is the side of what the network sees; `halo_px` of it on each side are context only. A
    chunk is `chunk_tiles` x `chunk_tiles` cores: the unit in which maps are stored and finished.
    """

    tile_px: int
    halo_px: int
    chunk_tiles: int = 4

    def __post_init__(self) -> None:
        if self.halo_px < 0 or self.core_px < 1 or self.chunk_tiles < 1:
            raise ValueError(
                f"a tile of {self.tile_px} px with a halo of {self.halo_px} px on each side has no core; "
                "the tile must be wider than twice its halo"
            )

    @property
    def core_px(self) -> int:
        return self.tile_px - 2 * self.halo_px

    @property
    def chunk_px(self) -> int:
        return self.core_px * self.chunk_tiles


def tile_grid(whole: Box, geometry: TileGeometry) -> Iterator[Tile]:
    """Tiles over `whole`, row by row.

    Cores are cut at the border of `whole`; reads are not, so that any tiles can share a batch.
    """
    for core in partition(whole, geometry.core_px):
        full = Box(core.x0, core.y0, core.x0 + geometry.core_px, core.y0 + geometry.core_px)
        yield Tile(core, full.grown(geometry.halo_px))


def chunk_grid(whole: Box, geometry: TileGeometry, wanted: Callable[[Box], bool]) -> Iterator[tuple[Box, list[Tile]]]:
    """Chunks of `whole` with their tiles whose core is `wanted`; chunks without any are left out."""
    for chunk in partition(whole, geometry.chunk_px):
        tiles = [tile for tile in tile_grid(chunk, geometry) if wanted(tile.core)]
        if tiles:
            yield chunk, tiles
