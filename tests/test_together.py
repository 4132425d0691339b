"Two variants in one list, and shares that follow: what is served is what is logged, and what is logged is what is answered."
import json, os, re, time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from recsys.core.settings import RecsysError, load_settings
from recsys.data.events import UTC
from recsys.data.identity import NO_LINKS
from recsys.experiments.preferred import credited, picks_of, preferred
from recsys.experiments.shares import arms_of, chances_of, reshare, tell_shares
from recsys.experiments.units import lists_of
from recsys.ranking.rules import read_rules
from recsys.serving.assignment import Experiment, book_of, read_experiments, team_draft, unit_hashes, variants_of
from recsys.serving.bundle import open_bundle, promote
from recsys.serving.engine import Engine, Request, rank, recommend
from recsys.serving.service import Service, ask as ask_service, start
from recsys.serving.variants import follow, read_shares, shares_file
from shop import ROOT, recsys, settings_text, until
from test_serving import BUDGET, PER_SOURCE, ask, publish, serving, tables

FILE = """
[[experiment]]
name = "drafts"
owner = "team"
hypothesis = "other lists are preferred"
primary = "ctr"
method = "interleave"
minimum_effect = 0.1
layer = "ranking"
slots = [0, 500]
ramp = [[2020-01-01, 1.0]]
variant = [{ name = "control" }, { name = "other", bundle = "v2" }]

[[experiment]]
name = "moving"
owner = "team"
hypothesis = "one of them is clicked more"
primary = "ctr"
method = "bandit"
minimum_effect = 0.1
layer = "ranking"
slots = [500, 1000]
ramp = [[2020-01-01, 1.0]]
variant = [{ name = "control" }, { name = "narrow", budget = 20 }]
"""

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    publish(folder); publish(folder, "v2", tables(seed=7)); promote(folder/"bundles", "v1")
    (folder/"e.toml").write_text(FILE)
    return folder

@pytest.fixture(scope="module")
def server(shop):
    os.environ["RECSYS_EXPERIMENTS_FILE"] = str(shop/"e.toml")
    with serving(shop, shed_ms=5000, refuse_ms=60000) as (process, port):
        del os.environ["RECSYS_EXPERIMENTS_FILE"]
        yield SimpleNamespace(port=port, folder=shop)

def log_of(folder): return [json.loads(l) for p in (folder/"data"/"served").glob("day=*/*.jsonl") for l in p.read_text().splitlines()]

def test_a_drafted_list_is_what_captains_draft_from_both_engines(server):
    engines = [Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b) for b in (open_bundle(server.folder/"bundles"/v) for v in ("v1", "v2"))]
    seen = 0
    for k in range(40):
        status, _, got = ask(server.port, body=dict(visitor_id=f"v{k}", user_id=f"u{k % 20}", cart=["i9"], n=8))
        assert status == 200 and got["variant"].partition(":")[0] in ("drafts", "moving")
        if got["variant"] != "drafts:interleaved": continue
        seen += 1
        lists = [[s.item_id for s in recommend(e, Request(visitor_id=f"v{k}", user_id=f"u{k % 20}", cart=["i9"], n=8), got["request_id"]).items] for e in engines]
        picks = team_draft(*lists, 8, got["request_id"])
        assert [(i["item_id"], i.get("propensity", 1.0)) for i in got["items"]] == [(p.item, p.propensity) for p in picks] and [i["rank"] for i in got["items"]] == list(range(1, 9))
        until(lambda: any(r["request_id"] == got["request_id"] for r in log_of(server.folder)))
        line = next(r for r in log_of(server.folder) if r["request_id"] == got["request_id"])
        assert line["teams"] == [p.team for p in picks]
    assert 10 < seen < 30

def test_an_order_of_given_items_follows_the_experiments_too(server):
    engines = [Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b) for b in (open_bundle(server.folder/"bundles"/v) for v in ("v1", "v2"))]
    given, kinds = [f"i{k}" for k in range(1, 9)], set()
    for k in range(40):
        status, _, got = ask(server.port, path="/v1/rank", body=dict(visitor_id=f"o{k}", user_id=f"u{k % 20}", candidates=given))
        same = ask(server.port, body=dict(visitor_id=f"o{k}", user_id=f"u{k % 20}"))[2]
        assert status == 200 and got["variant"] == same["variant"]
        kinds.add(got["variant"])
        if got["variant"] != "drafts:interleaved": continue
        picks = team_draft(*([s.item_id for s in rank(e, Request(visitor_id=f"o{k}", user_id=f"u{k % 20}"), given, "r").items] for e in engines), 500, got["request_id"])
        assert [i["item_id"] for i in got["items"]] == [p.item for p in picks]
    assert kinds >= {"drafts:interleaved", "moving:narrow"}

def test_a_drafted_list_cannot_be_asked_again(server):
    got = next(g for k in range(50) if (g := ask(server.port, body=dict(visitor_id=f"w{k}", explain=True))[2])["variant"] == "drafts:interleaved")
    assert got["items"]
    until(lambda: "drafted" in json.dumps(ask(server.port, "GET", f"/v1/explain/{got['request_id']}", body=None)[2]))
    assert ask(server.port, "GET", f"/v1/explain/{got['request_id']}", body=None)[0] == 404

def test_shares_are_followed_and_the_chance_is_in_the_log(server):
    kinds = lambda t: [v for k in range(60) if (v := ask(server.port, body=dict(visitor_id=f"{t}{k}"))[2]["variant"]).startswith("moving")]
    assert set(kinds("a")) == {"moving:control", "moving:narrow"}
    tell_shares(server.folder/"data", "moving", [.0, 1.0], datetime.now(timezone.utc))
    until(lambda: set(kinds("b")) == {"moving:narrow"})
    tell_shares(server.folder/"data", "moving", [.1, .9], datetime.now(timezone.utc))
    until(lambda: set(kinds("c")) == {"moving:control", "moving:narrow"})
    until(lambda: any(r.get("chances") == {"moving:control": .1} for r in log_of(server.folder)))
    said = {(v, p) for r in log_of(server.folder) for v, p in r.get("chances", {}).items()}
    assert {("moving:control", .5), ("moving:narrow", .5), ("moving:narrow", 1.0), ("moving:narrow", .9)} <= said
    lists = lists_of(server.folder/"data", "moving")
    chance = chances_of(server.folder/"data", lists, "moving")
    assert len(chance) == lists.select(pl.coalesce("user_id", "visitor_id")).n_unique() and chance["chance"].null_count() == 0

def test_new_shares_open_no_engine(shop, tmp_path):
    s, change = load_settings(), msgspec.structs.replace
    s = change(s, paths=change(s.paths, data=str(tmp_path/"data")), experiments=change(s.experiments, file=str(shop/"e.toml")), candidates=change(s.candidates, per_source=PER_SOURCE, budget=BUDGET))
    service = Service(s, shop/"bundles"); start(service)
    try:
        before = service.variants.now.engines
        tell_shares(tmp_path/"data", "moving", [.25, .75], datetime.now(timezone.utc))
        until(lambda: [c.chance for c in service.variants.now.book.experiments[1].choices] == [.25, .75])
        assert service.variants.now.engines is before and len(before) == 2
    finally: service.close()

def test_a_failing_second_list_leaves_the_first_and_counts_for_nobody(shop, tmp_path):
    s, change = load_settings(), msgspec.structs.replace
    s = change(s, paths=change(s.paths, data=str(tmp_path/"data")), experiments=change(s.experiments, file=str(shop/"e.toml")), candidates=change(s.candidates, per_source=PER_SOURCE, budget=BUDGET))
    service = Service(s, shop/"bundles"); start(service)
    try:
        service.pressure.shed = 1e9                                  # a busy machine is no reason for cheaper lists here
        who = next(f"v{k}" for k in range(50) if ask_service(service, Request(visitor_id=f"v{k}"), f"r{k}").variant == "drafts:interleaved")
        whole = [i.item_id for i in recommend(service.engine, Request(visitor_id=who), "x").items]
        for e in service.variants.now.engines.values():
            if e.bundle.folder.name == "v2": e.__class__ = type("Broken", (), {})  # it breaks
        assert [i.item_id for i in ask_service(service, Request(visitor_id=who), "broken").items] == whole
    finally: service.close()
    assert "broken" not in picks_of(tmp_path/"data", "drafts")["request_id"].to_list() and len(picks_of(tmp_path/"data", "drafts"))

def test_a_filtered_item_is_in_no_drafted_list(shop, tmp_path):
    (tmp_path/"block.toml").write_text('[[block]]\nname = "b"\nitems = ["i1", "i2", "i3", "i4"]\n')
    engines = []
    for v in ("v1", "v2"):
        b = open_bundle(shop/"bundles"/v); e = Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b); e.use(read_rules(tmp_path/"block.toml")); engines.append(e)
    from recsys.serving.variants import drafted
    for k in range(30):
        one, _ = drafted(*(recommend(e, Request(user_id=f"u{k % 20}", cart=["i9"], exclude=["i7"]), f"r{k}") for e in engines), 10)
        assert one.items and not {i.item_id for i in one.items} & {"i1", "i2", "i3", "i4", "i7", "i9"}

@pytest.mark.parametrize("old, new, words", [('primary = "ctr"\nmethod = "interleave"', 'primary = "revenue"\nmethod = "interleave"', "cannot decide"),
    ('bundle = "v2" }', 'bundle = "v2", shadow = true }', "shadow"), ('bundle = "v2" }', 'bundle = "v2" }, { name = "third" }', "more than two"),
    ('method = "bandit"', 'method = "bandit"\nguardrails = { revenue = 0.1 }', "guardrails"), ('method = "bandit"', 'method = "magic"', "method")])
def test_what_cannot_be_is_told(tmp_path, old, new, words):
    (tmp_path/"e.toml").write_text(FILE.replace(old, new, 1))
    with pytest.raises(RecsysError, match=words): read_experiments(tmp_path/"e.toml")

@given(st.lists(st.floats(.01, 1), min_size=2, max_size=2), st.lists(st.floats(.01, 1), min_size=2, max_size=2))
@hypothesis_settings(max_examples=30, deadline=None)
def test_only_units_near_a_boundary_move(a, b):
    e = msgspec.toml.decode(FILE, type=dict)["experiment"][1]; e = msgspec.convert(e, Experiment)
    a, b = (tuple(x / sum(s) for x in s) for s in (a, b))
    bases = unit_hashes([f"v{k}" for k in range(4000)])
    at = lambda s: variants_of(book_of(SimpleNamespace(experiment=(e,), on=True, holdout=0.0), {"moving": s}).experiments[0], bases, 1.8e9)
    x, y = at(a), at(b)
    took = x >= 0
    assert (took == (y >= 0)).all() and abs((x != y)[took].mean() - abs(a[0] - b[0])) < .04 and len(set(zip(x[x != y], y[x != y]))) <= 1

# ---- the jobs

EVENT = dict(event_id=pl.String, event_type=pl.String, ts=UTC, received_ts=UTC, visitor_id=pl.String, user_id=pl.String, session_id=pl.String, item_id=pl.String, quantity=pl.Int32, price=pl.Float64, request_id=pl.String,
             position=pl.Int32, placement=pl.String, variant=pl.String, consent=pl.Boolean, flag=pl.String)
T0 = datetime(2026, 11, 2, tzinfo=timezone.utc)

@pytest.fixture
def project(tmp_path):
    "A project with the logs of both experiments: picks of the second team are clicked twice as often, the narrow variant three times."
    for name in ("nbs", "constraints.txt"): (tmp_path/name).symlink_to(ROOT/name)
    (tmp_path/"settings.ini").write_text(settings_text().replace("\nfile =\n", "\nfile = e.toml\n", 1)); (tmp_path/"e.toml").write_text(FILE)
    rng, step, lines, events = np.random.default_rng(0), tmp_path/"data"/"steps"/"ingest-x", [], []
    for folder in (step/"events"/"day=2026-11-02", tmp_path/"data"/"served"/"day=2026-11-02"): folder.mkdir(parents=True)
    add = lambda kind, v, at, item, request: events.append((str(len(events)), kind, at, at, v, None, v, item, 1, 9.0, request, 1, None, None, True, None))
    for k in range(1600):
        at, r = T0 + timedelta(days=float(rng.uniform(0, 9))), f"r{k}"
        bandit = k % 2
        chance = (.5, .5) if at < T0 + timedelta(days=4) else (.2, .8)
        arm = int(rng.random() < chance[1])
        teams = [int(t) for t in rng.permutation([0, 1])]
        lines.append(json.dumps(dict(request_id=r, at=at.timestamp(), variant=f"moving:{('control', 'narrow')[arm]}" if bandit else "drafts:interleaved", visitor_id=None if k % 10 == 0 else f"v{k}", user_id=f"u{k}" if k % 10 == 0 else None,
            items=[["a", 1, 1, []], ["b", 1, 1, []]], took_ms=8.0, **(dict(chances={f"moving:{('control', 'narrow')[arm]}": chance[arm]}) if bandit else dict(teams=teams)))))
        who = f"v{k}"
        for item, t in zip("ab", teams):
            add("impression", who, at, item, r)
            if rng.random() < .06 * ((1 + 2 * arm) if bandit else 1 + t): add("click", who, at + timedelta(minutes=2), item, r)
    (tmp_path/"data"/"served"/"day=2026-11-02"/"1.jsonl").write_text("\n".join(lines) + "\n")
    pl.DataFrame(events, schema=EVENT, orient="row").sort("ts").write_parquet(step/"events"/"day=2026-11-02"/"events.parquet")
    pl.DataFrame(dict(item_id=["a", "b"], category=["X", "Y"])).write_parquet(step/"items.parquet")
    NO_LINKS.write_parquet(step/"links.parquet"); (step/"ingest.json").write_text(json.dumps(dict(moment="2026-11-13T00:00:00+00:00")))
    return tmp_path

def text_of(page): return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text()))

def test_the_page_says_whose_picks_won(project):
    run = recsys(project, "experiment", "analyse", "drafts")
    assert run.returncode == 0 and run.stdout.startswith("Show 'other': its picks won"), run.stderr + run.stdout
    page = Path(run.stdout.split("Look at ")[1].strip())
    said = json.loads((page.parent/"out"/"decision.json").read_text())
    assert said["answer"] == "second" and 0 < said["preference"]["low"] and page.stat().st_size < 1_500_000
    assert text_of(page).index("its picks won") < text_of(page).index("Lists won")

def test_the_page_of_a_bandit_and_the_command_tell_workers_the_shares(project):
    run = recsys(project, "experiment", "analyse", "moving")
    assert run.returncode == 0 and "'narrow' is the best with probability" in run.stdout, run.stderr
    s = load_settings(project/"settings.ini")
    told = read_shares(shares_file(s.data_dir))["moving"]
    assert told[1] > .9 and told[0] >= s.experiments.bandit_floor - 1e-9
    run = recsys(project, "experiment", "shares")
    assert run.returncode == 0 and run.stdout.startswith("moving: 'narrow' is the best") and len(shares_file(s.data_dir).read_text().splitlines()) == 2
    run = recsys(project, "experiment", "shares", "drafts")
    assert run.returncode == 1 and "stand still" in run.stderr and run.stderr.count("\n") == 1

def test_a_log_that_lies_moves_no_shares(project):
    path = next((project/"data"/"served").glob("day=*/*.jsonl"))
    path.write_text(path.read_text().replace('"moving:narrow": 0.8', '"moving:narrow": 0.1').replace('"moving:narrow": 0.5', '"moving:narrow": 0.1'))
    s = load_settings(project/"settings.ini")
    said = reshare("moving", project/"data"/"steps"/"ingest-x", s)
    assert not said.moved and "stay" in said.sentence and not shares_file(s.data_dir).exists()
