"""The paper's pre-training: DM-OSNet by SpCL on the half of LUPerson that the CFS score selects.

    python -m dmosnet_jax.main --config=configs/spcl_luperson.py:cfs=runs/cfs/scores.npz --workdir=runs/spcl_luperson \
        --config.data_dir=data

`cfs` is the score file that `configs/cfs_luperson.py` writes, or a list of file names, best first, such as the
published one (`cfs=CFS_list.pkl`): the better half is 2,090,122 of LUPerson's 4,180,243 images. It is short for
`--config.data.subset='("cfs", PATH, 0.5)'`; without it all images are trained on. 30 epochs of as many images as there
are, learning rate 3.5e-4, a tenth of it every 10 epochs, four groups of 16 images (paper, section 4.2). One pass over
2.09 million images is 32,658 steps; give a multi-GPU host or a TPU slice.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, model="dmosnet_x1_0", epochs=30, cfs="", share=0.5)
    config = common.spcl(common.training(common.base("spcl", options["model"])))
    config.dataset = "luperson"
    if options["cfs"]:
        config.data.subset = ("cfs", options["cfs"], options["share"])
    config.model.dtype = "bfloat16"
    # A person's images are from one video, which the records have as the camera: an image of another video in a cluster
    # is an error of the clustering, and must not be preferred.
    config.sampler.cameras = False
    # Tables of 4 GiB at each epoch's end, and every half an hour.
    config.train.checkpoint_every_steps = None
    config.train.checkpoint_every_minutes = 30.0
    config.train.epochs = options["epochs"]
    config.optim.decay_epochs = (10, 20)
    config.optim.warmup_factor = 1.0
    return config
