"The log of posted events: what is accepted is also learnt from, and each event is there once, whatever is killed, full, repeated or forgotten."
import fcntl, json, multiprocessing, os, random, resource, sqlite3, subprocess, threading, time
from collections import Counter
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

import recsys.data.ingest as ingest_room
import recsys.data.log as room
import recsys.data.shown as shown_room
from recsys.core.files import read_json
from recsys.core.settings import RecsysError
from recsys.data.arrivals import Arrival, check_arrivals
from recsys.data.events import EVENT_TYPES, read_events, validate_events
from recsys.data.identity import Forgotten
from recsys.data.ingest import ingest, source_digest
from recsys.data.log import EventLog, forget_in_log, roll_log, rolled_files, tail_log
from recsys.data.shown import Shown, out_of_shown, served_records
from recsys.evaluation.labels import add_label, labels_file, read_labels
from shop import START, events, make_shop, recsys

NOON = datetime(2026, 3, 2, 12, tzinfo=timezone.utc)
T = NOON.timestamp()
slow = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

def view(event_id: str, visitor: str = "v", ts: datetime = NOON, **more) -> Arrival: return Arrival(event_id, "view", visitor, "tea", ts, **more)
def raw(*values) -> list[msgspec.Raw]: return [msgspec.Raw(v if isinstance(v, bytes) else json.dumps(v).encode()) for v in values]
def in_files(data: Path) -> list[str]: return [e for f in rolled_files(data) for e in pl.read_parquet(f)["event_id"]]
def in_log(data: Path) -> list[str]:
    with sqlite3.connect(data/"arrivals"/"log.sqlite") as con: return [json.loads(b)["event_id"] for b, in con.execute("SELECT body FROM events ORDER BY position")]

@pytest.fixture
def log(tmp_path):
    log = EventLog(tmp_path)
    yield log
    log.close()

# ---- what may arrive

texts = st.one_of(st.text(max_size=8), st.text(min_size=250, max_size=260), st.sampled_from(["", "\0", "a\nb", "☃" * 256, "😀" * 257]))
numbers = st.one_of(st.integers(), st.integers(-2, 3), st.floats(), st.just(2**31), st.just(2**31 - 1), st.just(10**400))
times = st.one_of(st.datetimes(timezones=st.timezones()).map(datetime.isoformat), st.sampled_from(["2026-03-02T10:00:00", "2026-03-02T13:00:00Z", "1970-01-01T00:00:00Z",
    "1969-12-31T23:59:59.999999Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-03-02T10:00:00.123456789+05:30", "noon", 12]))
values = st.recursive(st.none() | st.booleans() | numbers | texts, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=12)
odd = st.one_of(texts, numbers, times, values)
FIELDS = dict(event_id=texts, event_type=st.sampled_from([*EVENT_TYPES, "gaze"]), visitor_id=texts, item_id=texts, ts=times, user_id=texts, session_id=texts, quantity=numbers, price=numbers,
    currency=st.sampled_from(["EUR", "eur", "EUR\n", "EU", ""]), order_id=texts, request_id=texts, position=numbers, placement=texts, variant=texts, context=st.dictionaries(texts, values, max_size=3), consent=st.booleans())
good = dict(event_id="e", event_type="view", visitor_id="v", item_id="i")
posted = st.builds(lambda base, some: base | some, st.sampled_from([good, good, {}]), st.one_of(
    st.fixed_dictionaries({}, optional=FIELDS), *(s.map(lambda v, f=f: {f: v}) for f, s in FIELDS.items()), *(odd.map(lambda v, f=f: {f: v}) for f in FIELDS), st.dictionaries(texts, odd, max_size=2)))

@settings(max_examples=250)
@given(st.lists(posted, max_size=6))
def test_what_is_accepted_is_never_quarantined(events):
    arrivals, refused = check_arrivals(raw(*(json.dumps(e).encode() for e in events)), T, 3600)
    assert len(arrivals) + len(refused) == len(events) and len({r.index for r in refused}) == len(refused)
    if not arrivals: return
    bodies = [msgspec.json.encode(a) for a in arrivals]
    assert [msgspec.json.decode(b, type=Arrival) for b in bodies] == arrivals, "what is written down is what was accepted"
    rows = room._frame([(k, T, b) for k, b in enumerate(bodies)])
    kept, bad = validate_events(rows, NOON, 60)
    assert bad["reason"].to_list() == [] and kept.height == len(arrivals)
    assert kept["ts"].to_list() == [a.ts for a in arrivals] and kept["context"].to_list() == [None if a.context is None else msgspec.json.encode(a.context).decode() for a in arrivals]

TWO = b",".join([json.dumps(good).encode()] * 2)

@example([TWO, b"{}"])
@given(st.lists(st.one_of(posted.map(lambda e: json.dumps(e).encode()), st.binary(max_size=12), st.sampled_from([b"", b"{},{}", TWO, b"null", b"]", b"[]", b'{"event_id":"\\ud800"}', b"[" * 9000]))))
def test_a_bad_event_neither_harms_nor_shifts_its_neighbours(events):
    together, alone = check_arrivals(raw(*events), T, 60), [check_arrivals(raw(e), T, 60) for e in events]
    assert together[0] == [a for good, _ in alone for a in good]
    assert [(r.index, r.code) for r in together[1]] == [(k, r.code) for k, (_, bad) in enumerate(alone) for r in bad]
    assert all(len(r.message) <= 300 for r in together[1])

@pytest.mark.parametrize("code, change", [("invalid_event", c) for c in (dict(event_id=7), dict(event_id=None), dict(event_id=""), dict(event_type="gaze"), dict(visitor_id="x" * 257), dict(color="red"), dict(ts="2026-03-02T10:00:00"),
    dict(ts=1772000000), dict(quantity=0), dict(quantity=2**31), dict(quantity=1.5), dict(price=-.01), dict(price="1"), dict(currency="eur"), dict(currency="EUR\n"), dict(position=-1), dict(consent=1), dict(context=[]), dict(context="{}"))]
    + [("item_missing", dict(item_id=None)), ("ts_in_future", dict(ts="2026-03-02T13:00:01Z")), ("ts_too_old", dict(ts="1969-12-31T23:59:59Z")), ("ts_too_old", dict(ts="0001-01-01T00:00:00+14:00")),
       ("invalid_context", dict(context={"a": "x" * 4096})), ("invalid_context", dict(context={"a": [[]] * 101})), ("invalid_context", dict(context={"a": 10**301}))], ids=str)
def test_what_is_refused(code, change):
    (refused,) = check_arrivals(raw(good | change), T, 3600)[1]
    assert (refused.index, refused.code) == (0, code)

@pytest.mark.parametrize("change", [dict(ts="2026-03-02T13:00:00Z"), dict(ts="1970-01-01T00:00:00Z"), dict(event_type="search", item_id=None), dict(visitor_id="☃" * 256), dict(context={"a": [1e308, -0.0, 2**70, 10**299, None]}), dict(price=0), dict(quantity=2**31 - 1)], ids=str)
def test_what_is_just_right(change): assert len(check_arrivals(raw(good | change), T, 3600)[0]) == 1

def test_an_event_without_a_time_happened_now_and_every_time_is_utc():
    a, b = check_arrivals(raw(good, good | dict(ts="2026-03-02T14:00:00+05:30")), T, 0)[0]
    assert a.ts == NOON and b.ts == NOON - timedelta(hours=3, minutes=30) and a.ts.tzinfo is b.ts.tzinfo is timezone.utc

def test_the_contract_has_every_field_of_an_arrival():
    from recsys.data.events import Event
    assert set(Event.columns()) - set(Arrival.__struct_fields__) == {"received_ts", "flag"}

# ---- once

def test_an_id_counts_once_in_a_batch_in_a_group_after_a_roll_and_after_a_restart(tmp_path):
    log, other = EventLog(tmp_path), EventLog(tmp_path)
    first = log.submit([view("a"), view("b"), view("a", "w")], T).result()
    assert ([a.event_id for a in first.accepted], first.duplicates) == (["a", "b"], 1) and first.accepted[0].visitor_id == "v"
    assert other.submit([view("b")], T).result().duplicates == 1
    assert in_log(tmp_path) == ["a", "b"] and log.roll() and in_log(tmp_path) == [] and in_files(tmp_path) == ["a", "b"]
    assert other.submit([view("b"), view("c")], T).result().duplicates == 1
    log.close(); other.close(); log.close()
    with pytest.raises(RecsysError, match="closed"): log.submit([view("d")], T).result(5)
    log = EventLog(tmp_path)
    assert log.submit([view(e) for e in "abcd"], T).result().duplicates == 3 and [a.event_id for _, a in log.tail(0, 9)] == ["a", "b", "c", "d"]
    assert log.submit([], T).result() == room.Receipt([], 0)
    log.close()

def test_ids_are_remembered_as_long_as_was_asked_and_then_let_go(tmp_path):
    log, hour = EventLog(tmp_path, keep_hours=48), 3600
    log.submit([view(f"old{k}") for k in range(50)], T).result(); log.roll()
    assert log.submit([view("old3"), view("x")], T + 47.9 * hour).result().duplicates == 1
    for k in range(30): log.submit([view(f"new{k}")], T + 48.1 * hour).result()
    digests = lambda: sqlite3.connect(tmp_path/"arrivals"/"log.sqlite").execute("SELECT count(*) FROM seen").fetchone()[0]
    assert digests() == 31, "two old ones go for each that comes, and none that is young"
    assert log.submit([view("old3")], T + 48.1 * hour).result().duplicates == 0
    log.close()

def test_counts(log):
    log.submit([view("a"), view("b", ts=NOON - timedelta(seconds=3601)), view("x", ts=NOON - timedelta(seconds=3600)), view("a")], T).result()
    log.submit([view("ahead", ts=NOON + timedelta(minutes=50)), view("c", ts=NOON + timedelta(seconds=5))], T + 5).result()
    assert {k: v for k, v in log.counts().items() if "served" not in k} == dict(accepted=5, duplicates=1, late=1, out_of_order=2, waiting=0, waiting_bytes=0)

def test_a_client_who_has_gone_is_left_out_and_all_others_are_served(tmp_path, monkeypatch):
    gate, store = threading.Event(), EventLog._store
    monkeypatch.setattr(EventLog, "_store", lambda self, rows: (gate.wait(), store(self, rows))[1])
    log = EventLog(tmp_path)
    first = log.submit([view("a")], T)
    while not first.running(): time.sleep(.01)
    gone, stays = log.submit([view("b")], T), log.submit([view("c")], T)
    assert gone.cancel() and not first.cancel()
    gate.set()
    assert stays.result().accepted[0].event_id == "c" and first.result().duplicates == 0
    log.close()
    assert in_log(tmp_path) == ["a", "c"]

def test_a_full_queue_refuses_at_once_and_a_closing_log_writes_what_waits(tmp_path, monkeypatch):
    gate, store = threading.Event(), EventLog._store
    monkeypatch.setattr(EventLog, "_store", lambda self, rows: (gate.wait(), store(self, rows))[1]); monkeypatch.setattr(room, "BACKLOG", 3)
    log = EventLog(tmp_path)
    futures = [log.submit([view("a")], T)]
    while not futures[0].running(): time.sleep(.01)
    futures += [log.submit([view(e)], T) for e in "bcd"]
    with pytest.raises(RecsysError, match="batches are waiting"): log.submit([view("e")], T).result(0)
    closing = threading.Thread(target=log.close); closing.start(); gate.set(); closing.join()
    assert all(f.done() and f.result().duplicates == 0 for f in futures) and in_log(tmp_path) == list("abcd")

# ---- what may be in its place

def other_database(p: Path):
    with sqlite3.connect(p) as con: con.execute("CREATE TABLE mine (x)")
def of_another_version(p: Path):
    EventLog(p.parent.parent).close()
    with sqlite3.connect(p) as con: con.execute("PRAGMA user_version = 99")

@pytest.mark.parametrize("place", [lambda p: p.write_text("not a database, but long enough to be taken for one " * 90), other_database, of_another_version], ids=["text", "other", "version"])
def test_what_is_not_ours_is_one_clear_line_and_stays_as_it_is(tmp_path, place):
    path = tmp_path/"arrivals"/"log.sqlite"
    path.parent.mkdir(); place(path); before = path.read_bytes()
    for ask in (EventLog, roll_log, lambda d: tail_log(d, 0, 1), lambda d: forget_in_log(d, ["x"])):
        with pytest.raises(RecsysError, match="no log of events — move it away") as e: ask(tmp_path)
        assert "\n" not in str(e.value) and str(path) in str(e.value)
    assert path.read_bytes() == before

def test_a_damaged_log_is_one_clear_line(tmp_path):
    log = EventLog(tmp_path)
    log.submit([view(f"e{k}") for k in range(2000)], T).result(); log.close()
    path = tmp_path/"arrivals"/"log.sqlite"
    b = bytearray(path.read_bytes())
    for page in range(1, len(b) // 4096): b[page * 4096:page * 4096 + 16] = os.urandom(16)
    path.write_bytes(b)
    with pytest.raises(RecsysError, match="damaged"):
        log = EventLog(tmp_path)
        try: log.submit([view("x")], T).result()
        finally: log.close()

def test_a_new_log_begins_behind_the_files_of_the_old_one(tmp_path):
    log = EventLog(tmp_path)
    log.submit([view("a"), view("b")], T).result(); log.roll(); log.close()
    for f in (tmp_path/"arrivals").glob("log.sqlite*"): f.unlink()
    log = EventLog(tmp_path)
    log.submit([view("c")], T).result(); log.roll(); log.close()
    assert in_files(tmp_path) == ["a", "b", "c"] and [a.event_id for _, a in tail_log(tmp_path, 0, 9)] == ["a", "b", "c"]

# ---- a full disk

def fill_up(data: str, said):
    "Write until files may not grow, then let them grow again."
    log, free, k = EventLog(data), resource.RLIM_INFINITY, 0
    def post():
        nonlocal k; k += 1
        try: log.submit([view(f"{k}-{i}", context=dict(text="x" * 2000)) for i in range(20)], T).result(); return k, "ok"
        except Exception as e: return k, f"{type(e).__name__}: {e}"
    out = [post()]
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, free))
    out += [post() for _ in range(20)]
    log._shown.add(b"x" * 400_000); log._shown.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))
    out += [post(), post()]
    log._shown.add(b"y"); log._shown.flush()
    said.send((out, log.counts())); log.close()

def started(target, *args) -> multiprocessing.Process:
    "A fresh process of its own, from a server that has the imports."
    context = multiprocessing.get_context("forkserver"); context.set_forkserver_preload(["recsys.data.ingest", "recsys.data.log", "hypothesis", "pytest"])
    p = context.Process(target=target, args=args); p.start()
    return p

def told(target, *args):
    "What `target` sends from a process of its own."
    here, there = multiprocessing.get_context("forkserver").Pipe()
    p = started(target, *args, there); there.close()
    try: return here.recv()
    finally: p.join()

def as_after_a_full_disk(out, counts, data: Path):
    "Some batches were refused in one line, those after it were not, and just the acknowledged ones are there."
    ok = [k for k, what in out if what == "ok"]
    refused = [what for _, what in out if what != "ok"]
    assert out[0][1] == out[-1][1] == out[-2][1] == "ok" and refused and all(w.startswith("RecsysError") and "log.sqlite" in w and "\n" not in w for w in refused)
    assert Counter(in_files(data) + in_log(data)) == Counter(f"{k}-{i}" for k in ok for i in range(20)) and counts["accepted"] == 20 * len(ok)
    return refused

def test_a_file_that_may_not_grow_refuses_events_and_the_log_goes_on_when_it_may(tmp_path):
    out, counts = told(fill_up, str(tmp_path))
    as_after_a_full_disk(out, counts, tmp_path)
    assert (counts["served"], counts["served_dropped"]) == (1, 1) and list(served_records(tmp_path)) == [b"y"], "no half of a line is left before it"

def fill_disk(data: str, said):
    "Write until the disk is full, then free some of it."
    log, k = EventLog(data), 0
    def post():
        nonlocal k; k += 1
        try: log.submit([view(f"{k}-{i}", context=dict(text="x" * 2000)) for i in range(20)], T).result(); return k, "ok"
        except Exception as e: return k, f"{type(e).__name__}: {e}"
    out = [post()]
    ballast = Path(data)/"ballast"
    with ballast.open("wb", buffering=0) as f:
        try:
            while True: f.write(bytes(4096))
        except OSError: pass
    out += [post() for _ in range(200)]
    try: roll_log(data); rolled = "ok"
    except RecsysError as e: rolled = str(e)
    ballast.unlink()
    out += [post(), post()]
    said.send((out, log.counts(), rolled)); log.close()

@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_refuses_events_and_the_log_goes_on_when_there_is_room(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", tmp_path], capture_output=True).returncode: pytest.skip("mounting is not allowed here")
    try:
        out, counts, rolled = told(fill_disk, str(tmp_path))
        refused = as_after_a_full_disk(out, counts, tmp_path)
        assert any("the disk is full" in w for w in refused) and "disk is full" in rolled
        assert roll_log(tmp_path) and in_log(tmp_path) == [] and len(set(in_files(tmp_path))) == counts["accepted"]
    finally: subprocess.run(["umount", "-l", tmp_path], check=True)

# ---- many processes, and their deaths

def write(data: str, k: int, seed: int, rounds: int | None):
    "Post events that others of the same second post, too, and note each that was acknowledged."
    log, rng, acked, n = EventLog(data), random.Random(seed), os.open(f"{data}/acked-{k}", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 0
    while rounds is None or n < rounds:
        batches = [[f"{int(300 * time.time()) + rng.randrange(300)}" for _ in range(rng.choice([1, 1, 5, 30]))] for _ in range(4)]
        futures = [log.submit([view(e, visitor=f"w{k}") for e in ids], time.time()) for ids in batches]
        for ids, f in zip(batches, futures):
            got = f.result()
            assert got.duplicates + len(got.accepted) == len(ids)
            os.write(acked, "".join([f"{a.event_id} new\n" for a in got.accepted] + [f"{e} in\n" for e in ids]).encode())
        n += 1
        time.sleep(.01) # so that what is checked in the end is kills, not mere numbers
    log.close()

def roll_on(data: str):
    while True: roll_log(data, most=400)

def acknowledged(data: Path) -> tuple[set[str], Counter]:
    "The ids that were acknowledged, and how often each was acknowledged as new."
    lines = [l.split() for f in data.glob("acked-*") for l in f.read_text().splitlines()]
    return {l[0] for l in lines if len(l) == 2}, Counter(l[0] for l in lines if l[1:] == ["new"])

def everything(data: Path) -> list[str]: return [a.event_id for _, a in tail_log(data, 0, 10**7)]

def once_each(data: Path) -> set[str]:
    "Is each event that was acknowledged there, and none twice? Then roll, and ask the files the same. The ids that were acknowledged."
    acked, new = acknowledged(data)
    check(Counter(everything(data)), acked, new)
    roll_log(data)
    check(Counter(in_files(data)), acked, new)
    return acked

def check(there: Counter, acked: set[str], new: Counter):
    assert acked and acked <= set(there), "an acknowledged event is gone"
    assert {e for e, n in there.items() if n > 1} == set() and {e for e, n in new.items() if n > 1} == set(), "an event is there twice"

def test_four_processes_share_a_log(tmp_path):
    writers = [started(write, str(tmp_path), k, k, 40) for k in range(4)]
    while any(w.is_alive() for w in writers): roll_log(tmp_path, most=300)
    assert [w.exitcode for w in writers] == [0] * 4
    acked = once_each(tmp_path)
    assert acked == set(in_files(tmp_path)) == acknowledged(tmp_path)[1].keys()
    tail = tail_log(tmp_path, 0, 10**6)
    assert len(tail) == len(acked) and [p for p, _ in tail] == sorted({p for p, _ in tail}) and {a.visitor_id for _, a in tail} == {"w0", "w1", "w2", "w3"}

def kill_at_random(data: Path, kills: int, seed: int):
    "Two writers and a roller, of which one after the other is killed and started again."
    rng, jobs = random.Random(seed), {}
    start = dict(a=lambda: started(write, str(data), 0, rng.random(), None), b=lambda: started(write, str(data), 1, rng.random(), None), r=lambda: started(roll_on, str(data)))
    try:
        for n in range(kills + 1):
            for name in start: jobs.setdefault(name, None) or jobs.__setitem__(name, start[name]())
            time.sleep(rng.uniform(.3, 1.2))
            if n < kills:
                for name in ([*start] if rng.random() < .2 else [rng.choice([*start])]): jobs[name].kill(); jobs[name].join(); jobs[name] = None
                if n % 40 == 39:
                    acked = acknowledged(data) # first: what comes meanwhile is in the log before it is acknowledged
                    check(Counter(everything(data)), *acked)
    finally:
        for p in filter(None, jobs.values()): p.kill(); p.join()
    once_each(data)
    assert in_log(data) == [] and everything(data) == in_files(data) and len(in_files(data)) > 100

def test_whatever_is_killed_each_acknowledged_event_is_there_once(tmp_path): kill_at_random(tmp_path, 8, seed=1)

@pytest.mark.bench
def test_two_hundred_kills(tmp_path): kill_at_random(tmp_path, 200, seed=2)

def test_whoever_comes_out_must_go_behind_the_one_at_the_door(tmp_path):
    files, order = lambda: [(tmp_path/n).open("a") for n in ("door", "room")], []
    def visit(name):
        with room._in_line(*files()): order.append(name)
    def taken(n):
        with (tmp_path/n).open("a") as f:
            try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError: return True
    mine = files()
    other = threading.Thread(target=visit, args=("other",))
    with room._in_line(*mine):
        other.start()
        while not taken("door"): time.sleep(.01)
    with room._in_line(*mine): order.append("me again")
    other.join()
    assert order == ["other", "me again"]

def test_what_fails_half_way_leaves_nothing(tmp_path, log):
    with room.closing(room._open(tmp_path)) as con, pytest.raises(ZeroDivisionError), room._turn(con):
        room._append(con, [(view("a"), T)], 60); 1 / 0
    assert in_log(tmp_path) == [] and log.submit([view("a")], T).result().duplicates == 0

# ---- into files

class Killed(BaseException): pass

def dies_at(monkeypatch, step: int):
    "Let a roll end where a kill would end it: 0 before the plan, then after plan, file, mark, and the first rows removed."
    turn, write, n = room._turn, room._write_part, Counter()
    def die(*_): raise Killed
    def turns(con):
        n["turn"] += 1
        if step == 0 or (step == 2 and n["turn"] == 2) or (step == 3 and n["turn"] == 3) or (step == 4 and n["turn"] == 4): die()
        return turn(con)
    monkeypatch.setattr(room, "_turn", turns); monkeypatch.setattr(room, "REMOVE_ROWS", 2)
    if step == 1: monkeypatch.setattr(room, "_write_part", die)

@pytest.mark.parametrize("step", range(5))
def test_a_roll_that_dies_anywhere_is_finished_by_the_next(tmp_path, monkeypatch, step):
    log = EventLog(tmp_path)
    log.submit([view(e) for e in "abcde"], T).result()
    with monkeypatch.context() as m:
        dies_at(m, step)
        with pytest.raises(Killed): roll_log(tmp_path)
    assert (len(rolled_files(tmp_path)), len(in_log(tmp_path))) == [(0, 5), (0, 5), (1, 5), (1, 5), (1, 3)][step]
    log.submit([view("f")], T).result()
    assert everything(tmp_path) == list("abcdef"), "a reader of the log is not disturbed"
    roll_log(tmp_path)
    names = [f.name for f in rolled_files(tmp_path)]
    assert in_files(tmp_path) == list("abcdef") and in_log(tmp_path) == [] and names[0].endswith("5.parquet") == (step > 0) and len(names) == 1 + (step > 0)
    log.close()

def test_files_end_with_their_day_and_are_never_too_large(tmp_path, log):
    def post(e, hours): return log.submit([view(e, ts=NOON - timedelta(days=9))], T + hours * 3600).result()
    for e, hours in [("a", 1), ("b", 2), ("c", 11.9), ("d", 12), ("e", 11.99), ("f", 12.1), ("g", 36)]: post(e, hours)
    roll_log(tmp_path, most=2)
    days = {f"{f.parent.name}/{f.name}": pl.read_parquet(f)["event_id"].str.join("").item() for f in rolled_files(tmp_path)}
    assert [(k[:14], v) for k, v in days.items()] == [("day=2026-03-02", "ab"), ("day=2026-03-02", "c"), ("day=2026-03-03", "de"), ("day=2026-03-03", "f"), ("day=2026-03-04", "g")]
    assert log.roll() == []

def test_a_full_disk_stops_a_roll_with_one_line_and_loses_nothing(tmp_path, monkeypatch, log):
    def full(*_, **__): raise OSError(28, "No space left on device")
    log.submit([view("a")], T).result()
    with monkeypatch.context() as m:
        m.setattr(pl.DataFrame, "write_parquet", full)
        with pytest.raises(RecsysError, match="the disk is full"): log.roll()
    assert in_log(tmp_path) == ["a"] and log.roll() and in_files(tmp_path) == ["a"]
    assert not list((tmp_path/"arrivals").rglob("*.tmp-*"))

def test_a_file_says_what_was_posted(tmp_path, log):
    a = view("a", user_id="u", session_id="s", quantity=3, price=1.5, currency="EUR", order_id="o", request_id="r", position=4, placement="p", variant="x", context={"a": [1]}, consent=False)
    log.submit([a, Arrival("b", "search", "v", ts=NOON)], T + .25).result(); log.roll()
    first, second = pl.read_parquet(rolled_files(tmp_path)[0]).rows(named=True)
    assert {k: first[k] for k in Arrival.__struct_fields__ if k != "context"} == {k: getattr(a, k) for k in Arrival.__struct_fields__ if k != "context"}
    assert first["context"] == '{"a":[1]}' and first["received_ts"] == NOON + timedelta(seconds=.25) and first["flag"] is None and second["item_id"] is second["position"] is None and second["consent"]
    assert log.tail(0, 1)[0][1] == a, "and it comes back as it was"

@slow
@given(st.lists(st.one_of(st.tuples(st.just("post"), st.lists(st.integers(0, 30), min_size=1, max_size=6)), st.tuples(st.just("roll"), st.integers(1, 5)), st.tuples(st.just("forget"), st.integers(0, 3)),
    st.tuples(st.just("again"), st.just(0))), max_size=14), st.integers(1, 7))
def test_the_tail_is_the_log_in_order_whatever_happens_in_between(tmp_path_factory, steps, most):
    data = tmp_path_factory.mktemp("tail")
    log, known, there, gone = EventLog(data), set(), [], set()
    for what, x in steps:
        if what == "post":
            log.submit([view(str(k), visitor=f"v{k % 4}") for k in x], T).result()
            for k in x: known.add(k) if k in known else (known.add(k), there.append(k))
        elif what == "roll": roll_log(data, most=x)
        elif what == "forget": assert log.forget([f"v{x}"]) == sum(k % 4 == x for k in there); there = [k for k in there if k % 4 != x]
        else: log.close(); log = EventLog(data)
    read, after = [], 0
    while part := log.tail(after, most):
        assert len(part) <= most
        read += part; after = part[-1][0]
    assert [int(a.event_id) for _, a in read] == there and [p for p, _ in read] == sorted({p for p, _ in read})
    log.close()

# ---- forgetting

def test_nothing_of_somebody_who_is_forgotten_is_left_in_any_file(tmp_path):
    log = EventLog(tmp_path)
    ann, rest = "annabel-the-user", "bob-the-user"
    def post(k): log.submit([view(f"{k}1", "tablet-of-ann", user_id=ann), view(f"{k}2", "tablet-of-ann"), view(f"{k}3", "phone-of-bob", user_id=rest), view(f"{k}4", "phone-of-ann", user_id=ann)], T).result()
    post("a"); log.roll(); post("b")
    for who in (dict(user_id=ann), dict(request=dict(visitor_id="phone-of-ann")), dict(user_id=rest, items=[ann]), dict(user_id=rest)): log.served(msgspec.json.encode(who))
    log._shown.flush()
    assert log.forget([ann]) == 6 + 2
    assert [a.event_id for _, a in log.tail(0, 99)] == ["a3", "b3"] and in_files(tmp_path) == ["a3"] and len(list(served_records(tmp_path))) == 2
    data = b"".join(p.read_bytes() for p in (tmp_path/"arrivals").rglob("*") if p.is_file())
    assert b"bob-the-user" in data and not any(w in data for w in (b"annabel", b"tablet-of-ann", b"phone-of-ann"))
    assert all(i in Forgotten(tmp_path) for i in (ann, "tablet-of-ann", "phone-of-ann")) and rest not in Forgotten(tmp_path)
    assert log.forget([ann]) == 0 and log.submit([view("a3")], T).result().duplicates == 1
    log.close()

def test_the_visitors_of_the_last_ingest_are_forgotten_too_and_without_a_log_only_the_list_is_written(tmp_path):
    pl.DataFrame(dict(visitor_id=["old-laptop", "other"], user_id=["ann", "bob"])).write_parquet(tmp_path/"links.parquet")
    assert forget_in_log(tmp_path, ["ann"], tmp_path/"links.parquet") == 0 and "old-laptop" in Forgotten(tmp_path) and not (tmp_path/"arrivals").exists()
    log = EventLog(tmp_path)
    log.submit([view("a", "old-laptop"), view("b", "other")], T).result(); log.roll()
    assert log.forget(["ann"], tmp_path/"links.parquet") == 1 and in_files(tmp_path) == ["b"]
    log.close()

def test_what_was_said_of_products_for_somebody_goes_with_them_with_a_log_and_without(tmp_path):
    pl.DataFrame(dict(visitor_id=["old-laptop"], user_id=["ann"])).write_parquet(tmp_path/"links.parquet")
    def label(): # of Ann, of her laptop, of who is no user but an item, and half a line, as a kill leaves it
        for user, item in (("ann", "tea"), ("bob", "ann"), ("old-laptop", "tea"), ("ann", "kettle"), ("bob", "tea")): add_label(tmp_path, user, item, True)
        with labels_file(tmp_path).open("a") as f: f.write('{"user":"ann","it')
    for forget in (lambda: forget_in_log(tmp_path, ["ann"], tmp_path/"links.parquet"), lambda: EventLog(tmp_path).forget(["ann"], tmp_path/"links.parquet")):
        label(); forget()
        assert [(l.user, l.item) for l in read_labels(tmp_path)] == [("bob", "ann"), ("bob", "tea")] and b'"user":"ann"' not in labels_file(tmp_path).read_bytes()
    labels_file(tmp_path).write_text('{"user":"ann",\n{"user":"zoë",\n[1]\n')
    forget_in_log(tmp_path, ["ann", "zoë"]); assert labels_file(tmp_path).read_text() == "[1]\n"

def test_a_label_that_waits_while_somebody_is_forgotten_is_kept(tmp_path):
    for n in range(400): add_label(tmp_path, "ann" if n % 2 else "bob", f"i{n}", True)
    said = threading.Thread(target=lambda: [add_label(tmp_path, "carl", f"i{n}", True) for n in range(200)])
    said.start()
    for n in range(20): add_label(tmp_path, "ann", "tea", True); forget_in_log(tmp_path, ["ann"])
    said.join()
    assert Counter(l.user for l in read_labels(tmp_path)) == dict(bob=200, carl=200)

# ---- what was shown

def test_records_are_kept_in_order_and_dropped_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(shown_room, "SHOWN_WAITING", 100)
    shown = Shown(tmp_path)
    for k in range(150): shown.add(b'{"n": %d,\n"x": 1}' % k)
    shown.flush(); shown.add(b"{}"); shown.flush(); shown.flush()
    assert (shown.written, shown.dropped) == (101, 50)
    assert [msgspec.json.decode(r).get("n") for r in served_records(tmp_path)] == [*range(100), None]

def test_a_large_file_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(shown_room, "SHOWN_BYTES", 50)
    shown = Shown(tmp_path)
    for k in range(6): shown.add(b'{"n": "%020d"}' % k); shown.flush()
    assert len(list(tmp_path.rglob("*.jsonl"))) == 3 and [int(msgspec.json.decode(r)["n"]) for r in served_records(tmp_path)] == [*range(6)]

def test_a_file_that_is_replaced_while_a_process_writes_loses_nothing(tmp_path):
    shown, n = Shown(tmp_path), 300
    def go():
        for k in range(n): shown.add(msgspec.json.encode(dict(user_id="ann" if k % 3 == 0 else "bob", n=k))); shown.flush()
    t = threading.Thread(target=go); t.start()
    while t.is_alive():
        for f in tmp_path.rglob("*.jsonl"): out_of_shown(f, {"ann"})
    for f in tmp_path.rglob("*.jsonl"): out_of_shown(f, {"ann"})
    assert [msgspec.json.decode(r)["n"] for r in served_records(tmp_path)] == [k for k in range(n) if k % 3] and shown.written == n

def test_closing_writes_what_was_shown(tmp_path):
    log = EventLog(tmp_path)
    log.served(b'{"a":1}'); log.close()
    assert list(served_records(tmp_path)) == [b'{"a":1}'] and log.counts()["served"] == 1

# ---- into the ingest

LATE = START + timedelta(days=119, hours=20)

def buy(event_id: str, visitor: str = "new", ts: datetime = LATE, **more) -> Arrival: return Arrival(event_id, "purchase", visitor, "a1", ts, **more)

def take_in(shop: Path, out: Path) -> tuple[dict, pl.DataFrame]:
    "An ingest of the shop, without the notebook around it."
    said = ingest("shop.toml", out, None, datetime.now(timezone.utc), 30, 60, .05, shop, data_dir=shop/"data")
    return said, read_events(out/"events", None, flagged=True).collect()

def posted_in(df: pl.DataFrame) -> list[str]: return sorted(e for e in df["event_id"] if e.startswith("posted-"))

def test_an_ingest_reads_what_arrived_exactly_once_while_the_service_runs(tmp_path):
    shop, rows = make_shop(tmp_path/"shop"), events()
    log, digests = EventLog(shop/"data"), [source_digest("shop.toml", shop, shop/"data")]
    log.submit([buy("posted-1"), buy("posted-2", "c1"), buy(rows[0]["id"]), buy("posted-3", ts=START + timedelta(days=3))], LATE.timestamp()).result()
    log.roll(); log.submit([buy("posted-4", ts=LATE + timedelta(minutes=1)), buy("posted-1")], LATE.timestamp() + 60).result()
    digests.append(source_digest("shop.toml", shop, shop/"data"))
    said, there = take_in(shop, tmp_path/"one")
    assert (said["rows_read"], said["arrived"], said["recovered"], said["duplicates"], said["quarantined"]) == (len(rows), 5, 0, 1, 0) and said["rows"] == len(rows) + 4
    assert posted_in(there) == [f"posted-{k}" for k in (1, 2, 3, 4)] and there["session_id"].null_count() == 0
    assert there.filter(pl.col("event_id") == rows[0]["id"])["ts"].to_list() == [datetime.fromisoformat(rows[0]["time"])], "the copy that was known first stays"
    assert there.filter(pl.col("event_id") == "posted-3")["received_ts"].to_list() == [LATE], "and a late event is known only from when it came"
    digests.append(source_digest("shop.toml", shop, shop/"data"))
    again, same = take_in(shop, tmp_path/"two")
    assert again == said and same.equals(there) and digests[-1] == source_digest("shop.toml", shop, shop/"data")
    assert log.forget(["new"]) == 4
    said, there = take_in(shop, tmp_path/"three"); log.close()
    digests.append(source_digest("shop.toml", shop, shop/"data"))
    assert said["arrived"] == 1 and posted_in(there) == ["posted-2"] and len(set(digests)) == 4

def test_an_ingest_is_not_disturbed_by_a_roll_or_by_somebody_who_is_forgotten_meanwhile(tmp_path, monkeypatch):
    shop = make_shop(tmp_path/"shop")
    log = EventLog(shop/"data")
    log.submit([buy(f"posted-{k}", f"n{k}") for k in range(9)], LATE.timestamp()).result()
    write = ingest_room.write_log
    def meanwhile(*args, **kw):
        log.submit([buy("posted-later")], LATE.timestamp()).result(); log.roll()
        assert log.forget(["n3"]) == 1
        return write(*args, **kw)
    with monkeypatch.context() as m:
        m.setattr(ingest_room, "write_log", meanwhile)
        said, there = take_in(shop, tmp_path/"one")
    assert said["arrived"] == 9 and len(posted_in(there)) == 9
    said, there = take_in(shop, tmp_path/"two"); log.close()
    assert said["arrived"] == 9 and "posted-later" in posted_in(there) and "posted-3" not in posted_in(there)

def test_the_daily_run_rolls_what_is_left_and_runs_again_only_for_what_is_new(tmp_path):
    shop = make_shop(tmp_path/"shop")
    log = EventLog(shop/"data")
    log.submit([buy("posted-1"), buy("posted-2")], LATE.timestamp()).result()
    first, again = recsys(shop, "ingest"), recsys(shop, "ingest")
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    folder, = (shop/"data"/"steps").glob("ingest-*")
    assert read_json(folder/"ingest.json")["arrived"] == 2 and posted_in(read_events(folder/"events", None, flagged=True).collect()) == ["posted-1", "posted-2"]
    assert "unchanged" not in first.stdout.splitlines()[0] and "unchanged" in again.stdout.splitlines()[0]
    forgot = recsys(shop, "forget", "new"); log.close()
    assert forgot.returncode == 0 and "2 rows removed" in forgot.stdout, forgot.stdout + forgot.stderr

# ---- few files, and not for ever

def rolled_day(log, day: int, parts: list[list[str]]):
    for k, ids in enumerate(parts):
        log.submit([view(e, visitor=f"v-{e}") for e in ids], T + day * 86400 + k).result(); log.roll()

def test_files_of_past_days_become_one_and_nothing_is_lost_or_doubled(log, tmp_path):
    rolled_day(log, 0, [["a", "b"], ["c"], ["d", "e"]]); rolled_day(log, 1, [["f"], ["g"]])
    before, today = tail_log(tmp_path, 0, 99), (NOON + timedelta(days=1)).date()
    whole = room.compact_log(tmp_path, today)
    assert whole == 3 and [len(pl.read_parquet(f)) for f in rolled_files(tmp_path)] == [5, 1, 1] and room.compact_log(tmp_path, today) == 0
    assert tail_log(tmp_path, 0, 99) == before and tail_log(tmp_path, 3, 2) == before[3:5] and in_files(tmp_path) == list("abcdefg")
    assert log.submit([view("c")], T + 86400 + 9).result().duplicates == 1
    assert forget_in_log(tmp_path, ["v-d"]) == 1 and in_files(tmp_path) == list("abcefg")
    assert room.compact_log(tmp_path, today + timedelta(days=1)) == 2 and room.compact_log(tmp_path, today + timedelta(days=1), 3) == 0

def test_a_crash_between_the_new_file_and_the_old_ones_doubles_nothing(log, tmp_path, monkeypatch):
    rolled_day(log, 0, [["a"], ["b"], ["c"]])
    unlink = Path.unlink
    def dies(path, **how):
        if path.suffix == ".parquet" and not path.name.startswith("."): raise KeyboardInterrupt
        unlink(path, **how)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Path, "unlink", dies); room.compact_log(tmp_path, date(2030, 1, 1))
    assert len(list((tmp_path/"arrivals").glob("day=*/*.parquet"))) == 4 and in_files(tmp_path) == list("abc") and [a.event_id for _, a in tail_log(tmp_path, 1, 9)] == ["b", "c"]
    assert forget_in_log(tmp_path, ["v-b"]) >= 1
    assert not any("b" in pl.read_parquet(f)["event_id"].to_list() for f in (tmp_path/"arrivals").glob("day=*/*.parquet"))
    assert room.prune_log(tmp_path, date(2030, 1, 1)) == 3 and in_files(tmp_path) == ["a", "c"]  # the newest stays, and nothing comes back

def test_readers_while_files_are_put_together_see_each_event_once(log, tmp_path):
    want = [f"e{k}" for k in range(60)]
    rolled_day(log, 0, [[e] for e in want])
    seen, stop = [], threading.Event()
    def read():
        while not stop.is_set(): seen.append([a.event_id for _, a in tail_log(tmp_path, 0, 999)])
    reader = threading.Thread(target=read); reader.start()
    for most in (4, 16, 999): room.compact_log(tmp_path, date(2030, 1, 1), most)
    stop.set(); reader.join()
    assert seen and all(s == want for s in seen) and len(rolled_files(tmp_path)) == 1

def test_old_days_go_and_a_new_log_counts_on(log, tmp_path):
    rolled_day(log, 0, [["a"]]); rolled_day(log, 3, [["b"]]); rolled_day(log, 5, [["c"]])
    last, day = log.last(), NOON.date()
    assert room.prune_log(tmp_path, day) == 0 and room.prune_log(tmp_path, day + timedelta(days=4)) == 2 and in_files(tmp_path) == ["c"]
    assert room.prune_log(tmp_path, day + timedelta(days=99)) == 0
    log.close()
    for p in (tmp_path/"arrivals").glob("log.sqlite*"): p.unlink()
    new = EventLog(tmp_path)
    assert new.last() == last and new.submit([view("d")], T + 6 * 86400).result().accepted
    new.close()
    assert [a.event_id for _, a in tail_log(tmp_path, last, 9)] == ["d"]

def test_shown_lists_of_old_days_go(tmp_path):
    for day in ("2026-03-01", "2026-03-09"): (tmp_path/"served"/f"day={day}").mkdir(parents=True); (tmp_path/"served"/f"day={day}"/"1-1.jsonl").write_text("{}\n")
    assert shown_room.prune_shown(tmp_path, date(2026, 3, 9)) == 1 and list(served_records(tmp_path)) == [b"{}"] and not (tmp_path/"served"/"day=2026-03-01").exists()

def test_what_waits_is_bounded_in_bytes(tmp_path, monkeypatch):
    gate, store = threading.Event(), EventLog._store
    monkeypatch.setattr(EventLog, "_store", lambda self, rows: (gate.wait(), store(self, rows))[1])
    log = EventLog(tmp_path, backlog_mb=1)
    futures = [log.submit([view("a")], T, 2**19)]
    while not futures[0].running(): time.sleep(.01)
    futures += [log.submit([view("b")], T, 2**21), log.submit([view("c")], T, 0)]  # the first is taken, whatever its size
    with pytest.raises(RecsysError, match="2 MB of events are waiting"): log.submit([view("d")], T, 1).result(0)
    assert log.counts()["waiting_bytes"] == 2**21
    gate.set()
    assert all(f.result(20).duplicates == 0 for f in (futures[0], futures[1])) and log.counts()["waiting_bytes"] == 0
    assert log.submit([view("d")], T, 1).result().accepted
    log.close()
