"""The fused LoRA layer against PEFT's own on the dequantised model, and every way into and around it."""

import contextlib
import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from peft import get_peft_model
from peft.tuners import lora
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from nf4lora import ops
from nf4lora.adapters import lora_layer
from nf4lora.ops import reference

from support.adapted import IDS, adapted, config, layers, packed_llama, pair, relative, step, trainable
from support.bits import assert_same_bits
from support.models import tiny_llama


@pytest.fixture
def fused_calls(monkeypatch):
    """How often a layer ran with an adapter inside the op."""
    calls = []
    original = ops.lora_linear

    def spy(x, *args, **kwargs):
        calls.extend([1] if kwargs.get("lora_A") is not None else [])
        return original(x, *args, **kwargs)

    monkeypatch.setattr(ops, "lora_linear", spy)
    return calls


# --- the same numbers as PEFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}]
)
def test_logits_and_gradients_are_those_of_peft_on_the_dequantised_model(options):
    ours, theirs = pair(**options)
    (logits, grads), (expected, expected_grads) = step(ours), step(theirs)
    assert relative(logits, expected) < 1e-5
    assert grads.keys() == expected_grads.keys()
    assert len(grads) == 14
    for name, grad in grads.items():
        assert grad.norm() > 0, name
        assert relative(grad, expected_grads[name]) < 1e-5, name


def test_in_bfloat16_we_are_no_further_from_the_truth_than_peft():
    ours, theirs = pair({"dtype": torch.bfloat16})
    # The truth: the same bfloat16 weights in float32 arithmetic.
    truth = copy.deepcopy(theirs).float()
    expected, expected_grads = step(truth)
    (logits, grads), (peft_logits, peft_grads) = step(ours), step(theirs)
    # A and B are rounded once to bfloat16 where PEFT computes in float32: allow that one more rounding.
    assert relative(logits.float(), expected) < 1.5 * relative(peft_logits.float(), expected)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert relative(grad, expected_grads[name]) < 2 * relative(peft_grads[name], expected_grads[name]) + 1e-2, name


def test_every_adapter_runs_inside_the_op(fused_calls):
    model = adapted(packed_llama())
    model(IDS)
    assert len(layers(model)) == 7 == len(fused_calls)


def test_dropout_draws_its_seed_from_torchs_generator_and_its_mask_from_philox():
    layer = layers(adapted(packed_llama(), lora_dropout=0.5).train())[0]
    x = torch.randn(2, 5, 64)
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    seed = torch.randint(lora_layer.SEEDS, (1,))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected, _ = reference.lora_linear(
        x, **layer.base_layer.op_arguments(), lora_A=A, lora_B=B, scaling=2.0, dropout=0.5, seed=seed
    )
    assert relative(y, expected) < 1e-5
    assert not torch.allclose(layer(x), y), "another call must draw another mask"
    layer.eval()
    assert_same_bits(layer(x), layer(x))


def test_dropout_has_the_mean_of_no_dropout():
    layer = layers(adapted(packed_llama(), lora_dropout=0.25).train())[0]
    x = torch.randn(1, 64).expand(4000, 64)  # each row draws its own mask
    with torch.no_grad():
        base = layer.base_layer(x)
        mean = (layer(x) - base).mean(0)
        expected = (layer.eval()(x) - base)[0]
    assert relative(mean, expected) < 0.1  # 1 / sqrt(4000) of a spread of about 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropout_mask(reentrant):
    model = adapted(packed_llama(), lora_dropout=0.4).train()
    logits, grads = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, grads_again = step(model)
    assert_same_bits(logits, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_under_autocast_the_layer_computes_in_autocasts_dtype():
    layer = layers(adapted(packed_llama()))[0]
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, layer(x.bfloat16()))


def test_a_deep_copy_and_a_pickle_compute_the_same():
    model = adapted(packed_llama())
    logits = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(layers(twin)) == 7
        assert_same_bits(twin(IDS).logits, logits)


@pytest.mark.slow
def test_a_whole_model_compiles_into_one_graph_for_all_lengths():
    model = adapted(packed_llama(), lora_dropout=0.2).train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 8), (3, 12), (5, 20)):
        ids = IDS[:1, :1].repeat(batch, length)
        (logits, grads), (expected, expected_grads) = step(compiled, ids=ids), step(model, ids=ids)
        assert relative(logits, expected) < 1e-5
        for name, grad in expected_grads.items():
            assert relative(grads[f"_orig_mod.{name}"], grad) < 1e-5, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- every way into PEFT ---------------------------------------------------------------------------------------------


def test_every_way_into_peft_gives_the_fused_layer(tmp_path):
    from peft import PeftModel, inject_adapter_in_model

    saved = adapted(packed_llama())
    saved.save_pretrained(tmp_path)
    second = adapted(packed_llama())
    second.add_adapter("other", config())
    ways = {
        "get_peft_model": saved,
        "from_pretrained": PeftModel.from_pretrained(packed_llama(), tmp_path),
        "inject_adapter_in_model": inject_adapter_in_model(config(), packed_llama()),
        "a second adapter": second,
        "mixed": get_peft_model(packed_llama(), config(), mixed=True),
    }
    for way, model in ways.items():
        assert len(layers(model)) == 7, way


def test_transformers_own_ways_into_peft_give_the_fused_layer(tmp_path):
    needed = transformers.integrations.peft.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(needed):
        pytest.skip(f"transformers {transformers.__version__} refuses peft {peft.__version__}: it wants {needed}")
    saved = adapted(packed_llama())
    saved.save_pretrained(tmp_path)
    added = packed_llama()
    added.add_adapter(config())
    loaded = packed_llama()
    loaded.load_adapter(str(tmp_path))
    assert len(layers(added)) == len(layers(loaded)) == 7
    assert_same_bits(loaded(IDS).logits, saved(IDS).logits)


@pytest.mark.slow
def test_a_bare_import_is_enough_for_peft(tmp_path):
    """`import nf4lora`, then PEFT: no `prepare`, no other call of ours. And the import alone does not import PEFT."""
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    get_peft_model(model, config()).save_pretrained(tmp_path / "adapter")
    program = f"""
import sys, nf4lora
assert not {{"peft", "trl", "datasets", "bitsandbytes"}} & set(sys.modules), "imported too early"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, quantization_config=nf4lora.NF4Config())
from peft import PeftModel
model = PeftModel.from_pretrained(model, {str(tmp_path / "adapter")!r})
print(type(model.base_model.model.model.layers[0].mlp.up_proj).__name__)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "NF4LoraLinear"


def test_layers_that_peft_made_before_us_are_fused_in_place(monkeypatch, fused_calls):
    lora_layer.install()
    monkeypatch.setattr(lora.LoraModel, "_create_new_module", staticmethod(original_create_new_module()))
    model = get_peft_model(packed_llama(), config())
    assert not layers(model)
    logits = model(IDS).logits
    assert not fused_calls
    assert lora_layer.fuse(model) == 7
    assert relative(model(IDS).logits, logits) < 1e-5
    assert len(fused_calls) == 7
    assert lora_layer.fuse(model) == 0


def original_create_new_module():
    """PEFT's own function, from under ours."""
    replaced = lora.LoraModel.__dict__["_create_new_module"].__func__
    return next(cell.cell_contents for cell in replaced.__closure__ if callable(cell.cell_contents))


def test_installing_twice_changes_nothing():
    lora_layer.install()
    first = lora.LoraModel.__dict__["_create_new_module"]
    lora_layer.install()
    assert lora.LoraModel.__dict__["_create_new_module"] is first


def test_a_peft_that_builds_layers_elsewhere_is_an_import_error(monkeypatch):
    monkeypatch.setattr(lora.LoraModel, "_create_new_module", staticmethod(lambda config, name: None))
    with pytest.raises(ImportError, match=r"_create_new_module.*got peft .*pip install 'peft"):
        lora_layer.install()


def test_other_layers_stay_with_peft():
    model = adapted(packed_llama(), target_modules=["lm_head", "q_proj"])
    assert len(layers(model)) == 1
    assert type(model.base_model.model.lm_head) is lora.Linear


# --- what the op does not cover runs PEFT's code ---------------------------------------------------------------------


def test_a_disabled_adapter_leaves_the_base(fused_calls):
    base = packed_llama()
    model = adapted(copy.deepcopy(base))
    with model.disable_adapter():
        assert_same_bits(model(IDS).logits, base(IDS).logits)
    assert not fused_calls
    assert not torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.5}])
def test_variants_compute_what_peft_does(options, fused_calls):
    with_bias = {"attention_bias": True, "mlp_bias": True}  # lora_bias wants a bias to merge into
    ours, theirs = pair(with_bias, **options)
    (logits, grads), (expected, expected_grads) = step(ours.train()), step(theirs.train())
    assert not fused_calls
    assert relative(logits, expected) < 1e-5
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name]) < 2e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_dora_changes_nothing_at_its_start_whatever_the_forward_computes_in(dtype, compute_dtype):
    # Its magnitude, taken at the start, must be that of the weight that the forward asks for.
    base = packed_llama(dtype=dtype, compute_dtype=compute_dtype)
    model = adapted(copy.deepcopy(base), use_dora=True, init_lora_weights=True)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]  # bfloat16: PEFT adds a term that it rounds
    assert relative(model(IDS).logits.float(), base(IDS).logits.float()) < tolerance
    asked = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert peft.utils.integrations.dequantize_module_weight(asked).dtype == (compute_dtype or torch.float32)


def test_two_active_adapters_add_up_as_in_peft(fused_calls):
    ours, theirs = pair()
    for model in (ours, theirs):
        torch.manual_seed(2)
        model.add_adapter("other", config(r=2))
        model.base_model.set_adapter(["default", "other"])
    assert relative(ours(IDS).logits, theirs(IDS).logits) < 1e-5
    assert not fused_calls
    for model in (ours, theirs):
        model.set_adapter("other")
    assert relative(ours(IDS).logits, theirs(IDS).logits) < 1e-5
    assert len(fused_calls) == 7


def test_a_mixed_batch_gives_each_row_its_adapter():
    model = adapted(packed_llama()).eval()
    torch.manual_seed(2)
    model.add_adapter("other", config(r=2))
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["default", "other", "__base__"]).logits
        alone = [model(IDS[:1]).logits]
        model.set_adapter("other")
        alone.append(model(IDS[1:2]).logits)
        with model.disable_adapter():
            alone.append(model(IDS[2:]).logits)
    assert relative(mixed, torch.cat(alone)) < 1e-5


def test_hot_swapping_an_adapter_changes_what_the_op_computes(tmp_path, fused_calls):
    from peft.utils.hotswap import hotswap_adapter

    other = adapted(packed_llama(), lora_alpha=16)
    for parameter in trainable(other).values():
        nn.init.normal_(parameter, std=0.1)
    other.save_pretrained(tmp_path)
    model = adapted(packed_llama())
    hotswap_adapter(model, tmp_path, adapter_name="default")
    fused_calls.clear()
    assert_same_bits(model(IDS).logits, other(IDS).logits)
    assert len(fused_calls) == 14


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "backward_hook"]
)
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_a_hook_of_any_kind_on_the_adapters_own_layer_is_called(which, kind):
    layer = layers(adapted(packed_llama()))[0]
    x, seen = torch.randn(3, 64, requires_grad=True), []
    y = layer(x)
    handle = getattr(getattr(layer, which)["default"], f"register_{kind}")(lambda *_: seen.append(1))
    again = layer(x)
    again.sum().backward()
    assert relative(again, y) < 1e-5
    assert len(seen) == 1
    handle.remove()


def into_hook(seen, kind):
    """A hook of this kind, written as for any linear layer: it doubles what it may, and notes what shape comes in."""

    def pre(module, inputs):
        (x,) = inputs
        seen.append(x.shape)
        return (2 * x,)

    def pre_with_kwargs(module, inputs, kwargs):
        return pre(module, inputs), kwargs

    def after(module, inputs, output):
        (x,) = inputs
        seen.append(x.shape)
        return 2 * output

    def backward(module, grad_inputs, grad_outputs):
        (dx,) = grad_inputs
        seen.append(dx.shape)
        return (2 * dx,)

    return {"pre": pre, "pre_with_kwargs": pre_with_kwargs, "forward": after, "full_backward": backward}[kind]


HOOKS = {
    "pre": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "pre_with_kwargs": lambda layer, hook: layer.register_forward_pre_hook(hook, with_kwargs=True),
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "full_backward": lambda layer, hook: layer.register_full_backward_hook(hook),
}


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_the_base_layer_sees_and_changes_what_it_does_under_peft(kind, disabled):
    results = []
    for model in pair():
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        seen, x = [], torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_()
        HOOKS[kind](layer.base_layer, into_hook(seen, kind))
        with model.disable_adapter() if disabled else contextlib.nullcontext():
            y = layer(x)
        y.square().sum().backward()
        results.append((seen, y, x.grad))
    (seen, y, grad), (expected_seen, expected, expected_grad) = results
    assert seen == expected_seen == [(3, 64)]
    assert relative(y, expected) < 1e-5
    assert relative(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("kind", ["pre", "forward"])
def test_a_hook_for_every_module_finds_one_input_and_the_adapter_stays_in_the_op(kind, fused_calls):
    layer, x, seen = layers(adapted(packed_llama()))[0], torch.randn(3, 64), []
    expected = layer(x)
    register = {"pre": register_module_forward_pre_hook, "forward": register_module_forward_hook}[kind]
    handle = register(lambda module, inputs, *_: seen.append(len(inputs)) or (inputs if kind == "pre" else None))
    try:
        y = layer(x)
    finally:
        handle.remove()
    assert set(seen) == {1}
    assert_same_bits(y, expected)
    assert len(fused_calls) == 2


def doubled(module):
    module.forward = lambda x: 2 * nn.functional.linear(x, module.weight)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    "change", [doubled, lambda module: nn.utils.parametrize.register_parametrization(module, "weight", Doubled())]
)
def test_what_changes_the_adapters_own_layer_is_not_passed_over(change):
    layer = layers(adapted(packed_llama()))[0]
    x = torch.randn(3, 64)
    base, y = layer.base_layer(x), layer(x)
    change(layer.lora_A["default"])
    torch.testing.assert_close(layer(x) - base, 2 * (y - base), rtol=1e-4, atol=1e-5)


def test_an_integer_input_is_refused_with_an_adapter_and_on_pefts_own_way():
    for layer in (layers(adapted(packed_llama()))[0], layers(adapted(packed_llama(), use_dora=True))[0]):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="NF4Linear: x must be float32"):
            layer(torch.ones(3, 64, dtype=torch.uint8))


def test_with_adapters_on_some_layers_the_others_keep_no_input():
    def kept(**options):
        model = adapted(packed_llama(hidden_size=64, intermediate_size=256), **options).train()
        model.enable_input_require_grads()
        sizes, packed = {}, {p.data_ptr() for p in model.parameters()}

        def note(tensor):
            if tensor.data_ptr() not in packed:
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        layer = model.base_model.model.model.layers[0].mlp.down_proj
        layer = layer.base_layer if hasattr(layer, "base_layer") else layer
        x = torch.randn(1, 100, 256, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            layer(x)
        return sum(sizes.values())

    assert kept(target_modules=["q_proj", "v_proj"]) == 0


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_are_float32_whatever_the_base_is(autocast_adapter_dtype, tmp_path):
    lora_layer.install()
    model = packed_llama(dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    model = get_peft_model(model, config(), autocast_adapter_dtype=autocast_adapter_dtype)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    weight = layers(model)[0].lora_A["default"].weight
    assert not torch.equal(weight, weight.bfloat16().float()), "the start must not have been rounded on the way"
    # PEFT rounds a loaded adapter to the base's compute dtype when it assigns instead of copying.
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        packed_llama(dtype=torch.bfloat16, compute_dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=True
    )
    assert_same_bits(layers(again)[0].lora_A["default"].weight, weight)


def test_adapters_that_were_cast_to_16_bits_still_train():
    model = adapted(packed_llama(dtype=torch.bfloat16)).to(torch.bfloat16)
    _, grads = step(model)
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() and grad.norm() > 0 for grad in grads.values())


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "merge", [lambda m: m.merge_and_unload(), lambda m: m.merge_adapter(), lambda m: m.merge_adapter(safe_merge=True)]
)
def test_merging_into_the_packed_base_is_refused_and_loses_nothing(merge):
    model = adapted(packed_llama())
    logits = model(IDS).logits
    with pytest.raises(
        ValueError, match=r"merge: the base must be in 16 or 32 bits, got NF4.*dequantize\(\).*merge_and_unload"
    ):
        merge(model)
    assert_same_bits(model(IDS).logits, logits)


def test_after_dequantising_the_base_peft_merges():
    model = adapted(packed_llama())
    logits = model(IDS).logits
    for module in layers(model):
        base = module.base_layer
        module.base_layer = nn.Linear(base.in_features, base.out_features, bias=False)
        module.base_layer.weight.data = base.dequantize(torch.float32)
    assert relative(model(IDS).logits, logits) < 1e-5
    merged = model.merge_and_unload()
    assert relative(merged(IDS).logits, logits) < 1e-5


def test_unloading_gives_the_base_back():
    base = packed_llama()
    expected = base(IDS).logits
    assert_same_bits(adapted(base).unload()(IDS).logits, expected)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "loftq", "mica"])
def test_an_init_that_needs_a_float_base_is_refused_by_name(init):
    options = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    lora_layer.install()
    try:
        wanted = config(init_lora_weights=init, **options)
    except ImportError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match=f"init_lora_weights must be .*got '{init}'"):
        get_peft_model(packed_llama(), wanted)


def test_a_packed_parameter_as_target_is_refused():
    lora_layer.install()
    with pytest.raises(ValueError, match="target_parameters must name floating-point parameters"):
        get_peft_model(packed_llama(), config(target_modules=[], target_parameters=["q_proj.weight"]))
