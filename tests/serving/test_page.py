"""The web page in Chromium: most tests use a stand-in for the server, the last one the server itself.

This needs the package playwright from PyPI, and Debian's chromium-headless-shell or chromium.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.stand_in import StandIn, event_of, job_of

api = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
BASE, TONE = "smollm2", "tone"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[StandIn]:
    made = StandIn()
    made.models = [BASE, TONE]
    made.answers = {BASE: ["I am ", "the base."], TONE: ["Aye, ", "I am **the tone**."]}
    with made.running():
        yield made


@contextlib.contextmanager
def new_page(browser: Any, url: str) -> Iterator[Any]:
    """A page that has no errors and loads nothing from elsewhere."""
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    page = context.new_page()
    page.set_default_timeout(10_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    foreign: list[str] = []
    page.on("request", lambda request: request.url.startswith(url) or foreign.append(request.url))
    yield page
    context.close()
    assert not problems
    assert not foreign


@pytest.fixture
def page(browser: Any, server: StandIn) -> Iterator[Any]:
    with new_page(browser, server.url) as made:
        yield made


def opened(page: Any, server: StandIn) -> Any:
    page.goto(server.url)
    page.locator("#model option").first.wait_for(state="attached")
    return page


def ask(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def answers(page: Any, count: int) -> list[str]:
    """The texts of the answers, as soon as this many have ended."""
    page.locator(".message.assistant .note").nth(count - 1).wait_for()
    return [str(text) for text in page.locator(".message.assistant .body").all_inner_texts()]


# ---- the chat ----


def test_the_first_adapter_answers_and_the_chat_goes_on(page: Any, server: StandIn) -> None:
    opened(page, server)
    assert page.input_value("#model") == TONE
    ask(page, "Who are you?")
    assert answers(page, 1) == ["Aye, I am the tone."]
    assert page.locator(".message.assistant strong").inner_text() == "the tone"
    ask(page, "Again?")
    answers(page, 2)
    first, second = server.requests
    assert first["model"] == TONE
    assert first["stream"] is True
    assert [message["content"] for message in second["messages"]] == [
        "Who are you?",
        "Aye, I am **the tone**.",
        "Again?",
    ]
    page.reload()
    assert len(answers(page, 2)) == 2  # the browser keeps the chat
    page.click("#new-chat")
    assert page.locator(".message").count() == 0


def test_base_and_adapter_answer_side_by_side(page: Any, server: StandIn) -> None:
    opened(page, server)
    page.locator(".switch").click()
    assert page.input_value("#other") == BASE
    ask(page, "Who are you?")
    assert answers(page, 2) == ["Aye, I am the tone.", "I am the base."]
    ask(page, "Again?")
    answers(page, 4)
    contents = {
        request["model"]: [m["content"] for m in request["messages"]] for request in server.requests[2:]
    }
    assert contents == {
        TONE: ["Who are you?", "Aye, I am **the tone**.", "Again?"],
        BASE: ["Who are you?", "I am the base.", "Again?"],
    }


def test_settings_reach_the_request_and_last(page: Any, server: StandIn) -> None:
    opened(page, server)
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "77")
    page.fill("#seed", "5")
    page.keyboard.press("Escape")
    page.reload()
    ask(page, "Hi")
    answers(page, 1)
    request = server.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (request["temperature"], request["max_tokens"], request["seed"]) == (0, 77, 5)
    assert "top_p" not in request


def test_a_running_answer_is_stopped(page: Any, server: StandIn) -> None:
    server.answers[TONE], server.pause = ["word "] * 2000, 0.01
    opened(page, server)
    ask(page, "Hi")
    page.locator(".message.assistant .body", has_text="word word").wait_for()
    page.click("#send")
    assert len(answers(page, 1)[0].split()) < 2000
    assert page.locator(".note").inner_text() == "stopped"
    server.answers[TONE], server.pause = ["done"], 0
    ask(page, "More")
    assert answers(page, 2)[1] == "done"


def test_an_answer_brings_no_html_into_the_page(page: Any, server: StandIn) -> None:
    hostile = (
        "<img src=x onerror=alert(1)> **<b>** [x](javascript:alert(1)) `<i>`\n"
        "```js\n<script>alert(1)</script>\n```\n# <u>"
    )
    server.answers[TONE] = [hostile]
    opened(page, server)
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    ask(page, "<img src=y>")
    text = answers(page, 1)[0]
    assert "<img src=x onerror=alert(1)>" in text
    assert "<script>alert(1)</script>" in text
    assert (
        page.locator(".message img, .message script, .message b, .message i, .message u, .message a").count()
        == 0
    )


@pytest.mark.parametrize("text", [">" * 8000 + " deep", "> " * 8000 + "deep", "**" * 4000, "[" * 4000])
def test_deeply_nested_markdown_is_shown_and_the_next_message_works(
    page: Any, server: StandIn, text: str
) -> None:
    server.answers[TONE] = [text]
    opened(page, server)
    ask(page, "Hi")
    assert answers(page, 1)[0]
    assert page.locator(".message blockquote").count() <= 8
    server.answers[TONE] = ["fine"]
    ask(page, "More")
    assert answers(page, 2)[1] == "fine"


def test_an_answer_that_cannot_be_drawn_is_shown_as_plain_text(page: Any, server: StandIn) -> None:
    opened(page, server)
    page.evaluate("() => { document.createDocumentFragment = () => { throw new RangeError('stack'); }; }")
    ask(page, "Hi")
    assert answers(page, 1) == ["Aye, I am **the tone**."]
    ask(page, "More")
    answers(page, 2)


def test_both_columns_have_the_same_messages_when_compare_is_switched_on(page: Any, server: StandIn) -> None:
    opened(page, server)
    ask(page, "Who are you?")
    answers(page, 1)
    page.locator(".switch").click()
    assert page.locator(".column").nth(1).locator(".message").count() == 2
    ask(page, "Again?")
    answers(page, 4)
    contents = [[m["content"] for m in request["messages"]] for request in server.requests[1:]]
    assert contents == [["Who are you?", "Aye, I am **the tone**.", "Again?"]] * 2


def test_compare_during_an_answer_stops_it(page: Any, server: StandIn) -> None:
    server.answers[TONE], server.pause = ["word "] * 2000, 0.01
    opened(page, server)
    ask(page, "Hi")
    page.locator(".message.assistant .body", has_text="word word").wait_for()
    page.locator(".switch").click()
    page.locator("#send:not(.running)").wait_for()
    server.answers, server.pause = {BASE: ["one"], TONE: ["two"]}, 0
    ask(page, "More")
    page.locator(".column").nth(0).locator(".body", has_text="two").wait_for()
    page.locator(".column").nth(1).locator(".body", has_text="one").wait_for()
    assert page.locator(".dots").count() == 0


def test_an_error_is_shown_and_the_next_message_works(page: Any, server: StandIn) -> None:
    del server.answers[TONE]
    opened(page, server)
    ask(page, "Hi")
    page.locator(".note.error", has_text="no answer from tone").wait_for()
    server.answers[TONE] = ["fine"]
    ask(page, "Hi again")
    assert answers(page, 2)[1] == "fine"
    assert [m["content"] for m in server.requests[1]["messages"]] == ["Hi again"]


def test_the_longest_answer_of_the_settings_is_at_most_that_of_the_server(page: Any, server: StandIn) -> None:
    opened(page, server)
    ask(page, "Hi")
    answers(page, 1)
    server.most_tokens = 100
    page.reload()
    ask(page, "Hi again")
    answers(page, 2)
    assert [request["max_tokens"] for request in server.requests] == [512, 100]


def test_a_key_is_asked_for(page: Any, server: StandIn) -> None:
    server.key = "secret"
    page.goto(server.url)
    page.locator("#notice", has_text="needs an API key").wait_for()
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.locator("#model option").first.wait_for(state="attached")
    assert not page.locator("#notice").is_visible()


def test_a_server_without_jobs_has_only_the_chat(page: Any, server: StandIn) -> None:
    opened(page, server)
    ask(page, "Hi")
    answers(page, 1)
    assert not page.locator("#show-training").is_visible()


# ---- training ----


def test_the_loss_of_a_job_is_drawn_and_its_adapter_is_chosen(page: Any, server: StandIn) -> None:
    server.jobs = [job_of("ftjob-1", user_provided_suffix="mine")]
    steps = [
        event_of(step, f"step {step}", step=step, total_steps=200, train_loss=4 - step / 100)
        for step in range(1, 101)
    ]
    valid = event_of(500, "validation", step=100, total_steps=200, full_valid_loss=3.25)
    server.events["ftjob-1"] = [valid, *steps[::-1], event_of(0, "Job started")]
    opened(page, server)
    page.click("#show-training")
    page.locator("#chart path.train").first.wait_for()
    assert page.locator("#job-state").inner_text().split() == ["running", "step", "100", "of", "200"]
    assert page.locator("#chart figcaption").inner_text().split("\n") == [
        "training loss 3.000",
        "validation loss 3.250",
    ]
    drawn = page.locator("#chart path.train.each").get_attribute("d")
    assert len(re.findall("[ML]", drawn)) == 100  # from several pages of events
    assert page.locator("#events li").all_inner_texts()[0].endswith("Job started")
    server.jobs[0] |= {"status": "succeeded", "fine_tuned_model": "mine"}
    server.models.append("mine")
    server.answers["mine"] = ["trained"]
    page.click("#try")
    api.expect(page.locator("#model")).to_have_value("mine")
    ask(page, "Hi")
    assert answers(page, 1) == ["trained"]


def test_a_job_is_started_and_cancelled(page: Any, server: StandIn, tmp_path: Path) -> None:
    server.jobs = []
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n')
    opened(page, server)
    page.click("#show-training")
    page.set_input_files("#data", tmp_path / "train.jsonl")
    page.fill("#suffix", "mine")
    page.fill("#epochs", "3")
    page.click("#new-job button")
    page.locator("#jobs .state.queued").wait_for()
    given = server.jobs[0]["given"]
    assert (given["model"], given["training_file"], given["suffix"]) == (BASE, "file-1", "mine")
    assert given["method"]["supervised"]["hyperparameters"] == {"n_epochs": 3}
    assert b'{"messages": []}' in server.uploads[0]
    page.click("#cancel")
    page.locator("#jobs .state.cancelled").wait_for()


def looks(page: Any) -> list[str]:
    """The list of requests for jobs, which grows."""
    found: list[str] = []
    page.on("request", lambda request: "jobs?limit" in request.url and found.append(request.url))
    return found


def test_jobs_are_not_asked_for_while_the_chat_is_shown(page: Any, server: StandIn) -> None:
    server.jobs = [job_of("ftjob-1")]
    opened(page, server)
    page.clock.install()
    server.delay = 0.2
    found = looks(page)
    page.click("#show-training")
    page.click("#show-chat")  # the first look has not ended
    page.wait_for_timeout(700)
    count = len(found)
    for _ in range(3):
        page.clock.run_for(3000)
        page.wait_for_timeout(50)
    assert len(found) == count


def test_only_one_loop_asks_for_jobs(page: Any, server: StandIn) -> None:
    server.jobs = [job_of("ftjob-1")]
    opened(page, server)
    page.clock.install()
    server.delay = 0.2
    for _ in range(4):
        page.click("#show-training")
        page.click("#show-chat")
    page.click("#show-training")
    page.wait_for_timeout(700)
    server.delay = 0
    found = looks(page)
    for _ in range(3):
        page.clock.run_for(2100)
        page.wait_for_timeout(100)
    assert 1 <= len(found) <= 3


def test_an_error_of_a_look_goes_when_the_server_is_back(page: Any, server: StandIn) -> None:
    jobs = [job_of("ftjob-1")]
    server.jobs = jobs
    opened(page, server)
    page.clock.install()
    page.click("#show-training")
    page.locator("#job-state", has_text="running").wait_for()
    server.jobs = None
    page.clock.run_for(2100)
    page.locator("#job-error", has_text="no fine-tuning jobs").wait_for()
    server.jobs = jobs
    page.clock.run_for(2100)
    api.expect(page.locator("#job-error")).to_be_hidden()


@pytest.mark.parametrize(("width", "height"), [(360, 640), (390, 844), (820, 1180), (1440, 900)])
def test_the_page_fits_every_screen(page: Any, server: StandIn, width: int, height: int) -> None:
    server.jobs = [job_of("ftjob-" + "x" * 60)]
    wide = ["x" * 300, "\n\n```\n", "y" * 300, "\n```\n"]
    server.answers = {BASE: wide, TONE: wide}
    page.set_viewport_size({"width": width, "height": height})
    opened(page, server)
    page.locator(".switch").click()
    ask(page, "long" * 100)
    answers(page, 2)
    page.click("#show-training")
    for part in ("chat", "training"):
        page.click(f"#show-{part}")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("document.documentElement.scrollHeight") == height


def test_a_model_without_adapters_is_compared_with_nothing(page: Any, server: StandIn) -> None:
    server.models = [BASE]
    opened(page, server)
    assert page.input_value("#model") == BASE
    assert not page.locator(".switch").is_visible()


# ---- the server itself ----


@pytest.fixture
def real_server(tmp_path: Path) -> Iterator[str]:
    """The address of a server with the engine and fine-tuning jobs."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    pytest.importorskip("python_multipart")
    import live_server

    import nplora
    from nplora.serving import run
    from nplora.serving.api.app import Application
    from nplora.serving.api.models import Models
    from nplora.serving.api.service import TextService
    from nplora.serving.options import ServeOptions

    lm = nplora.load_model(live_server.save_model(tmp_path))
    models = Models(lm, "base")
    options = ServeOptions(jobs=str(tmp_path / "jobs"), memory="1G")
    with (
        run.running(lm, models, options) as (engine, jobs),
        live_server.running(Application(TextService(engine, models, jobs))) as url,
    ):
        assert jobs is not None
        jobs.start()
        yield url


def test_the_page_chats_with_the_server_trains_and_chats_with_the_new_adapter(
    browser: Any, real_server: str, tmp_path: Path
) -> None:
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 6)
    with new_page(browser, real_server) as page:
        page.goto(real_server)
        api.expect(page.locator("#model")).to_have_value("base")
        page.click("#open-settings")
        page.fill("#max-tokens", "5")
        page.keyboard.press("Escape")
        ask(page, "hello")
        page.locator(".message.assistant .note", has_text="tokens").wait_for()
        page.click("#show-training")
        page.set_input_files("#data", tmp_path / "rows.jsonl")
        page.fill("#suffix", "mine")
        page.fill("#epochs", "2")
        page.click("#new-job button")
        page.click("#try", timeout=60_000)
        api.expect(page.locator("#model")).to_have_value(re.compile("mine"))
        page.click("#new-chat")
        ask(page, "hello")
        page.locator(".message.assistant .note", has_text="tokens").wait_for()
        page.locator(".message.assistant .name", has_text="mine").wait_for()
        page.click("#show-training")
        assert page.locator("#chart path.train").count() > 0
        assert page.locator("#job-state .succeeded").count() == 1
