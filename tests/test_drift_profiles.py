"Windows that are kept: exact sums in any order, the same report from a kept profile, files that are whole or refused."
import json, tracemalloc
from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from recsys.core.settings import RecsysError
from recsys.monitoring import drift as dr, profiles as pr, root_cause as rc, statistics as ms

WORDS = st.one_of(st.none(), st.sampled_from(["a", "b", "", "né", "x" * 40]), st.text(max_size=4))
NUMBERS = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.integers(-2**53, 2**53).map(float))
ROWS = st.lists(st.tuples(st.integers(-3, 200), NUMBERS, WORDS, st.one_of(st.none(), st.booleans())), max_size=40)
TYPES = {"u": pl.Int64, "x": pl.Float64, "w": pl.String, "f": pl.Boolean}


def frame(rows): return pl.DataFrame(rows, schema=TYPES, orient="row")


def same(a: ms.Window, b: ms.Window) -> bool:
    parts = lambda w: [(layer, c, f, getattr(n, f)) for layer, counts in (("fine", w.counts), ("rough", w.rough)) for c, n in sorted(counts.items()) for f in ms.Counts.__struct_fields__]
    return (a.rows, a.rows_without, a.infinite, a.kinds) == (b.rows, b.rows_without, b.infinite, b.kinds) and np.array_equal(a.units, b.units) \
        and all(x[:3] == y[:3] and x[3].dtype == y[3].dtype and np.array_equal(x[3], y[3]) for x, y in zip(parts(a), parts(b), strict=True))


REFERENCE = pl.DataFrame({"u": range(400), "x": np.random.default_rng(0).lognormal(0, 2, 400), "w": [f"{i % 7}" for i in range(400)], "f": [i % 3 == 0 for i in range(400)]})
PROFILE = dr.profile_of(REFERENCE, "u")


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS, ROWS)
def test_sums_are_exact_whatever_the_order(one, two, three):
    a, b, c = (ms.measure(frame(r), PROFILE.frozen, "u") for r in (one, two, three))
    assert same((a + b) + c, a + (b + c)) and same(a + b, b + a)
    x, y, z = (pr.shrink(w, PROFILE.frozen) for w in (a, b, c))
    assert same((x + y) + z, x + (y + z)) and same(x + y, y + x)
    if not (one or two or three): return
    whole = ms.measure(frame(one + two + three), PROFILE.frozen, "u")
    assert same(a + b + c, whole)                                        # rows in any grouping, too


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_a_kept_window_is_the_window(tmp_path_factory, rows):
    w = pr.shrink(ms.measure(frame(rows), PROFILE.frozen, "u"), PROFILE.frozen)
    path = pr.write_window(tmp_path_factory.mktemp("w")/"w.parquet", w, PROFILE.frozen, "2026-01-02", "a/b", "v1")
    again, facts = pr.read_window(path, PROFILE.frozen), pr.read_facts(path)
    assert same(again, w) and again.unseen == w.unseen and (facts.day, facts.segment, facts.model) == ("2026-01-02", "a/b", "v1")


@settings(max_examples=20, deadline=None)
@given(ROWS, st.integers(1, 9))
def test_batches_do_not_matter(tmp_path_factory, rows, size):
    table = frame(rows)
    path = tmp_path_factory.mktemp("t")/"t.parquet"
    table.write_parquet(path, row_group_size=7)
    source = ms.Table(path)
    batched = ms.Table.batches
    try:
        ms.Table.batches = lambda self, columns, size_=size: batched(self, columns, size_)
        assert same(ms.measure(source, PROFILE.frozen, "u"), ms.measure(table, PROFILE.frozen, "u"))
    finally: ms.Table.batches = batched


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_exact_distances_are_scipys(a, b):
    gap, area = ms.exact_distances(np.array(a), np.array(b))
    assert gap == pytest.approx(stats.ks_2samp(a, b, method="asymp").statistic, abs=1e-12)
    assert area == pytest.approx(stats.wasserstein_distance(a, b), rel=1e-12, abs=1e-9 * 1e-3)


endless = st.lists(st.one_of(st.integers(-3, 3).map(float), st.sampled_from([np.inf, -np.inf])), min_size=1, max_size=30)

@settings(max_examples=60, deadline=None)
@given(endless, endless)
def test_infinite_values_count_for_ks_alone(a, b):
    at = np.unique(a + b)
    gap = np.abs(np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b))
    finite = np.isfinite(at[:-1]) & np.isfinite(at[1:])
    ks, area = ms.exact_distances(np.array(a), np.array(b))
    assert ks == pytest.approx(gap.max(), abs=1e-12) and area == pytest.approx((gap[:-1][finite] * (at[1:][finite] - at[:-1][finite])).sum(), abs=1e-12)

def test_a_report_of_small_tables_is_exact():
    rng = np.random.default_rng(1)
    a, b = (pl.DataFrame({"x": rng.lognormal(0, 1.5, n), "t": rng.standard_t(3, n), "c": np.minimum(rng.zipf(1.5, n), 60).astype(str)}) for n in (30_000, 12_000))
    by = {c.name: c for c in dr.compare(a, b).columns}
    for name in "xt":
        x, y = a[name].to_numpy(), b[name].to_numpy()
        assert by[name].exact and by[name].ks == pytest.approx(stats.ks_2samp(x, y, method="asymp").statistic, abs=1e-12)
        assert by[name].wasserstein * x.std() == pytest.approx(stats.wasserstein_distance(x, y), rel=1e-12)
    both = a.group_by("c").len().join(b.group_by("c").len(), on="c", how="full", coalesce=True).fill_null(0)
    r, c = both["len"].to_numpy(), both["len_right"].to_numpy()
    groups = ms.pool_rare(r, c)
    oracle = stats.chi2_contingency(np.stack([ms.regroup(r, groups), ms.regroup(c, groups)]), correction=False)
    assert by["c"].chi2 == pytest.approx(oracle.statistic, rel=1e-12) and by["c"].chi2_df == oracle.dof


def test_a_kept_profile_says_what_the_table_says(tmp_path):
    now = REFERENCE.with_columns(pl.col("x") * 1.5, w=pl.lit("new"))
    pr.save_profile(PROFILE, tmp_path/"p")
    loaded = pr.load_profile(tmp_path/"p")
    fields = ("name", "kind", "verdict", "effect", "effect_low", "effect_high", "psi", "ks", "p_adjusted", "missing_delta", "unseen_share", "unseen_values")
    said = [[[getattr(c, f) for f in fields] for c in dr.compare(p, now, "u").columns] for p in (PROFILE, loaded)]
    assert said[0] == said[1]
    with pytest.raises(RecsysError, match="unit"): dr.compare(loaded, now)
    with pytest.raises(RecsysError, match="already"): pr.save_profile(PROFILE, tmp_path/"p")
    with pytest.raises(RecsysError, match="not a profile"): pr.load_profile(tmp_path)


def day_of(k): return str(date(2026, 1, 5) + timedelta(k))


def test_the_store(tmp_path):
    rng = np.random.default_rng(0)
    rows = lambda k: pl.DataFrame({"visitor": rng.integers(0, 90, 200), "x": rng.normal(size=200), "version": ["v1" if k < 5 else "v2"] * 200})
    made = {day_of(k): rows(k) for k in range(10)}
    span = [(d, lambda d=d: made[d]) for d in made]
    keep = lambda days, again=0: pr.profile_days(tmp_path/"s", days, 3, again)
    assert keep(span[:8]) == list(made)[:8] and keep(span) == list(made)[8:] and keep(span) == [] and keep(span, 2) == list(made)[8:]   # late events: the last days anew
    store = pr.Store(tmp_path/"s")
    assert pr.kept(store)["rows"].to_list() == [200] * 10 and pr.kept(store)["model"].unique().sort().to_list() == ["v1", "v2"]
    week = pr.window_of(store, day_of(0), day_of(6))
    assert same(week, pr.shrink(ms.measure(pl.concat([made[day_of(0)]]).drop("version"), store.frozen, "visitor"), store.frozen) + pr.window_of(store, day_of(1), day_of(6)))
    assert pr.window_of(store, day_of(0), day_of(9), model="v2").rows == 1000 and pr.window_of(store, "2020-01-01", "2020-02-01") is None
    assert [w.rows for w in pr.weeks_before(store, day_of(10), 3, 4)] == [800, 800, 400]
    store.write(made[day_of(0)].drop("version")[:50], day_of(0), model="v1")                  # again: in place of what was there
    assert pr.window_of(store, day_of(0), day_of(0)).rows == 50
    file = pr.kept(store)["file"][0]
    open(file, "wb").write(b"PAR1")
    with pytest.raises(RecsysError, match="profile of a window"): pr.kept(store)


def test_memory_is_flat(tmp_path):
    "Ten times the rows, no more memory of Python's and numpy's own (polars' batches are outside of it)."
    rng, peaks = np.random.default_rng(0), []
    profile = dr.profile_of(pl.DataFrame({"u": np.arange(1000), "x": rng.normal(size=1000)}), "u")
    for n in (300_000, 3_000_000):
        pl.DataFrame({"u": rng.integers(0, n, n), "x": rng.normal(size=n)}).write_parquet(tmp_path/"t.parquet")
        tracemalloc.start()
        assert ms.measure(ms.Table(tmp_path/"t.parquet"), profile.frozen, "u").rows == n
        peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


# ---- where, and since when

def shop(n, seed, broken=False, users=None):
    rng = np.random.default_rng(seed)
    device, day = rng.choice(["phone", "desktop", "tablet"], n, p=[.6, .3, .1]), rng.integers(0, 10, n)
    price = rng.lognormal(2, 1, n) * np.where(broken & (device == "tablet") & (day >= 5), 6, 1)
    return pl.DataFrame(dict(user=rng.integers(0, users or n // 8, n), price=price, holes=np.where(rng.random(n) < np.where(broken & (device == "phone"), .3, .1), np.nan, 1.), device=device,
                             country=rng.choice(["AT", "DE", "FR", None], n), day=[date(2026, 3, 1) + timedelta(int(d)) for d in day]))


def blame(a, b):
    profile = dr.profile_of(a, "user", [b])
    now = ms.measure(b, profile.frozen, "user")
    return rc.root_causes(dr.compare(a, b, "user").columns, profile, now, [ms.Table(a), ms.Table(b)])


def test_the_segment_that_drifted_is_named():
    found = {c.column: c for c in blame(shop(30_000, 1), shop(30_000, 2, True))}
    assert (found["price"].segment, found["price"].value, found["price"].since) == ("device", "tablet", "2026-03-06")
    assert found["price"].explained == pytest.approx(1, abs=.15) and found["price"].p <= .01 and found["price"].after < found["price"].before
    assert (found["holes"].segment, found["holes"].value, found["holes"].since) == ("device", "phone", "2026-03-01")
    assert "device = tablet" in rc.cause_sentence(found["price"])


def test_a_drift_that_is_everywhere_blames_nobody():
    "At 1 % at most 3 of 30 searches find something (binomial: 99.7 %)."
    a, hits = shop(8000, 1), 0
    for k in range(30): hits += bool(blame(a, shop(8000, 10 + k).with_columns(pl.col("price") * 1.4)))
    assert hits <= 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=6))
def test_parts_add_up(segments):
    rows = lambda i: rc.Tally([str(k) for k in range(len(segments))], np.array([[s[i] + s[i + 1]] for s in segments]), np.array([[s[i]] for s in segments]))
    r, c = rows(0), rows(2)
    if not r.rows.sum() or not c.rows.sum(): return
    within, mix = rc.parts(r, c)
    assert (within + mix).sum() == pytest.approx(c.hits.sum() / c.rows.sum() - r.hits.sum() / r.rows.sum(), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.floats(.02, .4))
def test_the_day_of_a_change(k, before):
    rng = np.random.default_rng(k)
    rows = np.full(10, 4000)
    hits = rng.binomial(rows, np.where(np.arange(10) >= k, min(before + .3, .9), before))
    assert rc.change_day([f"{i}" for i in range(10)], hits, rows, before) == str(k)


# ---- segments that are kept

def test_what_was_kept_blames_whom_the_rows_blame(tmp_path):
    "The same segment, share and day from the counts of the days as from their rows; versions are segments, too."
    from datetime import timedelta
    first, rows = date(2026, 3, 1), {}
    for k in range(20):
        part = shop(1500, 100 + k, users=900).drop("day").rename(dict(user="visitor")).with_columns(country=pl.Series(np.random.default_rng(k).choice(["AT", "DE", "FR"], 1500)))
        rows[str(first + timedelta(k))] = part.with_columns(version=pl.lit("v1" if k < 16 else "v2"), price=pl.when((pl.col("device") == "tablet") & (k >= 14)).then(pl.col("price") * 6).otherwise("price"),
                                                            holes=pl.when(pl.lit(k >= 16) & (pl.int_range(pl.len()) % 4 == 0)).then(None).otherwise("holes"))
    days = list(rows)
    pr.profile_days(tmp_path/"s", [(d, lambda d=d: rows[d]) for d in days], 10, 0, segments=("device", "country"))
    store, was, now = pr.Store(tmp_path/"s"), (days[0], days[9]), (days[10], days[19])
    kept = pr.kept(store)
    assert set(kept["segment"]) == {"", *(f"device={v}" for v in ("phone", "desktop", "tablet")), *(f"country={v}" for v in ("AT", "DE", "FR"))}
    assert kept.filter(pl.col("segment").str.starts_with("device"))["rows"].sum() == kept.filter(pl.col("segment") == "")["rows"].sum() == 30_000
    r, c = (pr.window_of(store, *span) for span in (was, now))
    columns = dr.compare(dr.Profile(store.frozen, r, "visitor"), c, "visitor").columns
    found = {x.column: x for x in rc.kept_causes(columns, store, r, c, was, now)}
    tables = [ms.Table(pl.concat([rows[d].with_columns(at=pl.lit(date.fromisoformat(d))) for d in days if span[0] <= d <= span[1]])) for span in (was, now)]
    profile = dr.Profile(store.frozen, r, "visitor")
    plain = {x.column: x for x in rc.root_causes(columns, profile, c, tables)}
    a, b = found["price"], plain["price"]
    assert (a.segment, a.value, a.since) == (b.segment, b.value, b.since) == ("device", "tablet", days[14])
    assert a.explained == pytest.approx(b.explained, abs=.1) and a.before == pytest.approx(b.before, abs=.05)
    assert (found["holes"].segment, found["holes"].value, found["holes"].since) == ("version", "v2", days[16])
    assert pr.window_of(store, *now, "device=tablet").rows == sum(t.rows for t in [ms.Table(tables[1].frame.filter(pl.col("device") == "tablet"))])
    assert pr.window_of(store, *now, "device=watch") is None


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80), st.text(max_size=80))
def test_any_segment_has_a_file_of_its_own(tmp_path_factory, one, two, model):
    "Names of any text, long ones too, are files, and different ones are different files."
    folder = tmp_path_factory.mktemp("s")/"s"
    store = pr.Store.begin(folder, dr.profile_of(REFERENCE, "u"))
    for segment in {one, two}: store.write(REFERENCE.head(3 + len(segment)), "2026-01-01", segment, model)
    assert all(pr.window_of(store, "2026-01-01", "2026-01-01", s, model).rows == 3 + len(s) for s in {one, two})


def test_a_context_without_segments_makes_no_columns(tmp_path):
    rows = lambda: pl.DataFrame(dict(visitor=[f"{i}" for i in range(300)], price=np.arange(300.), device=pl.Series([None] * 300, dtype=pl.String)))
    pr.profile_days(tmp_path/"s", [(f"2026-01-0{k}", rows) for k in range(1, 9)], 5, segments=("device",))
    store = pr.Store(tmp_path/"s")
    assert list(store.frozen) == ["price"] and set(pr.kept(store)["segment"]) == {""} and list(pr.window_of(store, "2026-01-01", "2026-01-08").kinds) == ["price"]
