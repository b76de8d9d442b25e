"""Our LoRA layer and its places in a model against PEFT's."""

import copy
from collections.abc import Mapping
from functools import partial

import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, lora_init
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.base_weights import add_to_weight, dense_weight
from fedlora.models.layers import LoraLayer
from fedlora.models.targets import head_modules, norm_modules
from fedlora.parts.dense import Dense
from fedlora.parts.experts import Experts
from fedlora.parts.heads import Heads
from fedlora.parts.table import Factors
from fedlora.parts.three_factor import ThreeFactor

from plain import pass_by_pass

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # PEFT's, about our twin

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
CONFIGS: Mapping[str, transformers.PretrainedConfig] = {
    "bert": transformers.BertConfig(vocab_size=40, **WIDE),
    "roberta": transformers.RobertaConfig(vocab_size=40, **WIDE),
    "distilbert": transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "gpt2": transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
    "llama": transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, pad_token_id=0, **WIDE),
}


def classifier(kind: str) -> nn.Module:
    config = copy.deepcopy(CONFIGS[kind])
    config.num_labels = 3
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config)


class Net(nn.Module):
    """Non-square layers, stored both ways round."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.last = nn.Linear(7, 12), Conv1D(5, 12), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def moved(adapted: AdaptedModel, rank: int = 4, seed: int = 0) -> Adapter:
    """An adapter whose b is not zero."""
    start = lora_init(adapted.spec, rank, seed)
    torch.manual_seed(seed)
    return {name: LowRank(torch.randn_like(part.b), part.a) for name, part in start.items()}


def in_peft(model: nn.Module, adapter: Adapter, config: peft.LoraConfig) -> nn.Module:
    """PEFT's model with these factors."""
    wrapped = peft.get_peft_model(model, config)
    for name, part in adapter.items():
        layer = wrapped.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(part.a)
        layer.lora_B["default"].weight.data.copy_(part.b / layer.scaling["default"])
    return wrapped


def gradients(model: nn.Module, names: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Of lora_B and lora_A in each module of PEFT's model."""
    layers = {name: model.base_model.model.get_submodule(name) for name in names}
    return {n: (layer.lora_B["default"].weight.grad, layer.lora_A["default"].weight.grad) for n, layer in layers.items()}


def own_gradients(adapted: AdaptedModel, client: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (layer.part.b.grad[client], layer.part.a.grad[client]) for name, layer in adapted.layers.items()}


def assert_near(found: Mapping[str, tuple[Tensor, Tensor]], expected: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Up to 1e-6 of the norm: the rounding of fp32 sums in another order."""
    assert found.keys() == expected.keys()
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pattern", [{}, {"second": 2, "fi.*t": 6}])
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_gradients_are_those_of_pefts_layer(rslora, pattern, dropout):
    net, targets, x = Net(), ["first", "second", "last"], torch.randn(6, 7)
    adapted = AdaptedModel(copy.deepcopy(net), Scaling(16.0, rslora), targets, dropout, pattern)
    adapter = moved(adapted)
    adapted.load_clients([adapter], "ba")
    config = peft.LoraConfig(
        r=4, lora_alpha=16, use_rslora=rslora, target_modules=targets, lora_dropout=dropout, rank_pattern=pattern
    )
    twin = in_peft(net, adapter, config)
    assert {name: part.rank for name, part in adapter.items()} == {
        name: net.get_submodule(name).r["default"] for name in targets
    }
    outputs = []
    for model in (adapted.model, twin):
        torch.manual_seed(3)
        outputs.append(model.train()(x))
        outputs[-1].square().sum().backward()
    assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)
    assert_near(own_gradients(adapted), gradients(twin, adapter))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_transformer_in_training_mode_gives_the_logits_and_gradients_it_gives_in_peft(kind):
    model, ids = classifier(kind), torch.randint(1, 40, (3, 5))
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(8.0), dropout=0.2, head=head_modules(model, ()))
    adapter = moved(adapted)
    adapted.load_clients([adapter], "ba")
    twin = in_peft(model, adapter, peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, lora_dropout=0.2))
    logits = []
    for each in (adapted.model, twin):
        torch.manual_seed(3)
        logits.append(each.train()(input_ids=ids).logits)
        logits[-1].square().sum().backward()
    assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)
    assert_near(own_gradients(adapted), gradients(twin, adapter))


def test_a_model_that_reads_its_layers_weights_is_adapted_as_in_peft():
    """T5 asks for the dtype of one."""
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, num_labels=3)
    torch.manual_seed(0)
    config.decoder_start_token_id = config.pad_token_id
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.cat([torch.randint(2, 40, (3, 5)), torch.ones(3, 1, dtype=torch.long)], 1)
    head = head_modules(model, ())
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(8.0), "all-linear", head=head)
    adapter = moved(adapted)
    adapted.load_clients([adapter], "ba")
    assert any(name.endswith(".wo") for name in adapter)
    layer = next(iter(adapted.layers.values()))
    assert layer.weight is layer.base.weight and layer.out_features == layer.base.out_features
    with pytest.raises(AttributeError, match="wight"):
        layer.wight  # noqa: B018
    twin = in_peft(model, adapter, peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*adapter], modules_to_save=[*head]))
    logits = []
    for each in (adapted.model, twin):
        logits.append(each.eval()(input_ids=ids).logits)
        logits[-1].square().sum().backward()
    assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-6)
    found, expected = own_gradients(adapted), gradients(twin, adapter)
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


class Int8Linear(nn.Module):
    """A quantized layer of which nothing is known but its sizes and what it computes."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.step = float(like.weight.detach().abs().max() / 127)
        self.register_buffer("weight", (like.weight.detach() / self.step).round().to(torch.int8))

    def dense(self) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight.data.copy_(self.weight * self.step)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.step)


def test_a_quantized_layer_is_adapted_like_the_dense_one_it_stands_for():
    quantized = Int8Linear(nn.Linear(7, 12))
    pair = [AdaptedModel(nn.Sequential(layer), Scaling(16.0), "all-linear") for layer in (quantized, quantized.dense())]
    x, adapter = torch.randn(3, 7), moved(pair[0])
    for adapted in pair:
        adapted.load_clients([adapter], "ba")
        adapted.model(x).square().sum().backward()
    assert pair[0].spec.modules == pair[1].spec.modules
    assert_close(pair[0].model(x), pair[1].model(x), rtol=1e-6, atol=1e-6)
    assert_near(own_gradients(pair[0]), own_gradients(pair[1]))


@pytest.mark.parametrize("rest", [(), (5,)])
def test_factors_of_several_clients_give_each_client_what_its_own_would(rest):
    adapted = AdaptedModel(Net(), Scaling(16.0), "all-linear")
    needs_individual_uploads = [moved(adapted, seed=seed) for seed in range(3)]
    x = torch.randn(3, 2, *rest, 7)
    adapted.load_clients(needs_individual_uploads, "ba")
    together = adapted.model(x.flatten(0, 1))
    together.square().sum().backward()
    found = [own_gradients(adapted, i) for i in range(3)]
    for i, single in enumerate(needs_individual_uploads):
        adapted.load_clients([single], "ba")
        alone = adapted.model(x[i])
        alone.square().sum().backward()
        assert_close(together.unflatten(0, (3, 2))[i], alone)
        assert_close(found[i], own_gradients(adapted), rtol=1e-5, atol=1e-5)


def middled(adapted: AdaptedModel, kind: type[ThreeFactor | Heads], seed: int = 0, heads: int = 3) -> dict[str, Factors]:
    """An adapter with a random middle, of rank 6 or twice the number of heads, fp64."""
    torch.manual_seed(seed)
    drawn, rank = partial(torch.randn, dtype=torch.float64), 2 * heads
    middles = {ThreeFactor: {"c": (rank, rank)}, Heads: {"c": (heads, 2, 2), "s": (heads,)}}[kind]
    return {
        name: kind(b=drawn(out, rank), a=drawn(rank, in_), **{key: drawn(x) for key, x in middles.items()})
        for name, (out, in_) in adapted.spec.modules.items()
    }


def dense(net: Net, x: Tensor, parts: Adapter) -> Tensor:
    """What the net computes with each part's matrix added to the weight."""
    update = {name: part.product() for name, part in parts.items()}
    x = functional.linear(x, net.first.weight + update["first"], net.first.bias).tanh()
    x = functional.linear(x, net.second.weight.mT + update["second"], net.second.bias).tanh()
    return functional.linear(x, net.last.weight + update["last"], net.last.bias)


def gradients_of_the_factors(adapted: AdaptedModel, client: int = 0) -> dict[str, Tensor]:
    """Of each trained parameter of a client, of b in our own scale."""
    return {
        f"{name}.{factor}": parameter.grad[client] / layer.part.unit(factor, layer.scale[client])
        for name, layer in adapted.layers.items()
        for factor, parameter in vars(layer.part).items()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("rest", [(), (5,)])
@pytest.mark.parametrize(
    ("kind", "train"), [(ThreeFactor, "bca"), (ThreeFactor, "c"), (ThreeFactor, "ba"), (Heads, "cs"), (Heads, "bcsa")]
)
def test_a_middle_factor_computes_and_learns_as_the_dense_matrix_does(kind, train, rest):
    net, x = Net().double(), torch.randn(6, *rest, 7).double()
    adapted = AdaptedModel(copy.deepcopy(net), Scaling(24.0), ["first", "second", "last"])
    start = middled(adapted, kind)
    leaves = {n: {k: v.clone().requires_grad_(k in train) for k, v in vars(part).items()} for n, part in start.items()}
    trained = adapted.load_clients([start], train)
    found, expected = adapted.model(x), dense(net, x, {name: kind(**tensors) for name, tensors in leaves.items()})
    assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    wanted = {f"{name}.{k}": v.grad for name, tensors in leaves.items() for k, v in tensors.items() if k in train}
    assert len(trained) == 3 * len(train)
    assert_close(gradients_of_the_factors(adapted), wanted)


def assert_each_as_alone(adapted: AdaptedModel, needs_individual_uploads: list[Adapter], x: Tensor, train: str) -> None:
    """Outputs and gradients of clients loaded together, for x [clients, rows, ...], are those of each by itself."""
    adapted.load_clients(needs_individual_uploads, train)
    outputs = adapted.model(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    outputs.square().sum().backward()
    found = [gradients_of_the_factors(adapted, client) for client in range(len(needs_individual_uploads))]
    for i, single in enumerate(needs_individual_uploads):
        adapted.load_clients([single], train)
        alone = adapted.model(x[i])
        alone.square().sum().backward()
        assert_close(outputs[i], alone)
        for key, gradient in gradients_of_the_factors(adapted).items():
            inside = tuple(slice(size) for size in gradient.shape)
            assert_close(found[i][key][inside], gradient)
            assert found[i][key].count_nonzero() == found[i][key][inside].count_nonzero()  # none in the padding


@pytest.mark.parametrize("rest", [(), (5,)])
@pytest.mark.parametrize("kind", [ThreeFactor, Heads])
def test_middle_factors_of_several_clients_give_each_client_what_its_own_would(kind, rest):
    adapted, x = (
        AdaptedModel(Net().double(), Scaling(24.0), ["first", "second", "last"]),
        torch.randn(3, 2, *rest, 7).double(),
    )
    needs_individual_uploads = [middled(adapted, kind, seed, heads) for seed, heads in enumerate([2, 3, 1])]
    assert_each_as_alone(adapted, needs_individual_uploads, x, "bcsa")


@pytest.mark.parametrize("alpha", [6.0, 24.0])
def test_alpha_scales_how_a_middle_factor_learns_only_between_trained_factors(alpha):
    """One step of gradient descent: c on frozen outer factors moves alike for all alpha, b moves by (alpha / rank)^2."""
    adapted, x = AdaptedModel(Net().double(), Scaling(alpha), ["first", "second", "last"]), torch.randn(6, 7).double()
    start = middled(adapted, ThreeFactor)
    adapted.load_clients([start], "bc")
    adapted.model(x).square().sum().backward()
    plain = {f"{n}.{k}": v for n, part in start.items() for k, v in vars(part).items()}
    leaves = {key: value.clone().requires_grad_() for key, value in plain.items()}
    parts = {name: ThreeFactor(**{k: leaves[f"{name}.{k}"] for k in "bca"}) for name in start}
    dense(adapted_net(adapted), x, parts).square().sum().backward()
    for name, layer in adapted.layers.items():
        assert_close(layer.part.c.grad[0], leaves[f"{name}.c"].grad)
        step = layer.part.b.grad[0] * layer.scale[0]  # of our b, for a learning rate of 1
        assert_close(step, (alpha / 6) ** 2 * leaves[f"{name}.b"].grad)


def adapted_net(adapted: AdaptedModel) -> Net:
    """The same net without places for factors."""
    net = Net().double()
    for name, layer in adapted.layers.items():
        setattr(net, name, layer.base)
    return net


def test_an_adapter_without_a_middle_leaves_none_of_an_earlier_one():
    adapted, x = AdaptedModel(Net().double(), Scaling(24.0), ["first", "second", "last"]), torch.randn(6, 7).double()
    two = {name: part.as_two_factors() for name, part in middled(adapted, ThreeFactor, seed=1).items()}
    adapted.load_clients([two])
    expected = adapted.model(x)
    for kind in (Heads, ThreeFactor):
        adapted.load_clients([middled(adapted, kind)])
        assert not torch.equal(adapted.model(x), expected)
    adapted.load_clients([two])
    assert torch.equal(adapted.model(x), expected)


@pytest.mark.parametrize("kind", [ThreeFactor, Heads])
@pytest.mark.parametrize("train", ["bca", "c", "cs", ""])
def test_reading_after_loading_keeps_untrained_factors_beside_a_middle(kind, train):
    adapted = AdaptedModel(Net().double(), Scaling(24.0), ["first", "second", "last"])
    start = middled(adapted, kind)
    adapted.load_clients([start], train)
    after = adapted.read(0, start, train)
    for name, part in start.items():
        assert type(after[name]) is kind
        for factor, tensor in vars(part).items():
            assert (getattr(after[name], factor) is tensor) == (factor not in train)
            assert_close(getattr(after[name], factor), tensor)


def routed(adapted: AdaptedModel, seed: int = 0, others: int = 2, rank: int = 3) -> dict[str, Experts]:
    """An adapter of random experts, fp64."""
    torch.manual_seed(seed)
    drawn = partial(torch.randn, dtype=torch.float64)
    return {
        name: Experts(
            b=drawn(out, rank),
            a=drawn(rank, in_),
            g=drawn(2 * others + 1, in_),
            others_b=drawn(others, out, rank),
            others_a=drawn(others, rank, in_),
        )
        for name, (out, in_) in adapted.spec.modules.items()
    }


@pytest.mark.parametrize("rest", [(), (5,)])
@pytest.mark.parametrize("others", [1, 3])
def test_a_pass_for_each_expert_computes_and_learns_as_one_for_each_slot_and_expert(others, rest):
    net, x = Net().double(), torch.randn(6, *rest, 7).double()
    adapted = AdaptedModel(copy.deepcopy(net), Scaling(24.0), ["first", "second", "last"])
    start = routed(adapted, others=others)
    leaves = {n: {k: v.clone().requires_grad_(k in "bag") for k, v in vars(part).items()} for n, part in start.items()}
    adapted.load_clients([start], "bag")
    found, expected = adapted.model(x), x
    for name, activation in (("first", torch.tanh), ("second", torch.tanh), ("last", nn.Identity())):
        update = pass_by_pass(Experts(**leaves[name]), expected, expected)
        expected = activation(net.get_submodule(name)(expected) + update)
    assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    wanted = {f"{name}.{k}": v.grad for name, tensors in leaves.items() for k, v in tensors.items() if k in "bag"}
    assert_close(gradients_of_the_factors(adapted), wanted)  # and none of the other experts
    assert all(layer.part.others_b.grad is None for layer in adapted.layers.values())


def test_the_router_sees_the_input_before_dropout_and_the_experts_after():
    base, x = nn.Linear(7, 12).double(), torch.randn(6, 5, 7).double()
    adapted = AdaptedModel(nn.Sequential(copy.deepcopy(base)), Scaling(24.0), "all-linear", dropout=0.4)
    start = routed(adapted)
    adapted.load_clients([start])
    torch.manual_seed(3)
    found = adapted.model.train()(x)
    torch.manual_seed(3)
    dropped = functional.dropout(x, 0.4)
    assert_close(found, base(x) + pass_by_pass(start["0"], x, dropped))
    assert not torch.allclose(found, base(x) + pass_by_pass(start["0"], dropped, dropped))


@pytest.mark.parametrize("rest", [(), (5,)])
def test_experts_of_several_clients_give_each_client_what_its_own_would(rest):
    adapted, x = (
        AdaptedModel(Net().double(), Scaling(24.0), ["first", "second", "last"]),
        torch.randn(3, 2, *rest, 7).double(),
    )
    needs_individual_uploads = [routed(adapted, seed, rank=rank) for seed, rank in enumerate([2, 3, 1])]
    assert_each_as_alone(adapted, needs_individual_uploads, x, "bag")


@pytest.mark.parametrize("train", ["bag", "g", ""])
def test_reading_experts_after_loading_keeps_what_was_not_trained(train):
    adapted = AdaptedModel(Net().double(), Scaling(24.0), ["first", "second", "last"])
    start = routed(adapted)
    adapted.load_clients([start], train)
    after = adapted.read(0, start, train)
    for name, part in start.items():
        assert type(after[name]) is Experts
        for factor, tensor in vars(part).items():
            assert (getattr(after[name], factor) is tensor) == (factor not in train)
            assert_close(getattr(after[name], factor), tensor)


def test_experts_leave_nothing_to_an_adapter_without_any():
    adapted, x = AdaptedModel(Net().double(), Scaling(24.0), ["first", "second", "last"]), torch.randn(6, 7).double()
    two = {name: LowRank(part.b, part.a) for name, part in routed(adapted).items()}
    adapted.load_clients([two])
    expected = adapted.model(x)
    adapted.load_clients([routed(adapted)])
    assert not torch.equal(adapted.model(x), expected)
    adapted.load_clients([two])
    assert torch.equal(adapted.model(x), expected)


def test_different_numbers_of_experts_are_not_loaded_together():
    adapted = AdaptedModel(Net().double(), Scaling(24.0), ["first", "second", "last"])
    with pytest.raises(AssertionError, match="several structures"):
        adapted.load_clients([routed(adapted, others=1), routed(adapted, others=2)])


def test_without_factors_the_layer_is_its_base():
    base, x = nn.Linear(7, 12), torch.randn(3, 7)
    assert torch.equal(LoraLayer(base, dropout=0.5)(x), base(x))


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("bert", None),
        ("gpt2", None),
        ("llama", None),
        ("roberta", None),
        ("bert", "all-linear"),
        ("gpt2", "all-linear"),
        ("llama", "all-linear"),
        ("roberta", "all-linear"),
        ("distilbert", ["q_lin", "lin1"]),
        ("bert", ["key", "attention.output.dense"]),
        ("roberta", ["dense"]),
        ("bert", ["bert.encoder.layer.1.attention.self.query"]),
        ("bert", r".*layer\.0.*\.(query|key)"),
        ("gpt2", ["c_proj"]),
    ],
)
def test_the_targets_are_the_modules_that_peft_wraps(kind, targets):
    model = classifier(kind)
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(16.0), targets, head=head_modules(model, ()))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets)).base_model.model
    expected = {name for name, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer)}
    assert expected and set(adapted.layers) == expected


@pytest.mark.parametrize("targets", [["no_such"], "no_such.*"])
def test_targets_that_match_nothing_are_refused_with_the_names_there_are(targets):
    with pytest.raises(UserError, match=r"lora\.targets.*no_such.*first, last, second"):
        AdaptedModel(Net(), Scaling(16.0), targets)


def test_an_architecture_without_a_default_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"'distilbert'; set lora\.targets.*k_lin.*q_lin"):
        AdaptedModel(classifier("distilbert"), Scaling(16.0))


@pytest.mark.parametrize("train", ["b", "a", "ba", "w", ""])
def test_reading_after_loading_gives_the_adapter_and_untouched_factors_as_the_same_objects(train):
    adapted = AdaptedModel(Net(), Scaling(16.0, rslora=True), ["first", "second"], rank_pattern={"first": 3}, head=["last"])
    start = {**moved(adapted, rank=5), **{name: Dense(torch.randn_like(w)) for name, w in adapted.spec.head.items()}}
    adapted.load_clients([start], train)
    after = adapted.read(0, start, train)
    assert list(after) == list(start)
    for name, part in start.items():
        for factor in ("w",) if isinstance(part, Dense) else ("b", "a"):
            assert (getattr(after[name], factor) is getattr(part, factor)) == (factor not in train)
            assert_close(getattr(after[name], factor), getattr(part, factor), rtol=1e-6, atol=1e-7)


def test_training_changes_factors_and_head_and_no_bit_of_the_rest():
    net = Net()
    kept = [*net.first.parameters(), *net.second.parameters()]
    before = [parameter.clone() for parameter in kept]
    adapted = AdaptedModel(net, Scaling(16.0), ["first", "second"], head=["last"])
    start = {**moved(adapted), **{name: Dense(w) for name, w in adapted.spec.head.items()}}
    trained = adapted.load_clients([start], "baw")
    net(torch.randn(4, 7)).square().sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))
    after = adapted.read(0, start, "baw")
    assert not any(torch.equal(after[n].b, start[n].b) or torch.equal(after[n].a, start[n].a) for n in ("first", "second"))
    assert not torch.equal(after["last.weight"].w, start["last.weight"].w)


@pytest.mark.parametrize("layer", [nn.Linear(7, 12), Conv1D(12, 7)], ids=["Linear", "Conv1D"])
def test_a_change_of_the_base_adds_its_product_with_the_input(layer):
    x, delta = torch.randn(4, 7), torch.randn(12, 7)
    before = layer(x)
    add_to_weight(layer, delta)
    assert_close(layer(x), before + x @ delta.mT)


@pytest.mark.parametrize("quantized", [False, True])
def test_base_updates_and_factors_beside_add_their_products_with_the_input(quantized):
    layers = [Int8Linear(nn.Linear(7, 12)) if quantized else nn.Linear(7, 12), Conv1D(5, 12)]
    adapted, x = AdaptedModel(nn.Sequential(*layers), Scaling(16.0), "all-linear"), torch.randn(4, 7)
    one, two, three = (moved(adapted, seed=seed) for seed in range(3))
    dense = {name: sum(each[name].product() for each in (one, two, three)) for name in one}
    middle = layers[0](x) + x @ dense["0"].mT
    expected = layers[1](middle) + middle @ dense["1"].mT
    adapted.merge_into_base(one)
    adapted.merge_into_base(two)
    adapted.load_clients([{}], frozen_extra=[three])
    assert_close(adapted.model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["first", "second"])
def test_base_updates_into_a_base_in_bf16_add_up_as_in_fp32(name):
    net = Net()
    exact = dense_weight(net.get_submodule(name)).clone()
    adapted = AdaptedModel(net, Scaling(16.0), ["first", "second"], head=["last"], precision=torch.bfloat16)
    assert_close(adapted.spec.weight(name), exact, rtol=0, atol=0)
    out, in_ = adapted.spec.modules[name]
    small = LowRank(torch.full((out, 1), 1e-4), torch.ones(1, in_))  # less than bf16 can tell from 1/4
    for _ in range(50):
        adapted.merge_into_base({name: small})
    stored = dense_weight(adapted.layers[name].base)
    assert torch.equal(stored, (exact + 50 * small.product()).bfloat16().float())
    assert_close(adapted.spec.weight(name), exact, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["first", "second", "last"])
def test_the_pretrained_weight_is_read_out_by_in_whatever_was_folded_since(name):
    net = Net()
    stored = net.get_submodule(name).weight.detach().clone()
    adapted = AdaptedModel(net, Scaling(16.0), "all-linear")
    adapted.merge_into_base(moved(adapted))
    assert_close(adapted.spec.weight(name), stored.mT if name == "second" else stored, rtol=0, atol=0)


def test_the_weight_of_a_quantized_layer_is_not_read_as_if_it_were_dense():
    with pytest.raises(UserError, match="quantized"):
        AdaptedModel(nn.Sequential(Int8Linear(nn.Linear(7, 12))), Scaling(16.0), "all-linear").spec.weight("0")


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2"])
def test_the_head_of_a_checkpoint_without_one_is_all_that_lies_beside_the_encoder(kind, tmp_path):
    model = classifier(kind)
    model.base_model.save_pretrained(tmp_path)
    transformers.logging.set_verbosity_error()
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    frozen_extra = [n for n, m in model.named_children() if m is not model.base_model and any(True for _ in m.parameters())]
    assert frozen_extra and list(head_modules(model, report["missing_keys"])) == frozen_extra


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2"])
def test_the_head_of_a_complete_checkpoint_is_what_peft_saves_whole(kind):
    model = classifier(kind)
    found = head_modules(model, ())
    targets = ["q_lin"] if kind == "distilbert" else None
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets))
    saved = [n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    assert saved and list(found) == saved


@pytest.mark.parametrize(("kind", "count"), [("bert", 5), ("gpt2", 5), ("llama", 5)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_each_clients_layer_norms_are_those_of_a_model_of_its_own(kind, count, precision):
    model = classifier(kind).eval()
    head = head_modules(model, ())
    norms = norm_modules(model, head)
    assert len(norms) == count
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(8.0), head=[*head, *norms], precision=precision)
    clients = [{n: Dense(w + 0.3 * torch.randn_like(w)) for n, w in adapted.spec.head.items()} for _ in range(2)]
    trained = adapted.load_clients(clients, "w")
    assert len(trained) == len(adapted.spec.head) and any(name.startswith(norms[0]) for name in adapted.spec.head)
    ids = torch.randint(1, 40, (4, 6))
    found = adapted.model.eval()(input_ids=ids).logits
    found.sum().backward()
    assert all(bool(x.grad.any()) for x in trained)
    for own, run in zip(clients, range(2), strict=True):
        twin = copy.deepcopy(model)
        twin.load_state_dict({name: part.w for name, part in own.items()}, strict=False)
        rows = ids[2 * run : 2 * run + 2]
        loose = {"rtol": 0.1, "atol": 0.1} if precision == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        assert_close(found[2 * run : 2 * run + 2].float(), twin(input_ids=rows).logits, **loose)
