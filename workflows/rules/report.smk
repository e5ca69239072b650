rule report:
    input:
        # Of the files that it reads, those that no other of them is made of.
        nuclei="results/{slide}/nuclei.parquet",
        export="results/{slide}/nuclei.geojson.gz",
    output:
        page=report(
            "results/{slide}/report.html",
            caption="../report/slide.rst",
            category="Slides",
            labels={"slide": "{slide}"},
        ),
    log:
        "logs/{slide}/report.log",
    benchmark:
        "logs/{slide}/report.benchmark.tsv"
    conda:
        "../envs/wsipipe.yaml"
    params:
        options=report_options,
    shell:
        "wsipipe report {params.options} --out results/{wildcards.slide} --unattended > {log} 2>&1"
