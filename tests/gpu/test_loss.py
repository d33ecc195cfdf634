"""Losses and gradients at sizes of real models against float64 autograd, for some positions, and within the budget."""

import pytest
import torch
from cases import ONE_PASS, problem
from reference import head_inputs, logits

from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.interface import Norm, Readout, Translator
from tuned_lens_fast.engines.losses import Derivative, losses, question

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BUDGET = 2**28


def asked(dtype, d_model, vocab, device, positions, **options):
    """What :func:`losses` takes, every second layer without a translator."""
    case = problem(dtype, d_model, vocab, device, positions=positions, stats=ONE_PASS | {"kl"}, **options)
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(d_model, d_model, generator=generator, device=device) * 0.1 * d_model**-0.5
    readout = Readout((Translator(weight, weight[0].clone()), None), Norm("rms", weight[1] + 1, eps=1e-6), case.head)
    return case, readout


@pytest.mark.parametrize("engine", ["triton", "eager", "native"])
@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize(
    ("dtype", "d_model", "vocab", "options"),
    [
        pytest.param(BF16, 576, 49_152, {}, id="SmolLM2-135M"),
        pytest.param(BF16, 4096, 128_256, {}, id="Llama-3-8B"),
        pytest.param(BF16, 640, 262_144, {"softcap": 30.0}, id="Gemma-270M"),
        pytest.param(FP32, 64, 50_257, {"scale": 0.3}, id="fp32"),
    ],
)
def test_models(dtype, d_model, vocab, options, kind, engine, device):
    if ENGINES[engine].unavailable(torch.device(device), dtype) is not None:
        pytest.skip(ENGINES[engine].unavailable(torch.device(device), dtype))
    case, readout = asked(dtype, d_model, vocab, device, 24, **options)
    targets, reference = case.query.targets, case.query.reference
    with torch.enable_grad():
        translator = readout.translators[0]
        inputs = [p.double().requires_grad_() for p in (translator.weight, translator.bias)]
        double = (Translator(*inputs), None)
        log_q = logits(head_inputs(case.hidden, double, readout.norm), case.head).log_softmax(-1)
        if kind == "ce":
            want = -log_q.gather(-1, targets.clamp(min=0).expand(2, -1)[..., None])[..., 0]
            want = want.masked_fill(targets < 0, 0.0)
        else:
            log_p = logits(reference, case.head).log_softmax(-1)
            want = (log_p.exp() * (log_p - log_q)).sum(-1)
        wanted = torch.autograd.grad(want.sum(), inputs)
    query = question(targets, None) if kind == "ce" else question(None, reference)
    derivative = Derivative(torch.ones(1, 1, device=device), True, True, True)
    found = losses(ENGINES[engine], case.hidden, readout, query, derivative, BUDGET)
    rounding = {BF16: 2e-2, FP16: 3e-3, FP32: 1e-4}[dtype]
    assert (found.rows - want).abs().max() <= rounding * max(1.0, want.abs().max())
    for mine, theirs in zip((found.weights[0], found.biases[0]), wanted, strict=True):
        assert (mine - theirs).norm() <= rounding * theirs.norm()


@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("budget", [64 * 2**20, 256 * 2**20])
def test_scratch_stays_within_its_budget(kind, budget, device):
    case, readout = asked(BF16, 4096, 128_256, device, 2048)
    query = question(case.query.targets, None) if kind == "ce" else question(None, case.query.reference)
    derivative = Derivative(torch.ones(1, 1, device=device), True, True, False)
    losses(ENGINES["triton"], case.hidden, readout, query, derivative, budget)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = losses(ENGINES["triton"], case.hidden, readout, query, derivative, budget)
    gradients = sum(g.nbytes for g in (*found.weights, *found.biases) if g is not None) + found.rows.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients <= budget
