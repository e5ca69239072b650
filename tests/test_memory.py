"""From a budget and sizes to how much is done at once."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from wsipipe.config import MapsConfig
from wsipipe.errors import ConfigError
from wsipipe.memory import (
    MB,
    WITH_NETWORK,
    WITHOUT_NETWORK,
    Choice,
    Needs,
    choose,
    maps_needs,
    nuclei_needs,
    parse_memory,
    shown,
)
from wsipipe.model.registry import SPECS
from wsipipe.model.spec import tile_geometry
from wsipipe.tiles import TileGeometry

NEEDS = Needs(fixed=1000 * MB, tile=10 * MB, network_tile=100 * MB, read_tile=10 * MB, reader=20 * MB, worker=200 * MB)
MOST = Choice(batch_size=4, networks=2, readers=2, workers=3)
GEOMETRY = tile_geometry(SPECS["cellvta-nano"], MapsConfig())


@pytest.mark.parametrize(
    ("budget_mb", "choice"),
    [
        (2560, Choice(4, 2, 2, 3)),  # all that is asked for, to the last byte
        (9000, Choice(4, 2, 2, 3)),  # never more
        (2559, Choice(4, 2, 2, 2)),  # workers first
        (2160, Choice(4, 2, 2, 1)),
        (2159, Choice(4, 2, 1, 1)),  # then readers
        (2099, Choice(4, 1, 2, 2)),  # then networks, with as many readers and workers as there is room for
        (1759, Choice(4, 1, 1, 1)),
        (1699, Choice(2, 2, 1, 1)),  # then the batch
        (1460, Choice(2, 1, 1, 1)),
        (1340, Choice(1, 1, 1, 1)),
    ],
)
def test_workers_are_lowered_first_then_readers_then_networks_the_batch_last(budget_mb, choice):
    assert choose(budget_mb * MB, NEEDS, MOST) == choice


def test_too_little_is_refused_with_what_would_do():
    with pytest.raises(ConfigError, match=r"--memory 1339MB is too little: with batches of 1, .* 1350MB; give that"):
        choose(1339 * MB, NEEDS, MOST)
    assert choose(parse_memory("1350MB"), NEEDS, MOST) == Choice(1, 1, 1, 1)


def test_a_batch_that_was_given_is_refused_not_lowered():
    assert choose(1700 * MB, NEEDS, MOST, batch_is_given=True) == Choice(4, 1, 1, 1)
    with pytest.raises(ConfigError, match=r"batches of 4, .* workers: 1 this takes 1700MB.*smaller --batch-size"):
        choose(1600 * MB, NEEDS, MOST, batch_is_given=True)


@given(
    st.integers(1, 4000),
    st.builds(Needs, *[st.integers(0, 500 * MB)] * 7),
    st.builds(Choice, st.integers(0, 64), st.integers(0, 4), st.integers(0, 8), st.integers(0, 64)),
    st.booleans(),
)
def test_a_choice_fits_is_no_more_than_asked_for_and_a_refusal_names_what_fits(budget_mb, needs, most, given_batch):
    budget = budget_mb * MB
    try:
        choice = choose(budget, needs, most, batch_is_given=given_batch)
    except ConfigError as error:
        named = parse_memory(str(error).split("this takes ")[1].split(";")[0])
        assert named > budget
        choice, budget = choose(named, needs, most, batch_is_given=given_batch), named
    assert needs.at(choice) <= budget
    for name in ("batch_size", "networks", "readers", "workers"):
        assert min(1, getattr(most, name)) <= getattr(choice, name) <= getattr(most, name)
    if given_batch:
        assert choice.batch_size == most.batch_size


@given(st.integers(1, 4000), st.integers(0, 1000))
def test_more_memory_is_never_a_smaller_batch(budget_mb, more_mb):
    def batch(amount_mb):
        try:
            return choose(amount_mb * MB, NEEDS, Choice(64, 4, 8, 8)).batch_size
        except ConfigError:
            return 0

    assert batch(budget_mb) <= batch(budget_mb + more_mb)


@pytest.mark.parametrize("text", ["3GB", "3 GB", "3000MB", "3000000000"])
def test_amounts_are_read_in_any_unit(text):
    assert parse_memory(text) == 3 * 10**9


@pytest.mark.parametrize("text", ["", "much", "-3GB", "nan", "inf", "1e999GB", "3 parsecs", "1000", "0"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ConfigError, match="give it as 3GB"):
        parse_memory(text)


@given(st.integers(1, 10**5))
def test_an_amount_is_shown_as_it_is_read(steps):
    amount = steps * 50 * MB
    assert parse_memory(shown(amount)) == amount


def test_needs_grow_with_what_they_are_for():
    network = 90 * MB
    small = maps_needs(TileGeometry(512, 64, 2), 5, network // 4, 0)
    large = maps_needs(GEOMETRY, 5, network, 0)
    assert large.network_tile / small.network_tile == pytest.approx(4, rel=0.2)
    assert large.at(Choice(2, 1, 1)) - large.at(Choice(1, 1, 1)) > network
    assert large.at(Choice(1, 2, 1)) - large.at(Choice(1, 1, 1)) > network
    assert maps_needs(GEOMETRY, 20, network, 0).tile > large.tile
    assert maps_needs(GEOMETRY, 5, network, MB).fixed == large.fixed + MB
    halo = nuclei_needs(GEOMETRY, 5, 256, 0)
    assert halo.worker > nuclei_needs(GEOMETRY, 5, 128, 0).worker
    assert nuclei_needs(GEOMETRY, 5, 128, 0, processes=True).worker > nuclei_needs(GEOMETRY, 5, 128, 0).worker
    assert nuclei_needs(GEOMETRY, 5, 128, 100_000).fixed > halo.fixed


def test_what_the_cluster_profile_grants_is_enough_for_all_its_threads():
    profile = yaml.safe_load((Path(__file__).parents[1] / "workflows/profiles/slurm/config.yaml").read_text())
    threads = profile["set-threads"]
    granted = {stage: _least_mb(profile["set-resources"][stage]["mem_mb"]) * MB for stage in ("maps", "nuclei")}
    nuclei = nuclei_needs(GEOMETRY, 5, 128, 100_000) + Needs(WITHOUT_NETWORK)
    assert choose(granted["nuclei"], nuclei, Choice(workers=threads["nuclei"])).workers == threads["nuclei"]
    maps = maps_needs(GEOMETRY, 5, 0, 0) + Needs(WITH_NETWORK)
    most = Choice(batch_size=8, networks=1, readers=threads["maps"])
    assert choose(granted["maps"], maps, most) == most


def _least_mb(expression: str) -> int:
    """What a profile's expression gives on the first attempt for a slide of no size."""
    assert expression.startswith("int(min(8000 + ")
    return 8000
