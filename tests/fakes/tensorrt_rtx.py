"""`tensorrt_rtx`, faked: see fake_tensorrt."""

from fake_tensorrt import install

install(globals(), __name__, "1.7.1.116")
