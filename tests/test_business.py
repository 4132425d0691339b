"Business figures: against brute force, simulations whose truth is known, and a simulated shop from its log to the verdict."
import json
from datetime import date, datetime, timedelta, timezone

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from recsys.core.settings import load_settings
from recsys.data.ingest import ingest
from recsys.data.outcomes import outcome_minutes, write_outcomes
from recsys.data.simulator import simulate
from recsys.monitoring import business as bu
from recsys.monitoring.drift import draws
from recsys.monitoring.statistics import bucket_of
from shop import settings_text

DAY = datetime(2026, 1, 5)
END = date(2026, 3, 16)


def frame(rows):
    "(day, visitor, type, order, session, price, quantity, currency) as events."
    names = ["d", "visitor_id", "event_type", "order_id", "session_id", "price", "quantity", "currency"]
    return pl.DataFrame(rows, schema=dict(zip(names, [pl.Int64, pl.String, pl.String, pl.String, pl.String, pl.Float64, pl.Int64, pl.String])), orient="row").with_columns(ts=pl.lit(DAY) + pl.duration(days=pl.col("d")))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.sampled_from(["view", "add_to_cart", "purchase"]), st.sampled_from([None, "o1", "o2"]), st.sampled_from(["s1", "s2"]),
                          st.one_of(st.none(), st.floats(0, 100)), st.integers(1, 3), st.sampled_from([None, "EUR", "USD", "XXX"])), min_size=1, max_size=40))
def test_sums_by_brute_force(rows):
    sums = bu.act_sums(frame(rows).lazy(), "EUR", {"USD": .5})
    worth = {None: 1, "EUR": 1, "USD": .5, "XXX": 0}
    for d in {r[0] for r in rows}:
        own, got = [r for r in rows if r[0] == d], sums.filter(pl.col("day") == (DAY + timedelta(days=d)).date()).sum()
        bought = [r for r in own if r[2] == "purchase"]
        assert got["visitors"].item() == len({r[1] for r in own}) and got["buyers"].item() == len({r[1] for r in bought})
        assert got["carts"].item() == len({r[1] for r in own if r[2] == "add_to_cart"})
        assert got["orders"].item() == len({(r[1], r[3] or r[4]) for r in bought})
        assert got["revenue"].item() == pytest.approx(sum((r[5] or 0) * r[6] * worth[r[7]] for r in bought))
    assert sums["bucket"].is_in(bucket_of(pl.Series(["a", "b", "c"])).tolist()).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, "r1", "r2", "r3"]), st.sampled_from("pqrstu"), st.integers(0, 1)), min_size=1, max_size=25))
def test_diversity_by_brute_force(rows):
    kind = dict(p="A", q="A", r="B", s="B", t=None)                          # u is not in the catalogue; no category: alike to nothing
    shown = pl.DataFrame(rows, schema=dict(request_id=pl.String, item_id=pl.String, click=pl.Int8), orient="row").with_columns(ts=pl.lit(DAY), visitor_id=pl.lit("v"))
    got = bu.shown_sums(shown.lazy(), pl.DataFrame(dict(item_id=list(kind), category=list(kind.values())))).sum()
    assert got["impressions"].item() == len(rows) and got["clicks"].item() == sum(r[2] for r in rows)
    lists, different = 0, 0.
    for request in {r[0] for r in rows} - {None}:
        items = sorted({r[1] for r in rows if r[0] == request})
        pairs = [(a, b) for i, a in enumerate(items) for b in items[:i]]
        if pairs: lists += 1; different += np.mean([kind.get(a) is None or kind.get(a) != kind.get(b) for a, b in pairs])
    assert got["lists"].item() == lists and got["different"].item() == pytest.approx(different)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 8)), max_size=60), st.integers(1, 4))
def test_coverage_by_brute_force(rows, days):
    seen = bu.seen_by(pl.DataFrame(rows, schema=dict(d=pl.Int64, visitor_id=pl.Int64, item_id=pl.Int64), orient="row").with_columns(ts=pl.lit(DAY) + pl.duration(days=pl.col("d"))).lazy())
    found = bu.coverage_draws(seen, 20, (DAY + timedelta(days=4)).date(), days)
    inside = [(v, i) for d, v, i in rows if d >= 4 - days]
    if not inside: assert np.isnan(found).all(); return
    bucket = dict(zip([v for v, _ in inside], bucket_of(pl.Series([v for v, _ in inside]))))
    assert found[0] == len({i for _, i in inside}) / 20
    for b in range(64): assert found[1 + b] == pytest.approx(len({i for v, i in inside if bucket[v] != b}) / 20)


def test_intervals_know_that_visitors_hang_together():
    "CTR with about eleven impressions a visitor, who differ: 95 % intervals hold the truth in about 95 % of 300 samples; rows taken as independent would not."
    rng, w, inside, naive = np.random.default_rng(0), draws(300), 0, 0
    for _ in range(300):
        shown = rng.geometric(1 / 11, 1500)
        clicks = rng.binomial(shown, rng.beta(.5, 4.5, 1500))
        bucket = rng.integers(0, 64, 1500)
        sums = dict(clicks=np.bincount(bucket, clicks, 64), impressions=np.bincount(bucket, shown, 64))
        f = bu.figure(sums, "ctr", w)
        low, high = np.quantile(f[1:], [.025, .975])
        inside += low <= .1 <= high
        naive += abs(f[0] - .1) <= 1.96 * np.sqrt(f[0] * (1 - f[0]) / shown.sum())
    assert .90 <= inside / 300 <= .985 and naive / 300 < .85


def sums_of(seed, fall=0., days=70, visitors=4000, restless=.03):
    "Daily sums of a shop in which visitors differ, weekends are stronger and days are restless; conversion falls in the last week."
    rng, rows = np.random.default_rng(seed), []
    for d in range(days):
        bucket = rng.integers(0, 64, visitors // 7)
        p = .06 * (1.5 if d % 7 > 4 else 1) * np.exp(rng.normal(0, restless)) * (1 - fall * (d >= days - 7)) * (.7 + .6 * bucket / 63)
        buys = rng.random(len(bucket)) < p
        rows.append(pl.DataFrame(dict(day=[(DAY + timedelta(days=d)).date()] * 64, bucket=np.arange(64), visitors=np.bincount(bucket, minlength=64).astype(float), buyers=np.bincount(bucket, buys, 64))))
    return pl.concat(rows)


def test_guardrails_cry_wolf_seldom_and_see_a_fall():
    w = draws(200)
    verdicts = lambda fall, limit, n=60: [bu.judged(sums_of(s, fall), "conversion", END, 7, 8, limit, w)["verdict"] for s in range(n)]
    assert verdicts(0., .05).count("breached") <= 2
    assert verdicts(.5, .1, 15).count("breached") == 15
    assert verdicts(0., .4, 15).count("holds") == 15                          # a wide guardrail can be ruled on


def test_weekdays_meet_their_like():
    "A Monday is not judged by Sundays: with a window of one day nothing is breached, though Sundays are half as strong again."
    w = draws(200)
    monday = bu.judged(sums_of(1, days=71, visitors=20_000), "conversion", date(2026, 3, 17), 1, 8, .05, w)
    sunday = bu.judged(sums_of(1, days=71, visitors=20_000), "conversion", END, 1, 8, .05, w)
    assert sunday["expected"] > 1.3 * monday["expected"] and "breached" not in (monday["verdict"], sunday["verdict"])


def test_a_week_in_which_nothing_was_counted_is_no_calm_one():
    "Eight ordinary weeks, and then none: red on the page, and a critical finding; without a past it stays silent, since nothing is expected."
    from recsys.operations.act import business_findings
    known = sums_of(1).filter(pl.col("day") < END - timedelta(days=7))
    gone = bu.judged(known, "conversion", END, 7, 8, .05, draws(50))
    assert gone["verdict"] == "no data" and gone["value"] is None and gone["weeks"] == 8
    verdict, sentence = bu.sentence_of([gone], [])
    assert verdict == "bad" and sentence == "Nothing was counted for conversion, though there usually is something."
    found, = business_findings(dict(figures=[gone], health=[]), "2026-03-16", "page")
    assert (found.key, found.severity) == ("business:conversion", "critical") and "nothing was counted" in found.what


def test_young_logs_and_empty_weeks_expect_nothing():
    w = draws(50)
    few = bu.judged(sums_of(1, days=70).filter(pl.col("day") >= END - timedelta(days=20)), "conversion", END, 7, 8, .05, w)
    assert few["verdict"] == "no expectation" and few["weeks"] == 2 and few["expected"] is None and few["change"] is None
    none = bu.judged(sums_of(1).head(0), "conversion", END, 7, 8, .05, w)
    assert none["verdict"] == "no expectation" and none["value"] is None
    assert bu.sentence_of([few, none], [])[0] == "good" and "not enough past weeks" in bu.sentence_of([few], [])[1].lower()
    json.dumps([few, none], allow_nan=False)
    hole = sums_of(1).filter((pl.col("day") < END - timedelta(days=21)) | (pl.col("day") >= END - timedelta(days=14)))
    assert bu.judged(hole, "conversion", END, 7, 8, .05, w)["weeks"] == 7


def test_catalogue_health():
    at = datetime(2026, 3, 1, tzinfo=timezone.utc)
    items = pl.DataFrame(dict(item_id=["a", "b", "c", "d"], price=[1., None, 2., 3.], category=["x", None, None, "x"], available_to=[None, None, at - timedelta(days=1), None]))
    floors = dict(priced=.5, categorised=.9, in_stock=.5, sold=.9)
    found = {h["name"]: h for h in bu.catalogue_health(items, pl.Series(["a", "b", "c"]), at, floors)}
    assert set(found) == {"priced", "categorised", "sold"} and all(h["items"] == 3 for h in found.values())     # nothing is known of stock; c is gone
    assert [found[n]["value"] for n in ("priced", "categorised", "sold")] == pytest.approx([2 / 3] * 3)
    assert [found[n]["verdict"] for n in ("priced", "categorised", "sold")] == ["holds", "breached", "breached"]
    unpriced = bu.catalogue_health(items.with_columns(price=pl.lit(None, pl.Float64)), pl.Series(["a"]), at, floors)
    assert {h["name"] for h in unpriced} == {"categorised", "sold"}             # a shop whose prices come with its events
    assert bu.catalogue_health(items.head(0), pl.Series([], dtype=pl.String), at, floors) == []


def test_from_a_log_to_the_verdict(tmp_path):
    "A simulated shop: what the figures say is what the raw log says."
    simulate(tmp_path/"shop", 40_000, seed=3, users=400, items=150, days=60)
    (tmp_path/"settings.ini").write_text(settings_text())
    (tmp_path/"i").mkdir()
    ingest("shop/simulated.toml", tmp_path/"i", None, datetime(2024, 6, 1, tzinfo=timezone.utc), 30, 60, .05, tmp_path)
    s = load_settings(tmp_path/"settings.ini")
    write_outcomes(tmp_path/"i", outcome_minutes(s.data.outcome_minutes))
    said = bu.business_run(tmp_path/"i", s)
    figures = {f["name"]: f for f in said["figures"]}
    assert set(figures) == {"ctr", "conversion", "cart_rate", "revenue_per_visitor", "order_value", "diversity", "coverage"}
    end = date.fromisoformat(said["end"])
    shown = pl.read_parquet(tmp_path/"i/impressions/*.parquet").filter(pl.col("ts").dt.date().is_between(end - timedelta(days=7), end, closed="left"))
    assert figures["ctr"]["value"] == pytest.approx(shown["click"].mean())
    assert figures["coverage"]["value"] == pytest.approx(shown["item_id"].n_unique() / len(pl.read_parquet(tmp_path/"i/items.parquet")))
    for f in figures.values(): assert f["low"] - 1e-9 <= f["value"] <= f["high"] + 1e-9 and f["weeks"] >= 3 and f["verdict"] != "no expectation"
    assert said["verdict"] in ("good", "warning", "bad") and said["sentence"].endswith(".")
    assert {"priced", "categorised", "sold"} <= {h["name"] for h in said["health"]}
    json.dumps(said, allow_nan=False)
    (tmp_path/"i/impressions").rename(tmp_path/"gone")
    assert {f["name"] for f in bu.business_run(tmp_path/"i", s)["figures"]} == {"conversion", "cart_rate", "revenue_per_visitor", "order_value"}
