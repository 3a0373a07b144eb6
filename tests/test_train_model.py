"""The model and the tokenizer of a run: which are taken, how adapters are put on them, which are refused."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import nf4lora
from nf4lora.train.errors import RunError, UsageError

from support.bits import assert_same_bits
from support.models import tiny_llama, tiny_tokenizer
from support.train_runs import adapter, base, check_use, data, equal, options, quick, train, use  # noqa: F401


@pytest.mark.parametrize(
    ("more", "saved"),
    [
        (("--load_in_4bit", "false"), "lora_A"),
        (("--use_dora",), "lora_magnitude_vector"),
        (("--modules_to_save", "lm_head"), "lm_head"),
        (("--lora_target_modules", "q_proj,v_proj"), "v_proj"),
        (("--dtype", "bfloat16"), "lora_A"),
        (("--bnb_4bit_use_double_quant", "false"), "lora_A"),
    ],
)
def test_other_ways_to_train_learn_too(base, data, tmp_path, more, saved):
    out = tmp_path / "out"
    code, _ = train(*options(base, data, out, "--val_size", "4", *more))
    assert code == 0
    tensors = adapter(out)
    assert any(saved in name for name in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    results = json.loads((out / "eval_results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"] - 0.1


def packed_folder(base, folder, config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def test_checkpoint_in_nf4_is_trained_on_as_it_is(base, data, tmp_path):
    packed = packed_folder(base, tmp_path / "packed", nf4lora.NF4Config())
    for name, folder in {"from 16 bits": base, "from 4 bits": packed}.items():
        _, said = train(*options(folder, data, tmp_path / name))
    assert equal(adapter(tmp_path / "from 16 bits"), adapter(tmp_path / "from 4 bits"))
    check_use(said)
    with pytest.raises(UsageError, match=r"quantised already \(nf4lora\)"):
        train(*options(packed, data, tmp_path / "out", "--load_in_4bit", "false"))


def test_checkpoint_of_bitsandbytes_is_trained_on_as_it_is(base, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = packed_folder(base, tmp_path / "packed", config)
    code, said = train(*options(packed, data, tmp_path / "out"))
    assert code == 0
    assert "packed in NF4: 7 layers" in said
    check_use(said)


def test_unknown_quantisation_is_refused(base, data, tmp_path):
    folder = tmp_path / "gptq"
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((Path(base) / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(RunError, match="quantised with gptq"):
        train(*options(str(folder), data, tmp_path / "out"))


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (("--model_name_or_path", "./nowhere"), UsageError, "is not a folder"),
        (("--max_length", "4096"), UsageError, "at most the model's 512 positions"),
        (("--lora_target_modules", "nothing_is_called_so"), RunError, "target_modules must match a module"),
        (("--report_to", "wandb"), UsageError, "pip install wandb"),
        (("--device", "cuda"), UsageError, "device cuda"),
    ],
)
def test_options_that_do_not_fit_are_refused(base, data, tmp_path, more, error, words):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments = options(base, data, tmp_path / "out")
    if more[0] == "--model_name_or_path":
        arguments = arguments[2:]
    with pytest.raises(error, match=words):
        train(*arguments, *more)
    assert not (tmp_path / "out").exists()


def test_role_data_without_a_chat_template_saves_the_installed_one(base, data, tmp_path):
    from transformers import AutoTokenizer

    bare = tmp_path / "bare"
    tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(bare)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    _, said = train(*options(str(bare), data, tmp_path / "out", "--max_steps", "1"))
    assert "ChatML was installed" in said
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("four_bits", ["true", "false"])
def test_a_checkpoint_without_one_of_its_tensors_is_refused(base, data, tmp_path, four_bits):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        train(*options(str(broken), data, tmp_path / "out", "--load_in_4bit", four_bits))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("four_bits", ["true", "false"])
def test_a_target_that_no_layer_has_is_told(base, data, tmp_path, four_bits):
    more = ("--lora_target_modules", "q_proj,nothing", "--max_steps", "1", "--load_in_4bit", four_bits)
    _, said = train(*options(base, data, tmp_path / "out", *more))
    assert "nothing is called nothing, which" in said


def test_a_token_beyond_the_embedding_is_named_before_the_model_is_loaded(base, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    other, rows = tmp_path / "other", tmp_path / "rows.jsonl"
    shutil.copytree(base, other)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    rows.write_text('{"text": "old"}\n{"text": "a <new> one"}\n')
    monkeypatch.setattr("nf4lora.train.model.load_model", lambda *a: pytest.fail("the model was loaded first"))
    with pytest.raises(RunError, match=r"rows\.jsonl: line 2: token 259 \('<new>'\) has no place .* has 259 rows"):
        train(*options(str(other), str(rows), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_padding_token_beyond_the_embedding_gives_way(base, data, tmp_path):
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(other)
    assert train(*options(str(other), data, tmp_path / "out", "--max_steps", "1"))[0] == 0


def test_a_tied_head_stays_tied_when_it_is_trained(data, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1, tied=True).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    _, said = train(*options(str(base), data, out, "--modules_to_save", "embed_tokens"))
    assert "the embedding and the output head are one tensor, and are trained as one" in said
    model, _ = use(said)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    trained = embedding.modules_to_save["default"].weight
    assert_same_bits(head.modules_to_save["default"].weight, trained)
    assert not torch.equal(trained, embedding.original_module.weight)


def test_a_model_of_another_kind_is_refused_in_one_sentence(base, data, tmp_path):
    from transformers import T5Config

    folder = tmp_path / "t5"
    tiny_tokenizer().save_pretrained(folder)
    T5Config(architectures=["T5ForConditionalGeneration"], vocab_size=259).save_pretrained(folder)
    with pytest.raises(RunError, match="is a T5ForConditionalGeneration; nf4lora train trains models that") as raised:
        train(*options(str(folder), data, tmp_path / "out"))
    assert len(str(raised.value)) < 400
