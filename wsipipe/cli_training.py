"""The commands around training: `data`, `train`, `evaluate`, `calibrate`, `table`.

As in `wsipipe.cli`, nothing heavy is imported here.
"""

import json
import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from wsipipe.errors import DataError

data = typer.Typer(help="Make and check patch sets: the data that networks train on.", no_args_is_help=True)
prepare = typer.Typer(help="Turn annotated images into a patch set.", no_args_is_help=True)
data.add_typer(prepare, name="prepare")

Src = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="folder of the data as their authors publish it")
]
Own = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="folder of your images")]
Dst = Annotated[Path, typer.Argument(help="folder of the patch set; nothing there is overwritten")]
Mpp = Annotated[float, typer.Option("--mpp", help="µm per pixel that the patches are to have")]
PatchPx = Annotated[int, typer.Option("--patch-px", min=32, help="side of a patch")]
SplitTable = Annotated[Path | None, typer.Option("--split-table", exists=True, help="CSV of name, group and split")]
Validation = Annotated[float, typer.Option("--validation", min=0, max=0.9, help="share of images that validate")]
Test = Annotated[float, typer.Option("--test", min=0, max=0.9, help="share of images that are kept for the test")]
Types = Annotated[
    str | None, typer.Option("--types", help="names of the types, with commas  [default: all that occur]")
]
Name = Annotated[str | None, typer.Option("--name", help="name of the set  [default: that of the folder]")]
Licence = Annotated[str, typer.Option("--licence", help="licence of the annotations")]


class ConicSplit(StrEnum):
    """How CoNIC is split."""

    patient = "patient"
    published = "published"


@prepare.command()
def pannuke(src: Src, dst: Dst) -> None:
    """PanNuke: `Fold N/{images,masks}/foldN/*.npy`."""
    from wsipipe.training.sources.pannuke import prepare_pannuke

    typer.echo(f"{len(prepare_pannuke(src, dst))} images in three folds: {dst}")


@prepare.command()
def conic(
    src: Src,
    dst: Dst,
    split: Annotated[
        ConicSplit, typer.Option("--split", help="by patient, or tiles as published")
    ] = ConicSplit.patient,
) -> None:
    """CoNIC: `images.npy`, `labels.npy`, `counts.csv`, `patient_info.csv`; to DST/native and DST/enlarged."""
    from wsipipe.training.sources.conic import prepare_conic

    native, enlarged = prepare_conic(src, dst, split.value)
    typer.echo(f"{len(native)} images: {native.folder}; {len(enlarged)} enlarged windows: {enlarged.folder}")


@prepare.command()
def cellvit(src: Src, dst: Dst, mpp: Mpp = 0.25) -> None:
    """A data folder of CellViT or CellVTA: `fold*/images/*.png`, `fold*/labels/*.npy`."""
    from wsipipe.training.sources.cellvit import prepare_cellvit

    typer.echo(f"{len(prepare_cellvit(src, dst, mpp))} images: {dst}")


@prepare.command()
def qupath(
    src: Own,
    dst: Dst,
    mpp: Mpp = 0.25,
    image_mpp: Annotated[float | None, typer.Option("--image-mpp", help="of images that do not say it")] = None,
    patch_px: PatchPx = 256,
    types: Types = None,
    split_table: SplitTable = None,
    validation: Validation = 0.2,
    test: Test = 0.0,
    name: Name = None,
    licence: Licence = "not stated",
) -> None:
    """Images or slides with QuPath's objects beside them: `<stem>.svs` and `<stem>.geojson`."""
    from wsipipe.training.sources.own_images import Splits
    from wsipipe.training.sources.qupath import prepare_qupath
    from wsipipe.training.write import Description

    about = Description(name or src.name, mpp, None, "annotated in QuPath", licence)
    made = prepare_qupath(
        src, dst, about, patch_px, Splits(split_table, validation, test), classes=_names(types), image_mpp=image_mpp
    )
    typer.echo(f"{len(made)} patches: {dst}")


@prepare.command()
def masks(
    src: Own,
    dst: Dst,
    mpp: Annotated[float, typer.Option("--mpp", help="µm per pixel of the images")],
    patch_px: PatchPx = 256,
    types: Types = None,
    split_table: SplitTable = None,
    validation: Validation = 0.2,
    test: Test = 0.0,
    name: Name = None,
    licence: Licence = "not stated",
) -> None:
    """`images/<stem>.*`, `masks/<stem>.png` (numbered nuclei) and, for types, `types/<stem>.csv` (id,type)."""
    from wsipipe.training.sources.image_masks import prepare_image_masks
    from wsipipe.training.sources.own_images import Splits
    from wsipipe.training.write import Description

    about = Description(name or src.name, mpp, None, "images with instance masks", licence)
    made = prepare_image_masks(src, dst, about, patch_px, Splits(split_table, validation, test), _names(types))
    typer.echo(f"{len(made)} patches: {dst}")


@data.command()
def check(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="folder of a patch set")],
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="PNG of a contact sheet  [default: FOLDER/sheet.png]")
    ] = None,
) -> None:
    """Look at all of a patch set: every fault at once, counts beside the published ones, a contact sheet."""
    from wsipipe.training.check import check as look
    from wsipipe.training.check import draw_sheet

    report, patches = look(folder)
    typer.echo(json.dumps(report.counts, indent=1))
    for doubt in report.doubts:
        typer.echo(f"note   {doubt}")
    for fault in report.faults:
        typer.echo(f"fault  {fault}")
    if patches is not None:
        draw_sheet(patches, sheet or folder / "sheet.png")
        typer.echo(f"contact sheet: {sheet or folder / 'sheet.png'}")
    if report.faults:
        raise DataError(f"{folder} has {len(report.faults)} faults; see above")


@data.command()
def miniature(
    which: Annotated[str, typer.Argument(help="pannuke or conic")],
    dst: Annotated[Path, typer.Argument(help="folder, laid out as the real one")],
    side: Annotated[int, typer.Option("--side", min=64, help="of an image, px")] = 256,
) -> None:
    """Draw a data set in the layout of the real one, to try the whole way in minutes."""
    from wsipipe.training.miniature import make_conic, make_pannuke

    if which not in ("pannuke", "conic"):
        raise DataError(f"'{which}' is not drawn in miniature; there are pannuke and conic")
    (make_pannuke if which == "pannuke" else make_conic)(dst, side=side)


def _names(types: str | None) -> list[str] | None:
    return None if types is None else [name.strip() for name in types.split(",") if name.strip()]


class ProtocolName(StrEnum):
    """How nuclei are found for scoring: see `wsipipe.training.assess`."""

    segment = "segment"
    pannuke = "pannuke"
    conic = "conic"
    conic_corrected = "conic-corrected"


def train(
    experiment: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="YAML file of an experiment")],
    run: Annotated[Path, typer.Argument(help="folder of the run; an interrupted one goes on")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a setting other than EXPERIMENT's; YAML")
    ] = None,
) -> None:
    """Train a network as EXPERIMENT says; RUN/best.safetensors can be given to --model."""
    from wsipipe.training.config import load_experiment, parse_changes
    from wsipipe.training.loop import train as start

    typer.echo(f"best weights: {start(load_experiment(experiment, parse_changes(changes or [])), run)}")


def evaluate(
    model: Annotated[str, typer.Argument(help="name of a shipped model, or path of a checkpoint")],
    patches: Annotated[
        Path, typer.Argument(metavar="DATA", exists=True, file_okay=False, help="folder of a patch set")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for scores.json, scores.md and pictures")],
    protocol: Annotated[ProtocolName, typer.Option("--protocol", help="how nuclei are found")] = ProtocolName.segment,
    split: Annotated[str, typer.Option("--split", help="train, validation or test")] = "test",
    fold: Annotated[str | None, typer.Option("--fold", help="take the images of this fold instead")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
) -> None:
    """Score a model on a patch set: PQ, AJI, Dice and F1 by type and tissue, counted as published and strictly."""
    from wsipipe.folder import ResultFolder
    from wsipipe.model.weights import find_checkpoint, load_model, read_notes
    from wsipipe.training.assess import assess
    from wsipipe.training.data import SPLITS, PatchSet
    from wsipipe.training.report import write_report

    opened = PatchSet.open(patches)
    if split not in SPLITS:
        raise DataError(f"there is no split '{split}'; there are: {', '.join(SPLITS)}")
    loaded, way = load_model(model), protocol.value
    notes = read_notes(find_checkpoint(model))
    ResultFolder(out).prepare()
    made = assess(
        loaded,
        opened,
        split,  # type: ignore[arg-type]
        way,  # type: ignore[arg-type]
        fold=fold,
        device=device,
        batch_size=batch_size,
        progress=True,
        notes=notes,
    )
    write_report(made, opened, out)
    for counting, scores in made.scores.items():
        typer.echo(
            f"{protocol.value}, {counting}: mPQ {scores['mPQ']:.4f}, bPQ {scores['bPQ']:.4f}, "
            f"AJI {scores['aji']:.4f}, Dice {scores['dice']:.4f}, F1 {scores['detection']['f1']:.4f}"
        )
    typer.echo(f"tables and pictures: {out / 'scores.md'}")


def calibrate(
    model: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="checkpoint, such as RUN/best.safetensors")
    ],
    data: Annotated[
        list[Path], typer.Argument(exists=True, file_okay=False, help="folders of patch sets whose images validate")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="the calibrated checkpoint")],
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps")] = "auto",
) -> None:
    """Make the certainties of a model's types mean what they say, by one temperature found on validation images."""
    from wsipipe.model.weights import load_model, read_notes, save_checkpoint
    from wsipipe.training.calibration import calibrate as fitted
    from wsipipe.training.data import PatchSet

    logging.getLogger("wsipipe.stages").setLevel(logging.WARNING)  # they run once an image and temperature
    loaded = load_model(model)
    notes = read_notes(model)
    network, figures = fitted(loaded, [PatchSet.open(folder) for folder in data], device=device, notes=notes)
    notes |= {"calibration": figures, "calibrated_from_sha256": loaded[2]}
    save_checkpoint(out, network, loaded[1], notes)
    typer.echo(
        f"temperature {figures['temperature']:.2f}: expected calibration error "
        f"{figures['before']['ece']:.3f} before, {figures['after']['ece']:.3f} after: {out}"
    )


def table(
    results: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="folder of <data>/<experiment>/<split>/")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Markdown file")],
    published: Annotated[
        Path | None, typer.Option("--published", exists=True, dir_okay=False, help="YAML of published figures")
    ] = None,
) -> None:
    """Set the scores of many experiments beside each other, and beside what was published."""
    from wsipipe.atomic import finished
    from wsipipe.training.tables import read_published, read_rows, write_tables

    text = write_tables(read_rows(results), read_published(published) if published else {})
    with finished(out) as partial:
        partial.write_text(text, encoding="utf-8")
    typer.echo(f"{out}")
