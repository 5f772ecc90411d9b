"""`forge certs`: what it refuses, before anything is written."""

from pathlib import Path

import pytest

from cognateforge.certificates import Authority
from cognateforge.exceptions import ClientSetupError


@pytest.mark.parametrize("days", [0, -1, 1e9, float("inf"), float("nan")])
def test_an_impossible_time_leaves_no_authority(days: float, tmp_path: Path) -> None:
    """The folder can be used for another try."""
    with pytest.raises(ClientSetupError, match="days"):
        Authority.create(tmp_path, "forge.test", days=days)
    Authority.create(tmp_path, "forge.test")


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    """It would be refused on the day that the authority ends, whatever it says."""
    made = Authority.create(tmp_path, "forge.test", days=10)
    with pytest.raises(ClientSetupError, match="the authority itself ends in 9 days"):
        made.issue("a", days=30)
    made.issue("a", days=5)


def test_an_authority_is_a_pair(tmp_path: Path) -> None:
    """A certificate beside another one's key would sign what nobody trusts."""
    for name in ("one", "two"):
        Authority.create(tmp_path / name, "forge.test")
    (tmp_path / "two" / "ca.key").write_bytes((tmp_path / "one" / "ca.key").read_bytes())
    with pytest.raises(ClientSetupError, match="is not the key of"):
        Authority.open(tmp_path / "two")


@pytest.mark.parametrize("host", ["", "a b", "http://x", "127.0.0.1:7101", "-a", "a..b", "*"])
def test_a_host_is_a_name_or_an_address(host: str, tmp_path: Path) -> None:
    """Clients would refuse such a server, without a word of why."""
    made = Authority.create(tmp_path, "forge.test")
    with pytest.raises(ClientSetupError, match="neither a DNS name nor an address"):
        made.issue("a", hosts=[host])
    made.issue("a", hosts=["localhost", "*.forge.test", "::1", "10.0.0.1", "a-b.example"])


@pytest.mark.parametrize("name", ["ca", "../x", "a//b", "A", "", "x/../y", "a/"])
def test_a_name_stays_in_the_folder(name: str, tmp_path: Path) -> None:
    """And is no other file of the authority."""
    made = Authority.create(tmp_path, "forge.test")
    with pytest.raises(ClientSetupError, match="name"):
        made.issue(name)
    assert {"ca.pem", "ca.key"} == {path.name for path in tmp_path.iterdir()}
