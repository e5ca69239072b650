"""Watershed from markers on 8-bit levels: a first-in-first-out queue a level."""

import numpy as np
import numpy.typing as npt

from wsipipe.compiled import compiled
from wsipipe.runs import Ints, find_runs, join_runs

Bytes = npt.NDArray[np.uint8]


@compiled
def flood(levels: Bytes, mask: Bytes, labels: Ints) -> None:
    """Let the labels above 0 grow, in place, over the pixels of `mask`, lowest level first.

    Parameters
    ----------
    levels : (H, W) uint8
        Height of each pixel.
    mask : (H, W) uint8
        1 where labels may grow; 0 in the outermost rows and columns.
    labels : (H, W) int32
        Markers above 0, all within `mask`, those of two labels nowhere side by side; 0 elsewhere.

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

    level, label = levels.ravel(), labels.ravel()
    dry, shore = np.empty(label.size, np.uint8), np.zeros(label.size, np.uint8)
    _find_dry(dry, mask.ravel(), label)  # to be flooded
    inner = label.size - width
    _find_shore(
        shore[width:inner], label[width:inner],
        dry[: inner - width], dry[width - 1 : inner - 1], dry[width + 1 : inner + 1], dry[2 * width :],
    )  # fmt: skip
    neighbours = (-width, -1, 1, width)
    # A queue a level, as a linked list of places in `pixel`: from its own place behind all others, where it begins, to
    # its last. What lies up to `taken` has left it.
    pixel, following = np.empty(largest, np.int32), np.empty(largest + 256, np.int32)
    taken, last = np.empty(256, np.int32), np.empty(256, np.int32)
    for region in range(start.size):
        if root[region] != region:
            continue
        queued = 0
        fewest, most = label.size, 0  # the least and the greatest label in the region
        i = region
        while i >= 0:
            for p in range(row[i] * width + start[i], row[i] * width + stop[i]):
                if shore[p]:
                    pixel[queued] = p
                    queued += 1
                    fewest, most = min(fewest, label[p]), max(most, label[p])
            i = next_run[i]
        if fewest >= most:  # one without a rival, or none at all
            i = region
            while queued and i >= 0:
                for p in range(row[i] * width + start[i], row[i] * width + stop[i]):
                    label[p] = most
                i = next_run[i]
            continue

        for k in range(256):
            taken[k] = last[k] = largest + k
            following[largest + k] = -1
        lowest, highest = 256, -1
        for place in range(queued):
            k = level[pixel[place]]
            following[last[k]], following[place] = place, -1
            last[k] = place
            lowest, highest = min(lowest, k), max(highest, k)
        k = lowest
        while k <= highest:
            place = following[taken[k]]
            if place < 0:
                k += 1
                continue
            taken[k] = place
            p = pixel[place]
            for step in neighbours:
                q = p + step
                if dry[q]:
                    dry[q] = 0
                    label[q] = label[p]
                    j = level[q]
                    pixel[queued] = q
                    following[last[j]], following[queued] = queued, -1
                    last[j] = queued
                    queued += 1
                    k, highest = min(k, j), max(highest, j)


@compiled
def _find_dry(dry: Bytes, mask: Bytes, label: Ints) -> None:
    for p in range(dry.size):
        dry[p] = mask[p] & (label[p] == 0)


@compiled
def _find_shore(shore: Bytes, label: Ints, above: Bytes, left: Bytes, right: Bytes, below: Bytes) -> None:
    """1 on the pixels of markers that have something to flood beside them."""
    for p in range(shore.size):
        shore[p] = (above[p] | left[p] | right[p] | below[p]) & (label[p] > 0)
