"""The paper's fine-tuning with identities (section 4.2), from scratch or from a checkpoint.

    python -m dmosnet_jax.main --config=configs/finetune.py:market1501 --workdir=runs/finetune \
        --config.data_dir=data --config.pretrained=runs/spcl_luperson

120 epochs, batch 64, base learning rate 3.5e-4 reached after 2,000 steps of warm-up, a tenth of it at epochs 50 and
100; cross-entropy with label smoothing 0.1 and batch-hard triplet loss with margin 0.3. Paper, Market-1501, DM-OSNet
[1,0,0]: mAP 86.76 and rank-1 95.26, and from LUPerson 87.36 and 95.61.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, dataset="market1501", model="", pretrained="", epochs=120)
    config = common.training(common.base("supervised", options["model"] or None))
    # Where neither the command nor the weights to start from say.
    config.default_model = "dmosnet_x1_0"
    config.dataset = options["dataset"]
    config.pretrained = options["pretrained"]
    config.train.epochs = options["epochs"]
    config.train.eval_every_epochs = 10
    config.optim.decay_epochs = (50, 100)
    config.optim.warmup_steps = 2000
    # `triplet`: hinge (with the margin), soft (soft margin) or none.
    config.loss = ConfigDict({"label_smoothing": 0.1, "triplet": "hinge", "triplet_margin": 0.3, "triplet_weight": 1.0})
    return config
