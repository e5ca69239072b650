"""Two instance maps to scores: PQ and friends. Pure; linear in the pixels.

Points are (x, y) with pixel centres at whole numbers. A score that would be 0/0 is NaN.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse
from scipy.spatial import distance

UNKNOWN_TYPE = 255  # of a nucleus whose type nobody has told: no score by type counts it, nor what is found there
EPSILON = 1e-6  # in the denominators of DQ and SQ, as in the published code
IntMap = npt.NDArray[np.integer[Any]]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def remap_label(instance_map: IntMap) -> npt.NDArray[np.int32]:
    """The same nuclei numbered 1..N without gaps, in the order of their ids."""
    return _numbered(instance_map)[0]


def _numbered(instance_map: IntMap) -> tuple[npt.NDArray[np.int32], Ints]:
    """`remap_label`, and the former id of each number; that of 0 is 0."""
    if instance_map.max(initial=0) > instance_map.size:
        ids, index = np.unique(np.append(instance_map, 0), return_inverse=True)
        return index[:-1].reshape(instance_map.shape).astype(np.int32), ids.astype(np.int64)
    present = np.bincount(instance_map.ravel(), minlength=1) > 0
    present[0] = True
    return (np.cumsum(present, dtype=np.int32) - 1)[instance_map], np.flatnonzero(present)


# -- how much two maps agree ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Every pair of a true and a predicted nucleus that share area, by row of the lists of nuclei.

    Areas count pixels, or are in any other unit.
    """

    true_ids: Ints
    predicted_ids: Ints
    true_area: Ints | Floats
    predicted_area: Ints | Floats
    true: Ints
    predicted: Ints
    shared: Ints | Floats

    @classmethod
    def between(cls, true_map: IntMap, predicted_map: IntMap) -> "Overlaps":
        if true_map.shape != predicted_map.shape:
            raise ValueError(f"the maps differ in shape: {true_map.shape} and {predicted_map.shape}")
        true, true_ids = _numbered(true_map)
        predicted, predicted_ids = _numbered(predicted_map)
        pixels = (np.ones(true.size, np.int64), (true.ravel(), predicted.ravel()))
        table = sparse.coo_array(pixels, shape=(true_ids.size, predicted_ids.size)).tocsr()
        pairs = table[1:, 1:].tocoo()
        return cls(
            true_ids[1:],
            predicted_ids[1:],
            table.sum(axis=1)[1:],
            table.sum(axis=0)[1:],
            pairs.row.astype(np.int64),
            pairs.col.astype(np.int64),
            pairs.data,
        )

    @property
    def union(self) -> Ints | Floats:
        union: Ints | Floats = self.true_area[self.true] + self.predicted_area[self.predicted] - self.shared
        return union

    def matches(self, iou: float) -> tuple[Ints, Ints, Floats]:
        """Rows of the paired nuclei, and their IoU: at most one partner each."""
        values = self.shared / self.union
        if iou >= 0.5:  # two disjoint nuclei cannot both share more than half with a third
            kept = values > iou
            return self.true[kept], self.predicted[kept], values[kept]
        dense = np.zeros((self.true_ids.size, self.predicted_ids.size))
        dense[self.true, self.predicted] = values
        true, predicted = optimize.linear_sum_assignment(dense, maximize=True)
        kept = dense[true, predicted] > iou
        return true[kept], predicted[kept], dense[true, predicted][kept]


@dataclass(frozen=True, eq=False)
class PanopticQuality:
    """How well nuclei were found (DQ), outlined (SQ), and both (PQ = DQ x SQ).

    Attributes
    ----------
    dq, sq, pq : float
        In [0, 1]; 0 if both maps are empty.
    pairs : (P, 2) int64
        Ids of the true and the predicted nucleus of each pair, by true id.
    ious : (P,) float64
    missed, false_alarms : int64
        Ids of the true and of the predicted nuclei without a partner.
    """

    dq: float
    sq: float
    pq: float
    pairs: Ints
    ious: Floats
    missed: Ints
    false_alarms: Ints


def panoptic_quality(true_map: IntMap, predicted_map: IntMap, iou: float = 0.5) -> PanopticQuality:
    """Panoptic quality of a predicted instance map (H, W).

    Nuclei pair if their IoU is above `iou`; below 0.5, where that leaves a choice, such that the sum of IoU is
    greatest (a dense table then: for images, not slides). Kirillov et al. 2019, doi:10.1109/CVPR.2019.00963.

    Raises
    ------
    ValueError
        If the maps differ in shape.

    Examples
    --------
    >>> panoptic_quality(np.array([[0, 1, 1, 2]]), np.array([[5, 5, 5, 0]])).pairs
    array([[1, 5]])
    """
    overlaps = Overlaps.between(true_map, predicted_map)
    true, predicted, ious = overlaps.matches(iou)
    missed, false_alarms = np.delete(overlaps.true_ids, true), np.delete(overlaps.predicted_ids, predicted)
    dq, sq, pq = (float(value) for value in quality(true.size, missed.size, false_alarms.size, ious.sum()))
    pairs = np.column_stack([overlaps.true_ids[true], overlaps.predicted_ids[predicted]])
    return PanopticQuality(dq, sq, pq, pairs, ious, missed, false_alarms)


def quality(hits: Any, misses: Any, alarms: Any, iou_sum: Any) -> Floats:
    """DQ, SQ and PQ, stacked, from counts of any one shape."""
    dq = hits / (hits + 0.5 * misses + 0.5 * alarms + EPSILON)
    sq = iou_sum / (hits + EPSILON)
    return np.stack([dq, sq, dq * sq])


def aggregated_jaccard(true_map: IntMap, predicted_map: IntMap) -> float:
    """AJI: pixels shared with the best partner, over all pixels of pairs and of nuclei without partner.

    Two true nuclei may have the same best partner. NaN if both maps are empty. Kumar et al. 2017,
    doi:10.1109/TMI.2017.2677499.
    """
    return best_overlap_jaccard(Overlaps.between(true_map, predicted_map))


def best_overlap_jaccard(overlaps: Overlaps) -> float:
    """`aggregated_jaccard` of overlaps that are known already, in pixels or any other unit of area."""
    union = overlaps.union
    best_first = np.lexsort((overlaps.predicted, -overlaps.shared / union, overlaps.true))
    best = best_first[np.unique(overlaps.true[best_first], return_index=True)[1]]
    missed = np.delete(overlaps.true_area, overlaps.true[best]).sum()
    false_alarms = np.delete(overlaps.predicted_area, overlaps.predicted[best]).sum()
    return _ratio(overlaps.shared[best].sum(), union[best].sum() + missed + false_alarms)


def dice(true: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|) of two masks; NaN if both are empty."""
    return _ratio(2 * np.count_nonzero(true & predicted), np.count_nonzero(true) + np.count_nonzero(predicted))


def jaccard(true: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_]) -> float:
    """|A and B| / |A or B| of two masks; NaN if both are empty."""
    return _ratio(np.count_nonzero(true & predicted), np.count_nonzero(true | predicted))


# -- detection --------------------------------------------------------------------------------------------------------


def centroids(instance_map: IntMap) -> Floats:
    """Mean of the pixels of every nucleus, (N, 2) as (x, y), in the order of the ids."""
    index, _ = _numbered(instance_map)
    pixels = np.flatnonzero(index)
    nucleus = index.ravel()[pixels]
    y, x = np.divmod(pixels, index.shape[1])
    return np.column_stack([np.bincount(nucleus, along)[1:] for along in (x, y)]) / np.bincount(nucleus)[1:, None]


def majority_types(instance_map: IntMap, type_map: IntMap) -> Ints:
    """Most frequent type among the pixels of every nucleus, (N,) in the order of the ids.

    Background (0) wins only where there is no other type; of two equally frequent types the lower wins.
    """
    index, ids = _numbered(instance_map)
    types = max(int(type_map.max(initial=0)) + 1, 2)
    pixels = np.bincount(index.ravel().astype(np.int64) * types + type_map.ravel(), minlength=ids.size * types)
    typed = pixels.reshape(ids.size, types)[1:, 1:]
    return np.where(typed.any(axis=1), typed.argmax(axis=1) + 1, 0)


def pair_centroids(true: Floats, predicted: Floats, radius: float) -> tuple[Ints, Ints, Ints]:
    """Pair points (N, 2) and (M, 2) one to one, no farther apart than `radius`.

    The pairing has the least sum of distances over *all* points; pairs beyond the radius are then dissolved, as in
    the published code. So a far point may take a partner from a near one.

    Returns
    -------
    pairs : (P, 2) int64
        Rows of `true` and of `predicted`.
    unpaired_true, unpaired_predicted : int64
    """
    apart = distance.cdist(true.reshape(-1, 2), predicted.reshape(-1, 2))
    rows, columns = optimize.linear_sum_assignment(apart)
    near = apart[rows, columns] <= radius
    pairs = np.column_stack([rows[near], columns[near]])
    return pairs, np.delete(np.arange(len(true)), pairs[:, 0]), np.delete(np.arange(len(predicted)), pairs[:, 1])


class Detection(NamedTuple):
    """How well nuclei were found."""

    f1: float
    precision: float
    recall: float


def detection(paired: int, missed: int, false_alarms: int) -> Detection:
    """F1, precision and recall; NaN where nothing could be found, or nothing was."""
    return Detection(
        _ratio(2 * paired, 2 * paired + missed + false_alarms),
        _ratio(paired, paired + false_alarms),
        _ratio(paired, paired + missed),
    )


def type_detection(paired: Ints, missed: Ints, false_alarms: Ints, of_type: int) -> Detection:
    """F1, precision and recall of one type, from the types of paired (P, 2) and of unpaired nuclei.

    Graham et al. 2019, doi:10.1016/j.media.2019.101563: a pair whose types differ weighs twice an unpaired nucleus.
    """
    known = paired[paired[:, 0] != UNKNOWN_TYPE]
    true, predicted = known[:, 0] == of_type, known[:, 1] == of_type
    hits = int(np.sum(true & predicted))
    misses = int(2 * np.sum(true & ~predicted) + np.sum(missed == of_type))
    alarms = int(2 * np.sum(predicted & ~true) + np.sum(false_alarms == of_type))
    return detection(hits, misses, alarms)


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else float("nan")
