"The leak guard: each planted leak is found, by what it saw, and nothing in what is honest."
from datetime import datetime, timezone

import narwhals as nw, numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st

import brute
from brute import DAY, START, row_frame
from recsys.candidates.pipeline import Polars, guard_table, offline_tables
from recsys.core.settings import RecsysError, load_settings
from recsys.data.ingest import ingest
from recsys.data.simulator import simulate
from recsys.features.build import check_live, live_table
from recsys.features.definitions import LIVE_NAMES, PROGRAM, RANKED_ITEM, RANKED_USER
from recsys.features.offline import with_marks
from recsys.features.leaks import check_leaks, chosen, guard, live_features, proofs, recomputed, single_auc, tempted, tempting, too_good

LOG = brute.random_log(3000, 0, days=30, late=.15, users=40, items=30)
NEAR = LOG.filter(pl.col("ts") > START + 2 * DAY).sample(500, seed=1)
ROWS = pl.DataFrame(dict(row=np.random.default_rng(3).permutation(500) + 10_000, t=NEAR["ts"].to_numpy() - np.random.default_rng(0).integers(0, 7200, 500), user=NEAR["user"], item=NEAR["item"],
                         category=NEAR["category"], session=NEAR["session"]))
LABEL = NEAR["kind"].to_numpy() == 4
FEATURES = live_features(LOG, ROWS)
COUNTED = pl.col("kind") == 2

def counted(log, rows, seen, key="item", kinds=COUNTED):
    "Events of each row's key for which `seen` holds."
    r = rows.with_row_index("at")
    n = r.join(r.join(log.filter(kinds), on=key).filter(seen).group_by("at").len(), on="at", how="left", maintain_order="left")["len"]
    return n.fill_null(0).cast(pl.Float32).alias("x")

def last_price(log, rows, seen, backward=False):
    r = rows.with_row_index("at")
    all_ = r.join(log.select("item", "known", "ts", "cents", "event_id"), on="item").sort("at", "known", "event_id")
    got = r.join(all_.group_by("at", maintain_order=True).agg(x=pl.col("cents").filter(seen).last(), ever=pl.col("cents").first()), on="at", how="left", maintain_order="left")
    return (got["x"].fill_null(got["ever"]) if backward else got["x"]).cast(pl.Float32).alias("x")

BEFORE = pl.col("known") < pl.col("t")
SECOND, LATE, AFTER, REST = "the very second", "not arrived", "happened later", "rest of the log"
HONEST = {
    "known before": lambda log, rows: counted(log, rows, BEFORE),
    "a window": lambda log, rows: counted(log, rows, BEFORE & (pl.col("ts") >= pl.col("t") - 7 * DAY)),
    "last price": lambda log, rows: last_price(log, rows, BEFORE),
    "share of all": lambda log, rows: counted(log, rows, BEFORE) / max(1, log.filter(pl.col("known") < rows["t"].min()).height),
    "constant": lambda log, rows: pl.Series("x", np.ones(rows.height)),
    "holes": lambda log, rows: pl.Series("x", [None if r % 2 else float("nan") for r in rows["row"]], dtype=pl.Float32)}
LEAKS = {
    "known at the moment": (lambda log, rows: counted(log, rows, pl.col("known") <= pl.col("t")), [SECOND], [LATE, AFTER]),
    "ts instead of known": (lambda log, rows: counted(log, rows, pl.col("ts") < pl.col("t"), "user"), [LATE, SECOND], [AFTER]),
    "the next hour": (lambda log, rows: counted(log, rows, pl.col("ts") < pl.col("t") + 7200), [LATE, AFTER], []),
    "a mean of everything": (lambda log, rows: pl.Series("x", np.full(rows.height, log["cents"].mean() or 0)), [AFTER], []),
    "a rank in the whole log": (lambda log, rows: rows.join(log.group_by("item").len().with_columns(x=pl.col("len").rank()), on="item", how="left", maintain_order="left")["x"], [AFTER], []),
    "backfilled": (lambda log, rows: last_price(log, rows, BEFORE, backward=True), [AFTER], []),
    "corrected afterwards": (lambda log, rows: last_price(log, rows, pl.col("ts") < pl.col("t")), [LATE], [AFTER]),
    "what only the real future holds": (lambda log, rows: pl.Series("x", np.full(rows.height, float(log["event_id"].is_in(["e0000001"]).any() and log["ts"].max()))), [], [])}

as_frame = lambda f: lambda log, rows: pl.DataFrame([f(log, rows).rename("x")])

def test_our_own_features_are_honest():
    check_leaks(LOG, ROWS, FEATURES, LABEL, moments=4)

@pytest.mark.parametrize("name", HONEST)
def test_honest_functions_pass(name):
    compute = as_frame(HONEST[name])
    assert guard(LOG, ROWS, compute(LOG, ROWS) if name != "share of all" else pl.DataFrame({"y": np.arange(ROWS.height) % 7}), LABEL, compute) == []

@pytest.mark.parametrize("name", LEAKS)
def test_each_leak_is_found_by_what_it_saw(name):
    f, saw, not_saw = LEAKS[name]
    compute = as_frame(f)
    found = tempted(compute, LOG, chosen(LOG, ROWS, 10))
    assert [x.feature for x in found] == ["x"] and all(s in found[0].saw for s in saw) and not any(s in found[0].saw for s in not_saw), found
    assert 0 < found[0].rows <= found[0].of and ROWS.filter(pl.col("row") == found[0].example)["t"].to_list() == [found[0].t]

@pytest.mark.parametrize("name", ["known at the moment", "ts instead of known", "the next hour", "a mean of everything", "corrected afterwards"])
def test_a_table_from_elsewhere_is_recomputed(name):
    "Only the values come from the leaky function; the guard has an honest one of the same name."
    rows = ROWS if name != "known at the moment" else ROWS.with_columns(t=NEAR["known"]).filter(NEAR["kind"] == 2)
    honest = HONEST["last price" if name == "corrected afterwards" else "known before"]
    honest = honest if name != "ts instead of known" else lambda log, rows: counted(log, rows, BEFORE, "user")
    values = as_frame(LEAKS[name][0])(LOG, rows)
    found = recomputed(values, as_frame(honest), LOG, chosen(LOG, rows, 40))
    assert [x.feature for x in found] == ["x"] and "differs" in found[0].saw

def test_one_altered_value_is_found():
    groups = chosen(LOG, ROWS, 10)
    at = groups[4]["at"][0]
    j = int(np.argmax(FEATURES.row(at)))
    bent = FEATURES.to_numpy().copy()
    bent[at, j] = np.nextafter(bent[at, j], np.float32(np.inf))
    found = recomputed(pl.DataFrame(bent, schema=FEATURES.schema), live_features, LOG, groups)
    assert [(f.feature, f.rows, f.example) for f in found] == [(LIVE_NAMES[j], 1, ROWS["row"][at])]

def test_the_label_itself_and_its_disguises():
    rng = np.random.default_rng(0)
    noise = rng.random(ROWS.height)
    planted = pl.DataFrame(dict(label=LABEL.astype(float), turned=-7. * LABEL, noisy=LABEL + .9 * noise, holes=np.where(LABEL, 1., np.nan), noise=noise, helpful=LABEL + 2 * noise))
    assert [f.feature for f in too_good(planted, LABEL, LOG, ROWS)] == ["label", "turned", "noisy", "holes"]

def test_a_count_of_what_is_still_to_come():
    ahead = counted(LOG, ROWS, (pl.col("known") >= pl.col("t")) & (pl.col("known") < pl.col("t") + 7 * DAY), "user")
    behind = counted(LOG, ROWS, BEFORE & (pl.col("known") >= pl.col("t") - 7 * DAY), "user")
    found = too_good(pl.DataFrame(dict(ahead=ahead, behind=behind)), None, LOG, ROWS)
    assert [f.feature for f in found] == ["ahead"] and "view of the user" in found[0].saw

@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_the_area_is_the_chance_that_a_positive_has_more(pairs):
    x, y = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    chances = [(a > b) + .5 * (a == b) for a in x[y] for b in x[~y]]
    got = single_auc(x, y)
    assert np.isnan(got) if not chances else abs(got - np.mean(chances)) < 1e-12

def test_tempting_rows_are_those_with_events_on_their_way():
    got = tempting(LOG, ROWS, most=10**6).to_list()
    late = [i for i, r in enumerate(ROWS.to_dicts()) if any(e["ts"] < r["t"] <= e["known"] and (e["user"] == r["user"] or e["item"] == r["item"]) for e in LOG.filter(pl.col("ts") < r["t"], pl.col("known") >= r["t"]).to_dicts())]
    assert got == late and 0 < len(late) < ROWS.height

def test_what_is_wrong_is_said_in_one_line():
    with pytest.raises(RecsysError, match="same order"): guard(LOG, ROWS, FEATURES.head(3))
    leaky = as_frame(LEAKS["known at the moment"][0])
    with pytest.raises(RecsysError, match="x: saw what arrived in the very second .*row .* at ") as e: check_leaks(LOG, ROWS, leaky(LOG, ROWS), LABEL, leaky)
    assert "\n" not in str(e.value)

def test_small_inputs():
    none, one = ROWS.head(0), ROWS.head(1)
    assert guard(LOG, none, live_features(LOG, none)) == []
    assert guard(LOG, one, live_features(LOG, one), np.ones(1)) == []
    empty = LOG.head(0)
    assert guard(empty, one, live_features(empty, one)) == []

# ---- where rows are made

def test_proofs_are_the_guard_without_suspicions():
    planted = FEATURES.with_columns(label=pl.Series(LABEL).cast(pl.Float32))
    assert proofs(LOG, ROWS, planted, moments=4) == [] and [f.feature for f in guard(LOG, ROWS, planted, LABEL, moments=4)] == ["label"]
    leaky = as_frame(LEAKS["the next hour"][0])
    assert [f.feature for f in proofs(LOG, ROWS, leaky(LOG, ROWS), leaky, moments=4)] == ["x"] and proofs(LOG, ROWS.head(0), FEATURES.head(0)) == []

def test_the_daily_job_looks_at_its_live_features():
    marked, moments = with_marks(nw.from_native(LOG.lazy())).to_native(), [START + d * DAY for d in (5, 9, 14, 20)]
    live = {e: live_table(marked, some, e, n, moments) for e, some, n in (("item", RANKED_ITEM, 30), ("user", RANKED_USER, 40))}
    said = check_live(marked, live, moments)
    assert said == dict(features=len(RANKED_ITEM) + len(RANKED_USER), rows=160, moments=4, events=said["events"]) and 0 < said["events"] <= LOG.height
    late = live_table(marked, RANKED_ITEM, "item", 30, [t + 3600 for t in moments]) # an hour of the future
    with pytest.raises(RecsysError, match="a feature knows the future: item_.*differs from what was known at the moment") as e: check_live(marked, live | dict(item=late), moments)
    assert "\n" not in str(e.value)

@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Training rows of a simulated shop."
    d = tmp_path_factory.mktemp("made-up")
    simulate(d/"shop", 30_000)
    account = ingest("simulated.toml", d/"in", None, datetime.now(timezone.utc), 30, 60, .05, d/"shop")
    end = int(datetime.fromisoformat(account["moment"]).timestamp())
    offline_tables(d/"in", d/"out", Polars(), load_settings(), end - 20 * DAY, end, 2)
    return d/"out"

def test_some_training_rows_are_looked_at(table, monkeypatch):
    said = guard_table(table, Polars(), 2)
    assert said["features"] == len(LIVE_NAMES) and said["moments"] == 8 and said["rows"] >= 8 and said["events"] > 100
    monkeypatch.setattr("recsys.candidates.pipeline.GUARDED_EVENTS", 0)
    assert guard_table(table, Polars(), 2)["rows"] == 0, "nothing that does not fit"

def test_a_table_that_knows_the_future_is_refused(table):
    file, = (table/"table").glob("*.parquet")
    whole, j = pl.read_parquet(file), next(i for i, a in enumerate(PROGRAM.aggregates) if a.entity == "user" and a.op == "count")
    whole.with_columns(pl.col(f"a{j}") + 1).write_parquet(file)
    try:
        with pytest.raises(RecsysError, match="a feature knows the future: user_.*differs from what was known") as e: guard_table(table, Polars(), 2)
        assert "\n" not in str(e.value)
    finally: whole.write_parquet(file)
