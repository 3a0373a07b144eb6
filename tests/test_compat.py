"""What is used of other libraries beyond their public interface: it is there, and means what compat says."""

import importlib
import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from nf4lora.compat import accelerate, library
from nf4lora.compat import peft as peft_
from nf4lora.compat import torch as compat
from nf4lora.compat import transformers as transformers_

from support.bits import assert_same_bits
from support.models import tiny_llama


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("nothing computes with it")


def test_a_module_shows_its_dictionaries():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert compat.children_of(module) == {"0": module[0], "1": module[1]}
    assert compat.parameters_of(module[0])["weight"] is module[0].weight
    assert compat.buffers_of(module[1])["running_mean"] is module[1].running_mean


HOOKS = {
    "register_forward_hook": lambda module, inputs, output: None,
    "register_forward_pre_hook": lambda module, inputs: None,
    "register_full_backward_hook": lambda module, grad_input, grad_output: None,
    "register_full_backward_pre_hook": lambda module, grad_output: None,
}


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_every_kind_are_seen(register):
    module = nn.Linear(2, 2)
    assert not compat.has_hooks(module)
    handle = getattr(module, register)(HOOKS[register])
    assert compat.has_hooks(module)
    handle.remove()
    assert not compat.has_hooks(module)


def test_the_model_under_torch_compile_is_found():
    module = nn.Linear(2, 2)
    assert compat.uncompiled(torch.compile(module)) is compat.uncompiled(module) is module


def test_writing_into_a_tensor_counts():
    tensor = torch.zeros(3)
    before = compat.version_of(tensor)
    tensor.add_(1)
    assert compat.version_of(tensor) == before + 1


def test_views_share_a_storage_and_copies_do_not():
    tensor = torch.zeros(4, 4)
    assert compat.storage_address(tensor[1:]) == compat.storage_address(tensor)
    assert compat.storage_address(tensor.clone()) != compat.storage_address(tensor)


def test_subclasses_are_made_with_and_without_memory():
    tensor = torch.arange(4)
    assert type(compat.as_subclass(Subclass, tensor)) is Subclass
    empty = compat.without_memory(Subclass, (1 << 40,), torch.float32, torch.device("cpu"))
    assert type(empty) is Subclass
    assert empty.shape == (1 << 40,)


def test_norms_are_summed_in_float32():
    tensors = [torch.full((1000,), 100.0, dtype=torch.float16), torch.zeros(0)]
    first, second = compat.norms(tensors)
    assert first.dtype == torch.float32
    assert first.item() == pytest.approx(100 * 1000**0.5, rel=1e-6)
    assert second == 0


def test_below_autograd_no_gradient_is_noted():
    weight = torch.ones(2, requires_grad=True)
    with compat.below_autograd():
        result = torch.ops.aten.mul.Tensor(weight, weight)
    assert not result.requires_grad


def test_below_subclasses_a_tensors_class_is_not_asked():
    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("asked")

    tensor = torch.ones(2).as_subclass(Asked)
    with compat.below_subclasses():
        assert tensor.shape == (2,)
    with pytest.raises(AssertionError, match="asked"):
        tensor.add(1)


def test_transforms_and_forward_mode_are_noticed():
    seen = []

    def look(x):
        seen.append((compat.is_transformed(), compat.is_forward_mode()))
        return x.sum()

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(2))
    assert seen[0] == (False, False)
    assert seen[1][0]
    assert seen[2][1]


def test_onednn_multiplies_or_is_not_there():
    compat.onednn_linear(torch.zeros(1, 1), torch.zeros(1, 1))


def test_peft_is_not_heard_to_ask_for_former_names(recwarn):
    from peft import LoraConfig

    from nf4lora.compat.peft import get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert type(model).__name__ == "PeftModel"
    assert [str(each.message) for each in recwarn if issubclass(each.category, FutureWarning)] == []


def test_hooks_go_over_with_their_handles():
    old, new, called = nn.Linear(2, 2), nn.Linear(2, 2), []
    handle = old.register_forward_hook(lambda module, inputs, output: called.append(module))
    old.register_forward_pre_hook(lambda module, inputs, kwargs: called.append(kwargs), with_kwargs=True)
    compat.move_hooks(old, new)
    new(torch.zeros(1, 2))
    assert called == [{}, new]
    assert list(compat.forward_hooks_of(new)) == [handle.id]
    assert len(compat.forward_pre_hooks_of(new)) == 1
    handle.remove()
    assert not compat.forward_hooks_of(new)


def test_a_bare_copy_has_the_class_and_nothing_that_is_called():
    module = nn.Linear(2, 2)
    module.note = "kept"
    module.forward = lambda x: x
    module.register_forward_hook(lambda module, inputs, output: None)
    weight = nn.Parameter(torch.ones(3, 2))
    copied = compat.bare_copy(module, {"weight": weight, "bias": None}, {})
    assert type(copied) is nn.Linear
    assert copied.note == "kept"
    assert copied.weight is weight
    assert not compat.has_hooks(copied)
    assert compat.has_hooks(module)
    assert_same_bits(copied(torch.ones(1, 2)), torch.full((1, 3), 2.0))


def test_attributes_come_without_modules():
    module = nn.Sequential(nn.Linear(2, 2))
    module.note = "kept"
    found = compat.attributes_of(module)
    assert found["note"] == "kept"
    assert "_parameters" in found
    assert not any(isinstance(value, dict) and "0" in value for value in found.values())


def test_a_module_that_refuses_replicas_is_asked_by_torch():
    class Refusing(compat.Unreplicated, nn.Linear):
        why_no_replica = "not copied"

    with pytest.raises(RuntimeError, match="not copied"):
        Refusing(2, 2)._replicate_for_data_parallel()
    assert "module._replicate_for_data_parallel()" in inspect.getsource(torch.nn.parallel.replicate)


def test_a_forward_pass_that_is_computed_again_knows_its_backward_pass():
    from torch.utils.checkpoint import checkpoint

    numbers, ended = [], []

    def part(x):
        numbers.append(compat.running_backward())
        if numbers[-1] is not None:
            compat.after_backward(lambda: ended.append(len(numbers)))
        return x.sin()

    for reentrant in (False, True):
        numbers.clear(), ended.clear()
        x = torch.ones(2, requires_grad=True)
        y = checkpoint(part, checkpoint(part, x, use_reentrant=reentrant), use_reentrant=reentrant)
        assert numbers == [None, None]
        y.sum().backward()
        assert len(numbers) == 4
        assert numbers[2] is not None
        assert numbers[2] == numbers[3]
        assert ended == [4, 4]  # after both
        assert compat.running_backward() is None


# ---- accelerate


def test_the_hook_of_accelerate_goes_over():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return tuple(2 * each for each in args), kwargs

    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    accelerate.move_hook(old, new)
    assert not accelerate.has_hook(new)
    add_hook_to_module(old, Doubling())
    assert accelerate.has_hook(old)
    accelerate.move_hook(old, new)
    assert accelerate.has_hook(new)
    assert not accelerate.has_hook(old)
    x = torch.ones(1, 2)
    assert_same_bits(new(x), nn.functional.linear(2 * x, new.weight, new.bias))
    assert_same_bits(old(x), nn.functional.linear(x, old.weight, old.bias))


# ---- transformers


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A checkpoint of a Llama without a head, to be loaded as a classifier."""
    folder = tmp_path_factory.mktemp("headless")
    tiny_llama().model.save_pretrained(folder)
    return folder


def test_what_a_file_held_is_marked_and_noted_before_the_rest_is_drawn(headless, monkeypatch):
    calls = []

    def note(model):
        calls.append({name for name, each in model.named_parameters() if not transformers_.was_loaded(each)})

    monkeypatch.setattr(PreTrainedModel, "_initialize_missing_keys", PreTrainedModel._initialize_missing_keys)
    transformers_.before_missing_are_drawn(note)
    transformers_.before_missing_are_drawn(note)
    model = AutoModelForSequenceClassification.from_pretrained(headless)
    assert calls == [{"score.weight"}]
    assert transformers_.was_loaded(model.model.embed_tokens.weight)
    assert all(transformers_.is_initialized(module) for module in model.modules() if list(module.parameters()))


def test_what_is_marked_is_not_drawn():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(7)
    for part in (model.lm_head, model.lm_head.weight):
        transformers_.mark_initialized(part)
    model.init_weights()
    assert model.lm_head.weight.eq(7).all()


def test_what_a_model_computes_itself_is_known_by_its_class():
    model = tiny_llama()
    assert not transformers_.computed_by_model(model)("lm_head.weight")
    model._keys_to_ignore_on_load_missing = [r"lm_head\.w"]
    assert transformers_.computed_by_model(model)("lm_head.weight")
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_load_missing")


def test_what_a_class_keeps_in_float32_is_known():
    from transformers import T5ForConditionalGeneration

    assert transformers_.kept_in_float32(T5ForConditionalGeneration) == ["wo"]
    assert transformers_.kept_in_float32(tiny_llama()) == []


def test_the_path_of_a_configuration_is_where_it_was_loaded_from(headless):
    assert transformers_.path_of(AutoConfig.from_pretrained(headless)) == str(headless)
    assert not transformers_.path_of(tiny_llama().config)


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("integrations.peft", "self._hf_peft_config_loaded = True"),
        ("core_model_loading", 'getattr(model, "_weight_conversions", None)'),
        ("integrations.flash_attention", 'hasattr(module.config, "_is_quantized")'),
    ],
)
def test_transformers_reads_and_writes_these_attributes(module, attribute):
    assert attribute in inspect.getsource(importlib.import_module(f"transformers.{module}"))


def test_a_file_that_a_checkpoint_lacks_is_none(headless):
    assert transformers_.cached_file(str(headless), "config.json", None) == str(headless / "config.json")
    assert transformers_.cached_file(str(headless), "chat_template.json", None) is None


# ---- PEFT


def test_peft_says_which_modules_a_method_is_for():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    tuner, config = model.base_model, model.peft_config["default"]
    assert peft_.is_target(tuner, config, "model.layers.0.self_attn.q_proj")
    assert not peft_.is_target(tuner, config, "model.layers.0.self_attn.k_proj")


def test_peft_refuses_targets_of_some_models():
    from peft import LoraConfig
    from transformers import MambaConfig, MambaForCausalLM

    small = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=8, state_size=2))
    config = LoraConfig(target_modules=["out_proj"])
    with pytest.raises(ValueError, match="out_proj"):
        peft_.check_target(config, small, "out_proj")
    peft_.check_target(config, small, "x_proj")


def test_the_dtype_of_an_adapter_is_asked_of_the_layer():
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    class Float64Adapters(peft_.AdapterDtype, Linear):
        def adapter_dtype(self, base_layer, dtype):
            assert dtype == torch.bfloat16
            return torch.float64

    layer = Float64Adapters(nn.Linear(4, 4, dtype=torch.bfloat16), "default", config=LoraConfig(r=2), r=2, lora_alpha=2)
    assert layer.lora_A["default"].weight.dtype == torch.float64


# ---- TRL


def test_the_trainer_has_the_steps_that_have_public_names_here():
    pytest.importorskip("trl")
    from trl import SFTConfig, SFTTrainer

    from nf4lora.compat.trl import OneDeviceConfig, OpenTrainer

    overridden = {name for name in vars(OpenTrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in overridden if not hasattr(SFTTrainer, name)} == set()
    assert hasattr(SFTConfig, "_setup_devices")
    assert OneDeviceConfig(output_dir="x", report_to="none", use_cpu=True, bf16=False).n_gpu <= 1
    text = "".join(inspect.getsource(cls) for cls in SFTTrainer.__mro__ if cls.__module__.startswith(("trl", "transf")))
    for name in ("_total_train_tokens", "_metrics", "_train_batch_size", "_load_from_checkpoint", "_prepare_inputs"):
        assert f"self.{name}" in text, name


def test_the_rates_of_a_schedule_are_what_it_says_they_were():
    trl_ = pytest.importorskip("nf4lora.compat.trl")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scheduler.base_lrs = [8.0]
    trl_.set_rates(scheduler)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 8.0


# ---- the library itself


def test_what_is_required_stands_in_pyproject_alone(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    asked = {"torch": "torch>=2.11", "rich": "rich", "numpy": "numpy", "nothing": "nothing"}
    monkeypatch.setattr(library.metadata, "requires", lambda name: ["torch>=2.11", "rich ; extra == 'train'", "numpy"])
    assert {name: library.requirement(name) for name in asked} == asked
    assert "it needs torch 2.11 or later and this Python" in library.module_cure()
    monkeypatch.setattr(library.metadata, "requires", absent)
    monkeypatch.setattr(library.metadata, "version", absent)
    if library.PROJECT.is_file():  # a source tree
        assert re.fullmatch(r"torch>=2\.\d+", library.requirement("torch"))
        assert re.fullmatch(r"\d+\.\d+\.\d+ \(source tree\)", library.version())
    monkeypatch.setattr(library, "PROJECT", library.PROJECT / "absent")
    assert library.requirement("torch") == "torch"
    assert "it needs torch and this Python" in library.module_cure()
    assert "not installed" in library.version()


@pytest.mark.parametrize(
    ("file", "package", "module"),
    [
        ("torch", "torch", "torch"),
        ("transformers", "transformers", "transformers"),
        ("peft", "PEFT", "peft"),
        ("trl", "TRL", "trl"),
    ],
)
def test_the_tested_versions_begin_at_the_required_one(file, package, module):
    text = (Path(library.__file__).parent / f"{file}.py").read_text()
    tested = re.search(rf"^Tested with (?:.* and )?{package} ([\d.]+)", text, re.MULTILINE)[1]
    required = library.requirement(module).partition(">=")[2].split(",")[0]
    assert (required + ".0").startswith(tested + "."), (tested, required)
