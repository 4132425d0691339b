"`recsys drift` as people and schedulers use it: any two tables, whatever is in them, end in a verdict or in one clear line."
import json, math, subprocess, sys, sysconfig
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy import stats

from recsys.core.settings import RecsysError
from recsys.monitoring.drift import VERDICTS
from recsys.operations import drift_page as dp
from recsys.operations.cli import main


def orders(n, seed, dearer=1., holes=.1, new=0.):
    rng = np.random.default_rng(seed)
    return pl.DataFrame({"user_id": rng.integers(0, n // 5 + 1, n), "price": np.exp(rng.normal(size=n)) * dearer, "basket": rng.poisson(3, n),
                         "rating": np.where(rng.random(n) < holes, np.nan, rng.normal(4, 1, n)), "shop": np.where(rng.random(n) < new, "<b>new</b>", rng.choice(["DE", "FR"], n))})


class Page(HTMLParser):
    "Tags that are opened and closed in order, and what a browser would fetch."
    VOID = {"meta", "link", "br", "input", "img", "hr"} | {"line", "circle", "rect", "polyline"}
    def __init__(self, text): super().__init__(); self.stack, self.fetched, self.words = [], [], []; self.feed(text); assert not self.stack, self.stack
    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href", "srcset") and v and not v.startswith(("#", "data:", "report."))]
        if tag not in self.VOID: self.stack.append(tag)
    def handle_startendtag(self, tag, attrs): pass
    def handle_endtag(self, tag): assert self.stack.pop() == tag
    def handle_data(self, data): self.words.append(data)


def run(tmp_path, a, b, *more, out="out"):
    a.write_parquet(tmp_path/"a.parquet"); b.write_parquet(tmp_path/"b.parquet")
    code = main(["drift", "--reference", str(tmp_path/"a.parquet"), "--current", str(tmp_path/"b.parquet"), "--out", str(tmp_path/out), *more])
    report = tmp_path/out/"report.json"
    return code, json.loads(report.read_text()) if report.exists() else None


def test_what_the_files_say(tmp_path):
    a, b = orders(20_000, 1), orders(9000, 2, 1.25, .2, .03)
    code, r = run(tmp_path, a, b, "--unit", "user_id")
    assert code == 2 and r["alarm"] is True and r["schema_version"] == dp.VERSION and r["seconds"] > 0 and r["peak_rss_mb"] > 50
    by = {c["name"]: c for c in r["columns"]}
    assert {n for n, c in by.items() if c["verdict"] == "material"} == {"price", "rating", "shop"} and set(by) == set(a.columns) - {"user_id"}
    for field in "name verdict p_adjusted effect effect_low effect_high psi ks missing_delta unseen_share shap_share_delta".split(): assert all(field in c for c in r["columns"])
    assert by["price"]["ks"] == pytest.approx(stats.ks_2samp(a["price"], b["price"], method="asymp").statistic, abs=1e-12)
    jsonschema.validate(r, json.loads((tmp_path/"out/report.schema.json").read_text()))
    assert msgspec.convert(r, dp.DriftReport).sentence == r["sentence"]
    html = (tmp_path/"out/report.html").read_text()
    page = Page(html)
    assert page.fetched == [] and len(html) < 300_000 and "<b>new</b>" in page.words and "<script" not in html
    assert html.count("rs-cards") >= 1 and html.count("<dt>") <= 6 and r["sentence"] in page.words


def test_quiet_tables_end_with_0_and_a_profile_may_stand_for_the_reference(tmp_path, capsys):
    assert run(tmp_path, orders(8000, 1), orders(8000, 3), "--unit", "user_id")[0] == 0
    assert main(["drift", "--reference", str(tmp_path/"out/profile"), "--current", str(tmp_path/"b.parquet"), "--unit", "user_id", "--out", str(tmp_path/"two")]) == 0
    one, two = (json.loads((tmp_path/d/"report.json").read_text())["columns"] for d in ("out", "two"))
    assert {c["name"]: (c["verdict"], c["psi"], c["effect"]) for c in one if c["kind"] == "numeric"} == {c["name"]: (c["verdict"], c["psi"], c["effect"]) for c in two if c["kind"] == "numeric"}
    assert main(["drift", "--reference", str(tmp_path/"out/profile"), "--current", str(tmp_path/"b.parquet"), "--out", str(tmp_path/"no")]) == 1
    assert "--unit user_id" in capsys.readouterr().err


def test_several_files_are_one_table(tmp_path):
    rows = orders(4000, 4)
    for k in range(4): rows[k * 1000:(k + 1) * 1000].write_parquet(tmp_path/f"part{k}.parquet")
    rows.write_parquet(tmp_path/"whole.parquet")
    r = dp.drift_report(str(tmp_path/"part*.parquet"), tmp_path/"whole.parquet", tmp_path/"out", "user_id")
    assert not r.alarm and r.rows == dict(reference=4000, current=4000) and all(c.ks == 0 for c in r.columns if c.ks is not None)


def test_with_a_model(tmp_path):
    import lightgbm as lgb
    a, b = orders(6000, 1, holes=.3), orders(6000, 2, holes=1.)
    x, y = a.select("price", "basket", "rating").to_numpy(), a["rating"].fill_nan(3.).to_numpy() + a["basket"].to_numpy() / 9 > 4.4
    lgb.train(dict(objective="binary", verbose=-1, num_threads=1, num_leaves=7), lgb.Dataset(x, y.astype(int), feature_name=["price", "basket", "rating"]), 20).save_model(tmp_path/"model.txt")
    code, r = run(tmp_path, a, b, "--unit", "user_id", "--model", str(tmp_path/"model.txt"))
    by = {c["name"]: c for c in r["columns"]}
    assert code == 2 and abs(by["rating"]["shap_share_delta"]) > .02 and by["prediction"]["verdict"] == "material" and r["model"]["mean_after"] != r["model"]["mean_before"]
    assert sum(c["shap_share"] or 0 for c in r["columns"]) == pytest.approx(1) and by["shop"]["shap_share"] is None and 0 < r["model"]["weight_moved"] <= 1
    assert "mean raw score went from" in (tmp_path/"out/report.html").read_text() and 0 < r["model"]["ndcg"] <= 1
    with pytest.raises(RecsysError, match="'price' is no column"): dp.drift_report(tmp_path/"a.parquet", _written(tmp_path, b.drop("price")), tmp_path/"o", None, tmp_path/"model.txt")
    with pytest.raises(RecsysError, match="is String, not a number"): dp.drift_report(tmp_path/"a.parquet", _written(tmp_path, b.with_columns(price=pl.lit("x"))), tmp_path/"o", None, tmp_path/"model.txt")


def _written(folder, frame):
    frame.write_parquet(folder/"w.parquet")
    return folder/"w.parquet"


ERRORS = [("nowhere", {}, "no such file"), ("folder", {}, "no such file"), ("text", {}, "not readable as Parquet"), ("cut", {}, "not readable as Parquet"),
          ("good", dict(unit="nobody"), "no column 'nobody'"), ("good", dict(unit="price"), "a unit must be an id"), ("good", dict(model="text"), "not a LightGBM model"),
          ("good", dict(model="nowhere"), "no such file"), ("good", dict(out="text"), "this is a file")]

@pytest.mark.parametrize("current,more,line", ERRORS)
def test_one_clear_line(tmp_path, capsys, current, more, line):
    orders(300, 1).write_parquet(tmp_path/"good"); (tmp_path/"folder").mkdir(); (tmp_path/"text").write_text("a,b\n1,2\n" * 9)
    (tmp_path/"cut").write_bytes((tmp_path/"good").read_bytes()[:-200])
    options = [p for k, v in ({"out": "o"} | more).items() for p in (f"--{k}", v if k == "unit" else str(tmp_path/v))]
    assert main(["drift", "--reference", str(tmp_path/"good"), "--current", str(tmp_path/current), *options]) == 1
    err = capsys.readouterr().err.strip()
    assert line in err and "\n" not in err.strip() and " — " in err and not list(tmp_path.glob("o/report*"))


def test_the_process_itself(tmp_path):
    "Outside of any project, as a scheduler would."
    orders(2000, 1).write_parquet(tmp_path/"a.parquet"); orders(2000, 2, 3.).write_parquet(tmp_path/"b.parquet")
    command = [Path(sysconfig.get_path("scripts"))/"recsys", "drift", "--reference", "a.parquet", "--out", "o", "--current"]
    done = [subprocess.run([*command, c], cwd=tmp_path, capture_output=True, text=True) for c in ("b.parquet", "a.parquet", "c.parquet")]
    assert subprocess.run(command[:-1], cwd=tmp_path, capture_output=True).returncode == 1, "2 is for drift alone"
    assert [d.returncode for d in done] == [2, 0, 1] and "price" in done[0].stdout and done[2].stderr.count("\n") == 1, [d.stderr for d in done]


# ---- whatever comes in

def column(draw, n):
    kind = draw(st.sampled_from(["float", "int", "text", "bool", "null", "date", "constant", "inf", "missing", "list", "decimal", "category", "binary", "time", "huge"]))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    start = datetime(2026, 1, 1)
    return {"float": lambda: pl.Series(rng.normal(size=n)), "int": lambda: pl.Series(rng.integers(-9, 9, n)), "text": lambda: pl.Series(["é<&\x00" + str(i % 5) for i in range(n)], dtype=pl.String),
            "bool": lambda: pl.Series(rng.random(n) < .5, dtype=pl.Boolean), "null": lambda: pl.Series([None] * n, dtype=pl.Null), "date": lambda: pl.Series([start + timedelta(hours=int(h)) for h in rng.integers(0, 99, n)], dtype=pl.Datetime),
            "constant": lambda: pl.Series([7] * n, dtype=pl.Int8), "inf": lambda: pl.Series([math.inf, -math.inf, math.nan, 1.] * n, dtype=pl.Float64)[:n], "missing": lambda: pl.Series([None] * n, dtype=pl.Float64),
            "list": lambda: pl.Series([[1, 2]] * n, dtype=pl.List(pl.Int64)), "decimal": lambda: pl.Series(rng.integers(0, 99, n)).cast(pl.Decimal(10, 2)), "category": lambda: pl.Series(["a", "b"] * n, dtype=pl.Categorical)[:n],
            "binary": lambda: pl.Series([b"x"] * n, dtype=pl.Binary), "time": lambda: pl.Series([start.time()] * n, dtype=pl.Time), "huge": lambda: pl.Series([1e308, -1e308] * n, dtype=pl.Float64)[:n]}[kind]()


@st.composite
def tables(draw):
    n, m, names = draw(st.sampled_from([0, 1, 2, 30, 200])), draw(st.sampled_from([0, 1, 30, 200])), ["a", "b", "Ω <i>", "d"]
    def table(rows): 
        units = pl.Series(["one"] * rows if draw(st.booleans()) else [str(i) for i in range(rows)], dtype=pl.String)
        return pl.DataFrame({c: column(draw, rows) for c in draw(st.lists(st.sampled_from(names), unique=True))} | {"u": units})
    return table(n), table(m)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tables(), st.booleans())
def test_whatever_comes_in_a_report_or_one_line_comes_out(tmp_path_factory, pair, unit):
    folder = tmp_path_factory.mktemp("fuzz")
    try: code, r = run(folder, *pair, *(["--unit", "u"] if unit else []))
    except pl.exceptions.PolarsError: return                                    # polars cannot write this table
    assert code == (1 if r["sentence"].startswith("No verdict") else 2 if r["alarm"] else 0), "tables that are whole always get a report"
    a, b = pair
    assert {c["name"] for c in r["columns"]} == {*a.columns, *b.columns} - ({"u"} if unit else set()) and {c["verdict"] for c in r["columns"]} <= set(VERDICTS)
    gone = {c for c in a.columns if c not in b.columns}
    if a.height and b.height: assert gone <= {c["name"] for c in r["columns"] if c["verdict"] == "material"} and (code == 2 or not gone)
    else: assert code == 1 and r["sentence"].startswith("No verdict"), "a feed without rows is not a calm one"
    assert len((folder/"out/report.html").read_text()) < 300_000
    Page((folder/"out/report.html").read_text())


def test_a_thousand_columns_stay_a_small_page(tmp_path):
    rng = np.random.default_rng(0)
    wide = lambda k: pl.DataFrame({f"column with a rather long name {i}": rng.normal(k, 1, 200) for i in range(1000)})
    r = dp.drift_report(_written(tmp_path, wide(0)), _named(tmp_path, wide(1)), tmp_path/"out")
    assert r.alarm and len(r.columns) == 1000 and (tmp_path/"out/report.html").stat().st_size < 300_000


def _named(folder, frame):
    frame.write_parquet(folder/"n.parquet")
    return folder/"n.parquet"


# ---- as a job

def test_the_job_compares_any_two_files(tmp_path):
    from shop import make_shop, recsys
    folder = make_shop(tmp_path/"shop")
    where = lambda seed, dearer: orders(3000, seed, dearer).with_columns(version=pl.lit("v1") if seed == 1 else pl.Series(["v1", "v2"] * 1500))
    where(1, 1.).write_parquet(folder/"a.parquet")
    where(2, 1.).with_columns(price=pl.when(pl.col("version") == "v2").then(pl.col("price") * 5).otherwise("price"), shop=pl.col("shop")).write_parquet(folder/"b.parquet")
    done = recsys(folder, "job", "drift", *(p for k in ("reference=a.parquet", "current=b.parquet", "unit=user_id", "segment=version=v1") for p in ("-p", k)))
    assert done.returncode == 0, done.stderr
    page, = (folder/"reports/runs").glob("drift-*/drift.html")
    text = page.read_text()
    assert "rs-headline good" in text and len(text) < 300_000 and "1,500 in the reference" not in text
    r = json.loads((page.parent/"out/report.json").read_text())
    assert not r["alarm"] and r["rows"] == dict(reference=3000, current=1500)
    assert not [h for h in ("The shop", "What follows from a score", "The lists", "Attributions over time") if f"<h2>{h}" in text], "the shop's own sections are not asked for"
    wrong = recsys(folder, "job", "drift", "-p", "reference=2026-01-01..2026-01-07", "-p", "current=2026-01-08..2026-01-14")
    assert wrong.returncode == 1 and "no profiles of 'events'" in wrong.stderr and wrong.stderr.count("\n") == 1, wrong.stderr


def test_the_job_explains_two_files_by_a_model(tmp_path):
    import lightgbm as lgb
    from shop import make_shop, recsys
    folder, a, b = make_shop(tmp_path/"shop"), orders(3000, 1), orders(3000, 2, dearer=4.)
    x, y = a.select("price", "basket").to_numpy(), (a["price"] > 1).cast(int).to_numpy()
    lgb.train(dict(objective="binary", verbose=-1, num_threads=1, num_leaves=7), lgb.Dataset(x, y, feature_name=["price", "basket"]), 10).save_model(folder/"model.txt")
    a.write_parquet(folder/"a.parquet"); b.write_parquet(folder/"b.parquet")
    done = recsys(folder, "job", "drift", *(p for k in ("reference=a.parquet", "current=b.parquet", "unit=user_id", "model=model.txt") for p in ("-p", k)))
    assert done.returncode == 0, done.stderr
    page, = (folder/"reports/runs").glob("drift-*/drift.html")
    r = json.loads((page.parent/"out/report.json").read_text())
    assert r["alarm"] and r["model"]["rows"] == 300 and {c["name"] for c in r["columns"] if c["shap_share"]} >= {"price"} and "mean raw score went from" in page.read_text()


def test_windows_of_days_that_were_kept(tmp_path):
    from shop import make_shop
    from recsys.core.settings import load_settings
    from recsys.monitoring.profiles import profile_days, shop_stores
    s = load_settings(make_shop(tmp_path/"shop")/"settings.ini")
    rng = np.random.default_rng(0)
    day = lambda k: pl.DataFrame(dict(visitor=rng.integers(0, 200, 400), price=rng.lognormal(2 + .5 * (k >= 7), 1, 400), version=["v1" if k < 10 else "v2"] * 400))
    profile_days(shop_stores(s.data_dir, s.data.dataset)["served"], [(f"2026-01-{k + 1:02d}", lambda k=k: day(k)) for k in range(14)], 7)
    r = dp.asked_report("2026-01-01..2026-01-07", "2026-01-08..2026-01-14", "", "", "", "", "served", tmp_path/"out", s)
    assert r.alarm and r.rows == dict(reference=2800, current=2800) and [c.name for c in r.columns if c.verdict == "material"] == ["price"]
    with pytest.raises(RecsysError, match="nothing was kept of 2026-01-01..2026-01-07, version v2"):
        dp.asked_report("2026-01-01..2026-01-07", "2026-01-08..2026-01-14", "", "", "", "v2", "served", tmp_path/"out", s)
    with pytest.raises(RecsysError, match="no window of days"): dp.asked_report("2026-01-01..x", "y", "", "", "", "", "served", tmp_path/"out", s)
    with pytest.raises(RecsysError, match="name current"): dp.asked_report("a", "", "", "", "", "", "served", tmp_path/"out", s)


@pytest.mark.parametrize("where,rows", [({}, 40), ({"c": "a"}, 20), ({"c": "a", "k": "1"}, 4), ({"c": "none"}, 0)])
def test_rows_that_count(tmp_path, where, rows):
    from recsys.monitoring.statistics import Table
    t = pl.DataFrame({"c": ["a", "b"] * 20, "k": [i % 5 for i in range(40)], "x": range(40)})
    a, b = Table(t, "t", where), Table(_written(tmp_path, t), "t", where)
    assert a.rows == b.rows == rows == sum(f.height for _, f in b.batches(["x"], 7)) and a.column("x").to_list() == b.column("x").to_list()
    with pytest.raises(RecsysError, match="no column 'z'"): Table(t, "t", {"z": "1"})


def _cut(text, at): return text[:int(len(text) * at)]

@pytest.mark.parametrize("broken, said", [(lambda t: _cut(t, .3), "ends too early"), (lambda t: _cut(t, .7), "ends too early"), (lambda t: t.replace("Tree=1\n", "Gone\n"), "trees of"),
    (lambda t: t.replace("left_child=1", "left_child=77", 1), "do not meet"), (lambda t: t.replace("split_feature=0", "split_feature=9", 1), "a column that is none"), (lambda t: t.replace("num_leaves=", "num_leaves=9", 1), "lacks nodes"),
    (lambda t: t.replace("max_feature_idx=1", "max_feature_idx=x"), "no number"), (lambda t: t.replace("tree_sizes", "sizes"), "missing"), (lambda t: t.replace("is_linear=0", "is_linear=1", 1), "linear")])
def test_a_model_that_is_not_whole_ends_in_one_line(tmp_path, capsys, broken, said):
    "LightGBM itself ends the process on some of these, and takes others for a smaller model."
    import lightgbm as lgb
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2))
    whole = lgb.train(dict(objective="regression", verbose=-1, num_leaves=7, num_threads=1), lgb.Dataset(x, x[:, 0] + x[:, 1] ** 2, feature_name=["price", "rating"]), 3).model_to_string()
    a, b = orders(600, 1), orders(600, 2)
    (tmp_path/"model.txt").write_text(whole)
    assert run(tmp_path, a, b, "--model", str(tmp_path/"model.txt"))[1]["model"]
    (tmp_path/"model.txt").write_text(broken(whole)); assert broken(whole) != whole
    assert run(tmp_path, a, b, "--model", str(tmp_path/"model.txt"))[0] == 1
    assert said in (err := capsys.readouterr().err) and "not a LightGBM model" in err and err.count("\n") == 1

def test_a_decimal_is_the_number_that_it_says(tmp_path):
    "Whatever its scale, and beside a float; a time of day is counted in µs."
    price = lambda seed: np.round(np.random.default_rng(seed).lognormal(3, 1, 4000), 2)
    as_decimal = lambda x, scale: pl.DataFrame({"price": pl.Series(x).cast(pl.Decimal(18, scale))})
    for a, b in ((as_decimal(price(1), 2), as_decimal(price(2), 4)), (as_decimal(price(1), 2), pl.DataFrame({"price": price(2)}))):
        code, r = run(tmp_path, a, b)
        assert code == 0 and r["columns"][0]["verdict"] == "stable" and r["columns"][0]["histogram"]["edges"][-1] < 1000
    assert run(tmp_path, as_decimal(price(1), 2), as_decimal(price(2) * 1.5, 4))[0] == 2

@pytest.mark.parametrize("day", [datetime(1970, 1, 1), datetime(1900, 1, 1), datetime(9999, 12, 31)])
def test_dates_that_somebody_wiped_are_no_clock(tmp_path, day):
    times = lambda start, n=3000: [start + timedelta(minutes=int(m)) for m in np.random.default_rng(1).integers(0, 20_000, n)]
    a, later = pl.DataFrame({"at": times(datetime(2026, 1, 1))}), pl.DataFrame({"at": times(datetime(2026, 3, 1))})
    code, r = run(tmp_path, a, later)
    assert code == 0 and "a clock" in r["columns"][0]["note"]
    code, r = run(tmp_path, a, pl.DataFrame({"at": [day] * 3000}))
    assert code == 2 and r["columns"][0]["verdict"] == "material"

def test_where_nothing_can_be_told_is_not_calm(tmp_path):
    "Exit code 1, and no talk of lacking data where no data would help."
    lists, few = pl.DataFrame({"tags": [["a"], ["b"]] * 500}), pl.DataFrame({"x": list(range(5))})
    for a, b, said in ((lists, lists, "there is no column to compare"), (few, few, "No verdict")):
        code, r = run(tmp_path, a, b)
        assert code == 1 and said in r["sentence"] and "lack of data" not in r["sentence"]
    a = orders(20_000, 1).drop("user_id")
    code, r = run(tmp_path, a, orders(20_000, 2).drop("user_id").with_columns(new=1, tags=pl.concat_list(pl.lit("x"))))
    assert code == 0 and "of 4 inputs" in r["sentence"] and "new, or of a type that is not compared" in r["sentence"]

def test_a_column_named_like_a_pattern_is_one_column(tmp_path):
    a = orders(2000, 1).rename({"price": "*", "basket": "^.*$"})
    code, r = run(tmp_path, a, orders(2000, 2, 1.5).rename({"price": "*", "basket": "^.*$"}), "--unit", "user_id")
    assert code == 2 and [c["name"] for c in r["columns"] if c["verdict"] == "material"] == ["*"]

def test_a_place_that_cannot_be_written_and_a_profile_that_is_damaged_end_in_one_line(tmp_path, capsys):
    a, b = orders(600, 1), orders(600, 2)
    (tmp_path/"afile").write_text("")
    for out in ("afile/x", "x" * 5000):
        assert run(tmp_path, a, b, out=out)[0] == 1 if len(out) < 100 else main(["drift", "--reference", str(tmp_path/"a.parquet"), "--current", str(tmp_path/"b.parquet"), "--out", str(tmp_path/out)]) == 1
        assert (err := capsys.readouterr().err).startswith("recsys: ") and err.count("\n") == 1
    assert run(tmp_path, a, b)[1]
    again = lambda: main(["drift", "--reference", str(tmp_path/"out/profile"), "--current", str(tmp_path/"b.parquet"), "--out", str(tmp_path/"again")])
    file = tmp_path/"out/profile/profile.json"
    said = json.loads(file.read_text())
    for change, what in ((dict(version=9), "version 9"), (dict(buckets=7), "damaged")):
        file.write_text(json.dumps(said | change)); capsys.readouterr()
        assert again() == 1 and what in (err := capsys.readouterr().err) and err.count("\n") == 1
    file.write_text(json.dumps(said)); (tmp_path/"out/profile/values.parquet").unlink()
    assert again() == 1 and "damaged" in capsys.readouterr().err

def test_since_when_is_not_read_from_birthdays(tmp_path):
    rng = np.random.default_rng(3)
    def shop(start, dearer):
        n = 12_000
        phone, at = rng.random(n) < .3, [start + timedelta(minutes=int(m)) for m in rng.integers(0, 14_400, n)]
        late = np.array([t >= start + timedelta(days=5) for t in at])
        return pl.DataFrame({"born": [datetime(1950, 1, 1) + timedelta(days=int(d)) for d in rng.integers(0, 18_000, n)], "user_id": rng.integers(0, n, n), "price": rng.lognormal(0, 1, n) * np.where(phone & late, dearer, 1.),
                             "device": np.where(phone, "phone", "desk"), "at": at})
    code, r = run(tmp_path, shop(datetime(2026, 1, 1), 1), shop(datetime(2026, 3, 1), 8), "--unit", "user_id")
    assert code == 2 and [(c["value"], c["since"]) for c in r["causes"] if c["column"] == "price"] == [("phone", "2026-03-06")]
    code, r = run(tmp_path, shop(datetime(2026, 1, 1), 1).drop("at"), shop(datetime(2026, 3, 1), 8).drop("at"), "--unit", "user_id")
    assert code == 2 and [(c["value"], c["since"]) for c in r["causes"] if c["column"] == "price"] == [("phone", "")]
