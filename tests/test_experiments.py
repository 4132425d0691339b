"Experiments: figures as other libraries give them, false alarms as promised, decisions that follow from the figures."
import json, re
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.stats import multivariate_normal

from recsys.core.settings import RecsysError
from recsys.data.events import UTC
from recsys.data.identity import NO_LINKS
from recsys.experiments.analysis import METRIC, aggregates, columns_of, compare, comparisons, corrected, decide, guarded, remaining_days
from recsys.experiments.gate import clicked, explored, gate_of, gate_rows, would_show
from recsys.experiments.off_policy import ESTIMATORS, Rows, arm_rates, best_strength, evaluate, gate, influence, overlap, rows_of, shrunk, standard_error
from recsys.experiments.sample_ratio import ALARMS, deviation, sample_ratio, spent
from recsys.experiments.sequential import Walk, always_valid_p, crossing, multiplier, needed, power, spending_bounds, units_for
from recsys.experiments.units import LISTS, exposed, lists_of, maturity, unit_table
from recsys.operations.bench_experiments import aa_tests, asos_decisions, library_z, moments, open_bandit, power_tests, ratio_tests, thompson, unit_pool, z_of
from recsys.ranking.rules import Exploration, Rules
from recsys.serving.assignment import Experiment, Variant
from recsys.serving.bundle import open_bundle
from recsys.serving.engine import Engine, Request, recommend
from shop import ROOT, recsys, settings_text
from test_serving import BUDGET, PER_SOURCE, publish

def made_up(n, seed, lift=0.0):
    "Units of a simulated experiment."
    rng = np.random.default_rng(seed)
    treated, pool = rng.random(n) < .5, unit_pool(n, seed)
    prior = rng.poisson(pool["clicks"] + .5)
    x = {k: v for k, v in pool.items() if k != "one"} | dict(clicks=pool["clicks"] * (1 + lift * treated))
    return pl.DataFrame(dict(variant=np.where(treated, "new", "control"), **x, prior_clicks=prior, prior_impressions=pool["impressions"] + rng.poisson(5, n), prior_revenue=pool["revenue"] * .5 + rng.exponential(5, n)))

def experiment(**changes):
    of = dict(name="x", owner="team", hypothesis="it is better", primary="ctr", minimum_effect=.02, ramp=((date(2026, 11, 1), 1.0),), variant=(Variant(name="control"), Variant(name="new")))
    return Experiment(**of | changes)

def halves(u): return u.filter(pl.col("variant") == "control"), u.filter(pl.col("variant") == "new")

# ---- the same numbers as two other libraries

def ours(u, columns):
    a = aggregates(u, list(METRIC))
    return compare(a["control"], a["new"], "ctr", columns, 2 * len(u))

def close(a, b): assert abs(a - b) <= 1e-9 * max(1, abs(b)), (a, b)

def theirs(c, t):
    "p and interval of Welch's test by SciPy and by statsmodels."
    found = [(lambda r: (r.pvalue, *(-x for x in r.confidence_interval(.95)[::-1])))(stats.ttest_ind(c, t, equal_var=False))]
    from statsmodels.stats.api import CompareMeans, DescrStatsW
    m = CompareMeans(DescrStatsW(t), DescrStatsW(c))
    return found + [(m.ttest_ind(usevar="unequal")[1], *m.tconfint_diff(usevar="unequal"))]

@pytest.mark.parametrize("seed", range(4))
def test_a_mean_is_tested_as_scipy_and_statsmodels_test_it(seed):
    u = made_up(3000, seed, .1)
    c, t = halves(u)
    for numer in ("revenue", "buyer", "clicks"):
        said = ours(u, [numer, None, None, None])
        for p, low, high in theirs(c[numer].to_numpy(), t[numer].to_numpy()): close(said.fixed_p, p)
        close(said.control, c[numer].mean()); close(said.relative, t[numer].mean() / c[numer].mean() - 1)
        log = np.log(t[numer].mean() / c[numer].mean()); r = [x.std() / x.mean() / np.sqrt(len(x)) for x in (c[numer], t[numer])]
        df = (r[0]**2 + r[1]**2)**2 / (r[0]**4 / (len(c) - 1) + r[1]**4 / (len(t) - 1))
        half = stats.t.ppf(.975, df) * np.hypot(*r)
        close(said.fixed_low, np.exp(log - half) - 1); close(said.fixed_high, np.exp(log + half) - 1)

@pytest.mark.parametrize("seed", range(4))
def test_a_ratio_is_the_mean_of_linearised_units(seed):
    u = made_up(3000, seed, .1)
    line = lambda x: ((x["clicks"] - x["clicks"].sum() / x["impressions"].sum() * x["impressions"]) / x["impressions"].mean() + x["clicks"].sum() / x["impressions"].sum()).to_numpy()
    for p, *_ in theirs(*map(line, halves(u))): close(ours(u, ["clicks", "impressions", None, None]).fixed_p, p)

@pytest.mark.parametrize("seed", range(4))
def test_cuped_is_the_residual_of_a_regression(seed):
    u = made_up(3000, seed, .1)
    slope = stats.linregress(u["prior_revenue"].to_numpy(), u["revenue"].to_numpy()).slope
    import statsmodels.api as sm
    close(sm.OLS(u["revenue"].to_numpy(), sm.add_constant(u["prior_revenue"].to_numpy())).fit().params[1], slope)
    left = u.with_columns(left=pl.col("revenue") - slope * (pl.col("prior_revenue") - pl.col("prior_revenue").mean()))
    said = ours(u, columns_of("revenue", u.columns))
    assert said.cuped
    for p, *_ in theirs(*(x["left"].to_numpy() for x in halves(left))): close(said.fixed_p, p)
    close(said.control, halves(left)[0]["left"].mean())

def test_cuped_of_a_ratio_regresses_linearised_units():
    u = made_up(4000, 9, .1)
    def line(x, a, b): r = x[a].sum() / x[b].sum(); return ((x[a] - r * x[b]) / x[b].mean()).to_numpy(), r
    (y, _), (x, r) = line(u, "clicks", "impressions"), line(u, "prior_clicks", "prior_impressions")
    theta, parts = np.cov(y, x)[0, 1] / x.var(ddof=1), []
    for h in halves(u):
        (yh, ry), (xh, rx) = line(h, "clicks", "impressions"), line(h, "prior_clicks", "prior_impressions")
        parts.append(yh + ry - theta * (xh + rx - r))
    for p, *_ in theirs(*parts): close(ours(u, columns_of("ctr", u.columns)).fixed_p, p)

def test_sums_give_what_units_give():
    u = made_up(2000, 3, .1)
    a = [moments({k: v for k, v in h.with_columns(one=1.0).to_dict(as_series=False).items()} | {k: h.with_columns(one=1.0)[k].to_numpy() for k in (*h.columns, "one") if k != "variant"}, METRIC).sum(0) for h in halves(u)]
    n = [len(h) for h in halves(u)]
    z = z_of(*a, *n)
    for k, m in enumerate(METRIC):
        close(z[k], library_z(a[0][k], a[1][k], *n))
        said = ours(u, [METRIC[m].numer, None if METRIC[m].denom == "mature" else METRIC[m].denom, None, None])
        close(said.p, float(always_valid_p(z[k], len(u), 2 * len(u))))

def test_holm():
    rows = [ours(made_up(500, s, .3 * (s % 2)), ["clicks", "impressions", None, None]) for s in range(6)]
    p = np.array([r.p for r in rows]); order = p.argsort()
    expected = np.empty(6); expected[order] = np.minimum(1, np.maximum.accumulate(p[order] * (6 - np.arange(6))))
    assert np.allclose([r.p_adjusted for r in corrected(rows)], expected)

# ---- sequential

@given(st.integers(1, 10**7), st.integers(100, 10**6), st.floats(.001, .2))
def test_p_and_interval_say_the_same(n, planned, alpha):
    m = float(multiplier(n, planned, alpha))
    assert abs(always_valid_p(m, n, planned, alpha) / alpha - 1) < 1e-6
    assert m > stats.norm.isf(alpha / 2)

def test_the_interval_is_tightest_near_the_plan():
    others = [float(multiplier(10**5, 10**5 * f)) for f in (.2, .5, 2, 5)]
    assert float(multiplier(10**5, 10**5)) < min(others) + .01

def test_crossing_is_the_normal_integral():
    "Two looks, where the exact odds are a bivariate normal probability; and a simulation for many."
    info, b, drift = np.array([.4, 1.0]), np.array([2.3, 1.9]), 1.5
    mean, rho = drift * np.sqrt(info), np.sqrt(.4)
    inside = multivariate_normal(mean, [[1, rho], [rho, 1]]).cdf(b, lower_limit=-b)
    assert abs(crossing(b, info, drift)[-1] - (1 - inside)) < 1e-5
    rng, info = np.random.default_rng(0), np.r_[.05, .06, .3, .31, .9, 1.2]
    z = (rng.normal(size=(200_000, 6)) * np.sqrt(np.diff(info, prepend=0))).cumsum(1) / np.sqrt(info)
    b = multiplier(info, 1, .1)
    for drift in (0, 2): assert abs(crossing(b, info, drift)[-1] - (np.abs(z + drift * np.sqrt(info)) > b).any(1).mean()) < .004

def test_spending_spends_exactly():
    info = np.sort(np.random.default_rng(1).random(12))
    spend = .01 * spent(info)
    assert np.allclose(crossing(spending_bounds(info, spend), info), spend, atol=1e-9)
    five = np.arange(1, 6) / 5
    assert np.abs(spending_bounds(five, .05 * np.log(1 + (np.e - 1) * five)) - [2.4380, 2.4268, 2.4101, 2.3966, 2.3859]).max() < 2e-3 # Pocock-like, tabulated

@given(st.floats(.3, .95), st.integers(2, 30))
@settings(max_examples=10, deadline=None)
def test_needed_has_the_wanted_power(wanted, looks):
    assert abs(power(needed(wanted, looks), looks) - wanted) < 1e-3

def test_units_grow_with_the_square():
    assert np.isclose(units_for(.01, .005, 1000), 4 * units_for(.02, .005, 1000))

# ---- sample ratio

@given(st.integers(0, 400), st.integers(1, 400), st.floats(.01, .99))
def test_deviation_never_overstates_the_exact_tail(k, n, share):
    k = min(k, n)
    z = abs(float(deviation(k, n, share)))
    tail = min(stats.binom.cdf(k, n, share), stats.binom.sf(k - 1, n, share))
    assert np.isclose(min(z, 37), min(37, max(0, stats.norm.isf(min(tail, .5)))), atol=1e-6)

def test_the_check_finds_what_is_missing_and_nothing_else():
    rng = np.random.default_rng(2)
    sound = [sample_ratio(rng.multinomial(2000, [.25, .25, .5], 28).cumsum(0), [.25, .25, .5], 56_000) for _ in range(40)]
    assert all(s.sound for s in sound)
    lost = rng.multinomial(2000, [.25, .25, .5], 28); lost[:, 1] = lost[:, 1] * .9
    said = sample_ratio(lost.cumsum(0), [.25, .25, .5], 56_000)
    assert not said.sound and said.worst in (1, 2)

def test_odd_looks():
    assert sample_ratio([[0, 0]], [.5, .5], 100).sound and sample_ratio([[0, 0], [1, 0], [1, 0]], [.5, .5], 100).sound
    assert not sample_ratio([[500, 3]], [1.0, 0.0], 1000).sound           # who should not be there at all
    assert not sample_ratio([[1000, 10], [3000, 20]], [.5, .5], 100).sound # long after the plan

@pytest.mark.bench
def test_false_alarms_of_the_ratio_and_its_power():
    assert ratio_tests(200_000, 5) < .0011 and ratio_tests(20_000, 6, .51) > .99

# ---- false positives and power

def test_always_valid_looks_are_seldom_wrong_and_naive_ones_often():
    said = aa_tests(400, 50, 28, 11)
    assert max(said["always"].values()) < .05 and min(said["naive"].values()) > .2 and said["library_difference"] < 1e-9

@pytest.mark.bench
def test_power_is_as_planned():
    assert power_tests(4000, 3)["gap"] < .03

# ---- decisions

def looks_of(u, days=14):
    n = [(u["variant"] == v).sum() for v in ("control", "new")]
    return [[int(c * (d + 1) / days) for c in n] for d in range(days)]

def test_the_ratio_comes_first():
    u = made_up(20_000, 1, .5)
    bad = u.filter((pl.col("variant") == "control") | (pl.int_range(pl.len()) % 8 > 0))
    said = decide(bad, experiment(), looks_of(bad), 14, 40_000)
    assert said.answer == "invalid" and said.primary == [] and said.others == [] and "No result" in said.sentence and "NOT" in said.details[0]

@pytest.mark.parametrize("lift, answer", [(.3, "better"), (-.3, "worse")])
def test_clear_answers(lift, answer):
    u = made_up(20_000, 1, lift)
    said = decide(u, experiment(), looks_of(u), 14, 40_000)
    assert said.answer == answer and said.remaining is None and "'new'" in said.sentence

def test_early_open_same_and_over():
    u = made_up(20_000, 4)
    assert decide(u, experiment(), looks_of(u), 6.9, 40_000).answer == "early" and decide(u[:600], experiment(), looks_of(u[:600]), 14, 40_000).answer == "early"
    said = decide(u, experiment(), looks_of(u), 14, 40_000)
    assert said.answer == "open" and said.remaining > 0 and "days more" in said.sentence
    assert "are over" in decide(u, experiment(days=14), looks_of(u), 14, 40_000).sentence
    assert decide(u, experiment(minimum_effect=.5), looks_of(u), 14, 40_000).answer == "same"

def test_guardrails_stop_and_hold_back():
    u = made_up(20_000, 1, .3)
    slow = u.with_columns(latency_ms=pl.when(pl.col("variant") == "new").then(pl.col("latency_ms") * 1.5).otherwise("latency_ms"))
    said = decide(slow, experiment(guardrails=dict(latency_ms=.1)), looks_of(u), 14, 40_000)
    assert said.answer == "broken" and "latency" in said.sentence
    said = decide(u, experiment(guardrails=dict(revenue=.001)), looks_of(u), 14, 40_000)
    assert said.answer == "open" and "not yet sure of revenue" in said.sentence and said.remaining > 0
    assert decide(u, experiment(guardrails=dict(latency_ms=.1, diversity=.05)), looks_of(u), 14, 40_000).answer == "better"

def test_a_metric_that_should_fall_is_read_that_way():
    u = made_up(20_000, 1)
    fast = u.with_columns(latency_ms=pl.when(pl.col("variant") == "new").then(pl.col("latency_ms") * .8).otherwise("latency_ms"))
    assert decide(fast, experiment(primary="latency_ms"), looks_of(u), 14, 40_000).answer == "better"
    c = next(c for c in comparisons(fast, experiment(), 40_000)[1] if c.metric == "latency_ms")
    assert guarded(c, .01) == "kept"

def test_nothing_to_compare_is_said():
    u = made_up(20_000, 1).with_columns(clicks=0)
    assert decide(u, experiment(), looks_of(u), 14, 40_000).answer == "open"
    with pytest.raises(RecsysError, match="primary metric 'ctr'"): decide(u.drop("clicks"), experiment(), looks_of(u), 14, 40_000)

def test_segments_and_others_are_corrected_together():
    rng = np.random.default_rng(0)
    false = 0
    for s in range(40):
        u = made_up(3000, 100 + s).with_columns(segment=pl.Series(rng.choice(list("abcdef"), 3000)))
        primary, others = comparisons(u, experiment(), 6000)
        assert len(primary) == 1 and len(others) == 5 + 6
        false += any(o.p_adjusted < .05 for o in others)
    assert false <= 5

# ---- real experiments, as they are published

def test_asos_decisions_of_a_table_made_up():
    day = np.arange(1., 29); n = day * 1000
    table = lambda name, effect: pl.DataFrame(dict(experiment_id=name, variant_id=1, metric_id=1, time_since_start=day, count_c=n, count_t=n, mean_c=1.0, mean_t=1 + effect, variance_c=1.0, variance_t=1.0))
    d = asos_decisions(pl.concat([table("big", .1), table("none", 0.), table("small", .02), table("worse", -.1)])).sort("experiment_id")
    assert d["fixed"].to_list() == [1, 0, 1, -1] and d["always"].to_list() == [1, 0, 0, -1] and d["naive"].to_list() == [1, 0, 1, -1]
    assert d["always_day"].to_list() == [7, 28, 28, 7] and d["end"].to_list() == [28] * 4

# ---- off-policy

def world(n, seed, arms=6):
    rng = np.random.default_rng(seed)
    rate, old, new = rng.uniform(.05, .3, arms), rng.dirichlet(np.full(arms, 3)), rng.dirichlet(np.full(arms, 3))
    a = rng.choice(arms, n, p=old)
    return a, (rng.random(n) < rate[a]).astype(float), new[a] / old[a], new, new @ rate

def test_estimators_by_their_formulas():
    a, y, w, new, _ = world(500, 1)
    r = rows_of(a, y, w, new)
    said = {n: influence(r, n, 3.0)[0] for n in ESTIMATORS}
    loops = dict(ips=sum(w * y) / 500, snips=sum(w * y) / sum(w), dm=sum(r.v) / 500, dr=sum(v + wi * (yi - q) for v, wi, yi, q in zip(r.v, w, y, r.q)) / 500,
                 dros=sum(v + 3 * wi / (wi**2 + 3) * (yi - q) for v, wi, yi, q in zip(r.v, w, y, r.q)) / 500)
    for n in ESTIMATORS: assert np.isclose(said[n], loops[n])
    assert np.isclose(influence(r, "dros", np.inf)[0], said["dr"]) and np.isclose(influence(r, "dros", 0.0)[0], said["dm"])

@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50), st.floats(.1, 1e4))
def test_shrinkage_is_between_nothing_and_the_weight(w, k):
    w = np.array(w)
    s = shrunk(w, k)
    assert (s >= 0).all() and (s <= w + 1e-12).all() and (s <= np.sqrt(k) / 2 + 1e-9).all()

def test_unbiased_estimators_are_and_cover():
    inside, error = dict(ips=0, snips=0, dr=0), dict(ips=[], snips=[], dr=[])
    for s in range(150):
        a, y, w, new, truth = world(3000, s)
        said = evaluate(rows_of(a, y, w, new))
        for n in inside: inside[n] += said[n].low < truth < said[n].high; error[n].append((said[n].value - truth) / said[n].se)
    for n in inside: assert inside[n] >= 134 and abs(np.mean(error[n])) < .3, n

def test_folds_keep_a_rows_own_reward_out():
    a = np.zeros(300, int); y = np.zeros(300); y[0] = 1
    r = rows_of(a, y, np.ones(300), np.array([1.0]))
    assert r.q[0] < r.q[1:].max()

def test_units_hang_together():
    x = np.random.default_rng(0).normal(size=400)
    doubled, unit = np.repeat(x, 2), np.repeat(np.arange(400), 2)
    assert np.isclose(standard_error(doubled, unit), standard_error(x, None), rtol=1e-9)
    a, y, w, new, _ = world(400, 3)
    r = rows_of(np.repeat(a, 2), np.repeat(y, 2), np.repeat(w, 2), new, unit=unit)
    assert (r.q[::2] == r.q[1::2]).all()

def test_rates_of_arms_are_pulled_together_and_stay_in_range():
    rng = np.random.default_rng(0)
    same = arm_rates(rng.integers(0, 50, 500), (rng.random(500) < .1).astype(float), 50)
    assert same.std() < .01
    arm = rng.integers(0, 5, 50_000); apart = arm_rates(arm, (rng.random(50_000) < np.linspace(.1, .5, 5)[arm]).astype(float), 5)
    assert np.abs(apart - np.linspace(.1, .5, 5)).max() < .02
    assert (arm_rates(np.zeros(0, int), np.zeros(0), 3) < 1e-6).all()

def test_overlap_warns():
    assert overlap(np.ones(1000)).warning is None and "effective" in overlap(np.r_[np.zeros(999), 1000.]).warning and "mean" in overlap(np.full(5000, 1.3)).warning
    for bad in ([], [np.nan], [-1.0], [np.inf]):
        with pytest.raises(RecsysError): overlap(np.array(bad))

def test_gate():
    a, y, w, new, truth = world(40_000, 2)
    best, worst = (np.eye(6)[k([y[a == j].mean() for j in range(6)])] for k in (np.argmax, np.argmin))
    old = np.bincount(a, minlength=6) / len(a)
    of = lambda p: gate(rows_of(a, y, p[a] / old[a], p))
    assert of(best).verdict == "open" and of(worst).verdict == "closed" and of(old).verdict == "open"
    assert gate(rows_of(a[:60], y[:60], w[:60], new)).verdict == "unknown" and gate(rows_of(a[:60], y[:60] * 0, w[:60], new)).verdict == "unknown"

def test_open_bandit_protocol_on_a_log_made_up():
    rng = np.random.default_rng(0)
    def log(policy):
        place = rng.integers(0, 3, 6000)
        item = np.array([rng.choice(34, p=policy[k]) for k in place])
        return pl.DataFrame(dict(timestamp=np.arange(6000), item_id=item, position=place + 1, click=(rng.random(6000) < .02 + .004 * item).astype(int), propensity_score=policy[place, item]))
    uniform, ts = np.full((3, 34), 1 / 34), thompson("men", 5000)
    said = open_bandit(log(uniform), log(ts), ts, 5)
    assert said["error"]["dr"] < .15 and said["warning"] is None and set(said["error"]) == {*ESTIMATORS, "as logged"}

def of_four(lifts, **changes):
    "Units and looks of an experiment with a control, two rivals and a shadow, and what is decided."
    parts = [(made_up(40_000, 1), "control", "control")] + [(made_up(40_000, 1 + k, l), "new", name) for k, (name, l) in enumerate(lifts.items(), 1)]
    u = pl.concat([u.filter(pl.col("variant") == v).with_columns(pl.col("clicks").cast(pl.Float64), variant=pl.lit(name)) for u, v, name in parts])
    e = experiment(variant=(Variant(name="control"), Variant(name="a"), Variant(name="b"), Variant(name="unseen", shadow=True)), **changes)
    return e, u, decide(u, e, [[(u["variant"] == v.name).sum() for v in e.variant]], 14, 160_000)

@pytest.mark.parametrize("lift, answer, words", [(0, "open", "Go on"), (.4, "better", "Ship 'a'"), (-.5, "worse", "Stop")])
def test_harm_is_said_before_better_news(lift, answer, words):
    _, _, d = of_four(dict(a=lift, b=-.4, unseen=0))
    assert d.answer == answer and d.sentence.count("Stop 'b'") == 1 and words in d.sentence.split(". ")[-1]
    if answer != "worse": assert d.sentence.startswith("Stop 'b': clicks per impression -") and d.sentence.count("Stop") == 1

def test_a_shadow_is_judged_by_its_lists_alone():
    e, u, d = of_four(dict(a=0, b=0, unseen=-.5), guardrails=dict(revenue=.9, latency_ms=.5))
    assert {c.variant for c in d.primary} == {"a", "b"} and {c.metric for c in d.others if c.variant == "unseen"} <= {"latency_ms", "diversity"} and "unseen" not in d.sentence
    slow = u.with_columns(latency_ms=pl.col("lists") * 5.0 * (1 + (pl.col("variant") == "unseen")) + u["buyer"] * .1)
    e = experiment(primary="latency_ms", guardrails=dict(revenue=.9), variant=e.variant)
    d = decide(slow, e, [[(u["variant"] == v.name).sum() for v in e.variant]], 14, 160_000)
    assert d.guardrails["unseen"] == {} and "Stop 'unseen': latency" in d.sentence and d.guardrails["a"].keys() == {"revenue"}

# ---- units and what came of them

MINUTES, T0 = dict(click=30, add_to_cart=1440, purchase=7 * 1440), datetime(2026, 11, 2, tzinfo=timezone.utc)
EVENT = dict(event_id=pl.String, event_type=pl.String, ts=UTC, received_ts=UTC, visitor_id=pl.String, user_id=pl.String, session_id=pl.String, item_id=pl.String, quantity=pl.Int32, price=pl.Float64,
             request_id=pl.String, position=pl.Int32, placement=pl.String, variant=pl.String, consent=pl.Boolean)

def shop(n, seed, crossing=0.0):
    "Lists, events and links of visitors, some of whom are one person on two devices."
    rng, lists, events, links = np.random.default_rng(seed), [], [], []
    add = lambda kind, v, at, request=None, price=None: events.append((f"{len(events)}", kind, at, at, v, None, v, "a", 1, price, request, 1, None, None, True))
    for k in range(n):
        devices, variant = [f"{k}-{d}" for d in range(1 + (rng.random() < .3))], rng.choice(["control", "new"])
        links += [(d, f"u{k}", T0, T0) for d in devices if len(devices) > 1]
        for j, d in enumerate(devices):
            at = T0 + timedelta(days=float(rng.uniform(0, 14)))
            lists.append((f"r{d}", at, variant if not j or rng.random() >= crossing else "new" if variant == "control" else "control", d, None, ["a", "b"], 5.0))
            add("impression", d, at, f"r{d}")
            if rng.random() < .3: add("click", d, at + timedelta(minutes=float(rng.uniform(0, 60))), f"r{d}")
            for delay in rng.uniform(-10, 10, rng.poisson(.4)): add("purchase", d, at + timedelta(days=float(delay)), None, float(rng.integers(1, 9)))
    return pl.DataFrame(lists, schema=LISTS, orient="row"), pl.DataFrame(events, schema=EVENT, orient="row"), pl.DataFrame(links, schema=NO_LINKS.schema, orient="row")

@pytest.mark.parametrize("seed, crossing", [(0, 0), (1, .5), (2, 1)])
def test_the_table_of_units_is_what_a_loop_finds(seed, crossing):
    lists, events, links = shop(60, seed, crossing)
    moment, owner = T0 + timedelta(days=40), dict(links.select("visitor_id", "user_id").rows())
    t, seen = unit_table(experiment(), lists, events.lazy(), MINUTES, moment, links), {}
    for r in lists.rows(named=True): seen.setdefault(owner.get(r["visitor_id"], r["visitor_id"]), []).append(r)
    assert t.crossed == sum(len({r["variant"] for r in rows}) > 1 for rows in seen.values()) and t.units["unit"].to_list() == sorted(seen) and (t.units["mature"] == 1).all()
    for row in t.units.rows(named=True):
        first, window = min((r["at"], r["variant"]) for r in seen[row["unit"]]), timedelta(days=7)
        assert (row["at"], row["variant"]) == first
        first = first[0]
        mine = [e for e in events.rows(named=True) if owner.get(e["visitor_id"], e["visitor_id"]) == row["unit"]]
        bought = [e for e in mine if e["event_type"] == "purchase" and first <= e["ts"] <= first + window]
        prior = [e for e in mine if e["event_type"] == "purchase" and first - window <= e["ts"] < first]
        shown = {e["request_id"]: e["ts"] for e in mine if e["event_type"] == "impression"}
        clicks = sum(e["event_type"] == "click" and e["ts"] - shown[e["request_id"]] <= timedelta(minutes=30) for e in mine)
        assert (row["buyer"], row["revenue"], row["prior_buyer"], row["prior_revenue"]) == (bool(bought), sum(e["price"] for e in bought), bool(prior), sum(e["price"] for e in prior))
        assert (row["impressions"], row["clicks"], row["lists"]) == (len(shown), clicks, len(seen[row["unit"]]))
    assert t.looks[-1].sum() == len(seen) and (np.diff(t.looks, axis=0) >= 0).all()

@given(st.floats(.05, .5), st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_people_who_cross_do_not_move_the_sample_ratio(weight, seed):
    rng, n = np.random.default_rng(seed), 3000
    variant, when = np.where(rng.random((n, 2)) < weight, "new", "control"), rng.uniform(0, 14, (n, 2))
    lists = pl.DataFrame([(f"r{k}-{d}", T0 + timedelta(days=when[k, d]), str(variant[k, d]), f"{k}-{d}", f"u{k}", ["a"], 5.0) for k in range(n) for d in range(2)], schema=LISTS, orient="row")
    links = lists.select("visitor_id", "user_id", ts=pl.lit(T0, UTC), known=pl.lit(T0, UTC))
    units, crossed = exposed(lists, links)
    assert len(units) == n and abs((units["variant"] == "new").sum() - n * weight) < 5 * np.sqrt(n * weight * (1 - weight))
    assert crossed == (variant[:, 0] != variant[:, 1]).sum()

def test_nothing_after_the_moment_is_seen():
    lists, events, links = shop(60, 5)
    moment = T0 + timedelta(days=9)
    whole = unit_table(experiment(), lists, events.lazy(), MINUTES, moment, links)
    cut = unit_table(experiment(), lists.filter(pl.col("at") < moment), events.filter(pl.col("ts") < moment).lazy(), MINUTES, moment, links)
    assert whole.units.equals(cut.units) and (whole.looks == cut.looks).all()
    assert (whole.units.filter(pl.col("mature") == 0)["buyer"] == 0).all()

@pytest.mark.parametrize("later", [0, 300, 5000])
def test_the_plan_does_not_move_after_the_first_days(later):
    rng, e = np.random.default_rng(later), experiment(ramp=((date(2026, 11, 2), .5), (date(2026, 11, 16), 1.0)))
    when = [0.0, *rng.uniform(0, 7, 699), *rng.uniform(7, 40, later)]
    lists = pl.DataFrame([(f"r{k}", T0 + timedelta(days=d), str(rng.choice(["control", "new"])), f"v{k}", None, ["a"], 5.0) for k, d in enumerate(when)], schema=LISTS, orient="row")
    planned = [unit_table(e, lists, pl.DataFrame(schema=EVENT).lazy(), MINUTES, T0 + timedelta(days=d)).planned for d in (7, 7.5, 20, 28, 40)]
    assert planned == pytest.approx([700 * 21 / 3.5] * 5)
    t = unit_table(e, lists, pl.DataFrame(schema=EVENT).lazy(), MINUTES, T0 + timedelta(days=40))
    assert sample_ratio(t.looks, [.5, .5], t.planned).sound and not sample_ratio(t.looks * [1, 2], [.5, .5], t.planned).sound # also with more units than planned

def test_late_purchases_are_corrected_for():
    rng, errors = np.random.default_rng(0), []
    for _ in range(30):
        age, buys, after = rng.uniform(0, 14, 20_000), rng.random(20_000) < .05, rng.triangular(0, 1, 7, 20_000)
        seen = buys & (after <= age)
        errors.append(seen.sum() / maturity(age, after[seen & (age >= 7)], 7).sum() / .05 - 1)
    assert abs(np.mean(errors)) < .02

def test_nobody_exposed_is_said():
    with pytest.raises(RecsysError, match="nobody was exposed"): unit_table(experiment(), pl.DataFrame(schema=LISTS), pl.DataFrame(schema=EVENT).lazy(), MINUTES, T0)

def test_lists_of_an_experiment_are_read_from_the_log(tmp_path):
    (tmp_path/"served"/"day=2026-11-02").mkdir(parents=True)
    line = lambda variant, visitor="v": json.dumps(dict(request_id="r", at=T0.timestamp(), variant=variant, visitor_id=visitor, user_id=None, items=[["a", 1, 1, ["x"]]], level=0, request={}))
    (tmp_path/"served"/"day=2026-11-02"/"1.jsonl").write_text("\n".join([line("x:new"), line("y:a,x:control"), line("xx:new"), line("default"), line("x:new", None)]) + "\n{\"cut")
    assert lists_of(tmp_path, "x")["variant"].to_list() == ["new", "control"]

def test_a_shadow_without_a_line_of_its_own_is_not_known(tmp_path):
    (tmp_path/"served"/"day=2026-11-02").mkdir(parents=True)
    line = lambda r, variant, items, took: json.dumps(dict(request_id=r, at=T0.timestamp(), variant=variant, visitor_id=r[:2], user_id=None, items=[[i, 1, 1, []] for i in items], took_ms=took))
    (tmp_path/"served"/"day=2026-11-02"/"1.jsonl").write_text("\n".join([line("r1", "x:unseen", "ab", 5.0), line("r1#shadow", "shadow x:unseen", "cd", 7.0), line("r2", "x:unseen", "ab", 5.0), line("r3", "x:control", "ab", 5.0)]) + "\n")
    lists = lists_of(tmp_path, "x", ("unseen",))
    assert lists.select("items", "took_ms").rows() == [(["c", "d"], 7.0), (None, None), (["a", "b"], 5.0)]
    e = experiment(variant=(Variant(name="control"), Variant(name="unseen", shadow=True)))
    t = unit_table(e, lists, pl.DataFrame(schema=EVENT).lazy(), MINUTES, T0 + timedelta(days=1))
    assert t.units.select("unit", "lists", "latency_ms").rows() == [("r1", 1, 7.0), ("r2", 0, 0.0), ("r3", 1, 5.0)]

# ---- the job and the commands

FILE = """[[experiment]]
name = "layout"
owner = "web team"
hypothesis = "A calmer layout brings more clicks"
primary = "ctr"
minimum_effect = 0.1
guardrails = { revenue = 0.5 }
ramp = [[2026-11-02, 1.0]]
variant = [{ name = "control" }, { name = "calm" }]
"""

@pytest.fixture
def project(tmp_path):
    "A project with the logs of an experiment; a function that writes how many people of the second variant click and are lost."
    for name in ("nbs", "constraints.txt"): (tmp_path/name).symlink_to(ROOT/name)
    (tmp_path/"settings.ini").write_text(settings_text().replace("\nfile =\n", "\nfile = e.toml\n", 1)); (tmp_path/"e.toml").write_text(FILE)
    def write(more, lost=0.0, n=3000):
        rng, step, lines, events = np.random.default_rng(0), tmp_path/"data"/"steps"/"ingest-x", [], []
        for folder in (step/"events"/"day=2026-11-02", tmp_path/"data"/"served"/"day=2026-11-02"): folder.mkdir(parents=True, exist_ok=True)
        add = lambda kind, v, at, request: events.append((str(len(events)), kind, at, at, v, None, v, "a", 1, 9.0, request, 1, None, None, True, None))
        for k in range(n):
            at, v = T0 + timedelta(days=float(rng.uniform(0, 10))), rng.choice(["control", "calm"])
            if v == "calm" and rng.random() < lost: continue
            lines.append(json.dumps(dict(request_id=f"r{k}", at=at.timestamp(), variant=f"layout:{v}", visitor_id=f"v{k}", user_id=None, items=[["a", 1, 1, []]], took_ms=8.0)))
            add("impression", f"v{k}", at, f"r{k}")
            if rng.random() < .1 * (more if v == "calm" else 1): add("click", f"v{k}", at, f"r{k}")
            if rng.random() < .2: add("purchase", f"v{k}", at + timedelta(days=1), None)
        (tmp_path/"data"/"served"/"day=2026-11-02"/"1.jsonl").write_text("\n".join(lines) + "\n")
        pl.DataFrame(events, schema=EVENT | dict(flag=pl.String), orient="row").sort("ts").write_parquet(step/"events"/"day=2026-11-02"/"events.parquet")
        pl.DataFrame(dict(item_id=["a"], category=["X"])).write_parquet(step/"items.parquet")
        NO_LINKS.write_parquet(step/"links.parquet"); (step/"ingest.json").write_text(json.dumps(dict(moment="2026-11-13T00:00:00+00:00")))
        return tmp_path
    return write

def text_of(page): return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text()))

def test_analyse_writes_a_page_that_begins_with_the_decision(project):
    folder = project(2)
    run = recsys(folder, "experiment", "analyse", "layout")
    assert run.returncode == 0 and run.stdout.startswith("Ship 'calm': clicks per impression +"), run.stderr
    page = Path(run.stdout.split("Look at ")[1].strip())
    text = text_of(page)
    assert text.index("Ship 'calm'" if "Ship 'calm'" in text else "Ship") < text.index("Sample ratio") and "always valid" in text and page.stat().st_size < 1_500_000
    assert json.loads((page.parent/"out"/"decision.json").read_text())["answer"] == "better"

def test_no_figure_is_shown_when_the_sample_ratio_is_wrong(project):
    run = recsys(project(2, lost=.2), "experiment", "analyse", "layout")
    assert run.returncode == 0 and run.stdout.startswith("No result")
    text = text_of(Path(run.stdout.split("Look at ")[1].strip()))
    assert "No figures are shown" in text and "clicks per impression" not in text.split("How this was computed")[0]

def test_commands_say_what_is_wrong_in_a_line(project):
    folder = project(1, n=10)
    assert "layout" in recsys(folder, "experiment", "list").stdout and "nothing wrong" in recsys(folder, "experiment", "check", "e.toml").stdout
    (folder/"bad.toml").write_text(FILE.replace('name = "calm"', 'name = "calm", rules = "none.toml"'))
    for args, words in ((("analyse", "nope"), "no experiment 'nope'"), (("check", "bad.toml"), "no such rules file"), (("check", "none.toml"), "no such experiment file")):
        run = recsys(folder, "experiment", *args)
        assert run.returncode == 1 and words in run.stderr and run.stderr.count("\n") == 1 and run.stdout == ""
    run = recsys(folder, "experiment", "list", env=dict(RECSYS_EXPERIMENTS_FILE=""))
    assert run.returncode == 1 and "no experiment file is named" in run.stderr

# ---- the gate over a real engine

def test_the_gate_asks_the_engine_what_it_would_have_shown(tmp_path):
    publish(tmp_path); b = open_bundle(tmp_path/"bundles"/"v1")
    engine, rng, lines, events, shown_as = Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b), np.random.default_rng(0), [], [], []
    for k in range(400):
        request = Request(visitor_id=f"v{k % 50}", user_id=f"u{k % 20}", n=5)
        own = recommend(engine, request, "r").items[4].item_id
        item = own if rng.random() < .5 else "i0" if own != "i0" else "i1"
        at = T0 + timedelta(minutes=k); shown_as.append(own)
        lines.append(json.dumps(dict(request_id=f"r{k}", at=at.timestamp(), variant="default", visitor_id=request.visitor_id, user_id=request.user_id, model_version="v0", level=0, asked=0,
                                     request=json.loads(msgspec.json.encode(request)), items=[["x", 1, 1, []]] * 4 + [[item, 1, .5, []]])))
        events.append((f"i{k}", "impression", at, at, request.visitor_id, None, "s", item, 1, None, f"r{k}", 5, None, None, True))
        if rng.random() < (.5 if item == own else .1): events.append((f"c{k}", "click", at, at, request.visitor_id, None, "s", item, 1, None, f"r{k}", 5, None, None, True))
    (tmp_path/"data"/"served"/"day=2026-11-02").mkdir(parents=True); (tmp_path/"data"/"served"/"day=2026-11-02"/"1.jsonl").write_text("\n".join(lines) + "\n")
    log = pl.DataFrame(events, schema=EVENT, orient="row").lazy()
    places, asked = explored(tmp_path/"data", T0)
    assert would_show(engine, asked, places) == shown_as and len(places) == 400 and {p.place for p in places} == {4}
    said = gate_of(engine, tmp_path/"data", log, 30, T0 + timedelta(days=1), margin=.05)
    assert said.overlap.rows == 400 and said.relative > .3 and said.verdict == "unknown" and "effective" in said.sentence # 200 effective rows are few
    late = clicked(places, log, 30, T0 + timedelta(minutes=200))
    assert np.isnan(late[-1]) and not np.isnan(late[0])
    with pytest.raises(RecsysError, match="nothing was explored"): gate_of(engine, tmp_path/"data", log, 30, T0 + timedelta(days=90))
    step = tmp_path/"data"/"steps"/"ingest-x"; (step/"events"/"day=2026-11-02").mkdir(parents=True)
    log.with_columns(flag=pl.lit(None, pl.String)).sink_parquet(step/"events"/"day=2026-11-02"/"events.parquet"); (step/"ingest.json").write_text(json.dumps(dict(moment=(T0 + timedelta(days=1)).isoformat())))
    (tmp_path/"bundles").rename(tmp_path/"data"/"bundles"); (tmp_path/"settings.ini").write_text(settings_text())
    run = recsys(tmp_path, "experiment", "gate", "v1", env=dict(RECSYS_CANDIDATES_PER_SOURCE=str(PER_SOURCE), RECSYS_CANDIDATES_BUDGET=str(BUDGET)))
    assert run.returncode == 4 and run.stdout.startswith("unknown: No answer") and "400 explored places" in run.stdout, run.stderr
    run = recsys(tmp_path, "experiment", "gate", "v9")
    assert run.returncode == 1 and "no version 'v9'" in run.stderr

def test_the_version_that_explored_is_weighed_as_one_on_average(tmp_path):
    publish(tmp_path); b = open_bundle(tmp_path/"bundles"/"v1")
    engine, lines, greedy = Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b), [], {}
    asks = {f"r{k}": Request(visitor_id=f"v{k}", user_id=f"u{k % 20}", n=5) for k in range(800)}
    for r, request in asks.items(): greedy[r] = recommend(engine, request, r).items[4].item_id
    engine.use(Rules(exploration=Exploration(places=1, epsilon=.5, temperature=1, pool=5)))
    for r, request in asks.items():
        items = [[s.item_id, s.score, s.propensity, []] for s in recommend(engine, request, r).items]
        lines.append(json.dumps(dict(request_id=r, at=T0.timestamp(), variant="default", visitor_id=request.visitor_id, request=json.loads(msgspec.json.encode(request)), items=items)))
    (tmp_path/"data"/"served"/"day=2026-11-02").mkdir(parents=True); (tmp_path/"data"/"served"/"day=2026-11-02"/"1.jsonl").write_text("\n".join(lines) + "\n")
    places, asked = explored(tmp_path/"data", T0)
    shown = would_show(engine, asked, places)
    assert len(places) > 700 and shown == [greedy[p.request_id] for p in places] and engine.rules.exploration
    w = gate_rows(places, shown, np.zeros(len(places))).w
    assert .05 < (w == 0).mean() and abs(w.mean() - 1) < 4 * w.std() / np.sqrt(len(w))

def test_daily_looks_at_units_that_are_still_buying_are_seldom_wrong():
    "Each unit buys within a week of its exposure or never; all of them are looked at again every day, as shares of units."
    rng, days, per_day, sims, p = np.random.default_rng(4), 28, 200, 1500, .1
    lag = np.exp(-np.arange(8) / 2); lag /= lag.sum()
    share = np.minimum(1, np.cumsum(lag))                                # of the purchases that a unit of that age has shown
    def looks():
        came = rng.multinomial(per_day, np.r_[p * lag, 1 - p], (sims, days))[..., :8]   # purchases of each day's units by lag
        out = np.zeros((sims, days, 5))
        for d in range(days):
            for c in range(d + 1):
                age = min(7, d - c); x, y = came[:, c, :age + 1].sum(-1), share[age]
                out[:, d] += np.stack([x, np.full(sims, per_day * y), x, np.full(sims, per_day * y * y), x * y], -1)
        return out
    n = np.arange(1, days + 1) * per_day
    z = np.abs(z_of(looks(), looks(), n, n))
    assert (z > multiplier(2 * n, 2 * n[-1])).any(1).mean() < .03 and (z > 1.96).any(1).mean() > .15

def test_the_bench_and_its_page_do_without_real_data(tmp_path):
    for name in ("nbs", "constraints.txt"): (tmp_path/name).symlink_to(ROOT/name)
    (tmp_path/"settings.ini").write_text(settings_text())
    run = recsys(tmp_path, "bench", "experiments", "--out", "f.json", "--tests", 20, "--ids", 1000)
    assert run.returncode == 0 and "not at hand" in run.stdout, run.stderr
    said = json.loads((tmp_path/"f.json").read_text())
    assert {"aa_false_positive_rate", "peeking_false_positive_rate", "srm_false_alarm_rate", "srm_power", "power_gap", "asos_agreement", "asos_days_saved", "obd_relative_error", "assignment_us"} <= said.keys()
    assert said["asos_agreement"] is None and said["aa_tests"] == 20
    assert "not measured" in text_of(tmp_path/"reports"/"benchmarks"/"experiments.html")
