"""CSV tables: what is read, and every way to be wrong, with its line."""

from __future__ import annotations

import os
from pathlib import Path

import odd
import pytest

from finetune.data import csv_table
from finetune.data.columns import Layout
from finetune.data.faults import Rules
from finetune.errors import UserError
from finetune.names import shown


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg", "c.jpg", "sub/d.jpg", "Grüße, 猫.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def write(folder: Path, text: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(folder: Path, text: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        csv_table.read(write(folder, text))
    return str(caught.value)


def test_all_columns(folder: Path) -> None:
    """Paths, labels, splits and groups are read, with the line they stand on."""
    found = csv_table.read(
        write(
            folder,
            "path,label,split,group\na.jpg,cat,train,g1\nsub/d.jpg,dog,validation,\n\nb.jpg,cat,TEST,g2\n",
        )
    )
    assert (folder, ()) == (found.root, found.notes)
    assert (
        csv_table.Row(2, "a.jpg", "cat", "train", "g1"),
        csv_table.Row(3, "sub/d.jpg", "dog", "val", ""),
        csv_table.Row(5, "b.jpg", "cat", "test", "g2"),
    ) == found.rows


def test_columns_in_any_order_and_others_beside_them(folder: Path) -> None:
    """The header names the columns; columns of other names are left alone."""
    rows = csv_table.read(write(folder, "Width,LABEL, path\n10,cat,a.jpg\n20,dog,b.jpg\n")).rows
    assert [("a.jpg", "cat"), ("b.jpg", "dog")] == [(row.path, row.label) for row in rows]


def test_byte_order_mark_quotes_and_unicode(folder: Path) -> None:
    """A BOM, quoted commas, doubled quotes, Windows line ends and any script are text like other
    text."""
    rows = csv_table.read(
        write(
            folder, '\ufeffpath,label\r\n"Grüße, 猫.jpg","cat, ""tabby"""\r\na.jpg,犬\r\n'.encode()
        )
    ).rows
    assert [("Grüße, 猫.jpg", 'cat, "tabby"'), ("a.jpg", "犬")] == [
        (row.path, row.label) for row in rows
    ]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators(folder: Path, separator: str) -> None:
    """Tables with semicolons or tabs are understood."""
    rows = csv_table.read(
        write(folder, "path,label\na.jpg,cat\nb.jpg,dog\n".replace(",", separator))
    ).rows
    assert ["cat", "dog"] == [row.label for row in rows]


def test_paths_are_spelled_in_one_way(folder: Path) -> None:
    """Absolute paths, ./ and Windows separators become paths relative to the table."""
    rows = csv_table.read(
        write(folder, f"path,label\n./a.jpg,x\nsub\\d.jpg,x\n{folder}/b.jpg,y\nsub/../c.jpg,y\n")
    ).rows
    assert ["a.jpg", "sub/d.jpg", "b.jpg", "c.jpg"] == [row.path for row in rows]


def test_labels_in_two_unicode_forms_are_one_class(folder: Path) -> None:
    """é as one letter and as e with an accent is the same label."""
    rows = csv_table.read(write(folder, "path,label\na.jpg,caf\u00e9\nb.jpg,cafe\u0301\n")).rows
    assert 1 == len({row.label for row in rows})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,label\na.jpg,cat\nb.jpg,\n", "line 3: empty label"),
        ("path,label\n,cat\n", "line 2: empty path"),
        ("path,label\na.jpg,cat\nb.jpg\n", "line 3: 1 values under 2 columns"),
        ("path,label\na.jpg,cat, tabby\n", "line 2: 3 values under 2 columns"),
        ("path,label,split\na.jpg,cat,train\nb.jpg,cat,\n", "line 3: split ''"),
        ("path,label,split\na.jpg,cat,dev\n", "line 2: split 'dev'"),
        ("path,label\na.jpg,cat\n./a.jpg,cat\n", "lines 2 and 3: a.jpg is listed twice"),
        (
            "picture,what\na.jpg,cat\n",
            "no column 'path' and no column 'label'; it has 'picture', 'what'",
        ),
        ("path\na.jpg\n", "no column 'label'"),
        ("path,path,label\na.jpg,a.jpg,cat\n", "column 'path' appears twice"),
        ("path,label\n", "holds no images"),
        ("", "the file is empty"),
        ('path,label\na.jpg,"cat\n', "line 2"),
        (b"path,label\na.jpg,caf\xe9\n", "not UTF-8"),
    ],
)
def test_faults_are_named_with_their_line(folder: Path, text: str | bytes, says: str) -> None:
    """What a table gets wrong is said with the line and the value."""
    assert says in refused(folder, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,label\na.jpg,cat\na.jpg,dog\n", "a.jpg is 'cat' and 'dog'"),
        ("path,label\na.jpg,cat|dog\n", "'cat|dog'"),
        ("path,label\na.jpg,cat;dog\n", "'cat;dog'"),
        ("path,label\na.jpg,\"['cat', 'dog']\"\n", "['cat', 'dog']"),
        ('path,label\na.jpg,"cat,dog"\nb.jpg,cat\nc.jpg,dog\n', "'cat,dog'"),
        ("path,label,label\na.jpg,cat,dog\n", "'label' appears twice"),
        ("path,label,label2\na.jpg,cat,dog\n", "column label2"),
        ("path,label_1,label_2\na.jpg,cat,dog\n", "columns label_1, label_2"),
        ("path,labels\na.jpg,cat dog\n", "column labels"),
        ("path,cat,dog,bird\na.jpg,1,0,1\nb.jpg,0,1,0\n", "0/1 columns cat, dog, bird"),
        ("path,label,cat,dog\na.jpg,cat,1,0\nb.jpg,dog,1,1\n", "0/1 column 'cat'"),
    ],
)
def test_multi_label_tables_are_refused_by_name(folder: Path, text: str, says: str) -> None:
    """Several labels an image, in any usual form, are called multi-label and refused."""
    message = refused(folder, text)
    assert "multi-label" in message
    assert says in message


def test_comma_in_a_class_name_is_no_list(folder: Path) -> None:
    """A label with a comma is one class unless its parts are classes themselves."""
    rows = csv_table.read(
        write(folder, 'path,label\na.jpg,"tench, Tinca tinca"\nb.jpg,goldfish\n')
    ).rows
    assert "tench, Tinca tinca" == rows[0].label


def test_missing_files_are_counted_and_the_first_named(folder: Path) -> None:
    """Files that are not there, and folders in their place, are counted; three are named with their
    lines."""
    message = refused(
        folder, "path,label\na.jpg,x\n" + "".join(f"no{i}.jpg,x\n" for i in range(4)) + "sub,y\n"
    )
    assert (
        "5 of 6 files are missing: no0.jpg (line 3); no1.jpg (line 4); no2.jpg (line 5) …"
        in message
    )
    assert f"relative to {folder}" in message


def test_table_that_is_not_there(tmp_path: Path) -> None:
    """A table that cannot be opened is a user's error."""
    with pytest.raises(UserError, match="cannot be read"):
        csv_table.read(tmp_path / "no.csv")


# ---------------------------------------------------------------------------- tables of other tools


def test_a_flag_of_validation_divides_the_rows(folder: Path) -> None:
    """True is validation, False training, as fastai writes them; other words are refused with the
    way to leave the column out."""
    found = csv_table.read(
        write(folder, ",fname,label,is_valid\n0,a.jpg,cat,False\n1,b.jpg,cat,True\n")
    )
    assert ["train", "val"] == [row.split for row in found.rows]
    assert "--split-column none" in refused(folder, "path,label,split\na.jpg,cat,dev\n")


def test_utf_16_is_read(folder: Path) -> None:
    """What Excel saves as Unicode text is read like other text; for Latin-1 the error says how to
    convert it."""
    rows = csv_table.read(write(folder, "path\tlabel\nGrüße, 猫.jpg\t猫\n".encode("utf-16"))).rows
    assert [("Grüße, 猫.jpg", "猫")] == [(row.path, row.label) for row in rows]
    assert "iconv -f LATIN1 -t UTF-8 table.csv" in refused(folder, b"path,label\na.jpg,caf\xe9\n")
    assert "not UTF-8" in refused(folder, b"\xff\xfep\x00a\x00t")


def test_labels_that_differ_in_case_are_told(folder: Path) -> None:
    """Cat and cat are two classes, with a line that says so; spaces around a label never count."""
    found = csv_table.read(write(folder, "path,label\na.jpg,Cat\nb.jpg,cat \nc.jpg,cat\n"))
    assert ["Cat", "cat", "cat"] == [row.label for row in found.rows]
    assert "'Cat' (1) and 'cat' (2)" in found.notes[0]


def test_paths_without_an_extension_get_that_of_their_files(folder: Path) -> None:
    """Ids in place of file names find their files; where two files fit, the path is missing."""
    found = csv_table.read(write(folder, "id_code,diagnosis\na,1\nsub/d,2\n"))
    assert ["a.jpg", "sub/d.jpg"] == [row.path for row in found.rows]
    assert (
        "2 paths without an image's extension got that of the file, as in a.jpg" in found.notes[1]
    )
    (folder / "a.png").write_bytes(b"x")
    assert "1 of 2 files are missing: a (line 2)" in refused(
        folder, "id_code,diagnosis\na,1\nsub/d,2\n"
    )


def test_images_elsewhere_are_found_by_their_root(folder: Path) -> None:
    """Where all images lie in a folder below or above the table, the error names it, and the option
    then reads them."""
    text = "path,label\nd.jpg,x\n"
    assert f"they lie below {folder / 'sub'}: --image-root {folder / 'sub'}" in refused(
        folder, text
    )
    found = csv_table.read(write(folder, text), Layout(root=str(folder / "sub")))
    assert (folder / "sub", "d.jpg") == (found.root, found.rows[0].path)
    (folder / "deep" / "er").mkdir(parents=True)
    with pytest.raises(UserError, match="they lie below"):
        csv_table.read(write(folder / "deep/er", "path,label\nsub/d.jpg,x\n"))
    with pytest.raises(UserError, match="no such folder"):
        csv_table.read(write(folder, text), Layout(root=str(folder / "nowhere")))


@pytest.mark.parametrize("prefix", ["/elsewhere/data/", "C:\\data\\", "old/"])
def test_paths_of_another_machine_are_read_below_the_root(folder: Path, prefix: str) -> None:
    """With --image-root, paths that begin with folders of another machine are read without them,
    which is told."""
    text = f"path,label\n{prefix}a.jpg,x\n{prefix}sub/d.jpg,y\n"
    assert "--image-root" in refused(folder, text)
    found = csv_table.read(write(folder, text), Layout(root=str(folder)))
    assert ["a.jpg", "sub/d.jpg"] == [row.path for row in found.rows]
    assert "paths are read without" in found.notes[0]


def test_rows_that_cannot_be_used_are_left_out_where_that_was_asked_for(folder: Path) -> None:
    """With skip, rows without file, path or label, and rows that are there already, are left out
    and counted, not else."""
    text = "path,label\na.jpg,x\nb.jpg,\n,y\nno.jpg,y\na.jpg,x\nc.jpg,y\n"
    assert "--on-bad-image skip" in refused(folder, text)
    found = csv_table.read(write(folder, text), rules=Rules(on_bad="skip"))
    assert ["a.jpg", "c.jpg"] == [row.path for row in found.rows]
    assert (
        "4 rows of the table left out: 2 without a path or a label (lines 3, 4), "
        "1 without a file (line 5), 1 listed before (line 6)",
    ) == found.notes
    assert [
        ("b.jpg", "line 3: empty label (b.jpg, )"),
        ("line 4", "line 4: empty path (, y)"),
        ("no.jpg", "line 5: no such file (no.jpg, y)"),
        ("a.jpg", "line 6: a.jpg is listed twice (a.jpg, x)"),
    ] == [(fault.path, fault.detail) for fault in found.left_out]
    with pytest.raises(UserError, match="1 of 1 files are missing"):
        csv_table.read(write(folder, "path,label\nno.jpg,y\n"), rules=Rules(on_bad="skip"))


def test_paths_may_be_written_as_they_are_shown(folder: Path) -> None:
    """A path that no file has is read as results show it; a file of the very name comes first."""
    odd.need(folder / "try")
    for name in odd.NAMES:
        (folder / name).write_bytes(b"x")
    text = "path,label\n" + "".join(
        f'"{shown(name)}",cat\n'.replace('quo"', 'quo""') for name in odd.NAMES
    )
    assert list(odd.NAMES) == [row.path for row in csv_table.read(write(folder, text)).rows]
    assert [r"lit\xe9.png"] == [
        row.path for row in csv_table.read(write(folder, "path,label\nlit\\xe9.png,cat\n")).rows
    ]


# ----------------------------------------------------------------------------------- rows at fault


def test_ragged_rows_and_unknown_splits_are_left_out_where_that_was_asked_for(folder: Path) -> None:
    """Rows that are too short or too long, and those whose split is no part, are refused with the
    lines of several, and left out with --on-bad-image skip."""
    text = "path,label,split\na.jpg,x,train\nb.jpg,y\nc.jpg,y,dev\nsub/d.jpg,y,\nb.jpg,x,test,7\n"
    message = refused(folder, text)
    assert "line 3: 2 values under 3 columns; so is 1 more (line 6)" in message
    assert "--on-bad-image skip" in message
    found = csv_table.read(write(folder, text), rules=Rules(on_bad="skip"))
    assert ["a.jpg"] == [row.path for row in found.rows]
    assert [3, 4, 5, 6] == [
        int(fault.detail.removeprefix("line ").partition(":")[0]) for fault in found.left_out
    ]
    assert "2 of an unknown split (lines 4, 5)" in found.notes[0]
    with pytest.raises(UserError, match="no row is left"):
        csv_table.read(write(folder, "path,label\na.jpg\n"), rules=Rules(on_bad="skip"))


CONFLICT = "path,label\na.jpg,x\nb.jpg,y\nc.jpg,y\na.jpg,y\n"


@pytest.mark.parametrize(
    ("rule", "kept", "lines"),
    [("skip", ["b.jpg", "c.jpg"], ["2", "5"]), ("first", ["a.jpg", "b.jpg", "c.jpg"], ["5"])],
)
def test_one_path_under_two_labels_follows_the_rule_of_conflicts(
    folder: Path, rule: str, kept: list[str], lines: list[str]
) -> None:
    """One row in four is no table of several labels: it is refused with the option, which leaves
    all of its rows out, or keeps the first."""
    message = refused(folder, CONFLICT)
    assert "lines 2 and 5: a.jpg is 'x' and 'y'" in message
    assert "multi-label" not in message
    assert "--on-conflict skip" in message
    found = csv_table.read(write(folder, CONFLICT), rules=Rules(on_conflict=rule))
    assert kept == [row.path for row in found.rows]
    assert f"under two labels (line{'s' * (len(lines) > 1)} {', '.join(lines)})" in found.notes[0]


def test_rows_of_one_image_in_two_parts_follow_the_rule_of_conflicts(folder: Path) -> None:
    """One image in the training and the test part, or in two groups, has a way on, too."""
    text = "path,label,split\na.jpg,x,train\nb.jpg,y,train\na.jpg,x,test\n"
    assert "a.jpg is listed twice, with different splits" in refused(folder, text)
    found = csv_table.read(write(folder, text), rules=Rules(on_conflict="first"))
    assert [("a.jpg", "train"), ("b.jpg", "train")] == [(row.path, row.split) for row in found.rows]


def test_lists_of_classes_follow_the_rule_of_conflicts(folder: Path) -> None:
    """Rows that list several classes are left out, or count for the first, where that was asked
    for."""
    text = "path,label\na.jpg,cat|dog\nb.jpg,cat\nc.jpg,dog\n"
    assert "(1 of 3 rows list several)" in refused(folder, text)
    skipped = csv_table.read(write(folder, text), rules=Rules(on_conflict="skip"))
    assert ["b.jpg", "c.jpg"] == [row.path for row in skipped.rows]
    first = csv_table.read(write(folder, text), rules=Rules(on_conflict="first"))
    assert ["cat", "cat", "dog"] == [row.label for row in first.rows]


def test_a_bar_may_be_part_of_a_name(folder: Path) -> None:
    """Where --label-column says which column it is, a label with | is one class, unless its parts
    are classes themselves."""
    text = "path,label\na.jpg,A|B alloy\nb.jpg,steel\n"
    assert "--label-column NAME" in refused(folder, text)
    named = Layout(label="label")
    found = csv_table.read(write(folder, text), named)
    assert ["A|B alloy", "steel"] == [row.label for row in found.rows]
    lists = "path,label\na.jpg,x|y\nb.jpg,x\nc.jpg,y\n"
    with pytest.raises(UserError, match=r"multi-label table: label 'x\|y'"):
        csv_table.read(write(folder, lists), named)


def test_a_table_without_a_header_loses_no_row(folder: Path) -> None:
    """Where the first line is a row it is said, also where --path-column names a cell of it; with
    --no-header all rows are read, columns by number."""
    text = "a.jpg,cat\nb.jpg,dog\n"
    assert "the first line is a row already: a.jpg, cat" in refused(folder, text)
    with pytest.raises(UserError, match="--no-header"):
        csv_table.read(write(folder, text), Layout(path="a.jpg", label="cat"))
    found = csv_table.read(write(folder, text), Layout(header=False))
    assert [(1, "a.jpg", "cat"), (2, "b.jpg", "dog")] == [
        (row.line, row.path, row.label) for row in found.rows
    ]
    turned = csv_table.read(
        write(folder, "cat,train,a.jpg\ndog,test,b.jpg\n"),
        Layout(path="3", split="2", header=False),
    )
    assert [("a.jpg", "cat", "train"), ("b.jpg", "dog", "test")] == [
        (row.path, row.label, row.split) for row in turned.rows
    ]


def test_an_open_quote_is_named_where_it_begins(folder: Path) -> None:
    """The line is that of the row whose quote is not closed, not the last of the file."""
    rows = "".join(f"no{i}.jpg,x\n" for i in range(9))
    message = refused(folder, f'path,label\na.jpg,x\nb.jpg,"cat\n{rows}')
    assert "line 3: not a readable CSV" in message
    assert "read to line 12" in message


def test_missing_files_are_named_as_the_table_names_them(folder: Path) -> None:
    """An absolute path stays one, and --image-root is not advised for it; a web address is called
    that."""
    absolute = refused(folder, f"path,label\n{folder}/a.jpg,x\n{folder}/no.jpg,y\n")
    assert f"1 of 2 files are missing: {folder}/no.jpg (line 3)" in absolute
    assert "--image-root" not in absolute
    web = refused(folder, "path,label\na.jpg,x\nhttps://example.org/b.jpg,y\n")
    assert "https://example.org/b.jpg (line 3)" in web
    assert "web addresses are not read" in web


def test_what_is_no_regular_file_is_called_that(folder: Path) -> None:
    """A pipe or a folder in place of an image is not called missing alone."""
    os.mkfifo(folder / "pipe.jpg")
    assert "pipe.jpg is a pipe" in refused(folder, "path,label\na.jpg,x\npipe.jpg,y\n")
    assert "sub is a folder" in refused(folder, "path,label\na.jpg,x\nsub,y\n")


def test_numbers_written_in_two_ways_and_measurements_are_told(folder: Path) -> None:
    """01, 1 and 1.0 are three classes with a line that says so; a column of different decimals is
    no column of classes."""
    found = csv_table.read(write(folder, "path,label\na.jpg,01\nb.jpg,1\nc.jpg,1.0\n"))
    assert "'01' (1) and '1' (1) and '1.0' (1)" in found.notes[0]
    for i in range(25):
        (folder / f"{i}.jpg").write_bytes(b"x")
    rows = "".join(f"{i}.jpg,{i / 7:.3f}\n" for i in range(25))
    measured = csv_table.read(write(folder, "path,label\n" + rows))
    assert "look like measurements" in measured.notes[-1]


def test_paths_through_a_link_lead_to_their_files(tmp_path: Path) -> None:
    """Where the folder of a table, or a part of a path, is a link, .. is above what it points
    to."""
    for name in ("real/deep/tables", "real/deep/pictures", "elsewhere", "pictures"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "real/deep/pictures/a.jpg").write_bytes(b"right")
    (tmp_path / "pictures/a.jpg").write_bytes(b"wrong")
    (tmp_path / "linked").symlink_to(tmp_path / "real/deep/tables", target_is_directory=True)
    table = write(
        tmp_path / "linked", f"path,label\n../pictures/a.jpg,x\n{tmp_path}/pictures/a.jpg,y\n"
    )
    found = csv_table.read(table)
    assert [b"right", b"wrong"] == [(found.root / row.path).read_bytes() for row in found.rows]
    (tmp_path / "elsewhere/in").symlink_to(tmp_path / "real/deep/tables", target_is_directory=True)
    other = write(tmp_path / "elsewhere", "path,label\nin/../pictures/a.jpg,x\n")
    read = csv_table.read(other)
    assert b"right" == (read.root / read.rows[0].path).read_bytes()


def test_a_root_of_bytes_is_read_as_it_is_shown(folder: Path) -> None:
    """--image-root takes a folder whose name is no UTF-8 in the form that messages show."""
    odd.need(folder / "try")
    root = folder / os.fsdecode(b"caf\xe9")
    root.mkdir()
    (root / "e.jpg").write_bytes(b"x")
    found = csv_table.read(write(folder, "path,label\ne.jpg,x\n"), Layout(root=shown(root)))
    assert root == found.root
