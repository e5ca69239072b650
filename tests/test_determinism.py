"""The same slide and settings give the same nuclei, however the work is cut: with `cellvta-nano`."""

import geopandas
import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from wsipipe.config import Config
from wsipipe.demo import make_demo_slide
from wsipipe.folder import ResultFolder
from wsipipe.model.weights import DEFAULT_MODEL, load_model
from wsipipe.slide import open_slide
from wsipipe.stages.segment import segment
from wsipipe.store import MapStore

# How many tiles a batch has and how many threads a sum is split over show in the last bits of float32: a value of the
# maps that lies at the edge between two of 256 levels may fall to either side, by one level.
ONE_LEVEL_SHARE = 1e-3  # of the values
NUCLEI_SHARE = 0.01  # of the nuclei may differ for that


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results by how they were made."""
    root = tmp_path_factory.mktemp("runs")
    path = make_demo_slide(root / "demo.svs", 256)
    threads = torch.get_num_threads()
    for name, count, options in [
        ("once", 2, {"batch_size": 1}),
        ("twice", 2, {"batch_size": 1}),
        ("batches", 2, {"batch_size": 3}),
        ("one thread", 1, {"batch_size": 1, "workers": 1}),
    ]:
        torch.set_num_threads(count)
        with open_slide(path) as slide:
            folder = ResultFolder(root / name)
            segment(slide, load_model(DEFAULT_MODEL), folder, Config(), device="cpu", precision="fp32", **options)
    torch.set_num_threads(threads)
    return root


@pytest.mark.parametrize("name", ["nuclei.parquet", "nuclei.geojson.gz", "overlay.png", "tissue.png"])
def test_the_same_command_gives_the_same_bytes(runs, name):
    assert (runs / "once" / name).read_bytes() == (runs / "twice" / name).read_bytes()


@pytest.mark.parametrize("other", ["twice", "batches", "one thread"])
def test_maps_differ_by_one_level_at_most_and_hardly_anywhere(runs, other):
    stores = [MapStore.open(runs / name / "maps.zarr") for name in ("once", other)]
    one, two = (store.read(store.meta.grid.box) for store in stores)
    for a, b in ((one.nuclei, two.nuclei), (one.offsets, two.offsets), (one.types, two.types)):
        apart = np.abs(a.astype(int) - b.astype(int))
        assert apart.max() <= 1
        assert np.count_nonzero(apart) <= ONE_LEVEL_SHARE * apart.size


@pytest.mark.parametrize("other", ["twice", "batches", "one thread"])
def test_nuclei_are_the_same(runs, other):
    tables = [geopandas.read_parquet(runs / name / "nuclei.parquet") for name in ("once", other)]
    places = [table[["x_px0", "y_px0"]].to_numpy() for table in tables]
    assert len(places[0]) > 20
    assert abs(len(places[0]) - len(places[1])) <= NUCLEI_SHARE * len(places[0])
    far, nearest = cKDTree(places[1]).query(places[0])
    same = (far < 0.5) & (tables[0].type.to_numpy() == tables[1].type.to_numpy()[nearest])
    assert np.count_nonzero(~same) <= NUCLEI_SHARE * len(same)
