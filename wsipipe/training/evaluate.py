"""What a checkpoint is worth: a split of patch sets through the whole of `segment`, against the truth.

Every image is written as a picture, segmented as a slide would be (at the model's resolution, whatever its own), and
its outlines are painted back onto its own pixels. So the figures are those that users get.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from PIL import Image
from torch import nn

from wsipipe.config import Config
from wsipipe.errors import DataError
from wsipipe.folder import ResultFolder
from wsipipe.metrics import UNKNOWN_TYPE, majority_types, remap_label
from wsipipe.model.spec import ModelSpec
from wsipipe.progress import Progress
from wsipipe.slide import open_slide
from wsipipe.stages.maps import make_maps
from wsipipe.stages.nuclei import make_nuclei
from wsipipe.stages.tissue import find_tissue
from wsipipe.table import read_nuclei
from wsipipe.training.data import PatchSet, Split
from wsipipe.training.paint import pixels_within
from wsipipe.training.scores import ImageScores, TypedNuclei, score_image, summarise

log = logging.getLogger(__name__)

RADIUS_UM = 3.0  # how far apart paired centroids may be: 12 px at 0.25 µm/px, as usual


def evaluate(
    model: tuple[nn.Module, ModelSpec, str],
    patches: PatchSet,
    split: Split,
    config: Config | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Scores of a model on a split of a patch set, as `summarise` gives them (protocol "clean").

    Raises
    ------
    DataError
        If the split is empty, or the set names other types than the model.
    """
    spec = model[1]
    scores = score_images(model, patches, split, config, device=device, precision=precision, progress=progress)
    return {
        "data": patches.name,
        "split": split,
        "images": len(scores),
        "mpp": patches.mpp,
        "model": spec.name,
        "weights_sha256": model[2],
        "protocol": "clean; means over images, IoU > 0.5",
        **summarise(scores, spec.class_names),
    }


def score_images(
    model: tuple[nn.Module, ModelSpec, str],
    patches: PatchSet,
    split: Split,
    config: Config | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    progress: bool = False,
) -> list[ImageScores]:
    """Scores of every image of a split. Raises DataError as `evaluate` does."""
    spec, numbers = model[1], patches.of(split)
    if not len(numbers):
        raise DataError(f"{patches.folder} has no image in the split '{split}'")
    if patches.types is not None and patches.class_names != spec.class_names:
        raise DataError(f"{patches.folder} has the types {patches.class_names}, {spec.name} tells {spec.class_names}")
    scores: list[ImageScores] = []
    with Progress(len(numbers), "images", patches.name, shown=progress) as bar:
        for number in numbers:
            found = segment_image(model, patches.images[number], patches.mpp, config or Config(), device, precision)
            scores.append(score_image(truth_of(patches, number), found, len(spec.class_names), RADIUS_UM / patches.mpp))
            bar.advance()
    return scores


def segment_image(
    model: tuple[nn.Module, ModelSpec, str],
    image: npt.NDArray[np.uint8],
    mpp: float,
    config: Config,
    device: str = "auto",
    precision: str = "auto",
) -> TypedNuclei:
    """Nuclei of an image (H, W, 3) on its own pixels, found as those of a slide are."""
    with tempfile.TemporaryDirectory() as place:
        folder, picture = ResultFolder(Path(place)), Path(place) / "image.png"
        Image.fromarray(np.asarray(image)).save(picture, compress_level=1)
        with open_slide(picture, mpp) as slide:
            tissue = find_tissue(slide, config.tissue, everywhere=True)
            make_maps(slide, tissue, model, folder.maps, config, device=device, precision=precision)
            make_nuclei(slide, folder.maps, folder.nuclei, config.nuclei)
        return painted(folder.nuclei, image.shape[:2])


def painted(table: Path, shape: tuple[int, ...]) -> TypedNuclei:
    """The outlines of a table on the pixels of level 0: those whose centre lies inside. Later nuclei go on top."""
    instance_map = np.zeros(shape, np.int32)
    types: list[int] = []
    certainties: list[float] = []
    for rings, type_ids, of_types in _outlines(table):
        certainties += of_types
        for ring, type_id in zip(rings, type_ids, strict=True):
            types.append(type_id)
            instance_map[pixels_within(ring, shape)] = len(types)
    seen = np.unique(instance_map)
    rows = seen[seen > 0] - 1
    return TypedNuclei(
        remap_label(instance_map),
        np.array(types, np.int64)[rows],
        certainties=np.array(certainties, np.float64)[rows],  # NaN where there is none
    )


def _outlines(table: Path) -> Iterator[tuple[list[npt.NDArray[np.float64]], list[int], list[float]]]:
    for batch in read_nuclei(table, ["type_id", "type_probability", "geometry"])[1]:
        polygons = shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False))
        rings = [shapely.get_coordinates(polygon) for polygon in polygons]
        yield rings, batch["type_id"].to_pylist(), batch["type_probability"].to_pylist()


def truth_of(patches: PatchSet, number: int) -> TypedNuclei:
    """The true nuclei of an image; of unknown types where the set has none."""
    instance_map = remap_label(np.asarray(patches.instances[number]).astype(np.int32))
    if patches.types is None:
        return TypedNuclei(instance_map, np.full(instance_map.max(initial=0), UNKNOWN_TYPE, np.int64))
    return TypedNuclei(instance_map, majority_types(instance_map, patches.types[number]))
