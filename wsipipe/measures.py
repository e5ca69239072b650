"""Sums over the pixels of every nucleus of an instance map, in one pass over its runs."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from skimage.color import hed_from_rgb

from wsipipe.compiled import compiled
from wsipipe.maps import Maps

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measures:
    """Whole-number sums by nucleus; row 0 is not used, a nucleus that is not there has a count of 0.

    Attributes
    ----------
    count : (N + 1,) int64
        Pixels.
    boxes : (N + 1, 4) int32
        left, top, right, bottom; half-open.
    first : (N + 1, 2) int32
        (y, x) of the first pixel in raster order.
    moments : (N + 1, 5) int64
        Sums of x, y, xx, xy, yy; x and y counted from the first pixel, so that they stay small and are the same in
        every array that holds the nucleus.
    np_sum : (N + 1,) int64
        Sum of the NP map.
    nc_sum : (N + 1, K) int64
        Sums of the NC map.
    """

    count: Longs
    boxes: Ints
    first: Ints
    moments: Longs
    np_sum: Longs
    nc_sum: Longs


def measure(labels: Ints, maps: Maps) -> Measures:
    """Sums for the nuclei 1 to N of an instance map (H, W) and its maps."""
    return Measures(*_measure(labels, int(labels.max(initial=0)), maps.nuclei, maps.types))


@compiled
def _measure(
    labels: Ints, n: int, nuclei: npt.NDArray[np.uint8], types: npt.NDArray[np.uint8]
) -> tuple[Longs, Ints, Ints, Longs, Longs, Longs]:
    height, width = labels.shape
    count, np_sum = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    boxes, first = np.zeros((n + 1, 4), np.int32), np.zeros((n + 1, 2), np.int32)
    moments, nc_sum = np.zeros((n + 1, 5), np.int64), np.zeros((n + 1, types.shape[0]), np.int64)
    for y in range(height):
        start = 0
        while start < width:
            i = labels[y, start]
            stop = start + 1
            while stop < width and labels[y, stop] == i:
                stop += 1
            if i > 0:
                if count[i] == 0:
                    first[i, 0], first[i, 1] = y, start
                    boxes[i, 0], boxes[i, 1], boxes[i, 2] = start, y, stop
                count[i] += stop - start
                boxes[i, 0], boxes[i, 2] = min(boxes[i, 0], start), max(boxes[i, 2], stop)
                boxes[i, 3] = y + 1
                dy = y - first[i, 0]
                x_sum, xx_sum, np_run = 0, 0, 0
                for x in range(start, stop):
                    dx = x - first[i, 1]
                    x_sum += dx
                    xx_sum += dx * dx
                    np_run += nuclei[y, x]
                moments[i, 0] += x_sum
                moments[i, 1] += dy * (stop - start)
                moments[i, 2] += xx_sum
                moments[i, 3] += dy * x_sum
                moments[i, 4] += dy * dy * (stop - start)
                np_sum[i] += np_run
                for k in range(types.shape[0]):
                    nc_run = 0
                    for x in range(start, stop):
                        nc_run += types[k, y, x]
                    nc_sum[i, k] += nc_run
            start = stop
    return count, boxes, first, moments, np_sum, nc_sum


def stain_sums(labels: Ints, n: int, rgb: npt.NDArray[np.uint8]) -> Doubles:
    """Sums of the optical density of haematoxylin and of eosin over the pixels of the nuclei 1 to n.

    Parameters
    ----------
    labels : (H, W) int32
    rgb : (H, W, 3) uint8
        White is 255.

    Returns
    -------
    (n + 1, 2) float64
        Base 10; a pixel's density of a stain is at least 0. As `skimage.color.separate_stains` with `hed_from_rgb`
        (Ruifrok and Johnston 2001), which takes logarithms to the base 1e-6: six times its values.
    """
    density = -np.log10(np.maximum(np.arange(256) / 255, 1e-6))
    return _stain_sums(labels, n, rgb, density[None, :, None] * hed_from_rgb[:, None, :2])


@compiled
def _stain_sums(labels: Ints, n: int, rgb: npt.NDArray[np.uint8], share: Doubles) -> Doubles:
    """`share` (3, 256, 2) is what a value of a channel adds to each stain."""
    sums = np.zeros((n + 1, 2))
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            i = labels[y, x]
            if i > 0:
                r, g, b = rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2]
                sums[i, 0] += max(0.0, share[0, r, 0] + share[1, g, 0] + share[2, b, 0])
                sums[i, 1] += max(0.0, share[0, r, 1] + share[1, g, 1] + share[2, b, 1])
    return sums
