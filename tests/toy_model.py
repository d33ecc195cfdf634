"""A causal LM of no known kind, with anything between its blocks and its logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from tiny_models import D_MODEL, VOCAB
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(d_model, d_model)])

    def forward(self, h: Tensor) -> tuple[Tensor, None]:
        return h + self.inner[0](h), None


class ToyModel(nn.Module):
    """``after_head(head(before_head(norm(before_norm(h)))))`` of what its blocks put out."""

    def __init__(
        self,
        norm: nn.Module,
        d_model: int = D_MODEL,
        vocab: int = VOCAB,
        before_norm: Callable[[Tensor], Tensor] = lambda h: h,
        before_head: Callable[[Tensor], Tensor] = lambda x: x,
        after_head: Callable[[Tensor], Tensor] = lambda z: z,
        skip: bool = False,
    ) -> None:
        """``skip``: the norm receives the embedding too."""
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=2, model_type="toy", name_or_path="toy")
        self.config.get_text_config = lambda: self.config
        self.words = nn.Embedding(vocab, d_model)
        self.stack = nn.ModuleList([Block(d_model) for _ in range(2)])
        self.last = norm
        self.unembedding = nn.Linear(d_model, vocab)
        self.before_norm, self.before_head, self.after_head = before_norm, before_head, after_head
        self.skip = skip
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.rand_like(parameter) + 0.5)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def get_output_embeddings(self) -> nn.Linear:
        return self.unembedding

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        h = words = self.words(input_ids)
        for block in self.stack:
            h, _ = block(h)
        if self.skip:
            h = h + words
        return {"logits": self.after_head(self.unembedding(self.before_head(self.last(self.before_norm(h)))))}
