"Counts that fade: against the sum over all events, in any order, over any time."
import numpy as np, pytest
from hypothesis import given, strategies as st
from types import SimpleNamespace

from recsys.candidates.trending import DOUBT, LONG, SHORT, surplus
from recsys.serving.freshness import FAR, Counters, demand, joined, rising

HOUR = 3600.
blocks = st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(-300, 3000)), max_size=8), max_size=12) # item, half-life quarters

def arrays(events): return np.array([i for i, _ in events], np.int32), np.array([q * HOUR / 4 for _, q in events], np.float64)

def plain(events, moment): return np.bincount(arrays(events)[0], weights=.5 ** ((moment - arrays(events)[1]) / HOUR), minlength=5) if events else np.zeros(5)

@given(blocks, st.integers(0, 400))
def test_the_counts_are_the_faded_sum_whatever_comes_when(found, later):
    "Up to what is older than FAR half-lives, which is nothing: 2**-FAR of an event."
    counters, every = Counters(5, HOUR, 0.), [e for b in found for e in b]
    for b in found: counters.add(*arrays(b))
    moment = max([q for _, q in every], default=0) * HOUR / 4 + later * HOUR / 4
    np.testing.assert_allclose(counters.at(moment), plain(every, moment), rtol=1e-9, atol=1e-12)
    assert np.isfinite(counters.weight).all()

@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 100)), max_size=30), st.randoms(use_true_random=False))
def test_late_events_count_by_their_own_time(events, rng):
    a, b = Counters(5, HOUR, 0.), Counters(5, HOUR, 0.)
    for e in sorted(events, key=lambda e: e[1]): a.add(*arrays([e]))
    rng.shuffle(events)
    for e in events: b.add(*arrays([e]))
    np.testing.assert_allclose(a.at(25 * HOUR), b.at(25 * HOUR), rtol=1e-9, atol=1e-12)

def test_years_do_not_overflow():
    counters = Counters(2, HOUR, 0.)
    for day in range(0, 20_000, 10): counters.add(np.array([0, 0], np.int32), np.array([day * 86400., day * 86400. + 60]))
    assert np.isfinite(counters.weight).all() and counters.at(19_990 * 86400. + 60)[0] == pytest.approx(1 + .5 ** (1 / 60))
    assert counters.weight.max() < 2. ** (FAR + 2)

def test_an_item_without_room_is_an_error():
    with pytest.raises(IndexError): Counters(3, HOUR, 0.).add(np.array([3]), np.array([0.]))

def test_only_demand_for_known_items_counts():
    e = lambda kind, item, ts: (0, SimpleNamespace(event_type=kind, item_id=item, ts=ts))
    item, ts = demand([e("purchase", "a", 1.), e("view", "a", 2.), e("add_to_cart", "b", 3.), e("purchase", "x", 4.), e("search", None, 5.), e("remove_from_cart", "a", 6.)], dict(a=0, b=1))
    assert item.tolist() == [0, 1] and item.dtype == np.int32 and ts.tolist() == [1, 3]
    assert [len(a) for a in demand([], {})] == [0, 0]

def test_the_formula_is_the_nightly_one():
    rng = np.random.default_rng(0)
    item, ts = rng.integers(0, 9, 3000), np.sort(rng.uniform(0, 30 * 86400., 3000))
    item[-40:] = 4
    counts = [Counters(9, h * 86400., 0.) for h in (SHORT, LONG)]
    for c in counts: c.add(item, ts)
    moment = 30 * 86400.
    now, usual = (c.at(moment) for c in counts)
    wanted = surplus(item, ts, 9, moment)
    expected = usual * now.sum() / usual.sum()
    np.testing.assert_allclose((now - expected) / np.sqrt(expected + DOUBT), wanted)
    best = rising(now, usual, 9)
    assert best.tolist() == [i for i in np.argsort(-wanted, kind="stable") if wanted[i] >= 2] and best[0] == 4

@pytest.mark.parametrize("now, usual, wanted", [([0., 0, 0], [1., 1], []), ([10., 0, 0], [0., 0], [0]), ([10., 10, 9], [100., 100], [2]), ([1., 1, 1], [5., 1], []), ([100., 100, 0], [100., 100], [])])
def test_what_is_usual_or_new_or_too_little(now, usual, wanted): assert rising(np.array(now), np.array(usual), 5).tolist() == wanted

def test_the_list_is_cut():
    usual, now = np.ones(100), np.r_[np.arange(10, 20, 1.) * 9, np.zeros(90)]
    assert rising(now, usual, 3).tolist() == [9, 8, 7]

@given(st.lists(st.integers(-1, 9), max_size=8), st.lists(st.integers(-1, 9), max_size=8), st.integers(1, 12))
def test_lists_are_joined_without_repetition(a, b, n):
    found = joined(np.array(a, np.int32), np.array(b, np.int32), n)
    wanted = []
    for c in a + b:
        if c >= 0 and c not in wanted: wanted.append(c)
    assert found.dtype == np.int32 and found.tolist() == (wanted + [-1] * n)[:n]
