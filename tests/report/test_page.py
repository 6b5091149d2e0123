"""The page in a real browser, used with the mouse, the keyboard and a narrow window."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

import gossamer
from browser import opened
from families import tiny_model
from gossamer.circuits.attention_record import AttentionPrompt, write_attention
from gossamer.report.html import write_report

HOSTILE = ["<script>document.title='harmed'</script>", "<img src=x onerror=document.title='harmed'>", "</script>",
           "&lt;", "שלום", "‮abc", "\u2028", "`${1}`", "\n", " "]  # fmt: skip


class Words:
    """A minimal tokenizer for the record: token i is the i-th text."""

    def decode(self, ids: list[int]) -> str:
        return HOSTILE[ids[0] % len(HOSTILE)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the attention of tiny models on a hostile prompt, and findings and a circuit that quote it."""
    folder = tmp_path_factory.mktemp("runs") / "<b>run"
    folder.mkdir()
    dense = tiny_model("llama")
    sparse = gossamer.add_gates(dense, gate_bias=-0.5).eval()
    prompts = [
        AttentionPrompt(tuple(range(10)), "<i>hostile</i>"),
        AttentionPrompt((3, 4, 5), "short"),
        AttentionPrompt(tuple(range(90)), "long"),
    ]
    write_attention(folder, {"dense": dense.eval(), "sparse": sparse}, Words(), prompts)  # type: ignore[arg-type]
    (folder / "config.json").write_text(
        json.dumps({"config": {}, "constraint": {"name": "ce", "symbol": "τ", "label": "loss", "bound": 3.0}})
    )
    sentences = [
        {"text": f"{HOSTILE[0]} {place}", "links": [[place, 1, 4, 2]], "evidence": {"<b>cut</b>": 0.25 + place}}
        for place in range(3)
    ]
    findings = {"title": HOSTILE[1], "sentences": sentences, "positions": HOSTILE}
    (folder / "findings.json").write_text(json.dumps(findings))
    task = folder / "circuits" / "hostile"
    task.mkdir(parents=True)
    points = [{"size": size, "metric": size / 10, "faithfulness": size / 10} for size in (1, 5, 10)]
    model = {"units": {"layers": 3}, "levels": {"links": {"total": 10, "points": points}}}
    (task / "circuits.json").write_text(json.dumps({"models": {"dense": model, "sparse": model}}))
    links = {"size": 2, "links": [[0, 1, 3, 2, -0.5], [2, 0, 9, 3, 0.25]]}
    record = {
        "prompt": "".join(HOSTILE),
        "tokens": HOSTILE,
        "answer": HOSTILE[0],
        "models": {"dense": links, "sparse": links},
    }
    (task / "links.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def browser(run: Path) -> Iterator[webdriver.Chrome]:
    """The open page; checks at the end that no token was executed as a script."""
    with opened(write_report(run)) as driver:
        yield driver
        assert driver.title == "gossamer: <b>run"


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    return [found.get_attribute("textContent") for found in browser.find_elements(By.CSS_SELECTOR, selector)]


def choose(browser: webdriver.Chrome, label: str, index: int) -> None:
    path = f"//section[@id='attention']//label[starts-with(., '{label}')]/select"
    Select(browser.find_element(By.XPATH, path)).select_by_index(index)


def weight(run: Path, model: str, layer: int, head: int, query: int, key: int) -> float:
    from gossamer.report.plots import attention_weights

    return float(attention_weights(json.loads((run / "attention.json").read_text()), 0, model)[layer, head, query, key])


def test_tokens_are_text_whatever_they_hold(browser: webdriver.Chrome) -> None:
    shown = texts(browser, "#attention figure.detail:first-of-type .token")
    visible = [text.replace(" ", "·").replace("\n", "⏎") for text in HOSTILE]
    assert shown == visible
    assert not browser.find_elements(By.CSS_SELECTOR, "main img, main script, main b b, main i")
    assert (
        browser.execute_script("return getComputedStyle(document.querySelector('.token bdi')).unicodeBidi") == "isolate"
    )
    assert HOSTILE[0] + " 0" in texts(browser, ".sentences button")


def test_a_head_is_picked_and_its_numbers_are_those_of_the_record(browser: webdriver.Chrome, run: Path) -> None:
    choose(browser, "Layer", 2)
    choose(browser, "Head", 3)
    assert browser.find_element(By.ID, "picked").text == "Layer 2, head 3"
    for place, model in enumerate(("dense", "sparse")):
        panel = browser.find_elements(By.CSS_SELECTOR, "#attention figure.detail")[place]
        token = panel.find_elements(By.CSS_SELECTOR, ".token")[4]
        ActionChains(browser).move_to_element(token).perform()
        assert token.get_attribute("aria-pressed") == "true"
        reads = panel.find_element(By.CSS_SELECTOR, "tr td").text
        wanted = {key: weight(run, model, 2, 3, 4, key) for key in range(5)}
        largest = max(wanted, key=lambda key: wanted[key])
        assert f" {largest}: {wanted[largest]:.3f}" in reads if wanted[largest] >= 0.001 else reads == "nothing"
    choose(browser, "Prompt", 1)
    assert len(texts(browser, "#attention figure.detail:first-of-type .token")) == 3


def test_the_matrix_says_what_stands_under_the_mouse(browser: webdriver.Chrome, run: Path) -> None:
    canvas = browser.find_elements(By.CSS_SELECTOR, "canvas.matrix")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    cell = (canvas.size["height"] - 1) / 10
    middle_x, middle_y = canvas.size["width"] / 2, canvas.size["height"] / 2
    offset = round(1.5 * cell - middle_x), round(6.5 * cell - middle_y)
    ActionChains(browser).move_to_element_with_offset(canvas, *offset).perform()
    says = browser.find_elements(By.CSS_SELECTOR, "#attention output")[0].text
    assert "(6) reads" in says
    assert f"(1): {weight(run, 'dense', 0, 0, 6, 1):.3f}" in says


def test_where_the_matrix_is_shown_smaller_it_still_says_what_stands_under_the_mouse(
    browser: webdriver.Chrome,
) -> None:
    metrics = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    choose(browser, "Prompt", 2)
    canvas = browser.find_elements(By.CSS_SELECTOR, "canvas.matrix")[0]
    drawn = browser.execute_script("return parseFloat(arguments[0].style.width)", canvas)
    assert canvas.size["width"] < drawn
    assert canvas.size["width"] == pytest.approx(canvas.size["height"], abs=1)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    cell = canvas.size["width"] / 90
    for query, key in ((88, 80), (60, 20)):
        offset = (round((place + 0.5) * cell - canvas.size["width"] / 2) for place in (key, query))
        ActionChains(browser).move_to_element_with_offset(canvas, *offset).perform()
        says = browser.find_elements(By.CSS_SELECTOR, "#attention output")[0].text
        assert f"({query}) reads" in says
        assert f"({key}):" in says


def test_all_of_it_works_from_the_keyboard(browser: webdriver.Chrome) -> None:
    overview = browser.find_element(By.CSS_SELECTOR, "canvas.overview")
    browser.execute_script("arguments[0].focus()", overview)
    overview.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.find_element(By.ID, "picked").text == "Layer 1, head 2"
    first = browser.find_elements(By.CSS_SELECTOR, "#attention .token")[0]
    browser.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_RIGHT)
    active = browser.switch_to.active_element
    assert active.get_attribute("data-place") == "1"
    assert active.value_of_css_property("outline-style") != "none"
    assert browser.execute_script(
        "const all = [...document.querySelectorAll('select, canvas.overview, button, summary, a')];"
        "return all.every((e) => e.tabIndex >= 0)"
    )


def test_sentences_and_circuits_are_stepped_through(browser: webdriver.Chrome) -> None:
    def press(section: str, name: str) -> None:
        browser.find_element(By.XPATH, f"//section[@id='{section}']//button[contains(., '{name}')]").click()

    press("findings", "next")
    current = browser.find_elements(By.CSS_SELECTOR, ".sentences button[aria-current='true']")
    assert [button.text[-1] for button in current] == ["1"]
    assert "1.2500" in browser.find_element(By.ID, "findings").text
    press("circuit-hostile", "next")
    press("circuit-hostile", "next")
    says = browser.find_element(By.CSS_SELECTOR, "#circuit-hostile output").text
    assert "2 of 2: layer 2 head 0" in says
    assert "0.25" in says


def test_the_window_may_be_narrow(browser: webdriver.Chrome) -> None:
    for width in (1280, 400):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_light_and_dark(browser: webdriver.Chrome) -> None:
    button = browser.find_element(By.ID, "theme")
    colours = []
    for _ in range(2):
        button.click()
        colours.append(browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
    assert button.text == "Theme: dark"
    assert len(set(colours)) == 2


def test_the_page_asks_for_nothing_and_is_small(run: Path) -> None:
    text = write_report(run).read_text()
    assert "http://www.w3.org/2000/svg" in text
    assert text.replace("http://www.w3.org/2000/svg", "").count("://") == 0
    assert len(text) < 200_000
    for part in (HOSTILE[0], HOSTILE[1]):
        assert part not in text


def test_the_attention_of_the_record_is_the_models_own(run: Path) -> None:
    """Dense: the attention that transformers computes. Sparse: the open links by the definition."""
    model = tiny_model("llama").eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(10)[None], output_attentions=True).attentions
    record = json.loads((run / "attention.json").read_text())
    from gossamer.report.plots import attention_weights

    found = torch.tensor(attention_weights(record, 0, "dense"))
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=0.5 / 255 + 1e-6)
    sparse = torch.tensor(attention_weights(record, 0, "sparse"))
    gated = gossamer.add_gates(tiny_model("llama"), gate_bias=-0.5).eval()
    with torch.no_grad(), gossamer.counted_links(gated) as counts:
        gated(input_ids=torch.arange(10)[None])
    opened = torch.stack([layer.open_links for layer in counts.values()]).sum()
    assert record["prompts"][0]["models"]["sparse"]["open"] == int(opened)
    assert 0 < int((sparse > 0).sum()) <= int(opened)


def test_a_circuit_of_very_many_links_is_drawn_in_part_and_says_so(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "circuits" / "hostile" / "links.json"
    record = json.loads(file.read_text())
    links = [[i % 3, i % 4, 9, i % 10, (i + 1) / 1e6] for i in range(241_200)]
    record["models"]["dense"] = {"size": 241_200, "links": links}
    file.write_text(json.dumps(record))
    with opened(write_report(copy)) as driver:
        shown = texts(driver, "#circuit-hostile output")
        assert shown[0].startswith("the 2,000 strongest of 241,200 links on this prompt are shown")
        assert shown[1].startswith("2 links on this prompt")
        assert len(driver.find_elements(By.CSS_SELECTOR, "#circuit-hostile figure:first-child path")) == 2_000
        assert driver.find_elements(By.CSS_SELECTOR, "section[id^='faithfulness']")
