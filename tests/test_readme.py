"Every line of code in the README and the guides is executed, as somebody would type it."
import os, re, shutil, signal, socket, subprocess, sys
from datetime import datetime, timezone
from pathlib import Path

import polars as pl, pytest

from recsys.core.settings import load_settings
from recsys.features.build import day_of, read_moments
from recsys.operations.alerts import Alert, raise_alert
from recsys.operations.runner import bundles_folder, steps_folder
from recsys.serving.bundle import write_bundle
from shop import ROOT

TEXT = (ROOT/"README.md").read_text(encoding="utf-8")
blocks = lambda language, text=TEXT: re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
MAKE = re.compile(r"^make (run|test)\b.*\n", re.M) # the second is what runs this; the first is `recsys run`, which made the shop here
VERSION, ALERT = "20180101-3f2a91bc", "3f2a"      # as the README calls a version and an alert

@pytest.fixture(scope="module")
def project(daily, tmp_path_factory):
    "A function that copies a project after its daily run, with its environment inside."
    if not (Path(sys.prefix)/"bin/activate").exists(): pytest.skip("these tests do not run in a virtual environment")
    def one():
        folder = shutil.copytree(daily.copy, tmp_path_factory.mktemp("readme")/"project", symlinks=True)
        (folder/".venv").symlink_to(sys.prefix)
        return folder
    return one

@pytest.fixture(scope="module")
def shop(project):
    "A project with what the README takes for granted: the files of a shop, a second version, an alert."
    folder = project()
    (folder/"shop").mkdir()
    for name, text in zip(("events.csv", "articles.csv"), blocks("csv")): (folder/"shop"/name).write_text(text)
    s = load_settings(folder/"settings.ini")
    at = {n: max(steps_folder(s).glob(f"{n}-*"), key=os.path.getmtime) for n in ("features", "candidates", "train")}
    day = day_of(read_moments(at["features"]).now)
    write_bundle(bundles_folder(s), VERSION, [at["features"]/day, at["candidates"]/day], at["train"]/"ranker.txt", pl.read_parquet(at["features"]/"catalogue.parquet"),
                 pl.read_parquet(at["features"]/"users.parquet")["user_id"], dict(moment=day))
    return folder, raise_alert(s, Alert("data:price", "warning", "prices moved", "look", "", day, source="decisions", asks=True), datetime.now(timezone.utc)).id

def typed(folder: Path, lines: str, env: dict = {}, timeout: int = 300) -> subprocess.CompletedProcess:
    "Lines typed into a shell, after the environment was activated; it ends at the first that fails."
    return subprocess.run(["sh", "-e", "-c", f". .venv/bin/activate\n{lines}"], cwd=folder, capture_output=True, text=True, timeout=timeout, env=os.environ | env)

def block(word: str) -> str:
    "The only block of the README with this word."
    found, = (b for b in blocks("sh") if word in b)
    return MAKE.sub("", found)

def test_no_block_is_left_out():
    words = ["make run", "recsys recommend", "recsys serve &", "init shop --run", "example rules", "example experiments", "recsys releases", "recsys status"]
    assert len(blocks("sh")) == len(words) and all(block(w) is not None for w in words) and len(blocks("python")) == 1

def test_a_list_in_the_terminal(shop):
    done = typed(shop[0], block("recsys recommend"))
    assert done.returncode == 0 and "sources" in done.stdout, done.stdout + done.stderr

@pytest.mark.skipif(not shutil.which("curl"), reason="curl is missing: apt-get install curl")
def test_the_service_and_its_client(shop):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = str(s.getsockname()[1])
    here = lambda text: text.replace("8080", port)
    p = subprocess.Popen(["sh", "-e", "-c", f". .venv/bin/activate\n{here(block('recsys serve &'))}"], cwd=shop[0], stdout=subprocess.PIPE, start_new_session=True, env=os.environ | dict(RECSYS_SERVING_PORT=port))
    try:
        said = ""
        while not re.search(r'^\{.*\}\Z', said, re.M): said += (more := os.read(p.stdout.fileno(), 1 << 16).decode()); assert more, said
        assert '"error"' not in said and '"request_id"' in said and len(re.findall('"rank":', said)) == 10, said
        exec(here(blocks("python")[0]) + "\nlist_ = shop.recommend(visitor_id='v7', n=10)", made := {})
        assert "1082185" not in [i["item_id"] for i in made["list_"]["items"]] and len(made["list_"]["items"]) == 10
    finally: os.killpg(p.pid, signal.SIGTERM); p.wait(30)

def test_a_first_list_from_the_files_of_the_readme(shop):
    done = typed(shop[0], block("init shop --run"))
    assert done.returncode == 0 and "Kettle" in done.stdout, done.stdout + done.stderr

def test_rules_and_experiments(shop):
    folder, _ = shop
    done = typed(folder, block("example rules"))
    assert done.returncode == 0 and "lists of version" in done.stdout, done.stdout + done.stderr
    done = typed(folder, block("example experiments"), dict(RECSYS_EXPERIMENTS_FILE="shop/experiments.toml"))
    assert "nothing wrong" in done.stdout and "0-500" in done.stdout, done.stdout + done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "attention-first" in done.stderr, "nobody has been shown anything yet, which is said in a line"

def test_releases(shop):
    done = typed(shop[0], block("recsys releases"))
    assert done.returncode == 0 and done.stdout.count(VERSION) > 1, done.stdout + done.stderr

def test_what_a_person_says(shop):
    folder, alert = shop
    done = typed(folder, block("recsys status").replace(f"approve {ALERT}", f"approve {alert}"))
    assert done.returncode == 0 and "prices moved" in done.stdout, done.stdout + done.stderr

@pytest.mark.parametrize("guide", ["nbs/docs/handbook.md", "nbs/docs/upgrade.md"])
def test_the_blocks_of_the_guides(project, guide):
    found, folder = blocks("sh", (ROOT/guide).read_text(encoding="utf-8")), project()
    assert found
    for lines in found:
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); lines = MAKE.sub("", lines).replace("8081", str(s.getsockname()[1]))
        if " serve" not in lines:
            done = typed(folder, lines)
            if "recsys run" in lines: assert done.returncode == 2 and "no better than the best baseline" in done.stderr, "this shop is too small for more: " + done.stdout + done.stderr
            else: assert done.returncode == 0, done.stdout + done.stderr
            continue
        p = subprocess.Popen(["sh", "-e", "-c", lines], cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try: assert p.stdout.readline().startswith("serving ")
        finally: os.killpg(p.pid, signal.SIGTERM); p.wait(30)

def test_the_editing_loop_of_contributing(tmp_path):
    "But for `make`, whose targets are what CI runs, and JupyterLab, which would wait for somebody."
    edit = blocks("sh", (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8"))[-1].replace(" && make prepare", " && nbdev-clean && nbdev-export")
    for name in ("nbs", "recsys"): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"pyproject.toml", tmp_path); shutil.copy(ROOT/"settings.ini", tmp_path)
    (tmp_path/".venv").symlink_to(sys.prefix)
    done = subprocess.run(["sh", "-e", "-c", edit], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout + done.stderr
    assert [p for p in (tmp_path/"recsys").rglob("*.py") if p.read_bytes() != (ROOT/p.relative_to(tmp_path)).read_bytes()] == []
