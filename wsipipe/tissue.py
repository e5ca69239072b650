"""A low-resolution image of a slide to its tissue mask: pure."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage
from skimage.filters import threshold_otsu

from wsipipe.config import TissueConfig
from wsipipe.geometry import Box, Grid

# Chroma (largest minus smallest channel, of 255). Otsu's threshold is held between these, so that it
# neither cuts the noise of empty glass in two nor the tissue of a slide that is full of it.
CHROMA_RANGE = (9.0, 13.0)
SMOOTHING_UM = 8.0  # a standard deviation: below the size of what is asked for, above that of noise
INK_AREA_UM2 = 5_000.0  # smaller patches of ink colour are the fringes of sharp edges
INK_MARGIN_UM = 24.0  # the blurred rim of a pen stroke has the colour of pale tissue
# Of the whole image: in a picture smaller than a slide no piece larger than this share is a speck.
SPECK_SHARE = 0.02
WIDE_UM = 16.0  # from the centre of a nucleus to its end; hardly any is wider


@dataclass(frozen=True)
class TissueMask:
    """Which pixels of a coarse grid are tissue.

    Attributes
    ----------
    mask : (H, W) bool
    grid : Grid
        Where its pixels lie.
    region : Polygon, MultiPolygon or None
        What it was restricted to, level-0 px: the mask covers it conservatively, nuclei are held to it exactly.
    size_px0 : (width, height) or None
        Of the slide at level 0, which no whole number of pixels need cover; None: what the pixels cover.
    """

    mask: npt.NDArray[np.bool_]
    grid: Grid
    region: shapely.Geometry | None = None
    size_px0: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.mask.shape != self.grid.box.shape:
            raise ValueError(f"a mask of shape {self.mask.shape} does not lie on a grid of {self.grid.box.shape}")

    @cached_property
    def area_mm2(self) -> float:
        """Of a pixel that region and slide cover in part, that part counts: nuclei are nowhere else."""
        grid, whole = self.grid, self.grid.to_px0((self.grid.width, self.grid.height))
        size = whole if self.size_px0 is None else np.array(self.size_px0, float)
        last = size - grid.to_px0((grid.width - 1, grid.height - 1))  # the lower right pixel goes to the slide's end
        row = np.count_nonzero(self.mask, axis=1) * grid.scale_x + self.mask[:, -1] * (last[0] - grid.scale_x)
        area_px0 = float(row.sum() * grid.scale_y + row[-1] * (last[1] - grid.scale_y))
        if self.region is not None:
            cut = np.zeros_like(self.mask)
            cut[tuple(_covered(self.region, grid)[1].T[::-1])] = True
            cut[-1], cut[:, -1] = True, True  # they reach to the end of the slide
            corners = np.argwhere(cut & self.mask)[:, ::-1]
            high = np.where(corners + 1 == (grid.width, grid.height), size, grid.to_px0(corners + 1))
            cells = shapely.box(*grid.to_px0(corners).T, *high.T)
            area_px0 += shapely.intersection(self.region, shapely.union_all(cells)).area - shapely.area(cells).sum()
        return area_px0 * grid.mpp_x0 * grid.mpp_y0 / 1e6

    def meets(self, box: Box, grid: Grid) -> bool:
        """True if any part of a box of `grid`, another grid of the slide, lies on tissue.

        A mask pixel that the box covers in part counts. Where the slide reaches beyond the mask's last
        whole pixel, that pixel stands for it; beyond the slide there is no tissue.
        """
        box = box.clipped(grid.box)
        if box.is_empty:
            return False
        (x0, y0), (x1, y1) = self.grid.from_px0(grid.to_px0([(box.x0, box.y0), (box.x1, box.y1)]))
        left, top = min(int(x0), self.grid.width - 1), min(int(y0), self.grid.height - 1)
        return bool(self.mask[top : math.ceil(y1), left : math.ceil(x1)].any())

    def reaches(self, box: Box, grid: Grid) -> bool:
        """True if a nucleus whose centre lies on tissue, and that reaches up to 16 µm, may lie in a box of `grid`."""
        return self.meets(box.grown(math.ceil(WIDE_UM / grid.mpp)), grid)

    def holds(self, xy_px0: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """True for level-0 points (N, 2) on tissue."""
        column, row = np.floor(self.grid.from_px0(xy_px0)).astype(np.int64).T
        held: npt.NDArray[np.bool_] = self.mask[
            np.clip(row, 0, self.grid.height - 1), np.clip(column, 0, self.grid.width - 1)
        ]
        return held

    def area_px0(self, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Tissue in rectangles of the slide, from their corners (..., 2), in level-0 px²; exact."""
        # The sum over all pixels above and to the left is linear in x and in y between corners of pixels. One more
        # pixel each way stands for what the slide has beyond the mask's last whole one.
        mask = np.pad(self.mask, ((0, 1), (0, 1)), mode="edge")
        sums = np.pad(mask, ((1, 0), (1, 0))).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
        (x0, y0), (x1, y1) = (np.moveaxis(self.grid.from_px0(corner), -1, 0) for corner in (low, high))

        def upto(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            read: npt.NDArray[np.float64] = ndimage.map_coordinates(sums, [y, x], float, 1, mode="nearest")
            return read

        area = upto(x1, y1) - upto(x0, y1) - upto(x1, y0) + upto(x0, y0)
        return area * self.grid.scale_x * self.grid.scale_y

    def restricted(self, region: shapely.Geometry) -> "TissueMask":
        """The tissue within a region; a pixel that the region covers in part counts.

        Parameters
        ----------
        region : Polygon or MultiPolygon
            In level-0 pixels.
        """
        within = region if self.region is None else shapely.intersection(self.region, region)
        return TissueMask(self.mask & _covered(region, self.grid)[0], self.grid, within, self.size_px0)


def tissue_mask(rgb: npt.NDArray[np.uint8], pixel_um: float, config: TissueConfig) -> npt.NDArray[np.bool_]:
    """Where a slide carries tissue.

    Tissue is what has colour: glass, dust, black ink and black or white padding have next to none. The
    threshold is Otsu's, within `CHROMA_RANGE`. Blue, green and red ink have colours that stains do not:
    they let green light through, or all of the red and none of the blue.

    Parameters
    ----------
    rgb : (H, W, 3) uint8
        The whole slide, stained with H&E or H-DAB.
    pixel_um : float
        Side of its pixels, µm.
    config : TissueConfig
        Smallest piece (in a small picture at most `SPECK_SHARE` of it), largest hole that is filled; what
        reaches the border is no hole.

    Returns
    -------
    (H, W) bool
        All False where there is no tissue: that is a result.

    Raises
    ------
    ValueError
        If `rgb` is not an RGB image.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"expected (H, W, 3) uint8, not {rgb.shape} {rgb.dtype}")
    sigma = SMOOTHING_UM / pixel_um
    smooth = ndimage.gaussian_filter(rgb.astype(np.float32), (sigma, sigma, 0), mode="nearest", truncate=3)
    chroma = smooth.max(axis=2) - smooth.min(axis=2)
    threshold = float(np.clip(threshold_otsu(chroma) if np.ptp(chroma) else 0, *CHROMA_RANGE))
    tissue = chroma > threshold

    ink = _pieces_from(_ink(smooth), INK_AREA_UM2 / pixel_um**2)
    tissue &= ~_within(ink, max(1, round(INK_MARGIN_UM / pixel_um)))
    holes = ndimage.binary_fill_holes(tissue) & ~tissue
    tissue |= holes & ~_pieces_from(holes, config.max_hole_um2 / pixel_um**2)
    return _pieces_from(tissue, min(config.min_area_um2 / pixel_um**2, SPECK_SHARE * tissue.size))


def _ink(rgb: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Blue, green and red pen. Optical densities of stains: Ruifrok and Johnston 2001, Anal Quant Cytol Histol 23."""
    red, green, blue = np.moveaxis(-np.log10((rgb + 1) / 256), 2, 0)
    # Hematoxylin, eosin, DAB and mixtures of them absorb green nearly as much as red, or more.
    blue_or_green = (red > 0.2) & (green < 0.7 * red)
    dark_blue = (red > 0.55) & (green < 0.92 * red) & (blue < 0.5 * red)
    # Eosin lets blue through, DAB holds some red back.
    pure_red = (green > 0.4) & (blue > 0.75 * green) & (red < 0.2 * green)
    black = (np.ptp(rgb, axis=2) < 20) & (rgb.max(axis=2) < 100)
    ink: npt.NDArray[np.bool_] = blue_or_green | dark_blue | pure_red | black
    return ink


def _within(mask: npt.NDArray[np.bool_], px: int) -> npt.NDArray[np.bool_]:
    grown: npt.NDArray[np.bool_] = ndimage.maximum_filter(mask, size=2 * px + 1)
    return grown


def _pieces_from(mask: npt.NDArray[np.bool_], area_px: float) -> npt.NDArray[np.bool_]:
    """The connected pieces of a mask that have at least `area_px`."""
    pieces, _ = ndimage.label(mask)
    kept = np.bincount(pieces.ravel()) >= area_px
    kept[0] = False
    large: npt.NDArray[np.bool_] = kept[pieces]
    return large


def _covered(region: shapely.Geometry, grid: Grid) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """The pixels of a grid that share area with a region, (H, W), and x and y of those covered in part, (N, 2).

    Squares are halved until in, out or one pixel.
    """
    covered = np.zeros(grid.box.shape, bool)
    shapely.prepare(region)
    side = 1 << (max(grid.width, grid.height) - 1).bit_length()
    corners, cut = np.array([(0, 0)]), np.empty((0, 2), np.int64)
    while len(corners):
        squares = _squares(corners, side, grid)
        met = shapely.intersects(region, squares) & ~shapely.touches(region, squares)
        filled = met & shapely.covers(region, squares)
        if side == 1:
            cut, filled = corners[met & ~filled], met
        for x, y in corners[filled]:
            covered[y : y + side, x : x + side] = True
        side //= 2
        corners = (corners[met & ~filled][:, None] + np.array([(0, 0), (side, 0), (0, side), (side, side)])).reshape(
            -1, 2
        )
        corners = corners[(corners < (grid.width, grid.height)).all(axis=1)]
    return covered, cut


def _squares(corners: npt.NDArray[np.int64], side: int, grid: Grid) -> npt.NDArray[np.object_]:
    """Of a grid, from their upper left corners (N, 2), as level-0 polygons."""
    low, high = grid.to_px0(corners), grid.to_px0(corners + side)
    squares: npt.NDArray[np.object_] = shapely.box(low[:, 0], low[:, 1], high[:, 0], high[:, 1])
    return squares
