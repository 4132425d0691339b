"Assignment: the same for ever and everywhere, even, independent, and a file that is wrong says where."
import json, os, subprocess, sys
from datetime import date, datetime, timezone
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from scipy.stats import chi2

from recsys.core.settings import RecsysError
from recsys.serving.assignment import (Experiment, Experiments, Exposures, PRIME, SLOTS, Salt, Variant, assign, book_of, read_experiments, salt_of, unit_hash, unit_hashes,
                                       variants_of, weights_of, word_of, words_of)

GOLDEN = Path(__file__).with_name("assignment.json") # made once; what is in it may never change
NOW = datetime(2026, 11, 20, tzinfo=timezone.utc).timestamp()

def experiment(name="x", variants=(1, 1), **changes):
    of = dict(owner="team", hypothesis="it is better", primary="ctr", minimum_effect=.02, ramp=((date(2026, 11, 1), 1.0),))
    return Experiment(name=name, variant=tuple(Variant(name=f"v{k}", weight=w) for k, w in enumerate(variants)), **of | changes)

def chosen(book, visitor=None, user=None, placement=None, segment=None, now=NOW): return {c.experiment.name: c.place for c in assign(book, visitor, user, placement, segment, now)}

# ---- for ever

GOLDEN_BOOK = Experiments(holdout=.05, experiment=(experiment("whole"), experiment("half", (1, 2, 1), layer="l", slots=(0, 500)), experiment("rest", layer="l", slots=(500, 1000), unit="user"),
                                                   experiment("ramp", layer="m", ramp=((date(2026, 11, 1), .25), (date(2027, 1, 1), 1.0)))))
GOLDEN_IDS = ["", "a", "visitor-1", "ÄÖ€", "𝄞", "\ud800", "x" * 256, *(f"user {k}" for k in range(40))]

def golden():
    book = book_of(GOLDEN_BOOK)
    return {i: [f"{unit_hash(i):016x}", f"{word_of(unit_hash(i), salt_of('x')):016x}", chosen(book, i, i)] for i in GOLDEN_IDS}

def test_who_sees_what_never_changes(): assert golden() == json.loads(GOLDEN.read_text())

def test_another_process_with_another_hash_seed_agrees():
    code = "import sys, json; sys.path.insert(0, 'tests'); from test_assignment import golden; print(json.dumps(golden()))"
    for seed in ("0", "12345"):
        out = subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parent.parent, env=os.environ | dict(PYTHONHASHSEED=seed), capture_output=True, text=True, check=True).stdout
        assert json.loads(out) == json.loads(GOLDEN.read_text())

# ---- one by one and many at once

@given(st.lists(st.text(max_size=30), min_size=1, max_size=20), st.lists(st.sampled_from([0, 1, 2.5, 7]), min_size=2, max_size=5).filter(lambda w: sum(x > 0 for x in w) > 1),
       st.integers(0, SLOTS - 1), st.integers(1, SLOTS), st.floats(0, 1), st.text("abc"))
@settings(max_examples=150, deadline=None)
def test_both_paths_agree(units, weights, low, width, share, salt):
    book = book_of(Experiments(experiment=(experiment("e", tuple(weights), slots=(low, min(SLOTS, low + width)), ramp=((date(2026, 11, 1), share),)),)))
    many = variants_of(book.experiments[0], unit_hashes(units), NOW).tolist()
    assert [chosen(book, u).get("e", -1) if u else many[k] for k, u in enumerate(units)] == many
    assert words_of(unit_hashes(units), salt_of(salt)).tolist() == [word_of(unit_hash(u), salt_of(salt)) for u in units]
    assert all(weights[v] > 0 for v in many if v >= 0)

@given(st.lists(st.integers(0, PRIME), min_size=1), st.integers(1, PRIME - 1), st.integers(0, PRIME - 1))
@example([0, PRIME, PRIME - 1, 1 << 32, (1 << 61) - (1 << 32)], PRIME - 1, PRIME - 1)
def test_halves_make_the_whole_product(bases, a, b): assert words_of(np.array(bases, np.uint64), Salt(a, b)).tolist() == [(x * a + b) % PRIME for x in bases]

@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_ramp_keeps_all_who_were_in(shares, seed):
    ramp = tuple((date(2026, 11, 1 + k), s) for k, s in enumerate(sorted(shares)))
    e, = book_of(Experiments(experiment=(experiment("r", (1, 1, 1), ramp=ramp),))).experiments
    bases, seen = unit_hashes(f"{seed}-{k}" for k in range(300)), np.full(300, -1)
    for k in range(len(ramp)):
        now = variants_of(e, bases, datetime(2026, 11, 1 + k, 12, tzinfo=timezone.utc).timestamp())
        assert (now[seen >= 0] == seen[seen >= 0]).all()
        seen = now

def test_slots_of_a_layer_exclude_each_other_and_leave_nobody_out():
    book = book_of(Experiments(experiment=tuple(experiment(f"e{k}", layer="l", slots=(a, b)) for k, (a, b) in enumerate([(0, 1), (1, 333), (333, 1000)]))))
    taken = [len(chosen(book, f"v{k}")) for k in range(5000)]
    assert set(taken) == {1}

def test_the_holdout_is_in_nothing_and_the_same_for_all():
    book = book_of(Experiments(holdout=.2, experiment=(experiment("a"), experiment("b", layer="m"))))
    taken = np.array([len(chosen(book, f"v{k}")) for k in range(5000)])
    assert set(taken) == {0, 2} and abs((taken == 0).mean() - .2) < .03

# ---- who takes part

def test_targets_do_not_move_anybody():
    free, aimed = (book_of(Experiments(experiment=(experiment("t", **k),))) for k in ({}, dict(placements=("cart", "home"), segments=("new",))))
    for k in range(200):
        v = f"v{k}"
        assert chosen(aimed, v, placement="cart", segment="new") == chosen(free, v)
        assert chosen(aimed, v, placement="product", segment="new") == chosen(aimed, v, placement="cart", segment="known") == chosen(aimed, v, placement="cart") == chosen(aimed, v, segment="new") == {}

def test_a_unit_that_is_not_told_takes_no_part():
    book = book_of(Experiments(experiment=(experiment("v"), experiment("u", layer="m", unit="user"))))
    assert set(chosen(book, "v")) == {"v"} and set(chosen(book, None, "u")) == {"u"} and chosen(book) == {} and set(chosen(book, "v", "u")) == {"u", "v"}
    assert len({chosen(book, f"v{k}", "the same")["u"] for k in range(50)}) == 1

def test_kill_switches():
    e = (experiment("a"), experiment("b", layer="m", on=False))
    assert set(chosen(book_of(Experiments(experiment=e)), "v")) == {"a"} and chosen(book_of(Experiments(on=False, experiment=e)), "v") == {}
    assert chosen(book_of(Experiments(experiment=e)), "v", now=datetime(2026, 10, 31, 23, 59, tzinfo=timezone.utc).timestamp()) == {}

def test_a_shadow_shows_the_control():
    e = experiment("s")
    e = msgspec.structs.replace(e, variant=(e.variant[0], Variant(name="dark", budget=50, shadow=True)))
    for k in range(50):
        c, = assign(book_of(Experiments(experiment=(e,))), f"v{k}", None, None, None, NOW)
        assert c.shown.name == "v0" and c.text == ("s:v0", "s:dark")[c.place]

@given(st.lists(st.integers(0, 30), max_size=300), st.integers(1, 50))
def test_exposures_come_once_while_they_are_remembered(units, most):
    c, = [assign(book_of(Experiments(experiment=(experiment(),))), "v", None, None, None, NOW)[0]]
    noted, last = Exposures(most), {}
    for at, u in enumerate(units):
        first, different = noted.first(c, str(u), None), len(set(units[last.get(u, -1) + 1:at]) - {u})
        if u not in last: assert first
        elif different < most: assert not first
        if first: last[u] = at
        assert len(noted.new) <= most and len(noted.old) <= most

# ---- even and independent: nightly, ten million ids

def fits(counts, expected):
    "p of chi-square."
    counts, expected = np.asarray(counts, float).ravel(), np.asarray(expected, float).ravel()
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)

@pytest.mark.parametrize("n", [200_000, pytest.param(10_000_000, marks=pytest.mark.bench)])
@pytest.mark.parametrize("style", ["{}", "visitor-{:012d}"])
def test_shares_are_even_and_layers_independent(n, style):
    bases = np.concatenate([unit_hashes(style.format(k) for k in range(a, min(n, a + 500_000))) for a in range(0, n, 500_000)])
    book = book_of(Experiments(experiment=(experiment("one", (1, 2, 3, 4)), experiment("two", (1, 1), layer="m", slots=(0, 700)), experiment("three", (5, 1, 1), layer="n", ramp=((date(2026, 1, 1), .3),)))))
    one, two, three = (variants_of(c, bases, NOW) for c in book.experiments)
    w1, w2, w3 = (np.array(weights_of(e)) for e in (book.experiments[k].choices[0].experiment for k in range(3)))
    w2, w3 = np.r_[.3, .7 * w2], np.r_[.7, .3 * w3]
    p = [fits(np.bincount(one, minlength=4), n * w1), fits(np.bincount(two + 1), n * w2), fits(np.bincount(three + 1), n * w3)]
    p += [fits(np.bincount(one * 3 + two + 1, minlength=12), n * np.outer(w1, w2)), fits(np.bincount(one * 4 + three + 1, minlength=16), n * np.outer(w1, w3)),
          fits(np.bincount((two + 1) * 4 + three + 1, minlength=12), n * np.outer(w2, w3))]
    p.append(fits(np.bincount((words_of(bases, book.salt) >> np.uint64(51)).astype(int), minlength=1024), np.full(1024, n / 1024)))
    assert min(p) > 1e-4, p

# ---- the file

GOOD = """
[[experiment]]
name = "a"
owner = "team"
hypothesis = "it is better"
primary = "ctr"
minimum_effect = 0.02
slots = [0, 500]
ramp = [[2026-11-02, 0.1], [2026-11-09, 1.0]]
variant = [{ name = "control" }, { name = "new", budget = 100 }]
"""

def said(tmp_path, text):
    (tmp_path/"e.toml").write_text(text, encoding="utf-8")
    with pytest.raises(RecsysError) as e: read_experiments(tmp_path/"e.toml")
    assert "\n" not in str(e.value) and e.value.where.endswith("e.toml") and e.value.todo
    return e.value.what

@pytest.mark.parametrize("old, new, what", [
    ('primary = "ctr"', 'primary = "clicks"', "'a', primary: Invalid enum value 'clicks'"), ("minimum_effect = 0.02", "minimum_effect = -1.0", "minimum_effect: Expected `float` > 0.0"),
    ('owner = "team"', "", "missing required field `owner`"), ("slots = [0, 500]", "slots = [500, 500]", "hold no unit"), ("slots = [0, 500]", "slots = [0, 1001]", "slots"),
    ("[[2026-11-02, 0.1], [2026-11-09, 1.0]]", "[]", "ramp"), ("1.0]]", "0.05]]", "ramp falls"), ("2026-11-09", "2026-11-01", "ramp falls"), ('{ name = "new", budget = 100 }', '{ name = "control" }', "same name"),
    ('name = "control"', 'name = "control", shadow = true', "control is a shadow"), ('name = "control"', 'name = "control", weight = 0', "fewer than two"), ("budget = 100", "budgets = 100", "unknown field 'budgets'"),
    ("slots = [0, 500]", "guardrails = { ctr = 0.1 }", "its own guardrail"), ("minimum_effect = 0.02", "minimum_effect = nan", "minimum_effect"), ('name = "a"', 'name = "a b"', "name"),
    ("1.0]]", "nan]]", "ramp"), ("\n[[experiment]]", "holdout = 1.0\n[[experiment]]", "holdout"), ("\n[[experiment]]", "= 1\n[[experiment]]", "not TOML")])
def test_a_wrong_file_says_where(tmp_path, old, new, what):
    assert old in GOOD and what.replace("`", "'") in said(tmp_path, GOOD.replace(old, new, 1))

def test_experiments_may_not_share_slots_or_names(tmp_path):
    other = GOOD.replace('name = "a"', 'name = "b"')
    assert "reserve the same slots" in said(tmp_path, GOOD + other) and "stands twice" in said(tmp_path, GOOD + GOOD)
    third = other.replace('"b"', '"c"').replace("slots", 'layer = "m"\nslots')
    assert "both change bundle" in said(tmp_path, GOOD + third) and "different units" in said(tmp_path, GOOD + other.replace("slots = [0, 500]", 'unit = "user"\nslots = [500, 1000]'))
    (tmp_path/"e.toml").write_text(GOOD + other.replace("[0, 500]", "[500, 1000]") + third.replace(", budget = 100", ""))
    assert [e.name for e in read_experiments(tmp_path/"e.toml").experiment] == ["a", "b", "c"]

def test_a_missing_file_and_one_that_is_no_text(tmp_path):
    with pytest.raises(RecsysError, match="no such experiment file"): read_experiments(tmp_path/"none.toml")
    (tmp_path/"e.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecsysError, match="not TOML"): read_experiments(tmp_path/"e.toml")
