"""Hostile input: whatever a file holds, the importers end in one sentence or in rows that are right.

A row that is *accepted* holds only what its raw cells hold; everything else has a problem, or fails the contract."""
import gzip, io, json, os, random, struct, zipfile
from datetime import datetime, timezone
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.data.events import validate_events
from recsys.data.importers import open_mapping, read_mapping, rows_of
from recsys.data.streams import Limits, Part, blocks, raw_frame
from recsys.operations import report

NOW = datetime(2026, 3, 10, tzinfo=timezone.utc)
HEAD = "event_id,event_type,ts,visitor_id,item_id,price\n"
GOOD = "e1,view,2026-03-02T10:00:00Z,v,i,1.5\n"
FORMATS = ("csv", "jsonl", "parquet")
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

def outcome(folder: Path, content: bytes, name: str = "log.csv", more: str = "") -> RecsysError | tuple[pl.DataFrame, pl.DataFrame]:
    "What the importers make of a file: (accepted, refused rows), or the one sentence. Anything else fails the test."
    (folder/name).write_bytes(content)
    (folder/"shop.toml").write_text(f"[events]\npath = {json.dumps(name)}\n" + more, encoding="utf-8")
    try:
        source, good, bad = open_mapping(folder/"shop.toml", "shop.toml"), [], []
        for b in source.events.batches():
            g, w = validate_events(b, NOW, 60)
            good.append(g); bad.append(w)
        for (part,), rows in pl.concat(bad).partition_by("source", as_dict=True).items(): # what is refused can be looked up
            raw = source.events.raw[part].join(rows.lazy(), on="row", how="semi").collect()
            assert set(raw["row"]) == set(rows["row"])
        return pl.concat(good), pl.concat(bad)
    except RecsysError as e:
        assert "\n" not in str(e) and len(str(e)) < 2000 and str(e).isprintable(), repr(str(e))
        return e

def accepted(result) -> int: return 0 if isinstance(result, RecsysError) else result[0].height

# ---- noise

@quick
@given(st.binary(max_size=400), st.sampled_from(FORMATS[:2]), st.sampled_from(["", ".gz", ".zip"]))
def test_random_bytes(tmp_path, noise, format, packing):
    name = f"log.{format}{packing}" if packing != ".zip" else "log.zip"
    for content in (noise, b"\x1f\x8b" + noise, b"PK\x03\x04" + noise, b"PAR1" + noise + b"PAR1"):
        assert accepted(outcome(tmp_path, content, name)) == 0

@quick
@given(st.binary(max_size=60), st.integers(0, 200), st.sampled_from(["csv", "jsonl"]))
def test_noise_within_good_rows(tmp_path, noise, at, format):
    rows = [dict(event_id=f"e{i}", event_type="view", ts="2026-03-02T10:00:00Z", visitor_id=f"v{i}", item_id="i") for i in range(4)]
    text = (",".join(rows[0]) + "\n" + "".join(",".join(r.values()) + "\n" for r in rows) if format == "csv" else
        "".join(json.dumps(r) + "\n" for r in rows)).encode()
    at += len(",".join(rows[0])) + 1 if format == "csv" else 0 # a header with noise names other columns
    result = outcome(tmp_path, text[:at] + noise + text[at:], f"log.{format}")
    if isinstance(result, RecsysError): return
    sent = {(r["event_id"], r["event_type"], r["visitor_id"], r["item_id"]) for r in rows}
    got = result[0].select("event_id", "event_type", "visitor_id", "item_id").rows()
    assert len({*got} - sent) <= 1 + noise.count(b"\n") # at most the rows that the noise touched
    assert result[0].height + result[1].height <= len(rows) + 1 + noise.count(b"\n") + noise.count(b"\r")

def parquet(rows: int = 50) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(dict(event_id=[f"e{i}" for i in range(rows)], event_type="view", ts=datetime(2026, 3, 2), visitor_id="v",
        item_id="i")).write_parquet(buffer)
    return buffer.getvalue()

def test_flipped_bytes_of_parquet(tmp_path):
    for seed in range(4):
        r, content = random.Random(seed), bytearray(parquet())
        for _ in range(r.randint(1, 4)): content[r.randrange(4, len(content))] = r.randrange(256)
        outcome(tmp_path, bytes(content), "log.parquet")

def test_parquet_that_kills_its_reader(tmp_path, monkeypatch):
    "The child process dies in our stead, and its file is named."
    import recsys.data.streams as streams
    (tmp_path/"a.parquet").write_bytes(parquet()); (tmp_path/"b.parquet").write_bytes(parquet())
    monkeypatch.setattr(streams, "_PROBE", streams._PROBE.replace("        lf =",
        "        if p.endswith(b'b.parquet'): import os; os.abort()\n        lf ="))
    (tmp_path/"shop.toml").write_text("[events]\npath = '*.parquet'\n")
    with pytest.raises(RecsysError, match="^b.parquet: not readable as parquet .it ends the process that reads it.*damaged"):
        open_mapping(tmp_path/"shop.toml")

def test_parquet_that_asks_for_all_memory(tmp_path):
    "A page that claims 2^61 bytes: found by flipping bytes at random."
    r, content = random.Random(3575), bytearray(parquet())
    for _ in range(r.randint(1, 4)): content[r.randrange(4, len(content))] = r.randrange(256)
    assert isinstance(outcome(tmp_path, bytes(content), "log.parquet"), RecsysError)

@quick
@given(st.binary(max_size=80), st.integers(0, 250))
def test_broken_archives(tmp_path, noise, at):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("log.csv", HEAD + GOOD * 20)
    whole, packed = buffer.getvalue(), gzip.compress((HEAD + GOOD * 20).encode(), mtime=0)
    assert accepted(outcome(tmp_path, whole, "log.zip")) == accepted(outcome(tmp_path, packed, "log.csv.gz")) == 20
    for content, name in ((whole, "log.zip"), (packed, "log.csv.gz")):
        for broken in (content[:at], content[:at] + noise + content[at + len(noise):]):
            result = outcome(tmp_path, broken, name)
            if broken != content and not isinstance(result, RecsysError): assert set(result[0]["item_id"]) <= {"i"}

@pytest.mark.parametrize("member", ["", "\x1b[2Jlog.txt", "lo\ng.txt"])
def test_odd_names_of_members_are_told_in_one_line(tmp_path, member):
    with zipfile.ZipFile(tmp_path/"log.zip", "w") as z: z.writestr(zipfile.ZipInfo(member), HEAD + GOOD)
    assert isinstance(outcome(tmp_path, (tmp_path/"log.zip").read_bytes(), "log.zip"), RecsysError) # `outcome` looks at the line

@pytest.mark.parametrize("seed", range(2))
def test_noise_as_parquet(tmp_path, seed):
    noise = random.Random(seed).randbytes(400)
    for content in (noise, b"PAR1" + noise + b"PAR1", b"PAR1" + noise + struct.pack("<I", 400) + b"PAR1"):
        assert accepted(outcome(tmp_path, content, "log.parquet")) == 0

# ---- encodings

@pytest.mark.parametrize("encoding, message", [("utf-16", "this is UTF-16"), ("utf-16-le", "zeros"), ("utf-32", "UTF-16"),
    ("latin-1", "not readable as csv")])
def test_wrong_encodings(tmp_path, encoding, message):
    assert message in str(outcome(tmp_path, (HEAD + GOOD.replace("v,i", "v,käse")).encode(encoding)))

@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1", "cp1252"])
def test_said_encodings(tmp_path, encoding):
    good, bad = outcome(tmp_path, (HEAD + GOOD.replace("v,i", "v,käse")).encode(encoding), more=f"encoding = '{encoding}'\n")
    assert (good["item_id"].to_list(), bad.height) == (["käse"], 0)

def test_byte_order_mark_and_line_ends(tmp_path):
    for text in ("\ufeff" + HEAD + GOOD, HEAD.replace("\n", "\r\n") + GOOD.replace("\n", "\r\n"), HEAD + "\n\n" + GOOD + "\n\n",
        HEAD + GOOD[:-1]):
        good, bad = outcome(tmp_path, text.encode())
        assert good.select("event_id", "price").rows() == [("e1", 1.5)] and bad.height == 0

# ---- rows that are not what they seem

def test_rows_of_other_lengths_are_not_accepted(tmp_path):
    text = HEAD + GOOD + "e2,view,2026-03-02T10:00:00Z,v,tea, green,1.5\n" + "e3,view,2026-03-02T10:00:00Z,v\n" + GOOD.replace("e1",
        "e4") + "e5,view,2026-03-02T10:00:00Z,v,i\n"
    good, bad = outcome(tmp_path, text.encode())
    assert good["event_id"].to_list() == ["e1", "e4"]
    assert bad.select("row", "reason").rows() == [(2, "the row has too many cells"), (3, "the row has too few cells"), (5,
        "the row has too few cells")]

def test_unclosed_quote_is_said(tmp_path):
    assert isinstance(outcome(tmp_path, (HEAD + GOOD + 'e2,view,2026-03-02,"v,i,1\n' + GOOD * 50).encode()), RecsysError)
    good, bad = outcome(tmp_path, (HEAD + GOOD + 'e2,view,2026-03-02,v"5,i,1\n').encode(), more="quotes = false\n")
    assert good["visitor_id"].to_list() == ["v", 'v"5']

def test_same_column_twice(tmp_path):
    assert "two columns are called 'item_id'" in str(outcome(tmp_path,
        b"event_type,ts,visitor_id,item_id,item_id\nview,2026-03-02,v,i,j\n"))
    good, _ = outcome(tmp_path, b"event_type,ts,visitor_id,item_id,note,note\nview,2026-03-02,v,i,a,b\n")
    assert good.height == 1

def test_broken_lines_of_json_are_set_aside(tmp_path):
    row = dict(event_type="view", ts="2026-03-02T10:00:00Z", visitor_id="v", item_id="i", price=1)
    lines = [json.dumps(row), '{"event_type": "view", "ts"', json.dumps(row | dict(price=float("nan"))), "[1]",
        json.dumps(row | dict(price=2.5)),
        '{"price": 1e400, "visitor_id": "w"}', '{"a":' * 1000 + "1" + "}" * 1000, "[" * 100_000]
    good, bad = outcome(tmp_path, "\n".join(lines).encode(), "log.jsonl")
    assert good["price"].to_list() == [1.0, 2.5] and bad["row"].to_list() == [2, 3, 4, 6, 7, 8]
    assert set(bad["reason"]) == {"the line is not JSON", "the line is not a record", "the line nests too deep"}

ITEMS = st.one_of(st.text(max_size=6), st.integers(-5, 10**30), st.booleans(), st.floats(-1e6, 1e6),
    st.lists(st.text(max_size=2), max_size=2), st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=2), st.none())

@quick
@given(st.lists(ITEMS, min_size=1, max_size=8))
def test_no_id_comes_of_what_is_none(tmp_path, items):
    "A column of text in some lines and of lists, records, truths or decimal numbers in others; a context may be both."
    row = dict(event_type="view", ts="2026-03-02T10:00:00Z", visitor_id="v")
    rows = [row | dict(item_id=x, context='{"n": 1}' if i % 2 else dict(n=1)) for i, x in enumerate(["first", *items])]
    result = outcome(tmp_path, "\n".join(map(json.dumps, rows)).encode(), "log.jsonl")
    if isinstance(result, RecsysError): return
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool) or isinstance(x, float) and x.is_integer()
    ids = lambda x: {x} if isinstance(x, str) else {str(int(x)), "-0" if x == 0 else str(int(x))} if whole(x) else set()
    wanted = {"first"}.union(*(ids(x) for x in items)) - {""}
    got = result[0]["item_id"].to_list()
    assert {*got} <= wanted and len(got) <= 1 + sum(bool(ids(x)) for x in items)
    assert {i for x in items if isinstance(x, str) and 0 < len(x) for i in [x]} <= {*got}
    assert set(result[0]["context"].str.json_path_match("$.n")) == {"1"}

def test_types_that_change_between_blocks(tmp_path):
    row = lambda i, **kw: json.dumps(dict(event_type="view", ts="2026-03-02T10:00:00Z", visitor_id=i, item_id="i", **kw))
    text = "\n".join([*(row(i) for i in range(40)), *(row(f"v{i}", price=1) for i in range(40)),
        *(row(i + .0, price=2.5, new=[1]) for i in range(40))])
    (tmp_path/"log.jsonl").write_text(text)
    from recsys.data.importers import MappedTable, read_table
    table = read_table(MappedTable("log.jsonl"), "events", tmp_path, limits=Limits(block=1 << 10))
    batches = list(table.batches())
    rows = pl.concat(batches)
    assert len(batches) > 5 and rows.height == 120 and rows["problem"].null_count() == 120
    assert rows["visitor_id"].to_list() == [*map(str, range(40)), *(f"v{i}" for i in range(40)), *map(str, range(40))]
    assert rows["price"].to_list() == [None] * 40 + [1.0] * 40 + [2.5] * 40
    assert pl.concat(table.batches()).equals(rows)
    assert table.raw["log.jsonl"].filter(pl.col("row") == 90).collect()["new"].to_list() == [[1]]

ANY = st.recursive(st.none() | st.booleans() | st.integers(-9, 10**30) | st.floats(-1e6, 1e6) | st.text(max_size=3),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from("abc"), x, max_size=3), max_leaves=6)

@quick
@given(st.lists(ANY, min_size=1, max_size=8))
def test_lines_that_disagree_cost_no_others(tmp_path, notes):
    "One odd line does not make a file unreadable, whatever is where: lines without a note all stay, and no line is lost."
    row = dict(event_type="view", ts="2026-03-02T10:00:00Z", visitor_id="v", item_id="i")
    rows = [r for i, x in enumerate(notes) for r in (row | dict(price=i), row | dict(note=x))]
    good, bad = outcome(tmp_path, "\n".join(map(json.dumps, rows)).encode(), "log.jsonl")
    assert good.height + bad.height == len(rows) and good["price"].drop_nulls().to_list() == [*map(float, range(len(notes)))]

def test_a_price_that_is_none_costs_its_own_line_only(tmp_path):
    row = dict(event_type="view", ts="2026-03-02T10:00:00Z", visitor_id="v", item_id="i")
    for odd, kept in ((True, False), ([3], False), ({"usd": 3}, False), ([], True), ({}, True), (None, True)):
        good, bad = outcome(tmp_path, "\n".join(json.dumps(row | dict(price=p)) for p in (1, 2.5, odd, 4)).encode(), "log.jsonl")
        assert good["price"].to_list() == [1., 2.5, *[None] * kept, 4.] and bad["row"].to_list() == [3] * (not kept), (odd, good, bad)

KINDS = dict(record={"a": 1}, other={"b": [1]}, list=[1], records=[{"a": 1}], texts=["x"], text="x", number=3, share=2.5, truth=True, empty=[], nothing={}, null=None)

@pytest.mark.parametrize("a", KINDS)
def test_kinds_that_change_between_blocks_can_be_looked_up(tmp_path, a):
    for b in KINDS:
        values = [KINDS[k] for k in (a, a, b, b, a)]
        (tmp_path/"x.jsonl").write_text("".join(json.dumps(dict(long="so that each line is a block of its own", v=v)) + "\n" for v in values))
        raw = raw_frame(Part("x", tmp_path/"x.jsonl", None, "jsonl", limits=Limits(block=60))).select("row", "v").collect()
        back = lambda v: json.loads(v) if isinstance(v, str) and v != "x" else v
        whole = lambda v: {k: x for k, x in v.items() if x is not None} if isinstance(v, dict) else [whole(x) for x in v] if isinstance(v, list) else v
        assert [whole(back(v)) or None for v in raw["v"].to_list()] == [v or None for v in values], (a, b, raw)

@pytest.mark.parametrize("n", ["nan", "NaN", "inf", "-inf", "1e400", "-1e400", "0x10", "1,5", "１２", "--1", "1e", "1_000", "٣"])
def test_numbers_that_are_none(tmp_path, n):
    row = GOOD.replace("1.5", f'"{n}"')
    good, bad = outcome(tmp_path, (HEAD + GOOD + row.replace("e1", "e2")).encode())
    assert good["event_id"].to_list() == ["e1"] and bad.height == 1, good["price"].to_list()

def test_negative_zero_and_tiny(tmp_path):
    good, _ = outcome(tmp_path, (HEAD + GOOD.replace("1.5", "-0.0") + GOOD.replace("e1", "e2").replace("1.5", "1e-320")).encode())
    assert [str(p) for p in good["price"]] == ["0.0", "1e-320"]

@pytest.mark.parametrize("ts", ["0000-01-01", "-0001-01-01", "9999-12-31T23:59:59Z", "10000-01-01", "2026-13-01", "2026-02-30",
    "2026-03-02T24:00:00Z",
    "1969-12-31T23:59:59Z", "999999999999999999999", "now", "2026-03-02T10:00:00+99:99", "'2026-03-02"])
def test_times_that_are_none(tmp_path, ts):
    result = outcome(tmp_path, (HEAD + GOOD + GOOD.replace("e1", "e2").replace("2026-03-02T10:00:00Z", ts)).encode())
    assert result[0]["event_id"].to_list() == ["e1"] and result[1].height == 1

@pytest.mark.parametrize("unit", ["s", "ms", "us"])
@pytest.mark.parametrize("ts", ["1e400", "9223372036854775807", "-9223372036854775808", "nan", "1e18", "18446744073709551616"])
def test_times_that_overflow(tmp_path, ts, unit):
    rows = HEAD + GOOD.replace("2026-03-02T10:00:00Z", {"s": "1772445600", "ms": "1772445600000", "us": "1772445600000000"}[unit])
    result = outcome(tmp_path, (rows + GOOD.replace("e1", "e2").replace("2026-03-02T10:00:00Z", ts)).encode(), more=f"ts_unit = '{unit}'\n")
    assert result[0]["event_id"].to_list() == ["e1"]

# ---- sizes

def test_huge_cell(tmp_path):
    good, bad = outcome(tmp_path, (HEAD + GOOD + GOOD.replace("e1", "e2").replace("v,i", "v," + "x" * 10_000_000)).encode())
    assert good.height == 1 and bad["reason"].to_list()[0].startswith("item_id is longer than 65536 bytes")
    line = json.dumps(dict(event_type="view", ts="2026-03-02T10:00:00Z", visitor_id="v", item_id="i", context="[" * 10_000_000))
    good, bad = outcome(tmp_path, line.encode(), "log.jsonl")
    assert good.height == 0 and bad.height == 1

def test_endless_row(tmp_path):
    class Endless(io.RawIOBase):
        def read(self, n=-1): return b"x" * n
    for quotes in (True, False):
        with pytest.raises(RecsysError, match="a row is longer than 1 MB"): list(blocks(Endless(), "x.csv", quotes, Limits(block=1 << 18,
            record=1 << 20)))

def test_too_many_columns(tmp_path):
    names = [f"c{i}" for i in range(100_000)]
    assert "100000 columns" in str(outcome(tmp_path, (",".join(names) + "\n" + "1," * 99_999 + "1\n").encode()))
    assert isinstance(outcome(tmp_path, json.dumps(dict.fromkeys(names, 1)).encode(), "log.jsonl"), RecsysError)
    pl.DataFrame({n: [1] for n in names[:10_001]}).write_parquet(tmp_path/"wide.parquet")
    assert "10001 columns" in str(outcome(tmp_path, (tmp_path/"wide.parquet").read_bytes(), "log.parquet"))

def test_zip_bombs(tmp_path):
    def bomb(method, size=200_000_000):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as z:
            with z.open("log.csv", "w", force_zip64=True) as f:
                f.write(HEAD.encode())
                for _ in range(size // 10**6): f.write(b"\n" * 10**6)
        return buffer.getvalue()
    assert "unpacks to more than 200 times" in str(outcome(tmp_path, bomb(zipfile.ZIP_DEFLATED), "log.zip"))
    assert "a method that is not read" in str(outcome(tmp_path, bomb(zipfile.ZIP_BZIP2, 10**6), "log.zip"))
    assert "unpacks to more than 200 times" in str(outcome(tmp_path, gzip.compress(HEAD.encode() + b"\n" * 200_000_000), "log.csv.gz"))
    assert isinstance(outcome(tmp_path, gzip.compress(gzip.compress(HEAD.encode())), "log.csv.gz"), RecsysError)

def test_a_zip_file_that_lies(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("log.csv", HEAD + GOOD * 2000)
    content = bytearray(buffer.getvalue())
    central = content.rindex(b"PK\x01\x02")
    for size in (1, 10**9):
        content[central + 24:central + 28] = struct.pack("<I", size)
        assert accepted(outcome(tmp_path, bytes(content), "log.zip")) in (0, 2000)
    content[central + 8] |= 1
    assert "password" in str(outcome(tmp_path, bytes(content), "log.zip"))

# ---- names and paths

def test_member_names_are_labels(tmp_path):
    names = ["../../etc/passwd.csv", "/etc/shadow.csv", "C:\\x.csv", "a\nb.csv", "=cmd|' /C calc'!A0.csv", "\u202egpj.csv"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for i, n in enumerate(names): z.writestr(n, HEAD + GOOD.replace("e1", f"e{i}"))
    before = {*tmp_path.rglob("*")}
    good, bad = outcome(tmp_path, buffer.getvalue(), "log.zip")
    assert good.height == len(names) and {*tmp_path.rglob("*")} - before == {tmp_path/"log.zip", tmp_path/"shop.toml"}
    assert not (tmp_path.parent.parent/"etc").exists()

def test_paths_from_a_mapping(tmp_path):
    "A mapping is the operator's: its paths go where the operator may read, and only to regular files."
    (tmp_path/"in").mkdir(); (tmp_path/"log.csv").write_text(HEAD + GOOD)
    (tmp_path/"in"/"link.csv").symlink_to(tmp_path/"log.csv"); (tmp_path/"in"/"dangling.csv").symlink_to(tmp_path/"gone.csv")
    os.mkfifo(tmp_path/"in"/"pipe.csv")
    def read(path):
        (tmp_path/"in"/"shop.toml").write_text(f"[events]\npath = {json.dumps(path)}\n")
        try: return rows_of(open_mapping(tmp_path/"in"/"shop.toml", "shop.toml").events).height
        except RecsysError as e: return str(e)
    assert [read(p) for p in ("../log.csv", str(tmp_path/"log.csv"), "link.csv", "../*.csv")] == [1, 1, 1, 1]
    for path in ("dangling.csv", "pipe.csv", "/dev/zero", "/proc/self/mem", ".", "", "a\0b", "x" * 5000, "~/x.csv", "$HOME/x.csv",
        "file:///etc/passwd",
            "http://example.org/x.csv", "s3://bucket/x.csv"):
        assert "no such file" in read(path) or "no file matches" in read(path) or "ending does not tell" in read(path), read(path)
    assert "ending does not tell" in read("../../../../../../../../etc/passwd")

def test_formulas_stay_text_in_reports(tmp_path):
    "A cell that a spreadsheet or a browser would run is shown as the text that it is."
    hostile = ["=cmd|' /C calc'!A0", "+1+1", "@SUM(A1)", "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "{{7*7}}",
        "${jndi:x}"]
    rows = "".join(f'e{i},"{v.replace(chr(34), chr(34) * 2)}",2026-03-02T10:00:00Z,v,"{v.replace(chr(34), chr(34) * 2)}",x\n' for i,
        v in enumerate(hostile))
    good, bad = outcome(tmp_path, (HEAD + GOOD + rows).encode())
    assert bad.height == len(hostile) and bad["item_id"].to_list() == hostile
    cells = [[report.escape(i), report.escape(r)] for i, r in bad.select("item_id", "reason").iter_rows()]
    page = report.html_table("quarantine", [("item", False), ("reason", False)], cells)
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") == 1 and "=cmd|" in page

def test_values_never_become_paths(tmp_path):
    hostile = ["../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "C:\\Windows", "a/b", "CON", ".", "..", "%2e%2e%2f",
        "$(touch x)", "`touch x`"]
    rows = "".join(f"e{i},view,2026-03-02T10:00:00Z,{v},{v},1\n" for i, v in enumerate(hostile))
    good, bad = outcome(tmp_path, (HEAD + rows).encode())
    assert good["item_id"].to_list() == hostile and {p.name for p in tmp_path.iterdir()} == {"log.csv", "shop.toml"}

STRANGE = ["\u202eevil\u202c", "a\u0300\u0301\u0302" * 60, "\u200b", "\ufeff", "\U000e0001", "🏴\u200d☠️", "\x00", "\x1b[31m", "\x7f",
    "ﷺ" * 80, "\ud800".encode("utf-8", "surrogatepass")]

@pytest.mark.parametrize("id", STRANGE)
def test_strange_text(tmp_path, id):
    raw = id if isinstance(id, bytes) else id.encode()
    result = outcome(tmp_path, HEAD.encode() + GOOD.encode() + GOOD.encode().replace(b"v,i", b"v," + raw).replace(b"e1", b"e2"))
    if isinstance(id, bytes): assert isinstance(result, RecsysError)
    elif len(id) <= 256: assert result[0]["item_id"].to_list() == ["i", id]
    else: assert result[1]["reason"].to_list() == ["item_id is not 1 to 256 characters long"]

def test_lone_surrogates_of_json(tmp_path):
    line = '{"event_type":"view","ts":"2026-03-02T10:00:00Z","visitor_id":"v","item_id":"%s"}\n'
    for half in ("\\ud800", "\\udc00x", "\\ud83dx", "\\ud83d"): # polars would make a zero byte of some of them
        result = outcome(tmp_path, (line % "i" + line % half + line % "\\ud83d\\ude00").encode(), "log.jsonl")
        assert result[0]["item_id"].to_list() == ["i", "😀"] and result[1]["reason"].to_list() == ["the line is not JSON"]

@quick
@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=5))
def test_any_text_comes_back_or_is_refused(tmp_path, rows):
    "JSON can write every text, so what is accepted is exactly what was sent."
    lines = [dict(event_id=f"e{i}", event_type="view", ts="2026-03-02T10:00:00Z", visitor_id=v, item_id=w) for i, (v, w) in enumerate(rows)]
    result = outcome(tmp_path, "".join(json.dumps(l) + "\n" for l in lines).encode(), "log.jsonl")
    if isinstance(result, RecsysError): return
    sent = {l["event_id"]: (l["visitor_id"], l["item_id"]) for l in lines}
    assert all(sent[e] == (v, i) for e, v, i in result[0].select("event_id", "visitor_id", "item_id").iter_rows())
    assert result[0].height + result[1].height == len(lines)

# ---- mappings

@quick
@given(st.binary(max_size=200))
def test_random_mappings(tmp_path, noise):
    for content in (noise, b"[events]\npath = 'log.csv'\n" + noise, b"[events]\npath = 'x'\n[events.flags]\nf = " + noise):
        (tmp_path/"shop.toml").write_bytes(content)
        try: read_mapping(tmp_path/"shop.toml", "shop.toml")
        except RecsysError as e: assert "\n" not in str(e)

@pytest.mark.parametrize("keys, message", [
    ("flags = {bad = {item_id = '~ (('}}", "is no condition"), ("flags = {bad = {price = '< much'}}", "is no condition"),
    ("flags = {bad = {nothing = 'x'}}", "no column 'nothing' (in a rule)"), ("where = {nothing = 'x'}", "no column 'nothing'"),
    ("flags = {bad = {item_id = '~ " + "(a{1000}){1000}" + "'}}", "is no condition"), ("columns = {user_id = '{nothing}'}",
    "no column '{nothing}'"),
    ("explode = 'item_id'", "with lists (to explode)"), ("latest = 'nothing'", "no column 'nothing'"), ("encoding = 'rot13'", "encoding"),
    ("clock = {step = 'nothing', per_step = 1}", "no column 'nothing' (in clock)"), ("clock = {start = 'never'}", "constant ts = 'never'"),
    ("event_types = {view = '" + "x" * 99 + "'}", "no event type is known")])
def test_bad_mappings(tmp_path, keys, message):
    result = outcome(tmp_path, (HEAD + GOOD).encode(), more=keys + "\n")
    assert isinstance(result, RecsysError) and message in str(result), result

def test_deep_toml(tmp_path):
    (tmp_path/"shop.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(RecsysError): read_mapping(tmp_path/"shop.toml", "shop.toml")

def test_a_hungry_pattern_is_still_linear(tmp_path):
    good, _ = outcome(tmp_path, (HEAD + GOOD.replace("v,i", "v," + "a" * 250 + "!")).encode(),
        more="flags = {x = {item_id = '~ ^(a+)+$'}}\n")
    assert good["flag"].to_list() == [None]
