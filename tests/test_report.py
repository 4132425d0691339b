"The pages: safe with any text, whole, readable by machines that read for people, and asking nothing of any host."
import json, re, subprocess, sys, xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import nbformat, nbformat.v4 as nb4, polars as pl, pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.operations.charts import DASHES, SERIES, bars, intervals, lines, overlay, waterfall
from recsys.operations.index import write_index
from recsys.operations.report import BLOCKS, PALETTE, cards, details, escape, headline, note, page, row, show, table, tame, to_html

EVIL = '<script>alert("x")</script><img src=https://evil.test/a.png onerror=f()> & \'q\' \x00\ud800 </title></style>'
VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}

class Outline(HTMLParser):
    "Tags balanced, headings, ids and every address that is not an own fragment, a relative page or data."
    def __init__(self, html):
        super().__init__(); self.open, self.headings, self.ids, self.tags, self.loads, self.wrong = [], [], [], [], [], []
        self.feed(html); self.close()
        if self.open: self.wrong.append(f"never closed: {self.open}")
    def _attrs(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for k, v in attrs:
            if k == "id": self.ids.append(v)
            if k.startswith("on"): self.wrong.append(f"{tag} {k}")
            if k in ("src", "srcset", "href", "xlink:href", "poster", "data", "action") and re.match(r"\s*(\w+:)?//|\s*javascript:", v
                    or "", re.I): self.loads.append((tag, v))
    def handle_starttag(self, tag, attrs):
        self._attrs(tag, attrs)
        if re.fullmatch("h[1-6]", tag): self.headings.append(int(tag[1]))
        if tag not in VOID: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self._attrs(tag, attrs)
    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.wrong.append(f"</{tag}> out of place")

def check(html: str, most: int = 300_000, hostile: bool = False) -> Outline:
    "What must be true of every page; `hostile` text may look like an address."
    seen = Outline(html)
    assert not seen.wrong and not seen.loads, (seen.wrong, seen.loads)
    assert hostile or not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//|url\(\s*[\"']?(?!data:|#)|@import", html, re.I)
    assert "script" not in {t for t, _ in seen.tags} and len(html.encode()) < most
    assert seen.headings[0] == 1
    assert seen.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(seen.headings, seen.headings[1:])), seen.headings
    assert len(seen.ids) == len(set(seen.ids)), "an id twice"
    names = [t for t, _ in seen.tags]
    assert all(names.count(t) == 1 for t in ("main", "header", "footer", "h1"))
    assert "title" in names
    assert dict(seen.tags)["html"]["lang"] == "en"
    for tag, attrs in seen.tags:
        if tag == "th": assert attrs.get("scope") in ("col", "row")
        if tag == "img": assert "alt" in attrs
        if tag == "svg": assert attrs.get("aria-hidden") == "true" or (attrs.get("role") == "img" and attrs.get("aria-label"))
    return seen

def shown(*blocks): return [nb4.new_output("display_data", data={"text/html": b.html, "text/plain": repr(b)}) for b in blocks]
def code(source, *blocks, outputs=()): return nb4.new_code_cell(source, outputs=[*outputs, *shown(*blocks)])
def stream(text, name="stdout"): return nb4.new_output("stream", name=name, text=text)

def convert(folder: Path, cells, title="Job", **more) -> str:
    (folder/"job.ipynb").write_text(nbformat.writes(nb4.new_notebook(cells=cells)), encoding="utf-8")
    return to_html(folder/"job.ipynb", folder/"out"/"job.html", title, [("All runs", "../../index.html")],
                   **more).read_text(encoding="utf-8")

def scores(n=3): return pl.DataFrame({"model <&>": [f"m{i}" for i in range(n)], "NDCG@10": [.1 + i/100 for i in range(n)],
                                      "low": [.09 + i/100 for i in range(n)], "high": [.11 + i/100 for i in range(n)]})
def windows(): return pl.DataFrame(dict(bin=["a", "b"]*4, share=[.5, .5, .2, .8]*2,
                                        window=["reference"]*2 + ["current"]*2 + ["reference"]*2 + ["current"]*2,
                                        feature=["f"]*4 + ["g"]*4))
def charts():
    s = scores()
    return [bars(s, "model <&>", "NDCG@10", "Upright"), bars(s, "NDCG@10", "model <&>", "Lying"),
            intervals(s, "model <&>", "NDCG@10", "low", "high", "With rule", rule=.1),
            waterfall(pl.DataFrame(dict(s=["all", "some", "more"], v=[1., .4, .5])), "s", "v", "Falls"),
            overlay(windows(), "bin", "share", "window", "Panels", facet="feature"),
            overlay(windows().head(4), "bin", "share", "window", "One"),
            lines(s.with_columns(k=pl.int_range(3)), "k", "NDCG@10", "model <&>", "Series", "low", "high"),
            lines(pl.DataFrame(dict(d=["2018-01-01", "2018-01-02"], y=[1., None])).with_columns(pl.col("d").str.to_date()), "d", "y", None,
                  "Days")]

# ---- blocks

def test_blocks_escape_and_balance():
    df = pl.DataFrame({EVIL.replace("\ud800", ""): [EVIL.replace("\ud800", ""), None], "n": [1.5, float("nan")]})
    blocks = [headline("bad", EVIL, EVIL), cards([(EVIL, EVIL, EVIL)]), table(df, EVIL, bars=["n"]), note(EVIL), details(EVIL, note(EVIL)),
              row(note(EVIL))]
    html = page(EVIL, "".join(b.html for b in blocks), [(EVIL, EVIL.replace("https://", ""))])
    check(html, hostile=True); html.encode("utf-8")
    assert "&lt;script&gt;" in html and "\x00" not in html

@settings(max_examples=40, deadline=None)
@given(st.text(), st.floats(), st.lists(st.text(), max_size=3))
def test_any_text_makes_a_sound_page(text, number, more):
    df = pl.DataFrame(dict(name=[text.encode("utf-8", "replace").decode()], n=[number]))
    html = page(text, headline("good", text, *more).html + cards([(text, number, text)]).html + table(df, text,
            bars=["n"]).html + details(text, note(text)).html)
    check(html, hostile=True); html.encode("utf-8")
    assert "\r" in text or re.sub(r"\s", "", escape(text)) in re.sub(r"\s", "", html)

def test_verdict_is_a_word_and_a_place_as_well_as_a_colour():
    seen = [headline(v, "s").html for v in ("good", "warning", "bad", "info")]
    assert len({re.sub(r"var\(--\w+\)|class=\"[^\"]*\"", "", h) for h in seen}) == 4
    assert all(w in h for w, h in zip(("Good", "Attention", "Problem", "Information"), seen))

def test_terminal_text():
    assert repr(headline("good", "Fine.", "because")) == "GOOD: Fine.\n  - because"
    assert repr(cards([("Rows", 1234, None)])) == "Rows: 1,234"
    assert "m0" in repr(table(scores(), "t")) and "<" not in repr(bars(scores(), "NDCG@10", "low", "t")).replace("<&>", "")

def test_table_cells_bars_and_limit():
    html = table(pl.DataFrame(dict(k=["a", "b"], v=[-1., 3.])), "c", {"v": "{:+.1f}"}, ["v"]).html
    assert '<td class="num">−1.0<span class="bar" aria-hidden="true"><span style="margin-left:0.0%;width:25.0%">' in html
    assert "margin-left:25.0%;width:75.0%" in html and '<th scope="row">a</th>' in html
    assert "5 more rows" in table(pl.DataFrame(dict(k=range(15))), "c", limit=10).html
    assert table(pl.DataFrame(dict(k=[])), "empty").html.count("<tr>") == 1

@pytest.mark.parametrize("call", [lambda: headline("fine", "x"), lambda: cards([("a", 1, "")]*7),
                                  lambda: table(scores(), "c", {"nope": "{}"}),
                                  lambda: table(scores(), "c", bars=["model <&>"]), lambda: table(scores(), "c", {"low": "{:d}"}),
                                  lambda: bars(scores(), "x", "low", "t"),
                                  lambda: bars(pl.DataFrame(dict(a=range(3000), b=range(3000))), "a", "b", "t"),
                                  lambda: overlay(windows().with_columns(window=pl.col("feature") + pl.col("window")), "bin", "share",
                                                  "window", "t")])
def test_foreseen_mistakes_are_one_line(call):
    with pytest.raises(RecsysError) as e: call()
    assert "\n" not in str(e.value) and e.value.todo

@pytest.mark.parametrize("value,text", [(None, "–"), (float("nan"), "–"), (float("inf"), "inf"), (-1234567, "−1,234,567"), (True, "yes"),
                                        (0, "0"), (1e-7, "1e-07"), ([1, None], "1, –")])
def test_show(value, text): assert show(value) == text

# ---- look

def _luminance(c):
    parts = [int(c[i:i+2], 16)/255 for i in (1, 3, 5)]
    return sum(w * (p/12.92 if p <= .04045 else ((p + .055)/1.055)**2.4) for w, p in zip((.2126, .7152, .0722), parts))
def _contrast(a, b): x, y = sorted((_luminance(a), _luminance(b))); return (y + .05)/(x + .05)
SCHEMES = [dict(re.findall(r"--([\w-]+):(#\w{6})", part)) for part in PALETTE.split("@media")]

@pytest.mark.parametrize("colours", SCHEMES, ids=["light", "dark"])
def test_contrast(colours):
    for ground in ("paper", "card"):
        assert all(_contrast(colours[t], colours[ground]) >= 4.5 for t in ("ink", "soft", "accent", "good", "warning", "bad", "info"))
        assert all(_contrast(colours[f"c{i}"], colours[ground]) >= 4.5 for i in range(1, 7)) # code is coloured with them too
    for v in ("good", "warning", "bad", "info"): assert _contrast(colours[v], colours[f"{v}-bg"]) >= 4.5 and _contrast(colours["ink"],
            colours[f"{v}-bg"]) >= 7

def _lab(rgb):
    x, y, z = (sum(m*c for m, c in zip(r, rgb)) / w for r,
               w in zip(((.4124, .3576, .1805), (.2126, .7152, .0722), (.0193, .1192, .9505)), (.9505, 1, 1.089)))
    f = lambda t: t**(1/3) if t > .008856 else 7.787*t + 16/116
    return 116*f(y) - 16, 500*(f(x) - f(y)), 200*(f(y) - f(z))

@pytest.mark.parametrize("colours", SCHEMES, ids=["light", "dark"])
@pytest.mark.parametrize("see", [((1, 0, 0), (0, 1, 0), (0, 0, 1)),
                                 ((.152286, 1.052583, -.204868), (.114503, .786281, .099216), (-.003882, -.048116, 1.051998)),
                                 ((.367322, .860646, -.227968), (.280085, .672501, .047413), (-.01182, .04294, .968881))],
                                 ids=["normal", "protan", "deutan"])
def test_first_three_colours_keep_apart_for_the_colour_blind(colours, see): # matrices: Machado et al. 2009, severity 1
    linear = lambda c: [p/12.92 if p <= .04045 else ((p + .055)/1.055)**2.4 for p in (int(c[i:i+2], 16)/255 for i in (1, 3, 5))]
    seen = [_lab([min(1, max(0, sum(m*c for m, c in zip(r, linear(colours[f"c{i}"]))))) for r in see]) for i in range(1, 4)]
    assert min(sum((a - b)**2 for a, b in zip(p, q))**.5 for i, p in enumerate(seen) for q in seen[:i]) > 15

def test_css_fits_the_promises():
    assert "prefers-color-scheme:dark" in PALETTE and len(DASHES) == len(SERIES) == len({str(d) for d in DASHES})
    assert set(re.findall(r"var\(--(c\d),(#\w{6})\)", "".join(SERIES))) == {(f"c{i}", SCHEMES[0][f"c{i}"]) for i in range(1, 7)}
    assert "auto-fit" in BLOCKS

# ---- charts

def test_charts_are_xml_with_words_and_no_fixed_ink():
    drawn = charts()
    for block in drawn:
        figure = ET.fromstring(block.html); svg = figure.find("{http://www.w3.org/2000/svg}svg")
        assert svg.get("role") == "img" and svg.get("aria-label") and svg.find("{http://www.w3.org/2000/svg}desc").text
        assert "font-family" not in block.html and "sans-serif" not in block.html and len(block.html) < 30_000
        paints = set(re.findall(r'(?:fill|stroke)="([^"]+)"', block.html)) - {"none", "transparent"}
        assert paints <= {"currentColor", *SERIES}, paints
    check(page("Charts", row(*drawn, *drawn[:1]).html))

def test_figures_in_pictures_are_the_figures():
    html = bars(pl.DataFrame(dict(k=["a", "b"], v=[.1234, -.5])), "v", "k", "t").html
    assert ">0.1234</text>" in html and ">−0.5</text>" in html and "<title>a 0.1234</title>" in html
    assert "0.121" in intervals(pl.DataFrame(dict(n=["m"], v=[.12149], l=[.1], h=[.13])), "n", "v", "l", "h", "t").html
    assert "0.400 (−0.600)" in waterfall(pl.DataFrame(dict(s=["a", "b"], v=[1., .4])), "s", "v", "t").html

@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.text(min_size=1, max_size=20), st.floats(-1e6, 1e6) | st.none() | st.just(float("nan"))), min_size=1,
                max_size=5), st.text(max_size=20))
def test_any_names_draw(rows, title):
    df = pl.DataFrame(dict(name=[t.encode("utf-8", "replace").decode() for t, _ in rows], v=[v for _, v in rows]),
                      schema=dict(name=str, v=pl.Float64))
    html = bars(df, "v", "name", title).html; ET.fromstring(html)
    assert "<script" not in html

def test_long_names_stay_apart_and_emoji_do_not_break_the_cut():
    df = pl.DataFrame(dict(k=["x"*30 + c for c in "ab"] + ["😀"*40, None], v=[1., 2., 3., 4.]))
    for block in (bars(df, "v", "k", "t"), bars(df, "k", "v", "t", color="k"), intervals(df, "k", "v", "v", "v", "t"),
                  waterfall(df, "k", "v", "t"), lines(df, "k", "v", "k", "t"),
                  overlay(df.with_columns(w=pl.lit("w" * 90)), "k", "v", "w", "t", facet="k")): ET.fromstring(block.html)
    assert bars(df, "v", "k", "t").html.count("<title>") == 4 and "(2)" in bars(df, "v", "k", "t").html

def test_no_rows_still_draw():
    none = pl.DataFrame(schema=dict(k=str, v=pl.Float64, w=str))
    for block in (bars(none, "v", "k", "t"), bars(none, "k", "v", "t", color="w"), intervals(none, "k", "v", "v", "v", "t"),
                  waterfall(none, "k", "v", "t"), lines(none, "k", "v", "w", "t"),
                  overlay(none, "k", "v", "w", "t"), overlay(none, "k", "v", "w", "t", facet="w"),
                  bars(pl.DataFrame(dict(k=["a"], v=[0])), "v", "k", "t")): ET.fromstring(block.html)

def test_dates_do_not_shift_with_the_time_zone():
    say = "import polars as pl, datetime as d; from recsys.operations.charts import lines;" \
          "print(lines(pl.DataFrame(dict(t=[d.date(2018,1,1), d.date(2018,1,2)], y=[1., 2.])), 't', 'y', None, 'x').html)"
    west, east = (subprocess.run([sys.executable, "-c", say], env={"TZ": tz, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
                                 check=True).stdout for tz in ("America/Los_Angeles", "Asia/Tokyo"))
    assert west == east and "Jan 1" in west and "Dec" not in west

def test_two_equal_charts_do_not_clip_each_other():
    html = "".join(b.html for b in charts())
    assert all(f'id="{used}"' in html for used in re.findall(r"url\(#(\w+)\)", html))

# ---- notebook to page

def test_page_of_a_job(tmp_path):
    html = convert(tmp_path, [nb4.new_markdown_cell("# Own title\n\nWhy <em>this</em>.\n\n# Second\n\n#### Deep\n\n"
                                                      "| a | b |\n|---|---|\n| 1 | 2 |"),
                              code("secret_code = 1 # </pre><script>", outputs=[stream("50%|###", "stderr"), stream("10 %\rdone <b>\n")]),
                              code("table()", table(scores(), "Scores")), code("chart", *charts()),
                              code("verdict", headline("good", "All is well."), cards([("Rows", 5, "")]))], title="Job <1>")
    check(html.replace("<th>", '<th scope="col">')) # markdown's own tables have no scope
    assert "Own title" not in html and "###" not in html and "done &lt;b&gt;" in html and "10 %" not in html
    at = [html.index(t) for t in ("All is well.", "Rows", "Why", "Scores", "How this was computed", "secret_code")]
    assert at == sorted(at)
    assert "Job &lt;1&gt;" in html and '<a href="../../index.html">All runs</a>' in html

def test_an_error_comes_first_and_escaped(tmp_path):
    failed = nb4.new_output("error", ename="RecsysError", evalue=EVIL.replace("\ud800", ""), traceback=["\x1b[31mTraceback\x1b[0m <x>"])
    html = convert(tmp_path, [nb4.new_markdown_cell("## Rows"), code("a()", headline("good", "So far fine.")),
                              code("boom()", outputs=[failed])])
    check(html, hostile=True)
    assert html.index("This job failed: RecsysError") < html.index("So far fine.")
    assert 'role="alert"' in html and "Traceback &lt;x&gt;" in html and "\x1b" not in html

def test_nothing_is_loaded(tmp_path):
    loads = nb4.new_output("display_data", data={"text/html":
        '<div onclick="f()" style="background:url(https://x.test/a)"><script src="https://x.test/v.js"></script>'
        '<style>@import "https://x.test/f.css"; p{background:url(//x.test/b)}</style><link rel=stylesheet href=https://x.test/c.css>'
        '<iframe src="https://x.test"></iframe><svg aria-hidden="true"><use href="https://x.test/s.svg#a"/></svg>'
        '<img alt="" srcset="https://x.test/2x"></div>'})
    widget = nb4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/html": "<b>bar</b>"})
    html = convert(tmp_path, [nb4.new_markdown_cell("![logo](https://x.test/logo.png) and <img src='https://x.test/b.gif' alt=''>"),
                              code("x", outputs=[loads, widget])])
    check(html)
    assert "x.test" not in html and "<b>bar</b>" not in html and 'alt="logo"' in html

@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["<img", " src=", "'//e.test/a'", '"https://e.test"', "https://e.test/x", ">", "</p>", "<p", " onload=f()",
                                 "<script>", "</script>", "<SCRIPT src=",
                                 "<a href=", "javascript:f()", " style=", "url(//e.test/y)", "<style>", "</style>", "@import '//e.test';",
                                 "text ", "<link ", "<svg ", "href=", "/>"]), max_size=14))
def test_tame_leaves_no_request(parts):
    seen = Outline(tame("".join(parts)))
    assert not [x for x in seen.loads if x[0] != "a" or x[1].strip().lower().startswith("javascript")]
    assert not [w for w in seen.wrong if " on" in w]
    assert not {"script", "link", "iframe"} & {t for t, _ in seen.tags}

def test_tame_changes_nothing_of_ours():
    ours = "".join(b.html for b in charts()) + table(scores(), "a & b").html + headline("bad",
            "1 < 2 > 0").html + '<style>p{color:red}</style>&nbsp;&#8209;'
    assert tame(ours) == ours

def test_a_link_may_stay(): assert tame('<a href="https://doi.org/10.1">paper</a>') == '<a href="https://doi.org/10.1">paper</a>'

def test_large_outputs_go_first(tmp_path):
    noise = nb4.new_output("display_data", data={"image/svg+xml": '<svg aria-hidden="true">' + "<g></g>"*400_000 + "</svg>"})
    html = convert(tmp_path, [code("a", outputs=[noise]), code("b", note("the small one")), code("c", outputs=[stream("x"*1_000_000)])])
    check(html); assert "left out here" in html and "the small one" in html and "more characters are in the notebook" in html

@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"cells": 5}', "\xff\xfe"])
def test_no_notebook_is_one_line_and_the_old_page_stays(tmp_path, content):
    if content is not None: (tmp_path/"job.ipynb").write_text(content, encoding="latin-1")
    (tmp_path/"job.html").write_text("old")
    with pytest.raises(RecsysError) as e: to_html(tmp_path/"job.ipynb", tmp_path/"job.html", "Job", [])
    assert "\n" not in str(e.value) and (tmp_path/"job.html").read_text() == "old" and len(list(tmp_path.iterdir())) <= 2

def test_the_same_notebook_gives_the_same_bytes(tmp_path):
    cells = [code("x", *charts()[:2], headline("good", "Fine."))]
    assert convert(tmp_path, cells) == convert(tmp_path, cells)

def test_imports_stay_light():
    heavy = "('altair', 'nbconvert', 'vl_convert', 'jupyterlab', 'IPython', 'pandas')"
    say = f"import sys, recsys.operations.charts, recsys.operations.index; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True).stdout.strip() == "[]"

def test_papermill_through_to_the_page(tmp_path):
    import papermill
    source = ["from recsys.operations.report import headline, note", "rows = 5",
              "import sys; print('secret bar', file=sys.stderr); note(f'{rows} rows')", "headline('good', 'Done.')", "1/0"]
    cells = [nb4.new_code_cell(s) for s in source]; cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(nb4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="p", language="python"))),
                   tmp_path/"in.ipynb")
    with pytest.raises(papermill.PapermillExecutionError):
        papermill.execute_notebook(str(tmp_path/"in.ipynb"), str(tmp_path/"job.ipynb"), dict(rows=7), progress_bar=False)
    html = to_html(tmp_path/"job.ipynb", tmp_path/"job.html", "Job", []).read_text()
    check(html)
    assert "This job failed: ZeroDivisionError" in html and "7 rows" in html and "secret bar" not in html.split("How this was computed")[0]
    assert "An Exception was encountered" not in html and "<caption>Parameters</caption>" in html and '<a href="job.ipynb">' in html
    (tmp_path/"ok.ipynb").write_text(re.sub(r"1/0", "pass", (tmp_path/"in.ipynb").read_text()))
    papermill.execute_notebook(str(tmp_path/"ok.ipynb"), str(tmp_path/"job.ipynb"), dict(rows=7), progress_bar=False)
    assert "This job failed" not in to_html(tmp_path/"job.ipynb", tmp_path/"job.html", "Job", []).read_text()

# ---- index

def fact(v): return dict(value=v, low=v - .01, high=v + .01)
def run(day, **more): return dict(dict(date=day, dataset="demo <shop>", simulated="simulated <log>", status="ok",
                                       headline=dict(verdict="good", sentence=f"Fine on {day}."), version="1",
                                       started="2018-01-01T04:00:00Z",
    seconds=75.5, peak_rss_mb=900.4, rows=1_234_567, quarantined=12,
    steps=[dict(name="ingest", status="skipped", seconds=1, peak_rss_mb=90.2, page="ingest.html"),
           dict(name="train", status="done", seconds=70.25, peak_rss_mb=900, page="gone.html")],
    metrics={q: {"ndcg@10": fact(.12), "recall@10": fact(.3)} for q in ("next_purchase", "new_to_the_customer")},
    baselines={"next_purchase": {"popular": {"ndcg@10": fact(.05)}, "bought before": {"NDCG@10": fact(.1)}}},
    waterfall={"next_purchase": [dict(stage="all", recall=1), dict(stage="candidates", recall=.6)]},
    drift=dict(verdict="warning", sentence="One moved.", material=["price"])), **more)

def put(folder, day, content):
    (folder/"runs"/day).mkdir(parents=True, exist_ok=True); (folder/"runs"/day/"ingest.html").write_text("page")
    (folder/"runs"/day/"run.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

def index(folder): return write_index(folder).read_text(encoding="utf-8")

def test_index_without_runs(tmp_path):
    html = index(tmp_path/"reports"); check(html); assert "No run has been recorded yet" in html

def test_index_with_one_run(tmp_path):
    put(tmp_path, "2018-01-01", run("2018-01-01")); html = index(tmp_path); check(html)
    for text in ("Fine on 2018-01-01.", "0.120", "best baseline 0.100, bought before", "1,234,567", "0.110 to 0.130",
                 "1 input moved materially", "76 s", "simulated &lt;log&gt;", "demo &lt;shop&gt;",
                 '<a href="runs/2018-01-01/ingest.html">ingest</a>', "where purchases get lost", "skipped"): assert text in html, text
    assert "gone.html" not in html and "over the runs" not in html

def test_index_with_three_runs_one_broken_one_partial(tmp_path):
    put(tmp_path, "2018-01-01", run("2018-01-01")); put(tmp_path, "2018-01-02", '{"rows": '); put(tmp_path, "2018-01-03",
            dict(status="failed", steps=[dict(name="train <x>", status="failed")]))
    html = index(tmp_path); check(html)
    assert "The run failed at train &lt;x&gt;." in html and "runs/2018-01-02/run.json cannot be shown" in html
    assert html.index("The run failed at") < html.index("2018-01-02/run.json") < html.index("Fine on 2018-01-01.")

def test_index_trends_and_size(tmp_path):
    for d in range(1, 29):
        put(tmp_path, f"2018-01-{d:02d}", run(f"2018-01-{d:02d}", drift=dict(material=["x"]*(d % 3)))); put(tmp_path, f"2018-02-{d:02d}",
                run(f"2018-02-{d:02d}"))
    html = index(tmp_path); check(html)
    assert "NDCG@10 over the runs" in html
    assert "Inputs that moved materially" in html
    assert html.index("2018-02-28") < html.index("2018-01-01")

def test_a_broken_newest_run_is_said_first(tmp_path):
    put(tmp_path, "2018-01-01", run("2018-01-01")); put(tmp_path, "2018-01-02", "[1]")
    html = index(tmp_path); check(html); assert html.index("2018-01-02/run.json cannot be shown") < html.index("Fine on 2018-01-01.")

@pytest.mark.parametrize("content", ["", "null", "[]", '"x"', "NaN", '{"steps": 5}', '{"metrics": {"q": 3}}', '{"rows": "many"}',
                                     '{"steps": [null]}', "\x00", '{"a":' * 3000])
def test_broken_run_files_are_a_line(tmp_path, content):
    put(tmp_path, "2018-01-01", content); html = index(tmp_path); check(html)
    assert html.count("runs/2018-01-01/run.json cannot be shown") == 1

def test_links_only_to_pages_inside(tmp_path):
    put(tmp_path/"r", "2018-01-01", run("2018-01-01",
                                        steps=[dict(name=f"s{i}", page=p) for i,
                                               p in enumerate(("../../../outside.html", "/etc/hostname", "javascript:f()",
                                                       "https://x.test/", "a\0b", "", "x"*5000))]))
    (tmp_path/"outside.html").write_text("x"); (tmp_path/"r"/"runs"/"2018-01-01"/"odd name#1?.html").write_text("x")
    html = index(tmp_path/"r"); seen = check(html)
    assert [a.get("href") for t, a in seen.tags if t == "a"] == ["#main"]
    put(tmp_path/"r", "2018-01-01", run("2018-01-01", steps=[dict(name="s", page="odd name#1?.html")]))
    assert 'href="runs/2018-01-01/odd%20name%231%3F.html"' in index(tmp_path/"r")

leaf = st.none() | st.text(max_size=8) | st.floats() | st.integers(-5, 5) | st.booleans()
@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.generate),
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(list(run("x"))), leaf), st.sets(st.sampled_from(list(run("x")))))
def test_any_run_file_makes_a_page(tmp_path, odd, missing):
    whole = {k: v for k, v in run("2018-01-01").items() if k not in missing} | odd
    put(tmp_path, "2018-01-01", json.dumps(whole)); put(tmp_path, "2018-01-02", run("2018-01-02")); check(index(tmp_path))
