"""A checkpoint as a PyTorch file, or as a folder that needs no training config.

    python -m dmosnet_jax.main --config=configs/export.py --config.checkpoint=runs/finetune \
        --config.output=model.safetensors
    python -m dmosnet_jax.main --config=configs/export.py --config.checkpoint=runs/finetune \
        --config.output=dmosnet_market1501

`output` with the suffix .safetensors, .pth or .pt is a state dict under the names of `layout` (torchreid, fastreid or
openunreid; by default fast-reid's for a network with a BNNeck, torchreid's for others). Any other name is a new folder:
`model.safetensors`, and `config.json` with the network's name, input size, pixel statistics, feature size, source and
licence; `evaluate`, `extract` and `dmosnet_jax.load` open it. `checkpoint` may be any weights that they open.
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, checkpoint="", output="")
    config = ConfigDict()
    config.recipe = "export"
    config.checkpoint = options["checkpoint"]
    config.output = options["output"]
    config.layout = ""
    # Replace an earlier export.
    config.overwrite = False
    # Of the training identities.
    config.keep_classifier = True
    # For `config.json`; the source is the checkpoint's path where nothing is given.
    config.source = ""
    config.licence = ""
    # None: as the weights say.
    config.image_size = config_dict.placeholder(tuple)
    config.data = ConfigDict({"interpolation": config_dict.placeholder(str)})
    config.model = common.model()
    return config
