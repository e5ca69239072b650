"""Train and score the strategies of docs/replication.md, seed by seed; what is done already is kept.

    python workflows/scripts/replicate.py RUNS [STRATEGY-SEED]

From the root of the repository, with `data/default` and `data/replication/encoder.safetensors` in place.
RUNS/results.json holds the scores of every run on every fifth test image of CoNSeP and TNBC, RUNS/results.md their
mean over the seeds with the standard deviation.
"""

import json
import logging
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wsipipe.model.weights import load_model
from wsipipe.training.config import load_experiment
from wsipipe.training.data import PatchSet
from wsipipe.training.evaluate import evaluate
from wsipipe.training.loop import train

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiments" / "replication"
STRATEGIES, SEEDS, EVERY = ("adapter", "decoder", "full"), (1, 2, 3), 5
SCORES = ("bPQ", "mPQ", "dice", "aji")


def main(runs: Path, only: str | None) -> None:
    results: dict[str, Any] = {}
    path = runs / "results.json"
    if path.exists():
        results = json.loads(path.read_text())
    for seed in SEEDS:
        for strategy in STRATEGIES:
            name = f"{strategy}-{seed}"
            if name in results or name != (only or name):
                continue
            config = load_experiment(EXPERIMENTS / f"{strategy}.yaml", {"seed": seed})
            model = load_model(train(config, runs / name))
            results[name] = {}
            for folder in config.data:
                patches = thinned(PatchSet.open(folder, check_values=False))
                scores = evaluate(model, patches, "test", device="cpu", precision="fp32")
                results[name][patches.name] = {key: scores[key] for key in SCORES} | {"f1": scores["detection"]["f1"]}
            path.write_text(json.dumps(results, indent=1) + "\n")
    (runs / "results.md").write_text(as_table(results))


def as_table(results: dict[str, Any]) -> str:
    """Markdown: strategy by data set and score, over the seeds that are done."""
    names = (*SCORES, "f1")
    lines = ["| strategy | data | seeds | " + " | ".join(names) + " |", "| --- | --- " + "| ---: " * 6 + "|"]
    for strategy in STRATEGIES:
        of_strategy = [scores for name, scores in results.items() if name.startswith(f"{strategy}-")]
        for data in sorted({data for scores in of_strategy for data in scores}):
            cells = []
            for name in names:
                values = [v for s in of_strategy if (v := s[data][name]) is not None and v == v]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "-")
            lines.append(f"| {strategy} | {data} | {len(of_strategy)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def thinned(patches: PatchSet) -> PatchSet:
    """The set with every fifth of its test images."""
    kept = set(patches.of("test")[::EVERY].tolist())
    index = [p if p.split != "test" or i in kept else replace(p, split="") for i, p in enumerate(patches.index)]
    return replace(patches, index=tuple(index))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
