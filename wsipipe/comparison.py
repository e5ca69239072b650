"""Two sets of outlines to scores: how well one set of nuclei agrees with another. Pure.

On outlines, not on painted maps: a slide's nuclei are compared without its pixels, in time that grows with the nuclei.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from scipy import optimize, sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

from wsipipe.metrics import (
    UNKNOWN_TYPE,
    Floats,
    Ints,
    Overlaps,
    best_overlap_jaccard,
    detection,
    quality,
    type_detection,
)

Polygons = npt.NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class OutlinedNuclei:
    """Nuclei by their outlines.

    Attributes
    ----------
    outlines : (N,) of shapely.Polygon or MultiPolygon
        Valid, in level-0 px.
    types : (N,) str
        Names of their types; empty where nobody has told.
    """

    outlines: Polygons
    types: npt.NDArray[np.str_]


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of all nuclei, or of those of a type. NaN where there is nothing to score.

    Attributes
    ----------
    true, found, paired : int
        Nuclei of each set, and pairs of IoU above 0.5.
    pq, dq, sq : float
        Panoptic quality and its factors.
    aji, dice : float
        Of the areas. Nuclei of one set are taken not to overlap.
    f1, precision, recall : float
        Of the centres, paired within a radius; of a type as Graham et al. 2019 count it.
    """

    true: int
    found: int
    paired: int
    pq: float
    dq: float
    sq: float
    aji: float
    dice: float
    f1: float
    precision: float
    recall: float


def compare(true: OutlinedNuclei, found: OutlinedNuclei, radius_px0: float) -> dict[str, Scores]:
    """Scores of `found` against `true`: of all nuclei under "all", then of each type that both sets tell of.

    Parameters
    ----------
    radius_px0 : float
        How far apart the centres of a pair may be, level-0 px.

    Notes
    -----
    Nuclei pair one to one if their IoU is above 0.5 (Kirillov et al. 2019, doi:10.1109/CVPR.2019.00963); of outlines
    that overlap within a set, as of a nucleus found twice, only the best pairs. The PQ of a type is that of the nuclei
    of this type alone, without those found on a true nucleus of unknown type, which no score by type counts. AJI:
    Kumar et al. 2017, doi:10.1109/TMI.2017.2677499. Centres pair such that there are as many pairs as can be, and of
    these the closest. Types without nuclei in either set are left out; so are all, where one set has no types.
    """
    overlaps = find_overlaps(true.outlines, found.outlines)
    true_at, found_at = (shapely.get_coordinates(shapely.centroid(nuclei.outlines)) for nuclei in (true, found))
    pairs = pair_within(true_at, found_at, radius_px0)
    missed, alarms = np.delete(np.arange(len(true_at)), pairs[:, 0]), np.delete(np.arange(len(found_at)), pairs[:, 1])
    scores = {"all": _scores(overlaps, detection(len(pairs), missed.size, alarms.size))}
    names = sorted((set(true.types.tolist()) | set(found.types.tolist())) - {""})
    if not (true.types != "").any() or not (found.types != "").any():
        return scores
    numbers = {name: number for number, name in enumerate(names, UNKNOWN_TYPE + 1)} | {"": UNKNOWN_TYPE}
    kinds = [np.array([numbers[name] for name in nuclei.types.tolist()], np.int64) for nuclei in (true, found)]
    on_true, on_found, _ = _one_to_one(*overlaps.matches(0.5))
    judged = np.ones(len(found_at), bool)
    judged[on_found[kinds[0][on_true] == UNKNOWN_TYPE]] = False
    paired = np.column_stack([kinds[0][pairs[:, 0]], kinds[1][pairs[:, 1]]])
    for name in names:
        number = numbers[name]
        of_type = _subset(overlaps, kinds[0] == number, (kinds[1] == number) & judged)
        scores[name if name != "all" else "the type all"] = _scores(
            of_type, type_detection(paired, kinds[0][missed], kinds[1][alarms], number)
        )
    return scores


def find_overlaps(true: Polygons, found: Polygons) -> Overlaps:
    """Pairs of outlines that share area; ids are the places in the arrays."""
    rows, columns = shapely.STRtree(found).query(true, predicate="intersects")
    shared = shapely.area(shapely.intersection(true[rows], found[columns]))
    some = shared > 0
    return Overlaps(
        np.arange(len(true)),
        np.arange(len(found)),
        shapely.area(true),
        shapely.area(found),
        rows[some].astype(np.int64),
        columns[some].astype(np.int64),
        shared[some],
    )


def pair_within(true: Floats, found: Floats, radius: float) -> Ints:
    """Pair points (N, 2) and (M, 2) one to one, none farther apart than `radius`: most pairs, then least distance.

    Returns
    -------
    (P, 2) int64
        Rows of `true` and of `found`, by row of `true`.
    """
    if not len(true) or not len(found):
        return np.empty((0, 2), np.int64)
    near = cKDTree(true).sparse_distance_matrix(cKDTree(found), radius, output_type="ndarray")
    if not near.size:
        return np.empty((0, 2), np.int64)
    n = len(true)
    graph = sparse.coo_array((np.ones(near.size), (near["i"], n + near["j"])), shape=(n + len(found),) * 2)
    _, group = csgraph.connected_components(graph, directed=False)
    order = np.lexsort((near["j"], near["i"], group[near["i"]]))
    near = near[order]
    begins = np.flatnonzero(np.diff(group[near["i"]], prepend=-1))
    alone = np.diff(begins, append=near.size) == 1  # a point and its one neighbour, as nearly all are
    pairs = [np.column_stack([near["i"], near["j"]])[begins[alone]]]
    for some in (part for part, one in zip(np.split(near, begins[1:]), alone, strict=True) if not one):
        rows, row = np.unique(some["i"], return_inverse=True)
        columns, column = np.unique(some["j"], return_inverse=True)
        gain = np.zeros((rows.size, columns.size))
        gain[row, column] = 2 * radius * (min(gain.shape) + 1) - some["v"]  # a pair more outweighs all distances
        taken, partner = optimize.linear_sum_assignment(gain, maximize=True)
        real = gain[taken, partner] > 0
        pairs.append(np.column_stack([rows[taken[real]], columns[partner[real]]]))
    paired = np.concatenate(pairs).astype(np.int64)
    return paired[np.argsort(paired[:, 0])]


def _scores(overlaps: Overlaps, found: Any) -> Scores:
    true, _, ious = _one_to_one(*overlaps.matches(0.5))
    count, other = overlaps.true_ids.size, overlaps.predicted_ids.size
    dq, sq, pq = quality(true.size, count - true.size, other - true.size, ious.sum())
    area = overlaps.true_area.sum() + overlaps.predicted_area.sum()
    nothing = count + other == 0
    return Scores(
        true=count,
        found=other,
        paired=true.size,
        pq=float("nan") if nothing else float(pq),
        dq=float("nan") if nothing else float(dq),
        sq=float("nan") if nothing else float(sq),
        aji=best_overlap_jaccard(overlaps),
        dice=float(_shared(overlaps) / area) if area else float("nan"),
        **found._asdict(),
    )


def _shared(overlaps: Overlaps) -> float:
    """What the nuclei of each set share with the other, both summed; of each at most all of it.

    Simplified outlines of neighbours may overlap by a sliver, which would count twice.
    """
    sides = ((overlaps.true, overlaps.true_area), (overlaps.predicted, overlaps.predicted_area))
    shares = (np.minimum(np.bincount(ids, overlaps.shared, area.size), area).sum() for ids, area in sides)
    return float(sum(shares))


def _one_to_one(true: Ints, predicted: Ints, ious: Floats) -> tuple[Ints, Ints, Floats]:
    """Of the pairs that share a nucleus the best; there are none such where no outlines of one set overlap."""
    for side in (true, predicted):
        best_first = np.lexsort((-ious, side))
        best = np.sort(best_first[np.unique(side[best_first], return_index=True)[1]])
        if best.size < side.size:
            return _one_to_one(true[best], predicted[best], ious[best])
    return true, predicted, ious


def _subset(overlaps: Overlaps, true: npt.NDArray[np.bool_], found: npt.NDArray[np.bool_]) -> Overlaps:
    """The overlaps of some nuclei with some."""
    kept = true[overlaps.true] & found[overlaps.predicted]
    new_row, new_column = np.cumsum(true) - 1, np.cumsum(found) - 1
    return Overlaps(
        overlaps.true_ids[true],
        overlaps.predicted_ids[found],
        overlaps.true_area[true],
        overlaps.predicted_area[found],
        new_row[overlaps.true[kept]],
        new_column[overlaps.predicted[kept]],
        overlaps.shared[kept],
    )


def to_table(scores: dict[str, Scores]) -> str:
    """The scores as a table in Markdown that lines up in a terminal too."""
    names = ("true", "found", "paired", "PQ", "DQ", "SQ", "AJI", "Dice", "F1", "precision", "recall")
    rows = [["nuclei", *names]]
    for name, of in scores.items():
        values = asdict(of).values()
        rows.append([name, *(str(value) if isinstance(value, int) else f"{value:.4f}" for value in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    rule = "|".join("-" * (width + 1) + ("-" if number == 0 else ":") for number, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]) + "\n"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
    return f"| {' | '.join(cells)} |"
