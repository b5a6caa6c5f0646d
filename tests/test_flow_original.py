"""The original RAFT's weights in torchvision's network: an independent statement of Teed and Deng 2020, on random weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mogan.motion.flow import RaftFlow, load_raft


class Block(nn.Module):
    def __init__(self, planes, out, norm, stride):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(planes, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.norm1, self.norm2 = norm(out), norm(out)
        if stride > 1:
            self.norm3 = norm(out)  # under two names, as in the original's checkpoints
            self.downsample = nn.Sequential(nn.Conv2d(planes, out, 1, stride), self.norm3)
        self.stride = stride

    def forward(self, x):
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        return ((self.downsample(x) if self.stride > 1 else x) + y).relu()


class Encoder(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm1, self.conv2 = nn.Conv2d(3, 64, 7, 2, 3), norm(64), nn.Conv2d(128, 256, 1)
        self.layer1 = nn.Sequential(Block(64, 64, norm, 1), Block(64, 64, norm, 1))
        self.layer2 = nn.Sequential(Block(64, 96, norm, 2), Block(96, 96, norm, 1))
        self.layer3 = nn.Sequential(Block(96, 128, norm, 2), Block(128, 128, norm, 1))

    def forward(self, x):
        return self.conv2(self.layer3(self.layer2(self.layer1(self.norm1(self.conv1(x)).relu()))))


class MotionEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.convc1, self.convc2 = nn.Conv2d(324, 256, 1), nn.Conv2d(256, 192, 3, padding=1)
        self.convf1, self.convf2 = nn.Conv2d(2, 128, 7, padding=3), nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(256, 126, 3, padding=1)

    def forward(self, flow, seen):
        seen = self.convc2(self.convc1(seen).relu()).relu()
        moved = self.convf2(self.convf1(flow).relu()).relu()
        return torch.cat([self.conv(torch.cat([seen, moved], 1)).relu(), flow], 1)


class Gru(nn.Module):
    def __init__(self):
        super().__init__()
        for number, size in ((1, (1, 5)), (2, (5, 1))):
            for gate in "zrq":
                convolution = nn.Conv2d(384, 128, size, padding=(size[0] // 2, size[1] // 2))
                setattr(self, f"conv{gate}{number}", convolution)

    def forward(self, h, x):
        for number in (1, 2):
            z, r, q = (getattr(self, f"conv{gate}{number}") for gate in "zrq")
            keep, both = r(torch.cat([h, x], 1)).sigmoid(), z(torch.cat([h, x], 1)).sigmoid()
            h = (1 - both) * h + both * q(torch.cat([keep * h, x], 1)).tanh()
        return h


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(128, 256, 3, padding=1), nn.Conv2d(256, 2, 3, padding=1)


class Update(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.gru, self.flow_head = MotionEncoder(), Gru(), Head()
        self.mask = nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 576, 1))


class Original(nn.Module):
    def __init__(self):
        super().__init__()
        self.fnet, self.cnet, self.update_block = Encoder(nn.InstanceNorm2d), Encoder(nn.BatchNorm2d), Update()

    def forward(self, one, two, iterations):
        a, b = self.fnet(one), self.fnet(two)
        n, c, h, w = a.shape
        volume = torch.einsum("ncij,nckl->nijkl", a, b) / c**0.5
        levels = [volume.reshape(n * h * w, 1, h, w)]
        for _ in range(3):
            levels.append(F.avg_pool2d(levels[-1], 2, 2))
        hidden, context = self.cnet(one).split(128, 1)
        hidden, context = hidden.tanh(), context.relu()
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        start = torch.stack([x, y]).float().expand(n, 2, h, w)
        there = start
        for _ in range(iterations):
            motion = self.update_block.encoder(there - start, self.look(levels, there))
            hidden = self.update_block.gru(hidden, torch.cat([context, motion], 1))
            head = self.update_block.flow_head
            there = there + head.conv2(head.conv1(hidden).relu())
        weights = (0.25 * self.update_block.mask(hidden)).view(n, 1, 9, 8, 8, h, w).softmax(2)
        around = F.unfold(8 * (there - start), 3, padding=1).view(n, 2, 9, 1, 1, h, w)
        return (weights * around).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(n, 2, 8 * h, 8 * w)

    @staticmethod
    def look(levels, there):
        """9 x 9 correlations around each place in four pyramids; the window's first axis is x, a quirk of the original."""
        n, _, h, w = there.shape
        reach = torch.arange(-4.0, 5.0)
        found = []
        for number, level in enumerate(levels):
            x, y = (there / 2**number).permute(1, 0, 2, 3).reshape(2, -1, 1, 1)
            x, y = x + reach.view(1, 9, 1), y + reach.view(1, 1, 9)
            tall, wide = level.shape[-2:]
            grid = torch.stack([2 * x.expand(-1, 9, 9) / (wide - 1) - 1, 2 * y.expand(-1, 9, 9) / (tall - 1) - 1], -1)
            found.append(F.grid_sample(level, grid, align_corners=True).view(n, h, w, 81))
        return torch.cat(found, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_original_weights_give_the_originals_flow(prefix, tmp_path):
    torch.manual_seed(0)
    original = Original().eval()
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    torch.save({prefix + k: v for k, v in original.state_dict().items()}, tmp_path / "raft-things.pth")
    video = torch.rand(1, 3, 2, 128, 136) * 2 - 1
    with torch.no_grad():
        expected = original(video[:, :, 0], video[:, :, 1], 3)
        found = RaftFlow(load_raft(tmp_path / "raft-things.pth"), 3)(video)[:, :, 0]
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
