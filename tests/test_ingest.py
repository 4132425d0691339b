"Ingest at any size: batches, order and memory change nothing; what is known first stays; nobody who is forgotten is there."
import json, random, stat
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import recsys.data.ingest as room
from recsys.core.files import write_json
from recsys.core.settings import RecsysError, load_settings
from recsys.data.checks import Limits, stop_at_fails, validate_data
from recsys.data.events import Event, conform, exchange_rates, in_currency, in_order, read_events, sessionize, validate_events, write_events
from recsys.data.flags import Flagger, catch
from recsys.data.identity import Forgotten, Stitcher, changes, conflicts, forget, person
from recsys.data.importers import Source, Table
from recsys.data.ingest import end_of_data, ingest, source_digest
from recsys.data.outcomes import outcomes, rates, write_outcomes
from recsys.data.quarantine import export_quarantine, retry_quarantine, settled
from recsys.data.spill import DaySpill, Hashes, waiting

NOW, DAY = (datetime(2026, 3, d, tzinfo=timezone.utc) for d in (20, 2))
slow = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def minute(m: float) -> datetime: return DAY + timedelta(minutes=m)

def log(rows: list[dict]) -> pl.DataFrame:
    "Contract rows; what a row does not say is a view of tea by v."
    return conform(pl.DataFrame([dict(event_id=f"e{i}", event_type="view", visitor_id="v", item_id="tea", ts=DAY) | r for i,
        r in enumerate(rows)], infer_schema_length=None))

def source(df: pl.DataFrame, size: int = 10**9, name: str = "log.parquet") -> Source:
    "`df` as a source that gives `size` rows at a time."
    df = df.with_columns(source=pl.lit(name), problem=pl.lit(None, pl.String)).with_row_index("row", offset=1)
    return Source("made up", "", Table(lambda: df.iter_slices(size), {name: df.lazy().drop("source", "problem")}))

def take_in(monkeypatch, out: Path, df: pl.DataFrame, moment=None, size: int = 10**9, gap=30, share=1., **kw) -> dict:
    monkeypatch.setattr(room, "open_source", lambda dataset, root: source(df, size))
    return ingest("log", out, moment, NOW, gap, 60, share, out.parent, **kw)

def back(out: Path, before=None, flagged=True) -> pl.DataFrame: return read_events(out/"events", before, flagged).collect()

def content(out: Path) -> dict[str, bytes]: return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}

def adds_up(said: dict):
    assert said["rows_read"] + said["recovered"] == sum(said[k] for k in ("rows", "duplicates", "quarantined", "settled", "later",
        "forgotten"))

def random_log(seed: int, n: int = 400) -> pl.DataFrame:
    "Five days of some visitors who log in now and then, with late, repeated and bad rows."
    rng = np.random.default_rng(seed)
    rows = [dict(event_id=f"e{rng.integers(n)}", ts=minute(int(rng.integers(5 * 1440))), visitor_id=f"v{rng.integers(9)}",
        item_id=f"i{rng.integers(20)}",
                 event_type=str(rng.choice(["view", "click", "purchase", "gaze"], p=[.5, .3, .17, .03])),
                 user_id=f"u{rng.integers(4)}" if rng.random() < .2 else None,
                     price=float(rng.choice([1., 2.5, -1.], p=[.5, .48, .02]))) for _ in range(n)]
    late = [timedelta(minutes=int(rng.choice([0, 1, 90, 3000], p=[.6, .2, .1, .1]))) for _ in rows]
    df = log([r | dict(received_ts=r["ts"] + l) for r, l in zip(rows, late)])
    return pl.concat([df, df.sample(40, seed=seed)])

# ---- size and order

def test_neither_order_nor_batches_nor_memory_matter(tmp_path, monkeypatch):
    df = random_log(1)
    said = take_in(monkeypatch, tmp_path/"a", df)
    adds_up(said)
    assert said["duplicates"] and said["quarantined"] and said["later"] and said["stitched"]
    expected = {n: c for n, c in content(tmp_path/"a").items() if n not in ("ingest.json", "quarantine.parquet")}
    for k, (size, slow, memory, limit) in enumerate([(7, 1e9, 10**9, 50), (50, 1e9, 3, 20), (33, -1, 0, 10), (1000, -1, 0, 10**6)]):
        monkeypatch.setattr(room, "SLOW_TO_READ", slow); monkeypatch.setattr(room, "ROWS_IN_MEMORY", memory)
        monkeypatch.setattr(room, "DaySpill", partial(DaySpill, limit=limit)); monkeypatch.setattr(room, "Hashes", partial(Hashes,
            limit=limit))
        again = take_in(monkeypatch, tmp_path/f"b{k}", df.sample(fraction=1, shuffle=True, seed=k), size=size)
        assert again == said | dict(sources=again["sources"]), k
        got = content(tmp_path/f"b{k}")
        assert {n for n in expected if got[n] != expected[n]} == set(), k
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "what was spilled is gone"

def test_shuffled_files_give_the_same_bytes(tmp_path):
    df = random_log(2).filter(pl.col("event_type") != "gaze", pl.col("price") > 0)
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path/name).mkdir()
        parts = df.sample(fraction=1, shuffle=True, seed=seed).drop("flag", "session_id")
        for k, part in enumerate(parts.iter_slices(100 + 37 * seed)): part.write_parquet(tmp_path/name/f"{'xy'[k % 2]}{k}.parquet")
        (tmp_path/name/"shop.toml").write_text("[events]\npath = '*.parquet'\n")
        ingest("shop.toml", tmp_path/name/"out", None, NOW, 30, 60, 0., tmp_path/name)
    a, b = (content(tmp_path/n/"out") for n in "ab")
    assert {n for n in a if a[n] != b[n]} <= {"ingest.json", "quarantine.parquet"} and a.keys() == b.keys()

def test_rows_that_wait():
    assert waiting([]) == 0 and waiting([{1: 5}, {2: 5}, {3: 5}]) == 5 and waiting([{1: 5, 3: 1}, {2: 5}, {1: 1, 3: 5}]) == 17

def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(room, "write_day", full)
    with pytest.raises(RecsysError, match="the disk is full"): take_in(monkeypatch, tmp_path/"out", random_log(3))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

def test_end_of_data():
    assert end_of_data({20514: 1}).date().isoformat() == "2026-03-03"

@given(st.lists(st.tuples(st.integers(0, 5), st.text("ab", max_size=3)), max_size=20))
@settings(deadline=None, max_examples=50)
def test_in_order_is_sort(rows):
    df = pl.DataFrame(dict(ts=[t for t, _ in rows], event_id=[e for _, e in rows], n=range(len(rows))), schema=dict(ts=pl.Int64,
        event_id=pl.String, n=pl.Int64))
    assert in_order(df).drop("n").equals(df.sort("ts", "event_id").drop("n")) and sorted(in_order(df)["n"]) == list(range(len(rows)))

def test_contexts_are_judged_each_by_itself():
    texts = [json.dumps(dict(n=n)) for n in range(300)] + ["{", "nul", ""]
    rng = np.random.default_rng(0)
    df = log([{}])[np.zeros(60_000, int)].with_columns(event_id=pl.int_range(60_000).cast(pl.String),
        context=pl.Series(rng.choice([*texts, None], 60_000)))
    for _ in range(3):
        good, bad = validate_events(df, NOW, 60)
        assert set(bad["context"]) == {"{", "nul", ""} and set(bad["reason"]) == {"context is not JSON"} and good["context"].n_unique() == 301

# ---- what was known first stays

copies = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4000), st.integers(0, 4000)), min_size=1, max_size=25)

@slow
@given(copies)
def test_the_copy_that_was_known_first_stays(tmp_path_factory, monkeypatch, rows):
    out = tmp_path_factory.mktemp("k")/"out"
    df = log([dict(event_id=e, ts=minute(t), received_ts=minute(r), item_id=f"i{n}") for n, (e, t, r) in enumerate(rows)])
    said = take_in(monkeypatch, out, df, moment=datetime(2026, 3, 9))
    best = {}
    for n, (e, t, r) in enumerate(rows): best[e] = min(best.get(e, (9e9,)), (max(t, r), r, t, f"i{n}"))
    assert {r["event_id"]: r["item_id"] for r in back(out).iter_rows(named=True)} == {e: b[3] for e, b in best.items()}
    assert said["duplicates"] == len(rows) - len(best)

@slow
@given(st.integers(0, 10**6), st.integers(1, 5 * 24 * 60))
def test_a_later_ingest_does_not_rewrite_the_past(tmp_path_factory, monkeypatch, seed, m):
    tmp, df, stable = tmp_path_factory.mktemp("p"), random_log(seed, 120), [c for c in Event.columns() if c not in ("session_id", "flag")]
    take_in(monkeypatch, tmp/"late", df, moment=datetime(2026, 3, 12))
    try: take_in(monkeypatch, tmp/"early", df, moment=minute(m))
    except RecsysError as e: assert "no valid event before" in str(e) and not back(tmp/"late", minute(m)).height; return
    assert back(tmp/"late", minute(m)).select(stable).equals(back(tmp/"early").select(stable))

# ---- sessions, users, robots

@slow
@given(st.integers(0, 10**6), st.integers(1, 300))
def test_sessions_do_not_end_at_midnight(tmp_path_factory, monkeypatch, seed, gap):
    out = tmp_path_factory.mktemp("s")/"out"
    said = take_in(monkeypatch, out, random_log(seed, 150), moment=datetime(2026, 3, 12), gap=gap)
    got = back(out)
    whole = sessionize(got.with_columns(session_id=pl.lit(None, pl.String)), gap)
    assert got["session_id"].equals(whole["session_id"]) and said["sessions"] == got["session_id"].n_unique()

@slow
@given(st.integers(0, 10**6))
def test_users_by_brute_force(tmp_path_factory, monkeypatch, seed):
    out, df = tmp_path_factory.mktemp("u")/"out", random_log(seed, 150).unique("event_id",
        maintain_order=True).with_columns(pl.col("price").abs(), event_type=pl.lit("view"))
    said = take_in(monkeypatch, out, df, moment=datetime(2026, 3, 12))
    rows = df.to_dicts()
    links = sorted((max(r["ts"], r["received_ts"]), r["ts"], r["user_id"], r["visitor_id"]) for r in rows if r["user_id"])
    def user(r):
        before = [u for known, _, u, v in links if v == r["visitor_id"] and known < r["ts"]]
        return r["user_id"] or (before[-1] if before else None)
    got = {r["event_id"]: r["user_id"] for r in back(out).iter_rows(named=True)}
    assert got == {r["event_id"]: user(r) for r in rows}
    told = pl.read_parquet(out/"links.parquet")
    users = {v: {u for _, _, u, w in links if w == v} for _, _, _, v in links}

    assert {v: set(told.filter(pl.col("visitor_id") == v)["user_id"]) for v in told["visitor_id"].unique()} == users
    assert said["link_conflicts"] == sum(len(u) > 1 for u in users.values()) == conflicts(told) and said["linked_visitors"] == len(users)
    first = {v: min(l for l in links if l[3] == v) for v in users}
    assert {r["visitor_id"]: r["user_id"] for r in told.unique("visitor_id", keep="first",
        maintain_order=True).iter_rows(named=True)} == {v: l[2] for v, l in first.items()}
    moment = minute(3000)
    who = person(df.lazy(), told.lazy(), moment).collect()
    known = {v: l[2] for v, l in first.items() if l[0] < moment}
    assert who["person"].to_list() == [r["user_id"] or known.get(r["visitor_id"], r["visitor_id"]) for r in rows]

def test_flags(tmp_path, monkeypatch):
    fast = [dict(visitor_id="fast", ts=DAY + timedelta(seconds=i / 10)) for i in range(150)]
    shown = [dict(visitor_id="reader", ts=minute(1), event_type="impression", item_id=f"i{i}") for i in range(300)]
    basket = [dict(visitor_id="baker", ts=minute(2), event_type="purchase", item_id=f"i{i}",
        order_id="tester"[:4] + "-1" if i else "o1") for i in range(200)]
    steady = [dict(visitor_id="steady", ts=DAY + timedelta(seconds=3 * i)) for i in range(60)]
    df = log(fast + shown + basket + steady + [dict(visitor_id="fast", ts=minute(3000)), dict(flag="not a product", order_id="TEST 1")])
    said = take_in(monkeypatch, tmp_path/"out", df, bot_events_per_minute=100, bot_events_per_day=500)
    assert said["flagged"] == {"bot": 51 + 10, "not a product": 1, "test order": 199 + 1} and said["robots"] == {"rate per minute": 1,
        "rate per day": 0, "steady pace": 1}
    got = back(tmp_path/"out")
    assert got.height == said["rows"] == df.height, "nothing is dropped"
    assert set(got.filter(pl.col("flag").is_not_null())["flag"]) == {"bot", "test order", "not a product, test order"}
    assert back(tmp_path/"out", flagged=False).height == df.height - 51 - 10 - 199 - 1
    assert set(got.filter(pl.col("visitor_id") == "reader")["flag"]) == {None}

def test_a_made_up_clock_makes_no_robots(tmp_path):
    "Sixty and three thousand clicks a second apart: the mapping's clock is steady, the visitors may well be people."
    pl.DataFrame(dict(session=[1, 2], items=[list(range(60)), list(range(3000))])).write_parquet(tmp_path/"log.parquet")
    (tmp_path/"shop.toml").write_text("[events]\npath = 'log.parquet'\nlike = 'sessions'\n")
    said = ingest("shop.toml", tmp_path/"out", None, NOW, 30, 60, .05, tmp_path)
    assert said["robots"] == {"rate per minute": 0, "rate per day": 1, "steady pace": 0} and said["flagged"] == {"bot": 1000} and not said["timed"]

@slow
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 600)), max_size=60), st.integers(2, 8), st.integers(5, 20))
def test_rates_by_brute_force(rows, per_minute, per_day):
    df = in_order(log([dict(visitor_id=v, ts=DAY + timedelta(seconds=s)) for v, s in rows] + [dict(visitor_id="z")]))
    got = {r["visitor_id"]: r["since"] for r in catch(df, per_minute, per_day, run=10**6).iter_rows(named=True)}
    expected = {}
    for v in "ab":
        times = sorted(s for w, s in rows if w == v)
        broken = [t for i, t in enumerate(times) if i >= per_day or sum(t - 60 < u <= t for u in times[:i + 1]) > per_minute]
        if broken: expected[v] = DAY + timedelta(seconds=broken[0])
    assert got == expected

# ---- forgotten

def test_the_forgotten_are_nowhere(tmp_path):
    secret = "ann@home"
    lines = ["event_id,event_type,ts,visitor_id,user_id,item_id,price,note"] + [
        f"a,view,2026-03-02T09:00:00Z,cookie-1,,tea,1,", f"b,purchase,2026-03-03T09:00:00Z,cookie-1,{secret},tea,1,",
            f"c,view,2026-03-04T09:00:00Z,cookie-1,,pot,1,",
        f"d,view,2026-03-04T09:00:00Z,cookie-1,,pot,free,", f"e,view,2026-03-02T09:00:00Z,cookie-2,bob,tea,-1,asked {secret}",
            f"f,view,2026-03-02T09:00:00Z,cookie-3,,tea,-1,{secret}",
        f"g,view,2026-03-02T10:00:00Z,cookie-2,bob,tea,1,", f"b,purchase,2026-03-03T10:00:00Z,cookie-1,{secret},tea,1,",
            "h,view,2026-03-05T10:00:00Z,cookie-4,,tea,cheap,"]
    (tmp_path/"log.csv").write_text("\n".join(lines) + "\n")
    (tmp_path/"users.csv").write_text(f"user_id\n{secret}\nbob\n")
    (tmp_path/"shop.toml").write_text("[events]\npath = 'log.csv'\n[users]\npath = 'users.csv'\n")
    run = lambda out: ingest("shop.toml", tmp_path/out, None, NOW, 30, 60, 1., tmp_path, data_dir=tmp_path/"data")
    before, mark = run("before"), source_digest("shop.toml", tmp_path, tmp_path/"data")
    assert before["forgotten"] == 0 and before["stitched"] == 1 and before["rows"] == 4
    assert forget(tmp_path/"data", [secret]) == 1 and forget(tmp_path/"data", [secret]) == 0
    assert source_digest("shop.toml", tmp_path, tmp_path/"data") != mark == source_digest("shop.toml", tmp_path)
    said = run("after")
    adds_up(said)
    assert said["rows"] == 1 and said["forgotten"] == 7 and said["forgotten_users"] == 1 and said["quarantined"] == 1
    assert pl.read_parquet(tmp_path/"after"/"quarantine.parquet")["row"].to_list() == [9]
    for p in (tmp_path/"after").rglob("*.parquet"):
        for column in pl.read_parquet(p).select(pl.col(pl.String)): assert not column.str.contains(f"cookie-1|{secret}").any(), p
    for p in (tmp_path/"data").iterdir(): assert secret.encode() not in p.read_bytes()
    assert stat.S_IMODE((tmp_path/"data"/"forgotten.key").stat().st_mode) == 0o600

def test_old_links_are_remembered_and_a_lost_key_is_noticed(tmp_path):
    links = pl.DataFrame(dict(visitor_id=["c1", "c2"], user_id=["ann", "bob"]))
    links.write_parquet(tmp_path/"links.parquet")
    assert forget(tmp_path, ["ann"], tmp_path/"links.parquet") == 2
    assert Forgotten(tmp_path).among(pl.Series(["c1", "c2", "ann", None])) == ["ann", "c1"]
    (tmp_path/"forgotten.key").unlink()
    with pytest.raises(RecsysError, match="the key of the forgotten is gone"): Forgotten(tmp_path)

@pytest.mark.parametrize("order, test", [("TEST-1", True), ("test", True), ("Test7", True), ("test_1", True), ("TEST 1", True),
    ("TESTAROSSA-1", False), ("testé", False), ("attest-1", False), ("", False), (None, False)])
def test_a_test_order_begins_with_the_word(order, test):
    assert Flagger(100, 2000).fill(log([dict(order_id=order, event_type="purchase")]))["flag"].to_list() == ["test order" if test else None]

# ---- quarantine and back

HEAD = "event_id,event_type,ts,visitor_id,item_id,price\n"
BAD = HEAD + "".join(f"e{i},view,2026-03-0{2 + i % 3}T10:{i:02d}:00Z,v{i},i{i},{i}\n" for i in range(9)) + \
    "x,gaze,2026-03-02T09:00:00Z,v1,tea,1\ny,gaze,2026-03-02T09:30:00Z,v2,tea,1\n" + \
    "z,view,2026-03-02T11:00:00Z,v3,tea,free\nw,view,2026-03-02T11:00:00Z,v3,tea,gratis\ne1,view,2026-03-05,v,tea,1\n"

def shop(tmp_path, text=BAD, mapping="[events]\npath = '*.csv'\n"):
    (tmp_path/"log.csv").write_text(text); (tmp_path/"shop.toml").write_text(mapping)
    return lambda out="out": ingest("shop.toml", tmp_path/out, None, NOW, 30, 60, 1., tmp_path, data_dir=tmp_path/"data")

def test_a_corrected_mapping_brings_rows_back(tmp_path):
    run = shop(tmp_path)
    said = run()
    assert said["quarantined"] == 4 and said["duplicates"] == 1 and said["recovered"] == 0
    retry = lambda q=tmp_path/"out"/"quarantine.parquet": retry_quarantine(q, tmp_path/"shop.toml", tmp_path/"data", NOW, 60)
    assert retry()["recovered"] == 0 and retry()["tried"] == 4
    (tmp_path/"shop.toml").write_text("[events]\npath = '*.csv'\nevent_types = {gaze = 'view'}\n")
    (tmp_path/"log.csv").unlink() # the file is gone; its bad rows are not
    (tmp_path/"next.csv").write_text(BAD.splitlines()[0] + "\nn,view,2026-03-04T10:00:00Z,v,tea,1\n")
    got = retry()
    assert (got["recovered"], got["known"], sum(got["bad"].values())) == (2, 0, 2)
    assert retry() == got | dict(recovered=0, known=2), "asking twice changes nothing"
    said = run("next")
    adds_up(said)
    assert said["recovered"] == 2 and said["rows"] == 3 and set(back(tmp_path/"next")["event_id"]) == {"x", "y", "n"}
    (tmp_path/"log.csv").write_text(BAD) # the source comes back: recovered rows are there once, and are not set aside
    said = run("again")
    adds_up(said)
    assert said["rows"] == 12 and said["quarantined"] == 2 and said["settled"] == 2
    assert set(pl.read_parquet(tmp_path/"again"/"quarantine.parquet")["reason"]) == {"price is not a number: 'free'",
        "price is not a number: 'gratis'", "duplicate event_id"}

def test_corrected_rows_come_back(tmp_path):
    run = shop(tmp_path)
    run()
    assert export_quarantine(tmp_path/"out"/"quarantine.parquet", tmp_path/"bad.jsonl") == 4
    lines = [json.loads(l) for l in (tmp_path/"bad.jsonl").read_text().splitlines()]
    for l in lines: l["raw"]["price"] = l["raw"]["price"].replace("free", "0")
    (tmp_path/"bad.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    got = retry_quarantine(tmp_path/"bad.jsonl", tmp_path/"shop.toml", tmp_path/"data", NOW, 60)
    assert got["recovered"] == 1 and got["tried"] == 4 and len(settled(tmp_path/"data")) == 1
    said = run("again")
    adds_up(said)
    assert said["recovered"] == 1 and said["settled"] == 1 and said["quarantined"] == 3 and said["rows"] == 10
    assert back(tmp_path/"again").filter(pl.col("event_id") == "z")["price"].item() == 0
    forget(tmp_path/"data", ["v3"])
    assert run("last")["rows"] == 8 and "z" not in back(tmp_path/"last")["event_id"].to_list(), "recovered rows of the forgotten go too"

@pytest.mark.parametrize("line, message", [("{", "line 1 is not a JSON record"), ('{"source": "a"}', "line 1 lacks source or raw"), ("[1]",
    "line 1 is not a JSON record")])
def test_a_broken_export_is_one_line(tmp_path, line, message):
    shop(tmp_path)
    (tmp_path/"bad.jsonl").write_text(line + "\n")
    with pytest.raises(RecsysError, match=message): retry_quarantine(tmp_path/"bad.jsonl", tmp_path/"shop.toml", tmp_path/"data", NOW, 60)
    with pytest.raises(RecsysError, match="no quarantine here"): retry_quarantine(tmp_path/"none.jsonl", tmp_path/"shop.toml",
        tmp_path/"data", NOW, 60)

def test_items_come_back_too(tmp_path):
    run = shop(tmp_path, mapping="[events]\npath = 'log.csv'\n[items]\npath = 'items.csv'\n")
    (tmp_path/"items.csv").write_text("item_id,title,price\ntea,Tea,cheap\npot,Pot,2\n")
    run()
    export_quarantine(tmp_path/"out"/"quarantine.parquet", tmp_path/"bad.jsonl")
    (tmp_path/"bad.jsonl").write_text((tmp_path/"bad.jsonl").read_text().replace('"cheap"', '"3"'))
    assert retry_quarantine(tmp_path/"bad.jsonl", tmp_path/"shop.toml", tmp_path/"data", NOW, 60)["recovered"] == 1
    run("again")
    items = pl.read_parquet(tmp_path/"again"/"items.parquet").filter(pl.col("title").is_not_null())
    assert items.select("item_id", "price").rows() == [("pot", 2.), ("tea", 3.)]

def test_a_refused_ingest_leaves_what_it_set_aside(tmp_path):
    from recsys.operations.cli import _last_quarantine
    s = load_settings()
    s = msgspec.structs.replace(s, paths=msgspec.structs.replace(s.paths, data=str(tmp_path/"data")))
    refused = lambda: pytest.raises(RecsysError, match="9 of 14 events are bad.*all are in .*quarantine.parquet, counted in reasons.json")
    run = lambda out: ingest("shop.toml", tmp_path/out, None, NOW, 30, 60, .4, tmp_path, data_dir=tmp_path/"data")
    shop(tmp_path, BAD.replace(",view,", ",stare,", 5))
    for _ in range(2): # also where one was refused before
        with refused() as e: run("out")
        assert "\n" not in str(e.value) and not (tmp_path/"out").exists()
    where = _last_quarantine(s)
    assert where == tmp_path/"data"/"refused"/"quarantine.parquet" and str(where) in str(e.value)
    assert json.loads((where.parent/"reasons.json").read_text()) == {"event_type is unknown": 7, "price is not a number": 2}
    assert pl.read_parquet(where).height == 9 and set(p.name for p in where.parent.iterdir()) == {"quarantine.parquet", "reasons.json"}
    (tmp_path/"shop.toml").write_text("[events]\npath = '*.csv'\nevent_types = {gaze = 'view', stare = 'view'}\n")
    got = retry_quarantine(where, tmp_path/"shop.toml", tmp_path/"data", NOW, 60)
    assert got["recovered"] == 7 and got["tried"] == 9
    said = run("out")
    adds_up(said)
    assert said["rows"] == 11 and said["quarantined"] == 2 and not where.parent.exists()
    with pytest.raises(RecsysError, match="no result of the step"): _last_quarantine(s)

def test_bad_items_are_left_too(tmp_path):
    run = lambda: ingest("shop.toml", tmp_path/"out", None, NOW, 30, 60, .4, tmp_path, data_dir=tmp_path/"data")
    shop(tmp_path, mapping="[events]\npath = '*.csv'\n[items]\npath = 'items.jsonl'\n")
    (tmp_path/"items.jsonl").write_text('{"item_id": "a", "price": -1}\n{"item_id": "b", "price": 1}\n')
    with pytest.raises(RecsysError, match="1 of 2 items are bad"): run()
    reasons = json.loads((tmp_path/"data"/"refused"/"reasons.json").read_text())
    assert [r for r in reasons if r.startswith("items: price ")] and sum(reasons.values()) == 1 + 4 + 1, reasons

# ---- outcomes

steps = st.lists(st.tuples(st.sampled_from(["impression", "click", "purchase"]), st.sampled_from("vw"), st.sampled_from("ab"),
    st.sampled_from(["r", "s", None]),
    st.integers(0, 40), st.integers(0, 30)), min_size=1, max_size=30)

@settings(max_examples=40, deadline=None)
@given(steps, st.integers(0, 15), st.integers(0, 15))
def test_outcomes_by_brute_force(rows, click, purchase):
    df = log([dict(event_type=t, visitor_id=v, item_id=i, request_id=r, ts=minute(m), received_ts=minute(m + d)) for t, v, i, r, m,
        d in rows])
    windows, events = dict(click=click, purchase=purchase), df.to_dicts()
    end = max(max(e["ts"], e["received_ts"]) for e in events)
    shown = [e for e in events if e["event_type"] == "impression"]
    mine = {}
    for o in events:
        if o["event_type"] not in windows: continue
        near = timedelta(minutes=windows[o["event_type"]])
        same = ("request_id", "item_id") if o["request_id"] else ("visitor_id", "item_id")
        own = [e for e in shown if all(e[k] == o[k] for k in same) and timedelta(0) <= o["ts"] - e["ts"] <= near]
        if own: mine.setdefault((max(own, key=lambda e: (e["ts"], e["event_id"]))["event_id"], o["event_type"]), []).append(o)
    got = outcomes(df.lazy(), windows).collect(engine="streaming").sort("event_id")
    assert got["event_id"].to_list() == sorted(e["event_id"] for e in shown)
    by_id = {e["event_id"]: e for e in shown}
    for g in got.iter_rows(named=True):
        e, whole = by_id[g["event_id"]], []
        assert g["known"] == max(e["ts"], e["received_ts"]) and g["request_id"] == e["request_id"]
        for kind, m in windows.items():
            found, closes = mine.get((g["event_id"], kind), []), e["ts"] + timedelta(minutes=m)
            first = min(((o["ts"], max(o["ts"], o["received_ts"])) for o in found), default=(None, closes))
            assert (g[kind], g[f"{kind}_ts"], g[f"{kind}_known"]) == (int(bool(found)), *first)
            assert g[f"{kind}_complete"] == (closes <= end)
            whole.append(closes <= end)
        assert g["complete"] == all(whole)

def shown_log(seed: int, n: int = 600) -> pl.DataFrame:
    "Impressions and outcomes of some visitors, with and without requests, late and not, of robots and of people who do not consent."
    rng = np.random.default_rng(seed)
    row = lambda i: dict(event_id=f"e{i}", ts=(at := minute(int(rng.integers(3000)))), visitor_id=f"v{rng.integers(4)}", item_id=f"i{rng.integers(6)}",
        event_type=str(rng.choice(["impression", "click", "purchase", "view"], p=[.5, .25, .15, .1])), received_ts=at + timedelta(minutes=int(rng.choice([0, 5, 300]))),
        request_id=f"r{rng.integers(9)}" if rng.random() < .6 else None, placement=str(rng.choice(["home", "cart"])), position=int(rng.integers(1, 4)),
        flag="bot" if rng.random() < .05 else None, consent=bool(rng.random() < .95), session_id="s")
    return log([row(i) for i in range(n)])

@pytest.mark.parametrize("seed", range(3))
def test_the_table_of_an_ingest_is_that_of_its_events(tmp_path, monkeypatch, seed):
    windows, df = dict(click=60, purchase=600), shown_log(seed)
    said = take_in(monkeypatch, tmp_path/"out", df)
    learnt = df.filter(pl.col("flag").is_null(), pl.col("consent"))
    known = write_outcomes(tmp_path/"out", windows, shard=97)
    table = pl.scan_parquet(tmp_path/"out"/"impressions"/"*.parquet")
    want = outcomes(learnt.lazy(), windows, datetime.fromisoformat(said["moment"])).collect().sort("event_id")
    assert table.collect().sort("event_id").equals(want) and len(list((tmp_path/"out"/"impressions").iterdir())) > 2
    assert not [p for p in (tmp_path/"out").iterdir() if p.name.startswith(".")]
    shown, gap = learnt.filter(pl.col("event_type") == "impression").to_dicts(), lambda a, b: (b["ts"] - a["ts"]).total_seconds() / 60
    for f in known.to_dicts():
        mine = lambda a, b: a["item_id"] == b["item_id"] and (a["request_id"] == b["request_id"] if b["request_id"] else a["visitor_id"] == b["visitor_id"])
        each = [[gap(a, b) for a in shown if mine(a, b)] for b in learnt.filter(pl.col("event_type") == f["type"]).to_dicts()]
        inside = [any(0 <= g <= windows[f["type"]] for g in gaps) for gaps in each]
        assert (f["outcomes"], f["inside"], f["unseen"]) == (len(each), sum(inside), sum(not g for g in each)) and f["inside"] + f["outside"] + f["unseen"] == f["outcomes"]
        late = want.filter(pl.col(f["type"]) == 1, pl.col(f"{f['type']}_known") > pl.col("ts") + timedelta(minutes=windows[f["type"]])).height
        assert f["late"] == late > 0 or f["type"] == "purchase"
    for r in rates(table, ["click"]).to_dicts():
        some = want.filter(pl.col("placement") == r["placement"], pl.col("position") == r["position"])
        done = some.filter("click_complete")
        assert (r["impressions"], r["click_of"]) == (some.height, done.height) and r["click"] == pytest.approx(done["click"].mean())

def test_without_requests_there_is_no_table(tmp_path, monkeypatch):
    for k, df in enumerate((shown_log(0).with_columns(request_id=pl.lit(None, pl.String)), shown_log(0).filter(pl.col("event_type") != "impression"))):
        take_in(monkeypatch, tmp_path/f"out{k}", df)
        assert write_outcomes(tmp_path/f"out{k}", dict(click=60)) is None and not (tmp_path/f"out{k}"/"impressions").exists()

# ---- money and checks

def test_currencies():
    df = pl.DataFrame(dict(price=[10., 10., 10., 10., None], currency=["EUR", "USD", "JPY", None, "USD"]))
    rates = exchange_rates(("USD:0.9", "GBP:1.2"))
    assert df.select(in_currency(pl.col("price"), pl.col("currency"), "EUR", rates)).to_series().to_list() == [10., 9., None, 10., None]
    assert df.select(in_currency(pl.col("price"), pl.col("currency"), "", {})).to_series().equals(df["price"])

TROUBLES = {"rows in quarantine": "fail", "duplicate events": "warn", "days without events": "warn", "events of the last day": "warn",
    "events of the busiest day": "warn", "largest session": "warn",
    "events per session": "warn", "returns": "warn", "events of robots": "warn", "test orders": "warn", "anonymous events": "warn",
        "events without consent": "warn", "shared devices": "warn",
    "late events": "warn", "clock ties": "warn", "events at midnight": "warn", "'purchase' events without a price": "warn",
        "prices without a rate": "warn", "price outliers": "warn",
    "positions without a request": "warn", "sold items that the catalogue lacks": "fail", "events on items without category": "warn",
        "items seen in the log": "warn", "days of history": "fail"}

def test_every_check_can_find_something(tmp_path):
    rows = [dict(event_type="purchase", ts=minute(0), price=None if i % 2 else (1. if i else 1000.), currency="JPY", item_id=f"i{i // 600}",
        session_id="s", consent=False, position=1) for i in range(700)]
    rows += [dict(ts=minute(0), user_id="u", session_id="s", item_id=f"x{i}") for i in range(600)] + [dict(session_id="s", consent=False,
        item_id="x1") for i in range(20000)]
    rows += [dict(ts=minute(1440 * d), session_id="s", consent=False) for d in (20, 40, 41) for _ in range(9)] + [dict(ts=minute(1440 * 42),
        session_id="s")]
    df = log(rows)
    write_events(df, tmp_path/"in"/"events")
    pl.DataFrame(dict(item_id=["x1", *(f"n{i}" for i in range(10**4 * 3))]),
        schema=dict(item_id=pl.String)).with_columns(category=pl.lit(None, pl.String)).write_parquet(tmp_path/"in"/"items.parquet")
    write_json(tmp_path/"in"/"ingest.json", dict(rows=df.height, rows_read=df.height, quarantined=9000, duplicates=9000, sessions=df.height,
        event_types={"purchase": 700, "return": 400},
        flagged={"bot": 9000, "test order": 400}, link_conflicts=5, linked_visitors=9, late=dict(day=.5)))
    s = load_settings()
    s = msgspec.structs.replace(s, data=msgspec.structs.replace(s.data, currency="EUR"))
    checks, _ = validate_data(tmp_path/"in", tmp_path, s)
    with pytest.raises(RecsysError, match="rows in quarantine.*; 2 more failed, see the page"): stop_at_fails(checks)
    found = {c["name"]: c["outcome"] for c in json.loads((tmp_path/"checks.json").read_text())}
    assert {n: found[n] for n in TROUBLES} == TROUBLES and len(found) >= 26
