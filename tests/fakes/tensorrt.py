"""`tensorrt`, faked: see fake_tensorrt."""

from fake_tensorrt import install

install(globals(), __name__, "11.4.0.1")
