"""Tokens as the labels of a trajectory's figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class TokenFormatter:
    """Shortens tokens to ``max_string_len`` characters, and writes the marks of byte-level BPE readably."""

    ellipsis: str = "…"
    newline_replacement: str = "\\n"
    newline_token: str = "Ċ"
    whitespace_token: str = "Ġ"
    whitespace_replacement: str = "_"
    max_string_len: int | None = 7  #: None for no limit

    def format(self, token: Any) -> str:
        """The label of ``token``; "<unk>" for what is no string."""
        if not isinstance(token, str):
            return "<unk>"
        if self.max_string_len is not None and len(token) > self.max_string_len:
            token = token[: self.max_string_len - len(self.ellipsis)] + self.ellipsis
        token = token.replace(self.newline_token, self.newline_replacement)
        return token.replace(self.whitespace_token, self.whitespace_replacement)

    def vectorized_format(self, tokens: Any) -> NDArray[np.str_]:
        """The labels of an array of tokens; each different token is formatted once."""
        tokens = np.asarray(tokens)
        labels = {token: self.format(token) for token in set(tokens.reshape(-1).tolist())}
        found = [labels[token] for token in tokens.reshape(-1).tolist()]
        return np.array(found, dtype=np.str_).reshape(tokens.shape)

    def pad_token_repr_to_max_len(self, token_repr: str) -> str:
        """``token_repr`` cut or filled up with spaces to ``max_string_len``."""
        if self.max_string_len is None:
            return token_repr
        return token_repr[: self.max_string_len].ljust(self.max_string_len)
