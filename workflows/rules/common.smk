# What the rules share: the checked cohort, and the arguments of each stage's command.
#
# Each stage also writes a record beside its output, <output>.json. Rules do not declare it: it comes and goes with its
# output, and every file that a rule declares costs the plan of ten thousand slides a second or two.
import gc
from pathlib import Path

from snakemake.exceptions import WorkflowError

from wsipipe.cohort import SLIDE_ID, find_command, lift_stale_locks, load_cohort
from wsipipe.errors import ConfigError

DEMO_SLIDE = "demo/demo.svs"  # made by a rule, so it may be absent

gc.set_threshold(
    200_000, 50, 1000
)  # jobs are millions of objects that stay: looking for cycles takes a sixth of the time

find_command()
try:
    cohort = load_cohort(config, made=[DEMO_SLIDE])
except ConfigError as error:
    raise WorkflowError(str(error)) from None

alive = None
if workflow.is_main_process and not workflow.dryrun:
    alive = lift_stale_locks(Path(".snakemake"))  # kept open until this run ends


wildcard_constraints:
    slide=SLIDE_ID,


def slide_files(wildcards):
    return cohort.files(wildcards.slide)


def weights_files(wildcards):
    return cohort.weights(wildcards.slide)


def tissue_options(wildcards):
    return cohort.options("tissue", wildcards.slide)


def maps_options(wildcards):
    return cohort.options("maps", wildcards.slide)


def nuclei_options(wildcards):
    return cohort.options("nuclei", wildcards.slide)


def export_options(wildcards):
    return cohort.options("export", wildcards.slide)


def report_options(wildcards):
    return cohort.options("report", wildcards.slide)


def maps_store(path):
    """`maps.zarr` is a folder; it goes as soon as its nuclei are found if the settings say so."""
    return directory(path) if cohort.config.keep_maps else temp(directory(path))
