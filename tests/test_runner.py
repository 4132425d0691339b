"The runner by itself, on a shop of made-up jobs: killed, doubled, slow, flaky, missed days, refused versions; each end with its exit code."
import hashlib, json, os, signal, subprocess, time

import numpy as np
import pytest

from recsys.core.files import read_json
from recsys.core.settings import load_settings
from recsys.operations.registry import releases, serving
from recsys.operations.runner import STEPS
from recsys.serving.bundle import verify_bundle, versions
from shop import COMMAND, recsys
from test_run import one_line
from toy import make_toy, one_more_event

NAMES = [s.name for s in STEPS]

def remains(folder) -> list[str]:
    "What a killed writer left anywhere."
    return [p.relative_to(folder).as_posix() for d in ("data", "reports") for p in (folder/d).rglob(".*tmp-*")]

def statuses(folder, day) -> list[str]: return [s["status"] for s in read_json(folder/"reports"/"runs"/day/"run.json")["steps"]]

def content(folder) -> dict[str, str]:
    "Digest of every file of the results and of what is served."
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for d in ("data/steps", "data/bundles", "data/gates") for p in sorted((folder/d).rglob("*")) if p.is_file()}

def start(folder): return subprocess.Popen([COMMAND, "run"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

# ---- kill -9

def check_whole(folder, known):
    "All that a run must leave, whole and once; `known`: the releases before it."
    s = load_settings(folder/"settings.ini")
    assert not remains(folder)
    bundles, history = s.data_dir/"bundles", releases(s)
    for v in versions(bundles): verify_bundle(bundles/v)
    for p in (s.data_dir/"steps").iterdir():
        assert (p/"step.json").is_file() and (p/"table.bin").stat().st_size == 4 << 20 and len(list(p.glob("*.html"))) == 1, p
    manifest = read_json(folder/"reports"/"runs"/"2024-03-01"/"manifest.json")
    assert manifest["whole"] and [*manifest["steps"]] == sorted(NAMES)
    for name, step in manifest["steps"].items():
        told = (s.data_dir/"steps"/f"{name}-{step['fingerprint']}"/"parents.txt").read_text().split()
        assert told == sorted(f"{p}-{f}" for p, f in step["parents"].items()), "made of this run's results and no others"
    assert history[:len(known)] == known and len(history) == len(known) + 1, "promoted once"
    assert serving(s) == history[-1].version == read_json(folder/"reports"/"runs"/"2024-03-01"/"run.json")["version"]
    return history

def killed(folder, kills: int, seed: int = 0) -> str:
    "Kill a run at a random moment, with its kernel or without, and let the next one complete; again and again. A line about it."
    rng, known, at = np.random.default_rng(seed), [], []
    begin = time.monotonic(); r = recsys(folder, "run"); length = time.monotonic() - begin
    assert r.returncode == 0, r.stderr
    known = check_whole(folder, known)
    for n in range(kills):
        one_more_event(folder)
        p = start(folder)
        time.sleep(rng.uniform(0, 1.1 * length))
        ended = p.poll() is not None
        (os.killpg if n % 2 else os.kill)(p.pid, signal.SIGKILL) if not ended else None
        out = p.communicate()[0]
        at.append("end" if ended else next((name for name in reversed(NAMES) if name in out), "start"))
        begin = time.monotonic(); r = recsys(folder, "run")
        assert r.returncode == 0, r.stderr + r.stdout
        if at[-1] == "start": length = time.monotonic() - begin # the machine may be busier than it was
        known = check_whole(folder, known)
    assert [p.name for p in folder.iterdir() if p.is_socket()] == [], "sockets of a kernel that was killed; in an image this folder is read-only"
    before = content(folder)
    assert recsys(folder, "run").stdout.count("skipped") == len(STEPS) and content(folder) == before
    return f"{kills} kills, the last step that had ended: " + ", ".join(f"{w} {at.count(w)}" for w in ("start", *NAMES, "end"))

def test_a_killed_run_is_completed_by_the_next(tmp_path): killed(make_toy(tmp_path/"shop"), int(os.environ.get("RECSYS_TEST_KILLS", 1)))

@pytest.mark.bench
@pytest.mark.timeout(8 * 3600)
def test_many_killed_runs(tmp_path): print(killed(make_toy(tmp_path/"shop"), int(os.environ.get("RECSYS_TEST_KILLS", 200)), seed=1))

# ---- two at once

def test_of_two_runs_one_says_that_the_other_is_at_work(tmp_path):
    folder = make_toy(tmp_path/"shop", extra=dict(ingest="import time; time.sleep(8)"))
    first, second = start(folder), start(folder)
    ends = [(p.communicate(timeout=200), p.returncode) for p in (first, second)]
    assert sorted(code for _, code in ends) == [0, 75]
    (out, err), _ = next(e for e in ends if e[1] == 75)
    assert err.startswith("recsys: ") and "another run (process" in err and "wait for it to end" in err and err.count("\n") == 1 and "ingest" not in out
    check_whole(folder, [])

# ---- what fails, and how

def test_a_step_that_takes_too_long_is_stopped_with_its_children(tmp_path):
    slow = 'import subprocess; p = subprocess.Popen(["sleep", "300"]); open("child", "w").write(str(p.pid)); p.wait()'
    folder = make_toy(tmp_path/"shop", extra=dict(validate=slow), step_minutes=.2)
    r = recsys(folder, "run")
    assert r.returncode == 1
    one_line(r, "job validate", "took longer than 0.2 minutes", "[schedule] step_minutes")
    assert not os.path.exists(f"/proc/{(folder/'child').read_text()}") or "Z" in open(f"/proc/{(folder/'child').read_text()}/stat").read().split()[2]
    said = read_json(folder/"reports"/"runs"/"2024-03-01"/"manifest.json")
    assert not said["whole"] and {n: s["status"] for n, s in said["steps"].items()} == dict(ingest="done", validate="failed")

@pytest.mark.parametrize("given, wanted", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_of_a_kernel_sleep_while_they_wait_unless_the_operator_says_otherwise(tmp_path, monkeypatch, given, wanted):
    "Spinning ones made a step ten times as long on a machine that others use, too."
    import nbformat
    from recsys.operations.runner import execute
    monkeypatch.setenv("OMP_WAIT_POLICY", given) if given else monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    settings = load_settings(make_toy(tmp_path/"shop")/"settings.ini")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os\nprint(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])")])
    nbformat.write(notebook, tmp_path/"env.ipynb")
    execute(tmp_path/"env.ipynb", tmp_path/"done.ipynb", {}, settings)
    assert nbformat.read(tmp_path/"done.ipynb", 4).cells[-1].outputs[0].text.split() == [wanted, str(settings.run.threads)]
    assert os.environ.get("OMP_WAIT_POLICY") == given

def test_what_may_pass_is_tried_again_and_what_may_not_is_not(tmp_path):
    "A connection breaks once, a kernel dies once; then a cell that is wrong."
    once = "import os\nif not os.path.exists('{0}'):\n    open('{0}', 'w').close()\n    {1}"
    folder = make_toy(tmp_path/"shop", extra=dict(ingest=once.format("first", "raise ConnectionResetError('gone')"), drift=once.format("second", "os.kill(os.getpid(), 9)")))
    r = recsys(folder, "run")
    assert r.returncode == 0 and "ConnectionResetError: gone" in r.stdout and "again in 0.1 s" in r.stdout and "the kernel died" in r.stdout, r.stdout + r.stderr
    said = read_json(folder/"reports"/"runs"/"2024-03-01"/"manifest.json")["steps"]
    assert {n: s["tries"] for n, s in said.items() if s["tries"] != 1} == dict(ingest=2, drift=2)
    wrong = make_toy(tmp_path/"wrong", extra=dict(ingest="1 / 0"))
    r = recsys(wrong, "run")
    assert r.returncode == 1 and "again" not in r.stdout
    one_line(r, "ZeroDivisionError", "this is a bug")

# ---- versions

def test_a_refused_version_stays_outside_and_a_withdrawn_one_too(tmp_path):
    folder = make_toy(tmp_path/"shop")
    assert recsys(folder, "run").returncode == 0
    s = load_settings(folder/"settings.ini")
    good = serving(s)
    one_more_event(folder, "2024-03-02"); (folder/"bad").touch()
    r = recsys(folder, "run")
    assert r.returncode == 2 and serving(s) == good and statuses(folder, "2024-03-02") == ["done"] * len(STEPS)
    one_line(r, "the gate refused version 20240302-", "lists: -30 %", f"{good} goes on serving")
    again = recsys(folder, "run")
    assert again.returncode == 2 and again.stdout.count("skipped") == len(STEPS) and len(releases(s)) == 1
    assert read_json(folder/"reports"/"runs"/"2024-03-02"/"run.json")["gate"] == dict(verdict="refused", champion=good, failed=["lists"], sentence="lists: -30 %")
    assert recsys(folder, "run", "--allow-regression").returncode == 0 and serving(s).startswith("20240302-")
    assert recsys(folder, "rollback", "--why", "as the gate said").returncode == 0 and serving(s) == good
    r = recsys(folder, "run")
    assert r.returncode == 0 and "stays so" in r.stdout and serving(s) == good and len(releases(s)) == 3, r.stdout + r.stderr

# ---- missed days

def test_a_last_day_in_the_future_is_refused_before_the_first_is_run(tmp_path):
    folder = make_toy(tmp_path/"shop")
    one_line(recsys(folder, "run", "--backfill", "2024-03-01", "2999-03-02"), "--backfill", "2999-03-02 lies in the future")
    assert not (folder/"data/steps").exists() and not (folder/"reports/runs").exists()

def test_days_that_were_missed(tmp_path):
    folder = make_toy(tmp_path/"shop")
    (folder/"events.csv").write_text("id,time\n1,2024-03-01\n2,2024-03-02\n")
    s = load_settings(folder/"settings.ini")
    assert recsys(folder, "run", "--date", "2024-03-02").returncode == 0
    newest = serving(s)
    r = recsys(folder, "run", "--backfill", "2024-03-01", "2024-03-02")
    assert r.returncode == 0 and "2024-03-02: skipped, done already" in r.stdout and "2 days: 1 ok, 1 skipped" in r.stdout and serving(s) == newest, r.stdout + r.stderr
    again = recsys(folder, "run", "--backfill", "2024-03-01", "2024-03-02")
    assert again.returncode == 0 and "2 days: 2 skipped" in again.stdout and len(releases(s)) == 1
    for wrong, what in ((("2024-03-02", "2024-03-01"), "lies after"), (("2024-03-01", "soon"), "is not a day")): one_line(recsys(folder, "run", "--backfill", *wrong), what)
