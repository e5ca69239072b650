"""The nuclei of overlapping tiles merged as CellVTA's code merges them, for figures that compare with the published.

`segment` does not merge: it finds nuclei in stitched maps. This rule keeps the larger of the *other* nuclei where
nuclei overlap, never the one that is asked about, and so loses some; it is here because the CoNIC figures were made
with it (JieZheng-ShanghaiTech/CellVTA d323bc3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage

Array = npt.NDArray[Any]
ROUNDS = 20
SHARE = 0.01  # of either area: from here on two nuclei are taken for one
NEIGHBOURS = {"top": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}


@dataclass(frozen=True, eq=False)
class Cell:
    """A nucleus as a tile shows it.

    Attributes
    ----------
    contour : (n, 2) float
        Corners (x, y), in pixels of the whole image.
    tile : (row, column)
    inner : bool
        It keeps at least the margin from all four borders of the tile.
    borders : tuple of str
        Those it touches: top, right, down, left.
    """

    contour: Array
    type: int
    tile: tuple[int, int]
    inner: bool
    borders: tuple[str, ...] = ()

    @property
    def neighbour(self) -> tuple[int, int] | None:
        """The tile that is asked first whether it knows the nucleus better; of a corner, the first border clockwise."""
        if not self.borders:
            return None
        touched = set(self.borders)
        first = "left" if touched == {"left", "top"} else next(name for name in NEIGHBOURS if name in touched)
        row, column = NEIGHBOURS[first]
        return self.tile[0] + row, self.tile[1] + column


def cells_of(
    instance_map: Array, types: Sequence[int] | Array, tile: tuple[int, int], offset: tuple[int, int], margin: int
) -> list[Cell]:
    """The nuclei of a tile (S, S), ids ascending, those of type 0 left out.

    Parameters
    ----------
    types : (N,) int
        In the order of the ids.
    offset : (x, y)
        Of the tile in the whole image.
    margin : int
        How far from the borders of the tile a nucleus is an inner one, px.
    """
    side = instance_map.shape[0]
    cells = []
    ids = np.unique(instance_map[instance_map > 0])
    boxes = ndimage.find_objects(instance_map.astype(np.int32))
    for number, of_type in zip(ids.tolist(), types, strict=True):
        rows, columns = boxes[number - 1]
        crop = (instance_map[rows, columns] == number).astype(np.uint8)
        contour = cv2.findContours(crop, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0][0][:, 0]
        if len(contour) < 3 or of_type == 0:
            continue
        low, high = min(rows.start, columns.start), max(rows.stop, columns.stop)
        touched = (rows.start == 0, columns.stop == side, rows.stop == side, columns.start == 0)
        cells.append(
            Cell(
                contour=contour + np.array([columns.start + offset[0], rows.start + offset[1]]),
                type=int(of_type),
                tile=tile,
                inner=low >= margin and high <= side - margin,
                borders=tuple(name for name, is_touched in zip(NEIGHBOURS, touched, strict=True) if is_touched),
            )
        )
    return cells


def merge_cells(cells: Sequence[Cell]) -> list[int]:
    """Which cells are kept, ascending.

    Notes
    -----
    Inner cells stay. Of the others, one that touches the border of its tile is dropped if the neighbour there has any
    that are not inner, and the rest are compared: where some overlap, only the largest of those that overlap the first
    is kept, round by round until none do. The published code stops with an error at a cell that touches two opposite
    borders of its tile; here it asks the neighbour at the first.
    """
    outer_tiles = {cell.tile for cell in cells if not cell.inner}
    kept = [number for number, cell in enumerate(cells) if cell.inner]
    candidates = [
        number
        for number, cell in enumerate(cells)
        if not cell.inner and (cell.neighbour is None or cell.neighbour not in outer_tiles)
    ]
    polygons = {number: _polygon(cells[number].contour) for number in candidates}
    for _ in range(ROUNDS):
        candidates, merged = _one_round(candidates, polygons)
        if not merged:
            break
    return sorted(kept + candidates)


def _one_round(candidates: list[int], polygons: dict[int, shapely.Polygon]) -> tuple[list[int], bool]:
    areas = [polygons[number] for number in candidates]
    tree = shapely.STRtree(areas)
    visited = np.zeros(len(areas), bool)
    survivors, merged = [], False
    for place, area in enumerate(areas):
        if visited[place]:
            continue
        visited[place] = True
        rivals = []
        for other in sorted(tree.query(area).tolist()):
            if visited[other]:
                continue
            shared = area.intersection(areas[other]).area
            if shared > SHARE * area.area or shared > SHARE * areas[other].area:
                visited[other] = True
                rivals.append(other)
        merged |= bool(rivals)
        survivors.append(candidates[max(rivals, key=lambda rival: areas[rival].area) if rivals else place])
    return survivors, merged


def _polygon(contour: Array) -> shapely.Polygon:
    polygon = shapely.Polygon(contour)
    if polygon.is_valid:
        return polygon
    return max(shapely.get_parts(polygon.buffer(0)).tolist(), key=lambda part: part.area, default=shapely.Polygon())


def paint_cells(
    cells: Sequence[Cell], shape: tuple[int, int], factor: float, first: int = 1
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Instances and types (H, W) of cells whose corners are scaled by `factor` and cut to whole pixels.

    Cells are numbered from `first`, later ones lie on top. With `first` 0, as published, the first becomes background
    among the instances, and stays among the types.
    """
    instances, types = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for number, cell in enumerate(cells, start=first):
        corners = (cell.contour * factor).astype(np.int32)
        cv2.fillPoly(instances, [corners], number)
        cv2.fillPoly(types, [corners], cell.type)
    return instances, types
