"Drift statistics, comparisons and attributions: against scipy and brute force, under no drift, and with planted drift."
import json, subprocess, sys
from datetime import datetime, timedelta

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon

from recsys.core.settings import RecsysError
from recsys.monitoring import attribution as at, drift as dr, statistics as ms


def summed(reference, current, **kw):
    "Frozen column x and the two windows' counts, for arrays."
    a, b = pl.DataFrame({"x": reference}), pl.DataFrame({"x": current})
    f = ms.freeze(a, also=[b], **kw)
    return f["x"], ms.count(a, f)["x"], ms.count(b, f)["x"]


def w1(f, r, c):
    return float(ms.wasserstein(r.cells.sum(0), c.cells.sum(0), r.offsets.sum(0), c.offsets.sum(0), f.edges, f.scale))


# ---- distances against scipy ----

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=200), st.lists(st.integers(0, 10_000), min_size=1, max_size=200))
def test_few_values_are_exact(a, picks):
    "Where every current value is one of the reference's, KS, W1 and JS are scipy's to 1e-12."
    values = sorted(set(a))
    b = [values[p % len(values)] for p in picks]
    f, r, c = summed(np.array(a, float), np.array(b, float))
    rc, cc = r.cells.sum(0), c.cells.sum(0)
    assert rc.sum() == len(a) and cc.sum() == len(b)
    assert ms.ks(rc, cc) == pytest.approx(stats.ks_2samp(a, b, method="asymp").statistic, abs=1e-12)
    if f.scale > 0: assert w1(f, r, c) * f.scale == pytest.approx(stats.wasserstein_distance(a, b), abs=1e-12 * 100)
    p, q = ([np.mean(np.array(x) == v) for v in values] for x in (a, b))
    assert ms.jensen_shannon(rc, cc) == pytest.approx(jensenshannon(p, q, base=2), abs=1e-7)   # scipy takes roots of rounding errors
    assert ms.jensen_shannon(rc, cc)**2 == pytest.approx(jensenshannon(p, q, base=2)**2, abs=1e-12)


@pytest.mark.parametrize("shift,n,m", [(0, 3000, 2500), (.05, 20_000, 5000), (2, 500, 30_000), (-8, 4000, 4000)])
def test_many_values_are_close_and_never_above(shift, n, m):
    rng = np.random.default_rng(int(n + 10 * shift))
    a, b = rng.normal(size=n), rng.normal(shift, 1.3, m)
    f, r, c = summed(a, b)
    exact_ks, exact_w1 = stats.ks_2samp(a, b, method="asymp").statistic, stats.wasserstein_distance(a, b) / a.std()
    grid = float(ms.ks(r.cells.sum(0), c.cells.sum(0)))
    assert exact_ks - 1 / 1022 - 1e-9 <= grid <= exact_ks + 1e-12
    assert exact_w1 * .995 - 1e-4 <= w1(f, r, c) <= exact_w1 + 1e-4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=2, max_size=30))
def test_chi2_and_pooling(cells):
    a, b = np.array(cells).T
    if not a.sum() or not b.sum(): return
    g = ms.pool_rare(a, b)
    ra, rb = ms.regroup(a, g), ms.regroup(b, g)
    assert ra.sum() == a.sum() and rb.sum() == b.sum() and (np.unique(g) == np.arange(g.max() + 1)).all()
    if len(ra) < 2: return
    value, df = ms.chi2(ra, rb)
    oracle = stats.chi2_contingency(np.stack([ra, rb]), correction=False)
    assert value == pytest.approx(oracle.statistic, rel=1e-12, abs=1e-12) and df == oracle.dof
    assert oracle.expected_freq.min() >= 5 - 1e-9
    weights = 1 / ((ra + rb) / (ra + rb).sum() * (1 / ra.sum() + 1 / rb.sum()))
    d = ms.contributions(ra[None], rb[None])
    assert ms.statistics(ms.Test("t", d, weights), np.ones((1, 1)))[0] == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_psi_formula_noise_and_coarse_bins():
    a, b = np.array([100, 200, 700]), np.array([20, 40, 40])
    p, q = a / a.sum(), b / b.sum()
    corrected, plain = ms.psi(a, b)
    assert plain == pytest.approx(((p - q) * np.log(p / q)).sum(), abs=1e-12)
    assert corrected == pytest.approx(plain - 2 * (1 / 1000 + 1 / 100), abs=1e-12)
    draws = np.random.default_rng(0).multinomial(2000, np.ones(20) / 20, (2, 500))
    noise = ms.psi(draws[0], draws[1])[1].mean()
    assert noise == pytest.approx(19 * 2 / 2000, rel=.05)          # the expectation that is subtracted
    _, r, _ = summed(np.random.default_rng(1).normal(size=5000), np.zeros(1))
    ten = ms.regroup(r.cells.sum(0), ms.coarse(r.cells.sum(0), 10))
    assert len(ten) == 12 and ten[0] == ten[-1] == 0 and ten[1:-1].min() > 480


# ---- counting ----

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2), min_size=30, max_size=120))
def test_counts_merge_in_any_order(seed, part):
    rng, n = np.random.default_rng(seed), len(part)
    x = rng.choice([np.nan, np.inf, -np.inf, 0., 1.5, -7, 1e6], n) + rng.normal(size=n)
    words = [("a", "b", None, "new")[i] for i in rng.integers(0, 4, n)]
    frame = pl.DataFrame({"u": rng.integers(0, 9, n), "x": x, "c": words, "part": part})
    f = ms.freeze(frame.filter(pl.col("c").fill_null("") != "new"), "u")
    f.pop("part")
    a, b, c = (ms.count(frame.filter(part=i), f, "u") for i in range(3))
    whole = ms.count(frame, f, "u")
    for name in f:
        for merged in ((a[name] + b[name]) + c[name], a[name] + (c[name] + b[name])):
            for field in ms.Counts.__struct_fields__: assert (getattr(merged, field) == getattr(whole[name], field)).all(), (name, field)
        assert whole[name].cells.sum() + whole[name].missing.sum() == n
    assert whole["c"].unseen.sum() == (frame["c"] == "new").sum()


def test_buckets_are_the_same_everywhere():
    known = [51, 0, 62]
    assert ms.bucket_of(pl.Series(["ann", "bob", "eve"])).tolist() == known
    code = "import polars as pl; from recsys.monitoring.statistics import bucket_of; print(bucket_of(pl.Series(['ann', 'bob', 'eve'])).tolist())"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7", "PATH": ""})
    assert elsewhere.stdout.strip() == str(known)
    assert np.bincount(ms.bucket_of(pl.Series(range(64_000))), minlength=64).std() < 40
    with pytest.raises(RecsysError, match="unit"): ms.bucket_of(pl.Series([1.5]))


def test_novelty_is_judged_without_the_own_bucket():
    units = [u for u in map(str, range(200)) if ms.bucket_of(pl.Series([u]))[0] in (1, 2)][:6]
    bucket = ms.bucket_of(pl.Series(units))
    one, two = ([u for u, b in zip(units, bucket) if b == k][0] for k in (1, 2))
    reference = pl.DataFrame({"u": [one, one, two], "c": ["private", "shared", "shared"]})
    f = ms.freeze(reference, "u")
    assert ms.count(reference, f, "u")["c"].novel.sum() == 1                                      # private, in its own bucket
    now = ms.count(pl.DataFrame({"u": [one, two, two], "c": ["private", "private", "never"]}), f, "u")["c"]
    assert (now.novel[1], now.novel[2], now.unseen.sum()) == (1, 1, 1)


# ---- family-wise tests ----

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_flips_of_equal_buckets_are_exchanges_of_counts(seed):
    rng = np.random.default_rng(seed)
    r = rng.multinomial(30, np.ones(6) / 6, 64)
    c = rng.multinomial(30, np.ones(6) / 6, 64)
    signs = ms.coins(20, 64, seed)
    d = np.cumsum(ms.contributions(r, c), 1)
    for s, t in zip(signs, ms.statistics(ms.Test("t", d), signs)):
        stay = (s > 0)[:, None]
        exchanged = ms.ks(np.where(stay, r, c).sum(0), np.where(stay, c, r).sum(0))
        assert np.sqrt(t) == pytest.approx(exchanged, abs=1e-12)


def test_max_t_against_brute_force():
    squares = np.random.default_rng(0).chisquare([1, 2, 5, 40], (200, 4)) * [1, 100, 1e-6, 3]
    squares[0] = np.quantile(squares[1:], .99, axis=0) * [1.5, 1, 1.2, .3]
    z, p = ms.normal_scores(squares), ms.max_t(squares)
    order, worst = sorted(range(4), key=lambda j: -z[0, j]), 0
    for i, j in enumerate(order):
        reached = 1 + sum(max(row[k] for k in order[i:]) >= z[0, j] for row in z[1:])
        worst = max(worst, reached / 200)
        assert p[j] == pytest.approx(worst)
    assert np.abs(z[1:].mean(0)).max() < .2 and np.abs(z[1:].std(0) - 1).max() < .2
    assert ms.max_t(np.ones((100, 2))).tolist() == [1, 1] and len(ms.max_t(np.ones((10, 0)))) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(.3, 6))
def test_max_t_is_exact(seed, tests, tail):
    "Whichever throw is the observed one: not more than a twentieth of them have a p of at most .05, with tails of any weight."
    rng = np.random.default_rng(seed)
    squares = rng.lognormal(0, tail, (100, tests)) * (rng.random((100, tests)) < rng.choice([.1, 1.], tests))
    reached = sum(ms.max_t(np.roll(squares, -k, axis=0)).min() <= .05 for k in range(100))
    assert reached <= 5


def test_a_huge_drift_hides_no_other():
    squares = np.random.default_rng(0).chisquare(1, (1000, 4))
    squares[0] = [1e6, 2500, 40, 1]
    assert (ms.max_t(squares) <= .01).tolist() == [True, True, True, False]


def test_holm():
    assert ms.holm(np.array([.01, .04, .03, .005])) == pytest.approx([.03, .06, .06, .02])


def window(rng, level, n, first=0, icc=.3):
    who = rng.integers(0, len(level), n)
    x = np.sqrt(icc) * level[who] + np.sqrt(1 - icc) * rng.normal(size=(n, level.shape[1]))
    brand = np.minimum(rng.zipf(1.7, n), 3000)
    return pl.DataFrame({"user": who + first, **{f"x{i}": x[:, i] for i in range(level.shape[1])}, "brand": brand.astype(str)})


@pytest.mark.parametrize("paired,ratio", [(True, 1), (False, 1), (True, .25), (False, .1)])
def test_no_drift_no_alarm(paired, ratio):
    "At 5 % at most 7 of 40 reports raise a finding (binomial: 99.9 %); rows taken as independent do so most of the time."
    rng, hits, naive = np.random.default_rng(11), 0, 0
    for run in range(40):
        mine = rng.normal(size=(200, 4))
        a = window(rng, mine, 3000)
        b = window(rng, mine if paired else rng.normal(size=(200, 4)), int(3000 * ratio), 0 if paired else 10**6)
        f = ms.freeze(a, "user", [b], edges=127)
        r, c = ms.count(a, f, "user"), ms.count(b, f, "user")
        hits += min(v for p in ms.family(f, r, c, 199, run).values() for v in p.values()) <= .05
        naive += min(v for p in ms.independent_family(f, r, c).values() for v in p.values()) <= .05
    assert hits <= 7
    if not paired and ratio == 1: assert naive >= 20


def test_independent_rows_without_a_unit():
    rng, hits = np.random.default_rng(3), 0
    for run in range(40):
        make = lambda: pl.DataFrame({**{f"x{i}": rng.normal(size=800) for i in range(6)}, "c": np.minimum(rng.zipf(2, 800), 200).astype(str)})
        a, b = make(), make()
        f = ms.freeze(a, also=[b]); r, c = ms.count(a, f), ms.count(b, f)
        hits += min(v for p in ms.independent_family(f, r, c).values() for v in p.values()) <= .05
    assert hits <= 7
    assert dr.compare(a, b).assumption.startswith("Rows are taken as independent")
    users = lambda f: f.with_columns(u=pl.Series([None] * 3 + list(range(797))))
    assert dr.compare(users(a), users(b), "u").assumption.endswith("6 rows without a unit are taken as independent.")


# ---- compare ----

def shop(n, seed, shift=0., missing=.1, new=0., users=1500):
    rng = np.random.default_rng(seed)
    who, own = rng.integers(0, users, n), np.random.default_rng(5).normal(size=(users, 6))
    x = np.sqrt(.3) * own[who] + np.sqrt(.7) * rng.normal(size=(n, 6))
    x[:, 0] += shift
    hole = rng.random(n) < missing
    return pl.DataFrame({"user": who, "mean": x[:, 0], "holes": np.where(hole, np.nan, x[:, 1]), "count": rng.poisson(2, n),
                         "brand": np.where(rng.random(n) < new, "brand new", np.minimum(rng.zipf(1.8, n), 900).astype(str)),
                         **{f"calm{i}": x[:, i] for i in range(2, 6)}, "flag": rng.random(n) < .3})


@pytest.mark.parametrize("unit", ["user", None])
def test_planted_drifts_are_found(unit):
    a, b = shop(15_000, 1), shop(8000, 2, shift=.3, missing=.2, new=.03)
    drop = [] if unit else ["user"]
    report = dr.compare(a.drop(drop), b.drop(drop), unit)
    by = {c.name: c for c in report.columns}
    assert report.alarm and {c.name for c in report.columns if c.verdict == "material"} == {"mean", "holes", "brand"}
    assert report.sentence.startswith("3 of 9 inputs moved materially: ") and all(n in report.sentence for n in ("mean", "holes", "brand"))
    assert {by[f"calm{i}"].verdict for i in range(2, 6)} | {by["count"].verdict, by["flag"].verdict} <= {"stable", "not enough data"}
    assert by["mean"].effect_name == "wasserstein" and by["mean"].effect_low < .3 < by["mean"].effect_high
    assert by["holes"].effect_name == "missing" and by["holes"].missing_delta == pytest.approx(.1, abs=.02)
    assert by["brand"].effect_name == "unseen" and by["brand"].unseen_values[0] == "brand new"
    assert by["brand"].unseen_share > .025 and by["mean"].p_adjusted <= .01


def test_real_but_immaterial_and_not_enough_data():
    a, b = shop(60_000, 1), shop(60_000, 2, shift=.035)
    x = next(c for c in dr.compare(a, b, "user").columns if c.name == "mean")
    assert x.verdict == "moved but immaterial" and x.p_adjusted <= .01 and x.effect_low < x.limit
    few = dr.compare(shop(150, 3), shop(100, 4), "user")
    assert not few.alarm and {c.verdict for c in few.columns} >= {"not enough data"}


def test_past_windows_set_the_limit():
    shifts = (-.15, .1, .12, -.08, .02)
    a, b, past = shop(15_000, 1), shop(8000, 2, shift=.2), [shop(8000, 10 + i, shift=s) for i, s in enumerate(shifts)]
    pick = lambda r: next(c for c in r.columns if c.name == "mean")
    alone, seen = pick(dr.compare(a, b, "user")), dr.compare(a, b, "user", past)
    assert alone.verdict == "material" and alone.natural is None and alone.limit == .04
    assert pick(seen).verdict == "moved but immaterial" and pick(seen).natural > .15 and seen.past_windows == 5
    assert dr.natural_limit([]) is None and dr.natural_limit([.1, .3]) == .3
    x = np.array([.1, .2, .4, .1])
    assert dr.natural_limit(list(x)) == pytest.approx(x.mean() + stats.t.ppf(.995, 3) * x.std(ddof=1) * np.sqrt(1.25))


def test_report_is_deterministic_and_json():
    a, b = shop(3000, 1), shop(2000, 2, shift=.4)
    one = dr.to_dict(dr.compare(a, b, "user"))
    two = dr.to_dict(dr.compare(a.sample(fraction=1, shuffle=True, seed=3), b.sample(fraction=1, shuffle=True, seed=4), "user"))
    assert one == two                                              # the order of the rows does not matter
    text = json.dumps(one, allow_nan=False)
    assert json.loads(text) == one and one["schema"] == dr.SCHEMA and dr.to_dict(msgspec.json.decode(text, type=dr.Comparison)) == one
    for c in one["columns"]:
        h = c["histogram"]
        assert sum(h["reference"]) == pytest.approx(1, abs=1e-4) and sum(h["current"]) == pytest.approx(1, abs=1e-4)
        assert len(h["reference"]) == len(h["current"]) == (len(h["edges"]) + 1 if h["edges"] else len(h["names"]))


def test_odd_columns():
    n, day = 300, datetime(2026, 1, 1)
    a = pl.DataFrame({"user": range(n), "same": 5, "fell": 5, "empty": pl.Series([None] * n, dtype=pl.Float64), "untyped": [None] * n,
                      "filled": [None] * n, "emptied": range(n), "inf": [float("inf"), 1.0] * (n // 2), "huge": [1e308, -1e308] * (n // 2),
                      "gone": "x", "type": range(n), "list": [[1]] * n, "ts": [day + timedelta(hours=i) for i in range(n)],
                      "flag": [True, False] * (n // 2), "grown": pl.Series([i % 100 for i in range(n)], dtype=pl.Int8)})
    b = a.drop("gone").with_columns(
        pl.lit(4).alias("fell"), pl.Series("filled", range(n)), pl.lit(None).alias("emptied"), pl.lit("7").alias("type"), pl.lit(1).alias("new"),
        pl.col("ts") + timedelta(days=60), pl.col("grown").cast(pl.Float32))
    report = dr.compare(a, b, "user")
    verdict = {c.name: c.verdict for c in report.columns}
    assert {k for k, v in verdict.items() if v == "material"} == {"fell", "filled", "emptied", "gone", "type"}
    assert {k for k, v in verdict.items() if v == "not enough data"} == {"list", "new"} and verdict["ts"] == "moved but immaterial"
    note = {c.name: c.note for c in report.columns}
    assert "gone" in note["gone"] and "new" in note["new"] and "Int64 to String" in note["type"] and "infinite" in note["inf"]
    json.dumps(dr.to_dict(report), allow_nan=False)


def test_too_little():
    a = shop(500, 1)
    for b in (a.clear(), a[:1], a.with_columns(user=1)):
        r = dr.compare(a, b, "user")
        assert not r.alarm and r.sentence.startswith("No verdict") and {c.verdict for c in r.columns} == {"not enough data"}
    assert dr.compare(a.clear(), a, "user").alarm is False
    assert dr.compare(pl.DataFrame(), pl.DataFrame()).columns == []
    assert dr.compare(a, a, "user").alarm is False


@pytest.mark.parametrize("change,what", [(dict(unit="nobody"), "nobody"), (dict(current=shop(9, 1).lazy()), "LazyFrame"), (dict(alpha=2), "alpha"),
                                         (dict(alpha=.001, permutations=99), "permutations"), (dict(past=[shop(9, 1).drop("user")]), "user")])
def test_clear_errors(change, what):
    a = shop(50, 1)
    with pytest.raises(RecsysError, match=what): dr.compare(**{"reference": a, "current": a, "unit": "user", **change})


ODD = st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.integers(-2**60, 2**60)), max_size=40)

@settings(max_examples=25, deadline=None)
@given(ODD, ODD, st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=40), st.booleans())
def test_whatever_comes_in_a_report_comes_out(x, y, text, unit):
    words = text or ["-"]
    frame = lambda v: pl.DataFrame({"u": [i % 7 for i in range(len(v))], "x": v, "t": [words[i % len(words)] for i in range(len(v))]},
                                   schema={"u": pl.Int64, "x": pl.Float64, "t": pl.String}, strict=False)
    r = dr.compare(frame(x), frame(y), "u" if unit else None, alpha=.05, permutations=39, resamples=20, min_units=2)
    assert len(r.columns) == (2 if unit else 3) and {c.verdict for c in r.columns} <= set(dr.VERDICTS)
    json.dumps(dr.to_dict(r), allow_nan=False)


# ---- attribution ----

@pytest.fixture(scope="module")
def model():
    import lightgbm as lgb
    rng = np.random.default_rng(0)
    X = np.c_[rng.normal(size=(4000, 4)), rng.integers(0, 8, 4000)]
    X[rng.random(X.shape) < .05] = np.nan
    y = np.nan_to_num(X[:, 0]) - .7 * np.nan_to_num(X[:, 1]) + (X[:, 4] == 3) + rng.normal(size=4000) > 0
    plan = dict(objective="binary", num_leaves=15, verbose=-1, num_threads=1, seed=1)
    return lgb.train(plan, lgb.Dataset(X, y.astype(int), categorical_feature=[4]), 30), X


def test_collapse(model):
    booster, X = model
    names, quiet, broken = list("abcde"), X[2000:].copy(), X[2000:].copy()
    broken[:, 1] = np.nan
    before = at.shap_values(booster, X[:2000])
    calm = at.attribution_drift(before, at.shap_values(booster, quiet), names, range(2000), range(2000))
    assert not any(d["collapsed"] for d in calm) and sum(d["share_before"] for d in calm) == pytest.approx(1)
    found = {d["name"]: d for d in at.attribution_drift(before, at.shap_values(booster, broken), names)}
    assert [n for n in names if found[n]["collapsed"]] == ["b"]
    b = found["b"]
    assert b["share_before_low"] < b["share_before"] < b["share_before_high"]
    assert b["share_delta_high"] < 0 and b["rank_before"] == 2 < b["rank_after"]
    json.dumps(list(found.values()), allow_nan=False)
    with pytest.raises(RecsysError): at.attribution_drift(before, before[:0], names)
    with pytest.raises(RecsysError, match="unit ids"): at.attribution_drift(before, before, names, [1], [2])


def test_trend_and_segments(model):
    "What broke for a third of the users, in the third week: the trend dates it, the segments place it."
    booster, X = model
    names, rng = list("abcde"), np.random.default_rng(3)
    weeks, kinds = [X[i * 1000:(i + 1) * 1000].copy() for i in range(4)], [rng.integers(0, 3, 1000) for _ in range(4)]
    for x, k in zip(weeks[2:], kinds[2:]): x[k == 1, 1] = np.nan
    phi = {f"w{i}": at.shap_values(booster, x) for i, x in enumerate(weeks)}
    trend = at.attribution_trend(phi, names, {w: np.arange(1000) // 2 for w in phi})
    b = {t["window"]: t for t in trend if t["name"] == "b"}
    assert len(trend) == 20 and b["w0"]["ndcg"] == 1 and b["w2"]["share_high"] < b["w0"]["share_low"] and b["w1"]["share_high"] > b["w0"]["share_low"]
    assert all(np.diff(t["quantiles"]).min() >= 0 and t["share_low"] <= t["share"] <= t["share_high"] for t in trend)
    assert all(sum(t["share"] for t in trend if t["window"] == w) == pytest.approx(1) for w in phi)
    found = at.attribution_by_segment(phi["w0"], phi["w3"], names, (kinds[0], kinds[3]))
    assert [(f["segment"], f["collapsed"]) for f in found if f["collapsed"]] == [("1", ["b"])]
    assert at.collapse_sentence(at.attribution_drift(phi["w0"], phi["w3"], names), found).count("b where 1") == 1
    few = at.attribution_by_segment(phi["w0"], phi["w3"], names, (kinds[0], kinds[3]), (np.arange(1000) % 40, np.arange(1000)))
    assert not any(f["judged"] or f["collapsed"] for f in few)               # 40 users are too few
    gone = at.attribution_by_segment(phi["w0"], phi["w3"], names, (np.full(1000, "old"), np.full(1000, "new")))
    assert [(f["segment"], f["rows_before"], f["rows_after"], f["judged"]) for f in gone] == [("new", 0, 1000, False), ("old", 1000, 0, False)]
    json.dumps([trend, found, few, gone], allow_nan=False)


def test_what_was_so_low_before_has_not_collapsed(model):
    "A share that fell as low on an ordinary day, everywhere or in a segment, is no news; a segment without a past is not judged."
    booster, X = model
    names, rng, broken = list("abcde"), np.random.default_rng(5), X[3000:].copy()
    broken[:, 1] = np.nan
    full, also, empty = (at.shap_values(booster, x) for x in (X[:1000], X[1000:2000], broken))
    fallen = lambda past: [d["name"] for d in at.attribution_drift(full, empty, names, past=past) if d["collapsed"]]
    assert fallen(()) == fallen([also]) == fallen([also, full]) == ["b"] and fallen([also, empty]) == []
    kinds = rng.integers(0, 2, 1000)
    parts = lambda past: {f["segment"]: (f["judged"], f["collapsed"]) for f in at.attribution_by_segment(full, empty, names, (kinds, kinds), past=past)}
    assert parts(()) == parts([(also, kinds)]) == dict.fromkeys("01", (True, ["b"]))
    assert parts([(also, kinds), (empty[kinds == 1], kinds[kinds == 1])]) == {"0": (True, ["b"]), "1": (True, [])}
    assert parts([(also[kinds == 1], kinds[kinds == 1])]) == {"0": (False, []), "1": (True, ["b"])}


def test_segments_cry_wolf_seldom(model):
    "No drift, 12 segments: over 40 reports hardly a change whose interval leaves out zero counts as a collapse."
    booster, X = model
    phi, rng = at.shap_values(booster, X), np.random.default_rng(4)
    false = 0
    for _ in range(40):
        order = rng.permutation(len(X))
        a, b = order[:2000], order[2000:]
        false += any(f["collapsed"] for f in at.attribution_by_segment(phi[a], phi[b], list("abcde"), (rng.integers(0, 12, 2000), rng.integers(0, 12, 2000))))
    assert false == 0


def test_ndcg_as_clarify():
    before, after = [.7, .5, .05], [.1, .2, .7]
    best = .7 / np.log2(2) + .5 / np.log2(3) + .05 / np.log2(4)
    assert at.ndcg(before, after) == pytest.approx((.05 / np.log2(2) + .5 / np.log2(3) + .7 / np.log2(4)) / best)
    assert at.ndcg(before, before) == 1 == at.ndcg([0, 0], [1, 2])


def test_impact(model):
    booster, X = model
    names, before, later = list("abcde"), X[:2000], X[2000:].copy()
    phi = at.shap_values(booster, before)
    calm = at.impact(before, phi, later, names)
    assert all(r["impact"] < 4 * r["noise"] + 1e-9 for r in calm)
    later[:, 0] += 1; later[:, 3] += 3                              # a matters, d does not
    found = at.impact(before, phi, later, names)
    assert [r["name"] for r in found][0] == "a" and next(r for r in found if r["name"] == "d")["impact"] < found[0]["impact"] / 3
    shift = booster.predict(later, raw_score=True).mean() - booster.predict(before, raw_score=True).mean()
    assert sum(r["shift"] for r in found) == pytest.approx(shift, abs=.15 * abs(shift))


def test_imports_stay_light():
    heavy = "[m for m in ('shap', 'lightgbm', 'altair', 'pandas') if m in sys.modules]"
    code = f"import sys; import recsys.monitoring.attribution, recsys.monitoring.drift, recsys.monitoring.shap; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
