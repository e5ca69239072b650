"""Patch sets of drawn discs, for tests of training."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("background", "round", "long")


def write_set(folder: Path, count: int = 4, side: int = 96, typed: bool = True, seed: int = 0, **about: object) -> Path:
    """A patch set of discs; nucleus k is of type 1 + k % 2. Images 0 and 1 train, 2 validates, the rest test."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    instances = np.zeros((count, side, side), np.uint16)
    for mask in instances:
        canvas = mask.astype(np.int32)
        for k, (x, y) in enumerate(rng.integers(8, side - 8, (12, 2)), 1):
            cv2.circle(canvas, (int(x), int(y)), 6, k, -1)
        mask[:] = canvas
    images = np.where(instances[..., None] > 0, (95, 60, 140), (225, 160, 195)).astype(np.uint8)
    np.save(folder / "images.npy", images)
    np.save(folder / "instances.npy", instances)
    if typed:
        np.save(folder / "types.npy", np.where(instances > 0, 1 + instances % 2, 0).astype(np.uint8))
    splits = ["train", "train", "validation", "test", *["test"] * count][:count]
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("name", "group", "split"), *((f"i{i}", f"g{i}", s) for i, s in enumerate(splits))])
    description = {"format": 1, "name": folder.name, "mpp": 0.25, "class_names": CLASSES if typed else None}
    description |= {"source": "drawn", "licence": "CC0-1.0"} | about
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder
