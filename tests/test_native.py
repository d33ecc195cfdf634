"""The native engine's operators and build: what the comparisons with float64 in test_cpu_engines.py do not cover."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tuned_lens_fast.engines import ENGINES, choose, native
from tuned_lens_fast.engines.interface import Head, Norm, Query, Readout
from tuned_lens_fast.engines.state import NO_KEY
from tuned_lens_fast.engines.statistics import STATISTICS

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"no native engine here: {native.MISSING}")


def problem(seed=0, layers=2, positions=40, d_model=24, vocab=700):
    g = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(positions, d_model, generator=g) for _ in range(layers)]
    head = Head(torch.randn(vocab, d_model, generator=g))
    reference = torch.randn(positions, d_model, generator=g)
    targets = torch.randint(0, vocab, (positions,), generator=g)
    return hidden, head, Query(frozenset(STATISTICS), targets, reference, torch.tensor([1, 5]), 7)


def decode(hidden, head, query):
    return ENGINES["native"].decode(hidden, Readout([None] * len(hidden), Norm("identity"), head), query, 2**26)


def assert_same(found, wanted):
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_auto_takes_it_on_a_cpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert choose("auto", CPU, dtype).name == "native"
    assert "runs on CPUs and NVIDIA GPUs" in ENGINES["native"].unavailable(torch.device("mps"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    assert "sees no NVIDIA GPU" in ENGINES["native"].unavailable(torch.device("cuda"))


def test_a_library_older_than_the_package_is_named():
    assert native._load("_native", "", ("tile_pass",)) is None
    assert "is older than the package; reinstall" in native._load("_native", "", ("tile_pass", "not_there_yet"))


def arguments(rows=5, width=70, k=3):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(rows, width, generator=g)
    targets = torch.randint(0, 2 * width, (rows,), generator=g)
    return {
        "z": z,
        "first": 10,
        "targets": targets,
        "threshold": torch.randn(rows, generator=g),
        "sums": torch.tensor([[0.0, 1.0, 0.0]]).repeat(rows, 1),
        "r": torch.zeros(rows, dtype=torch.int64),
        "target": torch.zeros(rows),
        "top": torch.full((rows, k), NO_KEY),
        "rescale": torch.zeros(rows),
    }


@pytest.mark.parametrize("left_out", [(), ("targets", "threshold", "r", "target", "top", "rescale"), ("threshold",)])
def test_opcheck_tile_pass(left_out):
    values = arguments() | dict.fromkeys(left_out)
    torch.library.opcheck(torch.ops.tuned_lens_fast.tile_pass.default, tuple(values.values()))


def test_opcheck_tile_divergences():
    normalisers = torch.randn(2, 3), torch.randn(2, 6)
    values = (torch.randn(3, 50), torch.randn(6, 50), *normalisers, True, torch.zeros(4, 6))
    torch.library.opcheck(torch.ops.tuned_lens_fast.tile_divergences.default, values)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("z", torch.randn(70, 5).t()),
        ("z", torch.randn(5, 70, dtype=torch.float64)),
        ("sums", torch.zeros(4, 3)),
        ("sums", torch.zeros(5, 4)),
        ("sums", torch.zeros(5, 6)[:, ::2]),
        ("targets", torch.zeros(5, dtype=torch.int32)),
        ("top", torch.full((5, 6), NO_KEY)[:, ::2]),
    ],
)
def test_operands_that_do_not_fit_are_refused(name, bad):
    with pytest.raises(RuntimeError):
        torch.ops.tuned_lens_fast.tile_pass(*(arguments() | {name: bad}).values())


def test_a_decode_compiles_without_a_graph_break():
    hidden, head, query = problem()
    compiled = torch.compile(lambda *h: decode(list(h), head, query), fullgraph=True, backend="aot_eager")
    for name, value in decode(hidden, head, query).items():
        torch.testing.assert_close(compiled(*hidden)[name], value, msg=name)


def test_the_number_of_threads_changes_nothing():
    # PyTorch's own products may be summed in another order by more threads; what is made of z may not.
    z = torch.randn(201, 3001)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            values = arguments(201, 3001) | {"z": z.clone()}
            torch.ops.tuned_lens_fast.tile_pass(*values.values())
            found.append(values)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, {name: value for name, value in found[0].items() if isinstance(value, torch.Tensor)})


def test_many_threads_at_once():
    problems = [problem(seed, positions=17 + seed) for seed in range(8)]
    alone = [decode(*p) for p in problems]
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        return [decode(*problems[i]) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        for wanted, rounds in zip(alone, pool.map(work, range(8)), strict=True):
            for found in rounds:
                assert_same(found, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_decodes():
    hidden, head, query = problem()
    wanted = decode(hidden, head, query)
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # as PyTorch asks of forked children
        found = decode(hidden, head, query)
        os._exit(0 if all(torch.allclose(found[name], value, atol=1e-5) for name, value in wanted.items()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["plain", "avx2"])
def test_older_processors(processor):
    """The code for each instruction set is there whatever the processor; the most it may use can be lowered."""
    tests = [os.path.join(os.path.dirname(__file__), f"test_{name}.py") for name in ("cpu_engines", "matmuls")]
    chosen = "(native- and not avx512 and not amx and (every_statistic or bad_position)) or (here and walk)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests, "-k", chosen],
        env=os.environ | {"TUNED_LENS_FAST_CPU": processor, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_an_unknown_processor_is_an_error():
    script = "import tuned_lens_fast as tl; tl.engines()"
    environment = os.environ | {"TUNED_LENS_FAST_CPU": "avx3"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "TUNED_LENS_FAST_CPU: got 'avx3', wanted plain, avx2, avx512, avx512_bf16 or amx" in run.stderr
