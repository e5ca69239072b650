rule tissue:
    input:
        slide_files,
    output:
        mask="results/{slide}/tissue.png",
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
        "wsipipe tissue {params.options} --out results/{wildcards.slide} --unattended > {log} 2>&1"
