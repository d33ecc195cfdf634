"""A question to an engine as PyTorch's operators take it: tensors, lists of them and plain values, one by one.

The schema is made from the fields of Norm, Head and Query, so that one more of them is one more argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, cast

from torch import Tensor

from tuned_lens_fast.engines.interface import Head, Norm, Query, Readout, Translator

#: The fields that operators take of each, in order. They take no norms that are modules.
_FIELDS = {
    kind: [field for field in fields(kind) if field.name not in ("module", "width")] for kind in (Norm, Head, Query)
}
#: Their types as a schema has them.
_TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "bool": "bool", "int": "int", "float": "float",
    "float | None": "float?", "frozenset[str]": "str[]", "NormKind": "str",
}  # fmt: skip
#: Of hidden states, a readout and a query. Lists hold the tensors that there are, since autograd passes over lists with
#: gaps; beside them stand the layers they are of.
SCHEMA = "Tensor[] hidden, Tensor[] weights, Tensor[] biases, int[] translated, int[] biased, " + ", ".join(
    f"{_TYPES[str(field.type)]} {kind.__name__.lower()}_{field.name}"
    for kind, names in _FIELDS.items()
    for field in names
)
#: Arguments of ``SCHEMA``.
COUNT = 5 + sum(map(len, _FIELDS.values()))


def flat(hidden: Sequence[Tensor], readout: Readout, query: Query) -> list[Any]:
    """The arguments of ``SCHEMA``."""
    parts = (readout.norm, readout.head, query)
    values = [getattr(part, field.name) for part in parts for field in _FIELDS[type(part)]]
    weights = {i: t.weight for i, t in enumerate(readout.translators) if t is not None}
    biases = {i: t.bias for i, t in enumerate(readout.translators) if t is not None and t.bias is not None}
    return [
        list(hidden),
        [*weights.values()],
        [*biases.values()],
        [*weights],
        [*biases],
        *(sorted(value) if isinstance(value, frozenset) else value for value in values),
    ]


def bundled(hidden: Any, weights: Any, biases: Any, translated: Any, biased: Any, *rest: Any) -> tuple[Any, ...]:
    """What :func:`flat` took apart: hidden states, readout and query; then the arguments behind them."""
    values = iter(rest)
    norm, head, query = (
        cast(Any, kind)(**{field.name: next(values) for field in names}) for kind, names in _FIELDS.items()
    )
    bias_of = dict(zip(biased, biases, strict=True))
    translator_of = {i: Translator(weight, bias_of.get(i)) for i, weight in zip(translated, weights, strict=True)}
    readout = Readout(tuple(map(translator_of.get, range(len(hidden)))), norm, head)
    return hidden, readout, replace(query, stats=frozenset(query.stats)), *values
