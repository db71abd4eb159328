import copy
import gc
import importlib
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ngrpo_lora.config import ModelRewardConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards import _clip, aesthetic, clip_directional, clip_score, hpsv2, pickscore
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples

SIZE_PX = 32
PROMPTS = [
    "a red cube left of a blue ball",
    "A Photo of TWO cats, 35mm (f/1.8)",
    "a red cube left of a blue ball",
    "an astronaut's “portrait” &amp;amp; a robot’s hand, it’ll rain",
    "naïve café 日本語 🦊 we're 1,024 pixels",
    " ".join(["an intricate baroque cathedral of glass,"] * 30),
    "",
]


class Anything(type):
    def __getattr__(cls, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Stub(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


def import_open_clip():
    """From where `make env` puts it; it imports torchvision for transforms, which no network needs."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops"]
    names.append("torchvision.ops.misc")
    stubs = {} if "torchvision" in sys.modules else {name: Stub(name) for name in names}
    for name in list(stubs)[1:]:
        parent, _, child = name.rpartition(".")
        setattr(stubs[parent], child, stubs[name])
    sys.modules.update(stubs)
    sys.path.append(str(Path(sys.prefix, "comparators")))
    try:
        return importlib.import_module("open_clip")
    finally:
        sys.path.pop()
        for name in stubs:
            del sys.modules[name]


@pytest.fixture(scope="module")
def open_clip():
    return import_open_clip()


def make_open_clip(open_clip, quick_gelu: bool = False):
    """A CLIP network with weights so large that attention, its mask and the activation matter."""
    module = sys.modules["open_clip.model"]
    model = module.CLIP(
        32,
        module.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=SIZE_PX),
        module.CLIPTextCfg(layers=2, width=32, heads=2),
        quick_gelu=quick_gelu,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim:
                scale = 0.7 if "in_proj_weight" in name else 0.3
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) * scale + ("ln_" in name and "weight" in name)
                )
    return model.half().float()  # as the checkpoint is


@pytest.fixture(scope="module")
def reference(open_clip):
    return make_open_clip(open_clip)


def architecture(hidden_act: str = "gelu", **vision: int) -> CLIPConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = sizes | {"hidden_act": hidden_act}
    return CLIPConfig(
        text_config=common | {"eos_token_id": 49407},
        vision_config=common | {"patch_size": 8, "image_size": SIZE_PX} | vision,
        projection_dim=32,
    )


@pytest.fixture(scope="module")
def processor(open_clip, tmp_path_factory) -> Path:
    """config.json, and the tokenizer with OpenAI's vocabulary, which open_clip brings along."""
    folder = tmp_path_factory.mktemp("processor")
    ours = sys.modules["open_clip.tokenizer"]._tokenizer
    vocab = list(ours.encoder)[:-2] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=list(ours.bpe_ranks))
    tokenizer.save_pretrained(folder)
    architecture().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory) -> Path:
    """A folder with the file of HPSv2's repository."""
    folder = tmp_path_factory.mktemp("HPSv2")
    state = {name: tensor.half() for name, tensor in reference.state_dict().items()}
    torch.save({"epoch": 5, "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return folder


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory) -> Path:
    """A network in transformers' layout, with its tokenizer and the position_ids of older files."""
    folder = tmp_path_factory.mktemp("openai-clip")
    torch.manual_seed(1)
    model = CLIPModel(architecture("quick_gelu"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.5 if "q_proj" in name or "k_proj" in name else 0.3)
        model.logit_scale.fill_(4.6)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for file in processor.iterdir():
        if file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(40, 64), (64, 40), (32, 32), (90, 33), (20, 20), (31, 64), (64, 64)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


def score(config: ModelRewardConfig, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    scores = Scorer([config])(Samples(images, prompts, [{}] * len(images)))[config.key]
    assert scores.isfinite().all()
    return scores


def open_clip_score(open_clip, model, images, prompts, resize="letterbox") -> torch.Tensor:
    pixels = torch.stack([_clip.to_pixels(image, SIZE_PX, resize) for image in images])
    with torch.no_grad():
        image_embeds = model.encode_image(pixels, normalize=True)
        return (image_embeds * model.encode_text(open_clip.tokenize(prompts), normalize=True)).sum(-1).double()


def transformers_logits(folder: Path, images, prompts) -> torch.Tensor:
    """As PickScore's model card computes it."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    make = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    process = make(size={"shortest_edge": SIZE_PX}, crop_size={"height": SIZE_PX, "width": SIZE_PX})
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        pixel_values = process(images, return_tensors="pt")["pixel_values"]
        return model(**tokens, pixel_values=pixel_values).logits_per_image.diagonal().double()


@pytest.fixture(scope="module")
def hps_config(checkpoint, processor) -> Iterator[hpsv2.Config]:
    config = hpsv2.Config(name="hpsv2", path=str(checkpoint), processor=str(processor))
    scorer = Scorer([config])  # while it lives, the network is not loaded again
    yield config
    del scorer


@pytest.fixture(scope="module")
def clip_config(folder) -> Iterator[clip_score.Config]:
    config = clip_score.Config(name="clip_score", path=str(folder))
    scorer = Scorer([config])
    yield config
    del scorer


def test_hpsv2_equals_open_clip(open_clip, reference, hps_config, images):
    expected = open_clip_score(open_clip, reference, images, PROMPTS)
    torch.testing.assert_close(score(hps_config, images, PROMPTS), expected, atol=1e-5, rtol=0)


def test_hpsv2_reads_the_file_itself(hps_config, checkpoint, images):
    by_file = hps_config.model_copy(update={"path": str(checkpoint / "HPS_v2.1_compressed.pt")})
    assert score(by_file, images, PROMPTS).equal(score(hps_config, images, PROMPTS))


def test_hpsv2_reads_prompts_as_open_clip_does(open_clip, processor):
    tokenizer = CLIPTokenizer.from_pretrained(processor)
    cut = {"truncation": True, "max_length": 77}
    for prompt, expected in zip(PROMPTS, open_clip.tokenize(PROMPTS).tolist(), strict=True):
        ids = tokenizer(hpsv2.clean(prompt), **cut).input_ids
        assert ids == expected[: len(ids)]
        assert not any(expected[len(ids) :])


def without_mask(model):
    model.attn_mask.zero_()


def with_last_token(model):
    model.text_pool_type = "last"


def with_image_projection_transposed(model):
    model.visual.proj.data = model.visual.proj.data.T


def with_text_projection_transposed(model):
    model.text_projection.data = model.text_projection.data.T


def with_queries_for_keys(model):
    for block in model.visual.transformer.resblocks:
        query, key, value = block.attn.in_proj_weight.data.chunk(3)
        block.attn.in_proj_weight.data = torch.cat([key, query, value])


def without_first_norm(model):
    model.visual.ln_pre = nn.Identity()


@pytest.mark.parametrize(
    "fault",
    [
        without_mask,
        with_last_token,
        with_image_projection_transposed,
        with_text_projection_transposed,
        with_queries_for_keys,
        without_first_norm,
    ],
)
def test_the_comparison_sees_a_fault_in_the_network(open_clip, reference, hps_config, images, fault):
    faulty = copy.deepcopy(reference)
    fault(faulty)
    error = score(hps_config, images, PROMPTS) - open_clip_score(open_clip, faulty, images, PROMPTS)
    assert error.abs().max() > 1e-3


def test_the_comparison_sees_another_activation(open_clip, hps_config, images):
    faulty = make_open_clip(open_clip, quick_gelu=True)
    error = score(hps_config, images, PROMPTS) - open_clip_score(open_clip, faulty, images, PROMPTS)
    assert error.abs().max() > 1e-3


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_the_comparison_sees_another_resize(open_clip, reference, hps_config, images, resize):
    error = score(hps_config, images, PROMPTS) - open_clip_score(open_clip, reference, images, PROMPTS, resize)
    assert error.abs().max() > 1e-3


def test_pickscore_is_the_logit_of_transformers(folder, images):
    config = pickscore.Config(name="pickscore", path=str(folder), processor=None)
    expected = transformers_logits(folder, images, PROMPTS)
    torch.testing.assert_close(score(config, images, PROMPTS), expected, atol=1e-4, rtol=0)


def test_clip_score_is_the_cosine_of_transformers(clip_config, folder, images):
    expected = transformers_logits(folder, images, PROMPTS) / torch.tensor(4.6).exp()
    torch.testing.assert_close(score(clip_config, images, PROMPTS), expected, atol=1e-6, rtol=0)


def directions(folder: Path, images, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes from each image and caption to the next, by transformers' own features."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    make = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    process = make(size={"shortest_edge": SIZE_PX}, crop_size={"height": SIZE_PX, "width": SIZE_PX})
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**tokens, pixel_values=process(images, return_tensors="pt")["pixel_values"])
    return output.image_embeds.diff(dim=0).double(), output.text_embeds.diff(dim=0).double()


def edit_samples(images, prompts) -> Samples:
    metadata = [
        {"source": images[i], "source_caption": prompts[i], "target_caption": prompts[i + 1]}
        for i in range(len(images) - 1)
    ]
    return Samples(images[1:], ["make it so"] * len(metadata), metadata)


def test_clip_directional_is_the_cosine_of_changes_by_transformers(clip_config, folder, images):
    config = clip_directional.Config(name="clip_directional", path=str(folder))
    scores = Scorer([config])(edit_samples(images, PROMPTS))["clip_directional"]
    shown, said = directions(folder, images, PROMPTS)
    expected = (shown * said).sum(1) / (shown.norm(dim=1) * said.norm(dim=1))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 0.1
    unlike = Scorer([config])(edit_samples(images, PROMPTS[::-1]))["clip_directional"]
    assert (unlike - expected).abs().max() > 0.01  # captions decide


def test_clip_directional_of_a_picture_that_did_not_change_is_0(clip_config, folder, images):
    config = clip_directional.Config(name="clip_directional", path=str(folder))
    metadata = {"source": images[0], "source_caption": "a cat", "target_caption": "a dog"}
    assert Scorer([config])(Samples([images[0]], [""], [metadata]))["clip_directional"].tolist() == [0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("source", "needs the source picture of every prompt"),
        ("source_caption", "needs the columns source_caption and target_caption .*, got no source_caption; add"),
        ("target_caption", "needs the columns source_caption and target_caption .*, got no target_caption; add"),
    ],
)
def test_clip_directional_says_what_a_prompt_lacks(clip_config, folder, images, name, message):
    config = clip_directional.Config(name="clip_directional", path=str(folder))
    metadata = {"source": images[0], "source_caption": "a cat", "target_caption": "a dog"}
    del metadata[name]
    with pytest.raises(UserError, match=message):
        Scorer([config])(Samples([images[0]], [""], [metadata]))


def test_clip_score_squashes_for_dfn(clip_config, folder, images, tmp_path):
    (tmp_path / "DFN5B-CLIP").symlink_to(folder)
    squash = score(clip_config.model_copy(update={"path": str(tmp_path / "DFN5B-CLIP")}), images, PROMPTS)
    squashed = [image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC) for image in images]
    assert squash.equal(score(clip_config, squashed, PROMPTS))
    assert not squash.equal(score(clip_config, images, PROMPTS))


def linear_head(width: int = 32) -> nn.Module:
    """The structure in which v2's file was saved."""
    torch.manual_seed(2)
    head = nn.Module()
    head.layers = nn.Sequential(
        nn.Linear(width, 24),
        nn.Dropout(0.2),
        nn.Linear(24, 16),
        nn.Dropout(0.2),
        nn.Linear(16, 8),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
        nn.Linear(4, 1),
    )
    return head.eval()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_aesthetic_is_the_head_on_a_normalised_embedding(folder, images, tmp_path, version):
    head = linear_head() if version == "v2" else nn.Linear(32, 1)
    torch.save(head.state_dict(), tmp_path / aesthetic.FILE)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = torch.stack([_clip.to_pixels(image, SIZE_PX, "crop") for image in images])
    with torch.no_grad():
        embeds = model.visual_projection(model.vision_model(pixels).pooler_output)
        embeds = embeds / embeds.square().sum(-1, keepdim=True).sqrt()
        expected = (head.layers if version == "v2" else head)(embeds).squeeze(1).double()
    config = aesthetic.Config(name="aesthetic", path=str(folder), head=str(tmp_path))
    torch.testing.assert_close(score(config, images, PROMPTS), expected, atol=1e-6, rtol=0)
    assert expected.std() > 1e-3


def test_rewards_with_the_same_weights_share_one_network_and_its_embeddings(clip_config, images, tmp_path):
    torch.save(linear_head().state_dict(), tmp_path / aesthetic.FILE)
    scorer = Scorer([clip_config, aesthetic.Config(name="aesthetic", path=clip_config.path, head=str(tmp_path))])
    clips = [bound.function.clip for bound in scorer.rewards.values()]
    assert clips[0] is clips[1]
    runs = []
    hook = clips[0].model.vision_model.register_forward_hook(lambda module, given, output: runs.append(len(output[0])))
    copies = [image.copy() for image in images]
    scores = []
    for batch in (copies, images, images[:3], images[::-1]):
        runs.clear()
        scores.append(scorer(Samples(batch, PROMPTS[: len(batch)], [{}] * len(batch)))["aesthetic"])
        assert runs == [len(batch)]
    hook.remove()
    torch.testing.assert_close(scores[1], scores[3].flip(0), atol=1e-6, rtol=0)


def test_a_network_is_given_up_with_its_last_reward(hps_config, images):
    scorer = Scorer([hps_config.model_copy(update={"offload": True, "batch_size": 2})])
    actual = scorer(Samples(images, PROMPTS, [{}] * len(images)))["hpsv2"]
    torch.testing.assert_close(actual, score(hps_config, images, PROMPTS), atol=1e-6, rtol=0)
    network = weakref.ref(scorer.rewards["hpsv2"].function.clip)
    assert network() is not None
    del scorer
    gc.collect()
    assert network() is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_every_mode_have_a_score(hps_config, mode):
    score(hps_config, [Image.new(mode, (50, 20))], ["a cat"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_and_offload_on_a_gpu(hps_config, images):
    half = hps_config.model_copy(update={"device": "cuda", "offload": True})
    scorer = Scorer([half])
    actual = scorer(Samples(images, PROMPTS, [{}] * len(images)))["hpsv2"]
    torch.testing.assert_close(actual, score(hps_config, images, PROMPTS), atol=5e-3, rtol=0)
    parameter = next(scorer.rewards["hpsv2"].function.clip.model.parameters())
    assert (parameter.device.type, parameter.dtype) == ("cpu", torch.float16)


def edited(checkpoint: Path, folder: Path, edit) -> str:
    state = torch.load(checkpoint / "HPS_v2.1_compressed.pt")["state_dict"]
    edit(state)
    torch.save({"state_dict": state}, folder / "edited.pt")
    return str(folder / "edited.pt")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("visual.ln_post.bias"), "lacks vision_model.post_layernorm.bias"),
        (lambda state: state.update(region_predictor=torch.zeros(2)), "also has region_predictor"),
        (lambda state: state.update({"visual.proj": torch.zeros(32, 16)}), "has another shape of visual_projection"),
    ],
)
def test_weights_that_do_not_fit_are_named(hps_config, checkpoint, tmp_path, edit, message):
    config = hps_config.model_copy(update={"path": edited(checkpoint, tmp_path, edit)})
    with pytest.raises(UserError, match=f"reward hpsv2: path must .*{message}"):
        Scorer([config])


def test_a_folder_in_transformers_layout_must_have_all_weights(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks text_projection.weight"):
        Scorer([clip_score.Config(name="clip_score", path=str(tmp_path))])


def test_what_cannot_be_read_is_an_error_with_a_remedy(hps_config, clip_config, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "code.pt").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    (tmp_path / "empty.safetensors").touch()
    here = str(tmp_path)
    cases = {
        "path must .*xswu/HPSv2": hpsv2.Config(name="hpsv2", processor=str(folder)),
        "path must .*HPS_v2.1_compressed.pt.*No such file": hps_config.model_copy(update={"path": here}),
        "path must .*code.pt": hps_config.model_copy(update={"path": str(tmp_path / "code.pt")}),
        "path must .*empty": hps_config.model_copy(update={"path": str(tmp_path / "empty.safetensors")}),
        "processor must .*laion/CLIP": hps_config.model_copy(
            update={"processor": hpsv2.Config(name="hpsv2").processor}
        ),
        "path must .*yuvalkirstain": pickscore.Config(name="pickscore", processor=str(folder)),
        "path must .*openai/clip": clip_score.Config(name="clip_score"),
        "processor must .*not/there": clip_config.model_copy(update={"processor": "not/there"}),
        "head must .*camenduru": aesthetic.Config(name="aesthetic", path=str(folder)),
    }
    for message, config in cases.items():
        with pytest.raises(UserError, match=f"reward {config.name}: {message}.*; .*local copy"):
            Scorer([config])


def test_a_head_must_be_one_of_the_two_and_fit_the_network(folder, tmp_path):
    torch.save(nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 1)).state_dict(), tmp_path / "other.pth")
    torch.save(linear_head(48).state_dict(), tmp_path / "wide.pth")
    common = {"name": "aesthetic", "path": str(folder)}
    with pytest.raises(UserError, match="v1 or v2, got .*other.pth' with 0.bias, 0.weight, 1.bias"):
        Scorer([aesthetic.Config(**common, head=str(tmp_path / "other.pth"))])
    with pytest.raises(UserError, match="32 numbers for .*got one for 48"):
        Scorer([aesthetic.Config(**common, head=str(tmp_path / "wide.pth"))])
