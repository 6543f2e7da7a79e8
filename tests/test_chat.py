"""chat.py and sample.py --endpoint against a real HTTP server on loopback, which answers, fails, stalls and
returns rubbish."""

import base64
import io
import json
import logging
import re
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image

from minicot.chat import KEY, SHUT_OUT, ChatError, Endpoint, Reply, describe_failures, many, picture
from minicot.errors import InputError
from minicot.records import Problem, read_samples
from minicot.synthesis import synthesise
from minicot.toy import pictures, problems
from tests.helpers import assert_one_line_error, finished, jsonl, script, start

SECRET = "sk-this-is-secret-0123456789"
HELLO = [{"role": "user", "content": "Hello?"}]


def completion(text, finish="stop"):
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]
    }


class Slow(bytes):
    """A content that is sent a byte every 50 ms."""

    def __iter__(self):
        for place in range(len(self)):
            time.sleep(0.05)
            yield self[place : place + 1]


class Server:
    """`plan` maps a request (body, headers, path, number) to what is sent: an object, (status, headers,
    bytes), a text to reply with, or a number of seconds after which the server hangs up without a word."""

    def __init__(self, plan):
        self.plan, self.seen, self.served, self.busy, self.most_busy = plan, [], [], 0, 0
        self.lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.seen)
                    request = SimpleNamespace(body=body, headers=self.headers, path=self.path, number=number)
                    outer.seen.append(request)
                    outer.busy += 1
                    outer.most_busy = max(outer.busy, outer.most_busy)
                try:
                    made = outer.plan(request)
                    if isinstance(made, (int, float)):
                        self.close_connection = True
                        return time.sleep(made)
                finally:
                    with outer.lock:
                        outer.busy -= 1
                        outer.served.append(number)
                made = completion(made) if isinstance(made, str) else made
                made = (200, {}, json.dumps(made).encode()) if isinstance(made, dict) else made
                status, headers, content = made
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": len(content), **headers}.items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    for piece in content if isinstance(content, Slow) else [content]:
                        self.wfile.write(piece)
                except OSError:
                    pass  # the client has left

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve():
    """serve(plan) -> a running Server."""
    servers = []

    def begin(plan):
        servers.append(Server(plan))
        return servers[-1]

    yield begin
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(autouse=True)
def no_proxy_and_no_key(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def endpoint(server, **settings):
    url = server if isinstance(server, str) else server.url
    return Endpoint(url, "tiny", **{"backoff": 0.01, "timeout": 5.0, **settings})


def in_turn(*made):
    """A plan that goes through these and stays at the last."""
    return lambda request: made[min(request.number, len(made) - 1)]


def absent():
    """The URL of a port where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}/v1"


# ---- one request ---------------------------------------------------------------------------------


def test_a_chat_is_a_callable_from_messages_to_text(serve):
    server = serve(in_turn("Hi.", completion("Hi the", "length"), completion("", "eos_token")))
    chat = endpoint(server, temperature=0.5, max_tokens=7)
    assert chat(HELLO) == "Hi."
    assert chat.answer(HELLO, seed=3) == Reply("Hi the", "length")
    assert chat.answer(HELLO) == Reply("", "stop")
    first, second = (request.body for request in server.seen[:2])
    assert first == {"model": "tiny", "messages": HELLO, "temperature": 0.5, "max_tokens": 7, "seed": 0}
    assert second == {**first, "seed": 3}
    full = endpoint(server, top_p=0.9, top_k=5)
    full(HELLO)
    assert server.seen[-1].body["top_p"] == 0.9 and server.seen[-1].body["top_k"] == 5
    assert {request.path for request in server.seen} == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    "url, address",
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/", "http://h:8000/v1/chat/completions"),
        ("https://h/v1/", "https://h/v1/chat/completions"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai/chat/completions"),
        ("http://[::1]:80/v1/chat/completions", "http://[::1]:80/v1/chat/completions"),
    ],
)
def test_where_requests_go(url, address):
    assert Endpoint(url, "m").address == address


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h/v1", "", "http://", "http:///v1"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InputError, match=re.escape(f"the endpoint is {url!r}; allowed: http(s)://")):
        Endpoint(url, "m")


@pytest.mark.parametrize("url", ["http://me:{}@h/v1", "http://h/v1?key={}", "http://h/v1#{}"])
def test_a_url_with_credentials_is_refused_without_showing_them(url):
    with pytest.raises(InputError, match=KEY) as error:
        Endpoint(url.format(SECRET), "m")
    assert SECRET not in str(error.value)


def test_a_schema_reaches_the_server_as_it_is_and_a_reply_that_is_no_json_is_broken(serve, tmp_path):
    server = serve(in_turn("Sure! Here it is.", '{"b": "2", "a": null}'))
    schema = {
        "type": "object",
        "properties": {"b": {"type": "string"}, "a": {"const": None, "default": None}},
    }
    judge = endpoint(server, schema=schema, cache=tmp_path)
    assert json.loads(judge(HELLO)) == {"b": "2", "a": None} and len(server.seen) == 2
    sent = server.seen[0].body["response_format"]
    assert sent["type"] == "json_schema" and sent["json_schema"]["schema"] == schema
    assert list(sent["json_schema"]["schema"]["properties"]) == ["b", "a"]


def test_a_picture_goes_as_a_data_url(serve):
    server, drawn = serve(in_turn("red")), Image.new("RGB", (3, 2), (250, 10, 10))
    content = [{"type": "text", "text": "Which colour?"}, picture(drawn)]
    assert endpoint(server)([{"role": "user", "content": content}]) == "red"
    kind, _, data = server.seen[0].body["messages"][0]["content"][1]["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == drawn.tobytes()


# ---- failures ------------------------------------------------------------------------------------

RUBBISH = {
    "html": b"<!DOCTYPE html><html><body>Welcome</body></html>",
    "cut": b'{"choices": [{"message": {"content": "Hi',
    "empty": b"",
    "list": b"[1]",
    "no choices": b"{}",
    "empty choices": b'{"choices": []}',
    "an error": b'{"error": {"message": "no such model"}}',
    "null content": json.dumps(completion(None)).encode(),
    "a number": json.dumps(completion(3)).encode(),
    "a list of parts": json.dumps(completion([{"type": "text", "text": "Hi"}])).encode(),
    "unknown finish": json.dumps(completion("Hi", "tool_calls")).encode(),
    "no finish": json.dumps(completion("Hi", None)).encode(),
    "finish of a list": json.dumps(completion("Hi", ["stop"])).encode(),
    "half a character": json.dumps(completion("\ud800")).encode(),
    "not utf-8": b'{"choices": "\xff\xfe"}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=RUBBISH)
def test_a_broken_reply_is_asked_for_again_and_never_kept(serve, tmp_path, rubbish):
    server = serve(in_turn((200, {}, rubbish), "Hi."))
    chat = endpoint(server, cache=tmp_path)
    assert chat(HELLO) == "Hi." and len(server.seen) == 2 and chat.events.count("again") == 1
    always = endpoint(serve(in_turn((200, {}, rubbish))), cache=tmp_path, tries=2)
    with pytest.raises(ChatError, match="^broken reply: ") as error:
        always(HELLO)
    assert error.value.reason == "broken reply" and len(str(error.value)) < 330
    assert len(list(tmp_path.rglob("*.json"))) == 1 and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("content", [b'{"error": "busy"}', b"[1]", b"<html>"])
def test_a_busy_server_is_asked_again(serve, status, content):
    server = serve(in_turn((status, {}, content), (status, {}, content), "Hi."))
    assert endpoint(server, tries=3)(HELLO) == "Hi." and len(server.seen) == 3
    with pytest.raises(ChatError, match=f"^HTTP {status}: ") as error:
        endpoint(serve(in_turn((status, {}, content))), tries=2)(HELLO)
    assert error.value.reason == f"HTTP {status}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_not_asked_again(serve, status):
    server = serve(in_turn((status, {}, b'{"error": {"message": "prompt too\\nlong"}}'), "Hi."))
    with pytest.raises(ChatError, match=f"HTTP {status}: .*prompt too"):
        endpoint(server)(HELLO)
    assert len(server.seen) == 1


def test_retry_after_is_honoured(serve):
    server, began = serve(in_turn((429, {"Retry-After": "1"}, b""), "Hi.")), time.monotonic()
    assert endpoint(server)(HELLO) == "Hi." and time.monotonic() - began >= 1
    server, began = (
        serve(in_turn((429, {"Retry-After": "86400"}, b"come back tomorrow"), "Hi.")),
        time.monotonic(),
    )
    with pytest.raises(ChatError, match="HTTP 429: come back tomorrow"):
        endpoint(server)(HELLO)
    assert len(server.seen) == 1 and time.monotonic() - began < 5
    server = serve(in_turn((429, {"Retry-After": "soon"}, b""), "Hi."))
    assert endpoint(server)(HELLO) == "Hi."


def test_waits_grow_and_are_not_all_the_same(serve, monkeypatch):
    waits = []
    monkeypatch.setattr("minicot.chat.time", SimpleNamespace(sleep=waits.append))
    for _ in range(8):
        with pytest.raises(ChatError):
            endpoint(serve(in_turn((500, {}, b""))), backoff=4.0, tries=7)(HELLO)
    for i, longest in enumerate([4, 8, 16, 32, 60, 60]):
        same_try = waits[i::6]
        assert all(longest / 2 <= wait <= longest for wait in same_try) and len(set(same_try)) == 8


def test_a_stalled_request_times_out_and_is_asked_again(serve):
    server, began = serve(in_turn(3, "Hi.")), time.monotonic()
    assert endpoint(server, timeout=0.2)(HELLO) == "Hi."
    assert len(server.seen) == 2 and time.monotonic() - began < 2
    with pytest.raises(ChatError) as error:
        endpoint(serve(in_turn(3)), timeout=0.1, tries=2)(HELLO)
    assert error.value.reason == "ReadTimeout" and time.monotonic() - began < 3


def test_a_server_that_hangs_up_or_is_not_there(serve):
    assert endpoint(serve(in_turn(0, "Hi.")))(HELLO) == "Hi."  # it closes without a word
    with pytest.raises(ChatError, match="Connection refused") as error:
        endpoint(absent())(HELLO)
    assert error.value.reason == "ConnectError"


@pytest.mark.parametrize("case", ["401", "absent"])
def test_a_server_that_lets_nobody_in_is_left_alone(serve, case):
    server = serve(in_turn((401, {}, b"no")))
    chat = endpoint(server if case == "401" else absent())
    replies = list(many(chat, [HELLO] * 200, limit=4))
    assert all(isinstance(reply, ChatError) for reply in replies)
    assert (
        chat.events.count("sent") < (SHUT_OUT + 4) * (1 if case == "401" else chat.tries)
        and len(replies) == 200
    )
    told = describe_failures(replies)
    assert told.startswith("200 of 200 requests failed (") and "x not sent" in told


def test_a_server_that_let_some_in_is_asked_on(serve):
    server = serve(lambda request: "Hi." if request.number % 25 == 0 else (401, {}, b"no"))
    chat = endpoint(server)
    replies = list(many(chat, [HELLO] * 100, limit=1))
    assert len(server.seen) == 100 and replies.count("Hi.") == 4


# ---- the cache -----------------------------------------------------------------------------------


def test_what_was_answered_is_not_asked_again(serve, tmp_path):
    server = serve(lambda request: completion(f"reply {request.number}", "length"))
    first = endpoint(server, cache=tmp_path).answer(HELLO, seed=1)
    again = endpoint(server, cache=tmp_path)
    assert again.answer(HELLO, seed=1) == first == Reply("reply 0", "length") and len(server.seen) == 1
    assert again.events == ["cached"]
    entry = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert entry.keys() == {"request", "model", "text", "finish"}


@pytest.mark.parametrize(
    "changed",
    [
        dict(seed=1),
        dict(messages=[{"role": "user", "content": "Hello"}]),
        dict(messages=[{"role": "system", "content": "Be brief."}, *HELLO]),
        dict(model="other"),
        dict(temperature=0.0),
        dict(top_p=0.5),
        dict(top_k=3),
        dict(max_tokens=9),
        dict(schema={"type": "object"}),
    ],
    ids=str,
)
def test_any_other_request_is_another_entry(serve, tmp_path, changed):
    server = serve(lambda request: str(request.number))
    settings = dict(url=server.url, model="tiny", cache=tmp_path)
    assert Endpoint(**settings).answer(HELLO).text == "0"
    messages, seed = changed.pop("messages", HELLO), changed.pop("seed", 0)
    assert Endpoint(**settings | changed).answer(messages, seed=seed).text == "1"
    assert Endpoint(**settings).answer(HELLO).text == "0" and len(server.seen) == 2


def test_another_server_is_another_entry(serve, tmp_path):
    texts = [endpoint(serve(in_turn(text)), cache=tmp_path)(HELLO) for text in ("one", "two")]
    assert texts == ["one", "two"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"request": "',
        b"\x00\xff\x80",
        b"[]",
        b"3",
        b'{"text": "x"}',
        b'{"request": "of another", "text": "x", "finish": "stop"}',
        b'{"text": "x", "finish": "burnt", "request": "OWN"}',
        b'{"text": 3, "finish": "stop", "request": "OWN"}',
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_corrupt_entry_is_ignored_counted_and_replaced(serve, tmp_path, content):
    server = serve(in_turn("Hi."))
    endpoint(server, cache=tmp_path)(HELLO)
    entry = next(tmp_path.rglob("*.json"))
    whole = entry.read_bytes()
    entry.write_bytes(content.replace(b"OWN", entry.stem.encode()))
    chat = endpoint(server, cache=tmp_path)
    assert chat(HELLO) == "Hi." and len(server.seen) == 2
    assert chat.events.count("corrupt") == 1 and entry.read_bytes() == whole


def test_failures_are_not_kept_and_no_cache_is_none(serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = serve(in_turn((400, {}, b"no"), "Hi."))
    chat = endpoint(server, cache=tmp_path / "cache")
    with pytest.raises(ChatError):
        chat(HELLO)
    assert chat(HELLO) == "Hi." == endpoint(server)(HELLO) and len(server.seen) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# ---- the key -------------------------------------------------------------------------------------


def test_the_key_is_sent_and_kept_nowhere(serve, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setenv(KEY, f" {SECRET}\n")
    caplog.set_level(logging.DEBUG)
    said = lambda request: f"no entry with {request.headers['Authorization']}, {'x' * 150}{SECRET}".encode()
    plan = lambda request: "Hi." if request.number else (401, {}, said(request))
    server = serve(plan)
    chat = endpoint(server, cache=tmp_path)
    with pytest.raises(ChatError, match=r"no entry with Bearer \*\*\*, x") as error:
        chat(HELLO)
    assert chat(HELLO) == "Hi."
    assert {request.headers["Authorization"] for request in server.seen} == {f"Bearer {SECRET}"}
    shown = capsys.readouterr()
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "Hi." in written and caplog.text and error.value.__cause__ is None
    texts = [str(error.value), repr(error.value), repr(chat), chat.preview(HELLO), caplog.text, written]
    for text in [*texts, shown.out, shown.err, json.dumps(server.seen[0].body), repr(vars(chat))]:
        assert SECRET not in text and SECRET[:15] not in text


@pytest.mark.parametrize("key", [SECRET, "sk/of-a\\path/0123456789"])
def test_no_reply_brings_the_key_into_an_error_or_the_cache(serve, tmp_path, monkeypatch, key):
    monkeypatch.setenv(KEY, key)
    escaped = json.dumps({"error": key}).replace("/", r"\/").encode()
    replies = [
        completion(f"It is {key}."),
        completion("Hi", finish=key),
        completion(f"{'x' * 40}{key}\ud800"),
    ]
    for made in [*replies, (400, {}, escaped), (200, {}, escaped)]:
        with pytest.raises(ChatError) as error:
            endpoint(serve(lambda request: made), cache=tmp_path, tries=1)(HELLO)  # noqa: B023
        assert key[:12] not in str(error.value) and key[-10:] not in str(error.value), made
    assert not list(tmp_path.rglob("*.json"))


def test_a_short_key_is_a_word_that_a_reply_may_hold(serve, monkeypatch):
    monkeypatch.setenv(KEY, "EMPTY")
    assert endpoint(serve(in_turn("The set is EMPTY.")))(HELLO) == "The set is EMPTY."


def test_a_reply_that_trickles_is_given_up(serve):
    """No single byte takes as long as the time-out."""

    def trickle(request):
        content = json.dumps(completion("Hi." + " " * 100)).encode()
        return 200, {}, Slow(content)

    began = time.monotonic()
    with pytest.raises(ChatError, match="TimeoutError: after 0.5 s its reply has not ended"):
        endpoint(serve(trickle), timeout=0.5, tries=1)(HELLO)
    assert 0.5 <= time.monotonic() - began < 3


def test_no_key_means_none_sent_not_even_hugging_faces(serve, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = serve(in_turn("Hi."))
    assert endpoint(server)(HELLO) == "Hi."
    assert server.seen[0].headers["Authorization"] is None


@pytest.mark.parametrize("key", [f"{SECRET} {SECRET}", f"{SECRET}\n{SECRET}", f"{SECRET}é"])
def test_what_no_header_takes_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(InputError, match=KEY) as error:
        Endpoint("http://h", "m")
    assert SECRET not in str(error.value)


def test_offline_mode_is_said_before_anything_is_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        Endpoint("http://h", "m")


# ---- many requests -------------------------------------------------------------------------------


def of(i):
    return [{"role": "user", "content": str(i)}]


def asked(request):
    return request.body["messages"][-1]["content"]


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_are_under_way_than_the_limit_and_the_order_stays(serve, limit):
    def plan(request):
        time.sleep(0.01 + 0.03 * (int(asked(request)) % 3 == 0))
        return f"reply to {asked(request)}"

    server = serve(plan)
    replies = list(many(endpoint(server), [of(i) for i in range(20)], limit=limit))
    assert replies == [f"reply to {i}" for i in range(20)] and server.most_busy == limit


def test_one_failing_request_costs_itself_alone(serve):
    server = serve(lambda request: (400, {}, b"too long") if asked(request) == "3" else "Hi.")
    replies = list(many(endpoint(server), [of(i) for i in range(6)]))
    assert [isinstance(reply, ChatError) for reply in replies] == [False] * 3 + [True] + [False] * 2
    assert describe_failures(replies) == (
        "1 of 6 requests failed (1 x HTTP 400); the first: HTTP 400: too long"
    )
    assert describe_failures(["Hi."]) == ""


def test_a_stalled_request_does_not_hold_up_the_others(serve):
    server = serve(lambda request: 2 if asked(request) == "0" else "Hi.")
    stream, began = (
        many(endpoint(server, timeout=0.5, tries=1), [of(i) for i in range(10)], limit=2),
        time.monotonic(),
    )
    first = next(stream)
    assert isinstance(first, ChatError) and 0.5 <= time.monotonic() - began < 1.5
    assert len(server.served) == 9  # all the others, while the first one stood still
    assert list(stream) == ["Hi."] * 9


def test_any_callable_is_a_chat_and_only_input_errors_are_recorded():
    def chat(messages):
        if messages == "bad":
            raise InputError("a prompt of 900 tokens does not fit")
        if messages == "bug":
            raise ZeroDivisionError
        return messages.upper()

    replies = list(many(chat, ["a", "bad", "b"]))
    assert replies[::2] == ["A", "B"] and "900 tokens" in str(replies[1])
    assert "(1 x bad input); the first: a prompt of 900" in describe_failures(replies)
    with pytest.raises(ZeroDivisionError):
        list(many(chat, ["a", "bug", "b"]))
    assert list(many(chat, [])) == []


def test_who_stops_listening_stops_the_asking():
    done = []

    def chat(i):
        time.sleep(0.01)
        done.append(i)
        return i

    stream = many(chat, range(1000), limit=2)
    assert next(stream) == 0
    stream.close()
    time.sleep(0.1)
    assert len(done) < 20


# ---- sample.py --endpoint ------------------------------------------------------------------------

ROWS = list(problems.rows("test", 6))


def teacher(request):
    """Solves toy problems, wrong for every third seed, and cuts every fifth short."""
    row = next(row for row in ROWS if row["question"] in asked(request))
    seed = request.body["seed"]
    text = row["solution"] if seed % 3 else row["solution"].rpartition("####")[0] + "#### 100000"
    return completion(text, "stop" if seed % 5 else "length")


def sample(server, *argv, cwd, model="tiny"):
    url = server if isinstance(server, str) else server.url
    return script("sample.py", "--endpoint", url, "--model", model, *argv, cwd=cwd)


def test_responses_of_a_server_are_graded_like_our_own(serve, tmp_path):
    server = serve(teacher)
    argv = ["--limit", 6, "--n", 5, "--out", "s.jsonl"]
    done = sample(server, *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sampled = read_samples(tmp_path / "s.jsonl")
    assert [samples.problem.id for samples in sampled] == [row["id"] for row in ROWS]
    responses = [response for samples in sampled for response in samples.responses]
    body = {asked(request): request.body for request in server.seen}[
        ROWS[0]["question"] + "\nThink step by step."
    ]
    assert body["max_tokens"] == 96 and body["temperature"] == 1.0
    seeds = {(asked(r).rpartition("\n")[0], r.body["seed"]) for r in server.seen}
    assert len(seeds) == 30 == len(responses)
    right = sum(seed % 3 > 0 for _, seed in seeds)
    assert 0 < right < 30 and sum(response.correct for response in responses) == right
    cut = sum(seed % 5 == 0 for _, seed in seeds)
    assert 0 < cut and sum(response.finish == "length" for response in responses) == cut
    assert all(r.answer == "100000" for r in responses if not r.correct) and responses[0].ids is None
    assert "30 requests sent, 0 of them again; 0 replies from the cache" in done.stdout
    assert f"6 problems, 30 responses, {right / 30:.1%} of them right" in done.stdout

    before = (tmp_path / "s.jsonl").read_bytes()
    again = sample(server, *argv, cwd=tmp_path)
    assert (
        again.returncode == 0
        and "0 requests sent, 0 of them again; 30 replies from the cache" in again.stdout
    )
    assert len(server.seen) == 30 and (tmp_path / "s.jsonl").read_bytes() == before
    assert_one_line_error(sample(server, *argv, "--seed", 1, cwd=tmp_path), "other settings", "--overwrite")
    assert_one_line_error(sample(server, *argv, cwd=tmp_path, model="big"), "other settings")
    assert_one_line_error(sample(serve(teacher), *argv, cwd=tmp_path), "other settings")
    assert (tmp_path / "s.jsonl").read_bytes() == before and len(server.seen) == 30


def test_problems_without_a_response_are_left_out_and_come_in_their_place_later(serve, tmp_path):
    healed = []

    def plan(request):
        if not healed and ROWS[1]["question"] in asked(request):
            return 400, {}, b"the prompt is too long"
        return teacher(request)

    server, argv = serve(plan), ["--limit", 4, "--n", 2, "--out", "s.jsonl"]
    done = sample(server, *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 8 requests failed (2 x HTTP 400); the first: HTTP 400: the prompt is too long" in done.stdout
    assert "1 of 4 problems without a response" in done.stdout
    ids = lambda: [samples.problem.id for samples in read_samples(tmp_path / "s.jsonl")]
    assert ids() == [ROWS[i]["id"] for i in (0, 2, 3)]
    healed.append(True)
    assert "2 requests sent, 0 of them again; 6 replies" in sample(server, *argv, cwd=tmp_path).stdout
    assert ids() == [row["id"] for row in ROWS[:4]]


def test_a_problem_keeps_the_responses_that_came(serve, tmp_path):
    bad = []

    def plan(request):
        bad.append(request.body["seed"]) if not bad else None
        return (400, {}, b"no") if request.body["seed"] in bad else teacher(request)

    done = sample(serve(plan), "--limit", 2, "--n", 4, "--concurrency", 1, "--out", "s.jsonl", cwd=tmp_path)
    assert [len(samples.responses) for samples in read_samples(tmp_path / "s.jsonl")] == [3, 4]
    assert "1 of 8 requests failed" in done.stdout and "0 of 2 problems without a response" in done.stdout


def test_evaluation_of_a_server(serve, tmp_path):
    def plan(request):
        return (400, {}, b"no") if ROWS[5]["question"] in asked(request) else teacher(request)

    server = serve(plan)
    done = sample(server, "--evaluate", "--limit", 6, "--n", 4, "--out", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    greedy = {asked(r): r.body["seed"] for r in server.seen if r.body["temperature"] == 0}
    right = [int(greedy[row["question"] + "\nThink step by step."] % 3 > 0) for row in ROWS[:5]] + [0]
    assert results["correct"] == right and results["metrics"]["accuracy"] == sum(right) / 6
    assert results["model"] == "tiny" and results["right"][5] == [0, 4]
    assert (
        "words" in done.stdout and "1 of 6 problems without a response (they count as wrong)" in done.stdout
    )


def test_a_server_that_is_not_there_leaves_what_was_there(serve, tmp_path):
    good = serve(teacher)
    assert sample(good, "--limit", 2, "--out", "s.jsonl", cwd=tmp_path).returncode == 0
    before, bad = (tmp_path / "s.jsonl").read_bytes(), serve(in_turn((401, {}, b"who are you?")))
    done = sample(bad, "--limit", 2, "--out", "s.jsonl", "--overwrite", cwd=tmp_path)
    assert_one_line_error(done, "no response from", "HTTP 401: who are you?")
    assert "2 of 2 requests failed (2 x HTTP 401)" in done.stdout
    assert (tmp_path / "s.jsonl").read_bytes() == before
    done = sample(bad, "--evaluate", "--limit", 2, "--out", "r.json", cwd=tmp_path)
    assert_one_line_error(done, "HTTP 401")
    assert not (tmp_path / "r.json").exists()


def test_pictures_go_in_the_place_of_their_placeholders(serve, tmp_path):
    Image.new("RGB", (4, 4), (0, 0, 255)).save(tmp_path / "blue.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    file = jsonl(
        tmp_path / "p.jsonl",
        {"id": "a", "question": "Is <image> blue?", "answer": "yes", "image": "blue.png"},
        {"id": "b", "question": "What is it?", "answer": "yes", "image": ["blue.png", "blue.png"]},
        {"id": "c", "question": "What?", "answer": "yes", "image": "broken.png"},
        {"id": "d", "question": "<image> <image>?", "answer": "yes", "image": "blue.png"},
        {"id": "e", "question": "What is <image>?", "answer": "yes"},
    )
    server = serve(in_turn("#### yes"))
    done = sample(server, "--data", file, "--mode", "plain", "--out", "s.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 5 requests failed (2 x bad input); the first: image 'broken.png'" in done.stdout
    contents = [asked(request) for request in server.seen]
    shown = {str([part.get("text", "P") for part in c]) if isinstance(c, list) else c for c in contents}
    assert shown == {"['Is', 'P', 'blue?']", "['P', 'P', 'What is it?']", "What is <image>?"}
    assert [samples.problem.id for samples in read_samples(tmp_path / "s.jsonl")] == ["a", "b", "e"]


def test_toy_pictures_are_drawn_for_the_server(serve, tmp_path):
    row, server = next(iter(pictures.rows("test", 1))), serve(in_turn("#### 1"))
    done = sample(server, "--data", "toy-pictures", "--limit", 1, "--out", "s.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    url = next(part["image_url"]["url"] for part in asked(server.seen[0]) if part["type"] == "image_url")
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.tobytes() == pictures.draw(row["image"][4:]).tobytes()


def test_a_dry_run_prints_the_requests_and_sends_nothing(serve, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    server = serve(in_turn("#### 1"))
    argv = ["--data", "toy-pictures", "--limit", 2, "--n", 3, "--out", "s.jsonl"]
    done = sample(server, *argv, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert server.seen == [] and list(tmp_path.iterdir()) == [] and SECRET not in done.stdout
    assert "6 requests, 0 of them cached; nothing was sent" in done.stdout
    assert done.stdout.count(f"POST {server.url}/chat/completions\n") == 6
    assert re.search(r"data:image/png;base64,\.\.\. \([\d,]+ characters\)", done.stdout)
    sample(server, *argv, cwd=tmp_path)
    printed = [json.loads(text) for text in re.findall(r"^\{$.*?^\}$", done.stdout, re.M | re.S)]
    key = lambda body: (body["seed"], body["messages"][0]["content"][-1]["text"])
    assert sorted(map(key, printed)) == sorted(key(request.body) for request in server.seen)
    done = sample(server, *argv, "--dry-run", cwd=tmp_path)
    assert "6 requests, 6 of them cached" in done.stdout and len(server.seen) == 6


def test_a_cache_that_cannot_be_written_ends_the_run_in_one_line(serve, tmp_path):
    (tmp_path / "file").write_text("")
    done = sample(serve(teacher), "--limit", 6, "--cache", "file", "--out", "s.jsonl", cwd=tmp_path)
    assert_one_line_error(done, "Not a directory")


def test_a_typed_question_is_put_to_a_server(serve, tmp_path):
    server = serve(in_turn("Four."))
    done = sample(server, "How many?", "--mode", "plain", cwd=tmp_path)
    assert done.returncode == 0 and "Four." in done.stdout and f"model: tiny at {server.url}" in done.stdout
    assert server.seen[0].body["messages"] == [{"role": "user", "content": "How many?"}]
    assert server.seen[0].body["temperature"] == 0


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--endpoint", "http://h"], ["--model", "the name that --endpoint has"]),
        (["--endpoint", "h:80", "--model", "m"], ["the endpoint is 'h:80'"]),
        (
            ["--endpoint", "http://h", "--model", "m", "--device", "cpu"],
            ["--device", "only without --endpoint"],
        ),
        (["--endpoint", "http://h", "--model", "m", "--verifier", "v"], ["--verifier", "only without"]),
        (["--endpoint", "http://h", "--model", "m", "--evaluate"], ["--out", "a file"]),
        (["--endpoint", "http://h", "--model", "m", "--evaluate", "--out", "r", "--dry-run"], ["--dry-run"]),
        (["--dry-run"], ["--dry-run", "only with --endpoint"]),
        (["--concurrency", "9"], ["--concurrency", "only with --endpoint"]),
        (["--concurrency", "0"], ["--concurrency", "at least 1"]),
        (["--timeout", "0"], ["--timeout", "above 0"]),
    ],
)
def test_flags_of_servers_and_of_folders_are_told_apart(tmp_path, argv, parts):
    assert_one_line_error(script("sample.py", *argv, cwd=tmp_path), *parts)


TEACHER = {  # a problem's number -> what the server says of it
    0: "Step 1: 3 + 4 = 7.\n†Answer: 7",
    1: (401, {}, b'{"error": "no such key"}'),
    2: (429, {}, b"slow down"),
    3: (500, {}, b"<html>oops</html>"),
    4: (200, {}, b"<!DOCTYPE html><html></html>"),
    5: "<html>\n<body>busy</body>\n</html>",
    6: "I'm sorry, but I can't help with that.",
    7: "Step 1: so 7\nStep 2: so 7\n†Answer: 7",
    8: "Step 1: 3 + 4 = 8.\n†Answer: 8",
    9: 5,  # it says nothing for 5 s
}


def test_a_teacher_that_fails_in_every_way_costs_those_problems_alone(serve, monkeypatch):
    """A server's chains for URSA: refusals, loops, rubbish, other answers, errors of HTTP, silence."""
    monkeypatch.setenv(KEY, SECRET)
    number = lambda request: int(json.dumps(request.body).partition("Number ")[2][0])
    server = serve(lambda request: TEACHER[number(request)])
    chat = endpoint(server, tries=2, timeout=0.3)
    problems = [Problem(f"{i}", f"Number {i}?", answer="7") for i in TEACHER]
    made = list(synthesise(problems, "expand", chat))
    assert [one.id for one in made if isinstance(one, Problem)] == ["0"] and len(made) == 10
    told = describe_failures(made)
    for reason in ("HTTP 401", "HTTP 429", "HTTP 500", "broken reply", "another answer", "ReadTimeout"):
        assert f"1 x {reason}" in told, told
    assert "2 x words outside the steps" in told and "1 x it goes in circles" in told
    assert told.startswith("9 of 10 requests failed (") and SECRET not in told


def test_ctrl_c_does_not_wait_for_a_stalled_server(serve, tmp_path):
    server = serve(in_turn(30))
    argv = ["--endpoint", server.url, "--model", "m", "--limit", 2, "--out", "s.jsonl"]
    process = start("sample.py", *argv, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not server.seen:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = finished(process, timeout=10)
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "ended by SIGINT", done.stderr
