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

Early translators of low rank, ``u v^T + diag(scale)``, become the matrix that they are; what early versions could do
besides is refused by the name of its key. A lens of this package may lack layers: its config has
``translated_layers``. :mod:`tuned_lens_fast.jacobian_lens` reads lenses of another kind into the same form.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuned_lens_fast.checkpoint import load_checkpoint
from tuned_lens_fast.messages import listed, quoted, shortened

#: Bytes of a lens's config: old ones hold their model's as well, with the names of its labels.
MOST_CONFIG = 2**20
#: Options of the versions before 0.1.0 that a lens of today has not, with what they mean.
_REFUSED_OPTIONS = {
    "reuse_unembedding": "every layer has a head of its own in place of a translator",
    "pre_ln": "the final norm comes before the translators",
    "layer_norm": "hidden states are normalised before the translators",
    "mlp_hidden_sizes": "its translators are MLPs",
    "shared_mlp_hidden_sizes": "an MLP follows the translators",
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
    *("dropout", "identity_init", "include_input", "include_final", "rank", "share_weights"),
    *("model_config", "model_name", "num_layers", "vocab_size", *_REFUSED_OPTIONS),
}
_INPUT = re.compile(r"input_(?:probe|adapter|translator)\.(weight|bias|u|v|scale)")
_LAYER = re.compile(r"(?:layer_(probe|adapter|translator)s\.)?(0|[1-9][0-9]{0,8})\.(weight|bias|u|v|scale)")
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
    translated_layers: list[int] | None = None  #: those that have a translator, in order; all if None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON; ``translated_layers`` only where some layers are missing, since
        tuned-lens has no such field.
        """
        return {name: value for name, value in asdict(self).items() if name != "translated_layers" or value is not None}

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
        unknown = sorted(known.keys() - names)
        if unknown:
            warnings.warn(f"lens config: unknown keys are ignored: {listed(unknown)}", stacklevel=2)
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]
        if missing:
            raise ValueError(f"lens config: {', '.join(missing)} missing; got {listed(config_dict)}")
        config = cls(**{name: value for name, value in known.items() if name in names})
        for name in ("d_model", "num_hidden_layers"):
            value = getattr(config, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"lens config: {name} is {quoted(value)}, wanted a positive integer")
        if type(config.bias) is not bool:
            raise ValueError(f"lens config: bias is {quoted(config.bias)}, wanted true or false")
        # Lenses of development versions before 0.1.0 have an integer for a hash.
        for name, kinds in (
            ("base_model_name_or_path", str),
            ("base_model_revision", str),
            ("unembed_hash", (str, int)),
        ):
            value = getattr(config, name)
            if not isinstance(value, kinds) and (value is not None or name == "base_model_name_or_path"):
                raise ValueError(f"lens config: {name} is {quoted(value)}, wanted a string")
        if config.lens_type != "linear_tuned_lens":
            raise ValueError(f"lens config: lens_type is {quoted(config.lens_type)}, wanted 'linear_tuned_lens'")
        if config.translated_layers is not None and not _are_layers(config.translated_layers, config.num_hidden_layers):
            raise ValueError(
                f"lens config: translated_layers is {quoted(config.translated_layers)}, wanted some of 0 to "
                f"{config.num_hidden_layers - 1}, in order"
            )
        return config


@dataclass(frozen=True)
class Artifact:
    """A saved lens in the form of today."""

    config: TunedLensConfig
    translators: dict[str, Tensor]  #: "0.weight" [d_model, d_model], "0.bias" [d_model], ...
    #: Parts of its model's end that it holds otherwise than the model asked about: "final_norm", "unembedding".
    differing: list[str]


def read_artifact(
    config_path: Path,
    ckpt_path: Path,
    unembed: nn.Module | None = None,
    *,
    d_model: int | None = None,
    layers: int | None = None,
) -> Artifact:
    """A lens from its two files.

    Nothing is allocated for what the config claims and the checkpoint lacks, nor for what the checkpoint holds and the
    lens does not need.

    Args:
        config_path: JSON.
        ckpt_path: a checkpoint of PyTorch, or of safetensors if it is named so.
        unembed: the end of a model, to compare with what the checkpoint holds of one.
        d_model, layers: of that model; a lens of others is refused before its checkpoint is opened.

    Warns:
        UserWarning: the config has unknown keys, or the lens has a translator of the model's own output, which is
            left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the two do not fit, or the lens is of a kind that ``h + (W h + b)`` does
            not express.
    """
    config, values = _read_config(config_path)
    if d_model not in (None, config.d_model):
        raise ValueError(f"config: a lens of d_model {config.d_model} for a model of d_model {d_model} ({config_path})")
    if layers not in (None, config.num_hidden_layers):
        raise ValueError(f"config: a lens of {config.num_hidden_layers} layers for a model of {layers} ({config_path})")
    state = _state_dict(load_checkpoint(ckpt_path), ckpt_path)
    stored, model_end, without_input = _name_alike(state, config, values, ckpt_path)
    if without_input:
        # No more layers than there are tensors for, however many the config claims.
        end = min(config.num_hidden_layers, len(stored) + 2)
        config = replace(config, translated_layers=[*range(1, end)])
    _multiply(stored, config, ckpt_path)
    _check_shapes(stored, config, ckpt_path)
    translators = {name: own_tensor(name, tensor, ckpt_path) for name, tensor in stored.items()}
    differing = [] if unembed is None else _differing(model_end, unembed)
    return Artifact(config, translators, differing)


def read_config(path: Path) -> TunedLensConfig:
    """The config of a lens of any version; errors are those of :func:`read_artifact`."""
    return _read_config(path)[0]


def read_json(path: Path) -> Any:
    """What a file of JSON holds, which is small as a config is.

    Raises:
        ValueError: it is none, or has more bytes than :data:`MOST_CONFIG`.
    """
    with path.open("rb") as file:
        text = file.read(MOST_CONFIG + 1)
    if len(text) > MOST_CONFIG:
        raise ValueError(f"{path} has more than {MOST_CONFIG:,} bytes, too many for a config")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is no JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {shortened(error, 100)}") from error


def _read_config(path: Path) -> tuple[TunedLensConfig, dict[str, Any]]:
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"lens config: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"lens config: {path} holds a {type(values).__name__}, wanted an object")
    try:
        return TunedLensConfig.from_dict(values), values
    except ValueError as error:
        raise ValueError(f"{error} ({path})") from error


def _are_layers(value: Any, count: int) -> bool:
    """Whether ``value`` is a list of some of the layers 0 to ``count - 1``, in order."""
    return (
        isinstance(value, list)
        and all(type(layer) is int for layer in value)
        and all(low < high for low, high in itertools.pairwise([-1, *value, count]))
        and bool(value)
    )


def _from_old(values: dict[str, Any]) -> dict[str, Any]:
    """The config of a version before 0.1.0 by today's names; keys unknown to those versions stay."""
    for key, meaning in _REFUSED_OPTIONS.items():
        value = values.get(key, key == "reuse_unembedding")
        # Of these, only this one is on when the lens is plain.
        if (value is not True) if key == "reuse_unembedding" else value:
            raise ValueError(
                f"lens config: {key} is {quoted(value)}, so {meaning}; only lenses h + (W h + b) can be loaded"
            )
    model = values.get("model_config")
    name = values.get("model_name") or (model.get("_name_or_path") if isinstance(model, dict) else None)
    return {
        **{key: value for key, value in values.items() if key not in _OLD_OPTIONS},
        "num_hidden_layers": values["num_layers"],
        "base_model_name_or_path": name or "",
    }


def _state_dict(state: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(state, dict) and isinstance(state.get("lens"), dict):
        # A training snapshot, which also holds the optimizer and the like.
        state = state["lens"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"checkpoint: {path} is no state dict, wanted tensors by name")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _name_alike(
    state: dict[str, Tensor], config: TunedLensConfig, values: dict[str, Any], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """The translators by today's names, what ``state`` holds of the model, and whether layer 0 has no translator."""
    translators: dict[str, Tensor] = {}
    model_end: dict[str, Tensor] = {}
    old = "num_layers" in values and "num_hidden_layers" not in values
    # Beside unembed.*, which came with 0.1.0, layer_translators.i is layer i's.
    shifted = any(map(_INPUT.fullmatch, state)) or (old and not any(name.startswith("unembed.") for name in state))
    for name, tensor in state.items():
        for pattern, key in _REFUSED_ENTRIES.items():
            if re.match(pattern, name):
                raise ValueError(
                    f"checkpoint: {path} holds {quoted(name)}, a sign of {key}: {_REFUSED_OPTIONS[key]}; "
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
            raise ValueError(f"checkpoint: {path} holds an unknown entry {quoted(name)}")
        if todays in kept:
            raise ValueError(f"checkpoint: {path} holds two entries for {quoted(todays)}, one of them {quoted(name)}")
        kept[todays] = tensor
    last = config.num_hidden_layers
    own = f"{last}."
    if shifted and any(name.startswith(own) for name in translators) and values.get("include_final", True):
        warnings.warn("include_final: the lens's translator of the model's own output is left out", stacklevel=5)
        translators = {name: t for name, t in translators.items() if not name.startswith(own)}
    has_input = any(name.startswith("0.") for name in translators)
    return translators, model_end, shifted and last > 1 and not has_input and values.get("include_input") is False


def _multiply(translators: dict[str, Tensor], config: TunedLensConfig, path: Path) -> None:
    """Put the matrix ``u v^T + diag(scale)`` in place of its factors, as ``white_box.nn.LowRankLinear`` had it."""
    d_model = config.d_model
    for layer in [name.removesuffix(".u") for name in translators if name.endswith(".u")]:
        kinds = [kind for kind in ("u", "v", "scale") if f"{layer}.{kind}" in translators]
        factors = {kind: translators.pop(f"{layer}.{kind}") for kind in kinds}
        shapes = {kind: tuple(factor.shape) for kind, factor in factors.items()}
        rank = shapes["u"][-1] if shapes["u"] else 0
        wanted = {"u": (d_model, rank), "v": (d_model, rank), "scale": (d_model,)}
        if not {"u": wanted["u"], "v": wanted["v"]}.items() <= shapes.items() <= wanted.items() or rank > d_model:
            raise ValueError(
                f"checkpoint: {path}: layer {layer} is of low rank with {quoted(shapes, 150)}, wanted u and v "
                f"[{d_model}, rank] and perhaps scale [{d_model}]"
            )
        factors = {kind: own_tensor(f"{layer}.{kind}", f, path).float() for kind, f in factors.items()}
        weight = factors["u"] @ factors["v"].T
        if "scale" in factors:
            weight.diagonal().add_(factors["scale"])
        if translators.setdefault(f"{layer}.weight", weight) is not weight:
            raise ValueError(f"checkpoint: {path} holds two entries for '{layer}.weight', one of them '{layer}.u'")


def _check_shapes(translators: dict[str, Tensor], config: TunedLensConfig, path: Path) -> None:
    layers, d_model = config.num_hidden_layers, config.d_model
    kinds = {"weight": (d_model, d_model), **({"bias": (d_model,)} if config.bias else {})}
    # As many names as there are tensors, however many layers the config claims.
    named = range(layers) if config.translated_layers is None else config.translated_layers
    wanted = [f"{i}.{kind}" for i in itertools.islice(named, len(translators) + 1) for kind in kinds]
    missing = [name for name in wanted if name not in translators]
    unknown = sorted(translators.keys() - set(wanted))
    if missing or unknown:
        raise ValueError(
            f"checkpoint: {path} does not fit its config ({layers} layers, bias {config.bias}): "
            f"it lacks {listed(missing)} and has unknown {listed(unknown)}"
        )
    for name, tensor in translators.items():
        shape = kinds[name.rpartition(".")[2]]
        if tensor.shape != shape:
            raise ValueError(f"checkpoint: {path}: {name} has shape {quoted([*tensor.shape])}, wanted {[*shape]}")


def own_tensor(name: str, stored: Tensor, path: Path) -> Tensor:
    """A tensor of its own, no longer one of the file, floating and finite.

    Raises:
        ValueError: it is not; ``name`` and ``path`` say which.
    """
    tensor = stored.clone(memory_format=torch.contiguous_format)
    if not tensor.is_floating_point():
        raise ValueError(f"checkpoint: {path}: {name} is {tensor.dtype}, wanted a floating dtype")
    # 8-bit floats have no isfinite.
    if not (tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all():
        raise ValueError(f"checkpoint: {path}: {name} holds NaN or infinity")
    return tensor


def _differing(stored: dict[str, Tensor], unembed: nn.Module) -> list[str]:
    """Parts of the model's end that ``stored`` has otherwise than ``unembed``, as far as the two compare."""
    found = []
    for name, tensor in stored.items():
        part, _, leaf = name.rpartition(".")
        ours = getattr(getattr(unembed, part, None), leaf, None)
        if not isinstance(ours, Tensor) or not ours.is_floating_point() or ours.is_meta:
            continue
        if tensor.shape != ours.shape:
            found.append(part)
            continue
        # A thousand rows tell models apart, and the head of a large one has a hundred times as many.
        step = max(1, len(ours) // 1000)
        a, b = tensor[::step].float(), ours[::step].detach().float().cpu()
        # Stored in fp32 for a model in bf16, say: a rounding apart.
        if not (a - b).norm() <= 2**-7 * a.norm():
            found.append(part)
    return found
