"""PredictionTrajectory: values in float64 and against the library it replaces, without log-probabilities in memory."""

import copy
import dataclasses
import importlib
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import tiny_text_model
import torch
from tiny_models import D_MODEL, LAYERS, VOCAB, tiny

import tuned_lens_fast as tl
from tuned_lens_fast import predictions
from tuned_lens_fast.engines import eager
from tuned_lens_fast.plotting import PredictionTrajectory, TokenFormatter, lazy_array
from tuned_lens_fast.plotting.lazy_array import LazyArray

STATISTICS = ("entropy", "cross_entropy", "rank", "forward_kl", "max_probability", "log_prob_diff")
DIVERGENCES = ("kl_divergence", "js_divergence", "total_variation")


@pytest.fixture(scope="module")
def tuned_lens():
    for module in ("tuned_lens.nn", "tuned_lens.plotting"):
        reason = "the library to compare with is not installed: pip install --no-deps tuned-lens==0.2.0"
        pytest.importorskip(module, reason=reason)
    return importlib.import_module("tuned_lens")


def randomised(lens):
    with torch.no_grad():
        for parameter in lens.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return lens


def made(model_type="llama", tokens=11, batch=(), lens=None, seed=0, **options):
    """A trajectory, its model and lens, and its arguments."""
    model = tiny(model_type)
    lens = lens(model) if lens else randomised(tl.TunedLens.from_model(model))
    generator = torch.Generator().manual_seed(seed)
    ids, targets, anti = (torch.randint(3, VOCAB, (*batch, tokens), generator=generator).numpy() for _ in range(3))
    found = PredictionTrajectory.from_lens_and_model(lens, model, ids, targets=targets, anti_targets=anti, **options)
    return found, model, lens, (ids, targets, anti)


def dense(model, lens, ids, mask=False):
    """Logits (*batch, layers + 1, tokens, vocab) in float64."""
    *entering, last = tl.residual_stream(model, torch.as_tensor(ids))
    x = reference.head_inputs(
        [*entering, last], [*(lens.translator(i) for i in range(len(entering))), None], lens.unembed.norm
    )
    z = reference.logits(x, lens.unembed.head).movedim(0, -3).detach()
    if mask:
        z[..., torch.as_tensor(np.unique(ids))] = -torch.inf
    return z


def by_definition(z, targets, anti):
    """Every statistic from logits, (*batch, layers, tokens) by name of the method."""
    log_p = z.log_softmax(-1)
    p, last = log_p.exp(), log_p[..., -1:, :, :]
    own = {
        name: log_p.gather(-1, torch.as_tensor(ids).unsqueeze(-2).unsqueeze(-1).expand(*log_p.shape[:-1], 1)).squeeze(
            -1
        )
        for name, ids in (("targets", targets), ("anti", anti))
    }
    return {
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "cross_entropy": -own["targets"],
        "rank": 1 + (log_p > own["targets"].unsqueeze(-1)).sum(-1),
        "forward_kl": torch.where(last.exp() > 0, last.exp() * (last - log_p), 0.0).sum(-1),
        "max_probability": p.amax(-1),
        "log_prob_diff": own["targets"] - own["anti"],
    }


def agree(found, wanted, **tolerance):
    wanted = np.asarray(wanted)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, **({"atol": 2e-4, "rtol": 1e-4} | tolerance))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gptj", "cohere"])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("mask", [False, True])
def test_statistics_in_float64(model_type, batch, mask):
    found, model, lens, (ids, targets, anti) = made(model_type, batch=batch, mask_input=mask)
    if mask:  # a target that is out has no log-probability
        targets[:], anti[:] = np.setdiff1d(np.arange(VOCAB), ids)[:2]
        found.targets, found.anti_targets = targets, anti
    z = dense(model, lens, ids, mask)
    for name, wanted in by_definition(z, targets, anti).items():
        wanted = wanted.double().mean(0) if batch else wanted
        agree(getattr(found, name)().stats, wanted)
    agree(np.diff(found.log_prob_diff().stats, axis=0), found.log_prob_diff(delta=True).stats)
    assert (found.num_layers, found.num_tokens, found.vocab_size) == (LAYERS, 11, VOCAB)
    assert (found.n_batch_axis, found.batch_axes, found.batch_shape) == (len(batch), tuple(range(len(batch))), batch)
    agree(np.asarray(found.probs), z.softmax(-1))
    agree(found.model_log_probs, z[..., -1, :, :].log_softmax(-1))


def test_against_the_library(tuned_lens):
    """Wherever that is right: not JS and TV, and not ties."""
    model = tiny("gpt2")
    their_lens = randomised(tuned_lens.nn.TunedLens.from_model(model))
    lens = tl.TunedLens.from_model(model)
    lens.load_state_dict(their_lens.state_dict())
    model.config.output_hidden_states = True
    ids, targets, anti = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(2)).tolist()
    options = {"input_ids": ids, "targets": targets, "anti_targets": anti}
    theirs = tuned_lens.plotting.PredictionTrajectory.from_lens_and_model(their_lens, model, **options)
    ours = PredictionTrajectory.from_lens_and_model(lens, model, **options)
    given = PredictionTrajectory(theirs.log_probs, np.array(ids), np.array(targets), np.array(anti))
    assert isinstance(ours.log_probs, LazyArray)
    np.testing.assert_allclose(np.asarray(ours.log_probs), theirs.log_probs, atol=1e-4)
    for mine in (ours, given):
        for name in STATISTICS:
            found, wanted = getattr(mine, name)(), getattr(theirs, name)()
            np.testing.assert_allclose(found.stats, wanted.stats, atol=1e-4, err_msg=name)
            for field in ("name", "units", "min", "max", "includes_output"):
                assert getattr(found, field) == getattr(wanted, field)
            assert found._layer_labels.tolist() == wanted._layer_labels.tolist()


@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_an_array_of_log_probs(batch):
    z = torch.randn(*batch, 4, 13, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    ids = torch.randint(0, 50, (3, *batch, 13), generator=torch.Generator().manual_seed(1)).numpy()
    for dtype in (np.float32, np.float64, np.float16):
        values = z.log_softmax(-1).numpy().astype(dtype)
        values.flags.writeable = False
        found = PredictionTrajectory(values, *ids)
        for name, wanted in by_definition(torch.as_tensor(values.astype(np.float64)), ids[1], ids[2]).items():
            agree(getattr(found, name)().stats, wanted.double().mean(tuple(range(len(batch)))) if batch else wanted)
        assert found.log_probs is values
        np.testing.assert_array_equal(found.probs, np.exp(values))
    backwards = PredictionTrajectory(values[..., ::-1, :], *ids[..., ::-1])
    np.testing.assert_allclose(backwards.entropy().stats, found.entropy().stats[:, ::-1], atol=1e-6)


def test_ties_rank_alike():
    found = PredictionTrajectory(np.zeros((2, 1, 5), np.float32), np.zeros(1, np.int64), targets=np.array([3]))
    assert found.rank().stats.tolist() == [[1], [1]]


def test_positions_without_a_target():
    found, *_, (_, targets, _) = made(batch=(2,))
    targets[0, 1] = targets[:, 4] = -100
    found.targets = targets
    alone = [replaced(found, targets=targets, at=i) for i in range(2)]
    for name in ("cross_entropy", "rank", "log_prob_diff"):
        both = getattr(found, name)().stats
        one, two = (getattr(each, name)().stats for each in alone)
        assert np.isnan(both[:, 4]).all()
        assert ((one[:, 1] == 0) if name == "rank" else np.isnan(one[:, 1])).all()
        np.testing.assert_allclose(both[:, 1], two[:, 1], atol=2e-4)
        np.testing.assert_allclose(both[:, 0], (one[:, 0] + two[:, 0]) / 2, atol=2e-4)


def replaced(trajectory, targets, at):
    """One entry of a batch."""
    values = np.asarray(trajectory.log_probs)[at]
    return PredictionTrajectory(values, trajectory.input_ids[at], targets[at], trajectory.anti_targets[at])


@pytest.mark.parametrize("batch", [(), (2,)])
def test_two_are_compared_in_float64(batch, monkeypatch):
    """One read, one an array, one with another norm, head and softcap; in several chunks and tiles."""
    monkeypatch.setattr(predictions, "CPU_CHUNK", (5, 64))
    one, model, lens, (ids, *_) = made(batch=batch)
    two, other_model, other_lens, (other_ids, *_) = made("gemma2", batch=batch, seed=1)
    array = PredictionTrajectory(np.asarray(one.log_probs), ids)
    p = dense(model, lens, ids).log_softmax(-1)
    q = dense(other_model, other_lens, other_ids).log_softmax(-1)
    mean = torch.add(p.exp(), q.exp()).div(2).log()
    wanted = {
        "kl_divergence": (p.exp() * (p - q)).sum(-1),
        "js_divergence": (p.exp() * (p - mean) + q.exp() * (q - mean)).sum(-1) / 2,
        "total_variation": (p.exp() - q.exp()).abs().sum(-1) / 2,
    }
    for first in (one, array):
        for name, value in wanted.items():
            found = getattr(first, name)(two)
            agree(found.stats, value.mean(0) if batch else value, atol=5e-4)
            assert found.name.endswith("(Self | Other)")
        np.testing.assert_array_equal(first.js_divergence(first).stats, 0)
        agree(one.kl_divergence(first).stats, np.zeros(found.stats.shape))
    assert one.total_variation(two).max == 1
    with pytest.raises(ValueError, match=r"other: its predictions are \[.*5, 101\], these"):
        one.kl_divergence(two.slice_sequence(slice(5)))


def test_js_is_bounded_and_tv_half_a_sum():
    far = np.full((2, 1, 4), -1e9, np.float32)
    far[..., 0] = 0
    one, two = (PredictionTrajectory(values, np.zeros(1, np.int64)) for values in (far, far[..., ::-1].copy()))
    np.testing.assert_allclose(one.js_divergence(two).stats, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(one.total_variation(two).stats, 1)


def test_one_model_pass_and_one_decode(monkeypatch):
    """Statistics come together and are kept; another statistic of them decodes nothing."""
    decodes = []
    decode = predictions.ReadLayers.decode
    monkeypatch.setattr(
        predictions.ReadLayers, "decode", lambda self, query: decodes.append(query.stats) or decode(self, query)
    )
    model, tokenizer = tiny_text_model.make()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    ids = tokenizer.encode("Hello world!")
    lens = tl.LogitLens.from_model(model)
    passes.clear()
    found = PredictionTrajectory.from_lens_and_model(lens, model, ids, tokenizer, targets=ids)
    assert len(passes) == 1
    for name in ("entropy", "cross_entropy", "rank", "forward_kl", "max_probability"):
        getattr(found, name)()
    assert len(decodes) == 2  # layers, output
    found.entropy(topk=3)
    assert len(decodes) == 2
    found.entropy(topk=12)
    assert decodes[2:] == [frozenset()] * 2
    found.slice_sequence(slice(2, 5)).entropy()
    assert len(decodes) == 4
    found.targets = np.zeros_like(found.targets)
    found.cross_entropy()
    assert decodes[4:] == [{"log_prob", "rank"}] * 2
    assert len(passes) == 1


def test_nothing_of_size_layers_by_tokens_by_vocabulary(monkeypatch):
    """Not in statistics, comparisons, figures, nor in a layer that is indexed."""
    for module in (predictions, eager):
        monkeypatch.setattr(module, "CPU_CHUNK", (16, 64))
    sizes = []
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: sizes.append((t := make(*a, **k)).numel()) or t)
    block = LazyArray._block
    monkeypatch.setattr(LazyArray, "_block", lambda self, n: sizes.append((b := block(self, n)).size) or b)
    model, tokenizer = tiny_text_model.make()
    ids = tokenizer.encode("a text of some length " * 4)
    one, two = (
        PredictionTrajectory.from_lens_and_model(
            tl.LogitLens.from_model(model), model, ids[i : 40 + i], tokenizer, ids[1:41]
        )
        for i in range(2)
    )
    layer = 40 * len(tokenizer)
    for name in STATISTICS[:-1]:
        getattr(one, name)()
    for name in DIVERGENCES:
        getattr(one, name)(two)
    one.log_probs[2], one.probs[-1, 3:9], one.log_probs[:, 4], one.log_probs[..., 7], one.model_log_probs
    assert max(sizes) <= layer
    _ = np.asarray(one.log_probs)
    assert max(sizes) == (LAYERS + 1) * layer


INDICES = [
    np.s_[2], np.s_[-1], np.s_[..., -1, :, :], np.s_[1:3], np.s_[:, 4], np.s_[..., 7], np.s_[1, 2, 3], np.s_[::-1, ::2],
    np.s_[[0, 2]], np.s_[[True, False, True, True]], np.s_[:, [1, 1, 0]], np.s_[0, :, [5, 6]], np.s_[None, 1],
    np.s_[...], np.s_[1, ..., None, [[1, 2], [3, 4]]], np.s_[:, -3:, 90:], np.s_[2:2], np.s_[()],
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_is_numpys(index):
    found, *_ = made()
    whole = np.asarray(found.log_probs)
    assert whole.dtype == np.float32
    got = found.log_probs[index]
    assert got.shape == whole[index].shape
    np.testing.assert_allclose(got, whole[index], rtol=2e-6)  # products of other shapes round otherwise
    np.testing.assert_allclose(found.probs[index], np.exp(whole)[index], rtol=2e-5)


def test_the_lazy_array_is_like_an_array(monkeypatch):
    found, *_ = made(batch=(2,))
    lazy, whole = found.log_probs, np.asarray(found.log_probs)
    assert (lazy.shape, lazy.ndim, lazy.size, lazy.nbytes, lazy.dtype, len(lazy)) == (
        whole.shape, whole.ndim, whole.size, whole.nbytes, whole.dtype, len(whole),
    )  # fmt: skip
    for made_of in (
        np.exp,
        np.negative,
        lambda x: x.max(-1),
        lambda x: np.sum(x, axis=-1),
        lambda x: x - x[..., :1, :, :],
    ):
        np.testing.assert_array_equal(made_of(lazy), made_of(whole))
    np.testing.assert_allclose(lazy[1, 2], whole[1, 2], rtol=2e-6)
    np.testing.assert_array_equal(lazy[whole > -3], whole[whole > -3])
    with pytest.raises(IndexError):
        lazy[0, 9]
    with pytest.raises(IndexError):
        lazy[0, 0, 0, 0, 0]
    with pytest.raises(AttributeError, match="no attribute 'banana'"):
        _ = lazy.banana
    assert repr(lazy).startswith("<log-probabilities [2, 4, 11, 101]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.asarray(lazy)
        monkeypatch.setattr(lazy_array, "LARGE", 4 * 11 * VOCAB)
        _ = lazy[:, 1]
    with pytest.warns(UserWarning, match=r"0\.0 MiB of 4 layers are made at once"):
        np.asarray(lazy)


@pytest.mark.parametrize(
    "index", [slice(2, 7), slice(None, None, 3), slice(None, None, -1), [0, 5, 5], np.arange(11) > 4]
)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_slices(index, batch):
    class Mine(PredictionTrajectory):
        pass

    found, *_ = made(batch=batch)
    found = Mine(found.log_probs, found.input_ids, found.targets, found.anti_targets)
    asked = found.entropy().stats
    array = Mine(np.asarray(found.log_probs), found.input_ids, found.targets, found.anti_targets)
    for whole in (found, array):
        part = whole.slice_sequence(index)
        assert isinstance(part, Mine)
        np.testing.assert_array_equal(part.input_ids, found.input_ids[..., index])
        np.testing.assert_allclose(part.entropy().stats, asked[:, index], atol=1e-5)
        for name in ("cross_entropy", "rank", "forward_kl", "log_prob_diff"):
            np.testing.assert_allclose(getattr(part, name)().stats, getattr(found, name)().stats[:, index], atol=1e-4)
        np.testing.assert_allclose(np.asarray(part.log_probs), array.log_probs[..., index, :], atol=1e-4)
    with pytest.raises(TypeError, match="slice: got 3"):
        found.slice_sequence(3)


@pytest.fixture(scope="module")
def with_tokenizer():
    model, tokenizer = tiny_text_model.make()
    ids = tokenizer.encode("Hello\nworld, it is")
    lens = tl.LogitLens.from_model(model)
    make = PredictionTrajectory.from_lens_and_model
    return make(lens, model, ids, tokenizer, ids[1:] + ids[:1]), make(lens, model, ids[::-1], tokenizer)


def test_labels_against_the_library(with_tokenizer, tuned_lens):
    ours, other = with_tokenizer
    theirs, their_other = (
        tuned_lens.plotting.PredictionTrajectory(
            np.asarray(each.log_probs), each.input_ids, each.targets, tokenizer=each.tokenizer
        )
        for each in (ours, other)
    )
    assert ours._get_sequence_labels().tolist() == theirs._get_sequence_labels().tolist()
    pairs = [
        (ours._largest_prob_labels(topk=4), theirs._largest_prob_labels(topk=4)),
        (ours._largest_delta_in_prob_labels(other), theirs._largest_delta_in_prob_labels(their_other)),
    ]
    for mine, wanted in pairs:
        assert mine.label_strings.tolist() == wanted.label_strings.tolist()
        assert mine.hover_over_entries[..., 0].tolist() == wanted.hover_over_entries[..., 0].tolist()
        assert mine.hover_over_entries.shape == wanted.hover_over_entries.shape
        for value, cut in zip(
            mine.hover_over_entries[..., 1].flat, wanted.hover_over_entries[..., 1].flat, strict=True
        ):
            assert value.endswith("%")
            number, wanted_number = (float(text.strip("Δ%") or 0) for text in (value, cut))
            assert abs(number - wanted_number) < 0.011 or len(cut) == 7  # theirs are cut where their tokens are
    for sort_by, values in ((ours.log_probs, ours.probs), (theirs.log_probs, theirs.probs)):
        tokens, top = ours._get_topk_tokens_and_values(3, sort_by, values)
        wanted_tokens, wanted_top = theirs._get_topk_tokens_and_values(3, theirs.log_probs, theirs.probs)
        assert tokens.tolist() == wanted_tokens.tolist()
        np.testing.assert_allclose(top, wanted_top, atol=1e-6)
    assert ours.rank(show_ranks=True).trajectory_labels.label_strings[1, 2] == str(ours.rank().stats[1, 2])


def test_labels_of_small_probabilities_are_empty_one_by_one(with_tokenizer):
    ours, other = with_tokenizer
    probability = ours.max_probability().stats
    least = float(np.median(probability))
    labels = ours._largest_prob_labels(min_prob=least).label_strings
    assert ((labels == "") == (probability <= least)).all()
    deltas = np.abs(np.asarray(other.probs) - np.asarray(ours.probs)).max(-1)
    labels = ours.kl_divergence(other, min_prob_delta=0.3).trajectory_labels.label_strings
    assert ((labels == "") == (deltas <= 0.3)).all()


def test_labels_of_a_batch(with_tokenizer):
    one, two = with_tokenizer
    both = PredictionTrajectory(
        np.stack([np.asarray(each.log_probs) for each in (one, two)]),
        np.stack([one.input_ids, two.input_ids]),
        tokenizer=one.tokenizer,
    )
    labels = both._largest_prob_labels(formatter=TokenFormatter(max_string_len=3), topk=2, max_entries_to_show=1)
    assert labels.hover_over_entries.shape == (LAYERS + 1, one.num_tokens, 2, 2)
    tops = [each._largest_prob_labels().label_strings for each in (one, two)]
    assert (both._largest_prob_labels().label_strings == np.where(tops[0] == tops[1], tops[0], "*")).all()
    heads = both._get_sequence_labels()
    assert (
        heads == np.where(one._get_sequence_labels() == two._get_sequence_labels(), one._get_sequence_labels(), "*")
    ).all()


def test_labels_are_made_when_they_are_looked_at(with_tokenizer):
    class Spelt:
        def __init__(self, tokenizer):
            self.tokenizer, self.vocab_size, self.asked = tokenizer, tokenizer.vocab_size, []

        def convert_ids_to_tokens(self, ids):
            self.asked.append(len(ids))
            return self.tokenizer.convert_ids_to_tokens(ids)

    ours = with_tokenizer[0]
    counted = dataclasses.replace(ours, tokenizer=Spelt(ours.tokenizer))
    found, wanted = counted.entropy().trajectory_labels, ours.entropy().trajectory_labels
    late, shown = found.stride(2), counted.rank(show_ranks=True).stride(2).trajectory_labels
    assert found.shape == wanted.label_strings.shape
    assert len(counted.tokenizer.asked) == 2  # of the input, by each statistic
    for labels, array in (("label_strings", 2), ("hover_over_entries", 4)):
        whole = getattr(wanted, labels)
        assert getattr(found, labels).tolist() == whole.tolist()
        assert getattr(late, labels).tolist() == whole[[0, 2, 3]].tolist()
        assert whole.ndim == array
    assert found.stride(2).hover_over_entries.tolist() == late.hover_over_entries.tolist()
    assert shown.label_strings.tolist() == np.char.mod("%d", ours.rank().stats)[[0, 2, 3]].tolist()
    renamed = dataclasses.replace(found, label_strings=np.full(found.shape, "x"))
    assert (renamed.stride(4).label_strings == "x").all()
    assert renamed.shape == found.shape
    assert pickle.loads(pickle.dumps(wanted.stride(2))).label_strings.tolist() == late.label_strings.tolist()


@pytest.mark.parametrize("name", STATISTICS[:-1])
def test_figures(with_tokenizer, name):
    statistic = getattr(with_tokenizer[0], name)()
    figure = statistic.stride(2).figure(title="some title")
    (heatmap,) = figure.data
    assert [*heatmap.y] == ["0", "2", "output"]
    assert len(set(heatmap.x)) == with_tokenizer[0].num_tokens
    assert np.shape(heatmap.z) == (3, with_tokenizer[0].num_tokens)
    assert heatmap.colorbar.title.text.startswith(statistic.name)
    assert figure.layout.title.text == "some title"
    with np.errstate(all="raise"):
        statistic.clip(0.1, 5).heatmap(log_scale=True)


def test_a_bad_prompt_is_refused():
    model = tiny("gpt2")
    lens = tl.LogitLens.from_model(model)
    make = PredictionTrajectory.from_lens_and_model
    for error, ids, match in (
        (IndexError, [3, VOCAB], "input_ids: got 101"),
        (TypeError, [0.5], "input_ids: got float64"),
        (ValueError, [], "no tokens"),
        (ValueError, [[[1]]], "wanted"),
        (ValueError, [1] * 65, "65 positions"),
    ):
        with pytest.raises(error, match=match):
            make(lens, model, ids)
    with pytest.raises(AssertionError, match=r"targets: got shape \[1\], wanted \[2\]"):
        make(lens, model, [3, 4], targets=[1])
    found = make(lens, model, [3])  # a single token
    assert found.entropy().stats.shape == (LAYERS + 1, 1)
    for name in ("cross_entropy", "rank", "log_prob_diff"):
        with pytest.raises(ValueError, match="targets: there are none"):
            getattr(found, name)()
    found.targets = np.array([VOCAB])
    with pytest.raises(IndexError, match="targets: got 101"):
        found.cross_entropy()


def test_a_nan_stays_in_its_row():
    values = np.random.default_rng(0).normal(size=(3, 4, 20)).astype(np.float32)
    values[1, 2, 5] = np.nan
    found = PredictionTrajectory(values, np.arange(4), targets=np.arange(4), tokenizer=tiny_text_model.make()[1])
    for name in ("entropy", "cross_entropy", "forward_kl", "max_probability"):
        assert np.isnan(getattr(found, name)().stats).nonzero() == (np.array([1]), np.array([2]))
    assert found.entropy().trajectory_labels.label_strings[1, 2] == ""
    found.entropy().figure()


def test_any_lens_is_read():
    class Turned(tl.Lens):
        def transform_hidden(self, h, idx):
            return h.roll(idx, -1).abs()

        def forward(self, h, idx):
            return self.unembed.forward(self.transform_hidden(h, idx))

    found, model, lens, (ids, *_) = made(lens=lambda model: Turned(tl.Unembed(model)))
    for i, h in enumerate(tl.residual_stream(model, torch.as_tensor(ids))[:-1]):
        agree(found.log_probs[i], lens(h, i).log_softmax(-1).detach())
        agree(found.entropy().stats[i], torch.distributions.Categorical(logits=lens(h, i)).entropy().detach())
    np.testing.assert_array_equal(found.kl_divergence(found).stats, 0)


def test_a_lens_that_lacks_layers():
    model = tiny("llama")
    config = tl.TunedLensConfig("any", D_MODEL, LAYERS, translated_layers=[0, 2])
    found = PredictionTrajectory.from_lens_and_model(tl.TunedLens(tl.Unembed(model), config), model, [3, 4, 5])
    whole = PredictionTrajectory.from_lens_and_model(tl.TunedLens.from_model(model), model, [3, 4, 5])
    assert found.num_layers == 2
    np.testing.assert_allclose(found.entropy().stats, whole.entropy().stats[[0, 2, 3]], atol=1e-5)
    assert found.entropy()._layer_labels.tolist() == ["0", "2", "output"]


def test_copies_and_pickles():
    found, *_ = made()
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        np.testing.assert_allclose(other.entropy().stats, found.entropy().stats, atol=1e-6)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("lead", [(9,), (2, 9)])
def test_from_a_cache(lead, mask):
    """Of anything with a cache's parts; TransformerLens's own is in test_wrapped_models."""
    model = tiny("gpt2")
    lens = randomised(tl.TunedLens.from_model(model))
    ids = torch.randint(3, VOCAB, lead)
    entering = tl.residual_stream(model, ids)
    cache = Cache({("resid_pre", i): h for i, h in enumerate(entering)}, tokenizer="any")
    found = PredictionTrajectory.from_lens_and_cache(
        lens, ids, cache, model(torch.atleast_2d(ids)).logits.reshape(*lead, VOCAB), targets=ids, mask_input=mask
    )
    assert found.tokenizer == "any"
    found.tokenizer = None
    wanted = by_definition(dense(model, lens, ids, mask), ids, ids)
    for name in ("entropy", "forward_kl", "max_probability", *(() if mask else ("cross_entropy", "rank"))):
        value = wanted[name].double()
        agree(getattr(found, name)().stats, value.mean(0) if len(lead) > 1 else value)
    with pytest.raises(ValueError, match="input_ids: got shape"):
        PredictionTrajectory.from_lens_and_cache(lens, ids[..., 1:], cache, torch.zeros(*lead, VOCAB))
    with pytest.raises(ValueError, match="model_logits: got"):
        PredictionTrajectory.from_lens_and_cache(lens, ids, cache, torch.zeros(*lead, VOCAB - 1))


class Cache(dict):
    """An ActivationCache as far as it is read."""

    def __init__(self, states, tokenizer):
        super().__init__(states)
        self.model = SimpleNamespace(cfg=SimpleNamespace(n_layers=LAYERS), tokenizer=tokenizer)
