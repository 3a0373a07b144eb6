"""Layers whose weight is read by other code than their own stay in 16 bits: packed, they would compute nonsense."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nf4lora import NF4Config, NF4Linear, prepare, report
from nf4lora.quantization.quantizer import layers_to_pack
from nf4lora.quantization.weight_readers import chains_read, read_weights

from support.adapted import adapted, packed_llama
from support.families import answer, inputs, tiny

pytestmark = pytest.mark.filterwarnings("ignore:prepare. .* of the weights beyond embeddings:UserWarning")


def multiplied(x, layer):
    return x @ layer.weight.T


def handed_on(x, *, layer):
    return multiplied(x, layer)


class Reading(nn.Module):
    """Reads the weight of `read` in one way or another, and calls `called`."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(64, 64), nn.Linear(64, 64)
        self.several = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.inner = nn.Sequential(nn.Linear(64, 64))


class Directly(Reading):
    def forward(self, x):
        return self.called(x) @ self.read.weight.T


class ByAnotherName(Reading):
    def forward(self, x):
        layer = self.read
        weight = layer.weight
        return F.linear(self.called(x), weight)


class InAMethod(Reading):
    def forward(self, x):
        return self.rest(self.called(x))

    def rest(self, x):
        return x @ self.read.weight.T


class InAProperty(Reading):
    @property
    def matrix(self):
        return self.read.weight

    def forward(self, x):
        return self.called(x) @ self.matrix.T


class InAFunction(Reading):
    def forward(self, x):
        return handed_on(self.called(x), layer=self.read)


class ByGetattr(Reading):
    def forward(self, x):
        return self.called(x) @ getattr(self, "read").weight.T  # noqa: B009


class InItsBase(Directly):
    def forward(self, x):
        return super().forward(x)


class Handed(Reading):
    """A method that is handed on is searched, as transformers' checkpointing does it."""

    def rest(self, x):
        return x @ self.read.weight.T

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.rest, self.called(x), use_reentrant=False)


class TypeOnly(Reading):
    def forward(self, x):
        x = self.called(x)
        if isinstance(self.read.weight, torch.Tensor) and self.read.weight is not None:
            x = x.to(self.read.weight.dtype)
        return self.read(x)


class EachOfSeveral(Reading):
    def forward(self, x):
        for _, layer in enumerate(self.several):
            x = x @ layer.weight.T
        return x + sum(x @ layer.weight.T for layer in self.several)


class OneOfSeveral(Reading):
    def forward(self, x):
        return x @ self.several[0].weight.T + x @ self.inner[0].weight.T


class Harmless(Reading):
    """The device, a guard that knows packed weights, shapes that the layer itself tells, another's weight."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(64), nn.Parameter(torch.ones(64))

    def forward(self, x):
        x = self.norm(x.to(self.read.weight.device)) * self.norm.weight * self.scale
        if self.read.weight.dtype != torch.uint8:
            x = x.to(self.read.weight.dtype)
        return self.read(x) + self.called(x) * self.read.out_features

    def report_norms(self):
        return self.read.weight.norm()  # nothing that forward calls


READ = [Directly, ByAnotherName, InAMethod, InAProperty, InAFunction, ByGetattr, InItsBase, Handed]


@pytest.mark.parametrize("cls", READ)
def test_a_weight_that_is_read_is_found_however_it_is_written(cls):
    model = cls()
    readers = read_weights(model)
    assert set(readers) == {id(model.read)}
    assert str(readers[id(model.read)]) == f"{cls.__name__} reads its weight"


@pytest.mark.parametrize("cls", READ)
def test_such_a_layer_stays_and_the_model_computes_what_it_did(cls):
    torch.manual_seed(0)
    model, x = cls(), torch.randn(3, 64)
    prepared = prepare(model, r=2, target_modules=["called"])
    assert type(model.read) is nn.Linear
    assert isinstance(model.called.base_layer, NF4Linear)
    expected = model.called.base_layer(x) @ model.read.weight.T
    assert torch.allclose(prepared(x), expected, atol=1e-5)  # float32 sums in another order


def test_what_only_asks_for_the_dtype_is_told_apart_and_may_carry_an_adapter():
    model = TypeOnly()
    assert str(read_weights(model)[id(model.read)]) == "TypeOnly reads its weight's dtype"
    prepared = prepare(model, r=2)
    prepared(torch.randn(3, 64)).sum().backward()
    assert type(model.read.base_layer) is nn.Linear
    assert model.read.lora_B["default"].weight.grad.norm() > 0


def test_layers_in_a_list_are_found_each_or_all():
    assert chains_read(EachOfSeveral) == {("several", "*"): True}
    assert chains_read(OneOfSeveral) == {("several", "*"): True, ("inner", "*"): True}
    model = EachOfSeveral()
    assert set(read_weights(model)) == {id(layer) for layer in model.several}


def test_what_does_no_harm_is_not_found():
    assert read_weights(Harmless()) == {}


def test_a_class_without_source_is_taken_as_harmless():
    namespace = {}
    exec("from torch import nn\nclass Made(nn.Module):\n    def forward(self, x):\n        return x", namespace)
    assert chains_read(namespace["Made"]) == {}


def test_the_layers_of_torchs_own_attention_are_found():
    model = nn.TransformerEncoderLayer(64, 4, 64)
    assert set(read_weights(model)) == {id(model.linear1), id(model.linear2), id(model.self_attn.out_proj)}


def test_layers_under_adapters_are_found_too():
    model = Directly()
    layer = model.read
    model.read = nn.ModuleDict({"base_layer": layer})
    assert set(read_weights(model)) == {id(layer)}
    assert read_weights(adapted(packed_llama())) == {}


# --- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "BartForConditionalGeneration", "BertModel"]
)
def test_ordinary_models_read_no_weight_of_a_layer_that_could_be_packed(name):
    assert not [
        reason for reason in layers_to_pack(tiny(name), NF4Config())[1].values() if "reads its weight" in reason
    ]


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("MambaForCausalLM", "backbone.layers.0.mixer.dt_proj", "MambaMixer reads its weight directly"),
        ("JambaForCausalLM", "model.layers.0.mamba.dt_proj", "JambaMambaMixer reads its weight directly"),
        (
            "LongT5ForConditionalGeneration",
            "decoder.block.0.layer.2.DenseReluDense.wo",
            "LongT5DenseActDense reads its weight's dtype directly",
        ),
        ("T5ForConditionalGeneration", "decoder.block.0.layer.2.DenseReluDense.wo", "the model keeps it in float32"),
    ],
)
def test_the_report_names_such_layers(name, layer, reason):
    about = report(prepare(tiny(name), r=2))
    assert {row.name: row.reason for row in about.kept}[layer] == reason


@pytest.mark.parametrize("name", ["LongT5ForConditionalGeneration", "MambaForCausalLM", "JambaForCausalLM"])
def test_a_packed_model_computes_what_its_dequantised_weights_do(name):
    """A cast to the dtype of packed codes, or a product with them, would be off by far more than rounding."""
    model = tiny(name)
    packed = prepare(model, r=2).unload()
    batch = inputs(packed)
    got = answer(packed, batch)
    assert torch.allclose(got, answer(packed.dequantize(), batch), atol=1e-4)
