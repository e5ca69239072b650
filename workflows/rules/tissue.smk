rule tissue:
    input:
        slide_files,
    output:
        mask="results/{slide}/tissue.png",
        record="results/{slide}/tissue.png.json",
        slide="results/{slide}/slide.json",
    log:
        "logs/{slide}/tissue.log",
    benchmark:
        "logs/{slide}/tissue.benchmark.tsv"
    conda:
        "../envs/wsipipe.yaml"
    params:
        options=tissue_options,
    shell:
        "wsipipe tissue {params.options:q} --out results/{wildcards.slide} --unattended > {log} 2>&1"
