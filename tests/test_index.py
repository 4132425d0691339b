"""The index of vectors: one suite for FAISS and for Milvus Lite against brute force, then what only one of them promises.

Milvus Lite is started by the tests in their own folder; without `pymilvus` its cases skip."""
import importlib.util, json, multiprocessing, os, signal, subprocess, sys, time
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path

import numpy as np, pytest
from hypothesis import example, given, settings as hyp, strategies as st
from msgspec.structs import replace

from recsys.candidates.index import (MAGIC, NO_INDEX, FaissIndex, Measured, Rows, best_of, build_index, choose, interval, load_faiss, load_index, make_faiss,
                                     measure, nearest, recall_of, save_faiss, search_near, two_samples)
from recsys.candidates.index_milvus import FETCH, collection_name, fill_milvus, outdated
from recsys.core.settings import RecsysError, load_settings

SETTINGS = load_settings(Path(__file__).parent.parent/"settings.ini")
D, N = 16, 3000
needs_milvus = pytest.mark.skipif(importlib.util.find_spec("pymilvus") is None, reason="pymilvus is missing: pip install 'recsys[milvus]'")
BACKENDS = [pytest.param(k, marks=[needs_milvus] if k.startswith("milvus") else []) for k in ("faiss-exact", "faiss-ivf", "faiss-hnsw", "milvus-exact", "milvus-hnsw")]

def changed(**index): return replace(SETTINGS, index=replace(SETTINGS.index, **index))

def vectors(n: int, seed: int = 0, d: int = D) -> np.ndarray:
    "Clustered, of unequal length: what approximate search loses on."
    rng = np.random.default_rng(seed)
    return ((rng.normal(size=(20, d))[rng.integers(0, 20, n)] + .5 * rng.normal(size=(n, d))) * rng.gamma(6, 1 / 6, (n, 1))).astype(np.float32)

def faiss_index(kind: str, ids, v, exact_below: int = 0, effort: int = 64, threads: int = 1) -> FaissIndex:
    return FaissIndex(make_faiss(kind, v, 1, threads), kind, Rows(np.asarray(ids, np.int64), np.ones(len(ids), bool)), exact_below, threads, effort)

@pytest.fixture(scope="module")
def lite(tmp_path_factory): return changed(backend="milvus", uri=str(tmp_path_factory.mktemp("milvus")/"vectors.db"), exact_below=1)

@pytest.fixture
def make(request, lite):
    "A function that makes an index of the kind that the test is run with; what it made is closed afterwards."
    backend, kind = request.param.split("-"); made = []
    def make(ids, v, exact_below=1):
        made.append(faiss_index(kind, ids, v, exact_below) if backend == "faiss" else fill_milvus(kind, np.asarray(ids, np.int64), v, lite))
        made[-1].effort = made[-1].efforts(64)[-1] if backend == "milvus" else 64
        return made[-1]
    yield make
    for index in made: index.close()

on_every_backend = pytest.mark.parametrize("make", BACKENDS, indirect=True)

def brute(held: dict[int, np.ndarray], queries, k: int, allowed=None):
    "Scores of the `k` best of what is held: float64 [q, min(k, n)], falling."
    keys = [i for i in held if allowed is None or i in set(np.asarray(allowed).tolist())]
    if not keys: return np.zeros((len(queries), 0))
    return -np.sort(-(queries.astype(np.float64) @ np.array([held[i] for i in keys], np.float64).T), axis=1)[:, :k]

def honest(index, held, queries, k, allowed=None, recall: float = 1.):
    "Only what may be found, each once, with its true score, in falling order, as many as there are; and of the best at least the share `recall`."
    ids, scores = index.search(queries, k, allowed)
    best = brute(held, queries, k, allowed)
    m = best.shape[1]
    assert ids.shape == scores.shape == (len(queries), k) and ids.dtype == np.int32 and scores.dtype == np.float32
    assert (ids[:, m:] == -1).all() and np.isneginf(scores[:, m:]).all() and (ids[:, :m] >= 0).all()
    for q, row, s in zip(queries, ids[:, :m], scores[:, :m]):
        assert len(set(row.tolist())) == m and set(row.tolist()) <= (set(held) if allowed is None else set(held) & set(np.asarray(allowed).tolist()))
        assert np.allclose(s, [held[i] @ q for i in row.tolist()], atol=1e-4, rtol=1e-4) and (np.diff(s) <= 1e-5).all()
    if m: assert recall_of(scores[:, :m], best).mean() >= recall

# ---- what every backend must do

@on_every_backend
def test_a_day_in_the_life(make):
    "Deletions, replacements, new items, filters: after each the index is what brute force says."
    v, q, rng = vectors(N), vectors(20, 1), np.random.default_rng(2)
    codes = rng.choice(10 * N, N, replace=False)
    index, held = make(codes, v), dict(zip(codes.tolist(), v))
    assert len(index) == N
    honest(index, held, q, 10, recall=.9)
    gone = codes[:600]
    index.delete(np.append(gone, [10 * N + 5, codes[0]])); [held.pop(i) for i in gone.tolist()]
    assert len(index) == N - 600
    honest(index, held, q, 10, recall=.9)
    again, fresh = np.concatenate([gone[:5], codes[700:705], [10 * N + 1]]), vectors(11, 3)
    index.upsert(again, fresh); held.update(zip(again.tolist(), fresh))
    assert len(index) == len(held)
    honest(index, held, q, 10, recall=.9)
    index.upsert(np.array([4, 4]), vectors(2, 4)); held[4] = vectors(2, 4)[1]
    honest(index, held, vectors(2, 4), 3, allowed=np.array([4]))
    honest(index, held, q, 10, allowed=rng.choice(codes, 2500, replace=False), recall=.85)

@on_every_backend
def test_few_allowed_items_are_searched_exactly(make):
    v, q = vectors(N), vectors(15, 1)
    index, held = make(np.arange(N), v, exact_below=500), dict(enumerate(v))
    index.effort = 1
    index.delete(np.arange(0, N, 3)); [held.pop(i) for i in range(0, N, 3)]
    for allowed in (np.arange(400), np.arange(5, N, 40), np.array([1, 1, 4, N + 7]), np.array([3]), np.array([], np.int64)): honest(index, held, q, 12, allowed)

@on_every_backend
def test_there_is_nothing_to_find_and_nobody_asks(make):
    v = vectors(200)
    index = make(np.arange(200), v)
    assert index.search(v[:0], 5)[0].shape == (0, 5)
    index.delete(np.arange(200))
    assert len(index) == 0
    honest(index, {}, v[:2], 5); honest(index, {}, v[:2], 5, np.arange(3))
    index.delete(np.array([], np.int64)); index.upsert(np.array([7]), v[7:8])
    honest(index, {7: v[7]}, v[:3], 5)

@on_every_backend
def test_what_is_no_vector_or_no_code_is_refused(make):
    v = vectors(100)
    index = make(np.arange(100), v)
    for ids, x, what in (([1], v[:1, :5], "shape"), ([1], np.full((1, D), np.nan), "NaN"), ([1], np.full((1, D), 1e39), "infinity"), ([-1], v[:1], "not in 0"), ([2**31], v[:1], "not in 0"), ([1, 2], v[:1], "codes of shape")):
        with pytest.raises(RecsysError, match=what) as e, np.errstate(over="ignore"): index.upsert(np.array(ids), x)
        assert "\n" not in str(e.value) and " — " in str(e.value)
    with pytest.raises(RecsysError, match="shape"): index.search(v[:, :4], 3)
    honest(index, dict(enumerate(v)), v[:5], 5, recall=.9)

@on_every_backend
def test_saved_and_opened_again_it_answers_the_same(make, tmp_path, lite):
    v, q = vectors(N), vectors(20, 1)
    index = make(np.arange(N) * 3, v)
    index.effort, index.measured = 77, dict(recall=.5)
    index.delete(np.arange(0, 900)); index.upsert(np.array([6]), q[:1])
    back = load_index(index.save(tmp_path/"items.index"), lite)
    assert (back.kind, back.effort, back.measured, back.dimensions, len(back)) == (index.kind, 77, dict(recall=.5), D, len(index))
    for allowed in (None, np.arange(0, 3 * N, 2), np.arange(0, 3000, 7)):
        for a, b in zip(index.search(q, 9, allowed), back.search(q, 9, allowed)): assert np.array_equal(a, b)
    back.delete(np.array([6])); assert 6 not in back.search(q, 9)[0]

@on_every_backend
def test_a_reader_keeps_the_old_one_whole_while_the_new_one_takes_its_place(make, tmp_path, lite):
    a, b, q = vectors(500), vectors(700, 9), vectors(10, 1)
    old = load_index(make(np.arange(500), a).save(tmp_path/"items.index"), lite)
    new = make(np.arange(10_000, 10_700), b)
    honest(load_index(tmp_path/"items.index", lite), dict(enumerate(a)), q, 8, recall=.9)
    new.save(tmp_path/"items.index")
    honest(old, dict(enumerate(a)), q, 8, recall=.9)
    honest(load_index(tmp_path/"items.index", lite), dict(zip(range(10_000, 10_700), b)), q, 8, recall=.9)

# ---- FAISS

@hyp(max_examples=60)
@given(st.sampled_from(["exact", "ivf", "hnsw"]), st.integers(0, 2**32 - 1), st.integers(1, 300), st.lists(st.tuples(st.sampled_from(["upsert", "delete"]), st.lists(st.integers(0, 400), max_size=60)), max_size=6), st.integers(1, 40))
@example("hnsw", 0, 1, [("delete", [0])], 3).via("an empty graph")
def test_any_history_is_as_brute_force_says(kind, seed, n, history, k):
    "Where search is exact. Everything but the recall holds where it is not."
    rng = np.random.default_rng(seed)
    v, q = rng.normal(size=(n, D)).astype(np.float32), rng.normal(size=(4, D)).astype(np.float32)
    exact, near, held = faiss_index(kind, np.arange(n), v, 10**9), faiss_index(kind, np.arange(n), v, 0, 4), dict(enumerate(v))
    for what, ids in history:
        fresh = rng.normal(size=(len(ids), D)).astype(np.float32)
        for index in (exact, near): index.delete(np.array(ids, np.int64)) if what == "delete" else index.upsert(np.array(ids, np.int64), fresh)
        for i, x in zip(ids, fresh): held.pop(i, None) if what == "delete" else held.__setitem__(i, x)
    allowed = rng.choice(500, 200, replace=False)
    for index, recall in ((exact, 1.), (near, 1. if kind == "exact" else 0.)):
        honest(index, held, q, k, recall=recall); honest(index, held, q, k, allowed, recall)

@hyp(max_examples=25)
@given(st.sampled_from(["ivf", "hnsw"]), st.integers(0, 2**32 - 1), st.integers(2, 64))
def test_recall_is_the_share_of_what_brute_force_finds(kind, seed, effort):
    rng = np.random.default_rng(seed)
    v, q = rng.normal(size=(1500, D)).astype(np.float32), rng.normal(size=(20, D)).astype(np.float32)
    index = faiss_index(kind, np.arange(1500), v, 0, effort)
    best = np.argsort(-(q @ v.T), axis=1)[:, :10]
    expected = [len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(index.search(q, 10)[0], best)]
    measured = measure(index, q, brute(dict(enumerate(v)), q, 10))
    assert np.allclose(measured.recall, expected) and measured.us > 0
    index.effort = 10**6
    assert recall_of(index.search(q, 10)[1], brute(dict(enumerate(v)), q, 10)).mean() >= (1 if kind == "ivf" else .95)

@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_that_grew_finds_what_it_began_with(kind):
    "FAISS 1.15 had a version whose graph lost sight of all earlier vectors when a later one began a higher level (its pull request 5524)."
    v, q = vectors(4000), vectors(50, 1)
    index = faiss_index(kind, np.arange(1000), v[:1000], effort=128)
    for a in range(1000, 4000, 100): index.upsert(np.arange(a, a + 100), v[a:a + 100])
    honest(index, dict(enumerate(v)), q, 10, recall=.95)

@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_a_filter_that_leaves_a_tenth_costs_effort_not_recall(kind):
    rng = np.random.default_rng(0)
    v, q = rng.normal(size=(8000, D)).astype(np.float32), rng.normal(size=(100, D)).astype(np.float32)
    index, allowed = faiss_index(kind, np.arange(8000), v, 1, 24), np.arange(0, 8000, 10)
    everything, filtered = (recall_of(index.search(q, 20, a)[1], brute(dict(enumerate(v)), q, 20, a)).mean() for a in (None, allowed))
    assert .6 < everything < 1 and filtered > everything - .1
    assert recall_of(search_near(index.index, q, 20, allowed, 3)[0], brute(dict(enumerate(v)), q, 20, allowed)).mean() < filtered - .1, "the effort of the unfiltered search would not do"

def test_equal_vectors_count_as_found_whichever_comes_out():
    v = np.repeat(vectors(10), 30, axis=0)
    assert measure(faiss_index("hnsw", np.arange(300), v), v[::30], brute(dict(enumerate(v)), v[::30], 5)).recall.min() == 1

@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_the_same_seed_gives_the_same_file(kind, tmp_path):
    "And a graph that two threads have built is the one that a single thread builds: in older versions of FAISS they race."
    v = vectors(8000)
    files = [save_faiss(faiss_index(kind, np.arange(8000), v, threads=t), tmp_path/f"{i}").read_bytes() for i, t in enumerate((2, 2) if kind == "ivf" else (2, 1))]
    assert files[0] == files[1]
    assert kind != "ivf" or make_faiss("ivf", v, 1, 1).quantizer.reconstruct_n(0, 5).tolist() != make_faiss("ivf", v, 2, 1).quantizer.reconstruct_n(0, 5).tolist()

def test_the_number_of_threads_is_as_before_afterwards():
    import faiss
    before, index = faiss.omp_get_max_threads(), faiss_index("ivf", np.arange(500), vectors(500), threads=faiss.omp_get_max_threads() + 2)
    try:
        faiss.omp_set_num_threads(before + 1)
        for do in (lambda: index.search(vectors(9), 5), lambda: index.upsert(np.array([1]), vectors(1)), lambda: make_faiss("hnsw", vectors(50), 1, before + 2)):
            do()
            assert faiss.omp_get_max_threads() == before + 1
    finally: faiss.omp_set_num_threads(before)

# ---- the choice

class Scripted:
    "An index that finds and costs what it is told: {effort: (recall, µs)}."
    made = []
    def __init__(self, kind, points): self.kind, self.points, self.effort, self.closed, self.now = kind, points, None, False, 0.; Scripted.made.append(self)
    def efforts(self, k): return sorted(self.points)
    def clock(self): return self.now
    def close(self): self.closed = True
    def search(self, queries, k):
        recall, us = self.points[self.effort]
        self.now += us * 1e-6
        return np.zeros((1, k), np.int32), np.where(np.arange(k) < round(recall * k), 1., -1.)[None].astype(np.float32)

POINTS = st.dictionaries(st.integers(1, 9), st.tuples(st.integers(0, 20).map(lambda r: r / 20), st.integers(1, 1000).map(float)), min_size=1, max_size=4)

@given(st.lists(POINTS, min_size=1, max_size=3), st.integers(0, 19).map(lambda r: (r + .5) / 20), st.integers(1, 1000).map(lambda us: us + .5))
@example([{1: (1., 900.)}, {1: (.5, 10.), 2: (.95, 100.)}, {1: (1., 5.)}], .875, 100.5).via("the second kind meets both, the third is not built")
@example([{1: (1., 900.)}, {1: (.5, 10.)}], .875, 100.5).via("nothing meets both")
def test_the_choice_honours_recall_first_and_then_time(points, recall_target, target_us):
    "Targets lie between what can be measured, so that rounding decides nothing."
    Scripted.made, kinds = [], tuple("abc"[:len(points)])
    best = np.ones((3, 20))
    index, meets, tried = choose(lambda kind: Scripted(kind, points["abc".index(kind)]), kinds, np.zeros((3, 2), np.float32), best, recall_target, target_us)
    recall, us = index.points[index.effort]
    seen = {(m.kind, m.effort): (m.recall.mean(), m.us) for m in tried}
    assert {k: (pytest.approx(v[0]), pytest.approx(v[1])) for k, v in seen.items()} == {(k, e): points["abc".index(k)][e] for k, e in seen}
    enough = [(r, u) for r, u in seen.values() if r >= recall_target]
    assert meets == (recall >= recall_target and us <= target_us) == any(u <= target_us for _, u in enough)
    if meets: assert recall == pytest.approx(max(r for r, u in enough if u <= target_us)) and [m.kind for m in Scripted.made][-1] == index.kind, "no kind is built after one that meets both"
    elif enough: assert recall >= recall_target and us == pytest.approx(min(u for _, u in enough)) and len(Scripted.made) == len(kinds)
    else: assert recall == pytest.approx(max(r for r, _ in seen.values()))
    assert [m for m in Scripted.made if not m.closed] == [index], "what was not chosen is let go of"

@pytest.mark.parametrize("index, kind, meets", [(dict(exact_below=10**6), "exact", None), (dict(target_us=1e9), "exact", True), (dict(kind="ivf", target_us=1e9), "ivf", True),
    (dict(kind="hnsw", target_us=1e9), "hnsw", True), (dict(recall_target=1., target_us=1e-3), None, False)])
def test_a_build_says_what_it_is(index, kind, meets):
    v, q = vectors(N), vectors(300, 5)
    s = changed(**dict(dict(exact_below=100, recall_target=.9), **index))
    made = build_index(np.arange(N), v, [q[:200], q[200:]], 10, s)
    m = made.measured
    assert kind in (None, made.kind) and meets in (None, m["meets_targets"]) and (m["kind"], m["effort"], m["vectors"], m["k"]) == (made.kind, made.effort, N, 10)
    assert 0 <= m["recall_low"] <= m["recall"] <= m["recall_high"] <= 1 and m["recall"] >= .85 and m["us"] > 0 and m["seconds"] > 0 and json.loads(json.dumps(m)) == m
    assert recall_of(made.search(q, 10)[1], brute(dict(enumerate(v)), q, 10)).mean() == pytest.approx(m["recall"], abs=.05)

def test_the_half_that_reports_has_not_chosen():
    q = np.arange(1000, dtype=np.float32)[:, None]
    for parts in ([q], [q[:5], q[5:]], [q[:0], q], [q[:300], q[300:600], q[600:]]):
        a, b = two_samples(parts, 100, 0)
        assert 25 <= len(a) and not set(a.ravel()) & set(b.ravel()) and len(a) + len(b) <= 100
        assert all(np.array_equal(x, y) for x, y in zip((a, b), two_samples(parts, 100, 0)))
    assert [len(x) for x in two_samples([q[:1]], 100, 0)] == [1, 1], "of a single query there is no half"

def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [low <= .8 <= high for i in range(300) for low, high in [interval(rng.binomial(10, .8, 100) / 10, i)]]
    assert .9 <= np.mean(inside) <= .99

def test_nearest_answers_in_codes_of_the_catalogue(tmp_path):
    v = vectors(1000); eligible = np.arange(1, 1000, 3)
    ((ids, scores), (few, _)), record = nearest([(v[:7], 20), (v[7:9], 400)], v, eligible, SETTINGS, tmp_path/"items.index")
    assert set(ids.ravel().tolist()) <= set(eligible.tolist()) and record["recall"] == 1. and record["kind"] == "exact" and (scores >= 0).all()
    assert ((few >= 0).sum(1) == len(eligible)).all() and ids.dtype == few.dtype == np.int32
    assert np.array_equal(load_index(tmp_path/"items.index", SETTINGS).search(v[:7], 20)[0], ids)
    (far, least), = nearest([(-v[:2], len(eligible))], v, eligible, SETTINGS)[0]
    assert (far >= 0).all() and (np.sum(-v[:2] * v[far[:, -1]], 1) < 0).all() and least.min() == 0
    (found, s), = nearest([(v[:2], 3)], v, np.array([], np.int64), SETTINGS)[0]
    assert found.tolist() == [[-1] * 3] * 2 and not s.any()
    got, record = nearest([(v[:0], 3), (v[:0], 2)], v, eligible, SETTINGS)
    assert [g[0].shape for g in got] == [(0, 3), (0, 2)] and record == NO_INDEX and record.keys() == nearest([(v[:2], 3)], v, eligible, SETTINGS)[1].keys()

# ---- a file that is not what it should be

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    index = faiss_index("ivf", np.arange(400), vectors(400)); index.delete(np.arange(9))
    return save_faiss(index, tmp_path_factory.mktemp("whole")/"items.index")

@hyp(max_examples=150)
@given(st.floats(0, 1, exclude_max=True), st.sampled_from(["cut", "flip", "grow"]), st.integers(1, 255))
@example(0., "cut", 1).via("an empty file")
def test_a_damaged_file_is_one_line(whole, where, how, by):
    data = bytearray(whole.read_bytes()); at = int(where * len(data))
    if how == "cut": data = data[:at]
    elif how == "flip": data[at] ^= by
    else: data[at:at] = bytes([by])
    broken = whole.parent/"broken.index"; broken.write_bytes(data)
    with pytest.raises(RecsysError) as e: load_index(broken, SETTINGS)
    assert "\n" not in str(e.value) and str(broken) in str(e.value) and " — " in str(e.value)

def resealed(whole: Path, target: Path, **header) -> Path:
    "The file with other claims in its header, and a checksum that is right."
    magic, line, rest = whole.read_bytes()[:-32].split(b"\n", 2)
    data = b"\n".join([magic, json.dumps({**json.loads(line), **header}).encode(), rest])
    target.write_bytes(data + sha256(data).digest())
    return target

@pytest.mark.parametrize("header", [dict(dimensions=D + 1), dict(living=400), dict(kind="hnsw"), dict(metric="cosine")])
def test_a_file_that_contradicts_itself_is_one_line(whole, tmp_path, header):
    assert len(load_faiss(resealed(whole, tmp_path/"same"), 10, 1)) == 391
    with pytest.raises(RecsysError, match=f"{next(iter(header))} is .*in its header"): load_faiss(resealed(whole, tmp_path/"other", **header), 10, 1)

def test_no_file_is_one_line(tmp_path):
    for load in (lambda p: load_index(p, SETTINGS), lambda p: load_faiss(p, 10, 1)):
        with pytest.raises(RecsysError, match="no such index — build it"): load(tmp_path/"no.index")

# ---- readers beside a writer

def rebuild(path: str, seconds: float):
    "Two indexes in turn at `path`; each holds codes and vectors that the other has not."
    made = [faiss_index("hnsw", np.arange(300) + 1000 * i, np.full((300, D), i + 1, np.float32) + vectors(300) * 1e-3) for i in range(2)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for index in made: save_faiss(index, path)

def read(path: str, seconds: float, said):
    "Which of the two was found, as often as it was read; anything else is an error."
    seen, end = {0: 0, 1: 0}, time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            index = load_faiss(path, 0, 1)
            ids, scores = index.search(np.ones((3, D), np.float32), 300)
            which = ids.max() // 1000
            assert len(index) == 300 and sorted(ids[0].tolist()) == list(range(1000 * which, 1000 * which + 300)) and abs(scores[0, 0] / D - which - 1) < .1
            seen[int(which)] += 1
        said.put(seen)
    except BaseException as e: said.put(repr(e))

def test_every_reader_sees_the_whole_old_or_the_whole_new_index(tmp_path):
    context, path = multiprocessing.get_context("spawn"), str(tmp_path/"items.index")
    rebuild(path, .01)
    said, writer = context.Queue(), context.Process(target=rebuild, args=(path, 60))
    readers = [context.Process(target=read, args=(path, 4, said)) for _ in range(2)]
    for p in (writer, *readers): p.start()
    try: found = [said.get(timeout=120) for _ in readers]
    finally:
        os.kill(writer.pid, signal.SIGKILL)  # in the middle of a build
        for p in (writer, *readers): p.join(60)
    assert all(isinstance(f, dict) and f[0] and f[1] for f in found), found
    assert len(load_faiss(path, 0, 1)) == 300, "what a killed writer leaves is whole"

# ---- Milvus

def test_without_pymilvus_it_says_what_to_install(monkeypatch, lite):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(RecsysError, match=r"pip install 'recsys\[milvus\]'"): fill_milvus("exact", np.arange(3), vectors(3), lite)

@needs_milvus
def test_a_milvus_that_does_not_answer_is_one_line(tmp_path, lite, capfd):
    (tmp_path/"a").mkdir(); (tmp_path/"a"/"rubbish.db").write_bytes(b"rubbish" * 99)
    for uri, todo in (("http://127.0.0.1:9", "cluster runs"), (f"{tmp_path}/a/rubbish.db", "no other process")):
        with pytest.raises(RecsysError) as e: fill_milvus("exact", np.arange(3), vectors(3), changed(backend="milvus", uri=uri))
        assert "\n" not in str(e.value) and str(e.value).startswith(f"{uri}: Milvus: ") and todo in str(e.value)
    assert "Traceback" not in "".join(capfd.readouterr())

@needs_milvus
def test_one_process_at_a_time_opens_a_file(tmp_path):
    s = changed(backend="milvus", uri=f"{tmp_path}/new/folder/vectors.db")
    fill_milvus("exact", np.arange(3), vectors(3), s)
    run = subprocess.run([sys.executable, "-c", "import sys; from msgspec.structs import replace; from recsys.candidates.index_milvus import connect; from recsys.core.settings import RecsysError, load_settings\n"
        "s = load_settings(sys.argv[1])\ntry: connect(replace(s, index=replace(s.index, backend='milvus', uri=sys.argv[2])))\nexcept RecsysError as e: print(e)", SETTINGS.file, s.index.uri], capture_output=True, text=True)
    assert run.stdout.startswith(f"{s.index.uri}: Milvus: ") and "no other process" in run.stdout and not run.stderr

@needs_milvus
@pytest.mark.parametrize("kind", ["auto", "hnsw"])
def test_nearest_goes_to_milvus_by_the_settings_alone(kind, lite, tmp_path):
    s = replace(lite, index=replace(lite.index, exact_below=500, kind=kind, target_us=1e7))
    v, eligible = vectors(1500), np.arange(0, 1500, 2)
    (found, _), record = nearest([(v[:20], 10), (v[20:60], 5)], v, eligible, s, tmp_path/"items.index")
    (best, _), _ = nearest([(v[:20], 10), (v[20:60], 5)], v, eligible, SETTINGS)
    assert record["backend"] == "milvus" and record["kind"] == ("exact" if kind == "auto" else "hnsw") and record["recall"] >= .95
    assert np.mean(found[0] == best[0]) > .95 and np.allclose(found[1][:, 0], best[1][:, 0], atol=1e-4)
    assert np.array_equal(load_index(tmp_path/"items.index", s).search(v[:20], 10)[0], found[0])

@needs_milvus
def test_more_allowed_items_than_are_fetched_are_filtered_by_milvus(lite):
    v, q = vectors(FETCH + 1500), vectors(10, 1)
    index = fill_milvus("exact", np.arange(len(v)), v, lite)
    honest(index, dict(enumerate(v)), q, 10, np.arange(0, FETCH + 1000)); index.close()

@needs_milvus
def test_builds_that_are_not_saved_leave_nothing_and_of_the_saved_the_newest_stay(tmp_path, lite):
    s = replace(lite, index=replace(lite.index, collection="kept"), run=replace(lite.run, keep=2))
    ours = lambda: [n for n in index.client.list_collections() if n.startswith("kept")]
    for n in range(4):
        index = fill_milvus("exact", np.arange(5), vectors(5), s); index.save(tmp_path/f"{n}.index"); index.close()
    assert len(ours()) == 2
    fill_milvus("exact", np.arange(5), vectors(5), s).close()
    assert len(ours()) == 2 and len(load_index(tmp_path/"3.index", s)) == len(load_index(tmp_path/"2.index", s)) == 5
    with pytest.raises(RecsysError, match="is gone"): load_index(tmp_path/"0.index", s)

@needs_milvus
def test_a_file_that_names_no_collection_is_one_line(tmp_path, lite):
    index = fill_milvus("exact", np.arange(5), vectors(5), lite)
    good = json.loads(index.save(tmp_path/"items.index").read_text())
    for text, what in (("{", "not JSON"), ('{"backend": "milvus"}', "collection is missing"), (json.dumps({**good, "dimensions": 3}), f"dimensions is {D}, and 3")):
        (tmp_path/"items.index").write_text(text)
        with pytest.raises(RecsysError, match=what) as e: load_index(tmp_path/"items.index", lite)
        assert "\n" not in str(e.value) and str(tmp_path/"items.index") in str(e.value)

@given(st.lists(st.tuples(st.sampled_from(["a", "a_b", "a_tmp"]), st.booleans(), st.integers(0, 100)), max_size=12), st.integers(1, 4))
def test_only_collections_of_our_own_are_dropped(drawn, keep):
    now = datetime(2026, 3, 1, tzinfo=timezone.utc)
    names = [collection_name(p, saved, now - timedelta(hours=h)) for p, saved, h in drawn]
    gone = outdated(names, "a", keep, now)
    mine = {n: (saved, h) for n, (p, saved, h) in zip(names, drawn) if p == "a" or (p, saved) == ("a_tmp", True)}
    assert set(gone) <= set(mine)
    saved = sorted((h for (p, s, h) in drawn if p == "a" and s))
    assert sorted(h for n in gone for p, s, h in [drawn[names.index(n)]] if p == "a" and s) == saved[keep:]
