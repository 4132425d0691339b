"The daily run through the command line: killed, resumed, skipped, gated, refused; on a small simulated shop."
import hashlib, json, os, re, shutil, signal, subprocess, sys, time
from datetime import datetime, timedelta

import pytest
from shop import COMMAND, MAPPING, events, make_shop, recsys, settings_text, write_csv

from recsys.operations.runner import STEPS

def files(folder) -> dict[str, str]:
    "Digest of every file under data/ and reports/."
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for d in ("data", "reports") for p in sorted((folder/d).rglob("*"))
            if p.is_file() and not p.is_symlink() and p.name != ".lock"}

def lines(text: str) -> dict[str, str]: return {l.split()[0]: l for l in text.splitlines() if l.split() and l.split()[0] in {s.name for s in STEPS}}

def one_line(result, *parts) -> str:
    "The single line on standard error, which holds `parts`; no traceback."
    said = [l for l in result.stderr.splitlines() if l.strip()]
    assert len(said) == 1 and said[0].startswith("recsys: "), result.stderr + result.stdout
    for p in parts: assert p in said[0], said[0]
    return said[0]

@pytest.fixture(scope="module")
def shop(daily): return daily.folder

@pytest.fixture(scope="module")
def published(daily): return dict(half=daily.half, second=daily.second, figures=daily.figures)

def test_a_killed_run_leaves_nothing_half_done(published):
    half = published["half"]
    assert half["steps"] == ["features", "ingest", "validate"] and half["whole"] and half["remains"] and not half["bundles"]

def test_the_next_run_goes_on_where_the_killed_one_stopped(published, shop):
    said = lines(published["second"].stdout)
    assert [n for n, l in said.items() if "skipped" in l] == ["ingest", "validate", "features"] and len(said) == len(STEPS)
    assert not [p for p in (shop/"data").rglob(".*.tmp-*")], "what the killed run left was swept away"
    assert "index.html" in published["second"].stdout

def test_a_second_run_does_nothing_again(published, shop):
    before = files(shop)
    again = recsys(shop, "run", "--allow-regression")
    assert again.returncode == 0 and all("skipped" in l for l in lines(again.stdout).values()), again.stdout
    changed = {k for k, v in files(shop).items() if before.get(k) != v}
    assert changed <= {"reports/index.html", "data/alerts.jsonl", *(k for k in changed if k.endswith(("run.json", "manifest.json")) or k.startswith("reports/incidents/"))} # an incident lines up all runs; the alert of the one that was killed ends

def test_a_changed_setting_repeats_only_what_depends_on_it(published, shop):
    again = recsys(shop, "run", "--allow-regression", env=dict(RECSYS_DRIFT_PSI_LIMIT="0.2"))
    assert [n for n, l in lines(again.stdout).items() if "skipped" not in l] == ["drift", "decide", "publish"], again.stdout + again.stderr

@pytest.mark.bench # several runs of the cycle
def test_the_drift_job_reads_what_was_served_until_its_moment(published, shop):
    "Lists of all kinds, also of a day after the moment, in the steps that the run left."
    end = datetime.fromisoformat(json.loads(next((shop/"data/steps").glob("ingest-*/ingest.json")).read_text())["moment"])
    for days in range(-2, 20):
        day = end - timedelta(days=days, hours=5)
        folder = shop/f"data/served/day={day.date()}"; folder.mkdir(parents=True)
        with (folder/"1-1.jsonl").open("w") as f:
            for n in range(60):
                r = dict(request_id=f"{days}-{n}", at=day.timestamp() - 60 * n, model_version="gone", variant="default", level=0, asked=0, request={}, visitor_id=f"c{n}", user_id=None,
                         items=[(f"a{(n + k) % 60}", 1 - k / 9, 1., ["repeat"]) for k in range(5)], x=[[0.] * 3] * 5)
                for more in ({}, dict(kind="rank", items=[("a1", 1., 1., [])]), dict(variant="shadow e:b")): f.write(json.dumps(r | more, separators=(",", ":")) + "\n")
    done = recsys(shop, "job", "drift")
    shutil.rmtree(shop/"data/served")
    assert done.returncode == 0, done.stderr
    page, = (shop/"reports/runs").glob("drift-*/drift.html")
    said = json.loads((page.parent/"out/drift.json").read_text())
    last = said["lists"]["days"][-1]
    assert said["lists"]["source"] == "served" and last["lists"] == 60 and last["day"] < end.date().isoformat() and said["weeks"]["events"]
    assert [(s["version"], s["lists"]) for s in said["skew"]] == [(None, 0)] and "<h2>The lists" in page.read_text()
    assert said["embeddings"]["sentence"] in page.read_text().replace("&#x27;", "'") and len(page.read_bytes()) < 300_000
    assert said["concept"][0]["drift"]["sentence"].startswith(("Without impressions", "Too few"))

@pytest.mark.bench # several runs of the cycle
def test_new_lists_make_a_new_report_and_no_new_version(published, shop):
    "A list served before the moment is a reason for the drift step; one served after it is none, and the bundle stays the same."
    end = datetime.fromisoformat(json.loads(next((shop/"data/steps").glob("ingest-*/ingest.json")).read_text())["moment"])
    done, serving = lambda: [n for n, l in lines(recsys(shop, "run", "--allow-regression").stdout).items() if "skipped" not in l], lambda: (shop/"data/bundles/current").resolve().name
    done(); version = serving()
    for days, ran in ((-2, []), (2, ["drift", "decide", "publish"])):
        folder = shop/f"data/served/day={(end - timedelta(days=days)).date()}"; folder.mkdir(parents=True)
        (folder/"1-1.jsonl").write_text(json.dumps(dict(request_id="r1", at=(end - timedelta(days=days)).timestamp(), model_version=version, variant="default", level=0, asked=0, request={}, visitor_id=None, user_id=None, items=[])) + "\n")
        assert (done(), serving()) == (ran, version)
    shutil.rmtree(shop/"data/served")

def test_the_figures_are_those_of_the_page(published, shop):
    f = published["figures"]
    assert {"metrics", "baselines", "waterfall", "seconds", "peak_rss_mb", "rows", "quarantined"} <= set(f)
    assert f["rows"] == len({(r["visit"], r["article"]) for r in events()}) and f["quarantined"] == 0 and f["seconds"] > 0 and 100 < f["peak_rss_mb"] < 8000
    page = (shop/"reports/runs"/f["date"]/"evaluate.html").read_text()
    for question in ("next_basket", "completion"):
        m = f["metrics"][question]["ndcg@5"]
        assert m["low"] <= m["value"] <= m["high"] and f"{m['value']:.4f}" in page
        stages = [s["recall"] for s in f["waterfall"][question]]
        assert stages == sorted(stages, reverse=True) and stages[0] == 1

def test_every_step_has_its_page_and_pages_ask_nobody(published, shop):
    pages = [*(shop/"reports/runs"/published["figures"]["date"]).glob("*.html"), shop/"reports/index.html"]
    assert len(pages) == len(STEPS) + 1
    for p in pages:
        text = p.read_text()
        assert len(text) < 1_500_000 and not re.search(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(\s*["']?https?:""", text), p.name
        assert str(shop) not in text, f"{p.name} tells the path of the machine"

@pytest.mark.bench # several runs of the cycle
def test_the_date_moves_the_moment(published, shop):
    r = recsys(shop, "run", "--allow-regression", "--date", "2024-04-15", "--json", "early.json")
    assert r.returncode == 0, r.stderr
    early = json.loads((shop/"early.json").read_text())
    assert early["date"] == "2024-04-15" and early["rows"] == len([1 for e in events() if e["time"] < "2024-04-15"])
    state = max((shop/"data/steps").glob("ingest-*"), key=lambda p: p.stat().st_mtime)
    assert max(p.name for p in (state/"events").iterdir()) == "day=2024-04-14"
    said = json.loads((shop/"reports/runs/2024-04-15/run.json").read_text())["headline"]["sentence"]
    assert f"Since the run of {published['figures']['date']}: " in said

@pytest.mark.bench # several runs of the cycle
def test_the_same_seed_gives_the_same_figures(published, tmp_path):
    other = make_shop(tmp_path/"again")
    r = recsys(other, "run", "--allow-regression", "--json", "figures.json")
    assert r.returncode == 0, r.stderr
    again = json.loads((other/"figures.json").read_text())
    for key in ("metrics", "baselines", "waterfall", "rows"): assert again[key] == published["figures"][key], key

def test_what_lost_is_not_published(tmp_path):
    "Baskets drawn from popularity alone: there is nothing to know, so nothing can be better than the best baseline."
    import numpy as np
    folder, rng = make_shop(tmp_path/"noise"), np.random.default_rng(1)
    p = 1 / np.arange(1, 61); p /= p.sum()
    rows = events()
    for r in rows: r["article"] = f"a{rng.choice(60, p=p)}"
    write_csv(folder/"events.csv", [{**r, "id": str(n)} for n, r in enumerate(rows)])
    r = recsys(folder, "run")
    assert r.returncode == 2 and not (folder/"data/bundles/current").exists()
    one_line(r, "no better than the best baseline", "--allow-regression")
    page = (next((folder/"reports/runs").iterdir())/"evaluate.html").read_text()
    assert page.index("NOT better than the best baseline") < page.index("Against each baseline")
    assert "regression" in (next((folder/"reports/runs").iterdir())/"run.json").read_text()
    again = recsys(folder, "run", "--allow-regression")
    assert again.returncode == 0 and [n for n, l in lines(again.stdout).items() if "skipped" not in l] == ["publish"]

@pytest.mark.bench # several runs of the cycle
def test_the_gate_lets_an_equal_ranker_in_and_keeps_one_out_that_says_the_opposite(published, shop, tmp_path):
    "Beside the version of the run, on its own test weeks. The failed checks are those that it must fail."
    from recsys.core.settings import load_settings
    from recsys.operations.publish import Refused, publish, release
    from recsys.operations.registry import releases, serving
    assert recsys(shop, "run", "--allow-regression").returncode == 0
    s = load_settings(shop/"settings.ini")
    now, bundles = serving(s), shop/"data/bundles"
    folders = {n: shop/"data/steps"/f for n, f in json.loads((bundles/"current/manifest.json").read_text())["parents"].items()}
    def judged(name, change):
        train, out = tmp_path/f"train-{name}", tmp_path/name
        shutil.copytree(folders["train"], train); change(train/"ranker.txt"); out.mkdir()
        return out, publish(folders | dict(train=train), bundles, out, s)[2]
    def turned(file):
        text = re.sub(r"(?m)^tree_sizes=.*\n", "", file.read_text())
        file.write_text(re.sub(r"(?m)^leaf_value=(.*)$", lambda m: "leaf_value=" + " ".join(str(-float(v)) for v in m[1].split()), text))
    out, bad = judged("bad", turned)
    failed = {c.name for c in bad.checks if not c.passed}
    assert bad.verdict == "refused" and bad.champion == now and {"next basket: NDCG@5", "completion: NDCG@5", "next basket: probabilities"} <= failed and "rules" not in failed
    before = releases(s)
    with pytest.raises(Refused, match="NDCG@5: -"): release(out, s, "a test")
    r = recsys(shop, "promote", bad.challenger, "--why", "a test")
    assert r.returncode == 1 and releases(s) == before and serving(s) == now
    one_line(r, "the gate refused version", "--anyway")
    out, same = judged("same", lambda file: None)
    assert same.verdict == "passed" and {c.name: c.value for c in same.checks if "NDCG" in c.name} == {"next basket: NDCG@5": 0, "completion: NDCG@5": 0}, same
    release(out, s, "a test")
    assert serving(s) == same.challenger and recsys(shop, "rollback", "--why", "a test").returncode == 0 and serving(s) == now

def toy_job(folder, *cells: str):
    "A project folder whose only job, `toy`, has these cells."
    import nbformat.v4 as nb4
    jobs = folder/"nbs/jobs"
    jobs.mkdir(parents=True)
    (folder/"settings.ini").write_text(settings_text())
    parameters = nb4.new_code_cell("out = ''", metadata=dict(tags=["parameters"]))
    (jobs/"toy.ipynb").write_text(json.dumps(nb4.new_notebook(cells=[parameters, *map(nb4.new_code_cell, cells)], metadata=dict(kernelspec=dict(name="python3", language="python", display_name="Python 3")))))
    return folder

# Past the streams of Python, as a C library does while the kernel ends. (ipykernel catches the descriptor, too, while cells run, but not under pytest.)
PAST = "import atexit, os; past = lambda text: os.write(2, text)"

def test_what_a_kernel_says_past_its_cells_stays_off_the_terminal(tmp_path):
    r = recsys(toy_job(tmp_path, PAST, "atexit.register(past, b'Assertion failed (src/nobody.cpp:1)'); past(b'and a warning')"), "job", "toy")
    assert r.returncode == 0 and not r.stderr and "Assertion" not in r.stdout and "warning" not in r.stdout, r.stderr + r.stdout

@pytest.mark.parametrize("words, end", [("", "died"), ("no memory for 7 bytes", "died: no memory for 7 bytes")])
def test_the_last_words_of_a_kernel_that_died_are_told(tmp_path, words, end):
    r = recsys(toy_job(tmp_path, PAST, f"past({words!r}.encode()); os.kill(os.getpid(), 9)"), "job", "toy")
    assert r.returncode == 1
    one_line(r, f"the kernel {end}", "job toy", "out of memory")

def test_a_temporary_folder_whose_path_no_socket_can_have_is_named(tmp_path, monkeypatch):
    long = tmp_path/("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    r = recsys(toy_job(tmp_path/"shop", "1"), "job", "toy")
    assert r.returncode == 1
    one_line(r, "its path is too long for a socket", str(long), "set TMPDIR to a shorter one")

def test_two_runs_at_once_are_refused(published, shop):
    import fcntl
    with (shop/"data/.lock").open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        r = recsys(shop, "run")
    assert r.returncode == 75
    one_line(r, "another run", "wait for it to end")

def test_interrupting_is_no_failure(tmp_path):
    folder = make_shop(tmp_path/"shop")
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job, as these tests may be, ignores Ctrl-C, and so would its children
    p = subprocess.Popen([COMMAND, "run"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard)
    for line in p.stdout:
        if line.startswith("ingest"): break
    os.killpg(p.pid, signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and err.strip().splitlines()[-1].startswith("recsys: interrupted") and "Traceback" not in err, err
    assert not [d for d in (folder/"data").rglob(".*.tmp-*")] and (folder/"data/steps").is_dir()

@pytest.mark.bench # several runs of the cycle
def test_going_back_to_a_result_makes_it_current_again(published, shop):
    "Publishing is a step like any other, but `current` may have been moved since by another run."
    first = published["figures"]["version"]
    bundles = shop/"data/bundles"
    assert recsys(shop, "run", "--allow-regression", "--date", "2024-04-15").returncode == 0 and os.readlink(bundles/"current") != first
    again = recsys(shop, "run", "--allow-regression")
    assert again.returncode == 0 and all("skipped" in l for l in lines(again.stdout).values()) and os.readlink(bundles/"current") == first
    damaged = bundles/first/"users_text.npy"
    data = damaged.read_bytes(); damaged.unlink(); damaged.write_bytes(data[:-1])
    mended = recsys(shop, "run", "--allow-regression")
    assert mended.returncode == 0 and [n for n, l in lines(mended.stdout).items() if "skipped" not in l] == ["publish"], mended.stdout + mended.stderr
    assert damaged.read_bytes() == data

# ---- an answer in the terminal

def test_recommend_prints_a_table_with_reasons(published, shop):
    r = recsys(shop, "recommend", "--user", "c1", "--cart", "a1,a2", "--n", "5", env=dict(COLUMNS="160"))
    assert r.returncode == 0 and "bought" in r.stdout and "Article" in r.stdout and re.search(r"model 2024\d{4}-[0-9a-f]{8}, ", r.stdout), r.stdout
    a = json.loads(recsys(shop, "recommend", "--user", "c1", "--cart", "a1,a2", "--n", "5", "--json", "--explain").stdout)
    assert len(a["items"]) == 5 and not {"a1", "a2"} & {i["item_id"] for i in a["items"]}
    assert all(i["source"] and i["reason"] and i["contributions"] for i in a["items"]) and [i["rank"] for i in a["items"]] == [1, 2, 3, 4, 5]

def test_recommend_says_what_it_does_not_know(published, shop):
    r = recsys(shop, "recommend", "--user", "nobody", "--cart", "nothing", "--n", "3")
    assert r.returncode == 0 and "nothing is known of user nobody" in r.stderr and "not in the catalogue: nothing" in r.stderr
    assert recsys(shop, "recommend", "--n", "0").returncode == 1

# ---- bad input: one clear line, a non-zero exit, and everything still there

def csv_with(folder, change):
    rows = events()
    change(rows); write_csv(folder/"events.csv", rows)

def drop(rows, column):
    for r in rows: del r[column]

def set_all(rows, **values):
    for r in rows: r.update(values)

BAD = {
    "missing file": (lambda f: (f/"events.csv").unlink(), ("events.csv", "no such file")),
    "empty file": (lambda f: (f/"events.csv").write_text(""), ("events.csv", "empty")),
    "wrong column": (lambda f: csv_with(f, lambda r: drop(r, "article")), ("article", "events.csv")),
    "wrong type": (lambda f: csv_with(f, lambda r: set_all(r, time="yesterday")), ("time", "events.csv")),
    "unknown event type": (lambda f: csv_with(f, lambda r: set_all(r, action="sniffed")), ("sniffed", "events.csv", "ours are: ")),
    "too many bad rows": (lambda f: csv_with(f, lambda r: set_all(r[:len(r) // 4], action="sniffed")), ("quarantine", "event_type")),
    "truncated parquet": (lambda f: truncate(f), ("events.parquet", "not readable as parquet")),
    "unknown mapping key": (lambda f: (f/"shop.toml").write_text(MAPPING + "colour = 'red'\n"), ("shop.toml", "colour"))}

def truncate(folder):
    import polars as pl
    pl.DataFrame(events()).write_parquet(folder/"events.parquet")
    data = (folder/"events.parquet").read_bytes(); (folder/"events.parquet").write_bytes(data[:len(data) // 2])
    (folder/"shop.toml").write_text(MAPPING.replace("events.csv", "events.parquet"))

@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_line_and_harms_nothing(published, shop, what):
    break_it, parts = BAD[what]
    kept = {p: (shop/p).read_bytes() for p in ("events.csv", "shop.toml")}
    before = {k: v for k, v in files(shop).items() if k != "reports/index.html" and "reports/runs/latest/" not in k and not k.startswith("reports/incidents/") and not k.endswith((".jsonl", ".alerts.lock"))}  # what failed is decided on, too
    try:
        break_it(shop)
        r = recsys(shop, "run")
    finally:
        for p, data in kept.items(): (shop/p).write_bytes(data)
    assert r.returncode == 1, r.stdout + r.stderr
    one_line(r, *parts)
    after = files(shop)
    assert {k: after.get(k) for k in before} == before
    assert (shop/"data/bundles/current/manifest.json").is_file()

def test_duplicates_and_the_future_are_set_aside_with_their_reason(tmp_path):
    folder = make_shop(tmp_path/"shop")
    rows = events()
    write_csv(folder/"events.csv", rows + rows[:50] + [dict(rows[0], id="tomorrow", time="2999-01-01T00:00:00")])
    r = recsys(folder, "job", "ingest")
    assert r.returncode == 0, r.stderr
    said = json.loads(next((folder/"reports/runs").glob("ingest-*/out/ingest.json")).read_text())
    assert said["duplicates"] == 50 and said["quarantined"] == 1 and said["rows"] == len(rows) and sum(said["quarantine_reasons"].values()) == 51, said
    assert [k for k in said["quarantine_reasons"] if "duplicate event_id" in k] and [k for k in said["quarantine_reasons"] if "future" in k or "later than" in k], said["quarantine_reasons"]

def test_unknown_settings_jobs_and_parameters(shop):
    one_line(recsys(shop, "run", env=dict(RECSYS_RUN_SEDE="1")), "unknown key 'sede'", "[run]")
    one_line(recsys(shop, "run", env=dict(RECSYS_RUN_SEED="x")), "[run] seed")
    one_line(recsys(shop, "run", "--date", "soon"), "'soon' is not a day")
    one_line(recsys(shop, "job", "ingest", "-p", "dat=2024-01-01"), "unknown parameter 'dat'", "date")
    one_line(recsys(shop, "job", "digest"), "no such job", "ingest")
    one_line(recsys(shop, "job", "ingest", "-p", "date"), "not key=value")
    one_line(recsys(shop, "job", "publish"), "goes through the gate")

def test_nothing_published_yet(tmp_path):
    folder = make_shop(tmp_path/"shop")
    one_line(recsys(folder, "recommend", "--user", "c1"), "no bundle has been published", "recsys run")

FULL = """
import os, shutil, subprocess, sys
disk, shop, command = sys.argv[1:]
os.environ.update(RECSYS_PATHS_DATA=disk + "/data", RECSYS_PATHS_REPORTS=disk + "/reports")
run = lambda: subprocess.run([command, "run"], cwd=shop, capture_output=True, text=True)
os.makedirs(disk + "/data/bundles"); open(disk + "/data/bundles/kept", "w").write("yes")
r = run()
left = [p for p in os.listdir(disk + "/data/steps")] if os.path.isdir(disk + "/data/steps") else []
print(r.returncode, repr(r.stderr), repr(left), open(disk + "/data/bundles/kept").read())
"""

def test_a_full_disk(tmp_path):
    "A real disk of 1.5 MB: the run stops with one line, keeps what was there, and leaves nothing half written."
    shop, disk = make_shop(tmp_path/"shop"), tmp_path/"disk"
    disk.mkdir()
    mount = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-c", 'mount -t tmpfs -o size=1500k tmpfs "$1" || exit 77; shift; exec "$@"', "sh", str(disk)]
    try: r = subprocess.run([*mount, sys.executable, "-c", FULL, str(disk), str(shop), COMMAND], capture_output=True, text=True, timeout=200)
    except FileNotFoundError: pytest.skip("no unshare here, so no small disk can be mounted")
    if r.returncode == 77 or (r.returncode and r.stderr.startswith("unshare:")): pytest.skip(f"no small disk can be mounted: {r.stderr.strip()}")
    assert r.stdout.startswith("1 'recsys: ") and "the disk is full" in r.stdout and "Traceback" not in r.stdout and r.stdout.strip().endswith("yes"), r.stdout + r.stderr
    left = re.search(r"\[(.*?)\]", r.stdout).group(1)
    assert ".tmp-" not in left, left
