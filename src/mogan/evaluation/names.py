"""The metrics by name: what a table prints, in which order, and which way is up."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One line of a table. ``better`` is None where neither way is: more motion is not better motion."""

    label: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    about: str = ""

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


METRICS: dict[str, Metric] = {
    "dynamic_degree": Metric("Dynamic degree", "", None, "share of clips with enough motion, VBench's rule"),
    "motion_smoothness": Metric(
        "Motion smoothness", "", "higher", "VBench's formula with the interpolator named below"
    ),
    "motion_score": Metric("Motion score", "", "higher", "mean of the two above (MoGAN, section 5.2)"),
    "temporal_flickering": Metric("Temporal flickering", "", None, "VBench's formula; 1 is perfectly still"),
    "static": Metric("Static clips", "", None, "share VBench's static filter would keep"),
    "subject_consistency": Metric("Subject consistency", "", "higher", "VBench: DINO over time; 1 for a still clip"),
    "background_consistency": Metric(
        "Background consistency", "", "higher", "VBench: CLIP over time; 1 for a still clip"
    ),
    "aesthetic_quality": Metric("Aesthetic quality", "", "higher", "VBench: LAION's head on CLIP, frame by frame"),
    "imaging_quality": Metric("Imaging quality", "", "higher", "VBench: MUSIQ, frame by frame; noise, blur, exposure"),
    "flow_mean": Metric("Flow, mean", "per 1/8 s at 256 px", None, "mean length of the flow"),
    "flow_median": Metric("Flow, median", "per 1/8 s at 256 px", None, "median length of the flow"),
    "flow_top5": Metric("Flow, top 5 %", "per 1/8 s at 256 px", None, "fastest 5 % of pixels; 6.0 is VBench's line"),
    "flow_px_mean": Metric("Flow, mean", "px/frame"),
    "flow_px_top5": Metric("Flow, top 5 %", "px/frame"),
    "moving_share": Metric("Moving pixels", "", None, "share of pixels with flow above a quarter pixel at 256 px"),
    "camera_motion": Metric("Camera motion", "px/frame", None, "of the homography most of the picture follows"),
    "object_motion": Metric("Object motion, top 5 %", "px/frame", None, "flow left after the camera's"),
    "round_trip": Metric("Flow there and back", "px", "lower", "median miss; large where pictures do not match"),
    "occluded": Metric("Occluded", "", None, "share of pixels whose flow does not return"),
    "warping_error": Metric("Warping error", "", "lower", "Lai et al. 2018; 0 for a still clip"),
    "acceleration": Metric("Acceleration", "sizes/s²", None, "of points carried by the flow"),
    "log_jerk": Metric("Smoothness of paths", "log", "higher", "log dimensionless jerk of points that move"),
    "pixel_jerk": Metric("Pixel jerk", "", "lower", "second difference of frames; 0 for fades and stillness"),
    "frozen": Metric("Frozen frames", "", "lower", "share of frames equal to the one before"),
    "cuts": Metric("Cuts", "per clip", "lower", "jumps that stand out from the clip's own differences"),
    "saturation": Metric("Saturation", "", None, "mean HSV saturation"),
    "contrast": Metric("Contrast", "", None, "deviation of luma within a frame"),
    "appearance_distance": Metric(
        "Appearance distance", "", "lower", "Frechet distance of frame features to the reference"
    ),
    "cd_fvd": Metric("CD-FVD", "", "lower", "Frechet distance of VideoMAE features to the reference; falls with n"),
    "cd_fvd_floor": Metric(
        "CD-FVD, noise", "", None, "of one half of the reference to the other: the bias of half as many clips"
    ),
    "lab_speed": Metric("True speed", "px/frame", None, "tracked without flow: chord over a quarter second"),
    "lab_net": Metric("Net displacement", "px/frame", None, "of the tracked subject, last frame against first"),
    "lab_path": Metric("Path length", "px/frame", None, "of the tracked subject, frame by frame"),
    "lab_wobble": Metric("Wobble", "px/frame", "lower", "path beyond what carries the subject along"),
    "lab_straightness": Metric("Straightness", "", "higher", "net over path, of subjects that move in a line"),
    "lab_pulsing": Metric("Pulsing of area", "", "lower", "deviation of the log area from frame to frame"),
    "lab_spin": Metric("Spin", "rad/frame", None, "of subjects said to spin"),
    "lab_pan": Metric("Camera pan", "px/frame", None, "of clips said to pan"),
    "lab_still": Metric("Still clips", "", None, "share slower than 0.1 px/frame"),
    "lab_physics": Metric("Distance from physics", "px", "lower", "residual of the law of motion the caption names"),
    "lab_direction": Metric("Direction agrees", "", "higher", "share of clips that move where the caption says"),
    "lab_colour": Metric("Colour agrees", "", "higher", "share of frames where the named colour is found"),
    "lab_shape": Metric("Shape agrees", "", "higher", "share of clips whose outline fits the named shape best"),
    "lab_identity": Metric(
        "Identity kept", "", "higher", "share of frames where the subject keeps its area and colour"
    ),
    "lab_travels": Metric(
        "Travels", "", "higher", "share of moving subjects that are there all the way, and only once"
    ),
    "lab_count": Metric("Number agrees", "", "higher", "share of clips with as many things as the caption names"),
    "follow_mask": Metric(
        "Follows its mask", "", "higher", "overlap of the lab's things with the mask they were to be made in"
    ),
    "follow_depth": Metric("Follows its depth", "", "higher", "overlap of each of the lab's things with its region"),
    "follow_order": Metric(
        "In front as shown", "", "higher", "share of pixels between two of the lab's things that touch"
    ),
    "follow_flow": Metric(
        "Follows its flow", "", "higher", "1 - error / (its motion + the control's); 0 for a still clip"
    ),
    "follow_flow_error": Metric(
        "Distance from its flow", "px/frame", "lower", "end-point error where the control moves"
    ),
    "lab_speed_wasserstein": Metric(
        "Speed histogram distance", "px/frame", "lower", "Wasserstein, to the reference set"
    ),
}
