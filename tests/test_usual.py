"The usual way in numpy gives what the kernels give: two descriptions of one thing."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from recsys.features.definitions import NAMES
from recsys.operations.usual import usual_rows
from recsys.ranking.rows import candidate_rows, work_for
from test_serving import N_ITEMS, N_USERS, tables
from test_sources import with_sources

STATES = dict(plain=tables(), all_sources=with_sources())

@pytest.mark.parametrize("name", STATES)
@settings(max_examples=150, deadline=None)
@given(user=st.integers(-1, N_USERS - 1), cart=st.lists(st.integers(0, N_ITEMS - 1), max_size=6, unique=True), barred=st.lists(st.integers(0, N_ITEMS - 1), max_size=8, unique=True), budget=st.integers(1, 80), n=st.integers(1, 15))
def test_candidates_and_features_are_those_of_the_kernels(name, user, cart, barred, budget, n):
    s, cart, barred = STATES[name], np.array(cart, np.int32), np.array(barred, np.int32)
    ids, x = usual_rows(s, user, cart, barred, n, budget)
    work = work_for(s, n, budget)
    found = candidate_rows(s, work, user, cart, barred)
    assert ids.tolist() == work.ids[:found].tolist()
    for k, column in enumerate(NAMES): np.testing.assert_allclose(x[:, k], work.x[:found, k], rtol=2e-4, atol=1e-5, err_msg=column)
