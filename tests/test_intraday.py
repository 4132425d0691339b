"What is put by day reaches the lists by day: new items, titles, prices, categories, stock; without a failed or mixed answer, and into the next night once."
import http.client, json, os, signal, threading, time
from datetime import datetime, timezone

import msgspec
import numpy as np
import polars as pl
import psutil
import pytest
from hypothesis import given, settings, strategies as st

from recsys.candidates.content import catalogue_attributes, content_links, rejoined
from recsys.core.settings import RecsysError, load_settings
from recsys.data.events import Item as Contract, conform
from recsys.data.put_items import put_file, read_put, with_put, write_put
from recsys.features.build import coded_log, live_table
from recsys.features.definitions import NIGHTLY_ITEM, RANKED_ITEM
from recsys.features.point_in_time import category_codes, encode, item_table, known_before, pairs_of, sessions_of
from recsys.ranking.rules import Filter
from recsys.serving.bundle import derive_bundle, open_bundle, promote, verify_bundle, write_bundle
from recsys.serving.engine import Engine, Request, recommend, similar
from recsys.serving.intraday import Keeper, category_rows, day_of_night, day_version, differing, overlay, unsold
from recsys.serving.live_items import Change, Item, newer, said, stamped
from recsys.serving.service import Service, ask, put, start
from recsys.serving.state import LocalStore
from shop import ended, until, words
from test_serving import BUDGET, N_ITEMS, PER_SOURCE, publish as plain_bundle, serving, tables, workers_of
from test_serving import ask as http_ask

WORDS = "red blue steel wood kettle pan pot whisk spoon ladle grill".split()

def catalogue(rng, n, first=0):
    "Items of a few words, categories, brands and prices."
    pick = lambda names: str(rng.choice(names))
    return pl.DataFrame([dict(item_id=f"i{k}", title=" ".join(rng.choice(WORDS, 3)), category=f"{pick(['A', 'B'])} > {pick(['x', 'y', 'z'])}", brand=pick(["m", "n", "o"]),
                              price=float(rng.integers(1, 60))) for k in range(first, first + n)])

def publish(folder, version="v1", seed=0, rules=None, manifest={}, n=N_ITEMS):
    "A bundle of random tables whose items look like something, with their content links."
    if not (folder/"ranker.txt").exists(): plain_bundle(folder, "seed")
    items = catalogue(np.random.default_rng(5), n).with_columns(stock=pl.lit(9, pl.Int32))
    alike = content_links(*catalogue_attributes(items), 6)
    state = tables(n, seed=seed)._replace(category=category_codes(items["category"]), content_ids=alike.ids, content_scores=alike.weight, trending=np.full(5, -1, np.int32))
    from recsys.features.point_in_time import save_arrays
    where = save_arrays(folder/f"tables-{version}", state._asdict())
    made = write_bundle(folder/"bundles", version, [where], folder/"ranker.txt", items, pl.Series([f"u{k}" for k in range(20)]), dict(moment="2026-03-05", **manifest), rules)
    return open_bundle(made)

def twin(base, item: str, new: str) -> Item:
    "A new item that looks like one that is there."
    r = base.items.row(base.item_codes[item], named=True)
    return Item(new, title=r["title"], category=r["category"], brand=r["brand"], price=r["price"], stock=5)

# ---- neighbours

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 8), st.integers(0, 8), st.integers(1, 6))
def test_changed_items_get_the_rows_of_the_night_and_others_make_room_for_them(seed, n_new, n_changed, k):
    rng = np.random.default_rng(seed)
    night = catalogue(rng, 25)
    links = content_links(*catalogue_attributes(night), k)
    other = rng.choice(25, n_changed, replace=False)
    moved = catalogue(rng, 25).with_columns(item_id=night["item_id"])
    mixed = pl.concat([(moved if i in other else night)[i] for i in range(25)] + ([catalogue(rng, n_new, 25)] if n_new else []))
    changed = np.concatenate([np.sort(other), np.arange(25, 25 + n_new)])
    table, m = catalogue_attributes(mixed)
    got, whole = rejoined(links, table, m, changed), content_links(table, m, k)
    assert np.array_equal(got.ids[changed], whole.ids[changed]) and np.array_equal(got.weight[changed], whole.weight[changed])
    score = content_links(table, m, len(mixed))  # all similarities
    like = {(i, int(j)): s for i in changed for j, s in zip(score.ids[i], score.weight[i]) if j >= 0}
    for j in set(range(25)) - set(changed.tolist()):
        kept = [(float(s), int(i)) for i, s in zip(links.ids[j], links.weight[j]) if i >= 0 and i not in changed]
        every = sorted(kept + [(float(like[i, j]), int(i)) for i in changed if (i, j) in like], key=lambda x: -x[0])[:k]
        found = [(float(s), int(i)) for i, s in zip(got.ids[j], got.weight[j]) if i >= 0]
        assert [s for s, _ in found] == pytest.approx([s for s, _ in every], abs=1e-6) and len({i for _, i in found}) == len(found)
        assert (got.ids[j][len(found):] == -1).all() and (got.weight[j][len(found):] == 0).all()

# ---- rows of an item that nobody has bought

def test_an_unsold_item_has_the_features_that_the_night_gives_it():
    at = lambda d: datetime(2026, 3, d, tzinfo=timezone.utc)
    events = pl.DataFrame(dict(event_id=[f"e{k}" for k in range(6)], event_type=["purchase", "view"] * 3, ts=[at(d) for d in range(1, 7)], received_ts=[at(d) for d in range(1, 7)],
        visitor_id=["v", "w"] * 3, user_id=[None] * 6, session_id=[f"s{k}" for k in range(6)], item_id=["a"] * 6, quantity=[1] * 6, price=[3.] * 6, consent=[True] * 6), schema_overrides=dict(user_id=pl.String))
    items, moment = pl.Series(["a", "new"]), int(at(9).timestamp())
    lines, users = encode(events.lazy(), items)
    lines = known_before(lines.filter(pl.col("type") == "purchase"), moment)
    sessions, categories = sessions_of(lines), category_codes(pl.Series(["A", "A"]))
    running = pl.DataFrame(schema=dict(item=pl.Int32, item_display=pl.Float32, item_mailer=pl.Float32, item_coupon=pl.Float64))
    nightly = item_table(lines, sessions, pairs_of(lines, sessions, "item", moment, 30, (7, 30, 90)), categories, running, moment, (7, 30, 90), 20)
    live = live_table(coded_log(events.lazy(), items, users, categories), RANKED_ITEM, "item", 2, [moment])[0]
    assert np.array_equal(unsold(), np.concatenate([nightly[1], live[1]])) and not np.array_equal(nightly[0], nightly[1])

@given(st.lists(st.sampled_from([None, "A", "A > x", "A > x > 1", "B > x", "B"]), min_size=1, max_size=8), st.lists(st.sampled_from([None, "A > x > 1", "B > x", "C", "C > x", "A > y"]), max_size=5))
def test_categories_are_alike_as_they_would_be_at_night(paths, more):
    before, after = category_codes(pl.Series(paths, dtype=pl.String)), category_codes(pl.Series(paths + more, dtype=pl.String))
    got = np.concatenate([before, category_rows(pl.Series(paths, dtype=pl.String), before, pl.Series(more, dtype=pl.String))])
    for level in range(3): assert np.array_equal(got[:, None, level] == got[None, :, level], after[:, None, level] == after[None, :, level])

# ---- a version of the day

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intraday")
    publish(folder); publish(folder, "v2", seed=7); promote(folder/"bundles", "v1")
    return folder

def engine_of(bundle): return Engine(bundle.state, bundle.ranker, PER_SOURCE, BUDGET, bundle)

def test_a_new_item_is_a_candidate_of_its_like_and_known_lists_stay(shop, tmp_path):
    base = open_bundle(shop/"bundles"/"v1")
    made = day_version(base, dict(new=overlaid_item(twin(base, "i4", "new"))), tmp_path)
    verify_bundle(made); day = open_bundle(made, base)
    before, after = engine_of(base), engine_of(day)
    got = recommend(after, Request(cart=["i4"], n=BUDGET), "r")
    new, = [s for s in got.items if s.item_id == "new"]
    assert new.source == ["content"] and new.title == base.items["title"][4] and got.model_version == made.name
    assert similar(after, "new", 5, None, "r").items[0].item_id == "i4"
    assert [s.item_id for s in recommend(after, Request(filter=Filter(items=("new",))), "r").items] == ["new"]
    score = {s.item_id: s.score for s in recommend(before, Request(cart=["i4"], n=BUDGET), "r").items}
    same = [s for s in got.items if s.item_id in score and "content" not in s.source]
    assert len(same) > 5 and all(s.score == score[s.item_id] for s in same)
    plain = [(s.item_id, s.score) for s in recommend(after, Request(user_id="u3"), "r").items if "content" not in s.source]
    assert set(plain) <= {(s.item_id, s.score) for s in recommend(before, Request(user_id="u3", n=BUDGET), "r").items}

def overlaid_item(item): return Change(**said(item))

def test_what_changes_nothing_makes_no_version_and_the_same_change_the_same_one(shop, tmp_path):
    base = open_bundle(shop/"bundles"/"v1")
    again = twin(base, "i4", "i4")
    assert day_version(base, dict(i4=overlaid_item(again)), tmp_path) is None and not list(tmp_path.iterdir())
    assert day_version(base, dict(i4=Change("i4", stock=0)), tmp_path) is None
    first = day_version(base, dict(i4=Change("i4", price=1e4, stock=3)), tmp_path)
    stamp = first.stat().st_mtime_ns
    assert day_version(base, dict(i4=Change("i4", price=1e4, stock=7)), tmp_path) == first and first.stat().st_mtime_ns == stamp
    assert day_version(base, dict(i4=Change("i4", price=1e5)), tmp_path) != first
    assert newer(dict(a=stamped(Change("a"), 5.)), 5.) == {} and newer(dict(a=stamped(Change("a"), 5.1)), 5.) and newer(dict(a=Change("a")), 5.)

def test_a_table_that_nobody_named_stops_the_version_not_the_service(shop, tmp_path, monkeypatch):
    import recsys.serving.intraday as room
    base = open_bundle(shop/"bundles"/"v1")
    monkeypatch.setattr(room, "EMPTY", {k: v for k, v in room.EMPTY.items() if k != "vector_out"})
    with pytest.raises(RecsysError, match="vector_out"): day_version(base, dict(new=overlaid_item(twin(base, "i4", "new"))), tmp_path)
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]

texts = st.none() | st.sampled_from(["Kettle", "Pan", ""])
changes = st.dictionaries(st.sampled_from([f"i{k}" for k in range(4)] + ["n1", "n2", "n0"]), st.fixed_dictionaries({}, optional=dict(
    title=texts, brand=texts, category=st.none() | st.just("A > new"), price=st.none() | st.floats(0, 1e6, width=32), stock=st.none() | st.integers(-1, 5), attributes=st.none() | st.just(dict(a=[1, "b"])))), max_size=5)

@settings(max_examples=60, deadline=None)
@given(changes)
def test_the_table_of_the_day_is_that_of_the_next_night(different):
    "Laid over by the service or by the ingest: the same rows."
    items = conform(catalogue(np.random.default_rng(0), 4), Contract)
    live = {i: Change(i, **c) for i, c in different.items()}
    day, _ = overlay(items.select("item_id", "title", "category", "brand", "price", "stock", "attributes"), differing(items, live))
    night, _ = with_put(items, [json.loads(msgspec.json.encode(stamped(c, 9.))) for c in live.values()], told=0.)
    plain = lambda t: t.select("item_id", "title", "category", "brand", "price", "stock", pl.col("attributes").str.replace_all(" ", "")).sort("item_id")
    assert plain(day).equals(plain(night))

# ---- the service, without a network

@pytest.fixture
def service(shop, tmp_path):
    s = load_settings()
    s = msgspec.structs.replace(s, paths=msgspec.structs.replace(s.paths, data=str(tmp_path/"data")), candidates=msgspec.structs.replace(s.candidates, per_source=PER_SOURCE, budget=BUDGET))
    rules = tmp_path/"rules.toml"; rules.write_text("[filters]\nmin_stock = 3\n")
    publish(tmp_path, rules=rules); promote(tmp_path/"bundles", "v1")
    service = Service(s, tmp_path/"bundles")
    start(service)
    yield service
    service.close()

def items_of(service, **request): return [s.item_id for s in ask(service, Request(n=BUDGET, **request), "r").items]

def test_a_rule_of_minimum_stock_looks_at_the_stock_of_the_minute(service):
    first = items_of(service, user_id="u3")[0]
    put(service, [Change(first, stock=2)])
    until(lambda: first not in items_of(service, user_id="u3"))
    put(service, [Change(first, stock=3)])
    until(lambda: items_of(service, user_id="u3")[0] == first)
    put(service, [Change(first, stock=None)])
    time.sleep(.6)
    assert items_of(service, user_id="u3")[0] == first

def test_a_list_of_before_is_explained_by_the_engine_of_the_same_night(service):
    from recsys.serving.service import explain, night_of
    given_ = ask(service, Request(cart=["i4"], n=5), "before")
    keeper = Keeper(service.settings, service.bundles, service.store)
    put(service, [twin(service.engine.bundle, "i4", "new")]); keeper.step(time.monotonic())
    until(lambda: "~" in service.engine.bundle.manifest["version"])
    engine, question, level, items = until(lambda: explained(service, "before"))
    assert engine is service.engine and items == [s.item_id for s in given_.items] and night_of(engine.bundle.manifest) == "v1"

def explained(service, request_id):
    from recsys.serving.refused import Refused
    from recsys.serving.service import explain
    try: return explain(service, request_id)
    except Refused: return None

def test_what_the_night_took_over_is_laid_over_it_no_longer(service, tmp_path):
    first = items_of(service, user_id="u3")[0]
    put(service, [Change(first, stock=0)])
    until(lambda: first not in items_of(service, user_id="u3"))
    publish(tmp_path, "v2", manifest=dict(put_until=time.time())); promote(tmp_path/"bundles", "v2") # the shop's own files knew better
    until(lambda: service.engine.bundle.manifest["version"] == "v2")
    assert first in items_of(service, user_id="u3")

# ---- the whole service

def call(port, method, path, body): return http_ask(port, method, path, body if isinstance(body, bytes) else json.dumps(body))
def listed(port, **request):
    got = http_ask(port, body=request)[2]
    return [s["item_id"] for s in got["items"]], got["model_version"]

def keepers(pid): return [c for c in psutil.Process(pid).children() if "intraday" in words(c)]

def hammer(port, stop, answers, failures):
    "Ask without pause; (version, whether the new item was there) of each answer."
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    while not stop.is_set():
        try:
            status, _, got = http_ask(port, body=dict(cart=["i4"], n=BUDGET), link=link)
            if status == 200: answers.append((got["model_version"], "new" in [s["item_id"] for s in got["items"]]))
            else: failures.append(status)
            time.sleep(.01)
        except (OSError, http.client.HTTPException) as e: failures.append(repr(e)); link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

def test_an_item_that_is_put_is_in_the_lists_of_all_workers_within_a_minute(tmp_path):
    base = publish(tmp_path); publish(tmp_path, "v2", seed=7); promote(tmp_path/"bundles", "v1")
    new = msgspec.to_builtins(twin(base, "i4", "new")) | dict(category="A > noon", title="Hot new kettle " + base.items["title"][4])
    with serving(tmp_path, workers=2, intraday_seconds=2) as (process, port):
        assert len(workers_of(process.pid)) == 2 and not keepers(process.pid)  # nothing was put yet
        stop, answers, failures = threading.Event(), [], []
        threads = [threading.Thread(target=hammer, args=(port, stop, answers, failures)) for _ in range(3)]
        for t in threads: t.start()
        until(lambda: len(answers) > 50)
        began = time.monotonic()
        assert call(port, "PUT", "/v1/items", dict(items=[new]))[0] == 200
        until(lambda: len(answers) > 100 and all(there for _, there in answers[-50:]), 60)
        assert time.monotonic() - began < 60
        day, = {v for v, _ in answers[-50:]}
        assert day.startswith("v1~") and {(v, there) for v, there in answers} == {("v1", False), (day, True)}
        assert listed(port, filter=dict(category=["A > noon"]))[0] == ["new"] and call(port, "POST", "/v1/similar", dict(item_id="new"))[0] == 200
        # titles and prices, to filters and answers
        call(port, "PATCH", "/v1/items/i7", dict(title="Another title", price=5000.))
        until(lambda: all(listed(port, filter=dict(price_min=4000))[0] == ["i7"] for _ in range(10)), 60)
        assert http_ask(port, body=dict(filter=dict(items=["i7"])))[2]["items"][0]["title"] == "Another title"
        # out of stock: gone at once, not with the next version
        _, version = listed(port)
        call(port, "PATCH", "/v1/items/new", dict(stock=0)); time.sleep(1)
        assert all("new" not in listed(port, cart=["i4"], n=BUDGET)[0] for _ in range(20)) and listed(port)[1] == version
        call(port, "PATCH", "/v1/items/new", dict(stock=1))
        until(lambda: all("new" in listed(port, cart=["i4"], n=BUDGET)[0] for _ in range(10)))
        # the keeper dies, the night goes by, the version of the day follows
        keepers(process.pid)[0].kill()
        promote(tmp_path/"bundles", "v2")
        until(lambda: {v.partition("~")[0] for v, _ in answers[-50:]} == {"v2"}, 60)
        until(lambda: keepers(process.pid) and {v.partition("~")[:2] for v, _ in answers[-50:]} == {("v2", "~")}, 60)
        stop.set()
        for t in threads: t.join()
        assert not failures
        assert [r["item_id"] for r in read_put(tmp_path/"data")] == ["i7", "new"]
        keeper, = keepers(process.pid)
    assert not keeper.is_running()  # it goes with the service
    with serving(tmp_path) as (process, port):
        until(lambda: listed(port, filter=dict(category=["A > noon"]))[0] == ["new"])
        keeper, = until(lambda: keepers(process.pid)); process.kill()
        until(lambda: ended(keeper.pid))

def test_a_stream_of_changes_costs_few_versions(shop, tmp_path):
    s = load_settings()
    s = msgspec.structs.replace(s, paths=msgspec.structs.replace(s.paths, data=str(tmp_path/"data")))
    store = LocalStore(tmp_path/"state")
    keeper, made = Keeper(s, shop/"bundles", store), set()
    for second in range(60):  # by the keeper's clock
        store.put_items([stamped(Change(f"i{second % 9}", price=float(second)), 1. + second)])
        keeper.step(1000. + second)
        made.add(day_of_night(keeper.folder, "v1").name)
    assert 3 <= len(made) <= 60 / s.serving.intraday_seconds + 1
    keeper.step(1000. + 60 + s.serving.intraday_seconds)
    last = open_bundle(day_of_night(keeper.folder, "v1"))
    assert dict(zip(last.items["item_id"], last.items["price"]))["i5"] == 59
    assert len([p for p in keeper.folder.iterdir() if p.is_dir() and not p.is_symlink()]) <= 2
    store.close()

# ---- into the next night

def test_the_next_night_has_each_put_item_once(tmp_path, monkeypatch):
    from recsys.data.ingest import ingest, source_digest
    folder = tmp_path/"shop"; folder.mkdir()
    (folder/"events.csv").write_text("event_id,event_type,ts,visitor_id,item_id\n" + "".join(f"e{k},purchase,2026-03-0{1 + k % 5}T10:00:00Z,v{k % 3},a{k % 2}\n" for k in range(20)))
    (folder/"items.csv").write_text("item_id,title,price\na0,Old,3\na1,Other,4\n")
    (folder/"shop.toml").write_text('[events]\npath = "events.csv"\n[items]\npath = "items.csv"\n')
    now = datetime(2026, 3, 10, tzinfo=timezone.utc)
    def night(name):
        said_ = ingest("shop/shop.toml", tmp_path/name, None, now, 30, 60, .5, tmp_path, data_dir=tmp_path/"data")
        return said_, pl.read_parquet(tmp_path/name/"items.parquet")
    said_, items = night("one")
    assert items["item_id"].to_list() == ["a0", "a1"] and said_["put_until"] == pytest.approx(os.stat(folder/"items.csv").st_mtime - 600)
    before = source_digest("shop/shop.toml", tmp_path, tmp_path/"data")
    later = os.stat(folder/"items.csv").st_mtime + 100
    puts = [stamped(Item("new", title="New", attributes=dict(c=["x"])), later), stamped(Change("a0", price=2.5), later)]
    write_put(tmp_path/"data", [msgspec.json.encode(c) for c in puts])
    assert source_digest("shop/shop.toml", tmp_path, tmp_path/"data") != before
    for name in ("two", "three"):  # however often
        said_, items = night(name)
        assert items.select("item_id", "title", "price").rows() == [("a0", "Old", 2.5), ("a1", "Other", 4.), ("new", "New", None)] and said_["put_items"] == dict(added=1, changed=1, older=0)
        assert said_["put_until"] == later - 10
    os.utime(folder/"items.csv", (later + 50, later + 50))
    said_, items = night("four")
    assert items["price"].to_list() == [3., 4., None] and said_["put_items"] == dict(added=1, changed=0, older=1)
    os.utime(folder/"items.csv", (later + 2000, later + 2000))
    assert night("later")[0]["put_until"] == later + 1400 # the files have had the last word on all that was put: no day lays it over them again
    put_file(tmp_path/"data").write_text("{}\n")
    with pytest.raises(RecsysError, match="item_id"): night("five")

# ---- what a review found

def test_a_known_item_with_dates_keeps_its_dates_and_nothing_else():
    soon = datetime(2030, 1, 1, tzinfo=timezone.utc)
    live = dict(a=Change("a", price=3., available_to=soon, put_ts=100.), b=Change("b", price=4., put_ts=100.), c=Change("c", price=5., put_ts=300.))
    assert newer(live, 200.) == dict(a=Change("a", available_to=soon, put_ts=100.), c=live["c"])

def test_dates_that_were_taken_back_do_not_come_again(service):
    first = items_of(service, user_id="u3")[0]
    past = datetime(2020, 1, 1, tzinfo=timezone.utc)
    put(service, [Item(first, stock=10, available_from=past)]); until(lambda: first in service.live)
    put(service, [Item(first, stock=0)])
    until(lambda: first not in items_of(service, user_id="u3"))
    time.sleep(2.5) # the look at dates comes once a second
    assert first not in items_of(service, user_id="u3")

def test_stock_alone_makes_no_other_version(tmp_path):
    base = publish(tmp_path)
    live = dict(i1=Change("i1", price=99., put_ts=2e9))
    made = day_version(base, live, tmp_path/"day")
    assert day_version(base, live | dict(i2=Change("i2", stock=0, put_ts=2e9)), tmp_path/"day") == made

def test_a_lost_store_takes_no_product_from_the_file(tmp_path):
    base = publish(tmp_path); promote(tmp_path/"bundles", "v1")
    settings = load_settings()
    settings = msgspec.structs.replace(settings, paths=msgspec.structs.replace(settings.paths, data=str(tmp_path/"data")))
    write_put(settings.data_dir, [msgspec.json.encode(twin(base, "i4", "only here"))])
    class Store:
        def items_since(self, version): return (1, [Change("i1", price=3., put_ts=2e9)]) if version < 1 else (version, [])
    keeper = Keeper(settings, tmp_path/"bundles", Store())
    keeper.take_over(); keeper.make()
    assert {r["item_id"] for r in read_put(settings.data_dir)} == {"only here", "i1"}
