"""The baseline a fused engine has to beat: the vendor's product into a bounded scratch, then one fused pass over it.

As many rows at a time as the budget holds have their logits in the scratch, in the head's dtype; the pass reads them
for logsumexp, entropy and the target's log-prob. (In bf16 they are off by up to 4e-3 of a nat; an fp32 scratch would
cost twice the traffic.) On a GPU the pass is a Triton kernel, on a CPU what torch.compile makes of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from presets import Problem
from torch import Tensor

from contenders.adapter import Answer, Contender, head_inputs
from contenders.layer_loop import compiled, no_compiler

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform, and so no GPU it could run on
    pass
else:

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


def _gpu_pass(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lse, entropy, log_prob = torch.empty(3, len(logits), device=logits.device)
    _pass[(len(logits),)](logits, targets, lse, entropy, log_prob, logits.shape[1], BLOCK=8192, num_warps=8)
    return lse, entropy, log_prob


def _cpu_pass(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.float()
    m = z.amax(1)
    d = z - m.unsqueeze(1)
    e = d.exp()
    s = e.sum(1)
    log_s = s.log()
    log_prob = z.gather(1, targets.unsqueeze(1)).squeeze(1) - m - log_s
    return m + log_s, log_s - (e * d).sum(1) / s, log_prob


def _prepare(problem: Problem) -> Callable[[], Answer]:
    head, rows = problem.head, problem.rows
    assert problem.query.targets is not None
    targets = problem.query.targets.repeat(problem.layers)
    at_once = max(1, problem.budget // (head.weight.element_size() * head.vocab))
    at_once = min(rows, max(1, at_once // 128 * 128 or at_once))
    one_pass: Callable = _gpu_pass if problem.device.type == "cuda" else compiled(_cpu_pass)

    @torch.no_grad()
    def decode() -> Answer:
        x = head_inputs(problem)
        scratch = torch.empty(at_once, head.vocab, dtype=x.dtype, device=x.device)
        parts = []
        for some, wanted in zip(x.split(at_once), targets.split(at_once), strict=True):
            logits = torch.mm(some, head.weight.t(), out=scratch[: len(some)])
            parts.append(one_pass(logits, wanted))
        named = zip(("lse", "entropy", "log_prob"), zip(*parts, strict=True), strict=True)
        return {name: torch.cat(values).view(problem.layers, -1) for name, values in named}

    decode()  # compiles
    return decode


def _unavailable(problem: Problem) -> str | None:
    if problem.head.bias is not None or problem.head.scale != 1 or problem.head.softcap is not None:
        return "its pass knows no bias, scale or softcap"
    return no_compiler(problem)


SCRATCH = Contender(
    "scratch",
    "product into a scratch of the budget's size, then one fused pass over it",
    _prepare,
    frozenset({"log_prob", "entropy"}),
    _unavailable,
)
