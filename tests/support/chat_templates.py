"""Small chat templates, each with the habits of a family of models: what it announces, trims, drops and refuses."""

from __future__ import annotations

from support.models import tiny_tokenizer

SPECIALS = [
    "<|head|>", "<|tail|>", "<|A|>", "<|U|>", "<|T|>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>",
    "<|end|>", "<s>", "<turn>", "</turn>", "<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>",
    "<|sep|>", "[CALLS]", "[RESULT]", "[/RESULT]",
]  # fmt: skip

CHATML_TOOLS = (  # Qwen 2.5, Hermes: tools in the system turn, calls as JSON between tags, results in a user turn
    "{%- if tools %}{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'Help.') }}"
    "{{ '\n# Tools' }}{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function if c.function is defined else c %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + f.name + '\", \"arguments\": ' + (f.arguments | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # as above; reasoning stays only behind the last question, and the last turn announces it
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' and not "
    "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% for t in tools %}{{ (t | tojson) + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% set text = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content %}"
    "{% if m.reasoning_content is string %}{% set why = m.reasoning_content %}{% elif '</think>' in m.content %}"
    "{% set why = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% else %}{% set why = '' %}"
    "{% endif %}{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last and "
    "(loop.last or why) %}{{ '<think>\n' + why + '\n</think>\n\n' }}{% endif %}{{ text }}"
    '{% for c in m.tool_calls or [] %}{{ \'\n<tool_call>{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
    "{{ '}</tool_call>' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA3 = (  # trims, writes results of tools as JSON, allows one call a turn
    "{{ '<s>' }}{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('only one tool call at a time') }}{% endif %}{% set f = m.tool_calls[0].function %}"
    '{{ \'<|head|>assistant<|tail|>\n\n{"name": "\' + f.name + \'", "parameters": \' + (f.arguments | tojson) }}'
    "{{ '}<|im_end|>' }}{% elif m.role == 'tool' %}"
    "{{ '<|head|>ipython<|tail|>\n\n' + (m.content | tojson) + '<|im_end|>' }}{% else %}"
    "{{ '<|head|>' + m.role + '<|tail|>\n\n' + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
MISTRAL = (  # nothing announces an answer; the end of text closes it; roles alternate; the system goes into a user turn
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(n=0) %}{% for m in rest %}{% if m.role == 'user' or (m.role == 'assistant' and not "
    "m.tool_calls) %}{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% set ns.n = ns.n + 1 %}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}{% elif m.role == 'tool' %}"
    "{{ '[RESULT]' + ({'content': m.content} | tojson) + '[/RESULT]' }}{% elif m.tool_calls %}{{ '[CALLS][' }}"
    "{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}{% else %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # the assistant is called model, the system goes into the first user turn
    "{{ '<s>' }}{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (s if loop.first else '') }}"
    "{{ m.content | trim + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
PHI3 = (  # without a generation prompt, the end of text
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|sep|>' }}{% endif %}"
)
R1 = (  # reasoning is cut from every answer, the prompt opens a thought, arguments must be a string
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'tool' %}"
    "{{ '<|T|>' + m.content }}{% elif m.tool_calls %}{{ '<|A|>' }}{% for c in m.tool_calls %}"
    "{{ c.type + ':' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% elif m.role == 'assistant' %}{{ '<|A|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% else %}{{ '<|U|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|A|><think>\n' }}{% endif %}"
)
SMOLLM3 = (  # says in the system turn whether it thinks
    "{% set think = enable_thinking if enable_thinking is defined else true %}{{ '<|im_start|>system\nReasoning: ' + "
    "('on' if think else 'off') + '\n' + (messages[0].content if messages[0].role == 'system' else '') }}"
    "{{ '<|im_end|>\n' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + ('' if think else '<think>\n\n</think>\n') + m.content.lstrip('\n') }}"
    "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GPT_OSS = (  # channels; reasoning under the name thinking, of the last answer only; a call ends with its own token
    "{{ '<|start|>system<|message|>Channels: analysis, final.<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}{% if m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}"
    "{{ (f.arguments | tojson) + '<|call|>' }}{% elif loop.last and not add_generation_prompt %}{% if m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>' }}"
    "{{ (m.content | tojson) + '<|end|>' }}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GLM = (  # the next speaker's token ends a turn; arguments must be an object
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}{% else %}"
    "{{ '<|' + m.role + '|>\n' + m.content }}{% for c in m.tool_calls or [] %}{{ '\n<call>' + c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ '\n<key>' + k + '</key><value>' + (v | string) + '</value>' }}"
    "{% endfor %}{{ '</call>' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = (  # no special token at all
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALKING = {
    "chatml": None, "chatml tools": CHATML_TOOLS, "qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA,
    "phi3": PHI3, "phi4": PHI4, "r1": R1, "smollm3": SMOLLM3, "gpt-oss": GPT_OSS, "glm": GLM, "plain": PLAIN,
}  # fmt: skip
CALLING = ("chatml tools", "qwen3", "llama3", "mistral", "r1", "gpt-oss", "glm")
TEMPLATES = {name: template or tiny_tokenizer().chat_template for name, template in TALKING.items()}


def tokenizer_with(template: str):
    """A tokenizer with the template, to which the special tokens of all of them are special."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = template
    return tokenizer
