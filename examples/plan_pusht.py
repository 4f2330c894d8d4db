"""Learn the effect of actions in PushT of gymnasium, and plan: record episodes, train, play.

    pip install 'vjepa-pretrain[worlds]'
    python examples/plan_pusht.py record pusht 300
    vjepa shard pusht --spec pusht/spec.yaml --out runs/pusht/shards
    vjepa train lewm_two_room --out runs/pusht/lewm name=pusht 'data.sources=[{shards: runs/pusht/shards}]' steps=2000
    python examples/plan_pusht.py play runs/pusht/lewm pusht.mp4

`vjepa plan runs/pusht/lewm --world gym:gym_pusht/PushT-v0 --against random` counts successes.
"""

import sys
from pathlib import Path

import gym_pusht  # pyright: ignore[reportMissingImports]
import gymnasium
import numpy as np
import yaml
from PIL import Image

import vjepa
from vjepa.planning import Policy
from vjepa_data.rng import generator
from vjepa_data.synthetic.physics import write_video

PX, STEPS = 64, 100
ENVIRONMENT = f"{gym_pusht.__name__}/PushT-v0"
SIGNALS = {"action": {"columns": ["x", "y"], "units": ["px", "px"], "kind": "action", "combine": "last"}}


def picture(env: gymnasium.Env) -> np.ndarray:
    """Return the current frame."""
    return np.asarray(Image.fromarray(np.asarray(env.render())).resize((PX, PX), Image.Resampling.BOX))


def record(folder: str, episodes: str) -> None:
    """Write episodes of an agent that goes to random places, mostly near the block, and so pushes it."""
    out, env = Path(folder), gymnasium.make(ENVIRONMENT, render_mode="rgb_array", disable_env_checker=True)
    out.mkdir(parents=True)
    spec = {"name": "pusht", "encode": {"short_side_px": PX}, "signals": SIGNALS}
    (out / "spec.yaml").write_text(yaml.safe_dump(spec))
    for episode in range(int(episodes)):
        rng = generator(0, "pusht", episode)
        _, info = env.reset(seed=episode)
        frames, actions, target = [picture(env)], [], info["pos_agent"]
        for step in range(STEPS):
            if step % 8 == 0:
                near = info["block_pose"][:2] + rng.normal(0, 60, 2)
                target = near if rng.random() < 0.7 else rng.uniform(0, 512, 2)
            action = np.clip(info["pos_agent"] + np.clip(target - info["pos_agent"], -60, 60), 0, 512)
            info = env.step(action)[-1]
            frames.append(picture(env))
            actions.append(action)
        write_video(out / f"{episode:06d}.mp4", np.stack(frames), fps=10)
        np.save(out / f"{episode:06d}.action.npy", np.asarray(actions, np.float32))
    print(f"{episodes} episodes in {out}")


def play(run: str, film: str, episodes: str = "3") -> None:
    """Plan towards the picture of a block at its goal, and film it beside that picture."""
    model, env = vjepa.load(run), gymnasium.make(ENVIRONMENT, render_mode="rgb_array", disable_env_checker=True)
    policy = Policy(model, low=np.zeros(2), high=np.full(2, 512.0), horizon=16, execute=4)
    env.reset(seed=0)
    env.reset(seed=0, options={"reset_to_state": [48.0, 48.0, *env.unwrapped.goal_pose]})  # pyright: ignore
    goal, pictures = picture(env), []
    for episode in range(int(episodes)):
        policy.reset(episode)
        env.reset(seed=1_000_000 + episode)
        best = 0.0
        for _ in range(STEPS):
            frame = picture(env)
            pictures.append(np.concatenate((frame, goal), axis=1))
            _, reward, *_ = env.step(policy.act(frame, goal))
            best = max(best, float(reward))
        print(f"episode {episode}: the block covered at most {best:.0%} of what a success covers")
    write_video(Path(film), np.stack(pictures), fps=10)


if __name__ == "__main__":
    {"record": record, "play": play}[sys.argv[1]](*sys.argv[2:])
