# ruff: noqa: RUF001 the bars of DeepSeek's special tokens are wide ones
"""Chat templates that do what those of published models do, in as few words as show it.

Each states anew what its family's template does that matters to what is trained: the marks, what it takes off, what it
leaves out of earlier turns, where the token that ends a turn stands. None is anybody's text.
"""

import dataclasses
import functools

from tokenizers import Tokenizer

from jaxmoe.chat.ends import EndTokens
from jaxmoe.chat.templates import ChatTemplate
from jaxmoe.data import train_byte_bpe


@dataclasses.dataclass(frozen=True)
class ChatFamily:
    """A template and the tokens that it is used with.

    Attributes:
        source: in Jinja.
        stops: at which generation stops, the one that ends documents first.
        special: further special tokens.
        bos: the token that begins a text.
        system: whether it takes a system turn.
        tools: whether it takes tools; in parallel, one call a turn, or none.
        reasoning: whether it writes reasoning of the last turn.
        shared: whether turns without reasoning share a sample.
    """

    source: str
    stops: tuple[str, ...]
    special: tuple[str, ...] = ()
    bos: str = "<s>"
    system: bool = True
    tools: str = "none"
    reasoning: bool = False
    shared: bool = True

    @property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.source, "a template", {"bos_token": self.bos, "eos_token": self.stops[0]})

    @property
    def ends(self) -> EndTokens:
        return EndTokens(self.stops, frozenset({*self.stops, *self.special, self.bos}), self.stops[0])


# Tags take the white space around them off, so what is written is what stands in quotes.
_THOUGHT = r"""
{%- macro thought(m) -%}
  {%- if m.reasoning_content -%}{{ '<think>\n' + m.reasoning_content|trim + '\n</think>\n\n' }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
"""
_JSON_CALLS = r"""
{%- macro calls(m) -%}
  {%- for c in m.tool_calls or [] -%}
    {{ '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments|tojson
       + '}\n</tool_call>' }}
  {%- endfor -%}
{%- endmacro -%}
"""
_XML_CALLS = r"""
{%- macro calls(m) -%}
  {%- for c in m.tool_calls or [] -%}
    {{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}
    {%- for k, v in c.function.arguments.items() -%}
      {{ '<parameter=' + k + '>\n' + v|string + '\n</parameter>\n' }}
    {%- endfor -%}
    {{ '</function>\n</tool_call>' }}
  {%- endfor -%}
{%- endmacro -%}
"""
_CHATML_TOOLS = r"""
{%- if tools -%}{{ '<|im_start|>system\n# Tools\n' + tools|tojson + '<|im_end|>\n' }}{%- endif -%}
"""

_QWEN3 = (
    _THOUGHT
    + _JSON_CALLS
    + _CHATML_TOOLS
    + r"""
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set content = m.content or '' -%}
    {%- set inline = '' -%}
    {%- if '</think>' in content -%}
      {%- set inline = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{ '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.user and (loop.last or m.reasoning_content or inline) -%}
      {{ '<think>\n' + (m.reasoning_content or inline)|trim + '\n</think>\n\n' }}
      {%- set content = content.lstrip('\n') -%}
    {%- endif -%}
    {{ content + calls(m) + '<|im_end|>\n' }}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
    {{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
  {%- else -%}
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}
"""
)

_QWEN35 = (
    _THOUGHT
    + _XML_CALLS
    + _CHATML_TOOLS
    + r"""
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{ '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.user -%}
      {{ '<think>\n' + (m.reasoning_content or '')|trim + '\n</think>\n\n' }}
    {%- endif -%}
    {{ (m.content or '')|trim + calls(m) + '<|im_end|>\n' }}
  {%- elif m.role == 'tool' -%}
    {{ '<|im_start|>user\n<tool_response>\n' + m.content|trim + '\n</tool_response><|im_end|>\n' }}
  {%- else -%}
    {{ '<|im_start|>' + m.role + '\n' + m.content|trim + '<|im_end|>\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\n<think>\n' }}
  {%- if enable_thinking is defined and not enable_thinking -%}{{ '\n</think>\n\n' }}{%- endif -%}
{%- endif -%}
"""
)

_GLM = (
    _THOUGHT
    + r"""
{{- '[gMASK]<sop>' -}}
{%- if tools -%}{{ '<|system|>\n# Tools\n' + tools|tojson }}{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{ '<|assistant|>\n' }}
    {%- if loop.index0 > ns.user and m.reasoning_content -%}
      {{ '<think>' + m.reasoning_content|trim + '</think>' }}
    {%- else -%}
      {{ '<think></think>' }}
    {%- endif -%}
    {%- if m.content and m.content|trim -%}{{ '\n' + m.content|trim }}{%- endif -%}
    {%- for c in m.tool_calls or [] -%}
      {{ '\n<tool_call>' + c.function.name + '\n' }}
      {%- for k, v in c.function.arguments.items() -%}
        {{ '<arg_key>' + k + '</arg_key>\n<arg_value>' + v|string + '</arg_value>\n' }}
      {%- endfor -%}
      {{ '</tool_call>' }}
    {%- endfor -%}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|observation|>' }}{%- endif -%}
    {{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
  {%- else -%}
    {{ '<|' + m.role + '|>\n' + m.content }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|assistant|>' + ('\n<think></think>' if enable_thinking is defined and not enable_thinking else '') }}
{%- endif -%}
"""
)

_GPT_OSS = (
    _THOUGHT
    + r"""
{{- '<|start|>system<|message|>You are a model.<|end|>' -}}
{%- if tools or messages[0].role == 'system' -%}
  {{ '<|start|>developer<|message|>' }}
  {%- if messages[0].role == 'system' -%}{{ '# Instructions\n\n' + messages[0].content }}{%- endif -%}
  {%- if tools -%}{{ '# Tools\n\n' + tools|tojson }}{%- endif -%}
  {{ '<|end|>' }}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and m.tool_calls -%}
    {%- set call = m.tool_calls[0].function -%}
    {%- if m.reasoning_content or m.content -%}
      {{ '<|start|>assistant<|channel|>analysis<|message|>' + (m.reasoning_content or m.content) + '<|end|>' }}
    {%- endif -%}
    {{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>'
       + call.arguments|tojson + '<|call|>' }}
  {%- elif m.role == 'assistant' -%}
    {%- if m.reasoning_content and loop.last -%}
      {{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}
    {%- endif -%}
    {{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
  {%- elif m.role == 'tool' -%}
    {{ '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' + m.content|tojson
       + '<|end|>' }}
  {%- elif m.role == 'user' -%}
    {{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}
"""
)

_MINIMAX = (
    _THOUGHT
    + r"""
{{- ']~!b[' -}}
{%- if tools or messages[0].role == 'system' -%}
  {{ ']~b]system\n' + (messages[0].content if messages[0].role == 'system' else 'You help.') }}
  {%- if tools -%}{{ '\n\n# Tools\n' + tools|tojson }}{%- endif -%}
  {{ '[e~[\n' }}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{ ']~b]ai\n' }}
    {%- if loop.index0 > ns.user -%}{{ thought(m) }}{%- endif -%}
    {{ m.content or '' }}
    {%- if m.tool_calls -%}
      {{ '\n<minimax:tool_call>\n' }}
      {%- for c in m.tool_calls -%}
        {{ '<invoke name="' + c.function.name + '">\n' }}
        {%- for k, v in c.function.arguments.items() -%}
          {{ '<parameter name="' + k + '">' + v|string + '</parameter>\n' }}
        {%- endfor -%}
        {{ '</invoke>\n' }}
      {%- endfor -%}
      {{ '</minimax:tool_call>' }}
    {%- endif -%}
    {{ '[e~[\n' }}
  {%- elif m.role == 'tool' -%}
    {{ ']~b]tool\n<response>' + m.content + '</response>[e~[\n' }}
  {%- elif m.role == 'user' -%}
    {{ ']~b]user\n' + m.content + '[e~[\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ']~b]ai\n<think>\n' }}{%- endif -%}
"""
)

_DEEPSEEK = r"""
{{- bos_token -}}
{%- for m in messages -%}{%- if m.role == 'system' -%}{{ m.content }}{%- endif -%}{%- endfor -%}
{%- if tools -%}{{ '\n## Tools\n' + tools|tojson }}{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{ '<｜User｜>' + m.content }}
  {%- elif m.role == 'assistant' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<｜Assistant｜>' }}{%- endif -%}
    {{ (m.content or '').split('</think>')[-1] }}
    {%- if m.tool_calls -%}
      {{ '<｜tool▁calls▁begin｜>' }}
      {%- for c in m.tool_calls -%}
        {{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + '\n' + c.function.arguments
           + '<｜tool▁call▁end｜>' }}
      {%- endfor -%}
      {{ '<｜tool▁calls▁end｜>' }}
    {%- endif -%}
    {{ eos_token }}
  {%- elif m.role == 'tool' -%}
    {{ '<｜tool▁outputs▁begin｜>' + m.content + '<｜tool▁outputs▁end｜>' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{ '<｜Assistant｜>' + THINK }}{%- endif -%}
"""
_DEEPSEEK_SPECIAL = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
)  # fmt: skip

_GEMMA4 = (
    _THOUGHT
    + r"""
{{- bos_token -}}
{%- if tools or messages[0].role == 'system' -%}
  {{ '<|turn>system\n' + (messages[0].content|trim if messages[0].role == 'system' else '') }}
  {%- if tools -%}{{ '<|tool>' + tools|tojson + '<tool|>' }}{%- endif -%}
  {{ '<turn|>\n' }}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{ '<|turn>user\n' + m.content|trim + '<turn|>\n' }}
  {%- elif m.role == 'tool' -%}
    {{ '<|tool_response>' + m.content + '<tool_response|>' }}
  {%- elif m.role == 'assistant' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|turn>model\n' }}{%- endif -%}
    {%- if m.reasoning_content and loop.index0 > ns.user -%}
      {{ '<|channel>thought\n' + m.reasoning_content + '\n<channel|>' }}
    {%- endif -%}
    {{ (m.content or '')|trim }}
    {%- for c in m.tool_calls or [] -%}
      {{ '<|tool_call>call:' + c.function.name + c.function.arguments|tojson + '<tool_call|>' }}
    {%- endfor -%}
    {%- if not m.tool_calls -%}{{ '<turn|>\n' }}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}
  {{ '<|turn>model\n' }}
  {%- if enable_thinking is defined and not enable_thinking -%}{{ '<|channel>thought\n<channel|>' }}{%- endif -%}
{%- endif -%}
"""
)

_KIMI = r"""
{%- if tools -%}{{ '<|im_system|>tool_declare<|im_middle|>' + tools|tojson + '<|im_end|>' }}{%- endif -%}
{%- for m in messages -%}
  {{ {'user': '<|im_user|>user', 'assistant': '<|im_assistant|>assistant'}.get(m.role, '<|im_system|>' + m.role)
     + '<|im_middle|>' + (m.content or '') }}
  {%- if m.tool_calls -%}
    {{ '<|tool_calls_section_begin|>' }}
    {%- for c in m.tool_calls -%}
      {{ '<|tool_call_begin|>functions.' + c.function.name + '<|tool_call_argument_begin|>'
         + c.function.arguments|tojson + '<|tool_call_end|>' }}
    {%- endfor -%}
    {{ '<|tool_calls_section_end|>' }}
  {%- endif -%}
  {{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}
"""

_GRANITE = r"""
{%- if messages[0].role != 'system' -%}
  {{ '<|start_of_role|>system<|end_of_role|>You are a model.' + (tools|tojson if tools else '')
     + '<|end_of_text|>\n' }}
{%- endif -%}
{%- for m in messages -%}
  {{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + (m.content or '') }}
  {%- if tools and loop.first and m.role == 'system' -%}{{ tools|tojson }}{%- endif -%}
  {%- for c in m.tool_calls or [] -%}
    {{ '<tool_call>{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments|tojson
       + '}</tool_call>' }}
  {%- endfor -%}
  {{ '<|end_of_text|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif -%}
"""

_NEMOTRON = (
    _THOUGHT
    + _XML_CALLS
    + _CHATML_TOOLS
    + r"""
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set kept = m.reasoning_content if loop.index0 > ns.user else '' -%}
    {{ '<|im_start|>assistant\n<think>' + ('\n' + kept|trim + '\n' if kept else '') + '</think>'
       + (m.content or '')|trim + calls(m) + '<|im_end|>\n' }}
  {%- elif m.role == 'tool' -%}
    {{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>\n<|im_end|>\n' }}
  {%- else -%}
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\n<think>'
     + ('</think>' if enable_thinking is defined and not enable_thinking else '\n') }}
{%- endif -%}
"""
)

_MARKED = (
    _CHATML_TOOLS
    + _JSON_CALLS
    + r"""
{%- for m in messages -%}
  {{ '<|im_start|>' + m.role + '\n' }}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}{{ (m.content or '') + calls(m) + '<|im_end|>' }}{{ '\n' }}{%- endgeneration -%}
  {%- else -%}
    {{ m.content + '<|im_end|>\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
)

_CHATML = ("<|im_start|>",)

FAMILIES: dict[str, ChatFamily] = {
    "mixtral": ChatFamily(
        r"""
{{- bos_token -}}
{%- for m in messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
  {{ ' [INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}
{%- endfor -%}
""",
        ("</s>",),
        system=False,
    ),
    "qwen3": ChatFamily(
        _QWEN3, ("<|im_end|>", "<|endoftext|>"), _CHATML, tools="parallel", reasoning=True, shared=False
    ),
    "qwen3_5": ChatFamily(
        _QWEN35, ("<|im_end|>", "<|endoftext|>"), _CHATML, tools="parallel", reasoning=True, shared=False
    ),
    "glm4_moe": ChatFamily(
        _GLM,
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
        tools="parallel",
        reasoning=True,
    ),
    "gpt_oss": ChatFamily(
        _GPT_OSS,
        ("<|return|>", "<|endoftext|>", "<|call|>"),
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
        tools="single",
        reasoning=True,
        shared=False,
    ),
    "minimax_m2": ChatFamily(
        _MINIMAX, ("[e~[",), ("]~!b[", "]~b]"), tools="parallel", reasoning=True
    ),
    "deepseek_v3": ChatFamily(
        _DEEPSEEK.replace("THINK", "''"),
        ("<｜end▁of▁sentence｜>",),
        _DEEPSEEK_SPECIAL,
        "<｜begin▁of▁sentence｜>",
        tools="parallel",
    ),
    "deepseek_r1": ChatFamily(
        _DEEPSEEK.replace("THINK", r"'<think>\n'"),
        ("<｜end▁of▁sentence｜>",),
        _DEEPSEEK_SPECIAL,
        "<｜begin▁of▁sentence｜>",
        tools="parallel",
    ),
    "gemma4": ChatFamily(
        _GEMMA4,
        ("<turn|>", "<eos>", "<|tool_response>"),
        ("<|turn>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<tool_response|>"),
        "<bos>",
        tools="parallel",
        reasoning=True,
    ),
    "olmoe": ChatFamily(
        r"""
{{- bos_token -}}
{%- for m in messages -%}
  {{ '<|' + m.role + '|>\n' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}
""",
        ("<|endoftext|>",),
        bos="<|endoftext|>",
    ),
    "ernie": ChatFamily(
        r"""
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{ 'Assistant: ' + m.content + eos_token }}
  {%- else -%}
    {{ ('User: ' if m.role == 'user' else '') + m.content + '\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}
""",
        ("<|end_of_sentence|>",),
        bos="<|begin_of_sentence|>",
    ),
    "hunyuan": ChatFamily(
        r"""
{{- bos_token -}}
{%- for m in messages -%}
  {{ m.content + {'system': '<|extra_4|>', 'user': '<|extra_0|>', 'assistant': eos_token + bos_token}[m.role] }}
{%- endfor -%}
""",
        ("<|eos|>",),
        ("<|extra_0|>", "<|extra_4|>"),
        "<|startoftext|>",
    ),
    "granite": ChatFamily(
        _GRANITE, ("<|end_of_text|>",), ("<|start_of_role|>", "<|end_of_role|>"), tools="parallel"
    ),
    "nemotron_3": ChatFamily(
        _NEMOTRON, ("<|im_end|>", "</s>"), _CHATML, tools="parallel", reasoning=True
    ),
    "kimi_k2": ChatFamily(
        _KIMI,
        ("<|im_end|>",),
        (
            "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>",
        ),
        tools="parallel",
    ),
    "phi3_5_moe": ChatFamily(
        r"""
{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ eos_token }}{%- endif -%}
""",
        ("<|endoftext|>", "<|end|>"),
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "marked": ChatFamily(_MARKED, ("<|im_end|>",), _CHATML, tools="parallel"),
}  # fmt: skip
"""By names like those of their configs; "marked" says with ``{% generation %}`` what is generated."""


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE that has the special tokens of all families, and tokens of several line ends or spaces."""
    special = {
        token for family in FAMILIES.values() for token in (*family.stops, *family.special, family.bos)
    }
    texts = [
        "assistant\n\n  lead\n\n\nand the answer is, then thinks.\n" * 8,
        "Hello there: one two three. " * 8,
    ]
    return train_byte_bpe(texts, 256 + len(special) + 120, sorted(special))
