"""Tests the server over HTTP, started by the command line, and its page in a browser."""

import asyncio
import csv
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest
import requests
import uvicorn
from PIL import Image
from starlette.responses import PlainTextResponse

from tests.conftest import wait_for
from xray_fastai import DISCLAIMER
from xray_fastai.data.images import open_image
from xray_fastai.inference.model import open_model
from xray_fastai.inference.predict import predict
from xray_fastai.serving import connections, decoding, uploads
from xray_fastai.serving.app import MAX_OF_CLIENT, MAX_REQUESTS, Predictor, create_app
from xray_fastai.serving.connections import client_of
from xray_fastai.serving.decoding import Decoder
from xray_fastai.serving.predictions import predict_file
from xray_fastai.system.errors import ImageError

BROKEN = b"\xff\xd8\xff\xe0 not a JPEG"
UPLOAD = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"


def address_of(process):
    """Return the address of a started server as soon as it listens, and its output up to then."""
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("page"):
            address = line.split()[1]
        if "Ctrl-C" in line:
            return address, output
    pytest.fail(output + process.stderr.read())


def stop(process, number):
    """Stop a server by a signal, and check that it ends without an error."""
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "") and output.endswith("Stopped.\n"), output + errors


def no_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # any write to a file fails


@pytest.fixture(scope="module")
def server(export, start):
    """The address of a server on a free port; the server cannot write to a disk."""
    process = start("serve", "--model", export, "--port", 0, "--device", "cpu", preexec_fn=no_disk)
    yield address_of(process)[0]
    stop(process, signal.SIGINT)


@pytest.fixture(scope="session")
def photos(export):
    return sorted((export.parent / "moved" / "train").glob("*/*"))


@pytest.fixture
def decoder():
    decoder = Decoder()
    yield decoder
    decoder.close()


def send(server, *files, heatmap=False, **kwargs):
    parts = [("file", (file.name, file.read_bytes()) if hasattr(file, "name") else file) for file in files]
    return requests.post(f"{server}/predict?heatmap={str(heatmap).lower()}", files=parts, timeout=60, **kwargs)


def noise(width, height, kind="PNG"):
    stream, ramp = io.BytesIO(), np.linspace(0, 155, width).astype(np.uint8)  # noise alone has no contrast: it is blank
    Image.fromarray(ramp + np.random.default_rng(0).integers(0, 100, (height, width), np.uint8)).save(stream, kind)
    return stream.getvalue()


# the API


def test_the_same_answer_as_predict(server, export, photos):
    some = photos[::5]
    answer = send(server, *some)
    assert answer.status_code == 200
    found, table = answer.json(), predict(some, export, device="cpu", precision="fp32")
    assert [one["file"] for one in found["predictions"]] == [path.name for path in some]
    for one, row in zip(found["predictions"], table.to_dict("records"), strict=True):
        assert one["prediction"] == row["prediction"] and one["threshold"] == row["threshold"]
        assert one["probabilities"] == pytest.approx({n: row[f"p_{n}"] for n in ("NORMAL", "PNEUMONIA")}, abs=5e-6)
        assert one["error"] is None and one["image"] is None and one["heatmap"] is None and one["note"] is None
        values = {"path": one["file"], **{f"p_{name}": p for name, p in one["probabilities"].items()}}
        assert one["row"] == {name: values.get(name, one.get(name)) for name in table.columns}
    assert found["model"]["name"] == "small" and found["disclaimer"] == DISCLAIMER


def test_a_bad_file_has_its_error_and_the_others_their_prediction(server, photos):
    bad = [("broken.jpeg", BROKEN), ("empty.dcm", b""), ("notes.txt", b"hello"), ("two words ü.png", BROKEN)]
    answer = send(server, photos[0], *bad)
    found = answer.json()["predictions"]
    assert answer.status_code == 200 and found[0]["prediction"] and found[0]["error"] is None
    for (name, _), one in zip(bad, found[1:], strict=True):
        assert one["file"] == name and one["error"].startswith(f"{name}: ") and one["prediction"] is None
    assert "empty (0 bytes)" in found[2]["error"] and "not an image" in found[3]["error"]


def test_the_class_to_detect_from_the_threshold_on(export, photos, decoder):
    """An image whose probability is exactly the threshold is positive."""
    model, content = open_model(export, "cpu"), photos[0].read_bytes()

    def at(threshold):
        same = dataclasses.replace(model, settings={**model.settings, "threshold": float(threshold)})
        return predict_file(same, decoder, "a.jpeg", content, heatmap=False)

    p = at(at(0.5).probabilities["PNEUMONIA"]).probabilities["PNEUMONIA"]  # a small threshold has more decimal places
    assert [at(threshold).prediction for threshold in (p, np.nextafter(p, 1))] == ["PNEUMONIA", "NORMAL"]


def test_the_largest_file_that_is_read(server):
    (found,) = send(server, ("a.bmp", bytes(uploads.MAX_FILE))).json()["predictions"]
    assert "not an image" in found["error"]
    (found,) = send(server, ("a.bmp", bytes(uploads.MAX_FILE + 1))).json()["predictions"]
    assert "the maximum is 50 MB" in found["error"] and found["row"]["error"] == found["error"]


def test_too_many_pixels_and_too_large_a_file(server):
    wide = io.BytesIO()
    Image.new("1", (30_000, 2_000)).save(wide, "PNG")
    found = send(server, ("wide.png", wide.getvalue()), ("large.bmp", bytes(51_000_000))).json()["predictions"]
    assert "30000 x 2000 pixels" in found[0]["error"]
    assert "51 MB; the maximum is 50 MB" in found[1]["error"]


def test_large_files_stay_in_memory(server):
    assert len(noise(2500, 2000, "BMP")) > 2_000_000  # Starlette's own parser writes files above 1 MB to the disk
    (one,) = send(server, ("large.bmp", noise(2500, 2000, "BMP"))).json()["predictions"]
    assert one["error"] is None and one["prediction"]


def test_the_decoder_gives_what_predict_reads(decoder, photos):
    for content in (photos[0].read_bytes(), noise(900, 700), noise(700, 900, "TIFF")):
        pixels, picture = decoder.decode(content, 64, 640)
        assert (pixels == np.asarray(open_image(content, 64))).all()
        expected = open_image(content)
        expected.thumbnail((640, 640))
        assert picture.tobytes() == expected.tobytes() and decoder.decode(content, 64)[1] is None


def test_a_file_that_takes_too_long_to_decode(decoder, photos, monkeypatch):
    stream = io.BytesIO()
    Image.new("L", (6300, 6300), 90).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    slow = content[:-2] + 50 * content[content.rindex(b"\xff\xda") : -2] + content[-2:]
    decoder.decode(photos[0].read_bytes(), 32)
    monkeypatch.setattr(decoding, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"more than 0\.5 s to decode"):
        decoder.decode(slow, 32)
    assert time.monotonic() - start < 2
    monkeypatch.undo()
    assert decoder.decode(photos[0].read_bytes(), 32)[0].shape == (32, 32)
    decoder.process.kill()  # as the system does where memory runs out
    decoder.process.wait()
    assert decoder.decode(photos[0].read_bytes(), 32)[0].shape == (32, 32)


def test_only_the_formats_that_the_page_asks_for(server):
    text = b"P2 100 100 255 " + b"7 " * 10_000
    answers = send(server, ("a.pgm", text), *(("a", noise(64, 64, kind)) for kind in ("GIF", "JPEG2000", "PNG", "BMP")))
    errors = [one["error"] for one in answers.json()["predictions"]]
    assert errors[0] == "a.pgm: PPM; send a JPEG, PNG, TIFF, BMP, WebP or DICOM file"
    assert all("; send a JPEG" in error for error in errors[1:3]) and errors[3:] == [None, None]


def test_refused_requests(server, photos):
    assert b" 413 " in raw(server, f"{UPLOAD}Content-Length: {uploads.MAX_REQUEST + 1}\r\n\r\n")
    assert b" 400 " in raw(server, f"{UPLOAD}Content-Length: {uploads.MAX_REQUEST}\r\n\r\nnonsense")
    endless = f"{UPLOAD}Transfer-Encoding: chunked\r\n\r\n".encode()
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    assert b" 413 " in raw(server, endless, b"%x\r\n%b\r\n" % (len(part), part), *[chunk] * 96)

    many = send(server, *[("a.png", b"x")] * (uploads.MAX_FILES + 1))
    assert many.status_code == 400 and str(uploads.MAX_FILES) in many.json()["error"]
    text = requests.post(f"{server}/predict", data=photos[0].read_bytes(), headers={"Content-Type": "image/jpeg"})
    assert text.status_code == 415 and "multipart/form-data" in text.json()["error"]
    no_boundary = {"Content-Type": "multipart/form-data"}
    for answer in (
        requests.post(f"{server}/predict", files={"file": (None, "no file")}),
        requests.post(f"{server}/predict", data=b"nonsense", headers=no_boundary),
        requests.post(
            f"{server}/predict", data=b"nonsense", headers={"Content-Type": "multipart/form-data; boundary=x"}
        ),
    ):
        assert answer.status_code == 400 and answer.json()["error"]
    assert requests.get(f"{server}/predict").status_code == 405
    assert requests.get(f"{server}/../etc/passwd").status_code == 404
    assert send(server, photos[0]).status_code == 200


def test_a_form_that_is_cut_short(server):
    part = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
    for cut in ("", part[:20], part, f"{part}\r\n--x"):
        answer = requests.post(f"{server}/predict", cut, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert answer.status_code == 400 and answer.json()["error"].startswith("the form is cut short"), answer.text


def test_heatmap_is_true_or_false(server, photos):
    for value in ("maybe", "1", "True", "", "x" * 200):
        answer = requests.post(f"{server}/predict?heatmap={value}", files={"file": BROKEN})
        assert (answer.status_code, answer.json()) == (400, {"error": f"heatmap={value[:80]}: give true or false"})
    pictures = [send(server, photos[0], heatmap=wanted).json()["predictions"][0]["image"] for wanted in (True, False)]
    assert pictures[0].startswith("data:image/jpeg;base64,") and pictures[1] is None
    (default,) = requests.post(f"{server}/predict", files={"file": photos[0].read_bytes()}).json()["predictions"]
    assert default["image"] == pictures[0]


def raw(server, *parts):
    """Return the server's answer to these bytes, which need not be a whole request."""
    with connect(server) as connection:
        for part in parts:
            connection.sendall(part.encode() if isinstance(part, str) else part)
        return connection.recv(1000)


def connect(server):
    host, port = server.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.example", "[::", ""])
def test_a_foreign_host_name_is_refused(server, host):
    answer = raw(server, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")
    assert b" 421 " in answer.splitlines()[0]


def test_other_sites_may_not_send(server, photos):
    port = server.rpartition(":")[2]
    foreign = ["http://evil.example", "null", f"http://127.0.0.1:{int(port) - 1}", f"http://evil.example:{port}"]
    for headers in [*({"Origin": origin} for origin in foreign), {"Sec-Fetch-Site": "cross-site"}]:
        answer = send(server, photos[0], headers=headers)
        assert answer.status_code == 403 and "another site" in answer.json()["error"]
        assert "access-control-allow-origin" not in answer.headers
    assert send(server, photos[0], headers={"Origin": server}).status_code == 200
    tunnel = {"Host": "localhost:9999", "Origin": "http://localhost:9999"}
    assert send(server, photos[0], headers=tunnel).status_code == 200


def test_headers_of_every_answer(server, photos):
    answers = [requests.get(f"{server}{path}") for path in ("/", "/page.js", "/health", "/nowhere")]
    answers += [send(server, photos[0]), send(server, photos[0], headers={"Origin": "null"})]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and "http" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "server" not in answer.headers


def test_the_page_answers_while_too_many_requests_wait(server, photos):
    waiting = [connect(server) for _ in range(MAX_REQUESTS)]
    for connection in waiting:
        connection.sendall(f"{UPLOAD}Content-Length: 1000\r\n\r\n--x".encode())
    wait_for(lambda: send(server, photos[0]).status_code == 503)
    busy = send(server, photos[0])
    assert busy.status_code == 503 and int(busy.headers["retry-after"]) > 0 and "busy" in busy.json()["error"]
    assert requests.get(f"{server}/health", timeout=5).json()["status"] == "ok"
    for connection in waiting:
        connection.close()
    assert wait_for(lambda: send(server, photos[0]).status_code == 200)


@pytest.mark.slow
def test_the_page_answers_while_a_large_image_is_predicted(server):
    large, took, status = io.BytesIO(), [], []
    Image.new("L", (6300, 6300)).save(large, "PNG")
    thread = threading.Thread(
        target=lambda: status.append(send(server, ("a.png", large.getvalue()), heatmap=True).status_code)
    )
    start = time.monotonic()
    thread.start()
    while thread.is_alive():
        took.append(requests.get(f"{server}/health", timeout=30).elapsed.total_seconds())
    assert status == [200] and max(took) < (time.monotonic() - start) / 2, took


@pytest.mark.parametrize(
    ("limit", "seconds", "rate"), [("UPLOAD_SECONDS", 0.3, 1e6), ("FIRST_SECONDS", 0.3, 10), ("FIRST_SECONDS", 0.3, 0)]
)
def test_a_slow_upload_is_refused(export, monkeypatch, limit, seconds, rate):
    """After its time, and before that if it sends less than the least rate."""
    monkeypatch.setattr(uploads, limit, seconds)
    predictor, start = Predictor(open_model(export, "cpu")), time.monotonic()

    async def receive():
        await asyncio.sleep(0.01 if rate else 30)
        return {"type": "http.request", "body": b"-" * int(rate / 100), "more_body": True}

    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    sent = ask(predictor, [{"type": "http.request", "body": head, "more_body": True}], receive)
    predictor.close()
    assert sent[0]["status"] == 408 and not predictor.requests and time.monotonic() - start < 10


def ask(predictor, messages, receive, client="127.0.0.1"):
    """What the application sends after these messages, and those that `receive` gives."""
    sent, waiting = [], list(messages)
    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers}

    async def next_message():
        return waiting.pop(0) if waiting else await receive()

    async def collect(message):
        sent.append(message)

    asyncio.run(create_app(predictor, {"localhost"})({**scope, "client": (client, 1)}, next_message, collect))
    return sent


def test_a_client_on_another_machine_has_its_share(export):
    predictor = Predictor(open_model(export, "cpu"))
    end = {"type": "http.request", "body": b"--x--\r\n", "more_body": False}
    for client, requests_of_it in (("192.0.2.7", MAX_OF_CLIENT), ("2001:db8::1", MAX_OF_CLIENT), ("::1", 7)):
        predictor.requests = Counter({client_of(client): requests_of_it})
        busy = client != "::1"
        assert ask(predictor, [end], None, client)[0]["status"] == (503 if busy else 400)
        assert ask(predictor, [end], None, "192.0.2.8")[0]["status"] == 400
    predictor.close()
    assert client_of("2001:db8::1") == client_of("2001:db8::2") != client_of("2001:db8:0:1::1")
    assert client_of("::ffff:192.0.2.7") == client_of("192.0.2.7") and client_of("::ffff:127.0.0.1") is None


def test_connections_without_a_request_are_closed(monkeypatch):
    """Idle ones, and those that send a head byte by byte; one client on another machine has its share of them."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(connections, "MAX_OF_CLIENT", 3)
    monkeypatch.setattr(connections, "client_of", lambda address: address if strangers else None)
    strangers = False

    async def app(scope, receive, send):
        await PlainTextResponse("hello")(scope, receive, send)

    config = uvicorn.Config(
        app, loop="asyncio", http=connections.Connection, ws="none", lifespan="off", log_config=None
    )
    uvicorn_server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=uvicorn_server.run, args=([listener],))
        thread.start()
        server = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            session = requests.Session()
            assert session.get(server).text == "hello"
            idle, slow, again = connect(server), connect(server), connect(server)
            again.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"hello" in again.recv(1000) + again.recv(1000)
            start = time.monotonic()
            ended = set()
            for byte in b"GET / HTTP/1.1\r\nHost: localhost" * 10:
                for one in {slow, again} - ended:
                    try:
                        one.sendall(bytes([byte]))
                    except OSError:
                        ended.add(one)
                if len(ended) == 2:
                    break
                time.sleep(0.05)
            assert len(ended) == 2 and time.monotonic() - start < 5
            assert closed(idle)
            strangers = True
            some = [connect(server) for _ in range(4)]
            wait_for(lambda: closed(some[-1]))
            assert requests.get(server).text == "hello" if not wait_for(lambda: all(map(closed, some))) else True
            strangers = False
        finally:
            uvicorn_server.should_exit = True
            thread.join()
    assert not connections._connections


def closed(connection):
    """Whether the other side has closed a connection on which it sends nothing."""
    connection.settimeout(2)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.slow
def test_a_request_that_is_cut_by_the_end_of_the_server_is_answered(export, start):
    process = start("serve", "--model", export, "--port", 0, "--device", "cpu")
    with connect(address_of(process)[0]) as connection:
        part = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + "-" * 400_000
        connection.sendall(f"{UPLOAD}Content-Length: 1000000\r\n\r\n{part}".encode())  # fast enough for 20 s
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 503 ") and b'{"error":"the server was stopped' in answer, answer
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "") and output.endswith("Stopped.\n")


def test_two_lengths_of_a_body_close_the_connection(server):
    chunked = "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(f"{UPLOAD}{chunked}".encode())
        answer = b"".join(iter(lambda: connection.recv(1000), b""))  # to its end
    assert answer.startswith(b"HTTP/1.1 400 ") and b"exclude each other" in answer and answer.count(b"HTTP/1.1") == 1


def test_health_by_head_and_no_other_pages(server):
    answer = requests.head(f"{server}/health")
    assert answer.status_code == 200 and not answer.content
    for path in ("docs", "redoc", "docs/oauth2-redirect"):  # FastAPI's own pages load scripts from another server
        assert requests.get(f"{server}/{path}").json() == {"error": "Not Found"}


def test_openapi(server, photos):
    document = requests.get(f"{server}/openapi.json").json()
    assert document["openapi"].startswith("3.1") and DISCLAIMER in document["info"]["description"]
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"\$ref": ?"([^"]+)"', requests.get(f"{server}/openapi.json").text))
    assert references and all(ref.removeprefix("#/components/schemas/") in schemas for ref in references)

    def fits(value, schema):
        schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        kinds = [one.get("type") for one in schema.get("anyOf", [schema])]
        names = {dict: "object", list: "array", str: "string", float: "number", bool: "boolean", type(None): "null"}
        kind = "integer" if type(value) is int else names[type(value)]
        assert kind in kinds or (kind == "integer" and "number" in kinds), (value, schema)
        if "properties" in schema:
            assert set(value) == set(schema["properties"]) and set(schema.get("required", ())) <= set(value)
            for name, part in schema["properties"].items():
                fits(value[name], part)
        (items,) = [one["items"] for one in schema.get("anyOf", [schema]) if "items" in one] or [None]
        for part in value if isinstance(value, list) else ():
            fits(part, items)

    def schema_of(path, method, status):
        answers = document["paths"][path][method]["responses"]
        return answers[status]["content"]["application/json"]["schema"]

    for heatmap in (False, True):
        answer = send(server, photos[0], ("broken.png", BROKEN), heatmap=heatmap)
        fits(answer.json(), schema_of("/predict", "post", "200"))
    fits(requests.get(f"{server}/health").json(), schema_of("/health", "get", "200"))
    fits(send(server, photos[0], headers={"Origin": "null"}).json(), schema_of("/predict", "post", "403"))
    operation = document["paths"]["/predict"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["file"]["maxItems"] == uploads.MAX_FILES
    assert form["properties"]["file"]["items"]["contentMediaType"] == "application/octet-stream"
    (heatmap,) = operation["parameters"]
    assert heatmap["schema"]["type"] == "boolean" and heatmap["schema"]["default"] is True
    assert set(operation["responses"]) == {*map(str, (200, 400, 403, 408, 413, 415, 421, 500, 503)), "default"}
    assert "Retry-After" in operation["responses"]["503"]["headers"]
    assert set(schemas) == {"Health", "ModelFacts", "Prediction", "Predictions", "Problem"}
    for name in schemas:
        for schema in schemas[name]["properties"].values():
            for example in schema.get("examples", ()):
                fits(example, schema)


# the command


def test_errors_of_the_command_are_one_line(run, refused, export, tmp_path, server):
    port = server.rpartition(":")[2]
    refused(run("serve", "--model", export, "--port", port), f"--port {port}", "in use", "--port 0")
    refused(run("serve", "--model", export, "--host", "no.such.invalid"), "--host no.such.invalid")
    refused(run("serve", "--model", export, "--host", "192.0.2.7", "--port", 0), "--host 192.0.2.7")
    refused(run("serve", "--model", tmp_path, "--port", 0), tmp_path)
    refused(run("serve", "--port", 0), "no export in it", "--model")
    assert run("serve", "--port", 70000).exit_code == 2


@pytest.mark.slow
def test_open_to_other_machines_until_sigterm(run, export, photos):
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    address, found = f"http://127.0.0.1:{port}", {}

    ended = threading.Event()

    def ask():
        try:
            wait_for(lambda: reachable(address) or ended.is_set())
            idle = connect(address)  # an idle connection does not delay the end of the server
            found["own name"] = requests.get(address, headers={"Host": socket.gethostname()}).status_code
            found["other"] = requests.get(address, headers={"Host": "evil.example"}).status_code
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
        with idle:
            found["end"] = idle.recv(10)

    asking = threading.Thread(target=ask)
    asking.start()
    options = ["--host", "0.0.0.0", "--port", port, "--device", "cpu", "--prevalence", "0.03"]
    result = run("serve", "--model", export, *options)
    ended.set()
    asking.join()
    assert found == {"own name": 200, "other": 421, "end": b""}
    assert result.exit_code == 0 and result.stderr == "" and result.stdout.endswith("Stopped.\n"), result.output
    lines = {line[:14].strip(): line[14:] for line in result.stdout.splitlines()}
    assert lines["warning"].startswith("other machines can reach this server; it has no login")
    assert lines["model"] == str(export) and lines["device"].startswith("cpu (") and "fp32" in lines["device"]
    assert lines["probabilities"] == "for a prevalence of 3 %, moved from 50 %; not calibrated"
    assert result.stdout.startswith(DISCLAIMER)


def reachable(address):
    try:
        return requests.get(f"{address}/health", timeout=20).ok
    except requests.ConnectionError:
        return False


# the page


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser: install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def page(browser, server):
    """The page; at the end it must have logged no error and sent requests to no other server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, errors, urls = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(server)
    yield page
    context.close()
    assert not errors
    assert all(url.startswith((f"{server}/", "data:image/", f"blob:{server}/")) for url in urls), urls


def drop(page, *paths):
    """Drop files on the page, as the browser receives them from the desktop."""
    box = page.locator("#drop").bounding_box()
    where = {"x": box["x"] + 20, "y": box["y"] + 20}
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    devtools = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, **where, "data": data})


def done(page, number):
    page.locator("#status", has_text=re.compile(f"^{number} files? done")).wait_for(timeout=30_000)


@pytest.mark.slow
def test_drop_a_file_and_see_the_result(page, photos, export):
    drop(page, photos[-1])
    done(page, 1)
    row = predict(photos[-1], export, device="cpu", precision="fp32").iloc[0]
    card = page.locator(".card")
    assert row.prediction in card.locator(".call").inner_text() and photos[-1].name in card.inner_text()
    p = row.p_PNEUMONIA
    shown = "> 0.999" if p > 0.9995 else "< 0.001" if p < 0.0005 else f"{p:.3f}"
    assert shown in card.inner_text() and f"{row.threshold:.4g}" in card.inner_text()
    assert "not calibrated" in card.inner_text()
    assert f"{photos[-1].name}: {row.prediction}" in page.locator("[role=status]").inner_text()
    assert page.get_by_text(DISCLAIMER).first.is_visible()
    assert card.locator("img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 40
    assert "one cell for the whole image" in card.inner_text()  # the network takes 32 pixels


@pytest.mark.slow
def test_drop_a_broken_one_and_see_the_message(page, photos, tmp_path):
    (tmp_path / "broken.jpeg").write_bytes(BROKEN)
    drop(page, tmp_path / "broken.jpeg")
    done(page, 1)
    assert "Broken image" in page.locator(".card.bad").inner_text()
    assert "not read" in page.locator("[role=status]").inner_text()
    drop(page, photos[0])  # the page still works
    done(page, 2)
    assert page.locator("#counts").inner_text().endswith("1 not read")


@pytest.mark.slow
def test_several_at_once_by_the_file_input_and_their_table(page, photos, export, tmp_path):
    names = ["=1+1.jpeg", "<img src=x onerror=alert(1)>.jpeg", 'a "quoted", name.jpeg', "scan without extension"]
    for name, photo in zip(names, photos[::10], strict=True):
        shutil.copy(photo, tmp_path / name)
    (tmp_path / "@broken.png").write_bytes(BROKEN)
    paths = [tmp_path / name for name in [*names, "@broken.png"]]
    chooser = page.get_by_label("Choose files")
    assert chooser.get_attribute("accept") is None  # DICOM files often have no extension
    chooser.set_input_files(paths)
    done(page, 5)
    assert page.locator(".card h3").all_inner_texts() == [path.name for path in paths]
    assert page.locator("tbody th").all_inner_texts() == [path.name for path in paths]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download table").click()
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"), newline="")))
    table = predict(paths, export, device="cpu", precision="fp32")
    assert list(rows[0]) == list(table.columns)
    assert page.locator("thead th").all_inner_texts() == ["file", *table.columns[1:]]
    columns = json.loads(page.locator("body").get_attribute("data-columns"))
    assert [one["name"] for one in columns if one["isNumber"]] == ["p_NORMAL", "p_PNEUMONIA", "threshold"]
    assert [row["path"] for row in rows] == ["'=1+1.jpeg", *names[1:], "'@broken.png"]
    for row, expected in zip(rows, table.to_dict("records"), strict=True):
        assert float(row["threshold"]) == expected["threshold"]
        if row["error"]:
            assert row["error"].startswith("'@broken.png: ") and not row["prediction"] and not row["p_NORMAL"]
        else:
            assert row["prediction"] == expected["prediction"]
            assert float(row["p_PNEUMONIA"]) == pytest.approx(expected["p_PNEUMONIA"], abs=5e-6)
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".card").count() == 0 and not page.locator("#results").is_visible()


@pytest.mark.slow
def test_a_folder_by_drop(page, photos, tmp_path):
    (tmp_path / "all" / "below").mkdir(parents=True)
    for name in ("b.jpeg", "below/a.jpeg", ".hidden"):
        shutil.copy(photos[0], tmp_path / "all" / name)
    drop(page, tmp_path / "all")
    done(page, 2)
    assert page.locator(".card h3").all_inner_texts() == ["b.jpeg", "a.jpeg"]


@pytest.mark.slow
def test_by_keyboard_alone(page, photos):
    choosers = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))  # before the key: the event arrives late
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").startswith("Skip")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    wait_for(lambda: page.keyboard.press("Enter") or page.wait_for_timeout(500) or choosers)
    choosers[0].set_files(photos[0])
    done(page, 1)
    button = page.get_by_role("button", name="Enlarge")
    # its name is what it shows (WCAG 2.5.3, axe-core's label-content-name-mismatch)
    assert button.get_attribute("aria-label") is None and "As read" in button.inner_text()
    button.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name=photos[0].name)
    assert dialog.is_visible()
    assert "Probability of PNEUMONIA" in dialog.inner_text() and "What the network sees" in dialog.inner_text()
    assert dialog.locator("img").last.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [32, 32]
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    assert button.evaluate("button => button === document.activeElement")


@pytest.mark.slow
def test_on_a_phone_and_in_the_dark(page, photos, tmp_path):
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.set_viewport_size({"width": 360, "height": 740})
    shutil.copy(photos[0], long := tmp_path / f"{'unbroken_' * 12}.jpeg")
    drop(page, long, photos[1])
    done(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.slow
def test_the_page_tries_a_busy_server_again(browser, server, photos):
    page = browser.new_page()
    page.goto(server)
    answers = [503, 503]
    page.route(
        "**/predict",
        lambda route: (
            route.fulfill(status=answers.pop(), headers={"Retry-After": "0.1"}) if answers else route.continue_()
        ),
    )
    drop(page, photos[0])
    done(page, 1)
    assert not answers and page.locator(".card.bad").count() == 0
    page.close()
