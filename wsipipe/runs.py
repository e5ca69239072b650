"""Connected regions of a mask by runs: stretches of equal pixels in a row, joined to the runs that they touch above.

The work is one look at every pixel and one union a run, whatever the size or the number of regions.
"""

import numpy as np
import numpy.typing as npt

from wsipipe.compiled import compiled

Mask = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]


@compiled
def find_runs(mask: Mask, value: int) -> tuple[Ints, Ints, Ints]:
    """Runs of `value`: index of each row's first run (H + 1,), then first and past-the-last column of each run."""
    height, width = mask.shape
    rows = np.zeros(height + 1, np.int32)
    start, stop = np.empty(width + height, np.int32), np.empty(width + height, np.int32)
    n = 0
    for y in range(height):
        if n + width > start.size:  # more than a row can hold
            start, stop = _longer(start, width), _longer(stop, width)
        inside = False
        for x in range(width):
            if (mask[y, x] == value) != inside:
                if inside:
                    stop[n] = x
                    n += 1
                else:
                    start[n] = x
                inside = not inside
        if inside:
            stop[n] = width
            n += 1
        rows[y + 1] = n
    return rows, start[:n], stop[:n]


@compiled
def _longer(values: Ints, room: int) -> Ints:
    more = np.empty(2 * values.size + room, np.int32)
    for i in range(values.size):
        more[i] = values[i]
    return more


@compiled
def _root(parent: Ints, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@compiled
def join_runs(rows: Ints, start: Ints, stop: Ints) -> Ints:
    """For each run the first run, in raster order, of the 4-connected region that it belongs to."""
    parent = np.arange(start.size).astype(np.int32)
    for y in range(1, rows.size - 1):
        above = rows[y - 1]
        for i in range(rows[y], rows[y + 1]):
            while above < rows[y] and stop[above] <= start[i]:
                above += 1
            j = above
            while j < rows[y] and start[j] < stop[i]:
                a, b = _root(parent, i), _root(parent, j)
                parent[max(a, b)] = min(a, b)
                j += 1
    for i in range(start.size):
        parent[i] = parent[parent[i]]  # roots come first, so theirs are settled
    return parent


@compiled
def fill_small_holes(mask: Mask, widest: int) -> None:
    """Set to 1, in place, every 4-connected region of 0 that is at most `widest` px wide and high, off the border."""
    height, width = mask.shape
    rows, start, stop = find_runs(mask, 0)
    root = join_runs(rows, start, stop)
    left, right = start.copy(), stop.copy()
    top, bottom = np.empty_like(start), np.empty_like(start)
    for y in range(height):
        for i in range(rows[y], rows[y + 1]):
            r = root[i]
            if r == i:
                top[i] = y
            bottom[r] = y
            left[r], right[r] = min(left[r], start[i]), max(right[r], stop[i])
    for y in range(height):
        for i in range(rows[y], rows[y + 1]):
            r = root[i]
            if (
                right[r] - left[r] <= widest
                and bottom[r] - top[r] < widest
                and left[r] > 0
                and right[r] < width
                and top[r] > 0
                and bottom[r] < height - 1
            ):
                for x in range(start[i], stop[i]):
                    mask[y, x] = 1


@compiled
def label_regions(mask: Mask, labels: Ints) -> int:
    """Write 1, 2, ... into `labels` where `mask` is 1, by 4-connected regions in raster order; their number."""
    rows, start, stop = find_runs(mask, 1)
    root = join_runs(rows, start, stop)
    number = np.zeros(start.size, np.int32)
    n = 0
    for y in range(mask.shape[0]):
        for i in range(rows[y], rows[y + 1]):
            if root[i] == i:
                n += 1
                number[i] = n
            for x in range(start[i], stop[i]):
                labels[y, x] = number[root[i]]
    return n


@compiled
def without_frame(labels: Ints) -> Ints:
    """All but the outermost rows and columns, moved together in the same memory: large arrays are slow to come by."""
    height, width = labels.shape[0] - 2, labels.shape[1] - 2
    flat = labels.ravel()
    for y in range(height):
        for x in range(width):
            flat[y * width + x] = labels[y + 1, x + 1]
    return flat[: height * width].reshape((height, width))
