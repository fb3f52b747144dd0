"""SpCL on the unlabelled training images of Market-1501, from a network trained on another data set.

    python -m dmosnet_jax.main --config=configs/spcl_market1501.py --workdir=runs/spcl_market1501 \
        --config.data_dir=data --config.pretrained=osnet_x0_25_msmt17.pth

The README has the curve that this command gives on two CPU cores. Batches of 64 share batch statistics, as in the
PyTorch run that it is compared with; SpCL's own four GPUs of 16 are `--config.model.bn_group_size=16`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, model="osnet_x0_25", epochs=6)
    config = common.spcl(common.training(common.base("spcl", options["model"])))
    config.model.neck = "fc"
    config.model.bn_group_size = 0
    # SpCL's filter, also for weights that were trained with another.
    config.data.interpolation = "bicubic"
    config.train.epochs = options["epochs"]
    config.train.steps_per_epoch = 150
    config.optim.decay_epochs = (20, 40)
    config.optim.warmup_factor = 1.0
    return config
