"""Whatever is wrong with tokenizer or model card: one clear line, exit code 1, and no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import Damage, check_refusal, remove, rename, slow_tokenizer, text, tokens
from hf_checkpoint import tokenizer

CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # The tokenizer
    "no tokenizer": (remove("tokenizer.json"), ("no tokenizer: expected tokenizer.json",)),
    "tokenizer is no JSON": (text("tokenizer.json", "nul"), ("tokenizer.json: is not valid JSON",)),
    "other split": (
        tokens(
            lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(
                pattern={"Regex": r"\p{N}{1,3}"}
            )
        ),
        (
            'pre_tokenizer: cuts text with "\\\\p{N}{1,3}", after NFC, minding merges',
            "no name in GGUF",
        ),
    ),
    "no split": (
        tokens(lambda t: t.update(pre_tokenizer=None)),
        ("pre_tokenizer: expected ByteLevel as its last stage",),
    ),
    "pre-tokenizer is a list of text": (
        tokens(lambda t: t["pre_tokenizer"].update(pretokenizers=["Split"])),
        ("pre_tokenizer: found a list of 1",),
    ),
    "a stage of another kind": (
        tokens(lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Metaspace"})),
        ('pre_tokenizer: found the stage "Metaspace"',),
    ),
    "a split that is no regex": (
        tokens(lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": " "})),
        ("pre_tokenizer.Split.pattern: found an object",),
    ),
    "a split that removes": (
        tokens(lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")),
        ('pre_tokenizer.Split.behavior: found "Removed"',),
    ),
    "digits together": (
        tokens(lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"})),
        ("pre_tokenizer.Digits.individual_digits: found null",),
    ),
    "prefix space": (
        tokens(lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
        ("pre_tokenizer.ByteLevel.add_prefix_space: found true",),
    ),
    "normalizer": (
        tokens(lambda t: t.update(normalizer={"type": "Lowercase"})),
        ('normalizer: found "Lowercase"',),
    ),
    "normalizers": (
        tokens(
            lambda t: t.update(
                normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}
            )
        ),
        ('normalizer: found "Strip"',),
    ),
    "normalizers are text": (
        tokens(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": ["NFC"]})),
        ("normalizer: found a list of 1",),
    ),
    "a normalized token": (
        tokens(lambda t: t["added_tokens"][0].update(normalized=True, content="<e\u0301>")),
        ("added_tokens:", "is not in NFC"),
    ),
    "adds tokens": (
        tokens(
            lambda t: t.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
                }
            )
        ),
        ("post_processor: adds other tokens than BOS and EOS",),
    ),
    "post-processor of BERT": (
        tokens(lambda t: t.update(post_processor={"type": "BertProcessing", "sep": ["x", 1]})),
        ('post_processor: found "BertProcessing"',),
    ),
    "unigram": (
        tokens(lambda t: t["model"].update(type="Unigram")),
        ('model.type: found "Unigram"',),
    ),
    "ignores merges": (
        tokens(lambda t: t["model"].update(ignore_merges=True)),
        ("pre_tokenizer: cuts text with", "after NFC, ignoring merges"),
    ),
    "byte fallback": (
        tokens(lambda t: t["model"].update(byte_fallback=True)),
        ("model.byte_fallback: found true",),
    ),
    "no merges": (tokens(lambda t: t["model"].update(merges=[])), ("0 merges",)),
    "merge of three": (
        tokens(lambda t: t["model"]["merges"].append("a b c")),
        ('merges[3]: found "a b c"',),
    ),
    "unknown merge": (
        tokens(lambda t: t["model"]["merges"].append(["b", "a"])),
        ("the merge of 'b' and 'a' needs the token 'ba'",),
    ),
    "id is text": (
        tokens(lambda t: t["model"]["vocab"].update(a="7")),
        ("token 'a' has the id \"7\"",),
    ),
    "id twice": (
        tokens(lambda t: t["model"]["vocab"].update(ab=0)),
        ("id 0 belongs to", "'ab'"),
    ),
    "added id twice": (
        tokens(lambda t: t["added_tokens"][0].update(id=5)),
        ("id 5 belongs to", "'<|end|>'"),
    ),
    "added token is trained under another id": (
        tokens(lambda t: t["added_tokens"].append({"id": 265, "content": "ab"})),
        ("token 'ab' has the ids 256, 265",),
    ),
    "added token without text": (
        tokens(lambda t: t["added_tokens"][0].pop("content")),
        ("an added token has the text null",),
    ),
    "added token is a number": (
        tokens(lambda t: t["added_tokens"].append(1)),
        ("expected an object for an added token, found 1",),
    ),
    "vocabulary is a list": (
        tokens(lambda t: t["model"].update(vocab=[])),
        ("vocab: expected an object",),
    ),
    "token outside": (
        tokens(lambda t: t["added_tokens"][2].update(id=270)),
        ("token '<|mask|>' has the id 270, but the model has only 270",),
    ),
    "lone surrogate": (
        text(
            "tokenizer.json",
            json.dumps({**tokenizer(), "added_tokens": [{"id": 262, "content": "<\ud800"}]}),
        ),
        ("is not valid Unicode",),
    ),
    "settings are no JSON": (
        text("tokenizer_config.json", "?"),
        ("tokenizer_config.json: is not valid JSON",),
    ),
    "decoder key": (
        text("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("token 'y' has the id \"x\"",),
    ),
    "extra specials": (
        text("tokenizer_config.json", '{"extra_special_tokens": [1]}'),
        ("extra_special_tokens: holds 1, no text",),
    ),
    "extra specials are text": (
        text("tokenizer_config.json", '{"extra_special_tokens": "<x>"}'),
        ("extra_special_tokens: expected a list",),
    ),
    "template": (
        text("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("chat_template: found an object",),
    ),
    "template is a number": (
        text("tokenizer_config.json", '{"chat_template": 5}'),
        ("chat_template: found 5",),
    ),
    "template is no UTF-8": (text("chat_template.jinja", b"\xff"), ("jinja: is not UTF-8",)),
    "vocab.json of another class": (
        slow_tokenizer("GPT2Tokenizer"),
        ('tokenizer_class: found "GPT2Tokenizer"',),
    ),
    "vocab.json without merges": (
        slow_tokenizer("Qwen2Tokenizer"),
        ("merges.txt: no such file",),
    ),
    "broken tokenizer.model": (
        rename("tokenizer.json", "tokenizer.model"),
        ("tokenizer.model: is no SentencePiece model",),
    ),
    # The model card and generation_config.json
    "card is no YAML": (text("README.md", "---\na: [\n---\n"), ("README.md: the front matter",)),
    "card is no UTF-8": (text("README.md", b"---\nname: \xff\n---\n"), ("the front matter",)),
    "tags are lists": (text("README.md", "---\ntags: [[1]]\n---\n"), ("general.tags", "README.md")),
    "name is a list": (text("README.md", "---\nname: [a]\n---\n"), ("general.name", "README.md")),
    "top_k": (text("generation_config.json", '{"top_k": "many"}'), ("general.sampling.top_k",)),
    "generation is no JSON": (
        text("generation_config.json", "}"),
        ("generation_config.json: is not valid JSON",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damaged_tokenizers(name: str, tiny: Path, convert: Callable[..., Any]) -> None:
    damage, expected = CASES[name]
    damage(tiny)
    check_refusal(convert(tiny), *expected)
