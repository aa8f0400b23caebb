"""The VAE in JAX: `model` is the network, `params` reads and writes its parameters, `runtime` opens bundles."""
