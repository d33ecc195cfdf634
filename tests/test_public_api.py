"""The rest of tuned-lens's API, at its places: names, model surgery, causal tools, statistics of logits, chunking."""

import importlib
import inspect
from collections import namedtuple
from pathlib import Path
from unittest import mock

import numpy as np
import public_names
import pytest
import tiny_text_model
import torch
from huggingface_hub.errors import RevisionNotFoundError
from tiny_models import D_MODEL, LAYERS, tiny
from torch import nn
from torch.distributions import Categorical, Dirichlet

import tuned_lens_fast as tl
from tuned_lens_fast import causal, data, load_artifacts, model_surgery, stats, utils
from tuned_lens_fast.stats.distance import sqrtmh

datasets = pytest.importorskip("datasets", reason="datasets is not installed, whose tables are cut into chunks here")

IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture(scope="module")
def theirs():
    """A function from a module of tuned-lens to it."""
    reason = "the library to compare with is not installed: pip install --no-deps tuned-lens==0.2.0"
    return lambda module: pytest.importorskip(f"tuned_lens.{module}".rstrip("."), reason=reason)


# --- names ---


def test_every_name_is_at_its_place():
    names = set(public_names.NAMES.read_text().split())
    missing = {name for name in names if not public_names.is_here(name)}
    assert missing == public_names.GONE
    assert not public_names.is_here("nn.lenses.TunedLens.banana")
    assert not public_names.is_here("banana.TunedLens")


def test_the_list_has_every_name_of_the_release(theirs):
    names = public_names.names_of(Path(theirs("").__file__).parent)
    assert len(names) > 100
    assert names <= set(public_names.NAMES.read_text().split())


def test_what_is_gone_says_what_to_use():
    with pytest.raises(AttributeError, match=r"has no Main: main\(argv\)"):
        _ = importlib.import_module("tuned_lens_fast.__main__").Main


PLOTTING = ["plotting.prediction_trajectory", "plotting.token_formatter", "plotting.trajectory_plotting"]


@pytest.mark.parametrize("module", ["causal", "data", "model_surgery", "stats", "utils", *PLOTTING])
def test_every_argument_is_there(module, theirs):
    """By name and order; what is more has a default."""
    ours = importlib.import_module(f"tuned_lens_fast.{module}")
    renamed = {"max_length": "max_seq_len"}  # on the main branch
    for name, value in vars(theirs(module)).items():
        if not (inspect.isclass(value) or inspect.isfunction(value)) or not value.__module__.startswith("tuned_lens."):
            continue
        functions = [(value, getattr(ours, name))]
        if inspect.isclass(value):
            functions += [
                (getattr(value, method), getattr(getattr(ours, name), method))
                for method, function in vars(value).items()
                if not method.startswith("__") and callable(getattr(value, method)) and not inspect.isclass(function)
            ]
        for wanted, found in functions:
            wanted, found = (inspect.signature(each).parameters for each in (wanted, found))
            missing = [renamed.get(parameter, parameter) for parameter in wanted]
            assert [parameter for parameter in found if parameter in missing] == missing, name
            more = [found[parameter] for parameter in found if parameter not in missing]
            assert all(parameter.default is not parameter.empty for parameter in more), name


def test_the_module_is_guarded():
    importlib.reload(importlib.import_module("tuned_lens_fast.__main__"))


# --- model surgery ---


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "opt"])
def test_layers_are_taken_out_put_in_order_and_replaced(model_type):
    model = tiny(model_type)
    blocks = [*model_surgery.get_transformer_layers(model)[1]]

    def order():
        path, found = model_surgery.get_transformer_layers(model)
        assert model_surgery.get_key_path(model, path) is found
        return [blocks.index(block) for block in found]

    def run():
        return model(IDS, use_cache=False).logits

    with torch.no_grad():
        before = run()
        seen = []
        hooks = [block.register_forward_hook(lambda module, *_: seen.append(blocks.index(module))) for block in blocks]
        for change, wanted in (
            (model_surgery.delete_layers(model, [0, -1]), [1]),
            (model_surgery.permute_layers(model, [2, 0, 1]), [2, 0, 1]),
            (model_surgery.permute_layers(model, [0, 1, 1, 1, 2, 0]), [0, 1, 1, 1, 2, 0]),
            (model_surgery.permute_layers(model, []), []),
        ):
            seen.clear()
            with change as changed:
                assert changed is model
                assert order() == wanted
                run()
            assert seen == wanted
            assert order() == [0, 1, 2]
            assert torch.equal(run(), before)
        with model_surgery.replace_layers(model, [1], [blocks[0]]):
            assert order() == [0, 0, 2]
        with pytest.raises(ZeroDivisionError), model_surgery.delete_layers(model, [1]):
            _ = 1 / 0
        assert order() == [0, 1, 2]
        for hook in hooks:
            hook.remove()
    with pytest.raises(IndexError), model_surgery.permute_layers(model, [3]):
        pass
    with pytest.raises(ValueError, match="replacements: got 1 for 2"), model_surgery.replace_layers(model, [0, 1], [1]):
        pass
    model_surgery.permute_layers_(model, [1, 0])
    assert order() == [1, 0]


def test_key_paths():
    model = tiny("gpt2")
    path = "transformer.h.1.mlp.c_fc.bias"
    before = model_surgery.get_key_path(model, path)
    assert before is model.transformer.h[1].mlp.c_fc.bias
    other = nn.Parameter(torch.zeros_like(before))
    with model_surgery.assign_key_path(model, path, other):
        assert model_surgery.get_key_path(model, path) is other
    assert model_surgery.get_key_path(model, path) is before
    block = nn.Identity()
    with model_surgery.assign_key_path(model, "transformer.h.2", block):
        assert model.transformer.h[2] is block
    things = [1, 2]
    model_surgery.set_value_for_key_(things, "1", 3)
    assert (model_surgery.get_value_for_key(things, "1"), things) == (3, [1, 3])


# --- causal tools ---


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "gpt_neox", "qwen2"])
def test_ablations(model_type):
    """Blocks return a tensor or several things, and take the stream by place or by name."""
    model = tiny(model_type)
    direction = torch.randn(D_MODEL, 2)

    def last():
        return tl.residual_stream(model, IDS)

    plain = last()
    added = plain[2] - plain[1]
    with causal.ablate_layer(model, 1, "zero"):
        torch.testing.assert_close(last()[2], plain[1])
    with causal.ablate_layer(model, 1, "mean"):
        torch.testing.assert_close(last()[2], plain[1] + added.mean(0, keepdim=True))
    with causal.ablate_layer(model, 1, "mean", mode="token"):
        torch.testing.assert_close(last()[2], plain[1] + added.mean((0, 1), keepdim=True))
    with causal.ablate_layer(model, 1, "resample"):  # of two rows, each is the other's
        torch.testing.assert_close(last()[2], plain[1] + added.flip(0))
    with causal.ablate_subspace(model, direction, 1):
        torch.testing.assert_close(last()[2] @ direction, torch.zeros(2, 8, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(last(), plain)


def test_ablation_errors():
    model = tiny("gpt2")
    for error, call in (
        (ValueError, lambda: causal.ablate_layer(model, 0, "banana")),
        (ValueError, lambda: causal.ablate_layer(model, 0, "mean", mode="banana")),
        (IndexError, lambda: causal.ablate_layer(model, LAYERS, "zero")),
        (IndexError, lambda: causal.ablate_layer(model, -1, "zero")),
    ):
        with pytest.raises(error, match="got"), call():
            pass
    with causal.ablate_layer(model, 0, "mean"), pytest.raises(ValueError, match="'mean' needs two or more"):
        model(IDS[:1])
    for u, A, mode in (
        (torch.ones(3, 4), torch.ones(5), "zero"),
        (torch.ones(1, 4), torch.ones(4), "mean"),
        (torch.ones(3, 4), torch.ones(4), "banana"),
    ):
        with pytest.raises(ValueError, match="wanted"):
            causal.remove_subspace(u, A, mode)
    with pytest.raises(ValueError, match="n: got 1"):
        causal.sample_derangement(1)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("orthonormal", [False, True])
def test_remove_subspace(mode, orthonormal, theirs):
    u, A = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    A = torch.linalg.qr(A).Q if orthonormal else A
    seed = torch.random.get_rng_state()
    found = causal.remove_subspace(u, A, mode, orthonormal)
    torch.random.set_rng_state(seed)
    wanted = theirs("causal").remove_subspace(u, A, mode, orthonormal)
    torch.testing.assert_close(found, wanted)
    rest = torch.linalg.svd(A).U[:, 3:]  # what is orthogonal to A stays
    torch.testing.assert_close(found @ rest, u @ rest)


def test_derangements_are_uniform():
    generator = torch.Generator().manual_seed(0)
    found = [tuple(causal.sample_derangement(4, generator=generator).tolist()) for _ in range(900)]
    assert len(set(found)) == 9
    assert all(place != number for each in found for place, number in enumerate(each))
    assert min(found.count(each) for each in set(found)) > 60


def test_a_causal_basis_finds_the_direction_that_matters():
    """Of a lens that reads one direction of the hidden state, and nearly nothing of another."""
    torch.manual_seed(0)
    head = nn.Linear(6, 20, bias=False)
    one, two = torch.linalg.qr(torch.randn(6, 2)).Q.T
    with torch.no_grad():
        head.weight.copy_(torch.randn(20, 1) * one + 0.1 * torch.randn(20, 1) * two)
    lens = tl.LogitLens(tl.Unembed.from_modules(None, head))
    hiddens = [torch.randn(2, 9, 6) for _ in range(3)]

    def energy(hidden, direction):
        after = lens(causal.remove_subspace(hidden, direction, "mean"), 0)
        return stats.kl_divergence(lens(hidden, 0), after).mean()

    bases = [*causal.extract_causal_bases(lens, hiddens, k=3, max_iter=20)]
    assert len(bases) == 2
    for basis, hidden in zip(bases, hiddens, strict=False):
        energies, vectors = basis
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), atol=1e-5, rtol=0)
        assert (vectors[:, 0] @ one).abs() > 0.9
        assert energies[0] >= energy(hidden, one) > 10 * energy(hidden, two)
        assert (energies.diff() <= 0).all()
        assert energies[2] < 0.1 * energies[0]
        torch.testing.assert_close(energy(hidden, vectors[:, 0]), energies[0])
    labels = torch.randint(0, 20, (2, 9))
    (first, _) = causal.extract_causal_bases(lens, hiddens, k=1, labels=labels, max_iter=5)
    assert first.energies.isfinite().all()
    with pytest.raises(ValueError, match="k: got 7"):
        next(causal.extract_causal_bases(lens, hiddens, k=7))
    tuned = tl.TunedLens.from_model(tiny("gpt2"))  # with a norm and translators
    (basis, *_) = causal.extract_causal_bases(tuned, [torch.randn(2, 4, D_MODEL)] * 2, k=1, max_iter=5)
    assert basis.vectors.shape == (D_MODEL, 1)


# --- statistics of logits ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_divergences_of_logits(dtype, theirs):
    p, q = (
        (4 * torch.randn(5, 30, dtype=torch.float64)).to(dtype),
        (4 * torch.randn(5, 30, dtype=torch.float64)).to(dtype),
    )
    one, two = (Categorical(logits=z.double()) for z in (p, q))
    mean = Categorical(probs=(one.probs + two.probs) / 2)
    kl = torch.distributions.kl_divergence
    for found, wanted in (
        (stats.kl_divergence(p, q), kl(one, two)),
        (stats.js_divergence(p, q), (kl(one, mean) + kl(two, mean)) / 2),
        (stats.js_distance(p, q), ((kl(one, mean) + kl(two, mean)) / 2).sqrt()),
        (stats.kl_divergence(p.T, q.T, dim=0), kl(one, two)),
    ):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)
    for name in ("kl_divergence", "js_divergence", "js_distance"):
        found, wanted = getattr(stats, name)(p.float(), q.float()), getattr(theirs("stats"), name)(p.float(), q.float())
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_tokens_that_are_excluded_add_nothing():
    p = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf], requires_grad=True)
    q = torch.tensor([-torch.inf, -torch.inf, 0.0, 0.0])
    assert stats.js_divergence(p, q).item() == pytest.approx(np.log(2))
    assert stats.kl_divergence(p, q).item() == torch.inf
    half = stats.kl_divergence(p, torch.zeros(4))
    assert half.item() == pytest.approx(np.log(2))
    half.backward()
    assert p.grad.isfinite().all()
    x = torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(sqrtmh(x @ x.T) @ sqrtmh(x @ x.T), x @ x.T)


def test_logit_stats():
    truth = Dirichlet(torch.tensor([1.0, 2.0, 0.5]))
    torch.manual_seed(0)
    logits = truth.sample((20_000,)).log() + 3
    found = stats.LogitStats()
    for part in logits.split([1, 9_999, 0, 10_000]):
        found.update(part.reshape(1, -1, 3))
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(found.sufficient_stats, log_p.mean(0))
    torch.testing.assert_close(found.marginal_probs, log_p.exp().mean(0))
    assert found.n == 20_000
    assert torch.distributions.kl_divergence(truth, found.mle()) < 1e-3
    found.all_reduce_()  # of one process
    again = stats.LogitStats(found.n, found.marginal_probs, found.sufficient_stats)
    again.update(log_p, assume_normalized=True)
    assert again.n == 40_000
    torch.testing.assert_close(again.sufficient_stats, found.sufficient_stats)
    for call in (
        stats.LogitStats().mle,
        stats.LogitStats().all_reduce_,
        lambda: found.update(torch.zeros(1, 4)),
        lambda: stats.LogitStats(n=found.n),
    ):
        with pytest.raises(ValueError, match=r"nothing was seen|vocabulary of 4|some of them"):
            call()


# --- chunking ---


@pytest.mark.parametrize(
    "options", [{"max_seq_len": 16}, {"max_length": 16}, {"max_seq_len": 16, "return_final_batch": True}]
)
def test_chunks(options, theirs):
    tokenizer = tiny_text_model.make()[1]
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    texts = datasets.Dataset.from_dict(
        {"text": ["a text of its own", "another", "", "one more that goes on for a while"]}
    )
    found, ratio = data.chunk_and_tokenize(texts, tokenizer, num_proc=1, load_from_cache_file=False, **options)
    final = {"return_final_batch": True} if "return_final_batch" in options else {}
    wanted, their_ratio = theirs("data").chunk_and_tokenize(
        texts, tokenizer, num_proc=1, load_from_cache_file=False, max_length=16, **final
    )
    assert [each["input_ids"].tolist() for each in found] == [each["input_ids"].tolist() for each in wanted]
    assert ratio == pytest.approx(their_ratio)
    split, split_ratio = data.chunk_and_tokenize(
        datasets.DatasetDict(one=texts, two=texts), tokenizer, num_proc=1, load_from_cache_file=False, **options
    )
    assert len(split["one"]) == len(split["two"]) == len(found)
    assert split_ratio == pytest.approx(ratio)
    with pytest.raises(ValueError, match="which make no chunk of 1000"):
        data.chunk_and_tokenize(texts, tokenizer, num_proc=1, load_from_cache_file=False, max_seq_len=1000)
    with pytest.raises(ValueError, match="different columns"):
        data.get_columns_all_equal(datasets.DatasetDict(one=texts, two=texts.rename_column("text", "other")))


def test_chunks_of_a_tokenizer_in_python():
    """Which returns what is over as one list."""

    def tokenizer(text, max_length, **_):
        ids = [ord(char) for char in text]
        return {"input_ids": ids[:max_length], "overflowing_tokens": ids[max_length:]}

    tokenizer.model_max_length, tokenizer.eos_token = 1 << 60, None
    texts = datasets.Dataset.from_dict({"text": ["abcdefg", "hi"]})
    found, _ = data.chunk_and_tokenize(texts, tokenizer, num_proc=1, load_from_cache_file=False, max_seq_len=10)
    text = "<|endoftext|>abcdefg<|endoftext|>hi"
    assert ["".join(map(chr, each["input_ids"])) for each in found] == [text[:10], text[10:20], text[20:30]]


# --- helpers ---


def test_trees():
    Pair = namedtuple("Pair", "left right")
    tree = {"a": [torch.ones(2), (torch.zeros(2),)], "b": Pair(torch.arange(2), torch.arange(2))}
    doubled = utils.pytree_map(lambda x: 2 * x, tree)
    assert isinstance(doubled["b"], Pair)
    assert [x.tolist() for x in utils.pytree_flatten(doubled)] == [[2, 2], [0, 0], [0, 2], [0, 2]]
    both = utils.pytree_cat([tree, doubled])
    assert both["a"][0].tolist() == [1, 1, 2, 2]
    assert utils.pytree_stack([tree, doubled], dim=1)["b"].left.tolist() == [[0, 0], [1, 2]]
    assert utils.send_to_device(tree, torch.device("meta"))["a"][0].is_meta
    with pytest.raises(TypeError, match="got a str in it"):
        utils.pytree_map(lambda x: x, ["text"])
    assert utils.pytree_map(lambda x: x, ["text"], strict=False) == ["text"]
    with pytest.raises(TypeError, match="2, 1 tensors"):
        utils.pytree_cat([[torch.ones(1)] * 2, [torch.ones(1)]])
    with pytest.raises(ValueError, match="got none"):
        utils.pytree_stack([])


def test_helpers(theirs):
    their_utils = theirs("utils")
    x = torch.arange(6).reshape(1, 6)
    for shift in (-2, 0, 1):
        for name in ("shift_labels", "shift_preds"):
            assert torch.equal(getattr(utils, name)(x, shift), getattr(their_utils, name)(x, shift))
    sums = utils.revcumsum([x, x, x])
    assert all(torch.equal(a, b) for a, b in zip(sums, their_utils.revcumsum([x, x, x]), strict=True))
    assert utils.revcumsum([]) == []
    assert [*utils.pairwise("abc")] == [("a", "b"), ("b", "c")]
    assert utils.assert_type(int, 3) == 3
    with pytest.raises(TypeError, match="got a str, wanted a int"):
        utils.assert_type(int, "3")
    assert (utils.maybe_unpack((1, 2)), utils.maybe_unpack([1, 2])) == (1, [1, 2])
    assert torch.equal(utils.maybe_all_reduce(x), x)
    assert torch.equal(utils.maybe_all_cat(x), x)
    assert utils.maybe_all_gather_lists([1]) == [1]
    with pytest.raises(ValueError, match="'banana'"):
        utils.maybe_all_reduce(x, op="banana")
    with pytest.raises(RuntimeError, match=r"gone \(is there a folder"), utils.handle_name_conflicts():
        raise OSError("gone")
    for shape in ((3, 4), (50, 60)):
        array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        assert utils.tensor_hash(array) == their_utils.tensor_hash(array) == utils.tensor_hash(array.astype(np.float16))


def test_the_last_layer_by_its_number_from_the_end():
    model = tiny("gpt2")
    lens = tl.TunedLens.from_model(model)
    found, wanted = (
        lens.generate(model, layer, IDS[0], do_sample=False, max_new_tokens=4) for layer in (-1, LAYERS - 1)
    )
    assert torch.equal(found, wanted)
    with pytest.raises(IndexError, match="layer: got layer -4"):
        lens.generate(model, -LAYERS - 1, IDS[0])


# --- the hub ---


def test_available_lenses():
    files = ["lens/gpt2/config.json", "lens/gpt2/params.pt", "lens/a/b/config.json", "lens/a/b/params.safetensors",
             "lens/half/config.json", "other/x/config.json", "other/x/params.pt", "README.md"]  # fmt: skip
    with mock.patch("huggingface_hub.HfApi.list_repo_files", return_value=files) as listed:
        assert load_artifacts.available_lens_artifacts("some/one", "spaces") == {"gpt2", "a/b"}
        listed.assert_called_once_with("some/one", revision="main", repo_type="space")
        assert load_artifacts.available_lens_artifacts(
            "some/one", "model", ckpt_file="params.pt", subfolder="other"
        ) == {"x"}
    response = mock.Mock(status_code=404, headers={})
    for error, wanted in (
        (RevisionNotFoundError("gone", response=response), FileNotFoundError),
        (OSError("no network"), ConnectionError),
    ):
        with (
            mock.patch("huggingface_hub.HfApi.list_repo_files", side_effect=error),
            pytest.raises(wanted, match="the hub's space 'some/one'"),
        ):
            load_artifacts.available_lens_artifacts("some/one", "space")
