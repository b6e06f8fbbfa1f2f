"""A picture of two players in the same episodes against the same partners: plan.py's planner beside a trained policy.

    python benchmark/plan_gif.py --plan runs/PLAN --policy runs/SELFPLAY --out docs/img/plan_hare_hunters.gif

Both start alike; from where their actions differ their episodes do too. Seat 0 is theirs (player 0, red).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

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


@torch.no_grad()
def film(args: Args, response: str) -> list[list[tuple[np.ndarray, float]]]:
    """Of each episode its pictures, with what seat 0 has got by then."""
    setting = Setting(args.env_id, args.env_id, {}, ((args.partners,),))
    episodes = []
    for episode in range(args.episodes):
        seed = args.seed + episode
        torch.manual_seed(seed)
        env = make_vec_env(args.env_id, 1, "cpu", seed, backend="batched")
        player = make_response(response, env, setting, (args.partners,))
        partners = Partners((args.partners,), env, make_policy, seed)
        memory = player.initial_state(1)
        step = env.reset(seed)
        frames = [(env.picture(step.state[0].numpy()), 0.0)]
        got = 0.0
        while not step.episode_over.any():
            actions, memory = player.act(step, memory)
            actions = partners.play(step, actions)
            memory = player.remember(step, actions, memory)
            step = env.step(actions)
            got += step.rewards[0, 0].item()
            frames.append((env.picture(step.final_state[0].numpy()), got))
        episodes.append(frames)
    return episodes


def draw(args: Args, name: str, picture: np.ndarray, got: float, total: float) -> Image.Image:
    """One picture under a line of text."""
    canvas = Image.new("RGB", (args.side, args.side + HEADER), "white")
    canvas.paste(Image.fromarray(picture).resize((args.side, args.side), Image.LANCZOS), (0, HEADER))
    text = f"{name}: {got:.1f}   all: {total:.1f}"
    ImageDraw.Draw(canvas).text((4, 5), text, fill="black", font=ImageFont.load_default(14))
    return canvas


def main(args: Args) -> None:
    films = {"planner": film(args, f"plan:{args.plan}"), "self-play": film(args, args.policy)}
    pictures, totals = [], dict.fromkeys(films, 0.0)
    for episode in range(args.episodes):
        both = {name: episodes[episode] for name, episodes in films.items()}
        length = max(map(len, both.values())) + 2  # the end stays in view
        for t in range(length):
            row = Image.new("RGB", (2 * args.side + 10, args.side + HEADER), "white")
            for k, (name, frames) in enumerate(both.items()):
                picture, got = frames[min(t, len(frames) - 1)]
                panel = draw(args, name, picture, got, totals[name] + got)
                row.paste(panel, (k * (args.side + 10), 0))
            pictures.append(row.quantize(48))
        for name, frames in both.items():
            totals[name] += frames[-1][1]
    pictures[0].save(args.out, save_all=True, append_images=pictures[1:], duration=300, loop=0, optimize=True)
    print(f"{args.out}: {len(pictures)} pictures, {Path(args.out).stat().st_size // 1024} kB, returns {totals}")


if __name__ == "__main__":
    main(tyro.cli(Args))
