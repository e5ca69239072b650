"""Pictures without a nucleus, made: what a slide holds between its cells, and what is no tissue at all.

A network that only ever sees tissue finds nuclei in noise, in ink and in stains that it does not know. Half of the
pictures are mosaics of windows that hold no nucleus in training images, most of them stained otherwise; the others are
glass, noise and clouds of any colour. Some carry strokes of a pen.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsipipe.training.colour import dyes_mixed
from wsipipe.training.data import Patch, PatchSet
from wsipipe.training.write import SOURCES, Description, Drawn, digest_of, write_patch_set

Array = npt.NDArray[Any]
Rng = np.random.Generator

SIDE_PX, WINDOW_PX = 512, 64
COUNT, VALIDATES = 240, 8  # pictures; every so many validates
MPP = 0.25
SEED = 7


def write_negatives(dst: Path, sets: Sequence[PatchSet], class_names: tuple[str, ...]) -> PatchSet:
    """Write `COUNT` pictures as the patch set `dst`, or open it if it is already there.

    Windows come from the training images of `sets` alone.

    Raises
    ------
    DataError
        If `dst` was made of something else, or `sets` were changed since.
    """
    about = Description(
        name="negatives",
        mpp=MPP,
        class_names=class_names,
        source="made; windows without nuclei of " + ", ".join(patches.name for patches in sets),
        licence="as those sets",
        notes={"count": COUNT, "seed": SEED, SOURCES: digest_of(dst, (), *(patches.fingerprint for patches in sets))},
    )
    names = [f"negative-{i:03d}" for i in range(COUNT)]
    index = [Patch(name, name, "train" if i % VALIDATES else "validation") for i, name in enumerate(names)]
    return write_patch_set(dst, about, index, (SIDE_PX, SIDE_PX), lambda: _pictures(sets))


def windows_without_nuclei(patches: PatchSet, rng: Rng, count: int) -> list[Array]:
    """Up to `count` windows of the training images, `WINDOW_PX` a side at `MPP`, without a pixel of a nucleus."""
    side = round(WINDOW_PX * MPP / patches.mpp)
    found: list[Array] = []
    for number in rng.permutation(patches.of("train")):
        clear = np.asarray(patches.instances[number]) == 0
        rows, columns = (length // side for length in clear.shape)
        if min(rows, columns) == 0:
            return found
        cells = clear[: rows * side, : columns * side].reshape(rows, side, columns, side).all((1, 3))
        for y, x in rng.permutation(np.argwhere(cells))[:8]:
            window = patches.images[number, y * side : (y + 1) * side, x * side : (x + 1) * side]
            found.append(cv2.resize(np.ascontiguousarray(window), (WINDOW_PX, WINDOW_PX), interpolation=cv2.INTER_AREA))
        if len(found) >= count:
            return found[:count]
    return found


def _pictures(sets: Sequence[PatchSet]) -> Iterator[Drawn]:
    rng = np.random.default_rng(SEED)
    windows = [window for patches in sets for window in windows_without_nuclei(patches, rng, 600)]
    nothing = np.zeros((SIDE_PX, SIDE_PX), np.uint16)
    for i in range(COUNT):
        picture = _mosaic(windows, rng) if i % 2 and windows else _field(rng)
        if rng.random() < 0.2:
            picture = _inked(picture, rng)
        yield Drawn(picture, nothing, nothing)


def _mosaic(windows: Sequence[Array], rng: Rng) -> Array:
    """Windows side by side; three times of four the dyes are others: eosin becomes DAB, say."""
    along = SIDE_PX // WINDOW_PX
    chosen = [windows[i] for i in rng.integers(len(windows), size=along * along)]
    rows = [np.concatenate(chosen[along * k : along * (k + 1)], axis=1) for k in range(along)]
    picture = np.concatenate(rows)
    if rng.random() < 0.75:
        mixing = np.eye(3)[rng.permutation(3)] * rng.uniform(0.3, 1.6, 3)[:, None]
        picture = dyes_mixed(picture, mixing * (0.6 + 0.4 * np.eye(3)))
    return picture


def _field(rng: Rng) -> Array:
    """One colour, from glass to dark, with clouds of any size and noise of any grain."""
    colour = rng.uniform(200, 250, 3) if rng.random() < 0.3 else rng.uniform(60, 250, 3)
    if rng.random() < 0.4:
        colour[:] = colour.mean()
    picture = np.broadcast_to(colour, (SIDE_PX, SIDE_PX, 3)).astype(np.float32)
    for sigma in rng.uniform(1, 60, int(rng.integers(0, 3))):
        shape = (SIDE_PX, SIDE_PX, 3 if rng.random() < 0.3 else 1)
        cloud = cv2.GaussianBlur(rng.standard_normal(shape, np.float32), (0, 0), sigma).reshape(SIDE_PX, SIDE_PX, -1)
        picture = picture + rng.uniform(0, 25) * cloud / cloud.std()
    grain: Array = rng.standard_normal((SIDE_PX, SIDE_PX, 3), np.float32)
    if rng.random() < 0.4:
        grain = cv2.GaussianBlur(grain, (0, 0), rng.uniform(0.4, 1.5))
    if rng.random() < 0.3:
        grain = grain[..., :1]
    field: Array = np.clip(picture + rng.uniform(0, 45) * grain / grain.std(), 0, 255).astype(np.uint8)
    return field


def _inked(picture: Array, rng: Rng) -> Array:
    """Strokes of a felt pen: broad, of one strong colour, not opaque."""
    layer = picture.copy()
    strength = np.array([rng.integers(0, 80), rng.integers(0, 120), 160])
    colour = tuple(int(value) for value in rng.permutation(strength))
    for _ in range(int(rng.integers(1, 4))):
        bend = rng.uniform(-0.2 * SIDE_PX, 1.2 * SIDE_PX, (4, 1, 2)).astype(np.int32)
        cv2.polylines(layer, [bend], False, colour, int(rng.integers(8, 70)), cv2.LINE_AA)
    return cv2.addWeighted(layer, 0.75, picture, 0.25, 0)
