"""Results have the field names and the indexing of diffusers."""

import dataclasses

import pytest
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput as DiffusersTiny
from diffusers.models.autoencoders.vae import DecoderOutput as DiffusersDecoder
from diffusers.models.modeling_outputs import AutoencoderKLOutput as DiffusersKl

from runtimes import outputs

PAIRS = [
    (outputs.AutoencoderKLOutput, DiffusersKl),
    (outputs.AutoencoderTinyOutput, DiffusersTiny),
    (outputs.DecoderOutput, DiffusersDecoder),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda kind: kind.__name__)
def test_fields_and_indices_are_those_of_diffusers(ours, theirs):
    names = [field.name for field in dataclasses.fields(theirs)]
    assert [field.name for field in dataclasses.fields(ours)] == names
    value = object()
    assert ours(value)[0] is theirs(value)[0] is value
    assert getattr(ours(value), names[0]) is value
    with pytest.raises(IndexError):
        ours(value)[1]
