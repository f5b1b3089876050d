"""Columns of a table: which is what, by usual names or by those that were given, and what is said
of the others."""

from __future__ import annotations

import pytest

from finetune.data import columns
from finetune.data.columns import Columns, Layout
from finetune.errors import UserError


def choose(header: str, *rows: str, layout: Layout | None = None) -> Columns:
    lines = [
        (i + 2, row.split(","))
        for i, row in enumerate(rows or ("a.jpg," * header.count(",") + "cat",))
    ]
    return columns.choose("t.csv", header.split(","), lines, layout or Layout())


def refused(header: str, *rows: str, layout: Layout | None = None) -> str:
    with pytest.raises(UserError) as caught:
        choose(header, *rows, layout=layout)
    return str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        *(
            "filename,class",
            "image,label",
            "file,target",
            "img_path,category",
            "image_path,label",
            "filepath,Class Name",
        ),
        *(
            "fname,label",
            "name,label",
            "id_code,diagnosis",
            "File-Name,CLASS",
            "image_id,breed",
            "Image Path,species",
        ),
    ],
)
def test_usual_names_are_understood_and_told(header: str) -> None:
    """Path and label are found under the names that other tools write, whatever the case and the
    separators; a line says so."""
    found = choose(header)
    path, label = header.split(",")

    assert {"path": 0, "label": 1} == found.at
    assert len(found.notes) == 1
    assert f"path is {path!r}; label is {label!r}" in found.notes[0]


def test_the_exact_names_come_first() -> None:
    """A table with path and label is read by these, whatever stands beside them; names that are
    rarely the path come last."""
    assert {"path": 1, "label": 3} == choose("filename,path,class,label").at
    assert {"path": 1, "label": 2} == choose("id,filename,class_name,class_id").at
    assert () == choose("path,label").notes


@pytest.mark.parametrize("header", [",path,label", "Unnamed: 0,path,label"])
def test_the_index_that_pandas_writes_is_no_news(header: str) -> None:
    """A first column without a name, or called Unnamed: 0, needs no word."""
    found = choose(header)
    assert ({"path": 1, "label": 2}, ()) == (found.at, found.notes)


def test_columns_that_are_not_used_are_told() -> None:
    """A fold, a weight and their like are named in one line."""
    assert ("columns: path is 'path'; label is 'label'; not used: 'fold', 'weight'",) == choose(
        "path,label,fold,weight"
    ).notes


def test_several_columns_that_may_be_it_are_refused_with_the_option() -> None:
    """Two columns that may be the path are named, with the option that chooses; that option then
    settles it."""
    message = refused("image,image_path,label")
    assert "several columns may be the path: 'image', 'image_path'" in message
    assert "--path-column NAME" in message
    assert {"path": 1, "label": 2} == choose(
        "image,image_path,label", layout=Layout(path="Image Path")
    ).at


def test_a_table_without_a_known_name_names_its_columns_and_the_options() -> None:
    """What the table has is listed, with the options that name the columns; a column that was named
    and is not there, too."""
    message = refused("picture,what")
    assert "it has 'picture', 'what'" in message
    assert "--path-column NAME --label-column NAME" in message
    assert {"path": 0, "label": 1} == choose(
        "picture,what", layout=Layout(path="picture", label="what")
    ).at
    assert "no column 'nope'; it has 'path', 'label'" in refused(
        "path,label", layout=Layout(label="nope")
    )


def test_a_flag_of_validation_is_the_split() -> None:
    """is_valid with True and False divides the images, and that is told; with other values it does
    not."""
    found = choose("path,label,is_valid", "a,cat,True", "b,cat,False")
    assert ({"path": 0, "label": 1, "split": 2}, True) == (found.at, found.flag)
    assert "split is 'is_valid' (true: validation; --split-column none: not used)" in found.notes[0]
    assert "split" not in choose("path,label,valid", "a,cat,12", "b,cat,False").at
    assert (
        "split" not in choose("path,label,is_valid", "a,cat,True", layout=Layout(split="none")).at
    )


def test_a_set_is_the_split_only_where_it_names_parts() -> None:
    """A column called set holds the split where all its values are names of parts."""
    assert 2 == choose("path,label,set", "a,cat,train", "b,cat,test").at["split"]
    assert "split" not in choose("path,label,set", "a,cat,stamps", "b,cat,test").at


def test_groups_have_usual_names() -> None:
    """Patients stay together without being asked for; where two columns may be the group, none is,
    and both are named."""
    assert 2 == choose("path,label,patient_id", "a,cat,7").at["group"]
    found = choose("path,label,patient,subject", "a,cat,7,7")
    assert "group" not in found.at
    assert "several columns may be the group: 'patient', 'subject'" in found.notes[1]
    assert "group" not in choose("path,label,group", "a,cat,7", layout=Layout(group="none")).at


def test_a_named_label_column_ends_the_doubt_about_several_labels() -> None:
    """A table with label and label2, or with labels alone, is read where --label-column says which
    holds the class."""
    assert "--label-column NAME" in refused("path,label,label2")
    assert 1 == choose("path,label,label2", layout=Layout(label="label")).at["label"]
    assert 1 == choose("path,labels", layout=Layout(label="labels")).at["label"]
