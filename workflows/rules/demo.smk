rule demo:
    output:
        DEMO_SLIDE,
    log:
        "logs/demo-slide.log",
    benchmark:
        "logs/demo-slide.benchmark.tsv"
    localrule: True
    conda:
        "../envs/wsipipe.yaml"
    shell:
        "wsipipe demo --slide-only > {log} 2>&1"
