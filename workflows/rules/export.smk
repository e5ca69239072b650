rule export:
    input:
        tissue="results/{slide}/tissue.png",
        nuclei="results/{slide}/nuclei.parquet",
    output:
        geojson="results/{slide}/nuclei.geojson.gz",
        record="results/{slide}/nuclei.geojson.gz.json",
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
        "wsipipe export {params.options:q} --out results/{wildcards.slide} --unattended > {log} 2>&1"
