"SHAP values of random models against LightGBM's own, the shap package, and the definition of the Shapley value."
from itertools import combinations
from math import factorial

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.monitoring import shap as sh


def rows_of(rng, n, features, kind):
    "Numbers, few distinct numbers or many zeros, with missing values; the last column is a category."
    x = rng.normal(size=(n, features))
    if kind == "steps": x = np.round(x, 0)
    if kind == "zeros": x[rng.random(x.shape) < .5] = 0
    x[rng.random(x.shape) < .1] = np.nan
    x[:, -1] = rng.integers(0, 70, n)
    return x


def trained(rng, x, leaves, rounds, **plan):
    y = np.nan_to_num(x) @ rng.normal(size=x.shape[1]) + np.nan_to_num(x[:, 0] * x[:, 1]) * 2 + (x[:, -1] % 5 == 1)
    plan = dict(objective="regression", num_leaves=leaves, verbose=-1, num_threads=1, min_data_in_leaf=2, max_cat_to_onehot=4, seed=1) | plan
    return lgb.train(plan, lgb.Dataset(x, y + rng.normal(size=len(x)) * .1, categorical_feature=[x.shape[1] - 1]), rounds)


def same(model, rows):
    "The kernel's values are LightGBM's, to 1e-10 of their size."
    found, oracle = sh.walked_shap(sh.walks_of(model.model_to_string()), rows), model.predict(rows, pred_contrib=True)
    assert np.abs(found - oracle).max(initial=0) <= 1e-10 * max(1, np.abs(oracle).max(initial=0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 60), st.integers(1, 12), st.sampled_from(["numbers", "steps", "zeros"]),
       st.booleans(), st.booleans(), st.integers(1, 700))
@example(0, 3, 31, 5, "zeros", True, True, 300)
def test_random_models(seed, features, leaves, rounds, kind, zero_as_missing, use_missing, n):
    "Rows may hold what training never saw: infinities, tiny numbers, unknown, negative, huge and missing categories."
    rng = np.random.default_rng(seed)
    model = trained(rng, rows_of(rng, 400, features, kind), leaves, rounds, zero_as_missing=zero_as_missing, use_missing=use_missing)
    rows = rows_of(rng, n, features, kind)
    rows[:, -1] = rng.choice([0, 1, 5, 63, 64, 69, 70, 1000, -1, -.5, 2.7, np.nan], n)
    rows[rng.random(rows.shape) < .02] = rng.choice([np.inf, 1e-36, -1e-36, 1e300])
    rows[:, -1] = np.where(np.abs(rows[:, -1]) > 1e9, 3, rows[:, -1])   # in C++ such a category is undefined
    same(model, rows)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-4, .9999), min_size=1, max_size=7), st.floats(-5, 5))
def test_leaves_pay_the_shapley_value(shares, value):
    "By the definition over all sets of known features; with and without a table."
    z, d = np.array(shares), len(shares)
    bits = np.arange(1 << d, dtype=np.uint32)
    table, looked, integrated = np.zeros(1 << d), np.zeros((d, 1 << d)), np.zeros((d, 1 << d))
    sh.fill_table(z, value, *sh.quadrature(d), np.zeros(1 << d), table)
    sh._look_up(bits, len(bits), table, z, np.arange(d), looked, 0)
    sh._integrate(bits, len(bits), value, z, np.arange(d), *sh.quadrature(d), integrated, 0)
    def pays(known, u): return value * np.prod([(u >> j & 1) if j in known else z[j] for j in range(d)])
    for u in range(1 << d):
        for i in range(d):
            others = [j for j in range(d) if j != i]
            phi = sum(factorial(k) * factorial(d - 1 - k) / factorial(d) * (pays({*s, i}, u) - pays(set(s), u))
                      for k in range(d) for s in combinations(others, k))
            assert abs(looked[i, u] - phi) < 1e-11 and abs(integrated[i, u] - phi) < 1e-11


def test_long_paths_are_integrated():
    "Trees like chains, up to 24 distinct features on a path: no table holds them, and values stay exact."
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3000, 24))
    y = np.where((x > -1.2).all(1), 50., (x < -1.2).argmax(1) * 3.) + rng.normal(size=3000) * .1
    model = lgb.train(dict(objective="regression", num_leaves=80, verbose=-1, num_threads=1, min_data_in_leaf=1, learning_rate=.5), lgb.Dataset(x, y), 8)
    d = np.diff(sh.walks_of(model.model_to_string()).leaves.ptr)
    assert d.max() > sh.table_features(d, 300) + 4
    same(model, rng.normal(size=(300, 24)))
    same(model, np.repeat(x[:1], 700, 0))


def test_tables_have_a_limit(monkeypatch):
    rng = np.random.default_rng(5)
    x = rows_of(rng, 600, 8, "numbers")
    model = trained(rng, x, 31, 5)
    for limit in (1, 300, 3000):
        monkeypatch.setattr(sh, "MOST_TABLES", limit)
        assert len(sh._tables(sh.walks_of(model.model_to_string()).leaves, 600)[0]) <= limit
        same(model, x)


def test_trees_it_does_not_know_go_to_lightgbm(monkeypatch):
    rng = np.random.default_rng(6)
    x = rows_of(rng, 600, 6, "numbers")
    model, close = trained(rng, x, 20, 6), lambda m: np.abs(sh.tree_shap(m, x) - m.predict(x, pred_contrib=True)).max() < 1e-10
    monkeypatch.setattr(sh, "MOST_FEATURES", 3)                       # some trees have longer paths, some not
    strange = sh.walks_of(model.model_to_string()).strange
    assert 0 < len(strange) <= 6 and close(model)
    monkeypatch.undo()
    text = model.model_to_string().split("Tree=3")
    head, rest = text[1].split("leaf_count=", 1)
    text[1] = head + "leaf_count=0" + rest[rest.index(" "):]          # a leaf without rows: nothing to divide by
    assert sh.walks_of("Tree=3".join(text)).strange == [3]
    forest = trained(rng, x, 20, 6, boosting="rf", bagging_fraction=.5, bagging_freq=1)
    assert close(forest)
    linear = lgb.train(dict(objective="regression", linear_tree=True, verbose=-1, num_threads=1), lgb.Dataset(np.nan_to_num(x), x[:, -1]), 3)
    assert len(sh.walks_of(linear.model_to_string()).strange) == 3


def test_the_best_iteration_counts_and_stumps_of_one_leaf():
    rng = np.random.default_rng(7)
    x = rows_of(rng, 600, 5, "numbers")
    model = trained(rng, x, 15, 9)
    model.best_iteration = 4
    assert np.abs(sh.tree_shap(model, x) - model.predict(x, pred_contrib=True)).max() < 1e-10
    constant = lgb.train(dict(objective="regression", verbose=-1), lgb.Dataset(x, np.full(600, 3.)), 3)
    assert np.abs(sh.tree_shap(constant, x) - constant.predict(x, pred_contrib=True)).max() < 1e-10


def test_few_rows_no_rows_and_rows_that_do_not_fit():
    rng = np.random.default_rng(8)
    x = rows_of(rng, 600, 5, "numbers")
    model = trained(rng, x, 15, 9)
    for n in (0, 1, sh.FEW - 1, sh.FEW, 600):
        found = sh.tree_shap(model, x[:n].astype(np.float32))
        assert found.shape == (n, 6) and found.flags.c_contiguous
        if n: assert np.abs(found - model.predict(x[:n].astype(np.float32), pred_contrib=True)).max() < 1e-10
    assert (sh.shap_values(model, x) == sh.tree_shap(model, x)[:, :-1]).all()
    with pytest.raises(RecsysError, match="features"): sh.tree_shap(model, x[:, :3])
    several = lgb.train(dict(objective="multiclass", num_class=3, verbose=-1), lgb.Dataset(x, rng.integers(0, 3, 600)), 2)
    with pytest.raises(RecsysError, match="several outputs"): sh.tree_shap(several, x)


def test_the_shap_package_says_the_same():
    shap = pytest.importorskip("shap")
    rng = np.random.default_rng(9)
    x = rows_of(rng, 500, 6, "numbers")
    model = trained(rng, x, 20, 10)
    assert np.abs(shap.TreeExplainer(model).shap_values(x) - sh.shap_values(model, x)).max() < 1e-10


def test_the_benchmark_says_what_the_page_shows():
    said = sh.shap_bench(3000)
    assert said["shap_max_diff"] < 1e-10 and said["shap_ratio"] > 1 and said["shap_cpu_seconds"] < said["shap_native_cpu_seconds"]
