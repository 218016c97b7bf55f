"""Videos to files: MP4, GIF, contact sheets; and how far two videos are apart."""

import importlib
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SSIM_WINDOW = 7
"""Pixels; a smaller picture has no SSIM."""


def require(*modules: str) -> None:
    """Imports what will be needed once the sampling is done. Raises ImportError that says what to install."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"{module} cannot be imported ({error}): pip install 'adaspa_jax[demo]'") from error


def to_pixels(video: np.ndarray) -> np.ndarray:
    """float [B, 3, F, H, W] in [-1, 1] to uint8 [B, F, H, W, 3]."""
    return np.rint((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 4, 1)


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """Mean over the batch of the peak signal-to-noise ratio in dB; float [B, ...] in [-1, 1]. Equal videos: inf."""
    error = ((video.astype(np.float64) - reference) ** 2).reshape(len(video), -1).mean(1)
    with np.errstate(divide="ignore"):
        return float(np.mean(10 * np.log10(4 / error)))


def ssim(video: np.ndarray, reference: np.ndarray) -> float:
    """Mean structural similarity over all frames; float [B, 3, F, H, W] in [-1, 1]. NaN for less than 7 x 7 pixels."""
    from skimage.metrics import structural_similarity

    if min(video.shape[-2:]) < SSIM_WINDOW:
        return math.nan
    pairs = zip(*(x.transpose(0, 2, 3, 4, 1).reshape(-1, *x.shape[3:], 3) for x in (video, reference)), strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=2.0) for a, b in pairs]))


def _enlarge(frame: np.ndarray, height: int) -> Image.Image:
    """uint8 [H, W, 3] blown up by a whole factor to about `height`, pixels kept square and sharp."""
    factor = max(1, round(height / frame.shape[0]))
    return Image.fromarray(frame).resize((frame.shape[1] * factor, frame.shape[0] * factor), Image.Resampling.NEAREST)


def grid_frames(rows: dict[str, np.ndarray], prompts: list[str], height: int = 192) -> list[Image.Image]:
    """One picture a frame: a column a prompt, a row a run; `rows` maps a label to uint8 [B, F, H, W, 3]."""
    frames = []
    for f in range(next(iter(rows.values())).shape[1]):
        tiles = [[_enlarge(clip[f], height) for clip in clips] for clips in rows.values()]
        width, tall, bar = tiles[0][0].width, tiles[0][0].height, 18
        picture = Image.new("RGB", ((width + 4) * len(prompts), (tall + bar) * len(tiles) // 2 * 2), "#202020")
        draw = ImageDraw.Draw(picture)
        for r, (label, row) in enumerate(zip(rows, tiles, strict=True)):
            for c, (tile, prompt) in enumerate(zip(row, prompts, strict=True)):
                x, y = c * (width + 4), r * (tall + bar)
                draw.text((x + 4, y + 3), f"{label}: {prompt}", fill="white")
                picture.paste(tile, (x, y + bar))
        frames.append(picture)
    return frames


def write_gif(path: Path, frames: list[Image.Image], fps: int) -> None:
    """Writes an endless GIF."""
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, optimize=True)


def write_mp4(path: Path, frames: list[Image.Image], fps: int) -> None:
    """Writes H.264 in an MP4 container."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        # Even sides: what 4:2:0 chroma needs.
        stream.width, stream.height = (n + n % 2 for n in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            padded = Image.new("RGB", (stream.width, stream.height))
            padded.paste(picture)
            container.mux(stream.encode(av.VideoFrame.from_image(padded)))
        container.mux(stream.encode())


Strip = tuple[str, np.ndarray]
"""A caption and uint8 [columns, H, W, 3], frames from left to right."""


def strips_of(rows: dict[str, np.ndarray], prompts: list[str], columns: int = 8) -> list[Strip]:
    """Some frames of each video, the runs of a prompt one after the other; `rows` as for `grid_frames`."""
    count = next(iter(rows.values())).shape[1]
    picked = np.linspace(0, count - 1, min(columns, count)).round().astype(int)
    return [
        (f"{label}: {prompt}", clips[p][picked]) for p, prompt in enumerate(prompts) for label, clips in rows.items()
    ]


def shrunk(strip: Strip, height: int = 192) -> Strip:
    """A strip with frames of at most that height, so that many can be kept."""
    caption, frames = strip
    if frames.shape[1] <= height:
        return strip
    size = (max(1, round(frames.shape[2] * height / frames.shape[1])), height)
    return caption, np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])


def write_sheet(path: Path, strips: list[Strip]) -> None:
    """Contact sheet: the strips, which are of one size, from top to bottom."""
    tile = _enlarge(strips[0][1][0], 96)
    bar, gap = 18, 2
    size = ((tile.width + gap) * len(strips[0][1]), (tile.height + bar) * len(strips))
    sheet = Image.new("RGB", size, "#202020")
    draw = ImageDraw.Draw(sheet)
    for r, (caption, frames) in enumerate(strips):
        top = r * (tile.height + bar)
        draw.text((4, top + 3), caption, fill="white")
        for c, frame in enumerate(frames):
            sheet.paste(_enlarge(frame, 96), (c * (tile.width + gap), top + bar))
    sheet.save(path)


def write_runs(
    folder: Path, videos: dict[str, np.ndarray], prompts: list[str], fps: int, *, gif: bool = False
) -> list[Strip]:
    """video.mp4, video.gif if asked for, and sheet.png, with the runs of each prompt above each other.

    `videos`: float [B, 3, F, H, W] in [-1, 1] each. Returns what is on the sheet.
    """
    rows = {name: to_pixels(video) for name, video in videos.items()}
    frames = grid_frames(rows, prompts)
    write_mp4(folder / "video.mp4", frames, fps)
    if gif:
        write_gif(folder / "video.gif", frames, fps)
    strips = strips_of(rows, prompts)
    write_sheet(folder / "sheet.png", strips)
    return strips
