"""A model on a split of a patch set, by a protocol: nuclei found the protocol's way, counted the published way and a
strict one.

==================  ==================================================================================================
`segment`           the whole of `segment`, as users run it; nuclei are compared on the image's own pixels
`pannuke`           the network sees each image whole; nuclei are found over the image as CellViT and CellVTA do
`conic`             20x images of 256 px enlarged to 480, four windows, merged and painted back as CellVTA does: one
                    nucleus of every image is lost
`conic-corrected`   the same without the loss
==================  ==================================================================================================

Counting "published": an image or a type without true nuclei has no PQ, whatever was found there. "strict": it has 0 if
anything was found. See `wsipipe.training.scores.score_image`.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import nn

from wsipipe import __version__
from wsipipe.config import Config
from wsipipe.device import choose_device
from wsipipe.errors import ConfigError, DataError
from wsipipe.model.spec import ModelSpec
from wsipipe.progress import Progress
from wsipipe.training.data import PatchSet, Split
from wsipipe.training.evaluate import segment_image, truth_of
from wsipipe.training.run_folder import split_as_trained
from wsipipe.training.scores import ImageScores, TypedNuclei, score_image, summarise
from wsipipe.training.tiled import MPP_20X, Finder, batched, find_enlarged, find_whole

log = logging.getLogger(__name__)

Protocol = Literal["segment", "pannuke", "conic", "conic-corrected"]
COUNTINGS: dict[str, Literal["published", "clean"]] = {"published": "published", "strict": "clean"}
RADIUS_PX = 12.0  # how far apart paired centroids may be: at every resolution, in the published code
RADIUS_UM = 3.0  # and what it is at 0.25 µm/px: for the protocol of users
MPP_TOLERANCE = 0.1  # relative; how far images may be from 20x where they are enlarged to 40x

_FINDERS: dict[str, Finder] = {
    "pannuke": find_whole,
    "conic": partial(find_enlarged, corrected=False),
    "conic-corrected": partial(find_enlarged, corrected=True),
}


@dataclass(frozen=True, eq=False)
class Assessment:
    """What came of it.

    Attributes
    ----------
    about : dict
        Protocol, model, data: what must be said with every figure.
    scores : dict
        Counting ("published", "strict") to what `summarise` gives.
    images : tuple of dict
        Name, tissue and strict scores of every image.
    confusion : (T + 2, T + 2) int
        Nuclei by true and found type; first "no nucleus", last "type not known".
    shown : dict
        Number of an image in the set to the nuclei found there, for those with the best and the worst bPQ.
    """

    about: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    images: tuple[dict[str, Any], ...]
    confusion: npt.NDArray[np.int64]
    shown: dict[str, list[tuple[int, TypedNuclei]]]


def assess(
    model: tuple[nn.Module, ModelSpec, str],
    patches: PatchSet,
    split: Split = "test",
    protocol: Protocol = "segment",
    *,
    fold: str | None = None,
    device: str = "auto",
    batch_size: int = 8,
    config: Config | None = None,
    keep: int = 4,
    progress: bool = False,
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> Assessment:
    """Find and count, on a split or on the images of a `fold`, which then are the test.

    Parameters
    ----------
    notes : mapping
        What training noted in the checkpoint, see `read_notes`: a set that the run had is split as it was there.

    Raises
    ------
    ConfigError
        If there is no such protocol, or the images are not as it needs them, or the network does not answer so.
    DataError
        If the split is empty, there is no such fold, the model was trained or chosen on it, or the set names other
        types than the model.
    """
    spec = model[1]
    if protocol not in get_args(Protocol):
        raise ConfigError(f"there is no protocol '{protocol}'; there are: {', '.join(get_args(Protocol))}")
    if protocol in ("conic", "conic-corrected") and abs(patches.mpp / MPP_20X - 1) > MPP_TOLERANCE:
        raise ConfigError(
            f"protocol {protocol} is for images at {MPP_20X} µm/px, and those of {patches.folder} are at "
            f"{patches.mpp:.4g}; use --protocol segment or pannuke"
        )
    trained = split_as_trained(patches, notes)
    patches = patches if trained is None else trained
    if fold is not None:
        seen = {patch.split for patch in trained.index if patch.fold == fold} if trained is not None else set()
        if used := " and ".join(sorted(seen & {"train", "validation"})):
            raise DataError(
                f"the run that made these weights had fold '{fold}' of {patches.folder} for {used}; choose a fold that "
                "it did not see, or leave --fold out for what it kept for the test"
            )
        split, patches = "test", patches.with_folds({"test": [fold]})
    numbers = patches.of(split)
    if not len(numbers):
        raise DataError(f"{patches.folder} has no image in the split '{split}'")
    if patches.types is not None and patches.class_names != spec.class_names:
        raise DataError(f"{patches.folder} has the types {patches.class_names}, {spec.name} tells {spec.class_names}")
    radius = RADIUS_UM / patches.mpp if protocol == "segment" else RADIUS_PX
    scores: dict[str, list[ImageScores]] = {counting: [] for counting in COUNTINGS}
    images: list[dict[str, Any]] = []
    extremes = _Extremes(keep)
    with Progress(len(numbers), "images", patches.name, shown=progress) as bar:
        for number, found in _found(model, patches, numbers.tolist(), protocol, device, batch_size, config or Config()):
            truth = truth_of(patches, number)
            for counting, rules in COUNTINGS.items():
                scores[counting].append(score_image(truth, found, len(spec.class_names), radius, rules))
            strict = scores["strict"][-1]
            patch = patches.index[number]
            bpq = float(strict.quality[2])
            images.append(
                {"name": patch.name, "group": patch.group, "tissue": patch.tissue, "bPQ": bpq, "aji": strict.aji,
                 "dice": strict.dice, "nuclei": len(truth.types), "found": len(found.types)}
            )  # fmt: skip
            extremes.offer(bpq, number, found)
            bar.advance()
    tissues = [patches.index[number].tissue for number in numbers.tolist()]
    return Assessment(
        about={
            "protocol": protocol,
            "model": spec.name,
            "weights_sha256": model[2],
            "data": patches.name,
            "data_fingerprint": patches.fingerprint,
            "split": split,
            "fold": fold,
            "images": len(numbers),
            "mpp": patches.mpp,
            "radius_px": radius,
            "class_names": list(spec.class_names),
            "by": __version__,
        },
        scores={
            counting: summarise(of, spec.class_names, tissues if any(tissues) else None)
            for counting, of in scores.items()
        },
        images=tuple(images),
        confusion=_confusion(scores["strict"], len(spec.class_names)),
        shown={"best": extremes.best, "worst": extremes.worst},
    )


def _found(
    model: tuple[nn.Module, ModelSpec, str],
    patches: PatchSet,
    numbers: list[int],
    protocol: str,
    device: str,
    batch_size: int,
    config: Config,
) -> Iterator[tuple[int, TypedNuclei]]:
    if protocol == "segment":
        for number in numbers:
            yield number, segment_image(model, patches.images[number], patches.mpp, config, device)
        return
    chosen = choose_device(device)
    network = model[0].to(chosen)
    for part, images in batched(patches.images, numbers, batch_size):
        yield from zip(part, _FINDERS[protocol](network, model[1], images, chosen), strict=True)


class _Extremes:
    """The few images with the highest and the lowest bPQ, and what was found there; those without a score are none."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._held: list[tuple[float, int, TypedNuclei]] = []

    def offer(self, score: float, number: int, found: TypedNuclei) -> None:
        if np.isnan(score):
            return
        self._held = sorted([*self._held, (score, number, found)], key=lambda entry: entry[:2])
        if len(self._held) > 2 * self.keep:
            del self._held[self.keep]

    @property
    def worst(self) -> list[tuple[int, TypedNuclei]]:
        return [(number, found) for _, number, found in self._held[: self.keep]]

    @property
    def best(self) -> list[tuple[int, TypedNuclei]]:
        return [(number, found) for _, number, found in self._held[::-1][: self.keep]]


def _confusion(scores: list[ImageScores], types: int) -> npt.NDArray[np.int64]:
    def place(of: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row or column of a type: background and what is of no type go last, with the unknown."""
        return np.where((of > 0) & (of < types), of, types)

    side = types + 1
    table = np.zeros(side * side, np.int64)
    for image in scores:
        pairs = place(image.paired[:, 0]) * side + place(image.paired[:, 1])
        for cells in (pairs, place(image.missed) * side, place(image.false_alarms)):
            table += np.bincount(cells, minlength=side * side)
    return table.reshape(side, side)
