"""Ranked histories: cut as the protocol says, nothing had before comes out, and nothing still to come goes in."""
import json

import numpy as np
import polars as pl
import pytest
from msgspec.structs import replace

from recsys.candidates.sequences import sequences
from recsys.core.settings import RecsysError, load_settings
from recsys.evaluation.next_item import next_item_metrics
from recsys.operations.bench_sequences import bench_sequences, sequence_baselines, sequence_peers
from recsys.operations.cli import main
from recsys.ranking.sequence_ranker import (FALSE_HERE, answer_sequences, attention_maker, content_source, fit_sequences, last_two,
                                            read_attributes, sequence_rows, unseen)

ITEMS = 60

def histories(n=200, seed=0):
    "Walks along a ring of items, none twice."
    rng = np.random.default_rng(seed)
    return [list(dict.fromkeys((np.cumsum(np.r_[rng.integers(ITEMS), rng.choice([1, 2, 3], rng.integers(4, 9), p=[.6, .3, .1])]) % ITEMS).tolist())) for _ in range(n)]

def quick():
    s = load_settings()
    return replace(s, candidates=replace(s.candidates, per_source=20, budget=40), ranker=replace(s.ranker, trees=12, min_rows_in_leaf=5),
                   sequence=replace(s.sequence, dimensions=16, layers=1, epochs=2, length=8, dropout=.1, batch_targets=128, learning_rate=.01, negatives=0), evaluation=replace(s.evaluation, bootstrap_samples=100))

def test_the_last_two_items_are_cut_as_the_protocol_says():
    lists = histories(); cut = last_two(sequences(lists))
    for u, h in enumerate(lists):
        assert cut.train.item[cut.train.ptr[u]:cut.train.ptr[u + 1]].tolist() == h[:-2]
        for cases, back in ((cut.validation, 2), (cut.test, 1)):
            assert cases.item[cases.start[u]:cases.end[u]].tolist() == h[:-back] and cases.label[u] == h[-back]
    with pytest.raises(RecsysError, match="fewer than three"): last_two(sequences([[1, 2, 3], [1, 2]]))

def test_unseen_keeps_the_order_of_the_others():
    lists, rng = histories(50), np.random.default_rng(1); cut = last_two(sequences(lists))
    given = np.stack([np.stack([rng.permutation(ITEMS)[:30] for _ in lists]) for _ in range(2)]).astype(np.int32)
    given[:, :, 25:] = -1
    for source, found in zip(given, unseen(given, cut.test, ITEMS)):
        for u, h in enumerate(lists):
            want = [i for i in source[u] if i >= 0 and i not in h[:-1]]
            assert found[u].tolist() == want + [-1] * (30 - len(want))

def test_attributes_are_read_by_id(tmp_path):
    pl.DataFrame(dict(item=[70, 50, 99], attributes=[[3, 1], [1], [4]])).write_parquet(tmp_path/"a.parquet")
    table, n = read_attributes(tmp_path/"a.parquet", np.array([50, 60, 70]))
    assert n == 2 and table.tolist() == [[0, 2], [2, 2], [0, 1]]
    with pytest.raises(RecsysError, match="same ids"): read_attributes(tmp_path/"a.parquet", np.array([1, 2]))
    (tmp_path/"b").write_text("no")
    with pytest.raises(RecsysError, match="cannot be read"): read_attributes(tmp_path/"b", np.array([1]))

def fitted(lists, tmp_path, floor=1):
    s = sequences(lists); has = (np.arange(ITEMS) // 6)[:, None]; settings = quick()
    cut = last_two(s)
    more = dict(attention=attention_maker(settings, has, 10, tmp_path), content=content_source(has, 10))
    return cut, fit_sequences(cut, ITEMS, 10, settings, floor, more), settings

def test_what_is_asked_for_changes_no_list_and_nothing_had_before_is_listed(tmp_path):
    lists = histories(); cut, model, settings = fitted(lists, tmp_path/"a")
    a = answer_sequences(model, cut.test, 10, settings)
    for u, h in enumerate(lists):
        for l in (a.lists, *a.proposed.values()): assert not set(l[u].tolist()) & set(h[:-1])
    other = [h[:-1] + [(h[-1] + 17) % ITEMS if (h[-1] + 17) % ITEMS not in h else h[-1]] for h in lists]
    cut_b, model_b, _ = fitted(other, tmp_path/"b")
    assert (cut_b.test.label != cut.test.label).mean() > .8
    b = answer_sequences(model_b, cut_b.test, 10, settings)
    assert np.array_equal(a.lists, b.lists), "the test's own answers reached a list"
    rows, _ = sequence_rows(model.sources, cut.validation, 20, 40)
    later = [h[:-2] + [(h[-2] + 29) % ITEMS, h[-1]] for h in lists]
    cut_c = last_two(sequences([h if len(set(h)) == len(h) else l for h, l in zip(later, lists)]))
    assert np.array_equal(rows.x, sequence_rows(model.sources, cut_c.validation, 20, 40)[0].x), "a validation item reached its own row"

def test_columns_that_know_the_future_are_left_out_and_counts_are_raised(tmp_path):
    cut, model, _ = fitted(histories(150), tmp_path, floor=9)
    assert not set(FALSE_HERE) & set(model.sources.names) and not any(n.startswith(("trend", "fresh")) for n in model.sources.names)
    rows, _ = sequence_rows(model.sources, cut.test, 20, 40)
    count = np.bincount(cut.train.item, minlength=ITEMS)[rows.ids]
    assert (count < 9).any() and np.array_equal(rows.x[:, model.sources.names.index("item_count")], np.maximum(count, 9))
    assert (rows.bought == (rows.ids == np.repeat(cut.test.label, rows.size))).all()

def test_baselines_are_those_of_a_plain_loop():
    lists = histories(80); cut = last_two(sequences(lists)); count = np.bincount(cut.train.item, minlength=ITEMS); follows = np.zeros((ITEMS, ITEMS))
    for h in lists:
        for a, b in zip(h[:-2], h[1:-2]): follows[a, b] += 1
    found = sequence_baselines(cut.train, cut.test, ITEMS, 5)
    for u, h in enumerate(lists):
        rest = [i for i in range(ITEMS) if i not in h[:-1]]
        assert found["popularity"][u].tolist() == sorted(rest, key=lambda i: (-count[i], i))[:5]
        want = [i for i in sorted(rest, key=lambda i: (-follows[h[-2], i], i)) if follows[h[-2], i]][:5]
        assert found["transitions"][u].tolist() == want + [-1] * (5 - len(want))

def test_peers_are_asked_with_the_prefix_and_never_answer_with_it():
    lists = histories(80); found, accounts = sequence_peers(last_two(sequences(lists)), ITEMS, 5, quick(), False, lambda note: None)
    assert found.keys() == accounts.keys() == {"implicit ALS", "implicit BPR", "implicit item-item"}
    for u, h in enumerate(lists):
        for name, l in found.items(): assert len(set(l[u])) == 5 and not set(l[u]) & set(h[:-1]), name

def test_the_command_measures_and_says_so(tmp_path, monkeypatch, capsys):
    lists = histories(); pl.DataFrame(dict(user=range(len(lists)), items=[[i + 100 for i in h] for h in lists])).write_parquet(tmp_path/"s.parquet")
    pl.DataFrame(dict(item=range(100, 100 + ITEMS), attributes=[[i // 6] for i in range(ITEMS)])).write_parquet(tmp_path/"a.parquet")
    monkeypatch.setattr("recsys.core.settings.load_settings", quick); monkeypatch.setenv("RECSYS_PATHS_REPORTS", str(tmp_path/"reports"))
    assert main(["bench", "sequences", "--sequences", str(tmp_path/"s.parquet"), "--attributes", str(tmp_path/"a.parquet"), "--out", str(tmp_path/"out.json")]) == 0
    said = json.loads((tmp_path/"out.json").read_text())
    assert {"n_cases", "hit_rate@10", "ndcg@10", "hit_rate@10_interval", "seconds_learning", "seconds_answering", "peak_rss_mb", "baselines", "sources", "comparison", "rival", "peer_accounts", "chosen"} <= said.keys()
    assert said["n_cases"] == len(lists) and {"popularity", "transitions", "item_item"} == said["baselines"].keys() and {"attention", "content"} <= said["sources"].keys()
    assert {"implicit ALS", "implicit BPR", "implicit item-item"} == said["peers"].keys() and "implicit BPR" in (tmp_path/"reports/benchmarks/next_item.html").read_text()
    assert said["hit_rate@10"] > said["baselines"]["popularity"]["hit_rate@10"] and said["comparison"]["ndcg@10"]["low"] < said["comparison"]["ndcg@10"]["high"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "out.json", "reports", "s.parquet"], "the states of the training are gone"
    assert f"{tmp_path.name}/s.parquet" in (tmp_path/"reports/benchmarks/next_item.html").read_text()
    without = bench_sequences(tmp_path/"s.parquet", tmp_path/"without.json", None, quick())
    assert "content" not in without["sources"] and without["n_attributes"] == 0
    again = bench_sequences(tmp_path/"s.parquet", tmp_path/"again.json", None, quick())
    assert all(again[part] == without[part] for part in ("hit_rate@10", "ndcg@10", "sources", "baselines", "peers", "comparison", "rival")), "the same seed gives the same figures"
    pl.DataFrame(dict(user=range(9), items=[[1, 2, 3]] * 9)).write_parquet(tmp_path/"few.parquet")
    assert main(["bench", "sequences", "--sequences", str(tmp_path/"few.parquet"), "--out", str(tmp_path/"x.json")]) == 1
    assert "give at least 50" in capsys.readouterr().err
