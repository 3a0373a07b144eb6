"""Which tokens are trained: the answers with their end tokens, whatever the chat template looks like."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4lora.train.chat.masking import IGNORED, Encoder
from nf4lora.train.chat.template import install_chat_template
from nf4lora.train.chat.turns import MaskError
from nf4lora.train.errors import RunError
from nf4lora.train.samples.formats import Sample

from support.models import tiny_tokenizer

ONE = [{"role": "user", "content": "Hi there?"}, {"role": "assistant", "content": "Hello."}]
TWO = [
    {"role": "system", "content": "Be short."},
    *ONE,
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "Bye bye."},
]
THOUGHT = [*TWO[:2], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}, *TWO[3:]]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
TOOLS = [ONE[0], CALL, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}]

LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|head|>' + m.role + '<|tail|>\n\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
MISTRAL = (  # nothing announces an answer; the end of text closes it; roles must alternate
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}"
    "{% endfor %}"
)
QWEN3 = (  # reasoning of earlier turns is dropped, and the last turn announces it
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last and loop.last %}"
    "{{ '<think>\n' + m.content.split('</think>')[0].replace('<think>', '').strip() + '\n</think>\n\n' "
    "if '</think>' in m.content else '<think>\n\n</think>\n\n' }}{% endif %}{{ text }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<call>' + c.function.name + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (  # the generation prompt opens a thought that the finished conversation does not show
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|A|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% else %}{{ '<|U|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|A|><think>\n' }}{% endif %}"
)
GLM = (  # the next speaker's token ends a turn
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (  # without a generation prompt, the end of text
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
PLAIN = (  # no special token at all
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIALS = ["<|head|>", "<|tail|>", "<|A|>", "<|U|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<s>"]


def encoder(template=None, answers_only=True, **options):
    tokenizer = tiny_tokenizer(**options)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = template or tokenizer.chat_template
    return Encoder(tokenizer, answers_only)


def trained(encode, sample):
    """The trained pieces, as text."""
    ids, labels = encode(sample)
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    pieces, before = [], False
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORED:
            if not before:
                pieces.append([])
            pieces[-1].append(token)
        before = label != IGNORED
    return [encode.tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (None, ONE, ["Hello.<|im_end|>"]),
        (None, TWO, ["Hello.<|im_end|>", "Bye bye.<|im_end|>"]),
        (LLAMA3, TWO, ["Hello.<|im_end|>", "Bye bye.<|im_end|>"]),
        (LLAMA3, [ONE[0], {"role": "assistant", "content": "  padded \n"}], ["padded<|im_end|>"]),
        (MISTRAL, TWO[1:], [" Hello.<|im_end|>", " Bye bye.<|im_end|>"]),
        (QWEN3, ONE, ["<think>\n\n</think>\n\nHello.<|im_end|>"]),
        (QWEN3, TWO, ["Hello.<|im_end|>", "<think>\n\n</think>\n\nBye bye.<|im_end|>"]),
        (QWEN3, THOUGHT, ["Hello.<|im_end|>", "<think>\n\n</think>\n\nBye bye.<|im_end|>"]),
        (QWEN3, THOUGHT[:3], ["<think>\nhm\n</think>\n\nHello.<|im_end|>"]),
        (QWEN3, TOOLS, ["\n<call>add</call><|im_end|>", "<think>\n\n</think>\n\nIt is 3.<|im_end|>"]),
        (R1, TWO, ["Hello.<|im_end|>", "Bye bye.<|im_end|>"]),
        (GLM, TWO, ["Hello.<|user|>", "Bye bye.<|im_end|>"]),
        (PHI3, TWO, ["Hello.<|end|>", "Bye bye.<|end|>\n<|im_end|>"]),
        (PLAIN, TWO, ["Hello.\n\n", "Bye bye.\n\n<|im_end|>"]),
        (None, [*ONE, ONE[0]], ["Hello.<|im_end|>"]),
        (None, [{"role": "assistant", "content": "Me first."}, *ONE], ["Me first.<|im_end|>", "Hello.<|im_end|>"]),
        (None, [ONE[0], {"role": "assistant", "content": ""}], ["<|im_end|>"]),
        (None, [ONE[0], {"role": "assistant", "content": "Hi there?"}], ["Hi there?<|im_end|>"]),
        (None, ONE[:1], []),
    ],
)
def test_answers_and_their_end_tokens_are_trained(template, messages, expected):
    assert trained(encoder(template), Sample(messages=messages)) == expected


def test_tokens_are_those_of_the_rendered_conversation():
    encode = encoder()
    ids, _ = encode(Sample(messages=TWO))
    assert ids == list(encode.tokenizer.apply_chat_template(TWO, tokenize=True, return_dict=True)["input_ids"])


def test_generation_tags_change_nothing():
    assert encoder()(Sample(messages=TWO)) == encoder(generation_tags=True)(Sample(messages=TWO))


def test_generation_tags_help_where_the_answer_cannot_be_found():
    shout = tiny_tokenizer(generation_tags=True).chat_template.replace(
        "message['content']", "message['content'] | upper"
    )
    assert trained(encoder(shout), Sample(messages=TWO)) == ["HELLO.<|im_end|>", "BYE BYE.<|im_end|>"]
    with pytest.raises(MaskError, match=r"message 2 \(assistant\) cannot be found"):
        encoder(LLAMA3.replace("trim", "upper"))(Sample(messages=TWO))


def test_answer_that_the_template_drops_is_an_error():
    with pytest.raises(MaskError, match=r"message 1 \(assistant\)"):  # ChatML without tools drops the call
        encoder()(Sample(messages=TOOLS))


def test_word_of_a_tool_inside_an_answer_is_an_error():
    merged = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'U:' + m.content + 'A:' }}{% elif m.tool_calls %}"
        "{{ m.tool_calls[0].function.name + messages[loop.index0 + 1].content + m.content + '<|im_end|>' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(MaskError, match=r"message 2 \(tool\)"):
        encoder(merged)(Sample(messages=TOOLS))


def test_conversation_that_the_template_refuses_is_an_error():
    with pytest.raises(MaskError, match=r"refuses this conversation .*alternate"):
        encoder(MISTRAL)(Sample(messages=TWO))


def test_answers_of_the_prompt_are_not_trained():
    assert trained(encoder(), Sample(messages=TWO, trained_from=4)) == ["Bye bye.<|im_end|>"]


def test_all_tokens_are_trained_if_asked():
    ids, labels = encoder(answers_only=False)(Sample(messages=TWO))
    assert labels == ids


def test_completion_is_trained_and_ended_prompt_is_not():
    assert trained(encoder(), Sample(prompt="one ", text="two")) == ["two<|im_end|>"]
    assert trained(encoder(), Sample(prompt="one ", text="two<|im_end|>")) == ["two<|im_end|>"]


def test_text_is_trained_from_its_start_and_ended():
    assert trained(encoder(), Sample(text="one two")) == ["one two<|im_end|>"]


def test_token_across_the_start_of_an_answer():
    # Metaspace joins the blank before a word to the word: the token of the answer's first word starts in the prompt.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁ask", "▁ASSISTANT:", "▁hello", "▁you"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    ids, labels = Encoder(fast, True)(Sample(prompt="ask ASSISTANT: ", text="hello you"))
    assert ids == [2, 3, 4, 5, 1]
    assert labels == [IGNORED, IGNORED, 4, 5, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab \n<é🙂", max_size=8), min_size=1, max_size=5), st.booleans())
def test_trained_text_is_exactly_the_answers(contents, with_system):
    messages = [{"role": "system", "content": "s"}] if with_system else []
    for index, content in enumerate(contents):
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert "".join(trained(encoder(), Sample(messages=messages))) == "".join(f"{text}<|im_end|>" for text in answers)


@pytest.mark.parametrize("family", ["llama3", "cohere", "cohere2", "gemma", "gemma3", "phi3", "qwen3_instruct_2507"])
@pytest.mark.parametrize("messages", [ONE, TWO[1:], THOUGHT[1:]], ids=["one", "two", "thought"])
def test_real_templates_agree_with_the_tags_that_people_put_into_them(family, messages):
    # TRL ships templates of model families, and copies of them with {% generation %} tags set by hand.
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    plain, tagged = folder / f"{family}.jinja", folder / f"{family}_training.jinja"
    if not plain.exists() or not tagged.exists():
        pytest.skip(f"this TRL has no template for {family}")
    tokenizer = tiny_tokenizer()
    ends = ["<|eot_id|>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    tokenizer.chat_template = plain.read_text()
    ours = trained(Encoder(tokenizer, True), Sample(messages=messages))
    marked = tokenizer.apply_chat_template(
        messages, chat_template=tagged.read_text(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    theirs = [token for token, bit in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if bit]
    # some of their tags take in the line break behind the end token, which no model has to write
    assert "".join("".join(ours).split()) == "".join(tokenizer.decode(theirs).split())


def test_default_template_is_chatml_with_the_tokenizers_own_end():
    tokenizer = tiny_tokenizer()
    chatml, tokenizer.chat_template = tokenizer.chat_template, None
    note = install_chat_template(tokenizer)
    assert "ChatML was installed" in note
    ours = tokenizer.apply_chat_template(TWO, tokenize=False, add_generation_prompt=True)
    assert ours == tokenizer.apply_chat_template(TWO, chat_template=chatml, tokenize=False, add_generation_prompt=True)
    assert install_chat_template(tokenizer) == ""
    assert trained(Encoder(tokenizer, True), Sample(messages=TWO)) == ["Hello.<|im_end|>", "Bye bye.<|im_end|>"]
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    install_chat_template(tokenizer)
    assert trained(Encoder(tokenizer, True), Sample(messages=ONE)) == ["Hello.<|endoftext|>"]


def test_tokenizer_without_an_end_token_cannot_get_a_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(RunError, match="neither a chat template nor an end token"):
        install_chat_template(tokenizer)
