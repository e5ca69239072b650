"""A widened network answers as the narrow one, and its copies learn different things."""

from dataclasses import replace

import pytest
import torch
from shrunk_models import shrunk
from torch import nn

from wsipipe.errors import ConfigError
from wsipipe.model.registry import SPECS, build
from wsipipe.training.widening import widen

NANO = SPECS["cellvta-nano"]
NARROW = replace(
    NANO, settings={**NANO.settings, "dim": 32, "heads": 2, "prior_width": 8, "decoder_widths": [8, 16, 16, 24]}
)
WIDE = replace(NARROW, settings={**NARROW.settings, "dim": 64, "prior_width": 16, "decoder_widths": [16, 32, 48, 48]})


def trained_like(seed: int) -> nn.Module:
    """A narrow network in which nothing is at its start: every weight, norm and statistic is some number."""
    torch.manual_seed(seed)
    network = build(NARROW)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.add_(torch.randn_like(value) * 0.1)
            if "var" in name:
                value.abs_()
    return network


@pytest.mark.parametrize("training", [False, True])
def test_answers_are_those_of_the_narrow_network(training: bool) -> None:
    narrow, wide = trained_like(1), build(WIDE)
    widen(narrow, wide)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        wanted, given = narrow.train(training)(image), wide.train(training)(image)
    for name, values in wanted.items():
        scale = values.abs().max()
        assert torch.allclose(given[name], values, atol=2e-5 * float(scale)), name


def test_copies_get_different_gradients() -> None:
    narrow, wide = trained_like(2), build(WIDE)
    widen(narrow, wide)
    output = wide(torch.randn(1, 3, 64, 64))
    sum(values.square().mean() for values in output.values()).backward()
    first = wide.decoder.skips.level0[0][0].weight.grad
    assert not torch.allclose(first[0::2], first[1::2])


def test_draws_are_of_the_seed() -> None:
    narrow = trained_like(3)
    one, same, other = build(WIDE), build(WIDE), build(WIDE)
    widen(narrow, one, 5)
    widen(narrow, same, 5)
    widen(narrow, other, 6)
    weights = [network.decoder.skips.level1[0][0].weight for network in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_refuses_what_is_no_multiple_or_another_network() -> None:
    odd = replace(NARROW, settings={**NARROW.settings, "dim": 48})
    with pytest.raises(ConfigError, match="cannot be widened"):
        widen(trained_like(1), build(odd))
    deeper = replace(WIDE, settings={**WIDE.settings, "depth": 5, "stages": [[0, 0], [1, 1], [2, 2], [3, 4]]})
    with pytest.raises(ConfigError, match="same layers"):
        widen(trained_like(1), build(deeper))
    for heads in ("heads", "attention_heads"):
        with pytest.raises(ConfigError, match="heads and cannot be widened"):
            widen(trained_like(1), build(replace(WIDE, settings={**WIDE.settings, heads: 8})))


def test_refuses_cells_of_another_size() -> None:
    fine, coarse = (replace(NARROW, settings={**NARROW.settings, "cell_px": cell_px}) for cell_px in (1, 2))
    with pytest.raises(ConfigError, match="cells of 1 px cannot be widened to one of 2 px"):
        widen(build(fine), build(coarse))


def test_refuses_a_vit_whose_attention_knows_more_than_queries_and_keys() -> None:
    sam = shrunk("cellvta-sam-b")
    with pytest.raises(ConfigError, match="round a plain ViT"):
        widen(build(sam), build(sam))
