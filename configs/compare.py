"""Several checkpoints beside each other, on one or several data sets: scores, parameters, operations and latency.

    python -m dmosnet_jax.main --config=configs/compare.py --workdir=runs/compare --config.data_dir=data \
        --config.dataset=market1501+msmt17 --config.checkpoints=runs/osnet,runs/dmosnet,osnet_x0_25_market1501.pth

Each path of `checkpoints` is a run's workdir, one of its checkpoints, an exported folder or a PyTorch file. The table
is printed and written as `compare.csv` and `compare.html`; each checkpoint's `results.json` goes into a folder of its
name, and its `report.html` too with `--config.eval.report=True`. Scores are percent; parameters are without classifier
and BNNeck, multiply-adds those of one image. The latency is the median time of a batch on one device, per image. Where
the paper has figures of the network on the data set, columns of their own show them: from scratch, and after LUPerson.
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, dataset="market1501")
    config = common.base("compare")
    config.dataset = options["dataset"]
    # Paths with commas between them, or a tuple.
    config.checkpoints = config_dict.FieldReference("", field_type=object)
    # Images of a batch, and batches that the median is over.
    config.latency = ConfigDict({"batch_size": 1, "repeats": 30})
    common.as_trained(config)
    config.eval.report = False
    return config
