"""Instance maps to HV maps: what the offsets of a network are trained to say. The inverse of `wsipipe.instances`."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt


def hv_map(
    instance_map: npt.NDArray[np.integer[Any]], variant: Literal["published", "exact"] = "published"
) -> npt.NDArray[np.float32]:
    """Offset of every nucleus pixel from its nucleus's centre, each side scaled to 1.

    Parameters
    ----------
    instance_map : (H, W) int
        0 is background, every positive value one nucleus, in one piece or several; gaps between the values are fine.
    variant : {"published", "exact"}
        "exact": the centre is the mean of the pixels. "published": as the networks in use were trained, bit for
        bit, see Notes.

    Returns
    -------
    (2, H, W) float32
        Horizontal, then vertical offset, in [-1, 1]; 0 on the background.

    Raises
    ------
    ValueError
        If `instance_map` is not a 2D array of integers without negative values, or the variant is unknown.

    Notes
    -----
    Graham et al. 2019, HoVer-Net, doi:10.1016/j.media.2019.101563. The published variant rounds the centre to a
    pixel and then counts pixels from 1, so its zero lies one pixel left of and above that centre. Its rules for growing
    the box of a nucleus (by 2 px, at the right-hand side up to the number of *rows*) decide nothing on images of 4 px
    and more, and are left out. A map without background raises there and is a map like any other here.

    Examples
    --------
    >>> hv_map(np.array([[0, 7, 7, 7, 0]]), variant="exact")[0]
    array([[ 0., -1.,  0.,  1.,  0.]], dtype=float32)
    """
    if instance_map.ndim != 2 or not np.issubdtype(instance_map.dtype, np.integer):
        raise ValueError(f"an instance map is a 2D array of integers, not {instance_map.ndim}D {instance_map.dtype}")
    if variant not in ("published", "exact"):
        raise ValueError(f"the variant of an HV map is 'published' or 'exact', not {variant!r}")
    offsets = np.zeros((2, *instance_map.shape), np.float32)
    pixels = np.flatnonzero(instance_map)
    if pixels.size == 0:
        return offsets
    values = instance_map.ravel()[pixels]
    if values.min() < 0:
        raise ValueError("an instance map holds no negative values")
    if values.max() > instance_map.size:  # the tables below have a row for every id up to the largest
        values = np.unique(values, return_inverse=True)[1]
    ids = values.astype(np.intp)

    rows, columns = np.divmod(pixels, instance_map.shape[1])
    offsets[0].flat[pixels] = _scaled_offset(ids, columns, variant)
    offsets[1].flat[pixels] = _scaled_offset(ids, rows, variant)
    return offsets


def _scaled_offset(ids: npt.NDArray[np.intp], along: npt.NDArray[np.intp], variant: str) -> npt.NDArray[np.float64]:
    """Distance of every pixel from its nucleus's centre on one axis, over that of the farthest on the same side."""
    pixels = np.bincount(ids)
    centre = np.bincount(ids, weights=along) / np.maximum(pixels, 1)
    if variant == "published":
        centre = np.floor(centre + 0.5) - 1
    first, last = np.full(pixels.size, np.iinfo(np.int64).max), np.full(pixels.size, -1)
    np.minimum.at(first, ids, along)
    np.maximum.at(last, ids, along)
    distance = along - centre[ids]
    reach = np.where(distance < 0, (centre - first)[ids], (last - centre)[ids])
    return np.divide(distance, reach, out=np.zeros_like(distance), where=distance != 0)
