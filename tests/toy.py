"A shop whose jobs take a second each and write made-up figures: the runner, its locks, kernels, releases and pages are the real ones."
import json
from pathlib import Path

import nbformat.v4 as nb4

from recsys.operations.runner import STEPS
from shop import settings_text

START = """
import json, os, time
from pathlib import Path
from recsys.core.files import atomic_dir, digest, file_digest, read_json, write_json
from recsys.core.settings import load_settings
settings, out = load_settings(), Path(out)
root = Path(settings.file).parent
def big(name):  # large enough to be met half-way
    with (out/name).open("wb") as f:
        for k in range(64): f.write(bytes([k]) * 65536)
big("table.bin")
(out/"parents.txt").write_text(" ".join(sorted(Path(p).name for p in PARENTS)))
"""
JOBS = dict(
    ingest='rows = (root/"events.csv").read_text().splitlines()[1:]\nwrite_json(out/"ingest.json", dict(moment=(date or rows[-1].split(",")[1][:10]) + "T00:00:00+00:00", rows=len(rows), quarantined=0, dataset="toy", about="made up"))',
    evaluate='f = lambda v: {"ndcg@5": dict(value=v, low=v - .01, high=v + .01)}\n'
             'write_json(out/"evaluation.json", dict(questions=dict(next_basket=dict(cases=99, metrics=f(.3), baselines=dict(popularity=f(.2)), best_baseline="popularity", waterfall=[], against=dict(popularity=dict(difference=.1, low=.09, high=.11))))))',
    decide='from recsys.core.settings import as_dict\nnames = [Path(p).name for p in PARENTS]\n'
           'write_json(out/"decide.json", dict(names=names, decision=dict(day="2024-03-01", action="nothing", because="calm", of=digest(sorted(names), [], as_dict(settings, "decisions")))))',
    drift='write_json(out/"drift.json", dict(verdict="good", sentence="calm", material=[], severity=0))',
    publish="""bundles = settings.data_dir/"bundles"
moment, now = read_json(Path(ingest)/"ingest.json")["moment"], os.readlink(bundles/"current") if (bundles/"current").is_symlink() else None
version = moment[:10].replace("-", "") + "-" + digest(*(Path(p).name for p in PARENTS))[:8]
if not (bundles/version).exists():
    with atomic_dir(bundles/version) as tmp:
        (tmp/"table.bin").write_bytes((out/"table.bin").read_bytes())
        write_json(tmp/"manifest.json", dict(version=version, moment=moment, files={"table.bin": file_digest(tmp/"table.bin")}))
good, older = not (root/"bad").exists(), now and read_json(bundles/now/"manifest.json")["moment"] > moment
said = dict(verdict="first" if not now else "older" if older else "passed" if good else "refused", sentence="fine" if good else "lists: -30 %", challenger=version, champion=now,
            checks=[dict(name="lists", passed=good, value=0. if good else -.3, limit=-.02, said="fine" if good else "-30 %")])
for path in (out/"gate.json", settings.data_dir/"gates"/f"{version}.json"): write_json(path, said)
write_json(out/"publish.json", dict(version=version))""")

def make_toy(folder: Path, extra: dict[str, str] = {}, **changes) -> Path:
    "A project folder; `extra`: source that a job runs first."
    (folder/"nbs"/"jobs").mkdir(parents=True)
    for s in STEPS:
        names = [*s.parents, *([] if s.parents else ["date"]), "out"]
        cells = [nb4.new_code_cell("\n".join(f"{n} = ''" for n in names), metadata=dict(tags=["parameters"])), nb4.new_code_cell(extra.get(s.name, "pass")),
                 nb4.new_code_cell(f"PARENTS = [{', '.join(s.parents)}]" + START), nb4.new_code_cell(JOBS.get(s.name, "pass"))]
        (folder/"nbs"/"jobs"/f"{s.name}.ipynb").write_text(json.dumps(nb4.new_notebook(cells=[nb4.new_markdown_cell(f"# {s.name}"), *cells], metadata=dict(kernelspec=dict(name="python3", language="python", display_name="Python 3")))))
    (folder/"settings.ini").write_text(settings_text(**dict(retry_seconds=.1, min_cases=1) | changes))
    (folder/"events.csv").write_text("id,time\n1,2024-03-01\n")
    (folder/"shop.toml").write_text('[events]\npath = "events.csv"\ncolumns = {event_id = "id", ts = "time"}\n')
    return folder

def one_more_event(folder: Path, day: str = "2024-03-01"):
    with (folder/"events.csv").open("a") as f: f.write(f"{day}-{(folder/'events.csv').stat().st_size},{day}\n")
