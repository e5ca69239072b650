"""How often each training image is drawn, so that rare tissues and rare types are seen.

`gamma` in [0, 1] says how much rarity counts: at 0 all images weigh the same. Hörst et al. 2024, CellViT,
doi:10.1016/j.media.2024.103143.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wsipipe.errors import ConfigError
from wsipipe.metrics import majority_types, remap_label
from wsipipe.training.data import PatchSet, Split

Floats = npt.NDArray[np.float64]


def image_weights(patches: PatchSet, by: str, gamma: float, split: Split = "train") -> Floats | None:
    """Weights of the images of a split, in the order of `PatchSet.of`; None where all weigh the same.

    Parameters
    ----------
    by : {"uniform", "shuffled", "tissue", "cell", "cell+tissue"}
        How rare a tissue or a type is, is counted over the whole set, whatever the split.

    Raises
    ------
    ConfigError
        If the set names no tissues, or no types, that the weights are to go by.
    """
    if by in ("uniform", "shuffled"):
        return None
    numbers = patches.of(split)
    by_tissue = by_type = None
    if "tissue" in by:
        if not patches.tissues:
            raise ConfigError(f"{patches.folder} names no tissues to sample by; set sampling: cell, or uniform")
        of_all = [patch.tissue for patch in patches.index]
        counts = {tissue: of_all.count(tissue) for tissue in set(of_all)}
        by_tissue = tissue_weights([of_all[number] for number in numbers], counts, gamma)
    if "cell" in by:
        if patches.types is None or patches.class_names is None:
            raise ConfigError(f"{patches.folder} knows no types to sample by; set sampling: uniform")
        held = type_counts(patches)
        by_type = type_weights(held[numbers], (held > 0).sum(axis=0).tolist(), gamma)
    if by_tissue is not None and by_type is not None:
        return tissue_and_type_weights(by_tissue, by_type)
    return by_tissue if by_type is None else by_type


def type_counts(patches: PatchSet) -> npt.NDArray[np.int64]:
    """Nuclei of each type, without the background, in each image: (N, T)."""
    types, classes = patches.types, len(patches.class_names or ())
    assert types is not None, "asked of a typed set"
    counts = np.zeros((len(patches), classes - 1), np.int64)
    for number in range(len(patches)):
        instances = remap_label(np.asarray(patches.instances[number]).astype(np.int32))
        of_nucleus = majority_types(instances, types[number])
        counts[number] = np.bincount(of_nucleus, minlength=256)[1:classes]
    return counts


def tissue_weights(tissues: Sequence[str], tissue_counts: Mapping[str, int], gamma: float) -> Floats:
    """Weight of each image by how rare its tissue is.

    Parameters
    ----------
    tissues : sequence of N str
        Tissue of each image.
    tissue_counts : mapping of str to int
        Images of each tissue in the whole data set, all folds.
    gamma : float

    Returns
    -------
    (N,) float64

    Raises
    ------
    ValueError
        If gamma is outside [0, 1] or a tissue has no count.
    """
    if missing := sorted(set(tissues) - set(tissue_counts)):
        raise ValueError(f"no count of images is given for {', '.join(missing)}")
    of_image = np.array([tissue_counts[tissue] for tissue in tissues], np.float64)
    return _rarity(of_image, sum(tissue_counts.values()), gamma)


def type_weights(nuclei_counts: npt.NDArray[np.integer[Any]], images_with_type: Sequence[int], gamma: float) -> Floats:
    """Weight of each image by how rare the types of its nuclei are; an image without nuclei weighs as the lightest.

    Parameters
    ----------
    nuclei_counts : (N, T) int
        Nuclei of each type, without the background, in each image.
    images_with_type : sequence of T int
        Images that hold each type, in the whole data set.
    gamma : float

    Returns
    -------
    (N,) float64

    Raises
    ------
    ValueError
        If gamma is outside [0, 1] or the lengths differ.
    """
    held = nuclei_counts > 0
    if held.ndim != 2 or held.shape[1] != len(images_with_type):
        raise ValueError(f"counts of shape {held.shape} do not fit {len(images_with_type)} types")
    images = np.asarray(images_with_type, np.float64)
    rarity = _rarity(images, images.sum(), gamma)
    weights: Floats = (1 - gamma) * held.any(axis=1) + gamma * (held @ rarity)
    lightest = weights[weights > 0].min() if weights.any() else 1.0
    weights[weights == 0] = lightest
    return weights


def tissue_and_type_weights(by_tissue: Floats, by_type: Floats) -> Floats:
    """Sum of both weights of each image, each over its maximum."""
    both: Floats = by_tissue / by_tissue.max() + by_type / by_type.max()
    return both


def _rarity(count: Floats, total: float, gamma: float) -> Floats:
    """1 at gamma 0, total / count at gamma 1."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is between 0 and 1, not {gamma}")
    rarity: Floats = total / (gamma * np.maximum(count, 1) + (1 - gamma) * total)  # a count of 0 is no image's
    return rarity
