"""CMC, mAP and mINP of a checkpoint on a data set's query and gallery.

    python -m dmosnet_jax.main --config=configs/evaluate.py --workdir=runs/evaluate --config.data_dir=data \
        --config.dataset=market1501 --config.checkpoint=runs/finetune

`checkpoint` is a run's workdir, one of its checkpoints, or a PyTorch file (then give `--config.model.name` too).
`--config.eval.rerank=True` adds k-reciprocal re-ranking.
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
