"""The local page: it draws what `msd sample` draws, and stands what strangers, other sites and lost clients do."""

import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny
from multistage_diffusion.classes import TrainedClasses
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import Sampler
from multistage_diffusion.data.pictures import grid
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.sampling import Start, sample
from multistage_diffusion.serving import MAX_BODY, MAX_WAITING, Server

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from browser import CHROMIUM, Browser


@contextlib.contextmanager
def serving(denoiser=None, **options):
    server = Server(denoiser or tiny.denoiser(process="edm"), sampler=Sampler(), name="tiny", **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def slow(monkeypatch):
    """A server whose network takes 0.1 s a call; and how many calls there were."""
    denoiser, calls = tiny.denoiser(process="edm"), []

    def wait(module, given):
        calls.append(time.monotonic())
        time.sleep(0.1)

    denoiser.network.register_forward_pre_hook(wait)
    with serving(denoiser) as server:
        yield server, calls


def ask(server, method="POST", path="/sample", body=None, headers=(), timeout=20):
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=timeout)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if method == "POST" else {}
    try:
        connection.request(method, path, content, {**kind, **dict(headers)})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def lines(content):
    return [json.loads(line) for line in content.splitlines()]


def one_line(content):
    message = json.loads(content)["error"]
    assert content.count(b"\n") == 1 and "Traceback" not in message
    assert str(Path.cwd()) not in message and sys.prefix not in message
    return message


def test_it_draws_what_sampling_draws_and_tells_of_every_step(server):
    status, headers, content = ask(server, body={"num": 3, "seed": 5, "steps": 4, "solver": "heun"})
    plan, *steps, end = lines(content)
    expected = sample(server.denoiser, 3, seed=5, steps=4, solver="heun")
    assert status == 200 and headers["Content-Type"] == "application/x-ndjson"
    assert plan["calls"] == [2, 2, 2, 0, 0, 0, 0] or len(plan["calls"]) == expected.nfe == end["nfe"]
    assert end["stage_calls"] == list(expected.stage_calls)
    assert [step["stage"] for step in steps] == [server.denoiser.stages.of(step["sigma"]) for step in steps]
    assert len(steps) == 4
    with Image.open(io.BytesIO(base64.b64decode(end["image"]))) as picture:
        assert picture.tobytes() == grid(expected.images, scale=8).tobytes()


def test_the_page_needs_nothing_from_elsewhere(server):
    status, headers, content = ask(server, "GET", "/")
    text = content.decode()
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", re.sub(r"[.](src|href) = source", "", text))
    assert "innerHTML" not in text and "eval(" not in text  # what the server says is text, never markup
    about = json.loads(ask(server, "GET", "/about")[2])
    assert about["edges"] == list(tiny.EDGES) and about["defaults"]["solver"] == "heun"


def test_a_class_is_guided():
    with serving(tiny.denoiser(replace(tiny.MODEL, classes=3), "edm")) as server:
        wish = {"num": 1, "steps": 3}
        plain, guided = (
            lines(ask(server, body={**wish, "label": 1, "guidance": guidance})[2])[-1]["image"] for guidance in (1, 3)
        )
        assert plain != guided
        assert "labels must be between" in one_line(ask(server, body={**wish, "label": 7})[2].splitlines()[-1] + b"\n")


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"num": 10_000}, "num must be in 1..64, got 10000"),
        ({"steps": 0}, "steps must be in 1..200"),
        ({"seed": -1}, "seed must be a whole number in [0, 2^63)"),
        ({"guidance": 1e9}, "guidance must be between"),
        ({"solver": "huen"}, 'no solver huen; did you mean "heun"'),
        ({"spacing": "log-sn"}, 'no spacing log-sn; did you mean "log-snr"'),
        ({"numb": 1}, 'unknown key numb; did you mean "num"'),
        ({"num": "1"}, "num"),
        ([], "must hold named values"),
        ({"run": "elsewhere"}, "unknown key run"),  # no request chooses a model
    ],
)
def test_a_wrong_wish_is_one_line(server, wish, message):
    status, _, content = ask(server, body=wish)
    assert status == 400 and message in one_line(content)


def picture_of(images):
    """The first image as a PNG in base64."""
    buffer = io.BytesIO()
    grid(images[:1], gap=0).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_it_begins_from_an_image_as_sampling_does(server):
    """The lower the noise level, the fewer steps lie in the upper stages, and the more of the image stays."""
    given = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand(1, *server.denoiser.shape)
    given = (given * 127.5 + 127.5).round() / 127.5 - 1  # what a file of bytes holds
    wish = {"num": 2, "seed": 3, "steps": 3, "image": picture_of(given), "from_sigma": 0.4}
    status, _, content = ask(server, body=wish)
    plan, *_, end = lines(content)
    start = Start(images=given, sigma=0.4)
    expected = sample(server.denoiser, 2, seed=3, steps=3, start=start)
    assert status == 200 and set(plan["calls"]) == {0} and len(plan["calls"]) == end["nfe"]
    with Image.open(io.BytesIO(base64.b64decode(end["image"]))) as picture:
        assert picture.tobytes() == grid(expected.images, scale=8).tobytes()


def test_an_image_that_does_not_fit_is_one_line(server):
    wish = {"num": 1, "steps": 2, "from_sigma": 0.4}
    small = picture_of(torch.zeros(1, 1, 4, 4))
    for changes, message in [
        ({}, "image and from_sigma must be given together"),
        ({"image": "no base64!"}, "base64"),
        ({"image": base64.b64encode(b"no picture").decode()}, "not a picture"),
        ({"image": small}, "the images to start from must be of shape"),
        ({"image": picture_of(torch.zeros(1, 1, 8, 8)), "from_sigma": 1e9}, "from-sigma must be above"),
    ]:
        status, _, content = ask(server, body={**wish, **changes})
        assert status == 400 and message in one_line(content)


def test_labels_of_an_unconditional_model_are_one_line(server):
    content = ask(server, body={"label": 1})[2]
    assert "unconditional" in lines(content)[-1]["error"]


# W1: only this machine, unless a token is asked for


def test_only_this_machine_is_served_by_default(server):
    assert server.server_address[0] == "127.0.0.1"


def test_others_need_the_token():
    with serving(address=("0.0.0.0", 0), token="secret") as server:
        for path in ("/", "/about", "/?token=", "/?token=secreT", "/?token=%FF", "/sample"):
            status, _, content = ask(server, "GET", path)
            assert status == 403 and "token" in one_line(content)
        assert ask(server, "GET", "/?token=secret")[0] == 200
        assert ask(server, body={"num": 1, "steps": 1})[0] == 403
        assert ask(server, path="/sample?token=secret", body={"num": 1, "steps": 1})[0] == 200


# W2: three routes


def test_no_path_reaches_a_file(server, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("CANARY")
    ups = ["..", "%2e%2e", "%252e%252e", "..%2f", "..\\", "%00", "//", "/./", ";", "file:"]
    rng = random.Random(0)
    paths = [f"/{rng.choice(ups)}" + "/".join(rng.choices(ups, k=rng.randrange(6))) + str(canary) for _ in range(290)]
    paths += ["/etc/passwd", "//etc/passwd", f"/static{canary}", f"/file={canary}", "/serving.html", "/index.html",
              "/about/", "/sample", "/%2f", "/page?file=x"]  # fmt: skip
    assert len(paths) == 300
    for path in paths:
        status, _, content = ask(server, "GET", path)
        assert 400 <= status < 500 and b"CANARY" not in content and b"root:" not in content, path


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "XYZZY"])
def test_no_other_method_is_known(server, method):
    assert ask(server, method, "/sample")[0] == 405


# W3: other sites


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),  # its name was made to point here
        ({"Host": "127.0.0.1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),  # what a form can send without asking
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "http://127.0.0.1:PORT"}, 200),
        ({"Host": "localhost:PORT", "Origin": "http://localhost:PORT"}, 200),
    ],
)
def test_other_sites_are_refused(server, headers, status):
    headers = {name: value.replace("PORT", str(server.server_port)) for name, value in headers.items()}
    got, answered, _ = ask(server, body={"num": 1, "steps": 1}, headers=headers)
    assert got == status and "Access-Control-Allow-Origin" not in answered


# W4: limits


def raw(server, text):
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
    connection.sendall(text.replace("PORT", str(server.server_port)).encode())
    return connection


POST = "POST /sample HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("length", "status"), [(MAX_BODY + 1, 413), ("9" * 19, 413), ("9" * 5000, 411), ("-1", 411), ("x", 411), ("", 411)]
)
def test_a_large_body_is_refused_unread(server, length, status):
    with raw(server, f"{POST}Content-Length: {length}\r\n\r\n") as connection:
        assert connection.recv(100).startswith(f"HTTP/1.1 {status} ".encode())


def test_idle_and_slow_clients_keep_nobody_waiting(server):
    from multistage_diffusion.files import read_json  # noqa: F401  (loaded before memory is read)

    def memory():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    ask(server, body={"num": 1, "steps": 1})
    before = memory()
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(raw(server, ""))
        for _ in range(20):
            stack.enter_context(raw(server, f"{POST}Content-Length: 100\r\n\r\n{{"))
        start = time.monotonic()
        assert ask(server, "GET", "/about")[0] == 200 and time.monotonic() - start < 2
        assert ask(server, body={"num": 1, "steps": 1})[0] == 200  # who has not asked yet has no place
    assert memory() - before < 100e6


def test_one_draws_eight_wait_and_the_next_is_sent_away(slow):
    server, _ = slow
    statuses = []

    def one():
        statuses.append(ask(server, body={"num": 1, "steps": 2, "solver": "euler"}, timeout=60)[0])

    threads = [threading.Thread(target=one) for _ in range(MAX_WAITING + 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(statuses)) == [200, 429] and statuses.count(200) >= MAX_WAITING + 1


def test_what_nobody_listens_to_is_stopped(slow):
    server, calls = slow
    body = json.dumps({"num": 1, "steps": 100, "solver": "euler"})
    with raw(server, f"{POST}Content-Length: {len(body)}\r\n\r\n{body}") as connection:
        connection.recv(10)
        while not calls:
            time.sleep(0.01)
    gone = time.monotonic()
    status, _, _ = ask(server, body={"num": 1, "steps": 1, "solver": "euler"})  # the next one's turn comes at once
    assert status == 200 and time.monotonic() - gone < 5
    assert sum(call > gone + 0.5 for call in calls) <= 1 and len(calls) < 10


# W5: whatever is sent


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    body=st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
            max_leaves=6,
        ).filter(lambda wish: wish != {}),
        st.fixed_dictionaries(
            {"num": st.integers(-1, 2), "steps": st.integers(-1, 2)},
            optional={
                name: st.one_of(st.none(), st.integers(-5, 3), st.floats(), st.text(max_size=5), st.just([1, 2]))
                for name in ("seed", "solver", "spacing", "label", "guidance", "guidance_interval")
            },
        ),
    )
)
def test_any_body_is_answered_with_one_line_or_a_stream(server, body):
    status, _, content = ask(server, body=body)
    assert status in (200, 400)
    if status == 400:
        one_line(content)
    else:
        assert all(isinstance(line, dict) for line in lines(content))


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"num": ' + b"9" * 5000 + b"}", b'{"num": NaN}', b'"\\ud800"', b'{"\\ud800": 1}', b"\xff", b""],
)
def test_hostile_json_is_one_line(server, capfd, body):
    status, _, content = ask(server, body=body)
    assert status == 400 and one_line(content)
    assert capfd.readouterr().err == ""


def test_an_image_that_is_not_finite_is_said_in_the_stream():
    denoiser = tiny.denoiser(process="edm")
    with torch.no_grad():
        next(denoiser.network.decoders[2].parameters()).fill_(float("nan"))
    with serving(denoiser) as server:
        status, _, content = ask(server, body={"num": 1, "steps": 2})
        assert status == 200 and lines(content)[-1].keys() == {"error"}


# W6: nothing leaves this machine; see also the tests of the page, of wishes and of paths


def can_trace():
    trace = ["strace", "-qq", "-e", "trace=connect", "-o", os.devnull, "true"]
    return shutil.which("strace") is not None and subprocess.run(trace, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_trace(), reason="needs strace")
def test_the_server_connects_to_nobody(tmp_path):
    tiny.denoiser(process="edm").save_pretrained(tmp_path / "model")
    words = ["serve", str(tmp_path / "model"), "--port", "0", "--json", "--threads", "1"]
    log = tmp_path / "calls"
    process = subprocess.Popen(
        ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,accept4", "-o", str(log),
         sys.executable, "-m", "multistage_diffusion", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        started = SimpleNamespace(server_port=json.loads(line)["port"])
        assert ask(started, "GET", "/", timeout=60)[0] == ask(started, "GET", "/about", timeout=60)[0] == 200
        status, _, content = ask(started, body={"num": 2, "steps": 3}, timeout=60)
        assert status == 200 and "image" in lines(content)[-1]
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    calls = log.read_text().splitlines()
    assert sum("accept4(" in call and "127.0.0.1" in call for call in calls) >= 3  # it was watched
    connects = [call for call in calls if "connect(" in call and "sa_family=AF_UNIX" not in call]
    assert [call for call in connects if not re.search(r'inet_addr\("127\.|"::1"', call)] == []
    assert [call for call in calls if re.search(r"send(to|msg)\(.*sin6?_port", call)] == []  # to an address of its own


# W7: the end


def test_a_busy_port_is_one_line(server):
    with pytest.raises(ConfigError, match=rf"127.0.0.1 port {server.server_port}.*choose another --port"):
        serving(address=("127.0.0.1", server.server_port)).__enter__()
    with pytest.raises(ConfigError, match="cannot listen on 192"):
        serving(address=("192.0.2.1", 0)).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_closes_the_port_in_time(tmp_path, number, code):
    tiny.denoiser(process="edm").save_pretrained(tmp_path / "model")
    words = ["serve", str(tmp_path / "model"), "--port", "0", "--json", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "multistage_diffusion", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        port = json.loads(process.stdout.readline())["port"]
        body = json.dumps({"num": 64, "steps": 200})
        text = POST.replace("PORT", str(port)) + f"Content-Length: {len(body)}\r\n\r\n{body}"
        with socket.create_connection(("127.0.0.1", port)) as connection:  # which reads no more
            connection.sendall(text.encode())
            connection.recv(10)
            process.send_signal(number)
            start = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while True:
                    socket.create_connection(("127.0.0.1", port)).close()
                    time.sleep(0.05)
            assert time.monotonic() - start < 5
            err = process.communicate(timeout=60)[1]
        assert process.returncode == code
        assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


def test_an_evaluation_that_takes_long_is_not_waited_for(tmp_path):
    """The server's own part, without a process: a second, whatever still runs; then the command ends Python at once."""
    denoiser, begun, going_on = tiny.denoiser(process="edm"), threading.Event(), threading.Event()
    denoiser.network.register_forward_pre_hook(lambda module, given: (begun.set(), going_on.wait(30))[2:] or None)
    with serving(denoiser) as server:
        body = json.dumps({"num": 1, "steps": 2})
        with raw(server, f"{POST}Content-Length: {len(body)}\r\n\r\n{body}"):
            assert begun.wait(20)
            server.shutdown()
            start = time.monotonic()
            server.server_close()
            assert time.monotonic() - start < 2 and len(server.served) == 1
            going_on.set()


@pytest.mark.slow
def test_a_signal_while_the_page_draws_ends_the_command_in_time(tmp_path):
    tiny.denoiser(process="edm").save_pretrained(tmp_path / "model")
    code = (
        "import sys, time\nfrom multistage_diffusion.multidecoder import MultiDecoder\n"
        "MultiDecoder.forward = lambda *_: time.sleep(60)\nfrom multistage_diffusion.cli import main\n"
        "main(sys.argv[1:])"
    )
    words = ["serve", str(tmp_path / "model"), "--port", "0", "--json"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    try:
        port = json.loads(process.stdout.readline())["port"]
        body = json.dumps({"num": 1, "steps": 2})
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"{POST.replace('PORT', str(port))}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            connection.recv(10)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 143 and time.monotonic() - start < 2
        assert process.stderr.read().endswith("error: stopped by SIGTERM\n")
    finally:
        process.kill()
        process.communicate()


# W7: unusual requests


REQUESTS = {
    "GET /about HTTP/1.1\r\nHost: HOST\r\n\r\n": 200,
    "\r\nGET /about HTTP/1.1\r\nHost: HOST\r\n\r\n": 200,  # an empty line before it
    "GET /about HTTP/1.0\r\nHost: HOST\r\n\r\n": 200,
    "GET /about HTTP/1.1\nHost: HOST\n\n": 200,
    "GET http://HOST/about HTTP/1.1\r\nHost: HOST\r\n\r\n": 200,
    "GET /about\r\n": 400,  # the first HTTP
    "GET\r\n\r\n": 400,
    "\r\n\r\n": 400,
    "GET / about HTTP/1.1\r\n\r\n": 400,
    "GET / HTTQ/1.1\r\n\r\n": 400,
    "GET / HTTP/-1.1\r\n\r\n": 400,
    "GET http://[::1/about HTTP/1.1\r\nHost: HOST\r\n\r\n": 400,
    "\x16\x03\x01\x00\xf1\x01\n": 400,  # a client of HTTPS
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": 505,
    "OPTIONS * HTTP/1.1\r\nHost: HOST\r\n\r\n": 405,
    "HEAD / HTTP/1.1\r\nHost: HOST\r\n\r\n": 405,
    "send_error / HTTP/1.1\r\nHost: HOST\r\n\r\n": 405,
    f"GET /{'a' * 70_000} HTTP/1.1\r\n\r\n": 414,
    f"GET / HTTP/1.1\r\n{'a: b' * 200}\r\n" + "a: b\r\n" * 200 + "\r\n": 431,
    "POSTTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n": 411,
    "POSTExpect: 200-ok\r\nContent-Length: 2\r\n\r\n{}": 417,
}


@pytest.mark.parametrize("request_text", REQUESTS, ids=range(len(REQUESTS)))
def test_unusual_requests_get_an_answer(server, request_text, capfd):
    text = request_text.replace("POST", POST) if request_text.startswith("POST") else request_text
    text = text.replace("HOST", f"127.0.0.1:{server.server_port}").replace("PORT", str(server.server_port))
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
        connection.sendall(text.encode("latin-1"))
        answer = http.client.HTTPResponse(connection, method=text.split()[0] if text.split() else None)
        answer.begin()
        content = answer.read()
    assert answer.status == REQUESTS[request_text]
    if answer.status != 200 and not text.startswith("HEAD"):
        assert len(one_line(content)) < 400
    assert capfd.readouterr() == ("", "")


def test_a_client_that_waits_to_be_told_is_told(server):
    body = json.dumps({"num": 1, "steps": 1, "solver": "euler"}).encode()
    head = f"{POST.replace('PORT', str(server.server_port))}Expect: 100-continue\r\nContent-Length: "
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
        connection.sendall(f"{head}{len(body)}\r\n\r\n".encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(12) == b"HTTP/1.1 200"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:  # and one in vain is not
        connection.sendall(f"{head}{MAX_BODY + 1}\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--port", "70000"], "port must be in 0..65535"), (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1")],
)
def test_the_commands_mistakes_are_one_line(tmp_path, capsys, words, message):
    tiny.denoiser(process="edm").save_pretrained(tmp_path / "model")
    assert dispatch(["serve", str(tmp_path / "model"), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


# The page in a browser


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_in_a_browser(tmp_path):
    """It draws by itself, tells of progress, draws a class by its name, from an image, cancels, and saves."""
    denoiser = tiny.denoiser(replace(tiny.MODEL, classes=3), "edm")
    denoiser.trained_classes = TrainedClasses(("cat", "dog", "<b>fox</b>"), (5, 5, 5))
    with serving(denoiser) as server, Browser(1000, 800) as browser:
        browser.call("Log.enable")
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.until("!document.getElementById('save').hidden")  # a picture without a click
        assert browser.run("document.getElementById('now').naturalWidth") > 100
        assert "calls of the network" in browser.run("document.getElementById('status').textContent")
        assert browser.run("document.getElementById('save').download") == "tiny-seed0.png"
        controls = "[...document.querySelectorAll('form > .controls > *')]"
        rows = browser.run(f"new Set({controls}.map(item => Math.round(item.getBoundingClientRect().bottom))).size")
        assert rows == 1
        names = browser.run("[...document.querySelector('[name=label]').options].map(option => option.textContent)")
        assert names == ["any", "cat", "dog", "<b>fox</b>"] and browser.run("document.querySelector('b')") is None

        def drawn(script):
            browser.run(f"{script}; document.getElementById('draw').click()")
            browser.until("!document.getElementById('save').hidden")
            return browser.run("document.getElementById('now').src.split(',')[1]")

        plain = drawn("form.num.value = 2; form.steps.value = 3; form.seed.value = 7")
        assert browser.run("document.getElementById('film').children.length") == 3
        dog = drawn("form.label.value = 1; form.guidance.value = 2")
        body = {"num": 2, "steps": 3, "seed": 7, "label": 1, "guidance": 2.0}
        assert dog == lines(ask(server, body=body)[2])[-1]["image"] != plain
        Image.new("L", (40, 20), 200).save(tmp_path / "given.png")
        browser.choose("#file", tmp_path / "given.png")
        browser.until("given !== null")
        started = drawn("document.getElementById('sigma').value = 0")
        assert started not in (dog, plain) and browser.run("document.getElementById('error').textContent") == ""
        browser.run("form.steps.value = 200; form.num.value = 64; document.getElementById('draw').click()")
        browser.until("document.getElementById('film').children.length > 1")
        browser.run("document.getElementById('stop').click()")
        browser.until("document.getElementById('status').textContent === 'cancelled'")
        browser.run("form.num.value = 65")
        browser.run("draw()")
        assert "in 1..64" in browser.run("document.getElementById('error').textContent")
        bad = [text for text in browser.mistakes() if "400" not in text and "favicon" not in text]
        assert bad == []
    with serving(tiny.denoiser(process="edm")) as server, Browser(390, 800, dark=True) as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.until("!document.getElementById('save').hidden")
        assert browser.run("document.documentElement.scrollWidth <= 390")  # nothing sticks out on a phone
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 25)"
