"""The slide sheet and the settings of a cohort: every fault in one message; options that change with results only."""

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from wsipipe.cohort import MOST_FAULTS, CohortConfig, SlideRow, lift_stale_locks, load_cohort, read_sheet
from wsipipe.errors import ConfigError


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with slides a.svs and b.svs."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.svs", "b.svs", "regions.geojson", "own.safetensors"):
        (tmp_path / name).touch()
    return tmp_path


def sheet(text: str, name: str = "slides.tsv", encoding: str = "utf-8") -> Path:
    path = Path(name)
    path.write_bytes(text.encode(encoding))
    return path


def test_a_sheet_is_read_with_what_is_optional_and_without(here):
    rows = read_sheet(
        sheet(
            "# a night's run\nslide\tpath\tmpp\troi\tmodel\tgroup\na\ta.svs\t0.5\tregions.geojson\tcellvta-nano\tx\n\n"
            "b.2-B_x\tb.svs\nfar\thttps://host/x.tif\n"
        )
    )
    assert list(rows) == ["a", "b.2-B_x", "far"]
    assert rows["a"] == SlideRow(
        slide="a", path="a.svs", mpp=0.5, roi="regions.geojson", model="cellvta-nano", group="x"
    )
    assert rows["b.2-B_x"] == SlideRow(slide="b.2-B_x", path="b.svs")


def test_every_fault_of_a_sheet_is_in_one_message(here):
    path = sheet(
        "\ufeffslide\tpath\tmpp\troi\tmodel\tdepth\r\n"
        "a/b\ta.svs\t\t\t\t\r\n"
        "a b\ta.svs\t\t\t\t\r\n"
        "c\tabsent.svs\t\t\t\t\r\n"
        "d\ta.svs\tthick\t\t\t\r\n"
        "e\ta.svs\t0,25\t\t\t\r\n"
        "f\ta.svs\t353\t\t\t\r\n"
        "g\ta.svs\t\tabsent.geojson\tnobody\t\r\n"
        "h\ta.svs\t\t\t\t\r\n"
        "H\tb.svs\t\t\t\t\r\n"
        "\tb.svs\t\t\t\t\r\n"
        "i\t\t\t\t\t\r\n"
        "j\ta.svs\t\t\t\t\t\tmore\r\n"
    )
    with pytest.raises(ConfigError) as error:
        read_sheet(path)
    told = str(error.value)
    for fault in (
        "13 faults in the slide sheet slides.tsv",
        "line 1: column 'depth' is unknown; known are slide, path, mpp, roi, model, group",
        "line 2: slide 'a/b': only letters",
        "line 3: slide 'a b': only letters",
        "line 4: path 'absent.svs' does not exist",
        "line 5: mpp 'thick' is not a number from 0.05 to 10",
        "line 6: mpp '0,25' is not a number",
        "line 7: mpp '353' is not a number from 0.05 to 10",
        "line 8: roi 'absent.geojson' does not exist",
        "line 8: model 'nobody' is neither a shipped one (cellvta-nano",
        "line 10: slide 'H' is on line 9 already",
        "line 11: 'slide' is empty",
        "line 12: 'path' is empty",
        "line 13: 8 cells for 6 columns",
        "a byte order mark and Windows line ends, which do no harm",
    ):
        assert fault in told
    assert told.count("\n") == 14


def test_a_missing_column_is_named_and_commas_are_suspected(here):
    with pytest.raises(ConfigError, match=r"column 'path' is missing(?s:.*)column 'file' is unknown"):
        read_sheet(sheet("slide\tfile\na\ta.svs\n"))
    with pytest.raises(ConfigError, match="cells must be parted by tabs"):
        read_sheet(sheet("slide,path\na,a.svs\n"))


@pytest.mark.parametrize(
    ("text", "encoding", "says"),
    [
        ("", "utf-8", "it is empty"),
        ("slide\tpath\n", "utf-8", "it lists no slide"),
        ("slide\tpath\na\ta.svs\n", "utf-16", "is not UTF-8 text"),
        ("slide\tpath\tpath\na\ta.svs\ta.svs\n", "utf-8", "column 'path' is there 2 times"),
    ],
)
def test_what_is_no_sheet_is_refused(text, encoding, says, here):
    with pytest.raises(ConfigError, match=says):
        read_sheet(sheet(text, encoding=encoding))


def test_a_sheet_that_is_not_there_is_refused(here):
    with pytest.raises(ConfigError, match="does not exist; name another"):
        read_sheet(Path("absent.tsv"))


def test_windows_line_ends_and_a_byte_order_mark_are_read_and_told(here, caplog):
    rows = read_sheet(sheet("\ufeffslide\tpath\r\na\ta.svs\r\n"))
    assert rows == {"a": SlideRow(slide="a", path="a.svs")}
    assert "a byte order mark and Windows line ends" in caplog.text


def test_of_very_many_faults_the_first_are_told_and_all_counted(here):
    lines = "".join(f"s{n}\tabsent{n}.svs\n" for n in range(MOST_FAULTS + 23))
    with pytest.raises(ConfigError) as error:
        read_sheet(sheet(f"slide\tpath\n{lines}"))
    assert f"{MOST_FAULTS + 23} faults" in str(error.value)
    assert "and 23 more" in str(error.value)


def test_a_slide_that_a_rule_makes_need_not_be_there(here):
    path = sheet("slide\tpath\nx\tmade.svs\n")
    with pytest.raises(ConfigError, match="does not exist"):
        read_sheet(path)
    assert list(read_sheet(path, ["made.svs"])) == list(read_sheet(path, check_files=False)) == ["x"]


def test_faults_of_settings_and_of_the_sheet_come_together(here):
    sheet("slide\tpath\na\tabsent.svs\n")
    with pytest.raises(ConfigError) as error:
        load_cohort(
            {
                "slides": "slides.tsv", "form": "squares", "keep": True, "model": "nobody",
                "settings": {"nuclei": {"halo_px": -1}},
            }
        )  # fmt: skip
    for fault in ("form: ", "keep: ", "settings.nuclei.halo_px", "path 'absent.svs' does not exist"):
        assert fault in str(error.value)
    with pytest.raises(ConfigError, match="model 'nobody' is neither"):
        load_cohort({"slides": "slides.tsv", "model": "nobody"})


def test_the_options_of_a_stage_change_only_with_what_its_result_depends_on(here):
    sheet("slide\tpath\tmpp\troi\na\ta.svs\t0.5\tregions.geojson\n")

    def options(**settings) -> dict[str, str]:
        cohort = load_cohort({"slides": "slides.tsv", **settings})
        return {stage: cohort.options(stage, "a") for stage in ("tissue", "maps", "nuclei", "export", "report")}

    def changed(**settings) -> list[str]:
        now = options(**settings)
        return [stage for stage in before if now[stage] != before[stage]]

    before = options()
    assert before["tissue"].startswith("a.svs --mpp 0.5 --roi regions.geojson --set tissue.")
    assert " --set 'nuclei.hv_scale=[-1.5, 0.9]'" in before["nuclei"]
    assert changed(settings={"nuclei": {"np_threshold": 0.6}}) == ["nuclei"]
    assert changed(settings={"tissue": {"min_area_um2": 1}}) == ["tissue", "maps"]
    assert changed(settings={"maps": {"chunk_tiles": 2}}) == ["maps"]
    assert changed(model="own.safetensors") == ["maps"]
    assert changed(form="centroids") == ["export"]
    assert changed(keep_maps=False) == []
    assert changed(skip_bad_tiles=True) == ["tissue", "maps", "nuclei", "export", "report"]
    assert changed(settings={"nuclei": {"np_threshold": 0.5}}) == []  # the default, spelled out
    with pytest.raises(ValueError, match="no stage"):
        load_cohort({"slides": "slides.tsv"}).options("dream", "a")


def test_a_quotation_mark_left_open_swallows_no_slide(here):
    for text in ('a\ta.svs\t"group A\nb\tb.svs\tgroup B\n', '#b\t"old\na\ta.svs\t\nb\tb.svs\t\n'):
        path = sheet(f"slide\tpath\tgroup\n{text}")
        if text.startswith("#"):
            assert list(read_sheet(path)) == ["a", "b"]
        else:
            with pytest.raises(
                ConfigError,
                match=r"1 fault in .*\n  line 2: it cannot be parted into cells",
            ):
                read_sheet(path)
    assert read_sheet(sheet('slide\tpath\tgroup\na\ta.svs\t"the ""old"" ones"\n'))["a"].group == 'the "old" ones'


def test_names_that_snakemake_or_a_command_would_take_for_something_else(here):
    for name in ("{a}.svs", "-a.svs"):
        (here / name).touch()
    with pytest.raises(ConfigError, match=r"line 2: path '\{a\}\.svs' has a brace, which Snakemake"):
        read_sheet(sheet("slide\tpath\na\t{a}.svs\n"))
    (here / "-r.json").touch()
    sheet("slide\tpath\troi\na\t-a.svs\t-r.json\n")
    cohort = load_cohort({"slides": "slides.tsv"})
    assert cohort.options("report", "a") == "./-a.svs"
    assert cohort.options("tissue", "a").startswith("./-a.svs --roi ./-r.json ")
    with pytest.raises(ConfigError, match=r"settings: model 'm\{x\}' has a brace"):
        load_cohort({"slides": "slides.tsv", "model": "m{x}"})


def test_names_of_files_reach_a_command_as_they_are(here):
    name = "a $HOME 'b'.svs"
    (here / name).touch()
    sheet(f"slide\tpath\na\t{name}\n")
    assert shlex.split(load_cohort({"slides": "slides.tsv"}).options("report", "a")) == [name]


def test_files_are_those_of_the_user_and_no_urls(here):
    sheet("slide\tpath\troi\tmodel\na\ta.svs\tregions.geojson\town.safetensors\nfar\ts3://host/x.tif\t\tcellvta-nano\n")
    cohort = load_cohort({"slides": "slides.tsv"})
    assert cohort.files("a") == ["a.svs", "regions.geojson"]
    assert cohort.weights("a") == ["own.safetensors"]
    assert cohort.files("far") == cohort.weights("far") == []


def test_the_options_of_a_stage_are_what_its_command_takes(here):
    """Each `--set` is a setting and its value, as the command reads them."""
    from wsipipe.config import Config, load_config, parse_overrides

    sheet("slide\tpath\na\ta.svs\n")
    settings = {"nuclei": {"hv_scale": "tile", "np_threshold": 0.6}, "maps": {"tile_px": 256}}
    cohort = load_cohort({"slides": "slides.tsv", "settings": settings})
    given = [
        part
        for stage in ("tissue", "maps", "nuclei")
        for part in shlex.split(cohort.options(stage, "a"))
        if "=" in part
    ]
    assert load_config(None, parse_overrides(given)) == Config.model_validate(settings)


@pytest.mark.parametrize(("name", "model"), [("config", CohortConfig), ("slides", SlideRow)])
def test_the_schemas_are_those_of_the_code(name, model):
    import json

    path = Path(__file__).parents[1] / "workflows" / "schemas" / f"{name}.schema.json"
    assert json.loads(path.read_text()) == model.model_json_schema(), (
        f"write json.dumps({model.__name__}.model_json_schema(), indent=2) to {path}"
    )


def test_the_documentation_names_every_setting_with_its_default():
    from wsipipe.config import Config

    text = (Path(__file__).parents[1] / "docs" / "cohort.md").read_text()
    table = {name: told.strip(" `") for name, told in re.findall(r"^\| `([\w.]+)` \|([^|]*)\|", text, re.M)}
    assert SlideRow.model_fields.keys() <= table.keys()
    defaults = CohortConfig().model_dump(mode="json") | {
        f"settings.{section}.{name}": value
        for section, values in Config().model_dump(mode="json").items()
        for name, value in values.items()
    }
    del defaults["settings"]
    assert defaults.keys() <= table.keys()
    for name, value in defaults.items():
        if value is not None:  # what stands for nothing is told in words
            assert yaml.safe_load(table[name]) == value, name


def test_ten_thousand_slides_import_nothing_slow():
    code = "import sys, wsipipe.cohort; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "zarr", "dask", "geopandas", "pyarrow", "cv2"} & set(run.stdout.split())


HOLDER = """
import sys
from pathlib import Path
from wsipipe.cohort import lift_stale_locks
kept = lift_stale_locks(Path(sys.argv[1]))
print("here", flush=True)
sys.stdin.read()
"""


def test_locks_of_a_dead_snakemake_are_removed_and_those_of_a_living_one_stay(tmp_path):
    locks = tmp_path / "locks"
    locks.mkdir()

    def alive() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        return process

    first = alive()
    (locks / "0.output.lock").touch()
    second = alive()
    assert (locks / "0.output.lock").exists()
    first.kill()
    first.communicate()
    third = alive()  # the second is still there
    assert (locks / "0.output.lock").exists()
    for process in (second, third):
        process.kill()
        process.communicate()
    kept = lift_stale_locks(tmp_path)
    assert not list(locks.iterdir())
    assert kept is not None
    kept.close()


def test_locks_that_another_machine_may_hold_stay(tmp_path):
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "0.output.lock").touch()
    (tmp_path / "wsipipe.alive").write_text("another-host")
    for _ in range(2):  # they are not ours at the second attempt either
        kept = lift_stale_locks(tmp_path)
        assert (tmp_path / "locks" / "0.output.lock").exists()
        assert kept is not None
        kept.close()
    (tmp_path / "locks" / "0.output.lock").unlink()  # as `snakemake --unlock` does
    kept = lift_stale_locks(tmp_path)
    assert (tmp_path / "wsipipe.alive").read_text() == socket.gethostname()
    assert kept is not None
    kept.close()
