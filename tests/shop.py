"A small simulated shop in a folder of its own: events, items, mapping and settings. All numbers are made up."
import csv, os, re, subprocess, sys, time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np, psutil

ROOT = Path(__file__).resolve().parent.parent
START, DAYS = datetime(2024, 1, 1, tzinfo=timezone.utc), 120
COMMAND = str(Path(sys.executable).parent/"recsys")  # the installed script
SMALL = dict(test_days=14, validation_days=14, snapshots=2, snapshot_gap_days=14, trees=30, early_stopping_rounds=10, negatives=20, min_rows_in_leaf=20,
             neighbours=10, per_source=30, budget=60, segments=2, dimensions=8, history_items=50, recent_items=10, min_events=3, examples=20000, batch_size=256,
             bootstrap_samples=200, permutations=199, shap_rows=300, windows_days="7, 14, 30")

def ended(pid: int) -> bool:
    "Whether this process runs no more; it may be gone between two questions about it."
    try: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True

def words(process: psutil.Process) -> str:
    "Its command; nothing of one that has ended, whom nobody asked for its status yet."
    try: return " ".join(process.cmdline())
    except psutil.Error: return ""

def events(seed: int = 0, users: int = 90, items: int = 60, days: int = DAYS) -> list[dict]:
    "Visits of people who have a few things that they buy again and again, and otherwise take what is popular."
    rng, rows = np.random.default_rng(seed), []
    popular = 1 / np.arange(1, items + 1); popular /= popular.sum()
    for u in range(users):
        own, every = rng.choice(items, 6, replace=False, p=popular), rng.integers(2, 7)
        for n, day in enumerate(range(int(rng.integers(0, every)), days, every)):
            at = START + timedelta(days=day, minutes=int(rng.integers(480, 1200)))
            basket = {*rng.choice(own, 3), *rng.choice(items, int(rng.integers(1, 4)), p=popular)}
            rows += [dict(id=f"{u}-{n}-{i}", time=at.isoformat(), customer=f"c{u}", visit=f"{u}-{n}", article=f"a{i}", action="bought", amount=round(1 + i / 7, 2)) for i in sorted(basket)]
    return rows

def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, rows[0].keys()); w.writeheader(); w.writerows(rows)
    return path

MAPPING = """[events]
path = "events.csv"
columns = {event_id = "id", ts = "time", visitor_id = "customer", user_id = "customer", session_id = "visit", item_id = "article", event_type = "action", price = "amount"}
event_types = {bought = "purchase"}
[items]
path = "items.csv"
columns = {item_id = "article", title = "name", category = "group", price = "costs"}
"""

def settings_text(**changes) -> str:
    "The repository's settings.ini with small numbers for a small shop."
    text = (ROOT/"settings.ini").read_text()
    for key, value in dict(dataset="shop.toml", **SMALL, **changes).items(): text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    return text.replace("cutoffs = 10, 20", "cutoffs = 5, 10")

def make_shop(folder: Path, **changes) -> Path:
    "A project folder with the shop in it; the job notebooks are the repository's."
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("nbs", "constraints.txt"):
        if not (folder/name).exists(): (folder/name).symlink_to(ROOT/name)
    write_csv(folder/"events.csv", events())
    write_csv(folder/"items.csv", [dict(article=f"a{i}", name=f"Article {i}", group=f"Group {i % 4} > Kind {i % 12}", costs=round(1 + i / 7, 2)) for i in range(60)])
    (folder/"shop.toml").write_text(MAPPING); (folder/"settings.ini").write_text(settings_text(**changes))
    return folder

def recsys(folder: Path, *args, env: dict | None = None, timeout: int = 300) -> subprocess.CompletedProcess:
    "Run the real command line in `folder`."
    return subprocess.run([COMMAND, *map(str, args)], cwd=folder, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **(env or {})})

def until(what, seconds: float = 30):
    "Wait until `what()` holds; what it gave."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never came to that"
        time.sleep(.05)
    return found
