rule nuclei:
    input:
        slide=slide_files,
        maps="results/{slide}/maps.zarr",
    output:
        table="results/{slide}/nuclei.parquet",
    log:
        "logs/{slide}/nuclei.log",
    benchmark:
        "logs/{slide}/nuclei.benchmark.tsv"
    conda:
        "../envs/wsipipe.yaml"
    params:
        options=nuclei_options,
    shell:
        "wsipipe nuclei {params.options} --workers {threads}"
        " --out results/{wildcards.slide} --unattended > {log} 2>&1"
