"""The premise of ABS, examined: python benchmark/premise.py runs/ --out report/

Does low divergence make a large batch harmless? Folders given hold runs at any depth, or are the --out of an earlier call,
whose tables are read again. Written are premise.md, branches.png and, each with what could be measured, these tables:

* branches.csv: branches of a run (benchmark/branch.sh) by rollout length L. Return: mean of the games that ended in the second
  half of the branch (of the parent: in its last tenth). Score: mean of the final games. TD error: mean of
  (r + gamma max Q(s', .) - Q(s, a))^2 over held-out games, which the parent plays with 1 % random actions, the same for all
  its branches. Slope over log2 L: least squares with a level for each parent, outcomes divided by their parent's mean; its
  95 % interval (t) takes branches as replicates, so it is about these parents. One slope per parent stands beside it.
* churn.csv: divergence that an update of a parent causes; floor: that between two updates of one rollout which differ only
  in the order of minibatches, so how much of the divergence is noise of the update itself.
* signs.csv: Spearman's rank correlation, over the measurements of a run, of divergence with other signs that the policy moves
  and with the step, which all follow; partial: with the step held fixed.
"""

import argparse
import copy
import itertools
import runpy
from functools import cache, partial
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from report import find_runs, markdown, normalised, read_json, read_scalars
from scipy import stats

SIGNS = ["losses/explained_variance", "losses/td_loss", "gns/b_simple"]
OUTCOMES = {
    "return": "return in the second half",
    "score": "score of the final games",
    "td_error": "TD error in held-out games",
}
load_script = cache(runpy.run_path)


class Player:
    """A run's script and network as of its checkpoint, with games that it has never seen."""

    def __init__(self, run, num_envs=None, max_episode_steps=10**9):
        self.script = load_script(str(next(run.glob("*.py"))))
        self.checkpoint = self.script["load_checkpoint"](run / "checkpoint.pt")
        self.args = self.script["Args"](**self.checkpoint["args"])
        self.args.max_episode_steps = min(self.args.max_episode_steps, max_episode_steps)
        self.workers = self.script["Workers"](torch.device("cpu"), joblib.cpu_count())
        seeds = self.script["env_seeds"](self.args.seed, num_envs or self.args.num_envs, evaluation=True)
        self.envs = self.script["AtariEnvs"](self.args, seeds, joblib.cpu_count())
        self.network = self.load_network(run)
        self.rng = np.random.default_rng(self.args.seed)

    def load_network(self, run):
        content = self.script["load_checkpoint"](run / "checkpoint.pt")
        network = self.script["QNetwork"](self.envs.num_actions, getattr(torch, content["precision"]))
        network.load_state_dict(content["network"])
        return network

    def q_values(self, networks, observations):
        """(networks, n, num_actions) in float32."""
        return torch.stack([self.workers.forward(network, observations, torch.float32) for network in networks])

    def act(self, q_values, epsilon):
        """Epsilon-greedy actions (n,) for Q-values (n, num_actions)."""
        explore = self.rng.random(len(q_values)) < epsilon
        return np.where(explore, self.rng.integers(self.envs.num_actions, size=len(q_values)), q_values.argmax(1).numpy())


def held_out_td_errors(parent, branches, games=32):
    """(mean squared TD error of the parent and of each branch, number of transitions) in games that the parent plays, at most
    2,000 steps each."""
    player = Player(parent, games, max_episode_steps=2000)
    networks = [player.network, *map(player.load_network, branches)]
    active, errors = np.arange(games, dtype=np.int32), []
    q_values = player.q_values(networks, player.envs.reset())
    while len(active):
        actions = player.act(q_values[0], epsilon=0.01)
        player.envs.send(actions, active)
        observations, rewards, terminations, _, _, ended = player.envs.recv()
        chosen = q_values[:, torch.arange(len(active)), torch.from_numpy(actions)]
        q_values = player.q_values(networks, observations)
        targets = torch.from_numpy(rewards) + player.args.gamma * q_values.max(2).values * torch.from_numpy(~terminations)
        errors.append((targets - chosen) ** 2)
        playing = ~np.isin(active, [game for *_, game in ended])
        active, q_values = active[playing], q_values[:, torch.from_numpy(playing)]
    errors = torch.cat(errors, 1)
    return errors.mean(1).tolist(), errors.shape[1]


def collect(player, observations, length):
    """A rollout of the network, as the script trains on it: (observations, actions, returns, weights), and what comes next."""
    steps, values = [], []
    for t in range(length + 1):
        (q_values,) = player.q_values([player.network], observations)
        values.append(q_values.max(1).values)
        if t < length:
            actions = player.act(q_values, player.args.end_e)
            player.envs.send(actions)
            following, *outcome, _ = player.envs.recv()
            steps.append([torch.from_numpy(x) for x in (observations, actions, *outcome)])
            observations = following
    obs, actions, rewards, terminations, dones, is_reset = map(torch.stack, zip(*steps, strict=True))
    ends, discounts = (terminations, dones, torch.stack(values[1:])), (player.args.gamma, player.args.q_lambda)
    returns = player.script["q_lambda_returns"](rewards, *ends, *discounts)
    return [x.flatten(0, 1) for x in (obs, actions, returns, (~is_reset).float())], observations


def update(player, batch, epochs, seed):
    """The network after one update on a batch as the script makes it, with minibatches in the order that the seed gives."""
    network, generator = copy.deepcopy(player.network), torch.Generator().manual_seed(seed)
    parameters, weights = list(network.parameters()), batch[3]
    optimizer = torch.optim.RAdam(parameters)
    optimizer.load_state_dict(copy.deepcopy(player.checkpoint["optimizer"]))
    for _ in range(epochs):
        for inds in torch.randperm(len(weights), generator=generator).tensor_split(player.args.num_minibatches):
            minibatch = *batch[:3], weights / weights[inds].sum().clamp(min=1)
            player.workers.gradient(partial(player.script["td_loss"], network, minibatch), parameters, inds)
            torch.nn.utils.clip_grad_norm_(parameters, player.args.max_grad_norm)
            optimizer.step()
    return network


def churn_floor(parent, rollouts=8, warm_up=512):
    """Rows of churn.csv: what an update on a rollout of the parent changes, and what the order of minibatches does."""
    player = Player(parent)
    args, length = player.args, round(player.checkpoint["rollout_length"])
    epochs = max(args.update_epochs, args.update_epochs * length // args.num_steps if args.scale_epochs else 0)
    observations = player.envs.reset()
    for _ in range(0, warm_up, length):
        _, observations = collect(player, observations, length)
    for i in range(rollouts):
        batch, observations = collect(player, observations, length)
        states = batch[0][torch.multinomial(batch[3], min(args.reference_batch_size, int(batch[3].sum())))]
        networks = [player.network, update(player, batch, epochs, seed=2 * i), update(player, batch, epochs, seed=2 * i + 1)]
        before, one, other = player.q_values(networks, states).argmax(2)
        divergence = player.script["behavioral_divergence"]
        floor, changed = divergence(one, other), (divergence(one, before) + divergence(other, before)) / 2
        yield {"parent": parent.name, "rollout_length": length, "divergence": changed, "floor": floor}


def late_return(run, start):
    """Mean return of the training games that ended after an agent step."""
    steps, returns = read_scalars(run)["charts/episodic_return"]
    return returns[steps > start].mean()


def branch_rows(folders):
    """Rows of branches.csv for the branches among run folders."""
    parents = {}
    for folder in folders:
        args, evaluation = read_json(folder / "args.json"), folder / "eval.json"
        if args.get("init_from") and args["total_timesteps"] > 0 and evaluation.exists():
            parents.setdefault(Path(args["init_from"]).parent, []).append((folder, args, read_json(evaluation)))
    for parent, branches in parents.items():
        (parent_error, *errors), transitions = held_out_td_errors(parent, [folder for folder, *_ in branches])
        own, parent_score = read_json(parent / "args.json"), read_json(parent / "eval.json")["mean"]
        parent_return = late_return(parent, 0.9 * own["total_timesteps"])
        for (folder, args, scores), error in zip(branches, errors, strict=True):
            row = {"parent": parent.name, "env_id": args["env_id"], "seed": args["seed"], "rollout_length": args["num_steps"]}
            row |= {"minibatches": args["num_minibatches"], "parent_minibatches": own["num_minibatches"]}
            row |= {"score": scores["mean"], "standard_error": scores["std"] / scores["episodes"] ** 0.5, "td_error": error}
            row |= {"return": late_return(folder, args["total_timesteps"] / 2), "parent_return": parent_return}
            yield row | {"parent_score": parent_score, "parent_td_error": parent_error, "transitions": transitions}


def families(branches):
    """Branches by family; those at the base, where the minibatches of both are the same, are in both."""
    size, constant = (
        branches["rollout_length"] / branches["minibatches"],
        branches["minibatches"] == branches["parent_minibatches"],
    )
    proportional = size.isin(size[~constant])
    named = [branches[constant].assign(family="constant m"), branches[proportional].assign(family="m proportional to L")]
    return pd.concat(named, ignore_index=True)


def slope(own, outcome):
    """(slope, low, high) of an outcome over log2 L, in percent of the parents' means per doubling of L."""
    table = pd.DataFrame({"x": np.log2(own["rollout_length"]), "y": own[outcome], "parent": own["parent"]})
    if outcome != "td_error":
        table["y"] = normalised(own["env_id"], own[outcome])
    table["y"] = 100 * table["y"] / table.groupby("parent")["y"].transform("mean")
    x, y = (table[c] - table.groupby("parent")[c].transform("mean") for c in "xy")
    b, freedom = (x * y).sum() / (x * x).sum(), len(table) - table["parent"].nunique() - 1
    half = stats.t.ppf(0.975, freedom) * (((y - b * x) ** 2).sum() / freedom / (x * x).sum()) ** 0.5 if freedom > 0 else np.nan
    return b, b - half, b + half


def slopes(branches):
    """Table of slopes by family and outcome: over all parents, and of each."""
    rows = []
    for (family, own), outcome in itertools.product(branches.groupby("family"), OUTCOMES):
        groups = [("all", own), *own.groupby("parent")]
        names = "percent_per_doubling", "percent_per_doubling_low", "percent_per_doubling_high"
        for parent, some in groups:
            row = {"family": family, "outcome": outcome, "parent": parent, "branches": len(some)}
            rows.append(row | dict(zip(names, slope(some, outcome), strict=True)))
    return pd.DataFrame(rows)


def draw(branches, table, path):
    """Outcomes over L, a column per family, a line per parent; dashed: the parent itself."""
    figure, axes = plt.subplots(3, 2, figsize=(9, 9), sharex=True, sharey="row", layout="constrained")
    for (outcome, label), row in zip(OUTCOMES.items(), axes, strict=True):
        for (family, own), axis in zip(branches.groupby("family"), row, strict=False):
            look = {"hue": "parent", "style": "parent", "markers": True, "palette": "colorblind", "errorbar": ("pi", 100)}
            sns.lineplot(own, x="rollout_length", y=outcome, ax=axis, err_style="bars", legend=axis is axes[0, 0], **look)
            for (_, some), color in zip(own.groupby("parent"), sns.color_palette("colorblind"), strict=False):
                axis.axhline(some[f"parent_{outcome}"].iloc[0], color=color, linestyle=":", linewidth=1)
            about = table[(table["family"] == family) & (table["outcome"] == outcome) & (table["parent"] == "all")].iloc[0]
            low, high = about["percent_per_doubling_low"], about["percent_per_doubling_high"]
            axis.set_title(
                f"{family}: {about['percent_per_doubling']:+.1f} % per doubling ({low:+.1f} to {high:+.1f})", size=10
            )
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(own["rollout_length"].unique()), sorted(own["rollout_length"].unique()))
            axis.set(xlabel="rollout length L of the branch, steps", ylabel=label)
    figure.savefig(path, dpi=110)


def sign_rows(folders):
    """Rows of signs.csv for the runs among folders that measured divergence."""
    for folder in folders:
        args, scalars = read_json(folder / "args.json"), read_scalars(folder)
        for name in SIGNS if "abs/divergence" in scalars and not args.get("init_from") else ():
            if name in scalars:
                table = pd.DataFrame({n: pd.Series(scalars[n][1], scalars[n][0]) for n in ("abs/divergence", name)})
                table = table.replace(np.inf, np.nan).dropna().rename_axis("step").reset_index()
                step_divergence, step_sign, both = stats.spearmanr(table).statistic[[0, 0, 1], [1, 2, 2]]
                partial = (both - step_divergence * step_sign) / ((1 - step_divergence**2) * (1 - step_sign**2)) ** 0.5
                row = {"run": folder.name, "env_id": args["env_id"], "sign": name, "measurements": len(table)}
                row |= {"divergence_and_sign": both, "divergence_and_step": step_divergence, "sign_and_step": step_sign}
                yield row | {"partial": partial}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="runs, or folders that hold runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    folders = [run for path in args.runs for run in find_runs(path) if (run / "args.json").exists()]
    parents = sorted({Path(p).parent for p in (read_json(run / "args.json").get("init_from") for run in folders) if p})
    measured = {"branches": branch_rows(folders), "signs": sign_rows(folders)}
    measured["churn"] = (row for parent in parents for row in churn_floor(parent))
    args.out.mkdir(parents=True, exist_ok=True)
    tables = {}
    for name, rows in measured.items():
        stored = [pd.read_csv(path / f"{name}.csv") for path in args.runs if (path / f"{name}.csv").exists()]
        tables[name] = pd.concat([*stored, pd.DataFrame(rows)], ignore_index=True)
        if len(tables[name]):
            tables[name].to_csv(args.out / f"{name}.csv", index=False, float_format="%.5g")
    sections = {}
    if len(tables["branches"]):
        branches = families(tables["branches"])
        sections["Slope over log2 L"] = table = slopes(branches)
        outcomes = branches.groupby(["family", "parent", "rollout_length"])[[*OUTCOMES]]
        sections["Branches: mean over seeds"] = outcomes.mean().reset_index()
        draw(branches, table, args.out / "branches.png")
    if len(tables["churn"]):
        sections["Churn floor: mean over rollouts"] = tables["churn"].groupby("parent").mean().reset_index()
    if len(tables["signs"]):
        columns = ["divergence_and_sign", "divergence_and_step", "sign_and_step", "partial"]
        signs = tables["signs"].groupby(["env_id", "sign"])[columns].agg(["mean", "min", "max"])
        signs.columns = [f"{name}{dict(mean='', min='_low', max='_high')[statistic]}" for name, statistic in signs.columns]
        runs = tables["signs"].groupby(["env_id", "sign"]).size().rename("runs")
        sections["Rank correlation over training: mean, lowest and highest run"] = pd.concat(
            [runs, signs], axis=1
        ).reset_index()
    if not sections:
        parser.error("these folders hold neither branches (benchmark/branch.sh) nor runs with points of abs/divergence")
    text = "\n\n".join(f"# {title}\n\n{markdown(table)}" for title, table in sections.items())
    (args.out / "premise.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
