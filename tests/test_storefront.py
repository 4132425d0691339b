"The pages of the service: shown where they may be and nowhere else, under a policy that allows what they do and nothing that gets in."
import base64, hashlib, http.client, re

import numpy as np, polars as pl, pytest
from hypothesis import given, strategies as st

from recsys.operations.report import PALETTE
from recsys.serving.bundle import promote
from recsys.serving.openapi import PAGES, document, find_route
from recsys.serving.storefront import FILES, FOLDER, find_items, policy, read_pages, shows_pages
from test_serving import publish, serving

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
