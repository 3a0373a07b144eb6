"""Configuration files as people have them: every key is followed, left aside aloud, or refused with a reason."""

import json
import re
from dataclasses import replace

import pytest

from nf4lora.train.arguments.foreign import ASIDE, ONLY, TRANSLATED, aside
from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.data import read
from nf4lora.train.errors import UsageError
from nf4lora.train.samples.formats import recognise, samples
from nf4lora.train.settings import ALIASES, OPTIONS

# Shaped like the QLoRA examples of each tool; only what they name is theirs.
AXOLOTL = """\
base_model: org/Llama-7B
model_type: LlamaForCausalLM
tokenizer_type: LlamaTokenizer
hub_model_id:
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
eval_sample_packing: false
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
wandb_project:
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
plugins: [axolotl.integrations.liger.LigerPlugin]
liger_rope: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: <pad>, bos_token: <s>}
loss_watchdog_threshold: 5.0
"""
LLAMA_FACTORY = """\
### model
model_name_or_path: org/Llama-8B
quantization_bit: 4
quantization_method: bnb
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: mine
dataset_dir: {folder}
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard]
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
TRL = """\
model_name_or_path: org/Qwen-7B
dataset_name: org/rows
dataset_config: all
use_peft: true
load_in_4bit: true
use_bnb_nested_quant: true
lora_r: 16
lora_alpha: 32
lora_task_type: CAUSAL_LM
lora_target_modules: [q_proj, v_proj]
torch_dtype: bfloat16
attn_implementation: sdpa
dataset_num_proc: 8
dataset_text_field: text
max_length: 1024
packing: false
per_device_train_batch_size: 2
gradient_checkpointing: true
learning_rate: 2e-4
eval_strategy: "no"
adam_beta2: 0.999
seed: 1
do_eval: false
push_to_hub: false
"""
MLX = """\
model: org/model
train: true
fine_tune_type: lora
data: rows.jsonl
seed: 0
lora_parameters: {keys: [self_attn.q_proj, self_attn.v_proj], rank: 8, scale: 20.0, dropout: 0.1}
batch_size: 4
iters: 1000
learning_rate: 1e-5
steps_per_report: 10
save_every: 100
adapter_path: adapters
max_seq_length: 2048
grad_checkpoint: false
"""


def file(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def parsed(folder, text, *flags):
    return parse_arguments([file(folder, text), *flags])


def refused(folder, text, *flags):
    with pytest.raises(UsageError) as error:
        parsed(folder, text, *flags)
    return str(error.value)


def values(config, *names):
    return tuple(getattr(config, name) for name in names)


def test_axolotl_file_needs_no_edit(tmp_path):
    config = parsed(tmp_path, AXOLOTL)
    assert values(config, "model_name_or_path", "data", "dataset_format", "load_in_4bit", "max_length", "packing") == (
        "org/Llama-7B", "rows.jsonl", "sharegpt", True, 4096, True
    )  # fmt: skip
    assert values(config, "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules") == (32, 16, 0.05, "all-linear")
    assert values(config, "optim", "learning_rate", "dtype", "warmup_steps", "val_size") == (
        "paged_adamw_32bit", 2e-4, "auto", 0.1, 0.05
    )  # fmt: skip
    assert values(config, "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs") == (2, 4, 4)
    assert values(config, "eval_steps", "eval_strategy", "save_strategy") == (1 / 16, "steps", "epoch")
    assert config.special_tokens == {"pad_token": "<pad>", "bos_token": "<s>"}
    said = "\n".join(config.notes)
    for name in ("tokenizer_type", "strict", "dataset_prepared_path", "tf32", "liger_rope", "pad_to_sequence_len",
                 "loss_watchdog_threshold"):  # fmt: skip
        assert said.count(name) == 1
    assert "speed or memory" in said
    assert "liger_rope (use_liger_kernel takes all of Liger's kernels" in said
    assert values(config, "attn_implementation", "use_liger_kernel", "torch_compile") == (
        "flash_attention_2", False, False
    )  # fmt: skip


def test_llama_factory_file_needs_no_edit(tmp_path):
    listing = {"mine": {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "conversations"},
                        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human"}}}  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(listing))
    config = parsed(tmp_path, LLAMA_FACTORY.replace("{folder}", str(tmp_path)))
    assert values(config, "data", "max_samples", "chat_template", "lora_r", "lora_target_modules") == (
        str(tmp_path / "rows.json"), 1000, "llama3", 8, "all-linear"
    )  # fmt: skip
    assert values(config, "load_in_4bit", "dtype", "report_to", "eval_steps") == (True, "bfloat16", [], 500)
    said = "\n".join(config.notes)
    for name in ("overwrite_cache", "preprocessing_num_workers", "plot_loss", "ddp_timeout", "trust_remote_code"):
        assert said.count(name) == 1


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
OTHER = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "column"}]


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        (
            "field_messages: conversations, message_property_mappings: {role: from, content: value}",
            {"conversations": SHAREGPT},
        ),
        ("field_messages: conversations", {"conversations": CHAT, "messages": OTHER}),
        ("field_messages: messages", {"conversations": OTHER, "messages": CHAT}),
        ("message_field_role: from, message_field_content: value", {"messages": SHAREGPT}),
        ("message_property_mappings: {role: from, content: content}",
         {"messages": [{"from": "human", "content": "hi"}, {"from": "gpt", "content": "ho"}]}),
    ],
)  # fmt: skip
def test_rows_are_read_as_the_entry_of_axolotl_describes_them(tmp_path, entry, row):
    assert conversations(
        tmp_path, f"base_model: m\ndatasets: [{{path: ROWS, type: chat_template, {entry}}}]\n", row
    ) == [CHAT]


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        ({"formatting": "sharegpt"}, {"conversations": SHAREGPT, "messages": OTHER}),
        ({"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {"role_tag": "role"}},
         {"conversations": OTHER, "messages": CHAT}),
        ({}, {"instruction": "hi", "output": "ho", "messages": OTHER}),
    ],
)  # fmt: skip
def test_rows_are_read_as_the_listing_of_llama_factory_describes_them(tmp_path, entry, row):
    listing = {"mine": {"file_name": "rows.jsonl", **entry}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(listing))
    assert conversations(tmp_path, LLAMA_FACTORY.replace("{folder}", str(tmp_path)), row) == [CHAT]


def conversations(folder, text, row):
    """The messages that are read from a file of one row."""
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    config = parsed(folder, text.replace("ROWS", str(rows)))
    table, _, _ = read(replace(config, val_size=0, given=frozenset()))
    kind, _ = recognise(table, config.dataset_format)
    return [sample.messages for sample in samples(table, kind)]


def test_files_of_trl_and_mlx_need_no_edit(tmp_path):
    config = parsed(tmp_path, TRL)
    assert values(config, "dataset_name", "lora_target_modules", "eval_strategy") == (
        "org/rows", ["q_proj", "v_proj"], "no"
    )  # fmt: skip
    config = parsed(tmp_path, MLX)
    assert values(config, "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "max_steps", "output_dir") == (
        8, 160, 0.1, ["q_proj", "v_proj"], 1000, "adapters"
    )  # fmt: skip
    assert values(config, "save_steps", "logging_steps", "gradient_checkpointing") == (100, 10, False)


def test_everything_that_cannot_be_honoured_is_listed_at_once(tmp_path):
    said = refused(
        tmp_path,
        AXOLOTL + "fsdp: [full_shard]\nneftune_noise_alpha: 5\nunheard_of: 3\nadam_beta2: 0.95\nlora_rnk: 4\n"
        "rl: dpo\ngroup_by_length: true\n",
    )
    assert said.startswith("7 settings cannot be used:")
    reasons = (
        "fsdp must be left out: one process", "neftune_noise_alpha must be 0: no noise", "unheard_of is not",
        "adam_beta2 must be 0.999", "did you mean lora_rank", "rl must be left out", "group_by_length must be",
    )  # fmt: skip
    for words in reasons:
        assert words in said


@pytest.mark.parametrize(
    ("name", "value", "suggested"),
    [
        ("lerning_rate", "1", "learning_rate"),
        ("max_seq_lenght", "1", "max_seq_length"),
        ("max_rows", "1", None),
        ("trl", "{a: b}", None),
        ("model_config", "1", None),
        ("early_stop", "1", None),
    ],
)
def test_suggestions_are_close_or_none(tmp_path, name, value, suggested):
    said = refused(tmp_path, f"model: m\ndata: d\n{name}: {value}\n")
    assert (f"did you mean {suggested}?" in said) if suggested else ("did you mean" not in said)


def test_no_key_is_followed_and_left_aside_at_once():
    known = [set(OPTIONS), set(ALIASES), set(TRANSLATED), set(ONLY)]
    assert sum(map(len, known)) == len(set().union(*known))
    assert not [name for name in set().union(*known) if aside(name)]
    listed = " ".join(ASIDE.values()).split()
    assert len(listed) == len(set(listed))


LIGER = "plugins: [axolotl.integrations.liger.LigerPlugin]\nliger_rope: true\nliger_rms_norm: true"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: d\nflash_attn: fa9", "flash_attn must be auto, disabled, sdpa, fa2, fa3, got 'fa9'"),
        ("data: d\nflash_attention: true\nsdp_attention: true", "says sdpa, but .*flash_attention says"),
        ("datasets: [{path: a, type: alpaca, roles_to_train: [user]}]", "roles_to_train"),
        ("datasets: [{path: a, train_on_eos: all}]", "must have turn as train_on_eos, got all"),
        ("datasets: [{path: a, type: custom.transform}]", "must have a type of"),
        ("datasets: [{path: a, shards: 4}]", "must have 1 as shards"),
        ("datasets: [{path: a, field_messages: turns}]", "messages or conversations as field_messages"),
        ("datasets: [{path: a, unheard: 1}]", "unheard cannot be honoured"),
        ("datasets: [{path: a}, {path: b}]", "mixtures are not built yet"),
        ("dataset: a,b", "mixtures are not built yet"),
        ("data: d\nplugins: [axolotl.integrations.diffusion.DiffusionPlugin]", "plugins for speed only"),
        ("data: d\ntokenizer_config: other/tokenizer", "must be the model's own"),
        ("data: d\nevals_per_epoch: 2\neval_steps: 5", "say the same thing twice"),
        ("data: d\nevals_per_epoch: often", "must be a whole number"),
        ("data: d\nbnb_config_kwargs: {llm_int8_threshold: 6}", "bnb_config_kwargs must hold"),
        ("data: d\nmodel_args: {_component_: torchtune.models.llama3}", "torchtune recipe"),
        ("data: d\nbatch_size: 5\nmicro_batch_size: 2", "batch_size says|micro_batch_size says"),
    ],
)
def test_setting_that_changes_the_result_is_refused(tmp_path, text, words):
    assert re.search(words, refused(tmp_path, f"base_model: m\n{text}\n"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("datasets: [{path: d, data_files: rows.jsonl, ds_type: json}]", "data", "rows.jsonl"),
        ("datasets: {path: d, split: 'train[:10%]'}", "dataset_train_split", "train[:10%]"),
        ("data: d\nbatch_size: 8\nmicro_batch_size: 2", "gradient_accumulation_steps", 4),
        ("data: d\ngradient_checkpointing: unsloth", "gradient_checkpointing", True),
        ("data: d\ngradient_checkpointing: offload", "gradient_checkpointing", True),
        ("data: d\nauto_resume_from_checkpoints: true", "resume_from_checkpoint", "auto"),
        ("data: d\nuse_tensorboard: true", "report_to", ["tensorboard"]),
        ("data: d\nbfloat16: true", "dtype", "bfloat16"),
        ("data: d\nbnb_config_kwargs: {bnb_4bit_use_double_quant: false}", "bnb_4bit_use_double_quant", False),
        ("data: d\nmax_steps: 5\nnum_epochs: 2", "max_steps", 5),
        ("data: d\nlora_target_modules: [q_proj]\nlora_target_linear: true", "lora_target_modules", "all-linear"),
        ("data: d\ntokenizer_config: m", "data", "d"),
        ("data: d\nevals_per_epoch: 0", "eval_strategy", "no"),
        ("data: d\nevals_per_epoch: 4\neval_steps:\nmax_steps: 100", "eval_steps", 0.25),
        ("data: d\nsaves_per_epoch: 2\nnum_epochs: 3", "save_steps", 1 / 6),
        ("data: d\nchat_template: jinja\nchat_template_jinja: '{{ messages }}'", "chat_template", "{{ messages }}"),
        ("data: d\nlora-r: 5", "lora_r", 5),
        ("data: d\nflash_attention: true", "attn_implementation", "flash_attention_2"),
        ("data: d\nflash_attention: false", "attn_implementation", None),
        ("data: d\nsdp_attention: true\neager_attention: false", "attn_implementation", "sdpa"),
        ("data: d\neager_attention: true", "attn_implementation", "eager"),
        ("data: d\nflex_attention: true", "attn_implementation", "flex_attention"),
        ("data: d\nflash_attn: fa2", "attn_implementation", "flash_attention_2"),
        ("data: d\nflash_attn: fa3", "attn_implementation", "flash_attention_3"),
        ("data: d\nflash_attn: disabled", "attn_implementation", "eager"),
        ("data: d\nflash_attn: auto", "attn_implementation", None),
        ("data: d\nenable_liger_kernel: true", "use_liger_kernel", True),
        ("data: d\nenable_liger_kernel: false", "use_liger_kernel", False),
        (f"data: d\n{LIGER}\nliger_glu_activation: true", "use_liger_kernel", True),
        (f"data: d\n{LIGER}\nliger_swiglu: true", "use_liger_kernel", True),
        (f"data: d\n{LIGER}\nliger_glu_activation: false", "use_liger_kernel", False),
        (f"data: d\n{LIGER}", "use_liger_kernel", False),
        ("data: d\ntorch_compile: auto", "torch_compile", True),
        ("data: d\ntorch_compile: true", "torch_compile", True),
    ],
)
def test_setting_with_an_equivalent_is_followed(tmp_path, text, name, value):
    assert getattr(parsed(tmp_path, f"base_model: m\n{text}\n"), name) == value


def test_keys_of_other_tools_may_be_flags():
    config = parse_arguments(["--model", "m", "--data", "d", "--evals_per_epoch", "2", "--tf32", "--strict", "false"])
    assert config.eval_steps == 1 / (2 * config.num_train_epochs)
    assert "tf32" in "".join(config.notes)
    assert "strict" in "".join(config.notes)


def test_evaluations_per_epoch_are_a_wish(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    config = parsed(tmp_path, f"base_model: m\ndata: {rows}\nval_set_size: 0.0\nevals_per_epoch: 4\n")
    assert read(config)[1] is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("finetuning_type: lora", "would keep the base in 16 bits"),
        ("micro_batch_size: 1\nsequence_len: 64", "Axolotl would train all weights"),
        ("wandb_project: x", "not used: wandb_project .*report_to tensorboard or wandb adds those"),
        ("max_steps: 3\nnum_epochs: 1", "num_epochs has no effect"),
        ("cut_cross_entropy: true", "cut_cross_entropy .the loss is computed in chunks already"),
        ("liger_fused_linear_cross_entropy: true", "liger_fused.* .the loss is computed in chunks already"),
        ("torch_compile_mode: reduce-overhead", "torch_compile_mode .torch_compile has torch's own"),
        ("xformers_attention: true", "not used: xformers_attention .they change speed or memory"),
    ],
)
def test_what_another_tool_would_do_differently_is_said(tmp_path, text, words):
    assert re.search(words, "\n".join(parsed(tmp_path, f"base_model: m\ndata: d\n{text}\n").notes))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": "a.json", "columns": {"prompt": "question"}}, "columns prompt: question"),
        (
            {"file_name": "a.json", "formatting": "sharegpt", "tags": {"user_tag": "customer"}},
            "tags user_tag: customer",
        ),
        ({"file_name": "a.json", "ranking": True}, "ranking, which cannot be honoured"),
        ({"script_url": "x"}, "script_url, which cannot be honoured"),
    ],
)
def test_listed_data_set_that_cannot_be_read_is_refused(tmp_path, entry, words):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    assert words in refused(tmp_path, LLAMA_FACTORY.replace("{folder}", str(tmp_path)))


def test_listed_data_set_of_the_hub_is_found(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"hf_hub_url": "org/rows", "subset": "en"}}))
    config = parsed(tmp_path, LLAMA_FACTORY.replace("{folder}", str(tmp_path)))
    assert values(config, "data", "dataset_config") == ("org/rows", "en")
