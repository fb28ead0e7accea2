"""Our updater by the rules of TUF's client workflow: commands, keys and thresholds, roots, rollback and expiry.

The repositories are those of any publisher: other keys, thresholds and layouts than edgead has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tuf")

from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Metadata

BELOW = ("targets", "snapshot", "timestamp")
NEW = {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Changes metadata after it was signed."""

    def apply(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return apply


def test_the_adapter_runs_as_a_program_and_says_by_its_exit_code_how_it_went(
    simulator: Any, client: Any, tuf: Any, files_server: Any, tmp_path: Path
) -> None:
    simulator.add("a/b", b"content")
    simulator.publish(*BELOW)
    (tmp_path / "1.root.json").write_bytes(files_server.files["/metadata/1.root.json"])
    common = [sys.executable, str(tuf.CLIENT), "--metadata-dir", str(tmp_path / "metadata")]
    urls = ["--metadata-url", f"{files_server.url}/metadata", "--target-base-url", f"{files_server.url}/targets"]
    wanted = ["--target-dir", str(tmp_path / "targets"), "--target-name", "a/b"]

    def run(*words: str) -> int:
        return subprocess.run([*common, *words], capture_output=True, check=False).returncode

    assert run("init", str(tmp_path / "1.root.json")) == 0
    assert files_server.log == []
    assert run(*urls, *wanted, "download") == 0
    assert client.contents() == [b"content"]
    assert run(*urls, *wanted, "--target-name", "unknown", "download") == 1


def test_init_asks_for_nothing_and_a_refresh_for_each_role_once(simulator: Any, client: Any) -> None:
    assert client.init() == 0
    assert client.asked() == []
    assert client.refresh() == 0
    assert client.asked() == ["2.root", "timestamp", "1.snapshot", "1.targets"]
    assert client.versions() == NEW
    assert client.refresh() == 0
    assert client.asked() == ["2.root", "timestamp"]


def test_a_download_refreshes_first_even_if_the_target_is_unknown(simulator: Any, client: Any) -> None:
    client.init()
    assert client.download("nothing of that name") == 1
    assert client.versions() == NEW


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: root["signed"].pop("version"),
        lambda root: root["signatures"][0].update(sig="ab" * 64),
        lambda root: root["signed"].update(_type="targets"),
    ],
)
def test_a_first_root_that_is_none_or_unsigned_leads_to_no_request(
    simulator: Any, client: Any, files_server: Any, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    client.init(edited(spoil)(files_server.files["/metadata/1.root.json"]))
    assert client.refresh() == 1
    assert client.asked() == []


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_a_role_signed_by_somebody_else_ends_the_refresh_there(simulator: Any, client: Any, role: str) -> None:
    client.init()
    client.refresh()
    simulator.signers[role] = [CryptoSigner.generate_ed25519()]
    simulator.publish("root", *BELOW)
    assert client.refresh() == 1
    order = ["root", "timestamp", "snapshot", "targets"]
    assert client.versions() == {name: 1 if order.index(name) >= order.index(role) else 2 for name in order}


@pytest.mark.parametrize(
    ("make", "forged"),
    [
        (CryptoSigner.generate_ed25519, "ab" * 64),
        (CryptoSigner.generate_ecdsa, "3046022100" + "ab" * 32 + "022100" + "ab" * 32),
        (CryptoSigner.generate_rsa, "ab" * 384),
    ],
)
def test_keys_of_each_type_count_and_a_wrong_signature_of_one_does_not(
    simulator: Any, client: Any, make: Callable[[], CryptoSigner], forged: str
) -> None:
    client.init()
    signer = make()
    simulator.rekey("root", [*simulator.signers["root"], signer], threshold=2)
    simulator.publish("root")
    assert client.refresh() == 0
    assert client.versions()["root"] == 2

    def forge(data: bytes) -> bytes:
        metadata: Metadata[Any] = Metadata.from_bytes(data)
        metadata.signatures[signer.public_key.keyid].signature = forged
        return metadata.to_bytes()

    simulator.publish("root", change=forge)
    assert client.refresh() == 1
    assert client.versions()["root"] == 2


def test_a_threshold_counts_keys_and_not_signatures(simulator: Any, client: Any) -> None:
    client.init()
    keys = [CryptoSigner.generate_ed25519() for _ in range(3)]
    simulator.rekey("snapshot", keys, threshold=3)
    simulator.publish("root", *BELOW)
    assert client.refresh() == 0
    simulator.signers["snapshot"] = keys[:2]
    simulator.publish("snapshot", "timestamp")
    assert client.refresh() == 1  # two of three
    simulator.publish(
        "snapshot", "timestamp", change=edited(lambda data: data["signatures"].extend(data["signatures"][:1]))
    )
    assert client.refresh() == 1  # one of them twice
    assert client.versions()["snapshot"] == 2
    simulator.signers["snapshot"] = keys
    simulator.publish("snapshot", "timestamp")
    assert client.refresh() == 0


def test_one_key_named_twice_in_a_role_counts_once(simulator: Any, client: Any) -> None:
    client.init()
    simulator.rekey("root", simulator.signers["root"])

    def double(content: dict[str, Any]) -> None:
        content["signed"]["roles"]["snapshot"].update(
            keyids=content["signed"]["roles"]["snapshot"]["keyids"] * 2, threshold=2
        )

    unsigned = edited(double)

    def signed_again(data: bytes) -> bytes:
        from securesystemslib.formats import encode_canonical

        content = json.loads(unsigned(data))
        signature = simulator.signers["root"][0].sign(encode_canonical(content["signed"]).encode())
        content["signatures"] = [signature.to_dict()]
        return json.dumps(content).encode()

    simulator.publish("root", change=signed_again)
    assert client.refresh() == 1
    assert "snapshot" not in client.versions()


def test_a_signature_under_an_id_that_the_role_does_not_name_counts_nothing(simulator: Any, client: Any) -> None:
    client.init()
    one = simulator.signers["timestamp"][0]
    again = SSlibKey("f" * 64, "ed25519", "ed25519", one.public_key.keyval)
    other = CryptoSigner(one._private_key, again)
    simulator.content["root"].roles["timestamp"].threshold = 2
    simulator.signers["timestamp"] = [one, other]
    simulator.publish("root", *BELOW)
    assert client.refresh() == 1
    assert client.versions() == {"root": 2}


def test_a_signature_that_is_wrong_or_empty_does_no_harm_beside_enough_good_ones(simulator: Any, client: Any) -> None:
    client.init()
    first = simulator.signers["timestamp"][0]
    simulator.rekey("timestamp", [first, CryptoSigner.generate_ed25519()])
    simulator.publish("root")
    for sig in ("ab" * 64, ""):
        simulator.publish("timestamp", change=edited(lambda data, sig=sig: data["signatures"][0].update(sig=sig)))
        assert client.refresh() == 0


def test_fields_that_nobody_knows_are_signed_content(simulator: Any, client: Any) -> None:
    client.init()
    root = simulator.content["root"]
    root.unrecognized_fields["custom"] = "value"
    root.keys[root.roles["root"].keyids[0]].unrecognized_fields["more"] = {"a": [1, None]}
    root.roles["root"].unrecognized_fields["other"] = 1
    simulator.publish("root")
    assert client.refresh() == 0
    assert client.versions()["root"] == 2


ROOTS = {
    "one key for another": "1/1/1 2/1/21 2/1/2",
    "signatures of strangers beside": "1/1/314 2/1/3214 2/1/324",
    "three of five, others each time": "01234/3/024 01234/3/041 01234/3/013",
    "one of five replaced": "01234/3/024 01345/3/041",
    "one of five replaced, signed by four": "01234/3/024 01345/3/0245 01345/3/045",
    "all five replaced": "01234/3/024 56789/3/024567 56789/3/567",
    "a higher threshold": "123/1/1 123/2/12",
    "a lower threshold": "123/2/12 123/1/12 123/1/1",
    "a second key, both needed": "1/1/1 12/2/12",
    "the old key did not sign": "1/1/1 2/1/234!",
    "the new key did not sign": "1/1/1 2/1/134!",
    "too few of the new five": "01234/3/024 01345/3/024!",
    "too few of the old five": "01234/3/024 01345/3/045!",
    "the higher threshold is not met": "123/1/1 123/2/2!",
    "the old higher threshold is not met": "123/2/12 123/1/1!",
}
KEYS = [CryptoSigner.generate_ed25519() for _ in range(10)]


@pytest.mark.parametrize("story", ROOTS.values(), ids=ROOTS.keys())
def test_roots_are_followed_by_old_and_new_threshold(
    simulator: Any, client: Any, files_server: Any, story: str
) -> None:
    simulator.content["root"].version = 0
    for step in story.rstrip("!").split():
        keys, threshold, signing = step.split("/")
        simulator.rekey("root", [KEYS[int(key)] for key in keys], int(threshold))
        simulator.signers["root"] = [KEYS[int(key)] for key in signing]
        simulator.publish("root")
    client.init()
    last, refused = simulator.content["root"].version, story.endswith("!")
    assert client.refresh() == int(refused)
    kept = (client.folder / "metadata" / "root.json").read_bytes()
    assert kept == files_server.files[f"/metadata/{last - refused}.root.json"]


@pytest.mark.parametrize("number", [1, 3])
def test_a_root_of_another_number_than_its_name_is_refused(
    simulator: Any, client: Any, files_server: Any, number: int
) -> None:
    simulator.content["root"].version = number - 1
    simulator.publish("root")
    files_server.files["/metadata/2.root.json"] = files_server.files[f"/metadata/{number}.root.json"]
    client.init()
    assert client.refresh() == 1
    assert client.versions() == {"root": 1}


def test_a_root_that_is_missing_ends_the_chain_before_it(simulator: Any, client: Any, files_server: Any) -> None:
    client.init()
    simulator.publish("root", "root")
    del files_server.files["/metadata/2.root.json"]
    assert client.refresh() == 0
    assert client.versions()["root"] == 1


def test_a_refresh_follows_so_many_roots_and_the_next_one_the_rest(simulator: Any, client: Any) -> None:
    client.init()
    simulator.publish(*["root"] * 260)
    assert client.refresh() == 0
    assert client.versions()["root"] == 257
    assert client.refresh() == 0
    assert client.versions()["root"] == 261


def test_a_root_in_the_middle_may_have_expired_and_the_last_may_not(simulator: Any, client: Any, tuf: Any) -> None:
    client.init()
    simulator.content["root"].expires = tuf.moment(-1)
    simulator.publish("root", *BELOW)
    assert client.refresh() == 1
    assert client.versions() == {"root": 2}  # kept, but nothing below it
    simulator.content["root"].expires = tuf.moment(1)
    simulator.publish("root")
    assert client.refresh() == 0
    assert client.versions()["root"] == 3


@pytest.mark.parametrize("role", BELOW)
def test_a_role_that_expired_is_not_taken(simulator: Any, client: Any, tuf: Any, role: str) -> None:
    client.init()
    client.refresh()
    simulator.content[role].expires = tuf.moment(-1)
    simulator.publish(*BELOW)
    assert client.refresh() == 1
    assert client.versions()[role] == 1


def test_what_expired_here_still_leads_to_what_is_newer(simulator: Any, client: Any, tuf: Any) -> None:
    simulator.content["timestamp"].expires = tuf.moment(7)
    simulator.publish("timestamp")
    client.init()
    assert client.refresh() == 0
    assert client.refresh(days=18) == 1
    simulator.content["timestamp"].expires = tuf.moment(21)
    simulator.publish(*BELOW)
    assert client.refresh(days=18) == 0
    assert client.versions() == {"root": 1, "timestamp": 3, "snapshot": 2, "targets": 2}


@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize("role", BELOW)
def test_no_role_goes_back(simulator: Any, client: Any, role: str, hashes: bool) -> None:
    simulator.hashes = hashes
    client.init()
    simulator.publish(*BELOW)
    assert client.refresh() == 0
    before = client.versions()
    simulator.content[role].version = 0
    simulator.publish(*BELOW)
    assert client.refresh() == 1
    after = client.versions()
    assert after[role] == 2
    assert after["snapshot"] == before["snapshot"]


@pytest.mark.parametrize(
    ("role", "rekeyed"),
    [("timestamp", ["timestamp"]), ("snapshot", ["snapshot", "timestamp"]), ("targets", ["snapshot"])],
)
def test_after_an_attacker_ran_the_versions_up_new_keys_bring_them_back(
    simulator: Any, client: Any, role: str, rekeyed: list[str]
) -> None:
    client.init()
    simulator.content[role].version = 99_999
    simulator.publish(*BELOW)
    assert client.refresh() == 0
    assert client.versions()[role] == 100_000
    for name in rekeyed:
        simulator.rekey(name)
    simulator.content[role].version = 1
    simulator.publish("root", *BELOW)
    assert client.refresh() == 0
    assert client.versions()[role] == 2


def test_the_same_version_with_another_content_is_left_alone(simulator: Any, client: Any) -> None:
    client.init()
    client.refresh()
    simulator.content["snapshot"].version = 98
    simulator.publish("snapshot")
    simulator.content["timestamp"].version = 0
    simulator.publish("timestamp")
    client.asked()
    assert client.refresh() == 0
    assert client.asked() == ["2.root", "timestamp"]
    assert client.versions() == NEW


def test_what_the_snapshot_does_not_name_is_not_asked_for(simulator: Any, client: Any) -> None:
    client.init()
    client.refresh()
    simulator.publish("targets")
    assert client.refresh() == 0
    assert client.versions() == NEW


def test_a_role_that_vanishes_from_the_snapshot_is_a_rollback(simulator: Any, client: Any) -> None:
    client.init()
    simulator.delegate("targets", "a", "*")
    simulator.publish("a", *BELOW)
    assert client.refresh() == 0
    del simulator.content["snapshot"].meta["a.json"]
    simulator.publish("snapshot", "timestamp")
    assert client.refresh() == 1
    assert client.versions()["snapshot"] == 2


def test_hashes_and_lengths_of_metadata_hold_where_they_are_named(simulator: Any, client: Any) -> None:
    simulator.hashes = True
    simulator.publish(*BELOW)
    client.init()
    assert client.refresh() == 0
    simulator.publish("targets")
    simulator.content["snapshot"].meta["targets.json"].hashes["sha256"] = "a" * 64
    simulator.publish("snapshot", "timestamp")
    assert client.refresh() == 1
    assert (client.versions()["snapshot"], client.versions()["targets"]) == (3, 2)
    simulator.publish("targets")
    simulator.content["snapshot"].meta["targets.json"].length -= 1
    simulator.publish("snapshot", "timestamp")
    assert client.refresh() == 1
    simulator.hashes = False
    simulator.publish(*BELOW)
    assert client.refresh() == 0
