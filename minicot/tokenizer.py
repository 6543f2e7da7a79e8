"""A folder's tokenizer: text <-> ids through the tokenizers library, special ids, and the chat template.

Reads tokenizer.json (required), tokenizer_config.json, generation_config.json and chat_template.jinja as
transformers does, of which only the folder's own files are believed: no id and no template is guessed.
"""

import hashlib
import json
from datetime import datetime
from functools import cached_property
from pathlib import Path

import tokenizers
from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minicot.errors import InputError

TEMPLATE = "chat_template.jinja"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    TEMPLATE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
PLAIN = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


class Tokenizer:
    """The tokenizer of a model folder. Nothing is added to a text: special tokens come from the chat
    template.

    vocab_size: ids are below it.  eos_id: what ends a trained response.  stop_ids: every id that ends a
    sampled one (eos_id and those of generation_config.json).  bos_id: may be None.  pad_id: eos_id where the
    folder names no pad token; padding is masked everywhere, so the choice changes nothing.  fingerprint: of
    tokenizer.json and template.

    chat_template: "" is the folder's own, which a base model may lack. Another one comes before it and is
    saved as chat_template.jinja, so that the model trained with it carries it: the path of a file that holds
    a jinja template, or "plain": the contents of the messages in their order, each followed by a newline, and
    nothing else. Plain names no roles, has no special tokens (a model that wants <s> in front needs a file),
    and is the same with and without add_generation_prompt; a response follows the last newline.
    """

    def __init__(self, folder, chat_template: str = ""):
        self.folder = Path(folder)
        if not (self.folder / "tokenizer.json").is_file():
            raise InputError(f"{self.folder}: no tokenizer.json there")
        self.files = {name: file.read_bytes() for name in FILES if (file := self.folder / name).is_file()}
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
        except Exception as error:  # noqa: BLE001 - it is what the library raises
            raise InputError(
                f"{self.folder / 'tokenizer.json'}: no readable tokenizer ({one_line(error)})"
            ) from None
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.post_processor = None  # adds special tokens, which we never do, and trims offsets
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

        config = self._json("tokenizer_config.json")
        generation = self._json("generation_config.json")
        self.special = {name: self._token(config, name) for name in SPECIAL if config.get(name) is not None}
        self.bos_id, eos, pad = (self._token_id(name) for name in SPECIAL[:3])
        stops = self._ids(generation, "eos_token_id")
        if eos is None and not stops:
            raise InputError(f"{self.folder}: no eos in tokenizer_config.json or generation_config.json")
        self.eos_id = stops[0] if eos is None else eos
        self.pad_id = self.eos_id if pad is None else pad
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *stops]))
        self._template_place = self.folder  # what an error about the template names
        if chat_template:
            self.files[TEMPLATE] = self._given_template(chat_template)
        self.chat_template = self._read_template(config)
        self.fingerprint = self._fingerprint()

    def add_token(self, token: str) -> int:
        """The id of a special token such as <image>, which is added behind the others if it is not there."""
        self.backend.add_special_tokens([token])
        self.files["tokenizer.json"] = self.backend.to_str().encode()
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = self._fingerprint()
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written out in it are read as such, none are added."""
        return self._encode(text).ids

    def decode(self, ids, skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def encode_pair(self, prompt: str, response: str) -> tuple[list[int], int]:
        """(ids of prompt + response, tokenised as one text; how many of them are the prompt's).

        A token that spans the boundary belongs to the response: the first token whose end lies beyond the
        prompt opens it. So the response is what the model has to produce, and the prompt may lose its last
        characters.
        """
        encoding = self._encode(prompt + response)
        ends = (end for _, end in encoding.offsets)
        return encoding.ids, next((i for i, end in enumerate(ends) if end > len(prompt)), len(encoding.ids))

    def tokens_at(self, text: str, places: list[int]) -> list[int]:
        """Which of a text's tokens holds each of these characters: the first that ends behind it."""
        ends = [end for _, end in self._encode(text).offsets]
        return [next(i for i, end in enumerate(ends) if end > place) for place in places]

    def chat_prompt(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """[{"role", "content"}, ...] -> the prompt text, by the chat template."""
        if self.chat_template is None:
            raise InputError(
                f"{self.folder}: no {TEMPLATE}, and no chat_template in tokenizer_config.json; "
                "give one: --chat-template FILE|plain"
            )
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.special,
            )
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            raise InputError(f"{self._template_place}: chat template: {one_line(error)}") from None

    def save(self, folder) -> None:
        """Write the files it was read from, byte for byte, but for a template given in place of theirs."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def _fingerprint(self) -> str:
        source = self.files["tokenizer.json"] + b"\0" + (self.chat_template or "").encode()
        return hashlib.sha256(source).hexdigest()

    def _encode(self, text: str):
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise InputError(f"{text!r:.60} is no text that UTF-8 can write (a lone surrogate)") from None

    @cached_property
    def _template(self):
        return environment().from_string(self.chat_template)

    def _text(self, name: str) -> str:
        try:
            return self.files[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.folder / name}: not UTF-8 (at byte {error.start})") from None

    def _json(self, name: str) -> dict:
        """The object in a JSON file; empty where there is no such file."""
        try:
            value = json.loads(self._text(name)) if name in self.files else {}
        except json.JSONDecodeError as error:
            raise InputError(f"{self.folder / name}:{error.lineno}: not JSON ({error.msg})") from None
        if not isinstance(value, dict):
            raise InputError(f"{self.folder / name}: holds {type(value).__name__}, not an object")
        return value

    def _token(self, config: dict, name: str) -> str:
        """A token that tokenizer_config.json names, as a string or as {"content": string}."""
        token = config[name]
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str):
            raise InputError(
                f"{self.folder / 'tokenizer_config.json'}: {name} {token!r} is neither a string "
                "nor an object with a content"
            )
        return content

    def _token_id(self, name: str) -> int | None:
        if name not in self.special:
            return None
        if (token_id := self.backend.token_to_id(self.special[name])) is None:
            raise InputError(
                f"{self.folder / 'tokenizer_config.json'}: {name} {self.special[name]!r} is not "
                "in the vocabulary of tokenizer.json"
            )
        return token_id

    def _ids(self, config: dict, name: str) -> list[int]:
        """generation_config.json's eos_token_id: null, an id or a list of ids."""
        value = config.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise InputError(
                    f"{self.folder / 'generation_config.json'}: {name} {i!r} is not an id below "
                    f"{self.vocab_size}"
                )
        return ids

    def _given_template(self, given: str) -> bytes:
        """The content of the file that is given as chat_template, or PLAIN; checked to be a template."""
        if given == "plain":
            return PLAIN.encode()
        self._template_place = Path(given)
        if not self._template_place.is_file():
            raise InputError(
                f"chat template {given!r}: no such file; allowed: a file that is there, or plain"
            )
        content = self._template_place.read_bytes()
        try:
            environment().from_string(content.decode("utf-8"))
        except (TemplateError, UnicodeDecodeError) as error:
            raise InputError(f"{given}: no jinja template in UTF-8 ({one_line(error)})") from None
        return content

    def _read_template(self, config: dict) -> str | None:
        """chat_template.jinja wins over tokenizer_config.json's chat_template (text or a list of named)."""
        if TEMPLATE in self.files:
            return self._text(TEMPLATE)
        template, where = config.get("chat_template"), self.folder / "tokenizer_config.json"
        if isinstance(template, list):
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            if "default" not in named:
                raise InputError(f"{where}: chat_template has no 'default' among {sorted(map(str, named))}")
            template = named["default"]
        if template is not None and not isinstance(template, str):
            raise InputError(f"{where}: chat_template is {type(template).__name__}, not a string")
        return template


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks the assistant's words for some: no effect."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def environment() -> ImmutableSandboxedEnvironment:
    """The jinja that Hugging Face's chat templates are written for."""

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [Generation, loopcontrols]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return jinja
