"""What is used of other libraries beyond their public interface: it is there, and means what compat says."""

import pytest
import torch
from torch import nn

from nf4lora.compat import torch as compat

from models import tiny_llama


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
    assert type(empty) is Subclass and empty.shape == (1 << 40,)


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
    assert seen[1][0] and seen[2][1]


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
    assert list(compat.forward_hooks_of(new)) == [handle.id] and len(compat.forward_pre_hooks_of(new)) == 1
    handle.remove()
    assert not compat.forward_hooks_of(new)


def test_a_bare_copy_has_the_class_and_nothing_that_is_called():
    module = nn.Linear(2, 2)
    module.note = "kept"
    module.forward = lambda x: x
    module.register_forward_hook(lambda module, inputs, output: None)
    weight = nn.Parameter(torch.ones(3, 2))
    copied = compat.bare_copy(module, {"weight": weight, "bias": None}, {})
    assert type(copied) is nn.Linear and copied.note == "kept" and copied.weight is weight
    assert not compat.has_hooks(copied) and compat.has_hooks(module)
    assert torch.equal(copied(torch.ones(1, 2)), torch.full((1, 3), 2.0))
