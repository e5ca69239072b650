"""Does reading and augmenting keep up? Crops a second of one worker, beside what a training step takes.

    python benchmarks/loader.py

Every architecture with its own targets and loss: crops of 256 px of drawn images by the recipes `default` and
`published`, and the step of `wsipipe train` (forward, loss, backward, update, average). Both on one thread and by the
seconds of CPU they cost, so that other work on the machine does not count. The last line is JSON: for every model
crops a second of a worker by recipe, crops a second that training uses up, and their ratios: above 1 the loader waits
for the step.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from wsipipe.training.augment import RECIPES
from wsipipe.training.batches import open_sets, training_batches, training_crops
from wsipipe.training.config import TrainConfig
from wsipipe.training.crops import start_worker
from wsipipe.training.data import same_classes
from wsipipe.training.loop import Learner
from wsipipe.training.miniature import make_pannuke
from wsipipe.training.network import spec_of
from wsipipe.training.objectives import objective_of
from wsipipe.training.sources.pannuke import prepare_pannuke
from wsipipe.training.team import start_team

MODELS = "cellvta-nano,cellvta-small,hovernet-fast,ciscnet,pointnu-net"


def rates(config: TrainConfig, crops: int, steps: int) -> dict[str, float]:
    """Crops a second of CPU: those that a worker puts into batches by each recipe, and those that steps `use`."""
    sets, team = open_sets(config), start_team(config)
    spec = spec_of(config, same_classes(list(sets.values())))
    objective = objective_of(spec, config)
    found: dict[str, float] = {}
    for recipe in RECIPES:
        of_recipe = config.model_copy(update={"recipe": recipe})
        drawn = training_crops(of_recipe, spec, sets, (), objective.targets)
        batches = training_batches(of_recipe, drawn, 0, 1 + crops // config.batch_size, team)
        first = next(batches)  # opens the files
        started = time.process_time()
        seen = sum(len(batch["image"]) for batch in batches)
        found[recipe] = seen / (time.process_time() - started)

    learner = Learner(config, spec, objective, torch.device("cpu"))
    learner.join(team)
    spent = []
    for step in range(steps + 1):
        started = time.process_time()
        learner.step(iter([first]), step, config.learning_rate)
        spent.append(time.process_time() - started)
    return {**found, "use": config.batch_size / min(spent[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--crops", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    start_worker(0)  # one thread, as in a worker
    figures = {}
    with tempfile.TemporaryDirectory() as place:
        make_pannuke(Path(place) / "src", images=4)
        folder = prepare_pannuke(Path(place) / "src", Path(place) / "set").folder
        for name in options.models.split(","):
            config = TrainConfig(
                model=name, data={folder: 1.0}, steps=1, batch_size=options.batch, workers=0, device="cpu",
                precision="fp32",
            )  # fmt: skip
            found = rates(config, options.crops, options.steps)
            ratios = {f"ratio_{recipe}": found[recipe] / found["use"] for recipe in RECIPES}
            figures[name] = {key: round(value, 2) for key, value in {**found, **ratios}.items()}
            made = ", ".join(f"{found[recipe]:.1f} by {recipe}" for recipe in RECIPES)
            print(f"{name:14} uses {found['use']:6.2f} crops/s; one worker makes {made}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
