"Checks of nightly size, `make bench`: the default data from end to end, and a run that is killed again and again."
import json, os, random, shutil, signal, subprocess, time

import pytest
from shop import COMMAND, ROOT, make_shop, recsys

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

def test_the_complete_journey(tmp_path):
    "The main job as `make run` does it: the list beats every baseline, the interval excluding zero, in less than 8 GB."
    for name in ("nbs", "constraints.txt"): (tmp_path/name).symlink_to(ROOT/name)
    shutil.copy(ROOT/"settings.ini", tmp_path)
    r = recsys(tmp_path, "run", "--json", "figures.json", timeout=3000)
    assert r.returncode == 0, r.stdout + r.stderr
    f = json.loads((tmp_path/"figures.json").read_text())
    print(f"\n{f['seconds']} s, {f['peak_rss_mb']} MB")
    assert f["rows"] == 1_459_912 and f["quarantined"] == 8_869 and f["peak_rss_mb"] < 8000
    for question, against in f["against"].items():
        for name, a in against.items(): assert a["low"] > 0, (question, name, a)

@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_any_moment_can_be_gone_on_with(tmp_path_factory, seed):
    "kill -9 of the whole process group at a random moment; whatever is visible is whole, and the next run ends as if nothing had been."
    folder = make_shop(tmp_path_factory.getbasetemp()/"killed")  # the same shop for all seeds: each run goes on where the last was killed
    p = subprocess.Popen([COMMAND, "run", "--allow-regression"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(random.Random(seed).uniform(0, 45))
    try: os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    p.wait()
    for step in (folder/"data/steps").glob("[a-z]*"): assert json.loads((step/"step.json").read_text())["seconds"] >= 0
    for page in (folder/"reports").rglob("*.html"): assert page.read_text().rstrip().endswith("</html>")
    if (folder/"data/bundles/current").exists():
        assert recsys(folder, "recommend", "--user", "c1", "--json").returncode == 0
    if seed % 5 == 4:
        r = recsys(folder, "run", "--allow-regression", "--json", "figures.json")
        assert r.returncode == 0, r.stderr
        figures = json.loads((folder/"figures.json").read_text())
        known = folder/"first.json"
        if not known.exists(): known.write_text(json.dumps(figures["metrics"]))
        assert json.loads(known.read_text()) == figures["metrics"]
        shutil.rmtree(folder/"data"); shutil.rmtree(folder/"reports")
