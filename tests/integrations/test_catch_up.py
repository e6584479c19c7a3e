"""The way from a group that went on to one that comes back: what arrives is whole, fits, and is of the right step."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from crossdock.checkpoint.checksums import checksum
from crossdock.integrations.catch_up import CatchUpError, RankState, StateServer, fetch_state, take_over

STEP = 7
VALUES = {"step": STEP, "balance": {"placements": [[0, 1, -1]]}, "name": "épée"}


def tensors() -> dict[str, Tensor]:
    """Of several dtypes, without elements, without dimensions, sharing memory, not contiguous."""
    whole = torch.arange(12.0).view(3, 4)
    return {
        "a": whole[:2],
        "b": whole.t(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "none": torch.zeros(0, 4),
        "counts": torch.arange(3),
    }


@pytest.fixture
def server() -> Iterator[StateServer]:
    server = StateServer("127.0.0.1", timeout=5)
    yield server
    server.close()


def test_what_is_fetched_is_what_was_offered_bit_for_bit(server: StateServer) -> None:
    server.offer(STEP, RankState(tensors(), VALUES))
    own = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    state = fetch_state(server.address, STEP, own, timeout=5)
    assert state.values == VALUES
    take_over(own, state)
    for name, tensor in tensors().items():
        assert torch.equal(own[name], tensor), name


def test_pieces_are_of_bounded_size_and_all_arrive(server: StateServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdock.integrations.catch_up._PIECE_BYTES", 40)
    server.offer(STEP, RankState(tensors(), VALUES))
    assert fetch_state(server.address, STEP, tensors(), timeout=5).tensors.keys() == tensors().keys()


def test_a_request_waits_for_the_offer(server: StateServer) -> None:
    later = threading.Timer(0.3, lambda: server.offer(STEP, RankState(tensors(), VALUES)))
    later.start()
    assert fetch_state(server.address, STEP, tensors(), timeout=5).values == VALUES


@pytest.mark.parametrize("step", [STEP - 1, STEP + 1])
def test_another_step_is_refused(server: StateServer, step: int) -> None:
    server.offer(STEP, RankState(tensors(), VALUES))
    with pytest.raises(CatchUpError, match=f"step {step}.*step {STEP} is on offer"):
        fetch_state(server.address, step, tensors(), timeout=5)


def test_nobody_without_the_secret_is_served(server: StateServer) -> None:
    server.offer(STEP, RankState(tensors(), VALUES))
    place, _, secret = server.address.rpartition("/")
    for other in ("0" * len(secret), secret[:-1], "", "../" + secret):
        with pytest.raises(CatchUpError, match="refused"):
            fetch_state(f"{place}/{other}", STEP, tensors(), timeout=5)


def test_what_is_withdrawn_is_served_no_more() -> None:
    server = StateServer("127.0.0.1", timeout=0.3)
    server.offer(STEP, RankState(tensors(), VALUES))
    server.withdraw()
    with pytest.raises(CatchUpError, match="nothing is on offer"):
        fetch_state(server.address, STEP, tensors(), timeout=5)
    server.close()


@pytest.mark.parametrize("address", ["file:///etc/passwd", "https://127.0.0.1:1/x", "http://127.0.0.1/x", ""])
def test_only_addresses_of_servers_are_asked(address: str) -> None:
    with pytest.raises(CatchUpError, match="no address of the form"):
        fetch_state(address, STEP, {}, timeout=1)


def test_a_peer_that_is_gone_is_named(server: StateServer) -> None:
    server.close()
    with pytest.raises(CatchUpError, match=r"127\.0\.0\.1:.*ConnectionRefused"):
        fetch_state(server.address, STEP, {}, timeout=1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda own: own | {"more": torch.zeros(2)}, "more is missing"),
        (lambda own: {name: own[name] for name in own if name != "b"}, "b is nothing that this rank has"),
        (lambda own: own | {"a": torch.zeros(2, 5)}, r"a is \(2, 4\).*this rank has \(2, 5\)"),
        (lambda own: own | {"counts": torch.zeros(3)}, r"counts is \(3,\) torch.int64.*torch.float32"),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_nothing_is_taken(
    server: StateServer, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str
) -> None:
    own = change({name: torch.zeros_like(tensor) for name, tensor in tensors().items()})
    server.offer(STEP, RankState(tensors(), VALUES))
    with pytest.raises(CatchUpError, match=told):
        fetch_state(server.address, STEP, own, timeout=5)
    assert not any(tensor.any() for tensor in own.values())


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(8, "little") + checksum(payload).encode() + payload


def body(header: object = None, *pieces: bytes) -> bytes:
    known = {"format": 1, "step": STEP, "values": VALUES, "pieces": len(pieces)}
    return frame(json.dumps(known if header is None else header).encode()) + b"".join(map(frame, pieces))


PIECE = save({"a": torch.ones(3)})
WHOLE = body(None, PIECE)


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], str]]:
    """`serve(body)`: the address of a peer that answers so, whatever it is asked."""
    servers: list[HTTPServer] = []

    def started(answer: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/secret"

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


def test_every_flipped_byte_is_found(serve: Callable[[bytes], str]) -> None:
    own = {"a": torch.zeros(3)}
    assert fetch_state(serve(WHOLE), STEP, own, timeout=5).tensors["a"].sum() == 3
    for place in range(0, len(WHOLE), 7):
        damaged = bytearray(WHOLE)
        damaged[place] ^= 0x10
        with pytest.raises(CatchUpError):
            fetch_state(serve(bytes(damaged)), STEP, own, timeout=5)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "the header ends after 0 of 40 bytes"),
        (WHOLE[:-1], r"piece 1 of 1 ends after \d+ of \d+ bytes"),
        (frame(b"{"), "the header is no JSON"),
        (frame(b"[" * 100_000), "the header is no JSON"),
        (body({"format": 2}), "not of format 1"),
        (body({"format": 1, "step": STEP + 1, "values": {}, "pieces": 0}), "it is of step 8"),
        (body({"format": 1, "step": STEP, "values": {}, "pieces": -1}), "no whole `pieces`"),
        (body({"format": 1, "step": STEP, "values": {}, "pieces": True}), "no whole `pieces`"),
        (body(None), "a is missing"),
        (body(None, b"no safetensors"), "no safetensors"),
        (body(None, PIECE[:20]), "no safetensors"),
        (body(None)[:0] + (2**62).to_bytes(8, "little") + b"0" * 32, "the header would have"),
        (
            body({"format": 1, "step": STEP, "values": {}, "pieces": 1}) + (2**40).to_bytes(8, "little") + b"0" * 32,
            "would",
        ),
        (b"\x80\x04\x95" + b"." * 60, "the header would have"),
    ],
    ids=[f"answer-{number}" for number in range(14)],
)
def test_what_is_no_whole_state_is_named(serve: Callable[[bytes], str], answer: bytes, told: str) -> None:
    with pytest.raises(CatchUpError, match=told):
        fetch_state(serve(answer), STEP, {"a": torch.zeros(3)}, timeout=5)


def test_a_state_that_comes_too_slowly_is_given_up() -> None:

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/secret"
        with pytest.raises(CatchUpError, match=r"Timeout|timed out"):
            fetch_state(address, STEP, {}, timeout=0.3)
