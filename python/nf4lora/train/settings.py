"""Every option of `nf4lora train`: one field of TrainConfig each, with its default, its aliases and its meaning.

Names are those of Hugging Face and TRL; aliases are the names in YAML files that people already have. A TrainConfig
never changes. What a run decides for itself makes another one of it, by the functions at the end of this file.
"""
# ruff: noqa: RUF009  (option() is dataclasses.field with our metadata)

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from nf4lora.train.errors import UsageError
from nf4lora.train.paths import nearby, not_here
from nf4lora.train.values import (
    LARGEST,
    attention,
    boolean,
    boolean_or_auto,
    checkpointing,
    compiling,
    device,
    dtype,
    integer,
    limit,
    modules,
    names,
    names_or_regex,
    one_of,
    optimizer,
    path,
    positive,
    real,
    reports,
    resume,
    share_or_count,
    step_limit,
    steps,
    template,
    text,
    tokens,
)  # fmt: skip

SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
)  # fmt: skip
FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text")


def option(section: str, default: Any, parse: Callable[[Any], Any], meaning: str, *aliases: str) -> Any:
    metadata = {"section": section, "parse": parse, "meaning": meaning, "aliases": aliases}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


M, D, L, T, O = "Model", "Data", "LoRA", "Training", "Output and evaluation"
S = "Speed (docs/training-speed.md)"


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run, checked; `given` names those that the user set."""

    # fmt: off
    model_name_or_path: str | None = option(M, None, path,
        "folder or Hub id of the base model; 16-bit, or already NF4", "model", "base_model", "base")
    model_revision: str | None = option(M, None, text, "branch, tag or commit on the Hub",
        "revision", "revision_of_model")
    load_in_4bit: bool = option(M, True, boolean, "quantise the base to NF4; false: LoRA on the 16-bit model")
    bnb_4bit_quant_type: str = option(M, "nf4", one_of("nf4"), "nf4 is the only type")
    bnb_4bit_use_double_quant: bool = option(M, True, boolean, "quantise the scales too: 4.127 instead of 4.5 bits",
        "use_bnb_nested_quant", "double_quant", "double_quantization")
    dtype: str = option(M, "auto", dtype,
        "of activations and of what stays unquantised; auto: bfloat16 where it is fast",
        "torch_dtype", "bf16", "bnb_4bit_compute_dtype")
    device: str = option(M, "auto", device, "auto, cpu, cuda or cuda:<number>")

    data: str | None = option(D, None, path, "file, directory with train/valid files, or Hub id", "dataset")
    dataset_name: str | None = option(D, None, path, "the same, under TRL's name")
    dataset_config: str | None = option(D, None, text, "configuration of the Hub data set")
    dataset_train_split: str = option(D, "train", text, "split of the Hub data set to train on")
    dataset_test_split: str | None = option(D, None, text, "split of the Hub data set to evaluate on")
    train_file: str | None = option(D, None, path, "file to train on (json, jsonl, csv, tsv, parquet, txt)")
    eval_file: str | None = option(D, None, path, "file to evaluate on", "validation_file")
    val_size: float = option(D, 0, share_or_count, "hold out this share (or number) of the training rows",
        "val_set_size")
    dataset_format: str = option(D, "auto", one_of(*FORMATS),
        "auto, messages, sharegpt, alpaca, prompt_completion or text", "type", "formatting")
    max_length: int = option(D, 2048, integer(2), "longer samples are cut",
        "max_seq_length", "max_seq_len", "sequence_len", "cutoff_len")
    packing: bool = option(D, False, boolean, "put several samples in a row, without mixing them",
        "sample_packing", "neat_packing")
    max_samples: int | None = option(D, None, integer(1), "take the first so many rows")
    skip_bad_rows: bool = option(D, False, boolean, "leave out rows that cannot be used, and say so")
    chat_template: str | None = option(D, None, template, "chatml or a .jinja file, in place of the tokenizer's own",
        "template", "chat_template_path", "chat_template_jinja")
    special_tokens: dict | None = option(D, None, tokens, "tokens that the tokenizer is held to have")
    eot_tokens: list | None = option(D, None, names, "further tokens that end a turn")
    assistant_only_loss: bool | str = option(D, "auto", boolean_or_auto,
        "train the answers only; auto: where the data has roles",
        "mask_prompt", "train_on_responses_only", "completion_only_loss")

    lora_r: int = option(L, 16, integer(1), "rank", "lora_rank", "r")
    lora_alpha: float = option(L, 32, positive, "scaling is alpha / r")
    lora_dropout: float = option(L, 0.0, real(0, 1, below=True), "")
    lora_target_modules: str | list = option(L, "all-linear", modules, "all-linear, or names of layers",
        "lora_target", "lora_modules", "target_modules")
    lora_exclude_modules: str | list | None = option(L, None, names_or_regex,
        "names of layers, or a regex, that get no adapter; default: what text does not pass through (a vision tower)",
        "exclude_modules")
    lora_target_parameters: list | None = option(L, None, names, "names of 3-D expert parameters")
    modules_to_save: list | None = option(L, None, names, "modules trained in full and saved with the adapter",
        "lora_modules_to_save", "additional_target")
    use_rslora: bool = option(L, False, boolean, "scaling is alpha / sqrt(r)", "peft_use_rslora")
    use_dora: bool = option(L, False, boolean, "weight-decomposed LoRA", "peft_use_dora")

    per_device_train_batch_size: int = option(T, 1, integer(1), "", "micro_batch_size", "batch_size")
    per_device_eval_batch_size: int | None = option(T, None, integer(1), "as in training if not given",
        "eval_batch_size")
    gradient_accumulation_steps: int = option(T, 8, integer(1), "")
    num_train_epochs: float = option(T, 3.0, real(0, LARGEST, above=True), "", "num_epochs", "epochs")
    max_steps: int | None = option(T, None, step_limit, "instead of num_train_epochs", "iters")
    learning_rate: float = option(T, 2e-4, real(0, above=True), "", "lr")
    lr_scheduler_type: str = option(T, "cosine", one_of(*SCHEDULERS), ", ".join(SCHEDULERS), "lr_scheduler")
    warmup_steps: float = option(T, 0.03, share_or_count, "steps, or a share of them below 1", "warmup_ratio")
    weight_decay: float = option(T, 0.0, real(0), "")
    max_grad_norm: float = option(T, 1.0, real(0), "0: no clipping")
    optim: str = option(T, "auto", optimizer,
        "adamw, paged_adamw_32bit or paged_adamw_8bit; auto: paged_adamw_8bit on CUDA, adamw on the CPU", "optimizer")
    page_to: str | None = option(T, None, path, "folder for the paged optimizer's state on a CPU, to be beyond RAM")
    gradient_checkpointing: bool = option(T, True, checkpointing, "recompute activations: less memory, more time",
        "grad_checkpoint", "use_gradient_checkpointing")
    seed: int = option(T, 42, integer(0, 2**32 - 1), "", "random_state")
    deterministic: bool = option(T, False, boolean, "refuse operations that are not reproducible")

    attn_implementation: str | None = option(S, None, attention,
        "eager, sdpa, flash_attention_2, flash_attention_3, flex_attention or a kernel on the Hub; "
        "default: what transformers chooses")
    use_liger_kernel: bool = option(S, False, boolean, "Liger's kernels for norms, RoPE and the MLP; needs a GPU")
    torch_compile: bool = option(S, False, compiling, "compile each decoder block; the first steps then take longer")
    cuda_graphs: bool = option(S, False, boolean,
        "replay each decoder block as a CUDA graph; needs packing true and gradient_checkpointing false")

    output_dir: str = option(O, "outputs", path, "", "adapter_path")
    overwrite_output_dir: bool = option(O, False, boolean, "start anew in a folder that holds a run")
    save_strategy: str = option(O, "steps", one_of("steps", "epoch", "no"),
        "when to write checkpoints: steps, epoch or no")
    save_steps: float = option(O, 500, steps, "", "save_every")
    save_total_limit: int = option(O, 2, limit, "keep this many checkpoints, and the best; 0, null or none: all")
    resume_from_checkpoint: str | None = option(O, None, resume, "auto (the newest in output_dir) or a path")
    logging_steps: float = option(O, 10, steps, "", "steps_per_report")
    eval_strategy: str | None = option(O, None, one_of("steps", "epoch", "no"),
        "steps, epoch or no; default: steps if eval_steps is given, else epoch", "evaluation_strategy")
    eval_steps: float | None = option(O, None, steps, "", "steps_per_eval")
    report_to: list = option(O, [], reports, "none, tensorboard, wandb")
    dry_run: bool = option(O, False, boolean, "read and tokenise the data, show a sample, train nothing")
    traceback: bool = option(O, False, boolean, "after an error, show where in the code it was raised")
    # fmt: on

    given: frozenset = frozenset()
    notes: tuple[str, ...] = ()  # what the user should know about the options


OPTIONS: dict[str, Field] = {option.name: option for option in fields(TrainConfig) if "section" in option.metadata}
ALIASES: dict[str, str] = {alias: name for name, option in OPTIONS.items() for alias in option.metadata["aliases"]}
PER_CALL = ("overwrite_output_dir", "resume_from_checkpoint", "dry_run", "traceback")  # of one call, not of the run
NULLABLE = ("save_total_limit",)  # null in a file is a value of these; elsewhere it means that nothing is given


def default(name: str) -> Any:
    return getattr(TrainConfig(), name)


def shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    return "none" if value == [] else f"{value:g}" if isinstance(value, float) else str(value)


def help_text() -> str:
    """What `nf4lora train --help` prints."""
    lines = [
        "usage: nf4lora train [config.yaml] [--option value ...]",
        "",
        "Fine-tune a model with LoRA on an NF4 base. Options come from the YAML file and from flags; flags win.",
        "Flags take - or _. Aliases stand in brackets.",
    ]
    section = None
    for name, option in OPTIONS.items():
        if option.metadata["section"] != section:
            section = option.metadata["section"]
            lines += ["", f"{section}:"]
        aliases = f"[{', '.join(option.metadata['aliases'])}]" if option.metadata["aliases"] else ""
        head = f"--{name} {shown(default(name))}".rstrip()
        lines.append(f"  {head:<36}  {option.metadata['meaning']}  {aliases}".rstrip())
    lines += ["", "Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 interrupted (a checkpoint was saved)."]
    return "\n".join(lines)


# ---- from one TrainConfig to the next --------------------------------------------------------------------------------


def completed(config: TrainConfig) -> TrainConfig:
    """A configuration that is whole and agrees with itself, with what follows from the rest filled in.

    Raises:
        UsageError: an option is missing, or two contradict each other.
    """
    check(config)
    evaluation = config.eval_strategy or ("steps" if config.eval_steps else "epoch")
    return replace(
        config,
        warmup_steps=0 if config.lr_scheduler_type == "constant" else config.warmup_steps,
        eval_strategy=evaluation,
        eval_steps=config.eval_steps or (config.logging_steps if evaluation == "steps" else None),
        per_device_eval_batch_size=config.per_device_eval_batch_size or config.per_device_train_batch_size,
    )


def on_machine(config: TrainConfig, optim: str, dtype: str) -> TrainConfig:
    """With the optimizer and the type that this machine takes where `auto` leaves them open: both are written down,
    because on another machine `auto` may mean others."""
    return replace(config, optim=optim, dtype=dtype)


def within_positions(config: TrainConfig, positions: int | None) -> tuple[TrainConfig, str]:
    """With a max_length that the model has positions for; and what is to be said about it, or nothing.

    Raises:
        UsageError: a longer one was asked for.
    """
    if not positions or config.max_length <= positions:
        return config, ""
    if "max_length" in config.given:
        raise UsageError(f"max_length must be at most the model's {positions} positions, got {config.max_length}")
    return replace(config, max_length=positions), f"max_length is {positions}, the positions that the model has"


def without(config: TrainConfig, name: str) -> TrainConfig:
    """With the default of an option that cannot be had here."""
    return replace(config, **{name: default(name)})


def without_evaluation(config: TrainConfig) -> TrainConfig:
    """For data without evaluation rows. This is not `no`, which somebody has asked for: with other rows the same
    options evaluate."""
    return config if config.eval_strategy == "no" else replace(config, eval_strategy=None)


def check(config: TrainConfig) -> None:
    """
    Raises:
        UsageError: an option is missing, or two contradict each other.
    """
    given = config.given

    def refuse(when: Any, text: str) -> None:
        if when:
            raise UsageError(text)

    sources = [name for name in ("data", "dataset_name", "train_file") if getattr(config, name)]
    refuse(not config.model_name_or_path, "--model_name_or_path is missing: the folder or the Hub id of a model")
    refuse(not sources, "--data is missing: a file, a directory with train/valid files, or a Hub id")
    refuse(len(sources) > 1, f"{' and '.join(sources)} name the training data twice; keep one")
    refuse(config.eval_file and config.val_size, "eval_file and val_size both name the evaluation data; keep one")
    refuse(
        config.dataset_test_split and config.val_size, "dataset_test_split and val_size both name the evaluation data"
    )
    refuse(config.dataset_test_split and config.eval_file, "dataset_test_split and eval_file both name evaluation data")
    for name in ("train_file", "eval_file"):
        path = getattr(config, name)
        refuse(
            path and not os.path.isfile(os.path.expanduser(path)), f"{name}: {path} is not a file{nearby(path or '')}"
        )
    base = config.model_name_or_path or ""
    refuse(base and not os.path.isdir(os.path.expanduser(base)) and not_here(base),
           f"model_name_or_path: {base} is not a folder{nearby(base)}")  # fmt: skip
    refuse({"max_steps", "num_train_epochs"} <= given and config.max_steps, "max_steps and num_train_epochs; keep one")
    refuse(config.eval_steps and config.eval_strategy in ("epoch", "no"),
           f"eval_steps {config.eval_steps} contradicts eval_strategy {config.eval_strategy}")  # fmt: skip
    refuse("save_steps" in given and config.save_strategy != "steps",
           f"save_steps {config.save_steps} contradicts save_strategy {config.save_strategy}")  # fmt: skip
    refuse(config.lr_scheduler_type == "constant" and "warmup_steps" in given and config.warmup_steps,
           "lr_scheduler_type constant has no warm-up; use constant_with_warmup, or warmup_steps 0")  # fmt: skip
    refuse(not config.load_in_4bit and given & {"bnb_4bit_quant_type", "bnb_4bit_use_double_quant"},
           "load_in_4bit false contradicts the bnb_4bit options")  # fmt: skip
    refuse(config.cuda_graphs and config.torch_compile,
           "cuda_graphs and torch_compile both replace the decoder blocks; keep one")  # fmt: skip
    refuse(config.cuda_graphs and not config.packing,
           "cuda_graphs needs batches of one length, which packing makes; give packing true")  # fmt: skip
    refuse(config.cuda_graphs and config.gradient_checkpointing,
           "cuda_graphs cannot compute activations again in the backward pass; give gradient_checkpointing false, "
           "which needs more memory")  # fmt: skip
    refuse(config.cuda_graphs and config.attn_implementation not in (None, "eager", "sdpa"),
           f"cuda_graphs needs an attention whose arguments keep their shapes, got attn_implementation "
           f"{config.attn_implementation}; use sdpa")  # fmt: skip
    refuse(config.page_to and config.optim == "adamw", "page_to needs a paged optimizer; optim adamw keeps all in RAM")
