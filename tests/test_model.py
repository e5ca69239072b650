"""Networks: equal to the reference implementation, and every registered one sound."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from wsipipe.errors import ModelError
from wsipipe.model.attention import sample_levels
from wsipipe.model.cellvta import CellVTA
from wsipipe.model.registry import SPECS, build
from wsipipe.model.spec import ModelSpec
from wsipipe.model.upstream import cellvta_key
from wsipipe.model.weights import find_checkpoint, load_model, save_checkpoint

PARITY = Path(__file__).parent / "data" / "parity"
SMALL = [name for name, spec in SPECS.items() if spec.settings.get("dim", 1024) <= 384]


def deterministic_weights():
    """The module that makes every weight from its upstream name."""
    found = importlib.util.spec_from_file_location("detweights", PARITY / "detweights.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def reference_network() -> CellVTA:
    """The small network whose outputs the reference implementation gave, with the same weights."""
    meta = json.loads((PARITY / "model_meta.json").read_text())
    network = CellVTA(
        classes=6,
        decoder_widths=(64, 128, 256, 312),
        dim=96,
        depth=8,
        heads=4,
        stages=((0, 1), (2, 3), (4, 5), (6, 7)),
        prior_width=16,
        attention_heads=4,
        tissue_classes=19,
    )
    make = deterministic_weights().tensor
    shapes = meta["state_dict_shapes"]["vta_s"]
    network.load_state_dict({cellvta_key(key): torch.from_numpy(make(key, shape)) for key, shape in shapes.items()})
    return network.eval()


@pytest.mark.parity
@pytest.mark.parametrize("size", ["64x64", "64x96"])
def test_cellvta_gives_what_the_reference_gives(size):
    expected = np.load(PARITY / f"model_vta_s_{size}.npz")
    network = reference_network()
    with torch.inference_mode():
        image = torch.from_numpy(expected["input"])
        outputs = network(image)
        coarsest = network.encoder(image)[0][3]
    for ours, theirs in {
        "nuclei": "nuclei_binary_map",
        "offsets": "hv_map",
        "types": "nuclei_type_map",
        "tissue": "tissue_types",
    }.items():
        np.testing.assert_allclose(outputs[ours], expected[f"out.{theirs}"], atol=1e-3, rtol=1e-4, err_msg=ours)
    np.testing.assert_allclose(coarsest, expected["out.tokens"], atol=1e-3, rtol=1e-4)


@pytest.mark.parity
def test_every_tensor_of_the_published_model_has_its_place():
    shapes = json.loads((PARITY / "full_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        network = build(SPECS["cellvta-uni"])
    ours = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert ours == {cellvta_key(key): shape for key, (shape, _) in shapes.items()}


@pytest.mark.parity
def test_deformable_sampling_gives_what_the_reference_operator_gives():
    case = {key: torch.from_numpy(value) for key, value in np.load(PARITY / "msda_core.npz").items()}
    sizes = tuple((int(h), int(w)) for h, w in case["shapes"])
    sampled = sample_levels(case["value"], sizes, case["sampling_locations"], case["attention_weights"])
    np.testing.assert_allclose(sampled, case["output"], atol=1e-5)


@pytest.mark.parity
def test_positions_are_resampled_as_in_the_reference():
    case = np.load(PARITY / "pos_embed_resample.npz")
    for name in case.files:
        if name.startswith("to_"):
            size = [int(side) for side in name[3:].split("x")]
            got = resample_abs_pos_embed(torch.from_numpy(case["pos_embed"]), size)
            np.testing.assert_allclose(got, case[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", SMALL)
def test_a_network_answers_at_the_size_of_its_image_and_batches_change_nothing(name):
    torch.manual_seed(0)
    network = build(SPECS[name]).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        outputs, again, single = network(image), network(image), network(image[1:])
    classes = len(SPECS[name].class_names)
    assert {key: tuple(value.shape) for key, value in outputs.items()} == {
        "nuclei": (2, 2, 64, 96),
        "offsets": (2, 2, 64, 96),
        "types": (2, classes, 64, 96),
    }
    for key, value in outputs.items():
        assert torch.equal(value, again[key])
        torch.testing.assert_close(value[1:], single[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_of_a_network_learns(name):
    torch.manual_seed(0)
    network = build(SPECS[name]).train()
    outputs = network(torch.randn(2, 3, 64, 64))
    sum(value.square().mean() for value in outputs.values()).backward()
    # Without a tissue head nobody reads the class token.
    unread = {"encoder.vit.cls_token", "encoder.vit.norm.weight", "encoder.vit.norm.bias"}
    still = {key for key, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert still == unread


def test_the_class_token_takes_part_only_where_the_paper_sends_it_through():
    image = torch.randn(2, 3, 32, 32)
    settings = {"dim": 32, "depth": 4, "heads": 2, "stages": [(i, i) for i in range(4)], "attention_heads": 2}
    tissue = {}
    for token in ("bypass", "attend"):
        torch.manual_seed(0)
        network = CellVTA(
            classes=2, decoder_widths=(8, 8, 8, 8), prior_width=8, tissue_classes=3, class_token=token, **settings
        ).eval()
        with torch.inference_mode():
            tissue[token] = network(image)["tissue"]
    torch.testing.assert_close(tissue["bypass"][0], tissue["bypass"][1], atol=0, rtol=0)
    assert not torch.equal(tissue["attend"][0], tissue["attend"][1])


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="multiples of 16 px, not 64 x 72"):
        build(SPECS["cellvta-nano"])(torch.zeros(1, 3, 64, 72))


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    torch.manual_seed(0)
    network, path = build(SPECS["cellvta-nano"]).eval(), tmp_path / "nano.safetensors"
    save_checkpoint(path, network, SPECS["cellvta-nano"], {"step": 3})
    loaded, spec, digest = load_model(path)
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(image)["types"], network(image)["types"])
    assert spec == SPECS["cellvta-nano"]
    assert len(digest) == 64
    assert list(tmp_path.iterdir()) == [path]


def _saved(path: Path, change) -> Path:
    network = build(SPECS["cellvta-nano"])
    change(network)
    save_checkpoint(path, network, SPECS["cellvta-nano"])
    return path


def _spoil(network):
    with torch.no_grad():
        network.encoder.level_embed[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_spoil, "encoder.level_embed holds values that are not finite"),
        (lambda n: n.register_buffer("spare", torch.zeros(1)), r"0 tensors are missing .* 1 do not belong \(spare\)"),
        (lambda n: delattr(n.encoder, "level_embed"), r"1 tensors are missing \(encoder.level_embed\)"),
        (lambda n: setattr(n.encoder, "level_embed", torch.nn.Parameter(torch.zeros(2, 64))), r"\(2, 64\), expected"),
    ],
)
def test_weights_that_do_not_fit_are_refused_saying_what_was_found(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        load_model(_saved(tmp_path / "x.safetensors", change))


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    whole = _saved(tmp_path / "whole.safetensors", lambda network: None).read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    text = tmp_path / "text.safetensors"
    text.write_text("no weights at all")
    for path in (cut, text):
        with pytest.raises(ModelError, match="not a readable safetensors file"):
            load_model(path)


def test_an_unknown_model_is_refused_with_those_that_ship():
    with pytest.raises(ModelError, match=r"'nobody' is neither a shipped model \(.*\) nor a file"):
        find_checkpoint("nobody")
    with pytest.raises(ModelError, match="the weights of cellvta-uni do not ship"):
        find_checkpoint("cellvta-uni")


def test_a_description_of_another_version_is_refused():
    text = SPECS["cellvta-nano"].to_json()
    assert ModelSpec.from_json(text) == SPECS["cellvta-nano"]
    with pytest.raises(ModelError, match="version 99"):
        ModelSpec.from_json(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(ModelError, match="cannot be read"):
        ModelSpec.from_json("[]")


def test_an_impossible_network_is_refused():
    with pytest.raises(ModelError, match="architecture 'resnet' is unknown"):
        build(replace(SPECS["cellvta-nano"], architecture="resnet"))
    with pytest.raises(ModelError, match="its settings do not make a cellvta"):
        build(replace(SPECS["cellvta-nano"], settings={"dim": 64, "depth": 5, "heads": 4}))
