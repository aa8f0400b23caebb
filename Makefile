# make demo    set up, export the embedded model, and picture what it does to a photograph
# make test    set up and run the tests, but for those below
# make engines the tests that build engines with TensorRT-RTX; they need no GPU
# make lint    style and types
# make types   types alone
# make docs    the documentation site, into out/site
# make coverage  the tests of `make test`, and which lines they run
# make slow    the tests with real-size models, a hundred kills, full disks and long runs
# make gpu-check  the tests and the benchmark on this machine's NVIDIA GPU; what they said is in out/gpu-check.txt
# make bench   backends side by side, the five-minute version
# make fuzz    a minute of fuzzing, shared by all entries that take bytes of strangers
# make train   train the embedded model anew (40 minutes)

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test engines lint types docs coverage slow gpu-check bench fuzz train clean

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
	$(BIN)/pytest -q -m "not slow and not engines"

engines: $(READY)
	$(BIN)/pytest -q -m "engines and not slow"

slow: $(READY)
	$(BIN)/pytest -q -s -m slow

gpu-check: $(READY)
	mkdir -p out
	{ date -u; uname -srm; nvidia-smi || echo "no nvidia-smi here"; $(BIN)/vae-export doctor --json; } > out/gpu-check.txt 2>&1
	$(BIN)/pytest -m gpu -rs >> out/gpu-check.txt 2>&1; code=$$?; \
	$(BIN)/python -m benchmarks.compare --device cuda --sizes 512 1024 --rounds 10 --out out/gpu-bench >> out/gpu-check.txt 2>&1; \
	cat out/gpu-check.txt; exit $$code

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
	$(BIN)/pytest -q -m "not slow and not engines" --cov=vae_export --cov=runtimes --cov-report=term

fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),60)

train: $(READY)
	$(BIN)/python -m tools.train_tiny --out vae_export/assets/tiny

clean:
	rm -rf .venv out build dist *.egg-info
