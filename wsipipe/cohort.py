"""Many slides: the sheet that lists them, the settings of a run, and what each stage of each slide is called with.

The workflow asks here, so that its rules only wire files. Nothing slow is imported and no slide is opened: a sheet of
ten thousand slides is read in a second.
"""

import csv
import fcntl
import io
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from wsipipe.config import Config, faults
from wsipipe.errors import ConfigError

log = logging.getLogger(__name__)

MOST_FAULTS = 100  # in one message
# A folder and a part of job names: letters, digits and a few signs that no shell, URL or file system takes otherwise.
SLIDE_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
BYTE_ORDER_MARK = "\ufeff"


class SlideRow(BaseModel):
    """A line of the slide sheet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slide: str = Field(
        pattern=f"^{SLIDE_ID}$",
        max_length=128,
        description="id: names the folder of results; letters, digits and . _ - (no blanks, no slashes)",
    )
    path: str = Field(min_length=1, description="slide file, picture, or URL of a TIFF; from where snakemake is run")
    mpp: Annotated[float, Field(ge=0.05, le=10, description="µm per pixel at full resolution")] | None = None
    roi: Annotated[str, Field(description="GeoJSON of regions from QuPath: only there")] | None = None
    model: Annotated[str, Field(description="name of a shipped model, or path of a checkpoint")] | None = None
    group: Annotated[str, Field(description="what the summary adds up by")] | None = None


class CohortConfig(BaseModel):
    """The settings of a run of the workflow."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slides: str = Field("configs/slides.tsv", description="the slide sheet")
    model: str | None = Field(None, description="for slides whose line names none; null is cellvta-nano")
    form: Literal["outlines", "centroids", "overview"] = Field("outlines", description="of a nucleus in the GeoJSON")
    keep_maps: bool = Field(True, description="false: delete maps.zarr as soon as its nuclei are found")
    skip_bad_tiles: bool = Field(False, description="true: take for white what cannot be read of a slide")
    settings: Config = Field(Config(), description="as `wsipipe segment --config` takes them")

    @field_validator("settings", mode="before")
    @classmethod
    def _none_are_the_defaults(cls, settings: Any) -> Any:
        return {} if settings is None else settings


@dataclass(frozen=True, slots=True)
class Cohort:
    """Checked slides and settings.

    Attributes
    ----------
    slides : dict of str to SlideRow
        By id, in the order of the sheet.
    settings : dict of str to str
        Section -> its settings as options of a command; kept, for they are the same for every slide.
    """

    slides: Mapping[str, SlideRow]
    config: CohortConfig
    settings: Mapping[str, str]

    def files(self, slide: str) -> list[str]:
        """Files that the user gives for a slide: itself and its regions; a URL is no file."""
        row = self.slides[slide]
        return [path for path in (row.path, row.roi) if path and not _is_url(path)]

    def weights(self, slide: str) -> list[str]:
        """The checkpoint of a slide, if it is a file of the user."""
        model = self._model(slide)
        return [model] if model is not None and Path(model).is_file() else []

    def options(self, stage: str, slide: str) -> str:
        """Arguments of the command of a stage, as a shell reads them; only what changes its result.

        So nothing else makes a stage run again. Settings are given as they are, not only where they differ from the
        defaults: with a wsipipe whose defaults are others the arguments are others too.
        """
        row = self.slides[slide]
        options = quote(_no_option(row.path))
        if row.mpp is not None:
            options += f" --mpp {row.mpp}"
        if self.config.skip_bad_tiles:
            options += " --skip-bad-tiles"
        match stage:
            case "tissue":
                roi = f" --roi {quote(_no_option(row.roi))}" if row.roi else ""
                return options + roi + self.settings["tissue"]
            case "maps":
                model = self._model(slide)
                model = f" --model {quote(model)}" if model else ""
                return options + model + self.settings["tissue"] + self.settings["maps"]
            case "nuclei":
                return options + self.settings["nuclei"]
            case "export":
                return f"{options} --form {self.config.form}"
            case "report":  # takes no settings
                return options
            case _:
                raise ValueError(f"no stage is called {stage}")

    def _model(self, slide: str) -> str | None:
        return self.slides[slide].model or self.config.model


def load_cohort(config: Mapping[str, Any], made: Collection[str] = ()) -> Cohort:
    """Check the settings of a run and its sheet.

    Parameters
    ----------
    config : mapping
        As it stands in configs/wsipipe.yaml.
    made : collection of str
        Paths of slides that need not be there yet, for a rule makes them.

    Raises
    ------
    ConfigError
        With every fault of the settings, and every fault of the sheet if it can be found.
    """
    told: list[str] = []
    slides: dict[str, SlideRow] = {}
    try:
        settings = CohortConfig.model_validate(dict(config))
    except ValidationError as error:
        told += [f"settings: {faults(error)}"]
        settings = CohortConfig(slides=str(config.get("slides", CohortConfig().slides)))
    if settings.model is not None:
        told += [f"settings: {fault}" for fault in _braces("model", settings.model)]
        if not _is_model(settings.model):
            told.append(f"settings: {_unknown_model(settings.model)}")
    try:
        slides = read_sheet(Path(settings.slides), made)
    except ConfigError as error:
        told.append(str(error))
    if told:
        raise ConfigError("\n".join(told))
    return Cohort(slides, settings, _as_options(settings.settings))


def read_sheet(path: Path, made: Collection[str] = (), *, check_files: bool = True) -> dict[str, SlideRow]:
    """The slides of a sheet by id: text with a line of column names, cells parted by tabs; # begins a remark.

    `check_files` looks whether slides, regions and models are there. Windows line ends and a byte order mark do no
    harm; the log tells of them, or the error if there is one.

    Raises
    ------
    ConfigError
        With every fault of the whole sheet, each with its line.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"the slide sheet {path} does not exist; name another with --config slides=...") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the slide sheet {path} is not UTF-8 text; save it as tab-separated UTF-8") from error
    except OSError as error:
        raise ConfigError(f"the slide sheet {path} cannot be read: {(error.strerror or 'error').lower()}") from error
    remarks = []
    if text.startswith(BYTE_ORDER_MARK):
        remarks.append("a byte order mark")
    if "\r" in text:
        remarks.append("Windows line ends")
    rows, wrong = _parse(text.removeprefix(BYTE_ORDER_MARK), made, check_files)
    also = f"{path} has {' and '.join(remarks)}, which do no harm" if remarks else ""
    if wrong:
        shown = [" ".join(fault.split()) for fault in wrong[:MOST_FAULTS]]  # a cell may hold line ends of its own kind
        if len(wrong) > MOST_FAULTS:
            shown.append(f"and {len(wrong) - MOST_FAULTS} more")
        listed = "".join(f"\n  {fault}" for fault in [*shown, *([also] if also else [])])
        raise ConfigError(f"{len(wrong)} fault{'s' * (len(wrong) > 1)} in the slide sheet {path}:{listed}")
    if also:
        log.warning("%s", also)
    return rows


def _parse(text: str, made: Collection[str], check_files: bool) -> tuple[dict[str, SlideRow], list[str]]:
    """Rows by id, and every fault."""
    lines: list[tuple[int, list[str]]] = []
    wrong: list[str] = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):  # a cell that went on would swallow slides
        if not line.strip() or line.startswith("#"):
            continue
        try:
            cells = next(csv.reader([line.rstrip("\n")], delimiter="\t", strict=True))
        except csv.Error as error:
            wrong.append(f"line {number}: it cannot be parted into cells, is a quotation mark left open? ({error})")
            if not lines:
                return {}, wrong  # without names of columns nothing more can be said
            continue
        if any(cell.strip() for cell in cells):
            lines.append((number, [cell.strip() for cell in cells]))
    if not lines:
        return {}, wrong or ["it is empty; its first line must name the columns slide and path"]
    columns = lines[0][1]
    wrong += [f"line {lines[0][0]}: {fault}" for fault in _columns(columns)]
    if not {"slide", "path"} <= set(columns):
        return {}, wrong
    if len(lines) == 1 and not wrong:
        wrong.append("it lists no slide")
    rows: dict[str, SlideRow] = {}
    seen: dict[str, int] = {}
    models: dict[str, bool] = {}
    for number, cells in lines[1:]:
        told = []
        if len(cells) > len(columns):
            told.append(f"{len(cells)} cells for {len(columns)} columns")
        given = {name: cell for name, cell in zip(columns, cells, strict=False) if name in SlideRow.model_fields}
        values = {name: cell for name, cell in given.items() if cell or name in ("slide", "path")}
        told += [f"'{name}' is empty" for name in ("slide", "path") if not values.setdefault(name, "")]
        name = values["slide"]
        try:
            row = SlideRow.model_validate(values)
        except ValidationError as error:
            told += [_cell_fault(fault) for fault in error.errors() if fault["input"] != ""]
        else:
            rows[name] = row
        # Two ids that differ by case alone would be one folder on some file systems.
        if name and (first := seen.setdefault(name.lower(), number)) != number:
            told.append(f"slide '{name}' is on line {first} already")
        told += [
            f"{column} '{values[column]}' does not exist"
            for column in ("path", "roi")
            if check_files and values.get(column) and values[column] not in made and not _is_there(values[column])
        ]
        for column in ("path", "roi", "model"):
            told += _braces(column, values.get(column, ""))
        model = values.get("model")
        if check_files and model and not models.setdefault(model, _is_model(model)):
            told.append(_unknown_model(model))
        wrong += [f"line {number}: {fault}" for fault in told]
    return rows, wrong


def _columns(names: Sequence[str]) -> list[str]:
    known = list(SlideRow.model_fields)
    told = [f"column '{name}' is missing" for name in ("slide", "path") if name not in names]
    if told and len(names) == 1:
        told.append("cells must be parted by tabs")
    told += [f"column '{name}' is unknown; known are {', '.join(known)}" for name in names if name not in known]
    told += [f"column '{name}' is there {names.count(name)} times" for name in known if names.count(name) > 1]
    return told


def _cell_fault(fault: Any) -> str:
    column, value = fault["loc"][0], fault["input"]
    if column == "slide":
        return f"slide '{value}': only letters, digits and . _ - may be in it, and at most 128; no blanks, no slashes"
    if column == "mpp":
        return f"mpp '{value}' is not a number from 0.05 to 10 (µm per pixel, with a decimal point)"
    return f"{column} '{value}': {str(fault['msg']).lower()}"


def _as_options(settings: Config) -> dict[str, str]:
    return {
        section: "".join(
            f" --set {quote(f'{section}.{key}={json.dumps(value)}')}"
            for key, value in values.items()
            if value is not None
        )
        for section, values in settings.model_dump(mode="json").items()
    }


def _braces(name: str, path: str) -> list[str]:
    if not {"{", "}"} & set(path):
        return []
    return [f"{name} '{path}' has a brace, which Snakemake takes for a wildcard; rename or link the file"]


def _no_option(path: str) -> str:
    """A path that no command takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def _is_url(path: str) -> bool:
    return "://" in path


def _is_there(path: str) -> bool:
    return _is_url(path) or _is_file(Path(path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for any file, or with a zero in it
        return False


def _is_model(name: str) -> bool:
    """Whether weights of that name ship, or are a file; asked without torch."""
    return _is_file(Path(__file__).parent / "weights" / f"{name}.safetensors") or _is_file(Path(name))


def _unknown_model(name: str) -> str:
    shipped = sorted(path.stem for path in (Path(__file__).parent / "weights").glob("*.safetensors"))
    return f"model '{name}' is neither a shipped one ({', '.join(shipped) or 'none'}) nor a file"


def find_command() -> None:
    """See to it that `wsipipe` is found: where Snakemake was called by its path, it is beside this Python."""
    if shutil.which("wsipipe") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def lift_stale_locks(folder: Path) -> TextIO | None:
    """Remove Snakemake's locks if no Snakemake of this machine that made them is alive.

    Snakemake writes its locks as plain files, so a killed one leaves them behind. Every run holds a shared lock of the
    system on one more file; who gets it exclusively is alone, and the locks that are there are nobody's.

    Parameters
    ----------
    folder : Path
        Snakemake's own, ``.snakemake``.

    Returns
    -------
    file or None
        To be kept open as long as the run lasts. None where the file system has no such locks: then nothing is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "wsipipe.alive").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(file, fcntl.LOCK_SH)
        return file
    except OSError:
        file.close()
        return None
    file.seek(0)
    # Another machine's lock may not be visible here, whatever the file system says.
    ours, locks = file.read() in ("", socket.gethostname()), list((folder / "locks").glob("*.lock"))
    if ours:
        for lock in locks:
            log.warning("removing %s: the Snakemake that made it is not alive", lock)
            lock.unlink(missing_ok=True)
    if ours or not locks:  # else they are that machine's still when we are called again
        file.truncate(0)
        file.write(socket.gethostname())
        file.flush()
    fcntl.flock(file, fcntl.LOCK_SH)
    return file
