"The pages in a real browser: on a phone and a desk, in light and dark; nothing fails, nothing leaves the machine, nothing is unreadable or without a name."
import re, shutil

import pytest

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
    links = v.page.locator("main table").first.locator("tbody th a").all_inner_texts()
    assert {"ingest", "drift", "evaluate", "publish"} <= set(links)
    for name in links if (size, scheme) in (("phone", "dark"), ("desk", "light")) else ["drift"]: # each page in both sizes and both schemes
        v.page.get_by_role("link", name=name, exact=True).first.click()
        assert v.page.url.endswith(f"/{name}.html")
        for summary in v.page.locator("main > details > summary, .shown > details > summary").all(): summary.click()
        v.look()
        v.page.get_by_role("navigation", name="Path").get_by_role("link").first.click()
        assert v.page.url.endswith("/index.html")

def test_a_page_is_walked_by_keyboard(daily, visit):
    v = visit("desk", "light")
    v.page.goto((daily.copy/"reports/index.html").as_uri())
    v.page.keyboard.press("Tab")
    assert v.page.evaluate("document.activeElement.textContent") == "Skip to the content"
    v.page.keyboard.press("Enter")
    v.page.keyboard.press("Tab")
    assert v.page.evaluate("document.querySelector('main').contains(document.activeElement)")
    v.look()
