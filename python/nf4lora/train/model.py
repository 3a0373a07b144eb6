"""Tokenizer and model of a run, as the options ask for them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from typing import TYPE_CHECKING, Any

from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.options import TrainConfig

if TYPE_CHECKING:
    import torch


def choose_device(wanted: str) -> tuple[str, str]:
    """-> 'cuda' or 'cpu', and why not CUDA where it was left to us.

    `cuda:1` hides the other devices: Trainer would put a model on device 0, or spread batches over all of them.
    Call this before anything starts CUDA.

    Raises:
        UsageError: CUDA was asked for and cannot be had.
    """
    import torch

    if wanted == "cpu":
        return "cpu", ""
    missing = _why_no_cuda()
    if missing:
        if wanted != "auto":
            raise UsageError(f"device {wanted}: {missing}")
        return "cpu", missing
    index = int(wanted.partition(":")[2] or 0)
    if not torch.cuda.is_initialized():
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        visible = visible or [str(each) for each in range(torch.cuda.device_count())]
        if index >= len(visible):
            raise UsageError(f"device {wanted}: there are {len(visible)} CUDA devices, counted from 0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index]
    return "cuda", ""


def _why_no_cuda() -> str:
    import nf4lora

    info = nf4lora.build_info()
    if not info["cuda_torch"]:
        return "this torch was built without CUDA"
    if not info["cuda_devices"]:
        return "torch sees no CUDA device"
    if not info["cuda_built"]:
        return "nf4lora was built without CUDA kernels"
    return ""


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """bfloat16 on a CPU and on every GPU that computes it; float32 elsewhere."""
    import torch

    if wanted != "auto":
        return getattr(torch, wanted)
    fast = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def check_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("nf4lora train runs in one process for now; start it without torchrun or accelerate launch")


def load_tokenizer(config: TrainConfig) -> tuple[Any, list[str], Any]:
    """Tokenizer, the tokens that end generation, and the model's configuration.

    Raises:
        RunError: they cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    name = config.model_name_or_path or ""
    if (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1) and not os.path.isdir(name):
        raise UsageError(f"model_name_or_path: {name} is not a folder")
    with failures(f"cannot load the tokenizer of {name}"):
        model_config = AutoConfig.from_pretrained(name, revision=config.model_revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.model_revision)
    if not tokenizer.eos_token and not tokenizer.pad_token:
        raise RunError(f"the tokenizer of {name} has neither an end token nor a padding token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padded labels are -100 whatever the token
    stops: list[str] = []
    with contextlib.suppress(OSError, ValueError):  # many models have no generation_config.json
        ends = GenerationConfig.from_pretrained(name, revision=config.model_revision or "main").eos_token_id
        ids = [ends] if isinstance(ends, int) else ends or []
        stops = [token for token in tokenizer.convert_ids_to_tokens(ids) if token]
    return tokenizer, stops, model_config


def check_length(config: TrainConfig, model_config: Any) -> str:
    """Hold max_length against the positions that the model has; lowers the default, refuses a wish."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if not positions or config.max_length <= positions:
        return ""
    if "max_length" in config.given:
        raise UsageError(f"max_length must be at most the model's {positions} positions, got {config.max_length}")
    config.max_length = positions
    return f"max_length is {positions}, the positions that the model has"


def quantization_of(model_config: Any) -> str:
    """Method that a checkpoint is quantised with, or nothing."""
    found = getattr(model_config, "quantization_config", None) or {}
    return str((found if isinstance(found, dict) else found.to_dict()).get("quant_method", ""))


def load_model(config: TrainConfig, model_config: Any, device: str, dtype: torch.dtype) -> Any:
    """The base model: quantised as it is loaded, or as its checkpoint has it.

    Raises:
        UsageError: the checkpoint is quantised already and the options deny it.
        RunError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    import nf4lora

    name = config.model_name_or_path or ""
    options: dict[str, Any] = {"revision": config.model_revision, "dtype": dtype, "device_map": {"": device}}
    method = quantization_of(model_config)
    if method:
        if not config.load_in_4bit:
            raise UsageError(f"load_in_4bit false, but {name} is quantised already ({method})")
        if method == "bitsandbytes":
            with failures(f"cannot use {name}"):
                adopted = nf4lora.NF4Config.from_bnb(model_config.quantization_config)
                model_config.quantization_config = adopted.to_dict()
        elif method != "nf4lora":
            raise RunError(f"{name} is quantised with {method}; give the 16-bit model, or one in NF4")
        options["config"] = model_config
    elif config.load_in_4bit:
        options["quantization_config"] = nf4lora.NF4Config(double_quant=config.bnb_4bit_use_double_quant)
    with failures(f"cannot load {name}"):
        return AutoModelForCausalLM.from_pretrained(name, **options)


def add_adapters(config: TrainConfig, model: Any) -> tuple[Any, list[str]]:
    """-> the PeftModel to train, and what `prepare` said.

    Raises:
        RunError: the options do not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    import nf4lora

    with failures("cannot put adapters on the model"):
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            target_parameters=config.lora_target_parameters,
            modules_to_save=config.modules_to_save,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            task_type="CAUSAL_LM",
            revision=config.model_revision,
        )
        if not config.load_in_4bit:
            return in_float32(get_peft_model(model, lora)), []
        said = io.StringIO()
        with contextlib.redirect_stdout(said), warnings.catch_warnings(record=True) as warned:
            model = nf4lora.prepare(model, lora)
        lines = [*said.getvalue().splitlines(), *(str(each.message) for each in warned)]
        return in_float32(model), [line.removeprefix("nf4lora: ").removeprefix("prepare: ") for line in lines]


def in_float32(model: Any) -> Any:
    """Modules that are trained in full come in the model's dtype; 8 bits of mantissa swallow Adam's small steps."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


@contextlib.contextmanager
def failures(what: str) -> Any:
    """What libraries refuse is the user's to mend: their words, without the way through their code."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        raise RunError(f"{what}: {error}") from error
