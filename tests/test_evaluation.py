"Metrics and baselines against brute force, by hand, and against theory."
import math, warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.evaluation import baselines as B, metrics as M

DAY = 86_400.


# ---------------------------------------------------------------- metrics: oracles on random cases
@st.composite
def answers(draw, n_items=12):
    "Lists (distinct items, padded at the end) and target sets of the same cases, some of them empty."
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    lists = [draw(st.lists(st.integers(0, n_items - 1), unique=True, max_size=k)) for _ in range(n)]
    targets = [draw(st.sets(st.integers(0, n_items - 1), max_size=8)) for _ in range(n)]
    return np.array([l + [-1]*(k - len(l)) for l in lists], np.int32).reshape(n, k), targets


def csr(sets):
    return M.targets_of(np.repeat(np.arange(len(sets)), [len(s) for s in sets]), np.array([i for s in sets for i in sorted(s)], int), len(sets))


def oracle(l, t, k):
    "Every metric of one case, spelled out."
    l = [i for i in l[:k] if i >= 0]
    if not t: return dict(recall=math.nan, precision=math.nan, hit_rate=math.nan, mrr=math.nan, ndcg=math.nan)
    found = [r for r, i in enumerate(l, 1) if i in t]
    ideal = sum(1/math.log2(r + 1) for r in range(1, min(k, len(t)) + 1))
    return dict(recall=len(found)/len(t), precision=len(found)/k, hit_rate=float(bool(found)), mrr=1/found[0] if found else 0.,
                ndcg=sum(1/math.log2(r + 1) for r in found)/ideal)


@settings(max_examples=150, deadline=None)
@given(answers(), st.data())
def test_accuracy_is_what_brute_force_says(case, data):
    lists, sets = case
    k = data.draw(st.integers(1, lists.shape[1]))
    got = M.evaluate(lists, csr(sets), cutoffs=(k,))
    for c, (l, t) in enumerate(zip(lists, sets)):
        for name, want in oracle(l, t, k).items():
            np.testing.assert_allclose(got[f"{name}@{k}"][c], want, atol=1e-12)
    assert np.array_equal(M.hits(lists, csr(sets)), [[i >= 0 and i in t for i in l] for l, t in zip(lists, sets)])


@settings(max_examples=80, deadline=None)
@given(answers())
def test_the_ideal_list_has_ndcg_one(case):
    _, sets = case
    k = max(1, max(len(s) for s in sets))
    best = np.array([sorted(s) + [-1]*(k - len(s)) for s in sets], np.int32).reshape(len(sets), k)
    for cut in (1, k):
        got = M.evaluate(best, csr(sets), cutoffs=(cut,))[f"ndcg@{cut}"]
        assert all(math.isnan(v) if not s else abs(v - 1) < 1e-12 for v, s in zip(got, sets))


@settings(max_examples=100, deadline=None)
@given(answers(), st.data())
def test_spread_novelty_and_diversity_are_what_brute_force_says(case, data):
    lists, sets = case
    n_items, levels, k = 12, 3, data.draw(st.integers(1, lists.shape[1]))
    r = np.random.default_rng(data.draw(st.integers(0, 99)))
    depth = r.integers(0, levels + 1, n_items)
    cats = np.where(np.arange(levels) < depth[:, None], r.integers(0, 2, (n_items, levels)), -1)
    share = r.random(n_items)*.9 + .1
    got = M.evaluate(lists, csr(sets), (k,), share=share, categories=cats)
    shown = [i for l in lists for i in l[:k] if i >= 0]
    count = [shown.count(i) for i in range(n_items)]
    assert M.coverage(lists, n_items, k) == pytest.approx(len(set(shown))/n_items)
    if shown: # mean absolute difference over all pairs, over twice the mean
        pairs = sum(abs(a - b) for a in count for b in count)
        assert M.gini(lists, n_items, k) == pytest.approx(pairs/(2*n_items*sum(count)), abs=1e-12)
    else: assert math.isnan(M.gini(lists, n_items, k))
    for c, l in enumerate(lists):
        l = [i for i in l[:k] if i >= 0]
        np.testing.assert_allclose(got[f"novelty@{k}"][c], np.mean([-math.log2(share[i]) for i in l]) if l else np.nan)
        d = []
        for a in range(len(l)):
            for b in range(a):
                p, q = ([x for x in cats[l[z]] if x >= 0] for z in (a, b))
                same = 0
                while same < min(len(p), len(q)) and p[same] == q[same]: same += 1
                d.append(1 - same/max(len(p), len(q), 1))
        np.testing.assert_allclose(got[f"diversity@{k}"][c], np.mean(d) if d else np.nan)


@settings(max_examples=80, deadline=None)
@given(answers(), st.data())
def test_restriction_partitions_the_targets(case, data):
    _, sets = case
    t = csr(sets)
    users = np.array([data.draw(st.integers(-1, 4)) for _ in sets])
    seen = [data.draw(st.sets(st.integers(0, 11), max_size=8)) for _ in range(3)] # users 3, 4 and -1 are unknown
    again = M.seen_before(t, users, csr(seen))
    old, new = M.restrict(t, again), M.restrict(t, ~again)
    for c, s in enumerate(sets):
        known = seen[users[c]] if 0 <= users[c] < 3 else set()
        assert set(old.items[old.indptr[c]:old.indptr[c + 1]]) == s & known
        assert set(new.items[new.indptr[c]:new.indptr[c + 1]]) == s - known


# ---------------------------------------------------------------- metrics: by hand, and what is refused
def test_known_values():
    lists, t = np.array([[3, 1, 2], [4, 5, 6]], np.int32), csr([{1, 2, 9, 8}, {4}])
    e = M.evaluate(lists, t, (3,))
    assert e["recall@3"].tolist() == [.5, 1] and e["mrr@3"].tolist() == [.5, 1] and e["hit_rate@3"].tolist() == [1, 1]
    assert e["precision@3"] == pytest.approx([2/3, 1/3])
    assert e["ndcg@3"] == pytest.approx([(1/math.log2(3) + .5)/(1 + 1/math.log2(3) + .5), 1])
    assert M.buyer_share([0, 0, 1], [2, 2, 2], 4).tolist() == [.5, .5, 1, .5]


def test_cases_without_targets_are_left_out_of_the_mean():
    lists, t = np.array([[1], [2], [3]], np.int32), csr([{1}, set(), {9}])
    s = M.summarise(M.evaluate(lists, t, (1,)), samples=50)["recall@1"]
    assert s["value"] == .5 and s["cases"] == 2
    empty = M.summarise(M.evaluate(lists, csr([set()]*3), (1,)), samples=50)["recall@1"]
    assert math.isnan(empty["value"]) and math.isnan(empty["low"]) and empty["cases"] == 0


def test_padding_is_never_a_hit_and_no_cases_are_no_error():
    assert not M.hits(np.full((2, 3), -1, np.int32), csr([{0}, set()])).any()
    e = M.evaluate(np.zeros((0, 5), np.int32), csr([]), (5,))
    assert e["ndcg@5"].shape == (0,) and M.summarise(e, samples=10)["ndcg@5"]["cases"] == 0


@pytest.mark.parametrize("lists, why", [([[1, 2, 1]], "list 0 holds item 1 twice"), ([[0, 1], [-1, 3]], "list 1 has padding before"), ([1, 2], "array")])
def test_unsound_lists_are_refused(lists, why):
    with pytest.raises(RecsysError, match=why): M.hits(np.array(lists, np.int32), csr([{1}]*len(lists)))


def test_what_does_not_fit_is_refused():
    t = csr([{1}])
    with pytest.raises(RecsysError, match="same target twice"): M.Targets(np.array([0, 2]), np.array([3, 3]))
    with pytest.raises(RecsysError, match="indptr"): M.Targets(np.array([0, 2]), np.array([3]))
    with pytest.raises(RecsysError, match="2 lists, 1 cases"): M.hits(np.array([[1], [2]]), t)
    with pytest.raises(RecsysError, match="cutoff 5"): M.evaluate(np.array([[1, 2]]), t, (5,))
    with pytest.raises(RecsysError, match="outside the catalogue"): M.coverage(np.array([[7]]), 5, 1)
    with pytest.raises(RecsysError, match="marks"): M.restrict(t, np.array([True, False]))
    with pytest.raises(RecsysError, match="outside 0"): M.targets_of([3], [1], 2)
    with pytest.raises(RecsysError, match="negative"): M.targets_of([0], [-1], 2)


# ---------------------------------------------------------------- intervals
def test_interval_covers_the_truth_about_as_often_as_it_says():
    r, inside = np.random.default_rng(0), 0
    for s in range(300):
        b = M.bootstrap(r.normal(1, 2, 100), samples=300, seed=s)
        inside += b.low <= 1 <= b.high
    assert .90 <= inside/300 <= .985 # 95 % nominal; 3 standard errors are .038


def test_interval_matches_normal_theory_and_explicit_resampling():
    x = np.random.default_rng(1).normal(0, 1, 900)
    b = M.bootstrap(x, samples=4000)
    assert b.value == pytest.approx(x.mean())
    assert (b.high - b.low) == pytest.approx(2*1.96*x.std()/30, rel=.06)
    who = np.random.default_rng(2).integers(0, 60, 900)
    r, reps = np.random.default_rng(3), []
    for _ in range(2000): reps.append(np.concatenate([x[who == c] + (who[who == c] > 30) for c in r.integers(0, 60, 60)]).mean())
    got = M.bootstrap(x + (who > 30), clusters=who, samples=4000)
    assert (got.high - got.low) == pytest.approx(np.subtract(*np.quantile(reps, [.975, .025])), rel=.08)


def test_clusters_widen_the_interval_and_singletons_do_not_matter():
    base = np.random.default_rng(4).normal(0, 1, 100)
    x, who = np.repeat(base, 9), np.repeat(np.arange(100), 9)
    width = lambda b: b.high - b.low
    assert width(M.bootstrap(x, who)) == pytest.approx(3*width(M.bootstrap(x)), rel=.15)
    assert M.bootstrap(base, np.arange(100)) == M.bootstrap(base)
    assert M.bootstrap(x, who) == M.bootstrap(x, who) != M.bootstrap(x, who, seed=1)


def test_summary_agrees_with_the_single_bootstrap():
    r = np.random.default_rng(5)
    per_case = dict(a=r.random(40), b=np.where(r.random(40) < .3, np.nan, r.random(40)))
    who = r.integers(0, 15, 40)
    s = M.summarise(per_case, who, samples=300, seed=7)
    for m, v in per_case.items():
        one = M.bootstrap(v, who, samples=300, seed=7)
        assert (s[m]["value"], s[m]["low"], s[m]["high"]) == pytest.approx(tuple(one))
        assert s[m]["value"] == pytest.approx(np.nanmean(v)) and s[m]["cases"] == (~np.isnan(v)).sum()


def test_paired_bootstrap_sign_and_p():
    r = np.random.default_rng(6)
    a = r.random(300)
    better, worse = M.paired_bootstrap(a + .05 + r.normal(0, .1, 300), a), M.paired_bootstrap(a - .05 + r.normal(0, .1, 300), a)
    assert better.difference > 0 and better.low > 0 and better.p < .01
    assert worse.difference < 0 and worse.high < 0 and worse.p < .01
    assert M.paired_bootstrap(a, a) == (0, 0, 0, 1)
    holes = a.copy(); holes[:100] = np.nan
    assert M.paired_bootstrap(holes, a - .1).difference == pytest.approx(.1)


def test_paired_bootstrap_does_not_cry_wolf():
    r, alarms = np.random.default_rng(7), 0
    for s in range(300): alarms += M.paired_bootstrap(r.normal(0, 1, 80), r.normal(0, 1, 80), samples=300, seed=s).p <= .05
    assert alarms/300 <= .095 # 5 % nominal, a little more at 80 cases


# ---------------------------------------------------------------- baselines
N_USERS, N_ITEMS = 25, 40
FITS = dict(popularity=B.fit_popularity, personal=B.fit_personal, item_knn=B.fit_item_knn, cart_blend=B.fit_cart_blend,
            als=lambda *a, **k: B.fit_als(*a, factors=8, iterations=4, **k))


@pytest.fixture(scope="module")
def lines():
    "Purchases of 24 users (the last code never occurs) of 35 items (the last five never sell)."
    r = np.random.default_rng(8)
    n = 900
    users, items = r.integers(0, 24, n), np.minimum(r.geometric(.08, n) - 1, 34)
    return users.astype(np.int32), items.astype(np.int32), (1_500_000_000 + r.integers(0, 120, n)*DAY).astype(float)


@pytest.fixture(scope="module")
def models(lines):
    with warnings.catch_warnings():
        warnings.simplefilter("error") # among others the BLAS warning of implicit
        return {name: f(*lines, N_USERS, N_ITEMS) for name, f in FITS.items()}


@pytest.fixture(scope="module")
def cases():
    "Users, two of them unknown, and carts of 0 to 6 items."
    r = np.random.default_rng(9)
    carts = [r.choice(N_ITEMS, r.integers(0, 7), replace=False) for _ in range(60)]
    users = r.integers(0, N_USERS, 60); users[:2] = -1, 99
    return users.astype(np.int32), (np.r_[0, np.cumsum([len(c) for c in carts])], np.concatenate(carts).astype(np.int32)), carts


@pytest.mark.parametrize("name", FITS)
def test_lists_are_sound_full_and_without_the_cart(name, models, cases):
    users, carts, held = cases
    for k in (1, 10, N_ITEMS + 7):
        lists = models[name].recommend(users, carts, k)
        assert lists.shape == (60, k) and lists.dtype == np.int32
        M.check_lists(lists)
        for l, c in zip(lists, held):
            assert not set(l) & set(c) and (l >= 0).sum() == min(k, N_ITEMS - len(c)) # padded only where the catalogue ends
    assert np.array_equal(models[name].recommend(users, carts, 10, block=7), models[name].recommend(users, M.Targets(*carts), 10))
    assert models[name].recommend(np.zeros(0, np.int32), None, 5).shape == (0, 5)


@pytest.mark.parametrize("name", FITS)
def test_newcomers_without_a_cart_see_what_is_popular(name, models):
    lists = models[name].recommend(np.array([-1, 24, 99]), None, 12)
    assert (lists == models["popularity"].order[:12]).all()


def test_popularity_counts_users_in_the_window(lines):
    users, items, ts = lines
    order = B.popularity_order(users, items, ts, N_ITEMS, window=20)
    late = ts > ts.max() - 20*DAY
    key = [(-len({u for u, i in zip(users[late], items[late]) if i == j}), -(items == j).sum(), j) for j in range(N_ITEMS)]
    assert order.tolist() == sorted(range(N_ITEMS), key=lambda j: key[j])


@pytest.mark.parametrize("half_life", [None, 30.])
def test_personal_frequency_is_what_brute_force_says(half_life, lines):
    users, items, ts = lines
    m = B.fit_personal(*lines, N_USERS, N_ITEMS, half_life=half_life)
    rank = {j: r for r, j in enumerate(m.order)}
    for u in range(24):
        def key(j):
            days = {t for a, i, t in zip(users, items, ts) if a == u and i == j} # a basket is a user's moment
            main = sum(.5**((ts.max() - t)/(half_life*DAY)) for t in days) if half_life else len(days)
            return -round(main, 9), -max(days) if half_life is None else 0, rank[j]
        own = sorted(set(items[users == u]), key=key)
        assert m.recommend([u], None, len(own))[0].tolist() == own


@pytest.mark.parametrize("by, half_life, alpha, shrink", [("basket", None, .5, 0), ("basket", 40., .5, 3), ("user", None, .5, 0), ("user", 40., .8, 2)])
def test_neighbours_are_the_dense_cosine(by, half_life, alpha, shrink, lines):
    users, items, ts = lines
    rows = sorted(set(zip(users, ts))) if by == "basket" else sorted(set(users))
    x, w = np.zeros((len(rows), N_ITEMS)), np.zeros(len(rows))
    at = {r: n for n, r in enumerate(rows)}
    for u, i, t in zip(*lines):
        n = at[u, t] if by == "basket" else at[u]
        x[n, i], w[n] = 1, max(w[n], B.decay(np.array([t, ts.max()]), half_life)[0])
    dot, n = x.T @ (w[:, None]*x), w @ x
    with np.errstate(invalid="ignore", divide="ignore"):
        want = np.nan_to_num(dot/(n[:, None]**alpha * n[None]**(1 - alpha) + shrink))
    np.fill_diagonal(want, 0)
    full = B._similar(*lines, N_ITEMS, by, N_ITEMS, alpha, shrink, half_life, None)
    np.testing.assert_allclose(full.toarray(), want, atol=1e-12)
    for r, row in enumerate(B._similar(*lines, N_ITEMS, by, 6, alpha, shrink, half_life, None).toarray()):
        assert (row > 0).sum() == min(6, (want[r] > 0).sum())
        np.testing.assert_allclose(np.sort(row)[-6:], np.sort(want[r])[-6:], atol=1e-12)
    x = B.basket_matrix(*lines, N_ITEMS)[0]
    one = np.ones(x.shape[0])
    assert abs(B.neighbours(x, one, per_block=50) - B.neighbours(x, one)).max() < 1e-12 # blocks change nothing


def test_knn_asks_the_cart_if_there_is_one_and_else_the_history(models, cases):
    users, carts, held = cases
    m = models["item_knn"]
    s, h = m.similar.toarray(), m.history.toarray()
    rank = np.argsort(m.order)
    for l, u, c in zip(m.recommend(users, carts, 10), users, held):
        hist = h[u] if 0 <= u < N_USERS else np.zeros(N_ITEMS)
        score = s[c].sum(0) if len(c) else hist @ s + m.self_weight*hist
        score[c] = -1
        assert l.tolist() == np.lexsort((rank, -score.round(9)))[:10].tolist()


def test_cart_blend_is_the_product_with_floors(models, cases):
    users, carts, held = cases
    m = models["cart_blend"]
    s, h = m.similar.toarray(), m.history.toarray()
    rank, unit = np.argsort(m.order), lambda v: v/v.max() if v.max() > 0 else v
    for l, u, c in zip(m.recommend(users, carts, 8), users, held):
        p, q = unit(h[u] if 0 <= u < N_USERS else np.zeros(N_ITEMS)), unit(s[c].sum(0))
        score = (p + m.habit_floor)*(q + m.cart_floor)
        score[c] = -1
        assert l.tolist() == np.lexsort((rank, -score.round(9)))[:8].tolist()
    none = np.arange(24)
    assert np.array_equal(m.recommend(none, None, 10), models["personal"].recommend(none, None, 10))


def test_als_ranks_by_the_exact_least_squares_user_vector(models, cases):
    users, carts, held = cases
    m, y = models["als"], models["als"].model.item_factors.astype(float)
    reg, gram = m.model.regularization*np.eye(y.shape[1]), y.T @ y
    for l, u, c in zip(m.recommend(users, carts, 5), users, held):
        conf = (m.history[u].toarray().ravel() if 0 <= u < N_USERS else np.zeros(N_ITEMS))
        conf[c] += m.cart_weight
        if not conf.any(): continue
        # Hu, Koren & Volinsky with confidence conf on bought items and 1 elsewhere: (Y'Y + Y'(C-1)Y + reg) x = Y'C p
        bought = conf > 0
        x = np.linalg.solve(gram + (y[bought].T*(conf[bought] - 1)) @ y[bought] + reg, y[bought].T @ conf[bought])
        score = y @ x
        score[c] = -np.inf
        np.testing.assert_allclose(score[l], np.sort(score)[::-1][:5], atol=1e-4*abs(score[np.isfinite(score)]).max())


def test_als_repeats_itself_on_any_number_of_threads(lines):
    one, two = (B.fit_als(*lines, N_USERS, N_ITEMS, factors=8, iterations=3, threads=t) for t in (1, 2))
    np.testing.assert_allclose(one.model.item_factors, two.model.item_factors, atol=1e-5)
    assert np.array_equal(one.recommend(np.arange(24)), two.recommend(np.arange(24)))


def test_order_numbers_separate_baskets_of_the_same_moment():
    users, items, ts = np.zeros(4, int), np.array([0, 1, 0, 0]), np.zeros(4)
    assert B.basket_matrix(users, items, ts, 2)[0].toarray().tolist() == [[1, 1]]
    assert B.basket_matrix(users, items, ts, 2, baskets=np.array([7, 8, 9, 9]))[0].toarray().tolist() == [[1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("users, items, ts, why", [
    ([0], [0, 1], [0.], "differ in length"), ([], [], [], "no purchases"), ([9], [0], [0.], "user code"), ([0], [-1], [0.], "item code"),
    ([0], [0], [np.nan], "no time")])
@pytest.mark.parametrize("name", FITS)
def test_purchases_that_do_not_fit_are_refused(name, users, items, ts, why):
    with pytest.raises(RecsysError, match=why): FITS[name](np.array(users, int), np.array(items, int), np.array(ts, float), 3, 3)


def test_carts_that_do_not_fit_are_refused(models):
    with pytest.raises(RecsysError, match="carts"): models["personal"].recommend([0, 1], (np.array([0, 1]), np.array([3])), 5)
    with pytest.raises(RecsysError, match="unknown items"): models["personal"].recommend([0], (np.array([0, 1]), np.array([N_ITEMS])), 5)


def test_a_product_of_habit_and_cart_finds_what_neither_finds_alone():
    "Planted: two users with the same habits; item 2 goes with item 0, item 3 with item 1."
    users = np.repeat([0, 1], 40); times = np.repeat(np.arange(40), 2)*DAY
    items = np.tile([0, 2, 1, 3], 20)
    m = B.fit_cart_blend(users, items, times.astype(float), 2, 6)
    got = m.recommend([0, 0], (np.array([0, 1, 2]), np.array([0, 1])), 1)
    assert got.ravel().tolist() == [2, 3]
