"Metrics and log lines: what several processes count is added up without loss, whoever is killed, and Prometheus can read it."
import json, logging, signal, subprocess, sys

import pytest
from hypothesis import given, settings, strategies as st
from prometheus_client.parser import text_string_to_metric_families

from recsys.serving.metrics import BOUNDS, OUTCOMES, STAGES, STATUSES, Fields, JsonLines, Meter, begin, end, listed, metrics_for, places, posted, scrape
from recsys.serving.openapi import NAMES, ROUTES

def read(folder):
    "{(name, labels): value} as Prometheus' own parser reads it; every family has a help and a type."
    found = {}
    for family in text_string_to_metric_families(scrape(folder, NAMES).decode()):
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        for s in family.samples:
            key = (s.name, *sorted(s.labels.items()))
            assert key not in found
            found[key] = s.value
    return found

@pytest.fixture
def meter(tmp_path):
    m = Meter(tmp_path/"m", NAMES)
    yield m
    m.close()

def test_every_figure_is_there_from_the_first_moment(meter, tmp_path):
    page = scrape(tmp_path/"m", NAMES).decode()
    assert [l.split()[2] for l in page.splitlines() if l.startswith("# TYPE")] == [m.name for m in metrics_for(NAMES)] + ["recsys_workers", "recsys_bundle_info"]
    assert read(tmp_path/"m") == {("recsys_degraded_total",): 0, ("recsys_in_flight",): 0, ("recsys_online_total",): 0, ("recsys_online_workers",): 0, ("recsys_log_queue",): 0, ("recsys_log_queue_bytes",): 0, ("recsys_workers",): 1}
    assert page.endswith("\n") and read(tmp_path/"nobody")[("recsys_workers",)] == 0

times = st.one_of(st.floats(0, 5), st.sampled_from(BOUNDS))
@settings(max_examples=60)
@given(requests=st.lists(st.tuples(st.sampled_from([*NAMES, "wp-admin"]), st.sampled_from([200, 404, 429, 500, 418]), times), max_size=40),
       lists=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.dictionaries(st.sampled_from([*STAGES[1:], "unheard"]), times)), max_size=20))
def test_the_page_says_what_was_counted(tmp_path_factory, requests, lists):
    folder = tmp_path_factory.mktemp("m")
    workers = [Meter(folder, NAMES), Meter(folder, NAMES)]
    for k, (route, status, seconds) in enumerate(requests): begin(workers[k % 2]); end(workers[k % 2], route, status, seconds)
    for k, (level, degraded, stages) in enumerate(lists): listed(workers[k % 2], level, degraded, 2., {s: t * 1e3 for s, t in stages.items()})
    found = read(folder)
    for w in workers: w.close()
    known = lambda route: route if route in NAMES else "other"
    for route in {known(r) for r, _, _ in requests}:
        mine = [t for r, _, t in requests if known(r) == route]
        label, name = ("route", route), "recsys_request_seconds"
        assert found[f"{name}_count", label] == len(mine) == found[f"{name}_bucket", ("le", "+Inf"), label]
        assert found[f"{name}_sum", label] == pytest.approx(sum(mine))
        for bound in BOUNDS: assert found[f"{name}_bucket", ("le", repr(bound)), label] == sum(t <= bound for t in mine)
        for status in (200, 404, 429, 500, 418):
            n = sum(known(r) == route and s == status for r, s, _ in requests)
            assert found.get(("recsys_requests_total", label, ("status", str(status) if str(status) in STATUSES else "other")), 0) == n
    assert sum(v for k, v in found.items() if k[0] == "recsys_requests_total") == len(requests)
    for level in range(5): assert found.get(("recsys_answers_total", ("level", str(level))), 0) == sum(min(l, 4) == level for l, _, _ in lists)
    assert found["recsys_degraded_total",] == sum(d for _, d, _ in lists) and found["recsys_in_flight",] == 0
    for stage in STAGES[1:]: assert found.get(("recsys_stage_seconds_count", ("stage", stage)), 0) == sum(stage in s for _, _, s in lists)
    assert found.get(("recsys_stage_seconds_count", ("stage", "total")), 0) == len(lists)

def test_events_queue_and_versions(tmp_path):
    a, b = Meter(tmp_path, NAMES), Meter(tmp_path, NAMES)
    posted(a, 5, 2, 1); posted(b, 1, 0, 0)
    a.v[a.queue], b.v[b.queue] = 7, 4
    a.version("v1"); b.version("v1")
    found = read(tmp_path)
    assert [found["recsys_events_total", ("outcome", o)] for o in OUTCOMES] == [6, 2, 1] and found["recsys_log_queue",] == 11
    assert found["recsys_bundle_info", ("version", "v1")] == 2
    odd = 'v"2\\\n☃'
    b.version(odd)
    assert read(tmp_path)["recsys_bundle_info", ("version", odd)] == 1 == read(tmp_path)["recsys_bundle_info", ("version", "v1")]
    b.version("x" * 1000)
    assert max(len(k[1][1]) for k in read(tmp_path) if k[0] == "recsys_bundle_info") == 240
    a.close(); b.close()

WORKER = '''
import sys, time
from recsys.serving.metrics import Meter, begin, end, posted
m = Meter(sys.argv[1], tuple(sys.argv[3].split(",")))
m.version("v1"); begin(m)
for k in range(int(sys.argv[2])): begin(m); end(m, "recommend", 200, .001); posted(m, 1, 0, 0)
print("counted", flush=True); time.sleep(600)
'''

def worker(folder, n):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(n), ",".join(NAMES)], stdout=subprocess.PIPE, text=True)

def test_killed_workers_leave_their_counts_and_take_their_gauges_along(tmp_path):
    running = [worker(tmp_path, 10_000) for _ in range(3)]
    try:
        for p in running: assert p.stdout.readline() == "counted\n"
        found = read(tmp_path)
        assert found["recsys_requests_total", ("route", "recommend"), ("status", "200")] == found["recsys_events_total", ("outcome", "accepted")] == 30_000
        assert (found["recsys_in_flight",], found["recsys_workers",], found["recsys_bundle_info", ("version", "v1")]) == (3, 3, 3)
        running[0].send_signal(signal.SIGKILL); running[0].wait()
        found = read(tmp_path)
        assert found["recsys_requests_total", ("route", "recommend"), ("status", "200")] == 30_000
        assert (found["recsys_in_flight",], found["recsys_workers",], found["recsys_bundle_info", ("version", "v1")]) == (2, 2, 2)
        running.append(worker(tmp_path, 5)); assert running[-1].stdout.readline() == "counted\n"
        found = read(tmp_path)
        assert found["recsys_requests_total", ("route", "recommend"), ("status", "200")] == 30_005 and found["recsys_in_flight",] == 3
        assert len([*tmp_path.iterdir()]) == 3, "the new worker goes on in the file of the dead one"
    finally:
        for p in running: p.kill(); p.wait(); p.stdout.close()

def test_strange_files_are_not_counted(meter, tmp_path):
    for name, data in (("7.metrics", b""), ("8.metrics", b"\0" * 80), ("9.txt", b"x")): (tmp_path/"m"/name).write_bytes(data)
    assert read(tmp_path/"m")[("recsys_workers",)] == 1

def test_places_that_meant_something_else_begin_anew(tmp_path):
    "An update may exchange two figures; what was counted under the old meaning is neither shown nor counted on."
    old = Meter(tmp_path, NAMES[::-1])
    begin(old); end(old, NAMES[0], 200, .001); old.version("v0")
    assert read(tmp_path) == {("recsys_degraded_total",): 0, ("recsys_in_flight",): 0, ("recsys_online_total",): 0, ("recsys_online_workers",): 0, ("recsys_log_queue",): 0, ("recsys_log_queue_bytes",): 0, ("recsys_workers",): 0}
    old.close()
    new = Meter(tmp_path, NAMES)
    assert len([*tmp_path.iterdir()]) == 1 and not any(k[0] == "recsys_requests_total" for k in read(tmp_path)) and read(tmp_path)["recsys_workers",] == 1
    begin(new); end(new, NAMES[0], 200, .001); new.close()
    new = Meter(tmp_path, NAMES)
    assert read(tmp_path)["recsys_requests_total", ("route", NAMES[0]), ("status", "200")] == 1, "the same meaning goes on"
    new.close()

def test_only_the_service_may_write_them(meter, tmp_path): assert oct(next((tmp_path/"m").iterdir()).stat().st_mode & 0o777) == "0o600"

def test_every_status_of_the_table_is_counted_by_its_number():
    assert {str(e) for r in ROUTES for e in r.errors} | {"200", "405", "500"} <= set(STATUSES)
    first, size = places(metrics_for(NAMES))
    assert len({*first.values()}) == len(first) and size * 8 < 100_000

# ---- log lines

def formatted(msg, *args, **extra):
    record = logging.LogRecord("recsys.x", logging.WARNING, "f.py", 1, msg, args, extra.pop("exc_info", None))
    for k, v in extra.items(): setattr(record, k, v)
    return JsonLines().format(record)

@settings(max_examples=100)
@given(text=st.text(), request_id=st.text(min_size=1))
def test_whatever_is_logged_is_one_line_of_json(text, request_id):
    line = formatted("got %s", text, request_id=request_id)
    said = json.loads(line)
    assert "\n" not in line and said["message"] == f"got {text}" and said["request_id"] == request_id and said["level"] == "WARNING" and said["logger"] == "recsys.x"

def test_fields_and_failures():
    said = json.loads(formatted(Fields(status=200, at=json)))
    assert said["status"] == 200 and "message" not in said
    try: 1 / 0
    except ZeroDivisionError: said = json.loads(formatted("failed", exc_info=sys.exc_info()))
    assert "ZeroDivisionError" in said["exception"] and said["message"] == "failed"

CONFIGURED = '''
import logging, logging.config
from recsys.serving.metrics import Fields, log_config
logging.config.dictConfig(log_config())
logging.getLogger("recsys.serving").info("no"); logging.getLogger("recsys.serving").warning("yes %d", 1, extra=dict(request_id="r"))
logging.getLogger("recsys.audit").info(Fields(audit="DELETE")); logging.getLogger("other").warning("root")
'''

def test_the_configuration_writes_json_to_the_error_stream():
    done = subprocess.run([sys.executable, "-c", CONFIGURED], capture_output=True, text=True, timeout=60)
    lines = [json.loads(l) for l in done.stderr.splitlines()]
    assert [l.get("message", l.get("audit")) for l in lines] == ["yes 1", "DELETE", "root"] and lines[0]["request_id"] == "r" and done.stdout == ""
