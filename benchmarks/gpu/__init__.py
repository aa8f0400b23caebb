"""A day with a GPU: what to measure there, in stages that each end in time and leave what they have.

python -m benchmarks.gpu torch ort          # `make gpu-check STAGES="torch ort"`; docs/gpu/README.md says more
python -m benchmarks.gpu --rehearse         # every stage on the CPU, with the smallest sizes

__main__.py    the command line
supervise.py   one stage as a process: time limits, crashes, and results that are written row by row
card.py        what nvidia-smi says of the card, before, during and after a stage
report.py      OUT/STAGE.json, and the same as a table for people in OUT/STAGE.md
stage.py       what a stage is given: rows, time left, timing; child.py is its process
made.py        model files, inputs and the reference's outputs, made on the machine where they are needed
run_*.py       one file a stage: what it measures, the most telling first
"""
