"""Write docs/architectures.md from the networks themselves: `python docs/make_architectures.py`.
Tests hold the two together."""

from __future__ import annotations

from pathlib import Path

ROW = (
    *("alexnet", "vgg16", "vgg19", "googlenet"),
    *("inception_v3", "inception_v4", "inception_resnet_v2"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"),
    *("convnext_tiny", "nasnetalarge", "mobilenetv3_large_100", "efficientnet_b0"),
    *("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2", "densenet121"),
    *("vit_small_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224"),
    *("vit_small_patch14_dinov2", "vit_base_patch32_clip_224", "resnet50_clip"),
)
HEAD = """# Architectures

Networks that are tested end to end: profile, stages and freezing, features at every tap, SVM,
fine-tuning with a new head, and the file of a run in plain timm or torchvision. Every other
classification network of timm loads by the same rules. Written by `docs/make_architectures.py`;
do not edit.

Input: the weights' own size, in pixels. Stages: the freeze points, from stem to end. Taps: where
features can be read, each with its width; every stage also gives a 3×3 grid (`stage4/3x3`), GeM
and R-MAC (`stage4/gem`, `stage4/rmac`). Parameters and multiply-adds: with the classifier, for
one image of the given size; FLOPs are twice as many. GoogLeNet is without its auxiliary heads,
and timm's DINOv2 has no classifier. timm has NASNet-A in its large form alone.

| model | input | stages | taps and widths | parameters | multiply-adds |
|---|---|---|---|---|---|
"""


def line(name: str) -> str:
    """The line of one model."""
    from finetune.backbones import create
    from finetune.backbones.profile import profile

    network = create.load(name, "random").network
    counted = profile(name)
    taps = ", ".join(
        f"{tap} {width}"
        for tap, width in network.widths.items()
        if "/" not in tap and tap != "moments"
    )
    cells = [f"`{name}`", str(network.preprocess.size), " ".join(network.stages), taps]
    cells += [f"{counted.parameters / 1e6:.1f} M", f"{counted.multiply_adds / 1e9:.2f} G"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    page = HEAD + "".join(f"{line(name)}\n" for name in ROW)
    Path(__file__).with_name("architectures.md").write_text(page, encoding="utf-8")
