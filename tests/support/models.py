"""Tiny models and a tokenizer, made on the spot: no test downloads anything."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{OPEN}{{ message['content'] + '<|im_end|>' }}{CLOSE}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_llama(
    *,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = 259,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: object,
) -> LlamaForCausalLM:
    """A random Llama of about 0.3 M parameters with the vocabulary of `tiny_tokenizer`; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_hidden_layers=num_hidden_layers,
                num_attention_heads=num_attention_heads,
                num_key_value_heads=num_key_value_heads,
                vocab_size=vocab_size,
                tie_word_embeddings=tied,
                max_position_embeddings=512,
                bos_token_id=256,
                eos_token_id=258,
                pad_token_id=256,
                **config,
            )
        )
    return model.to(dtype).eval()


def tiny_tokenizer(*, generation_tags: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255) and three special ones: <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258.

    The chat template is ChatML, as SmolLM2's and Qwen2's are; with generation_tags it marks what the assistant says.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # ByteLevel writes a byte as a printable character: those of Latin-1 stand for themselves, the rest from 256 up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={symbol[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(specials)
    template = CHATML
    if generation_tags:
        # The role decides whether the content and the end of turn are generated; both branches print the same text.
        template = template.replace("{OPEN}", "{% if message['role'] == 'assistant' %}{% generation %}")
        body = "{{ message['content'] + '<|im_end|>' }}"
        template = template.replace("{CLOSE}", "{% endgeneration %}{% else %}" + body + "{% endif %}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template.replace("{OPEN}", "").replace("{CLOSE}", ""),
    )
