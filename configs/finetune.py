"""Fine-tuning with identities, from scratch or from a checkpoint: as the paper says, or as its authors released it.

    python -m dmosnet_jax.main --config=configs/finetune.py:market1501 --workdir=runs/finetune \
        --config.data_dir=data --config.pretrained=runs/spcl_luperson

`recipe=paper` (section 4.2): 120 epochs, batch 64 on one GPU, so that all 64 images share batch statistics, base
learning rate 3.5e-4 reached after 2,000 steps of warm-up, a tenth of it at epochs 50 and 100; cross-entropy with label
smoothing 0.1 and batch-hard triplet loss with margin 0.3. Market-1501, DM-OSNet [1,0,0]: mAP 86.76 and rank-1 95.26,
and from LUPerson 87.36 and 95.61.

`recipe=released`, the authors' configuration files, which differ: GeM pooling, circle-softmax classifier, soft-margin
triplet loss on the feature after the BNNeck, 16 images of an identity, AutoAugment for a tenth of the images, 60 epochs
whose learning rate falls along a cosine after epoch 30; and for CUHK03 average pooling, a linear classifier, triplet
margin 0.3, batch 96 with one image of an identity, 120 epochs, a tenth of the rate 40 and 90 epochs after the warm-up.
Their network is `dmosnet_ibn_x1_0`.

`msmt17,with_val=True` trains on MSMT17's images for validation too (32,621 instead of the paper's 30,248).
"""

from ml_collections import ConfigDict

from configs import common
from dmosnet_jax.core.errors import ConfigError

RECIPES = ("paper", "released")


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(
        arg, dataset="market1501", model="", pretrained="", epochs=0, recipe="paper", with_val=False
    )
    if options["recipe"] not in RECIPES:
        raise ConfigError(f"config argument recipe={options['recipe']!r} is not known: use {' or '.join(RECIPES)}")
    config = common.identities(common.training(common.base("supervised", options["model"] or None)))
    # Where neither the command nor the weights to start from say.
    config.default_model = "dmosnet_x1_0"
    config.dataset = options["dataset"]
    config.pretrained = options["pretrained"]
    config.with_val = options["with_val"]
    config.train.eval_every_epochs = 10
    config.optim.warmup_steps = 2000
    _paper(config)
    if options["recipe"] == "released":
        config.default_model = "dmosnet_ibn_x1_0"
        if options["dataset"].startswith("cuhk03"):
            _released_cuhk03(config)
        else:
            _released(config)
    config.train.epochs = options["epochs"] or config.train.epochs
    return config


def _paper(config: ConfigDict) -> None:
    config.train.epochs = 120
    config.optim.decay_epochs = (50, 100)


def _released(config: ConfigDict) -> None:
    config.model.pool = "gem"
    config.model.classifier = "circle"
    config.sampler.instances = 16
    config.augment.autoaugment = 0.1
    config.train.epochs = 60
    config.optim.schedule = "cosine"
    config.optim.decay_epochs = (30,)
    config.optim.count_after_warmup = True
    # Towards 7e-7.
    config.optim.final_factor = 2e-3
    config.loss.triplet = "soft"
    config.loss.triplet_on = "feature"


def _released_cuhk03(config: ConfigDict) -> None:
    config.batch_size = 96
    # The base of their file (`configs/osnet/Base-bagtricks.yml`) has one, where fast-reid's has four.
    config.sampler.instances = 1
    config.optim.decay_epochs = (40, 90)
    config.optim.count_after_warmup = True
