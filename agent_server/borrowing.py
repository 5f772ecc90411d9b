"""Cores that Cognate leaves idle, borrowed for jobs that find no slot of our own: ADR 0005's burst.

With agent_server.foundation the only module of this service that speaks to Cognate.

A lease is good until its end on this machine's clock, counted from before the call that asked for it, so it ends here
no later than at Cognate. That end stands in the job's row, and every write of its worker is conditional on it: a worker
that was stopped or cut off, with or without this service, writes nothing once its capacity may be somebody else's.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import structlog
from google.protobuf.duration_pb2 import Duration

from agent_server import foundation
from agent_server.settings import BorrowSettings
from cognateforge.exceptions import CapacityTakenError, ForgeError, LeaseEndedError, LeaseNotFoundError
from cognateforge.exchange.v1 import resource_pb2 as pb
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.store import AttemptRow, JobRow, JobStore, Loan
from training_common.store.database import now_us

log = structlog.get_logger(__name__)

_TICK_S = 0.5
# A worker that is still there this long before the end is killed: what it runs on must be free by then.
_MARGIN_S = 1.0
# After a refusal. Capacity becomes free when a job of Cognate's ends, which is no matter of seconds.
_ASK_AGAIN_S = 5.0


class Borrower:
    """Borrows, keeps and gives back. It keeps nothing that a restart could lose: leases stand in the jobs' rows."""

    def __init__(
        self,
        store: JobStore,
        scheduler: Scheduler,
        link: foundation.CognateLink,
        *,
        slots: int,
        settings: BorrowSettings,
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._slots = slots
        self._settings = settings
        self._link = link
        self._tokens: dict[str, int] = {}
        self._renew_at_s: dict[str, float] = {}
        self._ask_at_s = 0.0
        self._away = False
        self._wake = threading.Event()
        self._closed = False

    async def run(self) -> None:
        """Look after leases until cancelled, in a thread of its own: calls may take their whole deadline."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="borrow") as thread:
            try:
                while True:
                    try:
                        await loop.run_in_executor(thread, self.tick)
                    except Exception as error:  # the store is away or busy: leases end by themselves
                        log.warning("leases not looked after", error=f"{type(error).__name__}: {error}")
                    await loop.run_in_executor(thread, self._wake.wait, _TICK_S)
            finally:
                self.stop()

    def stop(self) -> None:
        """Listen no longer. Leases of running workers stay, for the next start of this service."""
        self._closed = True
        self._wake.set()

    def tick(self) -> None:
        """Keep what is in use, give back what is not, and borrow where a job waits in vain."""
        self._wake.clear()
        held = self._store.held()
        on_loan = [(job, attempt) for job, attempt in held if job.lease]
        for job, attempt in on_loan:
            self._keep(job, attempt)
        in_use = {job.lease for job, _ in on_loan}
        for name in [name for name in self._tokens if name not in in_use]:
            self._give_back(name)
        taken = sum(job.slots for job, _ in held if not job.lease)
        # The scheduler counts replays as well.
        own_are_full = max(taken, self._scheduler.standing.taken) >= self._slots
        # What no worker can be started on would be given back at once, and asked for again at the next look.
        wanted = own_are_full and len(on_loan) < self._settings.workers and self._scheduler.starts_workers
        if wanted and time.monotonic() >= self._ask_at_s:
            self._borrow()

    def _keep(self, job: JobRow, attempt: AttemptRow) -> None:
        if job.lease not in self._tokens:
            self._follow(job.lease, job.lease_token)
        until_us = job.lease_until_us or 0
        if until_us - now_us() <= _MARGIN_S * 1e6:
            message = f"attempt {attempt.number}: its borrowed capacity had to be given back"
            self._scheduler.give_up(job, attempt, message)
            return
        if time.monotonic() < self._renew_at_s[job.lease]:
            return
        self._renew_at_s[job.lease] = time.monotonic() + self._settings.ttl_s / 3
        asked_us = now_us()
        request = pb.RenewLeaseRequest(
            request_id=str(uuid.uuid4()), name=job.lease, fencing_token=job.lease_token, ttl=self._ttl()
        )
        try:
            lease = self._link.client().resources.RenewLease(request).lease
        except (LeaseEndedError, LeaseNotFoundError) as error:
            self._scheduler.give_up(job, attempt, f"attempt {attempt.number}: {error.message}")
            return
        except ForgeError as error:
            log.warning("lease not renewed", lease=job.lease, error=error.message)
            self._renew_at_s[job.lease] = time.monotonic() + _TICK_S
            return
        left_us = lease.remaining.ToMicroseconds()
        self._store.extend_lease(job, asked_us + left_us)
        # A state of a newer Cognate that this release does not know is no leave to go on: it is heard as REVOKING.
        if lease.state != pb.LEASE_STATE_ACTIVE:
            left = f"{left_us / 1e6:.0f} s"
            message = f"Cognate asks {lease.amount} cores back within {left}: a checkpoint, then the queue"
            if self._store.ask_back(job, message):
                log.info("capacity asked back", lease=job.lease, job=job.name, left_s=left_us / 1e6)

    def _give_back(self, name: str) -> None:
        """Release a lease that no job runs on. Where Cognate cannot be told, it ends by itself, with its time."""
        request = pb.ReleaseLeaseRequest(request_id=str(uuid.uuid4()), name=name, fencing_token=self._tokens.pop(name))
        self._renew_at_s.pop(name, None)
        try:
            self._link.client().resources.ReleaseLease(request)
        except ForgeError as error:
            log.warning("lease not released", lease=name, error=error.message)

    def _borrow(self) -> None:
        with self._store.database.read() as connection:
            # A job of several processes cannot be spread over what is borrowed.
            if self._store.next_due(connection, most=1, most_nodes=1) is None:
                return
        self._ask_at_s = time.monotonic() + _ASK_AGAIN_S
        asked_us = now_us()
        request = pb.AcquireLeaseRequest(
            request_id=str(uuid.uuid4()), kind=pb.RESOURCE_KIND_CPU, amount=self._settings.cores, ttl=self._ttl()
        )
        try:
            lease = self._link.client().resources.AcquireLease(request).lease
        except CapacityTakenError as error:
            self._scheduler.beyond = f"nothing can be borrowed: {error.message}"
            return
        except ForgeError as error:
            if not self._away:
                log.warning("nothing can be borrowed for now", error=error.message)
            self._away = True
            self._scheduler.beyond = f"nothing can be borrowed: {error.message}"
            return
        self._ask_at_s, self._away, self._scheduler.beyond = 0.0, False, ""
        self._follow(lease.name, lease.fencing_token)
        loan = Loan(
            lease=lease.name,
            token=lease.fencing_token,
            amount=lease.amount,
            until_us=asked_us + lease.remaining.ToMicroseconds(),
        )
        self._renew_at_s[lease.name] = time.monotonic() + self._settings.ttl_s / 3
        if self._scheduler.start_on(loan) is None:
            self._give_back(lease.name)

    def _ttl(self) -> Duration:
        duration = Duration()
        duration.FromMilliseconds(round(self._settings.ttl_s * 1000))
        return duration

    def _follow(self, name: str, token: int) -> None:
        """Hear at once when a lease changes, and renew it then, which tells what has become of it."""
        self._tokens[name], self._renew_at_s[name] = token, 0.0

        def listen() -> None:
            last = pb.LEASE_STATE_ACTIVE
            while name in self._tokens and not self._closed:
                try:
                    for frame in self._link.client().resources.WatchLease(pb.WatchLeaseRequest(name=name)):
                        if frame.lease.state != last and name in self._renew_at_s:
                            last = frame.lease.state
                            self._renew_at_s[name] = 0.0
                            self._wake.set()
                    return  # it has ended
                except LeaseNotFoundError:
                    return
                except ForgeError:
                    time.sleep(_TICK_S)  # renewals tell as well, only later

        threading.Thread(target=listen, name=f"watch-{name}", daemon=True).start()
