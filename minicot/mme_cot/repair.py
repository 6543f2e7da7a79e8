r"""The JSON list in a judge's reply, read as MME-CoT's official scripts read it.

The list runs from the first `[` to the bracket that closes it, counted without regard to strings: "x in
(0, 1]" ends it early, "[0, 1)" leaves it open. Then broken JSON is mended. The official scripts leave that to
the package json_repair; `mend` is our own and goes as far as judges do: no comma, one too many, single
quotes, names without quotes, quotes within a text, words such as True and None, an end that is missing.

Backslashes stay as they are written, LaTeX's too: `\frac` is no form feed. `\"` is a quote within a text.
"""

import json
import re

DEEPEST = 1000  # open brackets; no judge nests as deep
LONGEST = 1_000_000  # characters of a list that is mended; a judge's longest reply has about 20,000
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’"}
WORDS = {"true": True, "false": False, "null": None, "none": None, "nan": None}
BLANK = re.compile(r"(?:\s|//[^\n]*|/\*.*?(?:\*/|\Z))*", re.S)
BARE = re.compile(r"[^,:\]}\[{\n\"]*")
NAME = r"[\"'“][\w ]{1,40}[\"'”]\s*:"  # of a value that follows
# What follows the quote that ends a name, and the quote that ends a value.
AFTER_NAME = re.compile(r"\s*(?:[:\"“]|\Z)")
AFTER_VALUE = re.compile(rf"\s*(?:[}}\]{{]|\Z|(?:,\s*)+(?:[}}\]{{\"'“]|\w+\s*:|\Z)|(?://[^\n]*\s*)?{NAME})")
NEXT_NAME = re.compile(NAME)
AFTER_LONE = re.compile(rf"[\s,]*{NAME}")  # behind a text whose last character is a backslash


def find_list(text, *, own_line=False):
    """The part of a reply that is its list; None where none opens or closes. `own_line`: the bracket that
    closes it must stand at the start of a line (the official relevance script asks for this)."""
    start = text.find("[")
    depth, at = 0, start
    while 0 <= start and depth <= DEEPEST:
        end = text.find("]", at)
        if end < 0:
            return None
        depth += text.count("[", at, end) - 1
        at = end + 1
        if depth == 0:
            return text[start:at] if not own_line or text[end - 1] == "\n" else None
    return None


def read_list(text, *, own_line=False):
    """A reply -> its list; None where find_list has none. ValueError, RecursionError: not even mended."""
    found = find_list(text, own_line=own_line)
    if found is None:
        return None
    kept = re.sub(r"\\\\|\\(?!\")", lambda match: match[0] * 2, found)  # a backslash before a quote escapes
    try:
        return json.loads(kept, strict=False)
    except ValueError:
        if len(found) > LONGEST:
            raise ValueError(f"a list of {len(found):,} characters that is no JSON") from None
        return Mender(found).list()


class Mender:
    """Reads what was meant to be JSON, from left to right; `at` is the place in the text."""

    def __init__(self, text):
        self.text, self.at = text, 0

    def peek(self):
        """The next character that is no blank and no comment; "" at the end."""
        self.at = BLANK.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def take(self, characters):
        """Step over one of these where it comes next."""
        found = self.peek()
        self.at += bool(found) and found in characters
        return bool(found) and found in characters

    def value(self):
        start = self.peek()
        read = {"[": self.list, "{": self.object}.get(start)
        return read() if read else self.string(AFTER_VALUE) if start in QUOTES else self.bare()

    def list(self):
        assert self.take("[")
        items = []
        while self.peek() and not self.take("]"):
            if not self.take(",;:}"):
                items.append(self.value())
        return [item for item in items if item != "..."]

    def object(self):
        assert self.take("{")
        pairs = {}
        while self.peek() and self.peek() != "]" and not self.take("}"):
            if self.take(",;:"):
                continue
            if self.peek() in "{[":  # the brace that should close this object is missing
                break
            name = self.string(AFTER_NAME) if self.peek() in QUOTES else self.bare()
            valued = self.take(":") and self.peek() not in ",}]" or self.peek() in QUOTES
            pairs[str(name)] = self.value() if valued else ""
        return pairs

    def string(self, after):
        """A quoted text. It ends at the quote behind which JSON goes on, as `after` has it, or before the
        next name; where the text ends first, at its end, without the brackets there."""
        close = QUOTES[self.text[self.at]]
        start = end = self.at + 1
        while (end := self.text.find(close, end)) >= 0:
            before = self.text[max(start, end - 40) : end].rstrip()
            if after is AFTER_VALUE and before.endswith(",") and NEXT_NAME.match(self.text, end):
                self.at = end
                return self.text[start:end].rstrip()[:-1]
            end += 1
            escaped = self.text[end - 2] == "\\" and not AFTER_LONE.match(self.text, end)
            if not escaped and after.match(self.text, end):
                self.at = end
                return self.text[start : end - 1].replace(f"\\{close}", close)
        self.at = len(self.text)
        return self.text[start:].rstrip("]}\n ").replace(f"\\{close}", close)

    def bare(self):
        """A number, a word such as true, or a text that should have had quotes."""
        found = BARE.match(self.text, self.at)[0]
        self.at += max(1, len(found))
        word = found.strip()
        if self.peek() == '"' and AFTER_VALUE.match(self.text, self.at + 1):  # it lacks the first quote alone
            self.at += 1
        try:
            return WORDS[word.lower()] if word.lower() in WORDS else json.loads(word)
        except ValueError:
            return word
