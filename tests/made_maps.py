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


# -- scenes, each 600 x 700 px -------------------------------------------------------------------------------------


def crowded() -> npt.NDArray[np.int32]:
    return crowd((600, 700), 27, 1)


def apart() -> npt.NDArray[np.int32]:
    return crowd((600, 700), 45, 2)


def chain_along_seams() -> npt.NDArray[np.int32]:
    """Touching nuclei, 700 px in a row: on the seams of blocks of 192 and 256 px, and down a column."""
    rows = [(x, y, 14, 11, 0.1 * x) for y in (192, 256, 384) for x in range(10, 700, 23)]
    return draw_ellipses((600, 700), rows + [(192, y, 12, 13, 0.2 * y) for y in range(8, 600, 22)])


def on_corners() -> npt.NDArray[np.int32]:
    corners = [(x, y) for x in (192, 256, 384, 512, 576) for y in (192, 256, 384, 512)]
    return draw_ellipses((600, 700), [(x + dx, y + dy, 17, 12, x) for x, y in corners for dx, dy in ((0, 0), (20, 5))])


def at_the_edge() -> npt.NDArray[np.int32]:
    sides = [(x, y, 14, 12, x + y) for x in range(0, 701, 25) for y in (0, 4, 596, 600)]
    return draw_ellipses((600, 700), sides + [(x, y, 14, 12, y) for x in (0, 3, 698, 700) for y in range(0, 601, 26)])


def wide() -> npt.NDArray[np.int32]:
    """Nuclei as wide as the halo, among small ones."""
    giants = [(x, y, 63, 40, x) for x, y in ((190, 200), (400, 256), (256, 450), (560, 384), (70, 500))]
    labels, giant = crowd((600, 700), 30, 4), draw_ellipses((600, 700), giants)
    return np.where(giant > 0, giant + labels.max(), labels).astype(np.int32)


SCENES = {scene.__name__: scene for scene in (crowded, apart, chain_along_seams, on_corners, at_the_edge, wide)}
