"The pages of the service: shown where they may be and nowhere else, under a policy that allows what they do and nothing that gets in."
import base64, copy, hashlib, http.client, re, time

import lightgbm as lgb, numpy as np, polars as pl, pytest
from hypothesis import given, strategies as st

from recsys.features.definitions import NAMES
from recsys.operations.report import PALETTE
from recsys.ranking.rules import Diversity, Filter, Pin, Rules
from recsys.ranking.scorer import desk_for, item_words, trees_of
from recsys.serving.bundle import open_bundle, promote
from recsys.serving.engine import Engine, Request, Scorer, recommend
from recsys.serving.openapi import PAGES, document, find_route
from recsys.serving.refused import Refused
from recsys.serving.storefront import FILES, FOLDER, find_items, policy, read_pages, shows_pages
from recsys.serving.trace import DISCOUNT, USUAL, explained, supposed, trace
from test_serving import BUDGET, PER_SOURCE, ask, publish, serving

def get(port, path, method="GET"):
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    c.request(method, path)
    r = c.getresponse(); body = r.read(); c.close()
    return r.status, r.headers, body

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    publish(folder); promote(folder/"bundles", "v1")
    return folder

def test_the_pages_are_sent_as_they_are_read(shop):
    with serving(shop) as (_, port):
        for name, page in read_pages(True).items():
            path = next(r for r in PAGES if r.name == name).prefix + ("x" if name == "why" else "")
            status, headers, body = get(port, path)
            assert (status, body, headers["content-type"]) == (200, page.body, "text/html; charset=utf-8") and headers["content-security-policy"] == dict(page.headers)["content-security-policy"]
            assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
            assert get(port, path, "HEAD")[::2] == (200, b"") and get(port, path, "PUT")[0] == 405
        status, headers, body = get(port, "/search/item%207")
        assert status == 200 and b'"i7"' in body and headers["content-type"] == "application/json" and "script-src" not in headers["content-security-policy"]

def test_elsewhere_there_are_none(shop):
    with serving(shop, storefront="never") as (_, port):
        for route in PAGES: assert get(port, route.prefix + ("x" if route.variable else ""), route.method)[0] == 404
        assert get(port, "/readyz")[0] == 200

def test_who_sees_them():
    assert [shows_pages(w, a) for w in ("loopback", "always", "never") for a in ("127.0.0.1", "::1", "10.0.0.1", "0.0.0.0", "::", "fe80::1%eth0")] == [True, True, False, False, False, False, *[True] * 6, *[False] * 6]

def test_other_programs_are_not_told_of_them():
    told = document(10, False)["paths"]
    assert not [r for r in PAGES if r.path in told] and all(find_route(r.method, r.prefix + ("x" if r.variable else ""))[0] is r for r in PAGES)

@pytest.mark.parametrize("name", FILES)
def test_the_policy_allows_the_page_its_own_script_and_style_and_nothing_else(name):
    page = read_pages(True)[name]
    html, rule = page.body.decode(), dict(page.headers)["content-security-policy"]
    parts = dict(re.findall(r"<(script|style)>(.*?)</\1>", html, re.S))
    for kind, text in parts.items(): assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}';" in rule
    assert "unsafe" not in rule and "*" not in rule and rule.startswith("default-src 'none'")
    assert html.count("<script") == html.count("<style") == 1 and not re.search(r"\son\w+=|style=|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|//\w+\.\w", html)
    assert len(page.body) < 100_000

def test_reports_and_pages_have_one_palette(): assert PALETTE.strip() in (FOLDER/"style.css").read_text()

@given(st.lists(st.text(max_size=8), min_size=1, max_size=8, unique=True), st.text(max_size=6))
def test_a_search_finds_what_has_the_words(titles, words):
    items = pl.DataFrame(dict(item_id=[str(k) for k in range(len(titles))], title=titles))
    found = [f.item_id for f in find_items(items, np.ones(len(titles)), words, 99)]
    assert sorted(found) == [i for i, t in items.iter_rows() if all(w in pl.Series([f"{i} {t}"]).str.to_lowercase()[0] for w in words.lower().split())]

# ---- the trace

def test_a_trace_is_the_list_and_the_whole_way_to_it(engines_of):
    for engine in engines_of:
        for question in (Request(user_id="u3", cart=["i4"], n=10), Request(n=5, diversity=.7), Request(user_id="u9", filter=Filter(category=("A",)), n=8), Request(cart=["i1"], exclude=["i2"], n=500)):
            for level in range(5):
                said, x = trace(engine, question, "r", level)
                plain = recommend(engine, question, "r", level)
                assert [(p.item_id, p.score, p.source, p.rules) for p in said.items] == [(s.item_id, s.score, s.source, s.rules) for s in plain.items]
                assert len(x) == (0 if level > 1 else len(said.items)) and said.candidates >= len(said.items)
                assert not {p.item_id for p in said.passed} & {p.item_id for p in said.items} and len(said.passed) == min(10, said.candidates - len(said.items))
                places = [p.by_score for p in [*said.items, *said.passed]]
                assert len({*places}) == len(places) and 0 not in places
                assert all(s.alone <= s.proposed and s.listed <= s.proposed for s in said.sources) and sum(s.proposed for s in said.sources) >= said.candidates - len(engine.rules.pin) # a pin need not be proposed
                for p in explained(said, engine.ranker, x, len(NAMES) + 1).items: assert level > 1 or abs(said.mean + sum(m.by for m in p.moved) - p.score) < 1e-4

@pytest.fixture(scope="module")
def engines_of(shop):
    "An engine over the bundle, and one under rules."
    b = open_bundle(shop/"bundles"/"v1")
    plain, ruled = Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b), Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b)
    ruled.use(Rules(pin=(Pin(name="first", item="i7", place=1),), diversity=Diversity(strength=.4)))
    return plain, ruled

@pytest.mark.parametrize("ruled", [False, True])
def test_what_is_supposed_of_prices_and_stock_is_so_for_one_question_only(engines_of, ruled):
    engine, question = engines_of[ruled], Request(user_id="u3", cart=["i4"], n=6)
    given, tables = recommend(engine, question, "r").items, engine.state.item_x.tobytes()
    last = given[-1].item_id
    code, usual = engine.bundle.item_codes[last], float(engine.state.item_x[engine.bundle.item_codes[last], USUAL])
    without = supposed(engine, {}, {last: 0})
    assert last not in {i.item_id for i in recommend(without, question, "r").items} | {p.item_id for p in trace(without, question, "r")[0].passed}
    assert recommend(supposed(without, {}, {last: 2}), question, "r").items == given == recommend(supposed(engine, {}, {}), question, "r").items, "back again"
    cheap = supposed(engine, {last: usual / 4}, {})
    differ = np.argwhere(cheap.state.item_x != engine.state.item_x)
    assert differ.tolist() == [[code, DISCOUNT]] and abs(cheap.state.item_x[code, DISCOUNT] - .75) < 1e-6
    places = {p.item_id: (p.price, p.score) for p in trace(cheap, question, "r")[0].items}
    assert last not in places or places[last][0] == usual / 4
    assert not {last} & {i.item_id for i in recommend(cheap, Request(user_id="u3", n=6, filter=Filter(price_min=usual / 2)), "r").items}, "the filter sees the price"
    assert recommend(engine, question, "r").items == given and engine.state.item_x.tobytes() == tables
    for wrong in (({"nobody": 1.}, {}), ({}, {"nobody": 1})):
        with pytest.raises(Refused, match="no such item: nobody"): supposed(engine, *wrong)

def test_the_score_follows_a_price_that_is_supposed(engines_of):
    "With trees that ask for the discount where the shop's own ask how often an item is sold; every compiled score of the night would be another."
    engine, asked, now = copy.copy(engines_of[0]), NAMES.index("item_share_short"), NAMES.index("item_discount")
    text = re.sub(r"(?m)^tree_sizes=.*\n", "", engine.ranker.model_to_string())
    def other(m):
        columns, limits = m[1].split(), m[3].split()
        at = [k for k, f in enumerate(columns) if int(f) == asked]
        for k in at: columns[k], limits[k] = str(now), "0.5"
        return f"split_feature={' '.join(columns)}{m[2]}threshold={' '.join(limits)}"
    text = re.sub(r"(?ms)^split_feature=([^\n]*)(.*?)^threshold=([^\n]*)", other, text)
    trees = trees_of(text, len(NAMES))
    engine.ranker, engine.scorer, engine.handles = lgb.Booster(model_str=text), Scorer(trees, item_words(trees, np.ascontiguousarray(engine.state.item_x)), desk_for(trees)), {}
    question, differ = Request(user_id="u3", cart=["i4"], n=20), 0
    given = {i.item_id: i.score for i in recommend(engine, question, "r").items}
    for times in (.01, .3, .6, .9, 1.5, 5, 50):
        said, x = trace(supposed(engine, {i: times * float(engine.state.item_x[engine.bundle.item_codes[i], USUAL]) for i in given}, {}), question, "r")
        np.testing.assert_allclose([p.score for p in said.items], engine.ranker.predict(x), atol=1e-5)
        differ += sum(abs(p.score - given.get(p.item_id, p.score)) > 1e-4 for p in said.items)
    assert differ
    assert {i.item_id: i.score for i in recommend(engine, question, "r").items} == given

def test_the_service_traces_what_it_gave_and_logs_nothing_of_it(shop):
    post = lambda path, body, **h: ask(port, path=path, body=body, headers={"content-type": "application/json", **h})
    with serving(shop) as (_, port):
        given = post("/v1/recommend", dict(user_id="u3", cart=["i4"], n=6), **{"x-request-id": "list-1"})[2]
        kept = lambda: b"".join(p.read_bytes() for p in sorted((shop/"data/served").rglob("*.jsonl")))
        end = time.monotonic() + 10
        while post("/v1/explain/list-1", {})[0] == 404: assert time.monotonic() < end; time.sleep(.05)
        status, _, said = post("/v1/explain/list-1", {})
        before = kept()
        assert status == 200 and [i["item_id"] for i in said["items"]] == said["given"] == [i["item_id"] for i in given["items"]] and said["items"][0]["moved"]
        new = post("/v1/explain/list-1", dict(n=3, exclude=said["given"][:2]))[2]
        assert len(new["items"]) == 3 and not {*said["given"][:2]} & {i["item_id"] for i in new["items"]} and new["given"] == said["given"]
        sold = post("/v1/explain/list-1", dict(stock={said["given"][0]: 0}, price={said["given"][1]: .01}))[2]["items"]
        assert said["given"][0] not in {i["item_id"] for i in sold} and {i["item_id"]: i.get("price") for i in sold}.get(said["given"][1], .01) == .01
        for bad in (dict(price={"nobody": 1}), dict(stock={"nobody": 1}), dict(price={"i1": 0}), dict(stock={"i1": -1}), dict(price={f"i{k}": 1 for k in range(101)})): assert post("/v1/explain/list-1", bad)[0] == 400, bad
        assert [post(f"/v1/explain/{i}", b)[0] for i, b in (("never", {}), ("list-1", dict(n=1000)), ("list-1", dict(diversity=2)), ("list-1", dict(price=1)))] == [404, 400, 400, 400]
        time.sleep(.5)
        assert kept() == before
