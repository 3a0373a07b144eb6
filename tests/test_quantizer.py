"""NF4Config through transformers: load, save, shards, what stays in 16 bits, training, the way back."""

import copy
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.trainer_utils import validate_quantization_for_training

from nf4lora.nn.linear import NF4Linear
from nf4lora.nn.model_tree import replace_layers
from nf4lora.ops import reference
from nf4lora.quantization.config import NF4Config
from nf4lora.quantization.quantizer import NF4Quantizer, layers_to_pack

from support.adapted import packed_llama
from support.bits import assert_same_bits
from support.models import tiny_llama

IDS = torch.arange(24).reshape(2, 12)
PROJECTIONS = 14  # linear layers in two Llama blocks


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tiny Llama (or the model given) in 16 bits, and says where."""

    def save(model=None, **options):
        folder = tmp_path / f"saved{len(os.listdir(tmp_path))}"
        shard = {"max_shard_size": options.pop("max_shard_size", "50GB")}
        model = tiny_llama(**{"dtype": torch.bfloat16} | options) if model is None else model
        model.save_pretrained(folder, **shard)
        return folder

    return save


def load(folder, config=None, cls=AutoModelForCausalLM, **kwargs):
    if config is not None:  # given as None, transformers would forget what config.json says
        kwargs["quantization_config"] = config
    return cls.from_pretrained(folder, **kwargs)


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert_same_bits(a[key], b[key], key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_projection_is_packed_as_the_definition_says(saved, dtype, double_quant):
    original = tiny_llama(dtype=dtype)
    model = load(saved(original), NF4Config(double_quant))
    layers = packed_layers(model)
    assert len(layers) == PROJECTIONS
    for name, layer in layers.items():
        qweight, absmax = reference.nf4_quantize(original.get_submodule(name).weight.detach())
        assert_same_bits(layer.weight, qweight)
        if double_quant:
            codes, nested = reference.absmax_quantize(absmax)
            assert_same_bits(layer.weight_absmax, codes)
            assert_same_bits(layer.weight_nested.view(torch.float32), nested)
        else:
            assert_same_bits(layer.weight_absmax.view(torch.float32), absmax)
    assert model.dtype == dtype
    others = {key: value for key, value in model.state_dict().items() if key in original.state_dict()}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= others.keys()
    for key, value in others.items():
        if value.is_floating_point():
            assert_same_bits(value, original.state_dict()[key])


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_again_is_bit_equal(saved, blocksize, double_quant, tied):
    config = NF4Config(double_quant, blocksize)
    first = load(saved(hidden_size=256, num_hidden_layers=1, tied=tied), config)
    folder = saved(first)
    second, info = load(folder, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(first, second)
    assert second.config.quantization_config == config
    assert second.hf_quantizer.pre_quantized
    third = load(saved(second))
    assert_same_state(first, third)
    assert_same_bits(logits(first), logits(third))


def test_shards_hold_the_same_model_read_and_written(saved):
    whole = load(saved(), NF4Config())
    shards = saved(max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    sharded = load(shards, NF4Config())
    assert_same_state(whole, sharded)
    native = saved(sharded, max_shard_size="50KB")
    assert len(list(native.glob("*.safetensors"))) > 3
    assert_same_state(whole, load(native))


def test_checkpoint_holds_the_parameters_under_their_names(saved):
    folder = saved(load(saved(), NF4Config()))
    file, stem = load_file(folder / "model.safetensors"), "model.layers.1.mlp.down_proj."
    assert (file[stem + "weight"].dtype, list(file[stem + "weight"].shape)) == (torch.uint8, [128, 128])
    assert (file[stem + "weight_absmax"].dtype, list(file[stem + "weight_absmax"].shape)) == (torch.uint8, [128, 4])
    assert (file[stem + "weight_nested"].dtype, list(file[stem + "weight_nested"].shape)) == (torch.int32, [3])
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == NF4Config().to_dict()


def test_saving_over_the_checkpoint_that_was_loaded_keeps_it(saved):
    folder = saved(load(saved(), NF4Config()))
    model = load(folder)
    before = logits(model)
    model.save_pretrained(folder)
    assert_same_bits(logits(model), before)
    assert_same_bits(logits(load(folder)), before)


@pytest.mark.slow
def test_a_bare_import_of_the_package_is_enough_to_load_a_checkpoint(saved):
    folder = saved(load(saved(), NF4Config()))
    code = (
        "import sys, nf4lora; assert not {'peft', 'trl', 'bitsandbytes'} & set(sys.modules); "
        "from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(folder)!r}); print(sum(isinstance(x, nf4lora.NF4Linear) for x in m.modules()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == str(PROJECTIONS), run.stderr


@pytest.mark.parametrize("config", [{"quant_method": "nf4lora", "blocksize": 32}, NF4Config(blocksize=32)])
def test_a_dict_is_as_good_as_a_config(saved, config):
    assert {layer.blocksize for layer in packed_layers(load(saved(), config)).values()} == {32}


def test_the_dtype_asked_for_is_the_one_that_is_packed(saved):
    model = load(saved(dtype=torch.float32), NF4Config(), dtype=torch.bfloat16)
    rounded = load(saved(tiny_llama(dtype=torch.float32).to(torch.bfloat16)), NF4Config())
    assert_same_state(model, rounded)


def test_compute_dtype_reaches_the_layers_and_the_next_load(saved):
    model = load(saved(dtype=torch.float32), NF4Config(compute_dtype="bfloat16"))
    for loaded in (model, load(saved(model))):
        assert {layer.compute_dtype for layer in packed_layers(loaded).values()} == {torch.bfloat16}
        assert logits(loaded).dtype == torch.float32


def test_packed_parameters_are_frozen_and_the_model_is_not_flagged_as_bitsandbytes(saved):
    model = load(saved(), NF4Config())
    for layer in packed_layers(model).values():
        assert not any(p.requires_grad for p in layer.parameters())
    assert not hasattr(model, "is_loaded_in_4bit")


# ---- what stays in 16 bits ----


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_stay_and_are_named(saved, tied):
    model = load(saved(tied=tied), NF4Config())
    assert type(model.lm_head) is torch.nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert set(model.nf4lora_skipped) == {"lm_head"}
    assert "output head" in model.nf4lora_skipped["lm_head"]


def test_modules_to_not_convert_adds_to_the_rule(saved):
    folder = saved()
    model = load(folder, NF4Config(modules_to_not_convert=["down_proj", r"model.layers.0.self_attn"]))
    for loaded in (model, load(saved(model))):
        assert set(loaded.nf4lora_skipped) == {
            "lm_head",
            *(f"model.layers.{i}.mlp.down_proj" for i in range(2)),
            *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
        }
        assert loaded.nf4lora_skipped["model.layers.1.mlp.down_proj"] == "named in modules_to_not_convert"
        assert len(packed_layers(loaded)) == PROJECTIONS - 6


def test_an_odd_width_takes_a_smaller_blocksize_or_stays(saved):
    model = load(saved(hidden_size=96, intermediate_size=200, num_hidden_layers=1), NF4Config())
    for loaded in (model, load(saved(model))):
        assert {layer.blocksize for layer in packed_layers(loaded).values()} == {32}
        assert loaded.nf4lora_skipped["model.layers.0.mlp.down_proj"] == "in_features 200 is no multiple of 32"
        assert type(loaded.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert_same_state(model, loaded)


def small(name, **options):
    """A one-layer random model of another architecture."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(vocab_size=99, pad_token_id=0, **sizes | options)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_biases_are_kept_exactly(saved):
    original = small("Qwen2")
    for name, parameter in original.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model = load(saved(original), NF4Config())
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert isinstance(model.get_submodule(bias.removesuffix(".bias")), NF4Linear)
    assert_same_bits(model.get_parameter(bias), original.get_parameter(bias))
    assert_same_state(model, load(saved(model)))


def test_fused_experts_stay_are_named_and_survive_the_round_trip(saved):
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
    original = small("Qwen3Moe", num_key_value_heads=1, **options)
    folder = saved(original)
    model = load(folder, NF4Config())
    experts = [f"model.layers.0.mlp.experts.{key}" for key in ("gate_up_proj", "down_proj")]
    for loaded in (model, load(saved(model))):
        assert all("experts" in loaded.nf4lora_skipped[name] for name in experts)
        assert all(torch.equal(loaded.get_parameter(n), original.get_parameter(n)) for n in experts)
        assert len(packed_layers(loaded)) == 4
    assert_same_state(model, loaded)
    assert load_file(saved(model) / "model.safetensors").keys() == model.state_dict().keys()
    back = saved(loaded.dequantize())  # one tensor per expert again, as other tools expect
    assert load_file(back / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_a_model_without_a_linear_layer_is_refused_by_its_class(saved):
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=99)
    with pytest.raises(ValueError, match="GPT2LMHeadModel must have a linear layer to pack, got none; Conv1D"):
        load(saved(transformers.GPT2LMHeadModel(config)), NF4Config())


def test_layers_to_pack_says_the_same_of_a_model_in_memory(saved):
    original = tiny_llama(hidden_size=96, intermediate_size=200)
    packed, skipped = layers_to_pack(original, NF4Config())
    model = load(saved(original), NF4Config())
    assert packed == {name: layer.blocksize for name, layer in packed_layers(model).items()}
    assert skipped == model.nf4lora_skipped


# ---- a checkpoint that is quantised already ----


@pytest.fixture
def packed_folder(saved):
    return saved(load(saved(), NF4Config(blocksize=32)))


@pytest.mark.parametrize(
    "given",
    [NF4Config(), NF4Config(blocksize=32), NF4Config(True), {"quant_method": "nf4lora"}],
    ids=["nothing", "blocksize", "double_quant", "dict"],
)
def test_options_that_a_packed_checkpoint_agrees_with_are_taken(packed_folder, given, recwarn):
    model = load(packed_folder, given)
    assert_same_state(model, load(packed_folder))
    assert model.config.quantization_config == NF4Config(blocksize=32)
    assert not [warning for warning in recwarn if "quantization_config" in str(warning.message)]


def test_compute_dtype_is_applied_to_a_packed_checkpoint(packed_folder, saved):
    model = load(packed_folder, NF4Config(compute_dtype=torch.float32))
    for loaded in (model, load(saved(model))):
        assert {layer.compute_dtype for layer in packed_layers(loaded).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"blocksize": 64}, "blocksize must be what the checkpoint is packed with, 32, got 64; leave it out"),
        ({"double_quant": False}, "double_quant must be what the checkpoint is packed with, True, got False"),
        (
            {"modules_to_not_convert": ["q_proj"]},
            r"must name what the checkpoint left in 16 bits, \[\], got \['q_proj'\]",
        ),
    ],
)
def test_an_option_that_a_packed_checkpoint_contradicts_is_refused(packed_folder, given, match):
    with pytest.raises(ValueError, match=f"NF4Config: .*{match}"):
        load(packed_folder, NF4Config(**given))


def test_loading_leaves_the_config_that_it_was_given_alone(saved):
    folder = saved(hidden_size=96, intermediate_size=200, num_hidden_layers=1)
    config = NF4Config(modules_to_not_convert=["k_proj"])
    before = copy.deepcopy(vars(config))
    first = load(folder, config)
    first.config.quantization_config.blocksize = 4096
    assert vars(config) == before
    second = load(folder, config)
    assert second.config.quantization_config == NF4Config(modules_to_not_convert=["k_proj"])


@pytest.mark.parametrize(
    ("foreign", "match"),
    [
        (
            {"quant_method": "mxfp4"},
            r"with mxfp4; load it .*transformers\.Mxfp4Config\(dequantize=True\), then",
        ),
        ({"quant_method": "fp8"}, r"quantised with fp8; load it .*FineGrainedFP8Config\(dequantize=True\), then call"),
        ({"quant_method": "gptq", "bits": 4}, "quantised with gptq; load the 16-bit checkpoint that it was made from"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "from_bnb: .* must be packed in nf4 .* load_in_8bit",
        ),
    ],
)
def test_a_checkpoint_of_another_quantisation_is_told_the_way(saved, foreign, match):
    folder = saved()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": foreign}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        load(folder, NF4Config())


# ---- a layer at several places ----


PARTS = ("up_proj", "gate_proj", "down_proj")


class Sharing(transformers.LlamaForCausalLM):
    """Two blocks with one feed-forward part."""

    _tied_weights_keys = {  # noqa: RUF012  # transformers' own way to say it
        **transformers.LlamaForCausalLM._tied_weights_keys,
        **{
            f"model.layers.1.mlp.{n}_proj.weight": f"model.layers.0.mlp.{n}_proj.weight" for n in ("up", "gate", "down")
        },
    }

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp = self.model.layers[0].mlp


def test_a_layer_at_several_places_is_packed_at_all_of_them_while_loading(saved):
    original = Sharing(tiny_llama().config).eval()
    model = load(saved(original), NF4Config(), Sharing)
    assert model.model.layers[1].mlp is model.model.layers[0].mlp
    assert len(packed_layers(model)) == PROJECTIONS - 3
    assert not [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta]
    assert_same_bits(logits(load(saved(model), cls=Sharing)), logits(model))


def test_a_layer_that_is_shared_by_itself_is_replaced_at_all_places():
    shared, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model = torch.nn.ModuleDict({"a": shared, "b": torch.nn.Sequential(shared, other), "c": other})
    replace_layers(model, ["a", "b.0", "c"], lambda name, old: torch.nn.Bilinear(1, 1, 1))
    assert model["a"] is model["b"][0]
    assert model["c"] is model["b"][1]
    assert model["a"] is not model["c"]
    assert {type(module) for module in (model["a"], model["c"])} == {torch.nn.Bilinear}


def test_a_layer_at_several_places_is_dequantised_at_all_of_them():
    model = packed_llama(num_hidden_layers=2)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    before = logits(model)
    plain = NF4Quantizer(NF4Config())._dequantize(model, torch.float32)
    assert plain.model.layers[1].self_attn.q_proj is plain.model.layers[0].self_attn.q_proj
    assert not packed_layers(plain)
    assert plain.model.layers[1].mlp.up_proj is plain.model.layers[0].mlp.up_proj
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)  # float32 sums in another order


# ---- most of a model in 16 bits ----


def test_a_model_of_which_most_stays_in_16_bits_is_said_to(saved):
    options = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    folder = saved(small("Qwen3Moe", num_key_value_heads=1, **options))
    match = (
        r"NF4Config: most of Qwen3MoeForCausalLM stays in 16 bits: of 0\.1 M .* packed in 4 bits; 0\.1 M: weights of"
    )
    with pytest.warns(UserWarning, match=match):
        model = load(folder, NF4Config())
    assert len(packed_layers(model)) == 4


def test_large_embeddings_alone_are_no_reason_to_warn(saved, recwarn):
    load(saved(tiny_llama(vocab_size=20_000, hidden_size=64, intermediate_size=64)), NF4Config())
    load(saved(), NF4Config())
    assert not [warning for warning in recwarn if "16 bits" in str(warning.message)]


# ---- other heads on the same checkpoint ----


@pytest.mark.parametrize("native", [True, False])
def test_a_classifier_on_a_language_model_gets_a_new_head(saved, native):
    folder, config = saved(), NF4Config()
    if native:
        folder, config = saved(load(folder, config)), None
    model = load(folder, config, AutoModelForSequenceClassification, num_labels=3)
    assert len(packed_layers(model)) == PROJECTIONS
    assert model.score.weight.shape == (3, 128)
    base = load(folder, config, AutoModel)
    assert_same_bits(base(IDS)[0], model.model(IDS)[0])


# ---- memory ----


def test_each_16_bit_weight_is_freed_before_the_next_is_read(saved, monkeypatch):
    weights, pack = [], NF4Linear.pack

    def watch(weight, *args):
        assert all(earlier() is None for earlier in weights)
        weights.append(weakref.ref(weight))
        return pack(weight, *args)

    monkeypatch.setattr(NF4Linear, "pack", watch)
    load(saved(dtype=torch.float32), NF4Config(), dtype=torch.bfloat16)
    assert len(weights) == PROJECTIONS


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads RssAnon from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loading_needs_no_memory_beyond_the_model_and_one_tensor(saved, dtype):
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 1000}
    folder = saved(**sizes)
    code = (
        "import gc, sys, torch, peft, nf4lora; from transformers import LlamaForCausalLM as L\n"
        "status = '/proc/self/status'\n"
        "anon = lambda: [l.split()[1] for l in open(status) if l.startswith('RssAnon')][0]\n"
        f"print(anon(), flush=True); input(); m = L.from_pretrained({str(folder)!r}, dtype=torch.{dtype}, "
        "quantization_config=nf4lora.NF4Config()); gc.collect()\n"
        "print(anon(), sum(p.nbytes for p in m.parameters()) >> 10, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as child:
        before = int(child.stdout.readline())
        child.stdin.write("\n")
        peak, status = 0, f"/proc/{child.pid}/status"
        os.set_blocking(child.stdout.fileno(), False)
        line = ""
        while not line.endswith("\n"):  # what has been written so far may be half a line
            line += child.stdout.readline()
            assert child.poll() is None, "the process that loads the model died"
            with open(status) as file:
                peak = max([peak, *(int(line.split()[1]) for line in file if line.startswith("RssAnon"))])
        child.stdin.write("\n")
    final, parameters = map(int, line.split())  # all in KiB
    largest = 1024 * 8192 * 2 // 1024
    assert max(peak, final) - final < largest + 64 * 1024
    # what the process keeps is the model (but for 8 MB that may lie in the file), and what transformers imports late
    assert 0.9 * parameters < final - before + 1024 * 8 < parameters + 32 * 1024


# ---- training and the way back ----


def test_the_trainer_accepts_the_model_with_adapters_and_only_with_them(saved):
    peft = pytest.importorskip("peft")
    model = load(saved(), NF4Config())
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(model)
    validate_quantization_for_training(peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")))
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_serializable()


@pytest.mark.parametrize("dtype", [None, "float32", torch.bfloat16])
def test_dequantize_gives_plain_layers_with_the_weights_that_were_computed_with(saved, dtype):
    folder = saved()
    model = load(saved(load(folder, NF4Config())))
    weights = {name: layer.dequantize(torch.float32) for name, layer in packed_layers(model).items()}
    expected = logits(model)
    plain = model.dequantize(dtype)
    want = torch.float32 if dtype == "float32" else torch.bfloat16
    for name, weight in weights.items():
        layer = plain.get_submodule(name)
        assert type(layer) is torch.nn.Linear
        assert_same_bits(layer.weight, weight.to(want))
    assert not packed_layers(plain)
    assert not hasattr(plain, "hf_quantizer")
    if want == torch.bfloat16:
        # the same weights in the same dtype, but other kernels: one or two roundings of a bfloat16 logit
        torch.testing.assert_close(logits(plain), expected, rtol=2**-6, atol=2**-6)
        again = AutoModelForCausalLM.from_pretrained(saved(plain))
        assert_same_bits(logits(again), logits(plain))
        assert not hasattr(AutoConfig.from_pretrained(again.config.name_or_path), "quantization_config")


def test_the_quantizer_keeps_no_dtype_that_no_layer_can_be_packed_from(saved):
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16, got torch\.float64"):
        load(saved(), NF4Config(), dtype=torch.float64)


def test_the_default_device_is_the_gpu_where_there_is_one():
    device_map = NF4Quantizer(NF4Config()).update_device_map(None)
    assert device_map == {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    assert NF4Quantizer(NF4Config()).update_device_map({"": "cpu"}) == {"": "cpu"}
