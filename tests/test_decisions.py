"What is decided: the same from the same, never to and fro, within its budget, and with reasons that are true."
import os, random, signal, subprocess, sys, time
from collections import Counter
from datetime import date, timedelta

import msgspec
from hypothesis import given, settings, strategies as st

from recsys.core.files import read_journal
from recsys.core.settings import load_settings
from recsys.operations.decisions import (ACTIONS, INPUTS, KINDS, SEVERITIES, Decision, Finding, Policy, decide, encode, note_person, policy_of, read_decisions,
                                         settle, sorted_findings, unsound)

USUAL = policy_of(load_settings())
DAY = date(2026, 1, 1)
day_of = lambda d: date.fromisoformat(d.day[:10])

findings = st.builds(Finding, st.sampled_from(KINDS), st.sampled_from(["a", "b"]), st.sampled_from(SEVERITIES), st.sampled_from([.1, .25, -3.]), st.just(.1), st.just("2026-01-01"),
                     since=st.sampled_from(["", "2025-12-20", "2026-01-05T10:00:00Z"]), word=st.sampled_from([""] * 6 + ["approved", "vetoed", "false"]))
# days apart (0: once more on the same day), and what was found then
mixed = st.lists(st.tuples(st.sampled_from([1, 1, 1, 1, 0, 2, 5]), st.lists(findings, max_size=4)), min_size=1, max_size=40)
# few different days over and over, which is what makes a policy flap
cycles = st.builds(lambda days, times: [(1, found) for found in days * times], st.lists(st.lists(findings, max_size=2), min_size=1, max_size=4), st.integers(5, 10))
streams = st.one_of(mixed, cycles, cycles)
policies = st.one_of(st.just(USUAL), st.builds(Policy, st.fixed_dictionaries({k: st.sampled_from(ACTIONS) for k in KINDS}), st.fixed_dictionaries({k: st.sampled_from(ACTIONS) for k in KINDS}),
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(0, 10), st.integers(0, 3), st.integers(1, 3), st.integers(1, 4)))

def played(stream, policy) -> list[Decision]:
    "The decisions of a stream of findings."
    today, history = DAY, []
    for k, (gap, found) in enumerate(stream):
        today += timedelta(days=gap)
        history.append(decide(found, history, policy, today.isoformat(), str(k)))
    return history

def most_in_a_week(days: list[date]) -> int: return max([sum(d <= e < d + timedelta(days=7) for e in days) for d in days], default=0)

@given(streams, policies, st.randoms())
def test_the_same_inputs_give_the_same_bytes_in_any_order(stream, policy, rng):
    shuffled = [(gap, rng.sample(found, len(found)) + found[:1]) for gap, found in stream]
    assert [encode(d) for d in played(stream, policy)] == [encode(d) for d in played(shuffled, policy)]

def test_another_process_gives_the_same_bytes():
    code = """if 1:
        from recsys.operations.decisions import *
        from recsys.core.settings import load_settings
        found = [Finding(k, w, s, .25, .1, "2026-01-01") for k in KINDS for w in "ab" for s in SEVERITIES[1:]]
        print(encode(decide(found, [], policy_of(load_settings()), "2026-01-02")).decode())"""
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | dict(PYTHONHASHSEED=s)).stdout for s in "017"}
    assert len(said) == 1 and '"fall_back"' in said.pop()

@given(streams, policies)
def test_a_fallback_is_never_refused_and_never_flaps(stream, policy):
    history = played(stream, policy)
    for d in history: assert d.fallback or "fall_back" not in d.calls.values()
    assert most_in_a_week([day_of(d) for d in history if d.action == "fall_back"]) <= policy.fall_backs_per_week
    for k, (before, d) in enumerate(zip([Decision("", "", ""), *history], history)):
        assert (d.action == "fall_back") == bool(d.fallback and not before.fallback)
        if before.fallback and not d.fallback:  # it comes back: the last days were clean, all of them
            recent = sorted({day_of(e) for e in history[:k + 1]})[-policy.clear_days:]
            assert len(recent) == policy.clear_days
            assert not any("fall_back" in e.calls.values() or unsound(e.findings) for e in history[:k + 1] if day_of(e) in recent)

@given(streams, policies)
def test_learning_keeps_its_pauses_and_its_budget(stream, policy):
    history = played(stream, policy)
    learned = [day_of(d) for d in history if d.action in ("retrain", "refresh")]
    assert all(b - a >= timedelta(days=policy.cooldown_days) for a, b in zip(learned, learned[1:]))
    assert most_in_a_week([day_of(d) for d in history if d.action == "retrain"]) <= policy.retrains_per_week
    for d in history:
        if d.action in ("retrain", "refresh"): assert not [f for f in d.findings if f.severity == "critical" and f.kind in INPUTS and not f.word]

@given(streams, policies)
def test_a_warning_waits_for_its_days_and_every_act_has_a_cause(stream, policy):
    history = played(stream, policy)
    for k, d in enumerate(history):
        days = sorted({day_of(e) for e in history[:k + 1]})[-policy.persist_days:]
        for f in d.findings:
            if f.severity == "warning" and f.key in d.calls:
                assert len(days) == policy.persist_days
                for day in days: assert any(f.key == g.key and g.severity != "info" for e in history[:k + 1] if day_of(e) == day for g in e.findings)
            if f.severity == "info" or f.word in ("approved", "false"): assert f.key not in d.calls
        if d.action != "nothing": assert d.calls
        assert d.because

@given(streams, policies)
def test_what_would_have_changed_it_is_true(stream, policy):
    history = played(stream, policy)
    d, before = history[-1], history[:-1]
    for c in d.would_have_changed:
        assert (c.action, c.fallback) != (d.action, d.fallback)
        if " stayed within " in c.had:
            key = c.had.partition(" stayed")[0]
            other = decide([f for f in d.findings if f.key != key], before, policy, d.day)
        elif c.had == "there been no cool-down": other = decide(d.findings, before, msgspec.structs.replace(policy, cooldown_days=0), d.day)
        elif c.had == "there been no budget": other = decide(d.findings, before, msgspec.structs.replace(policy, retrains_per_week=10**9, fall_backs_per_week=10**9), d.day)
        elif c.had.startswith("none of the"): other = decide([f for f in d.findings if f.kind != c.had.split(" findings about ")[1].split()[0]], before, policy, d.day)
        elif c.had.startswith("nobody said"):
            key = c.had.split(" of ", 1)[1]
            other = decide([msgspec.structs.replace(f, word="") if f.key == key else f for f in d.findings], before, policy, d.day)
        elif c.had == "fewer clean days been asked for": other = decide(d.findings, before, msgspec.structs.replace(policy, clear_days=1), d.day)
        else:
            assert " days in a row " in c.had
            key, days = c.had.partition(" been there")[0], sorted({day_of(e) for e in before if day_of(e) < day_of(d)})[-policy.persist_days:]
            f = next(f for f in d.findings if f.key == key)
            filler = [msgspec.structs.replace(e, findings=sorted_findings([*e.findings, f])) for e in before]
            if len(days) < policy.persist_days - 1: continue  # there were not so many days
            other = decide(d.findings, filler, policy, d.day)
        assert (other.action, other.fallback) == (c.action, c.fallback), c.had

@given(st.sampled_from(["approved", "false"]), st.sampled_from(INPUTS))
def test_a_word_that_lets_something_through_is_among_what_would_have_changed_it(word, kind):
    d = decide([Finding(kind, "price", "critical", 1., .02, "2026-01-01", word=word)], [], USUAL, "2026-01-01")
    assert d.action == "nothing" and [(c.had, c.action) for c in d.would_have_changed] == [(f"nobody said '{word}' of {kind}:price", USUAL.critical[kind])]

def test_what_is_learned_is_said_in_words():
    "One finding, on record for as many days as a warning needs, for each of the two ways to learn."
    for kind, verb in (("concept", "retrains"), ("data", "refreshes")):
        said = played([(1, [Finding(kind, "price", "warning", 1., .02, "2026-01-01")])] * USUAL.persist_days, USUAL)[-1]
        assert said.action == USUAL.warning[kind] and said.because.startswith(f"{verb} because of {kind}:price"), said

@given(st.lists(findings, max_size=4), policies)
def test_what_does_not_change_is_decided_once(found, policy):
    "A stream of the same findings falls back at most once and then stays; without findings nothing is done at all."
    history = played([(1, found)] * 20, policy)
    assert Counter(d.action for d in history)["fall_back"] <= 1
    assert len({d.fallback for d in history[policy.persist_days:]}) == 1
    assert {d.action for d in played([(1, [])] * 10, policy)} == {"nothing"}

@given(streams, policies)
def test_the_figures_of_a_fallback_are_no_reason_to_learn_or_to_ask(stream, policy):
    history = played(stream, policy)
    for k, d in enumerate(history):
        days = [day_of(e) for e in history[:k] if e.fallback]
        if days and day_of(d) - days[-1] < timedelta(days=7) or k and history[k - 1].fallback:
            assert not [f for f in d.findings if f.kind in ("prediction", "business") and d.calls.get(f.key, "fall_back") != "fall_back"]

def test_a_level_set_by_a_person_stays_until_a_person_ends_it(tmp_path):
    log, bad = tmp_path/"d.jsonl", Finding("attribution", "price", "critical", 0., .1, "2026-01-01")
    assert settle(log, [bad], USUAL, "2026-01-01", "1").fallback == USUAL.fallback_level
    note_person(log, "2026-01-02", USUAL.fallback_level, "mine now", "Ada")  # the same level, another owner
    assert {settle(log, [], USUAL, f"2026-01-{k:02}", str(k)).fallback for k in range(3, 15)} == {USUAL.fallback_level}
    note_person(log, "2026-01-15", 0, "done", "Ada")
    assert settle(log, [], USUAL, "2026-01-16", "16").fallback == 0

def test_a_run_of_an_earlier_day_sees_only_what_was_decided_by_then(tmp_path):
    log, slow = tmp_path/"d.jsonl", Finding("concept", "click", "warning", .8, 1., "2026-01-01")
    late = [settle(log, [slow], USUAL, f"2026-02-0{k}", f"late {k}") for k in (1, 2)]
    early = [settle(log, [slow], USUAL, f"2026-01-0{k}", f"early {k}") for k in (1, 2)]
    assert [d.action for d in early] == [d.action for d in late] == ["nothing", "retrain"]

WRITER = """if 1:
    import sys
    from recsys.core.settings import load_settings
    from recsys.operations.decisions import *
    policy, bad = policy_of(load_settings()), Finding("concept", "x", "critical", 1., .1, "2026-01-01")
    print("go", flush=True)
    for k in range(2000): settle(sys.argv[1], [bad], policy, f"2026-{1 + k // 280:02}-{1 + k // 10 % 28:02}", str(k))"""

def test_killed_at_any_moment_it_decides_each_run_once(tmp_path):
    "Two writers at a time, killed again and again: what is in the log is what one undisturbed writer leaves."
    log = tmp_path/"d.jsonl"
    start = lambda: subprocess.Popen([sys.executable, "-c", WRITER, str(log)], stdout=subprocess.PIPE)
    for k in range(3):
        both = [start(), start()]
        for p in both: p.stdout.readline()
        time.sleep(random.Random(k).uniform(.05, .4))
        for p in both: p.send_signal(signal.SIGKILL); p.wait()
        if k == 1: log.open("ab").write(b'{"day":"2026-')  # what a kill in the middle of a line leaves
    found = read_decisions(log)
    assert len(found) == len({d.of for d in found}) > 2 and [d.of for d in found] == [str(k) for k in range(len(found))]
    alone = []
    for d in found: alone.append(decide(d.findings, alone, USUAL, d.day, d.of))
    assert [encode(d) for d in alone] == read_journal(log)
