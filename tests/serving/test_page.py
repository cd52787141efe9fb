"""Tests the page in a browser."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.serving.conftest import BROKEN, dicom, done, drop, opened, send
from xray_fastai import DISCLAIMER
from xray_fastai.inference.predict import predict

pytestmark = pytest.mark.slow
AXE_IN_REPOSITORY = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
"""Where `npm install --no-save axe-core` puts it; the environment variable AXE_CORE names another file."""


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
    assert f"{photos[-1].name}: {row.prediction}" in page.locator("#status").inner_text()
    assert page.get_by_text(DISCLAIMER).first.is_visible()
    assert card.locator("img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 40
    assert f"What speaks for {row.prediction}" in card.inner_text()


def test_drop_a_broken_one_and_see_the_message(page, photos, tmp_path):
    (tmp_path / "broken.jpeg").write_bytes(BROKEN)
    drop(page, tmp_path / "broken.jpeg")
    done(page, 1)
    assert "Broken image" in page.locator(".card.bad").inner_text()
    assert "not read" in page.locator("#status").inner_text()
    drop(page, photos[0])  # the page still works
    done(page, 2)
    assert page.locator("#counts").inner_text().endswith("1 not read")


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
        page.get_by_role("button", name="Save table").click()
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"), newline="")))
    table = predict(paths, export, device="cpu", precision="fp32")
    assert list(rows[0]) == list(table.columns)
    assert page.locator("thead th").all_inner_texts() == ["file", *table.columns[1:]]
    columns = json.loads(page.locator("body").get_attribute("data-columns"))
    assert [one["name"] for one in columns if one["isNumber"]] == ["p_NORMAL", "p_PNEUMONIA", "threshold", "unlike"]
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


def test_a_folder_by_drop(page, photos, tmp_path):
    (tmp_path / "all" / "below").mkdir(parents=True)
    for name in ("b.jpeg", "below/a.jpeg", ".hidden"):
        shutil.copy(photos[0], tmp_path / "all" / name)
    drop(page, tmp_path / "all")
    done(page, 2)
    assert page.locator(".card h3").all_inner_texts() == ["b.jpeg", "a.jpeg"]


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
    assert dialog.locator(".seen img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [32, 32]
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    assert button.evaluate("button => button === document.activeElement")


def test_on_a_phone_and_in_the_dark(page, photos, tmp_path):
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.set_viewport_size({"width": 360, "height": 740})
    shutil.copy(photos[0], long := tmp_path / f"{'unbroken_' * 12}.jpeg")
    drop(page, long, photos[1])
    done(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


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


def test_an_uncertain_image_does_not_look_like_a_call(gated_page, photos):
    page = gated_page
    drop(page, photos[0], photos[-1])
    done(page, 2)
    called, uncertain = page.locator(".card").all()
    assert "uncertain" not in called.inner_text() and not called.get_by_text("Not called").count()
    assert uncertain.locator(".call").inner_text() == "uncertain, not called"
    assert "Not called: unlike the training images." in uncertain.inner_text()
    assert "the limit is" in uncertain.inner_text() and "Predicted" not in uncertain.inner_text()
    assert "No heat map: the image is unlike the training images" in uncertain.inner_text()
    style = "one => [getComputedStyle(one).color, getComputedStyle(one).borderTopStyle]"
    assert uncertain.locator(".call").evaluate(style) != called.locator(".call").evaluate(style)
    assert uncertain.get_attribute("class") == "card uncertain"
    assert page.locator("#counts").inner_text().endswith("1 uncertain")
    assert page.locator("tbody tr").last.locator("td").first.inner_text() == "uncertain: unlike the training images"
    assert "uncertain, unlike the training images" in page.locator("#status").inner_text()
    assert "if the image is unlike the training images" in page.locator("#model").inner_text()


def test_the_window_of_a_dicom_file_is_changed_and_the_answer_follows(page, server, photos, tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom())
    drop(page, photos[0], tmp_path / "a.dcm")
    done(page, 2)
    jpeg, card = page.locator(".card").all()
    assert "window 2000 / 1000" in card.inner_text() and "window" not in jpeg.inner_text()
    jpeg.get_by_role("button").click()
    assert not page.locator("#window").is_visible()
    page.keyboard.press("Escape")
    before = card.locator("img").first.get_attribute("src")
    card.get_by_role("button", name="change the window").click()
    assert page.get_by_label("Centre", exact=True).input_value() == "2000"
    assert "from 0 to 4000" in page.locator("#window-hint").inner_text()
    page.get_by_label("Width", exact=True).fill("4000")
    page.get_by_label("Width", exact=True).press("Enter")
    status = page.locator("#window-status")
    status.get_by_text(", probability").wait_for()
    (expected,) = send(server, tmp_path / "a.dcm", options={"window": "2000,4000"}).json()["predictions"]
    name = expected["prediction"]
    assert status.inner_text() == f"{name}, probability {shown(expected['probabilities'][name])}"
    assert shown(expected["probabilities"]["PNEUMONIA"]) in page.locator("#large-score").inner_text()
    assert "window 2000 / 4000, chosen here" in page.locator("#large").inner_text()
    page.get_by_label("Centre", exact=True).fill("9999")
    page.get_by_label("Centre", exact=True).press("Enter")
    status.get_by_text("give a centre from 0 to 4000").wait_for()
    assert "window 2000 / 4000, chosen here" in page.locator("#large").inner_text()
    page.keyboard.press("Escape")
    assert card.get_by_role("button").evaluate("button => button === document.activeElement")
    assert card.locator("img").first.get_attribute("src") != before
    rows = saved_rows(page)
    assert [(row["window_centre"], row["window_width"]) for row in rows] == [("", ""), ("2000", "4000")]
    assert float(rows[1]["p_PNEUMONIA"]) == expected["probabilities"]["PNEUMONIA"]
    card.get_by_role("button").click()
    page.get_by_role("button", name="As in the file").click()
    status.get_by_text(", probability").wait_for()
    assert "window 2000 / 1000" in page.locator("#large").inner_text()
    page.keyboard.press("Escape")
    assert "window_centre" not in saved_rows(page)[1]


def shown(p):
    return "> 0.999" if p > 0.9995 else "< 0.001" if p < 0.0005 else f"{p:.3f}"


def saved_rows(page):
    with page.expect_download() as download:
        page.get_by_role("button", name="Save table").click()
    return list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"), newline="")))


def test_a_dicom_file_whose_window_shows_nothing_can_be_seen_by_another(page, tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom(WindowCenter=9000, WindowWidth=1000))
    drop(page, tmp_path / "a.dcm")
    done(page, 1)
    card = page.locator(".card.bad")
    assert "Blank" in card.inner_text()
    card.get_by_role("button", name="Change the window").click()
    page.get_by_label("Centre", exact=True).fill("2000")
    page.get_by_label("Centre", exact=True).press("Enter")
    page.locator("#window-status").get_by_text(", probability").wait_for()
    page.keyboard.press("Escape")
    assert page.locator(".card.bad").count() == 0 and page.locator("#counts").inner_text().startswith("1 ")
    assert "not read" not in page.locator("#counts").inner_text()


def test_the_answers_as_json_are_those_of_the_api(page, server, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(BROKEN)
    drop(page, photos[0], tmp_path / "broken.png")
    done(page, 2)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save answers").click()
    found = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert download.value.suggested_filename == "predictions.json"
    assert found == send(server, photos[0], ("broken.png", BROKEN)).json()


def test_the_saved_page_needs_no_server(page, browser, photos, tmp_path):
    hostile = '<img src=x onerror=alert(1)><!-- <ol id="cards"><script>alert(2)<script>.jpeg'
    files = copies(
        photos[0], tmp_path, [hostile, *(f"{number:02}.jpeg" for number in range(26))]
    )  # two pages of results
    files[1].write_bytes(BROKEN)
    drop(page, *files)
    done(page, 27)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save page").click()
    path = tmp_path / "saved.html"
    download.value.save_as(path)
    context = browser.new_context()
    saved, urls, messages = context.new_page(), [], []
    saved.on("request", lambda request: urls.append(request.url))
    saved.on("console", lambda message: messages.append(message.text))
    saved.on("dialog", lambda dialog: messages.append(dialog.message))
    saved.goto(path.as_uri())
    assert saved.locator(".card h3").all_inner_texts() == [file.name for file in files]
    assert saved.locator("tbody tr").count() == 27 and saved.locator("script, button, input, link").count() == 0
    assert saved.get_by_text(DISCLAIMER).first.is_visible() and saved.get_by_text("27 files, saved on").is_visible()
    colour = "getComputedStyle(document.querySelector('.call')).backgroundColor"
    assert saved.evaluate(colour) == page.evaluate(colour)
    assert saved.locator("img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 40
    assert not messages and all(url.startswith(("file:", "data:image/")) for url in urls), (messages, urls)
    context.close()


def test_what_becomes_of_results_when_the_server_restarts_with_another_model(browser, server, gated, photos):
    """They stay; its own answers would stand under the words of the model before, so they are refused."""
    with opened(browser, server) as page:
        assert "closed or reloaded, it loses them" in page.locator("#kept").text_content()
        drop(page, photos[0])
        done(page, 1)

        def of_another_model(route):
            answer = route.fetch()
            found = answer.json()
            found["model"]["threshold"] = 0.25
            route.fulfill(response=answer, json=found)

        page.route("**/predict", of_another_model)
        drop(page, photos[1])
        done(page, 2)
        assert "another model" in page.locator(".card.bad").inner_text()
        assert page.locator(".card:not(.bad) .call").inner_text() in gated.classes


def test_a_hundred_files_are_paged(page, photos, tmp_path):
    files = copies(photos[0], tmp_path, [f"{number:03}.jpeg" for number in range(100)])
    drop(page, *files)
    assert page.locator(".card").count() == 24
    done(page, 100)
    assert page.locator("#where").inner_text() == "1 to 24 of 100" and page.locator("tbody tr").count() == 24
    previous, following = page.get_by_role("button", name="Previous"), page.get_by_role("button", name="Next")
    following.focus()
    for _ in range(6):  # more than there are pages
        page.keyboard.press("Enter")
    assert page.locator("#where").inner_text() == "97 to 100 of 100" and page.locator(".card").count() == 4
    assert page.locator(".card h3").all_inner_texts() == [file.name for file in files[96:]]
    assert following.evaluate("one => one === document.activeElement")
    assert following.get_attribute("aria-disabled") == "true" and previous.get_attribute("aria-disabled") == "false"
    assert [row["path"] for row in saved_rows(page)] == [file.name for file in files]


def copies(photo, folder, names):
    return [Path(shutil.copy(photo, folder / name)) for name in names]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_axe_finds_no_violation(browser, gated_page, photos, tmp_path, scheme, width):
    """On the page with a call, an uncertain image, a broken one and a DICOM file; and in the enlarged view."""
    path = Path(os.environ.get("AXE_CORE", AXE_IN_REPOSITORY))
    if not path.is_file():
        pytest.skip(f"axe-core is not here: npm install --no-save axe-core, or name {path.name} by AXE_CORE")
    axe, page = path.read_text(encoding="utf-8"), gated_page
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    violations = violations_of(page, axe)
    (tmp_path / "broken.png").write_bytes(BROKEN)
    (tmp_path / "a.dcm").write_bytes(dicom())
    drop(page, photos[0], photos[-1], tmp_path / "broken.png", tmp_path / "a.dcm", *[photos[1]] * 22)
    done(page, 26)
    violations += violations_of(page, axe)
    page.locator(".card", has_text="a.dcm").get_by_role("button").click()
    violations += violations_of(page, axe)
    assert not violations, "\n".join(violations)


def violations_of(page, axe):
    """What axe-core finds, with its rule and the element; all of its rules are tried."""
    page.evaluate(axe)
    found = page.evaluate("axe.run().then(({violations}) => violations)")
    assert page.evaluate("axe.run().then(({passes}) => passes.length)") > 20
    return [f"{one['id']}: {node['html']}: {node['failureSummary']}" for one in found for node in one["nodes"]]
