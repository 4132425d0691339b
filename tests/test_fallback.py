"The fallback of the real service: told within a second, seen in every answer, outliving a restart, and nobody refused meanwhile."
import threading, time
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest

from recsys.core.settings import RecsysError
from recsys.features.definitions import NAMES
from recsys.serving.bundle import open_bundle, promote
from recsys.serving.fallback import Switch, fallback_file, read_fallback, set_fallback
from test_serving import ask, publish, serving

SECOND = 1.0

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fallback")
    publish(folder); promote(folder/"bundles", "v1")
    return SimpleNamespace(folder=folder, data=folder/"data")

class Crowd:
    "Visitors who keep asking while the block runs; what they were told: (asked at, status, level, degraded)."
    def __init__(self, port, threads=3): self.port, self.said, self.over, self.threads = port, [], threading.Event(), [threading.Thread(target=self.ask) for _ in range(threads)]
    def ask(self):
        k = 0
        while not self.over.is_set():
            at, k = time.monotonic(), k + 1
            try: status, _, body = ask(self.port, body=dict(user_id=f"u{k % 20}", n=5, timeout_ms=60_000))
            except OSError as e: status, body = str(e), {}
            self.said.append((at, status, body.get("fallback_level"), body.get("degraded"), len(body.get("items", []))))
    def __enter__(self):
        for t in self.threads: t.start()
        return self
    def __exit__(self, *_):
        self.over.set()
        for t in self.threads: t.join()

def metrics(port) -> str: return urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()

def test_every_worker_falls_back_and_comes_back_within_a_second_and_no_request_fails(shop):
    set_fallback(shop.data, None)
    with serving(shop.folder, workers=2, shed_ms=5000, refuse_ms=60_000) as (_, port), Crowd(port) as crowd:
        time.sleep(.5)
        moments = []
        for level in (2, None, 4, 3, None):
            set_fallback(shop.data, level, "a test" if level else "")
            moments.append((time.monotonic(), level or 0)); time.sleep(SECOND + .5)
    assert {status for _, status, *_ in crowd.said} == {200} and len(crowd.said) > 50
    assert {n for *_, n in crowd.said} == {5}, "a whole list each time"
    for (at, level), (until, _) in zip(moments, [*moments[1:], (time.monotonic(), 0)]):
        settled = [(said, degraded) for asked, _, said, degraded, _ in crowd.said if at + SECOND < asked < until - .1]
        assert settled and set(settled) == {(level, level > 0)}, f"level {level}"
    before = [said for asked, _, said, *_ in crowd.said if asked < moments[0][0] - .3]
    assert set(before) == {0}

def test_it_outlives_a_restart_and_a_broken_file_changes_nothing(shop):
    set_fallback(shop.data, 3, "before the start")
    with serving(shop.folder, shed_ms=5000) as (_, port):
        level = lambda: ask(port, body=dict(user_id="u3"))[2]["fallback_level"]
        assert level() == 3  # from the first answer on
        assert 'recsys_fallback_workers{level="3"} 1' in metrics(port)
        fallback_file(shop.data).write_text("{")
        time.sleep(SECOND); assert level() == 3
        with pytest.raises(RecsysError, match="not a fallback"): read_fallback(shop.data)
        set_fallback(shop.data, 1, "repaired")
        time.sleep(SECOND); assert level() == 1
        set_fallback(shop.data, None)
        time.sleep(SECOND); assert level() == 0 and "recsys_fallback_workers{" not in metrics(port)

def test_without_the_ranker_rank_puts_all_in_the_same_order_and_says_so(shop):
    set_fallback(shop.data, None)
    with serving(shop.folder, shed_ms=5000) as (_, port):
        def order(user):
            said = ask(port, path="/v1/rank", body=dict(user_id=user, candidates=[f"i{k}" for k in range(12)], n=12))[2]
            return [s["item_id"] for s in said["items"]], [s["score"] for s in said["items"]], said["degraded"], said["fallback_level"]
        full = {u: order(u) for u in ("u1", "u2", "u5")}
        assert {tuple(said[2:]) for said in full.values()} == {(False, 0)}
        set_fallback(shop.data, 2, "the ranker is broken"); time.sleep(SECOND)
        fallen = {u: order(u) for u in full}
        assert {tuple(said[2:]) for said in fallen.values()} == {(True, 2)}
        share = np.asarray(open_bundle(shop.folder/"bundles"/"v1").state.item_x)[:, NAMES.index("item_share_long")]
        best = sorted((int(i[1:]) for i in full["u1"][0]), key=lambda k: (-share[k], k))
        for items, scores, *_ in fallen.values():
            assert items == [f"i{k}" for k in best] and scores == pytest.approx(share[best], abs=1e-5)
        assert fallen["u1"][1] != full["u1"][1]

def test_a_deadline_may_ask_for_less_than_the_switch_but_not_for_more(shop):
    set_fallback(shop.data, 2, "a test")
    with serving(shop.folder, shed_ms=5000) as (_, port):
        assert ask(port, body=dict(user_id="u3", timeout_ms=60_000))[2]["fallback_level"] == 2
        assert ask(port, body=dict(user_id="u3", timeout_ms=.01))[2]["fallback_level"] == 4
    set_fallback(shop.data, None)

@pytest.mark.parametrize("text", [b"", b"[]", b'{"level":5,"why":"","by":"","at":""}', b'{"level":true}', b"\xff\xfe", b'{"level":0,"why":"","by":"","at":""}'])
def test_whatever_stands_in_the_file_a_worker_goes_on(tmp_path, text):
    switch = Switch(tmp_path)
    set_fallback(tmp_path, 2, "so it was"); assert switch.look()
    fallback_file(tmp_path).write_bytes(text)
    assert not switch.look() and switch.level == 2
    set_fallback(tmp_path, None); assert switch.look() and switch.level == 0

def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path/"data").write_text("a file")
    with pytest.raises((RecsysError, OSError)): set_fallback(tmp_path/"data", 2, "?")
