"""Laws of LoRA on every kind of layer. The reference is the base's own forward with W_eff in its place."""

import copy
import io
import threading
import warnings

import pytest
import torch
from checks import distance, randomise, raw, skip_as_the_bare_model, state, unchanged
from kinds import KINDS, Experts, Kind, materialised
from models import transformers_major
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora
from minilora import LoRA, LoRAConfig, LoRALinear, MiniLoRAError, TargetError
from minilora.weight import EffectiveWeight

FUNCTIONS = {
    "scaled": "mul",
    "transposed": "conv_transpose2d",
    "transposed_1d": "conv_transpose1d",
    "bilinear": "bilinear",
    "bag": "embedding_bag",
    "cell": "gru_cell",
}
"""Those without a rule, for the sake of which the whole weight is formed."""

BY_NAME = {kind.name: kind for kind in KINDS}
on_kinds = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is formed, as large as W", "ignore:Using padding='same' with even kernel lengths"
)


def injected(kind: Kind, dtype=torch.float64, **config):
    torch.manual_seed(0)
    model = minilora.inject(kind.build(dtype), kind.target, LoRAConfig(r=2, **config), trainable=())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (model.layer.lora_A, model.layer.lora_B):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        if isinstance(padding := getattr(model.layer.bare, "padding_idx", None), int):
            model.layer.lora_A[:, padding] = 0
    return model


@on_kinds
def test_forward_and_gradients_are_those_of_the_base_with_w_eff_in_place(kind):
    model, x = injected(kind), kind.input()
    reference, A, B = materialised(kind.build(), model.layer)
    y, expected = model(x), reference(x)
    assert distance(y.detach(), expected.detach()) < 1e-12
    assert distance(y.detach(), kind.build()(x).detach()) > 1e-3  # the update has an effect
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert distance(model.layer.lora_A.grad, A.grad) < 1e-12
    assert distance(model.layer.lora_B.grad, B.grad) < 1e-12


@pytest.mark.parametrize(
    "kind",
    # The padding's column of A gets no gradient, whatever the look-up of padding gives.
    [kind for kind in KINDS if kind.name != "embedding_padding"],
    ids=lambda kind: kind.name,
)
def test_gradcheck(kind):
    model, x = injected(kind), kind.input()
    names = [f"layer.{name}" for name in ("lora_A", "lora_B")]
    values = tuple(dict(model.named_parameters())[name].detach().requires_grad_() for name in names)

    def output(*tensors):
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, values, fast_mode=True)


@on_kinds
def test_injection_is_an_identity(kind):
    bare, x = kind.build().requires_grad_(False), kind.input()
    model = minilora.inject(kind.build(), kind.target, LoRAConfig(r=2), trainable=())
    assert distance(model(x).detach(), bare(x)) < 1e-14
    before = state(bare)
    assert state(minilora.eject(model)) == before


@on_kinds
def test_merge_unmerge_disabled_fuse(kind):
    model, x = injected(kind).eval(), kind.input()
    base = kind.build().eval().requires_grad_(False)
    reference, _, _ = materialised(kind.build().eval(), model.layer)
    expected = reference(x).detach()
    weight = dict(model.layer.bare.named_parameters())[kind.parameter]
    with torch.no_grad():
        assert distance(minilora.merge(model)(x), expected) < 1e-12
        assert raw(dict(minilora.merge(model).layer.bare.named_parameters())[kind.parameter]) == raw(
            model.layer.effective_weight()
        )
        with minilora.disabled(model):
            assert raw(model(x)) == raw(base(x))
        minilora.unmerge(model)
        assert dict(model.layer.bare.named_parameters())[kind.parameter] is weight
        with minilora.disabled(model):
            assert raw(model(x)) == raw(base(x))
        minilora.fuse(model)
        assert distance(model(x), expected) < 1e-12
    assert list(model.state_dict()) == list(base.state_dict())


@on_kinds
def test_a_merged_layer_refuses_to_train(kind):
    model = minilora.merge(injected(kind)).train()
    with pytest.raises(MiniLoRAError, match="does not train"):
        model(kind.input())


@on_kinds
def test_the_base_is_as_it_was_after_training(kind):
    model, x = injected(kind).train(), kind.input()
    before = state(kind.build())
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=0.01)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert state(minilora.eject(model)) == before


@on_kinds
def test_saved_and_loaded_it_computes_the_same_bits(kind, tmp_path):
    model, x = injected(kind).eval(), kind.input()
    minilora.save(model, tmp_path / "a.safetensors")
    fresh = minilora.load(kind.build().eval(), tmp_path / "a.safetensors")
    assert raw(fresh(x)) == raw(model(x))
    again = minilora.load(fresh, tmp_path / "a.safetensors")  # over the same injections
    assert raw(again(x)) == raw(model(x))


@on_kinds
def test_another_base_is_refused(kind, tmp_path):
    minilora.save(injected(kind), tmp_path / "a.safetensors")
    other = kind.build()
    with torch.no_grad():
        dict(other.layer.named_parameters())[kind.parameter].mul_(1.01)
    with unchanged(other), pytest.raises(minilora.CheckpointError, match="not the base"):
        minilora.load(other, tmp_path / "a.safetensors")


@on_kinds
def test_copies_and_pickles_are_on_their_own(kind):
    model, x = injected(kind).eval(), kind.input()
    expected = model(x).detach()
    file = io.BytesIO()
    model.arguments = None  # a function of the test, which cannot be pickled
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    model.arguments = loaded.arguments = kind.arguments
    for other in (copy.deepcopy(model), loaded):
        assert raw(other(x)) == raw(expected)
        torch.nn.init.zeros_(other.layer.lora_B)
        assert raw(other(x)) != raw(expected)
        assert raw(model(x)) == raw(expected)


@on_kinds
def test_compiles_in_one_graph_where_the_base_does(kind):
    x = kind.input()
    torch.compiler.reset()
    torch.compile(kind.build().eval(), fullgraph=True, backend="eager")(x)
    model = injected(kind).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert distance(compiled(x).detach(), model(x).detach()) < 1e-12
    torch.compiler.reset()


@on_kinds
def test_in_16_bits_under_autocast_and_on_a_16_bit_base(kind):
    reference, _, _ = materialised(kind.build(), injected(kind).layer)
    expected = reference(kind.input()).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = injected(kind, torch.float32)
        assert distance(model(kind.input(torch.float32)).detach(), expected) < 0.1
    model = injected(kind, torch.bfloat16)
    assert model.layer.lora_A.dtype is torch.float32
    y = model(kind.input(torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert distance(y.detach(), expected) < 0.1
    y.float().sum().backward()
    assert model.layer.lora_B.grad.isfinite().all()


@on_kinds
def test_what_is_formed_is_said_once(kind):
    model, x = injected(kind), kind.input()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
        model(x)
    said = [str(w.message) for w in caught if "is formed" in str(w.message)]
    assert len(said) == kind.formed
    assert all(f"'layer.{kind.parameter}': " in message for message in said)
    assert all(FUNCTIONS[kind.name] in message for message in said)


@on_kinds
def test_dropout_acts_or_is_refused(kind):
    if not kind.dropout:
        with pytest.raises((TargetError, MiniLoRAError), match=r"'layer.*dropout has no"):
            injected(kind, dropout=0.5).train()(kind.input())
        return
    model, x = injected(kind, dropout=0.5), kind.input()
    plain = injected(kind)
    assert distance(model.eval()(x).detach(), plain(x).detach()) < 1e-14
    model.train()
    samples = torch.stack([model(x).detach() for _ in range(400)])
    assert samples.std(0).max() > 0
    if kind.name not in ("experts", "experts_transposed", "table"):  # in which dropout meets a nonlinearity
        assert distance(samples.mean(0), plain(x).detach()) < 0.35
    torch.manual_seed(3)
    one = model(x)
    torch.manual_seed(3)
    assert raw(model(x)) == raw(one)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dropout_is_refused_at_every_transposed_convolution_when_injecting(dims):
    model = nn.Sequential(getattr(nn, f"ConvTranspose{dims}d")(2, 3, 2))
    with pytest.raises(TargetError, match=f"dropout has no input .* ConvTranspose{dims}d"):
        minilora.inject(model, "0", LoRAConfig(r=1, dropout=0.1))


@on_kinds
def test_threads_do_not_meet(kind):
    model, x = injected(kind).eval(), kind.input()
    other = injected(kind).eval()
    torch.nn.init.zeros_(other.layer.lora_B)
    expected = [model(x).detach(), other(x).detach()]
    wrong = []

    def run(which, expected):
        for _ in range(20):
            with torch.no_grad():
                if distance(which(x), expected) > 1e-12:
                    wrong.append(which)

    pairs = zip((model, other), expected, strict=True)
    threads = [threading.Thread(target=run, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@on_kinds
def test_threads_share_one_model(kind):
    """The view is one for all calls, and holds nothing of any of them."""
    model, names = injected(kind).eval(), ("layer.lora_A", "layer.lora_B")
    inputs = [kind.input(), kind.input().flip(0)]

    def gradients(x):
        parameters = [model.get_parameter(name) for name in names]
        return [raw(grad) for grad in torch.autograd.grad(model(x).square().sum(), parameters)]

    expected, wrong = [gradients(x) for x in inputs], []

    def run(x, expected):
        wrong.extend(x for _ in range(10) if gradients(x) != expected)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@on_kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind, reentrant):
    config = {"dropout": 0.3} if kind.dropout else {}
    x, start = kind.input(), torch.zeros((), requires_grad=True)  # what re-entrant checkpoints begin from
    gradients = []
    for checkpointing in (False, True):
        model = injected(kind, **config).train()
        torch.manual_seed(3)
        y = checkpoint(lambda _, m=model: m(x), start, use_reentrant=reentrant) if checkpointing else model(x)
        y.square().sum().backward()
        gradients.append([p.grad for p in minilora.trainable_parameters(model)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any()
        assert distance(checkpointed, plain) < 1e-14


@on_kinds
def test_hooks_of_the_layer_run(kind):
    model, x = injected(kind), kind.input()
    calls = []
    model.layer.bare.register_forward_hook(lambda module, inputs, output: calls.append(1))
    model(x)
    assert calls == [1]


@on_kinds
def test_outside_readers_see_w_eff(kind):
    model = injected(kind)
    assert raw(getattr(model.layer, kind.parameter)) == raw(model.layer.effective_weight())
    with minilora.disabled(model):
        seen = getattr(model.layer, kind.parameter)
        assert seen is dict(model.layer.bare.named_parameters())[kind.parameter]


def test_the_encoder_layers_fused_path_computes_with_the_updated_projection():
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
    model = minilora.inject(nn.Sequential(layer), "in_proj_weight", LoRAConfig(r=2))
    nn.init.normal_(model[0].self_attn.lora_B)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert distance(model.eval()(x), model.train()(x)) < 1e-5
        trained = model(x)
        with minilora.disabled(model):
            assert distance(model(x), trained) > 0.01


def test_a_linear_layer_takes_the_fast_path_and_one_with_code_of_its_own_does_not():
    assert type(injected(BY_NAME["linear"]).layer) is LoRALinear
    assert type(injected(BY_NAME["scaled"]).layer) is LoRA
    assert type(injected(BY_NAME["in_out"]).layer) is LoRA


def test_two_parameters_of_one_module_and_one_more_later():
    kind = BY_NAME["experts"]
    model = minilora.inject(kind.build(), ["up"], LoRAConfig(r=2))
    minilora.inject(model, ["down"], LoRAConfig(r=3))
    torch.manual_seed(0)
    for name, tensor in minilora.adapter_state_dict(model).items():
        assert name.startswith(("layer.up.", "layer.down."))
        nn.init.normal_(tensor, std=0.3)
    plain, x = kind.build(), kind.input()
    for wrapper in minilora.sites.injected_sites(model)["layer"].wrappers:
        getattr(plain.layer, wrapper.parameter).data += wrapper.delta_weight().detach()
    assert distance(model(x).detach(), plain(x).detach()) < 1e-12
    before = raw(model(x))
    assert raw(minilora.unmerge(minilora.merge(model.eval()))(x)) == before
    with pytest.raises(TargetError, match="carries LoRA r=2"):
        minilora.inject(model, ["up"])


def test_an_embedding_that_renormalises_writes_nothing():
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0)).requires_grad_(False)
    weight = model[0].weight.detach().clone()
    minilora.inject(model, "0", LoRAConfig(r=2))
    nn.init.normal_(model[0].lora_B, std=9.0)
    before = raw(model[0].lora_A), raw(model[0].lora_B), raw(weight)
    y = model(torch.arange(10))
    assert (raw(model[0].lora_A), raw(model[0].lora_B), raw(model[0].base.weight)) == before
    assert (y.norm(dim=-1) <= 1.0001).all()
    plain = nn.Embedding.from_pretrained(model[0].effective_weight().detach(), max_norm=1.0)
    assert distance(y.detach(), plain(torch.arange(10))) < 1e-5


def test_sparse_look_ups_are_those_of_dense_ones():
    """`sparse` is about the gradient of W, which has none: that of B is dense."""
    ids, gradients = torch.tensor([1, 1, 2]), []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = minilora.inject(nn.Sequential(nn.Embedding(6, 4, sparse=sparse)), "0", LoRAConfig(r=2))
        randomise(model)(ids).square().sum().backward()
        gradients.append([p.grad for p in minilora.trainable_parameters(model)])
    for dense, sparse in zip(*gradients, strict=True):
        assert raw(sparse) == raw(dense)


def test_the_padding_row_stays_what_it_is_in_training():
    model = minilora.inject(nn.Sequential(nn.Embedding(10, 8, padding_idx=1)), "0", LoRAConfig(r=2))
    nn.init.normal_(model[0].lora_B)
    ids = torch.tensor([0, 1, 1, 2])
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=0.1)
    for _ in range(3):
        (model(ids) - 1).square().sum().backward()  # which has a gradient at zero, the padding's row
        optimizer.step()
    assert torch.equal(model(torch.tensor([1])), model[0].base(torch.tensor([1])))


def test_an_embedding_leaves_the_output_layer_that_is_tied_to_it_alone():
    """The output layer goes on with W, unmerged, merged and fused; who ties the two anew is told to wait."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=True, **shape)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(6).view(1, 6)
    plain = copy.deepcopy(model)
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    W = model.lm_head.weight
    minilora.inject(model, "embed_tokens", LoRAConfig(r=2))
    embedding = randomise(model).model.embed_tokens
    plain.model.embed_tokens.weight.data = embedding.effective_weight().detach()
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        assert distance(model(input_ids=ids).logits, expected) < 1e-5
        told = "embed" if transformers_major() >= 5 else "cannot assign"
        for tie, words in ((model.tie_weights, told), (lambda: model.resize_token_embeddings(40), "embed")):
            with unchanged(model), pytest.raises((AttributeError, TypeError), match=words):
                tie()
        minilora.merge(model)
        assert (model.lm_head.weight is W, embedding.base.weight is W) == (True, False)
        assert distance(model(input_ids=ids).logits, expected) < 1e-5
        minilora.unmerge(model)
        assert model.lm_head.weight is embedding.base.weight is W
        with pytest.warns(UserWarning, match="'model.embed_tokens.weight' was tied"):
            minilora.fuse(model)
        assert model.lm_head.weight is W
        model.config.tie_word_embeddings = False  # as the warning says
        model.resize_token_embeddings(40)
        assert distance(model(input_ids=ids).logits[..., :32], expected) < 1e-5


def test_gradients_by_frequency_are_those_of_the_whole_weight():
    torch.manual_seed(0)
    base = nn.Embedding(6, 4, scale_grad_by_freq=True, dtype=torch.float64)
    model = minilora.inject(nn.Sequential(base), "0", LoRAConfig(r=2))
    nn.init.normal_(model[0].lora_B)
    ids = torch.tensor([1, 1, 1, 2])
    model(ids).square().sum().backward()
    W = model[0].effective_weight().detach().requires_grad_()
    nn.functional.embedding(ids, W, scale_grad_by_freq=True).square().sum().backward()
    expected = model[0].scaling * (model[0].lora_A.detach() @ W.grad).T  # (dim, r)
    assert distance(model[0].lora_B.grad, expected) < 1e-12


def fused_experts(model: nn.Module) -> nn.Module:
    """Return the model, if its experts are stacks: before transformers 5, most were modules."""
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("these transformers do not fuse experts")
    return model


def experts_model(name: str):
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
    }
    configs = {
        "Qwen3Moe": {"head_dim": 16, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2},
        "GptOss": {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
        "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }
    config = getattr(transformers, f"{name}Config")(**shape, **configs[name], bos_token_id=0, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss", "Mixtral"])
def test_fused_experts_of_transformers(name, way, tmp_path):
    """Rank 3, whose rows do not begin where the grouped product wants them."""
    model, plain, ids = fused_experts(experts_model(name)), experts_model(name), torch.arange(12).view(2, 6)
    model.set_experts_implementation(way)
    plain.set_experts_implementation(way)
    minilora.inject(model, ["gate_up_proj", "down_proj"], LoRAConfig(r=3))
    for tensor in minilora.adapter_state_dict(model).values():
        nn.init.normal_(tensor, std=0.1)
    gradients = []
    for owner, site in minilora.sites.injected_sites(model).items():
        for wrapper in site.wrappers:
            A, B = (t.detach().clone().requires_grad_() for t in (wrapper.lora_A, wrapper.lora_B))
            delta = wrapper.scaling * B @ A
            delta = delta.mT if wrapper.layout.transposed else delta
            module = plain.get_submodule(owner)
            weight = module._parameters.pop(wrapper.parameter).detach() + delta
            module.__dict__[wrapper.parameter] = weight
            gradients += [(wrapper.lora_A, A), (wrapper.lora_B, B)]
    y, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert distance(y.detach(), expected.detach()) < 1e-5
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in gradients:
        assert distance(ours.grad, theirs.grad) < 1e-4
    model.eval()
    with torch.no_grad():
        assert distance(minilora.merge(model)(input_ids=ids).logits, expected.detach()) < 1e-5
        minilora.unmerge(model)
    minilora.save(model, tmp_path / "a.safetensors")
    fresh = experts_model(name)
    fresh.set_experts_implementation(way)
    minilora.load(fresh.eval(), tmp_path / "a.safetensors")
    assert raw(fresh(input_ids=ids).logits) == raw(model(input_ids=ids).logits)


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_fused_experts_compile_in_one_graph_and_form_nothing(way, monkeypatch):
    """In float32 the grouped product is another operator there, which transformers registers."""
    model, ids = fused_experts(experts_model("Qwen3Moe")), torch.arange(12).view(2, 6)
    model.set_experts_implementation(way)
    minilora.inject(model, ["gate_up_proj", "down_proj"], LoRAConfig(r=3))
    for tensor in minilora.adapter_state_dict(model).values():
        nn.init.normal_(tensor, std=0.1)
    monkeypatch.delattr(EffectiveWeight, "whole")
    torch.compiler.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    try:
        found = compiled(input_ids=ids).logits.detach()
    except torch._dynamo.exc.Unsupported:  # by an old torch
        bare = torch.compile(experts_model("Qwen3Moe").eval(), fullgraph=True, backend="aot_eager")
        skip_as_the_bare_model(lambda: bare(input_ids=ids))
    assert distance(found, model(input_ids=ids).logits.detach()) < 1e-5
    torch.compiler.reset()


def test_all_linear_reaches_experts_and_packed_projections_and_spares_routers():
    model = minilora.inject(fused_experts(experts_model("Qwen3Moe")), "all-linear", LoRAConfig(r=2))
    names = set(minilora.adapter_state_dict(model))
    assert any(name.endswith("experts.gate_up_proj.lora_A") for name in names)
    assert any(name.endswith("experts.down_proj.lora_A") for name in names)
    assert not any("gate.weight" in name or "router" in name or "lm_head" in name for name in names)
    *_, share, embedding, head, router = str(minilora.summary(model)).splitlines()
    assert share == "LoRA reaches 87.7 % of the base's matrix weights"
    assert [embedding, head, router] == [
        f"    not {name} x1" for name in ("model.embed_tokens", "lm_head", "model.layers.*.mlp.gate")
    ]
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    minilora.inject(encoder, "all-linear", LoRAConfig(r=2))
    assert "self_attn.in_proj_weight.lora_A" in minilora.adapter_state_dict(encoder)


@pytest.mark.parametrize(
    ("make", "target", "says"),
    [
        (lambda: nn.Sequential(nn.LSTM(4, 4)), "0", "keeps its weights flat|has no weight"),
        (lambda: nn.Sequential(nn.LSTM(4, 4)), "weight_ih_l0", "keeps its weights flat"),
        (lambda: nn.Sequential(nn.GRU(4, 4)), "0", r"has no weight of its own; give 'weight_ih_l0', "),
        (lambda: nn.Sequential(nn.GRU(4, 4)), "0.weight_hh_l0", "GRU keeps its weights flat"),
        (lambda: nn.Sequential(nn.LayerNorm(4)), "0", "needs a matrix"),
        (lambda: nn.Sequential(nn.LayerNorm(4)), "0.bias", "needs a matrix"),
        (
            lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1))),
            "0",
            "has no weight of its own|no parameter 'weight'",
        ),
        (lambda: BY_NAME["table"].build().layer, "table", "parameter of the model itself"),
    ],
)
def test_what_cannot_be_reached_is_refused_by_name(make, target, says):
    model = make()
    with unchanged(model), pytest.raises(TargetError, match=says):
        minilora.inject(model, target)


def test_all_that_cannot_be_is_refused_together():
    model = nn.ModuleDict({"a": Experts(), "b": Experts(), "c": nn.Conv1d(4, 4, 1), "d": Experts()})
    model["b"].up = model["a"].up
    for name, value in {
        "counts": torch.zeros(3, 3, dtype=torch.int64),
        "scale": torch.tensor(1.0),
        "empty": torch.zeros(0, 3),
    }.items():
        setattr(model["c"], name, nn.Parameter(value, requires_grad=False))
    targets = ["counts", "scale", "empty", "bias", "c.weight", "a.up", "d.down"]
    with unchanged(model), pytest.raises(TargetError) as error:
        minilora.inject(model, targets, LoRAConfig(r=1), trainable=["d.down", "b.up"])
    for line in (
        "7 problems; the model has not been changed",
        "'c.counts': 'counts' of Conv1d is a Parameter of torch.int64",
        "'c.scale': 'scale' has the shape ()",
        "'c.empty': 'empty' has the shape (0, 3)",
        "'c.bias': 'bias' has the shape (4,)",
        "'a.up': is one parameter of several modules ('a.up', 'b.up'); untie it first",
        "'d.down': trainable names what is, contains or lies inside an injected site",
        "'b.up': trainable names a parameter that is tied to 'a.up'",
    ):
        assert line in str(error.value), line
    minilora.inject(model, "c", LoRAConfig(r=1), trainable=["d.down"])
    with (
        unchanged(model),
        pytest.raises(TargetError, match=r"'d\.down': carries trained in full \(down\) as well"),
    ):
        minilora.inject(model, "d.down")
    with unchanged(model), pytest.raises(TargetError, match=r"'c\.weight'.*choose one of the two"):
        minilora.inject(model, "d.up", trainable=["c.weight"])


def test_parameters_are_trained_as_copies_saved_and_loaded(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})

    def run(model, x):
        return model["norm"](model["fc"](x))

    model, x = make(), torch.randn(3, 8)
    bare = make().requires_grad_(False)
    expected = run(bare, x)
    minilora.inject(model, "fc", LoRAConfig(r=2), trainable=["fc.bias", "norm.weight", "norm.bias"])
    assert torch.equal(run(model, x), expected)
    assert set(minilora.adapter_state_dict(model)) == {
        "fc.lora_A",
        "fc.lora_B",
        "fc.bias",
        "norm.weight",
        "norm.bias",
    }
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=0.1)
    for _ in range(2):
        run(model, x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = run(model, x)
    assert distance(trained.detach(), expected) > 0.01
    with minilora.disabled(model):
        assert torch.equal(run(model, x), expected)
    minilora.save(model, tmp_path / "a.safetensors")
    fresh = minilora.load(make(), tmp_path / "a.safetensors")
    assert torch.equal(run(fresh, x), trained)
    assert "norm" in str(minilora.summary(fresh))
    assert distance(run(minilora.merge(model.eval()), x).detach(), trained.detach()) < 1e-6
    minilora.fuse(model)
    assert type(model["fc"]) is nn.Linear
    assert type(model["norm"]) is nn.LayerNorm
    assert distance(run(model, x).detach(), trained.detach()) < 1e-6
    minilora.eject(fresh)
    assert state(fresh) == state(bare)


class Vision(nn.Module):
    """A model with parameters of its own, as timm's have."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.patches = nn.Conv2d(3, 8, 4, 4)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed


def test_class_tokens_and_positions_are_trained_saved_loaded_and_shown(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"vision": Vision()})

    names, images = ["cls_token", "pos_embed"], torch.randn(2, 3, 8, 8)
    bare = make()["vision"]
    with unchanged(bare), pytest.raises(TargetError, match=r'nn\.ModuleDict\(\{"model": model\}\)'):
        minilora.inject(bare, "patches", trainable=names)
    model = minilora.inject(make(), "patches", LoRAConfig(r=2), trainable=names)
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=0.5)
    (model["vision"](images) - 1).square().sum().backward()
    optimizer.step()
    minilora.save(model, tmp_path / "a.safetensors")
    fresh = minilora.load(make(), tmp_path / "a.safetensors")
    assert raw(fresh["vision"](images)) == raw(model["vision"](images))
    state_dict = minilora.adapter_state_dict(fresh)
    assert set(state_dict) == {f"vision.{n}" for n in (*names, "patches.lora_A", "patches.lora_B")}
    assert all(state_dict[f"vision.{name}"].any() for name in names)
    for name in names:
        assert f"vision.{name} " in str(minilora.summary(fresh))
    assert state(minilora.eject(model)) == state(make())


def test_a_parameter_trained_later_on_a_layer_with_lora():
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
    minilora.inject(model, "fc", LoRAConfig(r=2))
    minilora.inject(model, "out", LoRAConfig(r=2), trainable=["fc.bias"])
    nn.init.ones_(minilora.adapter_state_dict(model)["fc.bias"])
    nn.init.normal_(model["fc"].lora_B)
    x = torch.randn(3, 8)
    expected = nn.functional.linear(x, model["fc"].effective_weight(), torch.ones(8))
    assert distance(model["fc"](x).detach(), expected.detach()) < 1e-5
    assert torch.equal(model["fc"].bias, torch.ones(8))
    with torch.no_grad():
        assert distance(minilora.merge(model)["fc"](x), expected) < 1e-5


def test_configs_by_site():
    def make():
        return nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 1)})

    ranks = {"query": LoRAConfig(r=4), "value": LoRAConfig(r=2, alpha=2), "conv": LoRAConfig(r=1)}
    model = minilora.inject(make(), ["query", "value", "conv"], ranks)
    assert [model[name].config.r for name in ranks] == [4, 2, 1]
    model = minilora.inject(make(), ["query", "conv"], lambda name, module: LoRAConfig(r=len(name)))
    assert [model[name].config.r for name in ("query", "conv")] == [5, 4]
    bare = make()
    with unchanged(bare), pytest.raises(TargetError, match=r"no entry matches 'conv'") as error:
        minilora.inject(bare, ["query", "conv"], {"query": LoRAConfig(), "valu": LoRAConfig()})
    assert "'valu' matches none" in str(error.value)
    with unchanged(bare), pytest.raises(TypeError, match="must be a LoRAConfig"):
        minilora.inject(bare, ["query"], lambda name, module: {"r": 4})
    experts = nn.ModuleDict({"experts": Experts(), "fc": nn.Linear(8, 8)})
    minilora.inject(  # given what the target names, the parameter itself
        experts, ["up", "fc"], lambda name, value: LoRAConfig(r=5 if isinstance(value, nn.Parameter) else 1)
    )
    assert [experts["experts"].config.r, experts["fc"].config.r] == [5, 1]


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the size of the largest new tensor that an operation made."""

    def __init__(self, spared):
        super().__init__()
        self.spared = spared
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.spared:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_nothing_of_the_experts_size_is_formed(way):
    """Neither forward nor backward: (E, out, in) is the largest thing there is, and stays the only one."""
    transformers = pytest.importorskip("transformers")
    if way == "grouped_mm" and not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped product; what stands in for it gives every expert a gradient")
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(vocab_size=32, intermediate_size=64, **shape, **experts)
    model = fused_experts(transformers.Qwen3MoeForCausalLM(config))
    model.set_experts_implementation(way)
    minilora.inject(model, ["gate_up_proj", "down_proj"], LoRAConfig(r=2))
    experts_size = min(p.numel() for name, p in model.named_parameters() if name.endswith("down_proj"))
    spared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with Sizes(spared) as sizes:
        model(input_ids=torch.arange(8).view(1, 8)).logits.square().sum().backward()
    assert 0 < sizes.largest < experts_size
