"""An assessment as files: `scores.json`, `scores.md`, and pictures of the best, the worst and the confused."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from wsipipe.atomic import finished
from wsipipe.training.assess import Assessment
from wsipipe.training.check import outlined
from wsipipe.training.data import PatchSet
from wsipipe.training.evaluate import truth_of

SIDE_PX, GAP_PX, CELL_PX, LABEL_PX = 320, 8, 64, 150
ROWS = (
    ("mPQ, mean over images", ("mPQ",)),
    ("mPQ, mean over tissues", ("tissue_mean", "mPQ")),
    ("mPQ+, pooled over images", ("pooled", "mPQ")),
    ("mDQ, mean over images", ("mDQ",)),
    ("mSQ, mean over images", ("mSQ",)),
    ("bPQ, mean over images", ("bPQ",)),
    ("bPQ, mean over tissues", ("tissue_mean", "bPQ")),
    ("bPQ, pooled over images", ("pooled", "bPQ")),
    ("bDQ, mean over images", ("bDQ",)),
    ("bSQ, mean over images", ("bSQ",)),
    ("AJI, mean over images", ("aji",)),
    ("Dice, mean over images", ("dice",)),
    ("Jaccard, mean over images", ("jaccard",)),
    ("F1 of detection", ("detection", "f1")),
    ("precision of detection", ("detection", "precision")),
    ("recall of detection", ("detection", "recall")),
)
TYPE_PARTS = ("PQ", "DQ", "SQ", "pooled_PQ", "f1", "precision", "recall")
TISSUE_PARTS = ("images", "mPQ", "bPQ", "aji", "dice", "jaccard")


def write_report(assessment: Assessment, patches: PatchSet, folder: Path) -> None:
    """Write all of it to `folder`; each file is complete before it has its name."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **assessment.about,
        "scores": assessment.scores,
        "confusion": assessment.confusion.tolist(),
        "images_scores": assessment.images,
    }
    with finished(folder / "scores.json") as partial:
        partial.write_text(json.dumps(_without_nan(content), indent=1) + "\n", encoding="utf-8")
    with finished(folder / "scores.md") as partial:
        partial.write_text(as_markdown(assessment), encoding="utf-8")
    for name, shown in assessment.shown.items():
        if shown:
            _save(_pairs(patches, shown), folder / f"{name}.png")
    _save(_confusion_picture(assessment), folder / "confusion.png")


def as_markdown(assessment: Assessment) -> str:
    """Tables whose every header names the protocol and the counting."""
    about, scores = assessment.about, assessment.scores
    protocol, fold = about["protocol"], about["fold"]
    images = about["split"] if fold is None else f"fold {fold}"
    headers = [f"{counting} ({protocol})" for counting in scores]
    lines = [
        f"# {about['model']} on {about['data']}, {images}: protocol {protocol}",
        "",
        f"{about['images']} images at {about['mpp']:.4g} µm/px; weights {about['weights_sha256'][:12]}, data "
        f"{about['data_fingerprint'][:12]}, wsipipe {about['by']}. Nuclei pair above an IoU of 0.5, centroids within "
        f"{about['radius_px']:.3g} px.",
        "Published: an image or a type without true nuclei has no PQ. Strict: it has 0 where any were found.",
        "",
        *_table(["score", *headers], [[name, *(_at(of, path) for of in scores.values())] for name, path in ROWS]),
        "",
        "## By type",
        "",
    ]
    for counting, of in scores.items():
        rows = [[name, *(values[part] for part in TYPE_PARTS)] for name, values in of["types"].items()]
        lines += [*_table([f"{counting} ({protocol})", *(part.replace("_", " ") for part in TYPE_PARTS)], rows), ""]
    if "tissues" in next(iter(scores.values())):
        lines += ["## By tissue", ""]
        for counting, of in scores.items():
            rows = [[name, *(values[part] for part in TISSUE_PARTS)] for name, values in of["tissues"].items()]
            lines += [*_table([f"{counting} ({protocol})", *TISSUE_PARTS], rows), ""]
    lines += ["## Found as (columns) what is (rows)", ""]
    names = ["no nucleus", *about["class_names"][1:], "type not known"]
    table = assessment.confusion.tolist()
    lines += _table([f"{protocol}", *names], [[name, *row] for name, row in zip(names, table, strict=True)])
    return "\n".join(lines) + "\n"


def _at(scores: dict[str, Any], path: Sequence[str]) -> Any:
    value: Any = scores
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(headers) + " |", "| --- " + "| ---: " * (len(headers) - 1) + "|"]
    return lines + ["| " + " | ".join(_written(value) for value in row) + " |" for row in rows]


def _written(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else float(value)
    return value.item() if isinstance(value, np.generic) else value


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pairs(patches: PatchSet, shown: Sequence[tuple[int, Any]]) -> Image.Image:
    """Truth above, what was found below."""
    step = SIDE_PX + GAP_PX
    picture = np.full((2 * step + 20, len(shown) * step, 3), 255, np.uint8)
    for column, (number, found) in enumerate(shown):
        truth = truth_of(patches, number)
        for row, nuclei in enumerate((truth, found)):
            image = outlined(patches.images[number], nuclei.instance_map, nuclei.types, SIDE_PX)
            picture[20 + row * step : 20 + row * step + SIDE_PX, column * step : column * step + SIDE_PX] = image
    drawn = Image.fromarray(picture)
    pen = ImageDraw.Draw(drawn)
    for column, (number, _) in enumerate(shown):
        name = patches.index[number].name
        pen.text(
            (column * step + 2, 3), f"{name}: true above, found below", fill="black", font=ImageFont.load_default()
        )
    return drawn


def _confusion_picture(assessment: Assessment) -> Image.Image:
    names = ["no nucleus", *assessment.about["class_names"][1:], "type not known"]
    table: npt.NDArray[np.int64] = assessment.confusion
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = LABEL_PX + CELL_PX * len(names)
    picture = Image.new("RGB", (side, side), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default()
    pen.text((4, 4), f"{assessment.about['protocol']}: rows true,\ncolumns found", fill="black", font=font)
    for i, name in enumerate(names):
        pen.text((4, LABEL_PX + CELL_PX * i + 26), name[:24], fill="black", font=font)
        label = Image.new("RGB", (LABEL_PX - 40, 14), "white")
        ImageDraw.Draw(label).text((0, 0), name[:20], fill="black", font=font)
        picture.paste(label.rotate(90, expand=True), (LABEL_PX + CELL_PX * i + 24, 40))
        for j in range(len(names)):
            x, y = LABEL_PX + CELL_PX * j, LABEL_PX + CELL_PX * i
            level = round(255 * (1 - share[i, j]))
            pen.rectangle((x, y, x + CELL_PX - 2, y + CELL_PX - 2), fill=(level, level, 255))
            ink = "white" if share[i, j] > 0.6 else "black"
            pen.text((x + 6, y + 24), f"{table[i, j]:,}", fill=ink, font=font)
    return picture


def _save(picture: Image.Image, path: Path) -> None:
    with finished(path) as partial:
        picture.save(partial, format="PNG")
