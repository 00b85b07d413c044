"""Structured output: what may be drawn where, by llguidance.

A constraint gives a mask for every row that a pass verifies, so that the text is what it would be
without drafts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.protocol import Masks
from orthrus_gguf.text.tokenizer import Tokenizer

#: White space in JSON: some, but a model that is lost cannot go on with it forever.
WHITESPACE = r"[ \n\t]{0,20}"


@dataclass(frozen=True)
class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    tokenizer: Tokenizer
    eos_token_id: int
    tokens: list[bytes]
    special_token_ids: list[int]
    bos_token_id: int | None = None

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        return self.tokenizer.encode(plain, special=False, add_bos=False, add_eos=False)


class Grammars:
    """Makes constraints for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _vocabulary(self) -> Any:
        """The vocabulary as llguidance has it; takes a second or two for a large one."""
        tokenizer = self._tokenizer
        ends = sorted(tokenizer.eog)
        if not ends:
            raise OrthrusError("the vocabulary has no end-of-text token, which grammars need")
        ids = range(tokenizer.n_vocab)
        special = [id for id in ids if tokenizer.is_special(id)]
        tokens = [tokenizer.token_bytes(id) for id in ids]
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, ends[0], tokens, special))
        return llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.n_vocab, eos_token=ends)

    def constraint(
        self, grammar: str, prompt_tokens: int, *, drafts: bool = True
    ) -> Constrained | Forced:
        """For one answer. grammar: as the functions below give it. drafts: whether tokens that it
        forces are drafts. Raises OrthrusError."""
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise OrthrusError(f"the grammar cannot be used: {_line(matcher.get_error())}")
        kind = Forced if drafts else Constrained
        return kind(matcher, prompt_tokens, self._tokenizer)


class Constrained:
    """See `sequence.Constraint`. It follows one answer from its first token on."""

    def __init__(self, matcher: Any, prompt_tokens: int, tokenizer: Tokenizer) -> None:
        self._matcher, self._seen = matcher, prompt_tokens
        self._eog, self._words = tokenizer.eog, -(-tokenizer.n_vocab // 32)

    def __call__(self, tokens: Sequence[int], tree: Tree) -> Masks:
        self._follow(tokens)
        # Rows that cannot be reached are not asked about.
        masks = np.full((len(tree.tokens) + 1, self._words), -1, np.int32)
        self._fill(0, masks, tree)
        return masks.view(np.uint32)

    def _follow(self, tokens: Sequence[int]) -> None:
        """Learn what was committed."""
        new = list(tokens[self._seen :])
        if new and not self._matcher.consume_tokens(new):
            raise OrthrusError(f"the grammar was left: {_line(self._matcher.get_error())}")
        self._seen = len(tokens)

    def _fill(self, row: int, masks: NDArray[np.int32], tree: Tree) -> None:
        """Masks of a row, and of those that follow it."""
        matcher, mask = self._matcher, masks[row]
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            raise OrthrusError(f"the grammar is too much: {_line(matcher.get_error())}")
        for child in tree.children(row):
            token = tree.tokens[child - 1]
            if token in self._eog or matcher.try_consume_tokens([token]) == 0:
                continue
            self._fill(child, masks, tree)
            matcher.rollback(1)


class Forced(Constrained):
    """See `drafting.forced.Forcing`."""

    def forced(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that must come next."""
        self._follow(tokens)
        return list(self._matcher.compute_ff_tokens())


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def from_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of JSON values that fit a schema. Raises OrthrusError."""
    return _lark(f"start: {_json(schema)}")


def from_regex(regex: str) -> str:
    """The grammar of the texts that match. Raises OrthrusError."""
    return _checked(str(llguidance.LLMatcher.grammar_from_regex(regex)))


def from_gbnf(grammar: str) -> str:
    """llama.cpp's GBNF. Raises OrthrusError."""
    try:
        return _lark(gbnf_to_lark(grammar))
    except OrthrusError:
        raise
    except Exception as error:  # the translation raises bare ones, too
        raise OrthrusError(f"not GBNF: {_line(str(error))}") from error


@dataclass(frozen=True)
class Calls:
    """Calls of tools in Qwen3's form: name → schema of the arguments. several: of one answer.
    required: there is one, and nothing else; otherwise what looks like a call is one."""

    tools: Mapping[str, Mapping[str, Any]]
    several: bool
    required: bool


class Thought(Enum):
    """Of an answer: whether a thought comes first. BEGUN: the prompt opens it."""

    NONE = ""
    MAYBE = "thought? "
    BEGUN = "thought "


def reply(
    thought: Thought, calls: Calls | None = None, schema: Mapping[str, Any] | None = None
) -> str:
    """What an assistant may say: calls of tools, JSON that fits a schema, or either of them, after
    a thought. Calls alone that are not required stand in free text. Raises OrthrusError."""
    lines = [] if thought is Thought.NONE else [_THOUGHT.format(opening=_OPENING[thought])]
    said = "answer"
    if schema is not None:
        lines.append(f"answer: {_json(schema)}")
    if calls is not None:
        lines += ['call: "<tool_call>" tail', *_tail(calls.tools)]
        said = 'call ("\\n" call)*' if calls.several else "call"
        if not calls.required and schema is not None:
            said = f"(answer | {said})"
        elif not calls.required:
            said = f"(text tail){'*' if calls.several else '?'} REST"
            lines.append(_FREE)
    return _lark("\n".join([f"start: {thought.value}{said}", *lines]))


_OPENING = {Thought.MAYBE: '"<think>"', Thought.BEGUN: ""}
_THOUGHT = r"""
thought: {opening} thinking /\s{{0,4}}/
thinking[suffix="</think>"]: /(.|\n)*/
"""

#: Text up to where a call begins, and text without any. Neither begins as a thought does, in which
#: what looks like a call is none.
_FREE = r"""
text[suffix="<tool_call>"]: /(.|\n)*/ & ~/<think>(.|\n)*/
REST: /(.|\n)*/ & ~/(.|\n)*<tool_call>(.|\n)*/ & ~/<think>(.|\n)*/
"""


def _tail(tools: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A call behind its first tag."""
    options = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in tools.items()
    ]
    return [
        r'tail: "\n" body "\n</tool_call>"',
        f"body: {_json({'anyOf': options})}",
    ]


def _json(schema: Mapping[str, Any]) -> str:
    """A schema as a part of a Lark grammar."""
    guided = {"x-guidance": {"whitespace_pattern": WHITESPACE}, **schema}
    return f"%json {json.dumps(guided)}"


def _lark(text: str) -> str:
    return _checked(str(llguidance.LLMatcher.grammar_from_lark(text)))


def _checked(grammar: str) -> str:
    problem = llguidance.LLMatcher.validate_grammar(grammar)
    if problem:
        raise OrthrusError(_line(problem))
    return grammar
