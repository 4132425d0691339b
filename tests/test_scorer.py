"The scorer gives LightGBM's scores to the last bit, also for values that lie exactly where a tree divides."
import lightgbm as lgb
import numpy as np
import pytest

from recsys.ranking.scorer import blocks_of, desk_for, item_words, score, trees_of

OWN, SHARED, COLUMNS = 3, 5, 8

def booster(**how):
    "Trees over float32 columns that have few ties, so that thresholds are numbers that no float32 holds."
    x = np.random.default_rng(0).standard_normal((3000, COLUMNS)).astype(np.float32)
    y = x[:, 0] * (x[:, 3] > 0) + np.sin(3 * x[:, 6]) + x[:, 7]
    return lgb.train(dict(objective="regression", verbose=-1, num_threads=1, seed=0, min_data_in_leaf=5) | how, lgb.Dataset(x, y), 25)

def edges(model) -> np.ndarray:
    "Rows whose every value is a threshold of its column, rounded, or the float next to that."
    rng, found = np.random.default_rng(1), [[0.] for _ in range(COLUMNS)]
    for tree in blocks_of(model.model_to_string())[1]:
        for column, t in zip(map(int, tree.get("split_feature", "").split()), map(float, tree.get("threshold", "").split())): found[column].append(t)
    x = np.stack([rng.choice(np.array(f, np.float64), 400) for f in found], 1).astype(np.float32)
    side = rng.integers(-1, 2, x.shape)
    return np.where(side == 0, x, np.nextafter(x, np.where(side < 0, -np.inf, np.inf).astype(np.float32)))

@pytest.mark.parametrize("leaves", (2, 7, 31, 32, 33, 64))
def test_scores_are_lightgbm_s_to_the_last_bit_on_the_very_edges(leaves):
    model = booster(num_leaves=leaves)
    trees, x = trees_of(model.model_to_string(), COLUMNS), edges(model)
    assert trees.start.dtype == (np.uint32 if trees.value.shape[1] <= 32 else np.uint64)
    for n in (1, 15, 16, 17, 400):
        rows, out = x[:n].copy(), np.full(n, np.nan)
        rows[:, OWN:SHARED] = rows[0, OWN:SHARED]
        ids = np.random.default_rng(2).permutation(n).astype(np.int32)   # any row may be any item
        items = np.empty((n, OWN), np.float32); items[ids] = rows[:, :OWN]
        rows[:, :OWN] = np.nan                                          # what the words stand for is not looked at
        score(trees, item_words(trees, items), desk_for(trees), ids, rows, n, OWN, SHARED, out)
        rows[:, :OWN] = items[ids]
        assert np.array_equal(out, model.predict(rows, num_threads=1))

def test_a_column_beyond_the_features_is_one():
    model = booster(num_leaves=31)
    trees, x, out = trees_of(model.model_to_string(), COLUMNS - 1), edges(model), np.zeros(400)
    x[:, OWN:SHARED] = x[0, OWN:SHARED]
    score(trees, item_words(trees, np.ascontiguousarray(x[:, :OWN])), desk_for(trees), np.arange(400, dtype=np.int32), np.ascontiguousarray(x[:, :-1]), 400, OWN, SHARED, out)
    x[:, -1] = 1
    assert np.array_equal(out, model.predict(x, num_threads=1))
