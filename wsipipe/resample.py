"""Pixels of one grid from pixels of a finer or coarser one: pure, and the same whatever the region asked for."""

from collections.abc import Callable

import numba
import numpy as np
import numpy.typing as npt

from wsipipe.geometry import Box


def resampled(
    read: Callable[[Box], npt.NDArray[np.uint8]], size: tuple[int, int], scale: tuple[float, float], box: Box
) -> npt.NDArray[np.uint8]:
    """The pixels of `box`, drawn from a source of another resolution.

    Down it averages over the area that a pixel covers, up it interpolates bilinearly between pixel
    centres; at the source's border the outermost pixels are repeated. Weights come from absolute places
    and sums run in one order, so a pixel is the same to the bit whatever `box` it is read with.

    Parameters
    ----------
    read : function (Box) -> (h, w, 3) uint8
        Gives a region of the source; asked only for boxes within `size`.
    size : (int, int)
        Width and height of the source, px.
    scale : (float, float)
        Source pixels per pixel of the result, x then y. Both grids share their origin.
    box : Box
        What is wanted, in pixels of the result; it must meet the source.

    Returns
    -------
    (H, W, 3) uint8
    """
    columns, column_weights = _taps(box.x0, box.x1, scale[0], size[0])
    rows, row_weights = _taps(box.y0, box.y1, scale[1], size[1])
    source = Box(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    pixels = read(source)
    if scale == (1.0, 1.0) and source == box:
        return pixels
    pixels = np.require(pixels, requirements=["C", "W"])  # one kind of array: the kernel is compiled for each it meets
    return _weighted(pixels, rows - source.y0, row_weights, columns - source.x0, column_weights)


def _taps(start: int, stop: int, scale: float, size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Which source pixels make the pixels `start` to `stop` of one axis, and their weights; both (taps, n)."""
    pixels = np.arange(start, stop, dtype=np.float64)
    if scale > 1:
        low, high = pixels * scale, (pixels + 1) * scale
        index = np.floor(low) + np.arange(np.ceil(scale) + 1)[:, None]
        weights = np.clip(np.minimum(high, index + 1) - np.maximum(low, index), 0, None) / scale
    else:
        centre = (pixels + 0.5) * scale - 0.5
        index = np.floor(centre) + np.arange(2)[:, None]
        weights = 1 - np.abs(centre - index)
    used = weights.any(axis=1)
    return np.clip(index[used], 0, size - 1).astype(np.intp), weights[used].astype(np.float32)


@numba.njit(nogil=True, cache=True)  # without fastmath: sums keep their order
def _weighted(
    pixels: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.intp],
    row_weights: npt.NDArray[np.float32],
    columns: npt.NDArray[np.intp],
    column_weights: npt.NDArray[np.float32],
) -> npt.NDArray[np.uint8]:
    """Weighted sums of rows, then of columns: (h, w, 3) to (H, W, 3)."""
    height, width = rows.shape[1], columns.shape[1]
    result = np.empty((height, width, 3), np.uint8)
    line = np.empty((pixels.shape[1], 3), np.float32)
    for i in range(height):
        line[:] = 0
        for k in range(rows.shape[0]):
            weight, row = row_weights[k, i], pixels[rows[k, i]]
            for j in range(line.shape[0]):
                for c in range(3):
                    line[j, c] += weight * np.float32(row[j, c])
        for j in range(width):
            for c in range(3):
                total = np.float32(0)
                for k in range(columns.shape[0]):
                    total += column_weights[k, j] * line[columns[k, j], c]
                result[i, j, c] = np.uint8(np.rint(total))
    return result
