"""Who is on a picture, and under which name the store knows them.

pseudonym(salt_of(Path("data")), "person17")     # 16 hexadecimal digits

A dataset's `.salt` is a secret that makes its pseudonyms impossible to guess. Without it the salt is a fixed one:
pseudonyms then hide names from a glance only, as whoever knows how a hospital numbers its patients can try them all.
"""

import hmac
import re
import secrets
from pathlib import Path

from medgen.errors import UserError
from medgen.io import write_atomic

SALT = ".salt"
_NO_SALT = b"medgen: this dataset has no salt of its own"
_SALT_BYTES = 32

# How published sets name their patients; the first that fits decides.
_IN_NAMES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^(person\d+)_",  # Kermany chest X-rays: person12_bacteria_46
        r"^((?:[A-Z]+\d*-)?IM-\d+)-",  # the same set's normal films: IM-0001-0001, NORMAL2-IM-0530-0001
        r"^(case[_-]\d+)(?:[_.-]|$)",  # OASIS as case_001_slice_0
        r"^(OAS\d_\d{4})_",  # OASIS itself
        r"^(\d{8})_\d{3}",  # NIH ChestX-ray14: 00001280_004
        r"^(COVID-\d+)[a-z]?(?:\D|$)",  # Figure 1: COVID-00015a, COVID-00015b
        r"^((?:MCUCXR|CHNCXR)_\d+_[01])",  # Montgomery and Shenzhen: one film each
        r"^(sub-[0-9a-z]+)_",  # BIDS
        r"^(TCGA_\w{2}_\w{4})_",  # the LGG segmentation set
        r"^(BraTS\w*?_\d+)(?:_|$)",
        r"^(patient[_-]?\d+)(?:[_.-]|$)",
    )
)
_IN_FOLDERS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^(OAS\d_\d{4})(?:_|$)",
        r"^(sub-[0-9a-z]+)$",
        r"^(TCGA_\w{2}_\w{4})(?:_|$)",
        r"^(BraTS\w*?_\d+)$",
        r"^(case[_-]\d+)$",
        r"^(patient[_-]?\d+)$",
    )
)


def pseudonym(salt: bytes, identifier: str) -> str:
    """16 hexadecimal digits of HMAC-SHA256 (RFC 2104): the same for the same salt and identifier."""
    return hmac.digest(salt, identifier.encode("utf-8", "backslashreplace"), "sha256").hex()[:16]


def has_salt(folder: Path) -> bool:
    """Whether the dataset has a salt of its own."""
    return (folder / SALT).is_file()


def salt_of(folder: Path) -> bytes:
    """The dataset's salt, or the fixed one.

    Raises:
        UserError: the file holds something else.
    """
    if not has_salt(folder):
        return _NO_SALT
    with (folder / SALT).open("rb") as file:
        text = file.read(4 * _SALT_BYTES).strip()
    if not re.fullmatch(rb"[0-9a-f]{%d}" % (2 * _SALT_BYTES), text):
        raise UserError(
            f"{folder / SALT}: not a salt; expected {2 * _SALT_BYTES} hexadecimal digits. "
            "Bring it back (`dvc checkout`), or remove it: patients then get other pseudonyms"
        )
    return bytes.fromhex(text.decode())


def write_salt(folder: Path) -> None:
    """Gives the dataset a salt of its own, unless it has one: another would give each patient another pseudonym."""
    if not has_salt(folder):
        write_atomic(folder / SALT, f"{secrets.token_hex(_SALT_BYTES)}\n".encode())
        (folder / SALT).chmod(0o600)


def compile_pattern(patient_pattern: str | None) -> re.Pattern[str] | None:
    """`data.patient_pattern`, ready to search.

    Raises:
        UserError: it is no regular expression, or has no group.
    """
    if patient_pattern is None:
        return None
    try:
        pattern = re.compile(patient_pattern)
    except re.error as error:
        raise UserError(f"data.patient_pattern: {patient_pattern!r} is no regular expression: {error}") from None
    if pattern.groups < 1:
        raise UserError(
            f"data.patient_pattern: {patient_pattern!r} has no group; expected the patient in round brackets, "
            r"such as '^(person\d+)_'"
        )
    return pattern


def named_in_file(name: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """The patient that a file's name gives by the user's pattern, or by a published set's."""
    for candidate in _IN_NAMES if pattern is None else (pattern,):
        if (match := candidate.search(name)) and match[1]:
            return match[1]
    return None


def named_in_folder(name: str) -> str | None:
    """The patient that a folder's name gives: such a folder is no class."""
    return next((match[1] for pattern in _IN_FOLDERS if (match := pattern.search(name))), None)
