"""Every model type of transformers against a lens of it, and the table in the docs that says so."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from all_models import DECODERS, OTHERS, UNBUILT, build
from coverage_table import LEFT, LONG, TRANSFORMERS, survey, table

from tuned_lens_fast import residual_stream

pytestmark = pytest.mark.slow  # every model type of transformers

TABLE = Path(__file__).parent.parent / "docs" / "models.md"
KNOWN = set(re.findall(r"^\| ([\w-]+) \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE))
#: What no lens gives, and the reason by which it is refused.
REFUSED = {
    "dory": "gives other logits than its weight and bias",
    **dict.fromkeys(
        ("inkling2_loop_text", "inkling2_text", "reformer", "xlm"), "depend on more than its last block's output"
    ),
}
#: Their blocks run several times in a pass.
LOOPED = {"hrm_text"}
#: transformers' own list is shifted (mamba) or rescaled (rwkv) here, or has another form.
UNLIKE_TRANSFORMERS = {
    "blt", "deepseek_v4", "falcon_mamba", "gemma3n_text", "hy_v4", "mamba", "mamba2", "rwkv",
}  # fmt: skip


@pytest.mark.parametrize("model_type", [t for t in DECODERS if t in KNOWN])  # a newer transformers has more
def test_logits_of_random_hidden_states(model_type):
    row = survey(model_type)
    if model_type in REFUSED:
        assert REFUSED[model_type] in row.refused
        return
    assert row.refused is None
    assert row.error <= 1e-4
    if model_type in LOOPED:
        assert "has no one state to read" in row.no_stream
        return
    assert row.no_stream is None
    assert row.stream_error <= 1e-4
    assert row.unlike_transformers == (model_type in UNLIKE_TRANSFORMERS)
    padded_alike(model_type, row)


def padded_alike(model_type, row):
    """Where padding on the left is taken, the layers' states are those of the prompt alone."""
    if row.misread is not None:
        assert re.search("padding on the left", row.misread)
        return
    model, pad = build(model_type), 4
    alone = residual_stream(model, LONG[:1, pad:])
    padded = residual_stream(model, LONG[:1], attention_mask=LEFT[:1])
    for ours, wanted in zip(padded, alone, strict=True):
        torch.testing.assert_close(ours[:, pad:], wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("model_type", sorted((OTHERS & KNOWN) - UNBUILT.keys()))
def test_other_types_are_read_or_refused(model_type):
    row = survey(model_type)
    assert row.error <= 1e-4
    assert (row.refused is not None) == (model_type in {"prophetnet", "xlnet", "xmod"})


@pytest.mark.skipif(
    not transformers.__version__.startswith(f"{TRANSFORMERS}."), reason=f"the table is of transformers {TRANSFORMERS}"
)
def test_the_table_in_the_docs_is_current():
    assert TABLE.read_text(encoding="utf-8") == table(), "python tests/coverage_table.py > docs/models.md"
    assert len(DECODERS) >= 162
    assert [t for t in DECODERS if survey(t).refused is not None] == sorted(REFUSED)
