"""Writers of the same files at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medgen.io import write_atomic, write_folder


def test_writers_of_one_file_and_one_folder_take_turns(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            content = f"{number}\n".encode()
            write_atomic(tmp_path / "file.json", content * 1000)
            write_folder(tmp_path / "prior", {"prior.json": content, "prior.safetensors": content * 1000})

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(write, range(8)))
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["file.json", "prior", "prior/prior.json", "prior/prior.safetensors"]
    number = (tmp_path / "prior/prior.json").read_bytes()
    assert (tmp_path / "prior/prior.safetensors").read_bytes() == number * 1000
