"""The Dirichlet distribution that a stream of predictions may be drawn from, fitted as they pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from tuned_lens_fast.utils import maybe_all_reduce


class LogitStats:
    """Running means of probabilities and of log-probabilities ``[vocab]``, and the Dirichlet that they fit best."""

    n: Tensor | None  #: int64, how many predictions went in
    marginal_probs: Tensor | None  #: fp32 [vocab], mean probabilities
    sufficient_stats: Tensor | None  #: fp32 [vocab], mean log-probabilities

    def __init__(
        self, n: Tensor | None = None, marginal_probs: Tensor | None = None, sufficient_stats: Tensor | None = None
    ) -> None:
        """All None to begin with, or all three of another's to go on with.

        Raises:
            ValueError: some of them, or an ``n`` that is no single number.
        """
        given = [value is not None for value in (n, marginal_probs, sufficient_stats)]
        if any(given) != all(given):
            raise ValueError("n, marginal_probs, sufficient_stats: got some of them, wanted all or none")
        if n is not None and n.ndim:
            raise ValueError(f"n: got shape {[*n.shape]}, wanted a single number")
        self.n, self.marginal_probs, self.sufficient_stats = n, marginal_probs, sufficient_stats

    def all_reduce_(self) -> None:
        """Put together what all processes of ``torch.distributed`` have seen.

        Raises:
            ValueError: this one has seen nothing.
        """
        n, probs, logs = self._known()
        total = maybe_all_reduce(n.clone(), op="sum")
        self.marginal_probs = maybe_all_reduce(probs * n, op="sum") / total
        self.sufficient_stats = maybe_all_reduce(logs * n, op="sum") / total
        self.n = total

    @torch.no_grad()
    def update(self, logits: Tensor, assume_normalized: bool = False) -> None:
        """Take in logits ``[..., vocab]``.

        Args:
            logits: floating.
            assume_normalized: they are log-probabilities.

        Raises:
            ValueError: a vocabulary of another size than before.
        """
        vocab = logits.shape[-1]
        rows = logits.reshape(-1, vocab).float()
        rows = rows if assume_normalized else rows.log_softmax(-1)
        if self.n is None:
            self.n = torch.zeros((), dtype=torch.int64, device=rows.device)
            self.marginal_probs, self.sufficient_stats = rows.new_zeros(vocab), rows.new_zeros(vocab)
        n, probs, logs = self._known()
        if len(probs) != vocab:
            raise ValueError(f"logits: got a vocabulary of {vocab}, wanted {len(probs)} as before")
        if not len(rows):
            return
        self.n = n + len(rows)
        share = len(rows) / self.n
        self.marginal_probs = probs + (rows.exp().mean(0) - probs) * share
        self.sufficient_stats = logs + (rows.mean(0) - logs) * share

    def mle(self, max_iter: int = 100, tol: float = 1e-4) -> Dirichlet:
        """The likeliest Dirichlet, by L-BFGS (the log-likelihood is Minka's, "Estimating a Dirichlet distribution").

        Args:
            max_iter: at most so many steps.
            tol: stops where a step changes less.

        Raises:
            ValueError: nothing was seen.
        """
        means = self._known()[2].detach()
        log_alpha = torch.zeros_like(means, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [log_alpha], max_iter=max_iter, tolerance_change=tol, line_search_fn="strong_wolfe"
        )

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            alpha = log_alpha.exp()
            loss = alpha.lgamma().sum() - alpha.sum().lgamma() - (alpha - 1) @ means
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(evaluate)
        return Dirichlet(log_alpha.detach().exp())

    def _known(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.n is None or self.marginal_probs is None or self.sufficient_stats is None:
            raise ValueError("nothing was seen yet; update() with logits first")
        return self.n, self.marginal_probs, self.sufficient_stats
