"What is learned between two nights: it helps when something changes, does not move when nothing does, is set back when it hurts, and without it no bit is different."
import json, os, signal, time
from types import SimpleNamespace
from urllib.request import urlopen

import msgspec
import numpy as np
import polars as pl
import pytest

from recsys.core.settings import RecsysError, load_settings
from recsys.data.events import Item
from recsys.serving import online
from recsys.serving.bundle import current_bundle, promote
from recsys.serving.engine import Engine, Moved, Request, STILL, rank, recommend
from recsys.serving.online import (LIMIT, Act, Followed, Given, Guard, Layer, Learned, Learner, Memory, Reader, Student, Tail, Traits, Weights, acts_file, begun, followers, learned_file, online_line,
    publish, read_acts, read_learned, write_learned)
from shop import until
from test_serving import BUDGET, N_ITEMS, PER_SOURCE, ask, publish as bundle_of, serving

SETTINGS = load_settings()
settings_at = lambda folder: msgspec.structs.replace(SETTINGS, paths=msgspec.structs.replace(SETTINGS.paths, data=str(folder/"data")))

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    bundle_of(folder); promote(folder/"bundles", "v1")
    return folder

@pytest.fixture()
def engine(shop):
    b = current_bundle(shop/"bundles")
    return Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b)

def learned(weights, links={}, active=True, version="v1", number=7, **memory): return Learned(version, number, 1e9, active, 1., weights, links, Memory(active=active, number=number, until=1e9, **memory))

def lists(engine, n=40): return [msgspec.json.encode(recommend(engine, Request(user_id=f"u{k % 25}", cart=[f"i{k}"] if k % 3 else [], n=12), f"r{k}").items) for k in range(n)]

# ---- in the engine

def test_without_an_active_layer_not_one_bit_is_different(engine, tmp_path):
    before = lists(engine)
    write_learned(tmp_path, learned({"i:i57": -1.5}, {"i1": {"i2": 5.}}, active=False))
    reader = Reader(tmp_path)
    assert reader.look() and reader.layer(engine.bundle, BUDGET) is None
    write_learned(tmp_path, learned({"i:i57": -1.5}, version="v0")); reader.look()
    assert reader.layer(engine.bundle, BUDGET) is None, "another night's"
    write_learned(tmp_path, learned({"i:i57": -1.5})); reader.look()
    engine.layer = reader.layer(engine.bundle, BUDGET)
    assert lists(engine) != before
    engine.layer = None
    assert lists(engine) == before
    engine.layer = Layer(learned({}), engine.bundle, BUDGET)  # active, and empty
    assert lists(engine) == before

def test_scores_are_the_rankers_and_what_was_added(engine):
    asked = [Request(user_id=f"u{k}", n=BUDGET) for k in range(15)]
    plain = [{s.item_id: s.score for s in recommend(engine, q, "r").items} for q in asked]
    engine.layer = Layer(learned({"i:i3": 1.2, "i:i7": -.9, "c:A > B": .25}), engine.bundle, BUDGET)
    for q, before in zip(asked, plain):
        answer = recommend(engine, q, "r")
        assert answer.online == 7 and {s.item_id for s in answer.items} == {*before}
        for s in answer.items: assert s.score == pytest.approx(before[s.item_id] + s.online, abs=2e-5) and s.online == pytest.approx(.25 + dict(i3=1.2, i7=-.9).get(s.item_id, 0), abs=1e-5)
        assert [s.score for s in answer.items] == sorted((s.score for s in answer.items), reverse=True)
        for level in (2, 3, 4):
            cheap = recommend(engine, q, "r", level)
            assert cheap.online == 0 and not any(s.online for s in cheap.items)
    said = rank(engine, Request(user_id="u1"), ["i3", "i7", "i9"], "r")
    assert said.online == 7 and {s.item_id: s.online for s in said.items} == pytest.approx({i: v for i, v in dict(i3=1.45, i7=-.65, i9=.25).items() if i in {s.item_id for s in said.items}})

def test_by_the_library_and_under_rules_the_same_is_added(shop, engine):
    from recsys.ranking.rules import Filter
    engine.layer = Layer(learned({"i:i3": 1.2, "c:A > B": -.5}, {"i5": {"i3": 3., "i9": 2.}} , ) , engine.bundle, BUDGET)
    q = Request(user_id="u2", cart=["i5"], n=BUDGET)
    scored = [(s.item_id, s.score, s.online) for s in recommend(engine, q, "r").items]
    ruled = recommend(engine, msgspec.structs.replace(q, filter=Filter()), "r").items
    assert [(s.item_id, s.online) for s in ruled] == [(i, o) for i, _, o in scored]
    engine.scorer = None
    assert [s.item_id for s in recommend(engine, q, "r").items] == [i for i, *_ in scored]

def test_what_followed_today_becomes_a_candidate_and_says_so(engine):
    asked = Request(cart=["i5"], n=500)
    there = {s.item_id for s in recommend(engine, asked, "r").items}
    new = next(i for k in range(N_ITEMS) if (i := f"i{k}") not in there | {"i5"} and engine.state.sellable[k])
    engine.layer = Layer(learned({"followed": 1.}, {"i5": {new: 30.}}), engine.bundle, BUDGET)
    found = {s.item_id: s for s in recommend(engine, asked, "r").items}
    assert found[new].source == ["live"] and found[new].reason == ["others went on to it today"] and found[new].online > 0
    assert new not in {s.item_id for s in recommend(engine, msgspec.structs.replace(asked, exclude=[new]), "r").items}
    engine.layer = None
    assert new not in {s.item_id for s in recommend(engine, asked, "r").items}

# ---- the parts

def test_what_is_added_is_bounded_whatever_was_learned(engine):
    layer = Layer(learned({"i:i3": LIMIT, "c:A > B": LIMIT, "followed": LIMIT}, {"i5": {"i3": 1e8}}), engine.bundle, BUDGET)
    assert np.abs(layer.shift).max() <= LIMIT
    moved = layer.moved(np.array([5], np.int32))
    assert np.abs(moved.shift[moved.near] + moved.lift).max() <= LIMIT + 1e-12

def test_links_fade_by_half_and_a_pause_ends_a_session():
    f = Followed(1000., 1800.)
    f.add("v", "a", 0.); f.add("v", "b", 0.); f.add("v", "b", 1.); f.add("v", "c", 4000.)
    assert f.links == {"a": {"b": 1.}}
    assert f.told(2000.) == {"a": {"b": pytest.approx(.25)}}
    assert followers({"a": {"b": 1., "c": 3.}, "z": {"b": 9.}}, ["z", "a"]) == pytest.approx({"b": np.log1p(10), "c": np.log1p(3)})
    for k in range(60_000): f.add(f"w{k}", f"x{k % 300}", 5000. + k); f.add(f"w{k}", f"y{k % 997}", 5000. + k)
    assert f.size == sum(map(len, f.links.values())) <= online.LINKS and len(f.people) <= online.PEOPLE

def test_weights_stay_bounded_and_few():
    w = Weights(.15, 10.)
    for k in range(online.FEATURES + 50): w.learn(1., {f"i:{k}": 1.})
    assert len(w.ftrl.z) <= online.FEATURES and len(w.w) <= online.FEATURES
    again = Weights(.15, 10., w.kept())
    assert again.kept() == w.kept() and all(np.isfinite(v) for v in again.w.values())

@pytest.mark.parametrize("mean", [0., -.05])
def test_the_guard_seldom_believes_in_what_does_not_help(mean):
    rng, believed = np.random.default_rng(3), 0
    for _ in range(30):
        g = Guard()
        for d in np.clip(rng.normal(mean, .3, 1500), -1, 1):
            g.add(d, 1., 1.); believed += g.helps >= online.HELPS
            if g.helps >= online.HELPS: break
    assert believed <= 1500 * 30 / online.HELPS + 3

# ---- a shop whose tastes change

def given(k, items, scores, at, who=None, added=[]): return Given(f"r{k}", at, "v1", "default", 0, online._Asked(), who or f"v{k % 500}", None, [(i, float(s), 1., []) for i, s in zip(items, scores)], added=list(added))
def event(kind, request, item, who, at, user=None, consent=True): return SimpleNamespace(event_type=kind, request_id=request, item_id=item, visitor_id=who, user_id=user, consent=consent, ts=at)

ITEMS = pl.DataFrame(dict(item_id=[f"i{k}" for k in range(40)], category=[f"c{k % 4}" for k in range(40)], price=[float(2 + k) for k in range(40)]))
CODES = {f"i{k}": k for k in range(40)}
BUNDLE = SimpleNamespace(items=ITEMS, item_codes=CODES, manifest=dict(version="v1"))
new_learner = lambda memory=None, s=SETTINGS: Learner("v1", Traits(ITEMS, CODES), s, memory)

def day(learner, lists, truth, seed=0, start=0, rest=6.):
    "Lists by a fixed ranker and what was learned, clicks by `truth`; expected clicks of each list without and with."
    rng, ranker, looked, out, layer = np.random.default_rng(seed), np.linspace(-2.5, -1, 40), np.arange(1, 7) ** -.7, [], None
    for k in range(start, start + lists):
        c, at = rng.choice(40, 20, replace=False), 1e9 + rest * k
        added = layer.shift[c] if layer else np.zeros(20)
        alone, best = np.argsort(-ranker[c])[:6], np.argsort(-ranker[c] - added)[:6]
        click = 1 / (1 + np.exp(-truth[c]))
        out.append((looked @ click[alone], looked @ click[best]))
        g = given(k, [f"i{j}" for j in c[best]], ranker[c[best]] + added[best], at, added=added[best] if layer else [])
        learner.see(g)
        for p in np.flatnonzero(rng.random(6) < looked * click[best]): learner.hear(event("click", g.request_id, g.items[p][0], g.visitor_id, at + 3))
        learner.ripen()
        if k % 10 == 0: layer = Layer(learner.published(), BUNDLE, 400) if learner.active else None
    return np.array(out)

def changed(): return np.linspace(-2.5, -1, 40) + np.where(np.arange(40) % 4 == 0, 1.5, np.where(np.arange(40) % 4 == 1, -1.5, 0))

def test_it_helps_when_something_changes_over_the_day():
    gains = []
    for seed in range(3):
        l = new_learner()
        day(l, 600, np.linspace(-2.5, -1, 40), seed)
        assert not l.active
        after = day(l, 1600, changed(), seed + 50, 600)
        gains.append(after[1000:, 1].sum() / after[1000:, 0].sum() - 1)
        assert [a for a, _ in l.acted] == ["active"]
    assert min(gains) > .05, gains

def test_it_does_not_move_when_there_is_nothing_to_learn():
    for seed in range(3):
        l = new_learner(); out = day(l, 1500, np.linspace(-2.5, -1, 40), seed)
        assert not l.active and not l.acted and (out[:, 0] == out[:, 1]).all()

def test_planted_poison_is_found_within_two_thousand_rows_and_cannot_come_back_at_once():
    for seed in range(3):
        l = new_learner(); day(l, 400, np.linspace(-2.5, -1, 40), seed)
        for k in range(40):  # everything that the ranker holds for good is held down, and what is bad is lifted
            l.layer.ftrl.z[f"i:i{k}"], l.layer.ftrl.n[f"i:i{k}"], l.layer.w[f"i:i{k}"] = (1e4, 1., -LIMIT) if k >= 20 else (-1e4, 1., LIMIT)
        l.active, l.guard, rows = True, Guard(), l.rows
        for k in range(400, 1000, 10):
            day(l, 10, np.linspace(-2.5, -1, 40), k, k)
            if l.resets: break
        assert l.resets == 1 and l.rows - rows < 2000 and not l.active and l.now < l.cool <= l.now + online.COOL
        assert l.acted[-1][0] == "reset" and max(map(abs, l.layer.w.values()), default=0) < LIMIT / 3
        l.guard.up[:] = 20; l._judge()
        assert not l.active, "it has to wait"
        l.now = l.cool; l._judge()
        assert l.active

def test_the_same_log_teaches_the_same_to_the_byte():
    made = []
    for _ in range(2):
        l = new_learner(); day(l, 500, changed()); made.append(msgspec.json.encode(l.published()))
    assert made[0] == made[1]

# ---- who counts

def taught(settings=SETTINGS, events=(), who="v", n=1, at=1e9, items=4, **more):
    l = new_learner(s=settings)
    for k in range(n): l.see(msgspec.structs.replace(given(k, [f"i{j}" for j in range(items)], range(items), at + k, who), **more))
    for e in events: l.hear(e)
    l.now = at + 10_000; l.ripen()
    return l

def test_one_visitor_teaches_little_and_a_robot_nothing():
    assert taught(n=500, who="v").rows == online.ROWS
    robot = [event("view", None, "i1", "v", 1e9 + k / 10) for k in range(SETTINGS.data.bot_events_per_minute + 2)]
    assert taught(n=20, events=robot).rows == 0 and taught(n=20, events=robot[:50]).rows > 0

def test_lists_that_say_nothing_of_the_ranker_are_left_out():
    assert taught().rows == 4
    for more in (dict(level=2), dict(kind="rank"), dict(teams=[0, 1, 0, 1]), dict(variant="shadow x:y"), dict(model_version="v0"), dict(request=online._Asked(consent=False)), dict(visitor_id=None)):
        assert taught(**more).rows == 0, more
    assert taught(model_version="v1~abc").rows == 4, "a version of the day"

def test_an_outcome_counts_for_its_own_visitor_within_the_window_and_also_when_it_comes_first():
    def outcome(early=False, late=False, who="v", kind="click", consent=True):
        l, g, found = new_learner(), given(0, ["i0", "i1"], (1, 0), 1e9, "v"), []
        l._lesson = lambda w, rows: found.append((list(w.y), rows))
        e = event(kind, "r0", "i1", who, 1e9 + 2, consent=consent)
        for step in ((lambda: l.hear(e)), (lambda: l.see(g))) if early else ((lambda: l.see(g)), (lambda: l.hear(e))): late or step()
        if late: l.see(g); l.now = 1e9 + 700; l.ripen(); l.hear(e)
        l.now = 1e9 + 700; l.ripen()
        return found[0]
    assert outcome() == outcome(early=True) == outcome(kind="purchase") == ([0, 1], [0, 1])
    assert outcome(late=True) == outcome(who="other") == outcome(consent=False) == ([0, 0], [0, 1])
    assert outcome(kind="impression") == ([0, 0], [1]), "where impressions are told, the rest was not seen"

# ---- the file, the journal, restarts

def test_a_broken_or_impossible_file_is_refused_in_a_line_and_the_ranker_serves(tmp_path, shop):
    write_learned(tmp_path, learned({"i:i3": 1.})); whole = learned_file(tmp_path).read_bytes()
    reader, bundle = Reader(tmp_path), current_bundle(shop/"bundles")
    assert reader.look() and reader.layer(bundle, BUDGET)
    for bad in (b"", b"{", whole[:-9], whole.replace(b"1.0", b"1.1", 1), b"\xff\n{}"):
        learned_file(tmp_path).write_bytes(bad)
        with pytest.raises(RecsysError, match="not what was learned online"): read_learned(tmp_path)
        assert reader.look() and reader.layer(bundle, BUDGET) is None
    for l in (learned({"i:i3": 1.6}), learned({}, {"a": {"b": -1.}}), msgspec.structs.replace(learned({}), slope=.01)):
        write_learned(tmp_path, l)
        with pytest.raises(RecsysError, match="beyond what can be learned"): read_learned(tmp_path)
    assert "beyond" in online_line(tmp_path)

def test_it_goes_on_after_a_restart_and_begins_anew_with_another_night_or_when_old(tmp_path):
    l = new_learner(); day(l, 1700, changed()); assert l.active
    publish(l, tmp_path)
    again = begun(tmp_path, BUNDLE, SETTINGS)
    assert again.active and again.layer.kept() == l.layer.kept() and again.base.kept() == l.base.kept() and (again.lists, again.until, again.number) == (l.lists, l.until, l.number)
    assert again.guard.helps == pytest.approx(l.guard.helps)
    publish(again, tmp_path)
    other = begun(tmp_path, SimpleNamespace(items=ITEMS, item_codes=CODES, manifest=dict(version="v2")), SETTINGS)
    assert not other.active and not other.layer.w and other.number == again.number
    publish(other, tmp_path)
    assert [(a.act, a.version) for a in read_acts(tmp_path)] == [("active", "v1"), ("gone on", "v1"), ("reset", "v2")]
    publish(l, tmp_path); os.utime(learned_file(tmp_path), (time.time() - 7 * 3600,) * 2)
    assert not begun(tmp_path, BUNDLE, SETTINGS).layer.w
    with acts_file(tmp_path).open("ab") as f: f.write(b'{"at": 1')  # a kill in the middle of a line
    l.acted = [("reset", "a test")]; publish(l, tmp_path)
    assert [a.act for a in read_acts(tmp_path)] == ["active", "gone on", "reset", "reset"] and "set back 2 times" in online_line(tmp_path)

def test_a_restart_in_the_middle_misses_no_list_and_learns_none_twice(tmp_path):
    folder = tmp_path/"data"/"served"/"day=2024-01-01"; folder.mkdir(parents=True)
    bundle_of(tmp_path); promote(tmp_path/"bundles", "v1")
    path, s = folder/"1.jsonl", settings_at(tmp_path)
    def write(ks):
        with path.open("ab") as f: f.write(b"".join(msgspec.json.encode(given(k, ["i1", "i2", "i3"], (3, 2, 1), 1e9 + 60 * k)) + b"\n" for k in ks))
    write(range(50)); first = Student(s, tmp_path/"bundles"); first.step(0)
    publish(first.learner, tmp_path/"data")
    write(range(50, 80))
    second = Student(s, tmp_path/"bundles"); second.step(0)
    whole = Student(s, tmp_path/"bundles"); learned_file(tmp_path/"data").unlink(); whole.step(0)
    assert second.learner.lists == whole.learner.lists == 80 - 10 and second.learner.until == whole.learner.until
    with path.open("ab") as f: f.write(b'{"half')
    second.step(20)
    with path.open("ab") as f: f.write(b'a line"}\n')
    write(range(80, 90)); second.step(40)
    assert second.learner.lists == 80 and len(second.learner.waiting) == 10

def test_whole_lines_of_growing_and_rewritten_files_are_read_once(tmp_path):
    folder = tmp_path/"served"/"day=2024-01-01"; folder.mkdir(parents=True)
    t, f = Tail(tmp_path), folder/"1.jsonl"
    f.write_bytes(b"a\nb\nc"); assert t.new() == [b"a", b"b"] and t.new() == []
    f.write_bytes(b"a\nb\ncd\ne\n"); assert t.new() == [b"cd", b"e"]
    (folder/"new").write_bytes(b"a\ncd\n"); os.replace(folder/"new", f)
    assert t.new() == []
    with f.open("ab") as g: g.write(b"f\n")
    (folder/"2.jsonl").write_bytes(b"g\n")
    assert t.new() == [b"f", b"g"]

# ---- the real service

def test_the_service_learns_takes_over_is_seen_and_starts_again(shop, monkeypatch):
    monkeypatch.setenv("RECSYS_ONLINE_LEARN", "true"); monkeypatch.setenv("RECSYS_ONLINE_WINDOW_MINUTES", "0.02")
    data = shop/"data"
    metrics = lambda port: urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    items = lambda said: [(s["item_id"], s["score"]) for s in said["items"]]
    question = dict(user_id="u3", visitor_id="w", n=10)
    with serving(shop, workers=2, shed_ms=5000, refuse_ms=60_000) as (server, port):
        plain = ask(port, body=question)[2]
        assert plain["online"] == 0 and "recsys_online_workers 0" in metrics(port)
        for k in range(40):
            said = ask(port, body=dict(user_id=f"u{k % 20}", visitor_id=f"v{k}", n=5))[2]
            events = [dict(event_id=f"e{k}", event_type="click", visitor_id=f"v{k}", item_id=said["items"][0]["item_id"], request_id=said["request_id"])]
            assert ask(port, path="/v1/events", body=dict(events=events))[2]["accepted"] == 1
        until(lambda: (l := read_learned(data)) and l.memory.lists >= 30 or ask(port, body=question)[0] != 200, 40)
        l = read_learned(data)
        assert not l.active and l.version == "v1" and l.memory.base
    write_learned(data, msgspec.structs.replace(l, active=True, weights={f"i:{plain['items'][-1]['item_id']}": LIMIT}, memory=msgspec.structs.replace(l.memory, active=True, layer={f"i:{plain['items'][-1]['item_id']}": (-1e4, 1.)})))
    with serving(shop, workers=2, shed_ms=5000, refuse_ms=60_000) as (server, port):
        until(lambda: all(ask(port, body=question)[2]["online"] for _ in range(8)), 20)
        said = ask(port, body=question)[2]
        assert said["items"][0]["item_id"] == plain["items"][-1]["item_id"] or said["items"][0]["score"] != plain["items"][0]["score"]
        until(lambda: "recsys_online_workers 2" in metrics(port), 10)
        assert int(metrics(port).split("\nrecsys_online_total ")[1].split()[0]) > 0
        until(lambda: any(a.act == "gone on" for a in read_acts(data)), 30)
        bundle_of(shop, "v2"); promote(shop/"bundles", "v2")
        until(lambda: any(a.act == "reset" and a.version == "v2" for a in read_acts(data)), 30)
        until(lambda: all((s := ask(port, body=question)[2])["online"] == 0 and s["model_version"] == "v2" for _ in range(8)), 20)
        promote(shop/"bundles", "v1")
    monkeypatch.setenv("RECSYS_ONLINE_LEARN", "false")
    write_learned(data, learned({"i:i3": LIMIT}))
    with serving(shop, shed_ms=5000, refuse_ms=60_000) as (_, port):
        assert items(ask(port, body=question)[2]) == items(plain), "switched off: the ranker's lists"
