"""Signatures of versions and of the ledger's entries, by Ed25519 keys (RFC 8032); optional.

The variable MEDGEN_SIGNING_KEY names the file of a private key: `register`, `promote` and `rollback` then sign. If the
project has a file trusted_keys.txt, with a public key on each line, a version whose files have no valid signature is
neither loaded nor served, and `history` reports entries without one.

    openssl genpkey -algorithm ed25519 -out signing.pem
    openssl pkey -in signing.pem -pubout | sed -n 2p >> trusted_keys.txt
"""

import base64
import binascii
import os
from pathlib import Path

from medgen.config import Project
from medgen.errors import UserError

KEY_VARIABLE = "MEDGEN_SIGNING_KEY"
TRUSTED_KEYS = "trusted_keys.txt"
SIGNATURE_TAG = "medgen.signature"  # of a version: of its name and the hash of its files
_HOW = "make one with `openssl genpkey -algorithm ed25519 -out signing.pem`"


def sign(content: str) -> str:
    """The signature of a text in base64; "" without a key.

    Raises:
        UserError: MEDGEN_SIGNING_KEY names no Ed25519 key.
    """
    path = os.environ.get(KEY_VARIABLE)
    if not path:
        return ""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{KEY_VARIABLE}: {path}: not readable as a private key ({error}); {_HOW}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{KEY_VARIABLE}: {path}: a key of another kind; {_HOW}")
    return base64.b64encode(key.sign(content.encode())).decode()


def are_required(project: Project) -> bool:
    """True if the project has trusted keys."""
    return (project.home / TRUSTED_KEYS).is_file()


def is_trusted(project: Project, content: str, signature: str) -> bool:
    """True if the signature of a text is by one of the project's trusted keys, or if the project has none.

    Raises:
        UserError: trusted_keys.txt is not readable.
    """
    if not are_required(project):
        return True
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    path = project.home / TRUSTED_KEYS
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            key = load_der_public_key(base64.b64decode(line.split()[0], validate=True))
        except (ValueError, binascii.Error):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise UserError(
                f"{path}, line {number}: not an Ed25519 public key; expected the line that "
                "`openssl pkey -in signing.pem -pubout | sed -n 2p` prints"
            )
        try:
            key.verify(base64.b64decode(signature), content.encode())
            return True
        except (InvalidSignature, ValueError):
            continue
    return False
