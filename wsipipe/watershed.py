"""Watershed from markers on 8-bit levels: a first-in-first-out queue a level."""

import numpy as np
import numpy.typing as npt

from wsipipe.compiled import compiled
from wsipipe.runs import Ints, find_runs, join_runs


@compiled
def flood(levels: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], labels: npt.NDArray[np.int32]) -> None:
    """Let the labels above 0 grow, in place, over the pixels of `mask`, lowest level first.

    Parameters
    ----------
    levels : (H, W) uint8
        Height of each pixel.
    mask : (H, W) uint8
        1 where labels may grow; 0 in the outermost rows and columns.
    labels : (H, W) int32
        Markers above 0, all within `mask`; 0 elsewhere.

    Notes
    -----
    Meyer 1991. Pixels of one level are taken in the order in which they were reached, markers in raster
    order: the same rule as `skimage.segmentation.watershed` without compactness. A pixel's label thus
    depends on nothing but the pixels on the ways from the markers to it, never on its place in the array.
    Regions of the mask do not touch, so each is flooded on its own, which keeps what is at work in the cache, and one
    with a single label is filled with it.
    """
    height, width = labels.shape
    rows, start, stop = find_runs(mask, 1)
    root = join_runs(rows, start, stop)
    row = np.empty(start.size, np.int32)
    next_run, last_run = np.full(start.size, -1, np.int32), np.empty(start.size, np.int32)
    area = np.zeros(start.size, np.int32)  # of a region, at its first run
    for y in range(height):
        for i in range(rows[y], rows[y + 1]):
            row[i] = y
            if root[i] != i:
                next_run[last_run[root[i]]] = i
            last_run[root[i]] = i
            area[root[i]] += stop[i] - start[i]
    largest = 0
    for i in range(start.size):
        largest = max(largest, area[i])

    level, wanted, label = levels.ravel(), mask.ravel(), labels.ravel()
    neighbours = (-width, -1, 1, width)
    pixel, following = np.empty(largest, np.int32), np.empty(largest, np.int32)  # the queues, as linked lists
    first, last = np.full(256, -1, np.int32), np.empty(256, np.int32)  # of each level
    for region in range(start.size):
        if root[region] != region:
            continue
        fewest, most = label.size, 0  # the least and the greatest label in the region
        i = region
        while i >= 0:
            for p in range(row[i] * width + start[i], row[i] * width + stop[i]):
                if label[p] > 0:
                    fewest, most = min(fewest, label[p]), max(most, label[p])
            i = next_run[i]
        if fewest >= most:  # none, or one without a rival
            i = region
            while i >= 0:
                for p in range(row[i] * width + start[i], row[i] * width + stop[i]):
                    label[p] = most
                i = next_run[i]
            continue

        queued, lowest, highest = 0, 256, -1
        i = region
        while i >= 0:
            for p in range(row[i] * width + start[i], row[i] * width + stop[i]):
                if label[p] == 0:
                    continue
                for step in neighbours:
                    if label[p + step] == 0 and wanted[p + step]:
                        k = level[p]
                        _queue(p, k, queued, pixel, following, first, last)
                        queued += 1
                        lowest, highest = min(lowest, k), max(highest, k)
                        break
            i = next_run[i]
        k = lowest
        while k <= highest:
            if first[k] < 0:
                k += 1
                continue
            p = pixel[first[k]]
            first[k] = following[first[k]]
            for step in neighbours:
                q = p + step
                if label[q] == 0 and wanted[q]:
                    label[q] = label[p]
                    j = level[q]
                    _queue(q, j, queued, pixel, following, first, last)
                    queued += 1
                    k, highest = min(k, j), max(highest, j)


@compiled
def _queue(p: int, k: int, place: int, pixel: Ints, following: Ints, first: Ints, last: Ints) -> None:
    """Put pixel `p` at the end of the queue of level `k`."""
    pixel[place], following[place] = p, -1
    if first[k] < 0:
        first[k] = place
    else:
        following[last[k]] = place
    last[k] = place
