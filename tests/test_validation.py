"""Scores while training: of what the network answers for, counted as the published runs chose their weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_patches import CLASSES, write_set
from torch import nn
from torch.utils.data import DataLoader

from wsipipe.model.registry import SPECS
from wsipipe.training.config import TrainConfig
from wsipipe.training.crops import FixedCrops
from wsipipe.training.data import PatchSet
from wsipipe.training.found import nuclei_of
from wsipipe.training.objectives import objective_of
from wsipipe.training.targets import hv_map
from wsipipe.training.validation import validate


class Knowing(nn.Module):
    """Knows the truth of the crops that it is asked for in turn, but shows the middle only."""

    def __init__(self, crops: FixedCrops, border: int) -> None:
        super().__init__()
        self.crops, self.border, self.at = crops, border, 0

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        items = [self.crops[self.at + i] for i in range(len(image))]
        self.at += len(image)
        inner = slice(self.border, image.shape[2] - self.border)
        nuclei = torch.stack([(item["true_instances"][inner, inner] > 0).long() for item in items])
        types = torch.stack([item["true_types"][inner, inner] for item in items])
        hv = [torch.from_numpy(hv_map(item["true_instances"][inner, inner].numpy(), "exact")) for item in items]
        return {
            "nuclei": 20 * nn.functional.one_hot(nuclei, 2).movedim(-1, 1).float(),
            "types": 20 * nn.functional.one_hot(types, 3).movedim(-1, 1).float(),
            "offsets": torch.stack(hv),
        }


@pytest.mark.parametrize("border", [0, 16])
def test_a_network_that_knows_the_truth_of_the_middle_scores_high(tmp_path, border):
    folder = write_set(tmp_path / "apart")
    instances = np.zeros((4, 96, 96), np.uint16)
    for number, (y, x) in enumerate([(y, x) for y in (24, 56) for x in (24, 56)], start=1):
        instances[:, y : y + 16, x : x + 16] = number
    instances[3] = 0
    np.save(folder / "instances.npy", instances)
    np.save(folder / "types.npy", np.where(instances > 0, 1 + instances % 2, 0).astype(np.uint8))
    crops = FixedCrops(PatchSet.open(folder), "test", crop_px=96, with_truth=True)
    # A network that answers for less than it is shown is taught as HoVer-Net is.
    spec = SPECS["cellvta-nano"] if border == 0 else replace(SPECS["hovernet-fast"], margin_px=border)
    spec = replace(spec, class_names=CLASSES, class_colours=((0, 0, 0),) * 3)
    objective = objective_of(spec, TrainConfig(data={folder: 1.0}, steps=1))

    def scores(split: str) -> dict[str, float]:
        crops = FixedCrops(PatchSet.open(folder), split, crop_px=96, targets=objective.targets, with_truth=True)
        return validate(
            Knowing(crops, border), lambda output, batch: objective.loss(output, batch)[0], DataLoader(crops, 2),
            lambda image: image, lambda output: nuclei_of(output, spec), 3, with_pq=True,
        )  # fmt: skip

    known = scores("train")
    assert known["bPQ"] > 0.9
    assert known["mPQ"] > 0.9
    assert scores("test")["bPQ"] == 0  # a crop without true nuclei counts as 0, as it did there
    assert len(crops) == 1
