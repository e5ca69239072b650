"""Geometry that moves image and masks alike; colour that changes the image and nothing else."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from wsipipe.errors import ConfigError
from wsipipe.training.augment import RECIPES, Recipe, load_recipe, plain_recipe
from wsipipe.training.colour import Blur, BoxBlur, Coarsen, Hue, Jitter, Jpeg, Noise, Stain, Superpixels, Tone, ZoomBlur
from wsipipe.training.config import load_experiment
from wsipipe.training.spatial import Geometry, SourceField, draw_field

STEPS = [
    Stain(),
    Tone(),
    Hue(),
    Jitter(),
    Blur(),
    BoxBlur(),
    Noise(),
    Jpeg(),
    Coarsen(),
    Superpixels(),
    ZoomBlur(factor=(1.04, 1.05)),
]
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture
def stained() -> np.ndarray:
    """Something like H&E: pink ground with a fine pattern, purple discs, a white hole."""
    rng = np.random.default_rng(0)
    image = np.full((120, 160, 3), (225, 160, 195), np.uint8)
    for x, y in rng.integers(10, 110, (30, 2)):
        cv2.circle(image, (int(x), int(y)), 6, (95, 60, 140), -1, cv2.LINE_AA)
    cv2.circle(image, (130, 30), 20, (250, 250, 250), -1)
    return cv2.add(image, rng.integers(0, 6, image.shape, dtype=np.uint8))


def disc(
    height: int = 200, width: int = 260, x: int = 120, y: int = 90, radius: int = 30
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[:height, :width]
    mask = np.where((rows - y) ** 2 + (columns - x) ** 2 <= radius**2, 7, 0).astype(np.uint16)
    return np.repeat((mask > 0)[..., None].astype(np.uint8) * 255, 3, axis=2), mask


@settings(deadline=None, max_examples=60)
@given(seeds, st.sampled_from(["default", "published", "bent"]))
def test_image_and_mask_move_together(seed, name):
    bent = Geometry(
        (0.2, 0.4), (0.2, 0.4), rotate_p=1, rotate_degrees=45, corner_p=1, corner_px=12, wave_p=1, wave_px=3
    )
    geometry = bent if name == "bent" else RECIPES[name].geometry
    image, mask = disc()
    field = draw_field(geometry, mask.shape, 0.25, 96, np.random.default_rng(seed))
    bright, inside = field.read_image(image)[..., 0], (field.read_mask(mask) == 7).astype(np.uint8)
    kernel = np.ones((5, 5), np.uint8)
    rim = np.s_[2:-2, 2:-2]  # where the kernel sees all it needs
    assert (bright[rim][cv2.erode(inside, kernel)[rim] > 0] > 200).all()
    assert (bright[rim][cv2.dilate(inside, kernel)[rim] == 0] < 55).all()


@settings(deadline=None, max_examples=60)
@given(seeds, st.sampled_from(["uint8", "uint16", "int32", "bool"]))
def test_a_mask_keeps_its_values_and_dtype(seed, dtype):
    mask = np.random.default_rng(0).choice([0, 1, 3, 200], (80, 90)).astype(dtype)
    field = draw_field(RECIPES["default"].geometry, mask.shape, 0.25, 64, np.random.default_rng(seed))
    crop = field.read_mask(mask)
    assert crop.shape == (64, 64)
    assert crop.dtype == mask.dtype
    assert set(np.unique(crop)) <= set(np.unique(mask))


@settings(deadline=None)
@given(seeds, st.integers(40, 300), st.integers(40, 300), st.floats(0.1, 1.0), st.booleans())
def test_a_crop_never_looks_beyond_the_image(seed, height, width, mpp, rotated):
    geometry = Geometry((0.2, 0.5), (0.2, 0.5), rotate_p=float(rotated), rotate_degrees=45)
    field = draw_field(geometry, (height, width), mpp, 64, np.random.default_rng(seed))
    assert field.x.min() >= -0.501
    assert field.y.min() >= -0.501
    assert field.x.max() <= width - 0.499
    assert field.y.max() <= height - 0.499


def test_a_crop_at_half_the_resolution_shows_a_quarter_of_the_area_in_pixels():
    _, mask = disc(radius=40)
    field = draw_field(plain_recipe(0.5).geometry, mask.shape, 0.25, 100, np.random.default_rng(0))
    assert (field.x[0, 1] - field.x[0, 0]) == pytest.approx(2)
    assert field.shrink == pytest.approx(2)
    assert (field.read_mask(mask) > 0).sum() == pytest.approx((mask > 0).sum() / 4, rel=0.05)


def test_a_field_on_the_pixels_reads_them_unchanged(stained):
    x, y = np.meshgrid(np.arange(30, 80, dtype=np.float32), np.arange(10, 60, dtype=np.float32))
    field = SourceField(x, y, 1.0)
    np.testing.assert_array_equal(field.read_image(stained), stained[10:60, 30:80])
    np.testing.assert_array_equal(field.read_mask(stained[..., 0]), stained[10:60, 30:80, 0])


def test_beyond_the_border_image_and_mask_are_the_same_mirror(stained):
    x, y = np.meshgrid(np.arange(-20, 40, dtype=np.float32), np.arange(90, 150, dtype=np.float32))
    field = SourceField(x, y, 1.0)
    np.testing.assert_array_equal(field.read_image(stained)[..., 1], field.read_mask(stained[..., 1]))
    np.testing.assert_array_equal(field.read_mask(stained[..., 1])[:30, 0], stained[90:120, 20, 1])


def test_a_shrunk_image_is_smoothed_and_does_not_alias():
    stripes = np.zeros((100, 100, 3), np.uint8)
    stripes[:, ::2] = 255
    x, y = np.meshgrid(np.arange(10, 90, 2, dtype=np.float32), np.arange(10, 90, 2, dtype=np.float32))
    assert abs(SourceField(x, y, 2.0).read_image(stripes).mean() - 127.5) < 30
    assert SourceField(x, y, 1.0).read_image(stripes).mean() == 255  # what smoothing is for


def test_quarter_turns_and_flips_reach_all_eight_views():
    geometry = replace(plain_recipe(1.0).geometry, quarter_turn_p=1, flip_p=0.5)
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4)
    views = {
        draw_field(geometry, (4, 4), 1.0, 4, np.random.default_rng(seed)).read_mask(mask).tobytes()
        for seed in range(200)
    }
    turned = [np.rot90(mask, k) for k in range(4)]
    assert views == {view.tobytes() for m in turned for view in (m, m[:, ::-1])}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.kind)
def test_a_colour_step_changes_the_image_alike_for_the_same_seed(step, stained):
    before = stained.copy()
    changed = step.apply(stained, np.random.default_rng(3))
    np.testing.assert_array_equal(stained, before)
    assert changed.shape == stained.shape
    assert changed.dtype == np.uint8
    assert (changed != stained).mean() > 0.02
    assert np.abs(changed.astype(float) - stained).mean() < 60
    np.testing.assert_array_equal(step.apply(stained, np.random.default_rng(3)), changed)
    if step.kind not in ("blur", "zoom_blur"):  # draws a kernel or a step, which may well be the same to the eye
        assert (step.apply(stained, np.random.default_rng(4)) != changed).any()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.kind)
@pytest.mark.parametrize("level", [0, 255])
def test_a_colour_step_neither_fails_nor_wraps_on_a_flat_image(step, level):
    flat = np.full((64, 64, 3), level, np.uint8)
    for seed in range(5):
        assert np.abs(step.apply(flat, np.random.default_rng(seed)).astype(float) - level).max() < 110


def test_stain_leaves_bare_glass_white():
    white = np.full((8, 8, 3), 255, np.uint8)
    np.testing.assert_array_equal(Stain(scale=0.5, shift=0.3).apply(white, np.random.default_rng(0)), white)


def test_scaled_dyes_move_every_channel_of_a_nucleus():
    nucleus = np.full((8, 8, 3), (95, 60, 140), np.uint8)
    draws = [Stain(scale=0.3, shift=0).apply(nucleus, np.random.default_rng(seed))[0, 0] for seed in range(40)]
    assert np.ptp([d[0] for d in draws]) > 30
    assert np.all(np.ptp(draws, axis=0) > 10)


@pytest.mark.parametrize(
    "step",
    [
        Stain(scale=0, shift=0),
        Tone(brightness=0, contrast=0, gamma=0, balance=0),
        Hue(degrees=0, saturation=0),
        Jitter(brightness=0, contrast=0, saturation=0, degrees=0),
    ],
)
def test_a_colour_step_of_no_strength_gives_the_image_back(step, stained):
    changed = step.apply(stained, np.random.default_rng(0))
    assert np.abs(changed.astype(int) - stained).max() <= 1


def test_hue_leaves_grey_grey():
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    changed = Hue(degrees=40, saturation=0.5).apply(grey, np.random.default_rng(0)).astype(int)
    assert np.abs(changed - grey).max() <= 1


def test_noise_has_the_variance_it_says():
    grey = np.full((256, 256, 3), 128, np.uint8)
    noise = Noise(variance=(64, 64)).apply(grey, np.random.default_rng(0)).astype(float) - 128
    assert noise.var() == pytest.approx(64, rel=0.03)
    assert abs(noise.mean()) < 0.1


def test_jpeg_keeps_the_colours_in_their_order(stained):
    changed = Jpeg(quality=(95, 95)).apply(stained, np.random.default_rng(0))
    assert np.abs(changed.astype(int) - stained).mean() < 6


def test_steps_are_taken_with_their_probability(stained):
    always = Recipe(RECIPES["default"].geometry, (Noise(p=1.0),))
    never = Recipe(RECIPES["default"].geometry, (Noise(p=0.0),))
    assert (always.recolour(stained, np.random.default_rng(0)) != stained).any()
    assert never.recolour(stained, np.random.default_rng(0)) is stained


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_yaml(name):
    written = yaml.safe_dump(yaml.safe_load(repr_as_yaml(RECIPES[name])))
    assert load_recipe(yaml.safe_load(written)) == load_recipe(name) == RECIPES[name]


def repr_as_yaml(recipe: Recipe) -> str:
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(asdict(recipe)))


def test_the_published_recipe_has_the_published_effects(stained):
    """Shares and strengths as read back from albumentations 1.3.0 with the settings of the published runs."""
    recipe = RECIPES["published"]
    steps = {step.kind: step for step in recipe.colour}
    assert {kind: step.p for kind, step in steps.items()} == {
        "box_blur": 0.2, "noise": 0.5, "jitter": 0.2, "superpixels": 0.1, "zoom_blur": 0.1,
    }  # fmt: skip
    assert steps["box_blur"].sides_px == (3, 5, 7, 9)
    assert steps["noise"].variance == (0, 10)
    assert (steps["jitter"].brightness, steps["jitter"].contrast) == (0.25, 0.25)
    assert (steps["jitter"].degrees, steps["jitter"].saturation) == (360 * 0.05, 0.1)
    assert (steps["superpixels"].share, steps["superpixels"].segments, steps["superpixels"].max_px) == (0.1, 200, 128)
    assert (steps["zoom_blur"].factor, steps["zoom_blur"].step) == ((1.0, 1.05), (0.01, 0.03))

    colours = Recipe(recipe.geometry, (steps["jitter"],))
    drawn = [colours.recolour(stained, np.random.default_rng(seed)) is not stained for seed in range(1000)]
    assert np.mean(drawn) == pytest.approx(0.2, abs=0.03)

    fields = [draw_field(recipe.geometry, (16, 16), 0.25, 16, np.random.default_rng(seed)) for seed in range(2000)]
    x, y = np.meshgrid(np.arange(16), np.arange(16))
    as_it_is = np.mean([np.allclose(f.x, x, atol=1e-3) and np.allclose(f.y, y, atol=1e-3) for f in fields])
    # a quarter turn of 0 to 3 by 0.2, each flip by 0.2, a crop by 0.2, three moved points by 0.2
    assert as_it_is == pytest.approx(0.85 * 0.8**4, abs=0.035)
    whole = [f for f in fields if f.shrink == 1]
    assert len(whole) / len(fields) == pytest.approx(0.8, abs=0.03)
    assert min(f.shrink for f in fields) == pytest.approx(0.5, abs=0.01)
    # the three points of the affine map move by up to 15 px of 256, so a corner of the crop by a few tens at most
    large = [draw_field(recipe.geometry, (256, 256), 0.25, 256, np.random.default_rng(seed)) for seed in range(60)]
    out = [max(0, -f.x.min(), f.x.max() - 255, -f.y.min(), f.y.max() - 255) for f in large]
    assert 0 < max(out) < 60


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'fancy'.*default, published"):
        load_recipe("fancy")


def test_every_fault_of_a_recipe_is_named():
    with pytest.raises(ConfigError, match=r"geometry\.turn.*colour\.0\.stain\.strength"):
        load_recipe(
            {
                "geometry": {"near_mpp": [0.2, 0.3], "far_mpp": [0.2, 0.3], "turn": 1},
                "colour": [{"kind": "stain", "strength": 2}],
            }
        )


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"geometry": {"flip_p": 50}}, "geometry.flip_p: input should be less than or equal to 1"),
        ({"geometry": {"zoom": [0, 0]}}, "geometry.zoom: must be two numbers from 0.001 on, the lower first"),
        ({"geometry": {"near_mpp": [0.3, 0.2]}}, "geometry.near_mpp: must be two numbers"),
        ({"geometry": {"wave_px": -1}}, "geometry.wave_px: input should be greater than or equal to 0"),
        ({"kind": "stain", "scale": float("inf")}, "colour.0.stain.scale: input should be a finite number"),
        ({"kind": "tone", "p": -0.1}, "colour.0.tone.p: input should be greater than or equal to 0"),
        ({"kind": "blur", "sigma_px": [0, 1]}, "colour.0.blur.sigma_px: must be two numbers"),
        ({"kind": "box_blur", "sides_px": []}, "colour.0.box_blur.sides_px: must be one or more odd numbers"),
        ({"kind": "box_blur", "sides_px": [3, 4]}, "colour.0.box_blur.sides_px: must be one or more odd numbers"),
        ({"kind": "noise", "variance": [-1, 4]}, "colour.0.noise.variance: must be two numbers"),
        ({"kind": "jpeg", "quality": [92, 35]}, "colour.0.jpeg.quality: must be two numbers from 1 on"),
        ({"kind": "jpeg", "quality": [92, 135]}, "colour.0.jpeg.quality.1: input should be less than or equal to 100"),
        ({"kind": "coarsen", "factor": [float("nan"), 2]}, "colour.0.coarsen.factor: must be two numbers"),
        ({"kind": "superpixels", "segments": 0}, "colour.0.superpixels.segments: input should be greater"),
        ({"kind": "zoom_blur", "step": [0, 0]}, "colour.0.zoom_blur.step: must be two numbers"),
    ],
)
def test_numbers_that_no_recipe_can_have_are_refused_by_name(value, fault):
    written = value if "geometry" in value else {"geometry": {}, "colour": [value]}
    with pytest.raises(ConfigError, match=re.escape(fault)):
        load_recipe(written)


def test_an_image_is_never_reduced_to_nothing(stained):
    assert Coarsen(factor=(1e4, 1e4)).apply(stained, np.random.default_rng(0)).shape == stained.shape


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs/experiments/default").glob("*.yaml")))
def test_the_recipes_of_the_shipped_models_can_be_read(path):
    assert load_recipe(load_experiment(path).recipe).colour
