"""The target's logit and the tiles' logits are the same number, bit for bit; else a rank may be one off."""

import pytest
import torch
from cases import problem

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.engines.triton import TritonEngine
from tuned_lens_fast.kernels import launch
from tuned_lens_fast.kernels.target_logits import target_logits
from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass


@pytest.mark.parametrize("vocab", [1_024, 100], ids=["whole tiles", "masked tiles"])
@pytest.mark.parametrize(
    ("dtype", "d_model", "precision"),
    [
        (torch.bfloat16, 576, "ieee"),
        (torch.bfloat16, 4096, "ieee"),
        (torch.float16, 100, "ieee"),
        (torch.float32, 64, "ieee"),
        (torch.float32, 64, "tf32"),
    ],
)
def test_gathered_logits_are_the_tiles(dtype, d_model, precision, vocab, device):
    """All tokens share one row of W, so that the largest logit is every token's."""
    rows = 1_000
    tile = launch.vocabulary_tile(device, dtype, d_model, precision)
    x = torch.randn(rows, d_model, device=device).to(dtype)
    w = torch.randn(1, d_model, device=device).to(dtype).repeat(vocab, 1)
    targets = torch.randint(vocab, (rows,), device=device)
    gathered = target_logits(x, Head(w), targets, tile)
    _, groups = vocabulary_pass(x, Head(w), tile, group_maxima=True)
    assert torch.equal(gathered, groups[:, 0].amax(1))


def test_the_largest_logit_ranks_first(device):
    """For every row, flat or peaked, whose largest logit is clear of the second."""
    asked = problem(torch.bfloat16, 576, 49_152, device, positions=1_500, layers=1, top_k=2)
    asked = asked.asking(stats=frozenset({"log_prob", "rank", "entropy", "max_prob"}))
    first = asked.decode(TritonEngine())
    clear = (first["top_log_probs"].diff(dim=-1).squeeze(-1) < -1e-3)[0]
    assert clear.sum() > 1_000
    again = asked.asking(targets=first["top_ids"][0, :, 0].contiguous()).decode(TritonEngine())
    assert (again["rank"][0, clear] == 1).all()
    assert torch.allclose(again["log_prob"], first["top_log_probs"][..., 0], atol=1e-4, rtol=1e-5)
