"From reports to deeds: what is read, what is done, who may stop it, and that a run decides once, through the real command."
import json, re
from pathlib import Path

import msgspec
import nbformat.v4 as nb4
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from recsys.core.files import write_json
from recsys.core.settings import RecsysError, load_settings
from recsys.evaluation.labels import add_label, labels_digest, read_labels
from recsys.operations.act import Held, check_hold, decide_failure, decide_on, decisions_file, drift_findings, experiment_findings, person_falls_back, run_findings, status_lines
from recsys.operations.alerts import answer, listing, read_cases, shown
from recsys.operations.cycle import _tell_gate
from recsys.operations.decisions import Decision, Finding, read_decisions
from recsys.operations.publish import Refused
from recsys.operations.registry import Release, _append, releases_text
from recsys.serving.fallback import read_fallback, set_fallback
from shop import ROOT, recsys, settings_text
from test_alerts import DAY, T, shop

BROKEN = Finding("attribution", "price", "critical", .01, .05, "2026-03-02", "runs/2026-03-02/drift.html", "the model has stopped listening to price")
SLOW = Finding("concept", "click all", "warning", .8, 1., "2026-03-02")
day = lambda k: f"2026-03-{2 + k:02}"
def on(s, k, *findings, whole=True): return decide_on(s, [msgspec.structs.replace(f, day=day(k)) for f in findings], day(k), [f"run {k}"], T + k*DAY, whole)

def test_a_break_is_contained_told_and_let_go_by_itself(tmp_path):
    s = shop(tmp_path)
    assert on(s, 0).action == "nothing" and read_fallback(s.data_dir) is None and listing(s, now=T) == []
    d = on(s, 1, BROKEN)
    assert (d.action, read_fallback(s.data_dir).level) == ("fall_back", s.decisions.fallback_level) and [r["key"] for r in listing(s, now=T + DAY)] == ["attribution:price"]
    on(s, 2, BROKEN); on(s, 3)
    assert read_fallback(s.data_dir) and listing(s, now=T + 3*DAY) == []
    on(s, 4)
    assert read_fallback(s.data_dir) is None and [d.action for d in read_decisions(decisions_file(s))] == ["nothing", "fall_back", "nothing", "nothing", "nothing"]

def test_failed_runs_give_no_all_clear(tmp_path):
    s = shop(tmp_path)
    on(s, 0, BROKEN)
    for k in range(1, 6): decide_failure(s, "drift", "the kernel died", day(k), day(k), T + k*DAY)
    assert read_fallback(s.data_dir) and {r["key"] for r in listing(s, now=T + 6*DAY)} == {"attribution:price", "pipeline:drift"}
    on(s, 6); assert read_fallback(s.data_dir)
    on(s, 7); assert read_fallback(s.data_dir) is None and listing(s, now=T + 7*DAY) == []

def test_a_failure_that_comes_back_weeks_later_is_told_again_and_decided_once(tmp_path):
    "The export is missing, is repaired, and weeks later it is missing again: the very same line."
    s = shop(tmp_path)
    fail = lambda k: decide_failure(s, "ingest", "the export is not there", day(k), "latest", T + k*DAY)
    fail(1)
    assert [r["key"] for r in listing(s, now=T + DAY)] == ["pipeline:ingest"]
    for k in range(2, 9): on(s, k)
    assert listing(s, now=T + 8*DAY) == []
    again = fail(9)
    assert (again.day, again.action) == (day(9), "ask") and [r["key"] for r in listing(s, now=T + 9*DAY)] == ["pipeline:ingest"]
    assert [c.alert.day for c in read_cases(s).values()] == [day(1), day(9)], "a case of its own, which people are told of"
    assert fail(9) == again and len(read_decisions(decisions_file(s))) == 9

def test_a_false_alarm_counts_no_more_until_it_has_gone_or_is_worse(tmp_path):
    s = shop(tmp_path)
    on(s, 0, SLOW)
    answer(s, listing(s, now=T)[0]["id"], "labelled", "false a sale", "Ada", now=T)
    assert [on(s, k, SLOW).action for k in (1, 2, 3)] == ["nothing"] * 3
    assert on(s, 4, msgspec.structs.replace(SLOW, severity="critical")).action == "retrain"

def test_what_a_person_switched_no_run_switches_back(tmp_path):
    s = shop(tmp_path)
    on(s, 0); person_falls_back(s, 3, "the supplier's prices are wrong", "Ada", T)
    for k in range(1, 5): on(s, k)
    assert (read_fallback(s.data_dir).level, read_fallback(s.data_dir).by) == (3, "Ada")
    on(s, 5, BROKEN); assert read_fallback(s.data_dir).level == 3
    person_falls_back(s, None, "it is fine", "Ada", T + 5*DAY)
    assert read_fallback(s.data_dir) is None
    for k in range(6, 9): assert on(s, k, BROKEN).fallback == 0, "Ada has looked at it"
    assert read_fallback(s.data_dir) is None

def test_what_a_person_began_to_switch_the_next_run_switches(tmp_path):
    "The switch cannot be moved; what was said is in the log all the same, and holds."
    s = shop(tmp_path); on(s, 0)
    (s.data_dir/"fallback.json").mkdir()
    with pytest.raises(OSError): person_falls_back(s, 3, "the supplier's prices are wrong", "Ada", T)
    (s.data_dir/"fallback.json").rmdir()
    assert "stays fallen back as Ada said" in on(s, 1).because and read_fallback(s.data_dir).level == 3
    with pytest.raises(RecsysError, match="no level 5"): person_falls_back(s, 5, "x", "Ada", T)
    assert read_decisions(decisions_file(s))[-1].fallback == 3

def test_nothing_that_data_bring_along_reaches_the_terminal(tmp_path):
    s, evil = shop(tmp_path), "a\x1b]0;mine\x07\x1b[2J\nb\u202e"
    on(s, 0, msgspec.structs.replace(BROKEN, where=evil, what=f"the model has stopped listening to {evil}"))
    promoted = Release("2026-03-02T05:00:00.000+00:00", "promote", "v1", "all", None, evil)
    _append(s, promoted)
    for text in (shown(listing(s, now=T)), *status_lines(s), releases_text(s)): assert all(c.isprintable() or c == "\n" for c in text) and ("a ]0;mine" in text or "open alerts" in text), text

def test_a_run_of_an_earlier_day_does_nothing_today(tmp_path):
    s = shop(tmp_path)
    on(s, 5)
    assert on(s, 1, BROKEN).action == "fall_back" and read_fallback(s.data_dir) is None and listing(s, now=T) == []

def test_only_a_run_of_today_tells_of_the_gate_and_takes_it_back(tmp_path):
    s = shop(tmp_path)
    on(s, 3)
    refused = Refused("the gate refused version v2: fewer clicks", "publish")
    open_ = lambda: [(r["key"], "recsys promote v2 --anyway" in r["todo"]) for r in listing(s)]
    _tell_gate(s, refused, day(2), "v2"); _tell_gate(s, refused, day(3), "v2", late=True)
    assert open_() == [], "of a past day nobody is told"
    _tell_gate(s, refused, day(3), "v2")
    assert open_() == [("release:gate", True)]
    _tell_gate(s, None, day(2)); _tell_gate(s, None, day(3), late=True)
    assert open_() == [("release:gate", True)], "a good run of a past day promotes nothing"
    _tell_gate(s, None, day(3))
    assert open_() == []

def test_deeds_that_were_cut_short_are_done_by_the_next_try(tmp_path):
    "The decision is in the log, and then the program was killed."
    s = shop(tmp_path)
    d = on(s, 0, BROKEN)
    set_fallback(s.data_dir, None); (s.data_dir/"alerts.jsonl").unlink()
    assert on(s, 0, BROKEN) == d and read_fallback(s.data_dir).level == 2 and len(listing(s, now=T)) == 1 and len(read_decisions(decisions_file(s))) == 1

def test_a_decision_found_again_does_not_undo_what_was_decided_since(tmp_path):
    s = shop(tmp_path)
    on(s, 0); decide_failure(s, "drift", "the kernel died", day(0), day(0), T)
    decide_on(s, [msgspec.structs.replace(BROKEN, day=day(0))], day(0), ["the repeat"], T, False)
    assert read_fallback(s.data_dir).level == 2
    on(s, 0)                                                              # the same as the first of the day
    decide_failure(s, "drift", "the kernel died", day(0), day(0), T)      # the same as the second
    assert read_fallback(s.data_dir).level == 2 and read_decisions(decisions_file(s))[-1].fallback == 2

def test_publication_waits_too_when_it_is_asked_because_a_budget_is_used_up(tmp_path):
    s = shop(tmp_path)
    d = Decision(day(0), "ask", "asks, since the budget of retrainings is used up", calls={"concept:click": "retrain"}, findings=[msgspec.structs.replace(SLOW, severity="critical")])
    write_json(tmp_path/"decide.json", dict(decision=msgspec.to_builtins(d), names=[]))
    with pytest.raises(Held, match="nothing is published") as e: check_hold(tmp_path, s)
    assert "``" not in str(e.value) and e.value.exit_code == 2
    on(s, 3)
    check_hold(tmp_path, s)                                               # a past day: nobody could answer, and nothing newer is replaced

# ---- readers never fail on what a report may hold, and say the same for the same

verdicts = st.sampled_from(["stable", "moved but immaterial", "material", "not enough data"])
number = st.one_of(st.none(), st.floats(-1e9, 1e9), st.just(float("nan")), st.just(float("inf")))
columns = st.builds(dict, name=st.sampled_from(["price", "score", "a.b", "ü", "x:y"]), verdict=verdicts, effect_name=st.sampled_from(["psi", "missing", "unseen", "wasserstein", ""]),
                    effect=number, limit=number, severity=st.floats(0, 100), note=st.sampled_from(["", "gone: the current window has no such column"]))
shares = st.builds(lambda n, b, a, c: dict(name=n, share_before=b, share_least=b, share_after=a, collapsed=c), st.sampled_from("pqr"), st.floats(0, 1), st.floats(0, 1), st.booleans())
reports = st.builds(lambda c, w, a, s, n, lists: dict(comparison=dict(columns=c), weeks=dict(events=dict(comparison=dict(columns=w)), served=None), attribution=list({x["name"]: x for x in a}.values()),
    attribution_segments=s, attribution_ndcg=n, lists=dict(alarm=lists, sentence="x"), concept=[dict(kind="click", drift=None, performance=[])], skew=[], business=dict(figures=[], health=[])),
    st.lists(columns, max_size=4), st.lists(columns, max_size=4), st.lists(shares, max_size=3), st.lists(st.builds(dict, segment=st.just("home"), collapsed=st.lists(st.sampled_from("pqr"), max_size=2)), max_size=2),
    st.floats(0, 1), st.booleans())
vectors = st.builds(lambda share, low, bare: dict(alarm=bare or low > .5, bare=dict(value=share, limit=.02, alarm=bare), lost=None if share == 1 else dict(value=low, low=low), limit=.5, sentence="vectors"), st.floats(.02, 1), st.floats(0, 1), st.booleans())

@given(vectors)
def test_what_alarms_of_the_item_vectors_is_a_finding(said):
    found = drift_findings(DRIFT | dict(comparison=dict(columns=[]), embeddings=said), "2026-03-02", "drift.html", 10)
    lost = said["lost"] and said["lost"]["low"] > .5
    assert {f.key for f in found} == ({"prediction:vectors missing"} if said["bare"]["alarm"] else set()) | ({"prediction:vectors"} if lost else set())
    assert all((f.severity == "critical") == (f.where == "vectors missing" and said["bare"]["value"] >= .2) and f.what == "vectors" for f in found)

@given(reports)
@hypothesis_settings(max_examples=80)
def test_every_report_can_be_read(said):
    found = drift_findings(said, "2026-03-02", "drift.html", 10)
    assert msgspec.json.decode(msgspec.json.encode(found), type=list[Finding]) == found == drift_findings(said, "2026-03-02", "drift.html", 10)
    material = {c["name"] for c in said["comparison"]["columns"] if c["verdict"] == "material"}
    assert {f.where.partition(" ")[0] for f in found if f.kind in ("data", "prediction") and "." not in f.where and f.where != "lists"} == {m for m in material if "." not in m}
    assert any(f.kind == "attribution" and f.severity == "critical" for f in found) == (any(a["collapsed"] and a["share_before"] >= .02 for a in said["attribution"]) or any(x["collapsed"] for x in said["attribution_segments"]))

def of_price(effect_name, effect, times=25., **more):
    said = DRIFT | dict(comparison=dict(columns=[COLUMN | dict(effect_name=effect_name, effect=effect, severity=times) | more]))
    return drift_findings(said, "2026-03-02", "drift.html", 10)

@pytest.mark.parametrize("name, effect", [("missing", .02), ("missing", 1.), ("unseen", .11), ("unseen", .9), ("", None)], ids=str)
def test_one_approval_lets_nothing_else_of_the_column_through(tmp_path, name, effect):
    "Approved: 5 % of the prices were never seen. The day after, something else is wrong with them, or much more."
    s = shop(tmp_path)
    assert on(s, 0, *of_price("unseen", .05)).action == "ask"
    answer(s, listing(s, now=T)[0]["id"], "approved", "a new price list", "Ada", now=T)
    assert on(s, 1, *of_price("unseen", .06)).action == "nothing"
    d = on(s, 2, *of_price(name, effect, note="gone: the current window has no such column"))
    assert d.action == "ask" and d.holds
    said, = [r for r in listing(s, now=T + 2*DAY) if r["state"] == "open"]
    case = read_cases(s)[said["id"]]
    assert said["severity"] == "critical" and case.notices[-1].at[:10] == day(2) and case.notices[-1].act == ("worse" if name == "unseen" else "raised")

def test_a_column_that_is_gone_or_of_another_type_is_critical_and_says_so():
    f, = of_price("", None, 0., note="the type changed from numeric to categorical", limit=None)
    assert (f.severity, f.what) == ("critical", "price: the type changed from numeric to categorical") and f.value > f.threshold

def test_a_missing_drift_report_is_a_finding(tmp_path):
    write_json(tmp_path/"ingest/ingest.json", dict(moment="2026-03-02T05:00:00+00:00"))
    assert [f.key for f in run_findings(dict(ingest=tmp_path/"ingest"), shop(tmp_path))] == ["pipeline:drift"]

# ---- labels of items

def test_the_last_word_about_a_pair_counts_and_any_id_is_kept(tmp_path):
    assert labels_digest(tmp_path) == ""
    for user, item, good in (("u\n1", "i,;\"", True), ("u2", "i", True), ("u\n1", "i,;\"", False)): add_label(tmp_path, user, item, good, "Ada", "why\nnot")
    assert [(l.user, l.item, l.good) for l in read_labels(tmp_path)] == [("u\n1", "i,;\"", False), ("u2", "i", True)]
    first = labels_digest(tmp_path)
    add_label(tmp_path, "u2", "i", True); assert labels_digest(tmp_path) == first
    add_label(tmp_path, "u2", "i", False); assert labels_digest(tmp_path) != first

# ---- the real command: steps that only leave reports, the real decision, and a publication that waits

COLUMN = dict(name="price", verdict="material", effect_name="missing", effect=.5, limit=.02, severity=25.)
DRIFT = dict(verdict="warning", sentence="price is missing.", material=["price"], severity={}, comparison=dict(columns=[COLUMN]), attribution=[], attribution_segments=[], attribution_ndcg=1., weeks={},
             business=dict(figures=[], health=[]), concept=[], lists=dict(alarm=False), skew=[])
FIGURE = {"ndcg@5": dict(value=.2, low=.1, high=.3)}
QUESTION = dict(cases=100, metrics=FIGURE, baselines=dict(popular=FIGURE), waterfall=[], best_baseline="popular", against=dict(popular=dict(difference=.1, low=.05, high=.15)))
LEAVES = dict(ingest={"ingest.json": dict(moment="2026-03-02T05:00:00+00:00", rows=1, quarantined=0, dataset="toy")}, validate={"checks.json": []}, features={}, candidates={}, train={},
              evaluate={"evaluation.json": dict(questions=dict(completion=QUESTION), labels="")}, drift={"drift.json": DRIFT})

def job(folder: Path, name: str, parameters, *cells: str):
    tagged = nb4.new_code_cell("\n".join(f"{p} = ''" for p in parameters), metadata=dict(tags=["parameters"]))
    book = nb4.new_notebook(cells=[tagged, *map(nb4.new_code_cell, cells)], metadata=dict(kernelspec=dict(name="python3", language="python", display_name="Python 3")))
    (folder/"nbs/jobs").mkdir(parents=True, exist_ok=True)
    (folder/f"nbs/jobs/{name}.ipynb").write_text(json.dumps(book))

@pytest.fixture
def project(tmp_path):
    from recsys.operations.runner import STEPS
    for step in STEPS:
        names = (*(step.parents or ("date",)), "out")
        if step.name == "decide": (tmp_path/"nbs/jobs/decide.ipynb").write_bytes((ROOT/"nbs/jobs/decide.ipynb").read_bytes())
        elif step.name == "publish": job(tmp_path, "publish", names, "from recsys.core.settings import RecsysError; raise RecsysError('it came to publishing')")
        else: job(tmp_path, step.name, names, f"import json, pathlib\nfor name, value in {LEAVES[step.name]!r}.items(): (pathlib.Path(out)/name).write_text(json.dumps(value))")
    (tmp_path/"constraints.txt").write_text("")
    (tmp_path/"events.csv").write_text("id\n1\n"); (tmp_path/"items.csv").write_text("id\n1\n")
    (tmp_path/"shop.toml").write_text((ROOT/"tests/shop.py").read_text().split('MAPPING = """')[1].split('"""')[0])
    (tmp_path/"settings.ini").write_text(settings_text())
    return tmp_path

def test_publication_waits_until_somebody_approves(project):
    first = recsys(project, "run")
    assert first.returncode != 0 and "nothing is published: asks about data:price" in first.stderr and len(first.stderr.splitlines()) == 1, first.stderr + first.stdout
    said = json.loads((project/"reports/runs/2026-03-02/run.json").read_text())
    assert said["status"] == "held" and said["decision"]["action"] == "ask" and "Publication waits" in said["headline"]["sentence"]
    assert "Decision: ask" in (project/"reports/index.html").read_text() and (project/"reports/runs/2026-03-02/decide.html").is_file()
    again = recsys(project, "run")
    assert again.returncode == first.returncode and "decide" in again.stdout and "unchanged, skipped" in again.stdout.split("decide")[1].splitlines()[0]
    assert len((project/"data/decisions.jsonl").read_text().splitlines()) == 1
    id, = re.findall(r"recsys approve (\w+)", first.stderr)
    told = recsys(project, "alerts")
    assert id in told.stdout and "price moved: missing 0.5 (limit 0.02)" in told.stdout
    assert recsys(project, "approve", id, "--why", "the supplier sends no prices", "--by", "Ada").returncode == 0
    after = recsys(project, "run")
    assert "it came to publishing" in after.stderr, after.stderr
    lines = [json.loads(l) for l in (project/"data/decisions.jsonl").read_text().splitlines()]
    assert [l["action"] for l in lines[:2]] == ["ask", "nothing"] and lines[1]["findings"][0]["word"] == "approved"

def test_of_a_step_that_fails_somebody_hears_once(project):
    job(project, "validate", ("ingest", "out"), "raise ValueError('boom')")
    for _ in range(2):
        r = recsys(project, "run")
        assert r.returncode == 1 and "boom" in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr
    d, = [json.loads(l) for l in (project/"data/decisions.jsonl").read_text().splitlines()]
    assert d["action"] == "ask" and d["findings"][0]["where"] == "validate" and "boom" in d["findings"][0]["what"] and d["day"] == "2026-03-02"
    assert json.loads((project/"reports/runs/2026-03-02/run.json").read_text())["decision"]["action"] == "ask"
    assert recsys(project, "alerts").stdout.count("validate failed") == 1

def test_the_switch_and_the_labels_from_the_terminal(project):
    assert recsys(project, "fallback", "2", "--why", "careful", "--by", "Ada").stdout.startswith("fallback level 2 (without the ranker)")
    status = recsys(project, "status").stdout
    assert "fallback level 2 (without the ranker)" in status and "by Ada: careful" in status and "open alerts: none" in status
    assert recsys(project, "fallback", "off", "--why", "done").stdout == "full answers\n" and not (project/"data/fallback.json").exists()
    assert recsys(project, "label", "item", "ann", "tea", "good").returncode == 0 and len(read_labels(project/"data")) == 1
    for args, said in ((("approve", "zz"), "no such alert"), (("fallback", "2"), "--why"), (("fallback", "5", "--why", "x"), "invalid choice"), (("label", "alarm", "zz", "false"), "no such alert")):
        r = recsys(project, *args)
        assert r.returncode != 0 and said in r.stderr and len(r.stderr.splitlines()) == 1 and "Traceback" not in r.stderr, r.stderr


def test_an_approval_that_changes_nothing_says_which_command_does(project):
    _tell_gate(load_settings(project/"settings.ini"), Refused("the gate refused version v2: fewer clicks", "publish"), "2026-03-02", "v2")
    id, = re.findall(r"^(\w{8})  ", recsys(project, "alerts").stdout, re.M)
    said = recsys(project, "approve", id, "--by", "Ada").stdout
    assert "recsys promote v2 --anyway --why TEXT" in said and "the next run goes on" not in said and len(said.splitlines()) == 1
    for hours in ("nan", "inf", "1e12", "-5", "0", "8761"):
        r = recsys(project, "snooze", id, f"--hours={hours}")
        assert r.returncode == 1 and "--hours" in r.stderr and len(r.stderr.splitlines()) == 1 and not r.stdout, r.stderr
    assert recsys(project, "snooze", id, "--hours", "8760").returncode == 0

def test_interleaving_and_bandits_are_heard_like_experiments(tmp_path):
    "Of each name the newest counts; what gains, is open, is older than a week or was killed says nothing."
    def said(run, **what): write_json(tmp_path/f"runs/{run}/out/decision.json", what)
    at = dict(moment="2026-03-08T05:00:00+00:00")
    said("interleaving-20260308T050000", name="lists", answer="first", sentence="the old list wins", **at)
    said("interleaving-20260308T060000", name="open", answer="open", sentence="not yet", **at)
    said("bandit-20260308T050000", name="rows", moved=False, sentence="the shares stay", arms=[])
    said("bandit-20260308T050001", name="tiles", moved=False, sentence="the shares stay", arms=[])
    said("bandit-20260308T070000", name="tiles", moved=True, sentence="a is best", arms=[])
    said("bandit-20260201T050000", name="old", moved=False, sentence="the shares stay", arms=[])
    said("experiment-20260308T050000", name="page", answer="worse", sentence="it loses", **at)
    (tmp_path/"runs/bandit-20260308T080000/out").mkdir(parents=True); (tmp_path/"runs/bandit-20260308T080000/out/decision.json").write_text("{")
    found = experiment_findings(tmp_path, "2026-03-09")
    assert [(f.kind, f.where, f.severity, f.evidence) for f in found] == [("experiment", "lists", "warning", "runs/interleaving-20260308T050000/interleaving.html"),
        ("experiment", "page", "warning", "runs/experiment-20260308T050000/experiment.html"), ("experiment", "rows", "critical", "runs/bandit-20260308T050000/bandit.html")]
    assert experiment_findings(tmp_path, "2026-03-16") == []
