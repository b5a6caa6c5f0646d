"""Networks of look and of CD-FVD: what they are shown, what is read off them, and what is said when a file is wrong."""

import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from mogan.errors import UserError
from mogan.evaluation.appearance import aesthetic_score
from mogan.evaluation.backbones import aesthetic, clip, dino, dino_positions, find_backbones, musiq
from mogan.evaluation.cd_fvd import cd_fvd, clip_features, noise_floor, random_start, videomae
from mogan.evaluation.interpolators import amt_s
from mogan.evaluation.measure import look_values
from mogan.evaluation.motion import motion_smoothness
from mogan.evaluation.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    cd_fvd_indices,
    cd_fvd_input,
    clip_input,
    dino_input,
    musiq_input,
)


def noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------- what networks are shown, against torchvision

SIZES = [(480, 832), (832, 480), (64, 64), (224, 300), (300, 225), (101, 77)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_for_clip_and_dino_are_torchvisions_bit_for_bit(height, width):
    frames = noise(2, height, width)
    pixels = torch.Tensor(frames).permute(0, 3, 1, 2)
    unit = transforms.Lambda(lambda x: x.float().div(255.0))
    for_clip = transforms.Compose(
        [
            transforms.Resize(224, interpolation=InterpolationMode.BICUBIC, antialias=False),
            transforms.CenterCrop(224),
            unit,
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    for_dino = transforms.Compose(
        [transforms.Resize(224, antialias=False), unit, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    assert torch.equal(clip_input(frames), for_clip(pixels))
    assert torch.equal(dino_input(frames), for_dino(pixels))


def test_pictures_have_the_published_shapes_and_keep_what_bicubic_overshoots():
    frames = noise(1, 480, 832)
    assert dino_input(frames).shape == (1, 3, 224, 388)
    levels = clip_input(frames) * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    assert levels.min() < -0.1
    assert levels.max() > 1.1


@pytest.mark.parametrize(("height", "width"), [(480, 832), (720, 1280), (832, 480), (512, 512), (64, 96)])
def test_pictures_for_musiq_are_torchvisions_bit_for_bit(height, width):
    frames = noise(1, height, width)
    pixels = torch.Tensor(frames).permute(0, 3, 1, 2)
    if max(height, width) > 512:
        scale = 512.0 / max(height, width)
        pixels = transforms.Resize((int(scale * height), int(scale * width)), antialias=False)(pixels)
    assert torch.equal(musiq_input(frames), pixels / 255.0)


@pytest.mark.parametrize(("height", "width"), [(480, 832), (300, 200), (256, 256), (90, 121)])
def test_clips_for_cd_fvd_are_sized_cropped_truncated_and_squashed(height, width):
    frames = noise(3, height, width)
    scale = 256 / min(height, width)
    size = [256, math.ceil(width * scale)] if height < width else [math.ceil(height * scale), 256]
    sized = tv.resize(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255, size, antialias=True).numpy()
    top, left = (sized.shape[2] - 256) // 2, (sized.shape[3] - 256) // 2
    levels = (sized[:, :, top : top + 256, left : left + 256] * np.float32(255)).astype(np.uint8)
    expected = tv.resize(torch.from_numpy(levels).float() / 255, [224, 224], antialias=False)
    found = cd_fvd_input(frames)
    assert found.shape == (3, 3, 224, 224)
    assert torch.equal(found, expected)


def test_frames_for_cd_fvd_span_the_clip_or_follow_the_published_window():
    assert cd_fvd_indices(81) == list(range(2, 80, 5))
    assert cd_fvd_indices(16) == list(range(16)) == cd_fvd_indices(16, start=0)
    assert cd_fvd_indices(17) == list(range(16))
    assert cd_fvd_indices(81, start=65) == list(range(65, 81))
    for frames in range(16, 100):
        found = cd_fvd_indices(frames)
        assert len(found) == 16
        assert 0 <= found[0]
        assert found[-1] < frames
        assert abs(found[0] - (frames - 1 - found[-1])) <= 1
    with pytest.raises(ValueError, match="needs 16 frames"):
        cd_fvd_indices(15)
    with pytest.raises(ValueError, match="needs 16 frames"):
        cd_fvd_indices(20, start=5)
    starts = {random_start(18, seed) for seed in range(60)}
    assert starts == {0, 1, 2}


# ---------------------------------------------------------------- networks, against a transcription of theirs


def random_blocks(width: int, layers: int, *, biases: bool) -> dict[str, torch.Tensor]:
    """Blocks of a ViT in timm's names, with random weights; ``biases``: of q, k, v together, else VideoMAE's two."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    state = {}
    for n in range(layers):
        state |= {
            f"blocks.{n}.norm1.weight": 1 + some(width), f"blocks.{n}.norm1.bias": some(width),
            f"blocks.{n}.attn.qkv.weight": some(3 * width, width),
            f"blocks.{n}.attn.proj.weight": some(width, width), f"blocks.{n}.attn.proj.bias": some(width),
            f"blocks.{n}.norm2.weight": 1 + some(width), f"blocks.{n}.norm2.bias": some(width),
            f"blocks.{n}.mlp.fc1.weight": some(2 * width, width), f"blocks.{n}.mlp.fc1.bias": some(2 * width),
            f"blocks.{n}.mlp.fc2.weight": some(width, 2 * width), f"blocks.{n}.mlp.fc2.bias": some(width),
        }  # fmt: skip
        if biases:
            state[f"blocks.{n}.attn.qkv.bias"] = some(3 * width)
        else:
            state |= {f"blocks.{n}.attn.q_bias": some(width), f"blocks.{n}.attn.v_bias": some(width)}
    return state


def run_blocks(state: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    """A pre-norm ViT written down plainly."""
    for n in range(1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks"))):
        get = {k.removeprefix(f"blocks.{n}."): v for k, v in state.items() if k.startswith(f"blocks.{n}.")}
        width = x.shape[-1]
        bias = get.get("attn.qkv.bias")
        if bias is None:
            bias = torch.cat([get["attn.q_bias"], torch.zeros(width), get["attn.v_bias"]])
        y = F.layer_norm(x, (width,), get["norm1.weight"], get["norm1.bias"], 1e-6)
        q, k, v = (y @ get["attn.qkv.weight"].T + bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(2) @ get["attn.proj.weight"].T + get["attn.proj.bias"]
        y = F.layer_norm(x, (width,), get["norm2.weight"], get["norm2.bias"], 1e-6)
        y = F.gelu(y @ get["mlp.fc1.weight"].T + get["mlp.fc1.bias"])
        x = x + y @ get["mlp.fc2.weight"].T + get["mlp.fc2.bias"]
    return x


@pytest.fixture(scope="module")
def dino_state():
    generator = torch.Generator().manual_seed(1)
    return {
        "cls_token": torch.randn(1, 1, 128, generator=generator),
        "pos_embed": torch.randn(1, 17, 128, generator=generator),
        "patch_embed.proj.weight": 0.02 * torch.randn(128, 3, 56, 56, generator=generator),
        "patch_embed.proj.bias": torch.randn(128, generator=generator),
        "norm.weight": torch.ones(128),
        "norm.bias": torch.zeros(128),
        **random_blocks(128, 2, biases=True),
    }


def plain_dino(state, pixels):
    """DINO as it is published: its positions are stretched by a scale factor with an offset of a tenth of a patch."""
    patches = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=56)
    rows, columns = patches.shape[-2:]
    x = torch.cat([state["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    positions = state["pos_embed"]
    if (rows, columns) != (4, 4):
        grid = positions[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / 4, (columns + 0.1) / 4), mode="bicubic")
        assert grid.shape[-2:] == (rows, columns)
        positions = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    x = run_blocks(state, x + positions, heads=2)
    return F.layer_norm(x, (128,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 0]


@pytest.mark.parametrize(("height", "width"), [(480, 832), (64, 64)])
def test_dino_from_the_published_file_is_dino(dino_state, tmp_path, height, width):
    torch.save(dino_state, tmp_path / "dino_vitbase16_pretrain.pth")
    frames = noise(2, height, width)
    found = dino(tmp_path / "dino_vitbase16_pretrain.pth")(frames)
    expected = plain_dino(dino_state, dino_input(frames)).numpy()
    assert found.shape == (2, 128)
    assert found == pytest.approx(expected, abs=2e-4)


def test_dino_from_a_transformers_folder_is_the_same_network(dino_state, tmp_path):
    torch.save(dino_state, tmp_path / "dino.pth")
    one = dino(tmp_path / "dino.pth")
    one.network.config.layer_norm_eps = 1e-12  # as the hub's config has it
    one.network.save_pretrained(tmp_path / "dino-vitb16")
    frames = noise(2, 60, 100)
    assert dino(tmp_path / "dino-vitb16")(frames) == pytest.approx(one(frames), abs=1e-5)


def test_the_offset_of_dinos_positions_matters(dino_state):
    found = dino_positions(dino_state["pos_embed"], 224, 388, 56)
    assert found.shape == (1, 1 + 4 * 6, 128)
    grid = dino_state["pos_embed"][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    exact = F.interpolate(grid, size=(4, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert (found[:, 1:] - exact).abs().max() > 0.01
    assert dino_positions(dino_state["pos_embed"], 224, 224, 56) is dino_state["pos_embed"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=56,
        projection_dim=48,
    )
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("clip") / "clip"
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=48)
    ).save_pretrained(folder)
    return folder


def test_clip_takes_the_picture_half_of_a_whole_clip(clip_folder):
    from transformers import CLIPModel

    frames = noise(2, 90, 120)
    with torch.inference_mode():
        expected = CLIPModel.from_pretrained(clip_folder).eval().get_image_features(clip_input(frames))
    expected = getattr(expected, "pooler_output", expected).numpy()
    assert clip(clip_folder)(frames) == pytest.approx(expected, abs=1e-5)


def test_aesthetic_head_on_normalised_features(clip_folder, tmp_path):
    frames = noise(3, 90, 120)
    head = {"weight": torch.zeros(1, 48), "bias": torch.tensor([5.0])}
    torch.save(head, tmp_path / "flat.pth")
    assert aesthetic(clip_folder, tmp_path / "flat.pth")(frames).tolist() == [0.5] * 3
    head["weight"] = torch.randn(1, 48)
    torch.save(head, tmp_path / "head.pth")
    weights = head["weight"][0].double().numpy()
    expected = [aesthetic_score(row, weights, 5.0) for row in clip(clip_folder)(frames).astype(float)]
    assert aesthetic(clip_folder, tmp_path / "head.pth")(frames) == pytest.approx(np.array(expected), abs=1e-5)
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="takes 768 features and"):
        aesthetic(clip_folder, tmp_path / "other.pth")


def test_musiq_is_the_users_pyiqa(monkeypatch, tmp_path):
    class MUSIQ(nn.Module):
        def __init__(self, pretrained_model_path):
            super().__init__()
            assert pretrained_model_path.endswith("musiq.pth")
            self.scale = nn.Parameter(torch.tensor(100.0))

        def forward(self, picture):
            assert picture.shape == (1, 3, 295, 512)
            assert not self.training
            return self.scale * picture.mean().reshape(1, 1)

    modules = {name: types.ModuleType(name) for name in ("pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch")}
    modules["pyiqa.archs.musiq_arch"].MUSIQ = MUSIQ
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    frames = np.stack([np.full((480, 832, 3), level, np.uint8) for level in (51, 255)])
    assert musiq(tmp_path / "musiq.pth")(frames) == pytest.approx([0.2, 1.0], abs=1e-6)


def test_without_pyiqa_musiq_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(UserError, match="pip install pyiqa"):
        musiq(tmp_path / "musiq.pth")


def test_videomae_from_the_published_file_is_videomae(tmp_path):
    width, frames = 176, noise(16, 40, 60)
    generator = torch.Generator().manual_seed(2)
    state = {
        "patch_embed.proj.weight": 0.02 * torch.randn(width, 3, 2, 56, 56, generator=generator),
        "patch_embed.proj.bias": torch.randn(width, generator=generator),
        "fc_norm.weight": 1 + torch.randn(width, generator=generator),
        "fc_norm.bias": torch.randn(width, generator=generator),
        "head.weight": torch.randn(5, width),
        "head.bias": torch.randn(5),
        **random_blocks(width, 2, biases=False),
    }
    torch.save({"module": state}, tmp_path / "giant.pth")
    found = videomae(tmp_path / "giant.pth")(frames)
    video = cd_fvd_input(frames).transpose(0, 1)[None]
    x = F.conv3d(video, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=(2, 56, 56))
    x = x.flatten(2).transpose(1, 2)
    angles = torch.arange(x.shape[1])[:, None] / 10000 ** (2 * (torch.arange(width) // 2) / width).double()
    x = x + torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos()).float()
    x = run_blocks(state, x, heads=2).mean(1)
    expected = F.layer_norm(x, (width,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)[0].numpy()
    assert found.shape == (width,)
    assert found == pytest.approx(expected, abs=2e-4)


# ---------------------------------------------------------------- numbers of a clip and of sets


def test_looks_are_consistencies_of_features_and_means_of_scores():
    frames = noise(19, 8, 8)
    seen = []

    def alternating(batch):
        at = len(seen)
        seen.extend(batch)
        return np.array([[1.0, 0.0], [0.6, 0.8]])[(at + np.arange(len(batch))) % 2]

    looks = {
        "subject_consistency": alternating,
        "background_consistency": lambda batch: np.ones((len(batch), 3)),
        "aesthetic_quality": lambda batch: batch[:, 0, 0, 0] / 255.0,
    }
    values = look_values(list(frames), looks)
    assert np.array_equal(np.stack(seen), frames)  # every frame once, in order
    first = [0.6 if t % 2 else 1.0 for t in range(1, 19)]
    assert values["subject_consistency"] == pytest.approx(np.mean([(0.6 + r) / 2 for r in first]))
    assert values["background_consistency"] == pytest.approx(1.0)
    assert values["aesthetic_quality"] == pytest.approx(frames[:, 0, 0, 0].mean() / 255)
    one = look_values(list(frames[:1]), looks)
    assert set(one) == {"aesthetic_quality"}
    assert look_values(list(frames), {}) == {}


def test_cd_fvd_reads_the_frames_it_says_and_is_the_frechet_distance():
    clip81 = [np.full((4, 4, 3), t, np.uint8) for t in range(81)]
    assert clip_features(clip81, 81, lambda seen: seen[:, 0, 0, 0]).tolist() == list(range(2, 80, 5))
    window = clip_features(clip81, 81, lambda seen: seen[:, 0, 0, 0], start=7)
    assert window.tolist() == list(range(7, 23))
    one, two = np.array([[-1.0], [1.0]]), np.array([[-2.0], [2.0]])
    assert cd_fvd(one, two) == pytest.approx(1.0)  # covariance over N
    features = np.random.default_rng(0).normal(size=(400, 3))
    assert 0 < noise_floor(features) < 0.2 < cd_fvd(features, features + 1)


# ---------------------------------------------------------------- AMT-S as the user has it

AMT = """
import torch
from networks.parts import half
class Model(torch.nn.Module):
    def __init__(self, corr_radius, corr_lvls, num_flows):
        super().__init__()
        assert (corr_radius, corr_lvls, num_flows) == (3, 4, 3)
        self.comb_block = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))
    def forward(self, one, two, time, scale_factor, eval):
        assert one.shape == two.shape == (1, 3, 16, 32), one.shape
        assert (time.shape, time.item(), scale_factor, eval) == ((1, 1, 1, 1), 0.5, 1, True)
        return {"imgt_pred": self.comb_block(half(one + two))}
"""


@pytest.fixture
def amt(tmp_path):
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "__init__.py").touch()
    (tmp_path / "networks" / "AMT-S.py").write_text(AMT)
    (tmp_path / "networks" / "parts.py").write_text("def half(x):\n    return x / 2\n")
    state = {"comb_block.0.weight": torch.eye(3).reshape(3, 3, 1, 1), "comb_block.0.bias": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "amt-s.pth")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "networks"]:
        del sys.modules[name]


def test_amt_runs_the_users_code_padded_as_vbench_pads(amt):
    frames = np.repeat(np.arange(0, 100, 20, dtype=np.uint8), 10 * 20 * 3).reshape(5, 10, 20, 3)
    before = list(sys.path)
    assert motion_smoothness(frames, amt_s(amt)) == 1.0  # a fade, and this AMT blends
    assert sys.path == before
    middle = amt_s(amt)(torch.zeros(2, 3, 10, 20), torch.ones(2, 3, 10, 20))
    assert middle.shape == (2, 3, 10, 20)
    assert torch.equal(middle, torch.full_like(middle, 0.5))


def test_a_checkout_without_code_or_weights_is_refused(amt, tmp_path):
    (amt / "amt-s.pth").unlink()
    with pytest.raises(UserError, match="git clone"):
        amt_s(amt)
    torch.save({"state_dict": {"comb_block.0.weight": np.random.default_rng}}, amt / "amt-s.pth")
    with pytest.raises(UserError, match=r"save its state dict as amt-s\.safetensors"):
        amt_s(amt)


# ---------------------------------------------------------------- what a folder holds


def test_a_folder_gives_what_it_holds_and_says_what_it_lacks(dino_state, clip_folder, tmp_path):
    torch.save(dino_state, tmp_path / "dino_vitbase16_pretrain.pth")
    (tmp_path / "clip-vit-large-patch14").symlink_to(clip_folder)
    found, lacking = find_backbones(tmp_path)
    assert list(found) == ["subject_consistency"]
    assert [sentence.split()[0] for sentence in lacking] == [
        "background_consistency", "aesthetic_quality", "imaging_quality",
    ]  # fmt: skip
    assert "sa_0_4_vit_l_14_linear.pth" in lacking[1]
    assert "clip-vit-large-patch14 and" not in lacking[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dino_vitbase16_pretrain.pth", b"<html>not found</html>", "no file of plain weights"),
        ("dino_vitbase16_pretrain.pth", {"something": torch.zeros(1)}, "holds no cls_token"),
        ("unrelated.pth", b"", "holds none of VBench's networks"),
    ],
)
def test_wrong_files_are_named_in_one_sentence(tmp_path, name, content, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=words) as error:
        find_backbones(tmp_path)
    assert "\n" not in str(error.value)


def test_an_incomplete_transformers_folder_is_refused(tmp_path):
    (tmp_path / "clip-vit-base-patch32").mkdir()
    with pytest.raises(UserError, match="no complete CLIPVisionModelWithProjection"):
        find_backbones(tmp_path)
