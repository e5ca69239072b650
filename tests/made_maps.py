"""Maps made up for the tests of nuclei: ellipses, crowded or apart, with the HV map that they define."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsipipe.maps import Maps
from wsipipe.training.targets import hv_map

TYPES = ("background", "neoplastic", "inflammatory", "connective")


def draw_ellipses(
    shape: tuple[int, int], ellipses: list[tuple[float, float, float, float, float]]
) -> npt.NDArray[np.int32]:
    """Instance map of ellipses (x, y, half axes, angle); a pixel of several belongs to the one it lies deepest in."""
    labels, depth = np.zeros(shape, np.int32), np.ones(shape)
    for i, (x, y, a, b, angle) in enumerate(ellipses, 1):
        reach = int(max(a, b)) + 2
        top, left = max(0, int(y) - reach), max(0, int(x) - reach)
        part = np.s_[top : int(y) + reach, left : int(x) + reach]
        rows, columns = np.indices(labels[part].shape)
        dx, dy = columns + left - x, rows + top - y
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        radius = (u / a) ** 2 + (v / b) ** 2
        mine = radius < depth[part]
        labels[part][mine], depth[part][mine] = i, radius[mine]
    return labels


def crowd(shape: tuple[int, int], spacing: float, seed: int) -> npt.NDArray[np.int32]:
    """Nuclei of about 24 px on a jittered grid; below a spacing of 30 px most of them touch."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[spacing / 2 : shape[0] : spacing, spacing / 2 : shape[1] : spacing]
    x, y = (c.ravel() + rng.uniform(-0.3, 0.3, c.size) * spacing for c in (x, y))
    a, b = rng.uniform(9, 16, x.size), rng.uniform(7, 12, x.size)
    return draw_ellipses(shape, list(zip(x, y, a, b, rng.uniform(0, np.pi, x.size), strict=True)))


def maps_of(labels: npt.NDArray[np.int32], noise: float = 0.0, seed: int = 0) -> Maps:
    """What a network would say: blurred, and with smooth noise of this standard deviation on NP and HV."""
    rng = np.random.default_rng(seed)

    def blurred(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        rough = ndimage.gaussian_filter(rng.standard_normal(values.shape, np.float32), 2) * 7
        return ndimage.gaussian_filter(values.astype(np.float32), 1) + noise * rough

    nuclei = np.round(255 * np.clip(blurred(labels > 0), 0, 1)).astype(np.uint8)
    offsets = np.round(127 * np.clip([blurred(o) for o in hv_map(labels)], -1, 1)).astype(np.int8)
    kind = np.where(labels > 0, 1 + labels % 3, 0)
    types = np.stack([np.round(200 * np.clip(blurred(kind == k), 0, 1)) for k in range(len(TYPES))]).astype(np.uint8)
    return Maps(nuclei, offsets, types)
