"""Scores of an image and of a data set, by protocol. Means leave out what is NaN. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsipipe.metrics import (
    UNKNOWN_TYPE,
    Floats,
    IntMap,
    Ints,
    Overlaps,
    aggregated_jaccard,
    centroids,
    detection,
    dice,
    jaccard,
    pair_centroids,
    quality,
    remap_label,
    type_detection,
)

Protocol = Literal["clean", "published"]


@dataclass(frozen=True, eq=False)
class TypedNuclei:
    """The nuclei of an image.

    Attributes
    ----------
    instance_map : (H, W) int
        0 is background, every other value one nucleus.
    types : (N,) int64
        Type of every nucleus, in the order of the ids: 0 untyped, or `UNKNOWN_TYPE`. See `majority_types`.
    foreground : (H, W) bool, optional
        What Dice and Jaccard look at, if not the nuclei.
    certainties : (N,) float, optional
        Of a prediction: the probability it gives to the type of each nucleus.

    Raises
    ------
    ValueError
        If there are more or fewer types or certainties than nuclei.
    """

    instance_map: IntMap
    types: Ints
    foreground: npt.NDArray[np.bool_] | None = None
    certainties: Floats | None = None

    def __post_init__(self) -> None:
        nuclei = remap_label(self.instance_map).max(initial=0)
        for name, values in (("types", self.types), ("certainties", self.certainties)):
            if values is not None and values.shape != (nuclei,):
                raise ValueError(f"{name} of shape {values.shape} are given for {nuclei} nuclei")

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        return self.instance_map > 0 if self.foreground is None else self.foreground


@dataclass(frozen=True, eq=False)
class ImageScores:
    """What an image adds to the scores of its data set; T types without the background.

    Attributes
    ----------
    quality, type_quality : (3,) and (3, T) float64
        DQ, SQ, PQ; NaN where undefined.
    counts, type_counts : (4,) and (4, T) float64
        Pairs, missed, false alarms, sum of IoU.
    paired : (P, 2) int64
        Types of the true and the predicted nucleus of the pairs of centroids.
    certainties : (P,) float64
        What the prediction gave to its type, by pair; NaN where it does not say.
    missed, false_alarms : int64
        Types of nuclei whose centroids have no partner.
    """

    dice: float
    jaccard: float
    aji: float
    quality: Floats
    type_quality: Floats
    counts: Floats
    type_counts: Floats
    paired: Ints
    certainties: Floats
    missed: Ints
    false_alarms: Ints


def score_image(
    true: TypedNuclei, predicted: TypedNuclei, type_count: int, radius_px: float, protocol: Protocol = "clean"
) -> ImageScores:
    """Compare the nuclei of an image with the truth.

    Parameters
    ----------
    type_count : int
        Types, the background included.
    radius_px : float
        How far apart paired centroids may be; 12 at 0.25 µm/px is usual.
    protocol : {"clean", "published"}
        See Notes.

    Raises
    ------
    ValueError
        If the maps differ in shape.

    Notes
    -----
    "clean": a score is NaN only where there is nothing, neither in the truth nor in the prediction; what was found
    where nothing is counts as 0. All predicted nuclei count.

    "published" is how CellViT and CellVTA count. bPQ and the PQ of a type are NaN if the truth holds none, whatever
    was predicted. Where there are types, predicted nuclei without one count for centroids only. Dice is 0 if both
    masks are empty.
    Nuclei whose outline has less than three corners (a pixel, a line) are no detections, and no predictions at all.
    An image without true, or without predicted, centroids has one of type 0 at (0, 0).

    In both, where the truth holds nuclei of unknown types only, no type gets a score.
    """
    published = protocol == "published"
    if published:
        predicted = _outlined(predicted)
    counts, type_counts = _counts(true, predicted, type_count, typed_only=published and type_count > 1)
    found = (counts[:2] if published else counts[:3]).sum(0)
    type_found = (type_counts[:2] if published else type_counts[:3]).sum(0)
    overlap = dice(true.mask, predicted.mask)
    paired, certainties, missed, false_alarms = _detected(
        _outlined(true) if published else true, predicted, radius_px, published
    )
    return ImageScores(
        dice=0.0 if published and np.isnan(overlap) else overlap,
        jaccard=jaccard(true.mask, predicted.mask),
        aji=aggregated_jaccard(true.instance_map, predicted.instance_map),
        quality=np.where(found > 0, quality(*counts), np.nan),
        type_quality=np.where(type_found > 0, quality(*type_counts), np.nan),
        counts=counts,
        type_counts=type_counts,
        paired=paired,
        certainties=certainties,
        missed=missed,
        false_alarms=false_alarms,
    )


def _counts(true: TypedNuclei, predicted: TypedNuclei, type_count: int, typed_only: bool) -> tuple[Floats, Floats]:
    """Pairs, missed, false alarms and sum of IoU: of all nuclei, and of each type.

    One matching serves all: with IoU above 0.5 a pair is the same whichever other nuclei there are.
    """
    rows, columns, ious = Overlaps.between(true.instance_map, predicted.instance_map).matches(0.5)
    if typed_only:
        kept = predicted.types[columns] > 0
        rows, columns, ious = rows[kept], columns[kept], ious[kept]
    all_predicted = np.count_nonzero(predicted.types) if typed_only else predicted.types.size
    counts = np.array([rows.size, true.types.size - rows.size, all_predicted - rows.size, ious.sum()])
    if _only_unknown(true.types):
        return counts, np.zeros((4, type_count - 1))

    def by_type(types: Ints, weights: Floats | None = None) -> Floats:
        return np.bincount(types, weights, type_count)[1:type_count].astype(np.float64)

    true_types, predicted_types = true.types[rows], predicted.types[columns]
    agreed = true_types == predicted_types
    hits = by_type(true_types[agreed])
    excused = by_type(predicted_types[true_types == UNKNOWN_TYPE])
    return counts, np.stack(
        [
            hits,
            by_type(true.types) - hits,
            by_type(predicted.types) - excused - hits,
            by_type(true_types[agreed], ious[agreed]),
        ]
    )


def _detected(
    true: TypedNuclei, predicted: TypedNuclei, radius_px: float, dummies: bool
) -> tuple[Ints, Floats, Ints, Ints]:
    """Types and certainties of the nuclei whose centroids pair, and types of those whose do not."""
    true_at, true_types = centroids(true.instance_map), true.types
    predicted_at, predicted_types = centroids(predicted.instance_map), predicted.types
    certainties = np.full(len(predicted_types), np.nan) if predicted.certainties is None else predicted.certainties
    if dummies and not true_types.size:
        true_at, true_types = np.zeros((1, 2)), np.zeros(1, np.int64)
    if dummies and not predicted_types.size:
        predicted_at, predicted_types, certainties = np.zeros((1, 2)), np.zeros(1, np.int64), np.full(1, np.nan)
    pairs, missed, false_alarms = pair_centroids(true_at, predicted_at, radius_px)
    paired = np.column_stack([true_types[pairs[:, 0]], predicted_types[pairs[:, 1]]])
    false_alarm_types = predicted_types[false_alarms]
    if _only_unknown(true_types):
        false_alarm_types = np.full_like(false_alarm_types, UNKNOWN_TYPE)
    return paired, certainties[pairs[:, 1]], true_types[missed], false_alarm_types


def _only_unknown(true_types: Ints) -> bool:
    return true_types.size > 0 and bool((true_types == UNKNOWN_TYPE).all())


def _outlined(nuclei: TypedNuclei) -> TypedNuclei:
    """Without the nuclei whose first outline has less than three corners."""
    index = remap_label(nuclei.instance_map)
    kept = np.zeros(nuclei.types.size + 1, bool)
    for number, box in enumerate(ndimage.find_objects(index), start=1):
        outlines, _ = cv2.findContours((index[box] == number).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        kept[number] = len(outlines[0]) >= 3
    certainties = None if nuclei.certainties is None else nuclei.certainties[kept[1:]]
    return TypedNuclei(index * kept[index], nuclei.types[kept[1:]], nuclei.mask, certainties)


def summarise(
    scores: Sequence[ImageScores], type_names: Sequence[str], tissues: Sequence[str] | None = None
) -> dict[str, Any]:
    """Scores of a data set, ready for JSON but for NaN.

    Parameters
    ----------
    type_names : sequence of str
        Names of the types; the first, the background, has no scores.
    tissues : sequence of str, optional
        Tissue of each image.

    Returns
    -------
    dict
        `bPQ`, `bDQ`, `bSQ`, `mPQ`, `mDQ`, `mSQ`, `dice`, `jaccard`, `aji`: means over images (the m-scores: of the
        mean over the types of an image). `detection`: F1, precision, recall over all images together. `calibration`,
        where a prediction says how certain it is of its types: see `calibration_of`. `pooled`: bPQ
        and mPQ with all images counted as one (CoNIC's mPQ+). `types`: name to the same of each type. `tissues`:
        name to the means over its images; `tissue_mean`: mean over tissues, as PanNuke defines its bPQ and mPQ.
    """
    summary = _means(scores)
    paired = np.concatenate([image.paired for image in scores])
    missed = np.concatenate([image.missed for image in scores])
    false_alarms = np.concatenate([image.false_alarms for image in scores])
    summary["detection"] = detection(len(paired), len(missed), len(false_alarms))._asdict()
    certain = certain_pairs(scores)
    if len(certain[0]):
        summary["calibration"] = calibration_of(*certain)
    pooled = _pooled(np.sum([image.counts for image in scores], axis=0))
    type_pooled = _pooled(np.sum([image.type_counts for image in scores], axis=0))
    summary["pooled"] = {"bPQ": float(pooled[2]), "mPQ": _mean(type_pooled[2])}

    summary["types"] = {}
    for row, name in enumerate(type_names[1:]):
        dq, sq, pq = (_mean(np.array([image.type_quality[part, row] for image in scores])) for part in range(3))
        found = type_detection(paired, missed, false_alarms, row + 1)
        summary["types"][name] = {
            "PQ": pq,
            "DQ": dq,
            "SQ": sq,
            "pooled_PQ": float(type_pooled[2, row]),
            **found._asdict(),
        }
    if tissues is not None:
        members = {
            tissue: [image for image, of in zip(scores, tissues, strict=True) if of == tissue] for tissue in tissues
        }
        summary["tissues"] = {tissue: _means(images) for tissue, images in sorted(members.items())}
        summary["tissue_mean"] = {
            score: _mean(np.array([means[score] for means in summary["tissues"].values()])) for score in ("bPQ", "mPQ")
        }
    return summary


def certain_pairs(scores: Sequence[ImageScores]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Certainty of the type, and whether it is right, for every detected nucleus whose true type is known."""
    paired = np.concatenate([image.paired for image in scores])
    certainties = np.concatenate([image.certainties for image in scores])
    known = ~np.isnan(certainties) & (paired[:, 0] > 0) & (paired[:, 0] != UNKNOWN_TYPE)
    return certainties[known], paired[known, 0] == paired[known, 1]


def calibration_of(certainties: Floats, right: npt.NDArray[np.bool_], bins: int = 10) -> dict[str, float]:
    """How far certainties (N,) in [0, 1] are from how often they are right.

    `ece`: the expected calibration error, over equal bins (Guo et al. 2017, arXiv 1706.04599); `certainty` and
    `accuracy`: their means; `nuclei`: N.
    """
    number = np.minimum((certainties * bins).astype(int), bins - 1)
    gaps = np.bincount(number, certainties, bins) - np.bincount(number, right, bins)
    return {
        "ece": float(np.abs(gaps).sum() / len(right)),
        "certainty": float(certainties.mean()),
        "accuracy": float(right.mean()),
        "nuclei": len(right),
    }


def _means(scores: Sequence[ImageScores]) -> dict[str, Any]:
    """Means over images of what is a score of one image."""
    means: dict[str, Any] = {"images": len(scores)}
    for part, name in enumerate(("DQ", "SQ", "PQ")):
        means[f"b{name}"] = _mean(np.array([image.quality[part] for image in scores]))
        means[f"m{name}"] = _mean(np.array([_mean(image.type_quality[part]) for image in scores]))
    for name in ("dice", "jaccard", "aji"):
        means[name] = _mean(np.array([getattr(image, name) for image in scores]))
    return means


def _pooled(counts: Floats) -> Floats:
    """DQ, SQ, PQ of summed counts; NaN where there is nothing."""
    return np.where(counts[:3].sum(0) > 0, quality(*counts), np.nan)


def _mean(values: Floats) -> float:
    """Mean of what is not NaN; NaN if that is nothing."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
