"Connections: whatever the pieces, the order and the pace in which bytes come, each request gets its own answer, and nobody takes more than is theirs."
import asyncio

import pytest
from hypothesis import given, settings, strategies as st

from recsys.serving.http import Front, Limits, Line, message, path_of

class Echo:
    "Says what it was asked; what is `/slow` a little later."
    def admit(self, asked): asked.request_id = asked.headers.get("x-request-id", "none")
    def reply(self, asked):
        if asked.refused: return message(asked, asked.refused.status, b"", asked.refused.body(), self.date)
        said = message(asked, 200, b"", asked.url + b"|" + asked.body, self.date)
        return self.slowly(said) if asked.url == b"/slow" else said
    async def slowly(self, said): await asyncio.sleep(.02); return said

async def _talk(pieces, limits, over):
    front = Front(Echo(), limits)
    server = await front.loop.create_server(lambda: Line(front), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    for p in pieces: writer.write(p); await writer.drain(); await asyncio.sleep(0)
    if over: writer.write_eof()
    said = await asyncio.wait_for(reader.read(), 20)
    writer.close(); await front.end(server, 1)
    assert not front.lines
    return said

def talk(*pieces, over=True, **limits) -> list[tuple[int, bytes]]:
    "(status, body) of each answer; `over`: nothing more will be said."
    said, out = asyncio.run(_talk(pieces, Limits(**limits), over)), []
    while said:
        head, _, rest = said.partition(b"\r\n\r\n")
        size = int(next(l for l in head.lower().split(b"\r\n") if l.startswith(b"content-length")).split()[1])
        out.append((int(head.split()[1]), rest[:size])); said = rest[size:]
    return out

def request(path=b"/", body=b"", more=b""): return b"POST %b HTTP/1.1\r\nhost: a\r\n%bcontent-length: %d\r\n\r\n%b" % (path, more, len(body), body)

@settings(max_examples=40, deadline=None)
@given(asked=st.lists(st.tuples(st.sampled_from([b"/fast", b"/slow"]), st.binary(max_size=40)), min_size=1, max_size=25), cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_each_gets_its_answer_in_order_however_the_bytes_come(asked, cuts):
    raw = b"".join(request(p, b) for p, b in asked)
    at = [0, *sorted(min(c, len(raw)) for c in cuts), len(raw)]
    assert talk(*(raw[a:z] for a, z in zip(at, at[1:]))) == [(200, p + b"|" + b) for p, b in asked]

def test_chunks_and_the_last_of_a_line():
    chunked = b"POST /c HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    assert talk(chunked, request(b"/x")) == [(200, b"/c|abcde"), (200, b"/x|")]
    assert talk(request(b"/x", more=b"connection: close\r\n") + request(b"/y"), over=False) == [(200, b"/x|")]
    assert talk(b"POST /old HTTP/1.0\r\n\r\n", over=False) == [(200, b"/old|")]

@pytest.mark.parametrize("raw,status", [
    (request(body=b"x" * 200), 413), (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + b"40\r\n" + b"x" * 64 + b"\r\n" + b"40\r\n" + b"x" * 64 + b"\r\n0\r\n\r\n", 413),
    (b"GET / HTTP/1.1\r\nx: " + b"y" * 600 + b"\r\n\r\n", 431), (b"GET /" + b"y" * 600 + b" HTTP/1.1\r\n\r\n", 431),
    (b"nonsense\r\n\r\n", 400), (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n", 400), (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 400)])
def test_what_is_too_much_or_ambiguous_is_refused(raw, status):
    assert [s for s, _ in talk(raw, head=500, body=100)] == [status]

def test_a_head_that_does_not_end_is_refused_while_it_comes():
    assert [s for s, _ in talk(b"GET / HTTP/1.1\r\nx: ", *[b"y" * 200] * 100, over=False, head=500)] == [431]

def test_who_falls_asleep_is_told_so_and_an_idle_line_is_closed():
    assert [s for s, _ in talk(request(body=b"abc")[:-1], over=False, seconds=.1)] == [408]
    assert [s for s, _ in talk(b"GET / HT", over=False, seconds=.1)] == [408]
    assert talk(request(), over=False, idle_seconds=.1) == [(200, b"/|")]

def test_who_does_not_take_answers_is_not_listened_to_and_cut():
    class Long(Echo):
        answers = 0
        def reply(self, asked): self.answers += 1; return message(asked, 200, b"", b"x" * 1_000_000, self.date)
    async def run():
        front = Front(app := Long(), Limits(send_seconds=.5))
        server = await front.loop.create_server(lambda: Line(front), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=1)
        writer.write(request() * 500)
        for _ in range(100):
            await asyncio.sleep(.1)
            if not front.lines: break
        left, answers = len(front.lines), app.answers
        writer.close(); await front.end(server, 1)
        return left, answers
    left, answers = asyncio.run(run())
    assert left == 0 and answers < 100

def test_the_end_waits_for_answers_but_not_for_idle_lines():
    async def run():
        front = Front(Echo())
        server = await front.loop.create_server(lambda: Line(front), "127.0.0.1", 0)
        (_, idle), (reader, writer) = [await asyncio.open_connection(*server.sockets[0].getsockname()) for _ in range(2)]
        writer.write(request(b"/slow"))
        while len(front.lines) < 2 or not any(l.busy for l in front.lines): await asyncio.sleep(.001)
        await front.end(server, 5)
        said = await asyncio.wait_for(reader.read(), 20)
        idle.close(); writer.close()
        return said
    said = asyncio.run(run())
    assert said.startswith(b"HTTP/1.1 200") and said.endswith(b"/slow|")

@pytest.mark.parametrize("url,path", [(b"/a%20b?c=d", "/a b"), (b"/%ff", "/\ufffd"), (b"http://h:1/x", "/x"), (b"/a#b", "/a")])
def test_paths(url, path): assert path_of(url) == path
