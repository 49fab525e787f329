"""Loading a checkpoint, or saying readably why not; text in and out of it; its fingerprint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from arrcoc import Engine
from arrcoc.errors import ModelError, QueryError
from arrcoc.qwen import QwenVL, load

CPU = torch.device("cpu")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def drop_weight(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.visual.blocks.1.attn.qkv.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def missing_shard(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = dict.fromkeys(weights, "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_shape(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].contiguous()
    save_file(weights, path, metadata={"format": "pt"})


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def text_only_template(folder):
    text = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)


def removed(name):
    return lambda folder: (folder / name).unlink()


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def bert(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))


def qwen2(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 8}))


DAMAGES = {
    "config.json missing": (removed("config.json"), "config.json"),
    "config.json garbled": (written("config.json", "{oops"), "config.json"),
    "config.json empty": (written("config.json", ""), "config.json"),
    "config.json without a model": (written("config.json", "{}"), "config.json"),
    "config.json a list": (written("config.json", "[]"), "config.json"),
    "BERT": (bert, "'bert' model"),
    "Qwen2": (qwen2, "'qwen2' model"),
    "tokenizer missing": (no_tokenizer, "tokenizer"),
    "tokenizer.json garbled": (written("tokenizer.json", "{oops"), "tokenizer"),
    "chat template missing": (removed("chat_template.jinja"), "no chat template"),
    "chat template without images": (text_only_template, "places no image token"),
    "chat template garbled": (written("chat_template.jinja", "{% for %}"), "chat template"),
    "image normalisation missing": (removed("preprocessor_config.json"), "preprocessor_config.json"),
    "image normalisation garbled": (written("preprocessor_config.json", "{oops"), "preprocessor_config.json"),
    "image normalisation of one channel": (
        written("preprocessor_config.json", '{"image_mean": [0.5]}'),
        "preprocessor_config.json",
    ),
    "weights missing": (removed("model.safetensors"), "weights"),
    "weights cut short": (cut, "weights"),
    "weights empty": (written("model.safetensors", ""), "weights"),
    "a shard missing": (missing_shard, "weights"),
    "a weight missing": (drop_weight, "model.visual.blocks.1.attn.qkv.weight"),
    "a weight of another shape": (other_shape, "weights"),
}


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def readable(error: ModelError) -> None:
    assert all((error.given, error.allowed, error.remedy))
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused(name, folder):
    damage, named = DAMAGES[name]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load(folder, CPU, torch.float32)
    readable(caught.value)
    assert named in caught.value.given


@pytest.mark.parametrize("make", ["missing", "file", "empty"])
def test_what_is_no_checkpoint_folder_is_refused(make, tmp_path):
    path = tmp_path / "model"
    if make == "file":
        path.write_text("weights")
    elif make == "empty":
        path.mkdir()
    with pytest.raises(ModelError) as caught:
        Engine.from_pretrained(path, device="cpu")
    readable(caught.value)
    assert str(path) in caught.value.given


def test_a_hub_name_without_a_hub_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="hub can be reached") as caught:
        load("arrcoc-tests/not-there", CPU, torch.float32)
    readable(caught.value)


def test_a_whole_folder_loads(tiny_checkpoint, stock_model):
    qwen = load(tiny_checkpoint, CPU, torch.float32)
    assert (qwen.width, qwen.n_layers, qwen.max_positions) == (64, 4, 32768)
    assert qwen.dtype == torch.float32
    assert qwen.n_parameters == sum(p.numel() for p in stock_model.parameters())
    assert not any(p.requires_grad for p in qwen.model.parameters())
    assert qwen.stop_ids == set(stock_model.generation_config.eos_token_id)


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint):
    return load(tiny_checkpoint, CPU, torch.float32)


def test_fingerprints_follow_weights_precision_and_normalisation(qwen, tiny_checkpoint):
    same = load(tiny_checkpoint, CPU, torch.float32)
    assert same.fingerprint == qwen.fingerprint
    coarse = load(tiny_checkpoint, CPU, torch.bfloat16)
    shifted = QwenVL(qwen.model, qwen.tokenizer, ([0.4] * 3, [0.5] * 3))
    changed = load(tiny_checkpoint, CPU, torch.float32)
    changed.model.model.visual.blocks[0].attn.qkv.weight.data[0, [0, 1]] = 0.0
    swapped = load(tiny_checkpoint, CPU, torch.float32)
    bias = swapped.model.model.visual.blocks[0].attn.qkv.bias.data
    bias[[0, 1]] = bias[[1, 0]]
    found = [q.fingerprint for q in (qwen, coarse, shifted, changed, swapped)]
    assert len(set(found)) == 5


def test_rendering_cuts_a_chat_at_its_images(qwen):
    content = [
        {"type": "text", "text": "a"},
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "b"},
    ]
    runs = qwen.render([{"role": "user", "content": content}])
    assert [qwen.tokenizer.decode(run) for run in runs] == [
        "<|im_start|>user\na<|vision_start|>",
        "<|vision_end|><|vision_start|>",
        "<|vision_end|>b<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_a_query_is_the_mean_of_its_embeddings(qwen):
    query = qwen.query("Which colour?")
    table = qwen.model.get_input_embeddings().weight
    assert list(query.ids) == qwen.tokenize("Which colour?")
    torch.testing.assert_close(query.embedding, table[list(query.ids)].mean(0))


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_control_tokens_in_text_are_refused(token, qwen):
    with pytest.raises(QueryError, match="control token"):
        qwen.query(f"What {token} is this?")


def test_running_layers_in_parts_equals_running_them_at_once(qwen):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 7, 64, generator=generator)
    positions = torch.rand(3, 7, generator=generator) * 9
    from arrcoc.kv import KvCache

    with torch.inference_mode():
        whole = qwen.run_layers(hidden, positions, KvCache(4, 8), range(4))
        cache = KvCache(4, 2)
        first = qwen.run_layers(hidden[:, :3], positions[:, :3], cache, range(4))
        middle = qwen.run_layers(hidden[:, 3:6], positions[:, 3:6], cache, range(2))
        middle = qwen.run_layers(middle, positions[:, 3:6], cache, range(2, 4))
        last = qwen.run_layers(hidden[:, 6:], positions[:, 6:], cache, range(4))
    torch.testing.assert_close(torch.cat((first, middle, last), 1), whole, atol=1e-5, rtol=1e-5)
