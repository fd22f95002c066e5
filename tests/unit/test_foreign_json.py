"""JSON of others is read within bounds: what Python's reader gives where it is sound, one line where it is not."""

import json
import subprocess
import sys

import pytest

from megatron_deepseek.foreign_json import DEEPEST, JsonObject, parse_json, read_json, read_object

SOUND = ['{}', '[]', '0', '"a"', 'null', '{"a": [1, -2.5e3, true, null, "\\u00e9\\ud83d\\ude00", {"b": {}}]}',
         '{"[[[{": "\\"]]}", "\\\\": "[\\\\"}', "[" * DEEPEST + "]" * DEEPEST, '{"a":' * 60 + "1" + "}" * 60,
         "[" + "[[]]," * 1000 + "{}]", '["' + "[" * 100_000 + '"]', "[9223372036854775808]"]


@pytest.mark.parametrize("text", SOUND)
def test_sound_json_is_what_python_reads(text):
    assert parse_json(text.encode(), "here") == json.loads(text)
    assert parse_json(b"\xef\xbb\xbf" + text.encode(), "here") == json.loads(text)


UNSOUND = {
    "nested more than 128 deep": ["[" * 129 + "]" * 129, "[" * 100_000, '{"a":' * 100_000, "[" * 10**6 + "]" * 10**6,
                                  '{"a": [' * 70 + "]}" * 70, "[[]," * 200 + "]" * 200],
    "\"b\" is in an object twice": ['{"a": {"b": 1, "c": 2, "b": 1}}'],
    "is no number of JSON": ["NaN", "[-Infinity]", '{"a": Infinity}'],
    "is larger than any number": ["1e999", "[-1e400]"],
    "Expecting value": ["", "[1,", "{\"a\": ", "[1, nul]"],
    "Unterminated string": ['["' + '\\"' * 1000, '"'],
    "Invalid control character": ['"a\nb"'],
    "Extra data": ["{}{}", "1 2", "[]]"],
    "surrogates not allowed": ['"\\ud800"', '{"\\udfff": 1}'],
}


@pytest.mark.parametrize("message, text", [(message, text) for message, texts in UNSOUND.items() for text in texts],
                         ids=lambda value: value[:20])
def test_unsound_json_is_refused_in_a_line(message, text):
    with pytest.raises(ValueError, match=f"^here is malformed JSON: .*{message}") as caught:
        parse_json(text.encode(), "here")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_other_encodings_and_numbers_of_thousands_of_digits_are_refused():
    for content in (b"\xff\xfe[\x00]\x00", b'"\xe9"', b"1" * 10_000):
        with pytest.raises(ValueError, match="^here is malformed JSON: "):
            parse_json(content, "here")


def test_files_are_read_up_to_their_bound(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, 2, 3]")
    assert read_json(path, 9) == [1, 2, 3]
    with pytest.raises(ValueError, match=f"^{path} has 9 bytes, more than the 8 that are read"):
        read_json(path, 8)
    with open(path, "wb") as file:
        file.truncate(10**12)  # a terabyte of nothing
    with pytest.raises(ValueError, match="has 1,000,000,000,000 bytes, more than"):
        read_json(path)
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be read: Is a directory$"):
        read_json(tmp_path)
    with pytest.raises(ValueError, match="no cannot be read: No such file"):
        read_json(tmp_path / "no")
    with pytest.raises(ValueError, match="/dev/zero has 1,048,576 bytes, more than"):
        read_json("/dev/zero", 1000)


FIELDS = JsonObject({"half": 1.5, "minus": -4, "flag": True, "null": None, "text": "a\nb", "list": [1, "2", -3], "big":
                     2**40, "huge": 10**400, "in": {"x": {"y": 1.0}}}, "F")


@pytest.mark.parametrize("read, message", [
    (lambda: FIELDS.integer("half"), 'F: "half" is 1.5, not an integer'),
    (lambda: FIELDS.integer("minus"), 'F: "minus" is -4, less than 0'),
    (lambda: FIELDS.integer("flag"), 'F: "flag" is true, not an integer'),
    (lambda: FIELDS.integer("null", default=3), 'F: "null" is null, not an integer'),
    (lambda: FIELDS.integer("big", most=2**31), 'F: "big" is 1099511627776, more than 2147483648'),
    (lambda: FIELDS.integer("list"), 'F: "list" is a list of 3, not an integer'),
    (lambda: FIELDS.integer("none"), 'F has no "none"'),
    (lambda: FIELDS.integer("text"), 'F: "text" is "a\\nb", not an integer'),
    (lambda: FIELDS.number("text"), 'F: "text" is "a\\nb", not a number'),
    (lambda: FIELDS.number("minus", least=0.0), 'F: "minus" is -4, less than 0.0'),
    (lambda: FIELDS.number("flag"), 'F: "flag" is true, not a number'),
    (lambda: FIELDS.number("huge"), "too large a number"),
    (lambda: FIELDS.text("half"), 'F: "half" is 1.5, not a text'),
    (lambda: FIELDS.boolean("minus"), 'F: "minus" is -4, not true or false'),
    (lambda: FIELDS.list("in"), 'F: "in" is an object of 1, not a list'),
    (lambda: FIELDS.integers("list"), 'F: "list" has "2" in it, not an integer of at least 0'),
    (lambda: FIELDS.object("list"), 'F: "list" is a list of 3, not an object'),
    (lambda: FIELDS.object("in").object("x").integer("y"), 'F: in "in": in "x": "y" is 1.0, not an integer'),
    (lambda: FIELDS.only("half", "minus"), 'F has "big", which is not one of half, minus'),
    (lambda: JsonObject.of([1], "F"), "F holds a list of 1, not an object"),
])
def test_values_of_another_type_are_refused_by_file_key_and_value(read, message):
    with pytest.raises(ValueError) as caught:
        read()
    assert message in str(caught.value) and len(str(caught.value)) < 120


def test_values_of_the_right_type_are_given():
    assert FIELDS.integer("minus", least=-5) == -4 and FIELDS.integer("big") == 2**40
    assert FIELDS.number("half") == 1.5 and FIELDS.number("minus") == -4.0
    assert FIELDS.boolean("flag") is True and FIELDS.text("text") == "a\nb"
    assert FIELDS.object("in").object("x").number("y") == 1.0
    assert FIELDS.integer("none", default=7) == 7 and FIELDS.text("null", default=None) is None
    assert JsonObject({"a": [1, 2]}, "F").integers("a") == (1, 2)


def test_object_of_a_file(tmp_path):
    (tmp_path / "a.json").write_text('{"b": 1.5}')
    with pytest.raises(ValueError, match=f'^{tmp_path}/a.json: "b" is 1.5, not an integer$'):
        read_object(tmp_path / "a.json").integer("b")


def test_reader_imports_no_torch():
    code = "import sys, megatron_deepseek.foreign_json; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
