"""Training: gradients and steps beside plain PyTorch, the start beside numpy, and runs that end whatever happens."""

import copy
import errno
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import filelock
import forked_training
import numpy as np
import pytest
import tiny_text_model
import torch
from all_models import VOCAB, build
from forked_training import STEPS, documents, trained
from tiny_models import tiny
from tiny_text_model import D_MODEL, LAYERS
from torch import nn

import tuned_lens_fast as tl
from tuned_lens_fast import cli
from tuned_lens_fast.training import documents as texts
from tuned_lens_fast.training import loop, optimizers, report, ridge, start
from tuned_lens_fast.training.states import Reader


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch, request):
    """A picture takes half a second."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(loop, "draw", lambda report, path: path.touch())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny model, and the model."""
    folder = tmp_path_factory.mktemp("model")
    return str(folder), tiny_text_model.save(folder)[0]


@pytest.fixture(scope="module")
def model(saved):
    return saved[1]


@pytest.fixture(scope="module")
def undisturbed(model):
    """A run from its start to its end: the lens and the report."""
    return trained(model)


def parameters(lens):
    return torch.cat([parameter.detach().flatten() for parameter in lens.layer_translators.parameters()])


def random_lens(model, scale=0.05, **options):
    lens = tl.TunedLens.from_model(model, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lens.layer_translators.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return lens


# Text


def test_documents_are_on_one_side_only():
    held = [torch.tensor(tokens, dtype=torch.int32) for tokens in ([1, 2], [3, 4, 5], [1, 2], [6], [7, 8], [1, 2])]
    for seed in range(20):
        training, out = texts.split(held, 0.3, seed)
        assert sorted(map(len, training + out)) == sorted(map(len, held))
        assert training
        assert out
        assert not {tuple(d.tolist()) for d in training} & {tuple(d.tolist()) for d in out}
    sizes = [len(d) for d in texts.split([torch.full((n,), n, dtype=torch.int32) for n in range(1, 80)], 0.1, 0)[1]]
    assert 0.09 * 3160 < sum(sizes) <= 0.1 * 3160


@pytest.mark.parametrize(
    ("separator", "start", "stream"),
    [
        (None, None, [1, 5, 6, 1, 7, 1, 2, 8]),
        (2, None, [2, 1, 5, 6, 2, 1, 7, 2, 1, 2, 8]),
        (2, 1, [5, 6, 2, 7, 2, 8]),
        (None, 1, [5, 6, 7, 2, 8]),
    ],
)
def test_documents_joined(separator, start, stream):
    held = [torch.tensor(tokens, dtype=torch.int32) for tokens in ([1, 5, 6], [1, 7], [1, 2, 8])]
    found = texts.join(held, 3, separator, start)
    own = 3 if start is None else 2
    rows = [stream[i : i + own] for i in range(0, len(stream) // own * own, own)]
    assert found.tolist() == [row if start is None else [start, *row] for row in rows]


def test_separator_is_not_doubled():
    held = [torch.tensor(tokens, dtype=torch.int32) for tokens in ([1, 2], [3, 2], [2, 4], [2])]
    assert texts.join(held, 1, 2, None)[:, 0].tolist() == [2, 1, 2, 3, 2, 2, 4, 2]


def test_sequences_begin_with_bos_where_documents_do():
    model = tiny("llama")
    bos = model.config.bos_token_id
    held = [torch.tensor([bos, 5, 6]), torch.tensor([bos, 7])]
    assert texts.start_token(model, held) == bos
    assert texts.start_token(model, [*held, torch.tensor([7])]) is None
    model.config.eos_token_id = [2, 9]
    assert texts.special_token(model, "eos_token_id") == 2
    model.config.eos_token_id = 10**6
    assert texts.special_token(model, "eos_token_id") is None


def test_order_goes_on_anywhere():
    whole = texts.drawn(7, 0, 40, seed=1)
    assert [*map(int, whole)] == [int(texts.drawn(7, place, 1, seed=1)) for place in range(40)]
    assert all(sorted(whole[i : i + 7].tolist()) == [*range(7)] for i in range(0, 35, 7))
    assert not torch.equal(whole[:7], whole[7:14])
    assert not torch.equal(whole, texts.drawn(7, 0, 40, seed=2))


# Steps


def their_step(model, lens, sequences, asked, loss="kl"):
    """tuned-lens's recipe, written out: every layer's loss from logits, four batches a step, SGD with Nesterov."""
    translators = [(t.weight.detach().clone(), t.bias.detach().clone()) for t in lens]
    for pair in translators:
        for parameter in pair:
            parameter.requires_grad_()
    flat = [parameter for pair in translators for parameter in pair]
    optimizer = torch.optim.SGD(flat, lr=1.0 * (1 - 0.9), momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (asked["steps"] - step) / asked["steps"])
    per_step = asked["tokens_per_step"] // sequences.shape[1]
    losses = []
    for step in range(asked["steps"]):
        taken = sequences[texts.drawn(len(sequences), step * per_step, per_step, asked["seed"])].long()
        of_step = torch.zeros(len(translators))
        for batch in taken.chunk(4):
            with torch.no_grad():
                output = model(batch, output_hidden_states=True)
            for layer, ((weight, bias), h) in enumerate(zip(translators, output.hidden_states, strict=False)):
                logits = model.lm_head(model.model.norm(h + nn.functional.linear(h, weight, bias)))
                if loss == "kl":
                    p, q = output.logits.log_softmax(-1), logits.log_softmax(-1)
                    value = (p.exp() * (p - q)).sum(-1).mean()
                else:
                    value = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
                (value / 4).backward()
                of_step[layer] += value.detach() / 4
        torch.nn.utils.clip_grad_norm_(flat, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        schedule.step()
        losses.append(of_step)
    return torch.cat([parameter.detach().flatten() for parameter in flat]), torch.stack(losses)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_sgd_takes_the_steps_of_tuned_lens(model, loss):
    given = random_lens(model)
    asked = {"steps": 4, "tokens_per_step": 256, "seed": 3}
    held = documents()
    training, _ = texts.split(texts_of(held), start.HELD_OUT, 3)
    sequences = texts.join(training, 32, model.config.eos_token_id, None)
    wanted, losses = their_step(model, given, sequences, asked, loss)
    lens, found = trained(model, lens=given, init="lens", optimizer="sgd", loss=loss, eval_every=100, **asked)
    torch.testing.assert_close(parameters(lens), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(found.losses), losses, atol=1e-4, rtol=1e-5)
    assert (wanted - parameters(random_lens(model))).abs().max() > 1e-3


def texts_of(held):
    return [tokens.to(torch.int32) for tokens in held]


def test_accumulated_gradients_are_those_of_one_pass(model):
    """Five sequences a step: at once, and in passes of two, two and one."""
    asked = {"steps": 1, "tokens_per_step": 40, "sequence_length": 8, "init": "zero", "clip": None, "eval_tokens": 8}
    whole, its = trained(model, **asked)
    with pytest.raises(ValueError, match="the smallest that works here is") as caught:
        trained(model, memory_budget=1, **asked)
    smallest = int(str(caught.value).split("works here is ")[1].split(",")[0])
    lens = tl.TunedLens.from_model(model)
    assert Reader(model, lens, range(LAYERS), 8, 5, "auto", None).at_once == 5
    assert Reader(model, lens, range(LAYERS), 8, 5, "auto", smallest).at_once < 5
    parts, others = trained(model, memory_budget=smallest, **asked)
    torch.testing.assert_close(parameters(parts), parameters(whole), atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(others.losses), torch.tensor(its.losses), atol=1e-5, rtol=1e-6)


def test_uneven_parts_count_by_their_sequences(model, monkeypatch):
    """A budget that runs three of five sequences and then two."""
    asked = {"steps": 2, "tokens_per_step": 160, "init": "zero"}
    whole, _ = trained(model, **asked)
    monkeypatch.setattr("tuned_lens_fast.training.states.even", lambda total, most: min(total, 3))
    parts, _ = trained(model, **asked)
    torch.testing.assert_close(parameters(parts), parameters(whole), atol=1e-6, rtol=1e-5)


def test_same_seed_same_bits(model, undisturbed):
    lens, found = trained(model)
    assert torch.equal(parameters(lens), parameters(undisturbed[0]))
    assert found.losses == undisturbed[1].losses
    other, _ = trained(model, seed=1)
    assert not torch.equal(parameters(other), parameters(undisturbed[0]))


@pytest.mark.parametrize("optimizer", [*optimizers.RECIPES])
def test_loss_falls(model, optimizer):
    _, found = trained(model, optimizer=optimizer, init="zero", steps=15, tokens_per_step=512, learning_rate=None)
    after, before = map(torch.tensor, (found.kl_after, found.kl_before))
    assert found.kl_before == found.logit_lens
    assert (after < before).all()


def test_evaluation_is_the_kl_of_held_out_text(model, undisturbed):
    lens, found = undisturbed
    _, held = texts.split(texts_of(documents()), start.HELD_OUT, 0)
    ids = texts.join(held, 32, model.config.eos_token_id, None)[:2].long()
    stats = tl.decode_model(model, lens, ids, stats=["kl"])
    torch.testing.assert_close(torch.tensor(found.kl_after), stats.kl[:-1].mean((1, 2)), atol=1e-5, rtol=1e-4)
    assert [evaluation["step"] for evaluation in found.evaluations] == [0, 2, 4, STEPS]
    assert found.tokens["evaluated"] == ids.numel()


def test_schedules():
    assert [optimizers.rate("linear", step, 4, 0) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [optimizers.rate("constant", step, 4, 2) for step in range(4)] == [1 / 3, 2 / 3, 1, 1]
    assert [optimizers.rate("linear", step, 4, 2) for step in range(4)] == [1 / 3, 2 / 3, 1, 0.5]
    torch.testing.assert_close(optimizers.rate("cosine", 2, 4, 0), 0.5)


def test_some_layers(model):
    """Of a lens that is there: the others stay, and those trained do not depend on them."""
    asked = {"clip": None, "init": "lens"}
    whole, _ = trained(model, lens=random_lens(model), **asked)
    some, found = trained(model, lens=random_lens(model), layers=[2, 0], **asked)
    given = random_lens(model)
    assert found.layers == [0, 2]
    assert len(found.losses[0]) == 2
    assert torch.equal(some[1].weight, given[1].weight)
    for layer in (0, 2):
        torch.testing.assert_close(some[layer].weight, whole[layer].weight, atol=1e-6, rtol=1e-5)
        assert not torch.equal(some[layer].weight, given[layer].weight)


def test_a_lens_that_lacks_layers(model, tmp_path):
    whole = tl.TunedLens.from_model(model)
    lens = tl.TunedLens(whole.unembed, replace(whole.config, translated_layers=[0, 2]))
    _, found = trained(model, tmp_path / "run", lens=lens)
    assert found.layers == [0, 2]
    loaded = tl.TunedLens.from_model_and_pretrained(model, tmp_path / "run")
    assert torch.equal(parameters(loaded), parameters(lens))
    with pytest.raises(IndexError, match="layers: got 1, and the lens has only 0,2"):
        trained(model, lens=lens, layers=[1])


@pytest.mark.parametrize("init", ["ridge", "zero", "lens"])
def test_rank(model, init):
    lens, found = trained(model, lens=random_lens(model), rank=2, init=init, optimizer="adam", learning_rate=1e-2)
    for translator in lens:
        assert int(torch.linalg.matrix_rank(translator.weight.double(), rtol=1e-5)) == 2
    assert sum(found.kl_after) < sum(found.kl_before)


def test_factors_have_the_gradient_of_their_product(model):
    """One step of plain gradient descent on the factors, by autograd through the product."""
    given = random_lens(model)
    translators = loop.Translators(given, range(LAYERS), bias_only=False, rank=3, seed=0)
    translators.factorise()
    left, right = translators.parameters(1)[:2]
    torch.testing.assert_close(left @ right, given[1].weight)
    h, last = torch.randn(9, D_MODEL), torch.randn(9, D_MODEL)
    product = (left @ right).detach().requires_grad_()
    given[1].weight.grad = torch.autograd.grad((h @ product.t() - last).square().sum(), product)[0]
    translators.pull()
    twins = [side.detach().clone().requires_grad_() for side in (left, right)]
    wanted = torch.autograd.grad((h @ (twins[0] @ twins[1]).t() - last).square().sum(), twins)
    torch.testing.assert_close([left.grad, right.grad], [*wanted], atol=1e-4, rtol=1e-4)


def test_bias_only(model):
    given = random_lens(model)
    lens, found = trained(model, lens=given, bias_only=True, init="lens")
    assert all(torch.equal(t.weight, other.weight) for t, other in zip(lens, random_lens(model), strict=True))
    assert sum(found.kl_after) < sum(found.kl_before)
    lens, _ = trained(model, bias_only=True)
    assert not any(t.weight.any() for t in lens)
    assert all(t.bias.any() for t in lens)


def test_lens_without_biases(model):
    lens, found = trained(model, lens=tl.TunedLens.from_model(model, bias=False))
    assert lens[0].bias is None
    assert sum(found.kl_after) < sum(found.logit_lens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_fp32_whatever_the_model_is(dtype, tmp_path):
    model = tiny_text_model.make()[0].to(dtype)
    lens, found = trained(model, tmp_path / "lens", tokens_per_step=512)
    assert {parameter.dtype for parameter in lens.layer_translators.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in torch.load(tmp_path / "lens" / "params.pt").values()} == {torch.float32}
    assert sum(found.kl_after) < sum(found.logit_lens)
    assert model.dtype == dtype
    assert all(parameter.requires_grad and parameter.grad is None for parameter in lens.layer_translators.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neox"])
def test_other_ends_of_models(kind):
    """LayerNorm, a softcap, and positions that are learned."""
    model = tiny(kind)
    held = [tokens % 101 for tokens in documents()]
    _, found = trained(model, documents=held, steps=8, tokens_per_step=256)
    assert sum(found.kl_after) < sum(found.logit_lens)
    assert not model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    if kind == "gpt2":
        _, found = trained(model, documents=held, sequence_length=None, tokens_per_step=256)
        assert found.arguments["sequence_length"] == 64
        with pytest.raises(
            ValueError, match="sequence_length: got 65 positions, and GPT2LMHeadModel has learned only 64"
        ):
            trained(model, documents=held, sequence_length=65, tokens_per_step=256)


def test_several_residual_streams():
    model = build("gemma3n_text")
    lens, found = trained(model, lens=tl.TunedLens.from_model(model), documents=[d % VOCAB for d in documents()])
    assert lens.config.d_model > model.config.hidden_size
    assert sum(found.kl_after) < sum(found.logit_lens)


# The start


@pytest.mark.parametrize("held_back", [1e-12, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_ridge_beside_numpy(held_back, bias):
    """Weighted least squares, by the rows of an augmented system; rows that are not finite do not count."""
    rng = np.random.default_rng(0)
    rows, width = 200, 7
    x = rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + 3
    last = x @ rng.normal(size=(width, width)) + rng.normal(size=(rows, width)) + 1
    weights = rng.uniform(0.1, 5, rows)
    moments = ridge.Moments(width, torch.device("cpu"), products=True)
    for part in (slice(0, 150), slice(150, None)):
        bad = torch.full((1, width), torch.nan)
        more = [torch.cat([torch.tensor(values[part]), bad]) for values in (x, last)]
        moments.add(*more, torch.cat([torch.tensor(weights[part]), torch.ones(1)]))
    weight, shift = moments.solved(bias).at(held_back)

    w = weights / weights.sum()
    mean = w @ x if bias else np.zeros(width)
    deviation = np.sqrt(w @ (x - mean) ** 2)
    root = np.sqrt(w)[:, None]
    system = np.concatenate([root * x, np.sqrt(held_back) * np.diag(deviation)])
    if bias:
        system = np.concatenate([system, np.concatenate([root[:, 0], np.zeros(width)])[:, None]], 1)
    wanted = np.linalg.lstsq(system, np.concatenate([root * (last - x), np.zeros((width, width))]), rcond=None)[0]
    np.testing.assert_allclose(weight.t().numpy(), wanted[:width], atol=1e-6)
    if bias:
        np.testing.assert_allclose(shift.numpy(), wanted[width], atol=1e-6)


def test_reduced_rank_is_the_best_of_its_rank():
    torch.manual_seed(0)
    x = torch.randn(500, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    last = x + x @ torch.randn(8, 8, dtype=torch.float64) + 2
    moments = ridge.Moments(8, torch.device("cpu"), products=True)
    moments.add(x, last, torch.ones(500, dtype=torch.float64))
    solution = moments.solved(bias=True)
    full, _ = solution.at(1e-9)

    def error(weight, bias):
        return float((x @ weight.t() + bias - (last - x)).square().sum())

    cut, bias = solution.of_rank(full, 3)
    assert int(torch.linalg.matrix_rank(cut)) == 3
    u, s, v = torch.linalg.svd(full)
    plain = u[:, :3] @ (s[:3, None] * v[:3])
    assert error(cut, bias) < error(plain, solution.y - plain @ solution.x)
    # Eckart and Young: the best that any matrix of the rank can do with the centred rows.
    least = torch.linalg.svdvals((x - x.mean(0)) @ full.t())[3:].square().sum()
    torch.testing.assert_close(error(cut, bias), float(least), rtol=1e-4, atol=1e-3)


def test_weights_are_those_of_the_norm():
    last = torch.randn(5, 16, dtype=torch.float64) + 1
    torch.testing.assert_close(ridge.row_weights(last, "rms"), 1 / last.square().mean(1))
    torch.testing.assert_close(ridge.row_weights(last, "layer"), 1 / last.var(1, correction=0))
    assert ridge.row_weights(torch.zeros(1, 4), "rms").isfinite().all()


def test_start_is_no_worse_than_the_logit_lens(model):
    """Text of three tokens, and random text afterwards: no solution is right."""
    _, found = trained(model, documents=[torch.randint(0, 3, (40,)) for _ in range(30)], steps=1)
    assert all(layer["strength"] is None or layer["strength"] in ridge._GRID for layer in found.init)
    lens = tl.TunedLens.from_model(model)
    chosen = [layer["kl"] for layer in found.init]
    assert all(math.isfinite(kl) for kl in chosen)
    assert len(chosen) == len(lens)


# What is not finite


def poison(monkeypatch, layer, passes):
    """NaN in one hidden state of ``layer``, in the model's passes with these numbers."""
    states, seen = Reader._states, []

    def poisoned(self, ids):
        found = states(self, ids)
        if len(seen) in passes:
            found.hidden[layer][3, 2] = torch.nan
        seen.append(None)
        return found

    monkeypatch.setattr(Reader, "_states", poisoned)


def test_nan_in_a_layer_hurts_no_other(model, monkeypatch):
    asked = {"clip": None, "init": "zero", "eval_every": 100}
    whole, _ = trained(model, **asked)
    before = 2 * len(Reader(model, whole, [0], 32, 4, "auto", None).numbers)  # the logit lens's and the start's
    poison(monkeypatch, 1, [before + 1, before + 3])
    lens, found = trained(model, **asked)
    assert found.skipped == [[1, 1], [3, 1]]
    for layer in (0, 2):
        assert torch.equal(lens[layer].weight, whole[layer].weight)
        assert torch.equal(lens[layer].bias, whole[layer].bias)
    assert lens[1].weight.isfinite().all()
    assert not torch.equal(lens[1].weight, whole[1].weight)
    assert [math.isnan(losses[1]) for losses in found.losses] == [False, True, False, True, False]
    again = report.TrainingReport.from_json(json.loads(found.to_json()))
    assert again.skipped == found.skipped
    assert math.isnan(again.losses[1][1])
    assert again.loss[0] == found.loss[0]


def test_ridge_passes_over_nan(model, monkeypatch):
    poison(monkeypatch, 1, range(1000))
    lens, found = trained(model, steps=1)
    assert all(parameter.isfinite().all() for parameter in lens.layer_translators.parameters())
    assert found.init[1]["strength"] is not None


def test_many_skips_in_a_row_stop_the_run(model, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "_MOST_SKIPPED", 3)
    poison(monkeypatch, 1, range(2, 1000))
    with pytest.raises(
        FloatingPointError, match="in 3 steps in a row, up to step 2, the loss or gradient of layer 1 was"
    ):
        trained(model, tmp_path / "run", init="zero")
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_run_of_no_step_at_all_is_an_error(model):
    broken = copy.deepcopy(model)
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="in 2 steps in a row, up to step 1"):
        trained(broken, steps=2, init="zero")


# Folders


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.slow
def test_kills(tmp_path):
    """Nine moments, of which each ends with the parameters of an undisturbed run, bit for bit."""
    root = Path(tl.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    assert (
        subprocess.run([sys.executable, forked_training.__file__, tmp_path], env=environment, check=False).returncode
        == 0
    )


class Stopped(BaseException):
    pass


def stop(monkeypatch, step):
    """End the run before ``step`` is taken; returns what takes that back."""

    def stopping(self, losses):
        if self.step == step:
            raise Stopped
        update(self, losses)

    update = loop.Run._update
    monkeypatch.setattr(loop.Run, "_update", stopping)
    return lambda: monkeypatch.setattr(loop.Run, "_update", update)


@pytest.mark.parametrize("optimizer", [*optimizers.RECIPES])
def test_resumed(model, tmp_path, monkeypatch, optimizer):
    wanted, its = trained(model, optimizer=optimizer)
    again = stop(monkeypatch, 3)
    with pytest.raises(Stopped):
        trained(model, tmp_path / "run", optimizer=optimizer)
    partial = json.loads((tmp_path / "run" / "report.json").read_text())
    assert not partial["finished"]
    assert len(partial["losses"]) == 2
    again()
    lens, found = trained(model, tmp_path / "run", optimizer=optimizer)
    assert torch.equal(parameters(lens), parameters(wanted))
    assert found.losses == its.losses
    of_found, of_its = ([{**one, "seconds": 0} for one in report.evaluations] for report in (found, its))
    assert of_found == of_its
    assert json.loads((tmp_path / "run" / "report.json").read_text())["finished"]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_finished_run_is_not_trained_again(model, undisturbed, tmp_path):
    lens, its = trained(model, tmp_path / "run")
    assert torch.equal(parameters(lens), parameters(undisturbed[0]))
    other = tl.TunedLens.from_model(model)
    with pytest.warns(UserWarning, match="holds this run, finished; it is not trained again"):
        _, found = trained(model, tmp_path / "run", lens=other)
    assert found == its
    assert torch.equal(parameters(other), parameters(lens))


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"seed": 1}, "documents, another held-out documents, another seed"),
        ({"steps": 7}, r"steps \(5 there, 7 here\)"),
        ({"learning_rate": 0.5}, r"learning_rate \(0.001 there, 0.5 here\)"),
        ({"documents": [torch.arange(200), torch.arange(70)]}, "documents"),
        ({"init": "lens"}, "lens"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_run_is_refused(model, tmp_path_factory, changes, differs, finished, monkeypatch):
    out = tmp_path_factory.getbasetemp() / f"of-another-{finished}"
    if not out.exists():
        if finished:
            trained(model, out)
        else:
            again = stop(monkeypatch, 0)
            with pytest.raises(Stopped):
                trained(model, out)
            again()
    with pytest.raises(ValueError, match=f"holds a run with another {differs}.*; name another folder"):
        trained(model, out, **changes)


def test_another_model_is_refused(model, tmp_path):
    trained(model, tmp_path / "run")
    other = tiny_text_model.make()[0]
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="holds a run with another model"):
        trained(other, tmp_path / "run")


def test_folders_that_are_refused(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out: .*full holds thesis.tex, and no run of training; name a new folder"):
        trained(model, tmp_path / "full")
    with pytest.raises(NotADirectoryError, match="file is a file, wanted a folder"):
        trained(model, tmp_path / "file")
    trained(model, tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match="holds a run already, and resume is False"):
        trained(model, tmp_path / "run", steps=1, resume=False)
    trained(model, tmp_path / "new" / "deep", steps=1, resume=False)
    lock = filelock.FileLock(tmp_path / "run" / "_lock", blocking=False)
    with lock, pytest.raises(BlockingIOError, match="another process is writing to"):
        trained(model, tmp_path / "run", steps=1)
    manifest = tmp_path / "run" / "_training.json"
    manifest.write_text(manifest.read_text().replace('"steps": 1', '"steps": 2'))
    with pytest.raises(ValueError, match=r"_training.json is damaged or of another version"):
        trained(model, tmp_path / "run", steps=2)


def test_damaged_checkpoint(model, tmp_path, monkeypatch):
    again = stop(monkeypatch, 3)
    with pytest.raises(Stopped):
        trained(model, tmp_path)
    again()
    checkpoint = tmp_path / "checkpoint.pt"
    content = checkpoint.read_bytes()
    for damaged in (b"", content[:1000], b"x" * 100):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint.pt is damaged .*; delete it to train from the start"):
            trained(model, tmp_path)
    checkpoint.write_bytes(content)
    trained(model, tmp_path)


def test_checkpoint_of_another_run(model, tmp_path, monkeypatch):
    again = stop(monkeypatch, 3)
    for seed in (0, 1):
        with pytest.raises(Stopped):
            trained(model, tmp_path / str(seed), seed=seed)
    again()
    os.replace(tmp_path / "0" / "checkpoint.pt", tmp_path / "1" / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt is a checkpoint of another run; move it away"):
        trained(model, tmp_path / "1", seed=1)


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "full"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_full_disk(model, undisturbed, tmp_path, monkeypatch, failure):
    save, calls = torch.save, []

    def failing(state, path):
        calls.append(None)
        if len(calls) == 3:
            path.write_bytes(b"some of it")
            raise failure
        save(state, path)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match=r"out: cannot write .*checkpoint.pt: (No space left|PytorchStreamWriter failed)"):
        trained(model, tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == ["_lock", "_training.json", "checkpoint.pt", "report.json"]
    lens, _ = trained(model, tmp_path / "run")
    assert torch.equal(parameters(lens), parameters(undisturbed[0]))


def test_other_conditions_are_told_of(model, tmp_path, monkeypatch):
    again = stop(monkeypatch, 3)
    with pytest.raises(Stopped):
        trained(model, tmp_path)
    again()
    with pytest.warns(UserWarning, match=r"under other conditions \(memory_budget 268435456 then, 500000000 now\)"):
        trained(model, tmp_path, memory_budget=500_000_000)


def test_picture_and_report(model, tmp_path, monkeypatch):
    _, found = trained(model, tmp_path / "run")
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["loss"] == [sum(losses) / LAYERS for losses in found.losses]
    assert report.TrainingReport.from_json(written) == found
    assert written["versions"]["torch"] == torch.__version__
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"without matplotlib there is no report.png"):
        trained(model, tmp_path / "without")
    assert not (tmp_path / "without" / "report.png").exists()
    assert (tmp_path / "without" / "params.pt").exists()


def test_tuned_lens_reads_it(model, tmp_path):
    theirs = pytest.importorskip("tuned_lens.nn", reason="pip install --no-deps tuned-lens==0.2.0")
    lens, _ = trained(model, tmp_path, rank=4)
    h = torch.randn(2, 7, D_MODEL)
    for loaded in (
        theirs.TunedLens.from_model_and_pretrained(model, lens_resource_id=str(tmp_path)),
        tl.TunedLens.from_model_and_pretrained(model, tmp_path),
    ):
        for layer in range(LAYERS):
            torch.testing.assert_close(loaded(h, layer), lens(h, layer), atol=1e-4, rtol=0)


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse"}, "loss: got 'mse', wanted one of 'kl', 'ce'"),
        ({"init": "random"}, "init: got 'random', wanted one of 'ridge', 'zero', 'lens'"),
        ({"optimizer": "lion"}, "optimizer: got 'lion', wanted one of 'sgd', 'adam', 'muon'"),
        ({"schedule": "step"}, "schedule: got 'step'"),
        ({"steps": 0}, "steps: got 0, wanted a whole number from 1"),
        ({"steps": 2.5}, "steps: got 2.5"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**70}, "seed: got 1180591620717411303424, wanted"),
        ({"warmup": 6}, "warmup: got 6 of 5 steps"),
        ({"learning_rate": 0}, "learning_rate: got 0, wanted a positive number"),
        ({"learning_rate": math.nan}, "learning_rate: got nan"),
        ({"clip": -1}, "clip: got -1"),
        ({"weight_decay": "much"}, "weight_decay: got 'much'"),
        ({"rank": 33}, "rank: got 33, wanted a whole number from 1 to the lens's width 32"),
        ({"rank": 2, "bias_only": True}, "bias_only: rank is of matrices"),
        ({"layers": []}, "layers: got none to train"),
        ({"layers": [3]}, "layers: got 3, wanted 0 to 2"),
        ({"layers": 1}, "layers: got a int"),
        ({"documents": []}, "documents: got none"),
        ({"documents": [[]]}, r"documents: document 0 has shape \[0\]"),
        ({"documents": [[1, 2], [3, 999]]}, "documents: document 1: got 999"),
        ({"documents": 3}, "documents: got a int"),
        ({"documents": ["text"]}, "documents: document 0 is a str"),
        ({"documents": [[1] * 400]}, "documents: got 1, one, of which none can be held out; give more, or held_out="),
        ({"documents": [[1] * 400] * 3}, "documents: got 3, all the same, of which none can be held out"),
        ({"documents": [[1] * 60, [2] * 50]}, "documents: 60 tokens to train on, too few for a single step of 128"),
        ({"held_out": 1.0}, "held_out: got 1.0, wanted a share between 0 and 1, or documents"),
        ({"held_out": [[]]}, r"held_out: document 0 has shape"),
        ({"held_out": None}, "held_out: got a NoneType"),
        ({"sequence_length": 1}, "sequence_length: got 1, wanted a whole number from 2"),
        ({"tokens_per_step": 20}, "tokens_per_step: got 20, less than one sequence of 32"),
        ({"separator": "pad"}, "separator: got 'pad', wanted a token id, 'eos' or None"),
        ({"separator": 10**6}, "separator: got 1000000"),
        ({"engine": "warp"}, "engine"),
        ({"memory_budget": -1}, "memory_budget: got -1"),
        ({"memory_budget": "1G"}, "memory_budget: got '1G'"),
    ],
)
def test_bad_arguments(model, tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        trained(model, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_bad_lenses(model):
    for lens, message in (
        (tl.LogitLens.from_model(model), "lens: got a LogitLens, wanted a TunedLens"),
        (tl.TunedLens.from_model(tiny("llama")), "lens: its vocabulary is 101, the model's 260"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            trained(model, lens=lens)
    with pytest.raises(ValueError, match="bias_only: the lens has no biases"):
        trained(model, lens=tl.TunedLens.from_model(model, bias=False), bias_only=True)
    with pytest.raises(TypeError, match="model: got a str"):
        trained("gpt2", lens=tl.TunedLens.from_model(model))


def test_muon_where_there_is_none(model, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"optimizer: 'muon' needs torch.optim.Muon, which PyTorch .* has not"):
        trained(model, optimizer="muon")


def test_held_out_documents_are_not_trained_on(model):
    held = documents()
    with pytest.warns(UserWarning, match="2 of 32 are held out too and are not trained on"):
        _, found = trained(model, documents=[*held, held[3], held[3][:-1]], held_out=[held[3]], steps=1)
    length = min(32, len(held[3]))
    assert found.tokens["held_out"] == (len(held[3]) + 1) // length * length  # with what separates it
    with pytest.raises(ValueError, match="documents: every one of them is held out too"):
        trained(model, documents=held[:1], held_out=held)


# The command


@pytest.fixture
def text(tmp_path):
    """A file of text, and the same as JSONL."""
    lines = [f"{i}: {'the quick brown fox jumps over the lazy dog ' * (1 + i % 3)}" for i in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [json.dumps({"text": line, "number": i}) for i, line in enumerate(lines)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


SMALL = ["--steps", "2", "--tokens-per-step", "256", "--sequence-length", "64", "--eval-tokens", "128"]


def test_command(saved, text, capsys):
    folder, out = saved[0], text / "lens"
    assert cli.main(["train", folder, "--text", str(text / "text.txt"), "--out", str(out), *SMALL]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[1:]] == ["layers", "early:", "middle:", "late:"]
    assert "2 steps of 256 tokens" in printed.err
    line = printed.err.splitlines()[-1]
    assert line == f'tuned-lens-fast decode {folder} --lens {out} "..."'
    assert cli.main(["decode", folder, "--lens", str(out), "Hello"]) == 0
    capsys.readouterr()
    assert cli.main(["train", folder, "--text", str(text / "text.txt"), "--out", str(out), *SMALL, "--quiet"]) == 0
    assert "finished; it is not trained again" in capsys.readouterr().err
    go_on = ["--lens", str(out), "--out", str(text / "more"), "--optimizer", "adam", "--rank", "2", "--loss", "ce"]
    jsonl = ["--jsonl", str(text / "text.jsonl"), "--held-out", "0.2"]
    assert cli.main(["train", folder, *jsonl, *go_on, *SMALL]) == 0
    arguments = json.loads((text / "more" / "report.json").read_text())["arguments"]
    assert (arguments["init"], arguments["rank"], arguments["held_out"]) == ("lens", 2, 0.2)


@pytest.mark.slow
def test_command_on_a_data_set(saved, text, capsys):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    (text / "data").mkdir()
    os.rename(text / "text.jsonl", text / "data" / "train.jsonl")
    datasets.load_dataset(str(text / "data"), split="train").save_to_disk(text / "kept")
    runs = []
    for name in ("data", "kept"):
        argv = ["train", saved[0], "--dataset", str(text / name), "--out", str(text / f"lens of {name}"), *SMALL]
        assert cli.main(argv) == 0
        runs.append((text / f"lens of {name}" / "params.pt").read_bytes())
    assert runs[0] == runs[1]
    capsys.readouterr()
    for options, message in (
        (
            ["--dataset", str(text / "data"), "--text-column", "body"],
            "has no column 'body', there are 'text', 'number'",
        ),
        (["--dataset", str(text / "data"), "--text-column", "number"], "'number' of row 0 of .* is int, wanted text"),
        (["--dataset", str(text / "data"), "--split", "dev"], "dataset: cannot load .*split 'dev'"),
        (["--dataset", str(text / "nowhere")], "dataset: cannot load"),
    ):
        assert cli.main(["train", saved[0], *options, "--out", str(text / "other"), *SMALL]) == 1
        assert_one_line(capsys.readouterr().err, message)


def test_command_passes_over_empty_texts(saved, text, capsys):
    """As tuned-lens does; data sets are full of them."""
    rows = (text / "text.jsonl").read_text().splitlines()
    (text / "gaps.jsonl").write_text("\n".join([rows[0], json.dumps({"text": ""}), *rows[1:], '{"text": " \\n"}']))
    for name in ("text", "gaps"):
        argv = ["train", saved[0], "--jsonl", str(text / f"{name}.jsonl"), "--out", str(text / name), *SMALL]
        assert cli.main([*argv, "--init", "zero", "--quiet"]) == 0
    assert (text / "gaps" / "params.pt").read_bytes() == (text / "text" / "params.pt").read_bytes()
    (text / "none.jsonl").write_text('{"text": ""}\n')
    argv = ["train", saved[0], "--jsonl", str(text / "none.jsonl"), "--out", str(text / "lens"), *SMALL]
    assert cli.main(argv) == 1
    assert_one_line(capsys.readouterr().err, "none.jsonl has no documents but empty ones")


def assert_one_line(printed, message):
    assert printed.count("\n") == 1, printed
    assert re.search(message, printed), printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere/at/all", "--text", "text.txt"], "model: there is no folder 'nowhere/at/all'"),
        (["MODEL", "--text", "gone.txt"], "text: cannot read .*gone.txt: No such file"),
        (["MODEL", "--text", "latin.txt"], "text: .*latin.txt is not UTF-8 text"),
        (["MODEL", "--text", "empty.txt"], "text: there is none in .*empty.txt"),
        (["MODEL", "--jsonl", "text.jsonl", "--text-column", "body"], "line 1: no column 'body', there are 'text'"),
        (["MODEL", "--text", "text.txt", "--held-out", "gone.txt"], "text: cannot read gone.txt"),
        (["MODEL", "--text", "text.txt", "--lens", "nowhere"], "no lens at .*nowhere"),
        (["MODEL", "--text", "text.txt", "--lens", "wide"], "lens: .*wide' is of a model of width 48, .* has 32"),
        (["MODEL", "--text", "text.txt", "--out", "text.txt"], "text.txt is a file, wanted a folder"),
        (["MODEL", "--text", "text.txt", "--out", "."], "holds .*, and no run of training"),
    ],
)
def test_command_refuses_before_the_model_loads(saved, text, capsys, monkeypatch, argv, message):
    (text / "latin.txt").write_bytes("größer".encode("latin-1"))
    (text / "empty.txt").write_text(" \f\n")
    (text / "wide").mkdir()
    config = {"base_model_name_or_path": "x", "d_model": 48, "num_hidden_layers": 3, "bias": True, "unembed_hash": "0"}
    (text / "wide" / "config.json").write_text(json.dumps(config))
    torch.save({}, text / "wide" / "params.pt")
    files = {
        name: str(text / name) for name in ("text.txt", "text.jsonl", "latin.txt", "empty.txt", "wide", "nowhere", ".")
    }
    argv = [saved[0] if word == "MODEL" else files.get(word, word) for word in argv]
    monkeypatch.setattr("tuned_lens_fast.cli.train.load_model", lambda args: pytest.fail("the model was loaded"))
    out = [] if "--out" in argv else ["--out", str(text / "lens")]
    assert cli.main(["train", *argv, *out, *SMALL]) == 1
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "wanted one of --jsonl FILE, --text FILE or --dataset NAME"),
        (["--text", "a", "--jsonl", "b"], "wanted one of"),
        (["--text", "a", "--split", "train"], "--split and --config are for --dataset"),
        (["--text", "a", "--text-column", "x"], "--text-column is for"),
        (["--text", "a", "--bias-only", "--rank", "2"], "--rank is of matrices"),
        (["--text", "a", "--steps", "3", "--warmup", "4"], "--warmup: got 4 of 3 steps"),
        (["--text", "a", "--init", "lens"], "--init lens: wanted --lens"),
        (["--text", "a", "--held-out", "1.5"], "--held-out: got 1.5, wanted a share"),
        (["--dataset", "a", "--held-out", "b.txt"], "--held-out: wanted a share where the texts are a data set"),
        (["--text", "a", "--learning-rate", "fast"], "got 'fast', wanted a number from 0"),
        (["--text", "a", "--steps", "0"], "got '0', wanted a whole number from 1"),
    ],
)
def test_command_line_errors(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "model", "--out", "lens", *argv])
    assert caught.value.code == 2
    assert_one_line(capsys.readouterr().err, message)


def test_files_of_text(tmp_path):
    from tuned_lens_fast.cli.train import _cut, _of_files

    (tmp_path / "one").write_bytes(b"\xef\xbb\xbffirst\fsecond\n\f \n")
    (tmp_path / "two").write_text("\f".join("abc" for _ in range(30)))
    assert [d.text for d in _of_files([tmp_path / "two", tmp_path / "one"])] == ["abc"] * 30 + ["first", "second\n"]
    whole = "".join(f"line {i}\n" for i in range(500))
    (tmp_path / "three").write_text(whole)
    pieces = [d.text for d in _of_files([tmp_path / "three"])]
    assert "".join(pieces) == whole.removesuffix("\n")
    assert 18 <= len(pieces) <= 20
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert [*_cut("abcdefgh", 3)] == ["abc", "def", "gh"]
    assert [*_cut("ab\ncdefg", 2)] == ["ab\n", "cd", "ef", "g"]
