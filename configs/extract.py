"""Features of a folder of images as an .npz file: `features` float32 [N, D] and `files` [N].

    python -m dmosnet_jax.main --config=configs/extract.py --config.images=photos --config.checkpoint=runs/finetune \
        --config.output=features.npz

`images` is a folder (searched to any depth) or one image. An image that can't be read ends the run, or is left out with
--config.skip_broken=True. Rows are in the order of the sorted names; not L2-normalised.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, images="", checkpoint="", output="features.npz")
    config = common.base("extract")
    config.images = options["images"]
    config.checkpoint = options["checkpoint"]
    common.as_trained(config)
    config.output = options["output"]
    # Replace an earlier result; leave out images that can't be read, which are counted and named.
    config.overwrite = False
    config.skip_broken = False
    return config
