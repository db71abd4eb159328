"""The script that makes the embedded model that edits: its vocabulary, its inputs, and all of it with a few steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from safetensors.torch import load_file

from ngrpo_lora.prompts.sources import open_prompts
from ngrpo_lora.world import EMBEDDED, EMBEDDED_EDIT
from ngrpo_lora.world.distil import MAX_TOKENS
from ngrpo_lora.world.edits import EDIT_TASKS, all_edits, parse_edit, split_edits
from ngrpo_lora.world.pretrain_edit import EditFlow, drawn_pair, encode_pairs, main, make_editor


@pytest.fixture(scope="module")
def base() -> FluxPipeline:
    return FluxPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)


@pytest.fixture(scope="module")
def editor(base: FluxPipeline) -> EditFlow:
    torch.manual_seed(0)
    return make_editor(base)


def test_every_word_of_an_instruction_is_one_token_and_none_is_cut(editor: EditFlow):
    instructions = [edit.instruction for task in EDIT_TASKS for edit in all_edits(task)]
    clip, t5 = editor.tokenizers
    for text in instructions:
        assert len(clip(text).input_ids) == len(text.split()) + 2 <= MAX_TOKENS
        assert len(t5(text).input_ids) == len(text.split()) + 1


def test_words_that_the_base_knows_keep_their_embeddings(base: FluxPipeline, editor: EditFlow):
    old = base.text_encoder_2.get_input_embeddings().weight
    new = editor.t5.get_input_embeddings().weight
    for word in ("star", "blue", "a"):
        before, after = (t.convert_tokens_to_ids(f"\u2581{word}") for t in (base.tokenizer_2, editor.tokenizers[1]))
        assert torch.equal(old[before], new[after])
    made = editor.tokenizers[1].convert_tokens_to_ids("\u2581make")
    assert not (new[made] == old).all(1).any()


def test_the_velocity_is_that_of_the_drawn_tokens_and_depends_on_the_source(editor: EditFlow):
    generator = torch.Generator().manual_seed(0)
    packed, source, other = torch.randn(3, 2, 16, 64, generator=generator).unbind()
    ids, sigma = editor.tokenize(["remove the star", "add a heart"]), torch.tensor([0.5, 0.9])
    velocity = editor(packed, source, sigma, *ids)
    assert velocity.shape == packed.shape
    assert not torch.allclose(velocity, editor(packed, other, sigma, *ids))
    assert not torch.allclose(velocity, editor(packed, source, sigma, *editor.tokenize(["add a heart"] * 2)))


def test_pairs_are_of_training_edits(tmp_path: Path, base: FluxPipeline):
    packed, instructions = encode_pairs(tmp_path / "pairs.safetensors", base.vae, 100)
    assert packed.shape == (100, 2, 16, 64)
    held_out = {edit.meaning for task in EDIT_TASKS for edit in split_edits(task)[1]}
    meanings = [parse_edit(text) for text in instructions]
    assert not {edit.meaning for edit in meanings} & held_out
    assert {edit.task for edit in meanings} == {*EDIT_TASKS}
    _, (before, after) = drawn_pair(all_edits("remove"), np.random.default_rng(0))
    assert before.shape == after.shape == (64, 64, 3)
    assert (before != after).any()


def test_a_few_steps_make_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = ["--work-dir", str(tmp_path / "work"), "--output-dir", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["pretrain_edit", *folders, "--pairs", "100", "--steps", "2"])
    main()
    pipeline = FluxKontextPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt = open_prompts("edits:train", 0).prompt(0)
    assert prompt.source is not None
    drawn = pipeline(
        image=prompt.source.load(), prompt=prompt.text, height=64, width=64, max_area=64 * 64, _auto_resize=False,
        num_inference_steps=2, max_sequence_length=MAX_TOKENS,
    ).images[0]  # fmt: skip
    assert drawn.size == (64, 64)
    configs = [path.read_text(encoding="utf-8") for path in (tmp_path / "model").rglob("*config.json")]
    assert not any(str(EMBEDDED) in text for text in configs)


@pytest.mark.parametrize("folder", [EMBEDDED, EMBEDDED_EDIT])
def test_no_file_of_a_model_names_a_folder_of_the_machine_that_made_it(folder: Path):
    for path in folder.rglob("*.json"):
        if not path.name.startswith("tokenizer"):
            assert '"/' not in path.read_text(encoding="utf-8"), path


def test_the_committed_model_shares_the_decoder_of_the_one_that_draws():
    own, base = (load_file(path / "vae" / "diffusion_pytorch_model.safetensors") for path in (EMBEDDED_EDIT, EMBEDDED))
    assert own.keys() == base.keys()
    assert all(torch.equal(own[key], base[key]) for key in base)


@pytest.mark.parametrize("wrong", [["--pairs", "150"], ["--steps", "0"]])
def test_wrong_counts_are_refused(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["pretrain_edit", *wrong])
    with pytest.raises(SystemExit):
        main()
    assert "--pairs a multiple of 100" in capsys.readouterr().err
