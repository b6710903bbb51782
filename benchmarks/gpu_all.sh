#!/bin/sh
# Everything that wants an NVIDIA card, in one go: the tests, then every claim of one H100. Records go to benchmarks/results/gpu.jsonl.
# From the project's folder, with torch, triton, transformers, kernels, matplotlib and pytest there: sh benchmarks/gpu_all.sh [folder for a checkpoint of 14 GB]
export PYTHONPATH=src:benchmarks PYTHONUNBUFFERED=1
python3 -m pytest -q -m gpu tests/gpu -p no:cacheprovider --timeout 200 -n 8
python3 benchmarks/gpu_speed.py 20b
python3 benchmarks/gpu_load.py 20b --folder "${1:-/dev/shm}"
python3 benchmarks/gpu_logits.py 20b --folder "${1:-/dev/shm}"
python3 benchmarks/gpu_speed.py llama8b
python3 benchmarks/gpu_speed.py qwen30b
python3 benchmarks/hub_kernel.py
python3 benchmarks/page.py
