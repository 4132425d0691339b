"Concept drift: against simulations whose truth is known, brute force, and no drift at all."
import json, os
from datetime import datetime, timedelta, timezone

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.monitoring import concept as co

START = datetime(2026, 3, 1)


def late_shop(seed, n=8000, rate=.1, days=20., window=7., mean=2., grows=0.):
    "Impressions with delayed purchases, as `outcomes` gives them at the end; the truth is the rate within the window."
    rng = np.random.default_rng(seed)
    day, took = np.sort(rng.random(n) * days), rng.exponential(mean, n)
    bought = (rng.random(n) < rate * (1 + grows * (day > days - 2))) & (took <= window)
    seen = bought & (day + took <= days)
    at = [START + timedelta(days=d) for d in day]
    when = pl.Series([a + timedelta(days=t) if s else None for a, t, s in zip(at, took, seen)], dtype=pl.Datetime("us"))
    rows = pl.DataFrame(dict(visitor_id=[f"v{v}" for v in rng.integers(0, n // 4, n)], ts=at, purchase=seen.astype(int), purchase_ts=when, purchase_complete=day + window <= days))
    return rows, START + timedelta(days=days), int(window * 1440), rate * (1 - np.exp(-window / mean))


def test_delayed_outcomes_are_corrected():
    "Of 20 shops and 20 days, about 95 % of the intervals hold the truth; what is seen so far is far below it on the last days."
    inside, bias, raw = [], [], []
    for seed in range(20):
        rows, end, minutes, truth = late_shop(seed)
        t = co.corrected_rates(rows, "purchase", minutes, end, resamples=100)
        inside += ((t["low"] <= truth) & (t["high"] >= truth)).to_list()
        bias.append(t["rate"].tail(4).mean() / truth - 1); raw.append(t["seen"].tail(4).mean() / truth - 1)
        assert (t["ripe"].head(12) == 1).all() and (t["seen"].head(12) == t["rate"].head(12)).all() and t["ripe"][-1] < .4
    assert .90 <= np.mean(inside) <= .99 and abs(np.mean(bias)) < .05 and np.mean(raw) < -.3


def test_a_real_rise_shows_before_the_window_has_passed():
    rows, end, minutes, truth = late_shop(1, n=40_000, grows=1.)
    t = co.corrected_rates(rows, "purchase", minutes, end)
    assert t["low"][-2] > truth * 1.3 and t["seen"][-1] < truth


def test_too_few_outcomes_are_an_error():
    rows, end, minutes, _ = late_shop(2, n=100)
    with pytest.raises(RecsysError, match="outcomes `purchase`"): co.corrected_rates(rows, "purchase", minutes, end)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 100), max_size=30), st.lists(st.floats(0, 200), min_size=1, max_size=20))
def test_ripe_is_the_share_that_arrived(delays, ages):
    found = co.ripe(np.sort(delays), np.array(ages), 100.)
    for a, f in zip(ages, found):
        want = 1 if a >= 100 else (np.mean(np.array(delays) <= a) if delays else a / 100)
        assert f == pytest.approx(want)


def shop(seed, n=9000, late=0., days=30, clumsy=0.):
    "Impressions with true probabilities (visitors differ by `clumsy`); in the app outcomes are rarer by `late` from the middle on."
    rng = np.random.default_rng(seed)
    visitor = rng.integers(0, n // 10, n)
    p, day = rng.beta(1.5, 8, n), np.sort(rng.random(n) * days)
    true = p * np.exp(rng.normal(-clumsy**2 / 2, clumsy, n // 10))[visitor].clip(0, 3) * np.where((visitor % 2 == 1) & (day > days / 2), 1 - late, 1)
    return pl.DataFrame(dict(ts=[START + timedelta(days=d) for d in day], visitor_id=visitor, position=rng.integers(1, 6, n),
                             device=np.where(visitor % 2 == 1, "app", "web"), probability=p, outcome=(rng.random(n) < true).astype(int)))


def test_the_alarm_budget_holds():
    "Without drift, visitors alike or not: of 20 reports with 3 streams at most a few alarm (budget 5 %: more than 4 of 20 have a chance of .3 %)."
    found = [co.concept_drift(shop(100 + s, 2500, clumsy=.5 * (s % 2)), ["device"], seed=s) for s in range(20)]
    assert sum(any(f["since"] for f in r["findings"]) for r in found) <= 4
    assert all(r["false_alarms"] <= r["budget"] for r in found if r["delta"] > co.DELTAS[-1])


def test_a_changed_segment_is_found_and_dated():
    found = [co.concept_drift(shop(200 + s, 12_000, late=.4), ["device"], seed=s) for s in range(6)]
    app = [next(f for f in r["findings"] if f["segment"] == "device = app") for r in found]
    assert all(a["since"] for a in app)
    assert np.median([abs((datetime.fromisoformat(a["since"]) - START).days - 15) for a in app]) <= 2
    assert all(.85 < a["before"] < 1.15 and .45 < a["after"] < .8 and a["skill"] > 0 for a in app)
    assert all("device = app" in r["sentence"] and "yesterday" in r["sentence"] for r in found)
    json.dumps(found, allow_nan=False)


def test_young_impressions_do_not_alarm():
    "The purchases of the last days have not come yet: with `ripe` that is no drift, without it is."
    rows, end, minutes, truth = late_shop(5, n=12_000, rate=.3)
    age = ((pl.lit(end) - pl.col("ts")).dt.total_microseconds() / 6e7)
    rows = rows.with_columns(probability=pl.lit(truth), outcome="purchase", position=1, age=age)
    rows = rows.with_columns(ripe=pl.Series(co.ripe(co.delays_of(rows, "purchase"), rows["age"].to_numpy(), minutes)))
    assert not any(f["since"] for f in co.concept_drift(rows, [])["findings"])
    assert any(f["since"] for f in co.concept_drift(rows.drop("ripe"), [])["findings"])


def test_tiny_logs_get_a_sentence():
    few = co.concept_drift(shop(1, 100), ["device"])
    assert few["findings"] == [] and "Too few" in few["sentence"]
    assert co.concept_drift(shop(1, 100).head(0), ["device"])["findings"] == []
    assert co.skill(shop(1, 50, days=1).with_columns(ts=pl.lit(START))) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(0, 1)), min_size=1, max_size=40))
def test_no_change_is_yesterdays_rate(rows):
    frame = pl.DataFrame(rows, schema=["d", "position", "outcome"], orient="row").with_columns(ts=pl.lit(START) + pl.duration(days=pl.col("d")))
    found = co.no_change(frame)
    for (d, position, _), value in zip(rows, found):
        earlier = [x for x, _, _ in rows if x < d]
        if not earlier: assert np.isnan(value); continue
        before = max(earlier)
        mine, everyone = ([y for x, q, y in rows if x == before and (q == position or every)] for every in (False, True))
        assert value == pytest.approx(np.mean(mine or everyone))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=90))
def test_split_by_brute_force(values):
    v = np.array(values)
    gain = lambda k: abs(v[:k].mean() - v[k:].mean()) * np.sqrt(k * (len(v) - k))
    assert gain(co.split_of(v)) == pytest.approx(max(gain(k) for k in range(max(len(v) // 20, 1), len(v) - max(len(v) // 20, 1) + 1)), abs=1e-9)


def lists(seed, n=800, shift=0., k=6, meaning=1.):
    rng = np.random.default_rng(seed)
    score = -np.sort(-rng.normal(shift, 1, (n, k)), 1)
    p = 1 / (1 + np.exp(2 - meaning * score)) / (1 + .3 * np.arange(k))
    at = np.arange(n).repeat(k)
    return pl.DataFrame(dict(request_id=[f"r{i}" for i in at], position=np.tile(np.arange(1, k + 1), n), score=score.ravel(), outcome=(rng.random((n, k)) < p).ravel().astype(int)))


def test_estimates_hold_the_truth():
    "14 shops, windows of changing mixes, one with other shoppers still: the 95 % intervals hold what is realised in at least 85 % of them."
    inside = []
    for s in range(14):
        rng = np.random.default_rng(s)
        past = [lists(1000 * s + k, 500, shift=rng.normal(0, .15)) for k in range(6)]
        for shift in (0, .5): inside += [f["verdict"] == "as expected" for f in co.estimated_performance(past, lists(1000 * s + 50, 500, shift=shift))]
    assert np.mean(inside) >= .85


def test_estimates_are_better_than_the_mean_of_the_past():
    past = [lists(k, shift=.1 * (-1)**k) for k in range(6)]
    rate, ndcg = co.estimated_performance(past, lists(9, shift=.8))
    assert abs(rate["expected"] - rate["realised"]) < .25 * abs(rate["usual"] - rate["realised"])
    early = co.estimated_performance(past, lists(9, shift=.8).drop("outcome"))[0]
    assert early["verdict"] == "better" and early["realised"] is None and early["expected"] == rate["expected"]
    changed = co.estimated_performance(past, lists(9, shift=.8, meaning=0.))[0]
    assert changed["verdict"] == "changed" and changed["realised"] < changed["low"]
    json.dumps([rate, ndcg, early], allow_nan=False)


def test_scores_count_where_they_are_known():
    "A log with scores for a part of the lists uses that part; with hardly any, the position alone; without outcomes, nothing."
    rows = pl.concat([lists(k, n=1500).with_columns(ts=pl.lit(START + timedelta(days=7 * k)), complete=pl.lit(True)) for k in range(3)])
    since, ranks = START + timedelta(days=13), lambda f: f.select(pl.corr("score", "probability", method="spearman")).item()
    half = rows.with_columns(score=pl.when(pl.col("request_id").hash() % 2 == 0).then("score"))
    assert len(co.scored(half, since)) == half["score"].count() and ranks(co.scored(half, since)) > .8
    few = rows.with_columns(score=pl.when(pl.col("request_id").hash() % 100 == 0).then("score"))
    found = co.scored(few, since)
    assert len(found) == len(rows) and found.group_by("position").agg(n=pl.col("probability").n_unique())["n"].to_list() == [1] * 6
    assert co.scored(rows.with_columns(outcome=pl.lit(0)), since).height == 0


def test_estimates_need_windows_and_outcomes():
    with pytest.raises(RecsysError, match="past windows"): co.estimated_performance([lists(0)], lists(1))
    none = [lists(k).with_columns(outcome=pl.lit(0)) for k in range(4)]
    with pytest.raises(RecsysError, match="the same"): co.estimated_performance(none, lists(1))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=8))
def test_ndcg_by_brute_force(outcomes):
    request = np.array([i for i, o in enumerate(outcomes) for _ in o])
    position, y = np.array([k for o in outcomes for k in range(1, len(o) + 1)]), np.array([v for o in outcomes for v in o], float)
    dcg = lambda o: sum(v / np.log2(k + 2) for k, v in enumerate(o))
    want = [dcg(o) / dcg(sorted(o, reverse=True)) for o in outcomes if any(o)]
    found = co.list_ndcg(request, position, y)
    assert np.isnan(found) if not want else found == pytest.approx(np.mean(want))


def test_expected_ndcg_is_the_mean_over_outcomes():
    rows = lists(3, n=400)
    p = np.random.default_rng(1).random(len(rows)) * .3
    request, position = rows["request_id"].rank("dense").to_numpy().astype(int) - 1, rows["position"].to_numpy()
    real = np.mean([co.list_ndcg(request, position, (np.random.default_rng(100 + s).random(len(p)) < p).astype(float)) for s in range(60)])
    assert co.expected_ndcg(request, position, p, throws=200) == pytest.approx(real, abs=.01)


def test_from_a_log_to_the_sentences(tmp_path):
    "A simulated shop of which half of the clicks go missing from a day on: the report dates it. Without impressions there is nothing to say."
    from recsys.core.settings import load_settings
    from recsys.data.ingest import ingest
    from recsys.data.outcomes import outcome_minutes, write_outcomes
    from recsys.data.simulator import simulate
    from shop import settings_text
    simulate(tmp_path/"shop", 60_000, seed=4, users=500, items=120, days=60)
    (tmp_path/"settings.ini").write_text(settings_text())
    (tmp_path/"i").mkdir()
    ingest("shop/simulated.toml", tmp_path/"i", None, datetime(2024, 6, 1, tzinfo=timezone.utc), 30, 60, .05, tmp_path)
    s = load_settings(tmp_path/"settings.ini")
    assert co.concept_run(tmp_path/"i", tmp_path/"data", s) == []
    write_outcomes(tmp_path/"i", outcome_minutes(s.data.outcome_minutes))
    said = {f["kind"]: f for f in co.concept_run(tmp_path/"i", tmp_path/"data", s)}
    assert set(said) == {"click", "purchase"}
    click = said["click"]
    assert [f["metric"] for f in click["performance"]] == ["rate", "ndcg"] and all(f["low"] < f["expected"] < f["high"] for f in click["performance"])
    assert click["drift"]["findings"][0]["segment"] and "yesterday" in click["drift"]["sentence"]
    assert all(r["ripe"] <= 1 + 1e-9 for f in said.values() for r in f["rates"])
    json.dumps(said, allow_nan=False)
    part, = (tmp_path/"i/impressions").glob("*.parquet")
    rows = pl.read_parquet(part)
    middle = rows["ts"].max() - timedelta(days=20)
    gone = (pl.col("ts") >= middle) & (pl.col("event_id").hash() % 2 == 0)
    rows.with_columns(click=pl.when(gone).then(0).otherwise("click").cast(pl.Int8), click_ts=pl.when(gone).then(None).otherwise("click_ts")).write_parquet(part)
    found = co.concept_run(tmp_path/"i", tmp_path/"data", s)[0]["drift"]["findings"][0]
    assert found["since"] and abs((datetime.fromisoformat(found["since"]) - middle).days) <= 5 and found["after"] < .75 * found["before"]


def test_the_page_of_a_log_with_little_to_watch_says_so():
    "It had a table without rows, whose columns were formatted: the run ended there."
    import nbformat
    from pathlib import Path
    from recsys.operations import charts, drift_page, report
    few = pl.DataFrame(dict(ts=[datetime(2024, 1, d, tzinfo=timezone.utc) for d in range(1, 6)], visitor_id=list("abcde"), position=[1] * 5, probability=[.1] * 5, outcome=[0, 1, 0, 0, 0]))
    said = dict(concept=[dict(kind="click", drift=co.concept_drift(few), performance=[], rates=[])])
    page = nbformat.read(Path(__file__).parent.parent/"nbs/jobs/drift.ipynb", 4)
    cell, = [c.source for c in page.cells if "Streams of" in c.source]
    shown = []
    exec(cell, dict(said=said, pl=pl, report=report, charts=charts, drift_page=drift_page, display=lambda *blocks: shown.extend(blocks)))
    assert any("Too few visitor-days" in str(vars(b)) for b in shown), shown


@pytest.mark.bench
@pytest.mark.skipif("ELEC2" not in os.environ, reason="set ELEC2 to the Parquet file of the Elec2 stream")
def test_the_no_change_rule_beats_the_detectors_on_elec2():
    "The table of the lesson: a naive Bayes that starts anew at each alarm of ADWIN, and the last label."
    from river import drift, naive_bayes
    rows = pl.read_parquet(os.environ["ELEC2"])
    x, y = rows.drop("class").to_dicts(), rows["class"].to_list()
    def accuracy(detector):
        model, right = naive_bayes.GaussianNB(), 0
        for row, label in zip(x, y):
            hit = model.predict_one(row) == label
            right += hit
            if detector:
                detector.update(int(not hit))
                if detector.drift_detected: model = naive_bayes.GaussianNB()
            model.learn_one(row, label)
        return right / len(y)
    assert accuracy(None) == pytest.approx(.732, abs=.001) and accuracy(drift.ADWIN()) == pytest.approx(.808, abs=.001)
    assert sum(a == b for a, b in zip(y, y[1:])) / len(y) == pytest.approx(.853, abs=.001)


def test_concept_is_light_to_import():
    import subprocess, sys
    code = "import sys; import recsys.monitoring.concept; print([m for m in ('river', 'pandas', 'sklearn', 'lightgbm', 'scipy.stats') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- purchases of proposals, without impressions

def proposals(seed: int, noise: float = .12, moments: int = 6, worse: int = 6, fall: float = 1.) -> pl.DataFrame:
    "Proposals of two sources at several moments, whose common rate varies; from `worse` on `old` sells less, and at the newest moment all sells `fall` times as much."
    rng, rows, n = np.random.default_rng(seed), [], 3000
    for m in range(moments):
        source, position = rng.choice(["old", "new"], n), np.tile(np.arange(1, 21), n // 20)
        p = .3 / np.sqrt(position) * np.where((source == "old") & (m >= worse), .4, 1) * max(1 + noise * rng.normal(), .1) * (fall if m == moments - 1 else 1)
        rows.append(pl.DataFrame(dict(ts=[datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(14 * m)] * n, visitor_id=np.repeat(np.arange(n // 20), 20).astype(str), position=position, source=source, outcome=(rng.random(n) < p).astype(np.int8))))
    return pl.concat(rows)

def moved_in(**how) -> list[str]: return [f["segment"] for f in co.bought_drift(proposals(**how), .05)["findings"] if f["since"]]


def test_ups_and_downs_of_the_common_rate_are_no_concept_drift():
    assert sum(bool(moved_in(seed=s)) for s in range(40)) <= 3


def test_a_source_that_falls_is_found_amid_ups_and_downs_and_a_fall_of_all_where_there_are_none():
    for s in range(4):
        assert "source = old" in moved_in(seed=s, worse=4) and moved_in(seed=s, noise=0., fall=.6) == ["all"]
    assert "all" not in moved_in(seed=0, moments=3, noise=0., fall=.6) # three moments say nothing of what is usual
