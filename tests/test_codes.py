"The table of codes: a dictionary on disk."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from recsys.core.codes import Codes, PARTS, write_codes
from recsys.core.settings import RecsysError

ids = st.text(st.characters(exclude_categories=()), max_size=12)   # surrogates and zeros as well: ids are opaque

@settings(max_examples=150, deadline=None)
@given(known=st.lists(ids, unique=True, max_size=60), asked=st.lists(ids, max_size=20))
def test_it_is_the_dictionary_that_it_stands_for(tmp_path_factory, known, asked):
    folder = tmp_path_factory.mktemp("codes")
    write_codes(folder, "c", known)
    codes, plain = Codes(folder, "c"), {v: k for k, v in enumerate(known)}
    assert dict(codes) == plain and len(codes) == len(plain)
    for i in known + asked: assert codes.get(i) == plain.get(i) and (i in codes) == (i in plain)
    for i in asked:
        if i not in plain:
            with pytest.raises(KeyError): codes[i]

def test_who_knows_some_of_the_ids_does_not_know_where_they_lie(tmp_path):
    "Nor does the night's file change when nothing else did."
    names = [f"v{k}" for k in range(200)]
    for name, ids in (("a", names), ("b", names), ("c", names + ["w"])): write_codes(tmp_path, name, ids)
    slots = {n: np.load(tmp_path/f"{n}_slots.npy") for n in "abc"}
    assert np.array_equal(slots["a"], slots["b"]) and (slots["a"] == slots["c"]).mean() < .8  # most are free in both

@pytest.mark.parametrize("part, harm", [("slots", lambda a: np.where(a == 2, 9, a)), ("slots", lambda a: a[:5]), ("slots", lambda a: np.abs(a)), ("ends", lambda a: a[::-1]), ("ends", lambda a: a[:-1]),
                                        ("text", lambda a: a[:-1]), ("text", lambda a: a.astype(np.int64)), ("slots", lambda a: a.astype(np.int64))])
def test_a_table_that_is_none_is_refused_in_one_line(tmp_path, part, harm):
    write_codes(tmp_path, "c", ["ann", "bob", "cyn"])
    np.save(tmp_path/f"c_{part}.npy", harm(np.load(tmp_path/f"c_{part}.npy")))
    with pytest.raises(RecsysError, match="is not a table of codes") as e: Codes(tmp_path, "c")
    assert "\n" not in str(e.value)

def test_what_is_missing_or_twice_is_said(tmp_path):
    with pytest.raises(RecsysError, match="cannot be read"): Codes(tmp_path, "c")
    with pytest.raises(RecsysError, match="comes twice"): write_codes(tmp_path, "c", ["a", "b", "a"])
    assert set(PARTS) == {"text", "ends", "slots", "key"}
