"""Reads a saved lens, whichever version of tuned-lens wrote it, into one form: its config and the tensors
"0.weight", "0.bias", "1.weight", ....

Every version's lens is ``h + (W h + b)`` for each layer; names and counts differ:

- to January 2023: ``input_probe``, ``layer_probes.i`` (for a while ``adapter`` in place of ``probe``) beside the
  model's ``layer_norm`` and ``unembedding``; February and March 2023: ``input_adapter``, ``layer_adapters.i``;
  0.0.3 to 0.0.5: ``input_translator``, ``layer_translators.i``. In all of these the input's is layer 0's and
  number i is layer i + 1's. Their config says ``num_layers``.
- from 0.1.0: ``i``, layer i's. Their config says ``num_hidden_layers``.
- ``lens.state_dict()`` of the latter: ``layer_translators.i``, layer i's, beside ``unembed.*``; training
  snapshots have that as their entry ``lens``, with ``module.`` before every name if several GPUs trained.

What early versions could do besides is refused by the name of its key.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

#: Options of the versions before 0.1.0 that a lens of today has not, with what they mean.
_REFUSED_OPTIONS = {
    "reuse_unembedding": "every layer has a head of its own in place of a translator",
    "pre_ln": "the final norm comes before the translators",
    "layer_norm": "hidden states are normalised before the translators",
    "mlp_hidden_sizes": "its translators are MLPs",
    "shared_mlp_hidden_sizes": "an MLP follows the translators",
    "rank": "its translators are of low rank",
    "sublayers": "it has translators for what attention puts out, too",
    "orthogonal": "its translators are parametrised as rotations",
    "extra_layers": "blocks of the model follow the translators",
}
#: The same, seen in the checkpoint.
_REFUSED_ENTRIES = {
    r"attn_(probe|adapter)s\.": "sublayers",
    r"shared_mlp\.": "shared_mlp_hidden_sizes",
    r"extra_layers\.": "extra_layers",
    r".*\.parametrizations\.": "orthogonal",
    r"(input_\w+|layer_\w+\.\d+)\.\d+\.(weight|bias)$": "mlp_hidden_sizes",
}
#: Options of those versions that say nothing about a trained lens, or are read elsewhere in this module.
_OLD_OPTIONS = {
    *("dropout", "identity_init", "include_input", "include_final", "share_weights"),
    *("model_config", "model_name", "num_layers", "vocab_size", *_REFUSED_OPTIONS),
}
_INPUT = re.compile(r"input_(?:probe|adapter|translator)\.(weight|bias)")
_LAYER = re.compile(r"(?:layer_(probe|adapter|translator)s\.)?(0|[1-9][0-9]{0,8})\.(weight|bias)")
_MODEL_END = {"layer_norm.": "final_norm.", "unembedding.": "unembedding.", "unembed.": ""}


@dataclass
class TunedLensConfig:
    """What a tuned lens was made for; stored beside its parameters."""

    base_model_name_or_path: str
    d_model: int
    num_hidden_layers: int
    bias: bool = True
    base_model_revision: str | None = None
    unembed_hash: str | None = None  #: :meth:`Unembed.unembedding_hash` of the model
    lens_type: str = "linear_tuned_lens"

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> TunedLensConfig:
        """A config from its fields by name, or from those of a version before 0.1.0; unknown keys are dropped
        with a warning.

        Raises:
            ValueError: a field without a default is missing, one is of the wrong type or out of range, or the
                lens is of a kind that ``h + (W h + b)`` does not express.
        """
        known = dict(config_dict)
        if "num_layers" in known and "num_hidden_layers" not in known:
            known = _from_old(known)
        # tuned-lens 0.1.0 wrote it so.
        if "unemebd_hash" in known:
            known.setdefault("unembed_hash", known.pop("unemebd_hash"))
        names = {field.name for field in fields(cls)}
        for key in sorted(known.keys() - names):
            warnings.warn(f"lens config: unknown key {key!r} is ignored", stacklevel=2)
            del known[key]
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]
        if missing:
            raise ValueError(f"lens config: {', '.join(missing)} missing; got {', '.join(config_dict) or 'nothing'}")
        config = cls(**known)
        for name in ("d_model", "num_hidden_layers"):
            value = getattr(config, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"lens config: {name} is {value!r}, wanted a positive integer")
        if type(config.bias) is not bool:
            raise ValueError(f"lens config: bias is {config.bias!r}, wanted true or false")
        # Lenses of development versions before 0.1.0 have an integer for a hash.
        for name, kinds in (
            ("base_model_name_or_path", str),
            ("base_model_revision", str),
            ("unembed_hash", (str, int)),
        ):
            value = getattr(config, name)
            if not isinstance(value, kinds) and (value is not None or name == "base_model_name_or_path"):
                raise ValueError(f"lens config: {name} is {value!r}, wanted a string")
        if config.lens_type != "linear_tuned_lens":
            raise ValueError(f"lens config: lens_type is {config.lens_type!r}, wanted 'linear_tuned_lens'")
        return config


@dataclass(frozen=True)
class Artifact:
    """A saved lens in the form of today."""

    config: TunedLensConfig
    translators: dict[str, Tensor]  #: "0.weight" [d_model, d_model], "0.bias" [d_model], ...
    #: What it holds of the model it was made for, if anything: "final_norm.weight", "unembedding.weight", ....
    model_end: dict[str, Tensor]


def read_artifact(config_path: Path, ckpt_path: Path, **options: Any) -> Artifact:
    """A lens from its two files. Nothing is allocated for what the config claims and the checkpoint lacks.

    Args:
        config_path: JSON.
        ckpt_path: a checkpoint of PyTorch, or of safetensors if it is named so.
        options: ``map_location``, ``mmap`` of ``torch.load``, which never runs a checkpoint's code.

    Warns:
        UserWarning: a key of the config is unknown, or the lens has no translator of layer 0, or one of the
            model's own output, which is left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the two do not fit, or the lens is of a kind that ``h + (W h + b)`` does
            not express.
    """
    config, values = _read_config(config_path)
    state = _read_checkpoint(ckpt_path, **options)
    translators, model_end = _name_alike(state, config, values, ckpt_path)
    _check(translators, config, ckpt_path)
    return Artifact(config, translators, model_end)


def read_config(path: Path) -> TunedLensConfig:
    """The config of a lens of any version; errors are those of :func:`read_artifact`."""
    return _read_config(path)[0]


def _read_config(path: Path) -> tuple[TunedLensConfig, dict[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"lens config: {path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"lens config: {path} holds a {type(values).__name__}, wanted an object")
    try:
        return TunedLensConfig.from_dict(values), values
    except ValueError as error:
        raise ValueError(f"{error} ({path})") from error


def _from_old(values: dict[str, Any]) -> dict[str, Any]:
    """The config of a version before 0.1.0 by today's names; keys unknown to those versions stay."""
    for key, meaning in _REFUSED_OPTIONS.items():
        value = values.get(key, key == "reuse_unembedding")
        # Of these, only this one is on when the lens is plain.
        if (value is not True) if key == "reuse_unembedding" else value:
            raise ValueError(f"lens config: {key} is {value!r}, so {meaning}; only lenses h + (W h + b) can be loaded")
    model = values.get("model_config")
    name = values.get("model_name") or (model.get("_name_or_path") if isinstance(model, dict) else None)
    return {
        **{key: value for key, value in values.items() if key not in _OLD_OPTIONS},
        "num_hidden_layers": values["num_layers"],
        "base_model_name_or_path": name or "",
    }


def _read_checkpoint(path: Path, **options: Any) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, **{"map_location": "cpu", **options, "weights_only": True})
    except Exception as error:
        lines = str(error).splitlines()
        refused = [line.strip() for line in lines if "unsupported global" in line.lower()]
        if refused:
            problem = f"it holds other objects than tensors, which could run code ({refused[0]})"
        elif isinstance(error, UnpicklingError) or not lines:
            # PyTorch's text advises to load it unsafely.
            problem = "it is truncated, or no checkpoint"
        else:
            problem = f"{lines[0]}; if that says nothing, it is truncated, or no checkpoint"
        raise ValueError(f"checkpoint: cannot read {path}: {problem}") from error
    if isinstance(state, dict) and isinstance(state.get("lens"), dict):
        # A training snapshot, which also holds the optimizer and the like.
        state = state["lens"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"checkpoint: {path} is no state dict, wanted tensors by name")
    return {name.removeprefix("module."): tensor.detach() for name, tensor in state.items()}


def _name_alike(
    state: dict[str, Tensor], config: TunedLensConfig, values: dict[str, Any], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The translators by today's names, and what ``state`` holds of the model."""
    translators: dict[str, Tensor] = {}
    model_end: dict[str, Tensor] = {}
    old = "num_layers" in values and "num_hidden_layers" not in values
    # Beside unembed.*, which came with 0.1.0, layer_translators.i is layer i's.
    shifted = any(map(_INPUT.fullmatch, state)) or (old and not any(name.startswith("unembed.") for name in state))
    for name, tensor in state.items():
        for pattern, key in _REFUSED_ENTRIES.items():
            if re.match(pattern, name):
                raise ValueError(
                    f"checkpoint: {path} holds {name}, a sign of {key}: {_REFUSED_OPTIONS[key]}; "
                    "only lenses h + (W h + b) can be loaded"
                )
        end = next((end for end in _MODEL_END if name.startswith(end)), None)
        if match := _INPUT.fullmatch(name):
            kept, todays = translators, f"0.{match[1]}"
        elif match := _LAYER.fullmatch(name):
            kept, todays = translators, f"{int(match[2]) + (shifted and match[1] is not None)}.{match[3]}"
        elif end is not None:
            kept, todays = model_end, _MODEL_END[end] + name.removeprefix(end)
        else:
            raise ValueError(f"checkpoint: {path} holds an unknown entry {name}")
        if todays in kept:
            raise ValueError(f"checkpoint: {path} holds two entries for {todays}, one of them {name}")
        kept[todays] = tensor
    last = config.num_hidden_layers
    if shifted and f"{last}.weight" in translators and values.get("include_final", True):
        warnings.warn("include_final: the lens's translator of the model's own output is left out", stacklevel=4)
        translators = {name: t for name, t in translators.items() if not name.startswith(f"{last}.")}
    if shifted and "0.weight" not in translators and values.get("include_input") is False:
        warnings.warn("include_input: the lens has no translator of layer 0, which is read as it is", stacklevel=4)
        for kind in ("weight", "bias"):
            if f"1.{kind}" in translators:
                translators[f"0.{kind}"] = torch.zeros_like(translators[f"1.{kind}"])
    return translators, model_end


def _check(translators: dict[str, Tensor], config: TunedLensConfig, path: Path) -> None:
    layers, d_model = config.num_hidden_layers, config.d_model
    kinds = {"weight": [d_model, d_model], **({"bias": [d_model]} if config.bias else {})}
    # As many names as there are tensors, however many layers the config claims.
    wanted = [f"{i}.{kind}" for i in range(min(layers, len(translators) + 1)) for kind in kinds]
    missing = [name for name in wanted if name not in translators]
    unknown = sorted(translators.keys() - set(wanted))
    if missing or unknown:
        raise ValueError(
            f"checkpoint: {path} does not fit its config ({layers} layers, bias {config.bias}): "
            f"it lacks {_some(missing)} and has unknown {_some(unknown)}"
        )
    for name, tensor in translators.items():
        dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
        if not dense or not tensor.is_floating_point():
            raise ValueError(f"checkpoint: {path}: {name} is {tensor.dtype}, {tensor.layout}; wanted floating, dense")
        shape = kinds[name.rpartition(".")[2]]
        if [*tensor.shape] != shape:
            raise ValueError(f"checkpoint: {path}: {name} has shape {[*tensor.shape]}, wanted {shape}")
        # A tensor may repeat a few numbers, and be larger than any memory.
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"checkpoint: {path}: {name} holds fewer numbers than its shape {shape}")
        # 8-bit floats have no isfinite.
        if not (tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all():
            raise ValueError(f"checkpoint: {path}: {name} holds NaN or infinity")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nothing"
