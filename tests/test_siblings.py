"""Layers that are called with the same tensor are computed together, and no bit of any result differs.

Each model is held against a twin that calls every layer alone: outputs, gradients, and which parameters get none.
On a GPU the sums are taken in another order, within the tolerance named there.
"""

import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn

from nf4lora import NF4Linear, prepare
from nf4lora.adapters import lora_layer, siblings

from support.adapted import config, packed_llama
from support.families import FAMILIES, answer, inputs, tiny
from support.siblings import (
    GROUP,
    REORDERED,
    SINGLE,
    K,
    Row,
    Twins,
    alone,
    assert_same,
    calls_of,
    drawn,
    gradients,
    grouped,
    layer,
    layers,
    learned,
    loss_of,
    row,
    step,
)

pytestmark = pytest.mark.filterwarnings("ignore:prepare. .* of the weights beyond embeddings:UserWarning")

QKV, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(5))
# The same through a whole model.
REORDERED_MODEL = 1e-4


@pytest.fixture(autouse=True)
def on_every_device(monkeypatch):
    monkeypatch.setattr(siblings, "DEVICES", {"cpu", "cuda"})


def model_step(model, batch=None):
    """Loss, logits and gradients of a causal language model, and the gradient of its embeddings' result."""
    model.zero_grad(set_to_none=True)
    ids = (IDS if batch is None else batch).to(model.device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embedded, labels=ids, use_cache=False)
    output.loss.backward()
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), "dx": embedded.grad, **gradients(model)}


def prepared(name, blocks=1, **options):
    """A tiny prepared model of a family, whose B are not zero."""
    model = tiny(name) if blocks == 1 else deeper(name, blocks)
    torch.manual_seed(0)
    return prepare(model, **{"r": 4, "init_lora_weights": False, **options})


def deeper(name, blocks):
    cls = getattr(__import__("transformers"), name)
    sizes = {"num_hidden_layers": blocks}
    if name.startswith("T5"):
        sizes = {"num_layers": blocks, "num_decoder_layers": blocks}
    elif name.startswith("Bart"):
        sizes = {"encoder_layers": blocks, "decoder_layers": blocks}
    torch.manual_seed(0)
    return cls(cls.config_class(**FAMILIES[name] | sizes)).eval()


# --- which layers, and how many calls --------------------------------------------------------------------------------


def test_a_block_of_seven_layers_makes_four_calls_each_way():
    twins = Twins(prepared("LlamaForCausalLM", 2).train())
    first = twins.compare(model_step)
    assert first == {SINGLE: 14, f"{SINGLE}_backward": 14}
    for _ in range(3):
        calls = twins.compare(model_step)
        assert calls == {SINGLE: 4, GROUP: 4, f"{SINGLE}_backward": 4, f"{GROUP}_backward": 4}
    assert grouped(twins.ours) == [QKV, MLP] * 2


def test_without_gradients_every_layer_computes_itself():
    """A token that is generated takes less time than to look for siblings; but they are found."""
    twins = Twins(prepared("LlamaForCausalLM"))
    with torch.no_grad():
        for _ in range(2):
            assert twins.compare(lambda model: model(IDS).logits) == {SINGLE: 7}
    assert twins.compare(model_step)[GROUP] == 2


def test_the_names_are_those_of_the_model_that_was_asked():
    twins = Twins(prepared("LlamaForCausalLM", 2))
    found = siblings.learn(twins.ours, lambda: twins.ours(IDS))
    assert found == siblings.groups(twins.ours)
    prefix = "base_model.model.model.layers.0."
    assert found[0] == [f"{prefix}self_attn.{name}" for name in QKV]
    assert found[1] == [f"{prefix}mlp.{name}" for name in MLP]
    inner = siblings.groups(twins.ours.get_base_model())
    assert inner[0] == [name.removeprefix("base_model.model.") for name in found[0]]


def test_a_model_that_peft_wrapped_itself_computes_together_too():
    lora_layer.install()
    model = packed_llama()
    torch.manual_seed(0)
    twins = Twins(get_peft_model(model, config()))
    twins.compare(model_step)
    assert twins.compare(model_step)[GROUP] == 2


def test_learning_runs_without_gradients_and_changes_nothing():
    model, seen = row(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def forward():
        seen.append(torch.is_grad_enabled())
        return model(drawn())

    assert siblings.learn(model, forward) == siblings.groups(model) != []
    assert seen == [False]
    assert torch.is_grad_enabled()
    assert_same(dict(model.state_dict()), before)


def test_learning_that_fails_says_why_and_leaves_a_model_that_works():
    twins = Twins(row())

    def forward():
        twins.ours(drawn(), letters="ab")
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        siblings.learn(twins.ours, forward)
    assert torch.is_grad_enabled()
    for _ in range(3):
        twins.compare(step(), REORDERED)


def test_what_is_forgotten_is_learned_again():
    twins = learned()
    assert twins.compare(step())[GROUP] == 1
    siblings.forget(twins.ours)
    assert siblings.groups(twins.ours) == []
    assert twins.compare(step()) == {SINGLE: 3, f"{SINGLE}_backward": 3}
    assert twins.compare(step())[GROUP] == 1


def test_where_the_device_is_not_named_every_layer_computes_alone(monkeypatch):
    twins = learned()
    for devices in (set(), {"cuda"}, {"meta"}):
        monkeypatch.setattr(siblings, "DEVICES", devices)
        assert GROUP not in twins.compare(step())
    monkeypatch.setattr(siblings, "DEVICES", {"cpu"})
    twins.compare(step())
    assert twins.compare(step())[GROUP] == 1
    fresh = row()
    monkeypatch.setattr(siblings, "DEVICES", {"cuda"})
    assert siblings.learn(fresh, lambda: fresh(drawn())) == []


def test_siblings_have_one_node_in_the_graph():
    twins = learned()
    a, b, c = twins.ours(drawn().requires_grad_())
    assert a.grad_fn is b.grad_fn is c.grad_fn
    with alone():
        a, b, c = twins.twin(drawn().requires_grad_())
    assert a.grad_fn is not b.grad_fn


@pytest.mark.parametrize("letters", ["ab", "abcd", "abcde", "abcdefghi"])
def test_a_longer_row_makes_groups_of_up_to_four(letters):
    twins = learned(letters)
    calls = twins.compare(lambda model: {**step()(model), "dx": None})
    assert calls[GROUP] == calls[f"{GROUP}_backward"] == {2: 1, 4: 1, 5: 1, 9: 2}[len(letters)]
    assert calls[SINGLE] == (1 if len(letters) % 4 == 1 else 0)
    # Autograd adds the groups' sums, where it would have added each layer's part to the sum of all before.
    twins.compare(step(), 0.0 if len(letters) <= 4 else REORDERED)


def test_a_layer_without_siblings_computes_alone():
    twins = Twins(row("a"))
    assert twins.learn() == []
    assert twins.compare(step()) == {SINGLE: 1, f"{SINGLE}_backward": 1}


# --- families --------------------------------------------------------------------------------------------------------

# What is computed together in the one block of each (decoders after encoders).
GROUPS = {
    "LlamaForCausalLM": [QKV, MLP],
    "Qwen2ForCausalLM": [QKV, MLP],  # with biases
    "Qwen3ForCausalLM": [QKV, MLP],  # a norm runs between
    "GemmaForCausalLM": [QKV, MLP],
    "Phi3ForCausalLM": [],  # one layer for q, k and v, and one for gate and up
    "GPTNeoXForCausalLM": [],
    "BloomForCausalLM": [],
    "OPTForCausalLM": [QKV],
    "T5ForConditionalGeneration": [["q", "k", "v"], ["q", "k", "v"], ["k", "v"]],
    "BartForConditionalGeneration": [QKV, QKV, ["k_proj", "v_proj"]],
    "BertModel": [["query", "key", "value"]],
    "FalconH1ForCausalLM": None,
    "MambaForCausalLM": None,
    "MixtralForCausalLM": None,
    "Gemma3ForConditionalGeneration": None,
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_family_computes_together_what_takes_the_same_tensor(name):
    model = prepared(name)
    batch = inputs(model.get_base_model())
    found = siblings.learn(model, lambda: answer(model, batch))
    names = sorted(sorted(name.rpartition(".")[2] for name in names) for names in found)
    if GROUPS[name] is not None:
        assert names == sorted(sorted(group) for group in GROUPS[name])
    parents = [{name.rpartition(".")[0] for name in names} for names in found]
    assert all(len(of_group) == 1 for of_group in parents)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_shows_that_layers_compute_together(name):
    twins = Twins(prepared(name).train())
    batch = inputs(twins.ours.get_base_model())

    def run(model):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(2)  # dropout of the model itself
        result = answer(model, batch)
        result.square().mean().backward()
        return {"y": result.detach(), **gradients(model)}

    for _ in range(3):
        # In others the tensor has more readers (a residual, a router, a second branch), and autograd adds all of them.
        calls = twins.compare(run, 0.0 if GROUPS.get(name) is not None else REORDERED_MODEL)
    if GROUPS.get(name):
        assert calls[GROUP] == calls[f"{GROUP}_backward"] == len(GROUPS[name])


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration", "LlamaForCausalLM"])
def test_several_blocks_that_read_one_tensor(name):
    """The states of an encoder are read by every block of the decoder: the sums of their groups are added."""
    twins = Twins(prepared(name, blocks=3))
    batch = inputs(twins.ours.get_base_model())
    twins.learn(**batch)

    def run(model):
        model.zero_grad(set_to_none=True)
        answer(model, batch).square().mean().backward()
        return gradients(model)

    assert twins.compare(run, 0.0 if name.startswith("Llama") else REORDERED_MODEL)[GROUP] >= 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_models_in_16_bits(name, dtype):
    model = prepare(tiny(name).to(dtype), r=4, init_lora_weights=False)
    twins = Twins(model)
    twins.compare(model_step)
    assert twins.compare(model_step)[GROUP] == 2


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "T5ForConditionalGeneration"])
def test_models_under_autocast(name):
    """Each layer casts x, and the parts of its gradient are added in float32: those are no siblings."""
    twins = Twins(prepared(name))
    batch = inputs(twins.ours.get_base_model())

    def run(model):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            result = answer(model, batch)
        result.float().square().mean().backward()
        return gradients(model)

    for _ in range(3):
        twins.compare(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_only_the_order_of_sums_differs(device, dtype):
    model = prepare(tiny("LlamaForCausalLM").to(device, dtype), r=4, init_lora_weights=False)
    twins = Twins(model)
    twins.compare(model_step, 0.0 if device.type == "cpu" else 3e-2)
    # bfloat16: a rounding of each layer's dx less, and what follows from it through the block.
    tolerance = 0.0 if device.type == "cpu" else REORDERED_MODEL if dtype == torch.float32 else 3e-2
    assert twins.compare(model_step, tolerance)[GROUP] == 2


# --- layers that differ, and tensors of every kind -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"b": 7}, "alpha_pattern": {"b": 14}},
        {"rank_pattern": {"b": 2}},
        {"alpha_pattern": {"c": 3}},
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"lora_bias": True},
        {"use_dora": True},
        {"lora_dropout": 0.3},
        {"r": 1},
        {"r": 64},
    ],
    ids=str,
)
def test_adapters_of_every_kind(options):
    twins = Twins(row(biased=True, **options).train())

    def run(model):
        torch.manual_seed(4)
        return step()(model)

    for _ in range(3):
        calls = twins.compare(run, REORDERED if "alpha_pattern" in options or "rank_pattern" in options else 0.0)
    if not {"rank_pattern", "alpha_pattern", "bias", "lora_bias", "use_dora", "lora_dropout"} & options.keys():
        assert calls[GROUP] == 1


@pytest.mark.parametrize("what", ["blocksize", "double_quant", "compute_dtype", "bias", "plain", "unadapted"])
def test_base_layers_that_differ_from_their_siblings(what):
    module = Row("abc", bias=what == "bias")
    for letter in "abc":
        linear, odd = getattr(module, letter), letter == "b"
        options = {
            "blocksize": {"blocksize": 32 if odd else 64},
            "double_quant": {"double_quant": not odd},
            "compute_dtype": {"compute_dtype": torch.bfloat16 if odd else None},
        }.get(what, {})
        if what == "bias" and odd:
            linear.bias = None
        if not (what == "plain" and odd):
            setattr(module, letter, NF4Linear.from_linear(linear, **options))
    lora_layer.install()
    targets = ["a", "c"] if what == "unadapted" else ["a", "b", "c"]
    twins = Twins(get_peft_model(module, config(target_modules=targets, task_type=None)))
    found = twins.learn()
    if what in ("plain", "unadapted"):
        assert found == [["a", "c"]]
    for _ in range(2):
        twins.compare(step(), REORDERED)


@pytest.mark.parametrize(
    "shape", [(K,), (1, K), (0, K), (2, 3, K), (2, 0, K), (1, 2, 3, K), (67, K)], ids=lambda shape: str(list(shape))
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_of_every_shape_and_dtype(shape, dtype):
    assert learned().compare(step(drawn(*shape, dtype=dtype)))[GROUP] == 1


def test_tensors_that_lie_otherwise_in_memory():
    twins = learned()
    wide = drawn(K, 9).t()
    kinds = {
        "transposed": lambda: wide,
        "every other": lambda: drawn(6, 2 * K)[:, ::2],
        "expanded": lambda: drawn(1, K).expand(4, K),
        "parameter": lambda: nn.Parameter(drawn()),
        "view": lambda: drawn(10, K)[2:5],
    }
    for what, make in kinds.items():

        def run(model, make=make):
            x = make()
            x = x if x.requires_grad else x.detach().requires_grad_()
            results = model(x)
            loss_of(results).backward()
            return [y.detach() for y in results], x.grad

        assert twins.compare(run)[GROUP] == 1, what


def test_a_subclass_of_tensor_stays_one():
    class Marked(torch.Tensor):
        pass

    def run(model):
        results = model(drawn().as_subclass(Marked))
        return [type(y).__name__ for y in results], [y.detach().as_subclass(torch.Tensor) for y in results]

    learned().compare(run)


def test_the_argument_by_keyword():
    def run(model):
        x = drawn()
        base = model.get_base_model()
        return [base.a(x), base.b(x=x), base.c(x)]

    twins = learned()
    for _ in range(3):
        twins.compare(run)


def test_results_are_tensors_of_their_own():
    twins = learned()
    for x in (drawn(), drawn(2, 3, K), drawn().requires_grad_()):
        results = twins.ours(x)
        assert all(y.is_contiguous() and y._base is None and y.storage_offset() == 0 for y in results)
        assert len({y.untyped_storage().data_ptr() for y in results}) == 3
        assert all(y.untyped_storage().nbytes() == y.nbytes for y in results)  # none keeps the others alive


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_result_may_be_changed_in_place(changed):
    def run(model):
        leaf = drawn().requires_grad_()
        results = model(leaf)
        results[changed].mul_(2).relu_()
        loss_of(results).backward()
        return [y.detach() for y in results], leaf.grad, gradients(model)

    assert learned().compare(run)[f"{GROUP}_backward"] == 1


def test_a_first_result_may_be_changed_before_the_second_call():
    def run(model):
        base, leaf = model.get_base_model(), drawn().requires_grad_()
        a = base.a(leaf)
        a.add_(1).sin_()
        with torch.no_grad():
            a.mul_(3)
        results = [a, base.b(leaf), base.c(leaf)]
        loss_of(results).backward()
        return [y.detach() for y in results], leaf.grad, gradients(model)

    learned().compare(run)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_x_that_needs_no_gradient():
    assert learned().compare(step(wants=False)) == {GROUP: 1, f"{GROUP}_backward": 1}


def freeze(part, letters="abc"):
    def change(model):
        for letter in letters:
            getattr(layer(model, letter), part)["default"].weight.requires_grad_(False)

    return change


@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("parts", [("lora_A",), ("lora_B",), ("lora_A", "lora_B")])
def test_adapters_that_are_frozen(parts, wants):
    twins = learned()
    for part in parts:
        twins.change(freeze(part))
    for _ in range(3):
        calls = twins.compare(step(wants=wants))
    assert calls[GROUP] == 1


@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("letter", ["a", "b", "c"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_one_adapter_that_is_frozen(part, letter, wants):
    twins = learned()
    twins.change(freeze(part, letter))
    for _ in range(3):
        twins.compare(step(wants=wants), REORDERED)


@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2], [2, 1]])
def test_results_that_the_loss_does_not_use_give_no_gradients(used, wants):
    """Neither zeros, which an optimizer would decay weights for, nor a -0 that became 0 when a zero was added to it."""
    twins = learned()
    calls = twins.compare(step(loss=lambda results: loss_of([results[i] for i in used]), wants=wants))
    assert calls[GROUP] == 1
    names = {name for name, grad in gradients(twins.ours).items() if grad is not None}
    assert len(names) == 2 * len(used)


def test_a_gradient_of_negative_zeros_stays_one():
    twins = learned()

    def run(model):
        leaf = drawn().requires_grad_()
        (dx,) = torch.autograd.grad(model(leaf)[1], leaf, torch.full((5, 64), -0.0))
        return dx

    twins.compare(run)


def test_a_loss_without_gradients_runs_nothing_back():
    twins = learned()
    twins.change(freeze("lora_A"))
    twins.change(freeze("lora_B"))
    calls = twins.compare(step(wants=False))
    assert calls == {GROUP: 1}


@pytest.mark.parametrize("of", [("x",), ("a.A",), ("c.B",), ("x", "b.A"), ("b.B", "a.B", "x")], ids=",".join)
@pytest.mark.parametrize("used", [[1], [0, 1, 2]])
def test_the_gradient_of_some_inputs_only(of, used):
    def run(model):
        leaf = drawn().requires_grad_()
        wanted = []
        for name in of:
            letter, _, part = name.partition(".")
            wanted.append(getattr(layer(model, letter), f"lora_{part}")["default"].weight if part else leaf)
        results = model(leaf)
        return torch.autograd.grad(loss_of([results[i] for i in used]), wanted, allow_unused=True)

    twins = learned()
    assert twins.compare(run)[GROUP] == 1


def test_a_second_backward_of_a_graph_that_is_kept():
    def run(model):
        model.zero_grad()
        leaf = drawn().requires_grad_()
        loss = loss_of(model(leaf))
        loss.backward(retain_graph=True)
        first = leaf.grad.clone()
        loss.backward()
        return first, leaf.grad, gradients(model)

    assert learned().compare(run)[f"{GROUP}_backward"] == 2


def test_a_second_backward_of_a_graph_that_is_gone_raises_the_same():
    def run(model):
        loss = loss_of(model(drawn().requires_grad_()))
        loss.backward()
        with pytest.raises(RuntimeError) as error:
            loss.backward()
        return str(error.value)

    learned().compare(run)


def test_each_result_may_be_differentiated_on_its_own():
    """Alone, each layer has a graph of its own: the gradient of one leaves the others'."""

    def run(model):
        leaf = drawn().requires_grad_()
        for number, y in enumerate(model(leaf)):
            ((number + 1) * y.square().sum()).backward()
        return leaf.grad, gradients(model)

    learned().compare(run, REORDERED)


def test_the_gradient_of_a_gradient_raises_the_same():
    def run(model):
        leaf = drawn().requires_grad_()
        (dx,) = torch.autograd.grad(loss_of(model(leaf)), leaf, create_graph=True)
        with pytest.raises(RuntimeError) as error:
            dx.square().sum().backward()
        return type(error.value).__name__, str(error.value)

    learned().compare(run)


def test_a_loss_of_two_passes():
    """Siblings inside of siblings' graphs: the gradients of two passes are added as they were."""

    def run(model):
        model.zero_grad()
        leaf = drawn().requires_grad_()
        first = model(leaf)
        second = model(first[0].tanh() @ drawn(32, K, seed=4) + leaf)
        loss_of([*first, *second]).backward()
        return [y.detach() for y in second], leaf.grad, gradients(model)

    # Both passes read x: its gradient is a sum of what the passes add, each in one addition where they are groups.
    twins = learned()
    assert twins.compare(run, REORDERED)[GROUP] == 2


def test_hooks_on_tensors_see_what_they_saw():
    def run(model):
        seen, leaf = [], drawn().requires_grad_()
        handles = [p.register_hook(lambda g: seen.append(g.clone())) for p in model.parameters() if p.requires_grad]
        handles += [leaf.register_hook(lambda g: seen.append(g.clone()))]
        results = model(leaf)
        for y in results:
            y.register_hook(lambda g: 2 * g)
            y.retain_grad()
        loss_of(results).backward()
        for handle in handles:
            handle.remove()
        return len(seen), leaf.grad, [y.grad for y in results], gradients(model)

    learned().compare(run)


def test_gradients_that_are_applied_when_they_are_there():
    """An optimizer inside of the backward pass: each parameter is changed as soon as its gradient has come."""

    def run(model):
        def apply(p):
            p.data.sub_(p.grad, alpha=0.01)
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(apply) for p in model.parameters() if p.requires_grad]
        leaf = drawn().requires_grad_()
        results = model(leaf)
        loss_of(results).backward()
        for handle in handles:
            handle.remove()
        return leaf.grad, dict(model.named_parameters())

    twins = learned()
    for _ in range(3):
        assert twins.compare(run)[GROUP] == 1


SAVING = {
    "on the CPU": torch.autograd.graph.save_on_cpu,
    "as copies": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "watched for NaN": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("how", SAVING)
def test_graphs_that_are_saved_in_another_way(how):
    assert learned().compare(step(context=SAVING[how]))[GROUP] == 1


def test_x_that_changes_after_the_call_is_noticed_by_the_backward_pass():
    def run(model):
        x = drawn().requires_grad_() * 1
        loss = loss_of(model(x))
        with torch.no_grad():
            x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    learned().compare(run)


def test_values_that_are_not_finite_pass_as_they_did():
    x = drawn()
    x[0, 3], x[1, 5], x[2] = float("nan"), float("inf"), 0
    learned().compare(step(x))


def test_transforms_are_refused_as_they_were():
    def forward_mode(model):
        with torch.autograd.forward_ad.dual_level():
            return model(torch.autograd.forward_ad.make_dual(drawn(), drawn(seed=1)))

    for function in (
        lambda model: torch.func.vmap(lambda x: model(x)[1])(drawn(2, 3, K)),
        lambda model: torch.func.grad(lambda x: loss_of(model(x)))(drawn()),
        forward_mode,
    ):

        def run(model, function=function):
            with pytest.raises((NotImplementedError, RuntimeError)) as error:
                function(model)
            return type(error.value).__name__, str(error.value)

        twins = learned()
        twins.compare(run)
        assert twins.compare(step())[GROUP] == 1


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_of_a_step_is_kept(backward):
    model = learned().ours
    for _ in range(2):
        x = drawn().requires_grad_(backward)
        hidden = x * 1
        results = model(hidden)
        kept = [weakref.ref(tensor) for tensor in (x, hidden, *results)]
        if backward:
            loss_of(results).backward()
        del x, hidden, results
        model.zero_grad()
        assert [ref() for ref in kept] == [None] * 5  # without collecting garbage: no cycle holds them


def test_learning_keeps_no_tensor():
    model, kept = row(), []

    def forward():
        x = drawn()
        kept.extend(weakref.ref(tensor) for tensor in (x, *model(x)))

    siblings.learn(model, forward)
    assert [ref() for ref in kept] == [None] * 4
    siblings.forget(model)
    forward()  # one that is only noted
    assert [ref() for ref in kept] == [None] * 8


def test_a_result_that_nobody_fetched_is_gone_with_the_next_pass():
    model = learned().ours
    x = drawn().requires_grad_() * 1
    kept = weakref.ref(x)
    layer(model, "a")(x)
    del x
    model(drawn(seed=1))
    assert kept() is None


def test_no_result_is_held_after_it_was_fetched():
    base = learned().ours.get_base_model()
    x = drawn()
    base.a(x)
    kept = weakref.ref(base.b(x))
    assert kept() is None
    base.c(x)


@pytest.mark.parametrize("learn", [False, True])
def test_a_model_is_freed(learn):
    def used():
        model = row()
        step()(model)
        if learn:
            siblings.learn(model, lambda: model(drawn()))
            step()(model)
            layer(model, "a")(drawn().requires_grad_())
        return [weakref.ref(each) for each in layers(model)]

    kept = used()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_x_is_saved_once_for_all():
    """What a graph keeps: x and the packed weights once, S of each layer."""

    def saved(model):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            model(x)
        return sum(t is x or t.data_ptr() == x.data_ptr() for t in kept)

    x = drawn().requires_grad_()
    twins = learned()
    assert saved(twins.ours) == 1
    with alone():
        assert saved(twins.twin) == 3


def test_calls_can_be_counted():
    """The counter itself: what the tests above rely on."""
    model = row()
    with alone():
        assert calls_of(lambda: step()(model)) == {SINGLE: 3, f"{SINGLE}_backward": 3}
        assert calls_of(lambda: None) == {}
    with pytest.raises(AssertionError):
        assert_same({"a": drawn()}, {"a": drawn(seed=1)})
    with pytest.raises(AssertionError):
        assert_same([drawn(), None], [drawn(), drawn()])
    with pytest.raises(AssertionError):
        assert_same([drawn()], [drawn() * 1.01], REORDERED_MODEL)
