"""Small models that between them use every option; the contract tests run over all of them."""

from flowdopr.models import DiT, UNet

SHAPE = (3, 8, 8)
TINY_DIT = {"depth": 2, "hidden_size": 32, "num_heads": 2}
TINY_UNET = {
    "channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_heads": 2,
}
VARIANTS = {
    "dit": (DiT, {}),
    "dit-patchless": (DiT, {"patch_size": 1}),
    "dit-patch-4": (DiT, {"patch_size": 4, "mlp_ratio": 2.0}),
    "dit-swiglu": (DiT, {"mlp": "swiglu"}),
    "dit-rms": (DiT, {"norm": "rms"}),
    "dit-qk-norm": (DiT, {"qk_norm": True}),
    "dit-rope": (DiT, {"rope": True}),
    "dit-modern": (DiT, {"mlp": "swiglu", "norm": "rms", "qk_norm": True, "rope": True}),
    "unet": (UNet, {}),
    "unet-pool": (UNet, {"resample": "pool"}),
    "unet-resblock": (UNet, {"resample": "resblock"}),
    "unet-added-condition": (UNet, {"scale_shift_norm": False}),
    "unet-head-channels": (UNet, {"head_channels": 8, "attention_resolutions": (8, 4)}),
    "unet-dropout": (UNet, {"dropout": 0.1}),
    "unet-one-level": (UNet, {"channel_multipliers": (2,), "attention_resolutions": ()}),
}


def make(name: str, num_classes: int = 5, image_shape=SHAPE):
    model_class, options = VARIANTS[name]
    tiny = TINY_DIT if model_class is DiT else TINY_UNET
    return model_class(image_shape, num_classes, **{**tiny, **options})
