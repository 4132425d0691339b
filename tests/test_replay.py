"""A log that is replayed through the service, in order and shuffled, gives the lists that are computed offline from the files which the next night reads: every row of every list.

The large one: pytest -m bench tests/test_replay.py"""
import http.client, json, time
from datetime import datetime, timezone

import numpy as np
import polars as pl
import pytest

from recsys.data.log import roll_log, rolled_files
from recsys.serving.bundle import open_bundle, promote
from recsys.serving.engine import Engine, Request, recommend
from test_serving import BUDGET, N_ITEMS, N_USERS, PER_SOURCE, ask, publish, serving

ACTS, CARTED = ["view", "click", "wishlist", "add_to_cart", "purchase"], ["add_to_cart", "remove_from_cart", "purchase"]

def made_log(seed: int, people: int, now: float) -> list[dict]:
    "Events of people on one to three browsers, who log in on some of them, now or some hours ago; by time. No two at the same moment."
    rng, events = np.random.default_rng(seed), []
    for p in range(people):
        browsers = [f"b{p}-{k}" for k in range(rng.integers(1, 4))]
        user = f"u{p}" if rng.random() < .6 else None  # the first of them are known to the bundle
        for visit in rng.permutation([0, 2, 5, 19])[:rng.integers(1, 4)]:  # hours ago
            browser, login, session = str(rng.choice(browsers)), rng.random() < .5, f"s{p}-{visit}"
            begin, n = now - visit * 3600 - 1200, int(rng.integers(1, 9))
            at = np.sort(rng.choice(np.arange(1, 1000), n, replace=False))
            for k, t in enumerate(at):
                kind = str(rng.choice(["view", "click", "wishlist", "add_to_cart", "remove_from_cart", "purchase", "impression", "search"], p=[.35, .1, .05, .25, .1, .05, .05, .05]))
                events.append(dict(event_id=f"{seed}-{p}-{visit}-{k}", event_type=kind, visitor_id=browser, ts=round(begin + float(t) + p / 1e4, 6), session_id=session, consent=bool(rng.random() < .95),
                                   **({} if kind == "search" else dict(item_id=f"i{rng.integers(N_ITEMS)}")), **(dict(user_id=user) if user and login and k >= n // 2 else {})))
    return sorted(events, key=lambda e: e["ts"])

# ---- offline: a batch computation over the whole log

def offline(log: pl.DataFrame, now: float) -> dict[str, Request]:
    "{browser: what a question of that browser comes to at `now`}"
    log = log.filter("consent").with_columns(s=pl.col("ts").dt.epoch("us") / 1e6)
    links = log.drop_nulls("user_id").group_by("visitor_id", "user_id").agg(pl.col("s").max()).sort("s", descending=True)
    owner = dict(links.unique("visitor_id", keep="first", maintain_order=True).select("visitor_id", "user_id").iter_rows())
    browsers = {u: g["visitor_id"].to_list()[:4] for (u,), g in links.group_by("user_id", maintain_order=True)}
    events = log.drop_nulls("item_id").sort("s", descending=True)
    found = {}
    for browser in log["visitor_id"].unique():
        user = owner.get(browser)
        own = {browser, *(b for b in browsers.get(user, []) if owner.get(b) == user)}
        mine = events.filter((pl.col("user_id").is_null() & pl.col("visitor_id").is_in(list(own))) | (pl.col("user_id") == user if user else pl.lit(False)))
        acts, carted = (mine.filter(pl.col("event_type").is_in(kinds)) for kinds in (ACTS, CARTED))
        pause = -np.diff(np.concatenate([[now], acts["s"].to_numpy()]))
        visit = acts.head(int(np.argmax(np.append(pause, 1e9) > 1800)))
        newest = carted.unique("item_id", keep="first", maintain_order=True)
        cart = newest.filter(pl.col("event_type") == "add_to_cart")["item_id"].to_list()
        looked = visit["item_id"].unique(maintain_order=True).to_list()[:5]
        found[browser] = Request(user_id=user, visitor_id=browser, cart=cart[::-1], items=[i for i in looked[::-1] if i not in cart], n=BUDGET)
    return found

def rows(engine, request): return [(s.item_id, s.score, s.source) for s in recommend(engine, request, "r").items]

def frame(events: list[dict]) -> pl.DataFrame:
    return pl.DataFrame([dict(user_id=None, item_id=None) | e for e in events], infer_schema_length=None, schema_overrides=dict(user_id=pl.String, item_id=pl.String)).with_columns(ts=pl.from_epoch((pl.col("ts") * 1e6).round().cast(pl.Int64), "us").dt.replace_time_zone("UTC"))

# ---- through the service

def posted(port, link, events):
    body = dict(events=[e | dict(ts=datetime.fromtimestamp(e["ts"], timezone.utc).isoformat()) for e in events])
    status, _, said = ask(port, path="/v1/events", body=body, link=link)
    assert status == 200 and said["rejected"] == []
    return said["accepted"]

def served(port, link, browser):
    status, _, got = ask(port, body=dict(visitor_id=browser, n=BUDGET), link=link)
    assert status == 200 and not got["degraded"]
    return [(s["item_id"], s["score"], s["source"]) for s in got["items"]]

def replayed(folder, events, engine, shuffle: bool, checks: int, batch: int = 40) -> tuple[int, int]:
    "(rows, rows that are equal) of the lists of all browsers at the end and, in order, of those of some batches on the way."
    rng, asked, equal = np.random.default_rng(3), 0, 0
    order = rng.permutation(len(events)) if shuffle else np.arange(len(events))
    posts = [[events[k] for k in order[i:i + batch]] for i in range(0, len(events), batch)]
    def compare(link, port, want, browsers):
        nonlocal asked, equal
        for b in browsers:
            w, got = rows(engine, want[b]), served(port, link, b)
            asked += max(len(w), len(got)); equal += sum(x == y for x, y in zip(w, got))
    with serving(folder, workers=2) as (_, port):
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        done, every = [], max(1, len(posts) // max(1, checks))
        for k, events_ in enumerate(posts):
            assert posted(port, link, events_) == len(events_)
            if shuffle: posted(port, link, [events_[0], *posts[int(rng.integers(k + 1))][:3]])  # some come again
            done += events_
            if not shuffle and k % every == every - 1:
                want = offline(frame(done), time.time())
                compare(link, port, want, sorted({e["visitor_id"] for e in events_} & set(want)))
        roll_log(folder/"data")
        log = pl.concat([pl.read_parquet(f) for f in rolled_files(folder/"data")])
        assert sorted(log["event_id"]) == sorted(e["event_id"] for e in events)  # each once
        want = offline(log, time.time())
        compare(link, port, want, sorted(want))
    return asked, equal

def replay(tmp_path, people, checks):
    publish(tmp_path); promote(tmp_path/"bundles", "v1")
    b = open_bundle(tmp_path/"bundles"/"v1")
    engine, events = Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b), made_log(1, people, time.time())
    stranger, carts = rows(engine, Request(n=BUDGET)), [bool(r.cart) for r in offline(frame(events), time.time()).values()]
    assert sum(carts) > len(carts) / 4 and any(rows(engine, r) != stranger for r in offline(frame(events), time.time()).values())
    found = {}
    for name, shuffle in (("in order", False), ("shuffled", True)):
        folder = tmp_path/name; folder.mkdir(); (folder/"bundles").symlink_to(tmp_path/"bundles")
        found[name] = replayed(folder, events, engine, shuffle, checks)
        asked, equal = found[name]
        assert asked == equal > people * BUDGET / 2
    return len(events), found

def test_a_replayed_log_gives_the_offline_lists_in_order_and_shuffled(tmp_path): replay(tmp_path, 40, 5)

@pytest.mark.bench
def test_a_long_log_does_too(tmp_path): print(replay(tmp_path, 1500, 20))
