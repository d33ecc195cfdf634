"""The lenses: what turns a layer's hidden state into the model's logits, were that layer the last.

On the way from hidden state to statistics a lens holds the translators and names the rest: its ``unembed`` is
the model's final norm and head. ``lens(h, idx)`` writes the logits of one layer; ``lens.decode`` gives
statistics of all layers without writing them.
"""

from __future__ import annotations

import abc
import inspect
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuned_lens_fast import load_artifacts
from tuned_lens_fast.engines.seam import Translator
from tuned_lens_fast.files import written_aside
from tuned_lens_fast.nn.unembed import Unembed, check_hidden

if TYPE_CHECKING:
    from tuned_lens_fast.stats import LensStats

#: What `TunedLens.from_*_pretrained` takes for the artifact loader, and what for `torch.load`.
_ARTIFACT_OPTIONS = frozenset(inspect.signature(load_artifacts.load_lens_artifacts).parameters) - {"resource_id"}
_LOAD_OPTIONS = frozenset({"map_location", "mmap", "pickle_module", "weights_only"})


class Lens(abc.ABC, nn.Module):
    """Decodes hidden states of any layer into logits.

    ``idx`` is the layer a hidden state enters: ``hidden_states[idx]`` of transformers, 0 being the embedding.
    """

    unembed: Unembed

    def __init__(self, unembed: Unembed) -> None:
        """``unembed`` maps the translated hidden state to logits."""
        super().__init__()
        self.unembed = unembed

    @abc.abstractmethod
    def transform_hidden(self, h: Tensor, idx: int) -> Tensor:
        """The hidden state ``[..., d_model]`` that the last block would have put out in place of ``h``."""

    @abc.abstractmethod
    def forward(self, h: Tensor, idx: int) -> Tensor:
        """Logits ``[..., vocab]`` of the hidden states ``h`` ``[..., d_model]`` of layer ``idx``."""

    def translator(self, idx: int) -> Translator | None:
        """What :meth:`decode` adds to the hidden state of layer ``idx``: an affine map of it, or None for
        nothing.

        Raises:
            IndexError: the lens has no layer ``idx``.
            NotImplementedError: the lens is of a kind that does not say.
        """
        raise NotImplementedError(f"{type(self).__name__} has no translator(idx), which decode needs")

    def decode(
        self,
        hidden_states: Tensor | Sequence[Tensor],
        *,
        layers: Sequence[int] | None = None,
        targets: Tensor | None = None,
        reference: Tensor | None = None,
        top_k: int = 0,
        watch: Sequence[int] | Tensor | None = None,
        stats: Sequence[str] | None = None,
        engine: str = "auto",
        memory_budget: int | None = None,
    ) -> LensStats:
        """Statistics of every layer and position; see :func:`tuned_lens_fast.decode.decode`."""
        from tuned_lens_fast.decode import decode

        return decode(
            self,
            hidden_states,
            layers=layers,
            targets=targets,
            reference=reference,
            top_k=top_k,
            watch=watch,
            stats=stats,
            engine=engine,
            memory_budget=memory_budget,
        )

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        layer: int,
        input_ids: Tensor,
        do_sample: bool = True,
        temp: float = 1.0,
        max_new_tokens: int = 100,
    ) -> Tensor:
        """Continues ``input_ids`` with what the lens reads at ``layer``, token by token.

        Stops early when every sequence has met one of the model's end-of-sequence tokens
        (``model.generation_config.eos_token_id``: none, one or several); a finished sequence repeats its own.
        Sampling draws from PyTorch's global generator, so ``torch.manual_seed`` fixes it.

        Args:
            model: the causal LM the lens belongs to.
            layer: 0 to num_hidden_layers - 1.
            input_ids: integer ``[tokens]`` or ``[batch, tokens]``, prompts of one length without padding.
            do_sample: sample; False takes the likeliest token.
            temp: divides the logits before sampling; 0 takes the likeliest token.
            max_new_tokens: at most so many new tokens.

        Returns:
            ``[batch, tokens + new tokens]``, the prompt and what follows it.

        Raises:
            TypeError: ``input_ids`` are not integers.
            ValueError: ``input_ids`` of another shape or empty, or a negative ``temp`` or ``max_new_tokens``.
            IndexError: no such layer.
        """
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise TypeError(f"input_ids: got {input_ids.dtype}, wanted integers")
        if input_ids.ndim not in (1, 2) or not input_ids.numel():
            raise ValueError(
                f"input_ids: got shape {[*input_ids.shape]}, wanted [tokens] or [batch, tokens], not empty"
            )
        if not temp >= 0:
            raise ValueError(f"temp: got {temp}, wanted 0 or more")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, wanted 0 or more")
        _check_layer("layer", layer, _num_hidden_layers(model))

        tokens = input_ids.reshape(-1, input_ids.shape[-1])
        config = getattr(model, "generation_config", None) or model.config
        eos = config.eos_token_id
        ends = torch.tensor([] if eos is None else eos, dtype=tokens.dtype, device=tokens.device).reshape(-1)
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        options: dict[str, Any] = {"output_hidden_states": True, "return_dict": True, "use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = 1
        cache = None
        for _ in range(max_new_tokens):
            # The cache holds all but the newest token; a model without one reads everything again.
            output = model(tokens if cache is None else tokens[:, -1:], past_key_values=cache, **options)
            cache = output.past_key_values
            logits = self.forward(output.hidden_states[layer][:, -1], layer).float()
            if do_sample and temp > 0:
                new = torch.multinomial((logits / temp).softmax(-1), 1)
            else:
                new = logits.argmax(-1, keepdim=True)
            new = torch.where(done[:, None], tokens[:, -1:], new.to(tokens))
            tokens = torch.cat([tokens, new], dim=1)
            done |= torch.isin(new[:, 0], ends)
            if done.all():
                break
        return tokens


class LogitLens(Lens):
    """Reads every layer with the model's own final norm and head (nostalgebraist, 2020)."""

    @classmethod
    def from_model(cls, model: Any) -> LogitLens:
        """The logit lens of a causal LM; see :class:`Unembed` for which and for errors."""
        return cls(Unembed(model))

    def transform_hidden(self, h: Tensor, idx: int) -> Tensor:
        """``h`` itself."""
        return h

    def forward(self, h: Tensor, idx: int) -> Tensor:
        """Logits ``[..., vocab]`` of ``h`` ``[..., d_model]``, whatever ``idx``; see :class:`Unembed`."""
        return self.unembed.forward(h)

    def translator(self, idx: int) -> Translator | None:
        """None: the logit lens reads the hidden state as it is."""
        return None


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
    def from_dict(cls, config_dict: dict[str, Any]) -> TunedLensConfig:
        """A config from its fields by name; unknown keys are dropped with a warning.

        Raises:
            ValueError: a field without a default is missing.
        """
        # tuned-lens 0.1.0 wrote it so.
        known = {"unembed_hash" if key == "unemebd_hash" else key: value for key, value in config_dict.items()}
        names = {field.name for field in fields(cls)}
        for key in sorted(known.keys() - names):
            warnings.warn(f"lens config: unknown key {key!r} is ignored", stacklevel=2)
            del known[key]
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]
        if missing:
            raise ValueError(f"lens config: {', '.join(missing)} missing; got {', '.join(config_dict) or 'nothing'}")
        return cls(**known)


class TunedLens(Lens):
    """Reads layer i through an affine translator of its own: ``h + A_i h + c_i`` (Belrose et al.,
    arXiv:2303.08112).

    ``lens[i]``, ``iter(lens)`` and ``len(lens)`` are those of ``layer_translators``.
    """

    config: TunedLensConfig
    layer_translators: nn.ModuleList  #: nn.Linear, [d_model, d_model]

    def __init__(self, unembed: Unembed, config: TunedLensConfig) -> None:
        """A lens with translators of zero, which is the logit lens until it is trained or loaded.

        Translators get the dtype (fp16 if that is no floating one) and device of the head. ``lens.config`` is
        a copy of ``config`` with the hash of ``unembed``.

        Raises:
            ValueError: ``config`` is of a model of another width.
        """
        super().__init__(unembed)
        head = unembed.unembedding.weight
        if config.d_model != head.shape[-1]:
            raise ValueError(f"config: a lens of d_model {config.d_model} for a model of d_model {head.shape[-1]}")
        self.config = replace(config, unembed_hash=unembed.unembedding_hash())
        dtype = head.dtype if head.is_floating_point() else torch.float16
        self.layer_translators = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            linear = nn.utils.skip_init(
                nn.Linear, config.d_model, config.d_model, bias=config.bias, dtype=dtype, device=head.device
            )
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)
            self.layer_translators.append(linear)

    @classmethod
    def from_model(cls, model: Any, model_revision: str | None = None, bias: bool = True) -> TunedLens:
        """An untrained lens of a causal LM.

        Args:
            model: see :class:`Unembed`.
            model_revision: recorded in the config.
            bias: whether the translators have one.
        """
        text = model.config.get_text_config()
        config = TunedLensConfig(
            base_model_name_or_path=model.config.name_or_path,
            d_model=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            bias=bias,
            base_model_revision=model_revision,
        )
        return cls(Unembed(model), config)

    @classmethod
    def from_model_and_pretrained(
        cls, model: Any, lens_resource_id: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> TunedLens:
        """The saved lens of a causal LM.

        Args:
            model: see :class:`Unembed`.
            lens_resource_id: a folder or a lens on the hub; by default ``model.config.name_or_path``.
            kwargs: see :meth:`from_unembed_and_pretrained`.

        Raises:
            ValueError: the lens has another number of layers than the model, besides the errors of
                :meth:`from_unembed_and_pretrained`.
        """
        if lens_resource_id is None:
            lens_resource_id = model.config.name_or_path
        lens = cls.from_unembed_and_pretrained(Unembed(model), lens_resource_id, **kwargs)
        layers = _num_hidden_layers(model)
        if len(lens) != layers:
            raise ValueError(f"lens_resource_id: a lens of {len(lens)} layers for a model of {layers}")
        return lens

    @classmethod
    def from_unembed_and_pretrained(
        cls, unembed: Unembed, lens_resource_id: str | os.PathLike[str], **kwargs: Any
    ) -> TunedLens:
        """A saved lens, from the end of its model.

        Args:
            unembed: see :class:`Unembed`.
            lens_resource_id: a folder, or a lens on the hub.
            kwargs: options of :func:`tuned_lens_fast.load_artifacts.load_lens_artifacts` and of
                ``torch.load``, which by default gets ``map_location="cpu"`` and ``weights_only=True``.

        Warns:
            UserWarning: the lens was made for a model with another unembedding. Its config keeps that model's
                hash.

        Raises:
            TypeError: an unknown option.
            FileNotFoundError: no such lens.
            ConnectionError: it is not in a local folder, and the hub cannot be reached.
            ValueError: a config or checkpoint that is damaged, is not plain tensors, or does not fit.
        """
        unknown = kwargs.keys() - _ARTIFACT_OPTIONS - _LOAD_OPTIONS
        if unknown:
            raise TypeError(
                f"{', '.join(sorted(unknown))}: unknown option, wanted one of "
                f"{', '.join(sorted(_ARTIFACT_OPTIONS | _LOAD_OPTIONS))}"
            )
        config_path, ckpt_path = load_artifacts.load_lens_artifacts(
            resource_id=lens_resource_id, **{k: v for k, v in kwargs.items() if k in _ARTIFACT_OPTIONS}
        )
        config = _read_config(Path(config_path))
        lens = cls(unembed, config)
        if config.unembed_hash and config.unembed_hash != lens.config.unembed_hash:
            warnings.warn(
                f"lens_resource_id: {os.fspath(lens_resource_id)!r} was made for a model "
                f"({config.base_model_name_or_path}) with another unembedding; it may decode this one badly",
                stacklevel=2,
            )
            lens.config.unembed_hash = config.unembed_hash
        options = {k: v for k, v in kwargs.items() if k in _LOAD_OPTIONS}
        lens._load_translators(Path(ckpt_path), **options)
        return lens

    def save(self, path: str | os.PathLike[str], ckpt: str = "params.pt", config: str = "config.json") -> None:
        """Writes the lens to the folder ``path``: the translators (on the CPU) and the config.

        Each file is written aside and renamed, so an interrupted save leaves none half-written.

        Raises:
            OSError: ``path`` cannot be written to.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.cpu() for name, tensor in self.layer_translators.state_dict().items()}
        text = json.dumps(self.config.to_dict(), indent=2)
        with written_aside(folder / ckpt) as aside:
            torch.save(state, aside)
        with written_aside(folder / config) as aside:
            aside.write_text(text, encoding="utf-8")

    def __getitem__(self, item: int) -> nn.Linear:
        return cast(nn.Linear, self.layer_translators[item])

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.layer_translators)

    def __len__(self) -> int:
        return len(self.layer_translators)

    def transform_hidden(self, h: Tensor, idx: int) -> Tensor:
        """``h + A_idx h + c_idx``, computed in the dtype that PyTorch promotes ``h`` and the translator to.

        Differentiable with respect to ``h`` and the translator.

        Args:
            h: floating ``[..., d_model]``.
            idx: the layer; negative ones count from the end.

        Raises:
            IndexError: no such layer.
            TypeError: ``h`` is not floating.
            ValueError: the last dimension of ``h`` is not d_model.
        """
        check_hidden(h, self.config.d_model)
        linear = self[idx]
        h = h.to(torch.promote_types(h.dtype, linear.weight.dtype))
        return h + F.linear(h, linear.weight.to(h.dtype), None if linear.bias is None else linear.bias.to(h.dtype))

    def forward(self, h: Tensor, idx: int) -> Tensor:
        """Logits of layer ``idx``, in the dtype of the model's head; see :class:`Unembed` and
        :meth:`transform_hidden`.

        They require grad, since the translators do; inside ``torch.no_grad()``, or after
        ``lens.requires_grad_(False)``, no graph is built.

        Args:
            h: floating ``[..., d_model]``.
            idx: the layer; negative ones count from the end.

        Returns:
            ``[..., vocab]``.
        """
        return self.unembed.forward(self.transform_hidden(h, idx))

    def translator(self, idx: int) -> Translator:
        """The translator of layer ``idx``; its tensors alias the lens's.

        Raises:
            IndexError: ``idx`` is not in 0 to ``len(lens) - 1``.
        """
        _check_layer("idx", idx, len(self))
        linear = self[idx]
        return Translator(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())

    def _load_translators(self, path: Path, **options: Any) -> None:
        """Fills the translators from "0.weight", ..., or a whole lens's "layer_translators.0.weight", ...."""
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: there is no file {path}")
        try:
            state = torch.load(path, **{"map_location": "cpu", "weights_only": True, **options})
        except Exception as error:
            lines = str(error).splitlines()
            refused = [line.strip() for line in lines if "unsupported global" in line.lower()]
            if refused:
                problem = f"it holds other objects than tensors, which could run code ({refused[0]})"
            elif isinstance(error, UnpicklingError) or not lines:
                # PyTorch's text advises to load it unsafely.
                problem = "it is truncated, or no PyTorch checkpoint"
            else:
                problem = f"it is truncated, or no PyTorch checkpoint ({lines[0]})"
            raise ValueError(f"checkpoint: cannot read {path}: {problem}") from error
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
        ):
            raise ValueError(f"checkpoint: {path} is no state dict, wanted tensors by name")
        # A whole lens's state dict also holds the model's norm and head, which the model has.
        state = {
            name.removeprefix("layer_translators."): tensor
            for name, tensor in state.items()
            if not name.startswith("unembed.")
        }
        wanted = {name: [*tensor.shape] for name, tensor in self.layer_translators.state_dict().items()}
        missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        if missing or unknown:
            raise ValueError(
                f"checkpoint: {path} does not fit its config ({len(self)} layers, bias {self.config.bias}): "
                f"it lacks {_some(missing)} and has unknown {_some(unknown)}"
            )
        for name, shape in wanted.items():
            if [*state[name].shape] != shape:
                raise ValueError(f"checkpoint: {path}: {name} has shape {[*state[name].shape]}, wanted {shape}")
        self.layer_translators.load_state_dict(state)


def _read_config(path: Path) -> TunedLensConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"lens config: {path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"lens config: {path} holds a {type(values).__name__}, wanted an object")
    config = TunedLensConfig.from_dict(values)
    for name, value in (("d_model", config.d_model), ("num_hidden_layers", config.num_hidden_layers)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"lens config: {name} is {value!r} in {path}, wanted a positive integer")
    if config.lens_type != "linear_tuned_lens":
        raise ValueError(f"lens config: lens_type is {config.lens_type!r} in {path}, wanted 'linear_tuned_lens'")
    return config


def _num_hidden_layers(model: Any) -> int:
    return model.config.get_text_config().num_hidden_layers


def _check_layer(argument: str, layer: int, layers: int) -> None:
    if not 0 <= layer < layers:
        raise IndexError(f"{argument}: got layer {layer}, wanted 0 to {layers - 1}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nothing"
