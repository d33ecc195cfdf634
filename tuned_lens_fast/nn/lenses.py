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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tuned_lens_fast import load_artifacts
from tuned_lens_fast.artifacts import TunedLensConfig, read_artifact
from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.decode import decode
from tuned_lens_fast.engines.interface import Translator
from tuned_lens_fast.inputs import Prompt, read_prompt
from tuned_lens_fast.jacobian_lens import read_jacobian_lens
from tuned_lens_fast.loss import loss
from tuned_lens_fast.messages import quoted, ranges
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.chunked_pass import cache_of, cannot_continue
from tuned_lens_fast.models.forward_pass import input_device, model_inputs
from tuned_lens_fast.models.residual_stream import recorded
from tuned_lens_fast.models.wrappers import name_or_path, unwrapped
from tuned_lens_fast.nn.unembed import Unembed, check_hidden

#: What `TunedLens.from_*_pretrained` takes for the artifact loader.
_ARTIFACT_OPTIONS = frozenset(inspect.signature(load_artifacts.load_lens_artifacts).parameters) - {"resource_id"}
#: Of `torch.load`, taken since callers of tuned-lens pass them: no code of a lens is ever run, only the tensors that it
#: needs are read, and they end up on the model's device.
_IGNORED_OPTIONS = frozenset({"map_location", "mmap", "pickle_module", "weights_only"})


class Lens(abc.ABC, nn.Module):
    """Decodes hidden states of any layer into logits.

    ``idx`` is the layer a hidden state enters: ``hidden_states[idx]`` of transformers, 0 being the embedding.

    A class that brings ``translator(idx)``, the affine map that its ``transform_hidden`` adds, is decoded by it. Any
    other is by its ``transform_hidden``, a layer at a time.
    """

    unembed: Unembed
    #: Whether ``translator`` says all that the lens does before the unembedding.
    affine = False

    def __init_subclass__(cls, **options: Any) -> None:
        """A class that brings a ``transform_hidden`` or ``forward`` of its own, and no ``translator``, means these."""
        super().__init_subclass__(**options)
        if "translator" in vars(cls):
            cls.affine = True
        elif not {"transform_hidden", "forward"}.isdisjoint(vars(cls)):
            cls.affine = False

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

    #: Statistics of every layer and position.
    decode = decode
    #: What the lens is trained on, differentiable.
    loss = loss

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        layer: int,
        input_ids: Prompt,
        do_sample: bool = True,
        temp: float = 1.0,
        max_new_tokens: int = 100,
        *,
        tokenizer: Any = None,
    ) -> Tensor:
        """Continues ``input_ids`` with what the lens reads at ``layer``, token by token.

        Stops early when every sequence has met one of the model's end-of-sequence tokens
        (``model.generation_config.eos_token_id``: none, one or several); a finished sequence repeats its own.
        Sampling draws from PyTorch's global generator, so ``torch.manual_seed`` fixes it. The model runs in evaluation
        mode, and is left in the modes it was in; one that does not continue from its cache reads everything
        again for each token.

        Args:
            model: the causal LM the lens belongs to.
            layer: 0 to num_hidden_layers - 1; negative ones count from the end.
            input_ids: integer ``[tokens]`` or ``[batch, tokens]``, prompts of one length without padding; or as
                :func:`~tuned_lens_fast.decode_model` takes them.
            do_sample: sample; False takes the likeliest token.
            temp: divides the logits before sampling; 0 takes the likeliest token.
            max_new_tokens: at most so many new tokens.
            tokenizer: that of the model, where ``input_ids`` are texts.

        Returns:
            ``[batch, tokens + new tokens]``, the prompt and what follows it.

        Raises:
            TypeError: ``input_ids`` are not integers, or the model is TransformerLens's ``HookedTransformer``.
            ValueError: ``input_ids`` of another shape or empty, or a negative ``temp`` or ``max_new_tokens``; or
                the model has no head, or calls the layer's block more than once a pass.
            IndexError: no such layer.
        """
        model = unwrapped(model)
        prompt, mask = read_prompt(input_ids, None, tokenizer, input_device(model))
        if mask is not None and not mask.all():
            raise ValueError("input_ids: got prompts of several lengths, wanted one length without padding")
        if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise TypeError(f"input_ids: got {prompt.dtype}, wanted integers")
        if prompt.ndim not in (1, 2) or not prompt.numel():
            raise ValueError(f"input_ids: got shape {[*prompt.shape]}, wanted [tokens] or [batch, tokens], not empty")
        if not temp >= 0:
            raise ValueError(f"temp: got {temp}, wanted 0 or more")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, wanted 0 or more")
        layers = len(get_transformer_layers(model)[1])
        layer = layer + layers if -layers <= layer < 0 else layer
        _check_layer("layer", layer, layers)

        tokens = prompt.reshape(-1, prompt.shape[-1])
        device = self.unembed.unembedding.weight.device
        start = tokens.shape[1]
        cached = max_new_tokens > 1 and cannot_continue(model, tokens, None, (start, start + 1)) is None
        with recorded(model, [layer], slice(-1, None)) as recorder:
            config = getattr(model, "generation_config", None) or model.config
            eos = config.eos_token_id
            ends = torch.tensor([] if eos is None else eos, dtype=tokens.dtype, device=tokens.device).reshape(-1)
            done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
            cache: dict[str, Any] = {}
            for _ in range(max_new_tokens):
                # The cache holds all but the newest token.
                inputs = model_inputs(model, tokens[:, -1:] if cache else tokens)
                output = model(**inputs | ({**cache, "use_cache": True} if cached else {}))
                cache = cache_of(model, output) if cached else {}
                (h,), _ = recorder.take()
                logits = self.forward(h[:, -1].to(device), layer).float()
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
    def from_model(cls, model: Any, *, verify: bool = True) -> LogitLens:
        """The logit lens of a causal LM; see :class:`Unembed` for which, for ``verify`` and for errors."""
        return cls(Unembed(model, verify=verify))

    @classmethod
    def from_checkpoint(cls, folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> LogitLens:
        """The logit lens of a checkpoint, whose norm and head alone are read; see :meth:`Unembed.from_checkpoint`."""
        return cls(Unembed.from_checkpoint(folder, trust_remote_code=trust_remote_code))

    def transform_hidden(self, h: Tensor, idx: int) -> Tensor:
        """``h`` itself."""
        return h

    def forward(self, h: Tensor, idx: int) -> Tensor:
        """Logits ``[..., vocab]`` of ``h`` ``[..., d_model]``, whatever ``idx``; see :class:`Unembed`."""
        return self.unembed.forward(self.transform_hidden(h, idx))

    def translator(self, idx: int) -> Translator | None:
        """None: the logit lens reads the hidden state as it is."""
        return None


class TunedLens(Lens):
    """Reads layer i through an affine translator of its own: ``h + A_i h + c_i`` (Belrose et al.,
    arXiv:2303.08112).

    ``lens[i]``, ``iter(lens)`` and ``len(lens)`` are those of ``layer_translators``. A lens may lack layers of its
    model (``translated_layers``): ``len(lens)`` counts them, ``iter(lens)`` passes them over, and to ask for one is
    an IndexError.
    """

    config: TunedLensConfig
    layer_translators: nn.ModuleList  #: nn.Linear, [d_model, d_model]; an empty module where the lens has none

    def __init__(self, unembed: Unembed, config: TunedLensConfig) -> None:
        """A lens with translators of zero, which is the logit lens until it is trained or loaded.

        Translators get the dtype (fp16 if that is no floating one) and device of the head. ``lens.config`` is
        a copy of ``config`` with the hash of ``unembed``.

        Raises:
            ValueError: ``config`` is of a model of another width.
        """
        super().__init__(unembed)
        head, width = unembed.unembedding.weight, _width(unembed)
        if config.d_model != width:
            raise ValueError(f"config: a lens of d_model {config.d_model} for a model of d_model {width}")
        self.config = replace(config, unembed_hash=unembed.unembedding_hash())
        dtype = head.dtype if head.is_floating_point() else torch.float16
        self.layer_translators = nn.ModuleList()
        for layer in range(config.num_hidden_layers):
            if config.translated_layers is not None and layer not in config.translated_layers:
                self.layer_translators.append(nn.Module())
                continue
            linear = nn.utils.skip_init(
                nn.Linear, config.d_model, config.d_model, bias=config.bias, dtype=dtype, device=head.device
            )
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)
            self.layer_translators.append(linear)

    @classmethod
    def from_model(
        cls, model: Any, model_revision: str | None = None, bias: bool = True, *, verify: bool = True
    ) -> TunedLens:
        """An untrained lens of a causal LM.

        Args:
            model: see :class:`Unembed`.
            model_revision: recorded in the config.
            bias: whether the translators have one.
            verify: see :class:`Unembed`.
        """
        unembed = Unembed(model, verify=verify)
        config = TunedLensConfig(
            base_model_name_or_path=name_or_path(model),
            d_model=unembed.hidden_size,
            num_hidden_layers=len(get_transformer_layers(model)[1]),
            bias=bias,
            base_model_revision=model_revision,
        )
        return cls(unembed, config)

    @classmethod
    def from_model_and_pretrained(
        cls,
        model: Any,
        lens_resource_id: str | os.PathLike[str] | None = None,
        *,
        verify: bool = True,
        **kwargs: Any,
    ) -> TunedLens:
        """The saved lens of a causal LM: a tuned lens, or a Jacobian lens.

        Args:
            model: see :class:`Unembed`.
            lens_resource_id: a folder, a file or a lens on the hub; by default ``model.config.name_or_path``.
            verify: see :class:`Unembed`.
            kwargs: see :meth:`from_unembed_and_pretrained`.

        Raises:
            ValueError: the lens has another number of layers than the model, besides the errors of
                :meth:`from_unembed_and_pretrained`.
        """
        unembed = Unembed(model, verify=verify)
        if lens_resource_id is None:
            lens_resource_id = name_or_path(model)
        return cls.from_unembed_and_pretrained(unembed, lens_resource_id, **kwargs)

    @classmethod
    def from_unembed_and_pretrained(
        cls, unembed: Unembed, lens_resource_id: str | os.PathLike[str], **kwargs: Any
    ) -> TunedLens:
        """A saved lens, from the end of its model.

        Args:
            unembed: see :class:`Unembed`.
            lens_resource_id: a folder, a Jacobian lens's file, or either on the hub.
            kwargs: options of :func:`tuned_lens_fast.load_artifacts.load_lens_artifacts`. Those of ``torch.load`` are
                taken, and have no effect: no code of a checkpoint is run, and no more of it is read than the lens.

        Warns:
            UserWarning: the lens was made for a model with another unembedding (by its hash, or by the final
                norm and head stored with it). Its config keeps that model's hash.
            UserWarning: what :func:`tuned_lens_fast.artifacts.read_artifact` and
                :func:`tuned_lens_fast.jacobian_lens.read_jacobian_lens` warn of.

        Raises:
            TypeError: an unknown option.
            FileNotFoundError, PermissionError, ConnectionError: the lens is not there or cannot be fetched; see
                :func:`tuned_lens_fast.load_artifacts.load_lens_artifacts`.
            ValueError: a config or checkpoint that is damaged, is not plain tensors, does not fit, or is of a
                lens that ``h + (W h + b)`` does not express.
        """
        unknown = kwargs.keys() - _ARTIFACT_OPTIONS - _IGNORED_OPTIONS
        if unknown:
            raise TypeError(
                f"{', '.join(sorted(unknown))}: unknown option, wanted one of "
                f"{', '.join(sorted(_ARTIFACT_OPTIONS | _IGNORED_OPTIONS))}"
            )
        config_path, ckpt_path = load_artifacts.load_lens_artifacts(
            resource_id=lens_resource_id, **{k: v for k, v in kwargs.items() if k in _ARTIFACT_OPTIONS}
        )
        layers = getattr(unembed, "num_hidden_layers", None)
        sizes = {"d_model": _width(unembed), "layers": layers}
        if config_path == ckpt_path:
            artifact = read_jacobian_lens(Path(ckpt_path), **sizes)
        else:
            artifact = read_artifact(Path(config_path), Path(ckpt_path), unembed, **sizes)
        config = artifact.config
        lens = cls(unembed, config)
        others = [*artifact.differing]
        if config.unembed_hash and config.unembed_hash != lens.config.unembed_hash:
            others.append("unembedding")
        if others:
            warnings.warn(
                f"lens_resource_id: {quoted(os.fspath(lens_resource_id), 150)} was made for a model "
                f"({quoted(config.base_model_name_or_path)}) with another {' and '.join(dict.fromkeys(others))}; "
                "it may decode this one badly",
                stacklevel=3,
            )
            lens.config.unembed_hash = config.unembed_hash
        lens.layer_translators.load_state_dict(artifact.translators)
        return lens

    def save(self, path: str | os.PathLike[str], ckpt: str = "params.pt", config: str = "config.json") -> None:
        """Writes the lens to the folder ``path``: the translators (on the CPU) and the config. Of a lens that lacks
        layers the config says which it has; tuned-lens refuses such a lens by its missing entries.

        A ``ckpt`` that ends in ".safetensors" is written as one, which tuned-lens cannot read. Each file is
        written aside and renamed, so an interrupted save leaves none half-written.

        Raises:
            OSError: ``path`` cannot be written to.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.cpu() for name, tensor in self.layer_translators.state_dict().items()}
        text = json.dumps(self.config.to_dict(), indent=2)
        with atomic_write(folder / ckpt) as aside:
            if Path(ckpt).suffix == ".safetensors":
                # It takes no transposed tensors, and no layers that share one.
                save_file({name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}, aside)
            else:
                torch.save(state, aside)
        with atomic_write(folder / config) as aside:
            aside.write_text(text, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        resource_id: str | None = None,
        *,
        ckpt: str = "params.pt",
        config: str = "config.json",
        **options: Any,
    ) -> str:
        """Saves the lens to a repository of the hub, which is made if it does not exist.

        ``from_model_and_pretrained(model, resource_id, repo_id=repo_id, repo_type="model")`` loads it from there.

        Args:
            repo_id: "owner/name".
            resource_id: the lens's name in the repository; by default its model's.
            ckpt, config: as in :meth:`save`.
            options: of :func:`tuned_lens_fast.load_artifacts.push_lens_artifacts`, such as ``private``.

        Returns:
            The commit's address.

        Raises:
            ValueError: ``resource_id`` is missing, and the lens does not know its model's name.
        """
        resource_id = resource_id or self.config.base_model_name_or_path
        if not resource_id:
            raise ValueError("resource_id: the lens does not know its model's name; pass one")
        with TemporaryDirectory() as folder:
            self.save(folder, ckpt, config)
            return load_artifacts.push_lens_artifacts(folder, resource_id, repo_id, **options)

    @property
    def translated_layers(self) -> list[int] | None:
        """The layers that the lens has a translator for, in order; None for all."""
        return self.config.translated_layers

    def __getitem__(self, item: int) -> nn.Linear:
        found = self.layer_translators[item]
        if type(found) is nn.Module:
            raise IndexError(f"layer {item}: the lens has only {ranges(self.translated_layers or ())}")
        return cast(nn.Linear, found)

    def __iter__(self) -> Iterator[nn.Module]:
        return (
            iter(self.layer_translators)
            if self.translated_layers is None
            else map(self.__getitem__, self.translated_layers)
        )

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
            IndexError: ``idx`` is not in 0 to ``len(lens) - 1``, or the lens lacks that layer.
        """
        _check_layer("idx", idx, len(self))
        linear = self[idx]
        return Translator(linear.weight, linear.bias)


def _width(unembed: Unembed) -> int:
    """d_model; stand-ins for an Unembed have only what tuned-lens's has."""
    return getattr(unembed, "hidden_size", unembed.unembedding.weight.shape[-1])


def _check_layer(argument: str, layer: int, layers: int) -> None:
    if not 0 <= layer < layers:
        raise IndexError(f"{argument}: got layer {layer}, wanted 0 to {layers - 1}")
