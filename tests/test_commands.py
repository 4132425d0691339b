"The commands around the data, as a person types them: ingest, retry, forget, simulate, features."
import json, socket
from datetime import datetime

import polars as pl
import pytest
from shop import MAPPING, events, make_shop, recsys, write_csv

from recsys.candidates import pipeline
from recsys.candidates.pipeline import read_table
from recsys.operations.cli import main
from recsys.core.settings import load_settings
from recsys.features.definitions import LIVE, LIVE_NAMES

def said_by(folder) -> dict:
    "ingest.json of the newest ingest."
    return json.loads(max((folder/"data/steps").glob("ingest-*/ingest.json"), key=lambda p: p.stat().st_mtime).read_text())

def ok(result):
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr + result.stdout
    return result.stdout

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A shop with ten rows that cannot be read, ingested."
    folder = make_shop(tmp_path_factory.mktemp("shop"))
    rows = events()
    for i, r in enumerate(rows[:10]): rows[i] = dict(r, action="bougt")
    write_csv(folder/"events.csv", rows)
    ok(recsys(folder, "ingest"))
    return folder

def test_ingest_says_what_it_found_and_validates(shop):
    said = said_by(shop)
    assert said["quarantined"] == 10 and said["rows"] == said["rows_read"] - 10
    assert (shop/"reports").exists() and sorted(p.name.split("-")[0] for p in (shop/"data/steps").iterdir() if not p.name.startswith(".")) == ["ingest", "validate"]

def test_what_was_quarantined_comes_back_after_the_mapping_was_corrected(shop, tmp_path):
    before = said_by(shop)
    (shop/"shop.toml").write_text(MAPPING.replace('{bought = "purchase"}', '{bought = "purchase", bougt = "purchase"}'))
    kept = (shop/"events.csv").read_text().splitlines()
    (shop/"events.csv").write_text("\n".join(l for l in kept if "bougt" not in l) + "\n")  # the source no longer has them
    out = ok(recsys(shop, "ingest", "--retry-quarantine"))
    assert "10 rows tried, 10 recovered" in out, out
    after = said_by(shop)
    assert after["rows"] == before["rows"] + 10 and after["quarantined"] == 0
    again = ok(recsys(shop, "ingest", "--retry-quarantine"))
    assert " 0 recovered" in again and said_by(shop)["rows"] == after["rows"]

def test_a_forgotten_person_is_in_no_later_ingest(shop):
    folder = max((shop/"data/steps").glob("ingest-*"), key=lambda p: p.stat().st_mtime)
    seen = lambda f: pl.read_parquet(f/"events/**/*.parquet")["user_id"].drop_nulls()
    assert (seen(folder) == "c7").any()
    ok(recsys(shop, "label", "item", "c7", "A-100", "good")); assert b"c7" in (shop/"data/labels.jsonl").read_bytes()
    ok(recsys(shop, "forget", "c7"))
    assert (shop/"data/labels.jsonl").read_bytes() == b""
    ok(recsys(shop, "ingest"))
    newest = max((shop/"data/steps").glob("ingest-*"), key=lambda p: p.stat().st_mtime)
    assert newest != folder and not (seen(newest) == "c7").any() and len(seen(newest)) > 1000
    assert not [p for p in newest.rglob("*") if p.is_file() and b"c7\"" in p.read_bytes()]
    assert b'"c7"' not in (shop/"data/forgotten.json").read_bytes() # in a hash, c7 stands by chance

@pytest.fixture(scope="module")
def made_up(shop):
    "The folder of an ingest of a simulated shop: its people log in during visits."
    assert "simulated" in ok(recsys(shop, "simulate", "--events", "30000", "--out", "made-up", "--seed", "3"))
    ok(recsys(shop, "ingest", env=dict(RECSYS_DATA_DATASET="made-up/simulated.toml")))
    return max((shop/"data/steps").glob("ingest-*"), key=lambda p: p.stat().st_mtime)

def test_simulate_then_ingest_then_features(shop, made_up):
    again = recsys(shop, "simulate", "--events", "30000", "--out", "made-up")
    assert again.returncode == 1 and again.stderr.startswith("recsys: ") and again.stderr.count("\n") == 1
    done, env = made_up, dict(RECSYS_DATA_DATASET="made-up/simulated.toml")
    page, shown = (done/"ingest.html").read_text(), pl.read_parquet(done/"impressions"/"*.parquet")
    assert shown.height == shown["event_id"].n_unique() > 1000 and f"{shown.height:,}" in page and 0 < shown["click"].mean() < .5
    assert all(text in page for text in ("outside the window", "without an impression", "known after the window", "by placement and position"))
    out = ok(recsys(shop, "features", "build", "--out", "table", "--days", "20", "--negatives", "2", env=env))
    assert f"leak guard: {len(LIVE)} features of " in out and "at 8 moments" in out, out
    rows, x = read_table(shop/"table")
    assert x.shape == (rows.height, len(LIVE)) and rows["label"].sum() > 30 and (x[:, LIVE_NAMES.index("item_views_30d")] > 0).any()
    assert not (shop/"table"/"sums").exists() and rows.select(pl.col("row").n_unique()).item() == rows.height

def test_a_shop_of_one_s_own(shop):
    "Knobs and shocks from a file, curves from what was ingested; how near they come is shown."
    (shop/"sale.toml").write_text('late = 0.2\n[[shocks]]\nday = 20\nkind = "stock out"\nsize = 0.3\n')
    ok(recsys(shop, "ingest"))  # of the shop itself: curves come from the newest
    out = ok(recsys(shop, "simulate", "--events", "20000", "--out", "like-ours", "--days", "60", "--users", "150", "--items", "60", "--shop", "sale.toml", "--calibrate"))
    said = json.loads((shop/"like-ours/simulated.json").read_text())
    assert (said["users"], said["items"], said["shop"]["late"], said["shop"]["checkout"]) == (150, 60, .2, 1.) and said["shop"]["shocks"][0]["kind"] == "stock out"
    assert sum(said["shop"]["marginals"]["baskets"][3:6]) > .6 and sum(said["shop"]["marginals"]["hours"][8:20]) == pytest.approx(1)  # four to six items, by day
    rows = [l.replace("│", " ").split() for l in out.splitlines() if l.startswith("│")]
    assert [r[0] for r in rows] == ["popularity", "baskets", "gaps", "hours", "weekdays"] and all(0 <= float(r[-1]) <= 1 for r in rows) and "simulated" in out
    for text, word in (("lates = 1", "'lates'"), ("late = 9", "late"), ("[[shocks]]\nday = 1\nkind = 'meteor'\nsize = 1", "meteor"), ("[[shocks]]\nday = 1\nkind = 'traffic'\nsize = 1\nhow = 1", "'how'"), ("not toml", "TOML")):
        (shop/"wrong.toml").write_text(text)
        r = recsys(shop, "simulate", "--events", "2000", "--out", "wrong", "--shop", "wrong.toml")
        assert r.returncode == 1 and r.stderr.count("\n") == 1 and word in r.stderr and "wrong.toml" in r.stderr and not (shop/"wrong").exists(), r.stderr

@pytest.mark.parametrize("arguments, said", [
    ("features build --out t --days 0", "0 days of rows"), ("features build --out t --days -3", "-3 days"), ("features build --out t --negatives -1", "-1 negatives"),
    ("features build --out t --negatives 51", "51 negatives"), ("features build --out t --one-in 0", "one in 0"), ("features build --out settings.ini", "something already"),
    ("features build --out nbs", "something already"), ("features feast --out nbs", "something already"), ("features feast --out f --online nowhere", "not an online store"),
    ("simulate --events 0 --out s", "begin at 1"), ("simulate --events 9 --out nbs", "something already"), ("bench features --events 3 --out f.json", "at least 1000"),
    ("ingest --date soon", "'soon' is not a day")])
def test_what_cannot_be_is_one_line(shop, arguments, said):
    before = {p.name for p in shop.iterdir()}
    r = recsys(shop, *arguments.split())
    assert r.returncode == 1 and r.stderr.startswith("recsys: ") and r.stderr.count("\n") == 1 and said in r.stderr, r.stderr + r.stdout
    assert {p.name for p in shop.iterdir()} == before

@pytest.mark.parametrize("what", ["features --events 5000", "sessions --train a --test b", "sequences --sequences a", "shop", "serving", "drift --no-peers", "experiments", "loop --days 7"])
def test_a_bench_sees_before_it_measures_that_its_figures_can_be_written(what, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"year").mkdir(); (tmp_path/"file").touch()
    for out, said in (("year", "year: this is a folder"), ("file/f.json", "file/f.json: no file can be written in")):
        assert main(["bench", *what.split(), "--out", out]) == 1
        told = capsys.readouterr()
        assert said in told.err and told.err.count("\n") == 1 and not told.out and sorted(p.name for p in tmp_path.iterdir()) == ["file", "year"], told.err

def test_a_feast_repository_that_failed_does_not_bar_the_next_try(shop, tmp_path):
    pytest.importorskip("feast", reason="Feast is missing: pip install 'recsys[feast]'")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); nobody = s.getsockname()[1]
    r = recsys(shop, "features", "feast", "--out", tmp_path/"feast", "--online", f"redis://127.0.0.1:{nobody}")
    assert r.returncode == 1 and "run again" in r.stderr and r.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
    assert f"{len(LIVE)} features in" in ok(recsys(shop, "features", "feast", "--out", tmp_path/"feast"))

def test_the_page_of_a_failed_check_shows_all_checks(tmp_path):
    folder = make_shop(tmp_path/"short")
    r = recsys(folder, "ingest", env=dict(RECSYS_EVALUATION_TEST_DAYS="90"))
    assert r.returncode == 1 and r.stderr.startswith("recsys: validate: days of history") and r.stderr.count("\n") == 1, r.stderr + r.stdout
    page = next(folder.glob("reports/runs/*/validate.html")).read_text()
    assert "1 failed" in page and all(name in page for name in ("rows in quarantine", "events of robots", "clock ties", "items seen in the log"))

def test_a_folder_without_notebooks_of_its_own_takes_those_of_the_package(tmp_path):
    folder = make_shop(tmp_path/"bare")
    (folder/"nbs").unlink()
    r = recsys(folder, "ingest")
    assert r.returncode == 0 and (folder/"data/steps").exists() and "quarantine" in r.stdout, r.stderr

def test_shards_change_nothing(shop, made_up, tmp_path, monkeypatch):
    "Five shards and one: the same table and the same pairs, also where somebody logs in during a visit."
    s = load_settings(shop/"settings.ini")
    ingested, until = made_up, int(datetime.fromisoformat(json.loads((made_up/"ingest.json").read_text())["moment"]).timestamp())
    found = []
    for name, size in (("one", 10**9), ("five", 6000)):
        monkeypatch.setattr(pipeline, "SHARD", size); monkeypatch.setattr(pipeline, "PAIR_SHARD", size)
        (tmp_path/name).mkdir()
        said = pipeline.offline_tables(ingested, tmp_path/name, pipeline.Polars(), s, until - 60 * 86400, until)
        found.append((said["shards"], *(pl.read_parquet(tmp_path/name/t/"*.parquet").sort(by) for t, by in (("table", ["row"]), ("pairs", ["item", "place"])))))
    (one, table, pairs), (several, table2, pairs2) = found
    assert one == 1 and several >= 4 and table.height > 300 and table.select(sorted(table.columns)).equals(table2.select(sorted(table2.columns))) and pairs.equals(pairs2)
    log = pl.read_parquet(tmp_path/"one"/"log"/"*.parquet")
    assert log.group_by("session").agg(pl.col("user").n_unique())["user"].max() > 1, "nobody logs in during a visit: the test is blind"
