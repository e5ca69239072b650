"""A demonstration slide made of what is installed: real tissue, no network, the same bytes every time.

The tissue is the colon that scikit-image ships (`skimage.data.immunohistochemistry`, 512 x 512 px, no known copyright
restrictions). It is stained with haematoxylin and brown DAB; the two are taken apart and put together again in the
colours of H&E.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsipipe.atomic import finished

# µm/px. The picture does not say. At 0.5 the nuclei of the glands, about 10 x 22 px, are 5 x 11 µm, as those of colon
# epithelium are, and the median of all, outlined by threshold, has 20 to 30 µm²; at 0.25 it would have a quarter.
MPP = 0.5
SIDE_PX = 2048
LEVELS = 4
JPEG_QUALITY = 90
GLASS = (243.0, 242.0, 244.0)  # RGB of the empty slide
HAEMATOXYLIN = (0.62, 0.71, 0.34)  # colour of a stain: optical density in R, G, B, here of unit length
EOSIN = (0.14, 0.88, 0.46)
WAVES = ((3, 0.12, 1.0), (5, 0.07, 0.3), (11, 0.03, 2.0), (29, 0.012, 0.0))  # of the border: count, height, phase

Plane = npt.NDArray[np.float64]


def make_demo_slide(path: Path, side_px: int = SIDE_PX) -> Path:
    """Write a pyramidal SVS of `side_px` x `side_px` px at 0.5 µm/px to `path`, and return `path`.

    Four levels, each half the one before, in JPEG tiles of 256 px, described as Aperio does. A slide that is there
    already is written anew.
    """
    import tifffile

    with finished(path) as partial, tifffile.TiffWriter(partial) as tiff:
        level = draw_tissue(side_px)
        for n in range(LEVELS):
            size = f"{side_px}x{side_px} [0,0 {side_px}x{side_px}] (256x256)"
            if n:
                size += f" -> {level.shape[1]}x{level.shape[0]}"
            tiff.write(
                level,
                tile=(256, 256),
                photometric="rgb",  # of what is given; JPEG turns it into YCbCr
                subsampling=(1, 1),  # colours as sharp as the nuclei
                compression="jpeg",
                compressionargs={"level": JPEG_QUALITY},
                description=f"Aperio Image Library v12.0.0\r\n{size} JPEG/RGB Q={JPEG_QUALITY}"
                f"|AppMag = {10 / MPP:g}|MPP = {MPP:g}",
                subfiletype=1 if n else 0,
                metadata=None,
                software=False,
            )
            level = _halved(level)
    return path


def draw_tissue(side_px: int = SIDE_PX) -> npt.NDArray[np.uint8]:
    """(side, side, 3) RGB: a ragged piece of tissue in H&E, with white glass round it.

    Raises
    ------
    ValueError
        If the side is not a positive multiple of 16 px, so that every level has whole pixels.
    """
    if side_px < 16 or side_px % 16:
        raise ValueError(f"a side of {side_px} px does not halve evenly; it must be a positive multiple of 16")
    y, x = np.mgrid[:side_px, :side_px] + 0.5 - side_px / 2
    density = (_mosaic(x, y) * _cover(x, y)[..., None]) @ np.array([HAEMATOXYLIN, EOSIN])
    rgb: npt.NDArray[np.uint8] = (np.array(GLASS) * 10**-density).round().astype(np.uint8)
    return rgb


@lru_cache(maxsize=1)
def _stains() -> Plane:
    """(2, 512, 512) optical density of haematoxylin and eosin."""
    from scipy.ndimage import gaussian_filter
    from skimage.color import rgb_from_hed
    from skimage.data import immunohistochemistry

    picture = np.maximum(immunohistochemistry(), 1.0)
    density = np.maximum(np.log10(245.0 / picture), 0)  # 245: its glass
    blue, _, brown = rgb_from_hed / np.linalg.norm(rgb_from_hed, axis=1, keepdims=True)
    amounts = np.maximum(density @ np.linalg.pinv(np.stack([blue, brown])), 0)
    # DAB is heavy at membranes and light between, eosin is even: dense DAB is levelled. Stroma took no DAB but takes
    # eosin: a share of all that is not glass. A little blur closes the gaps that dense DAB leaves in nuclei.
    brown_levelled = amounts[..., 1] / (1 + 2 * amounts[..., 1])
    ground = gaussian_filter(np.minimum(np.linalg.norm(density, axis=2), 0.3), 1.5)
    haematoxylin = 1.9 * np.maximum(gaussian_filter(amounts[..., 0], 0.7) - 0.03, 0)
    eosin = 0.35 * brown_levelled + 0.45 * ground
    return np.stack([haematoxylin, eosin])


def _mosaic(x: Plane, y: Plane) -> Plane:
    """Stains (..., 2) at points counted from the centre: the picture mirrored on without end, turned and gently bent.

    Mirroring leaves no seams; turning and bending hide the mirrors. Lengths change by less than a tenth.
    """
    from scipy.ndimage import map_coordinates

    turned_x = 0.9 * x - 0.436 * y + 12 * np.sin(y / 130) + 130
    turned_y = 0.436 * x + 0.9 * y + 12 * np.sin(x / 170 + 1) + 60
    place = [turned_y, turned_x]
    return np.stack([map_coordinates(stain, place, order=1, mode="reflect") for stain in _stains()], axis=2)


def _cover(x: Plane, y: Plane) -> Plane:
    """Share of tissue at points counted from the centre: 1 within a wavy outline, 0 outside, soft over a few px."""
    angle = np.arctan2(y, x)
    outline = 0.4 * len(x) * (1 + sum(height * np.sin(count * angle + phase) for count, height, phase in WAVES))
    return np.clip((outline - np.hypot(x, y)) / 4 + 0.5, 0, 1)


def _halved(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    height, width = rgb.shape[0] // 2, rgb.shape[1] // 2
    half: npt.NDArray[np.uint8] = rgb.reshape(height, 2, width, 2, 3).mean((1, 3)).round().astype(np.uint8)
    return half
