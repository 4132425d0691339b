"The wheel, in an environment without the repository: what is in it, and that it runs from any folder."
import json, os, shutil, site, subprocess, sys, sysconfig, tarfile, zipfile
from pathlib import Path

import pytest

from recsys.operations.runner import STEPS

ROOT = Path(__file__).resolve().parent.parent
INTO = ("recsys", "nbs/jobs", "nbs/benchmarks", "settings.ini", "constraints.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE")

def call(*args, cwd, timeout=600, **env) -> subprocess.CompletedProcess:
    "Run a command as somebody who has no repository: nothing of ours on the path."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RECSYS_", "PYTHON"))}
    return subprocess.run(list(map(str, args)), cwd=cwd, capture_output=True, text=True, timeout=timeout, env=clean | env)

@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    "The files that a wheel is made of: building leaves traces, and not in the repository."
    tree = tmp_path_factory.mktemp("tree")
    for name in INTO:
        (tree/name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, tree/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else: shutil.copy(ROOT/name, tree/name)
    return tree

@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    made = call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", out, ".", cwd=tree)
    assert made.returncode == 0, made.stderr
    return next(out.glob("*.whl"))

@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """The `bin` of an environment with the wheel and what it depends on.

    The dependencies are those of this environment, reached by a path file: nothing is fetched, and an editable recsys is not found that way."""
    home = tmp_path_factory.mktemp("bare")/"venv"
    assert call(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent).returncode == 0
    into = Path(sysconfig.get_path("purelib", "venv", dict(base=home, platbase=home)))
    (into/"dependencies.pth").write_text("\n".join(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])))
    (home/"share/jupyter").mkdir(parents=True) # pip would put there what nbconvert brings along
    (home/"share/jupyter/nbconvert").symlink_to(Path(sys.prefix)/"share/jupyter/nbconvert")
    done = call(sys.executable, "-m", "pip", "--python", home/"bin/python", "install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=home.parent)
    assert done.returncode == 0, done.stderr
    return home/"bin"

def test_the_wheel_holds_what_a_run_needs(wheel):
    with zipfile.ZipFile(wheel) as z: inside = {n: z.read(n) for n in z.namelist()}
    for pattern in ("nbs/jobs/*.ipynb", "nbs/benchmarks/*.ipynb", "nbs/benchmarks/*.txt", "settings.ini", "constraints.txt"):
        found = sorted(ROOT.glob(pattern))
        assert found and all(inside[f"recsys/shipped/{p.relative_to(ROOT).as_posix()}"] == p.read_bytes() for p in found), pattern
    pages = [p for p in sorted((ROOT/"recsys/serving/pages").rglob("*")) if p.is_file()]
    assert {p.name for p in pages} >= {"storefront.html", "why.html", "style.css"} and all(inside.get(p.relative_to(ROOT).as_posix()) == p.read_bytes() for p in pages)
    assert "recsys/py.typed" in inside
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/"recsys").rglob("*.py")}
    assert modules == {n for n in inside if n.endswith(".py")}

def test_an_sdist_holds_what_the_wheel_needs(tree, tmp_path):
    "Files outside of packages get lost there easily."
    made = call(sys.executable, "-c", "from setuptools.build_meta import build_sdist; import sys; print(build_sdist(sys.argv[1]))", tmp_path, cwd=tree)
    assert made.returncode == 0, made.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as t: names = {n.split("/", 1)[-1] for n in t.getnames()}
    assert {p.relative_to(ROOT).as_posix() for pattern in ("nbs/jobs/*.ipynb", "nbs/benchmarks/*") for p in ROOT.glob(pattern) if p.name != ".notest"} <= names
    assert {"settings.ini", "constraints.txt", "setup.py", "recsys/py.typed"} <= names

def test_the_installed_command_answers_in_any_folder(bare, tmp_path):
    where = call(bare/"python", "-c", "import recsys; print(recsys.__file__)", cwd=tmp_path)
    assert str(bare.parent) in where.stdout, where.stdout + where.stderr
    said = call(bare/"recsys", "--help", cwd=tmp_path)
    assert said.returncode == 0 and "recommend" in said.stdout, said.stderr
    for what, read in (("rules", "from recsys.ranking.rules import read_rules as read"), ("experiments", "from recsys.serving.assignment import read_experiments as read")):
        example = call(bare/"recsys", "example", what, cwd=tmp_path)
        (tmp_path/"example.toml").write_text(example.stdout)
        found = call(bare/"python", "-c", f"{read}; print(read('example.toml'))", cwd=tmp_path)
        assert example.returncode == found.returncode == 0 and example.stdout.count("\n") > 20 and what in found.stdout.lower(), example.stderr + found.stderr
        (tmp_path/"example.toml").write_text("nonsense = 1")
        wrong = call(bare/"python", "-c", f"from recsys.core.settings import RecsysError\n{read}\ntry: read('example.toml')\nexcept RecsysError as e: print(e)", cwd=tmp_path)
        assert f"recsys example {what}" in wrong.stdout, wrong.stdout + wrong.stderr
    lost = call(bare/"recsys", "run", cwd=tmp_path)
    assert lost.returncode == 1 and "recsys init" in lost.stderr and len(lost.stderr.strip().splitlines()) == 1

def test_a_project_without_notebooks_runs_those_of_the_package(bare, tmp_path):
    shutil.copy(ROOT/"settings.ini", tmp_path)
    unknown = call(bare/"recsys", "job", "digest", cwd=tmp_path)
    jobs = ", ".join(sorted(p.stem for p in (ROOT/"nbs/jobs").glob("*.ipynb")))
    assert unknown.returncode == 1 and f"jobs: {jobs}" in unknown.stderr, unknown.stderr

@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_a_simulated_shop_runs_from_the_wheel_alone(bare, tmp_path):
    "Offline, in a folder with nothing in it: a network address that cannot be reached would be the first to fail."
    done = call(bare/"recsys", "run", "--dataset", "simulated", "--small", cwd=tmp_path, timeout=1500, PATH=f"{bare}:{os.environ['PATH']}", http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    assert done.returncode == 0 and "simulated" in done.stdout and "Better than the best baseline" in done.stdout, done.stdout + done.stderr
    shop = tmp_path/"simulated-shop-small"
    answer = call(bare/"recsys", "recommend", "--n", "5", "--json", cwd=shop)
    assert answer.returncode == 0 and len(json.loads(answer.stdout)["items"]) == 5, answer.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["simulated-shop-small"]
    again = call(bare/"recsys", "run", "--dataset", "simulated", "--small", cwd=tmp_path, timeout=600)
    assert again.returncode == 0 and again.stdout.count("unchanged, skipped") == len(STEPS), again.stdout + again.stderr
    other = call(bare/"recsys", "run", "--small", cwd=tmp_path)
    assert other.returncode == 1 and "--dataset simulated" in other.stderr
