"The house itself: walls between wings, doors that open fast, versions that agree, a README that is true."
import ast, fnmatch, json, os, re, resource, shutil, subprocess, sys, sysconfig, tomllib
from collections import Counter
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest, yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from recsys.core.settings import load_settings
from recsys.data.ingest import ingest
from recsys.operations.readme import make_readme, readme_text

ROOT = Path(__file__).resolve().parent.parent
WINGS = "core data features candidates ranking serving evaluation monitoring experiments operations".split()
TOP = """nbs recsys reports tests settings.ini environment.yml README.md pyproject.toml setup.py Makefile constraints.txt LICENSE CONTRIBUTING.md deploy
    .ci .git .github .gitignore .gitattributes .pre-commit-config.yaml""".split()
MODULES = sorted(p for p in (ROOT/"recsys").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ids = lambda p: p.relative_to(ROOT).as_posix()

@cache
def tracked() -> list[Path]:
    "The files of the project: what git tracks or would add; without git, what .gitignore lets pass."
    try:
        out = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                             capture_output=True, text=True, check=True).stdout
        found = [ROOT/f for f in out.split("\0") if f]
    except (OSError, subprocess.CalledProcessError):
        rules = (ROOT/".gitignore").read_text().split()
        hidden = lambda p: any(fnmatch.fnmatch(x, r.rstrip("/")) for r in rules for x in (p.as_posix(), *p.parts)) or "reports/runs" in p.as_posix()
        found = [p for p in ROOT.rglob("*") if p.relative_to(ROOT).parts[0] not in (".git", ".venv") and not hidden(p.relative_to(ROOT))]
    return sorted(p for p in found if p.is_file())

def cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding="utf-8"))["cells"]

def default_exp(path: Path) -> str | None:
    found = [m[1] for c in cells(path) if c["cell_type"] == "code" for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", "".join(c["source"]), re.M)]
    assert len(found) < 2, f"{ids(path)} has {len(found)} default_exp"
    return found[0] if found else None

# ---- versions

PROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(r) for r in PROJECT["dependencies"] + sum(EXTRAS.values(), [])]
PINS = [l.split("#")[0].strip() for l in (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines() if l.split("#")[0].strip()]
PINNED = {canonicalize_name(p.partition("==")[0]): p.partition("==")[2] for p in PINS}

def test_constraints_pin_each_package_once():
    assert [p for p in PINS if not re.fullmatch(r"[\w.-]+==[\w.!+]+", p)] == []
    assert [n for n, k in Counter(canonicalize_name(p.partition("==")[0]) for p in PINS).items() if k > 1] == []

def test_every_dependency_is_pinned_as_the_project_allows():
    names = [canonicalize_name(r.name) for r in DIRECT]
    assert [n for n, k in Counter(names).items() if k > 1] == []
    assert [n for n in names if n not in PINNED] == []
    assert [str(r) for r in DIRECT if not r.specifier.contains(PINNED[canonicalize_name(r.name)], prereleases=True)] == []

def test_torch_is_the_one_release_that_has_a_cpu_build_at_hand():
    assert [str(r) for r in DIRECT if r.name == "torch"] == ["torch==2.13.0"] and PINNED["torch"] == "2.13.0"
    assert metadata.version("torch").split("+")[0] == "2.13.0"

@pytest.mark.parametrize("name", sorted(canonicalize_name(r.name) for r in DIRECT))
def test_what_is_installed_is_what_is_pinned(name): assert metadata.version(name).split("+")[0] == PINNED[name]

def test_every_pin_works_with_the_oldest_python_that_is_promised():
    "Debian 12 has 3.11.2: a pin that wants a later patch release ends `make setup` there, and nowhere else."
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    wants = {d.name: d.metadata.get("Requires-Python") for d in metadata.distributions() if canonicalize_name(d.name) in PINNED}
    assert len(wants) > 100 and [f"{n} {w}" for n, w in wants.items() if w and oldest not in SpecifierSet(w)] == []

def test_everything_that_gets_installed_is_pinned():
    todo, seen, loose = [(r.name, frozenset(r.extras)) for r in DIRECT], set(), set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen: continue
        seen.add((name, extras))
        # a CUDA build of torch brings packages of its own
        if canonicalize_name(name) not in PINNED and not re.match("nvidia|cuda|triton", name): loose.add(name)
        try: needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        for r in map(Requirement, needs):
            if r.marker is None or any(r.marker.evaluate(dict(extra=e)) for e in extras | {""}): todo.append((r.name, frozenset(r.extras)))
    assert sorted(loose) == []

def test_conda_installs_the_same():
    env = yaml.safe_load((ROOT/"environment.yml").read_text(encoding="utf-8"))
    assert env["name"] == PROJECT["name"]
    python, = [d for d in env["dependencies"] if isinstance(d, str) and d.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.partition("=")[2] + ".0")
    assert any(c.endswith(f":: {python.partition('=')[2]}") for c in PROJECT["classifiers"])
    pip, = [d["pip"] for d in env["dependencies"] if isinstance(d, dict)]
    assert pip == ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]
    assert f"-c constraints.txt -e '.[{','.join(EXTRAS)}]'" in (ROOT/"Makefile").read_text(encoding="utf-8")

# ---- walls

def imports(path: Path, inside: bool = True):
    "Names of the modules that `path` imports, relative ones resolved; `inside` functions too or only when it is loaded."
    package, todo = path.relative_to(ROOT).with_suffix("").parts[:-1], [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if not inside and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) + 1 - node.level], *([node.module] if node.module else [])]) if node.level else node.module
            yield base
            yield from (f"{base}.{a.name}" for a in node.names)

@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_a_wing_imports_only_itself_and_earlier_wings(path):
    rank = WINGS.index(path.relative_to(ROOT).parts[1])
    own = [n.split(".")[1] for n in imports(path) if n.startswith("recsys.")]
    assert [w for w in own if WINGS.index(w) > rank] == []

# what each may import at its top; build only imports fit
TRAINING_ROOMS = {"recsys/candidates/vectors.py": {"torch"}, "recsys/candidates/fit.py": {"torch", "pytorch_lightning"},
                  "recsys/candidates/attention.py": {"torch"}, "recsys/candidates/attention_fit.py": {"torch", "pytorch_lightning"},
                  "recsys/candidates/build.py": set()}
HEAVY = set("""torch pytorch_lightning lightning torchmetrics shap lightgbm altair implicit faiss jupyter jupyterlab jupyter_server nbconvert papermill
    IPython ipykernel pandas sklearn matplotlib vl_convert feast dask redis pyspark pymilvus milvus_lite""".split())

@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_no_module_loads_a_heavy_library_at_its_top(path):
    assert {n.split(".")[0] for n in imports(path, inside=False)} & HEAVY <= TRAINING_ROOMS.get(ids(path), set())

def python(code: str, *args: str) -> str:
    run = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout

def test_rooms_that_do_not_train_load_nothing_heavy_through_others_either():
    "All of the serving wing and of the command line among them."
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if ids(p) not in TRAINING_ROOMS]
    out = python("import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(n)\nprint(*{m.split('.')[0] for m in sys.modules})", *names)
    assert set(out.split()) & HEAVY == set()

def test_what_is_imported_is_declared():
    "A package that only some other package brings may go away with the next version of that one. An extra may be missing: functions only."
    names = lambda requirements: {canonicalize_name(Requirement(r).name) for r in requirements}
    always, extras = names(PROJECT["dependencies"]), names(sum((v for k, v in EXTRAS.items() if k != "dev"), []))
    owners, loose = metadata.packages_distributions(), {}
    for path in MODULES:
        for inside, declared in ((True, always | extras), (False, always)):
            for top in {n.split(".")[0] for n in imports(path, inside)} - set(sys.stdlib_module_names) - {"recsys"}:
                if not {canonicalize_name(d) for d in owners.get(top, [])} & declared: loose.setdefault(top, set()).add(ids(path))
    assert loose == {}

UNSAFE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}

@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_nothing_that_is_read_can_run(path):
    "No eval, no exec, no pickle, whether by name or inside numpy.load and torch.load."
    assert {n.split(".")[0] for n in imports(path)} & UNSAFE == set()
    for call in (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
        f, said = call.func, {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert not (isinstance(f, ast.Name) and f.id in ("eval", "exec")), f"line {call.lineno}: {f.id}"
        assert said.get("allow_pickle", "False") == "False", f"line {call.lineno}: allow_pickle"
        if isinstance(f, ast.Attribute) and ast.unparse(f) == "torch.load": assert said.get("weights_only") == "True", f"line {call.lineno}: torch.load"

def test_the_command_line_answers_at_once():
    "CPU seconds of the second of two calls: the first may have to compile."
    command = Path(sysconfig.get_path("scripts"))/"recsys"
    assert command.is_file(), "install the package: make setup"
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([command, "--help"], cwd=ROOT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0 and "recommend" in run.stdout, run.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < .5

# ---- notebooks and modules

LIBRARY = [p for p in NOTEBOOKS if re.match(r"\d_", p.parent.name)]

def test_each_room_has_its_notebook_and_each_notebook_its_room():
    "nbs/1_data/01_events.ipynb exports recsys/data/events.py, and no module comes from elsewhere."
    exported = {p: default_exp(p) for p in NOTEBOOKS}
    assert [ids(p) for p, e in exported.items() if e and p not in LIBRARY] == []
    assert {ids(p): e for p, e in exported.items() if p in LIBRARY} == {ids(p): f"{p.parent.name[2:]}.{p.stem[3:]}" for p in LIBRARY}
    assert [ids(p) for p in LIBRARY if p.parent.name[2:] not in WINGS or not re.fullmatch(r"\d\d_\w+", p.stem)] == []
    assert [p for p, n in Counter((p.parent.name, p.stem[:2]) for p in LIBRARY).items() if n > 1] == []
    assert sorted(f"recsys/{e.replace('.', '/')}.py" for e in exported.values() if e) == [ids(p) for p in MODULES]

@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_is_small_and_ended_well(path):
    assert path.stat().st_size < 150_000
    outputs = [o for c in cells(path) if c["cell_type"] == "code" for o in c["outputs"]]
    assert [o.get("ename") for o in outputs if o["output_type"] == "error"] == []
    assert cells(path)[0]["cell_type"] == "markdown" and "".join(cells(path)[0]["source"]).startswith("# "), "begins with its title"

def test_notebooks_that_need_parameters_stay_out_of_nbdev_test():
    assert (ROOT/"nbs"/"jobs"/".notest").is_file()

# ---- the tree

def test_the_top_level_holds_only_what_belongs_there():
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} - set(TOP) == set()

PRIVATE = re.compile("|".join((r"(?<![\w.])/(work|opt|home|Users|root|mnt)/\w", r"(?<![\w.])/(tmp|var/folders)/\w",
    r"p[y]pi\.org", r"python[h]osted\.org", r"download\.py[t]orch\.org", r"ana[c]onda\.(org|com)", r"extra-in[d]ex-url", r"in[d]ex-url")))

@pytest.mark.parametrize("path", tracked(), ids=ids)
def test_no_file_names_a_machine_or_a_registry(path):
    text = path.read_text(encoding="utf-8", errors="replace")
    assert [text[max(0, m.start() - 30):m.end() + 30] for m in PRIVATE.finditer(text)] == []

def test_the_hooks_before_a_commit_run_what_is_here_and_fetch_nothing():
    repos = yaml.safe_load((ROOT/".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [r["repo"] for r in repos] == ["local"]
    for hook in repos[0]["hooks"]:
        command = hook["entry"].split()[0]
        assert hook["language"] == "system" and command.startswith(".venv/bin/") and (Path(sysconfig.get_path("scripts"))/Path(command).name).is_file(), hook
        assert any(re.search(hook["files"], ids(p)) for p in tracked()), hook["files"]

# ---- the README

README = readme_text(ROOT/"nbs"/"index.ipynb", "nbs")
BLOCKS = {language: re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S) for language in ("csv", "toml", "sh")}

def test_readme_is_made_from_its_notebook(tmp_path):
    assert make_readme(ROOT/"nbs"/"index.ipynb", tmp_path/"README.md").read_bytes() == (ROOT/"README.md").read_bytes()

def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(links) > 2
    heads = {"#" + re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.M)}
    assert [l for l in links if not (l in heads if l.startswith("#") else re.match("https?:", l) or (ROOT/l).exists())] == []

def test_the_map_of_the_readme_is_the_house():
    assert re.findall(r"^\| `(\w+)` \|", README, re.M) == sorted(p.name for p in (ROOT/"nbs").iterdir() if p.is_dir() and not p.name.startswith("."))

def test_the_mapping_of_the_readme_works(tmp_path):
    (events, items), (mapping,) = BLOCKS["csv"], BLOCKS["toml"]
    (tmp_path/"shop").mkdir()
    for name, text in (("events.csv", events), ("articles.csv", items), ("shop.toml", mapping)): (tmp_path/"shop"/name).write_text(text)
    account = ingest("shop/shop.toml", tmp_path/"out", None, datetime(2026, 3, 10, tzinfo=timezone.utc), 30, 60, 0., tmp_path)
    assert account["rows"] == 3 and account["items"] == 2 and account["event_types"] == dict(purchase=1, view=2) and account["quarantined"] == 0

def test_the_settings_that_the_readme_names_exist(tmp_path, monkeypatch):
    shutil.copy(ROOT/"settings.ini", tmp_path)
    for assignment in re.findall(r"RECSYS_\w+=\w+", README): monkeypatch.setenv(*assignment.split("="))
    monkeypatch.setenv("RECSYS_DATA_DATASET", "shop/shop.toml")
    s = load_settings(tmp_path/"settings.ini")
    assert s.run.seed == 7 and s.data.dataset == "shop/shop.toml"

def test_the_commands_of_the_readme_exist():
    text = "\n".join(BLOCKS["sh"])
    make = (ROOT/"Makefile").read_text(encoding="utf-8")
    assert {t for t in re.findall(r"\bmake (\w+)", README) if not re.search(rf"^{t}:", make, re.M)} == set()
    said = subprocess.run([Path(sysconfig.get_path("scripts"))/"recsys", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert {c for c in re.findall(r"^recsys (\w+)", text, re.M) if not re.search(rf"\b{c}\b", said.stdout)} == set()
