"`recsys bench drift`, small: its figures, its page, and what it says where Evidently cannot be had."
import json

import numpy as np
import polars as pl
import pytest
from scipy import stats

from recsys.core.files import write_json
from recsys.core.settings import load_settings
from recsys.monitoring import statistics as ms
from recsys.operations import bench_drift as bd, drift_peer
from shop import make_shop


@pytest.fixture(scope="module")
def project(tmp_path_factory): return load_settings(make_shop(tmp_path_factory.mktemp("bench")/"shop")/"settings.ini")


def test_intervals_are_those_of_clopper_and_pearson():
    for hits, runs in ((0, 10), (3, 100), (10, 10), (1, 300)):
        ci = stats.binomtest(hits, runs).proportion_ci(method="exact")
        assert (bd.interval(hits, runs)["low"], bd.interval(hits, runs)["high"]) == pytest.approx((ci.low, ci.high), abs=1e-9)


def test_what_is_planted_is_there():
    a, b = bd.study_table(200_000, 1, .1), bd.plant(bd.study_table(200_000, 1, .1), 1)
    assert (b["normal0"] - a["normal0"]).mean() == pytest.approx(.1) and (b["price0"] / a["price0"]).mean() == pytest.approx(1.25) and b["holes0"].is_nan().mean() == pytest.approx(.15, abs=.003)
    top = a["category0"].value_counts(sort=True)["category0"][0]
    assert (b["category0"] == top).mean() - (a["category0"] == top).mean() == pytest.approx(.05, abs=.003)
    assert (~b["category1"].is_in(a["category1"].unique().implode())).mean() == pytest.approx(.02, abs=.002)
    assert [c for c in a.columns if not a[c].equals(b[c])] == ["normal0", "price0", "gamma0", "holes0", "category0", "category1"]
    assert a.group_by("user").len()["len"].mean() == pytest.approx(20, rel=.05)


def test_figures_and_page(project, tmp_path, monkeypatch):
    from recsys.operations.figures import bench_page
    monkeypatch.setattr(bd, "COUNTS", {1000: 1.}); monkeypatch.setattr(bd, "ROWS", {1000: 1.})
    said = bd.bench_drift(tmp_path/"f.json", project, 2, 20_000, 3, False)
    f = json.loads((tmp_path/"f.json").read_text())
    assert {"false_alarm_rate", "power", "planted_found", "planted_false", "cpu_seconds_1m", "peak_rss_mb_1m", "ratio_to_evidently", "shap_ratio", "shap_max_diff", "report_bytes"} <= set(f) == set(said)
    assert f["planted"][-1]["found"] == 6 and f["planted_false"] == 0 and max(f["parity"].values()) <= 1e-12 and f["report_bytes"] < 300_000 and f["cost"]["flat"]["rows"] == 60_000
    assert [(r["drawn"], r["icc"], r["rows"], r["runs"]) for r in f["false_alarm_rate"]] == [(d, icc, 1000, 2) for d in ("counts", "rows") for icc in (0., .1, .3)]
    page = bench_page("drift", project, [tmp_path/"f.json"]).read_text()
    assert "Evidently was not measured: not asked for" in page and "What was promised" in page


@pytest.mark.parametrize("icc", [0., .3])
def test_counts_are_drawn_from_the_law_of_rows(icc):
    "Cells, missing values and the spread between buckets, of rows that were drawn and counted on the same cells (chi-square, and a ratio of variances within what its own spread allows)."
    law, rng, n = bd.law_of(icc, 20_000), np.random.default_rng(5), 40_000
    drawn = [bd.drawn(law, n, rng) for _ in range(12)]
    counted = [bd.measure(bd.study_table(n, 70 + k, icc), law.frozen, "user") for k in range(12)]
    for c in ("normal0", "price0", "gamma0", "count0", "holes0", "category0"):
        total = lambda w: np.append(w.counts[c].cells.sum(0), w.counts[c].missing.sum())
        if not icc:
            groups = ms.pool_rare(total(drawn[0]), total(counted[0]), 20)
            x, df = ms.chi2(ms.regroup(sum(map(total, drawn)), groups), ms.regroup(sum(map(total, counted)), groups))
            assert stats.chi2.sf(x, df) > 1e-4, c
        cut = law.frozen[c].cells // 2
        share = lambda w: (w.counts[c].cells[:, :cut].sum(1) / w.counts[c].cells.sum(1)).var()
        assert .6 < sum(map(share, drawn)) / sum(map(share, counted)) < 1.6, c


def test_the_short_answer_is_that_of_the_report():
    "`alarmed` asks the p-values first; the whole report says the same."
    plan, alarms = bd.Plan("user", .01, 199, 0, dict(psi=.1, wasserstein=.04, share=.02, missing=.02, unseen=.01), 10, 100, 64), []
    for k in range(12):
        a, b = bd.study_table(600, 2 * k, .3), bd.study_table(600, 2 * k + 1, .3).with_columns(pl.col("normal0") + k / 12)
        profile = bd.profile_of(a, "user", [b])
        alarms.append(bd.alarmed(profile, bd.measure(b, profile.frozen, "user"), plan))
        assert alarms[-1] == bd.asked(a, b, plan).alarm
    assert set(alarms) == {True, False}


def test_without_evidently_the_rest_stands(project, tmp_path, monkeypatch):
    "No such pins: one line, and no figures of it."
    monkeypatch.setattr(bd, "PINS", "nbs/benchmarks/no_such_peers.txt")
    said = bd.evidently_figures(project, tmp_path, dict(cpu_seconds=1.))
    assert list(said) == ["skipped"] and "no_such_peers.txt" in said["skipped"]


def test_evidently_answers_are_read_by_their_method():
    m = lambda column, method, value, limit: dict(config=dict(column=column, method=method, threshold=limit), value=value)
    metrics = [dict(config=dict(drift_share=.5), value=dict(count=2., share=.5)), m("a", "chi-square p_value", .2, .05), m("b", "Z-test p_value", .01, .05), m("c", "Jensen-Shannon distance", .1, .1), m("d", "Wasserstein distance (normed)", .09, .1)]
    assert drift_peer.drifted(metrics) == dict(columns=["b", "c"], dataset=True)


def test_windows_in_time():
    rng = np.random.default_rng(0)
    frames = [(str(k), pl.DataFrame(dict(unit=rng.integers(0, 300, 3000), price=rng.lognormal(rng.normal(0, .08), 1, 3000), product=rng.integers(40 * k, 400 + 40 * k, 3000).astype(str)))) for k in range(9)]
    plan = bd.Plan("unit", .01, 199, 0, dict(psi=.1, wasserstein=.04, share=.02, missing=.02, unseen=.01), 10, 400, 64)
    found = bd.windows_report(frames, plan)
    assert [f["window"] for f in found] == list("45678") and all("product" in f["bare"] for f in found) and not any("product" in f["past"] for f in found[1:])


@pytest.mark.parametrize("shop", bd.READING)
def test_a_reading_stands_only_beside_the_counts_it_was_written_for(shop):
    (n, bare, past, planted), alarmed, said = bd.READING[shop]
    others = [f"other {k}" for k in range(n - len(alarmed))]
    windows = [dict(window=w, bare=["x"] if k < bare else [], past=["x"] if k < past else [], planted=k < planted) for k, w in enumerate([*alarmed, *others])]
    assert past == len(alarmed) and bd.reading_of(shop, windows) == said
    assert bd.reading_of(shop, windows[:-1]) == "" == bd.reading_of(shop, [windows[-1] | dict(window="elsewhere", past=["y"]), *windows[:-1]])
    for key in ("bare", "planted"): assert bd.reading_of(shop, [windows[0] | {key: not windows[0][key]}, *windows[1:]]) == ""
    if alarmed: assert bd.reading_of(shop, [windows[0] | dict(window="elsewhere"), *windows[1:]]) == ""
