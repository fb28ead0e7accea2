"""Our updater by the rules of TUF's client workflow: delegations, hash bins, and the targets that they lead to."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("tuf")

BELOW = ("targets", "snapshot", "timestamp")

GRAPHS = {
    "one": ("t>A", "A"),
    "two": ("t>A t>B", "A B"),
    "below the second": ("t>A t>B B>C", "A B C"),
    "depth first": ("t>A t>B A>C A>D", "A C D B"),
    "depth first, three levels": ("t>A t>B A>C C>D", "A C D B"),
    "terminating hides what comes after": ("t>A t>B A>C! A>D", "A C"),
    "terminating goes on below": ("t>A t>B A>C! C>D", "A C D"),
    "other paths, first level": ("t>A:*.py t>B A>C", "B"),
    "other paths, second level": ("t>A t>B A>C:*.py C>D", "A B"),
    "a circle": ("t>A t>B B>C C>D D>B", "A B C D"),
    "two ways to one": ("t>A t>B B>C A>C", "A C B"),
    "two ways, one of other paths": ("t>A t>B B>C A>C:*.py", "A B C"),
}


def delegated(simulator: Any, graph: str) -> list[str]:
    """Makes a graph of 'parent>role:pattern,pattern!' and names what to publish."""
    changed = {"targets": None}
    for word in graph.split():
        parent, _, rest = word.rstrip("!").partition(">")
        name, _, paths = rest.partition(":")
        parent = "targets" if parent == "t" else parent
        simulator.delegate(parent, name, *(paths or "*").split(","), terminating=word.endswith("!"))
        changed |= {parent: None, name: None}
    return [*changed, "snapshot", "timestamp"]


@pytest.mark.parametrize(("graph", "order"), GRAPHS.values(), ids=GRAPHS.keys())
def test_delegations_are_searched_in_their_order_and_each_role_once(
    simulator: Any, client: Any, graph: str, order: str
) -> None:
    client.init()
    changed = delegated(simulator, graph)
    simulator.publish(*changed)
    assert client.download("missing") == 1
    assert client.asked()[4:] == [f"1.{role}" for role in order.split()]


@pytest.mark.parametrize(
    ("path", "roles"),
    [
        ("file", ""),
        ("README.md", "A"),
        ("releases/x/x_v1", "B C"),
        ("releases/y/y_v1.zip", "B D"),
        ("releases/z/z_v1.zip", "B !"),  # D signs it, but nobody lets it
        ("releases/x/deeper/x_v1", "!"),  # a star ends at a slash
    ],
)
def test_patterns_say_which_role_may_sign_a_path(simulator: Any, client: Any, path: str, roles: str) -> None:
    client.init()
    changed = delegated(simulator, "t>A:*.doc,*.md t>B:releases/*/* B>C:releases/x/* B>D:releases/y/*.zip")
    for role, name in (
        ("targets", "file"),
        ("A", "README.md"),
        ("C", "releases/x/x_v1"),
        ("D", "releases/y/y_v1.zip"),
        ("D", "releases/z/z_v1.zip"),
        ("C", "releases/x/deeper/x_v1"),
    ):
        simulator.add(name, name.encode(), role)
    simulator.publish(*changed)
    assert client.download(path) == int("!" in roles)
    asked = [name for name in client.asked()[4:] if not name.startswith("/targets/")]
    assert asked == [f"1.{role}" for role in roles.replace("!", "").split()]
    assert client.contents() == ([] if "!" in roles else [path.encode()])


def test_prefixes_of_a_hash_say_which_role_may_sign_a_path(simulator: Any, client: Any) -> None:
    import hashlib

    client.init()
    digits = "0123456789abcdef"
    simulator.delegate("targets", "low", path_hash_prefixes=list(digits[:8]))
    simulator.delegate("targets", "high", path_hash_prefixes=list(digits[8:]))
    names = [f"part {number}" for number in range(6)]
    for name in names:
        right = "low" if hashlib.sha256(name.encode()).hexdigest()[0] in digits[:8] else "high"
        simulator.add(name, name.encode(), right)
        simulator.add(name, b"wrong", "high" if right == "low" else "low")
        simulator.add(name, name.encode(), right)
    simulator.publish("low", "high", *BELOW)
    assert client.download(*names) == 0
    assert client.contents() == sorted(name.encode() for name in names)


@pytest.mark.parametrize("consistent", [True, False])
def test_hash_bins_are_found_and_only_the_one_that_is_needed_is_fetched(
    tuf: Any, files_server: Any, client: Any, consistent: bool
) -> None:
    simulator = tuf.Simulator(files_server.files, consistent=consistent)
    client.init()
    bins = simulator.bins(4)
    simulator.add("x/y", b"xy", bins.get_role_for_target("x/y"))
    simulator.publish(*bins.get_roles(), *BELOW)
    assert client.download("x/y") == 0
    asked = client.asked()
    assert [name for name in asked if "bin-" in name] == [
        f"{'1.' * consistent}{bins.get_role_for_target('x/y')}",
    ]
    assert client.download("x/z") == 1


def test_a_search_ends_after_so_many_roles(simulator: Any, client: Any) -> None:
    client.init()
    for number in range(40):
        simulator.delegate("targets", f"r{number}", "*")
    simulator.add("late", b"late", "r39")
    simulator.add("early", b"early", "r3")
    simulator.publish(*(f"r{number}" for number in range(40)), *BELOW)
    assert client.download("early") == 0
    assert client.download("late") == 1
    assert len([name for name in client.asked() if name.startswith("1.r")]) < 40


@pytest.mark.parametrize("role", ["?", "#", "/delegated", "../delegated", ".", "..", "a%2Fb", "ünïcode role"])
def test_unusual_role_names_are_asked_for_and_kept_safely(simulator: Any, client: Any, role: str) -> None:
    client.init()
    simulator.delegate("targets", role, "*")
    simulator.add("one", b"one", role)
    simulator.publish(role, *BELOW)
    assert client.download("one") == 0
    assert len(client.versions()) == 5
    assert not [path for path in client.folder.iterdir() if path.name not in ("metadata", "targets", "first.json")]


def test_a_delegated_role_that_expired_is_not_used_until_there_is_a_newer_one(
    simulator: Any, client: Any, tuf: Any
) -> None:
    client.init()
    simulator.delegate("targets", "a", "a/*")
    simulator.content["a"].expires = tuf.moment(7)
    simulator.add("a/first", b"first", "a")
    simulator.add("a/second", b"second", "a")
    simulator.publish("a", *BELOW)
    assert client.refresh() == 0
    assert client.download("a/first", days=8) == 1
    assert "a" not in client.versions()
    assert client.download("a/first") == 0
    assert client.download("a/second", days=18) == 1
    assert client.contents() == [b"first"]
    simulator.content["a"].expires = tuf.moment(21)
    simulator.publish("a", "snapshot", "timestamp")
    assert client.download("a/second", days=18) == 0
    assert client.contents() == [b"first", b"second"]


def test_a_delegated_role_signed_by_another_key_is_not_used(simulator: Any, client: Any) -> None:
    client.init()
    simulator.delegate("targets", "a", "*")
    simulator.add("one", b"one", "a")
    simulator.signers["a"] = simulator.signers["snapshot"]
    simulator.publish("a", *BELOW)
    assert client.refresh() == 0
    assert client.download("one") == 1


@pytest.mark.parametrize("consistent", [True, False])
def test_targets_are_fetched_once_and_under_names_that_cannot_escape(
    tuf: Any, files_server: Any, client: Any, consistent: bool
) -> None:
    simulator = tuf.Simulator(files_server.files, consistent=consistent)
    names = ["a.bin", "folder/b b.bin", "../../up", "ünïcode", "a/b/c/d"]
    for name in names:
        simulator.add(name, name.encode() * 100)
    simulator.publish(*BELOW)
    client.init()
    assert client.download(*names) == 0
    assert client.contents() == sorted(name.encode() * 100 for name in names)
    assert len(list((client.folder / "targets").iterdir())) == len(names)
    client.asked()
    assert client.download(*names) == 0
    assert not [name for name in client.asked() if name.startswith("/targets/")]


def test_a_target_in_place_of_an_older_one_takes_its_place_and_a_false_one_does_not(
    simulator: Any, client: Any, files_server: Any
) -> None:
    client.init()
    place = simulator.add("part", b"one")
    simulator.publish(*BELOW)
    assert client.download("part") == 0
    files_server.files[place] = b"two"
    assert client.download("part") == 0  # what is here fits
    assert client.contents() == [b"one"]
    place = simulator.add("part", b"three")
    simulator.publish(*BELOW)
    for false in (b"thref", b"three and more", b"thr", b""):
        files_server.files[place] = false
        assert client.download("part") == 1
        assert client.contents() == [b"one"]
    files_server.files[place] = b"three"
    assert client.download("part") == 0
    assert client.contents() == [b"three"]


@pytest.mark.parametrize("hashes", [["sha256"], ["sha512"], ["sha512", "sha256"], ["sha256", "sha512"]])
def test_each_hash_that_is_signed_must_fit(simulator: Any, client: Any, files_server: Any, hashes: list[str]) -> None:
    simulator.add("part", b"content", hashes=hashes)
    simulator.publish(*BELOW)
    client.init()
    assert client.download("part") == 0
    wrong = "a" * (128 if hashes[-1] == "sha512" else 64)
    simulator.content["targets"].targets["part"].hashes[hashes[-1]] = wrong
    files_server.files[f"/targets/{wrong}.part"] = b"content"
    simulator.publish(*BELOW)
    assert client.download("part") == 1


def test_a_hash_that_nobody_knows_vouches_for_nothing(simulator: Any, client: Any) -> None:
    simulator.add("part", b"content", hashes=["sha512"])
    entry = simulator.content["targets"].targets["part"]
    entry.hashes["unheard-of"] = entry.hashes.pop("sha512")
    simulator.publish(*BELOW)
    client.init()
    assert client.download("part") == 1
    assert not (client.folder / "targets").exists() or client.contents() == []


def test_the_first_target_that_fails_ends_a_download(simulator: Any, client: Any) -> None:
    simulator.add("one", b"one")
    simulator.add("three", b"three")
    simulator.publish(*BELOW)
    client.init()
    assert client.download("one", "two", "three") == 1
    assert client.contents() == [b"one"]
