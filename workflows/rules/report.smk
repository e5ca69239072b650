rule report:
    input:
        # The other stages' files are older than these: the record of the last stage and what it was made of.
        nuclei="results/{slide}/nuclei.parquet",
        export="results/{slide}/nuclei.geojson.gz.json",
    output:
        page=report(
            "results/{slide}/report.html",
            caption="../report/slide.rst",
            category="Slides",
            labels={"slide": "{slide}"},
        ),
        record="results/{slide}/report.html.json",
    log:
        "logs/{slide}/report.log",
    benchmark:
        "logs/{slide}/report.benchmark.tsv"
    conda:
        "../envs/wsipipe.yaml"
    params:
        options=report_options,
    shell:
        "wsipipe report {params.options:q} --out results/{wildcards.slide} --unattended > {log} 2>&1"
