"""Signing keys: Ed25519 in encrypted files, or anywhere that `securesystemslib` has a signer for.

A key folder holds `keyring.json`, which is public: what keys there are, for which role, and where each one is. Where is
a URI: `pem:NAME` for an encrypted PKCS#8 file in the same folder, or one of `securesystemslib` (`hsm:`, `awskms:`,
`gcpkms:`, `azurekms:`, `hv:`, ...) for keys that never leave their hardware. Beside it lies `root.json`, the root of
trust that devices are given. Offline keys belong on a medium of their own: every command takes several key folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.files import write_file
from edgead.runtime.spec import canonical_json

KEYRING = "keyring.json"
ROOT = "root.json"
_SCHEMA = 1
_LEAST = 8
"""Characters of a passphrase, at least."""
_KEYRING_BYTES = 2**20
_PROBE = b"edgead: does this key sign?"

Secrets = Callable[[str], Sequence[str]]
"""Called with what a passphrase is for; gives the passphrases to try, in their order."""


class KeyRecord:
    """One key as the keyring knows it.

    Attributes:
        key: its public half.
        role: what it was made for.
        uri: where its private half is.
        folder: the key folder that names it.
    """

    def __init__(self, key: Key, role: str, uri: str, folder: Path) -> None:
        self.key, self.role, self.uri, self.folder = key, role, uri, folder


class Keyring:
    """The keys of one or more key folders.

    Args:
        folders: key folders; new keys go into the first.
        secrets: where passphrases come from.

    Raises:
        InputError: a keyring that is damaged.
        StorageError: a file cannot be read.
    """

    def __init__(self, folders: Sequence[Path], secrets: Secrets) -> None:
        self.folders = tuple(folders)
        self._secrets = secrets
        self._opened: dict[str, Signer] = {}
        self.records: dict[str, KeyRecord] = {}
        for folder in self.folders:
            for record in _read(folder):
                self.records.setdefault(record.key.keyid, record)

    @property
    def root(self) -> bytes | None:
        """The trusted root of the first folder that has one."""
        for folder in self.folders:
            path = folder / ROOT
            if path.is_file():
                with storage_errors(path, "to read the trusted root"):
                    return path.read_bytes()
        return None

    def keep_root(self, data: bytes) -> None:
        """Write the trusted root into the first folder: what the next command starts from, and devices are given."""
        write_file(self.folders[0] / ROOT, data)

    def has(self, keyid: str) -> bool:
        """Whether a folder names this key."""
        return keyid in self.records

    def holds(self, keyid: str) -> bool:
        """Whether the private half is here, or elsewhere by a URI; the keyring may name others' keys, too."""
        record = self.records.get(keyid)
        if record is None or not record.uri.startswith("pem:"):
            return record is not None
        return (record.folder / record.uri.removeprefix("pem:")).is_file()

    def signers(self, keys: Iterable[Key], count: int, role: str) -> list[Signer]:
        """Signers for `count` of these keys, the first that are here.

        Raises:
            InputError: fewer are here, or a passphrase or signer does not fit.
        """
        here = [self.records[key.keyid] for key in keys if self.holds(key.keyid)]
        if len(here) < count:
            raise InputError(
                wanted=f"{count} private key{'s' * (count > 1)} of the role {role}",
                got=f"{len(here)} in {', '.join(map(str, self.folders)) or 'no folder'}",
                next_step="Name the folders of further keys with --keys.",
            )
        return [self._open(record) for record in here[:count]]

    def create(self, role: str, purpose: str) -> Signer:
        """A new Ed25519 key in the first folder, encrypted, for a role.

        Args:
            role: what it is for.
            purpose: 'offline' or 'online', for the choice of passphrase.

        Raises:
            InputError: no passphrase, or too short a one.
            StorageError: the folder cannot be written.
        """
        phrase = next(iter(self._secrets(purpose)), "")
        if len(phrase) < _LEAST:
            raise InputError(
                wanted=f"a passphrase of {_LEAST} characters or more for the {purpose} keys",
                got="none" if not phrase else "a shorter one",
                next_step="Set the environment variable that --passphrase-env names.",
            )
        private = Ed25519PrivateKey.generate()
        key = _short(SSlibKey.from_crypto(private.public_key()))
        name = f"{role}-{key.keyid}.pem"
        sealed = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(phrase.encode()))
        folder = self.folders[0]
        with storage_errors(folder, "to make a folder for keys"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(folder / name, sealed)
        with storage_errors(folder / name, "to protect a key"):
            os.chmod(folder / name, 0o600)
        self._add(KeyRecord(key, role, f"pem:{name}", folder))
        signer = self._opened[key.keyid] = CryptoSigner(private, key)
        return signer

    def adopt(self, role: str, uri: str, public: Path) -> Signer:
        """A key that lives elsewhere, by its URI and its public half.

        Args:
            role: what it is for.
            uri: of a scheme that `securesystemslib` has a signer for.
            public: PEM file of the public key.

        Raises:
            InputError: a public key or a URI that cannot be used.
            StorageError: the file cannot be read.
        """
        with storage_errors(public, "to read a public key"):
            data = public.read_bytes()
        try:
            whole = SSlibKey.from_crypto(load_pem_public_key(data))
        except (ValueError, TypeError) as error:
            raise InputError(
                wanted=f"a public key as PEM in {public}", got=str(error), next_step="Export it from where the key is."
            ) from error
        record = KeyRecord(_short(whole), role, uri, self.folders[0])
        signer = self._opened[record.key.keyid] = self._unlocked(record)
        try:
            record.key.verify_signature(signer.sign(_PROBE), _PROBE)
        # Every signer has errors of its own, and many of them show at the first signature only.
        except Exception as error:  # key libraries have no error tree in common
            raise _unusable(record, error) from error
        self._add(record)
        return signer

    def _add(self, record: KeyRecord) -> None:
        self.records[record.key.keyid] = record
        mine = [item for item in self.records.values() if item.folder == record.folder]
        content = {
            "schema": _SCHEMA,
            "keys": [
                {"keyid": item.key.keyid, "public": item.key.to_dict(), "role": item.role, "uri": item.uri}
                for item in mine
            ],
        }
        write_file(record.folder / KEYRING, canonical_json(content))

    def _open(self, record: KeyRecord) -> Signer:
        keyid = record.key.keyid
        if keyid not in self._opened:
            self._opened[keyid] = self._unlocked(record)
        return self._opened[keyid]

    def _unlocked(self, record: KeyRecord) -> Signer:
        if not record.uri.startswith("pem:"):
            return self._open_elsewhere(record)
        path = record.folder / record.uri.removeprefix("pem:")
        with storage_errors(path, "to read a private key"):
            sealed = path.read_bytes()
        for phrase in self._secrets(record.role):
            try:
                private = load_pem_private_key(sealed, phrase.encode())
                return CryptoSigner(private, record.key)  # type: ignore[arg-type]
            except (ValueError, TypeError):
                continue
        raise InputError(
            wanted=f"the passphrase of {path.name}",
            got="none, or another one",
            next_step="Name the environment variable that holds it with --passphrase-env.",
        )

    def _open_elsewhere(self, record: KeyRecord) -> Signer:
        try:
            return Signer.from_priv_key_uri(record.uri, record.key, lambda name: (*self._secrets(name), "")[0])
        # Every signer has errors of its own: a missing library, a network, a card that is not in its reader.
        except Exception as error:  # key libraries have no error tree in common
            raise _unusable(record, error) from error


def _read(folder: Path) -> list[KeyRecord]:
    path = folder / KEYRING
    if not path.exists():
        return []
    with storage_errors(path, "to read a keyring"), path.open("rb") as stream:
        data = stream.read(_KEYRING_BYTES + 1)
    try:
        content: Any = json.loads(data)
        if content["schema"] != _SCHEMA:
            raise ValueError("schema")
        found = []
        for item in content["keys"]:
            uri, role = item["uri"], item["role"]
            if not isinstance(uri, str) or not isinstance(role, str) or "/" in uri.partition("pem:")[2]:
                raise ValueError("uri")
            found.append(KeyRecord(Key.from_dict(item["keyid"], dict(item["public"])), role, uri, folder))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            wanted=f"a keyring in {path}", got="something else, or one of a newer edgead", next_step="Restore the file."
        ) from error
    return found


def _unusable(record: KeyRecord, error: Exception) -> InputError:
    return InputError(
        wanted=f"a signer for the key {record.key.keyid} of the role {record.role}",
        got=f"{type(error).__name__} from the scheme {record.uri.partition(':')[0]!r}",
        next_step="Check the URI, the public key, and that the package of that signer is installed.",
    )


def _short(key: SSlibKey) -> SSlibKey:
    """The same key under a shorter id, which TUF leaves to the repository: it is in every file of every poll."""
    return SSlibKey(key.keyid[:16], key.keytype, key.scheme, key.keyval)


def environment(*names: str) -> Secrets:
    """Passphrases from environment variables. The last is for new online keys, the first for new offline ones.

    Raises:
        InputError: when asked, if none of the variables is set.
    """

    def read(purpose: str) -> list[str]:
        ordered = list(reversed(names)) if purpose == "online" else list(names)
        found = [os.environ[name] for name in ordered if os.environ.get(name)]
        if not found:
            raise InputError(
                wanted=f"a passphrase in the environment variable {' or '.join(names)}",
                got="nothing there",
                next_step="Set it, or leave --passphrase-env out to be asked.",
            )
        return found

    return read


__all__ = ["KEYRING", "ROOT", "KeyRecord", "Keyring", "Secrets", "environment"]
