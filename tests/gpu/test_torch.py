"""The engine inside PyTorch: operator checks, torch.compile, CUDA graphs, lenses, and compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DIVERGENCES, ONE_PASS, assert_same_bits, problem
from tiny_models import tiny

from tuned_lens_fast import LogitLens, TunedLens, decode_model
from tuned_lens_fast.engines import choose
from tuned_lens_fast.engines.interface import Norm
from tuned_lens_fast.engines.triton import TritonEngine

HERE = Path(__file__).parent
STATS = ("lse", "log_prob", "rank", "entropy", "max_prob")


@pytest.fixture(scope="module")
def model(device):
    sizes = {"hidden_size": 64, "head_dim": 16, "vocab_size": 1_037}
    return tiny("llama", **sizes).to(device, torch.bfloat16)


@pytest.fixture(scope="module")
def lens(model):
    return LogitLens.from_model(model)


@pytest.fixture
def hidden(model, device):
    generator = torch.Generator(device).manual_seed(3)
    return torch.randn(3, 37, 64, generator=generator, device=device).bfloat16()


def arguments(asked, top_k):
    """Of the operator, in its order."""
    head, query = asked.head, asked.query
    none = [None] * len(asked.hidden)
    norm = Norm("rms", torch.ones_like(head.weight[0]), eps=1e-6)
    return (
        asked.hidden, none, none, norm.kind, norm.weight, norm.bias, norm.eps, norm.unit_offset, norm.factor,
        head.weight, head.bias, head.scale, head.softcap, ",".join(sorted(query.stats)),
        query.targets, query.reference, query.watch, top_k, 2**26,
    )  # fmt: skip


def test_opcheck(device):
    asked = problem(torch.bfloat16, 64, 1_037, device, positions=9, stats=ONE_PASS | {"kl"}, watch=2)
    asked = asked.asking(targets=asked.query.targets.clamp(min=0))  # opcheck holds NaN for a difference
    torch.library.opcheck(torch.ops.tuned_lens_fast.triton_decode.default, arguments(asked, 3))


@pytest.mark.parametrize("top_k", [0, 3])
def test_compile_a_decode_without_a_graph_break(top_k, lens, hidden, device):
    targets = torch.arange(37, device=device)

    def statistics(hidden, targets):
        found = lens.decode(hidden, targets=targets, top_k=top_k, engine="triton")
        return found.lse + found.entropy, found.rank, found.log_prob

    for got, wanted in zip(
        torch.compile(statistics, fullgraph=True)(hidden, targets), statistics(hidden, targets), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("positions", "top_k"), [(37, 0), (20, 5), (1, 5)])
def test_a_cuda_graph_captures_a_decode(positions, top_k, lens, hidden, device):
    """With a top k if rows are few: among them here is one of zeros, whose candidates do not fit."""
    hidden, targets = hidden[:, :positions], torch.arange(positions, device=device)
    reference = torch.randn(positions, 64, device=device).bfloat16()

    def decode(hidden, targets, reference):
        return lens.decode(hidden, targets=targets, reference=reference, top_k=top_k, engine="triton")

    static = [tensor.clone() for tensor in (hidden, targets, reference)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets libraries take their workspaces
        decode(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(*static)
    for seed in (0, 1):
        torch.manual_seed(seed)
        new = [
            torch.randn_like(hidden), torch.randint(1_037, (positions,), device=device), torch.randn_like(reference)
        ]  # fmt: skip
        new[0][0, 0] = 0.0
        for place, value in zip(static, new, strict=True):
            place.copy_(value)
        graph.replay()
        wanted = decode(*new)
        for name in (*STATS, *(["top_ids", "top_log_probs"] if top_k else [])):
            assert torch.equal(getattr(captured, name), getattr(wanted, name)), name
        # u is a vendor product, which may be another one while a graph is captured.
        torch.testing.assert_close(captured.kl, wanted.kl, atol=1e-4, rtol=1e-5)


def test_auto_takes_this_engine_and_means_what_eager_means(model, device):
    assert choose("auto", device, torch.bfloat16).name == "triton"
    ids = torch.randint(1_037, (2, 19), device=device)
    lens = TunedLens.from_model(model).to(device)
    for given in (lens, LogitLens.from_model(model)):
        got, wanted = (
            decode_model(model, given, ids, top_k=4, watch=[5, 6], engine=engine) for engine in ("auto", "eager")
        )
        # x is rounded to bf16 once in both, from fp32 sums in different orders.
        for name in ("lse", "log_prob", "entropy", "max_prob", "kl", "top_log_probs", "watch_log_probs"):
            torch.testing.assert_close(
                getattr(got, name), getattr(wanted, name), atol=3e-2, rtol=2e-2, equal_nan=True, msg=name
            )
        assert (got.top_ids == wanted.top_ids).float().mean() > 0.9


def test_any_stream(device):
    asked = problem(torch.bfloat16, 64, 1_037, device, positions=70)
    wanted = asked.decode(TritonEngine())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = asked.decode(TritonEngine())
    stream.synchronize()
    assert_same_bits(got, wanted)


def small_decodes(device):
    """What compute-sanitizer watches: every kernel of a decode, with rows and tokens that fill no tile."""
    for dtype, d_model in ((torch.bfloat16, 64), (torch.float16, 100)):
        for bias, softcap in ((False, None), (True, 30.0)):
            asked = problem(
                dtype, d_model, 1_037, device, positions=67, layers=2, bias=bias, softcap=softcap,
                stats=ONE_PASS | DIVERGENCES, top_k=3, watch=2,
            )  # fmt: skip
            asked.decode(TritonEngine())
    torch.cuda.synchronize()


def test_compute_sanitizer_finds_nothing(device):
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if tool is None:
        pytest.skip("compute-sanitizer, a part of the CUDA toolkit, is not on this machine")
    small_decodes(device)  # compiles: the watched process finds the kernels in Triton's cache
    script = (
        f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent / 'kernels'), str(HERE.parent)]}; "
        "import torch; from test_torch import small_decodes; small_decodes(torch.device('cuda'))"
    )
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "3", sys.executable, "-c", script],
        # Without PyTorch's pool every tensor is an allocation of its own, whose ends are watched.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
