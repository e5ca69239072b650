"""From what a network answers to maps: one way a kind of network, named by its spec.

Networks that answer NP, HV and NC maps are the rule. Others bring their own published way from an answer to the nuclei
of a tile. These are then drawn as maps, the HV map being the one that a HoVer-Net would be trained on, so that
stitching, seams and all that comes after are the same for every network. The price: a nucleus on the border between two
cores is drawn by two tiles, each of which saw it whole if the halo is wide enough, and the flood decides anew between
nuclei that touch. What is gained: no nucleus is cut, doubled or lost between tiles, whatever the network.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from skimage.segmentation import watershed
from torch import Tensor
from torch.nn import functional

from wsipipe.maps import NetworkMaps, to_maps
from wsipipe.training.targets import hv_map

Outputs = Mapping[str, Tensor]
# (outputs, px to cut on each side, classes) -> maps
Answer = Callable[[Outputs, int, int], NetworkMaps]


def maps_of(answer: str, outputs: Outputs, cut_px: int, classes: int) -> NetworkMaps:
    """Maps of a batch without `cut_px` on each side, by the way that `ModelSpec.answer` names."""
    return ANSWERS[answer](outputs, cut_px, classes)


def _of_maps(outputs: Outputs, cut_px: int, classes: int) -> NetworkMaps:
    return to_maps(outputs, cut_px)


def _of_distances(outputs: Outputs, cut_px: int, classes: int) -> NetworkMaps:
    return _drawn(_distance_tiles(outputs, classes), _finite(outputs), cut_px)


def _of_points(outputs: Outputs, cut_px: int, classes: int) -> NetworkMaps:
    return _drawn(_point_tiles(outputs, classes), _finite(outputs), cut_px)


ANSWERS: dict[str, Answer] = {"maps": _of_maps, "distances": _of_distances, "points": _of_points}

# Labels (H, W), and the probability of being one at all (N + 1,) and of each type (N + 1, K) by label.
Drawn = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def _distance_tiles(outputs: Outputs, classes: int) -> list[Drawn]:
    finite = _finite(outputs).tolist()
    tiles = zip(outputs["distances"].float().cpu().numpy(), finite, strict=True)
    return [distance_nuclei(values) if usable else _nothing(values.shape[1:], classes) for values, usable in tiles]


def _point_tiles(outputs: Outputs, classes: int) -> list[Drawn]:
    finite = _finite(outputs).tolist()
    tiles = zip(*(outputs[name].float() for name in ("feature", "kernel", "category")), finite, strict=True)
    drawn = []
    for feature, kernel, category, usable in tiles:
        if usable:
            masks, types, scores = point_nuclei(feature, kernel, category)
            drawn.append(_painted(masks.cpu().numpy(), types.cpu().numpy(), scores.cpu().numpy(), classes))
        else:
            drawn.append(_nothing(tuple(feature.shape[1:]), classes))
    return drawn


# (outputs, classes) -> the nuclei of every tile; none where a network gave no number
NUCLEI: dict[str, Callable[[Outputs, int], list[Drawn]]] = {"distances": _distance_tiles, "points": _point_tiles}


def _finite(outputs: Outputs) -> Tensor:
    """(B,) bool: whether all that a network answers to a tile are numbers."""
    return torch.stack([values.flatten(1).isfinite().all(1) for values in outputs.values()]).all(0)


def _nothing(shape: tuple[int, ...], classes: int) -> Drawn:
    return np.zeros(shape, np.int32), np.zeros(1, np.float32), np.eye(1, classes, dtype=np.float32)


def distance_nuclei(
    distances: npt.NDArray[np.float32], cell_threshold: float = 0.12, seed_threshold: float = 0.45
) -> Drawn:
    """Nuclei of a tile from CISCNet's distance maps (1 + types, H, W).

    As published, at the published thresholds: seeds of at least 2 px, flooded over the negative distance.
    """
    whole = distances[0]
    seeds, count = ndimage.label(whole > seed_threshold, np.ones((3, 3)))
    kept = np.bincount(seeds.ravel(), minlength=count + 1) >= 2
    kept[0] = False
    seeds = np.where(kept, np.cumsum(kept), 0)[seeds]
    labels = watershed(-whole, seeds, mask=whole > cell_threshold).astype(np.int32)
    numbers = np.arange(labels.max() + 1)
    sums = np.stack([ndimage.sum_labels(of_type, labels, numbers) for of_type in distances[1:]], axis=1)
    deepest = np.append(0, ndimage.maximum(whole, labels, numbers[1:])) if len(numbers) > 1 else np.zeros(1)
    types = np.zeros((len(numbers), len(distances)), np.float32)
    types[:, 1:] = sums.clip(min=0) / np.maximum(sums.clip(min=0).sum(1, keepdims=True), 1e-6)
    nowhere = types.sum(1) == 0  # all types below zero: the least of them
    types[nowhere, 1 + sums[nowhere].argmax(1)] = 1
    types[0], types[0, 0] = 0, 1
    return labels, deepest.clip(0, 1).astype(np.float32), types


def point_nuclei(
    feature: Tensor,
    kernel: Tensor,
    category: Tensor,
    *,
    peaks: bool = False,
    score_threshold: float = 0.4,
    update_threshold: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (N, H, W) bool, types (N,) from 0, and scores (N,), best first, from PointNu-Net's answer to a tile.

    Parameters
    ----------
    feature, kernel, category : (F, H, W), (F, h, w), (C, h, w) float
    peaks : bool
        Take cells that are the greatest of their 3x3 neighbours, and suppress no masks; else every cell above the
        threshold, and suppress by matrix NMS (Wang et al. 2020, SOLOv2, arXiv 2003.10152), as published for PanNuke.
    """
    probability = category.sigmoid()
    if peaks:
        highest = functional.max_pool2d(probability[None], 3, stride=1, padding=1)[0]
        probability = probability * (probability == highest)
    cells = (probability > score_threshold).permute(1, 2, 0).nonzero()
    rows, columns, types = cells.unbind(1)
    scores = probability[types, rows, columns]
    masks, within = [], []
    for kernels in kernel[:, rows, columns].T.split(128):  # so many at once: a mask of 256 px takes 256 kB
        soft = (kernels @ feature.flatten(1)).sigmoid()
        hard = soft > 0.5
        within.append((soft * hard).sum(1) / hard.sum(1))
        masks.append(hard)
    flat = torch.cat(masks) if masks else feature.new_zeros((0, feature[0].numel()), dtype=torch.bool)
    scores = scores * (torch.cat(within) if within else scores)
    large = flat.sum(1) > 4
    flat, types, scores = flat[large], types[large], scores[large]
    order = scores.argsort(descending=True, stable=True)[:500]
    flat, types, scores = flat[order], types[order], scores[order]
    if not peaks and len(scores):
        scores = scores * _matrix_nms(flat.float(), types)
        kept = scores >= update_threshold
        flat, types, scores = flat[kept], types[kept], scores[kept]
        order = scores.argsort(descending=True, stable=True)[:200]
        flat, types, scores = flat[order], types[order], scores[order]
    return flat.unflatten(1, tuple(feature.shape[1:])), types, scores


def _matrix_nms(masks: Tensor, types: Tensor, sigma: float = 10.0) -> Tensor:
    """Factor of every score: how little better masks of its type cover it."""
    areas = masks.sum(1)
    overlap = masks @ masks.T
    iou = overlap / (areas[:, None] + areas - overlap)
    iou = (iou * (types[:, None] == types)).triu(diagonal=1)
    covered = iou.max(0).values[:, None]
    factors: Tensor = ((-sigma * iou.square()).exp() / (-sigma * covered.square()).exp()).min(0).values
    return factors


def _painted(
    masks: npt.NDArray[np.bool_], types: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], classes: int
) -> Drawn:
    """Masks as labels; where they overlap the best is on top."""
    labels = np.zeros(masks.shape[1:], np.int32)
    for number in range(len(masks), 0, -1):
        labels[masks[number - 1]] = number
    by_type = np.zeros((len(masks) + 1, classes), np.float32)
    by_type[0, 0] = 1
    by_type[np.arange(1, len(masks) + 1), 1 + types] = 1
    return labels, np.append(0, scores).astype(np.float32), by_type


def _drawn(tiles: list[Drawn], finite: Tensor, cut_px: int) -> NetworkMaps:
    """Nuclei as maps: NP from 0.5 (a nucleus of probability 0) to 1, so that every one found stays one."""
    nuclei, offsets, types = [], [], []
    for labels, probability, by_type in tiles:
        height, width = labels.shape
        core = np.s_[..., cut_px : height - cut_px, cut_px : width - cut_px]
        certainty = np.where(np.arange(len(probability)) > 0, 0.5 + probability / 2, 0)
        nuclei.append(np.ceil(certainty * 255)[labels][core])
        offsets.append((hv_map(labels, "exact") * 127).round()[core])
        types.append((by_type * 255).round().T[:, labels][core])
    arrays = (np.stack(nuclei).astype(np.uint8), np.stack(offsets).astype(np.int8), np.stack(types).astype(np.uint8))
    of_nuclei, of_offsets, of_types = map(torch.from_numpy, arrays)
    return NetworkMaps(of_nuclei, of_offsets, of_types, finite.cpu())
