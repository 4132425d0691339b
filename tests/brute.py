"Random logs, and what should be known of them, by plain loops: for each row every event is looked at. Independent of the package's own code."
import math

import narwhals as nw, numpy as np, polars as pl
from hypothesis import strategies as st

from recsys.features.formulas import DAY, ENTITIES, TYPES, Aggregate, finish, compiled
from recsys.features.offline import sums_at, with_marks

INTS = ("kind", "ts", "known", "user", "item", "category", "session", "cents")
KEYS = ("user", "item", "category", "session")
START = 1_700_000_000
lazy = lambda df: nw.from_native(df.lazy())

def log_frame(events: list[tuple]) -> pl.DataFrame:
    "Tuples (event_id, *INTS) as a coded log."
    return pl.DataFrame(events, schema=dict(event_id=pl.String) | dict.fromkeys(INTS, pl.Int64), orient="row")

def row_frame(rows: list[tuple]) -> pl.DataFrame:
    "Tuples (row, t, *KEYS)."
    return pl.DataFrame(rows, schema=dict.fromkeys(("row", "t", *KEYS), pl.Int64), orient="row")

def batch(log: pl.DataFrame, rows: pl.DataFrame, aggregates) -> np.ndarray:
    "What the package's sweep finds, int64 [rows, aggregates], in the order of `rows`."
    got = sums_at(lazy(with_marks(lazy(log)).collect().to_native()), lazy(rows), tuple(aggregates)).collect().to_native()
    assert got["row"].is_unique().all() and got.height == rows.height and not any(got.null_count().row(0))
    return rows.select("row").join(got, on="row", how="left", maintain_order="left").drop("row").to_numpy().reshape(rows.height, len(aggregates))

# ---- the oracle

def aggregate(a: Aggregate, seen: list[dict], t: int) -> int:
    "An aggregate of the events `seen`, all of its key and known before t. Marks are counted as what they stand for: pairs and their purchases."
    mine = [e for e in seen if TYPES[e["kind"]] in a.types and (not a.seconds or e["ts"] >= t - a.seconds)]
    if a.op == "count": return len(mine)
    if a.op == "first": return min((e["ts"] for e in mine), default=2**62)
    if a.op == "last": return max((e["ts"] for e in mine), default=-1)
    if a.column == "cents": return sum(e["cents"] for e in mine)
    pairs = {}
    for e in mine:
        if TYPES[e["kind"]] == "purchase" and min(e["user"], e["item"]) >= 0: pairs.setdefault((e["user"], e["item"]), []).append(e["ts"])
    return sum(dict(fresh=1, again=len(p) > 1, stretch=max(p) - min(p))[a.column] for p in pairs.values())

def sums(log: pl.DataFrame, rows: pl.DataFrame, aggregates) -> np.ndarray:
    "int64 [rows, aggregates] by loops."
    events, out = log.to_dicts(), []
    for r in rows.to_dicts():
        seen = {e: [x for x in events if x["known"] < r["t"] and all(x[k] == r[k] >= 0 for k in by)] for e, by in ENTITIES.items()}
        out.append([aggregate(a, seen[a.entity], r["t"]) for a in aggregates])
    return np.array(out, np.int64).reshape(rows.height, len(aggregates))

def value(formula, given: dict, t: int) -> np.float32:
    "A formula on the aggregates `given`, in Python's floats."
    v, (x, y) = [given[a] for a in formula.of], formula.numbers
    days = lambda a: (t - a) / DAY
    match formula.op:
        case "amount": got = float(v[0])
        case "rate": got = (v[0] + x) / (v[1] + x + y)
        case "days_since": got = days(v[0]) if v[1] else 999.
        case "interval": got = (v[1] - v[0]) / DAY / (v[2] - 1) if v[2] > 1 else -1.
        case "mean": got = v[0] / x / v[1] if v[1] else -1.
        case "trend": got = math.log((v[0] + 1) / (v[1] * x + 1))
        case "ratio": got = (v[0] / v[1]) / (v[2] / v[3]) if v[1] and v[2] and v[3] else -1.
    return np.float32(got)

def features(formulas, aggregates, sums: np.ndarray, t) -> np.ndarray:
    "float32 [rows, formulas] from the oracle's sums."
    return np.array([[value(f, dict(zip(aggregates, s.tolist())), m) for f in formulas] for s, m in zip(sums, t)], np.float32).reshape(len(sums), len(formulas))

# ---- random logs

EDGES = (1, 3600, DAY, 7 * DAY, 30 * DAY)
moments = st.one_of(st.integers(0, 5), st.sampled_from([0, 3599, 3600, 3601, DAY - 1, DAY, DAY + 1, 7 * DAY - 1, 7 * DAY, 7 * DAY + 1, 30 * DAY, 40 * DAY]), st.integers(0, 60 * DAY))
delays = st.one_of(st.sampled_from([0, 0, 0, 1, 5, 3599, 3600, DAY, 8 * DAY, 31 * DAY]), st.integers(0, 45 * DAY))

@st.composite
def logs(draw, size: int = 30):
    "A small log: few keys, ties in ts and known, late by seconds or weeks; an item has one category."
    fields = st.tuples(st.integers(0, len(TYPES) - 1), moments, delays, st.integers(0, 2), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9999))
    events = draw(st.lists(fields, max_size=size))
    names = draw(st.permutations(range(len(events))))
    return log_frame([(f"e{names[i]:02}", k, START + m, START + m + d, u, item, item % 2, s, c) for i, (k, m, d, u, item, s, c) in enumerate(events)])

@st.composite
def asked(draw, log: pl.DataFrame, size: int = 8):
    "Rows at the moments of events, at the edges of their windows and a second beside; keys that nobody knows, rows twice."
    times = sorted({*log["ts"], *log["known"]}) or [START]
    places = draw(st.lists(st.tuples(st.sampled_from(times), st.sampled_from([0, *EDGES]), st.integers(-1, 1), st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=size))
    places += draw(st.lists(st.sampled_from(places), max_size=2))
    numbers = draw(st.permutations(range(len(places))))
    return row_frame([(numbers[i] * 3, t + w + d, u, item, item % 2, s) for i, (t, w, d, u, item, s) in enumerate(places)])

def random_log(n: int, seed: int, days: int = 50, late: float = .2, lateness: int = 3 * DAY, users: int = 20, items: int = 30, sessions: int = 200) -> pl.DataFrame:
    "A larger log in numpy."
    rng = np.random.default_rng(seed)
    ts, item = START + rng.integers(0, days * DAY, n), rng.integers(0, items, n)
    return pl.DataFrame(dict(event_id=[f"e{i:07}" for i in rng.permutation(n)], kind=rng.integers(0, len(TYPES), n), ts=ts, known=ts + np.where(rng.random(n) < late, rng.integers(0, lateness, n), rng.integers(0, 3, n)),
                             user=rng.integers(0, users, n), item=item, category=item % 7, session=rng.integers(0, sessions, n), cents=rng.integers(0, 9999, n)))

def random_rows(n: int, seed: int, days: int = 60, users: int = 20, items: int = 30, sessions: int = 200) -> pl.DataFrame:
    rng = np.random.default_rng(seed + 1)
    item = rng.integers(0, items + 2, n)
    return pl.DataFrame(dict(row=rng.permutation(n), t=START + rng.integers(0, days * DAY, n), user=rng.integers(0, users + 2, n), item=item, category=item % 7, session=rng.integers(0, sessions + 5, n)))
