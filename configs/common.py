"""Fields that the experiments share, and the strict parser of their arguments.

A config file's `get_config` receives what stands after the colon: `--config=configs/finetune.py:market1501,epochs=60`.
"""

import ast
from typing import Any

from ml_collections import ConfigDict, config_dict

from dmosnet_jax.core.errors import ConfigError


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """Options from `value,key=value,...`.

    The first option may be given without its name. Values take the type of their default.

    Args:
        arg: the text after the colon, or None.
        **defaults: every option with its default, in order.

    Raises:
        ConfigError: an unknown option, or a value of another type.
    """
    options = dict(defaults)
    first = next(iter(defaults))
    for position, item in enumerate(filter(None, (arg or "").split(","))):
        name, given, text = item.partition("=")
        if not given and position == 0:
            name, text = first, item
        if name not in defaults or (not given and position > 0):
            raise ConfigError(
                f"config argument {item!r} is not known: use {', '.join(f'{key}=...' for key in defaults)}"
            )
        options[name] = _typed(name, text, defaults[name])
    return options


def _typed(name: str, text: str, default: Any) -> Any:
    if default is None or isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if isinstance(default, float) and isinstance(value, int):
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(f"config argument {name}={text!r} must be of type {type(default).__name__}, like {default!r}")
    return value


def model(name: str | None = None) -> ConfigDict:
    """The network. None means: as the checkpoint says, or else the model's own default."""
    return ConfigDict(
        {
            "name": config_dict.placeholder(str) if name is None else name,
            # DL-MHSA instead of the 9x9 stream in conv2, conv3, conv4.
            "attention": config_dict.placeholder(tuple),
            "neck": config_dict.placeholder(str),
            "pool": config_dict.placeholder(str),
            # How the classifier scores (linear or circle), and whose ResNet it is.
            "classifier": config_dict.placeholder(str),
            "variant": config_dict.placeholder(str),
            # Images that share batch statistics; 0 is the whole batch, as on the paper's one GPU of fine-tuning.
            "bn_group_size": 0,
            "dtype": "float32",
        }
    )


def base(recipe: str, model_name: str | None = None) -> ConfigDict:
    """What every experiment has."""
    config = ConfigDict()
    config.recipe = recipe
    config.seed = 0
    # A name, or several: "market1501+msmt17", or ("market1501", "msmt17").
    config.dataset = config_dict.FieldReference("market1501", field_type=object)
    config.data_dir = "data"
    config.image_size = (256, 128)
    config.pixel_mean = (0.485, 0.456, 0.406)
    config.pixel_std = (0.229, 0.224, 0.225)
    config.model = model(model_name)
    config.data = ConfigDict(
        {
            # Decoding threads and processes; up to `cache_mib` of host memory keeps the decoded images of each split.
            "threads": 4,
            "workers": 0,
            "cache_mib": 4096,
            # Where the training images are: read and decoded on the host for each batch, or all of them in the memory
            # of every device (decoded once; without AutoAugment).
            "placement": "host",
            # The filter that resizes: bilinear (torchreid) or bicubic (fast-reid, SpCL); None: as the weights say, and
            # bicubic where there are none.
            "interpolation": config_dict.placeholder(str),
            # ("cfs", PATH, SHARE) trains on the best SHARE of the images by a score file or a list of names.
            "subset": config_dict.placeholder(tuple),
        }
    )
    config.eval = ConfigDict(
        {
            "batch_size": 128,
            # What computes features: jax, or onnxruntime where it is installed, which is faster on CPUs.
            "runtime": "jax",
            # A feature is the mean of the image's and of its mirror image's.
            "flip": False,
            # A query is the mean of all images of its identity from its camera: those of gt_bbox where the data set was
            # converted with them (Market-1501's protocol), else the query images.
            "multi_query": False,
            # Nearest gallery images that are added to each query, 0 for none; weighted by their similarity to this
            # power (alpha-QE, 3 in its paper), 0 weights all alike (average query expansion).
            "query_expansion": 0,
            "expansion_alpha": 0.0,
            "rerank": False,
            "report": True,
            # In the report, of the worst queries, and as many of typical ones.
            "rank_lists": 10,
            # Files for TensorBoard's projector, in the workdir: features, what they are of, and their pictures.
            "projector": False,
        }
    )
    return config


def as_trained(config: ConfigDict) -> ConfigDict:
    """Leaves the image size (256x128 where the weights do not tell) and the pixel statistics to the weights."""
    for field in ("image_size", "pixel_mean", "pixel_std"):
        config[field] = config_dict.placeholder(tuple)
    return config


def training(config: ConfigDict) -> ConfigDict:
    """Adds what training has: paper, section 4.2, with FastReID's basic settings elsewhere."""
    # Weights to start from: a workdir or checkpoint of ours, or a PyTorch file.
    config.pretrained = ""
    # Train on the images for validation too, where a data set has some (MSMT17); every result tells.
    config.with_val = False
    config.batch_size = 64
    config.sampler = ConfigDict({"instances": 4})
    config.augment = ConfigDict(
        {
            "flip": 0.5,
            "pad": 10,
            # Share of the images with an erased rectangle, and whose rectangles: fastreid or spcl.
            "erase": 0.5,
            "erasing": "fastreid",
            # Share of the images that AutoAugment's policy changes before the resize.
            "autoaugment": 0.0,
        }
    )
    config.optim = ConfigDict(
        {
            "name": "adam",
            "learning_rate": 3.5e-4,
            # Batch size that this rate is for, 64 in the paper: with others it changes in proportion. None: for any.
            "base_batch_size": config_dict.placeholder(int),
            "weight_decay": 5e-4,
            "momentum": 0.9,
            "clip_norm": 0.0,
            "schedule": "step",
            "decay_epochs": (),
            # Whether those are counted from the end of the warm-up, as fast-reid counts them.
            "count_after_warmup": False,
            "decay_factor": 0.1,
            "final_factor": 2e-3,
            "warmup_steps": config_dict.placeholder(int),
            "warmup_epochs": config_dict.placeholder(float),
            "warmup_factor": 0.1,
        }
    )
    config.train = ConfigDict(
        {
            "epochs": 1,
            # None: as many as the data set fills.
            "steps_per_epoch": config_dict.placeholder(int),
            "log_every_steps": 20,
            # Whichever is due first; None for never. Minutes save at a step that `spcl.refresh_every_steps` divides.
            "checkpoint_every_steps": config_dict.FieldReference(500, field_type=int),
            "checkpoint_every_minutes": config_dict.placeholder(float),
            "eval_every_epochs": 1,
            "keep": 3,
        }
    )
    return config


def identities(config: ConfigDict) -> ConfigDict:
    """Adds the losses of training with identities (paper, section 4.2)."""
    config.loss = ConfigDict(
        {
            "label_smoothing": 0.1,
            # hinge (with the margin), soft (soft margin) or none, on the `embedding` before the BNNeck or the `feature`
            # after it.
            "triplet": "hinge",
            "triplet_margin": 0.3,
            "triplet_weight": 1.0,
            "triplet_on": "embedding",
            # Where `model.classifier` is circle.
            "circle_scale": 64.0,
            "circle_margin": 0.35,
        }
    )
    return config


def spcl(config: ConfigDict) -> ConfigDict:
    """Adds SpCL's own settings (Ge et al. 2020, `examples/spcl_train_usl.py`)."""
    # Four GPUs of 16 images in SpCL and in the paper.
    config.model.bn_group_size = 16
    config.augment.erasing = "spcl"
    # Positives come from other cameras than the anchor's where there are any: right where people reappear under them.
    config.sampler.cameras = True
    config.spcl = ConfigDict(
        {
            "temperature": 0.05,
            "momentum": 0.2,
            "k1": 30,
            "k2": 6,
            "eps": 0.6,
            "eps_gap": 0.02,
            "min_samples": 4,
            # Radius of the last epoch, reached in equal steps; None keeps `eps`.
            "eps_end": config_dict.placeholder(float),
            # Share of the images that must be in clusters, or the run stops and suggests a radius.
            "min_clustered": 0.01,
            # What the memory holds: image (SpCL), cluster or cluster_hardest (Cluster Contrast; momentum 0.1 there).
            "memory": "image",
            # Extract all features anew before each clustering.
            "reextract": False,
            # Neighbours on accelerators: exact, or bfloat16 (candidates by that, then exact scores; recall is logged).
            "search": "exact",
            # Steps between two exact rebuilds of the class sums, beside the one at each epoch's start; 0 for none. A
            # checkpoint between two steps of which the later one rebuilds them does without them: half of its bytes.
            "refresh_every_steps": 500,
            # Most classes there will ever be; None allows as many as images. Fewer save memory and time.
            "max_classes": config_dict.placeholder(int),
            # Groups of `model.bn_group_size` images that a device computes at once; None: all of its batch. Fewer take
            # less of its memory and give the same numbers, to rounding.
            "groups_at_once": config_dict.placeholder(int),
        }
    )
    return config
