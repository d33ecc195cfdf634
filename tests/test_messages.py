"""Messages repeat what others wrote in a length that a person reads, and never as something that a terminal obeys."""

import json

from hypothesis import given
from hypothesis import strategies as st

from tuned_lens_fast.messages import json_text, listed, quoted, shortened

WILD = st.text(st.sampled_from("ab \n\r\x1b\x85\u2028\u202e\x7f\\\"'") | st.characters(), max_size=200)


@given(text=WILD, times=st.sampled_from([1, 1000]))
def test_whatever_the_text(text, times):
    text *= times
    assert len(quoted(text)) <= 62
    assert quoted(text).isprintable()
    assert len(shortened(text)) <= 301
    assert shortened(text).isprintable()
    assert json_text(text).isprintable()
    assert json.loads(json_text(text)) == text


def test_what_is_short_stays_as_it_is():
    for value in ("some/model", 5, None, True, [1, 2], {"a": 1}, "x" * 60):
        assert quoted(value) == repr(value)
    assert shortened(" two\n words ") == "two words"
    assert shortened("x" * 300) == "x" * 300
    assert json_text({"token": ["Ġthe", "é", 1.5, None]}) == '{"token": ["Ġthe", "é", 1.5, null]}'


def test_both_ends_of_what_is_long_are_seen():
    assert quoted("/home/" + "x" * 10**6 + "/lens", 20) == "'/home/xxxxxxx...ens'"
    assert shortened("x" * 10**6, 9) == "x" * 9 + "…"


def test_lists_say_how_many_more_there_are():
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(range(1000), 2) == "0, 1 and 998 more"
    assert listed([]) == "nothing"


def test_a_value_nested_deeply_or_wide():
    deep = []
    for _ in range(10**5):
        deep = [deep]
    wide = {str(i): [{}] * 1000 for i in range(1000)}
    assert quoted(deep) == "[[[...]]]"
    assert len(quoted(wide)) <= 62
