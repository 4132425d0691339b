"Slices, families of comparisons, lists beyond accuracy, the time guard and the board: against loops, by simulation, and with planted leaks."
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st
from msgspec.structs import replace
from test_serving import N_ITEMS, N_USERS, tables

from recsys.core.settings import RecsysError, load_settings
from recsys.evaluation.beyond import coverage_interval, gini_interval, popularity_bought, popularity_shown, ratio
from recsys.evaluation.board import board
from recsys.evaluation.families import adjusted
from recsys.evaluation.metrics import coverage, gini, paired_bootstrap, targets_of
from recsys.evaluation.slices import Slice, by_category, by_device, by_novelty, by_user, head_of, judge_slices, newcomers_after
from recsys.features.point_in_time import PAIR
from recsys.operations.report import sortable, tame
from recsys.ranking.rows import Cases, Rows, make_cases
from recsys.candidates.blend import with_told
from recsys.ranking.time_guard import PROMOTED, OF_SESSIONS, STATIC, _AGED, check_cases, check_tables
from recsys.ranking.validation import load_validation, save_validation, top_lists

def small(**more):
    s = load_settings()
    return replace(s, evaluation=replace(s.evaluation, **dict(cutoffs=(2,), bootstrap_samples=200, min_cases=10) | more))

# ---- families

def correlated(seed: int, n=200, m=12): # half of each difference is the same for all
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (n, 1)) + rng.normal(0, 1, (n, m))

@pytest.mark.parametrize("make", [correlated, lambda s: np.random.default_rng(s).normal(0, 1, (200, 12))], ids=["correlated", "independent"])
def test_the_family_is_wrong_no_more_often_than_it_says(make):
    wrong = np.mean([min(adjusted(dict(enumerate(make(s).T)), samples=300, seed=s).values()) <= .05 for s in range(300)])
    assert wrong <= .05 + 3 * np.sqrt(.05 * .95 / 300), wrong

def test_true_differences_do_not_make_the_others_false():
    "Step-down with four true ones of twelve: false alarms among the other eight, and power above Holm's on the same p-values."
    false = ours = holm = 0
    for s in range(150):
        x = correlated(s + 1000); x[:, :4] += .27
        p = adjusted(dict(enumerate(x.T)), samples=300, seed=s)
        false += min(p[j] for j in range(4, 12)) <= .05; ours += sum(p[j] <= .05 for j in range(4))
        alone = np.array([paired_bootstrap(v, 0 * v, samples=300, seed=s).p for v in x.T]); order = np.argsort(alone)
        holm += (np.maximum.accumulate(alone[order] * np.arange(12, 0, -1)) <= .05)[np.argsort(order)][:4].sum()
    assert false / 150 <= .05 + 3 * np.sqrt(.05 * .95 / 150) and ours > 1.1 * holm

def test_edges_of_a_family():
    a = np.random.default_rng(0).normal(.5, 1, 80); hole = np.full(80, np.nan)
    p = adjusted(dict(a=a, same=0 * a, none=hole, sure=np.ones(80)), samples=200)
    assert p["same"] == 1 and np.isnan(p["none"]) and p["sure"] == 1 / 201 and p["a"] < .05 and adjusted({}) == {}
    one = adjusted(dict(a=a[:40] * .3), np.arange(40) // 2, samples=2000)["a"]
    assert one == pytest.approx(paired_bootstrap(a[:40] * .3, np.zeros(40), np.arange(40) // 2, 2000).p, abs=.05)
    with pytest.raises(RecsysError, match="different cases"): adjusted(dict(a=a, b=a[:5]))

# ---- beyond accuracy

def test_intervals_of_coverage_and_gini_hold_what_other_users_would_show():
    w = 1 / np.arange(1, 301); w /= w.sum(); rng = np.random.default_rng(0)
    draw = lambda: np.stack([rng.choice(300, 4, replace=False, p=w) for _ in range(80)]).astype(np.int32)
    many = [draw() for _ in range(150)]
    for figure, interval in ((coverage, coverage_interval), (gini, gini_interval)):
        truth = np.mean([figure(l, 300, 4) for l in many])
        inside = np.mean([i.low <= truth <= i.high for i in (interval(l, 300, 4, np.arange(80)) for l in many)])
        assert inside >= .88, (figure.__name__, inside)

def test_coverage_by_leaving_each_user_out():
    rng = np.random.default_rng(1); lists, who = np.stack([rng.permutation(30)[:3] for _ in range(20)]).astype(np.int32), np.arange(20) // 2
    moves = np.array([coverage(lists[who != u], 30, 3) for u in range(10)])
    far = 1.959964 * np.sqrt(.9 * ((moves - moves.mean())**2).sum())
    got = coverage_interval(lists, 30, 3, who)
    assert got.high == pytest.approx(min(1, got.value + far), abs=1e-6) and got.low == pytest.approx(got.value - far, abs=1e-6)

def test_the_lift_is_that_of_loops():
    rng = np.random.default_rng(2); share, lists = rng.random(20), np.stack([rng.permutation(20)[:4] for _ in range(30)])
    history = targets_of(np.repeat(np.arange(9), 3), np.concatenate([rng.permutation(20)[:3] for _ in range(9)]), 10); users = np.arange(30) % 11 - (np.arange(30) == 5)
    shown, own = popularity_shown(lists, share, 3), popularity_bought(users, history, share)
    want = [(share[l[:3]].mean(), share[history.items[history.indptr[u]:history.indptr[u + 1]]].mean()) for l, u in zip(lists, users) if 0 <= u < 9]
    assert ratio(shown, own, users).value == pytest.approx(np.mean([a for a, _ in want]) / np.mean([b for _, b in want]))

# ---- slices

@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.floats(.05, .95))
def test_the_head_is_the_fewest_that_hold_their_share(items, share):
    head, n = head_of(np.array(items), 12, share), np.bincount(items, minlength=12)
    assert n[head].sum() >= share * len(items) * (1 - 1e-9) and n[head].sum() - n[head].min() < share * len(items) and n[head].min() >= n[~head].max()

def test_slices_divide_the_targets():
    t = targets_of([0, 0, 1, 2], [1, 3, 2, 3], 3)
    parts = (by_user(t, np.array([0, 1, 2]), np.array([0, 3, 4]), 3), by_novelty(t, np.array([0, 5 * 86400, 9 * 86400 + 1, 2**62]), 10 * 86400, 1), by_category(t, pl.Series(["A > B", None, "C", "A"])))
    for some in parts: assert (np.sum([s.keep for s in some], 0) == 1).all()
    assert [s.keep.tolist() for s in parts[0]] == [[True, True, False, False], [False, False, True, False], [False, False, False, True]]
    assert parts[1][0].keep.tolist() == [False, True, True, True]
    lines = pl.DataFrame(dict(user=[0, 0, 1], item=[1, 3, 2], session=[1, 2, 3], ts=[5, 9, 6], known=[5, 9, 6]))
    devices = pl.DataFrame(dict(user=[0, 0], ts=[5, 9], device=["phone", "desktop"]))
    assert [(s.name, s.keep.tolist()) for s in by_device(t, np.array([0, 1, 2]), lines, devices, 4, 10)] == [("phone", [True, True, False, False])]

def test_newcomers_are_those_whom_nobody_knew():
    lines = pl.DataFrame(dict(user=[0, 0, 1, 2, 2], item=[1, 2, 3, 4, 5], session=[0, 1, 2, 3, 4], ts=[1, 12, 13, 14, 15], known=[1, 12, 13, 14, 15]))
    new = newcomers_after(lines, 10, 20, 0)
    assert new.user.tolist() == [1, 2] and new.target.tolist() == [3, 4] and not len(newcomers_after(lines.head(2), 10, 20, 0).user)

def test_a_small_slice_has_a_size_and_no_figure():
    rng = np.random.default_rng(0); wanted = targets_of(np.arange(100), rng.integers(0, 5, 100), 100)
    ours, other = np.stack([wanted.items, wanted.items + 5], 1), np.tile([0, 7], (100, 1))
    rows = judge_slices(ours, other, wanted, np.arange(100), [Slice("x", "all", np.ones(100, bool)), Slice("x", "few", np.arange(100) < 9)], small())
    assert rows[1] == dict(kind="x", name="few", cases=9) and rows[0]["ours"]["value"] == 1 and rows[0]["p_adjusted"] < .01
    want = paired_bootstrap(np.ones(100), (wanted.items == 0).astype(float), np.arange(100), 200, small().run.seed)
    assert (rows[0]["difference"], rows[0]["low"], rows[0]["high"]) == pytest.approx(want[:3])

# ---- the time guard

MOMENT = 1_000_000

@pytest.fixture(scope="module")
def honest():
    "Random tables of a shop in which items from 50 on and users from 15 on come after the moment, with the lines that they stand for."
    t = tables(); f = t._asdict()
    strange = lambda ids: np.where(ids >= 50, -1, ids)
    for n in ("together_ids", "follow_ids", "cart_ids", "user_near", "segment_items"): f[n] = strange(f[n])
    for n in ("together_ids", "together_scores", "follow_ids", "follow_scores", "cart_ids", "cart_scores", "vector_in", "vector_out", "item_x"): f[n] = f[n].copy(); f[n][50:] = f[n][55]
    for n in ("user_x", "user_vector", "user_near"): f[n] = f[n].copy(); f[n][15:] = f[n][16]
    f |= dict(user_factor=np.zeros((N_USERS, 3), np.float32), item_factor=np.zeros((N_ITEMS, 3), np.float32), user_close=f["user_near"].copy(), trending=np.array([4, 2, -1], np.int32), past_item=np.array([1, 2, 3], np.int32), complement_ids=f["cart_ids"], complement_scores=f["cart_scores"])
    f["user_close"][15:] = -1
    f["segment"] = np.where(np.arange(N_USERS) < 15, f["segment"], 0)
    for n in ("together_ids", "follow_ids", "cart_ids"): f[n][50:] = -1
    f["user_near"][15:] = -1
    f["item_x"][50:, _AGED] = -1
    pairs = [(u, i) for u in range(15) for i in range(u % 5 + 1)]
    ptr = lambda upto: np.cumsum([0, *(upto(u) if u < 15 else 0 for u in range(N_USERS))])
    key, x = np.array([i for _, i in pairs], np.int32), np.ones((len(pairs), len(PAIR)), np.float32)
    for n in ("bought", "kind", "department"): f |= {f"{n}_ptr": ptr(lambda u: u % 5 + 1), f"{n}_key": key, f"{n}_x": x}
    f |= dict(recent_ptr=f["bought_ptr"], recent_key=key, user_lines=np.diff(f["bought_ptr"]).astype(np.float32))
    before = pairs + [(0, i) for i in range(1, 50)]; kind = ["purchase"] * len(pairs) + ["view"] * 49
    after = [(15 + i % 5, 50 + i % 10) for i in range(10)] + [(3, 40)]
    lines = pl.DataFrame(dict(user=[u for u, _ in before + after], item=[i for _, i in before + after], type=kind + ["purchase"] * len(after), known=[MOMENT - 5] * len(before) + [MOMENT] * len(after)))
    return with_told(type(t)(**f), 9), lines.with_columns(ts="known")

def test_honest_tables_pass_and_the_witnesses_are_counted(honest):
    said = check_tables(*honest, MOMENT, "purchase", "day 1")
    assert said == dict(items=10, users=5, lines=int(sum(honest[0].user_lines)), arrays=len(honest[0]) - len(STATIC) - len(OF_SESSIONS))

def planted(state, name):
    "`state` with a trace of the future in one array."
    a = np.array(getattr(state, name))
    if name.endswith(("_ids", "user_near", "user_close", "segment_items")) and name != "user_alike_ids": a[2, 0] = 57
    elif name in ("trending", "past_item"): a[0] = 57
    elif name in ("bought_key", "recent_key"): a[0] = 40
    elif name in ("bought_x", "kind_x", "department_x"): a[1, PAIR.index("last")] = -.5
    elif name == "user_lines": a[3] += 1
    elif name == "segment" or name.startswith("user"): a[17] = a[17] + 1
    elif name.endswith("_ptr"): a[18:] += 1
    else: a[52] = a[52] + 1
    return state._replace(**{name: a})

@pytest.mark.parametrize("name", [n for n in tables()._fields if n not in (*STATIC, *OF_SESSIONS, "kind_key", "department_key")])
def test_a_leak_in_any_array_is_named(honest, name):
    state, lines = honest
    leaky = planted(state, name)
    if name in ("bought_ptr", "recent_ptr"): leaky = leaky._replace(**{name.replace("ptr", "key"): np.append(getattr(state, name.replace("ptr", "key")), 1)})
    with pytest.raises(RecsysError, match=name.replace("_", ".")): check_tables(leaky, lines, MOMENT, "purchase", "day 1")

def test_every_column_of_item_features_but_the_calendar_s_is_looked_at(honest):
    state, lines = honest
    for j in range(state.item_x.shape[1]):
        x = state.item_x.copy(); x[52, j] += 1
        if j in PROMOTED: check_tables(state._replace(item_x=x), lines, MOMENT, "purchase", "day 1"); continue
        with pytest.raises(RecsysError, match="item_x knows the future"): check_tables(state._replace(item_x=x), lines, MOMENT, "purchase", "day 1")

def test_a_case_with_an_outcome_from_elsewhere_is_refused():
    lines = pl.DataFrame(dict(user=[0, 0, 0, 1], item=[1, 2, 3, 3], ts=[9, 10, 19, 20]))
    cases = make_cases(np.array([0]), [np.array([2, 3])], 0)
    check_cases(cases, lines, 10, 20, "day")
    for start, end in ((11, 20), (10, 19)):
        with pytest.raises(RecsysError, match="outside the window"): check_cases(cases, lines, start, end, "day")

# ---- held-out lists, board, page

@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 99))
def test_top_lists_are_those_of_sorting(sizes, k, seed):
    rng = np.random.default_rng(seed); n = sum(sizes)
    ids, score = np.concatenate([np.zeros(0, int), *(rng.permutation(20)[:s] for s in sizes)]).astype(np.int32), rng.integers(0, 3, n).astype(float)
    got = top_lists(Rows(np.zeros((n, 1)), np.zeros(n), np.array(sizes), ids, np.arange(len(sizes))), score, len(sizes) + 1, k)
    for c, (a, b) in enumerate(zip(np.cumsum([0, *sizes]), np.cumsum(sizes))):
        want = [int(ids[j]) for j in sorted(range(a, b), key=lambda j: (-score[j], j))][:k]
        assert got[c].tolist() == want + [-1] * (k - len(want))
    assert (got[-1] == -1).all()

def test_the_board_asks_for_what_was_bought(tmp_path):
    cases = make_cases(np.arange(40), [np.array([u % 4, 4 + u % 3]) if u % 5 else np.zeros(0, int) for u in range(40)], 0, [(np.array([9]), np.array([1.]))] * 40)
    rng = np.random.default_rng(0)
    lists = np.stack([rng.permutation(8)[:2] for _ in cases.user]).astype(np.int32)
    save_validation(tmp_path/"v", cases, lists); kept, ours = load_validation(tmp_path/"v")
    assert 9 not in kept.target and set(kept.user) == {u for u in range(40) if u % 5} and len(ours) == len(kept.user) == 64
    perfect = np.stack([np.pad(kept.target[a:b][:2], (0, 2 - min(2, b - a)), constant_values=-1) for a, b in zip(kept.target_ptr, kept.target_ptr[1:])])
    said = board(perfect, {"random": ours}, Cases(*kept[:6]), small())
    for q in said.values(): assert q["metrics"]["ndcg@2"]["value"] == 1 and q["against"]["random"]["low"] > 0 and q["against"]["random"]["p_adjusted"] < .01
    with pytest.raises(RecsysError, match="train again"): load_validation(tmp_path/"nothing")

def test_a_table_that_sorts_survives_the_page():
    html = sortable(pl.DataFrame(dict(name=["b", "<a>"], value=[.1, None])), "Some", "t").html
    assert tame(html).replace("'", '"') == html.replace("'", '"') and "&lt;a&gt;" in html and "<script" not in html
    assert html.count('href="#t-') == 2 and '--t-0:1;--t-1:0' in html and '--t-0:0;--t-1:1' in html
