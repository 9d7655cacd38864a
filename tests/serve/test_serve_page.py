"""The chat page in headless Chromium, driven through chromedriver's own protocol."""

import json
import shutil
import socket
import subprocess

import httpx
import pytest
from live_server import SCRIPTS, TOKENIZER, scripted_pick, serving, wait_for

from minimind_fast.serve import batch as serve_batch

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(DRIVER is None, reason="needs chromedriver and Chromium (Debian: chromium-driver)")
HOSTILE = "<img src=x onerror=\"document.title='pwned'\"> <b>bold</b> & <script>document.title='pwned'</script>"


class Browser:
    """A few words of WebDriver."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)
        switches = [
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--window-size=1100,800",
        ]
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": switches}}}}
        self.session = ""
        self.session = "/session/" + self.call("/session", wanted)["sessionId"]

    def call(self, path, body):
        reply = self.http.post(self.session + path, json=body).json()
        assert not (isinstance(reply["value"], dict) and "error" in reply["value"]), reply
        return reply["value"]

    def run(self, script, *arguments):
        """JavaScript in the page; returns its value."""
        return self.call("/execute/sync", {"script": script, "args": list(arguments)})

    def go(self, url):
        self.call("/url", {"url": url})

    def say(self, text):
        """Type and press Enter, as a user does."""
        found = self.call("/element", {"using": "css selector", "value": "#text"})
        self.call(f"/element/{next(iter(found.values()))}/value", {"text": text + "\n"})

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)", selector)

    def wait_idle(self):
        wait_for(lambda: self.run("return document.querySelector('#stop').hidden"))

    def click(self, selector):
        self.run("document.querySelector(arguments[0]).click()", selector)

    def set(self, selector, value):
        self.run(
            "const n = document.querySelector(arguments[0]); n[n.type === 'checkbox' ? 'checked' : 'value'] = arguments[1];"
            "n.dispatchEvent(new Event('input', { bubbles: true }))",
            selector,
            value,
        )


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_batch, "pick", scripted_pick)
        with serving() as running:
            yield running


@pytest.fixture(scope="module")
def driver():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        browser = Browser(f"http://127.0.0.1:{port}")
        yield browser
        browser.http.delete(browser.session)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def page(driver, server, monkeypatch):
    """The page, empty; `say` makes the model answer with a script."""
    driver.go(server[0])
    driver.run("localStorage.clear(); sessionStorage.clear()")
    driver.go(server[0])
    wait_for(lambda: driver.texts("#model") == ["tiny"])
    asked = []
    job = server[1].job

    def scripted(ask, prompt, client):
        asked.append(ask)
        made = job(ask, prompt, client)
        made.seed = 9000
        return made

    monkeypatch.setattr(server[1], "job", scripted)
    driver.asked = asked
    return driver


def script(text):
    SCRIPTS[9000] = [*TOKENIZER.encode(text), TOKENIZER.eos_id]


def test_an_answer_streams_in_and_no_text_is_read_as_html(page):
    script(HOSTILE)
    page.set("#system", "Be kind.")
    page.set("#temperature", "0.3")
    page.say("Hi <b>you</b>")
    page.wait_idle()
    assert page.texts(".turn.user .body") == ["Hi <b>you</b>"]
    assert page.texts(".turn.assistant .body") == [HOSTILE]
    assert page.run("return [document.title, document.querySelectorAll('#log img, #log b, #log script').length]") == [
        "tiny",
        0,
    ]
    assert "tokens" in page.texts(".note")[0]
    ask = page.asked[0]
    assert (ask.messages[0], ask.sampling.temperature) == ({"role": "system", "content": "Be kind."}, 0.3)
    assert [m["role"] for m in ask.messages] == ["system", "user"]


def test_history_stays_after_a_reload_and_goes_along_with_the_next_question(page, server):
    script("First answer.")
    page.say("One")
    page.wait_idle()
    page.go(server[0])
    assert page.texts(".turn .body") == ["One", "First answer."]
    page.say("Two")
    page.wait_idle()
    assert [m["content"] for m in page.asked[-1].messages] == ["One", "First answer.", "Two"]
    page.click("#new")
    assert page.texts(".turn") == []
    page.say("Other")
    page.wait_idle()
    assert page.texts("#chats .title") == ["Other", "One"]
    page.click("#chats div:nth-child(2) .title")
    assert page.texts(".turn.user .body") == ["One", "Two"]
    page.click("#chats div:nth-child(2) button:last-child")
    assert page.texts("#chats .title") == ["Other"]


def test_stop_ends_the_answer_and_frees_the_row(page, server, monkeypatch):
    turn = serve_batch.Batcher._turn
    pause = __import__("threading").Event()
    monkeypatch.setattr(serve_batch.Batcher, "_turn", lambda self: (turn(self), pause.wait(0.02)))
    SCRIPTS[9000] = [TOKENIZER.encode(" word")[0]] * 300
    page.set("#max-tokens", "200")
    page.say("Go on for ever")
    wait_for(lambda: len("".join(page.texts(".turn.assistant .body"))) > 10)
    page.click("#stop")
    page.wait_idle()
    wait_for(lambda: server[1].batcher.running == 0, 2)
    assert page.texts(".note") == ["stopped"]
    assert 10 < len(page.texts(".turn.assistant .body")[0]) < 900


def test_a_thought_is_folded_and_a_call_shown_and_answered(page):
    page.set("#thinking", True)
    page.set("#tools", json.dumps([{"name": "weather", "parameters": {"type": "object"}}]))
    script(
        'Rain?\n</think>\n\nLet me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    )
    page.say("Weather in Köln?")
    page.wait_idle()
    assert page.run("const d = document.querySelector('#log details'); return [d.open, d.textContent]") == [
        False,
        "ThoughtRain?",
    ]
    assert page.texts(".turn.assistant .body") == ["Let me see."]
    assert page.texts(".call") == ['weather({"city": "Köln"})']
    assert page.asked[0].thinking and page.asked[0].tools[0]["function"]["name"] == "weather"
    script("Wet.\n</think>\n\nIt rains.")
    page.set(".result input", "rain, 8 degrees")
    page.run("document.querySelector('.result').requestSubmit()")
    page.wait_idle()
    assert page.texts(".turn.assistant .body") == ["Let me see.", "It rains."]
    sent = page.asked[1].messages
    assert [m["role"] for m in sent] == ["user", "assistant", "tool"]
    assert sent[1]["reasoning_content"] == "Rain?" and sent[1]["tool_calls"][0]["function"]["name"] == "weather"
    assert sent[2]["content"] == "rain, 8 degrees"


def test_errors_are_shown(page):
    page.set("#max-tokens", "-5")
    page.say("Hi")
    page.wait_idle()
    assert page.texts(".error") == ["max_tokens must be between 1 and 2147483648, not -5"]
