"""What the documentation shows is run: docstrings of the package, and the Python blocks of the README."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import nf4lora

README = (Path(__file__).parent.parent / "README.md").read_text()
SKIPPED = {"nf4lora._C", "nf4lora.__main__"}
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(nf4lora.__path__, "nf4lora.")
    if m.name not in SKIPPED and not m.name.startswith("nf4lora.bench")
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", ["nf4lora", *MODULES])
def test_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    torch.manual_seed(0)
    assert doctest.testmod(module, extraglobs={"torch": torch, "nf4lora": nf4lora}, optionflags=FLAGS).failed == 0


@pytest.mark.parametrize("index", range(len(re.findall(r"^```python$", README, re.MULTILINE))))
def test_readme_block(index, tmp_path, monkeypatch):
    """Blocks of `>>>` are compared with their printed output, in one session each."""
    block = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[index]
    monkeypatch.chdir(tmp_path)
    from support.models import tiny_llama, tiny_tokenizer

    tiny_llama().save_pretrained("model")  # the README's model, as small as they come
    tiny_tokenizer().save_pretrained("model")
    torch.manual_seed(0)
    test = doctest.DocTestParser().get_doctest(block, {"torch": torch, "nf4lora": nf4lora}, "README.md", None, 0)
    assert test.examples, "a Python block of the README must be a session with >>>"
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    assert runner.run(test).failed == 0
