"""Two runs in turn: the order of what they do, and what happens when one ends before the other or fails."""

import pytest

from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap


class Exchange:
    """A collective that logs when it begins and when it is waited for."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log
        log.append(f"{name} begins")

    def wait(self) -> None:
        self.log.append(f"{self.name} ends")


def run(overlap: MicroBatchOverlap, name: str, exchanges: int, log: list[str]):
    def go():
        for number in range(exchanges):
            log.append(f"{name} computes")
            overlap.wait(Exchange(f"{name}{number}", log))
        log.append(f"{name} is done")

    return go


def test_each_computes_while_the_other_travels():
    overlap, log = MicroBatchOverlap(), []
    overlap.run(run(overlap, "f", 2, log), run(overlap, "b", 2, log))
    assert log == ["f computes", "f0 begins", "b computes", "b0 begins",
                   "f0 ends", "f computes", "f1 begins", "b0 ends", "b computes", "b1 begins",
                   "f1 ends", "f is done", "b1 ends", "b is done"]


@pytest.mark.parametrize("exchanges", [(0, 3), (3, 0), (1, 4), (4, 1)])
def test_the_longer_one_goes_on_alone(exchanges):
    overlap, log = MicroBatchOverlap(), []
    overlap.run(run(overlap, "f", exchanges[0], log), run(overlap, "b", exchanges[1], log))
    for name, number in zip("fb", exchanges):
        own = [what for what in log if what.startswith(name)]
        expected = [each for n in range(number)
                    for each in (f"{name} computes", f"{name}{n} begins", f"{name}{n} ends")]
        assert own == [*expected, f"{name} is done"]


def test_without_a_pair_an_exchange_is_waited_for_at_once():
    log: list[str] = []
    MicroBatchOverlap().wait(Exchange("f", log))
    assert log == ["f begins", "f ends"]


@pytest.mark.parametrize("failing", ["f", "b"])
def test_a_failure_comes_out_after_the_other_has_ended(failing):
    overlap, log = MicroBatchOverlap(), []

    def fail():
        overlap.wait(Exchange(failing, log))
        raise ZeroDivisionError(failing)

    halves = {name: fail if name == failing else run(overlap, name, 2, log) for name in "fb"}
    with pytest.raises(ZeroDivisionError, match=failing):
        overlap.run(halves["f"], halves["b"])
    other = "b" if failing == "f" else "f"
    assert f"{other} is done" in log
    overlap.wait(Exchange("later", log))
    assert log[-1] == "later ends"
