"The whole service in its own processes: what happens shapes the next list, nothing that was promised is lost, and nothing that breaks is seen."
import http.client, json, os, shutil, signal, subprocess, threading, time, uuid
from contextlib import suppress
from datetime import datetime, timezone
from types import SimpleNamespace

import numpy as np
import pytest

from recsys.core.settings import RecsysError
from recsys.data.log import EventLog, tail_log
from recsys.serving.bundle import open_bundle, promote
from recsys.serving.engine import Engine, Request, recommend
from recsys.serving.keys import new_key
from recsys.serving.service import Pressure
from recsys.serving.refused import Refused
from test_state import REDIS, Server
from shop import until
from test_serving import BUDGET, N_ITEMS, PER_SOURCE, ask, publish, serving, tables, workers_of

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    publish(folder); publish(folder, "v2", tables(seed=7)); promote(folder/"bundles", "v1")
    return folder

@pytest.fixture(scope="module")
def server(shop):
    with serving(shop, features_one_in=1) as (process, port): yield SimpleNamespace(process=process, port=port, folder=shop)

@pytest.fixture(scope="module")
def engines(shop):
    def of(version):
        b = open_bundle(shop/"bundles"/version)
        return Engine(b.state, b.ranker, PER_SOURCE, BUDGET, b)
    return {v: of(v) for v in ("v1", "v2")}

def copied(shop, tmp_path):
    "The shop's bundles without what happened there."
    return shutil.copytree(shop, tmp_path/"shop", symlinks=True, ignore=shutil.ignore_patterns("data"))

def event(kind, visitor, item, **more): return dict(event_id=uuid.uuid4().hex, event_type=kind, visitor_id=visitor, item_id=item, **more)
def post(port, *events, **how): return ask(port, path="/v1/events", body=dict(events=list(events)), **how)
def listed(port, **request): return [s["item_id"] for s in ask(port, body=request)[2]["items"]]
def expected(engine, **request): return [s.item_id for s in recommend(engine, Request(**request), "r").items]

# ---- what happens shapes the next list

def test_a_cart_that_was_posted_is_the_cart_of_the_next_question(server, engines):
    status, _, said = post(server.port, event("add_to_cart", "ann", "i4"), event("add_to_cart", "ann", "i9"))
    assert (status, said["accepted"], said["duplicates"], said["rejected"]) == (200, 2, 0, [])
    assert listed(server.port, visitor_id="ann") == expected(engines["v1"], cart=["i4", "i9"]) != expected(engines["v1"])
    post(server.port, event("remove_from_cart", "ann", "i4"))
    assert listed(server.port, visitor_id="ann") == expected(engines["v1"], cart=["i9"], items=["i4"])
    assert listed(server.port, visitor_id="ann", cart=["i20"], items=["i21"]) == expected(engines["v1"], cart=["i20"], items=["i21"])  # the request goes first
    assert listed(server.port, visitor_id="ann", consent=False) == expected(engines["v1"])

def test_a_visitor_who_logs_in_is_the_user_from_then_on(server, engines):
    post(server.port, event("view", "phone", "i7", user_id="u3"))
    assert listed(server.port, visitor_id="phone") == expected(engines["v1"], user_id="u3", items=["i7"])

def test_without_consent_nothing_is_remembered(server, engines):
    post(server.port, event("add_to_cart", "bob", "i4", consent=False))
    assert listed(server.port, visitor_id="bob") == expected(engines["v1"])

def test_an_event_counts_once_and_a_bad_one_refuses_only_itself(server):
    twice = event("view", "cid", "i5")
    assert post(server.port, twice)[2]["accepted"] == 1
    said = post(server.port, twice, dict(event_type="view"), event("view", "cid", "i6"))[2]
    assert (said["accepted"], said["duplicates"], [r["index"] for r in said["rejected"]]) == (1, 1, [1])

def test_an_item_out_of_stock_is_gone_for_good_and_comes_back_with_its_stock(server):
    first = listed(server.port, user_id="u3")[0]
    assert ask(server.port, "PUT", f"/v1/items/{first}", dict(title="x", stock=0))[0] == 200
    until(lambda: first not in listed(server.port, user_id="u3", n=100))
    assert all(first not in listed(server.port, user_id="u3", n=100) for _ in range(5))
    assert ask(server.port, "PATCH", f"/v1/items/{first}", dict(stock=3))[0] == 200
    until(lambda: listed(server.port, user_id="u3")[0] == first)
    assert ask(server.port, "PATCH", "/v1/items/no-such-item", dict(stock=3))[0] == 404

def test_what_everybody_buys_now_is_trending_within_seconds_and_after_a_restart(tmp_path):
    state = tables()._replace(trending=np.arange(5, dtype=np.int32))
    publish(tmp_path, state=state); promote(tmp_path/"bundles", "v1")
    with serving(tmp_path) as (_, port):
        quiet = next(f"i{k}" for k in range(N_ITEMS) if state.sellable[k] and f"i{k}" not in listed(port, n=100))
        post(port, *(event("purchase", f"crowd-{k}", quiet) for k in range(50)))
        until(lambda: quiet in listed(port, n=100))
    with serving(tmp_path) as (_, port): assert quiet in listed(port, n=100)

@pytest.mark.skipif(REDIS is None, reason="redis-server is missing: apt-get install redis-server")
def test_what_is_bought_at_one_machine_is_trending_at_all(tmp_path):
    "Two services without a folder in common but for the bundles; one takes events, the other makes lists."
    state = tables()._replace(trending=np.arange(5, dtype=np.int32))
    one, two = tmp_path/"one", tmp_path/"two"
    one.mkdir()
    publish(one, state=state); promote(one/"bundles", "v1")
    two.mkdir(); (two/"bundles").symlink_to(one/"bundles")
    with Server(tmp_path) as redis, serving(one, state=redis.uri) as (_, events), serving(two, state=redis.uri) as (_, lists):
        quiet = next(f"i{k}" for k in range(N_ITEMS) if state.sellable[k] and f"i{k}" not in listed(lists, n=100))
        post(events, *(event("purchase", f"crowd-{k}", quiet) for k in range(50)))
        until(lambda: quiet in listed(lists, n=100) and quiet in listed(events, n=100))
        assert not (two/"data"/"arrivals").exists() or not tail_log(two/"data", 0, 10)

# ---- other questions

def test_rank_and_similar(server, engines):
    _, _, got = ask(server.port, path="/v1/rank", body=dict(user_id="u3", candidates=["i1", "i2", "i3", "unknown"]))
    full = {s.item_id: s.score for s in recommend(engines["v1"], Request(user_id="u3", n=100), "r").items}
    scores = [s["score"] for s in got["items"]]
    assert {s["item_id"] for s in got["items"]} <= {"i1", "i2", "i3"} and scores == sorted(scores, reverse=True)
    assert all(abs(full[s["item_id"]] - s["score"]) < 1e-9 for s in got["items"] if s["item_id"] in full)
    _, _, kin = ask(server.port, path="/v1/similar", body=dict(item_id="i4", n=5))
    near = {f"i{j}" for j in engines["v1"].state.together_ids[4] if j >= 0} | {f"i{j}" for j in engines["v1"].state.cart_ids[4] if j >= 0}
    assert kin["items"] and {s["item_id"] for s in kin["items"]} <= near - {"i4"}
    assert ask(server.port, path="/v1/similar", body=dict(item_id="unknown"))[0] == 404

def test_a_list_can_be_explained_later(server):
    _, _, given = ask(server.port, body=dict(user_id="u3", cart=["i4"], n=3))
    until(lambda: ask(server.port, "GET", f"/v1/explain/{given['request_id']}")[0] == 200)
    why = ask(server.port, "GET", f"/v1/explain/{given['request_id']}")[2]
    assert [(s["item_id"], s["score"]) for s in why["items"]] == [(s["item_id"], s["score"]) for s in given["items"]] and all(s["contributions"] for s in why["items"])
    assert ask(server.port, "GET", "/v1/explain/never-given")[0] == 404

def test_what_was_served_is_kept_with_features(server):
    _, _, given = ask(server.port, body=dict(user_id="u5", n=3))
    def record():
        lines = [l for p in (server.folder/"data"/"served").glob("day=*/*.jsonl") for l in p.read_text().splitlines() if given["request_id"] in l]
        return json.loads(lines[0]) if lines else None
    until(record)
    kept = record()
    assert [i[0] for i in kept["items"]] == [s["item_id"] for s in given["items"]] and kept["model_version"] == given["model_version"] and kept["user_id"] == "u5"
    assert np.shape(kept["x"]) == (3, 107)
    _, _, given = ask(server.port, body=dict(user_id="u5", visitor_id="u5", session_id="s", consent=False, n=3))
    until(record)
    assert "u5" not in json.dumps({k: v for k, v in record().items() if k != "items"}) and record()["request"].get("session_id") is None

def test_lists_of_rank_and_similar_are_kept_too(server):
    ranked = ask(server.port, path="/v1/rank", body=dict(user_id="u5", visitor_id="rk", candidates=["i1", "i2", "i3"]))[2]
    kin = ask(server.port, path="/v1/similar", body=dict(item_id="i4", n=5))[2]
    def kept(given): return [json.loads(l) for p in (server.folder/"data"/"served").glob("day=*/*.jsonl") for l in p.read_text().splitlines() if given["request_id"] in l]
    until(lambda: kept(ranked) and kept(kin))
    (r,), (k,) = kept(ranked), kept(kin)
    assert (r["kind"], r["candidates"], r["user_id"], r["visitor_id"]) == ("rank", ["i1", "i2", "i3"], "u5", "rk") and [i[0] for i in r["items"]] == [s["item_id"] for s in ranked["items"]]
    assert k["kind"] == "similar" and k["request"]["items"] == ["i4"] and [i[0] for i in k["items"]] == [s["item_id"] for s in kin["items"]]
    status, _, said = ask(server.port, "GET", f"/v1/explain/{ranked['request_id']}")
    assert status == 404 and "list of rank" in said["error"]["message"]
    until(lambda: ask(server.port, "DELETE", "/v1/users/rk", b"")[2]["removed"] >= 1)
    assert not kept(ranked)

def test_somebody_is_forgotten(server):
    post(server.port, event("add_to_cart", "eve", "i4"))
    assert listed(server.port, visitor_id="eve") != listed(server.port)
    status, _, said = ask(server.port, "DELETE", "/v1/users/eve", b"")
    assert status == 200 and said["removed"] >= 2 and listed(server.port, visitor_id="eve") == listed(server.port)
    assert not any(e.visitor_id == "eve" for _, e in tail_log(server.folder/"data", 0, 100_000))

def figures(port):
    from prometheus_client.parser import text_string_to_metric_families
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20); link.request("GET", "/metrics")
    return {f.name: f for f in text_string_to_metric_families(link.getresponse().read().decode())}

def test_late_events_and_kept_lists_are_counted(server):
    def counted(): return {s.labels["what"]: s.value for f in [figures(server.port).get("recsys_log")] if f for s in f.samples}
    before = counted()
    hours_ago = lambda h: datetime.fromtimestamp(time.time() - h * 3600, timezone.utc).isoformat()
    post(server.port, event("view", "late", "i4", ts=hours_ago(0)), event("view", "late", "i4", ts=hours_ago(2)), event("view", "late", "i4", ts=hours_ago(3)))
    ask(server.port)
    until(lambda: counted().get("late", 0) == before.get("late", 0) + 2 and counted().get("out_of_order", 0) >= before.get("out_of_order", 0) + 2 and counted().get("served", 0) > before.get("served", 0))

def test_figures_for_prometheus(server):
    ask(server.port)
    families = figures(server.port)
    lists = sum(s.value for s in families["recsys_requests"].samples if s.labels.get("route") == "recommend" and s.labels["status"] == "200")
    assert lists > 5 and sum(s.value for s in families["recsys_events"].samples if s.labels.get("outcome") == "accepted") >= 5

# ---- too little time, parts that fail

def test_a_request_that_cannot_wait_gets_a_cheaper_list(server):
    _, _, got = ask(server.port, body=dict(user_id="u3", timeout_ms=.001))
    assert got["fallback_level"] == 4 and got["degraded"] and got["items"]
    _, _, got = ask(server.port, body=dict(user_id="u3", timeout_ms=60000))
    assert got["fallback_level"] == 0 and not got["degraded"]

def test_levels_follow_the_pressure():
    p = Pressure(shed_ms=10, refuse_ms=100)
    def at(behind, timeout=None): p.behind = behind; return p.level(timeout)
    assert [at(b) for b in (0, 9.9, 10, 20, 40, 80, 99)] == [0, 0, 1, 2, 3, 4, 4]
    with pytest.raises(Refused) as e: at(100)
    assert e.value.status == 429 and e.value.headers["retry-after"]
    for _ in range(200): p.took(0, 50.)
    assert at(0, 20) == 1 and at(0, 100) == 0 and at(0, 1e-6) == 4

@pytest.mark.skipif(REDIS is None, reason="redis-server is missing: apt-get install redis-server")
def test_a_state_on_a_server_works_and_its_loss_degrades_the_answer_only(shop, engines, tmp_path):
    with Server(tmp_path) as redis, serving(copied(shop, tmp_path), state=redis.uri) as (_, port):
        post(port, event("add_to_cart", "far", "i4"))
        assert listed(port, visitor_id="far") == expected(engines["v1"], cart=["i4"])
        redis.stop()
        status, _, got = ask(port, body=dict(visitor_id="far", user_id="u3"))
        assert status == 200 and got["degraded"] and [s["item_id"] for s in got["items"]] == expected(engines["v1"], user_id="u3")
        assert post(port, event("view", "far", "i4"))[2]["accepted"] == 1  # safe in the log

# ---- keys

def test_keys_open_what_their_scopes_say(shop, tmp_path):
    keys, file = {}, tmp_path/"keys.toml"
    lines = []
    for name, scopes in (("reader", ["read"]), ("writer", ["write"]), ("boss", ["read", "write", "admin"])):
        keys[name], text = new_key(name, scopes); lines.append(text)
    file.write_text("\n".join(lines)); file.chmod(0o600)
    with serving(copied(shop, tmp_path), keys_file=file) as (process, port):
        def status(key, *args, **how):
            headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
            return ask(port, *args, headers=headers, **how)[0]
        assert status(None) == status("recsys_wrong") == 401 and status(keys["reader"]) == 200 and status(keys["writer"]) == 403
        batch = json.dumps(dict(events=[event("view", "v", "i1")]))
        assert status(keys["writer"], path="/v1/events", body=batch) == 200 and status(keys["reader"], path="/v1/events", body=batch) == 403
        assert ask(port, headers={"content-type": "application/json", "authorization": f"Bearer {keys['reader']}", "host": "shop.example"})[0] == 200, "with keys it may stand behind a proxy"
        assert status(keys["writer"], "PUT", "/v1/items/i1", b"{}") == 403 and status(keys["boss"], "PUT", "/v1/items/i1", b"{}") == 200
        assert status(None, "GET", "/healthz", b"") == status(None, "GET", "/openapi.json", b"") == 200
        process.terminate(); err = process.communicate(timeout=20)[1]
        audits = [json.loads(l) for l in err.splitlines() if '"audit"' in l]
        assert [(a["key"], a["status"]) for a in audits] == [("writer", 403), ("boss", 200)]

# ---- versions come and go, workers die

def hammer(port, stop, answers, failures):
    "Ask without pause until `stop`; (version, items) of each answer."
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    while not stop.is_set():
        try:
            status, _, got = ask(port, body=dict(user_id="u3", cart=["i4"]), link=link)
            if status != 200: failures.append(status)
            elif not got["degraded"]: answers.append((got["model_version"], tuple(s["item_id"] for s in got["items"]))) # on a busy machine some lists are cheaper ones
        except (OSError, http.client.HTTPException) as e:
            failures.append(repr(e)); link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

def test_a_new_version_comes_and_goes_without_a_failed_or_mixed_answer(shop, tmp_path, engines):
    folder = copied(shop, tmp_path)
    with serving(folder, workers=2) as (process, port):
        stop, answers, failures = threading.Event(), [], []
        threads = [threading.Thread(target=hammer, args=(port, stop, answers, failures)) for _ in range(3)]
        for t in threads: t.start()
        versions = lambda: {v for v, _ in answers[-20:]}
        for version in ("v2", "v1"):
            promote(folder/"bundles", version)
            until(lambda: len(answers) > 20 and versions() == {version}, 60)
        broken = folder/"bundles"/"v3"; shutil.copytree(folder/"bundles"/"v2", broken); (broken/"ranker.txt").write_text("nonsense")
        promote(folder/"bundles", "v3"); seen = len(answers)
        until(lambda: len(answers) > seen + 50)
        time.sleep(2)
        assert versions() == {"v1"}
        stop.set()
        for t in threads: t.join()
    assert not failures
    right = {v: tuple(expected(e, user_id="u3", cart=["i4"])) for v, e in engines.items()}
    assert {(v, items) for v, items in answers} == {("v1", right["v1"]), ("v2", right["v2"])}

def poster(port, stop, safe):
    "Post batches without pause until `stop`; ids of those whose safety was confirmed."
    while not stop.is_set():
        batch = [event("view", f"v{len(safe)}", "i4") for _ in range(3)]
        try:
            if post(port, *batch)[0] == 200: safe.extend(e["event_id"] for e in batch)
        except (OSError, http.client.HTTPException, ValueError): time.sleep(.02)

def killed_while_posting(shop, kills, whole=False):
    "Ids confirmed while workers, or the `whole` service, are killed `kills` times."
    safe, rng = [], np.random.default_rng(0)
    for _ in range(kills if whole else 1):
        with serving(shop, workers=2) as (process, port):
            stop = threading.Event()
            threads = [threading.Thread(target=poster, args=(port, stop, safe)) for _ in range(3)]
            for t in threads: t.start()
            for _ in range(1 if whole else kills):
                time.sleep(float(rng.uniform(.3, 1.)) + (6 if not whole and kills > 2 else 0)) # a server whose new worker dies within 5.5 s ends
                if whole: process.kill()
                else:
                    until(lambda: len(workers_of(process.pid)) == 2, 60)
                    os.kill(int(rng.choice(workers_of(process.pid))), signal.SIGKILL)
            time.sleep(.5)
            stop.set()
            for t in threads: t.join()
    return safe

def each_once(folder, safe):
    found = [e.event_id for _, e in tail_log(folder/"data", 0, 10_000_000)]
    assert safe and len(found) == len(set(found)) and not set(safe) - set(found)

def test_no_confirmed_event_is_lost_when_workers_are_killed(shop, tmp_path):
    folder = copied(shop, tmp_path)
    each_once(folder, killed_while_posting(folder, 2))

@pytest.mark.bench
@pytest.mark.parametrize("kills,whole", [(150, False), (50, True)])
@pytest.mark.timeout(7200)
def test_no_confirmed_event_is_lost_in_200_kills(shop, tmp_path, kills, whole):
    folder = copied(shop, tmp_path)
    each_once(folder, killed_while_posting(folder, kills, whole))

# ---- a full disk

def test_a_full_disk_refuses_events_and_items_and_lists_go_on(shop, tmp_path, engines):
    "On a small disk of its own, which takes the right to mount one."
    disk = tmp_path/"disk"; disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode: pytest.skip("no right to mount a small disk")
    try:
        folder = copied(shop, tmp_path); (folder/"data").symlink_to(disk)
        with serving(folder, workers=2) as (process, port):
            workers = set(workers_of(process.pid))
            post(port, event("add_to_cart", "ann", "i4"))
            def asked():
                status, _, got = ask(port, body=dict(visitor_id="ann"))
                return status == 200 and [s["item_id"] for s in got["items"]] == expected(engines["v1"], cart=["i4"])
            assert asked()
            filler = disk/"filler"
            for size in (65536, 1):
                with filler.open("ab", buffering=0) as f, suppress(OSError):
                    while f.write(b"x" * size) == size: pass
            said = [post(port, *(event("view", f"w{k}-{j}", "i5", context=dict(note="n" * 3000)) for j in range(50))) for k in range(10)]
            refused = [got["error"] for status, _, got in said if status == 503]
            assert {status for status, *_ in said} <= {200, 503} and refused and all(e["code"] == "not_safe" and "send them again" in e["message"] for e in refused)
            assert ask(port, "PUT", "/v1/items/i7", dict(title="t" * 900))[0] in (200, 503)
            for _ in range(100): assert asked()
            time.sleep(2)
            assert asked() and ask(port, "GET", "/readyz", b"")[0] == 200 and set(workers_of(process.pid)) == workers
            filler.unlink()
            until(lambda: post(port, event("view", "later", "i5"))[0] == 200)
            ids = [f"w{k}-{j}" for k, (status, *_) in enumerate(said) if status == 200 for j in range(50)]
            found = [e.visitor_id for _, e in tail_log(disk, 0, 10_000)]
            assert [v for v in found if v.startswith("w")] == ids and "later" in found
    finally: subprocess.run(["umount", "-l", disk], check=True)

# ---- a state that was lost

def test_a_lost_state_is_made_again_from_the_newest_events_only(shop, tmp_path):
    import msgspec
    from recsys.core.settings import load_settings
    from recsys.data.arrivals import check_arrivals
    from recsys.serving.service import Service, start
    folder = copied(shop, tmp_path)
    log = EventLog(folder/"data")
    for k in range(6):
        good, _ = check_arrivals([msgspec.Raw(json.dumps(event("view", f"v{k}", "i4")).encode())], time.time(), 60)
        log.submit(good, time.time()).result()
    log.roll(); log.close()
    s = load_settings()
    change = msgspec.structs.replace
    s = change(s, paths=change(s.paths, data=str(folder/"data")), serving=change(s.serving, state_replay=2))
    service = Service(s, folder/"bundles"); start(service)
    known = [bool(service.store.read(f"v{k}", None, None, time.time()).recent) for k in range(6)]
    service.close()
    assert known == [False] * 4 + [True] * 2
