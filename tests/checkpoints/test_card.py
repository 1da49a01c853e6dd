"""The model card, read by others: a Markdown parser, a YAML parser and the hub's own card class."""

import ast
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fulgurite.checkpoints import read_manifest, verify
from fulgurite.checkpoints.card import CARD_NAME, block, card, code, heading, hub_name, library_of
from fulgurite.checkpoints.store import encode, new_manifest, write_checkpoint

HOSTILE = [
    "plain",
    "a`b``c",
    "`",
    "```\n# no heading\n```",
    "<script>alert(1)</script>",
    "![x](http://evil/x.png)",
    "| a | b |\n|---|---|",
    "---\ntags: [x]\n---",
    "a\u202eb\x00\udc80",
    " ",
    "http://evil.example",
]
CHANGE = {f"blocks.{i}.weight": i / 100 for i in range(20)} | {"twin": 0.18}


def merge_manifest(text="ft.safetensors", name="weights"):
    return new_manifest(
        parents=[{"path": p, "digest": f"xxh3_128:{i:032x}"} for i, p in enumerate(["base", text, "c"])],
        settings={
            "merge": {"class_path": "fulgurite.methods.merging.ties.Ties", "init_args": {"density": 0.2, "x": text}},
            "merger": "Ties",
            "weights": [1.0, 0.5],
        },
        metrics={f"{text}/accuracy": 0.8123456789},
        facts={"change": {**CHANGE, text: 0.5}, "papers": ["arXiv 2306.01708", text]},
    )


def tokens_of(text):
    body = text.split("\n---\n", 1)[1]
    parsed = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    return [token for top in parsed for token in (top, *(top.children or ()))]


@pytest.mark.parametrize("hostile", [h for h in HOSTILE if "\udc80" not in h])
def test_whatever_files_say_is_text(hostile):
    tokens = tokens_of(card(merge_manifest(hostile), hostile))
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_inline", "html_block", "image", "table_open", "hr", "blockquote_open"}
    assert [t.attrs["href"] for t in tokens if t.type == "link_open"] == ["https://arxiv.org/abs/2306.01708"]
    assert sum(t.type == "heading_open" for t in tokens) == 7
    assert sum(t.type == "fence" for t in tokens) == 4


@given(st.text(min_size=1))
def test_a_code_span_and_a_block_hold_their_text(text):
    printable = "".join(c for c in text if c.isprintable())
    (span,) = [t for t in MarkdownIt().parse(f"x {code(printable)} y")[1].children if t.type == "code_inline"]
    assert span.content == (printable or " ")
    (fence,) = MarkdownIt().parse(block([printable], "text"))
    assert fence.content == f"{printable}\n"


@given(st.text())
def test_a_code_span_is_one_line_and_a_heading_is_text(text):
    assert len(code(text).splitlines()) == 1
    children = MarkdownIt().parse(f"# x{heading(text)}x")[1].children
    assert {t.type for t in children} <= {"text", "text_special"}


def test_the_front_matter_is_what_a_hub_reads():
    manifest = merge_manifest("/home/me/hub/models--timm--vit_base/snapshots/ab12")
    text = card(manifest, "merged")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"tags": ["merge", "fulgurite"], "base_model": ["timm/vit_base"], "base_model_relation": "merge"}
    assert ModelCard(text).data.to_dict()["base_model"] == ["timm/vit_base"]
    assert "base_model" not in yaml.safe_load(card(merge_manifest(), "merged").split("---\n")[1])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models--a--b-c.d/snapshots/1", "a/b-c.d"),
        ("/x/models--gpt2/snapshots/1/model.safetensors", "gpt2"),
        ("models/a/b", None),
        ("models--a--b: x/snapshots/1", None),
    ],
)
def test_only_the_cache_of_a_hub_names_its_models(path, name):
    assert hub_name(path) == name


def test_it_says_where_the_model_comes_from_and_how_it_was_made():
    text = card(merge_manifest(), "merged")
    for line in (
        "A model merged from 3 models by `Ties`, made by fulgurite.",
        "- base: `base`, digest `xxh3_128:00000000000000000000000000000000`",
        "- expert 1, weight 1: `ft.safetensors`, digest `xxh3_128:00000000000000000000000000000001`",
        "- expert 2, weight 0.5: `c`, digest `xxh3_128:00000000000000000000000000000002`",
        '    "density": 0.2,',
        "       0.5  ft.safetensors",
        "and 10 tensors that changed less",
        "ft.safetensors/accuracy  0.812346",
    ):
        assert f"\n{line}\n" in text
    assert text.index("blocks.19") < text.index("blocks.18")
    assert text.index("blocks.18") < text.index("twin")
    assert "blocks.9." not in text
    assert "Largest change from the base" in text
    without = merge_manifest()
    del without.parents[0]
    assert "- expert 1, weight 1: `ft.safetensors`" in card(without, "merged")
    assert "Largest change from the first model" in card(without, "merged")


def test_equal_manifests_give_equal_bytes():
    first, second = merge_manifest(), merge_manifest()
    second.created = first.created
    second.facts = dict(reversed(second.facts.items()))
    second.facts["change"] = dict(reversed(second.facts["change"].items()))
    second.settings = dict(reversed(second.settings.items()))
    assert card(first, "m") == card(second, "m")


@pytest.mark.parametrize("name", ["merged", 'it\'s "$HOME" `x`', "a\\nb", "é\n"])
def test_the_code_that_loads_it_names_the_folder(name):
    (python,) = [t for t in tokens_of(card(merge_manifest(), name)) if t.type == "fence" and t.info == "python"]
    call = ast.parse(python.content).body[-1].value
    assert ast.literal_eval(call.args[0]) == name


def test_what_loads_it_depends_on_what_it_is():
    manifest = merge_manifest()
    assert "load_tensors('m')" in card(manifest, "m")
    manifest.settings |= {"model": {"class_path": "Secret"}, "data": {"class_path": "Secret"}}
    text = card(manifest, "m $x")
    assert "fulgurite.load('m $x')" in text
    assert "test --ckpt_path 'm $x'" in text
    assert "Secret" not in text
    for library, call in (
        ("transformers", "AutoModel.from_pretrained('m')"),
        ("timm", "timm.create_model('local-dir:m', pretrained=True)"),
        ("open_clip", "open_clip.create_model_and_transforms('local-dir:m')"),
    ):
        manifest.facts["library"] = library
        assert call in card(manifest, "m")
        assert yaml.safe_load(card(manifest, "m").split("---\n")[1])["library_name"] == library


@pytest.mark.parametrize(
    ("texts", "library"),
    [
        ({"config.json": b'{"architectures": ["ViT"]}'}, "transformers"),
        ({"config.json": b'{"architecture": "vit_base"}'}, "timm"),
        ({"config.json": b"{}", "open_clip_config.json": b"{}"}, "open_clip"),
        ({"state.json": b"{}"}, None),
    ],
)
def test_the_configuration_tells_the_library(texts, library):
    assert library_of(texts) == library


def test_a_checkpoint_of_no_step_has_a_card(tmp_path):
    manifest = new_manifest(kind="delta", base={"source": "bert", "digest": "d"}, facts={"step": 3})
    text = card(manifest, "last")
    assert "A checkpoint, made by fulgurite." in text
    assert "- stands on `bert`, digest `d`" in text
    assert "## Method" not in text


def test_it_is_published_with_the_artefact_and_covered_by_its_digests(tmp_path):
    manifest = merge_manifest()
    tensors = {"weights": {"a": torch.ones(3, 4), "n": torch.tensor(1)}}

    def describe(folder, manifest):
        assert (folder / "weights.safetensors").is_file()
        return {CARD_NAME: card(manifest, "out").encode()}

    write_checkpoint(tmp_path / "out", manifest, *encode(tensors), describe=describe)
    assert verify(tmp_path / "out").ok
    assert CARD_NAME in read_manifest(tmp_path / "out").files
    text = (tmp_path / "out" / CARD_NAME).read_text()
    size = read_manifest(tmp_path / "out").files["weights.safetensors"].bytes
    assert re.search(rf"2 tensors \(entries: 12 float32, 1 int64\), {size} bytes", text)
    (tmp_path / "out" / CARD_NAME).write_text(text.replace("merged", "trained"))
    assert [p for p in verify(tmp_path / "out").problems if CARD_NAME in p]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_card_can_always_be_written(hostile):
    card(merge_manifest(), hostile).encode()
