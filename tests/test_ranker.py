"The ranker: what its labels are worth, what its weights undo, what its probabilities mean, and that it is the same ranker twice."
from datetime import datetime, timedelta, timezone
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings, strategies as st

from recsys.candidates.build import build_candidates
from recsys.core.files import read_json
from recsys.core.settings import RecsysError, load_settings
from recsys.data.events import conform
from recsys.data.ingest import ingest
from recsys.data.outcomes import outcome_minutes, outcomes, write_outcomes
from recsys.data.simulator import simulate
from recsys.evaluation.protocol import evaluate_run, judge_chances
from recsys.features.build import build_features, day_of, read_moments, shown_lists
from recsys.features.definitions import NAMES
from recsys.ranking.calibration import (CURVES, KNOTS, ece, fit_calibration, fit_isotonic, fit_platt, load_calibration, log_loss, platt_curve,
                                        probability_of, reliability, save_calibration)
from recsys.ranking.position import fit_propensities, ips_weights, list_per_outcome, list_rows
from recsys.ranking.ranker import FIRST, MOST_LEVELS, POSITION, as_served, fit_both, held_out, labels_of, levels_of, load_ranker, save_ranker
from recsys.ranking.rows import PRICE, Cases, Rows, candidate_rows, make_cases, training_rows, work_for, worth
from recsys.ranking.train import calibrate, cases_after, learnable, train_ranker, with_outcome
from recsys.serving.bundle import open_bundle, verify_bundle
from recsys.serving.engine import Engine, Request, recommend
from shop import ROOT, recsys, settings_text
from test_serving import BUDGET, N_ITEMS, N_USERS, PER_SOURCE, publish, tables

HOW = dict(leaves=7, learning_rate=.1, min_rows_in_leaf=20, cutoff=5, seed=3, threads=1)
trees_of = lambda b: b.model_to_string().split("\nparameters:")[0]

def lists(cases: int, seed: int, gain, length: int = 12, **more) -> Rows:
    "Random rows of which `gain(x, rng)` says what each is worth."
    rng = np.random.default_rng(seed); n = cases * length
    x = rng.random((n, len(NAMES))).astype(np.float32)
    g = gain(x, rng).astype(np.float32)
    return Rows(x, (g > 0).astype(np.uint8), np.full(cases, length, np.int32), np.arange(n, dtype=np.int32), np.arange(cases, dtype=np.int32), g, **more)

def taste(x, rng): return (x[:, 40] + rng.normal(0, .3, len(x)) > 1.1) * 1.0

def test_a_case_without_anything_wanted_counts_as_nothing_in_the_curve():
    "LightGBM gives it 1."
    half = lambda x, rng: taste(x, rng) * (np.arange(len(x)) // 12 % 2)  # lists of twelve, every second one without
    valid = lists(40, 1, half)
    fit, place = fit_both([lists(60, 0, taste)], valid, 8, 8, 10, **HOW), 1 / np.log2(np.arange(2, 7))
    def ndcg(gain, score):
        got = gain[np.argsort(-score, kind="stable")][:5]
        return (got * place[:len(got)]).sum() / (np.sort(gain)[::-1][:5] * place).sum() if gain.any() else 0.
    n = fit.first.best_iteration  # of those that come later LightGBM keeps the curve, not the trees
    score, at = fit.first.predict(valid.x), np.arange(0, len(valid.x), 12)
    wanted = np.mean([ndcg(valid.gain[a:a + 12], score[a:a + 12]) for a in at])
    assert fit.curve[-1][0] == 8 and fit.curve[n - 1] == (n, pytest.approx(wanted, abs=1e-6)) and .1 < wanted < .4

# ---- what outcomes are worth

@given(st.lists(st.sampled_from([0., 1., 3., 10.]), min_size=1, max_size=50).map(lambda v: np.array(v, np.float32)))
def test_few_gains_are_kept_exactly(gain):
    assume(gain.any())
    levels = levels_of(gain)
    assert np.array_equal(np.append(0, levels)[labels_of(gain, levels)], gain)

@given(st.lists(st.floats(.015625, 1e4, width=32), min_size=100, max_size=200, unique=True).map(lambda v: np.array(v, np.float32)))
def test_many_gains_keep_their_order_and_nearly_their_size(gain):
    levels = levels_of(gain); labels = labels_of(gain, levels)
    assert len(levels) == MOST_LEVELS and labels.min() >= 1 and labels.max() <= MOST_LEVELS
    assert (np.diff(labels[np.argsort(gain)]) >= 0).all()
    half_step = (gain.max() / gain.min()) ** (.5 / (MOST_LEVELS - 1))
    assert (np.abs(np.log(levels[labels - 1] / gain)) <= np.log(half_step) + 1e-5).all()

@pytest.mark.parametrize("click,purchase", [(1, 10), (10, 1)])
def test_gains_decide_what_comes_first(click, purchase):
    "Each list has one item of a kind that is clicked and one of a kind that is bought: only the gains say which is better."
    def gain(x, rng):
        kind = np.tile(np.arange(12), len(x) // 12)
        x[:, 0], x[:, 1] = kind == 3, kind == 7
        return np.where(kind == 3, click, np.where(kind == 7, purchase, 0))
    fit = fit_both([lists(60, 0, gain)], lists(40, 1, gain), 20, 20, 10, **HOW)
    row = np.full((3, len(NAMES)), .5, np.float32); row[:, :2] = [[1, 0], [0, 1], [0, 0]]
    clicked, bought, neither = fit.booster.predict(row)
    assert (bought > clicked) == (purchase > click) and neither < min(bought, clicked)

def test_a_share_of_the_gain_follows_the_price():
    state = tables(); state.item_x[:, PRICE] = np.arange(N_ITEMS); items = np.array([0, 10, 30, 50])
    typical = np.median(np.arange(1, N_ITEMS))
    np.testing.assert_allclose(worth(state, items, np.ones(4), 0.), 1)
    np.testing.assert_allclose(worth(state, items, np.full(4, 2.), 1.), [2, 20 / typical, 60 / typical, 100 / typical], rtol=1e-6)
    np.testing.assert_allclose(worth(state, items, np.ones(4), .25)[1], .75 + .25 * 10 / typical, rtol=1e-6)
    state.item_x[:, PRICE] = -1
    np.testing.assert_allclose(worth(state, items, np.ones(4), 1.), 1)

def test_the_target_event_must_be_worth_something(tmp_path):
    text = (Path(__file__).parent.parent/"settings.ini").read_text().replace("purchase:10\n", "purchase:0\n")
    (tmp_path/"settings.ini").write_text(text)
    with pytest.raises(RecsysError, match="gains gives nothing for the target event 'purchase'"): load_settings(tmp_path/"settings.ini")

GAINS = dict(click=1., add_to_cart=3., purchase=10.)
events = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from(["view", *GAINS]), st.integers(0, 200)), min_size=1, max_size=60)

def log_of(rows) -> pl.DataFrame:
    "Lines whose sessions are 20 long, numbered by user and time."
    df = pl.DataFrame(rows, schema=["user", "item", "type", "ts"], orient="row").with_columns(known="ts", visit=pl.col("ts") // 20)
    df = df.unique(["user", "item", "type", "visit"], keep="first", maintain_order=True).sort("user", "visit", "ts", "item", "type")
    return df.with_columns(session=pl.struct("user", "visit").rle_id())

@settings(max_examples=150)
@given(events)
def test_cases_are_those_of_plain_loops(rows):
    lines = log_of(rows); got, want = cases_after(lines, 100, 180, 7, GAINS), {}
    for user in range(4):
        mine = [r for r in lines.iter_rows(named=True) if r["user"] == user and r["type"] in GAINS]
        then = [r for r in mine if 100 <= r["ts"] < 180]
        if not then or not any(r["known"] < 100 for r in mine): continue
        sessions = sorted({r["session"] for r in then if r["type"] == "purchase"}) or sorted({r["session"] for r in then})
        best = {}
        for r in then:
            if r["session"] == sessions[0]: best.setdefault(r["item"], set()).add(r["type"])
        want[user] = {i: (max(GAINS[t] for t in types), "purchase" in types) for i, types in best.items()}
    found = {}
    for c, user in enumerate(got.user):
        of = slice(got.target_ptr[c], got.target_ptr[c + 1]); cart = set(got.cart[got.cart_ptr[c]:got.cart_ptr[c + 1]].tolist())
        has = {i: (g, b) for i, g, b in zip(got.target[of].tolist(), got.gain[of].tolist(), got.bought[of].tolist())}
        if not got.completing[c]: found[int(user)] = has
        else:
            bought = {i for i, (_, b) in want[user].items() if b}
            assert cart and cart < bought and has == {i: v for i, v in want[user].items() if i not in cart} and len(cart) == len(bought) // 2
    assert found == want

@settings(max_examples=60)
@given(events)
def test_a_log_of_purchases_gives_the_cases_of_before(rows):
    "With purchases only, gains change nothing: same users, carts and targets, each bought, labels 0 and 1."
    lines = log_of([(u, i, "purchase", t) for u, i, _, t in rows])
    plain, told = cases_after(lines.drop("type"), 100, 180, 7), cases_after(lines, 100, 180, 7, GAINS)
    for name in ("user", "cart_ptr", "cart", "target_ptr", "target", "completing", "bought"): np.testing.assert_array_equal(getattr(plain, name), getattr(told, name))
    assert (told.gain == 10).all() and told.bought.all() and (plain.gain == 1).all()

def test_training_rows_carry_gain_and_purchase():
    state = tables(); work, nobody = work_for(state, PER_SOURCE, BUDGET), np.zeros(0, np.int32)
    n = candidate_rows(state, work, 3, nobody, nobody); ids = work.ids[:n].copy()
    cases = make_cases(np.array([3]), [ids[[4, 2]]], 0, [(ids[[7, 0]], np.array([3., 1.]))], 10.)
    rows = training_rows(state, cases, PER_SOURCE, BUDGET, None, 0)
    first = slice(0, rows.size[0])
    gain = dict(zip(rows.ids[first].tolist(), rows.gain[first].tolist()))
    assert {i: g for i, g in gain.items() if g} == {ids[4]: 10, ids[2]: 10, ids[7]: 3, ids[0]: 1}
    assert set(rows.ids[first][rows.bought[first] > 0].tolist()) == {ids[4], ids[2]}
    few = training_rows(state, cases, PER_SOURCE, BUDGET, 5, 0)
    assert few.size[0] == 4 + 5 and few.gain[:9].sum() == 24

def test_the_scale_of_the_gains_does_not_matter():
    one, ten = (fit_both([lists(40, 0, lambda x, rng: g * taste(x, rng))], lists(30, 1, lambda x, rng: g * taste(x, rng)), 15, 15, 10, **HOW).booster for g in (1, 10))
    assert trees_of(one) == trees_of(ten)

# ---- position

def test_weights_by_hand():
    rows = lists(2, 0, lambda x, rng: np.array([0, 1, 0, 10, 0, 0, 0, 0]), length=4)
    found = list_per_outcome(rows, np.array([1, .5, .25, .05, 1, 1, 1, 1]), limit=10)
    assert found.size.tolist() == [3, 3] and found.ids.tolist() == [1, 0, 2, 3, 0, 2]  # the second list taught nothing
    raw = np.array([1 / .5, 10 * 10])  # the purchase at a place of which one in 20 is seen counts as 10, not 20
    np.testing.assert_allclose(found.weight, np.repeat(raw / raw.mean(), 3), rtol=1e-6)
    assert found.gain.tolist() == [1, 0, 0, 10, 0, 0] and found.position is None
    np.testing.assert_allclose(ips_weights(np.array([1, .5, .01, np.nan, 0]), 20), [1, 2, 20, 1, 20])

def clicks(n: int, seed: int, placements: int = 1, length: int = 6, noise: float = 1., liked: float = .5):
    "Lists sorted by x[:, 0] and noise, as the old ranker did; the place p of placement k is looked at with chance p**-(k + 1)."
    rng = np.random.default_rng(seed)
    placement = np.repeat(rng.integers(0, placements, n), length)
    x = np.zeros((n * length, len(NAMES)), np.float32); x[:, :4] = rng.normal(0, 1, (len(x), 4))
    order = (np.argsort(-(x[:, 0] + rng.normal(0, noise, len(x))).reshape(n, length), 1) + np.arange(n)[:, None] * length).ravel()
    x = x[order]; position = np.tile(np.arange(1, length + 1), n)
    wanted = 1 / (1 + np.exp(1 - 1.5 * x[:, 1] - liked * x[:, 0]))
    return x, placement, position, rng.random(len(x)) < wanted * position ** -(placement + 1.), np.repeat(np.arange(n), length), wanted

def test_propensities_find_the_truth_better_than_click_rates():
    x, placement, position, clicked, case, _ = clicks(8000, 0, placements=2)
    found = fit_propensities(x, case, placement, position, clicked, seed=1)
    assert found.shape == (2, 6) and (found[:, 0] == 1).all() and (found <= 1).all()
    truth = np.arange(1., 7) ** -np.array([[1.], [2.]])
    rate = np.array([[clicked[(placement == k) & (position == p)].mean() for p in range(1, 7)] for k in (0, 1)])
    off = lambda v: np.abs(np.log(v / truth))[:, 1:].mean()
    assert off(found) < .12 < off(rate / rate[:, :1])
    np.testing.assert_array_equal(found, fit_propensities(x, case, placement, position, clicked, seed=1))

def test_places_that_were_never_shown_are_unknown():
    x, placement, position, clicked, case, _ = clicks(1500, 1)
    far = position != 4
    found = fit_propensities(x[far], case[far], placement[far], position[far], clicked[far])
    assert np.isnan(found[0, 3]) and not np.isnan(np.delete(found[0], 3)).any()
    with pytest.raises(RecsysError, match="nothing was clicked on the first place"): fit_propensities(x, case, placement, position, clicked & (position > 1))

@pytest.mark.parametrize("bias", ["feature", "propensity"])
def test_a_ranker_that_knows_of_positions_orders_better_by_the_truth(bias):
    s = load_settings(); r = s.ranker.__class__(**{f: getattr(s.ranker, f) for f in s.ranker.__struct_fields__} | dict(position_bias=bias))
    s = s.__class__(**{f: getattr(s, f) for f in s.__struct_fields__} | dict(ranker=r))
    def rows(n, seed):
        x, placement, position, clicked, case, wanted = clicks(n, seed, noise=.5, liked=.2)
        return Rows(x, clicked.astype(np.uint8), np.full(n, 6, np.int32), np.arange(len(x)), np.arange(n), clicked.astype(np.float32), position.astype(np.int32)), placement, wanted
    (train, place, _), (valid, _, really), (test, _, wanted) = rows(2500, 0), rows(150, 1), rows(1500, 2)
    fair = (np.random.default_rng(3).random(len(really)) < really).astype(np.float32)  # like cases, which come from no list
    valid = valid._replace(position=None, bought=fair.astype(np.uint8), gain=fair)
    naive = fit_both([train._replace(position=None)], valid, 60, 60, 10, **HOW).booster
    made, chance = learnable([(train, place)], s)
    better = fit_both(made, valid, 60, 60, 10, **HOW).booster
    assert (bias == "feature") == (chance is None) == (better.feature_name() == [*NAMES, POSITION])
    def top(b):
        "How much is wanted of the first three of each list, of the most that could be."
        score = b.predict(as_served(b, test.x)).reshape(-1, 6); w = wanted.reshape(-1, 6)
        return np.take_along_axis(w, np.argsort(-score, 1)[:, :3], 1).sum(1) / np.sort(w, 1)[:, 3:].sum(1)
    gain = top(better) - top(naive)
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain))

def test_the_position_is_the_same_for_all_at_serving(tmp_path):
    "A ranker that saw positions is served with the first: whatever they were, and through a file."
    rows = lists(80, 0, taste, position=np.tile(np.arange(1, 13, dtype=np.int32), 80))
    booster = load_ranker(save_ranker(fit_both([rows], lists(40, 1, taste), 20, 20, 10, **HOW).booster, tmp_path/"r.txt"))
    x = as_served(booster, rows.x)
    assert x.shape == (960, len(NAMES) + 1) and (x[:, -1] == FIRST).all() and np.array_equal(x[:, :-1], rows.x)
    plain = fit_both([rows._replace(position=None)], lists(40, 1, taste), 20, 20, 10, **HOW).booster
    assert as_served(plain, rows.x) is rows.x

def test_lists_where_nothing_happened_teach_nothing():
    rows = lists(3, 0, lambda x, rng: np.array([0, 0, 0, 5, 0, 0]), length=2, position=np.array([1, 2] * 3, np.int32))
    kept = with_outcome(rows)
    assert kept.size.tolist() == [2] and kept.ids.tolist() == [2, 3] and kept.gain.tolist() == [0, 5] and kept.position.tolist() == [1, 2]

def test_shown_lists_are_what_was_shown():
    at = lambda m: datetime(2024, 1, 1, tzinfo=timezone.utc) + timedelta(minutes=m)
    def event(kind, m, item, request="r1", position=None, who="v1", placement="home", **more):
        return dict(event_id=f"{kind}{m}{item}{request}", event_type=kind, ts=at(m), visitor_id=who, session_id="s", item_id=item, request_id=request, position=position, placement=placement, consent=True) | more
    log = [event("impression", 0, "a", position=1), event("impression", 0, "b", position=2), event("impression", 0, "a", position=3), event("click", 5, "b"),
           event("purchase", 20, "b"), event("impression", 60, "a", "r2", 1, "nobody", "cart"), event("click", 95, "a", "r2", who="nobody"),
           event("impression", 61, "c", None, 1), event("impression", 62, "a", "r3"), event("impression", 63, "no such", "r5", 1)]
    said = outcomes(conform(pl.DataFrame(log, infer_schema_length=None)).lazy(), dict(click=30, purchase=60))
    found = shown_lists(said, pl.Series(["a", "b", "c"]), pl.Series(["v0", "v1"]), ["click", "purchase"])
    assert found.drop("ts", "known").rows() == [(0, 1, 0, 1, 1, 0, 0), (0, 1, 1, 1, 2, 1, 1), (1, -1, 0, 0, 1, 0, 0)]  # list user item placement position click purchase
    start = int(at(0).timestamp())
    assert found["ts"].to_list() == [start, start, start + 3600]
    assert found["known"].to_list() == [start + 3600, start + 1200, start + 7200]  # nothing more can happen; the purchase was known; nothing more can happen

def test_rows_of_lists_are_the_candidates_rows():
    state, nobody = tables(), np.zeros(0, np.int32)
    work = work_for(state, PER_SOURCE, BUDGET); n = candidate_rows(state, work, 5, nobody, nobody)
    ids, x = work.ids[:n].copy(), work.x[:n].copy()
    strangers = np.setdiff1d(np.arange(N_ITEMS), ids)[:2]
    items = np.append(ids[[3, 1]], strangers)
    shown = pl.DataFrame(dict(list=[4] * 4 + [9], user=[5] * 4 + [-1], item=[*items.tolist(), 0], placement=[2] * 4 + [0], position=[1, 2, 3, 4, 1], click=[1, 1, 0, 0, 0], purchase=[0, 1, 0, 0, 0]))
    rows, placement = list_rows(state, shown, PER_SOURCE, BUDGET, dict(click=1., purchase=10., add_to_cart=3.), 0., 10, 0)
    np.testing.assert_array_equal(rows.x[:2], x[[3, 1]])
    ranks = [NAMES.index(f) for f in NAMES if f.startswith("rank_")]
    assert (rows.x[2:4][:, ranks] == 999).all() and rows.gain.tolist() == [1, 10, 0, 0, 0] and rows.position.tolist() == [1, 2, 3, 4, 1]
    assert rows.size.tolist() == [4, 1] and placement.tolist() == [2, 2, 2, 2, 0]
    one, _ = list_rows(state, shown, PER_SOURCE, BUDGET, dict(click=1.), 0., 1, 0)
    assert len(one.size) == 1
    again = work_for(state, PER_SOURCE, BUDGET)
    for name, field in again.scratch._asdict().items(): assert name in ("code", "key", "best", "heard") or not field.any()

# ---- probabilities

samples = st.integers(0, 10_000).flatmap(lambda seed: st.tuples(st.just(seed), st.integers(200, 2000), st.floats(-3, 3), st.floats(-4, 0)))

def drawn(seed, n, slope, level):
    rng = np.random.default_rng(seed); score = rng.normal(0, 1, n).round(rng.integers(1, 8))  # ties, sometimes many
    bought = rng.random(n) < 1 / (1 + np.exp(-(slope * score + level)))
    bought[:2] = True, False
    return score, bought

@settings(max_examples=80)
@given(samples)
def test_curves_never_fall(sample):
    "Even where purchases become rarer with the score: then the curve is flat, and the order stays."
    score, bought = drawn(*sample)
    for fit in CURVES.values():
        curve = fit(score, bought)
        assert curve.shape == (2, KNOTS) and (np.diff(curve[0]) >= 0).all() and (np.diff(curve[1]) >= 0).all()
        p = probability_of(curve, np.sort(np.append(score, [-1e9, 1e9])))
        assert (np.diff(p) >= 0).all() and p.min() >= 0 and p.max() <= 1

def test_a_curve_grows_where_scores_are_equal_and_where_purchases_stand_apart():
    "Means of equal scores differ in the last bit, which ended a run; a whole step of Newton's method overflows where few purchases overlap with the rest."
    for seed in range(60):
        r = np.random.default_rng(seed); n = int(r.integers(50, 3000))
        score = np.round(r.normal(0, .1, n), int(r.integers(1, 4)))
        score[score > np.quantile(score, .8)] = .17041596673385806
        step = r.random(n) < 1 / (1 + np.exp(-(score * r.uniform(0, 90) - 3)))
        with np.errstate(over="raise", invalid="raise"):
            for curve in (f(score, step) for f in CURVES.values()): assert (np.diff(curve) >= 0).all() and 0 <= curve[1].min() <= curve[1].max() <= 1
    apart = np.r_[np.linspace(-1, -.5, 500), np.linspace(.5, 1, 500)]
    with np.errstate(over="raise", invalid="raise"): a, b = fit_platt(apart, apart > 0)
    assert np.isfinite([a, b]).all() and a > 5

@settings(max_examples=80)
@given(samples, st.integers(1, 40))
def test_the_calibration_error_is_that_of_plain_loops(sample, bins):
    score, bought = drawn(*sample)
    p = 1 / (1 + np.exp(-score))
    rows = sorted(range(len(p)), key=lambda r: (p[r], r))
    small, more, error, start = *divmod(len(p), bins), 0., 0
    for b in range(bins):
        at = rows[start:start + small + (b < more)]; start += len(at)
        if at: error += abs(sum(p[r] for r in at) / len(at) - sum(bool(bought[r]) for r in at) / len(at)) * len(at) / len(p)
    table = reliability(p, bought, bins)
    assert ece(table) == pytest.approx(error, abs=1e-12) and sum(b["rows"] for b in table) == len(p)
    assert max(b["rows"] for b in table) - min(b["rows"] for b in table) <= 1
    said = judge_chances(p, bought, np.arange(len(p)) // 7, bins, 100, 0)
    assert said["ece"]["value"] == pytest.approx(error, abs=1e-12) and said["log_loss"] == pytest.approx(log_loss(p, bought))

def test_platt_is_the_likeliest_sigmoid():
    score, bought = drawn(5, 5000, 1.3, -2)
    a, b = fit_platt(score, bought)
    assert abs(a - 1.3) < .15 and abs(b + 2) < .15
    loss = lambda a, b: log_loss(1 / (1 + np.exp(-(a * score + b))), bought)
    assert all(loss(a, b) <= loss(a + da, b + db) + 1e-5 for da, db in product((-.02, 0, .02), repeat=2))
    assert fit_platt(score, ~bought)[0] == 0  # falls: no slope rather than a wrong one

def test_isotonic_is_pooled_by_hand():
    score, bought = np.arange(8.), np.array([0, 1, 1, 0, 0, 1, 1, 1], bool)
    x, p = fit_isotonic(score, bought, per=1)   # groups end before each purchase: [0] [1] [2 3 4] [5] [6] [7]: 0, then 1 1/3 pooled with what falls
    np.testing.assert_allclose(x, [0, 2.5, 6]); np.testing.assert_allclose(p, [0, .5, 1])

def test_the_better_curve_is_kept_and_the_order_of_cases_does_not_matter():
    rng = np.random.default_rng(0); score = rng.normal(0, 1, 40_000)
    step = rng.random(40_000) < np.where(score > 1, .6, .05)   # no sigmoid
    curve, said = fit_calibration(score, step, np.arange(40_000) // 20, 15)
    assert said["method"] == "isotonic" and said["methods"]["isotonic"]["log_loss"] < said["methods"]["Platt"]["log_loss"] - .01
    mixed = rng.permutation(40_000)
    np.testing.assert_allclose(fit_calibration(score[mixed], step[mixed], (np.arange(40_000) // 20)[mixed], 15)[0], curve, atol=1e-9)
    few, bought = drawn(1, 300, 1., -2)
    assert fit_calibration(few, bought, np.arange(300) // 10, 10)[1]["method"] == "Platt"
    with pytest.raises(RecsysError, match="too few cases"): fit_calibration(few, bought, np.zeros(300, int), 10)
    with pytest.raises(RecsysError, match="too few cases"): fit_calibration(few, np.zeros(300, bool), np.arange(300), 10)

def test_with_and_without_a_cart_are_two_curves_where_there_is_enough_to_learn():
    n, rng = 600, np.random.default_rng(0)
    rows = lists(n, 0, lambda x, rng: rng.random(len(x)) < np.where(np.arange(len(x)) // 12 % 2, .3, .1))
    cases = Cases(np.arange(n), np.arange(n + 1), np.zeros(n, int), np.arange(n + 1) * 1, np.zeros(n, int), np.arange(n) % 2 == 1, np.ones(n, np.float32), np.ones(n, bool))
    curves, said = calibrate(rng.normal(0, 1, len(rows.x)), rows, cases, 10)
    assert abs(curves[0, 1].mean() - .1) < .03 and abs(curves[1, 1].mean() - .3) < .03 and said["next_basket"]["rows"] == said["completion"]["rows"] == n * 6
    few = cases._replace(completing=np.arange(n) < 5)
    assert calibrate(rng.normal(0, 1, len(rows.x)), rows, few, 10)[1]["completion"]["rows"] == n * 12
    browsers = cases._replace(bought=np.arange(n) % 4 > 1)  # the other half bought nothing: no part of "given that there is a basket"
    assert calibrate(rng.normal(0, 1, len(rows.x)), rows, browsers, 10)[1]["next_basket"]["rows"] == n * 3

@pytest.mark.parametrize("spoil,what", [(lambda p: p.unlink(), "no such calibration"), (lambda p: p.write_bytes(b"junk"), "broken array"), (lambda p: p.write_bytes(p.read_bytes()[:200]), "broken array"),
    (lambda p: np.save(p, np.zeros((2, KNOTS))), "not float64"), (lambda p: np.save(p, -np.sort(np.random.rand(2, 2, KNOTS))), "not a growing curve"), (lambda p: np.save(p, np.full((2, 2, KNOTS), np.nan)), "not a growing curve")])
def test_broken_curves_are_refused(tmp_path, spoil, what):
    score, bought = drawn(0, 500, 1., -1)
    path = save_calibration(np.stack([platt_curve(score, bought)] * 2), tmp_path/"calibration.npy")
    load_calibration(path); spoil(path)
    with pytest.raises(RecsysError, match=what): load_calibration(path)

# ---- what is served

@pytest.fixture(scope="module", params=["plain", "with position"])
def engine(request, tmp_path_factory):
    "The serving tests' shop with curves, by a ranker that saw positions, or none."
    folder = tmp_path_factory.mktemp("ranked")
    rows = lists(40, 0, taste, **dict(position=np.tile(np.arange(1, 13, dtype=np.int32), 40)) if request.param != "plain" else {})
    fit, valid = fit_both([rows], lists(30, 1, taste), 15, 15, 10, **HOW), lists(30, 1, taste)
    save_ranker(fit.booster, folder/"ranker.txt")
    save_calibration(np.stack([platt_curve(held_out(fit, valid), np.arange(len(valid.x)) % k == 0) for k in (5, 9)]), folder/"calibration.npy")
    bundle = open_bundle(publish(folder))
    verify_bundle(bundle.folder)
    assert (bundle.ranker.num_feature() == len(NAMES)) == (request.param == "plain")
    return Engine(bundle.state, bundle.ranker, PER_SOURCE, BUDGET, bundle)

asked = st.builds(Request, n=st.integers(1, 40), user_id=st.sampled_from([None, "u1", "u7", "stranger"]), cart=st.lists(st.integers(0, N_ITEMS - 1).map(lambda k: f"i{k}"), max_size=4), explain=st.booleans())

@settings(max_examples=60)
@given(asked)
def test_probabilities_follow_the_score(engine, request):
    items = recommend(engine, request, "r").items
    assert [i["probability"] for i in msgspec.json.decode(msgspec.json.encode(items))] == [i.probability for i in items]  # as HTTP sends it
    p, s = [i.probability for i in items], [i.score for i in items]
    assert p == sorted(p, reverse=True) and all(0 <= v <= 1 for v in p)
    curve = engine.bundle.calibration[1 if request.cart else 0]
    np.testing.assert_allclose(p, probability_of(curve, np.array(s)), atol=1e-4)

@settings(max_examples=60)
@given(asked)
def test_contributions_and_the_base_are_the_score(engine, request):
    "Of every item of the answer, by the model with all its columns; what the answer shows are its largest ones."
    request.explain = True
    items = recommend(engine, request, "r").items
    code = {int(i): r for r, i in reversed(list(enumerate(engine.work.ids)))}
    rows = np.array([code[int(i.item_id[1:])] for i in items], int)
    assume(len(rows))
    x = as_served(engine.ranker, engine.work.x[rows])
    shap, raw = engine.ranker.predict(x, pred_contrib=True, num_threads=1), engine.ranker.predict(x, num_threads=1)
    np.testing.assert_allclose(shap.sum(1), raw, atol=1e-6, rtol=0)
    np.testing.assert_allclose([i.score for i in items], raw, atol=1e-5)
    names = engine.ranker.feature_name()
    for item, values in zip(items, shap):
        assert len(item.contributions) == 5 and all(abs(values[names.index(n)] - v) <= 1e-4 for n, v in item.contributions.items())

def test_a_version_from_before_there_were_curves_still_answers(tmp_path):
    bundle = open_bundle(publish(tmp_path))
    answer = recommend(Engine(bundle.state, bundle.ranker, PER_SOURCE, BUDGET, bundle), Request(user_id="u1"), "r")
    assert bundle.calibration is None and answer.items and all(i.probability is None for i in answer.items)

def test_a_bundle_with_broken_curves_is_never_published(tmp_path):
    (tmp_path/"calibration.npy").write_bytes(b"junk")
    with pytest.raises(RecsysError, match="broken array"): publish(tmp_path)
    assert not list((tmp_path/"bundles").iterdir())

# ---- the same ranker twice

def test_the_seed_decides_and_nothing_else():
    fit = lambda **more: fit_both([lists(60, 0, taste)], lists(40, 1, taste), 25, 25, 10, **HOW | more)
    one, again, other = fit(), fit(), fit(seed=4)
    assert trees_of(one.booster) == trees_of(again.booster) != trees_of(other.booster) and one.curve == again.curve
    np.testing.assert_array_equal(held_out(one, lists(40, 1, taste)), held_out(again, lists(40, 1, taste)))

def test_threads_do_not_change_the_trees():
    "Splits are the same; a leaf's value is a sum, of which another number of threads may round the last digit differently."
    rows, valid = lists(1500, 0, taste), lists(300, 1, taste)
    one, two = (fit_both([rows], valid, 30, 30, 10, **HOW | dict(threads=t)).booster.dump_model()["tree_info"] for t in (1, 2))
    def shape(node): return (node["split_feature"], node["threshold"], shape(node["left_child"]), shape(node["right_child"])) if "split_feature" in node else None
    def leaves(node): return leaves(node["left_child"]) + leaves(node["right_child"]) if "split_feature" in node else [node["leaf_value"]]
    assert [shape(t["tree_structure"]) for t in one] == [shape(t["tree_structure"]) for t in two]
    for a, b in zip(one, two): np.testing.assert_allclose(leaves(a["tree_structure"]), leaves(b["tree_structure"]), rtol=1e-10, atol=1e-14)

def test_the_search_finds_the_same_twice_and_nothing_worse():
    pytest.importorskip("optuna", reason="an extra: pip install 'recsys[tune]'")
    from recsys.ranking.tuning import tune
    steps, how = [], HOW | dict(min_rows_in_leaf=300)
    search = lambda **more: tune([lists(60, 0, taste)], lists(40, 1, taste), 15, 5, **dict(seconds=0, trials=14, on_step=steps.append) | how | more)
    (best, trials), (again, trials2) = search(), search()
    bare = lambda ts: [{k: v for k, v in t.items() if k != "seconds"} for t in ts]
    assert best == again and bare(trials) == bare(trials2) and len(trials) == 14 and steps[:14] == [f"trial {n}" for n in range(1, 15)]
    assert {k: trials[0][k] for k in ("leaves", "learning_rate", "min_rows_in_leaf")} == {k: how[k] for k in ("leaves", "learning_rate", "min_rows_in_leaf")}
    top = max(t["value"] for t in trials)
    assert top > trials[0]["value"] and best["leaves"] == next(t for t in trials if t["value"] == top)["leaves"]
    fit = fit_both([lists(60, 0, taste)], lists(40, 1, taste), 15, 5, 10, **best)   # what was found can be used, and gives what it promised
    assert max(v for _, v in fit.curve) == top
    assert bare(search(seed=9)[1])[1:] != bare(trials)[1:]
    timed, few = search(trials=0, seconds=1)
    assert few and bare(few) == bare(search(trials=len(few))[1])

# ---- the whole way

@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    "A small simulated shop with views, clicks, carts, purchases and shown lists: features and candidates of its moments."
    root, start = tmp_path_factory.mktemp("simulated"), datetime(2024, 1, 1, tzinfo=timezone.utc)
    simulate(root/"shop", 60_000, seed=2, users=500, items=200, days=70)
    (root/"settings.ini").write_text(settings_text())
    for name in "ifc": (root/name).mkdir()
    ingest("shop/simulated.toml", root/"i", None, start + timedelta(days=70), 30, 60, .05, root)
    s = load_settings(root/"settings.ini")
    write_outcomes(root/"i", outcome_minutes(s.data.outcome_minutes))
    build_features(root/"i", root/"f", s); build_candidates(root/"f", root/"c", s)
    return root

@pytest.mark.parametrize("bias", ["feature", "propensity"])
def test_a_shop_that_logs_what_it_showed_trains_on_all_of_it(simulated, tmp_path, bias):
    (simulated/"settings.ini").write_text(settings_text(position_bias=bias))
    s, steps = load_settings(simulated/"settings.ini"), []
    said = train_ranker(simulated/"f", simulated/"c", tmp_path, s, steps.append)
    moments, shown = read_moments(simulated/"f"), pl.read_parquet(simulated/"f"/"shown.parquet")
    certain = shown.group_by("list").agg(pl.col("ts").first(), pl.col("known").max()).filter(pl.col("known") < moments.test)
    assert said["lists"] == sum(certain.filter((pl.col("ts") >= m) & (pl.col("ts") < moments.until(m))).height for m in (*moments.training, moments.validation)) > 500
    booster, curves = load_ranker(tmp_path/"ranker.txt"), load_calibration(tmp_path/"calibration.npy")
    assert (POSITION in booster.feature_name()) == (bias == "feature") == (said["propensities"] is None)
    if bias == "propensity":
        for row in said["propensities"]: assert row[0] == 1 and row[4] < .8  # the truth is 1 and .32
    assert steps[:3] == [day_of(m) for m in (*moments.training, moments.validation)] and "tree 1" in steps and said["importance"]
    found = evaluate_run(simulated/"f", simulated/"c", tmp_path, tmp_path, s)
    for q in found["questions"].values():
        c = q["calibration"]
        assert c["ece"]["value"] < .05 and len(c["bins"]) == s.evaluation.calibration_bins
        assert c["bins"][-1]["observed"] > 2 * c["rate"] and c["bins"][-1]["predicted"] > 2 * c["rate"]
    assert curves.shape == (2, 2, KNOTS)

def test_what_true_probabilities_would_err_by_chance():
    "The expected error of bins of purchases drawn by the probabilities themselves, against many such draws in plain code."
    rng = np.random.default_rng(0); p = rng.beta(1, 30, 3000)
    said = judge_chances(p, rng.random(3000) < p, np.arange(3000) // 10, 10, 100, 1)
    drawn = [ece(reliability(p, rng.random(3000) < p, 10)) for _ in range(200)]
    assert min(drawn) < said["by_chance"] < max(drawn) and abs(said["by_chance"] - np.mean(drawn)) < 3 * np.std(drawn) / np.sqrt(5)
    wrong = judge_chances(np.minimum(3 * p, 1), rng.random(3000) < p, np.arange(3000) // 10, 10, 100, 1)
    assert wrong["ece"]["low"] > wrong["by_chance"] and said["ece"]["low"] <= said["ece"]["high"]

def test_the_pages_show_the_search_the_places_and_the_bins(simulated):
    pytest.importorskip("optuna", reason="an extra: pip install 'recsys[tune]'")
    (simulated/"settings.ini").write_text(settings_text(position_bias="propensity", shown_lists=2000, tune_trials=3))
    for name in ("nbs", "constraints.txt"): (simulated/name).symlink_to(ROOT/name)
    (simulated/"t").mkdir(); (simulated/"e").mkdir()
    given = [f"features={simulated/'f'}", f"candidates={simulated/'c'}"]
    def page(job, **more):
        r = recsys(simulated, "job", job, *(x for p in (*given, *(f"{k}={v}" for k, v in more.items())) for x in ("-p", p)))
        assert r.returncode == 0, r.stderr
        return Path(r.stdout.split("Look at ")[1].strip()).read_text()
    trained = page("train", out=simulated/"t")
    assert "The search: 3 trials" in trained and "How often each position is looked at" in trained and "Curves by question" in trained and "Lists shown" in trained
    said = read_json(simulated/"t"/"train.json")
    best = max(said["trials"], key=lambda t: t["value"])
    assert all(said["parameters"][k] == best[k] for k in ("leaves", "learning_rate", "min_rows_in_leaf"))
    judged = page("evaluate", train=simulated/"t", out=simulated/"e")
    assert "were to be expected of true ones" in judged and "predicted and bought share, by bin" in judged
