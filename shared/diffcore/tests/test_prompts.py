"""Prompts come out as they were written, or their line is reported."""

import csv
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffcore.data import load_prompts
from diffcore.errors import UserError
from diffcore.testing.malformed.prompts import prompt_cases
from diffcore.testing.sentinel import listing, sentinel
from diffcore.testing.sockets import make_socket

CASES = {case.name: case for case in prompt_cases()}


def test_there_are_enough_cases_of_every_kind():
    assert len(CASES) == len(prompt_cases())
    assert sum(case.prompts is None for case in CASES.values()) >= 20
    assert sum(bool(case.bad) for case in CASES.values()) >= 50


@pytest.mark.parametrize("name", CASES)
def test_it_is_read_or_reported_by_line(tmp_path, name):
    case = CASES[name]
    path = tmp_path / case.file
    path.write_bytes(case.data)
    before = listing(tmp_path)
    with sentinel(tmp_path) as events:
        if case.prompts is None:
            with pytest.raises(UserError) as caught:
                load_prompts(path)
            told = str(caught.value)
        else:
            found = load_prompts(path)
            told = "; ".join(found.notes)
            assert found.prompts == case.prompts
            assert tuple(line for line, _ in found.skipped) == case.bad
            if case.bad:
                with pytest.raises(UserError, match=f"line {case.bad[0]} ") as caught:
                    load_prompts(path, strict=True)
                told = f"{told}{caught.value}"
            else:
                assert load_prompts(path, strict=True).prompts == case.prompts
    assert events == []
    assert listing(tmp_path) == before
    assert told.isprintable()
    assert len(told) < 900
    assert case.file in told or not (case.prompts is None or case.bad)


def test_lines_columns_and_repeats_are_told(tmp_path):
    path = tmp_path / "memorized laion.csv"
    path.write_bytes(b"\xef\xbb\xbf;Caption;URL\r\n0;a cat;u0\r\n\r\n1;a dog;u1\r\n2;too;many;cells\r\n3;a cat;\r\n")
    found = load_prompts(str(path))
    assert found.prompts == ("a cat", "a dog", "a cat")
    assert found.lines == (2, 4, 6)
    assert found.columns == {"column 1": ("0", "1", "3"), "URL": ("u0", "u1", "")}
    assert found.distinct == ("a cat", "a dog")
    assert found.places == (0, 1, 0)
    assert found.num_blank == 1
    assert found.notes == (
        "memorized laion.csv line 5 has 4 cells, the header 3; it is left out",
        "memorized laion.csv: left out 1 blank line",
        "memorized laion.csv gives 1 prompts more than once, such as 'a cat'",
    )


def test_other_keys_of_json_lines_are_kept_as_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 7, "text": "x", "tags": ["a"]}\n{"text": "y", "id": null, "mean": 0.5}\n')
    found = load_prompts(path)
    assert found.columns == {"id": ("7", ""), "tags": ('["a"]', ""), "mean": ("", "0.5")}


def test_the_sum_follows_the_content_alone(tmp_path):
    def made(name: str, text: str) -> str:
        (tmp_path / name).write_bytes(text.encode())
        return load_prompts(tmp_path / name).sha256

    same = {
        made("a.csv", "id,prompt\n1,x\n"),
        made("b.csv", 'id;prompt\r\n"1";x\r\n'),
        made("c.tsv", "id\tprompt\n1\tx"),
    }
    assert len(same) == 1
    others = {made("d.csv", "id,prompt\n1,y\n"), made("e.csv", "id,prompt\n2,x\n"), made("f.csv", "\nid,prompt\n1,x\n")}
    assert len(same | others) == 4


def test_what_is_no_file_is_refused_and_never_opened(tmp_path):
    make_socket(tmp_path / "socket.txt")
    (tmp_path / "folder.csv").mkdir()
    for name, message in (
        ("socket.txt", "not a regular file"),
        ("folder.csv", "is empty; expected images"),
        ("no.txt", "exist"),
    ):
        with pytest.raises(UserError, match=message):
            load_prompts(tmp_path / name)


# What a line of a file of prompts may hold.
line = st.text(st.characters(codec="utf-8", exclude_characters=[chr(code) for code in range(32)]), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(line, line), min_size=1, max_size=5), separator=st.sampled_from(",;\t"))
def test_what_is_written_is_read(tmp_path, rows, separator):
    table = io.StringIO(newline="")
    writer = csv.writer(table, delimiter=separator, lineterminator="\r\n")
    writer.writerows([("note", "prompt"), *rows])
    (tmp_path / "p.csv").write_bytes(table.getvalue().encode())
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"note": note, "prompt": prompt}) + "\n" for note, prompt in rows)
    )
    (tmp_path / "p.txt").write_bytes("\r\n".join(prompt for _, prompt in rows).encode())
    for name in ("p.csv", "p.jsonl"):
        found = load_prompts(tmp_path / name)
        assert list(zip(found.columns["note"], found.prompts, strict=True)) == rows
        assert not found.skipped
    written = [prompt for _, prompt in rows if prompt.strip()]
    if written:
        assert list(load_prompts(tmp_path / "p.txt").prompts) == written
