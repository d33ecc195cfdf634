"""Models inside other libraries' objects: nnsight's envoys, TransformerLens's bridges and its ``HookedTransformer``.

Beside the way from hidden state to statistics: what a wrapper holds is read as if it were passed itself. None of the
libraries need be installed; their objects are told by their parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tuned_lens_fast.models.alias import alias
from tuned_lens_fast.models.comparison import close, random_like, relative_error
from tuned_lens_fast.models.forward_pass import TRIAL_TOKENS
from tuned_lens_fast.models.resident import check_split


def unwrapped(model: Any) -> Any:
    """The causal LM of transformers inside of nnsight's, TransformerLens's or PyTorch's wrapper; else ``model``.

    Raises:
        ValueError: nnsight has not loaded the model yet.
        NotImplementedError: see :func:`~tuned_lens_fast.models.resident.check_split`.
    """
    check_split(model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "_module", None), nn.Module):
        if getattr(model, "dispatched", True) is False:
            raise ValueError("model: nnsight has not loaded its weights; wrap it with dispatch=True")
        model = model._module
    if hasattr(model, "adapter") and isinstance(getattr(model, "original_model", None), nn.Module):
        model = model.original_model  # TransformerLens's bridge, which put its own modules into it
    inner = getattr(model, "_orig_mod", None)  # of torch.compile's wrapper
    return model if inner is None else unwrapped(inner)


def is_hooked_transformer(model: Any) -> bool:
    """Whether this is TransformerLens's ``HookedTransformer``, which is no model of transformers."""
    return hasattr(model, "cfg") and hasattr(getattr(model, "unembed", None), "W_U") and not hasattr(model, "adapter")


def name_or_path(model: Any) -> str:
    """What a causal LM, wrapped or not, was loaded by; "" if it does not say."""
    if is_hooked_transformer(model):
        return model.cfg.model_name or ""
    return unwrapped(model).config.name_or_path or ""


@torch.no_grad()
def check_hooked(model: Any, unembed: Callable[[Tensor], Tensor]) -> None:
    """Compare ``unembed`` with a ``HookedTransformer``, at random hidden states in place of its last block's output.

    Raises:
        NotImplementedError: the logits differ; tolerances are those of
            :meth:`tuned_lens_fast.models.tracing.TracedModel.verify`.
    """
    weight = model.unembed.W_U
    rows = min(TRIAL_TOKENS, model.cfg.n_ctx)
    h = random_like(weight.new_empty(1, rows, len(weight)), seed=0)[0]
    twin = alias(model, own_buffers=True).eval()
    twin.blocks[-1].register_forward_hook(lambda *_: h[None])
    ids = torch.arange(rows, device=h.device) % model.cfg.d_vocab
    wanted, found = twin(ids[None], return_type="logits")[0], unembed(h)
    if not close(found, wanted):
        raise NotImplementedError(
            f"model: the lens's logits for random hidden states differ from those of {type(model).__name__} by "
            f"{relative_error(found, wanted):.1e} of the largest logit"
        )
