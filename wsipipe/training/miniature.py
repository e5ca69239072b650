"""PanNuke and CoNIC in miniature: drawn images in the layouts of the real ones, to try everything in minutes."""

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsipipe.training.sources.conic import TYPES
from wsipipe.training.sources.pannuke import FOLDS, TISSUES

Array = npt.NDArray[Any]
# Hue tells the types apart, as far as a small network needs it.
NUCLEUS_COLOURS = ((95, 60, 140), (40, 40, 110), (150, 70, 130), (60, 60, 60), (120, 90, 170), (90, 40, 90))


def make_pannuke(dst: Path, images: int = 6, side: int = 256, seed: int = 0) -> None:
    """`Fold N/{images,masks}/foldN/*.npy`, so many images a fold; the first of each fold is without nuclei."""
    rng = np.random.default_rng(seed)
    for fold in FOLDS:
        pictures, masks = [], []
        for number in range(images):
            picture, instances, types = draw_tissue(rng, side, 5, nuclei=0 if number == 0 else 30)
            channels = [np.where(types == channel + 1, instances, 0) for channel in range(5)]
            pictures.append(picture)
            masks.append(np.stack([*channels, instances == 0], axis=-1))
        place = dst / f"Fold {fold}"
        for name in ("images", "masks"):
            (place / name / f"fold{fold}").mkdir(parents=True, exist_ok=True)
        np.save(place / "images" / f"fold{fold}" / "images.npy", np.stack(pictures).astype(np.float64))
        tissues = [list(TISSUES)[number % 3] for number in range(images)]
        np.save(place / "images" / f"fold{fold}" / "types.npy", np.array(tissues))
        np.save(place / "masks" / f"fold{fold}" / "masks.npy", np.stack(masks).astype(np.float64))


def make_conic(dst: Path, patients: int = 5, of_each: int = 1, side: int = 256, seed: int = 0) -> None:
    """`images.npy`, `labels.npy`, `counts.csv` and `patient_info.csv`."""
    rng = np.random.default_rng(seed)
    dst.mkdir(parents=True, exist_ok=True)
    drawn = [draw_tissue(rng, side, 6, nuclei=40, radius=(4, 7)) for _ in range(patients * of_each)]
    np.save(dst / "images.npy", np.stack([picture for picture, _, _ in drawn]))
    np.save(dst / "labels.npy", np.stack([np.stack(maps, -1) for _, *maps in drawn]).astype(np.uint16))
    with (dst / "counts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(TYPES)
        for _, instances, types in drawn:
            writer.writerow([len(np.unique(instances[types == number + 1])) for number in range(len(TYPES))])
    with (dst / "patient_info.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [
                ["patch_info"],
                *([f"p{patient}-{number:04d}"] for patient in range(patients) for number in range(of_each)),
            ]
        )


def draw_tissue(
    rng: np.random.Generator, side: int, types: int, nuclei: int, radius: tuple[int, int] = (7, 12)
) -> tuple[Array, Array, Array]:
    """Image (S, S, 3) uint8, instances (S, S) and types (S, S): pink ground, ellipses that overlap a little."""
    image = np.full((side, side, 3), (225, 160, 195), np.int16)
    instances, type_map = np.zeros((side, side), np.int32), np.zeros((side, side), np.int32)
    for _ in range(nuclei):
        nucleus = np.zeros((side, side), np.uint8)
        centre, axes = rng.integers(0, side, 2).tolist(), rng.integers(*radius, 2, endpoint=True).tolist()
        cv2.ellipse(nucleus, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        free = (nucleus > 0) & (instances == 0)
        if np.count_nonzero(free) < 0.7 * np.count_nonzero(nucleus) or np.count_nonzero(free) < 12:
            continue
        number, of_type = instances.max() + 1, int(rng.integers(types))
        instances[free], type_map[free] = number, of_type + 1
        image[free] = NUCLEUS_COLOURS[of_type]
    noise = rng.normal(0, 6, image.shape)
    picture = cv2.GaussianBlur(np.clip(image + noise, 0, 255).astype(np.uint8), (3, 3), 0)
    return np.asarray(picture), instances, type_map
