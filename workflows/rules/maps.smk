# An interrupted job leaves maps.zarr.partial, which is no output here and so is not removed: the next one goes on there.
rule maps:
    input:
        slide=slide_files,
        weights=weights_files,
        tissue="results/{slide}/tissue.png",
    output:
        maps=maps_store("results/{slide}/maps.zarr"),
    log:
        "logs/{slide}/maps.log",
    benchmark:
        "logs/{slide}/maps.benchmark.tsv"
    conda:
        "../envs/wsipipe.yaml"
    resources:
        gpu=1,
    params:
        options=maps_options,
    shell:
        "wsipipe maps {params.options} --device lease:{resources.gpu}"
        " --out results/{wildcards.slide} --unattended > {log} 2>&1"
