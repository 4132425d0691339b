"Keys: who has none gets nothing, who has one gets no more than it says, and a slip of the editor locks nobody out."
import json, logging, os, tomllib
from hashlib import sha256

import pytest
from hypothesis import given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.operations.cli import main
from recsys.serving.keys import OPEN, SCOPES, SECURE_HEADERS, Key, Keys, audit, authorize, check_exposure, is_ours, new_key, read_keys
from recsys.serving.refused import Refused

def write(path, text, mode=0o600):
    path.write_text(text); path.chmod(mode)
    return path

def bearer(key): return {"authorization": f"Bearer {key}"}

def refused(keys, headers, scope="read", now=1.):
    with pytest.raises(Refused) as e: authorize(keys, headers, scope, now)
    return e.value

@pytest.fixture
def shop(tmp_path):
    "(file, {name: key})"
    made = {name: new_key(name, scopes, rate) for name, scopes, rate in (("shop", ["read", "write"], 10), ("ops", ["admin"], None))}
    return write(tmp_path/"keys.toml", "\n".join(lines for _, lines in made.values())), {n: k for n, (k, _) in made.items()}

# ---- the file

def test_a_new_key_is_new_and_only_its_digest_is_written():
    (a, lines), (b, _) = new_key("web", ["read"], 2.5), new_key("web", ["read"])
    entry, = tomllib.loads(lines)["key"]
    assert a != b and a not in lines and a[7:] not in lines and len(a) == 50
    assert entry == dict(name="web", scopes=["read"], rate=2.5, sha256=sha256(a.encode()).hexdigest())

@pytest.mark.parametrize("rate", [1e6, 1234567.5, 0.125, 3])
def test_the_rate_is_written_as_it_was_given(rate, tmp_path):
    assert read_keys(write(tmp_path/"k", new_key("web", ["read"], rate)[1]))[0].rate == rate

@pytest.mark.parametrize("name,scopes,rate", [('a"b', ["read"], None), ("", ["read"], None), ("a\nb", ["read"], None), ("a\n", ["read"], None), ("a", [], None),
                                              ("a", ["root"], None), ("a", ["read"], 0), ("a", ["read"], float("nan")), ("x" * 61, ["read"], None)])
def test_a_key_that_could_not_be_read_back_is_not_made(name, scopes, rate):
    with pytest.raises(RecsysError): new_key(name, scopes, rate)

D = sha256(b"x").hexdigest()
@pytest.mark.parametrize("text,what", [("", "key"), ("key = []", "length >= 1"), ("[[key]", "array"), ('[[key]]\nname = "a"', "scopes"), ("[[key]]\nname = 7", "str"),
    (f'[[key]]\nname = "a"\nscopes = ["read"]\nsha256 = "{D[1:]}"', "sha256"), (f'[[key]]\nname = "a"\nscopes = ["all"]\nsha256 = "{D}"', "all"),
    (f'[[key]]\nname = "a"\nscopes = ["read"]\nsha256 = "{D}"\nkey = "secret"', "unknown field"), (f'[[key]]\nname = "a"\nscopes = ["read"]\nsha256 = "{D}"\nrate = -1', "rate"),
    ("\n".join(f'[[key]]\nname = "{n}"\nscopes = ["read"]\nsha256 = "{D}"' for n in "ab"), "same sha256"),
    ("\n".join(f'[[key]]\nname = "a"\nscopes = ["read"]\nsha256 = "{sha256(s).hexdigest()}"' for s in (b"1", b"2")), "same name")])
def test_a_wrong_file_is_refused_on_one_line(tmp_path, text, what):
    with pytest.raises(RecsysError, match=what) as e: read_keys(write(tmp_path/"k", text))
    assert "\n" not in str(e.value) and str(tmp_path/"k") in str(e.value)

@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o644, 0o777])
def test_a_file_that_others_may_use_is_refused(shop, mode):
    shop[0].chmod(mode)
    with pytest.raises(RecsysError, match="every account"): read_keys(shop[0])
    with pytest.raises(RecsysError, match="every account"): Keys(shop[0], 100, 1)

def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path/"none", tmp_path):
        with pytest.raises(RecsysError, match="cannot be read"): read_keys(path)
    (tmp_path/"k").write_bytes(b"\xff\xfe"); (tmp_path/"k").chmod(0o600)
    with pytest.raises(RecsysError, match="k"): read_keys(tmp_path/"k")

# ---- requests

def test_each_key_opens_what_it_says_and_nothing_else(shop):
    file, made = shop
    keys = Keys(file, 100, 1)
    for name, scopes in (("shop", {"read", "write"}), ("ops", {"admin"})):
        for scope in SCOPES:
            if scope in scopes: assert authorize(keys, bearer(made[name]), scope, 1.).name == name
            else: assert (e := refused(keys, bearer(made[name]), scope)).status == 403 and e.code == "forbidden"

odd = st.one_of(st.text(max_size=80), st.sampled_from(["Bearer", "Bearer ", "bearer x", "Basic dXNlcjpwYXNz", "Bearer \ud800", "Bearer \x00"]), st.text(max_size=60).map("Bearer {}".format))

@settings(max_examples=300)
@given(said=odd, scope=st.sampled_from(SCOPES))
def test_whatever_else_is_sent_opens_nothing(said, scope):
    keys = Keys(None, 100, 1); keys.known = {}; keys.next_look = float("inf")
    key = Key("real", SCOPES, sha256(b"recsys_real").digest(), 1e6); keys.known[key.digest] = key
    e = refused(keys, {"authorization": said}, scope)
    assert e.status == 401 and e.headers["www-authenticate"] == "Bearer" and (len(said) < 12 or said[8:] not in e.message)

def test_parts_of_a_key_and_its_digest_open_nothing(shop):
    file, made = shop
    keys, key = Keys(file, 100, 1), made["shop"]
    for wrong in (key[:-1], key + "x", key.upper(), sha256(key.encode()).hexdigest(), key[7:]): assert refused(keys, bearer(wrong)).status == 401
    assert refused(keys, {}).status == refused(keys, {"authorization": key}).status == 401
    assert authorize(keys, {"authorization": f"bEARER  {key} "}, "read", 1.).name == "shop"

def test_a_digest_that_only_looks_alike_opens_nothing(shop):
    "If the look-up ever found the wrong key, the comparison would still refuse."
    file, made = shop
    keys = Keys(file, 100, 1)
    class Lenient(dict):
        def get(self, _): return next(iter(self.values()))
    keys.known, keys.next_look = Lenient(keys.known), float("inf")
    assert refused(keys, bearer("guess")).status == 401

def test_without_keys_everything_is_open(): assert authorize(Keys(None, 100, 1), {}, "admin", 1.) is OPEN

# ---- how often

@settings(max_examples=200)
@given(rate=st.floats(.1, 50), gaps=st.lists(st.floats(0, 2), min_size=1, max_size=200))
def test_never_more_than_a_second_s_worth_and_the_rate(rate, gaps):
    "In every window the requests granted are at most the bucket and what flowed back; one who comes when told is granted."
    key, now, granted = Key("k", ["read"], b"", rate), 1000., []
    for gap in gaps:
        now += gap
        if not (wait := key.take(now)): granted.append(now)
        else: assert 0 < wait <= 1 / rate + 1e-9
    for i, start in enumerate(granted):
        for n, end in enumerate(granted[i:], 1): assert n <= max(1, rate) + rate * (end - start) + 1e-6
    if wait: assert key.take(now + wait + 1e-6) == 0

def test_a_clock_that_goes_back_grants_nothing_and_locks_nobody_out():
    key = Key("k", ["read"], b"", 1)
    assert key.take(100.) == 0 and key.take(50.) > 0 and key.take(50.5) > 0 and key.take(51.) == 0

def test_too_often_is_429_and_shared_out_over_workers(shop):
    file, made = shop
    for workers, most in ((1, 10), (2, 5)):
        keys = Keys(file, 100, workers)
        for _ in range(most): authorize(keys, bearer(made["shop"]), "read", 5.)
        e = refused(keys, bearer(made["shop"]), now=5.)
        assert (e.status, e.code, e.headers["retry-after"]) == (429, "too_many_requests", "1")
        assert authorize(keys, bearer(made["ops"]), "admin", 5.).rate == 100 / workers, "another key has a bucket of its own, and the usual rate"
        authorize(keys, bearer(made["shop"]), "read", 6.)

def test_a_key_without_the_scope_pays_too(shop):
    keys = Keys(shop[0], 100, 1)
    assert [refused(keys, bearer(shop[1]["shop"]), "admin").status for _ in range(11)] == [403] * 10 + [429]

# ---- while the service runs

def test_keys_change_while_the_service_runs(shop, tmp_path, caplog):
    file, made = shop
    keys = Keys(file, 100, 1)
    for _ in range(10): authorize(keys, bearer(made["shop"]), "read", 1.)
    new, lines = new_key("new", ["read"])
    write(tmp_path/"next", file.read_text() + lines); os.replace(tmp_path/"next", file)
    assert refused(keys, bearer(new), now=1.5).status == 401, "not looked at more than once a second"
    assert authorize(keys, bearer(new), "read", 2.01).name == "new"
    kept = keys.known[sha256(made["shop"].encode()).digest()]
    assert kept.left < 1.1, "an old key does not get a full bucket from a new file"
    write(file, lines)
    assert refused(keys, bearer(made["shop"]), now=3.1).status == 401, "a key that was removed"

@pytest.mark.parametrize("slip", [lambda f: f.write_text("[[key]"), lambda f: f.unlink(), lambda f: f.chmod(0o644), lambda f: f.write_text("")])
def test_a_slip_changes_nothing_and_is_said_once(shop, slip, caplog):
    file, made = shop
    keys = Keys(file, 100, 1)
    good = file.read_text()
    slip(file)
    for now in (2., 4., 6.): assert authorize(keys, bearer(made["ops"]), "admin", now).name == "ops"
    assert len(caplog.records) == 1 and "stay as they were" in caplog.text
    write(file, good + new_key("late", ["read"])[1])
    authorize(keys, bearer(made["ops"]), "admin", 8.)
    assert len(keys.known) == 3

# ---- doors, audit, headers

@pytest.mark.parametrize("host", ["", "example.com", "example.com:8080", "localhost.example.com", "127.0.0.1.nip.io", "10.0.0.1", "[::2]:80", "0", "2130706433", "127.1", "a b", "\xe9", "[", "]:1", "::1:80:"])
def test_a_page_of_another_name_is_not_answered_without_keys(host): assert not is_ours(host)

@pytest.mark.parametrize("host", [None, "localhost", "Localhost:1", "a.localhost", "localhost.", "127.0.0.1", "127.0.0.2:9", "[::1]", "[::1]:9"])
def test_this_machine_is(host): assert is_ours(host)

def test_no_keys_no_door_to_the_street(tmp_path):
    for host in ("127.0.0.1", "::1", "127.8.9.10", "localhost"): check_exposure(host, None)
    for host in ("0.0.0.0", "::", "203.0.113.7", "10.0.0.1"):
        with pytest.raises(RecsysError, match="no keys"): check_exposure(host, "")
        check_exposure(host, tmp_path/"keys.toml")
    with pytest.raises(RecsysError, match="no such address"): check_exposure("no.such.host.invalid", None)

def test_an_audit_line_is_json_on_one_line(caplog):
    caplog.set_level(logging.INFO, "recsys.audit")
    audit(OPEN, "DELETE", "/v1/users/a\n{}\"", 200, "r-1"); audit(None, "PUT", "/v1/items/" + "x" * 5000, 401, "r-2")
    for record, want in zip(caplog.records, (("nobody", 200, "r-1"), ("", 401, "r-2"))):
        line = json.loads(record.getMessage())
        assert (line["key"], line["status"], line["request_id"]) == want and "\n" not in record.getMessage() and len(line["audit"]) < 700

def test_headers(): assert SECURE_HEADERS["x-content-type-options"] == "nosniff" and "none" in SECURE_HEADERS["content-security-policy"] and not any(set("\r\n") & set(v) for v in SECURE_HEADERS.values())

def test_the_command_shows_a_key_that_works(tmp_path, capsys):
    assert main(["keys", "new", "web shop", "--scopes", "read, write", "--rate", "3"]) == 0
    said = capsys.readouterr().out
    key, lines = said.splitlines()[1], said[said.index("[[key]]"):]
    keys = Keys(write(tmp_path/"k", lines), 100, 1)
    assert authorize(keys, bearer(key), "write", 1.).rate == 3 and key not in lines
    for wrong in (["--scopes", "all"], ["--scopes", ""], ["--rate", "0"], ["--rate", "nan"]):
        assert main(["keys", "new", "x", *wrong]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("recsys: new key: ") and err.count("\n") == 1
