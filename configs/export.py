"""A checkpoint as a PyTorch file, or as a folder that needs no training config.

    python -m dmosnet_jax.main --config=configs/export.py --config.checkpoint=runs/finetune \
        --config.output=model.safetensors
    python -m dmosnet_jax.main --config=configs/export.py --config.checkpoint=runs/finetune \
        --config.output=dmosnet_market1501
    python -m dmosnet_jax.main --config=configs/export.py --config.checkpoint=runs/finetune \
        --config.output=person.onnx --config.onnx.input=unit --config.onnx.normalise=True

`output` with the suffix .safetensors, .pth or .pt is a state dict under the names of `layout` (torchreid, fastreid or
openunreid; by default fast-reid's for a network with a BNNeck, torchreid's for others). With the suffix .onnx it is an
ONNX graph for trackers and servers, and beside it `<output>.metadata.json` for BoxMOT. Any other name is a new folder:
`model.safetensors`, `config.json` with the network's name, input size, pixel statistics, feature size, threshold,
source and licence, and a model card; `evaluate`, `extract` and `dmosnet_jax.load` open it, and Roboflow's `reid` too
where it has the network. `--config.results=runs/evaluate/results.json` gives the card scores and a threshold.
`checkpoint` may be any weights that `evaluate` opens.
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
    # For the card; the source is the checkpoint's path where nothing is given.
    config.source = ""
    config.licence = ""
    # For the card: results.json of an evaluation of these weights; it has their scores and thresholds.
    config.results = ""
    # From which cosine similarity on two images are of one person; None: that of `results` at the rate below.
    config.threshold = config_dict.placeholder(float)
    config.false_accept_rate = 1e-3
    # Whether a folder gets model.stablehlo, a program that runs where JAX is, without this package.
    config.stablehlo = False
    # None: as the weights say.
    config.image_size = config_dict.placeholder(tuple)
    config.data = ConfigDict({"interpolation": config_dict.placeholder(str)})
    config.onnx = ConfigDict(
        {
            # What is fed: imagenet (normalised by ImageNet's mean and standard deviation: BoxMOT, torchreid), unit
            # (RGB in [0, 1]: Ultralytics, DeepStream) or byte (RGB in 0 to 255).
            "input": "imagenet",
            # Whether features come out with unit length.
            "normalise": False,
        }
    )
    config.model = common.model()
    return config
