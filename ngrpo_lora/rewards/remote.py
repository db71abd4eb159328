"""A reward that runs elsewhere, on `ngrpo reward-server`: another machine, another environment, another licence.

    gpu-host$ NGRPO_REWARD_TOKEN=... ngrpo reward-server ocr --host 0.0.0.0
    rewards.train: [{name: remote, url: http://gpu-host:8765, reward: ocr}]

Nothing is lost on the way: images travel as PNG, scores with all their digits. The protocol is that of
`ngrpo_lora/scoring/server.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import Field

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards._http import PROTOCOL, TOKEN_ENV, Url, encode_png

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

FIRST_CONTACT_S = 10.0


class Config(RewardConfig, frozen=True):
    """Settings of a remote reward: the address of a server, and which of its rewards to ask."""

    url: Url = Field(default="http://localhost:8765", description="Address of a reward server.")
    reward: str | None = Field(default=None, description="The reward's name there; null: the only one there.")
    token_env: str = Field(
        default=TOKEN_ENV,
        min_length=1,
        description="Environment variable that holds the server's token, if it has one.",
    )
    max_retries: int = Field(
        default=5, ge=0, description="Further attempts, ever longer apart, while the server is busy or gone."
    )
    batch_size: int | None = Field(default=16, ge=1)


def Reward(config: Config, device: str) -> BatchReward | GroupReward:
    """Make a reward that is called as the server's: with whole groups where that judges groups, else with batches.

    Raises:
        UserError: no such server, a wrong token, or no such reward.
    """
    client = Client(config)
    return GroupReward(client) if client.form == "group" else BatchReward(client)


class BatchReward:
    """Asks a server for the scores of B images for B prompts."""

    def __init__(self, client: Client):
        self.client = client

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> list[float]:
        """B scores, NaN where the server has none; raises what `Client.score` raises."""
        return self.client.score(images, prompts, metadata, group_size=1)


class GroupReward:
    """Asks a server for the scores of all G candidates of a prompt."""

    def __init__(self, client: Client):
        self.client = client

    def __call__(self, images: Sequence[Image.Image], prompt: str, metadata: dict[str, Any]) -> list[float]:
        """G scores, NaN where the server has none; raises what `Client.score` raises."""
        size = len(images)
        return self.client.score(images, [prompt] * size, [metadata] * size, group_size=size)


class Client:
    """A connection to one reward of a server, with retries while the server is busy or gone."""

    def __init__(self, config: Config):
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        self.config = config
        self.session = requests.Session()
        self.session.auth = self.authorized
        self.name, self.form = self.find_reward()  # at once or not at all: only scores are asked for again
        retry = Retry(
            total=config.max_retries,
            backoff_factor=0.5,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
        )
        self.session.mount(config.url, HTTPAdapter(max_retries=retry))

    def authorized(self, request: PreparedRequest) -> PreparedRequest:
        """Add the token to a request; as `auth` of the session this also keeps ~/.netrc out."""
        if token := os.environ.get(self.config.token_env):
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    def find_reward(self) -> tuple[str, str]:
        """Contact the server and return the reward's name and form; UserError where either is missing."""
        import requests

        who, url, wanted = f"reward {self.config.key}", self.config.url, self.config.reward
        try:
            response = self.session.get(f"{url}/health", timeout=FIRST_CONTACT_S)
        except requests.RequestException as error:
            raise UserError(
                f"{who} reaches no server at {url} ({error}); start one with `ngrpo reward-server`, or correct url"
            ) from None
        if response.status_code in (401, 403):
            raise UserError(
                f"{who}: {url} refuses the token (status {response.status_code}); put the server's into the "
                f"environment variable {self.config.token_env}"
            )
        match _json(response):
            case {"protocol": int(protocol), "rewards": {**offered}} if protocol == PROTOCOL:
                pass
            case {"protocol": protocol, "rewards": _}:
                raise UserError(
                    f"{who}: {url} speaks protocol {protocol}, this client {PROTOCOL}; update the older one"
                )
            case _:
                raise UserError(
                    f"{who} needs a server started with `ngrpo reward-server`, but {url}/health answers status "
                    f"{response.status_code}, {response.text!r:.200}; correct url"
                )
        names = [str(name) for name in offered]
        if wanted is None and len(names) != 1:
            raise UserError(f"{who} needs to know which reward to ask for; set reward to one of {', '.join(names)}")
        if wanted is not None and wanted not in names:
            raise UserError(
                f"{who}: reward must be one of {', '.join(names)} at {url}, got {wanted!r}"
                f"{registry.nearest(wanted, names)}"
            )
        name = wanted or names[0]
        return name, str(offered[name])

    def score(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        group_size: int,
    ) -> list[float]:
        """Ask for the scores of N images: N numbers, NaN where the server has no score.

        Raises:
            RuntimeError: the server answers something else.
            requests.RequestException: the server did not answer at any attempt.
        """
        pictures = [{name: one for name, one in row.items() if isinstance(one, Image.Image)} for row in metadata]
        encoded = {id(one): encode_png(one) for row in pictures for one in row.values()}  # a group shares its source
        request = {
            "reward": self.name,
            "images": [encode_png(image) for image in images],
            "prompts": list(prompts),
            "metadata": [{k: v for k, v in row.items() if not isinstance(v, Image.Image)} for row in metadata],
            "group_size": group_size,
        }
        if encoded:
            request["pictures"] = [{name: encoded[id(one)] for name, one in row.items()} for row in pictures]
        url = f"{self.config.url}/score"
        response = self.session.post(url, json=request, timeout=(FIRST_CONTACT_S, self.config.timeout_s))
        match _json(response):
            case {"scores": [*scores]} if response.ok and len(scores) == len(images) and all(map(_is_score, scores)):
                return [math.nan if score is None else float(score) for score in scores]
            case {"error": str(reason)}:
                raise RuntimeError(f"{url} answers status {response.status_code}: {reason}")
            case _:
                raise RuntimeError(
                    f"{url} must answer with {len(images)} scores, got status {response.status_code}, "
                    f"{response.text!r:.200}"
                )


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _json(response: Response) -> Any:
    """The JSON of a response, None where it is not JSON."""
    try:
        return response.json()
    except ValueError:
        return None
