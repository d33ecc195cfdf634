"""Every kernel compiled for GPUs this machine does not have, held to limits, and the static model's forecast.

With TRITON_36_PATH naming a folder that holds Triton 3.6.0, the same limits are held there too.
"""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from compiling import SHARED_LIMIT, compile_launches, meta

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import static

ROWS, VOCAB = 8192, 128_257  # a vocabulary with both kinds of tail
EVEN_VOCAB = 131_072
TRITONS = {"installed": None}
if os.environ.get("TRITON_36_PATH"):
    TRITONS["3.6"] = os.environ["TRITON_36_PATH"]
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
#: Loads and stores of spilled registers: none but in the pass over two tiles and, by newer Tritons than 3.6, in two
#: groups of warps that take turns; once a tile.
SPILLS = {"_divergence_pass": 64, "_overlapped": 192}
PRODUCTS = {"_translate", "_vocabulary_pass", "_overlapped", "_cooperative", "_target_logits", "_divergence_pass"}


def head(d_model, dtype, vocab=VOCAB):
    from tuned_lens_fast.engines.interface import Head

    return meta(ROWS, d_model, dtype=dtype), Head(meta(vocab, d_model, dtype=dtype))


def closed(rows):
    """The state of rows, as a vocabulary pass leaves it."""
    from tuned_lens_fast.engines.state import State

    return State(*(meta(rows, dtype="float32") for _ in range(3)), log_s=meta(rows, dtype="float32"))


def tile_for(x, precision="ieee"):
    from tuned_lens_fast.kernels.launch import built_in_tile, merged_tiles

    tile = built_in_tile(torch.cuda.get_device_capability(), x.dtype, x.shape[1], precision)
    return replace(tile, merged=merged_tiles(VOCAB, tile, 10, x.shape[1] * x.element_size()), precision=precision)


def translate(d_model, dtype, precision="ieee"):
    from tuned_lens_fast.kernels.translate import translate

    h, weight, bias = meta(ROWS, d_model, dtype=dtype), meta(d_model, d_model, dtype=dtype), meta(d_model)
    translate(h, weight, bias, precision=precision)


def normalize(d_model, kind):
    from tuned_lens_fast.engines.interface import Norm
    from tuned_lens_fast.kernels.norm import normalize

    norm = Norm(kind, meta(d_model), meta(d_model), eps=1e-5, unit_offset=True)
    normalize(meta(ROWS, d_model, dtype="float32"), norm, meta(ROWS, d_model))


def overlapped(d_model, dtype="bfloat16", vocab=EVEN_VOCAB, **asked):
    from tuned_lens_fast.kernels.launch import merged_tiles
    from tuned_lens_fast.kernels.search import overlapped_candidates

    tile = next(overlapped_candidates(d_model))
    tile = replace(tile, merged=merged_tiles(vocab, tile, 10, 2 * d_model))
    statistics(d_model, dtype, vocab=vocab, tile=tile, **asked)


def cooperative(d_model, depth):
    from tuned_lens_fast.kernels.launch import merged_tiles
    from tuned_lens_fast.kernels.search import cooperative_candidates

    tile = next(tile for tile in cooperative_candidates(d_model) if tile.block_depth == depth)
    tile = replace(tile, merged=merged_tiles(EVEN_VOCAB, tile, 10, 2 * d_model))
    statistics(d_model, "bfloat16", tile=tile)


def statistics(
    d_model, dtype, everything=True, softcap=None, bias=False, precision="ieee", vocab=EVEN_VOCAB, tile=None
):
    from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass

    x, of_model = head(d_model, dtype, vocab)
    of_model = replace(of_model, bias=meta(vocab, dtype=dtype) if bias else None, softcap=softcap)
    vocabulary_pass(
        x, of_model, tile or tile_for(x, precision), target_logits=meta(ROWS, dtype="float32") if everything else None,
        running="tr" if everything else "", group_maxima=everything,
    )  # fmt: skip


def target(d_model, dtype):
    from tuned_lens_fast.kernels.target_logits import target_logits

    x, of_model = head(d_model, dtype)
    target_logits(x, of_model, meta(ROWS, dtype="int64"), tile_for(x))


def top(k, few=0):
    from tuned_lens_fast.kernels.launch import Partition
    from tuned_lens_fast.kernels.top_k import of_every_logit, top_k

    x, of_model = head(4096, "bfloat16")
    tile = tile_for(x)
    group_maxima = meta(ROWS, 2, Partition.of(ROWS, of_model, tile).slots, dtype="float32")
    found = top_k(x, of_model, group_maxima, closed(ROWS), k, tile)
    if few:
        of_every_logit(x[:few], of_model, found, tile)


def identity():
    from tuned_lens_fast.kernels.divergence import Expectation, kl_by_identity

    for parts in (1, 2) if torch.cuda.get_device_capability() == (9, 0) else (2,):
        expectation = Expectation(256, 4096, torch.device("meta"), parts)
        expectation.add(meta(256, 8192, dtype="float32"), meta(8192, 4096), lambda a, b: (a @ b).float())
    of_reference = expectation.state()
    kl_by_identity(meta(ROWS, 4096), meta(256, 4096), of_reference.u, closed(ROWS), of_reference)


def divergences(dtype):
    from tuned_lens_fast.engines.statistics import DIVERGENCES
    from tuned_lens_fast.kernels.divergence import divergence_pass

    x, of_model = head(4096, dtype)
    of_model = replace(of_model, softcap=30.0)
    divergence_pass(x, meta(256, 4096, dtype=dtype), of_model, closed(ROWS), closed(256), DIVERGENCES, tile_for(x))


@triton.jit
def _serialised(x, w, out, steps, BM: tl.constexpr, BK: tl.constexpr, SPOILED: tl.constexpr):
    row, k = tl.arange(0, BM), tl.arange(0, BK)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BM), tl.float32)
    for step in range(steps):
        at = row[:, None] * 4096 + (step % 64 * BK + k)[None, :]
        acc = tl.dot(tl.load(x + at), tl.load(w + at).T, acc)
        if step % 64 == 63:
            z = acc
            if SPOILED and step > steps - 5:
                z = tl.where((row < steps)[None, :], acc, -1e30)
            total += tl.sum(tl.exp2(z), 1)
            acc = tl.zeros((BM, BM), tl.float32)
    tl.store(out + row, total)


def mask_under_a_branch(spoiled):
    x, w, out = meta(128, 4096), meta(128, 4096), meta(128, dtype="float32")
    _serialised[(1,)](x, w, out, 640, BM=128, BK=64, SPOILED=spoiled)


@dataclass(frozen=True)
class Case:
    """A launch, the registers its kernels may take on each architecture, and whether matrix units serve."""

    launch: Callable[[], None]
    registers: dict[int, int]
    matrix: bool = True
    spills: int = 0  #: more than elsewhere: a softcap's exponentials beside all else, once a tile


ANY = {80: 255, 90: 255, 100: 255}
CASES = {
    "translate bf16": Case(lambda: translate(4096, "bfloat16"), {80: 192, 90: 168, 100: 168}),
    "translate fp16, d 576": Case(lambda: translate(576, "float16"), {80: 192, 90: 168, 100: 168}),
    "translate bf16, d 577": Case(lambda: translate(577, "bfloat16"), {80: 176, 90: 176, 100: 176}),
    "translate fp32": Case(lambda: translate(4096, "float32"), {80: 232, 90: 224, 100: 216}, matrix=False),
    "translate fp32, d 577": Case(lambda: translate(577, "float32"), {80: 232, 90: 216, 100: 216}, matrix=False),
    "translate tf32": Case(lambda: translate(4096, "float32", "tf32"), {80: 200, 90: 168, 100: 208}),
    "normalize d 64": Case(lambda: normalize(64, "layer"), {80: 48, 90: 48, 100: 48}),
    "normalize d 577": Case(lambda: normalize(577, "rms"), {80: 48, 90: 48, 100: 48}),
    "normalize d 16384": Case(lambda: normalize(16_384, "layer"), {80: 48, 90: 48, 100: 48}),
    "statistics bf16": Case(lambda: statistics(4096, "bfloat16", vocab=VOCAB), ANY),
    "statistics bf16, d 2048": Case(lambda: statistics(2048, "bfloat16"), {90: 255}),
    "statistics bf16, d 576": Case(lambda: statistics(576, "bfloat16"), ANY),
    "statistics bf16, d 577": Case(lambda: statistics(577, "bfloat16"), ANY),
    "statistics bf16, lse": Case(lambda: statistics(4096, "bfloat16", everything=False), ANY),
    "statistics fp16, softcap, bias": Case(
        lambda: statistics(2304, "float16", softcap=30.0, bias=True), ANY, spills=16
    ),
    "statistics fp32": Case(lambda: statistics(768, "float32"), ANY, matrix=False),
    "statistics tf32": Case(lambda: statistics(768, "float32", precision="tf32"), ANY),
    "overlapped bf16, d 640": Case(lambda: overlapped(640, vocab=262_144), {90: 168}),
    "overlapped bf16, d 576": Case(lambda: overlapped(576, vocab=49_152), {90: 168}),
    "overlapped bf16, d 576, lse": Case(lambda: overlapped(576, everything=False), {90: 168}),
    "overlapped fp16, d 768, softcap, bias": Case(
        lambda: overlapped(768, "float16", VOCAB, softcap=30.0, bias=True), {90: 255}, spills=288
    ),
    "cooperative bf16": Case(lambda: cooperative(4096, 64), {90: 168}),
    "cooperative bf16, d 2048": Case(lambda: cooperative(2048, 32), {90: 168}),
    "target bf16": Case(lambda: target(4096, "bfloat16"), ANY),
    "target fp32": Case(lambda: target(768, "float32"), ANY, matrix=False),
    "top 10": Case(lambda: top(10, few=64), ANY),
    "top 64": Case(lambda: top(64), ANY),
    "identity": Case(identity, ANY),
    "divergences bf16": Case(lambda: divergences("bfloat16"), ANY),
    "divergences fp32": Case(lambda: divergences("float32"), ANY, matrix=False),
}
CONTROLS = {f"control {spoiled}": functools.partial(mask_under_a_branch, spoiled) for spoiled in (False, True)}
LAUNCHES = {name: case.launch for name, case in CASES.items()} | CONTROLS


@functools.cache
def reports(version):
    jobs = [(name, architecture) for name, case in CASES.items() for architecture in case.registers]
    jobs += [(name, 90) for name in CONTROLS]
    return compile_launches(__file__, jobs, TRITONS[version])


def compiled(name, architecture, version):
    answer = reports(version)[name, architecture]
    if isinstance(answer, str):
        pytest.fail(f"does not compile:\n{answer}")
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITONS)
@pytest.mark.parametrize(("name", "architecture"), [(n, a) for n, case in CASES.items() for a in case.registers])
def test_limits(name, architecture, version):
    case = CASES[name]
    for report in compiled(name, architecture, version):
        assert report.registers <= case.registers[architecture]
        assert report.shared <= SHARED_LIMIT[architecture]
        if not report.constants.get("MASK"):  # the tail is one tile of thousands, and its masks may spill
            allowed = 0 if (report.kernel, version) == ("_overlapped", "3.6") else SPILLS.get(report.kernel, 0)
            assert report.spills <= max(allowed, case.spills), f"{report.kernel} spills"
        if report.kernel in PRODUCTS and case.matrix:
            assert report.matrix.get(MATRIX[architecture], 0) > 0
        assert not report.serialised
        if report.constants.get("RANK") and report.kernel in PRODUCTS:
            assert "FFMA.SAT" in report.sass


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITONS)
@pytest.mark.parametrize("d_model", [576, 640])
def test_shared_memory_is_as_foreseen(d_model, version):
    from tuned_lens_fast.kernels.overlapped import shared_bytes
    from tuned_lens_fast.kernels.search import overlapped_candidates

    found = compiled(f"overlapped bf16, d {d_model}", 90, version)[0].shared
    assert 0 <= found - shared_bytes(next(overlapped_candidates(d_model)), d_model) <= 1024


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITONS)
def test_serialised_products_are_seen(version):
    (plain,), (spoiled,) = (compiled(name, 90, version) for name in CONTROLS)
    assert plain.matrix["HGMMA"] > 0
    assert not plain.serialised
    assert spoiled.serialised


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITONS)
@pytest.mark.parametrize(("name", "d_model", "most", "of"), [
    ("statistics bf16", 4096, 1.10, "serial"),
    ("statistics bf16, d 2048", 2048, 1.15, "serial"),
    ("cooperative bf16", 4096, 1.05, "overlapped"),
    ("cooperative bf16, d 2048", 2048, 1.08, "overlapped"),
    ("overlapped bf16, d 640", 640, 1.15, "overlapped"),
    ("overlapped bf16, d 576", 576, 1.15, "overlapped"),
])  # fmt: skip
def test_predicted_cost_of_all_statistics(name, d_model, most, of, version):
    """lse, entropy, log_prob, rank and the top k's candidates over the product."""
    main = compiled(name, 90, version)[0]
    tile = (main.constants[dimension] for dimension in ("BM", "BN", "BK"))
    prediction = static.predict(main, *tile, d_model, 90)
    assert 8 < prediction.instructions_per_logit < 16
    assert 1 <= prediction.overlapped <= getattr(prediction, of) <= most
