"""From targets to sites: what matches, what is near, and every problem at once."""

import re

import pytest
import torch
from checks import injected_modules, unchanged
from models import CASES, MLP, Shared, on_grid, on_heads
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig, MiniLoRAError, RowsConfig, TargetError
from minilora.sites import Sites
from minilora.targets import choices, head_modules, select

SMALL = LoRAConfig(r=2)


def block() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "attention": nn.ModuleDict(
                {
                    "self": nn.ModuleDict({k: nn.Linear(4, 4) for k in ("query", "value", "my_query")}),
                    "output": nn.ModuleDict({"dense": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}),
                }
            ),
            "output": nn.ModuleDict({"dense": nn.Linear(4, 4)}),
        }
    )


def tower() -> nn.ModuleDict:
    return nn.ModuleDict({"layer": nn.ModuleList([block(), block()]), "classifier": nn.Linear(4, 2)})


QUERIES = ["layer.0.attention.self.query", "layer.1.attention.self.query"]
DENSE = [f"layer.{i}.{name}" for i in (0, 1) for name in ("attention.output.dense", "output.dense")]


@pytest.mark.parametrize(
    ("targets", "sites"),
    [
        ("query", QUERIES),
        (["query"], QUERIES),
        (("self.query",), QUERIES),
        ({"attention.self.query"}, QUERIES),
        ((name for name in ["query"]), QUERIES),
        ("layer.1.attention.self.query", QUERIES[1:]),
        ("output.dense", DENSE),
        ("attention.output.dense", DENSE[::2]),
        (re.compile(r"layer\.\d+\.output\.dense"), DENSE[1::2]),
        (re.compile(r".*\.self\.(query|my_query)"), [n for q in QUERIES for n in (q, q[:-5] + "my_query")]),
        (lambda name, module: name.startswith("layer.0") and name.endswith("query"), None),
        (["classifier", "layer.0.output.dense"], ["layer.0.output.dense", "classifier"]),
        (["query", re.compile(r"layer\.0\.attention\.self\.query")], QUERIES),
    ],
)
def test_matches(targets, sites):
    sites = sites or ["layer.0.attention.self.query", "layer.0.attention.self.my_query"]
    model = minilora.inject(tower(), targets, SMALL)
    assert list(injected_modules(model)) == sites


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("quary", r"targets: 'quary' matches no module; nearest: 'query' \(x2\)"),
        ("attention.query", r"nearest: 'attention.self.query' \(x2\)"),
        ("layer.2.attention.self.query", "matches no module"),
        ("uery", r"nearest: 'query' \(x2\)"),
        ("Query", r"nearest: 'query' \(x2\)"),
        ("", "'' matches no module"),
        (".query", "matches no module; nearest: 'query'"),
        (r".*\.query", r"a string is a name, not a pattern: did you mean re\.compile\(\.\.\.\)\?"),
        (re.compile("query"), r"re\.compile\('query'\) matches no module in full.*begin it with '\.\*'"),
        (lambda name, module: False, "<lambda> matches no module"),
        (7, "7 is a int; give a module's name"),
        (None, "None is a NoneType"),
        (b"query", "is a int; give a module's name"),
        (nn.Linear, "is a type; give a module's name"),
        (nn.Linear(2, 2), "is a Linear; give a module's name"),
    ],
)
def test_what_matches_nothing(target, says):
    model = tower()
    with unchanged(model), pytest.raises(TargetError, match=says):
        minilora.inject(model, target, SMALL)


def test_every_problem_comes_at_once_with_what_there_is_to_choose_from():
    model = tower()
    with unchanged(model), pytest.raises(TargetError) as caught:
        minilora.inject(
            model,
            ["query", "valeu", re.compile("value"), "norm", "classifier"],
            LoRAConfig(r=3),
            exclude="kay",
            trainable="clasifier",
        )
    message = str(caught.value)
    assert message.startswith("5 problems; the model has not been changed:\n")
    for problem in (
        r"trainable: 'clasifier' matches no module; nearest: 'classifier' \(x1\)",
        "exclude: 'kay' matches no module",
        r"targets: 'valeu' matches no module; nearest: 'value' \(x2\)",
        r"targets: re\.compile\('value'\) matches no module in full",
        r"'layer\.\*\.attention\.output\.norm' \(x2\): 'weight' has the shape \(4,\), and LoRA needs",
        r"    layer\.\*\.attention\.self\.query     Linear 4 -> 4  x2\n",
    ):
        assert re.search(problem, message), problem


def bert_like():
    return nn.ModuleDict(
        {"attention": nn.ModuleDict({k: nn.Linear(4, 4) for k in ("query", "key", "value")})}
    )


@pytest.mark.parametrize(
    ("config", "target", "near"),
    [
        (LoRAConfig(), "embeding", "'embed_tokens' (x1)"),
        (RowsConfig(rows=[1]), "embeding", "'embed_tokens' (x1)"),
        (AdapterConfig(), "embeding", "'embedding' (x1), 'embedding.norm' (x1), 'embed_tokens' (x1)"),
        (LoRAConfig(), "norn", "'norm' (x1)"),  # nothing with a matrix is near
    ],
)
def test_a_hint_names_what_the_config_can_stand_on(config, target, near):
    embedding = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 4), "norm": nn.LayerNorm(4)})
    model = nn.ModuleDict({"embedding": embedding})
    with unchanged(model), pytest.raises(TargetError) as caught:
        minilora.inject(model, target, config)
    assert f"nearest: {near}\n" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "target", "near"),
    [
        (bert_like, "q_proj", r"nearest: 'query' \(x1\)"),
        (bert_like, "v", r"nearest: 'value' \(x1\)"),
        (bert_like, "self.query", r"nearest: 'query' \(x1\)"),
        (bert_like, "all_linear", "did you mean 'all-linear'"),
        (bert_like, "ALL LINEAR", "did you mean 'all-linear'"),
        (bert_like, "linear", "did you mean 'all-linear'"),
        (lambda: nn.ModuleDict({"q_lin": nn.Linear(4, 4)}), "q_proj", r"nearest: 'q_lin' \(x1\)"),
    ],
)
def test_what_people_are_used_to_gets_a_nearest_name(make, target, near):
    with pytest.raises(TargetError, match=rf"targets: '{target}' matches no module; {near}"):
        minilora.inject(make(), target, SMALL)


def test_after_a_few_hints_the_next_ones_are_left_out():
    with pytest.raises(TargetError) as caught:
        minilora.inject(tower(), ["quary"] * 20, SMALL)
    lines = [line for line in str(caught.value).splitlines() if "'quary' matches no module" in line]
    assert len(lines) == 20
    assert sum("nearest: 'query'" in line for line in lines) == 8


def test_the_only_linear_layer_may_be_what_is_trained():
    model = nn.ModuleDict({"body": nn.GRU(4, 4), "fc": nn.Linear(4, 4)})
    says = "'all-linear' matches no module: every linear layer is trained in full, as `trainable` says, or is"
    with unchanged(model), pytest.raises(TargetError, match=says):
        minilora.inject(model, "all-linear", SMALL, trainable=["fc"])


@pytest.mark.parametrize("target", ["all-linear", "weight", re.compile(".*")])
def test_a_layer_is_not_a_model_of_layers(target):
    says = r'The model is itself a Linear, .*: model = nn\.Sequential\(layer\), and "0" as the target'
    with pytest.raises(TargetError, match=says):
        minilora.inject(nn.Linear(4, 4), target, SMALL)
    minilora.inject(nn.Sequential(nn.Linear(4, 4)), "0", SMALL)


def test_no_targets():
    for targets in ([], (), iter([])):
        with pytest.raises(TargetError, match="targets: none given"):
            minilora.inject(tower(), targets)


@pytest.mark.parametrize("exclude", ["layer.0", re.compile(r"layer\.0\..*"), lambda name, _: "0" in name])
def test_exclude_speaks_the_same_language(exclude):
    if exclude == "layer.0":
        exclude = "layer.0.attention.self.query"
    model = minilora.inject(tower(), "query", SMALL, exclude=exclude)
    assert list(injected_modules(model)) == QUERIES[1:]


def test_exclude_must_match_and_must_leave_something():
    model = tower()
    with (
        unchanged(model),
        pytest.raises(TargetError, match=r"exclude: 'qeury' matches no module; nearest: 'query'"),
    ):
        minilora.inject(model, "query", SMALL, exclude="qeury")
    with unchanged(model), pytest.raises(TargetError, match="exclude leaves none of the sites"):
        minilora.inject(model, "query", SMALL, exclude=["query", "value"])


@on_grid
def test_all_linear(case):
    model = case.build()
    minilora.inject(model, "all-linear", SMALL, trainable=())
    found = injected_modules(model)
    assert len(found) == case.n_linear
    assert not any("lm_head" in site for site in found)


@on_heads
def test_all_linear_leaves_a_trained_head_alone(case):
    model = case.build()
    for trainable in ("classifier", re.compile("classifier")):
        minilora.inject(model, "all-linear", SMALL, trainable=trainable)
        assert [w.kind for w in injected_modules(model)["classifier"]] == ["trainable"]
        minilora.eject(model)


def test_all_linear_on_top_of_a_trained_head_and_with_exclude():
    model = minilora.inject(MLP(), "up", SMALL, trainable="classifier")
    minilora.inject(model, "all-linear", SMALL, exclude="up", trainable=())
    assert {site: [w.kind for w in found] for site, found in injected_modules(model).items()} == {
        "up": ["lora"],
        "down": ["lora"],
        "classifier": ["trainable"],
    }


def test_lazy_modules_are_refused_before_anything_changes_and_welcome_once_they_have_a_shape():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    layers = list(model)
    with pytest.raises(
        MiniLoRAError, match=r"'1.weight', '1.bias' have no shape yet .*: call the model once first"
    ):
        minilora.inject(model, "0", SMALL)
    assert list(model) == layers
    assert model[0].weight.requires_grad
    model(torch.randn(2, 4))
    minilora.inject(model, "all-linear", SMALL)
    assert list(injected_modules(model)) == ["0", "1"]


def test_all_linear_without_any():
    with pytest.raises(TargetError, match=r"'all-linear' matches no module\nThis model has no linear layers"):
        minilora.inject(nn.Sequential(nn.ReLU()), "all-linear")


def test_shared_module_comes_once_under_its_first_name():
    for targets in ("first", "again", "stack.1", ["again", "first"], "all-linear"):
        sites, problems = select(Sites(Shared()), targets, argument="targets")
        assert "first" in sites
        assert not {"again", "stack.1"} & set(sites)
        assert not problems


def test_a_container_is_refused_with_the_layers_inside_it():
    with pytest.raises(
        TargetError, match=r"linear layers inside it: 'self\.my_query', 'self\.query', 'self\.value'"
    ):
        minilora.inject(tower(), "self", SMALL)


def test_a_failing_callable_is_the_callers_own_error():
    model = tower()
    with unchanged(model), pytest.raises(ZeroDivisionError):
        minilora.inject(model, lambda name, module: 1 / 0)


def test_sites_are_those_of_the_bare_model_after_injection():
    model = minilora.inject(tower(), "query", SMALL)
    sites, problems = select(Sites(model), ["query", re.compile(".*base.*|.*lora.*")], argument="targets")
    assert list(sites) == QUERIES
    assert len(problems) == 1
    assert all(type(site.bare) is nn.Linear for site in sites.values())


def test_head_modules():
    class WithHead(nn.Module):
        base_model_prefix = "backbone"

        def __init__(self):
            super().__init__()
            self.backbone = nn.Embedding(4, 4)
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = self.backbone.weight
            self.act = nn.ReLU()
            self.score = nn.Linear(4, 2)

    assert list(head_modules(WithHead())) == ["score"]
    assert head_modules(MLP()) == {}


def test_tables():
    assert choices(Sites(nn.Sequential(nn.ReLU()))) == "This model has no linear layers."
    many = choices(Sites(nn.ModuleDict({f"layer{i}": nn.Linear(2, 3) for i in range(30)})))
    assert "layer19  Linear 2 -> 3  x1" in many
    assert many.endswith("... and 10 more")


def test_one_letter_in_common_is_no_hint():
    """GPT-2's names on BERT."""
    model = CASES["bert"].build()
    with unchanged(model), pytest.raises(TargetError, match=r"'c_attn' matches no module\n") as caught:
        minilora.inject(model, "c_attn")
    assert "nearest" not in str(caught.value)
    with unchanged(model), pytest.raises(TargetError, match=r"'q_proj' matches no module; nearest: 'query'"):
        minilora.inject(model, "q_proj")
