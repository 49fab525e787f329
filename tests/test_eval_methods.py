"""Every method against the stock model where they must agree, and each rival against its paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from arrcoc.errors import BudgetError, ModelError
from arrcoc.evaluation import stock
from arrcoc.evaluation.methods import ELSEWHERE, METHODS, Lab, target_map
from arrcoc.evaluation.records import Case, Picture
from arrcoc.evaluation.rivals import fastv, visionzip
from arrcoc.records import Frame, Grid, Prompt

QUESTION = "What does the sign say?"
FULL = 256  # tokens of 512 x 512 px


@pytest.fixture(scope="module")
def lab(tiny_checkpoint: Path) -> Lab:
    return Lab.open(tiny_checkpoint, "demo", "cpu", "float32", 6, 3)


@pytest.fixture(scope="module")
def replacing(tiny_checkpoint: Path) -> Lab:
    return Lab.open(tiny_checkpoint, "demo", "cpu", "float32", 6, 3, layout="replace")


@pytest.fixture(scope="module")
def picture(photo: Image.Image) -> Picture:
    return pictured(photo)


def pictured(image: Image.Image, name: str = "1") -> Picture:
    data = bytearray(image.tobytes())
    pixels = torch.frombuffer(data, dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1)
    return Picture(Case(name, "all", image, QUESTION, ("it",), ((130, 10, 200, 120),)), pixels)


def whole_prompt(lab: Lab, picture: Picture) -> Prompt:
    features, grid = lab.whole.encode(picture.pixels, FULL)
    return stock.prompt(lab.qwen, stock.lay_out(features, grid), QUESTION)


def stock_text(model: Any, image: Image.Image, max_pixels: int) -> str:
    """transformers' own processor, model and generate, with max_pixels set."""
    folder = model.config._name_or_path
    size = {"shortest_edge": 32 * 32, "longest_edge": max_pixels}
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder, size=size)
    inputs = processor(images=[image], return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content: Any = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    count = int(inputs["image_grid_thw"].prod()) // 4
    ids = tokenizer(str(text).replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
    kinds = (ids["input_ids"] == model.config.image_token_id).long()
    made = model.generate(**ids, **inputs, mm_token_type_ids=kinds, do_sample=False, max_new_tokens=6)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("height", [30, 64, 100, 500, 1111])
@pytest.mark.parametrize("width", [33, 256, 777])
@pytest.mark.parametrize("most", [35, 64, 300])
def test_the_token_grid_is_that_of_smart_resize(height: int, width: int, most: int) -> None:
    wanted = smart_resize(height, width, 32, min_pixels=1, max_pixels=most * 1024)
    grid = stock.token_grid(height, width, 32, most)
    assert (grid.rows * 32, grid.cols * 32) == wanted
    assert grid.tokens <= most


@pytest.mark.parametrize(("height", "width", "least"), [(1111, 33, 32), (20, 3578, 112)])
def test_an_image_too_narrow_for_the_budget(height: int, width: int, least: int) -> None:
    # 32 tokens: floor(sqrt(32 * 1111 / 33)) = floor(32.8), and 31: floor(32.3). 3578 / 20 = 179 is more than
    # the image's own 112 x 1.
    with pytest.raises(BudgetError, match=f"at least {least} tokens"):
        stock.token_grid(height, width, 32, least - 1)
    assert stock.token_grid(height, width, 32, least).tokens <= least


@pytest.mark.parametrize(("width", "budget"), [(512, FULL), (512, 64), (300, 30)])
def test_downscale_is_stock_generate_with_max_pixels(
    lab: Lab, stock_model: Any, photo: Image.Image, width: int, budget: int
) -> None:
    image = photo.crop((0, 0, width, 512))
    given = METHODS["downscale"](lab, pictured(image), budget)
    assert given.text == stock_text(stock_model, image, budget * 32 * 32)
    assert given.text
    assert given.tokens <= budget


def test_downscaled_pixels_are_the_stock_processors(lab: Lab, photo: Image.Image) -> None:
    size = {"shortest_edge": 1024, "longest_edge": 70 * 1024}
    processor = Qwen2VLImageProcessorPil.from_pretrained(lab.qwen.name, size=size)
    wanted = processor(images=[photo.crop((0, 0, 300, 512))], return_tensors="pt")["pixel_values"]
    patches, _ = lab.whole.patches(pictured(photo.crop((0, 0, 300, 512))).pixels, 70)
    torch.testing.assert_close(patches[0], wanted, atol=1e-5, rtol=0)


def test_methods_agree_at_full_resolution(lab: Lab, picture: Picture) -> None:
    """Two groups, because a tile is encoded apart from its neighbours: whole images and tiles."""
    answers = {name: method(lab, picture, FULL) for name, method in METHODS.items()}
    assert {given.tokens for given in answers.values()} == {FULL}
    whole = {"downscale", "fastv", "visionzip"}
    assert len({answers[name].text for name in whole}) == 1
    assert len({answers[name].text for name in METHODS.keys() - whole}) == 1


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("budget", [16, 50])
def test_no_method_exceeds_its_budget(lab: Lab, picture: Picture, name: str, budget: int) -> None:
    given = METHODS[name](lab, picture, budget)
    assert 0.75 * budget <= given.tokens <= budget
    assert given == METHODS[name](lab, picture, budget)


@pytest.mark.parametrize("name", ["fastv", "visionzip"])
@pytest.mark.parametrize("budget", [1, 2, 7, 100, 255])
def test_pruners_keep_exactly_the_budget(lab: Lab, picture: Picture, name: str, budget: int) -> None:
    assert METHODS[name](lab, picture, budget).tokens == budget


@pytest.mark.parametrize("name", ["arrcoc", "random", "saliency", "oracle"])
def test_below_the_least_is_not_possible(replacing: Lab, picture: Picture, name: str) -> None:
    # 16 tiles of at least one token each.
    assert METHODS[name](replacing, picture, 16).tokens == 16
    with pytest.raises(BudgetError):
        METHODS[name](replacing, picture, 15)


def plans(lab: Lab, picture: Picture, name: str) -> Tensor:
    """Relevance that a method hands to the allocation."""
    seen: list[Tensor] = []
    pipeline = lab.pipeline(picture.pixels)
    look = pipeline.look

    def watched(*arguments: Any) -> Any:
        found = look(*arguments)
        seen.append(found.encoding.relevance)
        return found

    with mock.patch.object(pipeline, "look", watched):
        METHODS[name](lab, picture, 64)
    return seen[0]


def test_random_depends_on_the_case_and_the_seed(lab: Lab, photo: Image.Image) -> None:
    one, same, other = (plans(lab, pictured(photo, name), "random") for name in ("1", "1", "2"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with mock.patch.object(lab, "seed", 4):
        assert not torch.equal(one, plans(lab, pictured(photo), "random"))


def test_saliency_looks_at_the_image_alone(lab: Lab, picture: Picture, photo: Image.Image) -> None:
    mirrored = pictured(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    one, other = plans(lab, picture, "saliency"), plans(lab, mirrored, "saliency")
    assert one.std() > 0.01
    assert torch.allclose(one.flip(1), other, atol=0.05)


def test_oracle_is_one_where_the_labels_are(lab: Lab, picture: Picture) -> None:
    # The box spans x 130..200 and y 10..120 of 128-px tiles: row 0, column 1.
    wanted = torch.full((4, 4), ELSEWHERE)
    wanted[0, 1] = 1
    assert torch.equal(plans(lab, picture, "oracle"), wanted)


def test_target_boxes_scale_with_the_frame() -> None:
    frame = mock.Mock(spec=Frame, grid=Grid(2, 3, 128), source=(512, 768), content=(256, 384))
    # Half scale: x 256..512 becomes 128..256, all of column 1; y 255..257 becomes 127.5..128.5, both rows.
    assert (target_map(frame, ((256, 255, 512, 257),)) == 1).tolist() == [[False, True, False]] * 2


# FastV.


def test_fastv_ranks_by_the_last_rows_attention_in_layer_two(
    lab: Lab, picture: Picture, tiny_checkpoint: Path
) -> None:
    """Against the attention that the stock eager model reports."""
    from transformers import Qwen3VLForConditionalGeneration

    eager = Qwen3VLForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    prompt = whole_prompt(lab, picture)
    with torch.inference_mode():
        rows = torch.arange(prompt.embeds.shape[1])
        out = eager.model.language_model(
            inputs_embeds=prompt.embeds,
            position_ids=torch.cat((rows.expand(1, 1, -1), prompt.positions[:, None].long())),
            visual_pos_masks=prompt.vision[None],
            deepstack_visual_embeds=list(prompt.deepstack),
            output_attentions=True,
        )
    wanted = out.attentions[1][0, :, -1].mean(0)
    seen: list[Tensor] = []
    received = fastv.received

    def watched(query: Tensor, keys: Tensor) -> Tensor:
        seen.append(received(query, keys))
        return seen[-1]

    with mock.patch.object(fastv, "received", watched):
        fastv.prefill(lab.qwen, prompt, 10)
    torch.testing.assert_close(seen[0], wanted, atol=1e-6, rtol=1e-3)


def test_fastv_drops_the_least_attended_after_layer_two(lab: Lab, picture: Picture) -> None:
    prompt = whole_prompt(lab, picture)
    text = int((~prompt.vision).sum())
    state = fastv.prefill(lab.qwen, prompt, 10)
    held = [state.cache.length(layer) for layer in range(lab.qwen.n_layers)]
    assert held == [text + FULL] * 2 + [text + 10] * (lab.qwen.n_layers - 2)
    assert state.next_position == prompt.next_position


def test_fastv_keeping_all_is_the_unpruned_model(lab: Lab, picture: Picture) -> None:
    prompt = whole_prompt(lab, picture)
    whole = lab._decoder.prefill(prompt)
    assert torch.allclose(fastv.prefill(lab.qwen, prompt, FULL).logits, whole.logits, atol=1e-5)
    assert not torch.allclose(fastv.prefill(lab.qwen, prompt, 10).logits, whole.logits, atol=1e-3)


def test_fastv_attention_by_hand() -> None:
    # One head of width 1: scores 0, ln 2, ln 5; weights 1/8, 2/8, 5/8.
    keys = torch.tensor([[[0.0], [2.0], [5.0]]]).clamp_min(1).log()
    assert fastv.received(torch.ones(1, 1, 1), keys)[2] == pytest.approx(5 / 8)
    assert fastv.strongest(torch.tensor([0.1, 0.4, 0.1, 0.4]), 3).tolist() == [0, 1, 3]


def test_fastv_needs_a_layer_after_its_own(lab: Lab, picture: Picture) -> None:
    with pytest.raises(ModelError):
        fastv.prefill(lab.qwen, whole_prompt(lab, picture), 10, layer=lab.qwen.n_layers)


# VisionZip.


def salience(received: Sequence[float], angles: Sequence[float]) -> visionzip.Salience:
    turn = torch.tensor(angles)
    return visionzip.Salience(torch.tensor(received), torch.stack((turn.cos(), turn.sin()), dim=1))


def test_visionzip_keeps_dominant_tokens_and_merges_the_rest() -> None:
    # Keep 6 of 9: round(6 * 10/64) = 1 contextual and 5 dominant (tokens 0, 2, 4, 6, 8). Of 1, 3, 5, 7 the
    # first is the centre, and 3, 5 and 7 are merged into it whatever their keys.
    found = visionzip.representatives(salience([9, 1, 8, 2, 7, 3, 6, 4, 5.0], [0.0] * 9), 6)
    assert found.tolist() == [0, 1, 2, 1, 4, 1, 6, 1, 8]
    tokens = torch.arange(9.0)[:, None]
    merged, kept = visionzip.merge(tokens, found)
    assert kept.tolist() == [0, 1, 2, 4, 6, 8]
    assert merged[:, 0].tolist() == [0, (1 + 3 + 5 + 7) / 4, 2, 4, 6, 8]


def test_visionzip_merges_by_the_keys() -> None:
    # Keep 13 of 17: 2 contextual, 11 dominant (tokens 0 to 10). Of 11..16 every third is a centre: 11, 14.
    angles = [0.0] * 11 + [0.0, 1.4, 0.2, 1.5, 1.3, 0.1]
    found = visionzip.representatives(salience([5.0] * 11 + [1.0] * 6, angles), 13)
    assert found.tolist() == [*range(11), 11, 14, 11, 14, 14, 11]


@pytest.mark.parametrize("keep", [1, 3, 4, 10, 63, 64])
def test_visionzip_keeps_exactly_as_many(keep: int) -> None:
    random = torch.Generator().manual_seed(keep)
    judged = visionzip.Salience(torch.rand(64, generator=random), torch.randn(64, 8, generator=random))
    found = visionzip.representatives(judged, keep)
    assert int((found == torch.arange(64)).sum()) == keep
    dominant = judged.received.topk(keep - (round(keep * 10 / 64) if keep < 64 else 0)).indices
    assert torch.equal(found[dominant], dominant)


def test_visionzip_attention_is_that_of_the_tower(lab: Lab, picture: Picture) -> None:
    """Mean over heads and rows of softmax(q k), in chunks or at once."""
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 20, 8, generator=random)
    wanted = (query @ key.mT / 8**0.5).softmax(-1).mean((0, 1))
    assert torch.allclose(visionzip.mean_attention(query, key), wanted, atol=1e-6)
    with mock.patch.object(visionzip, "_SCORES", 3 * 20 * 6):
        assert torch.allclose(visionzip.mean_attention(query, key), wanted, atol=1e-6)


def test_visionzip_reads_the_last_block_of_the_stock_tower(
    lab: Lab, picture: Picture, stock_model: Any
) -> None:
    patches, grid = lab.whole.patches(picture.pixels, FULL)
    seen: list[Any] = []
    attention = stock_model.model.visual.blocks[-1].attn
    hook = attention.register_forward_pre_hook(
        lambda _, args, named: seen.append((named.get("hidden_states", *args[:1]), named)), with_kwargs=True
    )
    with torch.inference_mode():
        stock_model.model.visual(patches[0], torch.tensor([[1, 2 * grid.rows, 2 * grid.cols]]))
        hook.remove()
        ((hidden, named),) = seen
        query, key, _ = attention.qkv(hidden).view(4 * FULL, 3, attention.num_heads, -1).unbind(1)
        keys = key.reshape(FULL, 4, -1).mean(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *named["position_embeddings"])
        scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
        received = scores.softmax(-1).mean((0, 1)).view(FULL, 4).mean(1)
    found: list[visionzip.Salience] = []
    judge = visionzip.salience

    def watched(*arguments: Any) -> visionzip.Salience:
        found.append(judge(*arguments))
        return found[-1]

    with mock.patch.object(visionzip, "salience", watched):
        visionzip.encode(lab.whole, picture.pixels, FULL, 20)
    torch.testing.assert_close(found[0].keys, keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0].received, received, atol=1e-7, rtol=1e-3)


def test_visionzip_keeping_all_is_the_unpruned_model(lab: Lab, picture: Picture) -> None:
    features, _, kept = visionzip.encode(lab.whole, picture.pixels, FULL, FULL)
    whole, _ = lab.whole.encode(picture.pixels, FULL)
    assert torch.equal(kept, torch.arange(FULL))
    assert torch.equal(features.tokens, whole.tokens)
    assert torch.equal(features.deepstack, whole.deepstack)


def test_kept_tokens_stay_where_they_were(lab: Lab, picture: Picture) -> None:
    features, grid, kept = visionzip.encode(lab.whole, picture.pixels, FULL, 20)
    laid_out = stock.lay_out(features, grid, kept)
    assert torch.equal(laid_out.positions[1] * 16 + laid_out.positions[2], kept.float())
    assert laid_out.segments[0].extent == 16
