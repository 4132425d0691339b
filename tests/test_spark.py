"The offline path on Apache Spark: on this machine and on a cluster of a master and two workers, with polars' numbers; and what is said when there is none."
import hashlib, json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import narwhals as nw
import numpy as np, polars as pl, psutil, pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from polars.testing import assert_frame_equal

from recsys.candidates.pipeline import Polars, Spark, _cause, _learnt_from, check_memory, engine_of, feature_store, free_memory, offline_tables, read_table
from recsys.core.files import read_json
from recsys.core.settings import RecsysError, load_settings
from recsys.data.events import Sessions, conform
from recsys.data.ingest import ingest
from recsys.data.simulator import simulate
from recsys.features.offline import PRIME, _chance, codes, log_of, with_seconds, with_sessions
from shop import ended

ROOT = Path(__file__).resolve().parent.parent
DAY = 86400
# a table, and the columns that its rows are sorted by before they are compared
TABLES = dict(items=["item_id"], users=["who"], sessions=["session_id"], log=["event_id"], bought=["n"], rows=["row"], table=["row"], pairs=["item", "place"])

needs_pyspark = pytest.mark.skipif(not find_spec("pyspark"), reason="pyspark is not installed: pip install -c constraints.txt -e '.[spark]'")
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="there is no java: install a headless Java 17 or newer")
def needs_spark(test): return needs_pyspark(needs_java(test))

@pytest.fixture(scope="module", autouse=True)
def small_machine(tmp_path_factory):
    "A spark-defaults.conf for few rows, and Java's quick compiler: at this size a Java machine mostly compiles itself."
    conf = tmp_path_factory.mktemp("conf")
    (conf/"spark-defaults.conf").write_text("spark.sql.shuffle.partitions 2\nspark.executor.memory 600m\n")
    with pytest.MonkeyPatch.context() as m:
        for key, value in dict(SPARK_CONF_DIR=conf, SPARK_LOCAL_IP="127.0.0.1", SPARK_DAEMON_MEMORY="256m", JDK_JAVA_OPTIONS="-XX:TieredStopAtLevel=1 -XX:+UseSerialGC").items():
            m.setenv(key, str(value))
        yield
    if find_spec("pyspark"): end_java()

def end_java():
    "End the Java machine of this process: it would idle in half a gigabyte until all other tests are done."
    from pyspark import SparkContext
    if not (gateway := SparkContext._gateway): return
    gateway.shutdown(); gateway.proc.stdin.close()
    assert gateway.proc.wait(60) is not None
    SparkContext._gateway = SparkContext._jvm = None

# ---- a shop with ids and prices that engines could disagree about

def odd(column: str) -> pl.Expr:
    "Some ids of `column` in other letters: their order is that of their bytes, on every engine."
    c, n = pl.col(column), pl.col(column).str.len_bytes() + pl.col(column).str.tail(1).cast(pl.Int64, strict=False).fill_null(0)
    return pl.when(n % 5 == 0).then("Ä " + c).when(n % 5 == 1).then("𝒳" + c).when(n % 5 == 2).then("ﬀ" + c.str.to_uppercase()).otherwise(c).alias(column)

FOUND = pl.col("session_id").str.contains("^s-[0-9a-f]{20}$") # by ingest, not told by the source

def make_shop(folder: Path, events: int, days: int) -> int:
    "Simulate and ingest into `folder`/in; the end of the log, epoch s."
    simulate(folder/"shop", events, days=days)
    for path in (*(folder/"shop"/"events").iterdir(), folder/"shop"/"items.parquet", folder/"shop"/"users.parquet"):
        df = pl.read_parquet(path)
        df = df.with_columns(odd(c) for c in ("item_id", "user_id", "visitor_id", "session_id") if c in df.columns)
        if "event_id" in df.columns:  # a third of the prices end in half a cent; some are in dollars, some in a currency without a rate
            nth = pl.col("ts").dt.epoch("us") % 10
            df = df.with_columns(currency=pl.when(nth < 6).then(pl.lit("EUR")).when(nth < 8).then(pl.lit("USD")).when(nth < 9).then(pl.lit("SEK")), price=pl.when(pl.col("price").mul(100).round().cast(pl.Int64) % 3 == 0).then(pl.col("price") + .005).otherwise("price"))
        df.write_parquet(path)
    account = ingest("simulated.toml", folder/"in", None, datetime.now(timezone.utc), 30, 60, .05, folder/"shop")
    assert account["rows"] > events * .9 and account["quarantined"] == 0
    for path in (folder/"in"/"events").rglob("*.parquet"):  # sessions that ingest found are for the engines to find again
        df = pl.read_parquet(path)
        df.select("event_id", "session_id").write_parquet((folder/"told").with_suffix(f".{path.parent.name}"))
        df.with_columns(session_id=pl.when(~FOUND).then("session_id")).write_parquet(path)
    return int(datetime.fromisoformat(account["moment"]).timestamp())

def run(engine, folder: Path, end: int, name: str) -> Path:
    with pytest.MonkeyPatch.context() as m:
        m.setenv("RECSYS_DATA_CURRENCY", "EUR"); m.setenv("RECSYS_DATA_EXCHANGE_RATES", "USD:0.92")
        said = offline_tables(folder/"in", folder/name, engine, load_settings(ROOT/"settings.ini"), end - 28 * DAY, end)
    assert said["engine"] == engine.name and said["rows"] == table(folder/name, "rows").height > 0
    return folder/name

def table(out: Path, name: str) -> pl.DataFrame: return pl.read_parquet(sorted((out/name).rglob("*.parquet"))).sort(TABLES[name])

def assert_same(got: Path, wanted: Path):
    "Every table: columns, types and rows; the features to the bit."
    for name in TABLES:
        a, b = table(got, name), table(wanted, name)
        assert b.height > 50 and not b.select(TABLES[name]).is_duplicated().any(), name
        assert all(t == pl.Int64 for c, t in b.schema.items() if c not in ("item_id", "who", "session_id", "event_id")), b.schema
        assert_frame_equal(a, b, check_exact=True, check_column_order=True)
    (rows, x), (rows_, x_) = read_table(got), read_table(wanted)
    assert rows.equals(rows_) and x.tobytes() == x_.tobytes() and np.isfinite(x).any(0).all()

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "Folder, end of the log, and what polars makes of it."
    d = tmp_path_factory.mktemp("shop")
    end = make_shop(d, 30_000, 40)
    return d, end, run(Polars(), d, end, "polars")

def test_the_shop_has_what_engines_could_disagree_about(shop):
    d, _, out = shop
    events = pl.read_parquet(sorted((d/"in"/"events").rglob("*.parquet")))
    assert events["flag"].null_count() < events.height and (events["received_ts"] - events["ts"]).max() > timedelta(days=1)
    assert set(events["currency"].unique()) == {"EUR", "USD", "SEK", None}
    assert ((events["price"] * 1000).round().cast(pl.Int64) % 10 == 5).sum() > 1000
    assert 500 < events["session_id"].null_count() < events.height - 500
    for name, id in dict(items="item_id", users="who", sessions="session_id").items():
        ids = table(out, name)[id].to_list()
        assert {i[0] for i in ids} >= {"Ä", "𝒳", "ﬀ"} and ids == sorted(ids, key=str.encode)
    assert table(out, "log").select("known").is_duplicated().any() and set(table(out, "table")["label"]) == {0, 1}

def ingest_s(session: str) -> str:
    "Ingest's id of a session that an engine found."
    return "s-" + hashlib.blake2b(session.encode(), digest_size=10).hexdigest()

def test_sessions_are_those_of_ingest(shop):
    d, _, out = shop
    told = pl.concat(pl.read_parquet(p) for p in sorted(d.glob("told.*")))
    events = with_sessions(Polars().scan(d/"in"/"events"), 30).collect("polars").to_native()
    both = events.select("event_id", got="session_id").join(told, on="event_id", validate="1:1")
    assert both.height == told.height and both.select(FOUND).sum().item() > 500
    assert both.with_columns(got=pl.when(FOUND).then(pl.col("got").map_elements(ingest_s, return_dtype=pl.String)).otherwise("got")).select((pl.col("got") == pl.col("session_id")).all()).item()
    assert set(events["session_id"].unique()) >= set(table(out, "sessions")["session_id"])

# ---- sessions, found as ingest finds them

GAP = 30 * 60 * 10**6
PAUSES = [0, 1, GAP - 1, GAP, GAP + 1, GAP // 3, 5 * GAP, 98 * GAP]  # µs; the last one is two days and an hour

def visits(steps: list[tuple[int, int, bool, int]], start: int = 1_711_838_000_000_001) -> pl.DataFrame:
    "Events in order of time, from steps (pause since the last event of anybody in µs, visitor, does the shop name the session?, delay in h: after one hour it is flagged)."
    us = np.cumsum([start, *(s[0] for s in steps)])[1:]
    ts = pl.Series(us, dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))
    return conform(pl.DataFrame(dict(event_id=[f"{i * 7919 % 100_003}" for i in range(len(steps))], event_type="click", ts=ts, received_ts=ts + pl.Series([timedelta(hours=s[3]) for s in steps], dtype=pl.Duration("us")),
        visitor_id=[("Ä v", "v", "𝒳", "ﬀ", "v ")[s[1]] for s in steps], item_id="i", flag=["robot" if s[3] == 1 else None for s in steps], session_id=[f"own {s[1]}" if s[2] else None for s in steps])))

def streamed(df: pl.DataFrame, minutes: float) -> dict[str, str]:
    "The session of each event that is not flagged as ingest finds it, a day at a time."
    days = Sessions(minutes)
    found = pl.concat([days.fill(part) for _, part in df.group_by(pl.col("ts").dt.date(), maintain_order=True)])
    return dict(found.filter(pl.col("flag").is_null()).select("event_id", "session_id").rows())

def by_engine(engine, df: pl.DataFrame, folder: Path, minutes: float) -> dict[str, str]:
    "The same as an engine finds it, in a log of three files in no order; by ingest's ids."
    (folder/"events").mkdir(parents=True)
    df = df.sample(fraction=1, shuffle=True, seed=len(df))
    for k in range(3): df[k::3].write_parquet(folder/"events"/f"{k}.parquet")
    found = _learnt_from(engine, folder, SimpleNamespace(data=SimpleNamespace(currency="", exchange_rates=(), session_gap_minutes=minutes)))
    return {e: s if s.startswith("own") else ingest_s(s) for e, s in found.select("event_id", "session_id").collect("polars").to_native().rows()}

def random_visits(n: int = 3000) -> pl.DataFrame:
    rng = np.random.default_rng(1)
    pauses = np.where(rng.random(n) < .5, rng.choice(PAUSES[:6], n), rng.integers(0, 2 * GAP, n))
    pauses[rng.integers(0, n, 15)] = PAUSES[-1]
    return visits([*zip(pauses.tolist(), rng.choice(5, n, p=[.6, .1, .1, .1, .1]).tolist(), (rng.random(n) < .1).tolist(), rng.choice([0, 0, 0, 1, 50], n).tolist())])

@given(st.lists(st.tuples(st.sampled_from(PAUSES), st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from([False, False, False, True]), st.sampled_from([0, 0, 1, 50])), min_size=1, max_size=40), st.sampled_from([30, 30, 30, .5, 2.01, 1e-6]))
@hypothesis_settings(max_examples=100, deadline=None)
def test_sessions_of_any_visits(tmp_path_factory, steps, minutes):
    df = visits(steps)
    assert by_engine(Polars(), df, tmp_path_factory.mktemp("visits"), minutes) == streamed(df, minutes)

def test_a_gap_of_any_fraction_of_a_minute(tmp_path):
    "2.01 minutes are 120.6 s, but 120,599,999.99… µs in floating point."
    assert int(2.01 * 60_000_000) < 120_600_000
    df = visits([(120_600_000, 0, False, 0)] * 5)
    assert by_engine(Polars(), df, tmp_path, 2.01) == streamed(df, 2.01) and len(set(streamed(df, 2.01).values())) == 1

def test_random_visits_and_what_can_go_wrong_in_them(tmp_path):
    df = random_visits()
    bare = df.filter(pl.col("session_id").is_null()).with_columns(pause=pl.col("ts").diff().over("visitor_id").dt.total_microseconds())
    made = pl.Series(streamed(df, 30).values()).unique()
    assert min((bare["pause"] == p).sum() for p in PAUSES[:2] + PAUSES[3:5]) > 30 and (bare["pause"] > 96 * GAP).any()
    assert ((bare["ts"].dt.date() != bare["ts"].dt.date().shift()) & (bare["pause"] <= GAP)).any()
    assert (df["received_ts"] > df["ts"]).any() and made.str.starts_with("s-").sum() > 300 and made.str.starts_with("own").sum() == 5 and df["flag"].count() > 300
    assert by_engine(Polars(), df, tmp_path, 30) == streamed(df, 30)

# ---- on one machine

@pytest.fixture(scope="class")
def spark():
    engine = Spark("local[2]", **{"spark.sql.shuffle.partitions": "2"})
    yield engine
    engine.stop()

@needs_spark
class TestOnOneMachine:
    def test_every_table_is_that_of_polars(self, spark, shop):
        d, end, wanted = shop
        assert_same(run(spark, d, end, "spark"), wanted)

    def test_sessions_are_those_of_ingest(self, spark, tmp_path):
        assert by_engine(spark, random_visits(), tmp_path, 30) == streamed(random_visits(), 30)

    @pytest.mark.bench
    def test_both_halves_of_the_store_are_those_of_polars(self, spark, shop, tmp_path):
        d, _, _ = shop
        for e in (spark, Polars()): (tmp_path/e.name).mkdir(); said = feature_store(d/"in", tmp_path/e.name/"store", e, load_settings(ROOT/"settings.ini"))
        assert min(said.values()) > 3
        a, b = ({p.relative_to(tmp_path/e): p for p in (tmp_path/e).rglob("*") if p.is_file()} for e in ("spark", "polars"))
        assert a.keys() == b.keys() and {p.suffix for p in a} == {".parquet", ".npy", ".json"}
        for name in a:
            if name.suffix == ".parquet": assert_frame_equal(pl.read_parquet(a[name]), pl.read_parquet(b[name]), check_exact=True)
            else: assert a[name].read_bytes() == b[name].read_bytes(), name

    def test_seconds_are_floored_before_1970_and_far_ahead(self, spark, tmp_path):
        us = [-10**15 - 1, -1_000_001, -1_000_000, -999_999, -1, 0, 1, 999_999, 1_711_846_799_999_999, 10**17 - 1, None]
        times = pl.Series(us, dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))
        pl.DataFrame(dict(ts=times, received_ts=times.reverse(), i=range(len(us)))).write_parquet(tmp_path/"t.parquet")
        a, b = (with_seconds(e.scan(tmp_path)).select("i", "ts", "known").collect("polars").to_native().sort("i") for e in (spark, Polars()))
        assert_frame_equal(a, b.cast({"i": pl.Int64}))
        assert a["ts"].to_list() == [None if u is None else u // 10**6 for u in us]

    def test_chance_and_cents_are_exact_integers(self, spark, tmp_path):
        rng = np.random.default_rng(0)
        x = [0, 1, 1023, 1024, PRIME - 1, PRIME, PRIME + 1, 2**53 + 1, 2**62, *rng.integers(0, 2**62, 500).tolist()]
        price = [0., .005, .015, 1.005, 2.345, 2.675, 1e6 + .005, 1e9 + .115, *(rng.integers(0, 10**6, 501) / 1000).tolist()]
        pl.DataFrame(dict(x=x, price=price)).write_parquet(tmp_path/"x.parquet")
        for seed in (0, 42, 2**40 + 7):
            def chance(v):
                for a, b in ((48_271, seed % 65_536 + 1), (69_621, 12_345)): v = (v % PRIME * a + b) % PRIME
                return (v // 1024 + v % 1024 * 2_097_143) % PRIME
            for e in (spark, Polars()):
                got = e.scan(tmp_path).select("x", y=_chance(nw.col("x"), seed)).collect("polars").to_native()
                assert dict(got.rows()) == {v: chance(v) for v in x}, e.name
        events = dict(event_id=[f"{i}" for i in range(len(x))], event_type="purchase", ts=1, known=1, visitor_id="v", user_id="u", session_id="s", item_id="i", price=price, consent=True)
        pl.DataFrame(events, strict=False).write_parquet(tmp_path/"x.parquet")
        for name, df in dict(items=dict(item_id="i", item=1, category=2), users=dict(who="u", user=3), sessions=dict(session_id="s", session=4)).items():
            (tmp_path/name).mkdir(); pl.DataFrame(df).write_parquet(tmp_path/name/"t.parquet")
        (tmp_path/"log").mkdir(); (tmp_path/"x.parquet").rename(tmp_path/"log"/"x.parquet")
        for e in (spark, Polars()):
            got = log_of(*(e.scan(tmp_path/n) for n in ("log", "items", "users", "sessions"))).collect("polars").to_native()
            assert {int(i): c for i, c in got.select("event_id", "cents").rows()} == {i: int(p * 100 + .5) for i, p in enumerate(price)}, e.name

    def test_codes_are_in_the_order_of_the_bytes(self, spark, tmp_path):
        ids = ["", " ", "a", "A", "a ", "Z", "_", "é", "e\u0301", "ß", "ss", "ﬀ", "\uffff", "𝒳", "\U0010ffff", "10", "9", "\x01", "b\n", None, "a"]
        pl.DataFrame(dict(id=ids)).write_parquet(tmp_path/"i.parquet")
        for e in (spark, Polars()):
            got = codes(e.scan(tmp_path), "id", "code").collect("polars").to_native().sort("code")
            assert got["id"].to_list() == sorted({*ids} - {None}, key=str.encode) and got["code"].to_list() == list(range(len(got))), e.name

    def test_folders_of_any_name(self, spark, tmp_path):
        out = tmp_path/"a [b]{c,d} *? é %20 \\e"/"day=2024-01-01"
        spark.write(spark.table(dict(a=[3, 1, -2], b=[2**62, 0, -7])), out)
        wanted = pl.DataFrame(dict(a=[-2, 1, 3], b=[-7, 0, 2**62]))
        assert pl.read_parquet(sorted(out.glob("*.parquet")), glob=False).sort("a").equals(wanted)
        assert spark.scan(out.parent).collect("polars").to_native().sort("a").equals(wanted)

    def test_no_rows_are_a_table_too(self, spark, tmp_path):
        spark.write(spark.table(dict(a=[1])).filter(nw.col("a") > 1), tmp_path/"none")
        assert spark.scan(tmp_path/"none").collect("polars").to_native().equals(pl.DataFrame(dict(a=[]), schema=dict(a=pl.Int64)))

    def test_what_fails_is_one_line(self, spark, tmp_path):
        with pytest.raises(RecsysError, match=r"nowhere: Spark failed: .*Path does not exist") as e: spark.scan(tmp_path/"nowhere")
        assert "\n" not in str(e.value)
        too_much = spark.table(dict(a=[2**62])).with_columns(a=nw.col("a") * 4)
        with pytest.raises(RecsysError, match="Spark failed: .*OVERFLOW") as e: spark.write(too_much, tmp_path/"sum")
        assert "\n" not in str(e.value) and "\tat" not in str(e.value)

    def test_one_session_at_a_time(self, spark):
        with pytest.raises(RecsysError, match="has a Spark session already"): Spark("local[1]")

# ---- on a cluster

def free_port() -> int:
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

class Cluster:
    "A standalone master on loopback, and workers of one core each, as processes of their own."
    def __init__(self, folder: Path):
        self.folder, self.processes, self.port, self.web = folder, [], free_port(), free_port()
        self.url = f"spark://127.0.0.1:{self.port}"
        self.start("master.Master", "--port", self.port, "--webui-port", self.web)
        self.until(lambda: self.state()["status"] == "ALIVE")

    def start(self, role: str, *args):
        command = [Path(find_spec("pyspark").origin).parent/"bin"/"spark-class", f"org.apache.spark.deploy.{role}", "--host", "127.0.0.1", *args]
        with (self.folder/f"{len(self.processes)}.log").open("wb") as log:
            self.processes.append(psutil.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder))

    def workers(self, n: int):
        for k in range(n): self.start("worker.Worker", self.url, "--cores", 1, "--memory", "700m", "--webui-port", 0, "--work-dir", self.folder/f"work-{k}")
        self.until(lambda: [w["state"] for w in self.state()["workers"]] == ["ALIVE"] * n)

    def state(self) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.web}/json/", timeout=10) as answer: return json.load(answer)

    def until(self, holds, seconds: float = 120):
        ends = time.monotonic() + seconds
        while True:
            try:
                if holds(): return
            except OSError: pass
            assert time.monotonic() < ends and all(p.is_running() for p in self.processes), "\n".join(p.read_text()[-2000:] for p in self.folder.glob("*.log"))
            time.sleep(.2)

    def stop(self):
        "End the processes and what they started."
        family = [q for p in self.processes if p.is_running() for q in (*p.children(recursive=True), p)]
        for p in family:
            with suppress(psutil.NoSuchProcess): p.terminate()  # an executor goes with its worker
        for p in psutil.wait_procs(family, timeout=20)[1]: p.kill()

@pytest.fixture(scope="class")
def cluster(tmp_path_factory):
    c = Cluster(tmp_path_factory.mktemp("cluster"))
    yield c
    c.stop()
    assert all(ended(p.pid) for p in c.processes)

@needs_spark
class TestOnACluster:
    def test_a_master_without_workers_is_not_waited_for_for_ever(self, cluster):
        with pytest.raises(RecsysError, match="no worker offered its cores and memory within 2 s"): Spark(cluster.url, wait=2)

    def test_every_table_is_that_of_polars(self, cluster, shop, monkeypatch, tmp_path):
        d, end, wanted = shop
        cluster.workers(2)
        monkeypatch.setenv("RECSYS_RUN_ENGINE", "spark"); monkeypatch.setenv("RECSYS_RUN_SPARK_MASTER", cluster.url)
        engine = engine_of(load_settings(ROOT/"settings.ini"))
        try:
            assert engine.session.sparkContext.master == cluster.url and engine.session.conf.get("spark.sql.shuffle.partitions") == "2"
            cluster.until(lambda: [w["coresused"] for w in cluster.state()["workers"]] == [1, 1])
            assert_same(run(engine, d, end, "cluster"), wanted)
            assert by_engine(engine, random_visits(), tmp_path, 30) == streamed(random_visits(), 30)
            found = engine.session.sparkContext._jsc.sc().statusStore().executorList(True)
            tasks = {e.hostPort(): e.completedTasks() for e in map(found.apply, range(found.size())) if e.id() != "driver"}
            assert len(tasks) == 2 and min(tasks.values()) > 20 and sum(e.failedTasks() for e in map(found.apply, range(found.size()))) == 0
            assert [w["coresused"] for w in cluster.state()["workers"]] == [1, 1]
        finally: engine.stop()

# ---- when there is none

def test_a_port_where_nobody_listens(tmp_path):
    pytest.importorskip("pyspark", reason="pyspark is not installed")
    if not shutil.which("java"): pytest.skip("there is no java")
    begin = time.monotonic()
    for master in (f"spark://127.0.0.1:{free_port()}", f"spark://127.0.0.1:{free_port()},127.0.0.1:1", "spark://127.0.0.1", "spark://127.0.0.1:99999", "spark://"):
        with pytest.raises(RecsysError, match=re.escape(f"{master}: no Spark master listens there")): Spark(master)
    assert time.monotonic() - begin < 20

@needs_pyspark
def test_without_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path)); monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(RecsysError, match="Spark needs Java 17 or newer, there is none on the PATH — install one"): Spark("local[2]")
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    with pytest.raises(RecsysError, match=r"there is none in JAVA_HOME \(/nowhere\)"): Spark("local[2]")

def test_without_pyspark(monkeypatch):
    monkeypatch.setattr("recsys.candidates.pipeline.find_spec", lambda name: None)
    with pytest.raises(RecsysError, match=r"Spark is not installed — pip install .*\[spark\]"): Spark("local[2]")

ASK = """import sys
from recsys.candidates.pipeline import Spark
from recsys.core.settings import RecsysError
try: Spark(sys.argv[1])
except RecsysError as e: print(e)"""

@needs_pyspark
@needs_java
def test_nothing_of_java_reaches_the_terminal(tmp_path):
    "A master that is none, and a Java that is too old for Spark, each in a process of its own."
    def ask(master, **env):
        return subprocess.run([sys.executable, "-c", ASK, master], capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, **env})
    found = ask("nonsense")
    assert found.returncode == 0 and found.stderr == "" and found.stdout.count("\n") == 1
    assert found.stdout.startswith("[run] spark_master = nonsense: Spark failed: ") and "Could not parse Master URL: 'nonsense'" in found.stdout
    old = tmp_path/"bin"/"java"
    old.parent.mkdir(); old.write_text("#!/bin/sh\necho 'Error: LinkageError occurred while loading main class' >&2\nexit 1\n"); old.chmod(0o755)
    found = ask("local[2]", JAVA_HOME=str(tmp_path))
    assert found.returncode == 0 and found.stderr == "" and found.stdout.count("\n") == 1 and "Error: LinkageError" in found.stdout and "it needs Java 17 or newer" in found.stdout

@needs_pyspark
@needs_java
def test_java_starts_in_no_fork(tmp_path):
    "What libraries run in a forked child (gRPC's threads) ended some of them before they were Java."
    script = "import os\nos.register_at_fork(before=lambda: print('forked'))\n" + ASK + "\nelse:\n    from pyspark import SparkContext\n    print('started', SparkContext.getOrCreate().getConf().get('spark.own.asked'))"
    asked = {**os.environ, "PYSPARK_SUBMIT_ARGS": "--conf spark.own.asked=yes pyspark-shell"} # as with pyspark's own start
    found = subprocess.run([sys.executable, "-c", script, "local[1]"], capture_output=True, text=True, timeout=240, cwd=tmp_path, env=asked)
    assert found.returncode == 0 and found.stdout.strip() == "started yes", found.stdout + found.stderr

@needs_pyspark
@needs_java
def test_java_ends_with_its_process(tmp_path):
    "Even where that is killed."
    script = ASK + "\nimport time\nfrom pyspark import SparkContext\nprint(SparkContext._gateway.proc.pid, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script, "local[1]"], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        java = psutil.Process(int(process.stdout.readline()))
        assert "java" in java.name()
    finally: process.kill(); process.wait(); process.stdout.close()
    psutil.wait_procs([java], timeout=60)
    assert ended(java.pid)

@pytest.mark.parametrize("text, cause", [("An error occurred\n: java.lang.X: why\n\tat a.b(C.java:1)", "java.lang.X: why"), ("", "no reason given"), ("[PATH_NOT_FOUND] none\nSQLSTATE: 42K03", "[PATH_NOT_FOUND] none"),
    ("An error\n: a.A: first\n\tat x\nCaused by: b.B: second\n\t... 3 more\nCaused by: c.C: third\n\tat y", "c.C: third"), ("x" * 1000, "x" * 400)])
def test_the_cause_of_an_exception(text, cause): assert _cause(text) == cause

def test_what_does_not_fit_is_refused_before_it_starts(shop, tmp_path, monkeypatch):
    d, end, _ = shop
    monkeypatch.setattr("recsys.candidates.pipeline.psutil.virtual_memory", lambda: SimpleNamespace(available=10_000_000))
    with pytest.raises(RecsysError, match=r"events need about .* GB of memory, 0\.0 are free — use a larger machine, or set engine = spark"):
        offline_tables(d/"in", tmp_path/"out", Polars(), load_settings(ROOT/"settings.ini"), end - 28 * DAY, end)
    assert not (tmp_path/"out").exists()
    check_memory(10**12, 10**11, 1, "spark")  # its memory is the cluster's

def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    "Control groups of both versions; what the kernel caches of files is free."
    monkeypatch.setattr("recsys.candidates.pipeline.psutil.virtual_memory", lambda: SimpleNamespace(available=8 * 10**9))
    def group(folder, limit, used, says="2000000000"):
        folder.mkdir(parents=True)
        for name, text in {"memory.stat": "anon 5\ninactive_file 300000000", limit: says, used: "900000000"}.items(): (folder/name).write_text(text + "\n")
    group(tmp_path/"new", "memory.max", "memory.current")
    group(tmp_path/"old"/"memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    group(tmp_path/"none", "memory.max", "memory.current", "max")
    group(tmp_path/"full", "memory.max", "memory.current", "500000000")
    assert [free_memory(tmp_path/g) for g in ("new", "old", "none", "full", "nowhere")] == [1_400_000_000, 1_400_000_000, 8 * 10**9, 0, 8 * 10**9]
    assert 0 < free_memory()

# ---- nightly

def cpu_seconds() -> float: return sum(t.user + t.system for p in (psutil.Process(), *psutil.Process().children(recursive=True)) for t in [p.cpu_times()])

@pytest.mark.bench
@needs_spark
def test_a_server_that_is_no_master_is_given_up():
    "Spark tries it for a minute."
    with closing(socket.create_server(("127.0.0.1", 0))) as s:
        with pytest.raises(RecsysError, match="what listens there does not answer as a Spark master"): Spark(f"spark://127.0.0.1:{s.getsockname()[1]}")

@pytest.mark.bench
@needs_spark
def test_a_larger_log_and_what_it_costs(tmp_path, monkeypatch, capsys):
    end_java(); monkeypatch.delenv("JDK_JAVA_OPTIONS")  # it is all of Java that costs
    end, cost, engines = make_shop(tmp_path, 200_000, 90), {}, dict(polars=Polars, spark=lambda: Spark("local[2]"))
    for name, engine in engines.items():
        begin = cpu_seconds(); e = engine()
        run(e, tmp_path, end, name)
        cost[name] = cpu_seconds() - begin
    e.stop()
    with capsys.disabled(): print(f"\n{read_json(tmp_path/'in'/'ingest.json')['rows']:,} events, CPU s: polars {cost['polars']:.1f}, Spark {cost['spark']:.1f}, {cost['spark'] / cost['polars']:.0f} times as much")
    assert_same(tmp_path/"spark", tmp_path/"polars")
