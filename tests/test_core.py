"The core wing: every wrong setting has its one line, and a result is whole or not there, whatever happens to its writer."
import hashlib, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings as hyp, strategies as st

from recsys.core.files import (atomic_dir, atomic_file, code_digest, code_files, digest, file_digest, full_disk_is_clear, read_json, sweep,
    write_json)
from recsys.core.settings import RecsysError, as_dict, find_settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
INI = (ROOT/"settings.ini").read_text(encoding="utf-8")

# ---- settings

@pytest.fixture
def ini(tmp_path):
    "The settings of the repository in a folder of their own, to be spoilt."
    def write(*changes: tuple[str, str], text: str = INI) -> Path:
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
            text = text.replace(old, new)
        (tmp_path/"settings.ini").write_text(text, encoding="utf-8")
        return tmp_path/"settings.ini"
    return write

def refused(path: Path | None) -> str:
    with pytest.raises(RecsysError) as e: load_settings(path)
    line = str(e.value)
    assert "\n" not in line and " — " in line, line
    return line

def test_the_settings_of_the_repository_are_right(ini):
    s = load_settings(ini())
    assert s.run.seed == 42 and s.features.windows_days == (7, 30, 90) and s.serving.host == "127.0.0.1" and s.drift.alpha == .01
    assert s.data_dir == ini().parent.resolve()/"data" and s.reports_dir == ini().parent.resolve()/"reports"
    assert s.resolve("/elsewhere/shop") == Path("/elsewhere/shop").resolve()

WRONG = [
    ((("[run]", "[runs]"),), "unknown section [runs]", "known sections: paths, data,"),
    ((("seed = 42", "sead = 42"),), "unknown key 'sead' in [run]", "known keys: seed, threads, keep, engine, spark_master"),
    ((("seed = 42", ""),), "[run] lacks seed", "copy the key"),
    ((("[run]\nseed = 42\nthreads = 2", "[run]"),), "[run] lacks seed, threads", "copy"),
    ((("seed = 42", "seed = soon"),), "[run] seed = 'soon': Expected `int`", "correct the value"),
    ((("seed = 42", "seed = 4.2"),), "[run] seed = '4.2': Expected `int`", "correct the value"),
    ((("seed = 42", "seed = -1"),), "[run] seed = '-1': Expected `int` >= 0", "correct the value"),
    ((("seed = 42", "seed ="),), "[run] seed = '': Expected `int`", "correct the value"),
    ((("port = 8080", "port = 65536"),), "[serving] port = '65536': Expected `int` <= 65535", "correct the value"),
    ((("alpha = 0.01", "alpha = 1"),), "[drift] alpha = '1': Expected `float` < 1.0", "correct the value"),
    ((("alpha = 0.01", "alpha = nan"),), "[drift] alpha = 'nan'", "correct the value"),
    ((("max_quarantine_share = 0.05", "max_quarantine_share = 5"),), "[data] max_quarantine_share = '5': Expected `float` <= 1.0", "correct"),
    ((("windows_days = 7, 30, 90", "windows_days = 7, x"),), "[features] windows_days = '7, x': Expected `int`", "correct the value"),
    ((("windows_days = 7, 30, 90", "windows_days = 7, 0"),), "[features] windows_days = '7, 0': Expected `int` >= 1", "correct the value"),
    ((("windows_days = 7, 30, 90", "windows_days = 30, 7"),), "[features] windows_days must grow", "shortest window first"),
    ((("windows_days = 7, 30, 90", "windows_days = 7, 7"),), "[features] windows_days must grow", "each once"),
    ((("view>view:0.2", "view-view:0.2"),), "[candidates] pairs = ", "correct the value"),
    ((("budget = 400", "budget = 15"),), "[candidates] budget is smaller than the longest list", "raise the budget"),
    ((("backend = faiss", "backend = milvus"),), "[index] uri = '': no address of a Milvus", "http://HOST:PORT"),
    ((("backend = faiss\n", "backend = milvus\n"), ("uri =\n", "uri = vectors\n")), "[index] uri = 'vectors'", "NAME.db"),
    ((("backend = faiss\n", "backend = milvus\n"), ("uri =\n", "uri = v.db\n"), ("kind = auto", "kind = ivf")), "[index] kind = 'ivf' is for faiss only", "hnsw"),
    ((("collection = recsys_items", "collection = my items"),), "[index] collection = 'my items'", "correct the value"),
    ((("recall_target = 0.95", "recall_target = 0"),), "[index] recall_target = '0'", "correct the value"),
]

@pytest.mark.parametrize("changes, what, todo", WRONG, ids=[w[1][:40] for w in WRONG])
def test_a_wrong_setting_is_one_line(ini, changes, what, todo):
    line = refused(path := ini(*changes))
    assert line.startswith(f"{path}: {what}") and todo in line.split(" — ")[1]

@pytest.mark.parametrize("text, part", [("seed = 1\n" + INI, "no section headers"), (INI + "\n[run]\nseed = 1\n", "section 'run' already exists"),
    (INI.replace("seed = 42", "seed = 42\nseed = 43"), "option 'seed' in section 'run' already exists"), (INI + "\nnonsense\n", "nonsense")])
def test_a_broken_file_is_one_line(ini, text, part): assert part in refused(ini(text=text))

def test_bytes_that_are_no_text_are_one_line(tmp_path):
    (tmp_path/"settings.ini").write_bytes(b"[run]\nseed = \xff\n")
    assert "can't decode byte 0xff" in refused(tmp_path/"settings.ini")

def test_no_file_is_one_line(tmp_path, monkeypatch):
    assert refused(tmp_path/"settings.ini").startswith(f"{tmp_path/'settings.ini'}: no such settings file")
    monkeypatch.chdir(tmp_path)
    assert "no settings.ini here or above" in refused(None)
    monkeypatch.setenv("RECSYS_SETTINGS", str(tmp_path/"other.ini"))
    assert refused(None).startswith(f"{(tmp_path/'other.ini').resolve()}: no such settings file — check RECSYS_SETTINGS")

def test_the_file_is_found_from_below_and_by_name(ini, tmp_path, monkeypatch):
    path = ini().resolve()
    (tmp_path/"nbs"/"jobs").mkdir(parents=True)
    assert find_settings(tmp_path/"nbs"/"jobs") == path
    monkeypatch.chdir(tmp_path/"nbs")
    assert load_settings().file == str(path)
    monkeypatch.chdir("/"); monkeypatch.setenv("RECSYS_SETTINGS", str(path))
    assert load_settings().data_dir == path.parent/"data"

def test_the_environment_comes_before_the_file(ini, monkeypatch):
    monkeypatch.setenv("RECSYS_RUN_SEED", "7"); monkeypatch.setenv("RECSYS_FEATURES_WINDOWS_DAYS", "1,2")
    monkeypatch.setenv("RECSYS_SERVING_HOST", " 0.0.0.0 ")
    s = load_settings(ini())
    assert (s.run.seed, s.features.windows_days, s.serving.host) == (7, (1, 2), "0.0.0.0") and s.run.threads == 2
    monkeypatch.setenv("RECSYS_RUN_KEEP", "5")
    assert load_settings(ini(("keep = 3", ""))).run.keep == 5

@pytest.mark.parametrize("name, value, what", [("RECSYS_RUN_SEED", "x", "[run] seed = 'x'"), ("RECSYS_RUN_SEDE", "7", "unknown key 'sede' in [run]"),
    ("RECSYS_RUNN_SEED", "7", "RECSYS_RUNN_SEED"), ("RECSYS_SEED", "7", "RECSYS_SEED"), ("RECSYS_SETTING", "other.ini", "RECSYS_SETTING")])
def test_a_wrong_override_is_one_line(ini, monkeypatch, name, value, what):
    "A misspelt override that is passed over in silence runs the night with the wrong number."
    monkeypatch.setenv(name, value)
    assert what in refused(ini())

KEYS = [(s, k) for s, values in as_dict(load_settings(ROOT/"settings.ini")).items() for k in values]

@hyp(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KEYS), st.one_of(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    st.floats().map(repr), st.integers().map(str), st.lists(st.integers(-1, 99)).map(lambda l: ",".join(map(str, l)))))
@example(("evaluation", "cutoffs"), "").via("an empty list has no longest")
@example(("embeddings", "learning_rate"), "inf").via("not a rate")
@example(("candidates", "pairs"), "view>view:0.2.3").via("not a number")
def test_any_value_is_accepted_or_refused_in_one_line(ini, key, text):
    path, name = ini(), f"RECSYS_{key[0]}_{key[1]}".upper()
    os.environ[name] = text
    try: s = as_dict(load_settings(path))
    except RecsysError as e: assert "\n" not in str(e) and " — " in str(e)
    else:
        assert json.loads(json.dumps(s, allow_nan=False)).keys() == s.keys()
        assert [float(p.rpartition(":")[2]) for p in s["candidates"]["pairs"]] and s["evaluation"]["cutoffs"]
    finally: del os.environ[name]

def test_as_dict_is_plain_and_without_the_file(ini, tmp_path):
    s = load_settings(ini())
    assert set(as_dict(s)) == set(re.findall(r"^\[(\w+)\]", INI, re.M)) == set(as_dict(s, *as_dict(s)))
    assert as_dict(s, "run") == {"run": dict(seed=42, threads=2, keep=3, engine="polars", spark_master="local[2]")} and as_dict(s, "run", "paths").keys() == {"run", "paths"}
    (tmp_path/"elsewhere").mkdir(); shutil.copy(ini(), tmp_path/"elsewhere")
    assert as_dict(load_settings(tmp_path/"elsewhere"/"settings.ini")) == as_dict(s), "the place of the file is no setting"

# ---- atomic writes

def names(folder: Path) -> list[str]: return sorted(p.name for p in folder.iterdir())

def test_a_file_appears_whole(tmp_path):
    target = tmp_path/"a"/"b.json"
    with atomic_file(target) as tmp:
        tmp.write_text("old"); assert not target.exists()
    with atomic_file(str(target)) as tmp:
        tmp.write_text("new"); assert target.read_text() == "old"
    assert target.read_text() == "new" and names(target.parent) == ["b.json"] and target.stat().st_mode & 0o777 == 0o644

@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError, OSError])
def test_an_exception_leaves_the_old_file(tmp_path, error):
    write_json(tmp_path/"a.json", 1)
    with pytest.raises(error):
        with atomic_file(tmp_path/"a.json") as tmp: tmp.write_text("[1,"); raise error("cut short")
    assert read_json(tmp_path/"a.json") == 1 and names(tmp_path) == ["a.json"]

def test_a_folder_appears_whole(tmp_path):
    with atomic_dir(tmp_path/"m") as tmp:
        (tmp/"deep").mkdir(); (tmp/"deep"/"w").write_text("1"); assert names(tmp_path) == [tmp.name]
    assert (tmp_path/"m"/"deep"/"w").read_text() == "1" and names(tmp_path) == ["m"] and (tmp_path/"m").stat().st_mode & 0o777 == 0o755
    with atomic_dir(tmp_path/"m") as tmp: (tmp/"w").write_text("2")
    assert names(tmp_path/"m") == ["deep"] and names(tmp_path) == ["m"], "an existing folder stays as it is"

@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_no_folder(tmp_path, error):
    with pytest.raises(error):
        with atomic_dir(tmp_path/"m") as tmp: (tmp/"w").write_text("1"); raise error("cut short")
    assert names(tmp_path) == []

def script(code: str, *args, **kw) -> subprocess.Popen:
    head = "import sys, time\nfrom pathlib import Path\nfrom recsys.core.files import *\nfrom recsys.core.settings import RecsysError\n"
    return subprocess.Popen([sys.executable, "-c", head + code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def ended(*runs: subprocess.Popen) -> list[str]:
    outs = [r.communicate(timeout=60) for r in runs]
    for r, (_, err) in zip(runs, outs): assert r.returncode == 0, err
    return [o for o, _ in outs]

def test_two_writers_and_a_reader_meet_whole_files_only(tmp_path):
    target = tmp_path/"a.txt"
    write = "for _ in range(300):\n with atomic_file(sys.argv[1]) as t: t.write_text(sys.argv[2] * 100_000)"
    runs = [script(write, target, c) for c in "xy"]
    seen = set()
    while any(r.poll() is None for r in runs):
        if target.exists(): text = target.read_text(); seen.add((len(text), *set(text)))
    ended(*runs)
    assert seen <= {(100_000, "x"), (100_000, "y")} and seen and names(tmp_path) == ["a.txt"]

def test_two_writers_of_one_folder_both_succeed(tmp_path):
    "Both computed the same; one is first, the other finds it there, at whatever moment."
    write = """
for i in range(200):
    start = float(sys.argv[3]) + .01 * i
    with atomic_dir(Path(sys.argv[1])/str(i)) as t:
        (t/"w").write_text(sys.argv[2] * 10_000); (t/"x").write_text(sys.argv[2])
        while time.time() < start: pass
"""
    start = time.time() + 1.5
    ended(*(script(write, tmp_path, c, start) for c in "xy"))
    assert names(tmp_path) == sorted(map(str, range(200)))
    for d in tmp_path.iterdir(): assert (d/"w").read_text() == (d/"x").read_text() * 10_000

def test_the_folder_that_came_first_stays_when_the_other_was_late(tmp_path):
    with atomic_dir(tmp_path/"m") as a:
        (a/"w").write_text("a")
        with atomic_dir(tmp_path/"m") as b: (b/"w").write_text("b")
    assert (tmp_path/"m"/"w").read_text() == "b" and names(tmp_path) == ["m"]

@pytest.mark.parametrize("writer, body", [("atomic_file", "t.write_text('half')"), ("atomic_dir", "(t/'w').write_text('half')")])
def test_a_killed_writer_leaves_nothing_but_what_sweep_removes(tmp_path, writer, body):
    (tmp_path/"steps").mkdir()
    if writer == "atomic_file": write_json(tmp_path/"steps"/"m", "old")
    run = script(f"with {writer}(sys.argv[1]) as t:\n {body}\n print('half', flush=True)\n time.sleep(60)", tmp_path/"steps"/"m")
    assert run.stdout.readline() == "half\n"
    run.send_signal(signal.SIGKILL); run.communicate()
    left = names(tmp_path/"steps")
    assert [n for n in left if not n.startswith(".")] == (["m"] if writer == "atomic_file" else [])
    remains = [n for n in left if n.startswith(".")]
    assert len(remains) == 1 and re.fullmatch(r"\.m\.tmp-\w+", remains[0])
    assert sweep(tmp_path) == remains and names(tmp_path/"steps") == (["m"] if writer == "atomic_file" else []) and sweep(tmp_path) == []
    if writer == "atomic_file": assert read_json(tmp_path/"steps"/"m") == "old"

@pytest.mark.parametrize("writer, body", [("atomic_file", "t.write_text('half')"), ("atomic_dir", "(t/'.w.tmp-1').mkdir()"), ("scratch", "(t/'w').mkdir()")])
def test_sweep_leaves_what_another_process_is_writing(tmp_path, writer, body):
    "A service, a promotion or a job beside the run; and what lies in its folder is its own."
    run = script(f"with {writer}(sys.argv[1]) as t:\n {body}\n print('half', flush=True)\n sys.stdin.readline()\nprint('whole', flush=True)\n", tmp_path/"m", stdin=subprocess.PIPE)
    assert run.stdout.readline() == "half\n"
    before = names(tmp_path)
    assert sweep(tmp_path) == [] and names(tmp_path) == before and before[0].startswith(".m.tmp-")
    assert run.communicate("\n")[0] == "whole\n" and names(tmp_path) == ["m"][writer == "scratch":]
    if writer != "scratch": assert (tmp_path/"m"/".w.tmp-1").is_dir() if writer == "atomic_dir" else (tmp_path/"m").read_text() == "half"

def test_sweep_removes_links_in_progress_wherever_they_point_when_they_are_old(tmp_path):
    (tmp_path/"v1").mkdir(); (tmp_path/"v1"/"w").write_text("1")
    for name, to in (("1", "v1"), ("2", "gone"), ("3", "v1")): (tmp_path/f".current.tmp-{name}").symlink_to(to)
    for name in "12": os.utime(tmp_path/f".current.tmp-{name}", (0, time.time() - 3700), follow_symlinks=False)
    assert sweep(tmp_path) == [".current.tmp-1", ".current.tmp-2"] and names(tmp_path) == [".current.tmp-3", "v1"] and (tmp_path/"v1"/"w").exists()

def test_sweep_leaves_what_is_no_remain(tmp_path):
    for n in ("a.tmp-1", ".hidden", "b.tmp"): (tmp_path/n).write_text("")
    assert sweep(tmp_path) == [] and len(names(tmp_path)) == 3 and sweep(tmp_path/"nowhere") == []

# ---- a full disk

def small_disk(folder: Path, options: str, code: str) -> dict:
    "What `code` prints as JSON when `folder` is a real disk of its own; it goes when the process does."
    run = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs "$1" || exit 77; shift; exec "$@"', "sh", folder]
    head = """
import errno, json, sys, os
from pathlib import Path
from recsys.core.files import *
from recsys.core.settings import RecsysError
disk, said = Path(sys.argv[1]), {}
def attempt(name, f):
    try: f(); said[name] = "done"
    except BaseException as e: said[name] = f"{type(e).__name__}: {e}"
def tree(): return {str(p.relative_to(disk)): p.read_bytes().hex()[:64] for p in sorted(disk.rglob("*")) if p.is_file()}
"""
    try: r = subprocess.run([*map(str, run), sys.executable, "-c", head + code, str(folder)], capture_output=True, text=True, timeout=60)
    except FileNotFoundError: pytest.skip("no unshare here, so no small disk can be mounted")
    if r.returncode == 77 or (r.returncode and r.stderr.startswith("unshare:")): pytest.skip(f"no small disk can be mounted: {r.stderr.strip()}")
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout)

WRITES = """
import numpy as np, polars as pl
def file(name, write):
    def f():
        with atomic_file(disk/name) as t: write(t)
    return f
def folder(name, write):
    def f():
        with atomic_dir(disk/name) as t: (t/"first").write_text("1"); write(t/"second")
    return f
rng = np.random.default_rng(0)
df = pl.DataFrame(dict(a=rng.integers(0, 2**62, 200_000)))
text = "x" * 1_000_000
write_json(disk/"old", "whole"); (disk/"ballast").write_bytes(bytes(600_000))
before = tree()
attempt("text", file("old", lambda t: t.write_text(text)))
attempt("parquet", file("old", lambda t: df.write_parquet(t)))
attempt("sink", file("old", lambda t: df.lazy().sink_parquet(t)))
attempt("csv", file("old", lambda t: df.write_csv(t)))
attempt("array", file("old", lambda t: np.save(t.open("wb"), df["a"].to_numpy())))
attempt("json", lambda: write_json(disk/"old", text))
attempt("folder", folder("m", lambda t: t.write_text(text)))
attempt("folder parquet", folder("m", lambda t: df.write_parquet(t)))
attempt("folder sink", folder("m", lambda t: df.lazy().sink_parquet(t)))
after, left = tree(), sorted(p.name for p in disk.iterdir())
os.unlink(disk/"ballast"); attempt("with space", file("old", lambda t: t.write_text("y" * 500_000)))
print(json.dumps(dict(said=said, same=before == after, left=left)))
"""

def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path):
    got = small_disk(tmp_path, "size=1m", WRITES)
    assert got["said"].pop("with space") == "done"
    todo = "the disk is full — free some space and run again; nothing that was there has changed"
    assert got["said"] == {n: f"RecsysError: {tmp_path}/{'m' if n.startswith('folder') else 'old'}: {todo}" for n in got["said"]}
    assert len(got["said"]) == 9 and got["same"] and got["left"] == ["ballast", "old"]

def test_a_disk_without_room_for_one_more_name_is_full_too(tmp_path):
    got = small_disk(tmp_path, "size=1m,nr_inodes=3", """
write_json(disk/"old", "whole"); (disk/"last").touch()
attempt("file", lambda: write_json(disk/"old", "new"))
def f():
    with atomic_dir(disk/"m") as t: pass
attempt("folder", f)
print(json.dumps(dict(said=said, old=read_json(disk/"old"), left=sorted(tree()))))
""")
    assert [": the disk is full — " in s and s.startswith("RecsysError") for s in got["said"].values()] == [True, True]
    assert got["old"] == "whole" and got["left"] == ["last", "old"]

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_the_full_device_is_clear_without_any_privilege(tmp_path):
    for write in (lambda f: Path(f).write_text("x"), lambda f: pl.DataFrame(dict(a=[1])).write_csv(f)):
        with pytest.raises(RecsysError, match="^here: the disk is full — "):
            with full_disk_is_clear("here"): write("/dev/full")
    with pytest.raises(OSError) as e:
        with full_disk_is_clear("here"): (tmp_path/"none"/"x").write_text("x")
    assert not isinstance(e.value, RecsysError), "other failures stay what they are"

# ---- JSON and fingerprints

def test_json_comes_back_and_says_what_is_wrong(tmp_path):
    assert read_json(write_json(tmp_path/"a.json", dict(b=[1, None], a="ä"))) == dict(a="ä", b=[1, None])
    assert (tmp_path/"a.json").read_text().index('"a"') < (tmp_path/"a.json").read_text().index('"b"')
    with pytest.raises(RecsysError, match="no such file — run the step"): read_json(tmp_path/"b.json")
    (tmp_path/"b.json").write_text("{")
    with pytest.raises(RecsysError, match="not JSON .* — delete it"): read_json(tmp_path/"b.json")

PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)
    | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=6)

@given(PLAIN, PLAIN)
def test_digest_tells_values_apart_and_nothing_else(a, b):
    assert re.fullmatch("[0-9a-f]{16}", digest(a)) and digest(a) == digest(json.loads(json.dumps(a)))
    assert (digest(a) == digest(b)) == (json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True))
    assert digest(a, b) != digest([a, b]) and digest(dict(x=a, y=b)) == digest(dict(y=b, x=a))

def test_digest_is_the_same_in_every_process():
    "It names folders that later runs look for, so neither the hash seed nor the version of Python may enter."
    want = hashlib.sha256(b'["train", {"a": [1], "seed": 42}]').hexdigest()[:16]
    assert digest("train", dict(seed=42, a=[1])) == want
    runs = [script("print(digest('train', dict(seed=42, a=[1])))", env={**os.environ, "PYTHONHASHSEED": s}) for s in "12"]
    assert ended(*runs) == [want + "\n"] * 2

NAMES = st.dictionaries(st.text("ab", min_size=1, max_size=3), st.binary(max_size=3), max_size=3)

@hyp(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, NAMES)
@example({"a": b"b"}, {"ab": b""}).via("where a name ends and its content begins")
def test_file_digest_tells_folders_apart(tmp_path, a, b):
    def fill(name, files):
        shutil.rmtree(tmp_path/name, ignore_errors=True); (tmp_path/name).mkdir()
        for n, content in files.items(): (tmp_path/name/n).write_bytes(content)
        return file_digest(tmp_path/name)
    assert (fill("one", a) == fill("two", b)) == (a == b)

def test_file_digest_reads_files_and_misses_missing_ones(tmp_path):
    big = bytes(range(256)) * 10_000
    (tmp_path/"big").write_bytes(big)
    assert file_digest(tmp_path/"big") == hashlib.sha256(big).hexdigest()[:16]
    with pytest.raises(RecsysError, match="no such file — check the path"): file_digest(tmp_path/"small")

# ---- which code?

SOURCES = {
    "pkg/__init__.py": "",
    "pkg/a/__init__.py": "", "pkg/b/__init__.py": "",
    "pkg/a/first.py": "import os, json\nfrom ..b.second import f\n",
    "pkg/a/beside.py": "x = 1\n",
    "pkg/b/second.py": "def f():\n    from .third import g\n    return g()\n",
    "pkg/b/third.py": "import pkg.b.fourth\ng = lambda: pkg.b.fourth.x\n",
    "pkg/b/fourth.py": "from . import fifth\nx = fifth.x\n",
    "pkg/b/fifth.py": "from pkg.a import sixth\nx = 1\n",
    "pkg/a/sixth.py": "from .first import f\n",
    "pkg/b/other.py": "x = 2\n",
}
USED = ["pkg/a/first.py", "pkg/a/sixth.py", "pkg/b/fifth.py", "pkg/b/fourth.py", "pkg/b/second.py", "pkg/b/third.py"]

@pytest.fixture
def package(tmp_path) -> Path:
    for name, text in SOURCES.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_text(text)
    cells = [dict(cell_type="markdown", source="import pkg.b.other"), dict(cell_type="code", source=["%matplotlib inline\n", "!ls\n", "from pkg.a.first import f"])]
    (tmp_path/"job.ipynb").write_text(json.dumps(dict(cells=cells)))
    return tmp_path

@pytest.mark.parametrize("start", ["job.ipynb", "pkg/a/first.py"])
def test_code_files_follows_every_kind_of_import(package, start):
    "Absolute, relative (which is how nbdev writes them), of a name or of a module, inside a function, in circles."
    found = [f.relative_to(package).as_posix() for f in code_files(package/start, package/"pkg")]
    assert [f for f in found if not f.endswith("__init__.py")] == sorted({start, *USED})

@pytest.mark.parametrize("changed", [f for f in SOURCES if not f.endswith("__init__.py")])
def test_code_digest_changes_with_what_is_used_and_only_then(package, changed):
    before = code_digest(package/"job.ipynb", package/"pkg")
    assert before == code_digest(package/"job.ipynb", package/"pkg")
    (package/changed).write_text(SOURCES[changed] + "y = 3\n")
    assert (code_digest(package/"job.ipynb", package/"pkg") != before) == (changed in USED)

def test_code_digest_of_a_notebook_changes_with_its_code_not_with_its_prose_or_output(package):
    job = package/"job.ipynb"
    before, nb = code_digest(job, package/"pkg"), json.loads(job.read_text())
    nb["cells"][0]["source"] = "Another explanation."; nb["cells"][1]["outputs"] = [dict(text="1")]
    job.write_text(json.dumps(nb)); assert code_digest(job, package/"pkg") == before
    nb["cells"][1]["source"].append("\nf()"); job.write_text(json.dumps(nb)); assert code_digest(job, package/"pkg") != before

def test_code_files_of_our_own_rooms_are_what_python_loads():
    "An oracle: a fresh process imports a room; every module of ours that it holds afterwards is in the list."
    for room in ("data.ingest", "features.point_in_time"):
        code = f"import sys, recsys.{room}\nprint(*(m.__file__ for n, m in sys.modules.items() if n.startswith('recsys.') and not m.__file__.endswith('__init__.py')))"
        loaded, = ended(script(code))
        start = ROOT/"recsys"/Path(*room.split(".")).with_suffix(".py")
        assert {Path(f) for f in loaded.split()} <= set(code_files(start, ROOT/"recsys"))
