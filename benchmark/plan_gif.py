"""A picture of two players in the same episodes against the same partners: plan.py's planner beside a trained policy.

    python benchmark/plan_gif.py --plan runs/PLAN --policy runs/SELFPLAY --out docs/img/plan_hare_hunters.gif

Both start alike; from where their actions differ their episodes do too. Seat 0 is theirs (player 0, red).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.adaptation import Setting, make_response
from envs import make_vec_env
from envs.players import Partners
from hyper_mappo import make_policy

HEADER = 26  # pixels above each picture


@dataclass
class Args:
    plan: str
    """run folder of plan.py"""
    policy: str
    """run folder of hyper_mappo.py"""
    env_id: str = "stag_hunt-4x4-4h1s"
    """environment"""
    partners: str = "nearest_hare:3"
    """who has the other seats"""
    episodes: int = 2
    """episodes one after the other"""
    seed: int = 1
    """of starts, partners and actions"""
    side: int = 200
    """pixels of each picture's side"""
    out: str = "plan.gif"
    """where the picture goes"""


class Frame(NamedTuple):
    picture: np.ndarray
    got: float  # by seat 0, in the episode so far


@torch.no_grad()
def film(args: Args, response: str, seed: int) -> list[Frame]:
    """One episode."""
    mix = (args.partners,)
    setting = Setting(args.env_id, args.env_id, {}, (mix,))
    torch.manual_seed(seed)
    env = make_vec_env(args.env_id, 1, "cpu", seed, backend="batched")
    player = make_response(response, env, setting, mix)
    partners = Partners(mix, env, make_policy, seed)
    memory = player.initial_state(1)
    step = env.reset(seed)
    got = 0.0
    frames = [Frame(env.render(), got)]
    while not step.episode_over.any():
        actions, memory = player.act(step, memory)
        actions = partners.play(step, actions)
        memory = player.remember(step, actions, memory)
        step = env.step(actions)
        got += step.rewards[0, 0].item()
        state = step.final_state[0].numpy()
        frames.append(Frame(env.picture(state), got))
    return frames


def draw(args: Args, name: str, frame: Frame, total: float) -> Image.Image:
    """One picture under a line of text."""
    canvas = Image.new("RGB", (args.side, args.side + HEADER), "white")
    picture = Image.fromarray(frame.picture)
    picture = picture.resize((args.side, args.side), Image.LANCZOS)
    canvas.paste(picture, (0, HEADER))
    ImageDraw.Draw(canvas).text(
        (4, 5),
        f"{name}: {frame.got:.1f}   all: {total:.1f}",
        fill="black",
        font=ImageFont.load_default(14),
    )
    return canvas


def side_by_side(args: Args, films: dict[str, list[Frame]], totals: dict[str, float]) -> list[Image.Image]:
    """Pictures of one episode of each, until the longer one is over."""
    gap = 10
    size = (2 * args.side + gap, args.side + HEADER)
    length = max(map(len, films.values())) + 2  # the end stays in view
    pictures = []
    for t in range(length):
        both = Image.new("RGB", size, "white")
        left = 0
        for name, frames in films.items():
            frame = frames[min(t, len(frames) - 1)]
            panel = draw(args, name, frame, totals[name] + frame.got)
            both.paste(panel, (left, 0))
            left += args.side + gap
        pictures.append(both.quantize(48))
    return pictures


def main(args: Args) -> None:
    players = {"planner": f"plan:{args.plan}", "self-play": args.policy}
    totals = dict.fromkeys(players, 0.0)
    pictures = []
    for episode in range(args.episodes):
        seed = args.seed + episode
        films = {name: film(args, player, seed) for name, player in players.items()}
        pictures += side_by_side(args, films, totals)
        for name, frames in films.items():
            totals[name] += frames[-1].got
    first, *others = pictures
    first.save(
        args.out,
        save_all=True,
        append_images=others,
        duration=300,
        loop=0,
        optimize=True,
    )
    size = Path(args.out).stat().st_size // 1024
    print(f"{args.out}: {len(pictures)} pictures, {size} kB, returns {totals}")


if __name__ == "__main__":
    main(tyro.cli(Args))
