"The feature store: the join against brute force, both halves against the log, nothing half written."
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

import narwhals as nw, numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st

from recsys.candidates import pipeline
from recsys.core.files import read_json
from recsys.core.settings import RecsysError, load_settings
from recsys.data.ingest import ingest
from recsys.data.simulator import simulate
from recsys.features.definitions import LIVE, PROGRAM
from recsys.features.formulas import DAY, ENTITIES, TYPES, finish
from recsys.features.offline import sums_at, with_marks
from recsys.features.store import (ACROSS, OfflineStore, OnlineStore, column_of, entity_columns, entity_features, entity_table, materialize,
                                   newest_rows, online_arrays, write_online)

START, DAYS, USERS, ITEMS, CATEGORIES = 1_704_067_200, 20, 15, 12, 4
OF_ITEM = np.arange(ITEMS) % CATEGORIES
NAMES = [f.name for f in LIVE]

def make_log(n: int = 700, seed: int = 0, late: int = 3 * DAY) -> nw.LazyFrame:
    rng = np.random.default_rng(seed)
    ts = START + rng.integers(0, DAYS * DAY, n)
    user, item = rng.integers(0, USERS, n), rng.integers(0, ITEMS, n)
    log = pl.DataFrame(dict(event_id=np.arange(n), kind=rng.integers(0, len(TYPES), n), ts=ts, known=ts + np.where(rng.random(n) < .3, rng.integers(0, late, n), 0),
                            user=user, item=item, category=OF_ITEM[item], session=user * DAYS + (ts - START) // DAY, cents=rng.integers(1, 9999, n)))
    return with_marks(nw.from_native(log.lazy())).collect().lazy()

LOG, MOMENT = make_log(), START + 12 * DAY

def from_log(user, items, session, moment) -> np.ndarray:
    "The live features, asked of the log."
    rows = pl.DataFrame(dict(row=np.arange(len(items)), user=user, item=items, category=[OF_ITEM[i] if 0 <= i < ITEMS else -1 for i in items], session=session, t=moment),
                        schema={c: pl.Int64 for c in ("row", "user", "item", "category", "session", "t")})
    sums = sums_at(LOG, nw.from_native(rows.lazy()), PROGRAM.aggregates).collect().to_native().sort("row")
    return finish(PROGRAM, sums.drop("row").to_numpy(), rows["t"].to_numpy())

@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    offline = OfflineStore(folder/"offline")
    for day in (6, 9, 12): materialize(LOG, START + day * DAY, offline, folder/f"online-{day}", USERS, OF_ITEM)
    return offline, folder/"online-12"

# ---- the join

stored_rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 12)), min_size=0, max_size=25, unique=True)
asked_rows = st.lists(st.tuples(st.integers(0, 5), st.integers(-2, 20)), max_size=12)

def brute(stored, key, t, ttl):
    "The newest of what could be seen; of several computations of it the newest."
    seen = [(e, c) for k, e, c in stored if k == key and e <= t and c <= t and e >= t - ttl]
    return max(seen, default=None)

@settings(max_examples=200, deadline=None)
@given(stored_rows, asked_rows, st.integers(0, 15), st.booleans())
def test_the_join_is_what_brute_force_finds(stored, asked, ttl, texts):
    key = (lambda ks: [f"k{k}" for k in ks]) if texts else list
    at = lambda column: pl.from_epoch(pl.Series(column, dtype=pl.Int64), "s").dt.replace_time_zone("UTC")
    kind = pl.String if texts else pl.Int64
    held = pl.DataFrame(dict(item=pl.Series(key(k for k, _, _ in stored), dtype=kind), event_ts=at([e for _, e, _ in stored]), created_ts=at([c for _, _, c in stored])))
    rows = pl.DataFrame(dict(item=pl.Series(key(k for k, _ in asked), dtype=kind), t=pl.Series([t for _, t in asked], dtype=pl.Int64)))
    position, times = newest_rows(held, rows, ["item"], ttl), [(e, c) for _, e, c in stored]
    assert [None if p is None else times[p] for p in position] == [brute(stored, k, t, ttl) for k, t in asked]
    assert all(p is None or held["item"][p] == rows["item"][i] for i, p in enumerate(position))

def test_every_row_is_kept_in_its_order(tmp_path):
    store = OfflineStore(tmp_path)
    store.write("user_item", START, pl.DataFrame(dict(user=[1, 2], item=[5, 5], x=np.array([.5, .25], np.float32))))
    rows = pl.DataFrame(dict(note=list("abcde"), item=[5, 5, 6, 5, 5], user=[2, 1, 1, 2, 1], t=[START + DAY, START - 1, START, START + DAY, START]))
    got = store.as_of(rows, "user_item", 1).collect()
    assert got.drop("x").equals(rows) and got["x"].to_list() == [.25, None, None, .25, .5] and got["x"].dtype == pl.Float32
    assert store.as_of(rows.head(0), "user_item", 1).collect().columns == [*rows.columns, "x"]
    assert store.as_of(rows, "user_item", .5).collect()["x"].to_list() == [None, None, None, None, .5]

def test_a_backfill_does_not_reach_rows_of_before_it(tmp_path):
    store, x = OfflineStore(tmp_path), lambda v: pl.DataFrame(dict(item=[0], x=[v]))
    store.write("item", START, x(1)); store.write("item", START + 2 * DAY, x(2)); store.write("item", START, x(9), created=START + 3 * DAY)
    days = lambda *d: pl.DataFrame(dict(item=[0] * len(d), t=[START + k * DAY for k in d]))
    assert store.as_of(days(0, 1, 2, 3, 4), "item", 30).collect()["x"].to_list() == [1, 1, 2, 2, 2]
    store.write("item", START + 2 * DAY, x(8), created=START + 3 * DAY)
    assert store.as_of(days(0, 1, 2, 3, 4), "item", 30).collect()["x"].to_list() == [1, 1, 2, 8, 8]

def test_files_outside_the_time_to_live_are_not_read(tmp_path):
    store = OfflineStore(tmp_path)
    for day in (0, 10, 20): store.write("item", START + day * DAY, pl.DataFrame(dict(item=[0], x=[day])))
    store.files("item")[0].write_bytes(b"not parquet")
    rows = pl.DataFrame(dict(item=[0, 0], t=[START + 12 * DAY, START + 15 * DAY]))
    assert store.as_of(rows, "item", 6).collect()["x"].to_list() == [10, 10]
    assert [f.parent.name for f in store.files("item", START + DAY, START + 19 * DAY)] == ["day=2024-01-11"]

def test_a_feature_that_came_later_is_null_before(tmp_path):
    store = OfflineStore(tmp_path)
    store.write("item", START, pl.DataFrame(dict(item=[0], x=[1.], gone=[3])))
    store.write("item", START + DAY, pl.DataFrame(dict(item=[0], x=[2.], y=[5.])))
    got = store.as_of(pl.DataFrame(dict(item=[0, 0], t=[START, START + DAY])), "item", 9).collect()
    assert got.rows() == [(0, START, 1., None), (0, START + DAY, 2., 5.)]

def test_writing_again_is_the_same_file_and_leaves_nothing_behind(tmp_path):
    store, table = OfflineStore(tmp_path), pl.DataFrame(dict(item=[1, 0], x=[1., 2.]))
    first = store.write("item", START, table).read_bytes()
    assert store.write("item", START, table.reverse()).read_bytes() == first
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"features-{START}-{START}.parquet"]

@pytest.mark.parametrize("do", [lambda s: s.read("user"), lambda s: s.write("item", START, pl.DataFrame(dict(item=[1, 1]))), lambda s: s.write("user_item", START, pl.DataFrame(dict(item=[1]))),
                                lambda s: s.as_of(pl.DataFrame(dict(item=[1])), "item", 1), lambda s: s.as_of(pl.DataFrame(dict(item=[1], t=[None])), "item", 1),
                                lambda s: s.as_of(pl.DataFrame(dict(item=[1], t=[.5])), "item", 1)])
def test_what_cannot_be_stored_or_asked_says_so(tmp_path, do):
    store = OfflineStore(tmp_path); store.write("item", START, pl.DataFrame(dict(item=[1], x=[1])))
    with pytest.raises(RecsysError): do(store)

# ---- tables

@pytest.mark.parametrize("entity", ENTITIES)
def test_a_table_holds_the_known_keys_and_the_values_of_the_log(entity):
    table, keys = entity_table(LOG, entity, MOMENT), [*ENTITIES[entity]]
    types = {TYPES.index(t) for i in PROGRAM.columns(entity) for t in PROGRAM.aggregates[i].types}
    seen = LOG.collect().to_native().filter(pl.col("known") < MOMENT, pl.col("kind").is_in(sorted(types)))
    if entity == "session": seen = seen.filter(pl.col("ts") >= MOMENT - DAY)
    assert table.select(keys).rows() == sorted(set(seen.select(keys).rows()))
    for row in table.sample(min(12, len(table)), seed=1).iter_rows(named=True):
        item = row.get("item", next((i for i in range(ITEMS) if OF_ITEM[i] == row.get("category")), 0))
        x = from_log(row.get("user", -1), [item], row.get("session", -1), MOMENT)[0]
        for f in entity_features(entity): assert np.float32(row[f.name]) == x[NAMES.index(f.name)], f.name

def test_columns_are_unique_and_say_what_they_hold():
    names = [column_of(a) for a in PROGRAM.aggregates] + NAMES
    assert len(set(names)) == len(names) and "item_sum_cents_purchase_30d" in names
    assert sorted(c for e in ENTITIES for c in entity_columns(e)) == sorted(column_of(a) for a in PROGRAM.aggregates)
    assert sorted(f.name for e in ENTITIES for f in entity_features(e)) == sorted(set(NAMES) - {f.name for f in ACROSS})

def test_integers_of_a_table_finish_to_its_features_again(filled):
    table = filled[0].read("user_item").collect()
    for moment, part in table.group_by(pl.col("event_ts").dt.epoch("s")):
        sums = np.zeros((len(part), len(PROGRAM.aggregates)), np.int64)
        sums[:, PROGRAM.columns("user_item")] = part.select(entity_columns("user_item")).to_numpy()
        again = finish(PROGRAM, sums, np.full(len(part), moment[0]))
        for f in entity_features("user_item"): assert (part[f.name].to_numpy() == again[:, NAMES.index(f.name)]).all()

# ---- online

@pytest.mark.parametrize("seed", range(6))
def test_a_request_gets_the_bits_of_the_log(filled, seed):
    rng, store = np.random.default_rng(seed), OnlineStore(filled[1])
    user, items = int(rng.integers(-1, USERS + 2)), rng.integers(0, ITEMS, 30)
    session = user * DAYS + 11 if seed % 2 else -1
    expected = from_log(user, items, session, MOMENT)
    got = store.rows(user, items, session)
    assert got.dtype == np.float32 and got.shape == (30, len(LIVE))
    assert (got == expected).all(), [NAMES[i] for i in np.flatnonzero((got != expected).any(0))]

def test_what_nobody_knows_has_the_values_of_nothing(filled):
    store = OnlineStore(filled[1])
    unknown = finish(PROGRAM, store._nothing[None], np.array([store.moment]))[0]
    for user, item, session in ((-1, -1, -1), (10**9, 10**9, 10**9), (-10**9, ITEMS, -5)): assert (store.rows(user, [item], session)[0] == unknown).all()
    assert store.rows(3, []).shape == (0, len(LIVE))

def test_both_halves_agree(filled):
    offline, online = filled
    store = OnlineStore(online)
    for entity, keys in dict(item=dict(item=[4]), user=dict(user=[7]), user_item=dict(user=[7], item=[4]), user_category=dict(user=[7], category=[OF_ITEM[4]])).items():
        names = [f.name for f in entity_features(entity)]
        held = offline.as_of(pl.DataFrame(dict(**keys, t=[MOMENT + 5])), entity, 1, names).collect().select(names)
        here = store.rows(7, [4])[0, [NAMES.index(n) for n in names]]
        if held.null_count().sum_horizontal().item() == 0: assert (held.to_numpy()[0] == here).all()
        else: assert entity.startswith("user_") and held.null_count().sum_horizontal().item() == len(names)

def test_the_shop_s_own_ids_go_to_the_offline_half(tmp_path):
    ids = dict(user=pl.Series([f"u{i}" for i in range(USERS)]), item=pl.Series([f"i{i}" for i in range(ITEMS)]))
    offline = OfflineStore(tmp_path/"offline")
    rows = materialize(LOG, MOMENT, offline, tmp_path/"online", USERS, OF_ITEM, ids=ids, created=MOMENT + 60)
    table = offline.read("user_item").collect()
    assert len(table) == rows["user_item"] and set(table["user"]) <= set(ids["user"]) and table["event_ts"].dt.epoch("s").unique().to_list() == [MOMENT]
    got = offline.as_of(pl.DataFrame(dict(user=["u3", "u3", "nobody"], t=[MOMENT, MOMENT + 60, MOMENT + 60])), "user", 3).collect()
    assert got["user_views_30d"].null_count() == 2 and got["user_views_30d"][1] is not None

def damaged(arrays): # each makes one thing wrong
    yield "type", arrays | dict(item=arrays["item"].astype(np.int32))
    yield "width", arrays | dict(user=arrays["user"][:, 1:].copy())
    yield "pointers", arrays | dict(user_item_ptr=arrays["user_item_ptr"][::-1].copy())
    yield "rows", arrays | dict(user_category_key=arrays["user_category_key"][1:])
    yield "items", arrays | dict(item_category=arrays["item_category"][1:])

def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    arrays = online_arrays({e: entity_table(LOG, e, MOMENT) for e in ENTITIES}, USERS, OF_ITEM)
    for name, wrong in damaged(arrays):
        folder = write_online(tmp_path/name, arrays, MOMENT)
        for n, a in wrong.items(): np.save(folder/f"{n}.npy", a)
        with pytest.raises(RecsysError): OnlineStore(folder)
    folder = write_online(tmp_path/"good", arrays, MOMENT)
    assert OnlineStore(folder).moment == MOMENT
    os.truncate(folder/"user_item.npy", 200)
    with pytest.raises(RecsysError): OnlineStore(folder)
    (folder/"session.npy").unlink()
    with pytest.raises(RecsysError): OnlineStore(folder)
    (write_online(tmp_path/"other", arrays, MOMENT)/"store.json").write_text('{"moment": 1, "columns": "of other definitions"}')
    with pytest.raises(RecsysError, match="other feature definitions"): OnlineStore(tmp_path/"other")
    with pytest.raises(RecsysError): OnlineStore(tmp_path/"none")

@pytest.mark.parametrize("moment", [START, START + 90 * DAY])
def test_a_shop_without_sessions_or_without_anything_has_a_store(tmp_path, moment):
    offline = OfflineStore(tmp_path/"offline")
    rows = materialize(LOG, moment, offline, tmp_path/"online", USERS, OF_ITEM)
    assert rows["session"] == 0 and (rows["item"] == 0) == (moment == START)
    assert (OnlineStore(tmp_path/"online").rows(3, [1, 2], 5) == from_log(3, [1, 2], 9999, moment)).all()
    assert offline.as_of(pl.DataFrame(dict(session=[5], t=[moment])), "session", 3).collect()["session_views"].to_list() == [None]

# ---- from an ingest, with the shop's own ids

@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    "A simulated shop, ingested: its folder."
    d = tmp_path_factory.mktemp("ingested")
    simulate(d/"shop", 20_000, days=40)
    ingest("simulated.toml", d/"in", None, datetime.now(timezone.utc), 30, 60, .05, d/"shop")
    return d/"in"

def in_dollars():
    "The settings of a shop that counts in dollars; the simulated one takes euros."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("RECSYS_DATA_CURRENCY", "USD"); m.setenv("RECSYS_DATA_EXCHANGE_RATES", "EUR:2")
        return load_settings(Path(__file__).resolve().parent.parent/"settings.ini")

def test_everybody_s_values_stand_under_their_own_id_and_in_the_shop_s_currency(ingested, tmp_path):
    "Counted again from the events, by their ids and without any code."
    pipeline.feature_store(ingested, tmp_path/"store", pipeline.Polars(), in_dollars())
    end = datetime.fromisoformat(read_json(ingested/"ingest.json")["moment"])
    ever = pl.read_parquet(ingested/"events"/"**/*.parquet").filter(pl.col("flag").is_null(), pl.col("consent"), pl.max_horizontal("ts", "received_ts") < end)
    ever = ever.join(pl.read_parquet(ingested/"items.parquet").select("item_id", "category"), on="item_id").with_columns(user=pl.coalesce("user_id", "visitor_id"), item="item_id", session="session_id")
    month, dollars = ever.filter(pl.col("ts") >= end - timedelta(days=30)), (pl.col("price") * 200 + .5).floor().filter(event_type="purchase").mean() / 100
    for entity, name, events in (("user", "user_views_30d", month), ("item", "item_views_30d", month), ("user_category", "user_category_views_30d", month), ("user_item", "user_item_views", ever)):
        keys, paid = [*ENTITIES[entity]], f"{entity}_paid_30d"
        held = OfflineStore(tmp_path/"store"/"offline").read(entity).collect()
        both = held.join(events.group_by(keys).agg(n=(pl.col("event_type") == "view").sum(), dollars=dollars), on=keys, how="left")
        assert both["n"].sum() > 500 and both[name].cast(pl.Int64).equals(both["n"].cast(pl.Int64).fill_null(0), check_names=False), entity
        if paid in held.columns: assert (both["dollars"] > 0).sum() > 20 and (both[paid] - both["dollars"].fill_null(-1)).abs().max() < 1e-3, entity
