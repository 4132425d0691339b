"Factors, content, complements, trending: against plain loops and other libraries, and through the blend."
from collections import Counter

import numpy as np, polars as pl, pytest, scipy.sparse as sp
from hypothesis import given, settings as hypo, strategies as st
from msgspec.structs import replace
from scipy.stats import chi2_contingency

from recsys.candidates.blend import State, with_told, clear, gather, load_state, scratch_for
from recsys.candidates.build import UNORDERED, factored_tables, past_tables
from recsys.candidates.complements import complements, log_likelihood_ratio
from recsys.candidates.content import catalogue_attributes, content_links
from recsys.candidates.factorization import fit_factors, fold_in, had
from recsys.candidates.sequences import Cases, sequences_of
from recsys.candidates.session_knn import Knn, SessionIndex, knn, session_index
from recsys.candidates.trending import DOUBT, LONG, SHORT, surplus, trending
from recsys.core.settings import RecsysError, load_settings
from recsys.evaluation.protocol import judge_sources, survey
from recsys.features.definitions import ABSENT, NAMES, SOURCES
from recsys.features.point_in_time import save_arrays, sessions_of
from recsys.serving.bundle import open_bundle, promote
from recsys.ranking.calibration import KNOTS
from recsys.ranking.rows import candidate_rows, make_cases, work_for
from recsys.serving.engine import Engine, reasons_of
from test_serving import N_ITEMS, N_USERS, publish, tables

DAY = 86400.
SETTINGS = load_settings()

# ---- factorization

@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 50), st.booleans()), max_size=30))
def test_counts_fade_and_purchases_count_ten_times(lines):
    u, i, t, b = (np.array(c, k) for c, k in zip(zip(*lines) if lines else ((),) * 4, (int, int, float, bool)))
    got, wanted = had(u, i, t * DAY, b, 4, 5, 50 * DAY, 20).toarray(), np.zeros((4, 5))
    for user, item, day, bought in lines: wanted[user, item] += (1 if bought else .1) * .5 ** ((50 - day) / 20)
    assert np.allclose(got, wanted, rtol=1e-5)

def test_folding_in_solves_the_least_squares_of_the_paper_for_people_the_training_never_saw():
    rng = np.random.default_rng(1)
    f = fit_factors(sp.csr_matrix((rng.random((60, 15)) < .3).astype(np.float32)), SETTINGS)
    dense = np.where(rng.random((5, 15)) < .3, rng.random((5, 15)) * 3, 0).astype(np.float32); dense[2] = 0
    new = sp.csr_matrix(dense)
    y, found = f.item.astype(float), fold_in(f, new)
    for row, x in zip(new.toarray(), found):  # Hu, Koren & Volinsky 2008, equation 4: confidence is the count, preference 1 where it is above 0
        if not row.any(): assert not x.any(); continue
        a = y.T @ y + y.T @ np.diag(np.maximum(row - 1, -1) * (row > 0)) @ y + SETTINGS.factors.regularization * np.eye(y.shape[1])
        assert np.allclose(x, np.linalg.solve(a, y.T @ row), atol=1e-3)
    assert np.array_equal(fold_in(fit_factors(sp.csr_matrix((np.random.default_rng(1).random((60, 15)) < .3).astype(np.float32)), SETTINGS), new), found)

# ---- content

@hypo(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=4, unique=True), min_size=2, max_size=12), st.integers(1, 5))
def test_content_links_are_the_largest_cosines(has, k):
    n, width = len(has), max(1, *map(len, has))
    table = np.full((n, width), 7, np.int32)
    for i, row in enumerate(has): table[i, :len(row)] = row
    idf = np.log1p(n / np.maximum([sum(a in row for row in has) for a in range(7)], 1))
    x = np.array([[idf[a] * (a in row) for a in range(7)] for row in has]); x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    wanted = x @ x.T; np.fill_diagonal(wanted, 0)
    got = content_links(table, 7, k)
    for i in range(n):
        best = np.sort(wanted[i])[::-1][:k]
        assert np.allclose(got.weight[i], np.where(best > 1e-7, best, 0), atol=1e-5)
        assert all(j < 0 or np.isclose(wanted[i, j], w, atol=1e-5) for j, w in zip(got.ids[i], got.weight[i]))

def test_a_catalogue_without_anything_and_one_with_odd_things():
    table, n = catalogue_attributes(pl.DataFrame(dict(item_id=["a", "b"])))
    assert n == 0 and (content_links(table, n, 3).ids == -1).all()
    odd = pl.DataFrame(dict(item_id=["a", "b", "c"], title=[None, "ÄPFEL äpfel!", "Äpfel"], category=[None, "", "Obst"], brand=["", None, "Obst"], price=[-1., 0., None]))
    table, n = catalogue_attributes(odd)
    assert n == 1 and (table[:, 0] == [1, 0, 0]).all()  # the word; once per item, whatever its case

# ---- complements

counts = st.integers(0, 40)
@given(counts, counts, counts, st.integers(1, 400))
def test_the_ratio_is_that_of_scipy(both, only_a, only_b, neither):
    a, b, n = both + only_a, both + only_b, both + only_a + only_b + neither
    got = float(log_likelihood_ratio(both, a, b, n))
    if both * n <= a * b: assert got == 0
    else: assert np.isclose(got, chi2_contingency([[both, only_a], [only_b, neither]], correction=False, lambda_="log-likelihood").statistic, rtol=1e-6, atol=1e-6)

def test_complements_are_of_another_kind_and_more_than_chance():
    rng, rows = np.random.default_rng(2), []
    for s in range(400):
        basket = {0} | ({1, 2} if s % 2 else {3, 4}) | set(rng.choice(np.arange(5, 12), 2, replace=False).tolist())
        rows += [(s, i) for i in sorted(basket) if rng.random() < .9]
    lines = pl.DataFrame(rows, schema=dict(session=pl.Int32, item=pl.Int32), orient="row").with_columns(user=pl.lit(0), ts=pl.lit(0), type=pl.lit("purchase"))
    category = np.array([0, 1, 2, 3, 3, *range(5, 12)])
    ids, scores = complements(lines, sessions_of(lines), category, DAY, 90, 3)
    assert ids[1, 0] == 2 and ids[2, 0] == 1 and scores[1, 0] == 1
    assert 4 not in ids[3] and 3 not in ids[4]                     # bought together, but of one kind
    assert 0 not in ids[1, :1] and (np.diff(scores, axis=1) <= 0).all()
    assert not any(category[i] == category[j] for i, row in enumerate(ids) for j in row if j >= 0)

# ---- trending

@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 100)), min_size=1, max_size=40))
def test_the_surplus_by_hand(events):
    item, ts = np.array([i for i, _ in events]), np.array([d for _, d in events]) * DAY
    decayed = lambda h: np.array([sum(.5 ** ((100 - d) / h) for j, d in events if j == i) for i in range(4)])
    now, usual = decayed(SHORT), decayed(LONG)
    expected = usual * now.sum() / usual.sum()
    s = surplus(item, ts, 4, 100 * DAY)
    assert np.allclose(s, (now - expected) / np.sqrt(expected + DOUBT))
    best = trending(item, ts, 4, 100 * DAY, 6)
    assert [i for i in best if i >= 0] == [i for i in np.argsort(-s, kind="stable") if s[i] > 0]

# ---- through the blend

def candidates(state: State, user: int, cart: list[int]) -> dict[int, set[str]]:
    "Who proposed what; checks that nothing is left behind in the scratch space."
    none, scratch = np.zeros(0, np.int32), scratch_for(len(state.item_x), max(0, len(state.past_ptr) - 1))
    ids, ranks, lists = np.zeros(400, np.int32), np.zeros((400, 11), np.float32), np.zeros((11, 50), np.int32)
    n = gather(state, scratch, user, np.array(cart, np.int32), none, ids, ranks, lists)
    found = {int(i): {s for s, r in zip(SOURCES, row) if r < ABSENT} for i, row in zip(ids[:n], ranks[:n])}
    clear(scratch)
    assert not any(a.any() for name, a in scratch._asdict().items() if name not in ("code", "key", "best", "heard", "near", "match", "similar", "weight"))
    return found

def with_sources() -> State:
    "Random tables with every source; item 0 is new: nothing leads to it but what it says of itself."
    s, rng = tables(), np.random.default_rng(3)
    links = lambda k: (rng.integers(1, N_ITEMS, (N_ITEMS, k)).astype(np.int32), rng.random((N_ITEMS, k)).astype(np.float32) + .01)
    (ci, cs), (xi, xs) = links(6), links(6)
    xi[7, 0] = 0
    for name in ("together_ids", "follow_ids", "cart_ids", "user_near", "segment_items", "bought_key", "recent_key"): getattr(s, name)[getattr(s, name) == 0] = 1
    past = sequences_of(np.repeat(np.arange(60), 5), rng.integers(1, N_ITEMS, 300))
    past.item[:2] = 7
    index = {f"past_{name}": a for name, a in session_index(past, N_ITEMS, UNORDERED)._asdict().items()}
    return with_told(s._replace(**index, sellable=np.ones(N_ITEMS, np.uint8), complement_ids=ci, complement_scores=cs, content_ids=xi, content_scores=xs, trending=np.array([5, 3, -1], np.int32),
                      user_factor=rng.random((N_USERS, 4)).astype(np.float32), item_factor=rng.random((N_ITEMS, 4)).astype(np.float32), user_close=rng.integers(1, N_ITEMS, (N_USERS, 9)).astype(np.int32)), 15)

def past_votes(state: State, cart: list[int]) -> list[int]:
    "The same sessions asked by the room's own search; what is in the cart falls out."
    index = SessionIndex(*(getattr(state, f"past_{name}") for name in SessionIndex._fields))
    how = Knn(prefix_decay=.8, recent=500, neighbours=200, ahead=.8, behind=1., itself=0.)
    cases = Cases(np.array(cart, np.int32), np.zeros(1, np.int64), np.array([len(cart)], np.int64), np.zeros(1, np.int32), np.zeros(1, np.int64))
    return [int(i) for i in knn(index, cases, how, 50).ids[0] if i >= 0 and i not in cart]

def test_a_new_item_comes_by_content_alone_and_each_source_says_so():
    s = with_sources()
    found = candidates(s, -1, [7])
    assert found[0] == {"content"} and set(past_votes(s, [7])) == {i for i, names in found.items() if "session" in names} != set() and "trending" in found[5] & found[3]
    told = Counter(name for user in range(N_USERS) for names in candidates(s, user, [7]).values() for name in names)
    assert set(told) == set(SOURCES)
    assert "complement" not in Counter(n for names in candidates(s, 1, []).values() for n in names)

def test_neighbours_without_a_score_propose_nothing_and_are_met_once(tmp_path):
    "Many more neighbours than items, all of them with a score of 0: each would once have been noted as new again and again, beyond the end of the notes."
    n, k = 30, 90
    s = tables(n=n, m=4)
    near = np.tile(np.arange(n, dtype=np.int32), (n, k // n))
    zero = np.zeros((n, k), np.float32)
    s = with_told(s._replace(together_ids=near, together_scores=zero, cart_ids=near, cart_scores=zero, follow_ids=near, follow_scores=zero), 12)
    told = {name for user in range(-1, 4) for names in candidates(s, user, list(range(6))).values() for name in names}
    assert not told & {"together", "vector_cart", "follow"} and "segment" in told

def test_a_version_from_before_these_sources_opens_and_half_a_source_does_not(tmp_path):
    old = tables()._asdict()
    save_arrays(tmp_path/"old", {k: v for k, v in old.items() if k not in State._field_defaults})
    assert {s for names in candidates(load_state(tmp_path/"old"), 1, [7]).values() for s in names} <= {"repeat", "together", "follow", "vector", "vector_cart", "segment"}
    publish(tmp_path, "v1", with_sources()); promote(tmp_path/"bundles", "v1"); open_bundle(tmp_path/"bundles"/"v1")
    none = np.zeros((0, 0), np.float32)
    for k, broken in enumerate((dict(user_factor=none), dict(item_factor=none), dict(content_scores=none), dict(complement_ids=none.astype(np.int32)), dict(trending=np.array([N_ITEMS], np.int32)), dict(past_item=np.full(300, N_ITEMS, np.int32)), dict(past_trust=np.zeros(3, np.float32)), dict(user_follow_sums=np.zeros((N_USERS, 3, 2), np.float32)), dict(user_alike_ids=np.full((N_USERS, 15), N_ITEMS, np.int32)), dict(past_click=np.full(300, 300)), dict(past_ptr=np.arange(61)),
                                dict(user_close=np.full((N_USERS, 3), -2, np.int32)))):
        with pytest.raises(RecsysError, match=dict(item_factor="user_factor").get(*[next(iter(broken))] * 2).split("_")[0]): publish(tmp_path, f"w{k}", with_sources()._replace(**broken))

def test_every_source_has_words_of_its_own():
    without = reasons_of(SOURCES, None, False, True, (3, 4))
    assert len(set(without)) == len(SOURCES) and without[SOURCES.index("content")] != reasons_of(("content",), None, True, True)[0]
    assert "3 × before, last 4 days" in without[SOURCES.index("repeat")] and reasons_of(("repeat",), None, False, True) == ["bought before"]

# ---- what the build and the pages make of them

def test_only_the_newest_sessions_are_kept_each_item_once():
    lines = pl.DataFrame(dict(session=[0, 0, 1, 1, 1, 2, 2], item=[0, 1, 2, 3, 2, 4, 0], ts=[10, 11, 30, 31, 32, 20, 21]), schema_overrides=dict(session=pl.Int32, item=pl.Int32))
    t = past_tables(lines, 5, replace(SETTINGS, candidates=replace(SETTINGS.candidates, sessions=2)))
    assert t["past_ptr"].tolist() == [0, 2, 4] and t["past_item"].tolist() == [4, 0, 2, 3]  # the session that began first has gone
    assert len(past_tables(lines, 5, SETTINGS)["past_ptr"]) == 4

def test_only_eligible_items_are_close_and_visitors_who_only_looked_have_factors():
    rng, n = np.random.default_rng(4), 400
    lines = pl.DataFrame(dict(user=rng.integers(0, 29, n).astype(np.int32), item=rng.integers(0, 20, n).astype(np.int32), ts=np.arange(n)))
    lines = pl.concat([lines.with_columns(type=pl.lit("purchase")), pl.DataFrame(dict(user=[29], item=[3], ts=[n], type=["view"]), schema_overrides=dict(user=pl.Int32, item=pl.Int32))])
    t = factored_tables(lines, "purchase", np.arange(0, 20, 2), 31, 20, n + 1, SETTINGS)
    found = t["user_close"][:30]
    assert set(found[found >= 0].tolist()) == set(range(0, 20, 2)) and t["user_factor"][29].any() and not t["user_factor"][30].any() and (t["user_close"][30] == -1).all()

def test_each_source_is_judged_by_its_own_list():
    cases = make_cases(np.arange(2), [np.array([1]), np.array([2])], 0)
    ours, alone = np.array([[1, 0, 3], [2, 0, 3]]), dict(good=np.array([[0, 1, 3], [2, 0, 1]]), none=np.full((2, 3), -1))
    s = replace(SETTINGS, evaluation=replace(SETTINGS.evaluation, cutoffs=(3,)))
    good, none = judge_sources(ours, alone, cases, s)
    second = 1 / np.log2(3)
    assert good["source"] == "good" and np.isclose(good["ndcg"], (second + 1) / 2) and np.isclose(good["difference"], (1 - second) / 2)
    assert (none["ndcg"], none["difference"], none["low"], none["high"]) == (0, 1, 1, 1)

def test_a_survey_keeps_what_each_source_proposed_in_its_order(tmp_path):
    publish(tmp_path, "v1", with_sources())
    b = open_bundle(tmp_path/"bundles"/"v1"); engine = Engine(b.state, b.ranker, 40, 400, b)
    cases = make_cases(np.arange(1, 6, dtype=np.int32), [np.array([3, 7, 11, 20])] * 5, 0)
    found = survey(engine, cases, 7, np.tile(np.linspace(0, 1, KNOTS), (2, 2, 1)))
    for c, user in enumerate(cases.user):
        cart = cases.cart[cases.cart_ptr[c]:cases.cart_ptr[c + 1]]
        rows, _, _ = engine.rank(int(user), cart, engine.nobody, len(engine.work.ids))
        for s, name in enumerate(SOURCES):
            own = sorted((engine.work.ranks[r, s], int(engine.work.ids[r])) for r in rows if engine.work.ranks[r, s] < ABSENT)
            assert [i for i in found.alone[name][c] if i >= 0] == [i for _, i in own[:7]], name
            target = cases.target[cases.target_ptr[c]:cases.target_ptr[c + 1]]
            assert np.isclose(found.recall[name][c], len({i for _, i in own} & set(target.tolist())) / len(target))

def test_each_column_of_the_new_sources_is_what_its_name_says():
    s, user, cart = with_sources(), 3, np.array([7, 9], np.int32)
    work, none = work_for(s, 40, 400), np.zeros(0, np.int32)
    n = candidate_rows(s, work, user, cart, none)
    column = lambda name: work.x[:n, NAMES.index(name)]
    def passed_on(ids, scores, i): return [float(w) for c in cart for j, w in zip(ids[c], scores[c]) if j == i]
    index = SessionIndex(*(getattr(s, f"past_{name}") for name in SessionIndex._fields))
    found = knn(index, Cases(cart, np.zeros(1, np.int64), np.array([2], np.int64), np.zeros(1, np.int32), np.zeros(1, np.int64)), Knn(prefix_decay=.8, recent=500, neighbours=200, ahead=.8, behind=1., itself=0.), N_ITEMS)
    votes = dict(zip(found.ids[0].tolist(), found.scores[0].tolist()))
    for r, i in enumerate(work.ids[:n]):
        want = dict(score_complement=sum(passed_on(s.complement_ids, s.complement_scores, i)), score_content=max(passed_on(s.content_ids, s.content_scores, i), default=0),
                    score_factor=s.user_factor[user] @ s.item_factor[i], score_session=votes.get(int(i), 0))
        for name, value in want.items(): assert np.isclose(column(name)[r], value, rtol=1e-4, atol=1e-6), (name, int(i))
        for k, source in enumerate(SOURCES): assert column(f"rank_{source}")[r] == work.ranks[r, k]
        assert column("n_sources")[r] == (work.ranks[r] < ABSENT).sum()
