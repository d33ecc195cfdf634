"""How a causal LM is called: its arguments, a few tokens to try it on, and leaving everything as it was.

Beside the way from hidden state to statistics, for whatever runs a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuned_lens_fast.models.resident import execution_device

#: Tokens that a model is tried on. More than one, so that positions and batch can be told apart in a shape.
TRIAL_TOKENS = 4


def model_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments of a plain forward pass on ids ``[..., positions]``, as a batch."""
    inputs: dict[str, Any] = {"input_ids": input_ids.reshape(-1, input_ids.shape[-1])}
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = False
    if attention_mask is not None:
        mask = attention_mask.reshape(inputs["input_ids"].shape)
        inputs["attention_mask"] = mask
        if "position_ids" in known:
            # Without them, padding on the left would shift every position of models with absolute ones.
            inputs["position_ids"] = (mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
    return inputs


def trial_ids(model: Any, first: int = 3) -> Tensor:
    """A few token ids ``[positions]``, consecutive from ``first`` on, where the model's embedding is."""
    vocab = len(model.get_input_embeddings().weight)
    return torch.arange(first, first + TRIAL_TOKENS, device=input_device(model)) % vocab


def input_device(model: Any) -> torch.device:
    """Where the model's embedding takes token ids; the CPU for one without weights."""
    device = execution_device(model.get_input_embeddings())
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No graph, no autocast, and random generators left as they were."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with (
        torch.no_grad(),
        torch.random.fork_rng([device.index for device in devices]),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def name_of(model: Any) -> str:
    """Class and model type, for messages."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model type {model_type!r})"
