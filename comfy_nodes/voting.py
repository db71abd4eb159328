"""Votes in the graph: the node that has a run ask you, and the run's page at ComfyUI's own address.

The page of `ngrpo_lora.voting` listens at an address of this machine. ComfyUI passes on to it what is asked of
/ngrpo/vote/TOKEN/: so whoever reaches ComfyUI, from another machine or through a tunnel, reaches the page too, and
`web/vote.js` may show it in a frame at the node, which ComfyUI allows of pages of its own alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from aiohttp import ClientError, ClientSession, web
from comfy.cli_args import args
from comfy_api.latest import io
from server import PromptServer

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import ConfigError

from ._api import Node, checked, listed, schema, show_progress
from .rewards import Entries, Rewards, chain_input, entry, joined, settings_input, weight_input

if TYPE_CHECKING:
    from ngrpo_lora.voting.voting import Voting

YOU, ALONG, HEAD = "you", "you, and the head along", "the head alone"
ROUTE, EVENT = "/ngrpo/vote/{token}/{rest:.*}", "ngrpo.vote"
AGAIN_S = 1.0
"""How often browsers hear of a page: one that is opened later, or that had slept, shows it too."""
IDLE_MIN = 10
"""After how many minutes without a vote the node says how long it has been."""


class VoteReward(Node):
    """Node that has a run ask a person."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "VoteReward",
            display_name="Vote Reward",
            description="Teaches your taste: Train shows the candidates of a prompt, waits until you have said which "
            "are better, and learns from it. The page is in the Train node, and behind its link in a tab of its own. "
            "Close it whenever you like: the run waits. Cancel keeps all votes, and queueing again asks nothing twice.",
            inputs=[
                io.String.Input(
                    "votes",
                    default="",
                    tooltip="File of the votes, NAME.jsonl below ComfyUI's output folder, for several runs one after "
                    "another; empty: votes.jsonl in the run's folder, output/ngrpo/NAME. Pictures are kept beside it.",
                ),
                io.Combo.Input(
                    "who_votes",
                    options=[YOU, ALONG, HEAD],
                    default=YOU,
                    tooltip=f"A head learns from your votes. {ALONG}: it says what it expects of pictures of which you "
                    f"said nothing, once it is better than chance. {HEAD}: nobody is asked, votes must name earlier "
                    "ones; so may Score and Compare judge too.",
                ),
                io.Float.Input(
                    "wait_minutes",
                    default=0.0,
                    min=0.0,
                    max=10080.0,
                    step=1.0,
                    round=False,
                    tooltip="How long a group waits for your vote before it is left out; 0: as long as it takes.",
                ),
                io.Boolean.Input(
                    "phone",
                    default=False,
                    tooltip="Also a page of its own for all machines of your network, whose address with a token the "
                    "node shows. Not needed where your phone reaches ComfyUI itself (--listen).",
                ),
                io.Int.Input(
                    "port",
                    default=0,
                    min=0,
                    max=65535,
                    tooltip="Port of that page; 0: 8770, or a free one where that is taken.",
                ),
                weight_input(),
                settings_input(
                    "path: a CLIP by which the head reads pictures, as openai/clip-vit-large-patch14 for photographs; "
                    "undo_s: how long the last vote can be taken back; label."
                ),
                chain_input(),
            ],
            outputs=[Rewards.Output(display_name="rewards")],
            search_aliases=["human feedback", "preference", "rate", "reward", "rlhf", "taste"],
            advanced=["port", "phone"],
        )

    @classmethod
    def entry(
        cls, votes: str, who_votes: str, wait_minutes: float, phone: bool, port: int, weight: float, settings: str
    ) -> RewardConfig:
        """Make the checked reward that the widgets describe."""
        listed("who_votes", who_votes, [YOU, ALONG, HEAD])
        if who_votes == HEAD and not votes.strip():
            raise ConfigError(
                f"votes must name a file of earlier votes where who_votes is {HEAD!r}, got none; those of a run are "
                "ngrpo/NAME/votes.jsonl"
            )
        if not wait_minutes >= 0:
            raise ConfigError(f"wait_minutes must be at least 0, got {wait_minutes:g}; 0 waits as long as it takes")
        own = {
            "votes": votes.strip() or None,
            "ask": who_votes != HEAD,
            "head_votes": who_votes == ALONG,
            "timeout_s": 60 * wait_minutes or None,
            "host": "0.0.0.0" if phone else "127.0.0.1",
            "port": port or None,
        }
        return entry("vote", weight, settings, own)

    @classmethod
    def validate_inputs(
        cls,
        votes: str = "",
        who_votes: str = YOU,
        wait_minutes: float = 0.0,
        phone: bool = False,
        port: int = 0,
        weight: float = 1.0,
        settings: str = "",
    ) -> bool:
        return checked(cls.entry, votes, who_votes, wait_minutes, phone, port, weight, settings)

    @classmethod
    def fingerprint_inputs(cls, votes: str | None, who_votes: str | None, **others: Any) -> float:
        """Fingerprint: where the head judges, it is another one after each vote."""
        if who_votes != HEAD or not votes:
            return 0
        path = Path(folder_paths.get_output_directory()) / votes.strip()
        return path.stat().st_mtime if path.is_file() else 0

    @classmethod
    def execute(
        cls,
        votes: str,
        who_votes: str,
        wait_minutes: float,
        phone: bool,
        port: int,
        weight: float,
        settings: str,
        rewards: Entries | None = None,
    ) -> io.NodeOutput:
        chosen = cls.entry(votes, who_votes, wait_minutes, phone, port, weight, settings)
        return io.NodeOutput(joined(rewards, chosen))


def opened() -> dict[str, str]:
    """Own addresses of the pages that are open, by their tokens; one for all copies of this package in ComfyUI."""
    return vars(PromptServer.instance).setdefault("ngrpo_vote_pages", {})


class ShownPage:
    """The page of a run, as it is shown at its node from when this is made until `close`."""

    def __init__(self, voting: Voting, node: type[io.ComfyNode]):
        from ngrpo_lora.voting.server import hosts_of

        self.voting, self.node, self.next_s, self.asks = voting, node, 0.0, False
        self.path = f"/ngrpo/vote/{voting.token}/"
        own, *self.others = voting.server.addresses
        opened()[voting.token] = own
        server = PromptServer.instance
        scheme = "https" if args.tls_keyfile and args.tls_certfile else "http"
        self.address = f"{scheme}://{hosts_of(server.address)[-1]}:{server.port}{self.path}"

    def show(self, doing: str) -> None:
        """Tell all browsers where it is and, while groups wait, how many and for how long; at most once a second."""
        now = time.monotonic()
        if now < self.next_s:
            return
        self.next_s = now + AGAIN_S
        self._tell({"path": self.path, "others": self.others})
        waiting, idle_min = len(self.voting.booth.waiting), int(self.voting.idle_s // 60)
        if waiting:
            said = f"{doing}: {waiting} group{'s' if waiting > 1 else ''} to vote on"
            idle = f", no vote for {idle_min} min; the run waits" if idle_min >= IDLE_MIN else ""
            show_progress(f"{said}{idle}\n{' or '.join([self.address, *self.others])}", self.node)
        elif self.asks:
            show_progress(f"{doing}: learning from your votes", self.node)
        self.asks = waiting > 0

    def close(self) -> None:
        """Show it no longer."""
        opened().pop(self.voting.token, None)
        self._tell({"path": None})

    def _tell(self, content: dict[str, Any]) -> None:
        PromptServer.instance.send_sync(EVENT, {"node": self.node.hidden.unique_id} | content)


def add_route(server: PromptServer) -> None:
    """Have a server pass on what is asked of pages, while ComfyUI loads its nodes."""
    if all(getattr(route, "path", "") != ROUTE for route in server.routes):  # of another copy
        server.routes.get(ROUTE)(pass_on)
        server.routes.post(ROUTE)(pass_on)


async def pass_on(request: web.Request) -> web.Response:
    """Answer as the page itself does."""
    own, rest = opened().get(request.match_info["token"]), request.match_info["rest"]
    if own is None:
        return web.Response(status=404, text="There is no such voting page any more: its run has ended.")
    try:
        async with (
            ClientSession() as session,
            session.request(request.method, own + rest, data=await request.read()) as answer,
        ):
            kept = {name: value for name, value in answer.headers.items() if name not in ("Content-Length", "Server")}
            return web.Response(status=answer.status, body=await answer.read(), headers=kept)
    except ClientError:  # it has just been closed
        return web.Response(status=502, text="The voting page does not answer; its run has ended.")


NODES: list[type[io.ComfyNode]] = [VoteReward]
