"""Answers: find the final answer in a response, compare two answers, vote, and cut a response into steps.

Extraction is strict: no marker, no answer. A fallback such as "the last number of the text" would grade
unfinished chains as right by luck and hide how often a model gives no answer at all. Equality is decided by
rule and exactly (fractions.Fraction).
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from minicot.errors import InputError

# What stands before the answer; the answer runs to the end of the line.
_MARKERS = {
    "hash": re.compile(r"(?<!#)####(?!#)"),  # GSM8K
    "answer": re.compile(r"(?<!#)###[ \t]*Answer\**[ \t]*:", re.IGNORECASE),
    "dagger": re.compile(r"†[ \t]*Answer\**[ \t]*:", re.IGNORECASE),  # URSA
    "sentence": re.compile(r"\bthe (?:final |correct )?answer is\b:?", re.IGNORECASE),
}
STYLES = (*_MARKERS, "boxed", "letter")

_LETTER_MARKER = re.compile(r"\banswer(?: is\b:?|[ \t]*:)|(?<!#)####(?!#)", re.IGNORECASE)
_PAREN_LETTER = re.compile(r"\(([A-Ea-e])\)")
_BARE_LETTER = re.compile(r"([A-E])(?:[).:](?!\w)|$)")  # "B", "B.", "B) a pen", but not "A dog"
_LONE_LETTER = re.compile(r"\(?([A-E])\)?\.?")
_STEP_HEAD = re.compile(r"(?:\*\*)?step \d+\s*(?::|\.(?!\d))", re.IGNORECASE)
_ANSWER_LINE = re.compile(
    r"[>*_\s-]*(?:#{1,3}\s+[>*_\s-]*)?"  # Markdown around a marker
    r"(?:####(?!#)|###\s*answer\**\s*:|†\s*answer\**\s*:|answer\**\s*:)|\$?\\boxed\{|"
    r"(?:\*\*)?(?:(?:so|thus|hence|therefore),? )?the (?:final |correct )?answer is\b",
    re.IGNORECASE,
)

_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"  # 1,000 and 1000; "1,5" and "1,2,3" are no numbers
_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?P<money>[$£€¥]?) ?(?P<sign2>[-+]?)"
    rf"(?:(?:(?P<whole>\d+) +)?(?P<top>-?\d+) ?/ ?(?P<bottom>\d+)"
    rf"|(?P<decimal>{_INTEGER}(?:\.\d*)?|\.\d+)"
    r"(?:e(?P<exp>[-+]?\d+)| ?(?:x|×|\*|\\times) ?10 ?\^ ?\{?(?P<exp10>[-+]?\d+)\}?)?)"
    r"(?![\d,:/^]|\.\d)(?P<rest>.*)",
    re.IGNORECASE,
)
_UNIT_WORD = re.compile(r"[A-Za-z°]+[²³]?(?:\^[23])?")
# A word after the number that makes it another number, or no number.
_NOT_UNITS = frozenset(
    "and or to plus minus times x y z i pi half halves third thirds quarter quarters "
    "dozen hundred thousand million billion trillion".split()
)
_LONGEST = 200  # characters; longer answers are compared as text
_LARGEST_EXPONENT = 400  # 1e999999999 must not be written out


def extract_answer(text: str, style: str) -> str | None:
    r"""The final answer of a response, or None when it has no marker of this style (or nothing after it).

    style: "hash" `#### x`, "answer" `### Answer: x`, "dagger" `†Answer: x`, "sentence" `The answer is x`,
    "boxed" `\boxed{x}` (braces nest), "letter" an option A-E (`The answer is (B)`, `Answer: B`, `#### B`, or
    a last line that is only `(B)` or `B`; returned as the capital letter). The last marker wins. The answer
    runs to the end of its line (boxed: to its brace); spaces, a trailing period, the asterisks of Markdown's
    bold and a wrapping `$...$`, `\(...\)` are dropped. ValueError for an unknown style.
    """
    if style == "letter":
        return _extract_letter(text)
    if style == "boxed":
        return _extract_boxed(text)
    if style not in _MARKERS:
        raise InputError(f"answer style {style!r} is unknown; allowed: {', '.join(STYLES)}")
    after = _after_last(_MARKERS[style], text)
    return None if after is None else _trim(after) or None


def _after_last(marker: re.Pattern, text: str) -> str | None:
    ends = [match.end() for match in marker.finditer(text)]
    return _unbold(re.split(r"[\r\n]", text[ends[-1] :], maxsplit=1)[0]) if ends else None


def _unbold(line: str) -> str:
    """Without Markdown's bold around all of it, and without the one of a pair that stands at an end."""
    line = line.strip().removesuffix(".")
    if line.count("**") == 1:  # the other stands before the marker
        return line.removeprefix("**").removesuffix("**")
    return line[2:-2] if re.fullmatch(r"\*\*(?:(?!\*\*).)+\*\*", line) else line


def _trim(answer: str) -> str:
    while True:
        before, answer = answer, answer.strip().removesuffix(".").rstrip()
        if len(answer) > 2 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1]:
            answer = answer[1:-1]
        if answer.startswith(r"\(") and answer.endswith(r"\)"):
            answer = answer[2:-2]
        if answer == before:
            return answer


def _extract_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for i in range(start, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
        if depth == 0:
            return _trim(text[start:i]) or None
    return None  # never closed: a truncated response


def _extract_letter(text: str) -> str | None:
    line = _after_last(_LETTER_MARKER, text)
    if line is None:
        lone = _LONE_LETTER.fullmatch((text.strip().splitlines() or [""])[-1].strip())
        return lone and lone[1]
    line = _trim(line)
    found = _PAREN_LETTER.match(line) or _BARE_LETTER.match(line)
    if not found or _PAREN_LETTER.search(line, found.end()):  # "(A) or (B)" is no choice
        return None
    return found[1].upper()


@lru_cache(2**16)
def normalize(answer: str) -> tuple:
    r"""The hashable key under which answers are equal: ("number", Fraction), ("choice", "B") or ("text",
    folded).

    Numbers: 1,000 = 1000.0; $, £, €, ¥ and units ("18 dollars", "60 km/h") are dropped, so 5 apples = 5
    pears; 50% = 50; 1/2 = \frac{1}{2} = 0.5; 1 1/2 = 1.5; 3e2 = 3 x 10^2 = 300; typographic minus and any
    Unicode decimal digits are read. Not numbers, thus compared as text: 1,5 and 1,2,3 and 3:30 and dates
    (ambiguous), 1/0, nan, inf, 5 million, exponents beyond 400. Choices: a lone letter A-E, with or without
    brackets. Everything else: case-folded, spaces collapsed, trailing period dropped.
    """
    answer = _trim(answer)
    if choice := re.fullmatch(r"\(?([A-Ea-e])\)?", answer):
        return ("choice", choice[1].upper())
    number = _parse_number(answer) if len(answer) <= _LONGEST else None
    return ("text", " ".join(answer.casefold().split())) if number is None else ("number", number)


def _parse_number(text: str) -> Fraction | None:
    text = "".join(_plain_character(c) for c in text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r" \1/\2", text)
    text = re.sub(r"\\([$%£€])", r"\1", text.replace("{,}", ",").replace(r"\,", "").replace(r"\!", ""))
    match = _NUMBER.fullmatch(text.strip())
    if not match or not _is_unit(match["rest"]) or (match["sign"] and match["sign2"]):
        return None
    if match["top"]:
        if int(match["bottom"]) == 0 or (match["whole"] and match["top"].startswith("-")):
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    else:
        exponent = int(match["exp"] or match["exp10"] or 0)
        if abs(exponent) > _LARGEST_EXPONENT:
            return None
        value = Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** exponent
    return -value if "-" in (match["sign"], match["sign2"]) else value


def _plain_character(c: str) -> str:
    """One typed character in ASCII where it has a plain meaning in a number: digits, minus signs, spaces,
    ½."""
    if c in "−–﹣-":
        return "-"
    if unicodedata.decimal(c, None) is not None:
        return str(unicodedata.decimal(c))
    if unicodedata.decomposition(c).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", c).replace("⁄", "/")
    return " " if c.isspace() else c


def _is_unit(rest: str) -> bool:
    """Whether what follows the number is at most %, a currency sign and four words of unit."""
    rest = rest.strip().removeprefix("%").removeprefix("$").removeprefix("£").removeprefix("€").strip()
    words = [word for word in re.split(r"[ /.-]+", rest) if word]
    return len(words) <= 4 and all(_UNIT_WORD.fullmatch(w) and w.lower() not in _NOT_UNITS for w in words)


def is_correct(predicted: str | None, gold: str) -> bool:
    """Whether an extracted answer equals the reference by normalize()'s rules. None (no answer given) is
    never correct."""
    return predicted is not None and normalize(predicted) == normalize(gold)


def majority_vote(answers: list[str | None]) -> str | None:
    """The most frequent answer (self-consistency, Wang et al. 2022), in its first spelling; 1,000 and 1000
    vote together.

    None entries never vote, a tie goes to the answer that came first, and no vote at all is None.
    """
    votes: dict[tuple, list[str]] = {}
    for answer in answers:
        if answer is not None:
            votes.setdefault(normalize(answer), []).append(answer)
    return max(votes.values(), key=len)[0] if votes else None  # max keeps the first of equals


def split_steps(text: str) -> list[str]:
    """The steps of a worked solution, in order and as written but for outer spaces; joined they lack only
    blank and answer lines.

    One step a line; a line "Step k: ..." opens a block that also takes the lines below it, up to the next
    "Step". A line that begins with an answer marker of any style, also in bold, a heading, a quote or a list
    (or is a lone option letter), is the final answer and no step.
    """
    lines = lambda step: filter(None, (line.strip() for line in step.splitlines()))
    return ["\n".join(lines(text[start:end])) for start, end in step_spans(text)]


def step_spans(text: str) -> list[tuple[int, int]]:
    """Where the steps of split_steps stand in the text: (start, end) of each, without outer spaces."""
    spans: list[tuple[int, int]] = []
    in_block, at = False, 0
    for whole in text.splitlines(keepends=True):
        line, start = whole.strip(), at + len(whole) - len(whole.lstrip())
        at += len(whole)
        if _ANSWER_LINE.match(line) or _LONE_LETTER.fullmatch(line):
            in_block = False
        elif line and in_block and not _STEP_HEAD.match(line):
            spans[-1] = (spans[-1][0], start + len(line))
        elif line:
            spans.append((start, start + len(line)))
            in_block = bool(_STEP_HEAD.match(line))
    return spans


def step_ends(text: str) -> list[int]:
    """The place of the line break that ends each of split_steps: len(text) where the text ends first."""
    return [end + len("".join(text[end:].splitlines()[:1])) for _, end in step_spans(text)]


def number_steps(steps: list[str], answer: str) -> str:
    """Steps without heads -> URSA's form: `Step 1: ...`, `Step 2: ...`, then a last line `†Answer: ...`."""
    lines = [f"Step {k}: {step}" for k, step in enumerate(steps, 1)]
    return "\n".join([*lines, f"†Answer: {answer}"])
