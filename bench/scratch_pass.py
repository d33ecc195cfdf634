"""The baseline a fused engine has to beat: the vendor's product into a bounded scratch, then one fused pass over it.

A row's logits lie in a bf16 scratch, as many rows at a time as the budget holds; the pass reads them once for
logsumexp, entropy and the target's log-prob. (In bf16 they are off by up to 4e-3 of a nat; an fp32 scratch would cost
twice the traffic.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pass(logits, targets, lse, entropy, log_prob, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = -1e30
    s = 0.0
    t = 0.0
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        z = tl.load(logits + row * vocab + column, mask=inside, other=-2e30).to(tl.float32)
        m_new = tl.maximum(m, tl.max(z, 0))
        p = tl.exp(z - m_new)
        decay = tl.exp(m - m_new)
        t = decay * (t + (m - m_new) * s) + tl.sum(p * (z - m_new), 0)
        s = s * decay + tl.sum(p, 0)
        m = m_new
    target = tl.load(targets + row)
    tl.store(lse + row, m + tl.log(s))
    tl.store(entropy + row, tl.log(s) - t / s)
    tl.store(log_prob + row, tl.load(logits + row * vocab + target).to(tl.float32) - m - tl.log(s))


def decode(x: Tensor, weight: Tensor, targets: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """lse, entropy and log_prob, fp32 [rows], of x [rows, d_model] W^T with ``budget`` bytes of scratch."""
    rows, vocab = x.shape[0], weight.shape[0]
    at_once = max(1, budget // (2 * vocab) // 128 * 128)
    scratch = torch.empty(at_once, vocab, dtype=x.dtype, device=x.device)
    lse, entropy, log_prob = (torch.empty(rows, device=x.device) for _ in range(3))
    for start in range(0, rows, at_once):
        stop = min(start + at_once, rows)
        logits = scratch[: stop - start]
        torch.mm(x[start:stop], weight.t(), out=logits)
        at = slice(start, stop)
        _pass[(stop - start,)](logits, targets[at], lse[at], entropy[at], log_prob[at], vocab, BLOCK=8192, num_warps=8)
    return lse, entropy, log_prob
