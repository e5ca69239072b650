#!/usr/bin/env bash
# Puts wsipipe itself into the environment; run in the clone that snakemake was called in.
set -euo pipefail
python -m pip install -c constraints.txt .
