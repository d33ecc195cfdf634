"""lens.decode: shapes, defaults, what it refuses, and that it compiles."""

import math

import pytest
import reference
import torch
from tiny_models import LAYERS, VOCAB, tiny

import tuned_lens_fast as tl
from tuned_lens_fast.engines.statistics import STATISTICS

D = 32


@pytest.fixture(scope="module")
def lens():
    torch.manual_seed(0)
    lens = tl.TunedLens.from_model(tiny("llama"))
    with torch.no_grad():
        for parameter in lens.layer_translators.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return lens


def hidden(*lead, layers=LAYERS, seed=0):
    return torch.randn(layers, *lead, D, generator=torch.Generator().manual_seed(seed))


def expected(lens, states, **inputs):
    """float64 statistics of every layer, positions flattened."""
    flat = [h.reshape(-1, D) for h in states]
    x = reference.head_inputs(flat, [lens.translator(i) for i in range(len(flat))], lens.unembed.norm)
    return reference.logits(x, lens.unembed.head)


@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4), (), (1,)])
def test_values_and_shapes(lens, lead):
    states = hidden(*lead)
    targets = torch.randint(0, VOCAB, lead)
    ref = torch.randn(*lead, D)
    stats = lens.decode(
        states, targets=targets, reference=ref, top_k=4, watch=[3, 1, 4], stats=STATISTICS, engine="eager"
    )
    flat = {
        name: value.reshape(LAYERS, -1, *value.shape[1 + len(lead) :])
        for name, value in stats.items()
        if name not in ("layers", "targets")
    }
    reference.check(
        flat,
        expected(lens, states),
        targets=targets.reshape(-1),
        reference=reference.logits(ref.reshape(-1, D), lens.unembed.head),
        watch=torch.tensor([3, 1, 4]),
        top_k=4,
    )
    assert stats.lse.shape == (LAYERS, *lead)
    assert stats.top_ids.shape == (LAYERS, *lead, 4)
    assert stats.layers.tolist() == [*range(LAYERS)]
    assert torch.equal(stats.targets, targets)


def test_a_sequence_is_a_tensor_and_strides_do_not_matter(lens):
    states = hidden(4, 6)
    whole = lens.decode(states, engine="eager")
    for other in (list(states), tuple(states)):
        assert torch.equal(lens.decode(other, engine="eager").entropy, whole.entropy)
    # Positions that lie otherwise are read in other chunks, and so rounded otherwise.
    turned = lens.decode(states.transpose(1, 2).contiguous().transpose(1, 2), engine="eager")
    torch.testing.assert_close(turned.entropy, whole.entropy, atol=2e-5, rtol=0)


def test_defaults_are_what_the_inputs_allow(lens):
    states = hidden(5)

    def names(**inputs):
        return {name for name, _ in lens.decode(states, **inputs).items()} - {"lse", "layers"}

    targets = torch.zeros(5, dtype=torch.int64)
    assert names() == {"entropy", "max_prob"}
    assert names(targets=targets) == {"entropy", "max_prob", "log_prob", "rank", "targets"}
    assert names(reference=states[0]) == {"entropy", "max_prob", "kl"}
    assert names(targets=targets, reference=states[0], stats=[]) == {"targets"}
    assert names(stats={"max_prob"}, top_k=1) == {"max_prob", "top_ids", "top_log_probs"}


def test_layers_choose_translators(lens):
    states = hidden(5)
    whole = lens.decode(states)
    some = lens.decode(states[[2, 0]], layers=[2, 0])
    torch.testing.assert_close(some.entropy, whole.entropy[[2, 0]])
    assert some.layers.tolist() == [2, 0]
    twice = lens.decode([states[1], states[1]], layers=(1, 1))
    torch.testing.assert_close(twice.entropy, whole.entropy[[1, 1]])


def test_the_logit_lens_knows_its_models_layers(lens):
    logit_lens = tl.LogitLens(lens.unembed)
    assert logit_lens.decode(hidden(5)).layers.tolist() == [*range(LAYERS)]
    with pytest.raises(ValueError, match=r"already normed: pass hidden_states\[:-1\]"):
        logit_lens.decode(hidden(5, layers=LAYERS + 1))
    assert logit_lens.decode(hidden(5, layers=1), layers=[1]).layers.tolist() == [1]
    with pytest.raises(IndexError, match="layers: got 40"):
        logit_lens.decode(hidden(5, layers=1), layers=[40])


def test_hidden_states_that_do_not_flatten(lens):
    """A batch without its last position is no view [positions, d_model]; it is read as it lies."""
    whole = hidden(2, 6)
    targets = torch.arange(10).view(2, 5)
    cut = lens.decode(whole[:, :, :-1], targets=targets, reference=whole[0, :, :-1], top_k=2, watch=[3])
    plain = lens.decode(
        whole[:, :, :-1].contiguous(), targets=targets, reference=whole[0, :, :-1].contiguous(), top_k=2, watch=[3]
    )
    for name, value in plain.items():
        torch.testing.assert_close(dict(cut.items())[name], value, atol=2e-5, rtol=1e-5)


def test_targets_of_none(lens):
    targets = torch.tensor([5, -100, 7], dtype=torch.int32)
    stats = lens.decode(hidden(3), targets=targets)
    assert stats.log_prob[:, 1].isnan().all()
    assert (stats.rank[:, 1] == 0).all()
    assert stats.log_prob[:, ::2].isfinite().all()
    assert stats.targets.dtype == torch.int64


@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 4)])
def test_no_positions(lens, lead):
    stats = lens.decode(
        hidden(*lead),
        targets=torch.zeros(lead, dtype=torch.int64),
        reference=torch.zeros(*lead, D),
        top_k=VOCAB,
        watch=[1],
        stats=STATISTICS,
    )
    assert stats.lse.shape == (LAYERS, *lead)
    assert stats.top_ids.shape == (LAYERS, *lead, VOCAB)
    assert stats.js.shape == (LAYERS, *lead)


def test_no_layers(lens):
    stats = lens.decode(hidden(2, 3, layers=0), layers=[], top_k=2, watch=[])
    assert stats.lse.shape == (0, 2, 3)
    assert stats.top_ids.shape == (0, 2, 3, 2)
    assert stats.watch_log_probs.shape == (0, 2, 3, 0)


def test_no_graph_is_built(lens):
    states = hidden(3).requires_grad_()
    assert not lens.decode(states).entropy.requires_grad
    assert lens(states[0], 0).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.zeros(LAYERS, 5, D + 1)}, ValueError, "d_model 32"),
        ({"hidden_states": torch.zeros(D)}, ValueError, r"wanted \[L, \.\.\., d_model\]"),
        (
            {"hidden_states": torch.zeros(LAYERS + 1, 5, D)},
            ValueError,
            r"already normed: pass hidden_states\[:-1\]",
        ),
        ({"hidden_states": torch.zeros(1, 5, D)}, ValueError, "name those given with layers="),
        ({"hidden_states": []}, ValueError, "empty sequence"),
        ({"hidden_states": [torch.zeros(5, D), torch.zeros(4, D), torch.zeros(5, D)]}, ValueError, "entry 1"),
        (
            {"hidden_states": [torch.zeros(5, D), torch.zeros(5, D).half()] * 2},
            TypeError,
            "entry 1 is torch.float16",
        ),
        ({"hidden_states": [torch.zeros(5, D), None, None]}, TypeError, "NoneType"),
        ({"hidden_states": torch.zeros(LAYERS, 5, D, dtype=torch.int64)}, TypeError, "floating"),
        ({"hidden_states": torch.zeros(LAYERS, 5, D, device="meta")}, ValueError, "meta"),
        ({"layers": [0, 1, LAYERS]}, IndexError, f"layers: got {LAYERS}"),
        ({"layers": [0, 1, -1]}, IndexError, "layers: got -1"),
        ({"layers": [0, 1]}, ValueError, "got 2 for 3 entries"),
        ({"layers": [0, 1, 2.0]}, TypeError, "layers: got 2.0"),
        ({"layers": 5}, TypeError, "layers: got a int"),
        ({"hidden_states": None}, TypeError, "hidden_states: got a NoneType"),
        ({"watch": 5}, TypeError, "watch: got a int"),
        ({"watch": ["a"]}, TypeError, "watch: got 'a'"),
        ({"watch": [10**30]}, IndexError, "watch"),
        ({"stats": 5}, TypeError, "stats: got 5"),
        ({"stats": (name for name in ["zzz"])}, ValueError, "'zzz'"),
        ({"layers": [0, 1, True]}, TypeError, "layers: got True"),
        ({"targets": torch.zeros(5)}, TypeError, "targets: got torch.float32"),
        ({"targets": torch.zeros(5, dtype=torch.bool)}, TypeError, "targets: got torch.bool"),
        ({"targets": "next"}, TypeError, "targets: got a str"),
        (
            {"targets": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"targets: got shape \[4\], wanted \[5\]",
        ),
        ({"targets": torch.full((5,), VOCAB)}, IndexError, f"targets: got {VOCAB}, wanted ids from 0 to"),
        ({"targets": torch.full((5,), -1)}, IndexError, "targets: got -1"),
        ({"reference": torch.zeros(4, D)}, ValueError, r"reference: got shape \[4, 32\]"),
        ({"reference": torch.zeros(5, D, dtype=torch.int64)}, TypeError, "reference: got torch.int64"),
        ({"reference": [1.0]}, TypeError, "reference: got a list"),
        ({"reference": torch.zeros(5, D, device="meta")}, ValueError, "reference: it is on meta"),
        ({"top_k": VOCAB + 1}, ValueError, f"top_k: got {VOCAB + 1}, wanted 0 to"),
        ({"top_k": -1}, ValueError, "top_k: got -1"),
        ({"top_k": 1.0}, TypeError, "top_k"),
        ({"top_k": True}, TypeError, "top_k"),
        ({"watch": [VOCAB]}, IndexError, f"watch: got {VOCAB}"),
        ({"watch": [-100]}, IndexError, "watch: got -100"),
        ({"watch": [1.5]}, TypeError, "watch"),
        ({"watch": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, "watch: got shape"),
        ({"stats": ["entrpy"]}, ValueError, "'entrpy', wanted names out of log_prob"),
        ({"stats": "entropy"}, TypeError, r"such as \['entropy'\]"),
        ({"stats": ["rank"]}, ValueError, "rank asked for without targets="),
        ({"stats": ["tv", "js"]}, ValueError, "js, tv asked for without reference="),
        ({"engine": "warp"}, ValueError, "engine: got 'warp'"),
        ({"memory_budget": 0}, ValueError, "memory_budget: got 0"),
        ({"memory_budget": 1.5}, TypeError, "memory_budget"),
        ({"memory_budget": 100, "engine": "eager"}, ValueError, "the smallest that works here is"),
    ],
)
def test_refuses(lens, change, error, message):
    with pytest.raises(error, match=message):
        lens.decode(**({"hidden_states": hidden(5)} | change))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_hidden_states_of_another_dtype_than_the_lens(lens, dtype):
    states = hidden(5)
    stats = lens.decode(states.to(dtype))
    want = reference.statistics(expected(lens, states.to(dtype)))
    torch.testing.assert_close(stats.entropy.double(), want["entropy"], atol=1e-4, rtol=1e-5)
    assert stats.entropy.dtype == torch.float32


def test_one_bad_position(lens):
    states = hidden(4, 6)
    clean = lens.decode(states, top_k=2)
    states[1, 2, 3, 0] = math.nan
    stats = lens.decode(states, top_k=2)
    assert stats.entropy[1, 2, 3].isnan()
    assert (stats.top_ids[1, 2, 3] == -1).all()
    bad = stats.entropy.isnan()
    assert bad.sum() == 1
    assert torch.equal(stats.entropy[~bad], clean.entropy[~bad])


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [0, 3])
def test_compiles_without_a_graph_break(lens, top_k):
    states, targets = hidden(5), torch.randint(0, VOCAB, (5,))

    def decode(h, t):
        stats = lens.decode(h, targets=t, reference=h[0], top_k=top_k, engine="eager")
        return stats.entropy, stats.rank, stats.kl, stats.top_ids

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")(states, targets)
    for got, want in zip(compiled, decode(states, targets), strict=True):
        assert want is None or torch.allclose(got.double(), want.double(), atol=1e-5)


@pytest.mark.slow
def test_compiles_with_the_default_backend(lens):
    states, targets = hidden(5), torch.randint(0, VOCAB, (5,))
    compiled = torch.compile(lambda h, t: lens.decode(h, targets=t).entropy, fullgraph=True)
    torch.testing.assert_close(compiled(states, targets), lens.decode(states, targets=targets).entropy)
