"""Conversations to tokens, and to a mask of those that are learnt: what the assistant says, and nothing else.

A chat template writes the conversation, in Jinja as `transformers` has it. A `.pbin` gets the tokens, and the mask
beside it a 1 for each that lies in an assistant's turn. Nothing here knows of the files that conversations come in.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import numpy as np
from jinja2 import nodes

from modalities import files, pbin
from modalities.fields import Reject
from modalities.tokenizer import build, read_spec

TOKEN_NAMES = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}

Span = tuple[int, int]
OnReject = Callable[[object, Reject], None]


class PackedChats(NamedTuple):
    documents: int
    tokens: int
    trained: int


class Unfit(Exception):
    """A conversation that cannot be packed: its `args` are those of a `Reject`."""


class Generation(jinja2.ext.Extension):
    """The tag `{% generation %} … {% endgeneration %}`: notes what it encloses and where in the output that is."""

    tags = {"generation"}
    used = False  # in the template, by any conversation or none
    position = 0  # [characters] of the output so far
    passages: list[tuple[int, str]] = []

    def parse(self, parser: Any) -> nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller: Callable[[], str]) -> str:
        self.passages.append((self.position, text := caller()))
        return text


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # Jinja's own escapes < and >
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@dataclass(frozen=True, eq=False)
class Template:
    """A compiled chat template, for one thread at a time."""

    path: Path
    compiled: jinja2.Template
    generation: Generation
    tokens: dict[str, str]  # the special tokens that it reads, by variable: `bos_token`, …

    def render(self, variables: dict[str, Any]) -> tuple[str, list[Span]]:
        """The text for what `read_conversation` gives, and from where to where in it the assistant speaks.

        That is within the template's {% generation %} tags; where it has none, what a message adds to the text up
        to it and its generation prompt: the end of the turn is part of that. Raises `Unfit`.
        """
        text = self._write(variables)
        if not self.generation.used:
            return text, self._spans_by_prefix(variables, text)
        passages = self.generation.passages
        # In a macro, a filter or a set block a passage is written before it is known where it will stand.
        if any(not text.startswith(passage, start) for start, passage in passages):
            raise Unfit("the template has {% generation %} in a macro, filter or set block", "move it out of there")
        return text, [(start, start + len(passage)) for start, passage in passages]

    def _spans_by_prefix(self, variables: dict[str, Any], text: str) -> list[Span]:
        messages = variables["messages"]
        spans = []
        for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
            before = self._write(variables | {"messages": messages[:i]}, add_generation_prompt=True)
            after = self._write(variables | {"messages": messages[: i + 1]})
            if not (text.startswith(after) and after.startswith(before)):
                what = "the template rewrites earlier turns; add {% generation %} tags around the assistant's to it"
                raise Unfit(what, f"message {i + 1}, its prompt or what precedes them reads differently by itself")
            spans.append((len(before), len(after)))
        return spans

    def _write(self, variables: dict[str, Any], add_generation_prompt: bool = False) -> str:
        text, tracker = "", self.generation
        tracker.position, tracker.passages = 0, []
        variables = self.tokens | variables | {"add_generation_prompt": add_generation_prompt}
        try:
            for piece in self.compiled.generate(variables):
                text += piece
                tracker.position = len(text)
            text.encode()  # raises for a lone surrogate, as the tokenizer would for the whole batch
        except Exception as error:  # a template is a program, and fails in whatever way programs do
            raise Unfit("the template fails", f"{type(error).__name__}: {error}") from None
        return text


def load_template(tokenizer_path: Path, template_path: Path | None = None) -> Template:
    """The template at `template_path`, a `.jinja` or a `tokenizer_config.json`; if None, that beside the tokenizer.

    Its `bos_token` and the like come from the `tokenizer_config.json` beside the tokenizer, or from the one given.
    `ValueError` if there is no template, if it is not Jinja, or if it reads a token that no configuration names.
    """
    beside, jinja = (tokenizer_path.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja"))
    path = template_path or (jinja if jinja.is_file() else beside)
    config = (_read_config(beside) if beside.is_file() else {}) | {"chat_template": None} | _read_config(path)
    if not isinstance(source := config["chat_template"], str):
        raise ValueError(f'{path} has no chat template, nor a list with a "default" one; give one with --template')
    environment = _environment()
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(source)) & TOKEN_NAMES
        compiled = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno} of the chat template: {error.message}") from None
    # Jinja writes nothing for a variable that it does not know: every turn would silently lack its end.
    if missing := sorted(names - config.keys()):
        raise ValueError(f"{path}: the template reads {missing[0]}; name it (null: there is none) in {beside}")
    tokens = {name: t.get("content") if isinstance(t := config[name], dict) else t for name in names}
    generation: Any = environment.extensions[Generation.identifier]
    return Template(path, compiled, generation, {name: token for name, token in tokens.items() if token})


def _read_config(path: Path) -> dict[str, Any]:
    """A `tokenizer_config.json`, of several templates the default; a `.jinja` is one that holds nothing else."""
    try:
        text = path.read_text(encoding="utf-8")
        config = dict(json.loads(text)) if path.suffix == ".json" else {"chat_template": text}
        if isinstance(templates := config.get("chat_template"), list):
            config["chat_template"] = {entry["name"]: entry["template"] for entry in templates}.get("default")
        return config
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"no chat template can be read from {path}: {error}; give one with --template") from None


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    # One time for all: the renderings of a conversation are compared with each other.
    environment.globals.update(raise_exception=_raise_exception, strftime_now=datetime.datetime.now().strftime)
    return environment


def read_conversation(value: Any) -> dict[str, Any]:
    """What messages, or an object that has `messages`, `tools`, …, give to the template by name; raises `Unfit`."""
    given = value if isinstance(value, dict) else {"messages": value}
    optional = {name: given.get(name) for name in ("tools", "documents")}
    for name, part in {"messages": given.get("messages") or [], **optional}.items():
        if not isinstance(part, list | None):
            raise Unfit(f"the {name} are not a list", f"but {type(part).__name__}")
    if not isinstance(others := given.get("chat_template_kwargs") or {}, dict):
        raise Unfit("the chat_template_kwargs are not an object", f"but {type(others).__name__}")
    messages = [_read_message(message, f"message {i}") for i, message in enumerate(given.get("messages") or [], 1)]
    if not messages:
        raise Unfit("there are no messages")
    if all(message["role"] != "assistant" for message in messages):
        raise Unfit("the assistant has no turn")
    return others | optional | {"messages": messages}


def _read_message(message: Any, where: str) -> dict[str, Any]:
    """`message` without what is null, and its reasoning under the names that templates read."""
    if not isinstance(message, dict):
        raise Unfit("a message is not an object", where)
    given = {name: value for name, value in message.items() if value is not None}
    if not isinstance(given.get("role"), str):
        raise Unfit("a role is not a string" if "role" in given else "a message has no role", where)
    # Jinja would write nothing for it, and the assistant learn to say nothing.
    if not given.keys() & {"content", "tool_calls", "function_call"}:
        raise Unfit("a message has no content", where)
    if not isinstance(given.get("content", ""), str | list):
        raise Unfit("a content is neither a string nor a list", where)
    for name in ("reasoning_content", "thinking", "reasoning"):  # its names in datasets; templates read two
        if name in given:
            return {"thinking": given[name], **given, "reasoning_content": given[name]}
    return given


def pack_chats(
    conversations: Iterable[tuple[object, Any]],
    tokenizer_path: Path,
    template: Template,
    out: Path,
    eod: str,
    reject: OnReject,
    special_tokens: Literal["refuse", "parse"] = "refuse",
    batch: int = 64,
) -> PackedChats:
    """Write each of `conversations`, (where it stands, its JSON value), to `out`, and what is learnt to its mask.

    A token is learnt if its characters lie wholly in an assistant's turn: not if it begins before or ends after it.
    The token `eod` is added to a document that does not end with it, and then not learnt. What cannot be packed
    goes to `reject(where, why)`; so does a conversation that spells out a special token, which would become a real
    one, unless `special_tokens` is "parse". `batch`: conversations tokenized at once. `ValueError` if none is left.
    """
    mask = files.mask_path(out)
    # The mask is named first: tokens that lay there without one would all be trained on.
    with files.all_or_none([mask, out]) as parts, ExitStack() as stack:
        spec = read_spec(tokenizer_path, eod)
        tokenizer = build(spec)
        # It may take the blanks off the offsets (Llama 3's does): one that is all blanks would never be learnt.
        tokenizer.post_processor = None
        for name, token in template.tokens.items():
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"{tokenizer_path} has no token {token!r}, which {template.path} reads as {name}")
        added = tokenizer.get_added_tokens_decoder().values() if special_tokens == "refuse" else ()
        rendered = _render(conversations, template, [token.content for token in added if token.special], reject)
        append_tokens = stack.enter_context(pbin.write_pbin(parts[out], spec.vocab_size))
        append_mask = stack.enter_context(pbin.write_pbin(parts[mask], 2))
        counts = np.zeros(3, int)
        while some := list(islice(rendered, batch)):
            encodings = tokenizer.encode_batch([text for _, text, _ in some], add_special_tokens=False)
            for (where, _, spans), encoding in zip(some, encodings, strict=True):
                ids, learnt = np.array(encoding.ids, np.uint32), within(encoding.offsets, spans)
                if not learnt.any():
                    reject(where, Reject("no token lies wholly in an assistant's turn"))
                    continue
                if ids[-1] != spec.eod_id:
                    ids, learnt = np.append(ids, np.uint32(spec.eod_id)), np.append(learnt, False)
                append_tokens(ids)
                append_mask(learnt.astype(np.uint8))
                counts += 1, len(ids), learnt.sum()
        if not counts[0]:
            raise ValueError(f"no conversation to pack: {out} would be empty, and is not written")
    return PackedChats(*counts.tolist())


def _render(
    conversations: Iterable[tuple[object, Any]], template: Template, forbidden: list[str], reject: OnReject
) -> Iterator[tuple[object, str, list[Span]]]:
    # As JSON writes them: a conversation is searched as JSON, with all that is nested in it. (?!) is nowhere.
    spelled = re.compile("|".join(re.escape(_tojson(token)[1:-1]) for token in forbidden) or "(?!)")
    for where, value in conversations:
        try:
            variables = read_conversation(value)
            if found := spelled.search(_tojson(variables)):
                raise Unfit("a message spells out a special token", found[0])
            text, spans = template.render(variables)
        except Unfit as unfit:
            reject(where, Reject(*unfit.args))
        except RecursionError:
            reject(where, Reject("nested too deep"))
        else:
            yield where, text, spans


def within(offsets: list[Span], spans: list[Span]) -> np.ndarray:
    """Whether each token, of `offsets` [N], has characters and has them all in one of `spans`: bool [N]."""
    # A character that takes several tokens (bytes) is among those of each.
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    inside = np.zeros(len(starts), bool)
    for start, end in spans:
        inside |= (starts >= start) & (ends <= end)
    return inside & (starts < ends)
