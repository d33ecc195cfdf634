"""The engines for CPUs, eager and native, against float64, over dtypes, shapes, transforms and awkward logits."""

import math
import pickle
import weakref

import emulated
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuned_lens_fast.engines import ENGINES, eager, native
from tuned_lens_fast.engines.eager import EagerEngine, plan
from tuned_lens_fast.engines.interface import NO_TARGET, BudgetError, Head, Norm, Query, Readout, Translator
from tuned_lens_fast.engines.matmul import Matmul
from tuned_lens_fast.engines.statistics import DIVERGENCES, STATISTICS

BUDGET = 256 * 2**20
#: Units for products that the native engine is run with beside this processor's, which is run as it is.
OTHERS = [unit for unit in ("avx512", "avx512_bf16", "amx") if unit != native.product_unit()]
ENGINE = EagerEngine()


@pytest.fixture(
    autouse=True,
    params=["eager", "native", "native-plain", *(pytest.param(f"native-{u}", marks=pytest.mark.slow) for u in OTHERS)],
)
def engine(request, monkeypatch):
    """Every test here runs with both, and of the native engine with each of its products; the parameter.

    Those are the one that it takes here, PyTorch's ("plain"), and other units', in software.
    """
    name, _, unit = request.param.partition("-")
    reason = ENGINES[name].unavailable(torch.device("cpu"))
    if unit == "plain":
        monkeypatch.setattr(native, "product_unit", lambda: "plain")
    elif reason is None and unit:
        if emulated.COMPILER is None:
            reason = "there is no such unit here, and no GCC to do without"
        emulated.Unit(unit).install(monkeypatch, native)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setitem(globals(), "ENGINE", ENGINES[name])
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and rows so small that every case meets several of each."""
    monkeypatch.setattr(eager, "CPU_CHUNK", (200, 256))


def inputs(layers, positions, d_model, vocab, *, dtype=torch.float32, seed=0, spread=1.0, **head):
    """Random hidden states, translators, a norm, a head, and a query for everything."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    hidden = [randn(positions, d_model).to(dtype) for _ in range(layers)]
    translators = [Translator(randn(d_model, d_model) * 0.1, randn(d_model)) if i % 2 else None for i in range(layers)]
    norm = Norm("rms", weight=1 + 0.1 * randn(d_model), eps=1e-5)
    weight = (randn(vocab, d_model) * spread * d_model**-0.5).to(dtype)
    targets = torch.randint(0, vocab, (positions,), generator=g)
    targets[:1] = NO_TARGET
    query = Query(
        stats=frozenset(STATISTICS),
        targets=targets,
        reference=norm(randn(positions, d_model)).to(dtype),
        watch=torch.randint(0, vocab, (3,), generator=g),
        top_k=min(vocab, 10),
    )
    return hidden, translators, norm, Head(weight, **head), query


def check(hidden, translators, norm, head, query, *, x=None, budget=BUDGET, scale=None):
    """Run the engine; compare with float64 from hidden states, or from the x given."""
    found = ENGINE.decode(hidden, Readout(translators, norm, head), query, budget)
    x = reference.head_inputs(hidden, translators, norm) if x is None else x
    against = None if query.reference is None else reference.logits(query.reference, head)
    reference.check(
        found,
        reference.logits(x, head),
        targets=query.targets,
        reference=against,
        watch=query.watch,
        top_k=query.top_k,
        scale=scale,
    )
    return found


@pytest.mark.parametrize(
    ("layers", "positions", "d_model", "vocab"),
    [
        (3, 70, 64, 1003),
        (1, 1, 16, 2),
        (1, 200, 8, 257),
        (5, 1, 32, 777),
        (2, 130, 24, 515),
        (1, 3, 8, 1),
        (2, 9, 576, 2048),
    ],
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0], ids=["flat", "plain", "peaked"])
@pytest.mark.usefixtures("small_tiles")
def test_every_statistic(layers, positions, d_model, vocab, spread):
    check(*inputs(layers, positions, d_model, vocab, spread=spread))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_output_transforms(softcap, scale, biased):
    bias = torch.randn(600) if biased else None
    check(*inputs(2, 70, 32, 600, spread=3, bias=bias, scale=scale, softcap=softcap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("spread", [0.1, 10.0])
@pytest.mark.usefixtures("small_tiles")
def test_vocabulary_pass_of_every_dtype_given_x(dtype, spread):
    """Against float64 of the very same x and W, whatever their dtype."""
    hidden, _, _, head, query = inputs(2, 50, 64, 700, dtype=dtype, spread=spread)
    check(hidden, [None, None], Norm("identity"), head, query, x=torch.stack(hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float64_than_plain_pytorch(dtype):
    hidden, translators, norm, head, query = inputs(4, 50, 64, 700, dtype=dtype, spread=3)
    found = ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
    truth = reference.statistics(
        reference.logits(reference.head_inputs(hidden, translators, norm), head), targets=query.targets
    )
    plain = []
    for h, t in zip(hidden, translators, strict=True):
        x = h if t is None else h + h @ t.weight.to(dtype).T + t.bias.to(dtype)
        plain.append(norm(x.float()).to(dtype) @ head.weight.T)
    rough = reference.statistics(torch.stack(plain).float().double(), targets=query.targets)
    for name in ("lse", "log_prob", "entropy"):
        ours = (found[name].double() - truth[name])[:, 1:].abs().mean()
        theirs = (rough[name] - truth[name])[:, 1:].abs().mean()
        assert ours <= theirs, name


@pytest.mark.parametrize(
    "norm",
    [
        Norm("identity"),
        Norm("layer", weight=torch.rand(24) + 0.5, bias=torch.randn(24), eps=1e-5),
        Norm("layer", eps=1e-5, factor=0.5),
        Norm("rms", eps=1e-6),
        Norm("rms", weight=torch.randn(24) * 0.1, eps=1e-6, unit_offset=True),
    ],
    ids=lambda norm: f"{norm.kind}{norm.factor}{norm.unit_offset}",
)
def test_norms(norm):
    hidden, translators, _, head, query = inputs(3, 20, 24, 300)
    check(hidden, translators, norm, head, query)


def test_a_norm_module_runs_in_its_own_dtype():
    hidden, translators, _, head, query = inputs(2, 20, 24, 300)
    module = torch.nn.LayerNorm(24).to(torch.bfloat16)
    found = ENGINE.decode(hidden, Readout(translators, Norm("module", module=module), head), query, BUDGET)
    x = torch.stack(
        [
            module((h if t is None else h + h @ t.weight.T + t.bias).bfloat16()).float()
            for h, t in zip(hidden, translators, strict=True)
        ]
    )
    same = ENGINE.decode([*x], Readout([None, None], Norm("identity"), head), query, BUDGET)
    torch.testing.assert_close(found["lse"], same["lse"], atol=1e-3, rtol=0)


def test_a_residual_beyond_fp16_and_a_bf16_translator():
    hidden, _, norm, head, query = inputs(2, 20, 64, 300, dtype=torch.float16)
    translator = Translator(torch.randn(64, 64).bfloat16(), torch.full((64,), 1e5).bfloat16())
    found = ENGINE.decode(hidden, Readout([translator, None], norm, head), query, BUDGET)
    assert all(value.isfinite().all() for name, value in found.items() if name != "log_prob")


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
@pytest.mark.usefixtures("small_tiles")
def test_large_logits_do_not_cancel(offset):
    """Logits near 1,000, as in Gemma: entropy and KL keep their accuracy."""
    hidden, _, _, head, query = inputs(2, 40, 64, 600, spread=2)
    bias = torch.full((600,), offset)
    head = Head(head.weight, bias=bias)
    query = Query(query.stats, query.targets, query.reference, query.watch, 10)
    found = ENGINE.decode(hidden, Readout([None, None], Norm("identity"), head), query, BUDGET)
    # The bias rounds every logit to 6e-5, before any statistic: compare with float64 of the rounded ones.
    z = (torch.stack(hidden) @ head.weight.T).add(bias)
    want = reference.statistics(z, targets=query.targets)
    for name in ("lse", "log_prob", "entropy"):
        torch.testing.assert_close(found[name].double(), want[name], atol=2e-4, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("positions", [1, 2, 3, 4])
def test_kl_of_few_positions_over_a_large_vocabulary(positions, engine):
    """Vendor libraries take other paths for few rows, some of which sum a long product less exactly."""
    g = torch.Generator().manual_seed(positions)
    # Of one sign, as columns of a trained model's often are: u is a long sum of large terms.
    tokens = 5_000 if engine.removeprefix("native-") in OTHERS else 50_000  # what is emulated is of no vendor, and slow
    weight = torch.randn(tokens, 64, generator=g) + 20
    model = torch.randn(positions, 64, generator=g) / 64
    apart = torch.randn(3, positions, 64, generator=g) / 4
    hidden = [*(model + apart - apart.mean(-1, keepdim=True))]
    query = Query(frozenset({"kl"}), reference=model)
    check(hidden, [None] * 3, Norm("identity"), Head(weight), query)


def test_a_target_of_probability_nearly_one():
    weight = torch.eye(64)
    hidden = [torch.zeros(2, 64)]
    hidden[0][:, 7] = torch.tensor([17.0, 25.0])
    query = Query(frozenset({"log_prob", "rank", "entropy", "max_prob"}), torch.tensor([7, 7]))
    check(hidden, [None], Norm("identity"), Head(weight), query)
    found = ENGINE.decode(hidden, Readout([None], Norm("identity"), Head(weight)), query, BUDGET)
    want = -torch.log1p(63 * torch.exp(-torch.tensor([17.0, 25.0], dtype=torch.float64)))
    torch.testing.assert_close(found["log_prob"][0].double(), want, atol=1e-7, rtol=0.05)


@pytest.mark.usefixtures("small_tiles")
def test_ties_go_to_the_lower_id_within_and_across_tiles():
    torch.manual_seed(0)
    rows = torch.randint(-1, 2, (4, 8)).float()  # every token's row of W is one of four
    weight = rows[torch.randint(0, 4, (1000,))]
    hidden = [torch.randint(-2, 3, (30, 8)).float()]
    targets = torch.randint(0, 1000, (30,))
    query = Query(frozenset({"rank"}), targets, top_k=300)
    found = ENGINE.decode(hidden, Readout([None], Norm("identity"), Head(weight)), query, BUDGET)
    z = (hidden[0] @ weight.T)[None]
    want = reference.statistics(z, targets=targets, top_k=300)
    assert torch.equal(found["top_ids"], want["top_ids"])
    assert torch.equal(found["rank"], want["rank"])


@pytest.mark.parametrize("scale_of_rows", [1.0, 7.3])
@pytest.mark.usefixtures("small_tiles")
def test_equal_rows_of_w_never_outrank_each_other(scale_of_rows):
    """Rounding of real products: copies of the target's row lie in every tile, at every column."""
    torch.manual_seed(1)
    weight = torch.randn(1003, 576)
    weight[::7] = weight[0] * scale_of_rows
    hidden = [torch.randn(70, 576) for _ in range(2)]
    hidden[0][:, :] = weight[0] / 8 + hidden[0] / 100
    targets = torch.arange(70) * 7
    query = Query(frozenset({"rank"}), targets, top_k=5)
    found = ENGINE.decode(hidden, Readout([None] * 2, Norm("identity"), Head(weight)), query, BUDGET)
    assert (found["rank"][0] == 1).all()
    assert (found["top_ids"][0] == torch.arange(5) * 7).all()


def test_rank_one_is_the_top_token_and_its_log_prob_the_same():
    hidden, translators, norm, head, query = inputs(3, 60, 64, 900)
    first = ENGINE.decode(hidden[:1], Readout(translators[:1], norm, head), query, BUDGET)["top_ids"][0, :, 0]
    query = Query(frozenset({"rank", "log_prob"}), first, top_k=1)
    found = ENGINE.decode(hidden[:1], Readout(translators[:1], norm, head), query, BUDGET)
    assert (found["rank"] == 1).all()
    assert torch.equal(found["log_prob"], found["top_log_probs"][..., 0])


@pytest.mark.parametrize("masked", [slice(0, 300), slice(900, 1000), slice(1, 1000, 2), slice(200, 800)])
@pytest.mark.usefixtures("small_tiles")
def test_masked_tokens(masked):
    hidden, translators, norm, head, query = inputs(2, 40, 32, 1000)
    bias = torch.randn(1000)
    bias[masked] = -math.inf
    found = check(hidden, translators, norm, Head(head.weight, bias=bias), query)
    lost = torch.isin(query.targets, torch.arange(1000)[masked])
    assert (found["log_prob"][:, lost] == -math.inf).all()


def test_nothing_but_masked_tokens_is_no_distribution():
    hidden, translators, norm, head, query = inputs(1, 4, 32, 50)
    found = ENGINE.decode(
        hidden, Readout(translators, norm, Head(head.weight, bias=torch.full((50,), -math.inf))), query, BUDGET
    )
    assert_void(found, (0, slice(None)))


def assert_void(found, at):
    for name, value in found.items():
        if name == "rank":
            assert (value[at] == 0).all()
        elif name == "top_ids":
            assert (value[at] == -1).all()
        else:
            assert value[at].isnan().all(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("small_tiles")
def test_a_bad_position_harms_itself_only(bad):
    hidden, translators, norm, head, query = inputs(3, 80, 32, 700)
    clean = ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
    hidden[1] = hidden[1].clone()
    hidden[1][7, 3] = bad
    found = ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
    assert_void(found, (1, 7))
    others = torch.ones(3, 80, dtype=torch.bool)
    others[1, 7] = False
    for name, value in found.items():
        assert torch.equal(value[others].nan_to_num(9.0), clean[name][others].nan_to_num(9.0)), name


def test_a_bad_reference_harms_its_position_only():
    hidden, translators, norm, head, query = inputs(2, 20, 32, 300)
    clean = ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
    query.reference[5, 1] = math.nan
    found = ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
    others = torch.arange(20) != 5
    for name in DIVERGENCES:
        assert found[name][:, 5].isnan().all(), name
        assert torch.equal(found[name][:, others], clean[name][:, others]), name
    for name in found.keys() - set(DIVERGENCES):
        assert torch.equal(found[name].nan_to_num(9.0), clean[name].nan_to_num(9.0)), name


def test_a_reference_of_masked_tokens_only():
    hidden, _, _, head, query = inputs(1, 3, 4, 2)
    head = Head(torch.tensor([[-1.0, 0, 0, 0]] * 2), scale=3e38)
    hidden[0][:, 0] = 0.0
    query.reference[:, 0] = torch.tensor([0.0, 9.0, 0.0])
    found = ENGINE.decode(hidden, Readout([None], Norm("identity"), head), query, BUDGET)
    for name in DIVERGENCES:
        assert found[name][0].isnan().tolist() == [False, True, False], name


def test_an_infinite_logit_is_no_distribution():
    hidden = [torch.ones(2, 4)]
    hidden[0][1] = 3e38
    query = Query(frozenset({"entropy", "rank"}), torch.tensor([0, 0]), top_k=2)
    found = ENGINE.decode(hidden, Readout([None], Norm("identity"), Head(torch.ones(9, 4))), query, BUDGET)
    assert_void(found, (0, 1))
    assert found["entropy"][0, 0].isfinite()


def test_the_model_against_itself_diverges_by_nothing():
    _, _, _, head, query = inputs(1, 40, 32, 5000, spread=5)
    found = ENGINE.decode([query.reference], Readout([None], Norm("identity"), head), query, BUDGET)
    for name in DIVERGENCES:
        assert (found[name] >= 0).all()
        assert found[name].max() < 1e-5, name


def test_what_is_not_asked_for_is_not_there():
    hidden, translators, norm, head, query = inputs(2, 5, 16, 50)
    assert ENGINE.decode(hidden, Readout(translators, norm, head), Query(frozenset()), BUDGET).keys() == {"lse"}
    for name in STATISTICS:
        alone = Query(frozenset({name}), query.targets, query.reference)
        found = ENGINE.decode(hidden, Readout(translators, norm, head), alone, BUDGET)
        assert found.keys() == {"lse", name}
        everything = ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
        torch.testing.assert_close(found[name], everything[name], equal_nan=True)


@pytest.mark.parametrize(("layers", "positions"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_in_nothing_out(layers, positions):
    hidden, translators, norm, head, query = inputs(layers, positions, 16, 50)
    found = ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
    assert found["lse"].shape == (layers, positions if layers else 0)
    assert found["top_ids"].shape[2:] == (10,)


@pytest.mark.usefixtures("small_tiles")
def test_all_of_the_vocabulary_on_top():
    hidden, translators, norm, head, _ = inputs(2, 70, 16, 555)
    check(hidden, translators, norm, head, Query(frozenset(), top_k=555))


def test_non_contiguous_inputs_and_the_same_bits_twice():
    hidden, translators, norm, head, query = inputs(3, 40, 32, 700)
    found = ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
    strided = torch.stack(hidden, dim=-1).unbind(-1)
    head = Head(head.weight.T.contiguous().T)
    again = ENGINE.decode(strided, Readout(translators, norm, head), query, BUDGET)
    for name, value in found.items():
        torch.testing.assert_close(again[name], value, atol=1e-4, rtol=1e-4, equal_nan=True)
    twice = ENGINE.decode(strided, Readout(translators, norm, head), query, BUDGET)
    for name, value in twice.items():
        assert torch.equal(value.nan_to_num(9.0), again[name].nan_to_num(9.0))


@given(
    layers=st.integers(1, 4),
    positions=st.integers(1, 40),
    d_model=st.sampled_from([8, 24, 64]),
    vocab=st.integers(1, 700),
    spread=st.sampled_from([0.01, 1.0, 20.0]),
    softcap=st.sampled_from([None, 10.0]),
    budget=st.sampled_from([300_000, 3_000_000, BUDGET]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(layers, positions, d_model, vocab, spread, softcap, budget, seed):
    case = inputs(layers, positions, d_model, vocab, spread=spread, softcap=softcap, seed=seed)
    _, translators, norm, head, query = case
    try:
        ENGINE.plan(positions, torch.float32, Readout(translators, norm, head), query, budget)
    except ValueError:
        budget = BUDGET
    check(*case, budget=budget)


@pytest.mark.usefixtures("small_tiles")
def test_ranks_where_a_narrow_product_rounds_unlike_a_tile_s(monkeypatch):
    """Every token has an equal, so that a target's logit from another arithmetic would lose or gain a rank."""
    hidden, _, _, head, query = inputs(2, 40, 32, 1200)
    head = Head(torch.cat([head.weight[:600]] * 2))
    query = Query(frozenset({"rank"}), query.targets)
    kind = type(ENGINE.matmul(head))
    if not kind.shape_dependent:
        pytest.skip("the same bits whatever is multiplied beside: tests/test_matmuls.py")
    multiply = kind.multiply

    def rounding_otherwise(self, x, weight, out=None):
        z = multiply(self, x, weight, out)
        return z if z.shape[1] >= 200 else z + 1e-4

    monkeypatch.setattr(kind, "multiply", rounding_otherwise)
    wide = reference.statistics(reference.logits(torch.stack(hidden), head), targets=query.targets)["rank"]
    found = ENGINE.decode(hidden, Readout([None, None], Norm("identity"), head), query, BUDGET)
    assert torch.equal(found["rank"], wide)


@pytest.mark.usefixtures("small_tiles")
def test_a_chunk_is_gone_before_the_next(monkeypatch):
    """Neither its rows nor its reference is alive while the next is made: the plan counts one of each."""
    hidden, translators, norm, head, query = inputs(3, 230, 24, 300)
    made, head_input, passed = [], ENGINE.head_input, ENGINE.vocabulary_pass

    def only_one(*args):
        assert not any(ref() is not None for ref in made)
        x = head_input(*args)
        made.append(weakref.ref(x))
        return x

    def of_reference(x, *args):
        if args[1].u:
            assert not any(ref() is not None for ref in made)
            made.append(weakref.ref(x))
            references.append(made.pop())
            assert sum(ref() is not None for ref in references) == 1
        return passed(x, *args)

    references = []
    monkeypatch.setattr(ENGINE, "head_input", only_one)
    monkeypatch.setattr(ENGINE, "vocabulary_pass", of_reference)
    ENGINE.decode(hidden, Readout(translators, norm, head), query, BUDGET)
    assert len(made) > 3
    assert len(references) > 1


def test_a_wrong_tile_fails():
    """The reference is honest: an engine that forgets one tile, or counts one twice, is found out."""

    case = inputs(2, 20, 32, 5000)
    tiles = Matmul.tiles

    def forgetful(self, width):
        return list(tiles(self, width))[:-1]

    def repeating(self, width):
        return [*tiles(self, width), next(tiles(self, width))]

    for wrong in (forgetful, repeating):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Matmul, "tiles", wrong)
            with pytest.raises(AssertionError):
                check(*case)


class TestPlan:
    HEAD = Head(torch.empty(49152, 576, device="meta"))

    def test_rows_and_tile_shrink_with_the_budget(self):
        query = Query(frozenset(STATISTICS), top_k=10)
        sizes = []
        for budget in (2**28, 2**25, 2**23):
            tiling = plan(30, 2048, 576, Matmul(self.HEAD), query, 4, budget)
            assert tiling.layers * tiling.positions >= 1
            sizes.append(tiling.layers * tiling.positions * tiling.tile)
            used = eager.scratch_bytes(tiling.layers * tiling.positions, tiling.tile, 576, self.HEAD, query, 4)
            assert used <= budget
        assert sizes == sorted(sizes, reverse=True)

    def test_too_small_a_budget_names_the_smallest(self):
        query = Query(frozenset({"entropy"}))
        with pytest.raises(ValueError, match="memory_budget: got 1000 bytes; the smallest") as caught:
            plan(30, 2048, 576, Matmul(self.HEAD), query, 4, 1000)
        smallest = int(str(caught.value).split()[-1])
        plan(30, 2048, 576, Matmul(self.HEAD), query, 4, smallest)
        with pytest.raises(ValueError, match=str(smallest)):
            plan(30, 2048, 576, Matmul(self.HEAD), query, 4, smallest - 1)

    def test_rows_of_weight_that_are_gathered_count(self):
        head = Head(torch.empty(50_000, 4096, device="meta"))
        watch = torch.arange(1024)
        used = eager.scratch_bytes(1, 1024, 4096, head, Query(frozenset(), watch=watch), 4, cast=False)
        alone = eager.scratch_bytes(1, 1024, 4096, head, Query(frozenset()), 4, cast=False)
        assert used >= head.weight[watch].nbytes > alone

    def test_a_refusal_reaches_other_processes_whole(self):
        refused = pickle.loads(pickle.dumps(BudgetError(1000, 2000)))
        assert (refused.memory_budget, refused.smallest) == (1000, 2000)
        assert str(refused) == str(BudgetError(1000, 2000))

    def test_enormous_sizes_fit(self):
        head = Head(torch.empty(300_000, 16_384, dtype=torch.bfloat16, device="meta"))
        tiling = plan(200, 10_000_000, 16_384, Matmul(head), Query(frozenset(STATISTICS), top_k=100), 4, BUDGET)
        assert tiling.tile >= 128
        assert tiling.positions >= 1
