from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

from arrcoc.demo import checkpoint
from arrcoc.demo.checkpoint import SPECIAL_TOKENS, make_checkpoint
from arrcoc.errors import ConfigError, ModelError

IMAGE = {"type": "image", "image": "unused.png"}
USER = "<|im_start|>user\n"
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def ask(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_stock_classes_load_every_weight(tiny_checkpoint: Path) -> None:
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(tiny_checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [
        SPECIAL_TOKENS.index("<|im_end|>") + 1024,
        SPECIAL_TOKENS.index("<|endoftext|>") + 1024,
    ]
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.head_dim) == (
        4,
        64,
        4,
        16,
    )
    assert text.rope_parameters["mrope_section"] == [4, 2, 2]
    assert (vision.depth, vision.hidden_size, list(vision.deepstack_visual_indexes)) == (4, 64, [0, 1, 2])


def test_config_ids_are_those_of_the_tokenizer(tiny_checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|im_end|>": config.text_config.eos_token_id,
        "<|endoftext|>": config.text_config.pad_token_id,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert len(tokenizer) == config.text_config.vocab_size
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_token_is_one_id_and_comes_back(tiny_checkpoint: Path, token: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = tokenizer.encode(f"a{token}b")
    assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert tokenizer.decode(ids) == f"a{token}b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("text", ["What colour is it?", "naïve 猫 🚀\n\n  x", "1234's", ""])
def test_any_text_round_trips(tiny_checkpoint: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_questions_become_word_pieces(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    # "Ġ" is the byte-level form of a leading space; the words stand in the bundled text.
    assert tokenizer.tokenize("What is on the table?") == ["What", "Ġis", "Ġon", "Ġthe", "Ġtable", "?"]
    assert tokenizer.tokenize("12") == ["1", "2"]  # Qwen splits numbers into digits.


def test_tokenizer_file_alone_says_the_same(tiny_checkpoint: Path) -> None:
    # transformers rebuilds parts of a Qwen tokenizer itself; other readers take tokenizer.json as it is.
    alone = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    stock = AutoTokenizer.from_pretrained(tiny_checkpoint)
    for text in ("What is it?", "don't  x_1 2024\n\n (a-b)!", "<|im_start|>user\n", "naïve nai\u0308ve"):
        assert alone.encode(text).ids == stock.encode(text)
    assert alone.decode(alone.encode("a<|im_end|>").ids, skip_special_tokens=True) == "a"


# Golden strings of Qwen3-VL's own template: no default system prompt, images where they stand in the turn.
TEMPLATE_CASES = [
    pytest.param([ask("Hi")], True, {}, f"{USER}Hi<|im_end|>\n<|im_start|>assistant\n", id="text"),
    pytest.param([ask("Hi")], False, {}, f"{USER}Hi<|im_end|>\n", id="no generation prompt"),
    pytest.param(
        [ask("Be brief.", "system"), ask([IMAGE, {"type": "text", "text": "What?"}])],
        True,
        {},
        f"<|im_start|>system\nBe brief.<|im_end|>\n{USER}{VISION}What?<|im_end|>\n<|im_start|>assistant\n",
        id="system and image",
    ),
    pytest.param(
        [ask([IMAGE, {"type": "text", "text": "A?"}]), ask("No.", "assistant"), ask("B?")],
        True,
        {},
        f"{USER}{VISION}A?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        f"{USER}B?<|im_end|>\n<|im_start|>assistant\n",
        id="turns",
    ),
    pytest.param(
        [ask([IMAGE, {"image_url": "b.png"}, {"type": "text", "text": "Same?"}])],
        False,
        {"add_vision_id": True},
        f"{USER}Picture 1: {VISION}Picture 2: {VISION}Same?<|im_end|>\n",
        id="numbered images",
    ),
    pytest.param(
        [ask([{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "When?"}])],
        False,
        {},
        f"{USER}<|vision_start|><|video_pad|><|vision_end|>When?<|im_end|>\n",
        id="video",
    ),
]


@pytest.mark.parametrize(("messages", "prompt", "extra", "expected"), TEMPLATE_CASES)
def test_chat_template(
    tiny_checkpoint: Path, messages: list[Any], prompt: bool, extra: dict[str, Any], expected: str
) -> None:
    for loader in (AutoTokenizer, AutoProcessor):
        renderer = loader.from_pretrained(tiny_checkpoint)
        rendered = renderer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **extra
        )
        assert rendered == expected


def test_chat_template_refuses_unknown_roles(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    with pytest.raises(Exception, match="Unknown role"):
        tokenizer.apply_chat_template([ask("Hi", "robot")], tokenize=False)


def test_stock_generate_answers_about_an_image(
    tiny_checkpoint: Path, stock_model: Qwen3VLForConditionalGeneration, photo: Image.Image
) -> None:
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)

    def answer(image: Image.Image) -> torch.Tensor:
        turn = [ask([{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}])]
        inputs = processor.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert inputs["image_grid_thw"].tolist() == [[1, 8, 12]]  # 128 x 192 px in 16-px patches, unscaled
        assert (inputs["input_ids"] == stock_model.config.image_token_id).sum() == 24  # 8 * 12 / 4
        tokens = stock_model.generate(**inputs, max_new_tokens=8)
        return torch.as_tensor(tokens[0, inputs["input_ids"].shape[1] :])

    upright = photo.resize((192, 128))
    first = answer(upright)
    assert torch.equal(first, answer(upright))
    assert not torch.equal(first, answer(upright.rotate(180)))
    assert processor.decode(first, skip_special_tokens=True)


def test_weights_have_unit_scale(tiny_checkpoint: Path) -> None:
    weights = load_file(tiny_checkpoint / "model.safetensors")
    std = {name: w.std().item() for name, w in weights.items() if w.ndim > 1}
    layer, block = "model.language_model.layers.0.", "model.visual.blocks.0."
    expected = {
        "model.language_model.embed_tokens.weight": 1.0,
        "model.visual.pos_embed.weight": 1.0,
        "lm_head.weight": 64**-0.5,
        layer + "self_attn.q_proj.weight": 64**-0.5,
        layer + "mlp.up_proj.weight": 64**-0.5,
        layer + "self_attn.o_proj.weight": (64 * 2 * 4) ** -0.5,  # residual: fan_in 64, depth 4
        layer + "mlp.down_proj.weight": (128 * 2 * 4) ** -0.5,
        block + "attn.qkv.weight": 64**-0.5,
        block + "attn.proj.weight": (64 * 2 * 4) ** -0.5,
        block + "mlp.linear_fc2.weight": (128 * 2 * 4) ** -0.5,
        "model.visual.patch_embed.proj.weight": 1536**-0.5,
        "model.visual.merger.linear_fc2.weight": 256**-0.5,  # 2 x 2 patches of width 64, no residual
    }
    for name, value in expected.items():
        # 4096 weights or more each: the sampling error of a standard deviation is 1/sqrt(2n) <= 1.1 %.
        assert std[name] == pytest.approx(value, rel=0.05), name
    assert len({w.sum().item() for w in weights.values()}) == len(weights)  # no two tensors alike


def test_same_seed_same_bytes_other_seed_other_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    same, other = make_checkpoint(tmp_path / "same"), make_checkpoint(tmp_path / "other", seed=1)
    assert digests(same) == digests(tiny_checkpoint)
    changed = {name for name, value in digests(other).items() if value != digests(same)[name]}
    assert changed == {"model.safetensors", "arrcoc_checkpoint.json"}


def test_existing_checkpoint_is_kept_and_other_content_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_checkpoint(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ModelError, match="holds something else"):
        make_checkpoint(folder, seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # no scratch folder is left


def test_unwritable_folder_and_unknown_size(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ModelError, match="writable folder"):
        make_checkpoint(blocker / "inside")
    with pytest.raises(ConfigError, match="tiny or reader or 2b"):
        make_checkpoint(tmp_path / "a", size="large")  # type: ignore[arg-type]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(ModelError, match="No space left"):
        make_checkpoint(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_loser_of_a_race_takes_the_winner_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint._write

    def slow_write(folder: Path, *args: Any) -> None:
        monkeypatch.setattr(checkpoint, "_write", write)
        make_checkpoint(tmp_path / "a")  # the other process finishes first
        write(folder, *args)

    monkeypatch.setattr(checkpoint, "_write", slow_write)
    folder = make_checkpoint(tmp_path / "a")
    assert json.loads((folder / "arrcoc_checkpoint.json").read_text())["seed"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
