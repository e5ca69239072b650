"""The commands about models: `models`, which lists them, `models inspect`, `models convert`.

As in `wsipipe.cli`, nothing heavy is imported here.
"""

from pathlib import Path
from typing import Annotated

import typer

from wsipipe.errors import ModelError

models = typer.Typer(help="List the models; look into and convert files of weights.", invoke_without_command=True)
File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="file of weights, ours or another project's")]


@models.callback()
def list_models(context: typer.Context) -> None:
    """List the models, those whose weights ship and those that need a file; look into and convert such files."""
    if context.invoked_subcommand is not None:
        return
    from wsipipe.model.registry import SPECS
    from wsipipe.model.weights import DEFAULT_MODEL, read_spec, shipped_models

    shipped = shipped_models()
    for name in [*shipped, *(name for name in SPECS if name not in shipped)]:
        spec = read_spec(shipped[name]) if name in shipped else SPECS[name]
        state = "ships, default" if name == DEFAULT_MODEL and name in shipped else "ships" if name in shipped else "-"
        types = ", ".join(spec.class_names[1:]) or "no types"
        typer.echo(f"{name:20}{state:16}{spec.mpp} µm/px, tiles of {spec.tile_px} px: {types} ({spec.licence})")
    typer.echo("'-': train it, or pass --model with the path of a file of weights")


@models.command()
def inspect(file: File) -> None:
    """Say what FILE is, whose network it holds, and whether its weights are whole."""
    from wsipipe.model.weights import inspect as look

    for name, value in look(file).items():
        typer.echo(f"{name + ':':16}{value}")


@models.command()
def convert(
    file: File,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write  [default: beside FILE]")] = None,
) -> None:
    """Write the weights in FILE, of another project, as a safetensors file that carries its description."""
    from wsipipe.model.weights import convert as write

    target = file.with_suffix(".safetensors") if out is None else out
    if target.exists():
        raise ModelError(f"{target} is there already; give another name with --out, or remove it")
    spec = write(file, target)
    typer.echo(f"{spec.name}, a {spec.architecture} of {len(spec.class_names) - 1} types: {target}")
