from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards import geneval
from ngrpo_lora.rewards.geneval import Detection
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples
from ngrpo_lora.world.pretrain import all_captions, make_tokenizers

BUS, DOG = geneval.CLASSES.index("bus"), geneval.CLASSES.index("dog")


def at(left: int, top: int, size: int = 20, score: float = 0.9) -> Detection:
    return Detection((left, top, left + size, top + size), score, np.zeros((1, 1), dtype=bool))


def judge(
    objects: geneval.Objects, metadata: dict[str, Any], colors: dict[Detection, str] | None = None
) -> list[float]:
    def name_colors(name: str, detections: Any) -> Any:
        return [(colors or {})[detection.box] for detection in detections]

    return geneval.requirements(objects, geneval.parse(metadata), name_colors)


THREE_BUSES = {"tag": "counting", "include": [{"class": "bus", "count": 3}], "exclude": [{"class": "bus", "count": 4}]}
TWO_OBJECTS = {"include": [{"class": "dog", "count": 1}, {"class": "bus", "count": 1}]}
RED_DOG = {"include": [{"class": "dog", "count": 1, "color": "red"}]}
TWO_RED_DOGS = {"include": [{"class": "dog", "count": 2, "color": "red"}]}


def beside(relation: str) -> dict[str, Any]:
    """A bus somewhere as seen from a dog."""
    bus = {"class": "bus", "count": 1, "position": [relation, 0]}
    return {"tag": "position", "include": [{"class": "dog", "count": 1}, bus]}


@pytest.mark.parametrize(
    ("found", "met"), [(0, [0.0]), (1, [1 / 3]), (2, [2 / 3]), (3, [1.0]), (4, [3 / 5]), (6, [3 / 7])]
)
def test_a_count_is_met_exactly_or_in_part(found, met):
    objects = {"bus": [at(0, 0)] * found} if found else {}
    assert judge(objects, THREE_BUSES) == pytest.approx(met)


def test_more_objects_than_asked_for_are_well_where_they_are_not_excluded():
    assert judge({"dog": [at(0, 0)] * 5, "bus": [at(0, 0)]}, TWO_OBJECTS) == [1.0, 1.0]


def test_both_of_two_objects_are_asked_for():
    assert judge({"dog": [at(0, 0)]}, TWO_OBJECTS) == [1.0, 0.0]
    assert judge({"dog": [at(0, 0)], "cat": [at(0, 0)]}, TWO_OBJECTS) == [1.0, 0.0]


def test_an_object_that_is_only_excluded_must_be_absent():
    metadata = {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "cat", "count": 1}]}
    assert judge({"dog": [at(0, 0)]}, metadata) == [1.0, 1.0]
    assert judge({"dog": [at(0, 0)], "cat": [at(0, 0)]}, metadata) == [1.0, 0.0]


def test_an_exclusion_within_the_count_is_never_met():
    metadata = {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 2}]}
    assert all(min(judge({"dog": [at(0, 0)] * n}, metadata)) < 1 for n in range(1, 5))


def test_the_best_detections_must_have_the_colour():
    first, second, third = at(0, 0), at(50, 0), at(90, 0)
    colors = {first.box: "red", second.box: "blue", third.box: "red"}
    assert judge({"dog": [first, second]}, RED_DOG, colors) == [1.0, 1.0]
    assert judge({"dog": [second, first]}, RED_DOG, colors) == [1.0, 0.0]
    assert judge({"dog": [first, third, second]}, TWO_RED_DOGS, colors) == [1.0, 1.0]
    assert judge({"dog": [first, second, third]}, TWO_RED_DOGS, colors) == [1.0, 0.0]
    assert judge({}, RED_DOG, colors) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("left", "top", "relation"), [(10, 50, "left of"), (90, 50, "right of"), (50, 10, "above"), (50, 90, "below")]
)
def test_a_position_is_that_of_the_later_object_as_seen_from_the_earlier(left, top, relation):
    objects = {"dog": [at(50, 50)], "bus": [at(left, top)]}
    for asked in ("left of", "right of", "above", "below"):
        assert judge(objects, beside(asked)) == [1.0, 1.0, float(asked == relation)]


def test_a_position_needs_its_target():
    assert judge({"bus": [at(10, 50)]}, beside("left of")) == [0.0, 1.0, 0.0]
    wrong_color = beside("left of")
    wrong_color["include"][0]["color"] = "red"
    dog = at(50, 50)
    objects = {"dog": [dog], "bus": [at(10, 50)]}
    assert judge(objects, wrong_color, {dog.box: "blue"}) == [1.0, 0.0, 1.0, 0.0]
    assert judge(objects, wrong_color, {dog.box: "red"}) == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("box", "seen"),
    [
        ((0, 0, 20, 20), set()),
        ((4, 0, 24, 20), set()),  # 0.1 of both widths is 4
        ((9, 0, 29, 20), {"right of"}),
        ((7, 0, 27, 20), set()),  # (7 - 4) / 7 is below a half
        ((40, 40, 60, 60), {"right of", "below"}),
        ((-30, 5, -10, 25), {"left of"}),
    ],
)
def test_relations_leave_a_margin_of_a_tenth_of_both_sizes(box, seen):
    assert geneval.relations(box, (0, 0, 20, 20)) == seen


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({}, "include: Field required"),
        ({"include": []}, "include: Tuple should have at least 1 item"),
        ({"include": [{"class": "buss", "count": 1}]}, "no such class; did you mean bus?"),
        ({"include": [{"class": "bus", "count": 0}]}, "include.0.count"),
        ({"include": [{"class": "bus", "count": 1, "color": "grey"}]}, "include.0.color"),
        ({"include": [{"class": "bus", "count": 1, "position": ["near", 0]}]}, "include.0.position.0"),
        ({"include": [{"class": "bus", "count": 1, "position": ["above", 0]}]}, "must name an earlier entry"),
    ],
)
def test_metadata_of_another_form_is_an_error_that_names_the_form(metadata, problem):
    with pytest.raises(UserError, match="needs prompts that say what they `include`") as caught:
        geneval.parse(metadata)
    assert problem in str(caught.value)


def random_instances(seed: int) -> tuple[Tensor, Tensor]:
    """Class logits (20, 81) of which some are sure, and smooth mask logits (20, 24, 24)."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(20, 81, generator=generator)
    class_logits[torch.arange(20), torch.randint(0, 4, (20,), generator=generator)] += 6
    masks = F.interpolate(4 * torch.randn(1, 20, 4, 4, generator=generator), (24, 24), mode="bilinear")[0]
    masks[3] = -5.0
    return class_logits, masks


@pytest.mark.parametrize("seed", range(3))
def test_instances_are_those_of_transformers_own_processor(seed):
    class_logits, masks = random_instances(seed)
    output = Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=class_logits[None], masks_queries_logits=masks[None]
    )
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.3, return_binary_maps=True
    )[0]
    ours = geneval.find_objects(
        class_logits, masks, 0.3, lambda mask: F.interpolate(mask[None, None], (384, 384), mode="bilinear")[0, 0]
    )
    assert 3 < len(theirs["segments_info"]) < 20
    assert sum(map(len, ours.values())) == len(theirs["segments_info"])
    for info, mask in zip(theirs["segments_info"], theirs["segmentation"], strict=True):
        same = [d for d in ours[geneval.CLASSES[info["label_id"]]] if np.array_equal(d.mask, mask.numpy() == 1)]
        assert [d.score for d in same] == pytest.approx([info["score"]], abs=1e-6)
        rows, columns = np.nonzero(same[0].mask)
        assert same[0].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_the_sixteen_best_of_a_class_are_kept_in_order():
    class_logits = torch.full((30, 81), -10.0)
    class_logits[:, BUS] = torch.linspace(2, 5, 30)
    objects = geneval.find_objects(class_logits, torch.ones(30, 4, 4), 0.3, lambda mask: mask)
    scores = [d.score for d in objects["bus"]]
    assert len(scores) == 16
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(class_logits.softmax(-1)[-1, BUS].item() * torch.ones(()).sigmoid().item())


@pytest.mark.parametrize(
    ("size", "visible", "padded"),
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((1024, 768), (800, 1067), (800, 1088)),
        ((400, 1600), (1333, 333), (1344, 352)),
    ],
)
def test_the_detector_sees_800_pixels_padded_with_grey(size, visible, padded):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels, shown = geneval.to_pixels(Image.fromarray(noise))
    canvas = Image.new("RGB", padded[::-1], (128, 128, 128))
    canvas.paste(Image.fromarray(noise).resize(visible[::-1], Image.Resampling.BILINEAR))
    levels = np.asarray(canvas, dtype=np.float64) / 255
    expected = (levels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert shown == visible
    torch.testing.assert_close(pixels, torch.from_numpy(expected).permute(2, 0, 1).float(), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> geneval.Config:
    """A Mask2Former that takes what it finds for buses or dogs, more or less surely, and a CLIP, both tiny."""
    folder = tmp_path_factory.mktemp("geneval")
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    depths = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 10}
    detector = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=swin, encoder_feedforward_dim=16, dim_feedforward=16, num_labels=80, **widths, **depths
        )
    )
    with torch.no_grad():
        detector.class_predictor.weight[[BUS, DOG]] *= 8
        detector.class_predictor.bias[[BUS, DOG]] += torch.tensor([7.0, 6.0])
        detector.model.pixel_level_module.decoder.mask_projection.weight *= 60
    detector.save_pretrained(folder / "detector")
    tokenizer, _ = make_tokenizers(all_captions())
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**text, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **ends},
            vision_config={**text, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return geneval.Config(
        name="geneval", path=str(folder / "detector"), color_model=str(folder / "clip"), dtype="float32"
    )


@pytest.fixture(scope="module")
def reward(config: geneval.Config) -> geneval.Reward:
    return geneval.Reward(config, "cpu")


def picture(size: tuple[int, int] = (120, 40)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def test_the_whole_reward_counts_what_its_detector_finds(config, reward):
    image = picture()
    pixels, _ = geneval.to_pixels(image)
    output = reward.detector(pixel_values=pixels[None])
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(output, threshold=0.3)[0]
    buses = sum(info["label_id"] == BUS for info in theirs["segments_info"])
    assert 1 < buses < 10
    metadata = [
        {"include": [{"class": "bus", "count": buses}]},
        {"include": [{"class": "bus", "count": buses + 1}]},
        {"include": [{"class": "bus", "count": 1}], "exclude": [{"class": "bus", "count": buses}]},
        {"tag": "counting", "include": [{"class": "bus", "count": buses}]},
    ]
    graded = config.model_copy(update={"graded": True, "label": "graded"})
    scores = Scorer([config, graded])(Samples([image] * 4, ["buses"] * 4, metadata))
    assert scores["geneval"].tolist() == [1, 0, 0, 0]
    assert scores["graded"][:3].tolist() == pytest.approx([1, buses / (buses + 1), 1 / (buses + 1)])


def test_masks_are_those_of_the_image_and_not_of_its_padding(reward):
    image = picture()
    pixels, _ = geneval.to_pixels(image)
    logits = reward.detector(pixel_values=pixels[None]).masks_queries_logits
    seen = F.interpolate(logits, scale_factor=4, mode="bilinear")
    assert seen.shape[2:] == pixels.shape[1:] == (448, 1344)
    expected = F.interpolate(seen[:, :, :444, :1333], (40, 120), mode="bilinear")[0].numpy() > 0
    found = [d.mask for detections in reward.detect(image, threshold=0.0).values() for d in detections]
    assert found
    assert all(any(np.array_equal(mask, other) for other in expected) for mask in found)


@pytest.fixture
def two_objects() -> list[Detection]:
    left, corner = np.zeros((90, 120), dtype=bool), np.zeros((90, 120), dtype=bool)
    left[10:80, 5:45], corner[50:90, 70:120] = True, True
    corner[60:70, 80:90] = False
    return [Detection((5, 10, 45, 80), 1.0, left), Detection((70, 50, 120, 90), 1.0, corner)]


def test_clip_sees_each_object_alone_on_grey(reward, two_objects):
    image = picture((120, 90))
    reward.name_colors(image, "bus", two_objects)
    for crop, (left, top, right, bottom), mask in zip(
        reward.clip.last_images, [d.box for d in two_objects], [d.mask for d in two_objects], strict=True
    ):
        alone = np.where(mask[..., None], np.asarray(image), 0x99)
        assert np.array_equal(np.asarray(crop), alone[top:bottom, left:right])


def test_a_colour_is_the_mean_of_three_sentences(reward, config, two_objects):
    reward.name_colors(picture((120, 90)), "bus", two_objects)
    clip, tokenizer = CLIPModel.from_pretrained(config.color_model).eval(), make_tokenizers(all_captions())[0]
    for color, embed in zip(geneval.COLORS, reward.color_embeds["bus"], strict=True):
        texts = [f"a photo of a {color} bus", f"a photo of a {color}-colored bus", f"a photo of a {color} object"]
        with torch.no_grad():
            embeds = [clip.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output[0] for t in texts]
        mean = torch.stack([e / e.norm() for e in embeds]).mean(0)
        torch.testing.assert_close(embed, mean / mean.norm(), rtol=0, atol=1e-6)


def test_an_object_has_the_colour_that_is_nearest(reward, two_objects, monkeypatch):
    image = picture((120, 90))
    reward.name_colors(image, "bus", two_objects)
    colors = -reward.clip.last_embeds[:1].expand(10, -1).clone()
    colors[[3, 8]] = reward.clip.last_embeds
    monkeypatch.setitem(reward.color_embeds, "bus", colors)
    assert reward.name_colors(image, "bus", two_objects) == ["green", "black"]
    assert reward.name_colors(image, "bus", two_objects[::-1]) == ["black", "green"]


def test_a_colour_decides_a_score(reward):
    image = picture()
    best = reward.detect(image, geneval.THRESHOLD)["dog"][:1]
    named = reward.name_colors(image, "dog", best)[0]
    other = next(color for color in geneval.COLORS if color != named)
    metadata = [{"include": [{"class": "dog", "count": 1, "color": color}]} for color in (named, other)]
    assert [reward(image, each) for each in metadata] == [1, 0]


def test_prompts_without_metadata_stop_the_run(config):
    with pytest.raises(UserError, match=r"evaluation_metadata\.jsonl"):
        Scorer([config])(Samples([picture()], ["a bus"], [{}]))


def test_missing_networks_are_named(config, tmp_path):
    with pytest.raises(UserError, match="reward geneval: path must be a Mask2Former for COCO's 80 classes"):
        geneval.Reward(config.model_copy(update={"path": str(tmp_path)}), "cpu")
    with pytest.raises(UserError, match=r"reward geneval\.color_model: path must be"):
        geneval.Reward(config.model_copy(update={"color_model": str(tmp_path)}), "cpu")
