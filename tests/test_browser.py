"The pages in a real browser: on a phone and a desk, in light and dark; nothing fails, nothing leaves the machine, nothing is unreadable or without a name."
import os, re, shutil, subprocess

import pytest
from recsys.operations.index import write_index
from shop import COMMAND
from test_incident import shop as troubled

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing: apt-get install chromium")
SIZES = dict(phone=dict(width=390, height=844), desk=dict(width=1280, height=900))
VIEWS = [(size, scheme) for size in SIZES for scheme in ("light", "dark")]

@pytest.fixture(scope="module")
def chromium():
    "The browser of the machine. Its sandbox needs rights that neither root nor most containers have; the pages are our own."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()

class Visit:
    "A tab, and all that went wrong in it."
    def __init__(self, chromium, size="desk", scheme="light"):
        self.context = chromium.new_context(viewport=SIZES[size], color_scheme=scheme, reduced_motion="reduce")
        self.page, self.wrong = self.context.new_page(), []
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda m: self.wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.wrong.append(f"script: {e}"))
        self.page.on("request", lambda r: None if re.match(r"file:|data:|http://127\.0\.0\.1:", r.url) else self.wrong.append(f"asked for {r.url}"))
        self.page.on("response", lambda r: self.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)

    def look(self):
        "Is what is shown as it has to be?"
        from axe_playwright_python.sync_playwright import Axe
        found = Axe().run(self.page).response
        said = [f"{v['id']}: {n['html'][:200]} {n['failureSummary']}" for v in found["violations"] for n in v["nodes"]]
        assert not said and len(found["passes"]) > 10, "\n".join([self.page.url, *said])
        wide = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{self.page.url} is {wide} pixels wider than the window"
        assert not self.wrong, (self.page.url, self.wrong)

@pytest.fixture
def visit(chromium):
    "A function that opens a `Visit`."
    opened = []
    def one(*how): opened.append(Visit(chromium, *how)); return opened[-1]
    yield one
    for v in opened: v.context.close()

PAGE = """<!doctype html><html lang="en"><head><title>Page</title><link rel="icon" href="data:,"></head><body><main><h1>Page</h1>
<p style="color:{color};background:#fff">text</p>{field}<p style="width:{width}px">text</p><script>{script}</script></main></body></html>"""
BAD = [dict(color="#ddd"), dict(field="<input>"), dict(width=2000), dict(script="console.error('no')"), dict(script="fetch('https://example.test/x').catch(() => 0)"), dict(script="nothing.of.that.name()")]

@pytest.mark.parametrize("bad", [{}, *BAD], ids=lambda b: str(next(iter(b.items()), "good")))
def test_what_is_bad_is_found_and_nothing_else(visit, tmp_path, bad):
    (tmp_path/"page.html").write_text(PAGE.format(**dict(color="#111", field="", width=100, script="") | bad))
    v = visit(); v.page.goto((tmp_path/"page.html").as_uri()); v.page.wait_for_timeout(200)
    if not bad: return v.look()
    with pytest.raises(AssertionError): v.look()

@pytest.mark.parametrize("size, scheme", VIEWS)
def test_from_the_index_to_every_page_of_a_run_and_back(daily, visit, size, scheme):
    v = visit(size, scheme)
    v.page.goto((daily.copy/"reports/index.html").as_uri()); v.look()
    links = v.page.get_by_role("table", name="Time and memory by step").locator("tbody th a").all_inner_texts()
    assert {"ingest", "drift", "evaluate", "publish"} <= set(links)
    for name in links if (size, scheme) in (("phone", "dark"), ("desk", "light")) else ["drift"]: # each page in both sizes and both schemes
        v.page.get_by_role("link", name=name, exact=True).first.click()
        assert v.page.url.endswith(f"/{name}.html")
        for summary in v.page.locator("main > details > summary, .shown > details > summary").all(): summary.click()
        v.look()
        v.page.get_by_role("navigation", name="Path").get_by_role("link").first.click()
        assert v.page.url.endswith("/index.html")

@pytest.mark.parametrize("size, scheme", VIEWS)
def test_from_the_index_to_an_incident_and_its_evidence(tmp_path, visit, size, scheme):
    reports, data = troubled(tmp_path)
    write_index(reports, data)
    v = visit(size, scheme)
    v.page.goto((reports/"index.html").as_uri()); v.look()
    v.page.get_by_role("link", name="alert", exact=True).click(); v.look()
    assert "price is missing" in v.page.locator(".rs-headline").inner_text() and v.page.locator("figure svg circle").count() > 5
    v.page.get_by_role("link", name="The page on which it was found").click()
    assert v.page.url.endswith("/runs/2026-03-05/drift.html")

@pytest.mark.parametrize("size, scheme", VIEWS)
def test_the_documentation_is_read_from_page_to_page(site, visit, size, scheme):
    v = visit(size, scheme)
    v.page.goto((site/"index.html").as_uri()); v.look()
    for name in ("Architecture", "Operator's handbook", "Glossary", "Files")[:4 if (size, scheme) in (("phone", "dark"), ("desk", "light")) else 2]:
        v.page.locator("main").get_by_role("link", name=name, exact=True).click(); v.look()
        v.page.get_by_role("navigation", name="Path").get_by_role("link").first.click()

def test_a_page_is_walked_by_keyboard(daily, visit):
    v = visit("desk", "light")
    v.page.goto((daily.copy/"reports/index.html").as_uri())
    v.page.keyboard.press("Tab")
    assert v.page.evaluate("document.activeElement.textContent") == "Skip to the content"
    v.page.keyboard.press("Enter")
    v.page.keyboard.press("Tab")
    assert v.page.evaluate("document.querySelector('main').contains(document.activeElement)")
    v.look()

# ---- the storefront, served by the real service

@pytest.fixture(scope="module")
def storefront(daily):
    "The address of a service over the shop's own bundle."
    busy = dict(RECSYS_SERVING_SHED_MS="60000", RECSYS_SERVING_REFUSE_MS="120000") # however busy the machine is, the lists are whole
    p = subprocess.Popen([COMMAND, "serve", "--port", "0"], cwd=daily.copy, stdout=subprocess.PIPE, text=True, env=os.environ | busy)
    try:
        line = p.stdout.readline()
        assert line.startswith("serving "), line
        yield line.rpartition(" ")[2].strip()
    finally:
        p.terminate()
        p.wait(30)

def names(page): return page.locator("#list .plain").all_inner_texts()
def said(page, words):
    "What the page says of the newest list, once it says `words`."
    page.locator("#told", has_text=words).wait_for()
    return page.locator("#told").inner_text()

@pytest.mark.parametrize("size, scheme", VIEWS)
def test_the_storefront_changes_its_list_and_says_why(storefront, visit, size, scheme):
    v = visit(size, scheme); page = v.page
    page.goto(storefront); said(page, "The list took"); v.look()
    first = names(page)
    assert page.get_by_role("alert").is_hidden()
    assert len(first) == 10 and "Version 2" in page.locator("#version").inner_text() and "Level 3" in said(page, "Level")
    page.get_by_label("Words of its name").fill("article 17"); page.keyboard.press("Enter")
    page.locator("#hits", has_text="that have these words").wait_for()
    page.locator("#found").get_by_role("button", name="Article 17", exact=True).click()
    assert "ms" in said(page, "You looked at Article 17") and "a17" in page.locator("#facts").inner_text(); v.look()
    page.get_by_role("button", name="Add to cart", exact=True).click()
    told = said(page, "Article 17 is in the cart")
    assert "Level 0: full answer" in told and ("places are new" in told or "The list stayed" in told)
    assert names(page) != first and "Article 17" not in names(page) and page.locator("#cart li").count() == 1
    assert all(t.strip() for t in page.locator("#list .why").all_inner_texts()); v.look()
    second = names(page)[0]
    page.locator("#list button.add").first.click(); said(page, f"{second} is in the cart")
    page.get_by_role("button", name="Remove from cart: Article 17").click(); said(page, "Article 17 is out of the cart")
    page.get_by_role("button", name="Buy").click(); said(page, "Bought")
    assert page.locator("#empty").is_visible()
    page.get_by_label("A user of the shop").fill("c7"); page.keyboard.press("Enter")
    assert "Level 0" in said(page, "You are c7 now") and "before" in page.locator("#list").inner_text(); v.look()
    before = page.locator("#visitor").inner_text()
    page.get_by_role("button", name="Forget it").click(); said(page, "Level 3")
    assert page.locator("#visitor").inner_text() != before and page.locator("#list", has_text="before").count() == 0
    v.look()

def test_what_is_wrong_is_said_in_words_and_text_stays_text(storefront, visit):
    v = visit(); page = v.page
    page.goto(storefront); said(page, "The list took")
    page.get_by_label("Words of its name").fill("<img src=x onerror=alert(1)>"); page.keyboard.press("Enter")
    page.locator("#hits", has_text="Nothing has these words").wait_for()
    with pytest.raises(Exception, match="TrustedHTML|Trusted"): page.evaluate("document.body.innerHTML = '<b>x</b>'")
    v.wrong.clear()
    page.route("**/v1/recommend", lambda r: r.fulfill(status=503, content_type="application/json", body='{"error": {"code": "not_ready", "message": "the model is being loaded"}}'))
    page.get_by_role("button", name="Be that user").click()
    page.get_by_role("alert").filter(has_text="the model is being loaded").wait_for()
    page.unroute("**/v1/recommend"); v.wrong.clear()
    page.get_by_role("button", name="Be that user").click(); said(page, "You are a stranger")
    assert page.get_by_role("alert").is_hidden(); v.look()

# ---- why this list

@pytest.mark.parametrize("size, scheme", VIEWS)
def test_from_a_list_to_its_reasons_and_to_what_would_change_them(storefront, visit, size, scheme):
    v = visit(size, scheme); page = v.page
    page.goto(storefront)
    page.get_by_label("A user of the shop").fill("c7"); page.keyboard.press("Enter"); said(page, "You are c7 now")
    given = names(page)
    page.get_by_role("link", name="Why this list?").click()
    told = said(page, "sources proposed")
    listed = lambda: page.locator("#list .name").all_inner_texts()
    assert listed() == given and "Compared with what was given: the same items" in told
    assert page.locator("#sources tr").count() == int(told.split()[0]) and page.locator("#passed tr").count() == 10
    for summary in page.locator("#list summary").all()[1:3]: summary.click()
    assert page.locator("#list details[open] tbody tr").count() == 24; v.look()
    page.locator("#list").get_by_role("checkbox").first.focus(); page.keyboard.press("Space"); said(page, "places are new")
    assert page.evaluate("document.activeElement.checked")
    assert given[0] not in listed() and listed()[:9] == given[1:]
    price = page.get_by_role("slider", name=re.compile(f"price .*: {re.escape(given[1])}"))
    was = float(price.input_value())
    price.fill(str(was / 2)); page.locator("#list b", has_text=f"{was / 2:.2f}").wait_for()
    assert given[1] in page.locator("#list").inner_text(); v.look()
    page.get_by_label("Back in stock").fill("nothing of that name"); page.keyboard.press("Tab")
    page.get_by_role("alert").filter(has_text="no such item: nothing of that name").wait_for()
    v.wrong = [w for w in v.wrong if "400" not in w]
    page.get_by_label("Back in stock").fill("a3"); page.keyboard.press("Tab"); said(page, "places are new")
    page.locator("#n").fill("5"); page.locator("#told", has_text="; 5 are on the list").wait_for()
    assert len(listed()) == 5; v.look()
    page.locator("#diversity").fill("0.8"); said(page, "Rules touched")
    assert page.locator("#list", has_text="rule: diversity").count() == 1 and listed() != given[1:6]
    page.get_by_role("button", name="Back to how it was").click(); said(page, "the same items")
    assert listed() == given; v.look()

def test_a_list_that_nobody_was_given_is_said_to_be_unknown(storefront, visit):
    v = visit(); v.page.goto(storefront + "/why/never-given")
    v.page.get_by_role("alert").filter(has_text="no list with this id was given lately").wait_for()
    v.wrong = [w for w in v.wrong if "404" not in w]; v.look()
