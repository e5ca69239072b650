import json
from pathlib import Path

import numpy as np
import pytest

from wsipipe.training.sampling import tissue_and_type_weights, tissue_weights, type_weights

REFERENCE = json.loads((Path(__file__).parent / "data/parity/sampling_weights.json").read_text())
COUNTS = np.array(REFERENCE["cell_count"])


@pytest.mark.parity
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.85, 1.0])
def test_weights_of_pannuke_are_those_of_the_reference(gamma):
    expected = REFERENCE[f"gamma_{gamma}"]
    by_tissue = tissue_weights(REFERENCE["types"], REFERENCE["tissue_counts"], gamma)
    by_type = type_weights(COUNTS, REFERENCE["binary_weight_factors"], gamma)
    np.testing.assert_allclose(by_tissue, expected["tissue"], rtol=1e-6)
    np.testing.assert_allclose(by_type, expected["cell"], rtol=1e-6)
    np.testing.assert_allclose(tissue_and_type_weights(by_tissue, by_type), expected["cell+tissue"], rtol=1e-6)


@pytest.mark.parity
def test_weights_of_conic_are_those_of_the_reference():
    weights = type_weights(np.array(REFERENCE["conic_cell_count"]), REFERENCE["conic_factors"], 0.85)
    np.testing.assert_allclose(weights, REFERENCE["conic_cell_gamma_0.85"], rtol=1e-6)


def test_an_image_weighs_more_the_rarer_its_tissue():
    rare, common = tissue_weights(["rare", "common"], {"rare": 10, "common": 990}, 0.85)
    assert rare > common > 1


def test_images_without_nuclei_weigh_as_the_lightest_and_alone_all_the_same():
    assert type_weights(np.array([[0, 0], [3, 0], [0, 1]]), [90, 10], 0.85).argmin() == 0
    assert type_weights(np.zeros((3, 2), int), [90, 10], 0.85).tolist() == [1, 1, 1]


def test_a_type_that_never_occurs_makes_no_image_heavy():
    assert type_weights(np.array([[1, 0], [2, 0]]), [2, 0], 1.0).tolist() == [1, 1]


def test_a_tissue_without_a_count_is_refused_by_name():
    with pytest.raises(ValueError, match="Lung"):
        tissue_weights(["Lung", "Skin"], {"Skin": 3}, 0.85)


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match="between 0 and 1"):
        tissue_weights(["Skin"], {"Skin": 3}, gamma)
    with pytest.raises(ValueError, match="between 0 and 1"):
        type_weights(COUNTS, REFERENCE["binary_weight_factors"], gamma)


def test_counts_that_do_not_fit_the_types_are_refused():
    with pytest.raises(ValueError, match="5 types"):
        type_weights(COUNTS[:, :4], REFERENCE["binary_weight_factors"], 0.85)
