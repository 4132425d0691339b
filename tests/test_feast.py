"""The door to Feast, with the real Feast and a real Redis: the same values behind it, and nothing that phones home.

Feast is imported in this process, once, by the fixture; every connection that is neither local files nor the loopback fails the test."""
import ast, importlib.util, shutil, socket, subprocess, sys, time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import narwhals as nw, numpy as np, polars as pl, pytest

from recsys.core.settings import RecsysError
from recsys.features import feast_repo
from recsys.features.definitions import LIVE, PROGRAM
from recsys.features.feast_repo import apply, definitions_source, feast_repository, history, in_numpy, quiet_feast, write_repository
from recsys.features.formulas import DAY, ENTITIES, TYPES, amount, compiled, count, days_since, finish, interval, mean, rate, ratio, total, trend
from recsys.features.offline import with_marks
from recsys.features.store import ACROSS, OfflineStore, OnlineStore, entity_features, materialize

START, USERS, ITEMS, MOMENT = 1_704_067_200, 12, 9, 1_704_067_200 + 12 * DAY
OF_ITEM, NAMES = np.arange(ITEMS) % 3, [f.name for f in LIVE]
PEOPLE = pl.Series([f"user '{i}'" for i in range(USERS)])
REDIS = shutil.which("redis-server")
needs_feast = pytest.mark.skipif(importlib.util.find_spec("feast") is None, reason="Feast is missing: pip install 'recsys[feast]'")
needs_redis = pytest.mark.skipif(REDIS is None, reason="redis-server is missing: apt-get install redis-server")

def make_log(n: int = 400) -> nw.LazyFrame:
    rng = np.random.default_rng(3)
    ts, user, item = START + rng.integers(0, 13 * DAY, n), rng.integers(0, USERS - 2, n), rng.integers(0, ITEMS - 1, n)
    log = pl.DataFrame(dict(event_id=np.arange(n), kind=rng.integers(0, len(TYPES), n), ts=ts, known=ts + np.where(rng.random(n) < .3, rng.integers(0, DAY, n), 0), user=user,
                            item=item, category=OF_ITEM[item], session=user * 20 + (ts - START) // DAY, cents=rng.integers(1, 9999, n)))
    return with_marks(nw.from_native(log.lazy())).collect().lazy()

@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    "Three snapshots in the offline half, the last one online."
    folder, log = tmp_path_factory.mktemp("feast"), make_log()
    offline = OfflineStore(folder/"offline")
    for day in (8, 10, 12): materialize(log, START + day * DAY, offline, folder/f"online-{day}", USERS, OF_ITEM, ids=dict(user=PEOPLE))
    return offline, OnlineStore(folder/"online-12")

@pytest.fixture(scope="module")
def quiet_network():
    "Connections that were tried to anywhere but the loopback. An audit hook cannot be removed: it stops listening."
    tried, listening = [], [True]
    def hook(event, args):
        if not listening[0]: return
        if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "::1", "localhost"): tried.append(args[1])
        if event == "socket.getaddrinfo" and args[0] not in (None, "127.0.0.1", "::1", "localhost", b"localhost", b"127.0.0.1"): tried.append(args[0])
    sys.addaudithook(hook)
    yield tried
    listening[0] = False

@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    "A Redis of our own on a free port, without a disk."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    server = subprocess.Popen([REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0: break
            time.sleep(.1)
        else: pytest.fail("redis-server did not start")
        yield port
    finally:
        server.terminate(); server.wait(10)

@pytest.fixture(scope="module")
def repository(filled, tmp_path_factory, quiet_network):
    out = tmp_path_factory.mktemp("repository")
    said = feast_repository(out, filled[0].folder, max_age_days=3)
    assert said["features"] == len(LIVE) and said["moment"] == datetime.fromtimestamp(MOMENT, timezone.utc).isoformat()
    return out

# ---- online

def asked(n: int = 40) -> tuple[list[dict], np.ndarray]:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, USERS, n), rng.integers(0, ITEMS, n)
    return [dict(user=PEOPLE[int(u)], item=int(i), category=int(OF_ITEM[i]), session=int(u) * 20 + 11) for u, i in zip(users, items)], np.stack([users, items], 1)

def same_as_our_arrays(repository: Path, online: OnlineStore):
    "Where Feast has a value it is ours, and it has one for every key that was stored; features of several entities it has always."
    rows, codes = asked()
    with quiet_feast(repository) as store: got = store.get_online_features(store.get_feature_service("live"), rows).to_dict()
    ours = np.concatenate([online.rows(int(u), [int(i)], int(u) * 20 + 11) for u, i in codes])
    unknown = finish(PROGRAM, online._nothing[None], np.array([online.moment]))[0]
    for j, name in enumerate(NAMES):
        theirs = got[name]
        assert all(np.float32(v) == ours[r, j] for r, v in enumerate(theirs) if v is not None), name
        assert all(ours[r, j] == unknown[j] for r, v in enumerate(theirs) if v is None), name
        if LIVE[j] in ACROSS: assert None not in theirs
    found = sum(v is not None for name in NAMES for v in got[name])
    assert .4 * len(rows) * len(NAMES) < found < len(rows) * len(NAMES)  # some keys are known, some are not

@needs_feast
def test_sqlite_answers_what_our_arrays_answer(repository, filled): same_as_our_arrays(repository, filled[1])

@needs_feast
@needs_redis
def test_redis_answers_what_our_arrays_answer(filled, tmp_path, redis_server, quiet_network):
    said = feast_repository(tmp_path/"repository", filled[0].folder, f"redis://127.0.0.1:{redis_server}", "shop", 3)
    assert said["views"] == len(ENTITIES)
    same_as_our_arrays(tmp_path/"repository", filled[1])
    assert quiet_network == []

@needs_feast
def test_what_is_pushed_is_served(filled, tmp_path):
    out = tmp_path/"pushed"
    feast_repository(out, filled[0].folder)
    now = datetime.fromtimestamp(MOMENT + 60, timezone.utc)
    table = filled[0].read("item", MOMENT).collect().filter(pl.col("item") == 2).with_columns(event_ts=pl.lit(now), created_ts=pl.lit(now), item_views_1h=pl.lit(77, pl.Float32))
    with quiet_feast(out) as store:
        store.push("item_push", table.to_pandas())
        got = store.get_online_features(["item:item_views_1h", "item:item_views_30d"], [dict(item=2), dict(item=3)]).to_dict()
    assert got["item_views_1h"][0] == 77 and got["item_views_1h"][1] != 77 and got["item_views_30d"][0] == table["item_views_30d"][0]

# ---- offline

def rows_of_the_past() -> pl.DataFrame:
    "Known keys, unknown ones, moments before everything, between, after, too late, and one row twice."
    rng, n = np.random.default_rng(5), 120
    t = START + rng.integers(7 * DAY, 17 * DAY, n)
    rows = pl.DataFrame(dict(user=PEOPLE.gather(rng.integers(0, USERS, n)), item=rng.integers(0, ITEMS, n), t=t))
    return pl.concat([rows, rows.head(3)]).with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))

def from_feast(repository: Path, rows: pl.DataFrame, entity: str, names: list[str]) -> pl.DataFrame:
    "What Feast makes of the rows, joined back to their numbers."
    import pyarrow
    entity_rows = rows.select("row", *ENTITIES[entity], event_timestamp=pl.from_epoch("t", "s").dt.replace_time_zone("UTC"))
    with quiet_feast(repository) as store:
        job = store.get_historical_features(entity_rows.to_pandas(), [f"{entity}:{n}" for n in names], filter_by_created_timestamp=True)
        table = job.to_arrow()
    assert isinstance(table, pyarrow.Table)
    return pl.from_arrow(table).select("row", *(pl.col(n).cast(pl.Float32).fill_nan(None) for n in names))

@needs_feast
@pytest.mark.parametrize("entity", ["item", "user", "user_item"])
def test_the_past_is_the_same_where_feast_keeps_the_row(repository, filled, entity):
    rows, names = rows_of_the_past(), [f.name for f in entity_features(entity)]
    ours = filled[0].as_of(rows, entity, 3, names).collect()
    theirs = from_feast(repository, rows, entity, names)
    kept = theirs.join(ours, on="row", how="left", suffix="_ours", maintain_order="left")
    assert ours["row"].equals(rows["row"])                                  # ours keeps every row, in order
    for n in names: assert kept[n].equals(kept[f"{n}_ours"], null_equal=True, check_names=False), n
    lost = ours.join(theirs, on="row", how="anti")
    known = lost.filter(pl.col(names[0]).is_not_null())
    keys = [*ENTITIES[entity], "t"]
    assert lost.height and theirs["row"].n_unique() == theirs.height
    assert set(known.select(keys).rows()) <= set(kept.select("row").join(rows, on="row").select(keys).rows()) # of what has values, Feast lost only second copies
    stored = filled[0].read(entity).collect().select(ENTITIES[entity]).unique()
    cold = lost.filter(pl.col(names[0]).is_null())
    assert cold.height and cold.join(stored, on=ENTITIES[entity], how="anti").height <= 3 # the others: keys that exist, but not yet, or no more

@needs_feast
def test_rows_that_feast_drops_are_cold_starts_and_duplicates(repository, filled):
    name, first = "item_views_7d", START + 8 * DAY
    rows = pl.DataFrame(dict(row=[*range(5)], item=[2] * 5, t=[first - 1, first, first, first + 30 * DAY, first + DAY]))
    ours, theirs = filled[0].as_of(rows, "item", 3, [name]).collect(), from_feast(repository, rows, "item", [name])
    assert ours["row"].to_list() == [0, 1, 2, 3, 4] and ours[name].is_null().to_list() == [True, False, False, True, False]
    kept = theirs["row"].to_list()
    assert 0 not in kept               # before its first value: a cold start
    assert 3 not in kept               # after its time to live
    assert len({1, 2} & {*kept}) == 1  # the same key and moment twice
    assert 4 in kept
    back = rows.join(theirs, on="row", how="left", maintain_order="left")
    assert back.height == 5 and back.filter(pl.col("row").is_in(kept))[name].equals(ours.filter(pl.col("row").is_in(kept))[name])

@needs_feast
def test_joined_back_every_row_is_there_with_our_values(repository, filled):
    rows, names = rows_of_the_past(), [f.name for f in entity_features("user_item")]
    ours, theirs = filled[0].as_of(rows, "user_item", 3, names).collect(), history(repository, rows, [f"user_item:{n}" for n in names])
    assert theirs.select(ours.columns).equals(ours) and 0 < theirs["kept"].sum() < len(rows)

@needs_feast
def test_a_moment_computed_twice_leaks_from_neither(filled, tmp_path):
    """Ours takes the newest computation that was known. Feast's file engine, asked to look at the time of computation, orders the two of
    one moment as its threads happen to run, and may lose both; but what it gives was known."""
    offline = OfflineStore(tmp_path/"offline")
    tables = {e: filled[0].read(e, START + 10 * DAY, START + 10 * DAY).collect().drop("event_ts", "created_ts") for e in ENTITIES}
    for e, table in tables.items(): offline.write(e, START + 10 * DAY, table)
    offline.write("item", START + 10 * DAY, tables["item"].with_columns(pl.col("item_views_7d") + 100), created=START + 11 * DAY)
    apply(write_repository(tmp_path/"repository", offline))
    rows = rows_of_the_past().filter(pl.col("t").is_between(START + 10 * DAY, START + 12 * DAY), pl.col("item") < ITEMS - 1).unique(["item", "t"], maintain_order=True)
    ours = offline.as_of(rows, "item", 3, ["item_views_7d"]).collect()
    both = ours.join(from_feast(tmp_path/"repository", rows, "item", ["item_views_7d"]), on="row", suffix="_feast")
    before = dict(zip(tables["item"]["item"], tables["item"]["item_views_7d"]))
    assert len(both) > 10
    for item, t, mine, theirs in both.select("item", "t", "item_views_7d", "item_views_7d_feast").rows():
        assert mine == before[item] + 100 * (t >= START + 11 * DAY)
        assert theirs in (None, before[item], mine)

@needs_feast
def test_features_of_several_entities_are_computed_for_the_past_too(repository, filled):
    rows = pl.DataFrame(dict(user=PEOPLE.gather([1, 2]), item=[2, 3], category=OF_ITEM[[2, 3]])).with_columns(event_timestamp=pl.lit(datetime.fromtimestamp(MOMENT, timezone.utc)))
    with quiet_feast(repository) as store: got = pl.from_arrow(store.get_historical_features(rows.to_pandas(), [f"across:{f.name}" for f in ACROSS]).to_arrow()).sort("user")
    ours = np.concatenate([filled[1].rows(u, [i]) for u, i in ((1, 2), (2, 3))])
    for f in ACROSS: assert (got[f.name].cast(pl.Float32).to_numpy() == ours[:, NAMES.index(f.name)]).all(), f.name

# ---- the repository

@needs_feast
def test_feasts_own_command_line_applies_it(filled, tmp_path):
    folder = write_repository(tmp_path/"repository", filled[0])
    run = subprocess.run([Path(sys.executable).parent/"feast", "apply"], cwd=folder, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    with quiet_feast(folder) as store:
        views = {v.name: v for v in store.list_feature_views()}
        service, across = store.get_feature_service("live"), store.get_on_demand_feature_view("across")
    assert set(views) == set(ENTITIES) and views["user_item"].ttl == timedelta(days=3) and sorted(views["user_item"].entities) == ["item", "user"]
    assert sorted(f.name for p in service.feature_view_projections for f in p.features) == sorted(NAMES)
    said = {f.name: f for v in views.values() for f in v.features}
    for f in LIVE:
        if f in ACROSS: assert f.unit in across.tags[f.name] and f.owner in across.tags[f.name]
        else: assert said[f.name].description == f.meaning and said[f.name].tags["unit"] == f.unit and said[f.name].tags["owner"] == f.owner

@needs_feast
def test_nothing_went_over_the_network(repository, quiet_network): assert quiet_network == []

def test_the_recommender_never_imports_feast():
    code = "import sys, recsys.features.feast_repo, recsys.features.store; sys.exit('feast' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

def test_without_feast_one_sentence_says_what_to_install(filled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "feast", None)
    folder = write_repository(tmp_path/"repository", filled[0])   # writing needs no Feast
    with pytest.raises(RecsysError, match=r"recsys\[feast\]"): apply(folder)

@needs_feast
def test_a_redis_that_is_not_there_is_one_sentence(filled, tmp_path):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    with pytest.raises(RecsysError, match="Feast failed"): feast_repository(tmp_path/"repository", filled[0].folder, f"redis://127.0.0.1:{port}")

@pytest.mark.parametrize("change", [dict(online="mysql://localhost"), dict(online="redis://"), dict(online="redis://host:port"), dict(project="a-b"), dict(project="_x"), dict(project="a\nb: c")])
def test_what_is_no_repository_is_refused(filled, tmp_path, change):
    with pytest.raises(RecsysError): write_repository(tmp_path/"repository", filled[0], **change)
    assert not (tmp_path/"repository").exists()

def test_whatever_a_feature_says_stays_a_string(filled, monkeypatch):
    evil = '"""\n\'); import os; os.system("touch evil") #{}'
    original = feast_repo.entity_features
    monkeypatch.setattr(feast_repo, "entity_features", lambda e: tuple(type(f)(f.name, f.group, evil, evil, f.formula, evil) for f in original(e)))
    tree = ast.parse(definitions_source(filled[0], 3))
    assert {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} == {"pandas", "numpy"}
    assert evil in {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}

def test_formulas_in_numpy_give_the_bits_of_the_kernel():
    u, i = count("user", "view", days=1), count("item", "view", days=7)
    formulas = [amount(u), rate(u, i, (1, 40)), interval("item", "purchase"), mean(total("item", "cents", "purchase"), u, 100), trend(u, i), ratio(u, i, total("user", "cents", "purchase"), count("user", "purchase"))]
    rng = np.random.default_rng(0)
    for f in formulas:
        values = np.where(rng.random((500, 4)) < .2, 0, rng.integers(0, 10**6, (500, 4)))
        program = compiled([f])
        columns = {feast_repo.column_of(a): values[:, program.aggregates.index(a)] for a in f.of}
        scope = dict(np=np, whole=lambda c, nothing: columns[c].astype(float))
        with np.errstate(all="ignore"): exec("\n".join(in_numpy(f)), scope)
        expected = finish(program, np.ascontiguousarray(values[:, :len(program.aggregates)]), np.zeros(500, np.int64))[:, 0]
        assert (np.asarray(scope["value"]).astype(np.float32) == expected).all(), f.op
    with pytest.raises(RecsysError): in_numpy(days_since("item", "view"))
