"Who carries out a decision to retrain? The run that makes it: with the real decide job, on findings of a made-up drift report."
import json, shutil

from recsys.core.files import read_json
from recsys.core.settings import load_settings
from recsys.operations.act import decisions_file
from recsys.operations.alerts import listing
from recsys.operations.decisions import read_decisions
from recsys.operations.registry import serving
from shop import ROOT, recsys
from toy import make_toy, one_more_event

def slow_shop(folder):
    "A toy whose drift report says that clicks follow otherwise than before, since the day before the first."
    make_toy(folder, extra=dict(validate='import json\nopen(f"{out}/checks.json", "w").write("[]")'))
    shutil.copy(ROOT/"nbs"/"jobs"/"decide.ipynb", folder/"nbs"/"jobs"/"decide.ipynb")
    drift = folder/"nbs"/"jobs"/"drift.ipynb"
    book, concept = json.loads(drift.read_text()), [dict(kind="click", performance=[], drift=dict(findings=[dict(segment="all", before=1., after=.5, since="2024-02-28T00:00:00")]))]
    cell = book["cells"][-1]
    said = "".join(cell["source"])
    assert "severity=0)" in said
    cell["source"] = said.replace("severity=0)", f"severity=0, comparison=dict(columns=[]), attribution=[], attribution_segments=[], attribution_ndcg=1., concept={concept!r})")
    drift.write_text(json.dumps(book))
    return folder

def test_the_run_that_decides_to_retrain_has_trained_on_all_that_it_decides_from(tmp_path):
    folder = slow_shop(tmp_path/"shop")
    s = load_settings(folder/"settings.ini")
    def run(day):
        r = recsys(folder, "run")
        assert r.returncode == 0, r.stderr + r.stdout
        d, steps = read_decisions(decisions_file(s))[-1], read_json(s.reports_dir/"runs"/day/"manifest.json")["steps"]
        assert d.day == day
        for name in ("drift", "train"): # the report that was decided on, and the model, come from one ingest
            at = steps[name]["parents"]
            assert {at.get("ingest"), steps["features"]["parents"]["ingest"]} - {None} == {steps["ingest"]["fingerprint"]}
        return d, steps

    d, steps = run("2024-03-01")
    assert d.action == "nothing" and steps["train"]["status"] == "done", "a warning must last"
    first = serving(s)
    one_more_event(folder, "2024-03-02")
    d, steps = run("2024-03-02")
    assert d.action == "retrain" and steps["train"]["status"] == steps["publish"]["status"] == "done" and serving(s) not in (None, first), "and the new model serves"
    alert, = listing(s)
    assert "This run has trained the model anew" in alert["todo"]

    trained = steps["train"]["fingerprint"]
    d, steps = run("2024-03-02")
    assert d.action == "retrain" and {steps[n]["status"] for n in ("train", "decide", "publish")} == {"skipped"} and steps["train"]["fingerprint"] == trained, "the same data: once more would give the same bytes"

    folders = {n: next(p for p in (s.data_dir/"steps").glob(f"{n}-*") if p.name.endswith(steps[n]["fingerprint"])) for n in ("ingest", "validate", "evaluate", "drift")}
    at = {n: str(p.relative_to(folder)) for n, p in folders.items()}
    r = recsys(folder, "job", "decide", *(x for n, p in at.items() for x in ("-p", f"{n}={p}")))
    assert r.returncode == 0 and len(read_decisions(decisions_file(s))) == 2, "decided by hand between two runs, from the same results: the decision that there is"

    one_more_event(folder, "2024-03-03")
    d, steps = run("2024-03-03")
    assert d.action == "nothing" and "waits for the retrain" in d.because and steps["train"]["status"] == "done" and steps["train"]["fingerprint"] != trained, "what came later is learned, whatever was decided"
