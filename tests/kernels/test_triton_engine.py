"""The fused engine whole: chunks, memory, top k of every kind, and its place in PyTorch."""

import dataclasses
import math
import re

import pytest
import reference
import torch
from cases import DIVERGENCES, ONE_PASS, assert_close, assert_same_bits, assert_void, problem
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from tuned_lens_fast.engines import choose, operators
from tuned_lens_fast.engines.eager import EagerEngine
from tuned_lens_fast.engines.interface import BudgetError, Head, Norm, Query, Readout, Translator
from tuned_lens_fast.engines.losses import Derivative, losses, question
from tuned_lens_fast.engines.triton import TritonEngine, plan
from tuned_lens_fast.kernels import top_k
from tuned_lens_fast.kernels.launch import built_in_tile

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ENGINE = TritonEngine()
BUDGET = 2**28


@pytest.mark.parametrize(
    ("dtype", "d_model", "vocab", "stats", "options"),
    [
        pytest.param(BF16, 64, 300, ONE_PASS | {"kl"}, {"top_k": 3, "watch": 5}, id="usual"),
        pytest.param(FP16, 40, 203, ONE_PASS | DIVERGENCES, {"bias": True}, id="all divergences"),
        pytest.param(FP32, 33, 137, ONE_PASS | {"kl", "tv"}, {"scale": 0.3, "top_k": 2}, id="fp32"),
        pytest.param(BF16, 40, 137, ONE_PASS | DIVERGENCES, {"bias": True, "softcap": 30.0, "top_k": 2}, id="softcap"),
        pytest.param(BF16, 64, 90, frozenset({"entropy"}), {}, id="one statistic"),
        pytest.param(FP16, 64, 90, frozenset({"rank"}), {}, id="rank alone"),
        pytest.param(BF16, 64, 20, frozenset(), {"watch": 1}, id="nothing but lse"),
    ],
)
def test_against_float64_and_eager(dtype, d_model, vocab, stats, options, device):
    asked = problem(dtype, d_model, vocab, device, positions=4, stats=stats, **options)
    got = asked.decode(ENGINE)
    asked.check(got)
    assert_close(got, asked.decode(EagerEngine()))
    assert_same_bits(got, asked.decode(ENGINE))
    harmed = [h.clone() for h in asked.hidden]
    harmed[1][3, 5] = math.nan
    harmed = dataclasses.replace(asked, hidden=harmed).decode(ENGINE)
    assert_void(harmed, 1, 3)
    assert_same_bits(harmed, got, [0, 1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["identity", "layer", "rms", "module"])
@pytest.mark.parametrize("translated", [False, True])
def test_from_hidden_states(kind, translated, device):
    """fp32: translator, norm and head against float64; every second layer has no translator."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    d_model, vocab, positions = 48, 90, 5
    hidden = [normal(positions, d_model) * 5 + 1 for _ in range(3)]
    translators = [Translator(normal(d_model, d_model) / 9, normal(d_model)), None, None]
    weight, bias = normal(d_model), normal(d_model)
    module = torch.nn.LayerNorm(d_model).to(device)
    norm = {
        "identity": Norm("identity", factor=0.3),
        "layer": Norm("layer", weight, bias, eps=1e-5),
        "rms": Norm("rms", weight, eps=1e-6, unit_offset=True),
        "module": Norm("module", module=module, eps=1e-5),
    }[kind]
    translators = translators if translated else [None] * 3
    head = Head(normal(vocab, d_model) / 7)
    query = Query(ONE_PASS, targets=torch.randint(vocab, (positions,), generator=generator).to(device), top_k=1)
    got = ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
    defined = Norm("layer", eps=1e-5) if kind == "module" else norm
    z = reference.logits(reference.head_inputs(hidden, translators, defined), head)
    reference.check(got, z, targets=query.targets, top_k=1)


@pytest.mark.parametrize("lens_dtype", [FP32, BF16])
def test_a_lens_of_another_dtype_than_the_model(lens_dtype, device):
    asked = problem(BF16, 48, 90, device, positions=4)
    translators = [Translator(torch.eye(48, device=device, dtype=lens_dtype) / 4)] * 2
    norm = Norm("rms", eps=1e-6)
    answers = [
        engine.decode(asked.hidden, Readout(translators, norm, asked.head), asked.query, BUDGET)
        for engine in (ENGINE, EagerEngine())
    ]
    # x is rounded to bf16 once by both, not always to the same side.
    for name in ("lse", "entropy"):
        torch.testing.assert_close(answers[0][name], answers[1][name], atol=1e-2, rtol=1e-2)


def test_hidden_states_may_be_views(device):
    asked = problem(BF16, 40, 90, device, positions=4)
    wide = torch.full((4, 3, 117), math.nan, dtype=BF16, device=device)
    views = []
    for layer, h in enumerate(asked.hidden):
        wide[:, layer, 5:45] = h
        views.append(wide[:, layer, 5:45])
    assert_same_bits(dataclasses.replace(asked, hidden=views).decode(ENGINE), asked.decode(ENGINE))


@pytest.mark.parametrize("few", [False, True])
def test_rows_without_order_are_decoded_again(few, monkeypatch, device):
    """Rows of zeros have more candidates than fit; the others of their layer stay as they are."""
    if not few:
        monkeypatch.setattr(top_k, "MOST_ROWS", 0)
    asked = problem(BF16, 32, 331, device, positions=5, stats=frozenset({"max_prob"}), top_k=3)
    before = asked.decode(ENGINE)
    asked.hidden[1][2] = 0.0
    got = asked.decode(ENGINE)
    asked.check(got)
    assert got["top_ids"][1, 2].tolist() == [0, 1, 2]
    assert_same_bits(got, before, [0, 1, 3, 4])


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"bias": True, "scale": 0.5, "softcap": 2.0}], ids=str)
def test_the_top_k_of_every_logit(options, monkeypatch, device):
    """Of rows with ties, with fewer finite logits than k, and with a NaN, as the eager engine has it."""
    monkeypatch.setattr(top_k.Room, "of", lambda *_: top_k.Room(8, 1, 128))  # more rows have no room for all
    asked = problem(BF16, 32, 300, device, layers=1, positions=6, stats=frozenset({"max_prob"}), top_k=4, **options)
    asked.hidden[0][2:4] = 0.0
    asked.hidden[0][3, 1] = 0.5
    if "softcap" not in options and options:
        asked.head.bias[:] = -torch.inf
        asked.head.bias[[7, 299]] = 0.25
    asked.hidden[0][5, 0] = torch.nan
    got, wanted = asked.decode(ENGINE), asked.decode(EagerEngine())
    assert torch.equal(got["top_ids"][0, [2, 5]], wanted["top_ids"][0, [2, 5]])
    torch.testing.assert_close(got["top_log_probs"], wanted["top_log_probs"], atol=1e-4, rtol=1e-5, equal_nan=True)


class Launches(TorchDispatchMode):
    """Counts what PyTorch computes, and not what only makes a tensor or looks at one in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.interpreting = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        if self.interpreting:
            return answer
        results = [value for value in (answer if isinstance(answer, (tuple, list)) else [answer])]
        schema = function._schema
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if not is_view and "empty" not in schema.name and any(isinstance(value, torch.Tensor) for value in results):
            self.names.append(schema.name)
        elif "_local_scalar_dense" in schema.name:
            pytest.fail("a decode of few rows waits for the GPU")
        return answer


@pytest.mark.parametrize(("stats", "most"), [(ONE_PASS, 27), (ONE_PASS | {"kl"}, 49)], ids=["one pass", "kl"])
def test_few_rows_take_few_launches_and_wait_for_none(stats, most, monkeypatch, device):
    """As many as a CUDA graph of a decode has: 16 layers at one position with a top 5, which the kernels serve."""
    asked = problem(BF16, 32, 331, device, layers=16, positions=1, stats=stats, top_k=5)
    counted, run = Launches(), GridExecutor.__call__

    def interpreted(kernel, *args, **constants):
        counted.names.append(kernel.fn.__name__)
        counted.interpreting = True
        run(kernel, *args, **constants)
        counted.interpreting = False

    monkeypatch.setattr(GridExecutor, "__call__", interpreted)
    readout = Readout((None,) * 16, Norm("identity"), asked.head)
    with counted:
        ENGINE._decode(asked.hidden, readout, asked.query, BUDGET)
    assert "_order_every_logit" in counted.names
    assert len(counted.names) <= most, counted.names


@pytest.mark.parametrize("top_k", [11, 129, 331])
def test_a_large_k_is_answered_by_the_eager_engine(top_k, device):
    asked = problem(BF16, 32, 331, device, positions=2, stats=frozenset({"max_prob"}), top_k=top_k)
    asked.check(asked.decode(ENGINE))


@pytest.mark.slow
def test_chunks_mean_the_same(device):
    """From everything at once down to the smallest budget, which its refusal names."""
    asked = problem(BF16, 40, 331, device, positions=2, stats=ONE_PASS | {"kl"}, top_k=2, watch=3)
    whole = asked.decode(ENGINE)
    with pytest.raises(ValueError, match="memory_budget: got 1 bytes; the smallest that works") as refused:
        asked.decode(ENGINE, 1)
    smallest = int(re.search(r"here is (\d+)", str(refused.value))[1])
    with pytest.raises(ValueError, match=str(smallest)):
        asked.decode(ENGINE, smallest - 1)
    got = asked.decode(ENGINE, smallest)
    asked.check(got)
    assert_close(got, whole)


@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize(("dtype", "options"), [(BF16, {}), (FP16, {"bias": True}), (FP32, {"softcap": 3.0})], ids=str)
def test_losses_and_gradients(dtype, options, kind, device):
    """Against the eager engine, which is held to float64 autograd; whole, and in the smallest pieces."""
    d_model, positions = 32, 5
    asked = problem(dtype, d_model, 203, device, positions=positions, stats=ONE_PASS | {"kl"}, **options)
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(d_model, d_model, generator=generator) / 9).to(device)
    readout = Readout((Translator(weight, weight[0]), None), Norm("rms", weight[1] + 1, eps=1e-6), asked.head)
    asked_of = question(asked.query.targets, None) if kind == "ce" else question(None, asked.query.reference)
    derivative = Derivative(torch.full((1, 1), 0.2, device=device), True, True, True)

    def found(engine, budget=BUDGET):
        answer = losses(engine, asked.hidden, readout, asked_of, derivative, budget)
        return [answer.rows, answer.weights[0], answer.biases[0], *answer.hidden]

    want = found(EagerEngine())
    with pytest.raises(BudgetError) as refused:
        found(ENGINE, 1)
    for budget in (BUDGET, refused.value.smallest):
        for mine, theirs in zip(found(ENGINE, budget), want, strict=True):
            # x, and what is multiplied with W again, are rounded to W's dtype; some targets cannot be said at all.
            assert torch.equal(mine.isinf(), theirs.isinf())
            sound = theirs.isfinite()
            off = (mine - theirs)[sound].abs().max() / theirs[sound].abs().max()
            assert off <= {BF16: 2e-2, FP16: 3e-3, FP32: 1e-5}[dtype]


@pytest.mark.parametrize("stats", [ONE_PASS, ONE_PASS | {"kl"}, ONE_PASS | DIVERGENCES], ids=len)
@pytest.mark.parametrize("top_k", [0, 10])
def test_plans(stats, top_k, device):
    """More memory never cuts finer, and a plan covers what it was made for."""
    head = Head(torch.empty(128_256, 4096, dtype=BF16, device="meta"))
    tile = built_in_tile((9, 0), BF16, 4096)
    cuts = []
    for mebibytes in (32, 64, 256, 1024, 16_384):
        query = Query(stats, top_k=top_k)
        tiling = plan(32, 8192, 4096, 4, 4, False, head, query, tile, mebibytes * 2**20)
        assert 1 <= tiling.positions <= 8192
        assert 1 <= tiling.layers <= 32
        assert tiling.layers == 1 or tiling.positions == 8192 or mebibytes > 32
        cuts.append(tiling.positions * tiling.layers)
    assert cuts == sorted(cuts)


def test_nothing_to_decode(device):
    asked = problem(BF16, 32, 90, device, top_k=2)
    for hidden, shape in (([], (0, 0)), ([h[:0] for h in asked.hidden], (2, 0))):
        nothing = dataclasses.replace(asked, hidden=hidden, query=Query(frozenset({"entropy"}), top_k=2))
        got = nothing.decode(ENGINE)
        assert got["entropy"].shape == shape
        assert got["top_ids"].shape == (*shape, 2)


def test_a_head_whose_rows_are_not_contiguous_is_refused(device):
    asked = problem(BF16, 32, 90, device)
    transposed = asked.reading(weight=asked.head.weight.T.contiguous().T)
    with pytest.raises(ValueError, match="its rows are not contiguous"):
        transposed.decode(ENGINE)


def test_where_it_works(monkeypatch):
    assert "float64" in ENGINE.unavailable(None, torch.float64)
    if not torch.cuda.is_available():
        assert ENGINE.unavailable(torch.device("cpu")) is None  # the interpreter's
        assert choose("auto", torch.device("cpu"), torch.float32).name != "triton"  # which is for tests only
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "NVIDIA" in ENGINE.unavailable()
    assert "engine='eager'" in ENGINE.unavailable(torch.device("meta"))


def operands(asked, top_k):
    """The operator's, in its order."""
    d_model = asked.head.weight.shape[1]
    norm = Norm("rms", torch.ones_like(asked.head.weight[0]), eps=1e-6)
    readout = Readout((Translator(torch.zeros_like(asked.head.weight[:d_model])), None), norm, asked.head)
    return (*operators.flat(asked.hidden, readout, dataclasses.replace(asked.query, top_k=top_k)), 2**26)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stats", "top_k", "watch"), [(ONE_PASS | {"kl"}, 2, 3), (DIVERGENCES, 0, 0), (frozenset(), 0, 0)]
)
def test_opcheck(stats, top_k, watch, device):
    asked = problem(BF16, 32, 90, device, positions=3, stats=stats, watch=watch)
    if asked.query.targets is not None:  # a row without a target has a NaN, which opcheck takes for a difference
        asked = asked.asking(targets=asked.query.targets.clamp(min=0))
    torch.library.opcheck(torch.ops.tuned_lens_fast.triton_decode.default, operands(asked, top_k))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_a_graph_break(backend, device):
    asked = problem(BF16, 32, 90, device, positions=3, stats=ONE_PASS | {"kl"}, top_k=2)

    def statistics(hidden):
        found = dataclasses.replace(asked, hidden=list(hidden.unbind())).decode(ENGINE)
        return found["lse"] + 1, found["top_ids"], found["kl"]

    hidden = torch.stack(asked.hidden)
    for got, wanted in zip(
        torch.compile(statistics, fullgraph=True, backend=backend)(hidden), statistics(hidden), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("layers", [1, 2])
def test_each_statistic_has_memory_of_its_own(layers, device):
    """Three rows: a row of a matrix of sums would begin where no vector load may."""
    asked = problem(BF16, 32, 90, device, layers=layers, positions=3, stats=ONE_PASS | DIVERGENCES, top_k=2, watch=3)
    places = [value.untyped_storage().data_ptr() for value in asked.decode(ENGINE).values()]
    assert len(set(places)) == len(places)
