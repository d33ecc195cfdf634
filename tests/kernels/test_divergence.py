"""Divergences between rows and a reference against float64: by the identity, and by a second walk."""

import math

import pytest
import reference
import torch

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.engines.state import State
from tuned_lens_fast.engines.statistics import DIVERGENCES
from tuned_lens_fast.kernels import divergence, launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYERS = 2


def operands(positions, d_model, vocab, dtype, device, seed=0):
    """x of two layers and the model's own: flat, peaked, one position where they agree, one far from it."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(vocab, d_model, generator=generator) / d_model**0.5
    x = torch.randn(LAYERS, positions, d_model, generator=generator) * 3
    own = torch.randn(positions, d_model, generator=generator) * 3
    own[1::4] = w[7 % vocab] * 25
    own[2::4] = x[0, 2::4]
    x[:, 3::4] = -own[3::4]
    return x.flatten(0, 1).to(device, dtype), own.to(device, dtype), w.to(device, dtype)


def states(x, own, head):
    """Those of all rows, in fp32 as the vocabulary pass leaves them."""
    found = []
    for rows in (x, own):
        z = reference.logits(rows, head)
        m = z.amax(1)
        s = (z - m[:, None]).exp().sum(1)
        found.append(State(m.float(), s.float(), log_s=s.log().float()))
    return found


def divergences_of(x, own, head, wanted=DIVERGENCES):
    tile = launch.vocabulary_tile(x.device, x.dtype, x.shape[1])
    found = divergence.divergence_pass(x, own, head, *states(x, own, head), wanted, tile)
    return {name: value.clamp(min=0).view(LAYERS, -1) for name, value in found.items()}


def check(got, x, own, head):
    z = reference.logits(x.unflatten(0, (LAYERS, -1)), head)
    reference.check(got, z, reference=reference.logits(own, head))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("positions", "d_model", "vocab"), [(1, 64, 2), (4, 33, 31), (19, 16, 70), (4, 64, 331)])
def test_walk(positions, d_model, vocab, dtype, device):
    x, own, w = operands(positions, d_model, vocab, dtype, device)
    got = divergences_of(x, own, Head(w))
    check(got, x, own, Head(w))
    assert all((value >= 0).all() for value in got.values())
    assert (got["js"] <= math.log(2) + 1e-6).all()
    if positions > 2:
        assert all(value[0, 2] < 1e-6 for value in got.values())


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"scale": 0.3}, {"scale": 2.0, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_walk_with_bias_scale_softcap(bias, options, device):
    x, own, w = operands(4, 48, 150, torch.bfloat16, device)
    b = None
    if bias:
        b = torch.linspace(-1, 1, 150).to(device, torch.bfloat16)
        b[20:60] = -math.inf
    head = Head(w, b, **options)
    check(divergences_of(x, own, head), x, own, head)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_each_alone_is_the_same(name, device):
    x, own, w = operands(4, 32, 100, torch.bfloat16, device)
    together = divergences_of(x, own, Head(w))
    alone = divergences_of(x, own, Head(w), frozenset({name}))
    assert alone.keys() == {name}
    assert torch.equal(alone[name], together[name])


@pytest.mark.parametrize("slices", [1, 2, 100])
def test_slices_of_the_vocabulary_add_up(slices, monkeypatch, device):
    x, own, w = operands(4, 32, 150, torch.bfloat16, device)
    monkeypatch.setattr(divergence, "vocabulary_splits", lambda *_: slices)
    check(divergences_of(x, own, Head(w)), x, own, Head(w))


def by_identity(x, own, head):
    z = reference.logits(own, head)
    u = (z.softmax(-1) @ head.weight.double() * head.scale).float()
    return divergence.kl_by_identity(x, own, u, *states(x, own, head)).clamp(min=0).view(LAYERS, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("positions", "d_model"), [(1, 64), (5, 33), (3, 1100)])
def test_identity(positions, d_model, dtype, device):
    x, own, w = operands(positions, d_model, 90, dtype, device)
    bias = torch.linspace(-1, 1, 90).to(device, dtype)
    bias[3::9] = -math.inf
    for head in (Head(w), Head(w, bias, scale=0.3)):
        check({"kl": by_identity(x, own, head)}, x, own, head)


@pytest.mark.parametrize("of_reference", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_harms_itself_only(bad, of_reference, device):
    """A row of the reference harms its position in every layer, and no other."""
    x, own, w = operands(5, 32, 100, torch.bfloat16, device)
    clean = divergences_of(x, own, Head(w)) | {"identity": by_identity(x, own, Head(w))}
    (own if of_reference else x)[3, 4] = bad
    harmed = divergences_of(x, own, Head(w)) | {"identity": by_identity(x, own, Head(w))}
    struck = torch.zeros(LAYERS, 5, dtype=torch.bool, device=device)
    struck[:, 3] = True
    if not of_reference:
        struck[1] = False
    for name, value in harmed.items():
        assert value[struck].isnan().all(), name
        assert torch.equal(value[~struck], clean[name][~struck]), name


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("widths", "slab"), [([300], 4096), ([7, 93, 200], 50), ([2100, 1], 700)], ids=str)
def test_expectation_tile_by_tile(widths, slab, dtype, parts, monkeypatch, device):
    """u = W^T softmax(z) and the normaliser, the largest logit being met first, last, and never again."""
    monkeypatch.setattr(divergence, "SLAB", slab)
    widths = [width for given in widths for width in (given // slab * slab, given % slab) if width]
    vocab, d_model = sum(widths), 24
    w = torch.randn(vocab, d_model, device=device).to(dtype)
    z = torch.randn(4, vocab, device=device) * 4
    z[0, 0], z[1, -1], z[2] = 40.0, 40.0, 1e-3
    z[3, : widths[0]] = -math.inf if len(widths) > 1 else 0.0
    expectation = divergence.Expectation(4, d_model, w.device, parts)
    for part, weight in zip(z.split(widths, 1), w.split(widths), strict=True):
        expectation.add(part, weight, lambda a, b: a.float() @ b.float())
    state = expectation.state()
    u = state.u / state.s[:, None]
    torch.testing.assert_close((state.m + state.log_s).double(), z.double().logsumexp(1), atol=1e-5, rtol=1e-6)
    rounding = 6e-5 if parts == 2 or dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(u.double(), z.double().softmax(1) @ w.double(), atol=rounding, rtol=rounding)


@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 11, 12, 100])
@pytest.mark.parametrize("vocab", [1, 3, 4, 5, 12, 29])
def test_tiles_are_whole_slabs_or_less_than_one(vocab, width, monkeypatch):
    monkeypatch.setattr(divergence, "SLAB", 4)
    found = list(divergence.tiles(vocab, width))
    assert [token for tile in found for token in range(vocab)[tile]] == list(range(vocab))
    for tile in found:
        size = tile.stop - tile.start
        assert size <= max(width, 1)
        assert size <= 4 or size % 4 == 0
