"""What the models that ship are worth: every figure of their cards, through the whole of `segment`.

    python benchmarks/default_model.py --sets FOLDER [--models NAME|PATH ...] [--slide SLIDE]

`--sets` holds the published sets as `wsipipe.training.prepare` wants them; by default a folder `shared/data` beside
the project. Without it only what needs no data is measured. The last line is JSON, by model: by set `bpq`, `dice`, `f1`
(the first and the last at IoU > 0.5), means over the test images at their own resolution, and `spread`, their standard
deviations over the images; `typed_f1`, the mean over the three large types of the F1 of detection on CoNSeP;
`calibration` of the types there (`ece`: the expected calibration error); `half_resolution_loss`, by how much bPQ falls
on CoNSeP at twice the µm/px; `fp32_difference`, the largest change of the figures from the machine's precision to
fp32; `false_per_mm2`, nuclei in pictures without any; `slide_s`, seconds of `wsipipe segment` for `--slide`, imports
included. Of a model that was given several times, as trained with other seeds, `seeds` tells the `mean` and the
standard deviation (`sd`) of these figures over the `runs`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
from skimage.filters import gaussian
from skimage.measure import block_reduce

from wsipipe.config import Config
from wsipipe.model.weights import load_model, shipped_models
from wsipipe.training.data import PatchSet
from wsipipe.training.evaluate import evaluate, score_images, segment_image
from wsipipe.training.prepare import DEFAULT_SETS, prepare_masks
from wsipipe.training.scores import ImageScores, summarise

TESTED = ("consep", "tnbc_naylor")
LARGE_TYPES = ("inflammatory", "epithelial", "spindle-shaped")
MPP = 0.25
SIDE_PX = 2000  # of pictures without nuclei: 0.25 mm²
WINDOW_PX = 32
NAMES = ("bpq", "dice", "f1")

Model = tuple[Any, Any, str]
Image = npt.NDArray[np.uint8]


def figures(scores: dict[str, Any]) -> dict[str, float]:
    return dict(zip(NAMES, (scores["bPQ"], scores["dice"], scores["bDQ"]), strict=True))


def spread(images: list[ImageScores]) -> dict[str, float]:
    values = np.array([(image.quality[2], image.dice, image.quality[0]) for image in images])
    return {name: round(float(value), 4) for name, value in zip(NAMES, values.std(axis=0, ddof=1), strict=True)}


def halved(patches: PatchSet) -> PatchSet:
    """The set at twice its µm/px: images averaged, of four pixels of a mask the first."""
    n, height, width = (len(patches), *(side // 2 for side in patches.images.shape[1:3]))
    images = np.empty((n, height, width, 3), np.uint8)
    for image, half in zip(patches.images, images, strict=True):
        half[:] = image[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean((1, 3)).round()
    first = np.s_[:, : 2 * height : 2, : 2 * width : 2]
    return replace(
        patches, mpp=2 * patches.mpp, images=images, instances=patches.instances[first], types=None, trusted=None
    )


def pictures_without_nuclei() -> dict[str, Image]:
    """Glass, noise about the colour of glass and of eosin, and the IHC picture's windows of glass and of plain brown.

    Its nuclei are grey, so that windows of 32 px hold none where all is brown, or all bright; looked at one by one.
    """
    rng = np.random.default_rng(0)
    shape = (SIDE_PX, SIDE_PX, 3)
    ihc = skimage.data.immunohistochemistry()
    smooth = gaussian(ihc, 2, channel_axis=2, preserve_range=True)
    grey = block_reduce(smooth[..., 2] - smooth[..., 0], (WINDOW_PX, WINDOW_PX), np.max)
    dark = block_reduce(smooth.min(2), (WINDOW_PX, WINDOW_PX), np.min)
    quiet = [
        ihc[WINDOW_PX * y : WINDOW_PX * (y + 1), WINDOW_PX * x : WINDOW_PX * (x + 1)]
        for y, x in np.argwhere((grey < -40) | (dark > 215))
    ]
    side = -(-SIDE_PX // WINDOW_PX)
    chosen = rng.integers(len(quiet), size=(side, side))
    mosaic = np.concatenate([np.concatenate([quiet[i] for i in row], axis=1) for row in chosen])
    return {
        "blank": np.full(shape, 243, np.uint8),
        "noise": np.clip(rng.normal(200, 25, shape), 0, 255).astype(np.uint8),
        "pink_noise": np.clip(rng.normal((225, 160, 195), 20, shape), 0, 255).astype(np.uint8),
        "ihc_background": mosaic[:SIDE_PX, :SIDE_PX],
    }


def false_per_mm2(model: Model, image: Image) -> float:
    return int(segment_image(model, image, MPP, Config()).instance_map.max()) / (image.shape[0] * MPP / 1000) ** 2


def seconds_of(slide: Path, model: str) -> float:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "wsipipe", "-q", "segment", str(slide), "-o", out, "--model", model]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def main() -> None:
    beside = Path(__file__).parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, default=beside)
    parser.add_argument("--slide", type=Path, default=beside / "slides" / "CMU-1-Small-Region.svs")
    parser.add_argument("--models", nargs="+", default=list(shipped_models()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sets = {
            name: prepare_masks(arguments.sets / name, Path(folder) / name, DEFAULT_SETS[name])
            for name in TESTED
            if arguments.sets.exists()
        }
        found = {name: measure(name, sets, arguments.slide) for name in arguments.models}
    print(json.dumps(found | {"seeds": over_seeds(list(found.values())) if sets else {}}))


def over_seeds(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By model of which several runs were measured: mean and standard deviation of each figure over the runs."""
    runs: dict[str, list[dict[str, float]]] = {}
    for one in found:
        of_sets = {f"{key} {name}": one[key][name] for key in TESTED for name in NAMES}
        others = {name: one[name] for name in ("typed_f1", "half_resolution_loss", "fp32_difference")}
        runs.setdefault(one["model"], []).append(of_sets | others | {"ece": one["calibration"]["ece"]})
    return {
        model: {
            "runs": len(ours),
            "mean": {name: round(float(np.mean([one[name] for one in ours])), 4) for name in ours[0]},
            "sd": {name: round(float(np.std([one[name] for one in ours], ddof=1)), 4) for name in ours[0]},
        }
        for model, ours in runs.items()
        if len(ours) > 1
    }


def measure(name: str, sets: dict[str, PatchSet], slide: Path) -> dict[str, Any]:
    model = load_model(name)
    spec, digest = model[1:]
    found: dict[str, Any] = {"model": spec.name, "weights_sha256": digest}
    empty = {name: false_per_mm2(model, image) for name, image in pictures_without_nuclei().items()}
    found["false_per_mm2"] = {name: round(value, 2) for name, value in empty.items()}
    print(f"{spec.name}: nuclei found per mm² where there are none: {found['false_per_mm2']}", flush=True)
    if slide.exists():
        found["slide_s"] = round(seconds_of(slide, name), 1)
        print(f"{spec.name}: {slide.name}: {found['slide_s']} s", flush=True)
    if not sets:
        return found
    differences = []
    for key, patches in sets.items():
        images = score_images(model, patches, "test")
        scores = summarise(images, spec.class_names)
        found[key] = {name: round(value, 4) for name, value in figures(scores).items()} | {"spread": spread(images)}
        if patches.types is not None:
            f1 = {kind: round(scores["types"][kind]["f1"], 4) for kind in LARGE_TYPES}
            found["f1_by_type"], found["typed_f1"] = f1, round(float(np.mean(list(f1.values()))), 4)
            found["calibration"] = {name: round(value, 4) for name, value in scores["calibration"].items()}
        print(f"{spec.name}: {patches.name}, test: {found[key]}", flush=True)
        exact = figures(evaluate(model, patches, "test", precision="fp32"))
        differences += [abs(exact[name] - figures(scores)[name]) for name in NAMES]
    found["fp32_difference"] = round(max(differences), 4)
    half = evaluate(model, halved(sets["consep"]), "test")
    found["half_resolution_loss"] = round(found["consep"]["bpq"] - half["bPQ"], 4)
    return found


if __name__ == "__main__":
    main()
