"""What is a readable file, and what a message about an unreadable one may say."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedlora.config.sections import Data
from fedlora.data.files import columns
from fedlora.errors import UserError
from fedlora.paths import looks_local
from reading import load

TABLE = {"text": ['a, "b"\nc', "née", "d"], "label": ["x", "y", "x"]}
ROWS = [{"text": text, "label": label} for text, label in zip(*TABLE.values(), strict=True)]
LINES = "\n".join(map(json.dumps, ROWS))


def rejection_reason(path: Path) -> str:
    with pytest.raises(UserError) as error:
        columns(path, "data.source")
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"data.source = {str(path)!r}: ")
    return message


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.replace("\n", "\r\n\r\n \n") + "\n\n",
        json.dumps(ROWS),
        "\n " + json.dumps(ROWS, indent=2) + "\n",
        json.dumps(TABLE),
        json.dumps(TABLE, indent=1),
        json.dumps({name: {str(i): value for i, value in enumerate(column)} for name, column in TABLE.items()}),
    ],
)
@pytest.mark.parametrize("name", ["d.json", "D.JsonL", "d.JSONL.GZ"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_any_valid_json_is_read_whatever_its_ending_looks_like(tmp_path, content, name, mark):
    whole = mark + content.encode()
    path = written(tmp_path / name, gzip.compress(whole) if name.endswith("GZ") else whole)
    assert columns(path, "data.source") == TABLE
    assert looks_local(name)


@pytest.mark.parametrize("name", ["d.CSV", "d.Csv.gz", "d.PARQUET"])
def test_an_ending_in_any_capitalization_is_read(tmp_path, name):
    if name.endswith("T"):
        parquet.write_table(pa.table(TABLE), tmp_path / name)
    else:
        content = b"\xef\xbb\xbf" + b'text,label\r\n"a, ""b""\nc",x\r\nn\xc3\xa9e,y\r\nd,x\r\n'
        written(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert columns(tmp_path / name, "data.source") == TABLE


def test_the_labels_json_beside_a_file_may_have_a_byte_order_mark(tmp_path):
    path = written(tmp_path / "d.csv", "text,label\na,0\nb,1\n")
    written(tmp_path / "labels.json", b'\xef\xbb\xbf["x", "y"]')
    assert load(Data(source=str(path)), 0).labels == ("x", "y")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_unused_columns_may_have_one_name_and_a_wanted_one_may_not(tmp_path, ending):
    def table(*names: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.{ending}"
        if ending == "csv":
            written(path, "\n".join([",".join(names), *("a,x,1,2", "b,y,1,2")]))
        else:
            parquet.write_table(pa.table([["a", "b"], ["x", "y"], [1, 1], [2, 2]], names=list(names)), path)
        return str(path)

    source = table("text", "label", "note", "note")
    assert load(Data(source=source, test=source), 0).labels == ("x", "y")
    with pytest.raises(UserError, match=r"column 'label' \(data.label\): several columns have this name"):
        load(Data(source=table("text", "label", "label", "note")), 0)


@pytest.mark.parametrize(
    "content",
    [
        "text,label,,\na,x,,\nb,y\n\nc,x,,,,\n",
        "text,label\na,x,\nb,y,,\nc,x\n",
        ",text,,label\n0,a,,x\n1,b,,y\n2,c,,x\n",
        " text , label\na,x\nb,y\nc,x",
        "text,label\ra,x\rb,y\rc,x",
    ],
)
def test_columns_without_a_name_and_commas_at_the_end_do_not_matter(tmp_path, content):
    assert columns(written(tmp_path / "d.csv", content), "data.source") == {
        "text": ["a", "b", "c"],
        "label": ["x", "y", "x"],
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('text,label\na,x\n"secret,y\nb,x\n"secret too,y\n', "lines 3 to 5: text after a closing quote"),
        ('text,label\na,x\nb,"secret" x\n', "line 3: text after a closing quote"),
        ('text,label\na,x\n"secret,y\nb,x\n', "lines 3 to 4: a quote is never closed"),
        ("text,label,note\na,x,\nsecret\n", "line 3 has 1 values for the 3 columns"),
        ('text,label\n"a\n\nb",x\nsecret,y,z\n', "line 5 has 3 values for the 2 columns"),
    ],
)
def test_a_csv_row_that_is_not_clear_is_refused_with_its_line(tmp_path, content, reason):
    message = rejection_reason(written(tmp_path / "d.csv", content))
    assert reason in message and "secret" not in message


def test_a_long_text_in_csv_is_read_and_the_modules_limit_stays(tmp_path):
    before = csv.field_size_limit()
    path = written(tmp_path / "d.csv", f"text,label\n{'long ' * 100_000},x\n")
    assert columns(path, "data.source")["text"] == ["long " * 100_000]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.csv", "text,label\na,x\nnée,y\n".encode("cp1252"), "line 3 is not UTF-8; save it as UTF-8"),
        ("d.csv", "text,label\na,x\n".encode("utf-16"), "line 1 is not UTF-8; save it as UTF-8"),
        ("d.csv", "text,label\na,x\n".encode("utf-16-le"), "line 1 is not UTF-8; save it as UTF-8"),
        ("d.jsonl", LINES.encode("utf-16"), "line 1 is not UTF-8; save it as UTF-8"),
        ("d.jsonl", b'{"text": "secret"}\n{"text": "secret\n', "line 2 is not JSON"),
        ("d.json", b'{"text": ["secret"],\n"label": ["secret",]}', "line 2 is not JSON"),
        ("d.json", b'{"text": ["secret", "secret"], "label": [1]}', "the columns have different lengths"),
        ("d.json", b'{"text": {"0": "secret"}, "label": {"1": 1}}', "the columns have different rows"),
        ("d.json", b'["secret", {"text": "secret"}]', "row 1 is not a JSON object"),
        ("d.jsonl", b'{"text": "secret"}\n"secret"\n', "row 2 is not a JSON object"),
        ("d.jsonl", b'{"text": "a"}\n{"secret": 1, "secret": 2}\n', "line 2: an object has a duplicate key"),
        ("d.json", b"[" * 100_000, "line 1: too deeply nested"),
        ("d.parquet", b"PAR1 secret", "not readable"),
        ("d.csv.gz", b"secret", "not readable"),
        ("d.csv.gz", gzip.compress(b"secret" * 100, mtime=0)[:-9], "not readable"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_line_and_without_its_content(tmp_path, name, content, reason):
    message = rejection_reason(written(tmp_path / name, content))
    assert reason in message and "secret" not in message.replace(str(tmp_path), "")


def test_a_message_about_a_missing_column_shows_few_and_short_names(tmp_path):
    names = [f"\x1b[31m{i} " + "private " * 1000 for i in range(500)]
    path = written(tmp_path / "d.csv", ",".join(names) + "\n" + ",".join("x" for _ in names) + "\n")
    with pytest.raises(UserError, match="has no column 'text'") as error:
        load(Data(source=str(path)), 0)
    assert len(str(error.value)) < 1000 and "\x1b" not in str(error.value) and "and 490 more" in str(error.value)
