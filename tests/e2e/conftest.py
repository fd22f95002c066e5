"""The commands as a user gives them, on a corpus of a few documents and a model that trains in seconds."""

import pytest
from workshop import Workshop, make_workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"))
