"""Rewards, one file each: `score(images, prompts, metadata) -> scores`, or a class `Reward` with settings of its own.

A file here holds either a function `score`, or `class Config(RewardConfig)` and `class Reward`, which is made with
`Reward(config, device)` and then called like a function. So is any function of yours, by `package.module:function` or
`file.py:function`. The names of the parameters say what is wanted, higher is better, NaN where there is no score:

    score(images, prompts, metadata)   B PIL images, B strings, B dictionaries -> B numbers
    score(image, prompt, metadata)     one of each -> a number
    score(images, prompt, metadata)    all G candidates of a prompt -> G numbers
    score(video, prompt, metadata)     all frames of one video -> a number

`prompt` and `metadata` may be left out, and all of them may be `async def`. `ngrpo_lora/scoring` calls them. A file
with `NEEDS_SOURCE = True` judges edits: each picture beside its source. One that is for certain prompts alone has a
function `reads`, which raises ValueError for all others: "a prompt must be ..., got ...".
"""
