"""The functions that a configuration refers to."""

from __future__ import annotations

from ngrpo_lora.config import load_config, named_functions


def test_functions_are_found_by_their_keys_and_built_in_rewards_are_none():
    words = ["rewards=[world, a.py:one]", "evaluation.rewards=[b.c:two]", "evaluation.measures=[d.e:three]"]
    assert named_functions(load_config(None, [*words, "evaluation.strict=f.py:four"])) == {
        "rewards.train.1.name": "a.py:one",
        "evaluation.rewards.0.name": "b.c:two",
        "evaluation.strict": "f.py:four",
        "evaluation.measures.0": "d.e:three",
    }
    alone = load_config(None, ["evaluation.strict=null", "evaluation.rewards=[]", "evaluation.measures=[]"])
    assert named_functions(alone) == {}
