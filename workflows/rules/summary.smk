rule summary:
    input:
        sheet=cohort.config.slides,
        reports=expand("results/{slide}/report.html", slide=cohort.slides),
    output:
        table="results/summary.tsv",
        page=report("results/summary.html", caption="../report/summary.rst", category="Summary"),
        whole=touch("results/.summary.whole"),
    log:
        "logs/summary.log",
    benchmark:
        "logs/summary.benchmark.tsv"
    localrule: True
    conda:
        "../envs/wsipipe.yaml"
    shell:
        "wsipipe summary {input.sheet:q} > {log} 2>&1"


# The rule needs all slides. Where one failed the summary is written all the same, from what is there; then the rule's
# own sign that it speaks of all slides goes, or Snakemake would take that summary for one of the rule's.
onerror:
    Path("results/.summary.whole").unlink(missing_ok=True)
    shell("wsipipe summary {cohort.config.slides:q}")
