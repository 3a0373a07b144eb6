"""Every kind of model that transformers has: prepared, trained, saved, and the same again from the saved folder.

A guard against kinds that nobody thought of: a module that reads a weight, a router that is a linear layer, a part that
no text reaches. What is special in a kind has tests of its own.
"""

import peft
import pytest
import torch
import transformers
from peft import LoraConfig

from nf4lora import NF4Config, NF4Linear, load_adapter, prepare, save_adapter

from support.adapted import trainable
from support.bits import assert_same_bits
from support.families import FAMILIES, answer, inputs, tiny

# Modules that the output looked at here does not depend on.
UNUSED = ("pooler", "contact_head")

pytestmark = pytest.mark.filterwarnings("ignore:prepare. .* of the weights beyond embeddings:UserWarning")


def loaded(name, folder):
    return getattr(transformers, name).from_pretrained(folder, quantization_config=NF4Config())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_trains_and_comes_back_from_its_folder(name, tmp_path):
    tiny(name).save_pretrained(tmp_path / "base")
    model = prepare(loaded(name, tmp_path / "base"), r=4).train()
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    batch, before = inputs(model.get_base_model()), {}
    for key, parameter in trainable(model).items():
        if parameter.ndim > 1:  # B is zero at the start; here every adapter does something
            torch.nn.init.normal_(parameter, std=0.05)
        before[key] = parameter.detach().clone()
    answer(model, batch).square().sum().backward()
    torch.optim.AdamW(trainable(model).values(), lr=1e-2).step()
    still = [key for key, parameter in trainable(model).items() if torch.equal(parameter, before[key])]
    assert [key for key in still if not any(part in key for part in UNUSED)] == []

    expected = answer(model.eval(), batch)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(loaded(name, tmp_path / "base"), tmp_path / "adapter").eval()
    assert_same_bits(answer(again, batch), expected)


OPENED = [
    *("LlamaForCausalLM", "T5ForConditionalGeneration", "BertForSequenceClassification", "BertForTokenClassification"),
    *("BertForQuestionAnswering", "BertModel", "WhisperForConditionalGeneration", "Mistral3ForConditionalGeneration"),
    *("Gemma3ForConditionalGeneration", "T5EncoderModel", "ViTForImageClassification"),
]


@pytest.mark.parametrize("name", OPENED)
def test_the_task_type_opens_the_folder_with_its_auto_class(name, tmp_path):
    tiny(name).save_pretrained(tmp_path / "base")
    model = prepare(loaded(name, tmp_path / "base"), r=4)
    save_adapter(model, tmp_path / "adapter")
    task = LoraConfig.from_pretrained(tmp_path / "adapter").task_type
    opener = {
        None: peft.AutoPeftModel,
        "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
        "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
        "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
        "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
        "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
        "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
    }[task]
    again = opener.from_pretrained(tmp_path / "adapter", quantization_config=NF4Config())
    assert type(again) is type(model)
    assert type(again.get_base_model()) is type(model.get_base_model())


TASKS = {
    "CAUSAL_LM": "LlamaForCausalLM MixtralForCausalLM MambaForCausalLM Gemma3ForConditionalGeneration",
    "SEQ_2_SEQ_LM": "T5ForConditionalGeneration BartForConditionalGeneration M2M100ForConditionalGeneration",
    "SEQ_CLS": "BertForSequenceClassification LlamaForSequenceClassification EsmForSequenceClassification",
    "TOKEN_CLS": "BertForTokenClassification Qwen2ForTokenClassification",
    "QUESTION_ANS": "BertForQuestionAnswering",
    "FEATURE_EXTRACTION": "BertModel",
    None: "T5EncoderModel WhisperForConditionalGeneration ViTForImageClassification Wav2Vec2ForSequenceClassification "
    "CLIPModel BertForMaskedLM BertForMultipleChoice LlavaForConditionalGeneration Mistral3ForConditionalGeneration",
}


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in TASKS.items() for name in names.split()])
def test_the_task_type_is_that_of_the_class(task, name):
    assert prepare(tiny(name), r=2).active_peft_config.task_type == task
