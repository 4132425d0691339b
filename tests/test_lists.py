"What was shown, against brute force; and what was served, recomputed to the bit through the real engine and the real service."
import json
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.features.definitions import NAMES
from recsys.monitoring import lists as li
from recsys.serving.bundle import open_bundle, promote
from recsys.ranking.rules import Filter
from recsys.serving.engine import Engine, Request, recommend
from recsys.serving.service import Served, served_record
from test_serving import BUDGET, PER_SOURCE, ask, ids, people, publish, serving, tables

START = datetime(2026, 3, 1, tzinfo=timezone.utc)
KIND = dict(a="A", b="A", c="B", d="B", e=None)
SHARE = dict(a=.5, b=.25, c=.125)


def record(k, items, visitor="v", day=0, **more):
    return msgspec.json.encode(dict(request_id=f"r{k}", at=(START + timedelta(days=day)).timestamp(), model_version="v1", variant="default", level=0, asked=0, request=dict(placement="home"),
                                    visitor_id=visitor, user_id=None, items=[(i, s, 1., [o]) for i, s, o in items]) | more)


lists = st.lists(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(-5, 5), st.sampled_from(["repeat", "vector", "segment"])), max_size=7), max_size=8)

@settings(max_examples=60, deadline=None)
@given(lists)
def test_rows_by_brute_force(shown):
    places = li.served_places(li.served_lists(record(k, items) for k, items in enumerate(shown)))
    assert dict(places.schema) == li.PLACES and len(places) == sum(map(len, shown))
    frames = pl.DataFrame(dict(item_id=list(KIND), category=list(KIND.values()))), pl.DataFrame(dict(item_id=list(SHARE), share=list(SHARE.values())))
    rows = {r["list"]: r for r in li.list_rows(places, *frames).to_dicts()}
    assert set(rows) == {f"r{k}" for k, items in enumerate(shown) if items}
    for k, items in enumerate(shown):
        if not items: continue
        r, distinct = rows[f"r{k}"], sorted({i for i, _, _ in items})
        assert r["size"] == len(items) and r["source_first"] == items[0][2] and r["sources"] == len({o for _, _, o in items})
        assert (r["score_first"], r["score_last"], r["category_first"]) == (items[0][1], items[-1][1], KIND.get(items[0][0]))
        assert r["novelty"] == pytest.approx(np.mean([-np.log2(SHARE.get(i, .125)) for i, _, _ in items]))
        pairs = [KIND.get(a) is None or KIND.get(a) != KIND.get(b) for n, a in enumerate(distinct) for b in distinct[:n]]
        assert r["diversity"] == (pytest.approx(np.mean(pairs)) if pairs else None)
    for c in li.day_coverage(places, 6): assert c["coverage"] == len({i for items in shown for i, _, _ in items}) / 6
    for m in li.position_mix(places):
        inside = dict(zip(("1", "2-3", "4+"), (range(1), range(1, 3), range(3, 99))))[m["positions"]]
        own = [o for items in shown for n, (_, _, o) in enumerate(items) if n in inside]
        assert m["share"] == pytest.approx(own.count(m["source"]) / len(own))
    json.dumps([li.day_figures(li.list_rows(places, *frames)), li.position_mix(places)], allow_nan=False)


def test_lines_that_are_none_are_left_out():
    whole = record(0, [("a", 1., "repeat")])
    assert len(li.served_places(li.served_lists([whole, whole[:-9], b"", b"[]", b'{"x": 1}', record(1, [], visitor=None)]))) == 1
    alone = li.served_places(li.served_lists(record(k, [("a", 1., "repeat")], visitor=None) for k in range(3)))
    assert alone["visitor_id"].to_list() == ["r0", "r1", "r2"]


def test_only_what_somebody_was_recommended_counts():
    "Answers of the other kinds, which have no sources, and those of a shadow lie in the same log."
    from recsys.monitoring.profiles import served_rows
    whole = record(0, [("a", 1., "repeat")])
    raw = msgspec.json.decode(whole)
    other = [msgspec.json.encode(raw | dict(request_id=f"o{n}", items=[("a", 1., 1., [])]) | more) for n, more in enumerate((dict(kind="rank"), dict(kind="similar"), dict(variant="shadow exp:b")))]
    bare = msgspec.json.encode(raw | dict(request_id="bare", items=[("a", 1., 1., [])]))
    places = li.served_places(li.served_lists([*other, whole, bare]))
    assert list(zip(places["list"], places["source"])) == [("r0", "repeat"), ("bare", None)]
    assert served_rows([*other, whole, bare])["source"].to_list() == ["repeat", None]


def week(seed, k, n=500, dead=False, level=0, version="v1"):
    rng = np.random.default_rng(seed)
    def items():
        for s in -np.sort(-rng.normal(size=5)):
            o = "segment" if dead and rng.random() < .6 else str(rng.choice(["repeat", "vector", "segment"]))
            yield f"{'abcdef'[rng.integers(0, 2 if o == 'segment' else 6)]}", float(s), o
    return [record(f"{k}-{i}", list(items()), f"v{rng.integers(0, 150)}", 7 * k + 7 * rng.random(), level=level, model_version=version) for i in range(n)]


def rows_of(records):
    return li.list_rows(li.served_places(li.served_lists(records)), pl.DataFrame(dict(item_id=list(KIND), category=["A", "A", "B", "B", "C"])), pl.DataFrame(dict(item_id=list(SHARE), share=list(SHARE.values()))))


def test_a_dead_source_is_found_and_calm_weeks_are_calm():
    calm = [rows_of(week(s, s)) for s in range(4)]
    assert not any(li.list_drift(calm[a], calm[3], [calm[b], calm[c]]).alarm for a, b, c in ((0, 1, 2), (1, 0, 2), (2, 0, 1)))
    found = {c.name: c.verdict for c in li.list_drift(calm[2], rows_of(week(9, 4, dead=True)), calm[:2]).columns}
    assert found["source_first"] == "material" and found["size"] == found["level"] == "stable"
    fallen = {c.name: c.verdict for c in li.list_drift(calm[2], rows_of(week(3, 3, level=3)), calm[:2]).columns}
    assert fallen["level"] == "material" and fallen["source_first"] != "material"


def test_scores_of_two_versions_are_not_compared():
    a, b = rows_of(week(0, 0)), rows_of(week(1, 1, version="v2"))
    assert "score_first" in {c.name for c in li.list_drift(a, a).columns} and "score_first" not in {c.name for c in li.list_drift(a, b).columns}
    assert li.list_drift(a, b.head(0)).columns[0].verdict == "not enough data"


def test_windows_end_with_the_newest_list_and_at_the_first_gap():
    rows = rows_of([*week(0, 0), *week(1, 1), *week(2, 4)])
    assert li.windows_of(rows.head(0), 7) == [] and len(li.windows_of(rows, 7)) <= 2         # weeks 2 and 3 are missing
    cut = li.windows_of(rows_of([*week(0, 0), *week(1, 1), *week(2, 2)]), 7)
    assert [len(c) for c in cut][:2] != [] and sum(map(len, cut)) == 1500 and all(a["ts"].min() > b["ts"].max() for a, b in zip(cut, cut[1:]))


def test_the_worst_finding_sets_the_light():
    from recsys.monitoring.watch import with_outcomes
    ok, quiet = dict(verdict="good", sentence="Nothing moved"), dict(business=dict(verdict="good", sentence="All hold."), concept=[], lists=dict(alarm=False, sentence="x"), skew=[], embeddings=dict(alarm=False, sentence="y"))
    assert with_outcomes(ok, **quiet)["verdict"] == "good" and with_outcomes(ok, **quiet)["sentence"] == "Nothing moved"
    fired = dict(kind="click", drift=dict(sentence="Changed.", findings=[dict(since="2026-03-01")]))
    assert with_outcomes(ok, **quiet | dict(concept=[fired, dict(kind="purchase", drift=None)]))["verdict"] == "warning"
    worst = with_outcomes(ok, **quiet | dict(skew=[dict(features=[1], sentence="3 % differ.")], lists=dict(alarm=True, sentence="Novelty fell")))
    assert worst["verdict"] == "bad" and worst["sentence"] == "3 % differ. Novelty fell."
    assert with_outcomes(dict(verdict="bad", sentence="a"), **quiet)["verdict"] == "bad"


def test_a_large_log_is_read_by_visitors(tmp_path):
    "A sample holds all lists of those it holds, and older days are left alone."
    for d in (1, 2, 9):
        folder = tmp_path/f"served/day=2026-03-0{d}"; folder.mkdir(parents=True)
        (folder/"1-1.jsonl").write_bytes(b"".join(l + b"\n" for l in week(d, d)) + b'{"cut')
    everything = list(li.recent_lists(tmp_path, 30))
    assert len(everything) == 1500 and len(list(li.recent_lists(tmp_path, 7))) == 500
    some = list(li.recent_lists(tmp_path, 30, most=300))
    count = lambda lists: pl.Series("visitor", [li.visitor_of(r) for r in lists]).value_counts()
    both = count(some).join(count(everything), on="visitor", suffix="_all")
    assert 100 < len(some) < 600 and len(both) == len(count(some)) and (both["count"] == both["count_all"]).all()


def test_a_run_as_of_an_earlier_day_sees_nothing_later(tmp_path):
    from recsys.monitoring.profiles import profile_shop, shop_stores
    for d in range(1, 6):
        folder = tmp_path/f"served/day=2026-03-0{d}"; folder.mkdir(parents=True)
        (folder/"1-1.jsonl").write_bytes(b"".join(record(f"{d}-{n}", [("a", 1., "repeat")], f"v{n}", d - 1 + n / 10) + b"\n" for n in range(10)))
    moment = START + timedelta(days=2, hours=12)
    before = moment.timestamp()
    assert {f.parent.name[-1] for f in li.recent_files(tmp_path, 2, before)} == {"2", "3"} and not li.recent_files(tmp_path, 2, START.timestamp())
    seen = list(li.recent_lists(tmp_path, 2, before=before))
    assert len(seen) == 15 and max(r.at for r in seen) < before
    (tmp_path/"in").mkdir(); (tmp_path/"in/ingest.json").write_text(json.dumps(dict(moment=moment.isoformat())))
    pl.DataFrame(dict(item_id=["a"], category=["A"])).write_parquet(tmp_path/"in/items.parquet")
    assert profile_shop(tmp_path/"in", tmp_path, "shop")["served"] == ["2026-03-01", "2026-03-02", "2026-03-03"]
    kept = lambda d: sum(pl.read_parquet_metadata(f)["recsys"].count('"rows":5') for f in shop_stores(tmp_path, "shop")["served"].glob(f"day={d}/*"))
    assert kept("2026-03-03") == 1 and not kept("2026-03-02")


def test_a_log_without_lists_makes_no_profile(tmp_path):
    from recsys.core.settings import load_settings
    from recsys.monitoring.watch import watch_weeks
    from shop import make_shop
    s, ingested = load_settings(make_shop(tmp_path/"shop")/"settings.ini"), tmp_path/"in"
    ingested.mkdir(); (ingested/"ingest.json").write_text(json.dumps(dict(moment=(START + timedelta(days=3)).isoformat())))
    pl.DataFrame(dict(item_id=["a"], category=["A"])).write_parquet(ingested/"items.parquet")
    (s.data_dir/"served/day=2026-03-01").mkdir(parents=True); (s.data_dir/"served/day=2026-03-01/1-1.jsonl").write_bytes(b"{}\n" + record(0, [("a", 1., "x")], kind="rank") + b"\n")
    assert watch_weeks(ingested, s) == dict(served=None)


# ---- train and serve

@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0., -0., 1., 1e-45, float("nan"), float("inf"), .1]), min_size=2, max_size=20), st.data())
def test_features_to_the_bit(values, data):
    a = np.array(values[:len(values) // 2 * 2], np.float32).reshape(-1, 2)
    b = a.copy()
    assert li.compared_features(a, b, ["p", "q"]) == []
    r, c = data.draw(st.integers(0, len(a) - 1)), data.draw(st.integers(0, 1))
    b[r, c] = np.nextafter(np.float32(3), np.float32(4))
    found, = li.compared_features(a, b, ["p", "q"])
    assert found["name"] == "pq"[c] and found["rows"] == 1 and found["share"] == 1 / len(a)
    json.dumps(found, allow_nan=False)


def test_shapes_must_agree():
    with pytest.raises(RecsysError, match="recomputed"): li.compared_features(np.zeros((2, 3), np.float32), np.zeros((3, 3), np.float32), list("abc"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    publish(folder); publish(folder, "v2", tables(seed=7)); promote(folder/"bundles", "v1")
    return folder

@pytest.fixture(scope="module")
def engines(shop):
    def of(version):
        b = open_bundle(shop/"bundles"/version)
        return Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b)
    return {v: of(v) for v in ("v1", "v2")}

def logged(engine, request):
    answer = recommend(engine, request, "r")
    return msgspec.json.decode(served_record(engine, request, answer, 0, engine.last, 1772323200.), type=Served)

@settings(max_examples=80, deadline=None)
@given(st.builds(Request, n=st.integers(1, 30), user_id=people, cart=st.lists(ids, max_size=6), items=st.lists(ids, max_size=5)))
def test_every_served_row_is_recomputed_to_the_bit(engines, request):
    "With a cart or without, known people and strangers, odd ids."
    said = li.skew_of(engines["v1"], [logged(engines["v1"], request)])
    if said["lists"]: assert said["identical"] == 1 and said["features"] == [] and "to the bit" in said["sentence"]


def test_tables_of_another_version_are_a_skew(engines):
    records = [logged(engines["v1"], Request(user_id=f"u{k}", n=8)) for k in range(12)]
    assert li.skew_of(engines["v1"], records)["identical"] == 1
    said = li.skew_of(engines["v2"], records)
    assert said["identical"] < .1 and 0 <= said["reordered"] <= 1 and said["score_shift"] >= 0 and said["features"][0]["name"] in NAMES
    one = records[0].x[0][5]
    records[0].x[0][5] = one + 1
    said = li.skew_of(engines["v1"], records)
    assert [f["name"] for f in said["features"]] == [NAMES[5]] and said["features"][0]["rows"] == 1 and NAMES[5] in said["sentence"]
    nothing = li.skew_of(engines["v1"], [msgspec.structs.replace(records[0], x=[])])
    assert (nothing["lists"], nothing["skipped"], nothing["identical"]) == (0, 1, None)
    json.dumps([said, nothing], allow_nan=False)


def test_what_must_differ_is_not_compared(engines):
    "Live demand, other candidates, other variants."
    r = logged(engines["v1"], Request(user_id="u1", n=8))
    other = [msgspec.structs.replace(r, **more) for more in (dict(level=1), dict(variant="e:b"))]
    other += [msgspec.structs.replace(r, request=msgspec.structs.replace(r.request, **more)) for more in (dict(filter=Filter(region="north")), dict(exclude=["i1"]))]
    said = li.skew_of(engines["v1"], [r, *other])
    assert (said["lists"], said["skipped"], said["identical"]) == (1, 4, 1) and "cannot be compared: 4." in said["sentence"]
    for name in ("rank_trending", "n_sources"): r.x[0][NAMES.index(name)] += 1
    assert li.skew_of(engines["v1"], [r])["identical"] == 1
    r.x[0][NAMES.index("rank_repeat")] += 1
    assert [f["name"] for f in li.skew_of(engines["v1"], [r])["features"]] == ["rank_repeat"]


def test_what_the_real_service_logged_is_recomputed(shop):
    with serving(shop, features_one_in=1) as (process, port):
        for k in range(20): ask(port, body=dict(user_id=f"u{k}", n=6, cart=[f"i{k}"] if k % 2 else []))
    knobs = SimpleNamespace(candidates=SimpleNamespace(per_source=PER_SOURCE, budget=BUDGET))
    said, = li.skew_run(shop/"data", shop/"bundles", knobs)
    assert said["version"] == "v1" and said["lists"] == 20 and said["identical"] == 1, said["sentence"]
    assert len(li.served_places(li.recent_lists(shop/"data", 7)).filter(pl.col("position") == 1)) == 20


@pytest.mark.parametrize("feature", ["item_price", "item_share_short"])
def test_a_feature_altered_in_serving_is_named_first(shop, tmp_path, feature):
    "A worker that serves from tables in which one feature is wrong; the log is recomputed from the bundle as it was published."
    import shutil
    from recsys.core.files import file_digest, read_json, write_json
    from recsys.monitoring.watch import with_outcomes
    wrong = tmp_path/"shop/bundles/v1"
    shutil.copytree(shop/"bundles/v1", wrong)
    x = np.load(wrong/"state/item_x.npy")
    x[:, NAMES.index(feature)] = x[:, NAMES.index(feature)] * np.float32(1.1) + 1
    (wrong/"state/item_x.npy").unlink(); np.save(wrong/"state/item_x.npy", x)           # not through the link
    m = read_json(wrong/"manifest.json"); m["files"]["state/item_x.npy"] = file_digest(wrong/"state/item_x.npy"); write_json(wrong/"manifest.json", m)
    promote(tmp_path/"shop/bundles", "v1")
    with serving(tmp_path/"shop", features_one_in=1) as (process, port):
        for k in range(10): ask(port, body=dict(user_id=f"u{k}", n=6))
    knobs = SimpleNamespace(candidates=SimpleNamespace(per_source=PER_SOURCE, budget=BUDGET))
    said, = li.skew_run(tmp_path/"shop/data", shop/"bundles", knobs)
    assert [f["name"] for f in said["features"]] == [feature] and said["identical"] == 0 and said["features"][0]["share"] == 1
    told = with_outcomes(dict(verdict="warning", sentence="2 of 90 inputs moved materially: item_trend, score."), dict(verdict="warning", sentence="Guardrail near."), [], dict(alarm=True, sentence="Novelty fell"), [said], dict(alarm=False, sentence=""))
    assert told["verdict"] == "bad" and feature in told["sentence"][:120] and feature in told["sentences"][0] and len(told["sentences"]) == 4, "what is worst comes first"


def test_lists_of_the_night(engines):
    places = li.ranked_places(engines["v1"], np.arange(5), 4, START)
    assert dict(places.schema) == li.PLACES and places["list"].n_unique() == 5
    for u in range(5): assert [f"i{i}" for i in places.filter(pl.col("list") == str(u))["item_id"]] == [s.item_id for s in recommend(engines["v1"], Request(user_id=f"u{u}", n=4), "r").items]
