"""The options for speed: what each needs is said before anything is loaded, and what they train is what is trained
without them."""
# ruff: noqa: F811  (a package may be missing; fixtures are imported)

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("trl")
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from nf4lora.compat.transformers import known_batch
from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.batch import KNOWN, KnowingCollator
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.run_folder import config_file
from nf4lora.train.settings import OPTIONS, help_text
from nf4lora.train.speed import attention, graphs, liger
from nf4lora.train.speed import options as speed
from nf4lora.train.speed.graphs import BlockGraphs

from support.models import tiny_llama
from support.recorder import CpuRecorder
from support.train_runs import adapter, base, data, equal, losses, options, quick, train  # noqa: F401

NEEDED = ["--model", "m", "--data", "d"]
PACKED = ("--packing", "--max_length", "64", "--gradient_checkpointing", "false")
GRAPHS = (*PACKED, "--cuda_graphs")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attn_implementation", "fast"], "must be one of eager, sdpa, flash_attention_2, .* kernels-community"),
        (["--attn_implementation", "../kernel/x"], "must be one of eager"),
        (["--use_liger_kernel=maybe"], "use_liger_kernel must be true or false"),
        (["--torch_compile=max-autotune"], "torch_compile must be true or false"),
        (["--cuda_graphs"], "cuda_graphs needs batches of one length, which packing makes; give packing true"),
        (["--cuda_graphs", "--packing"], "give gradient_checkpointing false, which needs more memory"),
        ([*GRAPHS, "--torch_compile"], "cuda_graphs and torch_compile both replace the decoder blocks; keep one"),
        ([*GRAPHS, "--attn_implementation", "flash_attention_2"], "keep their shapes, got .* flash_attention_2; use"),
        ([*GRAPHS, "--flex_attention", "true"], "keep their shapes, got attn_implementation flex_attention; use sdpa"),
    ],
)
def test_contradictions_are_named(flags, words):
    with pytest.raises(UsageError, match=words):
        parse_arguments([*NEEDED, *flags])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("attn_implementation", name) for name in ("eager", "sdpa", "flash_attention_3", "flex_attention")),
        ("attn_implementation", "kernels-community/flash-attn3"),
        ("attn_implementation", "kernels-community/flash-attn2@v1:flash_attn_varlen_func"),
        *((name, True) for name in ("use_liger_kernel", "torch_compile")),
    ],
)
def test_options_are_off_by_default_and_written_down_where_they_are_on(tmp_path, name, value):
    assert not getattr(parse_arguments(NEEDED), name)
    config = parse_arguments([*NEEDED, f"--{name}={value}"])
    config_file.write(config, tmp_path / "config.yaml")
    again = parse_arguments([str(tmp_path / "config.yaml")])
    assert {name: getattr(again, name) for name in OPTIONS} == {name: getattr(config, name) for name in OPTIONS}
    assert getattr(again, name) == value
    assert name in again.given  # so that it is an error on a machine that lacks it


def test_switches_need_no_value():
    config = parse_arguments([*NEEDED, "--torch_compile", "--use_liger_kernel"])
    assert (config.torch_compile, config.use_liger_kernel) == (True, True)


def test_help_names_the_options_in_a_section_of_their_own():
    section = help_text().split("\nSpeed (docs/training-speed.md):\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in section.splitlines()] == [
        "--attn_implementation", "--use_liger_kernel", "--torch_compile", "--cuda_graphs"
    ]  # fmt: skip


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("implementation", "kind", "dtype", "packages", "words"),
    [
        ("eager", "cpu", FP32, (), ""),
        ("sdpa", "cpu", FP32, (), ""),
        ("flex_attention", "cpu", FP32, (), "no backward pass of it for a CPU; use sdpa"),
        ("flex_attention", "cuda", FP32, (), ""),
        ("flash_attention_2", "cpu", BF16, ("flash_attn",), "needs an NVIDIA GPU, and this run is on the CPU"),
        ("flash_attention_2", "cuda", FP32, ("flash_attn",), "16 bits only, and dtype is float32; use dtype bfloat16"),
        ("flash_attention_2", "cuda", BF16, (), "needs the package flash-attn, or kernels, .*: pip install kernels"),
        ("flash_attention_2", "cuda", BF16, ("flash_attn_interface",), "needs the package flash-attn"),
        ("flash_attention_2", "cuda", BF16, ("flash_attn",), ""),
        ("flash_attention_2", "cuda", BF16, ("kernels",), ""),
        ("flash_attention_3", "cuda", BF16, ("flash_attn",), "needs the package flash-attn-3"),
        ("flash_attention_3", "cuda", BF16, ("flash_attn_interface",), ""),
        ("kernels-community/flash-attn2", "cpu", BF16, ("kernels",), "needs an NVIDIA GPU"),
        ("kernels-community/flash-attn2", "cuda", FP32, ("kernels",), "16 bits only"),
        ("kernels-community/flash-attn2", "cuda", BF16, ("flash_attn",), "package kernels: pip install kernels"),
        ("kernels-community/flash-attn2", "cuda", BF16, ("kernels",), ""),
    ],
)  # fmt: skip
def test_what_an_attention_needs_is_named(monkeypatch, implementation, kind, dtype, packages, words):
    monkeypatch.setattr(attention, "find_spec", lambda name: name if name in packages else None)
    said = attention.missing(implementation, kind, dtype)
    assert re.search(words, said) if words else said == ""


@pytest.mark.parametrize(
    ("kind", "packages", "words"),
    [
        ("cpu", ("liger_kernel", "triton"), "need a GPU, and this run is on the CPU; use use_liger_kernel false"),
        ("cuda", ("triton",), "needs the package liger-kernel: pip install liger-kernel"),
        ("cuda", ("liger_kernel",), "need the package triton"),
    ],
)
def test_what_liger_needs_is_named(monkeypatch, kind, packages, words):
    monkeypatch.setattr(liger, "find_spec", lambda name: name if name in packages else None)
    assert words in liger.missing(kind)


def test_a_type_of_model_that_liger_does_not_know_is_named(monkeypatch):
    monkeypatch.setattr(liger, "patches", lambda: {"llama": None})
    config = parse_arguments([*NEEDED, "--use_liger_kernel"])
    assert speed.for_model(config, "llama") == (config, [])
    with pytest.raises(UsageError, match="use_liger_kernel: Liger has no kernels for models of type gpt2; use"):
        speed.for_model(config, "gpt2")
    plain = parse_arguments(NEEDED)
    assert speed.for_model(plain, "gpt2") == (plain, [])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attn_implementation", "flash_attention_2"], "attn_implementation flash_attention_2: it needs an NVIDIA"),
        (["--attn_implementation", "flex_attention"], "attn_implementation flex_attention: torch has no backward pass"),
        (["--use_liger_kernel"], "use_liger_kernel: Liger's kernels need a GPU"),
        (GRAPHS, "cuda_graphs: CUDA graphs need an NVIDIA GPU, and this run is on the CPU; use cuda_graphs false"),
    ],
)  # fmt: skip
def test_what_a_cpu_has_not_is_an_error_before_anything_is_read(data, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr("nf4lora.train.run.read_inputs", lambda *arguments: pytest.fail("read"))
    with pytest.raises(UsageError) as error:
        train("--model", "m", "--data", data, "--output_dir", str(tmp_path / "out"), "--device", "cpu", *flags)
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_a_file_of_another_tool_wishes_is_left_out_aloud(base, data, tmp_path):
    path = tmp_path / "axolotl.yaml"
    path.write_text("flash_attention: true\nenable_liger_kernel: true\n")
    code, said = train(str(path), *options(base, data, tmp_path / "out", "--max_steps", "1"))
    assert code == 0
    assert "not used: attn_implementation flash_attention_2: it needs an NVIDIA GPU, and this run is on the CPU" in said
    assert "not used: use_liger_kernel: Liger's kernels need a GPU, and this run is on the CPU" in said
    text = (tmp_path / "out/config.yaml").read_text()
    assert "attn_implementation" not in text
    assert "use_liger_kernel: false" in text


def test_a_wish_gives_way_to_a_flag(tmp_path):
    path = tmp_path / "axolotl.yaml"
    path.write_text("base_model: m\ndata: d\nflash_attention: true\n")
    config = parse_arguments([str(path), "--attn_implementation", "sdpa"])
    assert config.attn_implementation == "sdpa"
    assert "attn_implementation" in config.given
    assert "attn_implementation" not in parse_arguments([str(path)]).given


def test_without_a_compiler_torch_compile_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr("nf4lora.train.run.read_inputs", lambda *arguments: pytest.fail("read"))
    words = r"torch_compile: torch.compile needs a C\+\+ compiler .*; use torch_compile false"
    arguments = ["--model", "m", "--data", data, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UsageError, match=words):
        train(*arguments, "--torch_compile")
    assert not (tmp_path / "out").exists()


# ---- packed rows -----------------------------------------------------------------------------------------------------


def packed_batch(length=None):
    """Three samples in two rows, as the trainer gives them to a model; and the samples."""
    samples = [[(start + step * i) % 259 for i in range(n)] for start, step, n in ((3, 7, 11), (5, 13, 8), (1, 3, 14))]
    first = samples[0] + samples[1]
    rows = [
        {"input_ids": first, "labels": first, "seq_lengths": [11, 8]},
        {"input_ids": samples[2], "labels": samples[2], "seq_lengths": [14]},
    ]
    collate = DataCollatorForLanguageModeling(pad_token_id=256, padding_free=True)
    return KnowingCollator(collate, length, 256)(rows), samples


def packed_logits(model, batch):
    known = batch.pop(KNOWN)
    labels = batch.pop("labels")
    with torch.no_grad(), known_batch(labels.shape, known.padded, known.packed):
        return model(**batch, use_cache=False).logits[0]


@pytest.mark.parametrize("length", [None, 33, 48], ids=["as they are", "full", "with a filler"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_samples_of_a_row_do_not_see_each_other(implementation, length):
    model = tiny_llama()
    batch, samples = packed_batch(length)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([sample])).logits[0] for sample in samples]
    model.set_attn_implementation(implementation)
    together = packed_logits(model, batch)
    assert len(together) == (length or 33)
    for logits, row in zip(together.split([11, 8, 14, len(together) - 33]), alone, strict=False):
        torch.testing.assert_close(logits, row, rtol=0, atol=2e-6)


def test_flash_attention_is_told_where_each_sample_ends(monkeypatch):
    """FlashAttention has no CPU code: in its place stands torch's attention over each span that it is given."""
    from transformers import modeling_flash_attention_utils as flash

    spans = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, **kwargs):
        spans.append(cu_seqlens_q.tolist())
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert kwargs["max_seqlen_q"] == max(b - a for a, b in zip(spans[-1], spans[-1][1:], strict=False))
        out = torch.empty_like(q)
        for a, b in zip(spans[-1], spans[-1][1:], strict=False):
            part = (x[a:b].transpose(0, 1) for x in (q, k, v))
            out[a:b] = torch.nn.functional.scaled_dot_product_attention(
                *part, is_causal=causal, enable_gqa=True, scale=kwargs["softmax_scale"]
            ).transpose(0, 1)
        return out

    def plain(*arguments, **kwargs):
        pytest.fail("packed rows must be given as spans")

    functions = (plain, varlen, None, None, None)
    process = flash._lazy_define_process_function(varlen_signature)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *a, **k: (functions, (process, dict)))
    model = tiny_llama()
    batch, samples = packed_batch()
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([sample])).logits[0] for sample in samples]
    model.config._attn_implementation_internal = "flash_attention_2"
    together = packed_logits(model, batch)
    assert spans == [[0, 11, 19, 33]] * 2
    for logits, row in zip(together.split([11, 8, 14]), alone, strict=True):
        torch.testing.assert_close(logits, row, rtol=0, atol=2e-6)


def varlen_signature(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal):
    """The arguments of flash_attn_varlen_func that transformers looks for."""


def test_a_filler_is_not_trained_and_not_counted():
    batch, samples = packed_batch(48)
    shorter, _ = packed_batch()
    assert {*batch} == {"input_ids", "labels", "position_ids", KNOWN}
    assert batch["input_ids"][0].tolist() == [*(token for sample in samples for token in sample), *[256] * 15]
    assert torch.equal(batch["labels"][:, :33], shorter["labels"])
    assert set(batch["labels"][0, 33:].tolist()) == {-100}
    assert batch["position_ids"][0, 33:].tolist() == list(range(15))
    assert torch.equal(batch[KNOWN].positions, shorter[KNOWN].positions)
    assert (batch[KNOWN].seen, batch[KNOWN].packed) == (33, True)


# ---- runs ------------------------------------------------------------------------------------------------------------


def close(a, b, tolerance):
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """`nf4lora train --cuda_graphs` where a graph is the work again."""
    monkeypatch.setattr(graphs, "missing", lambda kind: "")
    monkeypatch.setattr(graphs, "CudaRecorder", CpuRecorder)


def attention_of(model):
    return model.get_base_model().config._attn_implementation


def test_attention_is_handed_to_the_model(base, data, tmp_path):
    seen = []
    for implementation in ("eager", "sdpa"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speed, "shown", lambda config: seen.append(config.attn_implementation))
            patch.setattr("nf4lora.train.reach.check_reach", lambda model, *rest: seen.append(attention_of(model)))
            train(*options(base, data, tmp_path / implementation, "--attn_implementation", implementation))
    assert seen == ["eager", "eager", "sdpa", "sdpa"]
    assert not equal(adapter(tmp_path / "eager"), adapter(tmp_path / "sdpa"))  # other sums
    assert close(adapter(tmp_path / "eager"), adapter(tmp_path / "sdpa"), 1e-3)


@pytest.mark.parametrize("dropout", ["0", "0.2"])
def test_graphs_train_the_same_to_the_bit(base, data, tmp_path, monkeypatch, on_a_cpu, dropout):
    flags = (*GRAPHS, "--lora_dropout", dropout, "--val_size", "4", "--eval_steps", "3", "--lr", "1e-2")
    before = CpuRecorder.replays
    code, said = train(*options(base, data, tmp_path / "replayed", *flags))
    assert code == 0
    assert "faster   cuda_graphs" in said
    assert "not replayed" not in said
    assert CpuRecorder.replays > before
    with monkeypatch.context() as patch:
        patch.setattr(BlockGraphs, "batch", lambda self: contextlib.nullcontext())
        train(*options(base, data, tmp_path / "as it is", *flags))
    assert equal(adapter(tmp_path / "replayed"), adapter(tmp_path / "as it is"))
    keys = ("step", "loss", "grad_norm", "num_tokens", "mean_token_accuracy", "eval_loss")
    assert losses(tmp_path / "replayed", *keys) == losses(tmp_path / "as it is", *keys)
    # Without a filler, that is without the option, sums have other lengths.
    without = [flag for flag in flags if flag != "--cuda_graphs"]
    train(*options(base, data, tmp_path / "without", *without))
    if dropout == "0":
        assert close(adapter(tmp_path / "replayed"), adapter(tmp_path / "without"), 1e-3)
    assert losses(tmp_path / "replayed", "num_tokens") == losses(tmp_path / "without", "num_tokens")


def test_a_run_with_graphs_is_resumed_to_the_bit(base, data, tmp_path, on_a_cpu):
    flags = (*GRAPHS, "--lora_dropout", "0.2", "--save_steps", "2", "--save_total_limit", "9")
    train(*options(base, data, tmp_path / "whole", *flags))
    check_resumed(base, data, tmp_path, flags)


def check_resumed(base, data, tmp_path, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(whole, parts)
    (parts / "adapter_model.safetensors").unlink()
    again = ("--resume_from_checkpoint", str(parts / "checkpoint-2"))
    _, said = train(*options(base, data, parts, *flags, *again))
    assert "another run" not in said
    assert equal(adapter(whole), adapter(parts))
    assert losses(whole, "step", "loss", "grad_norm") == losses(parts, "step", "loss", "grad_norm")


def test_a_change_of_an_option_is_told_when_a_run_is_resumed(base, data, tmp_path):
    flags = ("--save_steps", "2", "--save_total_limit", "9", "--attn_implementation", "sdpa")
    train(*options(base, data, tmp_path / "out", *flags))
    again = ("--resume_from_checkpoint", str(tmp_path / "out/checkpoint-2"))
    _, said = train(*options(base, data, tmp_path / "out", *flags[:-1], "eager", *again))
    assert "another run from here on: attn_implementation eager (was sdpa)" in said


def test_a_loss_that_is_not_finite_stops_a_run_with_graphs(base, data, tmp_path, on_a_cpu):
    flags = (*GRAPHS, "--learning_rate", "1e30", "--save_steps", "1", "--max_grad_norm", "0", "--optim", "adamw")
    with pytest.raises(RunError, match=r"is (nan|inf|not finite) in step [23]"):
        train(*options(base, data, tmp_path / "out", *flags))
    state = json.loads((sorted(Path(tmp_path / "out").glob("checkpoint-*"))[-1] / "trainer_state.json").read_text())
    assert state["global_step"] < 3


def test_calls_that_are_not_replayed_are_counted_aloud(base, data, tmp_path, monkeypatch, on_a_cpu):
    monkeypatch.setattr("nf4lora.train.batch.lengthened", lambda batch, length, filler: {
        name: batch[name][:, : 60 - batch["input_ids"].shape[1] % 2] for name in ("input_ids", "labels", "position_ids")
    })  # fmt: skip
    _, said = train(*options(base, data, tmp_path / "out", *GRAPHS))
    assert "calls of blocks were not replayed" in said


# ---- Liger -----------------------------------------------------------------------------------------------------------


def half(x):
    return x / 2


def test_what_liger_replaces_in_transformers_is_put_back():
    from transformers.models.llama import modeling_llama

    model, original = tiny_llama(), modeling_llama.apply_rotary_pos_emb
    called = []

    def patch(model, rope=True, fused_linear_cross_entropy=True):
        called.append(fused_linear_cross_entropy)
        modeling_llama.apply_rotary_pos_emb = lambda *arguments: (called.append("rope"), original(*arguments))[1]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(liger, "patches", lambda: {"llama": patch})
        with liger.liger_kernels(model, [1, 2, 3]):
            model(torch.arange(4)[None])
    assert called == [False, "rope", "rope", "rope", "rope"]  # two blocks: in the comparison, and above
    assert modeling_llama.apply_rotary_pos_emb is original


def test_kernels_that_compute_something_else_are_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb

    def patch(model):
        modeling_llama.apply_rotary_pos_emb = lambda q, k, *rest: (q, 3 * k)
        model.model.norm.forward = half

    monkeypatch.setattr(liger, "patches", lambda: {"llama": patch})
    words = "use_liger_kernel: Liger's kernels must compute what this model of type llama"
    with pytest.raises(RunError, match=words), liger.liger_kernels(tiny_llama(), [1, 2, 3]):
        pass
    assert modeling_llama.apply_rotary_pos_emb is original
