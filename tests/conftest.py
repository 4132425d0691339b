"What holds for all tests: the settings of the file, not of the shell that runs them; no deadline that a busy machine would miss."
import json, os, re, shutil, signal, subprocess, time
from pathlib import Path
from types import SimpleNamespace

import hypothesis, pytest

for name in [n for n in os.environ if n.startswith("RECSYS_")]: del os.environ[name]

hypothesis.settings.register_profile("house", deadline=None, print_blob=True)
hypothesis.settings.load_profile("house")

def pytest_collection_modifyitems(items):
    "The tests of the daily cycle are long, and come first."
    items.sort(key=lambda i: "daily" not in i.fixturenames)

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Of several processes each takes whole files, and one all that want the daily cycle, which is long to make."
    from xdist.scheduler import LoadScopeScheduling
    wanting = {p.name for p in Path(__file__).parent.glob("test_*.py") if re.search(r"def \w+\(.*\bdaily\b", p.read_text(encoding="utf-8"))}
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = nodeid.partition("::")[0].rpartition("/")[2]
            return "daily" if name in wanting else name
    return ByFile(config, log)

@pytest.fixture(scope="session")
def daily(tmp_path_factory):
    "A small shop after a run that was killed half-way and gone on with: its folder, what was there after the kill, what the second run said, its figures, and a copy of all that."
    from shop import COMMAND, make_shop, recsys
    folder = make_shop(tmp_path_factory.mktemp("shop"))
    p = subprocess.Popen([COMMAND, "run"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in p.stdout:
        if line.startswith("features"): break
    time.sleep(2)   # the candidates notebook is at work now
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    steps = [d for d in (folder/"data/steps").iterdir()]
    half = {"steps": sorted(d.name.split("-")[0] for d in steps if not d.name.startswith(".")),
            "whole": all((d/"step.json").is_file() for d in steps if not d.name.startswith(".")),
            "remains": [d.name for d in steps if d.name.startswith(".")], "bundles": (folder/"data/bundles").exists()}
    second = recsys(folder, "run", "--allow-regression", "--json", "figures.json")
    assert second.returncode == 0, second.stdout + second.stderr
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("daily")/"shop", symlinks=True)
    return SimpleNamespace(folder=folder, half=half, second=second, figures=json.loads((folder/"figures.json").read_text()), copy=copy)

@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The documentation site of the repository, as `make docs` writes it."
    from shop import ROOT
    from recsys.operations.docs import write_docs
    return write_docs(ROOT, tmp_path_factory.mktemp("docs")/"site").parent
