"Queues and sizes: the simulation agrees with what is known in closed form, and needs grow as they must."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from recsys.operations.sizing import needs, sojourn, visitor_bytes, weight_of
from test_serving import N_USERS, publish
from recsys.serving.bundle import open_bundle

WEIGHT = dict(user=3000., item=2500., rest=1e8)

@pytest.mark.parametrize("load", [.3, .5, .7, .9])
def test_a_queue_with_exponential_service_is_mm1(load):
    s = np.random.default_rng(0).exponential(100, 300_000)
    t = sojourn(s, load, 2_000_000, 3)
    mean = s.mean() / (1 - load)                       # of M/M/1, whose times are exponential
    assert t.mean() == pytest.approx(mean, rel=.05) and np.quantile(t, .99) == pytest.approx(mean * np.log(100), rel=.07)

@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1, 5000), min_size=1, max_size=30), st.floats(.05, .85), st.integers(0, 99))
def test_nobody_is_answered_before_being_served_and_more_load_waits_longer(service, load, seed):
    t = sojourn(np.array(service), load, 20_000, seed)
    assert t.min() >= min(service) * (1 - 1e-9) and sojourn(np.array(service), load + .1, 20_000, seed).mean() >= t.mean()

@pytest.mark.parametrize("load", [0, 1, 1.5, -.1])
def test_a_load_without_a_steady_state_is_refused(load):
    with pytest.raises(ValueError, match="steady state"): sojourn(np.ones(3), load)

def test_cores_follow_requests_memory_follows_users_and_large_ones_are_divided():
    of = lambda **more: needs(**(dict(request_us=400., worker_mb=200., weight=WEIGHT, rps=1e4, users=1e6, items=1e5, visitor=2000) | more))
    assert of()["cores"] == 6 and of(rps=1e5)["cores"] == 58 and of(load=.5)["cores"] == 8
    assert of()["machines"] == of()["groups"] == 1 and of(users=1e9)["groups"] > 40 and of(users=1e9)["machines"] >= of(users=1e9)["groups"]
    assert all(of(users=u, rps=r)["memory_gb"] <= 64 for u in (1e6, 1e7, 1e8, 1e9) for r in (1e4, 1e6))
    assert of(users=1e9)["state_gb"] == 2000
    with pytest.raises(ValueError, match="items need more"): of(items=1e8)

def test_every_table_is_weighed_once(tmp_path):
    b = open_bundle(publish(tmp_path))
    w = weight_of(b)
    codes = sum(m.nbytes for m in (b.user_codes.text, b.user_codes.ends, b.user_codes.slots))
    assert w["user"] * N_USERS + w["item"] * len(b.items) + w["rest"] == pytest.approx(sum(a.nbytes for a in b.state) + b.words.nbytes + codes)
    assert all(v > 0 for v in w.values()) and visitor_bytes(64, 64, 128) > visitor_bytes() > visitor_bytes(1, 1, 1)
