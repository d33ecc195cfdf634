"""Reads a Jacobian lens, J_l h for a hidden state h that block l puts out, as a tuned lens with A = J_l - I.

J_l is the mean over text of the derivative of what the last block puts out with respect to what block l does
("Verbalizable Representations Form a Global Workspace in Language Models", Anthropic, 2026; the code is
anthropics/jacobian-lens). Both lenses read the result with the model's norm and head. What block l puts out enters
block l + 1, so J_l is the translator of layer l + 1; layer 0, the embedding, has none. One file holds it all:

- of jlens and the hub's ``neuronpedia/jacobian-lens``: ``torch.save`` of ``{"J": {l: [d_model, d_model]}, "d_model",
  "n_prompts", "source_layers"}``;
- a fit of jlens that was stopped, which the hub has as well: ``{"jacobian_sum": {l: ...}, "n_done", ...}``, J times the
  number of prompts;
- what others convert these to: safetensors with ``J.l``, ``layer_l`` or ``l``.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from tuned_lens_fast.artifacts import Artifact, TunedLensConfig, own_tensor
from tuned_lens_fast.checkpoint import load_checkpoint
from tuned_lens_fast.messages import listed, quoted

_MATRIX = re.compile(r"(?:J\.|layer_)?(0|[1-9][0-9]{0,8})")


def read_jacobian_lens(path: Path, *, d_model: int | None = None, layers: int | None = None) -> Artifact:
    """The lens in a file; arguments, warnings and errors are those of :func:`read_jacobian_config`."""
    config, stored, prompts = _opened(path, d_model, layers)
    translators = {}
    for block, matrix in stored.items():
        # In fp32: less 1, the small numbers of the diagonal would lose their digits in fp16.
        weight = own_tensor(f"J of block {block}", matrix, path).float()
        weight /= prompts
        weight.diagonal().sub_(1)
        translators[f"{block + 1}.weight"] = weight
    return Artifact(config, translators, [])


def read_jacobian_config(path: Path, *, d_model: int | None = None, layers: int | None = None) -> TunedLensConfig:
    """The config of the lens in a file, whose matrices are not read. It has no bias, and knows neither its model's name
    nor, without ``layers``, how many layers that has.

    Args:
        path: safetensors if it is named so, else what ``torch.save`` wrote.
        d_model, layers: of the model, to refuse a lens of another.

    Warns:
        UserWarning: there is a matrix for the last block, whose output the model's own head reads; it is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, is no Jacobian lens, or belongs to another model.
    """
    return _opened(path, d_model, layers)[0]


def _opened(path: Path, d_model: int | None, layers: int | None) -> tuple[TunedLensConfig, dict[int, Tensor], int]:
    """The config, a matrix for each block, mapped from the file, and the number that divides them all."""
    stored, prompts = _matrices(load_checkpoint(path), path)
    width = next(iter(stored.values())).shape[-1]
    if d_model not in (None, width):
        raise ValueError(f"checkpoint: a lens of d_model {width} for a model of d_model {d_model} ({path})")
    blocks = max(stored) + 2 if layers is None else layers
    if max(stored) >= blocks:
        raise ValueError(f"checkpoint: a lens of block {max(stored)} for a model of {blocks} layers ({path})")
    if stored.pop(blocks - 1, None) is not None:
        warnings.warn("J: the matrix of the last block, the model's own output, is left out", stacklevel=5)
    if not stored:
        raise ValueError(f"checkpoint: {path} has a matrix of the last block alone, whose output no lens reads")
    for block, matrix in stored.items():
        if matrix.shape != (width, width):
            raise ValueError(
                f"checkpoint: {path}: J of block {block} has shape {quoted([*matrix.shape])}, wanted {[width, width]}"
            )
    has = sorted(block + 1 for block in stored)
    return TunedLensConfig("", width, blocks, bias=False, translated_layers=has), stored, prompts


def _matrices(state: Any, path: Path) -> tuple[dict[int, Tensor], int]:
    """What there is for each block, and the number that divides it."""
    prompts = 1
    if isinstance(state, dict) and "J" in state:
        state = state["J"]
    elif isinstance(state, dict) and "jacobian_sum" in state:
        state, prompts = state["jacobian_sum"], state.get("n_done")
        if type(prompts) is not int or prompts < 1:
            raise ValueError(
                f"checkpoint: {path}: n_done is {quoted(prompts)}, wanted the number of prompts, 1 or more"
            )
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint: {path} holds a {type(state).__name__}, wanted a Jacobian lens")
    found: dict[int, Tensor] = {}
    for name, tensor in state.items():
        match = _MATRIX.fullmatch(str(name))
        if not match or not isinstance(tensor, Tensor) or not tensor.ndim:
            raise ValueError(
                f"checkpoint: {path} is no Jacobian lens: it holds {quoted(name)}, wanted a matrix for each block "
                "under 'J'. A tuned lens is given by its folder, which has its config.json"
            )
        if int(match[1]) in found:
            raise ValueError(f"checkpoint: {path} has two matrices for block {match[1]}")
        found[int(match[1])] = tensor
    if not found:
        raise ValueError(f"checkpoint: {path} holds {listed(state)}, wanted a matrix for each block")
    return found, prompts
