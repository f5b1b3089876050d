"""The card of an export, README.md: what the model is, how good it is, whose weights it holds, and
how to load it without Regraft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from finetune import files
from finetune.backbones import weights
from finetune.classifier import Classifier
from finetune.combining.members import Member
from finetune.evaluation import evaluate
from finetune.evaluation.ensemble import AnyModel
from finetune.names import shown

WORDS = evaluate.WORDS | {"svm": "accuracy of the SVM beside it"}
PARTS = {"cv": "out of fold"}
OPEN = {
    "onnx": (
        "onnxruntime",
        "import onnxruntime\n",
        'onnxruntime.InferenceSession(part["file"])',
        '.run(None, {"image": x})[0]',
    ),
    "openvino": (
        "openvino",
        "import openvino\n",
        'openvino.compile_model(part["file"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
        '({"image": x})["probabilities"]',
    ),
    "torch-export": (
        "torch",
        "import torch\n",
        'torch.export.load(part["file"]).module()',
        "(torch.from_numpy(x)).detach().numpy()",
    ),
}

PREPARED = '''
def prepared(path, part):
    """An image file as the input of a part: resized, cut to its centre, normalised."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    (w, h), r, s = image.size, part["resize"], part["size"]
    w, h = (r, r) if part["squash"] else (max(r, int(r * w / h)), max(r, int(r * h / w)))
    image = image.resize((w, h), Image.Resampling[part["interpolation"].upper()])
    left, top = round((w - s) / 2), round((h - s) / 2)
    pixels = np.asarray(image.crop((left, top, left + s, top + s)), np.float32) / 255
    x = (pixels - np.float32(part["mean"])) / np.float32(part["std"])
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])
'''

ONE = """
part = about["parts"][0]
model = {open}
x = prepared("photo.jpg", part)
p = model{ask}[0]
print(about["classes"][p.argmax()], p.max())
"""

SEVERAL = """
logs = 0  # the parts want inputs of other sizes; the answer is their weighted geometric mean
for part in about["parts"]:
    model = {open}
    x = prepared("photo.jpg", part)
    logs = logs + part["weight"] * np.log(np.maximum(model{ask}[0], 1e-30))
p = np.exp(logs) / np.exp(logs).sum()
print(about["classes"][p.argmax()], p.max())
"""

TIMM = """import timm
import timm.data
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    x = transform(Image.open("photo.jpg").convert("RGB"))
    p = model(x[None]).softmax(1)[0]
print(model.pretrained_cfg["label_names"][int(p.argmax())], float(p.max()))
"""


def write(folder: Path, member: Member, model: AnyModel, about: Mapping[str, Any]) -> None:
    """Write README.md, and the licence of the weights where it is known."""
    networks = _networks(model)
    texts = {name: text for name in networks if (text := _notice(model, name))}
    if texts:
        files.write_text(folder / "LICENSE-weights.txt", "\n\n".join(texts.values()))
    sections = (
        _front(networks, about),
        f"# {_title(member)}\n\n{member.about['verdict']}",
        _numbers(member),
        _data(member, model),
        _made(member, model),
        _weights(model, bool(texts)),
        _loading(about),
        _compared(about),
    )
    files.write_text(folder / "README.md", "\n\n".join(sections) + "\n")


def code(to: str, count: int) -> str:
    """Python that loads an export of `count` parts and asks it about photo.jpg, from its own
    folder."""
    if to == "timm":
        return TIMM
    _, library, opened, ask = OPEN[to]
    first = "import json\n\nimport numpy as np\n"
    last = "from PIL import Image, ImageOps\n\n"
    read = 'with open("export.json", encoding="utf-8") as file:\n    about = json.load(file)\n\n'
    use = (ONE if count == 1 else SEVERAL).replace("{open}", opened).replace("{ask}", ask)
    return first + library + last + read + PREPARED + "\n" + use


def _members(model: AnyModel) -> list[Classifier]:
    return [model] if isinstance(model, Classifier) else list(model.members.values())


def _networks(model: AnyModel) -> list[str]:
    return list(dict.fromkeys(one.network.name for one in _members(model)))


def _notice(model: AnyModel, name: str) -> str | None:
    """The licence text of the package that the weights of network `name` came from."""
    package = weights.PACKAGES.get(name)
    sources = [one.network.source for one in _members(model) if one.network.name == name]
    if package is None or not any(package.distribution in source for source in sources):
        return None
    return weights.notice(name, weights.find(name))


def _front(networks: list[str], about: Mapping[str, Any]) -> str:
    """The block that model hubs read."""
    library = {"timm": "timm", "onnx": "onnx", "openvino": "openvino"}.get(about["to"], "pytorch")
    known = {p.licence for name in networks if (p := weights.PACKAGES.get(name))}
    licence = known.pop().lower() if len(known) == 1 else "other"
    lines = ("---", f"library_name: {library}", "pipeline_tag: image-classification")
    return "\n".join((*lines, f"license: {licence}", "tags: [regraft]", "---"))


def _title(member: Member) -> str:
    return f"Image classifier of {len(member.classes)} classes: {shown(member.path.name)}"


def _numbers(member: Member) -> str:
    measured = files.read_json(member.path / "metrics.json")
    rows = ["| metric | value | 95 % interval | images | method |", "|---|---|---|---|---|"]
    for name, value in measured.items():
        part, _, short = name.partition("/")
        words = f"{WORDS.get(short, short)} ({PARTS.get(part, part)})"
        if isinstance(value, dict) and "value" in value:
            span = f"{value['low']:.3f} to {value['high']:.3f}"
            rows.append(
                f"| {words} | {value['value']:.3f} | {span} | {value['n']} | {value['method']} |"
            )
        elif isinstance(value, float) and short in WORDS:
            rows.append(f"| {words} | {value:.3f} | | | |")
    return "## How good it is\n\n" + "\n".join(rows)


def _data(member: Member, model: AnyModel) -> str:
    given = str(member.recipe.data.data or "")
    name = given if given.startswith("sklearn:") else shown(PurePath(given).name)
    trained = len(member.trained) if member.trained is not None else None
    fitted = f"fitted on {trained} images" if trained else "number of images not recorded"
    tested = f", tested on {len(member.test.paths)}" if member.test else ""
    labels = ", ".join(f"`{shown(label)}`" for label in model.classes)
    return (
        f"## Data\n\n`{name}`: {fitted}{tested}.\n\nClasses, in the order of the output: {labels}."
    )


def _made(member: Member, model: AnyModel) -> str:
    lines = [f"Shipped: {member.about['shipped']}."]
    for one in _members(model):
        taps = " + ".join(map(str, one.head.taps))
        lines.append(f"{one.network.name} read at {taps}; head: {one.head.kind}.")
    plan = member.path / "plan.json"
    because = files.read_json(plan)["plan"].get("because", []) if plan.exists() else []
    lines += because
    lines.append(f"The digest of the run is `{member.about['digest'][:16]}`.")
    return "## How it was made\n\n" + "\n".join(f"- {line}" for line in lines)


def _weights(model: AnyModel, noticed: bool) -> str:
    lines = dict.fromkeys(f"- {one.network.name}: {one.network.source}" for one in _members(model))
    text = "## Licence of the weights\n\n" + "\n".join(lines)
    if noticed:
        return text + "\n\nThe text is in `LICENSE-weights.txt`."
    return text + "\n\nTheir licence is not known here: ask where they came from."


def _loading(about: Mapping[str, Any]) -> str:
    to, rows = about["to"], about["parts"]
    pre = rows[0]
    crop = (
        f"both sides are resized to {pre['size']} pixels"
        if pre["squash"]
        else f"the short side is resized to {pre['resize']} pixels, the centre "
        f"{pre['size']} × {pre['size']} is kept"
    )
    words = (
        f"The input is float32 `(N, 3, {pre['size']}, {pre['size']})` in RGB, for any N: {crop} "
        f"({pre['interpolation']}), then `(x / 255 - mean) / std` with mean {pre['mean']} and std "
        f"{pre['std']}. The output is "
    )
    words += (
        "logits, whose softmax is calibrated probabilities."
        if to == "timm"
        else "calibrated probabilities `(N, C)`."
    )
    if len(rows) > 1:
        words += " Each part has an input of its own; `export.json` has all of them."
    need = "timm" if to == "timm" else f"{OPEN[to][0]} numpy pillow"
    return (
        f"## Load it without Regraft\n\n    pip install {need}\n\n{words} In this folder:\n\n"
        f"```python\n{code(to, len(rows))}```"
    )


def _compared(about: Mapping[str, Any]) -> str:
    lines = [
        f"- {check['name']}, by {about['compared'][0]['program']}: {check['value']} "
        f"({check['status']})"
        for check in about["checks"]
    ]
    return "## Compared with the run, on real images\n\n" + "\n".join(lines)
