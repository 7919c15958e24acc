"""FrozenStatistics: frozen means frozen, running statistics included, unless `trainable` names them."""

import copy

import pytest
import torch
from checks import Is, assert_equal_to_rounding, assert_far, picture, raw, state, unchanged
from models import CASES, MLP
from torch import nn

import minilora
from minilora import FrozenStatistics, LoRAConfig
from minilora.frozen import keeps_statistics, thaw
from minilora.sites import Sites

CNN = CASES["cnn"]
NORMS = ["stem.1", "block.1", "norm"]
SMALL = LoRAConfig(r=2)


def injected(**options):
    return minilora.inject(CNN.build().train(), "project", SMALL, **{"trainable": (), **options})


def train(model, steps=3):
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=0.1)
    for _ in range(steps):
        CNN.call(model.train()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def statistics(model):
    """Return the statistics by the names of the bare model."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {
        f"{name}.{buffer}": raw(getattr(site.bare, buffer))
        for name, site in Sites(model).items()
        if isinstance(site.bare, nn.modules.batchnorm._BatchNorm)
        for buffer in names
    }


def test_a_bare_model_does_count():
    """Without which the other tests would show nothing."""
    model = CNN.build().train()
    before = statistics(model)
    CNN.call(model)
    assert len(before) == 9
    assert all(statistics(model)[name] != value for name, value in before.items())


def test_training_leaves_the_statistics_of_the_base():
    model = injected()
    before, bare = statistics(model), state(CNN.build())
    train(model)
    assert statistics(model) == before
    assert state(minilora.eject(model)) == bare


def test_the_model_computes_in_training_as_it_will_in_evaluation(tmp_path):
    """So what is trained, saved and loaded into a fresh base is what was seen while training."""
    model = train(injected())
    assert_equal_to_rounding(CNN.run(model.train()), CNN.run(model.eval()))
    minilora.save(model, tmp_path / "adapter.safetensors")
    fresh = minilora.load(CNN.build(), tmp_path / "adapter.safetensors")
    assert_equal_to_rounding(CNN.run(fresh.train()), CNN.run(model))
    assert_far(CNN.run(fresh), CNN.run(CNN.build()))


def test_disabled_in_training_mode_is_the_base_and_moves_nothing():
    model = train(injected())
    before = statistics(model)
    with minilora.disabled(model):
        assert_equal_to_rounding(CNN.run(model.train()), CNN.run(CNN.build()))
    assert statistics(model) == before


def test_eject_and_fuse_let_the_very_modules_count_again():
    for leave in (minilora.eject, minilora.fuse):
        model = CNN.build()
        modules = [Is(model.get_submodule(name)) for name in NORMS]
        minilora.inject(model, "project", SMALL, trainable=())
        assert all(isinstance(model.get_submodule(name), FrozenStatistics) for name in NORMS)
        leave(model.train())
        assert [Is(model.get_submodule(name)) for name in NORMS] == modules
        assert all(module.training for module in model.modules())
        before = statistics(model)
        CNN.call(model)
        assert all(statistics(model)[name] != value for name, value in before.items())


@pytest.mark.parametrize("training", [True, False])
def test_eject_gives_the_mode_of_the_model_around(training):
    model = CNN.build().train(not training)
    before = picture(copy.deepcopy(model).train(training))
    minilora.inject(model, "project", SMALL, trainable=()).train(training)
    assert not any(model.get_submodule(name).base.training for name in NORMS)
    after = picture(minilora.eject(model).requires_grad_(True))
    assert [entry[2] for entry in after["modules"]] == [entry[2] for entry in before["modules"]]
    assert after["state"] == before["state"]


def test_a_second_injection_finds_them_frozen():
    model = injected()
    wrappers = [Is(model.get_submodule(name)) for name in NORMS]
    minilora.inject(model, "classifier", SMALL, trainable=())
    assert [Is(model.get_submodule(name)) for name in NORMS] == wrappers
    assert not any(isinstance(model.get_submodule(name).base, FrozenStatistics) for name in NORMS)


def test_messages_name_what_stands_there():
    with pytest.raises(minilora.TargetError, match="'norm': 'weight' has the shape"):
        minilora.inject(injected(), "norm", SMALL)
    with pytest.raises(minilora.TargetError, match="'norm': the output width of BatchNorm1d cannot"):
        minilora.inject(injected(), "norm", minilora.AdapterConfig())
    assert injected(trainable="norm").norm.description() == "trained in full (BatchNorm1d)"


def test_summary_shows_them():
    rows = minilora.summary(injected()).rows
    assert ("stem.*", 1, "frozen statistics (BatchNorm2d)", 0, "active") in [
        (row.sites, row.count, row.description, row.parameters, row.state) for row in rows
    ]
    assert sum(row.count for row in rows if "frozen statistics" in row.description) == 3


@pytest.mark.parametrize("trainable", [["norm"], ["stem"], ["stem.1", "block.1", "norm"]])
def test_named_by_trainable_they_are_trained_saved_and_loaded(trainable, tmp_path):
    model = injected(trainable=trainable)
    named = [name for name in NORMS if any(name.startswith(outer) for outer in trainable)]
    before, bare = statistics(model), state(CNN.build())
    train(model)
    assert statistics(model) == before  # the originals, which eject gives back
    saved = minilora.adapter_state_dict(model)
    for name in named:
        assert saved[f"{name}.num_batches_tracked"] == 3
        assert raw(saved[f"{name}.running_mean"]) != before[f"{name}.running_mean"]
    minilora.save(model, tmp_path / "adapter.safetensors")
    fresh = minilora.load(CNN.build(), tmp_path / "adapter.safetensors")
    assert_equal_to_rounding(CNN.run(fresh.eval()), CNN.run(model.eval()))
    minilora.fuse(fresh)
    assert_equal_to_rounding(CNN.run(fresh), CNN.run(model))
    assert state(minilora.eject(model)) == bare


def test_a_trained_head_with_statistics_inside_an_injected_model():
    """Whichever comes first: the copy counts, the original does not."""
    model = minilora.inject(injected(), "classifier", SMALL, trainable=["block"])
    assert not any(isinstance(module, FrozenStatistics) for module in model.block.trained.modules())
    assert isinstance(model.block.base[1], FrozenStatistics)
    before = raw(model.block.base[1].base.running_mean)
    train(model)
    assert raw(model.block.base[1].base.running_mean) == before
    assert raw(model.block.trained[1].running_mean) != before


def test_a_checkpoint_of_the_bare_model_loads():
    model, other = injected(trainable=["norm"]), CNN.build()
    for value in other.state_dict().values():
        value.add_(1)
    model.load_state_dict(other.state_dict())
    assert statistics(model) == statistics(other)
    assert raw(model.norm.trained.running_mean) == raw(other.norm.running_mean)


def test_merged_with_adapters_skipped_they_stay_frozen():
    model = injected()
    minilora.inject(model, "classifier", minilora.AdapterConfig(bottleneck=2), trainable=())
    minilora.fuse(model, skip_adapters=True)  # what stays may go on training
    before = statistics(model)
    CNN.call(model.train()).mean().backward()
    assert statistics(model) == before


def test_nothing_to_keep_no_wrapper():
    quiet = nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.LayerNorm(4),
        nn.GroupNorm(1, 4),
        nn.InstanceNorm1d(4),
    )
    minilora.inject(quiet, "0", SMALL)
    assert not any(isinstance(module, FrozenStatistics) for module in quiet.modules())


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        (nn.BatchNorm3d(4), True),
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm2d(4, track_running_stats=True), True),
        (nn.BatchNorm1d(4, track_running_stats=False), False),
        (nn.LayerNorm(4), False),
    ],
)
def test_what_keeps_statistics(module, counts):
    assert keeps_statistics(module) is counts


class Counter(nn.Module):
    """A layer of one's own that keeps statistics under the usual names."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.mean(0), 0.1)
        return x - self.running_mean


def test_a_module_of_ones_own_is_known_by_its_buffers():
    model = minilora.inject(nn.Sequential(nn.Linear(4, 4), Counter()).train(), "0", SMALL)
    model(torch.randn(3, 4))
    assert not model[1].running_mean.any()


def test_spectral_norm_does_not_iterate(tmp_path):
    """Its u and v are written by each computation of the weight in training mode, reading included."""
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))).train()
    minilora.inject(model, lambda name, module: name in ("0", "1"), SMALL)
    with unchanged(model):
        for tokens in (2, 200):
            model(torch.randn(tokens, 8))
        assert model[1].weight.shape == (8, 8)
        minilora.save(model, tmp_path / "adapter.safetensors")
    minilora.eject(model)
    before = state(model)
    model(torch.randn(2, 8))
    assert state(model) != before


def test_thaw_leaves_what_has_nothing_to_thaw():
    model = MLP()
    assert thaw(model) is model
    norm = nn.BatchNorm1d(4)
    assert thaw(FrozenStatistics(norm)) is norm


def test_a_copy_stays_frozen():
    twin = copy.deepcopy(injected())
    before = statistics(twin)
    CNN.call(twin.train())
    assert statistics(twin) == before
