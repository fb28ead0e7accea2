"""Releases and roots that several people sign on machines of their own, and drafts that nobody should sign."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgead.runtime.errors import EdgeadError, InputError
from edgead.server_side.ota import custodians
from edgead.server_side.ota.custodians_view import told
from edgead.server_side.ota.drafts import Draft, Signed, decode_draft, encode_draft, merged
from edgead.server_side.ota.handover import hand_over, new_key, read_key
from edgead.server_side.ota.init import create
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.publish import pack_path, publish_bundle, publish_pack
from edgead.server_side.ota.releases import make_release
from edgead.server_side.ota.roles import Settings

ONLINE = ("snapshot", "timestamp", "rollout")


def split(place: Any, tmp_path: Path, role: str = "releases") -> tuple[list[Path], Path]:
    """Moves the keys of a role to folders of their own that share nothing; the online keys stay in another."""
    names = sorted(path.name for path in place.keys.glob(f"{role}-*.pem"))
    folders = [tmp_path / f"{role}-{number}" for number in range(len(names))]
    publisher = tmp_path / "publisher"
    for folder in (*folders, publisher):
        folder.mkdir(exist_ok=True)
        for name in ("keyring.json", "root.json"):
            shutil.copy(place.keys / name, folder / name)
    for folder, name in zip(folders, names, strict=True):
        shutil.copy(place.keys / name, folder / name)
    for kind in ONLINE:
        for path in place.keys.glob(f"{kind}-*.pem"):
            shutil.copy(path, publisher / path.name)
    return folders, publisher


def ring(folder: Path, helpers: dict[str, Any]) -> Keyring:
    return Keyring([folder], lambda purpose: [helpers["PHRASE"]])


def drafted(place: Any, notes: str = "threads are fine") -> Draft:
    """A draft of a second release, whose pack is published already."""
    pack = place.next_pack()
    place.publish(pack)
    with place.opened() as repository:
        made = make_release(repository, "part", pack=pack.digest, notes=notes)
        return custodians.stage(repository, f"release {made.counter}")


@pytest.fixture
def sign(helpers: dict[str, Any]) -> Callable[[Draft, Path], Draft]:
    def call(draft: Draft, folder: Path) -> Draft:
        keyring = ring(folder, helpers)
        assert keyring.root is not None
        # As over e-mail: the bytes of the file are all that travels.
        return custodians.sign(decode_draft(encode_draft(draft)), keyring, keyring.root)[0]

    return call


def finish(place: Any, draft: Draft, folder: Path, helpers: dict[str, Any]) -> list[str]:
    with place.opened() as repository:
        return custodians.finish(repository, draft, ring(folder, helpers))


def test_a_release_is_signed_by_two_people_who_share_no_disk(
    place: Any, device: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any
) -> None:
    (alice, bob), publisher = split(place, tmp_path)
    draft = drafted(place)
    assert device.fetch("releases/part/2.json") is None
    first = sign(draft, alice)
    with pytest.raises(InputError, match="1 more signature"):
        finish(place, first, publisher, helpers)
    assert device.fetch("releases/part/2.json") is None
    assert finish(place, sign(first, bob), publisher, helpers) == ["releases.part"]
    data = device.fetch("releases/part/2.json")
    assert json.loads(data)["notes"] == "threads are fine"
    assert place.next_pack() is not None


def test_copies_that_were_signed_apart_are_put_together(
    place: Any, device: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any
) -> None:
    (alice, bob), publisher = split(place, tmp_path)
    draft = drafted(place)
    both = merged([sign(draft, alice), sign(draft, bob)])
    assert both.digest == draft.digest
    finish(place, both, publisher, helpers)
    assert device.fetch("releases/part/2.json") is not None
    with pytest.raises(InputError, match="copies of one draft"):
        merged([draft, msgspec.structs.replace(draft, title="another")])


def test_a_custodian_is_shown_what_the_bytes_say(place: Any, tmp_path: Path, helpers: dict[str, Any]) -> None:
    draft = drafted(place, notes="threads\x1b[2J are fine")
    lines = "\n".join(told(custodians.Case(draft, place.keyring().root)))
    release = json.loads(draft.records["releases/part/2.json"])
    assert "+ releases/part/2.json" in lines
    assert f"pack {release['product_packs']['part']}" in lines
    assert f"engine {release['engine']}" in lines
    assert "threads?[2J are fine" in lines
    assert "2 missing, signed by nobody" in lines
    assert "releases/part/1.json" not in lines


def test_nobody_signs_twice_and_no_signature_counts_twice(
    place: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any
) -> None:
    (alice, bob), publisher = split(place, tmp_path)
    first = sign(drafted(place), alice)
    with pytest.raises(InputError, match="still needs a signature"):
        sign(first, alice)
    (part,) = first.parts
    doubled = msgspec.structs.replace(part, signatures=part.signatures * 2)
    with pytest.raises(InputError, match="two by the key"):
        finish(place, msgspec.structs.replace(first, parts=(doubled,)), publisher, helpers)
    whole = sign(first, bob)
    for folder in (alice, bob, publisher):
        with pytest.raises(InputError, match="still needs a signature"):
            sign(whole, folder)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (Signed("f" * 16, "ab" * 64), "may not sign it"),
        (None, "a false one"),
    ],
)
def test_a_signature_of_a_stranger_or_a_false_one_is_refused(
    place: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any, one: Signed | None, said: str
) -> None:
    (alice, bob), publisher = split(place, tmp_path)
    whole = sign(sign(drafted(place), alice), bob)
    (part,) = whole.parts
    if one is None:
        one = Signed(part.signatures[0].keyid, part.signatures[1].sig)
        signatures = (one, part.signatures[1])
    else:
        signatures = (*part.signatures, one)
    spoilt = msgspec.structs.replace(whole, parts=(msgspec.structs.replace(part, signatures=signatures),))
    with pytest.raises(InputError, match=said):
        finish(place, spoilt, publisher, helpers)
    with pytest.raises(InputError, match=said):
        sign(spoilt, alice)


def tampered(draft: Draft, what: str) -> Draft:
    (part,) = draft.parts
    replace = msgspec.structs.replace
    if what == "record":
        record = draft.records["releases/part/2.json"].replace("threads", "threats")
        return replace(draft, records={"releases/part/2.json": record})
    if what == "text":
        return replace(
            draft, parts=(replace(part, text=part.text.replace("releases/part/1.json", "releases/part/9.json")),)
        )
    if what == "before":
        assert part.before is not None
        return replace(draft, parts=(replace(part, before=part.before.replace("part/1.json", "part/7.json")),))
    if what == "above":
        return replace(draft, above={"targets": draft.above["targets"].replace("releases/part", "releases/tile")})
    if what == "root":
        root = json.loads(draft.roots[0])
        root["signed"]["roles"]["root"]["threshold"] = 1
        return replace(draft, roots=(json.dumps(root),))
    return replace(draft, parts=(part, part))


@pytest.mark.parametrize("what", ["record", "before", "above", "root", "twice"])
def test_a_custodian_signs_no_draft_with_a_false_past(place: Any, what: str) -> None:
    draft = tampered(drafted(place), what)
    with pytest.raises(InputError):
        told(custodians.Case(draft, place.keyring().root))


@pytest.mark.parametrize("what", ["text", "before", "above"])
def test_what_was_changed_after_it_was_signed_is_refused(
    place: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any, what: str
) -> None:
    (alice, bob), publisher = split(place, tmp_path)
    before = sorted(path.name for path in (place.folder / "metadata").iterdir())
    whole = tampered(sign(sign(drafted(place), alice), bob), what)
    with pytest.raises(InputError):
        finish(place, whole, publisher, helpers)
    after = sorted(path.name for path in (place.folder / "metadata").iterdir())
    # The draft's own pack was published in between.
    assert [name for name in after if "releases" in name] == [name for name in before if "releases" in name]


def test_a_draft_is_outdated_once_another_release_was_signed(
    place: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any
) -> None:
    (alice, bob), publisher = split(place, tmp_path)
    whole = sign(sign(drafted(place), alice), bob)
    place.release()
    with pytest.raises(InputError, match="as it is now"):
        finish(place, whole, publisher, helpers)


def test_a_finished_draft_cannot_be_finished_again(
    place: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any
) -> None:
    (alice, bob), publisher = split(place, tmp_path)
    whole = sign(sign(drafted(place), alice), bob)
    finish(place, whole, publisher, helpers)
    with pytest.raises(InputError, match="as it is now"):
        finish(place, whole, publisher, helpers)


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b'{"schema":1}', b"\xff\xfe"])
def test_bytes_that_are_no_draft_are_said_to_be_none(data: bytes) -> None:
    with pytest.raises(EdgeadError, match="a draft as edgead ota writes it"):
        decode_draft(data)


def test_a_new_custodian_takes_the_place_of_one_who_leaves(
    place: Any, device: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any
) -> None:
    (alice, bob), publisher = split(place, tmp_path)
    (boss,), _ = split(place, tmp_path, "targets")
    device.fetch("releases/part/1.json")
    carol = tmp_path / "carol"
    public = new_key(ring(carol, helpers), "releases")
    shutil.copy(place.keys / "root.json", carol / "root.json")
    gone = next(alice.glob("releases-*.pem")).stem.partition("-")[2]
    with place.opened() as repository:
        root = hand_over(repository, "releases", [read_key(public)], [gone])
        draft = custodians.stage(repository, "carol for alice", root)
    assert root is None
    text = "\n".join(told(custodians.Case(draft, place.keyring().root)))
    assert f"may no longer be signed by the key {gone}" in text
    with pytest.raises(InputError, match="still needs a signature"):
        sign(draft, alice)
    whole = sign(sign(sign(draft, boss), bob), carol)
    assert sorted(finish(place, whole, publisher, helpers)) == ["releases.part", "targets"]
    assert device.fetch("releases/part/1.json") is not None
    with place.opened() as repository:
        assert gone not in [key.keyid for key in repository.authority("releases.part")[1]]


@pytest.mark.parametrize("kind", ["root", "targets", "timestamp"])
def test_a_root_is_changed_by_people_who_never_meet(
    place: Any, device: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any, kind: str
) -> None:
    roots, publisher = split(place, tmp_path, "root")
    (boss,), _ = split(place, tmp_path, "targets")
    device.fetch("releases/part/1.json")
    carol = publisher if kind == "timestamp" else tmp_path / "carol"
    public = new_key(ring(carol, helpers), kind)
    shutil.copy(place.keys / "root.json", carol / "root.json")
    with place.opened() as repository:
        gone = repository.root.signed.roles[kind].keyids[0]
        root = hand_over(repository, kind, [read_key(public)], [gone])
        draft = custodians.stage(repository, f"another {kind}", root)
    people = {"root": [*roots, carol], "targets": [*roots, boss, carol], "timestamp": roots}[kind]
    for folder in people:
        needed = any(max(custodians.Case(draft, place.keyring().root).missing(part)) for part in draft.parts)
        if needed and folder != roots[2]:
            draft = sign(draft, folder)
    assert finish(place, draft, publisher, helpers)[0] == "root"
    assert device.fetch("releases/part/1.json") is not None
    assert json.loads((device.folder / "root.json").read_bytes())["signed"]["version"] == 2
    with place.opened() as repository:
        assert gone not in repository.root.signed.roles[kind].keyids


def test_the_commands_from_a_draft_to_a_release(
    place: Any, tmp_path: Path, passphrase: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from edgead.server_side.ota.cli import ota

    def run(*words: object, fails: bool = False) -> str:
        done = CliRunner().invoke(ota, [*map(str, words), "--passphrase-env", passphrase])
        assert (done.exit_code != 0) == fails, done.output
        return done.output

    (alice, bob), publisher = split(place, tmp_path)
    place.publish(place.next_pack())
    draft = tmp_path / "two.draft"
    run("release", place.folder, "part", "--notes", "for two", "--draft", draft, "--keys", publisher)
    assert "for two" in run("sign", draft, "--keys", alice, "--show")
    assert "releases.part needs 2 more" in run("sign", draft, "--keys", alice, "--show")
    run("sign", draft, "--keys", alice, fails=True)  # nobody there who could be asked
    run("sign", draft, "--keys", alice, "--yes")
    run("finish", place.folder, draft, "--keys", publisher, fails=True)
    assert json.loads(run("sign", draft, "--keys", bob, "--yes", "--json"))["missing"] == {"releases.part": 0}
    assert "in force: releases.part" in run("finish", place.folder, draft, "--keys", publisher)
    assert device.fetch("releases/part/2.json") is not None
    (bob / "root.json").unlink()
    run("sign", draft, "--keys", bob, "--show", fails=True)
    run("new-key", "releases", "--keys", tmp_path / "carol")
    (public,) = (tmp_path / "carol").glob("*.pub")
    words = ("hand-over", place.folder, "releases", "--give", public, "--draft", tmp_path / "c.draft")
    run(*words, "--keys", publisher)
    run(*words, "--keys", publisher, fails=True)  # the file is there


def test_a_pack_is_published_by_a_draft_and_its_row_ids_are_counted(
    place: Any, device: Any, tmp_path: Path, helpers: dict[str, Any], sign: Any
) -> None:
    (keeper,), publisher = split(place, tmp_path, "knowledge")
    pack = place.next_pack()
    with place.opened() as repository:
        publish_pack(repository, pack)
        draft = custodians.stage(repository, "a pack")
    with place.opened() as repository:
        before = repository.settings.next_ids["part"]
    whole = sign(draft, keeper)
    gone = next((place.folder / "targets" / "knowledge").rglob(f"*{pack.digest}.safetensors"))
    data = gone.read_bytes()
    gone.unlink()
    with pytest.raises(InputError, match="the file of"):
        finish(place, whole, publisher, helpers)
    gone.write_bytes(data)
    finish(place, whole, publisher, helpers)
    assert device.fetch(pack_path("part", pack.digest)) == data
    with place.opened() as repository:
        assert repository.settings.next_ids["part"] > before


def test_hash_bins_are_signed_by_drafts_like_other_roles(
    tmp_path: Path, bundle_file: Path, first_pack: Any, tiny: Any, helpers: dict[str, Any], sign: Any
) -> None:
    place = helpers["Place"](tmp_path / "updates", tmp_path / "keys", [first_pack], tiny)
    create(place.folder, place.keyring(), Settings(products=("part",), bins=5))
    with place.opened() as repository:
        publish_bundle(repository, bundle_file)
        repository.commit(place.keyring())
    (alice, bob), publisher = split(place, tmp_path)
    with place.opened() as repository:
        make_release(repository, "part", pack=first_pack.digest)
        draft = custodians.stage(repository, "release 1")
    assert set(draft.above) == {"targets", "releases"}
    assert "+ releases/part/1.json" in "\n".join(told(custodians.Case(draft, place.keyring().root)))
    (role,) = finish(place, sign(sign(draft, alice), bob), publisher, helpers)
    assert role.startswith("releases-")
    with place.opened() as repository:
        assert repository.find("releases/part/1.json") is not None
