"Next items of sessions: kernels against brute force, rows that never meet their own session, the protocol by hand, the command."
import json, math
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hypothesis, strategies as st
from msgspec.structs import replace

from recsys.candidates import sequences as Q, session_knn as N, transitions as T
from recsys.core.settings import RecsysError, load_settings
from recsys.evaluation import next_item as E
from recsys.operations.bench_sessions import bench_sessions
from recsys.operations.cli import main
from recsys.ranking import session_ranker as R, session_rows as S

ITEMS = 8
sessions = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=7), min_size=1, max_size=12)
slow = hypothesis(max_examples=60, deadline=None)


def walks(n, items=60, seed=0):
    "Sessions that mostly go one further, sometimes back."
    rng = np.random.default_rng(seed)
    return [np.clip(np.cumsum(np.r_[rng.integers(items), rng.choice([-1, 0, 1, 2], rng.integers(2, 7), p=[.3, .1, .5, .1])]), 0, items - 1).tolist() for _ in range(n)]


def quick():
    s = load_settings()
    return replace(s, sessions=replace(s.sessions, blocks=3, trials=3, training_cases=3000, trees=15, attention_epochs=1), ranker=replace(s.ranker, min_rows_in_leaf=5), evaluation=replace(s.evaluation, bootstrap_samples=100))


def top(score: dict, k: int) -> list:
    "(item, score) of the k best, ties by lower code."
    return sorted(((i, w) for i, w in score.items() if w > 0), key=lambda x: (-x[1], x[0]))[:k]


def same(ids, scores, want):
    "Found = wanted, whatever the order among scores that differ by rounding only."
    got = [(int(i), float(w)) for i, w in zip(ids, scores) if i >= 0]
    assert len(got) == len(want)
    np.testing.assert_allclose([w for _, w in got], [w for _, w in want], rtol=1e-4)
    assert len({i for i, _ in got}) == len(got)


def decayed(prefix, decay):
    "(item, weight) of the last clicks, each item where it was clicked last."
    seen = set()
    for d, i in enumerate(reversed(prefix)):
        if d < len(decay) and i not in seen: yield i, decay[d]
        seen.add(i)


# ---------------------------------------------------------------- sequences
@slow
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=25))
def test_lines_become_sessions_in_order_of_their_last_click(lines):
    session, item, ts = map(np.array, zip(*lines))
    s = Q.sequences_of(session, item, ts)
    whole = {a: [i for _, i in sorted((t, n) for n, (b, _, t) in enumerate(lines) if b == a)] for a in set(session.tolist())}
    order = sorted(whole, key=lambda a: (max(t for b, _, t in lines if b == a), a))
    assert [s.item[a:b].tolist() for a, b in pairwise(s.ptr)] == [[int(item[n]) for n in whole[a]] for a in order]


@slow
@given(sessions, st.integers(1, 3))
def test_cases_are_all_prefixes_and_never_hold_their_label(lists, least):
    c = Q.prefixes(Q.sequences(lists), least)
    want = [(n, l[:j], l[j]) for n, l in enumerate(lists) for j in range(least, len(l))]
    assert [(int(n), c.item[a:b].tolist(), int(y)) for a, b, y, n in zip(c.start, c.end, c.label, c.session)] == want


@slow
@given(sessions, st.sets(st.integers(0, ITEMS - 1)), st.integers(1, 2))
def test_a_validation_part_keeps_known_items_only(lists, known, least):
    s = Q.known_part(Q.sequences(lists), np.isin(np.arange(ITEMS), list(known)), least)
    want = [k for l in lists if len(k := [i for i in l if i in known]) > least]
    assert [s.item[a:b].tolist() for a, b in pairwise(s.ptr)] == want


def test_both_shapes_of_files_say_the_same(tmp_path):
    lists = [[7 + 3 * i for i in l] for l in walks(80)]
    pl.DataFrame(dict(session=range(80), items=lists)).write_parquet(tmp_path/"a.parquet")
    pl.DataFrame([(9000 - s, i, 1e6 + 50. * s + p) for s, l in enumerate(lists) for p, i in enumerate(l)], schema=list(Q.CLICKS), orient="row").write_csv(tmp_path/"a.txt", separator="\t")
    (a, ids), (b, others) = Q.read_sessions(tmp_path/"a.parquet"), Q.read_sessions(tmp_path/"a.txt")
    assert np.array_equal(a.item, b.item) and np.array_equal(a.ptr, b.ptr) and np.array_equal(ids, others)
    pl.DataFrame(dict(prefix=[l[:j] for l in lists for j in range(1, len(l))], label=[l[j] for l in lists for j in range(1, len(l))])).write_parquet(tmp_path/"t.parquet")
    x, y = Q.read_cases(tmp_path/"t.parquet", ids), Q.read_cases(tmp_path/"a.txt", ids)
    prefixes = lambda c: [c.item[a:b].tolist() for a, b in zip(c.start, c.end)]
    assert prefixes(x) == prefixes(y) and np.array_equal(x.label, y.label)


@pytest.mark.parametrize("reverse", (False, True))
def test_cases_of_one_session_are_recognised(tmp_path, reverse):
    lists = [[1, 2, 3, 4], [1, 2, 9], [5, 6]]
    cases = [c for l in lists for c in sorted([(l[:j], l[j]) for j in range(1, len(l))], key=lambda c: len(c[0]), reverse=reverse)]
    pl.DataFrame(cases, schema=["prefix", "label"], orient="row").write_parquet(tmp_path/"t.parquet")
    assert Q.read_cases(tmp_path/"t.parquet", np.arange(10)).session.tolist() == [0, 0, 0, 1, 1, 2]


def test_unknown_items_leave_the_prefix_and_unknown_labels_stay_as_misses(tmp_path):
    pl.DataFrame(dict(prefix=[[5, 99, 7], [99]], label=[99, 5])).write_parquet(tmp_path/"t.parquet")
    c = Q.read_cases(tmp_path/"t.parquet", np.array([5, 7]))
    assert [c.item[a:b].tolist() for a, b in zip(c.start, c.end)] == [[0, 1], []] and c.label.tolist() == [-1, 0]


# ---------------------------------------------------------------- kernels against plain loops
@slow
@given(st.lists(st.integers(0, 4), min_size=1, max_size=10), st.integers(1, 12))
def test_best_is_a_sort(values, k):
    total, n = np.array(values, np.float32), len(values)
    ids, scores = np.full(k, -1, np.int32), np.zeros(k, np.float32)
    m = T.best(total, np.arange(n, dtype=np.int32)[::-1].copy(), n, k, ids, scores)
    want = sorted(range(n), key=lambda i: (-values[i], i))[:k]
    assert ids[:m].tolist() == want and scores[:m].tolist() == [values[i] for i in want] and not total.any()


@slow
@given(sessions, st.lists(st.sampled_from([0., .25, .5, 1.]), max_size=4), st.lists(st.sampled_from([0., .5, 1.]), max_size=3), st.booleans(), st.integers(1, ITEMS), st.data())
def test_links_are_what_a_loop_counts(lists, ahead, behind, itself, k, data):
    weight = data.draw(st.lists(st.sampled_from([0., 1., 2.]), min_size=len(lists), max_size=len(lists)))
    l = T.links(Q.sequences(lists), ITEMS, k, ahead, behind, np.array(weight), itself)
    for i in range(ITEMS):
        score = {}
        for w, s in zip(weight, lists):
            for p, q in ((p, q) for p in range(len(s)) for q in range(len(s)) if s[p] == i and p != q and (itself or s[q] != i)):
                d = q - p
                score[s[q]] = score.get(s[q], 0) + w * (ahead[d - 1] if 0 < d <= len(ahead) else behind[-d - 1] if 0 < -d <= len(behind) else 0)
        same(l.ids[i], l.weight[i], top(score, k))


@slow
@given(sessions, sessions, st.integers(1, ITEMS), st.integers(1, 4))
def test_votes_two_steps_and_pairs_are_what_loops_count(past, asked, k, width):
    s, decay = Q.sequences(past), [1., .5, .25]
    l = T.shares(T.links(s, ITEMS, ITEMS, [1., .5]), np.bincount(s.item, minlength=ITEMS))
    table = {i: {int(j): float(w) for j, w in zip(l.ids[i], l.weight[i]) if j >= 0} for i in range(ITEMS)}
    cases = Q.prefixes(Q.sequences(asked))
    found = T.vote(l, cases, decay, k)
    for c, (a, b) in enumerate(zip(cases.start, cases.end)):
        score = {}
        for i, d in decayed(cases.item[a:b].tolist(), decay):
            for j, w in table[i].items(): score[j] = score.get(j, 0) + d * w
        same(found.ids[c], found.scores[c], top(score, k))
    two, first = T.two_steps(l, k, width), lambda i: list(table[i].items())[:width]
    for i in range(ITEMS):
        score = {}
        for j, w in first(i):
            for h, v in first(j): score[h] = score.get(h, 0) + w * v
        same(two.ids[i], two.weight[i], top(score, k))
    want = {}
    for x in past:
        for t in zip(x, x[1:], x[2:]): want[t] = want.get(t, 0) + 1
    p = T.pairs(s, ITEMS)
    assert {(*divmod(int(key), ITEMS), int(p.item[q])): p.weight[q] for key, a, b in zip(p.key, p.ptr, p.ptr[1:]) for q in range(a, b)} == want


@slow
@given(sessions, sessions, st.integers(1, 3), st.integers(1, 4), st.sampled_from([0., .5, 1.]), st.sampled_from([0., .7]), st.integers(1, ITEMS))
def test_session_knn_is_what_a_loop_says(past, asked, recent, neighbours, itself, behind, k):
    how = N.Knn(prefix_decay=.5, idf_power=1., recent=recent, neighbours=neighbours, ahead=.5, behind=behind, itself=itself, size_power=.3, half_life=.4)
    s, cases = Q.sequences(past), Q.prefixes(Q.sequences(asked))
    found, n = N.knn(N.session_index(s, ITEMS, how), cases, how, k), len(past)
    for c, (a, b) in enumerate(zip(cases.start, cases.end)):
        sim, match = {}, {}
        for i, d in decayed(cases.item[a:b].tolist(), [.5 ** r for r in range(N.REACH)]):
            holders = [r for r in range(n - 1, -1, -1) if i in past[r]][:recent]
            for r in holders:
                match.setdefault(r, len(past[r]) - 1 - past[r][::-1].index(i))
                sim[r] = sim.get(r, 0) + d * math.log1p(n / max(1, sum(x.count(i) for x in past)))
        value = {r: v * .5 ** ((n - 1 - r) / n / .4) / len(past[r]) ** .3 for r, v in sim.items()}
        least = sorted(value.values(), reverse=True)[:neighbours][-1] if value else 0
        if len(value) > neighbours and min(abs(v - least) / least for v in sorted(value.values(), reverse=True)[neighbours:]) < 1e-5: continue  # a tie that rounding may break
        score = {}
        for r, v in value.items():
            if v < least * (1 - 1e-6): continue
            for p, i in enumerate(past[r]):
                d = p - match[r]
                score[i] = score.get(i, 0) + v * (itself if d == 0 else .5 ** (d - 1) if d > 0 else behind * .5 ** (-d - 1))
        same(found.ids[c], found.scores[c], top(score, k))


# ---------------------------------------------------------------- union, features, folds
def test_the_union_takes_the_prefix_first_then_turns_and_fills_up():
    fitted = S.fit_sources(Q.sequences(walks(200)), 60, N.Knn())
    cases = Q.prefixes(Q.sequences(walks(40, seed=1)))
    empty = Q.Cases(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([3], np.int32), np.zeros(1, np.int64))
    for asked in (cases, empty):
        rows, lists = S.session_rows(fitted, asked, 10, 25, 12)
        for c, ids in enumerate(np.split(rows.ids, np.cumsum(rows.size)[:-1])):
            prefix = asked.item[asked.start[c]:asked.end[c]].tolist()
            want = list(dict.fromkeys(prefix[::-1]))[:12]
            for r in range(10): want += [i for i in dict.fromkeys(lists[:, c, r].tolist()) if i >= 0 and i not in want]
            want = want[:25]
            want += [i for i in fitted.tables.popular.tolist() if i not in want][:max(0, 12 - len(want))]
            assert ids.tolist() == want
        assert np.array_equal(rows.bought, rows.ids == np.repeat(asked.label, rows.size)) and np.isfinite(rows.x).all()


def test_features_say_where_a_candidate_came_from_and_where_it_was():
    fitted = S.fit_sources(Q.sequences(walks(300)), 60, N.Knn())
    cases, names = Q.prefixes(Q.sequences(walks(30, seed=2))), S.feature_names(fitted.sources)
    rows, lists = S.session_rows(fitted, cases, 15, 40, 10)
    col = {n: rows.x[:, j] for j, n in enumerate(names)}
    assert rows.x.shape[1] == len(names) == len(set(names))
    for a, c in enumerate(np.repeat(np.arange(len(rows.size)), rows.size)):
        i, prefix = int(rows.ids[a]), cases.item[cases.start[c]:cases.end[c]].tolist()
        ranks = [np.flatnonzero(lists[s, c] == i) for s in range(len(lists))]
        assert [col[f"{s}_rank"][a] for s in fitted.sources] == [r[0] if len(r) else 999 for r in ranks]
        assert col["sources"][a] == sum(len(r) for r in ranks)
        assert col["times"][a] == prefix.count(i) and col["ago"][a] == (prefix[::-1].index(i) if i in prefix else 999) and col["place"][a] == (prefix.index(i) if i in prefix else -1)
        assert col["length"][a] == len(prefix) and col["variety"][a] == np.float32(len(set(prefix)) / len(prefix))
        assert col["after"][a] == sum(x == prefix[-1] and y == i for x, y in pairwise(prefix)) and col["code_gap"][a] == i - prefix[-1]
        assert col["visited"][a] == prefix[:-1].count(prefix[-1])
        assert col["run"][a] == next((n for n, x in enumerate(prefix[::-1]) if x != prefix[-1]), len(prefix))


def test_a_source_of_ones_own_joins_the_union_and_the_features():
    def oracle(train, n_items): return lambda cases, k: T.Found(np.full((len(cases.label), 1), 59, np.int32), np.ones((len(cases.label), 1), np.float32))
    fitted = S.fit_sources(Q.sequences(walks(200, items=50)), 60, N.Knn(), more=dict(mine=oracle))
    rows, lists = S.session_rows(fitted, Q.prefixes(Q.sequences([[1, 2, 3]])), 1, 30, 5)
    x = rows.x[rows.ids == 59]
    assert len(x) == 2 and (x[:, S.feature_names(fitted.sources).index("mine_rank")] == 0).all() and (lists[-1] == 59).all()


def test_training_rows_never_meet_their_own_session_nor_anything_later(monkeypatch):
    "Every session visits an item pair of its own; sources that had seen it would know the pair."
    n = 400
    lists = [[2 * s, 2 * s + 1, 2 * s, 2 * s + 1, 0, 1] for s in range(n)]
    seen, real = [], S.fit_sources
    def spy(train, *a, **k): seen.append(len(train.ptr) - 1); return real(train, *a, **k)
    monkeypatch.setattr(R, "fit_sources", spy)
    cases_of, asked = R.block_cases, []
    def cases(train, n_items, a, b, *rest): asked.append((a, b)); return cases_of(train, n_items, a, b, *rest)
    monkeypatch.setattr(R, "block_cases", cases)
    rows = []
    pieces = R.training_pieces
    def keep(fitted, c, *a): r = pieces(fitted, c, *a); rows.append((fitted, c, r)); return r
    monkeypatch.setattr(R, "training_pieces", keep)
    s = Q.sequences([[0, 1], *lists[1:]])  # a session of two clicks: a prefix may be one item long
    R.fit_sessions(s, 2 * n, 5, quick())
    learn, choose = R.plan(s, quick())[:2]
    assert asked == [choose, *learn] and seen == [*(a for a, _ in learn), choose[0], n]
    for fitted, c, _ in rows: assert set(np.unique(c.item)) <= {0, 1} and fitted.tables.item_x[:, S.ITEM_NAMES.index("count")].max() <= n + 2


def test_no_prefix_is_shorter_than_any_that_the_file_would_ask_for():
    for shortest, least in ((2, 1), (3, 2), (5, 4)):
        s = Q.sequences([[0, 1]] * (shortest == 2) + [w for w in walks(600) if len(w) >= shortest])
        assert len(s.ptr) > 60 and Q.lengths(s).min() == shortest
        assert Q.shortest_prefix(s) == R.plan(s, quick()).least == least
        assert Q.shortest_prefix(Q.known_part(s, np.ones(60, bool), 10**6)) == 1
        a, b = R.plan(s, quick()).choose
        cases = S.block_cases(s, 60, a, b, least, 10**6, 0)
        assert (cases.end - cases.start).min() == least and (Q.prefixes(s, least).end - Q.prefixes(s, least).start).min() == least


def test_blocks_lie_at_the_end_in_order_and_leave_half():
    for n, count, share in ((1000, 10, .05), (1000, 3, .25), (60, 9, .05)):
        b = S.blocks(n, count, share)
        assert b[-1][1] == n and all(x[1] == y[0] for x, y in pairwise(b)) and b[0][0] >= n / 2 and len(b) <= count


def test_thinned_rows_keep_the_next_item_and_some_others():
    s = Q.sequences(walks(400))
    cases = S.block_cases(s, 60, 350, 400, 1, 10**6, 0)
    fitted = S.fit_sources(Q.part(s, 0, 350), 60, N.Knn())
    rows = S.training_pieces(fitted, cases, 10, 30, 10, 4, seed=3)
    again = S.training_pieces(fitted, cases, 10, 30, 10, 4, seed=3)
    assert all(np.array_equal(a.x, b.x) for a, b in zip(rows, again))
    for r in rows: assert (r.size <= 5).all() and (np.add.reduceat(r.bought, np.cumsum(r.size) - r.size) == 1).all()


# ---------------------------------------------------------------- protocol
def test_metrics_by_hand():
    lists = np.array([[4, 2, 9], [2, 4, 9], [9, 2, 4], [1, 2, 3], [1, 2, -1]], np.int32)
    m = E.next_item_metrics(lists, np.array([4, 4, 4, 4, -1]), 2)
    assert m["hit_rate@2"].tolist() == [1, 1, 0, 0, 0] and m["mrr@2"].tolist() == [1, .5, 0, 0, 0]
    np.testing.assert_allclose(m["ndcg@2"], [1, 1 / math.log2(3), 0, 0, 0])
    with pytest.raises(RecsysError, match="twice"): E.next_item_metrics(np.array([[1, 1]]), np.array([1]), 2)
    with pytest.raises(RecsysError, match="cutoff"): E.next_item_metrics(lists, np.zeros(5, int), 4)


def test_intervals_draw_sessions_not_cases():
    label = np.repeat(np.arange(20), 30)
    lists = np.where(np.arange(600) < 300, label, -1).astype(np.int32)[:, None]
    c = Q.Cases(np.zeros(0, np.int32), *np.zeros((2, 600), np.int64), label.astype(np.int32), label)
    by_session = E.figures(lists, c, 1, 400, 0)["hit_rate@1"]
    by_case = E.figures(lists, c._replace(session=np.arange(600)), 1, 400, 0)["hit_rate@1"]
    assert by_session["value"] == .5 and by_session["high"] - by_session["low"] > 3 * (by_case["high"] - by_case["low"])


def test_baselines_are_what_they_say():
    s = Q.sequences([[0, 1, 2], [0, 1], [0, 3], [4, 1]])
    c = Q.prefixes(Q.sequences([[0, 9]]))
    l = E.baseline_lists(s, c, 5, 3)
    assert l["popularity"].tolist() == [[0, 1, 2]] and l["transitions"].tolist() == [[1, 3, -1]]
    assert set(l["item_item"][0]) == {1, 2, 3} and l["session_knn"][0, 0] == 0


# ---------------------------------------------------------------- model and command
def test_the_same_seed_gives_the_same_lists_and_another_does_not():
    s, cases = Q.sequences(walks(700)), Q.prefixes(Q.sequences(walks(60, seed=9)))
    lists = lambda how: R.answer(R.fit_sessions(s, 60, 5, how), cases, 5, how).lists
    one = lists(quick())
    assert np.array_equal(one, lists(quick()))
    assert not np.array_equal(one, lists(replace(quick(), run=replace(quick().run, seed=7))))


def test_answers_do_not_depend_on_the_other_cases():
    s, cases = Q.sequences(walks(500)), Q.prefixes(Q.sequences(walks(40, seed=9)))
    model = R.fit_sessions(s, 60, 5, quick())
    whole, few = R.answer(model, cases, 5, quick()), R.answer(model, Q.some(cases, slice(10, 13)), 5, quick())
    assert np.array_equal(whole.lists[10:13], few.lists)
    blind = cases._replace(label=np.full_like(cases.label, -1))
    assert np.array_equal(whole.lists, R.answer(model, blind, 5, quick()).lists)


@pytest.fixture
def files(tmp_path):
    pl.DataFrame(dict(session=range(400), items=walks(400))).write_parquet(tmp_path/"train.parquet")
    asked = walks(50, seed=4)
    pl.DataFrame(dict(prefix=[w[:j] for w in asked for j in range(1, len(w))], label=[w[j] for w in asked for j in range(1, len(w))])).write_parquet(tmp_path/"test.parquet")
    return tmp_path


def test_the_bench_says_all_that_was_promised(files):
    said = bench_sessions(files/"train.parquet", files/"test.parquet", files/"out.json", quick())
    wrote = json.loads((files/"out.json").read_text())
    assert {"n_cases", "hit_rate@20", "mrr@20", "hit_rate@20_interval", "mrr@20_interval", "seconds", "peak_rss_mb", "baselines", "sources", "comparison", "chosen", "protocol"} <= set(wrote)
    assert wrote["n_cases"] == said["n_cases"] == len(pl.read_parquet(files/"test.parquet")) and wrote["n_test_sessions"] == 50
    low, high = wrote["hit_rate@20_interval"]
    assert 0 < low <= wrote["hit_rate@20"] <= high <= 1 and wrote["hit_rate@20"] <= wrote["among_candidates"] and wrote["peak_rss_mb"] > 0
    assert {"popularity", "transitions", "item_item", "session_knn"} == set(wrote["baselines"])
    best = wrote["sources"][wrote["comparison"]["source"]]["hit_rate@20"]
    assert best == max(v["hit_rate@20"] for v in wrote["sources"].values())
    assert wrote["comparison"]["hit_rate@20"]["difference"] == pytest.approx(wrote["hit_rate@20"] - best)


def test_the_command_runs_on_clicks_and_fails_in_one_line(files, capsys, monkeypatch):
    monkeypatch.setenv("RECSYS_SESSIONS_TRIALS", "2"); monkeypatch.setenv("RECSYS_RANKER_TREES", "5"); monkeypatch.setenv("RECSYS_EVALUATION_BOOTSTRAP_SAMPLES", "100")
    for name in ("train", "test"):
        pl.DataFrame([(s, i, 1000 * s + p) for s, l in enumerate(walks(300 if name == "train" else 20, seed=len(name))) for p, i in enumerate(l)], schema=list(Q.CLICKS), orient="row").write_csv(files/f"{name}.txt", separator="\t")
    command = ["bench", "sessions", "--train", str(files/"train.txt"), "--test", str(files/"test.txt"), "--out", str(files/"out.json"), "--k", "5"]
    monkeypatch.setenv("RECSYS_PATHS_REPORTS", str(files/"reports"))
    assert main(command) == 0 and "hit_rate@5" in (out := capsys.readouterr().out)
    page = files/"reports"/"benchmarks"/"next_item.html"
    assert str(page) in out.replace("\n", "") and f"{files.name}/train.txt" in page.read_text() and "better than the strongest of all others measured" in page.read_text()
    for text, what in (("SessionId\tItemId\tTime\n1\t2\t3\n", "50 sessions"), ("a\tb\n1\t2\n", "columns"), ("SessionId\tItemId\tTime\n1\tx\t3\n", "whole numbers"), ("", "cannot be read")):
        (files/"train.txt").write_text(text)
        assert main(command) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and what in err and "train.txt" in err
