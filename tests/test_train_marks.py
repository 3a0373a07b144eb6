"""Long conversations: answers found by what the template writes around them are those found turn by turn."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4lora.train.chat import turns
from nf4lora.train.chat.marks import places
from nf4lora.train.chat.masking import Encoder
from nf4lora.train.chat.turns import MaskError
from nf4lora.train.samples.formats import Sample, sample_of

from support.chat_templates import CALLING, TEMPLATES, tokenizer_with
from support.models import tiny_tokenizer


def encoder(name):
    return Encoder(tokenizer_with(TEMPLATES[name]), True)


def outcome(encode, sample, few):
    """Tokens and labels with at most `few` answers looked for by rendering alone; or the complaint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "FEW", few)
        try:
            return encode(sample)
        except MaskError as error:
            return str(error)


def same_either_way(encode, messages, tools=None):
    sample = sample_of({"messages": messages, "tools": tools}, "messages")
    shortcut, by_rendering = (outcome(encode, sample, few) for few in (0, 1 << 30))
    assert shortcut == by_rendering
    return shortcut


def calling(rounds, reasoning=""):
    """A question, and so many calls of a tool before the answer."""
    messages = [{"role": "user", "content": "Add them up."}]
    for index in range(rounds):
        call = {"function": {"name": ("add", "sub")[index % 2], "arguments": {"a": index, "b": f"n{index}"}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        if reasoning:
            messages[-1]["reasoning_content"] = f"{reasoning} {index}"
        messages.append({"role": "tool", "content": f'{{"sum": "{index} is it"}}'})
    return [*messages, {"role": "assistant", "content": "Done."}]


def talk(rounds, system=True):
    messages = [{"role": "system", "content": "Be short."}] if system else []
    for index in range(rounds):
        messages += [
            {"role": "user", "content": f"Question {index}?"},
            {"role": "assistant", "content": f"No. {index}"},
        ]
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
def test_long_talk_has_the_same_mask_either_way(name, system):
    found = same_either_way(encoder(name), talk(6, system))
    assert not isinstance(found, str)


@pytest.mark.parametrize("name", CALLING)
@pytest.mark.parametrize("reasoning", ["", "So I need"], ids=["plain", "reasoning"])
def test_long_row_of_calls_has_the_same_mask_either_way(name, reasoning):
    found = same_either_way(encoder(name), calling(7, reasoning))
    assert not isinstance(found, str)


# No bare "<", with which the marks of some templates begin: rendering alone cannot tell where such an answer begins.
words = st.text("ab \n{\"'é🙂", max_size=6) | st.sampled_from(
    ["<think>\nhm\n</think>\n\nyes", "assistant", " x\n", "<tool_response>x</tool_response>", '{"a": 1}']
)
said = words.filter(str.strip)  # an empty answer is refused
turn = st.one_of(
    st.builds(lambda text: {"role": "user", "content": text}, words),
    st.builds(lambda text: {"role": "assistant", "content": text}, said),
    st.builds(lambda text: {"role": "tool", "content": text}, words),
    st.builds(
        lambda text, value: {
            "role": "assistant",
            "content": text,
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": value}}}],
        },
        words,
        words,
    ),
    st.builds(lambda text, why: {"role": "assistant", "content": text, "reasoning_content": why}, words, said),
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(turn, min_size=1, max_size=10))
def test_any_conversation_has_the_same_mask_either_way(name, messages):
    same_either_way(encoder(name), messages)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(words, said), min_size=4, max_size=8))
def test_alternating_conversation_has_the_same_mask_either_way(name, pairs):
    messages = []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    same_either_way(encoder(name), messages)


def real_templates():
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    names = ("cohere2", "deepseekv3", "gemma3", "glm4moe", "gptoss", "lfm2", "llama3_2", "phi3_5", "qwen2_5", "qwen3_6")
    return [path for name in names if (path := folder / f"{name}.jinja").exists()]


def test_real_templates_have_the_same_mask_either_way():
    # TRL ships the templates of many families of models.
    found, paths = 0, real_templates()
    for path in paths:
        tokenizer = tiny_tokenizer()
        ends = ["<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<|end|>", "<|call|>", "<turn|>", "<|return|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": ends})
        tokenizer.chat_template = path.read_text()
        encode = Encoder(tokenizer, True)
        for messages in (talk(5), calling(5), calling(5, "I see")):
            found += not isinstance(same_either_way(encode, messages), str)
    assert found >= len(paths)  # all talk; some refuse the role tool, or show no calls


@pytest.mark.parametrize("name", CALLING)
def test_renderings_do_not_grow_with_the_conversation(name):
    encode, counts = encoder(name), []
    original = type(encode.tokenizer).apply_chat_template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(encode.tokenizer), "apply_chat_template", lambda *a, **k: rendered.append(1) or original(*a, **k)
        )
        for rounds in (20, 60):
            rendered = []
            encode(sample_of({"messages": calling(rounds)}, "messages"))
            counts.append(len(rendered))
    assert counts[0] == counts[1] <= 40


def test_places_are_where_the_words_stand():
    tokenizer = tokenizer_with(TEMPLATES["llama3"])

    def render(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False)

    messages = [*talk(2), {"role": "tool", "content": 'a "quoted" word'}]
    whole = render(messages)
    found = [whole[place.start : place.end] for place in places(messages, render, whole)]
    assert found == [*(each["content"] for each in messages[:-1]), r"a \"quoted\" word"]


def test_template_that_minds_the_marks_gives_no_places():
    def render(messages):
        return "".join(f"{len(each['content'])} {each['content']};" for each in messages)

    messages = talk(2)
    assert places(messages, render, render(messages)) == [None] * len(messages)


def test_text_that_a_template_writes_twice_has_no_place():
    def render(messages):
        return "".join(each["content"] + "|" for each in [*messages, messages[0]])

    messages = talk(1)
    assert [place is None for place in places(messages, render, render(messages))] == [True, False, False]


def test_sample_without_answers_is_not_searched():
    assert encoder("chatml")(Sample(messages=[{"role": "user", "content": "x"}] * 9))[1].count(-100) > 9
