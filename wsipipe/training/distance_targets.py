"""What CISCNet is trained to say of a patch: how deep every pixel lies in its nucleus."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import regionprops

REACH = 1.2  # of a nucleus's crop, in lengths of its major axis to each side of the centre


def distance_map(instance_map: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
    """(H, W) distance of every nucleus pixel from outside its nucleus, the deepest of each nucleus being 1.

    As published (Team-ciscNet/ciscNet-CoNIC-Challenge-2022): the border of the image is not outside, and a nucleus is
    looked at in a window of 1.2 major axes to each side of its rounded centre.
    """
    distances = np.zeros(instance_map.shape, np.float32)
    for nucleus in regionprops(instance_map):
        reach = int(REACH * math.ceil(nucleus.axis_major_length))
        if reach <= 1:
            continue
        y, x = (round(value) for value in nucleus.centroid)
        box = np.s_[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach]
        inside = instance_map[box] == nucleus.label
        depth = ndimage.distance_transform_edt(inside)
        if depth.max() > 0:
            distances[box] += (depth / depth.max()).astype(np.float32) * inside
    return distances


def distance_targets(
    instance_map: npt.NDArray[np.integer[Any]], type_map: npt.NDArray[np.integer[Any]], classes: int
) -> npt.NDArray[np.float32]:
    """(`classes`, H, W): the distance map over all types, then masked by each type 1 to `classes` - 1."""
    distances = distance_map(instance_map)
    return np.stack([distances, *(distances * (type_map == number) for number in range(1, classes))])
