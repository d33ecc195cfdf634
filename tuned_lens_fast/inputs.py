"""What people have, as what a decode takes: texts or ids as a padded batch, and tokens to watch as ids and groups.

Where the way from hidden state to statistics starts from a prompt, this is its first step; ``validation`` then checks
the ids themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.messages import listed, quoted

#: A prompt or several: texts, a tokenizer's encoding, ids in lists, or ids ``[positions]`` or ``[batch, positions]``.
Prompt = str | Sequence[str] | Mapping[str, Any] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor
#: Token ids or texts of tokens, or such by the name of their group.
Watched = Tensor | str | Sequence[int | str] | Mapping[str, int | str | Sequence[int | str]]


def read_prompt(
    input_ids: Any, attention_mask: Tensor | None, tokenizer: Any, device: torch.device
) -> tuple[Any, Tensor | None]:
    """Ids ``[positions]`` or ``[batch, positions]`` and their mask, of any :data:`Prompt`.

    A text or a list of ids has no batch; several are padded on the right. What is a tensor already is passed on.

    Raises:
        ValueError: texts without a tokenizer or without tokens, a mask beside what brings its own, an encoding
            without ids.
        TypeError: what is none of these.
    """
    if isinstance(input_ids, Tensor):
        return input_ids, attention_mask
    own_mask = None
    if isinstance(input_ids, Mapping):
        if "input_ids" not in input_ids:
            raise ValueError(f"input_ids: got a mapping with {listed([*input_ids])}, wanted one with 'input_ids'")
        own_mask = input_ids.get("attention_mask")
        if own_mask is not None and attention_mask is not None:
            raise ValueError("attention_mask: input_ids brings one of its own; pass one of the two")
        input_ids = input_ids["input_ids"]
    of_texts = isinstance(input_ids, str)
    if not isinstance(input_ids, Tensor):
        held = [input_ids] if isinstance(input_ids, str) else _items(input_ids)
        if held and all(isinstance(item, str) for item in held):
            if tokenizer is None:
                raise ValueError("input_ids: got text, which takes a tokenizer=, that of the model")
            rows = [torch.tensor(ids, dtype=torch.int64) for ids in tokenizer(held, verbose=False)["input_ids"]]
        elif held and all(_is_row(item) for item in held):
            rows = [_ids(item) for item in held]
        else:
            return _ids(held).to(device), _mask(own_mask, attention_mask, device)
        for number, row in enumerate(rows):
            if row.ndim != 1 or not len(row):
                raise ValueError(f"input_ids: prompt {number} has shape {[*row.shape]}, wanted tokens [positions]")
        ragged = len({len(row) for row in rows}) > 1
        if attention_mask is not None and ragged:
            raise ValueError("attention_mask: got one beside prompts of several lengths, whose padding makes their own")
        own_mask = None if ragged else own_mask
        input_ids, padding = padded(rows, device)
        own_mask = padding if own_mask is None else own_mask
        if of_texts:
            return input_ids[0], _mask(None, attention_mask, device)
    return input_ids.to(device), _mask(own_mask, attention_mask, device)


def padded(documents: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Documents as one batch ``[batch, positions]``, padded on the right, and its mask; None without padding."""
    input_ids = torch.nn.utils.rnn.pad_sequence([*documents], batch_first=True)
    ends = torch.tensor([len(tokens) for tokens in documents])
    real = torch.arange(input_ids.shape[1]) < ends[:, None]
    mask = None if real.all() else real.to(device, torch.int64)
    return input_ids.to(device, torch.int64), mask


@dataclass(frozen=True)
class Watch:
    """Tokens to watch, and which of them are read as one."""

    ids: Any  #: of all, a group behind the other; unchecked
    sizes: tuple[int, ...] | None = None  #: tokens of each group; None: each token by itself
    names: tuple[str, ...] | None = None  #: of the columns

    def columns(self) -> list[int] | dict[str, list[int]]:
        """The ids of every column, by name where they are groups."""
        ids = [int(token) for token in self.ids]
        if self.sizes is None or self.names is None:
            return ids
        groups = torch.tensor(ids, dtype=torch.int64).split([*self.sizes])
        return {name: group.tolist() for name, group in zip(self.names, groups, strict=True)}

    def gathered(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """An engine's answer with the log of the sum of each group's probabilities, ``[..., groups]``."""
        if self.sizes is None or "watch_log_probs" not in found:
            return found
        groups = found["watch_log_probs"].split([*self.sizes], -1)
        return {**found, "watch_log_probs": torch.stack([group.logsumexp(-1) for group in groups], -1)}


def read_watch(watch: Any, tokenizer: Any) -> Watch | None:
    """Any :data:`Watched`, its texts as ids.

    Raises:
        ValueError: a text that is not one token, an empty group, or the same text twice.
        TypeError: texts without a tokenizer, or a group that is none.
    """
    if watch is None or isinstance(watch, Watch):
        return watch
    if isinstance(watch, Mapping):
        groups: list[list[Any]] = []
        for name, tokens in watch.items():
            if not isinstance(name, str):
                raise TypeError(f"watch: got a group called {quoted(name)}, wanted a str")
            one = isinstance(tokens, str) or not isinstance(tokens, Iterable)
            ids = [_token(token, tokenizer) for token in ([tokens] if one else tokens)]
            if not ids:
                raise ValueError(f"watch: the group {quoted(name)} has no tokens")
            groups.append([*dict.fromkeys(ids)])  # a token counts once
        return Watch([token for group in groups for token in group], tuple(map(len, groups)), tuple(watch))
    texts = [watch] if isinstance(watch, str) else watch
    if isinstance(texts, Tensor) or not isinstance(texts, Iterable):
        return Watch(texts)
    texts = [*texts]
    if not any(isinstance(token, str) for token in texts):
        return Watch(texts)
    names = tuple(map(str, texts))
    if len({*names}) < len(names):
        raise ValueError(f"watch: got {listed(texts)}, of which some are the same")
    return Watch([_token(token, tokenizer) for token in texts], None, names)


def token_id(tokenizer: Any, text: str) -> int:
    """The token that ``text`` is, written as in a text or as in the vocabulary."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) == 1:
        return ids[0]
    known = tokenizer.get_vocab()
    if text in known:
        return known[text]
    parts = listed(tokenizer.convert_ids_to_tokens(ids))
    raise ValueError(f"watch: {quoted(text)} is {len(ids)} tokens ({parts}), wanted one")


def _token(token: Any, tokenizer: Any) -> Any:
    if not isinstance(token, str):
        return int(token) if isinstance(token, Tensor) and token.ndim == 0 else token
    if tokenizer is None:
        raise TypeError(f"watch: got {quoted(token)}, wanted token ids; text takes a tokenizer=, that of the model")
    return token_id(tokenizer, token)


def _items(value: Any) -> list[Any]:
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise TypeError(f"input_ids: got a {type(value).__name__}, wanted ids, texts or a tokenizer's encoding")
    return [*value]


def _is_row(item: Any) -> bool:
    return isinstance(item, Iterable) and not isinstance(item, (str, bytes)) and getattr(item, "ndim", 1) > 0


def _ids(values: Any) -> Tensor:
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"input_ids: got {quoted(values)}, wanted ids, texts or a tokenizer's encoding") from error
    return found.long() if not found.numel() else found


def _mask(own: Any, given: Tensor | None, device: torch.device) -> Tensor | None:
    return given if own is None else torch.as_tensor(own).to(device)
