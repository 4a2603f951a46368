"""Find patient identifiers in file and folder names, and replace them by pseudonyms.

pseudonymize(find_salt(Path("data"), has_patient_ids=True), "MRN7734501")     # 16 hexadecimal digits

A dataset's `.salt` file is a secret that makes its pseudonyms impossible to guess: without it, anyone who knows a
hospital's numbering of patients could compute all pseudonyms and compare. A dataset with patient identifiers in
manifest.csv or DICOM headers always gets one. Names of files and folders are in the store anyway, so datasets without
other identifiers have none: their pseudonyms, and so their splits, are the same on every machine.
"""

import hmac
import re
import secrets
from pathlib import Path

from medgen.errors import UserError
from medgen.io import write_atomic

SALT_FILE = ".salt"
NO_SALT = b"medgen: this dataset has no salt of its own"  # for names that the store lists anyway, and for splits
_SALT_BYTES = 32

# Patient names in published datasets; the first match is used.
_FILE_NAME_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^(person\d+)_",  # Kermany chest X-rays: person12_bacteria_46
        r"^((?:[A-Z]+\d*-)?IM-\d+)-",  # normal images of the same dataset: IM-0001-0001, NORMAL2-IM-0530-0001
        r"^(case[_-]\d+)(?:[_.-]|$)",  # OASIS as case_001_slice_0
        r"^(OAS\d_\d{4})_",  # OASIS itself
        r"^(\d{8})_\d{3}",  # NIH ChestX-ray14: 00001280_004
        r"^(COVID-\d+)[a-z]?(?:\D|$)",  # Figure 1: COVID-00015a, COVID-00015b
        r"^((?:MCUCXR|CHNCXR)_\d+_[01])",  # Montgomery and Shenzhen: one image per patient
        r"^(sub-[0-9a-z]+)_",  # BIDS
        r"^(TCGA_\w{2}_\w{4})_",  # the LGG segmentation dataset
        r"^(BraTS\w*?_\d+)(?:_|$)",
        r"^(patient[_-]?\d+)(?:[_.-]|$)",
    )
)
_FOLDER_NAME_PATTERNS = tuple(
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


def pseudonymize(salt: bytes, identifier: str) -> str:
    """16 hexadecimal digits of HMAC-SHA256 (RFC 2104) with the salt as key."""
    return hmac.digest(salt, identifier.encode("utf-8", "backslashreplace"), "sha256").hex()[:16]


def has_salt(folder: Path) -> bool:
    """True if the dataset has its own salt."""
    return (folder / SALT_FILE).is_file()


def find_salt(folder: Path, has_patient_ids: bool) -> bytes:
    """The dataset's salt; without one a random salt, or a fixed one if only file names tell the patient.

    Raises:
        UserError: the file cannot be read, or does not contain a salt.
    """
    path = folder / SALT_FILE
    try:
        with path.open("rb") as file:
            text = file.read(4 * _SALT_BYTES).strip()
    except FileNotFoundError:
        return secrets.token_bytes(_SALT_BYTES) if has_patient_ids else NO_SALT
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make the file readable") from None
    if not re.fullmatch(rb"[0-9a-f]{%d}" % (2 * _SALT_BYTES), text):
        raise UserError(
            f"{path}: not a salt; expected {2 * _SALT_BYTES} hexadecimal digits. "
            "Restore it (`dvc checkout`), or remove it: patients then get other pseudonyms"
        )
    return bytes.fromhex(text.decode())


def write_salt(folder: Path) -> None:
    """Create the dataset's salt. An existing salt is kept, because a new one would change all pseudonyms.

    Raises:
        UserError: the folder is not writable.
    """
    if has_salt(folder):
        return
    try:
        write_atomic(folder / SALT_FILE, f"{secrets.token_hex(_SALT_BYTES)}\n".encode())
        (folder / SALT_FILE).chmod(0o600)
    except OSError as error:
        raise UserError(
            f"{folder / SALT_FILE}: cannot be written ({error.strerror}); expected to store the secret salt of the "
            "patients' pseudonyms there. Make the folder writable for the first run, or copy the images with "
            "`medgen data import`"
        ) from None


def compile_pattern(patient_pattern: str | None) -> re.Pattern[str] | None:
    """The compiled `data.patient_pattern`.

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
            f"data.patient_pattern: {patient_pattern!r} has no group; expected the patient in parentheses, "
            r"such as '^(person\d+)_'"
        )
    return pattern


def patient_from_file_name(name: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """The patient in a file's name, found by the user's pattern or else by those of published datasets."""
    for candidate in _FILE_NAME_PATTERNS if pattern is None else (pattern,):
        if (match := candidate.search(name)) and match[1]:
            return match[1]
    return None


def patient_from_folder_name(name: str) -> str | None:
    """The patient in a folder's name. Such a folder is not a class."""
    return next((match[1] for pattern in _FOLDER_NAME_PATTERNS if (match := pattern.search(name))), None)
