"""One client for teachers and judges. A chat is a callable: messages -> text.

An Endpoint is such a callable for a server that speaks OpenAI's chat completions (vLLM, llama.cpp, TGI, ...);
`many` maps any chat over many requests. A message is {"role", "content"}; a content is a text, or a list of
parts, {"type": "text", "text"} and `picture`s.

The key comes from the environment variable MINICOT_API_KEY, read when a request is sent and kept nowhere. It
is no part of a cache entry, a log, a repr or an error, and without it none is sent. A reply that repeats it
is refused.

huggingface_hub carries the requests, by its get_session. Its InferenceClient is not used: for a URL it
rewrites a JSON schema into TGI's dialect, which other servers ignore in silence; it sends the user's Hugging
Face token to any server where no key is given; and what is sent here is to the byte what the cache is keyed
by and the dry run prints.
"""

import base64
import hashlib
import io
import json
import os
import queue
import random
import re
import threading
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_session, is_offline_mode
from tqdm import tqdm

from minicot.errors import InputError

KEY = "MINICOT_API_KEY"
FINISHES = {"stop": "stop", "eos_token": "stop", "stop_sequence": "stop", "length": "length"}
LONGEST_WAIT = 300.0  # seconds; a server that asks for more is not waited for
SECRET = 12  # characters; a shorter key ("EMPTY") is a word that a reply may hold
SHUT_OUT = 16  # requests that a server may turn away, or not be there for, before it is left alone


class Reply(NamedTuple):
    """A response's text, and "stop" where the model ended it, "length" where the limit did."""

    text: str
    finish: str


class ChatError(InputError):
    """A request that got no usable reply. Failures are counted by their `reason`, and `detail` says more.
    `retry`: another try may help, after the `wait` seconds that the server asks for. `shut_out`: the server
    is not there, or lets nobody in, whatever the request."""

    def __init__(self, reason, detail="", *, retry=False, wait=0.0, shut_out=False):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.retry, self.wait, self.shut_out = reason, retry, wait, shut_out


@dataclass(frozen=True)
class Endpoint:
    """A chat: `endpoint(messages)` -> text, or ChatError.

    `url` is the server's base, http://localhost:8000/v1, and `model` its name for the model. `top_k` 0 and
    `top_p` 1 are not sent. `schema`: a JSON schema, which the server is told to keep to; a reply that is no
    JSON then counts as broken. `cache`: a folder with one file a reply, whose name is the digest of the whole
    request; a corrupt file is ignored, counted and replaced; failures are not kept.

    Time-outs (`timeout` seconds without a byte, or in all), lost connections, HTTP 408,
    429 and 5xx and broken replies are tried again, `tries` times in all, after about `backoff`, 2 `backoff`,
    4 `backoff`, ... seconds and the seconds of a Retry-After. Other statuses are not. `events` lists what
    happened: "sent", "again", "cached", "corrupt", and, at a request's end, "let in" or "shut out".
    InputError: a url with credentials, a key that is no header, HF_HUB_OFFLINE."""

    url: str
    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    schema: dict | None = None
    cache: str | Path | None = None
    timeout: float = 120.0
    tries: int = 4
    backoff: float = 1.0
    events: list = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        headers()  # refuses a key that no header takes; address, below, a url
        if self.address and is_offline_mode():
            raise InputError("HF_HUB_OFFLINE is set, so that huggingface_hub sends nothing; unset it")

    @property
    def address(self):
        """Where requests go: the url + /chat/completions, with OpenAI's /v1 where it names no path."""
        match = re.fullmatch(r"(https?://[\w.:\[\]-]+)(/[^?#@\s]*)?", self.url)
        if not match:
            shown = (
                "one with more than that" if {*"@?#"} & {*self.url} else repr(self.url)
            )  # perhaps a secret
            raise InputError(f"the endpoint is {shown}; allowed: http(s)://HOST:PORT/PATH, the key in {KEY}")
        path = (match[2] or "").rstrip("/").removesuffix("/chat/completions") or "/v1"
        return f"{match[1]}{path}/chat/completions"

    def __call__(self, messages):
        return self.answer(messages).text

    def body(self, messages, seed):
        """The request as a JSON object."""
        body = {"model": self.model, "messages": messages, "temperature": self.temperature}
        body |= {"max_tokens": self.max_tokens, "seed": seed}
        body |= {"top_p": self.top_p} if self.top_p < 1 else {}
        body |= {"top_k": self.top_k} if self.top_k else {}
        if self.schema is not None:
            named = {"name": "reply", "schema": self.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body

    def preview(self, messages, *, seed=0):
        """The request as a person reads it, its pictures cut short. Sends nothing."""
        body = self.body(messages, seed)
        text = json.dumps(body, indent=1, ensure_ascii=False)
        cut = lambda match: f"{match[1]}... ({len(match[2]):,} characters)"
        text = re.sub(r"(data:[\w/+.-]+;base64,)([\w+/=]+)", cut, text)
        known = " (its reply is in the cache)" if self.kept(self.digest(json.dumps(body))) else ""
        return f"POST {self.address}{known}\n{text}"

    def answer(self, messages, *, seed=0):
        """-> Reply, from the cache or the server. Requests of other seeds are other requests: this is how n
        replies to the same messages are drawn. ChatError where there is none."""
        text = json.dumps(self.body(messages, seed))
        digest = self.digest(text)
        if reply := self.kept(digest):
            return reply
        for attempt in range(1, self.tries + 1):
            try:
                reply = self.send(text.encode())
                break
            except ChatError as error:
                if not error.retry or attempt == self.tries or error.wait > LONGEST_WAIT:
                    self.events.append("shut out" if error.shut_out else "let in")
                    raise
                time.sleep(error.wait + min(60.0, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1))
                self.events.append("again")
        self.events.append("let in")
        self.keep(digest, reply)
        return reply

    def send(self, content):
        """One try: the bytes of a request -> Reply."""
        if "let in" not in self.events and self.events.count("shut out") >= SHUT_OUT:
            raise ChatError("not sent", f"the server took none of {SHUT_OUT} requests before", shut_out=True)
        self.events.append("sent")
        options = dict(content=content, headers=headers(), timeout=self.timeout)
        try:
            ends, body = time.monotonic() + self.timeout, b""
            with get_session().stream("POST", self.address, **options) as response:
                for piece in response.iter_bytes():
                    body += piece
                    if time.monotonic() > ends:  # byte by byte it may go on for ever
                        raise TimeoutError(f"after {self.timeout:g} s its reply has not ended")
        except Exception as error:  # noqa: BLE001 - of httpx or httpx2, as huggingface_hub has it
            reason = type(error).__name__
            raise ChatError(reason, legible(error), retry=True, shut_out="Connect" in reason) from None
        status, after = response.status_code, response.headers.get("retry-after", "")
        if status == 200:
            return self.parsed(body)
        raise ChatError(
            f"HTTP {status}",
            legible(body.decode(errors="replace")),
            retry=status in (408, 429) or status >= 500,
            wait=float(after) if after.isdecimal() else 0.0,
            shut_out=status in (401, 403, 404),
        )

    def parsed(self, content):
        """The bytes of a chat completion -> Reply."""
        try:
            choice = json.loads(content)["choices"][0]
            reply = Reply(choice["message"]["content"], FINISHES[choice["finish_reason"]])
            reply.text.encode()  # half a character is no text
            if self.schema is not None:
                json.loads(reply.text)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            start, what = legible(content.decode(errors="replace")), legible(repr(error))
            raise ChatError("broken reply", f"{what:.60} in {start!r}", retry=True) from None
        if len(key()) >= SECRET and any(form in reply.text for form in spellings()):
            raise ChatError("it repeats the key")
        return reply

    # ---- the cache

    def digest(self, text):
        return hashlib.sha256(f"{self.address}\n{text}".encode()).hexdigest()

    def kept(self, digest):
        """The Reply in the cache; None where there is none, or a corrupt one."""
        if self.cache is None:
            return None
        try:
            entry = json.loads(Path(self.cache, digest[:2], f"{digest}.json").read_bytes())
            reply = Reply(entry["text"], FINISHES[entry["finish"]])
            if entry["request"] == digest and isinstance(reply.text, str):
                self.events.append("cached")
                return reply
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        self.events.append("corrupt")

    def keep(self, digest, reply):
        """Write a reply to the cache, whole or not at all."""
        if self.cache is not None:
            file = Path(self.cache, digest[:2], f"{digest}.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{uuid.uuid4().hex}.part")
            part.write_text(json.dumps({"request": digest, "model": self.model, **reply._asdict()}))
            os.replace(part, file)


def headers():
    """The headers of a request. InputError where the key is none that HTTP can carry."""
    if not re.fullmatch(r"[!-~]*", key()):
        raise InputError(f"{KEY} holds a blank or another character that no key has; allowed: ASCII")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key()}"} if key() else {})


def key():
    """The key, "" where there is none."""
    return os.environ.get(KEY, "").strip()


def spellings():
    """The key as it is and as JSON or Python write it; nothing where there is none."""
    written = [key(), json.dumps(key())[1:-1], repr(key())[1:-1]]
    return {*written, *(form.replace("/", r"\/") for form in written)} - {""}


def legible(text):
    """What a server or the network says, without the key that it may repeat, on one line, cut short."""
    text = str(text)
    for form in spellings():
        text = text.replace(form, "***")
    return " ".join(text.split())[:200]


def picture(image):
    """A PIL picture -> the part of a message that shows it, as PNG in a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


# ---- many requests -------------------------------------------------------------------------------


def many(chat, requests, *, limit=8):
    """Yield chat(request) for each of the requests, in their order, at most `limit` of them under way at a
    time; the InputError (ChatError is one) where it raised one, so that a failed request costs itself alone.
    Any other exception is a bug, and is raised. Shows progress. What is under way when the caller stops is
    left to its thread, which the end of the process ends."""
    requests, arrived = list(requests), queue.SimpleQueue()
    waiting = iter(enumerate(requests))  # all threads take from this one

    def work():
        for place, request in waiting:
            try:
                reply = chat(request)
            except InputError as failure:
                reply = failure
            except BaseException as bug:  # noqa: BLE001 - raised again in the caller's thread
                place, reply = None, bug
            arrived.put((place, reply))

    for _ in range(min(limit, len(requests))):
        threading.Thread(target=work, daemon=True).start()
    early, n_failed = {}, 0
    try:
        with tqdm(total=len(requests), unit="request", disable=None, leave=False) as bar:
            for place in range(len(requests)):
                while place not in early:
                    where, reply = arrived.get()
                    if where is None:
                        raise reply
                    early[where] = reply
                    n_failed += isinstance(reply, InputError)
                    bar.set_postfix(failed=n_failed, refresh=False)
                    bar.update()
                yield early.pop(place)
    finally:
        deque(waiting, maxlen=0)  # nothing is left to take


def describe_failures(replies):
    """What failed among many's replies, by reason, in a line; "" where all went well."""
    failures = [reply for reply in replies if isinstance(reply, InputError)]
    reasons = Counter(getattr(failure, "reason", "bad input") for failure in failures)
    counted = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
    first = f"; the first: {failures[0]}" if failures else ""
    return f"{len(failures)} of {len(replies)} requests failed ({counted}){first}" if failures else ""
