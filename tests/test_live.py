"The updater against the batch job: every integer and every bit of every feature, however the log arrives."
from datetime import datetime, timedelta, timezone

import narwhals as nw, numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st

import brute
from brute import DAY, START, batch, lazy, log_frame, row_frame
from recsys.core.settings import RecsysError
from recsys.data.datasets import complete_journey
from recsys.data.events import read_events
from recsys.data.importers import rows_of
from recsys.data.ingest import ingest
from recsys.data.simulator import Shop, simulate
from recsys.features.definitions import LIVE_NAMES, PROGRAM
from recsys.features.formulas import Aggregate, compiled, amount, count, finish, last, nothing
from recsys.features.live import EVENT, PERIOD, Updater, replay
from recsys.features.offline import codes, log_of, sums_at, with_marks, with_seconds

def numbered(log: pl.DataFrame) -> pl.DataFrame:
    "`log` with an int64 `id` for each event_id; in no order."
    return log.with_columns(id=pl.col("event_id").rank("dense").cast(pl.Int64))

def same(log, rows, disorder=None, arriving=None):
    "Both ways agree in all integers and bits; `arriving`: what comes online, if more than what the batch job has."
    wanted, got = batch(log, rows, PROGRAM.aggregates), replay(PROGRAM, numbered(log) if arriving is None else arriving, rows, disorder)
    wrong = [(PROGRAM.aggregates[j], rows.row(i, named=True), got[i, j], wanted[i, j]) for i, j in list(zip(*np.nonzero(wanted != got)))[:5]]
    assert not wrong, wrong
    t = rows["t"].to_numpy()
    assert finish(PROGRAM, got, t).tobytes() == finish(PROGRAM, wanted, t).tobytes()
    return wanted

def blocks(log: pl.DataFrame, sizes, rng=None) -> Updater:
    "An updater that got the log in pieces of so many events."
    u, log = Updater(PROGRAM), numbered(log).sort("known", "id")
    ids, known, events = log["id"].to_numpy(), log["known"].to_numpy(), log.select(EVENT).to_numpy()
    begin = 0
    while begin < len(ids):
        end = begin + int(next(sizes))
        u.update(ids[begin:end], known[begin:end], events[begin:end])
        begin = end
    return u

keys_of = lambda rows: rows.select("user", "item", "category", "session").to_numpy()

# ---- random logs

@settings(max_examples=35)
@given(st.data())
def test_small_logs_in_order_and_in_disorder(data):
    log = data.draw(brute.logs())
    rows = data.draw(brute.asked(log))
    same(log, rows)
    same(log, rows, disorder=data.draw(st.integers(0, 99)))

@pytest.mark.parametrize("seed", range(4))
def test_larger_logs_late_by_weeks_in_disorder(seed):
    log, rows = brute.random_log(12_000, seed, late=.3, lateness=[0, 2 * DAY, 29 * DAY, 60 * DAY][seed] + 1, users=8, items=12), brute.random_rows(400, seed, 55, users=8, items=12)
    sums = same(log, rows, disorder=seed)
    moved = (sums != nothing(PROGRAM.aggregates)).any(axis=0)
    assert moved.all(), [a for a, m in zip(PROGRAM.aggregates, moved) if not m]  # each aggregate is put to the test

@settings(max_examples=25)
@given(st.data())
def test_what_comes_twice_counts_once(data):
    "The batch job has each event as it was known first; online each copy comes, up to three days after, or two and in disorder."
    log = data.draw(brute.logs(20))
    disorder = data.draw(st.none() | st.integers(0, 9))
    again = data.draw(st.lists(st.tuples(st.integers(0, 19), st.integers(0, PERIOD if disorder is None else 2 * DAY)), max_size=20))
    copies = [log.row(i, named=True) | dict(known=log["known"][i] + d) for i, d in again if i < log.height]
    arriving = numbered(pl.concat([log, pl.DataFrame(copies, schema=log.schema)]))
    same(log, data.draw(brute.asked(log)), disorder, arriving)

def test_many_copies_of_a_long_log():
    log, rng = brute.random_log(5000, 7, days=20), np.random.default_rng(0)
    copies = log.sample(2500, seed=1).with_columns(known=pl.col("known") + pl.Series(rng.integers(0, 2 * DAY + 1, 2500)))
    same(log, brute.random_rows(200, 7, 30), 3, numbered(pl.concat([log, copies, copies])))

# ---- how the events are handed over does not matter

def test_one_at_a_time_or_all_at_once():
    log, rows = brute.random_log(6000, 3, days=12, users=400, items=900, sessions=3000), brute.random_rows(300, 3, users=400, items=900, sessions=3000)
    late_copies = log.sample(800, seed=2).with_columns(known=pl.col("known") + 4 * DAY)  # some are still remembered, some are not
    log, t = pl.concat([log, late_copies]), START + 30 * DAY
    rng = np.random.default_rng(1)
    one, few, all_ = (blocks(log, s) for s in (iter(lambda: 1, 0), iter(lambda: rng.integers(1, 700), 0), iter(lambda: 10**9, 0)))
    sums = [u.sums(keys_of(rows), t) for u in (one, few, all_)]
    assert (sums[0] == sums[1]).all() and (sums[0] == sums[2]).all()
    assert one.state.counts.tolist() == few.state.counts.tolist() == all_.state.counts.tolist() and 0 < one.state.counts[1] < 800

def test_any_integers_in_any_layout():
    log, rows = brute.random_log(500, 4).sort("known", "event_id"), brute.random_rows(50, 4)
    u = Updater(PROGRAM)
    u.update(np.arange(500, dtype=np.int32), log["known"].to_numpy(), np.asfortranarray(log.select(EVENT).to_numpy()))
    u.update(np.arange(0, dtype=np.int64), np.zeros(0, np.int64), np.zeros((0, 7), np.int64))
    t = START + 61 * DAY
    assert (u.sums(np.asfortranarray(keys_of(rows)), t) == batch(log, rows.with_columns(t=pl.lit(t, pl.Int64)), PROGRAM.aggregates)).all()

def test_ids_are_remembered_for_two_periods_and_memory_is_bounded():
    u, e = Updater(PROGRAM), lambda t: np.array([[t, 2, 0, 0, 0, 0, 0]])
    t0 = START // PERIOD * PERIOD + PERIOD
    for k in range(4000):
        t = t0 + k * PERIOD // 100
        u.update(np.array([k]), np.array([t]), e(t))
        if k >= 100: u.update(np.array([k - 100]), np.array([t]), e(t))  # three days later to the second
    assert u.state.counts[:2].tolist() == [4000, 3900]
    assert len(u.state.seen) <= 1024 and len(u.state.seen_before) <= 1024

def test_the_wheel_uses_its_places_again():
    u, n = Updater(PROGRAM), 2000
    for day in range(0, 400, 10):
        t = START + day * DAY
        u.update(np.arange(n) + day * n, np.full(n, t), np.tile([t, 2, 0, 0, 0, 0, 0], (n, 1)))
    assert u.state.free[1] <= 5 * n
    assert u.sums(np.array([[0, 0, 0, 0]]), START + 391 * DAY)[0, [i for i, a in enumerate(PROGRAM.aggregates) if a == count("item", "view", days=30)]] == 3 * n

# ---- clocks

def test_a_jump_longer_than_the_wheel():
    log = pl.concat([brute.random_log(800, 5, days=10), brute.random_log(800, 6, days=10).with_columns(pl.col("ts", "known") + 200 * DAY, event_id=pl.col("event_id") + "b")])
    rows = pl.concat([brute.random_rows(60, 5, 20), brute.random_rows(60, 6, 20).with_columns(pl.col("t") + 195 * DAY, pl.col("row") + 60)])
    same(log, rows, 1)

def test_an_event_older_than_the_longest_window_counts_ever_and_in_no_window():
    log = log_frame([("old", 2, START - 400 * DAY, START, 0, 0, 0, 0, 0), ("edge", 2, START + 1 - 30 * DAY, START, 0, 0, 0, 0, 0), ("new", 2, START, START, 0, 0, 0, 0, 0)])
    rows = row_frame([(0, START + 1, 0, 0, 0, 0), (1, START + 2, 0, 0, 0, 0)])
    same(log, rows)
    got = finish(PROGRAM, replay(PROGRAM, numbered(log), rows), rows["t"].to_numpy())
    assert got[:, LIVE_NAMES.index("item_views_30d")].tolist() == [2, 1] and got[:, LIVE_NAMES.index("user_item_views")].tolist() == [3, 3]

@settings(max_examples=20)
@given(st.data())
def test_a_live_service_holds_back_what_is_not_known_yet(data):
    """Events come in batches with the time of the clock on the wall; some claim to come from the future by up to two days, some come in the
    second of a request. The answers are those of the batch job."""
    log = data.draw(brute.logs()).with_columns(received=pl.col("known"))
    ahead = data.draw(st.lists(st.sampled_from([0, 0, 0, 1, 60, DAY, 2 * DAY]), min_size=log.height, max_size=log.height))
    log = log.with_columns(ts=pl.when(pl.Series(ahead, dtype=pl.Int64) > 0).then(pl.col("received") + pl.Series(ahead, dtype=pl.Int64)).otherwise("ts"))
    log = numbered(log.with_columns(known=pl.max_horizontal("ts", "received")))
    rows = data.draw(brute.asked(log))
    wanted, u = batch(log, rows, PROGRAM.aggregates), Updater(PROGRAM)
    happens = sorted([(t, 0, e) for t, e in zip(log["received"], log.to_dicts())] + [(t, 1, i) for i, t in enumerate(rows["t"])], key=lambda x: x[:2])
    got = np.empty_like(wanted)
    for now, asks, x in happens:
        if asks: got[x] = u.sums(keys_of(rows)[x:x + 1], now)[0]
        else: u.update(np.array([x["id"]]), np.array([x["known"]]), np.array([[x[c] for c in EVENT]]), now=now)
    assert (got == wanted).all()

def test_an_updater_does_not_look_back():
    u, row = Updater(PROGRAM), np.array([[0, 0, 0, 0]])
    u.update(np.array([1]), np.array([START]), np.array([[START, 2, 0, 0, 0, 0, 0]]))
    for t in (START - 1, START):
        with pytest.raises(RecsysError, match="cannot look back"): u.sums(row, t)
    u.sums(row, START + 5); u.sums(row, START + 5)
    with pytest.raises(RecsysError, match="cannot look back"): u.sums(row, START + 4)

# ---- codes

def test_nobody_knows_a_negative_code_or_one_beyond_the_tables():
    log = brute.random_log(600, 8).with_columns(session=pl.when(pl.col("session") % 3 == 0).then(-1).otherwise("session"), user=pl.when(pl.col("user") == 1).then(-1).otherwise("user"),
                                                category=pl.when(pl.col("item") == 2).then(-1).otherwise("category"))
    rows = pl.concat([brute.random_rows(60, 8), row_frame([(60, START + 55 * DAY, -1, -1, -1, -1), (61, START + 55 * DAY, 10**6, 10**6, 10**6, 2**40), (62, START + 55 * DAY, -1, 3, 3, -1)]).select("row", "t", "user", "item", "category", "session")])
    sums = same(log.sort("event_id"), rows, 2)
    assert (sums[60:62] == nothing(PROGRAM.aggregates)).all() and (sums[62] != nothing(PROGRAM.aggregates)).any()

def test_large_codes_do_not_meet():
    "user << 32 | item: pairs of codes near the halves' edges stay apart."
    big = 2**31 - 1
    log = log_frame([(f"e{i}", 4, START + i, START + i, u, item, 0, s, 100) for i, (u, item, s) in enumerate([(0, 5, 2**40), (1, 5, 2**40 + 1), (5, 0, 5), (5, 1, 6)])])
    same(log, row_frame([(i, START + 99, u, item, 0, s) for i, (u, item, s) in enumerate([(0, 5, 2**40), (1, 5, 2**40 + 1), (5, 0, 5), (5, 1, 6), (0, 1, 7), (big, big, big)])]))

# ---- programs

@pytest.mark.parametrize("asked", [
    [count("item", "view")], [last("session", "purchase")], [count("user_category", "click", hours=1), count("item", "click", "view", days=2)],
    [Aggregate("category", "sum", ("return", "purchase"), 5, "cents"), Aggregate("user_item", "sum", ("purchase",), 0, "stretch"), Aggregate("user", "first", ("view", "impression"))]])
def test_other_programs(asked):
    program = compiled([amount(a) for a in asked])
    log, rows = brute.random_log(1500, 9, late=.3, lateness=10 * DAY), brute.random_rows(150, 9)
    assert (replay(program, numbered(log), rows, 5) == batch(log, rows, program.aggregates)).all()

@pytest.mark.parametrize("wrong", [("item", "last", ("view",), 60), ("item", "sum", ("purchase",), DAY, "fresh"), ("session", "sum", ("purchase",), 0, "again")])
def test_what_cannot_be_kept_to_the_bit_is_refused(wrong):
    with pytest.raises(RecsysError): Aggregate(*wrong)

def test_one_row_or_many_the_same_bits():
    sums, t = batch(brute.random_log(3000, 10), rows := brute.random_rows(257, 10), PROGRAM.aggregates), rows["t"].to_numpy()
    whole = finish(PROGRAM, sums, t)
    assert all(finish(PROGRAM, sums[i:i + 1], t[i:i + 1]).tobytes() == whole[i].tobytes() for i in range(len(t)))
    assert np.isfinite(whole).all()

# ---- real logs

def coded(events: pl.LazyFrame, items: pl.DataFrame) -> pl.DataFrame:
    "A log in contract columns as a coded log; the codes are those of the ids, sorted."
    e = with_seconds(nw.from_native(events))
    kinds = items.select("item_id", item=pl.int_range(pl.len()), category=pl.col("category").fill_null("?").rank("dense").cast(pl.Int64) - 1)
    users, sessions = codes(e.select(who=nw.coalesce("user_id", "visitor_id")), "who", "user"), codes(e, "session_id", "session")
    return log_of(e, lazy(kinds), users, sessions).collect().to_native()

def sampled(log: pl.DataFrame, n: int, seed: int) -> pl.DataFrame:
    "Rows at random moments: half of them pairs of the log near a moment at which they met, half of them anybody with anything."
    rng, of_item = np.random.default_rng(seed), dict(log.select("item", "category").unique().rows())
    near, far = log.sample(n // 2, seed=seed), log.sample(n - n // 2, seed=seed + 1)
    item = np.concatenate([near["item"], far["item"].shuffle(seed)])
    t = np.concatenate([near["known"] + rng.integers(0, 2 * DAY, len(near)), rng.integers(log["ts"].min(), log["known"].max() + DAY, len(far))])
    return pl.DataFrame(dict(row=np.arange(n), t=t, user=np.concatenate([near["user"], far["user"]]), item=item, category=[of_item[i] for i in item.tolist()], session=np.concatenate([near["session"], far["session"]])))

def disordered(log: pl.DataFrame, share: float, seed: int) -> pl.DataFrame:
    "`log` with a share of its events late by up to two days."
    rng = np.random.default_rng(seed)
    return log.sort("event_id").with_columns(known=pl.col("known") + pl.Series(np.where(rng.random(log.height) < share, rng.integers(0, 2 * DAY, log.height), 0)))

def with_copies(log: pl.DataFrame, share: float, seed: int) -> pl.DataFrame:
    "What arrives: `log` and copies of a share of it, up to two days after."
    log, rng = numbered(log), np.random.default_rng(seed)
    copies = log.sample(fraction=share, seed=seed)
    return pl.concat([log, copies.with_columns(known=pl.col("known") + pl.Series(rng.integers(0, 2 * DAY + 1, copies.height)))])

def proven(log: pl.DataFrame, rows: pl.DataFrame, arriving=None) -> int:
    "In order and in disorder all integers and bits agree; how many integers were not nothing."
    sums = same(log, rows, None, arriving)
    same(log, rows, 1, arriving)
    return int((sums != nothing(PROGRAM.aggregates)).sum())

def journey(households: int | None = None) -> pl.DataFrame:
    "The purchases of The Complete Journey, of all households or of the first so many; Event columns."
    source = complete_journey()
    events = pl.concat([b.drop("source", "row", "problem", strict=False) for b in source.events.batches()], how="vertical_relaxed")
    some = events["user_id"].unique().sort().head(households) if households else events["user_id"].unique()
    events = events.filter(pl.col("user_id").is_in(some.implode()), pl.col("price").is_finite(), pl.col("event_id").is_first_distinct()).with_columns(consent=pl.lit(True))
    return coded(events.lazy(), rows_of(source.items).unique("item_id").sort("item_id"))

def test_the_complete_journey():
    "Half of 5 % of the households' events late by up to two days, a tenth twice, all in disorder."
    log = disordered(journey(125), .5, 0)
    assert log.height > 50_000
    assert proven(log, sampled(log, 1500, 0), with_copies(log, .1, 0)) > 10_000

@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_the_whole_complete_journey():
    "Every purchase of every household is a row, as of its own second; and as many random moments as a sample has."
    log = disordered(journey(), .3, 1)
    assert log.height > 1_400_000
    arriving = with_copies(log, .1, 1)
    assert proven(log, sampled(log, 20_000, 1), arriving) > 200_000
    rows, marked = log.sort("event_id").select("user", "item", "category", "session", t="ts").with_row_index("row").with_columns(pl.col("row").cast(pl.Int64)), lazy(with_marks(lazy(log)).collect().to_native())
    wanted = [sums_at(marked, lazy(part), PROGRAM.aggregates).collect().to_native().sort("row").drop("row").to_numpy() for part in rows.iter_slices(250_000)]
    wanted, t = np.concatenate(wanted), rows["t"].to_numpy()
    for disorder in (None, 1):
        got = replay(PROGRAM, arriving, rows, disorder)
        assert len(got) == log.height and (got == wanted).all() and finish(PROGRAM, got, t).tobytes() == finish(PROGRAM, wanted, t).tobytes()

def simulated(folder, n: int, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    "A simulated funnel, ingested: its coded log, and what arrived: the same events, those that came twice twice."
    simulate(folder/"shop", n, seed, days=45, shop=Shop(late=.1, duplicates=.05))
    ingest("shop/simulated.toml", folder/"clean", None, datetime(2026, 1, 1, tzinfo=timezone.utc), 30, 10, .5, root=folder)
    items = pl.read_parquet(folder/"clean/items.parquet").sort("item_id")
    log = coded(read_events(folder/"clean/events", None), items)
    raw = pl.read_parquet(sorted((folder/"shop/events").glob("*.parquet"))).select("event_id", k=pl.max_horizontal("ts", "received_ts").dt.epoch("s"))
    copies = raw.join(numbered(log), on="event_id", maintain_order="left").with_columns(known="k").drop("k")
    assert copies.height > 1.03 * log.height and (copies.group_by("event_id").agg(pl.col("known").min()).join(log, on="event_id").select((pl.col("known") == pl.col("known_right")).all())).item()
    return log, copies.select(*log.columns, "id")

def test_a_simulated_funnel(tmp_path):
    log, arriving = simulated(tmp_path, 30_000, 1)
    assert proven(log, sampled(log, 1500, 2), arriving) > 20_000

@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_a_simulated_funnel_of_full_size(tmp_path):
    log, arriving = simulated(tmp_path, 2_000_000, 2)
    assert proven(log, sampled(log, 20_000, 3), arriving) > 500_000
