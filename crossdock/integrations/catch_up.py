"""How a group that comes back gets the state of one that went on: over HTTP, as JSON and safetensors.

Rank `r` fetches from rank `r`. Nothing that arrives is unpickled or executed; every piece carries its length and a
checksum, and the receiver compares names, shapes and dtypes with what it has before it takes anything over.

    GET /SECRET/STEP    ->  frames: JSON {"format", "step", "values", "pieces"}, then `pieces` times safetensors
    frame               ->  length of the payload (8 bytes, little-endian), its XXH3 of 128 bits (32 digits), payload
"""

from __future__ import annotations

import hmac
import http.client
import json
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from crossdock.checkpoint.checksums import checksum
from crossdock.parallel import GroupsFailed

__all__ = ["CatchUpError", "RankState", "StateServer", "fetch_state", "take_over"]

_FORMAT = 1
_PIECE_BYTES = 64 * 2**20  # Of tensors, copied at once; one tensor may be larger.
_MOST_JSON_BYTES = 256 * 2**20
_DIGEST_DIGITS = 32
_SECRET_BYTES = 32


class CatchUpError(GroupsFailed):
    """A state that could not be fetched, or is not what this rank can go on from; the message says what is wrong."""


class RankState(NamedTuple):
    """What one rank has of a run.

    Attributes:
        tensors: by name, this rank's parts: plain tensors, the living ones.
        values: all else; what JSON can hold.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class _Readable(Protocol):
    def read1(self, n: int = -1, /) -> bytes: ...


class StateServer:
    """Gives this rank's state to whoever has the secret and asks for the right step, while it is on offer.

    Args:
        host: name or address of this machine; nothing listens on another.
        timeout: seconds that a request waits for an offer, and for a peer that does not read on.
    """

    def __init__(self, host: str, timeout: float) -> None:
        self._offer: tuple[int, RankState] | None = None
        self._changed = threading.Condition()
        self._readers = 0
        self._timeout = timeout
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._server = ThreadingHTTPServer((host, 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://{host}:{self._server.server_address[1]}/{self._secret}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="catch-up", daemon=True)
        self._thread.start()

    def offer(self, step: int, state: RankState) -> None:
        """Serve `state`, of `step`, from here on. It must not change until `withdraw` has returned."""
        with self._changed:
            self._offer = step, state
            self._changed.notify_all()

    def withdraw(self) -> None:
        """Serve it no more; waits for requests that are being served, no longer than the time-out."""
        deadline = time.monotonic() + self._timeout
        with self._changed:
            self._offer = None
            while self._readers and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())

    def close(self) -> None:
        self.withdraw()
        self._server.shutdown()
        self._server.server_close()

    def _begin(self, step: int) -> RankState | str:
        """The state of `step`, once it is on offer; or why there is none."""
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while self._offer is None:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    return "nothing is on offer"
            offered, state = self._offer
            if offered != step:
                return f"step {offered} is on offer"
            self._readers += 1
            return state

    def _end(self) -> None:
        with self._changed:
            self._readers -= 1
            self._changed.notify_all()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            timeout = owner._timeout

            def do_GET(self) -> None:
                match = re.fullmatch(r"/([0-9a-f]{1,128})/(\d{1,18})", self.path)
                if match is None or not hmac.compare_digest(match[1], owner._secret):
                    self.send_error(403)
                    return
                state = owner._begin(int(match[2]))
                if isinstance(state, str):
                    self.send_error(409, state)
                    return
                try:
                    self.send_response(200)
                    self.end_headers()
                    for frame in _frames(int(match[2]), state):
                        self.wfile.write(frame)
                except OSError:
                    self.close_connection = True  # The peer is gone, or has seen enough.
                finally:
                    owner._end()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def _frames(step: int, state: RankState) -> Iterator[bytes]:
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.tensors.items():
        if size and size + tensor.nbytes > _PIECE_BYTES:
            pieces.append({})
            size = 0
        pieces[-1][name] = tensor
        size += tensor.nbytes
    header = {"format": _FORMAT, "step": step, "values": state.values, "pieces": len(pieces)}
    yield _frame(json.dumps(header).encode())
    for piece in pieces:
        # Copies: safetensors refuses tensors that share memory.
        plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in piece.items()}
        yield _frame(write_tensors(plain))


def _frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(8, "little") + checksum(payload).encode() + payload


def fetch_state(address: str, step: int, own: Mapping[str, Tensor], timeout: float) -> RankState:
    """The state of `step` from a `StateServer`, whole and fitting.

    Args:
        address: of that server, with its secret.
        step: that is wanted.
        own: what this rank has: the same names, shapes and dtypes must arrive. Not written to.
        timeout: seconds for all of it.

    Raises:
        CatchUpError: naming what is wrong.
    """
    deadline = time.monotonic() + timeout
    url = urlsplit(address)
    where = f"the state of step {step} from {url.hostname}:{url.port}"
    if url.scheme != "http" or not url.hostname or not url.port:
        raise CatchUpError("the state of another group has no address of the form http://HOST:PORT/SECRET")
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=timeout)
    try:
        connection.request("GET", f"{url.path}/{step}")
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise CatchUpError(f"{where}: refused ({response.status} {response.reason})")
        return _read_state(response, step, own, where, deadline)
    except (OSError, http.client.HTTPException) as error:
        raise CatchUpError(f"{where}: {type(error).__name__}: {error}") from None
    finally:
        connection.close()


def _read_state(stream: _Readable, step: int, own: Mapping[str, Tensor], where: str, deadline: float) -> RankState:
    def frame(what: str, most: int) -> bytes:
        head = _read(stream, 8 + _DIGEST_DIGITS, f"{where}: {what}", deadline)
        size = int.from_bytes(head[:8], "little")
        if size > most:
            raise CatchUpError(f"{where}: {what} would have {size} bytes, more than {most}")
        payload = _read(stream, size, f"{where}: {what}", deadline)
        if checksum(payload).encode() != head[8:]:
            raise CatchUpError(f"{where}: {what} is damaged: its checksum is not what was sent")
        return payload

    header = _read_header(frame("the header", _MOST_JSON_BYTES), step, where)
    # Names and shapes come on top of the values.
    most = sum(tensor.nbytes for tensor in own.values()) + 2**20 + 1024 * len(own)
    tensors: dict[str, Tensor] = {}
    for number in range(header["pieces"]):
        what = f"piece {number + 1} of {header['pieces']}"
        try:
            piece = read_tensors(frame(what, most))
        except SafetensorError as error:
            raise CatchUpError(f"{where}: {what} is no safetensors: {error}") from None
        _check(piece, own, where)
        tensors |= piece
    missing = sorted(own.keys() - tensors.keys())
    if missing:
        raise CatchUpError(f"{where}: {missing[0]} is missing, one of {len(missing)}")
    return RankState(tensors, header["values"])


def _read_header(payload: bytes, step: int, where: str) -> dict[str, Any]:
    try:
        header = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise CatchUpError(f"{where}: the header is no JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CatchUpError(f"{where}: the header is not of format {_FORMAT}; the groups must run the same version")
    if header.get("step") != step:
        raise CatchUpError(f"{where}: it is of step {header.get('step')!r}")
    pieces = header.get("pieces")
    if type(pieces) is not int or not 0 <= pieces < 2**31 or not isinstance(header.get("values"), dict):
        raise CatchUpError(f"{where}: the header has no whole `pieces` and `values`")
    return header


def _check(piece: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in piece.items():
        if name not in own:
            raise CatchUpError(f"{where}: {name} is nothing that this rank has")
        theirs, ours = (tuple(tensor.shape), tensor.dtype), (tuple(own[name].shape), own[name].dtype)
        if theirs != ours:
            raise CatchUpError(f"{where}: {name} is {theirs[0]} {theirs[1]}, this rank has {ours[0]} {ours[1]}")


def _read(stream: _Readable, size: int, what: str, deadline: float) -> bytes:
    """Exactly `size` bytes, before the deadline."""
    parts: list[bytes] = []
    left = size
    while left:
        part = stream.read1(min(left, 2**22))
        if not part:
            raise CatchUpError(f"{what} ends after {size - left} of {size} bytes")
        if time.monotonic() > deadline:
            raise CatchUpError(f"{what} did not arrive in time")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


@torch.no_grad()
def take_over(own: Mapping[str, Tensor], state: RankState) -> None:
    """Write the tensors of a fetched state into this rank's."""
    for name, tensor in own.items():
        tensor.copy_(state.tensors[name])
