"""The chat page in Chromium, against the scripted server: what a person does, and what the page then shows and asks."""

import re
import time

from driven_page import PHONE
from selenium.webdriver.common.keys import Keys


def test_an_answer_streams(page, server):
    """Its text grows while it comes, then it says how fast it was, and the page has asked nobody else."""
    page.asked()
    page.say("slow please", wait=False)
    lengths = [len(page.until(page.answer, "the first words"))]
    for _ in range(3):
        page.until(lambda: len(page.answer()) > lengths[-1], "more words")
        lengths.append(len(page.answer()))
    assert re.fullmatch(r"\d+\.\d tokens/s", page.all(".meta")[-1].text)
    page.click("Stop")
    page.answered()
    assert page.say("hello there") == "You said: hello there"
    assert re.fullmatch(r"5 tokens( · [\d.]+ tokens/s)?", page.all(".meta")[-1].text)
    request = server.requests[-1]
    assert request["stream"] is True and request["stream_options"] == {"include_usage": True}
    assert request["model"] == "deepseek-r1-small" and not set(request) & {"temperature", "top_p", "max_tokens"}
    assert {address.removeprefix(page.url).split("/")[0] for address in page.asked()} <= {"v1", "page"}


def test_stop_ends_the_request_and_keeps_the_text(page, server):
    closed = server.closed
    page.say("slow please", wait=False)
    page.until(lambda: "word3" in page.answer(), "some words")
    page.press(Keys.ESCAPE)
    text = page.answered()
    assert text.startswith("word0 word1") and len(text) < 1500
    page.until(lambda: server.closed == closed + 1, "the server sees the closed connection")
    assert "stopped" in page.all(".meta")[-1].text
    page.click("Continue")
    page.until(lambda: server.requests[-1].get("continue_final_message"), "the request to go on")
    request = server.requests[-1]
    assert request["add_generation_prompt"] is False
    assert request["messages"][-1]["role"] == "assistant" and request["messages"][-1]["content"].startswith("word0")
    page.answered()
    assert page.answer().startswith(text) and len(page.answer()) > len(text) and len(page.messages()) == 2


def test_regenerate_and_edit_keep_every_version(page, server):
    assert page.say("first") == "You said: first"
    page.say("second")
    page.click("Answer again")
    page.answered()
    assert page.one(".message:last-child .versions").text == "2/2"
    page.click("Edit message", ".message.user:first-child")
    area = page.one(".editor textarea")
    area.clear()
    area.send_keys("changed", Keys.ENTER)
    page.until(lambda: page.messages() == ["changed", "You said: changed"], "the edited branch")
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["changed"]
    page.click("Previous version", ".message.user")
    assert page.messages() == ["first", "You said: first", "second", "You said: second"]
    page.reload()
    assert page.messages() == ["first", "You said: first", "second", "You said: second"]
    page.click("Next version", ".message.user")
    assert page.messages() == ["changed", "You said: changed"]


def test_an_edit_can_be_given_up(page, server):
    page.say("first")
    page.click("Edit message")
    page.one(".editor textarea").send_keys(" more", Keys.ESCAPE)
    assert page.messages() == ["first", "You said: first"] and len(server.requests) == 1


def test_a_reload_keeps_what_there_was(page):
    """Also of an answer that was not finished."""
    page.say("hello")
    page.say("slow please", wait=False)
    page.until(lambda: "word5" in page.answer(), "some words")
    page.reload()
    assert page.messages()[:3] == ["hello", "You said: hello", "slow please"]
    assert page.answer().startswith("word0 word1") and "stopped" in page.all(".meta")[-1].text
    assert page.say("again") == "You said: again"


def test_conversations_are_listed_found_renamed_and_deleted(page):
    for text in ("apples and pears", "the sea"):
        page.say(text)
        page.press(Keys.ALT, "n")
    titles = lambda: [each.text for each in page.all(".row .open")]  # noqa: E731
    assert titles() == ["the sea", "apples and pears"] and page.one("#empty").is_displayed()
    page.one("#search").send_keys("PEAR")
    assert titles() == ["apples and pears"]
    page.one(".row .open").click()
    assert page.messages()[0] == "apples and pears"
    page.click("Rename apples and pears")
    page.driver.switch_to.active_element.send_keys(Keys.CONTROL, "a")
    page.driver.switch_to.active_element.send_keys("pears of fruit", Keys.ENTER)
    assert titles() == ["pears of fruit"]
    page.one("#search").clear()
    page.one("#search").send_keys(Keys.BACKSPACE)
    page.click("Delete pears of fruit")
    assert titles() == ["the sea"] and len(page.kept()) == 1 and page.one("#empty").is_displayed()
    page.click("Undo")
    assert sorted(titles()) == ["pears of fruit", "the sea"] and len(page.kept()) == 2


def test_reasoning_is_folded_and_not_sent_again(page, server):
    answer = page.say("Think about it")
    assert answer.startswith("There are 46 of them")
    details = page.one("details.thoughts")
    assert details.get_attribute("open") is None
    assert re.match(r"Thought for [\d.]+ s", page.one("details summary").text)
    page.one("details summary").click()
    assert "Multiples of 5: 19." in details.text
    page.say("and now?")
    assert server.requests[-1]["messages"][1] == {
        "role": "assistant", "content": "There are **46** of them: $33 + 19 - 6 = 46$."}


def test_settings_reach_the_request(page, server):
    page.fill("temperature", "0.6")
    page.fill("top_p", "0.95")
    page.fill("top_k", "40")
    page.fill("max_tokens", "128")
    page.fill("seed", "7")
    page.fill("stop_texts", "User:\n\\n\\n")
    page.fill("system", "Be brief.")
    page.script("const s = document.getElementById('thinking'); s.value = 'off'; s.dispatchEvent(new Event('input'))")
    page.say("hello")
    request = server.requests[-1]
    assert {name: request[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "stop")} == {
        "temperature": 0.6, "top_p": 0.95, "top_k": 40, "max_tokens": 128, "seed": 7, "stop": ["User:", "\n\n"]}
    assert request["chat_template_kwargs"] == {"thinking": False}
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    page.reload()
    page.say("hello")
    assert server.requests[-1] | {"messages": 0} == request | {"messages": 0}


def test_a_wrong_setting_is_told_and_nothing_is_sent(page, server):
    page.fill("temperature", "3")
    page.write("hello")
    page.click("Send")
    assert "temperature: 3 is not between 0 and 2" in page.one("#settings").text and not server.requests
    page.click("Reset")
    page.click("Close", "#settings")
    page.click("Send")
    page.until(lambda: page.messages()[1:] == ["You said: hello"], "the answer to what was written")


def test_errors_can_be_read_and_tried_again(page, server):
    page.say("busy now")
    problem = page.one(".problem").text
    assert "64 requests are waiting already." in problem and "wait 7 s" in problem
    page.say("broken soon")
    assert page.answer() == "This answer will fail in the mid"
    assert "The engine stopped." in page.all(".problem")[-1].text
    page.say("cut soon")
    assert "The connection ended before the answer did." in page.all(".problem")[-1].text
    page.say("refused")
    assert "temperature: -1 is below 0." in page.all(".problem")[-1].text
    asked = len(server.requests)
    page.click("Try again")
    page.until(lambda: len(server.requests) == asked + 1, "another request")
    page.answered()
    assert len(page.all(".problem:not([hidden])")) == 4


def test_a_server_that_is_gone_is_told(page, server):
    page.script("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.say("hello")
    assert "The server does not answer." in page.one(".problem").text


def test_an_api_key_is_asked_for_and_used(page, server):
    server.key = "secret key"
    try:
        page.reload()
        page.until(lambda: "wants an API key" in page.one("#notices").text, "the notice")
        page.click("Enter key")
        page.until(lambda: page.driver.switch_to.active_element.get_attribute("id") == "api-key", "the focus")
        page.driver.switch_to.active_element.send_keys("secret key", Keys.TAB)
        page.until(lambda: page.script("return document.getElementById('model').value"), "the models")
        page.click("Close", "#settings")
        assert page.say("hello") == "You said: hello"
        assert not page.script("return localStorage.getItem('api-key')"), "kept beyond the tab without being told to"
    finally:
        server.key = None
    page.faults("status of 401")


def test_another_model_is_chosen_and_remembered(page, server):
    page.one("#model option:nth-child(2)").click()
    page.say("hello")
    page.reload()
    page.say("hello")
    assert [request["model"] for request in server.requests] == ["deepseek-v3.1-small"] * 2


def test_keyboard_alone(page, server):
    """From the address bar to an answer, its copy button, an edit and the settings, without a pointer."""
    page.press(Keys.SHIFT, Keys.ENTER)
    page.press("h")
    page.press(Keys.ENTER)
    page.until(lambda: page.answered() == "You said:\nh", "an answer")
    focused = lambda: page.driver.switch_to.active_element  # noqa: E731
    assert focused().get_attribute("id") == "composer-text"
    page.press(Keys.ARROW_UP)
    assert focused().get_attribute("aria-label") == "Edit message"
    page.press("!")
    page.press(Keys.ENTER)
    page.until(lambda: page.answer() == "You said:\nh!", "the edited answer")
    seen = []
    for _ in range(40):
        page.press(Keys.SHIFT, Keys.TAB)
        seen.append(focused().get_attribute("aria-label") or focused().get_attribute("id") or focused().text)
    assert {"Answer again", "Copy answer", "Edit message", "Previous version", "new-chat", "model"} <= set(seen)
    page.press(Keys.ALT, "s")
    assert page.one("#settings").is_displayed()
    page.press(Keys.ESCAPE)
    assert not page.one("#settings").is_displayed()
    page.script("document.activeElement.blur()")
    page.press("?")
    assert page.one("#keys").is_displayed()
    page.press(Keys.ESCAPE)
    page.press("/")
    assert focused().get_attribute("id") == "composer-text"


def test_everything_that_can_be_operated_has_a_name(page):
    """By Chromium's own accessibility tree, with an answer, its code, a version and an edit on the page."""
    page.say("Show everything")
    page.click("Answer again")
    page.answered()
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nameless = [node["role"]["value"] for node in nodes if not node.get("ignored") and node["role"]["value"] in (
        "button", "textbox", "combobox", "checkbox", "link", "searchbox", "radio", "dialog", "meter", "region", "log")
        and not node.get("name", {}).get("value")]
    assert not nameless
    roles = {node["role"]["value"] for node in nodes}
    assert {"complementary", "main", "log", "navigation", "heading", "status"} <= roles
    names = {node.get("name", {}).get("value") for node in nodes if node["role"]["value"] == "region"}
    assert {"Messages", "Table"} <= names
    said = page.script("return document.getElementById('status').textContent")
    assert said.startswith("Answer: A number is **prime**")


def test_an_answer_that_grows_keeps_finished_blocks_and_does_not_pull_the_reader(page):
    page.say("Show everything")
    first = page.one(".answer > *")
    page.script("document.getElementById('scroller').scrollTop = 0")
    time.sleep(0.1)
    page.say("slow please", wait=False)
    page.until(lambda: "word20" in page.answer(), "some words")
    page.script("document.getElementById('scroller').scrollTop = 0")
    page.until(lambda: "word40" in page.answer(), "more words")
    assert page.script("return document.getElementById('scroller').scrollTop") == 0
    page.click("To the end")
    page.until(lambda: page.script("const s = document.getElementById('scroller');"
                                   "return s.scrollHeight - s.scrollTop - s.clientHeight < 60"), "the end")
    page.click("Stop")
    page.answered()
    assert first.is_displayed() is not None  # the same element, not a stale one


def test_phone(page, server):
    """Nothing is wider than the screen, the list comes over the page, and Enter is a line."""
    page.open(PHONE)
    page.say("Show everything")
    assert page.script("return document.documentElement.scrollWidth") <= PHONE[0]
    assert page.script("const s = document.getElementById('scroller'); return s.scrollWidth - s.clientWidth") <= 0
    wide = page.script("""return [...document.querySelectorAll('.code-block pre, .table-scroll')].filter(
        e => e.scrollWidth > e.clientWidth).map(e => getComputedStyle(e).overflowX)""")
    assert wide and set(wide) == {"auto"}, "cut off"
    page.write("one" + Keys.ENTER + "two")
    assert page.one("#composer-text").get_attribute("value") == "one\ntwo" and len(server.requests) == 1
    page.click("List of conversations")
    page.until(lambda: page.one("#new-chat").is_displayed(), "the list")
    page.one("#new-chat").click()
    small = page.script("""return [...document.querySelectorAll('button, select')].filter(e => e.offsetWidth && (
        e.getBoundingClientRect().width < 24 || e.getBoundingClientRect().height < 24)).map(e => e.outerHTML)""")
    assert not small, "too small to be touched"
