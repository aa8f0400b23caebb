"""The VAE in JAX: `model` is the network, `params` its files, `runtime` opens exported bundles."""
