"The attention model in sessions: it may propose what was there before, goes on in time, and never keeps what is later."
import numpy as np
from msgspec.structs import replace

from recsys.candidates import sequences as Q
from recsys.core.settings import load_settings
from recsys.ranking import session_attention as A


def walks(n, seed=0, items=60):
    "Sessions that mostly go one further, sometimes back."
    rng = np.random.default_rng(seed)
    return [np.clip(np.cumsum(np.r_[rng.integers(items), rng.choice([-1, 0, 1, 2], rng.integers(2, 7), p=[.3, .1, .5, .1])]), 0, items - 1).tolist() for _ in range(n)]


def quick(epochs=4):
    s = load_settings()
    return replace(s, sessions=replace(s.sessions, attention_items=100, attention_epochs=epochs), sequence=replace(s.sequence, dimensions=16, layers=1, length=10, batch_targets=256))


def test_the_attention_source_proposes_items_of_the_prefix_first_where_sessions_go_back_to_them():
    s = Q.sequences([[i, (i + 1) % 20, i, (i + 1) % 20, i] for i in range(20)] * 20)
    found = A.attention_maker(quick(15))(s, 20)(Q.prefixes(Q.sequences([[3, 4, 3, 4], [8, 9, 8, 9]]), 3), 5)
    assert np.sort(found.ids[:, :2]).tolist() == [[3, 4], [8, 9]] and (np.diff(found.scores) <= 0).all()


def test_attention_goes_on_with_later_sessions_and_begins_anew_for_earlier_ones():
    s, cases = Q.sequences(walks(400)), Q.prefixes(Q.sequences(walks(20, seed=9)))
    make, scores = A.attention_maker(quick()), lambda source: source(cases, 60).scores
    first = make(Q.part(s, 0, 200), 60)
    one = scores(first)
    later = scores(make(s, 60))
    assert np.array_equal(one, scores(first)) and not np.array_equal(one, later)   # the earlier source has learnt nothing more
    assert not np.array_equal(later, scores(A.attention_maker(quick())(s, 60)))
    assert np.array_equal(one, scores(make(Q.part(s, 0, 200), 60)))                # nothing later is left in it


def test_attention_is_asked_where_items_are_few():
    assert set(A.attention(quick(), 100)) == {"attention"} and not A.attention(quick(), 101)
