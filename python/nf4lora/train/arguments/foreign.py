"""What the keys of other tools' configuration files mean here: Axolotl, LLaMA-Factory, TRL, Unsloth, MLX.

A key is translated, or left aside because it changes nothing that is trained (which is said), or refused with a
reason. None that changes the result is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nf4lora.train.settings import ALIASES, FORMATS
from nf4lora.train.values import boolean, integer, real

NOTHING: tuple[Any, ...] = (None, "", [], {})

# Keys left aside, by the reason. A name that ends in * stands for all that begin so; the first one that fits counts.
ASIDE: dict[str, str] = {
    "the loss is computed in chunks already":
        "cut_cross_entropy flash_attn_cross_entropy liger_cross_entropy liger_fused_linear_cross_entropy",
    "use_liger_kernel takes all of Liger's kernels that there are for a model, but for the loss, or none":
        "liger_*",
    "torch_compile has torch's own backend and mode":
        "torch_compile_*",
    "they change speed or memory, and nf4lora has kernels of its own":
        "flash_attn_* xformers_attention flex_attn_compile_kwargs tf32 lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
        "use_kernels use_unsloth use_unsloth_gc low_cpu_mem_usage activation_offloading use_reentrant_gc "
        "gradient_checkpointing_kwargs "
        "device_map bnb_4bit_quant_storage padding_free pad_to_multiple_of upcast_layernorm use_v1_kernels "
        "quantize_moe_experts experts_implementation use_scattermoe fused_attn_kernel gpu_memory_limit "
        "torch_empty_cache_steps use_sonicmoe tiled_mlp gemma4_hybrid_attn_impl experimental_skip_move_to_device "
        "llama4_linearized_experts sdpa_* unsloth_lora_*",
    "data are read and tokenised anew at each start":
        "dataset_prepared_path overwrite_cache preprocessing_num_workers preprocessing_batch_size dataset_num_proc "
        "dataset_processes dataset_keep_in_memory dataloader_* skip_prepare_dataset remove_unused_columns "
        "pad_to_sequence_len eval_sample_packing eval_packing sample_packing_eff_est packing_strategy "
        "shuffle_merged_datasets tokenized_path is_preprocess max_packed_sequence_len "
        "sample_packing_seq_len_multiplier sample_packing_group_size sample_packing_bin_size total_num_tokens "
        "data_seed",
    "the checkpoint says which classes load it, and no code of its own is run":
        "model_type tokenizer_type processor_type tokenizer_use_fast use_fast_tokenizer tokenizer_legacy "
        "trust_remote_code tokenizer_trust_remote_code is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model tokenizer_use_mistral_common",
    "training runs in one process":
        "ddp ddp_* local_rank ray_* average_tokens_across_devices",
    "a run writes metrics.jsonl, loss.png, config.yaml and whole checkpoints whatever they say; "
    "report_to tensorboard or wandb adds those":
        "plot_loss strict debug verbosity log_level disable_tqdm logging_dir logging_strategy logging_first_step "
        "run_name experiment_name include_tokens_per_second include_num_input_tokens_seen include_effective_tokens* "
        "wandb_* use_wandb mlflow_* comet_* swanlab_* use_swanlab trackio_* project_name use_mlflow use_comet "
        "save_safetensors save_only_model "
        "eval_table_size eval_max_new_tokens do_eval eval_accumulation_steps loss_watchdog_* steps_per_report_* "
        "save_first_step eval_on_start eval_delay",
    "nothing is uploaded; do that with `hf upload`":
        "hub_* push_dataset_to_hub hf_use_auth_token",
    "they are of other ways of training or of other hardware":
        "torchdistx_path gptq_* infer_backend sample_backend max_new_tokens accelerator_config "
        "image_* video_* audio_*",
}  # fmt: skip

# Keys that describe what is done here anyway, and are refused with the reason where they do not.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "finetuning_type": (("lora",), "only LoRA is trained"),
    "fine_tune_type": (("lora",), "only LoRA is trained"),
    "stage": (("sft",), "only supervised fine-tuning is done"),
    "rl": ((), "only supervised fine-tuning is done"),
    "reward_model": ((False,), "only supervised fine-tuning is done"),
    "process_reward_model": ((False,), "only supervised fine-tuning is done"),
    "loss_type": (("nll",), "the loss is cross-entropy"),
    "do_train": ((True,), "nf4lora train trains"),
    "train": ((True,), "nf4lora train trains"),
    "do_predict": ((False,), "nf4lora train writes no predictions"),
    "predict_with_generate": ((False,), "evaluation takes the loss; nothing is generated"),
    "do_causal_lm_eval": ((False,), "evaluation takes the loss; nothing is generated"),
    "use_peft": ((True,), "only LoRA is trained"),
    "full_finetuning": ((False,), "only LoRA is trained"),
    "full_finetune": ((False,), "only LoRA is trained"),
    "freeze_vision_tower": ((True,), "adapters go on the language model"),
    "freeze_multi_modal_projector": ((True,), "adapters go on the language model"),
    "freeze_mm_modules": ((True,), "adapters go on the language model"),
    "freeze_language_model": ((False,), "adapters go on the language model"),
    "unfrozen_parameters": ((), "only LoRA is trained"),
    "load_in_8bit": ((False,), "the base is NF4 or 16-bit"),
    "fp16": ((False,), "float16 would need loss scaling; use dtype bfloat16 or float32"),
    "float16": ((False,), "float16 would need loss scaling; use dtype bfloat16 or float32"),
    "fp8": ((False,), "the base is NF4 or 16-bit"),
    "pure_bf16": ((False,), "adapters are trained in float32"),
    "gptq": ((False,), "the base is NF4 or 16-bit"),
    "quantization_method": (("bnb", "bitsandbytes", "nf4lora"), "the base is NF4 or 16-bit"),
    "quantization_type": (("nf4",), "nf4 is the only type"),
    "push_to_hub": ((False,), "upload the output folder with `hf upload`"),
    "deepspeed": ((), "one process is used"),
    "fsdp": ((), "one process is used"),
    "fsdp_config": ((), "one process is used"),
    "fsdp_version": ((), "one process is used"),
    "tensor_parallel_size": ((1,), "one process is used"),
    "context_parallel_size": ((1,), "one process is used"),
    "sequence_parallel_degree": ((1,), "one process is used"),
    "dp_shard_size": ((1,), "one process is used"),
    "bias": (("none",), "biases are not trained"),
    "lora_bias": (("none", False), "biases are not trained"),
    "task_type": (("CAUSAL_LM",), "language models are trained"),
    "lora_task_type": (("CAUSAL_LM",), "language models are trained"),
    "lora_fan_in_fan_out": ((False,), "layers are torch.nn.Linear"),
    "init_lora_weights": ((True,), "lora_A is drawn at random and lora_B is zero"),
    "pissa_init": ((False,), "lora_A is drawn at random and lora_B is zero"),
    "loftq_config": ((), "lora_A is drawn at random and lora_B is zero"),
    "lora_model_dir": ((), "adapters start anew; to go on with a run use resume_from_checkpoint"),
    "adapter_name_or_path": ((), "adapters start anew; to go on with a run use resume_from_checkpoint"),
    "create_new_adapter": ((True,), "adapters start anew"),
    "relora": ((False,), "only LoRA is trained"),
    "use_galore": ((False,), "only LoRA is trained"),
    "use_badam": ((False,), "only LoRA is trained"),
    "use_apollo": ((False,), "only LoRA is trained"),
    "use_muon": ((False,), "the optimizer is AdamW"),
    "use_adam_mini": ((False,), "the optimizer is AdamW"),
    "use_llama_pro": ((False,), "only LoRA is trained"),
    "loraplus_lr_ratio": ((1,), "all adapters have one learning rate"),
    "embedding_learning_rate": ((), "all parameters have one learning rate"),
    "adam_beta1": ((0.9,), "AdamW's betas are 0.9 and 0.999"),
    "adam_beta2": ((0.999,), "AdamW's betas are 0.9 and 0.999"),
    "adam_epsilon": ((1e-8,), "AdamW's epsilon is 1e-8"),
    "adam_eps": ((1e-8,), "AdamW's epsilon is 1e-8"),
    "optim_args": ((), "the optimizer takes no further arguments"),
    "lr_scheduler_kwargs": ((), "schedules take no further arguments"),
    "cosine_min_lr_ratio": ((0,), "the cosine ends at 0"),
    "cosine_constant_lr_ratio": ((0,), "the cosine ends at 0"),
    "neftune_noise_alpha": ((0,), "no noise is added to the embeddings"),
    "noisy_embedding_alpha": ((0,), "no noise is added to the embeddings"),
    "label_smoothing_factor": ((0,), "the loss is plain cross-entropy"),
    "group_by_length": ((False,), "rows are shuffled without regard to length"),
    "curriculum_sampling": ((False,), "rows are shuffled"),
    "disable_shuffling": ((False,), "rows are shuffled"),
    "shuffle_dataset": ((True,), "rows are shuffled"),
    "streaming": ((False,), "data are read whole"),
    "dataset_streaming": ((False,), "data are read whole"),
    "pretraining_dataset": ((), "data are read whole; name a file or a data set as data"),
    "mix_strategy": (("concat",), "one data set is trained on"),
    "mask_history": ((False,), "all answers are trained; `weight: 0` on a turn takes one out"),
    "efficient_eos": ((False,), "the chat template says what ends a turn"),
    "enable_thinking": ((True,), "give chat_template_kwargs in the rows"),
    "load_best_model_at_end": ((False,), "the last weights are saved; the best checkpoint is kept, and named"),
    "early_stopping_patience": ((), "a run ends after its steps"),
    "early_stopping_steps": ((), "a run ends after its steps"),
    "resize_token_embeddings_to_32x": ((False,), "the vocabulary stays as it is"),
    "resize_vocab": ((False,), "the vocabulary stays as it is"),
    "tokens": ((), "the vocabulary stays as it is"),
    "new_special_tokens": ((), "the vocabulary stays as it is"),
    "add_special_tokens": ((), "the vocabulary stays as it is"),
    "rope_scaling": ((), "positions stay as the model has them"),
    "shift_attn": ((False,), "attention stays as the model has it"),
    "mixture_of_depths": ((), "the model stays as it is"),
    "use_dft_loss": ((False,), "the loss is plain cross-entropy"),
    "use_asft_loss": ((False,), "the loss is plain cross-entropy"),
    "use_eaft_loss": ((False,), "the loss is plain cross-entropy"),
    "model_quantization_config": ((), "the base is NF4 or 16-bit"),
    "qat": ((), "the base is NF4 or 16-bit"),
    "dataset_text_field": (("text",), "text must be in the column text"),
}

SPEED_PLUGINS = ("liger.LigerPlugin", "cut_cross_entropy.CutCrossEntropyPlugin", "spectrum", "kernels.KernelsPlugin")


def _same(value: Any, wanted: tuple[Any, ...]) -> bool:
    """Whether a value, text mostly, means one of those that are wanted."""
    for choice in wanted:
        try:
            if isinstance(choice, bool):
                if boolean(value) is choice:
                    return True
            elif isinstance(choice, (int, float)):
                if float(value) == choice:
                    return True
            elif str(value) == choice:
                return True
        except (TypeError, ValueError):
            continue
    return value in NOTHING


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def only(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: the key asks for something else than what is done here.
    """
    wanted, why = ONLY[name]
    if not _same(value, wanted):
        shown = " or ".join(map(_word, wanted))
        raise ValueError(f"must be {shown or 'left out'}: {why}")


def aside(name: str) -> str:
    """Why a key is left aside; nothing where it is not."""
    for why, names in ASIDE.items():
        for pattern in names.split():
            if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
                return why
    return ""


def _bits(value: Any) -> dict:
    if str(value) != "4":
        raise ValueError("must be 4 (for LoRA on the 16-bit model: load_in_4bit false)")
    return {"load_in_4bit": True}


def _adapter(value: Any) -> dict:
    if value not in ("qlora", "lora"):
        raise ValueError("must be qlora or lora")
    return {"load_in_4bit": value == "qlora"}


def _target_linear(value: Any) -> dict:
    return {"lora_target_modules": "all-linear"} if boolean(value) else {}


def _train_on_inputs(value: Any) -> dict:
    return {"assistant_only_loss": "auto" if not boolean(value) else False}


def _quantization(value: Any) -> dict:
    known = ("bnb_4bit_use_double_quant", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "load_in_4bit")
    if not isinstance(value, dict) or set(value) - set(known):
        raise ValueError(f"must hold {', '.join(known)}")
    return {ALIASES.get(name, name): item for name, item in value.items() if item is not None}


def _lora_parameters(value: Any) -> dict:
    """MLX's: the scale is alpha / r."""
    known = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "keys": "lora_target_modules"}
    if not isinstance(value, dict) or set(value) - {*known, "scale"}:
        raise ValueError(f"must hold {', '.join([*known, 'scale'])}")
    options = {known[name]: item for name, item in value.items() if name in known}
    if "keys" in value:
        options["lora_target_modules"] = [str(key).rpartition(".")[2] for key in value["keys"]]
    if "scale" in value:
        options = {"lora_r": 8, **options}  # MLX's own
        options["lora_alpha"] = real(0, above=True)(value["scale"]) * integer(1)(options["lora_r"])
    return options


def _plugins(value: Any) -> dict:
    listed = value if isinstance(value, list) else [value]
    others = [str(plugin) for plugin in listed if not str(plugin).endswith(SPEED_PLUGINS)]
    if others:
        raise ValueError(f"must hold plugins for speed only, which are not needed here, and not {', '.join(others)}")
    return {}


def _attention(implementation: str) -> Callable[[Any], dict]:
    """Axolotl's switches, one for each implementation."""
    return lambda value: {"attn_implementation": implementation} if boolean(value) else {}


def _flash_attn(value: Any) -> dict:
    """LLaMA-Factory's, which names the implementation."""
    names = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
    if value != "auto" and value not in names:
        raise ValueError(f"must be auto, {', '.join(names)}")
    return {"attn_implementation": names[value]} if value in names else {}


def _liger(value: Any) -> dict:
    return {"use_liger_kernel": True} if boolean(value) else {}


def _auto_resume(value: Any) -> dict:
    return {"resume_from_checkpoint": "auto"} if boolean(value) else {}


def _tensorboard(value: Any) -> dict:
    return {"report_to": ["tensorboard"]} if boolean(value) else {}


def _float(value: Any) -> dict:
    return {"dtype": "bfloat16"} if boolean(value) else {}


def _eval_dataset(value: Any) -> dict:
    entry = _entry(value)
    if set(entry) - {"data", "dataset_format"}:
        raise ValueError("must be one local file")
    return {"eval_file": entry["data"]}


ENTRY = {"path": "data", "type": "dataset_format", "name": "dataset_config", "split": "dataset_train_split"}
ENTRY_ONLY: dict[str, tuple[Any, ...]] = {
    "ds_type": ("json", "csv", "parquet", "text"),
    "field_messages": ("messages", "conversations"),
    "field": ("text",),
    "field_instruction": ("instruction",), "field_input": ("input",), "field_output": ("output",),
    "field_tools": ("tools",), "field_system": ("system",),
    "message_field_role": ("role", "from"), "message_field_content": ("content", "value"),
    "message_field_training": ("train", "training", "weight"),
    "field_thinking": ("reasoning_content", "reasoning", "thinking"),
    "template_thinking_key": ("reasoning_content", "reasoning", "thinking"),
    "chat_template": ("tokenizer_default",),
    "conversation": ("chatml",),
    "train_on_eos": ("turn",), "train_on_eot": ("turn",),
    "drop_system_message": (False,), "shards": (1,), "streaming": (False,), "trust_remote_code": (False, True),
}  # fmt: skip


COLUMN_OF = {"messages": "messages", "conversations": "sharegpt"}  # the format that reads turns in this column


def _entry(value: Any) -> dict:
    """One entry of Axolotl's list of data sets.

    Raises:
        ValueError: several, or a key that cannot be honoured.
    """
    kinds = {
        "chat_template": "messages", "chat_template.default": "messages", "completion": "text",
        "alpaca:chat": "alpaca", "alpaca:phi": "alpaca",
    }  # fmt: skip
    entry = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(entry, list):
        raise ValueError(f"must hold one data set (mixtures are not built yet), got {len(entry)}")
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or "path" not in entry:
        raise ValueError(f"must hold one entry with {', '.join(ENTRY)}")
    options = {}
    for name, item in entry.items():
        if item is None or item in ("", []):
            continue
        if name == "data_files":
            files = item if isinstance(item, list) else [item]
            if len(files) != 1:
                raise ValueError(f"must hold one file in data_files, got {len(files)}")
            here = str(Path(str(entry["path"])) / str(files[0]))
            options["data"] = here if Path(here).is_file() else str(files[0])
        elif name in ENTRY:
            if name == "type" and kinds.get(str(item), str(item)) not in FORMATS:
                raise ValueError(f"must have a type of {', '.join(FORMATS)} (or chat_template, completion), got {item}")
            options.setdefault(ENTRY[name], kinds.get(item, item) if name == "type" else item)
        elif name == "message_property_mappings":
            usual = {"role": ("role", "from"), "content": ("content", "value")}
            if not isinstance(item, dict) or any(name not in usual.get(key, ()) for key, name in item.items()):
                raise ValueError("must keep the keys role and content (or from and value) in message_property_mappings")
        elif name == "roles_to_train":
            if [*item] not in (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]):
                raise ValueError(f"must train the assistant alone, got roles_to_train {item}")
        elif name == "roles":
            known = {"user": {"human", "user"}, "assistant": {"gpt", "assistant"}, "system": {"system"},
                     "tool": {"tool", "observation"}}  # fmt: skip
            if not isinstance(item, dict) or any(set(names) - known.get(role, set()) for role, names in item.items()):
                raise ValueError("must keep the usual roles (user, human, assistant, gpt, system, tool) in roles")
        elif name not in ENTRY_ONLY:
            raise ValueError(f"must hold one entry with {', '.join(ENTRY)}; {name} cannot be honoured")
        elif not _same(item, ENTRY_ONLY[name]):
            raise ValueError(f"must have {' or '.join(map(_word, ENTRY_ONLY[name]))} as {name}, got {item}")
    if entry.get("field_messages") and options.get("dataset_format", "messages") in COLUMN_OF.values():
        options["dataset_format"] = COLUMN_OF[entry["field_messages"]]
    return options


TRANSLATED: dict[str, Callable[[Any], dict]] = {
    "quantization_bit": _bits,
    "bits": _bits,
    "adapter": _adapter,
    "lora_target_linear": _target_linear,
    "train_on_inputs": _train_on_inputs,
    "train_on_prompt": _train_on_inputs,
    "datasets": _entry,
    "test_datasets": _eval_dataset,
    "eval_dataset": _eval_dataset,
    "bnb_config_kwargs": _quantization,
    "lora_parameters": _lora_parameters,
    "plugins": _plugins,
    "auto_resume_from_checkpoints": _auto_resume,
    "use_tensorboard": _tensorboard,
    "bfloat16": _float,
    "flash_attention": _attention("flash_attention_2"),
    "sdp_attention": _attention("sdpa"),
    "flex_attention": _attention("flex_attention"),
    "eager_attention": _attention("eager"),
    "flash_attn": _flash_attn,
    "enable_liger_kernel": _liger,
}

# Keys of other tools for options that are left out, aloud, where this machine or the model has no use for them.
WISHES = (
    "flash_attention", "sdp_attention", "flex_attention", "eager_attention", "flash_attn", "enable_liger_kernel",
)  # fmt: skip
