#!/usr/bin/env bash
# All there is to know about this package on the GPU at hand, in three calls of at most 8, 9 and 7 minutes:
#
#     bash bench/gpu.sh 1|2|3 [FOLDER]      # default: $OUT, or else bench/results/<device>-<date>
#
# 1  which kernels of the vocabulary pass work and how long each takes over torch.mm, KL's errors, counters
# 2  the GPU tests, the ladder of statistics with the tiles that 1 found fastest, memory at 32 x 8,192
# 3  a part of the ladder again, the native engine, losses with gradients, decodes of few rows, every statistic
#
# Every step has a limit of its own, those least known come first, and what a step finds is in FOLDER as soon as it is
# known, at most eight files a call: logs, JSON that bench/report.py renders, tiles.json, and Triton's cache. Put what
# came back into .gpu/ (which git ignores) for the next call, on another machine too. No network is needed; Python is
# $PYTHON, or else python3. LIST=1 prints the steps and their limits, ONLY="NAME ..." runs those alone.
# REHEARSE=1 runs them without a GPU, at toy sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:-}
case $call in 1 | 2 | 3) ;; *) echo "usage: bash bench/gpu.sh 1|2|3 [FOLDER]" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
suite=gpu shapes="llama-3-8b qwen3-1.7b gemma-3-270m smollm2-135m" largest=llama-3-8b smallest=smollm2-135m
small="--layers 1 --positions 128" counted="--layers 4 --positions 1024" workers=8
at_once=16 rounds=12 patience=1
if [ -n "${REHEARSE:-}" ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH="$PWD/bench/rehearsal:$PYTHONPATH"
    suite=rehearsal shapes=tiny largest=tiny smallest=tiny small="--layers 1 --positions 2 --vocabulary 330" counted=$small
    workers=0 at_once=1 rounds=1 patience=20
fi
if [ -n "${LIST:-}" ]; then
    folder=FOLDER scratch=SCRATCH ncu=ncu sanitizer=compute-sanitizer
else
    folder=${2:-${OUT:-bench/results/$($python -c 'import time, torch
print(torch.cuda.get_device_name().replace("NVIDIA ", "").split()[0].lower(), time.strftime("%Y-%m-%d"), sep="-")')}}
    mkdir -p "$folder" && folder=$(realpath "$folder")
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    ncu=$(command -v ncu || ls -d /opt/nvidia/nsight-compute/*/ncu /usr/local/cuda/bin/ncu 2>/dev/null | tail -n 1)
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    # Triton's cache names its files by their whole paths, so that it lies in the same place on every machine.
    export TRITON_CACHE_DIR=/tmp/tuned-lens-fast-triton
    mkdir -p $TRITON_CACHE_DIR
    [ -f .gpu/triton.tar.gz ] && tar -xzf .gpu/triton.tar.gz -C $TRITON_CACHE_DIR
fi
log=$folder/log-$call.txt
status=0

step() { # NAME SECONDS COMMAND...: runs it, says how it went, and keeps what it prints.
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    [[ -z ${ONLY:-} || " $ONLY " == *" $name "* ]] || return 0
    [ -n "${LIST:-}" ] && printf '%s\t%s\t%s\n' "$name" "$limit" "$*" && return 0
    printf '\n== %s (%s s at most): %s\n' "$name" "$limit" "$*" >>"$log"
    timeout --kill-after=5 "$((limit * patience))" "$@" >>"$log" 2>&1
    code=$?
    tail -n 4 "$log" | cut -c 1-160
    echo "== $name: $([ $code = 0 ] && echo done || echo "FAILED ($code)") in $((SECONDS - begin)) s" | tee -a "$log"
    [ $code = 0 ] || status=$code
    return $code
}

bench() { step "$1" "$2" "$python" "bench/$3.py" "${@:4}"; }

part() { # NAME SECONDS: of run.py's suite for GPUs.
    TUNED_LENS_FAST_TILES=$tiles bench "$1" "$2" run --suite $suite --part "$1" --out "$folder"
}

install() { # The native engine takes a minute to build, and only the third call measures it.
    if [ -n "${REHEARSE:-}" ]; then
        step install "$2" "$python" -c "import tuned_lens_fast"
    else
        TUNED_LENS_FAST_NATIVE=$1 step install "$2" \
            "$python" -m pip install -q --no-deps --no-build-isolation --editable .
    fi
}

pack() { # What the next call would have to compile again: the machine code alone.
    step pack 15 tar -czf "$folder/triton.tar.gz" -C "${TRITON_CACHE_DIR:-CACHE}" \
        --exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' --exclude='*.ptx' --exclude='*.source' .
}

found_before() { # NAME: a file of an earlier call.
    if [ -f "$folder/$1" ] || [ ! -f ".gpu/$1" ]; then echo "$folder/$1"; else realpath ".gpu/$1"; fi
}

tiles=$(found_before tiles.json)
[ -n "${LIST:-}" ] || [ -f "$tiles" ] || echo '{}' >"$tiles"

if [ "$call" = 1 ]; then
    install 0 30
    # Compiled side by side, a process each: the kernels of the pass, and whole decodes of every question.
    jobs=
    for shape in $shapes; do
        for kernel in vocabulary_pass overlapped cooperative; do
            jobs+="bench/vocabulary_kernels.py compile --preset $shape --kernel $kernel"$'\n'
        done
        for asked in lse log_prob,entropy log_prob,entropy,rank,top_10 log_prob,rank,entropy,kl,top_10; do
            jobs+="bench/run.py --preset $shape --start head $small --statistics $asked --contenders product triton "
            jobs+="--rounds 1 --least 1 --sample 1"$'\n'
        done
    done
    step compile 75 xargs -P $at_once -L 1 "$python" <<<"${jobs%$'\n'}"
    kernels=vocabulary_pass
    for kernel in overlapped cooperative; do
        if bench "check-$kernel" 25 vocabulary_kernels check --kernel $kernel; then
            kernels+=" $kernel"
        elif [ -n "$sanitizer" ]; then
            step "memcheck-$kernel" 25 "$sanitizer" --tool memcheck "$python" bench/vocabulary_kernels.py check --kernel $kernel \
                --count 1 --merged 1
        fi
    done
    bench time 90 vocabulary_kernels time --preset $shapes --kernel $kernels --rounds $rounds \
        --tiles "$tiles" --out "$folder/kernels.json"
    part kl-errors 35
    bench parts 35 vocabulary_kernels parts --preset $shapes --out "$folder/parts.json"
    bench alone 35 vocabulary_kernels time --alone --preset $shapes --kernel $kernels --rounds $rounds \
        --out "$folder/kernels.json"
    for shape in $largest $smallest; do
        profiler=()
        [ -n "$ncu" ] && [ -z "${REHEARSE:-}" ] && profiler=("$ncu" --clock-control none --csv --print-details all
            --kernel-name "regex:_vocabulary_pass|_overlapped|_cooperative" --launch-skip 1 --launch-count 1
            --section SpeedOfLight --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis
            --section WarpStateStats --section LaunchStats --log-file "$scratch/$shape.csv")
        TUNED_LENS_FAST_TILES=$tiles step "counters-$shape" 30 ${profiler[@]+"${profiler[@]}"} "$python" bench/run.py \
            --preset "$shape" $counted --start head --statistics log_prob,rank,entropy,top_10 --contenders triton \
            --rounds 1 --least 1
    done
    bench counters 10 gpu_checks "$scratch" "$folder/counters.json"
    pack
fi

if [ "$call" = 2 ]; then
    install 0 30
    tests=("$python" -m pytest -m gpu -n $workers -q --tb=short -p no:cacheprovider)
    step tests 105 "${tests[@]}" tests/gpu --ignore=tests/gpu/test_hopper.py --junitxml="$scratch/tests.xml"
    step tests-hopper 40 "${tests[@]}" tests/gpu/test_hopper.py # whose kernels had never run when this was written
    bench gpu-checks 10 gpu_checks "$scratch" "$folder/gpu-checks.json"
    part ladder 275
    part memory 60
    pack
fi

if [ "$call" = 3 ]; then
    install 1 90
    part small-decodes 30
    part loss 45
    part loss-few-features 30
    part ladder-again 110
    step compare 10 "$python" bench/run.py --compare "$(found_before ladder.json)" "$folder/ladder-again.json"
    part native-engine 40
    part every-statistic 50
fi
exit "$status"
