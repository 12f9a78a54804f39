"""Malformed files of prompts, each with the result that a reader must return."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_GOOD = "a cat on a mat"
# Awkward, and right: every one of these is a prompt and must come out as it went in.
AWKWARD = (
    "",
    " two  spaces ",
    'a "quoted" word; a semicolon, a comma',
    "<script>alert(1)</script> &amp; <b>bold</b>",
    "[/foo] [red]not markup[/red]",
    "=cmd|' /C calc'!A0",
    "-2+3",
    "ein Mädchen, 東京の夜, مرحبا, 🦊‍🔥",
    "ends in a space ",
    "Ctrl\x7f delete and C1 \x9b are text",
    "next line \x85 line \u2028 paragraph \u2029 separators",
    "bidi \u202egnirts\u202c and zero\u200bwidth",
    "../../etc/passwd",
    "{prompt} %s $HOME `id` {{7*7}}",
    "\\n is two characters, \\ud800 is six",
    "\ufeffbyte order mark inside",
    "e\u0301 is not \u00e9",
    "x" * 10_000,
)
_CONTROLS = "\x00\x01\x07\x08\x0b\x0c\x1b\x1f"
_HALVES = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf0\x9f\xa6", b"\xc0\xaf", b"\xe2\x80")  # no UTF-8


@dataclass(frozen=True)
class PromptCase:
    """One file of prompts.

    Attributes:
        name: Unique name that says what is odd.
        file: Name of the file; its suffix tells the format.
        data: Content of the file in bytes.
        prompts: The prompts that a reader must return; None where the whole file must be refused.
        bad: Lines that must be reported.
    """

    name: str
    file: str
    data: bytes
    prompts: tuple[str, ...] | None = None
    bad: tuple[int, ...] = ()


def prompt_cases(seed: int = 0) -> list[PromptCase]:
    """Returns every case, each with a name of its own."""
    return [*_awkward(), *_bad_text(), *_bad_csv(), *_bad_json(), *_refused(), *_noise(seed)]


def _awkward() -> Iterator[PromptCase]:
    text = tuple(prompt for prompt in AWKWARD if prompt.strip())
    for name, end, mark in (("LF", "\n", b""), ("CRLF", "\r\n", b""), ("a byte order mark", "\n", b"\xef\xbb\xbf")):
        yield PromptCase(f"txt: {name}", "prompts.txt", mark + "".join(p + end for p in text).encode(), text)
        for separator in ",;\t":
            rows = "".join(f'{i}{separator}"{p.replace(chr(34), 2 * chr(34))}"{end}' for i, p in enumerate(AWKWARD))
            data = mark + f"{separator}Caption{end}{rows}".encode()
            yield PromptCase(f"csv: {name}, {separator!r}", "prompts.csv", data, AWKWARD)
        lines = (json.dumps({"text": p}, ensure_ascii=mark == b"") + end for p in AWKWARD)
        yield PromptCase(f"jsonl: {name}", "prompts.jsonl", mark + "".join(lines).encode(), AWKWARD)
    yield PromptCase("txt: no last line end", "prompts.TXT", b"one\ntwo", ("one", "two"))
    yield PromptCase("txt: blank lines", "prompts.txt", b"\n\none\n \t\n\r\ntwo\n\n", ("one", "two"))
    yield PromptCase("tsv", "prompts.tsv", b"URL\tTEXT\nu\ta, b; c\n", ("a, b; c",))
    yield PromptCase("csv: blank lines", "prompts.csv", b"\n\nid;prompt\n\n1;one\n\n", ("one",))
    yield PromptCase("csv: an empty cell", "prompts.csv", b'prompt\n""\nx\n', ("", "x"))
    yield PromptCase("csv: prompt before caption", "prompts.csv", b"caption,prompt\nno,yes\n", ("yes",))
    yield PromptCase("csv: quotes inside", "prompts.csv", b'a,prompt\n1,the 5" screen\n', ('the 5" screen',))
    yield PromptCase("jsonl: many keys", "p.jsonl", b'{"id": 7, "Caption": "x", "more": {"a": [1]}}\n', ("x",))


def _bad_text() -> Iterator[PromptCase]:
    def case(name: str, middle: bytes) -> PromptCase:
        data = f"{_GOOD}\n".encode() + middle + b"\nlast\n"
        return PromptCase(f"txt: {name}", "prompts.txt", data, (_GOOD, "last"), (2,))

    for control in _CONTROLS:
        yield case(f"control {control!r}", f"a{control}b".encode())
    yield case("a tab", b"a\tb")
    yield case("old line ends", b"a\rb\rc")
    for half in _HALVES:
        yield case(f"bytes {half.hex()}", b"a" + half + b"b")
    yield case("too long", b"x" * 10_001)
    yield case("one long line", b"word " * 200_000)


def _bad_csv() -> Iterator[PromptCase]:
    def case(name: str, middle: bytes, bad: tuple[int, ...] = (3,)) -> PromptCase:
        data = b"id;Caption\n1;first\n" + middle + b"\n9;last\n"
        return PromptCase(f"csv: {name}", "prompts.csv", data, ("first", "last"), bad)

    yield case("too few cells", b"2")
    yield case("too many cells", b"2;an unquoted ; separator")
    yield case("text after a quote", b'2;"Breaking Bad" poster')
    yield case("a line break in quotes", b'2;"first\nsecond"')
    yield case("a prompt of three lines that looks like rows", b'2;"one\n7;two\n8;three"')
    yield case("a break in another cell", b'"2\n3";x')
    yield case("NUL", b"2;a\x00b")
    yield case("escape", b"2;\x1b[31mred")
    yield case("not UTF-8", b"2;caf\xe9")
    yield case("not UTF-8 in another cell", b"caf\xe9;x")
    yield case("old line ends", b"2;a\rb")
    yield case("too long", b"2;" + b"x" * 10_001)
    yield case("a cell beyond the parser's limit", b"2;" + b"x" * 200_000)
    yield case("a hundred thousand cells", b";" * 100_000)
    data = b'id;Caption\n1;first\n2;"never closed\n3;swallowed\n4;swallowed\n'
    yield PromptCase("csv: a quote that never ends", "prompts.csv", data, ("first",), (3,))


def _bad_json() -> Iterator[PromptCase]:
    def case(name: str, middle: bytes) -> PromptCase:
        data = b'{"prompt": "first"}\n' + middle + b'\n{"prompt": "last"}\n'
        return PromptCase(f"jsonl: {name}", "prompts.jsonl", data, ("first", "last"), (2,))

    yield case("truncated", b'{"prompt": "x')
    yield case("text", b"a cat")
    yield case("a string", b'"a cat"')
    yield case("a list", b'["a cat"]')
    yield case("null", b"null")
    yield case("no prompt", b'{"url": "x"}')
    yield case("a prompt that is null", b'{"prompt": null}')
    yield case("a prompt that is a number", b'{"prompt": 5}')
    yield case("a prompt that is a list", b'{"prompt": ["a"]}')
    yield case("a key twice", b'{"prompt": "a", "prompt": "b"}')
    yield case("NaN", b'{"prompt": "a", "score": NaN}')
    yield case("a number beyond all", b'{"prompt": "a", "score": 1e999}')
    yield case("an integer of a million digits", b'{"prompt": "a", "score": ' + b"9" * 1_000_000 + b"}")
    yield case("deep", b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield case("half of a pair", b'{"prompt": "a\\ud83e b"}')
    yield case("half of a pair in another key", b'{"prompt": "a", "x": "\\udc00"}')
    yield case("NUL", b'{"prompt": "a\\u0000b"}')
    yield case("a line break", b'{"prompt": "a\\nb"}')
    yield case("not UTF-8", b'{"prompt": "caf\xe9"}')
    yield case("two objects", b'{"prompt": "a"} {"prompt": "b"}')


def _refused() -> Iterator[PromptCase]:
    for suffix in ("txt", "csv", "tsv", "jsonl"):
        yield PromptCase(f"{suffix}: empty", f"prompts.{suffix}", b"")
        yield PromptCase(f"{suffix}: blank", f"prompts.{suffix}", b"\n \n\r\n")
        yield PromptCase(f"{suffix}: a mark alone", f"prompts.{suffix}", b"\xef\xbb\xbf")
        for order in ("utf-16-le", "utf-16-be"):
            data = "\ufeffprompt\na cat\n".encode(order)
            yield PromptCase(f"{suffix}: {order}", f"prompts.{suffix}", data)
    for suffix in ("csv", "jsonl"):
        yield PromptCase(f"{suffix}: plain text", f"prompts.{suffix}", b"a cat\na dog\n")
    yield PromptCase("csv: header alone", "prompts.csv", b"id;Caption\n")
    yield PromptCase("csv: a name twice", "prompts.csv", b"id,id,prompt\n1,2,x\n")
    yield PromptCase("csv: a header that never ends", "prompts.csv", b'id,"prompt\n1,x\n')
    yield PromptCase("csv: a whole table in JSON", "prompts.csv", b'[{"prompt": "x"}]')
    yield PromptCase("jsonl: one list", "prompts.jsonl", b'[{"prompt": "x"}]')
    yield PromptCase("another suffix", "prompts.pkl", b"\x80\x04K\x01.")
    yield PromptCase("no suffix", "prompts", b"a cat\n")
    yield PromptCase("csv: a zip archive", "prompts.csv", b"PK\x03\x04\n\x00\x00\x00")


def _noise(seed: int) -> Iterator[PromptCase]:
    """Random bytes, behind a valid first line where the format needs one."""
    generator = np.random.default_rng(seed)
    for number in range(6):
        noise = bytes(generator.integers(0x80, 0xC0, size=64, dtype=np.uint8))  # tails of characters without heads
        yield PromptCase(f"txt: noise {number}", "prompts.txt", b"x\n" + noise + b"\n", ("x",), (2,))
