"""A CNN that has learnt from photographs, beside the convolutions of the adapter."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from wsipipe.errors import ConfigError, ModelError
from wsipipe.model.inference import prepare_for_inference
from wsipipe.model.prior import TaughtPrior
from wsipipe.model.registry import SPECS, build
from wsipipe.model.weights import load_prior
from wsipipe.training.config import TrainConfig
from wsipipe.training.network import start_network
from wsipipe.training.team import with_common_statistics

PLAIN = SPECS["cellvta-nano"]
WITH = replace(PLAIN, settings={**PLAIN.settings, "prior": "efficientnet_lite0"})
THEIRS = {  # what EfficientNet-PyTorch calls the layers of a block that does not expand, and of one that does
    True: {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"},
    False: {
        "conv_pw": "_expand_conv",
        "bn1": "_bn0",
        "conv_dw": "_depthwise_conv",
        "bn2": "_bn1",
        "conv_pwl": "_project_conv",
        "bn3": "_bn2",
    },
}


def taught() -> nn.Module:
    """A CNN none of whose weights is what it was at the start."""
    torch.manual_seed(1)
    cnn = timm.create_model("efficientnet_lite0", pretrained=False)
    with torch.no_grad():
        for name, values in cnn.state_dict().items():
            if values.is_floating_point():
                values += 0.1 * torch.rand_like(values) if "var" in name else 0.1 * torch.randn_like(values)
    return cnn


def as_efficientnet_pytorch(cnn: nn.Module) -> dict[str, torch.Tensor]:
    renamed, number = {}, 0
    own = cnn.state_dict()
    for stage, blocks in enumerate(cnn.blocks):
        for place in range(len(blocks)):
            prefix = f"blocks.{stage}.{place}."
            names = THEIRS[f"{prefix}conv_pwl.weight" not in own]
            for key in [key for key in own if key.startswith(prefix)]:
                layer, kind = key.removeprefix(prefix).split(".")
                renamed[f"_blocks.{number}.{names[layer]}.{kind}"] = own[key]
            number += 1
    ends = {"conv_stem.": "_conv_stem.", "bn1.": "_bn0.", "conv_head.": "_conv_head.", "bn2.": "_bn1."}
    for before, after in {**ends, "classifier.": "_fc."}.items():
        renamed |= {after + key.removeprefix(before): own[key] for key in own if key.startswith(before)}
    return renamed


def test_a_network_that_is_given_a_prior_answers_as_before_until_it_learns_to_use_it():
    torch.manual_seed(0)
    plain, network = build(PLAIN).eval(), build(WITH).eval()
    result = network.load_state_dict(plain.state_dict(), strict=False)
    assert {key.split(".")[1] for key in result.missing_keys} == {"prior"}
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before, after = plain(image), network(image)
        assert all(torch.equal(after[key], before[key]) for key in before)
        for add in network.encoder.prior.adds:
            add.weight.normal_(0, 0.1)
        assert all((network(image)[key] - before[key]).abs().max() > 1e-3 for key in before)


def test_a_prepared_network_with_a_prior_gives_the_same_without_its_norms():
    network = build(WITH).eval()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 1.5)
        for add in network.encoder.prior.adds:
            add.weight.normal_(0, 0.1)
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    prepared = prepare_for_inference(network)
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        plain, fast = network(image), prepared(image)
    for key, value in plain.items():
        torch.testing.assert_close(fast[key], value, atol=1e-4 * max(1, value.abs().max().item()), rtol=1e-4)
    assert len([part for part in prepared.modules() if isinstance(part, nn.BatchNorm2d)]) == 1
    assert all(torch.equal(value, kept[key]) for key, value in network.state_dict().items())


def test_batch_statistics_over_all_devices_leave_weights_and_activations_as_they_are():
    network = build(WITH).eval()
    with torch.no_grad():
        for add in network.encoder.prior.adds:
            add.weight.normal_(0, 0.1)
    image = torch.randn(1, 3, 64, 96)
    activations = sum(isinstance(part, nn.ReLU6) for part in network.modules())
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())
    with torch.inference_mode():
        before = network(image)
        converted = with_common_statistics(network)
        after = converted(image)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert sum(isinstance(part, nn.SyncBatchNorm) for part in converted.modules()) == norms
    assert sum(isinstance(part, nn.ReLU6) for part in converted.modules()) == activations > 15


@pytest.mark.parametrize("kind", ["timm", "safetensors", "EfficientNet-PyTorch"])
def test_the_prior_starts_with_the_weights_of_a_file(kind, tmp_path):
    cnn, path = taught(), tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind == "safetensors":
        save_file(cnn.state_dict(), path)
    else:
        torch.save(cnn.state_dict() if kind == "timm" else as_efficientnet_pytorch(cnn), path)
    config = TrainConfig(model="cellvta-nano", data={"x": 1.0}, steps=1, prior=path)
    own = start_network(WITH, config).encoder.prior.cnn.state_dict()
    found = cnn.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in own.items())
    assert len(own) > 150


def test_weights_that_are_no_priors_are_refused(tmp_path):
    prior = TaughtPrior("efficientnet_lite0", (8, 8, 8))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match="holds no CNN that wsipipe knows; expected is efficientnet_lite0"):
        load_prior(prior, tmp_path / "x.pth")
    torch.save({"_conv_stem.weight": torch.zeros(2)}, tmp_path / "y.pth")
    with pytest.raises(ModelError, match="tensors are missing"):
        load_prior(prior, tmp_path / "y.pth")
    with pytest.raises(ModelError, match="is no file"):
        load_prior(prior, tmp_path / "z.pth")
    (tmp_path / "w.pth").touch()
    config = TrainConfig(model="cellvta-nano", data={"x": 1.0}, steps=1, prior=tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="cellvta-nano has no CNN that could start with"):
        start_network(PLAIN, config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"prior": "hf-hub:some/one"}, "is no CNN for a prior"), ({"cell_px": 3}, "not at all of")],
)
def test_a_prior_that_cannot_be_is_refused(settings, said):
    spec = replace(WITH, settings={**WITH.settings, **settings})
    with pytest.raises(ModelError, match=said):
        build(spec)
