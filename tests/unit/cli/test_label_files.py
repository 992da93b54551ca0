"""Files that people bring, and tables that they open: errors with file and line, and no cell that is a formula."""

from __future__ import annotations

import csv
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from lossk.analysis.tables import plain_cell, safe_cell, write_table
from lossk.cli import main as cli
from lossk.cli.label_files import MOST_CLASSES, read_array, read_classes, read_lines
from planted import planted_kernel

RULE = "a class number must be an integer, at least 0 and less than 1,000,000, got"


@pytest.mark.parametrize("suffix", [".txt", ".csv"])
@pytest.mark.parametrize(
    ("content", "labels", "names"),
    [
        (b"3\n1\n2\n", [3, 1, 2], []),
        (b"\xef\xbb\xbf3\r\n1\r\n2\r\n", [3, 1, 2], []),  # a byte-order mark, Windows' ends of lines
        (b"3\r1\r2", [3, 1, 2], []),
        (b"+3\n007\n 2 \n\n\n", [3, 7, 2], []),
        (b"\xef\xbb\xbfcat\ndog\ncat\n", [0, 1, 0], ["cat", "dog"]),
        ("größe\nnan\ncafé\n".encode(), [1, 2, 0], ["café", "größe", "nan"]),
        ("a\u2028b\nc\x85d\n".encode(), [0, 1], ["a\u2028b", "c\x85d"]),  # no ends of lines
        (b"3\ncat\n-1\n", [1, 2, 0], ["-1", "3", "cat"]),
    ],
)
def test_classes_are_read(suffix: str, content: bytes, labels: list[int], names: list[str], tmp_path: Path) -> None:
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(content)
    found, found_names = read_classes(path)
    assert (found.tolist(), found_names, found.dtype) == (labels, names, np.int64)


@pytest.mark.parametrize("suffix", [".txt", ".csv"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9\n", "line 1: byte 0xe9 is not UTF-8"),
        (b"cat\ndog\nna\xefve\n", "line 3: byte 0xef is not UTF-8"),
        ("cat\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (b"0\n1\n1e400\n", f"line 3: {RULE} 1e400"),
        (b"0\nnan\n1\n", f"line 2: {RULE} nan"),
        (b"0\n-inf\n", f"line 2: {RULE} -inf"),
        (b"%d\n" % 2**70, f"line 1: {RULE} {2**70}"),
        (b"0\n" + b"9" * 9000, "line 2: a class number must be"),
        (b"1000000\n", f"line 1: {RULE} 1000000"),
        (b"0\n-1\n", f"line 2: {RULE} -1"),
        (b"1.0\n2.0\n", f"line 1: {RULE} 1.0"),
        (b"1_0\n", f"line 1: {RULE} 1_0"),
        ("٣\n".encode(), f"line 1: {RULE} ٣"),
        (b"0\n\n1\n", "line 2 is empty"),
        (b"cat\n   \ndog\n", "line 2 is empty"),
        (b"cat\nd\x00g\n", r"line 2 holds the control character '\x00'"),
        (b"cat\n\x1b[2Jdog\n", r"line 2 holds the control character '\x1b'"),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_what_is_wrong_has_its_file_and_line(suffix: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read_classes(path)
    assert str(path) in str(raised.value)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,label\n1,cat\n2\n", "line 3 has no column 1"),
        ('label\n"cat\n', "line 2 is no CSV"),
        ("label\n" + "x" * 200_000, "line 2 is no CSV: field larger than field limit"),
        ("id,label\n1,7\n2,7.5\n", f"line 3: {RULE} 7.5"),
        ("1,2\n", "must have one column"),
    ],
)
def test_tables_too(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"labels\.csv") as raised:
        read_classes(path)
    assert message in str(raised.value)


def test_a_heading_behind_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b'\xef\xbb\xbflabel,id\r\ncat,1\r\n"a, b",2\r\n')
    assert read_classes(path)[1] == ["a, b", "cat"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1.0, 2.0]), "must hold integers [N], got float64 [2]"),
        (np.array([[1]]), "must hold integers [N], got int64 [1, 1]"),
        (np.array([0, 2**63], dtype=np.uint64), f"element 1: {RULE} {2**63}"),
        (np.array([0, 5, -3]), f"element 2: {RULE} -3"),
        (np.array([MOST_CLASSES]), f"element 0: {RULE} {MOST_CLASSES}"),
        (np.array([print], dtype=object), "is no .npy file of numbers"),
    ],
)
def test_arrays_of_classes(array: np.ndarray, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.npy"
    np.save(path, array)
    with pytest.raises(ValueError, match=r"labels\.npy") as raised:
        read_classes(path)
    assert message in str(raised.value)


class Bad:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("called"),))


def test_no_array_file_executes_or_takes_more_than_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("good.npy", np.arange(3))
    good = Path("good.npy").read_bytes()
    np.savez("zip.npz", a=np.arange(3))
    np.save("object.npy", np.array([Bad()], dtype=object))
    files = {
        "pickle": pickle.dumps(Bad()),
        "object": Path("object.npy").read_bytes(),
        "zip": Path("zip.npz").read_bytes(),
        "huge": good.replace(b"(3,), }          ", b"(9999999999999,),}"),
        "negative": good.replace(b"(3,)", b"(-3)"),
        "cut": good[:-8],
        "heading": good[:30],
        "empty": b"",
    }
    for name, content in files.items():
        Path(f"{name}.npy").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.npy' is no .npy file of numbers"):
            read_array(Path(f"{name}.npy"))
    assert read_array(Path("good.npy")).tolist() == [0, 1, 2]
    assert not Path("called").exists()


def test_texts_keep_their_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\nthree\xe2\x80\xa8still three\r\n")
    assert read_lines(path) == ["one", "", "three\u2028still three"]


@pytest.mark.parametrize("command", ["map", "hierarchy", "report"])
@pytest.mark.parametrize("content", [b"0\n1\n2\n0\n", b"caf\xe9\n", b"0\n" * 8 + b"1e400\n"])
def test_commands_say_it_in_one_line(
    command: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted_kernel(torch.arange(9) % 3).save(tmp_path / "x.lossk")
    (tmp_path / "labels.csv").write_bytes(content)
    assert cli.main([command, str(tmp_path / "x.lossk"), "--labels", str(tmp_path / "labels.csv")]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "labels" in told


# -- tables -----------------------------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\tx", "\n=1", " =1", "\uff1d1+1", "=a|' /C b'!A0", "-inf", "'=1"]
TEXTS = ["cat", "a=b", "", "'tis", "-5", "+3.5e-7", "1-1", "é", "a;b", 'say "x", y', "-.5"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_becomes_text(text: str) -> None:
    assert safe_cell(text) == f"'{text}"
    assert plain_cell(safe_cell(text)) == text


@pytest.mark.parametrize("text", ["\r=1", "a\r=1", "a\r\n=1", "a\n=1"])
def test_no_end_of_a_line_begins_a_cell(text: str, tmp_path: Path) -> None:
    write_table({"label": [text], "value": [-1]}, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [len(row) for row in rows] == [2, 2]
    assert not rows[1][0].startswith(("\r", "\n", "="))


@pytest.mark.parametrize("text", [*TEXTS, -5, -0.5, math.inf, None, True])
def test_all_else_stays(text: Any) -> None:
    assert safe_cell(text) is text
    assert not isinstance(text, str) or plain_cell(text) == text


def test_a_table_keeps_its_numbers_and_gives_its_texts_back(tmp_path: Path) -> None:
    path, texts = tmp_path / "table.csv", [*FORMULAS, *TEXTS]
    values = np.linspace(-1, 1, len(texts)) / 3
    columns = {"value": torch.from_numpy(values), "label": texts, "=1+1": np.arange(len(texts)) - 4, "ok": values > 0}
    write_table(columns, path)
    with path.open(newline="", encoding="utf-8") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["value", "label", "'=1+1", "ok"]
    assert not any(cell[:1] in "=@\t\r\n" for row in rows for cell in row if cell)
    assert [plain_cell(row[1]) for row in rows] == texts
    again = pandas.read_csv(path)
    assert np.array_equal(again["value"], values)
    assert again["'=1+1"].tolist() == list(range(-4, len(texts) - 4))
    assert again["ok"].tolist() == (values > 0).tolist()


def test_labels_written_are_labels_read(tmp_path: Path) -> None:
    names = ["=a", "'b", "-c", "@d"]
    write_table({"sample": np.arange(4), "label": names}, tmp_path / "map.csv")
    found, found_names = read_classes(tmp_path / "map.csv")
    assert [found_names[i] for i in found] == names
