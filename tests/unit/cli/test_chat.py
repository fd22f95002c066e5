"""Chats: what is asked, what is shown of an answer as it comes, the commands, Ctrl-C, and the command as a whole."""

import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from chat_tokenizers import V3, write_tokenizer
from small_checkpoints import v3_directory

from megatron_deepseek.cli.chat import main
from megatron_deepseek.cli.chat_session import DIM, PLAIN, ChatSession
from megatron_deepseek.data.tokenizer import ASSISTANT, BOS, EOD, USER, build_tokenizer
from megatron_deepseek.finetuning.templates import END_THINK, THINK
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.serving.chat import ChatFormat


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer")


class Scripted:
    """A stand-in for Replicas: answers with given texts, token by token; `between` is called before each step."""

    def __init__(self, tokenizer, answers: list[str], between=lambda step: None):
        self.tokenizer, self.answers, self.between = tokenizer, list(answers), between
        self.asked, self.aborted, self.tokens, self.steps, self.name = [], [], None, 0, None

    @property
    def has_work(self) -> bool:
        return self.tokens is not None

    def add(self, prompt, parameters) -> str:
        self.asked.append(self.tokenizer.decode(list(prompt)))
        self.tokens, self.steps = self.tokenizer.encode(self.answers.pop(0)), 0
        return "the request"

    def abort(self, name: str) -> None:
        self.aborted.append(name)
        self.tokens = None

    def step(self) -> list[Output]:
        if self.tokens is None:
            return []
        self.steps += 1
        self.between(self.steps)
        own = self.tokens[:self.steps]
        finished = self.steps == len(self.tokens)
        self.tokens = None if finished else self.tokens
        ends = [len(self.tokenizer.decode(own[:number]).rstrip("\ufffd")) for number in range(1, len(own) + 1)]
        text = self.tokenizer.decode(own).rstrip("\ufffd")
        return [Output("the request", 0, (), own, text, ends, "stop" if finished else None)]


def session(tokenizer_model: str, answers: list[str], template: str = "deepseek-v3", thinking: bool | None = None,
            dims: bool = True, **more) -> tuple[ChatSession, list[str]]:
    tokenizer, written = build_tokenizer("HuggingFaceTokenizer", tokenizer_model), []
    made = ChatFormat.of(tokenizer, tokenizer_model, template, thinking)
    return ChatSession(Scripted(tokenizer, answers, **more), made, SamplingParameters(), written.append, dims), written


def test_a_chat_with_commands(tokenizer_model, tmp_path):
    chat, written = session(tokenizer_model, ["yes", "no", "12", "13"], dims=False)
    for line in ("/system be brief", "is it?", "and that?", "/undo", "", "/undo more", "/reset", "how many?"):
        assert chat.enter(line)
    begin = f"{BOS}be brief{USER}is it?{ASSISTANT}"
    assert chat.replicas.asked == [begin, f"{begin}yes{EOD}{USER}and that?{ASSISTANT}",
                                   f"{BOS}be brief{USER}how many?{ASSISTANT}"]
    assert "".join(written).splitlines() == [
        "set; /reset begins anew with it", "yes", "no", "forgotten; the last question is now: is it?",
        "forgotten; the chat is empty", "forgotten", "12"]
    written.clear()
    for line in ("/undo", "/undo", "/save", f"/save {tmp_path / 'none' / 'x'}", "/unknown", "/usr/bin is what?"):
        chat.enter(line)
    assert "".join(written).splitlines() == [
        "forgotten; the chat is empty", "there is nothing to forget", "/save needs the name of a file",
        f"{tmp_path / 'none' / 'x'} cannot be written: No such file or directory",
        "/unknown is no command; /help lists them", "13"]
    chat.enter(f"/save {tmp_path / 'chat.jsonl'}")
    assert json.loads((tmp_path / "chat.jsonl").read_text()) == {"messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "/usr/bin is what?"},
        {"role": "assistant", "content": "13"}]}
    assert not chat.enter("/exit")


@pytest.mark.parametrize("template, thinking, answer", [
    ("deepseek-r1", None, "one, then two\n</think>\n\nThe answer"),
    ("deepseek-v3.1", True, "one, then two</think>The answer"),
    ("deepseek-v3", None, "<think>\none, then two\n</think>\n\nThe answer")])
def test_reasoning_is_dimmed_and_kept_apart(tokenizer_model, template, thinking, answer):
    """It comes first, in whatever way the template writes it; tags and the lines about them are not shown."""
    chat, written = session(tokenizer_model, [answer, "x"], template, thinking)
    chat.enter("what is it?")
    shown = "".join(written)
    reasoning, _, text = shown.rpartition(PLAIN)
    assert reasoning.replace(DIM, "").replace(PLAIN, "").strip("\n") == "one, then two"
    assert text == "\n\nThe answer\n" and len(written) > 6
    assert chat.messages[1] == {"role": "assistant", "content": "The answer", "reasoning_content": "one, then two"}
    chat.enter("and?")
    assert ("one, then two" in chat.replicas.asked[1]) == (template == "deepseek-v3")  # the others drop it


def test_tags_that_are_no_tokens(tmp_path):
    """As in a tokenizer of V3: the tag comes in pieces, of which none is shown, and no line end before it."""
    model = write_tokenizer(tmp_path / "tokenizer", V3)
    chat, written = session(model, ["<think>\none < two\n</think>\n\nyes", "<think>\nnever end</thi"], dims=False)
    assert len(chat.format.tokenizer.encode(END_THINK)) > 1
    chat.enter("what?")
    assert "".join(written) == "one < two\n\nyes\n"
    written.clear()
    chat.enter("and?")
    assert "".join(written) == "never end</thi\n"


def test_a_tag_that_is_text_ends_no_reasoning(tokenizer_model):
    """The token does; ids of the letters < / t h ... are not the token's."""
    chat, _ = session(tokenizer_model, [])
    letters = [token for piece in ("<", "/think>") for token in chat.format.tokenizer.encode(piece)]
    (end,) = chat.format.tokenizer.encode(END_THINK)
    (begin,) = chat.format.tokenizer.encode(THINK)
    thought, answer = chat.format.tokenizer.encode("first"), chat.format.tokenizer.encode("two")
    tokens = [begin, *thought, *letters, *thought, end, *answer]
    chat.replicas.tokenizer.encode = lambda text: tokens
    chat.replicas.answers.append("")
    written = []
    chat.write, chat.dims = written.append, False
    chat.enter("what?")
    assert "".join(written) == "first</think>first\n\ntwo\n"


def test_without_thinking_the_prompt_says_so(tokenizer_model):
    chat, _ = session(tokenizer_model, ["a"], "deepseek-v3.1", False)
    chat.enter("x")
    assert chat.replicas.asked == [f"{BOS}{USER}x{ASSISTANT}{END_THINK}"]


def test_ctrl_c_stops_the_answer_only(tokenizer_model):
    """Between steps, where the engine is in order; a second one would leave. What was said stays in the chat."""
    def press(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    chat, written = session(tokenizer_model, ["a b a b a b a b", "yes"], dims=False, between=press)
    assert chat.enter("go on")
    assert chat.replicas.aborted == ["the request"] and signal.getsignal(signal.SIGINT) is before
    said = chat.replicas.tokenizer.decode(chat.replicas.tokenizer.encode("a b a b a b a b")[:3])
    assert "".join(written) == f"{said}\n[stopped]\n" and chat.messages[1]["content"] == said
    chat.replicas.between = lambda step: None
    assert chat.enter("and?") and f"{said}{EOD}{USER}and?" in chat.replicas.asked[1]


def test_what_cannot_be_asked_is_forgotten(tokenizer_model):
    chat, written = session(tokenizer_model, [], dims=False)
    chat.enter("what is \ud83d?")
    assert "holds half a surrogate pair" in "".join(written) and not chat.messages and not chat.replicas.asked


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = v3_directory(tmp_path_factory.mktemp("chat") / "hf", torch.float32, vocab_size=448,
                             max_position_embeddings=256)
    write_tokenizer(directory, V3)
    return directory


def run(monkeypatch, capsys, model: Path, typed: str, *more: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    status = main(["--load", str(model), "--max-new-tokens", "6", "--temperature", "0", "--ignore-eos", *more])
    if dist.is_initialized():
        dist.destroy_process_group()
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_from_a_pipe(model, monkeypatch, capsys, tmp_path):
    """No prompts, no colours; drafts change nothing; a chat that grows too long is told so and goes on."""
    saved = tmp_path / "chat.jsonl"
    status, out, _ = run(monkeypatch, capsys, model, f"what is it?\nand?\n/save {saved}\n")
    assert status == 0 and "\x1b" not in out and "> " not in out and f"saved to {saved}" in out
    chat = json.loads(saved.read_text())["messages"]
    assert [turn["role"] for turn in chat] == ["user", "assistant"] * 2
    drafted = run(monkeypatch, capsys, model, f"what is it?\nand?\n/save {saved}\n", "--draft-tokens", "2")
    assert drafted[:2] == (0, out)
    status, out, _ = run(monkeypatch, capsys, model, "what is it?\n/exit\n", "--seq-length", "4")
    assert status == 0 and "must leave room for one more; /undo or /reset makes room" in out


def test_mistakes_are_one_line(model, monkeypatch, capsys, tmp_path):
    for more, named in ((("--template", "v9"), "--template v9 is neither one of auto, deepseek-v2"),
                        (("--template", "deepseek-r1"), "<think> is no token there"),
                        (("--top-p", "0"), "top_p is 0; it must be greater than 0"),
                        (("--seq-length", "1000"), "--seq-length 1000 is longer than the model's")):
        status, _, err = run(monkeypatch, capsys, model, "", *more)
        assert status == 2 and err.startswith("chat.py: error: ") and named in err and err.count("\n") == 1, err
    assert main(["--load", str(tmp_path)]) == 2
    assert "it holds no finished checkpoint" in capsys.readouterr().err
