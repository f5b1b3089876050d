"""Durable files: whole or not at all, whatever happens in the middle; and errors that say what to
do."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import odd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import files
from finetune.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------- errors


def test_an_error_says_where_what_and_what_to_do() -> None:
    """The message has the place first, then the value, then the remedy on a line of its own."""
    error = UserError("no tap is written 'fc9'", where=Path("recipe.yaml"), fix="write pooled")

    assert "recipe.yaml: no tap is written 'fc9'\n  → write pooled" == str(error)
    assert ("no tap is written 'fc9'", "recipe.yaml", "write pooled") == (
        error.what,
        error.where,
        error.fix,
    )


def test_an_error_needs_neither_place_nor_remedy() -> None:
    """Where there is nothing to say, nothing is printed."""
    assert "the disk is full" == str(UserError("the disk is full"))


# ------------------------------------------------------------------------------------------ writing


def test_a_file_is_written_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    """Folders on the way are made, the text arrives as UTF-8, and no temporary file stays."""
    files.write_text(tmp_path / "a" / "b" / "Grüße.txt", "Grüße 猫\n")

    assert "Grüße 猫\n".encode() == (tmp_path / "a" / "b" / "Grüße.txt").read_bytes()
    assert ["Grüße.txt"] == names(tmp_path / "a" / "b")


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_the_old_file(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    """Whatever stops the writer, the file that stood there is untouched and the half-written one is
    gone."""
    path = tmp_path / "metrics.json"
    files.write_text(path, "old")

    def write() -> None:
        with files.atomic(path) as temporary:
            temporary.write_text("half of the ne")
            raise fault

    with pytest.raises(fault):
        write()

    assert "old" == path.read_text()
    assert ["metrics.json"] == names(tmp_path)


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path: Path) -> None:
    """The name changes hands at the end, in one step."""
    path = tmp_path / "run.json"
    files.write_text(path, "old")

    with files.atomic(path) as temporary:
        temporary.write_text("new")
        assert "old" == path.read_text()

    assert "new" == path.read_text()


def test_the_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the rename must not find an empty file: fsync comes first."""
    order: list[str] = []
    replace, fsync = Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("replace"), replace(self, to))[1]
    )

    files.write_bytes(tmp_path / "x", b"x")

    assert ["fsync", "replace"] == order


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """A process that dies between writing and renaming has changed nothing under the final name."""
    path = tmp_path / "index.json"
    files.write_text(path, "old")
    code = (
        "import os, sys; from pathlib import Path; from finetune import files\n"
        "with files.atomic(Path(sys.argv[1])) as t: t.write_text('new'); os._exit(9)"
    )

    assert 9 == subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode
    assert "old" == path.read_text()


@pytest.mark.parametrize(
    ("number", "what", "fix"),
    [
        (errno.ENOSPC, "the disk is full", "free some space"),
        (errno.EDQUOT, "the disk is full", "free some space"),
        (errno.EROFS, "cannot write here", "choose another folder"),
        (errno.EACCES, "cannot write here", "choose another folder"),
        (errno.ENOTDIR, "a file stands where a folder is needed", "choose another name"),
    ],
)
def test_a_fault_of_the_disk_becomes_an_error_that_names_the_place(
    tmp_path: Path, number: int, what: str, fix: str
) -> None:
    """Full, read-only or in the way: the user reads where and what to do, not a traceback."""
    with pytest.raises(UserError) as caught, files.disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))

    assert str(tmp_path) == caught.value.where
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the new bytes do not fit, the old ones stay and the fragment goes."""
    path = tmp_path / "log.json"
    files.write_text(path, "old")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        files.write_text(path, "new")

    assert "old" == path.read_text()
    assert ["log.json"] == names(tmp_path)


def test_other_faults_of_the_system_are_not_disguised() -> None:
    """What is neither full nor forbidden stays what it is."""
    with pytest.raises(OSError, match="Input/output"), files.disk_errors("x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    """`--out` under an existing file is a mistake that the user can mend."""
    (tmp_path / "runs").write_text("a file")

    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        files.write_text(tmp_path / "runs" / "run.json", "{}")


# --------------------------------------------------------------------------------------------- JSON


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    """Text outside ASCII is written as itself, and the value survives the way."""
    value = {"class": "猫", "top1": 0.931, "labels": [1, None, True]}
    files.write_json(tmp_path / "x.json", value)

    assert value == files.read_json(tmp_path / "x.json")
    assert "猫" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_json_has_no_nan(tmp_path: Path) -> None:
    """A number that JSON cannot hold is refused, and nothing is written."""
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})

    assert [] == names(tmp_path)


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b"\xff\xfe\x00", b"[1,]"])
def test_damaged_json_is_named(tmp_path: Path, data: bytes) -> None:
    """An empty, cut or garbled file is an error with its path, not a traceback."""
    path = tmp_path / "config.json"
    path.write_bytes(data)

    with pytest.raises(UserError, match="not valid JSON") as caught:
        files.read_json(path)
    assert str(path) == caught.value.where


def test_missing_json_is_named(tmp_path: Path) -> None:
    """The path that does not exist is in the message."""
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        files.read_json(tmp_path / "config.json")


# ------------------------------------------------------------------------------------------ digests


def test_the_digest_of_a_file_is_that_of_sha256sum(tmp_path: Path) -> None:
    """Anyone can check it with the system's own tool."""
    (tmp_path / "x").write_bytes(b"abc")

    assert "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" == files.file_digest(
        tmp_path / "x"
    )


def test_parts_are_not_merely_joined() -> None:
    """Two lists of parts that join to the same text have different digests."""
    assert files.digest("ab", "c") != files.digest("a", "bc")
    assert files.digest("ab") != files.digest("ab", "")
    assert files.digest("ab") == files.digest(b"ab")


def test_the_digest_of_a_list_of_parts_is_fixed() -> None:
    """Length first (8 bytes, little-endian), then the bytes, part by part: names of folders depend
    on it."""
    expected = hashlib.sha256(b"\x02\0\0\0\0\0\0\0ab\x01\0\0\0\0\0\0\0c").hexdigest()

    assert expected == files.digest("ab", "c")


@given(
    st.dictionaries(
        st.text(), st.one_of(st.integers(), st.text(), st.booleans(), st.none()), max_size=5
    )
)
def test_the_digest_of_json_ignores_the_order_of_keys(value: dict[str, object]) -> None:
    """The same settings written in another order are the same settings."""
    assert files.digest_json(value) == files.digest_json(dict(reversed(value.items())))


def test_the_digest_of_json_tells_types_apart() -> None:
    """1, true and "1" are three values."""
    assert 3 == len({files.digest_json(value) for value in (1, True, "1")})


# ---------------------------------------------------------------------------------------- the cache


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$REGRAFT_CACHE, else $XDG_CACHE_HOME/regraft, else ~/.cache/regraft."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "own"))
    assert tmp_path / "own" == files.cache_dir()

    monkeypatch.delenv("REGRAFT_CACHE")
    assert tmp_path / "xdg" / "regraft" == files.cache_dir()

    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tmp_path / "home" / ".cache" / "regraft" == files.cache_dir()


def test_the_cache_says_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds the folder reads that it may be deleted; what the user wrote there is not
    overwritten."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "c"))

    assert tmp_path / "c" / "features" == files.cache_dir("features")
    assert (tmp_path / "c" / "features").is_dir()
    assert "deleting the folder is safe" in (tmp_path / "c" / "README.txt").read_text()

    (tmp_path / "c" / "README.txt").write_text("mine")
    files.cache_dir("compiled")
    assert "mine" == (tmp_path / "c" / "README.txt").read_text()


@pytest.mark.parametrize(
    "place",
    ["a file", "below a file", "a link to nowhere", "a name that is too long", "~nobody-at-all/c"],
)
def test_a_cache_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The message has the variable, the path and what to set."""
    (tmp_path / "f").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "f" / "x")
    places = {
        "a file": tmp_path / "f",
        "below a file": tmp_path / "f" / "c",
        "a link to nowhere": tmp_path / "link",
    }
    monkeypatch.setenv(
        "REGRAFT_CACHE", str(places.get(place, place if "~" in place else tmp_path / ("x" * 300)))
    )

    with pytest.raises(UserError) as caught:
        files.cache_dir("features")
    assert str(caught.value.where).startswith("$REGRAFT_CACHE: ")
    assert "set $REGRAFT_CACHE to a folder that you may write to" == caught.value.fix


def test_a_variable_that_names_no_place_is_as_if_it_was_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty ones, and a relative $XDG_CACHE_HOME, as its specification says; parents that do not
    exist are made."""
    monkeypatch.setenv("HOME", str(tmp_path / "new" / "home"))
    monkeypatch.setenv("REGRAFT_CACHE", "")
    for value in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert tmp_path / "new" / "home" / ".cache" / "regraft" == files.cache_dir()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry: $REGRAFT_CACHE is the way on."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("REGRAFT_CACHE")
    monkeypatch.setattr(Path, "home", homeless)

    with pytest.raises(UserError, match=r"\$HOME: this user has no home folder") as caught:
        files.cache_dir()
    assert "set $REGRAFT_CACHE" in caught.value.fix


def test_a_home_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says that it is the cache which is meant, and which variable moves it."""
    (tmp_path / "home").write_text("")
    monkeypatch.delenv("REGRAFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    with pytest.raises(UserError, match="the cache in the home folder") as caught:
        files.cache_dir()
    assert "set $REGRAFT_CACHE" in caught.value.fix


def test_a_file_in_the_place_of_a_part_of_the_cache_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that mends it is named."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))
    (tmp_path / "features").write_text("")

    with pytest.raises(
        UserError, match="a file stands where a folder of the cache is needed"
    ) as caught:
        files.cache_dir("features")
    assert "finetune cache --clear" in caught.value.fix


def test_a_cache_that_may_only_be_read_is_given_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image of a container: what is in it serves those who only read."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))
    (tmp_path / "compiled").mkdir()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", fail)
    assert tmp_path / "compiled" == files.cache_dir("compiled")


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP])
def test_a_name_that_the_system_refuses_is_named(tmp_path: Path, number: int) -> None:
    """No traceback: another name helps."""
    with (
        pytest.raises(UserError, match="cannot be written under this name"),
        files.disk_errors(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


# -------------------------------------------------------------------------------------------- seals


@pytest.mark.parametrize(
    "damage", ["", "changed", "cut", "gone", "one more", "no seal", "changed seal", "cut seal"]
)
def test_a_seal_tells_whether_files_are_whole(tmp_path: Path, damage: str) -> None:
    """Of every change of the files, of their number or of the seal itself."""
    both, seal = [tmp_path / "a.bin", tmp_path / "b.bin"], tmp_path / "seal.json"
    for path in both:
        path.write_bytes(b"0123456789" * 1000)
    files.seal(seal, both)
    changes = {
        "changed": lambda: both[1].write_bytes(b"0123456789" * 999 + b"0123456780"),
        "cut": lambda: os.truncate(both[0], 9999),
        "gone": both[0].unlink,
        "one more": lambda: both.append(seal),
        "no seal": seal.unlink,
        "changed seal": lambda: seal.write_text(seal.read_text().replace("a.bin", "c.bin")),
        "cut seal": lambda: os.truncate(seal, 20),
    }
    if damage:
        changes[damage]()

    assert (damage == "") == files.is_sealed(seal, both)


def test_a_note_is_one_line_on_stderr_that_a_program_can_hide() -> None:
    """It goes through Python's own logging, under the name `regraft`."""
    code = "from finetune import files; files.note('hello')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    hidden = f"import logging; logging.getLogger('regraft').setLevel(logging.ERROR); {code}"

    assert ("", "note: hello\n") == (done.stdout, done.stderr)
    assert (
        ""
        == subprocess.run(
            [sys.executable, "-c", hidden], capture_output=True, text=True, check=True
        ).stderr
    )


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=8), st.data())
def test_digests_are_kept_as_they_are(contents: list[bytes], data: st.DataObject) -> None:
    """Compact, they are still a sequence of the same texts, also those that end in zeros; `first`
    names each content once."""
    texts = [content.hex() for content in contents]
    kept = files.Digests.of(texts)
    at = np.array(
        sorted(data.draw(st.sets(st.integers(0, len(texts) - 1)))) if texts else [], dtype=np.int64
    )

    assert texts == list(kept)
    assert kept == tuple(texts)
    assert texts[1:3] == list(kept[1:3])
    assert [texts[i] for i in at] == list(kept.take(at))
    assert [
        i for n, i in enumerate(at) if texts[i] not in {texts[j] for j in at[:n]}
    ] == kept.first(at).tolist()
    assert 32 * len(texts) == kept.rows.nbytes


def test_digests_that_end_in_zeros_are_not_alike() -> None:
    """Numpy's own strings end at the last byte that is not zero; a digest does not."""
    kept = files.Digests.of(
        ["ab" + "00" * 31, "ab" + "00" * 30 + "01", "00" * 32, "ab" + "00" * 31]
    )

    assert [0, 1, 2] == kept.first(np.arange(4)).tolist()
    assert "ab" + "00" * 31 == kept[3]


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    """A file whose name is as long as the system allows is written like any other."""
    path = tmp_path / f"{'l' * 251}.csv"
    files.write_text(path, "x")
    assert [path] == list(tmp_path.iterdir())


def test_json_keeps_any_name(tmp_path: Path) -> None:
    """Text with bytes that are not UTF-8 comes back as it was, from a file that is UTF-8."""
    files.write_json(tmp_path / "x.json", ["caf\udce9", "Größe"])
    assert ["caf\udce9", "Größe"] == files.read_json(tmp_path / "x.json")
    assert "Größe" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_a_library_that_takes_only_text_for_a_path_gets_some(tmp_path: Path) -> None:
    """A file whose name is not UTF-8 is given by a name that is; any other as it is."""
    odd.need(tmp_path / "try")
    for name in ("plain.txt", os.fsdecode(b"caf\xe9.txt")):
        (tmp_path / name).write_text(name, encoding="utf-8", errors="surrogateescape")
        with files.in_text(tmp_path / name) as path:
            assert str(path).encode()
            assert os.fsencode(name) == path.read_bytes()
        assert (name == "plain.txt") == path.exists()
