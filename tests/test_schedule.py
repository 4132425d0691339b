"The daily run day by day: our own scheduler for real, on a beat of seconds, and the files for those of others."
import ast, os, re, shutil, signal, subprocess, threading, time
from pathlib import Path

import psutil, pytest
from hypothesis import given, strategies as st

from recsys.core.files import read_json
from recsys.core.settings import RecsysError
from recsys.operations.cli import parser
from recsys.operations.schedule import ENDS, trigger_of
from shop import COMMAND, ROOT, ended, recsys
from test_run import one_line
from toy import make_toy, one_more_event

# ---- ours

class Scheduled:
    "`recsys schedule` in a process of its own, and the lines of its log."
    def __init__(self, folder):
        self.lines = []
        self.process = subprocess.Popen([COMMAND, "schedule"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.reader = threading.Thread(target=lambda: [self.lines.append(l.rstrip()) for l in self.process.stdout]); self.reader.start()

    def until(self, text: str, after: int = 0, seconds: float = 200) -> int:
        "The number of lines up to the first after `after` with this text."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for k, l in enumerate(self.lines[after:], after + 1):
                if text in l: return k
            assert self.process.poll() is None, self.lines
            time.sleep(.1)
        raise AssertionError((text, self.lines))

    def end(self) -> float:
        "SIGTERM; the seconds that it took."
        start, children = time.monotonic(), psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        assert self.process.wait(60) == 0
        self.reader.join()
        assert all(ended(p.pid) for p in psutil.wait_procs(children, 10)[1]), "nobody is left behind"
        return time.monotonic() - start

def test_it_survives_a_failure_runs_again_and_stops_in_the_middle_of_a_run(tmp_path):
    broken = 'import os\nif not os.path.exists("once"):\n    open("once", "w").close()\n    1 / 0'
    folder = make_toy(tmp_path/"shop", extra=dict(ingest=broken, drift="import time; time.sleep(1000) if __import__('os').path.exists('slow') else None"), cron="*/2 * * * * *")
    s = Scheduled(folder)
    at = s.until("it failed", s.until("ZeroDivisionError"))
    at = s.until("all is well", s.until("a run begins", at)) # the next one
    one_more_event(folder); (folder/"slow").touch()
    s.until("evaluate ", s.until("a run begins", at)); time.sleep(1)
    s.end()
    assert any("stopping" in l for l in s.lines) and "interrupted" in " ".join(s.lines[-4:]), s.lines
    (folder/"slow").unlink()
    r = recsys(folder, "run")
    assert r.returncode == 0 and r.stdout.count("skipped") == 6 and read_json(folder/"reports"/"runs"/"2024-03-01"/"run.json")["status"] == "ok"

def test_what_is_no_schedule_is_told(tmp_path):
    folder = make_toy(tmp_path/"shop", cron="0 4 * * 0")
    one_line(recsys(folder, "schedule"), "the day of the week is a number")
    one_line(recsys(folder, "schedule", env=dict(RECSYS_SCHEDULE_CRON="daily")), "[schedule] cron")

def test_a_day_that_never_comes_is_no_schedule(tmp_path):
    folder = make_toy(tmp_path/"shop", cron="0 0 30 2 *")
    one_line(recsys(folder, "schedule"), "'0 0 30 2 *' never comes")
    assert trigger_of("0 0 29 2 *", "Europe/Berlin"), "every four years"

@given(st.text(st.sampled_from("0123456789*/,-abmonfri ? #L"), max_size=20), st.sampled_from(["UTC", "Europe/Berlin", "", "Nowhere", "../etc"]))
def test_any_text_is_a_schedule_or_a_clear_error(cron, zone):
    try: trigger_of(cron, zone)
    except RecsysError as e: assert "\n" not in str(e)

# ---- others'

FOLDER = ROOT/"deploy"/"schedulers"
PYTHON = {p.name: ast.parse(p.read_text(encoding="utf-8")) for p in sorted(FOLDER.glob("*.py"))}

def commands(name: str) -> list[str]:
    "The arguments of `recsys` in a file."
    text = (FOLDER/name).read_text(encoding="utf-8")
    return re.findall(r"bin/recsys(?: |\", \")([\w-]+)", text)

@pytest.mark.parametrize("name", sorted(p.name for p in FOLDER.iterdir() if p.suffix != ".timer"))
def test_each_runs_a_command_that_exists(name):
    assert commands(name) == ["run"]
    parser().parse_args(commands(name))

@pytest.mark.parametrize("name", PYTHON)
def test_the_python_ones_import_their_scheduler_and_nothing_of_ours(name):
    tree = PYTHON[name]
    tops = {n.names[0].name.split(".")[0] if isinstance(n, ast.Import) else n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert tops - {"subprocess", "datetime"} == {name.split("_")[0]}
    compile(tree, name, "exec")

@pytest.mark.parametrize("name", ["prefect_flow.py", "dagster_job.py"])
def test_their_exit_codes_are_ours(name):
    said = {n.targets[0].elts[k].id: v.value for n in PYTHON[name].body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Tuple) and isinstance(n.targets[0], ast.Tuple)
            for k, v in enumerate(n.value.elts) if isinstance(v, ast.Constant) and isinstance(v.value, int)}
    assert said == dict(LOOK=2, BUSY=75) and {*said.values()} < ENDS.keys()

def test_the_cron_line_is_one():
    line, = [l for l in (FOLDER/"recsys.cron").read_text().splitlines() if l and l[0] != "#" and not re.match(r"\w+=", l)]
    fields, command = line.split(None, 5)[:5], line.split(None, 5)[5]
    trigger_of(" ".join(fields), "UTC")
    assert subprocess.run(["sh", "-n", "-c", command]).returncode == 0

def test_the_cron_line_runs(tmp_path):
    "With the project where the line says, in a folder of the test."
    folder = make_toy(tmp_path/"shop")
    (folder/".venv"/"bin").mkdir(parents=True); (folder/".venv"/"bin"/"recsys").symlink_to(COMMAND)
    line = (FOLDER/"recsys.cron").read_text().splitlines()[-1].split(None, 5)[5].replace("/srv/recsys", str(folder))
    assert subprocess.run(["sh", "-c", line], capture_output=True, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "HOME": str(tmp_path)}).returncode == 0

def test_the_units_are_what_systemd_expects(tmp_path):
    if not (analyse := shutil.which("systemd-analyze")): pytest.skip("no systemd-analyze here")
    program = tmp_path/".venv"/"bin"/"recsys"; program.parent.mkdir(parents=True); program.symlink_to(COMMAND)
    for name in ("recsys.service", "recsys.timer"): (tmp_path/name).write_text((FOLDER/name).read_text().replace("/srv/recsys", str(tmp_path)))
    r = subprocess.run([analyse, "verify", "--man=no", str(tmp_path/"recsys.service"), str(tmp_path/"recsys.timer")], capture_output=True, text=True)
    assert r.returncode == 0 and not [l for l in r.stderr.splitlines() if "recsys" in l], r.stderr
    when = re.search(r"OnCalendar=(.*)", (tmp_path/"recsys.timer").read_text())[1]
    assert subprocess.run([analyse, "calendar", when], capture_output=True).returncode == 0
