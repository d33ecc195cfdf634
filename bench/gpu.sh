#!/usr/bin/env bash
# Everything there is to know about this package on the GPU at hand, in one command and under nine minutes:
#
#     bash bench/gpu.sh [FOLDER]        # default: bench/results/<device>-<date>
#
# The GPU tests, the comparisons of `bench/run.py --suite gpu` (errors, times, memory at real sizes) and a profile of
# the vocabulary pass go into FOLDER, a JSON file each, which bench/report.py renders; overlapped.txt there says
# whether kernels/overlapped.py works on this GPU, and its time beside the built-in tile's. Needs no network; uses the
# PyTorch and Triton that python3 finds. Run again with the same FOLDER, it goes on with what is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
folder=${1:-bench/results/$(python3 -c 'import time, torch
print(torch.cuda.get_device_name().replace("NVIDIA ", "").split()[0].lower(), time.strftime("%Y-%m-%d"), sep="-")')}
mkdir -p "$folder"
folder=$(realpath "$folder")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Installed where it is not, or where the native engine's kernels are not built.
(cd / && python3 -c 'import sys; from tuned_lens_fast.engines import native; sys.exit(bool(native.missing_on_cuda()))') ||
    timeout 90 python3 -m pip install -q --no-deps --no-build-isolation --editable . ||
    TUNED_LENS_FAST_NATIVE=0 python3 -m pip install -q --no-deps --no-build-isolation --editable . || exit 1

status=0
timeout 180 python3 -m pytest -m gpu tests/gpu --ignore=tests/gpu/test_overlapped.py -q --tb=short -p no:cacheprovider \
    --junitxml="$scratch/tests.xml" || status=$?
python3 bench/gpu_checks.py "$scratch" "$folder/gpu-checks.json" || status=$?
timeout 30 python3 bench/loss.py --preset llama-3-8b --positions 256 --dtype bfloat16 --rounds 3 --out "$folder/loss.json" ||
    status=$?
timeout 190 python3 bench/run.py --suite gpu --out "$folder" || status=$?
ncu=$(command -v ncu || ls -d /opt/nvidia/nsight-compute/*/ncu /usr/local/cuda/bin/ncu 2>/dev/null | tail -n 1)
if [ -n "$ncu" ]; then
    # Time, the busiest unit of the processors, issue slots, L2 and memory traffic, registers.
    metrics=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active,lts__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
    timeout 60 "$ncu" --clock-control none --kernel-name regex:_vocabulary_pass --launch-skip 1 --launch-count 1 --csv \
        --metrics "$metrics" python3 bench/run.py --preset llama-3-8b --layers 4 --positions 1024 --start head \
        --statistics log_prob,rank,entropy,top_10 --contenders triton --rounds 1 >"$scratch/profile.csv" 2>&1 ||
        tail -n 5 "$scratch/profile.csv"
    python3 bench/gpu_checks.py "$scratch" "$folder/gpu-checks.json" || status=$?
fi
# Last, and each in a process of its own: this kernel has run on no GPU, and may hang or fault.
if [ "$(python3 -c 'import torch; print(torch.cuda.get_device_capability()[0])')" = 9 ]; then
    {
        timeout 40 python3 -m pytest -m gpu tests/gpu/test_overlapped.py -q --tb=short -p no:cacheprovider || status=$?
        for shape in "640 262144" "576 49152"; do
            read -r d_model vocab <<<"$shape"
            timeout 25 python3 -m tuned_lens_fast.kernels.search --overlapped --d-model "$d_model" --vocab "$vocab" \
                --out "$scratch/tiles.json" || status=$?
        done
    } >"$folder/overlapped.txt" 2>&1
    tail -n 20 "$folder/overlapped.txt"
fi
exit "$status"
