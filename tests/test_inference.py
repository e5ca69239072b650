"""The network prepared for inference gives what the plain graph gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from shrunk_models import shown_px, shrunk
from torch import nn
from torch.nn import functional

from wsipipe.model.attention import gather_levels, sample_levels
from wsipipe.model.inference import prepare_for_inference
from wsipipe.model.registry import SPECS, build
from wsipipe.model.weights import load_model, shipped_models

SHIPPED = list(shipped_models())
PARITY = Path(__file__).parent / "data" / "parity"


def trained_looking(name: str) -> nn.Module:
    """A network none of whose norms, biases and gains is what it was at the start."""
    torch.manual_seed(0)
    network = build(shrunk(name)).eval()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 1.5)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.3)
        for weight in network.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return network


@pytest.mark.parametrize("name", SPECS)
def test_a_prepared_network_gives_the_same_and_leaves_the_other_as_it_is(name):
    network, spec = trained_looking(name), shrunk(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    prepared = prepare_for_inference(network)
    with torch.inference_mode():
        for sides in (shown_px(spec), (shown_px(spec)[0],) * 2):
            image = torch.randn(2, 3, *sides)
            plain, fast, again = network(image), prepared(image), prepared(image)
            assert plain.keys() == fast.keys()
            for key, value in plain.items():
                torch.testing.assert_close(fast[key], value, atol=1e-4 * max(1, value.abs().max().item()), rtol=1e-4)
                assert torch.equal(fast[key], again[key])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(weight.requires_grad for weight in network.parameters())
    assert not any(weight.requires_grad for weight in prepared.parameters())
    norms = [part for part in prepared.modules() if isinstance(part, nn.BatchNorm2d)]
    if spec.architecture in ("cellvta", "cellvit"):
        assert len(norms) == ("cellvta" in name)  # that of the coarsest level, which three convolutions read


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_patches_are_embedded_as_the_convolution_would(name, dtype):
    encoder = load_model(name)[0].encoder.vit
    image = torch.randn(2, 12, 64, 96)
    with torch.no_grad():
        wanted = functional.conv2d(image, *encoder.patch_embed.proj.parameters(), stride=16).flatten(2).mT
        found = encoder.to(dtype)._embedded(image.to(dtype)).float()
    atol = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype] * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["cellvta-nano", "cellvta-sam-b", "cellvit-256"])
def test_half_the_precision_changes_little(name):
    network = trained_looking(name)
    prepared = prepare_for_inference(network, dtype=torch.bfloat16)
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        plain, fast = network(image), prepared(image.bfloat16())
    for key, value in plain.items():
        assert fast[key].dtype == torch.bfloat16
        torch.testing.assert_close(fast[key].float(), value, atol=0.05 * value.abs().max().item(), rtol=0)
    assert all(weight.dtype == torch.float32 for weight in network.parameters())


@pytest.mark.parity
def test_gathering_gives_what_the_reference_operator_gives():
    case = {key: torch.from_numpy(value) for key, value in np.load(PARITY / "msda_core.npz").items()}
    sizes = tuple((int(h), int(w)) for h, w in case["shapes"])
    extent = torch.tensor([(w, h) for h, w in sizes])
    places = case["sampling_locations"] * extent[:, None] - 0.5
    gathered = gather_levels(case["value"], sizes, places, case["attention_weights"])
    np.testing.assert_allclose(gathered, case["output"], atol=1e-5)


def test_gathering_reads_zeros_outside():
    value, sizes = torch.ones(1, 6, 1, 2), ((2, 3),)
    places = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [-0.5, 0.0], [2.5, 1.5], [9.0, 9.0], [-9.0, 0.0]])
    places = places.view(1, 6, 1, 1, 1, 2)
    weights = torch.ones(1, 6, 1, 1, 1)
    got = gather_levels(value, sizes, places, weights)[0, :, 0]
    assert got.tolist() == [1.0, 0.0, 0.5, 0.25, 0.0, 0.0]
    locations = (places + 0.5) / torch.tensor([3, 2])
    sampled = sample_levels(value, sizes, locations.permute(0, 2, 3, 4, 1, 5), weights.permute(0, 2, 3, 4, 1))
    torch.testing.assert_close(sampled[0, :, 0], got)


def test_a_network_that_cannot_be_compiled_runs_without(monkeypatch, caplog):
    def broken(network, **options):
        def fail(image):
            raise RuntimeError("no compiler here\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    network = trained_looking("cellvta-nano")
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        prepared = prepare_for_inference(network, compiled=True)
        first, second, plain = prepared(image), prepared(image), prepare_for_inference(network)(image)
    assert [record.getMessage() for record in caplog.records] == [
        "the network cannot be compiled here and runs without (no compiler here)"
    ]
    assert all(torch.equal(first[key], value) and torch.equal(second[key], value) for key, value in plain.items())


def test_memory_that_runs_out_is_not_taken_for_a_compiler_that_fails(monkeypatch):
    def broken(network, **options):
        def fail(image):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    prepared = prepare_for_inference(trained_looking("cellvta-nano"), compiled=True)
    with pytest.raises(torch.OutOfMemoryError):
        prepared(torch.randn(1, 3, 32, 32))
