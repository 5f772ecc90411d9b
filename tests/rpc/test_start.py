"""What keeps a server from starting, and what it says then."""

import os
from pathlib import Path

import pytest

from tests.support.servers import running_agent, running_cognate
from training_common.rpc.server import AddressInUseError
from training_common.settings import SettingsError


async def test_two_servers_never_share_a_data_folder(tmp_path: Path) -> None:
    """The second names the folder and who has it; when the first has stopped, the folder is free."""
    async with running_cognate(tmp_path):
        with pytest.raises(SettingsError, match=rf"data_dir {tmp_path} is in use .* process id {os.getpid()};"):
            async with running_cognate(tmp_path):
                pass
    async with running_cognate(tmp_path) as again:
        assert "127.0.0.1" in again.address


async def test_a_data_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"data_dir .*/file: .*name a folder that this user may write"):
        async with running_agent(tmp_path / "file"):
            pass


async def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    """Nothing of the server that has it is touched, and no task of the new one is left over."""
    async with running_cognate(tmp_path / "first") as first:
        with pytest.raises(AddressInUseError, match=rf"{first.address} cannot be bound: another process uses it"):
            async with running_agent(tmp_path / "second", address=first.address):
                pass
