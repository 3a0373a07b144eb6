"""One tiny random model of each kind that transformers has: text, speech, images, several of them; with an input."""

from __future__ import annotations

import torch
import transformers

TEXT = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TEXT, **TOKENS, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
ENCODER = {**TEXT, "pad_token_id": 0, "max_position_embeddings": 64}
T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4, **TOKENS}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 99, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
BART |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **TOKENS}
BART |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
BART |= {"max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None}
IMAGE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGE |= {"image_size": 16, "patch_size": 8}
SPEECH = {**IMAGE, "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "vocab_size": 32}
SPEECH |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SPEECH |= {"pad_token_id": 0, "classifier_proj_size": 32, "apply_spec_augment": False, "layerdrop": 0.0}
MAMBA = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8, **TOKENS}

# class of the model: what its configuration differs in from the defaults
FAMILIES = {
    # decoders of text
    "LlamaForCausalLM": DECODER,
    "Qwen2ForCausalLM": DECODER,
    "Qwen3ForCausalLM": DECODER,
    "MistralForCausalLM": DECODER,
    "GemmaForCausalLM": DECODER,
    "Phi3ForCausalLM": DECODER,
    "OlmoForCausalLM": DECODER,
    "GPTNeoXForCausalLM": DECODER,
    "OPTForCausalLM": {**DECODER, "ffn_dim": 64, "word_embed_proj_dim": 64},
    "BloomForCausalLM": {"vocab_size": 99, "hidden_size": 64, "n_layer": 1, "n_head": 4, **TOKENS},
    # mixtures of experts, with a router that is a linear layer of its own kind
    "MixtralForCausalLM": {**DECODER, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**DECODER, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "PhimoeForCausalLM": {**DECODER, "num_local_experts": 4},
    "Llama4ForCausalLM": {**DECODER, "num_local_experts": 2, "intermediate_size_mlp": 64},
    # state spaces
    "MambaForCausalLM": MAMBA,
    "Mamba2ForCausalLM": {**MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "FalconH1ForCausalLM": {**DECODER, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "JambaForCausalLM": {**DECODER, "num_experts": 2, "num_hidden_layers": 2, "use_mamba_kernels": False}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"mamba_d_state": 8, "mamba_dt_rank": 32},
    # encoder-decoders of text
    "T5ForConditionalGeneration": T5,
    "LongT5ForConditionalGeneration": {**T5, "encoder_attention_type": "local", "local_radius": 8},
    "BartForConditionalGeneration": BART,
    "M2M100ForConditionalGeneration": BART,
    # text without words as output
    "BertModel": ENCODER,
    "BertForMaskedLM": ENCODER,
    "BertForSequenceClassification": ENCODER,
    "BertForTokenClassification": ENCODER,
    "BertForQuestionAnswering": ENCODER,
    "BertForMultipleChoice": ENCODER,
    "RobertaForSequenceClassification": ENCODER,
    "DistilBertForSequenceClassification": {"vocab_size": 99, "dim": 64, "hidden_dim": 64, "n_layers": 1, "n_heads": 4},
    "DebertaV2ForSequenceClassification": {**ENCODER, "pooler_hidden_size": 64},
    "ElectraForSequenceClassification": {**ENCODER, "embedding_size": 64},
    "EsmForSequenceClassification": {**ENCODER, "mask_token_id": 4},
    "ModernBertForSequenceClassification": ENCODER,
    "LlamaForSequenceClassification": DECODER,
    "Qwen2ForTokenClassification": DECODER,
    "T5EncoderModel": T5,
    "AlbertForSequenceClassification": {**ENCODER, "embedding_size": 32},
    # images and speech
    "ViTForImageClassification": IMAGE,
    "Dinov2ForImageClassification": IMAGE,
    "Wav2Vec2ForCTC": SPEECH,
    "Wav2Vec2ForSequenceClassification": SPEECH,
    "WhisperForConditionalGeneration": {**BART, "num_mel_bins": 8, "max_source_positions": 16}
    | {"max_target_positions": 64, "begin_suppress_tokens": None, "suppress_tokens": None},
    # several of them
    "CLIPModel": {"text_config": {**ENCODER, **TOKENS}, "vision_config": IMAGE, "projection_dim": 32},
    "LlavaForConditionalGeneration": {
        "text_config": {"model_type": "llama", **DECODER},
        "vision_config": {"model_type": "clip_vision_model", **IMAGE, "projection_dim": 32},
        "image_token_id": 98,
        "vision_feature_layer": -1,
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": {**DECODER, "sliding_window": 16},
        "vision_config": {**IMAGE, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_id": 98,
    },
    "Mistral3ForConditionalGeneration": {
        "text_config": {"model_type": "mistral", **DECODER},
        "vision_config": {"model_type": "pixtral", **IMAGE, "head_dim": 16},
        "image_token_id": 98,
        "vision_feature_layer": -1,
    },
    "Qwen2AudioForConditionalGeneration": {
        "text_config": {"model_type": "qwen2", **DECODER},
        "audio_config": {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
        | {"num_mel_bins": 8, "max_source_positions": 16},
        "audio_token_id": 98,
    },
    "Gemma4ForConditionalGeneration": {
        "text_config": {**DECODER, "sliding_window": 16, "global_head_dim": 16, "num_global_key_value_heads": 2}
        | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 0},
        "vision_config": {**IMAGE, "head_dim": 16, "global_head_dim": 16, "num_key_value_heads": 4},
        "audio_config": None,
        "image_token_id": 98,
        "video_token_id": 97,
        "audio_token_id": 96,
    },
}


def tiny(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The random model of this class, in eval mode; the same for the same seed."""
    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(cls.config_class(**FAMILIES[name])).eval()


def inputs(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the model's forward takes: text, where it reads text, else noise."""
    name, generator = type(model).__name__, torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (2, 8), generator=generator)
    if name == "CLIPModel":
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 800, generator=generator)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": ids}
    if name.endswith("MultipleChoice"):
        return {"input_ids": torch.stack([ids, ids.flip(0)], dim=1)}
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder and model.can_generate() else {}
    return {"input_ids": ids, **decoder}


def answer(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first floating-point tensor of the model's output, whatever it is called."""
    outputs = model(**batch).to_tuple()
    return next(tensor for tensor in outputs if isinstance(tensor, torch.Tensor) and tensor.is_floating_point())
