"""The whole chain on synthetic pedestrians, in minutes on two CPU cores.

    python -m dmosnet_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Renders people under several cameras, converts them, pre-trains by SpCL without labels, fine-tunes with labels, and
evaluates the untrained network and each stage. `pretrain` and `finetune` are configs of their own but for the data and
the model: `--config.finetune.train.epochs=20`.
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, model="dmosnet_x0_25", pretrain_epochs=3, finetune_epochs=15)
    config = common.base("quickstart", options["model"])
    config.dataset = "synthetic"
    # Empty: inside the workdir.
    config.data_dir = ""
    config.image_size = (128, 64)

    config.pretrain = common.spcl(common.training(common.base("spcl")))
    config.pretrain.optim.warmup_factor = 1.0
    config.pretrain.train.epochs = options["pretrain_epochs"]
    config.pretrain.train.steps_per_epoch = 40
    # Few images of each person: smaller neighbourhoods than on a real data set.
    config.pretrain.spcl.k1 = 12
    config.pretrain.spcl.k2 = 3

    config.finetune = common.identities(common.training(common.base("supervised")))
    config.finetune.train.epochs = options["finetune_epochs"]
    config.finetune.train.steps_per_epoch = 20
    config.finetune.train.eval_every_epochs = 5
    config.finetune.optim.learning_rate = 1e-3
    config.finetune.optim.schedule = "cosine"
    config.finetune.optim.decay_epochs = (options["finetune_epochs"] // 2,)
    # Both stages take these from above. How many images share batch statistics is their own where it is not set there.
    del config.model["bn_group_size"]
    config.model.bn_group_size = config_dict.placeholder(int)
    for stage in (config.pretrain, config.finetune):
        stage.model = ConfigDict({"bn_group_size": stage.model.bn_group_size})
        for field in ("seed", "dataset", "data_dir", "image_size", "pixel_mean", "pixel_std", "data", "eval"):
            del stage[field]
    return config
