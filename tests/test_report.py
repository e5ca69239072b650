"""report.html: whole, self-contained, and with the figures that stand in the table."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
import shapely
from made_nuclei import CLASSES, made_meta, made_nuclei
from scipy import ndimage

from wsipipe.config import TissueConfig
from wsipipe.errors import StoreError
from wsipipe.focus import BLURRED, Focus, measure_focus
from wsipipe.folder import ResultFolder
from wsipipe.geometry import Box, Grid
from wsipipe.report import Facts, Sizes, checks, draw_report
from wsipipe.slide import open_slide
from wsipipe.stages.report import make_report
from wsipipe.stages.tissue import find_tissue
from wsipipe.tissue import TissueMask

FACTS = Facts("vendor", Focus((0.3, 0.35)), settings={"nuclei": {"min_area_um2": 6.0}}, seconds={"maps": 200.0})


def everywhere(width_px0: int, height_px0: int) -> TissueMask:
    grid = Grid.over(width_px0, height_px0, 0.25, 0.25, 8.0)
    return TissueMask(np.ones(grid.box.shape, bool), grid)


def noise(box: Box, grid: Grid) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (*box.shape, 3), np.uint8)


def report(n: int = 300, width: int = 4000, height: int = 3000, facts: Facts = FACTS, **changes) -> str:
    nuclei = made_nuclei(np.random.default_rng(0).uniform(0, (width, height), (n, 2)).round(1))
    counts = {name: nuclei["type"].to_pylist().count(name) for name in CLASSES[1:]}
    meta = replace(made_meta(width, height), counts=counts, **changes)
    return draw_report(meta, everywhere(width, height), lambda: [nuclei], noise, facts)


class Links(HTMLParser):
    """What a page would fetch, and whether its elements are closed in order."""

    OPEN = ("tr", "td", "th")  # HTML closes these by itself
    VOID = ("meta", "link", "img", "input", "image", "rect", "path", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.opened: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            str(value) for name, value in attributes if name in ("src", "href", "xlink:href") and tag != "a"
        ]
        if tag not in self.VOID + self.OPEN:
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID + self.OPEN:
            assert self.opened.pop() == tag


def test_the_page_is_self_contained_and_well_formed():
    page = report()
    links = Links(page)
    assert links.opened == []
    assert len(links.fetched) >= 10
    assert {link.partition(",")[0] for link in links.fetched} == {"data:", "data:image/jpeg;base64"}
    assert not re.findall(r"https?://(?!www\.w3\.org)", page.replace("http-equiv", ""))
    assert "@import" not in page
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)


def test_figures_are_those_of_the_table():
    nuclei = made_nuclei(np.random.default_rng(0).uniform(0, (4000, 3000), (300, 2)).round(1))
    page = report()
    assert "300" in re.findall(r"<dd>(.*?)</dd>", page)
    for name in CLASSES[1:]:
        areas = nuclei["area_um2"].to_numpy()[np.array(nuclei["type"].to_pylist()) == name]
        row = re.search(rf"{name}<td class=\"number\">(\d+)<td class=\"number\">([\d.]+)%.*?(\d+) µm²<td", page)
        assert row is not None
        assert int(row[1]) == len(areas)
        assert float(row[2]) == pytest.approx(100 * len(areas) / 300, abs=0.05)
        assert float(row[3]) == pytest.approx(np.median(areas), abs=1)


def test_every_outline_of_a_field_can_be_read_and_hidden():
    page = report()
    outlines = re.findall(r'<path class="t(\d)" d="(M[^"]+z)"><title>(.*?)</title>', page)
    assert len(outlines) > 20
    assert {CLASSES[int(type_id)] for type_id, _, _ in outlines} == set(CLASSES[1:])
    for type_id, path, told in outlines:
        assert re.fullmatch(rf"{CLASSES[int(type_id)]} \d+%, \d+ µm²", told)
        assert len(re.findall(r"[ML]", path)) == 12
    for type_id in (1, 2, 3):
        assert f'id="show-{type_id}"' in page
        assert f"#show-{type_id}:not(:checked)" in page


def test_nuclei_that_a_network_with_types_gave_none_are_told_too():
    nuclei = made_nuclei(np.random.default_rng(0).uniform(0, (400, 300), (30, 2)).round(1))
    types = pa.array([0, *nuclei["type_id"].to_pylist()[1:]], pa.uint8())
    nuclei = nuclei.set_column(nuclei.schema.get_field_index("type_id"), "type_id", types)
    counts = {name: types.to_pylist().count(i) for i, name in enumerate(CLASSES) if i}
    meta = replace(made_meta(400, 300), counts={**counts, "nucleus": 1})
    page = draw_report(meta, everywhere(400, 300), lambda: [nuclei], noise, FACTS)
    row = re.search(r"nucleus<td class=\"number\">(\d+)<td class=\"number\">([\d.]+)%", page)
    assert row is not None
    assert (row[1], row[2]) == ("1", "3.3")
    assert re.search(r"nucleus<td.*?µm²<td class=\"number\">-<td class=\"bars\">", page)  # it is certain of no type
    assert re.search(r'<path class="t0" d="M[^"]+z"><title>nucleus, \d+ µm²</title>', page)
    assert "1 nucleus, " in page


def test_equal_areas_make_equal_bars():
    areas = np.arange(4800) / 80 + 0.005  # forty in every half µm²
    nuclei = made_nuclei(np.random.default_rng(0).uniform(0, (4000, 3000), (4800, 2)).round(1))
    for name, values in (("area_um2", pa.array(areas, pa.float32())), ("type_id", pa.array([1] * 4800, pa.uint8()))):
        nuclei = nuclei.set_column(nuclei.schema.get_field_index(name), name, values)
    meta = replace(made_meta(4000, 3000), counts={"neoplastic": 4800})
    page = draw_report(meta, everywhere(4000, 3000), lambda: [nuclei], noise, FACTS)
    bars = [float(tall) for tall in re.findall(r"v-([\d.]+)h[\d.]+v[\d.]+z", page)]
    assert len(bars) > 20
    assert min(bars) > 0.95 * max(bars)


@pytest.mark.parametrize(("n", "size"), [(0, (4000, 3000)), (1, (16, 16)), (40, (100_000, 60)), (5, (300, 300))])
def test_slides_of_all_sizes_with_few_nuclei_or_none_have_a_page(n, size):
    page = report(n, *size)
    assert Links(page).opened == []
    assert ("No nuclei were found." in page) == (n == 0)
    assert not re.search(r"\bnan\b|\binf\b", re.sub(r'"data:[^"]*"', "", page))


def test_a_slide_without_tissue_has_a_page():
    grid = Grid.over(4000, 3000, 0.25, 0.25, 8.0)
    nothing = TissueMask(np.zeros(grid.box.shape, bool), grid)
    page = draw_report(made_meta(4000, 3000), nothing, lambda: [], noise, replace(FACTS, focus=Focus(())))
    assert "0% of the slide" in page
    assert "not measured" in page


def test_a_slide_is_named_without_harm():
    page = report(3, slide="<script>alert(1)</script> & µ.svs")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; µ.svs" in page


@pytest.mark.parametrize(
    ("changes", "facts", "looks"),
    [
        ({}, {}, set()),
        ({"qc": {"wide": 3, "small": 9}}, {}, {"Too large"}),
        ({}, {"focus": Focus((0.7, 0.6, 0.3))}, {"Focus"}),
        ({}, {"seams": {"shows": True, "density_ratio": 0.5, "density_ratio_sd": 0.01}}, {"Seams"}),
        ({}, {"seams": {"shows": False, "density_ratio": None, "density_ratio_sd": None}}, set()),
        ({}, {"dropped": 2}, {"GeoJSON"}),
    ],
)
def test_what_is_unusual_is_marked(changes, facts, looks):
    meta = replace(made_meta(4000, 3000), counts={"neoplastic": 300}, **changes)
    mask = np.zeros((94, 125), bool)
    mask[20:60, 20:60] = True
    sizes = Sizes()
    sizes.add(np.full(300, 30.0), np.full(300, 0.9))
    found = checks(meta, TissueMask(mask, Grid.over(4000, 3000, 0.25, 0.25, 8.0)), {1: sizes}, replace(FACTS, **facts))
    assert {check.name for check in found if check.verdict == "look"} == looks
    assert ("Small" in {check.name for check in found}) == ("qc" in changes)


def test_what_was_asked_for_does_not_ask_for_a_look():
    region = everywhere(4000, 3000).restricted(shapely.box(0, 0, 100, 100))
    for tissue in (region, everywhere(4000, 3000)):
        (check,) = (check for check in checks(made_meta(4000, 3000), tissue, {}, FACTS) if check.name == "Tissue")
        assert check.verdict == ""


def test_places_that_could_not_be_read_are_told_and_crossed_out_where_they_are():
    places = (Box(0, 0, 1000, 750), Box(3600, 2700, 4100, 3100))  # the second reaches beyond the slide
    page = report(facts=replace(FACTS, unread=places))
    assert "2 places" in page
    assert re.search(r"Look at: [^<]*unread", page)
    crossed = re.findall(r'<path class="unread" d="M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)', page)
    width, height = (float(n) for n in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', page).groups())
    assert [tuple(map(float, one)) for one in crossed] == [
        pytest.approx((0, 0, width / 4, height / 4), abs=1),
        pytest.approx((0.9 * width, 0.9 * height, 0.1 * width, 0.1 * height), abs=1),
    ]
    assert 'unread"' not in report()


def test_nuclei_of_an_unlikely_size_put_the_resolution_in_doubt():
    sizes = Sizes()
    sizes.add(np.full(50, 4.0), np.full(50, 0.9))
    meta = replace(made_meta(4000, 3000), counts={"neoplastic": 50})
    (check,) = (
        check for check in checks(meta, everywhere(4000, 3000), {1: sizes}, FACTS) if check.name == "Resolution"
    )
    assert check.verdict == "look"
    assert "is the resolution right?" in check.text


def test_quantiles_come_from_parts_as_from_the_whole():
    areas = np.random.default_rng(1).gamma(4, 12, 5000)
    sizes = Sizes()
    for part in np.array_split(areas, 7):
        sizes.add(part, np.full(len(part), np.nan))
    for share in (0.01, 0.25, 0.5, 0.995):
        assert sizes.quantile(share) == pytest.approx(np.quantile(areas, share), abs=0.6)
    assert (sizes.count, sizes.probability) == (5000, 0)
    assert sizes.total_um2 == pytest.approx(areas.sum())


def test_focus_tells_blurred_tissue_from_sharp():
    from skimage.data import immunohistochemistry

    pixels = immunohistochemistry()

    def measured(image: np.ndarray) -> Focus:
        grid = Grid.over(512, 512, 0.5, 0.5, 0.5)
        coarse = Grid.over(512, 512, 0.5, 0.5, 8.0)
        tissue = TissueMask(np.ones(coarse.box.shape, bool), coarse)
        return measure_focus(tissue, grid, lambda box, _: image[box.slices])

    sharp, blurred = measured(pixels), measured(ndimage.gaussian_filter(pixels, (3, 3, 0)))
    assert sharp == measured(pixels)
    assert sharp.median is not None
    assert blurred.median is not None
    assert sharp.median < BLURRED < blurred.median
    assert (sharp.blurred, blurred.blurred) == (0, len(blurred.blur))
    coarse = Grid.over(512, 512, 0.5, 0.5, 8.0)
    nothing = TissueMask(np.zeros(coarse.box.shape, bool), coarse)
    assert measure_focus(nothing, Grid.over(512, 512, 0.5, 0.5, 0.5), noise).median is None


def test_without_its_records_a_report_is_refused_with_the_remedy(tiny, tmp_path, segmented: Callable[[Path], None]):
    segmented(tmp_path)
    folder = ResultFolder(tmp_path)
    assert "12 nuclei" in folder.report.read_text()
    assert json.loads((tmp_path / "report.html.json").read_text())["seconds"] > 0
    with open_slide(tiny.path) as slide:
        tissue = find_tissue(slide, TissueConfig())
        (tmp_path / "maps.zarr.json").write_text("[]")
        with pytest.raises(
            StoreError, match=r"maps.zarr.json is missing or damaged; make it again with `wsipipe maps`"
        ):
            make_report(slide, folder, tissue)


@pytest.fixture
def segmented(tiny, oracle) -> Callable[[Path], None]:
    from wsipipe.config import Config
    from wsipipe.model.weights import load_model
    from wsipipe.stages.segment import segment

    def run(out: Path) -> None:
        with open_slide(tiny.path) as slide:
            segment(slide, load_model(oracle), ResultFolder(out), Config(), device="cpu")

    return run
