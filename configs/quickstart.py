"""The whole chain on synthetic pedestrians, in minutes on two CPU cores.

    python -m dmosnet_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Renders people under several cameras, converts them, pre-trains by SpCL without labels, fine-tunes with labels, and
evaluates the untrained network and each stage.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, model="dmosnet_x0_25", pretrain_epochs=4, finetune_epochs=8)
    config = common.base("quickstart", options["model"])
    config.dataset = "synthetic"
    # Empty: inside the workdir.
    config.data_dir = ""
    config.image_size = (128, 64)
    config.pretrain_epochs = options["pretrain_epochs"]
    config.finetune_epochs = options["finetune_epochs"]
    return config
