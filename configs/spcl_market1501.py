"""Training without labels on the images of Market-1501: SpCL, or Cluster Contrast as its authors ran it.

    python -m dmosnet_jax.main --config=configs/spcl_market1501.py --workdir=runs/spcl_market1501 \
        --config.data_dir=data --config.pretrained=osnet_x0_25_msmt17.pth

`recipe=spcl`, from a network trained on another data set. docs/results.md has the curve that this command gives on two
CPU cores. Batches of 64 share batch statistics, as in the PyTorch run that it is compared with; SpCL's own four GPUs of
16 are `--config.model.bn_group_size=16`.

`recipe=cluster_contrast` (Dai et al. 2021; `examples/cluster_contrast_train_usl.py` and `run_code.sh` of
alibaba/cluster-contrast-reid): a centroid for each cluster of DBSCAN at radius 0.6, made of features that are extracted
anew before each epoch and moved by every image of a batch with momentum 0.1; images outside of clusters are left out;
GeM pooling before the BNNeck; batches of 256 with 16 images of a cluster, from other cameras first, on four GPUs, so
that 64 images share batch statistics; 50 epochs of 200 steps, learning rate 3.5e-4, a tenth of it every 20 epochs.
ResNet50 from ImageNet's weights (`--config.pretrained`) unless `model=` names another:

    python -m dmosnet_jax.main --config=configs/spcl_market1501.py:recipe=cluster_contrast,model=osnet_x0_25 \
        --workdir=runs/cluster_contrast --config.data_dir=data --config.pretrained=osnet_x0_25_msmt17.pth

Their `--use-hard` is `--config.spcl.memory=cluster_hardest`, their `--no-cam` `--config.sampler.cameras=False`; on
MSMT17 they take 400 steps (`--config.dataset=msmt17 --config.train.steps_per_epoch=400`). The radius is
`--config.spcl.eps`. Their variant with InfoMap in place of DBSCAN is not here.
"""

from ml_collections import ConfigDict

from configs import common
from dmosnet_jax.core.errors import ConfigError

RECIPES = ("spcl", "cluster_contrast")


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, model="", epochs=0, recipe="spcl")
    if options["recipe"] not in RECIPES:
        raise ConfigError(f"config argument recipe={options['recipe']!r} is not known: use {' or '.join(RECIPES)}")
    config = common.spcl(common.training(common.base("spcl")))
    # SpCL's filter, also for weights that were trained with another.
    config.data.interpolation = "bicubic"
    config.optim.decay_epochs = (20, 40)
    config.optim.warmup_factor = 1.0
    if options["recipe"] == "spcl":
        _spcl(config)
    else:
        _cluster_contrast(config)
    config.model.name = options["model"] or config.model.name
    config.train.epochs = options["epochs"] or config.train.epochs
    return config


def _spcl(config: ConfigDict) -> None:
    config.model.name = "osnet_x0_25"
    config.model.neck = "fc"
    config.model.bn_group_size = 0
    config.train.epochs = 6
    config.train.steps_per_epoch = 150


def _cluster_contrast(config: ConfigDict) -> None:
    config.model.name = "resnet50"
    config.model.neck = "bnneck"
    config.model.pool = "gem"
    config.model.bn_group_size = 64
    config.batch_size = 256
    config.sampler.instances = 16
    config.train.epochs = 50
    config.train.steps_per_epoch = 200
    config.train.eval_every_epochs = 10
    config.spcl.memory = "cluster"
    config.spcl.momentum = 0.1
