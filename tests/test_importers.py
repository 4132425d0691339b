"Importers: every layout, any size, and the real files of other shops where they are at hand."
import gzip, json, os, re, zipfile
from datetime import datetime, timezone
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings, strategies as st
from shop import make_shop, recsys

from recsys.core.settings import RecsysError
from recsys.data.events import Item, conform, validate, validate_events
from recsys.data.importers import Table, open_mapping, rows_of
from recsys.data.kernels import Seen, csv_cells, json_depth, row_hashes, row_ids
from recsys.data.outcomes import outcomes
from recsys.data.presets import PRESETS, guess
from recsys.data.streams import Limits

NOW = datetime(2026, 3, 10, tzinfo=timezone.utc)
SHARED = Path(os.environ.get("SHARED_DATA") or Path(__file__).parents[2]/"shared"/"data")

def source(folder: Path, mapping: str):
    (folder/"shop.toml").write_text(mapping)
    return open_mapping(folder/"shop.toml")

def events(folder: Path, mapping: str) -> pl.DataFrame: return rows_of(source(folder, mapping).events)

def refused(folder: Path, mapping: str) -> str:
    with pytest.raises(RecsysError) as e: events(folder, mapping)
    assert "\n" not in str(e.value)
    return str(e.value)

# ---- other systems' shapes: a row of each

T = 1772445600 # 2026-03-02T10:00:00Z
TS = datetime(2026, 3, 2, 10, tzinfo=timezone.utc)
U = {f"user_feature_{i}": f"f{i}" for i in range(4)}
SHAPES = dict(
    ga4=dict(event_timestamp=T * 10**6, event_name="view_item", user_pseudo_id="c.1", user_id=None,
        items=[dict(item_id="i", price=2.5, quantity=1, item_list_name="home")], ecommerce=dict(transaction_id=None)),
    google_retail=dict(eventType="detail-page-view", visitorId="c.1", eventTime="2026-03-02T10:00:00Z",
        productDetails=[dict(product=dict(id="i"), quantity=1)], attributionToken="t"),
    personalize=dict(USER_ID="c.1", ITEM_ID="i", TIMESTAMP=T, EVENT_TYPE="View"),
    metarank=dict(event="interaction", id="81f46c34", timestamp=f"{T}000", user="c.1", session="s", type="view", item="i"),
    otto=dict(session="c.1", events=[dict(aid="i", ts=T * 1000, type="clicks")]),
    retailrocket=dict(timestamp=T * 1000, visitorid="c.1", event="view", itemid="i", transactionid=None),
    rees46=dict(event_time="2026-03-02 10:00:00 UTC", event_type="view", product_id="i", category_id="9", category_code="a.b", brand="b",
        price="2.5", user_id="c.1", user_session="s"),
    hm=dict(t_dat="2026-03-02", customer_id="c.1", article_id="i", price="0.05", sales_channel_id="2"),
    online_retail=dict(InvoiceNo="1", StockCode="i", Description="d", Quantity=1, InvoiceDate="2026-03-02 10:00:00", UnitPrice=2.5,
        CustomerID="c.1", Country="UK"),
    eshop_2008={"year": 2026, "month": 3, "day": 2, "order": 1, "country": 29, "session ID": "c.1", "page 1 (main category)": 1,
        "page 2 (clothing model)": "i", "colour": 1, "location": 5, "model photography": 1, "price": 28, "price 2": 2, "page": 1},
    serenade=dict(SessionId="c.1", ItemId="i", Time=f"{T}.0"),
    sessions=dict(session="c.1", items=["i"]),
    sequences=dict(user="c.1", items=["i"]),
    open_bandit=dict(timestamp="2026-03-02T10:00:00Z", item_id="i", position=1, click=0, propensity_score=.1, **U))
EXPECTED = dict(otto=("click", TS), hm=("purchase", TS.replace(hour=0)), online_retail=("purchase", TS), eshop_2008=("view",
    TS.replace(hour=0, second=1)),
    sessions=("view", datetime(2000, 1, 1, tzinfo=timezone.utc)), sequences=("purchase", datetime(2000, 1, 1, tzinfo=timezone.utc)),
    open_bandit=("impression", TS))

@pytest.mark.parametrize("like", PRESETS)
def test_presets(tmp_path, like):
    other = dict(ga4=dict(SHAPES["ga4"], event_name="scroll"), google_retail=dict(SHAPES["google_retail"], eventType="home-page-view"),
        metarank=dict(event="user", id="x", timestamp=f"{T}000", user="c.1", fields=[dict(name="age", value=5)]))
    lines = [SHAPES[like]] + [o for name, o in other.items() if name == like]
    (tmp_path/"log.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    df = events(tmp_path, f"[events]\npath = 'log.jsonl'\nformat = 'jsonl'\nlike = '{like}'\n")
    row = df.row(0, named=True)
    assert df.height == 1 and row["problem"] is None
    assert (row["event_type"], row["ts"]) == EXPECTED.get(like, ("view", TS)) and row["item_id"] == "i"
    assert row["visitor_id"] == ("f0-f1-f2-f3" if like == "open_bandit" else "c.1")
    good, bad = validate_events(df, NOW, 60)
    assert good.height == 1, bad["reason"].to_list()

@pytest.mark.parametrize("like", [l for l in PRESETS if l not in ("ga4", "google_retail", "otto")])
def test_guess(like): assert guess(list(SHAPES[like])) == like

def test_retailrocket_properties_and_tree(tmp_path):
    (tmp_path/"events.csv").write_text("timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n"
        "1433222276276,599528,transaction,356475,4000\n1433193500981,121688,addtocart,355908,\n")
    (tmp_path/"item_properties.csv").write_text("timestamp,itemid,property,value\n1435460400000,355908,categoryid,1338\n"
        "1433041200000,355908,categoryid,7\n1435460400000,355908,available,1\n1436670000000,355908,available,0\n"
        "1435460400000,355908,888,1116713\n1435460400000,356475,available,1\n")
    (tmp_path/"tree.csv").write_text("categoryid,parentid\n1338,213\n213,\n7,1338\n")
    s = source(tmp_path, "[events]\npath = 'events.csv'\nlike = 'retailrocket'\n[items]\npath = 'item_*.csv'\nlike = 'retailrocket'\n"
        "tree = {path = 'tree.csv'}\n")
    assert rows_of(s.events).select("event_type", "order_id").rows() == [("view", None), ("purchase", "4000"), ("add_to_cart", None)]
    assert rows_of(s.items).select("item_id", "category", "stock").rows() == [("355908", "213 > 1338", 0), ("356475", None, 1)]
    assert set(s.files) == {"shop.toml", "events.csv", "item_properties.csv", "tree.csv"}

def test_hm_items_and_users(tmp_path):
    (tmp_path/"t.csv").write_text("t_dat,customer_id,article_id,price,sales_channel_id\n2018-09-20,abc,0663713001,0.0508,2\n"
        "2018-09-20,abc,0541518023,0.0305,2\n")
    (tmp_path/"a.csv").write_text("article_id,prod_name,product_type_name,product_group_name,index_group_name,colour_group_name\n"
        "0663713001,Strap top,Vest top,Garment Upper body,Ladieswear,Black\n")
    (tmp_path/"c.csv").write_text("customer_id,FN,Active,club_member_status,fashion_news_frequency,age,postal_code\n"
        "abc,,,ACTIVE,NONE,49,52\n")
    s = source(tmp_path, "".join(f"[{k}]\npath = '{p}.csv'\nlike = 'hm'\n" for k, p in (("events", "t"), ("items", "a"), ("users", "c"))))
    assert rows_of(s.events)["session_id"].unique().to_list() == ["abc/2018-09-20"]
    assert rows_of(s.items).select("item_id", "category").row(0) == ("0663713001", "Ladieswear > Garment Upper body > Vest top")
    assert json.loads(rows_of(s.users)["attributes"][0])["age"] == "49" and rows_of(s.users)["segment"][0] == "ACTIVE"

def test_second_spelling_of_online_retail(tmp_path):
    (tmp_path/"a.csv").write_text("Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country\n"
        "489434,85048,15CM BALL,12,2009-12-01 07:45:00,6.95,13085.0,UK\nC489449,22087,BUNTING,-12,2009-12-01 10:33:00,2.95,,AU\n")
    rows = events(tmp_path, "[events]\npath = 'a.csv'\nlike = 'online_retail'\n")
    assert rows.select("event_type", "quantity", "visitor_id", "flag").rows() == [("purchase", 12, "13085.0", None),
        ("return", 12, "guest:C489449", None)]

# ---- the mapping language

BASE = "event_type,ts,visitor_id,item_id,quantity,price,order,mail\n"

def lines(*rows: str) -> str: return BASE + "".join(r + "\n" for r in rows)

def test_rules_flags_and_returns(tmp_path):
    (tmp_path/"a.csv").write_text(lines("buy,2026-03-02,v,tea,2,1.5,1,", "buy,2026-03-02,v,tea,-2,1.5,C1,",
        "buy,2026-03-02,,tea,1,,2,x@shop.test",
        "buy,2026-03-02,v,tea,-1,1,3,", "buy,2026-03-02,v,tea,0,1,,"))
    df = events(tmp_path, """[events]\npath = 'a.csv'\ncolumns = {order_id = "order", \
visitor_id = ["visitor_id", "guest:{order}", "row {row} of {file}"]}
event_rules = {return = [{order = "~ ^C"}, {quantity = "< 0"}], purchase = {order = "!~ ^C", quantity = ">= 0"}}
flags = {"test order" = {mail = '~ @shop\\.test$'}, "no price" = {price = "missing"}, \
tea = {item_id = ["tea", "pot"], quantity = "> 1"}}\n""")
    assert df["event_type"].to_list() == ["purchase", "return", "purchase", "return", "purchase"]
    assert df["quantity"].to_list() == [2, 2, 1, 1, 0] and df["visitor_id"].to_list() == ["v", "v", "guest:2", "v", "v"]
    assert df["flag"].to_list() == ["tea", None, "test order, no price", None, None]

def test_remarks_change_nothing_and_are_counted(tmp_path):
    from recsys.data.ingest import ingest
    (tmp_path/"log.csv").write_text("event_type,ts,visitor_id,item_id,kind\n" + "".join(f"view,2026-03-0{1 + i},v,i,{k}\n" for i, k in enumerate("aabx")))
    text = "[events]\npath = 'log.csv'\n"
    said = []
    for more in ("", "remarks = {'a, or so' = {kind = 'a'}, 'a or b' = {kind = ['a', 'b']}, none = {kind = 'z'}}\n"):
        (tmp_path/"shop.toml").write_text(text + more)
        said.append(ingest("shop.toml", tmp_path/f"out{len(said)}", None, NOW, 30, 60, .05, tmp_path))
    assert [s["remarks"] for s in said] == [{}, {"a or b": 3, "a, or so": 2}]
    assert pl.read_parquet(tmp_path/"out0/events/*/*.parquet").equals(pl.read_parquet(tmp_path/"out1/events/*/*.parquet"))

def test_a_row_of_two_types(tmp_path):
    (tmp_path/"a.csv").write_text("event_id,ts,visitor_id,item_id,click\na,2026-03-02,v,i,0\nb,2026-03-02,v,i,1\nc,2026-03-02,v,i,x\n")
    df = events(tmp_path, "[events]\npath = 'a.csv'\nevent_rules = {impression = {}, click = {click = '= 1'}}\n")
    assert df.select("event_id", "event_type").rows() == [("a", "impression"), ("b", "impression"), ("b:click", "click"), ("c",
        "impression")]
    df = events(tmp_path, "[events]\npath = 'a.csv'\nevent_rules = {click = {click = '1'}}\n")
    assert df["event_type"].to_list() == [None, "click", None], "a row that is of no type is kept, for the quarantine"

def test_where_leaves_out(tmp_path):
    (tmp_path/"a.csv").write_text(lines(*(f"view,2026-03-02,v,i{i},{i},1,{i % 2},m" for i in range(6))))
    for where, want in (("{order = '1'}", [1, 3, 5]), ("{quantity = '> 3'}", [4, 5]), ("[{quantity = '< 1'}, {quantity = '>= 5'}]", [0, 5]),
            ("{order = ['0', '2'], item_id = '!~ 4'}", [0, 2]), ("{price = 'present', order = '= 1.0'}", [1, 3, 5])):
        df = events(tmp_path, f"[events]\npath = 'a.csv'\nwhere = {where}\n")
        assert df["quantity"].to_list() == want and df["row"].to_list() == [w + 1 for w in want]

def test_made_up_times(tmp_path):
    pl.DataFrame(dict(user=[1, 2], items=[[5, 6, 5], [7]])).write_parquet(tmp_path/"a.parquet")
    df = events(tmp_path, "[events]\npath = 'a.parquet'\nexplode = 'items'\ncolumns = {visitor_id = 'user', item_id = 'items'}\n"
        "constants = {event_type = 'view'}\nclock = {start = '2026-03-02T10:00:00Z', per_row = 100, per_step = 0.5}\n")
    assert [(t - TS).total_seconds() for t in df["ts"]] == [0, .5, 1, 100] and df["item_id"].to_list() == ["5", "6", "5", "7"]
    assert df["row"].to_list() == [1, 1, 1, 2] and df["event_id"].n_unique() == 4

def test_made_up_times_that_end_together(tmp_path):
    pl.DataFrame(dict(user=[1, 2, 3, 4], items=[[5, 6, 5], [7], [], None])).write_parquet(tmp_path/"a.parquet")
    df = events(tmp_path, "[events]\npath = 'a.parquet'\nlike = 'sequences'\nclock = {start = '2026-03-02T10:00:00Z', per_step = 60, ends = true}\n").filter(pl.col("item_id").is_not_null())
    assert [(t - TS).total_seconds() for t in df["ts"]] == [-120, -60, 0, 0] and df["item_id"].to_list() == ["5", "6", "5", "7"]

def test_whole_decimals_are_ids(tmp_path):
    pl.DataFrame(dict(event_type="view", ts=TS, item_id="i", visitor_id=[17850.0, None, 1.5, 2.0**60])).write_parquet(tmp_path/"a.parquet")
    df = events(tmp_path, "[events]\npath = 'a.parquet'\n")
    assert df["visitor_id"].to_list() == ["17850", None, None, None]
    assert df["problem"].to_list() == [None, None, "visitor_id is not text or a whole number: '1.5'",
        df["problem"][3]] and "1.15292" in df["problem"][3]

@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("A.TSV.GZ", "\t"), ("z.zip", ","),
    ("in/z.zip/a*.csv", ",")])
def test_packings(tmp_path, name, separator):
    text = lines("view,2026-03-02,v,tea,2,1.5,1,", "view,2026-03-02,v,pot,2,1.5,1,").replace(",", separator).encode()
    file = tmp_path/name.split(".zip")[0]
    file.parent.mkdir(exist_ok=True)
    if ".zip" in name:
        with zipfile.ZipFile(f"{file}.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a1.csv", text); z.writestr("readme.md", "x")
    else: file.write_bytes(gzip.compress(text) if name.lower().endswith("gz") else text)
    s = source(tmp_path, f"[events]\npath = '{name}'\n")
    df = rows_of(s.events)
    assert df["item_id"].to_list() == ["tea", "pot"] and df["problem"].null_count() == 2
    assert s.events.raw[df["source"][0]].filter(pl.col("row") == 2).collect()["item_id"].to_list() == ["pot"]

def test_no_member_matches(tmp_path):
    with zipfile.ZipFile(tmp_path/"z.zip", "w") as z: z.writestr("a.md", "x")
    assert "no table in this zip file" in refused(tmp_path, "[events]\npath = 'z.zip'\n")
    assert "no member matches 'b*' — it has: a.md" in refused(tmp_path, "[events]\npath = 'z.zip/b*'\n")

prices = st.one_of(st.none(), st.integers(0, 5).map(float))

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4), prices, st.one_of(st.none(), st.sampled_from("xyz"))), min_size=1,
    max_size=30), st.integers(1, 7))
def test_latest_by_brute_force(tmp_path_factory, rows, size):
    folder = tmp_path_factory.mktemp("latest")
    pl.DataFrame(rows, schema=dict(id=pl.String, t=pl.Int64, price=pl.Float64, title=pl.String),
        orient="row").write_parquet(folder/"a.parquet")
    from recsys.data.importers import MappedTable, read_table
    t = MappedTable("a.parquet", columns=dict(item_id="id", price="price", title="title"), latest="t", ts_unit="s")
    got = {r[0]: r[1:] for r in rows_of(read_table(t, "items", folder, limits=Limits(rows=size, probe=False))).select("item_id", "price",
        "title").iter_rows()}
    want = {}
    for id in {r[0] for r in rows}:
        newest = lambda k: next((r[k] for _, r in sorted(enumerate(rows),
            key=lambda e: (-e[1][1], -e[0])) if r[0] == id and r[k] is not None), None)
        want[id] = (newest(2), newest(3))
    assert got == want

def test_unless_empties_a_column(tmp_path):
    (tmp_path/"log.csv").write_text("event_type,ts,visitor_id,item_id,price\nview,2026-03-02,v,i,unknown\nview,2026-03-02,v,none,2\nview,2026-03-02,v,k,free\n")
    df = events(tmp_path, "[events]\npath = 'log.csv'\nunless = {price = {price = 'unknown'}, item_id = [{item_id = 'none'}, {price = '> 9'}]}\n")
    assert df["item_id"].to_list() == ["i", None, "k"] and df["price"].to_list() == [None, 2, None]
    assert df["problem"].to_list() == [None, None, "price is not a number: 'free'"]
    for keys, message in (("unless = {prise = {price = 'x'}}", "column 'prise' in [events] unless"), ("unless = {price = {nothing = 'x'}}", "no column 'nothing'"),
            ("unless = {price = {price = '< much'}}", "is no condition")):
        assert message in refused(tmp_path, "[events]\npath = 'log.csv'\n" + keys)

def test_rankings_of_metarank_are_impressions(tmp_path):
    "Both kinds of events come from one file; a ranking is an impression of each item, and an interaction names its ranking or none."
    common = dict(user="u", session="s")
    lines = [dict(event="item", id="m", timestamp=f"{T}000", item="a", fields=[dict(name="price", value=2.5)]),
        dict(common, event="ranking", id="r1", timestamp=f"{T}000", items=[dict(id="a", relevancy=1.5), dict(id="b"), dict(id="c")]),
        dict(common, event="interaction", id="i1", ranking="r1", timestamp=f"{T + 60}000", type="click", item="b"),
        dict(common, event="interaction", id="i2", timestamp=f"{T + 90}000", type="purchase", item="c"),
        dict(common, event="interaction", id="i3", ranking=None, timestamp=f"{T + 95}000", item="c"),
        dict(common, event="ranking", id="r2", timestamp=f"{T + 200}000", items=[dict(id=["a"]), dict(id="c")])]
    (tmp_path/"log.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    good, bad = validate_events(events(tmp_path, "[events]\npath = 'log.jsonl'\nlike = 'metarank'\n"), NOW, 60)
    said = good.select("event_id", "event_type", "item_id", "request_id", "position").rows()
    assert said == [("r1/a", "impression", "a", "r1", 1), ("r1/b", "impression", "b", "r1", 2), ("r1/c", "impression", "c", "r1", 3),
        ("i1", "click", "b", "r1", None), ("i2", "purchase", "c", None, None), ("r2/c", "impression", "c", "r2", 2)]
    assert bad["row"].to_list() == [5, 6] and "event_type is unknown" in bad["reason"][0] and "item_id is not text" in bad["reason"][1]
    shown = outcomes(good.lazy(), dict(click=30, purchase=30)).collect().sort("event_id")
    assert shown.select("click", "purchase").rows() == [(0, 0), (1, 0), (0, 1), (0, 0)]

def ga4(**more) -> dict:
    "A row as BigQuery exports it: whole numbers are text, parameters a list."
    params = dict(ga_session_id=dict(int_value="77"), currency=dict(string_value="EUR"), page_title=dict(string_value="Tea")) | more.pop("params", {})
    return SHAPES["ga4"] | dict(event_timestamp=f"{T}000000", event_params=[dict(key=k, value=v) for k, v in params.items()]) | more

def test_parameters_of_ga4(tmp_path):
    "Session and currency lie in a list of keys and values; other keys are reached in the same way."
    lines = [ga4(), ga4(params=dict(currency=dict(string_value="(not set)"), ga_session_id=dict(double_value=1.5))), ga4(event_params=[]),
        ga4(params=dict(depth=dict(double_value=.5)))]
    (tmp_path/"log.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    pl.read_ndjson(tmp_path/"log.jsonl").write_parquet(tmp_path/"log.parquet")
    for name in ("log.jsonl", "log.parquet"):
        df = events(tmp_path, f"[events]\npath = '{name}'\nlike = 'ga4'\ncolumns = {{variant = 'event_params.page_title.string_value'}}\n")
        assert df["session_id"].to_list() == ["c.1/77", None, None, "c.1/77"] and df["currency"].to_list() == ["EUR", None, None, "EUR"]
        assert df["variant"].to_list() == ["Tea", "Tea", None, "Tea"] and df["problem"].null_count() == 4 and df["ts"].to_list() == [TS] * 4
    line = refused(tmp_path, "[events]\npath = 'log.jsonl'\nlike = 'ga4'\ncolumns = {variant = 'event_params.page_title.no_value'}\n")
    assert "event_params.*.string_value" in line

def test_a_parameter_that_is_no_text_is_no_id(tmp_path):
    lines = [ga4(), ga4(params=dict(ga_session_id=dict(int_value=["x"]))), ga4(params=dict(ga_session_id=dict(int_value=78)))]
    (tmp_path/"log.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    good, bad = validate_events(events(tmp_path, "[events]\npath = 'log.jsonl'\nlike = 'ga4'\n"), NOW, 60)
    assert good["session_id"].to_list() == ["c.1/77", "c.1/78"] and bad["row"].to_list() == [2]

def test_not_set_is_nothing(tmp_path):
    no, item = "(not set)", SHAPES["ga4"]["items"][0]
    lines = [ga4(user_id=no, ecommerce=dict(transaction_id=no), items=[dict(item, item_list_name=no)]), ga4(ecommerce=dict(transaction_id="o1")),
        ga4(items=[dict(item, item_id=no), dict(item, item_id="(other)"), dict(item, item_id="j")])]
    (tmp_path/"log.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    good, bad = validate_events(events(tmp_path, "[events]\npath = 'log.jsonl'\nlike = 'ga4'\n"), NOW, 60)
    assert good.select("item_id", "order_id", "user_id", "placement").rows() == [("i", None, None, None), ("i", "o1", None, "home"), ("j", None, None, "home")]
    assert bad["row"].to_list() == [3, 3] and all("item_id" in r for r in bad["reason"])

# ---- cells that polars makes text of

PLACES = dict(
    exploded=("explode = 'items'\ncolumns = {item_id = 'items.item_id'}", lambda i: dict(items=[dict(item_id=i)])),
    deep=("explode = 'items'\ncolumns = {item_id = 'items.product.id'}", lambda i: dict(items=[dict(product=dict(id=i, n=1))])),
    bare=("explode = 'items'\ncolumns = {item_id = 'items'}", lambda i: dict(items=[i])),
    record=("columns = {item_id = 'item.id'}", lambda i: dict(item=dict(id=i))),
    template=("columns = {item_id = '{item.id}'}", lambda i: dict(item=dict(id=i))),
    top=("columns = {item_id = 'id'}", lambda i: dict(id=i)))

def sorted_out(folder: Path, mapping: str, lines: list[dict]) -> tuple[pl.DataFrame, pl.DataFrame]:
    (folder/"log.jsonl").write_text("".join(json.dumps(dict(event_type="view", ts="2026-03-02", visitor_id="v") | l) + "\n" for l in lines))
    return validate_events(events(folder, "[events]\npath = 'log.jsonl'\n" + mapping), NOW, 60, ())

@pytest.mark.parametrize("odd", [["x"], [["x"]], [], {"k": 1}, {}, True, 5.5, 1e20, 10**30])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_text_is_no_id(tmp_path, place, odd):
    mapping, line = PLACES[place]
    good, bad = sorted_out(tmp_path, mapping, [line(i) for i in ("a", odd, "[1]", "true", 7, "5.5", None)])
    assert good["item_id"].to_list() == ["a", "[1]", "true", "7", "5.5"] and bad["row"].to_list() == [2, 7], (good["item_id"], bad)
    assert bad["reason"][0].startswith("item_id is not text or a whole number"), bad["reason"][0]

@pytest.mark.parametrize("odd", ["x", 5, True, [1], ["x"], [[dict(item_id="x")]], dict(item_id="x")])
def test_what_is_no_record_is_no_item(tmp_path, odd):
    "Something else instead of a list of records: the file is refused in one line, or the row is set aside."
    try: good, bad = sorted_out(tmp_path, PLACES["exploded"][0], [dict(items=i) for i in ([dict(item_id="a")], odd, [dict(item_id="b")])])
    except RecsysError as e: assert "\n" not in str(e) and "log.jsonl" in str(e)
    else: assert good["item_id"].to_list() == ["a", "b"] and bad["row"].to_list() == [2], (good["item_id"], bad)

def test_a_line_cannot_say_that_it_is_not_odd(tmp_path):
    for own in ([], ["elsewhere"], "no", {"a": 1}, [5]):
        good, bad = sorted_out(tmp_path, PLACES["top"][0], [dict(id="a"), {"id": ["x"], "_odd": own}])
        assert good["item_id"].to_list() == ["a"] and bad["row"].to_list() == [2], own
        assert sorted_out(tmp_path, PLACES["top"][0], [dict(id="a", _odd=own), dict(id="b", _odd=own)])[1].height == 0, own

# ---- batches, ids and memory

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b\nc", 'd"e', "f,g", ""]), cells, st.sampled_from([None, 1.5, -0.0, 0.0])), min_size=1,
    max_size=40),
    st.sampled_from(["csv", "jsonl", "parquet"]), st.integers(1, 9), st.integers(8, 400))
def test_any_batch_size_gives_the_same(tmp_path_factory, rows, format, n, block):
    folder = tmp_path_factory.mktemp("batches")
    df = pl.DataFrame([dict(event_type="view", ts="2026-03-02T10:00:00Z", visitor_id=a, item_id=b, price=c) for a, b, c in rows],
        schema_overrides=dict(price=pl.Float64))
    dict(csv=lambda p: df.write_csv(p, quote_style="always"), jsonl=df.write_ndjson, parquet=df.write_parquet)[format](folder/f"a.{format}")
    from recsys.data.importers import MappedTable, read_table
    read = lambda limits: list(read_table(MappedTable(f"a.{format}"), "events", folder, limits=limits).batches())
    whole, parts = read(Limits(probe=False)), read(Limits(rows=n, block=block, probe=False))
    assert pl.concat(parts).equals(pl.concat(whole)) and len(whole) == 1
    ids = pl.concat(whole)["event_id"]
    assert ids.n_unique() == len(rows) and ids.str.len_chars().unique().to_list() == [26]

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.one_of(st.none(), st.integers(0, 2))), max_size=60), st.integers(1, 20))
def test_equal_rows_by_brute_force(rows, size):
    df, seen, met = pl.DataFrame(rows, schema=dict(a=pl.String, b=pl.Int64), orient="row"), Seen(), {}
    got = [n for i in range(0, len(rows), size) for n in seen(row_hashes(df[i:i + size]))]
    for r, n in zip(rows, got):
        assert n == met.get(r, 0)
        met[r] = met.get(r, 0) + 1

def test_too_many_equal_rows():
    h = row_hashes(pl.DataFrame(dict(a=["x"] * 65_537)))
    with pytest.raises(RecsysError, match="more than 65,535 rows are equal"): Seen()(h)

def test_ids_of_this_version_are_those_of_the_first():
    "A log that is imported again must meet its old ids: this one may never change."
    df = conform(pl.DataFrame(dict(event_type=["view"], ts=[TS], visitor_id=["käse"], item_id=["i"], price=[1.5])))
    assert row_ids(df.drop("event_id", "flag"), Seen()).to_list() == ["6ckjxss6pkcq1zb9dm926qwvg1"]

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text(st.sampled_from('ab,"\n\r '), max_size=6), min_size=1, max_size=5), max_size=8))
def test_cells_by_the_csv_module(rows):
    import csv, io
    import numpy as np
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    assert csv_cells(np.frombuffer(out.getvalue().encode(), np.uint8), 44, True).tolist() == [len(r) for r in rows]

json_values = st.recursive(st.one_of(st.none(), st.integers(), st.text(st.sampled_from('[]{}"\\a'))), lambda x: st.lists(x,
    max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3))

@settings(max_examples=80, deadline=None)
@given(st.lists(json_values, max_size=4))
def test_depth_by_recursion(values):
    import numpy as np
    def depth(v): return 0 if not isinstance(v, (list, dict)) else 1 + max(map(depth, v.values() if isinstance(v, dict) else v), default=0)
    text = "".join(json.dumps(v) + "\n" for v in values).encode()
    assert json_depth(np.frombuffer(text, np.uint8)) == max(map(depth, values), default=0)

def test_memory_does_not_grow_with_the_file(tmp_path):
    "Six times the rows, the same peak."
    import subprocess, sys
    one = pl.select(event_id=pl.format("e-{}", pl.int_range(500_000)), event_type=pl.lit("view"), visitor_id=pl.format("visitor-{}",
        pl.int_range(500_000) % 9999),
        item_id=pl.format("item-{}", pl.int_range(500_000) % 999)).with_columns(ts=pl.lit(TS))
    peaks = []
    for n in (1, 6):
        pl.concat([one.lazy()] * n).sink_parquet(tmp_path/f"{n}.parquet")
        (tmp_path/f"{n}.toml").write_text(f"[events]\npath = '{n}.parquet'\n")
        code = (f"import psutil; from recsys.data.importers import open_mapping; n = peak = 0\n"
            f"for b in open_mapping({str(tmp_path/f'{n}.toml')!r}).events.batches():\n"
            "    n += b.height; peak = max(peak, psutil.Process().memory_info().rss)\n"  # ru_maxrss would begin with that of the tests' own process
            "print(n, peak // 2**20)")
        rows, peak = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
        assert rows == n * 500_000
        peaks.append(peak)
    assert peaks[1] < peaks[0] * 1.3 and peaks[1] < 600, peaks

# ---- the real ones

def shared(folder: str) -> Path:
    if not (SHARED/folder).is_dir(): pytest.skip(f"{folder} is not here: set SHARED_DATA to the folder that holds it")
    return SHARED/folder

def judged(table: Table, latest=NOW) -> tuple[pl.DataFrame, pl.DataFrame]:
    good, bad = zip(*(validate_events(b, latest, 60) for b in table.batches()))
    return pl.concat(good), pl.concat(bad)

def counts(df: pl.DataFrame, *by) -> dict: return dict(df.group_by(*by).len().sort(*by).iter_rows()) if len(by) == 1 else \
    {r[:-1]: r[-1] for r in df.group_by(*by).len().iter_rows()}

def test_online_retail(tmp_path):
    path = shared("online_retail")/"online_retail.parquet"
    sections = "".join(f"[{s}]\npath = '{path}'\nlike = 'online_retail'\n" for s in ("events", "items", "users"))
    s = source(tmp_path, sections)
    good, bad = judged(s.events)
    assert good.height + bad.height == 541_909 and good["event_id"].n_unique() == good.height
    assert counts(bad, "reason") == {"price is negative": 2}
    assert counts(good, "event_type") == {"purchase": 531_283, "return": 10_624}
    c = good["order_id"].str.starts_with("C")
    assert c.sum() == 9_288 and set(good.filter(c)["event_type"]) == {"return"} and good["quantity"].min() == 1
    guests = good["visitor_id"].str.starts_with("guest:")
    assert guests.sum() + bad["visitor_id"].str.starts_with("guest:").sum() == 135_080
    assert good.filter(~guests)["visitor_id"].n_unique() == 4_372
    flags = {f or "": n for f, n in counts(good, "flag").items()}
    assert flags == {"": 536_462, "not a product": 2_970, "stock adjustment": 2_452, "not a product, stock adjustment": 23}
    assert sum(flags.values()) + bad.height == 541_909
    raw = pl.read_parquet(path)
    odd = ~raw["StockCode"].str.contains(r"^\d{5}[A-Za-z]*$")
    stock = (raw["CustomerID"].is_null() & (raw["UnitPrice"] == 0)) | ((raw["Quantity"] < 0) & ~raw["InvoiceNo"].str.starts_with("C"))
    assert ((~odd & ~stock).sum(), (~odd & stock).sum(), (odd & stock).sum(), odd.sum()) == (536_462, 2_452, 23, 2_995)
    items, users = rows_of(s.items), rows_of(s.users)
    assert items["item_id"].is_unique().all() and users.height == 4_372 and set(items["currency"]) == {"GBP"}
    assert good.filter(pl.col("flag").is_null(), pl.col("event_type") == "purchase", pl.col("price") > 0).select(
        pl.col("item_id").is_in(items["item_id"].to_list()).all()).item()

def test_the_page_of_online_retail_says_how_many_and_why(tmp_path):
    path = shared("online_retail")/"online_retail.parquet"
    make_shop(tmp_path)
    (tmp_path/"shop.toml").write_text("".join(f"[{s}]\npath = '{path}'\nlike = 'online_retail'\n" for s in ("events", "items", "users")))
    r = recsys(tmp_path, "ingest")
    assert r.returncode == 0, r.stderr
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", next(tmp_path.glob("reports/runs/*/ingest.html")).read_text()))
    for said in ("135,080 lines without a customer", "9,288 cancellations", "1,336 negative quantities", "2,995 stock codes of postage", "price is negative 2"):
        assert said in page, said

def test_rees46(tmp_path):
    path = shared("rees46_slice")
    s = source(tmp_path, "".join(f"[{k}]\npath = '{path}/*.csv'\nlike = 'rees46'\n" for k in ("events", "items")))
    good, bad = judged(s.events)
    assert counts(good, "event_type") == {"add_to_cart": 165, "purchase": 214, "view": 17_055} and good.height == 17_434
    assert counts(bad, "reason") == {"the row has too few cells": 1} and bad["row"][0] == 17_435 # the slice was cut in the middle of a row
    items = rows_of(s.items).filter(pl.col("problem").is_null())
    assert items["item_id"].is_unique().all() and set(items["item_id"]) == set(good["item_id"])
    assert "appliances > environment > water_heater" in set(items["category"])

def test_retailrocket_sessions(tmp_path):
    path = shared("retailrocket_sessions")/"train_sessions.parquet"
    good, bad = judged(source(tmp_path, f"[events]\npath = '{path}'\nlike = 'sessions'\n").events)
    raw = pl.read_parquet(path)
    assert bad.height == 0 and good.height == raw["items"].list.len().sum() and good["session_id"].n_unique() == 126_168
    back = good.sort("ts", maintain_order=True).group_by("session_id").agg("item_id")
    want = raw.select(session_id=pl.col("session").cast(pl.String), item_id=pl.col("items").cast(pl.List(pl.String)))
    assert back.sort("session_id").equals(want.sort("session_id"))

def test_amazon_beauty(tmp_path):
    path = shared("amazon_beauty")
    s = source(tmp_path, f"[events]\npath = '{path}/beauty_sequences.parquet'\nlike = 'sequences'\n"
        f"[items]\npath = '{path}/beauty_item_attributes.parquet'\nlike = 'sequences'\n")
    good, bad = judged(s.events)
    assert (good.height, bad.height, good["user_id"].n_unique(), good["item_id"].n_unique()) == (198_502, 0, 22_363, 12_101)
    back = good.sort("ts", maintain_order=True).group_by("user_id").agg("item_id").sort("user_id")
    want = pl.read_parquet(path/"beauty_sequences.parquet").select(user_id=pl.col("user").cast(pl.String),
        item_id=pl.col("items").cast(pl.List(pl.String)))
    assert back.equals(want.sort("user_id"))
    items, wrong = validate(rows_of(s.items), Item)
    assert (items.height, wrong.height) == (12_101, 0)
    attributes = pl.read_parquet(path/"beauty_item_attributes.parquet").row(0, named=True)
    assert json.loads(items.filter(pl.col("item_id") == str(attributes["item"]))["attributes"][0]) == {
        "attributes": attributes["attributes"]}

def test_eshop_2008(tmp_path):
    path = shared("eshop_2008")/"eshop_clickstream_2008.parquet"
    s = source(tmp_path, "".join(f"[{k}]\npath = '{path}'\nlike = 'eshop_2008'\n" for k in ("events", "items")))
    good, bad = judged(s.events)
    assert (good.height, bad.height, good["session_id"].n_unique(), good["item_id"].n_unique()) == (165_474, 0, 24_026, 217)
    raw = pl.read_parquet(path).sort("session_id", "order")
    mine = good.with_columns(pl.col("session_id").cast(pl.Int64)).sort("session_id", "ts")
    assert mine["item_id"].equals(raw["item"].alias("item_id"))
    assert (mine["ts"].dt.date() == raw["date"].dt.date()).all() and set(mine["currency"]) == {"USD"}
    assert rows_of(s.items).height == 217

def test_serenade(tmp_path):
    path = shared("serenade")/"serenade_example.zip"
    s = source(tmp_path, f"[events]\npath = '{path}'\nlike = 'serenade'\n")
    good, bad = judged(s.events)
    assert (good.height, bad.height) == (113_601 + 1_233 + 1_451, 0)
    assert sorted(Path(n).name for n in s.events.raw) == ["test.txt", "train.txt", "valid.txt"]
    train = rows_of(source(tmp_path, f"[events]\npath = '{path}/train.txt'\nlike = 'serenade'\n").events)
    assert (train.height, train["session_id"].n_unique(), train["item_id"].n_unique()) == (113_601, 23_753, 18_009)
    assert train.row(0, named=True)["ts"] == datetime.fromtimestamp(1592337718, timezone.utc) and train["visitor_id"][0] == "10036"

@pytest.mark.parametrize("campaign", ["all", "men", "women"])
def test_open_bandit(tmp_path, campaign):
    path = shared("open_bandit")
    s = source(tmp_path, f"[events]\npath = '{path}/obd_[br]*_{campaign}.parquet'\nlike = 'open_bandit'\n"
        f"[items]\npath = '{path}/obd_items_{campaign}.parquet'\nlike = 'open_bandit'\n")
    good, bad = judged(s.events)
    raw = pl.concat(pl.read_parquet(path/f"obd_{p}_{campaign}.parquet", columns=["click", "propensity_score"]) for p in ("bts", "random"))
    assert bad.height == 0 and counts(good, "event_type") == {"click": raw["click"].sum(), "impression": 20_000}
    assert set(good["variant"]) == {f"obd_bts_{campaign}", f"obd_random_{campaign}"} and set(good["position"]) == {1, 2, 3}
    shown, clicked = (good.filter(pl.col("event_type") == t) for t in ("impression", "click"))
    joined = clicked.join(shown, on=["request_id", "item_id", "variant"], how="left")
    assert joined["event_id_right"].null_count() == 0 and joined.height == clicked.height
    assert shown["context"].str.json_path_match("$.propensity_score").cast(pl.Float64).sum() == pytest.approx(raw["propensity_score"].sum())
    assert set(good["item_id"]) <= set(rows_of(s.items)["item_id"])
