"""The attention model: causal, trained as a plain loop would, resumable, the same in one process and in two, and the same without torch."""
import os, subprocess, sys, textwrap

import numpy as np
import pytest
import torch

from recsys.candidates.attention import Attention, Shape, arrays_of, full_loss, padded, sampled_loss, sequence_loss
from recsys.candidates.attention_fit import AttentionModule, SequenceBatches, fit_attention, save_attention, windows
from recsys.candidates.attention_infer import Reader, load_attention, nearest, queries, query, states
from recsys.core.settings import RecsysError

NONE = torch.zeros(0, dtype=torch.int64)

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def a_model(seed=0, items=50, attributes=7, **kw):
    "A model with weights far from where training begins, and its attributes."
    rng = np.random.default_rng(seed); torch.manual_seed(seed)
    has = np.where(rng.random((items, 3)) < 0.6, rng.integers(0, max(attributes, 1), (items, 3)), attributes) if attributes else None
    model = Attention(Shape(items=items, attributes=attributes, **(dict(dimensions=16, layers=2, heads=2, length=12, dropout=0.3) | kw)), has).eval()
    with torch.no_grad():
        for p in model.parameters(): p += 0.3 * torch.randn_like(p)
        model.item.weight[-1] = 0
        if attributes: model.attribute.weight[-1] = 0
    return model, has

def sequences(n=200, items=30, seed=0, most=16):
    "Sequences in which each item is followed by its successor in two cases of three."
    rng = np.random.default_rng(seed); out = []
    for size in rng.integers(1, most, n):
        x = [rng.integers(items)]
        for _ in range(size - 1): x.append((x[-1] + 1) % items if rng.random() < 0.67 else rng.integers(items))
        out.append(x)
    return np.r_[0, np.cumsum([len(x) for x in out])], np.concatenate(out).astype(np.int32)

@pytest.mark.parametrize("smoothing", [0., 0.5, 1.])
def test_a_later_item_never_changes_an_earlier_state(smoothing):
    model, _ = a_model(smoothing=smoothing); rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.integers(0, 50, (4, 12)))
    with torch.no_grad():
        was = model(x)
        for place in range(12):
            y = x.clone(); y[:, place] = (y[:, place] + 1 + rng.integers(0, 40)) % 50
            now = model(y)
            assert torch.equal(was[:, :place], now[:, :place])
            assert (was[:, place:] - now[:, place:]).abs().amax(-1).min() > 1e-6, "every later place should notice"

def test_padding_changes_nothing():
    model, _ = a_model(); rng = np.random.default_rng(2)
    ptr, items = sequences(30, 50, most=14)
    wide = torch.from_numpy(padded(ptr, items, np.arange(30), 12, 50))
    with torch.no_grad():
        together = model(wide)
        for i in range(30):
            alone = items[ptr[i]:ptr[i + 1]][-12:]
            assert torch.allclose(model(torch.from_numpy(alone[None].astype(np.int64)))[0], together[i, :len(alone)], atol=1e-5)
        loss = sequence_loss(model, wide, NONE)
        more = torch.cat([wide, torch.full((30, 1), 50)], 1)[:, :13]
        assert torch.allclose(loss, sequence_loss(model, more, NONE), rtol=1e-5)

def test_windows_make_every_item_but_the_first_a_target_once():
    ptr, _ = sequences(100, most=40); length = 7
    begin, end = windows(ptr, length)
    targets = np.concatenate([np.arange(b + 1, e) for b, e in zip(begin, end)])
    assert sorted(targets) == [t for a, b in zip(ptr, ptr[1:]) for t in range(a + 1, b)]
    assert (end - begin - 1 <= length).all() and (end - begin >= 2).all()

def test_an_epoch_holds_every_target_once_whatever_the_number_of_processes():
    ptr, items = sequences(150, most=30)
    expected = sorted((int(items[r - 1]), int(items[r])) for a, b in zip(ptr, ptr[1:]) for r in range(a + 1, b))
    for world in (1, 3):
        found, total = [], {}
        for rank in range(world):
            batches = SequenceBatches(ptr, items, 30, 29, targets=64, negatives=5, seed=4)
            batches.rank, batches.world = rank, world
            batches.shuffle(2)
            for b in range(len(batches)):
                codes, drawn, targets = batches[b]
                total.setdefault(b, (targets, drawn.tolist())); assert total[b] == (targets, drawn.tolist())
                x, y = codes[:, :-1][codes[:, 1:] < 30], codes[:, 1:][codes[:, 1:] < 30]
                found += zip(x.tolist(), y.tolist())
        assert sorted(found) == expected and sum(t for t, _ in total.values()) == len(expected)

def test_the_loss_is_that_of_a_plain_loop():
    model, has = a_model(); ptr, items = sequences(20, 50, most=12)
    table = model.item.weight[:50].detach().numpy().copy()
    for i, row in enumerate(has):
        some = [a for a in row if a < 7]
        for a in some: table[i] += model.attribute.weight[a].detach().numpy() / np.sqrt(len(some))
    expected = 0.
    with torch.no_grad():
        for a, b in zip(ptr, ptr[1:]):
            for end in range(a + 1, b):
                state = model(torch.from_numpy(items[None, a:end].astype(np.int64)))[0, -1].numpy()
                score = (table @ state).astype(np.float64)
                expected += np.log(np.exp(score - score.max()).sum()) + score.max() - score[items[end]]
        found = sequence_loss(model, torch.from_numpy(padded(ptr, items, np.arange(20), 12, 50)), NONE)
    assert float(found) == pytest.approx(expected, rel=1e-5)

def test_drawing_all_others_is_the_full_loss_and_drawing_some_is_it_on_average():
    model, _ = a_model(attributes=0, items=40); torch.manual_seed(0); rng = np.random.default_rng(0)
    states_, target = torch.randn(1, 16), torch.tensor([11])
    with torch.no_grad():
        full = float(full_loss(model, states_, target))
        others = torch.tensor([i for i in range(40) if i != 11])
        assert float(sampled_loss(model, states_, target, others)) == pytest.approx(full, rel=1e-5)
        part = [np.exp(float(sampled_loss(model, states_, target, others[torch.from_numpy(rng.choice(39, 10, replace=False))]))) for _ in range(3000)]
    assert np.mean(part) == pytest.approx(np.exp(full), rel=0.05)  # 1 / probability is linear in the sum over the drawn

def test_training_learns_and_the_seed_decides():
    ptr, items = sequences(300)
    how = dict(shape=Shape(items=30, dimensions=16, layers=1, length=15, dropout=0.1), epochs=8, batch_targets=128, learning_rate=0.01)
    (a, loss), (b, same), (c, _) = (fit_attention(ptr, items, **how, seed=s) for s in (1, 1, 2))
    assert loss == same and loss[-1] < 0.75 * np.log(30)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.item.weight, c.item.weight)
    asked = np.arange(30)
    reader = load_like(a)
    ids, _ = nearest(reader, np.stack([query(reader, np.array([i])) for i in asked]), 3)
    assert np.mean([(i + 1) % 30 in row for i, row in zip(asked, ids)]) > 0.9

def load_like(model):
    "The reader of a model, without the disk."
    s = model.shape
    return Reader(arrays_of(model), s.layers, s.heads, s.length, s.smoothing)

@pytest.mark.parametrize("negatives", [0, 12])
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch, negatives):
    ptr, items = sequences(200); has = np.random.default_rng(0).integers(0, 5, (30, 2))
    how = dict(shape=Shape(items=30, attributes=4, dimensions=16, layers=1, length=15, dropout=0.3), attributes=has, epochs=5, batch_targets=128, negatives=negatives, seed=3)
    whole, losses = fit_attention(ptr, items, **how)
    class Kill(Exception): pass
    real = AttentionModule.training_step
    def step(self, batch, b):
        if self.trainer.current_epoch == 3 and b == 2: raise Kill
        return real(self, batch, b)
    with monkeypatch.context() as m, pytest.raises(Kill):
        m.setattr(AttentionModule, "training_step", step)
        fit_attention(ptr, items, **how, folder=tmp_path)
    steps = []
    monkeypatch.setattr(AttentionModule, "training_step", lambda self, batch, b: (steps.append(self.trainer.current_epoch), real(self, batch, b))[1])
    resumed, after = fit_attention(ptr, items, **how, folder=tmp_path)
    assert set(steps) == {3, 4}, "the first three epochs were done already"
    assert after == losses and all(torch.equal(x, y) for x, y in zip(whole.parameters(), resumed.parameters()))
    assert len(list(tmp_path.iterdir())) == 1
    steps.clear()
    fit_attention(ptr, items, **(how | dict(seed=4)), folder=tmp_path)
    assert set(steps) == {0, 1, 2, 3, 4}, "another seed is another training"

def test_two_processes_take_the_steps_of_one(tmp_path):
    script = tmp_path/"train.py"
    script.write_text(textwrap.dedent("""
        import os, sys; sys.path.insert(0, sys.argv[1])
        import numpy as np, torch
        torch.set_num_threads(1)
        from test_attention import fit_attention, save_attention, sequences, two
        if __name__ == "__main__":
            for dropout in (0., 0.2):
                model, losses = fit_attention(*sequences(200), **two(dropout), folder=sys.argv[2] + "-state", strategy="ddp", devices=2)
                if os.environ["LOCAL_RANK"] == "0": save_attention(model, f"{sys.argv[2]}-{dropout}"); np.save(f"{sys.argv[2]}-{dropout}.npy", losses)
    """))
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(p for p in sys.path if p), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, script, os.path.dirname(__file__), tmp_path/"m"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for dropout in (0., 0.2):
        alone, losses = fit_attention(*sequences(200), **two(dropout))
        assert np.load(tmp_path/f"m-{dropout}.npy") == pytest.approx(losses, rel=0.05 if dropout else 1e-4)
        if not dropout: assert np.abs(load_attention(tmp_path/f"m-{dropout}").items - load_like(alone).items).max() < 1e-3  # the same sums in another order

def two(dropout): return dict(shape=Shape(items=30, dimensions=16, layers=1, length=15, dropout=dropout), epochs=6, batch_targets=128, learning_rate=0.01, seed=5)

@pytest.mark.parametrize("kw", [dict(), dict(smoothing=0., layers=1, heads=4), dict(attributes=0, layers=3)])
def test_without_torch_the_same_numbers(tmp_path, kw):
    model, _ = a_model(3, **kw)
    reader = load_attention(save_attention(model, tmp_path/"a"))
    rng = np.random.default_rng(0); size = rng.integers(0, 20, 60)
    ptr, items = np.r_[0, np.cumsum(size)], rng.integers(0, 50, size.sum()).astype(np.int32)
    found = queries(reader, ptr, items, block=16)
    with torch.no_grad():
        for i in range(60):
            prefix = items[ptr[i]:ptr[i + 1]][-12:]
            expected = model(torch.from_numpy(prefix[None].astype(np.int64)))[0, -1].numpy() if len(prefix) else np.zeros(16)
            assert np.abs(found[i] - expected).max() < 1e-5 and np.abs(query(reader, items[ptr[i]:ptr[i + 1]]) - expected).max() < 1e-5
        assert np.abs(reader.items - model.vectors(torch.arange(50)).numpy()).max() < 1e-6
    ids, score = nearest(reader, found, 50, ptr, items, block=7)
    for i in range(60):
        plain = found[i] @ reader.items.T; seen = set(items[ptr[i]:ptr[i + 1]].tolist())
        kept = ids[i][ids[i] >= 0]
        assert set(kept) == set(range(50)) - seen and (np.diff(score[i][:len(kept)]) <= 0).all() and np.allclose(plain[kept], score[i][:len(kept)], atol=1e-5)

def test_serving_never_loads_torch(tmp_path):
    save_attention(a_model()[0], tmp_path/"a")
    code = f"import sys, numpy as np\nfrom recsys.candidates.attention_infer import *\nprint(query(load_attention({str(tmp_path/'a')!r}), np.array([1, 2])).shape, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "(16,) False"

def test_what_cannot_be_trained_or_read_is_said_in_one_line(tmp_path):
    shape = Shape(items=3, dimensions=8, length=5)
    with pytest.raises(RecsysError, match="no sequence has two items"): fit_attention(np.array([0, 1, 2]), np.array([0, 1], np.int32), shape)
    with pytest.raises(RecsysError, match="cannot hold a window"): fit_attention(np.array([0, 2]), np.array([0, 1], np.int32), shape, batch_targets=4)
    with pytest.raises(RecsysError, match="no such file"): load_attention(tmp_path)
    save_attention(a_model()[0], tmp_path/"a"); (tmp_path/"a"/"norm_out.bias.npy").unlink()
    with pytest.raises(RecsysError, match="lacks norm_out.bias"): load_attention(tmp_path/"a")
    (tmp_path/"a"/"norm_in.bias.npy").write_bytes(b"not an array")
    with pytest.raises(RecsysError, match="cannot be read"): load_attention(tmp_path/"a")
