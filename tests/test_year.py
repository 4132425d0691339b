"The simulated year: visitors who are the same whatever is sold, a clock that the service believes, shocks, findings and the judgement; a short year through the real service."
import json, os, signal, subprocess, sys, threading, time
from datetime import date, datetime, timedelta, timezone

import numpy as np
import polars as pl
import psutil
import pytest
from hypothesis import given, settings as how, strategies as st

from recsys.core.files import write_json
from recsys.core.settings import load_settings
from recsys.operations import bench_loop as bl, year as yr, year_operator as op
from recsys.operations.cli import main
from recsys.operations.figures import bench_page
from recsys.operations.registry import releases
from recsys.operations.simulated_clock import Clock
from shop import make_shop

TINY = yr.Plan(days=8, history=35, visits=60, items=60, users=80, hours=4)


@pytest.fixture(scope="module")
def project(tmp_path_factory): return load_settings(make_shop(tmp_path_factory.mktemp("year")/"shop")/"settings.ini")


def world(days: int, folder, plan=yr.Plan(days=6, history=2, visits=40, items=60, users=60)):
    w = yr.open_shop(plan)
    for day in range(plan.history + days): yr.begin_day(w, folder, day); coming = yr.visits_of(w, day)
    return w, coming


# ---- the world

def test_who_comes_and_with_what_luck_does_not_depend_on_what_is_shown(tmp_path):
    "The first page of a visit is asked for by the same people in the same places, before good lists and bad ones; and the next day is the same day."
    seen = []
    for pick in (slice(0, None), slice(None, None, -1)):
        w, coming = world(1, tmp_path)
        asked = []
        def ask(visits, questions):
            asked.append([(v.number, q["visitor_id"], q["placement"]) for v, q in zip(visits, questions)])
            return [(f"r{v.number}-{len(v.requests)}", w.names.item_ids[:-1][pick][:q["n"]]) for v, q in zip(visits, questions)]
        at = w.plan.midnight(0).timestamp()
        yr.play_hour(w, at, [yr.new_visit(w, n, at, p, b) for n, (_, p, b) in enumerate(coming)], ask, lambda e: None)
        yr.begin_day(w, tmp_path, w.plan.history + 1)
        seen.append((asked[0], coming, yr.visits_of(w, w.plan.history + 1), w.shelf.cents.tolist()))
    assert seen[0] == seen[1] and len(seen[0][0]) > 5


def test_the_best_list_is_the_best_by_brute_force(tmp_path):
    w, coming = world(1, tmp_path)
    worth, rng = np.empty(w.items), np.random.default_rng(0)
    for _, person, buying in coming[:10]:
        yr.worth_of(person, buying, w.shelf, w.people, w.knobs, worth)
        a = w.people.taste[person].astype(float) @ w.shelf.vector.T.astype(float)
        click = 1 / (1 + np.exp(-(w.shelf.lure + w.knobs.taste * a)))
        want = click * np.minimum(w.knobs.add[buying] * w.shelf.appeal * np.exp(.5 * w.knobs.taste * a), .9) * w.shelf.cents / 100
        assert worth == pytest.approx(want, rel=1e-5)
        best = np.sort(worth)[::-1][:6] @ w.knobs.seen[:6]
        assert all(worth[rng.choice(w.items, 6, replace=False)] @ w.knobs.seen[:6] <= best + 1e-9 for _ in range(50))


def test_events_name_the_list_they_came_from(tmp_path):
    w, coming = world(1, tmp_path)
    lists, got, at = {}, [], w.plan.midnight(0).timestamp()
    def ask(visits, questions):
        found = [(f"r{v.number}-{len(v.requests)}", w.names.item_ids[:q["n"]]) for v, q in zip(visits, questions)]
        lists.update(found); return found
    yr.play_hour(w, at, [yr.new_visit(w, n, at, p, b) for n, (_, p, b) in enumerate(coming)], ask, got.extend)
    shown = {(e["request_id"], e["position"]): e["item_id"] for e in got if e["event_type"] == "impression"}
    assert shown == {(r, k): i for r, ids in lists.items() for k, i in enumerate(ids, 1)}
    followed = [e for e in got if e["event_type"] in ("click", "purchase", "add_to_cart") and "request_id" in e]
    assert followed and all(shown[e["request_id"], e["position"]] == e["item_id"] for e in followed)
    assert len({e["event_id"] for e in got}) == len(got) and all(e["ts"] >= w.plan.midnight(0) for e in got)


def test_the_clock_is_believed_by_processes_that_are_spawned(tmp_path):
    "As the workers of the service are."
    clock = Clock(tmp_path/"clock", datetime(2024, 2, 29, tzinfo=timezone.utc).timestamp())
    code = "import sys, time; from recsys.operations.simulated_clock import Clock, believe; believe(Clock(sys.argv[1])); t = time.time(); m = time.monotonic(); time.sleep(.05); print(t == time.time(), time.monotonic() > m, t)"
    out = subprocess.run([sys.executable, "-c", code, str(clock.path)], capture_output=True, text=True, check=True).stdout.split()
    assert out == ["True", "True", str(clock.now())]


def test_each_hour_waits_until_the_service_has_kept_up(tmp_path):
    "Once, however often its visitors ask; here a thread keeps up, as the service's does."
    w, coming = world(1, tmp_path)
    at, stopped, beats = w.plan.midnight(0).timestamp(), threading.Event(), []
    clock = Clock(tmp_path/"clock", at)
    def keep_up():
        wait, then = Clock(clock.path).pace(stopped), Clock(clock.path)
        while not wait(.25): beats.append(then.now())
    thread = threading.Thread(target=keep_up); thread.start()
    try:
        for hour in range(2): yr.play_hour(w, at + 3600 * hour, [yr.new_visit(w, n, at, p, b) for n, (_, p, b) in enumerate(coming)], yr.oracle_of(w), lambda events: None, clock)
    finally: stopped.set(); thread.join()
    assert beats == [at] * 8 + [at + 3600] * 8 and clock.now() > at + 3600, "the last page of a visit is asked for later"


def test_the_service_ends_with_whoever_plays(tmp_path):
    "A player that is killed leaves no process behind."
    code = "import os, sys, time, threading; from recsys.operations.simulated_clock import _end_with; threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start(); print(os.getpid(), flush=True); time.sleep(60)"
    player = subprocess.Popen([sys.executable, "-c", f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {code!r}]); p.wait()"], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(player.stdout.readline()))
    player.kill(); player.wait()
    assert psutil.wait_procs([child], timeout=30)[1] == []


def test_a_feed_tells_each_change_once_and_never_the_future(tmp_path):
    plan = yr.Plan(days=30, history=2, visits=20, items=80, users=40)
    w, told, when = yr.open_shop(plan), {}, {}
    for day in range(plan.total):
        yr.begin_day(w, tmp_path, day)
        for r in yr.feed_of(w, day, told):
            assert told[r["item_id"]] == r and (r.get("available_to") is None or r["available_to"] <= w.start + timedelta(days=day))
            when.setdefault(r["item_id"], day)
        assert yr.feed_of(w, day, told) == []
    born = dict(zip(w.names.item_ids, w.things.born))
    assert all(day > born[i] for i, day in when.items()) and max(when.values()) > 2


# ---- findings

def counted(ctr, visitors: int = 120, seed: int = 0, familiar=None) -> op.Watch:
    "A watch that has seen days with these rates of clicks, and of looks at familiar products."
    w, rng = op.Watch.__new__(op.Watch), np.random.default_rng(seed)
    w.settings, w.windows, w.w, w.days = load_settings(), 14, op.draws(300), [date(2024, 1, 1) + timedelta(days=k) for k in range(len(ctr))]
    rows = []
    for day, p, q in zip(w.days, ctr, familiar or [.6] * len(ctr)):
        shown = rng.poisson(14, visitors) + 1
        clicks, bucket = rng.binomial(shown, np.clip(rng.gamma(4, p / 4, visitors), 0, 1)), rng.integers(0, 64, visitors)
        own = rng.poisson(2, visitors)
        known = rng.binomial(own, q)
        rows += [dict(day=day, bucket=b) | {n: float(x[bucket == b].sum()) for n, x in dict(impressions=shown, clicks=clicks, own=own, familiar=known).items()} for b in np.unique(bucket)]
    w.sums = pl.DataFrame(rows)
    return w


def last(ctr, released=None, seed: int = 0, familiar=None):
    w = counted(ctr, seed=seed, familiar=familiar)
    return op.liked(w, w.days[-1] + timedelta(days=1), None if released is None else w.days[-1] - timedelta(days=released))


def test_a_collapse_after_a_release_is_the_models_and_one_without_is_the_peoples():
    assert [f.kind for f in last([.08] * 30 + [.03], released=0)] == ["quality"]
    assert [f.kind for f in last([.08] * 30 + [.045] * 2)] == ["concept"]
    assert [(f.kind, f.where) for f in last([.08] * 30 + [.04] * 2, released=0)] == [("concept", "click")], "they had stopped clicking before the release"
    assert not any(last([.08] * 30 + [.062] * 2, seed=k) for k in range(5)), "a fall of a fifth is no change of taste, for certain or not"
    assert [(f.kind, f.where) for f in last([.08] * 30, released=1, familiar=[.6] * 28 + [.3] * 2)] == [("concept", "demand")]
    assert last([.08] * 20 + [.02]) == []  # too few days to know what is usual


def looks(day: date, visitors: list[str], first: int, n: int, rng) -> pl.DataFrame:
    "Three looks of each visitor, without a list, at `n` items from `first` on, the first of them the most popular; and one from a list."
    popular = 1 / np.arange(1, n + 1)
    rows = [dict(visitor_id=v, event_type="view", request_id=r, item_id=f"i{first + k}") for v in visitors for r, k in zip((None, None, None, "list"), rng.choice(n, 4, p=popular / popular.sum()))]
    return pl.DataFrame(rows, schema=dict(visitor_id=pl.String, event_type=pl.String, request_id=pl.String, item_id=pl.String))

def test_what_strangers_look_at_is_no_change_of_demand():
    "They come for other things, and are regulars four weeks later, whose earlier looks count by then; what regulars look at is a change on its first day."
    w, rng, began = op.Watch.__new__(op.Watch), np.random.default_rng(0), date(2024, 1, 1)
    w.met, w.came, told = [], {}, []
    for k in range(70):
        day = began + timedelta(days=k)
        events = looks(day, [f"r{v}" for v in range(50)], 100 if k == 69 else 0, 100, rng)
        if k >= 35: events = pl.concat([events, looks(day, [f"s{v}" for v in range(50)], 50, 100, rng)])
        said = op.demand_sums(w, events, day).select(pl.col("own", "familiar").sum()).row(0)
        told.append((said[0], said[1] / said[0]))
    assert [n for n, _ in told] == [150.] * 63 + [300.] * 7
    share = [s for _, s in told]
    assert share[0] == 0 and min(share[5:69]) > .5 and abs(np.mean(share[35:63]) - np.mean(share[10:35])) < .05
    assert share[69] < .5 * np.mean(share[5:63])


def test_quiet_days_are_quiet():
    "False alarms of both questions on 150 windows without any change."
    hits = sum(bool(last([.08] * 32, released, seed)) for seed in range(75) for released in (None, 1))
    assert hits <= 3


@how(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_a_catalogue_is_whole_or_it_is_found(priced, bare):
    items = pl.DataFrame(dict(item_id=[f"i{k}" for k in range(priced + bare + 1)], price=[1.] * (priced + 1) + [None] * bare, category=["A"] * (priced + bare + 1), available_to=[None] * (priced + bare + 1)),
        schema_overrides=dict(available_to=pl.Datetime("us", "UTC")))
    found = op.whole_catalogue(load_settings(), items, datetime(2024, 1, 1, tzinfo=timezone.utc))
    assert bool(found) == ((priced + 1) / (priced + bare + 1) < .98)
    assert all((f.kind, f.where, f.severity) == ("attribution", "catalogue.priced", "critical") for f in found)


# ---- the judgement

def year_of(days: int, seen=(), decided=()) -> dict:
    dates = [str(date(2024, 1, 1) + timedelta(days=k)) for k in range(days)]
    return dict(policy="loop", days=[dict(day=k, date=d, revenue=100., worth=1., lists=10, degraded=0, version="v") for k, d in enumerate(dates)], findings=[dict(kind=k, where=w, seen=n) for n, k, w in seen],
        decisions=[dict(day=dates[n], action=a, because="") for n, a in decided], nights=[], failed_requests=0)


def test_a_shock_is_found_by_its_own_sign_only_and_judged_by_what_follows():
    s = bl.Shock("bots", 10, 2, 12.)
    assert bl.fate_of(s, year_of(60, [(9, "pipeline", "robots"), (12, "data", "price"), (30, "pipeline", "robots")]))["found"] is False
    fate = bl.fate_of(s, year_of(60, [(11, "pipeline", "robots")], [(8, "retrain"), (11, "nothing"), (12, "ask")]))
    assert (fate["found"], fate["delay_days"], fate["decision"], fate["right"]) == (True, 1, "ask", True)


def test_a_false_alarm_on_the_morning_of_a_shock_finds_nothing():
    "That morning looked at the day before. The feed is looked at as it is delivered."
    for kind, sign in bl.SIGNS.items():
        what, _, where = sign.partition(":")
        on_day, next_day = (bl.fate_of(bl.Shock(kind, 10, 2, 1.), year_of(60, [(n, what, where)])) for n in (10, 11))
        assert on_day["found"] == (kind == "feed") and next_day["found"] and next_day["delay_days"] == 1


def test_contained_means_that_answers_changed():
    def fate(kind, **of_days):
        y = year_of(60, [(11, *bl.SIGNS[kind].split(":"))])
        for n, more in of_days.items(): y["days"][int(n[1:])] |= more
        return bl.fate_of(bl.Shock(kind, 10, 3, 1.), y)["contained"]
    assert fate("feed") is False and fate("feed", d11=dict(degraded=9)) is False and fate("feed", d11=dict(degraded=10)) is True
    assert fate("model", d11=dict(first_versions=["v", "w-bad"])) is False and fate("model", d11=dict(first_versions=["w-bad"], degraded=10)) is True
    assert fate("model", d11=dict(version="w-bad", first_versions=["v"])) is True                       # the majority of the day does not matter
    assert fate("model", d11=dict(version="w-bad")) is True and fate("model", d12=dict(version="w-bad")) is False # an account without the hour
    assert fate("outage") is None


@pytest.mark.parametrize("low, high, kept", [(.96, .99, True), (.95, .96, True), (.93, .98, None), (.90, .94, False)])
def test_a_promise_is_kept_only_by_its_whole_interval(low, high, kept):
    f = bl.whole(dict(loop=year_of(60)), yr.Plan(days=60), bl.script_of(60)) | dict(revenue_vs_daily=.97, revenue_vs_daily_interval=[low, high], revenue_vs_daily_days=60)
    assert next(p for p in bl.promised(f) if "with hindsight" in p["promise"])["kept"] is kept


def test_actions_on_quiet_days_are_false_and_those_near_a_shock_are_not():
    s = bl.Shock("bots", 10, 2, 12.)
    y = year_of(60, (), [(9, "retrain"), (10, "ask"), (12 + bl.AFTER, "retrain"), (13 + bl.AFTER, "refresh"), (40, "nothing")])
    assert [(f["day"], f["action"]) for f in bl.false_actions([s], y)] == [(9, "retrain"), (13 + bl.AFTER, "refresh")]


@how(max_examples=40, deadline=None)
@given(st.lists(st.floats(1, 1000), min_size=20, max_size=60), st.floats(.5, 2))
def test_the_ratio_of_a_year_to_its_multiple_is_exact(revenue, times):
    ours, theirs = ([dict(revenue=x * t) for x in revenue] for t in (times, 1.))
    r = bl.ratio(ours, theirs, draws=200)
    assert r["value"] == pytest.approx(times) and r["low"] == pytest.approx(times) and r["high"] == pytest.approx(times)


def test_its_interval_covers_what_is_true():
    rng, inside = np.random.default_rng(1), 0
    for seed in range(100):
        base = rng.gamma(3, 100, 140)
        ours, theirs = ([dict(revenue=x) for x in base * rng.gamma(50, m / 50, 140)] for m in (1.05, 1.))
        r = bl.ratio(ours, theirs, draws=300, seed=seed)
        inside += r["low"] <= 1.05 <= r["high"]
    assert inside >= 85


@pytest.mark.parametrize("ndcg, high, published", [(.2, -.05, True), (.15, -.19, True), (.05, -.21, False)])
def test_a_night_is_refused_only_if_it_is_broken(ndcg, high, published, project, tmp_path, monkeypatch):
    "The best baseline has .4; worse than that is no reason, less than half of it for certain is one."
    asked = []
    monkeypatch.setattr(op, "publish", lambda *args: asked.append(args) or (_ for _ in ()).throw(InterruptedError))
    night = op.Night("2024-01-01", ndcg=ndcg, best=.4, low=high - .1, high=high)
    try: said = op.publish_night(op.year_settings(project, tmp_path/"shop"), night, {}, "tried").said
    except InterruptedError: said = "was to be published"
    assert night.passed is published and bool(asked) is published and (published or "refused by the gate" in said)


def test_shocks_are_spread_over_any_year_and_none_is_lost():
    for days in (7, 12, 100, 365): assert [s.kind for s in bl.script_of(days)] == [k for k, *_ in bl.SCRIPT] and all(0 < s.day < days for s in bl.script_of(days))


@pytest.mark.parametrize("given, said", [(["--days", "3"], "play 7 or more"), (["--daily-days", "0"], "play 1 day or more"), (["--visits", "0"], "play 1 visit or more")])
def test_what_cannot_be_played_is_said_in_one_line(given, said, project, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RECSYS_SETTINGS", project.file)
    assert main(["bench", "loop", "--out", str(tmp_path/"f.json"), *given]) == 1
    out = capsys.readouterr()
    assert said in out.err and len(out.err.strip().splitlines()) == 1 and not (tmp_path/"f.json").exists() and not (tmp_path/"f.json.years").exists()


# ---- a short year through the real service

def test_a_short_year_before_the_real_service(project, tmp_path):
    "Outage, broken feed and bad model in eight days: found, decided, contained; no request fails; the log of decisions is what was told."
    script = [bl.Shock("outage", 1, 1, .9), bl.Shock("feed", 3, 2, .5), bl.Shock("model", 7, 1, 1.)]
    y = bl.run_year("loop", TINY, project, tmp_path/"loop", script)
    assert y["failed_requests"] == 0 and not y["refused"] and len(y["days"]) == 8 and sum(d["clicks"] for d in y["days"]) > 50
    outage, feed, model = (bl.fate_of(s, y) for s in script)
    assert (outage["found"], outage["delay_days"], outage["right"]) == (True, 1, True)
    assert (feed["found"], feed["delay_days"], feed["right"], feed["contained"]) == (True, 0, True, True)
    assert all(n["gate"].partition(":")[0] in ("first", "passed", "refused") and 0 < n["gate_cpu"] < n["cpu"] for n in y["nights"] if n["passed"]), "asked each night, and not obeyed"
    again = bl.run_year("loop", TINY, project, tmp_path/"again", script)
    assert all(again[what] == y[what] for what in ("days", "findings", "decisions", "actions")), "the same year once more, whatever the machine does"
    s = op.year_settings(project, tmp_path/"loop")
    lists = [json.loads(l) for p in sorted((s.data_dir/"served").rglob("*.jsonl")) for l in p.read_text().splitlines()]
    assert sum(d["lists"] for d in y["days"]) == sum(r["request_id"].startswith("visit-") for r in lists), "the player names the requests: what is explored depends on it"
    drawn = [sum(chance < 1 for _, _, chance, _ in r["items"]) for r in lists]
    assert drawn and set(drawn) == {2}, "the shop explores two places of each list, and the log says how likely they were"
    kept = [json.loads(l) for l in (s.data_dir/"decisions.jsonl").read_text().splitlines()]
    assert [d["action"] for d in kept] == [d["action"] for d in y["decisions"]] and len(kept) == 7
    assert [r.version.endswith("-bad") for r in releases(s)][-1] and y["days"][-1]["version"].endswith("-bad")
    fell = next(a["day"] for a in y["actions"] if a["what"] == "fallback")
    assert y["days"][fell]["degraded"] >= .95 * y["days"][fell]["lists"] and y["days"][0]["degraded"] == 0
    assert all(len(d["first_versions"]) >= 1 for d in y["days"]) and y["days"][-1]["first_versions"][-1].endswith("-bad")
    said = bl.whole(dict(loop=y, oracle=bl.run_year("oracle", TINY, project, tmp_path/"oracle", script)), TINY, script) | dict(measured="2024-01-01T00:00:00+00:00", seconds=1.)
    write_json(tmp_path/"f.json", said)
    page = bench_page("loop", project, [tmp_path/"f.json"]).read_text()
    assert "Every figure on this page is simulated" in page and "What was promised" in page and "not measured" in page and all(d["date"] in page for d in y["days"]) and len(page) < 1_500_000
    assert said["revenue_vs_oracle"] < 1 and said["failed_requests"] == 0 and said["shocks_planted"] == 3 and said["training_cost_vs_daily"] is None


# ---- years that fail

def test_figures_of_years_that_are_missing_are_null():
    for years in ({}, dict(never=year_of(9)), dict(loop=year_of(9)), dict(loop=year_of(9), never=year_of(9), daily=year_of(9), oracle=year_of(9))):
        said = bl.whole(years, yr.Plan(days=9), bl.script_of(9), dict(daily="x"))
        assert said["failed"] == dict(daily="x") and json.loads(json.dumps(said)) and bl.in_short(said | dict(seconds=1., earlier=[]))
        for other in ("never", "daily", "oracle"): assert (said[f"revenue_vs_{other}"] is None) == (said[f"revenue_vs_{other}_interval"] is None) == (not {"loop", other} <= years.keys())
        assert (said["shocks_found"] is None) == ("loop" not in years) and (said["failed_requests"] is None) == (not years)


def test_a_year_whose_process_is_killed_takes_no_other_with_it_and_is_played_again(project, tmp_path):
    "The others are written down and judged, the exit code says it; the second call plays only what failed, and refuses years of other arguments or code."
    out, home = tmp_path/"f.json", tmp_path/"f.json.years"
    def bench(seed="1"): return subprocess.Popen([sys.executable, "-c", "from recsys.operations.cli import main; main()", "bench", "loop", "--out", str(out), "--days", "7", "--visits", "20", "--daily-days", "2", "--seed", seed],
        env=os.environ | dict(RECSYS_SETTINGS=project.file), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    p = bench()
    while not (home/"daily.log").exists() or "process" not in (home/"daily.log").read_text(): assert p.poll() is None; time.sleep(.05)
    os.kill(int((home/"daily.log").read_text().split()[-1]), signal.SIGKILL)
    told, errors = p.communicate(timeout=300)
    assert p.returncode == 1 and len(errors.strip().splitlines()) == 1 and "the year of 'daily' was not played to its end: its process was killed" in errors, errors
    said = json.loads(out.read_text())
    assert list(said["failed"]) == ["daily"] and said["revenue_vs_daily"] is None and said["training_cost_vs_daily"] is None and said["revenue_vs_never"] > 0 and sorted(said["years"]) == ["loop", "never", "oracle"]
    assert "of never retraining" in told and "daily" not in told.partition("Look at")[0]

    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for n in said["years"] for f in [home/f"{n}.json"]}
    p = bench()
    told, errors = p.communicate(timeout=300)
    now = json.loads(out.read_text())
    assert p.returncode == 0 and not errors and "without the years that were there: loop, never, oracle" in told
    assert now["failed"] == {} and now["training_cost_vs_daily"] is not None and len(now["years"]["daily"]["days"]) == 2 and {k: now["years"][k] for k in said["years"]} == said["years"]
    assert all((f.stat().st_mtime_ns, f.read_bytes()) == was for f, was in before.items())

    p = bench(seed="2")
    assert "there are years already, of another plan" in p.communicate(timeout=60)[1] and p.returncode == 1
    made = json.loads((home/"made_by.json").read_text())
    write_json(home/"made_by.json", made | dict(code="0" * 16))
    p = bench()
    assert "there are years already, of another code" in p.communicate(timeout=60)[1] and p.returncode == 1 and json.loads(out.read_text()) == now


def test_a_year_that_raises_is_told_in_one_line_and_its_trace_is_kept(project, tmp_path):
    "Here its folder cannot be written, since a file is in its way."
    home = tmp_path/"years"; home.mkdir()
    (home/"never").write_text("")
    said = bl._play("never", TINY, project.file, str(home/"never"), [], 1)
    assert "never" in said and "\n" not in said and "Traceback" in (home/"never.log").read_text() and not (home/"never.json").exists()
