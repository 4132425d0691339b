"`recsys bench features`: every figure is there, every comparison is made and can fail, and nothing is left behind."
import json, os, re, signal, subprocess, sys
from pathlib import Path

import numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st

import brute
from recsys.core.settings import RecsysError, load_settings
from recsys.features.offline import LOG
from recsys.operations import bench
from recsys.operations.bench import bench_features, measured, parity, verdict
from recsys.operations.figures import answer, bench_page, figures_of, growth, marginal, promises, stage_table, times_linear
from recsys.operations.peers import compare

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = load_settings(ROOT/"settings.ini")
EVENTS = 50_000

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("bench")

@pytest.fixture(scope="module")
def figures(folder):
    "A small run with everything, written to F.json; what was told while it ran as `told`."
    told = []
    return bench_features(EVENTS, folder/"F.json", settings=SETTINGS, join_rows=20_000, warm=False, say=told.append) | dict(told=told)

@pytest.fixture(scope="module")
def tables(folder):
    "The tables of a small path, made in this process."
    shop, quiet = folder/"shop", lambda name: None
    bench._simulate(quiet, SETTINGS.file, str(shop), EVENTS, 7)
    path = bench._path(quiet, SETTINGS.file, str(shop), str(folder/"tables"), "polars", 28, 4, 10**6)
    bench._pandas(quiet, SETTINGS.file, str(shop), str(folder/"pandas"), path)
    return folder/"tables"/"out"

def spoilt(tables: Path, column: str):
    "The table of `tables` with one integer of one row off by one; and the file to put it back to."
    file, = (tables/"table").glob("*.parquet")
    whole = pl.read_parquet(file)
    row = whole["row"][len(whole) // 2]
    return file, whole, whole.with_columns(pl.when(pl.col("row") == row).then(pl.col(column) + 1).otherwise(column).alias(column))

def ours(tables: Path) -> tuple:
    table = pl.read_parquet(tables/"table"/"*.parquet").sort("row")
    return table, bench.read_table(tables)[1], pl.read_parquet(tables/"pairs"/"*.parquet")

def test_the_file_says_what_was_measured(figures, folder):
    said = json.loads((folder/"F.json").read_text())
    assert said["events"] == EVENTS and abs(said["events_read"] / EVENTS - 1) < .05 and said["engine"] == "polars" and said["simulated"] is True
    assert said["equal"] is True and all(said["checks"][c]["equal"] is True for c in ("parity", "pandas", "feast"))
    assert said["cpu_seconds"] == pytest.approx(sum(s["cpu_seconds"] for s in said["stages"] if s["stage"] != "start"))
    assert said["events_per_cpu_second"] == pytest.approx(said["events_read"] / said["cpu_seconds"])
    assert [s["stage"] for s in said["stages"]] == "start ingest dictionaries log rows user session item category table pairs read".split()
    assert said["peak_rss_mb"] >= max(s["peak_rss_mb"] for s in said["stages"]) and all(s["peak_rss_mb"] > 20 for s in said["stages"][1:])
    assert said["machine"]["cores"] >= 1 and said["machine"]["packages"]["polars"] and said["simulate"]["events_per_cpu_second"] > 0

def test_every_row_is_compared_with_the_replay(figures):
    c = figures["checks"]["parity"]
    assert c["rows"] == c["of_rows"] == figures["shop"]["training_rows"] > 1000 and c["values"] == c["rows"] * figures["shop"]["features"]
    assert c["events"] == c["of_events"] and c["how"] == "the whole log"

def test_pandas_does_the_same_work_and_comes_to_the_same_values(figures):
    p = figures["checks"]["pandas"]
    assert 0 < p["floor_cpu_seconds"] < p["ours"]["cpu_seconds"]
    assert p["rows"] == figures["shop"]["training_rows"] and p["pairs"] == figures["shop"]["pairs"] > 100 and p["differing"] == [] and p["same_bits"] > .999
    u = p["usual"]  # one clock: late events stay in a window for too long, all else is the same
    assert .99 < u["same_values"] < 1 and u["ratio"] == pytest.approx(u["cpu_seconds"] / p["ours"]["cpu_seconds"]) and u["features_ratio"] > p["features_ratio"] > 0
    assert u["only_windows"] is True and 0 < u["same_rows"] < u["same_values"]
    assert p["ratio"] == pytest.approx(p["theirs"]["cpu_seconds"] / p["ours"]["cpu_seconds"]) and p["ours"]["cpu_seconds"] == figures["cpu_seconds"]

def test_feast_keeps_our_values_and_drops_only_what_nobody_knows(figures):
    f = figures["checks"]["feast"]
    assert f["features"] == 10 and f["kept"] + f["dropped"] == f["rows"] and 0 < f["dropped"] == f["dropped_unknown"] < f["rows"]
    assert f["ratio"] > 5 # on few rows; the page shows the ratio of many

def test_nothing_is_left_behind_and_progress_is_told(figures, folder):
    assert [p.name for p in folder.iterdir() if "tmp" in p.name] == []
    assert {"path: pairs", "parity: replay", "pandas: pairs", "simulate: tables"} <= set(figures["told"])

def test_a_changed_aggregate_is_seen(tables):
    found = parity(tables)
    assert found["equal"] and found["rows"] == len(pl.read_parquet(tables/"table"/"*.parquet"))
    for column in ("a0", "a30", f"a{len(bench.PROGRAM.aggregates) - 1}"):
        file, whole, off = spoilt(tables, column)
        off.write_parquet(file)
        try: assert parity(tables)["equal"] is False, column
        finally: whole.write_parquet(file)
    assert verdict(dict(parity=dict(equal=False), pandas=dict(equal=True))) is False

def test_a_sample_by_category_sees_the_same_as_the_whole(tables):
    part = parity(tables, most_events=15_000)
    assert part["equal"] and 0 < part["rows"] < part["of_rows"] and part["events"] < part["of_events"] and "categories" in part["how"]

def test_a_missing_event_is_seen(tables):
    "A row is right for the log that it came from, and for no other."
    file, = (tables/"log").glob("*.parquet")
    log = pl.read_parquet(file)
    row = pl.read_parquet(tables/"table"/"*.parquet").sort("row").row(-1, named=True)
    mine = log.with_row_index().filter(pl.col("user") == row["user"], pl.col("kind") == 2, pl.col("known") < row["t"])
    log.with_row_index().filter(pl.col("index") != mine["index"][0]).drop("index").write_parquet(file)
    try: assert parity(tables)["equal"] is False
    finally: log.write_parquet(file)

def test_the_comparison_with_pandas_can_fail(tables, folder):
    table, x, pairs = ours(tables)
    assert compare(table, x, pairs, folder/"pandas")["equal"]
    assert compare(spoilt(tables, "a5")[2].sort("row"), x, pairs, folder/"pandas")["differing"] == ["integers"]
    y = x.copy(); y[3, 7] += 1
    assert compare(table, y, pairs, folder/"pandas")["differing"] == [bench.LIVE_NAMES[7]]
    assert compare(table, x, pairs.with_columns(weight=pl.col("weight") + (pl.col("place") == 1)), folder/"pandas")["differing"] == ["pairs"]
    assert compare(table.tail(-1), x[1:], pairs, folder/"pandas")["differing"] == ["rows"]

@settings(max_examples=15, deadline=None)
@given(st.data())
def test_both_ways_of_pandas_agree_where_nothing_comes_late(data):
    from recsys.operations.peers import _aggregates, _careful, _marked, _usual
    pd = pytest.importorskip("pandas")
    log = data.draw(brute.logs().filter(len)).select(LOG).to_pandas()
    rows, quiet = data.draw(brute.asked(pl.from_pandas(log))).to_pandas(), lambda name: None
    prompt = _marked(log.assign(known=log["ts"]).sort_values(["ts", "event_id"], ignore_index=True))
    assert np.array_equal(_aggregates(prompt, rows, quiet, _usual), _aggregates(prompt, rows, quiet, _careful))
    usual, careful = (_aggregates(_marked(log), rows, quiet, side) for side in (_usual, _careful)) # late events leave a window late, and nothing else is off
    slides = np.array([a.seconds > 0 for a in bench.PROGRAM.aggregates])
    assert np.array_equal(usual[:, ~slides], careful[:, ~slides]) and (usual >= careful).all()

def test_how_far_two_sides_agree_can_fall(tmp_path):
    aggregates, sums = bench.PROGRAM.aggregates, np.ones((4, len(bench.PROGRAM.aggregates)), np.int64)
    slides = [a.seconds > 0 for a in aggregates]
    for name, at in dict(same=None, window=slides.index(True), ever=slides.index(False)).items():
        off = sums.copy()
        if at is not None: off[2, at] += 1
        (tmp_path/name).mkdir(); np.save(tmp_path/name/"sums.npy", off)
    said = {name: bench._same_values(tmp_path/"same", tmp_path/name) for name in ("same", "window", "ever")}
    assert said["same"] == dict(same_values=1, same_rows=1, only_windows=True) and [said[n]["only_windows"] for n in ("window", "ever")] == [True, False]
    assert bench._same_values(tmp_path/"window", tmp_path/"same")["only_windows"] is False # a window that counts less is wrong
    assert [verdict(dict(pandas=dict(equal=True, usual=said[n]))) for n in ("same", "window", "ever")] == [True, True, False]
    assert said["window"]["same_rows"] == .75 and said["window"]["same_values"] == pytest.approx(1 - 1 / sums.size)

def test_what_was_not_compared_is_not_called_equal(): assert verdict(dict(parity="not checked", pandas="not checked")) is None

def test_a_part_that_fails_says_why_and_leaves_no_process(tmp_path):
    with pytest.raises(RecsysError, match="there is something already"):
        (tmp_path/"shop").mkdir()
        measured("simulate", tmp_path, SETTINGS, shop=str(tmp_path/"shop"), events=2000, seed=1)

def test_memory_that_two_processes_share_counts_once():
    code = "import os, time; a = bytearray(b'x') * 200_000_000; child = os.fork(); print(1, flush=True); time.sleep(20)"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        p.stdout.readline(); p.stdout.readline()
        assert 190 < bench._tree_rss(p.pid) < 300
    finally: os.killpg(p.pid, signal.SIGKILL); p.wait(); p.stdout.close()

@pytest.mark.parametrize("wrong", [dict(events=10), dict(engine="dask")])
def test_what_cannot_be_measured_is_refused(tmp_path, wrong):
    with pytest.raises(RecsysError): bench_features(**dict(events=5000, out=tmp_path/"F.json") | wrong)
    assert list(tmp_path.iterdir()) == []

def test_growth():
    n = np.array([1e6, 5e6, 1e7, 5e7])
    assert growth(n, 7 * n) == pytest.approx(1) and times_linear(n, 7 * n) == pytest.approx(1)
    assert times_linear(n, n**1.05) == pytest.approx(10**.05) and times_linear(n[[0, 2, 3]], n[[0, 2, 3]]**1.05) == pytest.approx(10**.05)
    assert growth(n[:1], n[:1]) is None and times_linear(n[:3], n[:3]) is None

def test_promises_follow_the_figures(figures):
    kept = lambda f, word: next(p["kept"] for p in promises([f]) if word in p["promise"])
    good = dict(figures, events=50_000_000, events_per_cpu_second=100_000, peak_rss_mb=8000.)
    assert kept(good, "per CPU second, whole") is True and kept(dict(good, events_per_cpu_second=99_999), "per CPU second, whole") is False
    assert kept(good, "memory") is True and kept(dict(good, peak_rss_mb=8193.), "memory") is False and kept(good, "growth") is None
    assert answer([dict(figures, equal=False)])[0] == "bad" and answer([figures])[0] == "warning"
    assert stage_table([figures])["us_per_event"].sum() == pytest.approx(sum(s["us_per_event"] for s in figures["stages"][1:]))
    assert len(marginal([figures])) == 0

def test_the_latest_run_of_a_size_counts(figures, tmp_path):
    for k, day in enumerate(("2026-01-02", "2026-01-03", "2026-01-01")): (tmp_path/f"features-{k}.json").write_text(json.dumps(dict(figures, measured=day)))
    (tmp_path/"features-other.json").write_text(json.dumps(dict(figures, engine="spark")))
    assert [(f["engine"], f["measured"]) for f in figures_of(tmp_path)] == [("polars", "2026-01-03"), ("spark", figures["measured"])]
    with pytest.raises(RecsysError, match="no figures"): figures_of(tmp_path, "sessions")

def test_the_page_stands_beside_its_figures(figures, folder):
    pages = folder/"pages"
    page = bench_page("features", SETTINGS, [folder/"F.json"], pages)
    assert sorted(p.name for p in pages.iterdir()) == [f"features-polars-{EVENTS}.json", "features.html"]
    html = page.read_text()
    assert html.rstrip().endswith("</html>") and "simulated" in re.search("<h1>(.*?)</h1>", html)[1] and len(html) < 1_500_000
    assert all("simulated" in t.lower() for t in re.findall("<figcaption>(.*?)</figcaption>", html)) and "This job failed" not in html
    assert f"{figures['events_read']:,} simulated events" in html and not re.search(r'(?:src|href)="(?:https?:)?//', html)

@pytest.mark.bench
@pytest.mark.timeout(7200)
def test_what_was_promised_at_ten_million(tmp_path):
    "Large: more than ten minutes."
    f = bench_features(10_000_000, tmp_path/"F.json", settings=SETTINGS)
    print({k: f[k] for k in ("cpu_seconds", "peak_rss_mb", "events_per_cpu_second")}, {p: f["checks"][p]["ratio"] for p in ("pandas", "feast")})
    assert f["equal"] is True and f["peak_rss_mb"] < 8192 and f["checks"]["feast"]["ratio"] >= 20
    assert f["events_per_cpu_second"] >= 100_000
