"""Names, shards and configurations of artefacts that another library reads."""

import json

import pytest
import torch

from fulgurite.checkpoints import DamagedError, MissingError, RefusedError
from fulgurite.checkpoints.companions import Changes, layout_of, parsed_size, shards, vocabulary


def tensors(**sizes):
    return {name: torch.empty(size, dtype=torch.float32, device="meta") for name, size in sizes.items()}


LIKE = tensors(a=3, b=1, c=9, d=2)


@pytest.fixture
def folder(tmp_path):
    def write(config, name="config.json", **more):
        for file, value in {name: config, **more}.items():
            (tmp_path / file).write_text(json.dumps(value))
        return tmp_path

    return write


def config_after(folder, changes):
    return json.loads(layout_of(LIKE, folder, (), changes).texts["config.json"])


def test_without_a_folder_there_is_one_file_of_our_own():
    assert layout_of(LIKE, None).weights == {"weights.safetensors": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ("config.json", [], "model.safetensors"),
        ("config.json", ["model-00001-of-00002.safetensors"], "model.safetensors"),
        ("config.json", ["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        ("config.json", ["fulgurite_rest.safetensors", "model.safetensors"], "model.safetensors"),
        ("open_clip_config.json", [], "open_clip_model.safetensors"),
    ],
)
def test_the_file_has_the_name_that_its_library_reads(config, files, expected, folder):
    path = folder({}, config)
    assert list(layout_of(LIKE, path, [path / name for name in files]).weights) == [expected]


def test_shards_are_full_in_order_and_none_is_empty():
    found = shards(LIKE, "model.safetensors", 16)
    assert found == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }


def test_the_index_says_where_everything_is(folder):
    layout = layout_of(LIKE, folder({}), (), None, 16)
    index = json.loads(layout.texts["model.safetensors.index.json"])
    assert index["metadata"] == {"total_size": 60}
    assert index["weight_map"] == {name: file for file, names in layout.weights.items() for name in names}


@pytest.mark.parametrize(("config", "name"), [({}, "open_clip_config.json"), ({"architecture": "vit"}, "config.json")])
def test_a_model_that_has_no_index_is_not_cut(config, name, folder):
    with pytest.raises(RefusedError, match="max_shard_size"):
        layout_of(LIKE, folder(config, name), (), None, 16)


def test_a_configuration_without_changes_keeps_its_bytes(tmp_path):
    text = b'{"vocab_size":5,  "x": [1]}'
    (tmp_path / "config.json").write_bytes(text)
    assert layout_of(LIKE, tmp_path, (), Changes()).texts["config.json"] == text


def test_types_also_of_parts(folder):
    config = {"model_type": "llava", "torch_dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {}}
    found = config_after(folder(config), Changes(dtype="bfloat16"))
    assert found["torch_dtype"] == "bfloat16"
    assert found["text_config"] == {"dtype": "bfloat16"}
    assert found["vision_config"] == {}
    assert "dtype" not in found
    assert config_after(folder({"model_type": "x"}), Changes(dtype="float16"))["dtype"] == "float16"
    assert "dtype" not in config_after(folder({"architecture": "vit_tiny"}), Changes(dtype="float16"))


def test_rows_also_of_parts(folder):
    rows = (5, frozenset({5, 7}))
    found = config_after(folder({"text_config": {"vocab_size": 7}, "vocab_size": 3}), Changes(rows=rows))
    assert found == {"text_config": {"vocab_size": 5}, "vocab_size": 3}
    with pytest.raises(RefusedError, match="cut to 5, from 7"):
        config_after(folder({"vocab_size": 6}), Changes(rows=rows))


def test_a_token_without_a_row_is_refused(folder):
    tokenizer = {"model": {"vocab": [["x", 0.1], ["y", 0.2]]}, "added_tokens": [{"content": "<s>", "id": 6}]}
    path = folder({"vocab_size": 7}, **{"tokenizer.json": tokenizer})
    assert vocabulary(path, {"tokenizer.json": json.dumps(tokenizer).encode()}) == {"x": 0, "y": 1, "<s>": 6}
    assert config_after(path, Changes(rows=(7, frozenset({8}))))["vocab_size"] == 7
    with pytest.raises(RefusedError, match="'<s>'"):
        config_after(path, Changes(rows=(6, frozenset({7}))))


def test_layers_and_their_types(folder):
    found = config_after(
        folder({"n_layer": 3, "layer_types": ["x", "y", "z"], "other": [1, 2, 3]}), Changes(layers=[0, 1, 1, 2])
    )
    assert found == {"n_layer": 4, "layer_types": ["x", "y", "y", "z"], "other": [1, 2, 3]}
    with pytest.raises(RefusedError, match="how many layers"):
        config_after(folder({"depth": 3}), Changes(layers=[0]))


def test_what_is_no_configuration(folder, tmp_path):
    with pytest.raises(MissingError, match=r"config\.json"):
        layout_of(LIKE, tmp_path)
    with pytest.raises(DamagedError, match="holds a list"):
        layout_of(LIKE, folder([]))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DamagedError, match="no JSON"):
        layout_of(LIKE, tmp_path)


def test_sizes():
    assert [parsed_size(text) for text in ("5GB", "1.5 MB", "2KiB", "7B")] == [5 * 10**9, 1500000, 2048, 7]
    for text in ("5", "GB", "-1GB", "0GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parsed_size(text)
