"Kernels are compiled by a process of its own, once."
import os, subprocess, sys

import pytest

from recsys.serving.compiled import compile_first, _kept, digest_of
from test_serving import BUDGET, PER_SOURCE, publish

RUN = "import sys; from recsys.serving.compiled import compile_first; compile_first(sys.argv[1], 12, 30, print)"
WARM = """import sys, psutil
from recsys.serving.service import open_engine
open_engine(sys.argv[1], 12, 30); p = psutil.Process()
print(f"{sum(m.private_dirty for m in p.memory_maps()) / 2**20:.0f} MB of its own, {sum(p.cpu_times()[:2]):.0f} CPU s")"""

def ask(bundle, code=RUN, **env):
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], env=os.environ | env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout

def test_it_is_done_once_and_again_when_the_mark_is_gone(tmp_path):
    bundle = publish(tmp_path)
    ask(bundle)
    mark = _kept()/f"compiled-{digest_of(bundle)}"
    assert mark.exists() and ask(bundle) == ""
    mark.unlink()
    assert "compiling" in ask(bundle) and mark.exists()

def test_a_bundle_that_cannot_be_opened_leaves_no_mark_and_says_nothing(tmp_path, capfd):
    bundle = publish(tmp_path)
    (bundle/"state"/"segment.npy").unlink()
    said = []
    (_kept()/f"compiled-{digest_of(bundle)}").unlink(missing_ok=True)
    for _ in range(2): compile_first(bundle, PER_SOURCE, BUDGET, said.append)
    assert said == [] and capfd.readouterr().err == "" and not (_kept()/f"compiled-{digest_of(bundle)}").exists()

@pytest.mark.bench
def test_a_worker_compiles_nothing_afterwards(tmp_path):
    "With a cache of its own, which takes a minute to fill: numba writes what it compiles, and writes nothing more."
    bundle, cache = publish(tmp_path), tmp_path/"cache"
    print("a process that compiles:", ask(bundle, WARM, NUMBA_CACHE_DIR=str(tmp_path/"other")))
    assert "compiling" in ask(bundle, NUMBA_CACHE_DIR=str(cache)) and any(cache.rglob("*.nbc"))
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.nb*")}
    print("one that comes afterwards:", ask(bundle, WARM, NUMBA_CACHE_DIR=str(cache)))
    assert files == {p: p.stat().st_mtime_ns for p in cache.rglob("*.nb*")}
