"""What a model writes: shown as markdown, never taken as markup; and conversations to files and back."""

import json
import re

import pytest
from markdown_it import MarkdownIt
from selenium.webdriver.common.by import By

ORDINARY = {
    "emphasis": "a *b* **c** ***d*** _e_ __f__ ~~g~~ a*b*c snake_case_name 2 * 3 * 4 **not closed",
    "nested emphasis": "**bold with *italic* inside** and *italic with **bold** inside*",
    "code spans": "`a` ``b ` c`` ` d ` `*not emphasis*` `not closed",
    "headings": "# One\n## Two ##\n###### Six\n####### seven\n#none",
    "paragraphs": "one\ntwo\n\nthree",
    "rules": "a\n\n---\n\n***\n\n- - -",
    "lists": "- a\n- b\n\n1. one\n2. two\n\n3) three\n4) four",
    "nested lists": "1. one\n   - a\n   - b\n     1. deep\n2. two\n\n   second paragraph\n3. three",
    "list after text": "Text:\n- a\n- b\nlazy\n\nEnd",
    "quotes": "> a\n> b\n>\n> c\n\n> > nested\n\n> - list\n> - in it",
    "fences": "```python\nx = '<b>'\n\n```\n\n~~~\n```\n~~~\n\n```\nnever closed",
    "fence in a list": "- item\n\n  ```sh\n  ls\n  ```\n- next",
    "links": '[a](https://e.org) [b **c**](https://e.org/x_(y) "title") <https://e.org/z>',
    "table": "| a | b | c |\n|:--|:-:|--:|\n| 1 | `2|` | **3** |\n| 4 |\n\nafter",
    "escapes": r"\*a\* \_b\_ \`c\` \# 1\. \\ \(y",
    "entities are text": "a < b & c > d &amp",
}
# Our page differs here on purpose: pictures are links, other schemes are text, HTML is text, $ and \( are formulas.


def ours(page, text: str) -> str:
    """Return the page's HTML of a text, without what it has for looks."""
    html = page.driver.execute_async_script("""
        const [text, done] = arguments;
        import(new URL('page/markdown.js', document.baseURI)).then(({showMarkdown}) => {
          const box = document.createElement('div');
          showMarkdown(box, text);
          box.querySelectorAll('.code-head').forEach(each => each.remove());
          const wrappers = box.querySelectorAll('.code-block, .table-scroll, pre code span');
          wrappers.forEach(each => each.replaceWith(...each.childNodes));
          done(box.innerHTML);
        }, error => done('failed: ' + error))""", text)
    return plain(html.replace("</code></pre>", "\n</code></pre>"))


def plain(html: str) -> str:
    """Return HTML without attributes that are not about meaning, and without spaces between tags."""
    html = re.sub(r"<(?!a )(\w+) [^>]*?>", lambda tag: f"<{tag[1]}>", html)
    html = re.sub(r'<a [^>]*?href="([^"]*)"[^>]*>', r"<a \1>", html).replace("<s>", "<del>").replace("</s>", "</del>")
    html = re.sub(r"<(br|hr) ?/?>", r"<\1>", html).replace("&quot;", '"')
    html = re.sub(r"<tbody></tbody>", "", html)
    return re.sub(r"\s*(</?(?:p|ul|ol|li|pre|h\d|hr|br|blockquote|table|thead|tbody|tr|th|td)>)\s*", r"\1", html
                  ).replace("\n</code>", "</code>")


@pytest.mark.parametrize("text", ORDINARY.values(), ids=ORDINARY)
def test_markdown_is_that_of_another_parser(page, text):
    parser = MarkdownIt("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"])
    assert ours(page, text) == plain(parser.render(text))


def test_hostile_text_stays_text(page, server):
    """Nothing of it runs, loads or links; what it says can be read."""
    page.asked()
    answer = page.say("hostile please")
    assert "The end of hostility." in answer and "<script>window.hacked = 1</script>" in answer
    assert page.script("return window.hacked") is None
    inside = page.all(".answer *")
    assert not {each.tag_name for each in inside} & {"script", "img", "iframe", "style", "svg/onload", "b", "details"}
    names = page.script("return [...document.querySelectorAll('.answer *')].flatMap(e => e.getAttributeNames())")
    assert not [name for name in names if name.startswith("on")]
    links = [each.get_attribute("href") for each in page.all(".answer a")]
    assert links and all(link.startswith(("http://127.0.0.1:9/spy", "https://example.org/")) for link in links)
    assert all(each.get_attribute("rel") == "noopener noreferrer nofollow" for each in page.all(".answer a"))
    assert not [address for address in page.asked() if not address.startswith(page.url)]
    page.press("x")
    assert page.script("return window.hacked") is None


def test_a_user_and_a_title_are_text_too(page):
    page.say("<img src=x onerror=window.hacked=1> <b>bold</b>")
    assert page.one(".bubble").text == "<img src=x onerror=window.hacked=1> <b>bold</b>"
    assert page.one(".row .open").text.startswith("<img") and page.script("return window.hacked") is None


PIECES = ["*", "**a", "_a ", "`", "[", "[a](", "> ", "- ", "$", "\\(", "\\[\n", "|-", "~~", "<a", "```\n", "1. ",
          "\\frac{", "$\\sqrt{", "![", "a\n", "   - x\n", "https://", "("]


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_is_slow(page, piece):
    """Eight times the text takes about eight times as long, not 64: no rule tries a text again and again."""
    short, long = page.driver.execute_async_script("""
        const [texts, done] = arguments;
        import(new URL('page/markdown.js', document.baseURI)).then(({showMarkdown}) => {
          const once = text => {
            const start = performance.now();
            showMarkdown(document.createElement('div'), text);
            return performance.now() - start;
          };
          done(texts.map(text => Math.min(once(text), once(text))));
        }).catch(error => done(['failed: ' + error, 0]))""", [piece * (size // len(piece)) for size in (10000, 80000)])
    assert long < 500 or long < 24 * short, (short, long)


def test_code_and_answers_are_copied_as_they_were_written(page):
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {
        "origin": page.url.rstrip("/"), "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    page.say("Show everything")
    page.click("Copy code")
    page.until(lambda: page.all("[aria-label=Copied]"), "the sign that it is copied")
    copied = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied.startswith("def is_prime(n: int) -> bool:\n    # Divisors") and copied.endswith('"primes")')
    page.click("Copy answer")
    page.until(lambda: len(page.all("[aria-label=Copied]")) >= 1, "the sign that it is copied")
    page.until(lambda: "**prime**" in page.driver.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0])"), "the answer in the clipboard")


def test_formulas_are_drawn_and_unknown_ones_are_shown(page):
    page.say(r"\(\frac{a}{b^2}\) is echoed")
    html = ours(page, r"\(\frac{a}{b^2}\) and \(\unknown{x}\) and $5 or $6")
    assert "<math><mfrac><mi>a</mi><msup><mi>b</mi><mn>2</mn></msup></mfrac></math>" in html
    assert r"<code>\unknown{x}</code>" in html and "$5 or $6" in html
    html = ours(page, r"\[\begin{pmatrix}1&0\\0&1\end{pmatrix}\text{ if } x_i' \ge \sqrt[3]{2}\]")
    assert html.count("<mtd>") == 4 and "<mtext> if </mtext>" in html and "<mroot>" in html and "<msubsup>" in html


def exported(page, label: str, tmp_path) -> str:
    """Click an export and return the file that the browser writes."""
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.click("Export and import")
    page.until(lambda: page.one("#transfer").is_displayed(), "the dialog")
    page.one(f"#{label}").click()
    endings = (".md", ".json", ".jsonl")
    path, *_ = page.until(lambda: [each for each in tmp_path.iterdir() if each.suffix in endings], "a file")
    text = path.read_text()
    path.unlink()
    return text


def test_conversations_go_to_files_and_come_back(page, server, tmp_path):
    page.fill("system", "Be brief.")
    page.say("Think about it")
    page.click("Answer again")
    page.answered()
    markdown = exported(page, "export-markdown", tmp_path)
    assert markdown.startswith("# Think about it\n\n**System prompt**\n\n> Be brief.\n\n## You\n\nThink about it\n")
    assert "<summary>Reasoning</summary>" in markdown and "There are **46** of them" in markdown
    row = json.loads(exported(page, "export-messages", tmp_path))
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][2]["reasoning_content"].startswith("The user wants a count.")
    whole, before = exported(page, "export-all", tmp_path), page.kept()
    page.script("localStorage.clear()")
    page.open()
    assert not page.all(".row")
    (tmp_path / "back.json").write_text(whole)
    page.one("#import-file").send_keys(str(tmp_path / "back.json"))
    page.until(lambda: page.all(".message.assistant"), "the conversation")
    assert page.kept() == before and page.all(".versions")[-1].text == "2/2"
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    page.one("#import-file").send_keys(str(tmp_path / "chats.jsonl"))
    page.until(lambda: len(page.kept()) == 3, "two more")
    page.say("and now?")
    assert [message["content"] for message in server.requests[-1]["messages"]][:2] == ["Be brief.", "Think about it"]
    page.script("location.hash = arguments[0]", before[0]["id"])
    page.until(lambda: page.all(".versions"), "the first conversation")
    for number, change in ((3, False), (4, True)):  # one that has gone on is not overwritten
        if change:
            page.say("and more?")
        page.one("#import-file").send_keys(str(tmp_path / "back.json"))
        page.until(lambda: "was added" in page.one("#notices").text, "the notice")
        assert len(page.kept()) == number
        page.script("document.getElementById('notices').replaceChildren()")


@pytest.mark.parametrize("content, words", [
    ("not json", "is neither JSON nor lines of JSON"), ('{"a": 1}', "number 1 of the file is no conversation"),
    ('{"messages": [{"role": "user", "content": "x"}]}\nbroken', "line 2 is not JSON"), ("[]", "has no conversations")])
def test_a_file_that_is_no_conversation_is_refused(page, tmp_path, content, words):
    (tmp_path / "wrong.json").write_text(content)
    page.one("#import-file").send_keys(str(tmp_path / "wrong.json"))
    page.until(lambda: words in page.one("#notices").text, words)
    assert not page.kept()


def test_damaged_storage_is_not_fatal(page):
    page.say("hello")
    page.script("""localStorage['conversation:bad'] = '{"id": "bad", "messages": {"x": {"role": "user"}}}';
        localStorage['conversation:worse'] = 'not json'; localStorage['settings'] = '[]'""")
    page.reload()
    assert page.say("hello again") == "You said: hello again"
    assert [each.text for each in page.driver.find_elements(By.CSS_SELECTOR, ".row .open")] == ["hello"]
