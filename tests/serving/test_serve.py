"""Tests the server over HTTP, started by the command line."""

import asyncio
import dataclasses
import io
import os
import re
import signal
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest
import requests
import torch
import uvicorn
from PIL import Image
from starlette.responses import PlainTextResponse

from tests.conftest import wait_for
from tests.serving.conftest import BROKEN, address_of, dicom, noise, send
from xray_fastai import DISCLAIMER
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.data.images import open_image
from xray_fastai.inference.gradcam import grad_cam, overlay
from xray_fastai.inference.model import open_model
from xray_fastai.inference.predict import predict
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.serving import connections, decoding, uploads
from xray_fastai.serving import server as server_module
from xray_fastai.serving.app import MAX_OF_CLIENT, MAX_REQUESTS, Predictor, create_app
from xray_fastai.serving.connections import client_of
from xray_fastai.serving.decoding import Decoder, Wanted
from xray_fastai.serving.predictions import ModelFacts, Options, _jpeg_uri, predict_file
from xray_fastai.system.errors import ImageError

UPLOAD = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"


@pytest.fixture
def decoder():
    decoder = Decoder()
    yield decoder
    decoder.close()


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
        assert one["unlike"] is None and one["uncertain"] is None  # the export has no gate
        assert one["error"] is None and one["image"] is None and one["heatmap"] is None and one["note"] is None
        values = {"path": one["file"], **{f"p_{name}": p for name, p in one["probabilities"].items()}}
        assert one["row"] == {name: values.get(name, one.get(name)) for name in table.columns}
    assert found["model"]["name"] == "small" and found["disclaimer"] == DISCLAIMER


@pytest.mark.parametrize("gate", [True, False])
def test_what_is_unlike_the_training_images_is_uncertain(gated, photos, decoder, gate):
    """Its probabilities stay, and there is no heat map; the same row as `predict` gives."""
    builder = RowBuilder(gated, PredictConfig(gate=gate))
    for photo, is_unlike in ((photos[0], False), (photos[-1], True)):
        found = predict_file(builder, decoder, photo.name, photo.read_bytes())
        row = predict(photo, gated, gate=gate).iloc[0]
        assert found.row == {**row.to_dict(), "path": photo.name}
        assert (found.unlike > gated.gate.limit) == is_unlike and found.unlike == row.unlike
        if is_unlike and gate:
            assert (found.prediction, found.uncertain) == ("uncertain", "unlike the training images")
            assert found.heatmap is None and found.note == "No heat map: the image is unlike the training images"
            assert found.image and found.seen
        else:
            assert found.prediction in gated.classes and found.uncertain is None
            assert found.heatmap or found.note == f"No heat map: no region of the image supports {found.prediction}"
            assert found.prediction == "NORMAL" or found.positive_heatmap is None
        assert sum(found.probabilities.values()) == pytest.approx(1) and found.error is None
    assert ModelFacts.of(builder).limit == (gated.gate.limit if gate else None) and ModelFacts.of(builder).has_gate


def test_the_class_to_detect_is_mapped_beside_the_one_that_is_called(gated, photos, decoder):
    """And alone where an image is too close to the threshold."""
    opened, model = open_image(photos[0]), dataclasses.replace(gated, gate=None)
    image = torch.from_numpy(np.array(open_image(photos[0], model.size)))[None, None]
    normal, pneumonia = (
        _jpeg_uri(overlay(opened, cam)) if cam.any() else None
        for cam in grad_cam(model, image.expand(2, -1, -1, -1), [0, 1])
    )
    assert normal != pneumonia
    p = predict(photos[0], model).p_PNEUMONIA[0]
    for threshold, width, maps in (
        (0.99, 0.0, (normal, pneumonia)),
        (0.0, 0.0, (pneumonia, None)),
        (0.99, 0.4, (normal, pneumonia)),
        (p + 0.001, 0.002, (pneumonia, None)),
    ):
        builder = RowBuilder(model, PredictConfig(threshold=threshold, abstain=width))
        found = predict_file(builder, decoder, "a.jpeg", photos[0].read_bytes())
        assert (found.heatmap, found.positive_heatmap) == maps, (threshold, width, found.prediction)


def test_what_is_near_the_threshold_is_uncertain(gated, photos, decoder):
    p = predict(photos[0], gated).p_PNEUMONIA[0]
    for width in (abs(p - 0.5) - 1e-6, abs(p - 0.5) + 1e-6):
        builder = RowBuilder(gated, PredictConfig(abstain=width))
        found = predict_file(builder, decoder, "a.jpeg", photos[0].read_bytes(), Options(heatmap=False))
        close = width > abs(p - 0.5)
        assert (found.prediction == "uncertain") == close and found.probabilities["PNEUMONIA"] == p
        assert found.uncertain == (f"within {width:g} of the threshold" if close else None)
        assert found.row["prediction"] == found.prediction and ModelFacts.of(builder).abstain == width


def test_another_window_of_a_dicom_file(server, photos):
    content = dicom()
    plain = send(server, ("a.dcm", content)).json()["predictions"][0]
    assert plain["window"] == {"centre": 2000, "width": 1000, "low": 0, "high": 4000}
    wanted = {"window": "2000,4000"}
    (wide,) = send(server, ("a.dcm", content), options=wanted).json()["predictions"]
    assert wide["window"] == {"centre": 2000, "width": 4000, "low": 0, "high": 4000}
    assert wide["probabilities"] != plain["probabilities"]
    same = dicom(WindowCenter=2000, WindowWidth=4000)
    assert send(server, ("a.dcm", same)).json()["predictions"][0]["probabilities"] == wide["probabilities"]
    jpeg, outside = (
        send(server, file, options={"window": window}).json()["predictions"][0]
        for file, window in ((photos[0], "1,2"), (("a.dcm", content), "4001,10"))
    )
    assert jpeg["error"].endswith("not a DICOM file, so it has no window; leave it out")
    assert "a centre from 0 to 4000" in outside["error"] and outside["window"] is None
    assert send(server, photos[0]).json()["predictions"][0]["window"] is None


def test_a_window_that_shows_nothing_is_told_and_can_be_changed(server):
    """The error of a blank picture comes with the values among which another window may be chosen."""
    stored = np.tile(np.linspace(100, 900, 64).round().astype(np.uint16), (64, 1))
    (blank,) = send(server, ("a.dcm", dicom(stored, WindowCenter=3000, WindowWidth=1000))).json()["predictions"]
    assert "blank" in blank["error"] and blank["window"] == {"centre": 3000, "width": 1000, "low": 100, "high": 3500}


@pytest.mark.parametrize(
    "window", ["40", "40,400,1", "a,b", "nan,1", "1e9,1", "40,-1", "\u0664,\u0665", "40, 400", "9" * 400 + ",1"]
)
def test_a_window_is_two_numbers(server, window):
    answer = send(server, ("a.dcm", b"x"), options={"window": window})
    expected = f"window={window[:80]}: give the centre and the width of a window, such as 40,400"
    assert (answer.status_code, answer.json()) == (400, {"error": expected})


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
        return predict_file(RowBuilder(same, PredictConfig()), decoder, "a.jpeg", content, Options(heatmap=False))

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
        decoded = decoder.decode(content, Wanted(64, 640))
        assert (decoded.pixels == np.asarray(open_image(content, 64))).all() and decoded.window is None
        expected = open_image(content)
        expected.thumbnail((640, 640))
        assert decoded.picture.tobytes() == expected.tobytes() and decoder.decode(content, Wanted(64)).picture is None


def test_a_file_that_takes_too_long_to_decode(decoder, photos, monkeypatch):
    stream = io.BytesIO()
    Image.new("L", (6300, 6300), 90).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    slow = content[:-2] + 50 * content[content.rindex(b"\xff\xda") : -2] + content[-2:]
    decoder.decode(photos[0].read_bytes(), Wanted(32))
    monkeypatch.setattr(decoding, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"more than 0\.5 s to decode"):
        decoder.decode(slow, Wanted(32))
    assert time.monotonic() - start < 2
    monkeypatch.undo()
    assert decoder.decode(photos[0].read_bytes(), Wanted(32)).pixels.shape == (32, 32)
    decoder.process.kill()  # as the system does where memory runs out
    decoder.process.wait()
    assert decoder.decode(photos[0].read_bytes(), Wanted(32)).pixels.shape == (32, 32)


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
    predictor, start = Predictor(RowBuilder(open_model(export, "cpu"), PredictConfig())), time.monotonic()

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
    predictor = Predictor(RowBuilder(open_model(export, "cpu"), PredictConfig()))
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
    address = address_of(process)[0]
    wait_for(lambda: reachable(address))  # before that, the end of the server resets a connection
    with connect(address) as connection:
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
        if value is not None and (one := [one for one in schema.get("anyOf", ()) if "$ref" in one]):
            return fits(value, one[0])
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
        answer = send(server, photos[0], ("a.dcm", dicom()), ("broken.png", BROKEN), heatmap=heatmap)
        fits(answer.json(), schema_of("/predict", "post", "200"))
    fits(requests.get(f"{server}/health").json(), schema_of("/health", "get", "200"))
    fits(send(server, photos[0], headers={"Origin": "null"}).json(), schema_of("/predict", "post", "403"))
    operation = document["paths"]["/predict"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["file"]["maxItems"] == uploads.MAX_FILES
    assert form["properties"]["file"]["items"]["contentMediaType"] == "application/octet-stream"
    heatmap, window = operation["parameters"]
    assert re.fullmatch(window["schema"]["pattern"], window["schema"]["examples"][0])
    assert heatmap["schema"]["type"] == "boolean" and heatmap["schema"]["default"] is True
    assert set(operation["responses"]) == {*map(str, (200, 400, 403, 408, 413, 415, 421, 500, 503)), "default"}
    assert "Retry-After" in operation["responses"]["503"]["headers"]
    assert set(schemas) == {"GreyWindow", "Health", "ModelFacts", "Prediction", "Predictions", "Problem"}
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


def test_the_gate_and_the_band_are_options(run, refused, export, monkeypatch):
    configs = []
    monkeypatch.setattr(server_module, "serve", lambda *args, config, **options: configs.append(config))
    for options in ([], ["--no-gate"], ["--abstain", 0.1]):
        assert run("serve", export, *options).exit_code == 0
    assert configs == [PredictConfig(), PredictConfig(gate=False), PredictConfig(abstain=0.1)]
    refused(run("serve", export, "--abstain", 0.5), "--abstain 0.5", code=None)


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
    options = ["--host", "0.0.0.0", "--port", port, "--device", "cpu", "--prevalence", "0.03", "--abstain", "0.01"]
    result = run("serve", "--model", export, *options)
    ended.set()
    asking.join()
    assert found == {"own name": 200, "other": 421, "end": b""}
    assert result.exit_code == 0 and result.stderr == "" and result.stdout.endswith("Stopped.\n"), result.output
    lines = {line[:14].strip(): line[14:] for line in result.stdout.splitlines()}
    assert lines["warning"].startswith("other machines can reach this server; it has no login")
    assert lines["model"] == str(export) and lines["device"].startswith("cpu (") and "fp32" in lines["device"]
    assert lines["uncertain"] == "within 0.01 of the threshold"
    assert lines["probabilities"] == "for a prevalence of 3 %, moved from 50 %; not calibrated"
    assert result.stdout.startswith(DISCLAIMER)


def reachable(address):
    try:
        return requests.get(f"{address}/health", timeout=20).ok
    except requests.ConnectionError:
        return False
