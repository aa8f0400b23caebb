# make demo    set up, export the embedded model, and picture what it does to a photograph
# make test    set up and run the tests, but for those below
# make engines the tests that build engines with TensorRT-RTX; they need no GPU
# make lint    style and types
# make types   types alone
# make docs    the documentation site, into out/site
# make coverage  the tests of `make test`, and which lines they run
# make slow    the tests with real-size models, a hundred kills, full disks and long runs
# make gpu-check STAGES="torch ort"  what is measured on this machine's NVIDIA GPU, into out/gpu; see docs/gpu/README.md
# make gpu-check REHEARSE=1  the same on the CPU, with the smallest sizes, in Python 3.12 too where there is one
# make bench   backends side by side, the five-minute version
# make fuzz    a minute of fuzzing, shared by all entries that take bytes of strangers
# make train   train the embedded model anew (40 minutes)

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

# Each process has 4 GB and uses one core most of the time. A file's tests stay together: they share what they export.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile

# The machine with the GPU may have no network: nothing is installed for gpu-check, it takes what is there.
GPU_PYTHON = $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))
PYTHON312 ?= python3.12
BIN312 := .venv312/bin

.PHONY: demo test engines lint types docs coverage slow gpu-check rehearse-3.12 bench fuzz train clean

# pytriton without its dependencies, which nothing else here agrees with: tests ask its tritonserver to read what we write.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps nvidia-pytriton==0.7.0
	touch $(READY)

demo: $(READY)
	$(BIN)/vae-export --to onnx --out out/tiny --overwrite
	$(BIN)/vae-export inspect out/tiny
	$(BIN)/vae-export roundtrip out/tiny vae_export/assets/photos/coffee.jpg --out out/roundtrip.png

test: $(READY)
	$(BIN)/pytest -q $(PARALLEL) -m "not slow and not engines"

engines: $(READY)
	$(BIN)/pytest -q -m "engines and not slow"

slow: $(READY)
	$(BIN)/pytest -q -s -m slow

ifdef REHEARSE
gpu-check: $(READY)
	$(BIN)/python -m benchmarks.gpu $(STAGES) --rehearse
	@if $(PYTHON312) --version >/dev/null 2>&1; then $(MAKE) rehearse-3.12; else \
		echo "not rehearsed with Python 3.12: there is no $(PYTHON312) here; PYTHON312=... names one"; fi
else
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu $(STAGES) --limit $(or $(LIMIT),480) \
		$(if $(ROWS),--rows $(ROWS)) $(if $(CONTINUE),--continue)
endif

.venv312/ready: benchmarks/gpu/machine-3.12.txt
	$(PYTHON312) -m venv .venv312
	$(BIN312)/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

# With the packages of such a machine, and model files made by the project's own Python, which has PyTorch.
rehearse-3.12: .venv312/ready
	$(BIN312)/python -m compileall -q runtimes vae_export benchmarks tools tests
	$(BIN312)/python -m benchmarks.gpu $(STAGES) --rehearse --out out/gpu-rehearsal-3.12 --models out/gpu-rehearsal/models

bench: $(READY)
	$(BIN)/python -m benchmarks.compare --quick

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

coverage: $(READY)
	$(BIN)/pytest -q $(PARALLEL) -m "not slow and not engines" --cov=vae_export --cov=runtimes --cov-report=term

fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),60)

train: $(READY)
	$(BIN)/python -m tools.train_tiny --out vae_export/assets/tiny

clean:
	rm -rf .venv .venv312 out build dist *.egg-info
