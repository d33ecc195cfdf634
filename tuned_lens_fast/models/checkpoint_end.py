"""The end of a model out of its checkpoint: norm and head are read, and no block of it.

Before the way from hidden state to statistics where the states come from elsewhere, such as a server's extractor: what
is left of the model runs like any other with blocks that return what they are given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tuned_lens_fast.messages import shortened
from tuned_lens_fast.models.blocks import find_blocks, linear_head
from tuned_lens_fast.models.forward_pass import name_of

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


def load_end(folder: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """A causal LM on the CPU in which what lies behind its blocks has the weights of a checkpoint of transformers.

    Its blocks have none (meta device), and what its embedding returns is 0 unless it is tied to the head.

    Raises:
        FileNotFoundError: no such folder, or no safetensors in it.
        ValueError: the folder is no checkpoint of a causal LM, is damaged, or lacks a weight of the end.
        NotImplementedError: the model has to run before its blocks are found.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {folder}")
    files = _files(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # how blocks are stored
        with _weightless():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()
    except Exception as error:
        raise ValueError(f"folder: {folder} is no causal LM's checkpoint ({shortened(error, 300)})") from error
    try:
        path, blocks = find_blocks(model)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise NotImplementedError(
            f"folder: which parts of {name_of(model)} are its blocks shows only when it runs; load all of the model"
        ) from error
    inside = {part for block in blocks for part in block.modules()}
    keys = _keys(model, files, path)
    tensors = _outside(model, inside)
    stored = {
        name: next((keys[other] for other, _, _ in places if other in keys), None)
        for name, places in tensors.items()
        if not _only_embeds(model, places)
    }
    found = {name: _read(files[key], key) for name, key in stored.items() if key is not None}
    dtype = next((tensor.dtype for tensor in found.values() if tensor.is_floating_point()), torch.float32)
    for name, places in tensors.items():
        old = _tensor(*places[0][1:])
        if name in found:
            new = found[name]
        elif not old.is_meta:
            continue  # a buffer, made with its module
        elif name not in stored:
            new = torch.zeros(old.shape, dtype=dtype, device="cpu")
        else:
            raise ValueError(f"folder: the checkpoint in {folder} has no {name}")
        if new.shape != old.shape:
            raise ValueError(f"folder: {name} of the checkpoint in {folder} is {[*new.shape]}, wanted {[*old.shape]}")
        for _, module, own in places:
            if own in module._parameters:
                module._parameters[own] = nn.Parameter(new, requires_grad=False)
            else:
                module._buffers[own] = new
    return model


@contextmanager
def _weightless() -> Iterator[None]:
    """Within it, modules are made without memory for their parameters; buffers are as always."""
    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = without  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint."""
    try:
        if (folder / _INDEX).exists():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / Path(file).name for name, file in index.items()}
        if (folder / _WHOLE).exists():
            with safe_open(folder / _WHOLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / _WHOLE)
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"folder: cannot read the checkpoint in {folder}: {shortened(error, 200)}") from error
    raise FileNotFoundError(f"folder: {folder} holds no {_WHOLE} and no {_INDEX}; wanted a checkpoint of transformers")


def _read(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"folder: there is no {file}, which holds {name}") from error
    except SafetensorError as error:
        raise ValueError(f"folder: cannot read {name} in {file}: {shortened(error, 200)}") from error


#: A tensor's name in the model, its module, and its name in that.
_Place = tuple[str, nn.Module, str]


def _outside(model: nn.Module, inside: set[nn.Module]) -> dict[str, list[_Place]]:
    """Every parameter and buffer outside of the blocks by its first name, and all of its places where it is tied."""
    found: dict[int, list[_Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module not in inside:
            for own, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((f"{path}.{own}" if path else own, module, own))
    return {places[0][0]: places for places in found.values()}


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = {**module._parameters, **module._buffers}[name]
    assert tensor is not None
    return tensor


def _only_embeds(model: Any, places: list[_Place]) -> bool:
    """Whether it is the embedding's weight, and not the head's as well."""
    modules = {module for _, module, _ in places}
    return model.get_input_embeddings() in modules and linear_head(model) not in modules


def _keys(model: Any, files: dict[str, Path], path: str) -> dict[str, str]:
    """The checkpoint's name of the model's tensors, of all that are not in a block at ``path`` if it has them."""
    names = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for key in files:
        for name in (key, prefix + key, key.removeprefix(prefix)):
            if name in names:
                found.setdefault(name, key)
                break
    if any(not name.startswith(f"{path}.") for name in names - found.keys()):
        found = {name: key for name, key in _renamed(model, [*files]).items() if name in names} | found
    return found


def _renamed(model: Any, keys: list[str]) -> dict[str, str]:
    """Names that transformers itself gives the tensors of older checkpoints."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    names = dict(model.named_parameters(remove_duplicate=False))
    return {rename_source_key(key, renamings, [], model.base_model_prefix, names)[0]: key for key in keys}
