"""Pixels to tensor, network output to HV, NP and NC maps: pure; the one pure module that may name torch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Maps:
    """What the network says of a region, as stored: 8 bits a value.

    Attributes
    ----------
    nuclei : (H, W) uint8
        NP map: probability of nucleus, round(255 p).
    offsets : (2, H, W) int8
        HV map: horizontal, then vertical offset from the nucleus's centre, round(127 v).
    types : (K, H, W) uint8
        NC map: probability of each type, round(255 p); 0 is background.
    """

    nuclei: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int8]
    types: npt.NDArray[np.uint8]
