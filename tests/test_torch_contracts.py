"""What a torch user takes for granted: copies, pickles, compile, autocast, meta, fused paths, DDP."""

import copy
import inspect
import io
import itertools
import shutil
import threading
import warnings

import pytest
import torch
from checks import (
    assert_equal_to_rounding,
    assert_far,
    injected_modules,
    picture,
    randomise,
    raw,
    reference,
    skip_as_the_bare_model,
    state,
    unchanged,
)
from models import CASES, MLP, Attention, encoder_layer, in_dtypes, on_grid
from torch import nn
from torch.autograd import forward_ad

import minilora
from minilora import AdapterConfig, LoRAConfig, MiniLoRAError
from minilora.torch_internals import in_backward
from minilora.variants.function import Function

NO_GRAD = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}
without_gradients = pytest.mark.parametrize("mode", NO_GRAD.values(), ids=NO_GRAD)


def injected(case, **options):
    """Return a trained model with LoRA, an adapter around one of its sites, and a head if it has one."""
    head = [name for name in ("classifier",) if hasattr(case.build(), name)]
    model = minilora.inject(case.build(), case.targets, LoRAConfig(**options), trainable=head)
    if case.targets[-1] not in ("out_proj", "lm_head"):
        minilora.inject(model, case.targets[-1], AdapterConfig(bottleneck=4), trainable=())
    return randomise(model)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@on_grid
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_copies_compute_the_same_and_are_independent(case, clone):
    model = injected(case)
    twin = clone(model)
    assert state(twin) == state(model)
    assert raw(case.run(twin)) == raw(case.run(model))
    assert [n for n, p in twin.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    with unchanged(model):
        for tensor in minilora.adapter_state_dict(twin).values():
            tensor.zero_()
        minilora.eject(twin)


@on_grid
def test_compile_fullgraph(case):
    """No graph break, and the same outputs and gradients as without."""
    model = injected(case)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    try:
        outputs = case.run(compiled)
    except torch._dynamo.exc.Unsupported:  # by an old torch
        if case.name == "encoder" and torch.__version__.startswith("2.6."):
            pytest.skip("this torch does not compile what asks a subclass of Tensor for its device")
        bare = torch.compile(case.build(), fullgraph=True, backend="eager", dynamic=False)
        skip_as_the_bare_model(lambda: case.run(bare))
    assert_equal_to_rounding(outputs, case.run(model))
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["lora", "adapter", "head"])
@pytest.mark.parametrize("tokens", [2, 200])
def test_compile_fullgraph_trains(kind, tokens):
    model = minilora.inject(MLP(), "up", trainable="classifier" if kind == "head" else ())
    if kind == "adapter":
        minilora.inject(model, "up", AdapterConfig(bottleneck=4))
    randomise(model)
    x = torch.randn(tokens, 16)
    grads = []
    for callable_ in (model, torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)):
        callable_(x).square().mean().backward()
        grads.append([p.grad for p in minilora.trainable_parameters(model)])
        model.zero_grad()
    for eager, compiled in zip(*grads, strict=True):
        assert_equal_to_rounding(compiled, eager)
    torch.compiler.reset()


def graphs(inject):
    """Return how many graphs a stack of layers of many shapes needs for many numbers of tokens."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    widths = [16, 24, 36, 54, 80, 120, 180, 270, 400, 600]
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    if inject:
        minilora.inject(model, "all-linear", LoRAConfig(r=4))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for tokens in (700, 400, 250, 170, 110, 75, 50, 33, 22, 15, 10, 6):
        x = torch.randn(tokens, 16)
        assert_equal_to_rounding(compiled(x), model(x))
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    return count


@pytest.mark.slow
def test_compiling_for_every_number_of_tokens_needs_no_graph_more_than_the_base():
    """The form is chosen by their number, which under dynamic shapes would be a graph for each side of it."""
    assert 0 < graphs(inject=True) <= graphs(inject=False)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_compile_with_inductor(tmp_path, monkeypatch):
    # What another run compiled for other instructions of this processor would not load here.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = injected(CASES["mlp"])
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(40, 16)
    with torch.no_grad():
        assert_equal_to_rounding(compiled(x), model(x))
    torch.compiler.reset()


def test_compiled_model_follows_merging_and_disabling():
    model = injected(CASES["mlp"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(40, 16)

    def agree():
        assert_equal_to_rounding(compiled(x), model(x))
        return raw(compiled(x))

    active = agree()
    with minilora.disabled(model):
        assert agree() != active
    assert agree() == active
    minilora.merge(model, skip_adapters=True)
    agree()
    minilora.unmerge(model)
    assert agree() == active
    torch.compiler.reset()


@pytest.mark.parametrize("target", ["linear1", "linear2", "out_proj", "all-linear"])
@pytest.mark.parametrize("training", [True, False])
@without_gradients
def test_encoder_layer_is_active_in_train_and_in_eval(target, training, mode):
    """In eval without gradients torch runs a fused kernel on the layers' `.weight`s, past their forward."""
    bare = encoder_layer().train(training)
    model = randomise(minilora.inject(copy.deepcopy(bare), target))
    x = torch.randn(2, 5, 16)
    plain = reference(bare, model)
    with mode():
        for change in (lambda model: model, minilora.merge, minilora.unmerge):
            change(model)
            # A merged layer refuses to train where it is called, and out_proj where its weight is read.
            if change is minilora.merge and training and torch.is_grad_enabled():
                with pytest.raises(MiniLoRAError, match="does not train"):
                    model(x)
            else:
                assert_far(model(x), bare(x))
                assert_equal_to_rounding(model(x), plain(x))


@pytest.mark.parametrize("training", [True, False])
@without_gradients
def test_encoder_layer_with_an_adapter_is_active_in_train_and_in_eval(training, mode):
    bare = encoder_layer().train(training)
    model = randomise(minilora.inject(copy.deepcopy(bare), "linear2", AdapterConfig(bottleneck=4)))
    plain = copy.deepcopy(bare)
    plain.linear2 = nn.Sequential(plain.linear2, Bottleneck(model.linear2))
    plain.activation_relu_or_gelu = 0  # so that torch does not look for a weight of the Sequential
    x = torch.randn(2, 5, 16)
    with mode():
        assert_far(model(x), bare(x))
        assert_equal_to_rounding(model(x), plain(x))


class Bottleneck(nn.Module):
    """h + up(gelu(down(h))), with the values of an adapter."""

    def __init__(self, adapter):
        super().__init__()
        self.down, self.up = copy.deepcopy(adapter.adapter_down), copy.deepcopy(adapter.adapter_up)

    def forward(self, h):
        return h + self.up(nn.functional.gelu(self.down(h)))


@pytest.mark.parametrize("padded", [False, True])
@without_gradients
def test_whole_encoder_is_active_in_eval(padded, mode):
    bare = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=padded).eval()
    model = randomise(minilora.inject(copy.deepcopy(bare), ["linear1", "linear2", "out_proj"]))
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    plain = reference(bare, model)
    with mode():
        outputs = [m(x, src_key_padding_mask=mask)[:, :3] for m in (model, plain, bare)]
    assert_equal_to_rounding(outputs[0], outputs[1])
    assert_far(outputs[0], outputs[2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@without_gradients
def test_attention_is_active_in_train_and_in_eval_and_applies_the_update_once(training, need_weights, mode):
    bare = Attention().train(training)
    model = randomise(minilora.inject(copy.deepcopy(bare), "out_proj"))
    plain = reference(bare, model)
    x = torch.randn(2, 5, 16)
    before = picture(model)
    with mode():
        for _ in range(3):
            out = [m.attention(x, x, x, need_weights=need_weights)[0] for m in (model, plain, bare)]
    assert_equal_to_rounding(out[0], out[1])
    assert_far(out[0], out[2])
    assert picture(model) == before  # no forward writes anything


def test_attention_gives_the_update_its_gradient():
    model = randomise(minilora.inject(Attention(), "out_proj"))
    model(torch.randn(2, 5, 16)).square().mean().backward()
    assert model.attention.out_proj.lora_A.grad.any()
    assert model.attention.out_proj.base.weight.grad is None


@in_dtypes
@pytest.mark.parametrize("config", [LoRAConfig(r=4), AdapterConfig(bottleneck=4)])
def test_t5_reads_the_dtype_of_wo_and_calls_it(dtype, config):
    case = CASES["t5"]
    bare = case.build(dtype)
    model = randomise(minilora.inject(copy.deepcopy(bare), "wo", config))
    assert_far(case.run(model), case.run(bare))
    if isinstance(config, LoRAConfig):
        assert_equal_to_rounding(case.run(model), case.run(reference(bare, model)))


@on_grid
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(case, lower):
    model = injected(case).train()
    with torch.autocast("cpu", dtype=lower):
        loss = case.call(model).float().square().mean()
    loss.backward()
    for parameter in minilora.trainable_parameters(model):
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing(name, reentrant):
    case = CASES[name]
    grads = []
    for checkpointing in (False, True):
        model = injected(case, dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        case.call(model).square().mean().backward()
        grads.append([p.grad for p in minilora.trainable_parameters(model)])
    for plain, checkpointed in zip(*grads, strict=True):
        assert_equal_to_rounding(checkpointed, plain)


def test_inject_on_meta_allocates_nothing_and_takes_weights_later():
    with torch.device("meta"):
        model = MLP()
    minilora.inject(model, ["up", "down"], trainable="classifier")
    minilora.inject(model, "up", AdapterConfig(bottleneck=4))
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(2, 16, device="meta")).shape == (2, 3)
    assert model(torch.empty(200, 16, device="meta")).shape == (200, 3)
    assert model.down.weight.shape == (16, 32)
    source = randomise(minilora.inject(MLP(), ["up", "down"], trainable="classifier"))
    minilora.inject(source, "up", AdapterConfig(bottleneck=4))
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 16)
    assert torch.equal(model(x), source(x))


def test_to_empty_then_reset():
    with torch.device("meta"):
        model = minilora.inject(MLP(), "up")
    model.to_empty(device="cpu").load_state_dict(MLP().state_dict())
    for site, (layer,) in injected_modules(model).items():
        layer.reset_parameters(site)
    fresh = minilora.inject(MLP(), "up")
    assert raw(model.up.lora_A) == raw(fresh.up.lora_A)
    assert not model.up.lora_B.any()


def test_new_parameters_are_on_the_device_of_their_base():
    model = MLP()
    model.down.to("meta")
    minilora.inject(model, ["up", "down"])
    assert (model.up.lora_A.device.type, model.down.lora_A.device.type) == ("cpu", "meta")


@pytest.fixture
def one_process():
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp(one_process, tmp_path):
    model = minilora.inject(CASES["mlp"].build(), ["up", "down"], trainable="classifier")
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(ddp), lr=0.1)
    for _ in range(2):  # a parameter without gradient would make the second step fail
        ddp(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for action in (
        minilora.eject,
        minilora.merge,
        lambda model: minilora.inject(model, "up"),
        lambda model: minilora.save(model, tmp_path / "a.safetensors"),
    ):
        with unchanged(ddp), pytest.raises(MiniLoRAError, match=r"DistributedDataParallel: .*`ddp\.module`"):
            action(ddp)
    minilora.save(ddp.module, tmp_path / "a.safetensors")
    loaded = minilora.load(CASES["mlp"].build(), tmp_path / "a.safetensors")
    assert torch.equal(loaded.up.lora_A, model.up.lora_A)


@on_grid
def test_state_dict_of_a_merged_model_is_that_of_the_unmerged(case):
    model = injected(case)
    before = state(model)
    minilora.merge(model, skip_adapters=True)
    assert state(model) == before
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is p for name, p in model.named_parameters() if "base.weight" not in name)
    assert state(minilora.unmerge(model)) == before


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("tokens", [2, 200])
def test_forward_mode_over_a_model(tokens):
    model = randomise(minilora.inject(MLP().double(), ["up", "down"], trainable=["classifier"]))
    x, dx = torch.randn(2, tokens, 16, dtype=torch.float64)
    y, dy = torch.func.jvp(model, (x,), (dx,))
    step = 1e-6
    slope = (model(x + step * dx) - model(x - step * dx)) / (2 * step)
    torch.testing.assert_close(dy, slope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, model(x))


def test_functional_call_and_vmap_over_updates():
    model = minilora.inject(MLP(), "up")
    for tokens in (2, 200):
        x = torch.randn(tokens, 16)
        many_B = torch.randn(3, 32, 8)
        stacked = torch.func.vmap(lambda B, x=x: torch.func.functional_call(model, {"up.lora_B": B}, x))(
            many_B
        )
        for B, out in zip(many_B, stacked, strict=True):
            model.up.lora_B.data.copy_(B)
            assert_equal_to_rounding(out, model(x))


@on_grid
def test_nothing_warns(case, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = injected(case)
        minilora.merge(model, skip_adapters=True)
        minilora.unmerge(model)
        minilora.save(model, tmp_path / "a.safetensors")
        minilora.load(model, tmp_path / "a.safetensors")
        if case.name not in ("tied", "t5", "gpt2"):  # whose fused heads are no longer tied
            minilora.fuse(model, skip_adapters=True)


def test_gradients_are_known_to_be_computed():
    """`in_backward`, by which a bank knows a checkpoint's second forward."""
    from torch.utils.checkpoint import checkpoint

    seen = []

    def double(x):
        seen.append(in_backward())
        return (x * 2).tanh()

    x = torch.ones(2, requires_grad=True)
    checkpoint(double, x, use_reentrant=False).sum().backward()
    assert seen == [False, True]
    assert not in_backward()


def test_compiled_code_sees_what_a_thread_local_holds():
    """An attribute that is set in `__init__`; one found on the class first is taken for a constant."""

    class Choice(threading.local):
        def __init__(self):
            self.value = None

    choice = Choice()

    def compute(x):
        return x if choice.value is None else x * choice.value

    compiled = torch.compile(compute, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)) == 1
    choice.value = torch.full((1,), 3.0)
    assert compiled(torch.ones(1)) == 3


FUNCTIONS = {
    "_DeltaLinear": (lambda: nn.Linear(16, 16), (1, 16), {}),
    "_EffectiveLinear": (lambda: nn.Linear(16, 16), (64, 16), {}),
    "_MagnitudeLinear": (lambda: nn.Linear(16, 16), (64, 16), {"dora": True}),
    "_Convolution": (lambda: nn.Conv2d(4, 4, 3), (8, 4, 16, 16), {}),
}


@pytest.fixture(params=FUNCTIONS)
def computed(request, monkeypatch):
    """A layer whose call runs one of the functions, and its input."""
    make, shape, options = FUNCTIONS[request.param]
    model = minilora.inject(nn.Sequential(make()), "0", LoRAConfig(r=2, **options))
    randomise(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    applied, names = minilora.variants.function.applied, []

    def noting(function, arguments):
        names.append(function.__name__)
        return applied(function, arguments)

    monkeypatch.setattr(minilora.variants.function, "applied", noting)
    model(x)
    assert names == [request.param]
    return model, x


def test_every_function_is_among_those_that_are_tried():
    assert {function.__name__ for function in Function.__subclasses__()} == set(FUNCTIONS)


def test_a_call_binds_no_signature(computed, monkeypatch):
    model, x = computed

    def unwanted(*_):
        raise AssertionError("a signature was asked for")

    monkeypatch.setattr(inspect, "signature", unwanted)
    model(x).sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_nothing_can_be_derived(computed, mode, monkeypatch):
    model, x = computed
    expected = model(x)
    monkeypatch.setattr(minilora.variants.function, "applied", None)
    with mode():
        assert torch.equal(model(x), expected)


def test_a_tangent_needs_no_gradients_to_be_on(computed):
    model, x = computed
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    _, expected = torch.func.jvp(model, (x,), (v,))
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), forward_ad.dual_level():
            y = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v)))
        assert torch.equal(y.tangent, expected)


def test_a_tensor_that_a_transformation_left_behind_is_one_like_any_other(computed):
    model, x = computed
    left = []
    torch.func.grad(lambda t: (left.append(t), t.sum())[1])(x)
    trained = minilora.trainable_parameters(model)
    expected = torch.autograd.grad(model(x).sum(), trained)
    assert all(map(torch.equal, torch.autograd.grad(model(left[0]).sum(), trained), expected))
