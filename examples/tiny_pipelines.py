"""Diffusion pipelines with random weights, a few hundred kilobytes each: real classes, no download, no pictures of use.

    pipe = tiny_pipeline("flux", vae)

For examples and tests of what surrounds the VAE. The same seed gives the same pipeline.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 16  #: of text embeddings
TOKENS = 32  #: of a prompt
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("a", "photograph", "painting", "of", "the", "cat", "astronaut", "on", "horse", "beach")


def tiny_pipeline(kind: str, vae: Any, *, seed: int = 0) -> Any:
    """A pipeline of one of `KINDS` around a VAE of diffusers, whose config says how many channels latents have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = KINDS[kind](vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(vae: Any, cls: Any = diffusers.StableDiffusionPipeline) -> Any:
    """SD 1.5: a UNet on one CLIP."""
    return cls(
        vae=vae,
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        unet=_unet(vae, cross_attention_dim=WIDTH),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_img2img(vae: Any) -> Any:
    return stable_diffusion(vae, diffusers.StableDiffusionImg2ImgPipeline)


def stable_diffusion_inpaint(vae: Any) -> Any:
    return stable_diffusion(vae, diffusers.StableDiffusionInpaintPipeline)


def stable_diffusion_xl(vae: Any) -> Any:
    """SDXL: a UNet on two CLIPs side by side, with sizes as further conditions."""
    return diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=_clip(),
        text_encoder_2=_clip(projected=True),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=_unet(
            vae,
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )


def stable_diffusion_3(vae: Any) -> Any:
    """SD3: a transformer on two CLIPs and a T5."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=_clip(projected=True),
        text_encoder_2=_clip(projected=True),
        text_encoder_3=_t5(2 * WIDTH),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=_t5_tokenizer(),
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def flux(vae: Any) -> Any:
    """FLUX.1: a transformer on packed latents, with a CLIP and a T5."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
    )
    return diffusers.FluxPipeline(
        vae=vae,
        text_encoder=_clip(),
        text_encoder_2=_t5(2 * WIDTH),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


KINDS: dict[str, Callable[[Any], Any]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        stable_diffusion,
        stable_diffusion_img2img,
        stable_diffusion_inpaint,
        stable_diffusion_xl,
        stable_diffusion_3,
        flux,
    )
}


def _unet(vae: Any, **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    ).eval()


def _clip(projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _clip_tokenizer() -> Any:
    """It knows letters, within a word and at its end, and merges none."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as directory:
        vocabulary, merges = Path(directory) / "vocab.json", Path(directory) / "merges.txt"
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(directory, model_max_length=TOKENS)


def _t5(width: int) -> Any:
    config = T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _t5_tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", *WORDS]
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )
