"""A local page that draws images and shows stages and estimates along the steps: three routes of the standard library.

GET / is the page, GET /about what the model is, POST /sample a stream of JSON lines. Nothing else answers; no request
names a file. One request draws at a time and a few wait; when a client disconnects, its drawing ends before the next
network evaluation.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hmac
import json
import select
import socket
import socketserver
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, final
from urllib.parse import parse_qs, urlsplit

import torch
from torch import Tensor

from multistage_diffusion.config import check, from_dict, to_dict
from multistage_diffusion.data.collection import Reading, collect
from multistage_diffusion.data.examples import Codec
from multistage_diffusion.data.layout import Entry
from multistage_diffusion.data.pictures import STAGE_COLOURS, grid, png
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError, UserError
from multistage_diffusion.records import check_seed
from multistage_diffusion.sampling import SOLVERS, Sampler, SamplerOptions, SolverStep, Start, consecutive_seeds
from multistage_diffusion.text import short

MAX_IMAGES, MAX_STEPS, MAX_BODY, MAX_WAITING = 64, 200, 1 << 20, 8
LOCAL = ("127.0.0.1", "localhost", "::1")
_TIMEOUT = 10.0  # seconds that a connection may send nothing
_GRACE = 0.5  # seconds that closing waits for network evaluations
_LONGEST_LINE = 65_536  # of a request
_STEP_IMAGES = 16  # images of an estimate
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Connection": "close",
}


@dataclass(frozen=True, kw_only=True)
class Request(SamplerOptions):
    """What a request for images says; options left out are those of the server's sampler.

    Raises:
        ConfigError: Something is out of range; the rest is checked by `Sampler`.
    """

    num: int = 16
    seed: int = 0
    label: int | str | None = None
    image: str | None = None  # a picture file in base64, to begin from
    from_sigma: float | None = None  # the noise level that it is noised to

    def __post_init__(self) -> None:
        both = (self.image is None) == (self.from_sigma is None)
        check(both, "image and from_sigma", "given together", "one of them")
        check(1 <= self.num <= MAX_IMAGES, "num", f"in 1..{MAX_IMAGES}", self.num)
        check(self.steps is None or 1 <= self.steps <= MAX_STEPS, "steps", f"in 1..{MAX_STEPS}", self.steps)
        check_seed(self.seed, self.num)
        check(abs(self.guidance or 0) <= 100, "guidance", "between -100 and 100", self.guidance)

    def start(self, shape: tuple[int, int, int], codec: Codec | None) -> Start | None:
        """The image to begin from, if there is one, as the model sees it.

        Args:
            shape: (C, H, W) of what the model draws.
            codec: Makes it of pictures, if pictures are not what it draws.

        Raises:
            DataError: The picture cannot be read.
            ConfigError: It is not base64, or of another size.
        """
        if self.image is None:
            return None
        try:
            content = base64.b64decode(self.image, validate=True)
        except ValueError:
            raise ConfigError("image must be a picture file in base64") from None
        check(codec is None or codec.pictures, "image", "left out: the model draws fields", "a picture")
        examples = collect("image", [Entry("image", lambda: content)], Reading(labels="none")).images
        x = examples.floats() if codec is None else codec.encode(examples).floats()
        x = x.expand(-1, shape[0], -1, -1) if x.shape[1] == 1 else x  # grey is a colour
        x = x.mean(1, keepdim=True) if codec is None and shape[0] == 1 else x
        return Start(images=x, sigma=self.from_sigma)


class _DisconnectedError(Exception):
    """The client disconnected, or the server is being closed."""


@final
class Server(ThreadingHTTPServer):
    """Serves one model.

    Args:
        denoiser: The model.
        codec: Makes pictures of what the model makes.
        sampler: How images are drawn by default; the page proposes it.
        name: What the page calls the model.
        address: Host and port; port 0 takes a free one.
        token: What requests must carry as `?token=`; needed where others can reach the port.

    Raises:
        ConfigError: The port is taken, or the host is not one of this machine's.
    """

    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(
        self, denoiser: Denoiser, *, codec: Codec | None = None, sampler: Sampler, name: str,
        address: tuple[str, int] = ("127.0.0.1", 0), token: str | None = None,
    ) -> None:  # fmt: skip
        self.denoiser, self.codec, self.sampler, self.token = denoiser, codec, sampler, token
        self.page = files("multistage_diffusion").joinpath("serving.html").read_bytes()
        record = denoiser.trained_classes
        self.about = json.dumps({
            "name": name, "classes": denoiser.classes, "names": record.names if record else (),
            "edges": denoiser.stages.edges, "colours": STAGE_COLOURS,
            "sigmas": [denoiser.process.sigma_min, denoiser.process.sigma_max],
            "size": _size(denoiser, codec),
            "solvers": list(SOLVERS), "defaults": to_dict(sampler), "most": [MAX_IMAGES, MAX_STEPS],
        }).encode()  # fmt: skip
        self.closing, self.drawing = threading.Event(), threading.Lock()
        self.places = threading.BoundedSemaphore(1 + MAX_WAITING)
        self.served: dict[socket.socket, threading.Thread] = {}
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            super().__init__(address, _Handler)
        except (OSError, OverflowError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            mend = "; choose another --port, or 0 for a free one" if in_use else ""
            raise ConfigError(f"cannot listen on {address[0]} port {address[1]}: {error}{mend}") from error
        self.hosts = {f"[{host}]:{self.server_port}" if ":" in host else f"{host}:{self.server_port}" for host in LOCAL}

    def server_bind(self) -> None:
        """Bind the port without a look-up of this machine's name, which the base class makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print one line without the client's text, and nothing for a broken connection."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"warning: a request failed: {type(error).__name__}", file=sys.stderr)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection; `served` holds its thread meanwhile."""
        self.served[request] = threading.current_thread()
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self.served[request]

    def server_close(self) -> None:
        """Close the port and all connections, and end drawing before the next network evaluation.

        An evaluation that takes long is not waited for: its connection stays in `served`.
        """
        self.closing.set()
        super().server_close()
        threads, end = dict(self.served), time.monotonic() + _GRACE
        for connection in threads:  # a client that stopped reading would block its thread in a write
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads.values():  # a thread inside torch at the end of the process would abort it
            thread.join(timeout=max(0.0, end - time.monotonic()))


class _Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _TIMEOUT
    server_version, sys_version, protocol_version = "msd", "", "HTTP/1.1"
    started, route, query = False, "", ""

    def parse_request(self) -> bool:
        """Read the request's line and headers; answer what has none, and what is no address of this server's."""
        if not self.raw_requestline.strip():  # one empty line before the request is nobody's mistake
            self.raw_requestline = self.rfile.readline(_LONGEST_LINE + 1)
        words = self.raw_requestline.split()
        if len(words) < 3:  # the first HTTP had no headers, for which the base class would wait
            self.requestline, self.command = "", ""
            self.send_error(400, "a request begins with a method, a path and HTTP/1.1")
            return False
        if not super().parse_request():
            return False
        try:
            address = urlsplit(self.path)
        except ValueError:
            self.send_error(400, "the path is no address")
            return False
        self.route, self.query = address.path, address.query
        return True

    def handle_expect_100(self) -> bool:
        """Nothing yet: a client that waits with its body is told to go on when the request is otherwise right."""
        return True

    def do_GET(self) -> None:
        """The page, or what the model is."""
        if self._refused():
            return
        match self.route:
            case "/":
                self._send(200, "text/html; charset=utf-8", self.server.page)
            case "/about":
                self._send(200, "application/json", self.server.about)
            case _:
                self.send_error(404)

    def do_POST(self) -> None:
        """Draw images."""
        if self._refused():
            return
        length = self.headers.get("Content-Length", "")
        if self.route != "/sample":
            self.send_error(404)
        elif self.headers.get("Expect", "100-continue").lower() != "100-continue":
            self.send_error(417)
        elif self.headers.get_content_type() != "application/json":
            self.send_error(415)
        elif not (length.isascii() and length.isdigit() and len(length) < 20):
            self.send_error(411)
        elif int(length) > MAX_BODY:
            self.send_error(413)
        else:
            self._answer(int(length))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with one line of JSON; an unknown method is an error of the client (405, not 501)."""
        code = 405 if code == 501 else code
        self.request_version = self.protocol_version  # of a request that could not be read it is none
        text = short(message) if message and code in (400, 403, 429) else self.responses.get(code, ("error",))[0]
        self._send(code, "application/json", json.dumps({"error": text}).encode() + b"\n")

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the text comes from clients."""

    def _refused(self) -> bool:
        """Refuse requests from other sites' pages, by their Host or Origin, and requests without the token."""
        host, origin, token = self.headers.get("Host", ""), self.headers.get("Origin"), self.server.token
        if token is None:
            allowed = host in self.server.hosts
        else:
            request_token = parse_qs(self.query).get("token", [""])[0]
            allowed = hmac.compare_digest(request_token.encode(), token.encode())
        if allowed and origin in (None, f"http://{host}"):
            return False
        self.send_error(403, "this address is not served" if token is None else "the token is missing or wrong")
        return True

    def _answer(self, length: int) -> None:
        """Read a request, wait for its turn, draw; one line for whatever is wrong with it."""
        server = self.server
        try:
            if self.headers.get("Expect") and self.request_version >= "HTTP/1.1":
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            content = self.rfile.read(length)  # before a place is taken, as a client may be slow
        except OSError:
            return None
        if not server.places.acquire(blocking=False):
            return self.send_error(429, f"{MAX_WAITING} requests are waiting; try again later")
        try:
            request = from_dict(Request, json.loads(content), "request")
            while not server.drawing.acquire(timeout=0.2):
                self._stop()
            try:
                self._draw(request)
            finally:
                server.drawing.release()
        except (ValueError, RecursionError, UserError) as error:
            text = " ".join(str(error).split())[:300] if isinstance(error, UserError) else "the body must be JSON"
            if self.started:
                self._line({"error": text})
            else:
                self.send_error(400, text)
        except (_DisconnectedError, OSError):
            pass
        finally:
            server.places.release()

    def _draw(self, request: Request) -> None:
        """Draw images, and send a line for every step."""
        denoiser, sampler = self.server.denoiser, request.apply(self.server.sampler)
        start = request.start(denoiser.shape, self.server.codec)
        calls = sampler.plan(denoiser.process, denoiser.stages)
        if start is not None:
            start.check(sampler, denoiser.process, denoiser.shape, request.num)
            calls = tuple(denoiser.stages.of(sigma) for sigma in start.evaluations(sampler, denoiser.process))

        def send_step(step: SolverStep) -> None:
            stage, picture = denoiser.stages.of(step.sigma), self._picture(step.denoised[:_STEP_IMAGES])
            self._line({"step": step.index, "sigma": step.sigma, "stage": stage, "image": picture})

        self._line({"calls": calls})
        samples = sampler.draw(
            denoiser,
            consecutive_seeds(request.seed, request.num),
            labels=request.label,
            start=start,
            batch_size=request.num,
            callback=send_step,
            stop=self._stop,
        )
        self._line({
            "image": self._picture(samples.images), "nfe": samples.nfe, "stage_calls": samples.stage_calls,
            "seconds": round(samples.seconds, 2),
        })  # fmt: skip

    def _stop(self) -> bool:
        """Called before every network evaluation; raises where the client disconnected, which ends the drawing."""
        readable = select.select([self.connection], [], [], 0)[0]
        if self.server.closing.is_set() or (readable and not self.connection.recv(1, socket.MSG_PEEK)):
            raise _DisconnectedError
        return False

    def _picture(self, images: Tensor) -> str:
        codec = self.server.codec
        images = images.detach().float().cpu()
        images = images if codec is None else codec.preview(images)
        return base64.b64encode(png(grid(images, scale=max(1, 64 // images.shape[2])))).decode()

    def _line(self, document: dict[str, Any]) -> None:
        """Send one line of the stream; before the first one, the headers."""
        if not self.started:
            self.started = True
            self._head(200, "application/x-ndjson")
        self.wfile.write(json.dumps(document).encode() + b"\n")

    def _send(self, code: int, kind: str, content: bytes) -> None:
        self._head(code, kind)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, code: int, kind: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()


def _size(denoiser: Denoiser, codec: Codec | None) -> list[int] | None:
    """Height and width of the pictures that drawing can begin from; none for a model of fields."""
    if codec is None:
        return list(denoiser.shape[1:])
    return list(codec.preview(torch.zeros(1, *denoiser.shape)).shape[2:]) if codec.pictures else None
