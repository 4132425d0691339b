"Which version serves, and how to go back: commands in any order, a process killed at any moment, a service under load."
import os, re, subprocess, sys, threading, time
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from recsys.core.files import write_json
from recsys.core.settings import Paths, RecsysError, load_settings
from recsys.operations.gate import Gate, write_gate
from recsys.operations.publish import release
from recsys.operations.registry import finish, gate_file, history_file, kept, on_trial, promote, releases, roll_back, serving as now_serving, targets, trial_name, withdrawn
from recsys.operations.runner import prune
from recsys.serving import bundle
from recsys.serving.service import Service, start
from shop import ROOT, recsys, settings_text
from test_serving import ask, publish, tables
from test_service import hammer, until

def place(folder, versions=5):
    "Settings of a folder with some empty versions."
    s = msgspec.structs.replace(load_settings(ROOT/"settings.ini"), paths=Paths(str(folder/"data"), str(folder/"reports")))
    for k in range(versions):
        write_json(s.data_dir/"bundles"/f"v{k}"/"manifest.json", dict(version=f"v{k}", files={}))
        os.utime(s.data_dir/"bundles"/f"v{k}"/"manifest.json", (k, k)); os.utime(s.data_dir/"bundles"/f"v{k}", (k, k))
    return s

# ---- what a run does with a trial

def test_a_run_leaves_to_the_operator_what_is_on_trial(tmp_path):
    "Neither a run that finds nothing new nor one that is done again ends a trial, or sets its share back; and what was rolled back stays so, whatever a flag says."
    s = place(tmp_path)
    def step(version, champion):
        folder = tmp_path/f"publish-{version}"; folder.mkdir(exist_ok=True)
        write_gate(Gate("passed", "all checks passed", version, champion), s, folder)
        return folder
    promote(s, "v1"); promote(s, "v2", "share", "a look", .5)
    before = releases(s)
    assert "v1 serves" in release(step("v1", "v0"), s, "a run") and "on trial" in release(step("v2", "v1"), s, "a run")
    assert releases(s) == before and on_trial(s) == "v2"
    roll_back(s, "fewer clicks")
    for anyway in (False, True): assert "stays so" in release(step("v2", "v1"), s, "a run", anyway)
    assert now_serving(s) == "v1" and on_trial(s) is None

# ---- any commands in any order

commands = st.lists(st.one_of(
    st.tuples(st.just("promote"), st.integers(0, 4), st.sampled_from(["all", "share", "shadow"])), st.tuples(st.just("back"), st.none() | st.integers(0, 4), st.just("")),
    st.tuples(st.just("prune"), st.none(), st.just(""))), max_size=14)

@hypothesis_settings(max_examples=60)
@given(asked=commands)
def test_a_model_of_three_names_says_what_the_registry_does(tmp_path_factory, asked):
    "The model: what serves, what is on trial, what was withdrawn. Whatever a rollback may go to survives every clearing up."
    s, now, trial, gone, served = place(tmp_path_factory.mktemp("r")), None, None, set(), []
    for what, k, stage in asked:
        there, before = set(bundle.versions(s.data_dir/"bundles")), releases(s)
        try:
            if what == "promote":
                r = promote(s, f"v{k}", stage, "w")
                assert f"v{k}" in there and (stage == "all" or now not in (None, f"v{k}"))
                gone.discard(f"v{k}")
                if stage == "all": now, trial = f"v{k}", None; served.append(now)
                else: trial = f"v{k}"
            elif what == "back":
                may, want = targets(s, before), None if k is None else f"v{k}"
                r = roll_back(s, "w", want)
                if want is None and trial: gone.add(trial)
                else:
                    assert r.version == (want or may[0])
                    gone.add(now); now = r.version; gone.discard(now); served.append(now)
                trial = None
            else:
                needed = kept(s)
                assert not set(prune(s)) & needed and needed <= set(bundle.versions(s.data_dir/"bundles"))
        except RecsysError:
            assert releases(s) == before # a refusal changes nothing
        assert (now_serving(s), on_trial(s)) == (now, trial) and set(withdrawn(releases(s))) == gone - {None}
        assert releases(s)[:len(before)] == before and not (s.data_dir/".release.next").exists()
        assert all(v in served and v != now and v not in gone for v in targets(s, releases(s)))

def test_a_version_that_may_be_rolled_back_to_is_not_removed(tmp_path):
    s = place(tmp_path, 9)
    for k in range(3): promote(s, f"v{k}")
    for k in range(3, 9): os.utime(s.data_dir/"bundles"/f"v{k}", (100 + k, 100 + k))
    assert prune(s) == ["v3", "v4", "v5"] # the newest three of what nobody needs stay as well
    assert roll_back(s, "w").version == "v1" and roll_back(s, "w").version == "v0"
    with history_file(s).open("ab") as f: f.write(b"nonsense\n")
    for k in range(6, 9): os.utime(s.data_dir/"bundles"/f"v{k}", (1, 1))
    assert prune(s) == [] # who cannot read the history removes nothing
    with pytest.raises(RecsysError, match="not a release"): promote(s, "v1")

def test_what_is_wrong_is_told_and_changes_nothing(tmp_path):
    s = place(tmp_path)
    promote(s, "v0")
    write_json(gate_file(s, "v1"), dict(verdict="refused", sentence="worse")); (s.data_dir/"bundles"/"v2"/"extra").write_text("x")
    for wrong, what in ((("v9",), "no version 'v9'"), (("v1",), "the gate refused version v1: worse"), (("v2",), "extra is not what the manifest says"), (("v0", "share"), "cannot be tried beside v0"),
                        (("v3", "half"), "no stage 'half'"), (("v3", "share", "w", 1.5), "share = 1.5")):
        with pytest.raises(RecsysError, match=re.escape(what)): promote(s, *wrong)
    with pytest.raises(RecsysError, match="no version has served before"): roll_back(s, "w")
    assert len(releases(s)) == 1 and now_serving(s) == "v0" and sorted(p.name for p in s.data_dir.iterdir()) == [".releases.lock", "bundles", "gates", "releases.jsonl"]

def test_a_release_waits_for_an_experiment_with_engines_of_its_own(tmp_path):
    s = place(tmp_path)
    promote(s, "v0")
    (tmp_path/"e.toml").write_text('[[experiment]]\nname = "wide"\nowner = "team"\nhypothesis = "more is better"\nprimary = "ctr"\nminimum_effect = 0.1\nramp = [[2020-01-01, 1.0]]\n'
                                   'variant = [{ name = "control" }, { name = "wide", budget = 300 }]\n')
    s = msgspec.structs.replace(s, experiments=msgspec.structs.replace(s.experiments, file=str(tmp_path/"e.toml")))
    with pytest.raises(RecsysError, match="both change bundle"): promote(s, "v1", "share")
    assert on_trial(s) is None and not list(s.data_dir.glob(".release*.t*"))

# ---- killed

WORK = """
import sys, msgspec
from recsys.core.settings import Paths, load_settings
from recsys.operations.registry import promote, roll_back
data, ini = sys.argv[1:]
s = msgspec.structs.replace(load_settings(ini), paths=Paths(data, data + "/reports"))
print("go", flush=True)
for k in range(10**6):
    promote(s, f"v{k % 4 + 1}", ("shadow", "share", "all")[k % 3], f"{k}")
    if k % 5 == 4: roll_back(s, f"{k} was bad")
"""

def killed(tmp_path, kills):
    "Kill a busy process again and again; after each, what was begun is finished, once."
    s, rng = place(tmp_path), np.random.default_rng(0)
    promote(s, "v0", why="first")
    for n in range(kills):
        p = subprocess.Popen([sys.executable, "-c", WORK, str(s.data_dir), str(ROOT/"settings.ini")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        p.stdout.readline()
        time.sleep(rng.uniform(0, .25)); p.kill(); p.communicate()
        known = releases(s)
        begun = finish(s)
        found = releases(s)
        assert found[:len(known)] == known and len(found) - len(known) <= 1 and (begun is None or found[-1] == begun)
        assert all(a != b for a, b in zip(found, found[1:])), "nothing stands twice"
        last = found[-1]
        assert on_trial(s) == (last.version if last.stage != "all" else None)
        assert now_serving(s) == (last.version if last.stage == "all" else last.before)
        assert finish(s) is None
    assert len(found) > 2, "it was killed while it worked"

def test_a_killed_command_is_finished_by_the_next(tmp_path): killed(tmp_path, 8)

@pytest.mark.bench
def test_many_killed_commands(tmp_path): killed(tmp_path, 200)

# ---- a service under load

@pytest.fixture
def live(tmp_path):
    "Two versions, v1 serving, in a folder of the command line's shape."
    publish(tmp_path); publish(tmp_path, "v2", tables(seed=7))
    (tmp_path/"data").mkdir(exist_ok=True); (tmp_path/"bundles").rename(tmp_path/"data"/"bundles")
    (tmp_path/"settings.ini").write_text(settings_text())
    return load_settings(tmp_path/"settings.ini")

SERVE = "import sys; from recsys.core.settings import load_settings; from recsys.serving.app import serve; s = load_settings(sys.argv[1]); serve(s, s.data_dir/'bundles', '127.0.0.1', 0)"

@contextmanager
def serving_at(s, workers=1):
    "The port of a server in a process of its own."
    server = subprocess.Popen([sys.executable, "-c", SERVE, s.file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(RECSYS_SERVING_SHED_MS="5000", RECSYS_SERVING_REFUSE_MS="60000", RECSYS_SERVING_WORKERS=str(workers)))
    try:
        line = server.stdout.readline()
        assert line.startswith("serving"), server.stderr.read()
        yield int(line.rpartition(":")[2])
    finally:
        server.terminate(); server.communicate(timeout=30)

def rolled_back_under_load(s, times):
    "Seconds from the command to the last answer of the version that was taken away, for each time; and what failed."
    promote(s, "v1", why="first")
    class Timed(list):
        def append(self, x): super().append((time.monotonic(), *x))
    stop, answers, failures, took = threading.Event(), Timed(), [], []
    steady = lambda v: until(lambda: (n := len(answers)) > 40 and {a[1] for a in answers[n - 40:]} == {v}, 60)
    with serving_at(s, 2) as port:
        threads = [threading.Thread(target=hammer, args=(port, stop, answers, failures)) for _ in range(2)]
        for t in threads: t.start()
        for n in range(times):
            promote(s, "v2", why=f"try {n}"); steady("v2")
            at = time.monotonic()
            roll_back(s, f"bad {n}"); steady("v1")
            took.append(max(t for t, v, _ in answers if v == "v2") - at)
        stop.set()
        for t in threads: t.join()
    return took, failures, len(answers)

def test_going_back_under_load_fails_nobody(live):
    took, failures, n = rolled_back_under_load(live, 1)
    assert not failures and n > 80

def test_going_back_opens_nothing(live):
    "The engine of the version before is the one that had been put aside; then the rollback is taken back, and it is the other."
    promote(live, "v1", why="first")
    service = Service(live, live.data_dir/"bundles")
    start(service)
    try:
        first = service.engine
        promote(live, "v2", why="new"); until(lambda: service.engine is not first, 60)
        second = service.engine
        roll_back(live, "bad"); until(lambda: service.engine is first, 60)
        assert service.before is second
        promote(live, "v2", why="not so bad"); until(lambda: service.engine is second, 60)
    finally: service.close()

@pytest.mark.bench
def test_how_long_going_back_takes(live):
    took, failures, n = rolled_back_under_load(live, 20)
    print(f"{n:,} requests, {len(failures)} failed; rollbacks: median {np.median(took):.2f} s, largest {max(took):.2f} s")
    assert not failures and max(took) < 1

def test_a_share_sees_the_new_version_and_a_shadow_is_only_logged(live, monkeypatch):
    promote(live, "v1", why="first")
    with serving_at(live) as port:
        seen = lambda: {ask(port, body=dict(visitor_id=f"w{k}", cart=["i4"]))[2]["variant"] for k in range(40)}
        of = lambda: [ask(port, body=dict(visitor_id=f"w{k}", cart=["i4"]))[2]["model_version"] for k in range(100)]
        assert seen() == {"default"}
        promote(live, "v2", "share", "half of them", .5)
        until(lambda: seen() == {f"{trial_name(releases(live)[-1])}:{v}" for v in ("before", "new")}, 60)
        got = of()
        assert 30 < got.count("v2") < 70 and set(got) == {"v1", "v2"} and got == of() # everybody stays where they are
        promote(live, "v2", "shadow", "first in the dark", .5)
        until(lambda: set(of()) == {"v1"}, 60)
        until(lambda: any(f'"shadow {trial_name(releases(live)[-1])}:new"'.encode() in p.read_bytes() for p in (live.data_dir/"served").rglob("*.jsonl")), 60)
        roll_back(live, "enough"); until(lambda: seen() == {"default"}, 60)
        promote(live, "v2", why="all"); until(lambda: set(of()) == {"v2"}, 60)

# ---- as a person types it

def test_the_commands(tmp_path):
    (tmp_path/"settings.ini").write_text(settings_text())
    place(tmp_path, 3)
    said = lambda *args: recsys(tmp_path, *args)
    assert said("promote", "v0", "--why", "first").returncode == 0
    r = said("promote", "v1", "--stage", "share", "--share", "0.2", "--why", "a try")
    assert r.returncode == 0 and "share, 20% of the visitors, instead of v0" in r.stdout
    assert "on trial: v1" in said("releases").stdout
    assert "v0 serves all; v1 is withdrawn" in said("rollback", "--why", "worse").stdout
    r = said("rollback", "--why", "worse")
    assert r.returncode == 1 and r.stderr.startswith("recsys: ") and "no version has served before" in r.stderr and r.stderr.count("\n") == 1
    assert said("promote", "v1").returncode == 1 # why?
    assert said("releases").stdout.count("\n") == 4
