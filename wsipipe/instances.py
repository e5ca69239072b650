"""Maps to nuclei: an instance map whose value at a pixel depends on nothing but the maps nearby."""

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.segmentation import watershed

from wsipipe.config import NucleiConfig
from wsipipe.maps import Maps
from wsipipe.ridges import flatness, kernel_reach_px
from wsipipe.runs import fill_small_holes, label_regions, without_frame
from wsipipe.watershed import flood

# What opening with it leaves has at least its 17 px: the removal of markers below 10 px, and of specks below
# 10 px that could hold none, which the published algorithm does besides, then has nothing to remove.
OPENING = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))


def label_nuclei(maps: Maps, mpp: float, config: NucleiConfig) -> npt.NDArray[np.int32]:
    """Find the nuclei of a region.

    Parameters
    ----------
    maps : Maps
        NP and HV map (NC is not looked at).
    mpp : float
        µm per pixel.
    config : NucleiConfig
        Thresholds. With ``hv_scale="tile"`` see `label_tile`.

    Returns
    -------
    (H, W) int32
        0 background, 1, 2, ... nuclei: each in one 4-connected piece.

    Notes
    -----
    The post-processing of HoVer-Net (Graham et al. 2019, doi:10.1016/j.media.2019.101563) with four changes. The
    slopes of the HV map are measured between two fixed values, in 1/µm, where the published way takes their range
    over the tile. The filter that takes them is 3.75 µm wide, not 5.25. Holes are filled before the flood, so that
    they belong to the nucleus, and only up to a fixed width. The flood runs on 8-bit levels.

    The fixed scale and the fixed width make the result local: farther than `reach_px` from the border of the array
    it is that of any larger array, as long as no nucleus spans the rest. The flood needs an argument: leave out of
    it the pixels near the border, and all that it reached through them; every other pixel is still reached from the
    same one, for a rival that sets out later cannot come earlier. So a label can differ only where, in one of the
    two arrays, it itself passes near the border.

    Scale and filter were chosen on HV maps of the true nuclei, stored in 8 bits. Panoptic quality, mean over images,
    CoNSeP test, TNBC, NuInsSeg: 0.958, 0.995, 0.999; as published 0.943, 0.988, 0.982.
    """
    if config.hv_scale == "tile":
        return label_tile(maps.nuclei >= _level(config.np_threshold), np.float32(1 / 127) * maps.offsets, mpp)
    height, width = maps.nuclei.shape
    mask = np.zeros((height + 2, width + 2), np.uint8)  # a frame saves every later step the question of the border
    mask[1:-1, 1:-1] = maps.nuclei >= _level(config.np_threshold)
    widest = round(config.max_hole_um / mpp)
    fill_small_holes(mask, widest)
    flat = flatness(maps.offsets, mask, mpp, config.hv_kernel_um, *config.hv_scale)
    markers = ((flat > 255 * (1 - config.marker_threshold)) & (mask > 0)).view(np.uint8)
    fill_small_holes(markers, widest)
    markers[1:-1, 1:-1] = cv2.morphologyEx(markers[1:-1, 1:-1], cv2.MORPH_OPEN, OPENING)
    labels = np.zeros(mask.shape, np.int32)
    label_regions(markers, labels)
    flood(255 - np.asarray(cv2.GaussianBlur(flat, (3, 3), 0), np.uint8), mask, labels)
    return without_frame(labels)


def reach_px(mpp: float, config: NucleiConfig) -> int:
    """How far the maps act on a marker or a level, px: nearer to the border of an array `label_nuclei` may err."""
    widest = round(config.max_hole_um / mpp)
    return max(widest, kernel_reach_px(mpp, config.hv_kernel_um)) + widest + 5  # 4 of opening, 1 of smoothing


def _level(probability: float) -> int:
    """The smallest 8-bit level that is at least `probability`."""
    return math.ceil(255 * probability)


def label_tile(nucleus: npt.NDArray[np.bool_], offsets: npt.NDArray[np.float32], mpp: float) -> npt.NDArray[np.int32]:
    """Find the nuclei of a tile as published: slopes between the least and the greatest of the tile.

    Parameters
    ----------
    nucleus : (H, W) bool
        Pixels of nuclei.
    offsets : (2, H, W) float32
        HV map, horizontal then vertical.
    mpp : float
        µm per pixel; below 0.375 the settings for 40x hold, else those for 20x.

    Returns
    -------
    (H, W) int32
        0 background; a nucleus with a hole may be in several pieces.

    Notes
    -----
    Gives what CellVTA's post-processor gives (JieZheng-ShanghaiTech/CellVTA d323bc3), pixel for pixel.
    """
    size, smallest_marker = (21, 10) if mpp < 0.375 else (11, 3)
    mask = (_without_specks(nucleus, 10) > 0).astype(np.int32)
    slopes = (
        cv2.Sobel(_stretched(offsets[0]), cv2.CV_64F, 1, 0, ksize=size),
        cv2.Sobel(_stretched(offsets[1]), cv2.CV_64F, 0, 1, ksize=size),
    )
    border = np.maximum(1 - _stretched(slopes[0]), 1 - _stretched(slopes[1])) - (1 - mask)
    border = np.maximum(border, 0)
    depth = -cv2.GaussianBlur((1 - border) * mask, (3, 3), 0)
    markers = ndimage.binary_fill_holes(mask - (border >= 0.4) > 0).astype(np.uint8)
    markers = _without_specks(cv2.morphologyEx(markers, cv2.MORPH_OPEN, OPENING), smallest_marker)
    labels: npt.NDArray[np.int32] = watershed(depth, markers, mask=mask > 0).astype(np.int32)
    return labels


def _stretched(values: npt.NDArray[Any] | cv2.Mat) -> npt.NDArray[np.float32]:
    """The values mapped to [0, 1]."""
    return np.asarray(cv2.normalize(values, np.empty(0), 0, 1, cv2.NORM_MINMAX, cv2.CV_32F), np.float32)


def _without_specks(mask: npt.NDArray[Any] | cv2.Mat, smallest: int) -> npt.NDArray[np.int32]:
    """4-connected regions of `mask` of at least `smallest` px, numbered with gaps."""
    regions: npt.NDArray[np.int32] = ndimage.label(mask)[0]
    regions[np.bincount(regions.ravel())[regions] < smallest] = 0
    return regions
