"""The commands about one slide: one a stage, `segment` for all of them, and `info`.

As in `wsipipe.cli`, nothing heavy is imported here.
"""

import logging
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from wsipipe.errors import ConfigError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wsipipe.config import Config
    from wsipipe.folder import ResultFolder
    from wsipipe.slide import Slide
    from wsipipe.stages.maps import MapsSummary
    from wsipipe.stages.nuclei import NucleiSummary
    from wsipipe.stages.segment import SegmentSummary

T = TypeVar("T")


class Form(StrEnum):
    """What stands for a nucleus in the GeoJSON."""

    outlines = "outlines"
    centroids = "centroids"
    overview = "overview"


SlidePath = Annotated[str, typer.Argument(metavar="SLIDE", help="slide file, picture, or URL of a TIFF")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="folder for the results  [default: results/<slide's name>]")
]
ConfigPath = Annotated[Path | None, typer.Option("--config", help="YAML file of settings")]
Mpp = Annotated[float | None, typer.Option("--mpp", help="µm per pixel at full resolution; wins over the file's own")]
SkipBadTiles = Annotated[
    bool, typer.Option("--skip-bad-tiles", help="take for white what cannot be read of SLIDE, and record where")
]
Model = Annotated[str | None, typer.Option("--model", help="name of a shipped model, or path of a checkpoint")]
Roi = Annotated[
    Path | None, typer.Option("--roi", exists=True, dir_okay=False, help="GeoJSON of regions from QuPath: only there")
]
Everywhere = Annotated[bool, typer.Option("--no-tissue-mask", help="take all of the slide for tissue")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, mps, or lease: a free GPU")]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32, bf16 or fp16")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="tiles at once; chosen by the device")]
Compiled = Annotated[bool, typer.Option("--compile", help="let torch.compile fuse the network; pays on GPUs")]
Scheduler = Annotated[str, typer.Option("--scheduler", help="Dask: threads, processes or tcp://HOST:PORT")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="of the scheduler; by default the usable CPUs")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="most that it may hold, e.g. 3GB: less at once; --batch-size stays")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="one setting, e.g. nuclei.min_area_um2=10; wins over --config")
]
Unattended = Annotated[
    bool,
    typer.Option(
        "--unattended",
        help="for workflows: wait while another process makes the same; start afresh what has other settings",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="start afresh, whatever is there")]
FormOption = Annotated[Form, typer.Option("--form", help="outlines, centroids, or one set of points a type")]


def segment(
    slide: SlidePath,
    out: Out = None,
    config: ConfigPath = None,
    set_: Set = None,
    mpp: Mpp = None,
    skip_bad_tiles: SkipBadTiles = False,
    model: Model = None,
    roi: Roi = None,
    no_tissue_mask: Everywhere = False,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = None,
    compiled: Compiled = False,
    scheduler: Scheduler = "threads",
    workers: Workers = None,
    memory: Memory = None,
    form: FormOption = Form.outlines,
    overwrite: Overwrite = False,
) -> None:
    """Find every nucleus of SLIDE: all stages, and all files that come of them."""
    settings, budget = _settings(config, set_), _budget(memory)
    with _opened(slide, mpp, skip_bad_tiles) as opened, _granted(device) as chosen:
        from wsipipe.model.weights import DEFAULT_MODEL, load_model
        from wsipipe.stages.segment import segment as run

        summary = run(
            opened,
            load_model(model or DEFAULT_MODEL),
            _folder(out, opened),
            settings,
            roi=roi,
            everywhere=no_tissue_mask,
            device=chosen,
            precision=precision,
            batch_size=batch_size,
            compiled=compiled,
            scheduler=scheduler,
            workers=workers,
            memory=budget,
            form=form.value,
            overwrite=overwrite,
            progress=True,
        )
    _say(summary)


def tissue(
    slide: SlidePath,
    out: Out = None,
    config: ConfigPath = None,
    set_: Set = None,
    mpp: Mpp = None,
    skip_bad_tiles: SkipBadTiles = False,
    roi: Roi = None,
    no_tissue_mask: Everywhere = False,
    unattended: Unattended = False,
) -> None:
    """Find the tissue of SLIDE and write tissue.png."""
    settings = _settings(config, set_, "tissue")
    with _opened(slide, mpp, skip_bad_tiles) as opened, _claimed(out, opened, "tissue", wait=unattended) as folder:
        from wsipipe.stages.tissue import make_tissue

        found = make_tissue(opened, folder.tissue, settings.tissue, roi=roi, everywhere=no_tissue_mask)
    typer.echo(f"{found.area_mm2:.2f} mm² of tissue: {folder.tissue}")


def maps(
    slide: SlidePath,
    out: Out = None,
    config: ConfigPath = None,
    set_: Set = None,
    mpp: Mpp = None,
    skip_bad_tiles: SkipBadTiles = False,
    model: Model = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = None,
    compiled: Compiled = False,
    memory: Memory = None,
    overwrite: Overwrite = False,
    unattended: Unattended = False,
) -> None:
    """Run the network over the tissue of SLIDE and write maps.zarr."""
    settings, budget = _settings(config, set_, "tissue", "maps"), _budget(memory)
    claim = ["path"] if unattended else []  # the maps have a lock of their own, which does not wait
    with _opened(slide, mpp, skip_bad_tiles) as opened, _claimed(out, opened, *claim, wait=unattended) as folder:
        from wsipipe.model.weights import DEFAULT_MODEL, load_model
        from wsipipe.stages.maps import make_maps
        from wsipipe.stages.tissue import read_tissue, settings_of_tissue

        made = settings_of_tissue(folder.tissue, opened, settings.tissue)
        settings = settings.model_copy(update={"tissue": made})
        mask, network = read_tissue(folder.tissue, opened), load_model(model or DEFAULT_MODEL)

        def run(overwrite: bool) -> "MapsSummary":
            return make_maps(
                opened,
                mask,
                network,
                folder.maps,
                settings,
                device=chosen,
                precision=precision,
                batch_size=batch_size,
                compiled=compiled,
                memory=budget,
                overwrite=overwrite,
                progress=True,
            )

        with _granted(device) as chosen:
            summary = _renewed(run, overwrite, unattended)
    typer.echo(f"{summary.tiles} tiles: {folder.maps}")


def nuclei(
    slide: SlidePath,
    out: Out = None,
    config: ConfigPath = None,
    set_: Set = None,
    mpp: Mpp = None,
    skip_bad_tiles: SkipBadTiles = False,
    scheduler: Scheduler = "threads",
    workers: Workers = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    unattended: Unattended = False,
) -> None:
    """Find the nuclei in the maps of SLIDE and write nuclei.parquet; needs no network, so settings can be tried."""
    settings, budget = _settings(config, set_, "nuclei"), _budget(memory)
    with _opened(slide, mpp, skip_bad_tiles) as opened, _claimed(out, opened, "nuclei", wait=unattended) as folder:
        from wsipipe.stages.nuclei import make_nuclei

        def run(overwrite: bool) -> "NucleiSummary":
            return make_nuclei(
                opened,
                folder.maps,
                folder.nuclei,
                settings.nuclei,
                scheduler=scheduler,
                workers=workers,
                memory=budget,
                overwrite=overwrite,
                progress=True,
            )

        summary = _renewed(run, overwrite, unattended)
    typer.echo(f"{summary.meta.count} nuclei: {folder.nuclei}")
    typer.echo(str(summary.seams))


def export(
    slide: SlidePath,
    out: Out = None,
    mpp: Mpp = None,
    skip_bad_tiles: SkipBadTiles = False,
    form: FormOption = Form.outlines,
    no_crop: Annotated[
        bool, typer.Option("--no-crop", help="do not subtract the slide's bounds: for QuPath's own --no-crop")
    ] = False,
    split: Annotated[int | None, typer.Option("--split", min=1, help="several files of so many nuclei")] = None,
    unattended: Unattended = False,
) -> None:
    """Write nuclei.geojson.gz for QuPath and overlay.png from the nuclei of SLIDE."""
    with _opened(slide, mpp, skip_bad_tiles) as opened, _claimed(out, opened, "geojson", wait=unattended) as folder:
        from wsipipe.stages.export import make_export
        from wsipipe.stages.tissue import read_tissue

        summary = make_export(
            opened,
            read_tissue(folder.tissue, opened),
            folder.nuclei,
            folder.geojson,
            folder.overlay,
            form=form.value,
            crop_to_bounds=not no_crop,
            split=split,
        )
    typer.echo(f"{summary.nuclei} nuclei: {', '.join(map(str, summary.files))}; picture: {folder.overlay}")


def report(
    slide: SlidePath,
    out: Out = None,
    mpp: Mpp = None,
    skip_bad_tiles: SkipBadTiles = False,
    unattended: Unattended = False,
) -> None:
    """Show the results of SLIDE on one page, report.html."""
    with _opened(slide, mpp, skip_bad_tiles) as opened, _claimed(out, opened, "report", wait=unattended) as folder:
        from wsipipe.stages.report import make_report
        from wsipipe.stages.tissue import read_tissue

        path = make_report(opened, folder, read_tissue(folder.tissue, opened))
    typer.echo(f"report: {path}")


def info(slide: SlidePath, mpp: Mpp = None, model: Model = None, config: ConfigPath = None) -> None:
    """Say what SLIDE tells of itself, and what wsipipe would do with it."""
    settings = _settings(config)
    with _opened(slide, mpp) as opened:
        from wsipipe.model.spec import tile_geometry
        from wsipipe.model.weights import DEFAULT_MODEL, find_checkpoint, read_spec
        from wsipipe.stages.tissue import find_tissue
        from wsipipe.tiles import chunk_grid

        spec = read_spec(find_checkpoint(model or DEFAULT_MODEL))
        grid, found = opened.grid(spec.mpp), find_tissue(opened, settings.tissue)
        geometry = tile_geometry(spec, settings.maps)
        chunks = [len(tiles) for _, tiles in chunk_grid(grid.box, geometry, lambda core: found.reaches(core, grid))]
        bounds = opened.bounds
        rows = {
            "slide": opened.path,
            "format": f"{opened.vendor or 'unknown vendor'}, read by {opened.reader}",
            "size": f"{opened.width_px0} x {opened.height_px0} px "
            f"({opened.width_px0 * opened.mpp_x0 / 1000:.2f} x {opened.height_px0 * opened.mpp_y0 / 1000:.2f} mm)",
            "resolution": f"{opened.mpp_x0:.4g} x {opened.mpp_y0:.4g} µm/px ({opened.mpp_source})",
            "levels": ", ".join(f"{width} x {height}" for width, height, _ in opened.levels),
            "bounds": "none" if bounds is None else f"x {bounds.x0} to {bounds.x1}, y {bounds.y0} to {bounds.y1}",
            "fingerprint": opened.fingerprint,
            "tissue": f"{found.area_mm2:.2f} mm²",
            "model": f"{spec.name}: {', '.join(spec.class_names[1:])}",
            "would work at": f"{grid.mpp:.4g} µm/px, {grid.width} x {grid.height} px",
            "would run": f"{sum(chunks)} tiles of {geometry.tile_px} px in {len(chunks)} chunks",
            "would write to": str(_folder(None, opened).path),
        }
    for name, value in rows.items():
        typer.echo(f"{name + ':':16}{value}")


def _settings(path: Path | None, overrides: list[str] | None = None, *sections: str) -> "Config":
    """A file may be for all stages; what is set for this one alone must be of its `sections`, if they are given."""
    from wsipipe.config import Config, load_config, parse_overrides

    parsed = parse_overrides(overrides or [])
    config = load_config(path, parsed)
    if useless := sections and sorted(parsed.keys() & Config.model_fields.keys() - set(sections)):
        raise ConfigError(f"this command takes no settings of {', '.join(useless)}; set those of {', '.join(sections)}")
    return config


def _budget(memory: str | None) -> int | None:
    from wsipipe.memory import parse_memory

    return None if memory is None else parse_memory(memory)


def _opened(path: str, mpp: float | None, skips_unread: bool = False) -> "Slide":
    from wsipipe.slide import open_slide

    return open_slide(path, mpp, skips_unread=skips_unread)


def _folder(out: Path | None, slide: "Slide") -> "ResultFolder":
    from wsipipe.folder import ResultFolder

    return ResultFolder(Path("results") / slide.name if out is None else out)


@contextmanager
def _claimed(out: Path | None, slide: "Slide", *outputs: str, wait: bool = False) -> "Iterator[ResultFolder]":
    folder = _folder(out, slide)
    with folder.claimed(slide, *(getattr(folder, output) for output in outputs), wait=wait):
        yield folder


@contextmanager
def _granted(device: str) -> "Iterator[str]":
    from wsipipe.lease import granted

    with granted(device) as name:
        yield name


def _renewed(run: "Callable[[bool], T]", overwrite: bool, unattended: bool) -> "T":
    """`run(overwrite)`; where nobody watches, what is there with other settings is made afresh."""
    try:
        return run(overwrite)
    except SettingsError as error:
        if not unattended:
            raise
        logging.getLogger(__name__).warning("starting afresh: %s", error)
        return run(True)


def _say(summary: "SegmentSummary") -> None:
    """The closing lines: what was found, what it took, where it is, how to look at it."""
    meta, maps, folder = summary.nuclei, summary.maps, summary.folder
    total, area = sum(summary.seconds.values()), summary.tissue_mm2
    density = f", {meta.count / area:,.0f} per mm²" if area else ""
    typer.echo(f"\n{meta.count:,} nuclei in {area:.2f} mm² of tissue{density}")
    for name, count in meta.counts.items():
        typer.echo(f"  {name:20}{count:>10,}{count / max(1, meta.count):>8.1%}")
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary.seconds.items())
    typer.echo(
        f"{total:.1f} s ({stages}); {maps.megapixels_per_s:.2f} MP/s on {maps.device} in {maps.precision}, "
        f"the bottleneck is the {maps.bottleneck}; at most {summary.peak_mb:,.0f} MB of memory"
    )
    typer.echo(str(summary.seams))
    geojson = summary.geojson[0]
    typer.echo(f"picture  {folder.overlay}\ntable    {folder.nuclei}\nQuPath   {geojson}")
    typer.echo(f"In QuPath: open the slide, then drag {geojson.name} onto the image.")
