"""One network of each of timm's families, small enough for a CPU; read by `families.py`."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

CLASSES, IMAGES, BATCH = 4, 40, 20
TINTED = torch.arange(IMAGES) // CLASSES % 5 == 0  # a fifth of every class
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One network of a family.

    Attributes:
        family: The file of timm that it comes from.
        name: Of the model.
        size: Height and width of the images.
        options: For `create_model`.
    """

    family: str
    name: str
    size: int
    options: dict[str, Any]

    def __str__(self) -> str:
        chosen = [f"{key}={value}" for key, value in self.options.items() if key in SAID]
        return ", ".join([self.name, *chosen])

    def built(self) -> nn.Module:
        """Return the network with random weights, always the same.

        Its batch statistics are those of the images, so that activations have a scale.
        """
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(self.name, num_classes=CLASSES, **self.options)
        norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(self.probe()[0][0])
        return model

    def probe(self) -> list[Batch]:
        """Return batches of images and labels: faint noise, a fifth of every class with a tint."""
        draw = torch.Generator().manual_seed(1)
        images = 0.3 * torch.randn(IMAGES, 3, self.size, self.size, generator=draw)
        images[TINTED] += torch.tensor([6.0, 1.5, -6.0])[:, None, None]
        labels = torch.arange(IMAGES) % CLASSES
        return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def _of(family: str, name: str, size: int = 64, **options: Any) -> Architecture:
    return Architecture(family, name, options.get("img_size", size), options)


SAID = ("distilled", "distillation", "global_pool")  # options that change the head: shown
FITTED = {"img_size": 64}
SHALLOW = {"img_size": 64, "depth": 2}
NARROW = {"depth": 2, "embed_dim": 96, "num_heads": 3}
SWIN = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}

FAMILIES = (
    _of("beit", "beit_base_patch16_224", img_size=64, **NARROW),
    _of("byoanet", "eca_botnext26ts_256", **FITTED),
    _of("byoanet", "lambda_resnet26t"),
    _of("byobnet", "test_byobnet"),
    _of("byobnet", "mobileone_s1"),
    _of("cait", "cait_xxs24_224", **SHALLOW),
    _of("coat", "coat_tiny", **FITTED),
    _of("coat", "coat_lite_tiny", **FITTED),
    _of("convit", "convit_tiny", **SHALLOW, local_up_to_layer=1),
    _of("convmixer", "convmixer_768_32"),
    _of("convnext", "test_convnext"),
    _of("cpubone", "cpubone_nano"),
    _of("crossvit", "crossvit_tiny_240"),
    _of("csatv2", "csatv2"),
    _of("cspnet", "cs3darknet_s"),
    _of("cspnext", "cspnext_tiny"),
    _of("davit", "davit_tiny", embed_dims=(24, 48, 96, 192), depths=(1, 1, 1, 1)),
    _of("deepseek_vit", "deepseek_vit_412m", 56, depth=2),
    _of("deit", "deit_tiny_patch16_224", **SHALLOW),
    _of("deit", "deit3_small_patch16_224", **SHALLOW),
    _of("deit", "deit_tiny_distilled_patch16_224", **SHALLOW),
    _of("densenet", "densenet121", block_config=(1, 1, 1, 1)),
    _of("dla", "dla34"),
    _of("dpn", "dpn48b"),
    _of("edgenext", "edgenext_xx_small"),
    _of("efficientformer", "efficientformer_l1", 224),
    _of("efficientformer_v2", "efficientformerv2_s0", **FITTED),
    _of("efficientformer_v2", "efficientformerv2_s0", **FITTED, distillation=False),
    _of("efficientnet", "test_efficientnet"),
    _of("efficientnet", "mobilenetv2_035"),
    _of("efficientvim", "efficientvim_m1"),
    _of("efficientvim", "efficientvim_m1_dist"),
    _of("efficientvit_mit", "efficientvit_b0"),
    _of("efficientvit_msra", "efficientvit_m0"),
    _of("eva", "eva02_tiny_patch14_224", img_size=56, depth=2),
    _of("eva", "vit_tiny_patch16_dinov3_qkvb", depth=2),
    _of("fasternet", "fasternet_t0"),
    _of("fastvit", "fastvit_t8"),
    _of("focalnet", "focalnet_tiny_srf"),
    _of("gcvit", "gcvit_xxtiny", **FITTED),
    _of("gemma4_vit", "gemma4_vit_167m", depth=2),
    _of("ghostnet", "ghostnet_050"),
    _of("ghostnet", "ghostnetv2_100"),
    _of("hardcorenas", "hardcorenas_b"),
    _of("hgnet", "hgnetv2_b0"),
    _of("hiera", "hiera_tiny_224", **FITTED, embed_dim=24),
    _of("hieradet_sam2", "sam2_hiera_tiny", embed_dim=24),
    _of("hrnet", "hrnet_w18_small"),
    _of("iformer", "iformer_t"),
    _of("iformer", "iformer_m_distilled"),
    _of("inception_next", "inception_next_atto"),
    _of("inception_resnet_v2", "inception_resnet_v2", 96),
    _of("inception_v3", "inception_v3", 96),
    _of("inception_v4", "inception_v4", 96),
    _of("lcnetv2", "lcnetv2_small"),
    _of("levit", "levit_128s", **FITTED),
    _of("levit", "levit_128s", **FITTED, distilled=False),
    _of("lowformer", "lowformer_b0"),
    _of("mambaout", "test_mambaout"),
    _of("maxxvit", "test_coatnet", **FITTED),
    _of("maxxvit", "test_maxvit", **FITTED),
    _of("metaformer", "poolformer_s12"),
    _of("metaformer", "caformer_s18"),
    _of("mlp_mixer", "mixer_s32_224", **FITTED),
    _of("mlp_mixer", "gmlp_ti16_224", **FITTED),
    _of("mlp_mixer", "resmlp_12_224", **FITTED),
    _of("mobilenetv3", "mobilenetv3_small_050"),
    _of("mobilenetv3", "mobilenetv4_conv_small_035"),
    _of("mobilenetv5", "mobilenetv5_base", 32),
    _of("mobilevit", "mobilevit_xxs"),
    _of("mobilevit", "mobilevitv2_050"),
    _of("mvitv2", "mvitv2_tiny"),
    _of("mvitv2", "mvitv2_small_cls"),
    _of("naflexvit", "naflexvit_base_patch16_gap", **NARROW),
    _of("nasnet", "nasnetalarge"),
    _of("nest", "nest_tiny", **FITTED),
    _of("nextvit", "nextvit_small"),
    _of("nfnet", "test_nfnet"),
    _of("pit", "pit_ti_224", **FITTED),
    _of("pit", "pit_ti_distilled_224", **FITTED),
    _of("pnasnet", "pnasnet5large"),
    _of("pvt_v2", "pvt_v2_b0"),
    _of("qwen3_vit", "qwen3_vit_88m", **NARROW),
    _of("rdnet", "rdnet_tiny"),
    _of("regnet", "regnetx_002"),
    _of("repghost", "repghostnet_050"),
    _of("repvit", "repvit_m1"),
    _of("repvit", "repvit_m1", distillation=False),
    _of("res2net", "res2next50"),
    _of("resnest", "resnest14d"),
    _of("resnet", "test_resnet"),
    _of("resnetv2", "resnetv2_18"),
    _of("rexnet", "rexnet_100"),
    _of("selecsls", "selecsls42"),
    _of("senet", "legacy_seresnet18"),
    _of("sequencer", "sequencer2d_s", layers=(1, 1, 1, 1)),
    _of("shvit", "shvit_s1"),
    _of("sknet", "skresnet18"),
    _of("starnet", "starnet_s050"),
    _of("swiftformer", "swiftformer_xs"),
    _of("swin_transformer", "swin_tiny_patch4_window7_224", **SWIN),
    _of("swin_transformer_v2", "swinv2_tiny_window8_256", **SWIN),
    _of("swin_transformer_v2_cr", "swinv2_cr_tiny_224", **SWIN),
    _of("tiny_vit", "tiny_vit_5m_224"),
    _of("tnt", "tnt_s_patch16_224", **SHALLOW),
    _of("tresnet", "tresnet_m"),
    _of("twins", "twins_svt_small", depths=(1, 1, 1, 1)),
    _of("twins", "twins_pcpvt_small", depths=(1, 1, 1, 1)),
    _of("vgg", "vgg11", 32),
    _of("visformer", "visformer_tiny", **FITTED),
    _of("vision_transformer", "test_vit"),
    _of("vision_transformer", "vit_small_patch14_reg4_dinov2", img_size=56, depth=2),
    _of("vision_transformer", "vit_base_patch16_siglip_224", img_size=64, **NARROW),
    _of("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", **FITTED),
    _of("vision_transformer_relpos", "test_vit_relpos", **FITTED),
    _of("vision_transformer_sam", "samvit_base_patch16_224", img_size=64, **NARROW),
    _of("vitamin", "vitamin_small_224", **FITTED),
    _of("volo", "volo_d1_224", **FITTED),
    _of("vovnet", "ese_vovnet19b_slim_dw"),
    _of("xception", "legacy_xception"),
    _of("xception_aligned", "xception41"),
    _of("xcit", "xcit_nano_12_p16_224", depth=2),
)
