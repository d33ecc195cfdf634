#!/usr/bin/env bash
# Everything there is to know about this package on the GPU at hand, in one command and under nine minutes:
#
#     bash bench/gpu.sh [FOLDER]        # default: bench/results
#
# The environment, the GPU tests, errors and times at real sizes (bench/gpu.py) and a profile of the statistics kernel
# go into FOLDER/<device>-<date>.json. Needs no network; uses the PyTorch and Triton that python3 finds.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-bench/results}")
mkdir -p "$folder"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset TRITON_INTERPRET

python3 -c 'import tuned_lens_fast' 2>/dev/null ||
    python3 -m pip install -q --no-deps --no-build-isolation --editable . || exit 1

status=0
timeout 240 python3 -m pytest -m gpu tests/gpu -q --tb=short -p no:cacheprovider \
    --junitxml="$scratch/tests.xml" || status=$?
timeout 180 python3 bench/gpu.py --out "$scratch/measured.json" || status=$?
python3 bench/gpu_report.py "$scratch" "$folder" || status=$?
ncu=$(command -v ncu || ls -d /opt/nvidia/nsight-compute/*/ncu /usr/local/cuda/bin/ncu 2>/dev/null | tail -n 1)
if [ -n "$ncu" ]; then
    timeout 60 "$ncu" --clock-control none --kernel-name regex:_statistics --launch-skip 1 --launch-count 1 --csv \
        --metrics "$(python3 bench/profile_statistics.py --metrics)" \
        python3 bench/profile_statistics.py >"$scratch/profile.csv" 2>&1 ||
        tail -n 5 "$scratch/profile.csv"
    python3 bench/gpu_report.py "$scratch" "$folder" || status=$?
fi
exit "$status"
