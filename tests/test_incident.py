"Incidents: whatever the journals hold, a page that lines up what happened, and an index that says what waits for somebody."
import json, re
from datetime import date

import msgspec, pytest
from hypothesis import given, strategies as st

from recsys.operations.incident import LANES, Act, Decision, Past, Release, alerts_of, at_a_glance, file_name, glance_rows, happenings, incident_page, near, read_lines, read_past, state_of, write_incidents
from recsys.operations.index import RunFile, write_index
from test_report import EVIL, check

def moment(day, hour=6): return f"2026-03-{day:02}T{hour:02}:00:00.000+00:00"
ALERT = dict(key="data:price", severity="critical", what="price is missing in 62 % of the rows", todo="Look at the export.", evidence="runs/2026-03-05/drift.html", day="2026-03-05", owner="shop team", source="policy")
ACTS = [dict(at=moment(5), id="A1", act="raised", channels=["webhook"], alert=ALERT), dict(at=moment(5, 7), id="A1", act="sent", channels=["webhook"], notice=1), dict(at=moment(6), id="A1", act="acknowledged", by="ann", why="looking")]
DECISIONS = [dict(day="2026-03-05", action="fall_back", because="price is broken", fallback=2, calls={"data:price": "fall_back"}, would_have_changed=[], of="2026-03-05",
                  findings=[dict(kind="data", where="price", severity="critical", value=.62, threshold=.02, day="2026-03-05", what="price is missing", evidence="runs/2026-03-05/drift.html")])]
RELEASES = [dict(at=moment(4), action="promote", version="20260304-ab", stage="all", before=None, why="passed the gate", share=1.0)]

def shop(folder, acts=ACTS, decisions=DECISIONS, releases=RELEASES):
    "Folders of reports and data with journals and three runs."
    reports, data = folder/"reports", folder/"data"
    for day in (3, 4, 5):
        run = reports/f"runs/2026-03-0{day}"; run.mkdir(parents=True)
        (run/"run.json").write_text(json.dumps(dict(date=run.name, status="ok", rows=1000 + day, metrics=dict(next_basket={"ndcg@10": dict(value=.5 + day / 100, low=.4, high=.7)}),
            drift=dict(verdict="bad" if day == 5 else "good", sentence="price moved" if day == 5 else "all is well", severity=dict(price=day * 2., stock=.3)), headline=dict(verdict="good", sentence=f"Day {day}."))))
        (run/"drift.html").write_text("<p>drift</p>")
    data.mkdir()
    for name, lines in dict(alerts=acts, decisions=decisions, releases=releases).items(): (data/f"{name}.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    return reports, data

def test_a_page_lines_up_what_happened(tmp_path):
    reports, data = shop(tmp_path)
    (name, act, state, at), = write_incidents(reports, data)
    html = (reports/name).read_text()
    check(html)
    assert name == "incidents/A1.html" and state == "acknowledged" and html.index("price is missing in 62 %") < html.index("<svg role") < html.index("Everything on this axis")
    rows = re.findall(r'<tr><th scope="row"><span class="fixed">(.*?)</span></th><td>(.*?)</td>', html)
    assert rows == sorted(rows, key=lambda r: r[0]) and ("2026-03-04", "releases") in rows and {"data", "decisions", "this alert", "releases"} <= {lane for _, lane in rows}
    assert "passed the gate" in html and "fall back (policy): price is broken" in html and "acknowledged by ann: looking" in html and 'href="../runs/2026-03-05/drift.html"' in html
    assert "Quality: NDCG@10 of the runs" in html and "Drift in units of its limit" in html

def test_the_index_begins_with_what_waits(tmp_path):
    reports, data = shop(tmp_path)
    html = write_index(reports, data).read_text()
    check(html)
    rows = re.findall(r'<th scope="row">(?:<a href="(.*?)">)?(\w+)(?:</a>)?</th><td><span class="word (\w+)">', html[:html.index('class="rs-headline')])
    assert [r[1:] for r in rows] == [("alert", "bad"), ("traffic", "info"), ("quality", "good"), ("drift", "bad"), ("decision", "warning"), ("version", "info")]
    assert rows[0][0] == "incidents/A1.html" and rows[3][0] == "runs/2026-03-05/drift.html" and (reports/rows[0][0]).is_file()
    (data/"alerts.jsonl").write_text("".join(json.dumps(l) + "\n" for l in [*ACTS, dict(at=moment(7), id="A1", act="closed", by="run")]))
    assert "Nothing waits for anybody." in write_index(reports, data).read_text() and 'rs-headline good' in (reports/"incidents/A1.html").read_text()
    assert "at a glance" not in write_index(reports).read_text()

def test_the_state_is_that_of_the_list_of_alerts(tmp_path):
    "Approved, gone and back again is approved; snoozed is over at its moment."
    from datetime import datetime, timezone
    from recsys.operations.alerts import cases_of
    now = datetime(2026, 3, 20, tzinfo=timezone.utc)
    steps = dict(approved={}, closed={}, reopened=dict(alert=ALERT), again=dict(alert=ALERT | dict(day="2026-03-09")), acknowledged={}, snoozed=dict(until=moment(19)), worse=dict(alert=ALERT), woken={}, labelled=dict(why="false"))
    for first in steps:
        for second in steps:
            for third in steps:
                acts = [ACTS[0], *(dict(at=moment(6 + k), id="A1", act=a, **steps[a]) for k, a in enumerate((first, second, third)))]
                lines = [json.dumps(a).encode() for a in acts]
                assert state_of([msgspec.json.decode(l, type=Act) for l in lines], now) == cases_of(lines)["A1"].state(now), (first, second, third)
    acts = [msgspec.convert(a, Act) for a in (ACTS[0], dict(at=moment(6), id="A1", act="approved"), dict(at=moment(7), id="A1", act="closed"), dict(at=moment(8), id="A1", act="reopened", alert=ALERT))]
    assert state_of(acts, now) == "approved"

def test_todays_decision_is_that_of_the_newest_day_not_the_last_line(tmp_path):
    reports, data = shop(tmp_path, decisions=[*DECISIONS, dict(day="2026-03-02", action="nothing", because="a day made up for")])
    row, = [r for r in glance_rows(reports, read_past(reports, data)) if r[0] == "decision"]
    assert row[2].startswith("2026-03-05: fall back")

def test_pages_of_simulated_runs_say_so(tmp_path):
    reports, data = shop(tmp_path)
    (name, *_), = write_incidents(reports, data)
    assert "simulated" not in (reports/name).read_text()
    file = reports/"runs/2026-03-05/run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(simulated=True)))
    write_incidents(reports, data)
    assert '<span class="tag">simulated data</span>' in (reports/name).read_text()

@pytest.mark.parametrize("run, said, light", [("interleaving-20260309T050000", dict(name="two", answer="first", sentence="the old list"), "bad"), ("bandit-20260309T050000", dict(name="rows", moved=False, sentence="the shares stay", arms=[]), "bad"),
    ("bandit-20260309T050000", dict(name="rows", moved=True, sentence="b is best", arms=[]), "good"), ("experiment-20260309T050000", dict(name="tiles", answer="better", sentence="it gains"), "good")])
def test_the_newest_experiment_of_any_kind_is_at_a_glance(tmp_path, run, said, light):
    reports, data = shop(tmp_path)
    for name, what in (("experiment-20260301T050000", dict(name="old", answer="open", sentence="not yet")), (run, said)):
        (reports/f"runs/{name}/out").mkdir(parents=True); (reports/f"runs/{name}/out/decision.json").write_text(json.dumps(what))
    row, = [r for r in glance_rows(reports, read_past(reports, data)) if r[0] == "experiments"]
    assert row[1:] == (light, f"{said['name']}: {said['sentence']}", f"runs/{run}/{run.partition('-')[0]}.html")

def test_hostile_words_stay_words(tmp_path):
    bad = {k: EVIL.replace("\ud800", "") for k in ALERT} | dict(day="2026-03-05", evidence="javascript:alert(1)")
    reports, data = shop(tmp_path, [dict(at=moment(5), id="../../" + "x" * 300, act="raised", by=bad["key"], why=bad["key"], alert=bad)], [dict(day="2026-03-05", action=bad["key"], because=bad["key"], findings=[dict(kind="data", where=bad["key"], value=1., threshold=.5, day="2026-03-05", what=bad["key"], severity="critical", evidence="//evil.test/x")])])
    (name, *_), = write_incidents(reports, data)
    check((reports/name).read_text(), hostile=True); check(write_index(reports, data).read_text(), hostile=True)
    assert (reports/name).resolve().parent == (reports/"incidents").resolve() and "javascript:" not in re.findall(r'href="([^"]*)"', (reports/name).read_text())

@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([json.dumps(l).encode() for l in [*ACTS, *DECISIONS, *RELEASES]])), max_size=8))
def test_journals_that_are_broken_or_not_finished_are_read_as_far_as_they_can_be(tmp_path_factory, lines):
    file = tmp_path_factory.mktemp("j")/"alerts.jsonl"
    file.write_bytes(b"\n".join(lines))
    past = Past([], read_lines(file, Act), read_lines(file, Decision), read_lines(file, Release))
    for id, acts in alerts_of(past).items(): assert f"<h1>" in incident_page(past, id, acts) and state_of(acts) in ("open", "acknowledged", "closed")
    for h in happenings(past, past.acts): assert h.lane in LANES

def test_every_kind_of_finding_has_a_lane():
    from recsys.operations.decisions import KINDS
    assert {*KINDS} <= {*LANES}

def test_many_alerts_do_not_hide_the_rest(tmp_path):
    "Three lines, the gravest first, and one for the others."
    acts = [dict(at=moment(5), id=f"A{k}", act="raised", alert=ALERT | dict(key=f"data:{k}", what=f"column {k} moved", severity="critical" if k == 2 else "warning")) for k in range(9)]
    reports, data = shop(tmp_path, acts)
    rows = [r for r in glance_rows(reports, read_past(reports, data)) if r[0].startswith("alert")]
    assert [r[2].partition(" (")[0] for r in rows[:3]] == ["column 2 moved", "column 8 moved", "column 7 moved"] and rows[3][2].startswith("6 more, none graver") and len(rows) == 4
    assert len(list((write_index(reports, data).parent/"incidents").glob("*.html"))) == 9
