"""What prompts mean: wordings of one scene are one, and those of other worlds mean themselves."""

from __future__ import annotations

import pytest

from ngrpo_lora.prompts.sources import open_prompts
from ngrpo_lora.world.edits import EDIT_TASKS, all_edits
from ngrpo_lora.world.meanings import meaning_of
from ngrpo_lora.world.scenes import TASKS, TEMPLATES, all_scenes


@pytest.mark.parametrize("task", TASKS)
def test_wordings_of_a_scene_mean_the_same_and_those_of_others_something_else(task: str):
    scenes = [scene for scene in all_scenes(task)]  # pyright: ignore
    found = {(scene.meaning, meaning_of(template.format(scene.caption))) for scene in scenes for template in TEMPLATES}
    assert found == {(scene.meaning, scene.meaning) for scene in scenes}


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_instructions_mean_their_edit(task: str):
    assert all(meaning_of(edit.instruction) == edit.meaning for edit in all_edits(task))  # pyright: ignore


def test_a_prompt_of_no_embedded_world_means_itself():
    assert meaning_of("A  whale reading a Book") == "A  whale reading a Book"


def test_the_480_held_out_prompts_are_207_captions_of_80_scenes():
    """The figure by which READMEs say what an interval over scenes counts."""
    source = open_prompts("world:held_out", 0)
    prompts = [source.prompt(place).text for place in range(480)]
    assert (len(set(prompts)), len({*map(meaning_of, prompts)})) == (207, 80)
