"""The whole chain in one command: synthetic raw data, conversion, SpCL pre-training, fine-tuning, evaluation."""

import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.config import validate
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.files import make_folder
from dmosnet_jax.core.parallel import make_mesh, print_once
from dmosnet_jax.data.splits import Split, split_names
from dmosnet_jax.evaluation import ranking
from dmosnet_jax.recipes import scoring, spcl, supervised
from dmosnet_jax.recipes.network import build_model, fill_input
from dmosnet_jax.train.metrics import write_json

# What the stages take from the top of the config, so that one override reaches them all.
_SHARED = ("seed", "dataset", "data_dir", "image_size", "pixel_mean", "pixel_std", "data", "eval")


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; a second run goes on where the first was stopped.

    Returns:
        Scores by stage: `chance`, `untrained`, `pretrained`, `finetuned`, as in `results.json`.

    Raises:
        ConfigError: the conversion's packages are not installed.
        DataError: the conversion failed.
    """
    if jax.process_count() > 1:
        raise ConfigError("the quickstart runs in one process: start it without --distributed")
    make_folder(workdir)
    config = fill_input(config, None)
    with config.unlocked():
        config.data_dir = config.data_dir or str(workdir / "data")
    for name in ("pretrain", "finetune"):
        # Not when its turn comes.
        validate(_stage(config, name))
    _make_data(config)
    untrained = _untrained(config)
    stages: dict[str, Any] = {
        "chance": _chance(untrained.query, untrained.gallery, config.seed),
        "untrained": scoring.metrics({config.dataset: untrained}),
    }
    print_once("\n[2/3] pre-training without labels (SpCL)")
    stages["pretrained"] = spcl.run(_stage(config, "pretrain"), workdir / "pretrain")
    print_once("\n[3/3] fine-tuning with labels, from the pre-trained network")
    finetune = _stage(config, "finetune")
    finetune.pretrained = str(workdir / "pretrain")
    stages["finetuned"] = supervised.run(finetune, workdir / "finetune")
    write_json(workdir / scoring.RESULTS, stages)
    _print_table(stages, workdir)
    return stages


def _stage(config: Any, name: str) -> Any:
    stage = config[name].copy_and_resolve_references()
    with stage.unlocked():
        for field in _SHARED:
            stage[field] = config[field]
        # What is set above counts for both stages; what is not may be the stage's own.
        own = stage.model
        stage.model = config.model.copy_and_resolve_references()
        for part, value in own.items():
            if stage.model[part] is None:
                stage.model[part] = value
    return stage


def _make_data(config: Any) -> None:
    """Renders and converts the data set, unless it is there."""
    print_once(f"[1/3] synthetic pedestrians in {config.data_dir}")
    try:
        split_names(config.data_dir, config.dataset)
        return
    except DataError:
        pass
    # A process of its own: the conversion needs TensorFlow, which must not share this one with JAX.
    command = [
        sys.executable,
        "-m",
        "data_prep.convert",
        f"--dataset={config.dataset}",
        f"--data_dir={config.data_dir}",
    ]
    done = subprocess.run(command, check=False)
    if done.returncode == 2:
        raise ConfigError(
            f"{' '.join(command[1:])} failed: see the message above; its packages come with pip install -e '.[convert]'"
        )
    if done.returncode:
        raise DataError(f"{' '.join(command[1:])} failed with exit status {done.returncode}: see the message above")


def _untrained(config: Any) -> scoring.Scores:
    """Scores of the network as it is initialised."""
    model = build_model(config)
    params, stats = model.init(jax.random.key(config.seed))
    [scores] = scoring.Scorer(config, model, make_mesh(), [config.dataset])(params, stats).values()
    print_once(f"untrained {model.name}: {scoring.describe(scores.ranking.results())}")
    return scores


def _chance(query: Split, gallery: Split, seed: int) -> dict[str, float]:
    """Scores of random features: what a network that has learnt nothing gets."""
    normal = np.random.default_rng(seed).normal
    first, second = (normal(size=(len(split), 64)).astype(np.float32) for split in (query, gallery))
    result = ranking.evaluate(first, second, query.pids, gallery.pids, query.camids, gallery.camids)
    return {name: float(result[name]) for name in scoring.METRICS}


def _print_table(stages: dict[str, Any], workdir: pathlib.Path) -> None:
    titles = {
        "chance": "random features",
        "untrained": "untrained network",
        "pretrained": "pre-trained without labels (SpCL)",
        "finetuned": "fine-tuned with labels",
    }
    print_once(f"\n{'':36}   mAP  rank-1   mINP")
    for stage, title in titles.items():
        values = stages[stage]
        print_once(f"{title:36}{100 * values['mAP']:6.2f}{100 * values['rank1']:8.2f}{100 * values['mINP']:7.2f}")
    print_once(
        f"\nwritten in {workdir}: {scoring.RESULTS}, data/, and pretrain/ and finetune/ with checkpoints, "
        f"metrics.jsonl, TensorBoard events, {scoring.RESULTS} and {scoring.REPORT}"
    )
    print_once(f"open the report: {workdir / 'finetune' / scoring.REPORT}")
