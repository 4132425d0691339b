"A run that fails before its first step tells people, through a real web server: once, whatever is broken, and not at all when another run is merely at work."
import os, re, subprocess, sys, time
from datetime import datetime, timedelta, timezone

import pytest

from recsys.core.settings import load_settings, salvaged
from recsys.operations.alerts import listing
from recsys.operations.cycle import refusals_file, tell_failure
from recsys.operations.runner import Busy, run_lock
from shop import recsys
from test_alerts import hook, told
from test_run import one_line
from toy import make_toy

def env(hook, **more): return dict(RECSYS_ALERTS_WEBHOOK=hook.url, RECSYS_ALERTS_TRIES="1") | more
def hooked(folder, hook, **changes):
    "A toy whose settings.ini names the web server."
    file = make_toy(folder, tries=1, **changes)/"settings.ini"
    text = file.read_text()
    file.write_text(re.sub(r"(?m)^webhook =$", f"webhook = {hook.url}", text))
    return folder

def open_keys(folder): return [r["key"] for r in listing(load_settings(folder/"settings.ini"))]

def test_a_source_that_is_gone_is_told_once_until_a_run_begins_again(hook, tmp_path):
    folder = make_toy(tmp_path/"shop")
    (folder/"events.csv").rename(folder/"aside")
    for _ in range(2): one_line(recsys(folder, "run", env=env(hook)), "events.csv")
    said, = told(hook)
    assert said["severity"] == "critical" and "events.csv" in said["what"] and "the run failed" in said["what"] and said["source"] == "run" and len(open_keys(folder)) == 1
    (folder/"aside").rename(folder/"events.csv")
    assert recsys(folder, "run", env=env(hook)).returncode == 0 and open_keys(folder) == [] and len(hook.got) == 1

def test_a_data_folder_that_cannot_be_written_is_told_each_time(hook, tmp_path):
    folder = make_toy(tmp_path/"shop")
    (folder/"full").write_text("a file")
    for k in range(2):
        assert recsys(folder, "run", env=env(hook, RECSYS_PATHS_DATA="full/data")).returncode == 1
        assert len(told(hook)) == k + 1 and "the run failed" in told(hook)[-1]["what"]

@pytest.mark.parametrize("right, wrong", [("\nsnapshots = ", "\nsnapshots = many"), ("[ranker]", "[rankr]"), ("\nescalate_hours = ", "\nescalate_hours = soon"), ("[run]", "no setting\n[run]")])
def test_settings_with_a_mistake_are_told_to_those_whom_they_name(hook, tmp_path, right, wrong):
    file = hooked(tmp_path/"shop", hook)/"settings.ini"
    text = file.read_text()
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    for _ in range(2): one_line(recsys(tmp_path/"shop", "run"), "settings.ini")
    said, = told(hook)
    assert "settings.ini" in said["what"]
    file.write_text(text)
    assert recsys(tmp_path/"shop", "run").returncode == 0 and open_keys(tmp_path/"shop") == []

def test_where_there_are_no_settings_those_of_the_environment_are_told_and_nothing_is_made(hook, tmp_path):
    one_line(recsys(tmp_path, "run", env=env(hook)), "no settings.ini")
    assert ["no settings.ini" in t["what"] for t in told(hook)] == [True] and not [*tmp_path.iterdir()]

def test_salvaged_settings_never_write_letters_in_the_clear(tmp_path):
    file = tmp_path/"settings.ini"
    file.write_text("nonsense\n[alerts]\nwebhook = http://127.0.0.1:1/\nsmtp_host = mail.shop.example\nsmtp_security = none\nemail_from = a@shop.example\nemail_to = b@shop.example\n")
    assert salvaged(file).alerts.smtp_host == "" and salvaged(tmp_path/"none.ini").file.endswith("none.ini")
    file.write_text("[alerts]\nsmtp_host = mail.shop.example\nsmtp_port = many\nemail_from = a@shop.example\nemail_to = b@shop.example\nunknown = 1\n")
    assert salvaged(file).alerts.smtp_host == "mail.shop.example" and salvaged(file).alerts.smtp_security != "none"

def test_another_run_at_work_is_told_only_when_it_takes_too_long(hook, tmp_path):
    folder = make_toy(tmp_path/"shop")
    s = load_settings(folder/"settings.ini")
    def busy(hours: float, **more):
        with run_lock(s.data_dir):
            at = time.time() - hours * 3600
            os.utime(s.data_dir/".lock", (at, at))
            return recsys(folder, "run", env=env(hook, **more)).returncode
    assert [busy(h) for h in (0, 1, 23)] == [75] * 3 and not hook.got, "three within a minute are somebody's impatience"
    assert busy(25) == busy(26) == 75 and [t["key"] for t in told(hook)] == ["run:busy"] and "25.0 hours" in told(hook)[0]["what"]
    assert recsys(folder, "run", env=env(hook)).returncode == 0 and open_keys(folder) == [] and not refusals_file(s).exists()
    assert busy(.58, RECSYS_SCHEDULE_STEP_MINUTES="1", RECSYS_SCHEDULE_RETRIES="3") == 75 and open_keys(folder) == [], "36 minutes is what nine steps of a minute may take, with their tries"
    assert busy(.62, RECSYS_SCHEDULE_STEP_MINUTES="1", RECSYS_SCHEDULE_RETRIES="3") == 75 and open_keys(folder) == ["run:busy"]

def test_three_in_a_row_are_too_many_and_a_run_that_begins_ends_the_row(hook, tmp_path):
    s, t = load_settings(hooked(tmp_path/"shop", hook)/"settings.ini"), datetime.now(timezone.utc)
    def refused(hours):
        with run_lock(s.data_dir):
            with pytest.raises(Busy) as e, run_lock(s.data_dir): pass
        tell_failure(s, e.value, t + timedelta(hours=hours))
        return len(hook.got)
    assert [refused(h) for h in (0, 1)] == [0, 0]
    assert recsys(tmp_path/"shop", "run").returncode == 0
    assert [refused(h) for h in (2, 3, 4, 5)] == [0, 0, 1, 1] and "the last 3 all met another one at work" in told(hook)[0]["what"]

def test_the_scheduler_tells_of_a_run_that_was_killed(hook, tmp_path):
    folder = hooked(tmp_path/"shop", hook, cron="* * * * * *")
    code = "import sys; from recsys.core.settings import load_settings; from recsys.operations.schedule import schedule; schedule(load_settings(), [sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'])"
    p = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not hook.got: assert p.poll() is None and time.monotonic() < end; time.sleep(.1)
    time.sleep(3); p.terminate()
    assert p.wait(30) == 0 and len(hook.got) == 1 and "killed by signal 9" in told(hook)[0]["what"]

def test_the_next_run_tells_of_one_that_was_killed(hook, tmp_path):
    folder = hooked(tmp_path/"shop", hook)
    s = load_settings(folder/"settings.ini")
    code = "import os\nfrom recsys.core.settings import load_settings\nfrom recsys.operations import cycle as c\ndef run(s, *more):\n    with c.run_lock(s.data_dir): os.kill(os.getpid(), 9)\nc.run = run\nc.cycle(load_settings())"
    for _ in range(2): assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == -9 and not hook.got
    assert recsys(folder, "run").returncode == 0
    assert [t["key"] for t in told(hook)] == ["run:killed"] == open_keys(folder) and "since 2" in told(hook)[0]["what"]
    assert recsys(folder, "run").returncode == 0 and open_keys(folder) == [] and len(hook.got) == 1
