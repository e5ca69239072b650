"""The command line: its commands put together, how much it says, how it ends.

Nothing heavy is imported here: `wsipipe --help` must not wait for torch.
"""

import logging
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from wsipipe import __version__, cli_models, cli_slide, cli_training
from wsipipe.errors import WsipipeError

app = typer.Typer(
    name="wsipipe",
    help="Gigapixel pathology slides in, every nucleus out: outlined, typed and measured, ready to open in QuPath.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(cli_models.models, name="models")
app.add_typer(cli_training.data, name="data")
COMMANDS: tuple[Callable[..., None], ...] = (  # in the order in which --help shows them
    cli_slide.segment, cli_slide.tissue, cli_slide.maps, cli_slide.nuclei, cli_slide.export, cli_slide.report,
    cli_slide.info, cli_training.train, cli_training.evaluate, cli_training.calibrate, cli_training.table,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="print the version and stop")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say more")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="warnings only")] = False,
) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("wsipipe").setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


@app.command()
def compare(
    true: Annotated[Path, typer.Argument(metavar="A", help="the truth: nuclei.parquet, .geojson(.gz) or a mask")],
    found: Annotated[Path, typer.Argument(metavar="B", help="what is scored: the same kinds of file")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the files to be, without ending")] = Path("comparison"),
    mpp: cli_slide.Mpp = None,
    at: Annotated[tuple[int, int], typer.Option("--at", help="x and y of a mask's corner on the slide, px")] = (0, 0),
    no_crop: Annotated[bool, typer.Option("--no-crop", help="QuPath's GeoJSON is of its own --no-crop")] = False,
) -> None:
    """Score the nuclei of B against those of A: PQ, DQ, SQ, AJI, Dice and F1, of all and by type."""
    from wsipipe.stages.compare import make_comparison

    _, table = make_comparison(true, found, out, mpp=mpp, at=at, crop_to_bounds=not no_crop)
    typer.echo(table)
    typer.echo(f"written to {out}.md and {out}.json")


@app.command()
def summary(
    sheet: Annotated[Path, typer.Argument(help="slide sheet of a workflow")],
    results: Annotated[Path, typer.Option("--results", help="folder of the slides' folders")] = Path("results"),
    logs: Annotated[Path, typer.Option("--logs", help="folder of the slides' logs")] = Path("logs"),
) -> None:
    """Say how far every slide of SHEET came, in summary.tsv and summary.html."""
    from wsipipe.cohort import read_sheet
    from wsipipe.summary import write_summary

    said = write_summary(read_sheet(sheet, check_files=False), results, logs)
    states = [one.state for one in said]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    typer.echo(f"{len(said)} slides, {told}: {results / 'summary.html'}")
    for one in said:
        if one.state == "failed":
            typer.echo(f"  {one.slide} failed at {one.stage}: {one.message}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the slide and its results")] = Path("demo"),
    slide_only: Annotated[bool, typer.Option("--slide-only", help="make the slide, leave it to others")] = False,
) -> None:
    """Make a small slide of real tissue, without a network, and segment it."""
    from wsipipe.demo import make_demo_slide
    from wsipipe.folder import ResultFolder

    path = out / "demo.svs"
    ResultFolder(out).prepare()
    if not path.exists():
        make_demo_slide(path)
    if not slide_only:
        cli_slide.segment(str(path), out=out / "results")


@app.command()
def doctor() -> None:
    """Check this installation: versions, devices, codecs, weights."""
    from wsipipe.doctor import examine

    checks = examine()
    for check in checks:
        typer.echo(f"{check.verdict:6}{check.name + ':':16}{check.text}")
    if any(check.verdict == "fail" for check in checks):
        raise typer.Exit(1)


class _Stopped(BaseException):
    """SIGINT or SIGTERM, as something that unwinds and that nobody on the way takes for an error."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    warnings.simplefilter("ignore")  # the coroutines of zarr that are broken off here would warn of it
    raise _Stopped(number)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: user errors in one line and exit code 1, wrong usage 2, interrupted 130, terminated 143."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app(args=arguments)
    except WsipipeError as error:
        _fail(str(error), 1)
    except OSError as error:  # a disk that fills, a folder that goes away: the user's to mend
        if error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror.lower()}; {_how_to_go_on(arguments)}", 1)
    except _Stopped as stop:
        _fail(f"stopped by {signal.Signals(stop.number).name}; {_how_to_go_on(arguments)}", 128 + stop.number)
    sys.exit(0)


def _how_to_go_on(arguments: list[str] | None) -> str:
    if "--overwrite" in (sys.argv if arguments is None else arguments):
        return "run the same command again to start afresh, or without --overwrite to go on where it stopped"
    return "run the same command again to go on where it stopped"


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"wsipipe: {message}", err=True)
    sys.exit(code)
