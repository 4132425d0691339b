"The table of addresses: a router that finds each of them and nothing else, decoders that keep the bounds, a description that is true."
import json, re

import msgspec, pytest
from hypothesis import given, settings, strategies as st
from jsonschema import Draft202012Validator

from recsys.serving.engine import Request
from recsys.serving.live_items import Change, Item
from recsys.serving.openapi import NAMES, ROUTES, decoders_for, document, find_route
from recsys.serving.refused import Refused
from recsys.serving.schemas import EventsRequest, ItemFields, RankRequest, SimilarRequest, bounded, to_change, to_item

def refused(method, path):
    with pytest.raises(Refused) as e: find_route(method, path)
    return e.value

ids = st.text(st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", exclude_categories=["Cs"]), min_size=1, max_size=256)

@settings(max_examples=200)
@given(id=ids)
def test_every_address_is_found_whatever_its_id(id):
    for r in ROUTES: assert find_route(r.method, r.prefix + id if r.variable else r.path) == (r, id if r.variable else "")

def test_head_is_get_and_nothing_else_is():
    for r in ROUTES:
        path = r.prefix + ("x" if r.variable else "")
        if r.method == "GET": assert find_route("HEAD", path)[0] is r
        allowed = {m for m in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X") if m in refused("NONE", path).headers["allow"].split(", ")}
        assert r.method in allowed
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get"} - allowed:
            assert (e := refused(method, path)).status == 405 and set(e.headers["allow"].split(", ")) == allowed

@settings(max_examples=300)
@given(path=st.one_of(st.text(max_size=60), st.text(max_size=20).map("/v1/{}".format), st.sampled_from(["", "/", "//", "/v1", "/v1/", "/v1/items/", "/v1/users/", "/v1/users",
    "/v1/recommend/", "/v1/recommend/x", "/healthz/", "/V1/recommend", "/v1//items/x", "/../healthz", "/v1/explain", "/openapi.json/", "v1/items/x"])), method=st.sampled_from(["GET", "POST", "PUT"]))
def test_nothing_else_is_found(path, method):
    try: route, last = find_route(method, path)
    except Refused as e: assert e.status in (404, 405, 400)
    else: assert path == route.prefix + last and bool(last) == bool(route.variable)

def test_ids_have_bounds():
    assert find_route("PUT", "/v1/items/" + "☃" * 256)[1] == "☃" * 256
    assert refused("PUT", "/v1/items/" + "☃" * 257).status == refused("DELETE", "/v1/users/a\ufffd").status == 400

def test_names_paths_and_scopes():
    assert len({*NAMES}) == len(NAMES) and len({(r.method, r.path) for r in ROUTES}) == len(ROUTES) and all(re.fullmatch(r"[a-z_]+", n) for n in NAMES)
    assert {r.name for r in ROUTES if r.scope is None} == {"healthz", "readyz", "openapi"}
    assert {r.name for r in ROUTES if r.scope == "admin"} == {"put_items", "put_item", "patch_item", "forget"} and {r.name for r in ROUTES if r.scope == "write"} == {"events"}
    for r in ROUTES: assert ({401, 403, 429} <= {*r.errors}) == bool(r.scope) and ({400, 413, 415} <= {*r.errors}) == bool(r.request)

# ---- shapes

@pytest.mark.parametrize("kind,fields", [(Request, {}), (RankRequest, dict(candidates=["a"])), (SimilarRequest, dict(item_id="a"))])
@pytest.mark.parametrize("most", [1, 7, 100, 500])
def test_no_list_is_longer_than_the_operator_allows(kind, fields, most):
    decoder = msgspec.json.Decoder(bounded(kind, most))
    ask = lambda **more: decoder.decode(json.dumps(fields | more))
    assert ask(n=most).n == most and ask().n == min(most, 500 if kind is RankRequest else 10) and isinstance(ask(), kind)
    for n in (0, -1, most + 1, 1.5, "3", None, True):
        with pytest.raises(msgspec.ValidationError, match="n"): ask(n=n)
    with pytest.raises(msgspec.ValidationError, match="unknown"): ask(colour="red")

def test_a_question_about_candidates_may_say_all_that_another_may():
    assert {*Request.__struct_fields__} < {*RankRequest.__struct_fields__}
    assert bounded(ItemFields, 5) is ItemFields

@pytest.mark.parametrize("name,bad", [("rank", {}), ("rank", dict(candidates=[])), ("rank", dict(candidates=["a"] * 501)), ("rank", dict(candidates=[""])), ("similar", {}), ("similar", dict(item_id="x" * 257)),
    ("events", dict(events=[])), ("events", dict(events=[{}] * 1001)), ("events", {}), ("events", []), ("put_item", dict(price=-1)), ("put_item", dict(item_id="a")), ("put_item", dict(stock=1.5)),
    ("put_item", dict(currency="EURO")), ("put_item", dict(available_from="2026-01-01")), ("put_item", dict(attributes={"a": {"b": 1}})), ("put_items", dict(items=[])), ("put_items", dict(items=[{}])),
    ("put_items", dict(items=[dict(item_id="a")] * 1001)), ("patch_item", dict(colour=1))])
def test_what_is_out_of_bounds_is_not_read(name, bad):
    with pytest.raises(msgspec.ValidationError): decoders_for(100)[name].decode(json.dumps(bad))

def test_put_states_all_and_patch_what_changed():
    fields = decoders_for(100)["patch_item"].decode(b'{"stock": 0, "brand": null, "attributes": {"size": ["S", 7]}}')
    put, patch = to_item("milk", fields), to_change("milk", fields)
    assert isinstance(put, Item) and isinstance(patch, Change) and put.item_id == patch.item_id == "milk"
    assert put.title is None and patch.title is msgspec.UNSET and put.brand is patch.brand is None and put.stock == patch.stock == 0
    assert {*ItemFields.__struct_fields__} == {*Item.__struct_fields__} - {"item_id"}

# ---- the description

@pytest.fixture(scope="module", params=[True, False], ids=["keyed", "open"])
def doc(request): return json.loads(msgspec.json.encode(document(37, request.param))), request.param

def test_every_reference_leads_somewhere_and_every_schema_is_one(doc):
    text, schemas = json.dumps(doc[0]), doc[0]["components"]["schemas"]
    for section, name in re.findall(r'"#/components/(\w+)/([\w.-]+)"', text): assert name in doc[0]["components"][section]
    assert set(re.findall(r'"#/(\w+)', text)) == {"components"}
    for schema in schemas.values(): Draft202012Validator.check_schema(schema)
    assert "\\\\Z" not in text and doc[0]["openapi"].startswith("3.1")
    assert schemas["Request"]["properties"]["n"]["maximum"] == schemas["SimilarRequest"]["properties"]["n"]["maximum"] == 37 and schemas["RankRequest"]["properties"]["n"]["default"] == 37

def test_the_description_says_what_the_table_says(doc):
    doc, keyed = doc
    assert {(m.upper(), p) for p, ops in doc["paths"].items() for m in ops} == {(r.method, r.path) for r in ROUTES}
    for r in ROUTES:
        op = doc["paths"][r.path][r.method.lower()]
        assert op["operationId"] == r.name and set(op["responses"]) == {"200", *map(str, r.errors), *([] if keyed else ["421"])} and ("requestBody" in op) == bool(r.request)
        assert op["security"] == ([{"key": [r.scope]}] if keyed and r.scope else [])
        assert [p["name"] for p in op["parameters"] if "name" in p] == ([r.variable] if r.variable else [])

EXAMPLES = dict(recommend=[{}, dict(user_id="u", n=5, cart=["a"], filter=dict(price_max=3), impressions=[dict(item_id="a")])], rank=[dict(candidates=["a", "b"], diversity=.5)], similar=[dict(item_id="a")],
                events=[dict(events=[dict(event_id="e", event_type="view", visitor_id="v", item_id="a", ts="2026-01-01T00:00:00Z", currency="EUR", context={"a": [1]})])],
                put_items=[dict(items=[dict(item_id="a", price=1.5)])], put_item=[dict(stock=3, available_from="2026-01-01T00:00:00+01:00", attributes={"a": ["b", 1]})], patch_item=[{}, dict(price=None)])
WRONG = dict(recommend=[dict(n=38), dict(cart="a"), dict(x=1)], rank=[{}, dict(candidates=[])], similar=[dict(item_id="")], events=[dict(events=[dict(event_id="e")]), dict(events=[7])],
             put_items=[dict(items=[dict(price=1)])], put_item=[dict(currency="eur"), dict(currency="EUR\n")], patch_item=[dict(price=-1)])

@pytest.mark.parametrize("name", EXAMPLES)
def test_the_schemas_and_the_decoders_agree(doc, name):
    doc, route = doc[0], next(r for r in ROUTES if r.name == name)
    schema = doc["paths"][route.path][route.method.lower()]["requestBody"]["content"]["application/json"]["schema"] | {"components": doc["components"]}
    judge, decoder = Draft202012Validator(schema), decoders_for(37)[name]
    for body in EXAMPLES[name]: judge.validate(body); decoder.decode(json.dumps(body))
    for body in WRONG[name]:
        if name != "put_item" or not body["currency"].endswith("\n"): assert not judge.is_valid(body) # Python's $ lets one line end pass
        if name != "events": # they are judged one by one
            with pytest.raises(msgspec.ValidationError): decoder.decode(json.dumps(body))
