"Interleaving and bandits: fair drafts, odds that are the odds, estimates from adaptive logs."
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.experiments.interleaving import Bandit, best_odds, credit
from recsys.serving.assignment import team_draft

RANKING = st.lists(st.sampled_from("abcdefghij"), unique=True, max_size=10)

@given(RANKING, RANKING, st.integers(0, 12), st.text(max_size=5))
def test_a_draft_is_fair_and_complete(first, second, n, request_id):
    out = team_draft(first, second, n, request_id)
    items = [p.item for p in out]
    assert len(set(items)) == len(items) == min(n, len({*first, *second})) and set(items) <= {*first, *second}
    for k, p in enumerate(out):
        left = [i for i in (first, second)[p.team] if i not in items[:k]]
        assert p.item == left[0]                                   # its captain's best that is free
    if len(first) == len(second) == 10:
        for k in range(2, len(out) + 1, 2): assert sum(p.team for p in out[:k]) == k // 2
    assert out == team_draft(first, second, n, request_id)

@given(RANKING.filter(lambda l: len(l) > 2), RANKING.filter(lambda l: len(l) > 2), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_logged_odds_are_the_odds(first, second, seed):
    drafts = [team_draft(first, second, 4, f"{seed}-{k}") for k in range(400)]
    seen, said = Counter(), {}
    for d in drafts:
        for k, p in enumerate(d): seen[tuple(x.item for x in d[:k]), p.item] += 1; said.setdefault((tuple(x.item for x in d[:k]), p.item), set()).add(p.propensity)
    begun = Counter(above for (above, _), c in seen.items() for _ in range(c))
    for (above, item), c in seen.items():
        n = begun[above]
        assert len(said[above, item]) == 1 and abs(c / n - next(iter(said[above, item]))) < 4.5 * (.25 / n) ** .5 + 1e-9

def test_a_ranking_against_itself_is_itself_and_has_no_odds():
    out = team_draft(list("abcd"), list("abcd"), 4, "r")
    assert [p.item for p in out] == list("abcd") and {p.propensity for p in out} == {1.0}

def test_drafts_never_change(): assert "".join(f"{p.item}{p.team}" for p in team_draft(list("abcdef"), list("fedcba"), 6, "golden")) == GOLDEN
GOLDEN = "f1a0b0e1d1c0"

def test_credit_by_hand():
    lists = pl.DataFrame(dict(unit=[1, 1, 2, 3, 4], first=[0, 2, 1, 0, 3], second=[1, 2, 0, 2, 0]))
    said = credit(lists, 100)
    assert said.wins == (2, 1, 2) and said.units == 4 and np.isclose(said.value, np.mean([.5, -1, 1, -1])) and said.low <= said.value <= said.high
    assert credit(lists.with_columns(first=0, second=0), 100).p == 1.0
    with pytest.raises(RecsysError, match="no lists"): credit(lists.clear(), 100)

def test_a_person_counts_once_however_many_lists():
    few = pl.DataFrame(dict(unit=range(100), first=[0, 1] * 50, second=[1, 0] * 50))
    many = pl.concat([few, pl.DataFrame(dict(unit=[0] * 1000, first=[0] * 1000, second=[1] * 1000))])
    assert np.isclose(credit(many, 100).value, credit(few, 100).value)

@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 400)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_odds_are_those_of_drawing(counts):
    s, n = np.array([a for a, _ in counts]), np.array([a + b for a, b in counts])
    odds = best_odds(s, n)
    drawn = np.bincount(np.random.default_rng(0).beta(s + 1, n - s + 1, (40_000, len(s))).argmax(1), minlength=len(s)) / 40_000
    assert np.isclose(odds.sum(), 1) and np.abs(odds - drawn).max() < .02
    assert best_odds(s, n, floor=.1).min() >= .1 - 1e-12

def test_bad_counts_are_refused():
    for s, n, floor in (([5], [3], 0), ([1, 1], [2, 2], .6)):
        with pytest.raises(RecsysError): best_odds(s, n, floor=floor)

def test_the_log_of_a_bandit_is_unbiased_when_it_is_weighed():
    rates, mean, weighed = np.array([.2, .5]), [], []
    for s in range(200):
        b, rng, rows = Bandit(2, s, every=10), np.random.default_rng(1000 + s), []
        for _ in range(200):
            c = b.choose(); r = float(rng.random() < rates[c.arm]); b.learn(c.arm, r); rows.append((c.arm == 0) * r / c.propensity)
        weighed.append(np.mean(rows))
        assert b.trials[1] > b.trials[0] and np.isclose(b.odds.sum(), 1)
    assert abs(np.mean(weighed) - .2) < 4 * np.std(weighed) / 200 ** .5
