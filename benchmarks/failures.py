"""Pictures of where the models that ship fail, for their cards.

    python benchmarks/failures.py [--models NAME|PATH ...] [--out FOLDER]

The tissue is that of the demonstration: the colon that scikit-image ships, in the colours of H&E. It is shown to each
model as it is and with one thing wrong at a time: out of focus, thick, pale, inked, in its own brown stain, or told a
false size of its pixels. NAME-failures.jpg has the middle of the field without and with the outlines found, in the
colours of `wsipipe evaluate`; how many there are in the whole field is written above. The cards show those that
`--out wsipipe/weights` makes. The last line is JSON: by model and condition, the nuclei found.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image, ImageDraw, ImageFont
from skimage.filters import gaussian

from wsipipe.atomic import finished
from wsipipe.config import Config
from wsipipe.demo import GLASS, MPP, draw_tissue
from wsipipe.model.weights import load_model, shipped_models
from wsipipe.training.check import COLOURS, outlined
from wsipipe.training.evaluate import segment_image

SIDE_PX, GAP_PX, TITLE_PX, COLUMNS = 320, 8, 36, 4
FIELD = (slice(864, 864 + SIDE_PX),) * 2  # 160 µm of the slide
SHOWN = (slice(SIDE_PX // 2, SIDE_PX * 3 // 2),) * 2  # its middle, of the field at twice its size
IHC_FIELD = (slice(96, 96 + SIDE_PX),) * 2

Rgb = npt.NDArray[np.uint8]


def dense(image: Rgb, factor: float) -> Rgb:
    """The image with `factor` times the optical density."""
    return np.asarray(np.array(GLASS) * (image / GLASS).clip(1 / 255, 1) ** factor, np.uint8)


def blurred(image: Rgb, um: float) -> Rgb:
    return np.asarray(gaussian(image, um / MPP, channel_axis=2, preserve_range=True).round(), np.uint8)


def inked(image: Rgb) -> Rgb:
    """The image under a stroke of green ink, which lets a third of the light through."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    stroke = np.abs(rows - 0.6 * columns - 60) < 50
    return np.where(stroke[..., None], image * np.array([0.15, 0.55, 0.35]), image).astype(np.uint8)


CONDITIONS: dict[str, tuple[Callable[[Rgb], Rgb], float]] = {
    "as it is": (lambda image: image, MPP),
    "out of focus": (lambda image: blurred(image, 1), MPP),
    "twice as far out of focus": (lambda image: blurred(image, 2), MPP),
    "twice the stain": (lambda image: dense(image, 2), MPP),
    "a third of the stain": (lambda image: dense(image, 1 / 3), MPP),
    "a stroke of ink": (inked, MPP),
    "brown, as it was stained": (lambda image: skimage.data.immunohistochemistry()[IHC_FIELD], MPP),
    "half the true pixel size told": (lambda image: image, MPP / 2),
}


def draw(model: tuple[Any, Any, str]) -> tuple[Image.Image, dict[str, int]]:
    """Every condition, without and with what the model finds; the nuclei found in the whole field."""
    step, high = SIDE_PX + GAP_PX, 2 * (SIDE_PX + GAP_PX) + TITLE_PX
    rows = -(-len(CONDITIONS) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * step - GAP_PX, rows * high - GAP_PX + TITLE_PX), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=20)
    tissue, counts = draw_tissue()[FIELD], dict[str, int]()
    for place, (name, (change, mpp)) in enumerate(CONDITIONS.items()):
        image = change(tissue)
        found = segment_image(model, image, mpp, Config())
        counts[name] = len(found.types)
        x, y = place % COLUMNS * step, place // COLUMNS * high
        pen.text((x + 2, y + 5), f"{name}: {counts[name]}", fill="black", font=font)
        for row, instances in enumerate((np.zeros_like(found.instance_map), found.instance_map)):
            field = outlined(image, instances, found.types[: instances.max()], 2 * SIDE_PX)
            picture.paste(Image.fromarray(field[SHOWN]), (x, y + TITLE_PX + row * step))
    x = 2
    for name, colour in zip(model[1].class_names[1:], COLOURS[1:], strict=False):
        y = rows * high
        pen.rectangle((x, y + 4, x + 20, y + 24), fill=colour, outline="black")
        pen.text((x + 28, y + 1), name, fill="black", font=font)
        x += 60 + round(pen.textlength(name, font=font))
    return picture, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models(), help="names of models, or files of weights")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder of the pictures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name in arguments.models:
        picture, counts[Path(name).stem] = draw(load_model(name))
        with finished(arguments.out / f"{Path(name).stem}-failures.jpg") as partial:
            picture.save(partial, format="JPEG", quality=85, subsampling=0, optimize=True)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
