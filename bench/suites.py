"""The comparisons whose results are kept: what `run.py --suite` runs, a part at a time, each a command of its own."""

from __future__ import annotations

FULL = "log_prob,rank,entropy,kl,top_10"
EVERY = "log_prob,rank,entropy,max_prob,kl,reverse_kl,js,tv,top_10"
#: What one more statistic costs: questions that each hold the one before.
RUNGS = ("lse", "log_prob", "log_prob,entropy", "log_prob,entropy,rank", "log_prob,entropy,rank,top_10", FULL)
LADDER = "".join(f"--statistics {question} " for question in RUNGS)
#: Of these, time is a straight line in every size; kl costs two products a position whatever the number of layers.
#: The sweeps begin at 512 rows, a chunk of ours: with fewer the product itself is slower a row.
ONE_WALK = "log_prob,rank,entropy,top_10"
SWEPT = "--contenders product-tiles product-native native eager loop --together --rounds 15 --seconds 10 --least 5"
#: Two runs of a comparison agree where the rounds of all are many and spread over the same quarter of an hour.
SETTLED = "--together --rounds 30 --seconds 80 --patience 30"
QUICKLY = "--together --rounds 12 --seconds 60 --least 4 --patience 30"
SMOLLM2 = "run.py --preset smollm2-135m"
TOY = "tiny --layers 1 --vocabulary 330"
H100_SHAPES = "llama-3-8b qwen3-1.7b gemma-3-270m smollm2-135m"
#: What the native engine is held against: x given, and the product alone as a user would write it.
NATIVE = (
    "--contenders linear product product-tiles product-native native eager "
    "--rounds 12 --seconds 15 --within 0.03 --least 6"
)


def _gpu(
    shapes: str, largest: str, smallest: str, positions: tuple[int, int, int], rows: str, rounds: int
) -> dict[str, str]:
    """The comparisons of bench/gpu.sh: presets and their options, few, many and most positions, few rows."""
    few, many, most = positions
    presets, walked = shapes.partition(" --")[0], f"--start head --rounds {rounds} --least 1 --seconds 1.5"
    return {
        "ladder": f"run.py --preset {shapes} {walked} --queued --positions {few} {many} {LADDER}"
        "--contenders product triton scratch cut-cross-entropy liger-kernel",
        "ladder-again": f"run.py --preset {shapes} {walked} --queued --positions {few} {LADDER}"
        "--contenders product triton",
        "every-statistic": f"run.py --preset {shapes} {walked} --positions {few} --statistics {EVERY} --sample 48 "
        "--contenders product triton",
        "native-engine": f"run.py --preset {shapes} {walked} --positions {few} --statistics {FULL} "
        "--contenders product triton native",
        "kl-errors": f"run.py --preset {largest} {walked} --positions {few} --statistics {FULL} --sample 96 "
        "--contenders product triton",
        "memory": f"run.py --preset {largest} --rounds 1 --least 1 --positions {most} --statistics {FULL} "
        "--contenders product triton",
        "loss": f"loss.py --preset {largest.split()[0]} --positions {few} --dtype bfloat16 --rounds 3",
        "loss-few-features": f"loss.py --preset {smallest.split()[0]} --positions {few} --dtype bfloat16 --rounds 3",
        "small-decodes": f"small_decodes.py --preset {presets} --rows {rows} --rounds {3 * rounds}",
    }


#: Suite -> part -> the script and its arguments.
SUITES: dict[str, dict[str, str]] = {
    "native": {
        "tuned-lens": f"{SMOLLM2} --weights real --positions 256 --statistics {FULL} "
        "--contenders product product-tiles product-native native eager loop tuned-lens",
        "fp32": f"{SMOLLM2} --start head --positions 256 --statistics {FULL} {NATIVE}",
        "bf16": f"{SMOLLM2} --start head --positions 32 --dtype bfloat16 --statistics {FULL} {NATIVE}",
        "few-rows": f"{SMOLLM2} --start head --layers 1 --positions 1 8 32 --statistics {ONE_WALK} --statistics {FULL} "
        "--contenders read linear product-native native --rounds 30 --seconds 3",
        "one-thread": f"run.py --threads 1 2 --together --preset smollm2-135m --start head --layers 4 --positions 256 "
        f"--statistics {ONE_WALK} {NATIVE}",
        "gemma-3-270m": f"run.py --preset gemma-3-270m --start head --positions 1024 --statistics {FULL} "
        "--contenders linear product-tiles native --rounds 1 --least 1",
    },
    "cpu": {
        "smollm2-135m": f"{SMOLLM2} --weights real --positions 8 16 32 --statistics {FULL} {SETTLED}",
        "gemma-3-270m": f"run.py --preset gemma-3-270m --positions 4 8 16 --statistics {FULL} {QUICKLY}",
        "one-statistic": f"{SMOLLM2} --positions 32 --statistics log_prob --statistics log_prob,entropy {QUICKLY}",
        "every-statistic": f"{SMOLLM2} --positions 32 --statistics {EVERY} "
        f"--contenders product product-tiles product-native native eager loop {QUICKLY}",
        "positions": f"{SMOLLM2} --layers 4 --positions 128 256 512 1024 2048 --statistics {ONE_WALK} {SWEPT}",
        "layers": f"{SMOLLM2} --layers 8 16 32 64 --positions 64 --statistics {ONE_WALK} {SWEPT}",
        "vocabulary": f"{SMOLLM2} --layers 4 --positions 128 --vocabulary 16384 32768 65536 131072 262144 "
        f"--statistics {ONE_WALK} {SWEPT}",
        "profile": "profile_decode.py --preset smollm2-135m --weights real --positions 32",
    },
    "gpu": {
        **_gpu(H100_SHAPES, "llama-3-8b", "smollm2-135m", (1024, 4096, 8192), "1 8 64", 6),
        "gemma-3-270m": f"run.py --preset gemma-3-270m --positions 256 1024 4096 --statistics {FULL} --rounds 5",
        "profile": "profile_decode.py --preset llama-3-8b --positions 1024 --ceiling-mib 2048",
    },
    # The same at toy sizes: what bench/gpu.sh runs without a GPU, so that no mistyped word takes the time of one.
    "rehearsal": _gpu(TOY, TOY, "tiny", (2, 3, 2), "1 2", 1),
    "training": {
        "kl": "loss.py --weights real --loss kl --rounds 3",
        "ce": "loss.py --weights real --loss ce --rounds 3",
        "few-mib": "loss.py --budget-mib 8 --rounds 2",
        "linear_cross_entropy": "loss.py --positions 16 --loss ce --with-linear-cross-entropy --rounds 3",
    },
    # `make bench`: small, so that all of it takes a minute or two, and with one floor, so that two runs compare.
    "quick": {
        "walk": f"{SMOLLM2} --start head --layers 8 --vocabulary 16384 --positions 64 {LADDER}--statistics {EVERY} "
        "--contenders product-tiles triton native eager --together --rounds 15 --seconds 2",
        "decode": f"{SMOLLM2} --layers 8 --vocabulary 16384 --positions 1 16 64 --statistics {FULL} --together "
        "--contenders product-tiles triton native eager --rounds 15 --seconds 2",
    },
}
