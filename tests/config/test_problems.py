"""Everything that cannot run is refused in one clear line: rule, value, remedy."""

from __future__ import annotations

import pytest
from refusing import message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.group_size=1", ["rollout.group_size must be at least 2", "got 1", "ranked"]),
        ("rollout.num_steps=1", ["rollout.num_steps must be at least 2", "got 1"]),
        ("rollout.num_steps=1001", ["at most 1000", "got 1001"]),
        ("rollout.num_steps=eight", ["rollout.num_steps must be a whole number", "got 'eight'"]),
        ("rollout.num_steps=8.5", ["rollout.num_steps must be a whole number", "got 8.5"]),
        ("rollout.num_steps=true", ["rollout.num_steps must be a whole number", "got true"]),
        ("rollout.solver=heun", ["rollout.solver must be 'dpmpp_2m' or 'euler'", "got 'heun'"]),
        ("rollout=5", ["rollout must be a section of keys", "got 5"]),
        ("rollout.num_steps.x=1", ["rollout.num_steps.x must be a key of a section"]),
        ("algorithm.perturbation_strength=0", ["algorithm.perturbation_strength must be", "got 0"]),
        ("algorithm.perturbation_strength=1.5", ["algorithm.perturbation_strength must be at most 1", "got 1.5"]),
        ("algorithm.advantage_p=0", ["algorithm.advantage_p must be", "got 0"]),
        ("algorithm.advantage_p=2.5", ["algorithm.advantage_p must be at most 2", "got 2.5"]),
        ("algorithm.temperature=0", ["algorithm.temperature must be", "'auto'", "more than 0", "got 0"]),
        ("algorithm.num_anchors=13", ["algorithm.num_anchors", "rollout.group_size", "13"]),
        ("algorithm.num_train_steps=9", ["algorithm.num_train_steps", "rollout.num_steps", "9"]),
        ("algorithm=naighbor", ["algorithm.name must be one of", "'naighbor'", "did you mean neighbor?"]),
        ("algorithm=[1]", ["algorithm must be a name or a mapping", "[1]"]),
        ("model.width_px=8208", ["model.width_px must be at most 8192, got 8208"]),
        ("model.num_frames=4097", ["model.num_frames must be at most 4093, got 4097"]),
        ("model.height_px=104", ["model.height_px must be a multiple of 16, got 104", "96 and 112"]),
        ("model.width_px=0", ["model.width_px must be at least 16, got 0"]),
        ("model.family=fluxx", ["model.family must be one of", "did you mean flux?"]),
        ("model.dtype=float8", ["model.dtype must be 'auto', 'float32', 'bfloat16' or 'float16'", "got 'float8'"]),
        ("model.device=gpu", ["model.device must be", "got 'gpu'", "cuda:N"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate must be more than 0", "got -1"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate must be a finite number", "got nan"]),
        ("optimizer.betas=[0.9, 1.5]", ["optimizer.betas.1 must be less than 1", "got 1.5"]),
        ("rewards=wrld", ["rewards.train.0.name must be one of", "'wrld'", "did you mean world?"]),
        ("rewards=[]", ["rewards.train must have at least one entry"]),
        ("rewards=[world, world]", ["rewards.train must name each reward once", "world"]),
        ("rewards={name: world, weight: 0}", ["rewards.train.0.weight must not be 0"]),
        ("rewards={name: world, clip: [1, 0]}", ["rewards.train.0.clip must be [low, high] with low below high"]),
        (
            "rewards={name: world, label: a/b}",
            ["rewards.train.0.label must be of letters, digits, _, - and ., got 'a/b'; leave out all others"],
        ),
        (
            "optimizer.learning_rate =1",
            ["unknown key 'optimizer.learning_rate '; did you mean optimizer.learning_rate?"],
        ),
        ("rewards=[world, {name: a.py:score, label: world}]", ["must name each reward once, got world twice"]),
        ("rewards={name: ocr, exct: true}", ["unknown key rewards.train.0.exct; did you mean rewards.train.0.exact?"]),
        ("rewards={name: world, revision: x}", ["unknown key rewards.train.0.revision; did you mean model.revision?"]),
        ("evaluation.rewards=[world, {name: ocr, exct: 1}]", ["did you mean evaluation.rewards.1.exact?"]),
        ("rewards={name: ocr, min_confidence: 2}", ["rewards.train.0.min_confidence must be at most 1"]),
        ("tracking={name: wandb, projet: x}", ["unknown key tracking.0.projet; did you mean tracking.0.project?"]),
        ("tracking=wandbb", ["tracking.0.name must be 'tensorboard', 'wandb',", "or 'dvclive', got 'wandbb'"]),
        ("tracking=[wandb, wandb]", ["tracking must name each tracker once, got wandb several times"]),
        ("tracking={name: wandb, options: {id: 3}}", ["tracking.0.options must leave id to the run"]),
        ("rewards.trian=world", ["unknown key rewards.trian; did you mean rewards.train?"]),
        ("rewards.max_failed_share=2", ["rewards.max_failed_share must be at most 1"]),
        ("evaluation.rewards=[wrld]", ["evaluation.rewards.0.name must be one of", "did you mean world?"]),
        ("evaluation.rewards={name: world, wait: 1}", ["evaluation.rewards.0.weight?"]),
        (
            "rewards=[{name: world, wieght: 2}]",
            ["unknown key rewards.train.0.wieght; did you mean rewards.train.0.weight?"],
        ),
        ("evaluation.measures=variety", ["evaluation.measures must look like package.module:function", "'variety'"]),
        ("evaluation.measures=[a.b:c, 3]", ["evaluation.measures.1 must be text", "got 3"]),
        ("evaluation.strict=wrld", ["evaluation.strict must be one of", "did you mean world?"]),
        ("rollout.group_szie=3", ["unknown key rollout.group_szie; did you mean rollout.group_size?"]),
        ("group_size=3", ["unknown key group_size; did you mean rollout.group_size?"]),
        ("algorithm.clip_rnge=3", ["unknown key algorithm.clip_rnge; did you mean algorithm.clip_range?"]),
        (
            "algorithm.window_size=3",
            ["unknown key algorithm.window_size, which is of algorithm=mix and mix_flash; leave it out, or choose"],
        ),
        ("rolout.group_size=3", ["unknown key rolout", "did you mean rollout?"]),
        ("nonsense=3", ["unknown key nonsense"]),
        ("output_dir=", ["output_dir must be text", "got null"]),
        ("seed=-1", ["seed must be at least 0", "got -1"]),
        ("seed", ["an override must look like key=value", "'seed'"]),
        (".seed=1", ["an override must look like key=value", "'.seed=1'"]),
        ("seed={a", ["seed must be a YAML value", "'{a'", "put text in quotes"]),
        ("seed=010", ["seed must be a whole number, got '010'; write 10 "]),
        ("seed='8'", ["seed must be a whole number, got '8'; write 8 without quotes"]),
        ("seed=1:30", ["seed must be a whole number, got '1:30'"]),
        ("seed=1e400", ["seed must be a whole number, got 1e400"]),
        ("seed=" + "9" * 5000, ["seed must be a whole number, got '999", "... (5002 characters)"]),
        ("seed=!!int abc", ["seed must be a whole number, got '!!int abc'"]),
        ("optimizer.learning_rate=1,000", ["optimizer.learning_rate must be a number, got '1,000'; write 1000 "]),
        ("rewards={name: world, weight: 010}", ["rewards.train.0.weight must be a number, got '010'; write 10"]),
        ("model.vae_tiling=1", ["model.vae_tiling must be true or false, got 1"]),
        ("output_dir=true", ["output_dir must be text, got true"]),
        (
            "output_dir='a' #b",
            ["output_dir must be a YAML value", "('#b' stands after its end); put all of it in quotes"],
        ),
        ("output_dir=caf\udce9", ["output_dir must be a YAML value", "half a character"]),
        ("prompts.train={[a, b]: 1}", ["prompts.train must be a YAML value", "a key must be one word"]),
        ("rollout=" + "[" * 100_000, ["rollout must be a YAML value", "nested more than 50 deep); write it flatter"]),
        (
            "tracking={name: wandb, options: {a: no}}",
            ["tracking.0.options must say true or false", "got no; write false"],
        ),
        ("algorithm=a.b", ["algorithm.name names the module 'a.b', which Python cannot find"]),
        ("algorithm=..", ["algorithm.name names the module '..', which Python cannot find"]),
        ("algorithm=os.path", ["algorithm.name must be a module with a class Config of AlgorithmConfig", "'os.path'"]),
        ("algorithm=ngrpo_lora.config.algorithms.nft", ["must be a module with a class Algorithm beside its Config"]),
        ("algorithm.advantage_p=0.01", ["algorithm.advantage_p must be at least 0.1, got 0.01"]),
    ],
)
def test_a_bad_override_is_refused_with_rule_and_value(override: str, parts: list[str]):
    text = message(override)
    assert len(text.splitlines()) == 1, text
    for part in parts:
        assert part in text


def test_all_problems_are_reported_at_once():
    text = message("rollout.group_size=1", "rollout.num_stps=3", "optimizer.eps=0")
    assert [line.split(" ")[0] for line in sorted(text.splitlines())] == [
        "optimizer.eps",
        "rollout.group_size",
        "unknown",
    ]
