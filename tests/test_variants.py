"Experiments in the running service: everybody sees what the hash says, each variant its own lists, and switching off takes a moment."
import json, os, time
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from recsys.core.settings import load_settings
from recsys.data.shown import served_records
from recsys.experiments.units import lists_of
from recsys.operations.runner import prune
from recsys.ranking.rules import read_rules
from recsys.serving.assignment import assign, book_of, read_experiments
from recsys.serving.bundle import open_bundle, promote
from recsys.serving.engine import Engine, Request, recommend
from recsys.serving.service import Service, ask as ask_service, start
from shop import settings_text, until
from test_serving import BUDGET, PER_SOURCE, ask, publish, serving, tables

FILE = """
[[experiment]]
name = "lists"
owner = "team"
hypothesis = "other lists are better"
primary = "ctr"
minimum_effect = 0.1
layer = "ranking"
slots = [0, 700]
ramp = [[2020-01-01, 1.0]]
variant = [{ name = "control" }, { name = "other", bundle = "v2" }, { name = "blocked", rules = "block.toml" }, { name = "narrow", budget = 20 }]

[[experiment]]
name = "dark"
owner = "team"
hypothesis = "other lists take longer"
primary = "latency_ms"
minimum_effect = 0.1
layer = "ranking"
slots = [700, 1000]
ramp = [[2020-01-01, 1.0]]
variant = [{ name = "control" }, { name = "unseen", bundle = "v2", shadow = true }]

[[experiment]]
name = "banner"
owner = "team"
hypothesis = "a banner helps"
primary = "ctr"
minimum_effect = 0.1
layer = "page"
placements = ["home"]
segments = ["known"]
unit = "user"
ramp = [[2020-01-01, 1.0]]
variant = [{ name = "control" }, { name = "red" }]
"""
RULES = '[[block]]\nname = "b"\nitems = ["i1", "i2", "i3", "i4", "i5", "i6", "i7", "i8"]\n'

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    publish(folder); publish(folder, "v2", tables(seed=7)); promote(folder/"bundles", "v1")
    (folder/"e.toml").write_text(FILE); (folder/"block.toml").write_text(RULES)
    return folder

@pytest.fixture(scope="module")
def server(shop):
    os.environ["RECSYS_EXPERIMENTS_FILE"] = str(shop/"e.toml")
    with serving(shop, shed_ms=5000, refuse_ms=60000) as (process, port): # a busy machine is no reason for cheaper lists here
        del os.environ["RECSYS_EXPERIMENTS_FILE"]                        # the process has read it
        yield SimpleNamespace(process=process, port=port, folder=shop)

@pytest.fixture(scope="module")
def engines(shop):
    def of(version="v1", budget=BUDGET, rules=None):
        b = open_bundle(shop/"bundles"/version)
        e = Engine(b.state, b.ranker, PER_SOURCE, budget, b)
        if rules: e.use(rules)
        return e
    return {"lists:control": of(), "lists:other": of("v2"), "lists:blocked": of(rules=read_rules(shop/"block.toml")), "lists:narrow": of(budget=20), "dark:control": of(), "dark:unseen": of()}

def records(folder): return [json.loads(r) for r in served_records(folder/"data")]
def shown(port, visitor, **more): return ask(port, body=dict(visitor_id=visitor, **more))[2]

def test_each_variant_gets_its_own_list_and_its_name(server, engines):
    book, seen = book_of(read_experiments(server.folder/"e.toml")), set()
    for k in range(60):
        got = shown(server.port, f"v{k}", cart=["i9"], placement="home", user_id=f"u{k % 20}")
        want = ",".join(c.text for c in assign(book, f"v{k}", f"u{k % 20}", "home", "known", time.time()))
        own = want.split(",")[0]
        assert got["variant"] == want and len(want.split(",")) == 2
        assert [i["item_id"] for i in got["items"]] == [s.item_id for s in recommend(engines[own], Request(visitor_id=f"v{k}", user_id=f"u{k % 20}", cart=["i9"], placement="home"), "r").items], own
        assert got["model_version"] == ("v2" if own == "lists:other" else "v1")
        seen.add(own)
    assert seen == engines.keys()
    assert "banner" not in shown(server.port, "v1", placement="home", user_id="nobody knows")["variant"] and "banner" not in shown(server.port, "v1", placement="cart", user_id="u1")["variant"]

def test_an_exposure_is_noted_once_and_a_shadow_in_the_log_only(server):
    book = book_of(read_experiments(server.folder/"e.toml"))
    who = lambda text: next(v for v in (f"w{k}" for k in range(1000)) if text in [c.text for c in assign(book, v, None, None, None, time.time())])
    dark, other = who("dark:unseen"), who("lists:other")
    for v in (dark, other, other, dark): shown(server.port, v)
    mine = lambda v: [r for r in records(server.folder) if r["visitor_id"] == v]
    until(lambda: len(mine(dark)) == 4 and len(mine(other)) == 2)
    assert [r.get("exposed", []) for r in mine(other)] == [["lists:other"], []]
    lists, shadow = ([r for r in mine(dark) if r["variant"].startswith("shadow") is s] for s in (False, True))
    assert [r["variant"] for r in lists] == ["dark:unseen"] * 2 and {r["model_version"] for r in lists} == {"v1"} and [r.get("exposed", []) for r in lists] == [["dark:unseen"], []]
    assert {r["variant"] for r in shadow} == {"shadow dark:unseen"} and {r["model_version"] for r in shadow} == {"v2"} and {r["request_id"] for r in shadow} == {f"{r['request_id']}#shadow" for r in lists}
    table = lists_of(server.folder/"data", "dark").to_dicts()
    made = {r["request_id"].removesuffix("#shadow"): r for r in shadow}
    for row in table:
        if row["visitor_id"] == dark: assert row["items"] == [i[0] for i in made[row["request_id"]]["items"]] and row["took_ms"] == made[row["request_id"]]["took_ms"]

def test_a_shadow_takes_as_long_for_the_state_as_what_was_shown(shop, tmp_path):
    s, change = load_settings(), msgspec.structs.replace
    s = change(s, paths=change(s.paths, data=str(tmp_path/"data")), experiments=change(s.experiments, file=str(shop/"e.toml")), candidates=change(s.candidates, per_source=PER_SOURCE, budget=BUDGET))
    book = book_of(read_experiments(shop/"e.toml"))
    v = next(v for v in (f"w{k}" for k in range(1000)) if "dark:unseen" in [c.text for c in assign(book, v, None, None, None, time.time())])
    service = Service(s, shop/"bundles"); start(service)
    read = service.store.read
    def slow(*args): time.sleep(.2); return read(*args)
    service.store.read = slow
    answer = ask_service(service, Request(visitor_id=v), "r")
    service.close()
    took = {r["variant"]: r["took_ms"] for r in map(json.loads, served_records(tmp_path/"data"))}
    assert answer.variant == "dark:unseen" and took.keys() == {"dark:unseen", "shadow dark:unseen"} and min(took.values()) >= 200

def test_explanations_come_from_the_engine_that_answered(server):
    book = book_of(read_experiments(server.folder/"e.toml"))
    for text in ("lists:other", "lists:narrow", "lists:blocked"):
        v = next(v for v in (f"x{k}" for k in range(1000)) if text in [c.text for c in assign(book, v, None, None, None, time.time())])
        got = shown(server.port, v, n=3, explain=True)
        for i in got["items"]: assert i["contributions"]
        until(lambda: ask(server.port, "GET", f"/v1/explain/{got['request_id']}", body=None)[0] == 200)
        again = ask(server.port, "GET", f"/v1/explain/{got['request_id']}", body=None)[2]
        assert [(i["item_id"], i["contributions"]) for i in again["items"]] == [(i["item_id"], i["contributions"]) for i in got["items"]]

def test_without_consent_or_id_nobody_takes_part(server):
    assert shown(server.port, "v1", consent=False)["variant"] == "default" and ask(server.port, body={})[2]["variant"] == "default"

def test_stock_reaches_the_variants(server):
    book = book_of(read_experiments(server.folder/"e.toml"))
    v = next(v for v in (f"y{k}" for k in range(1000)) if "lists:other" in [c.text for c in assign(book, v, None, None, None, time.time())])
    gone = shown(server.port, v)["items"][0]["item_id"]
    assert ask(server.port, "PUT", "/v1/items", body=dict(items=[dict(item_id=gone, stock=0)]))[0] == 200
    until(lambda: gone not in [i["item_id"] for i in shown(server.port, v)["items"]])
    ask(server.port, "PUT", "/v1/items", body=dict(items=[dict(item_id=gone, stock=9)]))

def test_the_kill_switch_and_a_slip_of_the_editor(server):
    file, port = server.folder/"e.toml", server.port
    kinds = lambda: {shown(port, f"k{k}")["variant"].split(":")[0] for k in range(30)}
    assert kinds() == {"lists", "dark"}
    file.write_text(FILE + "\noops"); time.sleep(2.5)
    assert kinds() == {"lists", "dark"}                                  # what was on stays on
    file.write_text(FILE.replace('bundle = "v2" }', 'bundle = "v9" }'))
    until(lambda: kinds() == {"dark", "default"})                        # one variant cannot be opened: none of its experiment is shown
    file.write_text("on = false\n" + FILE); until(lambda: kinds() == {"default"})
    file.write_text(FILE); until(lambda: kinds() == {"lists", "dark"})

def test_versions_in_experiments_are_not_cleared_away(tmp_path):
    (tmp_path/"settings.ini").write_text(settings_text(keep=1).replace("\nfile =\n", "\nfile = e.toml\n", 1)); (tmp_path/"e.toml").write_text(FILE)
    s = load_settings(tmp_path/"settings.ini")
    def versions(*names):
        for k, name in enumerate(names): (tmp_path/"data"/"bundles"/name).mkdir(parents=True, exist_ok=True); os.utime(tmp_path/"data"/"bundles"/name, (k, k))
        return prune(s)
    assert versions("v1", "v2", "v3", "v4") == ["v1", "v3"]
    (tmp_path/"e.toml").write_text("oops")
    assert versions("v1", "v2", "v3", "v4") == []
    (tmp_path/"e.toml").write_text("")
    assert versions("v1", "v2", "v3", "v4") == ["v1", "v2", "v3"]
