# The paper's tables: prepare -> train (every split) -> evaluate -> tables.
#
#     snakemake -s workflows/training.smk --cores 8 --resources gpu=1
#     snakemake -s workflows/training.smk --cores 2 --config scale=mini      (drawn data, small networks, minutes)
#
# Full scale wants data/raw/pannuke and data/raw/conic as their authors publish them, and the encoders' weights in
# weights/: see docs/training.md. `experiments` names the rows, `splits` those of them, `epochs` is how long they train,
# `out` the folder of all that is made.
import json
import shlex
import sys
from pathlib import Path

import yaml

from wsipipe.training.config import experiment_files

REPOSITORY = Path(workflow.basedir).parent
EXPERIMENTS = REPOSITORY / "configs" / "experiments"
MINI = config.get("scale", "full") == "mini"
OUT = config.get("out", "results/mini" if MINI else "results/training")
RAW = f"{OUT}/raw" if MINI else config.get("raw", "data/raw")
WSIPIPE = f"{sys.executable} -m wsipipe"

# The three splits of PanNuke, as (train, validation, test) of its folds; CoNIC has one.
SPLITS = {"pannuke": {"1": "123", "2": "213", "3": "321"}, "conic": {"1": None}}
ROWS = (
    [
        "pannuke/cellvta-uni",
        "pannuke/cellvit-uni",
        "pannuke/ciscnet",
        "pannuke/pointnu-net",
        "conic/cellvta-uni",
        "conic/hovernet",
    ]
    if MINI
    else sorted(
        f"{p.parent.name}/{p.stem}" for d in SPLITS for p in (EXPERIMENTS / d).glob("*.yaml") if p.stem != "base"
    )
)
ROWS = str(config["experiments"]).split(",") if "experiments" in config else ROWS
ONLY = str(config.get("splits", "")).split(",")
RUNS = [f"{row}/split{split}" for row in ROWS for split in SPLITS[row.split("/")[0]] if split in ONLY or ONLY == [""]]


def changes(wildcards):
    """What this run has other than its experiment says."""
    made = {"data": {f"{OUT}/data/{training_set(wildcards)}": 1.0}}
    folds = SPLITS[wildcards.data][wildcards.split]
    if folds:
        made["folds"] = dict(zip(("train", "validation", "test"), folds, strict=True))
        made["folds"] = {split: [fold] for split, fold in made["folds"].items()}
    if MINI:
        mini = yaml.safe_load((EXPERIMENTS / "mini.yaml").read_text())
        made |= mini["changes"] | mini["data"][wildcards.data]
        made["settings"] = mini["settings"][wildcards.experiment.split("-")[0]]
    if "epochs" in config:
        made["epochs"] = config["epochs"]
    return " ".join(f"--set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in made.items())


def training_set(wildcards):
    """CoNIC is trained on enlarged windows, but for the rows of figure 1, which read the images at their resolution."""
    if wildcards.data == "pannuke":
        return "pannuke"
    return "conic/native" if wildcards.experiment.endswith("x") else "conic/enlarged"


def experiment(wildcards):
    return experiment_files(EXPERIMENTS / wildcards.data / f"{wildcards.experiment}.yaml")


def protocol(wildcards):
    return "segment" if wildcards.experiment.endswith("x") else wildcards.data


def test_set(wildcards):
    folds = SPLITS[wildcards.data][wildcards.split]
    return f"{OUT}/data/pannuke --fold {folds[2]}" if folds else f"{OUT}/data/conic/native"


rule tables:
    input:
        expand(f"{OUT}/scores/{{run}}/scores.json", run=RUNS),
        published=EXPERIMENTS / "published.yaml",
    output:
        f"{OUT}/tables.md",
    localrule: True
    params:
        scores=f"{OUT}/scores",
    shell:
        "{WSIPIPE} table {params.scores} -o {output} --published {input.published}"


if MINI:

    rule draw:
        output:
            directory(f"{RAW}/{{data}}"),
        localrule: True
        params:
            side=lambda wildcards: 64 if wildcards.data == "pannuke" else 256,
        shell:
            "{WSIPIPE} data miniature {wildcards.data} {output} --side {params.side}"


rule prepare:
    input:
        f"{RAW}/{{data}}",
    output:
        directory(f"{OUT}/data/{{data}}"),
    log:
        f"{OUT}/logs/prepare/{{data}}.log",
    shell:
        "{WSIPIPE} data prepare {wildcards.data} {input} {output} 2> {log}"


rule train:
    input:
        f"{OUT}/data/{{data}}",
        experiment=experiment,
    output:
        f"{OUT}/weights/{{data}}/{{experiment}}/split{{split}}.safetensors",
    log:
        f"{OUT}/logs/train/{{data}}/{{experiment}}/split{{split}}.log",
    threads: 1 if MINI else 9
    resources:
        gpu=0 if MINI else 1,
    params:
        run=lambda wildcards: f"{OUT}/runs/{wildcards.data}/{wildcards.experiment}/split{wildcards.split}",
        changes=changes,
    shell:
        # The run's folder is no output: Snakemake would empty it where an interrupted run is to go on.
        "{WSIPIPE} train {input.experiment[0]} {params.run} {params.changes} 2>> {log} && "
        "cp {params.run}/best.safetensors {output}"


rule evaluate:
    input:
        weights=f"{OUT}/weights/{{data}}/{{experiment}}/split{{split}}.safetensors",
        data=f"{OUT}/data/{{data}}",
    output:
        f"{OUT}/scores/{{data}}/{{experiment}}/split{{split}}/scores.json",
    log:
        f"{OUT}/logs/evaluate/{{data}}/{{experiment}}/split{{split}}.log",
    resources:
        gpu=0 if MINI else 1,
    params:
        test_set=test_set,
        protocol=protocol,
        out=lambda wildcards, output: Path(output[0]).parent,
    shell:
        "{WSIPIPE} evaluate {input.weights} {params.test_set} --protocol {params.protocol} -o {params.out} 2> {log}"
