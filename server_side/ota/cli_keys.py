"""`edgead ota init`, `add-product`, `rotate`, `revoke`, `refresh`: roles and keys."""

from __future__ import annotations

from pathlib import Path

import click

from edgead.runtime.errors import InputError
from edgead.server_side.ota.cli_options import FOLDER, PRODUCT, finish, key_options, keyring_of, open_for_change


@click.command()
@FOLDER
@click.option("--product", "products", multiple=True, required=True, help="Product to publish; may be repeated.")
@click.option("--root-threshold", default=2, show_default=True, help="Signatures that a new root needs.")
@click.option("--root-keys", default=3, show_default=True, help="Root keys to make.")
@click.option("--releases-threshold", default=2, show_default=True, help="Signatures that a release needs.")
@click.option("--releases-keys", default=2, show_default=True, help="Release keys to make.")
@click.option(
    "--bins",
    type=click.IntRange(0, 14),
    default=0,
    show_default=True,
    help="Bits of hash bins, for thousands of products: 10 makes 1,024 bins. 0: a delegation for each product.",
)
@click.option("--keep", type=click.IntRange(1, 50), default=3, show_default=True, help="Releases to keep, per product.")
@click.option("--timestamp-days", type=click.IntRange(1, 365), help="Days until the timestamp expires; 7.")
@click.option("--snapshot-days", type=click.IntRange(1, 365), help="Days until the snapshot expires; 30.")
@click.option(
    "--signer",
    "signers",
    multiple=True,
    nargs=3,
    type=str,
    metavar="ROLE URI PUBLIC.pem",
    help="A key that is there already, as in a hardware module or a cloud's key service; may be repeated.",
)
@key_options
def init(
    folder: Path,
    products: tuple[str, ...],
    root_threshold: int,
    root_keys: int,
    releases_threshold: int,
    releases_keys: int,
    bins: int,
    keep: int,
    timestamp_days: int | None,
    snapshot_days: int | None,
    signers: tuple[tuple[str, str, str], ...],
    keys: tuple[Path, ...],
    passphrase_env: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a repository in FOLDER, and its keys.

    Keys are Ed25519, encrypted on disk; the key folder also holds root.json, which devices are given. Move the keys
    of root, targets, engines, knowledge and releases to media of their own, and keep what publishes day by day.

    \b
    Example:
      edgead ota init updates/ --product carpet --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota init updates/ --product carpet --product tile --root-threshold 2 --root-keys 3 --keys keys/
      edgead ota init updates/ --product carpet --signer root hsm:2 root.pem --keys keys/
    """
    import msgspec

    from edgead.server_side.ota.init import create
    from edgead.server_side.ota.keys import ROOT
    from edgead.server_side.ota.roles import DAYS, ROLES, Settings

    days = dict(DAYS)
    days |= {role: n for role, n in (("timestamp", timestamp_days), ("snapshot", snapshot_days)) if n is not None}
    elsewhere: dict[str, list[tuple[str, Path]]] = {}
    for role, uri, public in signers:
        if role not in ROLES:
            raise InputError(wanted=f"one of the roles {', '.join(ROLES)}", got=repr(role), next_step="Name one.")
        elsewhere.setdefault(role, []).append((uri, Path(public)))
    try:
        settings = msgspec.convert(
            {"products": list(dict.fromkeys(products)), "bins": bins, "keep": keep, "days": days}, Settings
        )
    except msgspec.ValidationError as error:
        raise InputError(
            wanted="product names of letters, digits, '.', '_', '-'", got=str(error), next_step="Name it otherwise."
        ) from error
    keyring = keyring_of(keys, passphrase_env, new=True)
    thresholds = {"root": (root_threshold, root_keys), "releases": (releases_threshold, releases_keys)}
    repository = create(folder, keyring, settings, thresholds, elsewhere)
    root = keys[0] / ROOT
    content = {"folder": str(folder), "root": str(root), "products": list(repository.settings.products)}
    finish(
        as_json,
        content,
        f"made {folder} for {', '.join(repository.settings.products)}, with {len(keyring.records)} keys in {keys[0]}",
        f"give {root} to the devices; next: edgead ota publish {folder} BUNDLE --keys {keys[0]}",
    )


@click.command("add-product")
@FOLDER
@PRODUCT
@key_options
def add_product(
    folder: Path, product: str, keys: tuple[Path, ...], passphrase_env: tuple[str, ...], as_json: bool
) -> None:
    """Let the repository take packs and releases of another PRODUCT. Needs the targets key, but for hash bins.

    \b
    Example:
      edgead ota add-product updates/ tile --keys keys/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.server_side.ota.init import add_product as add

    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        add(repository, product, keyring)
        products = list(repository.settings.products)
    finish(as_json, {"products": products}, f"{folder} takes {', '.join(products)}")


@click.command()
@FOLDER
@click.argument("role")
@key_options
def rotate(folder: Path, role: str, keys: tuple[Path, ...], passphrase_env: tuple[str, ...], as_json: bool) -> None:
    """Give ROLE new keys in place of all that it has. Devices that missed it follow when they come back.

    \b
    Example:
      edgead ota rotate updates/ timestamp --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota rotate updates/ root --keys keys/ --keys stick/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.server_side.ota.rotation import rotate as turn

    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        made = turn(repository, role, keyring)
    finish(as_json, {"role": role, "keys": made}, f"{role} has new keys: {', '.join(made)}")


@click.command()
@FOLDER
@click.argument("keyid")
@key_options
def revoke(folder: Path, keyid: str, keys: tuple[Path, ...], passphrase_env: tuple[str, ...], as_json: bool) -> None:
    """Take the key KEYID out of its role, and put a new one in its place.

    What the role signed is signed anew by the keys that it has then; devices refuse the old key from their next poll.

    \b
    Example:
      edgead ota revoke updates/ 4fd0f8b4ac5b4a10 --keys keys/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.server_side.ota.rotation import revoke as take_out

    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        role, made = take_out(repository, keyid, keyring)
    finish(
        as_json,
        {"role": role, "revoked": keyid, "keys": made},
        f"{keyid} signs nothing any more; {role} has {', '.join(made)} in its place",
    )


@click.command()
@FOLDER
@click.option("--role", "roles", multiple=True, help="A role to sign anew, too, as before it expires; repeatable.")
@key_options
def refresh(
    folder: Path, roles: tuple[str, ...], keys: tuple[Path, ...], passphrase_env: tuple[str, ...], as_json: bool
) -> None:
    """Sign a new timestamp, and a new snapshot if it is near its end: what a daily job does with the online keys.

    Without it devices raise an alarm when the timestamp expires, and go on inspecting.

    \b
    Example:
      edgead ota refresh updates/ --keys online/ --passphrase-env EDGEAD_KEYS
      edgead ota refresh updates/ --role targets --role knowledge --keys keys/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.server_side.ota.rotation import renew

    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        renew(repository, roles, keyring)
        expires = repository.timestamp.signed.expires.isoformat()
        version = repository.timestamp.signed.version
    content = {"timestamp": version, "expires": expires, "roles": list(roles)}
    finish(as_json, content, f"timestamp {version}, valid until {expires}")


COMMANDS = (init, add_product, rotate, revoke, refresh)
