"""Made-up inputs: one forward of a model that says what it takes, as Transformers models do."""

import inspect
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import nn

from kernelgraft.soundness._sites import Run, mapped


def example_runner(*args: Any, **kwargs: Any) -> Run:
    """A run with the caller's own example inputs, moved to the device and floating dtype of the model that it gets."""

    def run(model: nn.Module) -> Any:
        device, dtype = _device(model), _floating_dtype(model)

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return model(*mapped(args, placed), **mapped(kwargs, placed))

    return run


def forward_runner(model: nn.Module) -> Run | None:
    """A run with made-up inputs, for a model that says what it takes as Transformers models do; otherwise `None`.

    Asked for are `config` and `main_input_name`. Models inside the model that take another kind of input (a vision
    tower) and did not run with it are run on their own.
    """
    if _inputs(model, torch.device("meta")) is None:
        return None

    def run(model: nn.Module) -> None:
        _run_with_inputs(model)
        main = getattr(model, "main_input_name", None)
        for module in model.modules():
            if getattr(module, "main_input_name", main) != main and hasattr(module, "config"):
                with suppress(Exception):  # what does not run so has not run: that is then the verdict on it
                    _run_with_inputs(module)

    return run


_NUM_TOKENS = 4


def _run_with_inputs(model: nn.Module) -> None:
    inputs = _inputs(model, _device(model))
    if inputs is None:
        return
    dtype, takes = _floating_dtype(model), inspect.signature(model.forward).parameters
    inputs = {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}
    # Without a cache, Transformers looks for packed sequences in the values of the positions: impossible on meta.
    cache = {"use_cache": True} if "use_cache" in takes else {}
    try:
        model(**inputs, **cache)
    except Exception:
        if "input_ids" not in inputs or "attention_mask" not in takes:
            raise
        # Without a mask it looks for padding in the values of the tokens, and in those of a mask of two dimensions.
        mask = torch.zeros(1, 1, _NUM_TOKENS, _NUM_TOKENS, dtype=dtype, device=_device(model))
        model(**inputs, **cache, attention_mask=mask)


def _inputs(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor] | None:
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return None
    takes = inspect.signature(model.forward).parameters

    def of(*names: str, default: Any = None) -> Any:
        for each in (config, *(getattr(config, name, None) for name in ("vision_config", "audio_config", "encoder"))):
            for name in names:
                if getattr(each, name, None) is not None:
                    return getattr(each, name)
        return default

    def tokens() -> torch.Tensor:
        not_padding = 1 if getattr(config, "pad_token_id", None) == 0 else 0
        return torch.full((1, _NUM_TOKENS), not_padding, dtype=torch.int64, device=device)

    def pixels() -> torch.Tensor:
        size = of("image_size", default=224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        frames = (of("num_frames"),) if of("num_frames") is not None else ()
        return torch.zeros(1, *frames, of("num_channels", default=3), height, width, device=device)

    def features() -> torch.Tensor:
        num_bins = of("num_mel_bins", "input_feat_per_channel", "input_dim", default=80)
        length = 2 * of("max_source_positions", default=50)  # Whisper takes exactly this; a convolution halves it
        frames_first = of("input_feat_per_channel", "input_dim", "feature_projection_input_dim") is not None
        return torch.zeros((1, length, num_bins) if frames_first else (1, num_bins, length), device=device)

    def samples() -> torch.Tensor:
        is_spectrogram = of("num_mel_bins") is not None and of("max_length") is not None
        return torch.zeros((1, of("max_length"), of("num_mel_bins")) if is_spectrogram else (1, 16000), device=device)

    makers = {"input_ids": tokens, "pixel_values": pixels, "input_features": features, "input_values": samples}
    if main not in makers:
        return None
    inputs = {main: makers[main]()}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = tokens()
    # Two towers side by side take both; a model that puts an image between its tokens takes tokens alone.
    names_a_token = any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    if main == "input_ids" and "pixel_values" in takes and hasattr(config, "vision_config") and not names_a_token:
        inputs["pixel_values"] = pixels()
    return inputs


def _device(model: nn.Module) -> torch.device:
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _floating_dtype(model: nn.Module) -> torch.dtype:
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()
