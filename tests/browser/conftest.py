"""One browser and one scripted server for all tests of the page; left out without Chromium (make test-browser)."""

import shutil

import pytest

pytest.importorskip("selenium", reason="make test-browser installs it")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("no Chromium; make test-browser installs it", allow_module_level=True)

from driven_page import DrivenPage, chromium
from scripted_server import ScriptedServer


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    started = chromium(tmp_path_factory.mktemp("chromium"))
    yield started
    started.quit()


@pytest.fixture(scope="session")
def server():
    started = ScriptedServer().start()
    yield started
    started.shutdown()


@pytest.fixture
def page(driver, server) -> DrivenPage:
    server.requests.clear()
    opened = DrivenPage(driver, server.url).open()
    yield opened
    assert not opened.faults("status of 4", "ERR_INCOMPLETE_CHUNKED"), "the console complains"
