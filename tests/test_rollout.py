"The ramp of a release: what a run may move, what it must leave alone, and what is never thrown together."
import msgspec
import pytest

from recsys.core.settings import RecsysError, load_settings
from recsys.experiments.analysis import Compared, Decision
from recsys.operations import rollout
from recsys.operations.alerts import listing
from recsys.operations.gate import Gate, write_gate
from recsys.operations.publish import release
from recsys.operations.registry import history_file, on_trial, promote, releases, roll_back, serving, trial_name, withdrawn
from shop import ROOT
from test_registry import place

LADDER = ("shadow:0.1", "share:0.1", "share:0.5", "all")

@pytest.fixture
def s(tmp_path):
    "A shop with a ramp, v1 before everybody, v2 in the shadow."
    s = place(tmp_path)
    s = msgspec.structs.replace(s, release=msgspec.structs.replace(s.release, steps=LADDER))
    promote(s, "v1"); promote(s, "v2", "shadow", "a run", .1)
    return s

def compared(metric, relative, low, high, p=.001): return Compared(metric, "new", None, 9000, 1., 1 + relative, relative, low, high, low, high, p, p, .01, False, p)

def says(monkeypatch, answer, *primary, others=(), first=lambda: None):
    "What the analysis of the logs finds, and what happens meanwhile."
    def judge(settings, r, ingested): first(); return Decision(answer, f"it is {answer}", [], 2., None, None, list(primary), list(others))
    monkeypatch.setattr(rollout, "judge", judge)

def test_without_harm_it_climbs_to_all_and_each_step_is_an_experiment_of_its_own(s, monkeypatch):
    says(monkeypatch, "open", compared("ctr", .01, -.02, .04))
    names = [trial_name(releases(s)[-1])]
    for to in ("share, 10%", "share, 50%"):
        assert to in rollout.advance(s, "x") and serving(s) == "v1" and on_trial(s) == "v2"
        names.append(trial_name(releases(s)[-1]))
    assert "all visitors" in rollout.advance(s, "x") and (serving(s), on_trial(s)) == ("v2", None)
    assert rollout.advance(s, "x") is None
    assert all(n.startswith("release-v2-20") and (a := releases(s)[k + 1].at) and n.endswith(a[:19].translate({ord(c): None for c in "-:T"})) for k, n in enumerate(names))

@pytest.mark.parametrize("c", [compared("latency_ms", .8, .6, .99), compared("ctr", -.05, -.08, -.03), compared("revenue", -.2, -.3, -.1)], ids=lambda c: c.metric)
def test_what_does_harm_goes_back_and_people_are_told(s, monkeypatch, c):
    says(monkeypatch, "worse", *([c] if c.metric != "revenue" else [compared("ctr", 0., -.01, .01)]), others=[c] if c.metric == "revenue" else [])
    assert "rolled back" in rollout.advance(s, "x")
    assert (serving(s), on_trial(s)) == ("v1", None) and "v2" in withdrawn(releases(s))
    assert [(a["key"], a["severity"]) for a in listing(s)] == [("release:trial", "warning")]

@pytest.mark.parametrize("c", [compared("ctr", -.01, -.015, -.005), compared("ctr", -.3, -.7, .1), compared("diversity", -.3, -.4, -.2)], ids=["small", "unsure", "diversity"])
def test_what_is_small_or_unsure_or_not_harm_does_not_stop_it(s, monkeypatch, c):
    says(monkeypatch, "open", others=[c])
    assert "goes on" in rollout.advance(s, "x")

def test_nothing_is_believed_where_visitors_are_missing(s, monkeypatch):
    says(monkeypatch, "invalid", compared("ctr", -.5, -.6, -.4))
    before = releases(s)
    assert "stays" in rollout.advance(s, "x") and releases(s) == before
    assert [(a["key"], a["severity"]) for a in listing(s)] == [("release:trial", "critical")]
    says(monkeypatch, "same", compared("ctr", 0., -.01, .01))
    assert "goes on" in rollout.advance(s, "x") and listing(s) == []

def test_it_waits_while_it_is_early_and_where_nobody_came(s, monkeypatch, tmp_path):
    before = releases(s)
    assert "stays" in rollout.advance(s, tmp_path/"no ingest")
    says(monkeypatch, "early")
    assert "it is early" in rollout.advance(s, "x") and releases(s) == before

@pytest.mark.parametrize("answer, c", [("open", compared("ctr", 0., -.02, .02)), ("worse", compared("ctr", -.5, -.6, -.4))])
def test_a_person_who_was_quicker_is_right(s, monkeypatch, answer, c):
    "While the run reads logs, somebody ends the trial: the run must neither bring it back nor take away what serves."
    says(monkeypatch, answer, c, first=lambda: roll_back(s, "I saw it"))
    assert "something else was released meanwhile" in rollout.advance(s, "x")
    assert (serving(s), on_trial(s)) == ("v1", None) and releases(s)[-1].why == "I saw it"

def test_a_trial_of_a_person_is_not_moved(s, monkeypatch):
    says(monkeypatch, "worse", compared("ctr", -.5, -.6, -.4))
    promote(s, "v2", "share", "my own", .33)
    assert rollout.advance(s, "x") is None and on_trial(s) == "v2"

def test_the_next_version_waits_its_turn(s, tmp_path):
    folder = tmp_path/"publish"; folder.mkdir()
    write_gate(Gate("passed", "all checks passed", "v3", "v1"), s, folder)
    assert "v3 waits: v2 is on trial" in release(folder, s, "a run") and on_trial(s) == "v2"
    roll_back(s, "over")
    assert "v3 is on trial: shadow, 10%" in release(folder, s, "a run") and on_trial(s) == "v3"

@pytest.mark.parametrize("steps", ["share:0.5", "all, share:0.5", "all, all", "share:1, all", "share:0, all", "half, all", ""])
def test_a_ramp_that_is_none_is_told(tmp_path, steps):
    (tmp_path/"settings.ini").write_text((ROOT/"settings.ini").read_text().replace("\nsteps = all\n", f"\nsteps = {steps}\n"))
    with pytest.raises(RecsysError, match=r"\[release\] steps"): load_settings(tmp_path/"settings.ini")

def test_a_broken_history_is_told_and_stops_no_run(s):
    history_file(s).write_text("no release\n" + history_file(s).read_text())
    said = rollout.advance(s, "x")
    assert said.startswith("no release was moved") and "a line is not a release" in said and on_trial(s) == "v2"
