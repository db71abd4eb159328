"""GenEval: does the image show the objects that were asked for, in their number, colours and places?

Source: GenEval (arXiv 2310.11513), its `evaluate_images.py` at commit 16f1681. A Mask2Former finds the 80 kinds of
objects of COCO: a detection's score, class probability times the mean probability of its mask, must exceed 0.3 (0.9
where the prompt's `tag` is counting), and the best 16 of a class are kept. The prompt's metadata then says

    include   at least `count` of a `class`; the best `count` of them must have the `color`, which a CLIP ViT-L/14 says
              of each on a grey ground, and the `position` [relation, i] to those of the i-th entry
    exclude   fewer than `count` of a `class`

as the lines of GenEval's evaluation_metadata.jsonl do. 1 where all of it is met, else 0. With `graded`, which is ours,
the mean over counts, colours, positions and exclusions of how far each is met: denser, for training.
Weights: Mask2Former's project is MIT (its model card: other), CLIP's too; 69 M and 428 M parameters, 2 GB in float32.

Departures: GenEval's Mask2Former was trained by mmdetection, which old software alone can load; ours, of the same size,
is its authors' own, so that scores agree on the whole but not for each image. It sees what GenEval's sees (shorter side
800 pixels, longer one at most 1333) and not 384 x 384, as the preprocessor_config.json beside its weights has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, Field, ValidationError, field_validator
from torch import Tensor

from ngrpo_lora.config.plugins import ClipConfig
from ngrpo_lora.config.rewards.geneval import Config
from ngrpo_lora.errors import UserError
from ngrpo_lora.registry import nearest
from ngrpo_lora.rewards._clip import load_clip, unreadable
from ngrpo_lora.rewards._placement import in_use, placement

# COCO's classes in its order; mouse, remote and keyboard have the names that GenEval gives them.
CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
COLORS: tuple[Color, ...] = get_args(Color)
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
Relation = Literal["left of", "right of", "above", "below"]

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16
POSITION_THRESHOLD = 0.1
BACKGROUND = "#999"

SHORT_PX, LONG_PX = 800, 1333
STRIDE_PX = 32
GREY = 128  # fills both sides up to a multiple of the stride
MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]  # of ImageNet, in levels
STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]


class Clause(BaseModel, frozen=True):
    """An entry of `include` or `exclude`: a class of objects with its count, colour and position."""

    name: str = Field(alias="class")
    count: int = Field(ge=1)
    color: Color | None = None
    position: tuple[Relation, int] | None = None

    @field_validator("name")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in CLASSES:
            raise ValueError(f"GenEval has no such class{nearest(value, CLASSES)}")
        return value


class Scene(BaseModel, frozen=True):
    """The metadata of a prompt: which objects its image must show, and which it must not."""

    tag: str | None = None
    include: tuple[Clause, ...] = Field(min_length=1)
    exclude: tuple[Clause, ...] = ()

    @field_validator("include")
    @classmethod
    def _refers_back(cls, value: tuple[Clause, ...]) -> tuple[Clause, ...]:
        for index, clause in enumerate(value):
            if clause.position is not None and not 0 <= clause.position[1] < index:
                raise ValueError(f"a position must name an earlier entry, and entry {index} names {clause.position[1]}")
        return value


@dataclass(frozen=True)
class Detection:
    """A detected object: box (left, top, right, bottom) in pixels, score in [0, 1], mask (height, width), bool."""

    box: tuple[int, int, int, int]
    score: float
    mask: np.ndarray


Objects = dict[str, list[Detection]]  # by class, the best first
NameColors = Callable[[str, Sequence[Detection]], list[Color]]  # class and detections -> a colour each


class Reward:
    """GenEval's score: whether, or with `graded` how far, an image shows what its metadata says, in [0, 1]."""

    def __init__(self, config: Config, device: str):
        from transformers import Mask2FormerForUniversalSegmentation

        self.device, dtype = placement(config, device)
        self.graded, self.offload = config.graded, config.offload
        detector: Any  # transformers' own annotations do not fit what it takes and returns
        try:
            detector = Mask2FormerForUniversalSegmentation.from_pretrained(
                config.path, revision=config.revision or "main"
            )
            if detector.config.num_labels != len(CLASSES):
                raise ValueError(f"it has {detector.config.num_labels} classes")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise unreadable(config, "path", config.path, "a Mask2Former for COCO's 80 classes", error) from error
        self.detector = detector.eval().requires_grad_(False).to(dtype)
        self.clip = load_clip(
            ClipConfig(
                name=config.name,
                label=f"{config.key}.color_model",  # what an error calls it
                path=config.color_model,
                device=config.device,
                dtype=config.dtype,
                offload=config.offload,
            ),
            device,
        )
        self.color_embeds: dict[str, Tensor] = {}

    def __call__(self, image: Image.Image, metadata: dict[str, Any]) -> float:
        """Score one image: 0 or 1, with `graded` any number in [0, 1].

        Raises:
            UserError: the metadata is not GenEval's.
        """
        scene = parse(metadata)
        image = image.convert("RGB")
        objects = self.detect(image, COUNTING_THRESHOLD if scene.tag == "counting" else THRESHOLD)
        met = requirements(objects, scene, lambda name, detections: self.name_colors(image, name, detections))
        return math.fsum(met) / len(met) if self.graded else float(min(met) == 1)

    def detect(self, image: Image.Image, threshold: float) -> Objects:
        """Detect the objects in an RGB image with scores above `threshold`, by class."""
        pixels, visible = to_pixels(image)
        with in_use(self.detector, self.device, self.offload) as detector:
            found = detector(pixel_values=pixels[None].to(self.device, detector.dtype))

        def at_full_size(mask: Tensor) -> Tensor:
            padded = F.interpolate(mask[None, None], pixels.shape[1:], mode="bilinear")
            return F.interpolate(padded[..., : visible[0], : visible[1]], image.size[::-1], mode="bilinear")[0, 0]

        class_logits, mask_logits = found.class_queries_logits[0].float(), found.masks_queries_logits[0].float()
        return find_objects(class_logits, mask_logits, threshold, at_full_size)

    def name_colors(self, image: Image.Image, name: str, detections: Sequence[Detection]) -> list[Color]:
        """The colour of each detection of class `name`: the nearest to its crop on a grey ground, by CLIP."""
        if name not in self.color_embeds:
            prompts = [prompt.format(color=color, name=name) for color in COLORS for prompt in COLOR_PROMPTS]
            embeds = self.clip.text_embeds(prompts).unflatten(0, (len(COLORS), len(COLOR_PROMPTS))).mean(1)
            self.color_embeds[name] = F.normalize(embeds, dim=-1)  # (10, D)
        ground = Image.new("RGB", image.size, BACKGROUND)
        crops = [Image.composite(image, ground, Image.fromarray(d.mask)).crop(d.box) for d in detections]
        cosines = self.clip.image_embeds(crops, "crop") @ self.color_embeds[name].T
        return [COLORS[best] for best in cosines.argmax(1).tolist()]


def to_pixels(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """Preprocess an RGB image into the pixels that the detector takes.

    Returns:
        (3, H, W) float32, H and W multiples of 32, and the (height, width) of it, from the top left, that is image.
    """
    scale = min(SHORT_PX / min(image.size), LONG_PX / max(image.size))
    width, height = (int(side * scale + 0.5) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    levels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    levels = F.pad(levels, (0, -width % STRIDE_PX, 0, -height % STRIDE_PX), value=GREY)
    return (levels - MEAN) / STD, (height, width)


def find_objects(
    class_logits: Tensor, mask_logits: Tensor, threshold: float, at_full_size: Callable[[Tensor], Tensor]
) -> Objects:
    """Mask2Former's instances with scores above `threshold`, by class, the best first.

    Args:
        class_logits: (Q, 81), the last of them for no object.
        mask_logits: (Q, h, w).
        at_full_size: brings (h, w) to the (height, width) of the image.
    """
    probabilities, order = class_logits.softmax(-1)[:, :-1].flatten().topk(len(class_logits))
    objects: Objects = {}
    for probability, pair in zip(probabilities.tolist(), order.tolist(), strict=True):
        if probability <= threshold:
            break  # a score is no higher than its probability, and they fall
        query, label = divmod(pair, len(CLASSES))
        logits = at_full_size(mask_logits[query])
        mask = logits > 0
        score = probability * logits[mask].sigmoid().mean().item()  # NaN for an empty mask
        if score > threshold:
            rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            objects.setdefault(CLASSES[label], []).append(Detection(box, score, mask.cpu().numpy()))
    return {name: sorted(found, key=lambda d: -d.score)[:MAX_OBJECTS] for name, found in objects.items()}


def requirements(objects: Objects, scene: Scene, name_colors: NameColors) -> list[float]:
    """How far each thing that is asked for is met: 1 where it is, less where it is not.

    A count gives a share: 2 of 3 are 2/3; 4, where 3 are asked for and 4 excluded, are 3/5. The rest gives 0 or 1.
    """
    met: list[float] = []
    groups: list[list[Detection]] = []  # what meets each entry; nothing where it is not met
    for clause in scene.include:
        found = objects.get(clause.name, [])
        limit = min((other.count for other in scene.exclude if other.name == clause.name), default=math.inf)
        if len(found) < clause.count:
            met.append(len(found) / clause.count)
        else:
            met.append(1.0 if len(found) < limit else clause.count / (len(found) + 1))
        best = found[: clause.count] if len(found) >= clause.count else []
        if clause.color is not None:
            met.append(float(bool(best) and set(name_colors(clause.name, best)) == {clause.color}))
            best = best if met[-1] else []
        if clause.position is not None:
            relation, target = clause.position
            seen = [relations(mine.box, other.box) for mine in best for other in groups[target]]
            met.append(float(bool(seen) and all(relation in each for each in seen)))
            best = best if met[-1] else []
        groups.append(best)
    included = {clause.name for clause in scene.include}
    met += [float(len(objects.get(c.name, [])) < c.count) for c in scene.exclude if c.name not in included]
    return met


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box `a` lies as seen from box `b`: at most two relations, none where their centres are too near."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    slack = [POSITION_THRESHOLD * (a[i + 2] - a[i] + b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - s, 0), o) for o, s in zip(offset, slack, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (length / math.hypot(*offset) for length in beyond)
    return {name for name, length in zip(get_args(Relation), (-x, x, -y, y), strict=True) if length > 0.5}


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise UserError unless the metadata of a prompt are of GenEval's form."""
    parse(metadata)


def parse(metadata: Mapping[str, Any]) -> Scene:
    """Validate the metadata of a prompt: what its image must and must not show.

    Raises:
        UserError: the metadata is not of GenEval's form.
    """
    try:
        return Scene.model_validate({**metadata})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(
            "reward geneval needs prompts that say what they `include`, as the lines of GenEval's "
            f"evaluation_metadata.jsonl do, got the metadata {str(metadata):.200} ({key}: {problem['msg']}); "
            "give such a .jsonl file for the prompts"
        ) from None
