rule export:
    input:
        tissue="results/{slide}/tissue.png",
        nuclei="results/{slide}/nuclei.parquet",
    output:
        geojson="results/{slide}/nuclei.geojson.gz",
        picture="results/{slide}/overlay.png",
    log:
        "logs/{slide}/export.log",
    benchmark:
        "logs/{slide}/export.benchmark.tsv"
    conda:
        "../envs/wsipipe.yaml"
    params:
        options=export_options,
    shell:
        "wsipipe export {params.options} --out results/{wildcards.slide} --unattended > {log} 2>&1"
