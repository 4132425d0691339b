"""Other libraries' models: what goes in is what they may know, what comes out is a whole list, and the account beside ours is the run's own."""
import json, os, subprocess, sys
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st
from msgspec.structs import replace
from shop import ROOT, make_shop, recsys

from recsys.candidates.sequences import Cases as Prefixes, prefixes, sequences, some
from recsys.core.settings import RecsysError, load_settings
from recsys.evaluation.metrics import targets_of
from recsys.operations import bench_shop as B, peer_env as E, peer_models as P
from recsys.operations.bench_sessions import against_rival
from recsys.ranking.rows import Cases

DAY = 86_400
i32 = lambda x: np.array(x, np.int32)

# ---------------------------------------------------------------- what goes in

@st.composite
def shops(draw):
    "A few users' purchase lines, some known late, and cases of users in order."
    lines = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 9), st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=40))
    cases = draw(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 9), max_size=3, unique=True), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)), min_size=1, max_size=6))
    return lines, cases

@given(shops())
def test_a_question_is_the_users_past_and_then_the_cart(shop):
    lines, cases = shop; moment = 6 * DAY
    table = pl.DataFrame([dict(user=u, session=10 * d + u, item=i, ts=d * DAY, known=(d + late) * DAY) for u, _, i, d, late in lines])
    _, rows = B.shop_rows(table, moment)
    want = sorted({(d, u, i) for u, _, i, d, late in lines if d + late < 6})
    assert sorted(zip(6 - rows.age, rows.user, rows.item)) == want and (np.diff(rows.age) <= 0).all()
    ptr = lambda k: np.cumsum([0, *(len(c[k]) for c in cases)])
    flat = lambda k: i32([i for c in cases for i in c[k]])
    c = Cases(i32([c[0] for c in cases]), ptr(1), flat(1), ptr(2), flat(2), np.array([bool(c[1]) for c in cases]))
    q = B.shop_queries(rows, c)
    for n, (user, cart, _) in enumerate(cases):
        at, past = slice(q.ptr[n], q.ptr[n + 1]), [(d, i) for d, u, i in want if u == user]
        assert sorted(zip(6 - q.age[at][~q.now[at]], q.item[at][~q.now[at]])) == past and (np.diff(q.age[at]) <= 0).all()
        assert q.item[at][len(past):].tolist() == cart == q.mask[q.mask_ptr[n]:q.mask_ptr[n + 1]].tolist() and q.now[at].tolist() == [False] * len(past) + [True] * len(cart)

@given(st.lists(st.lists(st.integers(0, 8), max_size=5), min_size=1, max_size=6), st.integers(1, 5))
def test_items_outside_of_the_most_bought_are_neither_learnt_nor_asked(lists, most):
    item, ptr = i32([i for l in lists for i in l]), np.cumsum([0, *map(len, lists)])
    if not len(item): return
    kept = P.most_bought(item, most)
    count = np.bincount(item, minlength=9)
    assert sorted(kept, key=lambda i: (-count[i], i)) == sorted(set(item.tolist()), key=lambda i: (-count[i], i))[:most]
    rows = P.known_rows(P.Rows(np.repeat(np.arange(len(lists)), np.diff(ptr)), item, np.arange(len(item))), kept)
    q = P.known_queries(P.Queries(np.arange(len(lists)), ptr, item, np.arange(len(item)), item > 3, ptr, item), kept)
    for u, l in enumerate(lists):
        want = [i for i in l if i in kept]
        assert kept[rows.item[rows.user == u]].tolist() == want == kept[q.item[q.ptr[u]:q.ptr[u + 1]]].tolist() and (q.now[q.ptr[u]:q.ptr[u + 1]] == (np.array(want) > 3)).all()

@given(st.lists(st.tuples(st.permutations(range(6)), st.sets(st.integers(0, 5), max_size=4), st.integers(0, 6)), min_size=1, max_size=5), st.permutations(range(6)), st.integers(1, 6))
def test_a_list_is_whole_and_without_what_is_masked(answers, order, k):
    ids = np.stack([np.r_[a[:n], [-1] * (6 - n)] for a, _, n in answers]).astype(np.int32)
    masks = [sorted(m) for _, m, _ in answers]
    ptr, n = np.cumsum([0, *map(len, masks)]), len(answers)
    q = P.Queries(np.arange(n), np.zeros(n + 1, int), i32([]), np.zeros(0), np.zeros(0, bool), ptr, i32([i for m in masks for i in m]))
    for row, (a, m, short) in zip(P.whole(ids, q, i32(order), k), answers):
        good = [i for i in a[:short] if i not in m]
        want = (good + [i for i in order if i not in good and i not in m])[:k]
        assert row.tolist() == want + [-1] * (k - len(want))

@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 7))
def test_pieces_hold_neighbouring_rows_and_only_the_oldest_is_short(user, length):
    user = np.array(user); p = P.pieces(user, length)
    for u in np.unique(user):
        mine = p[user == u]
        parts = [mine[max(0, end - length):end] for end in range(len(mine), 0, -length)]
        assert all(len(set(part)) == 1 for part in parts) and len({part[0] for part in parts}) == len(parts)
    assert all(len(set(user[p == x])) == 1 for x in np.unique(p))

def test_the_newest_sessions_of_a_file_choose_and_are_learnt_afterwards():
    lists = [[i % 7, (i + 1) % 7, (i + 2) % 7] for i in range(40)]
    test = Prefixes(i32([1, 2, -1]), np.array([0, 2]), np.array([2, 3]), i32([3, -1]), np.array([0, 1]))
    a = E.session_exam(sequences(lists), test, 7, 5, .1, 5, 0).arrays
    assert a["learn_user"].max() == 35 and a["all_user"].max() == 39 and len(a["target"]) == 5 and a["test_item"].tolist() == [1, 2, -1] and not len(a["test_mask"])
    asked = [tuple(a["valid_item"][x:y]) + (t,) for x, y, t in zip(a["valid_ptr"], a["valid_ptr"][1:], a["target"])]
    assert all(any(list(s) == l[:len(s)] for l in lists[36:]) for s in asked)

# ---------------------------------------------------------------- what comes out

def circle(n=200, items=30, seed=0):
    return ((np.random.default_rng(seed).integers(0, items, n)[:, None] + np.arange(7)) % items)

def exam_of(h, items=30, k=5):
    last = lambda n: some(prefixes(sequences(h[:, :n].tolist())), slice(n - 2, None, n - 1))
    return E.history_exam(last(6), last(7), items, k, 1000, 0)

def small(threads=1): s = load_settings(ROOT/"settings.ini"); return replace(s, run=replace(s.run, threads=threads), bench=replace(s.bench, peer_cpu_seconds=20))

def test_item_item_is_the_cosine_that_a_plain_loop_finds():
    h = circle(60); q = E.history_queries(np.arange(61) * 6, h[:, :6].ravel(), True)
    ids = P.implicit_item_item(E.history_rows(np.arange(61) * 6, h[:, :6].ravel()), 30, dict(kind="CosineRecommender", neighbours=30, half_life=None), dict(threads=1))(q, 30, 1.)
    had = np.zeros((60, 30)); had[np.repeat(np.arange(60), 6), h[:, :6].ravel()] = 1
    unit = had / np.linalg.norm(had, axis=0)
    score = had @ (unit.T @ unit)
    for row, s in zip(ids, score): assert np.allclose(s[row[row >= 0]], np.sort(s)[::-1][:(row >= 0).sum()]) and (row >= 0).sum() == (s > 0).sum()

def test_a_cart_and_an_age_count_what_the_try_says():
    q = P.Queries(i32([0]), np.array([0, 3]), i32([2, 2, 1]), np.float32([10, 20, 0]), np.array([False, False, True]), np.array([0, 1]), i32([1]))
    assert np.allclose(P.asked(q, 10., 4., 4).toarray(), [[0, 4, .75, 0]]) and np.allclose(P.asked(q, None, 1., 4).toarray(), [[0, 1, 2, 0]])

def test_peers_answer_from_a_process_without_this_project_and_never_with_what_was_had():
    h = circle(); lists, said = E.ask_peers(exam_of(h), ("implicit item-item", "implicit ALS", "implicit BPR"), small())
    for name, l in lists.items():
        assert all(len(set(row)) == 5 and row.min() >= 0 and not set(row) & set(had[:6]) for row, had in zip(l, h)), name
        assert said[name].keys() >= {"chosen", "tries", "seconds_choosing", "seconds_training", "seconds_answering", "cpu_seconds_training", "peak_rss_mb", "items"}
        assert max(t["ndcg"] for t in said[name]["tries"]) == next(t["ndcg"] for t in said[name]["tries"] if all(said[name]["chosen"].items() >= t["how"].items() for _ in (0,)) and t["cart_weight"] == said[name]["chosen"]["cart_weight"])
    assert (lists["implicit item-item"] == h[:, 6:]).any(1).mean() > .9
    again, _ = E.ask_peers(exam_of(h), ("implicit BPR",), small())
    assert np.array_equal(again["implicit BPR"], lists["implicit BPR"]), "the same seed, the same lists"

def test_the_script_needs_nothing_of_the_project():
    out = subprocess.run([sys.executable, "-I", "-c", "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sorted(m for m in sys.modules if m.split('.')[0] in ('recsys', 'torch', 'rectools', 'implicit', 'pandas')))", P.__file__],
                         capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert out.returncode == 0 and out.stdout.strip() == "", out.stderr

def test_a_peer_that_fails_is_one_line(tmp_path):
    with pytest.raises(RecsysError, match="bench, peer 'RecTools EASE': ModuleNotFoundError: No module named 'rectools'") as e: E.ask_peer("RecTools EASE", exam_of(circle(50)), sys.executable, small())
    assert "\n" not in str(e.value)
    killed = tmp_path/"python"; killed.write_text("#!/bin/sh\nkill -9 $$\n"); killed.chmod(0o755)
    with pytest.raises(RecsysError, match="it was killed"): E.ask_peer("RecTools EASE", exam_of(circle(50)), killed, small())

def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path):
    (tmp_path/"nbs/benchmarks").mkdir(parents=True); (tmp_path/E.PINS).write_text("no package at all ==\n"); (tmp_path/"settings.ini").write_text((ROOT/"settings.ini").read_text())
    s = load_settings(tmp_path/"settings.ini")
    with pytest.raises(RecsysError, match="bench without --peers"): E.peer_python(s)
    assert not list((tmp_path/"data/peers").iterdir())
    before = E.environment(s); (tmp_path/E.PINS).write_text("other\n")
    assert E.environment(s) != before, "another list of pins, another environment"
    (tmp_path/E.PINS).unlink()
    assert E.environment(s).name == E.environment(load_settings(ROOT/"settings.ini")).name, "without a list of its own, that of the package"

def test_pins_are_exact_and_agree_with_ours_where_it_matters():
    pins = dict(l.split("==") for l in (ROOT/E.PINS).read_text().splitlines() if l and not l.startswith("#"))
    ours = dict(l.split("==") for l in (ROOT/"constraints.txt").read_text().splitlines() if "==" in l)
    assert pins["torch"] == ours["torch"] == "2.13.0" and pins["rectools"] and "rectools" not in ours

# ---------------------------------------------------------------- RecTools, whose environment is made where it is not there yet: 1.3 GB, hence nightly

@pytest.fixture(scope="module")
def python():
    return E.peer_python(load_settings(ROOT/"settings.ini"))

@pytest.mark.bench
def test_ease_is_its_closed_form(python):
    h, s = circle(80), small(); lists, said = E.ask_peer("RecTools EASE", exam_of(h), python, s)
    x = np.zeros((80, 30)); x[np.repeat(np.arange(80), 6), h[:, :6].ravel()] = 1
    inverse = np.linalg.inv(x.T @ x + said["chosen"]["regularization"] * np.eye(30))
    b = inverse / -np.diag(inverse); np.fill_diagonal(b, 0)
    score = np.where(x > 0, -np.inf, x @ b)
    for row, one in zip(lists, score): assert np.allclose(one[row], np.sort(one)[::-1][:5], atol=1e-5)

@pytest.mark.bench
@pytest.mark.parametrize("model", ["RecTools SASRec", "RecTools BERT4Rec"])
def test_deep_models_learn_what_follows(python, model):
    h = circle(400); lists, said = E.ask_peer(model, exam_of(h), python, small(), length=8, every=5)
    best = max(said["tries"], key=lambda t: t["ndcg"])
    assert said["chosen"]["epochs"] == best["epochs"] and not any(set(row) & set(had[:6]) for row, had in zip(lists, h))
    assert (lists == h[:, 6:]).any(1).mean() > .5, "by chance: 5 of 24"

@pytest.mark.bench
def test_peers_of_sessions_answer_prefixes_of_people_nobody_knows(python):
    from recsys.operations.bench_sessions import PEERS, session_peers
    train, test = sequences(circle(300).tolist()), prefixes(sequences(circle(20, seed=1).tolist()))
    found, accounts = session_peers(train, test, 30, 5, replace(small(), bench=replace(small().bench, peer_cpu_seconds=1)), lambda note: None)
    assert found.keys() == accounts.keys() == PEERS.keys()
    assert all(l.shape == (len(test.label), 5) and all(len(set(row)) == 5 for row in l) for l in found.values())
    assert (found["implicit item-item"] == test.label[:, None]).any(1).mean() > .5

# ---------------------------------------------------------------- the account

def test_the_strongest_other_is_found_for_each_metric():
    c = Prefixes(i32([0] * 4), np.zeros(4, int), np.ones(4, int), i32([1, 2, 3, 4]), np.arange(4))
    lists = lambda *places: np.stack([np.r_[[9] * (p - 1), l, [8] * (3 - p)] if p else [9, 8, 7] for p, l in zip(places, c.label)]).astype(np.int32)
    unique = lambda x: np.stack([[v if i == next(j for j, w in enumerate(r) if w == v) else 20 + i for i, v in enumerate(r)] for r in x]).astype(np.int32)
    one, often, early = unique(lists(1, 1, 1, 0)), unique(lists(3, 3, 3, 3)), unique(lists(1, 1, 0, 0))
    said = against_rival(one, dict(source=dict(early=early), baseline=dict(often=often), peer={}), c, 3, small())
    assert (said["hit_rate@3"]["name"], said["hit_rate@3"]["kind"], said["mrr@3"]["name"]) == ("often", "baseline", "early")
    assert np.isclose(said["hit_rate@3"]["difference"], -.25) and np.isclose(said["mrr@3"]["difference"], .25) and said["hit_rate@3"]["value"] == 1

def test_where_we_lose_is_named_and_where_we_win_is_not():
    n, rng, s = 120, np.random.default_rng(0), load_settings(ROOT/"settings.ini")
    cases = Cases(np.arange(n), np.zeros(n + 1, int), i32([]), np.arange(n + 1), i32(rng.integers(0, 5, n)), np.zeros(n, bool))
    history = targets_of(np.arange(n), np.where(np.arange(n) % 2, cases.target, 29), n) # odd users had bought it before
    right, wrong = np.tile(np.arange(20), (n, 1)).astype(np.int32), np.tile(np.arange(6, 26), (n, 1)).astype(np.int32)
    ours = np.where((np.arange(n) % 2 == 1)[:, None], right, wrong)
    said = dict(next_basket=B.board({"ours": ours, "same": ours.copy(), "new": np.where((np.arange(n) % 2 == 0)[:, None], right, wrong)}, np.ones(n, bool), cases, history, s))
    rows = B.lost(said, ("ndcg@10",))
    assert {(r["rival"], r["part"]) for r in rows if r["sure"]} == {("new", "new to the user")} and not any(r["rival"] == "same" for r in rows)
    assert "new to the user: NDCG@10 0.0000 against" in B.in_words(rows[0]) and "beyond chance" in B.in_words(rows[0])
    d = said["next_basket"]["bought before"]["against"]["new"]["ndcg@10"]
    assert d["low"] > 0 and said["next_basket"]["bought before"]["cases"] == n // 2

def test_the_command_does_the_daily_run_and_tells_its_figures(tmp_path):
    shop = make_shop(tmp_path/"shop")
    run = recsys(shop, "run", "--allow-regression", "--json", "run.json"); assert run.returncode == 0, run.stderr
    done = recsys(shop, "bench", "shop", "--out", "F.json"); assert done.returncode == 0, done.stderr
    said, run = (json.loads((shop/f).read_text()) for f in ("F.json", "run.json"))
    assert {"name", "data", "moment", "window", "metric", "questions", "methods", "best_rival", "times_best", "lost", "seconds", "peak_rss_mb", "machine", "threads", "protocol"} <= said.keys()
    assert said["metric"] == "ndcg@5" and said["questions"].keys() == {"next_basket", "completion"} == run["metrics"].keys()
    for q, parts in said["questions"].items():
        figures = parts["all"]["figures"]
        assert figures["two-stage (ours)"]["ndcg@5"] == run["metrics"][q]["ndcg@5"], "the lists of the run itself"
        assert all(np.isclose(figures[b]["recall@5"]["value"], f["recall@5"]["value"]) for b, f in run["baselines"][q].items())
        assert {"implicit item-item", "implicit BPR"} <= figures.keys() == said["methods"].keys() and not any(n.startswith("RecTools") for n in figures)
        assert said["best_rival"][q] == max((n for n in figures if n != "two-stage (ours)"), key=lambda n: figures[n]["ndcg@5"]["value"])
    assert {m["kind"] for m in said["methods"].values()} == {"ours", "baseline", "a peer"} and all(m["seconds_training"] >= 0 for m in said["methods"].values())
    page = (shop/"reports/benchmarks/shop.html").read_text()
    assert "implicit BPR" in page and "Where we lose" in page and (shop/"reports/benchmarks/shop-shop.toml-2024-04-30.json").exists() and "http://" not in page.replace("http://www.w3.org", "")
    assert "completion" in done.stdout and "shop.html" in done.stdout
