"""What `runtimes` never loads, and a program that uses a bundle."""

#: packages that only `vae_export` needs
BANNED = {"torch", "onnx", "vae_export", "safetensors", "diffusers"}
#: opens and uses the bundle sys.argv[1], after `import sys, numpy as np, runtimes`; prints two shapes
USE = """
with runtimes.open_vae(sys.argv[1]) as vae:
    posterior = vae.encode(np.zeros((1, 3, 72, 80), np.float32)).latent_dist
    print(vae.decode(posterior.sample(np.random.default_rng(0))).sample.shape)
    vae.enable_tiling(), vae.enable_slicing()
    latents = vae.images_to_latents(np.zeros((2, 72, 80, 3), np.uint8), generator=np.random.default_rng(0))
    print(vae.latents_to_images(latents).shape)
"""
