"""Watches over connections that are reset all the time."""

from pathlib import Path

import pytest

from tests.support.cuts import watch_through_cuts


@pytest.mark.slow
def test_no_event_is_lost_or_doubled_over_a_thousand_cuts(tmp_path: Path) -> None:
    """WatchJob and WatchModels, sync and asyncio, while both histories grow. The bench watch_cuts does ten thousand."""
    result = watch_through_cuts(tmp_path / "cognate", cuts=1000)
    print(result)
    assert (0, 0) == (result.lost, result.doubled)
    assert result.cuts >= 1000
    assert result.events >= 1000
