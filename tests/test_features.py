"The past and nothing but the past: the snapshot against plain loops over the events that were known at the moment."
import hashlib, math
from datetime import datetime, timedelta, timezone
from statistics import mean, median

import narwhals as nw
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st

from recsys.candidates.blend import load_state
from recsys.core.settings import RecsysError
from recsys.data.events import conform, read_events, write_events
from recsys.features.definitions import CART, FEATURES, HISTORY, ITEM, LIVE, LIVE_ITEM, LIVE_USER, NAMES, NIGHTLY_ITEM, NIGHTLY_USER, OFFSET, RANKED_ITEM, RANKED_USER, USER
from recsys.features.offline import in_base
from recsys.features.point_in_time import DAY, PAIR, category_codes, encode, load_arrays, promotions_at, save_arrays, snapshot
from recsys.ranking.rows import Cases, training_rows

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
ITEMS = pl.Series([f"i{k}" for k in range(6)])
PATHS = pl.Series(["A > B > C", "A > B > C", "A > B > D", "A > E > F", "G > H > I", None])
KINDS, USERS, WINDOWS, HALF, PRIOR = category_codes(PATHS), ("u0", "u1", "u2", "u3"), (3, 10, 30), 20.0, 4.0
NOTHING = pl.DataFrame(schema=dict(item=pl.Int32, item_display=pl.Float32, item_mailer=pl.Float32, item_coupon=pl.Float64))

# ---- logs: (user, session, item, seconds after START, seconds until it is known, price)

HOURS = st.integers(0, 24 * 40).map(lambda h: h * 3600)

@st.composite
def logs(draw, late=False, again=False):
    "Random small logs; `late`: sessions that arrive late; `again`: an item repeated in a session, each event with its own delay."
    rows = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5), st.integers(0, 20),
            st.sampled_from([None, 1.0, 2.5, 4.0, 0.0]),
                                   st.integers(0, 10)), min_size=2, max_size=40))
    begin = draw(st.lists(HOURS, min_size=20, max_size=20))
    delay = draw(st.lists(st.sampled_from([0, 0, 5 * 86400]), min_size=20, max_size=20)) if late or again else [0] * 20
    if not again: rows = list({(u, s, i): (u, s, i, *rest) for u, s, i, *rest in rows}.values())
    return [(USERS[u], f"{USERS[u]}-{s}", f"i{i}", begin[u * 5 + s] + 60 * m, d * 86400 if again else delay[u * 5 + s], price) for u, s,
            i, m, price, d in rows]

def events_of(log) -> pl.DataFrame:
    rows = [dict(event_id=f"e{k}", event_type="purchase", ts=START + timedelta(seconds=t),
            received_ts=START + timedelta(seconds=t + late), visitor_id=u,
                 session_id=s, item_id=i, price=p) for k, (u, s, i, t, late, p) in enumerate(log)]
    return conform(pl.DataFrame(rows, schema_overrides=dict(price=pl.Float64)))

def tables(log, day: float, n_users=None, **kw):
    lines, users = encode(events_of(log).lazy(), ITEMS)
    moment = START.timestamp() + day * DAY
    return snapshot(lines, KINDS, n_users or len(users), NOTHING, moment, WINDOWS, HALF, PRIOR, kw.get("history", 1000),
            kw.get("recent", 40)), list(users)

def known_at(log, day: float): return [e for e in log if e[3] < day * DAY and e[3] + e[4] < day * DAY]

# ---- the oracle: one dictionary of plain numbers for each thing, from loops

def lines_of(log):
    "One (user, session, item, ts, price) for each item of a session."
    groups = {}
    for u, s, i, t, _, p in log: groups.setdefault((u, s, i), []).append((t, p))
    price = lambda seen: (lambda known: mean(known) if known else None)([p for _, p in seen if p is not None])
    return [(*key, min(t for t, _ in seen), price(seen)) for key, seen in groups.items()]

def sessions_in_order(lines):
    "{user: [(ts, session), …]}, oldest first."
    first = {}
    for u, s, _, t, _ in lines: first[u, s] = min(t, first.get((u, s), t))
    return {u: sorted((t, s) for (v, s), t in first.items() if v == u) for u in {u for u, _ in first}}

def pair_features(lines, key_of, day):
    "{(user, key): {name: value}} for the columns PAIR."
    order, groups = sessions_in_order(lines), {}
    for u, s, i, t, _ in lines: groups.setdefault((u, key_of(i)), []).append((s, day - t / DAY))
    out = {}
    for (u, key), seen in groups.items():
        ages, mine, names = [a for _, a in seen], {s for s, _ in seen}, [s for _, s in order[u]]
        last_one = max(names.index(s) for s in mine)
        out[u, key] = dict(count=len(seen), decayed=sum(0.5 ** (a / HALF) for a in ages), since=len(names) - 1 - last_one, last=min(ages),
                first=max(ages),
                           medium=sum(a <= WINDOWS[-2] for a in ages), long=sum(a <= WINDOWS[-1] for a in ages), sessions=len(mine),
                           gap=(max(ages) - min(ages)) / (len(mine) - 1) if len(mine) > 1 else -1)
    return out

def item_features(lines, day):
    "{item number: {name: value}}"
    starts = [day - t / DAY for visits in sessions_in_order(lines).values() for t, _ in visits]
    pairs, out = pair_features(lines, lambda i: i, day), {}
    again = mean(p["sessions"] > 1 for p in pairs.values())
    for k, item in enumerate(ITEMS):
        mine = [(u, day - t / DAY, p) for u, _, i, t, p in lines if i == item]
        sold = {w: sum(a <= w for _, a, _ in mine) for w in WINDOWS}
        f = {f"item_share_{n}": 1000 * sold[w] / max(1, sum(a <= w for a in starts)) for n, w in zip(("short", "medium", "long"), WINDOWS)}
        f |= dict(item_buyers=len({u for u, a, _ in mine if a <= WINDOWS[-1]}), item_display=0, item_mailer=0, item_coupon=0,
                  item_trend=math.log((sold[3] + 1) / (sold[10] * 3 / 10 + 1)), item_recency_days=-1, item_age_days=-1,
                          item_repeat_rate=-1, item_gap_days=-1)
        if mine: f |= dict(item_recency_days=min(a for _, a, _ in mine), item_age_days=max(a for _, a, _ in mine))
        buyers = [p for (_, i), p in pairs.items() if i == item]
        if buyers: f["item_repeat_rate"] = (sum(p["sessions"] > 1 for p in buyers) + PRIOR * again) / (len(buyers) + PRIOR)
        if gaps := [p["gap"] for p in buyers if p["gap"] >= 0]: f["item_gap_days"] = median(gaps)
        prices, now = [p for _, a, p in mine if a <= WINDOWS[-1] and p is not None], [p for _, a, p in mine if a <= WINDOWS[0]
                and p is not None]
        f["item_price"], f["now"] = median(prices) if prices else None, median(now) if now else None
        out[k] = f
    asked = {k: f["item_price"] for k, f in out.items()}
    for k, f in out.items():
        alike = [p for j, p in asked.items() if KINDS[j, 0] == KINDS[k, 0] and p is not None]
        middle, price, now = median(alike) if alike else None, f["item_price"], f.pop("now")
        f["item_price_position"] = price / middle if price is not None and middle else -1
        f["item_discount"] = 1 - now / price if now is not None and price else -1
        if price is None: f["item_price"] = -1
    return out

def user_features(lines, items, day):
    "{user: {name: value}}"
    pairs, out = pair_features(lines, lambda i: i, day), {}
    for u, visits in sessions_in_order(lines).items():
        ages, mine = [day - t / DAY for t, _ in visits], [l for l in lines if l[0] == u]
        counts = [p for (v, _), p in pairs.items() if v == u]
        positions = [items[int(i[1:])]["item_price_position"] for _, _, i, _, _ in mine]
        positions = [p for p in positions if p >= 0]
        out[u] = dict(user_sessions_medium=sum(a <= WINDOWS[1] for a in ages), user_sessions_long=sum(a <= WINDOWS[-1] for a in ages),
                user_recency_days=min(ages),
                      user_gap_days=(max(ages) - min(ages)) / (len(ages) - 1) if len(ages) > 1 else -1,
                              user_basket_size=len(mine) / len(visits),
                      user_distinct_items=sum(p["long"] > 0 for p in counts),
                              user_repeat_share=1 - len(counts) / sum(p["count"] for p in counts),
                      user_price_position=mean(positions) if positions else -1)
    return out

def close(got, want, what):
    assert np.isclose(got, want, rtol=1e-5, atol=1e-5), f"{what}: {got} instead of {want}"

def check(found, users, lines, day):
    "Compare every table of a snapshot with the oracle."
    items = item_features(lines, day)
    for k, f in items.items():
        assert f.keys() == {x.name for x in NIGHTLY_ITEM}
        for c, x in enumerate(NIGHTLY_ITEM): close(found["item_x"][k, c], f[x.name], (x.name, k))
    expected = user_features(lines, items, day)
    nobody = {x.name: 0 if x.name in ("user_sessions_medium", "user_sessions_long", "user_distinct_items") else -1 for x in NIGHTLY_USER}
    for u, user in enumerate(users):
        for c, x in enumerate(NIGHTLY_USER): close(found["user_x"][u, c], expected.get(user, nobody)[x.name], (x.name, user))
        assert found["user_lines"][u] == sum(l[0] == user for l in lines)
    for name, column in (("bought", None), ("kind", 0), ("department", 2)):
        pairs = pair_features(lines, lambda i: int(i[1:]) if column is None else int(KINDS[int(i[1:]), column]), day)
        ptr, keys, x = found[f"{name}_ptr"], found[f"{name}_key"], found[f"{name}_x"]
        assert len(keys) == len(pairs) == ptr[-1]
        for u, user in enumerate(users):
            for row in range(ptr[u], ptr[u + 1]):
                for c, column_name in enumerate(PAIR): close(x[row, c], pairs[user, int(keys[row])][column_name], (name, column_name, user))
            if name == "bought": assert (np.diff(x[ptr[u]:ptr[u + 1], 1]) <= 0).all()      # strongest first
            else: assert (np.diff(keys[ptr[u]:ptr[u + 1]]) > 0).all()                      # sorted, for the binary search

def same(a, b):
    assert a.keys() == b.keys()
    for k in a: np.testing.assert_array_equal(a[k], b[k], err_msg=k)

def in_one_house(log, day, *more):
    "Tables of `log` and of `log` + `more`, over the same users: the later events may bring no user of their own."
    assume(known_at(log, day) and {e[0] for m in more for e in m} <= {e[0] for e in log})
    return tables(log, day)[0], *(tables([*log, *m], day)[0] for m in more)

# ---- properties

@settings(max_examples=120)
@given(logs(), st.integers(1, 42))
def test_snapshot_equals_loops(log, day):
    assume(known_at(log, day))
    found, users = tables(log, day)
    check(found, users, lines_of(known_at(log, day)), day)

@settings(max_examples=60)
@given(logs(late=True), st.integers(1, 42))
def test_late_sessions_count_when_they_are_known(log, day):
    assume(known_at(log, day))
    found, users = tables(log, day)
    check(found, users, lines_of(known_at(log, day)), day)

@settings(max_examples=60)
@given(logs(), logs(), st.integers(1, 42))
def test_later_events_change_nothing(log, later, day):
    moved = [(u, f"{s}+", i, int(day * DAY) + t, 0, p) for u, s, i, t, _, p in later]           # at the moment or after it
    arriving = [(u, f"{s}-", i, t % int(day * DAY), int(day * DAY), p) for u, s, i, t, _, p in later]  # before it, but known after it
    past, *others = in_one_house(log, day, moved, arriving)
    for other in others: same(past, other)

@pytest.mark.parametrize("seconds,inside", [(-1, True), (0, False), (1, False)])
def test_the_moment_itself_is_the_future(seconds, inside):
    early, at = ("u0", "a", "i0", 0, 0, 1.0), ("u0", "b", "i1", int(5 * DAY) + seconds, 0, 1.0)
    assert (1 in tables([early, at], 5)[0]["bought_key"]) == inside
    late = ("u0", "b", "i1", int(DAY), int(4 * DAY) + seconds, 1.0)
    assert (1 in tables([early, late], 5)[0]["bought_key"]) == inside

AGAIN = [("u0", "u0-0", "i0", 0, 0, 1.0), ("u0", "u0-0", "i0", 20 * 86400, 0, 4.0)]            # the same item in a session that goes on
LATE_FIRST = [("u0", "u0-0", "i0", 0, 30 * 86400, 1.0), ("u0", "u0-0", "i0", 3600, 0, 4.0)]    # its first event is known last
SWAPPED = [("u0", "u0-0", "i0", 0, 30 * 86400, 1.0), ("u0", "u0-1", "i1", 3600, 0, 1.0),
        ("u0", "u0-0", "i2", 7200, 0, 1.0)]  # order of sessions

@settings(max_examples=60)
@given(logs(again=True), st.integers(1, 42))
@example(AGAIN, 10)
@example(LATE_FIRST, 10)
@example(SWAPPED, 10)
def test_events_not_yet_known_change_nothing(log, day):
    known = known_at(log, day)
    assume(known and {e[0] for e in known} == {e[0] for e in log})
    same(tables(known, day)[0], tables(log, day)[0])

@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logs(late=True), st.integers(1, 42))
def test_read_path_and_snapshot_agree(tmp_path_factory, log, day):
    "Reading the log up to a moment, and taking the snapshot of a longer log at that moment, are the same."
    known, folder, moment = known_at(log, day), tmp_path_factory.mktemp("log"), START + timedelta(days=day)
    assume(known and {e[0] for e in known} == {e[0] for e in log})
    write_events(events_of(log), folder)
    lines, users = encode(read_events(folder, moment), ITEMS)
    read = snapshot(lines, KINDS, len(users), NOTHING, moment.timestamp(), WINDOWS, HALF, PRIOR, 1000, 40)
    same(read, tables(log, day)[0])

@settings(max_examples=40)
@given(logs(), st.randoms())
def test_order_of_rows_does_not_matter(log, random):
    mixed = random.sample(log, len(log))
    same(tables(log, 42)[0], tables(mixed, 42)[0])

@settings(max_examples=40)
@given(logs(), st.integers(1, 4))
def test_history_and_recent_keep_the_first(log, keep):
    whole, users = tables(log, 42)
    cut, _ = tables(log, 42, history=keep, recent=keep)
    last = pair_features(lines_of(log), lambda i: int(i[1:]), 42)
    for u, user in enumerate(users):
        a, b = whole["bought_ptr"][u:u + 2]; c, d = cut["bought_ptr"][u:u + 2]
        assert list(cut["bought_key"][c:d]) == list(whole["bought_key"][a:b][:keep])
        newest = cut["recent_key"][cut["recent_ptr"][u]:cut["recent_ptr"][u + 1]]
        ages = sorted(p["last"] for (v, _), p in last.items() if v == user)
        np.testing.assert_allclose([last[user, int(i)]["last"] for i in newest], ages[:keep], atol=1e-5)

def test_nothing_before_the_moment():
    with pytest.raises(RecsysError, match="no events before the moment"): tables([("u0", "a", "i0", 86400, 0, None)], 1)

def test_promotions_run_from_and_to():
    at = lambda d: START + timedelta(days=d)
    runs = pl.DataFrame(dict(item_id=["i1", "i1", "i3", "gone"], from_ts=[at(0), at(5), at(4), at(0)], to_ts=[at(5), at(9), at(6), at(9)],
                             display=[.25, .5, .75, 1.], mailer=[0., .125, 0., 1.]))
    coupons = pl.DataFrame(dict(item_id=["i2", "i2"], from_ts=[at(0), at(1)], to_ts=[at(9), at(9)]))
    found = {d: {r["item"]: r for r in promotions_at(runs, coupons, ITEMS, at(d)).iter_rows(named=True)} for d in (4.9, 5, 9)}
    assert found[4.9][1]["item_display"] == .25 and found[5][1]["item_display"] == .5 and found[5][1]["item_mailer"] == .125  # to is out
    assert found[5][3]["item_display"] == .75 and found[5][2]["item_coupon"] == 1 and set(found[5]) == {1, 2, 3} and not found[9]

# ---- the ranker's rows

def state_at(folder, found, n_users):
    "A `State` around a snapshot, with candidates that propose every item to everybody."
    n, rng = len(ITEMS), np.random.default_rng(0)
    ids, scores, vectors = np.full((n, 3), -1, np.int32), np.zeros((n, 3), np.float32), rng.random((n, 4)).astype(np.float32)
    more = dict(together_ids=ids, together_scores=scores, follow_ids=ids, follow_scores=scores, cart_ids=ids, cart_scores=scores,
            vector_in=vectors, vector_out=vectors,
                user_vector=np.zeros((n_users, 4), np.float32), user_near=np.full((n_users, 3), -1, np.int32),
                        segment=np.zeros(n_users, np.int32),
                segment_items=np.arange(n, dtype=np.int32)[None], sellable=np.ones(n, np.uint8))
    return load_state(save_arrays(folder, found | more))

def history_features(lines, user, item, day):
    "The 17 history features by name."
    total = sum(l[0] == user for l in lines)
    kind, dept = (lambda i: int(KINDS[int(i[1:]), 0])), (lambda i: int(KINDS[int(i[1:]), 2]))
    own, k, d = (pair_features(lines, of, day).get((user, of(item))) for of in (lambda i: i, kind, dept))
    f = {x.name: 0 for x in HISTORY} | dict(bought_sessions_since=999, bought_days_since=999, category_days_since=999,
            category_sessions_since=999, bought_gap_days=-1,
                                            bought_cycle=-1, bought_first_days=-1, category_cycle=-1)
    if own:
        f |= dict(bought_count=own["count"], bought_decayed=own["decayed"], bought_share=own["count"] / total,
                bought_sessions_since=own["since"],
                  bought_days_since=own["last"], bought_gap_days=own["gap"], bought_medium=own["medium"], bought_long=own["long"],
                          bought_first_days=own["first"])
        if own["gap"] >= 0: f["bought_cycle"] = own["last"] / (own["gap"] + .5)
    if k:
        f |= dict(category_count=k["count"], category_share=k["count"] / total, category_days_since=k["last"],
                category_sessions_since=k["since"],
                  category_loyalty=(own["count"] if own else 0) / k["count"])
        if k["gap"] >= 0: f["category_cycle"] = k["last"] / (k["gap"] + .5)
    if d: f["department_share"] = d["count"] / total
    return f

@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logs(), st.integers(1, 42), st.lists(st.integers(0, 5), max_size=3, unique=True))
def test_training_rows_hold_the_oracle_s_values(tmp_path_factory, log, day, cart):
    assume(known_at(log, day))
    lines, (found, users) = lines_of(known_at(log, day)), tables(log, day)
    for table, columns in (("item_x", len(ITEM)), ("user_x", len(USER))):  # the live columns have their own oracle: tests/test_offline.py
        found[table] = np.pad(found[table], ((0, 0), (0, columns - found[table].shape[1])))
    state, items, n = state_at(tmp_path_factory.mktemp("state"), found, len(users)), item_features(lines, day), len(users)
    cases = Cases(np.arange(n, dtype=np.int32), np.arange(n + 1, dtype=np.int64) * len(cart), np.array(cart * n, np.int32),
                  np.zeros(n + 1, np.int64), np.zeros(0, np.int32), np.zeros(n, bool))
    rows = training_rows(state, cases, 10, 20, None, 0)
    assert list(rows.size) == [6 - len(cart)] * n and not rows.bought.any()
    people = user_features(lines, items, day)
    for x, item, user in zip(rows.x, rows.ids, np.repeat(users, rows.size)):
        assert item not in cart
        want = items[item] | history_features(lines, user, f"i{item}", day) | people.get(user, {})
        want |= {"cart_size": len(cart)} | {f.name: sum(KINDS[c, level] == KINDS[item, level] for c in cart) for level,
                f in enumerate(CART[1:])}
        for name, value in want.items(): close(x[NAMES.index(name)], value, (name, user, int(item)))

def test_columns_are_in_the_order_of_their_groups():
    assert len(set(NAMES)) == len(NAMES) and [f.group for f in FEATURES] == sorted((f.group for f in FEATURES), key=list(OFFSET).index)

def test_the_registry_grows_without_the_rankers_columns():
    "A bundle is refused when they change, and every figure was measured with them: whoever moves one trains and measures again."
    assert len(LIVE) > len(RANKED_ITEM) + len(RANKED_USER) and {*RANKED_ITEM, *RANKED_USER} <= {*LIVE_ITEM, *LIVE_USER} <= {*LIVE}
    assert hashlib.sha256("\n".join(NAMES).encode()).hexdigest()[:16] == "248ea658b1bcc4ba"

# ---- arrays on disk

def test_arrays_come_back_and_broken_ones_are_named(tmp_path):
    save_arrays(tmp_path/"a", dict(x=np.arange(6).reshape(2, 3).T)); back = load_arrays(tmp_path/"a")["x"]
    assert back.flags.c_contiguous and not back.flags.writeable and (back == np.arange(6).reshape(2, 3).T).all()
    for bad in (b"", b"nothing", (tmp_path/"a"/"x.npy").read_bytes()[:-4]):
        (tmp_path/"a"/"y.npy").write_bytes(bad)
        with pytest.raises(RecsysError, match=r"y\.npy: broken array"): load_arrays(tmp_path/"a")
    with pytest.raises(RecsysError, match="lacks item_x"): load_state(tmp_path/"empty")

def test_prices_are_compared_in_the_shop_s_currency():
    events = nw.from_native(pl.LazyFrame(dict(price=[10., 10., 10., 10., None], currency=["EUR", "USD", "SEK", None, "USD"])))
    assert in_base(events, "EUR", {"USD": .92}).collect()["price"].to_list() == [10., 9.200000000000001, None, 10., None]
    assert in_base(events, "", {"USD": .92}).collect()["price"].to_list() == [10., 10., 10., 10., None]
