"""The products that csrc/ has for x86 processors, and what a walk finds in them, against float64 and the definition.

The unit of this processor runs as it is, those it has not in software (tests/emulation/walk.cpp).
tests/test_cpu_engines.py decodes with all of them.
"""

from types import SimpleNamespace

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuned_lens_fast.engines import ENGINES, native
from tuned_lens_fast.engines.interface import Head, Norm, Query, Readout
from tuned_lens_fast.engines.matmul import NATIVE_DTYPES, Matmul, NativeMatmul
from tuned_lens_fast.engines.state import State, Wanted, key_ids, key_logits

NAN, INF = float("nan"), float("inf")
#: dtype, how its numbers are split, and how far off products may be: relative, and beside fp32's own sums.
WHOLE = [(dtype, 0, 0, 2**-21) for dtype in NATIVE_DTYPES]
SPLITS = [
    (torch.bfloat16, 1, 0, 2**-21),
    (torch.float16, 2, 2, 2**-21),
    (torch.float32, 2, 1, 2**-15),
    (torch.float32, 3, 2, 2**-21),
]
CASES = [
    *(("here", *case) for case in WHOLE if native.product_unit() != "plain"),
    *(("here", *case) for case in SPLITS if native.product_unit() == "amx"),
    *((unit, *case) for unit in ("avx512", "avx512_bf16") for case in WHOLE if emulated.COMPILER),
    *(("amx", *case) for case in SPLITS if emulated.COMPILER),
]
every = pytest.mark.parametrize(("unit", "dtype", "parts", "most", "off"), CASES)
pytestmark = pytest.mark.skipif(not CASES, reason="there is no unit for products here, and no GCC to do without")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operators(unit):
    return torch.ops.tuned_lens_fast if unit == "here" else emulated.Unit(unit)


def product(unit, x, weight, parts=0, most=0, bias=None, scale=1.0, softcap=0.0):
    """z = g(x W^T), with W as it lies in memory; that nothing beside z is written is checked."""
    room = torch.full((x.shape[0] + 2, weight.shape[0] + 7), NAN)
    z = room[1:-1, 3:-4]
    operators(unit).logits(x.float(), weight, bias, scale, softcap, parts, most, z)
    found = z.clone()
    z.fill_(NAN)
    assert room.isnan().all()
    return found


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@given(
    case=st.sampled_from(CASES or [None]),
    rows=st.integers(1, 70),
    width=st.integers(1, 100),
    d_model=st.sampled_from([1, 2, 7, 16, 31, 33, 64, 257, 530]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_against_float64(case, rows, width, d_model, seed):
    unit, dtype, parts, most, off = case
    x = normal(rows, d_model, seed=seed).to(dtype)
    weight = normal(width + 3, d_model + 5, seed=seed + 1).to(dtype)[1:-2, 2:-3]  # strided, off any boundary
    exact = x.double() @ weight.double().T
    allowed = off * (x.double().abs() @ weight.double().abs().T) + 1e-30
    assert ((product(unit, x, weight, parts, most) - exact).abs() <= allowed).all()


@every
@pytest.mark.parametrize("rows", [5, 20, 140])
def test_more_tokens_than_a_block_has(unit, dtype, parts, most, off, rows):
    """Of few rows, some tokens' products pass a block's end."""
    x, weight = normal(rows, 40).to(dtype), normal(700, 40, seed=1).to(dtype)
    exact = x.double() @ weight.double().T
    allowed = off * (x.double().abs() @ weight.double().abs().T) + 1e-30
    assert ((product(unit, x, weight, parts, most) - exact).abs() <= allowed).all()


@every
@pytest.mark.parametrize("start", [0, 1])
def test_weights_between_other_numbers(unit, dtype, parts, most, off, start):
    """Pairs of W that lie on no pair's boundary, or only in every other row; rows that share sets of a cache."""
    for wide, d_model in ((33, 32), (1024, 96)):
        x, weight = normal(9, d_model).to(dtype), normal(70, wide, seed=1).to(dtype)[:, start : start + d_model]
        for rows in (x[:5], x):
            found = product(unit, rows, weight, parts, most)
            assert torch.equal(found, product(unit, rows, weight.clone(), parts, most))


@every
def test_long_sums_are_as_exact_as_pytorch_s(unit, dtype, parts, most, off):
    x, weight = normal(20, 4096).to(dtype), normal(40, 4096, seed=1).to(dtype)
    exact = x.double() @ weight.double().T
    ours = (product(unit, x, weight, parts, most) - exact).square().mean()
    # AMX's sums are of all the depth.
    assert off > 2**-21 or ours <= (8 if parts else 2) * (x.float() @ weight.float().T - exact).square().mean()


@every
def test_a_token_and_a_row_give_the_same_bits_wherever_they_stand(unit, dtype, parts, most, off, threads):
    x, weight = normal(60, 300).to(dtype), normal(190, 300, seed=1).to(dtype)
    whole = product(unit, x, weight, parts, most)
    for count in (1, 2, 3, 7, 40) if unit == "here" else ():
        threads(count)
        assert torch.equal(product(unit, x, weight, parts, most), whole)
    assert torch.equal(product(unit, x[31:38], weight[19:152], parts, most), whole[31:38, 19:152])


@every
def test_what_is_no_number_stays_in_its_row_or_token(unit, dtype, parts, most, off):
    x, weight = normal(40, 50).to(dtype), normal(90, 50, seed=1).to(dtype)
    clean = product(unit, x, weight, parts, most)
    x[5, 7], weight[11, 49], weight[12, 3] = NAN, INF, NAN
    if dtype == torch.float32:
        weight[12, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that rounds up to -0
    harmed = product(unit, x, weight, parts, most)
    bad = torch.zeros(40, 90, dtype=torch.bool)
    bad[5], bad[:, 11:13] = True, True
    assert torch.equal(harmed[~bad], clean[~bad])
    assert not harmed[bad].isfinite().any()


@pytest.mark.parametrize("unit", sorted({case[0] for case in CASES} - {"amx", "avx512_bf16"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_widened(unit, dtype):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
    found = product(unit, torch.ones(1, 1), weight)
    torch.testing.assert_close(found[0], weight[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@every
def test_bias_scale_and_softcap(unit, dtype, parts, most, off):
    x, weight, bias = normal(30, 40).to(dtype), normal(150, 40, seed=1).to(dtype), normal(150, seed=2)
    bias[::7], weight[3:9] = -INF, 0.0
    x[4] *= 1e-3  # where tanh is its argument
    bias[20:] *= 1e-4
    for options in ({"bias": bias}, {"scale": 0.3}, {"softcap": 2.0}, {"bias": bias, "scale": -0.7, "softcap": 9.0}):
        head = Head(weight, **options)
        exact = head.transform(x.double() @ weight.double().T + (0 if head.bias is None else bias))
        found = product(unit, x, weight, parts, most, **options)
        torch.testing.assert_close(found.double(), exact, atol=2e-3 if off > 2**-21 else 1e-5, rtol=1e-6)


def walked(unit, x, head, parts, most, targets, top_k):
    """The state of every row."""
    z = product(unit, x, head.weight, parts, most, head.bias, head.scale, head.softcap or 0.0)
    rows = len(x)
    sums, r, target = torch.full((rows, 3), NAN), torch.zeros(rows, dtype=torch.int64), torch.full((rows,), NAN)
    threshold = z.gather(1, targets.unsqueeze(1)).squeeze(1)
    top = torch.zeros(rows, top_k, dtype=torch.int64) if top_k else None
    u = torch.full(x.shape, NAN)
    transform = (head.bias, head.scale, head.softcap or 0.0)
    operators(unit).vocabulary_walk(
        x.float(), head.weight, *transform, parts, most, targets, threshold, sums, r, target, top, u
    )
    return State(*sums.unbind(1), r, target, top, u), z


def assert_rows_of_weight_are_summed(found, z, weight, rows):
    """Against float64, as near as s is to its own, beside the sum of what is added."""
    p = (z[rows].double() - found.m[rows].double().unsqueeze(1)).exp()
    off = (found.u[rows] - p @ weight.double()).abs()
    assert (off <= 3e-6 * (p @ weight.double().abs()) + 1e-30).all()


@every
@pytest.mark.parametrize("top_k", [0, 64])
def test_a_walk_finds_what_the_definition_finds_in_its_logits(unit, dtype, parts, most, off, top_k, threads):
    x, weight = normal(14, 40).to(dtype), normal(600, 40, seed=1).to(dtype)
    weight[300:500] = weight[0]  # ties
    x[1] *= 1e-3
    x[2] *= 30
    x[3, 5], x[4, 5] = NAN, INF
    bias = normal(600, seed=2)
    bias[:200] = -INF
    targets = torch.arange(14) * 1_000_003 % 600
    for head in (Head(weight), Head(weight, bias, 0.3, 30.0), Head(weight, torch.full((600,), -INF))):
        for count in (1, 3) if unit == "here" else (2,):
            threads(count)
            found, z = walked(unit, x, head, parts, most, targets, top_k)
            wanted = State.of_tile(
                z.clone(), 0, running=frozenset({"t", "r", "target"}), targets=targets, top_k=top_k
            ).closed()
            found = found.closed()
            fine = wanted.s.isfinite()
            assert torch.equal(found.s.isfinite(), fine)
            for name in ("m", "r", "target"):
                assert torch.equal(getattr(found, name)[fine], getattr(wanted, name)[fine]), name
            for part in (key_ids, key_logits) if top_k else ():
                assert torch.equal(part(found.top)[fine], part(wanted.top)[fine])
            torch.testing.assert_close(found.s[fine], wanted.s[fine], atol=0, rtol=3e-6)
            torch.testing.assert_close(found.t[fine], wanted.t[fine], atol=1e-5, rtol=1e-5)
            assert_rows_of_weight_are_summed(found, z, weight, fine)


@every
@pytest.mark.parametrize(("rows", "d_model"), [(1, 5), (7, 33), (25, 64), (70, 150)])
def test_a_walk_sums_rows_of_weight(unit, dtype, parts, most, off, rows, d_model):
    x, weight = normal(rows, d_model).to(dtype), normal(470, d_model + 3, seed=1).to(dtype)[:, :-3]
    found, z = walked(unit, x, Head(weight), parts, most, torch.arange(rows), 0)
    assert_rows_of_weight_are_summed(found, z, weight, torch.ones(rows, dtype=torch.bool))


@pytest.mark.parametrize("weight", [normal(80, 24).t().contiguous().t(), normal(80, 48)[:, ::2]], ids=["t", "strided"])
@pytest.mark.skipif(native.product_unit() == "plain", reason="there is no unit for products here")
def test_weights_whose_rows_are_not_contiguous(weight):
    matmul = NativeMatmul(Head(weight))
    found = matmul(matmul.pack(normal(9, 24)), slice(0, 80), 80)
    torch.testing.assert_close(found, normal(9, 24) @ weight.T)


@every
def test_nothing_to_multiply(unit, dtype, parts, most, off):
    def zeros(*shape):
        return torch.zeros(shape, dtype=dtype)

    assert torch.equal(product(unit, zeros(13, 0), zeros(5, 0), parts, most), torch.zeros(13, 5))
    assert product(unit, zeros(0, 8), zeros(5, 8), parts, most).shape == (0, 5)
    assert product(unit, zeros(5, 8), zeros(0, 8), parts, most).shape == (5, 0)


@pytest.mark.skipif(native.product_unit() == "plain", reason="there is no unit for products here")
class TestOperators:
    ROWS, TOKENS = 12, 5

    def operands(self):
        product = {
            "x": normal(self.ROWS, 8),
            "weight": normal(self.TOKENS, 8),
            "bias": normal(self.TOKENS),
            "scale": 2.0,
            "softcap": 0.0,
            "parts": 1,
            "most": 0,
        }
        found = {
            "targets": torch.zeros(self.ROWS, dtype=torch.int64),
            "threshold": torch.zeros(self.ROWS),
            "sums": torch.zeros(self.ROWS, 3),
            "r": torch.zeros(self.ROWS, dtype=torch.int64),
            "target": torch.zeros(self.ROWS),
            "top": torch.zeros(self.ROWS, 2, dtype=torch.int64),
            "u": torch.zeros(self.ROWS, 8),
        }
        return product, found

    def test_opcheck(self):
        product, found = self.operands()
        torch.library.opcheck(
            torch.ops.tuned_lens_fast.logits.default, (*product.values(), torch.zeros(self.ROWS, self.TOKENS))
        )
        for left_out in ((), ("targets", "threshold", "r", "target", "top", "u")):
            values = (product | found | dict.fromkeys(left_out)).values()
            torch.library.opcheck(torch.ops.tuned_lens_fast.vocabulary_walk.default, tuple(values))

    @pytest.mark.parametrize(
        ("name", "bad"),
        [
            ("x", torch.zeros(12, 9)),
            ("x", torch.zeros(12, 16)[:, ::2]),
            ("x", torch.zeros(12, 8, dtype=torch.float64)),
            ("x", torch.zeros(96)),
            ("weight", torch.zeros(5, 8, dtype=torch.float64)),
            ("weight", torch.zeros(8, 5).t()),
            ("bias", torch.zeros(4)),
            ("z", torch.zeros(12, 4)),
            ("z", torch.zeros(13, 5)),
            ("z", torch.zeros(12, 5, dtype=torch.float64)),
            ("z", torch.zeros(5, 12).t()),
        ],
        ids=str,
    )
    def test_products_that_do_not_fit_are_refused(self, name, bad):
        product, _ = self.operands()
        with pytest.raises(RuntimeError, match=r"has to be|expected scalar type|dtype"):
            torch.ops.tuned_lens_fast.logits(*(product | {"z": torch.zeros(12, 5)} | {name: bad}).values())

    @pytest.mark.parametrize(
        ("name", "bad"),
        [
            ("sums", torch.zeros(12, 4)),
            ("sums", torch.zeros(11, 3)),
            ("targets", torch.zeros(12, dtype=torch.int32)),
            ("threshold", None),
            ("r", torch.zeros(11, dtype=torch.int64)),
            ("top", torch.zeros(12, 4, dtype=torch.int64)[:, ::2]),
        ],
        ids=str,
    )
    def test_findings_that_do_not_fit_are_refused(self, name, bad):
        product, found = self.operands()
        with pytest.raises(RuntimeError):
            torch.ops.tuned_lens_fast.vocabulary_walk(*(product | found | {name: bad}).values())


@pytest.mark.parametrize("unit", ["plain", "avx2", "avx512", "avx512_bf16", "amx"])
@pytest.mark.parametrize(
    ("dtype", "precision", "split"),
    [
        (torch.float32, "none", (3, 2)),
        (torch.float32, "ieee", None),
        (torch.float32, "tf32", (2, 1)),
        (torch.float32, "bf16", (2, 1)),
        (torch.float16, "ieee", (2, 2)),
        (torch.bfloat16, "ieee", (1, 0)),
        (torch.float64, "none", None),
    ],
)
def test_which_product_a_head_has(unit, dtype, precision, split, monkeypatch):
    """PyTorch's setting says how exact fp32 is on AMX; other units have all of it."""
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision=precision))
    monkeypatch.setattr(native, "product_unit", lambda: unit)
    matmul = ENGINES["native"].matmul(Head(torch.zeros(4, 8, dtype=dtype)))
    if unit == "plain" or dtype == torch.float64:
        assert type(matmul) is Matmul
    else:
        assert type(matmul) is NativeMatmul
        assert (matmul.parts, matmul.most) == (split if unit == "amx" and split else (0, 0))


@pytest.mark.parametrize("unit", ["avx2", "amx"])
def test_the_plan_counts_what_the_product_needs(unit, monkeypatch):
    head = Head(torch.zeros(3000, 4096))
    query = Query(frozenset({"entropy"}), top_k=10)
    sizes = (6, torch.float32, Readout([None, None], Norm("identity"), head), query, 2**28)
    monkeypatch.setattr(native, "product_unit", lambda: unit)
    own = ENGINES["native"].plan(*sizes)
    monkeypatch.setattr(native, "product_unit", lambda: "plain")
    plain = ENGINES["native"].plan(*sizes)
    assert (own.layers, own.positions, own.tile) == (plain.layers, plain.positions, plain.tile)
    words = 4096 * 4 if unit == "avx2" else 3 * 4096 * 2
    block = (16 if unit == "avx2" else 32) * words
    states = 12 * (12 + 8 + 4 + 10 * 8)
    packed = 12 * words + 12 * 4096 * 4
    assert own.scratch - plain.scratch >= packed + torch.get_num_threads() * (block + states)


@pytest.mark.skipif(native.product_unit() == "plain", reason="there is no unit for products here")
def test_a_walk_is_taken_where_it_can_be(monkeypatch):
    walks = []
    monkeypatch.setattr(NativeMatmul, "walk", lambda self, *_: walks.append(self) or State(*torch.zeros(2, 3)))
    engine, weight = ENGINES["native"], normal(300, 8)
    transposed = weight.t().contiguous().t()
    for head, wanted, taken in (
        (Head(weight), Wanted(top_k=64), True),
        (Head(weight[:, :8]), Wanted(), True),
        (Head(weight), Wanted(top_k=65), False),
        (Head(weight), Wanted(u="exact"), True),
        (Head(transposed), Wanted(), False),
    ):
        walks.clear()
        matmul = engine.matmul(head)
        engine.tile_passes(matmul, matmul.pack(normal(3, 8)), wanted, None, None, 256)
        assert bool(walks) == taken
    walks.clear()
    engine.tile_passes(matmul, matmul.pack(normal(65, 8)), Wanted(u="exact"), None, None, 256)
    assert not walks


def test_the_path_in_use_is_named(monkeypatch):
    for unit, name in (("avx2", "AVX2"), ("avx512_bf16", "AVX-512 with bf16"), ("plain", "products by PyTorch")):
        monkeypatch.setattr(native, "product_unit", lambda unit=unit: unit)
        assert ENGINES["native"].path() == name
