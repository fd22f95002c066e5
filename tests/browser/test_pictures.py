"""Pictures of the page for a person to look at (screenshots/, which git ignores), and what can be measured of looks."""

import pytest
from driven_page import LAPTOP, PHONE

COLOURS = """
const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const rgba = css => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
                      return [...canvas.getImageData(0, 0, 1, 1).data]; };
const behind = e => { for (let n = e; n; n = n.parentElement) { const c = rgba(getComputedStyle(n).backgroundColor);
                      if (c[3] > 250) return c; } return [255, 255, 255, 255]; };
const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
                     return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
                     return .2126 * r + .7152 * g + .0722 * b; };
return [...document.querySelectorAll('main *, #sidebar *')].filter(e => e.checkVisibility() && e.offsetWidth > 1 &&
    !e.disabled && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
  const [one, other] = [light(rgba(getComputedStyle(e).color)), light(behind(e))];
  return [(Math.max(one, other) + .05) / (Math.min(one, other) + .05), e.textContent.slice(0, 40), e.className];
}).filter(([ratio]) => ratio < 4.5);
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_pictures(page, size, dark):
    """Letters stand out from what is behind them by 4.5 at least (WCAG AA)."""
    name = f"{'phone' if size == PHONE else 'laptop'}-{'dark' if dark else 'light'}"
    page.open(size, dark)
    page.picture(f"{name}-1-empty")
    page.say("How many positive integers below 100 are divisible by 3 or by 5?")
    page.one("details summary").click()
    page.picture(f"{name}-2-reasoning")
    page.say("Write a Python function that tells whether a number is prime.")
    page.picture(f"{name}-3-end")
    page.script("document.querySelector('.code-block').scrollIntoView()")
    page.picture(f"{name}-4-code")
    assert page.script("return matchMedia('(prefers-color-scheme: dark)').matches") is dark
    assert not page.script(COLOURS)
    page.say("busy now")
    page.picture(f"{name}-5-error")
    page.say("slow please", wait=False)
    page.until(lambda: "word5" in page.answer(), "some words")
    page.picture(f"{name}-6-streaming")
    page.click("Stop")
    page.answered()
    page.script("document.getElementById('open-settings').click()")
    page.picture(f"{name}-7-settings")
    page.click("Close", "#settings")
    if size == PHONE:
        page.click("List of conversations")
        page.picture(f"{name}-8-list")
        assert not page.script(COLOURS)
        page.click("Close the list")


def test_a_chosen_theme_wins_and_stays(page):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = page.script(background)
    page.script("document.getElementById('open-settings').click()")
    page.one("input[value=dark] + span").click()
    dark = page.script(background)
    assert dark != light
    page.reload()
    assert page.script(background) == dark
    page.script("document.getElementById('open-settings').click()")
    page.one("input[value=system] + span").click()
    assert page.script(background) == light
