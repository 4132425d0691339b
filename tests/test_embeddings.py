"Item vectors of two versions: what a rotation does not move, what does, and what is said of it."
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from recsys.monitoring import embeddings as em
from recsys.monitoring.drift import Plan

PLAN = Plan(None, .01, 999, 0, dict(psi=.1, wasserstein=.04, share=.02, missing=.02, unseen=.01), 10, 400, 64)


def vectors(n=300, d=8, seed=0, noise=.2, first=0, version="v"):
    "Items of six kinds; `seed` turns them, `first` is the number of the first item."
    rng = np.random.default_rng(7)
    kind, base = rng.integers(0, 6, 2000), rng.normal(size=(6, d))[rng.integers(0, 6, 2000)] + .5 * rng.normal(size=(2000, d))
    rng, at = np.random.default_rng([seed, 1]), slice(first, first + n)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return em.Vectors([f"i{k}" for k in range(first, first + n)], ((base[at] + noise * rng.normal(size=(n, d))) @ turn).astype(np.float32), pl.DataFrame(dict(category=[f"k{k}" for k in kind[at]], price=rng.lognormal(size=n))), f"{version}{seed}")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(12, 120))
def test_a_rotation_is_no_drift(seed, d, n):
    "Neighbours, lengths, crowding, hubs and aligned cosines are those of the turned space."
    rng = np.random.default_rng(seed)
    a = em.Vectors([f"{k}" for k in range(n)], rng.normal(size=(n, d)).astype(np.float32), pl.DataFrame(dict(category=["x"] * n)))
    b = em.Vectors(a.ids, (a.x.astype(np.float64) @ np.linalg.qr(rng.normal(size=(d, d)))[0]).astype(np.float32), a.attributes)
    assert em.kept(a, b)["kept"].mean() > .98 and em.aligned(a.x, b.x).min() > 1 - 1e-5
    r, s = em.item_rows(a), em.item_rows(b)
    for c in ("length", "crowding", "hub"): assert r[c].to_numpy() == pytest.approx(s[c].to_numpy(), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 40), st.integers(3, 40))
def test_neighbours_kept_by_brute_force(seed, n, m):
    "Also where each version has items of its own."
    rng = np.random.default_rng(seed)
    a, b = (em.Vectors([f"{k}" for k in sorted(rng.choice(50, size, replace=False))], rng.normal(size=(size, 5)).astype(np.float32), pl.DataFrame({"price": np.zeros(size)})) for size in (n, m))
    both = [i for i in a.ids if i in b.ids]
    def near(v, i):
        u = {j: v.x[v.ids.index(j)] / np.linalg.norm(v.x[v.ids.index(j)]) for j in both}
        return set(sorted((j for j in both if j != i), key=lambda j: -float(u[j] @ u[i]))[:3])
    found = dict(em.kept(a, b, 3).iter_rows()) if len(both) > 1 else {}
    assert set(found) == (set(both) if len(both) > 1 else set())
    for i in found: assert found[i] == pytest.approx(len(near(a, i) & near(b, i)) / min(3, len(both) - 1))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_the_area_by_brute_force(rows):
    score, label = np.array([float(s) for s, _ in rows]), np.array([int(l) for _, l in rows])
    pairs = [(p > q) + .5 * (p == q) for p in score[label == 1] for q in score[label == 0]]
    assert np.isnan(em.area(score, label)[0]) if not pairs else em.area(score, label)[0] == pytest.approx(np.mean(pairs))


def test_ordinary_trainings_seldom_alarm_and_a_noisy_one_always():
    quiet = [em.embedding_drift([vectors(seed=10 * k + j) for j in range(4)], PLAN, .1)["alarm"] for k in range(12)]
    assert sum(quiet) <= 1
    assert all(em.embedding_drift([vectors(seed=10 * k + j) for j in range(3)] + [vectors(seed=10 * k + 5, noise=1.)], PLAN, .1)["alarm"] for k in range(3))


def test_what_gives_a_version_away_is_named():
    b = vectors(seed=4)
    dear = (b.attributes["price"] > 1.5).to_numpy()
    b.x[dear] *= 1.5
    found = em.embedding_drift([vectors(seed=2), vectors(seed=3), b], PLAN)
    t = found["classifier"]
    assert t["low"] > .6 and t["columns"][0]["name"] == "length" and "length" in found["sentence"] and not found["alarm"]  # neighbours are those of before
    assert next(c for c in found["comparison"]["columns"] if c["name"] == "length")["verdict"] == "material"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("how", [0, np.nan])
@pytest.mark.parametrize("share", [.1, .9, 1])
def test_vectors_that_vanish_of_items_that_are_still_there_alarm(how, share):
    *calm, b = (vectors(seed=k) for k in range(4))
    assert not em.embedding_drift([*calm, b], PLAN)["alarm"]
    b.x[:int(share * 300)] = how
    found = em.embedding_drift([*calm, b], PLAN)
    assert found["alarm"] and found["bare"]["value"] == pytest.approx(share) and f"{share:.0%} of the items that had a vector have none now" in found["sentence"]
    json.dumps(found, allow_nan=False)


def test_items_that_left_the_catalogue_or_usually_lose_theirs_do_not_alarm():
    assert not em.embedding_drift([vectors(seed=1), vectors(seed=2, first=100)], PLAN)["alarm"]        # a third of them is no longer sold
    versions = [vectors(seed=k) for k in range(5)]
    for k, v in enumerate(versions): v.x[20 * k:20 * (k + 1)] = 0                                    # each training leaves others out
    assert not em.embedding_drift(versions, PLAN)["alarm"]


@pytest.mark.parametrize("what", ["zeros", "nan", "few", "none", "other", "one kind", "new items", "other width"])
def test_odd_versions_get_a_sentence(what):
    a, b = vectors(seed=1), vectors(seed=2)
    if what == "zeros": b.x[:200] = 0
    if what == "nan": b.x[3, 2] = np.nan
    if what == "few": a, b = vectors(20, seed=1), vectors(20, seed=2)
    if what == "none": b = em.Vectors([], np.zeros((0, 8), np.float32), b.attributes.head(0))
    if what == "other": b = vectors(seed=2, first=1000)
    if what == "one kind": a.x[:], b.x[:] = 1, 1
    if what == "new items": b = vectors(seed=2, first=100)
    if what == "other width": b.x = b.x[:, :5]
    found = em.embedding_drift([a, b], PLAN)
    assert found["sentence"].endswith(".") and (found["comparison"] is None) == (what in ("few", "none", "other"))
    if what == "new items": assert (found["items"], found["classifier"]["auc"] < .75) == (dict(both=200, new=100, gone=100), True)
    json.dumps(found, allow_nan=False)
