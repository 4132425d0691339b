"The data wing: every bad input has its one line, and what goes in comes out."
import json, random, re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.data.datasets import coupon_periods, promotion_shares, raw_table, week_calendar
from recsys.data.events import Event, Item, User, conform, read_events, sessionize, write_events
from recsys.data.ingest import ingest, source_digest

NOW = datetime(2026, 3, 10, tzinfo=timezone.utc)
DAY = datetime(2026, 3, 2, tzinfo=timezone.utc)
HEAD = "event_id,event_type,ts,visitor_id,item_id,price\n"
ROWS = [f"e{i},view,2026-03-0{2 + i % 3}T10:{i:02d}:00Z,v{i % 4},i{i % 5},{i}.5\n" for i in range(20)]
MAPPING = "[events]\npath = 'log.csv'\n"

def shop(folder: Path, text: str | bytes = HEAD + "".join(ROWS), mapping: str = MAPPING, name: str = "log.csv") -> Path:
    (folder/name).write_bytes(text.encode() if isinstance(text, str) else text)
    (folder/"shop.toml").write_text(mapping)
    return folder

def run(folder: Path, moment=None, share=.05, now=NOW, out="out") -> dict:
    return ingest("shop.toml", folder/out, moment, now, 30, 60, share, folder)

def refused(folder: Path, **kw) -> str:
    with pytest.raises(RecsysError) as e: run(folder, **kw)
    line = str(e.value)
    assert "\n" not in line and " — " in line, line
    return line

def events(folder: Path, before=None) -> pl.DataFrame: return read_events(folder/"out"/"events", before).collect()

def quarantine(folder: Path) -> pl.DataFrame: return pl.read_parquet(folder/"out"/"quarantine.parquet")

# ---- whole inputs that are wrong

def test_good_shop(tmp_path):
    account = run(shop(tmp_path))
    assert account == json.loads((tmp_path/"out"/"ingest.json").read_text())
    assert account["rows_read"] == account["rows"] == 20 and account["quarantined"] == account["duplicates"] == account["later"] == 0
    assert account["moment"] == "2026-03-05T00:00:00+00:00" and account["items"] == 5 and account["event_types"] == {"view": 20}
    assert [s["path"] for s in account["sources"]] == ["shop.toml", "log.csv"]
    df = events(tmp_path)
    assert df.schema == {n: c.dtype for n, c in Event.columns().items()} and df["ts"].is_sorted()
    for name in ("users", "promotions", "coupons", "quarantine"): assert pl.read_parquet(tmp_path/"out"/f"{name}.parquet").height == 0
    assert pl.read_parquet(tmp_path/"out"/"items.parquet").columns == list(Item.columns())
    assert pl.read_parquet(tmp_path/"out"/"users.parquet").columns == list(User.columns())
    assert pl.read_parquet(tmp_path/"out"/"promotions.parquet").schema == {"item_id": pl.String, "from_ts": pl.Datetime("us", "UTC"),
        "to_ts": pl.Datetime("us", "UTC"), "display": pl.Float32, "mailer": pl.Float32}

def test_missing_mapping(tmp_path):
    assert "shop.toml: no such mapping file — check [data] dataset" in refused(tmp_path)

def test_missing_file(tmp_path):
    (tmp_path/"shop.toml").write_text(MAPPING)
    assert refused(tmp_path) == "log.csv: no such file — check path in the mapping"
    with pytest.raises(RecsysError, match="log.csv: no such file"): source_digest("shop.toml", tmp_path)

def test_pattern_matches_nothing(tmp_path):
    assert refused(shop(tmp_path, mapping="[events]\npath = 'logs/*.csv'\n")) == "logs/*.csv: no file matches — check path in the mapping"

@pytest.mark.parametrize("text, message", [("", "log.csv: the file is empty — export it again"),
    (HEAD, "log.csv: the file has no rows — export it again")])
def test_empty_file(tmp_path, text, message): assert refused(shop(tmp_path, text)) == message

def test_column_that_the_file_lacks(tmp_path):
    line = refused(shop(tmp_path, mapping=MAPPING + "columns = {user_id = 'customer'}\n"))
    assert line == "log.csv: no column 'customer' (for user_id) — it has: event_id, event_type, ts, visitor_id, item_id, price"

def test_nothing_feeds_a_needed_column(tmp_path):
    line = refused(shop(tmp_path, "ts,item_id,event_type\n2026-03-02,a,view\n"))
    assert line.startswith("log.csv: [events] says nothing about visitor_id — add it to columns or constants; the file has: ts, item_id")

def test_whole_column_of_the_wrong_type(tmp_path):
    line = refused(shop(tmp_path, re.sub(r",[\d.]+\n", ",much\n", HEAD + "".join(ROWS))))
    assert line == "log.csv: column 'price' (price) is of the wrong type: no value is a number, the first is 'much' — map another column"
    line = refused(shop(tmp_path, re.sub(r"2026-03-0(\d)T", r"0\1.03.2026 ", HEAD + "".join(ROWS))))
    assert "column 'ts' (ts) is of the wrong type: no value is a time, the first is '02.03.2026 10:00:00Z'" in line and "ts_format" in line

def test_parquet_column_of_the_wrong_type(tmp_path):
    df = pl.DataFrame(dict(event_type=["view"], ts=[DAY], visitor_id=[1.5], item_id=["a"]))
    shop(tmp_path, mapping="[events]\npath = 'log.parquet'\n"); df.write_parquet(tmp_path/"log.parquet")
    wrong = "log.parquet: column '{0}' ({0}) is of the wrong type: "
    assert refused(tmp_path) == wrong.format("visitor_id") + "float, not text or a whole number — map another column"
    df.with_columns(visitor_id=pl.lit(1), ts=pl.lit(1_772_000_000)).write_parquet(tmp_path/"log.parquet")
    assert refused(tmp_path) == wrong.format("ts") + "int, not a time — say ts_unit = 's', 'ms' or 'us' in the mapping"

def test_truncated_and_corrupt_parquet(tmp_path):
    shop(tmp_path, mapping="[events]\npath = 'log.parquet'\n")
    pl.DataFrame(dict(event_type=["view"]*500, ts=[DAY]*500, visitor_id=[f"v{i}" for i in range(500)],
        item_id=["a"]*500)).write_parquet(tmp_path/"log.parquet")
    whole = (tmp_path/"log.parquet").read_bytes()
    for n in (1, 4, 100, len(whole)//2, len(whole) - 1):
        (tmp_path/"log.parquet").write_bytes(whole[:n])
        line = refused(tmp_path)
        assert line.startswith("log.parquet: not readable as parquet (") and line.endswith("it may be cut short"), line
    page = bytearray(whole); page[10:200] = bytes(190)
    (tmp_path/"log.parquet").write_bytes(page)
    assert "log.parquet: not readable as parquet (" in refused(tmp_path)

@pytest.mark.parametrize("format, content", [("csv", b"PAR1\xff\xfe\x00\x01\n\xff,\xfe\n"), ("parquet", b"a,b\n1,2\n"),
    ("jsonl", b"a,b\n1,2\n"), ("csv", b"a,b\n1,2,3\n"), ("csv", "a,b\nk\xe4se,1\n".encode("latin-1"))])
def test_not_of_its_format(tmp_path, format, content):
    mapping = f"[events]\npath = 'log'\nformat = '{format}'\ncolumns = {{ts = 'a', visitor_id = 'b', event_type = 'b'}}\n"
    line = refused(shop(tmp_path, content, mapping, "log"))
    assert line.startswith(("log: not readable as", "log: no column"))

def test_unknown_ending(tmp_path):
    assert refused(shop(tmp_path, "x", "[events]\npath = 'log.xlsx'\n",
        "log.xlsx")).startswith("log.xlsx: a format that the ending does not tell — say format =")

@pytest.mark.parametrize("mapping, message", [
    ("[evnets]\npath = 'log.csv'", "shop.toml: unknown section or key 'evnets' — known are: events, items, users, custom_types"),
    ("[items]\npath = 'log.csv'", "shop.toml: no [events] — say where"),
    ("[events]\npath = 'log.csv'\ncolumn = {}", "shop.toml: unknown key 'column' in [events] — known are: path, format, columns"),
    ("[events]\npath = 'log.csv'\ncolumns = {user = 'u'}", "shop.toml: unknown column 'user' in [events] columns — known are: event_id"),
    ("[items]\npath = 'i.csv'\nconstants = {ts = 'u'}\n[events]\npath = 'log.csv'", "shop.toml: unknown column 'ts' in [items] constants"),
    ("[events]\ncolumns = {}", "shop.toml: Object missing required field 'path'"),
    ("[events]\npath = 'log.csv'\nseparator = '; '", "shop.toml: Expected 'str' matching regex"),
    ("[events]\npath = 'log.csv'\nts_unit = 'h'", "shop.toml: Invalid enum value 'h' - at 'events.ts_unit'"),
    ("[events]\npath = 'log.csv'\ntimezone = 'Mars/Base'", "shop.toml: unknown timezone 'Mars/Base' — write it as Europe/Berlin"),
    ("[events]\npath = 'log.csv'\nlike = 'ga5'",
    "shop.toml: unknown preset like = 'ga5' — known are: ga4, google_retail, personalize, metarank, otto"),
    ("[events]\npath = 'log.csv'\nconstants = {quantity = 'two'}",
    "log.csv: constant quantity = 'two' is not a whole number — correct [events] constants"),
    ("events = 3", "shop.toml: events is not a section — write [events]"),
    ("[events", "shop.toml: not TOML ("),
])
def test_bad_mapping(tmp_path, mapping, message): assert refused(shop(tmp_path, mapping=mapping)).startswith(message)

# ---- rows that are wrong

def with_rows(*rows): return HEAD + "".join(ROWS) + "".join(r + "\n" for r in rows)

def test_unknown_event_type(tmp_path):
    account = run(shop(tmp_path, with_rows("x,gaze,2026-03-02,v,i,1")))
    assert account["quarantined"] == 1 and account["quarantine_reasons"] == {"event_type is unknown": 1}
    q = quarantine(tmp_path).row(0, named=True)
    assert (q["source"], q["row"], q["reason"]) == ("log.csv", 21, "event_type is unknown") and json.loads(q["raw"])["event_type"] == "gaze"
    assert run(shop(tmp_path, with_rows("x,gaze,2026-03-02,v,i,1"), "custom_types = ['gaze']\n" + MAPPING))["event_types"] == {"gaze": 1,
        "view": 20}
    assert run(shop(tmp_path, with_rows("x,gaze,2026-03-02,v,i,1"), MAPPING + "event_types = {gaze = 'view'}"))["rows"] == 21

def test_no_event_type_known(tmp_path):
    line = refused(shop(tmp_path, (HEAD + "".join(ROWS)).replace(",view,", ",gaze,")))
    assert line.startswith("log.csv: no event type is known, the first is 'gaze' — name theirs in [events] event_types; ours are:")

def test_every_kind_of_bad_cell(tmp_path):
    rows = {"a,view,2026-03-02,v,i,cheap": "price is not a number: 'cheap'", "b,view,2026-13-40,v,i,1": "ts is not a time: '2026-13-40'",
        "c,view,,v,i,1": "ts is missing", "d,view,2026-03-02,,i,1": "visitor_id is missing", "e,view,2026-03-02,v,,1": "item_id is missing",
        "f,view,2026-03-02,v,i,-1": "price is negative", "g,view,2026-03-02,v,i,inf": "price is infinite",
        "h,view,2026-03-02,v,i,nan": "price is not a number",
        f"j,view,2026-03-02,{'v'*257},i,1": "visitor_id is not 1 to 256 characters long", "k,,2026-03-02,v,i,1": "event_type is missing",
        "l,view,1969-12-31,v,i,1": "ts lies before 1970",
        "m,veiw,2026-03-12,v,i,-1": "event_type is unknown; ts lies in the future; price is negative"}
    account = run(shop(tmp_path, with_rows(*rows)), share=.5)
    assert quarantine(tmp_path)["reason"].to_list() == list(rows.values())
    assert account["quarantined"] == len(rows) == sum(account["quarantine_reasons"].values()) and account["rows"] == 20
    assert account["quarantine_reasons"]["price is not a number"] == 2
    assert json.loads(quarantine(tmp_path)["raw"][0]) == dict(event_id="a", event_type="view", ts="2026-03-02", visitor_id="v", item_id="i",
        price="cheap")

def test_search_needs_no_item(tmp_path): assert run(shop(tmp_path, with_rows("x,search,2026-03-02,v,,")))["event_types"] == {"search": 1,
    "view": 20}

def test_too_many_bad_rows(tmp_path):
    line = refused(shop(tmp_path, with_rows("x,view,2026-03-02,v,i,-1", "y,view,2026-03-02,v,i,free", "z,view,2026-03-02,v,i,gratis")))
    assert line.startswith("shop.toml: 3 of 23 events are bad, more than 5%; the commonest reason (2): price is not a number: 'free' — ")
    assert "max_quarantine_share" in line and not (tmp_path/"out").exists()

def test_no_valid_event(tmp_path):
    shop(tmp_path, HEAD + "a,view,2026-03-02,v,,1\nb,view,2026-03-02,v,,1\n")
    assert refused(tmp_path, share=1).startswith("shop.toml: no valid event — check the times")
    assert refused(shop(tmp_path), moment=DAY).startswith("shop.toml: no valid event before 2026-03-02 00:00 UTC — ")

def test_future_is_quarantined(tmp_path):
    account = run(shop(tmp_path, with_rows("x,view,2026-03-10T01:01:00Z,v,i,1", "y,view,2026-03-10T01:00:00Z,v,i,1")))
    assert account["quarantine_reasons"] == {"ts lies in the future": 1} and account["last_ts"] == "2026-03-10T01:00:00+00:00"

def test_duplicate_ids(tmp_path):
    account = run(shop(tmp_path, with_rows("e3,view,2026-03-02T00:00:00Z,first,i,1", *(r.strip() for r in ROWS[:2]))))
    assert account["duplicates"] == 3 and account["rows"] == 20 and account["rows_read"] == 23
    assert events(tmp_path).filter(pl.col("event_id") == "e3")["visitor_id"].item() == "first"
    assert account["quarantine_reasons"] == {"duplicate event_id": 3} and set(quarantine(tmp_path)["reason"]) == {"duplicate event_id"}

def test_items_and_users(tmp_path):
    shop(tmp_path, mapping=MAPPING + """
[items]
path = "items.jsonl"
columns = {title = "name", attributes = ["size", "tags"]}
[users]
path = "users.csv"
constants = {segment = "all"}
""")
    items = [dict(item_id=i, name=f"Item {i}", size=9, tags=["x"], created_ts="2026-03-01") for i in ("i0", "i1", "i1")] + [dict(item_id=7,
        name="new", size=1, tags=[], created_ts="2026-03-04T00:00:00Z")]
    (tmp_path/"items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    (tmp_path/"users.csv").write_text("user_id,attributes\nv1,\"{\"\"age\"\": 3}\"\nv2,{age\n")
    account = run(tmp_path, moment=datetime(2026, 3, 4), share=.5)
    df = pl.read_parquet(tmp_path/"out"/"items.parquet")
    assert df["item_id"].to_list() == ["i0", "i1", "i2", "i3", "i4"] and df["title"].to_list() == ["Item i0", "Item i1", None, None, None]
    assert json.loads(df["attributes"][0]) == dict(size=9, tags=["x"])
    assert pl.read_parquet(tmp_path/"out"/"users.parquet").select("user_id", "segment").rows() == [("v1", "all")]
    assert account["quarantine_reasons"] == {"items: duplicate item_id": 1, "users: attributes is not JSON": 1}
    assert set(quarantine(tmp_path)["source"]) == {"items.jsonl", "users.csv"}

# ---- moments

def test_nothing_at_or_after_the_moment_is_seen(tmp_path):
    moment = DAY + timedelta(hours=10, minutes=3)
    account = run(shop(tmp_path), moment=moment)
    assert account["moment"] == moment.isoformat() and account["rows"] + account["later"] == 20 and account["later"] == 19
    assert events(tmp_path)["event_id"].to_list() == ["e0"]

def test_received_later_is_not_seen(tmp_path):
    text = "event_id,event_type,ts,received_ts,visitor_id,item_id\n" + "\n".join((
        "a,view,2026-03-02,2026-03-05,v,i", "b,view,2026-03-02,2026-03-02,v,i", "a,view,2026-03-02,2026-03-03,v,again\n"))
    account = run(shop(tmp_path, text), moment=datetime(2026, 3, 3))
    assert events(tmp_path)["event_id"].to_list() == ["b"] and account["later"] == 2 and account["duplicates"] == 0
    run(tmp_path, moment=datetime(2026, 3, 4), out="next")
    assert read_events(tmp_path/"next"/"events", None).collect().filter(pl.col("event_id") == "a")["item_id"].to_list() == ["again"]
    run(tmp_path, moment=datetime(2026, 3, 6))
    assert events(tmp_path, datetime(2026, 3, 4, tzinfo=timezone.utc))["event_id"].to_list() == ["a", "b"]
    assert events(tmp_path, datetime(2026, 3, 3, tzinfo=timezone.utc))["event_id"].to_list() == ["b"]

def test_read_events_of_nowhere(tmp_path):
    with pytest.raises(RecsysError, match="no events here — run: recsys ingest"): read_events(tmp_path, None)

def test_reading_before_everything_is_empty(tmp_path):
    run(shop(tmp_path))
    assert events(tmp_path, datetime(2020, 1, 1)).height == 0

moments = st.integers(0, 5 * 86400).map(lambda s: DAY + timedelta(seconds=s))

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(moments, st.integers(0, 2 * 86400)), min_size=1, max_size=30), moments)
def test_as_of_by_brute_force(tmp_path_factory, rows, before):
    df = conform(pl.DataFrame(dict(event_id=[str(i) for i in range(len(rows))], event_type="view", visitor_id="v", session_id="s",
        item_id="i",
        ts=[t for t, _ in rows], received_ts=[t + timedelta(seconds=d) for t, d in rows])))
    folder = tmp_path_factory.mktemp("e")
    write_events(df, folder)
    seen = read_events(folder, before).collect()["event_id"].to_list()
    assert sorted(seen) == sorted(str(i) for i, (t, d) in enumerate(rows) if t < before and t + timedelta(seconds=d) < before)

# ---- identity

def test_again_gives_the_same_bytes(tmp_path):
    rows = [r.split(",", 1)[1] for r in ROWS + ROWS[:1]]
    def content(out): return {p.relative_to(tmp_path/out).as_posix(): p.read_bytes() for p in (tmp_path/out).rglob("*") if p.is_file()}
    shop(tmp_path, HEAD.split(",", 1)[1] + "".join(rows))
    run(tmp_path, out="a"); run(tmp_path, out="b")
    assert content("a") == content("b") and len(content("a")) == 10
    random.Random(1).shuffle(rows)
    shop(tmp_path, HEAD.split(",", 1)[1] + "".join(rows))
    run(tmp_path, out="b")
    differ = {name for name, c in content("a").items() if content("b")[name] != c}
    assert differ == {"ingest.json"}, "another order of the rows changes the digest of the source, and nothing else"

def test_an_older_moment_leaves_no_later_day(tmp_path):
    run(shop(tmp_path)); run(tmp_path, moment=DAY + timedelta(days=1))
    assert [p.name for p in (tmp_path/"out"/"events").iterdir()] == ["day=2026-03-02"]

def test_derived_ids_do_not_depend_on_row_order(tmp_path):
    rows = [r.split(",", 1)[1] for r in ROWS] + [ROWS[0].split(",", 1)[1]] * 2
    ids = []
    for seed in (0, 1):
        random.Random(seed).shuffle(rows)
        account = run(shop(tmp_path, HEAD.split(",", 1)[1] + "".join(rows)))
        assert account["rows"] == 22 and account["duplicates"] == 0
        ids.append({r["event_id"]: (r["ts"], r["visitor_id"], r["item_id"], r["price"]) for r in events(tmp_path).iter_rows(named=True)})
    assert ids[0] == ids[1] and len(ids[0]) == 22
    alone = run(shop(tmp_path, HEAD.split(",", 1)[1] + rows[-1]))
    assert alone["rows"] == 1 and events(tmp_path)["event_id"].item() in ids[0]

def test_derived_ids_are_the_same_for_every_format(tmp_path):
    row = dict(event_type="view", ts="2026-03-02T10:00:00", visitor_id="7", item_id="i", price=1.5)
    frame = pl.DataFrame([row]).with_columns(pl.col("ts").str.to_datetime(), pl.col("visitor_id").cast(pl.Int64))
    ids = set()
    for name, write in (("a.csv", frame.write_csv), ("a.jsonl", frame.write_ndjson), ("a.parquet", frame.write_parquet)):
        write(tmp_path/name); (tmp_path/"shop.toml").write_text(f"[events]\npath = '{name}'\n")
        run(tmp_path); ids.add(events(tmp_path)["event_id"].item())
    assert len(ids) == 1

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r"), min_size=1, max_size=256)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=8, unique_by=lambda t: t[0]), st.sampled_from(["csv", "jsonl", "parquet"]))
def test_any_ids_come_back(tmp_path_factory, pairs, format):
    folder = tmp_path_factory.mktemp("ids")
    df = pl.DataFrame(dict(event_id=[a for a, _ in pairs], event_type="view", ts="2026-03-02T10:00:00Z", visitor_id=[b for _, b in pairs],
        item_id=[f"日本/{b}"[:256] for _, b in pairs]))
    dict(csv=lambda p: df.write_csv(p, quote_style="always"), jsonl=df.write_ndjson,
        parquet=df.write_parquet)[format](folder/f"log.{format}")
    (folder/"shop.toml").write_text(f"[events]\npath = 'log.{format}'\n")
    run(folder)
    back = events(folder).select("event_id", "visitor_id", "item_id").sort("event_id")
    assert back.equals(df.select("event_id", "visitor_id", "item_id").sort("event_id"))

def test_whole_numbers_are_ids(tmp_path):
    shop(tmp_path, mapping="[events]\npath = 'log.parquet'\n")
    pl.DataFrame(dict(event_type=["view"], ts=[DAY], visitor_id=[2**62 + 1], item_id=[7])).write_parquet(tmp_path/"log.parquet")
    run(tmp_path)
    assert events(tmp_path).select("visitor_id", "item_id").row(0) == (str(2**62 + 1), "7")

def test_source_digest_sees_every_file(tmp_path):
    shop(tmp_path, mapping="[events]\npath = 'log*.csv'\n")
    a = source_digest("shop.toml", tmp_path)
    assert a == source_digest("shop.toml", tmp_path)
    (tmp_path/"log2.csv").write_text(HEAD + ROWS[0].replace("e0", "z"))
    b = source_digest("shop.toml", tmp_path)
    (tmp_path/"shop.toml").write_text("[events]\npath = 'log*.csv'\ntimezone = 'Europe/Berlin'\n")
    assert len({a, b, source_digest("shop.toml", tmp_path)}) == 3
    assert run(tmp_path)["rows"] == 21

# ---- sessions

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 300)), min_size=1, max_size=40), st.integers(1, 60))
def test_sessions_by_brute_force(rows, gap):
    df = conform(pl.DataFrame(dict(event_id=[str(i) for i in range(len(rows))], event_type="view", item_id="i",
        visitor_id=[v for v, _ in rows], ts=[DAY + timedelta(minutes=m) for _, m in rows])))
    got = dict(zip(df["event_id"], sessionize(df, gap)["session_id"]))
    expected, last, number = {}, {}, {}
    for i in sorted(range(len(rows)), key=lambda i: rows[i][1]):
        v, m = rows[i]
        if v not in last or m - last[v] > gap: number[v] = number.get(v, 0) + 1
        last[v] = m; expected[str(i)] = (v, number[v])
    assert len(set(got.values())) == len(set(expected.values())) == len({(got[i], expected[i]) for i in got})

def test_given_sessions_stay():
    df = conform(pl.DataFrame(dict(event_id=["a", "b"], event_type="view", item_id="i", visitor_id="v", session_id=["mine", None],
        ts=[DAY, DAY])))
    assert sessionize(df, 30)["session_id"][0] == "mine" and sessionize(df, 30)["session_id"].null_count() == 0

# ---- times

@pytest.mark.parametrize("keys, cell, expected", [
    ("", "2026-03-02 10:00", "2026-03-02T10:00:00"), ("timezone = 'Europe/Berlin'", "2026-03-02T10:00:00.5", "2026-03-02T09:00:00.500000"),
    ("timezone = 'Europe/Berlin'", "2026-03-02T10:00:00+05:30", "2026-03-02T04:30:00"),
    ("ts_unit = 's'", "1772445600.25", "2026-03-02T10:00:00.250000"),
    ("ts_unit = 'ms'", "1772445600250", "2026-03-02T10:00:00.250000"), ("ts_unit = 'us'", "1772445600000001", "2026-03-02T10:00:00.000001"),
    ("ts_format = '%d.%m.%Y %H:%M'", "2.3.2026 10:00", "2026-03-02T10:00:00"),
    ("ts_format = '%d/%b/%Y:%H:%M:%S %z'", "02/Mar/2026:10:00:00 +0200", "2026-03-02T08:00:00")])
def test_times(tmp_path, keys, cell, expected):
    run(shop(tmp_path, f"event_type,ts,visitor_id,item_id\nview,{cell},v,i\n", MAPPING + keys))
    assert events(tmp_path)["ts"].item() == datetime.fromisoformat(expected).replace(tzinfo=timezone.utc)

def test_wrong_unit_is_noticed(tmp_path):
    line = refused(shop(tmp_path, "event_type,ts,visitor_id,item_id\nview,1772445600000,v,i\nview,1772445600001,v,i\n",
        MAPPING + "ts_unit = 's'"))
    assert "ts" in line and ("lies in the future" in line or "no value is a time" in line)

# ---- other systems' shapes

def test_exploded_rows_show_their_line_in_quarantine(tmp_path):
    line = dict(session=1, events=[dict(aid=1, ts=1772445600000, type="clicks"), dict(aid=2, ts=1772445601000, type="stares")])
    run(shop(tmp_path, json.dumps(line) + "\n", "[events]\npath = 'log.jsonl'\nlike = 'otto'\n", "log.jsonl"), share=.5)
    q = quarantine(tmp_path).row(0, named=True)
    assert q["row"] == 1 and q["reason"] == "event_type is unknown" and json.loads(q["raw"]) == line

def test_bytes_inside_of_records(tmp_path):
    "polars panics where JSON is to hold bytes: a file with such a column is read, and its bad rows are shown."
    rows = pl.DataFrame(dict(event_type=["view", "gaze"], ts=[DAY] * 2, visitor_id="v", item_id="i", kept=[dict(b=b"\xff", n=1)] * 2,
        deep=[[[b"ok"]], None], few=pl.Series([[b"a"], [b"b"]], dtype=pl.Array(pl.Binary, 1))))
    rows.write_parquet(tmp_path/"log.parquet")
    (tmp_path/"shop.toml").write_text("[events]\npath = 'log.parquet'\ncolumns = {context = ['kept']}\n")
    assert run(tmp_path, share=.5)["quarantine_reasons"] == {"event_type is unknown": 1}
    assert json.loads(events(tmp_path)["context"][0]) == {"kept": {"b": "ff", "n": 1}}
    raw = json.loads(quarantine(tmp_path)["raw"][0])
    assert (raw["kept"], raw["deep"], raw["few"]) == ({"b": "ff", "n": 1}, None, ["62"])

# ---- The Complete Journey

def test_weeks_are_contiguous():
    weeks = week_calendar(raw_table("transactions"))
    assert weeks["week"].to_list() == list(range(1, 54)) and (weeks["to_ts"][:-1] == weeks["from_ts"][1:]).all()
    t = raw_table("transactions").select("week",
        ts=pl.col("transaction_timestamp").cast(pl.Datetime("us")).dt.replace_time_zone("UTC")).collect().join(weeks, on="week")
    assert t.select(((pl.col("ts") >= pl.col("from_ts")) & (pl.col("ts") < pl.col("to_ts"))).all()).item()

def test_promotion_shares_against_brute_force():
    weeks = week_calendar(raw_table("transactions")).filter(pl.col("week") == 2)
    raw = raw_table("promotions").filter(pl.col("week") == 2).collect()
    shares = promotion_shares(raw.lazy(), weeks)
    shops, picked = raw["store_id"].n_unique(), raw["product_id"].unique().sort().gather_every(1500)
    for p in [32483, *picked]: # 32483 stands on two displays of one shop
        rows = raw.filter(pl.col("product_id") == p)
        got = shares.filter(pl.col("item_id") == str(p)).row(0, named=True)
        assert got["display"] == pytest.approx(len({s for s, d in rows.select("store_id", "display_location").iter_rows()
            if d != "0"}) / shops)
        assert got["mailer"] == pytest.approx(len({s for s, m in rows.select("store_id", "mailer_location").iter_rows()
            if m != "0"}) / shops)

def test_coupons_hold_for_their_campaign():
    c = coupon_periods(raw_table("coupons"), raw_table("campaign_descriptions"))
    assert (c["from_ts"] < c["to_ts"]).all() and c.is_unique().all() and c.select(pl.struct("from_ts", "to_ts").n_unique()).item() <= 27

def test_journey_in_a_small_folder(tmp_path, monkeypatch):
    "The whole ingest over some households and products, at a moment in mid-year."
    some = pl.col("household_id") <= 60
    t = raw_table("transactions").filter(some).collect()
    small = dict(transactions=t, promotions=raw_table("promotions").filter(pl.col("week").is_between(20, 30),
        pl.col("product_id") < 850_000).collect())
    for n in ("products", "demographics", "coupons", "campaigns", "campaign_descriptions",
        "coupon_redemptions"): small[n] = raw_table(n).collect()
    (tmp_path/"data").mkdir()
    for n, df in small.items(): df.write_parquet(tmp_path/"data"/f"{n}.parquet")
    monkeypatch.setattr("recsys.data.datasets.journey_folder", lambda: tmp_path/"data")
    moment = datetime(2017, 6, 15, tzinfo=timezone.utc)
    account = ingest("complete_journey", tmp_path/"out", moment, NOW, 30, 60, .05, tmp_path)
    ts = t["transaction_timestamp"].dt.replace_time_zone("UTC")
    assert account["rows"] == ((ts < moment) & (t["quantity"] > 0)).sum()
    assert account["rows"] + account["later"] + account["quarantined"] == t.height
    assert account["quarantined"] == (t["quantity"] < 1).sum() and list(account["quarantine_reasons"]) == ["quantity is less than 1"]
    promotions, coupons = (pl.read_parquet(tmp_path/"out"/f"{n}.parquet") for n in ("promotions", "coupons"))
    assert promotions["from_ts"].max() <= moment < promotions["to_ts"].max() and 0 < promotions["display"].max() <= 1
    assert coupons["from_ts"].max() <= moment and coupons.height > 1000
    assert account["items"] >= small["products"].height and account["users"] == small["demographics"].height
    e = events(tmp_path)
    assert e["session_id"].equals(e["order_id"]) and e["visitor_id"].equals(e["user_id"])
    assert set(json.loads(e["context"][0])) == {"store_id", "retail_disc", "coupon_disc", "coupon_match_disc"}
    assert (e["price"] * e["quantity"]).sum() == pytest.approx(t.filter(pl.col("quantity") > 0, ts < moment)["sales_value"].sum())
