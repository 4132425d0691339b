"The service against its own description: what it allows is answered as it says, what it does not is refused as it says, and nothing is a failure of the server."
import pytest, schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as by_the_book

from recsys.serving.openapi import ROUTES
from test_serving import promote, publish, serving

@pytest.fixture(scope="module")
def service(tmp_path_factory):
    "The address of the real server; without keys, since it is on loopback."
    folder = tmp_path_factory.mktemp("fuzzed")
    publish(folder); promote(folder/"bundles", "v1")
    with serving(folder) as (_, port): yield f"http://127.0.0.1:{port}"

@pytest.fixture(scope="module")
def schema(service):
    found = schemathesis.openapi.from_url(f"{service}/openapi.json")
    refused = found.config.checks.negative_data_rejection
    refused.expected_statuses = [*refused.expected_statuses, "413"] # what is wrong may be too large as well
    return found

ALWAYS = [checks.not_a_server_error, by_the_book.status_code_conformance, by_the_book.content_type_conformance, by_the_book.response_schema_conformance]
# a batch with a bad event is answered with 200, and the event refused inside
ONLY_BAD = [r for r in ROUTES if r.request and r.name != "events"]

def whole(x):
    "`x` with whole numbers written as such: to JSON Schema 3.0 is an integer, to the service it is not."
    if isinstance(x, dict): return {k: whole(v) for k, v in x.items()}
    if isinstance(x, list): return [*map(whole, x)]
    return int(x) if isinstance(x, float) and x.is_integer() else x

def tried(schema, route, mode, also, examples):
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(case=schema[route.path][route.method].as_strategy(generation_mode=mode))
    def run(case):
        if mode == GenerationMode.POSITIVE: case.body = whole(case.body)
        statuses.append(case.call_and_validate(checks=ALWAYS + also).status_code)
    statuses = []
    run()
    return statuses

@pytest.mark.parametrize("route", ROUTES, ids=lambda r: r.name)
def test_what_the_description_allows_is_answered(schema, route):
    "Ids are made up, so an item or a list may be unknown; everything else that is allowed must go well."
    statuses = tried(schema, route, GenerationMode.POSITIVE, [], 25 if route.request else 5)
    assert {*statuses} <= {200, *({404} & {*route.errors})} and statuses

@pytest.mark.parametrize("route", ONLY_BAD, ids=lambda r: r.name)
def test_what_it_does_not_allow_is_refused(schema, route):
    statuses = tried(schema, route, GenerationMode.NEGATIVE, [by_the_book.negative_data_rejection], 30)
    assert {*statuses} & {400, 404, 405, 415}

@pytest.mark.bench
@pytest.mark.parametrize("route", ROUTES, ids=lambda r: r.name)
@pytest.mark.parametrize("mode", GenerationMode, ids=lambda m: m.value)
def test_thousands_of_questions_cause_no_failure(schema, route, mode):
    if mode == GenerationMode.POSITIVE or route.request: tried(schema, route, mode, [], 2000)

def test_the_description_is_complete(schema): assert {o.ok().label for o in schema.get_all_operations()} >= {f"{r.method} {r.path}" for r in ROUTES if r.name != "openapi"}
