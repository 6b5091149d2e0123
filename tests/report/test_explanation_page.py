"""The page of an explanation in a real browser, with tokens that would be harmful as markup."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

import gossamer
from browser import opened
from families import tiny_model
from gossamer.explanations.config import ExplainConfig
from gossamer.explanations.explain import explain_prediction
from gossamer.explanations.prediction import Prediction
from gossamer.explanations.record import explanation_record
from gossamer.report.html import explanation_page

HOSTILE = [
    "<script>document.title='harmed'</script>",
    "<img src=x onerror=document.title='harmed'>",
    "</script>",
    "&lt;",
]


class Words:
    """A minimal tokenizer for the record: token i is the i-th text."""

    def decode(self, ids: list[int]) -> str:
        return HOSTILE[ids[0] % len(HOSTILE)]


@pytest.fixture(scope="module")
def record() -> dict:
    dense = tiny_model("llama")
    sparse = gossamer.add_gates(dense, gate_bias=0.5)
    prediction = Prediction(tuple(range(5, 12)), 20)
    found, beside = (
        explain_prediction(model, prediction, config=ExplainConfig(share=0.95)) for model in (sparse, dense)
    )
    return explanation_record(found, Words(), model="<b>tiny", dense=beside)  # type: ignore[arg-type]


@pytest.fixture
def browser(record: dict, tmp_path: Path) -> Iterator[webdriver.Chrome]:
    page = tmp_path / "explain.html"
    page.write_text(explanation_page(record), encoding="utf-8")
    with opened(page) as driver:
        yield driver
        assert driver.title == "gossamer: <b>tiny"


def text(browser: webdriver.Chrome, selector: str) -> str:
    return str(browser.find_element(By.CSS_SELECTOR, selector).get_attribute("textContent"))


def test_every_link_is_drawn_and_described(browser: webdriver.Chrome, record: dict) -> None:
    assert len(browser.find_elements(By.CSS_SELECTOR, "#links svg path")) == record["size"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#dense svg path")) == record["dense"]["size"]
    assert text(browser, "#prediction .tile b") == f"{record['size']:,}"
    buttons = browser.find_elements(By.CSS_SELECTOR, "#links .sentences button")
    assert len(buttons) == len(record["details"])
    detail = record["details"][-1]
    layer, head, _, _ = detail["link"]
    buttons[-1].click()
    said = text(browser, "#links .pair > div:last-child")
    assert f"layer {layer} head {head}: " in said
    assert f"gate logit {detail['gate']:.2f}" in said
    assert detail["pairs"][0]["query"] in said
    assert buttons[-1].get_attribute("aria-current") == "true"
    assert not browser.find_elements(By.CSS_SELECTOR, "main img, main script")


def test_the_slider_shows_the_set_of_a_share(browser: webdriver.Chrome, record: dict) -> None:
    shares = sorted(record["shares"], key=float)
    for at in (0, len(shares) - 1):
        browser.execute_script(
            "const s = document.querySelector('#links input[type=range]'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('input'));", at,
        )  # fmt: skip
        of_share = record["shares"][shares[at]]
        assert text(browser, "#links output").startswith(f"{of_share['size']} links keep")
        assert len(browser.find_elements(By.CSS_SELECTOR, "#links svg path")) == of_share["size"]


def test_tokens_that_no_link_touches_are_folded(browser: webdriver.Chrome, record: dict) -> None:
    touched = {place for link in record["links"] for place in link[2:]} | {len(record["tokens"]) - 1}
    before = len(browser.find_elements(By.CSS_SELECTOR, "#links svg text[transform]"))
    assert before == len(record["tokens"])
    browser.find_element(By.CSS_SELECTOR, "#links input[type=checkbox]").click()
    labels = [found.text for found in browser.find_elements(By.CSS_SELECTOR, "#links svg text[transform]")]
    assert len([label for label in labels if label != "…"]) == len(touched)


def test_the_page_needs_nothing_from_elsewhere(record: dict) -> None:
    page = explanation_page(record)
    assert page.count("http") == page.count("http://www.w3.org/2000/svg") + page.count("http-equiv")
    assert json.dumps(record["tokens"][0]) not in page
