"""A short run of `make fuzz`, and that it can fail."""

from pathlib import Path

import grpc
import pytest

from tests.fuzz.requests import Request
from tests.fuzz.run import Service, Tally, fuzz, judge, running


@pytest.mark.slow
def test_what_descriptors_allow_or_forbid_is_answered_by_the_contract(tmp_path: Path) -> None:
    """A thousand and a half requests over every RPC: `make fuzz` makes more of the same."""
    result = fuzz(tmp_path, count=1500, seed=7)
    print(result)
    assert (1500, 67) == (result["value"], result["methods"])
    assert len(result["never_served"]) < 6, "a few, by chance"
    assert result["outcomes"]["OK"] > 300
    assert result["refused_without_a_write"] > 300
    assert all(grown < 1.15 for grown in result["rss_grown"].values())


@pytest.mark.slow
def test_a_leak_or_a_write_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of the code, a status that tells nothing, and a row that a refused call has left, each ends the run."""
    request = Request(kind="valid", data=b"", metadata=(), timeout_s=5.0)
    with running("cognate", tmp_path / "cognate", LENDING__GPUS="1") as service:
        method = next(one for one in service.methods if one.name == "StartPretraining")
        judge(service, method, request, Tally())

        def answers(code: grpc.StatusCode, details: str) -> None:
            def call(_service: Service, _method: object, _request: Request) -> Failed:
                return Failed(code, details)

            monkeypatch.setattr("tests.fuzz.run.call", call)

        for details in ("KeyError('x')", 'File "store.py", line 3', "[SQL: SELECT 1]", "/tmp/x", "<class 'int'>"):
            answers(grpc.StatusCode.INVALID_ARGUMENT, details)
            with pytest.raises(AssertionError, match="StartPretraining"):
                judge(service, method, request, Tally())
        for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE):
            answers(code, "sorry")
            with pytest.raises(AssertionError, match="StartPretraining"):
                judge(service, method, request, Tally())
        answers(grpc.StatusCode.INVALID_ARGUMENT, "no reason given")
        with pytest.raises(AssertionError, match="no ErrorInfo"):
            judge(service, method, request, Tally())
        monkeypatch.setattr(service.store, "has_changed", lambda: True)
        answers(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")
        with pytest.raises(AssertionError, match="a refused request has written"):
            judge(service, method, request, Tally())


class Failed(grpc.RpcError):
    """A call that failed in a way that no server of ours does."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__()
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()
