"""HV map to the borders between nuclei: how steeply the offsets fall, as 8-bit levels.

All sums are of whole numbers below 2**24 in float32, hence exact: a pixel's value does not depend on where an
array begins, nor on how the processor groups its pixels.
"""

import numpy as np
import numpy.typing as npt

from wsipipe.compiled import compiled

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_SMOOTHING_SUM = 256
_SLOPE_SUM = 500  # of magnitudes; with 127 for a full offset every sum stays below 2**24
# The filter works in pieces of this size, px, which fit the second cache; in smaller ones the calls cost more.
_ROWS, _COLUMNS = 64, 512


def sobel_kernels(mpp: float, kernel_um: float) -> tuple[Floats, Floats]:
    """Right halves (centre first) of the smoothing and of the slope kernel, whole numbers.

    The binomial kernels of `cv2.getDerivKernels`, rounded; what rounds to nothing at their ends is left out.
    """
    half = max(1, round((kernel_um / mpp - 1) / 2))
    binomial = np.array([1.0])
    for _ in range(2 * half - 2):
        binomial = np.convolve(binomial, (0.5, 0.5))
    smoothing = np.convolve(binomial, (0.25, 0.5, 0.25))[half:]
    slope = np.convolve(binomial, (-1.0, 0.0, 1.0))[half:]
    slope /= 2 * np.abs(slope).sum()
    smoothing, slope = np.round(smoothing * _SMOOTHING_SUM), np.round(slope * _SLOPE_SUM)
    size = int(np.flatnonzero(smoothing + slope)[-1]) + 1
    return smoothing[:size].astype(np.float32), slope[:size].astype(np.float32)


def kernel_reach_px(mpp: float, kernel_um: float) -> int:
    """How far the filter looks on each side, px."""
    return sobel_kernels(mpp, kernel_um)[0].size - 1


@compiled
def _add_sums(total: Floats, a: Floats, b: Floats, weight: np.float32) -> None:
    for x in range(total.size):
        total[x] += weight * (a[x] + b[x])


@compiled
def _add_differences(total: Floats, a: Floats, b: Floats, weight: np.float32) -> None:
    for x in range(total.size):
        total[x] += weight * (a[x] - b[x])


@compiled
def _weigh(total: Floats, a: Floats, weight: np.float32) -> None:
    for x in range(total.size):
        total[x] = weight * a[x]


@compiled
def _any(mask: Bytes, y0: int, y1: int, x0: int, x1: int) -> bool:
    for y in range(y0, y1):
        for x in range(x0, x1):
            if mask[y, x]:
                return True
    return False


@compiled
def _slopes(
    offsets: npt.NDArray[np.int8],
    mask: Bytes,
    smoothing: Floats,
    slope: Floats,
    lowest: np.float32,
    gain: np.float32,
    out: Bytes,
) -> None:
    """Write the level of every pixel of `mask` to `out`; `offsets` reach further by the kernel on each side."""
    height, width = mask.shape
    reach = smoothing.size - 1
    h, v = np.zeros(_COLUMNS + 2 * reach, np.float32), np.zeros(_COLUMNS + 2 * reach, np.float32)
    h_slope = np.empty((_ROWS + 2 * reach, _COLUMNS), np.float32)
    v_smooth = np.empty((_ROWS + 2 * reach, _COLUMNS), np.float32)
    h_row, v_row = np.empty(_COLUMNS, np.float32), np.empty(_COLUMNS, np.float32)
    for y0 in range(0, height, _ROWS):
        rows = min(_ROWS, height - y0)
        for x0 in range(0, width, _COLUMNS):
            n = min(_COLUMNS, width - x0)
            if not _any(mask, y0, y0 + rows, x0, x0 + n):
                continue
            for y in range(rows + 2 * reach):
                _widen(h[: n + 2 * reach], offsets[0, y0 + y, x0:])
                _widen(v[: n + 2 * reach], offsets[1, y0 + y, x0:])
                _weigh(h_slope[y], h, slope[0])
                _weigh(v_smooth[y], v[reach:], smoothing[0])
                for k in range(1, reach + 1):
                    _add_differences(h_slope[y], h[reach + k :], h[reach - k :], slope[k])
                    _add_sums(v_smooth[y], v[reach + k :], v[reach - k :], smoothing[k])
            for y in range(rows):
                _weigh(h_row, h_slope[y + reach], smoothing[0])
                _weigh(v_row, v_smooth[y + reach], slope[0])
                for k in range(1, reach + 1):
                    _add_sums(h_row, h_slope[y + reach + k], h_slope[y + reach - k], smoothing[k])
                    _add_differences(v_row, v_smooth[y + reach + k], v_smooth[y + reach - k], slope[k])
                _as_levels(out[y0 + y, x0 : x0 + n], mask[y0 + y, x0:], h_row, v_row, lowest, gain)


@compiled
def _widen(wide: Floats, values: npt.NDArray[np.int8]) -> None:
    for x in range(wide.size):
        wide[x] = values[x]


@compiled
def _as_levels(levels: Bytes, mask: Bytes, a: Floats, b: Floats, lowest: np.float32, gain: np.float32) -> None:
    for x in range(levels.size):
        level = (min(a[x], b[x]) - lowest) * gain + np.float32(0.5)
        level = min(max(level, np.float32(0)), np.float32(255))
        levels[x] = np.uint8(level) * mask[x]


def flatness(
    offsets: npt.NDArray[np.int8],
    mask: Bytes,
    mpp: float,
    kernel_um: float,
    lowest: float,
    highest: float,
) -> Bytes:
    """How little the HV map falls at each pixel of `mask`: low on the border of two nuclei, high within one.

    Parameters
    ----------
    offsets : (2, H, W) int8
        HV map, 127 for a full offset.
    mask : (H + 2, W + 2) uint8
        1 where the answer is wanted; its outermost rows and columns lie outside the map.
    mpp, kernel_um : float
        µm per pixel; extent of the Sobel filter.
    lowest, highest : float
        Slope of the offsets, 1/µm, that becomes 0 and 255.

    Returns
    -------
    (H + 2, W + 2) uint8
        The smaller of the slopes of H along x and of V along y; 0 outside `mask`.
    """
    smoothing, slope = sobel_kernels(mpp, kernel_um)
    rise = 2 * float((slope * np.arange(slope.size)).sum())  # what the slope kernel makes of 1 per px
    unit = 127 * mpp * rise * float(2 * smoothing.sum() - smoothing[0])
    frame = smoothing.size  # the reach of the filter, and the frame of the mask
    padded = np.pad(offsets, ((0, 0), (frame, frame), (frame, frame)), mode="edge")
    out = np.zeros_like(mask)
    gain = 255 / ((highest - lowest) * unit)
    _slopes(padded, mask, smoothing, slope, np.float32(lowest * unit), np.float32(gain), out)
    return out
