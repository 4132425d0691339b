"The sweep against plain loops over every event: each aggregate, each formula, each row."
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st

import brute
from brute import DAY, START, batch, lazy, log_frame, row_frame
from recsys.features.definitions import ABSENT, BESIDES, COUNTED, LIVE, LIVE_NAMES, PROGRAM, UNKNOWN, WINDOWS
from recsys.features.formulas import ENTITIES, TYPES, Aggregate, compiled, count, finish, first, last, total
from recsys.data.events import in_order, sessionize
from recsys.features.offline import codes, log_of, sums_at, with_marks, with_seconds, with_sessions

FORMULAS = [f.formula for f in LIVE]
kinds = st.lists(st.sampled_from(TYPES), min_size=1, max_size=3, unique=True).map(tuple)
windows = st.sampled_from([0, 1, 5, 3600, DAY, 7 * DAY, 30 * DAY])
aggregates = st.one_of(
    st.builds(Aggregate, st.sampled_from(list(ENTITIES)), st.just("count"), kinds, windows),
    st.builds(Aggregate, st.sampled_from(list(ENTITIES)), st.just("sum"), kinds, windows, st.just("cents")),
    st.builds(Aggregate, st.sampled_from(["item", "category", "user", "user_item", "user_category"]), st.just("sum"), kinds, st.just(0), st.sampled_from(["fresh", "again", "stretch"])),
    st.builds(Aggregate, st.sampled_from(list(ENTITIES)), st.sampled_from(["first", "last"]), kinds))

def same_features(got, wanted):
    "All bits; a logarithm may differ in the last one between numpy and Python."
    logs = np.array([f.op == "trend" for f in FORMULAS])
    assert got[:, ~logs].tobytes() == wanted[:, ~logs].tobytes()
    np.testing.assert_array_max_ulp(got[:, logs], wanted[:, logs], 1)

@settings(max_examples=20)
@given(st.data())
def test_every_aggregate_and_every_feature_is_what_loops_find(data):
    log = data.draw(brute.logs())
    rows = data.draw(brute.asked(log))
    wanted, got = brute.sums(log, rows, PROGRAM.aggregates), batch(log, rows, PROGRAM.aggregates)
    wrong = [(PROGRAM.aggregates[j], got[i, j], wanted[i, j]) for i, j in zip(*np.nonzero(wanted != got))]
    assert not wrong, wrong
    same_features(finish(PROGRAM, got, rows["t"].to_numpy()), brute.features(FORMULAS, PROGRAM.aggregates, wanted, rows["t"]))

@settings(max_examples=80)
@given(st.data())
def test_any_program_of_aggregates_is_what_loops_find(data):
    log, asked = data.draw(brute.logs()), tuple(data.draw(st.lists(aggregates, min_size=1, max_size=6, unique=True)))
    rows = data.draw(brute.asked(log))
    assert batch(log, rows, asked).tolist() == brute.sums(log, rows, asked).tolist()

def test_a_larger_log_late_by_weeks():
    log, rows = brute.random_log(700, 1, late=.4, lateness=40 * DAY, users=6, items=8, sessions=15), brute.random_rows(60, 1, 90, users=6, items=8, sessions=15)
    wanted, got = brute.sums(log, rows, PROGRAM.aggregates), batch(log, rows, PROGRAM.aggregates)
    assert (wanted == got).all()
    same_features(finish(PROGRAM, got, rows["t"].to_numpy()), brute.features(FORMULAS, PROGRAM.aggregates, wanted, rows["t"]))

@pytest.mark.parametrize("log", [log_frame([]), log_frame([("a", 2, START, START, 0, 0, 0, 0, 5)])], ids=["no events", "one view"])
def test_what_nobody_did_is_nothing(log):
    rows = row_frame([(0, START + 9, 0, 0, 0, 0), (1, START, 0, 0, 0, 0), (2, START + 9, 7, 7, 7, 7)])
    assert (batch(log, rows, PROGRAM.aggregates) == brute.sums(log, rows, PROGRAM.aggregates)).all()

def test_no_rows_no_answer():
    assert batch(brute.random_log(20, 0), row_frame([]), PROGRAM.aggregates).shape == (0, len(PROGRAM.aggregates))

def test_the_order_of_events_and_rows_does_not_matter():
    log, rows = brute.random_log(3000, 2), brute.random_rows(300, 2)
    first_way = batch(log, rows, PROGRAM.aggregates)
    shuffled = rows.sample(fraction=1, shuffle=True, seed=5)
    again = batch(log.sample(fraction=1, shuffle=True, seed=4), shuffled, PROGRAM.aggregates)
    by = lambda r: np.argsort(r["row"].to_numpy())
    assert (first_way[by(rows)] == again[by(shuffled)]).all()

@settings(max_examples=12)
@given(st.data())
def test_nothing_known_at_the_moment_or_later_counts(data):
    log = data.draw(brute.logs())
    rows = data.draw(brute.asked(log, 1)).head(1)
    known = log.filter(pl.col("known") < rows["t"][0])
    assert batch(log, rows, PROGRAM.aggregates).tobytes() == batch(known, rows, PROGRAM.aggregates).tobytes()

# ---- edges, one by one

def views(*times): return log_frame([(f"e{i}", 2, START + ts, START + known, 0, 0, 0, 0, 0) for i, (ts, known) in enumerate(times)])
def at(log, t, *asked): return batch(log, row_frame([(0, START + t, 0, 0, 0, 0)]), asked)[0].tolist()

def test_known_in_the_very_second_is_not_known(): assert [at(views((10, 10)), t, count("item", "view"))[0] for t in (9, 10, 11)] == [0, 0, 1]
def test_a_window_holds_its_first_second(): assert [at(views((0, 0)), t, count("item", "view", hours=1))[0] for t in (3599, 3600, 3601)] == [1, 1, 0]
def test_late_by_a_day_counts_from_its_arrival():
    log = views((0, DAY + 60))
    assert [at(log, t, count("item", "view", days=1), count("item", "view", days=7), last("item", "view")) for t in (DAY + 60, DAY + 61)] == [[0, 0, -1], [0, 1, START]]

def test_late_by_exactly_the_shortest_window():
    log = views((0, 3600))
    assert [at(log, t, count("item", "view", hours=1), count("item", "view", hours=2)) for t in (3600, 3601, 7200, 7201)] == [[0, 0], [0, 1], [0, 1], [0, 0]]

# ---- marks

@settings(max_examples=60)
@given(brute.logs())
def test_marks_add_up_to_pairs_buyers_and_spans(log):
    got = with_marks(lazy(log)).collect().to_native()
    assert sorted(got["event_id"]) == sorted(log["event_id"])
    assert got.filter(pl.col("kind") != 4).select(pl.col("fresh", "again", "stretch").sum()).row(0) == (0, 0, 0)
    for k in sorted(set(log["known"])):
        seen, marked = log.filter(pl.col("known") <= k, pl.col("kind") == 4), got.filter(pl.col("known") <= k)
        pairs = seen.group_by("user", "item").agg(n=pl.len(), span=pl.col("ts").max() - pl.col("ts").min())
        assert marked.select(pl.col("fresh", "again", "stretch").sum()).row(0) == (pairs.height, (pairs["n"] > 1).sum(), pairs["span"].sum())

def test_a_late_first_purchase_stretches_when_it_arrives():
    log = log_frame([("b", 4, START + 100, START + 100, 0, 0, 0, 0, 0), ("a", 4, START, START + 500, 0, 0, 0, 0, 0), ("c", 4, START + 50, START + 900, 0, 0, 0, 0, 0)])
    got = with_marks(lazy(log)).collect().to_native().sort("known")
    assert got.select("event_id", "fresh", "again", "stretch").rows() == [("b", 1, 0, 0), ("a", 0, 1, 100), ("c", 0, 0, 0)]

# ---- what the registry keeps beside the ranker's columns

def day_log(*events) -> pl.DataFrame:
    "(type, days before START, cents) of one shopper and one item, each known at once."
    return log_frame([(f"e{i:02}", TYPES.index(kind), START - round(ago * DAY), START - round(ago * DAY), 0, 0, 0, 0, cents) for i, (kind, ago, cents) in enumerate(events)])

def live_of(log, *names) -> list[float]:
    "Live features of that shopper and item a second after START."
    program = compiled([LIVE[LIVE_NAMES.index(n)].formula for n in names])
    rows = row_frame([(0, START + 1, 0, 0, 0, 0)])
    return finish(program, batch(log, rows, program.aggregates), rows["t"].to_numpy())[0].tolist()

@pytest.mark.parametrize("what, kind", [*COUNTED.items(), *BESIDES.items()])
def test_each_event_type_counts_in_its_own_windows_alone(what, kind):
    log = day_log((kind, .02, 0), (kind, .5, 0), (kind, 3, 0), (kind, 20, 0), (kind, 40, 0))
    entities = ("item", "user", "user_category") if what in COUNTED else ("item", "user")
    counts = [n for n in LIVE_NAMES if n.split("_")[-1] in WINDOWS and n.startswith(tuple(f"{e}_{w}_" for e in entities for w in (*COUNTED, *BESIDES)))]
    found = {n: v for n, v in zip(counts, live_of(log, *counts)) if v}
    assert found == {f"{e}_{what}_{w}": k + 1 for e in entities for k, w in enumerate(WINDOWS)}

def test_a_promotion_shows_in_the_prices_of_the_events():
    log = day_log(*[("view", 10, 8000)] * 3, ("view", .5, 6000), ("purchase", 20, 8000), ("purchase", 2, 4000), ("return", .1, 1))
    assert live_of(log, "item_shown_price_1d", "item_paid_price_7d") == [np.float32(60 / 75), np.float32(40 / 60)]
    unpriced = day_log(("view", .5, 0), ("view", 10, 0), ("purchase", 20, 8000))
    assert live_of(unpriced, "item_shown_price_1d", "item_paid_price_7d") == [UNKNOWN, UNKNOWN]  # no view has a price; nobody bought it this week

def test_an_empty_shelf_is_silent():
    log = day_log(*[("purchase", d, 100) for d in (30, 28, 26, 24)], ("add_to_cart", 24, 100), *[("view", d / 100, 100) for d in range(80)])
    since, cart, usual, rate = live_of(log, "item_purchase_days_since", "item_cart_days_since", "item_purchase_interval", "item_buy_rate_1d")
    assert since == cart == np.float32(24 + 1 / DAY) and usual == 2 and rate == np.float32(1 / 121)
    assert live_of(day_log(), "item_purchase_days_since", "item_cart_days_since", "item_purchase_interval", "item_buy_rate_1d") == [ABSENT, ABSENT, UNKNOWN, np.float32(1 / 41)]

# ---- from contract columns to the coded log

def shop_events(**changes):
    "Three events of one shopper."
    noon = datetime(2024, 3, 31, 0, 59, 59, 999_999, tzinfo=timezone.utc)
    base = dict(event_id=["a", "b", "c"], event_type=["view", "add_to_cart", "purchase"], ts=[noon, noon + timedelta(seconds=1), noon + timedelta(hours=3)], received_ts=[noon + timedelta(days=2), noon, None],
                visitor_id=["v"] * 3, user_id=["u", None, "u"], session_id=["s"] * 3, item_id=["tea", "tea", "cup"], price=[None, 1.005, 2.675], consent=[True] * 3)
    return pl.DataFrame(base | changes, schema_overrides=dict(price=pl.Float64, received_ts=pl.Datetime("us", "UTC"), user_id=pl.String, item_id=pl.String))

def coded(events, items=("cup", "tea")):
    e = with_seconds(lazy(events))
    catalogue = lazy(pl.DataFrame(dict(item_id=list(items), item=range(len(items)), category=[0] * len(items)), schema_overrides=dict(item=pl.Int64, category=pl.Int64)))
    import narwhals as nw
    users, sessions = codes(e.select(who=nw.coalesce("user_id", "visitor_id")), "who", "user"), codes(e, "session_id", "session")
    return log_of(e, catalogue, users, sessions).collect().to_native().sort("event_id")

def test_seconds_are_floored_and_known_is_never_before_ts():
    log = coded(shop_events())
    second = int(datetime(2024, 3, 31, 0, 59, 59, tzinfo=timezone.utc).timestamp())
    assert log["ts"].to_list() == [second, second + 1, second + 3 * 3600] and log["known"].to_list() == [second + 2 * DAY, second + 1, second + 3 * 3600]
    assert all(log[c].dtype == pl.Int64 for c in log.columns if c != "event_id")

@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Kolkata", "Europe/Berlin"])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_a_moment_is_the_same_in_any_zone_and_unit(zone, unit):
    "2024-03-31 00:59:59.999 UTC is the second before Berlin's clocks go forward."
    events = shop_events().with_columns(pl.col("ts", "received_ts").dt.convert_time_zone(zone).dt.cast_time_unit(unit))
    assert coded(events).equals(coded(shop_events()))

def test_without_consent_item_or_known_type_nothing_is_learnt():
    assert coded(shop_events(consent=[True, False, None]))["event_id"].to_list() == ["a"]
    assert coded(shop_events(item_id=["tea", None, "cup"]))["event_id"].to_list() == ["a", "c"]
    assert coded(shop_events(event_type=["view", "search", "share"]))["event_id"].to_list() == ["a"]
    assert coded(shop_events(), items=("tea",))["event_id"].to_list() == ["a", "b"]

def test_kinds_are_positions_and_cents_are_rounded_half_up():
    log = coded(shop_events(event_type=list(TYPES[:3]), price=[.125, .375, None]))
    assert log["kind"].to_list() == [0, 1, 2] and log["cents"].to_list() == [13, 38, 0]

@given(st.lists(st.one_of(st.none(), st.text(max_size=4))))
def test_codes_are_dense_and_in_the_order_of_the_ids(ids):
    got = codes(lazy(pl.DataFrame(dict(id=pl.Series(ids, dtype=pl.String)))), "id", "code").collect().to_native().sort("code")
    assert got["code"].to_list() == list(range(len({*ids} - {None}))) and got["code"].dtype == pl.Int64
    assert got["id"].to_list() == sorted({*ids} - {None})

def test_who_is_the_user_or_else_the_visitor():
    log = coded(shop_events(user_id=[None, None, "u"]))
    assert log["user"].to_list() == [1, 1, 0]

# ---- sessions

@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([0, 1, 600, 1799, 1800, 1801, 3600, 86_400]), st.sampled_from([0, 1, 999_999]), st.sampled_from([None, None, None, "own"])), min_size=1, max_size=30), st.randoms())
def test_sessions_are_those_of_ingest(pauses, chance):
    "Pauses of exactly the gap and a microsecond beside it, ties, midnights, visits that the source knows in between; rows in any order."
    at, rows = datetime(2024, 3, 1, 22, tzinfo=timezone.utc), []
    for n, (visitor, seconds, micros, own) in enumerate(pauses):
        at += timedelta(seconds=seconds, microseconds=micros)
        rows.append(dict(event_id=f"{n * 7 % 31:02}-{n}", ts=at, visitor_id=visitor, session_id=own))
    events = pl.DataFrame(rows, schema=dict(event_id=pl.String, ts=pl.Datetime("us", "UTC"), visitor_id=pl.String, session_id=pl.String))
    wanted = sessionize(in_order(events), 30).select("event_id", "session_id")
    chance.shuffle(rows)
    got = with_sessions(lazy(pl.DataFrame(rows, schema=events.schema)), 30).collect().to_native()
    both = got.select("event_id", got="session_id").join(wanted, on="event_id")
    pairs = set(both.select("got", "session_id").rows())
    assert both.height == len(rows) and len(pairs) == both["got"].n_unique() == both["session_id"].n_unique()
