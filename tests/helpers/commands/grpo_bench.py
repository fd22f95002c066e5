"""A tiny reinforcement learning as a user starts it: prompts, rewards, random weights, the command, what it keeps."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from forked import run_script
from workshop import CONFIG, Job, run_entry

from megatron_deepseek.data.tokenizer import ByteTokenizer

REWARDS = '''
import time

def vowels(prompts, completions, rows):
    """Half of the answers to prompts with a 1 have the same reward."""
    return [sum(map(ord, text)) % 3 if row["prompt"] != "1" else 1.0 for text, row in zip(completions, rows)]

def first_letter(prompts, completions, rows):
    return [ord(text[0]) % 2 if text else 0 for text in completions]

def throws(prompts, completions, rows):
    raise KeyError("no such column")

def hangs(prompts, completions, rows):
    time.sleep(600)

def gives_nan(prompts, completions, rows):
    return [float("nan") if row["prompt"] == "2" else 1.0 for row in rows]
'''
TIMES = ("seconds", "per_second")


class GrpoBench:
    """Prompts, rewards, random weights in a Hugging Face directory, and the command."""

    def __init__(self, directory: Path):
        self.directory = directory
        rows = [{"prompt": str(number), "answer": str(number + 1)} for number in range(6)]
        (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / "rewards.py").write_text(REWARDS)
        ids = ByteTokenizer().vocab_size  # the engine draws from no others, which training would count too
        (directory / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": ids}))
        job = self.run(1, "start", "vowels", "--train-iters", "1", "--lr", "0", "--save-hf",
                       str(directory / "released"), "--seed", "7")
        assert job.status == 0, job.output

    def arguments(self, save: str, reward: str, *more: str) -> list[str]:
        given = ["--model", self.directory / "config.json", "--prompts", self.directory / "prompts.jsonl",
                 "--reward", f"{self.directory / 'rewards.py'}:{reward}", "--tokenizer-type", "ByteTokenizer",
                 "--template", "deepseek-v3", "--seq-length", "32", "--max-completion-length", "8",
                 "--grpo-prompts-per-step", "4", "--grpo-group-size", "4", "--lr", "1e-2", "--reward-workers", "1",
                 "--save", self.directory / save]
        return [*map(str, given), *more]

    def run(self, num_ranks: int, save: str, reward: str, *more: str) -> Job:
        return run_entry("train_grpo.py", num_ranks, self.arguments(save, reward, *more))

    def train(self, num_ranks: int, save: str, *more: str, reward: str = "vowels") -> list[dict]:
        job = self.run(num_ranks, save, reward, "--load", str(self.directory / "released"), *more)
        assert job.status == 0, job.output
        return self.metrics(save)

    def die(self, save: str, death: str, *more: str) -> None:
        """Run until the death, which must come."""
        words = [str(Path(__file__).with_name("dying_grpo.py")), death,
                 *self.arguments(save, "vowels", "--load", str(self.directory / "released"), *more)]
        with TemporaryDirectory(prefix="job-") as directory:
            output = Path(directory) / "output"
            assert run_script(words, output, output) == -9, output.read_text()

    def metrics(self, save: str) -> list[dict]:
        """Return the records without what depends on the clock."""
        lines = (self.directory / save / "metrics.jsonl").read_text().splitlines()
        return [{name: value for name, value in json.loads(line).items() if not name.endswith(TIMES)}
                for line in lines]

    def samples(self, save: str) -> dict[str, list[dict]]:
        return {path.name: [json.loads(line) for line in path.read_bytes().splitlines()]
                for path in sorted((self.directory / save / "rollouts").iterdir())}

    def weights(self, save: str, iteration: int) -> list[bytes]:
        return [path.read_bytes() for path in
                sorted((self.directory / save / f"iter_{iteration:07d}").glob("*.distcp"))]
