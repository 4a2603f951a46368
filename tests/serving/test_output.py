"""Folders that the user names: files of an earlier call are replaced, files of the user are never lost."""

import pytest

from medgen.errors import UserError
from medgen.serving.output import new_files


def write(out, *names):
    with new_files(out) as folder:
        for name in names:
            (folder / name).write_text(f"of {names}")


def contents(out):
    return {path.name: path.read_text() for path in out.iterdir() if not path.name.startswith(".")}


def test_files_of_an_earlier_call_are_replaced(tmp_path):
    write(tmp_path, "a.png", "b.png")
    write(tmp_path, "b.png", "c.png")
    assert contents(tmp_path) == {name: "of ('b.png', 'c.png')" for name in ("b.png", "c.png")}
    assert not (tmp_path / ".building").exists()


@pytest.mark.parametrize("name", ["mine.png", "a.png"], ids=["added", "changed"])
def test_files_of_the_user_are_kept_and_named(tmp_path, name):
    write(tmp_path, "a.png")
    (tmp_path / name).write_text("the user's")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"--out .*medgen did not write.*: {name}\. Name a new folder"):
        write(tmp_path, "a.png")
    assert contents(tmp_path) == before


def test_an_error_leaves_the_earlier_files(tmp_path):
    write(tmp_path, "a.png")

    def stop_halfway():
        with new_files(tmp_path) as folder:
            (folder / "b.png").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert set(contents(tmp_path)) == {"a.png"}
    write(tmp_path, "b.png")
    assert set(contents(tmp_path)) == {"b.png"}


@pytest.mark.parametrize("place", ["file/new", "/proc/new"])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, place):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=r"--out .*new: cannot be written \("):
        write(tmp_path / place, "a.png")
