"Candidates, engine, bundle and server: what may not come out never does, and no question is odd enough to break anything."
import http.client, json, os, signal, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import polars as pl
import psutil
import pytest
from hypothesis import assume, given, settings, strategies as st

from recsys.candidates.blend import State, with_told
from recsys.candidates.covisitation import _rows, _strongest, follow, together
from recsys.core.settings import RecsysError
from recsys.features.definitions import ABSENT, ITEM, NAMES, SOURCES, USER
from recsys.features.point_in_time import DAY, sessions_of
from recsys.features.point_in_time import save_arrays
from recsys.ranking.ranker import fit_ranker, save_ranker
from recsys.ranking.rows import Cases, Rows
from recsys.core.settings import load_settings
from recsys.serving.app import check_media, parse, request_id_for, reserved, serve
from recsys.serving.bundle import current_bundle, open_bundle, promote, verify_bundle, versions, write_bundle
from recsys.serving.engine import Engine, Request, rank_cases, recommend
from recsys.serving.openapi import decoders_for
from recsys.serving.refused import Refused
from shop import ended, words

N_ITEMS, N_USERS, PER_SOURCE, BUDGET = 60, 20, 12, 30

# ---- a small shop of random tables

def tables(n=N_ITEMS, m=N_USERS, k=8, near=15, d=8, seed=0) -> State:
    "Random tables as the build writes them: distinct codes, -1 at the ends; users without history, items not for sale."
    rng = np.random.default_rng(seed)
    f32 = lambda *s: rng.random(s).astype(np.float32)
    def lists(rows, width):
        out = np.stack([rng.permutation(n)[:width] for _ in range(rows)]).astype(np.int32)
        for r in range(rows): out[r, rng.integers(0, width + 1):] = -1
        return out
    def rows(sizes, among, ordered=False):
        parts = [rng.permutation(among)[:s] for s in sizes]
        return np.cumsum([0, *sizes]).astype(np.int64), np.concatenate([np.sort(p) if ordered else p for p in parts]).astype(np.int32)
    bought, kinds, departments, recent = rng.integers(0, 25, m), rng.integers(0, 6, m), rng.integers(0, 3, m), rng.integers(0, 10, m)
    bought[0] = kinds[0] = departments[0] = recent[0] = 0
    (bp, bk), (kp, kk), (dp, dk), (rp, rk) = rows(bought, n), rows(kinds, 6, True), rows(departments, 3, True), rows(recent, n)
    category = np.stack([np.arange(n) % 6, np.arange(n) % 6 // 2, np.arange(n) % 3], 1).astype(np.int32)
    pair = lambda r: (f32(len(r), 9) * 9 + 1).astype(np.float32)
    popular = np.stack([rng.permutation(n)[:20] for _ in range(3)]).astype(np.int32)
    return with_told(State(f32(n, len(ITEM)), f32(m, len(USER)), category, bp, bk, pair(bk), kp, kk, pair(kk), dp, dk, pair(dk), rp, rk,
            rng.integers(1, 50, m).astype(np.float32),
                 lists(n, k), f32(n, k) + .01, lists(n, k), f32(n, k) + .01, f32(n, d), f32(n, d) - .5, f32(m, d), lists(n, k),
                         f32(n, k) + .01, lists(m, near),
                 rng.integers(0, 3, m).astype(np.int32), popular, (rng.random(n) > .1).astype(np.uint8)), near)

def publish(folder: Path, version="v1", state: State | None = None, n=N_ITEMS, m=N_USERS) -> Path:
    "A bundle in `folder`/bundles."
    rng = np.random.default_rng(1)
    if not (folder/"ranker.txt").exists():
        x = rng.random((800, len(NAMES))).astype(np.float32) * 3
        rows = Rows(x, (x[:, 0] + x[:, 40] > 4).astype(np.uint8), np.full(20, 40, np.int32), np.zeros(800, np.int32),
                np.arange(20, dtype=np.int32))
        save_ranker(fit_ranker([rows], rows, 12, 12, 40, leaves=8, learning_rate=.2, min_rows_in_leaf=5, cutoff=5, seed=0, threads=1)[0],
                folder/"ranker.txt")
    where = folder/f"tables-{version}"
    save_arrays(where, (state or tables())._asdict())
    items = pl.DataFrame(dict(item_id=[f"i{k}" for k in range(n)], title=[f"Item {k}" for k in range(n)], category=["A > B"] * n))
    return write_bundle(folder/"bundles", version, [where], folder/"ranker.txt", items, pl.Series([f"u{k}" for k in range(m)]),
            dict(moment="2026-03-05"))

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    publish(folder); promote(folder/"bundles", "v1")
    return folder

@pytest.fixture(scope="module")
def engine(shop):
    b = current_bundle(shop/"bundles")
    return Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b)

ids = st.one_of(st.integers(0, N_ITEMS - 1).map(lambda k: f"i{k}"), st.sampled_from(["unknown", "☃", "i-1", "I3"]))
people = st.one_of(st.none(), st.integers(0, N_USERS - 1).map(lambda k: f"u{k}"), st.just("stranger"))
requests = st.builds(Request, n=st.integers(1, 100), user_id=people, visitor_id=people, cart=st.lists(ids, max_size=12),
        items=st.lists(ids, max_size=5),
                     exclude=st.lists(ids, max_size=30), explain=st.booleans())

# ---- engine

def left_behind(engine) -> list[str]:
    "Fields of the scratch space that a request has not wiped."
    return [name for name, field in engine.work.scratch._asdict().items() if name not in ("code", "key", "best", "heard") and field.any()]

@settings(max_examples=150)
@given(request=requests)
def test_an_answer_keeps_its_promises(engine, request):
    answer = recommend(engine, request, "r")
    got = [s.item_id for s in answer.items]
    assert not set(got) & {*request.cart, *request.exclude, *request.items} and len(set(got)) == len(got) <= min(request.n, BUDGET)
    assert [s.rank for s in answer.items] == list(range(1, len(got) + 1)) and all(engine.state.sellable[int(i[1:])] for i in got)
    scores = [s.score for s in answer.items]
    assert scores == sorted(scores, reverse=True) and all(s.source and len(s.reason) == len(s.source) for s in answer.items)
    assert not left_behind(engine)
    again = recommend(engine, request, "r")
    assert [(s.item_id, s.score) for s in again.items] == [(s.item_id, s.score) for s in answer.items]
    assert msgspec.json.decode(msgspec.json.encode(answer), type=type(answer)) == answer

@settings(max_examples=60)
@given(request=requests)
def test_scores_are_the_ranker_s_and_explanations_add_up(engine, request):
    request.explain = True
    answer = recommend(engine, request, "r")
    code = {int(i): r for r, i in reversed(list(enumerate(engine.work.ids)))}  # the first rows are this request's
    rows = [code[int(s.item_id[1:])] for s in answer.items]
    assume(rows)
    x = engine.work.x[rows]
    np.testing.assert_allclose([s.score for s in answer.items], engine.ranker.predict(x, num_threads=1), atol=1e-5)
    shap = engine.ranker.predict(x, pred_contrib=True, num_threads=1)
    np.testing.assert_allclose(shap.sum(1), engine.ranker.predict(x, num_threads=1), atol=1e-6)
    for s, values in zip(answer.items, shap):
        assert len(s.contributions) == 5
        np.testing.assert_allclose(sorted(map(abs, s.contributions.values())), np.sort(np.abs(values[:-1]))[-5:], atol=1e-4)
        for name, value in s.contributions.items(): assert abs(values[NAMES.index(name)] - value) < 1e-4

def test_more_than_there_is(engine):
    everything = recommend(engine, Request(user_id="u3", n=500), "r").items
    assert 0 < len(everything) <= BUDGET
    assert recommend(engine, Request(user_id="u3", n=500, exclude=[f"i{k}" for k in range(N_ITEMS)]), "r").items == []
    assert [s.item_id for s in recommend(engine, Request(user_id="u3", n=3), "r").items] == [s.item_id for s in everything[:3]]

def test_strangers(engine):
    stranger, unknown = recommend(engine, Request(), "r"), recommend(engine, Request(user_id="nobody", cart=["unknown"]), "r")
    assert stranger.items == unknown.items and stranger.items and stranger.fallback_level == unknown.fallback_level == 3
    assert {x for s in stranger.items for x in s.source} == {"segment"} and not any(s.contributions for s in stranger.items)
    assert recommend(engine, Request(visitor_id="u3"), "r").items == recommend(engine, Request(user_id="u3"), "r").items
    assert recommend(engine, Request(user_id="u3"), "r").fallback_level == recommend(engine, Request(cart=["i3"]), "r").fallback_level == 0

def test_what_is_looked_at_never_comes_back_even_behind_a_full_cart(shop, tmp_path):
    (tmp_path/"ranker.txt").write_bytes((shop/"ranker.txt").read_bytes())
    b = open_bundle(publish(tmp_path, state=tables(n=300, seed=5), n=300))
    popular = [f"i{k}" for k in b.state.segment_items[0]]
    cart = [i for i in b.item_codes if i not in popular][:200]
    found = recommend(Engine(b.state, b.ranker, 150, 250, b), Request(cart=cart, items=popular, n=500), "r").items
    assert found and not {s.item_id for s in found} & set(popular)

@settings(max_examples=30)
@given(data=st.lists(st.tuples(st.integers(-1, N_USERS - 1), st.lists(st.integers(0, N_ITEMS - 1), max_size=8, unique=True)),
        max_size=12), k=st.integers(1, 40))
def test_offline_lists_are_the_online_lists(engine, data, k):
    cases = Cases(np.array([u for u, _ in data], np.int32), np.cumsum([0, *(len(c) for _, c in data)]).astype(np.int64),
                  np.array([i for _, c in data for i in c], np.int32), np.zeros(len(data) + 1, np.int64), np.zeros(0, np.int32),
                          np.zeros(len(data), bool))
    lists = rank_cases(engine, cases, k)
    assert lists.shape == (len(data), k)
    for (user, cart), found in zip(data, lists):
        online = recommend(engine, Request(user_id=f"u{user}" if user >= 0 else None, cart=[f"i{i}" for i in cart], n=k), "r")
        assert [f"i{i}" for i in found if i >= 0] == [s.item_id for s in online.items] and (found[len(online.items):] == -1).all()

BOUNDS = '''
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from test_serving import *
import numba; assert numba.config.BOUNDSCHECK == 1
b, rng = current_bundle(sys.argv[1]), np.random.default_rng(3)
for per_source, budget in ((12, 30), (1, 10), (150, 400)):
    e = Engine(b.state, b.ranker, per_source, budget, b)
    for t in range(250):
        user = [-1, 0, N_USERS - 1, int(rng.integers(-1, N_USERS))][t % 4]
        cart = rng.permutation(N_ITEMS)[:[0, 1, N_ITEMS, int(rng.integers(0, 20))][t % 4]].astype(np.int32)
        barred = np.r_[rng.integers(0, N_ITEMS, [0, 5, 100][t % 3]), [0, N_ITEMS - 1][t % 2]].astype(np.int32)
        rows, scores, _ = e.rank(user, cart, barred, 20)
        assert not {*e.work.ids[rows]} & {*cart, *barred} and not left_behind(e)
print("inside")
'''

def test_compiled_code_stays_inside_its_arrays(shop, tmp_path):
    env = dict(os.environ, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", BOUNDS, str(shop/"bundles"), str(Path(__file__).parent)], env=env, capture_output=True,
            text=True, timeout=300)
    assert done.stdout.strip() == "inside", done.stderr[-2000:]

# ---- candidates

def oracle_turns(lists, sellable, barred, budget):
    "[(item, ranks)] by the words of the room: lists take turns by rank; what is barred or not for sale is skipped."
    order = []
    for r in range(lists.shape[1]):
        for s in range(len(lists)):
            j = int(lists[s, r])
            if j >= 0 and j not in barred and sellable[j] and j not in order and len(order) < budget: order.append(j)
    return [(j, [next((float(r) for r in range(lists.shape[1]) if lists[s, r] == j), ABSENT) for s in range(len(lists))]) for j in order]

@settings(max_examples=80)
@given(user=st.integers(-1, N_USERS - 1), cart=st.lists(st.integers(0, N_ITEMS - 1), max_size=8, unique=True),
        barred=st.lists(st.integers(0, N_ITEMS - 1), max_size=8, unique=True),
       budget=st.integers(10, 40))
def test_the_blend_takes_turns(shop, user, cart, barred, budget):
    b = current_bundle_once(shop)
    e = Engine(b.state, b.ranker, PER_SOURCE, budget)
    rows, _, _ = e.rank(user, np.array(cart, np.int32), np.array(barred, np.int32), budget)
    s, lists = b.state, e.work.lists
    assert len(rows) <= budget and len({*e.work.ids[:len(rows)]}) == len(rows)
    expected = oracle_turns(lists, s.sellable, {*cart, *barred}, budget)
    assert [(int(i), list(r)) for i, r in zip(e.work.ids[:len(rows)], e.work.ranks[:len(rows)])] == expected
    full = lambda codes: ([int(i) for i in codes] + [-1] * PER_SOURCE)[:PER_SOURCE]
    own = s.bought_key[s.bought_ptr[user]:s.bought_ptr[user + 1]] if user >= 0 else []
    assert list(lists[0]) == full(own) and list(lists[3]) == full(s.user_near[user] if user >= 0 else [])
    assert list(lists[5]) == full(s.segment_items[s.segment[user] if user >= 0 else 0])
    newest = s.recent_key[s.recent_ptr[user]:s.recent_ptr[user + 1]] if user >= 0 else []
    for row, ids_, scores, source, decay in ((1, s.together_ids, s.together_scores, cart, 1),
            (2, s.follow_ids, s.follow_scores, newest, .97), (4, s.cart_ids, s.cart_scores, cart, 1)):
        total = {}
        for n, i in enumerate(source):
            for j, score in zip(ids_[i], scores[i]):
                if j >= 0: total[int(j)] = total.get(int(j), 0) + decay ** n * float(score)
        np.testing.assert_allclose([total[int(j)] for j in lists[row] if j >= 0], sorted(total.values(), reverse=True)[:PER_SOURCE],
                rtol=1e-5)
        column = {1: "score_together", 2: "score_follow"}.get(row)
        known = sorted(total, key=total.get, reverse=True)[:15] if row == 2 else total  # the night keeps as many as its lists are long
        if column: np.testing.assert_allclose(e.work.x[:len(rows), NAMES.index(column)],
                [total[int(j)] if j in known else 0 for j in e.work.ids[:len(rows)]], rtol=1e-5, atol=1e-6)

_OPEN = {}
def current_bundle_once(shop):
    if shop not in _OPEN: _OPEN[shop] = current_bundle(shop/"bundles")
    return _OPEN[shop]

@st.composite
def visits(draw):
    "Random lines (user, session, item, type, ts) of sessions in order of (user, time)."
    rows, session = [], 0
    for user in range(draw(st.integers(1, 4))):
        for visit in range(draw(st.integers(1, 4))):
            seen = draw(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["view", "purchase"])), min_size=1, max_size=6, unique=True))
            rows += [(user, session, i, t, visit * 5 * 86400 + n) for n, (i, t) in enumerate(sorted(seen))]
            session += 1
    return pl.DataFrame(rows, schema=dict(user=pl.Int32, session=pl.Int32, item=pl.Int32, type=pl.String, ts=pl.Int64), orient="row")

def dense(left, right, weight, n=7, shrink=5.0):
    "Cosine with shrinkage between all items; left, right: [(item, context)]."
    a, b = np.zeros((n, len(weight))), np.zeros((n, len(weight)))
    for m, rows in ((a, left), (b, right)):
        for i, c in rows: m[i, c] += 1
    shared, strength = a @ np.diag(weight) @ b.T, lambda m: m @ weight + shrink
    np.fill_diagonal(shared, 0)
    return shared / np.sqrt(np.outer(strength(a), strength(b)))

def agree(ids, scores, full, k):
    for i, row in enumerate(full):
        want = np.sort(row[row > 0])[::-1][:k]
        have = ids[i] >= 0
        assert have.sum() == len(want) and not have[len(want):].any() and len({*ids[i][have]}) == have.sum() and i not in ids[i]
        np.testing.assert_allclose(scores[i][have], want, rtol=1e-4)
        np.testing.assert_allclose(row[ids[i][have]], want, rtol=1e-4)

@settings(max_examples=80)
@given(lines=visits(), k=st.integers(1, 8), pairs=st.sampled_from([("purchase>purchase:1",), ("view>view:0.2", "view>purchase:0.6"),
        ("view>purchase:2", "purchase>purchase:0.5", "purchase>view:0.1")]))
def test_covisitation_within_a_session_equals_the_dense_matrix(lines, k, pairs):
    sessions, moment = sessions_of(lines), 40 * DAY
    base = .5 ** ((moment - sessions["ts"].to_numpy()) / DAY / 20) / np.sqrt(sessions["size"].to_numpy())
    left, right, weights = [], [], []
    for n, pair in enumerate(pairs):
        types, w = pair.split(":"); a, b = types.split(">")
        for side, kind in ((left, a), (right, b)): side += [(i, s + n * len(base)) for _, s, i, t, _ in lines.rows() if t == kind]
        weights.append(base * float(w))
    agree(*together(lines, sessions, 7, moment, 20, pairs, k), dense(left, right, np.concatenate(weights)), k)

@settings(max_examples=80)
@given(lines=visits(), k=st.integers(1, 8))
def test_covisitation_with_the_next_session_equals_the_dense_matrix(lines, k):
    lines = lines.filter(pl.col("type") == "purchase")
    assume(lines.height)
    sessions, moment = sessions_of(lines), 40 * DAY
    code = {s: n for n, s in enumerate(sessions["session"])}
    user = dict(sessions.select("session", "user").iter_rows())
    after = {a: b for a, b in zip(sessions["session"], sessions["session"][1:]) if user[a] == user[b]}
    weight = .5 ** ((moment - sessions["ts"].to_numpy()) / DAY / 20) / np.sqrt(sessions["size"].to_numpy())
    left = [(i, code[after[s]]) for _, s, i, _, _ in lines.rows() if s in after]
    agree(*follow(lines, sessions, 7, moment, 20, k), dense(left, [(i, code[s]) for _, s, i, _, _ in lines.rows()], weight), k)

def test_sessions_that_no_longer_count_are_passed_over():
    "2 ** -(age / half-life) is 0 in float32 after some 150 half-lives; the kernel is run as plain Python, which sees the ends of arrays."
    item, context, nothing = np.tile(np.arange(3), 50), np.repeat(np.arange(50), 3), np.zeros(50, np.float32)
    kind, one = np.zeros(len(item), np.int8), np.ones((1, 1), np.float32)
    ids_, scores = _strongest.py_func(*_rows(item, 3, context, kind), *_rows(context, 50, item, kind), nothing, one, np.zeros(3, np.float32),
            np.zeros(3, np.float32), np.float32(5), 2)
    assert (ids_ == -1).all() and not scores.any()

# ---- bundle

@pytest.fixture
def made(shop, tmp_path):
    (tmp_path/"ranker.txt").write_bytes((shop/"ranker.txt").read_bytes())
    return publish(tmp_path)

def test_a_whole_bundle_comes_back(made):
    b = open_bundle(made)
    assert verify_bundle(made)["version"] == "v1" == b.manifest["version"] and b.manifest["moment"] == "2026-03-05"
    for mine, theirs in zip(tables(), b.state): np.testing.assert_array_equal(mine, theirs)
    assert not any(a.flags.writeable for a in b.state) and b.user_codes["u3"] == b.item_codes["i3"] == 3

@pytest.mark.parametrize("name,what", [("manifest.json", "no such file"), ("ranker.txt", "no such model"),
        ("items.parquet", "broken table"), ("users_slots.npy", "cannot be read"),
                                       ("state/segment.npy", "lacks segment"), ("state/item_x.npy", "lacks item_x")])
def test_a_missing_file_is_named(made, name, what):
    (made/name).unlink()
    with pytest.raises(RecsysError, match=what): open_bundle(made)
    with pytest.raises(RecsysError, match=Path(name).name): verify_bundle(made)

@pytest.mark.parametrize("name,what", [("manifest.json", "not JSON"), ("ranker.txt", "not a LightGBM model"),
        ("items.parquet", "broken table"), ("state/segment.npy", "broken array")])
@pytest.mark.parametrize("junk", [b"", b"\x00\xff junk"])
def test_a_broken_file_is_named(made, name, what, junk):
    (made/name).unlink(); (made/name).write_bytes(junk)
    with pytest.raises(RecsysError, match=what): open_bundle(made)

def test_every_changed_byte_is_seen(made):
    for file in [p for p in made.rglob("*") if p.is_file() and p.name != "manifest.json"]:
        before = file.read_bytes()
        at = len(before) // 2
        file.unlink(); file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1:])
        with pytest.raises(RecsysError, match=f"{file.name} is not what the manifest says"): verify_bundle(made)
        file.write_bytes(before)
    (made/"extra.txt").touch()
    with pytest.raises(RecsysError, match="extra.txt"): verify_bundle(made)

def test_other_features_are_refused(made):
    text = (made/"ranker.txt").read_text()
    (made/"ranker.txt").unlink(); (made/"ranker.txt").write_text(text.replace("bought_count", "bought_often"))
    with pytest.raises(RecsysError, match="other features"): open_bundle(made)

@pytest.mark.parametrize("field,change", [("user_x", lambda a: a[:-1]), ("item_x", lambda a: np.vstack([a, a[:1]])),
        ("bought_ptr", lambda a: a[1:]), ("together_ids", lambda a: a + 50),
                                          ("segment", lambda a: a + 9), ("segment_items", lambda a: a + N_ITEMS),
                                                  ("vector_out", lambda a: a[:5]), ("user_near", lambda a: a - 5)])
def test_tables_that_do_not_fit_are_never_published(shop, tmp_path, field, change):
    (tmp_path/"ranker.txt").write_bytes((shop/"ranker.txt").read_bytes())
    with pytest.raises(RecsysError, match=field): publish(tmp_path, state=tables()._replace(**{field: change(getattr(tables(), field))}))
    assert not list((tmp_path/"bundles").iterdir())

HOLES = [("together_scores", lambda a: a[:, :2]), ("follow_ids", lambda a: np.tile(a, 4)), ("vector_in", lambda a: a[:, :2]),
        ("user_vector", lambda a: np.tile(a, 2)),
         ("category", lambda a: a[:, :2]), ("bought_ptr", lambda a: a + 5), ("bought_key", lambda a: np.full_like(a, -1)),
                 ("bought_x", lambda a: a[:3]),
         ("segment", lambda a: a - 9), ("item_x", lambda a: a[:, :3])]

@pytest.mark.parametrize("field,change", HOLES, ids=[f"{n}-{k}" for k, (n, _) in enumerate(HOLES)])
def test_tables_that_would_crash_the_process_are_never_published(shop, tmp_path, field, change):
    (tmp_path/"ranker.txt").write_bytes((shop/"ranker.txt").read_bytes())
    wrong = tables()._replace(**{field: change(getattr(tables(), field))})
    with pytest.raises(RecsysError, match=field.split("_")[0]): publish(tmp_path, state=wrong)

def test_promote(made):
    folder = made.parent
    with pytest.raises(RecsysError, match="no bundle has been published"): current_bundle(folder)
    with pytest.raises(RecsysError, match="no such version.*v1"): promote(folder, "v9")
    promote(folder, "v1"); publish(folder.parent, "v2")
    assert current_bundle(folder).manifest["version"] == "v1" and versions(folder) == ["v1", "v2"]
    promote(folder, "v2")
    assert current_bundle(folder).folder == (folder/"v2").resolve() and os.readlink(folder/"current") == "v2"
    with pytest.raises(RecsysError): promote(folder, "v9")
    assert current_bundle(folder).manifest["version"] == "v2" and not [p for p in folder.iterdir() if p.name.startswith(".")]

def test_readers_of_current_never_see_a_gap(made):
    folder = made.parent
    publish(folder.parent, "v2"); promote(folder, "v1")
    flip = ("import sys; from recsys.serving.bundle import promote\nprint('go', flush=True)\n"
            "for k in range(3000): promote(sys.argv[1], f'v{k % 2 + 1}')")
    with subprocess.Popen([sys.executable, "-c", flip, str(folder)], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        seen = set()
        while writer.poll() is None: seen.add(json.loads((folder/"current"/"manifest.json").read_text())["version"])
    assert writer.returncode == 0 and seen == {"v1", "v2"}

# ---- the parts of the app that need no network

def test_ids_of_requests():
    for good in ("a", "trace-1.2:3_4", "0" * 128): assert request_id_for(good) == good
    for bad in (None, "", "0" * 129, "a b", "a\n", "é", "<x>", "a\n\n"):
        assert len(request_id_for(bad)) == 32 and request_id_for(bad) != bad
    assert len({request_id_for(None) for _ in range(1000)}) == 1000

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(), s, max_size=4), max_leaves=8)
odd_bodies = st.one_of(
    st.binary(max_size=200), st.text().map(str.encode), json_values.map(lambda v: json.dumps(v).encode()),
    st.dictionaries(st.sampled_from(["n", "user_id", "visitor_id", "session_id", "placement", "items", "cart", "exclude", "explain",
                                     "N", ""]), json_values, max_size=5).map(lambda v: json.dumps(v).encode()),
    st.sampled_from([b"", b"{", b"{}{}", b"\xff\xfe{}", b"[" * 50_000, b'{"cart":' + b"[" * 50_000, b'{"user_id":"\\ud800"}',
            b'{"n":1e400}', b'{"n":10.5}', b'{"n":-0}', b'{"n":18446744073709551617}',
                     b'{"user_id":"' + b"x" * 257 + b'"}', json.dumps(dict(cart=["i1"] * 201)).encode(),
                             b'{"x":"' + b"y" * 100_000 + b'"}', b'{"n":1,"n":"2"}', b"\x00" * 300_000, b"NaN", b'\xef\xbb\xbf{}']))

@settings(max_examples=300)
@given(body=odd_bodies)
def test_parse_refuses_or_understands(body):
    try: assert 1 <= parse(decoders_for(100)["recommend"], body).n <= 100
    except Refused as e:
        assert e.status == 400 and e.code in ("invalid_json", "invalid_request")
        assert 5 < len(json.loads(e.body())["error"]["message"]) <= 300

def test_media():
    for good in ("application/json", "Application/JSON ; charset=utf-8"): check_media({"content-type": good})
    for bad in ({}, {"content-type": "text/json"}, {"content-type": "application/json", "content-encoding": "gzip"}, {"content-type": ""}):
        with pytest.raises(Refused) as e: check_media(bad)
        assert e.value.status == 415

def test_addresses():
    with reserved("127.0.0.1", 0) as (a, port), pytest.raises(OSError), socket.socket() as s: s.bind((a, port))
    for host, port in (("no.such.host.invalid", 0), ("203.0.113.7", 0)):
        with pytest.raises(RecsysError, match=host), reserved(host, port): pass

# ---- the server

SERVE = '''
import sys
from recsys.core.settings import RecsysError, load_settings
from recsys.serving.app import serve
try: serve(load_settings(), {bundles!r}, '127.0.0.1', {port})
except RecsysError as e: sys.exit(str(e))
'''

def environment(shop, workers=1, **serving) -> dict:
    "Of a process whose settings are those of the file, but for these."
    mine = dict(RECSYS_PATHS_DATA=str(shop/"data"), RECSYS_CANDIDATES_PER_SOURCE=str(PER_SOURCE), RECSYS_CANDIDATES_BUDGET=str(BUDGET), RECSYS_SERVING_WORKERS=str(workers))
    return os.environ | mine | {f"RECSYS_SERVING_{k.upper()}": str(v) for k, v in serving.items()}

def start(shop, port=0, workers=1, **serving):
    return subprocess.Popen([sys.executable, "-c", SERVE.format(bundles=str(shop/"bundles"), port=port)], env=environment(shop, workers, **serving),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@contextmanager
def serving(shop, workers=1, **settings):
    "(process, port) of a server that is ready; `settings` of [serving]."
    server = start(shop, workers=workers, **settings)
    try:
        line = server.stdout.readline()
        assert line.startswith("serving v"), server.stderr.read()
        yield server, int(line.rpartition(":")[2])
    finally:
        if server.poll() is None: server.terminate()
        try: server.communicate(timeout=20)
        except subprocess.TimeoutExpired: server.kill(); server.communicate(); raise

@pytest.fixture(scope="module")
def server(shop):
    with serving(shop) as (process, port): yield SimpleNamespace(process=process, port=port)

def ask(port, method="POST", path="/v1/recommend", body=b"{}", headers=None, link=None):
    "(status, headers, parsed body)"
    c = link or http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    c.request(method, path, json.dumps(body) if isinstance(body, dict) else body,
              {"content-type": "application/json"} if headers is None else headers)
    r = c.getresponse(); text = r.read()
    if not link: c.close()
    return r.status, r.headers, json.loads(text) if text else None

def test_server_answers_as_the_engine_does(server, engine):
    status, headers, got = ask(server.port, body=dict(user_id="u3", cart=["i4"], n=5, explain=True),
            headers={"content-type": "application/json", "x-request-id": "mine-1"})
    want = msgspec.to_builtins(recommend(engine, Request(user_id="u3", cart=["i4"], n=5, explain=True), "mine-1"))
    timeless = lambda answer: {k: v for k, v in answer.items() if k not in ("took_ms", "stage_ms")}
    assert status == 200 and timeless(got) == timeless(want)
    assert headers["x-request-id"] == got["request_id"] == "mine-1" and set(got["stage_ms"]) == {"state", "candidates", "score"}
    assert got["took_ms"] >= got["stage_ms"]["score"]
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert headers["server"] == "recsys" and headers["date"].endswith("GMT")
    assert len(ask(server.port)[2]["items"]) == 10 and len(ask(server.port)[2]["request_id"]) == 32

def test_health_and_readiness(server):
    for path, want in (("/healthz", {"status": "alive"}), ("/readyz", {"status": "ready", "model_version": "v1"})):
        assert ask(server.port, "GET", path)[::2] == (200, want)
        status, headers, body = ask(server.port, "HEAD", path)
        assert (status, body, headers["content-type"]) == (200, None, "application/json")

@pytest.mark.parametrize("method,path,body,headers,status,code", [
    ("GET", "/shop", None, {}, 404, "not_found"), ("POST", "/v1/recommend/", b"{}", None, 404, "not_found"),
            ("HEAD", "/nothing", None, {}, 404, None), ("GET", "/../etc/passwd", None, {}, 404, "not_found"),
    ("GET", "/v1/recommend", None, {}, 405, "method_not_allowed"), ("HEAD", "/v1/recommend", None, {}, 405, None),
            ("POST", "/healthz", b"{}", None, 405, "method_not_allowed"),
    ("OPTIONS", "/v1/recommend", None, {}, 405, "method_not_allowed"), ("POST", "/v1/recommend", b"{}", {}, 415, "unsupported_media_type"),
    ("POST", "/v1/recommend", b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
    ("POST", "/v1/recommend", b"x" * 262145, None, 413, "too_large"), ("POST", "/v1/recommend", b"x" * 4_000_000, None, 413, "too_large"),
    ("POST", "/nothing", b"x" * 4_000_000, None, 404, "not_found"),
            ("POST", "/v1/recommend", b"x" * 4_000_000, {}, 415, "unsupported_media_type"),
                    ("POST", "/v1/recommend", iter([b"x" * 100_000] * 4), {"content-type": "application/json"}, 413, "too_large"),
    ("POST", "/v1/recommend", iter([b'{"n"', b":1}"]), {"content-type": "application/json"}, 200, None),
            ("POST", "/v1/recommend", b"{" + b" " * 262142 + b"}", None, 200, None),
    ("POST", "/v1/recommend", b"", None, 400, "invalid_json"), ("POST", "/v1/recommend", b'{"n": 101}', None, 400, "invalid_request"),
            ("POST", "/v1/recommend", b'{"n": 0}', None, 400, "invalid_request")])
def test_statuses(server, method, path, body, headers, status, code):
    got, sent, reply = ask(server.port, method, path, body, headers)
    assert got == status and sent["x-request-id"] and (code is None
            or (reply["error"]["code"] == code and set(reply) == {"error"} and set(reply["error"]) == {"code", "message"}))
    if status == 405: assert sent["allow"] in ("POST", "GET, HEAD")
    if body == b'{"n": 101}': assert "100" in reply["error"]["message"]

def test_odd_questions_never_cause_a_failure(server):
    link, seen = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20), set()
    @settings(max_examples=300)
    @given(body=odd_bodies)
    def fire(body):
        status, headers, reply = ask(server.port, body=body, link=link)
        seen.add(status)
        assert status in (200, 400, 413) and ("items" in reply) == (status == 200) and ("error" in reply) == (status != 200)
    fire()
    link.close()
    assert {200, 400} <= seen and ask(server.port, "GET", "/readyz")[0] == 200

POST = b"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"

@pytest.mark.parametrize("raw", [
    b"nonsense\r\n\r\n", POST + b"content-length: -1\r\n\r\n", POST + b"content-length: 2, 2\r\n\r\n{}",
    POST + b"x-request-id: \xff\r\ncontent-length: 2\r\n\r\n{}",
    b"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-type: \xff\xfe\r\ncontent-length: 2\r\n\r\n{}", b"\x16\x03\x01\x02\x00\x01",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", POST + b"transfer-encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 500 + b"\r\n", b"BREW /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"])
def test_odd_bytes_never_cause_a_failure(server, raw):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
        s.sendall(raw); s.shutdown(socket.SHUT_WR)
        first = s.recv(100)
    assert not first or first.split()[1][:1] in (b"2", b"4"), first
    assert ask(server.port, "GET", "/healthz")[0] == 200

def test_without_keys_only_this_machine_is_answered_whatever_its_browser_shows(server):
    for host, status in (("shop.example", 421), (f"evil.example:{server.port}", 421), (f"localhost:{server.port}", 200), (f"[::1]:{server.port}", 200)):
        for how in (("POST", "/v1/recommend"), ("GET", "/healthz"), ("GET", "/readyz")):
            got, _, said = ask(server.port, *how, headers={"host": host, "content-type": "application/json"})
            assert got == status and (status == 200 or said["error"]["code"] == "misdirected"), (host, how)

def test_a_client_that_hangs_up_is_no_failure(server):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as s: s.sendall(POST + b"content-length: 10\r\n\r\n{")
    assert ask(server.port)[0] == 200

def test_port_in_use_and_missing_bundle_are_one_line_each(server, shop, tmp_path):
    taken = start(shop, port=server.port)
    missing = start(tmp_path)
    for process, words in ((taken, f"127.0.0.1:{server.port}: cannot listen here"), (missing, "no bundle has been published")):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1 and out == "" and err.count("\n") == 1 and words in err and " — " in err, err
    with pytest.raises(RecsysError, match="no bundle has been published"): serve(load_settings(), tmp_path, "127.0.0.1", 0)

def test_damaged_bundles_do_not_start(shop, tmp_path):
    (tmp_path/"ranker.txt").write_bytes((shop/"ranker.txt").read_bytes())
    made = publish(tmp_path); promote(made.parent, "v1")
    segment = (made/"state"/"segment.npy").read_bytes()
    (made/"state"/"segment.npy").unlink(); (made/"state"/"segment.npy").write_bytes(segment[:-1] + b"\x09")
    out, err = (p := start(tmp_path)).communicate(timeout=60)
    assert p.returncode == 1 and err.count("\n") == 1 and "segment.npy is not what the manifest says" in err
    (made/"state"/"segment.npy").write_bytes(segment)
    manifest = json.loads((made/"manifest.json").read_text()); del manifest["files"]["state/segment.npy"]  # a table short
    (made/"state"/"segment.npy").unlink(); (made/"manifest.json").write_text(json.dumps(manifest))
    out, err = (p := start(tmp_path)).communicate(timeout=60)
    assert p.returncode == 1 and out == "" and err.count("\n") == 1 and "lacks segment" in err, err

def gone(pid, seconds=15):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if ended(pid): return True
        time.sleep(.05)
    return False

def workers_of(pid): return [c.pid for c in psutil.Process(pid).children() if "spawn_main" in words(c)]

def test_sigterm_ends_it_cleanly_and_a_dead_worker_is_replaced(shop):
    with serving(shop, workers=2) as (process, port):
        first = workers_of(process.pid)
        assert len(first) == 2 and {ask(port)[0] for _ in range(20)} == {200}
        os.kill(first[0], signal.SIGKILL)
        end = time.monotonic() + 30
        while time.monotonic() < end and (len(now := workers_of(process.pid)) < 2 or first[0] in now): time.sleep(.1)
        assert len(now) == 2 and first[1] in now
        idle = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        idle.request("GET", "/healthz"); idle.getresponse().read()  # stays open
        begin = time.monotonic()
        process.terminate()
        _, err = process.communicate(timeout=20)
        idle.close()
        assert process.returncode == 0 and time.monotonic() - begin < 10 and "Traceback" not in err, err
        assert all(gone(w) for w in now)

def test_workers_do_not_outlive_a_killed_parent(shop):
    with serving(shop) as (process, port):
        workers = workers_of(process.pid)
        process.kill(); process.communicate()
        assert workers and all(gone(w) for w in workers)
        with socket.socket() as s: s.bind(("127.0.0.1", port))

LIGHT = '''
import sys
import recsys.serving.app
from recsys.serving.service import open_engine
open_engine(sys.argv[1] + "/v1", 12, 30)
heavy = ("torch", "lightning", "pytorch_lightning", "shap", "altair", "IPython", "jupyter_core", "ipykernel", "papermill", "nbconvert",
         "faiss", "implicit", "matplotlib", "fastcore", "plotly")
print([m for m in heavy if m in sys.modules])
'''

def test_the_server_carries_no_heavy_luggage(shop):
    done = subprocess.run([sys.executable, "-c", LIGHT, str(shop/"bundles")], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
