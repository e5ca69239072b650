"""What HoVer-Net is trained to say of a patch, whose answer is smaller than what it is shown."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

SMALLEST_PX = 30  # smaller instances of the answer's area are not shown to the HV branch
BOX_MARGIN_PX = 2


def hovernet_targets(
    instance_map: npt.NDArray[np.integer[Any]], output_px: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """NP map (S, S) of 0 and 1, and HV map (2, S, S), of the middle `output_px` of a patch.

    Notes
    -----
    As published (vqdang/hover_net), which differs from `targets.hv_map`: pieces of one instance that do not touch are
    instances of their own, those below 30 px in the middle are left out, and so are those within 2 px of the patch's
    top or left border. The middle starts at half the difference, rounded down.
    """
    pieces = _pieces(instance_map)
    height, width = pieces.shape
    top, left = (height - output_px) // 2, (width - output_px) // 2
    middle = np.s_[top : top + output_px, left : left + output_px]
    offsets = np.zeros((2, height, width), np.float32)
    sizes = np.bincount(pieces[middle].ravel(), minlength=pieces.max() + 1)
    for number, place in enumerate(ndimage.find_objects(pieces), 1):
        if place is None or sizes[number] < SMALLEST_PX:
            continue
        y0, x0 = (side.start - BOX_MARGIN_PX for side in place)
        if y0 < 0 or x0 < 0:
            continue
        box = np.s_[y0 : place[0].stop + BOX_MARGIN_PX, x0 : place[1].stop + BOX_MARGIN_PX]
        inside = pieces[box] == number
        rows, columns = np.nonzero(inside)
        for channel, along in enumerate((columns, rows)):
            # Pixels are counted from 1 and the centre's from 0: zero lies a pixel before the centre.
            distance = (along + 1 - int(along.mean() + 0.5)).astype(np.float32)
            low, high = distance.min(), distance.max()
            scaled = np.where(distance < 0, distance / -low if low < 0 else 0, distance / high if high > 0 else 0)
            offsets[channel][box][rows, columns] = scaled
    return (instance_map[middle] > 0).astype(np.int64), offsets[:, *middle]


def _pieces(instance_map: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
    """Every 4-connected piece of every instance under a number of its own, 1, 2, ..."""
    pieces = np.zeros(instance_map.shape, np.int32)
    count = 0
    for number, place in enumerate(ndimage.find_objects(instance_map), 1):
        if place is not None:
            labels, found = ndimage.label(instance_map[place] == number)
            pieces[place][labels > 0] = labels[labels > 0] + count
            count += found
    return pieces
