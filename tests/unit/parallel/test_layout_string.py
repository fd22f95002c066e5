"""Layout strings, against Megatron's own parser and by hand."""

import pytest

from megatron_deepseek.parallel.layout_string import Stage, count_stages, expand, parse, to_string

# (text, decoder layers, MTP modules)
VALID = [
    ("EttttmL", 4, 1),
    ("EttttL", 4, 0),
    ("Ettt|(tt|)*29,m|L", 61, 1),
    ("Et*3|(tt|)*29,mL", 61, 1),
    ("E|t*4|L", 4, 0),
    ("(E)*1,(t|tt|)*2t|mL", 7, 1),
    ("Ett|tt|m*2L", 4, 2),
    ("Ett||ttL", 4, 0),
    ("E||t*4|(|)*2m|L", 4, 1),
]


@pytest.fixture(scope="module")
def megatron():
    return pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout").PipelineParallelLayerLayout


@pytest.mark.parametrize("text, layers, mtp", VALID)
def test_agrees_with_megatron(megatron, text, layers, mtp):
    theirs = megatron.parse_str_to_list(text)
    ours = parse(text, layers, mtp)
    names = [["embedding"] * s.embedding + ["decoder"] * len(s.layers) + ["mtp"] * len(s.mtp) + ["loss"] * s.loss
             for s in ours]
    assert names == [[part.name for part in stage] for stage in theirs]
    megatron(text, len(ours)).validate_layer_layout(layers, mtp)
    assert count_stages(text) == len(ours)


def test_megatrons_example_with_an_empty_stage():
    """That of its own documentation; its MTP modules are on two stages, which its validation refuses."""
    stages = parse("E|(t|)*3,m|m||L", 3, 2)
    assert [stage.holds_anything for stage in stages] == [True] * 6 + [False, True]
    assert [stage.layers for stage in stages] == [(), (0,), (1,), (2,), (), (), (), ()]
    assert [stage.mtp for stage in stages] == [(), (), (), (), (0,), (1,), (), ()]


def test_layers_and_depths_are_numbered_through():
    assert parse("Ett|t|mm|mL", 3, 3) == (
        Stage(embedding=True, layers=(0, 1), mtp=(), loss=False),
        Stage(embedding=False, layers=(2,), mtp=(), loss=False),
        Stage(embedding=False, layers=(), mtp=(0, 1), loss=False),
        Stage(embedding=False, layers=(), mtp=(2,), loss=True))


@pytest.mark.parametrize("text, layers, mtp", VALID)
def test_to_string_is_read_back(text, layers, mtp):
    stages = parse(text, layers, mtp)
    assert parse(to_string(stages), layers, mtp) == stages


def test_repetitions_nest():
    assert expand("E((t|)*2t|)*2L") == "Et|t|t|t|t|t|L"


@pytest.mark.parametrize("text, layers, mtp, fragment", [
    ("EtttL", 4, 0, "3 t, but --num-layers is 4"),
    ("EttttL", 4, 1, "0 m, but --mtp-num-layers is 1"),
    ("tttt|L", 4, 0, "one E first"),
    ("EEttttL", 4, 0, "one E first"),
    ("Ettt|mtL", 4, 1, "order"),
    ("Etttt|Lm", 4, 1, "order"),
    ("Etttt", 4, 0, "one L last"),
    ("|EttttL", 4, 0, "no E on its first stage, ''"),
    ("EttttL|", 4, 0, "no L on its last stage, ''"),
    ("Ett|xttL", 4, 0, "'x'"),
    ("Ett|(tt|L", 4, 0, "'('"),
    ("Et*999999999L", 4, 0, "999999999"),
    ("E((t*9999)*9999)*9999L", 4, 0, "repeats"),
    ("Et*2*2L", 4, 0, "'*'"),
    ("", 4, 0, "0 t"),
])
def test_refused(text, layers, mtp, fragment):
    with pytest.raises(ValueError, match="--pipeline-model-parallel-layout") as caught:
        parse(text, layers, mtp)
    assert fragment in str(caught.value)
