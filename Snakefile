# A cohort of slides: snakemake --cores 8 --resources gpu=1
#
# Slides are listed in configs/slides.tsv, settings are in configs/wsipipe.yaml, threads and memory in
# workflows/profiles/. docs/cohort.md tells how to run, resume and read the results.
from snakemake.utils import min_version

min_version("9.5")


configfile: "configs/wsipipe.yaml"


include: "workflows/rules/common.smk"


# Not the summary alone: where slides failed it is there all the same, and they would not be tried again.
rule all:
    input:
        expand("results/{slide}/report.html", slide=cohort.slides),
        "results/summary.tsv",
        "results/summary.html",
        "results/.summary.whole",


include: "workflows/rules/summary.smk"
include: "workflows/rules/demo.smk"
include: "workflows/rules/tissue.smk"
include: "workflows/rules/maps.smk"
include: "workflows/rules/nuclei.smk"
include: "workflows/rules/export.smk"
include: "workflows/rules/report.smk"
