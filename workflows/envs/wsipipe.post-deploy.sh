#!/usr/bin/env bash
# Puts wsipipe itself into the environment; it runs in the folder that snakemake works in, which must be the clone.
set -euo pipefail
python -m pip install -c constraints.txt .
