"The documentation site: every link leads somewhere, also into the middle of a page; every page is whole and asks nobody."
import re, shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from recsys.core.settings import RecsysError
from recsys.operations.cli import parser
from recsys.operations.docs import documents, write_docs
from test_report import Outline

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope="module")
def pages(site): return {p.relative_to(site).as_posix(): p.read_text(encoding="utf-8") for p in sorted(site.rglob("*.html"))}

def test_every_notebook_and_guide_has_a_page_that_the_first_one_lists(pages):
    sources = [*ROOT.glob("nbs/[0-9]_*/*.ipynb"), *(p for d in ("tutorials", "jobs", "benchmarks") for p in ROOT.glob(f"nbs/{d}/*.ipynb")), *ROOT.glob("nbs/docs/*.md")]
    assert len(pages) == len(sources) + 3
    assert {"guides/architecture.html", "guides/handbook.html", "guides/glossary.html", "guides/upgrade.html", "contributing.html", "deploy.html"} < set(pages)
    listed = {unquote(h) for h in re.findall(r'href="([^"#]+)"', pages["index.html"])}
    assert set(pages) - listed == {"index.html"}

def test_no_link_is_dead(pages):
    ids, dead = {name: set(re.findall(r'\bid="([^"]*)"', html)) for name, html in pages.items()}, []
    for name, html in pages.items():
        for href in re.findall(r'<a\b[^>]*?\shref="([^"]*)"', html):
            if re.match(r"https?://|mailto:", href): continue
            path, _, part = href.partition("#")
            target = (Path("/")/Path(name).parent/unquote(path)).resolve().relative_to("/").as_posix() if path else name
            if target not in pages or part and unquote(part) not in ids[target]: dead.append(f"{name}: {href}")
    assert dead == []

def test_every_page_is_whole_small_and_asks_nobody(pages):
    for name, html in pages.items():
        seen = Outline(html)
        assert not seen.wrong and [t for t, _ in seen.loads if t != "a"] == [], (name, seen.wrong, seen.loads)
        assert seen.headings[0] == 1 and seen.headings.count(1) == 1 and all(b <= a + 1 for a, b in zip(seen.headings, seen.headings[1:])), (name, seen.headings)
        assert len(seen.ids) == len(set(seen.ids)) and not {"script", "iframe"} & {t for t, _ in seen.tags}, name
        assert [a for t, a in seen.tags if t == "th" and a.get("scope") not in ("col", "row")] == [], name
        assert len(html.encode()) < 1_500_000 and str(ROOT) not in html, name

def test_every_kind_of_alert_is_in_the_handbook():
    text = (ROOT/"nbs/docs/handbook.md").read_text(encoding="utf-8")
    decisions = pytest.importorskip("recsys.operations.decisions", reason="there are no decisions yet")
    for kind in decisions.KINDS: assert f"\n| {kind} | " in text
    keys = {k for p in (ROOT/"recsys").rglob("*.py") for k in re.findall(r'\bAlert\("([^"]+)"', p.read_text(encoding="utf-8"))}
    assert keys >= {"release:gate", "release:trial"}
    for key in keys: assert f"\n| {key} | " in text, key
    for action in decisions.ACTIONS: assert re.search(rf"\n\| {action.replace('_', ' ')}\b", text), action

GUIDES = [*sorted(ROOT.glob("nbs/docs/*.md")), ROOT/"CONTRIBUTING.md", ROOT/"deploy/README.md", ROOT/"README.md"]
STANDS_FOR = {"N": "5", "DAY": "2026-03-01", "FROM": "2026-03-01", "TO": "2026-03-05"} # other words in capitals may stay: they are texts

def commands(text: str, inline: bool = True) -> list[list[str]]:
    "Arguments of each `recsys ...` in the fenced blocks of a page and in its lines."
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    lines = [l for b in blocks for l in b.replace("\\\n", " ").splitlines()] + (re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)) if inline else [])
    said = [m[1] for l in lines if (m := re.match(r"(?:RECSYS_\w+=\S+ )*(?:\S*/)?recsys((?: .*)?)$", l.strip()))]
    return [[STANDS_FOR.get(w, w) for w in shlex.split(s.removesuffix("&").partition(" > ")[0], comments=True)] for s in said]

def wrong(args: list[str]) -> bool:
    try: parser().parse_args(args)
    except (SystemExit, RecsysError) as e: return getattr(e, "code", 1) != 0
    return False

@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_of_a_guide_can_be_typed_as_it_stands(path):
    "Of the README those in its blocks: in its lines it also names commands without all that they need."
    found = [c for c in commands(path.read_text(encoding="utf-8"), path.name != "README.md" or path.parent != ROOT) if c]
    assert [" ".join(c) for c in found if wrong(c)] == []
    assert found or path.name in ("glossary.md", "architecture.md", "CONTRIBUTING.md")

def test_commands_that_do_not_exist_are_found_in_blocks_and_in_lines():
    text = "an alert: `recsys label ID true`, `recsys label alarm ID true`\n\n```sh\n.venv/bin/recsys serve --port 8081 &\nRECSYS_RUN_SEED=7 recsys run --once # a comment\nrecsys rules \\\n  F.toml --users N\n```\n"
    assert [(c[0], wrong(c)) for c in commands(text)] == [("serve", False), ("run", True), ("rules", False), ("label", True), ("label", False)]

def test_a_dead_link_stops_the_build_and_leaves_the_site_as_it_was(tmp_path):
    root = tmp_path/"root"
    for name, text in {"nbs/index.ipynb": '{"cells": []}', "CONTRIBUTING.md": "# A", "deploy/README.md": "# B", "nbs/docs/a.md": "# C\n\nsee [b](b.md)"}.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True); (root/name).write_text(text)
    with pytest.raises(RecsysError, match="a link to b.md, which does not exist"): write_docs(root, tmp_path/"site")
    assert not (tmp_path/"site").exists()
    (root/"nbs/docs/b.md").write_text("# D\n\n> <script>alert(1)</script> [x](javascript:alert(1)) end")
    write_docs(root, tmp_path/"site")
    assert (tmp_path/"site/guides/b.html").exists() and not re.search(r"<script|href=.javascript:", "".join(p.read_text() for p in (tmp_path/"site").rglob("*.html")))
    (root/"nbs/docs/a.md").unlink(); write_docs(root, tmp_path/"site")
    assert not (tmp_path/"site/guides/a.html").exists() and [d.title for d in documents(root)] == ["index", "D", "A", "B"]
