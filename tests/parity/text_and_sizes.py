"""Ovi's and DreamID-Omni's rules for prompts, sizes, pictures and positions."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from wan_jax import captions
from wan_jax.conditions import fit_picture
from wan_jax.media import to_unit
from wan_jax.nn.positions import reference_positions
from wan_jax.references import letterbox
from wan_jax.request import ovi_first_frame_size, ovi_size


def check_rules(config: dict, tensors: dict) -> None:
    """``ovi_t2i_hw`` is left out: we make no first picture by another model."""
    for case in config["ovi_formatter"]:
        style = "audcap" if case["model"] == "720x720_5s" else "audio"
        assert captions.ovi_prompt(case["in"], style) == case["out"]
    for case in config["ovi_clean_text"]:
        assert captions.strip_tags(case["in"]) == case["out"]
    for case in config["dreamid_caption_clean"]:
        assert captions.clean_caption(case["in"]) == case["out"]
    for name, rule in (("ovi_snap_hw", ovi_size), ("ovi_first_frame_hw", ovi_first_frame_size)):
        for case in config[name]:
            assert [*rule(case["h"], case["w"], case["area"])] == case["out"], (name, case)
    for case in config["dreamid_letterbox"]:
        black = letterbox(np.zeros((case["h"], case["w"], 3), np.uint8), case["H"], case["W"])[..., 0] == 0
        rows, columns = np.flatnonzero(black.any(1)), np.flatnonzero(black.any(0))
        width, height = case["inner_wh"]
        left, top, right, bottom = case["pad_ltrb"]
        assert (black.sum(), black.shape) == (width * height, (case["H"], case["W"])), case
        assert (columns[0], rows[0]) == (left, top), case
        assert (case["W"] - 1 - columns[-1], case["H"] - 1 - rows[-1]) == (right, bottom), case
    for case in config["dreamid_positions"]:
        F, La = case["video_latent_length"], case["audio_latent_length"]
        dtype = np.dtype(getattr(ml_dtypes, case["scale_dtype"], case["scale_dtype"]))
        frames, audio, scale = reference_positions(F, La, case["n_images"], case["clip_lengths"], dtype=dtype)
        assert abs(scale - case["scale"]) <= 1e-7
        assert [*frames] == [*range(F), *case["video_time_positions_tail"]]
        starts = La + np.cumsum([0, *case["clip_lengths"][:-1]])
        assert [*audio[starts]] == case["audio_clip_start_positions"]
        steps = np.diff(audio)
        assert (np.delete(steps, starts - 1) == 1).all() and audio[0] == 0


def check_pictures(config: dict, tensors: dict[str, np.ndarray]) -> None:
    for k, case in enumerate(config["cases"]):
        picture = tensors[f"in/{k}/image_hwc_u8"]
        size = ovi_first_frame_size(case["h"], case["w"], case["ovi_target_area"])
        assert [*size] == case["ovi_hw"]
        expected = np.moveaxis(tensors[f"out/{k}/ovi_first_frame"][0], 0, -1)
        np.testing.assert_allclose(fit_picture(picture, *size), expected, atol=1e-4, rtol=0, err_msg=f"{k}")
        boxed = tensors[f"out/{k}/dreamid_letterbox_u8"]
        assert np.abs(letterbox(picture, *case["dreamid_hw"]).astype(int) - boxed).max() <= 1, k
        reference = np.moveaxis(tensors[f"out/{k}/dreamid_reference"], 0, -1)
        np.testing.assert_allclose(to_unit(boxed), reference, atol=1e-6, rtol=0, err_msg=f"{k}")


RUNNERS = {"text_and_sizes": check_rules, "image_preprocess": check_pictures}
