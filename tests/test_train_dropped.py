"""What a template leaves out is counted and said; what it refuses gets advice that is true."""

import json

import pytest

from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.chat.dropped import left_out
from nf4lora.train.chat.masking import IGNORED, Encoder
from nf4lora.train.data import prepare_data, read
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.samples.formats import Sample

from support.chat_templates import TEMPLATES, tokenizer_with
from support.models import tiny_tokenizer

ASK = {"role": "user", "content": "Why?"}
THOUGHT = {"role": "assistant", "content": "<think>\nIt rained.\n</think>\n\nBecause."}
KEYED = {"role": "assistant", "content": "Because.", "reasoning_content": "It rained."}
PLAIN = {"role": "assistant", "content": "Because."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"where": "there"}}}],
}
TOOL = {"type": "function", "function": {"name": "f", "description": "Looks."}}


def prepared(folder, rows, template, *arguments):
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse_arguments(["--model", "m", "--data", str(path), *arguments])
    train, held_out, _ = read(config)
    tokenizer = tokenizer_with(template) if isinstance(template, str) else template
    return prepare_data(config, tokenizer, (train, held_out), [])


@pytest.mark.parametrize(
    ("template", "row", "what"),
    [
        ("qwen3", {"messages": [ASK, THOUGHT, ASK, PLAIN]}, "the reasoning of earlier answers"),
        ("r1", {"messages": [ASK, THOUGHT, ASK, PLAIN]}, "the reasoning of earlier answers"),
        ("chatml", {"messages": [ASK, KEYED]}, "the reasoning of the last answer"),
        ("phi4", {"messages": [ASK, KEYED, ASK, PLAIN]}, "the reasoning of earlier answers"),
        ("phi4", {"messages": [ASK, PLAIN], "tools": [TOOL]}, "the tools"),
        ("smollm3", {"messages": [ASK, {"role": "system", "content": "Be kind."}, ASK, PLAIN]}, "system messages"),
    ],
)
def test_what_the_template_leaves_out_is_counted_and_said(tmp_path, template, row, what):
    rows = [{"messages": [ASK, PLAIN]}, row]
    notes = [note for note in prepared(tmp_path, rows, TEMPLATES[template]).notes if "leaves out" in note]
    assert notes == [f"the chat template leaves out {what} in 1 of 2 rows (first: {tmp_path / 'd.jsonl'}: line 2)"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_nothing_is_said_where_nothing_is_left_out(tmp_path, template):
    rows = [{"messages": [{"role": "system", "content": " Be\n kind. "}, ASK, PLAIN, ASK, {**PLAIN, "content": " x "}]}]
    assert not [note for note in prepared(tmp_path, rows, TEMPLATES[template]).notes if "leaves out" in note]


def test_words_are_found_as_json_writes_them_and_with_other_white_space_or_case():
    messages = [{"role": "tool", "content": 'a "b"\n c'}, {"role": "user", "content": "x  y"}]
    assert left_out(messages, r'{"content": "a \"b\"\n c"} X Y') == []
    assert left_out(messages, "x y") == ["results of tools"]


@pytest.mark.parametrize("answers_only", ["auto", "false"])
def test_last_answer_must_keep_its_reasoning(tmp_path, answers_only):
    with pytest.raises(RunError, match=r"line 1: message 1 \(assistant\), the last answer, loses its reasoning"):
        prepared(tmp_path, [{"messages": [ASK, THOUGHT]}], TEMPLATES["r1"], "--assistant_only_loss", answers_only)


@pytest.mark.parametrize("answers_only", ["auto", "false"])
def test_last_answer_must_keep_its_words_and_calls(tmp_path, answers_only):
    mute = "{% for m in messages %}{{ '<|U|>' + m.content if m.role == 'user' else '<|A|><|im_end|>' }}{% endfor %}"
    for answer, lost in ((PLAIN, "words"), (CALL, "tool calls")):
        with pytest.raises(RunError, match=f"loses its {lost}") as error:
            prepared(tmp_path, [{"messages": [ASK, answer]}], mute, "--assistant_only_loss", answers_only)
        assert "assistant_only_loss false" not in str(error.value)


def test_template_that_keeps_the_reasoning_can_be_named(tmp_path):
    template = tmp_path / "r1.jinja"
    template.write_text(TEMPLATES["r1"].replace(".split('</think>')[-1]", ""))
    data = prepared(tmp_path, [{"messages": [ASK, THOUGHT]}], TEMPLATES["r1"], "--chat_template", str(template))
    assert "It rained." in tiny_tokenizer().decode(data.train.input_ids[0].tolist())
    assert any("the chat template is that of" in note for note in data.notes)


def test_advice_is_given_only_where_it_helps(tmp_path):
    shout = TEMPLATES["chatml"].replace("message['content']", "message['content'] | upper")
    with pytest.raises(RunError, match="generation.*or --assistant_only_loss false, gets around this"):
        prepared(tmp_path, [{"messages": [ASK, PLAIN]}], shout)
    prepared(tmp_path, [{"messages": [ASK, PLAIN]}], shout, "--assistant_only_loss", "false")
    with pytest.raises(RunError, match="refuses this conversation .*roles must alternate") as error:
        prepared(tmp_path, [{"messages": [ASK, ASK, PLAIN]}], TEMPLATES["mistral"])
    assert "gets around" not in str(error.value)
    with pytest.raises(RunError, match=r"cannot be found.*; --assistant_only_loss false gets") as error:
        prepared(tmp_path, [{"prompt": [ASK], "completion": [PLAIN]}], shout)
    assert "generation" not in str(error.value)
    with pytest.raises(RunError, match="cannot be found") as error:
        prepared(tmp_path, [{"messages": [ASK, {**PLAIN, "weight": 0}, ASK, PLAIN]}], shout)
    assert "gets around" not in str(error.value)


@pytest.mark.parametrize(
    "error", ["{{ 1 / 0 }}", "{{ messages[9].content.x.y }}", "{{ raise_exception('no') }}", "{{ a(b) }}"]
)
def test_template_may_fail_in_any_way(tmp_path, error):
    with pytest.raises(RunError, match="line 1: the chat template refuses this conversation"):
        prepared(tmp_path, [{"messages": [ASK, PLAIN]}], error)


def starting(tokenizer):
    """The tokenizer with a start token that it adds by itself, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    return tokenizer


def test_text_that_was_rendered_already_gets_one_start_token(tmp_path):
    rows = [{"text": "<|endoftext|>abc"}, {"text": "abc"}]
    data = prepared(tmp_path, rows, starting(tiny_tokenizer()))
    assert data.train.input_ids[0].tolist() == data.train.input_ids[1].tolist() == [256, *b"abc", 258]
    assert any("one of them was taken in 1 of 2 rows" in note for note in data.notes)
    row = {"prompt": "<|endoftext|><|im_start|>q", "completion": "a<|im_end|>"}
    data = prepared(tmp_path, [row], starting(tiny_tokenizer()))
    assert data.train.input_ids[0].tolist() == [256, 257, *b"qa", 258]
    assert data.train.labels[0].tolist() == [IGNORED] * 3 + [*b"a", 258]


def test_text_that_was_rendered_already_gets_one_end_token():
    encode = Encoder(tiny_tokenizer(), True)
    ids, labels = encode(Sample(prompt="q", text="a<|im_end|>\n"))
    assert ids == [*b"qa", 258, *b"\n"]
    assert labels == [IGNORED, *b"a", 258, IGNORED]  # the line break is the template's


@pytest.mark.parametrize(
    ("wanted", "template", "words"),
    [
        ("qwen3_nothink", "chatml", "the tokenizer's own template, which writes the same turns"),
        ("chatml", "chatml", ""),
        ("chatml", "plain", "takes the place"),
        ("tokenizer_default", "plain", ""),
        ("default", "plain", ""),
        ("{{ messages[0].content }}{{ messages[1].content }}", "plain", "written in the options"),
    ],
)
def test_named_chat_template_is_used_or_held_against_the_tokenizers(tmp_path, wanted, template, words):
    notes = prepared(tmp_path, [{"messages": [ASK, PLAIN]}], TEMPLATES[template], "--template", wanted).notes
    assert words in "".join(notes)
    assert bool(notes) == bool(words)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("llama3", r"whose chat template writes no <\|start_header_id\|>"),
        ("something", "must be chatml, a .jinja file"),
        ("nowhere.jinja", "cannot be read"),
    ],
)
def test_chat_template_that_does_not_fit_is_refused(tmp_path, wanted, words):
    with pytest.raises(UsageError, match=words):
        prepared(tmp_path, [{"messages": [ASK, PLAIN]}], TEMPLATES["chatml"], "--chat_template", wanted)


def test_special_tokens_are_held_against_the_tokenizers(tmp_path):
    path = tmp_path / "c.yaml"
    rows = [{"messages": [ASK, PLAIN]}]
    for text, words in (
        ("special_tokens: {pad_token: <pad>, eos_token: <|im_end|>}", ""),
        ("eot_tokens: [<|im_end|>]", ""),
        ("special_tokens: {eos_token: </s>}", "eos_token must be the tokenizer's own, '<|im_end|>', got '</s>'"),
        ("eot_tokens: [</s>]", "must be single tokens"),
    ):
        path.write_text(text.replace("<|im_end|>", '"<|im_end|>"'))
        if words:
            with pytest.raises(UsageError, match=words.replace("|", r"\|")):
                prepared(tmp_path, rows, TEMPLATES["chatml"], str(path))
        else:
            prepared(tmp_path, rows, TEMPLATES["chatml"], str(path))
