"The gate's own judgement: how often it is wrong, and that no fault of a list gets past it. What it says of a whole run stands in test_run."
import re, shutil
from itertools import cycle

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, strategies as st

from recsys.candidates.blend import load_state
from recsys.core.files import read_json
from recsys.core.settings import load_settings
from recsys.evaluation.metrics import Targets, hits, ndcg
from recsys.evaluation.protocol import Survey, _cases_of
from recsys.features.build import day_of, read_moments
from recsys.operations.gate import Check, accepted, case_losses, compare, difference_check, faults_of, list_checks, rule_check, slice_check, verdict_of
from recsys.operations.alerts import listing
from recsys.operations.cycle import _tell_gate
from recsys.operations.publish import publish as publish_steps, release, still_judged
from recsys.operations.registry import serving
from recsys.ranking.ranker import POSITION, load_ranker
from recsys.ranking.rows import Cases
from recsys.ranking.rules import Rules
from recsys.serving.bundle import open_bundle
from recsys.serving.dry_run import sample_requests
from recsys.serving.engine import Engine, Request, rank_cases, recommend
from shop import ROOT
from test_serving import BUDGET, PER_SOURCE, publish

SETTINGS = load_settings(ROOT/"settings.ini")
FEW = msgspec.structs.replace(SETTINGS, evaluation=msgspec.structs.replace(SETTINGS.evaluation, bootstrap_samples=400))
shares = st.floats(-1, 1)

@given(value=shares, up=st.floats(0, 1), better=st.floats(0, 1), margin=st.floats(0, .5))
def test_a_better_version_is_never_refused_where_a_worse_one_passes(value, up, better, margin):
    if accepted(value, value + up, margin): assert accepted(value + better, value + better + up, margin)
    assert accepted(max(value, 0), max(value, 0) + up, margin) and accepted(value, value + up, 1) | (value == -1)

def refused(loss: float, cases: int, times: int, spread: float = .15) -> float:
    "Share of gates that refuse a version whose figure is lower by `loss`; both rankers err a little, each in its own way."
    rng, out = np.random.default_rng(0), []
    for _ in range(times):
        champion = np.clip(rng.normal(.5, .25, cases), 0, 1)
        ours = champion * (1 - loss) + rng.normal(0, spread, cases)
        out.append(not difference_check("x", ours, champion, np.arange(cases), .02, FEW).passed)
    return float(np.mean(out))

def test_how_often_it_refuses(tmp_path):
    "As good: one time in forty, of which chance may make .055 in so few trials; clearly worse: always; a little worse in a small shop: rarely."
    assert refused(0, 200, 300) <= .055 and refused(0, 2000, 100) <= .05
    assert refused(.1, 2000, 40) == 1 and refused(.3, 200, 40) == 1
    assert refused(.02, 100, 100) <= .3

def surveyed(rng, n, good):
    "Made-up answers for n cases with one target each, at a random place if not `good`."
    lists = np.stack([rng.permutation(50)[:20] for _ in range(n)]).astype(np.int32)
    target = lists[np.arange(n), rng.geometric(.4, n).clip(1, 20) - 1]
    return lists, Cases(np.arange(n, dtype=np.int32), np.zeros(n + 1, int), np.zeros(0, np.int32), np.arange(n + 1), target, np.arange(n) % 2 == 0)

def test_lists_and_probabilities_are_judged_apart():
    rng = np.random.default_rng(0)
    lists, cases = surveyed(rng, 400, True)
    bought, case = (lists == cases.target[:, None]).ravel(), np.repeat(np.arange(400), 20)
    true = np.tile(np.r_[.4 * .6 ** np.arange(20)], 400)
    fair = Survey(lists, {}, {}, case, true, bought)
    assert np.allclose(case_losses(fair, 400)[7], -np.log(np.where(bought, true, 1 - true))[140:160].mean())
    failed = lambda s: {c.name.split(": ")[1] for c in list_checks(s, fair, cases, FEW) if not c.passed}
    assert failed(fair) == set() and failed(fair._replace(probability=np.minimum(true * 3, .99))) == {"probabilities"}
    assert failed(fair._replace(lists=lists[:, ::-1].copy())) == {f"NDCG@{FEW.evaluation.cutoffs[0]}"}
    assert len(list_checks(fair, fair, cases, FEW, curves=False)) == 2 and list_checks(fair, fair, surveyed(rng, 40, True)[1], FEW) == [] # too few to tell

@given(st.lists(st.tuples(shares, st.floats(0, .3), st.floats(0, 1), st.booleans()), max_size=8))
def test_a_slice_fails_only_for_a_certain_and_large_loss(rows):
    told = [dict(kind="k", name=str(n), cases=99, difference=d, low=d - w, high=d + w, p_adjusted=p) | (dict(ours=dict(value=1 + d), other=dict(value=1.)) if enough else {}) for n, (d, w, p, enough) in enumerate(rows)]
    c = slice_check("next_basket", told, .1)
    assert c.passed == (not [1 for d, w, p, enough in rows if enough and d <= -.1 and d + w < 0 and p < .05])

@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    b = open_bundle(publish(tmp_path_factory.mktemp("gate")))
    e = Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b)
    e.use(msgspec.convert(dict(block=[dict(name="a", items=["i1", "i2"]), dict(name="home only", items=["i5"], placements=["home"])]), Rules))
    return e

def test_no_fault_of_a_list_gets_past(engine):
    request = Request(user_id="u3", cart=["i4"], exclude=["i7"])
    good = recommend(engine, request, "r")
    assert faults_of(engine, request, good) == []
    gone, ids = f"i{np.flatnonzero(np.asarray(engine.state.sellable) == 0)[0]}", [s.item_id for s in good.items]
    change = lambda k, **new: msgspec.structs.replace(good, items=[msgspec.structs.replace(s, **new) if n == k else s for n, s in enumerate(good.items)])
    for answer, said in ((change(2, item_id=ids[0]), "an item twice"), (change(0, item_id="i4"), "an item that the cart holds"), (change(0, item_id="i7"), "an item that the cart holds"),
                         (change(1, item_id=gone), "an item that is not for sale"), (change(0, item_id="i2"), "an item that a rule blocks"), (change(3, score=float("nan")), "a score that is no number"),
                         (msgspec.structs.replace(good, items=[]), "an empty list")):
        assert said in faults_of(engine, request, answer), said
    at_home = msgspec.structs.replace(request, placement="home")
    five = change(0, item_id="i5")
    assert ("an item that a rule blocks" in faults_of(engine, at_home, five)) and "an item that a rule blocks" not in faults_of(engine, request, five)

def test_the_engine_s_own_lists_have_none(engine):
    rules = engine.rules
    requests = sample_requests(engine, rules, 100, 10, 0); engine.use(rules)
    c = rule_check(engine, requests)
    assert c.passed and c.value == 0, c.said

def test_the_verdict_is_that_of_the_worst_check():
    fine, lost = Check("a", True, 0., 0., "fine"), [Check(n, False, -1., 0., f"{n} is bad") for n in "bcd"]
    assert verdict_of([fine], "v2", "v1").verdict == "passed" and verdict_of([fine], "v2", None).verdict == "first"
    g = verdict_of([fine, *lost], "v2", "v1")
    assert g.verdict == "refused" and g.sentence == "b: b is bad; c: c is bad; and 1 more"

def test_who_cannot_be_compared(engine):
    b = engine.bundle
    newer = b._replace(manifest=b.manifest | dict(version="v9", moment="2099-01-01"))
    assert [compare(c, b, SETTINGS, {}).verdict for c in (None, b, newer)] == ["first", "same", "older"]

def test_a_ranker_that_knows_positions_is_compared_and_a_champion_that_cannot_be_opened_is_named(daily, tmp_path):
    "Beside the version of a whole run: the same trees with a column for the position order the same, the opposite trees lose; then the champion is of other features."
    folder = shutil.copytree(daily.copy, tmp_path/"shop", symlinks=True)
    s = load_settings(folder/"settings.ini")
    now, bundles = serving(s), folder/"data"/"bundles"
    folders = {n: folder/"data"/"steps"/f for n, f in read_json(bundles/now/"manifest.json")["parents"].items()}
    def judged(name, *changes):
        train, out = tmp_path/f"train-{name}", tmp_path/name
        shutil.copytree(folders["train"], train); out.mkdir()
        text = re.sub(r"(?m)^tree_sizes=.*\n", "", (train/"ranker.txt").read_text())
        for old, new in changes: text = re.sub(f"(?m)^{old}$", new, text)
        (train/"ranker.txt").write_text(text)
        return out, publish_steps(folders | dict(train=train), bundles, out, s)[2]
    names = load_ranker(folders["train"]/"ranker.txt").feature_name()
    assert names[-1] != POSITION
    column = [(r"feature_names=(.*)", rf"feature_names=\1 {POSITION}"), (r"max_feature_idx=\d+", f"max_feature_idx={len(names)}"), (r"feature_infos=(.*)", r"feature_infos=\1 none")]
    out, same = judged("positions", *column)
    assert load_ranker(bundles/same.challenger/"ranker.txt").feature_name()[-1] == POSITION
    assert same.verdict == "passed" and {c.name: c.value for c in same.checks if "NDCG" in c.name} == {"next basket: NDCG@5": 0, "completion: NDCG@5": 0}, same
    turned = lambda m: "leaf_value=" + " ".join(str(-float(v)) for v in m[1].split())
    bad = judged("turned", *column, (r"leaf_value=(.*)", turned))[1]
    assert bad.verdict == "refused" and {"next basket: NDCG@5", "completion: NDCG@5"} <= {c.name for c in bad.checks if not c.passed}

    text = (bundles/now/"ranker.txt").read_text()
    (bundles/now/"ranker.txt").write_text(text.replace(names[0], "of_another_version"))
    out, g = judged("next", *column, ("objective=.*", r"\g<0>"))
    assert (g.verdict, g.champion) == ("first", now) and f"NOT compared with version {now}" in g.sentence and "other features" in g.sentence and [c.name for c in g.checks] == ["lists", "rules"] and g.checks[0].said in g.sentence
    assert "serves from now on" in release(out, s, "a test") and serving(s) == g.challenger and still_judged(out, s)
    tell = lambda gate: (_tell_gate(s, None, "2099-01-01", g.challenger, gate=gate), [r["what"] for r in listing(s) if r["key"] == "release:uncompared"])[1]
    for _ in range(2):
        what, = tell(dict(verdict=g.verdict, champion=g.champion, sentence=g.sentence))
        assert "NOT compared" in what
    assert tell(dict(verdict="same", champion=g.challenger, sentence="")) and not tell(dict(verdict="passed", champion=g.challenger, sentence="")), "until one is compared"

def test_a_loss_counts_only_if_the_purchases_that_no_list_led_to_show_it_too(daily, tmp_path):
    "Every other of the champion's trees says the opposite: it stays outside, whoever was shown lists, unless those whose purchases it misses bought from lists."
    folder = shutil.copytree(daily.copy, tmp_path/"shop", symlinks=True)
    s = load_settings(folder/"settings.ini")
    folders = {n: folder/"data"/"steps"/f for n, f in read_json(folder/"data"/"bundles"/serving(s)/"manifest.json")["parents"].items()}
    train, features = (shutil.copytree(folders[n], tmp_path/n) for n in ("train", "features"))
    text = re.sub(r"(?m)^tree_sizes=.*\n", "", (train/"ranker.txt").read_text())
    sign = cycle((1, -1))
    (train/"ranker.txt").write_text(re.sub("(?m)^leaf_value=(.*)$", lambda m, s=sign: (by := next(s), "leaf_value=" + " ".join(str(by * float(v)) for v in m[1].split()))[1], text))
    moments = read_moments(features)
    lines = pl.read_parquet(features/"lines.parquet").filter(pl.col("type") == s.data.target_event)
    newest = lines.filter(pl.col("ts") >= moments.test)
    def judged(name, led, s=s):
        "With lists that showed each of `led` (user, item) a minute before."
        shown = newest.join(led, on=led.columns, how="semi").select("user", "item", ts=pl.col("ts") - 60)
        old = pl.read_parquet(folders["features"]/"shown.parquet")
        pl.concat([old.clear(), shown.select(pl.col(c).cast(old.schema[c]) if c in shown.columns else pl.lit(None, old.schema[c]).alias(c) for c in old.columns)]).write_parquet(features/"shown.parquet")
        (out := tmp_path/name).mkdir()
        g = publish_steps(folders | dict(train=train, features=features), folder/"data"/"bundles", out, s)[2]
        return g, next(c for c in g.checks if c.name == "next basket: NDCG@5")
    g, c = judged("nobody", newest.select("user").head(0))
    assert g.verdict == "refused" and not c.passed and "purchases" not in c.said
    some = newest.select("user").unique().sort("user")
    g, c = judged("half", some[::2])
    assert g.verdict == "refused" and not c.passed and "; purchases of people who were shown no list: -" in c.said
    g, c = judged("all", newest.select("user", "item"))
    assert g.verdict == "refused" and not c.passed and "too few purchases that followed no list" in c.said
    g, c = judged("tried", newest.select("user", "item"), msgspec.structs.replace(s, release=msgspec.structs.replace(s.release, steps=("share:0.1", "all"))))
    assert g.verdict == "passed" and c.passed and "the visitors of the release's first steps will" in c.said
    state = load_state(features/day_of(moments.test), folders["candidates"]/day_of(moments.test))
    cases, known = _cases_of(lines, moments, s.run.seed)
    cases, targets = cases._replace(user=np.where(known, cases.user, -1).astype(np.int32)), Targets(cases.target_ptr, cases.target)
    lists = [rank_cases(Engine(state, load_ranker(t/"ranker.txt"), s.candidates.per_source, s.candidates.budget), cases, 5) for t in (folders["train"], train)]
    champion, turned = (ndcg(hits(l, targets), targets.sizes, 5) for l in lists)
    basket = np.flatnonzero(known & ~cases.completing)
    missed = pl.DataFrame({"user": cases.user[basket[np.argsort(turned[basket] - champion[basket])[:55]]]}, schema={"user": newest.schema["user"]})
    g, c = judged("missed", missed)
    assert c.passed and c.value > 0 and c.said.startswith("purchases of people who were shown no list: ") and "; all purchases: -" in c.said
