"""CMC, mAP and mINP of a checkpoint on the query and gallery of one or several data sets.

    python -m dmosnet_jax.main --config=configs/evaluate.py --workdir=runs/evaluate --config.data_dir=data \
        --config.dataset=market1501 --config.checkpoint=runs/finetune

`checkpoint` is a run's workdir, one of its checkpoints, or a PyTorch file (then give `--config.model.name` too).
`--config.eval.rerank=True` adds k-reciprocal re-ranking. With `--config.dataset=market1501+msmt17` each data set is
scored by itself, a table is printed, and each one's results and report go into a folder of its name.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, dataset="market1501", checkpoint="")
    config = common.base("evaluate")
    config.dataset = options["dataset"]
    config.checkpoint = options["checkpoint"]
    common.as_trained(config)
    return config
