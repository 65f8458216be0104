PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: venv demo test lint goldens oracle bench gate clean

venv: $(VENV)/.ready

$(VENV)/.ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

$(VENV)/.gate: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[gate]"
	touch $@

$(VENV)/.oracle: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,oracle]"
	touch $@

# The small model that ships: from a picture and a voice of a puppet that it has never seen, and a prompt, to an mp4.
demo: $(VENV)/.ready
	$(BIN)/wan-jax generate --model wan2.6-nano --reference wan_jax/assets/puppet.png --voice wan_jax/assets/puppet.wav \
		--i-have-consent --prompt 'Character1 nods in front of a plain blue wall and says "ba do mi".' \
		--output demo.mp4 --sheet --profile
	$(BIN)/wan-jax verify demo.mp4
	@echo "demo.sheet.png: the reference beside frames, and the mouth over the loudness of the sound"

lint: $(VENV)/.ready
	$(BIN)/ruff check .

test: lint
	$(PYTEST) -m "not oracle and not device" -n 2

goldens: $(VENV)/.ready
	$(PYTEST) -m goldens

oracle: $(VENV)/.oracle
	$(PYTEST) -m oracle -n 2

bench: $(VENV)/.oracle
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/all.py --peer diffusers
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/loading.py

# What the compilers of TPUs and GPUs say of the step of a 14B model, against the baseline; minutes, no device needed.
gate: $(VENV)/.gate
	$(BIN)/python benchmarks/compile_gate.py

clean:
	rm -rf $(VENV) demo.mp4 demo.sheet.png
