"""What a job costs where it costs least: a table of prices, offers that fit, and the answer of a dry run."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.rpc.test_scheduling import end_an_attempt, side
from training_common.rpc.estimates import Choice, Need, cheapest, need_of
from training_common.settings import PriceSettings

GIB = 2**30


def prices(**values: Any) -> PriceSettings:
    return PriceSettings.model_validate({"currency": "EUR", **values})


def offer(cores: int, gib: int, on_demand: float | None = None, spot: float | None = None, **more: Any) -> Any:
    return {"cores": cores, "memory_bytes": gib * GIB, "hour": {"on_demand": on_demand, "spot": spot}, **more}


OFFERS = {
    "tiny": offer(2, 2, 0.01),
    "small": offer(2, 8, 0.10, 0.03),
    "wide": offer(16, 8, 0.40, 0.20),
    "large": offer(16, 64, 1.00, 0.25),
    "graphics": offer(16, 64, 3.00, gpus=1),
}


@pytest.mark.parametrize(
    ("need", "spot", "expected"),
    [
        (Need(memory_bytes=GIB, processes=1), False, ("tiny", 0.01)),
        (Need(memory_bytes=4 * GIB, processes=1), False, ("small", 0.10)),
        (Need(memory_bytes=4 * GIB, processes=4), False, ("wide", 0.40)),
        (Need(memory_bytes=9 * GIB, processes=1), False, ("large", 1.00)),
        (Need(memory_bytes=9 * GIB, processes=1, gpus=1), False, ("graphics", 3.00)),
        (Need(memory_bytes=65 * GIB, processes=1), False, None),
        (Need(memory_bytes=0, processes=1), False, None),
        (Need(memory_bytes=GIB, processes=1), True, ("small", 0.03)),
        (Need(memory_bytes=9 * GIB, processes=1), True, ("large", 0.25)),
        (Need(memory_bytes=9 * GIB, processes=1, gpus=1), True, None),
    ],
)
def test_the_cheapest_offer_that_fits_is_chosen(need: Need, spot: bool, expected: tuple[str, float] | None) -> None:
    """By memory, a core for each process, and graphics processors; where nothing fits there is no price."""
    choice = cheapest(prices(offers=OFFERS), need, spot=spot)
    assert expected == (choice and (choice.offer, choice.hour))


def test_only_the_first_process_holds_a_checkpoint() -> None:
    """Everything else each of them does. What nobody knows stays unknown."""
    assert 3 * 4 + 3 == need_of({"weights": 4, "checkpoint_copy": 3}, processes=3, gpus=0).memory_bytes
    assert 7 == need_of({"weights": 4, "checkpoint_copy": 3}, processes=1, gpus=0).memory_bytes
    assert 0 == need_of({}, processes=3, gpus=0).memory_bytes


def test_an_offer_without_a_price_costs_its_parts() -> None:
    """By kind; where one of them has no price, the offer has none."""
    kinds = {"core": {"on_demand": 0.02, "spot": 0.01}, "memory_gib": {"on_demand": 0.005}}
    table = prices(kinds=kinds, offers={"plain": {"cores": 4, "memory_bytes": 8 * GIB}})
    need = Need(memory_bytes=GIB, processes=1)
    choice = cheapest(table, need, spot=False)
    assert choice is not None
    assert "plain" == choice.offer
    assert choice.hour == pytest.approx(4 * 0.02 + 8 * 0.005)
    assert cheapest(table, need, spot=True) is None
    table = prices(kinds=kinds, offers={"plain": {"cores": 4, "memory_bytes": 8 * GIB, "gpus": 1}})
    assert cheapest(table, need, spot=False) is None


def test_speed_and_this_servers_own_price_count() -> None:
    """Twice as fast is half as long; this server may be the cheapest place, and costs for each process."""
    table = prices(worker_hour=0.30, offers={"fast": offer(8, 8, 1.00, speed=4.0)})
    need = Need(memory_bytes=GIB, processes=1)
    assert Choice(offer="fast", hour=0.25) == cheapest(table, need, spot=False)
    table = prices(worker_hour=0.20, offers={"fast": offer(8, 8, 1.00, speed=4.0)})
    assert Choice(offer="", hour=0.20) == cheapest(table, need, spot=False)
    assert Choice(offer="fast", hour=0.25) == cheapest(table, Need(memory_bytes=GIB, processes=2), spot=False)


@pytest.mark.parametrize("name", ["cognate", "agent"])
async def test_a_dry_run_tells_the_cheapest_fit(name: str, tmp_path: Path) -> None:
    """Once a speed was measured: 40 s, on the only offer that has the memory, kept and at a spot price."""
    offers = {"tiny": offer(1, 1, 0.01, 0.001), "roomy": offer(4, 64, 3.6, 0.9)}
    async with side(name, tmp_path, price={"currency": "EUR", "offers": offers}) as service:
        assert not (await service.start()).estimate.HasField("cost")
        end_an_attempt(service.folder, 39.0)
        estimate = (await service.start(validate_only=True)).estimate
    assert ("roomy", "EUR", pytest.approx(0.04)) == (estimate.cost.offer, estimate.cost.currency, estimate.cost.amount)
    assert ("roomy", pytest.approx(0.01)) == (estimate.spot_cost.offer, estimate.spot_cost.amount)


def test_offers_without_a_currency_are_refused() -> None:
    """Nobody could tell what they mean."""
    with pytest.raises(ValidationError, match="prices have no currency"):
        PriceSettings.model_validate({"offers": OFFERS})
