"The client: against the real service, and against servers and proxies on their worst days."
import json, socket, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from hypothesis import given, settings, strategies as st

from recsys.core.settings import RecsysError
from recsys.serving.client import AGAIN, Client, ServiceError, _wait, numbered
from recsys.serving.openapi import decoders_for, find_route
from test_serving import promote, publish, serving

# ---- a server that answers as it is told, and notes what it heard

@contextmanager
def server(*script):
    "Answers (status, body, headers) in turn, the last one for ever; None: hangs up; a number: sleeps so long first."
    heard, turns = [], iter(script)
    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
        def do_POST(self):
            said = SimpleNamespace(method=self.command, path=self.path, headers=dict(self.headers), port=self.client_address[1], body=self.rfile.read(int(self.headers.get("content-length") or 0)))
            heard.append(said)
            turn = next(turns, script[-1])
            if turn is None: self.close_connection = True; return
            if isinstance(turn, float): time.sleep(turn); turn = (200, {}, {})
            status, body, headers = turn
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for k, v in ({"content-length": str(len(data))} | headers).items(): self.send_header(k, v)
            self.end_headers(); self.wfile.write(data)
        do_GET = do_PUT = do_PATCH = do_DELETE = do_POST
        def log_message(self, *_): pass
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler); s.daemon_threads = True
    threading.Thread(target=s.serve_forever, args=(.01,), daemon=True).start()
    try: yield f"http://127.0.0.1:{s.server_port}", heard
    finally: s.shutdown(); s.server_close()

OK = (200, {"fine": 1}, {})
def error(status, code="busy", **headers): return status, {"error": {"code": code, "message": "sorry"}}, {k.replace("_", "-"): v for k, v in headers.items()}

# ---- the words

ids = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}"), min_size=1, max_size=30)
@pytest.fixture(scope="module")
def listener():
    with server(OK) as s: yield s

@settings(max_examples=60)
@given(id=ids)
def test_each_word_finds_its_route_and_its_body_is_read(listener, id):
    "As the service's own router and decoders see it; the server in front undoes the percent signs."
    url, heard = listener
    client, decoders = Client(url, key="k"), decoders_for(100)
    for name, ask, last in (("recommend", lambda: client.recommend(user_id=id, n=3), ""), ("rank", lambda: client.rank([id], cart=["a"]), ""), ("similar", lambda: client.similar(id, n=2), ""),
            ("explain", lambda: client.explain(id), id), ("events", lambda: client.events([dict(event_type="view", visitor_id=id, item_id="a")]), ""), ("put_item", lambda: client.put_item(id, stock=3), id),
            ("patch_item", lambda: client.patch_item(id, price=None), id), ("put_items", lambda: client.put_items([dict(item_id=id)]), ""), ("forget", lambda: client.forget(id), id)):
        assert ask() == {"fine": 1}
        route, found = find_route(heard[-1].method, unquote(heard[-1].path))
        assert (route.name, found) == (name, last) and heard[-1].headers["authorization"] == "Bearer k"
        assert heard[-1].path.count("/") <= 3, "a slash of an id is no slash of the path"
        if route.request: decoders[name].decode(heard[-1].body)

def test_a_connection_is_kept_by_each_thread():
    with server(OK) as (url, heard):
        client = Client(url)
        for _ in range(5): client.recommend()
        assert len({h.port for h in heard}) == 1 and "authorization" not in heard[0].headers
        with ThreadPoolExecutor(4) as pool: [*pool.map(lambda k: client.recommend(user_id=str(k)), range(200))]
        assert len({h.port for h in heard}) <= 5 and {json.loads(h.body).get("user_id") for h in heard} == {None, *map(str, range(200))}

# ---- bad days

@pytest.mark.parametrize("trouble", [None, error(503), error(429), error(502), (504, b"<html>", {})])
def test_what_may_help_is_tried_again_with_the_same_event_ids(trouble):
    with server(trouble, trouble, OK) as (url, heard):
        assert Client(url).events([dict(event_type="view"), dict(event_id="mine")]) == {"fine": 1}
    sent = [json.loads(h.body)["events"] for h in heard]
    assert len(sent) == 3 and sent[0] == sent[1] == sent[2] and sent[0][1]["event_id"] == "mine" and len(sent[0][0]["event_id"]) == 32

@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 415, 500])
def test_what_would_not_help_is_not(status):
    with server(error(status, "no_good")) as (url, heard):
        with pytest.raises(ServiceError, match="sorry") as e: Client(url).recommend()
    assert len(heard) == 1 and (e.value.status, e.value.code) == (status, "no_good") and status not in AGAIN and f"POST {url}/v1/recommend" in str(e.value)

def test_tries_end():
    with server(error(503)) as (url, heard):
        with pytest.raises(ServiceError) as e: Client(url, retries=2).recommend()
    assert len(heard) == 3 and e.value.status == 503

def test_what_the_service_asks_for_is_waited():
    with server(error(429, retry_after="1"), OK) as (url, heard):
        start = time.monotonic(); Client(url).recommend()
        assert time.monotonic() - start >= 1
    assert _wait(1, "99999") == 10 and all(.05 * 2 ** (n - 1) <= _wait(n, w) <= .05 * 2 ** n for n in (1, 2, 5) for w in (None, "soon", "-3", "0"))

def test_a_connection_that_was_closed_meanwhile_is_made_again():
    "The server closes after each answer without saying so."
    with server(OK, None, OK, None, OK) as (url, heard):
        client = Client(url)
        for _ in range(3): assert client.recommend() == {"fine": 1}
    assert len(heard) == 5

def test_a_server_that_sleeps_and_one_that_is_not_there():
    with server(3., OK) as (url, heard):
        client = Client(url, timeout=1.)
        assert client.recommend() == {"fine": 1} and len(heard) == 2, "the late answer to the first is not taken for that of the second"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); free = s.getsockname()[1]
    for url in (f"http://127.0.0.1:{free}", "http://no.such.host.invalid"):
        with pytest.raises(ServiceError, match="no answer") as e: Client(url, retries=1, timeout=.5).recommend()
        assert e.value.status == 0 and "\n" not in str(e.value)

@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "x"}', b'{"error": {}}', b"\xff", b"null"])
def test_whatever_a_proxy_says_is_one_line(body):
    with server((403, body, {})) as (url, _), pytest.raises(ServiceError) as e: Client(url).recommend()
    assert e.value.status == 403 and e.value.code == "not_json"
    with server((200, b"<html>\n", {})) as (url, _), pytest.raises(ServiceError, match="not JSON"): Client(url).recommend()

def test_a_message_with_line_ends_stays_on_one():
    with server((400, {"error": {"code": "c", "message": "two\nlines\x1b[31m"}}, {})) as (url, _), pytest.raises(ServiceError) as e: Client(url).recommend()
    assert "\n" not in str(e.value) and "\x1b" not in str(e.value)

@pytest.mark.parametrize("url", ["", "shop", "shop:80", "ftp://shop", "http://", "http://shop/v1", "http://shop:x", "http://[::1", "file:///etc/passwd"])
def test_what_is_no_address_is_said_at_once(url):
    with pytest.raises(RecsysError, match="not the address"): Client(url)

def test_a_shop_s_own_numbers_stay():
    event = dict(event_type="view", event_id="e", ts="2026-01-01T00:00:00Z")
    assert numbered(event) == event and {*numbered({})} == {"event_id", "ts"} and numbered({})["ts"].endswith("+00:00")

# ---- the real service

def test_the_real_service_answers(tmp_path):
    publish(tmp_path); promote(tmp_path/"bundles", "v1")
    with serving(tmp_path) as (_, port):
        client = Client(f"http://127.0.0.1:{port}/")
        answer = client.recommend(user_id="u3", n=4)
        assert len(answer["items"]) == 4 and answer["model_version"] == "v1"
        with pytest.raises(ServiceError, match="n") as e: client.recommend(n=0)
        assert (e.value.status, e.value.code) == (400, "invalid_request")
