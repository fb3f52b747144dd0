"""A gallery of features of a folder of images, to be searched by `configs/search.py`; it grows where it is there.

    python -m dmosnet_jax.main --config=configs/index.py --config.images=photos --config.checkpoint=runs/finetune \
        --config.output=gallery

`images` is a folder (searched to any depth) or one image. With the same `output` again more images are added; those
that are in it already are left out, and other weights than the first time are refused.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, images="", checkpoint="", output="gallery")
    config = common.base("index")
    config.images = options["images"]
    config.checkpoint = options["checkpoint"]
    common.as_trained(config)
    config.output = options["output"]
    # Of the features on disk: float16 (half the size, cosines to 3 digits) or float32.
    config.dtype = "float16"
    # Leave out images that can't be read, which are counted and named.
    config.skip_broken = False
    # Regular expression whose first group in a file's name is the number of its camera, e.g. _c(\d+); "" for none.
    config.camera_pattern = ""
    return config
