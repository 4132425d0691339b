"Alerts through a real web server and a real mail server: told once, signed, kept while nobody listens, and answered."
import json, math, os, random, shutil, signal, socket, ssl, subprocess, sys, time
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import msgspec
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from hypothesis import given, settings as hypothesis_settings, strategies as st

from recsys.core.files import read_journal
from recsys.core.settings import RecsysError, load_settings
from recsys.operations.alerts import (ANSWERS, Alert, alerts_file, answer, cases_of, close_gone, deliver, later, listing, notice_of, raise_alert, read_cases, signature,
                                      tend, words)

T = datetime(2026, 3, 2, 5, tzinfo=timezone.utc)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)

def shop(folder, **alerts):
    s = load_settings()
    plain = dict(webhook="", smtp_host="", send_from="warning", tries=1, timeout_seconds=2., email_from="recsys@shop.example", email_to=("team@shop.example",), email_escalate=("lead@shop.example",))
    return msgspec.structs.replace(s, paths=msgspec.structs.replace(s.paths, data=str(folder/"data")), alerts=msgspec.structs.replace(s.alerts, **plain | alerts))

def alert(key="data:price", severity="warning", day="2026-03-02", **more): return Alert(key, severity, f"{key} moved", "look at it", day=day, source="decisions", **more)

# ---- a web server

class Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["content-length"]))
        how = server.status
        if how == "hang": time.sleep(5); return
        if how == "drop": self.connection.close(); return
        if how < 300: server.got.append((dict(self.headers), body))
        self.send_response(how)
        if how == 302: self.send_header("location", f"http://127.0.0.1:{server.server_port}/elsewhere")
        self.end_headers()
    def do_GET(self): self.server.got.append("GET"); self.send_response(200); self.end_headers()
    def log_message(self, *_): pass

@pytest.fixture
def hook():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.got, server.status, server.url = [], 200, f"http://127.0.0.1:{server.server_port}/alerts"
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(); server.server_close()

def told(hook): return [json.loads(b) for _, b in hook.got]

def test_a_webhook_is_told_once_and_can_check_who_says_it(hook, tmp_path):
    s = shop(tmp_path, webhook=hook.url, webhook_secret="between us")
    c = raise_alert(s, alert(evidence="runs/2026-03-02/drift.html"), T)
    assert deliver(s, T) == dict(sent=1, wait=0) and deliver(s, T) == dict(sent=0, wait=0)
    for k in range(1, 5): raise_alert(s, alert(day=f"2026-03-0{2 + k}"), T + k*HOUR); deliver(s, T + k*HOUR)
    (headers, body), = hook.got
    assert headers["X-Recsys-Signature"] == signature("between us", headers["X-Recsys-Timestamp"], body) != signature("guessed", headers["X-Recsys-Timestamp"], body)
    assert headers["Idempotency-Key"] == f"{c.id}-1" and headers["Content-Type"] == "application/json" and abs(time.time() - int(headers["X-Recsys-Timestamp"])) < 60
    assert {k: json.loads(body)[k] for k in ("act", "severity", "key", "todo", "evidence", "owner")} == dict(act="raised", severity="warning", key="data:price", todo="look at it",
        evidence="runs/2026-03-02/drift.html", owner=s.alerts.owner)

def test_a_warning_is_listed_and_sent_only_if_it_gets_worse_unless_all_are_wanted(hook, tmp_path):
    s = shop(tmp_path, webhook=hook.url, send_from="critical")
    for k in range(3): raise_alert(s, alert(f"data:c{k}"), T)
    assert deliver(s, T) == dict(sent=0, wait=0) and len(listing(s, now=T)) == 3 and {r["unsent"] for r in listing(s, now=T)} == {0}
    raise_alert(s, alert("data:c1", "critical"), T + HOUR)
    assert deliver(s, T + HOUR) == dict(sent=1, wait=0) and [(t["key"], t["act"]) for t in told(hook)] == [("data:c1", "worse")]
    raise_alert(s, alert("data:c2", asks=True), T + 2*HOUR)
    assert deliver(s, T + 2*HOUR) == dict(sent=1, wait=0), "what asks is sent, whatever its severity"

def test_without_a_secret_nothing_is_signed(hook, tmp_path):
    s = shop(tmp_path, webhook=hook.url)
    raise_alert(s, alert(), T); deliver(s, T)
    assert "X-Recsys-Signature" not in hook.got[0][0]

@pytest.mark.parametrize("status", [500, 503, 429, 404, 302, "hang", "drop"])
def test_what_the_webhook_did_not_take_is_kept_and_sent_later(hook, tmp_path, status):
    s = shop(tmp_path, webhook=hook.url, timeout_seconds=.3)
    hook.status = status
    for k in range(5): raise_alert(s, alert(f"data:c{k}"), T)
    began = time.monotonic()
    assert deliver(s, T) == dict(sent=0, wait=5) and hook.got == []
    assert time.monotonic() - began < 3, "a dead server costs its time once, not for every alert"
    assert {r["unsent"] for r in listing(s, now=T)} == {1} and any(r["trouble"] for r in listing(s, now=T))
    close_gone(s, "decisions", {"data:c1", "data:c2", "data:c3", "data:c4"}, T + HOUR)  # gone meanwhile: it is told all the same
    hook.status = 204
    assert deliver(s, T + 2*HOUR) == dict(sent=5, wait=0)
    assert sorted(t["key"] for t in told(hook)) == [f"data:c{k}" for k in range(5)] and deliver(s, T + 3*HOUR)["sent"] == 0
    assert [bool(t["closed"]) for t in told(hook)] == [True] + [False] * 4

def test_nobody_listens_at_all(tmp_path):
    s = shop(tmp_path, webhook="http://127.0.0.1:9/", smtp_host="127.0.0.1", smtp_port=9, smtp_security="none")
    raise_alert(s, alert(), T)
    assert deliver(s, T) == dict(sent=0, wait=2) and listing(s, now=T)[0]["unsent"] == 2

# ---- a mail server

class Inbox:
    def __init__(self): self.got, self.refuse = [], ""
    async def handle_DATA(self, server, session, envelope):
        if self.refuse: return self.refuse
        self.got.append((envelope.mail_from, envelope.rcpt_tos, envelope.content.decode()))
        return "250 OK"

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    "A certificate for this machine that nobody trusts by himself."
    folder = tmp_path_factory.mktemp("tls")
    if not shutil.which("openssl"): pytest.skip("there is no openssl to make a certificate with")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                    "-keyout", folder/"key.pem", "-out", folder/"cert.pem"], check=True, capture_output=True)
    return folder

def mail_server(inbox, **how):
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    c = Controller(inbox, hostname="127.0.0.1", port=port, **how)
    c.start()
    return c, port

@pytest.fixture
def mail():
    inbox = Inbox()
    c, port = mail_server(inbox)
    yield SimpleNamespace(inbox=inbox, settings=dict(smtp_host="127.0.0.1", smtp_port=port, smtp_security="none"))
    c.stop()

def test_a_letter_says_what_to_do_and_whom_it_is_for(mail, tmp_path):
    s = shop(tmp_path, **mail.settings)
    nasty = Alert("data:x", "critical", "moved\nBcc: all@shop.example\r\n\r\nfree", "look — at “it”", day="2026-03-02", source="decisions")
    c = raise_alert(s, nasty, T)
    assert deliver(s, T) == dict(sent=1, wait=0)
    (sender, to, text), = mail.inbox.got
    assert (sender, to) == ("recsys@shop.example", ["team@shop.example"]) and f"Message-ID: <{c.id}-1@recsys.invalid>" in text
    head = text.replace("\r\n", "\n").split("\n\n")[0]
    assert not [l for l in head.splitlines() if l.lower().startswith("bcc")], "nothing of the text becomes a header"

def test_letters_wait_while_the_mail_server_refuses(mail, tmp_path):
    s = shop(tmp_path, **mail.settings)
    mail.inbox.refuse = "451 try later"
    for k in range(3): raise_alert(s, alert(f"data:c{k}"), T)
    assert deliver(s, T) == dict(sent=0, wait=3)
    mail.inbox.refuse = ""
    assert deliver(s, T + HOUR) == dict(sent=3, wait=0) and len(mail.inbox.got) == 3

def test_one_channel_that_is_down_does_not_hold_the_other(mail, hook, tmp_path):
    s = shop(tmp_path, webhook=hook.url, **mail.settings)
    hook.status = 500
    for k in range(3): raise_alert(s, alert(f"data:c{k}"), T)
    assert deliver(s, T) == dict(sent=3, wait=3) and len(mail.inbox.got) == 3
    hook.status = 200
    assert deliver(s, T + HOUR) == dict(sent=3, wait=0) and len(mail.inbox.got) == 3 and len(hook.got) == 3

@pytest.mark.filterwarnings("ignore:Requiring AUTH")  # implicit TLS is TLS
@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_letter_goes_encrypted_with_a_login_to_a_server_that_is_who_it_says(certificate, tmp_path, monkeypatch, security):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH); context.load_cert_chain(certificate/"cert.pem", certificate/"key.pem")
    known, inbox = [], Inbox()
    def login(server, session, envelope, mechanism, auth):
        known.append((auth.login.decode(), auth.password.decode()))
        return AuthResult(success=known[-1] == ("recsys", "geheim"))
    how = dict(ssl_context=context) if security == "tls" else dict(tls_context=context, require_starttls=True)
    c, port = mail_server(inbox, authenticator=login, auth_required=True, auth_require_tls=security == "starttls", **how)
    try:
        named = dict(smtp_host="localhost", smtp_port=port, smtp_security=security, smtp_user="recsys")
        s = shop(tmp_path, **named, smtp_password="geheim")
        raise_alert(s, alert(), T)
        assert deliver(s, T) == dict(sent=0, wait=1) and "certificate" in listing(s, now=T)[0]["trouble"].lower() and not known  # nobody vouches for it: no password is given away
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate/"cert.pem"))
        assert deliver(shop(tmp_path, **named, smtp_password="wrong"), T) == dict(sent=0, wait=1) and inbox.got == []
        assert deliver(s, T) == dict(sent=1, wait=0) and len(inbox.got) == 1 and known[-1] == ("recsys", "geheim")
    finally: c.stop()

def test_no_password_stands_in_the_journal_or_in_a_message(mail, tmp_path):
    s = shop(tmp_path, webhook="http://127.0.0.1:9/", webhook_secret="sesame", smtp_password="geheim", **mail.settings)
    raise_alert(s, alert(), T); deliver(s, T)
    text = alerts_file(s).read_text() + mail.inbox.got[0][2]
    assert "sesame" not in text and "geheim" not in text

# ---- answers and time

def test_escalated_once_when_nobody_answers_and_never_when_somebody_did(hook, mail, tmp_path):
    s = shop(tmp_path, webhook=hook.url, **mail.settings)
    a, b, c = (raise_alert(s, alert(f"data:c{k}"), T) for k in range(3))
    answer(s, b.id, "acknowledged", by="Ada", now=T + HOUR); answer(s, c.id, "snoozed", by="Ada", until=later(30, T), now=T + HOUR)
    for h in range(0, 50): deliver(s, T + h*HOUR)
    acts = [(t["key"], t["act"]) for t in told(hook)]
    assert acts == [("data:c0", "raised"), ("data:c1", "raised"), ("data:c2", "raised"), ("data:c0", "escalated"), ("data:c2", "woken")]
    assert [to for _, to, text in mail.inbox.got if "nobody answered" in text] == [["lead@shop.example"]]
    assert told(hook)[3]["to"] == s.alerts.escalate_to

def test_one_that_was_escalated_and_snoozed_is_escalated_again_when_nobody_answers_after_it_woke(hook, mail, tmp_path):
    s = shop(tmp_path, webhook=hook.url, **mail.settings)
    a, due = raise_alert(s, alert(), T), s.alerts.escalate_hours
    tend(s, T + due * HOUR); answer(s, a.id, "snoozed", by="Ada", until=later(10, T + due * HOUR), now=T + due * HOUR)
    for h in range(1, 3 * int(due) + 12): tend(s, T + (due + h) * HOUR)
    assert [n.act for n in read_cases(s)[a.id].notices] == ["raised", "escalated", "woken", "escalated"]

def test_a_worse_one_is_a_new_question_and_a_flickering_one_is_not(hook, tmp_path):
    s = shop(tmp_path, webhook=hook.url)
    c = raise_alert(s, alert(), T); answer(s, c.id, "approved", by="Ada", now=T)
    assert words(s, T) == {"data:price": ("approved", "warning", math.inf)}
    raise_alert(s, alert(severity="critical"), T + HOUR)
    assert words(s, T + HOUR) == {} and read_cases(s)[c.id].state(T + HOUR) == "open"
    answer(s, c.id, "vetoed", by="Ada", now=T + HOUR)
    for k in range(2, 12):  # comes and goes, now a warning, now critical
        close_gone(s, "decisions", set(), T + k*HOUR)
        raise_alert(s, alert(severity="warning" if k % 2 else "critical"), T + (k + .5)*HOUR)
    deliver(s, T + 12*HOUR)
    assert [t["act"] for t in told(hook)] == ["raised", "worse"] and words(s, T + 12*HOUR) == {"data:price": ("vetoed", "critical", math.inf)}
    close_gone(s, "decisions", set(), T + 13*HOUR)
    again = raise_alert(s, alert(), T + 13*HOUR + timedelta(hours=s.alerts.reopen_hours + 1))
    assert again.id != c.id and words(s, T + 14*DAY) == {}

def test_an_answer_holds_up_to_twice_the_size_that_it_was_given_to(hook, tmp_path):
    s = shop(tmp_path, webhook=hook.url)
    c = raise_alert(s, alert(severity="critical", size=.05), T); answer(s, c.id, "approved", by="Ada", now=T)
    for k, size in enumerate((.07, .09, .1), 1): raise_alert(s, alert(severity="critical", size=size, day=f"2026-03-0{2 + k}"), T + k*DAY)  # it creeps
    assert words(s, T + 3*DAY) == {"data:price": ("approved", "critical", .1)}
    close_gone(s, "decisions", set(), T + 3*DAY)
    raise_alert(s, alert(severity="critical", size=.11, day="2026-03-06"), T + 3*DAY + HOUR)
    deliver(s, T + 4*DAY)
    assert words(s, T + 4*DAY) == {} and read_cases(s)[c.id].state(T + 4*DAY) == "open" and [t["act"] for t in told(hook)] == ["raised", "worse"]
    answer(s, c.id, "labelled", "false a feed of another shop", by="Ada", now=T + 4*DAY)
    assert words(s, T + 4*DAY) == {"data:price": ("false", "critical", .22)}

def test_only_its_own_alerts_are_closed(tmp_path):
    s = shop(tmp_path)
    raise_alert(s, alert(), T); raise_alert(s, Alert("release:v2", "warning", "v2 waits", "approve it", source="registry"), T)
    assert [c.alert.key for c in close_gone(s, "decisions", set(), T)] == ["data:price"] and [r["key"] for r in listing(s, now=T)] == ["release:v2"]

@pytest.mark.parametrize("id,act,why,said", [("zz", "approved", "", "no such alert"), ("", "approved", "", "no such alert"), ("ok", "blessed", "", "no answer"), ("ok", "labelled", "perhaps", "neither true nor false")])
def test_an_answer_that_makes_no_sense_changes_nothing(tmp_path, id, act, why, said):
    s = shop(tmp_path)
    c = raise_alert(s, alert(), T); before = read_journal(alerts_file(s))
    with pytest.raises(RecsysError, match=said): answer(s, c.id if id == "ok" else id, act, why, "Ada", now=T)
    assert read_journal(alerts_file(s)) == before

acts = st.lists(st.tuples(st.sampled_from(["raise", "worse", "gone", *ANSWERS, "snoozed", "tend"]), st.integers(0, 2), st.integers(0, 60)), max_size=40)

@given(acts)
@hypothesis_settings(max_examples=60)
def test_whatever_happens_one_alert_is_open_for_a_key_and_notices_are_few(tmp_path_factory, steps):
    s, now = shop(tmp_path_factory.mktemp("play"), webhook="http://127.0.0.1:9/"), T
    for what, k, hours in steps:
        now += hours * HOUR
        mine = [c for c in read_cases(s).values() if c.alert.key == f"data:c{k}" and not c.closed]
        if what in ("raise", "worse"): raise_alert(s, alert(f"data:c{k}", "critical" if what == "worse" else "warning", now.date().isoformat()), now)
        elif what == "gone": close_gone(s, "decisions", {f"data:c{j}" for j in range(3) if j != k}, now)
        elif what == "tend": tend(s, now)
        elif mine: answer(s, mine[0].id, what, by="Ada", until=later(24, now) if what == "snoozed" else "", now=now)
    cases = read_cases(s)
    keys = [c.alert.key for c in cases.values() if not c.closed]
    assert len(keys) == len(set(keys))
    for c in cases.values():
        told_of = [a.act for a in c.notices]
        assert told_of[0] == "raised" and told_of.count("worse") <= 1 and told_of.count("escalated") <= 1 + told_of.count("worse") + told_of.count("woken")
        assert c.state(now) in ("open", "acknowledged", "snoozed", "closed", "approved", "vetoed")
    assert cases_of(read_journal(alerts_file(s))) == cases

# ---- kills

SENDER = """if 1:
    import sys, logging
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    from test_alerts import T, alert, shop
    from recsys.operations.alerts import deliver, raise_alert
    logging.disable(logging.CRITICAL)
    s = shop(Path(sys.argv[1]), webhook=sys.argv[2])
    print("go", flush=True)
    for k in range(30): raise_alert(s, alert(f"data:c{k}"), T); deliver(s, T)"""

def test_killed_while_sending_it_loses_nothing_and_repeats_are_known_as_such(hook, tmp_path):
    for k in range(4):
        p = subprocess.Popen([sys.executable, "-c", SENDER, str(tmp_path), hook.url, os.path.dirname(__file__)], stdout=subprocess.PIPE)
        p.stdout.readline(); time.sleep(random.Random(k).uniform(.005, .1)); p.send_signal(signal.SIGKILL); p.wait()
    s = shop(tmp_path, webhook=hook.url)
    for k in range(30): raise_alert(s, alert(f"data:c{k}"), T)
    deliver(s, T)
    keys = [h["Idempotency-Key"] for h, _ in hook.got]
    assert {t["key"] for t in told(hook)} == {f"data:c{k}" for k in range(30)} and len(set(keys)) == 30
    assert len(keys) <= 34, "at most one is sent twice for each kill"
