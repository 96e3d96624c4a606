"""What is learnt of a conversation is what the assistant says, to the token; its text is that of `transformers`."""

import inspect
import itertools
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors

from modalities import chat, pbin
from modalities.fields import Reject
from modalities.tokenizer import EOD, train_tokenizer

SPECIAL = (
    *(EOD, "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<s>", "</s>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
)

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GENERATION = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}<|im_end|>{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
"""
EVERYTHING = """\
{%- set ns = namespace(count=0) %}
{%- for tool in tools or [] %}{{ tool | tojson }} {{ tool | tojson(indent=2) }}{% endfor %}
{% for message in messages %}
    {% if loop.index > 2 %}
        {% break %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
{{ ns.count }} {{ message.role | upper }} {{ message.name is defined }}: {{ message.reasoning_content }}
{{ message.content }}
{% endfor %}
{{ strftime_now('%Y') | length }}{{ documents is none }}{{ add_generation_prompt }}
"""
TOKENS = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "mistral": {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True, "__type": "AddedToken"}},
    "gemma": {"bos_token": "<bos>"},
}
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "plain": PLAIN,
    "generation": GENERATION,
}


def say(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation: the user and the assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS = [
    say("Hi", "Hello there"),
    say("What is 1+1?", "It is 2.", "And the naïve 😀", "😀 é – \u202e日本語 e\u0301"),
    say("Say nothing", "", "Now speak", "def f(x):\n    return x\n\n    # end"),
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(map(inspect.getsource, (inspect, json, textwrap)), 700, path, SPECIAL)
    return path


def save(folder: Path, tokenizer: Path, name: str, source: str | None = None) -> Path:
    """`tokenizer` in a folder of its own, with the template and the special tokens of `name` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS.get(name, {})))
    (folder / "chat_template.jinja").write_text(source if source is not None else TEMPLATES[name])
    return folder / "tokenizer.json"


def fail(where: object, reject: Reject) -> None:
    raise ValueError(f"{where}: {reject}")


def pack(
    tokenizer: Path, conversations: list[Any], special_tokens: Any = "refuse"
) -> tuple[list[tuple[str, list[str]]], list[tuple[object, Reject]]]:
    """Each document, packed with the template beside `tokenizer`: text and passages learnt; and the rejects."""
    out, rejects = tokenizer.with_name("chat.pbin"), list[tuple[object, Reject]]()
    packed = chat.pack_chats(
        enumerate(conversations, 1),
        tokenizer,
        chat.load_template(tokenizer),
        out,
        EOD,
        lambda where, reject: rejects.append((where, reject)),
        special_tokens,
    )
    documents = list(read(out, tokenizer))
    tokens, mask = pbin.open_pbin(out), pbin.open_pbin(tokenizer.with_name("chat.mask.pbin"))
    assert packed == (len(documents), len(tokens.tokens), mask.tokens.sum())
    assert len(documents) + len(rejects) == len(conversations)
    assert mask.tokens.itemsize == 1 and set(mask.tokens.tolist()) <= {0, 1}
    out.unlink()
    mask.path.unlink()
    return documents, rejects


def read(out: Path, tokenizer: Path) -> Iterator[tuple[str, list[str]]]:
    decoder = Tokenizer.from_file(str(tokenizer))
    tokens, mask = pbin.open_pbin(out), pbin.open_pbin(out.with_name("chat.mask.pbin"))
    assert mask.num_documents == tokens.num_documents
    for i in range(tokens.num_documents):
        ids, learnt = tokens.document(i).tolist(), mask.document(i).tolist()
        runs = itertools.groupby(zip(ids, learnt, strict=True), key=lambda pair: pair[1])
        passages = [[token for token, _ in run] for is_learnt, run in runs if is_learnt]
        yield decoder.decode(ids, False), [decoder.decode(passage, False) for passage in passages]


# --------------------------------------------------------------------------------------------------- what is learnt


@pytest.mark.parametrize(
    ("name", "text", "learnt"),
    [
        (
            "chatml",
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nYes? 😀<|im_end|>\n<|im_start|>user\n😀 Bye<|im_end|>\n"
            "<|im_start|>assistant\n<|im_end|>\n",
            ["Yes? 😀<|im_end|>\n", "<|im_end|>\n"],
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes? 😀<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n😀 Bye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<|eot_id|>",
            ["Yes? 😀<|eot_id|>", "<|eot_id|>"],
        ),
        ("mistral", "<s>[INST] Hi [/INST] Yes? 😀</s>[INST] 😀 Bye [/INST] </s>", [" Yes? 😀</s>", " </s>"]),
        (
            "gemma",
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes? 😀<end_of_turn>\n"
            "<start_of_turn>user\n😀 Bye<end_of_turn>\n<start_of_turn>model\n<end_of_turn>\n",
            ["Yes? 😀<end_of_turn>\n", "<end_of_turn>\n"],
        ),
        ("plain", "User: Hi\nAssistant: Yes? 😀\nUser: 😀 Bye\nAssistant: \n", [" Yes? 😀\n", " \n"]),
        (
            "generation",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes? 😀<|im_end|>\n"
            "<|im_start|>user\n😀 Bye<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
            ["Yes? 😀<|im_end|>", "<|im_end|>"],
        ),
    ],
)
def test_assistants_turns_are_learnt(bpe: Path, tmp_path: Path, name: str, text: str, learnt: list[str]) -> None:
    tokenizer = save(tmp_path, bpe, name)
    assert pack(tokenizer, [say("Hi", "Yes? 😀", "😀 Bye", "")]) == ([(text + EOD, learnt)], [])


def test_special_tokens_of_the_template_are_parsed(bpe: Path, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, bpe, "llama3")
    chat.pack_chats([(1, say("a", "b"))], tokenizer, chat.load_template(tokenizer), tmp_path / "a.pbin", EOD, fail)
    ids = pbin.open_pbin(tmp_path / "a.pbin").tokens.tolist()
    names = Tokenizer.from_file(str(tokenizer))
    turns = []
    for role, content in (("user", "a"), ("assistant", "b")):
        header = ["<|start_header_id|>", *names.encode(role).tokens, "<|end_header_id|>", "Ċ", "Ċ"]
        turns += [*header, content, "<|eot_id|>"]
    due = ["<|begin_of_text|>", *turns, EOD]
    assert [names.id_to_token(i) for i in ids] == due
    assert pbin.open_pbin(tmp_path / "a.mask.pbin").tokens.tolist() == [0] * (len(due) - 3) + [1, 1, 0]


def test_a_system_prompt_and_a_conversation_that_ends_with_the_user(bpe: Path, tmp_path: Path) -> None:
    documents, _ = pack(save(tmp_path, bpe, "chatml"), [say("Hi", "Yes", "Unanswered", system="Be brief.")])
    assert documents[0][0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    assert documents[0][1] == ["Yes<|im_end|>\n"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_blanks_are_learnt_whatever_the_post_processor(bpe: Path, tmp_path: Path, trim_offsets: bool) -> None:
    tokenizer = Tokenizer.from_file(str(bpe))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.save(str(tmp_path / "trimming.json"))
    code = "  def f():\n\n      return 1   "
    documents, _ = pack(save(tmp_path / "a", tmp_path / "trimming.json", "chatml"), [say("Code?", code)])
    assert documents[0][1] == [code + "<|im_end|>\n"]


def test_characters_of_several_tokens_at_the_border(bpe: Path, tmp_path: Path) -> None:
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    source += "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    documents, _ = pack(save(tmp_path, bpe, "", source), [say("a😀", "😃é", "é日", "日😀b")])
    assert documents == [("a😀😃éé日日😀b" + EOD, ["😃é", "日😀b"])]


def test_a_token_across_the_border_is_not_learnt(tmp_path: Path) -> None:
    model = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, EOD: 3}, merges=[("a", "b")]))
    model.add_special_tokens([EOD])
    model.save(str(tmp_path / "model.json"))
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = save(tmp_path / "a", tmp_path / "model.json", "", source)
    documents, rejects = pack(tokenizer, [say("a", "ba"), say("a", "aa", "b"), say("a", "ba", "b")])
    assert documents == [("ab a" + EOD.rjust(14), ["a"]), ("a a ab" + EOD.rjust(14), ["a"])]
    assert rejects == [(3, Reject("no token lies wholly in an assistant's turn"))]


def test_within() -> None:
    offsets = [(0, 2), (2, 2), (2, 3), (2, 3), (3, 5), (5, 7), (7, 8), (7, 9)]
    learnt = chat.within(offsets, [(1, 5), (5, 6), (7, 8)])
    assert learnt.tolist() == [False, False, True, True, True, False, True, False]
    assert chat.within([], [(0, 1)]).tolist() == chat.within([], []).tolist() == []


@pytest.mark.parametrize("learnt", [True, False])
def test_the_end_of_document_is_not_doubled(bpe: Path, tmp_path: Path, learnt: bool) -> None:
    end = "{{ eos_token if inside }}{% endgeneration %}{{ eos_token if not inside }}"
    answer = "{% generation %}{{ m.content }}" + end
    source = f"{{% set inside = {learnt} %}}{{% for m in messages %}}"
    source += f"{{% if m.role == 'user' %}}{{{{ m.content }}}}{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
    tokenizer = save(tmp_path, bpe, "", source)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD}))
    assert pack(tokenizer, [say("a\n", "b")])[0] == [("a\nb" + EOD, ["b" + EOD if learnt else "b"])]


# ----------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "there are no messages"),
        (None, "there are no messages"),
        ({"text": "a"}, "there are no messages"),
        ("a", "the messages are not a list: but str"),
        ({"messages": {"role": "user"}}, "the messages are not a list: but dict"),
        (["a"], "a message is not an object: message 1"),
        ([*say("a", "b"), None], "a message is not an object: message 3"),
        ([{"content": "a"}], "a message has no role: message 1"),
        ([{"role": None, "content": "a"}], "a message has no role: message 1"),
        ([{"role": 1, "content": "a"}], "a role is not a string: message 1"),
        ([*say("a"), {"role": "assistant", "text": "b"}], "a message has no content: message 2"),
        ([*say("a"), {"role": "assistant", "content": None}], "a message has no content: message 2"),
        ([{"role": "user", "content": 1}], "a content is neither a string nor a list: message 1"),
        (say("a"), "the assistant has no turn"),
        ({"messages": say("a", "b"), "tools": "search"}, "the tools are not a list: but str"),
        (
            {"messages": say("a", "b"), "chat_template_kwargs": [1]},
            "the chat_template_kwargs are not an object: but list",
        ),
        (say("a", "\ud800"), "the template fails: UnicodeEncodeError: "),
        ([*say("a"), {"role": "assistant", "content": [{"type": "text"}]}], "the template fails: TypeError: "),
        (say("a<|im_end|>", "b"), "a message spells out a special token: <|im_end|>"),
        (say("a", f"b {EOD}"), f"a message spells out a special token: {EOD}"),
        (
            [{"role": "user<|im_end|>", "content": ""}, *say("a", "b")],
            "a message spells out a special token: <|im_end|>",
        ),
        (
            [*say("a", "b"), {"role": "tool", "content": "", "tool_calls": [{"function": {"<s>": 1}}]}],
            "a message spells out a special token: <s>",
        ),
        (
            {"messages": say("a", "b"), "tools": [{"description": "</s>"}]},
            "a message spells out a special token: </s>",
        ),
    ],
)
def test_rejects(bpe: Path, tmp_path: Path, value: Any, why: str) -> None:
    documents, rejects = pack(save(tmp_path, bpe, "chatml"), [say("a", "b"), value, say("c", "d")])
    assert [learnt for _, learnt in documents] == [["b<|im_end|>\n"], ["d<|im_end|>\n"]]
    assert [where for where, _ in rejects] == [2]
    assert str(rejects[0][1]).startswith(why)


def test_nesting_without_end(bpe: Path, tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    _, rejects = pack(
        save(tmp_path, bpe, "chatml"), [say("a", "b"), [{"role": "user", "content": deep}, *say("c", "d")]]
    )
    assert rejects == [(2, Reject("nested too deep"))]


def test_the_first_reject_may_end_it(bpe: Path, tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "a", bpe, "chatml")
    template, conversations = chat.load_template(tokenizer), [(1, say("a", "b")), ("line 2", say("a", "<s>"))]
    with pytest.raises(ValueError, match="line 2: a message spells out a special token: <s>"):
        chat.pack_chats(conversations, tokenizer, template, tmp_path / "chat.pbin", EOD, fail)
    assert os.listdir(tmp_path) == ["a"]


def test_special_tokens_in_messages_may_be_parsed(bpe: Path, tmp_path: Path) -> None:
    documents, rejects = pack(save(tmp_path, bpe, "plain"), [say("a", "b</s>c")], special_tokens="parse")
    assert (documents, rejects) == ([("User: a\nAssistant: b</s>c\n" + EOD, [" b</s>c\n"])], [])


def test_errors_that_a_template_raises(bpe: Path, tmp_path: Path) -> None:
    bad = [say("a", "b"), say("a", "b", system="c"), say("a", "b", "c", "d")[1:]]
    _, rejects = pack(save(tmp_path, bpe, "gemma"), bad[:2])
    assert rejects == [(2, Reject("the template fails", "TemplateError: System role not supported"))]
    _, rejects = pack(save(tmp_path, bpe, "mistral"), bad)
    due = "TemplateError: Conversation roles must alternate user/assistant/user/assistant/..."
    assert rejects == [(2, Reject("the template fails", due)), (3, Reject("the template fails", due))]
    named = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": {}}]
    _, rejects = pack(save(tmp_path, bpe, "", GENERATION + "{{ messages[1].name.first }}"), [named, say("a", "b")])
    due = "UndefinedError: 'dict object' has no attribute 'name'"
    assert rejects == [(2, Reject("the template fails", due))]


def test_a_template_that_rewrites_earlier_turns_needs_generation_tags(bpe: Path, tmp_path: Path) -> None:
    content = "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    source = f"{{% for m in messages %}}{{{{ m.role }}}}:{content}<|im_end|>{{% endfor %}}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    conversations = [say("a", "<think>1</think>b"), say("a", "<think>1</think>b", "c", "<think>2</think>d")]
    documents, rejects = pack(save(tmp_path, bpe, "", source), conversations)
    assert documents == [
        ("user:a<|im_end|>assistant:<think>1</think>b<|im_end|>" + EOD, ["<think>1</think>b<|im_end|>"])
    ]
    assert rejects[0][0] == 2
    assert rejects[0][1].reason.startswith("the template rewrites earlier turns; add {% generation %} tags")
    tagged = source.replace(content, f"{{% generation %}}{content}{{% endgeneration %}}")
    documents, rejects = pack(save(tmp_path, bpe, "", tagged), conversations)
    assert (documents[1][1], rejects) == (["a", "b", "c", "<think>2</think>d"], [])


def test_a_generation_prompt_that_no_turn_begins_with_needs_generation_tags(bpe: Path, tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    conversations = [say("a", "b"), say("a", "<think></think>b")]
    documents, rejects = pack(save(tmp_path, bpe, "", source), conversations)
    assert [learnt for _, learnt in documents] == [["</think>b<|im_end|>"]]
    assert rejects[0][1].detail.startswith("message 2, its prompt or what precedes them reads differently")


def test_generation_tags_where_their_place_is_unknown(bpe: Path, tmp_path: Path) -> None:
    tagged = "{% generation %}{{ m.content }}{% endgeneration %}"
    macro = f"{{% macro turn(m) %}}{{{{ m.role }}}}:{tagged}{{% endmacro %}}"
    source = f"{macro}{{% for m in messages %}}{{{{ turn(m) }}}}{{% endfor %}}"
    tokenizer = save(tmp_path, bpe, "", source)
    template = chat.load_template(tokenizer)
    with pytest.raises(ValueError, match="generation %} in a macro, filter or set block"):
        chat.pack_chats([(1, say("a", "b"))], tokenizer, template, tmp_path / "a.pbin", EOD, fail)


@pytest.mark.parametrize(
    "attempt",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch PATH') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__self__.year }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(messages[0]) }}",
        "{{ namespace.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_holds(bpe: Path, tmp_path: Path, attempt: str) -> None:
    tokenizer = save(tmp_path / "a", bpe, "", PLAIN + attempt.replace("PATH", str(tmp_path / "escaped")))
    template = chat.load_template(tokenizer)
    with pytest.raises(ValueError, match="line 1: the template fails: SecurityError: .* (unsafe|not safely)"):
        chat.pack_chats([("line 1", say("a", "b"))], tokenizer, template, tmp_path / "chat.pbin", EOD, fail)
    assert os.listdir(tmp_path) == ["a"]


# ---------------------------------------------------------------------------------------------------- the template


def test_where_the_template_is_found(bpe: Path, tmp_path: Path) -> None:
    def text(path: Path | None = None) -> str:
        template = chat.load_template(tmp_path / "tokenizer.json", path)
        return template.render(chat.read_conversation(say("a", "b")))[0]

    def configure(name: str, **entries: Any) -> Path:
        (tmp_path / name).write_text(json.dumps(entries))
        return tmp_path / name

    with pytest.raises(ValueError, match="no chat template can be read from .*tokenizer_config.json.*--template"):
        text()
    configure("tokenizer_config.json", bos_token="<s>")
    with pytest.raises(ValueError, match="tokenizer_config.json has no chat template"):
        text()
    configure("tokenizer_config.json", bos_token="<s>", chat_template="1{{ bos_token }}")
    assert text() == "1<s>"
    named = [{"name": "tool_use", "template": "3"}, {"name": "default", "template": "2{{ bos_token }}"}]
    configure("tokenizer_config.json", bos_token={"content": "<s>"}, chat_template=named)
    assert text() == "2<s>"
    (tmp_path / "chat_template.jinja").write_text("4{{ bos_token }}")
    assert text() == "4<s>"
    (tmp_path / "other.jinja").write_text("5{{ bos_token }}")
    assert text(tmp_path / "other.jinja") == "5<s>"
    assert text(configure("other.json", bos_token="<bos>", chat_template="6{{ bos_token }}")) == "6<bos>"
    with pytest.raises(ValueError, match="other.json has no chat template"):
        text(configure("other.json", bos_token="<bos>"))
    with pytest.raises(ValueError, match="other.json has no chat template"):
        text(configure("other.json", chat_template=named[:1]))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("t.jinja", b"{% for m in messages %}\n{{ m }", "t.jinja, line 2 of the .* template: unexpected '}'"),
        ("t.jinja", b"{% generation %}", "t.jinja, line 1 of the chat template: Unexpected end of template"),
        ("t.jinja", b"\xff", "t.jinja.*can't decode byte 0xff"),
        ("t.jinja", b"{{ eos_token }}", "t.jinja: the template reads eos_token; name it .*tokenizer_config.json"),
        ("t.json", b"{", "t.json: Expecting property name"),
        ("t.json", b"[1]", "t.json"),
        ("t.json", b'{"chat_template": [1]}', "t.json"),
        ("t.json", b'{"chat_template": 1}', "t.json has no chat template"),
        ("none.jinja", b"", "none.jinja: .*No such file"),
    ],
)
def test_bad_templates(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    if name != "none.jinja":
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=what):
        chat.load_template(tmp_path / "tokenizer.json", tmp_path / name)


def test_a_token_that_is_declared_to_be_none(bpe: Path, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, bpe, "", "{{ bos_token }}" + PLAIN)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert pack(tokenizer, [say("a", "b")])[0][0][0] == "User: a\nAssistant: b\n" + EOD


def test_a_token_that_the_tokenizer_lacks(bpe: Path, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, bpe, "", "{{ bos_token }}" + PLAIN)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<BOS>"}')
    with pytest.raises(ValueError, match="has no token '<BOS>', which .*chat_template.jinja reads as bos_token"):
        pack(tokenizer, [say("a", "b")])


WITH_TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "a", "name": "Ann", "tool_calls": None},
        {"role": "assistant", "content": "b", "thinking": "hm", "name": None},
        *say("c", "d"),
    ],
    "tools": [{"name": "find <&> 'é'", "parameters": {"b": [1, None], "a": True}}],
}


def test_what_a_template_can_use(bpe: Path, tmp_path: Path) -> None:
    template = chat.load_template(save(tmp_path, bpe, "", EVERYTHING))
    text = template._write(chat.read_conversation(WITH_TOOLS))
    tool = WITH_TOOLS["tools"][0]
    tools = f"{json.dumps(tool, ensure_ascii=False)} {json.dumps(tool, ensure_ascii=False, indent=2)}"
    assert text == f"{tools}1 USER True: \na\n2 ASSISTANT False: hm\nb\n4TrueFalse"


def test_other_variables_of_a_conversation(bpe: Path, tmp_path: Path) -> None:
    source = "{{ style }}{{ tools }}{{ documents[0].text }}{{ source }}"
    template = chat.load_template(save(tmp_path, bpe, "", source))
    value = {"messages": say("a", "b"), "chat_template_kwargs": {"style": "s", "tools": 1, "messages": 2}}
    text = template._write(chat.read_conversation(value | {"documents": [{"text": "d"}], "source": "web"}))
    assert text == "sNoned"


# ------------------------------------------------------------------------------------------------------- the files


def test_batches_do_not_show(bpe: Path, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, bpe, "llama3")
    template = chat.load_template(tokenizer)
    for name, batch in (("one", 64), ("many", 2)):
        out = tmp_path / f"{name}.pbin"
        chat.pack_chats(enumerate(CONVERSATIONS), tokenizer, template, out, EOD, fail, batch=batch)
    for ending in ("pbin", "mask.pbin"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"many.{ending}").read_bytes()


@pytest.mark.parametrize("name", ["chat.pbin", "chat.mask.pbin"])
def test_existing_targets_are_refused_before_any_work(bpe: Path, tmp_path: Path, name: str) -> None:
    template = chat.load_template(save(tmp_path / "a", bpe, "plain"))
    (tmp_path / name).write_bytes(b"mine")
    untouched = iter([(1, say("a", "b"))])
    with pytest.raises(ValueError, match=f"{name} exists already"):
        chat.pack_chats(untouched, tmp_path / "none.json", template, tmp_path / "chat.pbin", EOD, fail)
    assert len(list(untouched)) == 1
    assert sorted(os.listdir(tmp_path)) == sorted(["a", name])


@pytest.mark.parametrize("name", ["chat.pbin", "chat.mask.pbin"])
def test_both_files_appear_or_none(bpe: Path, tmp_path: Path, name: str) -> None:
    tokenizer = save(tmp_path / "a", bpe, "plain")

    def conversations() -> Iterator[tuple[object, Any]]:
        yield 1, say("a", "b")
        (tmp_path / name).write_bytes(b"someone else's")

    template = chat.load_template(tokenizer)
    with pytest.raises(ValueError, match=f"{name} exists already"):
        chat.pack_chats(conversations(), tokenizer, template, tmp_path / "chat.pbin", EOD, fail)
    assert sorted(os.listdir(tmp_path)) == sorted(["a", name])
    assert (tmp_path / name).read_bytes() == b"someone else's"


def test_nothing_to_pack(bpe: Path, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, bpe, "plain")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="no conversation to pack"):
        pack(tokenizer, [say("a"), []])
    assert sorted(os.listdir(tmp_path)) == before


# ---------------------------------------------------------------------------------------------------- transformers


def reference(tokenizer: Path) -> Any:
    """The tokenizer and the template beside it, as `transformers` has them."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads(tokenizer.with_name("tokenizer_config.json").read_text())
    tokens = {name: entry["content"] if isinstance(entry, dict) else entry for name, entry in config.items()}
    template = tokenizer.with_name("chat_template.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), chat_template=template, **tokens)


@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_writes_the_same_text(bpe: Path, tmp_path: Path, name: str) -> None:
    tokenizer = save(tmp_path, bpe, name)
    theirs, template = reference(tokenizer), chat.load_template(tokenizer)
    for messages in CONVERSATIONS:
        variables = chat.read_conversation(messages)
        assert template.render(variables)[0] == theirs.apply_chat_template(messages, tokenize=False)
        prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template._write(variables, add_generation_prompt=True) == prompt


def test_transformers_gives_a_template_the_same(bpe: Path, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, bpe, "", EVERYTHING)
    messages, tools = WITH_TOOLS["messages"], WITH_TOOLS["tools"]
    due = reference(tokenizer).apply_chat_template(messages, tools=tools, tokenize=False)
    assert chat.load_template(tokenizer)._write(chat.read_conversation(WITH_TOOLS)) == due


def test_transformers_makes_the_same_tokens_and_mask(bpe: Path, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, bpe, "generation")
    theirs, out = reference(tokenizer), tmp_path / "chat.pbin"
    chat.pack_chats(enumerate(CONVERSATIONS), tokenizer, chat.load_template(tokenizer), out, EOD, fail)
    tokens, mask = pbin.open_pbin(out), pbin.open_pbin(tmp_path / "chat.mask.pbin")
    end = theirs.convert_tokens_to_ids(EOD)
    for i, messages in enumerate(CONVERSATIONS):
        due = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert tokens.document(i).tolist() == [*due["input_ids"], end]
        assert mask.document(i).tolist() == [*due["assistant_masks"], 0]
        assert np.any(mask.document(i))
