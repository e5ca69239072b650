"""Pixels to tensor, network output to maps."""

import numpy as np
import pytest
import torch

from wsipipe.maps import to_input, to_maps

CPU = torch.device("cpu")


def outputs(size: int = 12, types: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"nuclei": 2, "offsets": 2, "types": types}
    return {name: 3 * torch.randn((3, channels, size, size), generator=generator) for name, channels in shapes.items()}


def test_pixels_are_normalised_channel_by_channel() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    found = to_input(torch.from_numpy(rgb), mean, std, device=CPU, dtype=torch.float32)
    assert found.shape == (2, 3, 5, 7)
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.numpy(), np.moveaxis((rgb / 255 - mean) / std, -1, 1), atol=1e-5)
    assert to_input(torch.from_numpy(rgb), mean, std, device=CPU, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_maps_are_the_rounded_probabilities_and_offsets_of_the_core() -> None:
    raw = outputs()
    maps = to_maps(raw, halo_px=2)
    core = {name: values[..., 2:10, 2:10].double().numpy() for name, values in raw.items()}

    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    for found, exact, dtype in (
        (maps.nuclei, 255 * softmax(core["nuclei"])[:, 1], torch.uint8),
        (maps.offsets, 127 * np.clip(core["offsets"], -1, 1), torch.int8),
        (maps.types, 255 * softmax(core["types"]), torch.uint8),
    ):
        assert found.dtype == dtype
        assert found.shape == exact.shape
        assert np.abs(found.numpy() - exact).max() <= 0.501  # rounded to the nearest
    assert maps.finite.all()


def test_the_ends_of_the_scale_are_reached() -> None:
    raw = {
        "nuclei": torch.tensor([[-99.0, 99.0], [99.0, -99.0]]).reshape(1, 2, 1, 2),
        "offsets": torch.tensor([[9.0, -9.0], [1.0, 0.0]]).reshape(1, 2, 1, 2),
    }
    maps = to_maps(raw, halo_px=0)
    assert maps.nuclei.tolist() == [[[255, 0]]]
    assert maps.offsets.tolist() == [[[[127, -127]], [[127, 0]]]]


def test_without_types_all_is_background() -> None:
    raw = outputs()
    del raw["types"]
    types = to_maps(raw, halo_px=1).types
    assert types.shape == (3, 1, 10, 10)
    assert (types == 255).all()


@pytest.mark.parametrize("name", ["nuclei", "offsets", "types"])
def test_a_tile_that_is_no_number_is_told_and_the_others_are_not_blamed(name: str) -> None:
    raw = outputs()
    raw[name][1, 0, 5, 5] = torch.nan
    assert to_maps(raw, halo_px=2).finite.tolist() == [True, False, True]
    assert to_maps(raw, halo_px=6).finite.all()  # the halo is no part of the answer


def test_half_precision_is_counted_in_single() -> None:
    raw = {name: values.to(torch.bfloat16) for name, values in outputs().items()}
    single = {name: values.float() for name, values in raw.items()}
    assert torch.equal(to_maps(raw, 2).types, to_maps(single, 2).types)
