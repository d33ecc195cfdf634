"""lens.loss against float64 autograd over all logits: values and gradients, engines, dtypes, heads and norms."""

import math
import re
from types import SimpleNamespace

import emulated
import pytest
import torch
from reference import head_inputs, logits
from tiny_models import D_MODEL as D
from tiny_models import LAYERS, VOCAB, tiny
from torch.utils.checkpoint import checkpoint

import tuned_lens_fast as tl
from tuned_lens_fast.engines import ENGINES, eager, native
from tuned_lens_fast.engines.interface import BudgetError, Head, Norm, Readout, Translator
from tuned_lens_fast.engines.losses import Derivative, losses, question
from tuned_lens_fast.loss import loss

BUDGET = 256 * 2**20


@pytest.fixture(params=["eager", "native", "native-torch"])
def engine(request, monkeypatch):
    """The engines for CPUs, native with its own product and with PyTorch's."""
    name, _, matmul = request.param.partition("-")
    reason = ENGINES[name].unavailable(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    if matmul == "torch":
        monkeypatch.setattr(native, "product_unit", lambda: "plain")
    return name


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that a case meets several tiles, chunks of positions and groups of layers."""
    monkeypatch.setattr(eager, "CPU_CHUNK", (7, 256))


class ALens:
    """As much of a lens as loss needs."""

    def __init__(self, translators, norm, head):
        self.translators, self.unembed = translators, SimpleNamespace(norm=norm, head=head)

    def __len__(self):
        return len(self.translators)

    def translator(self, idx):
        return self.translators[idx]


def problem(norm="rms", *, layers=3, positions=5, d_model=24, vocab=600, dtype=torch.float32, spread=2.0, **head):
    """A lens with a translator missing and a bias missing, hidden states, the model's output and targets."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    norms = {
        "identity": Norm("identity", factor=0.7),
        "layer": Norm("layer", 1 + 0.3 * randn(d_model), randn(d_model), eps=1e-3),
        "rms": Norm("rms", 1 + 0.3 * randn(d_model), eps=1e-3, factor=1.5),
        "unit_offset": Norm("rms", 0.3 * randn(d_model), eps=1e-6, unit_offset=True),
        "bare": Norm("layer", eps=1e-5),
    }
    translators = [
        Translator(0.2 * randn(d_model, d_model), 0.2 * randn(d_model) if i != 1 else None) if i != 2 else None
        for i in range(layers)
    ]
    if head.get("bias") == "masked":  # and one token that no layer can say
        head["bias"] = randn(vocab)
        head["bias"][3] = -math.inf
    weight = (randn(vocab, d_model) * spread * d_model**-0.5).to(dtype)
    hidden = [randn(positions, d_model).to(dtype) for _ in range(layers)]
    targets = torch.randint(4, vocab, (positions,), generator=g)
    targets[1] = -100
    reference = (2 * randn(positions, d_model)).to(dtype)
    return ALens(translators, norms[norm], Head(weight, **head)), hidden, reference, targets


def parameters(lens):
    return [p for t in lens.translators if t is not None for p in (t.weight, t.bias) if p is not None]


def by_definition(lens, hidden, *, reference=None, targets=None):
    """float64 ``[L, positions]``, differentiable."""
    head = lens.unembed.head
    log_q = logits(head_inputs(hidden, lens.translators, lens.unembed.norm), head).log_softmax(-1)
    if reference is None:
        found = -log_q.gather(-1, targets.clamp(min=0).expand(len(hidden), -1)[..., None])[..., 0]
        return found.masked_fill(targets == -100, 0.0)
    log_p = logits(reference, head).log_softmax(-1)
    return torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def differentiated(total, inputs):
    return [g.double() for g in torch.autograd.grad(total, inputs, allow_unused=True) if g is not None]


def check(lens, hidden, engine, reduction="mean", tolerance=2e-5, **asked):
    """Values and gradients by everything that can be learned, each layer counting otherwise."""
    inputs = [*parameters(lens), *hidden]
    for tensor in inputs:
        tensor.requires_grad_()
    counted = hidden[0].shape[0] if asked.get("targets") is None else (asked["targets"] != -100).sum()
    weights = torch.arange(1.0, len(hidden) + 1)[:, None] / counted
    want = by_definition(lens, hidden, **asked)
    wanted = differentiated((want * weights).sum(), inputs)
    got = loss(lens, hidden, engine=engine, reduction=reduction, **asked)
    assert got.dtype == torch.float32
    of_rows = want if reduction == "none" else want.sum(1) / counted
    torch.testing.assert_close(got.double(), of_rows, atol=1e-4 + tolerance, rtol=tolerance)
    gradients = differentiated((got * (weights if reduction == "none" else weights[:, 0] * counted)).sum(), inputs)
    assert len(gradients) == len(wanted) == len(inputs)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def asked_of(kind, reference, targets):
    return {"reference": reference} if kind == "kl" else {"targets": targets}


HEADS = {
    "plain": {},
    "bias": {"bias": "masked"},
    "scale": {"scale": 0.3, "bias": "masked"},
    "softcap": {"softcap": 3.0, "scale": 1.5},
    "peaked": {"spread": 60.0},
    "flat": {"spread": 1e-3},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("head", HEADS)
def test_heads(head, kind, reduction, engine):
    lens, hidden, *known = problem(positions=11, **HEADS[head])
    # Where q is all but p, a gradient is a small difference of large terms.
    tolerance = {"peaked": 1e-4, "flat": 1e-3}.get(head, 2e-5)
    check(lens, hidden, engine, reduction, tolerance, **asked_of(kind, *known))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("norm", ["identity", "layer", "unit_offset", "bare"])
def test_norms(norm, kind, engine):
    lens, hidden, *known = problem(norm)
    check(lens, hidden, engine, **asked_of(kind, *known))


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_a_norm_that_is_a_module(kind):
    lens, hidden, *known = problem("bare")
    inputs = [p.requires_grad_() for p in parameters(lens)]
    want = loss(lens, hidden, **asked_of(kind, *known))
    wanted = differentiated(want.sum(), inputs)
    lens.unembed.norm = Norm("module", module=torch.nn.LayerNorm(24, elementwise_affine=False))
    got = loss(lens, hidden, **asked_of(kind, *known))
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(differentiated(got.sum(), parameters(lens)), wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, kind, engine):
    """Of the very same x and W, what 16-bit numbers lose is lost in gradients' last rounding only."""
    lens, hidden, *known = problem("identity", dtype=dtype)
    lens.unembed.norm = Norm("identity")
    lens.translators = [None] * 3
    check(lens, hidden, engine, tolerance=2e-5 if dtype == torch.float64 else 6e-3, **asked_of(kind, *known))


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.skipif(ENGINES["native"].unavailable() is not None, reason="the native engine is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_on_amx(dtype, monkeypatch):
    """In software, where there is none."""
    if native.product_unit() != "amx":
        if emulated.COMPILER is None:
            pytest.skip("there is no AMX here, and no GCC to do without")
        emulated.Unit("amx").install(monkeypatch, native)
    lens, hidden, reference, _ = problem("identity", dtype=dtype)
    lens.unembed.norm = Norm("identity")
    lens.translators = [None] * 3
    check(lens, hidden, "native", tolerance=2e-5 if dtype == torch.float32 else 1e-2, reference=reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_translators_on_a_model_of_16_bits(dtype, engine):
    lens, hidden, reference, _ = problem(dtype=dtype, positions=40)
    # x is rounded once before the head, and not always to the same side.
    check(lens, hidden, engine, tolerance=3e-2, reference=reference)
    assert lens.translators[0].weight.grad is None
    loss(lens, hidden, reference=reference, engine=engine).sum().backward()
    assert lens.translators[0].weight.grad.dtype == torch.float32
    assert hidden[0].grad.dtype == dtype


@pytest.mark.parametrize("add", ["mean", "none"])
def test_positions_without_a_target_count_for_nothing(add, engine):
    lens, hidden, _, targets = problem()
    for h in hidden:
        h.requires_grad_()
    found = loss(lens, hidden, targets=targets, reduction=add, engine=engine)
    found.sum().backward()
    assert all(not h.grad[1].any() and h.grad[0].any() for h in hidden)
    if add == "none":
        assert not found[:, 1].any()
    none = loss(lens, hidden, targets=torch.full_like(targets, -100), engine=engine)
    assert none.isnan().all()
    assert all(not g.any() for g in torch.autograd.grad(none.nansum() + none.sum() * 0, hidden) if not g.isnan().any())


def test_nothing_to_learn_from(engine):
    lens, hidden, *_ = problem()
    assert loss(lens, [h[:0] for h in hidden], reference=torch.empty(0, 24), engine=engine).isnan().all()
    rows = loss(lens, [h[:0] for h in hidden], reference=torch.empty(0, 24), reduction="none", engine=engine)
    assert rows.shape == (3, 0)
    assert loss(lens, torch.empty(0, 5, 24), reference=torch.zeros(5, 24), layers=[], engine=engine).shape == (0,)


def test_what_has_no_target_may_be_anything(engine):
    """Padding's states, a NaN too, reach neither loss nor gradient."""
    lens, hidden, _, targets = problem()
    inputs = [p.requires_grad_() for p in parameters(lens)]
    wanted = torch.autograd.grad(loss(lens, hidden, targets=targets, engine=engine).sum(), inputs)
    hidden[0][1] = math.nan
    found = torch.autograd.grad(loss(lens, hidden, targets=targets, engine=engine).sum(), inputs)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_a_bad_layer_stays_alone(engine):
    """A NaN in a layer's hidden states is in its loss and its gradients, and in no other's, bit for bit."""
    lens, hidden, reference, _ = problem()
    inputs = [p.requires_grad_() for p in parameters(lens)]
    clean = loss(lens, hidden, reference=reference, engine=engine)
    wanted = torch.autograd.grad(clean.sum(), inputs)
    hidden[0][2, 3] = math.nan
    found = loss(lens, hidden, reference=reference, engine=engine)
    assert found.isnan().tolist() == [True, False, False]
    assert torch.equal(found[1:], clean[1:])
    gradients = torch.autograd.grad(found[1:].sum(), inputs)
    assert torch.equal(gradients[2], wanted[2])
    rows = loss(lens, hidden, reference=reference, reduction="none", engine=engine)
    assert rows.isnan().sum() == 1


def test_shapes_and_strides(engine):
    lens = tl.TunedLens.from_model(tiny("llama"))
    states = torch.randn(LAYERS, 2, 6, D)
    targets = torch.randint(0, VOCAB, (2, 6))
    rows = lens.loss(states, targets=targets, reduction="none", engine=engine)
    assert rows.shape == (LAYERS, 2, 6)
    torch.testing.assert_close(rows, -lens.decode(states, targets=targets).log_prob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lens.loss(states, targets=targets, engine=engine), rows.flatten(1).mean(1))
    # As users take the last position off: no view [positions, d_model].
    targets[0] = -100
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        cut = lens.loss(states[:, :, :-1], targets=targets[:, 1:], engine=engine)
    assert sum(tensor.ndim == 2 for tensor in kept) == LAYERS, "one gradient a translator, whatever lies apart"
    want = lens.loss(states[:, :, :-1].contiguous(), targets=targets[:, 1:], engine=engine)
    torch.testing.assert_close(cut, want)
    cut.sum().backward()
    assert lens[0].weight.grad.abs().sum() > 0
    turned = lens.loss(states.transpose(1, 2), targets=targets.T, reduction="none", layers=range(LAYERS), engine=engine)
    torch.testing.assert_close(turned, rows.transpose(1, 2).masked_fill(targets.T == -100, 0.0), atol=1e-5, rtol=1e-5)


def test_only_what_requires_grad_gets_one(engine):
    lens, hidden, reference, _ = problem()
    first, _, third, *_ = parameters(lens)
    third.requires_grad_()
    loss(lens, hidden, reference=reference, engine=engine).sum().backward()
    assert third.grad is not None
    assert first.grad is None
    assert not lens.unembed.head.weight.requires_grad
    with torch.no_grad():
        assert not loss(lens, hidden, reference=reference, engine=engine).requires_grad
    third.requires_grad_(False)
    assert not loss(lens, hidden, reference=reference, engine=engine).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_there_is_no_second_derivative(reduction):
    lens, hidden, reference, _ = problem()
    weight = parameters(lens)[0].requires_grad_()
    found = loss(lens, hidden, reference=reference, reduction=reduction).sum()
    with pytest.raises(NotImplementedError, match="no second derivative; call backward"):
        torch.autograd.grad(found, weight, create_graph=True)


def test_autocast_and_checkpointing_change_nothing():
    lens, hidden, reference, _ = problem()
    weight = parameters(lens)[0].requires_grad_()
    want = loss(lens, hidden, reference=reference)
    (wanted,) = torch.autograd.grad(want.sum(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(lens, hidden, reference=reference)
        again = checkpoint(lambda: loss(lens, hidden, reference=reference), use_reentrant=False)
    for found in (got, again):
        assert torch.equal(found, want)
        assert torch.equal(torch.autograd.grad(found.sum(), weight)[0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "reduction"), [("kl", "mean"), ("ce", "none")])
def test_compiles_without_a_graph_break(kind, reduction):
    lens = tl.TunedLens.from_model(tiny("llama"))
    known = (torch.randn(5, D), torch.randint(0, VOCAB, (5,)))
    states = torch.randn(LAYERS, 5, D)

    def learn(states):
        return lens.loss(states, reduction=reduction, engine="eager", **asked_of(kind, *known)).sum()

    learn(states).backward()
    wanted = [p.grad.clone() for p in lens.layer_translators.parameters()]
    lens.zero_grad()
    torch.compile(learn, fullgraph=True, backend="aot_eager")(states).backward()
    for parameter, want in zip(lens.layer_translators.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want)


@pytest.mark.slow
@pytest.mark.parametrize("add_up", [True, False])
def test_opcheck(add_up):
    from tuned_lens_fast.engines import operators

    lens, hidden, reference, _ = problem()
    for p in parameters(lens):
        p.requires_grad_()
    flat = operators.flat(hidden, Readout.of(lens, range(3)), question(None, reference))
    shares = torch.full((1, 1), 0.2) if add_up else None
    arguments = (*flat, shares, add_up, False, add_up, add_up, "eager", BUDGET)
    torch.library.opcheck(torch.ops.tuned_lens_fast.lens_loss.default, arguments)


@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("engine", [name for name in ("eager", "native") if ENGINES[name].unavailable() is None])
def test_budgets(engine, kind):
    """From the smallest on, which a refusal names, all say the same."""
    lens, hidden, *known = problem(positions=60, softcap=5.0 if kind == "ce" else None)
    inputs = [p.requires_grad_() for p in parameters(lens)]
    asked = asked_of(kind, *known)
    want = loss(lens, hidden, engine=engine, **asked)
    wanted = torch.autograd.grad(want.sum(), inputs)
    with pytest.raises(BudgetError, match="memory_budget: got 1 bytes; the smallest that works") as refused:
        loss(lens, hidden, engine=engine, memory_budget=1, **asked)
    smallest = refused.value.smallest
    with pytest.raises(BudgetError, match=str(smallest)):
        loss(lens, hidden, engine=engine, memory_budget=smallest - 1, **asked)
    got = loss(lens, hidden, engine=engine, memory_budget=smallest, **asked)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(got.sum(), inputs), wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_bad_input(engine):
    lens, hidden, reference, targets = problem()
    for options, kind, message in (
        ({}, ValueError, "targets, reference: got neither, wanted one"),
        ({"targets": targets, "reference": reference}, ValueError, "targets, reference: got both, wanted one"),
        ({"targets": targets, "reduction": "sum"}, ValueError, "reduction: got 'sum', wanted 'mean' or 'none'"),
        ({"targets": targets[:2]}, ValueError, "targets: got shape [2], wanted [5]"),
        ({"targets": targets + 600}, IndexError, "targets: got"),
        ({"reference": reference[:, :3]}, ValueError, "reference: got shape [5, 3], wanted [5, 24]"),
        ({"reference": 3.0}, TypeError, "reference: got a float"),
        ({"targets": targets, "layers": [0, 1]}, ValueError, "layers: got 2 for 3 entries"),
        ({"targets": targets, "engine": "cuda"}, ValueError, "engine: got 'cuda'"),
        ({"targets": targets, "memory_budget": 0}, ValueError, "memory_budget: got 0"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            loss(lens, hidden, **options)


def test_a_wrong_gradient_is_found_out(monkeypatch):
    """The reference is honest: a tile's rows of W that are not added are missed."""
    lens, hidden, reference, _ = problem()
    monkeypatch.setattr(eager, "CPU_CHUNK", (7, 256))
    add = eager.Matmul.add_rows_of_weight

    def forgetful(self, sums, shares, tokens, exact):
        if tokens.start or exact:
            add(self, sums, shares, tokens, exact)

    check(lens, hidden, "eager", reference=reference)
    monkeypatch.setattr(eager.Matmul, "add_rows_of_weight", forgetful)
    with pytest.raises(AssertionError):
        check(lens, hidden, "eager", reference=reference)


def test_losses_alone_cost_no_gradient(monkeypatch):
    """Without anything to differentiate by, W is walked for the normalisers only."""
    lens, hidden, _, targets = problem()
    monkeypatch.setattr(eager.Matmul, "add_rows_of_weight", lambda *_: pytest.fail("a second product"))
    want = by_definition(lens, hidden, targets=targets)
    found = losses(ENGINES["eager"], hidden, Readout.of(lens, range(3)), question(targets, None), None, BUDGET)
    torch.testing.assert_close(found.rows.double(), want, atol=1e-4, rtol=1e-5)
    assert found.weights == found.hidden == [None] * 3
    derivative = Derivative(torch.ones(1, 1), True, False, False)
    with pytest.raises(pytest.fail.Exception):
        losses(ENGINES["eager"], hidden, Readout.of(lens, range(3)), question(targets, None), derivative, BUDGET)
