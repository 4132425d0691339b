"From a folder of files to a project: what is recognised, what is proposed, what is refused, and that nothing of the user's is touched."
import json, subprocess, tomllib
from datetime import date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given, settings as few, strategies as st

from recsys.core.files import file_digest
from recsys.core.settings import RecsysError, load_settings, shipped
from recsys.data.importers import open_mapping, rows_of
from recsys.data.mapping import read_mapping
from recsys.data.presets import PRESETS
from recsys.data.recognise import FORMATS, mapping_text, pattern_of, propose, time_of
from recsys.operations.init import SMALL, aims, columns_said, with_values, windows
from shop import COMMAND, events, recsys, write_csv
from test_importers import SHAPES

USUAL = shipped("settings.ini").read_text(encoding="utf-8")

def project(folder: Path, **said):
    "The mapping that is proposed for `folder`, written beside it."
    p = propose(folder, **said)
    (folder.parent/"shop.toml").write_text(mapping_text(p, folder.name), encoding="utf-8")
    return p, folder.parent/"shop.toml"

# ---- layouts that are known

@pytest.mark.parametrize("like", PRESETS)
def test_every_known_layout_is_recognised_from_a_file(tmp_path, like):
    folder = tmp_path/"files"; folder.mkdir()
    (folder/"log.jsonl").write_text("".join(json.dumps(SHAPES[like]) + "\n" for _ in range(3)))
    p, toml = project(folder)
    assert p.like == like
    rows = rows_of(open_mapping(toml).events)
    assert rows["item_id"].to_list()[0] == "i" and rows["problem"].null_count() == rows.height

def test_the_tables_of_a_layout_find_their_sections(tmp_path):
    folder = tmp_path/"hm"; folder.mkdir()
    (folder/"transactions_train.csv").write_text("t_dat,customer_id,article_id,price,sales_channel_id\n2018-09-20,abc,0663713001,0.0508,2\n")
    (folder/"articles.csv").write_text("article_id,prod_name,product_type_name,product_group_name,index_group_name,colour_group_name\n0663713001,Strap top,Vest top,Garment Upper body,Ladieswear,Black\n")
    (folder/"customers.csv").write_text("customer_id,FN,Active,club_member_status,fashion_news_frequency,age,postal_code\nabc,,,ACTIVE,NONE,49,52\n")
    p, toml = project(folder)
    assert p.like == "hm" and {s: t["path"] for s, t in p.sections.items()} == dict(events="transactions_train.csv", items="articles.csv", users="customers.csv")
    s = open_mapping(toml)
    assert rows_of(s.items)["title"].to_list() == ["Strap top"] and rows_of(s.users)["segment"].to_list() == ["ACTIVE"]

def test_two_shops_in_one_folder_are_not_mixed(tmp_path):
    "The campaigns of the Open Bandit data have products of their own under the same numbers."
    folder = tmp_path/"files"; folder.mkdir()
    row = dict(timestamp="2019-11-24T00:00:00", item_id=1, position=1, click=0, propensity_score=.1, **{f"user_feature_{i}": "a" for i in range(4)})
    for campaign, extra in (("all", 3), ("men", 1)):
        for policy in ("bts", "random"): pl.DataFrame([row | {f"affinity_{k}": 0. for k in range(extra)}] * (9 if campaign == "all" else 2)).write_parquet(folder/f"obd_{policy}_{campaign}.parquet")
        pl.DataFrame([dict(item_id=1, item_feature_0=.5, item_feature_1="x", item_feature_2="y", item_feature_3="z")]).write_parquet(folder/f"obd_items_{campaign}.parquet")
    p, toml = project(folder)
    assert set(open_mapping(toml).files) == {"shop.toml", *(f"files/obd_{n}_all.parquet" for n in ("bts", "random", "items"))}
    assert any("men" in t for t in p.seen)

# ---- layouts that nobody has seen

def test_a_german_export_with_semicolons_and_an_old_encoding(tmp_path):
    folder = tmp_path/"export"; folder.mkdir()
    (folder/"Bestellungen.csv").write_bytes("Datum;Kundennummer;Artikelnummer;Bestellnummer;Menge;Preis;Währung\n24.12.2025 18:00;K1;A1;B1;2;19.90;EUR\n02.01.2026 09:30;K2;A2;B2;-1;5.00;EUR\n".encode("cp1252"))
    (folder/"Artikel.csv").write_bytes("Artikelnummer;Bezeichnung;Warengruppe\nA1;Größe M;Mode\nA2;Größe L;Mode\n".encode("cp1252"))
    p, toml = project(folder)
    rows = rows_of(open_mapping(toml).events)
    assert rows.select("visitor_id", "item_id", "order_id", "quantity", "price", "event_type").rows() == [("K1", "A1", "B1", 2, 19.9, "purchase"), ("K2", "A2", "B2", 1, 5., "return")]
    assert rows["ts"].dt.date().to_list() == [date(2025, 12, 24), date(2026, 1, 2)]
    assert rows_of(open_mapping(toml).items)["title"].to_list() == ["Größe M", "Größe L"]
    assert any("cp1252" in d for d in p.doubts) and any("UTC" in d for d in p.doubts)

def test_a_product_column_without_a_telling_name_is_found_by_what_it_points_at(tmp_path):
    folder = tmp_path/"files"; folder.mkdir()
    write_csv(folder/"log.csv", [dict(at=f"2026-01-{1 + n % 28:02}T10:00:00", who_user=f"u{n % 5}", ref=f"x{n % 9}", colour=f"c{n % 3}", act="seen") for n in range(60)])
    write_csv(folder/"things.csv", [dict(sku=f"x{n}", title=f"Thing {n}") for n in range(9)])
    p, toml = project(folder)
    assert p.sections["events"]["columns"]["item_id"] == "ref" and p.sections["items"]["columns"] == dict(item_id="sku")
    assert rows_of(open_mapping(toml).events)["problem"].null_count() == 60 and rows_of(open_mapping(toml).items)["title"].to_list()[0] == "Thing 0"

def test_what_cannot_be_told_is_asked_for_or_refused_with_the_answer(tmp_path):
    folder = tmp_path/"files"; folder.mkdir()
    write_csv(folder/"log.csv", [dict(a=f"2026-01-{1 + n % 28:02}T10:00:00", b=f"u{n % 5}", c=f"x{n % 9}") for n in range(60)])
    with pytest.raises(RecsysError, match=r"which product is meant, or who it was.*--column item_id=NAME --column user_id=NAME; the file has: a, b, c"): propose(folder)
    asked = []
    def answer(question, options, default): asked.append((question, default)); return "c" if "product" in question else default or "b"
    p = propose(folder, None, answer)
    assert [d for _, d in asked] == ["a", None, None, "none"] and p.sections["events"]["columns"] == dict(ts="a", item_id="c", user_id="b")
    assert propose(folder, dict(item_id="c", user_id="b")).sections["events"]["columns"] == p.sections["events"]["columns"]
    with pytest.raises(RecsysError, match="no column says which product"): propose(folder, None, lambda question, options, default: default)

def test_the_proposal_can_be_corrected_column_by_column(tmp_path):
    "Names mislead here: `user` is the seller, `type` a colour, and acts are numbers."
    folder = tmp_path/"files"; folder.mkdir()
    write_csv(folder/"log.csv", [dict(time=f"2026-01-{1 + n % 28:02}T10:00:00", user=f"s{n % 3}", who=f"p{n % 5}", item=f"x{n % 9}", type="red", code=1 + n % 4) for n in range(60)])
    said = {"who it was": "who", "what was done": "code", "'1' in 'code'": "view", "'2' in 'code'": "add_to_cart", "'3' in 'code'": "purchase"}
    def answer(question, options, default):
        found = next((a for part, a in said.items() if part in question), default)
        assert found in options
        return found
    p, toml = project(folder, ask=answer)
    rows = rows_of(open_mapping(toml).events)
    assert sorted({*rows["visitor_id"]}) == [f"p{n}" for n in range(5)] and p.custom_types == ["4"]
    assert sorted({*rows["event_type"]}) == ["4", "add_to_cart", "purchase", "view"] and rows["problem"].null_count() == 60

def test_a_doubtful_date_is_asked_about(tmp_path):
    folder = tmp_path/"files"; folder.mkdir()
    write_csv(folder/"log.csv", [dict(time=f"0{1 + n % 9}/0{1 + n % 3}/2026", user=f"p{n % 5}", item=f"x{n % 9}") for n in range(60)])
    unasked = propose(folder)
    assert any("could be" in d for d in unasked.doubts) and unasked.sections["events"]["ts_format"] == "%d/%m/%Y"
    p, toml = project(folder, ask=lambda question, options, default: "%m/%d/%Y" if "meant" in question else default)
    assert not any("could be" in d for d in p.doubts) and {t.month for t in rows_of(open_mapping(toml).events)["ts"]} == set(range(1, 10))

def test_lines_without_times_are_refused_or_take_made_up_ones(tmp_path):
    folder = tmp_path/"files"; folder.mkdir()
    write_csv(folder/"log.csv", [dict(user=f"p{n % 5}", item=f"x{n % 9}") for n in range(60)])
    with pytest.raises(RecsysError, match=r"no column says when.*--column ts=NAME \(or ts=none: the lines are in the order of time\)"): propose(folder)
    for how in (dict(said=dict(ts="none")), dict(ask=lambda question, options, default: "none" if "when" in question else default)):
        p, toml = project(folder, **how)
        ts = rows_of(open_mapping(toml).events)["ts"]
        assert ts.is_sorted() and ts.n_unique() == 60 and any("made up" in d for d in p.doubts)

def test_a_column_that_no_file_has_is_refused(tmp_path):
    folder = tmp_path/"files"; folder.mkdir()
    write_csv(folder/"log.csv", [dict(time="2026-01-01T10:00:00", user=f"p{n % 5}", item=f"x{n % 9}") for n in range(60)])
    with pytest.raises(RecsysError, match="no column 'itm'.*time, user, item"): propose(folder, dict(item_id="itm"))
    write_csv(folder/"things.csv", [dict(sku=f"x{n}", label=f"Thing {n}", text="long") for n in range(9)])
    p, toml = project(folder, said=dict(title="label"))
    assert rows_of(open_mapping(toml).items)["title"].to_list()[0] == "Thing 0"

name = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='\r\n\x00'), min_size=1, max_size=12)

@few(max_examples=60)
@example(["0", "\x7f", "00"], "\x7f")
@given(st.lists(name, min_size=3, max_size=6, unique=True), st.text(max_size=20))
def test_any_column_names_make_a_mapping_that_reads_back(tmp_path_factory, names, folder):
    from recsys.data.recognise import Proposal
    p = Proposal(dict(events=dict(path="a.csv", columns=dict(zip(("ts", "item_id", "user_id"), names)), event_types={names[0]: "view"})), [f"saw {names}"], [names[1]], custom_types=[names[2]])
    text = mapping_text(p, folder)
    said = tomllib.loads(text)
    assert said["events"]["columns"] == p.sections["events"]["columns"] and said["events"]["event_types"] == {names[0]: "view"} and said["custom_types"] == [names[2]]

@given(st.datetimes(min_value=datetime(2001, 1, 1), max_value=datetime(2030, 1, 1)), st.sampled_from([f for f in FORMATS if "%y" not in f]))
@few(max_examples=100)
def test_times_in_any_usual_spelling_are_read_as_they_were_meant(at, f):
    "Where two readings are possible one of them is right, and the doubt is said."
    from recsys.data.mapping import MappedTable
    from recsys.data.recognise import _read_as
    texts = pl.Series([(at + timedelta(hours=31 * k)).strftime(f) for k in range(40)])
    meant = _read_as(texts, MappedTable("", ts_format=f))
    how, doubt = time_of(texts)
    found = _read_as(texts, MappedTable("", **how))
    assert found.null_count() == 0 and (found.equals(meant) or doubt)

@given(st.sets(st.text("abc12-", min_size=1, max_size=6), min_size=2, max_size=6), st.sets(st.text("abc12-", min_size=1, max_size=6), max_size=6))
def test_a_pattern_means_its_files_and_no_others(names, others):
    from fnmatch import fnmatchcase
    names, others = sorted(names), sorted(others - names)
    if pattern := pattern_of(names, others): assert [n for n in [*names, *others] if fnmatchcase(n, pattern)] == names

# ---- settings that fit

@few(max_examples=200)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300))
def test_windows_fit_whatever_the_days_hold(counts):
    begin = date(2024, 1, 1)
    if not any(counts): return
    first = next(i for i, n in enumerate(counts) if n)
    found = {begin + timedelta(i): n for i, n in enumerate(counts) if n}
    usual = load_settings(shipped("settings.ini"))
    try: w = windows(found, begin + timedelta(len(counts)), usual)
    except RecsysError: assert len(counts) - first < 4; return
    e, r = w.get("evaluation", dict(test_days=28, validation_days=28)), w.get("ranker", dict(snapshots=5, snapshot_gap_days=14))
    assert e["test_days"] + e["validation_days"] + r["snapshots"] * r["snapshot_gap_days"] + 1 <= len(counts) - first
    assert min(*e.values(), *r.values()) >= 1

@given(st.dictionaries(st.sampled_from(["impression", "view", "click", "add_to_cart", "purchase", "return", "search", "sniffed"]), st.integers(1, 100), min_size=1))
@few(max_examples=60, deadline=None)
def test_settings_for_any_kinds_of_events_are_valid(tmp_path_factory, types):
    file = tmp_path_factory.mktemp("s")/"settings.ini"
    file.write_text(with_values(USUAL, aims(types)))
    s = load_settings(file)
    assert s.ranker.gain()[s.data.target_event] == max(s.ranker.gain().values()) and any(p.split(":")[0].endswith(">" + s.data.target_event) for p in s.candidates.pairs)

def test_small_settings_are_valid(tmp_path):
    (tmp_path/"settings.ini").write_text(with_values(USUAL, SMALL))
    assert load_settings(tmp_path/"settings.ini").evaluation.test_days == 14

# ---- the command

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder of files, and what `recsys init` made of it."
    home = tmp_path_factory.mktemp("home")
    (home/"files").mkdir()
    rows = [{k: v for k, v in e.items() if k not in ("id", "visit")} for e in events(users=40, days=60)]
    rows += [rows[3], dict(rows[0], time="2999-01-01T00:00:00+00:00"), dict(rows[1], amount="cheap")]
    write_csv(home/"files"/"log.csv", rows)
    write_csv(home/"files"/"articles.csv", [dict(number=f"a{i}", name=f"Article {i}", group=f"Group {i % 4}") for i in range(60)])
    before = {p.name: file_digest(p) for p in (home/"files").iterdir()}
    return home, before, recsys(home, "init", "files")

def test_init_says_what_it_found_and_what_is_wrong(made):
    home, _, r = made
    assert r.returncode == 0, r.stderr
    for part in ("item_id is 'article'", "bought is purchase", "title is 'name'", "2024-01-01 to 2024-02-29, 60 days", "[evaluation] test_days =", "1 row set aside: price is not a number", "1 event like another one", "next: recsys run"): assert part in r.stdout, part
    assert "1 row set aside: ts lies in the future" in r.stdout and "without a zone" not in r.stdout, r.stdout

def test_init_only_reads_the_user_s_files(made):
    home, before, _ = made
    assert {p.name: file_digest(p) for p in (home/"files").iterdir()} == before
    assert sorted(p.name for p in home.iterdir()) == ["files", "files-recsys"]

def test_init_never_overwrites_without_being_told(made):
    home, _, _ = made
    mine = home/"files-recsys"/"shop.toml"
    mine.write_text(mine.read_text() + "# mine\n")
    r = recsys(home, "init", "files")
    assert r.returncode == 1 and "exist already" in r.stderr and "--overwrite" in r.stderr and len(r.stderr.strip().splitlines()) == 1
    assert mine.read_text().endswith("# mine\n")
    r = recsys(home, "init", "files", "--overwrite")
    assert r.returncode == 0 and "# mine" not in mine.read_text(), r.stderr

def test_the_next_command_goes_on_from_there(made):
    home, _, _ = made
    r = recsys(home/"files-recsys", "ingest")
    assert r.returncode == 0 and "ingest      unchanged, skipped" in r.stdout, r.stdout + r.stderr
    checks = json.loads(next((home/"files-recsys"/"data"/"steps").glob("validate-*/checks.json")).read_text())
    assert [c["name"] for c in checks if c["outcome"] == "fail"] == []

@pytest.mark.parametrize("args, parts", [(("nowhere",), ("no such folder", "nowhere")), (("files", "--into", "x", "--column", "colour=red"), ("--column", "ours are:")),
                                          (("files", "--into", "x", "--column", "item_id"), ("OURS=THEIRS",))])
def test_wrong_questions_get_one_line(made, args, parts):
    r = recsys(made[0], "init", *args)
    assert r.returncode == 1 and len(r.stderr.strip().splitlines()) == 1 and all(p in r.stderr for p in parts), r.stderr
    assert not (made[0]/"x").exists()

def test_a_stranger_at_a_terminal_is_asked(tmp_path):
    "Of a real terminal: what is proposed needs Enter alone, what is answered wrongly is asked again, and no cell of a file moves the cursor."
    import os, pty
    (tmp_path/"files").mkdir()
    write_csv(tmp_path/"files"/"log.csv", [dict(at=f"2026-01-{1 + n % 28:02}T{n % 24:02}:00:00", who_user=f"u{n % 5}", ref=f"\x1b[2Jx{n % 9}", act="seen") for n in range(400)])
    master, slave = pty.openpty()
    run = subprocess.Popen([COMMAND, "init", "files"], cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, env=os.environ | dict(TERM="dumb", COLUMNS="400"))
    os.close(slave)
    os.write(master, b"\nnonsense\nref\n\n2\n") # when: as proposed; which product; who: as proposed; what was done: the second, which is nothing in particular
    shown = b""
    try:
        while part := os.read(master, 1 << 16): shown += part
    except OSError: pass # how Linux says that the other end is closed
    os.close(master)
    text = shown.decode()
    assert run.wait(timeout=300) == 0 and "Enter for at" in text and "'nonsense' is none of them" in text and "(2026-01-01T00:00:00, 2026-01-02T01:00:00" in text, text
    assert "\x1b[2Jx" not in text.split("recognised")[0]
    assert tomllib.loads((tmp_path/"files-recsys"/"shop.toml").read_text())["events"]["columns"] == dict(ts="at", item_id="ref", user_id="who_user")

def test_a_folder_without_tables_is_refused(tmp_path):
    (tmp_path/"photos").mkdir(); (tmp_path/"photos"/"cat.jpg").write_bytes(b"\xff\xd8")
    r = recsys(tmp_path, "init", "photos")
    assert r.returncode == 1 and "no tables" in r.stderr and not (tmp_path/"photos-recsys").exists()

def test_files_of_a_day_end_in_what_is_in_demand(tmp_path):
    (tmp_path/"files").mkdir()
    write_csv(tmp_path/"files"/"log.csv", [dict(time=f"2026-01-01T10:{n % 60:02}:00", customer=f"u{n % 30}", article=f"a{n % 7}", action="bought") for n in range(300)])
    r = recsys(tmp_path, "init", "files", "--run")
    assert r.returncode == 0 and "four days are the least" in r.stdout and "what is in demand" in r.stdout and "a3" in r.stdout, r.stdout + r.stderr

@pytest.mark.bench
def test_from_files_to_a_first_list_in_one_command(tmp_path):
    (tmp_path/"files").mkdir()
    write_csv(tmp_path/"files"/"log.csv", events())
    r = recsys(tmp_path, "init", "files", "--run", timeout=900)
    assert r.returncode == 0 and "a list for c" in r.stdout and "model 2024" in r.stdout, r.stdout + r.stderr

@pytest.mark.bench
def test_a_log_of_strangers_gets_what_others_went_on_with(tmp_path):
    "Each session has an id of its own: nobody comes back, and no ranker can learn."
    (tmp_path/"files").mkdir()
    write_csv(tmp_path/"files"/"log.csv", [dict(time=e["time"], session=e["visit"], article=e["article"], action="seen") for e in events()])
    r = recsys(tmp_path, "init", "files", "--run", timeout=900)
    assert r.returncode == 0 and "no ranker can learn" in r.stdout and "what others went on with after" in r.stdout and "together" in r.stdout, r.stdout + r.stderr
    assert not (tmp_path/"files-recsys"/"data"/"bundles").exists()
