"""Unsupervised domain adaptation by SpCL: a labelled source and an unlabelled target, trained on together.

    python -m dmosnet_jax.main --config=configs/spcl_uda.py:msmt17+market1501 --workdir=runs/msmt17_to_market1501 \
        --config.data_dir=data --config.pretrained=resnet50-19c8e357.pth

The last name is the target, which is scored; those before it are the source. As in SpCL (Ge et al. 2020;
`examples/spcl_train_uda.py`): the source's classes are classes of the hybrid memory, batches have 64 images of each
domain (`batch_size` is the sum) on four GPUs, so that 16 images of a domain share batch statistics, and the batch norms
are domain-specific; 50 epochs of 400 steps (800 where the target is MSMT17: `--config.train.steps_per_epoch=800`),
learning rate 3.5e-4, a tenth of it every 20 epochs. ResNet50 from ImageNet's weights, unless `model=` names another.
SpCL has MSMT17's images for validation among those of training: `with_val=True`.

The run's checkpoints are ordinary networks with the target's norms. SpCL's ResNet50 has mAP 77.5 on Market-1501 from
MSMT17.
"""

from ml_collections import ConfigDict

from configs import common
from dmosnet_jax.core.config import dataset_names, joined
from dmosnet_jax.core.errors import ConfigError


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, domains="msmt17+market1501", model="resnet50", epochs=50, with_val=False)
    names = dataset_names(options["domains"])
    if len(names) < 2:
        raise ConfigError(f"config argument domains={options['domains']!r} must be source+target, as msmt17+market1501")
    config = common.spcl(common.training(common.base("spcl_uda", options["model"])))
    config.source, config.dataset = joined(names[:-1]), names[-1]
    config.with_val = options["with_val"]
    config.model.neck = "bnneck"
    config.data.interpolation = "bicubic"
    config.batch_size = 128
    config.train.epochs = options["epochs"]
    config.train.steps_per_epoch = 400
    config.train.eval_every_epochs = 10
    config.optim.decay_epochs = (20, 40)
    config.optim.warmup_factor = 1.0
    return config
