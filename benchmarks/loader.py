"""Does reading and augmenting keep up? Crops a second of one worker, beside what a training step takes.

    python benchmarks/loader.py

Recipes `default` and `published` on drawn images, 256 px; steps (forward, loss, backward, update) of the small models.
Both on one thread and by the seconds of CPU they cost, so that other work on the machine does not count. The last line
is JSON: crops a second of each recipe, those each model uses, and their ratio.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from wsipipe.model.registry import SPECS, build
from wsipipe.training.augment import RECIPES
from wsipipe.training.crops import MixedCrops, Source, start_worker
from wsipipe.training.data import PatchSet
from wsipipe.training.losses import CellVTALoss
from wsipipe.training.miniature import make_pannuke
from wsipipe.training.sources.pannuke import prepare_pannuke


def loader_rate(patches: PatchSet, recipe: str, crops: int, batch: int) -> float:
    """Crops a second of CPU, put together to batches as a worker does."""
    items = MixedCrops([Source(patches)], RECIPES[recipe], crops + batch, mpp=0.25, tissues=patches.tissues)
    loader = iter(DataLoader(items, batch))
    next(loader)
    started = time.process_time()
    seen = sum(len(part["image"]) for part in loader)
    return seen / (time.process_time() - started)


def step_rate(name: str, batch: int, steps: int) -> float:
    """Crops that training uses up in a second of CPU, data there already."""
    network, criterion = build(SPECS[name]), CellVTALoss(double_softmax=False)
    optimizer = torch.optim.AdamW(network.parameters())
    image = torch.randn(batch, 3, 256, 256)
    target = {
        "nuclei": torch.zeros(batch, 256, 256, dtype=torch.int64),
        "offsets": torch.zeros(batch, 2, 256, 256),
        "types": torch.zeros(batch, 256, 256, dtype=torch.int64),
    }
    spent = []
    for _ in range(steps + 1):
        started = time.process_time()
        optimizer.zero_grad()
        criterion(network(image), target)[0].backward()
        optimizer.step()
        spent.append(time.process_time() - started)
    return batch / min(spent[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="cellvta-nano,cellvta-small")
    parser.add_argument("--crops", type=int, default=160)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    start_worker(0)  # one thread, as in a worker
    with tempfile.TemporaryDirectory() as place:
        make_pannuke(Path(place) / "src", images=4)
        patches = prepare_pannuke(Path(place) / "src", Path(place) / "set")
        rates = {recipe: loader_rate(patches, recipe, options.crops, options.batch) for recipe in RECIPES}
    for recipe, rate in rates.items():
        print(f"recipe {recipe:12} {rate:8.1f} crops/s from one worker")
    used = {}
    for name in options.models.split(","):
        used[name] = step_rate(name, options.batch, options.steps)
        spare = ", ".join(f"{rate / used[name]:.1f} x by {recipe}" for recipe, rate in rates.items())
        print(f"{name:19} {used[name]:8.1f} crops/s used by one thread; one worker gives {spare}")
    ratios = {
        name: {recipe: round(rate / rate_used, 2) for recipe, rate in rates.items()} for name, rate_used in used.items()
    }
    print(json.dumps({"crops_per_s": {k: round(v, 1) for k, v in rates.items()},
                      "used_per_s": {k: round(v, 2) for k, v in used.items()}, "ratio": ratios}))  # fmt: skip


if __name__ == "__main__":
    main()
