"What the service remembers: the laws of its sets, and one suite for both stores, with real processes, real kills and a real Redis."
import functools, itertools, os, random, shutil, signal, socket, sqlite3, subprocess, sys, threading, time
from datetime import datetime, timezone
from types import SimpleNamespace

import lmdb, msgspec, polars as pl, pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from recsys.core.settings import RecsysError, load_settings
from recsys.data.events import Item as Contract, validate
from recsys.serving.live_items import Change, Item, overlaid, row_of, said
from recsys.serving.state import LocalStore, RedisStore, _used, boot_id, key, make_room, open_state
from recsys.serving.state_redis import _swapped
from recsys.serving.visitor import Record, Room, VisitorState, forgotten, gather, grown, links_in, merge, pack, records_of, state_of, unpack

REDIS = shutil.which("redis-server")
WIDE, TIGHT = Room(1000, 1000, 1000, 1000, 1000), Room(acts=3, cart=2, shown=3, links=2, follow=2)
NOW = float(int(time.time()))

def event(n, kind="view", item="tea", ts=NOW, visitor="v1", user=None, session=None, consent=True):
    "An event as the service gets it; `n` makes its id."
    return SimpleNamespace(event_id=f"event {n}", event_type=kind, item_id=item, ts=ts, visitor_id=visitor, user_id=user, session_id=session, consent=consent)

kinds = st.sampled_from("impression view view click add_to_cart add_to_cart remove_from_cart purchase return wishlist search".split())
one = st.builds(event, st.integers(0, 10**6), kinds, st.sampled_from("abcdef"), st.integers(0, 9).map(lambda m: NOW - 600. * m), st.sampled_from(["v1", "v2", "v3"]),
                st.sampled_from([None, None, "u1", "u2"]), st.sampled_from([None, "s1", "s2"]), st.sampled_from([True, True, True, False]))
logs = st.lists(one, max_size=25, unique_by=lambda e: e.event_id)

def remembered(batches, room) -> dict:
    "{name: packed record} after some batches."
    kept = {}
    for batch in batches:
        for name, r in records_of(batch, room).items(): kept[name] = grown(kept.get(name), r, room)
    return kept

def seen(s: VisitorState): return s.recent, s.session, s.cart, s.user_id, s.impressions, s.degraded

def ask(kept, visitor, user, session, room, now=NOW):
    packed, user = gather(lambda *name: kept.get(name), links_in, visitor, user, room.follow)
    return state_of(packed, user, session, now, room)

# ---- the laws

@given(logs, logs, logs)
def test_merging_is_commutative_associative_and_idempotent(a, b, c):
    a, b, c = (next(iter(records_of([*map(same_name, x)], TIGHT).values()), Record()) for x in (a, b, c))
    m = functools.partial(merge, room=TIGHT)
    assert m(a, b) == m(b, a) and m(m(a, b), c) == m(a, m(b, c)) and m(a, a) == a == m(a, Record()) and m(m(a, b), b) == m(a, b)

def same_name(e): e.visitor_id, e.user_id = "v1", None; return e

@given(logs, logs)
def test_links_obey_the_same_laws(a, b):
    m = functools.partial(merge, room=TIGHT)
    for x, y in itertools.product(records_of(a, TIGHT).values(), records_of(b, TIGHT).values()): assert m(x, y) == m(y, x) == m(m(x, y), x)

@given(logs, st.randoms(use_true_random=False), st.sampled_from([WIDE, TIGHT]))
def test_any_order_any_batches_any_repetition_come_to_the_same_bytes(log, rng, room):
    again = log + [e for e in log if rng.random() < .5]
    rng.shuffle(again)
    batches = []
    while again: n = rng.randint(1, 5); batches.append(again[:n]); again = again[n:]
    assert remembered(batches, room) == remembered([log], room)

@given(logs)
def test_what_is_packed_is_unpacked(log):
    for r in records_of(log, WIDE).values(): assert unpack(pack(r)) == r

@pytest.mark.parametrize("bad", [b"x", b"", b"\0" * 12, b"\0" * 40, pack(Record())[:-1], b"\xff" * 200])
def test_a_value_that_is_no_record_is_replaced_and_not_tripped_over(bad):
    new, = records_of([event(1)], WIDE).values()
    assert unpack(grown(bad, new, WIDE)) == new

# ---- what follows from the sets, against a plain reading of the log

def plainly(log, visitor, user, session, now=NOW, gap=1800):
    "The answer from all events, the long way."
    log = [e for e in log if e.consent]
    last = {}
    for e in sorted((e for e in log if e.user_id), key=lambda e: (e.ts, e.user_id)): last[e.visitor_id] = e.user_id
    user = user or last.get(visitor)
    theirs = lambda e: (not e.user_id and (e.visitor_id == visitor or user and last.get(e.visitor_id) == user)) or (user and e.user_id == user)
    order = ["impression", "view", "click", "add_to_cart", "remove_from_cart", "purchase", "return", "wishlist", "search"].index
    mine = sorted((e for e in log if theirs(e)), key=lambda e: (e.ts, order(e.event_type)), reverse=True)
    acts = [e for e in mine if e.event_type in ("view", "click", "add_to_cart", "purchase", "wishlist")]
    visit = [e for e in acts if session and e.session_id == session]
    if not visit:
        before = now
        for e in acts:
            if before - e.ts > gap: break
            visit.append(e); before = e.ts
    cart = {}
    for e in reversed(mine):
        if e.event_type in ("add_to_cart", "remove_from_cart", "purchase"): cart[e.item_id] = e.event_type
    shown = sorted((e.item_id, e.ts, any(a.item_id == e.item_id and a.ts >= e.ts for a in acts)) for e in mine if e.event_type == "impression")
    return {e.item_id: e.ts for e in reversed(acts)}, {e.item_id for e in visit}, {i for i, t in cart.items() if t == "add_to_cart"}, user, shown

questions = st.tuples(st.sampled_from(["v1", "v2", "new", None]), st.sampled_from([None, "u1", "u2", "new"]), st.sampled_from([None, "s1", "s9"]))

def agrees(state, wanted):
    newest, visit, cart, user, shown = wanted
    assert state.user_id == user and set(state.recent) == set(newest) and set(state.session) == visit and set(state.cart) == cart and sorted(state.impressions) == shown
    assert [newest[i] for i in state.recent] == sorted(newest.values(), reverse=True)
    assert len(state.recent) == len(set(state.recent)) and len(state.cart) == len(cart)

@settings(max_examples=300)
@given(logs, questions)
def test_the_answer_is_that_of_the_whole_log(log, question): agrees(ask(remembered([log], WIDE), *question, WIDE), plainly(log, *question))

def test_a_cart_outlives_a_long_look_around():
    room = Room(acts=5, cart=5, shown=5)
    log = [event(0, "add_to_cart", "kettle", NOW - 900)] + [event(n, random.Random(n).choice(["view", "impression"]), f"i{n}", NOW - 500 + n) for n in range(1, 200)]
    state = ask(remembered([[e] for e in log], room), "v1", None, None, room)
    assert state.cart == ["kettle"] and len(state.recent) == 5 and len(state.impressions) == 5 and "kettle" not in state.recent

def test_a_login_adds_and_never_counts_twice():
    log = [event(1, item="a", ts=NOW - 60), event(2, item="b", ts=NOW - 50, user="u1"), event(3, "add_to_cart", "b", NOW - 40, user="u1"), event(4, item="c", ts=NOW - 30)]
    kept = remembered([log], WIDE)
    assert ask(kept, "v1", None, None, WIDE).recent == ask(kept, "v1", "u1", None, WIDE).recent == ask(kept, None, "u1", None, WIDE).recent == ["c", "b", "a"]
    assert sum(len(unpack(d).acts) for d in kept.values()) == 4

def test_what_happens_in_one_second_keeps_the_order_of_a_purchase():
    log = [event(n, kind, "tea") for n, kind in enumerate(["purchase", "add_to_cart", "view"])]
    for order in itertools.permutations(log): assert ask(remembered([[e] for e in order], WIDE), "v1", None, None, WIDE).cart == []

@pytest.mark.parametrize("bought_by", [None, "ann"])
def test_also_across_a_login(bought_by):
    log = [event(1, "purchase", "tea", user=bought_by), event(2, "add_to_cart", "tea", user=None if bought_by else "ann"), event(3, "add_to_cart", "cup", user="ann")]
    assert ask(remembered([log], WIDE), "v1", "ann", None, WIDE).cart == ["cup"]

@pytest.mark.parametrize("after, followed", [(-1, False), (0, True), (1, True)])
def test_an_impression_was_followed_by_an_act_of_the_same_second_or_later(after, followed):
    log = [event(1, "impression", "tea"), event(2, "click", "tea", NOW + after), event(3, "impression", "cup", NOW - 5)]
    assert ask(remembered([log], WIDE), "v1", None, None, WIDE).impressions == [("tea", NOW, followed), ("cup", NOW - 5, False)]

def test_moments_may_be_datetimes():
    moment = datetime.fromtimestamp(NOW, timezone.utc)
    assert records_of([event(1, ts=moment)], WIDE) == records_of([event(1)], WIDE)

# ---- both stores

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A Redis of our own, without a disk."
    if REDIS is None: pytest.skip("redis-server is missing: apt-get install redis-server")
    with Server(tmp_path_factory.mktemp("redis")) as s: yield s

class Server:
    "A Redis that can be stopped and started again, on one port."
    def __init__(self, folder, *args):
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); self.port = s.getsockname()[1]
        self.folder, self.args, self.uri = folder, args, f"redis://127.0.0.1:{self.port}/0"
    def start(self):
        self.process = subprocess.Popen([REDIS, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.folder), *self.args], stdout=subprocess.DEVNULL)
        for _ in range(200):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0: return self
            time.sleep(.05)
        raise AssertionError("redis-server does not listen")
    def stop(self, how=signal.SIGKILL): self.process.send_signal(how); self.process.wait()
    __enter__ = start
    def __exit__(self, *_): self.stop()

@pytest.fixture(params=["local", "redis"])
def where(request, tmp_path):
    "Arguments from which `opened` makes a store, in this process or another."
    if request.param == "local": return "local", str(tmp_path/"state")
    uri = request.getfixturevalue("server").uri
    import redis; redis.Redis.from_url(uri).flushall()
    return "redis", uri

def opened(kind, at, room=WIDE, **kwargs): return LocalStore(at, room, **({"mb": 64} | kwargs)) if kind == "local" else RedisStore(at, room, **({"timeout_ms": 5000} | kwargs))

@pytest.fixture
def store(where):
    s = opened(*where)
    yield s
    s.close()

@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_store_answers_as_the_sets_do(store, data):
    "Each example has names of its own in the same store."
    log, question = data.draw(logs), data.draw(questions)
    own = os.urandom(4).hex() + "é:"
    for e in log: e.visitor_id, e.user_id = own + e.visitor_id, e.user_id and own + e.user_id
    visitor, user, session = (*(q and own + q for q in question[:2]), question[2])
    for i in range(0, len(log), 4): store.apply(log[i:i + 4])
    store.apply(log[::-1])
    state = store.read(visitor, user, session, NOW)
    assert seen(state) == seen(ask(remembered([log], WIDE), visitor, user, session, WIDE))
    agrees(state, plainly(log, visitor, user, session))

def test_only_the_newest_browsers_are_followed(where):
    s = opened(*where, room=TIGHT._replace(links=9))
    s.apply([e for n in range(5) for e in (event(n, item=f"at {n}", ts=NOW - 100 + n, visitor=f"b{n}"), event(10 + n, "search", None, NOW - 50 + n, f"b{n}", "u1"))])
    assert s.read(None, "u1", None, NOW).recent == ["at 4", "at 3"] and s.read("b4", "u1", None, NOW).recent == ["at 4", "at 3"] and s.read("b0", None, None, NOW).recent == ["at 4", "at 3", "at 0"]
    s.close()

@pytest.mark.parametrize("id", ["x" * 256, "𐍈" * 256, "a:b\n\0", "v", "' OR 1"])
def test_ids_are_any_text(store, id):
    store.apply([event(1, visitor=id, item=id), event(2, visitor=id, user=id, item=id)])
    assert store.read(id, None, None, NOW).recent == [id] and store.read(None, id, None, NOW).user_id == id and store.read(id[:-1] or "w", None, None, NOW).recent == []
    assert store.forget([id]) == 2 and store.read(id, id, None, NOW).recent == []

@pytest.mark.parametrize("visitor, user", [("v1", None), ("v1", "u1"), (None, "u1"), ("v2", "u1"), ("v2", None)])
def test_an_anonymous_past_is_read_once_whoever_asks(store, visitor, user):
    store.apply([event(1, "impression", "a", NOW - 9), event(2, "impression", "b", NOW - 8, "v2"), event(3, "search", None, user="u1"), event(4, "search", None, NOW, "v2", "u1")])
    assert [i for i, *_ in store.read(visitor, user, None, NOW).impressions] == ["b", "a"]

def test_nobody_is_asked_about_nothing(store):
    store.apply([]); store.apply([event(1, consent=False, user="u1"), event(2, "search", None)])
    assert seen(store.read(None, None, None, NOW)) == ([], [], [], None, [], False) == seen(store.read("v1", None, None, NOW))
    assert store.forget([]) == store.forget(["v1", "nobody"]) == 0

@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs, gone=st.lists(st.sampled_from(["v1", "v2", "u1", "u2"]), max_size=2, unique=True))
def test_the_forgotten_leave_no_name(store, log, gone):
    own = os.urandom(4).hex()
    for e in log: e.visitor_id, e.user_id = own + e.visitor_id, e.user_id and own + e.user_id
    store.apply(log)
    before = remembered([log], WIDE)
    n = store.forget([own + g for g in gone])
    after = {name: r for name in before if (r := everything(store).get(name))}
    assert n == len(before) - len(after)
    for name, d in after.items():
        assert name[1][8:] not in gone and not {l[1][8:] for l in unpack(d).links} & set(gone)
        assert unpack(d)[1:] == unpack(before[name])[1:]
        owner = unpack(before[name]).links[:1]
        assert name[0] == "u" or not owner or owner[0][1][8:] not in gone

def everything(store) -> dict:
    "{name: packed record} of a whole store."
    if isinstance(store, LocalStore):
        with store.env.begin() as t: return {(k[:1].decode(), k[1:].decode()): v for k, v in t.cursor()}
    keys = [k for k in store.writer.keys("recsys:1:[uv]*")]
    return {(k.decode()[9], k.decode()[10:]): v for k, v in zip(keys, store.writer.mget(keys) if keys else [])}

def test_records_end(where):
    s = opened(*where, room=WIDE._replace(days=1))
    s.apply([event(1, visitor="old", ts=NOW - 3 * 86400), event(2, visitor="new")])
    if where[0] == "local": assert s.sweep(NOW) == 1
    assert s.read("old", None, None, NOW).recent == [] and s.read("new", None, None, NOW).recent == ["tea"]
    if where[0] == "redis": assert 0 < s.writer.ttl("recsys:1:vnew") <= 86400
    s.close()

# ---- several processes

WRITER = """
import sys
from types import SimpleNamespace
from recsys.serving.live_items import Item
from recsys.serving.state import LocalStore, RedisStore
from recsys.serving.visitor import Room
kind, at, worker, batches, what, now = sys.argv[1:]
s = LocalStore(at, Room(*[1000] * 5), 64) if kind == "local" else RedisStore(at, Room(*[1000] * 5), 5000)
print("open", flush=True)
for b in range(int(batches)):
    if what == "events": s.apply([SimpleNamespace(event_id=f"{worker} {b} {n}", event_type="view", item_id=f"{worker}-{b}-{n}", ts=float(now) - b, visitor_id=f"v{n}", user_id=None, session_id=None, consent=True) for n in range(4)])
    else: s.put_items([Item(f"{worker}-{b}-{n}", stock=b) for n in range(4)])
    print(b, flush=True)
s.close()
"""

def writer(where, worker, batches, what="events"):
    return subprocess.Popen([sys.executable, "-c", WRITER, *where, str(worker), str(batches), what, str(NOW)], stdout=subprocess.PIPE, text=True)

def test_processes_write_the_same_visitors_and_lose_nothing(where):
    workers = [writer(where, w, 60) for w in range(2)]
    for p in workers: p.communicate(timeout=300); assert p.returncode == 0
    s = opened(*where)
    for n in range(4): assert set(s.read(f"v{n}", None, None, NOW).recent) == {f"{w}-{b}-{n}" for w in range(2) for b in range(60)}
    s.close()

def test_a_reader_sees_every_item_that_processes_put(where):
    "Versions are seen in order: nothing slips in behind a reader that polls all the time."
    s, workers, version, found = opened(*where), [writer(where, w, 40, "items") for w in range(2)], 0, set()
    while any(p.poll() is None for p in workers):
        version, items = s.items_since(version, 7); found |= {c.item_id for c in items}
    while items: version, items = s.items_since(version, 7); found |= {c.item_id for c in items}
    assert [p.wait() for p in workers] == [0, 0] and found == {f"{w}-{b}-{n}" for w in range(2) for b in range(40) for n in range(4)} and version == 320
    s.close()

@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.bench) for n in range(1, 20))])
def test_a_killed_writer_leaves_whole_batches_and_no_lock(where, seed):
    victim, other = writer(where, 0, 10**6), writer(where, 1, 30)
    lines = [victim.stdout.readline() for _ in range(random.Random(seed).randint(2, 40))]
    victim.kill()
    rest = victim.communicate(timeout=300)[0].split()
    other.communicate(timeout=300)
    last = int(rest[-1]) if rest else int(lines[-1])
    s = opened(*where)
    there = [{i for i in s.read(f"v{n}", None, None, NOW).recent if i.startswith("0-")} for n in range(4)]
    for n in range(4): assert {f"0-{b}-{n}" for b in range(min(last + 1, 900))} <= there[n]    # a record keeps 1000
    assert len({len(t) for t in there}) == 1 or where[0] == "redis" # of Redis' swaps each is whole
    assert other.returncode == 0 and {f"1-{b}-0" for b in range(30)} <= set(s.read("v0", None, None, NOW).recent)
    if where[0] == "local": assert not s.fresh
    s.close()

def test_readers_beside_a_writer_see_whole_batches(store):
    "Threads of one process, as in a worker."
    wrong, done = [], threading.Event()
    def read():
        while not done.is_set():
            state = store.read("v1", None, None, NOW)
            if state.degraded or {i[1:] for i in state.recent if i[0] == "a"} != {i[1:] for i in state.recent if i[0] == "b"}: wrong.append(state)
    readers = [threading.Thread(target=read) for _ in range(2)]
    for t in readers: t.start()
    for n in range(150): store.apply([event((n, x), item=f"{x}{n}", ts=NOW - n) for x in "ab"])
    done.set()
    for t in readers: t.join()
    assert wrong == [] and len(store.read("v1", None, None, NOW).recent) == 300

# ---- live items

def test_items_and_changes(store):
    assert store.items_since(0) == (0, []) and store.put_items([]) == 0
    assert store.put_items([Item("a", "A", stock=3), Item("b", attributes={"x": [1, "y", None]}), Change("a", stock=0), Change("nightly", price=2.5)]) == 4
    version, items = store.items_since(0)
    assert version == 4 and {c.item_id: said(c) for c in items} == {"b": said(overlaid(None, Item("b", attributes={"x": [1, "y", None]}))), "a": said(overlaid(None, Item("a", "A", stock=0))),
                                                                   "nightly": dict(item_id="nightly", price=2.5)}
    assert [c.item_id for c in items] == ["b", "a", "nightly"] and store.items_since(3) == (4, items[2:]) and store.items_since(4) == (4, [])
    assert store.put_items([Item("a")]) == 5 and store.items_since(4)[1] == [overlaid(None, Item("a"))]
    assert store.put_items([]) == 5

def test_pages_and_a_store_that_is_new(store):
    store.put_items([Item(f"i{n}") for n in range(25)])
    version, seen = 0, []
    while (page := store.items_since(version, 10))[1]: version, items = page; seen += [c.item_id for c in items]
    assert seen == [f"i{n}" for n in range(25)] and version == 25
    assert store.items_since(10**9, 1000)[0] == 25 and len(store.items_since(10**9)[1]) == 25

texts = st.text(max_size=20)
changes = st.builds(lambda id, known: Change(id, **known), st.sampled_from("abc"), st.fixed_dictionaries({}, optional=dict(title=st.none() | texts, price=st.none() | st.floats(0, 1e6), stock=st.none() | st.integers(-5, 5),
    available_to=st.none() | st.datetimes(timezones=st.just(timezone.utc)), attributes=st.none() | st.dictionaries(texts, texts | st.integers(-9, 9) | st.lists(texts), max_size=3))))
wholes = st.builds(Item, st.sampled_from("abc"), title=st.none() | texts, stock=st.none() | st.integers(0, 5))

@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(changes | wholes, max_size=12), cut=st.integers(1, 5))
def test_what_is_kept_of_an_item_is_what_was_said_last(store, messages, cut):
    start, wanted, own = store.put_items([]), {}, os.urandom(4).hex()
    for c in messages: c.item_id = own + c.item_id
    for i in range(0, len(messages), cut): store.put_items(messages[i:i + cut])
    for c in messages: wanted[c.item_id] = {**({} if isinstance(c, Item) else wanted.get(c.item_id, {})), **said(c)}
    version, items = store.items_since(start)
    assert {c.item_id: said(c) for c in items} == wanted and len(items) == len(wanted) and version == start + len(messages)

@given(wholes | changes)
def test_an_item_that_is_taken_passes_at_night(c):
    good, bad = validate(pl.DataFrame([row_of(c)]), Contract)
    assert bad.is_empty() or (said(c).get("available_to") or datetime.now(timezone.utc)).year < 1970

@pytest.mark.parametrize("bad", [b'{}', b'{"item_id": 7}', b'{"item_id": "a", "stock": 1.5}', b'{"item_id": "a", "stock": 3000000000}', b'{"item_id": "a", "price": 1e999}', b'{"item_id": "a", "currency": "euro"}',
    b'{"item_id": "a", "attributes": {"x": {"y": 1}}}', b'{"item_id": "a", "attributes": "x"}', b'{"item_id": "a", "item": 1}', b'{"item_id": "' + b"x" * 257 + b'"}'])
@pytest.mark.parametrize("kind", [Item, Change])
def test_unclear_items_are_refused(bad, kind):
    with pytest.raises(msgspec.MsgspecError): msgspec.json.decode(bad, type=kind)

# ---- the folder

@pytest.fixture
def local(tmp_path):
    s = LocalStore(tmp_path/"state", WIDE, mb=2)
    yield s
    s.close()

def test_what_was_closed_well_survives_the_machine_and_what_was_not_begins_empty(tmp_path):
    s = LocalStore(tmp_path/"state"); assert s.fresh
    s.apply([event(1)]); s.put_items([Item("a")]); s.close()
    assert (tmp_path/"state"/"in-use").read_text() == "closed"
    s = LocalStore(tmp_path/"state"); assert not s.fresh and s.read("v1", None, None, NOW).recent == ["tea"] and (tmp_path/"state"/"in-use").read_text() == boot_id()
    s.env.close(); s.items.close(); s.users.close()                               # killed
    s = LocalStore(tmp_path/"state"); assert not s.fresh and s.read("v1", None, None, NOW).recent == ["tea"]
    s.env.close(); s.items.close(); s.users.close()
    (tmp_path/"state"/"in-use").write_text("another start")                       # killed with the machine
    s = LocalStore(tmp_path/"state"); assert s.fresh and s.read("v1", None, None, NOW).recent == [] and len(s.items_since(0)[1]) == 1
    s.close()

def test_a_folder_of_another_machine_is_left_alone(tmp_path):
    s = LocalStore(tmp_path/"state"); s.apply([event(1)])
    (tmp_path/"state"/"in-use").write_text("the other machine's start")
    with pytest.raises(RecsysError, match="another machine"): LocalStore(tmp_path/"state")
    assert s.read("v1", None, None, NOW).recent == ["tea"] and (tmp_path/"state"/"visitors"/"data.mdb").exists()
    s.close()

def test_only_the_last_to_close_says_so(tmp_path):
    s, other = LocalStore(tmp_path/"state"), writer(("local", str(tmp_path/"state")), 0, 10**6)
    other.stdout.readline(); s.close()
    assert (tmp_path/"state"/"in-use").read_text() == boot_id()
    other.kill(); other.communicate()

def test_a_full_store_lets_the_longest_away_go(local):
    for n in range(60): local.apply([event((n, k), "view", f"item {k}" * 5, NOW - 1000 + n, f"visitor {n}-{k // 20}") for k in range(400)])
    assert _used(local) <= local.limit + (1 << 20)
    assert local.read("visitor 59-3", None, None, NOW).recent and local.read("visitor 0-3", None, None, NOW).recent == []
    kept = {int(name[1].split()[1].split("-")[0]) for name in everything(local)}
    assert kept == set(range(min(kept), 60)) and len(kept) > 3
    assert local.env.stat()["entries"] > 0 and make_room(local) > 0

def test_a_map_that_is_full_makes_room_or_says_so(tmp_path):
    s = LocalStore(tmp_path/"state", WIDE, mb=1)
    s.limit = 1 << 40                                                     # so that nothing is let go in time
    s.env.close(); s.env = lmdb.open(str(tmp_path/"state"/"visitors"), map_size=2 << 20, max_dbs=3, sync=False)
    for n in range(40): s.apply([event((n, k), "view", "x" * 200, NOW - 1000 + n, f"visitor {n}-{k // 10}") for k in range(200)])
    assert s.read("visitor 39-3", None, None, NOW).recent
    with pytest.raises(RecsysError, match="full.*state_mb"): s.apply([event(k, "view", f"{k}" * 200, NOW, f"w{k}") for k in range(9000)])
    assert s.read("w1", None, None, NOW).recent == [] and s.read("visitor 39-3", None, None, NOW).recent    # none of the batch is there, and not all others had to go
    s.apply([event(1)]); assert s.read("v1", None, None, NOW).recent == ["tea"]
    s.close()

FULL_DISK = """
import sys, resource, signal
sys.path.insert(0, sys.argv[1])
from test_state import *
s = opened("local", sys.argv[2])
s.apply([event(1)]); s.put_items([Item("a")])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
told = 0
for n in range(200):
    for work in (lambda: s.apply([event((n, k), item="x" * 100, visitor=f"{n}-{k}") for k in range(20)]), lambda: s.put_items([Item(f"{n}-{k}", "x" * 900) for k in range(5)])):
        try: work()
        except RecsysError as e: told += 1; last = str(e)
assert told > 20, told
assert s.read("v1", None, None, NOW).recent == ["tea"] and s.items_since(0)[1][0].item_id == "a"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
s.apply([event(2, item="later")]); s.put_items([Item("b")])
assert set(s.read("v1", None, None, NOW).recent) == {"tea", "later"}
print(last)
s.close()
"""

def test_a_full_disk_is_one_line_and_passes(tmp_path):
    run = subprocess.run([sys.executable, "-c", FULL_DISK, os.path.dirname(__file__), str(tmp_path/"state")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "failed" in run.stdout and run.stdout.count("\n") == 1

def test_a_folder_that_is_something_else_is_refused_and_kept(tmp_path):
    (tmp_path/"state"/"visitors").mkdir(parents=True)
    (tmp_path/"state"/"items").mkdir()
    (tmp_path/"state"/"items"/"data.mdb").write_text("a diary" * 1000)
    with pytest.raises(RecsysError, match="not a store of state"): LocalStore(tmp_path/"state")
    assert (tmp_path/"state"/"items"/"data.mdb").read_text() == "a diary" * 1000
    (tmp_path/"file").write_text("")
    with pytest.raises(RecsysError): LocalStore(tmp_path/"file"/"state")

def test_a_bad_value_degrades_one_visitor_until_the_next_event(store):
    store.apply([event(1), event(2, visitor="v2")])
    if isinstance(store, LocalStore):
        with store.env.begin(write=True) as t: t.put(key("v", "v1"), b"\xff" * 50)
    else: store.writer.set("recsys:1:vv1", b"\xff" * 50)
    assert store.read("v1", None, None, NOW).degraded
    if isinstance(store, RedisStore): store.resting = 0
    assert store.read("v2", None, None, NOW).recent == ["tea"]
    store.apply([event(3, item="cup")])
    assert store.read("v1", None, None, NOW).recent == ["cup"]

# ---- the server

@pytest.mark.skipif(REDIS is None, reason="redis-server is missing: apt-get install redis-server")
def test_a_server_that_goes_and_comes_back(tmp_path, caplog):
    server = Server(tmp_path)
    s = RedisStore(server.uri, WIDE, timeout_ms=2000)             # nobody listens yet
    assert s.read("v1", "ann", None, NOW).degraded and s.read("v1", "ann", None, NOW).user_id == "ann"
    for work in (lambda: s.apply([event(1)]), lambda: s.forget(["v1"]), lambda: s.put_items([Item("a")]), lambda: s.items_since(0)):
        with pytest.raises(RecsysError, match="state store"): work()
    with server:
        assert s.read("v1", None, None, NOW).degraded             # at rest: it is not even asked
        s.resting = 0
        s.apply([event(1)])
        assert s.read("v1", None, None, NOW).recent == ["tea"]
        s.writer.script_flush()                                   # as after a failover
        assert s.read("v1", None, None, NOW).recent == ["tea"]; s.writer.script_flush(); s.apply([event(2, item="cup")])
        server.process.send_signal(signal.SIGSTOP)                # it hangs
        quick = RedisStore(server.uri, WIDE, timeout_ms=50)
        assert quick.read("v1", None, None, NOW).degraded and quick.read("v1", None, None, NOW).degraded and quick.resting > 0
        server.process.send_signal(signal.SIGCONT); quick.close()
        assert set(s.read("v1", None, None, NOW).recent) == {"tea", "cup"}
    assert s.read("v1", None, None, NOW).degraded
    assert len([r for r in caplog.records if "does not answer" in r.getMessage()]) == 3    # one line for each failure, none for a request at rest
    s.close()

@pytest.mark.skipif(REDIS is None, reason="redis-server is missing: apt-get install redis-server")
def test_a_full_server_refuses_writes_and_goes_on_reading(tmp_path):
    with Server(tmp_path, "--maxmemory", "100kb", "--maxmemory-policy", "noeviction") as server:
        s = RedisStore(server.uri, WIDE, timeout_ms=2000)
        with pytest.raises(RecsysError, match="does not do it"): s.apply([event(1)])
        assert seen(s.read("v1", None, None, NOW)) == ([], [], [], None, [], False)
        s.close()

@pytest.mark.skipif(REDIS is None, reason="redis-server is missing: apt-get install redis-server")
def test_no_line_tells_the_password(tmp_path, caplog):
    with Server(tmp_path, "--requirepass", "right") as server:
        s = RedisStore(server.uri.replace("//", "//:s3cret@"), WIDE, timeout_ms=2000)
        assert s.read("v1", None, None, NOW).degraded
        with pytest.raises(RecsysError) as e: s.apply([event(1)])
        assert "s3cret" not in str(e.value) + caplog.text
        s.close()

def test_a_swap_that_comes_too_late_is_tried_again_but_not_for_ever(server):
    s, other, calls = RedisStore(server.uri, WIDE, 5000), RedisStore(server.uri, WIDE, 5000), []
    s.reader.flushall()
    def change(before, often):
        if len(calls) < often: other.apply([event(len(calls), item=f"theirs {len(calls)}")])
        calls.append(before)
        return grown(before, records_of([event("mine", item="mine")], WIDE)["v", "v1"], WIDE)
    _swapped(s, {("v", "v1"): functools.partial(change, often=2)})
    assert len(calls) == 3 and set(s.read("v1", None, None, NOW).recent) == {"mine", "theirs 0", "theirs 1"}
    s.forget(["v1"]); calls.clear()
    with pytest.raises(RecsysError, match="all the time"): _swapped(s, {("v", "v1"): functools.partial(change, often=10**9)})
    assert "mine" not in s.read("v1", None, None, NOW).recent
    s.close(); other.close()

# ---- the settings

def test_the_settings_choose(tmp_path, monkeypatch):
    shutil.copy(load_settings().file, tmp_path)
    s = open_state(load_settings(tmp_path/"settings.ini")); assert isinstance(s, LocalStore) and s.folder == tmp_path/"data"/"state" and s.room.gap == 1800; s.close()
    for at, kind in (("redis://127.0.0.1:1/0", RedisStore), ("unix:///nowhere", RedisStore)):
        monkeypatch.setenv("RECSYS_SERVING_STATE", at); s = open_state(load_settings(tmp_path/"settings.ini")); assert isinstance(s, kind); s.close()
    monkeypatch.setenv("RECSYS_SERVING_STATE", "postgres://somewhere")
    with pytest.raises(RecsysError, match="no address"): open_state(load_settings(tmp_path/"settings.ini"))

# ---- what it costs

def cost(f, n: int) -> float:
    "CPU µs of one call, the least of three tries."
    def once():
        start = time.process_time()
        for _ in range(n): f()
        return (time.process_time() - start) / n * 1e6
    return min(once() for _ in range(3))

@pytest.mark.bench
def test_a_read_and_a_batch_are_cheap_enough(tmp_path, capsys):
    "LMDB and SQLite with the same records, and whole reads of a store with 100,000 visitors of 20 events."
    rng, n = random.Random(0), 100_000
    s, picked = LocalStore(tmp_path/"state", Room(), mb=1024), lambda: f"v{rng.randrange(n)}"
    for start in range(0, n, 5000): s.apply([event((v, k), rng.choice(["view", "click", "add_to_cart", "impression"]), f"item-{rng.randrange(10**5)}", NOW - 60 * k, f"v{v}") for v in range(start, start + 5000) for k in range(20)])
    db = sqlite3.connect(tmp_path/"sqlite", isolation_level=None)
    for pragma in ("journal_mode=wal", "synchronous=normal", "mmap_size=1073741824"): db.execute(f"pragma {pragma}")
    db.execute("create table v (k text primary key, v blob) without rowid"); db.execute("begin")
    db.executemany("insert into v values (?, ?)", ((name[1], d) for name, d in everything(s).items())); db.execute("commit")
    def lmdb_two():
        with s.env.begin() as t: t.get(key("v", picked())), t.get(key("v", picked()))
    def lmdb_ten():
        with s.env.begin(write=True) as t:
            for _ in range(10): k = key("v", picked()); t.put(k, t.get(k)[::-1])
    def sqlite_ten():
        db.execute("begin immediate")
        for _ in range(10): k = picked(); v, = db.execute("select v from v where k = ?", (k,)).fetchone(); db.execute("replace into v values (?, ?)", (k, v[::-1]))
        db.execute("commit")
    found = dict(read=cost(lambda: s.read(picked(), None, None, NOW), 20_000), apply_10=cost(lambda: s.apply([event(rng.random(), "view", "new", NOW + rng.random(), picked()) for _ in range(10)]), 1000), items_since=cost(lambda: s.items_since(0), 20_000),
                 lmdb_two=cost(lmdb_two, 20_000), sqlite_two=cost(lambda: db.execute("select k, v from v where k in (?, ?)", (picked(), picked())).fetchall(), 20_000), lmdb_ten=cost(lmdb_ten, 1000), sqlite_ten=cost(sqlite_ten, 1000))
    with capsys.disabled(): print({k: round(v, 1) for k, v in found.items()}, "CPU µs")
    assert found["lmdb_two"] < found["sqlite_two"] and found["lmdb_ten"] < found["sqlite_ten"] and found["read"] < 30 # 15 on a quiet machine
    s.close()
