"""Commands about reservations of Cognate's slots: `forge reservations`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from cognateforge.cli.artifacts import Limit, pages
from cognateforge.cli.jobs import RequestId
from cognateforge.cli.names import full_reservation_name
from cognateforge.cli.session import Session, command, new_request_id, print_line, say

if TYPE_CHECKING:
    from cognateforge.cli.session import Row
    from cognateforge.cognate.v1.pretraining_pb2 import ListReservationsResponse, Reservation


def register(app: typer.Typer) -> None:
    """Add the commands."""
    reservations = typer.Typer(help="Keep slots of Cognate for a time.", no_args_is_help=True)
    app.add_typer(reservations, name="reservations")
    _reading(reservations)
    _changing(reservations)


def _reading(reservations: typer.Typer) -> None:
    @command(reservations, "list")
    def list_reservations(
        session: Session,
        include_ended: Annotated[
            bool, typer.Option("--include-ended", help="Those that have ended or were cancelled, too.")
        ] = False,
        limit: Limit = 50,
    ) -> None:
        """List reservations, newest first."""
        from cognateforge.cognate.v1 import pretraining_pb2

        stub = session.cognate_client.pretraining

        def page(size: int, token: str) -> ListReservationsResponse:
            return stub.ListReservations(
                pretraining_pb2.ListReservationsRequest(page_size=size, page_token=token, include_ended=include_ended)
            )

        rows: list[Row] = [(one, {}, _cells(one)) for one in pages(page, "reservations", limit)]
        session.table(("name", "state", "slots", "start", "end", "purpose", "caller"), rows)


def _changing(reservations: typer.Typer) -> None:
    @command(reservations, "create")
    def create_reservation(
        session: Session,
        slots: Annotated[int, typer.Option(help="How many.")],
        end: Annotated[str, typer.Option(help="Until then: a time, or 30m, 8h, 2d from now.")],
        start: Annotated[str, typer.Option(help="From then on, as --end. Default: now.")] = "0s",
        purpose: Annotated[str, typer.Option(help="What for, for people.")] = "",
        request_id: RequestId = None,
    ) -> None:
        """Keep slots for jobs that name the reservation, and print its name."""
        from cognateforge.cli.moments import moment
        from cognateforge.cognate.v1 import pretraining_pb2

        request = pretraining_pb2.CreateReservationRequest(
            request_id=new_request_id(request_id),
            slots=slots,
            start_time=moment(start, option="--start"),
            end_time=moment(end, option="--end"),
            purpose=purpose,
        )
        made = session.cognate_client.pretraining.CreateReservation(request).reservation
        if session.as_json:
            session.show(made)
        else:
            print_line(made.name)

    @command(reservations, "cancel")
    def cancel_reservation(
        session: Session,
        name: Annotated[str, typer.Argument(help="Reservation: reservations/UUID, or the UUID alone.", metavar="NAME")],
        request_id: RequestId = None,
    ) -> None:
        """End a reservation. Its jobs go on, and wait, like any others."""
        from cognateforge.cognate.v1 import pretraining_pb2

        request = pretraining_pb2.CancelReservationRequest(
            request_id=new_request_id(request_id), name=full_reservation_name(name)
        )
        ended = session.cognate_client.pretraining.CancelReservation(request).reservation
        if session.as_json:
            session.show(ended)
        else:
            say(f"{ended.name} {_state(ended)}")


def _cells(one: Reservation) -> tuple[object, ...]:
    start, end = one.start_time.ToJsonString(), one.end_time.ToJsonString()
    return one.name, _state(one), one.slots, start, end, one.purpose, one.caller


def _state(one: Reservation) -> str:
    """Return whether a reservation runs, by this machine's clock."""
    now_ns = time.time_ns()
    if one.HasField("cancel_time"):
        return "CANCELLED"
    if one.end_time.ToNanoseconds() <= now_ns:
        return "ENDED"
    return "RUNNING" if one.start_time.ToNanoseconds() <= now_ns else "AHEAD"
