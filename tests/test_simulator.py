"The simulator: the same bytes for the same seed, rows that keep the contract, and a log that shows the truth it was made from."
import json, os, resource, subprocess, sys
from datetime import datetime, timedelta, timezone

import msgspec, numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st

from recsys.core.files import file_digest
from recsys.core.settings import RecsysError
from recsys.data import simulator
from recsys.data.events import Event, Item, User, conform, validate, validate_events
from recsys.data.importers import read_mapping, table_files
from recsys.data.simulator import KINDS, Shock, Shop, calibrate, compare_marginals, marginals, simulate, usual_marginals

START = datetime(2024, 1, 1, tzinfo=timezone.utc)
SHOCKS = (Shock(20, "traffic", 2.), Shock(40, "lost", .6, 10, "add_to_cart"), Shock(50, "price", 2., 5),
    Shock(60, "stock out", .3, 7), Shock(70, "taste", .9))

def read(out) -> pl.DataFrame: return pl.read_parquet(out/"events"/"*.parquet")

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A shop without shocks: folder, account, all rows, rows without second copies."
    out = tmp_path_factory.mktemp("sim")/"plain"
    account = simulate(out, 300_000, rows=80_000)
    rows = read(out)
    return out, account, rows, rows.unique("event_id", keep="first", maintain_order=True)

@pytest.fixture(scope="module")
def shocked(tmp_path_factory):
    out = tmp_path_factory.mktemp("sim")/"shocked"
    simulate(out, 300_000, seed=3, shop=Shop(shocks=SHOCKS, drift=.1))
    df = read(out).unique("event_id", keep="first", maintain_order=True)
    bots = pl.read_parquet(out/"truth"/"bots.parquet")["visitor_id"]
    return out, df.filter(~pl.col("visitor_id").is_in(bots.implode())).with_columns(day=((pl.col("ts") - START).dt.total_days()))

# ---- the same bytes

def files(out): return {p.relative_to(out).as_posix(): file_digest(p) for p in sorted(out.rglob("*")) if p.is_file()}

def test_the_same_seed_makes_the_same_bytes_in_another_process_with_other_threads(tmp_path):
    simulate(tmp_path/"a", 20_000, seed=5)
    code = "import sys; from recsys.data.simulator import simulate; simulate(sys.argv[1], 20_000, seed=5)"
    env = {**os.environ, "POLARS_MAX_THREADS": "1", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path/"b")], check=True, env=env)
    assert files(tmp_path/"a") == files(tmp_path/"b")
    simulate(tmp_path/"c", 20_000, seed=6)
    a, c = files(tmp_path/"a"), files(tmp_path/"c")
    assert [f for f in a if f in c and a[f] == c[f]] == ["simulated.toml"]

def test_the_size_of_the_files_does_not_change_the_log(made, tmp_path):
    out, _, rows, _ = made
    simulate(tmp_path/"one", 300_000)
    assert len(list((tmp_path/"one"/"events").iterdir())) == 1 < len(list((out/"events").iterdir()))
    assert read(tmp_path/"one").equals(rows)
    for name in ("items.parquet", "users.parquet"): assert (tmp_path/"one"/name).read_bytes() == (out/name).read_bytes()

def test_files_are_bounded_and_in_order_of_arrival(made):
    out, account, rows, _ = made
    heights = [pl.scan_parquet(p).select(pl.len()).collect().item() for p in sorted((out/"events").iterdir())]
    assert len(heights) == account["files"] > 3 and max(heights) <= 80_000 + simulator._room(Shop())
    assert sum(heights) == account["rows"] == rows.height
    assert rows["received_ts"].is_sorted()

def test_every_file_says_that_it_is_simulated(made):
    out, account, *_ = made
    for p in out.rglob("*.parquet"): assert pl.read_parquet_metadata(p)["simulated"] == "yes"
    assert "simulated" in (out/"simulated.toml").read_text() and json.loads((out/"simulated.json").read_text()) == json.loads(json.dumps(account))
    assert account["simulated"] is True and pl.read_parquet(out/"items.parquet")["title"].str.starts_with("Simulated").all()

# ---- the contract

def test_every_row_keeps_the_contract(made):
    out, account, rows, _ = made
    assert rows.columns == [c for c in Event.columns() if c != "flag"]
    good, bad = validate_events(rows, START + timedelta(days=92), 0, ("return",))
    assert bad.height == 0 and good.height == rows.height
    for name, contract, n in (("items", Item, account["items"]), ("users", User, account["users"])):
        df = pl.read_parquet(out/f"{name}.parquet")
        good, bad = validate(df, contract)
        assert (good.height, bad.height) == (n, 0) and conform(df, contract).schema == df.schema and df.to_series(0).n_unique() == n

def test_ids_refer_to_what_exists(made):
    out, _, _, df = made
    items, users = pl.read_parquet(out/"items.parquet"), pl.read_parquet(out/"users.parquet")
    assert set(df["item_id"].drop_nulls()) <= set(items["item_id"]) and set(df["user_id"].drop_nulls()) <= set(users["user_id"])
    pairs = df.filter(pl.col("user_id").is_not_null()).select("visitor_id", "user_id").unique()
    truth = pl.read_parquet(out/"truth"/"visitors.parquet")
    assert pairs.join(truth, on=["visitor_id", "user_id"], how="anti").height == 0 and truth["visitor_id"].n_unique() == truth.height

def test_the_mapping_is_read_by_the_ingest(made):
    out = made[0]
    m = read_mapping(out/"simulated.toml")
    for table in (m.events, m.items, m.users): assert table_files(table, out)

def test_number_of_events_is_near_what_was_asked(made):
    _, account, rows, df = made
    assert abs(account["rows"] / 300_000 - 1) < .05 and account["events"] == df.height
    assert {k: v for k, v in account["by_type"].items()} == {k: (df["event_type"] == k).sum() for k in KINDS}

@settings(max_examples=8)
@given(seed=st.integers(0, 2**31 - 1), days=st.integers(1, 40), users=st.none() | st.integers(1, 300), items=st.none() | st.integers(1, 300),
       rows=st.sampled_from([500, 100_000]), late=st.floats(0, .5), lists=st.sampled_from([0., .3, 1.]))
def test_any_shop_keeps_the_contract(tmp_path_factory, seed, days, users, items, rows, late, lists):
    out = tmp_path_factory.mktemp("any")/"shop"
    simulate(out, 5000, seed, users, items, days, shop=Shop(late=late, impression_share=lists, bots=0.), rows=rows)
    df = read(out)
    assert validate_events(df, START + timedelta(days=days + 3), 0, ("return",))[1].height == 0
    assert (df["received_ts"] > df["ts"]).all() and df["ts"].min() >= START

# ---- the log shows the truth

def near(share, n, want, sigmas=5): return abs(share - want) < sigmas * (want * (1 - want) / n)**.5 + 1e-9

def test_shares_are_what_was_asked(made):
    out, account, rows, df = made
    shop = Shop()
    assert near(account["duplicates"] / df.height, df.height, shop.duplicates)
    assert near(((df["received_ts"] - df["ts"]) > timedelta(seconds=30)).mean(), df.height, shop.late)
    bots = df["visitor_id"].is_in(pl.read_parquet(out/"truth"/"bots.parquet")["visitor_id"].implode())
    assert abs(bots.mean() - shop.bots) < .004
    assert abs((df.filter(~bots)["event_type"] == "impression").mean() - shop.impression_share) < .04
    sessions = df.filter(pl.col("session_id").is_not_null())
    assert .8 < sessions.height / df.height < .95
    assert 0 < df["order_id"].str.starts_with("TEST-").sum() < .01 * (df["event_type"] == "purchase").sum()
    assert near(df.unique("visitor_id")["consent"].mean(), df["visitor_id"].n_unique(), shop.consent)

def test_a_second_copy_is_the_event_again_but_later(made):
    _, _, rows, df = made
    twice = rows.filter(pl.col("event_id").is_duplicated()).sort("event_id", "received_ts")
    a, b = twice.gather_every(2), twice.gather_every(2, 1)
    assert a.drop("received_ts").equals(b.drop("received_ts")) and (b["received_ts"] > a["received_ts"]).all()

def test_the_funnel_narrows_and_its_ids_agree(made):
    df = made[3]
    count = dict(df.group_by("event_type").len().iter_rows())
    assert count["impression"] > count["click"] > 0 and count["view"] > count["add_to_cart"] > count["purchase"] > count["return"] > 0
    lists = df.filter(event_type="impression").select("request_id", "item_id", "position", "placement")
    for kind in ("click", "purchase"):
        found = df.filter(pl.col("event_type") == kind, pl.col("request_id").is_not_null())
        assert found.height and found.join(lists, on=lists.columns, how="anti").height == 0
    carts = df.filter(event_type="add_to_cart").group_by("visitor_id", "item_id").agg(pl.col("ts").min().alias("cart_ts"))
    bought = df.filter(event_type="purchase").join(carts, on=["visitor_id", "item_id"], how="left")
    assert (bought["cart_ts"] < bought["ts"]).all() and bought["order_id"].null_count() == 0
    assert df.filter(event_type="purchase").select("order_id", "item_id").is_duplicated().sum() == 0

def test_returns_are_of_what_was_bought(made):
    df = made[3]
    bought = df.filter(event_type="purchase").select("order_id", "item_id", "price", "quantity", "visitor_id", bought="ts")
    back = df.filter(event_type="return")
    both = back.join(bought, on=["order_id", "item_id", "price", "quantity", "visitor_id"])
    assert both.height == back.height > 50 and (both["ts"] - both["bought"] >= timedelta(days=1)).all()

def test_click_through_falls_with_the_position_as_the_truth_says(made):
    out, _, _, df = made
    seen = pl.read_parquet(out/"truth"/"positions.parquet").filter(placement="home")["seen"].to_numpy()
    places = df.filter(pl.col("placement") == "home")
    shown, clicks = (np.bincount(places.filter(event_type=t)["position"], minlength=13)[1:13] for t in ("impression", "click"))
    likes = clicks.sum() / (shown * seen).sum()
    z = (clicks - shown * seen * likes) / np.sqrt(shown * seen * likes)
    assert np.abs(z).max() < 4 and (z**2).sum() < 32.9 # chi-square with 11 degrees of freedom: one in two thousand

def test_a_few_items_sell_most(made):
    n = made[3].filter(event_type="purchase").group_by("item_id").len()["len"].sort(descending=True)
    assert n.head(len(n) // 10).sum() / n.sum() > .25 and n[0] > 5 * n.median()

def test_tastes_show_in_what_people_click(made):
    out, _, _, df = made
    tastes = pl.read_parquet(out/"truth"/"tastes-000.parquet").select("visitor_id", "taste")
    vectors = pl.read_parquet(out/"truth"/"items.parquet").select("item_id", "vector", "quality")
    early = df.filter(pl.col("ts") < START + timedelta(days=30), pl.col("event_type").is_in(["impression", "click"]))
    x = early.join(tastes, on="visitor_id").join(vectors, on="item_id")
    affinity = (x["taste"].to_numpy() * x["vector"].to_numpy()).sum(1)
    clicked = (x["event_type"] == "click").to_numpy()
    assert affinity[clicked].mean() > affinity[~clicked].mean() + .3 and x["quality"].to_numpy()[clicked].mean() > .15

def test_robots_are_fast_and_even(made):
    out, _, _, df = made
    bots = df.join(pl.read_parquet(out/"truth"/"bots.parquet"), on="visitor_id")
    assert bots.height and (bots["event_type"] == "view").all() and bots["user_id"].null_count() == bots.height
    visit = bots.sort("visitor_id", "ts").with_columns(gap=pl.col("ts").diff().over("visitor_id").dt.total_milliseconds()).filter(pl.col("gap") < 60_000)
    assert visit["gap"].max() <= 450 and bots.group_by("visitor_id", pl.col("ts").dt.truncate("1m")).len()["len"].max() > 100

def test_some_visits_begin_before_the_login(made):
    df = made[3].filter(pl.col("session_id").is_not_null()).sort("session_id", "ts")
    s = df.group_by("session_id").agg(known=pl.col("user_id").drop_nulls().n_unique(), first=pl.col("user_id").first(), last=pl.col("user_id").last(),
        visitors=pl.col("visitor_id").n_unique())
    assert s["known"].max() == 1 and s["visitors"].max() == 1
    assert .05 < s.filter(pl.col("first").is_null(), pl.col("last").is_not_null()).height / s.height < .6

def test_new_people_and_items_come_during_the_simulation(made):
    out, _, _, df = made
    users, items = pl.read_parquet(out/"users.parquet"), pl.read_parquet(out/"items.parquet")
    assert .25 < (users["created_ts"] > START).mean() < .35 and (items["created_ts"] > START).sum() > 50 and items["available_to"].drop_nulls().len() > 50
    first = df.drop_nulls("user_id").group_by("user_id").agg(pl.col("ts").min()).join(users, on="user_id")
    assert (first["ts"] >= first["created_ts"]).all()
    sold = df.filter(event_type="purchase").join(items, on="item_id") # an item is on sale on whole days
    assert (sold["ts"] > sold["available_from"] - timedelta(days=1)).all()
    gone = sold.drop_nulls("available_to")
    assert (gone["ts"] < gone["available_to"] + timedelta(days=2)).all()

# ---- shocks

def test_shocks_show(shocked):
    out, df = shocked
    count = lambda kind, a, b: df.filter(pl.col("event_type") == kind, pl.col("day").is_between(a, b - 1)).height / (b - a)
    assert 1.6 < count("view", 20, 27) / count("view", 6, 20) < 2.6
    rate = lambda a, b: count("add_to_cart", a, b) / count("view", a, b)
    assert .25 < rate(40, 50) / rate(28, 40) < .55
    price = df.filter(pl.col("event_type") == "view").group_by("day").agg(pl.col("price").median()).sort("day")["price"]
    assert price[51] / price[48] > 1.5 and price[56] / price[51] < .7

def test_items_out_of_stock_are_not_bought(shocked):
    out, df = shocked
    truth = pl.read_parquet(out/"truth"/"items.parquet").sort("popularity", descending=True)
    gone = truth.filter(pl.col("popularity").cum_sum() < .28 * pl.col("popularity").sum())["item_id"].implode()
    sold = df.filter(pl.col("event_type") == "purchase", pl.col("item_id").is_in(gone))
    assert sold.filter(pl.col("day").is_between(61, 65)).height == 0 < sold.filter(pl.col("day").is_between(52, 58)).height

def test_tastes_drift_and_jump(shocked):
    tastes = [pl.read_parquet(p) for p in sorted((shocked[0]/"truth").glob("tastes-*.parquet"))]
    assert [t["from_day"][0] for t in tastes] == [0, 30, 60, 70]
    r = [np.corrcoef(a["taste"].to_numpy().ravel(), b["taste"].to_numpy().ravel())[0, 1] for a, b in zip(tastes, tastes[1:])]
    assert np.allclose(r, [.9**.5, .9**.5, .1**.5], atol=.03)

def test_prices_in_the_log_are_the_true_ones(shocked):
    out, df = shocked
    prices = pl.read_parquet(out/"truth"/"prices.parquet").sort("from_day")
    views = df.filter(pl.col("event_type") == "view").with_columns(pl.col("day").cast(pl.Int32)).sort("day")
    views = views.join_asof(prices, left_on="day", right_on="from_day", by="item_id", check_sortedness=False)
    assert (views["price"] == views["price_right"]).mean() > .99 # a visit over midnight keeps its prices

# ---- what makes a shop a shop: each of these fails if the trait is taken away

def priced(out, df) -> pl.DataFrame:
    "Views and carts with the true price and list price of their day."
    prices = pl.read_parquet(out/"truth"/"prices.parquet").sort("from_day").rename({"price": "now"})
    some = df.filter(pl.col("event_type").is_in(["view", "add_to_cart"])).with_columns(day=(pl.col("ts") - START).dt.total_days().cast(pl.Int32)).sort("day")
    return some.join_asof(prices, left_on="day", right_on="from_day", by="item_id", check_sortedness=False).with_columns(off=1 - pl.col("now") / pl.col("list_price"))

def test_promotions_come_go_and_sell(made):
    out, _, _, df = made
    prices, shop = pl.read_parquet(out/"truth"/"prices.parquet").with_columns(off=1 - pl.col("price") / pl.col("list_price")), Shop()
    begun, items = prices.filter(pl.col("off") > .01), pl.read_parquet(out/"items.parquet").height
    assert begun["off"].min() > .08 and begun["off"].max() < .42 and .5 < begun.height / (shop.promotions * 90 * items) < 2
    later = prices.join(begun.select("item_id", begin="from_day"), on="item_id").filter(pl.col("from_day") >= pl.col("begin") + 7, pl.col("begin") < 75).group_by("item_id", "begin").agg(pl.col("off").first())
    assert later.height > 100 and (later["off"] < .01).mean() > .9 # a week, then the full price again
    seen = priced(out, df.filter(~pl.col("visitor_id").is_in(pl.read_parquet(out/"truth"/"bots.parquet")["visitor_id"].implode())))
    rate = lambda some: (some["event_type"] == "add_to_cart").sum() / (some["event_type"] == "view").sum()
    assert rate(seen.filter(pl.col("off") > .15)) > 1.2 * rate(seen.filter(pl.col("off") < .01)) # cheaper sells better

@pytest.fixture(scope="module")
def year(tmp_path_factory):
    "A year of people's views: item, moment, category's season; and the truth about items."
    out = tmp_path_factory.mktemp("sim")/"year"
    simulate(out, 200_000, seed=4, items=400, days=365, shop=Shop(bots=0., impression_share=.2))
    items = pl.read_parquet(out/"truth"/"items.parquet")
    return read(out).unique("event_id", keep="first").filter(event_type="view").join(items, on="item_id").with_columns(at=pl.col("ts").dt.ordinal_day() / 365.25 * 2 * np.pi, day=(pl.col("ts") - START).dt.total_seconds() / 86400), items

def test_seasons_of_the_shop_and_of_its_categories(year):
    """A weight 1 + a·cos(x) over a whole year makes the mean of cos(x) a/2; nothing makes it 0. A category is measured against the whole
    shop, and only what is met by popularity has a season of its own: favourites are looked at all year."""
    views, shop = year[0], Shop()
    assert views.select((pl.col("at") - 345 / 365.25 * 2 * np.pi).cos().mean()).item() == pytest.approx(shop.yearly / 2, abs=.035)
    mean = lambda some, season: some.select((pl.col("at") + season).cos().mean()).item()
    parts = [(part.height / views.height, mean(part, s) - mean(views, s)) for (s,), part in views.group_by("season")]
    assert len(parts) >= 8 and .02 < sum(n * gain for n, gain in parts) < shop.seasons / 2

def test_new_items_are_met_more_often(year):
    views, items = year
    aged = views.filter(pl.col("born_day") > 0, pl.col("born_day") < 300).with_columns(age=pl.col("day") - pl.col("born_day"))
    alive = lambda a, b: items.filter(pl.col("born_day") > 0, pl.col("born_day") < 300).select((pl.min_horizontal("dies_day", pl.col("born_day") + b) - (pl.col("born_day") + a)).clip(0).sum()).item()
    per_day = lambda a, b: aged.filter(pl.col("age").is_between(a, b)).height / alive(a, b)
    assert 1.5 < per_day(1, 8) / per_day(35, 60) < 3.5

def test_a_shelf_that_nobody_fills_is_empty_in_the_end(tmp_path):
    sold = {}
    for restock in (0., .4):
        out = tmp_path/f"{restock}"
        simulate(out, 60_000, seed=2, items=200, days=60, shop=Shop(bots=0., impression_share=.1, restock=restock, new_items=0.))
        bought = read(out).unique("event_id", keep="first").filter(event_type="purchase").with_columns(day=(pl.col("ts") - START).dt.total_days())
        sold[restock] = bought.filter(pl.col("day") >= 45).height / bought.filter(pl.col("day") < 15).height
        stock = pl.read_parquet(out/"items.parquet")["stock"]
        assert (stock == 0).mean() > .5 if restock == 0 else (stock > 0).mean() > .5
    assert sold[0.] < .5 * sold[.4]

def test_clicks_follow_the_tastes_of_their_day(shocked):
    "Nine tenths of every taste are new from day 70 on: what was clicked before fits the old ones, what after the new ones."
    out, df = shocked
    old, new = (pl.read_parquet(out/"truth"/f"tastes-{k:03d}.parquet").select("visitor_id", taste) for k, taste in ((2, pl.col("taste").alias("old")), (3, pl.col("taste").alias("new"))))
    x = df.filter(event_type="click").join(old, on="visitor_id").join(new, on="visitor_id").join(pl.read_parquet(out/"truth"/"items.parquet").select("item_id", "vector"), on="item_id")
    fit = lambda some, taste: (some[taste].to_numpy() * some["vector"].to_numpy()).sum(1).mean()
    before, after = x.filter(pl.col("day").is_between(61, 68)), x.filter(pl.col("day") >= 71)
    assert min(before.height, after.height) > 500 and fit(before, "old") > fit(before, "new") + .2 and fit(after, "new") > fit(after, "old") + .2

def test_some_people_have_two_devices_and_some_no_account(made):
    out, _, _, df = made
    devices = df.drop_nulls("user_id").group_by("user_id").agg(n=pl.col("visitor_id").n_unique(), visits=pl.col("session_id").n_unique()).filter(pl.col("visits") >= 6)
    assert devices["n"].max() == 2 and .3 < (devices["n"] == 2).mean() < 1
    strangers = df.join(pl.read_parquet(out/"truth"/"visitors.parquet"), on="visitor_id", how="anti").filter(event_type="purchase")
    assert strangers["user_id"].null_count() == strangers.height > 20

# ---- calibration

def test_calibration_brings_the_marginals_nearer(tmp_path):
    odd = usual_marginals(pace_days=6, spread=.3, head=.6, more=.8)
    odd = msgspec.structs.replace(odd, hours=tuple([0.] * 8 + [.25] * 4 + [0.] * 12), gaps=tuple(np.linspace(.8, 1.2, 33)))
    cheap = dict(impression_share=0., browsing=.2, bots=0.)
    simulate(tmp_path/"real", 60_000, seed=1, items=500, shop=Shop(marginals=odd, **cheap))
    real = pl.scan_parquet(tmp_path/"real"/"events"/"*.parquet")
    distances = []
    for name, shop in (("usual", Shop(**cheap)), ("calibrated", calibrate(real, **cheap))):
        simulate(tmp_path/name, 60_000, seed=2, items=500, shop=shop)
        table = compare_marginals(real, pl.scan_parquet(tmp_path/name/"events"/"*.parquet"))
        distances.append(dict(table.select("marginal", "distance").unique().iter_rows()))
    usual, calibrated = distances
    for m in ("popularity", "baskets", "gaps", "hours"): assert calibrated[m] < .6 * usual[m], (m, usual, calibrated)

def test_marginals_of_a_tiny_log_by_hand():
    at = lambda *hours: [START + timedelta(hours=h) for h in hours]
    events = pl.LazyFrame(dict(event_id=list("abcdea"), event_type="purchase", ts=at(0, 0, 24, 72, 96, 0), visitor_id="v", user_id=["x", "x", "x", "y", "x", "x"],
        session_id=None, order_id=["1", "1", "2", "3", "TEST-4", "1"], item_id=["p", "q", "p", "p", "z", "p"]), schema_overrides=dict(session_id=pl.String))
    m = marginals(events)
    assert m.baskets == (2/3, 1/3) and m.weekdays[:4] == (1/3, 1/3, 0, 1/3) and m.hours[0] == 1 and m.popularity[-1] == 1
    assert np.interp(.5, simulator.GRID, m.popularity) == pytest.approx(.75, abs=.05) # 3 of 4 lines are of p, half of the items
    assert (min(m.paces), max(m.paces)) == pytest.approx((1.5, 3.), rel=.02) # three days; x ordered twice, y once
    same = compare_marginals(events, events)
    assert same["distance"].max() == 0 and same["marginal"].unique(maintain_order=True).to_list() == ["popularity", "baskets", "gaps", "hours", "weekdays"]

def test_a_log_without_purchases_is_refused(made):
    with pytest.raises(RecsysError, match="no purchases"): marginals(made[3].lazy().filter(pl.col("event_type") != "purchase"))

# ---- refusals, speed

def test_what_cannot_be_simulated_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path/"there").mkdir()
    bad = [dict(out=tmp_path/"there"), dict(events=0), dict(days=0), dict(seed=-1), dict(users=0), dict(items=0), dict(shop=Shop(bots=.8)), dict(shop=Shop(positions=(3,))),
           dict(shop=Shop(shocks=(Shock(1, "lost", .5, 1, "sneeze"),))), dict(shop=Shop(shocks=(Shock(1, "meteor", .5),)))]
    for wrong in bad:
        with pytest.raises(RecsysError): simulate(**(dict(out=tmp_path/"new", events=1000) | wrong))
    def stop(name): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): simulate(tmp_path/"new", 1000, on_step=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]

def test_it_is_fast(made, tmp_path):
    "Half a million a CPU second on a quiet machine; a third of that on a busy one, or somebody made it slow."
    cpu = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    before = cpu()
    account = simulate(tmp_path/"quick", 500_000)
    assert account["rows"] / (cpu() - before) > 170_000
