"""The list of statistics, and those who have to agree with it: LensStats and the README's table."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tuned_lens_fast.engines.interface import Head, Query
from tuned_lens_fast.engines.statistics import (
    DIVERGENCES,
    LSE,
    OF_TOKENS,
    STATISTICS,
    asked,
    by_two_passes,
    divergences,
)
from tuned_lens_fast.stats import LensStats

EVERYTHING = Query(frozenset(STATISTICS), watch=torch.tensor([1, 2]), top_k=3)


def test_lens_stats_has_a_field_for_each():
    assert {field.name for field in fields(LensStats)} == {s.name for s in asked(EVERYTHING)} | {
        "layers",
        "targets",
        "watch",
    }


def test_the_readme_says_of_each_what_the_list_says():
    table = dict(re.findall(r"^\| `([a-z_`, ]+)` \| (.*) \|$", Path("README.md").read_text(), re.MULTILINE))
    said = {name: text for names, text in table.items() for name in names.replace("`", "").split(", ")}
    for statistic in asked(EVERYTHING):
        assert statistic.name in said
        if statistic not in OF_TOKENS:
            assert said[statistic.name].replace("\\|", "|").startswith(statistic.meaning), statistic.name


def test_each_has_a_formula_or_a_term():
    for statistic in (LSE, *STATISTICS.values(), *OF_TOKENS):
        made_of_both = statistic.needs == "reference"
        assert (statistic.term is not None) == made_of_both
        assert (statistic.formula is not None) == (not made_of_both and statistic.name != "watch_log_probs")


def test_what_is_asked_for_in_order():
    assert [s.name for s in asked(Query(frozenset({"rank", "entropy"}), top_k=2))] == [
        "lse", "rank", "entropy", "top_ids", "top_log_probs",
    ]  # fmt: skip
    assert divergences(Query(frozenset({"tv", "kl", "rank"}))) == ("kl", "tv")
    assert divergences(EVERYTHING) == DIVERGENCES


@pytest.mark.parametrize(("softcap", "two_passes"), [(None, ("js", "tv")), (30.0, ("kl", "js", "tv"))])
def test_kl_needs_a_second_pass_only_where_logits_are_not_linear(softcap, two_passes):
    query = Query(frozenset({"kl", "js", "tv", "entropy"}))
    assert by_two_passes(query, Head(torch.empty(2, 2), softcap=softcap)) == two_passes
